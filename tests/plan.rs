//! Folders of what stands and what is asked, and the plan that must follow.
//!
//! Each `tests/plan/NN-name/` holds `config.toml`; `links`, a line for each uplink in question
//! (`isp0 ppp0 203.0.113.10`, `isp0 down`; behind an address, the value of a strict rp_filter, or
//! `not-yet`), or, where there is no `config.toml`, the interface that goes down; `ip` and `iptables-save`, the listings,
//! empty where missing; and `plan`, the commands. The steps, carried out on what stands, must leave
//! nothing to do. `PLAN_WRITE=1 cargo test --test plan` writes the plans anew, for `git diff` to show.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use mh_hook::claim::{self, Addressed, Looks, Running};
use mh_hook::config::Config;
use mh_hook::plan::{Change, Step, plan};
use mh_hook::state::{IfName, Loose, Route, RouteRule, State, Table, UplinkName};
use mh_hook::{ip, iptables};

#[test]
fn every_plan_is_as_written() {
    let mut failures = String::new();
    let mut cases: Vec<_> = fs::read_dir("tests/plan")
        .expect("tests/plan")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    cases.sort();
    assert!(cases.len() > 10, "too few cases: {}", cases.len());
    for case in cases {
        if let Err(failure) = check(&case) {
            let _ = writeln!(failures, "--- {}\n{failure}", case.display());
        }
    }
    assert!(failures.is_empty(), "\n{failures}");
}

fn check(case: &Path) -> Result<(), String> {
    let read = |name: &str| fs::read_to_string(case.join(name)).unwrap_or_default();
    let observed = observe(&read("ip"), &read("iptables-save"));
    let links = read("links");
    let wanted = match fs::read_to_string(case.join("config.toml")) {
        Ok(text) => {
            let config = Config::parse(&text).map_err(|problems| format!("{problems:?}"))?;
            claim::wanted(&config, &observed, &looks(&links))
        }
        Err(_) => {
            let interface = IfName::parse(links.trim()).map_err(|error| error.to_string())?;
            claim::without_interface(&interface, &observed)
        }
    };
    let steps = plan(&observed, &wanted);
    let commands = steps.iter().flat_map(Step::commands);
    let found: String = commands
        .map(|(_, command)| format!("{command}\n"))
        .collect();
    if std::env::var_os("PLAN_WRITE").is_some() {
        fs::write(case.join("plan"), &found).expect("write the plan");
    }
    let expected = read("plan");
    if expected != found {
        return Err(diff(&expected, &found));
    }
    let mut after = observed.clone();
    steps
        .into_iter()
        .for_each(|step| carry_out(step, &wanted, &mut after));
    let left: Vec<Step> = plan(&after, &wanted);
    if left.is_empty() {
        Ok(())
    } else {
        Err(format!("the next plan is not empty: {left:?}"))
    }
}

#[test]
fn the_parts_of_all_uplinks_and_the_orphans_make_up_the_plan() {
    let mut compared = 0;
    for case in fs::read_dir("tests/plan").expect("tests/plan") {
        let case = case.expect("an entry").path();
        let read = |name: &str| fs::read_to_string(case.join(name)).unwrap_or_default();
        let config = Config::parse(&read("config.toml")).expect("a configuration");
        let observed = observe(&read("ip"), &read("iptables-save"));
        let mut looks = if config.uplinks.is_empty() {
            Looks::new()
        } else {
            looks(&read("links"))
        };
        // As `sync` does, at all uplinks.
        for name in config.uplinks.keys() {
            looks.entry(name.clone()).or_default();
        }
        let commands = |steps: Vec<Step>| -> Vec<String> {
            let commands = steps.iter().flat_map(Step::commands);
            commands.map(|(_, command)| command.to_string()).collect()
        };
        let mut whole = commands(plan(&observed, &claim::wanted(&config, &observed, &looks)));
        let (parts, orphans) = claim::parts(&config, &observed, &looks);
        assert_eq!(parts.len(), config.uplinks.len());
        let parts = parts.into_values();
        let parts = parts.map(|part| plan(&part.observed, &part.wanted));
        let mut sum: Vec<String> = parts.flat_map(commands).collect();
        sum.extend(commands(plan(&orphans, &State::default())));
        whole.sort();
        sum.sort();
        assert_eq!(whole, sum, "{}", case.display());
        compared += usize::from(!whole.is_empty());
    }
    assert!(compared > 10, "only {compared} have anything to do");
}

fn observe(listing: &str, save: &str) -> State {
    let ip::Survey { rules, routes } = ip::survey(listing);
    let rules = rules.into_iter().filter(|listed| listed.is_ours);
    let rules: Vec<RouteRule> = rules.map(|listed| listed.entry).collect();
    // The cases show no routes but ours.
    let routes: Vec<Route> = routes.into_iter().map(|listed| listed.entry).collect();
    let ours = |line: &&str| !line.contains(":\t") || line.contains(" proto 109");
    let count = listing.lines().filter(ours).count();
    assert_eq!(rules.len() + routes.len(), count, "{listing}");
    let tables = iptables::parse(&mut save.as_bytes()).expect("what iptables-save prints");
    // In these cases what the note in a chain says of the interface is so.
    let note = |(key, share): (&(Table, UplinkName), &mh_hook::state::Share)| {
        let before = share.rules().find_map(iptables::parse_loose_note)?;
        let interface = claim::interfaces(share).next()?;
        Some(Loose {
            uplink: key.1.clone(),
            interface,
            before,
        })
    };
    let loose = tables.iter().filter_map(note).collect();
    State {
        routes: routes.into_iter().collect(),
        rules: rules.into_iter().collect(),
        tables,
        loose,
    }
}

fn looks(links: &str) -> Looks {
    let look = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let name = UplinkName::parse(words[0]).expect("an uplink's name");
        let link = words.get(2).map(|address| Addressed {
            interface: IfName::parse(words[1]).expect("an interface"),
            address: address.parse().expect("an address"),
            addresses: Vec::new(),
            running: if words.contains(&"not-yet") {
                Running::NotYet
            } else {
                Running::Yes
            },
            mtu: Some(1492),
            strict: words.get(3).and_then(|word| word.parse().ok()),
        });
        (name, link)
    };
    links.lines().map(look).collect()
}

/// What the kernel does with a step.
fn carry_out(step: Step, wanted: &State, state: &mut State) {
    match step {
        Step::Route(Change::Delete, route) => {
            assert!(state.routes.remove(&route), "{route} is not there")
        }
        Step::Route(Change::Replace, route) => {
            state.routes.retain(|old| old.key() != route.key());
            state.routes.insert(route);
        }
        Step::Route(Change::Add, route) => {
            assert!(
                !state.routes.iter().any(|old| old.key() == route.key()),
                "{route}: File exists"
            );
            state.routes.insert(route);
        }
        Step::RouteRule(Change::Delete, rule) => {
            assert!(state.rules.remove(&rule), "{rule} is not there")
        }
        Step::RouteRule(_, rule) => {
            assert!(state.rules.insert(rule.clone()), "{rule}: File exists")
        }
        Step::Chain {
            table,
            chain,
            before,
            after,
        } => {
            let uplink = UplinkName::of_chain(&chain).expect("it names its uplink");
            let share = state.tables.entry((table, uplink)).or_default();
            assert_eq!(share.chains.get(&chain), before.as_ref());
            let jump = format!("-j {chain}");
            let entries = share.entries.iter().map(|(_, spec)| spec);
            let jumped_to = entries
                .chain(share.rules())
                .any(|spec| spec.0.ends_with(&jump));
            assert!(
                after.is_some() || !jumped_to,
                "{chain}: a chain goes that an entry jumps to"
            );
            match after {
                Some(rules) => share.chains.insert(chain, rules),
                None => share.chains.remove(&chain),
            };
        }
        Step::Entry(change, table, chain, spec) => {
            let mut owners = state.tables.iter_mut().filter(|((of, _), _)| *of == table);
            let entry = (chain, spec);
            if change == Change::Delete {
                let place = owners.find_map(|(_, share)| {
                    let index = share.entries.iter().position(|found| *found == entry)?;
                    Some(share.entries.remove(index))
                });
                assert!(place.is_some(), "{entry:?} is not there");
            } else {
                let owner = entry
                    .1
                    .0
                    .split(' ')
                    .find_map(|word| {
                        UplinkName::of_chain(word).or_else(|| UplinkName::of_comment(word))
                    })
                    .expect("it names its uplink");
                let share = state.tables.entry((table, owner)).or_default();
                share.entries.push(entry);
            }
        }
        // Whose it is, and its former value, is what the note in the uplink's chain says.
        Step::RpFilter {
            change, interface, ..
        } => {
            state.loose.retain(|loose| loose.interface != interface);
            let loosened = wanted
                .loose
                .iter()
                .filter(|loose| loose.interface == interface);
            state
                .loose
                .extend(loosened.filter(|_| change == Change::Add).cloned());
        }
    }
    state
        .tables
        .retain(|_, share| *share != mh_hook::state::Share::default());
}

/// Line by line; plans are short.
fn diff(expected: &str, found: &str) -> String {
    let only = |sign, a: &str, b: &str| -> String {
        a.lines()
            .filter(|line| !b.lines().any(|other| other == *line))
            .map(|line| format!("{sign}{line}\n"))
            .collect()
    };
    let text = only('-', expected, found) + &only('+', found, expected);
    if text.is_empty() {
        format!("the order differs; found:\n{found}")
    } else {
        text
    }
}
