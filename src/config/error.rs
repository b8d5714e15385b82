//! The problems of a configuration, each with its place in the file.

use std::fmt;
use std::path::Path;

use toml_spanner::Span;

/// One problem of a configuration.
#[derive(Debug, PartialEq, Eq)]
pub struct Problem {
    /// The byte offset in the text.
    pub at: usize,
    /// What is wrong, and what would be right.
    pub message: String,
}

impl Problem {
    pub(super) fn new(span: Span, message: impl Into<String>) -> Self {
        Self {
            at: span.range().start,
            message: message.into(),
        }
    }
}

/// All problems of a configuration file.
#[derive(Debug)]
pub struct Errors(Vec<String>);

impl Errors {
    pub(super) fn new(path: &Path, text: &str, problems: Vec<Problem>) -> Self {
        let lines = problems.into_iter().map(|Problem { at, message }| {
            let (line, column) = place(text, at);
            format!("{}:{line}:{column}: {message}", path.display())
        });
        Self(lines.collect())
    }

    /// One line for each problem: file, line, column (as in [`place`]), message.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        self.0.iter().cloned()
    }
}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Errors {}

/// The line and column at a byte offset, both counted from 1, the column in characters.
pub fn place(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.rsplit('\n').next().unwrap_or(before);
    (before.matches('\n').count() + 1, line.chars().count() + 1)
}
