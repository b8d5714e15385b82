//! What a call asks for, and which links it is about.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::Ipv4Addr;

use anyhow::{Context, Result, bail, ensure};
use log::debug;

use crate::config::{Config, Identity, Uplink};
use crate::kernel::link::Links;
use crate::model::link::{LinkState, Troubles, UplinkLink, UplinkLinks, check_local};
use crate::model::names::{IfName, UplinkName};
use crate::model::nearest::nearest;
use crate::model::state::State;
use crate::reconcile::desired::Pins;
use crate::reconcile::event::{Direction, Event};
use crate::reconcile::ownership::Owners;

#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    /// By hand: this interface is up.
    Up {
        interface: IfName,
        /// Whose link it is, where neither the configuration nor the installed entries tell.
        uplink: Option<UplinkName>,
        /// The address to use, instead of asking the kernel for it.
        local: Option<Ipv4Addr>,
    },
    /// By hand: remove the entries, even if the link is up.
    Down { interface: IfName },
    /// By pppd: look at this interface.
    Event(Event),
    /// Look at all interfaces.
    Sync,
}

/// What a person asks for that can't be: a usage error.
#[derive(Debug)]
pub struct Refused(String);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

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
    /// The interface in question. None for `sync`, which is about all.
    pub fn interface(&self) -> Option<&IfName> {
        match self {
            Self::Up { interface, .. }
            | Self::Down { interface }
            | Self::Event(Event { interface, .. }) => Some(interface),
            Self::Sync => None,
        }
    }

    /// The link's address, as the caller gives it.
    pub fn local(&self) -> Option<Ipv4Addr> {
        match self {
            Self::Up { local, .. } => *local,
            Self::Event(event) => event.identity.address,
            Self::Down { .. } | Self::Sync => None,
        }
    }

    /// Whether it only removes entries, which needs no configuration.
    pub fn removes(&self) -> bool {
        match self {
            Self::Down { .. } => true,
            Self::Event(event) => event.direction == Direction::Down,
            Self::Up { .. } | Self::Sync => false,
        }
    }

    /// A link that goes leaves its pinned hosts without a way out; a person who says `down` frees them.
    pub fn pins_of_down_links(&self) -> Pins {
        match self {
            Self::Down { .. } => Pins::Go,
            Self::Up { .. } | Self::Event(_) | Self::Sync => Pins::StayClosed,
        }
    }

    /// The uplinks that the configuration alone matches with the request.
    /// Errors: one call by pppd matches two uplinks; or an uplink given by hand is not configured, or has another interface.
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
                if let Some(other) = &uplink.identity.interface
                    && other != interface
                {
                    bail!("{name} is bound to {other}, not to {interface}");
                }
                return Ok(vec![name]);
            }
            Self::Up { interface, .. } | Self::Down { interface } => interface,
        };
        let is_at = |name: &&UplinkName| {
            config.uplinks[*name].identity.interface.as_ref() == Some(interface)
        };
        let mut named: Vec<&UplinkName> = config.uplinks.keys().filter(is_at).collect();
        // By its own name an uplink can be taken down when nothing tells its interface any more.
        if let (Self::Down { .. }, true) = (self, named.is_empty()) {
            let mut names = config.uplinks.keys();
            named.extend(names.find(|name| name.to_string() == interface.as_str()));
        }
        Ok(named)
    }

    /// The same request with the interface in place of the uplink's name that a person gave. An interface comes first.
    pub fn by_interface(self, config: &Config) -> Self {
        let own = |word: &IfName| {
            let mut uplinks = config.uplinks.iter();
            let is_at =
                |(_, it): &(&UplinkName, &Uplink)| it.identity.interface.as_ref() == Some(word);
            if uplinks.clone().any(|it| is_at(&it)) {
                return None;
            }
            let (name, uplink) = uplinks.find(|(name, _)| name.to_string() == word.as_str())?;
            Some((name.clone(), uplink.identity.interface.clone()?))
        };
        match self {
            Self::Up {
                interface,
                uplink: None,
                local,
            } => {
                let (uplink, interface) = match own(&interface) {
                    Some((name, own)) => (Some(name), own),
                    None => (None, interface),
                };
                Self::Up {
                    interface,
                    uplink,
                    local,
                }
            }
            Self::Down { interface } => {
                let interface = own(&interface).map_or(interface, |(_, own)| own);
                Self::Down { interface }
            }
            other => other,
        }
    }

    /// Errors: a person names what is neither an uplink nor may be the interface of one, and no entry of ours names it.
    pub fn check_known(&self, config: &Config, seen: &Seen) -> Result<()> {
        let (Self::Up {
            interface,
            uplink: None,
            ..
        }
        | Self::Down { interface }) = self
        else {
            return Ok(());
        };
        let may_be_one = |uplink: &Uplink| may_be(&uplink.identity, interface);
        if !self.named(config)?.is_empty()
            || config.uplinks.values().any(may_be_one)
            || !seen.owners.bound_to(interface).is_empty()
        {
            return Ok(());
        }
        let uplinks = config.uplinks.iter().map(|(name, uplink)| {
            let own = uplink.identity.interface.as_ref();
            (
                name.to_string(),
                own.map(ToString::to_string).unwrap_or_default(),
            )
        });
        let uplinks: Vec<(String, String)> = uplinks.collect();
        let words = uplinks.iter().flat_map(|(name, own)| [&name[..], &own[..]]);
        let meant = nearest(interface.as_str(), words.filter(|word| !word.is_empty()));
        let meant = meant.map(|meant| format!("; did you mean {meant}?"));
        let all: Vec<String> = uplinks
            .iter()
            .map(|(name, own)| format!("{name} ({own})"))
            .collect();
        let there = match &all[..] {
            [] => "there are no uplinks in the configuration".to_owned(),
            all => format!("there are {}", all.join(", ")),
        };
        bail!(Refused(format!(
            "{interface} is neither an uplink nor the interface of one: {there}{}",
            meant.unwrap_or_default()
        )))
    }

    /// The present links of the uplinks in question. None if there is nothing to do: without a configuration entries are only
    /// removed, and not if the interface of a late ip-down is up again.
    /// Errors: those of [`Self::links`].
    pub fn links_in_question(
        &self,
        config: Option<&Config>,
        seen: &Seen,
    ) -> Result<Option<(UplinkLinks, Troubles)>> {
        if let Some(config) = config {
            return self.links(config, seen).map(Some);
        }
        let Some(interface) = self.interface() else {
            return Ok(None);
        };
        let link = seen.links.get(interface.as_str());
        let is_up = link.is_some_and(|link| link.up && !link.addresses.is_empty());
        if matches!(self, Self::Event(_)) && is_up {
            debug!("{interface} is up: this event is a late one");
            return Ok(None);
        }
        let names = seen.owners.bound_to(interface).into_iter();
        let links = names.map(|name| (name, None)).collect();
        Ok(Some((links, Troubles::new())))
    }

    /// The present links of the uplinks in question. Uplinks whose installed entries name the interface are in question, too:
    /// it may belong to another uplink now; and by hand, when pppd tells no identity, those entries tell the uplink.
    /// Errors: by hand: the link is down, has no address, or may belong to one of several uplinks. Always: an address is not one that
    /// an uplink can have.
    pub fn links(&self, config: &Config, seen: &Seen) -> Result<(UplinkLinks, Troubles)> {
        let mut chosen: BTreeSet<UplinkName> = self.named(config)?.into_iter().cloned().collect();
        let mut names = chosen.clone();
        let mut binds = false;
        if let Some(interface) = self.interface() {
            let mut bound = seen.owners.bound_to(interface);
            bound.retain(|name| config.uplinks.contains_key(name));
            names.extend(bound.iter().cloned());
            let held = config.uplinks.iter().filter(|(_, uplink)| {
                holder(&uplink.identity, config, seen).as_ref() == Some(interface)
            });
            let held: Vec<UplinkName> = held.map(|(name, _)| name.clone()).collect();
            names.extend(held.iter().cloned());
            if matches!(self, Self::Up { uplink: None, .. }) {
                chosen.extend(held);
            }
            binds = self.binds(&bound, &chosen, seen.links);
            if let Self::Up { uplink: None, .. } = self {
                // An uplink that is known by the interface alone is certain; otherwise the installed entries decide.
                let identity = |name: &UplinkName| &config.uplinks[name].identity;
                let is_sure = |name| identity(name).interface_alone().is_some();
                // Not if the uplink is configured for another interface by now.
                bound.retain(|name| may_be(identity(name), interface));
                if !chosen.iter().any(is_sure) && !bound.is_empty() {
                    chosen = bound;
                }
                let mut several = chosen.iter();
                if let (Some(one), Some(two)) = (several.next(), several.next()) {
                    bail!("{interface} can be {one} or {two}: say which, as in --uplink {one}");
                }
            }
        }
        let (mut links, mut troubles) = (UplinkLinks::new(), Troubles::new());
        for name in names {
            let uplink = &config.uplinks[&name];
            let alone = uplink.identity.interface_alone().cloned();
            let named = || {
                let named = seen.owners.interface_of(&name, seen.installed);
                let named = named.filter(|named| may_be(&uplink.identity, named));
                named.or_else(|| dialled(&uplink.identity, seen))
            };
            let interface = match self.interface().filter(|_| binds) {
                _ if uplink.identity.address.is_some() => self.by_address(&name, config, seen)?,
                Some(interface) if chosen.contains(&name) => Some(interface.clone()),
                // Its entries name the interface, but the call is for another uplink: look at its configured interface.
                Some(interface) => alone.filter(|own| own != interface),
                None => alone.or_else(named),
            };
            let link =
                interface.map(|interface| self.uplink_link(&interface, uplink, config, seen));
            let link = match link.transpose().with_context(|| name.to_string()) {
                Err(error) if *self == Self::Sync => {
                    troubles.insert(name.clone(), error);
                    None
                }
                link => link?,
            };
            links.insert(name, link.flatten());
        }
        Ok((links, troubles))
    }

    /// A warning for a person who may have overlooked something.
    pub fn doubts(&self, config: &Config, links: &UplinkLinks, seen: &Seen) -> Option<String> {
        let interface = match self {
            Self::Up { interface, .. } => interface,
            Self::Event(event) => return event.other_address(config),
            Self::Sync => {
                let mut unknown = unknown(config, links, seen).into_iter();
                let (name, interface) = unknown.next()?;
                return Some(format!(
                    "nothing tells which link is {name}'s: if it is {interface}, say mh-hook up {interface} --uplink {name}"
                ));
            }
            Self::Down { .. } => return None,
        };
        if links.values().any(Option::is_some) {
            return None;
        }
        let mut uplinks = config.uplinks.iter();
        let (name, _) = uplinks.find(|(_, uplink)| uplink.identity.interface.is_none())?;
        Some(format!(
            "nothing tells whose link {interface} is: if it is {name}'s, say --uplink {name}"
        ))
    }

    /// The interface of an uplink that is known by its address.
    /// Errors: a person says that it is at an interface that does not have the address.
    fn by_address(
        &self,
        name: &UplinkName,
        config: &Config,
        seen: &Seen,
    ) -> Result<Option<IfName>> {
        let identity = &config.uplinks[name].identity;
        let holder = holder(identity, config, seen);
        if let (Self::Up { interface, .. }, Some(address)) = (self, identity.address)
            && holder.as_ref() != Some(interface)
            && self.named(config)?.contains(&name)
        {
            bail!("{interface} does not have {address}, the address of {name}");
        }
        Ok(holder)
    }

    /// Whether the request tells to which uplink the interface belongs now. An ip-down does not: it may be late. An ip-up may
    /// be late as well, after a slow hook; then the interface has another address, and may belong to another uplink.
    fn binds(
        &self,
        bound: &BTreeSet<UplinkName>,
        chosen: &BTreeSet<UplinkName>,
        links: &Links,
    ) -> bool {
        match self {
            Self::Up { .. } | Self::Down { .. } => true,
            Self::Sync => false,
            Self::Event(event) => match event.direction {
                Direction::PreUp => true,
                Direction::Follow | Direction::Down => false,
                Direction::Up => {
                    let link = links.get(event.interface.as_str());
                    let has = |local| link.is_some_and(|link| link.addresses.contains(&local));
                    event.identity.address.is_none_or(has) || bound.is_subset(chosen)
                }
            },
        }
    }

    /// The uplink's link at this interface. None if the uplink should have no entries.
    fn uplink_link(
        &self,
        interface: &IfName,
        uplink: &Uplink,
        config: &Config,
        seen: &Seen,
    ) -> Result<Option<UplinkLink>> {
        let by_hand = match self {
            Self::Down { interface: down } if down == interface => return Ok(None),
            Self::Up { interface: up, .. } => up == interface,
            Self::Down { .. } | Self::Event(_) | Self::Sync => false,
        };
        ensure!(
            !config.lan.interfaces.contains(interface),
            "{interface} is one of the [lan] interfaces, and can't be the uplink's link"
        );
        let link = seen.links.get(interface.as_str());
        if by_hand {
            let link = link.with_context(|| {
                format!("there is no interface {interface}: dial it first, see ip link")
            })?;
            ensure!(
                link.up,
                "{interface} is down: dial it first, or ip link set {interface} up"
            );
        }
        let Some(link) = link else { return Ok(None) };
        let state = match self {
            _ if link.up => LinkState::Up,
            Self::Event(it) if it.direction == Direction::PreUp && it.interface == *interface => {
                LinkState::AboutToBeUp
            }
            _ => return Ok(None),
        };
        let check = |address: &Ipv4Addr| {
            let mut lans = config.lan.interfaces.iter();
            let has = |lan: &IfName| {
                let link = seen.links.get(lan.as_str());
                link.is_some_and(|link| link.addresses.contains(address))
            };
            // An unnumbered link has the address of the router's LAN side (RFC 1812, 2.2.7).
            let networks = match lans.any(has) {
                true => &[][..],
                false => &config.lan.networks,
            };
            check_local(*address, networks).with_context(|| interface.to_string())
        };
        let (addresses, refused): (Vec<Ipv4Addr>, Vec<Ipv4Addr>) =
            link.addresses.iter().partition(|it| check(it).is_ok());
        if let Some(local) = self.local().filter(|_| by_hand)
            && !addresses.contains(&local)
        {
            check(&local).map_err(|error| Refused(format!("{error:#}")))?;
            let all: Vec<String> = link.addresses.iter().map(ToString::to_string).collect();
            let all = if all.is_empty() {
                "none"
            } else {
                &all.join(", ")
            };
            bail!(Refused(format!(
                "{interface} does not have the address {local}, but {all}"
            )));
        }
        ensure!(
            !by_hand || !link.addresses.is_empty(),
            "{interface} has no IPv4 address: is pppd done? see ip address show {interface}"
        );
        let Some(address) = self.address(&addresses, uplink, seen) else {
            return refused
                .first()
                .map_or(Ok(None), |it| check(it).map(|()| None));
        };
        Ok(Some(UplinkLink {
            interface: interface.clone(),
            address,
            addresses,
            state,
            mtu: link.mtu,
        }))
    }

    /// The address that the link goes by. If it has several: the uplink's, or else the one in the call, or else one that has
    /// entries already, or else the first.
    fn address(&self, all: &[Ipv4Addr], uplink: &Uplink, seen: &Seen) -> Option<Ipv4Addr> {
        let table = uplink.routing.as_ref().map(|routing| routing.table);
        let rules = seen.installed.rules.iter();
        let rules = rules.filter(|rule| table.is_some() && rule.table() == table);
        let sources = rules.filter_map(|rule| rule.from).map(|from| from.ip());
        let known = uplink.identity.address.into_iter().chain(self.local());
        let mut preferred = known.chain(sources).chain(all.first().copied());
        preferred.find(|address| all.contains(address))
    }
}

/// The interface of the pppd that was told what an uplink is known by: one that was dialled before there were entries.
fn dialled(identity: &Identity, seen: &Seen) -> Option<IfName> {
    let mut dialled = seen.dialled.iter().filter(|told| identity.matches(told));
    match (dialled.next(), dialled.next()) {
        (Some(told), None) => told.interface.clone(),
        _ => None,
    }
}

/// The uplinks that pppd alone knows, while a link of pppd's is up that nothing is known of: each with such a link.
pub fn unknown(config: &Config, links: &UplinkLinks, seen: &Seen) -> BTreeMap<UplinkName, String> {
    let known = links.values().flatten().map(|link| link.interface.as_str());
    let told = seen
        .dialled
        .iter()
        .filter_map(|told| told.interface.as_ref());
    let known: BTreeSet<&str> = known.chain(told.map(IfName::as_str)).collect();
    let mut others = seen.links.iter().filter(|(name, link)| {
        name.starts_with("ppp") && link.up && !known.contains(name.as_str())
    });
    let Some((other, _)) = others.next() else {
        return BTreeMap::new();
    };
    let is_unknown = |(name, uplink): &(&UplinkName, &Uplink)| {
        let identity = &uplink.identity;
        let interface = identity.interface.as_ref();
        identity.needs_pppd()
            && interface.is_none_or(|own| own.as_str() == other)
            && links.get(*name).is_none_or(Option::is_none)
    };
    let unknown = config.uplinks.iter().filter(is_unknown);
    unknown
        .map(|(name, _)| (name.clone(), other.clone()))
        .collect()
}

/// The interface that has the address by which an uplink is known: not one of the LAN, where an unnumbered link's address is,
/// too.
fn holder(identity: &Identity, config: &Config, seen: &Seen) -> Option<IfName> {
    let address = identity.address?;
    let links = seen.links.iter();
    let mut names = links
        .filter(|(_, link)| link.addresses.contains(&address))
        .filter_map(|(name, _)| IfName::parse(name).ok());
    names.find(|name| may_be(identity, name) && !config.lan.interfaces.contains(name))
}

/// Whether an uplink can have this interface.
fn may_be(identity: &Identity, interface: &IfName) -> bool {
    identity
        .interface
        .as_ref()
        .is_none_or(|own| own == interface)
}

/// What a request needs of the kernel's state to find its links.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// Whose the installed entries are.
    pub owners: &'a Owners,
    pub installed: &'a State,
    pub links: &'a Links,
    /// What the pppds that run were told.
    pub dialled: &'a [Identity],
}
