//! Ports that two uplinks forward to different places, and ports that the router itself listens on.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

use super::{Finding, View, few};
use crate::config::Uplink;
use crate::kernel::listeners::{Socket, listening_below};
use crate::kernel::root::Root;
use crate::model::forward::{Asked, Forward, Protocol};

/// Compares the forwards with each other and with the router's services.
pub fn check(view: &View) -> Vec<Finding> {
    let mut findings = differences(view);
    let services = services(&view.snapshot.root);
    for (name, uplink) in view.serving() {
        let link = view.links().get(name).and_then(Option::as_ref);
        let mut taken = BTreeSet::new();
        for socket in &services {
            let is_at_uplink = match socket.address {
                None => true,
                Some(address) => link.is_some_and(|link| link.addresses.contains(&address)),
            };
            if is_at_uplink && forward(uplink, socket.protocol, socket.port).is_some() {
                taken.insert((socket.protocol, socket.port));
            }
        }
        if !taken.is_empty() {
            let ports = taken
                .iter()
                .map(|(protocol, port)| format!("{protocol}/{port}"));
            let what = format!(
                "the router listens on forwarded ports, too; requests from outside go to the forward's target: {}",
                few(ports)
            );
            findings.push(Finding::note("local-service", what).of(name));
        }
    }
    findings
}

/// The forward that takes this port for all sources.
fn forward(uplink: &Uplink, protocol: Protocol, port: u16) -> Option<&Forward> {
    let asked = Asked {
        source: None,
        destination: None,
        protocol: protocol.number(),
        port: Some(port),
    };
    let mut forwards = uplink.forwards.iter();
    forwards.find(|forward| {
        forward.takes(asked) && forward.from.is_empty() && forward.address.is_none()
    })
}

/// Ports that two uplinks forward to different places.
fn differences(view: &View) -> Vec<Finding> {
    let mut findings = Vec::new();
    let uplinks: Vec<_> = view.serving().collect();
    let targets: Vec<_> = uplinks.iter().map(|(_, uplink)| targets(uplink)).collect();
    for (second, (name, _)) in uplinks.iter().enumerate() {
        for first in 0..second {
            let differing = targets[second].iter().filter(|(port, target)| {
                let other = targets[first].get(port);
                other.is_some_and(|other| other != *target)
            });
            let ports: Vec<String> = differing
                .map(|((protocol, port), _)| format!("{protocol}/{port}"))
                .collect();
            if !ports.is_empty() {
                let what = format!(
                    "forwards these ports to another target than {} does: {}",
                    uplinks[first].0,
                    few(ports)
                );
                findings.push(Finding::note("forwards-differ", what).of(name));
            }
        }
    }
    findings
}

type Target = (Option<Ipv4Addr>, u16);

/// The target of each port that a forward for all sources names: the first forward takes it. Forwards of all ports are
/// left out, since they take what the others leave.
fn targets(uplink: &Uplink) -> BTreeMap<(Protocol, u16), Target> {
    let mut targets = BTreeMap::new();
    for forward in uplink
        .forwards
        .iter()
        .filter(|forward| forward.from.is_empty())
    {
        let Some(ports) = forward.ports else {
            continue;
        };
        for protocol in forward.protocols.iter() {
            for port in ports.first..=ports.last {
                let to_port = forward.to_port.unwrap_or(port);
                targets
                    .entry((*protocol, port))
                    .or_insert((forward.to, to_port));
            }
        }
    }
    targets
}

/// The sockets of the router's services. A client's UDP socket looks like a service's, but for its ephemeral port.
fn services(root: &Root) -> Vec<Socket> {
    let range = root.sysctl("net/ipv4/ip_local_port_range");
    let ephemeral: Option<RangeInclusive<u16>> = range.and_then(|range| {
        let (first, last) = range.split_once(char::is_whitespace)?;
        Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
    });
    let is_ephemeral = |port: &u16| ephemeral.as_ref().is_some_and(|range| range.contains(port));
    let mut sockets: Vec<Socket> = [Protocol::Tcp, Protocol::Udp]
        .into_iter()
        .flat_map(|protocol| listening_below(root, protocol))
        .collect();
    sockets.retain(|socket| socket.protocol == Protocol::Tcp || !is_ephemeral(&socket.port));
    sockets
}
