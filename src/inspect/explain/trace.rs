//! One journey: a connection's first packet and the reply to it, from hook to hook. Routes are asked
//! of the kernel, the way through iptables is `packet`'s.

use std::net::Ipv4Addr;

use anyhow::{Error, Result};
use ipnetwork::Ipv4Network;

use crate::config::Config;
use crate::inspect::explain::{Aim, Direction, Hop, Question};
use crate::inspect::packet_trace::{
    Connection, Ground, Hook, MarkChange, Packet, Passage, Place, Turn,
};
use crate::inspect::snapshot::Snapshot;
use crate::kernel::conntrack::Tuple;
use crate::kernel::ip::RouteLookup;
use crate::kernel::sysctl;
use crate::model::forward::Protocol;
use crate::model::link::{UplinkLink, UplinkLinks};
use crate::model::names::UplinkName;
use crate::model::route::{RouteRule, TableId};
use crate::model::state::State;

/// The port that a client has: one of those that Linux gives (ip_local_port_range).
const CLIENT_PORT: u16 = 50000;

/// What all journeys for one question have in common.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// The machine.
    pub snapshot: &'a Snapshot,
    /// The configuration.
    pub config: &'a Config,
    /// The uplinks' links.
    pub uplink_links: &'a UplinkLinks,
    /// Our installed entries.
    pub installed: &'a State,
    /// Our desired entries.
    pub desired: &'a State,
    /// What is asked.
    pub question: &'a Question,
}

impl<'a> Run<'a> {
    /// A journey, with a rule that is taken to match.
    ///
    /// # Errors
    /// The kernel can't be asked.
    pub fn journey(self, assumed: Option<&'a Place>) -> Result<Journey<'a>> {
        let mut journey = Journey {
            run: self,
            ground: Ground {
                rulesets: &self.snapshot.rulesets,
                links: &self.snapshot.kernel.links,
                assumed,
            },
            uplink: None,
            asked: None,
            direction: Direction::There,
            hops: Vec::new(),
            marks: Vec::new(),
            doubts: Vec::new(),
            caveats: Vec::new(),
            end: Ok(String::new()),
        };
        journey.end = match journey.go() {
            Ok(sentence) => Ok(sentence),
            Err(Stop::Fails { why, mend }) => Err((why, mend)),
            Err(Stop::Broken(error)) => return Err(error),
        };
        Ok(journey)
    }
}

/// Why a journey does not go on.
pub(super) enum Stop {
    /// The packet is lost.
    Fails {
        /// Where and why.
        why: String,
        /// What mends it.
        mend: Vec<String>,
    },
    /// The kernel could not be asked.
    Broken(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Broken(error)
    }
}

pub(super) fn fails<T>(why: impl Into<String>, mend: Vec<String>) -> Result<T, Stop> {
    let why = why.into();
    Err(Stop::Fails { why, mend })
}

/// One journey, hop by hop.
#[derive(Debug)]
pub struct Journey<'a> {
    pub(super) run: Run<'a>,
    ground: Ground<'a>,
    /// The uplink whose address is asked.
    pub uplink: Option<UplinkName>,
    /// The address that is asked.
    pub asked: Option<Ipv4Addr>,
    pub(super) direction: Direction,
    /// What happened, in order.
    pub hops: Vec<Hop>,
    pub(super) marks: Vec<MarkChange>,
    /// Rules of which it can't be told whether they match.
    pub doubts: Vec<Place>,
    /// What may be otherwise.
    pub caveats: Vec<String>,
    /// What became of it, as a sentence; or why it fails, and what mends that.
    pub end: Result<String, (String, Vec<String>)>,
}

impl<'a> Journey<'a> {
    fn go(&mut self) -> Result<String, Stop> {
        match &self.run.question.aim {
            Aim::Uplink(name) => self.ask_uplink(&name.clone()),
            Aim::Address(address) => self.ask_address(*address),
            Aim::FromLan(destination) => self.by_lan_host(*destination),
        }
    }

    fn ask_uplink(&mut self, name: &UplinkName) -> Result<String, Stop> {
        self.uplink = Some(name.clone());
        if let Some(Some(link)) = self.run.uplink_links.get(name) {
            self.asked = Some(link.address);
            return self.by_client(link.interface.as_str(), link.address);
        }
        let identity = &self.run.config.uplinks[name].identity;
        let Some(interface) = &identity.interface else {
            return fails(
                format!("{name} has no link: nothing that stands tells which interface is its"),
                vec![format!("dial it, or: mh-hook up IFNAME --uplink {name}")],
            );
        };
        let how = match self.run.snapshot.kernel.links.get(interface.as_str()) {
            None => "does not exist",
            Some(link) if !link.up => "is down",
            Some(_) => "has no address that entries stand for",
        };
        fails(
            format!("{name} has no link: {interface} {how}"),
            vec![format!("dial it, then: mh-hook up {interface}")],
        )
    }

    fn ask_address(&mut self, address: Ipv4Addr) -> Result<String, Stop> {
        self.asked = Some(address);
        let has = |name: &&String| {
            self.run.snapshot.kernel.links[*name]
                .addresses
                .contains(&address)
        };
        let Some(interface) = self.run.snapshot.kernel.links.keys().find(has).cloned() else {
            return fails(
                format!("no link of this router has the address {address}"),
                Vec::new(),
            );
        };
        self.uplink = self.uplink_of(&interface);
        self.by_client(&interface, address)
    }

    /// A client's request by a link, and its reply.
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
        let at = self.host(&packet.tuple);
        self.pass_through(&way, &mut packet, &mut connection)?;
        if let Some(uplink) = self.uplink_of(&way.dev) {
            return fails(
                format!(
                    "{at} is not on the LAN: it is reached by {}, the link of {uplink}",
                    way.dev
                ),
                vec![format!(
                    "to = \"…\": the address of a LAN host; see ip route get {}",
                    packet.tuple.destination
                )],
            );
        }
        self.hop("out", format!("by {} to {at}", way.dev), None);
        self.neighbour(&way, packet.tuple.destination)?;
        self.silence(&packet.tuple)?;
        self.earlier(&connection, &packet.tuple);

        let mut reply = self.turn(&packet, Some(way.dev.clone()));
        self.hop("in", format!("by {} from {at}", way.dev), None);
        let back = self.come_back(&mut reply, &mut connection)?;
        self.pass_through(&back, &mut reply, &mut connection)?;
        let sentence = self.leave(&back, &reply, &connection, interface)?;
        self.go_on(&packet, &mut connection, interface)?;
        Ok(sentence)
    }

    /// The router itself is asked.
    fn own_service(
        &mut self,
        mut packet: Packet,
        mut connection: Connection,
        interface: &str,
    ) -> Result<String, Stop> {
        let passage = self.ground.pass(Hook::Input, &mut packet, &mut connection);
        self.tell(Hook::Input, passage)?;
        self.listens(&packet.tuple, &connection)?;
        self.hop("host", "this router itself answers", None);

        let mut reply = self.turn(&packet, None);
        let mut back = self.route(&reply)?;
        reply.oif = Some(back.dev.clone());
        let mark = reply.mark;
        let passage = self.ground.pass(Hook::Output, &mut reply, &mut connection);
        self.tell(Hook::Output, passage)?;
        if reply.mark != mark {
            // What mangle's OUTPUT marks is routed anew (ipt_mangle_out, iptable_mangle.c).
            back = self.route(&reply)?;
            reply.oif = Some(back.dev.clone());
        }
        self.tell_route(&reply, &back);
        let passage = self
            .ground
            .pass(Hook::Postrouting, &mut reply, &mut connection);
        self.tell(Hook::Postrouting, passage)?;
        self.leave(&back, &reply, &connection, interface)
    }

    /// A LAN host's own request, and its reply.
    fn by_lan_host(&mut self, destination: Ipv4Addr) -> Result<String, Stop> {
        self.asked = Some(destination);
        let host = self.run.question.source;
        let interface = match self.run.snapshot.route_get(&host.to_string())? {
            Ok(way) if self.is_lan(&way.dev) && !way.is_local => way.dev,
            Ok(way) => {
                let interfaces: Vec<String> = self
                    .run
                    .config
                    .lan
                    .interfaces
                    .iter()
                    .map(ToString::to_string)
                    .collect();
                return fails(
                    format!(
                        "{host} is not on the LAN ({}): this router reaches it by {}",
                        interfaces.join(", "),
                        way.dev
                    ),
                    Vec::new(),
                );
            }
            Err(words) => {
                return fails(
                    format!("this router has no route to {host}: {words}"),
                    Vec::new(),
                );
            }
        };
        let (mut packet, mut connection) = self.begin(&interface, destination);
        self.hop("in", format!("by {interface} from {host}"), None);
        let way = self.come_in(&mut packet, &mut connection)?;
        if way.is_local {
            return self.own_service(packet, connection, &interface);
        }
        self.pass_through(&way, &mut packet, &mut connection)?;
        let source = packet.tuple.source;
        let at = self.host(&packet.tuple);
        let as_whom = if connection.is_snat {
            format!(" as {source}")
        } else {
            String::new()
        };
        self.hop("out", format!("by {} to {at}{as_whom}", way.dev), None);
        if self.is_lan(&way.dev) {
            self.neighbour(&way, packet.tuple.destination)?;
            if way.dev == interface && connection.is_dnat && !connection.is_snat {
                return fails(
                    format!(
                        "{} answers {host} directly, from an address that was never asked",
                        packet.tuple.destination
                    ),
                    self.mend(&[]),
                );
            }
        } else if !self.run.snapshot.kernel.links[&way.dev]
            .addresses
            .contains(&source)
        {
            let uplink = self.uplink_of(&way.dev);
            let mend = match &uplink {
                Some(name) if !self.run.config.uplinks[name].masquerade => {
                    vec![format!("[uplink.{name}] masquerade = true")]
                }
                _ => self.mend(&[]),
            };
            return fails(
                format!(
                    "it leaves by {} with the source {source}, which is not an address of that link: the provider drops it",
                    way.dev
                ),
                mend,
            );
        }

        let mut reply = self.turn(&packet, Some(way.dev.clone()));
        self.hop("in", format!("by {} from {at}", way.dev), None);
        let back = self.come_back(&mut reply, &mut connection)?;
        self.pass_through(&back, &mut reply, &mut connection)?;
        let sentence = self.leave(&back, &reply, &connection, &interface)?;
        self.go_on(&packet, &mut connection, &interface)?;
        Ok(sentence)
    }

    /// What follows on a connection, one packet each way: other rules may hold for it, and marks may
    /// have changed.
    fn go_on(
        &mut self,
        first: &Packet,
        connection: &mut Connection,
        interface: &str,
    ) -> Result<(), Stop> {
        let shown = self.hops.len();
        self.direction = Direction::Later;
        let mut packet = Packet {
            oif: None,
            tuple: connection.original,
            mark: 0,
            turn: Turn::Later,
            ..first.clone()
        };
        let passage = self.ground.pass(Hook::Prerouting, &mut packet, connection);
        self.tell(Hook::Prerouting, passage)?;
        // conntrack does again what nat did to the first.
        packet.tuple.destination = first.tuple.destination;
        packet.tuple.ports = first.tuple.ports;
        let way = self.route(&packet)?;
        self.tell_route(&packet, &way);
        self.pass_through(&way, &mut packet, connection)?;
        let mut reply = self.turn(first, Some(way.dev.clone()));
        let back = self.come_back(&mut reply, connection)?;
        self.pass_through(&back, &mut reply, connection)?;
        self.leave(&back, &reply, connection, interface)?;
        self.hops.truncate(shown);
        Ok(())
    }

    /// The first packet, at the interface by which it comes in.
    fn begin(&self, interface: &str, destination: Ipv4Addr) -> (Packet, Connection) {
        let Question {
            source, service, ..
        } = self.run.question;
        let tuple = Tuple {
            source: *source,
            destination,
            ports: service.port.map(|port| (CLIENT_PORT, port)),
        };
        let packet = Packet {
            iif: Some(interface.to_owned()),
            oif: None,
            tuple,
            mark: 0,
            turn: Turn::First,
        };
        let connection = Connection {
            protocol: service.protocol.number(),
            original: tuple,
            is_dnat: false,
            is_snat: false,
            is_untracked: false,
            mark: 0,
        };
        (packet, connection)
    }

    /// The reply to a packet, as its receiver sends it.
    fn turn(&mut self, packet: &Packet, iif: Option<String>) -> Packet {
        if self.direction == Direction::There {
            self.direction = Direction::Back;
        }
        let Tuple {
            source,
            destination,
            ports,
        } = packet.tuple;
        Packet {
            iif,
            oif: None,
            tuple: Tuple {
                source: destination,
                destination: source,
                ports: ports.map(|(source, destination)| (destination, source)),
            },
            mark: 0,
            turn: Turn::Reply,
        }
    }

    /// Through PREROUTING and the routing decision.
    fn come_in(
        &mut self,
        packet: &mut Packet,
        connection: &mut Connection,
    ) -> Result<RouteLookup, Stop> {
        let passage = self.ground.pass(Hook::Prerouting, packet, connection);
        self.tell(Hook::Prerouting, passage)?;
        let way = self.route(packet)?;
        self.tell_route(packet, &way);
        Ok(way)
    }

    /// The same for a reply, whose destination conntrack turns back ahead of routing.
    fn come_back(
        &mut self,
        reply: &mut Packet,
        connection: &mut Connection,
    ) -> Result<RouteLookup, Stop> {
        let passage = self.ground.pass(Hook::Prerouting, reply, connection);
        self.tell(Hook::Prerouting, passage)?;
        reply.tuple.destination = connection.original.source;
        let way = self.route(reply)?;
        self.tell_route(reply, &way);
        Ok(way)
    }

    /// Through FORWARD and POSTROUTING.
    fn pass_through(
        &mut self,
        way: &RouteLookup,
        packet: &mut Packet,
        connection: &mut Connection,
    ) -> Result<(), Stop> {
        packet.oif = Some(way.dev.clone());
        for hook in [Hook::Forward, Hook::Postrouting] {
            let passage = self.ground.pass(hook, packet, connection);
            self.tell(hook, passage)?;
        }
        Ok(())
    }

    /// The reply goes out: by the right link, as the right address?
    fn leave(
        &mut self,
        back: &RouteLookup,
        reply: &Packet,
        connection: &Connection,
        interface: &str,
    ) -> Result<String, Stop> {
        // Behind POSTROUTING conntrack gives the reply the address that was asked.
        let address = connection.original.destination;
        self.hop("out", format!("by {} as {address}", back.dev), None);
        let host = self.run.question.source;
        if back.dev == interface {
            let server = if reply.iif.is_none() {
                "this router".into()
            } else {
                self.host(&Tuple {
                    source: reply.tuple.destination,
                    destination: reply.tuple.source,
                    ports: reply
                        .tuple
                        .ports
                        .map(|(source, destination)| (destination, source)),
                })
            };
            return Ok(format!(
                "{server} gets it, and the reply goes back to {host} by {interface}, as {address}"
            ));
        }
        let reason = self.why_elsewhere(back, reply, connection);
        let owns = |link: &crate::kernel::link::Link| link.addresses.contains(&address);
        if self
            .run
            .snapshot
            .kernel
            .links
            .get(&back.dev)
            .is_some_and(owns)
        {
            return Ok(format!(
                "the reply goes back to {host} by {}, as {address}, which is an address of that link too",
                back.dev
            ));
        }
        fails(
            format!(
                "the reply leaves by {}, not by {interface}: {address} is not an address of {}, and its provider drops it; {}",
                back.dev, back.dev, reason.0
            ),
            reason.1,
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

    /// What a packet met at a hook, as hops; the end, where it went no further.
    fn tell(&mut self, hook: Hook, passage: Passage) -> Result<(), Stop> {
        self.doubts.extend(passage.doubts);
        for change in passage.marks {
            let of = if change.of_connection {
                "connection"
            } else {
                "packet"
            };
            self.hop(
                "mark",
                format!("{of} mark {:#x}", change.mark),
                Some(change.place.clone()),
            );
            self.marks.push(change);
        }
        if let Some(place) = passage.nat {
            let what = match hook {
                Hook::Postrouting | Hook::Input => "source translated",
                _ => "destination translated",
            };
            self.hop("nat", what, Some(place));
        }
        if let Some(place) = passage.stopped {
            self.hop(
                "filter",
                format!("stopped in {}", hook.chain()),
                Some(place.clone()),
            );
            let of = match self.direction {
                Direction::There => "request",
                Direction::Back => "reply",
                Direction::Later => "connection's next packet",
            };
            let mend = self.let_pass(hook, &place);
            return fails(format!("the {of} is stopped by {}", place), mend);
        }
        if let Some(place) = passage.accepted {
            self.hop("filter", format!("passes {}", hook.chain()), Some(place));
        }
        Ok(())
    }

    /// The kernel's own routing decision.
    fn route(&mut self, packet: &Packet) -> Result<RouteLookup, Stop> {
        let Packet {
            iif, tuple, mark, ..
        } = packet;
        let mut question = format!("{} from {}", tuple.destination, tuple.source);
        if let Some(iif) = iif {
            question += &format!(" iif {iif}");
        }
        if *mark != 0 {
            question += &format!(" mark {mark:#x}");
        }
        // The others can't be asked for (`rtm_getroute_parse_ip_proto`, net/ipv4/fib_frontend.c).
        if let Some((source, destination)) = tuple.ports
            && self.run.question.service.protocol != Protocol::Sctp
        {
            question += &format!(
                " ipproto {} sport {source} dport {destination}",
                self.run.question.service.protocol.number()
            );
        }
        match self.run.snapshot.route_get(&question)? {
            Ok(way) => Ok(way),
            Err(words) => self.no_route(packet, &words),
        }
    }

    fn tell_route(&mut self, packet: &Packet, way: &RouteLookup) {
        if let Some(iif) = &packet.iif {
            let what = match sysctl::rp_filter(iif) {
                0 => "off",
                1 => "strict",
                _ => "loose",
            };
            self.hop("rp_filter", format!("{what} on {iif}: passes"), None);
        }
        let table = way.table.unwrap_or(TableId::MAIN);
        if let Some(rule) = self.rule_for(packet, way.table) {
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
    }

    pub(super) fn rules(&self) -> impl Iterator<Item = &RouteRule> {
        self.run.snapshot.kernel.routing.rules.iter()
    }

    /// The first rule that sends such a packet to the table that the kernel says has decided.
    pub(super) fn rule_for(&self, packet: &Packet, table: Option<TableId>) -> Option<&RouteRule> {
        let table = table.unwrap_or(TableId::MAIN);
        let tuple = &packet.tuple;
        let has =
            |network: Option<Ipv4Network>, address| network.is_none_or(|it| it.contains(address));
        self.rules().find(|rule| {
            let iif = rule
                .iif
                .as_ref()
                .is_none_or(|iif| packet.iif.as_ref() == Some(iif));
            let passes_over =
                rule.suppress_prefixlength.is_some() && !self.is_on_link(tuple.destination);
            rule.table() == Some(table)
                && has(rule.from, tuple.source)
                && has(rule.to, tuple.destination)
                && iif
                && rule.fwmark.is_none_or(|mark| mark.matches(packet.mark))
                && rule.rest.is_empty()
                && !passes_over
        })
    }

    /// Whether the main table has more than a default route for it.
    fn is_on_link(&self, address: Ipv4Addr) -> bool {
        let mut routes = self.run.snapshot.kernel.routing.routes.iter();
        routes.any(|route| {
            let is_main = route.table == TableId::MAIN && !route.is_default();
            is_main && route.destination.contains(address)
        })
    }

    pub(super) fn is_lan(&self, interface: &str) -> bool {
        let mut interfaces = self.run.config.lan.interfaces.iter();
        interfaces.any(|lan| lan.as_str() == interface)
    }

    fn uplink_of(&self, interface: &str) -> Option<UplinkName> {
        let mut uplink_links = self.run.uplink_links.iter();
        let is_its = |link: &UplinkLink| link.interface.as_str() == interface;
        let found = uplink_links.find(|(_, link)| link.as_ref().is_some_and(is_its));
        found.map(|(name, _)| name.clone())
    }

    /// `192.168.0.2:80`
    pub(super) fn host(&self, tuple: &Tuple) -> String {
        match tuple.ports {
            Some((_, port)) => format!("{}:{port}", tuple.destination),
            None => tuple.destination.to_string(),
        }
    }
}
