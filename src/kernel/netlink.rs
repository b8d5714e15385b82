//! Dumps by netlink(7): interfaces, addresses, whether nf_tables has tables of iptables, and the primitives for other
//! dumps. Spawns no process.

use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::libc::{
    self, IFA_CACHEINFO, IFA_LOCAL, RTM_GETADDR, RTM_GETLINK, RTM_NEWADDR, RTM_NEWLINK,
};
use nix::setsockopt_impl;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::time::{ClockId, clock_gettime};

// linux/netlink.h
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
/// The entries changed during the dump.
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// The bytes of a `nlmsghdr`: length, type, flags, sequence number, port.
const HEADER: usize = 16;
const NLM_F_ACK: u16 = 4;
const NLA_F_NESTED: u16 = 0x8000;
/// The other bits are flags (`NLA_F_NESTED`, `NLA_F_NET_BYTEORDER`).
const NLA_TYPE_MASK: u16 = 0x3fff;

// linux/if.h, if_link.h
const IFF_UP: u32 = 1;
/// The bytes of an `ifinfomsg`: family, type, index, flags, change.
const INTERFACE: usize = 16;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET_CONF: u16 = 1;

// linux/ip.h
/// The index of `src_valid_mark` among the parameters in `IFLA_INET_CONF`, from 0: `IPV4_DEVCONF_SRC_VMARK` - 1.
const SRC_VMARK: usize = 23;

// linux/if_addr.h
/// The bytes of an `ifaddrmsg`: family, prefix length, flags, scope, interface index.
const ADDRESS: usize = 8;

// linux/netfilter/nfnetlink.h, nf_tables.h: the upper byte is the subsystem
const NFT_NEWTABLE: u16 = 10 << 8;
const NFT_GETTABLE: u16 = 10 << 8 | 1;
/// The bytes of an `nfgenmsg`: family, version, resource.
const NFGENMSG: usize = 4;
const NFTA_TABLE_NAME: u16 = 1;

/// The kernel filters a dump by the fields of the request, and refuses a request with fields that it does not know
/// (netlink(7)).
#[derive(Clone, Copy, Debug)]
struct StrictCheck;

setsockopt_impl!(
    StrictCheck,
    libc::SOL_NETLINK,
    libc::NETLINK_GET_STRICT_CHK,
    bool,
    sockopt::SetBool
);

/// The kernel sends a dump in parts of up to this many bytes (`netlink_recvmsg`, net/netlink/af_netlink.c).
const BUFFER: usize = 32 << 10;

/// How long the kernel may take for a part of a dump, in seconds.
const TIMEOUT: i64 = 5;

/// How often a dump is tried while the entries change.
const TRIES: usize = 20;

#[derive(Debug, PartialEq, Eq)]
pub struct Interface {
    pub index: u32,
    pub name: String,
    /// `IFF_UP`, linux/if.h.
    pub up: bool,
    pub mtu: Option<u32>,
    /// The interface's own value, without that of `all` (Documentation/networking/ip-sysctl.rst).
    pub src_valid_mark: bool,
}

/// An IPv4 address of an interface.
#[derive(Debug, PartialEq, Eq)]
pub struct Address {
    /// The interface's index. The address's label, which getifaddrs(3) returns as the interface's name, need not be it.
    pub index: u32,
    pub address: Ipv4Addr,
    pub age: Duration,
}

/// All interfaces.
/// Errors: the dump fails.
pub fn interfaces() -> Result<Vec<Interface>> {
    let protocol = SockProtocol::NetlinkRoute;
    let interfaces = dump(protocol, [RTM_GETLINK, RTM_NEWLINK], &mut [0; INTERFACE])
        .context("ask for the interfaces (netlink)")?;
    Ok(interfaces
        .iter()
        .filter_map(|body| interface(body))
        .collect())
}

/// All IPv4 addresses, in the kernel's order.
/// Errors: the dump fails.
pub fn addresses() -> Result<Vec<Address>> {
    let protocol = SockProtocol::NetlinkRoute;
    let addresses = dump(protocol, [RTM_GETADDR, RTM_NEWADDR], &mut [0; ADDRESS])
        .context("ask for the addresses (netlink)")?;
    // The kernel's timestamps count jiffies, which follow this clock (`cstamp_delta`, net/ipv4/devinet.c).
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
    let addresses = addresses.iter();
    Ok(addresses.filter_map(|body| address(body, now)).collect())
}

/// Whether nf_tables has a table of the name of one of iptables-nft.
/// Errors: the dump fails.
pub fn nft_tables() -> Result<bool> {
    let protocol = SockProtocol::NetlinkNetFilter;
    let tables = dump(protocol, [NFT_GETTABLE, NFT_NEWTABLE], &mut [0; NFGENMSG])
        .context("ask for the tables of nf_tables (netlink)")?;
    Ok(tables.iter().any(|body| {
        let name = attributes(body, NFGENMSG).find(|(kind, _)| *kind == NFTA_TABLE_NAME);
        let name = name.map(|(_, name)| text(name)).unwrap_or_default();
        ["mangle", "nat", "filter"].contains(&name.as_str())
    }))
}

/// Dumps all IPv4 entries of a kind. Returns the body of each reply: a header that depends on the kind, and attributes.
/// `header` is that header for the request; its first byte is the family, which is set here.
/// Errors: the kernel does not answer, refuses, or the entries keep changing during the dump.
pub fn dump(
    protocol: SockProtocol,
    [request_kind, reply_kind]: [u16; 2],
    header: &mut [u8],
) -> Result<Vec<Vec<u8>>> {
    header[0] = AddressFamily::Inet as u8;
    let mut socket = Socket::open(protocol)?;
    for _ in 0..TRIES {
        let mut bodies = Vec::new();
        let is_whole = socket.dump([request_kind, reply_kind], header, |body| {
            bodies.push(body.to_vec());
        })?;
        if is_whole {
            return Ok(bodies);
        }
    }
    bail!("the entries keep changing")
}

/// A connection to a part of the kernel.
pub struct Socket {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens one.
    /// Errors: the kernel has no such part.
    pub fn open(protocol: SockProtocol) -> Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
        let timeout = TimeVal::seconds(TIMEOUT);
        setsockopt(&socket, sockopt::ReceiveTimeout, &timeout)?;
        // Linux before 4.20 has no such option, and dumps the entries of all protocols.
        let _ = setsockopt(&socket, StrictCheck, &true);
        let buffer = vec![0; BUFFER];
        Ok(Self { socket, buffer })
    }

    /// Visits the body of each reply of this kind. False if the entries changed during the dump, so that some may be missing.
    /// Errors: the kernel does not answer, or refuses.
    pub fn dump(
        &mut self,
        [request_kind, reply_kind]: [u16; 2],
        body: &[u8],
        visit: impl FnMut(&[u8]),
    ) -> Result<bool> {
        self.send(request_kind, NLM_F_DUMP, body)?;
        self.receive(reply_kind, visit)
    }

    /// Sends a request for a change, or for one entry, whose reply of this kind is visited.
    /// Errors: the kernel does not answer, or refuses: an [`Errno`].
    pub fn ask(
        &mut self,
        [request_kind, reply_kind]: [u16; 2],
        body: &[u8],
        visit: impl FnMut(&[u8]),
    ) -> Result<()> {
        self.send(request_kind, NLM_F_ACK, body)?;
        self.receive(reply_kind, visit).map(drop)
    }

    fn send(&self, kind: u16, flags: u16, body: &[u8]) -> Result<()> {
        let message = request(kind, flags, body);
        send(self.socket.as_raw_fd(), &message, MsgFlags::empty())?;
        Ok(())
    }

    fn receive(&mut self, reply_kind: u16, mut visit: impl FnMut(&[u8])) -> Result<bool> {
        let mut is_whole = true;
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty())?;
            let mut messages = self.buffer.get(..length).unwrap_or_default();
            while let Some(Message { kind, flags, body }) = next_message(&mut messages) {
                is_whole &= flags & NLM_F_DUMP_INTR == 0;
                match kind {
                    NLMSG_DONE | NLMSG_ERROR => {
                        // 0, or a negative errno.
                        let number = u32_at(body, 0).unwrap_or_default().cast_signed();
                        ensure!(number >= 0, Errno::from_raw(-number));
                        return Ok(is_whole);
                    }
                    kind if kind == reply_kind => visit(body),
                    _ => {}
                }
            }
        }
    }
}

/// A request. The sequence number and port may be 0 (netlink(7)).
fn request(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + body.len()).expect("the request is short");
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    message
}

/// The types and values of the attributes after a body's header of this many bytes.
pub fn attributes(body: &[u8], header: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = body.get(header..).unwrap_or_default();
    std::iter::from_fn(move || {
        let (length, kind) = (usize::from(u16_at(rest, 0)?), u16_at(rest, 2)?);
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & NLA_TYPE_MASK, value))
    })
}

/// An attribute.
pub fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).expect("the value is short");
    let mut attribute = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    attribute.extend(value);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

/// An attribute whose value is attributes.
pub fn nest(kind: u16, attributes: &[u8]) -> Vec<u8> {
    attribute(kind | NLA_F_NESTED, attributes)
}

/// The value of the attribute of this type that is nested in an attribute's value.
pub fn nested(value: &[u8], searched: u16) -> Option<&[u8]> {
    let mut inner = attributes(value, 0);
    inner.find_map(|(kind, value)| (kind == searched).then_some(value))
}

/// A message from the kernel.
struct Message<'a> {
    kind: u16,
    flags: u16,
    body: &'a [u8],
}

/// Takes the next message off the bytes that are left.
fn next_message<'a>(rest: &mut &'a [u8]) -> Option<Message<'a>> {
    let length = usize::try_from(u32_at(rest, 0)?).ok()?;
    let message = Message {
        kind: u16_at(rest, 4)?,
        flags: u16_at(rest, 6)?,
        body: rest.get(HEADER..length)?,
    };
    *rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some(message)
}

fn interface(body: &[u8]) -> Option<Interface> {
    let mut interface = Interface {
        index: u32_at(body, 4)?,
        name: String::new(),
        up: u32_at(body, 8)? & IFF_UP != 0,
        mtu: None,
        src_valid_mark: false,
    };
    for (kind, value) in attributes(body, INTERFACE) {
        match kind {
            IFLA_IFNAME => interface.name = text(value),
            IFLA_MTU => interface.mtu = u32_at(value, 0),
            IFLA_AF_SPEC => {
                let family = AddressFamily::Inet as u16;
                let parameters =
                    nested(value, family).and_then(|inet| nested(inet, IFLA_INET_CONF));
                let value = parameters.and_then(|values| u32_at(values, SRC_VMARK * 4));
                interface.src_valid_mark = value.is_some_and(|value| value != 0);
            }
            _ => {}
        }
    }
    Some(interface).filter(|interface| !interface.name.is_empty())
}

fn address(body: &[u8], now: Duration) -> Option<Address> {
    let attribute = |searched| attributes(body, ADDRESS).find(|(kind, _)| *kind == searched);
    let (_, local) = attribute(IFA_LOCAL)?;
    // `ifa_cacheinfo`: preferred and valid lifetime, then when it was added (`cstamp`) and changed, in hundredths of a
    // second since boot.
    let (_, times) = attribute(IFA_CACHEINFO)?;
    Some(Address {
        index: u32_at(body, 4)?,
        address: ipv4(local)?,
        age: age(now, u32_at(times, 8)?),
    })
}

/// Parses the value of an address attribute.
pub fn ipv4(value: &[u8]) -> Option<Ipv4Addr> {
    <[u8; 4]>::try_from(value).ok().map(Ipv4Addr::from)
}

/// Parses the value of a name attribute. An interface's name can hold any byte.
pub fn text(value: &[u8]) -> String {
    let name = value.strip_suffix(b"\0").unwrap_or(value);
    String::from_utf8_lossy(name).into_owned()
}

/// The time since a timestamp of 32 bits, which wraps around after 497 days.
fn age(now: Duration, stamp: u32) -> Duration {
    let now = now.as_millis() / 10 % (1 << 32);
    let now = u32::try_from(now).expect("it has 32 bits");
    let passed = now.wrapping_sub(stamp);
    // Rounding can put the timestamp a little after now.
    let passed = if passed > u32::MAX - 100 { 0 } else { passed };
    Duration::from_millis(u64::from(passed) * 10)
}

/// The number in native byte order at this offset.
pub fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    let bytes = bytes.get(offset..offset + 2)?;
    bytes.try_into().ok().map(u16::from_ne_bytes)
}

/// The number in native byte order at this offset.
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let bytes = bytes.get(offset..offset + 4)?;
    bytes.try_into().ok().map(u32::from_ne_bytes)
}

/// The number in network byte order at this offset.
pub fn u16_be_at(bytes: &[u8], offset: usize) -> Option<u16> {
    u16_at(bytes, offset).map(u16::from_be)
}

/// The number in network byte order at this offset.
pub fn u32_be_at(bytes: &[u8], offset: usize) -> Option<u32> {
    u32_at(bytes, offset).map(u32::from_be)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_age_of_an_address_is_right_after_the_timestamp_wraps_around() {
        let hundredths = |count: u64| Duration::from_millis(count * 10);
        assert_eq!(age(hundredths(5000), 2000), hundredths(3000));
        assert_eq!(
            age(hundredths((1 << 32) + 700), u32::MAX - 299),
            hundredths(1000)
        );
        assert_eq!(age(hundredths(5000), 5001), Duration::ZERO);
    }

    #[test]
    fn a_message_that_is_cut_short_is_not_parsed() {
        let request = request(RTM_GETADDR, NLM_F_DUMP, &[0; ADDRESS]);
        assert!(next_message(&mut &request[..20]).is_none());
        let mut rest: &[u8] = &request;
        let first = next_message(&mut rest).expect("one message");
        assert_eq!(
            (first.kind, first.body.len(), rest.len()),
            (RTM_GETADDR, ADDRESS, 0)
        );
        // An attribute that is longer than its message.
        assert_eq!(
            address(&[0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 2, 0, 1], Duration::ZERO),
            None
        );
        // An attribute of length 0 ends the loop over the attributes.
        assert_eq!(address(&[0; 16], Duration::ZERO), None);
    }
}
