//! What pppd was told: the options in its files, and those of the pppds that run.

use std::path::Path;

use crate::kernel::root::Root;
use crate::model::link::Identity;
use crate::model::names::IfName;

/// The folder of the files that `pppd call NAME` reads.
pub const PEERS: &str = "/etc/ppp/peers";

const COMMON: &str = "/etc/ppp/options";

/// The options in a file that tell which uplink it dials, and what it does to the default route.
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub identity: Identity,
    pub default_route: bool,
    pub no_default_route: bool,
    pub replaces: bool,
    pub metric: Option<String>,
}

impl Options {
    /// Whether pppd adds a default route: `nodefaultroute` forbids it, before or after `defaultroute` (pppd(8)).
    pub fn adds_default(&self) -> bool {
        (self.default_route || self.replaces) && !self.no_default_route
    }
}

/// The options of `pppd call NAME`. None if there is no such file.
pub fn peer_options(root: &Root, name: &str) -> Option<Options> {
    // A name with `..` in it is an error to pppd, too (`options_from_file`, pppd/options.c).
    let path = Path::new(PEERS).join(name);
    let text = root.read(path).filter(|_| !name.contains(".."))?;
    let common = root.read(COMMON).unwrap_or_default();
    Some(options(&format!("{common}\n{text}"), name))
}

/// What the pppds that run were told, each with its interface: pppd notes its process id in /run/pppN.pid (pppd(8), FILES),
/// and has the options of its command line ahead of those in the file that `call` names.
pub fn dialled(root: &Root) -> Vec<Identity> {
    let files = root.list("/run").into_iter();
    let names = files.filter_map(|path| {
        let name = path.file_name()?.to_str()?.strip_suffix(".pid")?;
        let interface = IfName::parse(name).ok()?;
        let pid: u32 = root.read(&path)?.trim().parse().ok()?;
        let command = root.read(format!("/proc/{pid}/cmdline"))?;
        let words: Vec<&str> = command.split('\0').collect();
        let program = Path::new(words.first()?).file_name()?;
        if program != "pppd" {
            return None;
        }
        let after = |option| Some(*words.iter().skip_while(|word| **word != option).nth(1)?);
        let peer = after("call");
        let told = peer.and_then(|peer| peer_options(root, peer));
        let told = told.unwrap_or_default().identity;
        Some(Identity {
            interface: Some(interface),
            ipparam: after("ipparam").map(str::to_owned).or(told.ipparam),
            linkname: after("linkname").map(str::to_owned).or(told.linkname),
            peer: peer.map(str::to_owned),
            address: None,
        })
    });
    names.collect()
}

/// The options of a file (pppd(8), OPTIONS FILES). `unit N` names the interface `pppN`.
pub fn options(text: &str, peer: &str) -> Options {
    let mut options = Options::default();
    let identity = &mut options.identity;
    identity.peer = Some(peer.to_owned());
    let mut words = words(text).into_iter();
    while let Some(word) = words.next() {
        match &word[..] {
            "defaultroute" => options.default_route = true,
            "replacedefaultroute" => options.replaces = true,
            "nodefaultroute" => options.no_default_route = true,
            "defaultroute-metric" => options.metric = words.next(),
            "unit" | "ifname" => {
                let prefix = if word == "unit" { "ppp" } else { "" };
                let name = words.next().map(|value| format!("{prefix}{value}"));
                identity.interface = name.and_then(|name| IfName::parse(&name).ok());
            }
            "ipparam" => identity.ipparam = words.next(),
            "linkname" => identity.linkname = words.next(),
            _ => {}
        }
    }
    options
}

/// Words are separated by white space, and may be quoted; `#` starts a comment, `\` takes the next character literally.
fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, quote) {
            ('\\', _) => word.get_or_insert_default().extend(chars.next()),
            (c, Some(open)) if c == open => quote = None,
            (c, Some(_)) => word.get_or_insert_default().push(c),
            ('"' | '\'', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            ('#', None) if word.is_none() => {
                chars.by_ref().find(|c| *c == '\n');
            }
            (c, None) if c.is_whitespace() => words.extend(word.take()),
            (c, None) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}
