//! What stands in the kernel of ours, asked of the tools: two processes, whatever there is.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;

use crate::command::Tools;
use crate::config::Config;
use crate::state::{FwMark, IfName, Loose, Share, State, Table, TableId, UplinkName};
use crate::{ip, iptables, link};

/// All entries of ours.
///
/// # Errors
/// A tool can't be run or fails, or says what can't be read.
pub fn observe(tools: &Tools) -> Result<State> {
    let (routes, rules) = ip::parse(&tools.ip_list(ip::QUESTIONS)?)?;
    let tables = iptables::parse(&tools.iptables_save()?)?;
    let mut loose = BTreeSet::new();
    for ((table, uplink), share) in &tables {
        let note = share
            .chain
            .iter()
            .flatten()
            .find_map(iptables::parse_loose_note);
        if let Some((before, interface)) = note.zip(interfaces(share).next())
            && *table == Table::Mangle
            && link::rp_filter(interface.as_str())? == Some(2)
        {
            // Another value is another's doing, and not ours to put back.
            loose.insert(Loose {
                uplink: uplink.clone(),
                interface,
                before,
            });
        }
    }
    Ok(State {
        routes,
        rules,
        tables,
        loose,
    })
}

/// The interfaces that an uplink's entries name.
fn interfaces(share: &Share) -> impl Iterator<Item = IfName> {
    let names = share
        .entries
        .iter()
        .filter_map(|(_, spec)| iptables::interface(spec));
    names.filter_map(|name| IfName::parse(name).ok())
}

/// The uplinks that have entries in the backend of iptables that is not in use: they work on
/// packets all the same, until that backend's tools remove them.
///
/// # Errors
/// The other tool fails, or says what can't be read.
pub fn elsewhere(tools: &Tools) -> Result<BTreeSet<UplinkName>> {
    let Some(save) = tools.other_iptables_save()? else {
        return Ok(BTreeSet::new());
    };
    Ok(iptables::parse(&save)?
        .into_keys()
        .map(|(_, uplink)| uplink)
        .collect())
}

/// Whether the legacy backend has any table: without asking its tool, which would make some.
pub fn legacy_tables() -> bool {
    // One name a line, empty without any; missing where the kernel has no legacy backend.
    std::fs::read("/proc/net/ip_tables_names").is_ok_and(|names| !names.is_empty())
}

/// Which uplink the entries in a routing table belong to. The configuration comes first; for a
/// table that it does not name, the kernel tells: the chain of an uplink sets a mark, a rule sends
/// that mark to a table, and a route in a table names the interface of an uplink's jump.
pub fn tables(config: Option<&Config>, state: &State) -> BTreeMap<TableId, UplinkName> {
    let mut tables = BTreeMap::new();
    for (name, uplink) in config.iter().flat_map(|config| &config.uplinks) {
        tables.extend(
            uplink
                .routing
                .iter()
                .map(|routing| (routing.table, name.clone())),
        );
    }
    for ((_, uplink), share) in &state.tables {
        let marks: Vec<FwMark> = share
            .chain
            .iter()
            .flatten()
            .filter_map(iptables::connmark)
            .collect();
        let marked = state
            .rules
            .iter()
            .filter(|rule| rule.fwmark.is_some_and(|mark| marks.contains(&mark)));
        for table in marked.map(|rule| rule.table) {
            tables.entry(table).or_insert_with(|| uplink.clone());
        }
    }
    for ((_, uplink), share) in &state.tables {
        for interface in interfaces(share) {
            for table in tables_by(&interface, state) {
                tables.entry(table).or_insert_with(|| uplink.clone());
            }
        }
    }
    tables
}

/// The tables with a route of ours by this interface.
pub fn tables_by(interface: &IfName, state: &State) -> impl Iterator<Item = TableId> {
    let routes = state
        .routes
        .iter()
        .filter(|route| route.dev.as_deref() == Some(interface.as_str()));
    routes.map(|route| route.table)
}

/// The uplinks whose entries name this interface.
pub fn bound_to(interface: &IfName, state: &State) -> BTreeSet<UplinkName> {
    let shares = state
        .tables
        .iter()
        .filter(|(_, share)| interfaces(share).any(|name| name == *interface));
    shares.map(|((_, uplink), _)| uplink.clone()).collect()
}

/// The source addresses in the rules that stand for these tables.
pub fn sources(state: &State, tables: &BTreeSet<TableId>) -> Vec<std::net::Ipv4Addr> {
    let rules = state
        .rules
        .iter()
        .filter(|rule| tables.contains(&rule.table));
    rules
        .filter_map(|rule| rule.from.as_ref()?.parse().ok())
        .collect()
}
