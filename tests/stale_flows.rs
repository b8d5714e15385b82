//! Which tracked connections contradict a change of the forwards or the address, and no other.

use std::collections::BTreeMap;

use mh_hook::config::Config;
use mh_hook::kernel::conntrack;
use mh_hook::model::link::{LinkState, UplinkLink, UplinkLinks};
use mh_hook::model::names::{IfName, UplinkName};
use mh_hook::model::state::State;
use mh_hook::reconcile::desired::{Up, desired};
use mh_hook::reconcile::stale_flows::stale;

const X: &str = "203.0.113.10";
const FORMER: &str = "203.0.113.99";

/// A configuration with this table and these forwards, and what it asks for with this address.
fn state(rest: &str, address: &str) -> (Config, UplinkLinks, State) {
    let text = format!(
        "[lan]\ninterfaces = ['eth1']\nnetworks = ['192.168.0.0/24']\n[uplink.isp0]\ninterface = 'ppp0'\n{rest}"
    );
    let config = Config::parse(&text).expect("it holds");
    let name = UplinkName::parse("isp0").expect("a name");
    let link = UplinkLink {
        interface: IfName::parse("ppp0").expect("a name"),
        address: address.parse().expect("an address"),
        addresses: vec![address.parse().expect("an address")],
        state: LinkState::Up,
        mtu: None,
    };
    let up = Up {
        name: &name,
        uplink: &config.uplinks[&name],
        link: &link,
    };
    let state = desired(&config, &up);
    (config, BTreeMap::from([(name, Some(link))]), state)
}

/// Whether the flow contradicts the change from the state before to the configuration after.
fn is_stale(before: &State, after: &str, line: &str) -> bool {
    let (config, links, desired) = state(after, X);
    let flows = conntrack::parse(line);
    assert_eq!(flows.len(), 1, "{line}");
    !stale(&config, &links, before, &desired, &flows).is_empty()
}

/// A UDP flow from the Internet: asked for, answered by, and its mark.
fn udp(asked: &str, port: u16, by: &str, its: u16, mark: u32) -> String {
    format!(
        "udp      17 29 src=192.0.2.9 dst={asked} sport=4000 dport={port} src={by} dst=192.0.2.9 sport={its} dport=4000 [ASSURED] mark={mark} use=1"
    )
}

const ONE: &str = "table = 10\nforward = [{ proto = 'udp', port = 80, to = '192.168.0.2' }]";

#[test]
fn a_flow_from_before_its_forward_goes() {
    let nothing = State::default();
    assert!(is_stale(&nothing, ONE, &udp(X, 80, X, 80, 0)));
    assert!(
        !is_stale(&nothing, ONE, &udp(X, 81, X, 81, 0)),
        "no forward is for this port"
    );
    let limited = "table = 10\nforward = [{ proto = 'udp', port = 80, to = '192.168.0.2', from = ['198.51.100.0/24'] }]";
    assert!(
        !is_stale(&nothing, limited, &udp(X, 80, X, 80, 0)),
        "the forward is not for this source"
    );
    let esp = "table = 10\nforward = [{ proto = ['gre', 'esp'], to = '192.168.0.2' }]";
    for name in ["unknown 50", "gre 47"] {
        let line = format!(
            "{name} 29 src=192.0.2.9 dst={X} [UNREPLIED] src={X} dst=192.0.2.9 mark=10 use=1"
        );
        assert!(is_stale(&nothing, esp, &line), "{name}");
    }
    let tcp = "table = 10\nforward = [{ port = 80, to = '192.168.0.2' }]";
    assert!(
        !is_stale(&nothing, tcp, &udp(X, 80, X, 80, 0)),
        "nor for this protocol"
    );
}

#[test]
fn a_flow_that_its_forward_explains_stays() {
    let (_, _, before) = state(ONE, X);
    for from in [&State::default(), &before] {
        assert!(!is_stale(from, ONE, &udp(X, 80, "192.168.0.2", 80, 10)));
    }
    let more = "table = 10\nforward = [{ proto = 'udp', port = 80, to = '192.168.0.2' }, { port = 443, to = '192.168.0.3' }]";
    assert!(
        !is_stale(&before, more, &udp(X, 80, "192.168.0.2", 80, 10)),
        "another forward came"
    );
}

#[test]
fn a_flow_of_a_forward_that_went_or_leads_elsewhere_goes() {
    let (_, _, before) = state(ONE, X);
    let flow = udp(X, 80, "192.168.0.2", 80, 10);
    assert!(is_stale(&before, "table = 10", &flow), "removed");
    assert!(
        is_stale(&before, &ONE.replace("0.2'", "0.3'"), &flow),
        "another host"
    );
    assert!(
        is_stale(&before, &ONE.replace("0.2'", "0.2:81'"), &flow),
        "another port there"
    );
}

#[test]
fn what_others_redirect_is_theirs() {
    let (_, _, before) = state(ONE, X);
    let theirs = udp(X, 80, "192.168.0.77", 8080, 10);
    assert!(!is_stale(&before, ONE, &theirs));
    assert!(!is_stale(&before, "table = 10", &theirs));
}

#[test]
fn forwarded_flows_of_a_former_address_go() {
    let (_, _, before) = state(ONE, FORMER);
    assert!(is_stale(
        &before,
        ONE,
        &udp(FORMER, 80, "192.168.0.2", 80, 10)
    ));
    assert!(
        is_stale(
            &State::default(),
            ONE,
            &udp(FORMER, 80, "192.168.0.2", 80, 10)
        ),
        "down came in between"
    );
    assert!(
        !is_stale(&before, ONE, &udp(FORMER, 80, "192.168.0.2", 80, 0x14)),
        "it came by another uplink"
    );
    assert!(
        !is_stale(&before, ONE, &udp(FORMER, 80, FORMER, 80, 10)),
        "a prefix that is routed to us"
    );
}

#[test]
fn a_changed_mark_ends_what_bears_the_old() {
    let (_, _, before) = state(ONE, X);
    let flow = udp(X, 80, "192.168.0.2", 80, 0x10a);
    assert!(is_stale(
        &before,
        &ONE.replace("table = 10", "table = 10\nmark = 11"),
        &flow
    ));
    assert!(
        !is_stale(&before, ONE, &flow),
        "the bits of others do not count"
    );
}

#[test]
fn the_lan_has_a_say_only_with_hairpin() {
    let line = udp(X, 80, X, 80, 0).replace("192.0.2.9", "192.168.0.7");
    assert!(is_stale(&State::default(), ONE, &line));
    assert!(!is_stale(
        &State::default(),
        &format!("hairpin = false\n{ONE}"),
        &line
    ));
}

#[test]
fn flows_that_differ_by_source_only_go_together_unless_one_is_to_live() {
    let line = |source: &str| udp(X, 80, X, 80, 0).replace("192.0.2.9", source);
    let text = ["192.0.2.9", "192.0.2.10", "192.0.2.11"]
        .map(line)
        .join("\n");
    let flows = conntrack::parse(&text);
    let all: Vec<_> = flows.iter().collect();
    let together = "-D -p udp -d 203.0.113.10 -r 203.0.113.10 --dport 80 --reply-port-src 80";
    assert_eq!(conntrack::deletions(&flows, &all), [together]);
    assert_eq!(conntrack::deletions(&flows, &all[..2]).len(), 2);
    assert_eq!(conntrack::deletions(&flows, &[]), [""; 0]);
}

#[test]
fn what_deletes_a_flow_names_it_whole() {
    let lines = [
        (
            udp(X, 80, "192.168.0.2", 8080, 10),
            "-D -p udp -s 192.0.2.9 -d 203.0.113.10 -r 192.168.0.2 -q 192.0.2.9 --sport 4000 --dport 80",
        ),
        (
            "icmp     1 29 src=192.0.2.9 dst=203.0.113.10 type=8 code=0 id=7 src=203.0.113.10 dst=192.0.2.9 type=0 code=0 id=7 mark=0 use=1".into(),
            "-D -p icmp -s 192.0.2.9 -d 203.0.113.10 -r 203.0.113.10 -q 192.0.2.9 --icmp-type 8 --icmp-code 0 --icmp-id 7",
        ),
        (
            "unknown  50 599 src=192.0.2.9 dst=203.0.113.10 [UNREPLIED] src=192.168.0.2 dst=192.0.2.9 mark=10 use=1".into(),
            "-D -p 50 -s 192.0.2.9 -d 203.0.113.10 -r 192.168.0.2 -q 192.0.2.9",
        ),
    ];
    for (line, arguments) in lines {
        let flows: Vec<String> = conntrack::parse(&line)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(flows, [arguments]);
    }
    assert!(
        conntrack::parse("conntrack v1.4.7: 3 flow entries\n\nudp 17 29 src=1.2.3.4").is_empty()
    );
}
