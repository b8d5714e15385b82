//! `mh-hook explain`: what happens to one connection on this router, there and back, hop by hop, with the entries that are
//! installed now.

mod ends;
mod reason;
mod trace;

use std::ffi::OsString;
use std::net::Ipv4Addr;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use crate::config::{Config, Uplink};
use crate::inspect::explain::trace::{Failure, Inputs};
use crate::inspect::packet_trace::{Alternatives, Doubt, Place};
use crate::inspect::report::{Report, Style, Tone, align};
use crate::inspect::snapshot::Snapshot;
use crate::model::forward::{Asked, Forward, Protocol};
use crate::model::names::UplinkName;
use crate::reconcile::event;

/// The connection to explain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The address of the host that begins the connection.
    pub source: Ipv4Addr,
    /// The protocol and destination port.
    pub service: Service,
    pub aim: Aim,
}

/// A protocol and a destination port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service {
    pub protocol: Protocol,
    /// None where the protocol has no ports.
    pub port: Option<u16>,
}

/// The destination of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Aim {
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
        let service = words
            .next()
            .map(|word| Service::parse(&word.to_string_lossy()));
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
        if let Some(network) = config
            .lan
            .networks
            .iter()
            .find(|network| network.contains(address))
        {
            bail!(
                "{address} is on the LAN {network}: mh-hook explain --from-lan {address} DESTINATION"
            );
        }
        let aim = match to {
            Some(to) => aim(config, &to)?,
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

fn aim(config: &Config, to: &OsString) -> Result<Aim> {
    if let Ok(address) = event::address(to) {
        return Ok(Aim::Address(address));
    }
    let name = UplinkName::parse(&to.to_string_lossy())
        .ok()
        .filter(|name| config.uplinks.contains_key(name));
    let name = name.with_context(|| format!("--to {to:?} is neither an uplink nor an address"))?;
    Ok(Aim::Uplink(name))
}

/// The uplink that is meant without `--to`: the only one that has such a forward, or has forwards at all.
fn likely(config: &Config, service: Option<Service>) -> Result<UplinkName> {
    let forwards = |uplink: &&Uplink| !uplink.forwards.is_empty();
    let fits = |uplink: &&Uplink| {
        let mut forwards = uplink.forwards.iter();
        service.is_none_or(|service| forwards.any(|forward| forward.takes(service.asked_by(None))))
    };
    let named = |which: &dyn Fn(&&Uplink) -> bool| -> Vec<&UplinkName> {
        let uplinks = config.uplinks.iter();
        uplinks
            .filter(|(_, uplink)| which(uplink))
            .map(|(name, _)| name)
            .collect()
    };
    for names in [
        named(&|uplink| forwards(uplink) && fits(uplink)),
        named(&forwards),
    ] {
        match names[..] {
            [name] => return Ok(name.clone()),
            [] => {}
            [one, two, ..] => bail!("which uplink is asked? say --to {one} or --to {two}"),
        }
    }
    bail!("no uplink has forwards: say which is asked, --to UPLINK or --to ADDR")
}

impl Service {
    /// `tcp/80`, `80`, `icmp`
    fn parse(text: &str) -> Result<Self> {
        let wrong = || format!("{text:?} is not a service such as tcp/80, udp/53 or icmp");
        let (protocol, port) = match text.split_once('/') {
            Some((protocol, port)) => (protocol, Some(port)),
            None if text.starts_with(|c: char| c.is_ascii_digit()) => ("tcp", Some(text)),
            None => (text, None),
        };
        let protocol = Protocol::parse(protocol).with_context(wrong)?;
        let port: Option<u16> = match port {
            Some(port) => Some(
                port.parse()
                    .ok()
                    .filter(|port| *port > 0)
                    .with_context(wrong)?,
            ),
            None => None,
        };
        ensure!(protocol.has_ports() == port.is_some(), wrong());
        Ok(Self { protocol, port })
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
    pub fn asked_by(self, source: Option<Ipv4Addr>) -> Asked {
        Asked {
            source,
            destination: None,
            protocol: self.protocol.number(),
            port: self.port,
        }
    }
}

impl std::fmt::Display for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.port {
            Some(port) => write!(f, "{}/{port}", self.protocol),
            None => write!(f, "{}", self.protocol),
        }
    }
}

/// The outcome of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The reply arrives, as far as this router can tell.
    Answered,
    Fails,
    /// That depends on rules of which nobody can tell whether they match.
    Unsure,
}

/// The packet that a hop is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    There,
    Back,
    /// One more packet each way; reported only if one of them is lost.
    Later,
}

/// One thing that happens to a packet.
#[derive(Clone, Debug, Serialize)]
pub struct Hop {
    pub direction: Direction,
    /// The subject: `in`, `mark`, `nat`, `rp_filter`, `rule`, `route`, `filter`, `host`, `out`.
    pub at: &'static str,
    pub what: String,
    /// The iptables rule that makes it happen.
    pub rule: Option<Place>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    pub protocol: String,
    pub port: Option<u16>,
    pub from: Ipv4Addr,
    /// The destination; none where the uplink has no address.
    pub to: Option<Ipv4Addr>,
    /// The uplink that has the destination address.
    pub uplink: Option<String>,
    pub verdict: Verdict,
    /// The outcome in a sentence, with the reason.
    pub sentence: String,
    /// Commands, or lines of the configuration, that fix a failure.
    #[serde(rename = "mend")]
    pub fixes: Vec<String>,
    /// What may be different for some packets.
    pub caveats: Vec<String>,
    /// What happened, in order.
    pub hops: Vec<Hop>,
}

/// Traces the connection.
/// Errors: the kernel can't be asked.
pub fn explain(snapshot: &Snapshot, config: &Config, question: &Question) -> Result<Explanation> {
    let mut comparison = snapshot.compare(config)?;
    if let Some((_, error)) = comparison.troubles.pop_first() {
        return Err(error);
    }
    let inputs = Inputs {
        snapshot,
        config,
        comparison: &comparison,
        question,
    };
    let trace = inputs.trace(&[])?;
    let mut caveats = trace.caveats;
    let is_success = trace.end.is_ok();
    let mut is_sure = true;
    let mut alternatives = Alternatives::default();
    alternatives.add(&[], trace.doubts);
    while let Some(assumed) = alternatives.pop() {
        let other = inputs.trace(&assumed)?;
        alternatives.add(&assumed, other.doubts);
        if other.end.is_ok() != is_success {
            is_sure = false;
            caveats.push(caveat(&assumed, &other.end));
        }
    }
    if alternatives.are_left() {
        is_sure = false;
        caveats.push("there are more rules that may match or not than explain tries".into());
    }
    if !snapshot.nft_tables.is_empty() {
        caveats.push(format!(
            "nftables has tables of its own, which explain does not read: {}; see nft list ruleset",
            snapshot.nft_tables.join(", ")
        ));
    }
    let verdict = match is_success {
        _ if !is_sure => Verdict::Unsure,
        true => Verdict::Answered,
        false => Verdict::Fails,
    };
    let (sentence, fixes) = match trace.end {
        Ok(sentence) => (sentence, Vec::new()),
        Err(Failure { why, fixes }) => (why, fixes),
    };
    Ok(Explanation {
        protocol: question.service.protocol.to_string(),
        port: question.service.port,
        from: question.source,
        to: trace.asked,
        uplink: trace.uplink.map(|name| name.to_string()),
        verdict,
        sentence,
        fixes,
        caveats,
        hops: trace.hops,
    })
}

/// What happens if these doubts come true.
fn caveat(assumed: &[Doubt], end: &Result<String, Failure>) -> String {
    let doubts: Vec<String> = assumed.iter().map(Doubt::to_string).collect();
    let then = match end {
        Ok(sentence) => sentence,
        Err(failure) => &failure.why,
    };
    format!(
        "it can't be told whether {}; if so: {then}",
        doubts.join(", and whether ")
    )
}

impl Report for Explanation {
    fn text(&self, style: Style) -> String {
        let service = match self.port {
            Some(port) => format!("{}/{port}", self.protocol),
            None => self.protocol.clone(),
        };
        let to = self.to.map_or("?".to_owned(), |to| to.to_string());
        let of = self
            .uplink
            .as_ref()
            .map_or(String::new(), |name| format!(" ({name})"));
        let mut text = style.paint(
            Tone::Strong,
            &format!("{service} from {} to {to}{of}", self.from),
        );
        text.push('\n');
        for direction in [Direction::There, Direction::Back, Direction::Later] {
            let hops: Vec<&Hop> = self
                .hops
                .iter()
                .filter(|hop| hop.direction == direction)
                .collect();
            if hops.is_empty() {
                continue;
            }
            text += match direction {
                Direction::There => "there\n",
                Direction::Back => "back\n",
                Direction::Later => "later\n",
            };
            let mut rows = Vec::new();
            for hop in hops {
                rows.push(vec![String::new(), hop.at.to_owned(), hop.what.clone()]);
                if let Some(rule) = &hop.rule {
                    let packets = rule
                        .packets
                        .map_or(String::new(), |packets| format!(" ({packets} packets)"));
                    rows.push(vec![
                        String::new(),
                        String::new(),
                        format!("  {}{packets}", rule),
                    ]);
                }
            }
            text += &align(&rows);
        }
        let (tone, word) = match self.verdict {
            Verdict::Answered => (Tone::Good, "answered"),
            Verdict::Fails => (Tone::Bad, "fails"),
            Verdict::Unsure => (Tone::Doubtful, "unsure"),
        };
        text += &format!("{}: {}\n", style.paint(tone, word), self.sentence);
        for fix in &self.fixes {
            text += &format!("mend: {fix}\n");
        }
        for caveat in &self.caveats {
            text += &format!("but: {caveat}\n");
        }
        text
    }

    fn is_well(&self) -> bool {
        self.verdict != Verdict::Fails
    }
}
