//! The one reader of ip rules and routes, everybody's, by rtnetlink(7). Running `ip` would cost a process, and its output
//! differs between versions.

use std::fmt;
use std::net::Ipv4Addr;

use anyhow::{Context, Result};
use ipnetwork::Ipv4Network;
use nix::libc::{
    RTA_DST, RTA_GATEWAY, RTA_IIF, RTA_MARK, RTA_OIF, RTA_PREFSRC, RTA_PRIORITY, RTA_SRC,
    RTA_TABLE, RTM_GETROUTE, RTM_GETRULE, RTM_NEWROUTE, RTM_NEWRULE,
};
use nix::net::if_::if_indextoname;
use nix::sys::socket::{AddressFamily, SockProtocol};

use crate::kernel::netlink::{
    Socket, attribute, attributes, dump, encode, ipv4, text, u16_at, u32_at,
};
use crate::model::forward::PortRange;
use crate::model::route::{
    FwMark, NOT, PROTOCOL, Route, RouteKind, RouteRule, RuleAction, TableId,
};

// linux/rtnetlink.h
/// The bytes of an `rtmsg`: family, lengths of destination and source, TOS, table, protocol, scope, type, flags.
const ROUTE: usize = 12;
const RTNH_F_ONLINK: u32 = 4;

// linux/fib_rules.h
/// The bytes of a `fib_rule_hdr`: family, lengths of destination and source, TOS, table, two reserved, action, flags.
const RULE: usize = 12;
const FIB_RULE_INVERT: u32 = 2;
const FR_ACT_TO_TBL: u8 = 1;
const FR_ACT_BLACKHOLE: u8 = 6;
const FR_ACT_UNREACHABLE: u8 = 7;
const FR_ACT_PROHIBIT: u8 = 8;
const FRA_DST: u16 = 1;
const FRA_SRC: u16 = 2;
const FRA_IIFNAME: u16 = 3;
const FRA_GOTO: u16 = 4;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_SUPPRESS_PREFIXLEN: u16 = 14;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FRA_OIFNAME: u16 = 17;
const FRA_UID_RANGE: u16 = 20;
const FRA_PROTOCOL: u16 = 21;
const FRA_IP_PROTO: u16 = 22;
const FRA_SPORT_RANGE: u16 = 23;
const FRA_DPORT_RANGE: u16 = 24;

/// Whose routes to dump. A router with a full BGP table has a million of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// Those with our protocol number.
    Ours,
    Everybodys,
}

/// The ip rules and routes, in the kernel's order.
#[derive(Clone, Debug, Default)]
pub struct RoutingDump {
    pub rules: Vec<RouteRule>,
    pub routes: Vec<Route>,
}

impl RoutingDump {
    /// Dumps everybody's rules, and ours or everybody's routes.
    /// Errors: a dump fails, or has an entry that can't be parsed.
    pub fn read(whose: Whose) -> Result<Self> {
        Ok(Self {
            rules: rules()?,
            routes: routes(whose)?,
        })
    }
}

/// The interface by which a packet leaves that has come in from this source, with this mark. None if the kernel would not
/// route it, or keep it for itself.
pub fn leaves_by(source: Ipv4Addr, destination: Ipv4Addr, mark: u32) -> Option<String> {
    let mut socket = Socket::open(SockProtocol::NetlinkRoute).ok()?;
    let comes_by = route_to(&mut socket, source, [0, 32], &[])?;
    let selectors = [
        encode(RTA_SRC, &source.octets()),
        encode(RTA_IIF, &comes_by.to_ne_bytes()),
        encode(RTA_MARK, &mark.to_ne_bytes()),
    ];
    let index = route_to(&mut socket, destination, [32, 32], &selectors.concat())?;
    Some(text(if_indextoname(index).ok()?.as_bytes()))
}

/// The index of the interface that the route to a destination leads to, of a packet with these selectors. `lengths` are those
/// of the source's and the destination's prefix, in bits.
fn route_to(
    socket: &mut Socket,
    destination: Ipv4Addr,
    [source_length, length]: [u8; 2],
    selectors: &[u8],
) -> Option<u32> {
    let mut request = vec![0; ROUTE];
    request[..3].copy_from_slice(&[AddressFamily::Inet as u8, length, source_length]);
    request.extend(encode(RTA_DST, &destination.octets()));
    request.extend(selectors);
    let mut index = None;
    let answer = socket.ask([RTM_GETROUTE, RTM_NEWROUTE], &request, |body| {
        index = attribute(body, ROUTE, RTA_OIF).and_then(|value| u32_at(value, 0));
    });
    answer.ok().and(index)
}

fn rules() -> Result<Vec<RouteRule>> {
    let protocol = SockProtocol::NetlinkRoute;
    let all = dump(protocol, [RTM_GETRULE, RTM_NEWRULE], &mut [0; RULE]).context(
        "dump the ip rules (netlink), for which the kernel needs CONFIG_IP_MULTIPLE_TABLES",
    )?;
    all.iter()
        .map(|body| rule(body).with_context(|| format!("parse an ip rule: {body:02x?}")))
        .collect()
}

fn routes(whose: Whose) -> Result<Vec<Route>> {
    let protocol = SockProtocol::NetlinkRoute;
    let mut header = [0; ROUTE];
    if whose == Whose::Ours {
        header[5] = PROTOCOL;
    }
    let all = dump(protocol, [RTM_GETROUTE, RTM_NEWROUTE], &mut header)
        .context("dump the routes (netlink)")?;
    // Linux before 4.20 ignores the protocol in the request.
    let is_asked_for =
        |body: &&Vec<u8>| whose == Whose::Everybodys || body.get(5) == Some(&PROTOCOL);
    all.iter()
        .filter(is_asked_for)
        .map(|body| route(body).with_context(|| format!("parse a route: {body:02x?}")))
        .collect()
}

fn rule(body: &[u8]) -> Option<RouteRule> {
    let [_, to, from, tos, table, _, _, action, flags @ ..] = *body.first_chunk::<RULE>()?;
    let mut table = TableId(table.into());
    let mut rule = RouteRule {
        protocol: 0,
        rest: self::tos(tos),
        ..RouteRule::new(0, table)
    };
    let mut mark = FwMark { value: 0, mask: 0 };
    for (kind, value) in attributes(body, RULE) {
        match kind {
            FRA_PROTOCOL => rule.protocol = *value.first()?,
            FRA_PRIORITY => rule.priority = u32_at(value, 0)?,
            FRA_SRC => rule.from = Some(prefix(value, from)?),
            FRA_DST => rule.to = Some(prefix(value, to)?),
            FRA_IIFNAME => rule.iif = Some(text(value)),
            FRA_FWMARK => mark.value = u32_at(value, 0)?,
            FRA_FWMASK => mark.mask = u32_at(value, 0)?,
            FRA_TABLE => table = TableId(u32_at(value, 0)?),
            // All bits set: there is no such selector.
            FRA_SUPPRESS_PREFIXLEN => {
                rule.suppress_prefixlength = Some(u32_at(value, 0)?).filter(|n| *n != u32::MAX);
            }
            _ => rule.rest.extend(selector(kind, value)?),
        }
    }
    if u32::from_ne_bytes(flags) & FIB_RULE_INVERT != 0 {
        // A word without a value must be the last.
        rule.rest.push(NOT.into());
    }
    rule.action = match action {
        FR_ACT_TO_TBL => RuleAction::Lookup(table),
        FR_ACT_BLACKHOLE => RuleAction::Blackhole,
        FR_ACT_UNREACHABLE => RuleAction::Unreachable,
        FR_ACT_PROHIBIT => RuleAction::Prohibit,
        other => RuleAction::Other(other),
    };
    rule.fwmark = Some(mark).filter(|mark| mark.mask != 0);
    Some(rule)
}

fn route(body: &[u8]) -> Option<Route> {
    let [_, length, _, tos, table, protocol, _, kind, flags @ ..] = *body.first_chunk::<ROUTE>()?;
    let kind = RouteKind(kind);
    let mut route = Route {
        table: TableId(table.into()),
        metric: 0,
        kind,
        destination: Ipv4Network::new(0.into(), 0).ok()?,
        gateway: None,
        dev: None,
        protocol,
        rest: self::tos(tos),
    };
    if kind.name().is_none() {
        route.rest.extend(unnamed("type", &[kind.0]));
    }
    for (kind, value) in attributes(body, ROUTE) {
        match kind {
            RTA_TABLE => route.table = TableId(u32_at(value, 0)?),
            RTA_PRIORITY => route.metric = u32_at(value, 0)?,
            RTA_DST => route.destination = prefix(value, length)?,
            // None if the interface was deleted meanwhile, and with it the route.
            RTA_OIF => {
                let name = if_indextoname(u32_at(value, 0)?).ok();
                route.dev = name.map(|name| text(name.as_bytes()));
            }
            RTA_GATEWAY => route.gateway = Some(ipv4(value)?),
            RTA_PREFSRC => route.rest.extend(["src".into(), ipv4(value)?.to_string()]),
            kind => route.rest.extend(unnamed(kind, value)),
        }
    }
    if u32::from_ne_bytes(flags) & RTNH_F_ONLINK != 0 {
        // A word without a value must be the last.
        route.rest.push("onlink".into());
    }
    Some(route)
}

fn prefix(value: &[u8], length: u8) -> Option<Ipv4Network> {
    Ipv4Network::new(ipv4(value)?, length).ok()
}

/// An attribute that our rules never have, as a key of `ip` and its value.
fn selector(kind: u16, value: &[u8]) -> Option<[String; 2]> {
    let (key, value) = match kind {
        FRA_OIFNAME => ("oif", text(value)),
        FRA_GOTO => ("goto", u32_at(value, 0)?.to_string()),
        FRA_UID_RANGE => {
            let (first, last) = (u32_at(value, 0)?, u32_at(value, 4)?);
            ("uidrange", format!("{first}-{last}"))
        }
        FRA_IP_PROTO => ("ipproto", value.first()?.to_string()),
        FRA_SPORT_RANGE => ("sport", ports(value)?),
        FRA_DPORT_RANGE => ("dport", ports(value)?),
        _ => return Some(unnamed(kind, value)),
    };
    Some([key.to_owned(), value])
}

/// `5`, or `80-90`
fn ports(value: &[u8]) -> Option<String> {
    let (first, last) = (u16_at(value, 0)?, u16_at(value, 2)?);
    Some(PortRange { first, last }.to_string())
}

/// Empty if it is 0, which is none.
fn tos(tos: u8) -> Vec<String> {
    match tos {
        0 => Vec::new(),
        tos => vec!["tos".to_owned(), format!("{tos:#x}")],
    }
}

/// An attribute that is not parsed. It makes the entry differ from every desired one. `Display` leaves it out,
/// because of the `#`.
fn unnamed(kind: impl fmt::Display, value: &[u8]) -> [String; 2] {
    [format!("#{kind}"), format!("{value:02x?}")]
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// A body of this header, and attributes of these types and values.
    fn body(header: [u8; 12], attributes: &[(u16, Vec<u8>)]) -> Vec<u8> {
        let mut body = header.to_vec();
        for (kind, value) in attributes {
            let length = u16::try_from(4 + value.len()).expect("the value is short");
            body.extend(length.to_ne_bytes());
            body.extend(kind.to_ne_bytes());
            body.extend(value);
            body.resize(body.len().next_multiple_of(4), 0);
        }
        body
    }

    #[test]
    fn an_attribute_that_is_not_parsed_makes_a_rule_differ() {
        // As the kernel dumps the rule of `ip rule add priority 7 lookup 10 protocol 109`.
        let usual = [
            (FRA_PRIORITY, 7_u32.to_ne_bytes().to_vec()),
            (FRA_TABLE, 10_u32.to_ne_bytes().to_vec()),
            (FRA_SUPPRESS_PREFIXLEN, u32::MAX.to_ne_bytes().to_vec()),
            (FRA_PROTOCOL, vec![PROTOCOL]),
        ];
        let header = [2, 0, 0, 0, 10, 0, 0, FR_ACT_TO_TBL, 0, 0, 0, 0];
        let plain = rule(&body(header, &usual)).expect("a rule");
        assert_eq!(plain, RouteRule::new(7, TableId(10)));
        for kind in 25..100 {
            let mut more = usual.to_vec();
            more.push((kind, vec![1]));
            let odd = rule(&body(header, &more)).expect("a rule");
            assert!(odd != plain, "{kind}");
            assert_eq!(odd.to_string(), plain.to_string(), "{kind}");
        }
        let mut prohibiting = header;
        prohibiting[7] = FR_ACT_PROHIBIT;
        let prohibiting = rule(&body(prohibiting, &usual)).expect("a rule");
        assert_eq!(
            prohibiting.to_string(),
            "priority 7 from all prohibit proto 109"
        );
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parsers_panic(
            header: [u8; 12],
            attributes in vec((0..40_u16, vec(any::<u8>(), 0..12)), 0..8),
            cut in 0..120_usize,
        ) {
            let mut body = body(header, &attributes);
            body.truncate(cut);
            let _ = rule(&body).map(|rule| rule.to_string());
            let _ = route(&body).map(|route| route.to_string());
        }
    }
}
