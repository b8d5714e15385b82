//! Whose the entries are, and so which of them should stand after a call. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use crate::config::{Config, Uplink};
use crate::desired::{Up, desired};
use crate::iptables;
use crate::state::{FwMark, IfName, Loose, Share, State, Table, TableId, UplinkName};

/// An uplink's link that has an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addressed {
    /// The interface.
    pub interface: IfName,
    /// The address that entries are for.
    pub address: Ipv4Addr,
    /// All its addresses.
    pub addresses: Vec<Ipv4Addr>,
    /// Whether it carries traffic, so that a route can leave by it.
    pub running: Running,
    /// Its MTU in bytes, where the kernel tells.
    pub mtu: Option<u32>,
    /// The interface's own `rp_filter`, where filtering is strict, or was until we loosened it.
    pub strict: Option<u8>,
}

/// Whether a link carries traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Running {
    /// It does.
    Yes,
    /// It is about to: pppd waits for us.
    NotYet,
}

/// The uplinks in question, each with its link; none where the uplink should have no entries.
pub type Looks = BTreeMap<UplinkName, Option<Addressed>>;

/// All of ours that should stand: that of the uplinks in question anew, that of other configured
/// uplinks as it is. What no configured uplink claims is an orphan, and left out.
pub fn wanted(config: &Config, observed: &State, looks: &Looks) -> State {
    let others = config
        .uplinks
        .keys()
        .filter(|name| !looks.contains_key(name))
        .cloned()
        .collect();
    let mut wanted = share(&others, &tables(Some(config), observed), observed);
    for (name, link) in looks {
        if let (Some(uplink), Some(link)) = (config.uplinks.get(name), link) {
            wanted.merge(desired(config, &Up { name, uplink, link }));
        }
    }
    wanted
}

/// What belongs to one uplink.
#[derive(Debug)]
pub struct Part {
    /// What stands.
    pub observed: State,
    /// What should.
    pub wanted: State,
}

/// The parts of the uplinks in question, and the orphans: what stands, and no configured uplink claims.
pub fn parts(
    config: &Config,
    observed: &State,
    looks: &Looks,
) -> (BTreeMap<UplinkName, Part>, State) {
    let tables = tables(Some(config), observed);
    let mut wants = BTreeMap::new();
    for (name, link) in looks {
        if let Some(uplink) = config.uplinks.get(name) {
            let link = link.as_ref();
            let wanted = link.map(|link| desired(config, &Up { name, uplink, link }));
            wants.insert(name.clone(), wanted.unwrap_or_default());
        }
    }
    // As in a plan, nobody has given up an interface that somebody wants loosened.
    let given_up = |loose: &Loose| {
        let mut wanted = wants.values().flat_map(|state: &State| &state.loose);
        !wanted.any(|wanted| wanted.interface == loose.interface)
    };
    let mut orphans = observed.clone();
    orphans.loose.retain(given_up);
    let mut parts = BTreeMap::new();
    for (name, wanted) in &wants {
        let mut theirs = share(&BTreeSet::from([name.clone()]), &tables, observed);
        theirs.loose.retain(given_up);
        // What an uplink wants is its own, whosever table or address it looks like.
        for (_, other) in wants.iter().filter(|(other, _)| *other != name) {
            theirs = theirs.without(other);
        }
        theirs.merge(observed.common(wanted));
        orphans = orphans.without(&theirs);
        let part = Part {
            observed: theirs,
            wanted: wanted.clone(),
        };
        parts.insert(name.clone(), part);
    }
    (parts, orphans)
}

/// What is left when an interface goes down while there is no configuration to say whose it is:
/// all but the entries of the uplinks whose entries name it, and of tables with routes by it.
pub fn without_interface(interface: &IfName, observed: &State) -> State {
    let tables = tables(None, observed);
    let names = bound_to(interface, observed);
    let mut gone = share(&names, &tables, observed);
    let unclaimed = tables_by(interface, observed)
        .filter(|table| !tables.contains_key(table))
        .collect();
    gone.merge(observed.share(&BTreeSet::new(), &unclaimed));
    let mut left = observed.without(&gone);
    // Two uplinks that have the same address share the rule that lets it talk to the LAN.
    let tables = left.rules.iter().map(|rule| rule.table);
    let tables = tables.filter(|table| *table != TableId::MAIN).collect();
    let shared = observed.share(&BTreeSet::new(), &tables);
    left.rules.extend(shared.rules);
    left
}

fn share(
    names: &BTreeSet<UplinkName>,
    tables: &BTreeMap<TableId, UplinkName>,
    observed: &State,
) -> State {
    let theirs = tables
        .iter()
        .filter(|(_, name)| names.contains(name))
        .map(|(table, _)| *table)
        .collect();
    observed.share(names, &theirs)
}

/// Which uplink the entries in a routing table belong to. The configuration comes first; for a
/// table that it does not name, the kernel tells: the chain of an uplink sets a mark, a rule sends
/// that mark to a table, and a route in a table names the interface of an uplink's jump.
fn tables(config: Option<&Config>, state: &State) -> BTreeMap<TableId, UplinkName> {
    let mut tables = BTreeMap::new();
    for (name, uplink) in config.iter().flat_map(|config| &config.uplinks) {
        tables.extend(
            uplink
                .routing
                .iter()
                .map(|routing| (routing.table, name.clone())),
        );
    }
    let mangle = state
        .tables
        .iter()
        .filter(|((of, _), _)| *of == Table::Mangle);
    for ((_, uplink), share) in mangle {
        let marks: Vec<FwMark> = share.rules().filter_map(iptables::connmark).collect();
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
fn tables_by(interface: &IfName, state: &State) -> impl Iterator<Item = TableId> {
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

/// The interface that an uplink's entries name, or the route in its table.
pub fn binding(name: &UplinkName, uplink: &Uplink, state: &State) -> Option<IfName> {
    let shares = state.tables.iter().filter(|((_, of), _)| of == name);
    let table = uplink.routing.as_ref().map(|routing| routing.table);
    let routes = state
        .routes
        .iter()
        .filter(|route| Some(route.table) == table);
    let by_route = routes.filter_map(|route| IfName::parse(route.dev.as_ref()?).ok());
    shares
        .flat_map(|(_, share)| interfaces(share))
        .chain(by_route)
        .next()
}

/// The source addresses in the rules that stand for these tables.
pub fn sources(state: &State, tables: &BTreeSet<TableId>) -> Vec<Ipv4Addr> {
    let rules = state
        .rules
        .iter()
        .filter(|rule| tables.contains(&rule.table));
    rules
        .filter_map(|rule| rule.from.as_ref()?.parse().ok())
        .collect()
}

/// The interfaces that an uplink's entries name.
pub fn interfaces(share: &Share) -> impl Iterator<Item = IfName> {
    let names = share
        .entries
        .iter()
        .filter_map(|(_, spec)| iptables::interface(spec));
    names.filter_map(|name| IfName::parse(name).ok())
}
