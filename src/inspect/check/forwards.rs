//! Ports that two uplinks forward to different places, and ports that the router itself listens on.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use super::{Finding, View, few};
use crate::config::Uplink;
use crate::kernel::listeners::{Socket, listening_below};
use crate::kernel::root::Root;
use crate::model::forward::{Asked, Protocol};

/// Compares the forwards with each other and with the router's services.
pub fn check(view: &View) -> Vec<Finding> {
    let mut findings = differences(view);
    let services = services(&view.snapshot.root);
    for (name, uplink) in view.serving() {
        let link = view.comparison.links.get(name).and_then(Option::as_ref);
        let is_at_uplink = |address| link.is_some_and(|link| link.addresses.contains(&address));
        let taken: BTreeSet<_> = services
            .iter()
            .filter(|socket| socket.address.is_none_or(is_at_uplink) && is_taken(uplink, socket))
            .map(|socket| (socket.protocol, socket.port))
            .collect();
        if !taken.is_empty() {
            let what = format!(
                "the router listens on forwarded ports, too; requests from outside go to the forward's target: {}",
                ports(taken)
            );
            findings.push(Finding::info("local-service", what).of(name));
        }
    }
    findings
}

/// `tcp/80, udp/53`
fn ports(ports: impl IntoIterator<Item = (Protocol, u16)>) -> String {
    let ports = ports.into_iter();
    few(ports.map(|(protocol, port)| format!("{protocol}/{port}")))
}

/// Whether a forward for all sources takes this port.
fn is_taken(uplink: &Uplink, socket: &Socket) -> bool {
    let asked = Asked {
        source: None,
        destination: None,
        protocol: socket.protocol.number(),
        port: Some(socket.port),
    };
    let mut forwards = uplink.forwards.iter();
    forwards
        .any(|forward| forward.takes(asked) && forward.from.is_empty() && forward.address.is_none())
}

/// Ports that two uplinks forward to different places.
fn differences(view: &View) -> Vec<Finding> {
    let mut findings = Vec::new();
    let uplinks = view.serving();
    let uplinks: Vec<_> = uplinks.map(|(name, it)| (name, targets(it))).collect();
    for (second, (name, own)) in uplinks.iter().enumerate() {
        for (other, others) in &uplinks[..second] {
            let mut differing = own.clone();
            differing.retain(|port, target| others.get(port).is_some_and(|it| it != target));
            if !differing.is_empty() {
                let what = format!(
                    "forwards these ports to another target than {other} does: {}",
                    ports(differing.into_keys())
                );
                findings.push(Finding::info("forwards-differ", what).of(name));
            }
        }
    }
    findings
}

/// The host and port that each port goes to which a forward for all sources names: the first forward takes it. Forwards of
/// all ports are left out, since they take what the others leave.
fn targets(uplink: &Uplink) -> BTreeMap<(Protocol, u16), (Option<Ipv4Addr>, u16)> {
    let mut targets = BTreeMap::new();
    for forward in &uplink.forwards {
        let Some(ports) = forward.ports.filter(|_| forward.from.is_empty()) else {
            continue;
        };
        for protocol in forward.protocols.iter() {
            for port in ports.first..=ports.last {
                let target = (forward.to, forward.to_port.unwrap_or(port));
                targets.entry((*protocol, port)).or_insert(target);
            }
        }
    }
    targets
}

/// The sockets of the router's services. A client's UDP socket looks like a service's, but for its ephemeral port.
fn services(root: &Root) -> Vec<Socket> {
    let range = root.sysctl("net/ipv4/ip_local_port_range");
    let range = range.unwrap_or_default();
    let range: Vec<u16> = range.split_whitespace().flat_map(str::parse).collect();
    let is_ephemeral = |port| matches!(range[..], [first, last] if (first..=last).contains(&port));
    let mut sockets = listening_below(root, Protocol::Udp);
    sockets.retain(|socket| !is_ephemeral(socket.port));
    sockets.extend(listening_below(root, Protocol::Tcp));
    sockets
}
