//! An uplink's forwards as chains of the nat table, and back. Pure.
//!
//! A new connection is matched against each rule of a chain in turn. A few forwards are rules of the uplink's own chain, in
//! the order of the file. Of many, those within the same hundred ports are rules of a subchain:
//!
//! ```text
//! -A mh-isp0 -p tcp -m tcp --dport 20000:20099 -j mh-isp0.tcp20000
//! -A mh-isp0.tcp20000 -p tcp -m tcp --dport 20001 -j DNAT --to-destination 192.168.0.2
//! ```

use std::collections::BTreeMap;
use std::fmt::Write;
use std::rc::Rc;

use ipnetwork::Ipv4Network;

use crate::config::Config;
use crate::model::forward::{Forward, PortRange, Protocol};
use crate::model::names::UplinkName;
use crate::model::netfilter::{Rule, Rules, UplinkTable};

/// Up to this many rules, all are in the uplink's own chain.
const FEW: usize = 100;

/// How many ports share a subchain.
const PORTS: u16 = 100;

/// The ports that share a subchain: their protocol, and the first port.
type Block = (Protocol, u16);

/// The chains of one uplink, by their names: its own, and those below it.
pub type Chains = BTreeMap<String, Rules>;

/// The chains of several uplinks.
pub type AllChains = BTreeMap<UplinkName, Chains>;

/// The chains of all configured uplinks.
pub fn all_chains(config: &Config) -> AllChains {
    let uplinks = config.uplinks.iter();
    uplinks
        .map(|(name, uplink)| (name.clone(), chains(name, &uplink.forwards)))
        .collect()
}

/// The uplink's own chain and those below it, by their names.
pub fn chains(uplink: &UplinkName, forwards: &[Forward]) -> Chains {
    let rules = forwards.iter().flat_map(|forward| {
        rules(forward).map(move |(protocol, rule)| (protocol, block(protocol, forward), rule))
    });
    let rules: Vec<_> = rules.collect();
    let are_few = rules.len() <= FEW;
    let mut lines: Vec<(Option<Block>, Vec<Rule>)> = Vec::new();
    // The line of each block. None once a rule outside of blocks may match the block's packets, too: the block's later rules
    // must stay after it, since of two rules that match the first one decides.
    let mut blocks: BTreeMap<Block, Option<usize>> = BTreeMap::new();
    for (protocol, block, rule) in rules {
        let block = block.filter(|_| !are_few);
        let place = block.map(|block| *blocks.entry(block).or_insert(Some(lines.len())));
        match place {
            Some(Some(index)) if index < lines.len() => lines[index].1.push(rule),
            Some(Some(_)) => lines.push((block, vec![rule])),
            Some(None) => lines.push((None, vec![rule])),
            None => {
                for ((of, _), place) in &mut blocks {
                    if protocol.is_none_or(|protocol| protocol == *of) {
                        *place = None;
                    }
                }
                lines.push((None, vec![rule]));
            }
        }
    }
    let mut own = Vec::with_capacity(lines.len());
    let mut chains = BTreeMap::new();
    for (block, rules) in lines {
        match block {
            Some((protocol, first)) if rules.len() > 1 => {
                let chain = uplink.subchain(&format!("{protocol}{first}"));
                own.push(jump(protocol, first, &chain));
                chains.insert(chain, Rc::new(rules));
            }
            _ => own.extend(rules),
        }
    }
    chains.insert(uplink.chain(), Rc::new(own));
    chains
}

/// The block that has all ports of a forward. With SCTP's name, of which nobody has many, the longest
/// name of a chain would be too long (`XT_EXTENSION_MAXNAMELEN`, linux/netfilter/x_tables.h).
fn block(protocol: Option<Protocol>, forward: &Forward) -> Option<Block> {
    let protocol = protocol.filter(|it| matches!(it, Protocol::Tcp | Protocol::Udp))?;
    let ports = forward.ports?;
    let first = ports.first / PORTS * PORTS;
    (ports.last / PORTS * PORTS == first).then_some((protocol, first))
}

/// `-p tcp -m tcp --dport 20000:20099 -j mh-isp0.tcp20000`
fn jump(protocol: Protocol, first: u16, chain: &str) -> Rule {
    let ports = PortRange {
        // No forward has port 0.
        first: first.max(1),
        last: first.saturating_add(PORTS - 1),
    };
    Rule(format!(
        "-p {protocol} -m {protocol} --dport {} -j {chain}",
        ports.by_colon()
    ))
}

/// The rules of one forward, with their protocols: one for each source and protocol.
///
/// `-s 198.51.100.0/24 -p tcp -m tcp --dport 2222 -j DNAT --to-destination 192.168.0.2:22`
pub fn rules(forward: &Forward) -> impl Iterator<Item = (Option<Protocol>, Rule)> {
    each(&forward.from).flat_map(move |source| {
        let protocols = each(&forward.protocols);
        protocols.map(move |protocol| (protocol.copied(), rule(source, protocol, forward)))
    })
}

/// Each item; or None once, which stands for all, if there are no items.
fn each<T>(items: &[T]) -> impl Iterator<Item = Option<&T>> {
    let none = items.is_empty().then_some(None);
    items.iter().map(Some).chain(none)
}

fn rule(source: Option<&Ipv4Network>, protocol: Option<&Protocol>, forward: &Forward) -> Rule {
    let mut spec = String::with_capacity(80);
    // Writing to a String can't fail.
    if let Some(source) = source {
        let _ = write!(spec, "-s {source} ");
    }
    if let Some(address) = forward.address {
        let _ = write!(spec, "-d {address}/32 ");
    }
    let _ = match (protocol, forward.ports) {
        (None, _) => Ok(()),
        // iptables knows its name from /etc/protocols only, which need not be there.
        (Some(Protocol::Gre), _) => write!(spec, "-p {} ", Protocol::Gre.number()),
        (Some(protocol), None) => write!(spec, "-p {protocol} "),
        (Some(protocol), Some(ports)) => {
            let ports = ports.by_colon();
            write!(spec, "-p {protocol} -m {protocol} --dport {ports} ")
        }
    };
    let _ = write!(spec, "-j DNAT --to-destination {}", forward.destination());
    Rule(spec)
}

/// The forward that a rule in an uplink's nat chain was written for, if it is of the form that we write.
pub fn parse(rule: &Rule) -> Option<Forward> {
    let destination = rule.value("--to-destination")?;
    let (to, to_port) = match destination.split_once(':') {
        Some((to, port)) => (to, Some(port.parse().ok()?)),
        None => (destination, None),
    };
    let to = Some(to).filter(|to| !to.is_empty());
    let address = rule
        .value("-d")
        .map(|address| address.trim_end_matches("/32"));
    let ports = match rule.value("--dport") {
        Some(text) => {
            let (first, last) = text.split_once(':').unwrap_or((text, text));
            Some(PortRange {
                first: first.parse().ok()?,
                last: last.parse().ok()?,
            })
        }
        None => None,
    };
    let from = rule.value("-s").into_iter();
    let from: Option<Vec<Ipv4Network>> = from.map(|source| source.parse().ok()).collect();
    let protocols = rule.value("-p").into_iter().map(Protocol::parse_rule);
    Some(Forward {
        protocols: protocols.collect::<Option<_>>()?,
        ports,
        address: address.map(str::parse).transpose().ok()?,
        to: to.map(str::parse).transpose().ok()?,
        to_port,
        from: from?,
    })
}

/// The rules of an uplink's nat chains, in the order in which a packet meets them.
pub fn in_order<'a>(uplink: &UplinkName, own: &'a UplinkTable) -> impl Iterator<Item = &'a Rule> {
    let first = own.chains.get(&uplink.chain());
    let rules = first.into_iter().flat_map(|rules| rules.iter());
    rules.flat_map(|rule| {
        let below = rule.value("-j").and_then(|target| own.chains.get(target));
        let (below, itself) = match below {
            Some(rules) => (rules.as_slice(), None),
            None => (&[][..], Some(rule)),
        };
        below.iter().chain(itself)
    })
}
