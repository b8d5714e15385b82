//! Tracked connections that contradict the desired entries, and no others. NAT is decided by a connection's first packet,
//! and the connection keeps its mark: one that began before a change goes on as before the change. Pure.

use std::cell::LazyCell;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use ipnetwork::Ipv4Network;

use crate::config::Config;
use crate::kernel::conntrack::{Filter, Flow};
use crate::model::forward::ForwardIndex;
use crate::model::link::UplinkLinks;
use crate::model::names::{IfName, UplinkName};
use crate::model::netfilter::{Rule, Table};
use crate::model::route::FwMark;
use crate::model::state::State;
use crate::reconcile::diff::{Change, Step};
use crate::reconcile::dnat;
use crate::reconcile::ownership::sets_mark;

/// Whether connections from before these steps can contradict the entries after them.
pub fn leaves_some(steps: &[Step]) -> bool {
    steps.iter().any(|step| match step {
        Step::Chain { .. } => true,
        Step::RouteRule(change, rule) => *change == Change::Add && rule.from.is_some(),
        Step::Entry(change, table, chain, rule) => {
            *change == Change::Add && is_masquerade(*table, chain, rule)
        }
        Step::Route(..) | Step::SrcValidMark(..) => false,
    })
}

/// A rule that gives the LAN's packets the address of the link that they leave by. That of a hairpin is for packets that stay
/// in the LAN.
fn is_masquerade(table: Table, chain: &str, rule: &Rule) -> bool {
    (table, chain) == (Table::Nat, "POSTROUTING")
        && rule.0.ends_with("-j MASQUERADE")
        && rule.value("--ctorigdst").is_none()
}

/// Judges the connections that were there before the change from `installed` to `desired`. Those of an uplink whose link is
/// down stay: they continue when the link comes up again with the same address.
#[derive(Debug, Default)]
pub struct Judges<'a>(Vec<Judge<'a>>);

impl<'a> Judges<'a> {
    /// The judges of this change.
    pub fn new(
        config: &'a Config,
        links: &'a UplinkLinks,
        installed: &'a State,
        desired: &'a State,
    ) -> Self {
        let mut judges: Vec<Judge> = Vec::new();
        for (name, link) in links {
            let (Some(link), Some(uplink)) = (link, config.uplinks.get(name)) else {
                continue;
            };
            let masquerades = |state| masquerades(name, state);
            judges.push(Judge {
                addresses: &link.addresses,
                lan: &config.lan.networks,
                // Without hairpin, the LAN's packets to the address are for the router itself.
                for_lan: uplink.hairpin,
                had_forwards: has_chains(name, installed),
                old: index(name, installed),
                new: index(name, desired),
                old_mark: mark(name, installed),
                mark: mark(name, desired),
                masqueraded_now: (masquerades(desired) && !masquerades(installed))
                    .then_some(&link.interface),
            });
        }
        // An uplink that is no longer configured has no forwards any more.
        let before: BTreeSet<&UplinkName> = installed.tables.keys().map(|(_, name)| name).collect();
        for name in before
            .into_iter()
            .filter(|name| !config.uplinks.contains_key(name))
        {
            judges.push(Judge {
                addresses: &[],
                lan: &config.lan.networks,
                for_lan: true,
                had_forwards: has_chains(name, installed),
                old: index(name, installed),
                new: index(name, desired),
                old_mark: mark(name, installed),
                mark: None,
                masqueraded_now: None,
            });
        }
        Self(judges)
    }

    /// Which connections can be stale at all. Looking through a million of them takes a quarter of a second for each filter.
    pub fn filters(&self) -> BTreeSet<Filter> {
        let mut filters = BTreeSet::new();
        for judge in &self.0 {
            // Where there were no forwards, no connection to the link's own addresses has a former target.
            if judge.masqueraded_now.is_none() || judge.had_forwards {
                filters.insert(Filter::DestinationNat);
            }
            match judge.masqueraded_now {
                Some(_) => _ = filters.insert(Filter::NoSourceNat),
                None => filters.extend(judge.addresses.iter().copied().map(Filter::To)),
            }
            let former = judge.old_mark.filter(|mark| Some(*mark) != judge.mark);
            filters.extend(former.map(Filter::Marked));
        }
        filters
    }

    /// Where else to look, by the stale connections that are found: the LAN's connections to a former address of the link
    /// are masqueraded on their way to the server.
    pub fn filters_behind(&self, found: &[Flow]) -> BTreeSet<Filter> {
        if self.filters().contains(&Filter::DestinationNat) {
            return BTreeSet::new();
        }
        let is_own = |address: &Ipv4Addr| self.0.iter().any(|it| it.addresses.contains(address));
        let translated = found
            .iter()
            .filter(|flow| flow.reply.source != flow.original.destination);
        let destinations: BTreeSet<Ipv4Addr> =
            translated.map(|it| it.original.destination).collect();
        let former = destinations.into_iter().filter(|address| !is_own(address));
        former.map(Filter::To).collect()
    }

    /// Whether a connection contradicts the entries after the change. `leaves_by` tells the interface that its packets leave
    /// by.
    pub fn is_stale(&self, flow: &Flow, leaves_by: impl Fn(&Flow) -> Option<String>) -> bool {
        self.0.iter().any(|judge| {
            judge.is_stale(flow)
                || judge.masqueraded_now.is_some_and(|interface| {
                    judge.lacks_masquerade(flow)
                        && leaves_by(flow).is_some_and(|name| name == interface.as_str())
                })
        })
    }
}

fn masquerades(name: &UplinkName, state: &State) -> bool {
    let own = state.tables.get(&(Table::Nat, name.clone()));
    let mut entries = own.into_iter().flat_map(|own| &own.entries);
    entries.any(|(chain, rule)| is_masquerade(Table::Nat, chain, rule))
}

/// The uplink's forwards, as its chains tell them, made when the first flow is judged: mostly there is none, and there may
/// be 10,000 forwards.
type LazyIndex<'a> = LazyCell<ForwardIndex, Box<dyn FnOnce() -> ForwardIndex + 'a>>;

fn index<'a>(name: &'a UplinkName, state: &'a State) -> LazyIndex<'a> {
    LazyCell::new(Box::new(move || {
        let own = state.tables.get(&(Table::Nat, name.clone()));
        let rules = own.into_iter().flat_map(|own| dnat::in_order(name, own));
        ForwardIndex::new(rules.filter_map(dnat::parse).collect())
    }))
}

/// Whether the uplink has chains for forwards.
fn has_chains(name: &UplinkName, state: &State) -> bool {
    let own = state.tables.get(&(Table::Nat, name.clone()));
    own.is_some_and(|own| !own.chains.is_empty())
}

fn mark(name: &UplinkName, state: &State) -> Option<FwMark> {
    let own = state.tables.get(&(Table::Mangle, name.clone()))?;
    own.rules().find_map(sets_mark)
}

/// What decides whether a flow contradicts one uplink's change.
#[derive(Debug)]
struct Judge<'a> {
    /// The addresses of the uplink's link after the change. Empty if the uplink is no longer configured.
    addresses: &'a [Ipv4Addr],
    lan: &'a [Ipv4Network],
    for_lan: bool,
    /// Whether there were forwards before the change.
    had_forwards: bool,
    old: LazyIndex<'a>,
    new: LazyIndex<'a>,
    old_mark: Option<FwMark>,
    mark: Option<FwMark>,
    /// The link, if the LAN's packets take its address from this change on.
    masqueraded_now: Option<&'a IfName>,
}

/// A host, and the port on that host.
type Target = (Ipv4Addr, Option<u16>);

impl Judge<'_> {
    fn is_stale(&self, flow: &Flow) -> bool {
        let original = flow.original;
        let is_lan = |address| self.lan.iter().any(|network| network.contains(address));
        let actual = (
            flow.reply.source,
            flow.reply.ports.map(|(source, _)| source),
        );
        let asked = (
            original.destination,
            original.ports.map(|(_, destination)| destination),
        );
        let was = || target(&self.old, flow);
        let is = || target(&self.new, flow).filter(|_| self.for_lan || !is_lan(original.source));
        let marked = |mark: Option<FwMark>| mark.is_some_and(|mark| mark.matches(flow.mark));
        if !self.addresses.contains(&original.destination) {
            // A former address of the uplink, if the flow came by this uplink or from the LAN and goes to the target of
            // one of our forwards.
            let ours = marked(self.mark) || marked(self.old_mark) || is_lan(original.source);
            let forwarded = || was() == Some(actual) || target(&self.new, flow) == Some(actual);
            return ours && actual != asked && forwarded();
        }
        if self.old_mark != self.mark && marked(self.old_mark) {
            return true;
        }
        match is() {
            // The flow began before its forward existed, or before the forward had this target. Flows that a foreign DNAT
            // rule redirects stay.
            Some(is) => actual != is && (actual == asked || was() == Some(actual)),
            None => actual != asked && was() == Some(actual),
        }
    }

    /// A connection that the LAN began with somebody outside, and that keeps its LAN address.
    fn lacks_masquerade(&self, flow: &Flow) -> bool {
        let Flow {
            original, reply, ..
        } = flow;
        let is_lan = |address| self.lan.iter().any(|network| network.contains(address));
        is_lan(original.source)
            && !is_lan(original.destination)
            && reply.destination == original.source
            && reply.source == original.destination
    }
}

/// The target of the first forward that takes the flow.
fn target(forwards: &ForwardIndex, flow: &Flow) -> Option<Target> {
    let asked = flow.asked();
    let forward = forwards.first(asked)?;
    Some(forward.target(flow.original.destination, asked.port))
}
