//! Interfaces as they are now: up or not, addresses, MTU. Read without a process, so that they can be read again after a
//! change.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::kernel::netlink;
use crate::model::names::IfName;

/// How long a link may take from pppd's `ip-pre-up` until it is up: other hooks run there, too.
const PATIENCE: Duration = Duration::from_secs(10);

/// An interface that exists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// `IFF_UP`: pppd sets it when IPCP is through and clears it when the link ends (`sifup`,
    /// `sifdown` in pppd's sys-linux.c).
    pub up: bool,
    /// Its MTU, in bytes, where the kernel tells.
    pub mtu: Option<u32>,
    /// Its IPv4 addresses, in the kernel's order.
    pub addresses: Vec<Ipv4Addr>,
    /// For how long it has had each of them.
    pub ages: Vec<Duration>,
    /// Its own `src_valid_mark` (Documentation/networking/ip-sysctl.rst).
    pub src_valid_mark: bool,
}

/// All interfaces by name.
pub type Links = BTreeMap<String, Link>;

impl Link {
    /// All interfaces by name.
    ///
    /// # Errors
    /// The kernel can't be asked.
    pub fn all() -> Result<Links> {
        // The addresses first: one of an interface that has gone meanwhile has no place then.
        let addresses = netlink::addresses()?;
        let links = netlink::interfaces()?.into_iter().map(|interface| {
            let own = || {
                let mut own = addresses.iter();
                let is_own = move |address: &&netlink::Address| address.index == interface.index;
                std::iter::from_fn(move || own.find(is_own))
            };
            let link = Self {
                up: interface.up,
                mtu: interface.mtu,
                addresses: own().map(|address| address.address).collect(),
                ages: own().map(|address| address.age).collect(),
                src_valid_mark: interface.src_valid_mark,
            };
            (interface.name, link)
        });
        Ok(links.collect())
    }

    /// The interface as it is, or none.
    ///
    /// # Errors
    /// The kernel can't be asked.
    pub fn read(interface: &IfName) -> Result<Option<Self>> {
        Ok(Self::all()?.remove(interface.as_str()))
    }

    /// For how long it has had an address.
    pub fn age(&self, address: Ipv4Addr) -> Option<Duration> {
        let mut both = self.addresses.iter().zip(&self.ages);
        both.find(|(own, _)| **own == address).map(|(_, age)| *age)
    }

    /// Waits until the interface is up, for a while.
    ///
    /// # Errors
    /// The kernel can't be asked.
    pub fn wait(interface: &IfName) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline && !Self::read(interface)?.is_some_and(|link| link.up) {
            sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// The address that entries should be for: the first of `preferred` that it has, else its first.
    pub fn address(&self, preferred: impl IntoIterator<Item = Ipv4Addr>) -> Option<Ipv4Addr> {
        let wanted = preferred
            .into_iter()
            .find(|address| self.addresses.contains(address));
        wanted.or(self.addresses.first().copied())
    }
}
