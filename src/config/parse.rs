//! Parses the text of a configuration, and finds all of its problems at once.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

use anyhow::{Context, Result};
use ipnetwork::Ipv4Network;
use toml_spanner::{Arena, Array, Item, Key, Span, Table, parse_recoverable};

use super::error::Problem;
use super::values::{address_or_prefix, host, ports, prefix, target};
use super::{Config, Identity, Lan, Priority, Routing, Uplink};
use crate::model::forward::{Forward, Protocol, overlapping};
use crate::model::names::{IfName, UplinkName};
use crate::model::route::{FwMark, TableId};

/// How many problems are reported.
const MAX_PROBLEMS: usize = 100;

/// How many uplinks there may be: each one is compared with all others.
const MAX_UPLINKS: usize = 500;

/// Parses the text of a configuration.
/// Errors: all problems, in the order of the text.
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
    Err(reported(text, syntax, reader.problems))
}

/// The problems to report, in the order of the text. After a syntax error the parser goes on as well as it can. So of a
/// line with a syntax error, only the first one is reported: the others may be consequences.
fn reported(
    text: &str,
    syntax: &[toml_spanner::Error],
    mut problems: Vec<Problem>,
) -> Vec<Problem> {
    let starts: Vec<usize> = text.match_indices('\n').map(|(at, _)| at).collect();
    let line = |problem: &Problem| starts.partition_point(|at| *at < problem.at);
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
        let message = format!("{message}; and {others} more problems");
        problems.push(Problem { at, message });
    }
    problems
}

/// Between the priorities of the rules for the local and the main table (`ip-rule(8)`).
const PRIORITIES: RangeInclusive<u64> = 1..=32765;

/// The name of a table in messages, and its keys.
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
        "address",
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
const FORWARD: Keys = ("a forward", &["proto", "port", "to", "from", "address"]);

/// All tables with their keys.
pub const KEYS: [Keys; 6] = [FILE, LAN, MARK, PRIORITY, UPLINK, FORWARD];

/// Reads the parsed document, and collects the problems.
struct Reader {
    /// Whether there was a syntax error. Then parts of the document are missing, and others can be in the wrong table.
    is_broken: bool,
    problems: Vec<Problem>,
}

impl Reader {
    fn problem(&mut self, span: Span, message: impl Into<String>) {
        self.problems.push(Problem::new(span, message));
    }

    /// Adds a problem, unless a syntax error may be why something is missing.
    fn missing(&mut self, span: Span, what: &str) {
        if !self.is_broken {
            self.problem(span, format!("missing {what}"));
        }
    }

    /// The value. If it is an error, adds a problem.
    fn take<T>(&mut self, span: Span, value: Result<T>) -> Option<T> {
        value
            .map_err(|error| self.problem(span, format!("{error:#}")))
            .ok()
    }

    /// Adds a problem for each key that is not in the list.
    fn check_keys(&mut self, table: &Table, (place, keys): Keys) {
        let unknown = table.iter().filter(|(key, _)| !keys.contains(&key.name));
        for (Key { name, span }, _) in unknown {
            let known = keys.join(", ");
            self.problem(
                *span,
                format!("unknown key {name:?} in {place}; its keys are {known}"),
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
            self.check_keys(root, FILE);
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
        self.require_lan(root);
        self.check_uplinks(&places, &uplinks, &lan);
        Config {
            lan,
            mask,
            priority,
            uplinks,
        }
    }

    /// Adds a problem for each key of the LAN that is missing, if there is an uplink.
    fn require_lan(&mut self, root: &Table) {
        let uplinks = root.get("uplink").and_then(Item::as_table);
        if uplinks.is_none_or(|uplinks| uplinks.is_empty()) {
            return;
        }
        let (place, lan) = match root.get_key_value("lan") {
            Some((key, value)) => (key.span, value.as_table()),
            None => (Span::default(), None),
        };
        for key in LAN.1 {
            if lan.is_none_or(|lan| !lan.contains_key(key)) {
                let what = format!("key {key} in [lan]: required once there is an uplink");
                self.missing(place, &what);
            }
        }
    }

    fn lan(&mut self, root: &Table) -> Lan {
        let Some(table) = self.table(root, "lan") else {
            return Lan::default();
        };
        self.check_keys(table, LAN);
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
        self.check_keys(table, MARK);
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
        self.check_keys(table, PRIORITY);
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
            // A file that only sets the others must be valid without a word of pins.
            priority.pin = priority.pin.max(priority.mark + 1);
        }
        let Priority {
            local,
            mark,
            source,
            pin,
        } = priority;
        // Traffic to the LAN must not go to an uplink; a reply goes by its connection's uplink, even if its host is pinned
        // to another one.
        if let Some((key, _)) = table.iter().next()
            && !(local < mark && local < source && mark < pin)
        {
            let message = format!(
                "local must be less than mark, source and pin, and mark less than pin; \
                 local is {local}, mark {mark}, source {source}, pin {pin}"
            );
            self.problem(key.span, message);
        }
        priority
    }

    fn uplink(&mut self, name: &Key, table: &Table, mask: u32) -> Option<Uplink> {
        self.check_keys(table, UPLINK);
        let identity = self.identity(name, table);
        let pin = self.list(
            table,
            "pin",
            "LAN sources: [\"192.168.0.2\"]",
            address_or_prefix,
        );
        let masquerade = self.boolean(table, "masquerade").unwrap_or(true);
        let forwards = self.forwards(table);
        let routing = self.routing(name, table, mask);
        Some(Uplink {
            identity: identity?,
            routing,
            masquerade,
            hairpin: self.boolean(table, "hairpin").unwrap_or(true),
            clamp_mss: self.boolean(table, "clamp-mss").unwrap_or(true),
            accept_forward: self.boolean(table, "accept-forward").unwrap_or(false),
            pin,
            forwards,
        })
    }

    /// The routing table and mark. None if the table is not given, which is a problem if another key needs it.
    fn routing(&mut self, name: &Key, table: &Table, mask: u32) -> Option<Routing> {
        let id = self.table_id(table);
        if table.get("table").is_none() {
            for needs in ["forward", "mark", "pin"] {
                let Some((key, _)) = table.get_key_value(needs) else {
                    continue;
                };
                let what = format!(
                    "key table in [uplink.{}]: {needs} needs a routing table of its own: table = 10",
                    name.name
                );
                self.missing(key.span, &what);
            }
        }
        let given = table.get("mark");
        let mark = match given {
            Some(_) => self.integer(table, "mark", 1..=u32::MAX.into()),
            None => id.map(|TableId(id)| id),
        }?;
        if mark & !mask != 0 {
            let at = given.or(table.get("table")).map_or(name.span, Item::span);
            let (low, high) = (1u32 << mask.trailing_zeros(), mask);
            let message = format!(
                "mark {mark} does not fit the mask {mask:#x}: give mark = {low} to {high} within it, or widen [mark] mask"
            );
            self.problem(at, message);
        }
        let mark = FwMark { value: mark, mask };
        Some(Routing { table: id?, mark })
    }

    fn identity(&mut self, name: &Key, table: &Table) -> Option<Identity> {
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
            address: self.address(table),
        };
        if !["interface", "ipparam", "linkname", "peer", "address"]
            .iter()
            .any(|key| table.contains_key(key))
        {
            let what = format!(
                "interface in [uplink.{}]: say which link this is by interface, ipparam, linkname, peer or address: \
                 interface = \"ppp0\"",
                name.name
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
            for forward in self.forward(item, table).unwrap_or_default() {
                forwards.push(forward);
                places.push(item.span());
            }
        }
        for (later, earlier) in overlapping(&forwards) {
            let earlier = &forwards[earlier];
            let message = format!("overlaps the forward {earlier} above it");
            self.problem(places[later], message);
        }
        forwards
    }

    /// The forwards that a table stands for: one for each range of ports.
    fn forward(&mut self, item: &Item, table: &Table) -> Option<Vec<Forward>> {
        self.check_keys(table, FORWARD);
        let protocols = match table.get("proto") {
            None => Some(Cow::Borrowed(&[Protocol::Tcp][..])),
            Some(value) => self.protocols(value).map(Cow::Owned),
        };
        let ports = match table.get("port") {
            Some(value) => self.take(value.span(), ports(value)),
            None => Some(Vec::new()),
        };
        let to = match table.get("to") {
            Some(value) => self.take(value.span(), target(value)),
            None => {
                self.missing(item.span(), "to: the LAN host: to = \"192.168.0.2\"");
                None
            }
        };
        let from = self.sources(table);
        let address = self.address(table);
        let (protocols, ports, (to, to_port)) = (protocols?, ports?, to?);
        let portless =
            protocols.is_empty() || !protocols.iter().all(|protocol| protocol.has_ports());
        if !ports.is_empty() && portless {
            let span = table.get("port").map_or(item.span(), Item::span);
            self.problem(
                span,
                "only tcp, udp and sctp have ports: leave port out, or name these protocols only",
            );
        }
        let is_one = ports.len() == 1 && ports[0].is_one();
        if to_port.is_some() && !is_one {
            let span = table.get("to").map_or(item.span(), Item::span);
            self.problem(
                span,
                "to can have a port if port is a single one; several ports stay as they are, so give the address alone",
            );
        }
        let forward = Forward {
            protocols,
            ports: None,
            address,
            to,
            to_port,
            from,
        };
        if ports.is_empty() {
            return Some(vec![forward]);
        }
        let each = ports.into_iter().map(|ports| Forward {
            ports: Some(ports),
            ..forward.clone()
        });
        Some(each.collect())
    }

    /// The address of a link.
    fn address(&mut self, table: &Table) -> Option<Ipv4Addr> {
        let value = table.get("address")?;
        let text = value.as_str();
        let text = text.context("address is an IPv4 address of the link: \"203.0.113.10\"");
        self.take(value.span(), text.and_then(host))
    }

    /// The sources that may use a forward. Empty if `from` is not given, for all.
    fn sources(&mut self, table: &Table) -> Vec<Ipv4Network> {
        let what = "source prefixes: [\"198.51.100.0/24\"]";
        if let Some(value) = table.get("from")
            && value.as_array().is_some_and(|list| list.is_empty())
        {
            let message = "an empty from lets nobody in; leave it out to let everybody in";
            self.problem(value.span(), message);
        }
        self.list(table, "from", what, address_or_prefix)
    }

    /// The protocols. Empty for "any".
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
                _ if text == "any" => "\"any\" can't be in a list; write proto = \"any\"",
                Some(protocol) if protocols.contains(&protocol) => "is listed twice in proto",
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

    /// A list of parsed strings. Adds a problem for each that can't be parsed, and for duplicates.
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
                self.problem(item.span(), format!("is listed twice in {key}"));
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

    /// Adds a problem for each pair of uplinks that have in common what must be different, and for each uplink that
    /// contradicts the LAN.
    fn check_uplinks(
        &mut self,
        places: &[(UplinkName, Span)],
        uplinks: &BTreeMap<UplinkName, Uplink>,
        lan: &Lan,
    ) {
        for (index, (name, span)) in places.iter().enumerate() {
            let uplink = &uplinks[name];
            let mut messages = conflicts_with_lan(name, uplink, lan);
            for (earlier, _) in &places[..index] {
                messages.extend(conflicts((earlier, &uplinks[earlier]), (name, uplink)));
            }
            for message in messages {
                self.problem(*span, message);
            }
        }
    }
}

fn conflicts_with_lan(name: &UplinkName, uplink: &Uplink, lan: &Lan) -> Vec<String> {
    let interface = uplink.identity.interface.iter();
    let interface = interface.filter(|interface| lan.interfaces.contains(interface));
    let interface = interface
        .map(|interface| format!("interface {interface} of {name} is in [lan] interfaces, too"));
    let in_lan = |pin: &Ipv4Network| lan.networks.iter().any(|lan| pin.is_subnet_of(*lan));
    let pins = uplink.pin.iter().filter(|pin| !in_lan(pin));
    let pins = pins.map(|pin| format!("pin {pin} of {name} is in none of the [lan] networks"));
    interface.chain(pins).collect()
}

/// What two uplinks have in common that must be different.
fn conflicts(
    (earlier, one): (&UplinkName, &Uplink),
    (name, two): (&UplinkName, &Uplink),
) -> Vec<String> {
    let mut messages = Vec::new();
    if one.identity.matches(&two.identity) || two.identity.matches(&one.identity) {
        messages.push(format!(
            "{earlier} and {name} match the same link: give one of them a key that the other does not have"
        ));
    }
    let is_pinned = |pin: &&Ipv4Network| one.pin.iter().any(|earlier| earlier.overlaps(**pin));
    if let Some(pin) = two.pin.iter().find(is_pinned) {
        messages.push(format!("{earlier} and {name} both pin {pin}"));
    }
    if let (Some(one), Some(two)) = (&one.routing, &two.routing) {
        if one.table == two.table {
            messages.push(format!(
                "{earlier} and {name} both have table {}",
                two.table
            ));
        } else if one.mark == two.mark {
            let mark = two.mark.value;
            messages.push(format!("{earlier} and {name} both have mark {mark}"));
        }
    }
    messages
}
