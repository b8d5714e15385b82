//! What this router knows of those who are asked: neighbours, tracked connections, sockets of its own.

use std::fs;
use std::net::Ipv4Addr;

use crate::config::Protocol;
use crate::conntrack::Tuple;
use crate::explain::Direction;
use crate::ip::Way;
use crate::journey::{Journey, Stop, fails};
use crate::packet::Connection;

impl Journey<'_> {
    /// Whether the next host answers ARP, as far as the kernel has found out already.
    pub(super) fn neighbour(&mut self, way: &Way, destination: Ipv4Addr) -> Result<(), Stop> {
        let next = way.via.clone().unwrap_or_else(|| destination.to_string());
        let question = format!("neigh show to {next} dev {}", way.dev);
        let output = self.run.system.tools.ip_ask(&question)?;
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
        let Some(flows) = &self.run.system.flows else {
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
        let flows = self.run.system.flows.iter().flatten().filter(|flow| {
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
        let Some((port, files)) = port.zip(match protocol {
            Protocol::Tcp => Some(["tcp", "tcp6"]),
            Protocol::Udp => Some(["udp", "udp6"]),
            _ => None,
        }) else {
            return Ok(());
        };
        let sockets = files.iter().flat_map(|name| {
            let text = fs::read_to_string(format!("/proc/net/{name}")).unwrap_or_default();
            let lines: Vec<(bool, bool)> = text
                .lines()
                .filter_map(|line| socket(line, tuple.destination, port, protocol))
                .collect();
            lines
        });
        let sockets: Vec<(bool, bool)> = sockets.collect();
        if let Some((_, is_any)) = sockets.iter().find(|(matches, _)| *matches) {
            if *is_any && protocol == Protocol::Udp && self.direction == Direction::There {
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

/// A line of /proc/net/tcp or its kin: whether it waits at this address and port, and whether it is
/// bound to no address.
fn socket(line: &str, address: Ipv4Addr, port: u16, protocol: Protocol) -> Option<(bool, bool)> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let (local_address, local_port) = words.next()?.split_once(':')?;
    let state = words.nth(1)?;
    // TCP_LISTEN; a socket of UDP that is bound is in TCP_CLOSE (net/tcp_states.h).
    let waits = state
        == if protocol == Protocol::Tcp {
            "0A"
        } else {
            "07"
        };
    let is_any = local_address.bytes().all(|byte| byte == b'0');
    // In the host's byte order, the last four bytes of an IPv6 address too.
    let number = u32::from_str_radix(
        local_address.get(local_address.len().checked_sub(8)?..)?,
        16,
    )
    .ok()?;
    let is_it = is_any || Ipv4Addr::from(number.to_ne_bytes()) == address;
    let is_port = u16::from_str_radix(local_port, 16).ok()? == port;
    Some((waits && is_it && is_port, is_any))
}
