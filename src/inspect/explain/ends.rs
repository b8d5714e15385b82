//! What this router knows of the hosts that are asked: neighbours, tracked connections, the router's own sockets.

use std::net::Ipv4Addr;

use anyhow::Result;

use crate::inspect::explain::trace::{Failure, Trace, fail, host};
use crate::kernel::conntrack::{self, Filter, Flow, TcpState, Tuple};
use crate::kernel::ip::RouteLookup;
use crate::kernel::listeners::listening_below;
use crate::model::forward::Protocol;

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
        self.hop("host", format!("{next} on {dev}: {state}"), None);
        if matches!(state, "FAILED" | "INCOMPLETE") {
            let why = format!(
                "{next} did not answer ARP on {dev} when the kernel last asked: it is off, or has another address"
            );
            return fail(why, [format!("ping {next}")]);
        }
        Ok(())
    }

    /// Fails if the server has left the last TCP connection to it without an answer.
    pub fn unanswered(&mut self, tuple: Tuple) -> Result<()> {
        let protocol = self.question.service.protocol;
        if protocol != Protocol::Tcp {
            return Ok(());
        }
        let to_server = conntrack::find([Filter::RepliesFrom(tuple.destination)], |flow| {
            flow.protocol == protocol.number()
                && flow.reply.source == tuple.destination
                && flow.reply.ports.map(|ports| ports.0) == tuple.ports.map(|ports| ports.1)
        })?;
        // How long ago the last packet of each was. A server may have gone after it has answered others.
        let age = |flow: &&Flow| {
            let state = flow.tcp.map(TcpState::timeout_parameter);
            let timeout = self.snapshot.root.sysctl(&state.unwrap_or_default());
            let timeout: Option<u32> = timeout.and_then(|text| text.parse().ok());
            timeout.unwrap_or(u32::MAX).saturating_sub(flow.timeout)
        };
        let youngest = to_server.iter().min_by_key(age).and_then(|flow| flow.tcp);
        let server = host(tuple);
        if !youngest.is_some_and(TcpState::is_waiting) {
            return Ok(());
        }
        let waiting = to_server.iter().filter(|flow| !flow.is_replied).count();
        let what =
            format!("{waiting} connections wait for a reply of {server}, the last one among them");
        self.hop("host", what, None);
        fail(
            format!(
                "{server} has been asked, and no reply came by this router: nothing listens there, its own firewall drops requests, or its default gateway is another"
            ),
            [format!(
                "on {}: ss -ltn; ip route (the default route must lead to this router)",
                tuple.destination
            )],
        )
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
