//! The LAN's interfaces, the uplinks' links, and whether what should stand does.

use super::{Finding, View, Weight, count, few};
use crate::config::Uplink;
use crate::inspect::snapshot::Comparison;
use crate::model::names::{IfName, UplinkName};
use crate::model::state::State;
use crate::reconcile::diff::{Change, Step, diff};
use crate::reconcile::ownership::parts;

/// Both sides of the router.
pub fn check(view: &View) -> Vec<Finding> {
    let mut findings = lan(view);
    for (name, uplink) in &view.config.uplinks {
        match view.links().get(name) {
            Some(Some(_)) => {}
            _ => findings.push(link(view, name, uplink)),
        }
    }
    findings.extend(drift(view));
    findings
}

/// Why an interface is of no use; none where it is up.
fn fault(view: &View, interface: &str) -> Option<&'static str> {
    match view.snapshot.kernel.links.get(interface) {
        None => Some("does not exist"),
        Some(link) if !link.up => Some("is down"),
        Some(link) if link.addresses.is_empty() => Some("has no IPv4 address"),
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
            "is down" => finding.mend(format!("ip link set {lan} up")),
            "does not exist" => finding.mend(format!(
                "[lan] interfaces = […]: without {lan:?}, or make it"
            )),
            _ => finding,
        }
    });
    findings.collect()
}

/// An uplink whose link can't carry anything.
fn link(view: &View, name: &UplinkName, uplink: &Uplink) -> Finding {
    let interface = uplink.identity.interface.as_ref();
    let what = match interface {
        Some(interface) => match fault(view, interface.as_str()) {
            Some(fault) => format!("its link {interface} {fault}"),
            None => format!("nothing tells whether {interface} is its link now"),
        },
        None => {
            "nothing tells which link is its own: it is not dialled, or no hook has seen it".into()
        }
    };
    let is_serving = !uplink.forwards.is_empty();
    let finding = if is_serving {
        Finding::stops("link", what)
    } else {
        Finding::harms("link", what)
    };
    let finding = finding.of(name);
    if let Some(free) = free(view, interface) {
        return finding.mend(format!("mh-hook --uplink {name} up {free}"));
    }
    if let Some(peer) = super::peers::of(view.config, name) {
        return finding.mend(format!("pon {peer}"));
    }
    match interface {
        Some(interface) if fault(view, interface.as_str()) == Some("is down") => {
            finding.mend(format!("ip link set {interface} up"))
        }
        _ => finding,
    }
}

/// The one PPP link that is up and may be this uplink's, since it is nobody's yet.
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

/// What stands and should not, or should and does not.
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
        let finding = differs(&part.installed, &part.desired).map(|mut finding| {
            if view.config.uplinks[name].forwards.is_empty() {
                finding.weight = Weight::Harms;
            }
            finding.of(name)
        });
        findings.extend(finding);
    }
    let entries = commands(&diff(&orphans, &State::default()));
    if !entries.is_empty() {
        let what = format!(
            "{} of ours, that no configured uplink claims: gone with {}",
            count(entries.len(), "entry stands", "entries stand"),
            few(entries.iter().map(|(_, command)| command))
        );
        findings.push(Finding::harms("orphans", what).mend("mh-hook sync"));
    }
    findings
}

fn differs(installed: &State, desired: &State) -> Option<Finding> {
    let entries = commands(&diff(installed, desired));
    let (extra, missing): (Vec<_>, Vec<_>) = entries
        .iter()
        .partition(|(change, _)| *change == Change::Delete);
    let list = |entries: &[&(Change, String)]| few(entries.iter().map(|(_, command)| command));
    let finding = if missing.is_empty() {
        let what = format!(
            "{}: {}",
            count(
                extra.len(),
                "entry of its own should not stand",
                "entries of its own should not stand"
            ),
            list(&extra)
        );
        Finding::harms("drift", what)
    } else {
        let what = format!(
            "{} missing: {}",
            count(missing.len(), "entry is", "entries are"),
            list(&missing)
        );
        Finding::stops("drift", what)
    };
    (!entries.is_empty()).then(|| finding.mend("mh-hook sync"))
}

/// What the steps change.
fn commands(steps: &[Step]) -> Vec<(Change, String)> {
    let changes = steps.iter().flat_map(Step::changes);
    changes
        .map(|(change, command)| (change, command.to_string()))
        .collect()
}
