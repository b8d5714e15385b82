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
    assert_eq!(align(&rows(Style::Plain)), "é     1\nwide  2\nmm\n");
    let coloured = "é     1\n\x1b[32mwide\x1b[0m  2\n\x1b[31mmm\x1b[0m\n";
    assert_eq!(align(&rows(Style::Coloured)), coloured);
}
