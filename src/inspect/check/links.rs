//! The LAN's interfaces and the uplinks' links, and whether our entries are installed.

use std::fmt;

use super::{Finding, View, Weight, count, few};
use crate::config::{Config, Uplink};
use crate::inspect::drift::Drift;
use crate::inspect::snapshot::{Comparison, Snapshot};
use crate::model::names::{IfName, UplinkName};
use crate::model::netfilter::Table;
use crate::model::state::State;
use crate::reconcile::diff::diff;
use crate::reconcile::parts::{Part, parts};
use crate::reconcile::{not_listed, unlisted, writes_to};

/// Checks both sides of the router, and our entries.
pub fn check(view: &View) -> Vec<Finding> {
    let mut findings = lan(view);
    for (name, uplink) in &view.config.uplinks {
        let is_told = view.comparison.troubles.contains_key(name);
        if view.links().get(name).is_none_or(Option::is_none) && !is_told {
            findings.push(link(view, name, uplink));
        }
    }
    // Entries are missing because nothing is written while a table is not listed, which is a finding of its own.
    if unlisted(Some(view.config), &view.snapshot.kernel.ruleset).is_none() {
        findings.extend(drift(view));
    }
    findings
}

/// Why an interface carries nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    Missing,
    Down,
    NoAddress,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "does not exist",
            Self::Down => "is down",
            Self::NoAddress => "has no IPv4 address",
        })
    }
}

/// None where the interface is up and has an address.
fn fault(view: &View, interface: &str) -> Option<Fault> {
    match view.snapshot.kernel.links.get(interface) {
        None => Some(Fault::Missing),
        Some(link) if !link.up => Some(Fault::Down),
        Some(link) if link.addresses.is_empty() => Some(Fault::NoAddress),
        Some(_) => None,
    }
}

fn lan(view: &View) -> Vec<Finding> {
    let interfaces = &view.config.lan.interfaces;
    let faulty: Vec<_> = interfaces
        .iter()
        .filter_map(|lan| Some((lan, fault(view, lan.as_str())?)))
        .collect();
    let is_cut_off = faulty.len() == interfaces.len();
    let findings = faulty.into_iter().map(|(lan, fault)| {
        let what = format!("the LAN's interface {lan} {fault}");
        let finding = if is_cut_off {
            Finding::stops("lan-interface", what)
        } else {
            Finding::harms("lan-interface", what)
        };
        match fault {
            Fault::Missing => finding.fix(format!(
                "[lan] interfaces = […]: without \"{lan}\", or add the interface"
            )),
            Fault::Down => finding.fix(format!("ip link set {lan} up")),
            Fault::NoAddress => finding,
        }
    });
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
    let finding = if uplink.forwards.is_empty() {
        Finding::harms("link", what)
    } else {
        Finding::stops("link", what)
    };
    let finding = finding.of(name);
    if let Some(free) = free(view, interface) {
        return finding.fix(format!("mh-hook --uplink {name} up {free}"));
    }
    if let Some(peer) = super::peers::of(&view.snapshot.root, view.config, name) {
        return finding.fix(format!("pon {peer}"));
    }
    match interface.filter(|_| fault == Some(Fault::Down)) {
        Some(interface) => finding.fix(format!("ip link set {interface} up")),
        None => finding,
    }
}

/// The one PPP link that is up, may be this uplink's, and is not another uplink's.
fn free<'a>(view: &'a View, interface: Option<&IfName>) -> Option<&'a str> {
    let is_taken = |name: &str| {
        let mut links = view.links().values().flatten();
        links.any(|link| link.interface.as_str() == name)
    };
    let names = view.snapshot.kernel.links.keys().map(String::as_str);
    let mut free = names.filter(|name| {
        let may_be = interface.map_or(name.starts_with("ppp"), |own| own.as_str() == *name);
        may_be && fault(view, name).is_none() && !is_taken(name)
    });
    free.next().filter(|_| free.next().is_none())
}

/// Tables that iptables-save does not list, so that nobody knows what they hold.
pub fn tables(snapshot: &Snapshot, config: Option<&Config>) -> Vec<Finding> {
    let unlisted = snapshot.kernel.ruleset.incompatible.iter();
    let findings = unlisted.map(|name| {
        let is_used = |table: &Table| table.name() == name && writes_to(*table, config);
        let (what, fix) = not_listed(name);
        let finding = if Table::ALL.iter().any(is_used) {
            let what = what + ", so mh-hook writes nothing there";
            // What is installed goes on working.
            Finding::harms("table-not-listed", what)
        } else {
            Finding::note("table-not-listed", what)
        };
        finding.fix(fix)
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
        findings.extend(differs(view.snapshot, part).map(|mut finding| {
            if view.config.uplinks[name].forwards.is_empty() {
                finding.weight = Weight::Harms;
            }
            finding.of(name)
        }));
    }
    let orphans = Drift::entries(&diff(&orphans, &State::default())).extra;
    if !orphans.is_empty() {
        let what = format!(
            "{} to no configured uplink; sync runs {}",
            count(
                orphans.len(),
                "entry of ours belongs",
                "entries of ours belong"
            ),
            few(orphans)
        );
        findings.push(Finding::harms("orphans", what).fix("mh-hook sync"));
    }
    findings
}

fn differs(snapshot: &Snapshot, part: &Part) -> Option<Finding> {
    let steps = snapshot.steps(&part.installed, &part.desired);
    let Drift { missing, extra } = Drift::entries(&steps);
    let mut texts = Vec::new();
    if !missing.is_empty() {
        let number = count(missing.len(), "entry is", "entries are");
        texts.push(format!("{number} missing: {}", few(&missing)));
    }
    if !extra.is_empty() {
        let number = count(extra.len(), "entry is", "entries are");
        texts.push(format!("{number} extra: {}", few(&extra)));
    }
    let what = texts.join("; ");
    let finding = match (missing.is_empty(), extra.is_empty()) {
        (true, true) => return None,
        (true, false) => Finding::harms("drift", what),
        (false, _) => Finding::stops("drift", what),
    };
    Some(finding.fix("mh-hook sync"))
}
