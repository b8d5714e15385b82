//! Standard output, and stderr for a person.

use std::io::{self, Write, stderr, stdout};

use crate::runtime::log::printable;

/// Prints a text. Unlike `print!`, it does not panic if stdout is closed.
/// Errors: it can't be written.
pub fn print(text: &str) -> io::Result<()> {
    let mut stdout = stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Prints a line on stderr. Unlike `eprintln!`, it does not panic if stderr is closed.
pub fn complain(text: &str) {
    let _ = writeln!(stderr(), "mh-hook: {}", printable(text));
}

/// Prints text of several lines on stderr, as it is.
pub fn show(text: &str) {
    let _ = stderr().write_all(text.as_bytes());
}
