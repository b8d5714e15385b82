//! What happened to a packet at a hook, by which rules, and what may have happened instead.

use std::collections::VecDeque;
use std::fmt;
use std::rc::Rc;
use std::slice;

use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use super::ruleset::{Effect, MarkAction};
use crate::kernel::tools::Backend;

/// A rule or a policy, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub backend: Backend,
    /// The table of nftables, if it is not one of iptables: `inet filter`.
    pub native: Option<Rc<str>>,
    /// The table of iptables; of nftables, the one that does the same: `nat` or `filter`.
    pub table: &'static str,
    pub chain: Rc<str>,
    /// The rule's number in the chain, from 1, or its handle in nftables; 0 for the chain's policy.
    pub number: usize,
    /// The rule as iptables-save writes it, without `-A CHAIN`, or as nft does; or `policy DROP`.
    pub text: Rc<str>,
    /// The number of packets that matched the rule, where they are counted.
    pub packets: Option<u64>,
}

impl Serialize for Place {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let backend = match self.native {
            Some(_) => "nft",
            None => self.backend.name(),
        };
        let mut place = serializer.serialize_struct("Place", 6)?;
        place.serialize_field("backend", backend)?;
        place.serialize_field("table", self.native.as_deref().unwrap_or(self.table))?;
        place.serialize_field("chain", &*self.chain)?;
        place.serialize_field("number", &self.number)?;
        place.serialize_field("text", &*self.text)?;
        place.serialize_field("packets", &self.packets)?;
        place.end()
    }
}

pub fn as_text<S: Serializer>(it: &impl fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(it)
}

impl Place {
    /// `rule 3 of FORWARD in filter`, `the policy DROP of FORWARD in filter`, `rule handle 7 of forward in inet filter`
    pub fn brief(&self) -> String {
        let (table, chain) = (self.native.as_deref().unwrap_or(self.table), &self.chain);
        match (self.number, &self.native) {
            (0, _) => format!("the {} of {chain} in {table}", self.text),
            (number, None) => format!("rule {number} of {chain} in {table}"),
            (number, Some(_)) => format!("rule handle {number} of {chain} in {table}"),
        }
    }

    /// The command that deletes the rule.
    pub fn deletion(&self) -> String {
        match &self.native {
            Some(table) => format!(
                "nft delete rule {table} {} handle {}",
                self.chain, self.number
            ),
            None => self.command("-D", &self.text),
        }
    }

    /// `iptables-nft -t filter -D FORWARD 3`
    pub fn command(&self, flag: &str, rest: &str) -> String {
        let (backend, table, chain) = (self.backend, self.table, &self.chain);
        format!("{backend} -t {table} {flag} {chain} {rest}")
    }

    /// The command that puts a rule of nftables at the head of the chain.
    pub fn insertion(&self, rule: &str) -> Option<String> {
        let table = self.native.as_ref()?;
        Some(format!("nft insert rule {table} {} {rule}", self.chain))
    }
}

/// `rule 3 of FORWARD in filter (iptables-nft): -j DROP`
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let brief = self.brief();
        match self.native {
            Some(_) => write!(f, "{brief} (nft)")?,
            None => write!(f, "{brief} ({})", self.backend)?,
        }
        match self.number {
            0 => Ok(()),
            _ => write!(f, ": {}", self.text),
        }
    }
}

/// A change of a mark by a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MarkChange {
    pub place: Place,
    pub action: MarkAction,
    /// Whether the connection's mark changes; otherwise, the packet's.
    pub of_connection: bool,
    /// The bits that differ before and after.
    pub changed: u32,
    pub mark: u32,
}

/// Something that may happen and can't be told from the rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doubt {
    pub place: Place,
    pub event: Event,
    /// What that can do to the packet, at most.
    pub effect: Effect,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The rule matches.
    Matches,
    /// The target accepts the packet, for instance by a program behind a queue.
    Accepts,
    /// The target drops the packet.
    Stops,
    /// The rule's chain is asked ahead of another one with the same priority: that which was made last is.
    ComesFirst,
}

/// `rule 3 of FORWARD in filter (iptables-nft): -m limit --limit 3/min -j DROP matches`
impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = match self.event {
            Event::Matches => "matches",
            Event::Accepts => "accepts the packet",
            Event::Stops => "drops the packet",
            Event::ComesFirst => "is asked ahead of the other rules that translate",
        };
        write!(f, "{} {verb}", self.place)
    }
}

/// What happened to a packet at a hook.
#[derive(Clone, Debug, Default)]
pub struct Passage {
    /// The rule or policy that dropped or rejected the packet.
    pub stopped: Option<Place>,
    /// The rules and policies that accepted the packet, one for each table and backend.
    pub accepted: Vec<Place>,
    /// The rule that translated an address.
    pub nat: Option<Place>,
    /// The rule that exempts the connection from tracking, and so from translation.
    pub untracked: Option<Place>,
    /// Changes of marks, in order.
    pub marks: Vec<MarkChange>,
    /// What may have happened instead.
    pub doubts: Vec<Doubt>,
}

/// How many alternatives are traced, at most.
const MAX_ALTERNATIVES: usize = 16;

/// The alternatives to a trace: each of its doubts is assumed to come true, and where that raises new doubts, those together
/// with it.
#[derive(Debug, Default)]
pub struct Alternatives {
    known: Vec<Doubt>,
    waiting: VecDeque<Vec<Doubt>>,
    traced: usize,
}

impl Alternatives {
    /// Adds the doubts that were met in a trace with these assumed.
    pub fn add(&mut self, assumed: &[Doubt], doubts: Vec<Doubt>) {
        for doubt in doubts {
            if !self.known.contains(&doubt) {
                self.waiting
                    .push_back([assumed, slice::from_ref(&doubt)].concat());
                self.known.push(doubt);
            }
        }
    }

    /// What to assume in the next trace.
    pub fn pop(&mut self) -> Option<Vec<Doubt>> {
        if self.traced == MAX_ALTERNATIVES {
            return None;
        }
        self.traced += 1;
        self.waiting.pop_front()
    }

    /// Whether there are alternatives that were not traced.
    pub fn are_left(&self) -> bool {
        !self.waiting.is_empty()
    }
}
