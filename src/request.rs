//! What is asked, and a look at the links in question.

use std::collections::BTreeSet;
use std::fmt;
use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};

use crate::claim::{self, Carrying, Looks};
use crate::config::{Config, Uplink};
use crate::event::{Direction, Event};
use crate::link::{self, Link};
use crate::state::{IfName, State, TableId, UplinkName, check_local};

/// What is asked.
#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    /// By hand: this interface is up.
    Up {
        /// The interface.
        interface: IfName,
        /// Its address, where it is not to be asked of the kernel.
        local: Option<Ipv4Addr>,
    },
    /// By hand: down means down, whatever the link does.
    Down {
        /// The interface.
        interface: IfName,
    },
    /// By pppd: look at this interface.
    Event(Event),
    /// Look at all interfaces.
    Sync,
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Up { interface, .. } => write!(f, "up {interface}"),
            Self::Down { interface } => write!(f, "down {interface}"),
            Self::Event(event) => write!(f, "event {} {}", event.direction, event.interface),
            Self::Sync => f.write_str("sync"),
        }
    }
}

impl Request {
    /// The interface in question; none for all.
    pub fn interface(&self) -> Option<&IfName> {
        match self {
            Self::Up { interface, .. }
            | Self::Down { interface }
            | Self::Event(Event { interface, .. }) => Some(interface),
            Self::Sync => None,
        }
    }

    /// The address that the caller gives the link.
    pub fn local(&self) -> Option<Ipv4Addr> {
        match self {
            Self::Up { local, .. } | Self::Event(Event { local, .. }) => *local,
            Self::Down { .. } | Self::Sync => None,
        }
    }

    /// Whether it can be met, by removing, without a configuration.
    pub fn removes(&self) -> bool {
        match self {
            Self::Down { .. } => true,
            Self::Event(event) => event.direction == Direction::Down,
            Self::Up { .. } | Self::Sync => false,
        }
    }

    /// How the links of the uplinks in question are now. Those whose entries still name the
    /// interface, though the configuration no longer does, are in question too.
    ///
    /// # Errors
    /// By hand, a link that is not up or has no address; any address that can't be an uplink's.
    pub fn look(&self, config: &Config, observed: &State) -> Result<Looks> {
        let names: BTreeSet<UplinkName> = match self.interface() {
            None => config.uplinks.keys().cloned().collect(),
            Some(interface) => {
                let bound = claim::bound_to(interface, observed);
                bound
                    .into_iter()
                    .chain(config.bound_to(interface).cloned())
                    .collect()
            }
        };
        let uplinks = names
            .iter()
            .filter_map(|name| config.uplinks.get_key_value(name));
        uplinks
            .map(|(name, uplink)| {
                let address = self
                    .address(uplink, observed)
                    .with_context(|| name.to_string())?;
                let Some(address) = address else {
                    return Ok((name.clone(), None));
                };
                check_local(address, &config.lan.networks)
                    .with_context(|| format!("{name} on {}", uplink.interface))?;
                let strict = strict(&uplink.interface, observed)?;
                Ok((name.clone(), Some(Carrying { address, strict })))
            })
            .collect()
    }

    /// The address that the uplink's entries should be for; none where it should have none.
    fn address(&self, uplink: &Uplink, observed: &State) -> Result<Option<Ipv4Addr>> {
        let interface = &uplink.interface;
        let by_hand = matches!(self, Self::Up { .. } | Self::Down { .. })
            && self.interface() == Some(interface);
        if by_hand && self.removes() {
            return Ok(None);
        }
        let link = Link::read(interface)?;
        // What stands is kept, where a link has several addresses and nobody says which.
        let tables: BTreeSet<TableId> =
            uplink.routing.iter().map(|routing| routing.table).collect();
        let preferred = self
            .local()
            .into_iter()
            .chain(claim::sources(observed, &tables));
        if !by_hand {
            return Ok(link.and_then(|link| link.address(preferred)));
        }
        let link = link.with_context(|| {
            format!("there is no interface {interface}: dial it first, see ip link")
        })?;
        ensure!(
            link.up,
            "{interface} is down: dial it first, or ip link set {interface} up"
        );
        let address = self.local().or_else(|| link.address(preferred));
        let address = address.with_context(|| {
            format!("{interface} has no IPv4 address: is pppd done? see ip address show {interface}, or give --local ADDR")
        })?;
        if !link.addresses.contains(&address) {
            log::warn!("{interface} does not have the address {address}");
        }
        Ok(Some(address))
    }
}

/// The interface's own `rp_filter` where filtering is strict (the larger value of the interface
/// and of `all` counts), or was until we loosened it.
fn strict(interface: &IfName, observed: &State) -> Result<Option<u8>> {
    let Some(own) = link::rp_filter(interface.as_str())? else {
        return Ok(None);
    };
    let all = link::rp_filter("all")?.unwrap_or(0);
    if own.max(all) == 1 {
        return Ok(Some(own));
    }
    let mut loosened = observed.loose.iter();
    let ours = loosened.find(|loose| loose.interface == *interface);
    Ok(ours.map(|loose| loose.before))
}
