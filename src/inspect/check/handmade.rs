//! A recipe that was typed by hand, or is in somebody's script, and still in place: it does the same as our entries, and is
//! in their way.

use super::{Finding, View, count};
use crate::config::{Routing, Uplink};
use crate::model::forward::Forward;
use crate::model::link::UplinkLink;
use crate::model::netfilter::{Rule, Table};
use crate::model::route::{FwMark, Route, RouteRule};
use crate::model::state::Entry;
use crate::reconcile::command::{Command, Edit};
use crate::reconcile::dnat;
use crate::reconcile::ownership::Owner;

/// What follows from entries made by hand.
const CONSEQUENCES: [&str; 8] = [
    "drift",
    "table-default",
    "mark-rule",
    "mark-wiped",
    "mark-skipped",
    "dnat-ahead",
    "reply-route",
    "own-route",
];

/// The entries made by hand, as one finding with their deletions.
pub fn check(view: &View) -> Option<Finding> {
    let mut routing = Vec::new();
    let mut marks = Vec::new();
    let mut others = Vec::new();
    for (name, uplink) in &view.config.uplinks {
        let link = view.comparison.links.get(name).and_then(Option::as_ref);
        let Some(link) = link else { continue };
        if let Some(own) = &uplink.routing {
            routing.extend(rules(view, link, uplink, own));
            routing.extend(routes(view, link, own));
            marks.extend(marking(view, link, own));
        }
        others.extend(translations(view, link, uplink));
    }
    // Somebody's marks, DNAT or masquerade alone are no recipe.
    if routing.is_empty() && marks.is_empty() {
        return None;
    }
    others.extend(copies(view));
    let deletions = [routing, marks, others].concat();
    let number = count(deletions.len(), "entry is", "entries are");
    let what = format!(
        "{number} made by hand for what mh-hook does: its own can't all be added, and these stay when the link goes"
    );
    let finding = Finding::error("by-hand", what);
    let finding = deletions.into_iter().fold(finding, Finding::fix);
    Some(finding.fix("mh-hook sync"))
}

/// Whether a finding tells the same entries, or follows from them: once they are gone, it is found if it stays.
pub fn is_consequence(finding: &Finding) -> bool {
    CONSEQUENCES.contains(&finding.id)
}

/// `ip rule add from X table 10`, `ip rule add iif eth1 fwmark 10 table 10`
fn rules(view: &View, link: &UplinkLink, uplink: &Uplink, own: &Routing) -> Vec<String> {
    let sources = link.addresses.iter().map(|address| (*address).into());
    let sources: Vec<_> = sources.chain(uplink.pin.iter().copied()).collect();
    let is_same = |rule: &&RouteRule| {
        let by_source = rule.from.is_some_and(|from| sources.contains(&from));
        let by_mark = rule
            .fwmark
            .is_some_and(|mark| mark.value & view.config.mask == own.mark.value);
        !rule.is_ours() && rule.table() == Some(own.table) && (by_source || by_mark)
    };
    let rules = view.snapshot.kernel.routing.rules.iter().filter(is_same);
    rules.map(|rule| format!("ip rule del {rule}")).collect()
}

/// `ip route add default dev ppp0 table 10`
fn routes(view: &View, link: &UplinkLink, own: &Routing) -> Vec<String> {
    let is_same = |route: &&Route| {
        let by_link = route.dev.as_deref() == Some(link.interface.as_str());
        !route.is_ours() && route.table == own.table && route.is_default() && by_link
    };
    let routes = view.snapshot.kernel.routing.routes.iter().filter(is_same);
    routes
        .map(|route| format!("ip route del {route}"))
        .collect()
}

/// The foreign rules of a built-in chain for which this holds, as the commands that delete them.
fn foreign(view: &View, table: Table, chain: &str, is_same: impl Fn(&Rule) -> bool) -> Vec<String> {
    let rules = view.snapshot.kernel.ruleset.chain(table.name(), chain);
    let rules = rules.into_iter().flat_map(|chain| chain.rules.iter());
    let owners = &view.comparison.owners;
    let is_foreign = |rule: &&Rule| owners.owner(Entry::Rule(table, chain, rule)) == Owner::Foreign;
    rules
        .filter(is_foreign)
        .filter(|rule| is_same(rule))
        .map(|rule| Command::iptables(table, chain, Edit::Delete(rule)).to_string())
        .collect()
}

/// `-A PREROUTING -i ppp0 -j MARK --set-mark 10`, of the packet or the connection
fn marking(view: &View, link: &UplinkLink, own: &Routing) -> Vec<String> {
    foreign(view, Table::Mangle, "PREROUTING", |rule| {
        let set = rule.value("--set-xmark").or(rule.value("--set-mark"));
        let set = set.and_then(FwMark::parse);
        rule.value("-i") == Some(link.interface.as_str())
            && set.is_some_and(|mark| mark.value & view.config.mask == own.mark.value)
    })
}

/// `-A PREROUTING -j CONNMARK --restore-mark` and `--save-mark`, of the mark's every bit
fn copies(view: &View) -> Vec<String> {
    ["PREROUTING", "OUTPUT", "FORWARD", "POSTROUTING"]
        .iter()
        .flat_map(|chain| {
            foreign(view, Table::Mangle, chain, |rule| {
                let mut words = rule.0.split(' ');
                words.any(|word| word == "--restore-mark" || word == "--save-mark")
            })
        })
        .collect()
}

/// `-A PREROUTING -i ppp0 -p tcp --dport 80 -j DNAT --to 192.168.0.2:80`, `-A POSTROUTING -s LAN -o ppp0 -j MASQUERADE`
fn translations(view: &View, link: &UplinkLink, uplink: &Uplink) -> Vec<String> {
    let interface = link.interface.as_str();
    let address = link.address.to_string();
    let dnat = foreign(view, Table::Nat, "PREROUTING", |rule| {
        let is_at_link = rule.value("-i") == Some(interface)
            || rule
                .value("-d")
                .is_some_and(|to| to.trim_end_matches("/32") == address);
        let theirs = dnat::parse(rule).filter(|_| is_at_link);
        theirs.is_some_and(|theirs| {
            uplink.forwards.iter().any(|own| {
                let port = theirs.ports.map(|ports| ports.first);
                let target = |it: &Forward| it.target(link.address, port);
                own.ports == theirs.ports
                    && theirs.protocols.iter().all(|it| own.protocols.contains(it))
                    && target(own) == target(&theirs)
            })
        })
    });
    let masquerade = foreign(view, Table::Nat, "POSTROUTING", |rule| {
        uplink.masquerade
            && rule.value("-o") == Some(interface)
            && rule.0.ends_with("-j MASQUERADE")
    });
    [dnat, masquerade].concat()
}
