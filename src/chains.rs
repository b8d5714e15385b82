//! An uplink's forwards as chains of the nat table. Pure.
//!
//! A new connection is held against each rule of a chain in turn. Few forwards stand in the uplink's own
//! chain, as they are written; of many, those that share a hundred ports stand in a chain below it:
//!
//! ```text
//! -A mh-isp0 -p tcp -m tcp --dport 20000:20099 -j mh-isp0.tcp20000
//! -A mh-isp0.tcp20000 -p tcp -m tcp --dport 20001 -j DNAT --to-destination 192.168.0.2
//! ```

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::rc::Rc;

use ipnetwork::Ipv4Network;

use crate::config::{Forward, Protocol};
use crate::state::{Rules, Rulespec, UplinkName};

/// As many rules as this are few.
const FEW: usize = 100;

/// How many ports share a chain.
const PORTS: u16 = 100;

/// The ports that share a chain: their protocol, and the first.
type Block = (Protocol, u16);

/// The uplink's own chain and those below it, by their names.
pub fn chains(uplink: &UplinkName, forwards: &[Forward]) -> BTreeMap<String, Rules> {
    let are_few = forwards.iter().map(cases).sum::<usize>() <= FEW;
    let mut lines: Vec<(Option<Block>, Vec<Rulespec>)> = Vec::new();
    // Where the rules of a block go; none where they stay behind a rule that may fit their packets, too:
    // of two that overlap the first has the packet.
    let mut blocks: BTreeMap<Block, Option<usize>> = BTreeMap::new();
    for forward in forwards {
        // Not by a loop, which would hand its iterator round for each of 10,000.
        dnat(forward).for_each(|(protocol, rule)| {
            let block = block(protocol, forward).filter(|_| !are_few);
            // Mostly the last one's, and nothing has come between: not looked up 10,000 times.
            if let Some((of, rules)) = lines.last_mut()
                && block.is_some()
                && *of == block
            {
                rules.push(rule);
                return;
            }
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
        });
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

/// How many rules a forward has: one for each source and protocol.
fn cases(forward: &Forward) -> usize {
    forward.from.len().max(1) * forward.protocols.len().max(1)
}

/// The block that has all ports of a forward. With SCTP's name, of which nobody has many, the longest
/// name of a chain would be too long (`XT_EXTENSION_MAXNAMELEN`, linux/netfilter/x_tables.h).
fn block(protocol: Option<Protocol>, forward: &Forward) -> Option<Block> {
    let protocol = protocol.filter(|it| matches!(it, Protocol::Tcp | Protocol::Udp))?;
    let ports = forward.ports.as_ref()?;
    let first = ports.start() / PORTS * PORTS;
    (ports.end() / PORTS * PORTS == first).then_some((protocol, first))
}

/// `-p tcp -m tcp --dport 20000:20099 -j mh-isp0.tcp20000`
fn jump(protocol: Protocol, first: u16, chain: &str) -> Rulespec {
    let last = first.saturating_add(PORTS - 1);
    // No forward has port 0.
    let first = first.max(1);
    Rulespec(format!(
        "-p {protocol} -m {protocol} --dport {first}:{last} -j {chain}"
    ))
}

/// The rules of one forward, with their protocols: one for each source and protocol.
///
/// `-s 198.51.100.0/24 -p tcp -m tcp --dport 2222 -j DNAT --to-destination 192.168.0.2:22`
pub fn dnat(forward: &Forward) -> impl Iterator<Item = (Option<Protocol>, Rulespec)> {
    each(&forward.from).flat_map(move |source| {
        let protocols = each(&forward.protocols);
        protocols.map(move |protocol| (protocol.copied(), rule(source, protocol, forward)))
    })
}

/// Each of them; of none, none once: that is all.
fn each<T>(items: &[T]) -> impl Iterator<Item = Option<&T>> {
    let none = items.is_empty().then_some(None);
    items.iter().map(Some).chain(none)
}

fn rule(source: Option<&Ipv4Network>, protocol: Option<&Protocol>, forward: &Forward) -> Rulespec {
    // In few pieces, byte by byte, and without std's formatting: there may be 10,000 of these.
    let mut spec = Vec::with_capacity(80);
    if let Some(source) = source {
        spec.extend_from_slice(b"-s ");
        push_address(&mut spec, source.ip());
        spec.push(b'/');
        push_number(&mut spec, source.prefix().into());
        spec.push(b' ');
    }
    match (protocol, &forward.ports) {
        (None, _) => {}
        // Its name is known to iptables from /etc/protocols only, which need not be there.
        (Some(Protocol::Gre), _) => {
            spec.extend_from_slice(format!("-p {} ", Protocol::Gre.number()).as_bytes());
        }
        (Some(protocol), None) => spec.extend_from_slice(format!("-p {protocol} ").as_bytes()),
        (Some(protocol), Some(ports)) => {
            match protocol {
                Protocol::Tcp => spec.extend_from_slice(b"-p tcp -m tcp --dport "),
                Protocol::Udp => spec.extend_from_slice(b"-p udp -m udp --dport "),
                other => {
                    let names = format!("-p {other} -m {other} --dport ");
                    spec.extend_from_slice(names.as_bytes());
                }
            }
            push_number(&mut spec, *ports.start());
            if ports.start() != ports.end() {
                spec.push(b':');
                push_number(&mut spec, *ports.end());
            }
            spec.push(b' ');
        }
    }
    spec.extend_from_slice(b"-j DNAT --to-destination ");
    push_address(&mut spec, forward.to);
    if let Some(port) = forward.to_port {
        spec.push(b':');
        push_number(&mut spec, port);
    }
    Rulespec(String::from_utf8(spec).expect("all of it is ASCII"))
}

fn push_address(text: &mut Vec<u8>, address: Ipv4Addr) {
    for (index, octet) in address.octets().into_iter().enumerate() {
        if index > 0 {
            text.push(b'.');
        }
        push_number(text, octet.into());
    }
}

fn push_number(text: &mut Vec<u8>, number: u16) {
    text.extend(itoa::Buffer::new().format(number).bytes());
}
