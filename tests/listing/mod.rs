//! Listings: what the kernel holds, from text (interfaces, and routes and rules as their `Display` has them), and in what two
//! of them differ.

use mh_hook::kernel::link::{Link, Links};
use mh_hook::kernel::routing::RoutingDump;
use mh_hook::model::route::{FwMark, NOT, Route, RouteKind, RouteRule, RuleAction, TableId};

/// An interface a line: `ppp0 203.0.113.10 up src_valid_mark`, `eth7 - up`, `eth1 192.168.0.1`.
pub fn links(lines: &str) -> Links {
    let link = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let link = Link {
            up: words.contains(&"up"),
            mtu: Some(1492),
            addresses: words[1].parse().into_iter().collect(),
            src_valid_mark: words.contains(&"src_valid_mark"),
            ..Link::default()
        };
        (words[0].to_owned(), link)
    };
    lines.lines().map(link).collect()
}

/// `rule priority 99 from all fwmark 0xa/0xff lookup 10 proto 109`, `route default dev ppp0 table 10 proto 109`
pub fn routing(lines: &str) -> RoutingDump {
    let mut dump = RoutingDump::default();
    for line in lines.lines() {
        let (kind, text) = line.split_once(' ').expect("a kind");
        let display = match kind {
            "rule" => {
                let rule = rule(text);
                let display = rule.to_string();
                dump.rules.push(rule);
                display
            }
            "route" => {
                let route = route(text);
                let display = route.to_string();
                dump.routes.push(route);
                display
            }
            _ => panic!("{line}"),
        };
        assert_eq!(display, text);
    }
    dump
}

fn table(name: &str) -> TableId {
    match name {
        "main" => TableId::MAIN,
        "local" => TableId::LOCAL,
        "default" => TableId(253),
        number => TableId(number.parse().expect("a table")),
    }
}

fn rule(text: &str) -> RouteRule {
    let mut rule = RouteRule {
        protocol: 0,
        ..RouteRule::new(0, TableId(0))
    };
    let mut words = text.split(' ');
    while let Some(word) = words.next() {
        let mut value = || words.next().expect("a value");
        match word {
            "priority" => rule.priority = value().parse().expect("a number"),
            "not" => rule.rest.push(NOT.to_owned()),
            "from" => rule.from = value().parse().ok(),
            "to" => rule.to = Some(value().parse().expect("a prefix")),
            "iif" => rule.iif = Some(value().trim_matches('\'').to_owned()),
            "fwmark" => rule.fwmark = FwMark::parse(value()),
            "lookup" => rule.action = RuleAction::Lookup(table(value())),
            "prohibit" => rule.action = RuleAction::Prohibit,
            "suppress_prefixlength" => {
                rule.suppress_prefixlength = Some(value().parse().expect("a number"));
            }
            "proto" => rule.protocol = value().parse().expect("a number"),
            _ => panic!("{text}"),
        }
    }
    rule
}

fn route(text: &str) -> Route {
    let mut route = Route {
        table: TableId::MAIN,
        metric: 0,
        kind: RouteKind::UNICAST,
        destination: "0.0.0.0/0".parse().expect("a prefix"),
        gateway: None,
        dev: None,
        protocol: 0,
        rest: Vec::new(),
    };
    let mut words = text.split(' ');
    while let Some(word) = words.next() {
        let mut value = || words.next().expect("a value");
        match word {
            "unreachable" => route.kind = RouteKind::UNREACHABLE,
            "default" => {}
            "via" => route.gateway = Some(value().parse().expect("an address")),
            "dev" => route.dev = Some(value().trim_matches('\'').to_owned()),
            "metric" => route.metric = value().parse().expect("a number"),
            "table" => route.table = table(value()),
            "proto" => route.protocol = value().parse().expect("a number"),
            prefix => route.destination = prefix.parse().expect("a prefix"),
        }
    }
    route
}

/// The lines that only one of the two has; both are short.
pub fn differences(expected: &str, found: &str) -> String {
    let only = |sign, a: &str, b: &str| -> String {
        a.lines()
            .filter(|line| !b.lines().any(|other| other == *line))
            .map(|line| format!("{sign}{line}\n"))
            .collect()
    };
    let text = only('-', expected, found) + &only('+', found, expected);
    if text.is_empty() {
        format!("the order differs; found:\n{found}")
    } else {
        text
    }
}
