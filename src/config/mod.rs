//! The configuration, as types that only hold valid values. Knows neither the kernel nor events.

mod error;
mod file;
mod parse;
mod syntax;
mod values;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use ipnetwork::Ipv4Network;

pub use error::{Errors, Problem, place};
pub use parse::KEYS;

use crate::model::forward::Forward;
pub use crate::model::link::Identity;
use crate::model::names::{IfName, UplinkName};
use crate::model::route::{FwMark, TableId};

/// The configuration file without `--config`.
pub const DEFAULT_PATH: &str = "/etc/mh-hook.toml";

#[derive(Debug, PartialEq, Eq)]
pub struct Config {
    pub lan: Lan,
    /// The bits of packet and connection marks that are ours.
    pub mask: u32,
    pub priority: Priority,
    pub uplinks: BTreeMap<UplinkName, Uplink>,
}

/// The LAN side of the router.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Lan {
    /// The interfaces that LAN hosts are behind.
    pub interfaces: Vec<IfName>,
    /// The addresses of LAN hosts: their traffic is masqueraded.
    pub networks: Vec<Ipv4Network>,
}

/// The priorities of our ip rules. The kernel tries the lowest number first.
#[derive(Debug, PartialEq, Eq)]
pub struct Priority {
    /// Rules that send what goes from an uplink's address to the LAN by the main table.
    pub local: u32,
    /// Rules that send replies by the uplink that the connection came in by.
    pub mark: u32,
    /// Rules that send what comes from an uplink's address by that uplink.
    pub source: u32,
    /// Rules that send the connections of pinned LAN hosts by their uplink.
    pub pin: u32,
}

/// One configured uplink.
#[derive(Debug, PartialEq, Eq)]
pub struct Uplink {
    pub identity: Identity,
    /// The routing table and mark. None if the uplink only masquerades.
    pub routing: Option<Routing>,
    /// Whether LAN traffic that leaves by the uplink gets its address.
    pub masquerade: bool,
    /// Whether LAN hosts, too, reach the forwards at the uplink's address.
    pub hairpin: bool,
    /// Whether the MSS of TCP connections through the link is clamped to the path MTU.
    pub clamp_mss: bool,
    /// Whether the filter table's FORWARD chain gets rules that accept the forwarded connections.
    pub accept_forward: bool,
    /// LAN sources whose own connections leave by this uplink only.
    pub pin: Vec<Ipv4Network>,
    /// The port forwards, in the order of the file.
    pub forwards: Vec<Forward>,
}

/// What sends the replies of a connection by the uplink that it came in by.
#[derive(Debug, PartialEq, Eq)]
pub struct Routing {
    pub table: TableId,
    /// The mark of the uplink's connections.
    pub mark: FwMark,
}

/// A configuration file that is read, and not yet parsed.
#[derive(Debug)]
pub struct Source<'a> {
    path: &'a Path,
    text: String,
}

impl<'a> Source<'a> {
    /// Reads the file.
    /// Errors: it can't be read, or another user than root can have written it.
    pub fn read(path: &'a Path) -> Result<Self> {
        let text = file::read(path).with_context(|| format!("configuration {}", path.display()))?;
        Ok(Self { path, text })
    }

    /// Parses its text.
    /// Errors: it has problems: [`Errors`].
    pub fn parse(&self) -> Result<Config> {
        let Self { path, text } = self;
        Config::parse(text).map_err(|problems| Errors::new(path, text, &problems).into())
    }
}

impl Config {
    /// Reads and parses the file.
    /// Errors: those of [`Source::read`] and [`Source::parse`].
    pub fn load(path: &Path) -> Result<Self> {
        Source::read(path)?.parse()
    }

    /// Parses the text of a configuration.
    /// Errors: all problems, in the order of the text.
    pub fn parse(text: &str) -> Result<Self, Vec<Problem>> {
        parse::parse(text)
    }

    /// Whether an uplink is known by what only pppd knows.
    pub fn asks_pppd(&self) -> bool {
        let mut uplinks = self.uplinks.values();
        uplinks.any(|uplink| uplink.identity.needs_pppd())
    }

    /// The uplinks whose identity matches a call.
    pub fn matching(&self, call: &Identity) -> Vec<&UplinkName> {
        let uplinks = self.uplinks.iter();
        let matching = uplinks.filter(|(_, uplink)| uplink.identity.matches(call));
        matching.map(|(name, _)| name).collect()
    }
}
