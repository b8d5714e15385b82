//! Tracked connections that contradict the desired entries, and no others. NAT is decided by a connection's first packet,
//! and the connection keeps its mark: one that began before a change goes on as before the change. Pure.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use ipnetwork::Ipv4Network;

use crate::config::Config;
use crate::kernel::conntrack::Flow;
use crate::model::forward::Forward;
use crate::model::link::UplinkLinks;
use crate::model::names::UplinkName;
use crate::model::netfilter::Table;
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
        Step::Route(..) | Step::Entry(..) | Step::SrcValidMark(..) => false,
    })
}

/// The flows that contradict the change from `installed` to `desired`. Those of an uplink whose link is down stay: they
/// continue when the link comes up again with the same address.
pub fn stale<'a>(
    config: &Config,
    links: &UplinkLinks,
    installed: &State,
    desired: &State,
    flows: &'a [Flow],
) -> Vec<&'a Flow> {
    if flows.is_empty() {
        return Vec::new();
    }
    let before: BTreeSet<&UplinkName> = installed.tables.keys().map(|(_, uplink)| uplink).collect();
    let mut judges: Vec<Judge> = Vec::new();
    for (name, link) in links {
        let (Some(link), Some(uplink)) = (link, config.uplinks.get(name)) else {
            continue;
        };
        judges.push(Judge {
            address: Some(link.address),
            addresses: &link.addresses,
            lan: &config.lan.networks,
            // Without hairpin, the LAN's packets to the address are for the router itself.
            for_lan: uplink.hairpin,
            old: forwards(name, installed),
            new: forwards(name, desired),
            old_mark: mark(name, installed),
            mark: mark(name, desired),
        });
    }
    // An uplink that is no longer configured has no forwards any more.
    for name in before
        .into_iter()
        .filter(|name| !config.uplinks.contains_key(name))
    {
        judges.push(Judge {
            address: None,
            addresses: &[],
            lan: &config.lan.networks,
            for_lan: true,
            old: forwards(name, installed),
            new: Vec::new(),
            old_mark: mark(name, installed),
            mark: None,
        });
    }
    flows
        .iter()
        .filter(|flow| judges.iter().any(|judge| judge.is_stale(flow)))
        .collect()
}

fn forwards(name: &UplinkName, state: &State) -> Vec<Forward> {
    let own = state.tables.get(&(Table::Nat, name.clone()));
    let rules = own.into_iter().flat_map(|own| dnat::in_order(name, own));
    rules.filter_map(dnat::parse).collect()
}

fn mark(name: &UplinkName, state: &State) -> Option<FwMark> {
    let own = state.tables.get(&(Table::Mangle, name.clone()))?;
    own.rules().find_map(sets_mark)
}

/// What decides whether a flow contradicts one uplink's change.
struct Judge<'a> {
    /// The uplink's address after the change. None if the uplink is no longer configured.
    address: Option<Ipv4Addr>,
    /// All addresses of the uplink's link.
    addresses: &'a [Ipv4Addr],
    lan: &'a [Ipv4Network],
    for_lan: bool,
    old: Vec<Forward>,
    new: Vec<Forward>,
    old_mark: Option<FwMark>,
    mark: Option<FwMark>,
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
        // Evaluated only when needed: there may be thousands of forwards, and of flows.
        let was = || target(&self.old, flow);
        let is = || target(&self.new, flow).filter(|_| self.for_lan || !is_lan(original.source));
        let marked = |mark: Option<FwMark>| mark.is_some_and(|mark| mark.matches(flow.mark));
        if self.address != Some(original.destination) {
            // A former address of the uplink, if the flow came by this uplink or from the LAN and goes to the target of
            // one of our forwards. The link's other present addresses are not former ones.
            let ours = marked(self.mark) || marked(self.old_mark) || is_lan(original.source);
            let forwarded = || was() == Some(actual) || target(&self.new, flow) == Some(actual);
            let is_former = !self.addresses.contains(&original.destination);
            return ours && is_former && actual != asked && forwarded();
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
}

/// The target of the first forward that takes the flow.
fn target(forwards: &[Forward], flow: &Flow) -> Option<Target> {
    let asked = flow.asked();
    let forward = forwards.iter().find(|forward| forward.takes(asked))?;
    Some(forward.target(asked.port))
}
