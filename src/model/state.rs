//! What the kernel holds for uplinks, installed and desired alike.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::names::{IfName, UplinkName};
use crate::model::netfilter::{Rule, Rules, Table, UplinkTable};
use crate::model::route::{Route, RouteRule};

/// Our entries: those that are installed, or those that are desired.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub routes: BTreeSet<Route>,
    pub rules: BTreeSet<RouteRule>,
    /// What each uplink has in each table of iptables; none of them is empty.
    pub tables: BTreeMap<(Table, UplinkName), UplinkTable>,
    /// Interfaces whose `src_valid_mark` is 1 (Documentation/networking/ip-sysctl.rst).
    pub src_valid_mark: BTreeSet<IfName>,
}

/// One entry of a state, or of anybody's.
#[derive(Clone, Copy, Debug)]
pub enum Entry<'a> {
    Route(&'a Route),
    RouteRule(&'a RouteRule),
    /// A chain of iptables that somebody made.
    Chain(Table, &'a str),
    Rule(Table, &'a str, &'a Rule),
    /// An interface's `src_valid_mark`.
    SrcValidMark(&'a IfName),
}

impl State {
    /// Puts all entries of another state in.
    pub fn merge(&mut self, other: Self) {
        let Self {
            routes,
            rules,
            tables,
            src_valid_mark,
        } = other;
        self.routes.extend(routes);
        self.rules.extend(rules);
        for (key, table) in tables {
            let own = self.tables.entry(key).or_default();
            own.chains.extend(table.chains);
            own.entries.extend(table.entries);
        }
        self.src_valid_mark.extend(src_valid_mark);
    }

    /// Puts in one of an uplink's own chains.
    pub fn add_chain(&mut self, table: Table, uplink: &UplinkName, chain: &str, rules: Rules) {
        let own = self.tables.entry((table, uplink.clone())).or_default();
        own.chains.insert(chain.to_owned(), rules);
    }

    /// Puts in an uplink's rule in a chain that is not its own.
    pub fn add_rule(&mut self, table: Table, uplink: &UplinkName, chain: &str, rule: Rule) {
        let own = self.tables.entry((table, uplink.clone())).or_default();
        own.entries.push((chain.to_owned(), rule));
    }

    /// The entries for which this holds. A chain stays or goes with all its rules.
    pub fn filter(&self, keep: impl Fn(Entry) -> bool) -> Self {
        let mut parts = self.split(|entry| vec![keep(entry)]);
        parts.remove(&true).unwrap_or_default()
    }

    /// The entries by the keys that they are given; one with several keys stands with each. A chain goes with all its rules.
    pub fn split<K: Ord>(&self, keys: impl Fn(Entry) -> Vec<K>) -> BTreeMap<K, Self> {
        let Self {
            routes,
            rules,
            tables,
            src_valid_mark,
        } = self;
        let mut parts: BTreeMap<K, Self> = BTreeMap::new();
        for route in routes {
            for key in keys(Entry::Route(route)) {
                parts.entry(key).or_default().routes.insert(route.clone());
            }
        }
        for rule in rules {
            for key in keys(Entry::RouteRule(rule)) {
                parts.entry(key).or_default().rules.insert(rule.clone());
            }
        }
        for ((table, uplink), UplinkTable { chains, entries }) in tables {
            for (chain, rules) in chains {
                for key in keys(Entry::Chain(*table, chain)) {
                    let part = parts.entry(key).or_default();
                    part.add_chain(*table, uplink, chain, Rules::clone(rules));
                }
            }
            for (chain, rule) in entries {
                for key in keys(Entry::Rule(*table, chain, rule)) {
                    let part = parts.entry(key).or_default();
                    part.add_rule(*table, uplink, chain, rule.clone());
                }
            }
        }
        for interface in src_valid_mark {
            for key in keys(Entry::SrcValidMark(interface)) {
                let part = parts.entry(key).or_default();
                part.src_valid_mark.insert(interface.clone());
            }
        }
        parts
    }

    /// Whether an entry is one of these. Of a chain, whether there is one of that name.
    pub fn contains(&self, entry: Entry) -> bool {
        let mut tables = self.tables.iter();
        match entry {
            Entry::Route(route) => self.routes.contains(route),
            Entry::RouteRule(rule) => self.rules.contains(rule),
            Entry::Chain(table, chain) => {
                tables.any(|((of, _), own)| *of == table && own.chains.contains_key(chain))
            }
            Entry::Rule(table, chain, rule) => tables.any(|((of, _), own)| {
                let mut entries = own.entries.iter();
                *of == table && entries.any(|(other, its)| other == chain && its == rule)
            }),
            Entry::SrcValidMark(interface) => self.src_valid_mark.contains(interface),
        }
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
