//! What is asked, and a look at the links in question.

use std::collections::BTreeSet;
use std::fmt;
use std::net::Ipv4Addr;

use anyhow::{Context, Result, bail, ensure};

use crate::claim::{self, Addressed, Looks, Running};
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
        /// Whose link it is, where neither the configuration nor what stands in the kernel tells.
        uplink: Option<UplinkName>,
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

/// What a request says of an uplink and the interface that it names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Binds {
    /// The interface is this uplink's now.
    ToIt,
    /// It is another's, or nobody's.
    ToAnother,
    /// Nothing: what stands tells.
    Nothing,
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

    /// The uplinks that the configuration, by itself, says this is for.
    ///
    /// # Errors
    /// Two that one call of pppd matches; an uplink given by hand that is not there or is elsewhere.
    pub fn named<'a>(&self, config: &'a Config) -> Result<Vec<&'a UplinkName>> {
        let interface = match self {
            Self::Sync => return Ok(config.uplinks.keys().collect()),
            Self::Event(event) => {
                let matching = config.matching(&event.identity);
                if let [one, two, ..] = matching[..] {
                    bail!(
                        "{one} and {two} both match this call for {}: give one of them what the other has not",
                        event.interface
                    );
                }
                return Ok(matching);
            }
            Self::Up {
                interface,
                uplink: Some(name),
                ..
            } => {
                let known = config.uplinks.get_key_value(name);
                let (name, uplink) =
                    known.with_context(|| format!("there is no [uplink.{name}]"))?;
                if let Some(other) = uplink
                    .identity
                    .interface
                    .as_ref()
                    .filter(|other| *other != interface)
                {
                    bail!("{name} is bound to {other}, not to {interface}");
                }
                return Ok(vec![name]);
            }
            Self::Up { interface, .. } | Self::Down { interface } => interface,
        };
        let uplinks = config.uplinks.iter();
        let named =
            uplinks.filter(|(_, uplink)| uplink.identity.interface.as_ref() == Some(interface));
        Ok(named.map(|(name, _)| name).collect())
    }

    /// How the links of the uplinks in question are now. Those whose entries name the interface are
    /// in question too: it is theirs no longer, or by hand, where pppd does not say whose it is, still.
    ///
    /// # Errors
    /// By hand, a link that is not up or has no address, or that may be one of several; any address
    /// that can't be an uplink's.
    pub fn look(&self, config: &Config, observed: &State) -> Result<Looks> {
        let mut chosen: BTreeSet<UplinkName> = self.named(config)?.into_iter().cloned().collect();
        let mut names = chosen.clone();
        let mut binds = false;
        if let Some(interface) = self.interface() {
            let bound = claim::bound_to(interface, observed).into_iter();
            let bound: BTreeSet<_> = bound
                .filter(|name| config.uplinks.contains_key(name))
                .collect();
            names.extend(bound.iter().cloned());
            binds = self.binds(&bound, &chosen)?;
            if let Self::Up { uplink: None, .. } = self {
                // An uplink by that name alone is sure; else what stands tells.
                let sure =
                    |name: &&UplinkName| config.uplinks[*name].identity.interface_alone().is_some();
                // One that is at an interface of another name by now does not come back by what stands.
                let may_be = |name: &UplinkName| {
                    let own = config.uplinks[name].identity.interface.as_ref();
                    own.is_none_or(|own| own == interface)
                };
                let bound: BTreeSet<_> = bound.into_iter().filter(may_be).collect();
                if !chosen.iter().any(|name| sure(&name)) && !bound.is_empty() {
                    chosen = bound;
                }
                let mut several = chosen.iter();
                if let (Some(one), Some(two)) = (several.next(), several.next()) {
                    bail!("{interface} can be {one} or {two}: say which, as in --uplink {one}");
                }
            }
        }
        let mut looks = Looks::new();
        for (name, uplink) in names
            .iter()
            .filter_map(|name| config.uplinks.get_key_value(name))
        {
            let binds = match (binds, chosen.contains(name)) {
                (false, _) => Binds::Nothing,
                (true, true) => Binds::ToIt,
                (true, false) => Binds::ToAnother,
            };
            let interface = self.place(name, uplink, binds, observed);
            let link = match interface {
                Some(interface) => self
                    .addressed(&interface, uplink, config, observed)
                    .with_context(|| name.to_string())?,
                None => None,
            };
            looks.insert(name.clone(), link);
        }
        Ok(looks)
    }

    /// What a person who asks by hand may have overlooked.
    pub fn doubts(&self, config: &Config, looks: &Looks) -> Option<String> {
        let Self::Up {
            interface, local, ..
        } = self
        else {
            return None;
        };
        let Some((name, link)) = looks
            .iter()
            .find_map(|(name, link)| Some((name, link.as_ref()?)))
        else {
            let mut uplinks = config.uplinks.iter();
            let (name, _) = uplinks.find(|(_, uplink)| uplink.identity.interface.is_none())?;
            return Some(format!(
                "nothing tells whose link {interface} is: if it is {name}'s, say --uplink {name}"
            ));
        };
        let missing = local.filter(|local| !link.addresses.contains(local))?;
        Some(format!(
            "{name}: {interface} does not have the address {missing}"
        ))
    }

    /// Whether this tells whose the interface is now. An ip-down tells whose it was, and may be late;
    /// so may an ip-up behind a slow hook, and then the interface has another address, and has been
    /// given to another uplink.
    fn binds(&self, bound: &BTreeSet<UplinkName>, chosen: &BTreeSet<UplinkName>) -> Result<bool> {
        Ok(match self {
            Self::Up { .. } | Self::Down { .. } => true,
            Self::Sync => false,
            Self::Event(Event {
                direction,
                interface,
                local,
                ..
            }) => match direction {
                Direction::PreUp => true,
                Direction::Follow | Direction::Down => false,
                Direction::Up => {
                    let link = Link::read(interface)?.unwrap_or_default();
                    let is_there = local.is_none_or(|local| link.addresses.contains(&local));
                    is_there || bound.is_subset(chosen)
                }
            },
        })
    }

    /// The interface to look at for an uplink in question; none where it has none now.
    fn place(
        &self,
        name: &UplinkName,
        uplink: &Uplink,
        binds: Binds,
        observed: &State,
    ) -> Option<IfName> {
        let alone = uplink.identity.interface_alone().cloned();
        match (binds, self.interface()) {
            (Binds::ToIt, Some(interface)) => Some(interface.clone()),
            // Its entries name the interface of a call that is not for it: it may be at its own.
            (Binds::ToAnother, Some(interface)) => alone.filter(|own| own != interface),
            (Binds::Nothing, _) | (_, None) => {
                let own = uplink.identity.interface.as_ref();
                let standing = claim::binding(name, uplink, observed);
                alone.or(standing.filter(|standing| own.is_none_or(|own| own == standing)))
            }
        }
    }

    /// The link, if the uplink should have entries for it.
    fn addressed(
        &self,
        interface: &IfName,
        uplink: &Uplink,
        config: &Config,
        observed: &State,
    ) -> Result<Option<Addressed>> {
        let by_hand = matches!(self, Self::Up { .. } | Self::Down { .. })
            && self.interface() == Some(interface);
        if by_hand && self.removes() {
            return Ok(None);
        }
        let link = Link::read(interface)?;
        if by_hand {
            let link = link.as_ref();
            let link = link.with_context(|| {
                format!("there is no interface {interface}: dial it first, see ip link")
            })?;
            ensure!(
                link.up,
                "{interface} is down: dial it first, or ip link set {interface} up"
            );
        }
        let Some(link) = link else { return Ok(None) };
        let running = match self {
            _ if link.up => Running::Yes,
            Self::Event(Event {
                direction: Direction::PreUp,
                interface: about_to_be,
                ..
            }) if about_to_be == interface => Running::NotYet,
            _ => return Ok(None),
        };
        // What stands is kept, where a link has several addresses and nobody says which.
        let tables: BTreeSet<TableId> =
            uplink.routing.iter().map(|routing| routing.table).collect();
        let preferred = self
            .local()
            .into_iter()
            .chain(claim::sources(observed, &tables));
        let address = match self.local() {
            Some(local) if by_hand => Some(local),
            _ => link.address(preferred),
        };
        ensure!(
            address.is_some() || !by_hand,
            "{interface} has no IPv4 address: is pppd done? see ip address show {interface}, or give --local ADDR"
        );
        let Some(address) = address else {
            return Ok(None);
        };
        check_local(address, &config.lan.networks).with_context(|| interface.to_string())?;
        let strict = strict(interface, observed)?;
        Ok(Some(Addressed {
            interface: interface.clone(),
            address,
            addresses: link.addresses,
            running,
            mtu: link.mtu,
            strict,
        }))
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
