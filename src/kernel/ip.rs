//! What `ip` answers: where the kernel sends a packet, and which lines of a batch have failed.

use std::net::Ipv4Addr;

use anyhow::{Result, ensure};

use crate::model::route::TableId;

/// Where the kernel sends a packet: the answer to `ip route get`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteLookup {
    /// Whether the router keeps it for itself.
    pub is_local: bool,
    /// The link it leaves by.
    pub dev: String,
    /// The next router; none where the destination is on the link.
    pub via: Option<String>,
    /// The table that decided.
    pub table: Option<TableId>,
    /// The source that the kernel would choose.
    pub source: Option<Ipv4Addr>,
}

/// `192.0.2.9 from 192.168.0.2 dev ppp0 table 10 mark 0xa`, `local 203.0.113.10 dev lo table 255 …`
///
/// # Errors
/// It names no link.
pub fn route_lookup(text: &str) -> Result<RouteLookup> {
    let line = text.lines().next().unwrap_or_default();
    let mut lookup = RouteLookup::default();
    let is_flag =
        |word: &&str| matches!(*word, "linkdown" | "dead" | "onlink" | "offload" | "trap");
    let mut words = line
        .split_ascii_whitespace()
        .filter(|word| !is_flag(word))
        .peekable();
    lookup.is_local = words
        .next_if(|word| matches!(*word, "local" | "2" | "broadcast" | "3"))
        .is_some();
    words.next();
    // Words and values in turn: a link may be called via, too.
    while let Some((word, value)) = words.next().zip(words.next()) {
        match word {
            "dev" => lookup.dev = value.to_owned(),
            "via" => lookup.via = Some(value.to_owned()),
            "table" => lookup.table = value.parse().ok().map(TableId),
            "src" => lookup.source = value.parse().ok(),
            _ => {}
        }
    }
    ensure!(
        !lookup.dev.is_empty(),
        "read what ip route get answers: {line:?}"
    );
    Ok(lookup)
}

/// The batch lines that failed, numbered from 1, each with ip's words ahead of it. Words that no
/// line follows belong to line 0.
pub fn failures(stderr: &str) -> Vec<(usize, String)> {
    let mut failures = Vec::new();
    let mut words = Vec::new();
    for line in stderr.lines() {
        match line
            .strip_prefix("Command failed -:")
            .and_then(|number| number.trim().parse().ok())
        {
            Some(number) => failures.push((number, std::mem::take(&mut words).join(" "))),
            None => words.push(line.trim()),
        }
    }
    if !words.is_empty() {
        failures.push((0, words.join(" ")));
    }
    failures
}
