//! Files and what is wrong with them: each `tests/config/NN-name.toml` beside `NN-name.errors`, all
//! errors with line and column; a file that holds has none.
//! `CONFIG_WRITE=1 cargo test --test config` writes the errors anew, for `git diff` to show.

use std::fs;

use mh_hook::config::{Config, place};

#[test]
fn every_file_has_the_errors_that_are_written() {
    let mut failures = Vec::new();
    let mut cases: Vec<_> = fs::read_dir("tests/config")
        .expect("tests/config")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "toml")
        })
        .collect();
    cases.sort();
    assert!(cases.len() > 10, "too few cases: {}", cases.len());
    for case in cases {
        let text = fs::read_to_string(&case).expect("the configuration");
        let found: String = match Config::parse(&text) {
            Ok(_) => String::new(),
            Err(problems) => problems
                .iter()
                .map(|problem| {
                    let (line, column) = place(&text, problem.at);
                    format!("{line}:{column}: {}\n", problem.message)
                })
                .collect(),
        };
        let errors = case.with_extension("errors");
        if std::env::var_os("CONFIG_WRITE").is_some() {
            fs::write(&errors, &found).expect("write the errors");
        }
        let expected = fs::read_to_string(&errors).expect("the errors");
        if expected != found {
            failures.push(format!(
                "--- {}: expected\n{expected}found\n{found}",
                case.display()
            ));
        }
    }
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

/// Each mistake that a person makes, with the whole output: `tests/config/mistakes/NAME.toml` and `NAME.out`.
#[test]
fn every_mistake_is_told_as_it_is_written() {
    let write = std::env::var_os("CONFIG_WRITE").is_some();
    let mut failures = Vec::new();
    let mut count = 0;
    let mut files: Vec<_> = fs::read_dir("tests/config/mistakes")
        .expect("tests/config/mistakes")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    files.retain(|path| path.extension().is_some_and(|it| it == "toml"));
    for case in files {
        count += 1;
        let text = fs::read_to_string(&case).expect("the configuration");
        let Err(problems) = Config::parse(&text) else {
            failures.push(format!("--- {}: no mistake is found", case.display()));
            continue;
        };
        let found: String = problems
            .iter()
            .map(|problem| {
                let (line, column) = place(&text, problem.at);
                let snippet = problem.snippet(&text);
                format!("{line}:{column}: {}\n{snippet}", problem.message)
            })
            .collect();
        let is_narrow = |line: &str| !line.contains(" | ") || line.chars().count() <= 80;
        assert!(found.lines().all(is_narrow), "{}: {found}", case.display());
        let path = case.with_extension("out");
        if write {
            fs::write(&path, &found).expect("write the output");
        }
        let expected = fs::read_to_string(&path).expect("the output");
        if expected != found {
            let case = case.display();
            failures.push(format!("--- {case}: expected\n{expected}found\n{found}"));
        }
    }
    assert!(count >= 54, "only {count} mistakes");
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

#[test]
fn defaults_are_those_of_the_manual() {
    let text = "[lan]\ninterfaces = ['eth1']\nnetworks = ['10.0.0.0/8']\n[uplink.a]\ninterface = 'ppp0'\ntable = 10";
    let config = Config::parse(text).expect("it holds");
    assert_eq!(config.mask, 0xff);
    let priority = &config.priority;
    assert_eq!(
        (priority.local, priority.mark, priority.source),
        (98, 99, 100)
    );
    let uplink = config.uplinks.values().next().expect("an uplink");
    assert!(uplink.masquerade);
    let routing = uplink.routing.as_ref().expect("a table");
    assert_eq!(routing.mark.to_string(), "0xa/0xff");
}
