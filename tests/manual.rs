//! The documents say what the program does: every key, command and option stands in the manual, the completion knows
//! them, every example parses.

use std::fs;
use std::process::Command;

use mh_hook::config::{Config, KEYS};
use mh_hook::model::link::{LinkState, UplinkLink};
use mh_hook::model::names::IfName;
use mh_hook::model::state::State;
use mh_hook::reconcile::desired::{Up, desired};
use mh_hook::reconcile::diff::{Step, diff};

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
fn every_finding_of_check_stands_in_the_manual() {
    let manual = fs::read_to_string("packaging/man/mh-hook.8").expect("the manual page");
    let items = manual.lines().filter_map(|line| line.strip_prefix(".It "));
    let listed: Vec<&str> = items
        .flat_map(|item| item.split(" Pq ").next().unwrap_or_default().split(" , "))
        .filter_map(|name| name.strip_prefix("Cm "))
        .collect();
    let parts = fs::read_dir("src/inspect/check").expect("the parts of check");
    let sources = parts.map(|part| part.expect("a part").path());
    let mut found = 0;
    for source in sources {
        let text = fs::read_to_string(&source).expect("a source");
        for start in ["Finding::error(", "Finding::warning(", "Finding::info("] {
            for call in text.split(start).skip(1) {
                let Some(id) = call.trim_start().strip_prefix('"') else {
                    continue;
                };
                let id = id.split('"').next().unwrap_or_default();
                assert!(listed.contains(&id), "{}: {id}", source.display());
                found += 1;
            }
        }
    }
    assert!(found > 40, "only {found} found");
}

#[test]
fn every_command_and_option_stands_in_the_manual_and_in_each_completion() {
    let manual = fs::read_to_string("packaging/man/mh-hook.8").expect("the manual page");
    let shells = ["bash", "zsh", "fish"].map(|shell| {
        let path = format!("packaging/completion/mh-hook.{shell}");
        (shell, fs::read_to_string(path).expect("a completion"))
    });
    let (commands, options) = help();
    assert!(
        commands.len() >= 4 && options.len() >= 12,
        "{commands:?} {options:?}"
    );
    for command in &commands {
        let item = format!(".It Cm {command}");
        let is_item = |line: &str| line == item || line.starts_with(&format!("{item} "));
        assert!(manual.lines().any(is_item), "mh-hook.8: {command}");
        for (shell, text) in &shells {
            assert!(
                words(text).any(|word| word == command),
                "{shell}: {command}"
            );
        }
    }
    for option in &options {
        let flag = format!("Fl {}", &option[1..]);
        let items = || manual.lines().filter(|line| line.starts_with(".It Fl "));
        let parts = |line: &str| -> Vec<String> {
            let rest = line.trim_start_matches(".It ").split(" Ar ").next();
            let parts = rest.unwrap_or_default().split(" , ");
            parts.map(str::to_owned).collect()
        };
        assert!(
            items().any(|line| parts(line).contains(&flag)),
            "mh-hook.8: {option}"
        );
        for (shell, text) in &shells {
            let written = match (*shell, option.strip_prefix("--")) {
                ("fish", Some(long)) => format!("-l {long} "),
                ("fish", None) => format!("-s {} ", &option[1..]),
                _ => option.clone(),
            };
            let found = match *shell {
                "fish" => text.contains(&written),
                _ => words(text).any(|word| word == written),
            };
            assert!(found, "{shell}: {option}");
        }
    }
}

#[test]
fn every_field_of_a_schema_stands_in_the_manual() {
    let manual = fs::read_to_string("packaging/man/mh-hook.8").expect("the manual page");
    let items: Vec<&str> = manual
        .lines()
        .filter_map(|line| line.strip_prefix(".It Va "))
        .flat_map(|item| item.split(" , "))
        .collect();
    let mut fields = 0;
    for file in fs::read_dir("packaging/schema").expect("the schemas") {
        let path = file.expect("a schema").path();
        let text = fs::read_to_string(&path).expect("a schema");
        let schema: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        for object in objects(&schema) {
            assert_eq!(object["additionalProperties"], false, "{}", path.display());
            for field in object["properties"].as_object().expect("fields").keys() {
                let found = items.contains(&field.as_str());
                assert!(found, "{}: {field} has no paragraph", path.display());
                fields += 1;
            }
        }
    }
    assert!(fields > 20, "only {fields}");
}

/// All parts of a schema that have properties.
fn objects(schema: &serde_json::Value) -> Vec<&serde_json::Value> {
    let parts: Vec<&serde_json::Value> = match schema {
        serde_json::Value::Object(parts) => parts.values().collect(),
        serde_json::Value::Array(parts) => parts.iter().collect(),
        _ => Vec::new(),
    };
    let own = schema.get("properties").map(|_| schema);
    own.into_iter()
        .chain(parts.into_iter().flat_map(objects))
        .collect()
}

/// The commands and the options that the program's own help names.
fn help() -> (Vec<String>, Vec<String>) {
    let output = Command::new(env!("CARGO_BIN_EXE_mh-hook"))
        .arg("--help")
        .output()
        .expect("the program runs");
    let text = String::from_utf8(output.stdout).expect("text");
    let section = |title: &str| {
        let lines = text.lines().skip_while(move |line| *line != title).skip(1);
        let lines = lines.take_while(|line| line.starts_with(' '));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let named = section("Commands:").into_iter().filter_map(|line| {
        let word = line.strip_prefix("  ")?.split(' ').next()?;
        (!word.is_empty()).then(|| word.to_owned())
    });
    let mut options = Vec::new();
    for line in section("Options:") {
        let words = line.split([' ', ',']).filter(|word| !word.is_empty());
        options.extend(
            words
                .take_while(|word| word.starts_with('-'))
                .map(str::to_owned),
        );
    }
    (named.collect(), options)
}

/// What is written between blanks, quotes and the shells' signs.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'))
}

#[test]
fn the_installed_configuration_asks_for_nothing_until_it_is_filled_in() {
    let installed = fs::read_to_string("packaging/mh-hook.toml").expect("the configuration");
    let config = Config::parse(&installed).expect("it parses");
    assert!(config.uplinks.is_empty());
    // What a blank follows is a sentence, the rest an entry.
    let filled = installed.lines().map(|line| match line.strip_prefix('#') {
        Some(entry) if !entry.starts_with("  {") && entry.starts_with(' ') => line,
        Some(entry) => entry,
        None => line,
    });
    let filled = filled.collect::<Vec<_>>().join("\n");
    let config =
        Config::parse(&filled).unwrap_or_else(|problems| panic!("{problems:?} in\n{filled}"));
    assert_eq!(config.uplinks.len(), 2);
    let none = fs::read_to_string("packaging/none.toml").expect("the empty configuration");
    assert!(Config::parse(&none).expect("it parses").uplinks.is_empty());
}

#[test]
fn every_example_parses() {
    let manual = fs::read_to_string("packaging/man/mh-hook.toml.5").expect("the manual page");
    let readme = fs::read_to_string("README.md").expect("the README");
    let examples = blocks(&manual, ".Bd -literal -offset indent", ".Ed");
    assert_eq!(examples.len(), 2);
    let ours = blocks(&readme, "```toml", "```");
    assert!(!ours.is_empty());
    let files = fs::read_dir("packaging/examples").expect("the examples");
    let paths = files.map(|file| file.expect("an example").path());
    let paths = paths.filter(|path| path.extension().is_some_and(|end| end == "toml"));
    let files: Vec<String> = paths
        .map(|path| fs::read_to_string(path).expect("an example"))
        .collect();
    assert!(!files.is_empty());
    for example in examples.into_iter().chain(ours).chain(files) {
        let config =
            Config::parse(&example).unwrap_or_else(|problems| panic!("{problems:?} in\n{example}"));
        assert!(
            !config.uplinks.is_empty(),
            "it asks for nothing:\n{example}"
        );
    }
}

#[test]
fn both_readmes_have_the_same_headings_tables_and_code() {
    let shape = |path: &str| -> Vec<String> {
        let text = fs::read_to_string(path).expect("a README");
        let mut shape = Vec::new();
        let mut is_code = false;
        for line in text.lines() {
            if line.starts_with("```") {
                is_code = !is_code;
                shape.push(line.to_owned());
            } else if is_code || line.starts_with("    ") {
                // A comment is in the reader's language.
                let code = line.split(" # ").next().unwrap_or_default();
                shape.push(code.trim_end().to_owned());
            } else if line.starts_with('#') {
                shape.push("#".repeat(line.chars().take_while(|c| *c == '#').count()));
            } else if line.starts_with('|') {
                let columns = line.replace("\\|", "").matches('|').count();
                // In a table, too, what is code stays as it is.
                let code = line
                    .split('`')
                    .skip(1)
                    .step_by(2)
                    .collect::<Vec<_>>()
                    .join(" ");
                shape.push(format!("{columns} columns: {code}"));
            }
        }
        shape
    };
    let (english, japanese) = (shape("README.md"), shape("README.ja.md"));
    for (one, other) in english.iter().zip(&japanese) {
        assert_eq!(one, other);
    }
    assert_eq!(english.len(), japanese.len());
    assert!(english.len() > 50, "it compares nothing");
}

/// What stands between these lines.
fn blocks(text: &str, begin: &str, end: &str) -> Vec<String> {
    let (begin, end) = (format!("{begin}\n"), format!("\n{end}"));
    let parts = text.split(&begin).skip(1);
    parts
        .map(|part| part.split(&end).next().unwrap_or_default().to_owned())
        .collect()
}

/// Each entry of the READMEs' section, and no other, is one that the dry run prints for the same uplink.
#[test]
fn what_it_puts_in_the_kernel_is_what_a_dry_run_prints() {
    let text = "[lan]\ninterfaces = ['eth1']\nnetworks = ['192.168.0.0/24']\n[uplink.isp0]\ninterface = 'ppp0'\ntable = 10\nforward = [{ port = 80, to = '192.168.0.2' }]";
    let config = Config::parse(text).expect("it parses");
    let (name, uplink) = config.uplinks.first_key_value().expect("an uplink");
    let address = [203, 0, 113, 10].into();
    let link = UplinkLink {
        interface: IfName::parse("ppp0").expect("a name"),
        address,
        addresses: vec![address],
        state: LinkState::Up,
        mtu: Some(1492),
    };
    let up = Up::new(name, uplink, &link);
    let steps = diff(&State::default(), &desired(&config, &up));
    let commands = steps.iter().flat_map(Step::commands);
    let mut printed: Vec<String> = commands
        .map(|(_, command)| command.to_string())
        .filter(|command| !command.contains(" -N "))
        .map(|command| in_the_notation_of_the_readme(&command))
        .collect();
    printed.sort();
    for readme in ["README.md", "README.ja.md"] {
        let text = fs::read_to_string(readme).expect("a README");
        let section = text
            .split("\n## ")
            .find(|section| section.contains("98:  from X to"));
        let block = blocks(section.expect("the section"), "```", "```");
        let (mut kind, mut written) = (String::new(), Vec::new());
        for line in block[0].lines() {
            let line = line.split(" #").next().unwrap_or_default();
            let (head, entry) = line.split_at(10.min(line.len()));
            if !head.trim().is_empty() {
                kind = head.trim().to_owned();
            }
            written.push(format!(
                "{kind} {}",
                entry.split_whitespace().collect::<Vec<_>>().join(" ")
            ));
        }
        written.sort();
        assert_eq!(written, printed, "{readme}");
    }
}

/// `mangle -A PREROUTING -i ppp0 -j mh-isp0` for `iptables -t mangle -A PREROUTING -i ppp0 -j mh-isp0`, without what says
/// only that it is ours.
fn in_the_notation_of_the_readme(command: &str) -> String {
    let shorter = command
        .replace(" proto 109", "")
        .replace(" -m comment --comment mh-isp0", "")
        .replace("'!'", "!")
        .replace("203.0.113.10/32", "X")
        .replace("203.0.113.10", "X")
        .replace("from all ", "")
        .replace("iptables -t ", "")
        .replace("ip route add", "ip route")
        .replace(
            "echo 1 > /proc/sys/net/ipv4/conf/ppp0/src_valid_mark",
            "sysctl net.ipv4.conf.ppp0.src_valid_mark = 1",
        );
    match shorter.strip_prefix("ip rule add priority ") {
        Some(rule) => {
            let (priority, rule) = rule.split_once(' ').expect("a rule");
            format!("ip rule {priority}: {rule}")
        }
        None => shorter,
    }
}
