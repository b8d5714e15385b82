//! Names of interfaces and uplinks, in the narrow form that all tools, shells and logs read alike.

use std::fmt;

use anyhow::{Result, bail, ensure};

/// What the name of each of our chains, and each of our comments, starts with; the uplink's name follows.
pub const PREFIX: &str = "mh-";

/// A network interface's name, narrower than the kernel's own rule (`dev_valid_name` in
/// net/core/dev.c), so that it means the same to `ip`, `iptables`, a shell and a log:
/// `[A-Za-z0-9][A-Za-z0-9._-]{0,14}`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct IfName(String);

impl IfName {
    /// Fails on a name that is empty, longer than 15 bytes, or has other characters.
    pub fn parse(text: &str) -> Result<Self> {
        let mut chars = text.chars();
        ensure!(
            text.len() <= 15
                && chars.next().is_some_and(|c| c.is_ascii_alphanumeric())
                && chars.all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)),
            "{:?} is not an interface name that mh-hook takes: at most 15 of A-Z a-z 0-9 . _ -, \
             the first a letter or digit",
            text.chars().take(40).collect::<String>()
        );
        Ok(Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An uplink's name, `[a-z0-9_-]{1,16}`: with `mh-` ahead it fits a chain's name, which ends at 28
/// characters (`XT_EXTENSION_MAXNAMELEN`, linux/netfilter/x_tables.h).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UplinkName(String);

impl UplinkName {
    /// Fails on a name outside `[a-z0-9_-]{1,16}`.
    pub fn parse(text: &str) -> Result<Self> {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == '-';
        if !(1..=16).contains(&text.len()) || !text.chars().all(fits) {
            bail!("{text:?} is not an uplink's name: 1 to 16 of a-z 0-9 _ -");
        }
        Ok(Self(text.to_owned()))
    }

    /// The chain of this uplink, and the comment on its entries in other chains.
    pub fn chain(&self) -> String {
        format!("{PREFIX}{self}")
    }

    /// The chain below this uplink's, with a name of letters and digits: `mh-isp0.tcp20000`.
    pub fn subchain(&self, name: &str) -> String {
        format!("{}.{name}", self.chain())
    }

    /// The uplink whose chain has this name, or one below it.
    pub fn of_chain(chain: &str) -> Option<Self> {
        let name = chain.strip_prefix(PREFIX)?;
        let (name, below) = name.split_once('.').unwrap_or((name, "0"));
        let is_plain = !below.is_empty() && below.bytes().all(|byte| byte.is_ascii_alphanumeric());
        Self::parse(name).ok().filter(|_| is_plain)
    }
}

impl fmt::Display for UplinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
