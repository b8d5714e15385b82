//! Forwards beside forwards of another uplink, and beside the router's own services.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

use super::{Finding, View, few};
use crate::config::{Forward, Protocol, Uplink};
use crate::system;

/// Both.
pub fn check(view: &View) -> Vec<Finding> {
    let mut findings = overlaps(view);
    let sockets = [
        listening(Protocol::Tcp, "tcp", is_v4),
        listening(Protocol::Tcp, "tcp6", is_v6),
        listening(Protocol::Udp, "udp", is_v4),
        listening(Protocol::Udp, "udp6", is_v6),
    ]
    .concat();
    for (name, uplink) in view.serving() {
        let link = view.looks.get(name).and_then(Option::as_ref);
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
    uplink.forwards.iter().find(|forward| {
        let takes_protocol = forward.protocols.is_empty() || forward.protocols.contains(&protocol);
        let takes_port = forward
            .ports
            .as_ref()
            .is_none_or(|ports| ports.contains(&port));
        takes_protocol && takes_port && forward.from.is_empty()
    })
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
        let Some(ports) = &forward.ports else {
            continue;
        };
        for protocol in &forward.protocols {
            for port in ports.clone() {
                let to_port = forward.to_port.unwrap_or(port);
                places
                    .entry((*protocol, port))
                    .or_insert((forward.to, to_port));
            }
        }
    }
    places
}

/// A socket that waits for anybody.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Socket {
    protocol: Protocol,
    /// None for all addresses.
    address: Option<Ipv4Addr>,
    port: u16,
}

fn listening(protocol: Protocol, file: &str, address: fn(&str) -> Option<Ipv4Addr>) -> Vec<Socket> {
    let text = fs::read_to_string(format!("/proc/net/{file}")).unwrap_or_default();
    // A client's socket of UDP looks as one that waits does, but for its port.
    let ephemeral = system::sysctl("net/ipv4/ip_local_port_range").and_then(|range| {
        let (first, last) = range.split_once(char::is_whitespace)?;
        Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
    });
    let sockets = text
        .lines()
        .skip(1)
        .filter_map(|line| socket(line, protocol, address));
    sockets
        .filter(|socket| {
            let is_clients = |range: &RangeInclusive<u16>| {
                protocol == Protocol::Udp && range.contains(&socket.port)
            };
            !ephemeral.as_ref().is_some_and(is_clients)
        })
        .collect()
}

/// `sl: local_address rem_address st …` of proc_net_tcp.rst; a port is open in state 0A (TCP_LISTEN),
/// of UDP in 07 (TCP_CLOSE: not connected).
fn socket(line: &str, protocol: Protocol, address: fn(&str) -> Option<Ipv4Addr>) -> Option<Socket> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let (local, port) = words.next()?.split_once(':')?;
    let state = words.nth(1)?;
    let waits = match protocol {
        Protocol::Tcp => "0A",
        _ => "07",
    };
    let address = address(local)?;
    (state == waits).then_some(Socket {
        protocol,
        address: Some(address).filter(|address| !address.is_unspecified()),
        port: u16::from_str_radix(port, 16).ok()?,
    })
}

/// The 32 bits as this machine has them in memory.
fn is_v4(hex: &str) -> Option<Ipv4Addr> {
    let bits = u32::from_str_radix(hex, 16).ok()?;
    Some(Ipv4Addr::from(bits.to_ne_bytes()))
}

/// `::`, which IPv4 reaches too, or an IPv4 address in IPv6's clothes; others are IPv6's own.
fn is_v6(hex: &str) -> Option<Ipv4Addr> {
    let (first, last) = (hex.get(..24)?, hex.get(24..)?);
    let prefix = u32::from_str_radix(&first[16..], 16).ok()?;
    if !first[..16].bytes().all(|digit| digit == b'0') {
        return None;
    }
    match prefix.to_ne_bytes() {
        [0, 0, 0, 0] if last == "00000000" => Some(Ipv4Addr::UNSPECIFIED),
        [0, 0, 0xff, 0xff] => is_v4(last),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn sockets_are_read_as_proc_lists_them() {
        let tcp =
            "   0: 0A7100CB:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1";
        let found = socket(tcp, Protocol::Tcp, is_v4).expect("a socket");
        assert_eq!(
            (found.address, found.port),
            (Some(Ipv4Addr::new(203, 0, 113, 10)), 80)
        );
        let tcp6 = "   0: 00000000000000000000000000000000:1F90 00000000000000000000000000000000:0000 0A 0";
        let found = socket(tcp6, Protocol::Tcp, is_v6).expect("a socket");
        assert_eq!((found.address, found.port), (None, 8080));
        let connected = tcp.replace(" 0A ", " 01 ");
        assert_eq!(socket(&connected, Protocol::Tcp, is_v4), None);
        let local6 = tcp6.replace("00000000:1F90", "01000000:1F90");
        assert_eq!(socket(&local6, Protocol::Tcp, is_v6), None);
    }
}
