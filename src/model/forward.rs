//! Port forwards, and the one question whether a forward takes a packet.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::iter;
use std::net::Ipv4Addr;

use ipnetwork::Ipv4Network;

/// A protocol above IP, with its number (IANA, Assigned Internet Protocol Numbers).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    Icmp = 1,
    Tcp = 6,
    Udp = 17,
    /// Generic routing encapsulation, as PPTP has it.
    Gre = 47,
    /// IPsec's encapsulation.
    Esp = 50,
    Sctp = 132,
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
        let mut all = Self::ALL.into_iter();
        all.find(|protocol| protocol.name() == name)
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

    /// Its number in IP.
    pub fn number(self) -> u8 {
        self as u8
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
        let (first, last) = (port, port);
        Self { first, last }
    }

    pub fn is_one(self) -> bool {
        self.first == self.last
    }

    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    /// `8000:8010`, as iptables has it.
    pub fn by_colon(self) -> impl fmt::Display {
        ByColon(self)
    }

    fn write(self, f: &mut fmt::Formatter<'_>, separator: char) -> fmt::Result {
        let Self { first, last } = self;
        match self.is_one() {
            true => write!(f, "{first}"),
            false => write!(f, "{first}{separator}{last}"),
        }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, '-')
    }
}

struct ByColon(PortRange);

impl fmt::Display for ByColon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.write(f, ':')
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    /// The protocols, in the order of the file; none for any.
    pub protocols: Cow<'static, [Protocol]>,
    /// The ports at the uplink's address; none for all, or where the protocol has none.
    pub ports: Option<PortRange>,
    /// Which of the link's addresses; none for all.
    pub address: Option<Ipv4Addr>,
    /// The LAN host; none for this router itself.
    pub to: Option<Ipv4Addr>,
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
    /// The address that is asked; none where that is not to count.
    pub destination: Option<Ipv4Addr>,
    pub protocol: u8,
    /// The destination port; none where the protocol has none.
    pub port: Option<u16>,
}

impl Forward {
    /// Whether it takes a packet that no forward above it has taken.
    pub fn takes(&self, asked: Asked) -> bool {
        let Asked {
            source,
            destination,
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
        let takes_destination = self
            .address
            .is_none_or(|address| destination.is_none_or(|asked| asked == address));
        takes_protocol && takes_port && takes_source && takes_destination
    }

    /// The host to which it sends a packet for this address of the router's, and the port there.
    pub fn target(&self, asked: Ipv4Addr, port: Option<u16>) -> (Ipv4Addr, Option<u16>) {
        (self.to.unwrap_or(asked), self.to_port.or(port))
    }

    /// Host and port, as in the configuration: `192.168.0.2:8080`, `192.168.0.2`, `:8443`.
    pub fn destination(&self) -> impl fmt::Display {
        Destination(self.to, self.to_port)
    }
}

struct Destination(Option<Ipv4Addr>, Option<u16>);

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(host, port) = self;
        host.map_or(Ok(()), |host| write!(f, "{host}"))?;
        port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

/// The protocols and ports: `tcp/80`, `tcp+udp/53`, `udp/27015-27030`, `esp`, `any`.
impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.protocols.iter().map(|it| it.name()).collect();
        match names[..] {
            [] => f.write_str("any")?,
            _ => f.write_str(&names.join("+"))?,
        }
        self.ports.map_or(Ok(()), |ports| write!(f, "/{ports}"))
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

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.forwards.is_empty()
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
    let ports = |forward: &Forward| match forward.ports {
        Some(PortRange { first, last }) => (first, last),
        None => (0, u16::MAX),
    };
    let mut sorted: Vec<_> = forwards.iter().map(ports).zip(0..).collect();
    // Mostly they are sorted already, but for a few: that is what the stable sort is quick at.
    sorted.sort();
    let mut found: BTreeMap<usize, usize> = BTreeMap::new();
    for (place, ((_, last), one)) in sorted.iter().enumerate() {
        let behind = sorted[place + 1..].iter();
        for (_, other) in behind.take_while(|((first, _), _)| first <= last) {
            let (earlier, later) = (*one.min(other), *one.max(other));
            if overlap(&forwards[earlier], &forwards[later]) {
                let known = found.entry(later).or_insert(earlier);
                *known = earlier.min(*known);
            }
        }
    }
    found
}

/// Whether some packet fits two forwards with a port in common, and the order has not been said: what leaves `from`,
/// `port`, `address` or the protocol open is the general, and what names it may stand ahead of that.
fn overlap(earlier: &Forward, later: &Forward) -> bool {
    let open = |forward: &Forward| {
        [
            forward.protocols.is_empty(),
            forward.ports.is_none(),
            forward.from.is_empty(),
            forward.address.is_none(),
        ]
    };
    let (above, below) = (open(earlier), open(later));
    let narrows = iter::zip(above, below).any(|(above, below)| below && !above);
    let widens = iter::zip(above, below).any(|(above, below)| above && !below);
    let mut protocols = earlier.protocols.iter();
    let share_protocol = earlier.protocols.is_empty()
        || later.protocols.is_empty()
        || protocols.any(|protocol| later.protocols.contains(protocol));
    let is_from = |one: &Ipv4Network| later.from.iter().any(|two| one.overlaps(*two));
    let share_source =
        earlier.from.is_empty() || later.from.is_empty() || earlier.from.iter().any(is_from);
    let addresses = earlier.address.zip(later.address);
    let share_address = addresses.is_none_or(|(one, other)| one == other);
    share_protocol && share_source && share_address && (widens || !narrows)
}
