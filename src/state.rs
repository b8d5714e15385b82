//! The nouns: what the kernel holds for us, desired and observed alike. No I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::Ipv4Addr;
use std::rc::Rc;

use anyhow::{Result, bail, ensure};
use ipnetwork::Ipv4Network;

/// The routing protocol number that our routes and rules carry, so that they are known as ours
/// without any file (`rtnetlink(7)`, `rtm_protocol`: values above `RTPROT_STATIC` are free for users).
pub const PROTOCOL: u8 = 109;

/// What each chain and each comment of ours starts with; the uplink's name follows.
pub const PREFIX: &str = "mh-";

/// The metric of the closing `unreachable` route: behind any route that a person or a daemon sets.
pub const CLOSING_METRIC: u32 = 4_278_198_272;

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

    /// The name as text.
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

    /// The uplink whose name a comment starts with. Text may follow the name behind a space.
    pub fn of_comment(comment: &str) -> Option<Self> {
        let name = comment.strip_prefix(PREFIX)?.split(' ').next()?;
        Self::parse(name).ok()
    }
}

impl fmt::Display for UplinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A routing table's number (`ip-route(8)`, TABLE).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TableId(pub u32);

impl TableId {
    /// The table that holds the LANs and the default route.
    pub const MAIN: Self = Self(254);
}

impl fmt::Display for TableId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::MAIN => f.write_str("main"),
            Self(253) => f.write_str("default"),
            Self(255) => f.write_str("local"),
            Self(id) => write!(f, "{id}"),
        }
    }
}

/// A packet's or connection's mark under the mask of the bits that are ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FwMark {
    /// The value of the masked bits.
    pub value: u32,
    /// The bits that count.
    pub mask: u32,
}

impl FwMark {
    /// `0xa/0xff`, or `0xa` where the mask is full; decimal, too.
    pub fn parse(text: &str) -> Option<Self> {
        let (value, mask) = match text.split_once('/') {
            Some((value, mask)) => (value, bits(mask)?),
            None => (text, u32::MAX),
        };
        let value = bits(value)?;
        Some(Self { value, mask })
    }
}

/// A number as iproute2 and iptables write the bits of a mark.
pub fn bits(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

impl fmt::Display for FwMark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}/{:#x}", self.value, self.mask)
    }
}

/// An IPv4 route of ours. Its `Display` is `ip route` notation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// The table it stands in.
    pub table: TableId,
    /// 0 where none is given.
    pub metric: u32,
    /// `unreachable` and the like; none for a unicast route.
    pub kind: Option<String>,
    /// A prefix or `default`.
    pub destination: String,
    /// The link it leaves by.
    pub dev: Option<String>,
    /// Whatever else a route of protocol 109 has that we never write.
    pub rest: Vec<String>,
}

impl Route {
    /// Two routes with the same key can't both be added: the kernel says "File exists"
    /// (`fib_table_insert`, net/ipv4/fib_trie.c).
    pub fn key(&self) -> (TableId, u32, &str) {
        (self.table, self.metric, &self.destination)
    }
}

/// A rule of the routing policy database (`ip-rule(8)`) of ours. Its `Display` is `ip rule` notation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RouteRule {
    /// Rules are asked in the order of this number.
    pub priority: u32,
    /// The source it matches, as `ip` writes it; none for all.
    pub from: Option<String>,
    /// The interface the packet came in by.
    pub iif: Option<String>,
    /// The packet mark it matches.
    pub fwmark: Option<FwMark>,
    /// The table it sends the packet to.
    pub table: TableId,
    /// Routes with a prefix this short are passed over.
    pub suppress_prefixlength: Option<u32>,
    /// Whatever else a rule of protocol 109 has that we never write.
    pub rest: Vec<String>,
}

impl RouteRule {
    /// A rule that matches everything, to be narrowed by struct update.
    pub fn new(priority: u32, table: TableId) -> Self {
        Self {
            priority,
            from: None,
            iif: None,
            fwmark: None,
            table,
            suppress_prefixlength: None,
            rest: Vec::new(),
        }
    }
}

/// A table of iptables, in the order in which they are written.
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
    /// The table of that name, if we ever write to it.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Mangle, Self::Nat, Self::Filter]
            .into_iter()
            .find(|table| table.to_string() == text)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mangle => "mangle",
            Self::Nat => "nat",
            Self::Filter => "filter",
        })
    }
}

/// The matches and target of an iptables rule, as iptables-save writes them behind `-A CHAIN`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rulespec(pub String);

/// The rules of a chain, in order. There may be thousands, and they go from hand to hand.
pub type Rules = Rc<Vec<Rulespec>>;

/// What one uplink has in one table of iptables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// The uplink's own chain and those below it, by their names.
    pub chains: BTreeMap<String, Rules>,
    /// The uplink's entries in other chains, as (chain, rule). Doubles count.
    pub entries: Vec<(String, Rulespec)>,
}

impl Share {
    fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.entries.is_empty()
    }

    /// The rules of all its chains, chain by chain.
    pub fn rules(&self) -> impl Iterator<Item = &Rulespec> {
        self.chains.values().flat_map(|rules| rules.iter())
    }
}

/// Reverse path filtering that we loosened on an interface (`rp_filter`,
/// Documentation/networking/ip-sysctl.rst).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Loose {
    /// The uplink whose forwards strict filtering would drop.
    pub uplink: UplinkName,
    /// The interface whose value is 2 while the uplink is up.
    pub interface: IfName,
    /// The value to put back.
    pub before: u8,
}

/// The entries of ours: those that should stand, or those that do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Routes.
    pub routes: BTreeSet<Route>,
    /// Rules of the routing policy.
    pub rules: BTreeSet<RouteRule>,
    /// Each uplink's share of each table of iptables. No share is empty.
    pub tables: BTreeMap<(Table, UplinkName), Share>,
    /// Interfaces whose reverse path filter is ours.
    pub loose: BTreeSet<Loose>,
}

impl State {
    /// Both together.
    pub fn merge(&mut self, other: Self) {
        self.routes.extend(other.routes);
        self.rules.extend(other.rules);
        for (key, share) in other.tables {
            self.insert(key, share);
        }
        self.loose.extend(other.loose);
    }

    /// Puts a share in, unless it is empty.
    pub fn insert(&mut self, key: (Table, UplinkName), share: Share) {
        if !share.is_empty() {
            self.tables.insert(key, share);
        }
    }

    /// What belongs to these uplinks and their routing tables. The rule that lets an address talk
    /// to the LAN directly names no table of an uplink: it goes with the source rule of its address.
    pub fn share(&self, uplinks: &BTreeSet<UplinkName>, tables: &BTreeSet<TableId>) -> Self {
        let sources: BTreeSet<&String> = self
            .rules
            .iter()
            .filter(|rule| tables.contains(&rule.table))
            .filter_map(|rule| rule.from.as_ref())
            .collect();
        let owns = |rule: &RouteRule| {
            tables.contains(&rule.table)
                || rule.table == TableId::MAIN
                    && rule
                        .from
                        .as_ref()
                        .is_some_and(|from| sources.contains(from))
        };
        Self {
            routes: self
                .routes
                .iter()
                .filter(|route| tables.contains(&route.table))
                .cloned()
                .collect(),
            rules: self
                .rules
                .iter()
                .filter(|rule| owns(rule))
                .cloned()
                .collect(),
            tables: self
                .tables
                .iter()
                .filter(|((_, uplink), _)| uplinks.contains(uplink))
                .map(|(key, share)| (key.clone(), share.clone()))
                .collect(),
            loose: self
                .loose
                .iter()
                .filter(|loose| uplinks.contains(&loose.uplink))
                .cloned()
                .collect(),
        }
    }

    /// The routes, rules and loosened interfaces that are in `other` too.
    pub fn common(&self, other: &Self) -> Self {
        Self {
            routes: &self.routes & &other.routes,
            rules: &self.rules & &other.rules,
            tables: BTreeMap::new(),
            loose: &self.loose & &other.loose,
        }
    }

    /// What is left when `other`, a part of this, is taken away.
    pub fn without(&self, other: &Self) -> Self {
        Self {
            routes: &self.routes - &other.routes,
            rules: &self.rules - &other.rules,
            tables: self
                .tables
                .iter()
                .filter(|(key, _)| !other.tables.contains_key(key))
                .map(|(key, share)| (key.clone(), share.clone()))
                .collect(),
            loose: &self.loose - &other.loose,
        }
    }
}

/// Whether an address can be a link's own: not 0/8, 127/8, nor 224/3 (RFC 6890), nor within a LAN.
///
/// # Errors
/// Says which of these it is.
pub fn check_local(address: Ipv4Addr, lan: &[Ipv4Network]) -> Result<()> {
    let first = address.octets()[0];
    if first == 0 || first == 127 || first >= 224 {
        bail!("{address} can't be a link's address: 0/8, 127/8 and 224/3 are not for links");
    }
    if let Some(network) = lan.iter().find(|network| network.contains(address)) {
        bail!(
            "{address} can't be an uplink's address: it lies in the LAN {network} of [lan] networks"
        );
    }
    Ok(())
}
