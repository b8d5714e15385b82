//! The LAN's interfaces and the uplinks' links, and whether our entries are installed.

use super::peers::peers;
use super::{Finding, Severity, View, count, few};
use crate::config::{Config, Uplink};
use crate::inspect::drift::Drift;
use crate::inspect::snapshot::{Comparison, Snapshot};
use crate::model::names::{IfName, UplinkName};
use crate::model::netfilter::Table;
use crate::model::state::State;
use crate::reconcile::diff::diff;
use crate::reconcile::parts::parts;
use crate::reconcile::{not_listed, unlisted, writes_to};

/// Checks both sides of the router, and our entries.
pub fn check(view: &View) -> Vec<Finding> {
    let mut findings = lan(view);
    for (name, uplink) in &view.config.uplinks {
        let is_told = view.comparison.troubles.contains_key(name);
        if view.comparison.links.get(name).is_none_or(Option::is_none) && !is_told {
            findings.push(link(view, name, uplink));
        }
    }
    // Entries are missing because nothing is written while a table is not listed, which is a finding of its own.
    if unlisted(Some(view.config), &view.snapshot.kernel.ruleset).is_none() {
        findings.extend(drift(view));
    }
    findings
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
        let Drift { missing, extra } = Drift::entries(&steps);
        let mut texts = Vec::new();
        for (entries, kind) in [(&missing, "missing"), (&extra, "extra")] {
            if !entries.is_empty() {
                let number = count(entries.len(), "entry is", "entries are");
                texts.push(format!("{number} {kind}: {}", few(entries)));
            }
        }
        if !texts.is_empty() {
            let is_serving = !view.config.uplinks[name].forwards.is_empty();
            let finding = Finding::warning("drift", texts.join("; ")).of(name);
            let finding = finding.error_if(is_serving && !missing.is_empty());
            findings.push(finding.fix("mh-hook sync"));
        }
    }
    let orphans = Drift::entries(&diff(&orphans, &State::default())).extra;
    if !orphans.is_empty() {
        let entries = count(
            orphans.len(),
            "entry of ours belongs",
            "entries of ours belong",
        );
        let orphans = few(orphans);
        let what = format!("{entries} to no configured uplink; sync runs {orphans}");
        findings.push(Finding::warning("orphans", what).fix("mh-hook sync"));
    }
    findings
}
