//! Tracked connections, by ctnetlink (linux/netfilter/nfnetlink_conntrack.h): finds them, and ends them one by one. Spawns
//! no process, and holds no more of them than it is asked for.

use std::collections::BTreeSet;
use std::fmt;
use std::net::Ipv4Addr;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockProtocol};

use crate::kernel::netlink::{
    NFGENMSG, Socket, attribute, attributes, encode, ipv4, nest, u16_be_at, u32_be_at,
};
use crate::kernel::root::Root;
use crate::model::forward::{Asked, Protocol};
use crate::model::route::FwMark;

// linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h: the upper byte is the subsystem.
const CT_NEW: u16 = 1 << 8;
const CT_GET: u16 = 1 << 8 | 1;
const CT_DELETE: u16 = 1 << 8 | 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_PROTOINFO: u16 = 4;
const CTA_TIMEOUT: u16 = 7;
const CTA_MARK: u16 = 8;
const CTA_COUNTERS_ORIG: u16 = 9;
const CTA_COUNTERS_REPLY: u16 = 10;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_MARK_MASK: u16 = 21;
const CTA_FILTER: u16 = 25;
const CTA_STATUS_MASK: u16 = 26;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_PROTO_ICMP_ID: u16 = 4;
const CTA_PROTO_ICMP_TYPE: u16 = 5;
const CTA_PROTO_ICMP_CODE: u16 = 6;
const CTA_COUNTERS_BYTES: u16 = 2;
const CTA_PROTOINFO_TCP: u16 = 1;
const CTA_PROTOINFO_TCP_STATE: u16 = 1;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
// net/netfilter/nf_internals.h
const CTA_FILTER_F_CTA_IP_SRC: u32 = 1;
const CTA_FILTER_F_CTA_IP_DST: u32 = 2;
// linux/netfilter/nf_conntrack_common.h
const IPS_SEEN_REPLY: u32 = 1 << 1;
const IPS_SRC_NAT: u32 = 1 << 4;
const IPS_DST_NAT: u32 = 1 << 5;
// linux/netfilter/nf_conntrack_tcp.h
const TCP_SYN_SENT: u8 = 1;
const TCP_ESTABLISHED: u8 = 3;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    pub protocol: u8,
    /// The addresses and ports of the first packet, before NAT.
    pub original: Tuple,
    /// The addresses and ports of the replies that conntrack expects: those after NAT, reversed.
    pub reply: Tuple,
    /// Whether there were packets in both directions.
    pub is_replied: bool,
    /// Its state, if it is one of TCP.
    pub tcp: Option<TcpState>,
    /// For how many seconds it is still tracked without another packet.
    pub timeout: u32,
    /// The connection mark, with the bits of everybody.
    pub mark: u32,
    /// The bytes of both directions. None unless the kernel counts them (`nf_conntrack_acct`,
    /// Documentation/networking/nf_conntrack-sysctl.rst).
    pub bytes: Option<u64>,
    /// `type`, `code` and `id` of ICMP.
    icmp: Option<(u8, u8, u16)>,
    /// The attributes by which the kernel finds it, and only it: tuple, id and zone.
    key: Vec<u8>,
}

/// The number of a TCP connection's state (linux/netfilter/nf_conntrack_tcp.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpState(u8);

impl TcpState {
    /// Whether the client has asked, and has no answer.
    pub fn is_waiting(self) -> bool {
        self.0 == TCP_SYN_SENT
    }

    /// Whether both have answered, and none has ended it.
    pub fn is_established(self) -> bool {
        self.0 == TCP_ESTABLISHED
    }

    /// The parameter that says for how many seconds such a connection is tracked after its last packet
    /// (Documentation/networking/nf_conntrack-sysctl.rst).
    pub fn timeout_parameter(self) -> String {
        let names = [
            "",
            "syn_sent",
            "syn_recv",
            "established",
            "fin_wait",
            "close_wait",
            "last_ack",
            "time_wait",
            "close",
        ];
        let name = names.get(usize::from(self.0)).unwrap_or(&"");
        format!("net/netfilter/nf_conntrack_tcp_timeout_{name}")
    }
}

/// One direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple {
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    /// The source and destination port. None if the protocol has no ports.
    pub ports: Option<(u16, u16)>,
}

/// Which connections to look for. The kernel leaves out the others; an older one than Linux 5.8, which filters by address, or
/// 5.19, by NAT, returns more than these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Filter {
    /// Those whose first packet was for this address.
    To(Ipv4Addr),
    /// Those whose replies come from this address.
    RepliesFrom(Ipv4Addr),
    /// Those with this connection mark.
    Marked(FwMark),
    /// Those whose destination is translated.
    DestinationNat,
    /// Those that keep their source: all but what is masqueraded.
    NoSourceNat,
}

impl Filter {
    fn attributes(self) -> Vec<u8> {
        let number = |kind, value: u32| encode(kind, &value.to_be_bytes());
        let status = |value, mask| [number(CTA_STATUS, value), number(CTA_STATUS_MASK, mask)];
        let address = |[original, reply]: [u32; 2], tuple, kind, address: Ipv4Addr| {
            let flags = [
                encode(CTA_FILTER_ORIG_FLAGS, &original.to_ne_bytes()),
                encode(CTA_FILTER_REPLY_FLAGS, &reply.to_ne_bytes()),
            ];
            let address = encode(kind, &address.octets());
            [
                nest(CTA_FILTER, &flags.concat()),
                nest(tuple, &nest(CTA_TUPLE_IP, &address)),
            ]
        };
        let attributes = match self {
            Self::To(to) => {
                let flags = [CTA_FILTER_F_CTA_IP_DST, 0];
                address(flags, CTA_TUPLE_ORIG, CTA_IP_V4_DST, to)
            }
            Self::RepliesFrom(from) => {
                let flags = [0, CTA_FILTER_F_CTA_IP_SRC];
                address(flags, CTA_TUPLE_REPLY, CTA_IP_V4_SRC, from)
            }
            Self::Marked(FwMark { value, mask }) => {
                [number(CTA_MARK, value), number(CTA_MARK_MASK, mask)]
            }
            Self::DestinationNat => status(IPS_DST_NAT, IPS_DST_NAT),
            Self::NoSourceNat => status(0, IPS_SRC_NAT),
        };
        attributes.concat()
    }
}

/// The connections for which this holds, among those that one of the filters takes; each once.
/// Errors: the kernel refuses, or does not answer.
pub fn find(
    filters: impl IntoIterator<Item = Filter>,
    mut is_wanted: impl FnMut(&Flow) -> bool,
) -> Result<Vec<Flow>> {
    let mut keys = BTreeSet::new();
    let mut found = Vec::new();
    each(filters, |flow| {
        if is_wanted(&flow) && keys.insert(flow.key.clone()) {
            found.push(flow);
        }
    })?;
    Ok(found)
}

/// Visits the connections that one of the filters takes; one that several take, several times.
/// Errors: the kernel refuses, or does not answer.
pub fn each(filters: impl IntoIterator<Item = Filter>, mut visit: impl FnMut(Flow)) -> Result<()> {
    // Without connection tracking there is no such count (nf_conntrack-sysctl.rst), and to ask would load the module.
    let count = Root::system().sysctl("net/netfilter/nf_conntrack_count");
    if count.is_none_or(|count| count == "0") {
        return Ok(());
    }
    let all: BTreeSet<Filter> = filters.into_iter().collect();
    for filter in all {
        let mut body = header();
        body.extend(filter.attributes());
        let mut socket = Socket::open(SockProtocol::NetlinkNetFilter)?;
        // The table changes all the time; a connection that comes meanwhile meets the entries of today.
        socket
            .dump([CT_GET, CT_NEW], &body, |body| {
                if let Some(flow) = flow(body) {
                    visit(flow);
                }
            })
            .context("ask for the tracked connections (ctnetlink)")?;
    }
    Ok(())
}

/// Ends these connections: their next packets pass the nat table and are marked anew. Returns how many there were; one that
/// has ended meanwhile is not counted.
/// Errors: the kernel refuses one of them; the others are ended all the same.
pub fn end(flows: &[Flow]) -> (usize, Result<()>) {
    let mut ended = 0;
    let mut result = Ok(());
    let mut socket = match Socket::open(SockProtocol::NetlinkNetFilter) {
        Ok(socket) => socket,
        Err(error) => return (0, Err(error)),
    };
    for flow in flows {
        let body = [header(), flow.key.clone()].concat();
        match socket.ask([CT_DELETE, CT_NEW], &body, |_| {}) {
            Ok(()) => ended += 1,
            Err(error) if error.downcast_ref() == Some(&Errno::ENOENT) => {}
            Err(error) => result = Err(error.context(format!("conntrack {flow}"))),
        }
    }
    (ended, result)
}

/// An `nfgenmsg` for IPv4.
fn header() -> Vec<u8> {
    let mut header = vec![0; NFGENMSG];
    header[0] = AddressFamily::Inet as u8;
    header
}

impl Flow {
    /// The connection of a protocol with these two directions, without mark and unanswered.
    pub fn new(protocol: u8, original: Tuple, reply: Tuple) -> Self {
        Self {
            protocol,
            original,
            reply,
            is_replied: false,
            tcp: None,
            timeout: 0,
            mark: 0,
            bytes: None,
            icmp: None,
            key: Vec::new(),
        }
    }

    /// The first packet, for [`crate::model::forward::Forward::takes`].
    pub fn asked(&self) -> Asked {
        Asked {
            source: Some(self.original.source),
            destination: Some(self.original.destination),
            protocol: self.protocol,
            port: self.original.ports.map(|(_, destination)| destination),
        }
    }
}

/// Parses the body of a message about a connection. None if it is not one of IPv4.
fn flow(body: &[u8]) -> Option<Flow> {
    let (mut original, mut reply, mut icmp, mut status) = (None, None, None, 0);
    let (mut mark, mut counters, mut key) = (0, [None; 2], Vec::new());
    let (mut timeout, mut tcp_state) = (0, None);
    for (kind, value) in attributes(body, NFGENMSG) {
        match kind {
            CTA_TUPLE_ORIG => {
                original = tuple(value);
                icmp = icmp_of(value);
                key.extend(nest(kind, value));
            }
            CTA_TUPLE_REPLY => reply = tuple(value),
            CTA_ID | CTA_ZONE => key.extend(encode(kind, value)),
            CTA_STATUS => status = u32_be_at(value, 0)?,
            CTA_MARK => mark = u32_be_at(value, 0)?,
            CTA_TIMEOUT => timeout = u32_be_at(value, 0)?,
            CTA_PROTOINFO => {
                let tcp = attribute(value, 0, CTA_PROTOINFO_TCP);
                let state = tcp.and_then(|tcp| attribute(tcp, 0, CTA_PROTOINFO_TCP_STATE));
                tcp_state = state.and_then(|state| state.first().copied());
            }
            CTA_COUNTERS_ORIG => counters[0] = bytes(value),
            CTA_COUNTERS_REPLY => counters[1] = bytes(value),
            _ => {}
        }
    }
    let ((protocol, original), (_, reply)) = (original?, reply?);
    Some(Flow {
        protocol,
        original,
        reply,
        is_replied: status & IPS_SEEN_REPLY != 0,
        tcp: tcp_state.map(TcpState),
        timeout,
        mark,
        bytes: counters[0].zip(counters[1]).map(|(one, other)| one + other),
        icmp,
        key,
    })
}

/// The protocol's number, and the addresses and ports of a direction.
fn tuple(value: &[u8]) -> Option<(u8, Tuple)> {
    let (ip, proto) = (
        attribute(value, 0, CTA_TUPLE_IP)?,
        attribute(value, 0, CTA_TUPLE_PROTO)?,
    );
    let port = |kind| u16_be_at(attribute(proto, 0, kind)?, 0);
    let tuple = Tuple {
        source: ipv4(attribute(ip, 0, CTA_IP_V4_SRC)?)?,
        destination: ipv4(attribute(ip, 0, CTA_IP_V4_DST)?)?,
        ports: port(CTA_PROTO_SRC_PORT).zip(port(CTA_PROTO_DST_PORT)),
    };
    Some((*attribute(proto, 0, CTA_PROTO_NUM)?.first()?, tuple))
}

/// `type`, `code` and `id` of ICMP.
fn icmp_of(value: &[u8]) -> Option<(u8, u8, u16)> {
    let proto = attribute(value, 0, CTA_TUPLE_PROTO)?;
    let byte = |kind| attribute(proto, 0, kind)?.first().copied();
    Some((
        byte(CTA_PROTO_ICMP_TYPE)?,
        byte(CTA_PROTO_ICMP_CODE)?,
        u16_be_at(attribute(proto, 0, CTA_PROTO_ICMP_ID)?, 0)?,
    ))
}

/// The bytes that a direction has had.
fn bytes(value: &[u8]) -> Option<u64> {
    let bytes = attribute(value, 0, CTA_COUNTERS_BYTES)?;
    Some(u64::from_be_bytes(bytes.try_into().ok()?))
}

/// The arguments of conntrack(8) that delete it: `-D -p udp -s … -d … -r … -q … --sport … --dport …`.
impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tuple {
            source,
            destination,
            ports,
        } = self.original;
        match Protocol::by_number(self.protocol) {
            Some(protocol) => write!(f, "-D -p {protocol}")?,
            None => write!(f, "-D -p {}", self.protocol)?,
        }
        write!(
            f,
            " -s {source} -d {destination} -r {} -q {}",
            self.reply.source, self.reply.destination
        )?;
        if let Some((source, destination)) = ports {
            write!(f, " --sport {source} --dport {destination}")?;
        }
        if let Some((kind, code, id)) = self.icmp {
            write!(f, " --icmp-type {kind} --icmp-code {code} --icmp-id {id}")?;
        }
        match self.zone() {
            0 => Ok(()),
            zone => write!(f, " --zone {zone}"),
        }
    }
}

impl Flow {
    /// The conntrack zone (iptables-extensions(8), CT).
    fn zone(&self) -> u16 {
        let zone = attribute(&self.key, 0, CTA_ZONE).and_then(|value| u16_be_at(value, 0));
        zone.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(
            attributes in vec((0..30_u16, vec(any::<u8>(), 0..40)), 0..8),
            cut in 0..300_usize,
        ) {
            let mut body = header();
            body.extend(attributes.iter().flat_map(|(kind, value)| encode(*kind, value)));
            body.truncate(cut);
            let _ = flow(&body).map(|flow| flow.to_string());
        }
    }
}
