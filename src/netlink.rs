//! What the kernel tells without a process of its own (netlink(7)): interfaces and addresses, with what
//! getifaddrs(3) leaves out; whether nf_tables has tables of iptables.

use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::time::{ClockId, clock_gettime};

// linux/netlink.h
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// The bytes of a `nlmsghdr`: length, type, flags, sequence number, port.
const HEADER: usize = 16;

// linux/rtnetlink.h
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;

// linux/if.h, if_link.h
const IFF_UP: u32 = 1;
/// The bytes of an `ifinfomsg`: family, type, index, flags, change.
const INTERFACE: usize = 16;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;

// linux/if_addr.h
/// The bytes of an `ifaddrmsg`: family, prefix length, flags, scope, the link's index.
const ADDRESS: usize = 8;
const IFA_LOCAL: u16 = 2;
const IFA_CACHEINFO: u16 = 6;

// linux/netfilter/nfnetlink.h, nf_tables.h: the subsystem in the upper byte
const NFT_NEWTABLE: u16 = 10 << 8;
const NFT_GETTABLE: u16 = 10 << 8 | 1;
/// The bytes of an `nfgenmsg`: family, version, resource.
const NFGENMSG: usize = 4;
const NFTA_TABLE_NAME: u16 = 1;

/// More than one message of a dump takes (`NLMSG_GOODSIZE`, linux/netlink.h).
const BUFFER: usize = 32 << 10;

/// The most that the kernel may let us wait, in seconds: it answers while it is asked.
const PATIENCE: i64 = 5;

/// An interface.
#[derive(Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether it is up (`IFF_UP`, linux/if.h).
    pub up: bool,
    /// Its MTU, in bytes.
    pub mtu: Option<u32>,
}

/// An IPv4 address of an interface.
#[derive(Debug, PartialEq, Eq)]
pub struct Address {
    /// The interface's number. The label, which getifaddrs(3) gives for its name, can be that of another.
    pub index: u32,
    /// The address.
    pub address: Ipv4Addr,
    /// How long ago it was added.
    pub age: Duration,
}

/// All interfaces.
///
/// # Errors
/// The kernel can't be asked, or refuses.
pub fn interfaces() -> Result<Vec<Interface>> {
    let mut interfaces = Vec::new();
    let protocol = SockProtocol::NetlinkRoute;
    dump(protocol, RTM_GETLINK, INTERFACE, |kind, body| {
        interfaces.extend(interface(body).filter(|_| kind == RTM_NEWLINK));
        Ok(())
    })
    .context("ask for the interfaces (netlink)")?;
    Ok(interfaces)
}

/// All IPv4 addresses, in the kernel's order.
///
/// # Errors
/// The kernel can't be asked, or refuses.
pub fn addresses() -> Result<Vec<Address>> {
    let mut addresses = Vec::new();
    let protocol = SockProtocol::NetlinkRoute;
    dump(protocol, RTM_GETADDR, ADDRESS, |kind, body| {
        // What the kernel stamps is its ticks, which follow this clock (`cstamp_delta`, net/ipv4/devinet.c).
        let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
        addresses.extend(address(body, now).filter(|_| kind == RTM_NEWADDR));
        Ok(())
    })
    .context("ask for the addresses (netlink)")?;
    Ok(addresses)
}

/// Whether iptables-nft may have rules: whether nf_tables has one of the tables that it makes.
///
/// # Errors
/// The kernel can't be asked, or refuses.
pub fn nft_tables() -> Result<bool> {
    let asked = || "ask for the tables of nf_tables (netlink)";
    let mut found = false;
    dump(
        SockProtocol::NetlinkNetFilter,
        NFT_GETTABLE,
        NFGENMSG,
        |kind, body| {
            let attributes = body.get(NFGENMSG..).unwrap_or_default();
            let name = attribute(attributes, NFTA_TABLE_NAME).unwrap_or_default();
            let name = name.strip_suffix(b"\0").unwrap_or(name);
            found |= kind == NFT_NEWTABLE && [&b"mangle"[..], b"nat", b"filter"].contains(&name);
            Ok(())
        },
    )
    .with_context(asked)?;
    Ok(found)
}

/// Asks for all entries of a kind, of IPv4, and hands on each message's type and body. `fixed` is the
/// length of what is ahead of a message's attributes; it begins with the family.
fn dump(
    protocol: SockProtocol,
    kind: u16,
    fixed: usize,
    mut take: impl FnMut(u16, &[u8]) -> Result<()>,
) -> Result<()> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
    let patience = TimeVal::seconds(PATIENCE);
    setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
    let question = question(kind, fixed);
    send(socket.as_raw_fd(), &question, MsgFlags::empty())?;
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut messages = buffer.get(..length).unwrap_or_default();
        while let Some((kind, body)) = message(&mut messages) {
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => bail!("the kernel refuses"),
                _ => take(kind, body)?,
            }
        }
    }
}

fn question(kind: u16, fixed: usize) -> Vec<u8> {
    let mut question = Vec::new();
    let length = u32::try_from(HEADER + fixed).expect("it is short");
    question.extend(length.to_ne_bytes());
    question.extend(kind.to_ne_bytes());
    question.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    question.extend([0; 8]);
    question.push(AddressFamily::Inet as u8);
    question.resize(HEADER + fixed, 0);
    question
}

/// The value of the first attribute of this type.
fn attribute(mut rest: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let (length, found) = (usize::from(u16_at(rest, 0)?), u16_at(rest, 2)?);
        let value = rest.get(4..length)?;
        if found == kind {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
}

/// The next message's type and body.
fn message<'a>(rest: &mut &'a [u8]) -> Option<(u16, &'a [u8])> {
    let length = usize::try_from(u32_at(rest, 0)?).ok()?;
    let (kind, body) = (u16_at(rest, 4)?, rest.get(HEADER..length)?);
    *rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, body))
}

fn interface(body: &[u8]) -> Option<Interface> {
    let attributes = body.get(INTERFACE..)?;
    let name = attribute(attributes, IFLA_IFNAME)?;
    let name = name.strip_suffix(b"\0").unwrap_or(name);
    Some(Interface {
        index: u32_at(body, 4)?,
        name: String::from_utf8_lossy(name).into_owned(),
        up: u32_at(body, 8)? & IFF_UP != 0,
        mtu: attribute(attributes, IFLA_MTU).and_then(|mtu| u32_at(mtu, 0)),
    })
}

fn address(body: &[u8], now: Duration) -> Option<Address> {
    let attributes = body.get(ADDRESS..)?;
    let local = <[u8; 4]>::try_from(attribute(attributes, IFA_LOCAL)?).ok()?;
    // Preferred and valid for how long, added and changed when: in hundredths of a second since the start.
    let stamp = u32_at(attribute(attributes, IFA_CACHEINFO)?, 8)?;
    Some(Address {
        index: u32_at(body, 4)?,
        address: local.into(),
        age: age(now, stamp),
    })
}

/// The stamp has 32 bits, and starts anew after 497 days.
fn age(now: Duration, stamp: u32) -> Duration {
    let now = now.as_millis() / 10 % (1 << 32);
    let now = u32::try_from(now).expect("it has 32 bits");
    let passed = now.wrapping_sub(stamp);
    // A tick may count as the one that follows.
    let passed = if passed > u32::MAX - 100 { 0 } else { passed };
    Duration::from_millis(u64::from(passed) * 10)
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    let bytes = bytes.get(offset..offset + 2)?;
    bytes.try_into().ok().map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let bytes = bytes.get(offset..offset + 4)?;
    bytes.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_the_age_of_its_stamp_even_where_that_started_anew() {
        let hundredths = |n: u64| Duration::from_millis(n * 10);
        assert_eq!(age(hundredths(5000), 2000), hundredths(3000));
        assert_eq!(
            age(hundredths((1 << 32) + 700), u32::MAX - 299),
            hundredths(1000)
        );
        assert_eq!(age(hundredths(5000), 5001), Duration::ZERO);
    }

    #[test]
    fn a_message_cut_short_is_none() {
        let question = question(RTM_GETADDR, ADDRESS);
        let mut question: &[u8] = &question;
        assert_eq!(message(&mut &question[..20]), None);
        let (kind, body) = message(&mut question).expect("one message");
        assert_eq!(
            (kind, body.len(), question.len()),
            (RTM_GETADDR, ADDRESS, 0)
        );
        // An attribute that is longer than the message.
        assert_eq!(
            address(&[0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 2, 0, 1], Duration::ZERO),
            None
        );
        // An attribute without a length must end the walk.
        assert_eq!(address(&[0; 16], Duration::ZERO), None);
    }
}
