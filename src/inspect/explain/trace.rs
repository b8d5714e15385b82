//! Traces one connection: the first request, the reply, and one more packet each way, from hook to hook. The kernel answers
//! for routes and reverse path filtering, `packet_trace` for iptables.

use std::fmt;
use std::net::Ipv4Addr;

use anyhow::Result;
use ipnetwork::Ipv4Network;

use crate::config::{Config, Uplink};
use crate::inspect::explain::ends::Servers;
use crate::inspect::explain::{Aim, Direction, Hop, Question};
use crate::inspect::packet_trace::{
    Connection, Context, Doubt, Header, Hook, Packet, Passage, Place, Position, is_interface,
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

/// Where and why a packet is lost, as the error that ends a trace.
#[derive(Debug)]
pub struct Failure {
    pub why: String,
    /// Commands, or lines of the configuration, that fix it.
    pub fixes: Vec<String>,
}

impl Failure {
    pub fn new(why: impl Into<String>, fixes: impl IntoIterator<Item = String>) -> Self {
        Self {
            why: why.into(),
            fixes: fixes.into_iter().collect(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

impl std::error::Error for Failure {}

pub fn fail<T>(why: impl Into<String>, fixes: impl IntoIterator<Item = String>) -> Result<T> {
    Err(Failure::new(why, fixes).into())
}

/// The trace of a connection, hop by hop.
pub struct Trace<'a> {
    pub snapshot: &'a Snapshot,
    pub config: &'a Config,
    pub comparison: &'a Comparison,
    pub question: &'a Question,
    pub servers: &'a Servers,
    context: Context<'a>,
    pub connection: Connection,
    /// The interface by which the request comes in.
    interface: String,
    /// The uplink whose address is asked.
    pub uplink: Option<(&'a UplinkName, &'a Uplink)>,
    /// The address that is asked.
    pub asked: Option<Ipv4Addr>,
    pub direction: Direction,
    /// What happened, in order.
    pub hops: Vec<Hop>,
    /// What iptables did, in order.
    pub passages: Vec<Passage>,
    /// What may be different for some packets.
    pub caveats: Vec<String>,
    /// Whether a caveat makes the outcome doubtful.
    pub is_unsure: bool,
}

impl<'a> Trace<'a> {
    /// A trace that has not begun, with doubts that are assumed to come true.
    pub fn new(
        snapshot: &'a Snapshot,
        config: &'a Config,
        comparison: &'a Comparison,
        question: &'a Question,
        servers: &'a Servers,
        assumed: &[Doubt],
    ) -> Self {
        let protocol = question.service.protocol;
        Self {
            snapshot,
            config,
            comparison,
            question,
            servers,
            context: Context {
                rulesets: &snapshot.rulesets,
                native: &snapshot.native,
                links: &snapshot.kernel.links,
                assumed: assumed.to_vec(),
                final_chain: None,
            },
            connection: Connection::new(Some(protocol), Header::default()),
            interface: String::new(),
            uplink: None,
            asked: None,
            direction: Direction::There,
            hops: Vec::new(),
            passages: Vec::new(),
            caveats: Vec::new(),
            is_unsure: false,
        }
    }

    /// The outcome in a sentence, or the failure; an error where the kernel can't be asked.
    pub fn run(&mut self) -> Result<Result<String, Failure>> {
        let end = match &self.question.aim {
            Aim::Uplink(name) => self.ask_uplink(name),
            Aim::Address(address) => self.ask_address(*address),
            Aim::FromLan(destination) => self.by_lan_host(*destination),
        };
        match end {
            Ok(sentence) => Ok(Ok(sentence)),
            Err(error) => error.downcast().map(Err),
        }
    }

    fn ask_uplink(&mut self, name: &UplinkName) -> Result<String> {
        self.uplink = self.config.uplinks.get_key_value(name);
        if let Some(Some(link)) = self.comparison.links.get(name) {
            return self.by_client(link.interface.as_str(), link.address);
        }
        let Some(interface) = &self.config.uplinks[name].identity.interface else {
            return fail(
                format!("{name} has no link: no installed entry tells which interface it uses"),
                [format!("dial it, or: mh-hook up IFNAME --uplink {name}")],
            );
        };
        let how = match self.link(interface.as_str()) {
            None => "does not exist",
            Some(link) if !link.up => "is down",
            Some(_) => "has no address that installed entries are for",
        };
        fail(
            format!("{name} has no link: {interface} {how}"),
            [format!("dial it, then: mh-hook up {interface}")],
        )
    }

    fn ask_address(&mut self, address: Ipv4Addr) -> Result<String> {
        self.asked = Some(address);
        let mut links = self.snapshot.kernel.links.iter();
        let Some((interface, _)) = links.find(|(_, link)| link.addresses.contains(&address)) else {
            let why = format!("no link of this router has the address {address}");
            return fail(why, []);
        };
        self.uplink = self.uplink_of(interface);
        self.by_client(interface, address)
    }

    /// A client's request that comes in by a link, and the reply.
    fn by_client(&mut self, interface: &str, address: Ipv4Addr) -> Result<String> {
        let owner = match self.uplink {
            Some((name, _)) => format!(", the link of {name}"),
            None => ", which is no uplink's".to_owned(),
        };
        self.hop("in", format!("by {interface}{owner}"), None);
        let (packet, way) = self.request(interface, address)?;
        if way.is_local {
            return self.own_service(packet);
        }
        let tuple = packet.header.tuple()?;
        let server = host(tuple);
        let dev = &way.dev;
        if let Some((uplink, _)) = self.uplink_of(dev) {
            let destination = tuple.destination;
            return fail(
                format!(
                    "{server} is not on the LAN: the route to it is by {dev}, the link of {uplink}"
                ),
                [format!(
                    "to = \"…\": the address of a LAN host; see ip route get {destination}"
                )],
            );
        }
        self.hop("out", format!("by {dev} to {server}"), None);
        self.neighbour(&way, tuple.destination)?;
        self.server_answers(&way, tuple)?;
        self.earlier_connections(tuple)?;
        self.answer(&packet, &way)
    }

    /// A request to the router itself, and the reply.
    fn own_service(&mut self, mut packet: Packet) -> Result<String> {
        self.pass(Hook::Input, &mut packet)?;
        self.listens(packet.header.tuple()?)?;
        self.hop("host", "this router itself answers", None);

        self.direction = Direction::Back;
        let mut reply = packet.header.reply(None);
        let mut back = self.route(&reply)?;
        reply.oif = Some(back.dev.clone());
        let mark = reply.mark;
        self.pass(Hook::Output, &mut reply)?;
        if reply.mark != mark {
            // A packet whose mark changes in OUTPUT is routed again (`ipt_mangle_out`, net/ipv4/netfilter/iptable_mangle.c).
            back = self.route(&reply)?;
            reply.oif = Some(back.dev.clone());
        }
        self.report_route(&reply, &back)?;
        self.pass(Hook::Postrouting, &mut reply)?;
        self.leave(&back, &reply)
    }

    /// A LAN host's own request, and the reply.
    fn by_lan_host(&mut self, destination: Ipv4Addr) -> Result<String> {
        self.asked = Some(destination);
        let client = self.question.source;
        let why = match self.snapshot.route_get(&client.to_string())? {
            Ok(way) if self.leads_to_lan(&way) => return self.by_lan_link(&way.dev, destination),
            Ok(RouteLookup { dev, .. }) => {
                format!("{client} is not on the LAN: this router reaches it by {dev}")
            }
            Err(words) => format!("this router has no route to {client}: {words}"),
        };
        fail(why, [])
    }

    fn by_lan_link(&mut self, interface: &str, destination: Ipv4Addr) -> Result<String> {
        let client = self.question.source;
        self.hop("in", format!("by {interface} from {client}"), None);
        let (packet, way) = self.request(interface, destination)?;
        if way.is_local {
            return self.own_service(packet);
        }
        let tuple = packet.header.tuple()?;
        let source = tuple.source;
        let (dev, server) = (&way.dev, host(tuple));
        let Connection {
            is_dnat, is_snat, ..
        } = self.connection;
        let as_whom = is_snat.then(|| format!(" as {source}"));
        let as_whom = as_whom.unwrap_or_default();
        self.hop("out", format!("by {dev} to {server}{as_whom}"), None);
        if self.leads_to_lan(&way) {
            self.neighbour(&way, tuple.destination)?;
            if dev == interface && is_dnat && !is_snat {
                let server = tuple.destination;
                let why = format!(
                    "{server} answers {client} directly, with a source that {client} did not ask"
                );
                return fail(why, self.fixes([]));
            }
            self.server_answers(&way, tuple)?;
        } else if !self.has_address(dev, source) {
            let fixes = match self.uplink_of(dev) {
                Some((name, uplink)) if !uplink.masquerade => {
                    vec![format!("[uplink.{name}] masquerade = true")]
                }
                _ => self.fixes([]),
            };
            let why = format!(
                "it leaves by {dev} with the source {source}, which is not an address of that link: the provider drops it"
            );
            return fail(why, fixes);
        } else if let Some(other) = self.twin(dev, source) {
            let why = format!(
                "it leaves by {dev} with the source {source}, which is an address of {other}, too: what is sent there reaches one of the two"
            );
            let fix = format!("see which of {dev} and {other} has it by right: ip -4 address");
            return fail(why, [fix]);
        }
        self.answer(&packet, &way)
    }

    /// The reply to the first packet. Then one more packet each way: other rules may match, and marks may have changed.
    /// Those are reported only if one is lost.
    fn answer(&mut self, first: &Packet, way: &RouteLookup) -> Result<String> {
        self.direction = Direction::Back;
        let server = host(first.header.tuple()?);
        self.hop("in", format!("by {} from {server}", way.dev), None);
        let sentence = self.reply(first.header, way)?;

        let reported = self.hops.len();
        self.direction = Direction::Later;
        let mut packet = Packet {
            iif: first.iif.clone(),
            header: self.connection.original,
            position: Position::Later,
            ..Packet::default()
        };
        let way = self.come_in(&mut packet, Some(first.header))?;
        self.pass_through(&way, &mut packet)?;
        self.reply(first.header, &way)?;
        self.hops.truncate(reported);
        Ok(sentence)
    }

    /// The reply to a request that left this way.
    fn reply(&mut self, request: Header, way: &RouteLookup) -> Result<String> {
        let mut reply = request.reply(Some(way.dev.clone()));
        let client = self.connection.original.reversed();
        let back = self.come_in(&mut reply, Some(client))?;
        self.pass_through(&back, &mut reply)?;
        self.leave(&back, &reply)
    }

    /// The first packet, from the interface that it comes in by until it leaves or is for the router itself.
    fn request(&mut self, interface: &str, destination: Ipv4Addr) -> Result<(Packet, RouteLookup)> {
        let port = self.question.service.port;
        self.interface = interface.to_owned();
        self.asked = Some(destination);
        self.connection.original = Header {
            source: Some(self.question.source),
            destination: Some(destination),
            source_port: port.map(|_| CLIENT_PORT),
            destination_port: port,
        };
        let mut packet = Packet {
            iif: Some(interface.to_owned()),
            header: self.connection.original,
            ..Packet::default()
        };
        let way = self.come_in(&mut packet, None)?;
        if !way.is_local {
            self.pass_through(&way, &mut packet)?;
        }
        Ok((packet, way))
    }

    /// PREROUTING and the routing decision. Before that, conntrack translates the destination of a packet that is not the
    /// first to the one of a header that it knows.
    fn come_in(&mut self, packet: &mut Packet, known: Option<Header>) -> Result<RouteLookup> {
        self.pass(Hook::Prerouting, packet)?;
        if let Some(known) = known {
            packet.header.destination = known.destination;
            packet.header.destination_port = known.destination_port;
        }
        let way = self.route(packet)?;
        self.report_route(packet, &way)?;
        Ok(way)
    }

    /// FORWARD and POSTROUTING.
    fn pass_through(&mut self, way: &RouteLookup, packet: &mut Packet) -> Result<()> {
        packet.oif = Some(way.dev.clone());
        self.pass(Hook::Forward, packet)?;
        self.pass(Hook::Postrouting, packet)
    }

    /// Whether the reply leaves by the link and with the address that the client asked.
    fn leave(&mut self, back: &RouteLookup, reply: &Packet) -> Result<String> {
        // After POSTROUTING, conntrack gives the reply the address that was asked.
        let address = self.connection.original.tuple()?.destination;
        let (dev, client) = (&back.dev, self.question.source);
        self.hop("out", format!("by {dev} as {address}"), None);
        let interface = &self.interface;
        if dev == interface {
            let server = match &reply.iif {
                None => "this router".into(),
                Some(_) => host(reply.header.reversed().tuple()?),
            };
            return Ok(format!(
                "{server} gets it, and the reply goes back to {client} by {interface}, as {address}"
            ));
        }
        if self.has_address(dev, address) {
            return Ok(format!(
                "the reply goes back to {client} by {dev}, as {address}, which is an address of that link too"
            ));
        }
        let Failure { why, fixes } = self.why_wrong_link(back, reply)?;
        fail(
            format!(
                "the reply leaves by {dev}, not by {interface}: {address} is not an address of {dev}, and its provider drops it; {why}"
            ),
            fixes,
        )
    }

    pub fn hop(&mut self, at: &'static str, what: impl Into<String>, rule: Option<Place>) {
        self.hops.push(Hop {
            direction: self.direction,
            at,
            what: what.into(),
            rule,
        });
    }

    /// Sends a packet through iptables at a hook, and reports what happens there.
    fn pass(&mut self, hook: Hook, packet: &mut Packet) -> Result<()> {
        let passage = self.context.pass(hook, packet, &mut self.connection);
        self.passages.push(passage.clone());
        for change in passage.marks {
            let of = match change.of_connection {
                true => "connection",
                false => "packet",
            };
            let what = format!("{of} mark {:#x}", change.mark);
            self.hop("mark", what, Some(change.place));
        }
        let translated = match hook {
            Hook::Postrouting | Hook::Input => "source translated",
            _ => "destination translated",
        };
        let untracked = "not tracked, so not translated";
        for (what, place) in [(untracked, passage.untracked), (translated, passage.nat)] {
            if place.is_some() {
                self.hop("nat", what, place);
            }
        }
        if let Some(place) = passage.stopped {
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
        let mut accepted = passage.accepted.into_iter();
        if let Some(place) = accepted.rfind(|it| it.table == "filter") {
            self.hop("filter", format!("passes {}", hook.chain()), Some(place));
        }
        Ok(())
    }

    /// Asks the kernel where it routes a packet.
    fn route(&mut self, packet: &Packet) -> Result<RouteLookup> {
        let tuple = packet.header.tuple()?;
        let mut question = format!("{} from {}", tuple.destination, tuple.source);
        if let Some(iif) = &packet.iif {
            question += &format!(" iif {iif}");
        }
        if packet.mark != 0 {
            question += &format!(" mark {:#x}", packet.mark);
        }
        // Other protocols can't be asked for (`rtm_getroute_parse_ip_proto`, net/ipv4/fib_frontend.c).
        let protocol = self.question.service.protocol;
        if let Some((source, destination)) = tuple.ports
            && protocol != Protocol::Sctp
        {
            let number = protocol.number();
            question += &format!(" ipproto {number} sport {source} dport {destination}");
        }
        match self.snapshot.route_get(&question)? {
            Ok(way) => Ok(way),
            Err(words) => self.no_route(packet, &words),
        }
    }

    fn report_route(&mut self, packet: &Packet, way: &RouteLookup) -> Result<()> {
        if let Some(iif) = &packet.iif {
            let what = match self.snapshot.rp_filter(iif) {
                0 => "off",
                1 => "strict",
                _ => "loose",
            };
            self.hop("rp_filter", format!("{what} on {iif}: passes"), None);
        }
        if let Some(rule) = self.rule_for(packet, way)? {
            self.hop("rule", rule.listed(), None);
        }
        let what = if way.is_local {
            "to the router itself".to_owned()
        } else {
            let via = way.via.as_ref().map(|via| format!(" via {via}"));
            let (via, table) = (via.unwrap_or_default(), table_of(way));
            format!("dev {}{via}, table {table}", way.dev)
        };
        self.hop("route", what, None);
        Ok(())
    }

    /// The first rule that sends such a packet to the table that the kernel says has decided.
    pub fn rule_for(&self, packet: &Packet, way: &RouteLookup) -> Result<Option<&'a RouteRule>> {
        let tuple = packet.header.tuple()?;
        let has =
            |network: Option<Ipv4Network>, address| network.is_none_or(|it| it.contains(address));
        // By a route of the main table other than a default route.
        let mut routes = self.snapshot.kernel.routing.routes.iter();
        let is_on_link = routes.any(|route| {
            let is_main = route.table == TableId::MAIN && !route.is_default();
            is_main && route.destination.contains(tuple.destination)
        });
        let mut rules = self.snapshot.kernel.routing.rules.iter();
        Ok(rules.find(|rule| {
            rule.table() == Some(table_of(way))
                && has(rule.from, tuple.source)
                && has(rule.to, tuple.destination)
                && (rule.iif.is_none() || rule.iif == packet.iif)
                && rule.fwmark.is_none_or(|mark| mark.matches(packet.mark))
                && rule.rest.is_empty()
                && (rule.suppress_prefixlength.is_none() || is_on_link)
        }))
    }

    /// Whether this router's own rules let it ask a host for a connection, and hear the answer.
    pub fn can_ask(&self, dev: &str, destination: Ipv4Addr, port: u16) -> bool {
        let source = self.link(dev).and_then(|link| link.addresses.first());
        let header = Header {
            source: source.copied(),
            destination: Some(destination),
            source_port: Some(CLIENT_PORT),
            destination_port: Some(port),
        };
        let mut connection = Connection::new(Some(Protocol::Tcp), header);
        let mut request = Packet {
            oif: Some(dev.to_owned()),
            header,
            ..Packet::default()
        };
        let mut reply = header.reply(Some(dev.to_owned()));
        let mut passes = |hook, packet: &mut Packet| {
            let passage = self.context.pass(hook, packet, &mut connection);
            passage.stopped.is_none() && passage.doubts.is_empty()
        };
        passes(Hook::Output, &mut request)
            && passes(Hook::Postrouting, &mut request)
            && passes(Hook::Prerouting, &mut reply)
            && passes(Hook::Input, &mut reply)
    }

    /// Whether a route leads to one of the LAN's interfaces, or to a host on another link that is no uplink's: `[lan]` need
    /// not name the bridges of containers.
    fn leads_to_lan(&self, way: &RouteLookup) -> bool {
        let mut interfaces = self.config.lan.interfaces.iter();
        let is_lan = interfaces.any(|lan| is_interface(lan.as_str(), Some(&way.dev)));
        let is_near = way.via.is_none() && self.uplink_of(&way.dev).is_none();
        !way.is_local && (is_lan || is_near)
    }

    fn link(&self, interface: &str) -> Option<&'a Link> {
        self.snapshot.kernel.links.get(interface)
    }

    fn has_address(&self, interface: &str, address: Ipv4Addr) -> bool {
        self.link(interface)
            .is_some_and(|link| link.addresses.contains(&address))
    }

    /// Another interface that has the same address as this one.
    fn twin(&self, interface: &str, address: Ipv4Addr) -> Option<&'a str> {
        let mut links = self.snapshot.kernel.links.iter();
        let (name, _) =
            links.find(|(name, link)| *name != interface && link.addresses.contains(&address))?;
        Some(name)
    }

    fn uplink_of(&self, interface: &str) -> Option<(&'a UplinkName, &'a Uplink)> {
        let mut links = self.comparison.links.iter();
        let (name, _) = links.find(|(_, link)| {
            link.as_ref()
                .is_some_and(|link| link.interface.as_str() == interface)
        })?;
        self.config.uplinks.get_key_value(name)
    }
}

/// The table that has decided: `ip` does not print main.
pub fn table_of(way: &RouteLookup) -> TableId {
    way.table.unwrap_or(TableId::MAIN)
}

/// The destination: `192.168.0.2:80`
pub fn host(tuple: Tuple) -> String {
    match tuple.ports {
        Some((_, port)) => format!("{}:{port}", tuple.destination),
        None => tuple.destination.to_string(),
    }
}
