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
    let mut findings = Vec::new();
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
