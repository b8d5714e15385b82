//! The steps of a sequence. As text each is one line, so that a case that failed can be read, kept and run again.

use std::fmt;
use std::net::Ipv4Addr;

/// The links that pppd may make. No configuration names the last one often.
pub const LINKS: [&str; 3] = ["ppp0", "ppp1", "ppp2"];

/// The addresses that a link may be given; any link any of them, so that one can wander.
pub const ADDRESSES: [Ipv4Addr; 5] = [
    Ipv4Addr::new(203, 0, 113, 10),
    Ipv4Addr::new(198, 51, 100, 20),
    Ipv4Addr::new(203, 0, 113, 60),
    Ipv4Addr::new(198, 51, 100, 21),
    // Of the LAN: an uplink must not have it.
    Ipv4Addr::new(192, 168, 0, 77),
];

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// As pppd does it: a device if there is none, this one address, up.
    Dial(&'static str, Ipv4Addr),
    /// Up, with the addresses that it has.
    Raise(&'static str),
    /// Down as pppd leaves it, without its addresses.
    HangUp(&'static str),
    /// Down with its addresses.
    Lower(&'static str),
    /// The device goes.
    Delete(&'static str),
    /// One address more.
    AddAddress(&'static str, Ipv4Addr),
    /// No address any more, up or not.
    FlushAddresses(&'static str),
    /// Its MTU.
    Mtu(&'static str, u32),
    /// Another configuration.
    Configure(Config),
    /// A configuration that does not hold.
    Break,
    /// A call of mh-hook.
    Call(Call),
    /// `event pre-up` of a link that has its address and is not up yet; then it comes up, and the
    /// call that follows by itself is waited for.
    PreUp(&'static str, Ipv4Addr),
    /// One of our entries goes, by its number modulo how many there are.
    Remove(usize),
    /// One of our entries is there twice, or as nearly as the kernel lets it.
    Double(usize),
    /// An entry that is ours by its mark, and nobody's by its meaning.
    Stray(usize),
    /// The firewall starts anew: all of iptables, or one table.
    Flush(Option<&'static str>),
    /// Somebody else's entry comes.
    AddForeign(usize),
    /// One of those that have come goes, by its number modulo how many they are.
    RemoveForeign(usize),
}

/// A call of mh-hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// By pppd: `up`, `down`, or, by ourselves, `follow`.
    Event(Direction, &'static str, Option<Ipv4Addr>),
    /// By hand.
    Up(&'static str, Option<Ipv4Addr>),
    /// By hand.
    Down(&'static str),
    /// All of them.
    Sync,
}

/// The calls of pppd, and our own that follows one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// `ip-pre-up`.
    PreUp,
    /// What follows that.
    Follow,
    /// `ip-up`.
    Up,
    /// `ip-down`.
    Down,
}

/// A configuration: what its variants differ in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// How many of [`LANS`].
    pub lans: usize,
    /// How many of [`NETWORKS`].
    pub networks: usize,
    /// `[mark] mask`.
    pub mask: u32,
    /// The first of the four priorities; the others follow it.
    pub priority: u32,
    /// The uplinks.
    pub uplinks: Vec<Uplink>,
}

/// The interfaces of the LAN; the second does not exist.
pub const LANS: [&str; 2] = ["eth1", "br-lan.10"];

/// The prefixes of the LAN.
pub const NETWORKS: [&str; 2] = ["192.168.0.0/24", "10.8.0.0/16"];

/// The sources that an uplink may pin.
pub const PINS: [&str; 2] = ["192.168.0.25", "10.8.0.128/25"];

/// An uplink of a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    pub name: String,
    pub interface: String,
    pub table: Option<u32>,
    pub mark: Option<u32>,
    /// How many of the model's forwards.
    pub forwards: usize,
    /// How many of [`PINS`].
    pub pins: usize,
    pub masquerade: bool,
    pub hairpin: bool,
    pub clamp_mss: bool,
    pub accept_forward: bool,
}

impl Config {
    /// The uplink that a call for this interface names.
    pub fn at(&self, interface: &str) -> Option<&Uplink> {
        self.uplinks
            .iter()
            .find(|uplink| uplink.interface == interface)
    }

    /// The uplink of that name.
    pub fn uplink(&self, name: &str) -> Option<&Uplink> {
        self.uplinks.iter().find(|uplink| uplink.name == name)
    }

    /// The uplink with that routing table.
    pub fn with_table(&self, table: &str) -> Option<&Uplink> {
        let mut uplinks = self.uplinks.iter();
        uplinks.find(|uplink| uplink.table.is_some_and(|own| own.to_string() == table))
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PreUp => "pre-up",
            Self::Follow => "follow",
            Self::Up => "up",
            Self::Down => "down",
        })
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Event(direction, link, None) => write!(f, "event {direction} {link}"),
            Self::Event(direction, link, Some(local)) => {
                write!(f, "event {direction} {link} {local}")
            }
            Self::Up(link, None) => write!(f, "up {link}"),
            Self::Up(link, Some(local)) => write!(f, "up {link} {local}"),
            Self::Down(link) => write!(f, "down {link}"),
            Self::Sync => f.write_str("sync"),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dial(link, address) => write!(f, "link dial {link} {address}"),
            Self::Raise(link) => write!(f, "link raise {link}"),
            Self::HangUp(link) => write!(f, "link hang-up {link}"),
            Self::Lower(link) => write!(f, "link lower {link}"),
            Self::Delete(link) => write!(f, "link delete {link}"),
            Self::AddAddress(link, address) => write!(f, "address add {link} {address}"),
            Self::FlushAddresses(link) => write!(f, "address flush {link}"),
            Self::Mtu(link, mtu) => write!(f, "link mtu {link} {mtu}"),
            Self::Configure(config) => write!(f, "config {config}"),
            Self::Break => f.write_str("config-broken"),
            Self::Call(call) => call.fmt(f),
            Self::PreUp(link, address) => write!(f, "link pre-up {link} {address}"),
            Self::Remove(number) => write!(f, "own remove {number}"),
            Self::Double(number) => write!(f, "own double {number}"),
            Self::Stray(number) => write!(f, "own stray {number}"),
            Self::Flush(None) => f.write_str("flush all"),
            Self::Flush(Some(table)) => write!(f, "flush {table}"),
            Self::AddForeign(number) => write!(f, "foreign add {number}"),
            Self::RemoveForeign(number) => write!(f, "foreign remove {number}"),
        }
    }
}

impl fmt::Display for Config {
    /// What differs from the defaults: `mask=0xfff | isp0 ppp0 table=10 forwards=1 | isp1 ppp1`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = Vec::new();
        if self.lans != 1 {
            words.push(format!("lans={}", self.lans));
        }
        if self.networks != 1 {
            words.push(format!("networks={}", self.networks));
        }
        if self.mask != 0xff {
            words.push(format!("mask={}", self.mask));
        }
        if self.priority != 98 {
            words.push(format!("priority={}", self.priority));
        }
        for uplink in &self.uplinks {
            words.push(format!("| {} {}", uplink.name, uplink.interface));
            for (key, value) in [("table", uplink.table), ("mark", uplink.mark)] {
                words.extend(value.map(|value| format!("{key}={value}")));
            }
            for (key, count) in [("forwards", uplink.forwards), ("pins", uplink.pins)] {
                words.extend((count > 0).then(|| format!("{key}={count}")));
            }
            for (differs, word) in [
                (!uplink.masquerade, "no-masquerade"),
                (!uplink.hairpin, "no-hairpin"),
                (!uplink.clamp_mss, "no-clamp-mss"),
                (uplink.accept_forward, "accept-forward"),
            ] {
                words.extend(differs.then(|| word.to_owned()));
            }
        }
        f.write_str(&words.join(" "))
    }
}

/// The step of a line that `Display` wrote.
pub fn parse(line: &str) -> Option<Step> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let link = |name: &str| LINKS.into_iter().find(|link| *link == name);
    let address = |text: &str| text.parse().ok();
    let number = |text: &str| text.parse().ok();
    Some(match words[..] {
        ["link", "dial", name, local] => Step::Dial(link(name)?, address(local)?),
        ["link", "raise", name] => Step::Raise(link(name)?),
        ["link", "hang-up", name] => Step::HangUp(link(name)?),
        ["link", "lower", name] => Step::Lower(link(name)?),
        ["link", "delete", name] => Step::Delete(link(name)?),
        ["address", "add", name, local] => Step::AddAddress(link(name)?, address(local)?),
        ["address", "flush", name] => Step::FlushAddresses(link(name)?),
        ["link", "mtu", name, mtu] => Step::Mtu(link(name)?, mtu.parse().ok()?),
        ["config", ..] => Step::Configure(parse_config(&words[1..])?),
        ["config-broken"] => Step::Break,
        ["link", "pre-up", name, local] => Step::PreUp(link(name)?, address(local)?),
        ["own", "remove", count] => Step::Remove(number(count)?),
        ["own", "double", count] => Step::Double(number(count)?),
        ["own", "stray", count] => Step::Stray(number(count)?),
        ["flush", "all"] => Step::Flush(None),
        ["flush", table] => Step::Flush(Some(
            ["mangle", "nat", "filter"]
                .into_iter()
                .find(|known| *known == table)?,
        )),
        ["foreign", "add", count] => Step::AddForeign(number(count)?),
        ["foreign", "remove", count] => Step::RemoveForeign(number(count)?),
        ["event", direction, name, ref rest @ ..] => {
            let direction = match direction {
                "up" => Direction::Up,
                "down" => Direction::Down,
                _ => return None,
            };
            let local = rest.first().map(|text| address(text));
            Step::Call(Call::Event(direction, link(name)?, local.flatten()))
        }
        ["up", name, ref rest @ ..] => {
            let local = rest.first().map(|text| address(text));
            Step::Call(Call::Up(link(name)?, local.flatten()))
        }
        ["down", name] => Step::Call(Call::Down(link(name)?)),
        ["sync"] => Step::Call(Call::Sync),
        _ => return None,
    })
}

fn parse_config(words: &[&str]) -> Option<Config> {
    let mut config = Config {
        lans: 1,
        networks: 1,
        mask: 0xff,
        priority: 98,
        uplinks: Vec::new(),
    };
    let mut parts = words.split(|word| *word == "|");
    for word in parts.next()? {
        match word.split_once('=')? {
            ("lans", value) => config.lans = value.parse().ok()?,
            ("networks", value) => config.networks = value.parse().ok()?,
            ("mask", value) => config.mask = value.parse().ok()?,
            ("priority", value) => config.priority = value.parse().ok()?,
            _ => return None,
        }
    }
    for part in parts {
        let [name, interface, rest @ ..] = part else {
            return None;
        };
        let mut uplink = Uplink {
            name: (*name).to_owned(),
            interface: (*interface).to_owned(),
            table: None,
            mark: None,
            forwards: 0,
            pins: 0,
            masquerade: true,
            hairpin: true,
            clamp_mss: true,
            accept_forward: false,
        };
        for word in rest {
            match word.split_once('=').unwrap_or((word, "")) {
                ("table", value) => uplink.table = Some(value.parse().ok()?),
                ("mark", value) => uplink.mark = Some(value.parse().ok()?),
                ("forwards", value) => uplink.forwards = value.parse().ok()?,
                ("pins", value) => uplink.pins = value.parse().ok()?,
                ("no-masquerade", "") => uplink.masquerade = false,
                ("no-hairpin", "") => uplink.hairpin = false,
                ("no-clamp-mss", "") => uplink.clamp_mss = false,
                ("accept-forward", "") => uplink.accept_forward = true,
                _ => return None,
            }
        }
        config.uplinks.push(uplink);
    }
    Some(config)
}
