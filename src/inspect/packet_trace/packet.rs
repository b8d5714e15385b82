//! Packets and connections, as far as they are known.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result};

use crate::kernel::conntrack::Tuple;
use crate::model::forward::Protocol;

/// A packet on its way, or all packets that are alike in what is known here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    /// The interface that the packet came in by; none for one that the router sends.
    pub iif: Option<String>,
    /// The interface that the packet leaves by; none before routing.
    pub oif: Option<String>,
    /// The addresses and ports as they are at this point of the way.
    pub header: Header,
    pub mark: u32,
    /// Which of the connection's packets this is.
    pub position: Position,
}

/// A packet's addresses and ports. None where they are not known, or where the protocol has no ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub source: Option<Ipv4Addr>,
    pub destination: Option<Ipv4Addr>,
    pub source_port: Option<u16>,
    pub destination_port: Option<u16>,
}

impl Header {
    /// The header of the reply.
    pub fn reversed(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
        }
    }

    /// The reply to a packet that arrives with this header, as the receiver sends it.
    pub fn reply(self, iif: Option<String>) -> Packet {
        Packet {
            iif,
            header: self.reversed(),
            position: Position::Reply,
            ..Packet::default()
        }
    }

    /// The header of a packet whose addresses are known.
    /// Errors: an address is not known.
    pub fn tuple(self) -> Result<Tuple> {
        let destination = self.destination;
        Ok(Tuple {
            source: self.source.context("the packet's source is not known")?,
            destination: destination.context("the packet's destination is not known")?,
            ports: self.source_port.zip(self.destination_port),
        })
    }
}

/// A packet's place in its connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Position {
    #[default]
    First,
    Reply,
    /// A packet of the same direction as the first, after a reply.
    Later,
}

/// The connection that a packet belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Connection {
    /// None where it is not known.
    pub protocol: Option<Protocol>,
    /// The header of the first packet as it came in.
    pub original: Header,
    /// Whether the destination was translated.
    pub is_dnat: bool,
    /// Whether the source was translated.
    pub is_snat: bool,
    /// Whether a rule exempts the connection from tracking.
    pub is_untracked: bool,
    pub mark: u32,
}

impl Connection {
    /// The connection that this first packet begins.
    pub fn new(protocol: Option<Protocol>, original: Header) -> Self {
        Self {
            protocol,
            original,
            ..Self::default()
        }
    }
}
