//! The configuration file: text to [`Config`], every error with its place. Knows neither kernel nor event.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use ipnetwork::Ipv4Network;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};
use toml_spanner::{Arena, Array, Item, Key, Span, Table, Value, parse_recoverable};

use crate::chains::chains;
use crate::state::{FwMark, IfName, Rules, TableId, UplinkName, check_local};

/// Where the configuration stands unless `--config` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/mh-hook.toml";

/// The largest configuration that is read, in bytes: 10,000 forwards take less than one MiB.
const MAX_SIZE: u64 = 2 << 20;

/// How many problems are told: whoever gives us something else than a configuration has seen enough.
const MAX_PROBLEMS: usize = 100;

/// How many uplinks there may be: each is compared with each other.
const MAX_UPLINKS: usize = 500;

/// A configuration that holds.
#[derive(Debug, PartialEq, Eq)]
pub struct Config {
    /// Where the servers are.
    pub lan: Lan,
    /// The bits of packet and connection mark that are ours.
    pub mask: u32,
    /// The priorities of our routing rules.
    pub priority: Priority,
    /// The ways out, by name.
    pub uplinks: BTreeMap<UplinkName, Uplink>,
}

/// The LAN side of the router.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Lan {
    /// Interfaces by which replies of LAN servers come in.
    pub interfaces: Vec<IfName>,
    /// Prefixes that masquerade hides.
    pub networks: Vec<Ipv4Network>,
}

/// Priorities of `ip rule`, smaller asked first.
#[derive(Debug, PartialEq, Eq)]
pub struct Priority {
    /// An uplink's address talks to the LAN directly.
    pub local: u32,
    /// Connections go back by the uplink that they came by.
    pub mark: u32,
    /// An uplink's address leaves by its link.
    pub source: u32,
    /// The connections of pinned LAN hosts leave by their uplink.
    pub pin: u32,
}

/// One configured way out.
#[derive(Debug, PartialEq, Eq)]
pub struct Uplink {
    /// By what it is known.
    pub identity: Identity,
    /// Its routing table and connection mark; without them it only masquerades.
    pub routing: Option<Routing>,
    /// Whether LAN traffic that leaves by it takes its address.
    pub masquerade: bool,
    /// Whether LAN hosts reach the forwards by the uplink's address.
    pub hairpin: bool,
    /// Whether the TCP segments that pass the link are held to its MTU.
    pub clamp_mss: bool,
    /// Whether the filter table's FORWARD lets the forwarded connections pass.
    pub accept_forward: bool,
    /// LAN sources whose own connections always leave by it.
    pub pin: Vec<Ipv4Network>,
    /// Its port forwards, in the order of the file.
    pub forwards: Vec<Forward>,
    /// The same as chains of the nat table: written here since this is done while iptables-save lists.
    pub chains: BTreeMap<String, Rules>,
}

/// What sends a connection's replies back by the uplink it came by.
#[derive(Debug, PartialEq, Eq)]
pub struct Routing {
    /// The uplink's routing table.
    pub table: TableId,
    /// The mark of its connections.
    pub mark: FwMark,
}

/// By what an uplink is known in pppd's calls: all that are given must match, and one is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The interface's name.
    pub interface: Option<IfName>,
    /// pppd's option `ipparam`.
    pub ipparam: Option<String>,
    /// pppd's option `linkname`.
    pub linkname: Option<String>,
    /// The name in `pppd call NAME`.
    pub peer: Option<String>,
}

impl Identity {
    /// Whether all that is given here is so there.
    pub fn matches(&self, call: &Self) -> bool {
        let fits =
            |ours: &Option<String>, theirs: &Option<String>| ours.is_none() || ours == theirs;
        (self.interface.is_none() || self.interface == call.interface)
            && fits(&self.ipparam, &call.ipparam)
            && fits(&self.linkname, &call.linkname)
            && fits(&self.peer, &call.peer)
    }

    /// The interface, where it alone tells which link this is.
    pub fn interface_alone(&self) -> Option<&IfName> {
        let Self {
            interface,
            ipparam: None,
            linkname: None,
            peer: None,
        } = self
        else {
            return None;
        };
        interface.as_ref()
    }
}

/// A port forward.
#[derive(Debug, PartialEq, Eq)]
pub struct Forward {
    /// The protocols, in the order of the file; none for any.
    pub protocols: Cow<'static, [Protocol]>,
    /// The ports at the uplink's address; none for all, or where the protocol has none.
    pub ports: Option<RangeInclusive<u16>>,
    /// The LAN host.
    pub to: Ipv4Addr,
    /// The port there, where it is another.
    pub to_port: Option<u16>,
    /// The sources that may use it; none given means all.
    pub from: Vec<Ipv4Network>,
}

/// A protocol above IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// ICMP.
    Icmp,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// Generic routing encapsulation, as PPTP has it.
    Gre,
    /// IPsec's encapsulation.
    Esp,
    /// SCTP.
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

    /// The protocol of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|protocol| protocol.name() == name)
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

/// The text of a configuration that can be trusted.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    text: String,
}

impl Source {
    /// Reads the file.
    ///
    /// # Errors
    /// Why it can't be read or trusted.
    pub fn read(path: &Path) -> Result<Self> {
        let text = read(path).with_context(|| format!("configuration {}", path.display()))?;
        let path = path.to_owned();
        Ok(Self { path, text })
    }

    /// The configuration in it.
    ///
    /// # Errors
    /// [`Errors`] where it does not hold.
    pub fn config(self) -> Result<Config> {
        let Self { path, text } = self;
        Config::parse(&text).map_err(|problems| {
            Errors {
                path,
                text,
                problems,
            }
            .into()
        })
    }
}

impl Config {
    /// Reads and parses the file.
    ///
    /// # Errors
    /// Those of [`Source::read`] and [`Source::config`].
    pub fn load(path: &Path) -> Result<Self> {
        Source::read(path)?.config()
    }

    /// The configuration in this text.
    ///
    /// # Errors
    /// All that is wrong, in the order of the text.
    pub fn parse(text: &str) -> Result<Self, Vec<Problem>> {
        // Behind the end of the parsed document, whose memory is there for the rules then.
        let mut config = Self::without_chains(text)?;
        for (name, uplink) in &mut config.uplinks {
            uplink.chains = chains(name, &uplink.forwards);
        }
        Ok(config)
    }

    fn without_chains(text: &str) -> Result<Self, Vec<Problem>> {
        let arena = Arena::new();
        let document = parse_recoverable(text, &arena);
        let syntax = document.errors();
        let mut reader = Reader {
            is_broken: !syntax.is_empty(),
            problems: Vec::new(),
        };
        let config = reader.config(document.table());
        if !reader.is_broken && reader.problems.is_empty() {
            return Ok(config);
        }
        // The parser went on after a mistake as well as it could: of what it makes of a broken line only
        // the first is its writer's.
        let starts: Vec<usize> = text.match_indices('\n').map(|(at, _)| at).collect();
        let line = |problem: &Problem| starts.partition_point(|at| *at < problem.at);
        let mut problems = reader.problems;
        let mut broken = BTreeMap::new();
        for error in syntax {
            let problem = Problem::new(error.span(), error.message(text));
            broken.entry(line(&problem)).or_insert(problem);
        }
        problems.retain(|problem| !broken.contains_key(&line(problem)));
        problems.extend(broken.into_values());
        problems.sort_by_key(|problem| problem.at);
        let more = problems.split_off(problems.len().min(MAX_PROBLEMS));
        let others = more.len().saturating_sub(1);
        if let Some(Problem { at, message }) = more.into_iter().next() {
            let message = format!("{message}; and {others} more like these");
            problems.push(Problem { at, message });
        }
        Err(problems)
    }

    /// The uplinks that a call is for.
    pub fn matching(&self, call: &Identity) -> Vec<&UplinkName> {
        let matching = self
            .uplinks
            .iter()
            .filter(|(_, uplink)| uplink.identity.matches(call));
        matching.map(|(name, _)| name).collect()
    }
}

/// One thing wrong with the configuration.
#[derive(Debug, PartialEq, Eq)]
pub struct Problem {
    /// Its place, in bytes.
    pub at: usize,
    /// What it is, and what would be right.
    pub message: String,
}

impl Problem {
    fn new(span: Span, message: impl Into<String>) -> Self {
        Self {
            at: span.range().start,
            message: message.into(),
        }
    }
}

/// All that is wrong with a configuration file.
#[derive(Debug)]
pub struct Errors {
    path: PathBuf,
    text: String,
    problems: Vec<Problem>,
}

impl Errors {
    /// One line for each: file, line, column (both from 1, in characters), message.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        self.problems.iter().map(|problem| {
            let (line, column) = place(&self.text, problem.at);
            format!(
                "{}:{line}:{column}: {}",
                self.path.display(),
                problem.message
            )
        })
    }
}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.lines().collect::<Vec<_>>().join("\n"))
    }
}

impl std::error::Error for Errors {}

/// Line and column, both from 1, the column in characters.
pub fn place(text: &str, offset: usize) -> (usize, usize) {
    let ahead = text.get(..offset).unwrap_or(text);
    let line = ahead.rsplit('\n').next().unwrap_or(ahead);
    (ahead.matches('\n').count() + 1, line.chars().count() + 1)
}

/// The file's text, if nobody but root can have written it: it decides what runs as root. File and
/// folder are checked on the open descriptors, so that neither can be exchanged in between.
fn read(path: &Path) -> Result<String> {
    let name = path.file_name().context("is not a file's name")?;
    let dir_path = path
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let dir = open(dir_path, flags | OFlag::O_DIRECTORY, Mode::empty())
        .with_context(|| format!("open folder {}", dir_path.display()))?;
    trusted(&dir, SFlag::S_IFDIR).with_context(|| format!("folder {}", dir_path.display()))?;
    // O_NONBLOCK: a fifo must not make us wait for its writer.
    let file = openat(
        &dir,
        name,
        flags | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK,
        Mode::empty(),
    )
    .map_err(|errno| {
        anyhow::Error::new(errno).context(match errno {
            nix::errno::Errno::ENOENT => "there is no such file; write one, see mh-hook.toml(5)",
            nix::errno::Errno::ELOOP => "is a symbolic link; give the file itself",
            _ => "open",
        })
    })?;
    let stat = trusted(&file, SFlag::S_IFREG)?;
    ensure!(
        u64::try_from(stat.st_size).is_ok_and(|size| size <= MAX_SIZE),
        "is larger than {MAX_SIZE} bytes"
    );
    let mut bytes = Vec::with_capacity(usize::try_from(stat.st_size)?);
    File::from(file)
        .take(MAX_SIZE)
        .read_to_end(&mut bytes)
        .context("read")?;
    String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        let ahead = String::from_utf8_lossy(&error.as_bytes()[..valid]).into_owned();
        let (line, column) = place(&ahead, valid);
        anyhow::anyhow!("line {line}, column {column}: is not UTF-8")
    })
}

fn trusted(fd: impl AsFd, kind: SFlag) -> Result<FileStat> {
    let stat = fstat(fd).context("fstat")?;
    let is = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    ensure!(is == kind, "is not a regular file");
    ensure!(
        stat.st_uid == 0,
        "belongs to user {}, not to root: chown root it",
        stat.st_uid
    );
    ensure!(
        stat.st_mode & 0o022 == 0,
        "can be written by others than root (mode {:o}): chmod go-w it",
        stat.st_mode & 0o7777
    );
    Ok(stat)
}

/// Between those of the local table and of main (`ip-rule(8)`).
const PRIORITIES: RangeInclusive<u64> = 1..=32765;

/// A table's name, as the messages have it, and its keys.
type Keys = (&'static str, &'static [&'static str]);

const FILE: Keys = ("the file", &["lan", "mark", "priority", "uplink"]);
const LAN: Keys = ("[lan]", &["interfaces", "networks"]);
const MARK: Keys = ("[mark]", &["mask"]);
const PRIORITY: Keys = ("[priority]", &["local", "mark", "source", "pin"]);
const UPLINK: Keys = (
    "[uplink]",
    &[
        "interface",
        "ipparam",
        "linkname",
        "peer",
        "table",
        "mark",
        "masquerade",
        "hairpin",
        "clamp-mss",
        "accept-forward",
        "pin",
        "forward",
    ],
);
const FORWARD: Keys = ("a forward", &["proto", "port", "to", "from"]);

/// All tables.
pub const KEYS: [Keys; 6] = [FILE, LAN, MARK, PRIORITY, UPLINK, FORWARD];

/// Walks the parsed document and collects what is wrong, so that one run shows all of it.
struct Reader {
    /// Whether the parser has left out a part, and what follows a header that it left out stands elsewhere.
    is_broken: bool,
    problems: Vec<Problem>,
}

impl Reader {
    fn problem(&mut self, span: Span, message: impl Into<String>) {
        self.problems.push(Problem::new(span, message));
    }

    /// A problem, unless what is missing may stand in what the parser left out.
    fn missing(&mut self, span: Span, what: &str) {
        if !self.is_broken {
            self.problem(span, format!("missing {what}"));
        }
    }

    /// The value, or a problem at its place.
    fn take<T>(&mut self, span: Span, value: Result<T>) -> Option<T> {
        value
            .map_err(|error| self.problem(span, format!("{error:#}")))
            .ok()
    }

    /// A problem for each key that is none of these.
    fn known(&mut self, table: &Table, (place, keys): Keys) {
        let unknown = table.iter().filter(|(key, _)| !keys.contains(&key.name));
        for (Key { name, span }, _) in unknown {
            let known = keys.join(", ");
            self.problem(
                *span,
                format!("unknown key {name:?} in {place}; there are {known}"),
            );
        }
    }

    fn table<'a>(&mut self, root: &'a Table<'a>, key: &str) -> Option<&'a Table<'a>> {
        let value = root.get(key)?;
        let table = value.as_table();
        if table.is_none() {
            self.problem(value.span(), format!("{key} is a table: [{key}]"));
        }
        table
    }

    fn config(&mut self, root: &Table) -> Config {
        if !self.is_broken {
            self.known(root, FILE);
        }
        let lan = self.lan(root);
        let mask = self.mask(root);
        let priority = self.priority(root);
        let mut uplinks = BTreeMap::new();
        let mut places = Vec::new();
        for (key, value) in self.table(root, "uplink").into_iter().flatten() {
            let Some(name) = self.take(key.span, UplinkName::parse(key.name)) else {
                continue;
            };
            let Some(table) = value.as_table() else {
                self.problem(
                    value.span(),
                    format!("an uplink is a table: [uplink.{name}]"),
                );
                continue;
            };
            if uplinks.len() == MAX_UPLINKS {
                self.problem(key.span, format!("more than {MAX_UPLINKS} uplinks"));
                break;
            }
            if let Some(uplink) = self.uplink(key, table, mask) {
                places.push((name.clone(), key.span));
                uplinks.insert(name, uplink);
            }
        }
        if root
            .get("uplink")
            .is_some_and(|value| value.as_table().is_some_and(|t| !t.is_empty()))
        {
            for (key, none) in [
                ("interfaces", lan.interfaces.is_empty()),
                ("networks", lan.networks.is_empty()),
            ] {
                let written = root
                    .get("lan")
                    .and_then(Item::as_table)
                    .is_some_and(|l| l.contains_key(key));
                if none && !written {
                    let place = root
                        .get_key_value("lan")
                        .map_or(Span::default(), |(key, _)| key.span);
                    self.missing(
                        place,
                        &format!("key {key} in [lan]: required once there is an uplink"),
                    );
                }
            }
        }
        self.unique(&places, &uplinks, &lan);
        Config {
            lan,
            mask,
            priority,
            uplinks,
        }
    }

    fn lan(&mut self, root: &Table) -> Lan {
        let Some(table) = self.table(root, "lan") else {
            return Lan::default();
        };
        self.known(table, LAN);
        let interfaces = self.list(
            table,
            "interfaces",
            "interface names: [\"eth1\"]",
            IfName::parse,
        );
        let networks = self.list(table, "networks", "prefixes: [\"192.168.0.0/24\"]", prefix);
        Lan {
            interfaces,
            networks,
        }
    }

    fn mask(&mut self, root: &Table) -> u32 {
        const DEFAULT: u32 = 0xff;
        let Some(table) = self.table(root, "mark") else {
            return DEFAULT;
        };
        self.known(table, MARK);
        self.integer(table, "mask", 1..=u32::MAX.into())
            .unwrap_or(DEFAULT)
    }

    fn priority(&mut self, root: &Table) -> Priority {
        let mut priority = Priority {
            local: 98,
            mark: 99,
            source: 100,
            pin: 101,
        };
        let Some(table) = self.table(root, "priority") else {
            return priority;
        };
        self.known(table, PRIORITY);
        let keys = [
            ("local", &mut priority.local),
            ("mark", &mut priority.mark),
            ("source", &mut priority.source),
            ("pin", &mut priority.pin),
        ];
        for (key, target) in keys {
            if let Some(value) = self.integer(table, key, PRIORITIES) {
                *target = value;
            }
        }
        if !table.contains_key("pin") {
            // Whoever moves the others need not know of pins.
            priority.pin = priority.pin.max(priority.mark + 1);
        }
        let Priority {
            local,
            mark,
            source,
            pin,
        } = priority;
        // The LAN is nearer than any uplink, and a connection's own way back comes before its host's.
        if let Some((key, _)) = table.iter().next()
            && !(local < mark && local < source && mark < pin)
        {
            let message = format!(
                "local must come ahead of mark, source and pin, and mark ahead of pin; \
                 local is {local}, mark {mark}, source {source}, pin {pin}"
            );
            self.problem(key.span, message);
        }
        priority
    }

    fn uplink(&mut self, name: &Key, table: &Table, mask: u32) -> Option<Uplink> {
        let place = format!("[uplink.{}]", name.name);
        self.known(table, UPLINK);
        let identity = self.identity(name, table, &place);
        let pin = self.list(
            table,
            "pin",
            "LAN sources: [\"192.168.0.2\"]",
            address_or_prefix,
        );
        let masquerade = self.boolean(table, "masquerade").unwrap_or(true);
        let forwards = self.forwards(table);
        let id = self.table_id(table);
        if table.get("table").is_none() {
            for needs in ["forward", "mark", "pin"] {
                let Some((key, _)) = table.get_key_value(needs) else {
                    continue;
                };
                self.missing(
                    key.span,
                    &format!(
                        "key table in {place}: {needs} needs a routing table of its own: table = 10"
                    ),
                );
            }
        }
        let mark = match table.get("mark") {
            Some(_) => self.integer(table, "mark", 1..=u32::MAX.into()),
            None => id.map(|TableId(id)| id),
        };
        if let Some(mark) = mark
            && mark & !mask != 0
        {
            let at = table
                .get("mark")
                .or(table.get("table"))
                .map_or(name.span, Item::span);
            let (low, high) = (1u32 << mask.trailing_zeros(), mask);
            self.problem(
                at,
                format!("mark {mark} does not fit the mask {mask:#x}: give mark = {low} to {high} within it, or widen [mark] mask"),
            );
        }
        Some(Uplink {
            identity: identity?,
            routing: id.zip(mark).map(|(table, value)| Routing {
                table,
                mark: FwMark { value, mask },
            }),
            masquerade,
            hairpin: self.boolean(table, "hairpin").unwrap_or(true),
            clamp_mss: self.boolean(table, "clamp-mss").unwrap_or(true),
            accept_forward: self.boolean(table, "accept-forward").unwrap_or(false),
            pin,
            forwards,
            chains: BTreeMap::new(),
        })
    }

    fn identity(&mut self, name: &Key, table: &Table, place: &str) -> Option<Identity> {
        let string = |value: &Item| {
            let text = value
                .as_str()
                .filter(|text| !text.is_empty() && !text.chars().any(char::is_control));
            text.map(str::to_owned)
        };
        let mut texts = ["ipparam", "linkname", "peer"].map(|key| {
            let value = table.get(key)?;
            let text = string(value);
            self.take(
                value.span(),
                text.with_context(|| format!("{key} is a string of printable characters")),
            )
        });
        let interface = table.get("interface").and_then(|value| {
            let text = value.as_str().context("interface is a name: \"ppp0\"");
            self.take(value.span(), text.and_then(IfName::parse))
        });
        let [ipparam, linkname, peer] = texts.each_mut().map(Option::take);
        let identity = Identity {
            interface,
            ipparam,
            linkname,
            peer,
        };
        if !["interface", "ipparam", "linkname", "peer"]
            .iter()
            .any(|key| table.contains_key(key))
        {
            let what = format!(
                "interface in {place}: say which link this is by interface, ipparam, linkname or peer: \
                 interface = \"ppp0\""
            );
            self.missing(name.span, &what);
        }
        (identity != Identity::default()).then_some(identity)
    }

    fn table_id(&mut self, table: &Table) -> Option<TableId> {
        let id: u32 = self.integer(table, "table", 1..=0x7fff_ffff)?;
        if (253..=255).contains(&id) {
            let span = table.get("table").map_or(Span::default(), Item::span);
            self.problem(
                span,
                format!(
                    "table {id} is the system's (default, main, local): use 1 to 252, or above 255"
                ),
            );
            return None;
        }
        Some(TableId(id))
    }

    fn forwards(&mut self, table: &Table) -> Vec<Forward> {
        let Some(value) = table.get("forward") else {
            return Vec::new();
        };
        let example = "forward is a list of tables: [{ port = 80, to = \"192.168.0.2\" }]";
        let Some(items) = value.as_array() else {
            self.problem(value.span(), example);
            return Vec::new();
        };
        let mut forwards: Vec<Forward> = Vec::with_capacity(items.len());
        let mut places = Vec::with_capacity(items.len());
        for item in items {
            let Some(table) = item.as_table() else {
                self.problem(item.span(), example);
                continue;
            };
            if let Some(forward) = self.forward(item, table) {
                forwards.push(forward);
                places.push(item.span());
            }
        }
        for (later, earlier) in overlapping(&forwards) {
            let earlier = describe(&forwards[earlier]);
            let message = format!("overlaps the forward of {earlier} above it");
            self.problem(places[later], message);
        }
        forwards
    }

    fn forward(&mut self, item: &Item, table: &Table) -> Option<Forward> {
        self.known(table, FORWARD);
        let protocols = match table.get("proto") {
            None => Some(Cow::Borrowed(&[Protocol::Tcp][..])),
            Some(value) => self.protocols(value).map(Cow::Owned),
        };
        let ports = match table.get("port") {
            Some(value) => self.take(value.span(), port_range(value)).map(Some),
            None => Some(None),
        };
        let to = match table.get("to") {
            Some(value) => self.take(value.span(), target(value)),
            None => {
                self.missing(item.span(), "to: the LAN host: to = \"192.168.0.2\"");
                None
            }
        };
        let from = self.list(
            table,
            "from",
            "source prefixes: [\"198.51.100.0/24\"]",
            address_or_prefix,
        );
        if from.is_empty()
            && let Some(value) = table.get("from")
            && value.as_array().is_some_and(|list| list.is_empty())
        {
            self.problem(
                value.span(),
                "an empty from lets nobody in; leave it out to let everybody in",
            );
        }
        let (protocols, ports, (to, to_port)) = (protocols?, ports?, to?);
        let portless =
            protocols.is_empty() || !protocols.iter().all(|protocol| protocol.has_ports());
        if ports.is_some() && portless {
            let span = table.get("port").map_or(item.span(), Item::span);
            self.problem(
                span,
                "only tcp, udp and sctp have ports: leave port out, or name these protocols only",
            );
        }
        if to_port.is_some()
            && ports
                .as_ref()
                .is_none_or(|ports| ports.start() != ports.end())
        {
            let span = table.get("to").map_or(item.span(), Item::span);
            self.problem(
                span,
                "a port in to goes with one port: several keep theirs, so give an address alone",
            );
        }
        Some(Forward {
            protocols,
            ports,
            to,
            to_port,
            from,
        })
    }

    /// The protocols; none for any.
    fn protocols(&mut self, value: &Item) -> Option<Vec<Protocol>> {
        let list = value.as_array();
        let names = list.map_or(std::slice::from_ref(value), Array::as_slice);
        let mut protocols = Vec::new();
        if names.is_empty() {
            self.problem(
                value.span(),
                "an empty proto forwards nothing; leave it out for tcp",
            );
        }
        for name in names {
            let text = name.as_str().unwrap_or_default();
            let known = Protocol::parse(text);
            let message = match known {
                _ if text == "any" && list.is_none() => return Some(Vec::new()),
                _ if text == "any" => "\"any\" stands alone: proto = \"any\"",
                Some(protocol) if protocols.contains(&protocol) => "stands twice in proto",
                Some(protocol) => {
                    protocols.push(protocol);
                    continue;
                }
                None => {
                    "proto is \"tcp\", \"udp\", \"sctp\", \"gre\", \"esp\" or \"icmp\", a list of these, or \"any\""
                }
            };
            self.problem(name.span(), message);
        }
        Some(protocols).filter(|protocols| !protocols.is_empty())
    }

    /// A list of strings, each parsed; a problem for each that is not, and for doubles.
    fn list<T: PartialEq>(
        &mut self,
        table: &Table,
        key: &str,
        what: &str,
        parse: fn(&str) -> Result<T>,
    ) -> Vec<T> {
        let Some(value) = table.get(key) else {
            return Vec::new();
        };
        let Some(items) = value.as_array() else {
            self.problem(value.span(), format!("{key} is a list of {what}"));
            return Vec::new();
        };
        let mut list = Vec::new();
        for item in items.iter() {
            let parsed = item
                .as_str()
                .with_context(|| format!("{key} is a list of {what}"))
                .and_then(parse);
            let Some(parsed) = self.take(item.span(), parsed) else {
                continue;
            };
            if list.contains(&parsed) {
                self.problem(item.span(), format!("stands twice in {key}"));
            }
            list.push(parsed);
        }
        list
    }

    fn boolean(&mut self, table: &Table, key: &str) -> Option<bool> {
        let value = table.get(key)?;
        let boolean = value.as_bool();
        if boolean.is_none() {
            self.problem(value.span(), format!("{key} is true or false"));
        }
        boolean
    }

    fn integer(&mut self, table: &Table, key: &str, range: RangeInclusive<u64>) -> Option<u32> {
        let value = table.get(key)?;
        let integer = value.as_u64().filter(|number| range.contains(number));
        if integer.is_none() {
            self.problem(
                value.span(),
                format!(
                    "{key} is a whole number from {} to {}",
                    range.start(),
                    range.end()
                ),
            );
        }
        integer.and_then(|number| u32::try_from(number).ok())
    }

    /// Tables, marks and interfaces must tell uplinks apart.
    fn unique(
        &mut self,
        places: &[(UplinkName, Span)],
        uplinks: &BTreeMap<UplinkName, Uplink>,
        lan: &Lan,
    ) {
        for (index, (name, span)) in places.iter().enumerate() {
            let uplink = &uplinks[name];
            if let Some(interface) = &uplink.identity.interface
                && lan.interfaces.contains(interface)
            {
                self.problem(
                    *span,
                    format!("interface {interface} of {name} is one of [lan] interfaces too"),
                );
            }
            for pin in uplink.pin.iter().filter(|pin| {
                !lan.networks
                    .iter()
                    .any(|network| pin.is_subnet_of(*network))
            }) {
                self.problem(
                    *span,
                    format!("pin {pin} of {name} lies in none of [lan] networks"),
                );
            }
            for (earlier, _) in &places[..index] {
                let other = &uplinks[earlier];
                let (one, two) = (&uplink.identity, &other.identity);
                if one.matches(two) || two.matches(one) {
                    let message = format!(
                        "{earlier} and {name} match the same link: give one of them what the other has not"
                    );
                    self.problem(*span, message);
                }
                if let Some(pin) = uplink
                    .pin
                    .iter()
                    .find(|pin| other.pin.iter().any(|theirs| theirs.overlaps(**pin)))
                {
                    self.problem(*span, format!("{earlier} and {name} both pin {pin}"));
                }
                let (Some(ours), Some(theirs)) = (&uplink.routing, &other.routing) else {
                    continue;
                };
                if ours.table == theirs.table {
                    self.problem(
                        *span,
                        format!("{earlier} and {name} both have table {}", ours.table),
                    );
                }
                if ours.mark == theirs.mark && ours.table != theirs.table {
                    self.problem(
                        *span,
                        format!("{earlier} and {name} both have mark {}", ours.mark.value),
                    );
                }
            }
        }
    }
}

/// A prefix with its length and without host bits: ipnetwork itself takes both.
fn prefix(text: &str) -> Result<Ipv4Network> {
    let network: Ipv4Network = text
        .parse()
        .ok()
        .filter(|_| text.contains('/'))
        .with_context(|| format!("{text:?} is not an IPv4 prefix such as \"192.168.0.0/24\""))?;
    ensure!(
        network.prefix() > 0,
        "{text:?} is every address; name the prefixes that are meant"
    );
    ensure!(
        network.ip() == network.network(),
        "{text:?} has bits behind its prefix; write {}/{}",
        network.network(),
        network.prefix()
    );
    Ok(network)
}

fn port_range(value: &Item) -> Result<RangeInclusive<u16>> {
    let what = "port is one port (80) or a range (\"27015-27030\"), from 1 to 65535";
    let port = |text: &str| {
        text.parse::<u16>()
            .ok()
            .filter(|port| *port > 0 && text.starts_with(|c: char| c.is_ascii_digit()))
    };
    let range = match value.value() {
        Value::Integer(integer) => integer
            .as_u64()
            .and_then(|n| u16::try_from(n).ok())
            .filter(|n| *n > 0)
            .map(|n| n..=n),
        Value::String(text) => match text.split_once('-') {
            Some((first, last)) => port(first)
                .zip(port(last))
                .map(|(first, last)| first..=last),
            None => port(text).map(|port| port..=port),
        },
        _ => None,
    };
    let range = range.context(what)?;
    ensure!(!range.is_empty(), "the range ends before it begins: {what}");
    Ok(range)
}

fn target(value: &Item) -> Result<(Ipv4Addr, Option<u16>)> {
    let what = "to is a LAN host's address, or address:port: \"192.168.0.2:22\"";
    let text = value.as_str().context(what)?;
    let (address, port) = match text.split_once(':') {
        Some((address, port)) => (
            address,
            Some(
                port.parse::<u16>()
                    .ok()
                    .filter(|port| *port > 0)
                    .context(what)?,
            ),
        ),
        None => (text, None),
    };
    let address = address.parse().ok().context(what)?;
    check_local(address, &[])
        .map_err(|_| anyhow::anyhow!("{address} can't be a host's address: {what}"))?;
    Ok((address, port))
}

/// An address alone stands for itself.
fn address_or_prefix(text: &str) -> Result<Ipv4Network> {
    match text.parse::<Ipv4Addr>() {
        Ok(address) => Ok(address.into()),
        Err(_) => prefix(text),
    }
}

/// A forward's protocols and ports: `tcp/80`, `tcp+udp/53`, `udp/27015-27030`, `esp`, `any`.
pub fn describe(forward: &Forward) -> String {
    let names: Vec<String> = forward.protocols.iter().map(ToString::to_string).collect();
    let protocols = if names.is_empty() {
        "any".into()
    } else {
        names.join("+")
    };
    match &forward.ports {
        None => protocols,
        Some(ports) if ports.start() == ports.end() => format!("{protocols}/{}", ports.start()),
        Some(ports) => format!("{protocols}/{}-{}", ports.start(), ports.end()),
    }
}

/// The forwards that overlap one above them, by index, each with the first such. Of thousands only those are
/// compared that have a port in common.
fn overlapping(forwards: &[Forward]) -> BTreeMap<usize, usize> {
    let mut ported = Vec::with_capacity(forwards.len());
    let mut open = Vec::new();
    for (index, forward) in forwards.iter().enumerate() {
        match &forward.ports {
            Some(ports) => ported.push((*ports.start(), *ports.end(), index)),
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
    let ports = match (&earlier.ports, &later.ports) {
        (Some(one), Some(two)) => one.start() <= two.end() && two.start() <= one.end(),
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
        let ports = (1..30u16, 0..6u16).prop_map(|(first, more)| first..=first + more);
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
