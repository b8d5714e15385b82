//! Text of conntrack(8): parses its listing, and writes the arguments that delete connections.

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;

use crate::model::forward::Asked;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The protocol's name, as conntrack prints it.
    pub protocol: String,
    pub number: u8,
    /// The addresses and ports of the first packet, before NAT.
    pub original: Tuple,
    /// The addresses and ports of the replies that conntrack expects: those after NAT, reversed.
    pub reply: Tuple,
    /// Whether there were packets in both directions.
    pub is_replied: bool,
    /// The connection mark, with the bits of everybody.
    pub mark: u32,
    /// The bytes of both directions. None unless the kernel counts them (`nf_conntrack_acct`,
    /// Documentation/networking/nf_conntrack-sysctl.rst).
    pub bytes: Option<u64>,
    /// `type`, `code` and `id` of ICMP.
    icmp: Option<[u16; 3]>,
}

/// One direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple {
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    /// The source and destination port. None if the protocol has no ports.
    pub ports: Option<(u16, u16)>,
}

/// Parses the output of `conntrack -L`. Skips a line that is not a flow of IPv4.
pub fn parse(listing: &str) -> Vec<Flow> {
    listing.lines().filter_map(flow).collect()
}

/// The lines of conntrack's arguments that delete the stale flows of these and no other ones. For each line, conntrack
/// dumps the whole table. So one line deletes all flows that differ only by their source, if all of them are stale.
pub fn deletions(flows: &[Flow], stale: &[&Flow]) -> Vec<String> {
    let key = |flow: &Flow| {
        (
            flow.number,
            flow.original.destination,
            ports(flow),
            flow.reply.source,
        )
    };
    let mut groups = BTreeMap::new();
    for flow in stale {
        groups.entry(key(flow)).or_insert_with(Vec::new).push(*flow);
    }
    let mut all = BTreeMap::new();
    for flow in flows {
        *all.entry(key(flow)).or_insert(0) += 1;
    }
    let lines = groups.into_iter().flat_map(|(key, group)| {
        if group.len() == 1 || all.get(&key) != Some(&group.len()) || group[0].icmp.is_some() {
            return group.iter().map(ToString::to_string).collect();
        }
        let Flow {
            original, reply, ..
        } = group[0];
        let mut line = format!(
            "-D -p {} -d {} -r {}",
            group[0].name(),
            original.destination,
            reply.source
        );
        if let Some((requested, replying)) = ports(group[0]) {
            line += &format!(" --dport {requested} --reply-port-src {replying}");
        }
        vec![line]
    });
    lines.collect()
}

/// The port that the first packet was for, and the port that replies come from.
fn ports(flow: &Flow) -> Option<(u16, u16)> {
    Some((flow.original.ports?.1, flow.reply.ports?.0))
}

impl Flow {
    /// The first packet, for [`crate::model::forward::Forward::takes`].
    pub fn asked(&self) -> Asked {
        Asked {
            source: Some(self.original.source),
            protocol: self.number,
            port: self.original.ports.map(|(_, destination)| destination),
        }
    }

    /// The protocol as an argument of `conntrack -p`.
    fn name(&self) -> String {
        match self.protocol.as_str() {
            "unknown" => self.number.to_string(),
            name => name.to_owned(),
        }
    }
}

/// `udp 17 29 src=192.0.2.9 dst=203.0.113.10 sport=4000 dport=80 [UNREPLIED] src=192.168.0.2 … mark=10 use=1`
fn flow(line: &str) -> Option<Flow> {
    let mut words = line.split_ascii_whitespace();
    let (protocol, number) = (words.next()?.to_owned(), words.next()?.parse().ok()?);
    let pairs: Vec<(&str, &str)> = words.filter_map(|word| word.split_once('=')).collect();
    // The original direction comes first, then the reply direction.
    let value_of = |key: &str, index: usize| {
        pairs
            .iter()
            .filter(|(name, _)| *name == key)
            .nth(index)
            .map(|(_, value)| *value)
    };
    let tuple = |index| {
        let ports = value_of("sport", index).zip(value_of("dport", index));
        let ports = ports.and_then(|(source, destination)| {
            Some((source.parse().ok()?, destination.parse().ok()?))
        });
        Some(Tuple {
            source: value_of("src", index)?.parse().ok()?,
            destination: value_of("dst", index)?.parse().ok()?,
            ports,
        })
    };
    let icmp_field = |key| value_of(key, 0)?.parse().ok();
    let bytes = [0, 1].map(|index| value_of("bytes", index)?.parse::<u64>().ok());
    let icmp = icmp_field("type")
        .zip(icmp_field("code"))
        .zip(icmp_field("id"));
    Some(Flow {
        original: tuple(0)?,
        reply: tuple(1)?,
        mark: value_of("mark", 0)
            .and_then(|mark| mark.parse().ok())
            .unwrap_or(0),
        is_replied: !line.contains("[UNREPLIED]"),
        bytes: bytes[0]
            .zip(bytes[1])
            .map(|(original, reply): (u64, u64)| original.saturating_add(reply)),
        icmp: icmp.map(|((kind, code), id)| [kind, code, id]),
        protocol,
        number,
    })
}

/// The arguments that delete only this flow: `-D -p udp -s … -d … --sport … --dport …`.
impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tuple {
            source,
            destination,
            ports,
        } = self.original;
        write!(f, "-D -p {}", self.name())?;
        write!(
            f,
            " -s {source} -d {destination} -r {} -q {}",
            self.reply.source, self.reply.destination
        )?;
        if let Some((source, destination)) = ports {
            write!(f, " --sport {source} --dport {destination}")?;
        }
        if let Some([kind, code, id]) = self.icmp {
            write!(f, " --icmp-type {kind} --icmp-code {code} --icmp-id {id}")?;
        }
        Ok(())
    }
}
