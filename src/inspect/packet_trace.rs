//! One packet's way through iptables: which rules match it and what they make of it, as far as that
//! can be told from the rules alone. Pure.
//!
//! A rule with a match that is not known here, or that depends on more than the packet (`limit`, `set`),
//! is passed over and noted as a doubt; whoever asks can ask again with it assumed to match.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::Ipv4Addr;

use ipnetwork::Ipv4Network;
use serde::Serialize;

use crate::kernel::conntrack::Tuple;
use crate::kernel::iptables_save::{self, Ruleset};
use crate::kernel::link::Link;
use crate::kernel::tools::Backend;
use crate::model::forward::Protocol;
use crate::model::netfilter;
use crate::model::route::{FwMark, bits};

/// The tables of one backend, each rule taken apart once.
#[derive(Clone, Debug, Default)]
pub struct TracedRuleset {
    /// Each table's chains, by name.
    pub tables: BTreeMap<String, BTreeMap<String, TracedChain>>,
}

/// A chain.
#[derive(Clone, Debug, Default)]
pub struct TracedChain {
    /// What becomes of a packet at its end; none for a chain that somebody made.
    pub policy: Option<String>,
    /// Its rules, in order.
    pub rules: Vec<TracedRule>,
}

/// A rule, word by word.
#[derive(Clone, Debug)]
pub struct TracedRule {
    /// The packets that have matched it.
    pub packets: u64,
    /// Matches and target.
    pub words: Vec<String>,
}

impl TracedRule {
    /// The rule as iptables-save writes it behind `-A CHAIN`.
    pub fn spec(&self) -> String {
        netfilter::join(&self.words)
    }

    /// The word behind `option`.
    pub fn value(&self, option: &str) -> Option<&str> {
        let index = self.words.iter().position(|word| word == option)?;
        self.words.get(index + 1).map(String::as_str)
    }
}

impl TracedRuleset {
    /// The rules of a listing.
    pub fn new(ruleset: &Ruleset) -> Self {
        let chain = |chain: &iptables_save::Chain| TracedChain {
            policy: chain.policy.clone(),
            rules: chain
                .rules
                .iter()
                .zip(&chain.counters)
                .map(|(rule, counter)| TracedRule {
                    packets: counter.packets,
                    words: rule.words(),
                })
                .collect(),
        };
        let tables = ruleset.tables.iter().map(|(table, chains)| {
            let chains = chains.iter().map(|(name, it)| (name.clone(), chain(it)));
            (table.clone(), chains.collect())
        });
        Self {
            tables: tables.collect(),
        }
    }

    /// A chain.
    pub fn chain(&self, table: &str, chain: &str) -> Option<&TracedChain> {
        self.tables.get(table)?.get(chain)
    }
}

/// A hook of netfilter, with the tables of iptables that are asked there, in their order
/// (`enum nf_ip_hook_priorities`, linux/netfilter_ipv4.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// As it comes in, ahead of routing.
    Prerouting,
    /// To the router itself.
    Input,
    /// Through the router.
    Forward,
    /// From the router itself.
    Output,
    /// As it leaves.
    Postrouting,
}

impl Hook {
    /// The built-in chain's name.
    pub fn chain(self) -> &'static str {
        match self {
            Self::Prerouting => "PREROUTING",
            Self::Input => "INPUT",
            Self::Forward => "FORWARD",
            Self::Output => "OUTPUT",
            Self::Postrouting => "POSTROUTING",
        }
    }

    fn tables(self) -> &'static [&'static str] {
        match self {
            Self::Prerouting => &["raw", "mangle", "nat"],
            Self::Input => &["mangle", "filter", "security", "nat"],
            Self::Forward => &["mangle", "filter", "security"],
            Self::Output => &["raw", "mangle", "nat", "filter", "security"],
            Self::Postrouting => &["mangle", "nat"],
        }
    }
}

/// A packet on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The interface it came in by; none for the router's own.
    pub iif: Option<String>,
    /// The interface it is to leave by, once routing has said so.
    pub oif: Option<String>,
    /// Addresses and ports as they stand in it now.
    pub tuple: Tuple,
    /// Its mark.
    pub mark: u32,
    /// Which of the connection's packets it is.
    pub turn: Turn,
}

/// A packet's place in its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// The first.
    First,
    /// An answer.
    Reply,
    /// One that follows the answer.
    Later,
}

/// The connection that it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The protocol's number.
    pub protocol: u8,
    /// Addresses and ports of its first packet, as that came in.
    pub original: Tuple,
    /// Whether its destination was translated.
    pub is_dnat: bool,
    /// Whether its source was translated.
    pub is_snat: bool,
    /// Whether conntrack leaves it alone.
    pub is_untracked: bool,
    /// Its mark.
    pub mark: u32,
}

/// Where a rule stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// `iptables-nft` or `iptables-legacy`.
    pub backend: String,
    /// The table.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// Its number in the chain, from 1; 0 for the chain's policy.
    pub number: usize,
    /// The rule as iptables-save writes it behind the chain's name; the policy.
    pub text: String,
    /// The packets that it has matched so far; none for a policy.
    pub packets: Option<u64>,
}

impl Place {
    /// The command that takes the rule away.
    pub fn deletion(&self) -> String {
        format!(
            "{} -t {} -D {} {}",
            if self.backend == Backend::Legacy.to_string() {
                &self.backend
            } else {
                "iptables"
            },
            self.table,
            self.chain,
            self.text
        )
    }
}

/// `rule 3 of FORWARD in filter (iptables-nft): -j DROP`
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            backend,
            table,
            chain,
            number,
            text,
            ..
        } = self;
        match number {
            0 => write!(f, "the {text} of {chain} in {table} ({backend})"),
            _ => write!(f, "rule {number} of {chain} in {table} ({backend}): {text}"),
        }
    }
}

/// A change of a mark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MarkChange {
    /// The rule that made it.
    pub place: Place,
    /// Whether it is the connection's; else the packet's.
    pub of_connection: bool,
    /// The mark behind it.
    pub mark: u32,
}

/// What a packet met at a hook.
#[derive(Clone, Debug, Default)]
pub struct Passage {
    /// The rule or policy that dropped or rejected it.
    pub stopped: Option<Place>,
    /// The rule or policy of the filter table that let it pass.
    pub accepted: Option<Place>,
    /// The rule that translated an address.
    pub nat: Option<Place>,
    /// Changes of marks, in order.
    pub marks: Vec<MarkChange>,
    /// Rules of which it can't be told whether they match, and that would make a difference.
    pub doubts: Vec<Place>,
}

/// What the packet is judged by.
#[derive(Debug)]
pub struct Ground<'a> {
    /// The rules of each backend that has some.
    pub rulesets: &'a [(Backend, TracedRuleset)],
    /// The router's interfaces.
    pub links: &'a BTreeMap<String, Link>,
    /// A rule that is taken to match, whatever else it asks.
    pub assumed: Option<&'a Place>,
}

/// Whether a rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Match {
    Yes,
    No,
    /// It can't be told.
    Maybe,
}

/// How a chain ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    /// At its end, or by RETURN.
    Fell,
    /// No other chain of the table is asked.
    Accepted(Place),
    /// The packet goes no further.
    Stopped(Place),
}

/// Chains that call each other deeper than this are a circle, which the kernel would not have.
const DEPTH: usize = 32;

/// How many rules a packet meets in one table. Chains that call each other several times, and those
/// others in turn, can make it meet more than anybody waits for.
pub const MAX_RULES: usize = 200_000;

impl Ground<'_> {
    /// Whether an address is the router's own.
    pub fn is_own(&self, address: Ipv4Addr) -> bool {
        let mut links = self.links.values();
        address.is_loopback() || links.any(|link| link.addresses.contains(&address))
    }

    /// The address that masquerading by an interface gives: its first (`inet_select_addr`,
    /// net/ipv4/devinet.c).
    fn address_of(&self, interface: &Option<String>) -> Option<Ipv4Addr> {
        let link = self.links.get(interface.as_deref()?)?;
        link.addresses.first().copied()
    }

    /// The packet through all tables at a hook. Only a connection's first packet meets the nat table;
    /// what it made of the addresses holds for the others.
    pub fn pass(&self, hook: Hook, packet: &mut Packet, connection: &mut Connection) -> Passage {
        let mut passage = Passage::default();
        for table in hook.tables() {
            if *table == "nat" && (packet.turn != Turn::First || connection.is_untracked) {
                continue;
            }
            for (backend, ruleset) in self.rulesets {
                let Some(chain) = ruleset.chain(table, hook.chain()) else {
                    continue;
                };
                let mut walk = Walk {
                    ground: self,
                    backend: *backend,
                    ruleset,
                    table,
                    packet,
                    connection,
                    passage: &mut passage,
                    rules: 0,
                };
                let mut end = walk.chain(hook.chain(), 0);
                if end == End::Fell
                    && let Some(policy) = &chain.policy
                {
                    let place = Place {
                        backend: backend.to_string(),
                        table: (*table).to_owned(),
                        chain: hook.chain().to_owned(),
                        number: 0,
                        text: format!("policy {policy}"),
                        packets: None,
                    };
                    end = match policy.as_str() {
                        "ACCEPT" => End::Accepted(place),
                        _ => End::Stopped(place),
                    };
                }
                match end {
                    End::Stopped(place) => {
                        passage.stopped = Some(place);
                        return passage;
                    }
                    End::Accepted(place) if *table == "filter" => passage.accepted = Some(place),
                    End::Accepted(_) | End::Fell => {}
                }
                if *table == "nat" && passage.nat.is_some() {
                    break;
                }
            }
        }
        passage
    }
}

/// A packet in one table of one backend.
struct Walk<'a, 'b> {
    ground: &'a Ground<'a>,
    backend: Backend,
    ruleset: &'a TracedRuleset,
    table: &'a str,
    packet: &'b mut Packet,
    connection: &'b mut Connection,
    passage: &'b mut Passage,
    /// How many rules it has met.
    rules: usize,
}

impl Walk<'_, '_> {
    fn chain(&mut self, name: &str, depth: usize) -> End {
        let Some(chain) = self
            .ruleset
            .chain(self.table, name)
            .filter(|_| depth < DEPTH)
        else {
            return End::Fell;
        };
        for (index, rule) in chain.rules.iter().enumerate() {
            self.rules += 1;
            if self.rules > MAX_RULES {
                return End::Fell;
            }
            let matches = self.matches(rule);
            if matches == Match::No {
                continue;
            }
            let place = Place {
                backend: self.backend.to_string(),
                table: self.table.to_owned(),
                chain: name.to_owned(),
                number: index + 1,
                text: rule.spec(),
                packets: Some(rule.packets),
            };
            if matches == Match::Maybe && self.ground.assumed != Some(&place) {
                if self.makes_a_difference(rule, &mut BTreeSet::new()) {
                    self.passage.doubts.push(place);
                }
                continue;
            }
            match self.target(rule, place, depth) {
                Some(End::Fell) => return End::Fell,
                Some(end) => return end,
                None => {}
            }
        }
        End::Fell
    }

    /// Whether the rule, if it matched, would do more than count or log.
    fn makes_a_difference<'c>(
        &'c self,
        rule: &'c TracedRule,
        seen: &mut BTreeSet<&'c str>,
    ) -> bool {
        let Some(target) = rule.value("-j").or(rule.value("-g")) else {
            return false;
        };
        match self.ruleset.chain(self.table, target) {
            Some(chain) => {
                let mut rules = chain.rules.iter();
                seen.insert(target) && rules.any(|rule| self.makes_a_difference(rule, seen))
            }
            None => !is_bystander(target),
        }
    }

    /// Carries out a rule's target; none where the next rule comes.
    fn target(&mut self, rule: &TracedRule, place: Place, depth: usize) -> Option<End> {
        let (target, goes) = match (rule.value("-j"), rule.value("-g")) {
            (Some(target), _) => (target, false),
            (None, Some(target)) => (target, true),
            (None, None) => return None,
        };
        match target {
            "ACCEPT" => return Some(End::Accepted(place)),
            "DROP" | "REJECT" => return Some(End::Stopped(place)),
            "RETURN" => return Some(End::Fell),
            "NOTRACK" => self.connection.is_untracked = true,
            "CT" if rule.words.iter().any(|word| word == "--notrack") => {
                self.connection.is_untracked = true;
            }
            "MARK" => {
                if let Some(FwMark { value, mask }) =
                    rule.value("--set-xmark").and_then(FwMark::parse)
                {
                    self.packet.mark = self.packet.mark & !mask ^ value;
                    self.note(place, false);
                }
            }
            "CONNMARK" => self.connmark(rule, place),
            "DNAT" | "REDIRECT" | "SNAT" | "MASQUERADE" => {
                self.nat(rule, target);
                self.passage.nat = Some(place.clone());
                return Some(End::Accepted(place));
            }
            chain if self.ruleset.chain(self.table, chain).is_some() => {
                return match self.chain(chain, depth + 1) {
                    End::Fell if goes => Some(End::Fell),
                    End::Fell => None,
                    end => Some(end),
                };
            }
            other if !is_bystander(other) => self.passage.doubts.push(place),
            _ => {}
        }
        None
    }

    /// xt_connmark's targets (net/netfilter/xt_connmark.c, `connmark_tg_shift`).
    fn connmark(&mut self, rule: &TracedRule, place: Place) {
        let has = |option: &str| rule.words.iter().any(|word| word == option);
        let mask = |option| rule.value(option).and_then(bits).unwrap_or(u32::MAX);
        let (nfmask, ctmask) = (mask("--nfmask"), mask("--ctmask"));
        if let Some(FwMark { value, mask }) = rule.value("--set-xmark").and_then(FwMark::parse) {
            self.connection.mark = self.connection.mark & !mask ^ value;
            self.note(place, true);
        } else if has("--save-mark") {
            self.connection.mark = self.connection.mark & !ctmask ^ (self.packet.mark & nfmask);
            self.note(place, true);
        } else if has("--restore-mark") {
            self.packet.mark = self.packet.mark & !nfmask ^ (self.connection.mark & ctmask);
            self.note(place, false);
        }
    }

    fn note(&mut self, place: Place, of_connection: bool) {
        let mark = if of_connection {
            self.connection.mark
        } else {
            self.packet.mark
        };
        self.passage.marks.push(MarkChange {
            place,
            of_connection,
            mark,
        });
    }

    fn nat(&mut self, rule: &TracedRule, target: &str) {
        // A range of addresses or ports begins with the first.
        let first = |text: &str| -> (Option<Ipv4Addr>, Option<u16>) {
            let (address, port) = text.split_once(':').unwrap_or((text, ""));
            let begin = |text: &str| text.split('-').next().unwrap_or_default().to_owned();
            (begin(address).parse().ok(), begin(port).parse().ok())
        };
        let tuple = &mut self.packet.tuple;
        match target {
            "DNAT" => {
                let (address, port) = first(rule.value("--to-destination").unwrap_or_default());
                tuple.destination = address.unwrap_or(tuple.destination);
                if let (Some(ports), Some(port)) = (&mut tuple.ports, port) {
                    ports.1 = port;
                }
                self.connection.is_dnat = true;
            }
            "REDIRECT" => {
                // To the interface's own address, so to the router (nf_nat_redirect_ipv4).
                let address = self.ground.address_of(&self.packet.iif);
                tuple.destination = address.unwrap_or(Ipv4Addr::LOCALHOST);
                let port = rule
                    .value("--to-ports")
                    .map(|port| first(&format!(":{port}")));
                if let (Some(ports), Some((_, Some(port)))) = (&mut tuple.ports, port) {
                    ports.1 = port;
                }
                self.connection.is_dnat = true;
            }
            "SNAT" => {
                let (address, _) = first(rule.value("--to-source").unwrap_or_default());
                tuple.source = address.unwrap_or(tuple.source);
                self.connection.is_snat = true;
            }
            _ => {
                let address = self.ground.address_of(&self.packet.oif);
                tuple.source = address.unwrap_or(tuple.source);
                self.connection.is_snat = true;
            }
        }
    }

    fn matches(&self, rule: &TracedRule) -> Match {
        let mut words = rule.words.iter().map(String::as_str);
        let mut module = "";
        let mut result = Match::Yes;
        let mut is_negated = false;
        while let Some(word) = words.next() {
            if word == "!" {
                is_negated = true;
                continue;
            }
            let holds = match word {
                "-j" | "-g" => break,
                "-m" => {
                    module = words.next().unwrap_or_default();
                    if !MATCHES.contains(&module) {
                        result = Match::Maybe;
                    }
                    continue;
                }
                "--comment" => {
                    words.next();
                    continue;
                }
                // Two values, which only this match has.
                "--tcp-flags" => {
                    let (mask, set) = (words.next(), words.next());
                    self.tcp_flags(mask.unwrap_or_default(), set.unwrap_or_default())
                }
                "-f" => Some(false),
                option if option.starts_with('-') => {
                    if !MATCHES.contains(&module) && option.starts_with("--") {
                        continue;
                    }
                    self.option(module, option, words.next().unwrap_or_default())
                }
                // What an unknown match has behind its options.
                _ => continue,
            };
            match holds {
                Some(holds) if holds == is_negated => return Match::No,
                Some(_) => {}
                None => result = Match::Maybe,
            }
            is_negated = false;
        }
        result
    }

    /// Whether one option of a match holds; none where that can't be told.
    fn option(&self, module: &str, option: &str, value: &str) -> Option<bool> {
        let (packet, connection) = (&*self.packet, &*self.connection);
        let tuple = &packet.tuple;
        let original = &connection.original;
        let port = |ports: Option<(u16, u16)>, which: fn((u16, u16)) -> u16| {
            ports.map_or(Some(false), |ports| Some(in_ports(value, which(ports))))
        };
        let name = |interface: &Option<String>| {
            let interface = interface.as_deref().unwrap_or_default();
            match value.strip_suffix('+') {
                Some(start) => interface.starts_with(start),
                None => interface == value,
            }
        };
        match (module, option) {
            (_, "-s") => in_prefix(value, tuple.source),
            (_, "-d") => in_prefix(value, tuple.destination),
            (_, "-i") => Some(name(&packet.iif)),
            (_, "-o") => Some(name(&packet.oif)),
            (_, "-p") => match value {
                "all" | "0" | "ip" => Some(true),
                _ => Protocol::parse(value)
                    .map(Protocol::number)
                    .or_else(|| value.parse().ok())
                    .map(|number| number == connection.protocol),
            },
            ("conntrack", "--ctorigsrc") => in_prefix(value, original.source),
            ("conntrack", "--ctorigdst") => in_prefix(value, original.destination),
            ("conntrack", "--ctorigdstport") => port(original.ports, |ports| ports.1),
            ("conntrack", "--ctproto") => {
                value.parse().ok().map(|it: u8| it == connection.protocol)
            }
            ("conntrack", "--ctdir") => Some((value == "REPLY") == (packet.turn == Turn::Reply)),
            ("conntrack", "--ctstate") | ("state", "--state") => {
                Some(value.split(',').any(|state| self.state(state)))
            }
            ("mark", "--mark") => FwMark::parse(value).map(|it| packet.mark & it.mask == it.value),
            ("connmark", "--mark") => {
                FwMark::parse(value).map(|it| connection.mark & it.mask == it.value)
            }
            ("addrtype", "--dst-type") => self.address_type(value, tuple.destination),
            ("addrtype", "--src-type") => self.address_type(value, tuple.source),
            ("iprange", "--src-range") => in_range(value, tuple.source),
            ("iprange", "--dst-range") => in_range(value, tuple.destination),
            ("pkttype", "--pkt-type") => Some(value == "unicast"),
            ("tcp" | "udp" | "sctp" | "multiport", "--dport" | "--dports") => {
                port(tuple.ports, |ports| ports.1)
            }
            ("tcp" | "udp" | "sctp" | "multiport", "--sport" | "--sports") => {
                port(tuple.ports, |ports| ports.0)
            }
            // An echo, and its reply.
            ("icmp", "--icmp-type") => {
                let kind = if packet.turn == Turn::Reply { "0" } else { "8" };
                Some(value == "any" || value.split('/').next() == Some(kind))
            }
            ("multiport", "--ports") => {
                Some(port(tuple.ports, |ports| ports.0)? || port(tuple.ports, |ports| ports.1)?)
            }
            _ => None,
        }
    }

    fn state(&self, state: &str) -> bool {
        let connection = &self.connection;
        match state {
            "UNTRACKED" => connection.is_untracked,
            _ if connection.is_untracked => false,
            "NEW" => self.packet.turn == Turn::First,
            "ESTABLISHED" => self.packet.turn != Turn::First,
            "DNAT" => connection.is_dnat,
            "SNAT" => connection.is_snat,
            _ => false,
        }
    }

    /// The first packet has SYN, the reply SYN and ACK, what follows ACK.
    fn tcp_flags(&self, mask: &str, set: &str) -> Option<bool> {
        if connection_is_not(self.connection, Protocol::Tcp) {
            return Some(false);
        }
        let has = |flag: &str| match flag {
            "SYN" => self.packet.turn != Turn::Later,
            "ACK" => self.packet.turn != Turn::First,
            _ => false,
        };
        let set: Vec<&str> = set.split(',').collect();
        let mask = match mask {
            "ALL" => "FIN,SYN,RST,PSH,ACK,URG",
            mask => mask,
        };
        Some(mask.split(',').all(|flag| has(flag) == set.contains(&flag)))
    }

    fn address_type(&self, kind: &str, address: Ipv4Addr) -> Option<bool> {
        match kind {
            "LOCAL" => Some(self.ground.is_own(address)),
            "MULTICAST" => Some(address.is_multicast()),
            "BROADCAST" => Some(address.is_broadcast()),
            "UNICAST" => Some(!address.is_multicast() && !address.is_broadcast()),
            _ => None,
        }
    }
}

fn connection_is_not(connection: &Connection, protocol: Protocol) -> bool {
    connection.protocol != protocol.number()
}

/// The matches whose every option is known here, or makes a doubt.
const MATCHES: [&str; 14] = [
    "",
    "tcp",
    "udp",
    "sctp",
    "icmp",
    "multiport",
    "mark",
    "connmark",
    "conntrack",
    "state",
    "comment",
    "addrtype",
    "iprange",
    "pkttype",
];

/// Targets that neither end a packet's way nor change what decides about it (iptables-extensions(8)).
fn is_bystander(target: &str) -> bool {
    const NAMES: [&str; 16] = [
        "LOG",
        "NFLOG",
        "ULOG",
        "AUDIT",
        "TRACE",
        "TCPMSS",
        "CHECKSUM",
        "CLASSIFY",
        "DSCP",
        "TOS",
        "TTL",
        "SET",
        "CT",
        "SECMARK",
        "CONNSECMARK",
        "ECN",
    ];
    NAMES.contains(&target)
}

fn in_prefix(prefix: &str, address: Ipv4Addr) -> Option<bool> {
    let network: Ipv4Network = prefix.parse().ok()?;
    Some(network.contains(address))
}

/// `192.168.0.2-192.168.0.9`
fn in_range(range: &str, address: Ipv4Addr) -> Option<bool> {
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let (first, last): (Ipv4Addr, Ipv4Addr) = (first.parse().ok()?, last.parse().ok()?);
    Some((first..=last).contains(&address))
}

/// `80`, `27015:27030`, `22,80,8000:8010`
fn in_ports(list: &str, port: u16) -> bool {
    list.split(',').any(|item| {
        let (first, last) = item.split_once(':').unwrap_or((item, item));
        let number = |text: &str, empty| match text {
            "" => Some(empty),
            _ => text.parse().ok(),
        };
        number(first, 0)
            .zip(number(last, u16::MAX))
            .is_some_and(|(first, last): (u16, u16)| (first..=last).contains(&port))
    })
}
