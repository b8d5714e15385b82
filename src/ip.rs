//! The language of `ip`, both directions: listing to state, state to `ip -batch` lines.

use std::fmt;
use std::net::Ipv4Addr;

use anyhow::Result;

use crate::state::{FwMark, PROTOCOL, Route, RouteRule, TableId};

/// What asks for everybody's rules and routes, for [`survey`].
pub const SURVEY: &str = "rule show\nroute show table all\n";

/// An entry of anybody's.
#[derive(Clone, Debug)]
pub struct Listed<T> {
    /// Whether it carries our protocol number.
    pub is_ours: bool,
    /// The line, its white space made one, the kernel's own tables by their names.
    pub text: String,
    /// The entry, as far as it is of a form that we know; the rest is in its `rest`.
    pub entry: T,
}

/// Everybody's entries, in the kernel's order.
#[derive(Debug, Default)]
pub struct Survey {
    /// Rules.
    pub rules: Vec<Listed<RouteRule>>,
    /// Routes of all tables.
    pub routes: Vec<Listed<Route>>,
}

/// The answers to [`SURVEY`]. What others have made may be of any form: a line that can't be read at
/// all is left out.
pub fn survey(text: &str) -> Survey {
    let mut survey = Survey::default();
    // An indented line goes on about what the line above it names.
    let lines = text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with([' ', '\t']));
    for line in lines {
        let is_ours = has_our_protocol(line);
        let text = named(line);
        // `98:<tab>from …` is a rule; a route starts with its destination or kind.
        if let Some((priority, rest)) = line.split_once(":\t") {
            survey
                .rules
                .extend(route_rule(priority, rest).map(|entry| Listed {
                    is_ours,
                    text,
                    entry,
                }));
        } else {
            survey.routes.extend(route(line).map(|entry| Listed {
                is_ours,
                text,
                entry,
            }));
        }
    }
    survey
}

/// `32766: from all lookup 254` as `32766: from all lookup main`.
fn named(line: &str) -> String {
    let mut words: Vec<String> = Vec::new();
    for word in line.split_ascii_whitespace() {
        let is_table = words
            .last()
            .is_some_and(|last| last == "lookup" || last == "table");
        let table = word.parse().ok().filter(|_| is_table).map(TableId);
        words.push(table.map_or(word.to_owned(), |table| table.to_string()));
    }
    words.join(" ")
}

/// Whether a listed entry carries our protocol number.
fn has_our_protocol(line: &str) -> bool {
    // A link may be called proto, too.
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let mut pairs = words.windows(2);
    pairs.any(|pair| pair[0] == "proto" && pair[1].parse() == Ok(PROTOCOL))
}

/// Where the kernel sends a packet: the answer to `ip route get`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Way {
    /// Whether the router keeps it for itself.
    pub is_local: bool,
    /// The link it leaves by.
    pub dev: String,
    /// The next router; none where the destination is on the link.
    pub via: Option<String>,
    /// The table that decided.
    pub table: Option<TableId>,
    /// The source that the kernel would choose.
    pub source: Option<Ipv4Addr>,
}

/// `192.0.2.9 from 192.168.0.2 dev ppp0 table 10 mark 0xa`, `local 203.0.113.10 dev lo table 255 …`
pub fn way(text: &str) -> Result<Way> {
    let line = text.lines().next().unwrap_or_default();
    let mut way = Way::default();
    let is_flag =
        |word: &&str| matches!(*word, "linkdown" | "dead" | "onlink" | "offload" | "trap");
    let mut words = line
        .split_ascii_whitespace()
        .filter(|word| !is_flag(word))
        .peekable();
    way.is_local = words
        .next_if(|word| matches!(*word, "local" | "2" | "broadcast" | "3"))
        .is_some();
    words.next();
    // Words and values in turn: a link may be called via, too.
    while let Some((word, value)) = words.next().zip(words.next()) {
        match word {
            "dev" => way.dev = value.to_owned(),
            "via" => way.via = Some(value.to_owned()),
            "table" => way.table = value.parse().ok().map(TableId),
            "src" => way.source = value.parse().ok(),
            _ => {}
        }
    }
    anyhow::ensure!(
        !way.dev.is_empty(),
        "read what ip route get answers: {line:?}"
    );
    Ok(way)
}

/// `from 203.0.113.10 lookup 254 suppress_prefixlength 0 proto 109`
fn route_rule(priority: &str, text: &str) -> Option<RouteRule> {
    let mut rule = RouteRule::new(priority.parse().ok()?, TableId(0));
    let mut words = text.split_ascii_whitespace();
    while let Some(word) = words.next() {
        match word {
            "from" => rule.from = Some(words.next()?.to_owned()).filter(|from| from != "all"),
            "iif" => rule.iif = Some(words.next()?.to_owned()),
            // Said of an interface that does not exist now.
            "[detached]" => {}
            "fwmark" => rule.fwmark = Some(FwMark::parse(words.next()?)?),
            "lookup" => rule.table = TableId(words.next()?.parse().ok()?),
            "suppress_prefixlength" => {
                rule.suppress_prefixlength = Some(words.next()?.parse().ok()?)
            }
            "proto" => drop(words.next()?),
            _ => rule.rest.push(word.to_owned()),
        }
    }
    Some(rule)
}

/// The kinds of routes from 1 on (`RTN_UNICAST`, linux/rtnetlink.h), by the words of `ip`.
const KINDS: [&str; 9] = [
    UNICAST,
    "local",
    "broadcast",
    "anycast",
    "multicast",
    "blackhole",
    "unreachable",
    "prohibit",
    "throw",
];

const UNICAST: &str = "unicast";

/// A kind as a route of ours has it: that of most is not said.
pub fn said(kind: &str) -> Option<String> {
    (kind != UNICAST).then(|| kind.to_owned())
}

/// A kind of route by its number.
pub fn route_kind(number: u8) -> Option<&'static str> {
    KINDS.get(usize::from(number).checked_sub(1)?).copied()
}

/// `default dev ppp0 table 10 scope 253` or, its kind as a number, `7 default table 10 metric 4278198272`
fn route(text: &str) -> Option<Route> {
    let mut words = text.split_ascii_whitespace();
    let first = words.next().unwrap_or_default();
    // `ip -N` prints the number.
    let number = first.parse().ok().and_then(route_kind);
    let kind = number.or_else(|| KINDS.into_iter().find(|kind| *kind == first));
    let destination = if kind.is_some() { words.next()? } else { first };
    let mut route = Route {
        table: TableId::MAIN,
        metric: 0,
        kind: kind.and_then(said),
        destination: destination.to_owned(),
        dev: None,
        rest: Vec::new(),
    };
    while let Some(word) = words.next() {
        match word {
            "dev" => route.dev = Some(words.next()?.to_owned()),
            "table" => route.table = TableId(words.next()?.parse().ok()?),
            "metric" => route.metric = words.next()?.parse().ok()?,
            // Both follow from what we write; the flags follow from the link's state.
            "scope" | "proto" => drop(words.next()?),
            "linkdown" | "dead" | "onlink" | "offload" | "trap" => {}
            _ => route.rest.push(word.to_owned()),
        }
    }
    Some(route)
}

/// A word as it means itself to a shell and in a batch; none where there is no such form: a batch knows
/// no escape, and its comments begin anywhere (`getcmdline`, `makeargs` in iproute2's lib/utils.c). The
/// names that we take need nothing. Others get into an entry of ours when somebody renames a link; where
/// they have no form they are left out, and what is deleted is found by the rest.
fn word(text: &str) -> Option<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._:/-".contains(c);
    if text.chars().all(plain) {
        return Some(text.to_owned());
    }
    let is_quotable = |c: char| !c.is_control() && !"'#".contains(c);
    text.chars().all(is_quotable).then(|| format!("'{text}'"))
}

/// The words of an entry that we never write, pair by pair.
fn unknown(words: &[String], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for pair in words.chunks(2) {
        if let Some(pair) = pair
            .iter()
            .map(|text| word(text))
            .collect::<Option<Vec<_>>>()
        {
            write!(f, " {}", pair.join(" "))?;
        }
    }
    Ok(())
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(kind) = &self.kind {
            write!(f, "{kind} ")?;
        }
        f.write_str(&self.destination)?;
        unknown(&self.rest, f)?;
        if let Some(dev) = self.dev.as_ref().and_then(|dev| word(dev)) {
            write!(f, " dev {dev}")?;
        }
        if self.metric != 0 {
            write!(f, " metric {}", self.metric)?;
        }
        write!(f, " table {} protocol {PROTOCOL}", self.table)
    }
}

impl fmt::Display for RouteRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // `rule del` takes what is not named for a wildcard (ip-rule(8)), so all is named.
        write!(f, "priority {}", self.priority)?;
        unknown(&self.rest, f)?;
        write!(f, " from {}", self.from.as_deref().unwrap_or("all"))?;
        if let Some(iif) = self.iif.as_ref().and_then(|iif| word(iif)) {
            write!(f, " iif {iif}")?;
        }
        if let Some(fwmark) = &self.fwmark {
            write!(f, " fwmark {fwmark}")?;
        }
        if self.table != TableId(0) {
            write!(f, " lookup {}", self.table)?;
        }
        if let Some(length) = self.suppress_prefixlength {
            write!(f, " suppress_prefixlength {length}")?;
        }
        write!(f, " protocol {PROTOCOL}")
    }
}

/// The batch lines that failed, numbered from 1, each with ip's words ahead of it. Words that no
/// line follows belong to line 0.
pub fn failures(stderr: &str) -> Vec<(usize, String)> {
    let mut failures = Vec::new();
    let mut words = Vec::new();
    for line in stderr.lines() {
        match line
            .strip_prefix("Command failed -:")
            .and_then(|number| number.trim().parse().ok())
        {
            Some(number) => failures.push((number, std::mem::take(&mut words).join(" "))),
            None => words.push(line.trim()),
        }
    }
    if !words.is_empty() {
        failures.push((0, words.join(" ")));
    }
    failures
}
