//! Dumps by netlink(7), and what they are parsed with. Spawns no process.

use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::setsockopt_impl;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

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

// linux/netfilter/nfnetlink.h, nf_tables.h: the upper byte is the subsystem
const NFT_NEWTABLE: u16 = 10 << 8;
const NFT_GETTABLE: u16 = 10 << 8 | 1;
/// The bytes of an `nfgenmsg`: family, version, resource.
pub const NFGENMSG: usize = 4;
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

/// Whether nf_tables has a table of the name of one of iptables-nft.
/// Errors: the dump fails.
pub fn nft_tables() -> Result<bool> {
    let protocol = SockProtocol::NetlinkNetFilter;
    let tables = dump(protocol, [NFT_GETTABLE, NFT_NEWTABLE], &mut [0; NFGENMSG])
        .context("ask for the tables of nf_tables (netlink)")?;
    let mut names = tables
        .iter()
        .filter_map(|body| attribute(body, NFGENMSG, NFTA_TABLE_NAME));
    Ok(names.any(|name| ["mangle", "nat", "filter"].contains(&text(name).as_str())))
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

/// The bytes of an attribute.
pub fn encode(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).expect("the value is short");
    let mut attribute = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    attribute.extend(value);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

/// The bytes of an attribute whose value is attributes.
pub fn nest(kind: u16, attributes: &[u8]) -> Vec<u8> {
    encode(kind | NLA_F_NESTED, attributes)
}

/// The value of the attribute of this type, after a body's header of this many bytes.
pub fn attribute(body: &[u8], header: usize, searched: u16) -> Option<&[u8]> {
    let mut all = attributes(body, header);
    all.find_map(|(kind, value)| (kind == searched).then_some(value))
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

/// Parses the value of an address attribute.
pub fn ipv4(value: &[u8]) -> Option<Ipv4Addr> {
    <[u8; 4]>::try_from(value).ok().map(Ipv4Addr::from)
}

/// Parses the value of a name attribute. An interface's name can hold any byte.
pub fn text(value: &[u8]) -> String {
    let name = value.strip_suffix(b"\0").unwrap_or(value);
    String::from_utf8_lossy(name).into_owned()
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
    fn a_message_that_is_cut_short_is_not_parsed() {
        let request = request(7, NLM_F_DUMP, &[0; 8]);
        assert!(next_message(&mut &request[..20]).is_none());
        let mut rest: &[u8] = &request;
        let first = next_message(&mut rest).expect("one message");
        assert_eq!((first.kind, first.body.len(), rest.len()), (7, 8, 0));
        // An attribute that is longer than its message.
        assert_eq!(attributes(&[9, 0, 2, 0, 1], 0).next(), None);
        // An attribute of length 0 ends the loop over the attributes.
        assert_eq!(attributes(&[0; 8], 0).next(), None);
    }
}
