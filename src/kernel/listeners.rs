//! The router's own listening sockets, from /proc/net/tcp and its like (Documentation/networking/proc_net_tcp.rst).

use std::net::Ipv4Addr;

use crate::kernel::root::Root;
use crate::model::forward::Protocol;

/// A socket that is bound to a port and not connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    pub protocol: Protocol,
    /// None if it listens on all addresses.
    pub address: Option<Ipv4Addr>,
    pub port: u16,
}

/// The listening sockets of a protocol, by the files below a root folder. Empty if it is neither TCP nor UDP.
pub fn listening_below(root: &Root, protocol: Protocol) -> Vec<Socket> {
    // A TCP socket listens in state TCP_LISTEN, a UDP socket in state TCP_CLOSE: not connected.
    let (files, listens) = match protocol {
        Protocol::Tcp => (["tcp", "tcp6"], "0A"),
        Protocol::Udp => (["udp", "udp6"], "07"),
        _ => return Vec::new(),
    };
    let mut sockets = Vec::new();
    for file in files {
        let text = root.read(format!("/proc/net/{file}")).unwrap_or_default();
        let lines = text.lines().skip(1);
        sockets.extend(lines.filter_map(|line| socket(line, protocol, listens)));
    }
    sockets
}

/// Parses `sl: local_address rem_address st …`. None if it does not listen, or IPv4 packets can't reach it.
fn socket(line: &str, protocol: Protocol, listens: &str) -> Option<Socket> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let (local, port) = words.next()?.split_once(':')?;
    let state = words.nth(1)?;
    let address = ipv4(local)?;
    (state == listens).then_some(Socket {
        protocol,
        address: Some(address).filter(|address| !address.is_unspecified()),
        port: u16::from_str_radix(port, 16).ok()?,
    })
}

/// Parses an IPv4 address, or an IPv6 address on which IPv4 packets arrive, too: `::`, or an IPv4-mapped one
/// (`::ffff:192.0.2.1`, RFC 4291, 2.5.5.2). The kernel prints each 32 bits in the byte order of this machine.
fn ipv4(hex: &str) -> Option<Ipv4Addr> {
    let mut words = Vec::new();
    for digits in hex.as_bytes().chunks(8) {
        let digits = str::from_utf8(digits).ok()?;
        words.push(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes());
    }
    match words[..] {
        [address] | [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0xff, 0xff], address] => {
            Some(address.into())
        }
        _ if words == [[0; 4]; 4] => Some(Ipv4Addr::UNSPECIFIED),
        _ => None,
    }
}
