//! The output of `status`, `check` and `explain`: text for a person, or JSON.

use std::env;
use std::io::{IsTerminal, Write, stdout};

use anyhow::{Context, Result};
use rustix::termios::tcgetwinsize;
use serde::Serialize;

/// The form in which a report is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Text,
    Json,
    /// Metrics for Prometheus, which status has.
    Prometheus,
}

/// The result of a command that only looks.
pub trait Report: Serialize {
    /// The text for a person.
    fn text(&self, style: Style) -> String;

    /// The metrics for Prometheus. None if there are none.
    fn metrics(&self) -> Option<String> {
        None
    }

    /// Whether nothing is wrong: exit status 0, else 1.
    fn is_well(&self) -> bool;
}

/// Prints a report. True if nothing is wrong.
/// Errors: standard output can't be written.
pub fn print(report: &impl Report, form: Form, detail: Detail) -> Result<bool> {
    let style = Style::of_stdout(detail);
    let text = match form {
        Form::Text => printable(&report.text(style), style),
        Form::Prometheus => report.metrics().context("there are no metrics of this")?,
        Form::Json => serde_json::to_string_pretty(report).context("write JSON")? + "\n",
    };
    stdout()
        .write_all(text.as_bytes())
        .context("print the report")?;
    Ok(report.is_well())
}

/// Escapes control characters other than line ends and the colours of [`Style::paint`]: a comment in a foreign rule must
/// not move a terminal's cursor.
fn printable(text: &str, style: Style) -> String {
    let tones = [Tone::Good, Tone::Doubtful, Tone::Bad, Tone::Strong];
    let codes = tones.map(|tone| sgr(tone as u8));
    let is_colour = |rest: &str| {
        let mut codes = codes.iter().map(String::as_str).chain([END]);
        style.is_coloured && codes.any(|code| rest.starts_with(code))
    };
    let mut clean = String::with_capacity(text.len());
    for (at, c) in text.char_indices() {
        if c.is_control() && c != '\n' && !is_colour(&text[at..]) {
            clean.extend(c.escape_default());
        } else {
            clean.push(c);
        }
    }
    clean
}

/// Select graphic rendition (ECMA-48).
fn sgr(code: u8) -> String {
    format!("\x1b[{code}m")
}

/// Resets all colours.
const END: &str = "\x1b[0m";

/// How text for a person looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    /// Not in a file or pipe, nor where the environment has `NO_COLOR` (<https://no-color.org>).
    is_coloured: bool,
    pub detail: Detail,
    /// How many columns there are. None in a file or pipe, where lines are as long as they come.
    width: Option<usize>,
}

/// How much is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    Brief,
    /// With `-v`: each rule and each command in full.
    Full,
}

/// What a colour means, with its code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    /// As it should be.
    Good = 32,
    /// Worth a look.
    Doubtful = 33,
    /// Does not work.
    Bad = 31,
    /// A heading.
    Strong = 1,
}

impl Style {
    /// For a file or pipe.
    pub const PLAIN: Self = Self {
        is_coloured: false,
        detail: Detail::Brief,
        width: None,
    };

    /// In colours, and otherwise the same.
    pub const COLOURED: Self = Self {
        is_coloured: true,
        ..Self::PLAIN
    };

    /// The same in so many columns.
    pub fn with_width(self, columns: usize) -> Self {
        let width = Some(columns);
        Self { width, ..self }
    }

    fn of_stdout(detail: Detail) -> Self {
        let is_refused = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
            || env::var_os("TERM").is_some_and(|value| value == "dumb");
        let columns = env::var("COLUMNS").ok().and_then(|text| text.parse().ok());
        let is_terminal = stdout().is_terminal();
        Self {
            is_coloured: is_terminal && !is_refused,
            detail,
            width: columns.or_else(|| is_terminal.then(terminal_width).flatten()),
        }
    }

    /// The text in the colour of its tone.
    pub fn paint(self, tone: Tone, text: &str) -> String {
        match self.is_coloured {
            true => format!("{}{text}{}", sgr(tone as u8), END),
            false => text.to_owned(),
        }
    }

    /// The text in lines no longer than there are columns, where its words allow; the second line and those after it begin
    /// with so many spaces.
    pub fn wrap(self, text: &str, indent: usize) -> String {
        let Some(width) = self.width else {
            return format!("{text}\n");
        };
        let mut words = text.split(' ');
        let mut line = words.next().unwrap_or_default().to_owned();
        let mut lines = String::new();
        for word in words {
            let is_full = width_of(&line) + 1 + width_of(word) > width;
            if is_full && !line.trim().is_empty() {
                lines += &format!("{}\n", line.trim_end());
                line = " ".repeat(indent);
            } else {
                line.push(' ');
            }
            line += word;
        }
        format!("{lines}{line}\n")
    }
}

/// How many columns the terminal has (ioctl_tty(2), TIOCGWINSZ).
fn terminal_width() -> Option<usize> {
    let size = tcgetwinsize(stdout()).ok()?;
    Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
}

/// The rows as a table, each column as wide as its widest cell, two spaces apart. Colour codes have no width.
pub fn align(rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = Vec::new();
    for row in rows {
        widths.resize(widths.len().max(row.len()), 0);
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(width_of(cell));
        }
    }
    let mut text = String::new();
    for row in rows {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| cell.clone() + &" ".repeat(width - width_of(cell)));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// The number of characters that are visible: not those of [`Style::paint`]'s sequences, which end with an `m`.
fn width_of(cell: &str) -> usize {
    let mut parts = cell.split('\x1b');
    let plain = parts.next().unwrap_or_default().chars().count();
    let painted = parts.map(|part| part.split_once('m').map_or(part, |(_, shown)| shown));
    plain + painted.map(|shown| shown.chars().count()).sum::<usize>()
}

/// The first three, for a sentence: `a, b, c and 7 more`.
pub fn few<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    const FEW: usize = 3;
    let all: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    match all.len().checked_sub(FEW) {
        Some(more) if more > 0 => format!("{} and {more} more", all[..FEW].join(", ")),
        _ => all.join(", "),
    }
}
