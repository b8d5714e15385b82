//! Where packets go: asked of the kernel, for the forwards' targets and for the replies. Where its
//! answer is another than it should be, others' rules and routes say why.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::Ipv4Addr;

use anyhow::Result;

use super::{Finding, View, few};
use crate::claim::Addressed;
use crate::config::Uplink;
use crate::ip::{Listed, Way};
use crate::state::{FwMark, RouteRule, TableId, UplinkName};
use crate::system::{self, System};

/// An address in the Internet that is nobody's (RFC 5737), to ask the kernel for.
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// The most forwards' targets that the kernel is asked for: a process each.
const MOST: usize = 200;

/// The kernel's way to each forward's target, or its refusal.
pub type Targets = BTreeMap<Ipv4Addr, Result<Way, String>>;

/// Asks for them.
///
/// # Errors
/// The kernel's answer can't be read.
pub fn targets(view: &View) -> Result<Targets> {
    let forwards = view.serving().flat_map(|(_, uplink)| &uplink.forwards);
    let targets: BTreeSet<Ipv4Addr> = forwards.map(|forward| forward.to).collect();
    let targets = targets.into_iter().take(MOST);
    targets
        .map(|target| Ok((target, view.system.route_get(&target.to_string())?)))
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
        let way = view.system.route_get(&host.to_string())?;
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
fn fault(view: &View, arp: &str, target: Ipv4Addr, way: &Result<Way, String>) -> Option<Fault> {
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
    let mut links = view.looks.values().flatten();
    if links.any(|link| link.interface.as_str() == way.dev) {
        let why = format!("routed out of the uplink {}, to no LAN", way.dev);
        let rules = view.system.survey.rules.iter().filter(|rule| {
            let is_main = matches!(rule.entry.table, TableId::MAIN | TableId(0));
            let is_ahead = rule.entry.priority < BEHIND && Some(rule.entry.table) == way.table;
            !rule.is_ours && !is_main && is_ahead
        });
        let blamed = blame(
            Finding::stops("target-route", why),
            &rules.collect::<Vec<_>>(),
        );
        return fault("target-route", blamed.what, blamed.mend);
    }
    let lans = &view.config.lan.interfaces;
    if !lans.iter().any(|lan| lan.as_str() == way.dev) {
        let why = format!(
            "behind {}, which is none of the LAN's interfaces: its replies get no mark",
            way.dev
        );
        let all: Vec<String> = lans.iter().map(|lan| format!("\"{lan}\"")).collect();
        let mend = format!("[lan] interfaces = [{}, \"{}\"]", all.join(", "), way.dev);
        return fault("target-lan", why, vec![mend]);
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
    link: &Addressed,
    targets: &Targets,
) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let Some(routing) = &uplink.routing else {
        return Ok(findings);
    };
    let interface = link.interface.as_str();
    if !stands(view, routing.table) || system::sysctl("net/ipv4/ip_forward").as_deref() == Some("0")
    {
        return Ok(findings);
    }
    let mut seen = BTreeSet::new();
    let mut lost: BTreeMap<(String, &str), Vec<Ipv4Addr>> = BTreeMap::new();
    for forward in &uplink.forwards {
        let Some(Ok(way)) = targets.get(&forward.to) else {
            continue;
        };
        let lans = &view.config.lan.interfaces;
        let is_behind_lan = !way.is_local && lans.iter().any(|lan| lan.as_str() == way.dev);
        if !is_behind_lan || !seen.insert(forward.to) {
            continue;
        }
        let outside = forward.from.first().map_or(OUTSIDE, |from| from.ip());
        let question = format!(
            "{outside} from {} iif {} mark {:#x}",
            forward.to, way.dev, routing.mark.value
        );
        let answer = match view.system.route_get(&question)? {
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
    match view.system.route_get(&question)? {
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
    let (observed, wanted) = (&view.system.observed, &view.wanted);
    let rules = wanted.rules.iter().filter(|rule| rule.table == table);
    let routes = wanted.routes.iter().filter(|route| route.table == table);
    rules.clone().count() > 0
        && rules.into_iter().all(|rule| observed.rules.contains(rule))
        && routes
            .into_iter()
            .all(|route| observed.routes.contains(route))
}

fn by(way: &Way) -> String {
    match way.table {
        Some(table) => format!("by {}, table {table}", way.dev),
        None => format!("by {}", way.dev),
    }
}

/// Names the rules that came first, and moves them behind ours.
fn blame(mut finding: Finding, ahead: &[&Listed<RouteRule>]) -> Finding {
    if ahead.is_empty() {
        return finding;
    }
    let texts = ahead.iter().map(|rule| format!("\"{}\"", rule.text));
    finding.what += &format!("; ahead of our rules: {}", few(texts));
    for rule in ahead {
        if let Some((priority, rest)) = rule.text.split_once(": ") {
            finding = finding
                .mend(format!("ip rule add {rest} priority {BEHIND}"))
                .mend(format!("ip rule del {rest} priority {priority}"));
        }
    }
    finding
}

/// A priority behind ours and ahead of the main table's.
const BEHIND: u32 = 32765;

/// Others' rules that a packet with this mark, from this interface or from the router itself, comes to
/// before it comes to the last of ours, and that may send it elsewhere.
fn ahead<'a>(view: &'a View, iif: Option<&str>, mark: FwMark) -> Vec<&'a Listed<RouteRule>> {
    let ours = view.system.survey.rules.iter().rposition(|rule| {
        let priority = &view.config.priority;
        rule.is_ours && [priority.mark, priority.source].contains(&rule.entry.priority)
    });
    let rules = view.system.survey.rules.iter().take(ours.unwrap_or(0));
    let may = |rule: &&Listed<RouteRule>| {
        let entry = &rule.entry;
        let is_kernels = entry.priority == 0 && entry.table == TableId(255);
        let fits_iif = match (&entry.iif, iif) {
            (None, _) => true,
            (Some(theirs), Some(iif)) => theirs == iif,
            (Some(theirs), None) => theirs == "lo",
        };
        let negated = entry.rest.iter().any(|word| word == "not");
        let fits_mark = negated || entry.fwmark.is_none_or(|theirs| meets(theirs, mark));
        // All of a table but its default route: it knows only what is near.
        let is_near = entry.suppress_prefixlength.is_some();
        !rule.is_ours && !is_kernels && fits_iif && fits_mark && !is_near
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
                let entry = &rule.entry;
                let is_broad = entry.from.is_none()
                    && entry.rest.iter().all(|word| word == "not")
                    && !matches!(entry.table, TableId(0 | 253 | 254 | 255));
                if is_broad && told.insert(&rule.text) {
                    let what = format!(
                        "the rule \"{}\" is ahead of ours: what its table has a route for goes there",
                        rule.text
                    );
                    let finding = Finding::note("rule-ahead", what).of(name);
                    findings.push(blame_only(finding, rule));
                }
            }
        }
    }
    findings
}

fn blame_only(finding: Finding, rule: &Listed<RouteRule>) -> Finding {
    match rule.text.split_once(": ") {
        Some((priority, rest)) => finding
            .mend(format!("ip rule add {rest} priority {BEHIND}"))
            .mend(format!("ip rule del {rest} priority {priority}")),
        None => finding,
    }
}

/// Others' routes in the uplinks' tables.
fn tables(view: &View) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, uplink) in &view.config.uplinks {
        let Some(routing) = &uplink.routing else {
            continue;
        };
        let routes = view.system.survey.routes.iter();
        let theirs: Vec<_> = routes
            .filter(|route| !route.is_ours && route.entry.table == routing.table)
            .collect();
        let Some(default) = theirs
            .iter()
            .find(|route| route.entry.destination == "default")
        else {
            if !theirs.is_empty() {
                let what = format!(
                    "others' routes in its table {}: {}",
                    routing.table,
                    few(theirs.iter().map(|route| &route.text))
                );
                findings.push(Finding::note("table-routes", what).of(name));
            }
            continue;
        };
        let what = format!(
            "another's default route in its table {}: \"{}\"",
            routing.table, default.text
        );
        let is_in_the_way = view.wanted.routes.iter().any(|route| {
            route.table == routing.table
                && route.dev.is_some()
                && !view.system.observed.routes.contains(route)
        });
        let finding = if is_in_the_way {
            Finding::stops("table-default", what)
        } else {
            Finding::harms(
                "table-default",
                what + ": replies take it once the link is gone",
            )
        };
        let finding = finding
            .of(name)
            .mend(format!("ip route del {}", default.text));
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
    for rule in &view.system.survey.rules {
        let Some(theirs) = rule.entry.fwmark.filter(|_| !rule.is_ours) else {
            continue;
        };
        let is_negated = rule.entry.rest.iter().any(|word| word == "not");
        let shares_bits = theirs.mask & view.config.mask != 0;
        let Some((name, ours)) = marks
            .iter()
            .find(|(_, ours)| shares_bits && !is_negated && meets(theirs, *ours))
        else {
            continue;
        };
        // Without any of our bits set it matches what is not marked.
        if theirs.value & view.config.mask == 0 {
            continue;
        }
        let what = format!(
            "another's rule goes by bits of our mask {:#x}, and by its mark {ours}: \"{}\"",
            view.config.mask, rule.text
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
pub fn default_route(system: &System) -> Option<Finding> {
    let routes = system.survey.routes.iter();
    let has_some = routes.filter(|route| !route.is_ours).any(|route| {
        let is_way = matches!(route.entry.kind.as_deref(), None | Some("unicast"));
        // A tunnel may lay two halves over the default route.
        is_way && matches!(&route.entry.destination[..], "default" | "0.0.0.0/1")
    });
    (!has_some).then(|| {
        Finding::harms(
            "default-route",
            "there is no default route: the LAN and the router itself reach nothing outside",
        )
        .mend("defaultroute in /etc/ppp/peers of the link that everything else goes out by")
    })
}
