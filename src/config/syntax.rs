//! What a person meant where the text is not TOML: the parser's own words tell what it expected, these what to write.

use std::ops::Range;

use super::error::Problem;

/// The problem of a syntax error at this place, whose message is the parser's.
pub fn problem(text: &str, span: Range<usize>, message: String) -> Problem {
    let start = span.start.min(text.len());
    let line_start = text[..start].rfind('\n').map_or(0, |at| at + 1);
    let line_end = text[start..].find('\n').map_or(text.len(), |at| start + at);
    let line = &text[line_start..line_end];
    if let Some((at, wide, plain)) = foreign_character(line) {
        let at = line_start + at;
        let code = wide as u32;
        let message = match plain {
            ' ' => format!("a wide space (U+{code:04X}): write a plain space"),
            plain => format!("`{wide}` (U+{code:04X}) is not `{plain}`: write `{plain}`"),
        };
        return Problem::at(at..at + wide.len_utf8(), message);
    }
    // Where a bracket or a string is left open, the error is where the text ends.
    let is_at_end = text[start..].trim().is_empty()
        || message.contains("eof")
        || message.contains("a right bracket");
    if let Some((at, bracket)) = left_open(text).filter(|_| is_at_end) {
        let message = format!("this `{bracket}` is not closed");
        return Problem::at(at..at + 1, message);
    }
    let rest = text[start..line_end].trim_start();
    let word = |c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | '_' | '/' | ':');
    let value = &rest[..rest.find(|c| !word(c)).unwrap_or(rest.len())];
    let value_start = line[..start - line_start]
        .rfind(['=', ',', '[', '{'])
        .map_or(0, |at| at + 1);
    let whole = line[value_start..].trim_start();
    let whole = &whole[..whole.find(|c| !word(c)).unwrap_or(whole.len())];
    let is_address = |text: &str| {
        text.contains('.')
            && text
                .chars()
                .all(|c| c.is_ascii_digit() || matches!(c, '.' | '/' | ':'))
    };
    let message = if message.contains("unterminated") {
        format!("this string has no end: add a quote ({message})")
    } else if rest.starts_with("//") || rest.starts_with(';') {
        "a comment begins with #".into()
    } else if let Some(unquoted) = [whole, value].into_iter().find(|text| is_address(text)) {
        format!("in quotes: \"{unquoted}\"")
    } else if matches!(whole, "yes" | "on" | "True" | "TRUE") {
        "write true, without quotes".into()
    } else if matches!(whole, "no" | "off" | "False" | "FALSE") {
        "write false, without quotes".into()
    } else if rest.is_empty() && line.trim_end().ends_with('=') {
        "no value comes after =".into()
    } else if message.contains("expected an equals") {
        let key = line[..start - line_start].trim();
        format!("{key} = … : a key and its value have = between them")
    } else {
        message
    };
    Problem::at(span, message)
}

/// The first character of a line, outside of its strings and comment, that looks like one of TOML's and is none; and that one.
fn foreign_character(line: &str) -> Option<(usize, char, char)> {
    let mut quote = None;
    for (at, c) in line.char_indices() {
        match (c, quote) {
            ('#', None) => return None,
            ('"' | '\'', None) => quote = Some(c),
            (_, Some(open)) if c == open => quote = None,
            (_, None) => {
                if let Some(plain) = plain(c) {
                    return Some((at, c, plain));
                }
            }
            _ => {}
        }
    }
    None
}

/// What a character looks like, in ASCII: full-width forms, typographical quotes and dashes, wide spaces.
fn plain(c: char) -> Option<char> {
    match c {
        '\u{ff01}'..='\u{ff5e}' => char::from_u32(c as u32 - 0xfee0),
        '\u{3000}' | '\u{a0}' => Some(' '),
        '“' | '”' | '„' | '″' => Some('"'),
        '‘' | '’' | '′' => Some('\''),
        '–' | '—' | '−' => Some('-'),
        '【' | '「' => Some('['),
        '】' | '」' => Some(']'),
        '、' => Some(','),
        _ => None,
    }
}

/// The innermost bracket that is not closed, and where it is.
fn left_open(text: &str) -> Option<(usize, char)> {
    let mut open: Vec<(usize, char)> = Vec::new();
    let mut quote = None;
    let mut is_comment = false;
    for (at, c) in text.char_indices() {
        match (c, quote) {
            ('\n', _) => {
                is_comment = false;
                quote = None;
            }
            _ if is_comment => {}
            ('#', None) => is_comment = true,
            ('"' | '\'', None) => quote = Some(c),
            (_, Some(opened)) if c == opened => quote = None,
            ('[' | '{', None) => open.push((at, c)),
            (']' | '}', None) => _ = open.pop(),
            _ => {}
        }
    }
    open.pop()
}
