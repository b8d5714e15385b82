//! Standard output.

use std::io::{self, Write, stdout};

/// Prints a text. Unlike `print!`, it does not panic if stdout is closed.
/// Errors: it can't be written.
pub fn print(text: &str) -> io::Result<()> {
    let mut stdout = stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}
