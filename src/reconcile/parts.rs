//! Each uplink's entries, installed and desired, and the orphans. Pure.

use std::collections::BTreeMap;

use crate::config::Config;
use crate::model::link::UplinkLinks;
use crate::model::names::UplinkName;
use crate::model::state::{Entry, State};
use crate::reconcile::desired::{Up, desired, desired_down};
use crate::reconcile::ownership::{Claimant, Owner, Owners};

/// One uplink's entries.
#[derive(Debug, Default)]
pub struct Part {
    pub installed: State,
    pub desired: State,
}

/// Each configured uplink's entries, and the orphans: what is installed, and no configured uplink claims.
pub fn parts(
    config: &Config,
    owners: &Owners,
    installed: &State,
    links: &UplinkLinks,
) -> (BTreeMap<UplinkName, Part>, State) {
    let mut parts = BTreeMap::new();
    for (name, uplink) in &config.uplinks {
        let link = links.get(name).and_then(Option::as_ref);
        let part = Part {
            installed: State::default(),
            desired: match link {
                Some(link) => desired(config, &Up::new(name, uplink, link)),
                None => desired_down(config, uplink),
            },
        };
        parts.insert(name.clone(), part);
    }
    // An entry is theirs who desire it, whoever made it; one that nobody desires counts once.
    let mut split = installed.split(|entry| {
        let desirers = parts.iter().filter(|(_, part)| match entry {
            Entry::Route(_) | Entry::RouteRule(_) | Entry::SrcValidMark(_) => {
                part.desired.contains(entry)
            }
            // They name their uplink, and nobody else desires them.
            Entry::Chain(..) | Entry::Rule(..) => false,
        });
        let desirers: Vec<_> = desirers.map(|(name, _)| Some(name.clone())).collect();
        if !desirers.is_empty() {
            return desirers;
        }
        let claimants = match owners.owner(entry) {
            Owner::Ours(claimants) => claimants,
            Owner::Foreign => return Vec::new(),
        };
        let mut names = claimants.iter().filter_map(Claimant::uplink);
        vec![names.find(|name| parts.contains_key(*name)).cloned()]
    });
    let orphans = split.remove(&None).unwrap_or_default();
    for (name, own) in split {
        if let Some(name) = name {
            parts.entry(name).or_default().installed = own;
        }
    }
    (parts, orphans)
}
