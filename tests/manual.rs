//! The documents say what the program does: every key stands in the manual, every example parses.

use std::fs;

use mh_hook::config::{Config, KEYS};

#[test]
fn every_key_stands_in_the_manual() {
    let manual = fs::read_to_string("packaging/man/mh-hook.toml.5").expect("the manual page");
    for (place, keys) in &KEYS[1..] {
        for key in *keys {
            let as_item = |line: &str| {
                let line = line
                    .strip_prefix(&format!(".It Sy {place} "))
                    .or(line.strip_prefix(".It "));
                line.is_some_and(|item| item.split(' ').nth(1) == Some(key))
            };
            assert!(
                manual.lines().any(as_item),
                "{key} of {place} has no paragraph"
            );
        }
    }
}

#[test]
fn every_example_parses() {
    let manual = fs::read_to_string("packaging/man/mh-hook.toml.5").expect("the manual page");
    let readme = fs::read_to_string("README.md").expect("the README");
    let examples = blocks(&manual, ".Bd -literal -offset indent", ".Ed");
    assert_eq!(examples.len(), 2);
    let ours = blocks(&readme, "```toml", "```");
    assert!(!ours.is_empty());
    for example in examples.into_iter().chain(ours) {
        let config =
            Config::parse(&example).unwrap_or_else(|problems| panic!("{problems:?} in\n{example}"));
        assert!(
            !config.uplinks.is_empty(),
            "it asks for nothing:\n{example}"
        );
    }
}

/// What stands between these lines.
fn blocks(text: &str, begin: &str, end: &str) -> Vec<String> {
    let (begin, end) = (format!("{begin}\n"), format!("\n{end}"));
    let parts = text.split(&begin).skip(1);
    parts
        .map(|part| part.split(&end).next().unwrap_or_default().to_owned())
        .collect()
}
