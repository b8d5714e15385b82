//! Port forwards, and the one question whether a forward takes a packet.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::Ipv4Addr;

use ipnetwork::Ipv4Network;

/// A protocol above IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    Icmp,
    Tcp,
    Udp,
    /// Generic routing encapsulation, as PPTP has it.
    Gre,
    /// IPsec's encapsulation.
    Esp,
    Sctp,
}

impl Protocol {
    const ALL: [Self; 6] = [
        Self::Icmp,
        Self::Tcp,
        Self::Udp,
        Self::Gre,
        Self::Esp,
        Self::Sctp,
    ];

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|protocol| protocol.name() == name)
    }

    /// The protocol that a rule of iptables names, or numbers.
    pub fn parse_rule(text: &str) -> Option<Self> {
        Self::parse(text).or_else(|| Self::by_number(text.parse().ok()?))
    }

    /// The protocol with this number.
    pub fn by_number(number: u8) -> Option<Self> {
        let mut all = Self::ALL.into_iter();
        all.find(|protocol| protocol.number() == number)
    }

    /// Its name, as /etc/protocols has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Icmp => "icmp",
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Gre => "gre",
            Self::Esp => "esp",
            Self::Sctp => "sctp",
        }
    }

    /// Its number in IP (IANA, Assigned Internet Protocol Numbers).
    pub fn number(self) -> u8 {
        match self {
            Self::Icmp => 1,
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Gre => 47,
            Self::Esp => 50,
            Self::Sctp => 132,
        }
    }

    /// Whether forwards of it can name ports.
    pub fn has_ports(self) -> bool {
        matches!(self, Self::Tcp | Self::Udp | Self::Sctp)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One port, or several in a row. Its `Display` is `80`, or `8000-8010`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortRange {
    pub first: u16,
    /// The last port, which may be the first.
    pub last: u16,
}

impl PortRange {
    pub fn one(port: u16) -> Self {
        Self {
            first: port,
            last: port,
        }
    }

    pub fn is_one(self) -> bool {
        self.first == self.last
    }

    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    /// Whether two ranges have a port in common.
    pub fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// `8000:8010`, as iptables has it.
    pub fn by_colon(self) -> String {
        self.text(':')
    }

    fn text(self, separator: char) -> String {
        match self {
            Self { first, last } if first == last => first.to_string(),
            Self { first, last } => format!("{first}{separator}{last}"),
        }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text('-'))
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    /// The protocols, in the order of the file; none for any.
    pub protocols: Cow<'static, [Protocol]>,
    /// The ports at the uplink's address; none for all, or where the protocol has none.
    pub ports: Option<PortRange>,
    pub to: Ipv4Addr,
    /// The port there, where it is another.
    pub to_port: Option<u16>,
    /// The sources that may use it; none given means all.
    pub from: Vec<Ipv4Network>,
}

/// What of a connection's first packet decides whether a forward takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Who asks; none where that is not to count.
    pub source: Option<Ipv4Addr>,
    pub protocol: u8,
    /// The destination port; none where the protocol has none.
    pub port: Option<u16>,
}

impl Forward {
    /// Whether it takes a packet that no forward above it has taken.
    pub fn takes(&self, asked: Asked) -> bool {
        let Asked {
            source,
            protocol,
            port,
        } = asked;
        let mut numbers = self.protocols.iter().map(|protocol| protocol.number());
        let takes_protocol = self.protocols.is_empty() || numbers.any(|number| number == protocol);
        let takes_port = self
            .ports
            .is_none_or(|ports| port.is_some_and(|port| ports.contains(port)));
        let takes_source = self.from.is_empty()
            || source.is_none_or(|source| self.from.iter().any(|from| from.contains(source)));
        takes_protocol && takes_port && takes_source
    }

    /// The host and the port there to which it sends a packet for this port.
    pub fn target(&self, port: Option<u16>) -> (Ipv4Addr, Option<u16>) {
        (self.to, self.to_port.or(port))
    }
}

/// The protocols and ports: `tcp/80`, `tcp+udp/53`, `udp/27015-27030`, `esp`, `any`.
impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.protocols.iter().map(|it| it.name()).collect();
        f.write_str(&match &names[..] {
            [] => "any".into(),
            names => names.join("+"),
        })?;
        match self.ports {
            Some(ports) => write!(f, "/{ports}"),
            None => Ok(()),
        }
    }
}

/// Forwards in their order, to find the first that takes a packet without asking each of thousands.
#[derive(Debug, Default)]
pub struct ForwardIndex {
    forwards: Vec<Forward>,
    /// The first port of each stretch of ports that the same forwards name, and their places.
    stretches: BTreeMap<u16, Vec<usize>>,
    /// The places of those that take all ports.
    open: Vec<usize>,
}

impl ForwardIndex {
    /// Indexes them.
    pub fn new(forwards: Vec<Forward>) -> Self {
        let mut index = Self {
            forwards,
            ..Self::default()
        };
        let mut edges: BTreeMap<u16, [Vec<usize>; 2]> = BTreeMap::new();
        for (place, forward) in index.forwards.iter().enumerate() {
            let Some(ports) = forward.ports else {
                index.open.push(place);
                continue;
            };
            edges.entry(ports.first).or_default()[0].push(place);
            if let Some(behind) = ports.last.checked_add(1) {
                edges.entry(behind).or_default()[1].push(place);
            }
        }
        let mut now = BTreeSet::new();
        for (port, [begin, end]) in edges {
            end.iter().for_each(|place| _ = now.remove(place));
            now.extend(begin);
            index.stretches.insert(port, now.iter().copied().collect());
        }
        index
    }

    /// The first one that takes a packet.
    pub fn first(&self, asked: Asked) -> Option<&Forward> {
        self.place(asked).map(|place| &self.forwards[place])
    }

    /// The place of the first one that takes a packet, from 0.
    pub fn place(&self, asked: Asked) -> Option<usize> {
        let stretch = |port| self.stretches.range(..=port).next_back();
        let named = asked.port.and_then(stretch).map(|(_, places)| places);
        let first = |places: &[usize]| {
            let mut places = places.iter().copied();
            places.find(|place| self.forwards[*place].takes(asked))
        };
        let found = [named.and_then(|places| first(places)), first(&self.open)];
        found.into_iter().flatten().min()
    }
}

/// The forwards that overlap one above them, by index, each with the first such. Of thousands only those are
/// compared that have a port in common.
pub fn overlapping(forwards: &[Forward]) -> BTreeMap<usize, usize> {
    let mut ported = Vec::with_capacity(forwards.len());
    let mut open = Vec::new();
    for (index, forward) in forwards.iter().enumerate() {
        match forward.ports {
            Some(ports) => ported.push((ports.first, ports.last, index)),
            None => open.push(index),
        }
    }
    ported.sort_unstable();
    let common = ported
        .iter()
        .enumerate()
        .flat_map(|(place, (_, last, one))| {
            let behind = ported[place + 1..].iter();
            let common = behind.take_while(move |(first, ..)| first <= last);
            common.map(move |(_, _, other)| (*one, *other))
        });
    let with_ported = open
        .iter()
        .flat_map(|one| ported.iter().map(move |(_, _, other)| (*one, *other)));
    let with_open = open
        .iter()
        .enumerate()
        .flat_map(|(place, one)| open[..place].iter().map(move |other| (*one, *other)));
    let mut first = BTreeMap::new();
    for (one, other) in common.chain(with_ported).chain(with_open) {
        let (earlier, later) = (one.min(other), one.max(other));
        if overlap(&forwards[earlier], &forwards[later]) {
            let known = first.entry(later).or_insert(earlier);
            *known = earlier.min(*known);
        }
    }
    first
}

/// Whether some packet fits both and the order has not been said: what leaves `from`, `port` or the
/// protocol open is the general, and what names it may stand ahead of that.
fn overlap(earlier: &Forward, later: &Forward) -> bool {
    let open = |forward: &Forward| {
        [
            forward.protocols.is_empty(),
            forward.ports.is_none(),
            forward.from.is_empty(),
        ]
    };
    let (opener, closer) = (open(later), open(earlier));
    let narrows = opener
        .iter()
        .zip(closer)
        .any(|(later, earlier)| *later && !earlier);
    let widens = opener
        .iter()
        .zip(closer)
        .any(|(later, earlier)| !*later && earlier);
    let protocols = earlier.protocols.is_empty()
        || later.protocols.is_empty()
        || earlier
            .protocols
            .iter()
            .any(|protocol| later.protocols.contains(protocol));
    let ports = match (earlier.ports, later.ports) {
        (Some(one), Some(two)) => one.overlaps(two),
        _ => true,
    };
    let sources = earlier.from.is_empty()
        || later.from.is_empty()
        || earlier
            .from
            .iter()
            .any(|one| later.from.iter().any(|two| one.overlaps(*two)));
    let ordered = narrows && !widens;
    protocols && ports && sources && !ordered
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn forward() -> impl Strategy<Value = Forward> {
        let ports = (1..30u16, 0..6u16).prop_map(|(first, more)| PortRange {
            first,
            last: first + more,
        });
        let protocols = prop_oneof![
            Just(vec![Protocol::Tcp]),
            Just(vec![Protocol::Udp, Protocol::Tcp]),
            Just(vec![Protocol::Udp]),
            Just(vec![]),
        ];
        let from = vec(
            (1..4u8).prop_map(|host| Ipv4Addr::new(192, 0, 2, host).into()),
            0..2,
        );
        let parts = (protocols, proptest::option::weighted(0.8, ports), from);
        parts.prop_map(|(protocols, ports, from)| Forward {
            protocols: protocols.into(),
            ports,
            to: Ipv4Addr::new(192, 168, 0, 2),
            to_port: None,
            from,
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn each_overlap_is_found_with_the_first_above_it(forwards in vec(forward(), 0..30)) {
            let first = |later: usize| {
                (0..later).find(|earlier| overlap(&forwards[*earlier], &forwards[later]))
            };
            let pairs = (0..forwards.len()).filter_map(|later| first(later).map(|it| (later, it)));
            prop_assert_eq!(overlapping(&forwards), pairs.collect());
        }
    }
}
