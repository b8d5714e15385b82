//! The text of a configuration as [`Config`], with everything that is wrong in it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use anyhow::{Context, Result};
use toml_spanner::{Arena, Array, Item, Key, Span, Table, parse_recoverable};

use super::error::Problem;
use super::values::{address_or_prefix, port_range, prefix, target};
use super::{Config, Identity, Lan, Priority, Routing, Uplink};
use crate::model::forward::{Forward, Protocol, overlapping};
use crate::model::names::{IfName, UplinkName};
use crate::model::route::{FwMark, TableId};

/// How many problems are told: a file with more than these is no configuration.
const MAX_PROBLEMS: usize = 100;

/// How many uplinks there may be: each is compared with each other.
const MAX_UPLINKS: usize = 500;

/// The configuration in a text.
///
/// # Errors
/// All that is wrong, in the order of the text.
pub fn parse(text: &str) -> Result<Config, Vec<Problem>> {
    let arena = Arena::new();
    let document = parse_recoverable(text, &arena);
    let syntax = document.errors();
    let mut reader = Reader {
        is_broken: !syntax.is_empty(),
        problems: Vec::new(),
    };
    let config = reader.config(document.table());
    if !reader.is_broken && reader.problems.is_empty() {
        return Ok(config);
    }
    // The parser went on after a mistake as well as it could: of what it makes of a broken line only
    // the first is its writer's.
    let starts: Vec<usize> = text.match_indices('\n').map(|(at, _)| at).collect();
    let line = |problem: &Problem| starts.partition_point(|at| *at < problem.at);
    let mut problems = reader.problems;
    let mut broken = BTreeMap::new();
    for error in syntax {
        let problem = Problem::new(error.span(), error.message(text));
        broken.entry(line(&problem)).or_insert(problem);
    }
    problems.retain(|problem| !broken.contains_key(&line(problem)));
    problems.extend(broken.into_values());
    problems.sort_by_key(|problem| problem.at);
    let more = problems.split_off(problems.len().min(MAX_PROBLEMS));
    let others = more.len().saturating_sub(1);
    if let Some(Problem { at, message }) = more.into_iter().next() {
        let message = format!("{message}; and {others} more like these");
        problems.push(Problem { at, message });
    }
    Err(problems)
}

/// Between those of the local table and of main (`ip-rule(8)`).
const PRIORITIES: RangeInclusive<u64> = 1..=32765;

/// A table's name, as the messages have it, and its keys.
type Keys = (&'static str, &'static [&'static str]);

const FILE: Keys = ("the file", &["lan", "mark", "priority", "uplink"]);
const LAN: Keys = ("[lan]", &["interfaces", "networks"]);
const MARK: Keys = ("[mark]", &["mask"]);
const PRIORITY: Keys = ("[priority]", &["local", "mark", "source", "pin"]);
const UPLINK: Keys = (
    "[uplink]",
    &[
        "interface",
        "ipparam",
        "linkname",
        "peer",
        "table",
        "mark",
        "masquerade",
        "hairpin",
        "clamp-mss",
        "accept-forward",
        "pin",
        "forward",
    ],
);
const FORWARD: Keys = ("a forward", &["proto", "port", "to", "from"]);

/// All tables.
pub const KEYS: [Keys; 6] = [FILE, LAN, MARK, PRIORITY, UPLINK, FORWARD];

/// Walks the parsed document and collects what is wrong, so that one run shows all of it.
struct Reader {
    /// Whether the parser has left out a part, and what follows a header that it left out stands elsewhere.
    is_broken: bool,
    problems: Vec<Problem>,
}

impl Reader {
    fn problem(&mut self, span: Span, message: impl Into<String>) {
        self.problems.push(Problem::new(span, message));
    }

    /// A problem, unless what is missing may stand in what the parser left out.
    fn missing(&mut self, span: Span, what: &str) {
        if !self.is_broken {
            self.problem(span, format!("missing {what}"));
        }
    }

    /// The value, or a problem at its place.
    fn take<T>(&mut self, span: Span, value: Result<T>) -> Option<T> {
        value
            .map_err(|error| self.problem(span, format!("{error:#}")))
            .ok()
    }

    /// A problem for each key that is none of these.
    fn known(&mut self, table: &Table, (place, keys): Keys) {
        let unknown = table.iter().filter(|(key, _)| !keys.contains(&key.name));
        for (Key { name, span }, _) in unknown {
            let known = keys.join(", ");
            self.problem(
                *span,
                format!("unknown key {name:?} in {place}; there are {known}"),
            );
        }
    }

    fn table<'a>(&mut self, root: &'a Table<'a>, key: &str) -> Option<&'a Table<'a>> {
        let value = root.get(key)?;
        let table = value.as_table();
        if table.is_none() {
            self.problem(value.span(), format!("{key} is a table: [{key}]"));
        }
        table
    }

    fn config(&mut self, root: &Table) -> Config {
        if !self.is_broken {
            self.known(root, FILE);
        }
        let lan = self.lan(root);
        let mask = self.mask(root);
        let priority = self.priority(root);
        let mut uplinks = BTreeMap::new();
        let mut places = Vec::new();
        for (key, value) in self.table(root, "uplink").into_iter().flatten() {
            let Some(name) = self.take(key.span, UplinkName::parse(key.name)) else {
                continue;
            };
            let Some(table) = value.as_table() else {
                self.problem(
                    value.span(),
                    format!("an uplink is a table: [uplink.{name}]"),
                );
                continue;
            };
            if uplinks.len() == MAX_UPLINKS {
                self.problem(key.span, format!("more than {MAX_UPLINKS} uplinks"));
                break;
            }
            if let Some(uplink) = self.uplink(key, table, mask) {
                places.push((name.clone(), key.span));
                uplinks.insert(name, uplink);
            }
        }
        if root
            .get("uplink")
            .is_some_and(|value| value.as_table().is_some_and(|t| !t.is_empty()))
        {
            for (key, none) in [
                ("interfaces", lan.interfaces.is_empty()),
                ("networks", lan.networks.is_empty()),
            ] {
                let written = root
                    .get("lan")
                    .and_then(Item::as_table)
                    .is_some_and(|l| l.contains_key(key));
                if none && !written {
                    let place = root
                        .get_key_value("lan")
                        .map_or(Span::default(), |(key, _)| key.span);
                    self.missing(
                        place,
                        &format!("key {key} in [lan]: required once there is an uplink"),
                    );
                }
            }
        }
        self.unique(&places, &uplinks, &lan);
        Config {
            lan,
            mask,
            priority,
            uplinks,
        }
    }

    fn lan(&mut self, root: &Table) -> Lan {
        let Some(table) = self.table(root, "lan") else {
            return Lan::default();
        };
        self.known(table, LAN);
        let interfaces = self.list(
            table,
            "interfaces",
            "interface names: [\"eth1\"]",
            IfName::parse,
        );
        let networks = self.list(table, "networks", "prefixes: [\"192.168.0.0/24\"]", prefix);
        Lan {
            interfaces,
            networks,
        }
    }

    fn mask(&mut self, root: &Table) -> u32 {
        const DEFAULT: u32 = 0xff;
        let Some(table) = self.table(root, "mark") else {
            return DEFAULT;
        };
        self.known(table, MARK);
        self.integer(table, "mask", 1..=u32::MAX.into())
            .unwrap_or(DEFAULT)
    }

    fn priority(&mut self, root: &Table) -> Priority {
        let mut priority = Priority {
            local: 98,
            mark: 99,
            source: 100,
            pin: 101,
        };
        let Some(table) = self.table(root, "priority") else {
            return priority;
        };
        self.known(table, PRIORITY);
        let keys = [
            ("local", &mut priority.local),
            ("mark", &mut priority.mark),
            ("source", &mut priority.source),
            ("pin", &mut priority.pin),
        ];
        for (key, target) in keys {
            if let Some(value) = self.integer(table, key, PRIORITIES) {
                *target = value;
            }
        }
        if !table.contains_key("pin") {
            // Whoever moves the others need not know of pins.
            priority.pin = priority.pin.max(priority.mark + 1);
        }
        let Priority {
            local,
            mark,
            source,
            pin,
        } = priority;
        // The LAN is nearer than any uplink, and a connection's own way back comes before its host's.
        if let Some((key, _)) = table.iter().next()
            && !(local < mark && local < source && mark < pin)
        {
            let message = format!(
                "local must come ahead of mark, source and pin, and mark ahead of pin; \
                 local is {local}, mark {mark}, source {source}, pin {pin}"
            );
            self.problem(key.span, message);
        }
        priority
    }

    fn uplink(&mut self, name: &Key, table: &Table, mask: u32) -> Option<Uplink> {
        let place = format!("[uplink.{}]", name.name);
        self.known(table, UPLINK);
        let identity = self.identity(name, table, &place);
        let pin = self.list(
            table,
            "pin",
            "LAN sources: [\"192.168.0.2\"]",
            address_or_prefix,
        );
        let masquerade = self.boolean(table, "masquerade").unwrap_or(true);
        let forwards = self.forwards(table);
        let id = self.table_id(table);
        if table.get("table").is_none() {
            for needs in ["forward", "mark", "pin"] {
                let Some((key, _)) = table.get_key_value(needs) else {
                    continue;
                };
                self.missing(
                    key.span,
                    &format!(
                        "key table in {place}: {needs} needs a routing table of its own: table = 10"
                    ),
                );
            }
        }
        let mark = match table.get("mark") {
            Some(_) => self.integer(table, "mark", 1..=u32::MAX.into()),
            None => id.map(|TableId(id)| id),
        };
        if let Some(mark) = mark
            && mark & !mask != 0
        {
            let at = table
                .get("mark")
                .or(table.get("table"))
                .map_or(name.span, Item::span);
            let (low, high) = (1u32 << mask.trailing_zeros(), mask);
            self.problem(
                at,
                format!("mark {mark} does not fit the mask {mask:#x}: give mark = {low} to {high} within it, or widen [mark] mask"),
            );
        }
        Some(Uplink {
            identity: identity?,
            routing: id.zip(mark).map(|(table, value)| Routing {
                table,
                mark: FwMark { value, mask },
            }),
            masquerade,
            hairpin: self.boolean(table, "hairpin").unwrap_or(true),
            clamp_mss: self.boolean(table, "clamp-mss").unwrap_or(true),
            accept_forward: self.boolean(table, "accept-forward").unwrap_or(false),
            pin,
            forwards,
        })
    }

    fn identity(&mut self, name: &Key, table: &Table, place: &str) -> Option<Identity> {
        let string = |value: &Item| {
            let text = value
                .as_str()
                .filter(|text| !text.is_empty() && !text.chars().any(char::is_control));
            text.map(str::to_owned)
        };
        let mut texts = ["ipparam", "linkname", "peer"].map(|key| {
            let value = table.get(key)?;
            let text = string(value);
            self.take(
                value.span(),
                text.with_context(|| format!("{key} is a string of printable characters")),
            )
        });
        let interface = table.get("interface").and_then(|value| {
            let text = value.as_str().context("interface is a name: \"ppp0\"");
            self.take(value.span(), text.and_then(IfName::parse))
        });
        let [ipparam, linkname, peer] = texts.each_mut().map(Option::take);
        let identity = Identity {
            interface,
            ipparam,
            linkname,
            peer,
        };
        if !["interface", "ipparam", "linkname", "peer"]
            .iter()
            .any(|key| table.contains_key(key))
        {
            let what = format!(
                "interface in {place}: say which link this is by interface, ipparam, linkname or peer: \
                 interface = \"ppp0\""
            );
            self.missing(name.span, &what);
        }
        (identity != Identity::default()).then_some(identity)
    }

    fn table_id(&mut self, table: &Table) -> Option<TableId> {
        let id: u32 = self.integer(table, "table", 1..=0x7fff_ffff)?;
        if (253..=255).contains(&id) {
            let span = table.get("table").map_or(Span::default(), Item::span);
            self.problem(
                span,
                format!(
                    "table {id} is the system's (default, main, local): use 1 to 252, or above 255"
                ),
            );
            return None;
        }
        Some(TableId(id))
    }

    fn forwards(&mut self, table: &Table) -> Vec<Forward> {
        let Some(value) = table.get("forward") else {
            return Vec::new();
        };
        let example = "forward is a list of tables: [{ port = 80, to = \"192.168.0.2\" }]";
        let Some(items) = value.as_array() else {
            self.problem(value.span(), example);
            return Vec::new();
        };
        let mut forwards: Vec<Forward> = Vec::with_capacity(items.len());
        let mut places = Vec::with_capacity(items.len());
        for item in items {
            let Some(table) = item.as_table() else {
                self.problem(item.span(), example);
                continue;
            };
            if let Some(forward) = self.forward(item, table) {
                forwards.push(forward);
                places.push(item.span());
            }
        }
        for (later, earlier) in overlapping(&forwards) {
            let earlier = &forwards[earlier];
            let message = format!("overlaps the forward of {earlier} above it");
            self.problem(places[later], message);
        }
        forwards
    }

    fn forward(&mut self, item: &Item, table: &Table) -> Option<Forward> {
        self.known(table, FORWARD);
        let protocols = match table.get("proto") {
            None => Some(Cow::Borrowed(&[Protocol::Tcp][..])),
            Some(value) => self.protocols(value).map(Cow::Owned),
        };
        let ports = match table.get("port") {
            Some(value) => self.take(value.span(), port_range(value)).map(Some),
            None => Some(None),
        };
        let to = match table.get("to") {
            Some(value) => self.take(value.span(), target(value)),
            None => {
                self.missing(item.span(), "to: the LAN host: to = \"192.168.0.2\"");
                None
            }
        };
        let from = self.list(
            table,
            "from",
            "source prefixes: [\"198.51.100.0/24\"]",
            address_or_prefix,
        );
        if from.is_empty()
            && let Some(value) = table.get("from")
            && value.as_array().is_some_and(|list| list.is_empty())
        {
            self.problem(
                value.span(),
                "an empty from lets nobody in; leave it out to let everybody in",
            );
        }
        let (protocols, ports, (to, to_port)) = (protocols?, ports?, to?);
        let portless =
            protocols.is_empty() || !protocols.iter().all(|protocol| protocol.has_ports());
        if ports.is_some() && portless {
            let span = table.get("port").map_or(item.span(), Item::span);
            self.problem(
                span,
                "only tcp, udp and sctp have ports: leave port out, or name these protocols only",
            );
        }
        if to_port.is_some() && ports.as_ref().is_none_or(|ports| !ports.is_one()) {
            let span = table.get("to").map_or(item.span(), Item::span);
            self.problem(
                span,
                "a port in to goes with one port: several keep theirs, so give an address alone",
            );
        }
        Some(Forward {
            protocols,
            ports,
            to,
            to_port,
            from,
        })
    }

    /// The protocols; none for any.
    fn protocols(&mut self, value: &Item) -> Option<Vec<Protocol>> {
        let list = value.as_array();
        let names = list.map_or(std::slice::from_ref(value), Array::as_slice);
        let mut protocols = Vec::new();
        if names.is_empty() {
            self.problem(
                value.span(),
                "an empty proto forwards nothing; leave it out for tcp",
            );
        }
        for name in names {
            let text = name.as_str().unwrap_or_default();
            let known = Protocol::parse(text);
            let message = match known {
                _ if text == "any" && list.is_none() => return Some(Vec::new()),
                _ if text == "any" => "\"any\" stands alone: proto = \"any\"",
                Some(protocol) if protocols.contains(&protocol) => "stands twice in proto",
                Some(protocol) => {
                    protocols.push(protocol);
                    continue;
                }
                None => {
                    "proto is \"tcp\", \"udp\", \"sctp\", \"gre\", \"esp\" or \"icmp\", a list of these, or \"any\""
                }
            };
            self.problem(name.span(), message);
        }
        Some(protocols).filter(|protocols| !protocols.is_empty())
    }

    /// A list of strings, each parsed; a problem for each that is not, and for doubles.
    fn list<T: PartialEq>(
        &mut self,
        table: &Table,
        key: &str,
        what: &str,
        parse: fn(&str) -> Result<T>,
    ) -> Vec<T> {
        let Some(value) = table.get(key) else {
            return Vec::new();
        };
        let Some(items) = value.as_array() else {
            self.problem(value.span(), format!("{key} is a list of {what}"));
            return Vec::new();
        };
        let mut list = Vec::new();
        for item in items.iter() {
            let parsed = item
                .as_str()
                .with_context(|| format!("{key} is a list of {what}"))
                .and_then(parse);
            let Some(parsed) = self.take(item.span(), parsed) else {
                continue;
            };
            if list.contains(&parsed) {
                self.problem(item.span(), format!("stands twice in {key}"));
            }
            list.push(parsed);
        }
        list
    }

    fn boolean(&mut self, table: &Table, key: &str) -> Option<bool> {
        let value = table.get(key)?;
        let boolean = value.as_bool();
        if boolean.is_none() {
            self.problem(value.span(), format!("{key} is true or false"));
        }
        boolean
    }

    fn integer(&mut self, table: &Table, key: &str, range: RangeInclusive<u64>) -> Option<u32> {
        let value = table.get(key)?;
        let integer = value.as_u64().filter(|number| range.contains(number));
        if integer.is_none() {
            self.problem(
                value.span(),
                format!(
                    "{key} is a whole number from {} to {}",
                    range.start(),
                    range.end()
                ),
            );
        }
        integer.and_then(|number| u32::try_from(number).ok())
    }

    /// Tables, marks and interfaces must tell uplinks apart.
    fn unique(
        &mut self,
        places: &[(UplinkName, Span)],
        uplinks: &BTreeMap<UplinkName, Uplink>,
        lan: &Lan,
    ) {
        for (index, (name, span)) in places.iter().enumerate() {
            let uplink = &uplinks[name];
            if let Some(interface) = &uplink.identity.interface
                && lan.interfaces.contains(interface)
            {
                self.problem(
                    *span,
                    format!("interface {interface} of {name} is one of [lan] interfaces too"),
                );
            }
            for pin in uplink.pin.iter().filter(|pin| {
                !lan.networks
                    .iter()
                    .any(|network| pin.is_subnet_of(*network))
            }) {
                self.problem(
                    *span,
                    format!("pin {pin} of {name} lies in none of [lan] networks"),
                );
            }
            for (earlier, _) in &places[..index] {
                let other = &uplinks[earlier];
                let (one, two) = (&uplink.identity, &other.identity);
                if one.matches(two) || two.matches(one) {
                    let message = format!(
                        "{earlier} and {name} match the same link: give one of them what the other has not"
                    );
                    self.problem(*span, message);
                }
                if let Some(pin) = uplink
                    .pin
                    .iter()
                    .find(|pin| other.pin.iter().any(|theirs| theirs.overlaps(**pin)))
                {
                    self.problem(*span, format!("{earlier} and {name} both pin {pin}"));
                }
                let (Some(ours), Some(theirs)) = (&uplink.routing, &other.routing) else {
                    continue;
                };
                if ours.table == theirs.table {
                    self.problem(
                        *span,
                        format!("{earlier} and {name} both have table {}", ours.table),
                    );
                }
                if ours.mark == theirs.mark && ours.table != theirs.table {
                    self.problem(
                        *span,
                        format!("{earlier} and {name} both have mark {}", ours.mark.value),
                    );
                }
            }
        }
    }
}
