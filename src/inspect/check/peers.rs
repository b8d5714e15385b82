//! pppd's options for the uplinks' links: files in /etc/ppp/peers, behind /etc/ppp/options.

use std::collections::BTreeMap;
use std::fs;

use super::{Finding, View, few};
use crate::config::{Config, Identity};
use crate::model::names::{IfName, UplinkName};

const FOLDER: &str = "/etc/ppp/peers";
const COMMON: &str = "/etc/ppp/options";

/// What a file of options says, as far as it is of interest here.
#[derive(Clone, Debug, Default)]
struct Options {
    identity: Identity,
    default_route: bool,
    no_default_route: bool,
    replaces: bool,
    metric: Option<String>,
}

impl Options {
    /// Whether pppd sets a default route: `nodefaultroute` forbids it wherever it stands (pppd(8)).
    fn sets_default(&self) -> bool {
        (self.default_route || self.replaces) && !self.no_default_route
    }
}

/// The peers of the uplinks, by the file's name.
fn peers(config: &Config) -> BTreeMap<UplinkName, (String, Options)> {
    let common = fs::read_to_string(COMMON).unwrap_or_default();
    let mut peers = BTreeMap::new();
    let entries = fs::read_dir(FOLDER).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name().to_string_lossy().into_owned();
        // pppd takes any name; these are what editors and dpkg leave behind.
        if name.ends_with('~') || name.contains(".dpkg-") || name.starts_with('.') {
            continue;
        }
        let Ok(text) = fs::read_to_string(entry.path()) else {
            continue;
        };
        let options = options(&format!("{common}\n{text}"), &name);
        if let [uplink] = config.matching(&options.identity)[..] {
            peers.insert(uplink.clone(), (name, options));
        }
    }
    peers
}

/// The file that dials an uplink's link, for `pon`.
pub fn of(config: &Config, name: &UplinkName) -> Option<String> {
    peers(config).remove(name).map(|(peer, _)| peer)
}

/// Options that would take the default route back and forth.
pub fn check(view: &View) -> Vec<Finding> {
    let peers = peers(view.config);
    let mut findings = Vec::new();
    let setters: Vec<_> = peers
        .iter()
        .filter(|(_, (_, options))| options.sets_default())
        .collect();
    let is_serving = |name: &UplinkName| !view.config.uplinks[name].forwards.is_empty();
    let off = |peer: &str| {
        format!(
            "sed -i -E 's/^[[:space:]]*(replace)?defaultroute[[:space:]]*$/nodefaultroute/' {FOLDER}/{peer}"
        )
    };
    let mut told = None;
    // One that takes the route away from a link that should have it.
    for (name, (peer, options)) in &setters {
        let others = setters.iter().any(|(other, _)| other != name);
        let has_plain = view.config.uplinks.keys().any(|name| !is_serving(name));
        if options.replaces && is_serving(name) && (others || has_plain) {
            let what = format!(
                "{FOLDER}/{peer} says replacedefaultroute: whenever this link comes up, everything else leaves by it"
            );
            findings.push(
                Finding::harms("peers-replacedefaultroute", what)
                    .of(name)
                    .mend(off(peer)),
            );
            told = Some(*name);
        }
    }
    let mut metrics: BTreeMap<&Option<String>, Vec<_>> = BTreeMap::new();
    for (name, (peer, options)) in &setters {
        if Some(*name) != told {
            metrics
                .entry(&options.metric)
                .or_default()
                .push((*name, peer));
        }
    }
    for both in metrics.values().filter(|both| both.len() > 1) {
        let files = both.iter().map(|(_, peer)| format!("{FOLDER}/{peer}"));
        let what = format!(
            "{} all say defaultroute: the link that is dialled first has it",
            few(files)
        );
        let mut finding = Finding::harms("peers-defaultroute", what);
        // Those with forwards answer without it; of others, all but one.
        let serving = both.iter().filter(|(name, _)| is_serving(name));
        let (keep_one, losers): (usize, Vec<_>) = match serving.clone().count() {
            0 => (1, both.iter().collect()),
            all if all == both.len() => (1, both.iter().collect()),
            _ => (0, serving.collect()),
        };
        for (_, peer) in losers.into_iter().skip(keep_one) {
            finding = finding.mend(off(peer));
        }
        findings.push(finding);
    }
    findings
}

/// What the words of a file say (pppd(8), OPTIONS FILES): `unit N` names `pppN`.
fn options(text: &str, peer: &str) -> Options {
    let mut options = Options::default();
    let words = words(text);
    let mut words = words.iter().map(String::as_str).peekable();
    while let Some(word) = words.next() {
        let value = |words: &mut std::iter::Peekable<_>| -> Option<String> {
            let value: &str = words.next()?;
            Some(value.to_owned())
        };
        match word {
            "defaultroute" => options.default_route = true,
            "replacedefaultroute" => options.replaces = true,
            "nodefaultroute" => options.no_default_route = true,
            "defaultroute-metric" => options.metric = value(&mut words),
            "unit" => {
                let name = value(&mut words).map(|unit| format!("ppp{unit}"));
                options.identity.interface = name.and_then(|name| IfName::parse(&name).ok());
            }
            "ifname" => {
                let name = value(&mut words);
                options.identity.interface = name.and_then(|name| IfName::parse(&name).ok());
            }
            "ipparam" => options.identity.ipparam = value(&mut words),
            "linkname" => options.identity.linkname = value(&mut words),
            _ => {}
        }
    }
    options.identity.peer = Some(peer.to_owned());
    options
}

/// Words apart by white space, in quotes or not; `#` starts a comment, `\` takes what follows as it is.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_as_pppd_does() {
        let text = "# defaultroute\nplugin rp-pppoe.so\nuser \"a # b\"\nunit 0\nipparam 'isp 0'\nnodefaultroute\ndefaultroute\n";
        let found = options(text, "isp0");
        assert_eq!(
            found.identity.interface.map(|name| name.to_string()),
            Some("ppp0".into())
        );
        assert_eq!(found.identity.ipparam.as_deref(), Some("isp 0"));
        assert_eq!(found.identity.peer.as_deref(), Some("isp0"));
        assert!(found.default_route && found.no_default_route && !found.replaces);
        assert_eq!(words("a\\ b \"\" c#d #e"), ["a b", "", "c#d"]);
    }
}
