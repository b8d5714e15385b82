//! `mh-hook status`: each uplink, its link, its missing and extra entries, and what its forwards have counted. The structs
//! are the JSON, whose schema is packaging/schema/status.schema.json.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use anyhow::{Error, Result};
use log::warn;
use serde::Serialize;

use crate::config::{Config, Uplink};
use crate::inspect::drift::Drift;
use crate::inspect::metrics::Metrics;
use crate::inspect::report::{Detail, Report, Style, Tone, align, few};
use crate::inspect::snapshot::{Comparison, Snapshot};
use crate::kernel::conntrack::{self, Filter};
use crate::kernel::iptables_save::{Counter, Ruleset};
use crate::model::forward::{Forward, ForwardIndex};
use crate::model::link::UplinkLink;
use crate::model::names::{IfName, UplinkName};
use crate::model::netfilter::Rule;
use crate::model::route::FwMark;
use crate::model::state::State;
use crate::reconcile::diff::diff;
use crate::reconcile::dnat;
use crate::reconcile::parts::{Part, parts};
use crate::reconcile::unlisted;

#[derive(Debug, Serialize)]
pub struct Status {
    /// Whether nothing is missing, and nothing extra, as far as is known for sure.
    in_step: bool,
    /// The bits of the packet and connection mark that are ours.
    mask: u32,
    /// All uplinks by name, or the one that was asked for.
    uplinks: Vec<UplinkStatus>,
    /// The commands that remove the entries of no configured uplink; none where one uplink was asked for.
    orphans: Option<Vec<String>>,
    /// Why it is not known whether all entries are installed.
    #[serde(skip)]
    unlisted: Option<String>,
}

#[derive(Debug, Serialize)]
struct UplinkStatus {
    name: String,
    /// None where nothing tells which interface it is.
    interface: Option<String>,
    link: LinkState,
    /// The link's address that the desired entries are for.
    address: Option<Ipv4Addr>,
    /// For how long the link has had that address.
    up_seconds: Option<u64>,
    table: Option<u32>,
    mark: Option<u32>,
    /// The number of tracked connections with that mark; none without a mark, or where the kernel does not tell.
    marked: Option<usize>,
    /// Whether nothing is missing, and nothing extra.
    in_step: bool,
    /// Why the link can't be used.
    trouble: Option<String>,
    /// The pinned hosts, where the link is not up: they reach nothing outside.
    closed: Vec<String>,
    /// The commands that remove extra entries, to be run in this order and before those in `missing`.
    #[serde(rename = "surplus")]
    extra: Vec<String>,
    /// The commands that add missing entries, to be run in this order.
    missing: Vec<String>,
    /// The entries to count: adding a chain, for instance, takes more commands.
    #[serde(skip)]
    drift: Drift,
    /// How many entries there should be.
    #[serde(skip)]
    entries: usize,
    /// In the order of the configuration.
    forwards: Vec<ForwardStatus>,
}

/// The state of an uplink's link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum LinkState {
    /// Up, with an address.
    Up,
    /// Up, without an address.
    NoAddress,
    /// Up, with an address that can't be an uplink's.
    Refused,
    /// The interface exists, and is down.
    Down,
    /// There is no such interface.
    Missing,
    /// No installed entry tells which interface it is.
    Unknown,
}

#[derive(Debug, Serialize)]
struct ForwardStatus {
    service: String,
    /// The sources that may use it; empty for all.
    from: Vec<String>,
    /// The LAN host, and the port there if it is another.
    to: String,
    /// The connections that it has taken since its chain was written: a nat rule sees the first packet
    /// of each (iptables(8), nat). None where none of its rules is installed.
    connections: Option<u64>,
    /// Its tracked connections; none without an address, or where the kernel does not tell.
    open: Option<usize>,
    /// The bytes of those in both directions, where the kernel counts them (`nf_conntrack_acct`).
    open_bytes: Option<u64>,
}

/// Compares the installed with the desired entries, of all uplinks or of one.
/// Errors: a link has an address that can't be an uplink's.
pub fn status(snapshot: &Snapshot, config: &Config, name: Option<&UplinkName>) -> Result<Status> {
    let Comparison {
        owners,
        installed,
        links,
        troubles,
        unknown,
        ..
    } = snapshot.compare(config)?;
    let (parts, orphans) = parts(config, &owners, &installed, &links);
    let unlisted = unlisted(Some(config), &snapshot.kernel.ruleset);
    let asked = |of: &UplinkName| name.is_none_or(|name| name == of);
    let mut uplinks = Vec::new();
    for (of, part) in parts.iter().filter(|(of, _)| asked(of)) {
        let link = links.get(of).and_then(Option::as_ref);
        let named = owners.interface_of(of, &installed);
        let trouble = troubles.get(of);
        let uplink = (of, &config.uplinks[of]);
        let mut uplink = uplink_status(snapshot, uplink, link, part, named, trouble);
        match (uplink.link, unknown.contains(of)) {
            (LinkState::Unknown, true) => uplink.in_step = false,
            (LinkState::Unknown, false) => uplink.link = LinkState::Down,
            _ => {}
        }
        uplink.in_step &= unlisted.is_none();
        uplinks.push(uplink);
    }
    let orphans = Drift::commands(&diff(&orphans, &State::default())).extra;
    let orphans = Some(orphans).filter(|_| name.is_none());
    let well = uplinks.iter().all(|uplink| uplink.in_step) && unlisted.is_none();
    Ok(Status {
        in_step: well && orphans.as_ref().is_none_or(Vec::is_empty),
        mask: config.mask,
        uplinks,
        orphans,
        unlisted: unlisted.map(|error| error.to_string()),
    })
}

fn uplink_status(
    snapshot: &Snapshot,
    (name, uplink): (&UplinkName, &Uplink),
    link: Option<&UplinkLink>,
    part: &Part,
    named: Option<IfName>,
    trouble: Option<&Error>,
) -> UplinkStatus {
    let interface = link
        .map(|link| link.interface.clone())
        .or_else(|| uplink.identity.interface.clone())
        .or(named);
    let found = interface
        .as_ref()
        .map(|interface| snapshot.kernel.links.get(interface.as_str()));
    let age = link.zip(found.flatten());
    let age = age.and_then(|(link, found)| found.age(link.address));
    let state = match (link, found) {
        (Some(_), _) => LinkState::Up,
        (None, Some(None)) => LinkState::Missing,
        (None, Some(Some(found))) if !found.up => LinkState::Down,
        (None, Some(Some(found))) if found.addresses.is_empty() => LinkState::NoAddress,
        (None, Some(Some(_))) if trouble.is_some() => LinkState::Refused,
        (None, _) => LinkState::Unknown,
    };
    let mark = uplink.routing.as_ref().map(|routing| routing.mark);
    let address = link.map(|link| link.address);
    let steps = snapshot.steps(&part.installed, &part.desired);
    let Drift { missing, extra } = Drift::commands(&steps);
    UplinkStatus {
        name: name.to_string(),
        interface: interface.map(|interface| interface.to_string()),
        link: state,
        address,
        up_seconds: age.map(|age| age.as_secs()),
        table: uplink.routing.as_ref().map(|routing| routing.table.0),
        mark: mark.map(|mark| mark.value),
        marked: mark.and_then(marked),
        in_step: steps.is_empty(),
        trouble: trouble.map(|error| format!("{error:#}")),
        closed: match link {
            Some(_) => Vec::new(),
            None => uplink.pin.iter().map(ToString::to_string).collect(),
        },
        extra,
        missing,
        drift: Drift::entries(&steps),
        entries: Drift::entries(&diff(&State::default(), &part.desired))
            .missing
            .len(),
        forwards: forwards(name, uplink, snapshot, address),
    }
}

fn forwards(
    name: &UplinkName,
    uplink: &Uplink,
    snapshot: &Snapshot,
    address: Option<Ipv4Addr>,
) -> Vec<ForwardStatus> {
    let counters = counters(name, &snapshot.kernel.ruleset);
    let acct = snapshot.root.sysctl("net/netfilter/nf_conntrack_acct");
    let has_bytes = acct.as_deref() == Some("1");
    let open = address.and_then(|address| open(&uplink.forwards, address));
    let statuses = uplink.forwards.iter().enumerate().map(|(index, forward)| {
        let rules: BTreeSet<Rule> = dnat::rules(forward).map(|(_, rule)| rule).collect();
        let installed = rules.iter().filter_map(|rule| counters.get(rule));
        let counter = installed.copied().reduce(Counter::plus);
        let open = open
            .as_ref()
            .map(|open| open.get(&index).copied().unwrap_or_default());
        ForwardStatus {
            service: forward.to_string(),
            from: forward.from.iter().map(ToString::to_string).collect(),
            to: forward.destination().to_string(),
            connections: counter.map(|counter| counter.packets),
            open_bytes: open.filter(|_| has_bytes).map(|open| open.bytes),
            open: open.map(|open| open.connections),
        }
    });
    statuses.collect()
}

/// The counters of the rules in the uplink's nat chains; those of equal rules are added up.
fn counters<'a>(name: &UplinkName, ruleset: &'a Ruleset) -> BTreeMap<&'a Rule, Counter> {
    let mut counters: BTreeMap<&Rule, Counter> = BTreeMap::new();
    let chains = ruleset.tables.get("nat").into_iter().flatten();
    let own = chains.filter(|(chain, _)| UplinkName::of_chain(chain).as_ref() == Some(name));
    for (rule, counted) in own.flat_map(|(_, chain)| chain.rules.iter().zip(&chain.counters)) {
        let counter = counters.entry(rule).or_default();
        *counter = counter.plus(*counted);
    }
    counters
}

/// The tracked connections of a forward.
#[derive(Clone, Copy, Debug, Default)]
struct Open {
    connections: usize,
    bytes: u64,
}

/// The tracked connections of forwards at this address, by the forward's place: as in the chain, the first forward that takes
/// a connection has it. None if the kernel does not tell.
fn open(forwards: &[Forward], address: Ipv4Addr) -> Option<BTreeMap<usize, Open>> {
    let index = ForwardIndex::new(forwards.to_vec());
    let mut all: BTreeMap<usize, Open> = BTreeMap::new();
    let read = conntrack::each([Filter::To(address)], |flow| {
        let place = index.place(flow.asked());
        let place = place.filter(|_| flow.original.destination == address);
        let made = |place: &usize| {
            let forward: &Forward = &forwards[*place];
            forward.target(address, None).0 == flow.reply.source
        };
        if let Some(place) = place.filter(made) {
            let open = all.entry(place).or_default();
            open.connections += 1;
            open.bytes += flow.bytes.unwrap_or_default();
        }
    });
    told(read).map(|()| all)
}

/// The number of tracked connections with this mark. None if the kernel does not tell.
fn marked(mark: FwMark) -> Option<usize> {
    let mut count = 0;
    let read = conntrack::each([Filter::Marked(mark)], |flow| {
        count += usize::from(mark.matches(flow.mark));
    });
    told(read).map(|()| count)
}

fn told(read: Result<()>) -> Option<()> {
    read.inspect_err(|error| warn!("{error:#}")).ok()
}

impl Report for Status {
    fn text(&self, style: Style) -> String {
        if self.uplinks.is_empty() && self.in_step {
            return "no uplinks are configured, and no entries of ours are installed\n".to_owned();
        }
        let mut text = self.table(style);
        let problems = self.problems(style);
        if !problems.is_empty() {
            text += &format!("\n{problems}");
        }
        if !self.in_step {
            let prefix = comment(style);
            text += &format!("{prefix}see what is wrong: mh-hook check\n");
        }
        text
    }

    fn metrics(&self) -> Option<String> {
        let mut metrics = Metrics::default();
        let number = u8::from;
        let help = "Whether nothing is missing and nothing extra.";
        let all = [(Vec::new(), Some(number(self.in_step)))];
        metrics.add("mh_hook_in_step", "gauge", help, all);
        let uplinks = || {
            self.uplinks
                .iter()
                .map(|it| (vec![("uplink", &it.name[..])], it))
        };
        let help = "Whether the uplink's link is up, with an address.";
        let up = uplinks().map(|(mut labels, it)| {
            labels.push(("interface", it.interface.as_deref().unwrap_or_default()));
            (labels, Some(number(it.link == LinkState::Up)))
        });
        metrics.add("mh_hook_uplink_up", "gauge", help, up);
        let help = "For how long the link has had its address.";
        let age = uplinks().map(|(labels, it)| (labels, it.up_seconds));
        metrics.add("mh_hook_uplink_up_seconds", "gauge", help, age);
        let help = "Whether nothing of the uplink is missing and nothing extra.";
        let in_step = uplinks().map(|(labels, it)| (labels, Some(number(it.in_step))));
        metrics.add("mh_hook_uplink_in_step", "gauge", help, in_step);
        let help = "Entries that are missing.";
        let missing = uplinks().map(|(labels, it)| (labels, Some(it.drift.missing.len())));
        metrics.add("mh_hook_uplink_missing_entries", "gauge", help, missing);
        let help = "Entries that are extra.";
        let extra = uplinks().map(|(labels, it)| (labels, Some(it.drift.extra.len())));
        metrics.add("mh_hook_uplink_extra_entries", "gauge", help, extra);
        let help = "Tracked connections with the uplink's mark.";
        let marked = uplinks().map(|(labels, it)| (labels, it.marked));
        metrics.add("mh_hook_uplink_connections", "gauge", help, marked);
        let forwards: Vec<(&str, &ForwardStatus, String)> = self
            .uplinks
            .iter()
            .flat_map(|uplink| uplink.forwards.iter().map(|it| (&uplink.name[..], it)))
            .map(|(uplink, it)| (uplink, it, it.from.join(",")))
            .collect();
        let forwards = || {
            forwards.iter().map(|(uplink, it, from)| {
                let service = ("forward", &it.service[..]);
                let labels = vec![
                    ("uplink", *uplink),
                    service,
                    ("to", &it.to[..]),
                    ("from", from),
                ];
                (labels, *it)
            })
        };
        let help = "Connections that the forward has served since its chain was written.";
        let served = forwards().map(|(labels, it)| (labels, it.connections));
        metrics.add("mh_hook_forward_connections_total", "counter", help, served);
        let help = "Connections of the forward that are tracked now.";
        let open = forwards().map(|(labels, it)| (labels, it.open));
        metrics.add("mh_hook_forward_open_connections", "gauge", help, open);
        Some(metrics.text())
    }

    fn is_well(&self) -> bool {
        self.in_step
    }
}

/// What begins a line that is no command, where all of the text can be pasted into a shell.
fn comment(style: Style) -> &'static str {
    match style.detail {
        Detail::Brief => "",
        Detail::Full => "# ",
    }
}

impl Status {
    /// A line for each uplink, with its forwards below.
    fn table(&self, style: Style) -> String {
        let titles = "state|uplink|link|address|up for|table|mark|connections".split('|');
        let mut rows = vec![titles.map(|it| style.paint(Tone::Strong, it)).collect()];
        rows.extend(self.uplinks.iter().map(|uplink| {
            let mark = uplink.mark.map(|value| FwMark {
                value,
                mask: self.mask,
            });
            let (word, tone) = self.word(uplink);
            vec![
                style.paint(tone, word),
                uplink.name.clone(),
                cell(uplink.interface.as_ref()),
                cell(uplink.address),
                cell(uplink.up_seconds.map(duration)),
                cell(uplink.table),
                cell(mark),
                cell(uplink.marked),
            ]
        }));
        let forwards = self.uplinks.iter().flat_map(|it| &it.forwards);
        let cells: Vec<Vec<String>> = forwards.map(ForwardStatus::cells).collect();
        let (uplinks, forwards) = (align(&rows), align(&cells));
        let mut forwards = forwards.lines();
        let mut lines = uplinks.lines();
        let mut text = format!("{}\n", lines.next().unwrap_or_default());
        for (uplink, line) in self.uplinks.iter().zip(lines) {
            text += &format!("{line}\n");
            for line in forwards.by_ref().take(uplink.forwards.len()) {
                text += &format!("  {line}\n");
            }
        }
        text
    }

    /// An uplink's state in a word.
    fn word(&self, uplink: &UplinkStatus) -> (&'static str, Tone) {
        let has_drifted = uplink.drift.summary(0).is_some();
        match uplink.link {
            _ if uplink.trouble.is_some() => ("refused", Tone::Bad),
            _ if has_drifted => ("drifted", Tone::Bad),
            _ if self.unlisted.is_some() => ("not known", Tone::Bad),
            LinkState::Up => ("up", Tone::Good),
            LinkState::NoAddress => ("no address", Tone::Doubtful),
            LinkState::Refused => ("refused", Tone::Bad),
            LinkState::Down => ("down", Tone::Doubtful),
            LinkState::Missing => ("no link", Tone::Doubtful),
            LinkState::Unknown => ("unknown", Tone::Doubtful),
        }
    }

    /// What is wrong with each, a line each; with all details, the commands that bring it in step below.
    fn problems(&self, style: Style) -> String {
        let mut text = String::new();
        let mut tell = |tone, line: String| {
            let line = format!("{}{line}", comment(style));
            text += &style.wrap(&style.paint(tone, &line), 2);
        };
        for uplink in &self.uplinks {
            let name = &uplink.name;
            if let Some(trouble) = &uplink.trouble {
                tell(Tone::Bad, trouble.clone());
            }
            if uplink.link == LinkState::Unknown && !uplink.in_step {
                let line = format!("{name}: nothing tells which link it uses");
                tell(Tone::Doubtful, line);
            }
            if !uplink.closed.is_empty() {
                let hosts = few(&uplink.closed);
                let line =
                    format!("{name} is not up: its pinned hosts reach nothing outside: {hosts}");
                tell(Tone::Doubtful, line);
            }
            if let Some(drift) = uplink.drift.summary(uplink.entries) {
                tell(Tone::Bad, format!("{name}: {drift}: mh-hook sync"));
            }
        }
        let orphans = self.orphans.as_deref().unwrap_or_default();
        if !orphans.is_empty() {
            let line = "entries of no configured uplink: mh-hook sync";
            tell(Tone::Bad, format!("{} {line}", orphans.len()));
        }
        if let Some(why) = &self.unlisted {
            tell(Tone::Bad, why.clone());
        }
        if style.detail == Detail::Full {
            for uplink in &self.uplinks {
                let name = &uplink.name;
                for (what, lines) in [("extra", &uplink.extra), ("missing", &uplink.missing)] {
                    commands(&mut text, style, &format!("{name}: {what}"), lines);
                }
            }
            commands(&mut text, style, "of no configured uplink", orphans);
        }
        text
    }
}

impl ForwardStatus {
    /// `tcp/80`, `to 192.168.0.2`, `12 served`, `3 open`, `1.2 MB`, `from 192.0.2.0/24`
    fn cells(&self) -> Vec<String> {
        let served = self.connections.map(|number| format!("{number} served"));
        let open = self.open.map(|number| format!("{number} open"));
        let bytes = self.open_bytes.map(size);
        let from = (!self.from.is_empty()).then(|| format!("from {}", few(&self.from)));
        vec![
            self.service.clone(),
            format!("to {}", self.to),
            served.unwrap_or_else(|| "not installed".into()),
            open.unwrap_or_default(),
            bytes.unwrap_or_default(),
            from.unwrap_or_default(),
        ]
    }
}

fn cell<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// Commands below a heading that is a comment to a shell, so that all of it can be pasted.
fn commands(text: &mut String, style: Style, heading: &str, commands: &[String]) {
    if commands.is_empty() {
        return;
    }
    let heading = style.paint(Tone::Bad, &format!("# {heading}"));
    *text += &format!("{heading}\n{}\n", commands.join("\n"));
}

/// `812 B`, `1.2 kB`, `34.5 MB`
fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["kB", "MB", "GB", "TB"];
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    // In tenths of the unit.
    let mut tenths = bytes / 100;
    let mut units = UNITS.iter();
    let mut unit = units.next().unwrap_or(&"kB");
    for larger in units {
        if tenths < 10_000 {
            break;
        }
        (tenths, unit) = (tenths / 1000, larger);
    }
    format!("{}.{} {unit}", tenths / 10, tenths % 10)
}

/// `3 d 4 h`, `4 h 5 min`, `12 min`, `45 s`
fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{minutes} min"),
        3600..86400 => format!("{hours} h {} min", minutes % 60),
        86400.. => format!("{days} d {} h", hours % 24),
    }
}
