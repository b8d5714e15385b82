//! The one parser of iptables-save, for everybody's rules; `reconcile::ownership` picks ours out of them. What can't be
//! read is an error, and never taken for a table without rules.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::rc::Rc;

use anyhow::{Context, Result, bail, ensure};

use crate::kernel::process::Process;
use crate::model::netfilter::{Rule, Rules, is_before_name};

/// The tables of one backend.
#[derive(Clone, Debug, Default)]
pub struct Ruleset {
    pub tables: BTreeMap<String, BTreeMap<String, Chain>>,
    /// Tables that iptables-save does not list, because nftables rules in them can't be written as iptables rules. What
    /// they hold is unknown.
    pub incompatible: BTreeSet<String>,
}

#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// The policy of a built-in chain: what happens to a packet at its end. None for a user-defined chain.
    pub policy: Option<String>,
    pub rules: Rules,
    /// The counters of each rule, in the same order.
    pub counters: Vec<Counter>,
}

/// The packets that matched a rule. Zero unless `iptables-save -c` was asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    pub packets: u64,
    pub bytes: u64,
}

impl Counter {
    pub fn plus(self, other: Self) -> Self {
        Self {
            packets: self.packets + other.packets,
            bytes: self.bytes + other.bytes,
        }
    }
}

impl Ruleset {
    /// Parses the output of `iptables-save` or `iptables-save -c`.
    /// Errors: a line that iptables-save does not print, or the output is cut short.
    pub fn parse(save: &str) -> Result<Self> {
        let mut parser = Parser::default();
        parser.take(save.as_bytes())?;
        parser.end()
    }

    /// Parses what iptables-save prints, while it prints it: with 10,000 rules the one takes as long as the other.
    /// Errors: those of [`Self::parse`]; iptables-save fails, or does not end in time.
    pub fn read(save: Process) -> Result<Self> {
        let mut parser = Parser::default();
        save.answer_to(|part| parser.take(part))?;
        parser.end()
    }

    pub fn chain(&self, table: &str, chain: &str) -> Option<&Chain> {
        self.tables.get(table)?.get(chain)
    }

    /// Whether it is known to be as empty as after a boot: no rules, no user-defined chains, all policies ACCEPT.
    pub fn is_empty(&self) -> bool {
        let mut chains = self.tables.values().flat_map(BTreeMap::values);
        self.incompatible.is_empty()
            && chains
                .all(|chain| chain.rules.is_empty() && chain.policy.as_deref() == Some("ACCEPT"))
    }
}

/// The longest line that is read, in bytes. It is looked at anew with each part of it that comes.
const MAX_LINE: usize = 1 << 20;

/// Parses the output of iptables-save part by part.
#[derive(Default)]
struct Parser {
    ruleset: Ruleset,
    /// The table that the next line is in.
    table: Option<String>,
    /// The last line that is parsed, as much of it as an error quotes.
    last: String,
    /// The beginning of a line whose end has not come.
    left: Vec<u8>,
}

impl Parser {
    /// Parses the lines whose ends are there by now.
    fn take(&mut self, part: &[u8]) -> Result<()> {
        self.left.extend_from_slice(part);
        let bytes = mem::take(&mut self.left);
        let ended = bytes.iter().rposition(|byte| *byte == b'\n');
        let ended = ended.map_or(0, |at| at + 1);
        // The name of a foreign interface can hold any byte.
        let text = String::from_utf8_lossy(&bytes[..ended]);
        let mut rest = &text[..];
        while let Some((line, after)) = split_line(rest) {
            let added = self.add(line);
            added.with_context(|| format!("read what iptables-save prints: {:?}", shown(line)))?;
            rest = after;
            if rest.is_empty() {
                self.last = shown(line);
            }
        }
        self.left.extend_from_slice(rest.as_bytes());
        self.left.extend_from_slice(&bytes[ended..]);
        ensure!(
            self.left.len() <= MAX_LINE,
            "read what iptables-save prints: {:?}: this line has no end",
            shown(&String::from_utf8_lossy(&self.left))
        );
        Ok(())
    }

    fn add(&mut self, line: &str) -> Result<()> {
        let Self { ruleset, table, .. } = self;
        if line.is_empty() || line.starts_with('#') {
            ruleset.incompatible.extend(incompatible(line));
            return Ok(());
        }
        match (&table, line.strip_prefix('*')) {
            (None, Some(name)) => {
                ruleset.tables.entry(name.to_owned()).or_default();
                *table = Some(name.to_owned());
            }
            (Some(_), None) if line == "COMMIT" => *table = None,
            (Some(name), None) => {
                let chains = ruleset.tables.get_mut(name);
                add_to_table(line, chains.expect("the table's first line added it"))?;
            }
            (None, None) => bail!("this line is in no table"),
            (Some(name), Some(_)) => bail!("table {name} has no COMMIT before this line"),
        }
        Ok(())
    }

    /// What was parsed, at the end of the output.
    fn end(self) -> Result<Ruleset> {
        let left = String::from_utf8_lossy(&self.left);
        if let Some((line, _)) = left.split_once('\n') {
            let line = shown(line);
            bail!("read what iptables-save prints: {line:?}: it ended before a quote was closed");
        }
        let last = match &left[..] {
            "" => self.last,
            left => shown(left),
        };
        if let Some(table) = self.table {
            bail!("iptables-save ended in the middle of table {table}, after {last:?}");
        }
        ensure!(
            left.is_empty(),
            "iptables-save ended in the middle of the line {last:?}"
        );
        // A comment announces each table, unless iptables is older than 1.8.
        ensure!(
            !last.starts_with("# Generated by "),
            "iptables-save ended before the table that {last:?} announces"
        );
        Ok(self.ruleset)
    }
}

/// The table in ``# Table `nat' is incompatible, use 'nft' tool.`` (`nft_is_table_compatible`, iptables/nft.c). None for
/// ``# Table `nat' contains incompatible base-chains``: then the table's own chains are listed all the same.
fn incompatible(comment: &str) -> Option<String> {
    let (name, rest) = comment.strip_prefix("# Table `")?.split_once('\'')?;
    rest.starts_with(" is incompatible")
        .then(|| name.to_owned())
}

/// Adds a line of a table: `:PREROUTING ACCEPT [0:0]`, `:mh-isp0 - [0:0]`, or `[12:720] -A PREROUTING -i ppp0 -j mh-isp0`.
fn add_to_table(line: &str, chains: &mut BTreeMap<String, Chain>) -> Result<()> {
    if let Some(declaration) = line.strip_prefix(':') {
        let (name, rest) = declaration.split_once(' ').context("it has no policy")?;
        let policy = rest.split(' ').next().filter(|policy| *policy != "-");
        chains.entry(name.to_owned()).or_default().policy = policy.map(str::to_owned);
        return Ok(());
    }
    let (counter, rule) = match line.strip_prefix('[') {
        Some(rest) => {
            let (counter, rule) = rest.split_once("] ").context("its counters have no end")?;
            (parse_counter(counter)?, rule)
        }
        None => (Counter::default(), line),
    };
    let rule = rule.strip_prefix("-A ");
    let rule = rule.context("it is neither a chain nor a rule")?;
    let (name, text) = rule.split_once(' ').unwrap_or((rule, ""));
    ensure!(!name.is_empty(), "it names no chain");
    // Mostly it is declared already; there may be 10,000 rules.
    let chain = match chains.get_mut(name) {
        Some(chain) => chain,
        None => chains.entry(name.to_owned()).or_default(),
    };
    Rc::make_mut(&mut chain.rules).push(Rule::parse(text)?);
    chain.counters.push(counter);
    Ok(())
}

/// `12:720`
fn parse_counter(text: &str) -> Result<Counter> {
    let numbers = text.split_once(':').and_then(|(packets, bytes)| {
        Some(Counter {
            packets: packets.parse().ok()?,
            bytes: bytes.parse().ok()?,
        })
    });
    numbers.context("its counters are not packets:bytes")
}

/// The first line, without its line end, and the text after it. A comment can hold line ends, which iptables-save prints
/// as they are: a line goes on until its quotes are closed. None if its end is not in the text.
fn split_line(text: &str) -> Option<(&str, &str)> {
    let (line, rest) = text.split_once('\n')?;
    if !line.starts_with(['-', '[']) || !line.contains('"') {
        return Some((line, rest));
    }
    let end = line_end(text.as_bytes())?;
    Some((&text[..end], text.get(end + 1..)?))
}

/// Where the first line ends. None if a quote is not closed, or the line has no end. A quote opens at a word's start only, and never at the start
/// of a name ([`is_before_name`]).
fn line_end(text: &[u8]) -> Option<usize> {
    let (mut last_word, mut start, mut at) = (0..0, 0, 0);
    while at < text.len() {
        match text[at] {
            b'\n' => return Some(at),
            b' ' => {
                last_word = start..at;
                start = at + 1;
            }
            b'"' if at == start && !is_before_name(&text[last_word.clone()]) => {
                at += 1 + closing_quote(&text[at + 1..])?;
                start = at + 1;
            }
            _ => {}
        }
        at += 1;
    }
    None
}

/// Where the first quote is that no backslash escapes.
fn closing_quote(text: &[u8]) -> Option<usize> {
    let mut is_escaped = false;
    text.iter().position(|byte| {
        let closes = *byte == b'"' && !is_escaped;
        is_escaped = *byte == b'\\' && !is_escaped;
        closes
    })
}

/// As much of a line as an error quotes.
fn shown(line: &str) -> String {
    line.chars().take(200).collect()
}
