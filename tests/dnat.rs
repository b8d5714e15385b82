//! The chains of an uplink's forwards: whatever the forwards are, a connection goes where the first that fits it says.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use ipnetwork::Ipv4Network;
use mh_hook::model::forward::{Forward, PortRange, Protocol};
use mh_hook::model::names::UplinkName;
use mh_hook::model::netfilter::{Rule, UplinkTable};
use mh_hook::reconcile::dnat::{chains, in_order, parse, rules};
use proptest::prelude::*;

/// A chain's name is shorter than this (`XT_EXTENSION_MAXNAMELEN`, linux/netfilter/x_tables.h).
const NAME_LENGTH: usize = 29;

struct Packet {
    source: Ipv4Addr,
    protocol: Protocol,
    port: u16,
}

/// The value behind an option of a rule.
fn value<'a>(spec: &'a Rule, option: &str) -> Option<&'a str> {
    let mut words = spec.0.split(' ');
    words.find(|word| *word == option)?;
    words.next()
}

fn fits(spec: &Rule, packet: &Packet) -> bool {
    let source = value(spec, "-s").is_none_or(|source| {
        let network: Ipv4Network = source.parse().expect("a prefix");
        network.contains(packet.source)
    });
    let protocol = value(spec, "-p").is_none_or(|name| {
        [
            packet.protocol.to_string(),
            packet.protocol.number().to_string(),
        ]
        .contains(&name.to_owned())
    });
    let port = value(spec, "--dport").is_none_or(|ports| {
        let (first, last) = ports.split_once(':').unwrap_or((ports, ports));
        let number = |text: &str| text.parse::<u16>().expect("a port");
        (number(first)..=number(last)).contains(&packet.port)
    });
    source && protocol && port
}

/// Where the chains send a packet, and how many rules it has met by then.
fn way<'a>(
    share: &'a UplinkTable,
    chain: &str,
    packet: &Packet,
    met: &mut usize,
) -> Option<&'a str> {
    for spec in share.chains[chain].iter() {
        *met += 1;
        if !fits(spec, packet) {
            continue;
        }
        if let Some(target) = value(spec, "--to-destination") {
            return Some(target);
        }
        let below = value(spec, "-j").expect("a jump");
        if let Some(target) = way(share, below, packet, met) {
            return Some(target);
        }
    }
    None
}

fn share(name: &UplinkName, forwards: &[Forward]) -> UplinkTable {
    UplinkTable {
        chains: chains(name, forwards),
        ..UplinkTable::default()
    }
}

fn name() -> UplinkName {
    UplinkName::parse("isp0-of-16-chars").expect("a name")
}

fn forward() -> impl Strategy<Value = Forward> {
    // A few blocks, so that many forwards share one, at both ends, too.
    let port = prop_oneof![
        8 => 20_000..20_300u16,
        1 => Just(1u16),
        1 => 1..=99u16,
        1 => 65_490..=65_535u16,
    ];
    let ports = prop_oneof![
        12 => port.clone().prop_map(|port| Some(PortRange::one(port))),
        2 => (port, 0..300u16).prop_map(|(port, more)| Some(PortRange { first: port, last: port.saturating_add(more) })),
        1 => Just(None),
    ];
    let protocols = prop_oneof![
        9 => Just(vec![Protocol::Tcp]),
        2 => Just(vec![Protocol::Tcp, Protocol::Udp]),
        1 => Just(vec![Protocol::Sctp]),
    ];
    let from = prop_oneof![4 => Just(vec![]), 1 => Just(vec!["198.51.100.0/24", "192.0.2.0/24"])];
    let open = prop_oneof![30 => Just(None), 1 => Just(Some(vec![])), 1 => Just(Some(vec![Protocol::Gre]))];
    (ports, protocols, from, open, 2..250u8).prop_map(|(ports, protocols, from, open, host)| {
        Forward {
            ports: ports.filter(|_| open.is_none()),
            protocols: open.unwrap_or(protocols).into(),
            address: None,
            to: Some(Ipv4Addr::new(192, 168, 0, host)),
            to_port: None,
            from: from
                .iter()
                .map(|from| from.parse().expect("a prefix"))
                .collect(),
        }
    })
}

#[test]
fn a_rule_is_read_back_as_the_forward_that_it_was_written_for() {
    let forward = Forward {
        protocols: vec![Protocol::Udp].into(),
        ports: Some(PortRange {
            first: 27015,
            last: 27030,
        }),
        address: Some(Ipv4Addr::new(203, 0, 113, 11)),
        to: Some(Ipv4Addr::new(192, 168, 0, 2)),
        to_port: None,
        from: vec!["198.51.100.0/24".parse().expect("a prefix")],
    };
    let whole = Forward {
        protocols: vec![].into(),
        ports: None,
        address: None,
        from: Vec::new(),
        ..forward.clone()
    };
    let moved = Forward {
        protocols: vec![Protocol::Tcp].into(),
        ports: Some(PortRange::one(2222)),
        to_port: Some(22),
        ..whole.clone()
    };
    let own = Forward {
        to: None,
        ..moved.clone()
    };
    let gre = Forward {
        protocols: vec![Protocol::Gre].into(),
        ..whole.clone()
    };
    for forward in [forward, whole, moved, own, gre] {
        let (_, rule) = rules(&forward).next().expect("a rule");
        assert_eq!(parse(&rule), Some(forward), "{rule}");
    }
    assert_eq!(parse(&Rule("-j mh-isp0.tcp100".into())), None);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_first_forward_that_fits_has_the_connection(
        forwards in prop::collection::vec(forward(), 1..400)
    ) {
        let share = share(&name(), &forwards);
        let flat: Vec<Rule> = forwards.iter().flat_map(rules).map(|(_, spec)| spec).collect();
        let mut sorted: Vec<&Rule> = in_order(&name(), &share).collect();
        let mut wanted: Vec<&Rule> = flat.iter().collect();
        sorted.sort();
        wanted.sort();
        prop_assert_eq!(sorted, wanted, "each rule stands once");
        for chain in share.chains.keys() {
            prop_assert!(chain.len() < NAME_LENGTH, "{}", chain);
            prop_assert_eq!(UplinkName::of_chain(chain), Some(name()));
        }
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp, Protocol::Gre] {
            for port in [1, 50, 99, 100, 19_999, 20_300, 65_500, 65_535].into_iter().chain((20_000..20_300).step_by(7)) {
                for source in [[198, 51, 100, 7], [192, 0, 2, 9], [8, 8, 8, 8]] {
                    let packet = Packet { source: source.into(), protocol, port };
                    let first = flat.iter().find(|spec| fits(spec, &packet));
                    let wanted = first.and_then(|spec| value(spec, "--to-destination"));
                    let found = way(&share, &name().chain(), &packet, &mut 0);
                    prop_assert_eq!(found, wanted, "{} {}", protocol, port);
                }
            }
        }
    }
}

fn single(port: u16) -> Forward {
    Forward {
        ports: Some(PortRange::one(port)),
        protocols: vec![Protocol::Tcp].into(),
        address: None,
        to: Some(Ipv4Addr::new(192, 168, 0, 2)),
        to_port: None,
        from: Vec::new(),
    }
}

#[test]
fn a_hundred_forwards_stand_in_one_chain_as_they_are_written() {
    let forwards: Vec<Forward> = (0..100).map(|index| single(65_000 - 7 * index)).collect();
    let share = share(&name(), &forwards);
    assert_eq!(share.chains.len(), 1);
    let flat: Vec<Rule> = forwards
        .iter()
        .flat_map(rules)
        .map(|(_, spec)| spec)
        .collect();
    assert_eq!(*share.chains[&name().chain()], flat);
}

#[test]
fn no_connection_meets_more_than_a_line_for_each_hundred_ports_and_those_of_its_own() {
    for (forwards, most) in [
        // 10,000 in a row, and 10,000 that are as far apart as they can be.
        ((20_001..=30_000).map(single).collect::<Vec<_>>(), 101 + 100),
        (
            (0..10_000).map(|index| single(1 + index * 6)).collect(),
            600 + 17,
        ),
    ] {
        let share = share(&name(), &forwards);
        let ports: BTreeSet<u16> = forwards
            .iter()
            .flat_map(|forward| forward.ports)
            .flat_map(|ports| ports.first..=ports.last)
            .collect();
        let mut longest = 0;
        for port in (1..=u16::MAX).rev().step_by(61) {
            let packet = Packet {
                source: [192, 0, 2, 9].into(),
                protocol: Protocol::Tcp,
                port,
            };
            let mut met = 0;
            let target = way(&share, &name().chain(), &packet, &mut met);
            assert_eq!(target.is_some(), ports.contains(&port));
            longest = longest.max(met);
        }
        assert!(longest <= most, "{longest} rules, and not {most}");
    }
}
