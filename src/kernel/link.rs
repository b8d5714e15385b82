//! Interfaces: up or down, addresses, MTU, `src_valid_mark`. Spawns no process, since they are read again after each
//! change.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::libc::{IFA_CACHEINFO, IFA_LOCAL, RTM_GETADDR, RTM_GETLINK, RTM_NEWADDR, RTM_NEWLINK};
use nix::sys::socket::{AddressFamily, SockProtocol};
use nix::time::{ClockId, clock_gettime};

use crate::kernel::netlink::{attribute, dump, ipv4, text, u32_at};
use crate::model::names::IfName;

// linux/if.h, if_link.h
const IFF_UP: u32 = 1;
/// The bytes of an `ifinfomsg`: family, type, index, flags, change.
const INTERFACE: usize = 16;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET_CONF: u16 = 1;

// linux/ip.h
/// The index of `src_valid_mark` among the parameters in `IFLA_INET_CONF`, from 0: `IPV4_DEVCONF_SRC_VMARK` - 1.
const SRC_VMARK: usize = 23;

// linux/if_addr.h
/// The bytes of an `ifaddrmsg`: family, prefix length, flags, scope, interface index.
const ADDRESS: usize = 8;

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
        let protocol = SockProtocol::NetlinkRoute;
        // The addresses first: those of an interface that is deleted meanwhile are then left out.
        let addresses = dump(protocol, [RTM_GETADDR, RTM_NEWADDR], &mut [0; ADDRESS])
            .context("ask for the addresses (netlink)")?;
        // The kernel's timestamps count jiffies, which follow this clock (`cstamp_delta`, net/ipv4/devinet.c).
        let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
        let interfaces = dump(protocol, [RTM_GETLINK, RTM_NEWLINK], &mut [0; INTERFACE])
            .context("ask for the interfaces (netlink)")?;
        let mut links: BTreeMap<u32, (String, Self)> =
            interfaces.iter().filter_map(|body| link(body)).collect();
        for (index, address, age) in addresses.iter().filter_map(|body| self::address(body, now)) {
            if let Some((_, link)) = links.get_mut(&index) {
                link.addresses.push(address);
                link.ages.push(age);
            }
        }
        Ok(links.into_values().collect())
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

/// An interface's index, name and link, without addresses.
fn link(body: &[u8]) -> Option<(u32, (String, Link))> {
    let conf = attribute(body, INTERFACE, IFLA_AF_SPEC)
        .and_then(|families| attribute(families, 0, AddressFamily::Inet as u16))
        .and_then(|inet| attribute(inet, 0, IFLA_INET_CONF));
    let src_valid_mark = conf.and_then(|values| u32_at(values, SRC_VMARK * 4));
    let link = Link {
        up: u32_at(body, 8)? & IFF_UP != 0,
        mtu: attribute(body, INTERFACE, IFLA_MTU).and_then(|mtu| u32_at(mtu, 0)),
        src_valid_mark: src_valid_mark.is_some_and(|value| value != 0),
        ..Link::default()
    };
    let name = text(attribute(body, INTERFACE, IFLA_IFNAME)?);
    Some((u32_at(body, 4)?, (name, link)))
}

/// An address, its interface's index and its age. The address's label, which getifaddrs(3) returns as the interface's
/// name, need not be it.
fn address(body: &[u8], now: Duration) -> Option<(u32, Ipv4Addr, Duration)> {
    let address = ipv4(attribute(body, ADDRESS, IFA_LOCAL)?)?;
    // `ifa_cacheinfo`: preferred and valid lifetime, then when it was added (`cstamp`) and changed, in hundredths of a
    // second since boot.
    let times = attribute(body, ADDRESS, IFA_CACHEINFO)?;
    Some((u32_at(body, 4)?, address, age(now, u32_at(times, 8)?)))
}

/// The time since a timestamp of 32 bits, which wraps around after 497 days.
fn age(now: Duration, stamp: u32) -> Duration {
    let now = now.as_millis() / 10 % (1 << 32);
    let now = u32::try_from(now).expect("it has 32 bits");
    let passed = now.wrapping_sub(stamp);
    // Rounding can put the timestamp a little after now.
    let passed = if passed > u32::MAX - 100 { 0 } else { passed };
    Duration::from_millis(u64::from(passed) * 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_age_of_an_address_is_right_after_the_timestamp_wraps_around() {
        let hundredths = |count: u64| Duration::from_millis(count * 10);
        assert_eq!(age(hundredths(5000), 2000), hundredths(3000));
        let now = hundredths((1 << 32) + 700);
        assert_eq!(age(now, u32::MAX - 299), hundredths(1000));
        assert_eq!(age(hundredths(5000), 5001), Duration::ZERO);
    }
}
