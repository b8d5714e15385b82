//! What the kernel holds, everybody's: rules, routes and links by netlink, iptables by iptables-save.

use std::fs;
use std::path::Path;

use anyhow::Result;

use crate::kernel::iptables_save::Ruleset;
use crate::kernel::link::{Link, Links};
use crate::kernel::netlink;
use crate::kernel::routing::{RoutingDump, Whose};
use crate::kernel::tools::{Backend, Counters, Tools};

/// What the kernel holds at one instant.
#[derive(Clone, Debug, Default)]
pub struct Kernel {
    /// Rules and routes.
    pub routing: RoutingDump,
    /// The tables of iptables, of the backend in use.
    pub ruleset: Ruleset,
    /// The interfaces.
    pub links: Links,
}

impl Kernel {
    /// Reads it, while iptables-save lists.
    ///
    /// # Errors
    /// The kernel can't be asked, a tool fails, or one of them says what can't be read.
    pub fn read(tools: &Tools, whose: Whose, counters: Counters) -> Result<Self> {
        let save = tools.iptables_save(counters)?;
        Ok(Self {
            routing: RoutingDump::read(whose)?,
            links: Link::all()?,
            ruleset: Ruleset::parse(&save.answer()?)?,
        })
    }
}

/// Whether a backend may have entries: without asking its tool, which would cost a process, and make
/// tables where there are none.
pub fn has_tables(backend: Backend) -> bool {
    match backend {
        // One name a line, empty without any; missing where the kernel has no legacy backend.
        Backend::Legacy => {
            fs::read("/proc/net/ip_tables_names").is_ok_and(|names| !names.is_empty())
        }
        Backend::Nft => !is_unloaded("nf_tables") && netlink::nft_tables().unwrap_or(false),
    }
}

/// Whether a part of netfilter is a module that nobody has needed yet: asking it would load it.
fn is_unloaded(module: &str) -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let path = format!(
        "/lib/modules/{}/kernel/net/netfilter/{module}.ko",
        release.trim()
    );
    let mut endings = ["", ".xz", ".zst", ".gz"].iter();
    !Path::new("/sys/module").join(module).exists()
        && endings.any(|ending| Path::new(&format!("{path}{ending}")).exists())
}
