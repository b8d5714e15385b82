//! What this router knows of the hosts that are asked: neighbours, tracked connections, the router's own sockets.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::Result;
use log::debug;

use crate::inspect::explain::trace::{Failure, Trace, fail, host};
use crate::kernel::conntrack::{self, Filter, Flow, TcpState, Tuple};
use crate::kernel::ip::RouteLookup;
use crate::kernel::listeners::listening_below;
use crate::kernel::probe::{self, Answer};
use crate::model::forward::Protocol;

/// The servers that were asked: each once, however often the connection is traced.
#[derive(Debug, Default)]
pub struct Servers(RefCell<BTreeMap<SocketAddrV4, Option<Answer>>>);

impl Servers {
    /// What a server says to a connection of this router's. None if it can't be asked.
    fn ask(&self, server: SocketAddrV4) -> Option<Answer> {
        let ask = || {
            let answer = probe::ask(server);
            answer.inspect_err(|error| debug!("{error:#}")).ok()
        };
        *self.0.borrow_mut().entry(server).or_insert_with(ask)
    }
}

impl Trace<'_> {
    /// Whether the next host answers ARP, as far as the kernel knows already.
    pub fn neighbour(&mut self, way: &RouteLookup, destination: Ipv4Addr) -> Result<()> {
        let dev = &way.dev;
        let next = way.via.clone().unwrap_or_else(|| destination.to_string());
        let question = format!("neigh show to {next} dev {dev}");
        let output = self.snapshot.tools.ip_ask(&question)?;
        let state = output.stdout.split_ascii_whitespace().last();
        let Some(state) = state.filter(|_| output.status.success()) else {
            return Ok(());
        };
        let is_silent = matches!(state, "FAILED" | "INCOMPLETE");
        // A TCP server says more.
        if is_silent || self.question.service.protocol != Protocol::Tcp {
            self.hop("host", format!("{next} on {dev}: {state}"), None);
        }
        if is_silent {
            let why = format!(
                "{next} did not answer ARP on {dev} when the kernel last asked: it is off, or has another address"
            );
            return fail(why, [format!("ping {next}")]);
        }
        Ok(())
    }

    /// Whether the server answers, by the connections to it that are tracked and by one of our own: conntrack forgets at once
    /// a connection whose only answer is a reset (`nf_conntrack_tcp_packet`, net/netfilter/nf_conntrack_proto_tcp.c).
    pub fn server_answers(&mut self, way: &RouteLookup, tuple: Tuple) -> Result<()> {
        let Some((_, port)) = tuple
            .ports
            .filter(|_| self.question.service.protocol == Protocol::Tcp)
        else {
            return Ok(());
        };
        let (address, server) = (tuple.destination, host(tuple));
        let unanswered = self.unanswered(address, port)?;
        let can_ask = self.can_ask(&way.dev, address, port);
        let asked = can_ask.then(|| self.servers.ask(SocketAddrV4::new(address, port)));
        let answer = asked.flatten();
        let look = format!("on {address}: ss -ltn 'sport = :{port}'");
        if answer == Some(Answer::Refuses) {
            self.hop(
                "host",
                format!("{server} refuses a connection of this router's"),
                None,
            );
            let why = format!(
                "{server} refuses connections: nothing listens there, or its own firewall rejects them"
            );
            return fail(why, [look]);
        }
        if unanswered > 0 {
            let what = format!(
                "{unanswered} connections wait for a reply of {server}, the last one among them"
            );
            self.hop("host", what, None);
            let (why, look) = match answer {
                Some(Answer::Accepts) => (
                    "though it answers this router: its default gateway is another, or its own firewall drops what comes from outside",
                    format!("on {address}: ip route (the default route must lead to this router)"),
                ),
                _ => (
                    "nothing listens there, its own firewall drops requests, or its default gateway is another",
                    format!(
                        "on {address}: ss -ltn; ip route (the default route must lead to this router)"
                    ),
                ),
            };
            return fail(
                format!("{server} has been asked, and no reply came by this router: {why}"),
                [look],
            );
        }
        match answer {
            Some(Answer::Silent) => {
                self.hop(
                    "host",
                    format!("{server} does not answer this router"),
                    None,
                );
                self.is_unsure = true;
                self.caveats.push(format!(
                    "{server} leaves a connection of this router's unanswered: unless it drops only those, it answers nobody"
                ));
            }
            Some(_) => self.hop("host", format!("{server} accepts connections"), None),
            None => {}
        }
        Ok(())
    }

    /// How many TCP connections to a server wait for its first answer; none if it has answered a younger one. Those that are
    /// open do not count: they may be old.
    fn unanswered(&self, address: Ipv4Addr, port: u16) -> Result<usize> {
        let to_server = conntrack::find([Filter::RepliesFrom(address)], |flow| {
            flow.protocol == Protocol::Tcp.number()
                && flow.reply.source == address
                && flow.reply.ports.is_some_and(|(source, _)| source == port)
        })?;
        // How long ago the last packet of each was, in seconds.
        let age = |flow: &Flow| {
            let state = flow.tcp.map(TcpState::timeout_parameter);
            let timeout = self.snapshot.root.sysctl(&state.unwrap_or_default());
            let timeout: Option<u32> = timeout.and_then(|text| text.parse().ok());
            timeout.unwrap_or(u32::MAX).saturating_sub(flow.timeout)
        };
        let is_waiting = |flow: &&Flow| flow.tcp.is_some_and(TcpState::is_waiting);
        let is_open = |flow: &&Flow| flow.tcp.is_some_and(TcpState::is_established);
        let waiting = to_server.iter().filter(is_waiting);
        let answered = to_server
            .iter()
            .filter(|it| !is_waiting(it) && !is_open(it));
        let youngest = waiting.clone().map(age).min();
        let is_last = match (youngest, answered.map(age).min()) {
            (Some(waiting), Some(answered)) => waiting <= answered,
            (waiting, None) => waiting.is_some(),
            (None, _) => false,
        };
        Ok(if is_last { waiting.count() } else { 0 })
    }

    /// Notes the client's earlier connections, which keep the server that they began with.
    pub fn earlier_connections(&mut self, tuple: Tuple) -> Result<()> {
        let asked = self.connection.original.tuple()?;
        let port = |tuple: Tuple| tuple.ports.map(|ports| ports.1);
        let number = self.question.service.protocol.number();
        let earlier = conntrack::find([Filter::To(asked.destination)], |flow| {
            flow.protocol == number
                && flow.original.source == asked.source
                && flow.original.destination == asked.destination
                && port(flow.original) == port(asked)
                && flow.reply.source != tuple.destination
        })?;
        self.caveats.extend(earlier.iter().map(|flow| {
            format!(
                "an earlier connection still goes to {}, until it ends or: conntrack {flow}",
                flow.reply.source
            )
        }));
        Ok(())
    }

    /// Whether a program on this router listens there.
    pub fn listens(&mut self, tuple: Tuple) -> Result<()> {
        let protocol = self.question.service.protocol;
        let port = tuple.ports.map(|ports| ports.1);
        let Some(port) = port.filter(|_| matches!(protocol, Protocol::Tcp | Protocol::Udp)) else {
            return Ok(());
        };
        let sockets = listening_below(&self.snapshot.root, protocol);
        let socket = sockets.iter().find(|socket| {
            socket.port == port && socket.address.is_none_or(|own| own == tuple.destination)
        });
        if let Some(socket) = socket {
            if socket.address.is_none() && protocol == Protocol::Udp {
                self.caveats.push(format!(
                    "the program at udp/{port} is bound to no address: unless it answers with the address that was asked, the source of its reply is the default link's address"
                ));
            }
            return Ok(());
        }
        if self.connection.is_dnat {
            let why = format!(
                "it is sent to {}, which is this router itself, and nothing listens there",
                host(tuple)
            );
            let fix = "to = \"…\": the address of a LAN host".to_owned();
            return fail(why, self.fixes([fix]));
        }
        let Failure { why, fixes } = self.no_forward();
        let why = format!("{why}, and nothing on this router listens at {protocol}/{port}");
        fail(why, fixes)
    }
}
