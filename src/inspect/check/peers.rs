//! pppd's options for the uplinks' links: the files in /etc/ppp/peers, each read after /etc/ppp/options.

use std::collections::BTreeMap;

use super::{Finding, View, few};
use crate::config::Config;
use crate::kernel::pppd::{Options, PEERS as FOLDER, options, peer_options};
use crate::kernel::root::Root;
use crate::model::names::UplinkName;

/// The file that dials each uplink, by the name that `pon` takes, and its options.
pub fn peers(root: &Root, config: &Config) -> BTreeMap<UplinkName, (String, Options)> {
    let mut peers = BTreeMap::new();
    for path in root.list(FOLDER) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // pppd takes any name; these are what editors and dpkg leave behind.
        if name.ends_with('~') || name.contains(".dpkg-") || name.starts_with('.') {
            continue;
        }
        let Some(options) = peer_options(root, &name) else {
            continue;
        };
        if let [uplink] = config.matching(&options.identity)[..] {
            peers.insert(uplink.clone(), (name.into_owned(), options));
        }
    }
    peers
}

/// The command that keeps pppd from adding a default route.
fn turn_off(root: &Root, peer: &str) -> String {
    let path = format!("{FOLDER}/{peer}");
    if options(&root.read(&path).unwrap_or_default(), peer).adds_default() {
        let pattern = "^[[:space:]]*(replace)?defaultroute[[:space:]]*$";
        format!("sed -i -E 's/{pattern}/nodefaultroute/' {path}")
    } else {
        // The option stands in /etc/ppp/options.
        format!("echo nodefaultroute >> {path}")
    }
}

/// Finds links that take the default route from each other.
pub fn check(view: &View) -> Vec<Finding> {
    let root = &view.snapshot.root;
    let mut adding = peers(root, view.config);
    adding.retain(|_, (_, options)| options.adds_default());
    let is_serving = |name: &UplinkName| !view.config.uplinks[name].forwards.is_empty();
    let has_plain = view.config.uplinks.keys().any(|name| !is_serving(name));
    let mut findings = Vec::from_iter(unnamed(view));
    let mut told = None;
    for (name, (peer, options)) in &adding {
        if options.replaces && is_serving(name) && (adding.len() > 1 || has_plain) {
            let what = format!(
                "{FOLDER}/{peer} says replacedefaultroute: whenever this link comes up, it takes the default route \
                 from the other links"
            );
            let finding = Finding::warning("peers-replacedefaultroute", what).of(name);
            findings.push(finding.fix(turn_off(root, peer)));
            told = Some(name);
        }
    }
    let mut metrics: BTreeMap<&Option<String>, Vec<_>> = BTreeMap::new();
    for (name, (peer, options)) in &adding {
        if Some(name) != told {
            let same = metrics.entry(&options.metric).or_default();
            same.push((name, peer));
        }
    }
    for same in metrics.values().filter(|same| same.len() > 1) {
        let files = same.iter().map(|(_, peer)| format!("{FOLDER}/{peer}"));
        let what = format!(
            "{} all say defaultroute: the link that is dialled first gets the default route",
            few(files)
        );
        let mut finding = Finding::warning("peers-defaultroute", what);
        // An uplink with forwards needs no default route. Where that does not tell them apart, the first keeps it.
        let serving: Vec<_> = same.iter().filter(|(name, _)| is_serving(name)).collect();
        let losers = match serving.is_empty() || serving.len() == same.len() {
            true => same.iter().skip(1).collect(),
            false => serving,
        };
        for (_, peer) in losers {
            finding = finding.fix(turn_off(root, peer));
        }
        findings.push(finding);
    }
    findings
}

/// Peers that match no uplink, while an uplink has no peer, and that all ask for the default route: which link they are, nobody
/// can tell.
fn unnamed(view: &View) -> Option<Finding> {
    let root = &view.snapshot.root;
    let known = peers(root, view.config);
    if known.len() >= view.config.uplinks.len() {
        return None;
    }
    let names = root.list(FOLDER).into_iter();
    let names = names.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()));
    let asks = |name: &String| {
        let is_known = known.values().any(|(peer, _)| peer == name);
        // Debian's own example.
        let is_left_out = name == "provider" || name.ends_with('~') || name.contains('.');
        let options = peer_options(root, name).filter(|_| !is_known && !is_left_out);
        options.is_some_and(|it| it.adds_default() && it.identity.interface.is_none())
    };
    let unnamed: Vec<String> = names.filter(asks).collect();
    let (first, _) = unnamed.split_first()?;
    if unnamed.len() < 2 {
        return None;
    }
    let files = unnamed.iter().map(|name| format!("{FOLDER}/{name}"));
    let what = format!(
        "{} all ask for the default route and name no unit: the link that is dialled first gets both ppp0 and the default route",
        few(files)
    );
    let fix = format!(
        "echo unit 0 >> {FOLDER}/{first}: each its own number, and nodefaultroute in that of the servers' link"
    );
    Some(Finding::warning("peers-unnamed", what).fix(fix))
}
