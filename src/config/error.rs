//! What is wrong with a configuration, each problem with its place.

use std::fmt;
use std::path::PathBuf;

use toml_spanner::Span;

/// One thing wrong with the configuration.
#[derive(Debug, PartialEq, Eq)]
pub struct Problem {
    /// Its place, in bytes.
    pub at: usize,
    /// What it is, and what would be right.
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

/// All that is wrong with a configuration file.
#[derive(Debug)]
pub struct Errors {
    pub(super) path: PathBuf,
    pub(super) text: String,
    pub(super) problems: Vec<Problem>,
}

impl Errors {
    /// One line for each: file, line, column (both from 1, in characters), message.
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

/// Line and column, both from 1, the column in characters.
pub fn place(text: &str, offset: usize) -> (usize, usize) {
    let ahead = text.get(..offset).unwrap_or(text);
    let line = ahead.rsplit('\n').next().unwrap_or(ahead);
    (ahead.matches('\n').count() + 1, line.chars().count() + 1)
}
