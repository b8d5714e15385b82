//! What the kernel says of an interface now: up or not, its addresses, its reverse path filter.
//! Read without a process of its own, so that it can be read again after applying.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;

use crate::state::IfName;

/// How long a link may take from pppd's `ip-pre-up` until it is up: other hooks run there, too.
const PATIENCE: Duration = Duration::from_secs(10);

/// An interface that exists.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// `IFF_UP`: pppd sets it when IPCP is through and clears it when the link ends (`sifup`,
    /// `sifdown` in pppd's sys-linux.c).
    pub up: bool,
    /// Its IPv4 addresses, in the kernel's order.
    pub addresses: Vec<Ipv4Addr>,
}

impl Link {
    /// All interfaces by name.
    ///
    /// # Errors
    /// The kernel can't be asked.
    pub fn all() -> Result<BTreeMap<String, Self>> {
        let mut links: BTreeMap<String, Self> = BTreeMap::new();
        for entry in getifaddrs().context("list interfaces (getifaddrs)")? {
            // An address carries its label, which can be NAME:ALIAS (ip-address(8), label).
            let name = entry.interface_name.split(':').next().unwrap_or_default();
            let link = links.entry(name.to_owned()).or_default();
            link.up |= entry.flags.contains(InterfaceFlags::IFF_UP);
            if let Some(address) = entry
                .address
                .as_ref()
                .and_then(|address| address.as_sockaddr_in())
            {
                link.addresses.push(address.ip());
            }
        }
        Ok(links)
    }

    /// The interface as it is, or none.
    ///
    /// # Errors
    /// The kernel can't be asked.
    pub fn read(interface: &IfName) -> Result<Option<Self>> {
        Ok(Self::all()?.remove(interface.as_str()))
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

/// `rp_filter` of an interface, or of `all`: 0 off, 1 strict, 2 loose; none where there is no
/// such interface (Documentation/networking/ip-sysctl.rst).
///
/// # Errors
/// It is there and can't be read.
pub fn rp_filter(interface: &str) -> Result<Option<u8>> {
    let path = rp_filter_path(interface);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(
            text.trim()
                .parse()
                .with_context(|| format!("read {path}: {text:?}"))?,
        )),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read {path}")),
    }
}

/// The file of that value. An interface's name may hold dots but no slash.
pub fn rp_filter_path(interface: &str) -> String {
    format!("/proc/sys/net/ipv4/conf/{interface}/rp_filter")
}
