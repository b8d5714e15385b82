//! The one evaluator of iptables rules: what happens to a packet at a hook of netfilter, as far as the rules tell. Pure.
//!
//! Not everything is known: a rule may ask for more than the packet (`limit`, `set`) or have a match that is not known here,
//! and of the packets that `check` traces the client is not known. So a match says yes, no or maybe. A rule that may match
//! is passed over and noted as a doubt; with [`Alternatives`], the packet is traced again with doubts assumed to come true.

mod native;
mod packet;
mod passage;
mod ruleset;

use std::net::Ipv4Addr;
use std::rc::Rc;

pub use self::native::NativeTable;
pub use self::packet::{Connection, Header, Packet, Position};
pub use self::passage::{Alternatives, Doubt, Event, MarkChange, Passage, Place, as_text};
use self::ruleset::{Chains, Selector, Side, Target, TracedChain, TracedRule, is_listed};
pub use self::ruleset::{Effect, MarkAction, TracedRuleset};
use crate::kernel::link::Links;
use crate::kernel::tools::Backend;
use crate::model::forward::PortRange;

/// A hook of netfilter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

impl Hook {
    pub fn chain(self) -> &'static str {
        match self {
            Self::Prerouting => "PREROUTING",
            Self::Input => "INPUT",
            Self::Forward => "FORWARD",
            Self::Output => "OUTPUT",
            Self::Postrouting => "POSTROUTING",
        }
    }

    /// The tables of iptables with a chain at this hook, with their priorities: the kernel asks the lowest first
    /// (`enum nf_ip_hook_priorities`, linux/netfilter_ipv4.h).
    fn tables(self) -> &'static [(i32, &'static str)] {
        match self {
            Self::Prerouting => &[(-300, "raw"), (-150, "mangle"), (-100, "nat")],
            Self::Input => &[
                (-150, "mangle"),
                (0, "filter"),
                (50, "security"),
                (100, "nat"),
            ],
            Self::Forward => &[(-150, "mangle"), (0, "filter"), (50, "security")],
            Self::Output => &[
                (-300, "raw"),
                (-150, "mangle"),
                (-100, "nat"),
                (0, "filter"),
                (50, "security"),
            ],
            Self::Postrouting => &[(-150, "mangle"), (100, "nat")],
        }
    }

    /// Where connection tracking sees the packet at this hook (`NF_IP_PRI_CONNTRACK`); before, it has no connection.
    fn tracks_at(self) -> i32 {
        match self {
            Self::Prerouting | Self::Output => -200,
            Self::Input | Self::Forward | Self::Postrouting => i32::MIN,
        }
    }
}

/// What decides about packets, apart from themselves.
#[derive(Debug)]
pub struct Context<'a> {
    /// The rules of both backends: the kernel asks both at each hook.
    pub rulesets: &'a [(Backend, TracedRuleset)],
    /// The rules of nftables that neither of them lists, which it asks as well.
    pub native: &'a [NativeTable],
    pub links: &'a Links,
    /// Doubts that are assumed to come true.
    pub assumed: Vec<Doubt>,
    /// A chain of the nat table that ends the evaluation there, as if it translated the packet.
    pub final_chain: Option<&'a str>,
}

impl Context<'_> {
    fn is_own(&self, address: Ipv4Addr) -> bool {
        let mut links = self.links.values();
        address.is_loopback() || links.any(|link| link.addresses.contains(&address))
    }

    /// The address that MASQUERADE and REDIRECT take: the interface's first (`inet_select_addr`, net/ipv4/devinet.c).
    fn address_of(&self, interface: Option<&str>) -> Option<Ipv4Addr> {
        self.links.get(interface?)?.addresses.first().copied()
    }

    /// The chains at a hook, in the order in which the kernel asks them. Of those with the same priority, it asks the one
    /// first that was made last (`nf_hook_entries_grow`, net/netfilter/core.c), which no listing tells.
    fn bases(&self, hook: Hook) -> Vec<BaseChain<'_>> {
        let iptables = hook.tables().iter().flat_map(|(priority, table)| {
            self.rulesets.iter().filter_map(move |(backend, ruleset)| {
                Some(BaseChain {
                    priority: *priority,
                    backend: *backend,
                    native: None,
                    table,
                    name: hook.chain(),
                    chains: ruleset.tables.get(*table)?,
                })
            })
        });
        let native = self.native.iter().flat_map(|table| {
            let bases = table.bases.iter().filter(|base| base.hook == hook);
            bases.map(|base| BaseChain {
                priority: base.priority,
                backend: Backend::Nft,
                native: Some(&table.name),
                table: if base.is_nat { "nat" } else { "filter" },
                name: &base.chain,
                chains: &table.chains,
            })
        });
        let mut bases: Vec<BaseChain> = iptables.chain(native).collect();
        let comes_first = |base: &BaseChain| {
            let mut assumed = self.assumed.iter();
            assumed.any(|doubt| doubt.event == Event::ComesFirst && base.has(&doubt.place))
        };
        bases.sort_by_key(|base| (base.priority, !comes_first(base)));
        bases
    }

    /// Sends a packet through all chains at a hook. Those of nat see a connection's first packet only.
    pub fn pass(&self, hook: Hook, packet: &mut Packet, connection: &mut Connection) -> Passage {
        let mut passage = Passage::default();
        let before = packet.clone();
        for base in self.bases(hook) {
            let is_nat = base.table == "nat";
            if is_nat && (packet.position != Position::First || connection.is_untracked) {
                continue;
            }
            if is_nat && passage.nat.is_some() {
                self.rival(hook, base, &before, connection, &mut passage);
                continue;
            }
            match base
                .evaluation(self, hook, packet, connection, &mut passage)
                .run()
            {
                End::Stopped(place) => {
                    passage.stopped = Some(place);
                    return passage;
                }
                End::Accepted(place) => passage.accepted.push(place),
                End::Returned => {}
            }
        }
        passage
    }

    /// Notes a rule that would translate the packet if its chain were asked before the one that has.
    fn rival(
        &self,
        hook: Hook,
        base: BaseChain,
        before: &Packet,
        connection: &Connection,
        passage: &mut Passage,
    ) {
        let is_assumed = self.assumed.iter().any(|it| it.event == Event::ComesFirst);
        let (mut packet, mut connection) = (before.clone(), connection.clone());
        packet.mark = 0;
        connection.is_dnat = false;
        let mut other = Passage::default();
        base.evaluation(self, hook, &mut packet, &mut connection, &mut other)
            .run();
        let place = other.nat.filter(|_| !is_assumed);
        passage.doubts.extend(place.map(|place| Doubt {
            place,
            event: Event::ComesFirst,
            effect: Effect::Changes,
        }));
    }
}

/// A chain that the kernel asks by itself.
#[derive(Clone, Copy)]
struct BaseChain<'a> {
    priority: i32,
    backend: Backend,
    native: Option<&'a Rc<str>>,
    table: &'static str,
    name: &'a str,
    chains: &'a Chains,
}

impl<'a> BaseChain<'a> {
    /// Whether a rule is one of this table.
    fn has(&self, place: &Place) -> bool {
        let native = place.native.as_ref();
        (place.backend, place.table, native) == (self.backend, self.table, self.native)
    }

    fn evaluation(
        self,
        context: &'a Context<'a>,
        hook: Hook,
        packet: &'a mut Packet,
        connection: &'a mut Connection,
        passage: &'a mut Passage,
    ) -> Evaluation<'a> {
        Evaluation {
            context,
            base: self,
            hook,
            packet,
            connection,
            passage,
            rules: 0,
        }
    }
}

/// How the evaluation of a chain ended.
#[derive(Debug)]
enum End {
    /// At the chain's end, or by RETURN.
    Returned,
    Accepted(Place),
    Stopped(Place),
}

/// How deep chains may jump. The kernel refuses circles; a listing could have one.
const MAX_DEPTH: usize = 32;

/// How many rules are evaluated in one table. Chains that each jump to the next more than once can make a packet meet so
/// many rules that nobody would wait for the end.
const MAX_RULES: usize = 200_000;

/// The evaluation of a packet in one chain that the kernel asks, and those that it goes to.
struct Evaluation<'a> {
    context: &'a Context<'a>,
    base: BaseChain<'a>,
    hook: Hook,
    packet: &'a mut Packet,
    connection: &'a mut Connection,
    passage: &'a mut Passage,
    /// How many rules were evaluated.
    rules: usize,
}

impl Evaluation<'_> {
    fn run(&mut self) -> End {
        let end = self.chain(self.base.name, 0);
        let chain = self.base.chains.get(self.base.name);
        let policy = chain.and_then(|chain| Some((chain, chain.policy.as_ref()?)));
        let (End::Returned, Some((chain, policy))) = (&end, policy) else {
            return end;
        };
        let place = self.place(chain, 0, policy, None);
        match policy.strip_prefix("policy ") {
            Some("ACCEPT" | "accept") => End::Accepted(place),
            _ => End::Stopped(place),
        }
    }

    fn place(
        &self,
        chain: &TracedChain,
        number: usize,
        text: &Rc<str>,
        packets: Option<u64>,
    ) -> Place {
        Place {
            backend: self.base.backend,
            native: self.base.native.cloned(),
            table: self.base.table,
            chain: Rc::clone(&chain.name),
            number,
            text: Rc::clone(text),
            packets,
        }
    }

    fn chain(&mut self, name: &str, depth: usize) -> End {
        let chain = self.base.chains.get(name).filter(|_| depth < MAX_DEPTH);
        let Some(chain) = chain else {
            return End::Returned;
        };
        for (number, rule) in (1..).zip(&chain.rules) {
            self.rules += 1;
            if self.rules > MAX_RULES {
                break;
            }
            let fits = self.fits(rule);
            if fits == Some(false) || rule.targets.iter().all(|it| *it == Target::Continue) {
                continue;
            }
            let number = rule.number.map_or(number, |handle| handle as usize);
            let place = self.place(chain, number, &rule.text, rule.packets);
            let mut assumed = self.context.assumed.iter();
            let assumed = assumed.rfind(|doubt| doubt.place == place);
            let end = match (fits, assumed.map(|doubt| doubt.event)) {
                (_, Some(Event::Accepts)) => Some(End::Accepted(place)),
                (_, Some(Event::Stops)) => Some(End::Stopped(place)),
                (None, None) => {
                    self.doubt(rule, place);
                    None
                }
                _ => {
                    let mut targets = rule.targets.iter();
                    targets.find_map(|target| self.target(rule, target, place.clone(), depth))
                }
            };
            if let Some(end) = end {
                return end;
            }
        }
        End::Returned
    }

    /// Notes what may happen at a rule, unless that makes no difference.
    fn doubt(&mut self, rule: &TracedRule, place: Place) {
        let is_undecided = rule.targets.contains(&Target::Undecided);
        let events: &[_] = match (is_undecided, rule.effect(self.base.chains)) {
            (_, Effect::None) => &[],
            (true, effect) => &[(Event::Accepts, effect), (Event::Stops, Effect::Stops)],
            (_, effect) => &[(Event::Matches, effect)],
        };
        let doubts = events.iter().map(|(event, effect)| Doubt {
            place: place.clone(),
            event: *event,
            effect: *effect,
        });
        self.passage.doubts.extend(doubts);
    }

    /// Carries out the target of a rule that matches; none where the next rule follows.
    fn target(
        &mut self,
        rule: &TracedRule,
        target: &Target,
        place: Place,
        depth: usize,
    ) -> Option<End> {
        match target {
            Target::Continue => {}
            Target::Accept => return Some(End::Accepted(place)),
            Target::Stop => return Some(End::Stopped(place)),
            Target::Return => return Some(End::Returned),
            Target::Undecided => self.doubt(rule, place),
            Target::Notrack => {
                self.connection.is_untracked = true;
                self.passage.untracked = Some(place);
            }
            Target::Mark(action) => self.mark(*action, place),
            Target::Jump(name) | Target::Goto(name)
                if self.base.table != "nat" || self.context.final_chain != Some(name) =>
            {
                match self.chain(name, depth + 1) {
                    End::Returned if matches!(target, Target::Jump(_)) => {}
                    end => return Some(end),
                }
            }
            translation => {
                self.translate(translation);
                self.passage.nat = Some(place.clone());
                return Some(End::Accepted(place));
            }
        }
        None
    }

    /// Changes an address, and the port with it. What the chain that ends the evaluation would do is not known.
    fn translate(&mut self, target: &Target) {
        let header = &mut self.packet.header;
        let is_dnat = matches!(self.hook, Hook::Prerouting | Hook::Output);
        match target {
            Target::DestinationNat(address, port) => {
                header.destination = address.or(header.destination);
                header.destination_port = port.or(header.destination_port);
            }
            Target::Redirect(port) => {
                // To the router itself (`nf_nat_redirect_ipv4`, net/netfilter/nf_nat_redirect.c).
                let address = self.context.address_of(self.packet.iif.as_deref());
                header.destination = Some(address.unwrap_or(Ipv4Addr::LOCALHOST));
                header.destination_port = port.or(header.destination_port);
            }
            Target::SourceNat(address) => header.source = address.or(header.source),
            Target::Masquerade => {
                let address = self.context.address_of(self.packet.oif.as_deref());
                header.source = address.or(header.source);
            }
            Target::NetMap(network) => {
                let address = if is_dnat {
                    &mut header.destination
                } else {
                    &mut header.source
                };
                *address = address.map(|address| (address & !network.mask()) | network.network());
            }
            _ => return,
        }
        if is_dnat {
            self.connection.is_dnat = true;
        } else {
            self.connection.is_snat = true;
        }
    }

    fn mark(&mut self, action: MarkAction, place: Place) {
        let of_connection = matches!(action, MarkAction::SetConnection(_) | MarkAction::Save(..));
        if !self.is_tracked() && !matches!(action, MarkAction::SetPacket(_)) {
            return;
        }
        let before = (self.packet.mark, self.connection.mark);
        let after = action.apply(before.0, before.1);
        (self.packet.mark, self.connection.mark) = after;
        self.passage.marks.push(MarkChange {
            place,
            action,
            of_connection,
            changed: (before.0 ^ after.0) | (before.1 ^ after.1),
            mark: if of_connection { after.1 } else { after.0 },
        });
    }

    /// Whether the packet has a connection yet.
    fn is_tracked(&self) -> bool {
        !self.is_before_tracking() && !self.connection.is_untracked
    }

    fn is_before_tracking(&self) -> bool {
        self.base.priority < self.hook.tracks_at()
    }

    /// Whether the rule matches; none where that is not known.
    fn fits(&self, rule: &TracedRule) -> Option<bool> {
        let mut fits = Some(true);
        for one in &rule.matches {
            match self.holds(&one.selector, one.is_negated) {
                Some(holds) if holds == one.is_negated => return Some(false),
                Some(_) => {}
                None => fits = None,
            }
        }
        fits
    }

    /// Whether what the option asks for is so, before negation; none where that is not known.
    fn holds(&self, selector: &Selector, is_negated: bool) -> Option<bool> {
        let (packet, connection) = (&*self.packet, &*self.connection);
        let is_reply = packet.position == Position::Reply;
        match selector {
            // Without a connection these never match, negated or not (`connmark_mt`, `conntrack_mt`,
            // net/netfilter/xt_connmark.c, xt_conntrack.c).
            Selector::ConnectionMark(_)
            | Selector::IsReply(_)
            | Selector::Address(Side::OriginalSource | Side::OriginalDestination, ..)
            | Selector::Port(Side::OriginalDestination, _)
                if !self.is_tracked() =>
            {
                Some(is_negated)
            }
            Selector::Address(_, Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST) => Some(true),
            Selector::Address(side, first, last) => {
                let address = self.side(*side).0?;
                Some((*first..=*last).contains(&address))
            }
            Selector::AddressType(side, kinds) => self.has_type(kinds, self.side(*side).0?),
            Selector::Port(side, ports) => in_ports(ports, self.side(*side).1),
            Selector::EitherPort(ports) => {
                let source = in_ports(ports, self.side(Side::Source).1);
                let destination = in_ports(ports, self.side(Side::Destination).1);
                match source {
                    Some(true) => source,
                    Some(false) => destination,
                    None => destination.filter(|is_in| *is_in),
                }
            }
            Selector::InInterface(pattern) => Some(is_interface(pattern, packet.iif.as_deref())),
            Selector::OutInterface(pattern) => Some(is_interface(pattern, packet.oif.as_deref())),
            Selector::Protocol(protocol) => connection.protocol.map(|it| Some(it) == *protocol),
            // Neither connections nor forwards have to do with fragments: conntrack puts packets together.
            Selector::Fragment => Some(false),
            Selector::TcpFlags(asked, set) => {
                connection.protocol?;
                let (flags, unknown) = match packet.position {
                    Position::First => ("SYN", ""),
                    Position::Reply => ("SYN ACK", ""),
                    Position::Later => ("ACK", "FIN PSH URG"),
                };
                let mut known = asked.iter().filter(|flag| !is_listed(unknown, flag));
                if known.any(|flag| is_listed(flags, flag) != set.contains(flag)) {
                    return Some(false);
                }
                let is_known = !asked.iter().any(|flag| is_listed(unknown, flag));
                is_known.then_some(true)
            }
            // An echo and its reply.
            Selector::IcmpType(kind) => {
                let echo = if is_reply { 0 } else { 8 };
                Some(kind.is_none_or(|kind| kind == echo))
            }
            Selector::Mark(mark) => Some(mark.matches(packet.mark)),
            Selector::ConnectionMark(mark) => Some(mark.matches(connection.mark)),
            Selector::State(states) => Some(states.iter().any(|state| self.is_in_state(state))),
            Selector::IsReply(asked) => Some(*asked == is_reply),
            Selector::IsUnicast(is_unicast) => Some(*is_unicast),
            Selector::IsIpv4(is_ipv4) => Some(*is_ipv4),
            Selector::Any(selectors) => {
                let mut all = selectors.iter().map(|it| self.holds(it, is_negated));
                let mut is_known = true;
                let holds = all.any(|holds| {
                    is_known &= holds.is_some();
                    holds == Some(true)
                });
                (holds || is_known).then_some(holds)
            }
            Selector::All(selectors) => {
                let mut all = selectors.iter().map(|it| self.holds(it, is_negated));
                let mut is_known = true;
                let fails = all.any(|holds| {
                    is_known &= holds.is_some();
                    holds == Some(false)
                });
                (fails || is_known).then_some(!fails)
            }
            Selector::Unknown => None,
        }
    }

    /// The address and port of a side.
    fn side(&self, side: Side) -> (Option<Ipv4Addr>, Option<u16>) {
        let (header, original) = (&self.packet.header, &self.connection.original);
        match side {
            Side::Source => (header.source, header.source_port),
            Side::Destination => (header.destination, header.destination_port),
            Side::OriginalSource => (original.source, original.source_port),
            Side::OriginalDestination => (original.destination, original.destination_port),
        }
    }

    fn is_in_state(&self, state: &str) -> bool {
        let connection = &self.connection;
        let is_first = self.packet.position == Position::First;
        match state {
            "UNTRACKED" => connection.is_untracked,
            _ if connection.is_untracked => false,
            _ if self.is_before_tracking() => state == "INVALID",
            "NEW" => is_first,
            "ESTABLISHED" => !is_first,
            "DNAT" => connection.is_dnat,
            "SNAT" => connection.is_snat,
            // No packet that is traced here is invalid, or begins a connection that another one announced.
            _ => false,
        }
    }

    /// Whether the kernel routes the address as one of these types; that of subnets' broadcast addresses is not known.
    fn has_type(&self, kinds: &[String], address: Ipv4Addr) -> Option<bool> {
        let kind = if self.context.is_own(address) {
            "LOCAL"
        } else if address.is_multicast() {
            "MULTICAST"
        } else if address.is_broadcast() {
            "BROADCAST"
        } else {
            "UNICAST"
        };
        let known = "LOCAL MULTICAST BROADCAST UNICAST UNSPEC ANYCAST";
        let has = kinds.iter().any(|it| it == kind);
        (has || kinds.iter().all(|it| is_listed(known, it))).then_some(has)
    }
}

/// Whether an interface has this name, or begins as a pattern with `+` at its end.
pub fn is_interface(pattern: &str, interface: Option<&str>) -> bool {
    let interface = interface.unwrap_or_default();
    match pattern.strip_suffix('+') {
        Some(start) => interface.starts_with(start),
        None => interface == pattern,
    }
}

fn in_ports(ranges: &[PortRange], port: Option<u16>) -> Option<bool> {
    let port = port?;
    Some(ranges.iter().any(|range| range.contains(port)))
}
