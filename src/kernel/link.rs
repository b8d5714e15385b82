//! Interfaces: up or down, addresses, MTU, `src_valid_mark`. Spawns no process, since they are read again after each
//! change.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::kernel::netlink;
use crate::model::names::IfName;

/// How long a link may take from pppd's `ip-pre-up` until it is up. All hooks in ip-pre-up.d run in that time.
const UP_LIMIT: Duration = Duration::from_secs(10);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// `IFF_UP`: pppd sets it when IPCP has finished, and clears it when the link ends (`sifup`,
    /// `sifdown` in pppd's sys-linux.c).
    pub up: bool,
    pub mtu: Option<u32>,
    /// The IPv4 addresses, in the kernel's order.
    pub addresses: Vec<Ipv4Addr>,
    /// How long ago each of the addresses was added.
    pub ages: Vec<Duration>,
    /// The interface's own `src_valid_mark` (Documentation/networking/ip-sysctl.rst).
    pub src_valid_mark: bool,
}

pub type Links = BTreeMap<String, Link>;

impl Link {
    /// Reads all interfaces.
    /// Errors: the netlink dump fails.
    pub fn all() -> Result<Links> {
        // The addresses first: those of an interface that is deleted meanwhile are then left out.
        let addresses = netlink::addresses()?;
        let links = netlink::interfaces()?.into_iter().map(|interface| {
            let own = addresses.iter();
            let own = own.filter(|address| address.index == interface.index);
            let link = Self {
                up: interface.up,
                mtu: interface.mtu,
                addresses: own.clone().map(|address| address.address).collect(),
                ages: own.map(|address| address.age).collect(),
                src_valid_mark: interface.src_valid_mark,
            };
            (interface.name, link)
        });
        Ok(links.collect())
    }

    /// Reads the interface. None if there is no such interface.
    /// Errors: the netlink dump fails.
    pub fn read(interface: &IfName) -> Result<Option<Self>> {
        Ok(Self::all()?.remove(interface.as_str()))
    }

    /// How long ago this address was added. None if the interface does not have it.
    pub fn age(&self, address: Ipv4Addr) -> Option<Duration> {
        let mut both = self.addresses.iter().zip(&self.ages);
        both.find(|(own, _)| **own == address).map(|(_, age)| *age)
    }

    /// Waits until the interface is up, or [`UP_LIMIT`] has passed.
    /// Errors: the netlink dump fails.
    pub fn wait(interface: &IfName) -> Result<()> {
        let deadline = Instant::now() + UP_LIMIT;
        while Instant::now() < deadline && !Self::read(interface)?.is_some_and(|link| link.up) {
            sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}
