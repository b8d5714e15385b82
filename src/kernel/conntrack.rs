//! The language of conntrack, both directions: listing to flows, flows to what deletes them.

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;

use crate::model::forward::Asked;

/// A tracked connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The protocol's name, as conntrack prints it.
    pub protocol: String,
    /// The protocol's number.
    pub number: u8,
    /// As its first packet came.
    pub original: Tuple,
    /// As replies are expected: what NAT made of the other.
    pub reply: Tuple,
    /// Whether packets of both directions have been seen.
    pub is_replied: bool,
    /// Its mark, all bits.
    pub mark: u32,
    /// The bytes of both directions, where the kernel counted them (`nf_conntrack_acct`,
    /// Documentation/networking/nf_conntrack-sysctl.rst).
    pub bytes: Option<u64>,
    /// `type`, `code` and `id` of ICMP.
    icmp: Option<[u16; 3]>,
}

/// One direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple {
    /// Where it comes from.
    pub source: Ipv4Addr,
    /// Where it goes.
    pub destination: Ipv4Addr,
    /// The ports, source and destination, where the protocol has some.
    pub ports: Option<(u16, u16)>,
}

/// The flows that `conntrack -L` lists; a line that is none is passed over, since others' helpers
/// and zones add words of their own.
pub fn parse(listing: &str) -> Vec<Flow> {
    listing.lines().filter_map(flow).collect()
}

/// The arguments that delete the condemned of these flows and no other, a line each. Each line makes
/// conntrack list the whole table, so flows that differ by their source only share one, unless one
/// of these is to live.
pub fn deletions(flows: &[Flow], condemned: &[&Flow]) -> Vec<String> {
    let alike = |flow: &Flow| {
        (
            flow.number,
            flow.original.destination,
            ports(flow),
            flow.reply.source,
        )
    };
    let mut groups = BTreeMap::new();
    for flow in condemned {
        groups
            .entry(alike(flow))
            .or_insert_with(Vec::new)
            .push(*flow);
    }
    let mut all = BTreeMap::new();
    for flow in flows {
        *all.entry(alike(flow)).or_insert(0) += 1;
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
        if let Some((asked, answered)) = ports(group[0]) {
            line += &format!(" --dport {asked} --reply-port-src {answered}");
        }
        vec![line]
    });
    lines.collect()
}

/// The port that was asked for, and the one that answers.
fn ports(flow: &Flow) -> Option<(u16, u16)> {
    Some((flow.original.ports?.1, flow.reply.ports?.0))
}

impl Flow {
    /// What of its first packet decides whether a forward takes it.
    pub fn asked(&self) -> Asked {
        Asked {
            source: Some(self.original.source),
            protocol: self.number,
            port: self.original.ports.map(|(_, asked)| asked),
        }
    }

    /// The protocol as conntrack takes it.
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
    // What is said twice is said of the original direction first.
    let said = |key: &str, index: usize| {
        pairs
            .iter()
            .filter(|(name, _)| *name == key)
            .nth(index)
            .map(|(_, value)| *value)
    };
    let tuple = |index| {
        let ports = said("sport", index).zip(said("dport", index));
        let ports = ports.and_then(|(source, destination)| {
            Some((source.parse().ok()?, destination.parse().ok()?))
        });
        Some(Tuple {
            source: said("src", index)?.parse().ok()?,
            destination: said("dst", index)?.parse().ok()?,
            ports,
        })
    };
    let number_of = |key| said(key, 0)?.parse().ok();
    let bytes = [0, 1].map(|index| said("bytes", index)?.parse::<u64>().ok());
    let icmp = number_of("type")
        .zip(number_of("code"))
        .zip(number_of("id"));
    Some(Flow {
        original: tuple(0)?,
        reply: tuple(1)?,
        mark: said("mark", 0)
            .and_then(|mark| mark.parse().ok())
            .unwrap_or(0),
        is_replied: !line.contains("[UNREPLIED]"),
        bytes: bytes[0]
            .zip(bytes[1])
            .map(|(there, back): (u64, u64)| there.saturating_add(back)),
        icmp: icmp.map(|((kind, code), id)| [kind, code, id]),
        protocol,
        number,
    })
}

/// The arguments that delete this flow and no other: `-D -p udp -s … -d … --sport … --dport …`.
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
