//! The problems of a configuration, each with its place in the file.

use std::fmt;
use std::path::PathBuf;

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
pub struct Errors {
    pub(super) path: PathBuf,
    pub(super) text: String,
    pub(super) problems: Vec<Problem>,
}

impl Errors {
    /// One line for each problem: file, line, column (as in [`place`]), message.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        self.problems.iter().map(|problem| {
            let (line, column) = place(&self.text, problem.at);
            format!(
                "{}:{line}:{column}: {}",
                self.path.display(),
                problem.message
            )
        })
    }
}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.lines().collect::<Vec<_>>().join("\n"))
    }
}

impl std::error::Error for Errors {}

/// The line and column at a byte offset, both counted from 1, the column in characters.
pub fn place(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.rsplit('\n').next().unwrap_or(before);
    (before.matches('\n').count() + 1, line.chars().count() + 1)
}
