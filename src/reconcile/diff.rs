//! The ordered steps from the installed entries to the desired ones, as a comparison of two [`State`]s. Runs nothing.

use std::collections::BTreeMap;

use crate::model::names::{IfName, UplinkName};
use crate::model::netfilter::{Rule, Rules, Table, UplinkTable};
use crate::model::route::{Route, RouteRule};
use crate::model::state::State;
use crate::reconcile::command::Command;

/// Whether a step adds or removes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Add,
    /// Adds an entry in place of one of ours with the same key.
    Replace,
    Delete,
}

impl Change {
    /// The verb of `ip`.
    pub fn verb(self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Replace => "replace",
            Self::Delete => "del",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Route(Change, Route),
    RouteRule(Change, RouteRule),
    /// An interface's `src_valid_mark`: 1, or 0 again.
    SrcValidMark(Change, IfName),
    /// An uplink's own chain, with all rules, since their order matters.
    Chain {
        table: Table,
        chain: String,
        /// The installed rules. None if the chain is not installed.
        before: Option<Rules>,
        /// The desired rules. None if the chain is not desired.
        after: Option<Rules>,
    },
    /// A rule of ours in a chain that is not ours: table, chain, rule.
    Entry(Change, Table, String, Rule),
}

impl Step {
    /// The table of iptables that it changes.
    pub fn table(&self) -> Option<Table> {
        match self {
            Self::Chain { table, .. } | Self::Entry(_, table, ..) => Some(*table),
            Self::Route(..) | Self::RouteRule(..) | Self::SrcValidMark(..) => None,
        }
    }

    /// The commands of this step, to be pasted into a shell. Those that delete come first.
    pub fn commands(&self) -> Vec<(Change, Command<'_>)> {
        match self {
            Self::Chain { .. } => self.by_edits(self.edits()),
            Self::Entry(change, table, chain, spec) => {
                let flag = entry_flag(*change, *table);
                let command = Command::iptables(*table, flag, chain, None, Some(spec));
                vec![(*change, command)]
            }
            Self::Route(change, route) => vec![(*change, Command::Route(*change, route))],
            Self::RouteRule(change, rule) => vec![(*change, Command::RouteRule(*change, rule))],
            Self::SrcValidMark(change, interface) => {
                vec![(*change, Command::SrcValidMark(*change, interface))]
            }
        }
    }

    /// The entries that this step changes, each as a command. Of a chain that is written anew, only the rules that differ.
    pub fn changes(&self) -> Vec<(Change, Command<'_>)> {
        let Self::Chain { before, after, .. } = self else {
            return self.commands();
        };
        let mut edits = self.edits();
        if edits.contains(&Edit::Flush) {
            let (gone, new) = differ(rules(before), rules(after));
            let gone = gone.into_iter().map(Edit::Delete);
            edits = gone.chain(new.into_iter().map(Edit::Append)).collect();
        }
        edits.retain(|edit| !matches!(edit, Edit::New | Edit::Remove));
        self.by_edits(edits)
    }

    fn by_edits<'a>(&'a self, edits: Vec<Edit<'a>>) -> Vec<(Change, Command<'a>)> {
        let Self::Chain { table, chain, .. } = self else {
            return Vec::new();
        };
        let command = |edit: Edit<'a>| (edit.change(), edit.command(*table, chain));
        edits.into_iter().map(command).collect()
    }

    /// The edits of an uplink's chain; empty for other steps. A few rules are edited one by one, so that unchanged rules
    /// keep their counters. For more, the chain is written anew: to delete a rule the tools search the whole chain.
    pub fn edits(&self) -> Vec<Edit<'_>> {
        let Self::Chain { before, after, .. } = self else {
            return Vec::new();
        };
        let Some(new) = after else {
            let is_empty = rules(before).is_empty();
            let flush = (!is_empty).then_some(Edit::Flush);
            return flush.into_iter().chain([Edit::Remove]).collect();
        };
        let Some(old) = before else {
            return [Edit::New]
                .into_iter()
                .chain(new.iter().map(Edit::Append))
                .collect();
        };
        amend(old, new)
            .filter(|edits| edits.len() <= MAX_EDITS)
            .unwrap_or_else(|| {
                [Edit::Flush]
                    .into_iter()
                    .chain(new.iter().map(Edit::Append))
                    .collect()
            })
    }
}

/// A chain's rules. Empty if there is no such chain.
fn rules(chain: &Option<Rules>) -> &[Rule] {
    chain.as_ref().map_or(&[], |rules| rules.as_slice())
}

/// How many rules of a chain are edited one by one, at most.
const MAX_EDITS: usize = 32;

/// One edit of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edit<'a> {
    New,
    Flush,
    /// Deletes the first rule with this text.
    Delete(&'a Rule),
    /// Inserts a rule, which has this number afterwards, from 1.
    Insert(usize, &'a Rule),
    Append(&'a Rule),
    Remove,
}

impl<'a> Edit<'a> {
    fn change(self) -> Change {
        match self {
            Self::New | Self::Insert(..) | Self::Append(_) => Change::Add,
            Self::Flush | Self::Delete(_) | Self::Remove => Change::Delete,
        }
    }

    fn command(self, table: Table, chain: &'a str) -> Command<'a> {
        let (flag, number, spec) = match self {
            Self::New => ("-N", None, None),
            Self::Flush => ("-F", None, None),
            Self::Delete(spec) => ("-D", None, Some(spec)),
            Self::Insert(number, spec) => ("-I", Some(number), Some(spec)),
            Self::Append(spec) => ("-A", None, Some(spec)),
            Self::Remove => ("-X", None, None),
        };
        Command::iptables(table, flag, chain, number, spec)
    }
}

/// The edits that make `before` into `after`. None if the unchanged rules are not in the desired order, or if a rule to be
/// deleted has a comment of several lines: iptables-restore takes each line for a rule.
fn amend<'a>(before: &'a [Rule], after: &'a [Rule]) -> Option<Vec<Edit<'a>>> {
    let (gone, _) = differ(before, after);
    if gone.iter().any(|spec| spec.0.contains('\n')) {
        return None;
    }
    // Of equal rules, iptables deletes the first.
    let mut count: BTreeMap<&Rule, usize> = BTreeMap::new();
    gone.iter()
        .for_each(|spec| *count.entry(*spec).or_default() += 1);
    let stays = |spec: &&Rule| match count.get_mut(*spec) {
        Some(left) if *left > 0 => {
            *left -= 1;
            false
        }
        _ => true,
    };
    let mut kept = before.iter().filter(stays).peekable();
    let mut edits: Vec<Edit> = gone.into_iter().map(Edit::Delete).collect();
    for (index, spec) in after.iter().enumerate() {
        if kept.next_if_eq(&spec).is_none() {
            edits.push(match kept.peek() {
                Some(_) => Edit::Insert(index + 1, spec),
                None => Edit::Append(spec),
            });
        }
    }
    kept.next().is_none().then_some(edits)
}

/// The option of iptables that adds or deletes a rule in a chain that is not ours. In the filter table a rule is inserted at
/// the head: after a rule that drops, one that accepts has no effect.
pub fn entry_flag(change: Change, table: Table) -> &'static str {
    match (change, table) {
        (Change::Delete, _) => "-D",
        (_, Table::Filter) => "-I",
        (_, Table::Mangle | Table::Nat) => "-A",
    }
}

/// The steps that make `installed` into `desired`, in an order that misroutes no packet. When entries are added, routing is
/// complete before connections are marked and redirected. When they are removed, marking ends first, and the ip rules that
/// use a table are deleted before the routes in the table.
pub fn diff(installed: &State, desired: &State) -> Vec<Step> {
    // All fields are named: when one is added, the compiler asks for its steps here.
    let State {
        routes,
        rules,
        tables: _,
        src_valid_mark,
    } = installed;
    let mut routing = Vec::new();
    let new_routes: Vec<&Route> = desired.routes.difference(routes).collect();
    let old_routes: Vec<&Route> = routes.difference(&desired.routes).collect();
    let has_key_of = |routes: &[&Route], route: &Route| {
        let mut keys = routes.iter().map(|route| route.key());
        keys.any(|key| key == route.key())
    };
    // The closing route is added before the others.
    for route in new_routes.iter().rev() {
        let change = match has_key_of(&old_routes, route) {
            true => Change::Replace,
            false => Change::Add,
        };
        routing.push(Step::Route(change, (*route).clone()));
    }
    for rule in desired.rules.difference(rules) {
        routing.push(Step::RouteRule(Change::Add, rule.clone()));
    }
    let adds = !routing.is_empty();
    for rule in rules.difference(&desired.rules) {
        routing.push(Step::RouteRule(Change::Delete, rule.clone()));
    }
    let removed = old_routes.iter();
    let removed = removed.filter(|route| !has_key_of(&new_routes, route));
    routing.extend(removed.map(|route| Step::Route(Change::Delete, (*route).clone())));
    // The uplink's chains tell whose the parameter is: set it after they are added, reset it before they are removed.
    let set = desired.src_valid_mark.difference(src_valid_mark);
    let set = set.map(|interface| Step::SrcValidMark(Change::Add, interface.clone()));
    let put_back = src_valid_mark.difference(&desired.src_valid_mark);
    let put_back = put_back.map(|interface| Step::SrcValidMark(Change::Delete, interface.clone()));
    let netfilter = netfilter(installed, desired);
    let (first, second) = match adds {
        true => (routing, netfilter),
        false => (netfilter, routing),
    };
    put_back.chain(first).chain(second).chain(set).collect()
}

fn netfilter(installed: &State, desired: &State) -> Vec<Step> {
    let mut steps = Vec::new();
    let nothing = UplinkTable::default();
    for table in Table::ALL {
        let keys = installed
            .tables
            .keys()
            .chain(desired.tables.keys())
            .filter(|(of, _)| *of == table);
        let mut uplinks: Vec<&UplinkName> = keys.map(|(_, uplink)| uplink).collect();
        uplinks.sort();
        uplinks.dedup();
        // A chain must exist before a rule jumps to it, and can be deleted only when no rule jumps to it. Sorted by name, an
        // uplink's chain comes before its subchains.
        let (mut chains, mut entries, mut gone) = (Vec::new(), Vec::new(), Vec::new());
        for uplink in uplinks {
            let key = (table, uplink.clone());
            let before = installed.tables.get(&key).unwrap_or(&nothing);
            let after = desired.tables.get(&key).unwrap_or(&nothing);
            let (extra, missing) = differ(&before.entries, &after.entries);
            let entry = |change: Change| {
                move |(chain, spec): &(String, Rule)| {
                    Step::Entry(change, table, chain.clone(), spec.clone())
                }
            };
            entries.extend(extra.into_iter().map(entry(Change::Delete)));
            entries.extend(missing.into_iter().map(entry(Change::Add)));
            let step = |name: &String, rules: Option<&Rules>| Step::Chain {
                table,
                chain: name.clone(),
                before: before.chains.get(name).cloned(),
                after: rules.cloned(),
            };
            let new = after.chains.iter().rev();
            let new = new.filter(|(name, rules)| before.chains.get(*name) != Some(rules));
            chains.extend(new.map(|(name, rules)| step(name, Some(rules))));
            let old = before.chains.keys();
            let old = old.filter(|name| !after.chains.contains_key(*name));
            gone.extend(old.map(|name| step(name, None)));
        }
        steps.extend(chains.into_iter().chain(entries).chain(gone));
    }
    steps
}

/// The items only in `before`, and those only in `after`. Duplicates count one by one.
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
    let extra = before.iter().filter(&mut spend).collect();
    // Counts that are left over are missing items. Of duplicates the last ones are missing: they would be appended.
    let mut missing: Vec<&T> = after.iter().rev().filter(|item| !spend(item)).collect();
    missing.reverse();
    (extra, missing)
}
