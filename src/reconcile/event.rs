//! Parses a call by pppd, arguments and environment, into an [`Event`]. No other file reads the environment.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context, Result};

use crate::config::{Config, Identity, Uplink};
use crate::model::names::{IfName, UplinkName};

/// Which of pppd's scripts makes the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// `ip-pre-up`: the interface has its address, but carries nothing yet; pppd waits for its hooks.
    PreUp,
    /// Our own call, shortly after `ip-pre-up`: pppd runs `ip-pre-up` each time that a link comes up, but does not run
    /// `ip-up` while an earlier one is still running (`ipcp_script_done`, pppd/ipcp.c).
    Follow,
    Up,
    Down,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PreUp => "pre-up",
            Self::Follow => "follow",
            Self::Up => "up",
            Self::Down => "down",
        })
    }
}

impl Direction {
    const ALL: [Self; 4] = [Self::PreUp, Self::Follow, Self::Up, Self::Down];

    /// The direction that an argument names.
    pub fn parse(text: &OsStr) -> Option<Self> {
        let mut all = Self::ALL.into_iter();
        all.find(|direction| text == direction.to_string().as_str())
    }

    /// The direction that the folder of the called program names: the program may stand, or be
    /// linked, in /etc/ppp/ip-up.d and its kin under any name that run-parts takes.
    pub fn from_folder(program: &Path) -> Option<Self> {
        match program.parent()?.file_name()?.to_str()? {
            "ip-pre-up.d" => Some(Self::PreUp),
            "ip-up.d" => Some(Self::Up),
            "ip-down.d" => Some(Self::Down),
            _ => None,
        }
    }
}

/// One call by pppd. It only triggers a look at the interface; the kernel's state decides, since pppd omits calls and makes
/// late ones.
#[derive(Debug, PartialEq, Eq)]
pub struct Event {
    pub direction: Direction,
    pub interface: IfName,
    /// By what the call can be matched with an uplink. Its address is the one that pppd gave the interface, which may have
    /// others.
    pub identity: Identity,
}

impl Event {
    /// The event in the arguments that pppd gives its scripts (`pppd(8)`, SCRIPTS): interface, tty,
    /// speed, local address, remote address, ipparam; `LINKNAME` and `CALL_FILE` come in the
    /// environment. The interface argument is always there; the environment fills in for those who
    /// call with less.
    /// Errors: there is no interface name, or not a valid one; or, when the link comes up, the address is not valid. When the link
    /// goes down, the address is ignored: it must not prevent the removal.
    pub fn from_pppd(direction: Direction, args: &[OsString]) -> Result<Self> {
        let arg = |index: usize| args.get(index).filter(|arg| !arg.is_empty());
        let interface = match arg(0) {
            Some(arg) => IfName::parse(&arg.to_string_lossy())?,
            None => interface_from_environment()?,
        };
        let local = match direction {
            Direction::Down => None,
            Direction::PreUp | Direction::Follow | Direction::Up => match local_from_environment()?
            {
                Some(local) => Some(local),
                None => arg(3).map(|arg| address(arg)).transpose()?,
            },
        };
        // Debian's ip-up repeats the sixth argument as PPP_IPPARAM, and hands it on only where the
        // hook is run with all of them.
        let ipparam = arg(5).cloned();
        let text = |value: Option<OsString>| Some(value?.to_string_lossy().into_owned());
        let identity = Identity {
            interface: Some(interface.clone()),
            ipparam: text(ipparam.or_else(|| variable("PPP_IPPARAM"))),
            linkname: text(variable("LINKNAME")),
            peer: text(variable("CALL_FILE")),
            address: local,
        };
        Ok(Self {
            direction,
            interface,
            identity,
        })
    }
}

impl Event {
    /// Why the link is not the uplink that it looks like: it has come with another address than the uplink's.
    pub fn other_address(&self, config: &Config) -> Option<String> {
        let is_other = |(_, uplink): &(&UplinkName, &Uplink)| {
            let mut identity = uplink.identity.clone();
            let address = identity.address.take();
            identity != Identity::default()
                && identity.matches(&self.identity)
                && address.is_some()
                && address != self.identity.address
        };
        let (name, uplink) = config.uplinks.iter().find(is_other)?;
        let (local, own) = self.identity.address.zip(uplink.identity.address)?;
        Some(format!(
            "{} has come up with the address {local}, so it is not {name}, whose address is {own}",
            self.interface
        ))
    }
}

/// pppd's `IFNAME`.
/// Errors: it is missing, or not a valid name.
pub fn interface_from_environment() -> Result<IfName> {
    let name =
        variable("IFNAME").context("no interface: give its name, or IFNAME in the environment")?;
    IfName::parse(&name.to_string_lossy()).context("IFNAME")
}

/// pppd's `IPLOCAL`, if it is set.
/// Errors: it is no IPv4 address.
pub fn local_from_environment() -> Result<Option<Ipv4Addr>> {
    variable("IPLOCAL")
        .map(|text| address(&text).context("IPLOCAL"))
        .transpose()
}

/// A strict dotted quad.
/// Errors: it is something else.
pub fn address(text: &OsStr) -> Result<Ipv4Addr> {
    let text = text.to_string_lossy();
    // A hostile variable can be long: show its beginning only.
    let shown: String = text.chars().take(40).collect();
    text.parse()
        .ok()
        .with_context(|| format!("{shown:?} is not an IPv4 address"))
}

fn variable(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}
