//! Why a packet is lost or leaves by the wrong link, and what fixes that.

use anyhow::Result;

use crate::config::Routing;
use crate::inspect::explain::Direction;
use crate::inspect::explain::trace::{Failure, Trace, fail, table_of};
use crate::inspect::packet_trace::{Hook, Packet, Place};
use crate::kernel::ip::RouteLookup;
use crate::kernel::sysctl::src_valid_mark;
use crate::model::route::{FwMark, RouteRule};

impl Trace<'_> {
    /// Why the kernel routes the reply to another link than the request came in by.
    pub fn why_wrong_link(&self, back: &RouteLookup, reply: &Packet) -> Result<Failure> {
        let Some((name, uplink)) = self.uplink else {
            return Ok(Failure::new("that link is no uplink's", []));
        };
        let Some(routing) = &uplink.routing else {
            return Ok(Failure::new(
                format!("{name} has no table, so its connections are not marked"),
                [format!("[uplink.{name}] table = 10")],
            ));
        };
        let asked = self.connection.original.destination;
        let is_from_asked = reply.iif.is_none() && reply.header.source == asked;
        let source = asked.filter(|_| is_from_asked);
        if source.is_none()
            && let Some(failure) = self.missing_mark(routing.mark, reply)
        {
            return Ok(failure);
        }
        let (value, table) = (routing.mark.value, routing.table);
        if back.table == Some(table) {
            let mut routes = self.snapshot.kernel.routing.routes.iter();
            let foreign = routes.find(|route| route.table == table && !route.is_ours());
            return Ok(match foreign {
                Some(route) => Failure::new(
                    format!("table {table} has the route {:?}", route.to_string()),
                    self.fixes([format!("ip route del {route}")]),
                ),
                None => Failure::new(
                    format!("table {table} has no default route by that link"),
                    self.fixes([]),
                ),
            });
        }
        let selects = |rule: &RouteRule| match source {
            Some(source) => rule.from == Some(source.into()),
            None => rule.fwmark == Some(routing.mark),
        };
        let mut rules = self.snapshot.kernel.routing.rules.iter();
        if !rules.any(|rule| rule.table() == Some(table) && selects(rule)) {
            let packets = match source {
                Some(source) => format!("from {source}"),
                None => format!("with the mark {value:#x}"),
            };
            let why = format!("no rule sends packets {packets} to table {table}");
            return Ok(Failure::new(why, self.fixes([])));
        }
        let deciding = self.rule_for(reply, back)?;
        let why = match deciding {
            Some(rule) => format!("the rule {:?} decides", rule.listed()),
            None => format!("table {} decides", table_of(back)),
        };
        // One that is neither ours nor the kernel's own.
        let foreign = deciding.filter(|rule| !rule.is_ours() && rule.priority < 32766);
        let deletion = foreign.map(|rule| format!("ip rule del {rule}"));
        Ok(Failure::new(why, self.fixes(deletion)))
    }

    /// Why the connection or its reply does not have our mark, if so.
    fn missing_mark(&self, ours: FwMark, reply: &Packet) -> Option<Failure> {
        let of_connection = !ours.matches(self.connection.mark);
        if !of_connection && ours.matches(reply.mark) {
            return None;
        }
        let value = ours.value;
        let (whose, nobody) = if of_connection {
            let nobody = format!("no rule gives the connection the mark {value:#x}");
            ("connection", nobody)
        } else {
            let nobody = format!("no rule copies the connection's mark {value:#x} to the reply");
            ("reply", nobody)
        };
        Some(match self.mark_removal(of_connection, ours) {
            Some(place) => Failure::new(
                format!("{place} takes the mark {value:#x} off the {whose}"),
                self.fixes([place.deletion()]),
            ),
            None => Failure::new(nobody, self.fixes([])),
        })
    }

    /// The rule that took our mark off, if the mark was there before.
    fn mark_removal(&self, of_connection: bool, ours: FwMark) -> Option<&Place> {
        let changes = self.passages.iter().flat_map(|passage| &passage.marks);
        let mut changes = changes.filter(|change| change.of_connection == of_connection);
        let had_mark = changes.clone().any(|change| ours.matches(change.mark));
        let last = changes.next_back().filter(|_| had_mark)?;
        (!ours.matches(last.mark)).then_some(&last.place)
    }

    /// What lets a packet pass that this rule or policy stops.
    pub fn fix_filter(&self, hook: Hook, place: &Place) -> Vec<String> {
        if place.native.is_some() {
            return self.let_pass(hook, place);
        }
        if let Some((name, uplink)) = self.uplink
            && hook == Hook::Forward
            && place.table == "filter"
            && !uplink.accept_forward
        {
            return vec![format!(
                "[uplink.{name}] accept-forward = true, then: mh-hook sync"
            )];
        }
        self.fixes([match place.number {
            0 => place.command("-P", "ACCEPT, or a rule that accepts the packet"),
            _ => place.deletion(),
        }])
    }

    /// What lets a packet pass a rule or policy of nftables.
    fn let_pass(&self, hook: Hook, place: &Place) -> Vec<String> {
        let service = self.question.service;
        let accept = match (hook, service.port) {
            (Hook::Forward, _) if self.connection.is_dnat => "ct status dnat accept".to_owned(),
            (Hook::Input, Some(port)) => format!("{} dport {port} accept", service.protocol),
            _ if place.number > 0 => return vec![place.deletion()],
            _ => "accept".to_owned(),
        };
        place.insertion(&accept).into_iter().collect()
    }

    /// Why the kernel refuses to route a packet. `words` is the refusal as strerror(3) has it (`ip_route_input_slow`,
    /// `fib_validate_source`, net/ipv4/route.c, fib_frontend.c).
    pub fn no_route(&mut self, packet: &Packet, words: &str) -> Result<RouteLookup> {
        if self.is_filtered(packet, words)? {
            return self.filtered(packet);
        }
        let tuple = packet.header.tuple()?;
        let (source, destination) = (tuple.source, tuple.destination);
        let iif = packet.iif.as_deref().unwrap_or_default();
        let own_switch = format!("net/ipv4/conf/{iif}/forwarding");
        if words == "No route to host" && !iif.is_empty() && !self.is_on(&own_switch) {
            let fix = if self.is_on("net/ipv4/ip_forward") {
                format!("echo 1 > /proc/sys/{own_switch}")
            } else {
                "sysctl -w net.ipv4.ip_forward=1 (and net.ipv4.ip_forward = 1 in a file in /etc/sysctl.d)".into()
            };
            self.hop("route", "none: this router does not forward", None);
            let why = format!("forwarding is off for packets that come in by {iif}");
            return fail(why, [fix]);
        }
        self.hop("route", format!("none to {destination}: {words}"), None);
        let mut why = match words {
            "Invalid argument" => {
                format!("the kernel takes {source} for an impossible source at {iif} (a martian)")
            }
            _ => format!("the kernel has no route to {destination} for it: {words}"),
        };
        let is_closed = self.routing().is_some_and(|routing| {
            let mut routes = self.snapshot.kernel.routing.routes.iter();
            !routes.any(|route| route.table == routing.table && route.dev.is_some())
        });
        if is_closed && self.direction != Direction::There {
            why += "; the uplink's table has no route by its link";
        }
        fail(why, self.fixes([]))
    }

    fn routing(&self) -> Option<&Routing> {
        self.uplink?.1.routing.as_ref()
    }

    /// Whether a kernel parameter is 1.
    fn is_on(&self, path: &str) -> bool {
        self.snapshot.root.sysctl(path).as_deref() == Some("1")
    }

    /// Whether a refusal is the reverse path filter's. Newer kernels answer "Invalid argument" for this and for an impossible
    /// source.
    fn is_filtered(&self, packet: &Packet, words: &str) -> Result<bool> {
        let iif = packet.iif.as_deref().unwrap_or_default();
        let filter = self.snapshot.rp_filter(iif);
        match words {
            "Invalid cross-device link" => return Ok(true),
            "Invalid argument" if filter != 0 => {}
            _ => return Ok(false),
        }
        let mut question = packet.header.tuple()?.source.to_string();
        let counts_mark = [iif, "all"].map(|name| self.is_on(&src_valid_mark(name)));
        if packet.mark != 0 && counts_mark.contains(&true) {
            question += &format!(" mark {:#x}", packet.mark);
        }
        Ok(match self.snapshot.route_get(&question)? {
            Ok(way) => !way.is_local && filter == 1 && way.dev != iif,
            Err(_) => true,
        })
    }

    /// Why the reverse path filter drops a packet.
    fn filtered(&mut self, packet: &Packet) -> Result<RouteLookup> {
        let source = packet.header.tuple()?.source;
        let iif = packet.iif.as_deref().unwrap_or_default();
        let (how, why, value) = match self.snapshot.rp_filter(iif) {
            1 => ("strict", "the route back to it is by another link", 2),
            _ => ("loose", "there is no route back to it", 0),
        };
        self.hop("rp_filter", format!("{how} on {iif}: dropped"), None);
        let why = format!("{how} rp_filter on {iif} drops the packet from {source}: {why}");
        let mark = self.routing().map(|routing| routing.mark);
        if let Some(mark) = mark.filter(|mark| !mark.matches(packet.mark))
            && let Some(place) = self.mark_removal(false, mark)
        {
            let why = format!("{why}; {place} takes our mark off the packet");
            return fail(why, self.fixes([place.deletion()]));
        }
        let mut fixes = self.fixes([]);
        if fixes.is_empty() {
            let path = format!("/proc/sys/net/ipv4/conf/{iif}/rp_filter");
            fixes.push(format!("echo {value} > {path}"));
        }
        fail(why, fixes)
    }

    /// Why no forward took the request.
    pub fn no_forward(&self) -> Failure {
        let (source, service) = (self.question.source, self.question.service);
        let mut passages = self.passages.iter().rev();
        if let Some(place) = passages.find_map(|passage| passage.untracked.as_ref()) {
            return Failure::new(
                format!("{place} keeps the connection from all forwards"),
                [place.deletion()],
            );
        }
        let Some((name, uplink)) = self.uplink else {
            return Failure::new(format!("no forward is for {service}"), []);
        };
        let is_taken = |source| {
            let mut forwards = uplink.forwards.iter();
            forwards.any(|forward| forward.takes(service.asked_by(source)))
        };
        if is_taken(Some(source)) {
            return Failure::new(
                format!("{name}'s forward of {service} is not installed"),
                self.fixes([]),
            );
        }
        if is_taken(None) {
            return Failure::new(
                format!("{name}'s forward of {service} is not for {source}"),
                [format!("[uplink.{name}] forward: from = [\"{source}/32\"]")],
            );
        }
        let port = service.port.map(|port| format!(", port = {port}"));
        let (protocol, port) = (service.protocol, port.unwrap_or_default());
        Failure::new(
            format!("{name} has no forward of {service}"),
            [format!(
                "[uplink.{name}] forward = [{{ proto = \"{protocol}\"{port}, to = \"…\" }}]"
            )],
        )
    }

    /// These fixes, and `mh-hook sync` if entries of ours are missing or extra.
    pub fn fixes(&self, others: impl IntoIterator<Item = String>) -> Vec<String> {
        let comparison = self.comparison;
        let steps = self
            .snapshot
            .steps(&comparison.installed, &comparison.desired);
        let sync = (!steps.is_empty()).then(|| "mh-hook sync".to_owned());
        others.into_iter().chain(sync).collect()
    }
}
