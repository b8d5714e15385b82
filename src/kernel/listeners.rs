//! Sockets of this router's own that wait for somebody, as /proc/net lists them (proc_net_tcp.rst).

use std::net::Ipv4Addr;

use crate::kernel::root::Root;
use crate::model::forward::Protocol;

/// A socket that waits for anybody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// None for all addresses.
    pub address: Option<Ipv4Addr>,
    /// Its port.
    pub port: u16,
}

/// How a file writes the address; none for one that IPv4 does not reach.
type Address = fn(&str) -> Option<Ipv4Addr>;

/// Those of a protocol; none for one without sockets that wait.
pub fn listening(protocol: Protocol) -> Vec<Socket> {
    listening_below(&Root::system(), protocol)
}

/// The same, by the files below another root folder.
pub fn listening_below(root: &Root, protocol: Protocol) -> Vec<Socket> {
    let files: [(&str, Address); 2] = match protocol {
        Protocol::Tcp => [("tcp", is_v4), ("tcp6", is_v6)],
        Protocol::Udp => [("udp", is_v4), ("udp6", is_v6)],
        _ => return Vec::new(),
    };
    let mut sockets = Vec::new();
    for (file, address) in files {
        let text = root.read(format!("/proc/net/{file}")).unwrap_or_default();
        let lines = text.lines().skip(1);
        sockets.extend(lines.filter_map(|line| socket(line, protocol, address)));
    }
    sockets
}

/// `sl: local_address rem_address st …` of proc_net_tcp.rst; a port is open in state 0A (TCP_LISTEN),
/// of UDP in 07 (TCP_CLOSE: not connected).
fn socket(line: &str, protocol: Protocol, address: Address) -> Option<Socket> {
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
