//! The way of a kind of packet through a chain of iptables, as far as the rules tell: what of a match
//! is not known of every such packet may hold or not. Pure.

use std::net::Ipv4Addr;

use ipnetwork::Ipv4Network;

use crate::inspect::packet_trace::{MAX_RULES, TracedRule, TracedRuleset};
use crate::model::forward::Protocol;
use crate::model::route::{FwMark, bits};

/// What is known of the packets, all alike in this. Names, addresses and ports that are none are
/// unknown.
#[derive(Clone, Debug, Default)]
pub struct Packet<'a> {
    pub iif: Option<&'a str>,
    pub oif: Option<&'a str>,
    pub source: Option<Ipv4Addr>,
    pub destination: Option<Ipv4Addr>,
    /// Whether the destination is the router's own.
    pub is_local: bool,
    pub protocol: Option<Protocol>,
    pub port: Option<u16>,
    /// What conntrack says of it: all states that it is in.
    pub states: &'a [&'a str],
    /// The packet's mark.
    pub mark: u32,
    /// The connection's mark.
    pub connmark: u32,
}

/// Whether a rule takes the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fit {
    /// None of them.
    Never,
    /// Some, or nobody knows.
    Perhaps,
    /// All.
    Always,
}

/// A rule by its place.
#[derive(Clone, Debug)]
pub struct Place<'a> {
    pub table: &'a str,
    pub chain: &'a str,
    /// From 1, as iptables counts.
    pub number: usize,
    pub rule: &'a TracedRule,
}

/// A change of marks.
#[derive(Clone, Debug)]
pub struct Marking<'a> {
    pub place: Place<'a>,
    pub fit: Fit,
    /// The bits of the packet's mark, and of the connection's, that it changes or would change.
    pub bits: (u32, u32),
}

/// What became of the packets.
#[derive(Debug, Default)]
pub struct Walk<'a> {
    /// Whether some may have come through.
    pub passes: bool,
    /// What may have dropped some; none of a rule is the policy.
    pub droppers: Vec<Option<Place<'a>>>,
    /// The rule by which all of them left the chain, if one did.
    pub ended: Option<Place<'a>>,
    /// What changed marks, or may have.
    pub markings: Vec<Marking<'a>>,
}

/// How deep chains may call chains; iptables lets no loop in.
const DEPTH: usize = 32;

/// Walks a chain that the kernel calls; those that pass `goal`, a chain by name, are through.
pub fn walk<'a>(
    ruleset: &'a TracedRuleset,
    table: &'a str,
    chain: &'a str,
    goal: Option<&str>,
    packet: &mut Packet,
) -> Walk<'a> {
    let mut walker = Walker {
        ruleset,
        table,
        goal,
        walk: Walk::default(),
        rules: 0,
    };
    let falls = walker.chain(chain, Fit::Always, packet, DEPTH);
    if falls {
        let policy = ruleset
            .chain(table, chain)
            .and_then(|chain| chain.policy.as_deref());
        if policy == Some("DROP") {
            walker.walk.droppers.push(None);
        } else {
            walker.walk.passes = true;
        }
    }
    walker.walk
}

struct Walker<'a, 'b> {
    ruleset: &'a TracedRuleset,
    table: &'a str,
    goal: Option<&'b str>,
    walk: Walk<'a>,
    /// How many rules it has met.
    rules: usize,
}

impl<'a> Walker<'a, '_> {
    /// Whether some of the packets may come back from the chain.
    fn chain(&mut self, name: &'a str, entered: Fit, packet: &mut Packet, depth: usize) -> bool {
        let Some(chain) = self.ruleset.chain(self.table, name) else {
            return true;
        };
        for (number, rule) in (1..).zip(&chain.rules) {
            self.rules += 1;
            if self.rules > MAX_RULES {
                return true;
            }
            let (fit, target) = fits(rule, packet);
            let sure = fit == Fit::Always;
            // Of all the packets there are, not only of those that came here.
            let fit = fit.min(entered);
            let Some((flag, target)) = target.filter(|_| fit != Fit::Never) else {
                continue;
            };
            let place = Place {
                table: self.table,
                chain: name,
                number,
                rule,
            };
            match target {
                "ACCEPT" | "DNAT" | "REDIRECT" | "NETMAP" => {
                    self.walk.passes = true;
                    if sure {
                        self.end(fit, place);
                        return false;
                    }
                }
                "DROP" | "REJECT" | "TARPIT" => {
                    self.walk.droppers.push(Some(place.clone()));
                    if sure {
                        self.end(fit, place);
                        return false;
                    }
                }
                "RETURN" if sure => return true,
                // A program decides.
                "NFQUEUE" | "QUEUE" | "TPROXY" | "SYNPROXY" => self.walk.passes = true,
                "MARK" | "CONNMARK" => self.mark(place, fit, packet),
                _ if Some(target) == self.goal => {
                    self.walk.passes = true;
                    if sure {
                        return false;
                    }
                }
                _ if depth > 0 && self.ruleset.chain(self.table, target).is_some() => {
                    let falls = self.chain(target, fit, packet, depth - 1);
                    if sure && flag == "-g" {
                        return falls;
                    }
                    if sure && !falls {
                        return false;
                    }
                }
                _ => {}
            }
        }
        true
    }

    fn end(&mut self, fit: Fit, place: Place<'a>) {
        if fit == Fit::Always {
            self.walk.ended = Some(place);
        }
    }

    fn mark(&mut self, place: Place<'a>, fit: Fit, packet: &mut Packet) {
        let Some((mark, connmark)) = marked(place.rule, packet.mark, packet.connmark) else {
            return;
        };
        let bits = (mark ^ packet.mark, connmark ^ packet.connmark);
        if bits != (0, 0) {
            self.walk.markings.push(Marking { place, fit, bits });
        }
        if fit == Fit::Always {
            (packet.mark, packet.connmark) = (mark, connmark);
        }
    }
}

/// Both marks behind a rule with the target MARK or CONNMARK (iptables-extensions(8)).
fn marked(rule: &TracedRule, mark: u32, connmark: u32) -> Option<(u32, u32)> {
    let is_connmark = rule.value("-j") == Some("CONNMARK");
    let old = if is_connmark { connmark } else { mark };
    let new = if let Some(text) = rule.value("--set-xmark") {
        let FwMark { value, mask } = FwMark::parse(text)?;
        (old & !mask) ^ value
    } else if let Some(text) = rule.value("--set-mark") {
        let FwMark { value, mask } = FwMark::parse(text)?;
        (old & !mask) | value
    } else if let Some(text) = rule.value("--and-mark") {
        old & bits(text)?
    } else if let Some(text) = rule.value("--or-mark") {
        old | bits(text)?
    } else if let Some(text) = rule.value("--xor-mark") {
        old ^ bits(text)?
    } else {
        let (nfmask, ctmask) = transfer_masks(rule)?;
        if rule.words.iter().any(|word| word == "--save-mark") {
            return Some((mark, (connmark & !ctmask) ^ (mark & nfmask)));
        }
        return Some(((mark & !nfmask) ^ (connmark & ctmask), connmark));
    };
    Some(if is_connmark {
        (mark, new)
    } else {
        (new, connmark)
    })
}

/// The masks of `--save-mark` and `--restore-mark`: for the packet's mark, and for the connection's.
pub fn transfer_masks(rule: &TracedRule) -> Option<(u32, u32)> {
    let mut words = rule.words.iter();
    words.find(|word| *word == "--save-mark" || *word == "--restore-mark")?;
    let mask = |option: &str| match rule.value(option).or(rule.value("--mask")) {
        Some(text) => bits(text),
        None => Some(u32::MAX),
    };
    Some((mask("--nfmask")?, mask("--ctmask")?))
}

/// Matches that are known here by their options; of others nobody knows.
const MODULES: [&str; 10] = [
    "tcp",
    "udp",
    "sctp",
    "comment",
    "conntrack",
    "state",
    "mark",
    "connmark",
    "addrtype",
    "multiport",
];

/// Whether a rule takes the packets, and its target behind `-j` or `-g`.
fn fits<'a>(rule: &'a TracedRule, packet: &Packet) -> (Fit, Option<(&'a str, &'a str)>) {
    let mut fit = Fit::Always;
    let mut module = "";
    let mut negated = false;
    let mut words = rule.words.iter().map(String::as_str);
    while let Some(word) = words.next() {
        if word == "!" {
            negated = true;
            continue;
        }
        let mut value = || words.next().unwrap_or_default();
        let one = match word {
            "-j" | "-g" => return (fit, Some((word, value()))),
            "-m" => {
                module = value();
                if MODULES.contains(&module) {
                    Some(true)
                } else {
                    None
                }
            }
            "--comment" => {
                value();
                Some(true)
            }
            "-i" => interface(value(), packet.iif),
            "-o" => interface(value(), packet.oif),
            "-s" => address(value(), packet.source),
            "-d" => address(value(), packet.destination),
            "-p" => protocol(value(), packet.protocol),
            "--dport" | "--dports" => ports(value(), packet.port),
            "--ctstate" | "--state" => states(value(), packet.states),
            "--dst-type" if packet.destination.is_some() => Some(value() == "LOCAL")
                .filter(|is_asked| *is_asked)
                .map(|_| packet.is_local),
            "--mark" => FwMark::parse(value()).map(|FwMark { value, mask }| {
                let mark = if module == "connmark" {
                    packet.connmark
                } else {
                    packet.mark
                };
                mark & mask == value
            }),
            _ if word.starts_with('-') => None,
            // The value of something that is not known.
            _ => continue,
        };
        fit = fit.min(match one {
            None => Fit::Perhaps,
            Some(holds) if holds != negated => Fit::Always,
            // What a comment or the name of a match says can't be wrong.
            Some(_) if matches!(word, "-m" | "--comment") => Fit::Always,
            Some(_) => Fit::Never,
        });
        negated = false;
    }
    (fit, None)
}

fn interface(pattern: &str, name: Option<&str>) -> Option<bool> {
    let name = name?;
    Some(match pattern.strip_suffix('+') {
        Some(start) => name.starts_with(start),
        None => name == pattern,
    })
}

fn address(pattern: &str, address: Option<Ipv4Addr>) -> Option<bool> {
    let network: Ipv4Network = pattern.parse().ok()?;
    if network.prefix() == 0 {
        return Some(true);
    }
    Some(network.contains(address?))
}

fn protocol(pattern: &str, protocol: Option<Protocol>) -> Option<bool> {
    if pattern == "all" {
        return Some(true);
    }
    let number = Protocol::parse(pattern)
        .map(Protocol::number)
        .or_else(|| pattern.parse().ok());
    match (number, protocol) {
        (Some(number), Some(protocol)) => Some(number == protocol.number()),
        // Another of /etc/protocols.
        (None, Some(_)) => Some(false),
        (_, None) => None,
    }
}

/// `80`, `8000:8010`, `80,443,8000:8010`
fn ports(pattern: &str, port: Option<u16>) -> Option<bool> {
    let port = port?;
    let mut any = false;
    for part in pattern.split(',') {
        let (first, last) = part.split_once(':').unwrap_or((part, part));
        any |= (first.parse().ok()?..=last.parse().ok()?).contains(&port);
    }
    Some(any)
}

fn states(pattern: &str, states: &[&str]) -> Option<bool> {
    Some(pattern.split(',').any(|state| states.contains(&state)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::iptables_save::Ruleset;

    fn packet() -> Packet<'static> {
        Packet {
            iif: Some("ppp0"),
            oif: Some("eth1"),
            destination: Some(Ipv4Addr::new(192, 168, 0, 2)),
            protocol: Some(Protocol::Tcp),
            port: Some(80),
            states: &["NEW", "DNAT"],
            ..Packet::default()
        }
    }

    /// Whether packets pass FORWARD with these lines, and how many droppers they meet.
    fn forward(policy: &str, lines: &str) -> (bool, usize) {
        let lines: String = lines
            .lines()
            .map(|line| match line.trim() {
                declared if declared.starts_with(':') => format!("{declared} - [0:0]\n"),
                rule => format!("[0:0] {rule}\n"),
            })
            .collect();
        let save = format!("*filter\n:FORWARD {policy} [0:0]\n{lines}COMMIT\n");
        let ruleset = TracedRuleset::new(&Ruleset::parse(&save).expect("a listing"));
        let walk = walk(&ruleset, "filter", "FORWARD", None, &mut packet());
        (walk.passes, walk.droppers.len())
    }

    #[test]
    fn what_can_not_match_does_not_count_and_what_may_match_does() {
        let cases = [
            ("ACCEPT", "", (true, 0)),
            ("DROP", "", (false, 1)),
            ("DROP", "-A FORWARD -i eth1 -j ACCEPT", (false, 1)),
            (
                "DROP",
                "-A FORWARD -i ppp+ -p tcp -m tcp --dport 80 -j ACCEPT",
                (true, 0),
            ),
            ("DROP", "-A FORWARD -p udp -j ACCEPT", (false, 1)),
            (
                "DROP",
                "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
                (false, 1),
            ),
            (
                "DROP",
                "-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT",
                (true, 0),
            ),
            ("DROP", "-A FORWARD -s 198.51.100.0/24 -j ACCEPT", (true, 1)),
            (
                "DROP",
                "-A FORWARD -m set --match-set good src -j ACCEPT",
                (true, 1),
            ),
            (
                "ACCEPT",
                "-A FORWARD ! -i eth1 -j REJECT --reject-with icmp-port-unreachable",
                (false, 1),
            ),
            ("ACCEPT", "-A FORWARD -d 10.0.0.0/8 -j DROP", (true, 0)),
            (
                "ACCEPT",
                ":A\n-A FORWARD -j A\n-A FORWARD -j DROP\n-A A -o eth1 -j RETURN",
                (false, 1),
            ),
            (
                "ACCEPT",
                ":A\n-A FORWARD -g A\n-A FORWARD -j DROP\n-A A -o eth1 -j RETURN",
                (true, 0),
            ),
            (
                "DROP",
                ":A\n-A FORWARD -s 192.0.2.0/24 -j A\n-A A -j ACCEPT",
                (true, 1),
            ),
            (
                "ACCEPT",
                "-A FORWARD -m comment --comment \"-j DROP\" -j LOG --log-prefix DROP",
                (true, 0),
            ),
        ];
        for (policy, lines, expected) in cases {
            assert_eq!(forward(policy, lines), expected, "{policy} {lines}");
        }
    }

    #[test]
    fn marks_follow_the_rules_that_surely_match() {
        let save = "*mangle\n:PREROUTING ACCEPT [0:0]\n\
            [0:0] -A PREROUTING -i ppp0 -m connmark --mark 0x0/0xff -j CONNMARK --set-xmark 0xa/0xff\n\
            [0:0] -A PREROUTING -i ppp0 -m connmark --mark 0x0/0xff -j CONNMARK --set-xmark 0xb/0xff\n\
            [0:0] -A PREROUTING -j MARK --set-xmark 0x500/0xff00\n\
            [0:0] -A PREROUTING -s 192.0.2.7/32 -j CONNMARK --save-mark\n\
            [0:0] -A PREROUTING -j CONNMARK --save-mark --nfmask 0xff00 --ctmask 0xff00\n\
            COMMIT\n";
        let ruleset = TracedRuleset::new(&Ruleset::parse(&save).expect("a listing"));
        let mut packet = packet();
        let walk = walk(&ruleset, "mangle", "PREROUTING", None, &mut packet);
        assert_eq!((packet.mark, packet.connmark), (0x500, 0x50a));
        let fits: Vec<_> = walk.markings.iter().map(|marking| marking.fit).collect();
        assert_eq!(fits, [Fit::Always, Fit::Always, Fit::Perhaps, Fit::Always]);
        assert_eq!(walk.markings[2].bits, (0, 0x50a));
    }
}
