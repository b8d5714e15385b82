//! Where packets go: asked of the kernel, for the forwards' targets and for the replies. Where its
//! answer is another than it should be, others' rules and routes say why.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::Ipv4Addr;

use anyhow::Result;

use super::{Finding, View, few};
use crate::config::Uplink;
use crate::inspect::snapshot::Snapshot;
use crate::kernel::ip::RouteLookup;
use crate::kernel::sysctl;
use crate::model::link::UplinkLink;
use crate::model::names::UplinkName;
use crate::model::route::{FwMark, NOT, Route, RouteKind, RouteRule, TableId};

/// An address in the Internet that is nobody's (RFC 5737), to ask the kernel for.
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// The most forwards' targets that the kernel is asked for: a process each.
const MOST: usize = 200;

/// The kernel's way to each forward's target, or its refusal.
pub type Targets = BTreeMap<Ipv4Addr, Result<RouteLookup, String>>;

/// Asks for them.
///
/// # Errors
/// The kernel's answer can't be read.
pub fn targets(view: &View) -> Result<Targets> {
    let forwards = view.serving().flat_map(|(_, uplink)| &uplink.forwards);
    let targets: BTreeSet<Ipv4Addr> = forwards.map(|forward| forward.to).collect();
    let targets = targets.into_iter().take(MOST);
    targets
        .map(|target| Ok((target, view.snapshot.route_get(&target.to_string())?)))
        .collect()
}

/// All of it.
///
/// # Errors
/// The kernel's answer can't be read.
pub fn check(view: &View, targets: &Targets) -> Result<Vec<Finding>> {
    let mut findings = lan_networks(view)?;
    let arp = fs::read_to_string("/proc/net/arp").unwrap_or_default();
    for (name, uplink) in view.serving() {
        let reached: BTreeSet<Ipv4Addr> =
            uplink.forwards.iter().map(|forward| forward.to).collect();
        let mut faults: BTreeMap<Fault, Vec<Ipv4Addr>> = BTreeMap::new();
        for target in reached {
            if let Some(fault) = targets
                .get(&target)
                .and_then(|way| fault(view, &arp, target, way))
            {
                faults.entry(fault).or_default().push(target);
            }
        }
        for (fault, targets) in faults {
            let what = format!("the forwards' target {}: {}", few(targets), fault.why);
            let mut finding = Finding::stops(fault.id, what).of(name);
            finding.mend = fault.mend;
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

/// LAN networks that are on no LAN interface.
fn lan_networks(view: &View) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let lans = &view.config.lan.interfaces;
    for network in &view.config.lan.networks {
        let host = network.nth(1).unwrap_or(network.ip());
        let way = view.snapshot.route_get(&host.to_string())?;
        let place = match way {
            Ok(way) if way.is_local => continue,
            Ok(way) if lans.iter().any(|lan| lan.as_str() == way.dev) => continue,
            Ok(way) => format!("behind {}", way.dev),
            Err(words) => format!("nowhere ({words})"),
        };
        let what = format!(
            "the LAN's network {network} is {place}, not on {}",
            few(lans)
        );
        findings.push(
            Finding::harms("lan-network", what)
                .mend("[lan] interfaces = […], networks = […]: what ip -4 address shows"),
        );
    }
    Ok(findings)
}

/// What can be wrong with forwards' targets.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Fault {
    id: &'static str,
    /// The end of a sentence.
    why: String,
    mend: Vec<String>,
}

/// What is wrong with a forward's target, as far as routing can tell.
fn fault(
    view: &View,
    arp: &str,
    target: Ipv4Addr,
    way: &Result<RouteLookup, String>,
) -> Option<Fault> {
    let fault = |id, why, mend| Some(Fault { id, why, mend });
    let way = match way {
        Ok(way) => way,
        Err(words) => return fault("target-route", format!("no route: {words}"), Vec::new()),
    };
    if way.is_local {
        let why = "the router's own address, whose replies go by the default route".into();
        let mend = "forward = […]: without it; what the router listens on needs no forward";
        return fault("target-own", why, vec![mend.into()]);
    }
    let mut links = view.links().values().flatten();
    if links.any(|link| link.interface.as_str() == way.dev) {
        let why = format!("routed out of the uplink {}, to no LAN", way.dev);
        let rules = view.snapshot.kernel.routing.rules.iter().filter(|rule| {
            let table = rule.table().filter(|table| *table != TableId::MAIN);
            let is_ahead = rule.priority < BEHIND && table == way.table;
            !rule.is_ours() && table.is_some() && is_ahead
        });
        let blamed = blame(
            Finding::stops("target-route", why),
            &rules.collect::<Vec<_>>(),
        );
        return fault("target-route", blamed.what, blamed.mend);
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

/// Replies that leave by another link than the request came by, asked of the kernel; whether all
/// that should stand does is another question, and asked elsewhere.
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
    if !stands(view, routing.table) || sysctl::read("net/ipv4/ip_forward").as_deref() == Some("0") {
        return Ok(findings);
    }
    let mut seen = BTreeSet::new();
    let mut lost: BTreeMap<(String, &str), Vec<Ipv4Addr>> = BTreeMap::new();
    for forward in &uplink.forwards {
        let Some(Ok(way)) = targets.get(&forward.to) else {
            continue;
        };
        if way.is_local || way.dev == interface || !seen.insert(forward.to) {
            continue;
        }
        let outside = forward.from.first().map_or(OUTSIDE, |from| from.ip());
        let question = format!(
            "{outside} from {} iif {} mark {:#x}",
            forward.to, way.dev, routing.mark.value
        );
        let answer = match view.snapshot.route_get(&question)? {
            Ok(answer) if answer.dev == interface => continue,
            Ok(answer) => by(&answer),
            Err(words) => words,
        };
        let place = lost.entry((answer, &way.dev)).or_default();
        place.push(forward.to);
    }
    for ((answer, lan), targets) in lost {
        let what = format!(
            "replies of {} with the mark {} do not leave by {interface}: {answer}",
            few(targets),
            routing.mark
        );
        let ahead = ahead(view, Some(lan), routing.mark);
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
            let unmarked = FwMark {
                value: 0,
                ..routing.mark
            };
            let ahead = ahead(view, None, unmarked);
            findings.push(blame(Finding::harms("own-route", what), &ahead));
        }
    }
    Ok(findings)
}

/// Whether the table has its rules and its route: all other differences are told elsewhere.
fn stands(view: &View, table: TableId) -> bool {
    let (observed, desired) = (&view.comparison.installed, &view.comparison.desired);
    let rules = desired
        .rules
        .iter()
        .filter(|rule| rule.table() == Some(table));
    let routes = desired.routes.iter().filter(|route| route.table == table);
    rules.clone().count() > 0
        && rules.into_iter().all(|rule| observed.rules.contains(rule))
        && routes
            .into_iter()
            .all(|route| observed.routes.contains(route))
}

fn by(way: &RouteLookup) -> String {
    match way.table {
        Some(table) => format!("by {}, table {table}", way.dev),
        None => format!("by {}", way.dev),
    }
}

/// Names the rules that came first, and moves them behind ours.
fn blame(mut finding: Finding, ahead: &[&RouteRule]) -> Finding {
    if ahead.is_empty() {
        return finding;
    }
    let texts = ahead.iter().map(|rule| format!("\"{}\"", rule.listed()));
    finding.what += &format!("; ahead of our rules: {}", few(texts));
    for rule in ahead {
        finding = behind(finding, rule);
    }
    finding
}

/// Names the commands that move a rule behind ours.
fn behind(finding: Finding, rule: &RouteRule) -> Finding {
    let moved = RouteRule {
        priority: BEHIND,
        ..rule.clone()
    };
    finding
        .mend(format!("ip rule add {moved}"))
        .mend(format!("ip rule del {rule}"))
}

/// A priority behind ours and ahead of the main table's.
const BEHIND: u32 = 32765;

/// Others' rules that a packet with this mark, from this interface or from the router itself, comes to
/// before it comes to the last of ours, and that may send it elsewhere.
fn ahead<'a>(view: &'a View, iif: Option<&str>, mark: FwMark) -> Vec<&'a RouteRule> {
    let ours = view.snapshot.kernel.routing.rules.iter().rposition(|rule| {
        let priority = &view.config.priority;
        rule.is_ours() && [priority.mark, priority.source].contains(&rule.priority)
    });
    let rules = view
        .snapshot
        .kernel
        .routing
        .rules
        .iter()
        .take(ours.unwrap_or(0));
    let may = |rule: &&RouteRule| {
        let is_kernels = rule.priority == 0 && rule.table() == Some(TableId::LOCAL);
        let fits_iif = match (&rule.iif, iif) {
            (None, _) => true,
            (Some(theirs), Some(iif)) => theirs == iif,
            (Some(theirs), None) => theirs == "lo",
        };
        let fits_mark = rule.is_negated() || rule.fwmark.is_none_or(|theirs| meets(theirs, mark));
        // All of a table but its default route: it knows only what is near.
        let is_near = rule.suppress_prefixlength.is_some();
        !rule.is_ours() && !is_kernels && fits_iif && fits_mark && !is_near
    };
    rules.filter(may).collect()
}

/// Whether a packet with our mark, and any other bits, can have theirs.
fn meets(theirs: FwMark, ours: FwMark) -> bool {
    (theirs.value ^ ours.value) & theirs.mask & ours.mask == 0
}

/// Others' rules ahead of ours that could take any packet, though now the kernel does not say so.
fn rules_ahead(view: &View) -> Vec<Finding> {
    let serving = view.serving_links();
    let routings: Vec<_> = serving
        .filter_map(|(name, uplink, _)| Some((name, uplink.routing.as_ref()?)))
        .collect();
    let mut findings: Vec<Finding> = Vec::new();
    let mut told = BTreeSet::new();
    for (name, routing) in routings {
        for lan in &view.config.lan.interfaces {
            for rule in ahead(view, Some(lan.as_str()), routing.mark) {
                let is_broad = rule.from.is_none()
                    && rule.to.is_none()
                    && rule.rest.iter().all(|word| word == NOT)
                    && rule.table().is_some_and(|table| !table.is_systems());
                if is_broad && told.insert(rule) {
                    let what = format!(
                        "the rule \"{}\" is ahead of ours: what its table has a route for goes there",
                        rule.listed()
                    );
                    let finding = Finding::note("rule-ahead", what).of(name);
                    findings.push(behind(finding, rule));
                }
            }
        }
    }
    findings
}

/// Others' routes in the uplinks' tables.
fn tables(view: &View) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, uplink) in &view.config.uplinks {
        let Some(routing) = &uplink.routing else {
            continue;
        };
        let routes = view.snapshot.kernel.routing.routes.iter();
        let theirs: Vec<_> = routes
            .filter(|route| !route.is_ours() && route.table == routing.table)
            .collect();
        let Some(default) = theirs.iter().find(|route| route.is_default()) else {
            if !theirs.is_empty() {
                let what = format!(
                    "others' routes in its table {}: {}",
                    routing.table,
                    few(&theirs)
                );
                findings.push(Finding::note("table-routes", what).of(name));
            }
            continue;
        };
        let what = format!(
            "another's default route in its table {}: \"{}\"",
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
                what + ": replies take it once the link is gone",
            )
        };
        let finding = finding.of(name).mend(format!("ip route del {default}"));
        findings.push(if is_in_the_way {
            finding.mend("mh-hook sync")
        } else {
            finding
        });
    }
    findings
}

/// Others' rules by marks that share bits with ours.
fn marks(view: &View) -> Vec<Finding> {
    let mut findings = Vec::new();
    let uplinks = view.config.uplinks.iter();
    let marks: Vec<(&UplinkName, FwMark)> = uplinks
        .filter_map(|(name, uplink)| Some((name, uplink.routing.as_ref()?.mark)))
        .collect();
    for rule in &view.snapshot.kernel.routing.rules {
        let Some(theirs) = rule.fwmark.filter(|_| !rule.is_ours()) else {
            continue;
        };
        let shares_bits = theirs.mask & view.config.mask != 0;
        let Some((name, ours)) = marks
            .iter()
            .find(|(_, ours)| shares_bits && !rule.is_negated() && meets(theirs, *ours))
        else {
            continue;
        };
        // Without any of our bits set it matches what is not marked.
        if theirs.value & view.config.mask == 0 {
            continue;
        }
        let what = format!(
            "another's rule goes by bits of our mask {:#x}, and by its mark {ours}: \"{}\"",
            view.config.mask,
            rule.listed()
        );
        findings.push(
            Finding::harms("mark-rule", what)
                .of(name)
                .mend("[mark] mask = …: bits that nobody else uses, and mark = … within it"),
        );
    }
    findings
}

/// Whether the router has a way out at all.
pub fn default_route(snapshot: &Snapshot) -> Option<Finding> {
    let routes = snapshot.kernel.routing.routes.iter();
    let has_some = routes.filter(|route| !route.is_ours()).any(|route| {
        let Route {
            kind, destination, ..
        } = route;
        // A tunnel may lay two halves over the default route.
        *kind == RouteKind::UNICAST
            && destination.prefix() <= 1
            && destination.ip().is_unspecified()
    });
    (!has_some).then(|| {
        Finding::harms(
            "default-route",
            "there is no default route: the LAN and the router itself reach nothing outside",
        )
        .mend("defaultroute in /etc/ppp/peers of the link that everything else goes out by")
    })
}
