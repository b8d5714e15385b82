//! The LAN's interfaces and the uplinks' links, and whether our entries are installed.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use super::peers::peers;
use super::{Finding, SYNC, Severity, View, count, few};
use crate::config::{Config, Uplink};
use crate::inspect::drift::Drift;
use crate::inspect::snapshot::{Comparison, Snapshot};
use crate::model::names::{IfName, UplinkName};
use crate::model::netfilter::Table;
use crate::model::state::State;
use crate::reconcile::diff::diff;
use crate::reconcile::parts::parts;
use crate::reconcile::{not_listed, unlisted, writes_to};

/// Checks both sides of the router.
pub fn check(view: &View) -> Vec<Finding> {
    let mut findings = lan(view);
    for (name, uplink) in &view.config.uplinks {
        let is_told = view.comparison.troubles.contains_key(name);
        if view.comparison.links.get(name).is_none_or(Option::is_none) && !is_told {
            findings.push(link(view, name, uplink));
        }
    }
    findings.extend(addresses(view));
    findings
}

/// Addresses that nobody outside can reach, and those that a forward names and the link does not have.
fn addresses(view: &View) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, uplink, link) in view.serving_links() {
        let interface = &link.interface;
        if let Some(what) = not_public(link.address)
            && link.addresses.iter().all(|it| not_public(*it).is_some())
        {
            let what = format!(
                "{interface} has the address {}, {what}: nobody outside can reach the forwards",
                link.address
            );
            let fix = "ask the provider for a public address".to_owned();
            findings.push(Finding::error("address-not-public", what).of(name).fix(fix));
        }
        let named = uplink.forwards.iter().filter_map(|forward| forward.address);
        let gone: BTreeSet<Ipv4Addr> = named.filter(|it| !link.addresses.contains(it)).collect();
        if !gone.is_empty() {
            let what = format!(
                "forwards name {}, which {interface} does not have: nothing is forwarded there",
                few(gone)
            );
            let fix = format!("ip -4 address show {interface}");
            findings.push(Finding::warning("forward-address", what).of(name).fix(fix));
        }
    }
    findings
}

/// Whose an address is that is not routed in the Internet; none for a public one.
fn not_public(address: Ipv4Addr) -> Option<&'static str> {
    let [first, second, ..] = address.octets();
    match (first, second) {
        (100, 64..=127) => Some("one of the provider's own translation (RFC 6598)"),
        _ if address.is_private() => Some("a private one (RFC 1918)"),
        _ => None,
    }
}

const MISSING: &str = "does not exist";
const DOWN: &str = "is down";

/// Why an interface carries nothing; none where it is up and has an address.
fn fault(view: &View, interface: &str) -> Option<&'static str> {
    match view.snapshot.kernel.links.get(interface) {
        None => Some(MISSING),
        Some(link) if !link.up => Some(DOWN),
        Some(link) if link.addresses.is_empty() => Some("has no IPv4 address"),
        Some(_) => None,
    }
}

fn lan(view: &View) -> Vec<Finding> {
    let lans = view.config.lan.interfaces.iter();
    let mut findings = Vec::new();
    for (lan, fault) in lans.filter_map(|lan| Some((lan, fault(view, lan.as_str())?))) {
        let what = format!("the LAN's interface {lan} {fault}");
        let mut finding = Finding::warning("lan-interface", what);
        if fault == MISSING {
            let fix = format!("[lan] interfaces = […]: without \"{lan}\", or add the interface");
            finding = finding.fix(fix);
        } else if fault == DOWN {
            finding = finding.fix(format!("ip link set {lan} up"));
        }
        findings.push(finding);
    }
    let is_cut_off = findings.len() == view.config.lan.interfaces.len();
    let findings = findings.into_iter().map(|it| it.error_if(is_cut_off));
    findings.collect()
}

/// An uplink whose link is down or not known.
fn link(view: &View, name: &UplinkName, uplink: &Uplink) -> Finding {
    let interface = uplink.identity.interface.as_ref();
    let fault = interface.and_then(|interface| fault(view, interface.as_str()));
    let what = match (interface, fault) {
        (Some(interface), Some(fault)) => format!("the uplink's link {interface} {fault}"),
        (Some(interface), None) => {
            format!("no installed entry tells whether {interface} is the uplink's link now")
        }
        (None, _) => "no installed entry tells which interface is the uplink's link: it was not dialled, or the hook was not run".into(),
    };
    let is_serving = !uplink.forwards.is_empty();
    let finding = Finding::warning("link", what).of(name).error_if(is_serving);
    if let Some(free) = free(view, interface) {
        return finding.fix(format!("mh-hook --uplink {name} up {free}"));
    }
    if let Some((peer, _)) = peers(&view.snapshot.root, view.config).remove(name) {
        return finding.fix(format!("pon {peer}"));
    }
    match interface.filter(|_| fault == Some(DOWN)) {
        // pppd's links are dialled: ARPHRD_PPP (linux/if_arp.h).
        Some(interface)
            if view
                .snapshot
                .root
                .read(format!("/sys/class/net/{interface}/type"))
                .is_some_and(|kind| kind.trim() == "512") =>
        {
            finding.fix("pon PEER: the file in /etc/ppp/peers that dials it")
        }
        Some(interface) => finding.fix(format!("ip link set {interface} up")),
        None => finding,
    }
}

/// The one PPP link that is up, may be this uplink's, and is not another uplink's.
fn free<'a>(view: &'a View, interface: Option<&IfName>) -> Option<&'a str> {
    let names = view.snapshot.kernel.links.keys().map(String::as_str);
    let mut free = names.filter(|name| {
        let may_be = interface.map_or(name.starts_with("ppp"), |own| own.as_str() == *name);
        may_be && fault(view, name).is_none() && !view.is_link(name)
    });
    free.next().filter(|_| free.next().is_none())
}

/// Tables that iptables-save does not list, so that nobody knows what they hold.
pub fn tables(snapshot: &Snapshot, config: Option<&Config>) -> Vec<Finding> {
    let unlisted = snapshot.kernel.ruleset.incompatible.iter();
    let findings = unlisted.map(|name| {
        let is_used = |table: &Table| table.name() == name && writes_to(*table, config);
        let (what, fix) = not_listed(name);
        let mut finding = Finding::info("table-not-listed", what).fix(fix);
        if Table::ALL.iter().any(is_used) {
            finding.what += ", so mh-hook writes nothing there";
            // What is installed goes on working.
            finding.severity = Severity::Warning;
        }
        finding
    });
    findings.collect()
}

/// Checks our entries.
pub fn entries(view: &View) -> Vec<Finding> {
    // Entries are missing because nothing is written while a table is not listed, which is a finding of its own.
    match unlisted(Some(view.config), &view.snapshot.kernel.ruleset) {
        None => drift(view),
        Some(_) => Vec::new(),
    }
}

/// Entries of ours that are missing or extra, and those of no configured uplink.
fn drift(view: &View) -> Vec<Finding> {
    let mut findings = Vec::new();
    let Comparison {
        owners,
        installed,
        links,
        ..
    } = &view.comparison;
    let (parts, orphans) = parts(view.config, owners, installed, links);
    for (name, part) in &parts {
        let steps = view.snapshot.steps(&part.installed, &part.desired);
        let drift = Drift::entries(&steps);
        let all = Drift::entries(&diff(&State::default(), &part.desired)).missing;
        let Some(summary) = drift.summary(all.len()) else {
            continue;
        };
        let is_serving = !view.config.uplinks[name].forwards.is_empty();
        let finding = Finding::warning("drift", summary).of(name);
        let mut finding = finding.error_if(is_serving && !drift.missing.is_empty());
        finding.entries = drift.extra.into_iter().chain(drift.missing).collect();
        findings.push(finding.fix(SYNC));
    }
    let orphans = Drift::entries(&diff(&orphans, &State::default())).extra;
    if !orphans.is_empty() {
        let entries = count(
            orphans.len(),
            "entry of ours belongs",
            "entries of ours belong",
        );
        let what = format!("{entries} to no configured uplink");
        let mut finding = Finding::warning("orphans", what).fix(SYNC);
        finding.entries = orphans;
        findings.push(finding);
    }
    findings
}
