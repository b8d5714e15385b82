//! A change as the command that a person would type, to be shown or pasted.

use std::fmt;

use crate::kernel::sysctl::src_valid_mark;
use crate::model::names::IfName;
use crate::model::netfilter::{Rule, Table};
use crate::model::route::{Route, RouteRule};
use crate::reconcile::diff::Change;

/// A command line for a shell. `Display` writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command<'a> {
    Route(Change, &'a Route),
    RouteRule(Change, &'a RouteRule),
    /// The interface's `src_valid_mark`: 1, or 0 again.
    SrcValidMark(Change, &'a IfName),
    Iptables {
        /// `iptables`, or the name of the backend that is not in use.
        name: &'static str,
        table: Table,
        /// The option: `-A`, `-D`, …
        flag: &'static str,
        chain: &'a str,
        /// The number in the chain, for `-I`.
        number: Option<usize>,
        spec: Option<&'a Rule>,
    },
}

impl<'a> Command<'a> {
    pub fn iptables(
        table: Table,
        flag: &'static str,
        chain: &'a str,
        number: Option<usize>,
        spec: Option<&'a Rule>,
    ) -> Self {
        Self::Iptables {
            name: "iptables",
            table,
            flag,
            chain,
            number,
            spec,
        }
    }

    /// The same command, by this name of iptables.
    pub fn by(mut self, iptables: &'static str) -> Self {
        if let Self::Iptables { name, .. } = &mut self {
            *name = iptables;
        }
        self
    }
}

impl fmt::Display for Command<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Route(change, route) => write!(f, "ip route {} {route}", change.verb()),
            Self::RouteRule(change, rule) => write!(f, "ip rule {} {rule}", change.verb()),
            Self::SrcValidMark(change, interface) => {
                let path = src_valid_mark(interface.as_str());
                write!(f, "echo {} > /proc/sys/{path}", value(*change))
            }
            Self::Iptables {
                name,
                table,
                flag,
                chain,
                number,
                spec,
            } => {
                write!(f, "{name} -t {table} {flag} {}", quote(chain))?;
                if let Some(number) = number {
                    write!(f, " {number}")?;
                }
                let mut words = spec.iter().flat_map(|rule| rule.words());
                words.try_for_each(|word| write!(f, " {}", quote(&word)))
            }
        }
    }
}

/// The value of the parameter after the change.
pub fn value(change: Change) -> &'static str {
    match change {
        Change::Add | Change::Replace => "1",
        Change::Delete => "0",
    }
}

/// A word, quoted so that a shell takes it literally.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:,=+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}
