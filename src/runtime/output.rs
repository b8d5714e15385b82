//! What a person asked for, on stdout. Unlike `print!`, this does not panic where nobody reads it.

use std::io::{self, Write, stdout};

/// Prints a text.
///
/// # Errors
/// It can't be written.
pub fn print(text: &str) -> io::Result<()> {
    let mut stdout = stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}
