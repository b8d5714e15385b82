//! `mh-hook explain`: what happens to one connection on this router, there and back, hop by hop, with the entries that are
//! installed now.

mod ends;
mod reason;
mod trace;

use std::ffi::OsString;
use std::fmt;
use std::net::Ipv4Addr;
use std::num::NonZeroU16;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use crate::config::Config;
use crate::inspect::explain::ends::Servers;
use crate::inspect::explain::trace::{Failure, Trace};
use crate::inspect::packet_trace::{Alternatives, Doubt, Passage, Place, as_text};
use crate::inspect::report::{Detail, Report, Style, Tone};
use crate::inspect::snapshot::Snapshot;
use crate::model::forward::{Asked, Forward, Protocol};
use crate::model::names::UplinkName;
use crate::reconcile::event;

/// The connection to explain.
#[derive(Clone, Debug)]
pub struct Question {
    /// The address of the host that begins the connection.
    source: Ipv4Addr,
    service: Service,
    aim: Aim,
}

/// A protocol and a destination port.
#[derive(Clone, Copy, Debug, Serialize)]
struct Service {
    #[serde(serialize_with = "as_text")]
    protocol: Protocol,
    /// None where the protocol has no ports.
    port: Option<u16>,
}

/// The destination of a connection.
#[derive(Clone, Debug)]
enum Aim {
    /// A client asks the address of an uplink's link.
    Uplink(UplinkName),
    /// A client asks this address of the router.
    Address(Ipv4Addr),
    /// A LAN host asks this address.
    FromLan(Ipv4Addr),
}

impl Question {
    /// Parses `CLIENT [PROTO/PORT]`, `--to UPLINK|ADDR`, `--from-lan HOST`.
    /// Errors: an argument can't be read, or one is missing that the configuration does not tell.
    pub fn parse(
        config: &Config,
        words: &[OsString],
        to: Option<OsString>,
        from_lan: Option<OsString>,
    ) -> Result<Self> {
        let mut words = words.iter();
        let address = words.next().context("explain what? the client's address")?;
        let address = event::address(address)?;
        let service = words.next();
        let service = service.map(|word| Service::parse(&word.to_string_lossy()));
        let service = service.transpose()?;
        if let Some(word) = words.next() {
            bail!("unexpected argument {word:?}");
        }
        if let Some(host) = from_lan {
            ensure!(to.is_none(), "--to and --from-lan exclude each other");
            return Ok(Self {
                source: event::address(&host).context("--from-lan")?,
                service: service.unwrap_or(Service {
                    protocol: Protocol::Tcp,
                    port: Some(443),
                }),
                aim: Aim::FromLan(address),
            });
        }
        let mut networks = config.lan.networks.iter();
        if let Some(network) = networks.find(|network| network.contains(address)) {
            bail!(
                "{address} is on the LAN {network}: mh-hook explain --from-lan {address} DESTINATION"
            );
        }
        let aim = match to {
            Some(to) => Aim::parse(config, &to)?,
            None => Aim::Uplink(likely(config, service)?),
        };
        let service = match (service, &aim) {
            (Some(service), _) => service,
            (None, Aim::Uplink(name)) => config.uplinks[name]
                .forwards
                .first()
                .map(Service::of)
                .with_context(|| format!("{name} has no forward: say what is asked, tcp/80"))?,
            (None, _) => bail!("say what is asked: tcp/80"),
        };
        Ok(Self {
            source: address,
            service,
            aim,
        })
    }
}

impl Aim {
    fn parse(config: &Config, to: &OsString) -> Result<Self> {
        if let Ok(address) = event::address(to) {
            return Ok(Self::Address(address));
        }
        let name = UplinkName::parse(&to.to_string_lossy()).ok();
        name.filter(|name| config.uplinks.contains_key(name))
            .map(Self::Uplink)
            .with_context(|| format!("--to {to:?} is neither an uplink nor an address"))
    }
}

/// The uplink that is meant without `--to`: the only one that has such a forward, or has forwards at all.
fn likely(config: &Config, service: Option<Service>) -> Result<UplinkName> {
    let takes =
        |forward: &Forward| service.is_none_or(|service| forward.takes(service.asked_by(None)));
    let named = |fits: &dyn Fn(&Forward) -> bool| -> Vec<&UplinkName> {
        let uplinks = config.uplinks.iter();
        uplinks
            .filter(|(_, uplink)| uplink.forwards.iter().any(fits))
            .map(|(name, _)| name)
            .collect()
    };
    let mut names = named(&takes);
    if names.is_empty() {
        names = named(&|_| true);
    }
    match names[..] {
        [name] => Ok(name.clone()),
        [] => bail!("no uplink has forwards: say which is asked, --to UPLINK or --to ADDR"),
        [one, two, ..] => bail!("which uplink is asked? say --to {one} or --to {two}"),
    }
}

impl Service {
    /// `tcp/80`, `80`, `icmp`
    fn parse(text: &str) -> Result<Self> {
        let (protocol, port) = match text.split_once('/') {
            Some((protocol, port)) => (protocol, Some(port)),
            None if text.starts_with(|c: char| c.is_ascii_digit()) => ("tcp", Some(text)),
            None => (text, None),
        };
        let port = port.map(str::parse::<NonZeroU16>).transpose().ok();
        Protocol::parse(protocol)
            .zip(port)
            .filter(|(protocol, port)| protocol.has_ports() == port.is_some())
            .map(|(protocol, port)| Self {
                protocol,
                port: port.map(u16::from),
            })
            .with_context(|| format!("{text:?} is not a service such as tcp/80, udp/53 or icmp"))
    }

    fn of(forward: &Forward) -> Self {
        let protocol = forward.protocols.first().copied().unwrap_or(Protocol::Tcp);
        let port = forward.ports.map_or(80, |ports| ports.first);
        Self {
            protocol,
            port: protocol.has_ports().then_some(port),
        }
    }

    /// A request for this service, as forwards are asked whether they take it.
    fn asked_by(self, source: Option<Ipv4Addr>) -> Asked {
        Asked {
            source,
            destination: None,
            protocol: self.protocol.number(),
            port: self.port,
        }
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => write!(f, "{}/{port}", self.protocol),
            None => write!(f, "{}", self.protocol),
        }
    }
}

/// The outcome of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// The reply arrives, as far as this router can tell.
    Answered,
    Fails,
    /// That depends on rules of which nobody can tell whether they match.
    Unsure,
}

/// The packet that a hop is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Direction {
    There,
    Back,
    /// One more packet each way; reported only if one of them is lost.
    Later,
}

/// One thing that happens to a packet.
#[derive(Clone, Debug, Serialize)]
struct Hop {
    direction: Direction,
    /// The subject: `in`, `mark`, `nat`, `rp_filter`, `rule`, `route`, `filter`, `host`, `out`.
    at: &'static str,
    what: String,
    /// The iptables rule that makes it happen.
    rule: Option<Place>,
}

/// The report: the fields are the JSON, whose schema is packaging/schema/explain.schema.json.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    #[serde(flatten)]
    service: Service,
    from: Ipv4Addr,
    /// None where the uplink has no address.
    to: Option<Ipv4Addr>,
    /// The uplink that has the destination address.
    uplink: Option<String>,
    verdict: Verdict,
    /// The outcome in a sentence, with the reason.
    sentence: String,
    /// Commands, or lines of the configuration, that fix a failure.
    #[serde(rename = "fix")]
    fixes: Vec<String>,
    /// What may be different for some packets.
    caveats: Vec<String>,
    /// What happened, in order.
    hops: Vec<Hop>,
}

/// Traces the connection.
/// Errors: the kernel can't be asked.
pub fn explain(snapshot: &Snapshot, config: &Config, question: &Question) -> Result<Explanation> {
    let mut comparison = snapshot.compare(config)?;
    if let Some((_, error)) = comparison.troubles.pop_first() {
        return Err(error);
    }
    let servers = Servers::default();
    let begin =
        |assumed: &[Doubt]| Trace::new(snapshot, config, &comparison, question, &servers, assumed);
    let mut trace = begin(&[]);
    let end = trace.run()?;
    let mut caveats = trace.caveats;
    let mut is_sure = !trace.is_unsure || end.is_err();
    let doubts = |passages: Vec<Passage>| passages.into_iter().flat_map(|it| it.doubts).collect();
    let mut alternatives = Alternatives::default();
    alternatives.add(&[], doubts(trace.passages));
    while let Some(assumed) = alternatives.pop() {
        let mut other = begin(&assumed);
        let other_end = other.run()?;
        alternatives.add(&assumed, doubts(other.passages));
        if other_end.is_ok() != end.is_ok() {
            is_sure = false;
            let doubts: Vec<String> = assumed.iter().map(Doubt::to_string).collect();
            let then = other_end.unwrap_or_else(|failure| failure.why);
            caveats.push(format!(
                "it can't be told whether {}; if so: {then}",
                doubts.join(", and whether ")
            ));
        }
    }
    if alternatives.are_left() {
        is_sure = false;
        caveats.push("there are more rules that may match or not than explain tries".into());
    }
    if let Some(why) = &snapshot.native_unread {
        is_sure = false;
        caveats.push(format!(
            "whether a chain of nftables drops it is not known: {why}"
        ));
    }
    let (verdict, sentence, fixes) = match end {
        Ok(sentence) => (Verdict::Answered, sentence, Vec::new()),
        Err(Failure { why, fixes }) => (Verdict::Fails, why, fixes),
    };
    Ok(Explanation {
        service: question.service,
        from: question.source,
        to: trace.asked,
        uplink: trace.uplink.map(|(name, _)| name.to_string()),
        verdict: if is_sure { verdict } else { Verdict::Unsure },
        sentence,
        fixes,
        caveats,
        hops: trace.hops,
    })
}

impl Report for Explanation {
    fn text(&self, style: Style) -> String {
        let to = self.to.map_or("?".to_owned(), |to| to.to_string());
        let of = self.uplink.as_ref().map(|name| format!(" ({name})"));
        let (service, from, of) = (self.service, self.from, of.unwrap_or_default());
        let title = format!("{service} from {from} to {to}{of}");
        let mut text = style.paint(Tone::Strong, &title) + "\n";
        for hops in self
            .hops
            .chunk_by(|one, next| one.direction == next.direction)
        {
            text += match hops[0].direction {
                Direction::There => "there\n",
                Direction::Back => "back\n",
                Direction::Later => "later\n",
            };
            let width = hops.iter().map(|hop| hop.at.len()).max().unwrap_or(0);
            for hop in hops {
                let brief = hop.rule.as_ref().filter(|_| style.detail == Detail::Brief);
                let by = brief.map(|rule| format!(", by {}", rule.brief()));
                let line = format!(
                    "  {:width$}  {}{}",
                    hop.at,
                    hop.what,
                    by.unwrap_or_default()
                );
                text += &style.wrap(&line, width + 6);
                if let Some(rule) = hop.rule.as_ref().filter(|_| style.detail == Detail::Full) {
                    let packets = rule.packets.map(|packets| format!(" ({packets} packets)"));
                    let packets = packets.unwrap_or_default();
                    text += &format!("{:1$}{rule}{packets}\n", "", width + 6);
                }
            }
        }
        let (tone, word) = match self.verdict {
            Verdict::Answered => (Tone::Good, "answered"),
            Verdict::Fails => (Tone::Bad, "fails"),
            Verdict::Unsure => (Tone::Doubtful, "unsure"),
        };
        let sentence = format!("{}: {}", style.paint(tone, word), self.sentence);
        text += &style.wrap(&sentence, 2);
        // In one line, to be pasted.
        text.extend(self.fixes.iter().map(|fix| format!("fix: {fix}\n")));
        text.extend(
            self.caveats
                .iter()
                .map(|it| style.wrap(&format!("but: {it}"), 2)),
        );
        text
    }

    fn is_well(&self) -> bool {
        self.verdict != Verdict::Fails
    }
}
