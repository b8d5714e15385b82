//! iptables: whether requests and replies come through, keep their marks, and reach our DNAT first;
//! what stands in the other backend.

use std::collections::BTreeSet;

use anyhow::Result;

use super::walk::{Fit, Marking, Packet, Place, Walk, transfer_masks, walk};
use super::{Finding, View, count, few};
use crate::config::Uplink;
use crate::inspect::snapshot::Snapshot;
use crate::model::forward::{Forward, Protocol};
use crate::model::link::UplinkLink;
use crate::model::names::UplinkName;
use crate::model::netfilter::{self, Rule, Table};
use crate::model::route::FwMark;
use crate::model::state::{Entry, State};
use crate::reconcile::diff::diff;
use crate::reconcile::other_backend::owned;
use crate::reconcile::ownership::{Owner, Owners};

use super::routing::Targets;

/// One forward's packets, by one protocol.
struct Case<'a> {
    name: &'a UplinkName,
    uplink: &'a Uplink,
    link: &'a UplinkLink,
    forward: &'a Forward,
    protocol: Option<Protocol>,
    /// The LAN's interface that the target is behind.
    lan: &'a str,
}

/// All forwards of the links that are up.
pub fn check(view: &View, targets: &Targets) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, uplink, link) in view.serving_links() {
        let mut dropped: Dropped = Dropped::default();
        let mut told = BTreeSet::new();
        for forward in &uplink.forwards {
            let Some(Ok(way)) = targets.get(&forward.to).filter(|way| {
                way.as_ref()
                    .is_ok_and(|way| !way.is_local && !way.dev.is_empty())
            }) else {
                continue;
            };
            let protocols = forward.protocols.iter().copied().map(Some);
            let any = forward.protocols.is_empty().then_some(None);
            for protocol in protocols.chain(any) {
                let case = Case {
                    name,
                    uplink,
                    link,
                    forward,
                    protocol,
                    lan: &way.dev,
                };
                for finding in journey(view, &case, &mut dropped) {
                    // The same rule harms many forwards.
                    if told.insert((finding.id, finding.fixes.clone())) {
                        findings.push(finding.of(name));
                    }
                }
            }
        }
        findings.extend(dropped.finding(view, name, uplink, link));
    }
    findings
}

/// Requests and replies of a forward, chain by chain; what drops them is collected.
fn journey(view: &View, case: &Case, dropped: &mut Dropped) -> Vec<Finding> {
    let mut findings = Vec::new();
    let Case { link, forward, .. } = case;
    let owners = &view.comparison.owners;
    let uplink = link.interface.as_str();
    let port = forward.ports.map(|ports| ports.first);
    let mut request = Packet {
        iif: Some(uplink),
        destination: Some(link.address),
        is_local: true,
        protocol: case.protocol,
        port,
        states: &["NEW"],
        ..Packet::default()
    };
    let (mut marks, mut end) = (Vec::new(), None);
    let goal = case.name.chain();
    for (_, ruleset) in &view.snapshot.rulesets {
        for table in ["raw", "mangle"] {
            let walk = walk(ruleset, table, "PREROUTING", None, &mut request);
            end = end.or(walk.ended.clone().filter(|_| table == "mangle"));
            marks.extend(dropped.take(case, table, "PREROUTING", walk));
        }
        let walk = walk(ruleset, "nat", "PREROUTING", Some(&goal), &mut request);
        findings.extend(walk.ended.map(|place| ahead(case, &place)));
    }
    request.destination = Some(forward.to);
    request.is_local = false;
    request.oif = Some(case.lan);
    request.port = forward.to_port.or(port);
    request.states = &["NEW", "DNAT"];
    for (_, ruleset) in &view.snapshot.rulesets {
        for (table, chain) in [
            ("mangle", "FORWARD"),
            ("filter", "FORWARD"),
            ("security", "FORWARD"),
            ("mangle", "POSTROUTING"),
        ] {
            let walk = walk(ruleset, table, chain, None, &mut request);
            marks.extend(dropped.take(case, table, chain, walk));
        }
    }
    let Some(routing) = &case.uplink.routing else {
        return findings;
    };
    let (mark, mask) = (routing.mark.value, routing.mark.mask);
    let is_lost = request.connmark & mask != mark;
    findings.extend(wiped(
        owners,
        &marks,
        mask,
        is_lost,
        "connection's",
        |bits| bits.1,
    ));
    if is_lost {
        if findings.is_empty() {
            findings.extend(end.map(|place| skipped(&place)));
        }
        return findings;
    }
    let mut reply = Packet {
        iif: Some(case.lan),
        source: Some(forward.to),
        protocol: case.protocol,
        states: &["ESTABLISHED", "DNAT"],
        connmark: request.connmark,
        ..Packet::default()
    };
    let (mut marks, mut end) = (Vec::new(), None);
    for (_, ruleset) in &view.snapshot.rulesets {
        for table in ["raw", "mangle"] {
            let walk = walk(ruleset, table, "PREROUTING", None, &mut reply);
            end = end.or(walk.ended.clone().filter(|_| table == "mangle"));
            marks.extend(dropped.take(case, table, "PREROUTING", walk));
        }
    }
    // What comes ahead of ours is set right by ours.
    let behind: Vec<Marking> = marks
        .into_iter()
        .rev()
        .take_while(|marking| !is_ours(owners, &marking.place))
        .collect();
    let is_lost = reply.mark & mask != mark;
    let wiped = wiped(owners, &behind, mask, is_lost, "reply's", |bits| bits.0);
    if is_lost && wiped.is_none() {
        findings.extend(end.map(|place| skipped(&place)));
    }
    findings.extend(wiped);
    reply.oif = Some(uplink);
    for (_, ruleset) in &view.snapshot.rulesets {
        for (table, chain) in [
            ("mangle", "FORWARD"),
            ("filter", "FORWARD"),
            ("security", "FORWARD"),
            ("mangle", "POSTROUTING"),
        ] {
            let walk = walk(ruleset, table, chain, None, &mut reply);
            dropped.take(case, table, chain, walk);
        }
    }
    findings
}

/// Whether a rule stands in a chain of ours, or is an entry of ours.
fn is_ours(owners: &Owners, place: &Place) -> bool {
    let mut tables = Table::ALL.into_iter();
    let table = tables.find(|table| table.name() == place.table);
    table.is_some_and(|table| {
        let rule = Rule(place.rule.spec());
        owners.owner(Entry::Rule(table, place.chain, &rule)) != Owner::Foreign
    })
}

/// A rule that is not ours took the mark away, or may.
fn wiped(
    owners: &Owners,
    marks: &[Marking],
    mask: u32,
    is_lost: bool,
    whose: &str,
    bits: fn((u32, u32)) -> u32,
) -> Option<Finding> {
    let mut theirs = marks
        .iter()
        .filter(|marking| bits(marking.bits) & mask != 0 && !is_ours(owners, &marking.place));
    let desired = if is_lost { Fit::Always } else { Fit::Perhaps };
    let marking = theirs.rfind(|marking| marking.fit == desired)?;
    let place = &marking.place;
    let text = format!(
        "\"-t {} -A {} {}\" {} bits of our mask {mask:#x} in the {whose} mark",
        place.table,
        place.chain,
        place.rule.spec(),
        if is_lost { "changes" } else { "may change" },
    );
    let finding = if is_lost {
        Finding::stops("mark-wiped", text)
    } else {
        Finding::harms("mark-wiped", text)
    };
    Some(match masked(place, mask) {
        Some(command) => finding.fix(command),
        None => finding,
    })
}

/// The same rule in the same place, that leaves our bits alone.
fn masked(place: &Place, mask: u32) -> Option<String> {
    let index = place.rule.words.iter().position(|word| word == "-j")?;
    let target = place.rule.words.get(index + 1)?;
    let option = if let Some((nfmask, ctmask)) = transfer_masks(place.rule) {
        let mut words = place.rule.words.iter();
        let verb = words.find(|word| *word == "--save-mark" || *word == "--restore-mark")?;
        format!(
            "{verb} --nfmask {:#x} --ctmask {:#x}",
            nfmask & !mask,
            ctmask & !mask
        )
    } else {
        let set = FwMark::parse(place.rule.value("--set-xmark")?)?;
        let rest = FwMark {
            value: set.value & !mask,
            mask: set.mask & !mask,
        };
        format!("--set-xmark {rest}")
    };
    let mut words = vec!["-j".to_owned(), target.clone()];
    words.splice(0..0, place.rule.words[..index].iter().cloned());
    Some(format!(
        "iptables -t {} -R {} {} {} {option}",
        place.table,
        place.chain,
        place.number,
        netfilter::join(&words)
    ))
}

/// Another's rule let the packets out of the chain before they came to our marks.
fn skipped(place: &Place) -> Finding {
    let spec = place.rule.spec();
    let what = format!(
        "our marks are not reached: all packets leave ahead of them by \"-t mangle -A {} {spec}\"",
        place.chain
    );
    // Ours go to the end of the chain, and so does this then.
    Finding::stops("mark-skipped", what)
        .fix(format!(
            "iptables -t mangle -D {} {}",
            place.chain, place.number
        ))
        .fix(format!("iptables -t mangle -A {} {spec}", place.chain))
}

/// Another's rule took the request before it came to our DNAT.
fn ahead(case: &Case, place: &Place) -> Finding {
    let what = format!(
        "{} of {} does not come to our forwards: \"-t nat -A {} {}\" is ahead of them",
        service(case),
        case.link.address,
        place.chain,
        place.rule.spec()
    );
    Finding::stops("dnat-ahead", what)
}

/// `tcp/80`, `udp/27015-27030`, `gre`, `everything`
fn service(case: &Case) -> String {
    let protocol = match case.protocol {
        Some(protocol) => protocol.to_string(),
        None => return "everything".into(),
    };
    match case.forward.ports {
        None => protocol,
        Some(ports) => format!("{protocol}/{ports}"),
    }
}

/// What is dropped of an uplink's forwards, and by what first.
#[derive(Default)]
struct Dropped {
    services: Vec<String>,
    by: Option<String>,
    is_forward: bool,
}

impl Dropped {
    /// Notes what surely does not come through; the marks go on.
    fn take<'a>(
        &mut self,
        case: &Case,
        table: &str,
        chain: &str,
        walk: Walk<'a>,
    ) -> Vec<Marking<'a>> {
        let Some(last) = walk.droppers.last().filter(|_| !walk.passes) else {
            return walk.markings;
        };
        let service = service(case);
        if self.services.last() != Some(&service) {
            self.services.push(service);
        }
        self.is_forward |= (table, chain) == ("filter", "FORWARD");
        self.by.get_or_insert_with(|| match last {
            Some(place) => format!("\"-t {table} -A {} {}\"", place.chain, place.rule.spec()),
            None => format!("{chain}'s policy in the table {table}, DROP"),
        });
        walk.markings
    }

    fn finding(
        self,
        view: &View,
        name: &UplinkName,
        uplink: &Uplink,
        link: &UplinkLink,
    ) -> Option<Finding> {
        let what = format!(
            "{} dropped, requests or replies: {} by {}",
            count(self.services.len(), "forward is", "forwards are"),
            few(self.services),
            self.by?
        );
        let finding = Finding::stops("forward-dropped", what).of(name);
        let own = (Table::Filter, name.clone());
        let accepts = |state: &State| {
            let mut accepts = State::default();
            let own_table = state.tables.get(&own).cloned();
            accepts.insert(own.clone(), own_table.unwrap_or_default());
            accepts
        };
        let stands = diff(
            &accepts(&view.comparison.installed),
            &accepts(&view.comparison.desired),
        )
        .is_empty();
        Some(match (self.is_forward, uplink.accept_forward, stands) {
            (false, ..) => finding,
            (true, false, _) => finding
                .fix(format!("[uplink.{name}] accept-forward = true"))
                .fix("mh-hook sync"),
            (true, true, false) => finding.fix("mh-hook sync"),
            // Ours stand behind another's: they go in at the head.
            (true, true, true) => finding
                .fix(format!("mh-hook down {}", link.interface))
                .fix(format!("mh-hook up {}", link.interface)),
        })
    }
}

/// What stands in the backend that is not in use.
pub fn backends(snapshot: &Snapshot) -> Vec<Finding> {
    let Some((backend, ruleset)) = &snapshot.other_ruleset else {
        return Vec::new();
    };
    let mut findings = Vec::new();
    let (owners, ours) = owned(None, ruleset.clone());
    let names: BTreeSet<String> = ours.tables.keys().map(|(_, name)| name.chain()).collect();
    if !names.is_empty() {
        let finding = Finding::harms(
            "ours-in-the-other-backend",
            format!(
                "entries of ours stand in {backend} too, which is not in use, and are in force: {}",
                few(&names)
            ),
        );
        findings.push(finding.fix("mh-hook sync"));
    }
    let mut others = 0;
    for (table, chains) in &ruleset.tables {
        let ours = Table::ALL.into_iter().find(|it| it.name() == table);
        for (name, chain) in chains {
            let is_foreign = |rule: &&Rule| {
                ours.is_none_or(|table| {
                    owners.owner(Entry::Rule(table, name, rule)) == Owner::Foreign
                })
            };
            others += chain.rules.iter().filter(is_foreign).count();
        }
    }
    if others > 0 {
        let what = format!(
            "{} in {backend}, beside {}: both are in force, and each shows its own only",
            count(others, "rule stands", "rules stand"),
            snapshot.tools.backend
        );
        findings.push(Finding::note("both-backends", what));
    }
    findings
}

/// Chains of nftables that packets pass, and that iptables does not show.
///
/// # Errors
/// nft can't be run.
pub fn nftables(snapshot: &Snapshot) -> Result<Option<Finding>> {
    let listing = snapshot.tools.nft_chains()?.unwrap_or_default();
    let chains = foreign_chains(&listing);
    Ok((!chains.is_empty()).then(|| {
        let what = format!(
            "packets pass chains of nftables, too, that are not looked into here: {}",
            few(chains)
        );
        Finding::note("nftables", what).fix("nft list ruleset")
    }))
}

/// `table inet filter {`, `chain forward {`, `type filter hook forward priority filter; policy drop;`
fn foreign_chains(listing: &str) -> Vec<String> {
    let mut chains = Vec::new();
    let (mut table, mut chain) = ("", "");
    for line in listing.lines().map(str::trim) {
        let name = line.trim_end_matches(" {");
        if let Some(name) = name.strip_prefix("table ") {
            table = name;
        } else if let Some(name) = name.strip_prefix("chain ") {
            chain = name;
        } else if let Some((_, hook)) = line.split_once(" hook ") {
            let (family, name) = table.split_once(' ').unwrap_or(("ip", table));
            // What iptables-nft shows.
            let is_iptables =
                family == "ip" && matches!(name, "raw" | "mangle" | "nat" | "filter" | "security");
            let is_passed = matches!(family, "ip" | "inet")
                && matches!(hook.split(' ').next(), Some("prerouting" | "forward"));
            if is_passed && !is_iptables {
                let policy = if line.contains("policy drop") {
                    " (policy drop)"
                } else {
                    ""
                };
                chains.push(format!("{table} {chain}{policy}"));
            }
        }
    }
    chains
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_of_nftables_are_told_from_those_of_iptables() {
        let listing = "table ip filter {\n\tchain FORWARD {\n\t\ttype filter hook forward priority filter; policy accept;\n\t}\n}\n\
            table inet filter {\n\tchain input {\n\t\ttype filter hook input priority filter; policy drop;\n\t}\n\
            \tchain forward {\n\t\ttype filter hook forward priority filter; policy drop;\n\t}\n\tchain web {\n\t}\n}\n\
            table ip6 filter {\n\tchain FORWARD {\n\t\ttype filter hook forward priority filter; policy drop;\n\t}\n}\n";
        assert_eq!(
            foreign_chains(listing),
            ["inet filter forward (policy drop)"]
        );
        assert!(foreign_chains("").is_empty());
    }
}
