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
        chain: &'a str,
        /// What is done with the chain.
        edit: Edit<'a>,
    },
}

/// One edit of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edit<'a> {
    New,
    Flush,
    /// Deletes the first rule with this text.
    Delete(&'a Rule),
    /// Inserts a rule, which has this number afterwards, from 1.
    Insert(usize, &'a Rule),
    /// Inserts a rule at the head.
    Prepend(&'a Rule),
    Append(&'a Rule),
    Remove,
}

impl<'a> Edit<'a> {
    /// Whether it adds or removes.
    pub fn change(self) -> Change {
        match self {
            Self::New | Self::Insert(..) | Self::Prepend(_) | Self::Append(_) => Change::Add,
            Self::Flush | Self::Delete(_) | Self::Remove => Change::Delete,
        }
    }

    /// The option of iptables, what follows the chain's name, and the rule.
    fn parts(self) -> (&'static str, String, Option<&'a Rule>) {
        match self {
            Self::New => ("-N", String::new(), None),
            Self::Flush => ("-F", String::new(), None),
            Self::Delete(rule) => ("-D", String::new(), Some(rule)),
            Self::Insert(number, rule) => ("-I", format!(" {number}"), Some(rule)),
            Self::Prepend(rule) => ("-I", String::new(), Some(rule)),
            Self::Append(rule) => ("-A", String::new(), Some(rule)),
            Self::Remove => ("-X", String::new(), None),
        }
    }
}

impl<'a> Command<'a> {
    pub fn iptables(table: Table, chain: &'a str, edit: Edit<'a>) -> Self {
        let name = "iptables";
        Self::Iptables {
            name,
            table,
            chain,
            edit,
        }
    }

    /// The same command, by this name of iptables.
    pub fn by(mut self, iptables: &'static str) -> Self {
        if let Self::Iptables { name, .. } = &mut self {
            *name = iptables;
        }
        self
    }

    /// The line in the input of `ip -batch` or iptables-restore. None for what is written to a file.
    pub fn line(&self) -> Option<String> {
        match self {
            // A batch line is the command without its first word.
            Self::Route(..) | Self::RouteRule(..) => {
                Some(format!("{self}\n").split_off("ip ".len()))
            }
            Self::SrcValidMark(..) => None,
            Self::Iptables {
                chain,
                edit: Edit::New,
                ..
            } => Some(format!(":{chain} - [0:0]\n")),
            Self::Iptables { chain, edit, .. } => {
                let (flag, number, rule) = edit.parts();
                let rule = rule.map(|rule| format!(" {rule}")).unwrap_or_default();
                Some(format!("{flag} {chain}{number}{rule}\n"))
            }
        }
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
                chain,
                edit,
            } => {
                let (flag, number, rule) = edit.parts();
                write!(f, "{name} -t {table} {flag} {}{number}", quote(chain))?;
                let mut words = rule.iter().flat_map(|rule| rule.words());
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
