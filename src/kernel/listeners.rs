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

/// Parses the local address in a file. None if IPv4 packets can't reach it.
type ParseAddress = fn(&str) -> Option<Ipv4Addr>;

/// The listening sockets of a protocol. Empty if it is neither TCP nor UDP.
pub fn listening(protocol: Protocol) -> Vec<Socket> {
    listening_below(&Root::system(), protocol)
}

/// The listening sockets, by the files below another root folder.
pub fn listening_below(root: &Root, protocol: Protocol) -> Vec<Socket> {
    let files: [(&str, ParseAddress); 2] = match protocol {
        Protocol::Tcp => [("tcp", parse_v4), ("tcp6", parse_v6)],
        Protocol::Udp => [("udp", parse_v4), ("udp6", parse_v6)],
        _ => return Vec::new(),
    };
    let mut sockets = Vec::new();
    for (file, parse_address) in files {
        let text = root.read(format!("/proc/net/{file}")).unwrap_or_default();
        let lines = text.lines().skip(1);
        sockets.extend(lines.filter_map(|line| socket(line, protocol, parse_address)));
    }
    sockets
}

/// Parses `sl: local_address rem_address st …`. A TCP socket listens in state 0A (TCP_LISTEN), a UDP socket in state 07
/// (TCP_CLOSE: not connected).
fn socket(line: &str, protocol: Protocol, parse_address: ParseAddress) -> Option<Socket> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let (local, port) = words.next()?.split_once(':')?;
    let state = words.nth(1)?;
    let listens = match protocol {
        Protocol::Tcp => "0A",
        _ => "07",
    };
    let address = parse_address(local)?;
    (state == listens).then_some(Socket {
        protocol,
        address: Some(address).filter(|address| !address.is_unspecified()),
        port: u16::from_str_radix(port, 16).ok()?,
    })
}

/// The kernel prints the 32 bits in the byte order of this machine.
fn parse_v4(hex: &str) -> Option<Ipv4Addr> {
    let bits = u32::from_str_radix(hex, 16).ok()?;
    Some(Ipv4Addr::from(bits.to_ne_bytes()))
}

/// `::`, on which IPv4 packets arrive too, or an IPv4-mapped address (`::ffff:192.0.2.1`, RFC 4291, 2.5.5.2).
fn parse_v6(hex: &str) -> Option<Ipv4Addr> {
    let (first, last) = (hex.get(..24)?, hex.get(24..)?);
    let prefix = u32::from_str_radix(&first[16..], 16).ok()?;
    if !first[..16].bytes().all(|digit| digit == b'0') {
        return None;
    }
    match prefix.to_ne_bytes() {
        [0, 0, 0, 0] if last == "00000000" => Some(Ipv4Addr::UNSPECIFIED),
        [0, 0, 0xff, 0xff] => parse_v4(last),
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
        let found = socket(tcp, Protocol::Tcp, parse_v4).expect("a socket");
        assert_eq!(
            (found.address, found.port),
            (Some(Ipv4Addr::new(203, 0, 113, 10)), 80)
        );
        let tcp6 = "   0: 00000000000000000000000000000000:1F90 00000000000000000000000000000000:0000 0A 0";
        let found = socket(tcp6, Protocol::Tcp, parse_v6).expect("a socket");
        assert_eq!((found.address, found.port), (None, 8080));
        let connected = tcp.replace(" 0A ", " 01 ");
        assert_eq!(socket(&connected, Protocol::Tcp, parse_v4), None);
        let local6 = tcp6.replace("00000000:1F90", "01000000:1F90");
        assert_eq!(socket(&local6, Protocol::Tcp, parse_v6), None);
    }
}
