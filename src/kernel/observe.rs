//! Reads all of the kernel's state that matters, everybody's entries: ip rules, routes and links by netlink, iptables
//! rules by iptables-save.

use std::fs;
use std::path::Path;

use anyhow::Result;

use crate::kernel::iptables_save::Ruleset;
use crate::kernel::link::{Link, Links};
use crate::kernel::netlink;
use crate::kernel::process::Process;
use crate::kernel::routing::{RoutingDump, Whose};
use crate::kernel::tools::Backend;
use crate::model::link::Identity;

/// The kernel's state, read at about one instant.
#[derive(Clone, Debug, Default)]
pub struct Kernel {
    pub routing: RoutingDump,
    /// The iptables tables of the backend in use.
    pub ruleset: Ruleset,
    pub links: Links,
    /// What the pppds that run were told, where that was asked for.
    pub dialled: Vec<Identity>,
}

impl Kernel {
    /// Reads the kernel's state; asks netlink while iptables-save runs.
    /// Errors: a netlink dump or iptables-save fails, or prints what can't be parsed.
    pub fn read(save: Process, whose: Whose) -> Result<Self> {
        Ok(Self {
            routing: RoutingDump::read(whose)?,
            links: Link::all()?,
            dialled: Vec::new(),
            ruleset: Ruleset::read(save)?,
        })
    }
}

/// Whether a backend may have iptables rules. Does not run iptables-save, which would create the tables that are
/// missing.
pub fn has_tables(backend: Backend) -> bool {
    match backend {
        // One table a line. There is no such file unless the kernel has the legacy backend.
        Backend::Legacy => {
            fs::read("/proc/net/ip_tables_names").is_ok_and(|names| !names.is_empty())
        }
        Backend::Nft => !is_unloaded("nf_tables") && netlink::nft_tables().unwrap_or(false),
    }
}

/// Whether a part of netfilter is a module that is not loaded. A netlink request would load it.
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
