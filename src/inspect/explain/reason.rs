//! Why a packet is lost, or goes elsewhere, and what mends that.

use crate::inspect::explain::Direction;
use crate::inspect::explain::trace::{Journey, Stop, fails};
use crate::inspect::packet_trace::{Connection, Hook, Packet, Place};
use crate::kernel::conntrack::Tuple;
use crate::kernel::ip::RouteLookup;
use crate::kernel::sysctl;
use crate::model::forward::Forward;
use crate::model::route::{FwMark, RouteRule, TableId};
use crate::reconcile::diff::diff;

impl Journey<'_> {
    /// Why the kernel's answer is another link than that by which the request came, and what mends it.
    pub(super) fn why_elsewhere(
        &self,
        back: &RouteLookup,
        reply: &Packet,
        connection: &Connection,
    ) -> (String, Vec<String>) {
        let Some((name, uplink)) = self
            .uplink
            .as_ref()
            .and_then(|name| self.run.config.uplinks.get_key_value(name))
        else {
            return ("that link is no uplink's".into(), Vec::new());
        };
        let Some(routing) = &uplink.routing else {
            return (
                format!("{name} has no table, so its connections are not marked"),
                vec![format!("[uplink.{name}] table = 10")],
            );
        };
        let FwMark { value, mask } = routing.mark;
        let is_marked = |mark: u32| mark & mask == value;
        let rule = self.rule_for(reply, back.table);
        let by_rule = match rule {
            Some(rule) => format!("the rule {:?} has decided", rule.listed()),
            None => format!("table {} has decided", back.table.unwrap_or(TableId::MAIN)),
        };
        if reply.iif.is_none() {
            let source = connection.original.destination;
            let found = self.rules().any(|rule| {
                rule.table() == Some(routing.table) && rule.from == Some(source.into())
            });
            return if back.table == Some(routing.table) {
                self.wrong_route(routing.table)
            } else if found {
                (by_rule, self.mend(&rule_deletion(rule)))
            } else {
                (
                    format!("no rule sends {source} to table {}", routing.table),
                    self.mend(&[]),
                )
            };
        }
        if !is_marked(connection.mark) {
            let wiped = self.last_change(true, &is_marked);
            return match wiped {
                Some(place) => (
                    format!("{} takes the mark {value:#x} off the connection", place),
                    self.mend(&[place.deletion()]),
                ),
                None => (
                    format!("nothing gives the connection the mark {value:#x}"),
                    self.mend(&[]),
                ),
            };
        }
        if !is_marked(reply.mark) {
            let wiped = self.last_change(false, &is_marked);
            return match wiped {
                Some(place) => (
                    format!("{} takes the mark {value:#x} off the packet", place),
                    self.mend(&[place.deletion()]),
                ),
                None => (
                    format!(
                        "nothing puts the connection's mark {value:#x} on packets from the LAN"
                    ),
                    self.mend(&[]),
                ),
            };
        }
        if back.table == Some(routing.table) {
            return self.wrong_route(routing.table);
        }
        let mut rules = self.rules();
        let ours = rules
            .any(|rule| rule.table() == Some(routing.table) && rule.fwmark == Some(routing.mark));
        if ours {
            return (by_rule, self.mend(&rule_deletion(rule)));
        }
        (
            format!(
                "no rule sends the mark {value:#x} to table {}",
                routing.table
            ),
            self.mend(&[]),
        )
    }

    fn wrong_route(&self, table: TableId) -> (String, Vec<String>) {
        let mut routes = self.run.snapshot.kernel.routing.routes.iter();
        let foreign = routes.find(|route| route.table == table && !route.is_ours());
        match foreign {
            Some(route) => (
                format!("table {table} has the route {:?}", route.to_string()),
                self.mend(&[format!("ip route del {route}")]),
            ),
            None => (
                format!("table {table} has no default route by that link"),
                self.mend(&[]),
            ),
        }
    }

    /// The change that took a mark away, if there was one to take.
    fn last_change(&self, of_connection: bool, is_marked: &dyn Fn(u32) -> bool) -> Option<&Place> {
        let changes = || {
            self.marks
                .iter()
                .filter(move |change| change.of_connection == of_connection)
        };
        let had_it = changes().any(|change| is_marked(change.mark));
        let last = changes().next_back().filter(|_| had_it)?;
        (!is_marked(last.mark)).then_some(&last.place)
    }

    /// What lets a packet pass that this rule or policy stops.
    pub(super) fn let_pass(&self, hook: Hook, place: &Place) -> Vec<String> {
        let uplink = self
            .uplink
            .as_ref()
            .map(|name| (name, &self.run.config.uplinks[name]));
        match uplink {
            Some((name, uplink))
                if hook == Hook::Forward && place.table == "filter" && !uplink.accept_forward =>
            {
                vec![format!(
                    "[uplink.{name}] accept-forward = true, then: mh-hook sync"
                )]
            }
            _ if place.number == 0 => self.mend(&[format!(
                "iptables -t {} -P {} ACCEPT, or a rule that accepts it",
                place.table, place.chain
            )]),
            _ => self.mend(&[place.deletion()]),
        }
    }

    /// The refusals of `ip_route_input_slow` and `fib_validate_source` (net/ipv4/route.c,
    /// fib_frontend.c), as strerror(3) has them.
    pub(super) fn no_route(&mut self, packet: &Packet, words: &str) -> Result<RouteLookup, Stop> {
        let iif = packet.iif.clone().unwrap_or_default();
        let Tuple {
            source,
            destination,
            ..
        } = packet.tuple;
        // Newer kernels say of both that the argument is invalid.
        let is_strict = sysctl::rp_filter(&iif) == 1;
        let leads_elsewhere = || match self.run.snapshot.route_get(&source.to_string()) {
            Ok(Ok(way)) => !way.is_local && way.dev != iif,
            _ => true,
        };
        if words == "Invalid cross-device link"
            || words == "Invalid argument" && is_strict && leads_elsewhere()
        {
            self.hop("rp_filter", format!("strict on {iif}: dropped"), None);
            let loosen = format!("echo 2 > /proc/sys/net/ipv4/conf/{iif}/rp_filter");
            let mend = self.mend(&[]);
            return fails(
                format!(
                    "strict rp_filter on {iif} drops it: the way back to {source} is another link's"
                ),
                if mend.is_empty() { vec![loosen] } else { mend },
            );
        }
        let forwards = |name: &str| {
            sysctl::read(&format!("net/ipv4/conf/{name}/forwarding")).as_deref() == Some("1")
        };
        if words == "No route to host" && !iif.is_empty() && !forwards(&iif) {
            let mend = if sysctl::read("net/ipv4/ip_forward").as_deref() == Some("1") {
                format!("echo 1 > /proc/sys/net/ipv4/conf/{iif}/forwarding")
            } else {
                "sysctl -w net.ipv4.ip_forward=1 (and net.ipv4.ip_forward = 1 in a file in /etc/sysctl.d)".into()
            };
            self.hop("route", "none: this router does not forward", None);
            return fails(
                format!("forwarding is off for what comes by {iif}"),
                vec![mend],
            );
        }
        self.hop("route", format!("none to {destination}: {words}"), None);
        let why = match words {
            "Invalid argument" => {
                format!("the kernel takes {source} for an impossible source at {iif} (a martian)")
            }
            _ => format!("the kernel has no route to {destination} for it: {words}"),
        };
        let closed = self.uplink.as_ref().is_some_and(|name| {
            let routing = self.run.config.uplinks[name].routing.as_ref();
            let table = routing.map(|routing| routing.table);
            let mut routes = self.run.snapshot.kernel.routing.routes.iter();
            table.is_some()
                && !routes.any(|route| Some(route.table) == table && route.dev.is_some())
        });
        let why = if closed && self.direction != Direction::There {
            format!("{why}; the uplink's table has no route by its link")
        } else {
            why
        };
        fails(why, self.mend(&[]))
    }

    /// Why nothing redirected the request.
    pub(super) fn no_forward(&self) -> (String, Vec<String>) {
        let service = self.run.question.service;
        let Some(name) = &self.uplink else {
            return (format!("no forward is for {service}"), Vec::new());
        };
        let mut forwards = self.run.config.uplinks[name].forwards.iter();
        let source = self.run.question.source;
        let lets_in = |forward: &&Forward| forward.takes(service.asked_by(Some(source)));
        let fitting: Vec<&Forward> = forwards
            .by_ref()
            .filter(|forward| forward.takes(service.asked_by(None)))
            .collect();
        if fitting.iter().any(lets_in) {
            return (
                format!("the forward of {service} that {name} has does not stand in the kernel"),
                self.mend(&[]),
            );
        }
        if !fitting.is_empty() {
            return (
                format!("the forward of {service} that {name} has is not for {source}"),
                vec![format!("[uplink.{name}] forward: from = [\"{source}/32\"]")],
            );
        }
        let port = service
            .port
            .map_or(String::new(), |port| format!(", port = {port}"));
        (
            format!("{name} has no forward of {service}"),
            vec![format!(
                "[uplink.{name}] forward = [{{ proto = \"{}\"{port}, to = \"…\" }}]",
                service.protocol
            )],
        )
    }

    /// Ours by a `sync`, if anything of ours is missing or too much; else what is given.
    pub(super) fn mend(&self, other: &[String]) -> Vec<String> {
        let drifted = !diff(&self.run.installed, self.run.desired).is_empty();
        let sync = drifted.then(|| "mh-hook sync".to_owned());
        other.iter().cloned().chain(sync).collect()
    }
}

/// What takes a rule away that is neither ours nor the kernel's own.
fn rule_deletion(rule: Option<&RouteRule>) -> Vec<String> {
    let rule = rule.filter(|rule| !rule.is_ours() && rule.priority < 32766);
    let command = rule.map(|rule| format!("ip rule del {rule}"));
    command.into_iter().collect()
}
