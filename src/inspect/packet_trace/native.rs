//! Rules of nftables that are not iptables' own, translated into the terms of the evaluator (nft(8)). What is not known here
//! becomes [`Selector::Unknown`] or [`Target::Undecided`].

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::rc::Rc;

use ipnetwork::Ipv4Network;
use serde_json::Value;

use super::Hook;
use super::ruleset::{
    Chains, MarkAction, Match, Selector, Side, Target, TracedChain, TracedRule, with_effects,
};
use crate::kernel::iptables_save::Ruleset;
use crate::kernel::nftables::{self, Base, Nftables, Table, only};
use crate::model::forward::{PortRange, Protocol};
use crate::model::route::FwMark;

/// A table of nftables that IPv4 packets pass.
#[derive(Clone, Debug)]
pub struct NativeTable {
    /// `inet filter`
    pub name: Rc<str>,
    pub chains: Chains,
    pub bases: Vec<NativeBase>,
}

/// A chain that the kernel asks by itself.
#[derive(Clone, Debug)]
pub struct NativeBase {
    pub hook: Hook,
    pub priority: i32,
    pub is_nat: bool,
    pub chain: String,
}

/// Ahead of all others: chains at the device itself.
const INGRESS: i32 = i32::MIN;
const EGRESS: i32 = i32::MAX;

impl NativeTable {
    /// Those of a listing, without the chains that iptables-nft lists.
    pub fn all(nftables: &Nftables, listed: Option<&Ruleset>) -> Vec<Self> {
        let tables = nftables.tables.iter();
        let native = tables.filter_map(|((family, name), table)| {
            let is_passed = matches!(&family[..], "ip" | "inet" | "netdev");
            let listed = listed.filter(|_| family == "ip");
            let listed = listed.and_then(|listed| listed.tables.get(name));
            let bases: Vec<NativeBase> = table
                .chains
                .iter()
                .filter(|(chain, _)| listed.is_none_or(|listed| !listed.contains_key(*chain)))
                .filter_map(|(chain, it)| base(chain, it.base.as_ref()?))
                .collect();
            (is_passed && !bases.is_empty()).then(|| Self {
                name: format!("{family} {name}").into(),
                chains: chains(table),
                bases,
            })
        });
        native.collect()
    }
}

fn base(chain: &str, base: &Base) -> Option<NativeBase> {
    let (hook, priority) = match &base.hook[..] {
        "prerouting" => (Hook::Prerouting, base.priority),
        "input" => (Hook::Input, base.priority),
        "forward" => (Hook::Forward, base.priority),
        "output" => (Hook::Output, base.priority),
        "postrouting" => (Hook::Postrouting, base.priority),
        "ingress" => (Hook::Prerouting, INGRESS),
        "egress" => (Hook::Postrouting, EGRESS),
        _ => return None,
    };
    Some(NativeBase {
        hook,
        priority,
        is_nat: base.kind == "nat",
        chain: chain.to_owned(),
    })
}

fn chains(table: &Table) -> Chains {
    let chains = table.chains.iter().map(|(name, chain)| {
        let policy = chain.base.as_ref().map(|base| match base.drops {
            true => "policy drop",
            false => "policy accept",
        });
        let rules = chain.rules.iter().flat_map(|rule| {
            let mut rules = Reader { table }.rules(rule);
            if let Some(base) = &chain.base {
                let on_device = device(base);
                rules
                    .iter_mut()
                    .for_each(|it| it.matches.extend(on_device.clone()));
            }
            rules
        });
        let traced = TracedChain::new(name, policy, rules.collect());
        (name.clone(), traced)
    });
    with_effects(chains.collect::<BTreeMap<_, _>>())
}

/// The condition that a packet comes in, or leaves, by the device of an ingress or egress chain.
fn device(base: &Base) -> Option<Match> {
    let selectors = |new: fn(String) -> Selector| base.devices.iter().cloned().map(new).collect();
    let any = match &base.hook[..] {
        // nft 1.0.6 does not tell the device in JSON.
        "ingress" | "egress" if base.devices.is_empty() => Selector::Unknown,
        "ingress" => Selector::Any(selectors(Selector::InInterface)),
        "egress" => Selector::Any(selectors(Selector::OutInterface)),
        _ => return None,
    };
    Some(Match::of(any))
}

/// Reads the rules of a table, with its named sets.
struct Reader<'a> {
    table: &'a Table,
}

impl Reader<'_> {
    /// A rule of nftables as rules of the evaluator: those of a verdict map are one for each of its elements.
    fn rules(&self, rule: &nftables::Rule) -> Vec<TracedRule> {
        let text: Rc<str> = nftables::text(&rule.expressions).into();
        let mut packets = None;
        let mut matches: Vec<Match> = Vec::new();
        let mut targets = Vec::new();
        let mut rules = Vec::new();
        let new = |packets, matches: &[Match], targets: Vec<Target>| TracedRule {
            number: Some(rule.handle),
            packets,
            text: Rc::clone(&text),
            matches: matches.to_vec(),
            targets,
        };
        for expression in &rule.expressions {
            let Some((kind, body)) = only(expression) else {
                targets.push(Target::Undecided);
                continue;
            };
            match kind {
                "match" => matches.push(self.matching(body)),
                "counter" => packets = body.get("packets").and_then(Value::as_u64),
                "limit" | "quota" => matches.push(Match::of(Selector::Unknown)),
                "vmap" => {
                    let (key, data) = (body.get("key"), body.get("data"));
                    for element in data.map(|data| self.elements(data)).unwrap_or_default() {
                        let pair = element.as_array().map(Vec::as_slice).unwrap_or_default();
                        let [value, verdict] = pair else { continue };
                        let one = key.and_then(|key| self.selector(key, value));
                        let mut matches = matches.clone();
                        matches.push(Match::of(one.unwrap_or(Selector::Unknown)));
                        let target = only(verdict).map(|(kind, body)| target(kind, body));
                        let target = target.unwrap_or(Target::Undecided);
                        rules.push(new(packets, &matches, vec![target]));
                    }
                }
                _ => targets.push(target(kind, body)),
            }
        }
        if !targets.is_empty() {
            rules.push(new(packets, &matches, targets));
        }
        rules
    }

    fn matching(&self, body: &Value) -> Match {
        let (left, right) = (body.get("left"), body.get("right"));
        let selector = left
            .zip(right)
            .and_then(|(left, right)| self.selector(left, right));
        let is_negated = match body.get("op").and_then(Value::as_str) {
            Some("==" | "in") | None => false,
            Some("!=") => true,
            // Orders are for what is not known here anyway.
            Some(_) => return Match::of(Selector::Unknown),
        };
        Match {
            is_negated,
            selector: selector.unwrap_or(Selector::Unknown),
        }
    }

    /// The elements of an anonymous set or map, or of a named one; those of a list; or the value itself.
    fn elements(&self, value: &Value) -> Vec<Value> {
        let named = value.as_str().and_then(|name| name.strip_prefix('@'));
        let set = value.get("set");
        match (named, set.unwrap_or(value)) {
            (Some(name), _) => self.table.sets.get(name).cloned().unwrap_or_default(),
            (None, Value::Array(items)) => items.clone(),
            (None, one) => vec![one.clone()],
        }
    }

    /// What a key asks for with this value: one, or one of a set. None if that is not known here.
    fn selector(&self, key: &Value, value: &Value) -> Option<Selector> {
        let unnamed = |element: Value| match element.get("elem").and_then(|it| it.get("val")) {
            Some(value) => value.clone(),
            None => element,
        };
        let elements = self.elements(value).into_iter().map(unnamed);
        let each: Option<Vec<Selector>> = elements.map(|value| one(key, &value)).collect();
        let mut each = each?;
        match each.len() {
            1 => each.pop(),
            _ => Some(Selector::Any(each)),
        }
    }
}

/// What a key asks for with a single value.
fn one(key: &Value, value: &Value) -> Option<Selector> {
    let (kind, body) = only(key)?;
    let word = |name: &str| body.get(name).and_then(Value::as_str).unwrap_or_default();
    Some(match (kind, word("protocol"), word("field"), word("key")) {
        ("payload", "ip", "saddr", _) => address(Side::Source, value)?,
        ("payload", "ip", "daddr", _) => address(Side::Destination, value)?,
        ("payload", "ip", "protocol", _) | ("meta", _, _, "l4proto") => protocol(value)?,
        ("meta", _, _, "nfproto") => Selector::IsIpv4(value.as_str()? == "ipv4"),
        ("payload", "tcp" | "udp" | "sctp" | "th", "sport", _) => with_protocol(
            word("protocol"),
            Selector::Port(Side::Source, ports(value)?),
        ),
        ("payload", "tcp" | "udp" | "sctp" | "th", "dport", _) => {
            let port = Selector::Port(Side::Destination, ports(value)?);
            with_protocol(word("protocol"), port)
        }
        ("payload", "icmp", "type", _) => {
            let kind = match value {
                Value::String(name) if name == "echo-request" => 8,
                Value::String(name) if name == "echo-reply" => 0,
                other => other.as_u64()?.try_into().ok()?,
            };
            with_protocol("icmp", Selector::IcmpType(Some(kind)))
        }
        ("meta", _, _, "iifname" | "iif") => Selector::InInterface(interface(value)?),
        ("meta", _, _, "oifname" | "oif") => Selector::OutInterface(interface(value)?),
        ("meta", _, _, "mark") => Selector::Mark(exactly(value)?),
        ("meta", _, _, "pkttype") => match value.as_str()? {
            "host" | "unicast" => Selector::IsUnicast(true),
            _ => Selector::IsUnicast(false),
        },
        ("ct", _, _, "mark") => Selector::ConnectionMark(exactly(value)?),
        ("ct", _, _, "state") => Selector::State(vec![value.as_str()?.to_uppercase()]),
        ("ct", _, _, "status") => match value.as_str()? {
            status @ ("dnat" | "snat") => Selector::State(vec![status.to_uppercase()]),
            _ => return None,
        },
        ("ct", _, _, "direction") => Selector::IsReply(value.as_str()? == "reply"),
        ("ct", _, _, "ip saddr" | "saddr") if word("dir") == "original" => {
            address(Side::OriginalSource, value)?
        }
        ("ct", _, _, "ip daddr" | "daddr") if word("dir") == "original" => {
            address(Side::OriginalDestination, value)?
        }
        ("ct", _, _, "proto-dst") if word("dir") == "original" => {
            Selector::Port(Side::OriginalDestination, ports(value)?)
        }
        ("fib", ..) if word("result") == "type" => {
            let side = match body.get("flags").map(words)?.join(",").as_str() {
                "daddr" => Side::Destination,
                "saddr" => Side::Source,
                _ => return None,
            };
            Selector::AddressType(side, vec![value.as_str()?.to_uppercase()])
        }
        // A mark under a mask.
        ("&", ..) => {
            let [key, mask] = body.as_array()?.as_slice() else {
                return None;
            };
            let mark = FwMark {
                value: number(value)?,
                mask: number(mask)?,
            };
            match one(key, value)? {
                Selector::Mark(_) => Selector::Mark(mark),
                Selector::ConnectionMark(_) => Selector::ConnectionMark(mark),
                _ => return None,
            }
        }
        _ => return None,
    })
}

/// The words of a list, or of one string.
fn words(value: &Value) -> Vec<String> {
    let of = |value: &Value| value.as_str().map(str::to_owned);
    match value {
        Value::Array(items) => items.iter().filter_map(of).collect(),
        one => of(one).into_iter().collect(),
    }
}

fn number(value: &Value) -> Option<u32> {
    value.as_u64()?.try_into().ok()
}

fn exactly(value: &Value) -> Option<FwMark> {
    let value = number(value)?;
    let mask = u32::MAX;
    Some(FwMark { value, mask })
}

/// nft's wildcard is `*`, that of iptables `+`.
fn interface(value: &Value) -> Option<String> {
    let name = value.as_str()?;
    Some(match name.strip_suffix('*') {
        Some(start) => format!("{start}+"),
        None => name.to_owned(),
    })
}

/// `"192.0.2.9"`, `{"prefix": …}`, `{"range": […]}`
fn address(side: Side, value: &Value) -> Option<Selector> {
    let parse = |value: &Value| value.as_str()?.parse::<Ipv4Addr>().ok();
    let (first, last) = match only(value) {
        None => (parse(value)?, parse(value)?),
        Some(("prefix", body)) => {
            let length = body.get("len")?.as_u64()?.try_into().ok()?;
            let network = Ipv4Network::new(parse(body.get("addr")?)?, length).ok()?;
            (network.network(), network.broadcast())
        }
        Some(("range", body)) => (parse(body.get(0)?)?, parse(body.get(1)?)?),
        Some(_) => return None,
    };
    Some(Selector::Address(side, first, last))
}

/// `80`, `{"range": [8000, 8010]}`
fn ports(value: &Value) -> Option<Vec<PortRange>> {
    let port = |value: &Value| value.as_u64()?.try_into().ok();
    let (first, last) = match only(value) {
        None => (port(value)?, port(value)?),
        Some(("range", body)) => (port(body.get(0)?)?, port(body.get(1)?)?),
        Some(_) => return None,
    };
    Some(vec![PortRange { first, last }])
}

fn protocol(value: &Value) -> Option<Selector> {
    Some(Selector::Protocol(match value {
        Value::String(name) => Protocol::parse(name),
        other => Protocol::by_number(other.as_u64()?.try_into().ok()?),
    }))
}

/// A port of TCP is none of UDP.
fn with_protocol(name: &str, selector: Selector) -> Selector {
    match Protocol::parse(name) {
        Some(protocol) => {
            let protocol = Selector::Protocol(Some(protocol));
            Selector::All(vec![protocol, selector])
        }
        None => selector,
    }
}

/// A statement that is no condition.
fn target(kind: &str, body: &Value) -> Target {
    let named = || {
        body.get("target")
            .and_then(Value::as_str)
            .map(str::to_owned)
    };
    let address = || body.get("addr").and_then(Value::as_str)?.parse().ok();
    let port = || body.get("port").and_then(Value::as_u64)?.try_into().ok();
    match kind {
        "accept" => Target::Accept,
        "drop" | "reject" => Target::Stop,
        "return" => Target::Return,
        "jump" => named().map_or(Target::Undecided, Target::Jump),
        "goto" => named().map_or(Target::Undecided, Target::Goto),
        "notrack" => Target::Notrack,
        "masquerade" => Target::Masquerade,
        "redirect" => Target::Redirect(port()),
        "dnat" => Target::DestinationNat(address(), port()),
        "snat" => Target::SourceNat(address()),
        "mangle" => set_mark(body),
        "continue" | "log" | "meter" | "set" | "ct helper" | "ct timeout" | "flow" => {
            Target::Continue
        }
        _ => Target::Undecided,
    }
}

/// `meta mark set …`, `ct mark set …`; what else is set decides about no packet here.
fn set_mark(body: &Value) -> Target {
    let (key, value) = (body.get("key"), body.get("value"));
    let is_of = |key: Option<&Value>, kind: &str| {
        let mark = key.and_then(|key| key.get(kind)?.get("key")?.as_str());
        mark == Some("mark")
    };
    let of_packet = is_of(key, "meta");
    if !of_packet && !is_of(key, "ct") {
        return Target::Continue;
    }
    let other = if of_packet { "ct" } else { "meta" };
    if is_of(value, other) {
        return Target::Mark(match of_packet {
            true => MarkAction::Restore(u32::MAX, u32::MAX),
            false => MarkAction::Save(u32::MAX, u32::MAX),
        });
    }
    let own = if of_packet { "meta" } else { "ct" };
    let mark = value.and_then(|value| changed(value, own));
    mark.map_or(Target::Undecided, |mark| {
        Target::Mark(match of_packet {
            true => MarkAction::SetPacket(mark),
            false => MarkAction::SetConnection(mark),
        })
    })
}

/// What becomes of a mark: the bits of the mask are cleared, then those of the value flipped. `own` is the kind of the mark
/// that is changed.
fn changed(value: &Value, own: &str) -> Option<FwMark> {
    let Some((kind, body)) = only(value) else {
        return exactly(value);
    };
    if kind == own && body.get("key").and_then(Value::as_str) == Some("mark") {
        return Some(FwMark { value: 0, mask: 0 });
    }
    let before = changed(body.get(0)?, own)?;
    let bits = number(body.get(1)?)?;
    Some(match kind {
        "&" => FwMark {
            value: before.value & bits,
            mask: before.mask | !bits,
        },
        "|" => FwMark {
            value: before.value & !bits | bits,
            mask: before.mask | bits,
        },
        "^" => FwMark {
            value: before.value ^ bits,
            mask: before.mask,
        },
        _ => return None,
    })
}
