//! Forwards beside forwards of another uplink, and beside the router's own services.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

use super::{Finding, View, few};
use crate::config::Uplink;
use crate::kernel::listeners::{Socket, listening};
use crate::kernel::sysctl;
use crate::model::forward::{Asked, Forward, Protocol};

/// Both.
pub fn check(view: &View) -> Vec<Finding> {
    let mut findings = overlaps(view);
    let sockets = services();
    for (name, uplink) in view.serving() {
        let link = view.links().get(name).and_then(Option::as_ref);
        let mut taken = BTreeSet::new();
        for socket in &sockets {
            let is_asked = match socket.address {
                None => true,
                Some(address) => link.is_some_and(|link| link.addresses.contains(&address)),
            };
            if is_asked && forward(uplink, socket.protocol, socket.port).is_some() {
                taken.insert((socket.protocol, socket.port));
            }
        }
        if !taken.is_empty() {
            let ports = taken
                .iter()
                .map(|(protocol, port)| format!("{protocol}/{port}"));
            let what = format!(
                "a service of the router itself listens there, too, and is not asked from outside: {}",
                few(ports)
            );
            findings.push(Finding::note("local-service", what).of(name));
        }
    }
    findings
}

/// The forward that takes this port, of those for everybody.
fn forward(uplink: &Uplink, protocol: Protocol, port: u16) -> Option<&Forward> {
    let asked = Asked {
        source: None,
        protocol: protocol.number(),
        port: Some(port),
    };
    let mut forwards = uplink.forwards.iter();
    forwards.find(|forward| forward.takes(asked) && forward.from.is_empty())
}

/// The same port of two uplinks that leads to different places.
fn overlaps(view: &View) -> Vec<Finding> {
    let mut findings = Vec::new();
    let uplinks: Vec<_> = view.serving().collect();
    let painted: Vec<_> = uplinks.iter().map(|(_, uplink)| paint(uplink)).collect();
    for (second, (name, _)) in uplinks.iter().enumerate() {
        for first in 0..second {
            let differing = painted[second].iter().filter(|(key, place)| {
                let other = painted[first].get(key);
                other.is_some_and(|other| other != *place)
            });
            let ports: Vec<String> = differing
                .map(|((protocol, port), _)| format!("{protocol}/{port}"))
                .collect();
            if !ports.is_empty() {
                let what = format!(
                    "the same port leads elsewhere than by {}: {}",
                    uplinks[first].0,
                    few(ports)
                );
                findings.push(Finding::note("forwards-differ", what).of(name));
            }
        }
    }
    findings
}

type Place = (Ipv4Addr, u16);

/// Where each port leads that a forward names; the first forward counts. Those for all ports are what
/// is left over, and may differ.
fn paint(uplink: &Uplink) -> BTreeMap<(Protocol, u16), Place> {
    let mut places = BTreeMap::new();
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
                places
                    .entry((*protocol, port))
                    .or_insert((forward.to, to_port));
            }
        }
    }
    places
}

/// The router's own services: a client's socket of UDP uplink_links as one that waits does, but for its port.
fn services() -> Vec<Socket> {
    let ephemeral = sysctl::read("net/ipv4/ip_local_port_range").and_then(|range| {
        let (first, last) = range.split_once(char::is_whitespace)?;
        Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
    });
    let is_clients = |socket: &Socket| {
        let range: Option<&RangeInclusive<u16>> = ephemeral.as_ref();
        socket.protocol == Protocol::Udp && range.is_some_and(|range| range.contains(&socket.port))
    };
    let mut sockets = [Protocol::Tcp, Protocol::Udp].map(listening).concat();
    sockets.retain(|socket| !is_clients(socket));
    sockets
}
