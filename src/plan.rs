//! The ordered steps from what stands to what should, as a comparison of two [`State`]s. Runs nothing.

use std::collections::BTreeMap;
use std::fmt;

use crate::iptables;
use crate::link::rp_filter_path;
use crate::state::{IfName, Loose, Route, RouteRule, Rulespec, State, Table, UplinkName};

/// Which way a step changes the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A new entry.
    Add,
    /// In the place of one of ours that has the same key.
    Replace,
    /// An entry that goes.
    Delete,
}

impl Change {
    /// The word for it in `ip`.
    pub fn verb(self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Replace => "replace",
            Self::Delete => "del",
        }
    }
}

/// One change of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A route.
    Route(Change, Route),
    /// A rule of the routing policy.
    RouteRule(Change, RouteRule),
    /// An interface's reverse path filter.
    RpFilter {
        /// Whether it is loosened, or put back.
        change: Change,
        /// The interface.
        interface: IfName,
        /// Its new value.
        value: u8,
    },
    /// An uplink's own chain, written anew as a whole: its order matters.
    Chain {
        /// The table.
        table: Table,
        /// The uplink.
        uplink: UplinkName,
        /// The rules that stand, if the chain does.
        before: Option<Vec<Rulespec>>,
        /// The rules that should stand, if the chain should.
        after: Option<Vec<Rulespec>>,
    },
    /// An entry of ours in a chain that is not: table, chain, rule.
    Entry(Change, Table, String, Rulespec),
}

impl Step {
    /// The table of iptables that it changes.
    pub fn table(&self) -> Option<Table> {
        match self {
            Self::Chain { table, .. } | Self::Entry(_, table, ..) => Some(*table),
            Self::Route(..) | Self::RouteRule(..) | Self::RpFilter { .. } => None,
        }
    }

    /// The commands that do this by hand, to be pasted into a shell.
    pub fn commands(&self) -> Vec<Command> {
        match self {
            Self::Chain {
                table,
                uplink,
                before,
                after,
            } => {
                let chain = uplink.chain();
                let whole = |flag: &str| Command::chain(*table, flag, &chain, None);
                let mut commands = Vec::new();
                match (before, after) {
                    (None, _) => commands.push(whole("-N")),
                    (Some(rules), _) if !rules.is_empty() => commands.push(whole("-F")),
                    _ => {}
                }
                match after {
                    Some(rules) => {
                        commands.extend(
                            rules
                                .iter()
                                .map(|spec| Command::chain(*table, "-A", &chain, Some(spec))),
                        );
                    }
                    None => commands.push(whole("-X")),
                }
                commands
            }
            Self::Entry(change, table, chain, spec) => {
                let flag = iptables::entry_flag(*change, *table);
                vec![Command::chain(*table, flag, chain, Some(spec))]
            }
            Self::Route(change, route) => {
                vec![Command(format!("ip route {} {route}", change.verb()))]
            }
            Self::RouteRule(change, rule) => {
                vec![Command(format!("ip rule {} {rule}", change.verb()))]
            }
            Self::RpFilter {
                interface, value, ..
            } => {
                vec![Command(format!(
                    "echo {value} > {}",
                    rp_filter_path(interface.as_str())
                ))]
            }
        }
    }

    /// What it changes, entry by entry, each as the command that would do that alone. A chain that is
    /// written anew changes only where it differs.
    pub fn changes(&self) -> Vec<(Change, Command)> {
        match self {
            Self::Chain {
                table,
                uplink,
                before,
                after,
            } => {
                let chain = uplink.chain();
                let (before, after) = (
                    before.as_deref().unwrap_or_default(),
                    after.as_deref().unwrap_or_default(),
                );
                let (gone, new) = differ(before, after);
                let command = |flag, spec| Command::chain(*table, flag, &chain, Some(spec));
                gone.into_iter()
                    .map(|spec| (Change::Delete, command("-D", spec)))
                    .chain(
                        new.into_iter()
                            .map(|spec| (Change::Add, command("-A", spec))),
                    )
                    .collect()
            }
            Self::Route(change, _)
            | Self::RouteRule(change, _)
            | Self::Entry(change, ..)
            | Self::RpFilter { change, .. } => self
                .commands()
                .into_iter()
                .map(|command| (*change, command))
                .collect(),
        }
    }
}

/// A command line for a shell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command(String);

impl Command {
    fn chain(table: Table, flag: &str, chain: &str, spec: Option<&Rulespec>) -> Self {
        let mut text = format!("iptables -t {table} {flag} {}", quote(chain));
        // A rulespec was joined from words, so it comes apart again.
        for word in spec
            .and_then(|spec| iptables::words(&spec.0).ok())
            .unwrap_or_default()
        {
            text.push(' ');
            text.push_str(&quote(&word));
        }
        Self(text)
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A word as a shell takes it literally.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:,=+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The steps that make `observed` into `desired`, in an order in which no packet goes astray:
/// on the way up routing is in place before connections are marked and redirected; on the way down
/// marking ends first, and a table loses its rules before its routes.
pub fn plan(observed: &State, desired: &State) -> Vec<Step> {
    let mut routing = Vec::new();
    let surplus = |route: &&Route| !desired.routes.contains(*route);
    for route in desired.routes.difference(&observed.routes) {
        let replaces = observed
            .routes
            .iter()
            .filter(surplus)
            .any(|old| old.key() == route.key());
        let change = if replaces {
            Change::Replace
        } else {
            Change::Add
        };
        routing.push(Step::Route(change, route.clone()));
    }
    // The closing route goes in ahead of the others.
    routing.reverse();
    for rule in desired.rules.difference(&observed.rules) {
        routing.push(Step::RouteRule(Change::Add, rule.clone()));
    }
    let adds = !routing.is_empty();
    for rule in observed.rules.difference(&desired.rules) {
        routing.push(Step::RouteRule(Change::Delete, rule.clone()));
    }
    for route in observed.routes.iter().filter(surplus) {
        let replaced = desired
            .routes
            .difference(&observed.routes)
            .any(|new| new.key() == route.key());
        if !replaced {
            routing.push(Step::Route(Change::Delete, route.clone()));
        }
    }
    let (loosen, put_back) = rp_filter(observed, desired);
    let netfilter = netfilter(observed, desired);
    if adds {
        [put_back, routing, netfilter, loosen].concat()
    } else {
        [put_back, netfilter, routing, loosen].concat()
    }
}

/// The value that is to be put back stands in a note among the iptables entries: it is written
/// down before the interface is loosened, and read until it is put back, whenever we are killed.
fn rp_filter(observed: &State, desired: &State) -> (Vec<Step>, Vec<Step>) {
    let step = |change, value, loose: &Loose| Step::RpFilter {
        change,
        interface: loose.interface.clone(),
        value,
    };
    let new = desired.loose.difference(&observed.loose);
    let old = observed.loose.difference(&desired.loose).filter(|loose| {
        // A renamed uplink still wants it.
        !desired
            .loose
            .iter()
            .any(|wanted| wanted.interface == loose.interface)
    });
    (
        new.map(|loose| step(Change::Add, 2, loose)).collect(),
        old.map(|loose| step(Change::Delete, loose.before, loose))
            .collect(),
    )
}

fn netfilter(observed: &State, desired: &State) -> Vec<Step> {
    let mut steps = Vec::new();
    for table in [Table::Mangle, Table::Nat, Table::Filter] {
        let keys = observed
            .tables
            .keys()
            .chain(desired.tables.keys())
            .filter(|(of, _)| *of == table);
        let mut uplinks: Vec<&UplinkName> = keys.map(|(_, uplink)| uplink).collect();
        uplinks.sort();
        uplinks.dedup();
        // A chain must exist before an entry jumps to it, and no entry may jump to one that goes.
        let (mut chains, mut entries, mut gone) = (Vec::new(), Vec::new(), Vec::new());
        for uplink in uplinks {
            let key = (table, uplink.clone());
            let before = observed.tables.get(&key).cloned().unwrap_or_default();
            let after = desired.tables.get(&key).cloned().unwrap_or_default();
            let (surplus, missing) = differ(&before.entries, &after.entries);
            let entry = |change: Change| {
                move |(chain, spec): &(String, Rulespec)| {
                    Step::Entry(change, table, chain.clone(), spec.clone())
                }
            };
            entries.extend(surplus.into_iter().map(entry(Change::Delete)));
            entries.extend(missing.into_iter().map(entry(Change::Add)));
            if before.chain != after.chain {
                let target = if after.chain.is_some() {
                    &mut chains
                } else {
                    &mut gone
                };
                target.push(Step::Chain {
                    table,
                    uplink: uplink.clone(),
                    before: before.chain,
                    after: after.chain,
                });
            }
        }
        steps.extend(chains.into_iter().chain(entries).chain(gone));
    }
    steps
}

/// What is only in `before`, and what is only in `after`; of doubles, each counts.
fn differ<'a, T: Ord>(before: &'a [T], after: &'a [T]) -> (Vec<&'a T>, Vec<&'a T>) {
    let mut count: BTreeMap<&T, usize> = BTreeMap::new();
    for item in after {
        *count.entry(item).or_default() += 1;
    }
    let mut spend = |item: &&'a T| match count.get_mut(item) {
        Some(left) if *left > 0 => {
            *left -= 1;
            false
        }
        _ => true,
    };
    let surplus = before.iter().filter(&mut spend).collect();
    // What is left to spend is what is missing; doubles at the end, as they would be appended.
    let mut missing: Vec<&T> = after.iter().rev().filter(|item| !spend(item)).collect();
    missing.reverse();
    (surplus, missing)
}
