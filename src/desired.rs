//! What the kernel should hold for an uplink that is up: (configuration, address) to [`State`].
//! Pure; does not look at what is.

use std::fmt::{self, Write};
use std::net::Ipv4Addr;

use crate::config::{Config, Forward, Routing, Uplink};
use crate::iptables::loose_note;
use crate::state::{
    CLOSING_METRIC, FwMark, Loose, Route, RouteRule, Rulespec, Share, State, Table, TableId,
    UplinkName,
};

/// An uplink whose link is up.
#[derive(Debug)]
pub struct Up<'a> {
    /// Its name.
    pub name: &'a UplinkName,
    /// Its configuration.
    pub uplink: &'a Uplink,
    /// The link's address.
    pub address: Ipv4Addr,
    /// What `rp_filter` of the interface was, where it is strict, or was until we loosened it.
    pub strict: Option<u8>,
}

/// All entries for this uplink. One without a routing table only masquerades.
pub fn desired(config: &Config, up: &Up) -> State {
    let mut state = State::default();
    let mut mangle = Share::default();
    let mut nat = Share::default();
    if let Some(routing) = &up.uplink.routing {
        routes(up, routing, &mut state);
        route_rules(config, up, routing, &mut state);
        connmark(config, up, routing, &mut mangle);
        if let Some(before) = up.strict.filter(|_| !up.uplink.forwards.is_empty()) {
            loosen(up, before, &mut state, &mut mangle);
        }
    }
    forwards(up, &mut nat);
    masquerade(config, up, &mut nat);
    state.insert((Table::Mangle, up.name.clone()), mangle);
    state.insert((Table::Nat, up.name.clone()), nat);
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
    let dev = Some(up.uplink.interface.to_string());
    state.routes.insert(Route {
        metric: 0,
        kind: None,
        dev,
        ..closing.clone()
    });
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
    let from = Some(up.address.to_string());
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
/// -A PREROUTING -i ppp0 -j mh-isp0
/// -A mh-isp0 -m connmark --mark 0x0/0xff -j CONNMARK --set-xmark 0xa/0xff
/// -A PREROUTING -i eth1 -m connmark --mark 0xa/0xff -m comment --comment mh-isp0
///     -j CONNMARK --restore-mark --nfmask 0xff --ctmask 0xff
/// ```
fn connmark(config: &Config, up: &Up, routing: &Routing, mangle: &mut Share) {
    let FwMark { mask, .. } = routing.mark;
    let unmarked = Match(FwMark { value: 0, mask });
    mangle.entries.push(jump(up));
    mangle.chain = Some(vec![Rulespec(format!(
        "-m connmark --mark {unmarked} -j CONNMARK --set-xmark {}",
        routing.mark
    ))]);
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
        interface: up.uplink.interface.clone(),
        before,
    };
    mangle
        .chain
        .get_or_insert_default()
        .push(loose_note(&loose));
    state.loose.insert(loose);
}

/// ```text
/// -A PREROUTING -i ppp0 -j mh-isp0
/// -A mh-isp0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 192.168.0.2
/// ```
fn forwards(up: &Up, nat: &mut Share) {
    if up.uplink.forwards.is_empty() {
        return;
    }
    nat.entries.push(jump(up));
    let mut rules = Vec::new();
    for forward in &up.uplink.forwards {
        if forward.from.is_empty() {
            rules.push(dnat(forward, None));
        }
        rules.extend(
            forward
                .from
                .iter()
                .map(|from| dnat(forward, Some(&from.to_string()))),
        );
    }
    nat.chain = Some(rules);
}

/// `-s 198.51.100.0/24 -p tcp -m tcp --dport 2222 -j DNAT --to-destination 192.168.0.2:22`
fn dnat(forward: &Forward, from: Option<&str>) -> Rulespec {
    let mut spec = String::new();
    let Forward {
        protocol,
        ports,
        to,
        to_port,
        ..
    } = forward;
    // Writing to a String can't fail.
    if let Some(from) = from {
        let _ = write!(spec, "-s {from} ");
    }
    let _ = write!(
        spec,
        "-p {protocol} -m {protocol} --dport {}",
        ports.start()
    );
    if ports.start() != ports.end() {
        let _ = write!(spec, ":{}", ports.end());
    }
    let _ = write!(spec, " -j DNAT --to-destination {to}");
    if let Some(port) = to_port {
        let _ = write!(spec, ":{port}");
    }
    Rulespec(spec)
}

/// `-A POSTROUTING -s 192.168.0.0/24 -o ppp0 -m comment --comment mh-isp0 -j MASQUERADE`
fn masquerade(config: &Config, up: &Up, nat: &mut Share) {
    for network in config.lan.networks.iter().filter(|_| up.uplink.masquerade) {
        let spec = format!(
            "-s {network} -o {} -m comment --comment {} -j MASQUERADE",
            up.uplink.interface,
            up.name.chain()
        );
        nat.entries.push(("POSTROUTING".into(), Rulespec(spec)));
    }
}

/// `-A PREROUTING -i ppp0 -j mh-isp0`
fn jump(up: &Up) -> (String, Rulespec) {
    let spec = format!("-i {} -j {}", up.uplink.interface, up.name.chain());
    ("PREROUTING".into(), Rulespec(spec))
}
