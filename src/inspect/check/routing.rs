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
use crate::model::names::UplinkName;
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
    let forwards = view.serving_links().flat_map(|(_, uplink, link)| {
        let forwards = uplink.forwards.iter();
        forwards.map(|forward| forward.target(link.address, None).0)
    });
    // Those of links that are down are told, too.
    let hosts = view.serving().flat_map(|(_, uplink)| &uplink.forwards);
    let hosts = hosts.filter_map(|forward| forward.to);
    let targets: BTreeSet<Ipv4Addr> = forwards.chain(hosts).collect();
    let targets = targets.into_iter().take(MAX_TARGETS);
    targets
        .map(|target| Ok((target, lookup(view, target)?)))
        .collect()
}

/// The route of a packet from the router itself, or where that leads out of an uplink, of a request that came in by the
/// link: our rule `iif ppp0 fwmark 0xa/0xff lookup main` keeps requests from foreign rules of a larger priority.
fn lookup(view: &View, target: Ipv4Addr) -> Result<Result<RouteLookup, String>> {
    let way = view.snapshot.route_get(&target.to_string())?;
    if reaches_lan(view, &way) {
        return Ok(way);
    }
    for (_, uplink, link) in view.serving_links() {
        let mut forwards = uplink.forwards.iter();
        if let Some(routing) = &uplink.routing
            && forwards.any(|forward| forward.to == Some(target))
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
    let mut links = view.links().values().flatten();
    way.as_ref()
        .is_ok_and(|way| links.all(|link| link.interface.as_str() != way.dev))
}

/// Checks the routes of requests and replies, and the foreign rules and routes beside ours.
/// Errors: the kernel's answer can't be read.
pub fn check(view: &View, targets: &Targets) -> Result<Vec<Finding>> {
    let mut findings = lan_networks(view)?;
    let arp = view.snapshot.root.read("/proc/net/arp");
    let arp = arp.unwrap_or_default();
    for (name, uplink) in view.serving() {
        let mut faults: BTreeMap<Fault, Vec<Ipv4Addr>> = BTreeMap::new();
        let of_uplink: BTreeSet<Ipv4Addr> = uplink.forwards.iter().filter_map(|it| it.to).collect();
        for target in of_uplink {
            let way = targets.get(&target);
            if let Some(fault) = way.and_then(|way| fault(view, &arp, target, way)) {
                faults.entry(fault).or_default().push(target);
            }
        }
        for (fault, targets) in faults {
            let what = format!("the forwards' target {}: {}", few(targets), fault.why);
            let mut finding = Finding::stops(fault.id, what).of(name);
            finding.fixes = fault.fixes;
            findings.push(finding);
        }
    }
    let mut overtaken = false;
    for (name, uplink, link) in view.serving_links() {
        let lost = replies(view, uplink, link, targets)?;
        overtaken |= !lost.is_empty();
        findings.extend(lost.into_iter().map(|finding| finding.of(name)));
    }
    if !overtaken {
        findings.extend(rules_ahead(view));
    }
    findings.extend(tables(view));
    findings.extend(marks(view));
    Ok(findings)
}

/// Networks in [lan] whose hosts are not behind an interface in [lan].
fn lan_networks(view: &View) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let lans = &view.config.lan.interfaces;
    for network in &view.config.lan.networks {
        let host = network.nth(1).unwrap_or(network.ip());
        let way = view.snapshot.route_get(&host.to_string())?;
        let place = match way {
            Ok(way) if way.is_local => continue,
            Ok(way) if lans.iter().any(|lan| lan.as_str() == way.dev) => continue,
            Ok(way) => format!("is behind {}", way.dev),
            Err(words) => format!("has no route ({words})"),
        };
        let what = format!(
            "the LAN's network {network} {place}, not behind {}",
            few(lans)
        );
        findings.push(
            Finding::harms("lan-network", what)
                .fix("[lan] interfaces = […], networks = […]: as ip -4 address shows them"),
        );
    }
    Ok(findings)
}

/// What is wrong with a forward's target.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Fault {
    id: &'static str,
    /// The end of a sentence that begins with the target.
    why: String,
    fixes: Vec<String>,
}

/// What is wrong with a forward's target, as far as routing and ARP tell.
fn fault(
    view: &View,
    arp: &str,
    target: Ipv4Addr,
    way: &Result<RouteLookup, String>,
) -> Option<Fault> {
    let fault = |id, why, fixes| Some(Fault { id, why, fixes });
    let way = match way {
        Ok(way) => way,
        Err(words) => return fault("target-route", format!("no route: {words}"), Vec::new()),
    };
    let mut links = view.links().values().flatten();
    if links.any(|link| link.interface.as_str() == way.dev) {
        let why = format!("routed out of the uplink {}, not into a LAN", way.dev);
        let rules = view.snapshot.kernel.routing.rules.iter().filter(|rule| {
            let table = rule.table().filter(|table| *table != TableId::MAIN);
            let is_ahead = rule.priority < LAST && table == way.table;
            !rule.is_ours() && table.is_some() && is_ahead
        });
        let blamed = blame(
            Finding::stops("target-route", why),
            &rules.collect::<Vec<_>>(),
        );
        return fault("target-route", blamed.what, blamed.fixes);
    }
    let neighbour = way.via.clone().unwrap_or(target.to_string());
    // `IP address  HW type  Flags  HW address  Mask  Device`: flags 0 where nobody has answered
    // (ATF_COM of net/if_arp.h).
    let is_silent = arp.lines().any(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        matches!(words[..], [address, _, "0x0", .., dev] if address == neighbour && dev == way.dev)
    });
    let why = format!("off, or elsewhere: nobody on {} answers ARP", way.dev);
    is_silent
        .then(|| fault("target-silent", why, Vec::new()))
        .flatten()
}

/// Replies that leave by another interface than the request came in by, though our rules and routes are installed.
fn replies(
    view: &View,
    uplink: &Uplink,
    link: &UplinkLink,
    targets: &Targets,
) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let Some(routing) = &uplink.routing else {
        return Ok(findings);
    };
    let interface = link.interface.as_str();
    let ip_forward = view.snapshot.root.sysctl("net/ipv4/ip_forward");
    if !is_installed(view, routing.table) || ip_forward.as_deref() == Some("0") {
        return Ok(findings);
    }
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
        let question = format!(
            "{outside} from {} iif {} mark {:#x}",
            to, way.dev, routing.mark.value
        );
        let answer = match view.snapshot.route_get(&question)? {
            Ok(answer) if answer.dev == interface => continue,
            Ok(answer) => by(&answer),
            Err(words) => words,
        };
        let same = lost.entry((answer, &way.dev)).or_default();
        same.push(to);
    }
    for ((answer, dev), targets) in lost {
        let ahead = Ahead {
            of: by_mark(view, routing),
            mark: routing.mark,
            sources: targets.clone(),
        };
        let ahead = ahead.rules(view, |iif| iif == dev);
        let what = format!(
            "replies of {} with the mark {} do not leave by {interface}: {answer}",
            few(targets),
            routing.mark
        );
        findings.push(blame(Finding::stops("reply-route", what), &ahead));
    }
    let question = format!("{OUTSIDE} from {}", link.address);
    match view.snapshot.route_get(&question)? {
        Ok(answer) if answer.dev == interface => {}
        answer => {
            let answer = answer.map_or_else(|words| words, |answer| by(&answer));
            let what = format!(
                "what the router itself sends from {} does not leave by {interface}: {answer}",
                link.address
            );
            let ahead = Ahead {
                of: RouteRule {
                    from: Some(link.address.into()),
                    ..RouteRule::new(view.config.priority.source, routing.table)
                },
                mark: FwMark {
                    value: 0,
                    ..routing.mark
                },
                sources: vec![link.address],
            };
            let ahead = ahead.rules(view, |iif| iif == "lo");
            findings.push(blame(Finding::harms("own-route", what), &ahead));
        }
    }
    Ok(findings)
}

/// Whether all rules and routes that lead to and stand in this table are installed. What is missing is another finding.
fn is_installed(view: &View, table: TableId) -> bool {
    let (installed, desired) = (&view.comparison.installed, &view.comparison.desired);
    let rules = desired
        .rules
        .iter()
        .filter(|rule| rule.table() == Some(table));
    let routes = desired.routes.iter().filter(|route| route.table == table);
    rules.clone().count() > 0
        && rules.into_iter().all(|rule| installed.rules.contains(rule))
        && routes
            .into_iter()
            .all(|route| installed.routes.contains(route))
}

fn by(way: &RouteLookup) -> String {
    match way.table {
        Some(table) => format!("by {}, table {table}", way.dev),
        None => format!("by {}", way.dev),
    }
}

/// Names the foreign rules that matched first, and the commands that move them after ours.
fn blame(mut finding: Finding, ahead: &[&RouteRule]) -> Finding {
    if ahead.is_empty() {
        return finding;
    }
    let texts = ahead.iter().map(|rule| format!("\"{}\"", rule.listed()));
    finding.what += &format!("; ahead of our rules: {}", few(texts));
    for rule in ahead {
        finding = move_back(finding, rule);
    }
    finding
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

/// Foreign rules ahead of a rule of ours, that may match the packets which it is for.
struct Ahead {
    /// Our rule.
    of: RouteRule,
    /// The packets' mark: our bits of it.
    mark: FwMark,
    /// The packets' sources; none for any.
    sources: Vec<Ipv4Addr>,
}

impl Ahead {
    /// The rules, in the kernel's order. `fits_iif` says whether packets may come in by an interface; `lo` is that of
    /// packets from the router itself (ip-rule(8)).
    fn rules<'a>(&self, view: &'a View, fits_iif: impl Fn(&str) -> bool) -> Vec<&'a RouteRule> {
        let rules = &view.snapshot.kernel.routing.rules;
        let ours = rules.iter().position(|rule| *rule == self.of);
        let may_match = |rule: &&RouteRule| {
            let is_kernels = rule.priority == 0 && rule.table() == Some(TableId::LOCAL);
            let fits_iif = rule.iif.as_deref().is_none_or(&fits_iif);
            let fits_mark = rule.fwmark.is_none_or(|mark| overlap(mark, self.mark));
            let contains = |source: &Ipv4Addr| rule.from.is_none_or(|from| from.contains(*source));
            let fits_source = self.sources.is_empty() || self.sources.iter().any(contains);
            // With a suppressor the rule finds everything but the default route: only the LANs.
            let is_near = rule.suppress_prefixlength.is_some();
            let fits = fits_iif && (rule.is_negated() || fits_mark && fits_source);
            !rule.is_ours() && !is_kernels && fits && !is_near
        };
        let ahead = rules[..ours.unwrap_or(0)].iter();
        ahead.filter(may_match).collect()
    }
}

/// Whether some packet's mark matches both: the bits that both masks have are equal.
fn overlap(one: FwMark, other: FwMark) -> bool {
    (one.value ^ other.value) & one.mask & other.mask == 0
}

/// Foreign rules ahead of ours for all packets, in whose tables the kernel finds no route for replies now.
fn rules_ahead(view: &View) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Vec::new();
    let mut told = BTreeSet::new();
    for (name, uplink, link) in view.serving_links() {
        let Some(routing) = &uplink.routing else {
            continue;
        };
        let ahead = Ahead {
            of: by_mark(view, routing),
            mark: routing.mark,
            sources: Vec::new(),
        };
        // Replies come in by any interface but the link.
        let replies = |iif: &str| iif != "lo" && iif != link.interface.as_str();
        for rule in ahead.rules(view, replies) {
            let is_broad = rule.from.is_none()
                && rule.to.is_none()
                && rule.rest.iter().all(|word| word == NOT)
                && rule.table().is_some_and(|table| !table.is_systems());
            if is_broad && told.insert(rule) {
                let what = format!(
                    "the foreign rule \"{}\" is ahead of ours: replies take any route that its table gets",
                    rule.listed()
                );
                let finding = Finding::note("rule-ahead", what).of(name);
                findings.push(move_back(finding, rule));
            }
        }
    }
    findings
}

/// Foreign routes in the uplinks' tables.
fn tables(view: &View) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, uplink) in &view.config.uplinks {
        let Some(routing) = &uplink.routing else {
            continue;
        };
        let routes = view.snapshot.kernel.routing.routes.iter();
        let foreign: Vec<_> = routes
            .filter(|route| !route.is_ours() && route.table == routing.table)
            .collect();
        let Some(default) = foreign.iter().find(|route| route.is_default()) else {
            if !foreign.is_empty() {
                let what = format!(
                    "foreign routes in the uplink's table {}: {}",
                    routing.table,
                    few(&foreign)
                );
                findings.push(Finding::note("table-routes", what).of(name));
            }
            continue;
        };
        let what = format!(
            "a foreign default route in the uplink's table {}: \"{}\"",
            routing.table, default
        );
        let is_in_the_way = view.comparison.desired.routes.iter().any(|route| {
            route.table == routing.table
                && route.dev.is_some()
                && !view.comparison.installed.routes.contains(route)
        });
        let finding = if is_in_the_way {
            Finding::stops("table-default", what)
        } else {
            Finding::harms(
                "table-default",
                what + ": replies take it when the link is down",
            )
        };
        let finding = finding.of(name).fix(format!("ip route del {default}"));
        findings.push(if is_in_the_way {
            finding.fix("mh-hook sync")
        } else {
            finding
        });
    }
    findings
}

/// Foreign rules that match our marks.
fn marks(view: &View) -> Vec<Finding> {
    let mut findings = Vec::new();
    let uplinks = view.config.uplinks.iter();
    let marks: Vec<(&UplinkName, FwMark)> = uplinks
        .filter_map(|(name, uplink)| Some((name, uplink.routing.as_ref()?.mark)))
        .collect();
    let mask = view.config.mask;
    for rule in &view.snapshot.kernel.routing.rules {
        // One without any of our bits set is for packets that we have not marked.
        let is_for_ours = |mark: &FwMark| mark.value & mark.mask & mask != 0;
        let is_foreign = !rule.is_ours() && !rule.is_negated();
        let Some(theirs) = rule.fwmark.filter(|mark| is_foreign && is_for_ours(mark)) else {
            continue;
        };
        if let Some((name, ours)) = marks.iter().find(|(_, ours)| overlap(theirs, *ours)) {
            let what = format!(
                "the foreign rule \"{}\" matches the uplink's mark {ours}: its fwmark uses bits that [mark] mask {mask:#x} reserves",
                rule.listed()
            );
            findings.push(
                Finding::harms("mark-rule", what)
                    .of(name)
                    .fix("[mark] mask = …: bits that nobody else uses, and mark = … within it"),
            );
        }
    }
    findings
}

/// Whether the router has a default route.
pub fn default_route(snapshot: &Snapshot) -> Option<Finding> {
    let routes = snapshot.kernel.routing.routes.iter();
    let has_some = routes.filter(|route| !route.is_ours()).any(|route| {
        let Route {
            kind, destination, ..
        } = route;
        // VPNs add 0.0.0.0/1 and 128.0.0.0/1, which win over the default route.
        *kind == RouteKind::UNICAST
            && destination.prefix() <= 1
            && destination.ip().is_unspecified()
    });
    (!has_some).then(|| {
        Finding::harms(
            "default-route",
            "there is no default route: the LAN and the router itself reach nothing outside",
        )
        .fix("defaultroute in /etc/ppp/peers of the link that everything else goes out by")
    })
}
