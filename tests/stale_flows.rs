//! Which tracked connections contradict a change of the forwards or the address, and no other.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use mh_hook::config::Config;
use mh_hook::kernel::conntrack::{Flow, Tuple};
use mh_hook::model::link::{LinkState, UplinkLink, UplinkLinks};
use mh_hook::model::names::{IfName, UplinkName};
use mh_hook::model::state::State;
use mh_hook::reconcile::desired::{Up, desired};
use mh_hook::reconcile::stale_flows::Judges;

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
    let up = Up::new(&name, &config.uplinks[&name], &link);
    let state = desired(&config, &up);
    (config, BTreeMap::from([(name, Some(link))]), state)
}

/// Whether the flow contradicts the change from the state before to the configuration after, where the default route is by
/// another link.
fn is_stale(before: &State, after: &str, flow: &Flow) -> bool {
    is_stale_by(before, after, flow, "ppp1")
}

/// The same, where the flow's packets leave by this interface.
fn is_stale_by(before: &State, after: &str, flow: &Flow, interface: &str) -> bool {
    let (config, links, desired) = state(after, X);
    let judges = Judges::new(&config, &links, before, &desired);
    judges.is_stale(flow, |_| Some(interface.to_owned()))
}

fn address(text: &str) -> Ipv4Addr {
    text.parse().expect("an address")
}

/// A UDP flow from the Internet: asked for, answered by, and its mark.
fn udp(asked: &str, port: u16, by: &str, its: u16, mark: u32) -> Flow {
    udp_of("192.0.2.9", asked, port, by, its, mark)
}

fn udp_of(source: &str, asked: &str, port: u16, by: &str, its: u16, mark: u32) -> Flow {
    let tuple = |source, destination, ports| Tuple {
        source: address(source),
        destination: address(destination),
        ports: Some(ports),
    };
    let mut flow = Flow::new(
        17,
        tuple(source, asked, (4000, port)),
        tuple(by, source, (its, 4000)),
    );
    flow.mark = mark;
    flow
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
    for protocol in [50, 47] {
        let mut flow = udp(X, 80, X, 80, 10);
        flow.protocol = protocol;
        (flow.original.ports, flow.reply.ports) = (None, None);
        assert!(is_stale(&nothing, esp, &flow), "{protocol}");
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
    let flow = udp_of("192.168.0.7", X, 80, X, 80, 0);
    assert!(is_stale(&State::default(), ONE, &flow));
    assert!(!is_stale(
        &State::default(),
        &format!("hairpin = false\n{ONE}"),
        &flow
    ));
}

#[test]
fn what_the_lan_began_before_its_masquerade_goes() {
    let nothing = State::default();
    let (_, _, before) = state(ONE, X);
    let bare = udp_of("192.168.0.3", "192.0.2.9", 5060, "192.0.2.9", 5060, 0);
    assert!(is_stale_by(&nothing, ONE, &bare, "ppp0"));
    assert!(
        !is_stale_by(&nothing, ONE, &bare, "ppp1"),
        "by another link"
    );
    assert!(
        !is_stale_by(&before, ONE, &bare, "ppp0"),
        "masqueraded before"
    );
    let without = format!("masquerade = false\n{ONE}");
    assert!(!is_stale_by(&nothing, &without, &bare, "ppp0"));
    let mut masqueraded = bare.clone();
    masqueraded.reply.destination = address(X);
    assert!(!is_stale_by(&nothing, ONE, &masqueraded, "ppp0"));
    let inside = udp_of("192.168.0.3", "192.168.0.9", 53, "192.168.0.9", 53, 0);
    assert!(!is_stale_by(&nothing, ONE, &inside, "ppp0"));
    let from_outside = udp("192.168.0.3", 53, "192.168.0.3", 53, 0);
    assert!(!is_stale_by(&nothing, ONE, &from_outside, "ppp0"));
}

#[test]
fn what_deletes_a_flow_names_it_whole() {
    let flow = udp(X, 80, "192.168.0.2", 8080, 10);
    let words = "-D -p udp -s 192.0.2.9 -d 203.0.113.10 -r 192.168.0.2 -q 192.0.2.9 --sport 4000 --dport 80";
    assert_eq!(flow.to_string(), words);
    let mut ipip = flow;
    ipip.protocol = 4;
    (ipip.original.ports, ipip.reply.ports) = (None, None);
    let words = "-D -p 4 -s 192.0.2.9 -d 203.0.113.10 -r 192.168.0.2 -q 192.0.2.9";
    assert_eq!(ipip.to_string(), words);
}
