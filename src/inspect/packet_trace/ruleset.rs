//! The rules of iptables-save, taken apart once: matches and targets as types. What is not known here, of a match or a
//! target, becomes [`Selector::Unknown`] or [`Target::Undecided`] (iptables-extensions(8)).

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;
use std::rc::Rc;
use std::str::FromStr;

use ipnetwork::Ipv4Network;

use crate::kernel::iptables_save::{self, Ruleset};
use crate::model::forward::{PortRange, Protocol};
use crate::model::netfilter::Rule;
use crate::model::route::{FwMark, bits};

/// The chains of a table, by name.
pub type Chains = BTreeMap<String, TracedChain>;

/// The tables of one backend.
#[derive(Clone, Debug, Default)]
pub struct TracedRuleset {
    pub tables: BTreeMap<String, Chains>,
}

#[derive(Clone, Debug)]
pub struct TracedChain {
    pub name: Rc<str>,
    /// `policy DROP`; none for a user-defined chain.
    pub policy: Option<Rc<str>>,
    pub rules: Vec<TracedRule>,
    /// The effect of a rule that jumps here.
    effect: Effect,
}

impl TracedChain {
    /// A chain whose effect is not known yet.
    pub fn new(name: &str, policy: Option<&str>, rules: Vec<TracedRule>) -> Self {
        Self {
            name: name.into(),
            policy: policy.map(Rc::from),
            rules,
            effect: Effect::None,
        }
    }
}

#[derive(Clone, Debug)]
pub struct TracedRule {
    /// The handle of a rule of nftables; none for one of iptables, which goes by its place.
    pub number: Option<u64>,
    /// The number of packets that matched the rule, where they are counted.
    pub packets: Option<u64>,
    /// The rule as iptables-save writes it, without `-A CHAIN`, or as nft writes it.
    pub text: Rc<str>,
    pub matches: Vec<Match>,
    /// What is done one after the other: one thing with iptables, several with nftables.
    pub targets: Vec<Target>,
}

/// One condition of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Match {
    /// Whether a `!` comes before the option.
    pub is_negated: bool,
    pub selector: Selector,
}

impl Match {
    pub fn of(selector: Selector) -> Self {
        let is_negated = false;
        Self {
            is_negated,
            selector,
        }
    }
}

/// An option of a match, with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    /// One of these, from the first to the last.
    Address(Side, Ipv4Addr, Ipv4Addr),
    AddressType(Side, Vec<String>),
    Port(Side, Vec<PortRange>),
    EitherPort(Vec<PortRange>),
    InInterface(String),
    OutInterface(String),
    /// None for a protocol that no forward can have.
    Protocol(Option<Protocol>),
    /// `-f`: a fragment other than the first.
    Fragment,
    /// Those of the first flags that are set are the second ones.
    TcpFlags(Vec<&'static str>, Vec<&'static str>),
    /// None for any type.
    IcmpType(Option<u8>),
    Mark(FwMark),
    ConnectionMark(FwMark),
    State(Vec<String>),
    IsReply(bool),
    /// Whether `--pkt-type` asks for packets to this host alone.
    IsUnicast(bool),
    IsIpv4(bool),
    /// One of these at least.
    Any(Vec<Selector>),
    /// All of these.
    All(Vec<Selector>),
    /// Depends on more than the packet and its connection (`set`, `limit`), or is not known here.
    Unknown,
}

/// A side of the packet as it is now, or of the connection's first packet as it came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Source,
    Destination,
    OriginalSource,
    OriginalDestination,
}

/// What a rule does with a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Goes on with the next rule: no target, or one that changes nothing that decides about the packet (`LOG`).
    Continue,
    /// No other rule of the table is asked.
    Accept,
    /// Drops, rejects or swallows the packet.
    Stop,
    /// Leaves the chain.
    Return,
    /// Exempts the packet from connection tracking.
    Notrack,
    /// Changes a mark.
    Mark(MarkAction),
    /// Translates the destination: the address and port, as far as they change. The first of a range stands for all.
    DestinationNat(Option<Ipv4Addr>, Option<u16>),
    /// Translates the destination to this router, at this port.
    Redirect(Option<u16>),
    /// Translates the source.
    SourceNat(Option<Ipv4Addr>),
    /// Translates the source to an address of the interface that the packet leaves by.
    Masquerade,
    /// Translates the network's part of an address: of the destination, or after routing, of the source.
    NetMap(Ipv4Network),
    /// Goes to a user-defined chain (`-j`), and comes back at its end.
    Jump(String),
    /// Goes to a user-defined chain (`-g`), at whose end this chain ends too.
    Goto(String),
    /// A program accepts or drops the packet (`NFQUEUE`), or the target is not known here.
    Undecided,
}

/// What changes a mark: MARK for the packet's, CONNMARK for the connection's and for copies between both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MarkAction {
    /// Clears the bits in `mask` of the packet's mark, then XORs `value` (`--set-xmark`).
    SetPacket(FwMark),
    /// Does so with the connection's mark.
    SetConnection(FwMark),
    /// Copies the bits in `nfmask` of the packet's mark to the connection, where those in `ctmask` are cleared before:
    /// `nfmask`, `ctmask` (`--save-mark`).
    Save(u32, u32),
    /// Copies the bits in `ctmask` of the connection's mark to the packet, where those in `nfmask` are cleared before:
    /// `nfmask`, `ctmask` (`--restore-mark`).
    Restore(u32, u32),
}

/// What a rule can do to a packet, at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effect {
    /// Nothing that decides about the packet.
    None,
    /// Stops the packet.
    Stops,
    /// Keeps the packet from the rules that follow.
    Passes,
    /// Changes the packet or the connection.
    Changes,
}

impl TracedRuleset {
    /// Takes the rules of a listing apart.
    pub fn new(ruleset: &Ruleset) -> Self {
        let tables = ruleset.tables.iter();
        let tables = tables.map(|(table, chains)| (table.clone(), trace_chains(chains)));
        Self {
            tables: tables.collect(),
        }
    }
}

fn trace_chains(chains: &BTreeMap<String, iptables_save::Chain>) -> Chains {
    let traced = chains.iter().map(|(name, chain)| {
        let policy = chain.policy.as_ref();
        let policy = policy.map(|policy| format!("policy {policy}"));
        let rules = chain.rules.iter().zip(&chain.counters);
        let rules = rules.map(|(rule, counter)| TracedRule::new(rule, counter.packets, chains));
        let traced = TracedChain::new(name, policy.as_deref(), rules.collect());
        (name.clone(), traced)
    });
    with_effects(traced.collect())
}

/// The chains of a table, with what a jump to each can do.
pub fn with_effects(mut traced: Chains) -> Chains {
    // A chain's effect is known once those of the chains that it goes to are.
    loop {
        let effects = traced.values().map(|chain| {
            let rules = chain.rules.iter().map(|rule| rule.effect(&traced));
            rules.max().unwrap_or(Effect::None)
        });
        let effects: Vec<Effect> = effects.collect();
        let mut has_changed = false;
        for (chain, effect) in traced.values_mut().zip(effects) {
            has_changed |= chain.effect != effect;
            chain.effect = effect;
        }
        if !has_changed {
            return traced;
        }
    }
}

impl TracedRule {
    fn new(rule: &Rule, packets: u64, chains: &BTreeMap<String, iptables_save::Chain>) -> Self {
        let words = rule.words();
        let (matches, rest) = parse_matches(&words);
        let target = match rest {
            [flag, name, options @ ..] => {
                let chain = || match (chains.contains_key(name), &flag[..]) {
                    (false, _) => Target::Undecided,
                    (true, "-g") => Target::Goto(name.clone()),
                    (true, _) => Target::Jump(name.clone()),
                };
                parse_target(name, &Options(options)).unwrap_or_else(chain)
            }
            _ => Target::Continue,
        };
        Self {
            number: None,
            packets: Some(packets),
            text: rule.to_string().into(),
            matches,
            targets: vec![target],
        }
    }

    /// What the rule can do to a packet that it matches.
    pub fn effect(&self, chains: &Chains) -> Effect {
        let effect_of = |name| chains.get(name).map_or(Effect::None, |chain| chain.effect);
        let effects = self.targets.iter().map(|target| match target {
            Target::Continue => Effect::None,
            Target::Jump(name) => effect_of(name),
            Target::Goto(name) => effect_of(name).max(Effect::Passes),
            Target::Stop => Effect::Stops,
            Target::Accept | Target::Return | Target::Undecided => Effect::Passes,
            _ => Effect::Changes,
        });
        effects.max().unwrap_or(Effect::None)
    }
}

/// The matches of a rule, and the words from `-j` or `-g` on.
fn parse_matches(words: &[String]) -> (Vec<Match>, &[String]) {
    let mut matches = Vec::new();
    let mut module = "";
    let mut is_negated = false;
    let mut rest = words;
    while let [word, values @ ..] = rest {
        let value = values.first().map_or("", String::as_str);
        let (selector, length) = match word.as_str() {
            "-j" | "-g" => break,
            "!" => {
                is_negated = true;
                rest = values;
                continue;
            }
            "-m" => {
                module = value;
                let is_known = is_listed(MODULES, module);
                (Some(Selector::Unknown).filter(|_| !is_known), 2)
            }
            // Texts, which can look like options.
            "--comment" | "--string" | "--hex-string" => (None, 2),
            "-f" => (Some(Selector::Fragment), 1),
            "--tcp-flags" => {
                let set = values.get(1).map_or("", String::as_str);
                let flags = Selector::TcpFlags(tcp_flags(value), tcp_flags(set));
                (Some(flags), 3)
            }
            option if option.starts_with('-') => match selector(module, option, value) {
                Some(selector) => (Some(selector), 2),
                // How many values come after it is not known.
                None => (Some(Selector::Unknown), 1),
            },
            // A value of an option that is not known.
            _ => (None, 1),
        };
        matches.extend(selector.map(|selector| Match {
            is_negated,
            selector,
        }));
        is_negated = false;
        rest = rest.get(length..).unwrap_or_default();
    }
    (matches, rest)
}

/// Matches whose options are known here; any other option of theirs is [`Selector::Unknown`].
const MODULES: &str =
    "tcp udp sctp icmp multiport mark connmark conntrack state comment addrtype iprange pkttype";

/// Targets that neither end a packet's way nor change what decides about the packet.
const BYSTANDERS: &str = "LOG NFLOG ULOG AUDIT TRACE TCPMSS TCPOPTSTRIP CHECKSUM CLASSIFY DSCP TOS TTL ECN SET CT SECMARK \
                          CONNSECMARK TEE RATEEST IDLETIMER LED ACCOUNT";

pub(super) fn is_listed(names: &str, name: &str) -> bool {
    names.split(' ').any(|it| it == name)
}

/// An option with one value; none where it is not known here.
fn selector(module: &str, option: &str, value: &str) -> Option<Selector> {
    use Side::{Destination, OriginalDestination, OriginalSource, Source};
    let list = || value.split(',').map(str::to_owned).collect();
    let network = |side| {
        let network: Ipv4Network = value.parse().ok()?;
        let (first, last) = (network.network(), network.broadcast());
        Some(Selector::Address(side, first, last))
    };
    // `192.168.0.2-192.168.0.9`
    let range = |side| {
        let (first, last) = value.split_once('-').unwrap_or((value, value));
        let (first, last) = (first.parse().ok()?, last.parse().ok()?);
        Some(Selector::Address(side, first, last))
    };
    Some(match (module, option) {
        (_, "-s") => network(Source)?,
        (_, "-d") => network(Destination)?,
        (_, "-i") => Selector::InInterface(value.to_owned()),
        (_, "-o") => Selector::OutInterface(value.to_owned()),
        // Another name of /etc/protocols is another protocol.
        (_, "-p") | ("conntrack", "--ctproto") => Selector::Protocol(Protocol::parse_rule(value)),
        ("tcp" | "udp" | "sctp" | "multiport", "--sport" | "--sports") => {
            Selector::Port(Source, ports(value)?)
        }
        ("tcp" | "udp" | "sctp" | "multiport", "--dport" | "--dports") => {
            Selector::Port(Destination, ports(value)?)
        }
        ("multiport", "--ports") => Selector::EitherPort(ports(value)?),
        ("icmp", "--icmp-type") if value == "any" => Selector::IcmpType(None),
        ("icmp", "--icmp-type") => Selector::IcmpType(Some(value.split('/').next()?.parse().ok()?)),
        ("mark", "--mark") => Selector::Mark(FwMark::parse(value)?),
        ("connmark", "--mark") => Selector::ConnectionMark(FwMark::parse(value)?),
        ("conntrack", "--ctstate") | ("state", "--state") => Selector::State(list()),
        ("conntrack", "--ctdir") => Selector::IsReply(value == "REPLY"),
        ("conntrack", "--ctorigsrc") => network(OriginalSource)?,
        ("conntrack", "--ctorigdst") => network(OriginalDestination)?,
        ("conntrack", "--ctorigdstport") => Selector::Port(OriginalDestination, ports(value)?),
        ("addrtype", "--src-type") => Selector::AddressType(Source, list()),
        ("addrtype", "--dst-type") => Selector::AddressType(Destination, list()),
        ("iprange", "--src-range") => range(Source)?,
        ("iprange", "--dst-range") => range(Destination)?,
        ("pkttype", "--pkt-type") => Selector::IsUnicast(value == "unicast"),
        _ => return None,
    })
}

/// `80`, `8000:8010`, `8000:`, `22,80,8000:8010`
fn ports(list: &str) -> Option<Vec<PortRange>> {
    let number = |text: &str, open| match text {
        "" => Some(open),
        _ => text.parse().ok(),
    };
    let ranges = list.split(',').map(|item| {
        let (first, last) = item.split_once(':').unwrap_or((item, item));
        Some(PortRange {
            first: number(first, 0)?,
            last: number(last, u16::MAX)?,
        })
    });
    ranges.collect()
}

/// `FIN,SYN,RST,ACK`, `ALL`, `NONE`
fn tcp_flags(list: &str) -> Vec<&'static str> {
    let mut flags = vec!["FIN", "SYN", "RST", "PSH", "ACK", "URG"];
    flags.retain(|flag| list == "ALL" || list.split(',').any(|it| it == *flag));
    flags
}

/// The words after a target.
struct Options<'a>(&'a [String]);

impl<'a> Options<'a> {
    fn has(&self, option: &str) -> bool {
        self.0.iter().any(|word| word == option)
    }

    fn value(&self, option: &str) -> Option<&'a str> {
        let at = self.0.iter().position(|word| word == option)?;
        self.0.get(at + 1).map(String::as_str)
    }

    fn bits(&self, option: &str) -> Option<u32> {
        bits(self.value(option)?)
    }

    /// What MARK and CONNMARK set, in whatever notation, as value and mask of `--set-xmark`.
    fn set_mark(&self) -> Option<FwMark> {
        let set = |value, mask| Some(FwMark { value, mask });
        if let Some(text) = self.value("--set-xmark") {
            FwMark::parse(text)
        } else if let Some(text) = self.value("--set-mark") {
            let FwMark { value, mask } = FwMark::parse(text)?;
            set(value, mask | value)
        } else if let Some(and) = self.bits("--and-mark") {
            set(0, !and)
        } else if let Some(or) = self.bits("--or-mark") {
            set(or, or)
        } else {
            set(self.bits("--xor-mark")?, 0)
        }
    }

    /// A target of CONNMARK that copies marks. One that shifts them is not known here.
    fn copy_mark(&self) -> Option<MarkAction> {
        if self.has("--left-shift-mark") || self.has("--right-shift-mark") {
            return None;
        }
        let mask = |option| match self.value(option).or(self.value("--mask")) {
            Some(text) => bits(text),
            None => Some(u32::MAX),
        };
        let (nfmask, ctmask) = (mask("--nfmask")?, mask("--ctmask")?);
        let save = MarkAction::Save(nfmask, ctmask);
        let restore = MarkAction::Restore(nfmask, ctmask);
        let save = self.has("--save-mark").then_some(save);
        save.or(self.has("--restore-mark").then_some(restore))
    }

    /// `192.168.0.2`, `192.168.0.2-192.168.0.9:8000-8010`, `:8000`: the first address and port.
    fn address(&self, option: &str) -> (Option<Ipv4Addr>, Option<u16>) {
        let text = self.value(option).unwrap_or_default();
        let (addresses, ports) = text.split_once(':').unwrap_or((text, ""));
        (first(addresses), first(ports))
    }
}

/// The first of a range such as `8000-8010`.
fn first<T: FromStr>(range: &str) -> Option<T> {
    range.split(['-', '/']).next()?.parse().ok()
}

/// A target by name; none for a chain, and for what is not known here.
fn parse_target(name: &str, options: &Options) -> Option<Target> {
    Some(match name {
        "ACCEPT" => Target::Accept,
        "DROP" | "REJECT" | "TARPIT" | "STEAL" => Target::Stop,
        "RETURN" => Target::Return,
        "NOTRACK" => Target::Notrack,
        "CT" if options.has("--notrack") => Target::Notrack,
        "MARK" => Target::Mark(MarkAction::SetPacket(options.set_mark()?)),
        "CONNMARK" => Target::Mark(match options.set_mark() {
            Some(set) => MarkAction::SetConnection(set),
            None => options.copy_mark()?,
        }),
        "DNAT" => {
            let (address, port) = options.address("--to-destination");
            Target::DestinationNat(address, port)
        }
        "REDIRECT" => Target::Redirect(options.value("--to-ports").and_then(first)),
        "SNAT" => Target::SourceNat(options.address("--to-source").0),
        "MASQUERADE" => Target::Masquerade,
        "NETMAP" => Target::NetMap(options.value("--to")?.parse().ok()?),
        _ if is_listed(BYSTANDERS, name) => Target::Continue,
        _ => return None,
    })
}

impl MarkAction {
    /// Both marks after the action: the packet's, and the connection's (`connmark_tg_shift`, `mark_tg`,
    /// net/netfilter/xt_connmark.c, xt_mark.c).
    pub fn apply(self, packet: u32, connection: u32) -> (u32, u32) {
        let set = |old: u32, FwMark { value, mask }| old & !mask ^ value;
        match self {
            Self::SetPacket(mark) => (set(packet, mark), connection),
            Self::SetConnection(mark) => (packet, set(connection, mark)),
            Self::Save(nfmask, ctmask) => (packet, connection & !ctmask ^ (packet & nfmask)),
            Self::Restore(nfmask, ctmask) => (packet & !nfmask ^ (connection & ctmask), connection),
        }
    }

    /// The same action that leaves these bits as they are.
    pub fn without(self, bits: u32) -> Self {
        let set = |FwMark { value, mask }| FwMark {
            value: value & !bits,
            mask: mask & !bits,
        };
        match self {
            Self::SetPacket(mark) => Self::SetPacket(set(mark)),
            Self::SetConnection(mark) => Self::SetConnection(set(mark)),
            Self::Save(nfmask, ctmask) => Self::Save(nfmask & !bits, ctmask & !bits),
            Self::Restore(nfmask, ctmask) => Self::Restore(nfmask & !bits, ctmask & !bits),
        }
    }
}

/// `-j CONNMARK --set-xmark 0xa/0xff`
impl fmt::Display for MarkAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (option, nfmask, ctmask) = match self {
            Self::SetPacket(mark) => return write!(f, "-j MARK --set-xmark {mark}"),
            Self::SetConnection(mark) => return write!(f, "-j CONNMARK --set-xmark {mark}"),
            Self::Save(nfmask, ctmask) => ("--save-mark", nfmask, ctmask),
            Self::Restore(nfmask, ctmask) => ("--restore-mark", nfmask, ctmask),
        };
        write!(
            f,
            "-j CONNMARK {option} --nfmask {nfmask:#x} --ctmask {ctmask:#x}"
        )
    }
}
