//! The configuration: what it asks for, as types that can't be wrong. Knows neither kernel nor event.

mod error;
mod file;
mod parse;
mod values;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use ipnetwork::Ipv4Network;

pub use error::{Errors, Problem, place};
pub use file::Source;
pub use parse::KEYS;

use crate::model::forward::Forward;
use crate::model::names::{IfName, UplinkName};
use crate::model::route::{FwMark, TableId};

/// Where the configuration stands unless `--config` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/mh-hook.toml";

/// A configuration that holds.
#[derive(Debug, PartialEq, Eq)]
pub struct Config {
    /// Where the servers are.
    pub lan: Lan,
    /// The bits of packet and connection mark that are ours.
    pub mask: u32,
    /// The priorities of our routing rules.
    pub priority: Priority,
    /// The ways out, by name.
    pub uplinks: BTreeMap<UplinkName, Uplink>,
}

/// The LAN side of the router.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Lan {
    /// Interfaces by which replies of LAN servers come in.
    pub interfaces: Vec<IfName>,
    /// Prefixes that masquerade hides.
    pub networks: Vec<Ipv4Network>,
}

/// Priorities of `ip rule`, smaller asked first.
#[derive(Debug, PartialEq, Eq)]
pub struct Priority {
    /// An uplink's address talks to the LAN directly.
    pub local: u32,
    /// Connections go back by the uplink that they came by.
    pub mark: u32,
    /// An uplink's address leaves by its link.
    pub source: u32,
    /// The connections of pinned LAN hosts leave by their uplink.
    pub pin: u32,
}

/// One configured way out.
#[derive(Debug, PartialEq, Eq)]
pub struct Uplink {
    /// By what it is known.
    pub identity: Identity,
    /// Its routing table and connection mark; without them it only masquerades.
    pub routing: Option<Routing>,
    /// Whether LAN traffic that leaves by it takes its address.
    pub masquerade: bool,
    /// Whether LAN hosts reach the forwards by the uplink's address.
    pub hairpin: bool,
    /// Whether the TCP segments that pass the link are held to its MTU.
    pub clamp_mss: bool,
    /// Whether the filter table's FORWARD lets the forwarded connections pass.
    pub accept_forward: bool,
    /// LAN sources whose own connections always leave by it.
    pub pin: Vec<Ipv4Network>,
    /// Its port forwards, in the order of the file.
    pub forwards: Vec<Forward>,
}

/// What sends a connection's replies back by the uplink it came by.
#[derive(Debug, PartialEq, Eq)]
pub struct Routing {
    /// The uplink's routing table.
    pub table: TableId,
    /// The mark of its connections.
    pub mark: FwMark,
}

/// By what an uplink is known in pppd's calls: all that are given must match, and one is.
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
    /// Whether all that is given here is so there.
    pub fn matches(&self, call: &Self) -> bool {
        let fits =
            |ours: &Option<String>, theirs: &Option<String>| ours.is_none() || ours == theirs;
        (self.interface.is_none() || self.interface == call.interface)
            && fits(&self.ipparam, &call.ipparam)
            && fits(&self.linkname, &call.linkname)
            && fits(&self.peer, &call.peer)
    }

    /// The interface, where it alone tells which link this is.
    pub fn interface_alone(&self) -> Option<&IfName> {
        let Self {
            interface,
            ipparam: None,
            linkname: None,
            peer: None,
        } = self
        else {
            return None;
        };
        interface.as_ref()
    }
}

impl Config {
    /// Reads and parses the file.
    ///
    /// # Errors
    /// Those of [`Source::read`] and [`Source::config`].
    pub fn load(path: &Path) -> Result<Self> {
        Source::read(path)?.config()
    }

    /// The configuration in this text.
    ///
    /// # Errors
    /// All that is wrong, in the order of the text.
    pub fn parse(text: &str) -> Result<Self, Vec<Problem>> {
        parse::parse(text)
    }

    /// The uplinks that a call is for.
    pub fn matching(&self, call: &Identity) -> Vec<&UplinkName> {
        let matching = self
            .uplinks
            .iter()
            .filter(|(_, uplink)| uplink.identity.matches(call));
        matching.map(|(name, _)| name).collect()
    }
}
