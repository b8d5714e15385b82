//! What the kernel should hold for an uplink that is up: (configuration, address) to [`State`].
//! Pure; does not look at what is.

use std::fmt;
use std::rc::Rc;

use crate::claim::{Addressed, Running};
use crate::config::{Config, Routing, Uplink};
use crate::iptables::loose_note;
use crate::state::{
    CLOSING_METRIC, FwMark, Loose, Route, RouteRule, Rulespec, Share, State, Table, TableId,
    UplinkName,
};

/// An uplink whose link is up, or about to be.
#[derive(Debug)]
pub struct Up<'a> {
    /// Its name.
    pub name: &'a UplinkName,
    /// Its configuration.
    pub uplink: &'a Uplink,
    /// Its link.
    pub link: &'a Addressed,
}

/// All entries for this uplink. One without a routing table only masquerades and clamps.
pub fn desired(config: &Config, up: &Up) -> State {
    let mut state = State::default();
    let mut mangle = Share::default();
    let mut nat = Share::default();
    let mut filter = Share::default();
    if let Some(routing) = &up.uplink.routing {
        routes(up, routing, &mut state);
        route_rules(config, up, routing, &mut state);
        pins(config, up, routing, &mut state);
        connmark(config, up, routing, &mut mangle);
    }
    if !up.uplink.forwards.is_empty() {
        if let Some(before) = up.link.strict {
            loosen(up, before, &mut state, &mut mangle);
        }
        forwards(up, &mut nat);
        if up.uplink.hairpin {
            hairpin(config, up, &mut nat);
        }
        if up.uplink.accept_forward {
            accept_forward(config, up, &mut filter);
        }
    }
    if up.uplink.masquerade {
        masquerade(config, up, &mut nat);
    }
    if up.uplink.clamp_mss {
        clamp_mss(up, &mut mangle);
    }
    for (table, share) in [
        (Table::Mangle, mangle),
        (Table::Nat, nat),
        (Table::Filter, filter),
    ] {
        state.insert((table, up.name.clone()), share);
    }
    state
}

/// ```text
/// default dev ppp0 table 10 protocol 109
/// unreachable default metric 4278198272 table 10 protocol 109
/// ```
///
/// The kernel drops the first when the link goes; the second then keeps replies from leaving by
/// the default route with an address that the other provider drops as spoofed.
fn routes(up: &Up, routing: &Routing, state: &mut State) {
    let closing = Route {
        table: routing.table,
        metric: CLOSING_METRIC,
        kind: Some("unreachable".into()),
        destination: "default".into(),
        dev: None,
        rest: Vec::new(),
    };
    if up.link.running == Running::Yes {
        let dev = Some(up.link.interface.to_string());
        state.routes.insert(Route {
            metric: 0,
            kind: None,
            dev,
            ..closing.clone()
        });
    }
    state.routes.insert(closing);
}

/// ```text
/// 98:  from X lookup main suppress_prefixlength 0 protocol 109
/// 99:  iif eth1 fwmark 0xa/0xff lookup 10 protocol 109
/// 100: from X lookup 10 protocol 109
/// ```
///
/// The first lets X answer the LAN itself: all of the main table but its default route.
fn route_rules(config: &Config, up: &Up, routing: &Routing, state: &mut State) {
    let from = Some(up.link.address.to_string());
    state.rules.insert(RouteRule {
        from: from.clone(),
        suppress_prefixlength: Some(0),
        ..RouteRule::new(config.priority.local, TableId::MAIN)
    });
    for iif in &config.lan.interfaces {
        state.rules.insert(RouteRule {
            iif: Some(iif.to_string()),
            fwmark: Some(routing.mark),
            ..RouteRule::new(config.priority.mark, routing.table)
        });
    }
    state.rules.insert(RouteRule {
        from,
        ..RouteRule::new(config.priority.source, routing.table)
    });
}

/// ```text
/// 98:  from PIN iif eth1 lookup main suppress_prefixlength 0 protocol 109
/// 101: from PIN iif eth1 lookup 10 protocol 109
/// ```
///
/// Behind the rule by mark: what came to the host by another uplink goes back there. The first lets
/// the host reach what is no default route's: the LANs, and what lies behind their routers.
fn pins(config: &Config, up: &Up, routing: &Routing, state: &mut State) {
    for pin in &up.uplink.pin {
        // As the kernel lists it: an address without its length.
        let from = Some(if pin.prefix() == 32 {
            pin.ip().to_string()
        } else {
            pin.to_string()
        });
        for iif in &config.lan.interfaces {
            let iif = Some(iif.to_string());
            state.rules.insert(RouteRule {
                from: from.clone(),
                iif: iif.clone(),
                suppress_prefixlength: Some(0),
                ..RouteRule::new(config.priority.local, TableId::MAIN)
            });
            state.rules.insert(RouteRule {
                from: from.clone(),
                iif,
                ..RouteRule::new(config.priority.pin, routing.table)
            });
        }
    }
}

/// ```text
/// -A PREROUTING -i ppp0 -j mh-isp0
/// -A mh-isp0 -m connmark --mark 0x0/0xff -j CONNMARK --set-xmark 0xa/0xff
/// -A PREROUTING -i eth1 -m connmark --mark 0xa/0xff -m comment --comment mh-isp0
///     -j CONNMARK --restore-mark --nfmask 0xff --ctmask 0xff
/// ```
fn connmark(config: &Config, up: &Up, routing: &Routing, mangle: &mut Share) {
    let FwMark { mask, .. } = routing.mark;
    let unmarked = Match(FwMark { value: 0, mask });
    mangle.entries.push(jump(up));
    own_rule(
        up,
        mangle,
        Rulespec(format!(
            "-m connmark --mark {unmarked} -j CONNMARK --set-xmark {}",
            routing.mark
        )),
    );
    for lan in &config.lan.interfaces {
        let spec = format!(
            "-i {lan} -m connmark --mark {} -m comment --comment {} \
             -j CONNMARK --restore-mark --nfmask {mask:#x} --ctmask {mask:#x}",
            Match(routing.mark),
            up.name.chain(),
        );
        mangle.entries.push(("PREROUTING".into(), Rulespec(spec)));
    }
}

/// A mark as the matches of iptables print it: without a mask where all bits count
/// (`print_mark`, extensions/libxt_connmark.c).
struct Match(FwMark);

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            FwMark {
                value,
                mask: u32::MAX,
            } => write!(f, "{value:#x}"),
            mark => mark.fmt(f),
        }
    }
}

/// Strict filtering drops what is to be DNATed: the way back to a client is looked up before the
/// reply has its mark, and leads to the default route. Loose filtering (2) on the interface wins
/// over strict on `all`, since the larger of the two counts (ip-sysctl.rst).
fn loosen(up: &Up, before: u8, state: &mut State, mangle: &mut Share) {
    let loose = Loose {
        uplink: up.name.clone(),
        interface: up.link.interface.clone(),
        before,
    };
    own_rule(up, mangle, loose_note(&loose));
    state.loose.insert(loose);
}

/// ```text
/// -A PREROUTING -i ppp0 -j mh-isp0
/// -A mh-isp0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 192.168.0.2
/// ```
fn forwards(up: &Up, nat: &mut Share) {
    nat.entries.push(jump(up));
    nat.chains = up.uplink.chains.clone();
}

/// ```text
/// -A PREROUTING -d X/32 -i eth1 -j mh-isp0
/// -A POSTROUTING -s LAN -o eth1 -m conntrack --ctstate DNAT --ctorigdst X -m comment --comment mh-isp0 -j MASQUERADE
/// ```
///
/// The second makes the server answer to the router, which turns the reply round again; to a host
/// of its own LAN it would answer directly, from an address that was never asked.
fn hairpin(config: &Config, up: &Up, nat: &mut Share) {
    let (address, chain) = (up.link.address, up.name.chain());
    for lan in &config.lan.interfaces {
        let spec = format!("-d {address}/32 -i {lan} -j {chain}");
        nat.entries.push(("PREROUTING".into(), Rulespec(spec)));
        for network in &config.lan.networks {
            let spec = format!(
                "-s {network} -o {lan} -m conntrack --ctstate DNAT --ctorigdst {address} \
                 -m comment --comment {chain} -j MASQUERADE"
            );
            nat.entries.push(("POSTROUTING".into(), Rulespec(spec)));
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
fn accept_forward(config: &Config, up: &Up, filter: &mut Share) {
    let Addressed {
        interface, address, ..
    } = up.link;
    let mut accept = |which: String| {
        let spec = format!("{which} -m comment --comment {} -j ACCEPT", up.name.chain());
        filter.entries.push(("FORWARD".into(), Rulespec(spec)));
    };
    accept(format!("-i {interface} -m conntrack --ctstate DNAT"));
    accept(format!("-o {interface} -m conntrack --ctstate DNAT"));
    for lan in config.lan.interfaces.iter().filter(|_| up.uplink.hairpin) {
        accept(format!(
            "-i {lan} -m conntrack --ctstate DNAT --ctorigdst {address}"
        ));
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
fn clamp_mss(up: &Up, mangle: &mut Share) {
    let mut clamp = |way: &str, target: &str| {
        let spec = format!(
            "{way} {} -p tcp -m tcp --tcp-flags SYN,RST SYN -m comment --comment {} -j TCPMSS {target}",
            up.link.interface,
            up.name.chain()
        );
        mangle.entries.push(("FORWARD".into(), Rulespec(spec)));
    };
    if let Some(size) = up
        .link
        .mtu
        .and_then(|mtu| mtu.checked_sub(40))
        .filter(|size| (1..=0xffff).contains(size))
    {
        clamp("-i", &format!("--set-mss {size}"));
    }
    clamp("-o", "--clamp-mss-to-pmtu");
}

/// `-A POSTROUTING -s 192.168.0.0/24 -o ppp0 -m comment --comment mh-isp0 -j MASQUERADE`
fn masquerade(config: &Config, up: &Up, nat: &mut Share) {
    for network in &config.lan.networks {
        let spec = format!(
            "-s {network} -o {} -m comment --comment {} -j MASQUERADE",
            up.link.interface,
            up.name.chain()
        );
        nat.entries.push(("POSTROUTING".into(), Rulespec(spec)));
    }
}

/// A rule more in the uplink's own chain.
fn own_rule(up: &Up, share: &mut Share, rule: Rulespec) {
    let rules = share.chains.entry(up.name.chain()).or_default();
    Rc::make_mut(rules).push(rule);
}

/// `-A PREROUTING -i ppp0 -j mh-isp0`
fn jump(up: &Up) -> (String, Rulespec) {
    let spec = format!("-i {} -j {}", up.link.interface, up.name.chain());
    ("PREROUTING".into(), Rulespec(spec))
}
