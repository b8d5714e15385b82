//! Connections that began too early, or for a former address: those that contradict what stands
//! now, and no other. NAT is decided by a connection's first packet, and a mark stays with it; so
//! what began before a change goes on as before it. Pure.

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

/// Whether these steps can leave connections behind that contradict them.
pub fn leaves_some(steps: &[Step]) -> bool {
    steps.iter().any(|step| match step {
        Step::Chain { .. } => true,
        Step::RouteRule(change, rule) => *change == Change::Add && rule.from.is_some(),
        Step::Route(..) | Step::Entry(..) | Step::SrcValidMark(..) => false,
    })
}

/// The flows that contradict the change from `installed` to `desired`. An uplink whose link is gone
/// has no say: its connections go on when it comes back with the same address.
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
            // Without hairpin, what the LAN asks of the address is for the router itself.
            for_lan: uplink.hairpin,
            old: forwards(name, installed),
            new: forwards(name, desired),
            old_mark: mark(name, installed),
            mark: mark(name, desired),
        });
    }
    // An uplink that is configured no longer: nothing of its forwards is left.
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

/// What one uplink makes of a flow.
struct Judge<'a> {
    /// Its address now; none where it is configured no longer.
    address: Option<Ipv4Addr>,
    /// All addresses of its link.
    addresses: &'a [Ipv4Addr],
    lan: &'a [Ipv4Network],
    for_lan: bool,
    old: Vec<Forward>,
    new: Vec<Forward>,
    old_mark: Option<FwMark>,
    mark: Option<FwMark>,
}

/// A host, and the port there.
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
        // Asked only where it counts: there may be thousands of forwards, and of flows.
        let was = || target(&self.old, flow);
        let is = || target(&self.new, flow).filter(|_| self.for_lan || !is_lan(original.source));
        let marked = |mark: Option<FwMark>| mark.is_some_and(|mark| mark.matches(flow.mark));
        if self.address != Some(original.destination) {
            // A former address: its own flows are known by going where our forwards lead, and by
            // having come by this uplink, or from the LAN. A link's other addresses are not former.
            let ours = marked(self.mark) || marked(self.old_mark) || is_lan(original.source);
            let forwarded = || was() == Some(actual) || target(&self.new, flow) == Some(actual);
            let is_former = !self.addresses.contains(&original.destination);
            return ours && is_former && actual != asked && forwarded();
        }
        if self.old_mark != self.mark && marked(self.old_mark) {
            return true;
        }
        match is() {
            // Begun before its forward existed, or before that led here; what somebody else's DNAT
            // redirects is somebody else's.
            Some(is) => actual != is && (actual == asked || was() == Some(actual)),
            None => actual != asked && was() == Some(actual),
        }
    }
}

/// Where the first forward that takes the flow sends it.
fn target(forwards: &[Forward], flow: &Flow) -> Option<Target> {
    let asked = flow.asked();
    let forward = forwards.iter().find(|forward| forward.takes(asked))?;
    Some(forward.target(asked.port))
}
