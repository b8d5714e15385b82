//! What the kernel holds, as the tools print it, parted into ours and everybody else's.

use std::collections::BTreeSet;

/// What `ip` and `iptables-save` print, line by line. A line of iptables has its table's name ahead.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// Ours: `rule …`, `route …`, `nat …`.
    pub ours: Vec<String>,
    /// The others', in the kernel's order.
    pub foreign: Vec<String>,
}

impl Listing {
    /// The listing of `ip rule` and `ip route show table all`, and of `iptables-save`. An empty chain of which nothing but
    /// its name tells whose it is, and that no configured uplink claims, is nobody's, and left out.
    pub fn parse(ip: &str, save: &str, configured: &BTreeSet<&str>) -> Self {
        let mut listing = Self::default();
        for line in ip.lines() {
            let kind = if line.contains(":\t") {
                "rule"
            } else {
                "route"
            };
            // Said of an interface that does not exist now: no difference of the entry.
            let line = line.replace(" [detached]", "");
            let line = format!("{kind} {}", line.trim_end());
            let words: Vec<&str> = line.split(' ').collect();
            let is_ours = words.windows(2).any(|pair| pair == ["proto", "109"]);
            listing.push(is_ours, line);
        }
        let mut table = "";
        for line in save.lines() {
            if let Some(name) = line.strip_prefix('*') {
                table = name;
            } else if let Some(chain) = line.strip_prefix(':') {
                let mut words = chain.split(' ');
                let (name, policy) = (words.next(), words.next());
                // A built-in chain at rest may come into being with any call of the tools.
                if let (Some(name), Some(policy)) = (name, policy)
                    && policy != "ACCEPT"
                {
                    let line = format!("{table} :{name} {policy}");
                    listing.push(owner(&line).is_some(), line);
                }
            } else if line.starts_with('-') {
                let line = format!("{table} {line}");
                listing.push(owner(&line).is_some(), line);
            }
        }
        let named: BTreeSet<String> = listing
            .ours
            .iter()
            .filter(|line| !line.contains(" :"))
            .filter_map(|line| owner(line))
            .map(str::to_owned)
            .collect();
        listing.ours.retain(|line| {
            let chain = line.split_once(" :").and_then(|_| owner(line));
            chain.is_none_or(|name| named.contains(name) || configured.contains(name))
        });
        listing.ours = sorted(listing.ours);
        listing
    }

    fn push(&mut self, is_ours: bool, line: String) {
        let lines = if is_ours {
            &mut self.ours
        } else {
            &mut self.foreign
        };
        lines.push(line);
    }
}

/// In an order that does not depend on who came first. Within a chain of ours the order counts, and stays.
pub fn sorted(mut lines: Vec<String>) -> Vec<String> {
    lines.sort_by_key(|line| {
        let words: Vec<&str> = line.split(' ').take(3).collect();
        match words[..] {
            [table, "-A", chain] if chain.starts_with("mh-") => format!("{table} -A {chain}"),
            _ => line.clone(),
        }
    });
    lines
}

/// Whether this is a line of iptables, and not of `ip`.
pub fn is_iptables(line: &str) -> bool {
    !line.starts_with("rule ") && !line.starts_with("route ")
}

/// The uplink whose line of iptables this is: it stands in a chain `mh-NAME` of the tables mangle or nat, or jumps to one, or
/// has that name for its comment, and is of a kind that mh-hook writes.
pub fn owner(line: &str) -> Option<&str> {
    if !is_iptables(line) {
        return None;
    }
    let words: Vec<&str> = line.split(' ').collect();
    let has_chains = words[0] != "filter";
    if let Some(chain) = words[1].strip_prefix(':') {
        return uplink(chain).filter(|_| has_chains);
    }
    let pairs = words.windows(2);
    pairs.into_iter().find_map(|pair| match pair[0] {
        "-A" | "-j" | "-g" => uplink(pair[1]).filter(|_| has_chains),
        "--comment" => uplink(pair[1]).filter(|_| is_written(line)),
        _ => None,
    })
}

/// Of rules with our comments, those that mh-hook writes: it masquerades named sources, and accepts what has been forwarded.
fn is_written(line: &str) -> bool {
    match value(line, "-j") {
        Some("MASQUERADE") => value(line, "-s").is_some(),
        Some("ACCEPT") => value(line, "--ctstate") == Some("DNAT"),
        Some("CONNMARK" | "TCPMSS") => true,
        _ => false,
    }
}

/// `isp0` of `mh-isp0`; names have small letters, digits and two signs.
fn uplink(text: &str) -> Option<&str> {
    let name = text.strip_prefix("mh-")?;
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
    (!name.is_empty() && name.len() <= 16 && name.chars().all(fits)).then_some(name)
}

/// The word behind `key`.
pub fn value<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let mut words = line.split(['\t', ' ']);
    words.find(|word| *word == key)?;
    words.next()
}

/// The routing table of a rule or route of ours.
pub fn table(line: &str) -> &str {
    let key = if line.starts_with("rule ") {
        "lookup"
    } else {
        "table"
    };
    value(line, key).unwrap_or("main")
}
