//! Parses the output of `ip route get`, and what `ip -batch` prints on failure.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Result, ensure};

use crate::kernel::root::Root;
use crate::model::route::TableId;

/// The route that the kernel takes for a packet, as `ip route get` prints it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteLookup {
    /// Whether the packet is delivered to the router itself.
    pub is_local: bool,
    pub dev: String,
    /// The gateway. None if the destination is on the link.
    pub via: Option<String>,
    /// The routing table that the route is in.
    pub table: Option<TableId>,
    /// The source address that the kernel would choose.
    pub source: Option<Ipv4Addr>,
}

/// Parses `192.0.2.9 from 192.168.0.2 dev ppp0 table 10 mark 0xa`, `local 203.0.113.10 dev lo table 255 …`
/// Errors: it has no output interface.
pub fn route_lookup(text: &str) -> Result<RouteLookup> {
    let line = text.lines().next().unwrap_or_default();
    let mut lookup = RouteLookup::default();
    let flags = ["linkdown", "dead", "onlink", "offload", "trap"];
    let words = line.split_ascii_whitespace();
    let mut words = words.filter(|word| !flags.contains(word)).peekable();
    let is_local = words.next_if(|word| ["local", "2", "broadcast", "3"].contains(word));
    lookup.is_local = is_local.is_some();
    words.next();
    // Keys and values alternate: an interface may have the name "via".
    while let Some((key, value)) = words.next().zip(words.next()) {
        match key {
            "dev" => lookup.dev = value.to_owned(),
            "via" => lookup.via = Some(value.to_owned()),
            "table" => lookup.table = value.parse().ok().map(TableId),
            "src" => lookup.source = value.parse().ok(),
            _ => {}
        }
    }
    ensure!(
        !lookup.dev.is_empty(),
        "read what ip route get prints: {line:?}"
    );
    Ok(lookup)
}

/// Why `ip` would take one of these numbers for another one: it looks for a name first (`rtnl_rttable_a2n`, lib/rt_names.c),
/// and a name can be a number. `file` is rt_tables or rt_protos.
pub fn misread(root: &Root, file: &str, numbers: &BTreeSet<u32>) -> Option<String> {
    let files = ["/etc/iproute2", "/usr/share/iproute2"]
        .into_iter()
        .flat_map(|folder| {
            let path = Path::new(folder).join(file);
            let more = root.list(path.with_extension("d"));
            [path].into_iter().chain(more)
        });
    let names: BTreeSet<String> = numbers.iter().map(u32::to_string).collect();
    for path in files {
        let text = root.read(&path).unwrap_or_default();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let mut words = line.split_ascii_whitespace();
            if let (Some(id), Some(name)) = (words.next(), words.next())
                && id != name
                && names.contains(name)
            {
                let path = path.display();
                return Some(format!(
                    "{path} gives {id} the name {name}, which ip takes for {id}: give it another name"
                ));
            }
        }
    }
    None
}

/// The lines of a batch that failed, counted from 1, each with the error that `ip` printed for it. An error that no line
/// number follows has line 0.
pub fn failures(stderr: &str) -> Vec<(usize, String)> {
    let mut failures = Vec::new();
    let mut words = Vec::new();
    for line in stderr.lines() {
        let number = line.strip_prefix("Command failed -:");
        match number.and_then(|number| number.trim().parse().ok()) {
            Some(number) => failures.push((number, std::mem::take(&mut words).join(" "))),
            None => words.push(line.trim()),
        }
    }
    if !words.is_empty() {
        failures.push((0, words.join(" ")));
    }
    failures
}
