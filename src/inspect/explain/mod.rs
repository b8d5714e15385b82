//! The journey of one connection, there and back, hop by hop: what the kernel holds decides. Routes
//! are asked of the kernel; the way through iptables is `packet`'s. Changes nothing.

mod ends;
mod reason;
mod trace;

use std::ffi::OsString;
use std::net::Ipv4Addr;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use crate::config::{Config, Uplink};
use crate::inspect::explain::trace::Run;
use crate::inspect::packet_trace::Place;
use crate::inspect::report::{Report, Style, Tone, align};
use crate::inspect::snapshot::Snapshot;
use crate::model::forward::{Asked, Forward, Protocol};
use crate::model::names::UplinkName;
use crate::reconcile::event;

/// How many doubtful rules are tried, each by a journey of its own.
const MAX_DOUBTS: usize = 8;

/// Whose journey is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Who asks.
    pub source: Ipv4Addr,
    /// What is asked.
    pub service: Service,
    /// Who is asked.
    pub aim: Aim,
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service {
    /// The protocol.
    pub protocol: Protocol,
    /// The destination port; none where the protocol has none.
    pub port: Option<u16>,
}

/// Who is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Aim {
    /// A client asks an uplink's address.
    Uplink(UplinkName),
    /// A client asks this address of ours.
    Address(Ipv4Addr),
    /// A LAN host asks this address.
    FromLan(Ipv4Addr),
}

impl Question {
    /// `CLIENT [PROTO/PORT]`, `--to UPLINK|ADDR`, `--from-lan HOST`.
    ///
    /// # Errors
    /// What can't be read, and what has to be said because it does not follow from the configuration.
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

/// The uplink that is meant where nobody says: the only one that has such a forward.
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

    /// What a forward is there for.
    fn of(forward: &Forward) -> Self {
        let protocol = forward.protocols.first().copied().unwrap_or(Protocol::Tcp);
        let port = forward.ports.map_or(80, |ports| ports.first);
        Self {
            protocol,
            port: protocol.has_ports().then_some(port),
        }
    }

    /// What decides whether a forward takes it.
    pub fn asked_by(self, source: Option<Ipv4Addr>) -> Asked {
        Asked {
            source,
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

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The reply arrives, as far as this router can tell.
    Answered,
    /// It does not.
    Fails,
    /// It depends on what can't be told.
    Unsure,
}

/// The direction of a hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// The request's.
    There,
    /// The reply's.
    Back,
    /// That of the packets which follow, both ways; told only where one of them is lost.
    Later,
}

/// One thing that happens to a packet.
#[derive(Clone, Debug, Serialize)]
pub struct Hop {
    /// Of the request, of the reply or of what follows.
    pub direction: Direction,
    /// What it is about: `in`, `mark`, `nat`, `rp_filter`, `rule`, `route`, `filter`, `host`, `out`.
    pub at: &'static str,
    /// What happens.
    pub what: String,
    /// The rule of iptables that does it.
    pub rule: Option<Place>,
}

/// A journey.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    /// The protocol's name.
    pub protocol: String,
    /// The port that is asked.
    pub port: Option<u16>,
    /// Who asks.
    pub from: Ipv4Addr,
    /// The address that is asked; none where the uplink has none.
    pub to: Option<Ipv4Addr>,
    /// The uplink whose address that is.
    pub uplink: Option<String>,
    /// What becomes of it.
    pub verdict: Verdict,
    /// The same as a sentence, with the reason.
    pub sentence: String,
    /// Commands, or lines of the configuration, that mend it.
    pub mend: Vec<String>,
    /// What may be otherwise.
    pub caveats: Vec<String>,
    /// The journey.
    pub hops: Vec<Hop>,
}

/// The journey that is asked for, by what stands now.
///
/// # Errors
/// The kernel can't be asked.
pub fn explain(snapshot: &Snapshot, config: &Config, question: &Question) -> Result<Explanation> {
    let comparison = snapshot.compare(config)?;
    let run = Run {
        snapshot,
        config,
        uplink_links: &comparison.links,
        installed: &comparison.installed,
        desired: &comparison.desired,
        question,
    };
    let mut journey = run.journey(None)?;
    let mut caveats = std::mem::take(&mut journey.caveats);
    let mut is_sure = true;
    for doubt in journey.doubts.iter().take(MAX_DOUBTS) {
        let other = run.journey(Some(doubt))?.end;
        if other.is_ok() != journey.end.is_ok() {
            is_sure = false;
            let then = match &other {
                Ok(sentence) => sentence,
                Err((why, _)) => why,
            };
            caveats.push(format!(
                "it can't be told whether {} matches; if it does: {then}",
                doubt
            ));
        }
    }
    if !snapshot.nft_tables.is_empty() {
        caveats.push(format!(
            "nftables has tables of its own, which are not looked into: {}; see nft list ruleset",
            snapshot.nft_tables.join(", ")
        ));
    }
    let verdict = match &journey.end {
        _ if !is_sure => Verdict::Unsure,
        Ok(_) => Verdict::Answered,
        Err(_) => Verdict::Fails,
    };
    let (sentence, mend) = match journey.end {
        Ok(sentence) => (sentence, Vec::new()),
        Err((why, mend)) => (why, mend),
    };
    Ok(Explanation {
        protocol: question.service.protocol.to_string(),
        port: question.service.port,
        from: question.source,
        to: journey.asked,
        uplink: journey.uplink.map(|name| name.to_string()),
        verdict,
        sentence,
        mend,
        caveats,
        hops: journey.hops,
    })
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
        for mend in &self.mend {
            text += &format!("mend: {mend}\n");
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
