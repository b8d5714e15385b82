//! What this router knows of those who are asked: neighbours, tracked connections, sockets of its own.

use std::net::Ipv4Addr;

use crate::inspect::explain::Direction;
use crate::inspect::explain::trace::{Journey, Stop, fails};
use crate::inspect::packet_trace::Connection;
use crate::kernel::conntrack::Tuple;
use crate::kernel::ip::RouteLookup;
use crate::kernel::listeners::{Socket, listening};
use crate::model::forward::Protocol;

impl Journey<'_> {
    /// Whether the next host answers ARP, as far as the kernel has found out already.
    pub(super) fn neighbour(
        &mut self,
        way: &RouteLookup,
        destination: Ipv4Addr,
    ) -> Result<(), Stop> {
        let next = way.via.clone().unwrap_or_else(|| destination.to_string());
        let question = format!("neigh show to {next} dev {}", way.dev);
        let output = self.run.snapshot.tools.ip_ask(&question)?;
        let state = output.stdout.split_ascii_whitespace().last();
        let Some(state) = state.filter(|_| output.status.success()) else {
            return Ok(());
        };
        self.hop("host", format!("{next} on {}: {state}", way.dev), None);
        if matches!(state, "FAILED" | "INCOMPLETE") {
            return fails(
                format!(
                    "{next} did not answer ARP on {} when it was last asked: it is off, or has another address",
                    way.dev
                ),
                vec![format!("ping {next}")],
            );
        }
        Ok(())
    }

    /// What tracked connections say of the server: asked in vain, all of them.
    pub(super) fn silence(&mut self, tuple: &Tuple) -> Result<(), Stop> {
        let Some(flows) = &self.run.snapshot.flows else {
            return Ok(());
        };
        let number = self.run.question.service.protocol.number();
        let to_it = flows.iter().filter(|flow| {
            flow.number == number
                && flow.reply.source == tuple.destination
                && flow.reply.ports.map(|ports| ports.0) == tuple.ports.map(|ports| ports.1)
        });
        let (answered, waiting): (Vec<_>, Vec<_>) = to_it.partition(|flow| flow.is_replied);
        if waiting.is_empty()
            || !answered.is_empty()
            || self.run.question.service.protocol != Protocol::Tcp
        {
            return Ok(());
        }
        let at = self.host(tuple);
        self.hop(
            "host",
            format!(
                "{} connections wait for an answer of {at}, none has one",
                waiting.len()
            ),
            None,
        );
        fails(
            format!(
                "{at} has been asked, and no answer came by this router: nothing listens there, its own firewall is silent, or its default gateway is another"
            ),
            vec![format!(
                "on {}: ss -ltn; ip route (the default must lead to this router)",
                tuple.destination
            )],
        )
    }

    /// Connections of this client from before, which go on as they began.
    pub(super) fn earlier(&mut self, connection: &Connection, tuple: &Tuple) {
        let port = |ports: Option<(u16, u16)>| ports.map(|ports| ports.1);
        let flows = self.run.snapshot.flows.iter().flatten().filter(|flow| {
            flow.number == connection.protocol
                && flow.original.source == connection.original.source
                && flow.original.destination == connection.original.destination
                && port(flow.original.ports) == port(connection.original.ports)
                && flow.reply.source != tuple.destination
        });
        self.caveats.extend(flows.map(|flow| {
            format!(
                "a connection from before goes on to {}, until it ends or: conntrack {flow}",
                flow.reply.source
            )
        }));
    }

    /// Whether a program of the router's waits there (proc(5), /proc/net/tcp).
    pub(super) fn listens(&mut self, tuple: &Tuple, connection: &Connection) -> Result<(), Stop> {
        let protocol = self.run.question.service.protocol;
        let port = tuple.ports.map(|ports| ports.1);
        let Some(port) = port.filter(|_| matches!(protocol, Protocol::Tcp | Protocol::Udp)) else {
            return Ok(());
        };
        let sockets = listening(protocol);
        let waits = |socket: &&Socket| {
            let is_it = socket.address.is_none_or(|own| own == tuple.destination);
            is_it && socket.port == port
        };
        if let Some(socket) = sockets.iter().find(waits) {
            let is_any = socket.address.is_none();
            if is_any && protocol == Protocol::Udp && self.direction == Direction::There {
                self.caveats.push(format!(
                    "the program at udp/{port} is bound to no address: unless it takes care of that itself, its reply has the address of the default link"
                ));
            }
            return Ok(());
        }
        if connection.is_dnat {
            let at = self.host(tuple);
            return fails(
                format!(
                    "it is sent to {at}, which is this router itself, and nothing listens there"
                ),
                self.mend(&["to = \"…\": the address of a LAN host".to_owned()]),
            );
        }
        let (why, mend) = self.no_forward();
        fails(
            format!("{why}, and nothing on this router listens at {protocol}/{port}"),
            mend,
        )
    }
}
