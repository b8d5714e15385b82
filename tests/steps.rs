//! The steps that mend a chain, carried out as iptables does.

use std::rc::Rc;

use mh_hook::model::netfilter::{Rule, Table};
use mh_hook::reconcile::diff::{Change, Step};

/// All chains of up to three rules, of three kinds; and none.
fn chains() -> Vec<Option<Vec<Rule>>> {
    let mut chains = vec![Vec::new()];
    for length in 0..3 {
        let longer = chains.iter().filter(|chain| chain.len() == length);
        let longer = longer.flat_map(|chain| {
            ["-p tcp", "-p udp", "-p esp"].map(|spec| {
                let one = [Rule(spec.to_owned())];
                [chain.as_slice(), &one].concat()
            })
        });
        chains.extend(longer.collect::<Vec<_>>());
    }
    chains.into_iter().map(Some).chain([None]).collect()
}

/// What iptables makes of a chain (iptables(8)).
fn carry_out(command: &str, chain: &mut Option<Vec<Rule>>) {
    let words: Vec<&str> = command.split(' ').collect();
    let spec = |from: usize| Rule(words[from..].join(" "));
    assert_eq!(
        (words[..3].join(" ").as_str(), words[4]),
        ("iptables -t nat", "mh-isp0")
    );
    if words[3] == "-N" {
        assert_eq!(chain.replace(Vec::new()), None, "{command}");
        return;
    }
    let rules = chain.as_mut().expect("the chain stands");
    match words[3] {
        "-A" => rules.push(spec(5)),
        "-I" => rules.insert(words[5].parse::<usize>().expect("a number") - 1, spec(6)),
        "-D" => {
            let place = rules.iter().position(|rule| *rule == spec(5));
            rules.remove(place.expect("the rule stands"));
        }
        "-F" => rules.clear(),
        "-X" => {
            assert!(rules.is_empty(), "{command}");
            *chain = None;
        }
        flag => panic!("{flag}"),
    }
}

#[test]
fn the_mending_of_any_chain_deletes_first_and_ends_in_what_is_wanted() {
    for before in chains() {
        for after in chains().into_iter().filter(|after| *after != before) {
            let step = Step::Chain {
                table: Table::Nat,
                chain: "mh-isp0".into(),
                before: before.clone().map(Rc::new),
                after: after.clone().map(Rc::new),
            };
            let mut mending = step.commands();
            mending.sort_by_key(|(change, _)| *change != Change::Delete);
            let mut chain = before.clone();
            for (_, command) in &mending {
                carry_out(&command.to_string(), &mut chain);
            }
            assert_eq!(chain, after, "{before:?} by {mending:?}");
        }
    }
}

#[test]
fn one_rule_that_is_missing_is_one_command() {
    let rules = ["-p tcp", "-p udp", "-p esp"].map(|spec| Rule(spec.to_owned()));
    for (missing, expected) in [
        (0, "iptables -t nat -I mh-isp0 1 -p tcp"),
        (1, "iptables -t nat -I mh-isp0 2 -p udp"),
        (2, "iptables -t nat -A mh-isp0 -p esp"),
    ] {
        let mut before = rules.to_vec();
        before.remove(missing);
        let step = Step::Chain {
            table: Table::Nat,
            chain: "mh-isp0".into(),
            before: Some(Rc::new(before)),
            after: Some(Rc::new(rules.to_vec())),
        };
        let mending = step.commands();
        let commands: Vec<String> = mending
            .iter()
            .map(|(_, command)| command.to_string())
            .collect();
        assert_eq!(commands, [expected]);
    }
}

#[test]
fn one_rule_too_many_is_one_command_and_the_others_keep_their_counters() {
    let rules = |specs: &[&str]| {
        let rules = specs.iter().map(|spec| Rule((*spec).to_owned()));
        Some(Rc::new(rules.collect::<Vec<_>>()))
    };
    for (before, after, expected) in [
        (
            ["-p tcp", "-p udp", "-p esp"],
            ["-p tcp", "-p esp"],
            "-p udp",
        ),
        (
            ["-p tcp", "-p udp", "-p tcp"],
            ["-p udp", "-p tcp"],
            "-p tcp",
        ),
        (
            ["-p tcp", "-p tcp", "-p esp"],
            ["-p tcp", "-p esp"],
            "-p tcp",
        ),
    ] {
        let step = Step::Chain {
            table: Table::Nat,
            chain: "mh-isp0".into(),
            before: rules(&before),
            after: rules(&after),
        };
        let commands = step.commands().into_iter();
        let commands: Vec<String> = commands.map(|(_, command)| command.to_string()).collect();
        assert_eq!(commands, [format!("iptables -t nat -D mh-isp0 {expected}")]);
    }
}
