//! Reports as text.

use mh_hook::inspect::report::{Style, Tone, align};

#[test]
fn columns_are_aligned_and_colours_take_no_room() {
    let rows = |style: Style| {
        let row = |first: String, last: &str| vec![first, last.to_owned()];
        vec![
            row("é".to_owned(), "1"),
            row(style.paint(Tone::Good, "wide"), "2"),
            row(style.paint(Tone::Bad, "mm"), ""),
        ]
    };
    assert_eq!(align(&rows(Style::PLAIN)), "é     1\nwide  2\nmm\n");
    let coloured = "é     1\n\x1b[32mwide\x1b[0m  2\n\x1b[31mmm\x1b[0m\n";
    assert_eq!(align(&rows(Style::COLOURED)), coloured);
}

#[test]
fn long_lines_are_wrapped_at_words_where_the_width_is_known() {
    let style = Style::PLAIN.with_width(20);
    let text = "  nat    by rule 1 of mh-isp0";
    assert_eq!(
        style.wrap(text, 9),
        "  nat    by rule 1\n         of mh-isp0\n"
    );
    // A word that is longer than the line stays whole: it may be a command.
    let word = "x".repeat(30);
    assert_eq!(style.wrap(&word, 2), format!("{word}\n"));
    assert_eq!(
        style.wrap(&format!("see {word} now"), 2),
        format!("see\n  {word}\n  now\n")
    );
    assert_eq!(Style::PLAIN.wrap(text, 9), format!("{text}\n"));
    let painted = Style::COLOURED
        .with_width(8)
        .wrap(&Style::COLOURED.paint(Tone::Bad, "12345678"), 0);
    assert_eq!(painted, "\x1b[31m12345678\x1b[0m\n");
}
