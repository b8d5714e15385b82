//! All that stands in iptables, everybody's, as `iptables-save -c` prints it. Pure.

use std::collections::BTreeMap;

use crate::iptables;

/// The tables of one backend, by name.
#[derive(Clone, Debug, Default)]
pub struct Ruleset {
    /// Each table's chains, by name.
    pub tables: BTreeMap<String, BTreeMap<String, Chain>>,
}

/// A chain.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// What becomes of a packet at its end; none for a chain that somebody made.
    pub policy: Option<String>,
    /// Its rules, in order.
    pub rules: Vec<Rule>,
}

/// A rule with its counters.
#[derive(Clone, Debug)]
pub struct Rule {
    /// The packets that have matched it.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Matches and target, word by word.
    pub words: Vec<String>,
}

impl Rule {
    /// The rule as iptables-save writes it behind `-A CHAIN`.
    pub fn spec(&self) -> String {
        iptables::join(&self.words)
    }

    /// The word behind `option`.
    pub fn value(&self, option: &str) -> Option<&str> {
        let index = self.words.iter().position(|word| word == option)?;
        self.words.get(index + 1).map(String::as_str)
    }
}

impl Ruleset {
    /// What `iptables-save -c` prints. iptables-nft-save can print rules that are not iptables' own in
    /// any form; what can't be read is left out.
    pub fn parse(save: &str) -> Self {
        let mut ruleset = Self::default();
        let mut table = String::new();
        for line in iptables::lines(save) {
            if let Some(name) = line.strip_prefix('*') {
                name.clone_into(&mut table);
                ruleset.tables.entry(table.clone()).or_default();
            } else if let Some(declared) = line.strip_prefix(':') {
                let mut words = declared.split(' ');
                let name = words.next().unwrap_or_default().to_owned();
                let policy = words.next().filter(|policy| *policy != "-");
                let chains = ruleset.tables.entry(table.clone()).or_default();
                chains.entry(name).or_default().policy = policy.map(str::to_owned);
            } else if let Some((chain, rule)) = rule(&line) {
                let chains = ruleset.tables.entry(table.clone()).or_default();
                chains.entry(chain).or_default().rules.push(rule);
            }
        }
        ruleset
    }

    /// A chain.
    pub fn chain(&self, table: &str, chain: &str) -> Option<&Chain> {
        self.tables.get(table)?.get(chain)
    }

    /// Whether nobody has made a rule or a chain, or set a policy.
    pub fn is_empty(&self) -> bool {
        let mut chains = self.tables.values().flat_map(BTreeMap::values);
        chains.all(|chain| chain.rules.is_empty() && chain.policy.as_deref() == Some("ACCEPT"))
    }
}

/// `[12:720] -A PREROUTING -i ppp0 -j mh-isp0`
fn rule(line: &str) -> Option<(String, Rule)> {
    let (counters, rest) = line.strip_prefix('[')?.split_once("] -A ")?;
    let (packets, bytes) = counters.split_once(':')?;
    let (chain, spec) = rest.split_once(' ').unwrap_or((rest, ""));
    let rule = Rule {
        packets: packets.parse().ok()?,
        bytes: bytes.parse().ok()?,
        words: iptables::words(spec).ok()?,
    };
    Some((chain.to_owned(), rule))
}
