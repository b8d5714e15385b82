//! Why a packet is lost or leaves by the wrong link, and what fixes that.

use anyhow::Result;

use crate::inspect::explain::Direction;
use crate::inspect::explain::trace::{Failure, Stop, Trace, fail};
use crate::inspect::packet_trace::{Connection, Hook, Packet, Place};
use crate::kernel::ip::RouteLookup;
use crate::kernel::sysctl::src_valid_mark;
use crate::model::forward::Forward;
use crate::model::route::{FwMark, RouteRule, TableId};

impl Trace<'_> {
    /// Why the kernel routes the reply to another link than the request came in by.
    pub(super) fn why_wrong_link(
        &self,
        back: &RouteLookup,
        reply: &Packet,
        connection: &Connection,
    ) -> Result<Failure> {
        let failure = |why, fixes| Ok(Failure { why, fixes });
        let Some((name, uplink)) = self.asked_uplink() else {
            return failure("that link is no uplink's".into(), Vec::new());
        };
        let Some(routing) = &uplink.routing else {
            return failure(
                format!("{name} has no table, so its connections are not marked"),
                vec![format!("[uplink.{name}] table = 10")],
            );
        };
        let FwMark { value, .. } = routing.mark;
        let table = routing.table;
        let deciding = self.rule_for(reply, back.table)?;
        let by_rule = match deciding {
            Some(rule) => format!("the rule {:?} decides", rule.listed()),
            None => format!("table {} decides", back.table.unwrap_or(TableId::MAIN)),
        };
        let has_rule = |selects: &dyn Fn(&RouteRule) -> bool| {
            let mut rules = self.rules();
            rules.any(|rule| rule.table() == Some(table) && selects(rule))
        };
        let asked = connection.original.destination;
        let is_from_asked = reply.iif.is_none() && reply.header.source == asked;
        if is_from_asked && let Some(source) = asked {
            return if back.table == Some(table) {
                let (why, fixes) = self.wrong_route(table);
                failure(why, fixes)
            } else if has_rule(&|rule| rule.from == Some(source.into())) {
                failure(by_rule, self.fixes(&rule_deletion(deciding)))
            } else {
                failure(
                    format!("no rule sends packets from {source} to table {table}"),
                    self.fixes(&[]),
                )
            };
        }
        for (of_connection, mark, whose, nobody) in [
            (
                true,
                connection.mark,
                "connection",
                format!("no rule gives the connection the mark {value:#x}"),
            ),
            (
                false,
                reply.mark,
                "reply",
                format!("no rule copies the connection's mark {value:#x} to the reply"),
            ),
        ] {
            if routing.mark.matches(mark) {
                continue;
            }
            return match self.mark_removal(of_connection, routing.mark) {
                Some(place) => failure(
                    format!("{place} takes the mark {value:#x} off the {whose}"),
                    self.fixes(&[place.deletion()]),
                ),
                None => failure(nobody, self.fixes(&[])),
            };
        }
        if back.table == Some(table) {
            let (why, fixes) = self.wrong_route(table);
            return failure(why, fixes);
        }
        if has_rule(&|rule| rule.fwmark == Some(routing.mark)) {
            return failure(by_rule, self.fixes(&rule_deletion(deciding)));
        }
        failure(
            format!("no rule sends packets with the mark {value:#x} to table {table}"),
            self.fixes(&[]),
        )
    }

    fn wrong_route(&self, table: TableId) -> (String, Vec<String>) {
        let mut routes = self.inputs.snapshot.kernel.routing.routes.iter();
        let foreign = routes.find(|route| route.table == table && !route.is_ours());
        match foreign {
            Some(route) => (
                format!("table {table} has the route {:?}", route.to_string()),
                self.fixes(&[format!("ip route del {route}")]),
            ),
            None => (
                format!("table {table} has no default route by that link"),
                self.fixes(&[]),
            ),
        }
    }

    /// The rule that took our mark off, if the mark was there before.
    fn mark_removal(&self, of_connection: bool, ours: FwMark) -> Option<&Place> {
        let changes = self.marks.iter();
        let mut changes = changes.filter(|change| change.of_connection == of_connection);
        let had_mark = changes.clone().any(|change| ours.matches(change.mark));
        let last = changes.next_back().filter(|_| had_mark)?;
        (!ours.matches(last.mark)).then_some(&last.place)
    }

    /// What lets a packet pass that this rule or policy stops.
    pub(super) fn fix_filter(&self, hook: Hook, place: &Place) -> Vec<String> {
        match self.asked_uplink() {
            Some((name, uplink))
                if hook == Hook::Forward && place.table == "filter" && !uplink.accept_forward =>
            {
                vec![format!(
                    "[uplink.{name}] accept-forward = true, then: mh-hook sync"
                )]
            }
            _ if place.number == 0 => {
                let command = place.command("-P", "ACCEPT");
                self.fixes(&[format!("{command}, or a rule that accepts the packet")])
            }
            _ => self.fixes(&[place.deletion()]),
        }
    }

    /// Why the kernel refuses to route a packet. `words` is the refusal as strerror(3) has it (`ip_route_input_slow`,
    /// `fib_validate_source`, net/ipv4/route.c, fib_frontend.c).
    pub(super) fn no_route(&mut self, packet: &Packet, words: &str) -> Result<RouteLookup, Stop> {
        let tuple = packet.header.tuple()?;
        let (source, destination) = (tuple.source, tuple.destination);
        let iif = packet.iif.clone().unwrap_or_default();
        if self.is_filtered(packet, words)? {
            let (how, why) = match self.inputs.snapshot.rp_filter(&iif) {
                1 => ("strict", "the route back to it is by another link"),
                _ => ("loose", "there is no route back to it"),
            };
            self.hop("rp_filter", format!("{how} on {iif}: dropped"), None);
            let why = format!("{how} rp_filter on {iif} drops the packet from {source}: {why}");
            let routing = self.asked_uplink().and_then(|(_, it)| it.routing.as_ref());
            let mark = routing.map(|routing| routing.mark);
            let removal = mark
                .filter(|mark| !mark.matches(packet.mark))
                .and_then(|mark| self.mark_removal(false, mark));
            if let Some(place) = removal {
                let why = format!("{why}; {place} takes our mark off the packet");
                return fail(why, self.fixes(&[place.deletion()]));
            }
            let fixes = match self.fixes(&[]) {
                fixes if fixes.is_empty() => {
                    let value = if how == "strict" { 2 } else { 0 };
                    vec![format!(
                        "echo {value} > /proc/sys/net/ipv4/conf/{iif}/rp_filter"
                    )]
                }
                fixes => fixes,
            };
            return fail(why, fixes);
        }
        let root = &self.inputs.snapshot.root;
        let is_on = |path: &str| root.sysctl(path).as_deref() == Some("1");
        let own_switch = format!("net/ipv4/conf/{iif}/forwarding");
        if words == "No route to host" && !iif.is_empty() && !is_on(&own_switch) {
            let fix = if is_on("net/ipv4/ip_forward") {
                format!("echo 1 > /proc/sys/{own_switch}")
            } else {
                "sysctl -w net.ipv4.ip_forward=1 (and net.ipv4.ip_forward = 1 in a file in /etc/sysctl.d)".into()
            };
            self.hop("route", "none: this router does not forward", None);
            return fail(
                format!("forwarding is off for packets that come in by {iif}"),
                vec![fix],
            );
        }
        self.hop("route", format!("none to {destination}: {words}"), None);
        let why = match words {
            "Invalid argument" => {
                format!("the kernel takes {source} for an impossible source at {iif} (a martian)")
            }
            _ => format!("the kernel has no route to {destination} for it: {words}"),
        };
        let routing = self.asked_uplink().and_then(|(_, it)| it.routing.as_ref());
        let is_closed = routing.is_some_and(|routing| {
            let mut routes = self.inputs.snapshot.kernel.routing.routes.iter();
            !routes.any(|route| route.table == routing.table && route.dev.is_some())
        });
        let why = if is_closed && self.direction != Direction::There {
            format!("{why}; the uplink's table has no route by its link")
        } else {
            why
        };
        fail(why, self.fixes(&[]))
    }

    /// Whether a refusal is the reverse path filter's. Newer kernels answer "Invalid argument" for this and for an impossible
    /// source.
    fn is_filtered(&self, packet: &Packet, words: &str) -> Result<bool> {
        let iif = packet.iif.as_deref().unwrap_or_default();
        let filter = self.inputs.snapshot.rp_filter(iif);
        match words {
            "Invalid cross-device link" => return Ok(true),
            "Invalid argument" if filter != 0 => {}
            _ => return Ok(false),
        }
        let mut question = packet.header.tuple()?.source.to_string();
        let counts_mark = |name| {
            let path = src_valid_mark(name);
            self.inputs.snapshot.root.sysctl(&path).as_deref() == Some("1")
        };
        if packet.mark != 0 && (counts_mark(iif) || counts_mark("all")) {
            question += &format!(" mark {:#x}", packet.mark);
        }
        Ok(match self.inputs.snapshot.route_get(&question)? {
            Ok(way) => !way.is_local && filter == 1 && way.dev != iif,
            Err(_) => true,
        })
    }

    /// Why no forward took the request.
    pub(super) fn no_forward(&self) -> Failure {
        let service = self.inputs.question.service;
        if let Some(place) = &self.untracked {
            return Failure {
                why: format!("{place} keeps the connection from all forwards"),
                fixes: vec![place.deletion()],
            };
        }
        let Some((name, uplink)) = self.asked_uplink() else {
            return Failure {
                why: format!("no forward is for {service}"),
                fixes: Vec::new(),
            };
        };
        let source = self.inputs.question.source;
        let forwards = uplink.forwards.iter();
        let of_service: Vec<&Forward> = forwards
            .filter(|forward| forward.takes(service.asked_by(None)))
            .collect();
        let takes_source = |forward: &&Forward| forward.takes(service.asked_by(Some(source)));
        let (why, fixes) = if of_service.iter().any(takes_source) {
            (
                format!("{name}'s forward of {service} is not installed"),
                self.fixes(&[]),
            )
        } else if !of_service.is_empty() {
            (
                format!("{name}'s forward of {service} is not for {source}"),
                vec![format!("[uplink.{name}] forward: from = [\"{source}/32\"]")],
            )
        } else {
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
        };
        Failure { why, fixes }
    }

    /// These fixes, and `mh-hook sync` if entries of ours are missing or extra.
    pub(super) fn fixes(&self, others: &[String]) -> Vec<String> {
        let comparison = self.inputs.comparison;
        let steps = self
            .inputs
            .snapshot
            .steps(&comparison.installed, &comparison.desired);
        let sync = (!steps.is_empty()).then(|| "mh-hook sync".to_owned());
        others.iter().cloned().chain(sync).collect()
    }
}

/// The command that deletes a rule, unless it is one of ours or of the kernel's own.
fn rule_deletion(rule: Option<&RouteRule>) -> Vec<String> {
    let rule = rule.filter(|rule| !rule.is_ours() && rule.priority < 32766);
    let command = rule.map(|rule| format!("ip rule del {rule}"));
    command.into_iter().collect()
}
