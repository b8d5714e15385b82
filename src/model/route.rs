//! Routes and rules of the routing policy, anybody's. Their `Display` is what `ip route add` and `ip rule add` take.

use std::fmt;
use std::net::Ipv4Addr;

use ipnetwork::Ipv4Network;

/// The routing protocol number that our routes and rules carry, so that they are known as ours
/// without any file (`rtnetlink(7)`, `rtm_protocol`: values above `RTPROT_STATIC` are free for users).
pub const PROTOCOL: u8 = 109;

/// The metric of the closing `unreachable` route: behind any route that a person or a daemon sets.
pub const CLOSING_METRIC: u32 = 4_278_198_272;

/// A routing table's number (`ip-route(8)`, TABLE).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TableId(pub u32);

impl TableId {
    /// The table that holds the LANs and the default route.
    pub const MAIN: Self = Self(254);
    /// The kernel's own, of the router's addresses.
    pub const LOCAL: Self = Self(255);

    /// Whether every system has this table: default, main and local, and 0, which is none.
    pub fn is_systems(self) -> bool {
        matches!(self.0, 0 | 253..=255)
    }
}

impl fmt::Display for TableId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::MAIN => f.write_str("main"),
            Self(253) => f.write_str("default"),
            Self::LOCAL => f.write_str("local"),
            Self(id) => write!(f, "{id}"),
        }
    }
}

/// The bits of a packet's or connection's mark that count, and their value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FwMark {
    pub value: u32,
    pub mask: u32,
}

impl FwMark {
    /// `0xa/0xff`, or `0xa` where the mask is full; decimal, too.
    pub fn parse(text: &str) -> Option<Self> {
        let (value, mask) = text.split_once('/').unwrap_or((text, "0xffffffff"));
        let (value, mask) = (bits(value)?, bits(mask)?);
        Some(Self { value, mask })
    }

    pub fn matches(self, mark: u32) -> bool {
        mark & self.mask == self.value
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

/// What a route does with a packet (`RTN_UNICAST` and its kin, linux/rtnetlink.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RouteKind(pub u8);

impl RouteKind {
    /// Sends it on, by a gateway or a link.
    pub const UNICAST: Self = Self(1);
    /// Refuses it with an ICMP error.
    pub const UNREACHABLE: Self = Self(7);

    /// Its word in `ip`; none for one that `ip` does not know.
    pub fn name(self) -> Option<&'static str> {
        const NAMES: [&str; 9] = [
            "unicast",
            "local",
            "broadcast",
            "anycast",
            "multicast",
            "blackhole",
            "unreachable",
            "prohibit",
            "throw",
        ];
        NAMES.get(usize::from(self.0).checked_sub(1)?).copied()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// The table it stands in.
    pub table: TableId,
    /// 0 where none is given.
    pub metric: u32,
    pub kind: RouteKind,
    /// The addresses that it is for; all of them is `default`.
    pub destination: Ipv4Network,
    pub gateway: Option<Ipv4Addr>,
    pub dev: Option<String>,
    /// Who made it (`rtm_protocol`).
    pub protocol: u8,
    /// Whatever else it has, as words of `ip` with their values: none in those that we make.
    pub rest: Vec<String>,
}

impl Route {
    /// Two routes with the same key can't both be added: the kernel says "File exists"
    /// (`fib_table_insert`, net/ipv4/fib_trie.c).
    pub fn key(&self) -> (TableId, u32, Ipv4Network) {
        (self.table, self.metric, self.destination)
    }

    /// Whether it carries our protocol number.
    pub fn is_ours(&self) -> bool {
        self.protocol == PROTOCOL
    }

    /// Whether it is for all addresses.
    pub fn is_default(&self) -> bool {
        self.destination.prefix() == 0
    }
}

/// What a rule does with the packets that it matches (`FR_ACT_TO_TBL` and its kin, linux/fib_rules.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RuleAction {
    Lookup(TableId),
    /// Drops them in silence.
    Blackhole,
    /// Refuses them: no route.
    Unreachable,
    /// Refuses them: forbidden.
    Prohibit,
    /// Something else, by its number.
    Other(u8),
}

/// A rule of the routing policy database (`ip-rule(8)`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RouteRule {
    /// Rules are asked in the order of this number.
    pub priority: u32,
    /// The sources it matches; none for all.
    pub from: Option<Ipv4Network>,
    /// The destinations it matches; none for all.
    pub to: Option<Ipv4Network>,
    /// The interface the packet came in by.
    pub iif: Option<String>,
    pub fwmark: Option<FwMark>,
    pub action: RuleAction,
    /// Routes with a prefix this short are passed over.
    pub suppress_prefixlength: Option<u32>,
    /// Who made it (`FRA_PROTOCOL`).
    pub protocol: u8,
    /// Whatever else it has, as words of `ip` with their values: none in those that we make.
    pub rest: Vec<String>,
}

impl RouteRule {
    /// A rule of ours that sends everything to a table, to be narrowed by struct update.
    pub fn new(priority: u32, table: TableId) -> Self {
        Self {
            priority,
            from: None,
            to: None,
            iif: None,
            fwmark: None,
            action: RuleAction::Lookup(table),
            suppress_prefixlength: None,
            protocol: PROTOCOL,
            rest: Vec::new(),
        }
    }

    pub fn table(&self) -> Option<TableId> {
        match self.action {
            RuleAction::Lookup(table) => Some(table),
            _ => None,
        }
    }

    /// Whether it carries our protocol number.
    pub fn is_ours(&self) -> bool {
        self.protocol == PROTOCOL
    }

    /// Whether it matches what its selectors do not.
    pub fn is_negated(&self) -> bool {
        self.rest.iter().any(|word| word == NOT)
    }

    /// `98: from 203.0.113.10 to 192.168.0.0/24 lookup main proto 109`, as `ip rule` lists it.
    pub fn listed(&self) -> String {
        format!("{}: {}", self.priority, self.selectors())
    }

    /// What stands behind the priority, in the order in which `ip rule` lists it.
    pub fn selectors(&self) -> String {
        let mut words = Words::default();
        words.rest(&self.rest);
        words.push("from", Some(self.from.map_or("all".into(), prefix)));
        words.push("to", self.to.map(prefix));
        words.push("fwmark", self.fwmark);
        words.push("iif", self.iif.as_deref().and_then(word));
        match self.action {
            RuleAction::Lookup(TableId(0)) | RuleAction::Other(_) => {}
            RuleAction::Lookup(table) => words.push("lookup", Some(table)),
            RuleAction::Blackhole => words.one("blackhole"),
            RuleAction::Unreachable => words.one("unreachable"),
            RuleAction::Prohibit => words.one("prohibit"),
        }
        words.push("suppress_prefixlength", self.suppress_prefixlength);
        words.protocol(self.protocol);
        words.0
    }
}

/// The word for a rule that matches what its selectors do not.
pub const NOT: &str = "not";

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = Words::default();
        if self.kind != RouteKind::UNICAST
            && let Some(name) = self.kind.name()
        {
            words.one(name);
        }
        words.one(&match self.destination.prefix() {
            0 => "default".into(),
            _ => prefix(self.destination),
        });
        words.push("via", self.gateway);
        words.rest(&self.rest);
        words.push("dev", self.dev.as_deref().and_then(word));
        words.push("metric", Some(self.metric).filter(|metric| *metric != 0));
        words.push("table", Some(self.table));
        words.protocol(self.protocol);
        f.write_str(&words.0)
    }
}

impl fmt::Display for RouteRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // `rule del` takes what is not named for a wildcard (ip-rule(8)), so all is named.
        write!(f, "priority {} {}", self.priority, self.selectors())
    }
}

/// A prefix as `ip` writes it: a single address without its length.
pub fn prefix(network: Ipv4Network) -> String {
    match network.prefix() {
        32 => network.ip().to_string(),
        _ => network.to_string(),
    }
}

/// The words of a command, one space apart.
#[derive(Default)]
struct Words(String);

impl Words {
    fn one(&mut self, word: &str) {
        if !self.0.is_empty() {
            self.0.push(' ');
        }
        self.0.push_str(word);
    }

    /// A word with its value, if it has one.
    fn push(&mut self, name: &str, value: Option<impl fmt::Display>) {
        if let Some(value) = value {
            self.one(name);
            self.one(&value.to_string());
        }
    }

    /// What `ip` lists of a protocol: nothing where it is none, the kernel's own, or that of `ip` (`RTPROT_BOOT`).
    fn protocol(&mut self, protocol: u8) {
        let named = Some(protocol).filter(|protocol| !matches!(protocol, 0 | 2 | 3));
        self.push("proto", named);
    }

    /// The words of an entry that we never write, pair by pair; a lone one comes last.
    fn rest(&mut self, rest: &[String]) {
        for pair in rest.chunks(2) {
            let pair: Option<Vec<String>> = pair.iter().map(|text| word(text)).collect();
            pair.iter().flatten().for_each(|word| self.one(word));
        }
    }
}

/// A word as it means itself to a shell and in a batch; none where there is no such form: a batch knows
/// no escape, and its comments begin anywhere (`getcmdline`, `makeargs` in iproute2's lib/utils.c). Names that
/// [`super::names::IfName`] takes need no quotes. Others get into an entry of ours when somebody renames a link; where
/// they have no form they are left out, and the entry to be deleted is found by its other words.
fn word(text: &str) -> Option<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._:/-".contains(c);
    if text.chars().all(plain) {
        return Some(text.to_owned());
    }
    let is_quotable = |c: char| !c.is_control() && !"'#".contains(c);
    text.chars().all(is_quotable).then(|| format!("'{text}'"))
}
