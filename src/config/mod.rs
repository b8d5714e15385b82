//! The configuration, as types that only hold valid values. Knows neither the kernel nor events.

mod error;
mod file;
mod parse;
mod values;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use ipnetwork::Ipv4Network;

pub use error::{Errors, Problem, place};
pub use parse::KEYS;

use crate::model::forward::Forward;
use crate::model::names::{IfName, UplinkName};
use crate::model::route::{FwMark, TableId};

/// The configuration file without `--config`.
pub const DEFAULT_PATH: &str = "/etc/mh-hook.toml";

/// A valid configuration.
#[derive(Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the types say it")]
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
    /// How its link is recognized.
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
#[expect(missing_docs, reason = "the types say it")]
pub struct Routing {
    pub table: TableId,
    /// The mark of the uplink's connections.
    pub mark: FwMark,
}

/// How an uplink is recognized in pppd's calls: at least one of these is given, and all that are given must match.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The interface's name.
    pub interface: Option<IfName>,
    /// pppd's option `ipparam`.
    pub ipparam: Option<String>,
    /// pppd's option `linkname`.
    pub linkname: Option<String>,
    /// The name in `pppd call NAME`.
    pub peer: Option<String>,
}

impl Identity {
    /// Whether a call has all that is given here.
    pub fn matches(&self, call: &Self) -> bool {
        let fits =
            |given: &Option<String>, called: &Option<String>| given.is_none() || given == called;
        (self.interface.is_none() || self.interface == call.interface)
            && fits(&self.ipparam, &call.ipparam)
            && fits(&self.linkname, &call.linkname)
            && fits(&self.peer, &call.peer)
    }

    /// The interface, if nothing else is given.
    pub fn interface_alone(&self) -> Option<&IfName> {
        let others = [&self.ipparam, &self.linkname, &self.peer];
        let interface = self.interface.as_ref();
        interface.filter(|_| others.iter().all(|other| other.is_none()))
    }
}

impl Config {
    /// Reads and parses the file.
    ///
    /// # Errors
    /// It can't be read, another user than root can have written it, or it has problems: [`Errors`].
    pub fn load(path: &Path) -> Result<Self> {
        let text = file::read(path).with_context(|| format!("configuration {}", path.display()))?;
        Self::parse(&text).map_err(|problems| Errors::new(path, &text, problems).into())
    }

    /// Parses the text of a configuration.
    ///
    /// # Errors
    /// All problems, in the order of the text.
    pub fn parse(text: &str) -> Result<Self, Vec<Problem>> {
        parse::parse(text)
    }

    /// The uplinks whose identity matches a call.
    pub fn matching(&self, call: &Identity) -> Vec<&UplinkName> {
        let uplinks = self.uplinks.iter();
        let matching = uplinks.filter(|(_, uplink)| uplink.identity.matches(call));
        matching.map(|(name, _)| name).collect()
    }
}
