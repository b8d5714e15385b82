//! The one parser of iptables-save: everybody's rules. Ours are a filter of them (`reconcile::ownership`).

use std::collections::{BTreeMap, BTreeSet};
use std::io::BufRead;
use std::rc::Rc;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::model::netfilter::{Rule, Rules, is_before_name};

/// The tables of one backend.
#[derive(Clone, Debug, Default)]
pub struct Ruleset {
    /// Each table's chains, by name.
    pub tables: BTreeMap<String, BTreeMap<String, Chain>>,
    /// Tables that are not listed, because a rule in them is not one of iptables: what they hold is not known.
    pub incompatible: BTreeSet<String>,
}

/// A chain.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// What becomes of a packet at its end; none for a chain that somebody made.
    pub policy: Option<String>,
    /// Its rules, in order.
    pub rules: Rules,
    /// What each of the rules has counted, in the same order.
    pub counters: Vec<Counter>,
}

/// Packets that a rule has matched; 0 where iptables-save was not asked for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    /// The packets.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Counter {
    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            packets: self.packets + other.packets,
            bytes: self.bytes + other.bytes,
        }
    }
}

impl Ruleset {
    /// What `iptables-save`, or `iptables-save -c`, prints.
    ///
    /// # Errors
    /// It can't be read, has a line that iptables-save does not print, or is cut short.
    pub fn parse(save: &mut dyn BufRead) -> Result<Self> {
        let mut ruleset = Self::default();
        let mut table: Option<String> = None;
        let mut bytes = Vec::new();
        while next_line(save, &mut bytes)? {
            // Names of interfaces can hold any byte.
            let line = String::from_utf8_lossy(&bytes);
            if line.is_empty() || line.starts_with('#') {
                ruleset.incompatible.extend(incompatible(&line));
                continue;
            }
            let read = match (&table, line.strip_prefix('*')) {
                (None, Some(name)) => {
                    ruleset.tables.entry(name.to_owned()).or_default();
                    table = Some(name.to_owned());
                    Ok(())
                }
                (Some(_), None) if line == "COMMIT" => {
                    table = None;
                    Ok(())
                }
                (Some(name), None) => {
                    let chains = ruleset.tables.get_mut(name);
                    add(&line, chains.expect("its first line made it"))
                }
                _ => Err(anyhow!("it is no line of iptables-save")),
            };
            read.with_context(|| {
                let shown: String = line.chars().take(200).collect();
                format!("read what iptables-save prints: {shown:?}")
            })?;
        }
        ensure!(
            table.is_none(),
            "iptables-save ended in the middle of a table"
        );
        Ok(ruleset)
    }

    /// A chain.
    pub fn chain(&self, table: &str, chain: &str) -> Option<&Chain> {
        self.tables.get(table)?.get(chain)
    }

    /// Whether nobody has made a rule or a chain, or set a policy, as far as it is listed.
    pub fn is_empty(&self) -> bool {
        let mut chains = self.tables.values().flat_map(BTreeMap::values);
        self.incompatible.is_empty()
            && chains
                .all(|chain| chain.rules.is_empty() && chain.policy.as_deref() == Some("ACCEPT"))
    }
}

/// ``# Table `nat' is incompatible, use 'nft' tool.`` (`nft_is_table_compatible`, iptables/nft.c). Chains that are not
/// iptables' own ("incompatible base-chains") do no harm: the others of the table are listed.
fn incompatible(comment: &str) -> Option<String> {
    let (name, rest) = comment.strip_prefix("# Table `")?.split_once('\'')?;
    rest.starts_with(" is incompatible")
        .then(|| name.to_owned())
}

/// Adds what a line of a table says: `:PREROUTING ACCEPT [0:0]`, `:mh-isp0 - [0:0]`,
/// `[12:720] -A PREROUTING -i ppp0 -j mh-isp0`.
fn add(line: &str, chains: &mut BTreeMap<String, Chain>) -> Result<()> {
    if let Some(declared) = line.strip_prefix(':') {
        let mut words = declared.split(' ');
        let name = words.next().unwrap_or_default();
        let policy = words.next().filter(|policy| *policy != "-");
        chains.entry(name.to_owned()).or_default().policy = policy.map(str::to_owned);
        return Ok(());
    }
    let (counter, rest) = match line.strip_prefix('[') {
        Some(rest) => {
            let (counter, rest) = rest.split_once("] ").context("its counters have no end")?;
            let (packets, bytes) = counter.split_once(':').context("it has one counter")?;
            let counter = Counter {
                packets: packets.parse()?,
                bytes: bytes.parse()?,
            };
            (counter, rest)
        }
        None => (Counter::default(), line),
    };
    let Some(rest) = rest.strip_prefix("-A ") else {
        bail!("it is neither a chain nor a rule");
    };
    let (name, text) = rest.split_once(' ').unwrap_or((rest, ""));
    // A rule of a chain that was not declared does not happen, but a chain is made for it.
    if !chains.contains_key(name) {
        chains.insert(name.to_owned(), Chain::default());
    }
    let chain = chains.get_mut(name).expect("it is there");
    Rc::make_mut(&mut chain.rules).push(Rule::parse(text)?);
    chain.counters.push(counter);
    Ok(())
}

/// Reads the next line without its end, if there is one. iptables-save prints line ends in somebody's comment as they
/// are, so a line goes on until its quotes are closed.
fn next_line(save: &mut dyn BufRead, line: &mut Vec<u8>) -> Result<bool> {
    line.clear();
    let mut quotes = Quotes::default();
    loop {
        let start = line.len();
        let length = save.read_until(b'\n', line);
        if length.context("read what iptables-save prints")? == 0 {
            let shown: String = String::from_utf8_lossy(line).chars().take(200).collect();
            ensure!(
                start == 0,
                "iptables-save ended within the quotes of {shown:?}"
            );
            return Ok(false);
        }
        let added = &line[start..];
        if start > 0 || added.contains(&b'"') {
            added.iter().for_each(|byte| quotes.read(*byte));
        }
        if !quotes.is_open {
            line.pop_if(|byte| *byte == b'\n');
            return Ok(true);
        }
    }
}

/// Whether a quote is open. It opens at a word's start only, and not at that of a name, which iptables-save prints as it
/// is.
#[derive(Default)]
struct Quotes {
    is_open: bool,
    is_escaped: bool,
    word: Vec<u8>,
    last_word: Vec<u8>,
}

impl Quotes {
    fn read(&mut self, byte: u8) {
        match byte {
            _ if self.is_escaped => self.is_escaped = false,
            b'\\' if self.is_open => self.is_escaped = true,
            b'"' if self.is_open => self.is_open = false,
            _ if self.is_open => {}
            b'"' if self.word.is_empty() && !is_before_name(&self.last_word) => self.is_open = true,
            b' ' => self.last_word = std::mem::take(&mut self.word),
            byte => self.word.push(byte),
        }
    }
}
