//! Folders of what the kernel holds and what is asked, and the plan that must follow, by the way of the real program.
//!
//! Each `tests/plan/NN-name/` holds `config.toml`, where there is one; `request` (`event up ppp0 203.0.113.10`, `down ppp0`,
//! `sync`); `links`, an interface a line (`ppp0 203.0.113.10 up src_valid_mark`); `routing`, routes and rules as commands of
//! `ip` have them; `iptables-save`; and `plan`, the commands. The steps, carried out on what is installed, must leave
//! nothing to do. `PLAN_WRITE=1 cargo test --test plan` writes the plans anew, for `git diff` to show.

mod listing;

use std::fmt::Write;
use std::fs;
use std::path::Path;

use mh_hook::config::Config;
use mh_hook::kernel::iptables_save::Ruleset;
use mh_hook::kernel::observe::Kernel;
use mh_hook::model::names::UplinkName;
use mh_hook::model::state::State;
use mh_hook::reconcile::Plan;
use mh_hook::reconcile::diff::{Change, Step, diff};
use mh_hook::reconcile::dnat::AllChains;
use mh_hook::reconcile::event::{Direction, Event};
use mh_hook::reconcile::ownership::Owners;
use mh_hook::reconcile::parts::parts;
use mh_hook::reconcile::request::{Request, Seen};

struct Case {
    config: Option<Config>,
    kernel: Kernel,
    request: Request,
}

impl Case {
    fn read(case: &Path) -> Self {
        let read = |name: &str| fs::read_to_string(case.join(name)).unwrap_or_default();
        let config = fs::read_to_string(case.join("config.toml")).ok();
        let ruleset = Ruleset::parse(&read("iptables-save"));
        Self {
            config: config.map(|text| Config::parse(&text).expect("a configuration")),
            kernel: Kernel {
                routing: listing::routing(&read("routing")),
                ruleset: ruleset.expect("what iptables-save prints"),
                links: listing::links(&read("links")),
                dialled: Vec::new(),
            },
            request: request(read("request").trim()),
        }
    }

    fn plan(&self) -> Plan {
        let plan = Plan::new(
            &self.request,
            self.config.as_ref(),
            &AllChains::new(),
            &self.kernel,
        );
        plan.expect("a plan").expect("something to do")
    }
}

fn cases() -> Vec<std::path::PathBuf> {
    let mut cases: Vec<_> = fs::read_dir("tests/plan")
        .expect("tests/plan")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    cases.sort();
    assert!(cases.len() > 10, "too few cases: {}", cases.len());
    cases
}

#[test]
fn every_plan_is_as_written() {
    let mut failures = String::new();
    for case in cases() {
        if let Err(failure) = check(&case) {
            let _ = writeln!(failures, "--- {}\n{failure}", case.display());
        }
    }
    assert!(failures.is_empty(), "\n{failures}");
}

fn commands(steps: &[Step]) -> String {
    let commands = steps.iter().flat_map(Step::commands);
    commands
        .map(|(_, command)| format!("{command}\n"))
        .collect()
}

fn check(case: &Path) -> Result<(), String> {
    let plan = Case::read(case).plan();
    let found = commands(&plan.steps);
    if std::env::var_os("PLAN_WRITE").is_some() {
        fs::write(case.join("plan"), &found).expect("write the plan");
    }
    let expected = fs::read_to_string(case.join("plan")).unwrap_or_default();
    if expected != found {
        return Err(listing::differences(&expected, &found));
    }
    let mut after = plan.installed.clone();
    plan.steps
        .into_iter()
        .for_each(|step| carry_out(step, &mut after));
    let left: Vec<Step> = diff(&after, &plan.desired);
    if left.is_empty() {
        Ok(())
    } else {
        Err(format!("the next plan is not empty: {left:?}"))
    }
}

#[test]
fn the_parts_of_all_uplinks_and_the_orphans_make_up_the_plan_of_sync() {
    let mut compared = 0;
    for path in cases() {
        let case = Case {
            request: Request::Sync,
            ..Case::read(&path)
        };
        let Some(config) = &case.config else { continue };
        let owners = Owners::new(Some(config), &case.kernel);
        let installed = owners.installed(&case.kernel);
        let seen = Seen {
            owners: &owners,
            installed: &installed,
            links: &case.kernel.links,
            dialled: &[],
        };
        let (links, _) = Request::Sync.links(config, &seen).expect("the links");
        let (parts, orphans) = parts(config, &owners, &installed, &links);
        assert_eq!(parts.len(), config.uplinks.len());
        let lines = |steps: &[Step]| -> Vec<String> {
            let text = commands(steps);
            text.lines().map(str::to_owned).collect()
        };
        let each = parts.values().map(|it| diff(&it.installed, &it.desired));
        let mut sum: Vec<String> = each.flat_map(|steps| lines(&steps)).collect();
        sum.extend(lines(&diff(&orphans, &State::default())));
        let mut whole = lines(&case.plan().steps);
        whole.sort();
        sum.sort();
        assert_eq!(whole, sum, "{}", path.display());
        compared += usize::from(!whole.is_empty());
    }
    assert!(compared > 8, "only {compared} have anything to do");
}

/// `event up ppp0 203.0.113.10`, `up ppp0`, `down ppp0`, `sync`
fn request(line: &str) -> Request {
    let words: Vec<&str> = line.split(' ').collect();
    let interface = |name: &str| mh_hook::model::names::IfName::parse(name).expect("a name");
    match words[..] {
        ["sync"] => Request::Sync,
        ["down", name] => Request::Down {
            interface: interface(name),
        },
        ["up", name] => Request::Up {
            interface: interface(name),
            uplink: None,
            local: None,
        },
        ["event", direction, name, ..] => {
            let args = [name, "", "", words.get(3).unwrap_or(&"")].map(Into::into);
            let direction = Direction::parse(direction.as_ref()).expect("a direction");
            Request::Event(Event::from_pppd(direction, &args).expect("an event"))
        }
        _ => panic!("{line}"),
    }
}

/// What the kernel does with a step.
fn carry_out(step: Step, state: &mut State) {
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
        Step::SrcValidMark(Change::Delete, interface) => {
            assert!(state.src_valid_mark.remove(&interface), "{interface}: is 0")
        }
        Step::SrcValidMark(_, interface) => {
            assert!(state.src_valid_mark.insert(interface))
        }
        Step::Chain {
            table,
            chain,
            before,
            after,
        } => {
            let uplink = UplinkName::of_chain(&chain).expect("it names its uplink");
            let own = state.tables.entry((table, uplink)).or_default();
            assert_eq!(own.chains.get(&chain), before.as_ref());
            let jump = format!("-j {chain}");
            let entries = own.entries.iter().map(|(_, rule)| rule);
            let jumped_to = entries
                .chain(own.rules())
                .any(|rule| rule.0.ends_with(&jump));
            assert!(
                after.is_some() || !jumped_to,
                "{chain}: a chain goes that a rule jumps to"
            );
            match after {
                Some(rules) => own.chains.insert(chain, rules),
                None => own.chains.remove(&chain),
            };
        }
        Step::Entry(change, table, chain, rule) => {
            let mut owners = state.tables.iter_mut().filter(|((of, _), _)| *of == table);
            let entry = (chain, rule);
            if change == Change::Delete {
                let place = owners.find_map(|(_, own)| {
                    let index = own.entries.iter().position(|found| *found == entry)?;
                    Some(own.entries.remove(index))
                });
                assert!(place.is_some(), "{entry:?} is not there");
            } else {
                let mut words = entry.1.0.split(' ');
                let uplink = words.find_map(UplinkName::of_chain);
                let uplink = uplink.expect("it names its uplink");
                let own = state.tables.entry((table, uplink)).or_default();
                own.entries.push(entry);
            }
        }
    }
    state.tables.retain(|_, own| !own.is_empty());
}
