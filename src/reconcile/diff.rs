//! The ordered steps from the installed entries to the desired ones, as a comparison of two [`State`]s. Runs nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::iter;

use crate::model::names::IfName;
use crate::model::netfilter::{Rule, Rules, Table, UplinkTable};
use crate::model::route::{Route, RouteRule};
use crate::model::state::State;
use crate::reconcile::command::{Command, Edit};

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
            Self::Chain { .. } | Self::Entry(..) => self.by_edits(self.edits()),
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
        let (Self::Chain { table, chain, .. } | Self::Entry(_, table, chain, _)) = self else {
            return Vec::new();
        };
        let command = |edit: Edit<'a>| (edit.change(), Command::iptables(*table, chain, edit));
        edits.into_iter().map(command).collect()
    }

    /// The edits of a chain; empty for other steps. A few rules of an uplink's own chain are edited one by one, so that
    /// unchanged rules keep their counters. For more, the chain is written anew: to delete a rule the tools search the whole
    /// chain.
    fn edits(&self) -> Vec<Edit<'_>> {
        let (before, after) = match self {
            Self::Chain { before, after, .. } => (before, after),
            Self::Entry(change, table, _, rule) => return vec![entry_edit(*change, *table, rule)],
            Self::Route(..) | Self::RouteRule(..) | Self::SrcValidMark(..) => return Vec::new(),
        };
        let (old, new) = (rules(before), rules(after));
        let anew = |first| iter::once(first).chain(new.iter().map(Edit::Append));
        match (before, after) {
            (_, None) if old.is_empty() => vec![Edit::Remove],
            (_, None) => vec![Edit::Flush, Edit::Remove],
            (None, Some(_)) => anew(Edit::New).collect(),
            (Some(_), Some(_)) => amend(old, new)
                .filter(|edits| edits.len() <= MAX_EDITS)
                .unwrap_or_else(|| anew(Edit::Flush).collect()),
        }
    }
}

/// A chain's rules. Empty if there is no such chain.
fn rules(chain: &Option<Rules>) -> &[Rule] {
    chain.as_ref().map_or(&[], |rules| rules.as_slice())
}

/// How many rules of a chain are edited one by one, at most.
const MAX_EDITS: usize = 32;

/// The edits that make `before` into `after`. None if the unchanged rules are not in the desired order, or if a rule to be
/// deleted has a comment of several lines: iptables-restore takes each line for a rule.
fn amend<'a>(before: &'a [Rule], after: &'a [Rule]) -> Option<Vec<Edit<'a>>> {
    let (gone, _) = differ(before, after);
    if gone.iter().any(|spec| spec.0.contains('\n')) {
        return None;
    }
    // Of equal rules, iptables deletes the first.
    let mut kept = minus(before, gone.iter().copied()).into_iter().peekable();
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

/// The edit that adds or deletes a rule in a chain that is not ours. In the filter table a rule is inserted at the head:
/// after a rule that drops, one that accepts has no effect.
fn entry_edit(change: Change, table: Table, rule: &Rule) -> Edit<'_> {
    match (change, table) {
        (Change::Delete, _) => Edit::Delete(rule),
        (_, Table::Filter) => Edit::Prepend(rule),
        (_, Table::Mangle | Table::Nat) => Edit::Append(rule),
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
    let has_key_of =
        |routes: &[&Route], route: &Route| routes.iter().any(|it| it.key() == route.key());
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
    for route in old_routes {
        if !has_key_of(&new_routes, route) {
            routing.push(Step::Route(Change::Delete, route.clone()));
        }
    }
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
        let keys = installed.tables.keys().chain(desired.tables.keys());
        let keys: BTreeSet<_> = keys.filter(|(of, _)| *of == table).collect();
        // A chain must exist before a rule jumps to it, and can be deleted only when no rule jumps to it. Sorted by name, an
        // uplink's chain comes before its subchains.
        let (mut chains, mut entries, mut gone) = (Vec::new(), Vec::new(), Vec::new());
        for key in keys {
            let before = installed.tables.get(key).unwrap_or(&nothing);
            let after = desired.tables.get(key).unwrap_or(&nothing);
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

/// The items only in `before`, and those only in `after`. Duplicates count one by one; the last ones are extra or missing.
fn differ<'a, T: Ord>(before: &'a [T], after: &'a [T]) -> (Vec<&'a T>, Vec<&'a T>) {
    (minus(before, after), minus(after, before))
}

/// The items less those of `others`. Of duplicates, the first ones are left out.
fn minus<'a, T: Ord>(items: &'a [T], others: impl IntoIterator<Item = &'a T>) -> Vec<&'a T> {
    let mut count: BTreeMap<&T, usize> = BTreeMap::new();
    for item in others {
        *count.entry(item).or_default() += 1;
    }
    let is_left = |item: &&'a T| match count.get_mut(item) {
        Some(left) if *left > 0 => {
            *left -= 1;
            false
        }
        _ => true,
    };
    items.iter().filter(is_left).collect()
}
