//! What stands in the kernel of ours: one process, whatever there is.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::Result;

use crate::command::{Backend, Counters, Tools};
use crate::running::Running;
use crate::state::{Loose, State, Table};
use crate::{claim, fib, iptables, link, netlink};

/// All entries of ours: `save` is what prints the tables.
///
/// # Errors
/// The kernel can't be asked, a tool fails, or one says what can't be read.
pub fn observe(save: Running) -> Result<State> {
    let (rules, routes) = (fib::rules()?, fib::routes()?);
    let tables = save.read_by(iptables::parse)?;
    let mut loose = BTreeSet::new();
    for ((table, uplink), share) in &tables {
        let note = share.rules().find_map(iptables::parse_loose_note);
        if let Some((before, interface)) = note.zip(claim::interfaces(share).next())
            && *table == Table::Mangle
            && link::rp_filter(interface.as_str())? == Some(2)
        {
            // Another value is another's doing, and not ours to put back.
            loose.insert(Loose {
                uplink: uplink.clone(),
                interface,
                before,
            });
        }
    }
    Ok(State {
        routes,
        rules,
        tables,
        loose,
    })
}

/// What stands of ours in one backend of iptables, by its tools.
///
/// # Errors
/// The tool fails, or says what can't be read.
pub fn in_backend(tools: &Tools) -> Result<State> {
    Ok(State {
        tables: tools
            .iptables_save(Counters::Hidden)?
            .read_by(iptables::parse)?,
        ..State::default()
    })
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
