//! What the kernel should hold for an uplink that is up: (configuration, link) to [`State`]. Pure; does not look at what
//! is installed. Each kind of entry is built in one place, below its notation, and has its form in `ownership`.

use std::borrow::Cow;
use std::rc::Rc;

use ipnetwork::Ipv4Network;

use crate::config::{Config, Routing, Uplink};
use crate::model::link::{LinkState, UplinkLink, UplinkLinks};
use crate::model::names::UplinkName;
use crate::model::netfilter::{Rule, Table};
use crate::model::route::{CLOSING_METRIC, FwMark, PROTOCOL, Route, RouteKind, RouteRule, TableId};
use crate::model::state::State;
use crate::reconcile::dnat::{self, AllChains, Chains};

/// An uplink whose link is up, or about to be.
#[derive(Debug)]
pub struct Up<'a> {
    name: &'a UplinkName,
    uplink: &'a Uplink,
    link: &'a UplinkLink,
    /// The chains of its forwards.
    chains: Cow<'a, Chains>,
}

impl<'a> Up<'a> {
    pub fn new(name: &'a UplinkName, uplink: &'a Uplink, link: &'a UplinkLink) -> Self {
        let chains = Cow::Owned(dnat::chains(name, &uplink.forwards));
        Self {
            name,
            uplink,
            link,
            chains,
        }
    }
}

/// All entries for this uplink. One without a routing table only masquerades and clamps.
pub fn desired(config: &Config, up: &Up) -> State {
    let mut state = State::default();
    if let Some(routing) = &up.uplink.routing {
        routes(up, routing, &mut state);
        route_rules(config, up, routing, &mut state);
        pins(config, up.uplink, routing, &mut state);
        connmark(up, routing, &mut state);
        state.src_valid_mark.insert(up.link.interface.clone());
    }
    if !up.uplink.forwards.is_empty() {
        forwards(up, &mut state);
        if up.uplink.hairpin {
            hairpin(config, up, &mut state);
        }
        if up.uplink.accept_forward {
            accept_forward(config, up, &mut state);
        }
    }
    if up.uplink.masquerade {
        masquerade(config, up, &mut state);
    }
    if up.uplink.clamp_mss {
        clamp_mss(up, &mut state);
    }
    state
}

/// What becomes of pinned hosts while their uplink is down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pins {
    /// They reach nothing outside.
    StayClosed,
    /// They are as free as all others.
    Go,
}

/// All of ours that should be there after a call: what it leaves alone, and the entries for the links in question.
/// Without a configuration entries can only be removed. `chains` are those that have been made already.
pub fn desired_state(
    config: Option<&Config>,
    chains: &AllChains,
    links: &UplinkLinks,
    closed: Pins,
    left_alone: State,
) -> State {
    let mut all = left_alone;
    for (name, link) in links {
        let Some((config, uplink)) =
            config.and_then(|config| Some((config, config.uplinks.get(name)?)))
        else {
            continue;
        };
        match link {
            Some(link) => {
                let up = match chains.get(name) {
                    Some(chains) => Up {
                        name,
                        uplink,
                        link,
                        chains: Cow::Borrowed(chains),
                    },
                    None => Up::new(name, uplink, link),
                };
                all.merge(desired(config, &up));
            }
            None if closed == Pins::StayClosed => all.merge(desired_down(config, uplink)),
            None => {}
        }
    }
    all
}

/// The entries of an uplink whose link is down: its pinned hosts reach nothing outside.
pub fn desired_down(config: &Config, uplink: &Uplink) -> State {
    let mut state = State::default();
    if let Some(routing) = uplink.routing.as_ref().filter(|_| !uplink.pin.is_empty()) {
        state.routes.insert(closing_route(routing));
        pins(config, uplink, routing, &mut state);
    }
    state
}

/// ```text
/// default dev ppp0 table 10 proto 109
/// unreachable default metric 4278198272 table 10 proto 109
/// ```
///
/// The kernel drops the first when the link goes; the second then keeps replies from leaving by
/// the default route with an address that the other provider drops as spoofed.
fn routes(up: &Up, routing: &Routing, state: &mut State) {
    let closing = closing_route(routing);
    if up.link.state == LinkState::Up {
        state.routes.insert(Route {
            metric: 0,
            kind: RouteKind::UNICAST,
            dev: Some(up.link.interface.to_string()),
            ..closing.clone()
        });
    }
    state.routes.insert(closing);
}

fn closing_route(routing: &Routing) -> Route {
    Route {
        table: routing.table,
        metric: CLOSING_METRIC,
        kind: RouteKind::UNREACHABLE,
        destination: Ipv4Network::new(0.into(), 0).expect("a prefix of no bits"),
        gateway: None,
        dev: None,
        protocol: PROTOCOL,
        rest: Vec::new(),
    }
}

/// ```text
/// 98:  from X to LAN lookup main proto 109
/// 98:  iif ppp0 fwmark 0xa/0xff lookup main proto 109
/// 99:  fwmark 0xa/0xff lookup 10 proto 109
/// 100: from X lookup 10 proto 109
/// ```
///
/// The first and the last stand once for each address of the link. The first lets X answer the LAN itself. The second sends what comes in by the link, and is marked, to the LAN; it also
/// answers when the reverse path filter of the LAN's interface looks the way back up (`fib_validate_source`,
/// net/ipv4/fib_frontend.c: with the link as iif). The third sends replies back by the link, whatever interface they come
/// in by, and tells the link's own reverse path filter that the way back is by the link.
fn route_rules(config: &Config, up: &Up, routing: &Routing, state: &mut State) {
    let priority = &config.priority;
    for address in &up.link.addresses {
        let address = Ipv4Network::from(*address);
        to_lan(config, address, state);
        state.rules.insert(RouteRule {
            from: Some(address),
            ..RouteRule::new(priority.source, routing.table)
        });
    }
    state.rules.insert(RouteRule {
        iif: Some(up.link.interface.to_string()),
        fwmark: Some(routing.mark),
        ..RouteRule::new(priority.local, TableId::MAIN)
    });
    state.rules.insert(RouteRule {
        fwmark: Some(routing.mark),
        ..RouteRule::new(priority.mark, routing.table)
    });
}

/// ```text
/// 98:  from PIN to LAN lookup main proto 109
/// 101: from PIN lookup 10 proto 109
/// ```
///
/// Behind the rule by mark: what came to the host by another uplink goes back there. The first lets the host reach the
/// LAN's other networks.
fn pins(config: &Config, uplink: &Uplink, routing: &Routing, state: &mut State) {
    for pin in &uplink.pin {
        to_lan(config, *pin, state);
        state.rules.insert(RouteRule {
            from: Some(*pin),
            ..RouteRule::new(config.priority.pin, routing.table)
        });
    }
}

/// `98: from SOURCE to LAN lookup main proto 109`, for each prefix of the LAN
fn to_lan(config: &Config, source: Ipv4Network, state: &mut State) {
    for network in &config.lan.networks {
        state.rules.insert(RouteRule {
            from: Some(source),
            to: Some(*network),
            ..RouteRule::new(config.priority.local, TableId::MAIN)
        });
    }
}

/// ```text
/// -A PREROUTING -i ppp0 -j mh-isp0
/// -A mh-isp0 -m connmark --mark 0x0/0xff -j CONNMARK --set-xmark 0xa/0xff
/// -A mh-isp0 -m connmark --mark 0xa/0xff -j CONNMARK --restore-mark --nfmask 0xff --ctmask 0xff
/// -A PREROUTING ! -i ppp0 -m connmark --mark 0xa/0xff -m comment --comment mh-isp0
///     -j CONNMARK --restore-mark --nfmask 0xff --ctmask 0xff
/// -A OUTPUT -m conntrack --ctdir REPLY -m connmark --mark 0xa/0xff -m comment --comment mh-isp0
///     -j CONNMARK --restore-mark --nfmask 0xff --ctmask 0xff
/// ```
///
/// What comes in by the link has its mark for `src_valid_mark` to count. What comes in by any other interface may be a
/// server's reply: nobody need list the bridges of containers and the tunnels. What the router itself says towards the
/// client, an ICMP error or a firewall's reset, has the direction REPLY; what it says to the server (fragmentation
/// needed, ORIGINAL) stays in the LAN.
fn connmark(up: &Up, routing: &Routing, state: &mut State) {
    let FwMark { mask, .. } = routing.mark;
    let unmarked = by_mark(FwMark { value: 0, mask });
    let marked = by_mark(routing.mark);
    let restore = format!("-j CONNMARK --restore-mark --nfmask {mask:#x} --ctmask {mask:#x}");
    let (interface, mark, own) = (&up.link.interface, routing.mark, up.name.chain());
    let rules = [
        format!("{unmarked} -j CONNMARK --set-xmark {mark}"),
        format!("{marked} {restore}"),
    ];
    let rules = Rc::new(rules.map(Rule).into());
    state.add_chain(Table::Mangle, up.name, &own, rules);
    let restore = format!("{marked} -m comment --comment {own} {restore}");
    for (chain, spec) in [
        ("PREROUTING", format!("-i {interface} -j {own}")),
        ("PREROUTING", format!("! -i {interface} {restore}")),
        ("OUTPUT", format!("-m conntrack --ctdir REPLY {restore}")),
    ] {
        state.add_rule(Table::Mangle, up.name, chain, Rule(spec));
    }
}

/// The match of a mark, which iptables prints without a mask where all bits count
/// (`print_mark`, extensions/libxt_connmark.c).
fn by_mark(mark: FwMark) -> String {
    match mark.mask {
        u32::MAX => format!("-m connmark --mark {:#x}", mark.value),
        _ => format!("-m connmark --mark {mark}"),
    }
}

/// ```text
/// -A PREROUTING -i ppp0 -m addrtype --dst-type LOCAL -j mh-isp0
/// -A mh-isp0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 192.168.0.2
/// ```
///
/// Only what is for an address of this router: a network that the provider routes to us, and what a VPN has decrypted, keep
/// their own ports.
fn forwards(up: &Up, state: &mut State) {
    let spec = format!(
        "-i {} -m addrtype --dst-type LOCAL -j {}",
        up.link.interface,
        up.name.chain()
    );
    state.add_rule(Table::Nat, up.name, "PREROUTING", Rule(spec));
    for (chain, rules) in &*up.chains {
        state.add_chain(Table::Nat, up.name, chain, rules.clone());
    }
}

/// ```text
/// -A PREROUTING -d X/32 -i eth1 -j mh-isp0
/// -A OUTPUT -d X/32 -j mh-isp0
/// -A POSTROUTING -s LAN -o eth1 -m conntrack --ctstate DNAT --ctorigdst X -m comment --comment mh-isp0 -j MASQUERADE
/// ```
///
/// The last makes the server answer to the router, which turns the reply round again; to a host
/// of its own LAN it would answer directly, from an address that was never asked.
fn hairpin(config: &Config, up: &Up, state: &mut State) {
    let chain = up.name.chain();
    let mut add = |at, spec| state.add_rule(Table::Nat, up.name, at, Rule(spec));
    for address in &up.link.addresses {
        add("OUTPUT", format!("-d {address}/32 -j {chain}"));
        for lan in &config.lan.interfaces {
            add("PREROUTING", format!("-d {address}/32 -i {lan} -j {chain}"));
            for network in &config.lan.networks {
                let spec = format!(
                    "-s {network} -o {lan} -m conntrack --ctstate DNAT --ctorigdst {address} \
                     -m comment --comment {chain} -j MASQUERADE"
                );
                add("POSTROUTING", spec);
            }
        }
    }
}

/// ```text
/// -I FORWARD -i ppp0 -m conntrack --ctstate DNAT -m comment --comment mh-isp0 -j ACCEPT
/// -I FORWARD -o ppp0 -m conntrack --ctstate DNAT -m comment --comment mh-isp0 -j ACCEPT
/// -I FORWARD -i eth1 -m conntrack --ctstate DNAT --ctorigdst X -m comment --comment mh-isp0 -j ACCEPT
/// ```
///
/// The last is for a hairpin, whose packets come from the LAN in both directions.
fn accept_forward(config: &Config, up: &Up, state: &mut State) {
    let UplinkLink {
        interface,
        addresses,
        ..
    } = up.link;
    let mut accept = |which: String| {
        let spec = format!("{which} -m comment --comment {} -j ACCEPT", up.name.chain());
        state.add_rule(Table::Filter, up.name, "FORWARD", Rule(spec));
    };
    accept(format!("-i {interface} -m conntrack --ctstate DNAT"));
    accept(format!("-o {interface} -m conntrack --ctstate DNAT"));
    for lan in config.lan.interfaces.iter().filter(|_| up.uplink.hairpin) {
        for address in addresses {
            accept(format!(
                "-i {lan} -m conntrack --ctstate DNAT --ctorigdst {address}"
            ));
        }
    }
}

/// ```text
/// -A FORWARD -o ppp0 -p tcp -m tcp --tcp-flags SYN,RST SYN -m comment --comment mh-isp0 -j TCPMSS --clamp-mss-to-pmtu
/// -A FORWARD -i ppp0 -p tcp -m tcp --tcp-flags SYN,RST SYN -m comment --comment mh-isp0 -j TCPMSS --set-mss 1452
/// ```
///
/// Both directions: each end is told by the other's SYN what it may send. On the way in the path's
/// MTU can't be asked for: the target looks up the way back without the mark, and finds the default
/// route (`tcpmss_reverse_mtu`, net/netfilter/xt_TCPMSS.c); so the link's own MTU, less 20 bytes of IP
/// and 20 of TCP, is named. It never raises a segment's size (`tcpmss_mangle_packet` there).
fn clamp_mss(up: &Up, state: &mut State) {
    let mut clamp = |way: &str, target: &str| {
        let spec = format!(
            "{way} {} -p tcp -m tcp --tcp-flags SYN,RST SYN -m comment --comment {} -j TCPMSS {target}",
            up.link.interface,
            up.name.chain()
        );
        state.add_rule(Table::Mangle, up.name, "FORWARD", Rule(spec));
    };
    let size = up.link.mtu.and_then(|mtu| mtu.checked_sub(40));
    if let Some(size) = size.filter(|size| (1..=0xffff).contains(size)) {
        clamp("-i", &format!("--set-mss {size}"));
    }
    clamp("-o", "--clamp-mss-to-pmtu");
}

/// `-A POSTROUTING -s 192.168.0.0/24 -o ppp0 -m comment --comment mh-isp0 -j MASQUERADE`
fn masquerade(config: &Config, up: &Up, state: &mut State) {
    for network in &config.lan.networks {
        let spec = format!(
            "-s {network} -o {} -m comment --comment {} -j MASQUERADE",
            up.link.interface,
            up.name.chain()
        );
        state.add_rule(Table::Nat, up.name, "POSTROUTING", Rule(spec));
    }
}
