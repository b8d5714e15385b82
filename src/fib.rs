//! The kernel's routing, of ours alone: routes and rules as it tells them (rtnetlink(7)), to state. Asking `ip`
//! would cost each call a process, and its print has another form in another version.

use std::collections::BTreeSet;
use std::fmt;

use anyhow::{Context, Result};
use ipnetwork::Ipv4Network;
use nix::libc::{
    RTA_DST, RTA_GATEWAY, RTA_OIF, RTA_PREFSRC, RTA_PRIORITY, RTA_TABLE, RTM_GETROUTE, RTM_GETRULE,
    RTM_NEWROUTE, RTM_NEWRULE,
};
use nix::net::if_::if_indextoname;
use nix::sys::socket::SockProtocol;

use crate::ip::{route_kind, said};
use crate::netlink::{attributes, dump, ipv4, text, u16_at, u32_at};
use crate::state::{FwMark, PROTOCOL, Route, RouteRule, TableId};

// linux/rtnetlink.h
/// The bytes of an `rtmsg`: family, lengths of destination and source, TOS, table, protocol, scope, type, flags.
const ROUTE: usize = 12;

// linux/fib_rules.h
/// The bytes of a `fib_rule_hdr`: family, lengths of destination and source, TOS, table, two of no use, action, flags.
const RULE: usize = 12;
const FIB_RULE_INVERT: u32 = 2;
const FR_ACT_TO_TBL: u8 = 1;
const FRA_DST: u16 = 1;
const FRA_SRC: u16 = 2;
const FRA_IIFNAME: u16 = 3;
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

/// Our rules.
///
/// # Errors
/// The kernel can't be asked, or refuses, or says what can't be read.
pub fn rules() -> Result<BTreeSet<RouteRule>> {
    let protocol = SockProtocol::NetlinkRoute;
    let all = dump(protocol, [RTM_GETRULE, RTM_NEWRULE], &mut [0; RULE]).context(
        "ask for the routing rules (netlink), for which the kernel needs CONFIG_IP_MULTIPLE_TABLES",
    )?;
    let is_ours = |body: &&Vec<u8>| {
        attributes(body, RULE).any(|attribute| attribute == (FRA_PROTOCOL, &[PROTOCOL]))
    };
    let ours = all.iter().filter(is_ours);
    ours.map(|body| rule(body).with_context(|| format!("read a routing rule: {body:02x?}")))
        .collect()
}

/// Our routes, of all tables.
///
/// # Errors
/// The kernel can't be asked, or refuses, or says what can't be read.
pub fn routes() -> Result<BTreeSet<Route>> {
    let protocol = SockProtocol::NetlinkRoute;
    // Of others there may be a million.
    let mut question = [0; ROUTE];
    question[5] = PROTOCOL;
    let all = dump(protocol, [RTM_GETROUTE, RTM_NEWROUTE], &mut question)
        .context("ask for the routes (netlink)")?;
    let ours = all.iter().filter(|body| body.get(5) == Some(&PROTOCOL));
    ours.map(|body| route(body).with_context(|| format!("read a route: {body:02x?}")))
        .collect()
}

fn rule(body: &[u8]) -> Option<RouteRule> {
    let (to, from, tos) = (*body.get(1)?, *body.get(2)?, *body.get(3)?);
    let (table, action, flags) = (*body.get(4)?, *body.get(7)?, u32_at(body, 8)?);
    let mut rule = RouteRule::new(0, TableId(table.into()));
    let mut mark = FwMark { value: 0, mask: 0 };
    let mut rest = Rest::default();
    rest.tos(tos);
    if action != FR_ACT_TO_TBL {
        rest.unnamed("action", &[action]);
    }
    for (kind, value) in attributes(body, RULE) {
        match kind {
            FRA_PROTOCOL => {}
            FRA_PRIORITY => rule.priority = u32_at(value, 0)?,
            FRA_SRC => rule.from = Some(prefix(value, from)?),
            FRA_IIFNAME => rule.iif = Some(text(value)),
            FRA_FWMARK => mark.value = u32_at(value, 0)?,
            FRA_FWMASK => mark.mask = u32_at(value, 0)?,
            FRA_TABLE => rule.table = TableId(u32_at(value, 0)?),
            FRA_SUPPRESS_PREFIXLEN => {
                // The largest number for none.
                rule.suppress_prefixlength = Some(u32_at(value, 0)?).filter(|n| *n != u32::MAX);
            }
            FRA_DST => rest.named("to", prefix(value, to)?),
            FRA_OIFNAME => rest.named("oif", text(value)),
            FRA_UID_RANGE => rest.range("uidrange", u32_at(value, 0)?, u32_at(value, 4)?),
            FRA_IP_PROTO => rest.named("ipproto", value.first()?.to_string()),
            FRA_SPORT_RANGE => rest.range("sport", u16_at(value, 0)?, u16_at(value, 2)?),
            FRA_DPORT_RANGE => rest.range("dport", u16_at(value, 0)?, u16_at(value, 2)?),
            kind => rest.unnamed(&kind.to_string(), value),
        }
    }
    if flags & FIB_RULE_INVERT != 0 {
        // A word without a value: the last.
        rest.0.push("not".into());
    }
    rule.fwmark = Some(mark).filter(|mark| mark.mask != 0);
    rule.rest = rest.0;
    Some(rule)
}

fn route(body: &[u8]) -> Option<Route> {
    let (length, tos) = (*body.get(1)?, *body.get(3)?);
    let (table, kind) = (*body.get(4)?, *body.get(7)?);
    let mut rest = Rest::default();
    rest.tos(tos);
    let name = route_kind(kind);
    if name.is_none() {
        rest.unnamed("type", &[kind]);
    }
    let mut route = Route {
        table: TableId(table.into()),
        metric: 0,
        kind: name.and_then(said),
        destination: "default".into(),
        dev: None,
        rest: Vec::new(),
    };
    for (kind, value) in attributes(body, ROUTE) {
        match kind {
            RTA_TABLE => route.table = TableId(u32_at(value, 0)?),
            RTA_PRIORITY => route.metric = u32_at(value, 0)?,
            RTA_DST => route.destination = prefix(value, length)?,
            // Of one that has gone meanwhile the route has gone, too.
            RTA_OIF => {
                let name = if_indextoname(u32_at(value, 0)?).ok();
                route.dev = name.map(|name| text(name.as_bytes()));
            }
            RTA_GATEWAY => rest.named("via", ipv4(value)?.to_string()),
            RTA_PREFSRC => rest.named("src", ipv4(value)?.to_string()),
            kind => rest.unnamed(&kind.to_string(), value),
        }
    }
    route.rest = rest.0;
    Some(route)
}

/// As `ip` writes it: a single address without its length.
fn prefix(value: &[u8], length: u8) -> Option<String> {
    let address = ipv4(value)?;
    Some(match length {
        32 => address.to_string(),
        _ => Ipv4Network::new(address, length).ok()?.to_string(),
    })
}

/// What we never write, as words of `ip`, each with its value.
#[derive(Default)]
struct Rest(Vec<String>);

impl Rest {
    fn named(&mut self, word: &str, value: String) {
        self.0.extend([word.to_owned(), value]);
    }

    fn range<T: fmt::Display>(&mut self, word: &str, first: T, last: T) {
        self.named(word, format!("{first}-{last}"));
    }

    fn tos(&mut self, tos: u8) {
        if tos != 0 {
            self.named("tos", format!("{tos:#x}"));
        }
    }

    /// What `ip` has other words for, or none. It makes the entry none of those that should stand; a
    /// command leaves it out, since no word of one holds a `#`.
    fn unnamed(&mut self, what: &str, value: &[u8]) {
        self.named(&format!("#{what}"), format!("{value:02x?}"));
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// What is fixed of a message, and attributes of these types and values.
    fn body(fixed: [u8; 12], attributes: &[(u16, Vec<u8>)]) -> Vec<u8> {
        let mut body = fixed.to_vec();
        for (kind, value) in attributes {
            let length = u16::try_from(4 + value.len()).expect("it is short");
            body.extend(length.to_ne_bytes());
            body.extend(kind.to_ne_bytes());
            body.extend(value);
            body.resize(body.len().next_multiple_of(4), 0);
        }
        body
    }

    #[test]
    fn what_we_never_write_makes_a_rule_another() {
        // Of all sources, to a table, as `ip rule add priority 7 lookup 10 protocol 109` has it told.
        let usual = [
            (FRA_PRIORITY, 7_u32.to_ne_bytes().to_vec()),
            (FRA_TABLE, 10_u32.to_ne_bytes().to_vec()),
            (FRA_SUPPRESS_PREFIXLEN, u32::MAX.to_ne_bytes().to_vec()),
            (FRA_PROTOCOL, vec![PROTOCOL]),
        ];
        let fixed = [2, 0, 0, 0, 10, 0, 0, FR_ACT_TO_TBL, 0, 0, 0, 0];
        let plain = rule(&body(fixed, &usual)).expect("a rule");
        assert_eq!(plain, RouteRule::new(7, TableId(10)));
        for kind in 25..100 {
            let mut more = usual.to_vec();
            more.push((kind, vec![1]));
            let odd = rule(&body(fixed, &more)).expect("a rule");
            assert!(odd != plain, "{kind}");
            assert_eq!(odd.to_string(), plain.to_string(), "{kind}");
        }
        let mut prohibiting = fixed;
        prohibiting[7] = 8;
        assert_ne!(rule(&body(prohibiting, &usual)), Some(plain));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_not(
            fixed: [u8; 12],
            attributes in vec((0..40_u16, vec(any::<u8>(), 0..12)), 0..8),
            cut in 0..120_usize,
        ) {
            let mut body = body(fixed, &attributes);
            body.truncate(cut);
            let _ = rule(&body).map(|rule| rule.to_string());
            let _ = route(&body).map(|route| route.to_string());
        }
    }
}
