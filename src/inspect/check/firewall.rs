//! iptables: do foreign rules drop the forwards' packets, take requests before our DNAT, or change our marks? And rules that
//! are in force besides those of the backend in use.

use std::collections::BTreeSet;

use super::routing::Targets;
use super::{Finding, View, count, few};
use crate::config::Uplink;
use crate::inspect::packet_trace::{
    Alternatives, Connection, Context, Doubt, Effect, Header, Hook, MarkChange, Packet, Passage,
    Place, Position,
};
use crate::inspect::snapshot::Snapshot;
use crate::model::forward::{Forward, Protocol};
use crate::model::link::UplinkLink;
use crate::model::names::UplinkName;
use crate::model::netfilter::{Rule, Table};
use crate::model::route::TableId;
use crate::model::state::{Entry, State};
use crate::reconcile::diff::diff;
use crate::reconcile::other_backend::owned;
use crate::reconcile::ownership::{Owner, Owners};

/// How many alternatives are traced in all: each takes up to 0.2 ms where hundreds of rules are met.
const MAX_ALTERNATIVES: usize = 10_000;

/// A forward's packets of one protocol, from any client.
struct Case<'a> {
    view: &'a View<'a>,
    uplink: &'a Uplink,
    link: &'a UplinkLink,
    /// The uplink's chain.
    chain: &'a str,
    forward: &'a Forward,
    /// None for all protocols.
    protocol: Option<Protocol>,
    /// The interface that leads to the forward's target; none where that is the router itself.
    lan: Option<&'a str>,
    /// Whether strict reverse path filtering drops a request without our mark.
    needs_mark_on_request: bool,
}

/// Checks the forwards of the links that are up.
pub fn check(view: &View, targets: &Targets) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut budget = MAX_ALTERNATIVES;
    for (name, uplink, link) in view.serving_links() {
        let chain = name.chain();
        let needs_mark_on_request = filters_strictly(view, link);
        let mut drops = Vec::new();
        let mut reported = BTreeSet::new();
        for forward in &uplink.forwards {
            let (host, _) = forward.target(link.address, None);
            let Some(Ok(way)) = targets.get(&host) else {
                continue;
            };
            let protocols = forward.protocols.iter().copied().map(Some);
            let any = forward.protocols.is_empty().then_some(None);
            for protocol in protocols.chain(any) {
                let case = Case {
                    view,
                    uplink,
                    link,
                    chain: &chain,
                    forward,
                    protocol,
                    lan: (!way.is_local).then_some(way.dev.as_str()),
                    needs_mark_on_request,
                };
                let finding = case.check(&mut drops, &mut budget);
                // One rule can harm many forwards.
                let is_new = |it: &Finding| reported.insert((it.id, it.fixes.clone()));
                findings.extend(finding.filter(is_new).map(|it| it.of(name)));
            }
        }
        findings.extend(dropped(view, name, uplink, link, &drops));
    }
    findings
}

/// Whether the way back to clients is by another link, unless the request carries our mark.
fn filters_strictly(view: &View, link: &UplinkLink) -> bool {
    let interface = link.interface.as_str();
    let defaults = view.snapshot.kernel.routing.routes.iter();
    let mut defaults = defaults.filter(|it| it.table == TableId::MAIN && it.is_default());
    let is_default_link = defaults.any(|route| route.dev.as_deref() == Some(interface));
    !is_default_link && view.snapshot.rp_filter(interface) == 1
}

/// What goes wrong with a forward's packets.
enum Fault {
    /// A rule or policy drops them.
    Dropped(Hook, Place),
    /// A foreign rule translates requests before our DNAT does, or exempts them from translation.
    Taken(Place),
    /// A rule changes our bits of a mark: the connection's, the request's or the reply's.
    MarkChanged(&'static str, Box<MarkChange>),
    /// A foreign rule ends the evaluation of the mangle table before ours.
    MarkSkipped(Place),
    /// Our mark is missing, and no foreign rule is the cause: our own entries are missing, which is reported elsewhere.
    Unmarked,
}

/// Packets of one connection, on their way through iptables.
struct Trace<'a> {
    context: Context<'a>,
    connection: Connection,
    doubts: Vec<Doubt>,
}

impl Trace<'_> {
    fn pass(&mut self, hook: Hook, packet: &mut Packet) -> Result<Passage, Fault> {
        let mut passage = self.context.pass(hook, packet, &mut self.connection);
        self.doubts.append(&mut passage.doubts);
        match passage.stopped.take() {
            Some(place) => Err(Fault::Dropped(hook, place)),
            None => Ok(passage),
        }
    }
}

impl Case<'_> {
    /// Traces the packets. A fault is certain if it does not depend on foreign rules that may match or not.
    fn check(&self, drops: &mut Vec<Dropped>, budget: &mut usize) -> Option<Finding> {
        let (first, doubts) = self.trace(&[]);
        let is_dropped = matches!(first, Some(Fault::Dropped(..)));
        // What can change the outcome: of packets that pass, only what translates them or changes their marks counts.
        let counts = |doubt: &Doubt| match doubt.effect {
            Effect::None | Effect::Stops => false,
            Effect::Passes => is_dropped || !matches!(doubt.place.table, "filter" | "security"),
            Effect::Changes => true,
        };
        let counting = |doubts: Vec<Doubt>| doubts.into_iter().filter(counts).collect();
        let mut alternatives = Alternatives::default();
        alternatives.add(&[], counting(doubts));
        let mut is_certain = first.is_some();
        let mut faults = Vec::from_iter(first);
        while *budget > 0
            && let Some(assumed) = alternatives.pop()
        {
            *budget -= 1;
            let (fault, doubts) = self.trace(&assumed);
            alternatives.add(&assumed, counting(doubts));
            is_certain &= fault.is_some();
            faults.extend(fault);
            if is_dropped && !is_certain {
                break;
            }
        }
        is_certain &= !alternatives.are_left();
        let finding = faults.iter().find_map(|it| self.finding(it, is_certain));
        if let Some(Fault::Dropped(hook, place)) = faults.first()
            && finding.is_none()
            && is_certain
        {
            drops.push((self.service(), *hook, place.clone()));
        }
        finding
    }

    /// Sends two requests and two replies through iptables: the second ones meet other rules, and marks may have changed.
    fn trace(&self, assumed: &[Doubt]) -> (Option<Fault>, Vec<Doubt>) {
        let context = Context {
            rulesets: &self.view.snapshot.rulesets,
            native: &self.view.snapshot.native,
            links: &self.view.snapshot.kernel.links,
            assumed: assumed.to_vec(),
            final_chain: Some(self.chain),
        };
        let port = self.forward.ports.map(|ports| ports.first);
        let original = Header {
            destination: Some(self.link.address),
            destination_port: port,
            ..Header::default()
        };
        let mut trace = Trace {
            context,
            connection: Connection::new(self.protocol, original),
            doubts: Vec::new(),
        };
        let result = [Position::First, Position::Later]
            .into_iter()
            .try_for_each(|position| self.round(position, &mut trace));
        (result.err(), trace.doubts)
    }

    /// One request and its reply.
    fn round(&self, position: Position, trace: &mut Trace) -> Result<(), Fault> {
        let original = trace.connection.original;
        let mut request = Packet {
            iif: Some(self.link.interface.to_string()),
            oif: None,
            header: original,
            mark: 0,
            position,
        };
        let mut passages = vec![trace.pass(Hook::Prerouting, &mut request)?];
        let first = &passages[0];
        let by_nat = |it: &&Place| it.table == "nat" && it.number > 0 && self.is_foreign(it);
        let translating = first.accepted.iter().filter(by_nat);
        let mut takers = first.untracked.iter().chain(translating);
        if let Some(place) = takers.next() {
            return Err(Fault::Taken(place.clone()));
        }
        self.judge("connection's", trace.connection.mark, &passages)?;
        if self.needs_mark_on_request {
            self.judge("request's", request.mark, &passages)?;
        }
        trace.connection.is_dnat = true;
        let port = original.destination_port;
        let (host, port) = self.forward.target(self.link.address, port);
        request.header.destination = Some(host);
        request.header.destination_port = port;
        request.oif = self.lan.map(str::to_owned);
        let hooks: &[Hook] = match self.lan {
            Some(_) => &[Hook::Forward, Hook::Postrouting],
            None => &[Hook::Input],
        };
        for hook in hooks {
            passages.push(trace.pass(*hook, &mut request)?);
        }
        self.judge("connection's", trace.connection.mark, &passages)?;
        self.reply(request.header.reversed(), trace)
    }

    fn reply(&self, header: Header, trace: &mut Trace) -> Result<(), Fault> {
        let uplink = Some(self.link.interface.to_string());
        let mut reply = Packet {
            iif: self.lan.map(str::to_owned),
            // The route of the router's own replies before OUTPUT restores the mark is not asked for.
            oif: uplink.clone().filter(|_| self.lan.is_none()),
            header,
            mark: 0,
            position: Position::Reply,
        };
        let (first, others): (Hook, &[Hook]) = match self.lan {
            Some(_) => (Hook::Prerouting, &[Hook::Forward, Hook::Postrouting]),
            None => (Hook::Output, &[Hook::Postrouting]),
        };
        let passages = [trace.pass(first, &mut reply)?];
        // Replies from the uplink's address need no mark.
        if header.source != Some(self.link.address) {
            self.judge("reply's", reply.mark, &passages)?;
        }
        reply.oif = uplink;
        for hook in others {
            trace.pass(*hook, &mut reply)?;
        }
        Ok(())
    }

    /// Whether a mark has our bits, and if not, which foreign rule is the cause.
    fn judge(&self, whose: &'static str, mark: u32, passages: &[Passage]) -> Result<(), Fault> {
        let ours = self.uplink.routing.as_ref().map(|routing| routing.mark);
        let Some(ours) = ours.filter(|ours| !ours.matches(mark)) else {
            return Ok(());
        };
        let of_connection = whose == "connection's";
        let mut changes = passages.iter().flat_map(|passage| &passage.marks);
        let last = changes.rfind(|change| {
            change.of_connection == of_connection && change.changed & ours.mask != 0
        });
        if let Some(change) = last.filter(|change| self.is_foreign(&change.place)) {
            return Err(Fault::MarkChanged(whose, Box::new(change.clone())));
        }
        // Our rules that mark are at the first hook.
        let mut accepted = passages[0].accepted.iter();
        let skipping = accepted.find(|it| it.table == "mangle" && it.number > 0);
        let skipping = skipping.filter(|place| self.is_foreign(place)).cloned();
        Err(skipping.map_or(Fault::Unmarked, Fault::MarkSkipped))
    }

    fn is_foreign(&self, place: &Place) -> bool {
        let owners = &self.view.comparison.owners;
        let rule = Rule(place.text.to_string());
        is_foreign(owners, place.table, &place.chain, &rule)
    }

    /// What is reported of a fault; nothing of packets that are dropped, which are reported together.
    fn finding(&self, fault: &Fault, is_certain: bool) -> Option<Finding> {
        let verb = |certain, uncertain| if is_certain { certain } else { uncertain };
        let finding = match fault {
            Fault::Dropped(..) | Fault::Unmarked => return None,
            Fault::Taken(place) => {
                let what = format!(
                    "{} {} {} of {} from our forwards",
                    rule(place),
                    verb("keeps", "may keep"),
                    self.service(),
                    self.link.address
                );
                let finding = Finding::warning("dnat-ahead", what);
                // Docker puts its own back.
                match place.chain.starts_with("DOCKER") {
                    true => finding,
                    false => finding.fix(place.deletion()),
                }
            }
            Fault::MarkChanged(whose, change) => {
                let mask = self.uplink.routing.as_ref()?.mark.mask;
                let place = &change.place;
                let what = format!(
                    "{} {} bits of our mask {mask:#x} in the {whose} mark",
                    rule(place),
                    verb("changes", "may change")
                );
                let action = change.action.without(mask);
                let fix = if place.native.is_some() || action == action.without(u32::MAX) {
                    place.deletion()
                } else {
                    // The same rule in the same place, for the other bits.
                    let (matches, _) = place.text.rsplit_once("-j ")?;
                    place.command("-R", &format!("{} {matches}{action}", place.number))
                };
                Finding::warning("mark-wiped", what).fix(fix)
            }
            Fault::MarkSkipped(place) => {
                let what = format!(
                    "packets {} the mangle table before our rules mark them, by {}",
                    verb("leave", "may leave"),
                    rule(place)
                );
                // Our rules are at the end of the chain; this puts the foreign one after them.
                Finding::warning("mark-skipped", what)
                    .fix(place.command("-D", &place.number.to_string()))
                    .fix(place.command("-A", &place.text))
            }
        };
        Some(finding.error_if(is_certain))
    }

    /// `tcp/80`, `udp/27015-27030`, `gre`, `everything`
    fn service(&self) -> String {
        match (self.protocol, self.forward.ports) {
            (None, _) => "everything".into(),
            (Some(protocol), None) => protocol.to_string(),
            (Some(protocol), Some(ports)) => format!("{protocol}/{ports}"),
        }
    }
}

/// What lets a forward's packets pass a rule or policy of nftables.
fn let_pass(hook: Hook, place: &Place) -> String {
    let accept = place.insertion("ct status dnat accept");
    accept
        .filter(|_| hook == Hook::Forward || hook == Hook::Input || place.number == 0)
        .unwrap_or_else(|| place.deletion())
}

/// `"-t filter -A FORWARD -j DROP"`, `rule handle 7 of forward in inet filter, "drop"`
fn rule(place: &Place) -> String {
    if place.native.is_some() {
        return format!("{}, \"{}\"", place.brief(), place.text);
    }
    format!("\"-t {} -A {} {}\"", place.table, place.chain, place.text)
}

fn is_foreign(owners: &Owners, table: &str, chain: &str, rule: &Rule) -> bool {
    let mut ours = Table::ALL.into_iter();
    let table = ours.find(|it| it.name() == table);
    table.is_none_or(|table| owners.owner(Entry::Rule(table, chain, rule)) == Owner::Foreign)
}

/// A forward's protocol and ports, and where its packets are dropped.
type Dropped = (String, Hook, Place);

/// The forwards of an uplink whose packets are dropped.
fn dropped(
    view: &View,
    name: &UplinkName,
    uplink: &Uplink,
    link: &UplinkLink,
    drops: &[Dropped],
) -> Option<Finding> {
    let (_, _, first) = drops.first()?;
    let by = match (first.number, &first.native) {
        (0, None) => format!(
            "{}'s policy in the table {}, DROP",
            first.chain, first.table
        ),
        (0, Some(_)) => first.brief(),
        _ => rule(first),
    };
    let mut services: Vec<&String> = drops.iter().map(|(service, ..)| service).collect();
    services.dedup();
    let what = format!(
        "requests or replies of {} are dropped: {} by {by}",
        count(services.len(), "forward", "forwards"),
        few(services)
    );
    let finding = Finding::error("forward-dropped", what).of(name);
    if first.native.is_some() {
        let (_, hook, _) = drops.first()?;
        return Some(finding.fix(let_pass(*hook, first)));
    }
    let in_forward = |(_, hook, place): &Dropped| place.table == "filter" && *hook == Hook::Forward;
    if !drops.iter().any(in_forward) {
        return Some(finding);
    }
    let rules_in_filter = |state: &State| {
        let mut tables = state.tables.clone();
        tables.retain(|(table, owner), _| *table == Table::Filter && owner == name);
        State {
            tables,
            ..State::default()
        }
    };
    let installed = rules_in_filter(&view.comparison.installed);
    let desired = rules_in_filter(&view.comparison.desired);
    Some(if !uplink.accept_forward {
        finding
            .fix(format!("[uplink.{name}] accept-forward = true"))
            .fix("mh-hook sync")
    } else if !diff(&installed, &desired).is_empty() {
        finding.fix("mh-hook sync")
    } else {
        // A foreign rule comes before ours. Installed again, ours are the first.
        finding
            .fix(format!("mh-hook down {}", link.interface))
            .fix(format!("mh-hook up {}", link.interface))
    })
}

/// Checks the rules of the backend that is not in use: the kernel asks them, too.
pub fn backends(snapshot: &Snapshot) -> Vec<Finding> {
    let Some((backend, ruleset)) = &snapshot.other_ruleset else {
        return Vec::new();
    };
    let mut findings = Vec::new();
    let (owners, ours) = owned(None, ruleset.clone());
    let names: BTreeSet<String> = ours.tables.keys().map(|(_, name)| name.chain()).collect();
    if !names.is_empty() {
        let what = format!(
            "{backend} is not in use, but has entries of ours, which are in force: {}",
            few(names)
        );
        findings.push(Finding::warning("ours-in-the-other-backend", what).fix("mh-hook sync"));
    }
    let mut others = 0;
    for (table, chains) in &ruleset.tables {
        for (name, chain) in chains {
            let is_foreign = |rule: &&Rule| is_foreign(&owners, table, name, rule);
            others += chain.rules.iter().filter(is_foreign).count();
        }
    }
    if others > 0 {
        let what = format!(
            "{backend} has {}, besides those of {}: both are in force, and each command lists its own rules only",
            count(others, "foreign rule", "foreign rules"),
            snapshot.tools.backend
        );
        findings.push(Finding::info("both-backends", what));
    }
    findings
}

/// Reports that the rules of nftables could not be read.
pub fn nftables(snapshot: &Snapshot) -> Option<Finding> {
    let why = snapshot.native_unread.as_ref()?;
    let what = format!("whether chains of nftables drop the forwards' packets is not known: {why}");
    Some(Finding::warning("nftables", what).fix("nft -j list ruleset"))
}
