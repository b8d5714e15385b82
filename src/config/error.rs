//! The problems of a configuration, each with its place in the file.

use std::fmt;
use std::ops::Range;
use std::path::Path;

use toml_spanner::Span;

/// One problem of a configuration.
#[derive(Debug, PartialEq, Eq)]
pub struct Problem {
    /// The byte offset in the text.
    pub at: usize,
    /// The byte offset at which it ends.
    end: usize,
    /// What is wrong, and what would be right.
    pub message: String,
}

impl Problem {
    pub(super) fn new(span: Span, message: impl Into<String>) -> Self {
        Self::at(span.range(), message)
    }

    pub(super) fn at(range: Range<usize>, message: impl Into<String>) -> Self {
        Self {
            at: range.start,
            end: range.end,
            message: message.into(),
        }
    }

    /// The line of the text, and below it what marks the place:
    ///
    /// ```text
    ///     6 | interfce = "ppp0"
    ///       | ^^^^^^^^
    /// ```
    pub fn snippet(&self, text: &str) -> String {
        let at = self.at.min(text.len());
        let start = text[..at].rfind('\n').map_or(0, |before| before + 1);
        let end = text[at..].find('\n').map_or(text.len(), |after| at + after);
        let (number, _) = place(text, at);
        let before = shown(&text[start..at]);
        let after = shown(text[at..end].trim_end());
        let marked = shown(
            text.get(at..self.end.clamp(at, end))
                .unwrap_or_default()
                .trim_end(),
        );
        // Of a long line, what is around the place.
        let left_out = width(&before).saturating_sub(MAX_BEFORE);
        let (before, dots) = match left_out {
            0 => (before, ""),
            _ => (skip(&before, left_out), "…"),
        };
        let room = MAX_WIDTH.saturating_sub(width(&before));
        let line = format!("{dots}{before}{}", take(&after, room));
        let column = width(dots) + width(&before);
        let carets = width(&take(&marked, room)).max(1);
        let number = format!("{number:5}");
        let empty = " ".repeat(number.len());
        let (line, spaces) = (line.trim_end(), " ".repeat(column));
        format!(
            "{number} | {line}\n{empty} | {spaces}{}\n",
            "^".repeat(carets)
        )
    }
}

/// How many columns of a line are shown ahead of the place of a problem, and in all.
const MAX_BEFORE: usize = 48;
const MAX_WIDTH: usize = 70;

/// The text as a terminal shows it: a tab is as wide as a space, other control characters are escaped.
fn shown(text: &str) -> String {
    let mut shown = String::new();
    for c in text.chars() {
        match c {
            '\t' => shown.push(' '),
            c if c.is_control() => shown.extend(c.escape_default()),
            c => shown.push(c),
        }
    }
    shown
}

/// How many columns a character takes: those of Chinese, Japanese and Korean scripts, and full-width forms, take two (Unicode
/// Standard Annex 11).
fn columns(c: char) -> usize {
    match c {
        '\u{1100}'..='\u{115f}'
        | '\u{2e80}'..='\u{303e}'
        | '\u{3041}'..='\u{a4cf}'
        | '\u{ac00}'..='\u{d7a3}'
        | '\u{f900}'..='\u{faff}'
        | '\u{fe30}'..='\u{fe6f}'
        | '\u{ff00}'..='\u{ff60}'
        | '\u{ffe0}'..='\u{ffe6}'
        | '\u{1f300}'..='\u{1faff}'
        | '\u{20000}'..='\u{3fffd}' => 2,
        '\u{300}'..='\u{36f}' | '\u{200b}'..='\u{200f}' => 0,
        _ => 1,
    }
}

fn width(text: &str) -> usize {
    text.chars().map(columns).sum()
}

/// As many characters from the start as fit.
fn take(text: &str, mut room: usize) -> String {
    let fits = |c: &char| {
        let fits = columns(*c) <= room;
        room = room.saturating_sub(columns(*c));
        fits
    };
    text.chars().take_while(fits).collect()
}

/// The text without so many columns at its start.
fn skip(text: &str, mut columns_left: usize) -> String {
    let is_skipped = |c: &char| {
        let is_skipped = columns_left > 0;
        columns_left = columns_left.saturating_sub(columns(*c));
        is_skipped
    };
    text.chars().skip_while(is_skipped).collect()
}

/// All problems of a configuration file.
#[derive(Debug)]
pub struct Errors(Vec<(String, String)>);

impl Errors {
    pub(super) fn new(path: &Path, text: &str, problems: &[Problem]) -> Self {
        let lines = problems.iter().map(|problem| {
            let (line, column) = place(text, problem.at);
            let message = &problem.message;
            let line = format!("{}:{line}:{column}: {message}", path.display());
            (line, problem.snippet(text))
        });
        Self(lines.collect())
    }

    /// One line for each problem: file, line, column (as in [`place`]), message; and the snippet for a person.
    pub fn lines(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0
            .iter()
            .map(|(line, snippet)| (&line[..], &snippet[..]))
    }
}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<&str> = self.lines().map(|(line, _)| line).collect();
        f.write_str(&lines.join("\n"))
    }
}

impl std::error::Error for Errors {}

/// The line and column at a byte offset, both counted from 1, the column in characters.
pub fn place(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.rsplit('\n').next().unwrap_or(before);
    (before.matches('\n').count() + 1, line.chars().count() + 1)
}
