//! Parses the text of a configuration, and finds all of its problems at once.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::slice;

use anyhow::{Context, Result, ensure};
use ipnetwork::Ipv4Network;
use toml_spanner::{Arena, Array, Item, Key, Span, Table, parse_recoverable};

use super::error::Problem;
use super::syntax;
use super::values::{address_or_prefix, host, integer, ports, prefix, printable, protocol, target};
use super::{Config, Identity, Lan, Priority, Routing, Uplink};
use crate::model::forward::{Forward, Protocol, overlapping};
use crate::model::names::{IfName, UplinkName};
use crate::model::nearest::nearest;
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
        let problem = syntax::problem(text, error.span().range(), error.message(text));
        broken.entry(line(&problem)).or_insert(problem);
    }
    problems.retain(|problem| !broken.contains_key(&line(problem)));
    problems.extend(broken.into_values());
    problems.sort_by_key(|problem| problem.at);
    let others = problems.len().saturating_sub(MAX_PROBLEMS + 1);
    problems.truncate(MAX_PROBLEMS + 1);
    if let Some(last) = problems.get_mut(MAX_PROBLEMS).filter(|_| others > 0) {
        last.message += &format!("; and {others} more problems");
    }
    problems
}

/// Between the priorities of the rules for the local and the main table (`ip-rule(8)`).
const PRIORITIES: RangeInclusive<u32> = 1..=32765;

const MARKS: RangeInclusive<u32> = 1..=u32::MAX;

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

    /// The parsed value of a key. None if the key is missing.
    fn value<'a, T>(
        &mut self,
        table: &'a Table<'a>,
        key: &str,
        parse: impl FnOnce(&'a Item<'a>) -> Result<T>,
    ) -> Option<T> {
        let value = table.get(key)?;
        self.take(value.span(), parse(value))
    }

    /// Adds a problem for each key that is not in the list. Returns the keys that were meant: they are not missing.
    fn check_keys(&mut self, table: &Table, (place, keys): Keys) -> Vec<&'static str> {
        let unknown = table.iter().filter(|(key, _)| !keys.contains(&key.name));
        let mut all_meant = Vec::new();
        for (Key { name, span }, _) in unknown {
            let meant = nearest(name, keys.iter().copied());
            let hint = match meant {
                Some(meant) => format!("did you mean {meant}?"),
                None => format!("its keys are {}", keys.join(", ")),
            };
            all_meant.extend(meant);
            self.problem(*span, format!("unknown key {name:?} in {place}; {hint}"));
        }
        all_meant
    }

    fn table<'a>(&mut self, root: &'a Table<'a>, key: &str) -> Option<&'a Table<'a>> {
        let what = || format!("{key} is a table: [{key}]");
        self.value(root, key, |value| value.as_table().with_context(what))
    }

    fn config(&mut self, root: &Table) -> Config {
        let meant = match self.is_broken {
            true => Vec::new(),
            false => self.check_keys(root, FILE),
        };
        let empty = Table::new();
        let [lan, mark, priority] =
            [("lan", LAN), ("mark", MARK), ("priority", PRIORITY)].map(|(key, keys)| {
                let table = self.table(root, key).unwrap_or(&empty);
                let meant = self.check_keys(table, keys);
                (table, meant)
            });
        let ((lan, meant_in_lan), (mark, _), (priority, _)) = (lan, mark, priority);
        let mask = self.integer(mark, "mask", MARKS).unwrap_or(0xff);
        let priority = self.priority(priority);
        let uplinks = self.table(root, "uplink").unwrap_or(&empty);
        if !uplinks.is_empty() && !meant.contains(&"lan") {
            self.require_lan(root, lan, &meant_in_lan);
        }
        let what = "interfaces is a list of interface names: [\"eth1\"]";
        let interfaces = self.list(lan, "interfaces", what, IfName::parse);
        let what = "networks is a list of prefixes: [\"192.168.0.0/24\"]";
        let networks = self.list(lan, "networks", what, prefix);
        let lan = Lan {
            interfaces,
            networks,
        };
        let uplinks = self.uplinks(uplinks, mask);
        self.check_uplinks(&uplinks, &lan);
        let uplinks = uplinks.into_iter().map(|(_, name, uplink)| (name, uplink));
        Config {
            lan,
            mask,
            priority,
            uplinks: uplinks.collect(),
        }
    }

    /// Adds a problem for each key of the LAN that is missing.
    fn require_lan(&mut self, root: &Table, lan: &Table, meant: &[&str]) {
        let place = root.get_key_value("lan");
        let place = place.map_or(Span::default(), |(key, _)| key.span);
        let is_missing = |key: &&&str| !lan.contains_key(key) && !meant.contains(*key);
        for key in LAN.1.iter().filter(is_missing) {
            let what = format!("key {key} in [lan]: required once there is an uplink");
            self.missing(place, &what);
        }
    }

    fn priority(&mut self, table: &Table) -> Priority {
        let mut value = |key, default| self.integer(table, key, PRIORITIES).unwrap_or(default);
        let (local, mark, source) = (value("local", 98), value("mark", 99), value("source", 100));
        let mut pin = value("pin", 101);
        if !table.contains_key("pin") {
            // A file that only sets the others must be valid without a word of pins.
            pin = pin.max(mark + 1);
        }
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
        Priority {
            local,
            mark,
            source,
            pin,
        }
    }

    fn uplinks(&mut self, table: &Table, mask: u32) -> Vec<(Span, UplinkName, Uplink)> {
        let mut uplinks = Vec::new();
        for (key, value) in table {
            let Some(name) = self.take(key.span, UplinkName::parse(key.name)) else {
                continue;
            };
            let what = || format!("an uplink is a table: [uplink.{name}]");
            let table = value.as_table().with_context(what);
            let Some(table) = self.take(value.span(), table) else {
                continue;
            };
            if uplinks.len() == MAX_UPLINKS {
                self.problem(key.span, format!("more than {MAX_UPLINKS} uplinks"));
                break;
            }
            let uplink = self.uplink(key, table, mask);
            // Without an identity it would match every other uplink's link.
            if uplink.identity != Identity::default() {
                uplinks.push((key.span, name, uplink));
            }
        }
        uplinks
    }

    fn uplink(&mut self, name: &Key, table: &Table, mask: u32) -> Uplink {
        let meant = self.check_keys(table, UPLINK);
        let what = "pin is a list of LAN sources: [\"192.168.0.2\"]";
        Uplink {
            identity: self.identity(name, table, &meant),
            routing: self.routing(name, table, mask, &meant),
            masquerade: self.boolean(table, "masquerade", true),
            hairpin: self.boolean(table, "hairpin", true),
            clamp_mss: self.boolean(table, "clamp-mss", true),
            accept_forward: self.boolean(table, "accept-forward", false),
            pin: self.list(table, "pin", what, address_or_prefix),
            forwards: self.forwards(table),
        }
    }

    /// The routing table and mark. None if the table is not given, which is a problem if another key needs it.
    fn routing(&mut self, name: &Key, table: &Table, mask: u32, meant: &[&str]) -> Option<Routing> {
        let id = self.table_id(table);
        if !table.contains_key("table") && !meant.contains(&"table") {
            let needs = ["forward", "mark", "pin"];
            for (key, _) in needs.iter().filter_map(|key| table.get_key_value(key)) {
                let what = format!(
                    "key table in [uplink.{}]: {} needs a routing table of its own: table = 10",
                    name.name, key.name
                );
                self.missing(key.span, &what);
            }
        }
        let (given, value) = match table.get("mark") {
            Some(value) => (self.integer(table, "mark", MARKS)?, value),
            None => (id?.0, table.get("table")?),
        };
        if given & !mask != 0 {
            let (low, high) = (1u32 << mask.trailing_zeros(), mask);
            let message = format!(
                "mark {given} does not fit the mask {mask:#x}: give mark = {low} to {high} within it, or widen [mark] mask"
            );
            self.problem(value.span(), message);
        }
        let mark = FwMark { value: given, mask };
        Some(Routing { table: id?, mark })
    }

    fn identity(&mut self, name: &Key, table: &Table, meant: &[&str]) -> Identity {
        let mut text = |key| self.value(table, key, |value| printable(value, key));
        let (ipparam, linkname, peer) = (text("ipparam"), text("linkname"), text("peer"));
        let interface = self.value(table, "interface", |value| {
            let text = value.as_str().context("interface is a name: \"ppp0\"");
            text.and_then(IfName::parse)
        });
        let keys = ["interface", "ipparam", "linkname", "peer", "address"];
        if !keys
            .iter()
            .any(|key| table.contains_key(key) || meant.contains(key))
        {
            let what = format!(
                "interface in [uplink.{}]: say which link this is by interface, ipparam, linkname, peer or address: \
                 interface = \"ppp0\"",
                name.name
            );
            self.missing(name.span, &what);
        }
        Identity {
            interface,
            ipparam,
            linkname,
            peer,
            address: self.address(table),
        }
    }

    fn table_id(&mut self, table: &Table) -> Option<TableId> {
        self.value(table, "table", |value| {
            let id = integer(value, "table", 1..=0x7fff_ffff)?;
            ensure!(
                !(253..=255).contains(&id),
                "table {id} is the system's (default, main, local): use 1 to 252, or above 255"
            );
            Ok(TableId(id))
        })
    }

    fn forwards(&mut self, table: &Table) -> Vec<Forward> {
        let example = "forward is a list of tables: [{ port = 80, to = \"192.168.0.2\" }]";
        let items = self.items(table, "forward", example);
        let mut forwards: Vec<Forward> = Vec::with_capacity(items.len());
        let mut places = Vec::with_capacity(items.len());
        for item in items {
            let table = self.take(item.span(), item.as_table().context(example));
            let each = table.and_then(|table| self.forward(item, table));
            for forward in each.unwrap_or_default() {
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
        let meant = self.check_keys(table, FORWARD);
        let protocols = match table.get("proto") {
            None => Some(Cow::Borrowed(&[Protocol::Tcp][..])),
            Some(value) => self.protocols(value).map(Cow::Owned),
        };
        let ports = match table.get("port") {
            Some(value) => self.take(value.span(), ports(value)),
            None => Some(Vec::new()),
        };
        let to = self.value(table, "to", target);
        if !table.contains_key("to") && !meant.contains(&"to") {
            self.missing(item.span(), "to: the LAN host: to = \"192.168.0.2\"");
        }
        let what = "from is a list of source prefixes: [\"198.51.100.0/24\"]";
        let from = self.list(table, "from", what, address_or_prefix);
        if let Some(list) = table["from"].as_array()
            && list.is_empty()
        {
            let message = "an empty from lets nobody in; leave it out to let everybody in";
            self.problem(list.span(), message);
        }
        let address = self.address(table);
        let (protocols, ports, (to, to_port)) = (protocols?, ports?, to?);
        let portless =
            protocols.is_empty() || !protocols.iter().all(|protocol| protocol.has_ports());
        if !ports.is_empty() && portless {
            self.problem(
                table["port"].span(),
                "only tcp, udp and sctp have ports: leave port out, or name these protocols only",
            );
        }
        let is_one = ports.len() == 1 && ports[0].is_one();
        if to_port.is_some() && !is_one {
            self.problem(
                table["to"].span(),
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
        self.value(table, "address", |value| {
            let text = value.as_str();
            let text = text.context("address is an IPv4 address of the link: \"203.0.113.10\"");
            text.and_then(host)
        })
    }

    /// The protocols. Empty for "any".
    fn protocols(&mut self, value: &Item) -> Option<Vec<Protocol>> {
        if value.as_str() == Some("any") {
            return Some(Vec::new());
        }
        let list = value.as_array();
        let names = list.map_or(slice::from_ref(value), Array::as_slice);
        if names.is_empty() {
            self.problem(
                value.span(),
                "an empty proto forwards nothing; leave it out for tcp",
            );
        }
        let protocols = self.all(names, "proto", protocol);
        Some(protocols).filter(|protocols| !protocols.is_empty())
    }

    /// A list of parsed strings.
    fn list<T: PartialEq>(
        &mut self,
        table: &Table,
        key: &str,
        what: &'static str,
        parse: fn(&str) -> Result<T>,
    ) -> Vec<T> {
        let items = self.items(table, key, what);
        self.all(items, key, |item| {
            item.as_str().context(what).and_then(parse)
        })
    }

    /// The items of a list. Empty if the key is missing.
    fn items<'a>(&mut self, table: &'a Table<'a>, key: &str, what: &'static str) -> &'a [Item<'a>] {
        let list = self.value(table, key, |value| {
            value.as_array().with_context(|| match value.as_str() {
                Some(text) => format!("{key} is a list, in brackets: {key} = [{text:?}]"),
                None => what.to_owned(),
            })
        });
        list.map_or(&[], Array::as_slice)
    }

    /// Each item, parsed. Adds a problem for each that can't be parsed, and for duplicates.
    fn all<T: PartialEq>(
        &mut self,
        items: &[Item],
        key: &str,
        parse: impl Fn(&Item) -> Result<T>,
    ) -> Vec<T> {
        let mut list = Vec::new();
        for item in items {
            let Some(parsed) = self.take(item.span(), parse(item)) else {
                continue;
            };
            if list.contains(&parsed) {
                self.problem(item.span(), format!("is listed twice in {key}"));
            } else {
                list.push(parsed);
            }
        }
        list
    }

    fn boolean(&mut self, table: &Table, key: &str, default: bool) -> bool {
        let what = || match table.get(key).and_then(Item::as_str) {
            Some("true" | "yes" | "on") => format!("{key} is true or false, without quotes: true"),
            Some("false" | "no" | "off") => {
                format!("{key} is true or false, without quotes: false")
            }
            _ => format!("{key} is true or false"),
        };
        let value = self.value(table, key, |value| value.as_bool().with_context(what));
        value.unwrap_or(default)
    }

    fn integer(&mut self, table: &Table, key: &str, range: RangeInclusive<u32>) -> Option<u32> {
        self.value(table, key, |value| integer(value, key, range))
    }

    /// Adds a problem for each pair of uplinks that have in common what must be different, and for each uplink that
    /// contradicts the LAN.
    fn check_uplinks(&mut self, uplinks: &[(Span, UplinkName, Uplink)], lan: &Lan) {
        for (index, (span, name, uplink)) in uplinks.iter().enumerate() {
            let mut messages = conflicts_with_lan(name, uplink, lan);
            for (_, earlier, one) in &uplinks[..index] {
                messages.extend(conflicts((earlier, one), (name, uplink)));
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
