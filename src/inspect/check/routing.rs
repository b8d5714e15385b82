//! The kernel's own answers to `ip route get`, for the forwards' targets and for replies. Where a packet would leave by
//! another interface than it should, names the foreign rules and routes that send it there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use anyhow::Result;

use super::{Finding, View, few};
use crate::config::{Routing, Uplink};
use crate::inspect::snapshot::Snapshot;
use crate::kernel::ip::RouteLookup;
use crate::model::link::UplinkLink;
use crate::model::names::{IfName, UplinkName};
use crate::model::route::{FwMark, NOT, Route, RouteKind, RouteRule, TableId};

/// An address in the Internet, for route lookups; nobody has it (TEST-NET-1, RFC 5737).
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// The most targets that are looked up: each takes a process.
const MAX_TARGETS: usize = 200;

/// The route to each forward's target, or the kernel's refusal.
pub type Targets = BTreeMap<Ipv4Addr, Result<RouteLookup, String>>;

/// Looks up the routes to the forwards' targets.
/// Errors: the kernel's answer can't be read.
pub fn targets(view: &View) -> Result<Targets> {
    let hosts = view.serving().flat_map(|(_, uplink)| &uplink.forwards);
    let hosts = hosts.filter_map(|forward| forward.to);
    // Of a forward to this router itself, the link's address.
    let is_own = |uplink: &Uplink| uplink.forwards.iter().any(|it| it.to.is_none());
    let own = view.serving_links().filter(|(_, uplink, _)| is_own(uplink));
    let own = own.map(|(_, _, link)| link.address);
    let targets: BTreeSet<Ipv4Addr> = hosts.chain(own).collect();
    let targets = targets.into_iter().take(MAX_TARGETS);
    let ways = targets.map(|target| Ok((target, lookup(view, target)?)));
    ways.collect()
}

/// The route of a packet from the router itself, or where that leads out of an uplink, of a request that came in by the
/// link: our rule `iif ppp0 fwmark 0xa/0xff lookup main` keeps requests from foreign rules of a larger priority.
fn lookup(view: &View, target: Ipv4Addr) -> Result<Result<RouteLookup, String>> {
    let way = view.snapshot.route_get(&target.to_string())?;
    if reaches_lan(view, &way) {
        return Ok(way);
    }
    for (_, uplink, link) in view.serving_links() {
        if let Some(routing) = &uplink.routing
            && uplink
                .forwards
                .iter()
                .any(|forward| forward.to == Some(target))
        {
            let question = format!(
                "{target} from {OUTSIDE} iif {} mark {:#x}",
                link.interface, routing.mark.value
            );
            let request = view.snapshot.route_get(&question)?;
            if reaches_lan(view, &request) {
                return Ok(request);
            }
        }
    }
    Ok(way)
}

/// Whether there is a route, and it does not lead out of an uplink.
fn reaches_lan(view: &View, way: &Result<RouteLookup, String>) -> bool {
    way.as_ref().is_ok_and(|way| !view.is_link(&way.dev))
}

/// Checks the routes of requests and replies, and the foreign rules and routes beside ours.
/// Errors: the kernel's answer can't be read.
pub fn check(view: &View, targets: &Targets) -> Result<Vec<Finding>> {
    let mut findings = lan_networks(view)?;
    let arp = view.snapshot.root.read("/proc/net/arp");
    let arp = arp.unwrap_or_default();
    for (name, uplink) in view.serving() {
        let mut faults: BTreeMap<Finding, Vec<Ipv4Addr>> = BTreeMap::new();
        for (target, way) in targets {
            if uplink
                .forwards
                .iter()
                .any(|forward| forward.to == Some(*target))
                && let Some(fault) = fault(view, &arp, *target, way)
            {
                faults.entry(fault).or_default().push(*target);
            }
        }
        for (mut fault, targets) in faults {
            fault.what = format!("the forwards' target {}: {}", few(targets), fault.what);
            findings.push(fault.of(name));
        }
    }
    let ip_forward = view.snapshot.root.sysctl("net/ipv4/ip_forward");
    let mut overtaken = Vec::new();
    for (name, uplink, link) in view.serving_links() {
        // What is missing is another finding.
        if let Some(routing) = &uplink.routing
            && is_installed(view, routing.table)
            && ip_forward.as_deref() != Some("0")
        {
            let mut lost = replies(view, uplink, routing, link, targets)?;
            lost.extend(own_route(view, routing, link)?);
            overtaken.extend(lost.into_iter().map(|finding| finding.of(name)));
        }
    }
    if overtaken.is_empty() {
        overtaken = rules_ahead(view);
    }
    findings.extend(overtaken);
    findings.extend(tables(view));
    findings.extend(marks(view));
    findings.extend(servers_default(view));
    findings.extend(outside_lan(view));
    Ok(findings)
}

/// Networks in [lan] whose hosts are not behind an interface in [lan].
fn lan_networks(view: &View) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let lans = &view.config.lan.interfaces;
    for network in &view.config.lan.networks {
        let host = network.nth(1).unwrap_or(network.ip());
        let place = match view.snapshot.route_get(&host.to_string())? {
            Ok(way) if way.is_local || lans.iter().any(|lan| lan.as_str() == way.dev) => continue,
            Ok(way) => format!("is behind {}", way.dev),
            Err(words) => format!("has no route ({words})"),
        };
        let lans = few(lans);
        let what = format!("the LAN's network {network} {place}, not behind {lans}");
        let fix = "[lan] interfaces = […], networks = […]: as ip -4 address shows them";
        findings.push(Finding::warning("lan-network", what).fix(fix));
    }
    Ok(findings)
}

/// What is wrong with a forward's target, as far as routing and ARP tell: the end of a sentence that begins with the target.
fn fault(
    view: &View,
    arp: &str,
    target: Ipv4Addr,
    way: &Result<RouteLookup, String>,
) -> Option<Finding> {
    let way = match way {
        Ok(way) => way,
        Err(words) => {
            let why = format!("no route: {words}");
            return Some(Finding::error("target-route", why));
        }
    };
    if view.is_link(&way.dev) {
        let why = format!("routed out of the uplink {}, not into a LAN", way.dev);
        let is_ahead = |rule: &&RouteRule| {
            let table = rule.table().filter(|table| *table != TableId::MAIN);
            !rule.is_ours() && table.is_some() && rule.priority < LAST && table == way.table
        };
        let rules = view.snapshot.kernel.routing.rules.iter();
        let rules: Vec<_> = rules.filter(is_ahead).collect();
        return Some(blame(Finding::error("target-route", why), &rules));
    }
    let neighbour = way.via.clone().unwrap_or(target.to_string());
    // `IP address  HW type  Flags  HW address  Mask  Device`: flags 0 where nobody has answered
    // (ATF_COM of net/if_arp.h).
    let is_silent = arp.lines().any(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        matches!(words[..], [address, _, "0x0", .., dev] if address == neighbour && dev == way.dev)
    });
    let why = format!("off, or elsewhere: nobody on {} answers ARP", way.dev);
    is_silent.then(|| Finding::error("target-silent", why))
}

/// Replies that leave by another interface than the request came in by.
fn replies(
    view: &View,
    uplink: &Uplink,
    routing: &Routing,
    link: &UplinkLink,
    targets: &Targets,
) -> Result<Vec<Finding>> {
    let (interface, mark) = (&link.interface, routing.mark);
    let mut seen = BTreeSet::new();
    let mut lost: BTreeMap<(String, &str), Vec<Ipv4Addr>> = BTreeMap::new();
    for forward in &uplink.forwards {
        let Some(to) = forward.to else { continue };
        let way = targets.get(&to);
        let Some(Ok(way)) = way.filter(|way| reaches_lan(view, way)) else {
            continue;
        };
        if way.is_local || !seen.insert(to) {
            continue;
        }
        let outside = forward.from.first().map_or(OUTSIDE, |from| from.ip());
        let lan = &way.dev;
        let question = format!("{outside} from {to} iif {lan} mark {:#x}", mark.value);
        if let Some(answer) = detour(view, interface, &question)? {
            lost.entry((answer, lan)).or_default().push(to);
        }
    }
    let findings = lost.into_iter().map(|((answer, lan), targets)| {
        let ahead = ahead(view, &by_mark(view, routing), &targets, |iif| iif == lan);
        let what = format!(
            "replies of {} with the mark {mark} do not leave by {interface}: {answer}",
            few(targets)
        );
        blame(Finding::error("reply-route", what), &ahead)
    });
    Ok(findings.collect())
}

/// What the router itself sends from the uplink's address and that leaves by another interface.
fn own_route(view: &View, routing: &Routing, link: &UplinkLink) -> Result<Option<Finding>> {
    let (interface, address) = (&link.interface, link.address);
    let question = format!("{OUTSIDE} from {address}");
    let finding = detour(view, interface, &question)?.map(|answer| {
        let what = format!(
            "what the router itself sends from {address} does not leave by {interface}: {answer}"
        );
        let by_source = RouteRule {
            from: Some(address.into()),
            ..RouteRule::new(view.config.priority.source, routing.table)
        };
        let ahead = ahead(view, &by_source, &[address], |iif| iif == "lo");
        blame(Finding::warning("own-route", what), &ahead)
    });
    Ok(finding)
}

/// The kernel's answer where a packet does not leave by this interface: `by ppp1, table 11`
fn detour(view: &View, interface: &IfName, question: &str) -> Result<Option<String>> {
    let way = match view.snapshot.route_get(question)? {
        Ok(way) if way.dev == interface.as_str() => return Ok(None),
        Ok(way) => way,
        Err(words) => return Ok(Some(words)),
    };
    let table = way.table.map(|table| format!(", table {table}"));
    Ok(Some(format!("by {}{}", way.dev, table.unwrap_or_default())))
}

/// Whether all rules and routes that lead to and stand in this table are installed.
fn is_installed(view: &View, table: TableId) -> bool {
    let (installed, desired) = (&view.comparison.installed, &view.comparison.desired);
    let leads_there = |rule: &RouteRule| rule.table() == Some(table);
    let mut missing = desired.rules.difference(&installed.rules);
    let mut missing_routes = desired.routes.difference(&installed.routes);
    desired.rules.iter().any(leads_there)
        && !missing.any(leads_there)
        && !missing_routes.any(|route| route.table == table)
}

/// Names the foreign rules that matched first, and the commands that move them after ours.
fn blame(mut finding: Finding, ahead: &[&RouteRule]) -> Finding {
    if !ahead.is_empty() {
        let texts = ahead.iter().map(|rule| format!("\"{}\"", rule.listed()));
        finding.what += &format!("; ahead of our rules: {}", few(texts));
    }
    ahead.iter().fold(finding, |it, rule| move_back(it, rule))
}

/// Adds the commands that move a rule after ours.
fn move_back(finding: Finding, rule: &RouteRule) -> Finding {
    let moved = RouteRule {
        priority: LAST,
        ..rule.clone()
    };
    finding
        .fix(format!("ip rule add {moved}"))
        .fix(format!("ip rule del {rule}"))
}

/// The last priority before the main table's.
const LAST: u32 = 32765;

/// `99: fwmark 0xa/0xff lookup 10 proto 109`, by which replies go back
fn by_mark(view: &View, routing: &Routing) -> RouteRule {
    RouteRule {
        fwmark: Some(routing.mark),
        ..RouteRule::new(view.config.priority.mark, routing.table)
    }
}

/// Foreign rules ahead of a rule of ours, that may match the packets which that is for, in the kernel's order. The packets
/// have the mark of our rule, or none of our bits, and one of these sources; none for any. `fits_iif` says whether they may
/// come in by an interface; `lo` is that of packets from the router itself (ip-rule(8)).
fn ahead<'a>(
    view: &'a View,
    of: &RouteRule,
    sources: &[Ipv4Addr],
    fits_iif: impl Fn(&str) -> bool,
) -> Vec<&'a RouteRule> {
    let unmarked = FwMark {
        value: 0,
        mask: view.config.mask,
    };
    let packets_mark = of.fwmark.unwrap_or(unmarked);
    let may_match = |rule: &&RouteRule| {
        let is_kernels = rule.priority == 0 && rule.table() == Some(TableId::LOCAL);
        let fits_iif = rule.iif.as_deref().is_none_or(&fits_iif);
        let fits_mark = rule.fwmark.is_none_or(|mark| overlap(mark, packets_mark));
        let contains = |source: &Ipv4Addr| rule.from.is_none_or(|from| from.contains(*source));
        let fits_source = sources.is_empty() || sources.iter().any(contains);
        // With a suppressor the rule finds everything but the default route: only the LANs.
        let is_near = rule.suppress_prefixlength.is_some();
        let fits = fits_iif && (rule.is_negated() || fits_mark && fits_source);
        !rule.is_ours() && !is_kernels && fits && !is_near
    };
    let rules = &view.snapshot.kernel.routing.rules;
    let ours = rules.iter().position(|rule| rule == of).unwrap_or(0);
    rules[..ours].iter().filter(may_match).collect()
}

/// Whether some packet's mark matches both: the bits that both masks have are equal.
fn overlap(one: FwMark, other: FwMark) -> bool {
    (one.value ^ other.value) & one.mask & other.mask == 0
}

/// Foreign rules ahead of ours for all packets, in whose tables the kernel finds no route for replies now.
fn rules_ahead(view: &View) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut told = BTreeSet::new();
    for (name, uplink, link) in view.serving_links() {
        let Some(routing) = &uplink.routing else {
            continue;
        };
        // Replies come in by any interface but the link.
        let replies = |iif: &str| iif != "lo" && iif != link.interface.as_str();
        for rule in ahead(view, &by_mark(view, routing), &[], replies) {
            let is_broad = rule.from.is_none()
                && rule.to.is_none()
                && rule.rest.iter().all(|word| word == NOT)
                && rule.table().is_some_and(|table| !table.is_systems());
            if is_broad && told.insert(rule) {
                let what = format!(
                    "the foreign rule \"{}\" is ahead of ours: replies take any route that its table gets",
                    rule.listed()
                );
                let finding = Finding::info("rule-ahead", what).of(name);
                findings.push(move_back(finding, rule));
            }
        }
    }
    findings
}

/// The uplinks that have a table and a mark.
fn routed<'a>(view: &View<'a>) -> impl Iterator<Item = (&'a UplinkName, &'a Routing)> {
    let uplinks = view.config.uplinks.iter();
    uplinks.filter_map(|(name, uplink)| Some((name, uplink.routing.as_ref()?)))
}

/// Foreign routes in the uplinks' tables.
fn tables(view: &View) -> Vec<Finding> {
    let mut findings = Vec::new();
    let (installed, desired) = (&view.comparison.installed, &view.comparison.desired);
    for (name, &Routing { table, .. }) in routed(view) {
        let routes = view.snapshot.kernel.routing.routes.iter();
        let foreign: Vec<_> = routes
            .filter(|route| !route.is_ours() && route.table == table)
            .collect();
        if let Some(default) = foreign.iter().find(|route| route.is_default()) {
            let mut missing = desired.routes.difference(&installed.routes);
            let is_in_the_way = missing.any(|it| it.table == table && it.dev.is_some());
            let what =
                format!("a foreign default route in the uplink's table {table}: \"{default}\"");
            let mut finding = Finding::warning("table-default", what)
                .of(name)
                .error_if(is_in_the_way)
                .fix(format!("ip route del {default}"));
            if is_in_the_way {
                finding = finding.fix("mh-hook sync");
            } else {
                finding.what += ": replies take it when the link is down";
            }
            findings.push(finding);
        } else if !foreign.is_empty() {
            let foreign = few(foreign);
            let what = format!("foreign routes in the uplink's table {table}: {foreign}");
            findings.push(Finding::info("table-routes", what).of(name));
        }
    }
    findings
}

/// Foreign rules that match our marks.
fn marks(view: &View) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mask = view.config.mask;
    for rule in &view.snapshot.kernel.routing.rules {
        // One without any of our bits set is for packets that we have not marked.
        let is_for_ours = |mark: &FwMark| mark.value & mark.mask & mask != 0;
        if let Some(theirs) = rule.fwmark.filter(is_for_ours)
            && !rule.is_ours()
            && !rule.is_negated()
            && let Some((name, ours)) = routed(view).find(|(_, ours)| overlap(theirs, ours.mark))
        {
            let what = format!(
                "the foreign rule \"{}\" matches the uplink's mark {}: its fwmark uses bits that [mark] mask {mask:#x} reserves",
                rule.listed(),
                ours.mark
            );
            let fix = "[mark] mask = …: bits that nobody else uses, and mark = … within it";
            findings.push(Finding::warning("mark-rule", what).of(name).fix(fix));
        }
    }
    findings
}

/// A default route by the link that is for the servers, while another uplink is there for everything else.
fn servers_default(view: &View) -> Option<Finding> {
    let routes = view.snapshot.kernel.routing.routes.iter();
    let defaults = routes.filter(|it| it.table == TableId::MAIN && it.is_default());
    let default = defaults.min_by_key(|route| route.metric)?;
    let dev = default.dev.as_deref()?;
    let (name, _, _) = view
        .serving_links()
        .find(|(_, _, link)| link.interface.as_str() == dev)?;
    let mut plain = view
        .config
        .uplinks
        .iter()
        .filter(|(_, uplink)| uplink.forwards.is_empty());
    let (other, link) =
        plain.find_map(|(name, _)| Some((name, view.comparison.links.get(name)?.as_ref()?)))?;
    let what = format!(
        "the default route leaves by {dev}, which serves the forwards: what the LAN itself does leaves by it, not by {other}'s {}",
        link.interface
    );
    let fix = format!("ip route replace default dev {}", link.interface);
    Some(
        Finding::warning("default-by-servers", what)
            .of(name)
            .fix(fix),
    )
}

/// Targets that are in none of the LAN's networks.
fn outside_lan(view: &View) -> Vec<Finding> {
    let networks = &view.config.lan.networks;
    let mut findings = Vec::new();
    for (name, uplink) in view.serving().filter(|(_, uplink)| uplink.hairpin) {
        let targets = uplink.forwards.iter().filter_map(|forward| forward.to);
        let is_outside = |target: &Ipv4Addr| !networks.iter().any(|it| it.contains(*target));
        let outside: BTreeSet<Ipv4Addr> = targets.filter(is_outside).collect();
        if !outside.is_empty() {
            let what = format!(
                "the forwards' target {} is in none of [lan] networks: it gets requests from outside, but its own network does not reach it by the public address",
                few(outside)
            );
            findings.push(Finding::info("target-outside-lan", what).of(name));
        }
    }
    findings
}

/// Whether the router has a default route.
pub fn default_route(snapshot: &Snapshot) -> Option<Finding> {
    // VPNs add 0.0.0.0/1 and 128.0.0.0/1, which win over the default route.
    let leads_outside = |route: &Route| {
        !route.is_ours()
            && route.kind == RouteKind::UNICAST
            && route.destination.prefix() <= 1
            && route.destination.ip().is_unspecified()
    };
    let what = "there is no default route: the LAN and the router itself reach nothing outside";
    let fix = "defaultroute in /etc/ppp/peers of the link that everything else goes out by";
    let mut routes = snapshot.kernel.routing.routes.iter();
    (!routes.any(leads_outside)).then(|| Finding::warning("default-route", what).fix(fix))
}
