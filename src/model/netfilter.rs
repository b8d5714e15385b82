//! Tables, chains and rules of iptables, as iptables-save prints them.

use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

use anyhow::{Result, bail};

use crate::model::forward::Protocol;

/// A table of iptables that we write to, in the order in which they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Marks.
    Mangle,
    /// DNAT and masquerade.
    Nat,
    /// Accepting what is forwarded.
    Filter,
}

impl Table {
    pub const ALL: [Self; 3] = [Self::Mangle, Self::Nat, Self::Filter];

    pub fn name(self) -> &'static str {
        match self {
            Self::Mangle => "mangle",
            Self::Nat => "nat",
            Self::Filter => "filter",
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The matches and target of a rule, as iptables-save writes them behind `-A CHAIN`, in the one form that we compare.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule(pub String);

impl Rule {
    /// The rule that iptables-save has printed, in the form that we compare. iptables before 1.8 puts more words in quotes.
    /// Errors: a quote is not closed.
    pub fn parse(text: &str) -> Result<Self> {
        // Plain words, one space apart, stand in that form already: there may be 10,000 such rules.
        let mut words = text.as_bytes().split(|byte| *byte == b' ');
        if words.all(|word| !word.is_empty() && word != b"gre" && word.iter().all(is_plain)) {
            return Ok(Self(text.to_owned()));
        }
        Ok(Self(join(&self::words(text)?)))
    }

    /// The words, without their quotes.
    pub fn words(&self) -> Vec<String> {
        // It was joined from words, so it comes apart again.
        words(&self.0).unwrap_or_default()
    }

    /// The word behind an option. Of our own rules, whose words are plain.
    pub fn value(&self, option: &str) -> Option<&str> {
        let mut words = self.0.split_ascii_whitespace();
        words.find(|word| *word == option)?;
        words.next()
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The rules of a chain, in order. There may be thousands, and several hold the same ones.
pub type Rules = Rc<Vec<Rule>>;

/// What one uplink has in one table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UplinkTable {
    /// The uplink's own chain and those below it, by their names.
    pub chains: BTreeMap<String, Rules>,
    /// The uplink's rules in other chains, as (chain, rule). Doubles count.
    pub entries: Vec<(String, Rule)>,
}

impl UplinkTable {
    /// Whether the uplink has nothing in this table.
    pub fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.entries.is_empty()
    }

    /// The rules of all its chains, chain by chain.
    pub fn rules(&self) -> impl Iterator<Item = &Rule> {
        self.chains.values().flat_map(|rules| rules.iter())
    }
}

/// The words of a rule: iptables-save puts words with other than plain characters in double quotes, and escapes quotes
/// and backslashes in them (`xtables_save_string`, libxtables/xtables.c). Names of interfaces are printed as they are,
/// so a quote counts at a word's start only.
/// Errors: a quote is not closed.
pub fn words(text: &str) -> Result<Vec<String>> {
    let mut words = Vec::new();
    let mut chars = text.chars().peekable();
    while chars.next_if(|c| *c == ' ').is_some() || chars.peek().is_some() {
        let mut word = String::new();
        let is_name = words
            .last()
            .is_some_and(|last: &String| is_before_name(last.as_bytes()));
        let quoted = !is_name && chars.next_if_eq(&'"').is_some();
        loop {
            match chars.next() {
                Some('"') if quoted => break,
                Some('\\') if quoted => word.extend(chars.next()),
                Some(' ') | None if !quoted => break,
                Some(c) => word.push(c),
                None => bail!("a quote is not closed"),
            }
        }
        if word == "gre" && words.last().is_some_and(|last| last == "-p") {
            // iptables knows this name from /etc/protocols only, which need not be there.
            word = Protocol::Gre.number().to_string();
        }
        if quoted || !word.is_empty() {
            words.push(word);
        }
    }
    Ok(words)
}

/// The words as one rule, in the form that iptables-restore takes.
pub fn join(words: &[String]) -> String {
    let mut text = String::new();
    let mut last = "";
    for word in words {
        if !text.is_empty() {
            text.push(' ');
        }
        let is_name = is_before_name(last.as_bytes());
        last = word;
        if is_name || !word.is_empty() && word.as_bytes().iter().all(is_plain) {
            text.push_str(word);
        } else {
            text.push('"');
            for c in word.chars() {
                if matches!(c, '"' | '\\' | '\'') {
                    text.push('\\');
                }
                text.push(c);
            }
            text.push('"');
        }
    }
    text
}

/// Whether the word behind this option is the name of an interface or a chain, which iptables-save prints without quotes
/// whatever it holds (`save_iface`, iptables/xshared.c).
pub fn is_before_name(option: &[u8]) -> bool {
    matches!(option, b"-A" | b"-i" | b"-o" | b"-j" | b"-g")
}

/// Whether a byte needs no quotes.
fn is_plain(byte: &u8) -> bool {
    matches!(byte, b'a'..=b'z' | b'A'..=b'Z' | b'+'..=b':' | b'_' | b'=' | b'!' | b'@' | b'%')
}
