//! Traces one connection: the first request, the reply, and one more packet each way, from hook to hook. The kernel answers
//! for routes and reverse path filtering, `packet_trace` for iptables.

use std::net::Ipv4Addr;

use anyhow::{Error, Result};
use ipnetwork::Ipv4Network;

use crate::config::{Config, Uplink};
use crate::inspect::explain::{Aim, Direction, Hop, Question};
use crate::inspect::packet_trace::{
    Connection, Context, Doubt, Header, Hook, MarkChange, Packet, Passage, Place, Position,
    is_interface,
};
use crate::inspect::snapshot::{Comparison, Snapshot};
use crate::kernel::conntrack::Tuple;
use crate::kernel::ip::RouteLookup;
use crate::kernel::link::Link;
use crate::model::forward::Protocol;
use crate::model::names::UplinkName;
use crate::model::route::{RouteRule, TableId};

/// A port that Linux gives to clients (`ip_local_port_range`).
const CLIENT_PORT: u16 = 50000;

/// What all traces for one question have in common.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    pub snapshot: &'a Snapshot,
    pub config: &'a Config,
    pub comparison: &'a Comparison,
    pub question: &'a Question,
}

impl<'a> Inputs<'a> {
    /// Traces the connection, with doubts that are assumed to come true.
    /// Errors: the kernel can't be asked.
    pub fn trace(self, assumed: &[Doubt]) -> Result<Trace<'a>> {
        let mut trace = Trace {
            inputs: self,
            context: Context {
                rulesets: &self.snapshot.rulesets,
                links: &self.snapshot.kernel.links,
                assumed: assumed.to_vec(),
                final_chain: None,
            },
            uplink: None,
            asked: None,
            direction: Direction::There,
            hops: Vec::new(),
            marks: Vec::new(),
            untracked: None,
            doubts: Vec::new(),
            caveats: Vec::new(),
            end: Ok(String::new()),
        };
        trace.end = match trace.run() {
            Ok(sentence) => Ok(sentence),
            Err(Stop::Failure(failure)) => Err(failure),
            Err(Stop::Error(error)) => return Err(error),
        };
        Ok(trace)
    }
}

/// Where and why a packet is lost.
#[derive(Debug)]
pub struct Failure {
    pub why: String,
    /// Commands, or lines of the configuration, that fix it.
    pub fixes: Vec<String>,
}

/// Why a trace ends early.
pub(super) enum Stop {
    Failure(Failure),
    /// The kernel could not be asked.
    Error(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

pub(super) fn fail<T>(why: impl Into<String>, fixes: Vec<String>) -> Result<T, Stop> {
    let why = why.into();
    Err(Stop::Failure(Failure { why, fixes }))
}

/// The trace of a connection, hop by hop.
#[derive(Debug)]
pub struct Trace<'a> {
    pub(super) inputs: Inputs<'a>,
    context: Context<'a>,
    /// The uplink whose address is asked.
    pub uplink: Option<UplinkName>,
    /// The address that is asked.
    pub asked: Option<Ipv4Addr>,
    pub(super) direction: Direction,
    /// What happened, in order.
    pub hops: Vec<Hop>,
    pub(super) marks: Vec<MarkChange>,
    /// The rule that exempts the connection from tracking.
    pub(super) untracked: Option<Place>,
    /// What may happen instead.
    pub doubts: Vec<Doubt>,
    /// What may be different for some packets.
    pub caveats: Vec<String>,
    /// The outcome in a sentence, or the failure.
    pub end: Result<String, Failure>,
}

impl<'a> Trace<'a> {
    fn run(&mut self) -> Result<String, Stop> {
        match &self.inputs.question.aim {
            Aim::Uplink(name) => self.ask_uplink(name),
            Aim::Address(address) => self.ask_address(*address),
            Aim::FromLan(destination) => self.by_lan_host(*destination),
        }
    }

    fn ask_uplink(&mut self, name: &UplinkName) -> Result<String, Stop> {
        self.uplink = Some(name.clone());
        if let Some(Some(link)) = self.inputs.comparison.links.get(name) {
            self.asked = Some(link.address);
            return self.by_client(link.interface.as_str(), link.address);
        }
        let identity = &self.inputs.config.uplinks[name].identity;
        let Some(interface) = &identity.interface else {
            return fail(
                format!("{name} has no link: no installed entry tells which interface it uses"),
                vec![format!("dial it, or: mh-hook up IFNAME --uplink {name}")],
            );
        };
        let how = match self.link(interface.as_str()) {
            None => "does not exist",
            Some(link) if !link.up => "is down",
            Some(_) => "has no address that installed entries are for",
        };
        fail(
            format!("{name} has no link: {interface} {how}"),
            vec![format!("dial it, then: mh-hook up {interface}")],
        )
    }

    fn ask_address(&mut self, address: Ipv4Addr) -> Result<String, Stop> {
        self.asked = Some(address);
        let mut links = self.inputs.snapshot.kernel.links.iter();
        let Some((interface, _)) = links.find(|(_, link)| link.addresses.contains(&address)) else {
            return fail(
                format!("no link of this router has the address {address}"),
                Vec::new(),
            );
        };
        self.uplink = self.uplink_of(interface);
        self.by_client(interface, address)
    }

    /// A client's request that comes in by a link, and the reply.
    fn by_client(&mut self, interface: &str, address: Ipv4Addr) -> Result<String, Stop> {
        let (mut packet, mut connection) = self.begin(interface, address);
        let owner = match &self.uplink {
            Some(name) => format!(", the link of {name}"),
            None => ", which is no uplink's".to_owned(),
        };
        self.hop("in", format!("by {interface}{owner}"), None);
        let way = self.come_in(&mut packet, &mut connection)?;
        if way.is_local {
            return self.own_service(packet, connection, interface);
        }
        self.pass_through(&way, &mut packet, &mut connection)?;
        let tuple = packet.header.tuple()?;
        let server = host(tuple);
        if let Some(uplink) = self.uplink_of(&way.dev) {
            return fail(
                format!(
                    "{server} is not on the LAN: the route to it is by {}, the link of {uplink}",
                    way.dev
                ),
                vec![format!(
                    "to = \"…\": the address of a LAN host; see ip route get {}",
                    tuple.destination
                )],
            );
        }
        self.hop("out", format!("by {} to {server}", way.dev), None);
        self.neighbour(&way, tuple.destination)?;
        self.unanswered(tuple)?;
        self.earlier_connections(connection.original.tuple()?, tuple)?;

        let mut reply = self.reply_to(&packet, Some(way.dev.clone()));
        self.hop("in", format!("by {} from {server}", way.dev), None);
        let back = self.come_back(&mut reply, &mut connection)?;
        self.pass_through(&back, &mut reply, &mut connection)?;
        let sentence = self.leave(&back, &reply, &connection, interface)?;
        self.go_on(&packet, &mut connection, interface)?;
        Ok(sentence)
    }

    /// A request to the router itself, and the reply.
    fn own_service(
        &mut self,
        mut packet: Packet,
        mut connection: Connection,
        interface: &str,
    ) -> Result<String, Stop> {
        self.pass(Hook::Input, &mut packet, &mut connection)?;
        self.listens(packet.header.tuple()?, &connection)?;
        self.hop("host", "this router itself answers", None);

        let mut reply = self.reply_to(&packet, None);
        let mut back = self.route(&reply)?;
        reply.oif = Some(back.dev.clone());
        let mark = reply.mark;
        self.pass(Hook::Output, &mut reply, &mut connection)?;
        if reply.mark != mark {
            // A packet whose mark changes in OUTPUT is routed again (`ipt_mangle_out`, net/ipv4/netfilter/iptable_mangle.c).
            back = self.route(&reply)?;
            reply.oif = Some(back.dev.clone());
        }
        self.report_route(&reply, &back)?;
        self.pass(Hook::Postrouting, &mut reply, &mut connection)?;
        self.leave(&back, &reply, &connection, interface)
    }

    /// A LAN host's own request, and the reply.
    fn by_lan_host(&mut self, destination: Ipv4Addr) -> Result<String, Stop> {
        self.asked = Some(destination);
        let host_address = self.inputs.question.source;
        let interface = match self.inputs.snapshot.route_get(&host_address.to_string())? {
            Ok(way) if self.leads_to_lan(&way) => way.dev,
            Ok(way) => {
                return fail(
                    format!(
                        "{host_address} is not on the LAN: this router reaches it by {}",
                        way.dev
                    ),
                    Vec::new(),
                );
            }
            Err(words) => {
                return fail(
                    format!("this router has no route to {host_address}: {words}"),
                    Vec::new(),
                );
            }
        };
        let (mut packet, mut connection) = self.begin(&interface, destination);
        self.hop("in", format!("by {interface} from {host_address}"), None);
        let way = self.come_in(&mut packet, &mut connection)?;
        if way.is_local {
            return self.own_service(packet, connection, &interface);
        }
        self.pass_through(&way, &mut packet, &mut connection)?;
        let tuple = packet.header.tuple()?;
        let source = tuple.source;
        let server = host(tuple);
        let as_whom = if connection.is_snat {
            format!(" as {source}")
        } else {
            String::new()
        };
        self.hop("out", format!("by {} to {server}{as_whom}", way.dev), None);
        if self.leads_to_lan(&way) {
            self.neighbour(&way, tuple.destination)?;
            if way.dev == interface && connection.is_dnat && !connection.is_snat {
                return fail(
                    format!(
                        "{} answers {host_address} directly, with a source that {host_address} did not ask",
                        tuple.destination
                    ),
                    self.fixes(&[]),
                );
            }
        } else if self
            .link(&way.dev)
            .is_none_or(|link| !link.addresses.contains(&source))
        {
            let uplink = self.uplink_of(&way.dev);
            let fixes = match &uplink {
                Some(name) if !self.inputs.config.uplinks[name].masquerade => {
                    vec![format!("[uplink.{name}] masquerade = true")]
                }
                _ => self.fixes(&[]),
            };
            return fail(
                format!(
                    "it leaves by {} with the source {source}, which is not an address of that link: the provider drops it",
                    way.dev
                ),
                fixes,
            );
        }

        let mut reply = self.reply_to(&packet, Some(way.dev.clone()));
        self.hop("in", format!("by {} from {server}", way.dev), None);
        let back = self.come_back(&mut reply, &mut connection)?;
        self.pass_through(&back, &mut reply, &mut connection)?;
        let sentence = self.leave(&back, &reply, &connection, &interface)?;
        self.go_on(&packet, &mut connection, &interface)?;
        Ok(sentence)
    }

    /// One more packet each way: other rules may match, and marks may have changed. Reported only if one is lost.
    fn go_on(
        &mut self,
        first: &Packet,
        connection: &mut Connection,
        interface: &str,
    ) -> Result<(), Stop> {
        let reported = self.hops.len();
        self.direction = Direction::Later;
        let mut packet = Packet {
            oif: None,
            header: connection.original,
            mark: 0,
            position: Position::Later,
            ..first.clone()
        };
        self.pass(Hook::Prerouting, &mut packet, connection)?;
        // conntrack translates the destination as it did for the first packet.
        packet.header.destination = first.header.destination;
        packet.header.destination_port = first.header.destination_port;
        let way = self.route(&packet)?;
        self.report_route(&packet, &way)?;
        self.pass_through(&way, &mut packet, connection)?;
        let mut reply = self.reply_to(first, Some(way.dev));
        let back = self.come_back(&mut reply, connection)?;
        self.pass_through(&back, &mut reply, connection)?;
        self.leave(&back, &reply, connection, interface)?;
        self.hops.truncate(reported);
        Ok(())
    }

    /// The first packet, as it comes in by an interface.
    fn begin(&self, interface: &str, destination: Ipv4Addr) -> (Packet, Connection) {
        let Question {
            source, service, ..
        } = self.inputs.question;
        let header = Header {
            source: Some(*source),
            destination: Some(destination),
            source_port: service.port.map(|_| CLIENT_PORT),
            destination_port: service.port,
        };
        let packet = Packet {
            iif: Some(interface.to_owned()),
            oif: None,
            header,
            mark: 0,
            position: Position::First,
        };
        (packet, Connection::new(Some(service.protocol), header))
    }

    /// The reply to a packet, as the receiver sends it.
    fn reply_to(&mut self, packet: &Packet, iif: Option<String>) -> Packet {
        if self.direction == Direction::There {
            self.direction = Direction::Back;
        }
        Packet {
            iif,
            oif: None,
            header: packet.header.reversed(),
            mark: 0,
            position: Position::Reply,
        }
    }

    /// PREROUTING and the routing decision.
    fn come_in(
        &mut self,
        packet: &mut Packet,
        connection: &mut Connection,
    ) -> Result<RouteLookup, Stop> {
        self.pass(Hook::Prerouting, packet, connection)?;
        let way = self.route(packet)?;
        self.report_route(packet, &way)?;
        Ok(way)
    }

    /// The same for a reply. Before routing, conntrack translates the destination back.
    fn come_back(
        &mut self,
        reply: &mut Packet,
        connection: &mut Connection,
    ) -> Result<RouteLookup, Stop> {
        self.pass(Hook::Prerouting, reply, connection)?;
        reply.header.destination = connection.original.source;
        let way = self.route(reply)?;
        self.report_route(reply, &way)?;
        Ok(way)
    }

    /// FORWARD and POSTROUTING.
    fn pass_through(
        &mut self,
        way: &RouteLookup,
        packet: &mut Packet,
        connection: &mut Connection,
    ) -> Result<(), Stop> {
        packet.oif = Some(way.dev.clone());
        self.pass(Hook::Forward, packet, connection)?;
        self.pass(Hook::Postrouting, packet, connection)
    }

    /// Whether the reply leaves by the link and with the address that the client asked.
    fn leave(
        &mut self,
        back: &RouteLookup,
        reply: &Packet,
        connection: &Connection,
        interface: &str,
    ) -> Result<String, Stop> {
        // After POSTROUTING, conntrack gives the reply the address that was asked.
        let address = connection.original.tuple()?.destination;
        self.hop("out", format!("by {} as {address}", back.dev), None);
        let client = self.inputs.question.source;
        if back.dev == interface {
            let server = match &reply.iif {
                None => "this router".into(),
                Some(_) => host(reply.header.reversed().tuple()?),
            };
            return Ok(format!(
                "{server} gets it, and the reply goes back to {client} by {interface}, as {address}"
            ));
        }
        let elsewhere = self.link(&back.dev);
        if elsewhere.is_some_and(|link| link.addresses.contains(&address)) {
            return Ok(format!(
                "the reply goes back to {client} by {}, as {address}, which is an address of that link too",
                back.dev
            ));
        }
        let Failure { why, fixes } = self.why_wrong_link(back, reply, connection)?;
        fail(
            format!(
                "the reply leaves by {}, not by {interface}: {address} is not an address of {}, and its provider drops it; {why}",
                back.dev, back.dev
            ),
            fixes,
        )
    }

    pub(super) fn hop(&mut self, at: &'static str, what: impl Into<String>, rule: Option<Place>) {
        self.hops.push(Hop {
            direction: self.direction,
            at,
            what: what.into(),
            rule,
        });
    }

    /// Sends a packet through iptables at a hook, and reports what happens there.
    fn pass(
        &mut self,
        hook: Hook,
        packet: &mut Packet,
        connection: &mut Connection,
    ) -> Result<(), Stop> {
        let Passage {
            stopped,
            accepted,
            nat,
            untracked,
            marks,
            doubts,
        } = self.context.pass(hook, packet, connection);
        self.doubts.extend(doubts);
        for change in marks {
            let of = if change.of_connection {
                "connection"
            } else {
                "packet"
            };
            let what = format!("{of} mark {:#x}", change.mark);
            self.hop("mark", what, Some(change.place.clone()));
            self.marks.push(change);
        }
        if let Some(place) = untracked {
            let what = "not tracked, so not translated";
            self.hop("nat", what, Some(place.clone()));
            self.untracked = Some(place);
        }
        if let Some(place) = nat {
            let what = match hook {
                Hook::Postrouting | Hook::Input => "source translated",
                _ => "destination translated",
            };
            self.hop("nat", what, Some(place));
        }
        if let Some(place) = stopped {
            let what = format!("stopped in {}", hook.chain());
            self.hop("filter", what, Some(place.clone()));
            let whose = match self.direction {
                Direction::There => "request",
                Direction::Back => "reply",
                Direction::Later => "connection's next packet",
            };
            let fixes = self.fix_filter(hook, &place);
            return fail(format!("the {whose} is stopped by {place}"), fixes);
        }
        if let Some(place) = accepted.into_iter().rfind(|it| it.table == "filter") {
            self.hop("filter", format!("passes {}", hook.chain()), Some(place));
        }
        Ok(())
    }

    /// Asks the kernel where it routes a packet.
    fn route(&mut self, packet: &Packet) -> Result<RouteLookup, Stop> {
        let tuple = packet.header.tuple()?;
        let mut question = format!("{} from {}", tuple.destination, tuple.source);
        if let Some(iif) = &packet.iif {
            question += &format!(" iif {iif}");
        }
        if packet.mark != 0 {
            question += &format!(" mark {:#x}", packet.mark);
        }
        // Other protocols can't be asked for (`rtm_getroute_parse_ip_proto`, net/ipv4/fib_frontend.c).
        let protocol = self.inputs.question.service.protocol;
        if let Some((source, destination)) = tuple.ports
            && protocol != Protocol::Sctp
        {
            let number = protocol.number();
            question += &format!(" ipproto {number} sport {source} dport {destination}");
        }
        match self.inputs.snapshot.route_get(&question)? {
            Ok(way) => Ok(way),
            Err(words) => self.no_route(packet, &words),
        }
    }

    fn report_route(&mut self, packet: &Packet, way: &RouteLookup) -> Result<(), Stop> {
        if let Some(iif) = &packet.iif {
            let what = match self.inputs.snapshot.rp_filter(iif) {
                0 => "off",
                1 => "strict",
                _ => "loose",
            };
            self.hop("rp_filter", format!("{what} on {iif}: passes"), None);
        }
        let table = way.table.unwrap_or(TableId::MAIN);
        if let Some(rule) = self.rule_for(packet, way.table)? {
            let text = rule.listed();
            self.hop("rule", text, None);
        }
        let what = if way.is_local {
            "to the router itself".to_owned()
        } else {
            let via = way.via.as_ref().map(|via| format!(" via {via}"));
            format!("dev {}{}, table {table}", way.dev, via.unwrap_or_default())
        };
        self.hop("route", what, None);
        Ok(())
    }

    pub(super) fn rules(&self) -> impl Iterator<Item = &'a RouteRule> + use<'a> {
        self.inputs.snapshot.kernel.routing.rules.iter()
    }

    /// The first rule that sends such a packet to the table that the kernel says has decided.
    pub(super) fn rule_for(
        &self,
        packet: &Packet,
        table: Option<TableId>,
    ) -> Result<Option<&'a RouteRule>> {
        let table = table.unwrap_or(TableId::MAIN);
        let tuple = packet.header.tuple()?;
        let has =
            |network: Option<Ipv4Network>, address| network.is_none_or(|it| it.contains(address));
        let is_on_link = self.is_on_link(tuple.destination);
        Ok(self.rules().find(|rule| {
            let iif = &rule.iif;
            rule.table() == Some(table)
                && has(rule.from, tuple.source)
                && has(rule.to, tuple.destination)
                && iif
                    .as_ref()
                    .is_none_or(|iif| packet.iif.as_ref() == Some(iif))
                && rule.fwmark.is_none_or(|mark| mark.matches(packet.mark))
                && rule.rest.is_empty()
                && (rule.suppress_prefixlength.is_none() || is_on_link)
        }))
    }

    /// Whether a route of the main table other than a default route leads to the address.
    fn is_on_link(&self, address: Ipv4Addr) -> bool {
        let mut routes = self.inputs.snapshot.kernel.routing.routes.iter();
        routes.any(|route| {
            let is_main = route.table == TableId::MAIN && !route.is_default();
            is_main && route.destination.contains(address)
        })
    }

    /// Whether a route leads to one of the LAN's interfaces, or to a host on another link that is no uplink's: `[lan]` need
    /// not name the bridges of containers.
    fn leads_to_lan(&self, way: &RouteLookup) -> bool {
        let mut interfaces = self.inputs.config.lan.interfaces.iter();
        let is_lan = interfaces.any(|lan| is_interface(lan.as_str(), Some(&way.dev)));
        let is_near = way.via.is_none() && self.uplink_of(&way.dev).is_none();
        !way.is_local && (is_lan || is_near)
    }

    pub(super) fn link(&self, interface: &str) -> Option<&'a Link> {
        self.inputs.snapshot.kernel.links.get(interface)
    }

    /// The uplink whose address is asked, with its configuration.
    pub(super) fn asked_uplink(&self) -> Option<(&'a UplinkName, &'a Uplink)> {
        let name = self.uplink.as_ref()?;
        self.inputs.config.uplinks.get_key_value(name)
    }

    fn uplink_of(&self, interface: &str) -> Option<UplinkName> {
        let mut links = self.inputs.comparison.links.iter();
        let found = links.find(|(_, link)| {
            let link = link.as_ref();
            link.is_some_and(|link| link.interface.as_str() == interface)
        });
        found.map(|(name, _)| name.clone())
    }
}

/// The destination: `192.168.0.2:80`
pub(super) fn host(tuple: Tuple) -> String {
    match tuple.ports {
        Some((_, port)) => format!("{}:{port}", tuple.destination),
        None => tuple.destination.to_string(),
    }
}
