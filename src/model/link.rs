//! The links of uplinks.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use anyhow::{Error, Result, bail};
use ipnetwork::Ipv4Network;

use crate::model::names::{IfName, UplinkName};

/// How an uplink is recognized in pppd's calls: at least one of these is given, and all that are given must match.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    pub interface: Option<IfName>,
    pub ipparam: Option<String>,
    pub linkname: Option<String>,
    /// The name in `pppd call NAME`.
    pub peer: Option<String>,
    /// An address of the link, which the kernel tells, whatever unit pppd gave it.
    pub address: Option<Ipv4Addr>,
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
            && (self.address.is_none() || self.address == call.address)
    }

    /// Whether only pppd knows which link it is: neither its interface nor an address tells.
    pub fn needs_pppd(&self) -> bool {
        self.interface_alone().is_none() && self.address.is_none()
    }

    /// The interface, if nothing else is given that only a call by pppd tells.
    pub fn interface_alone(&self) -> Option<&IfName> {
        let Self {
            interface,
            ipparam: None,
            linkname: None,
            peer: None,
            address: _,
        } = self
        else {
            return None;
        };
        interface.as_ref()
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UplinkLink {
    pub interface: IfName,
    /// The address that it goes by.
    pub address: Ipv4Addr,
    /// All addresses that entries are for.
    pub addresses: Vec<Ipv4Addr>,
    /// Whether it carries traffic, so that a route can leave by it.
    pub state: LinkState,
    /// Its MTU in bytes, where the kernel tells.
    pub mtu: Option<u32>,
}

/// Whether a link carries traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkState {
    Up,
    /// It is about to: pppd waits for its hooks.
    AboutToBeUp,
}

/// The uplinks in question, each with its link; none where the uplink should have no entries.
pub type UplinkLinks = BTreeMap<UplinkName, Option<UplinkLink>>;

/// Uplinks whose links can't be used, and why.
pub type Troubles = BTreeMap<UplinkName, Error>;

/// Whether an address can be a link's own: not 0/8, 127/8, nor 224/3 (RFC 6890), nor within a LAN.
/// Errors: says which of these it is.
pub fn check_local(address: Ipv4Addr, lan: &[Ipv4Network]) -> Result<()> {
    let first = address.octets()[0];
    if first == 0 || first == 127 || first >= 224 {
        bail!("{address} can't be a link's address: 0/8, 127/8 and 224/3 are not for links");
    }
    if let Some(network) = lan.iter().find(|network| network.contains(address)) {
        bail!(
            "{address} can't be an uplink's address: it lies in the LAN {network} of [lan] networks"
        );
    }
    Ok(())
}
