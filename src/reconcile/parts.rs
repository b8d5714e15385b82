//! Each uplink's entries, installed and desired, and the orphans. Pure.

use std::collections::BTreeMap;

use crate::config::Config;
use crate::model::link::UplinkLinks;
use crate::model::names::{IfName, UplinkName};
use crate::model::route::{Route, RouteRule};
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
                Some(link) => desired(config, &Up { name, uplink, link }),
                None => desired_down(config, uplink),
            },
        };
        parts.insert(name.clone(), part);
    }
    // An entry is theirs who desire it, whoever made it; one that nobody desires counts once.
    let desirers = Desirers::new(&parts);
    let mut split = installed.split(|entry| {
        let by = desirers.of(entry);
        if !by.is_empty() {
            return by.into_iter().map(Some).collect();
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

/// Which uplinks desire an entry that several can.
#[derive(Default)]
struct Desirers<'a> {
    routes: BTreeMap<&'a Route, Vec<UplinkName>>,
    rules: BTreeMap<&'a RouteRule, Vec<UplinkName>>,
    src_valid_mark: BTreeMap<&'a IfName, Vec<UplinkName>>,
}

impl<'a> Desirers<'a> {
    fn new(parts: &'a BTreeMap<UplinkName, Part>) -> Self {
        let mut desirers = Self::default();
        for (name, part) in parts {
            let State {
                routes,
                rules,
                src_valid_mark,
                // The uplink's name stands in each.
                tables: _,
            } = &part.desired;
            for route in routes {
                desirers.routes.entry(route).or_default().push(name.clone());
            }
            for rule in rules {
                desirers.rules.entry(rule).or_default().push(name.clone());
            }
            for interface in src_valid_mark {
                let names = desirers.src_valid_mark.entry(interface).or_default();
                names.push(name.clone());
            }
        }
        desirers
    }

    fn of(&self, entry: Entry) -> Vec<UplinkName> {
        let names = match entry {
            Entry::Route(route) => self.routes.get(route),
            Entry::RouteRule(rule) => self.rules.get(rule),
            Entry::SrcValidMark(interface) => self.src_valid_mark.get(interface),
            Entry::Chain(..) | Entry::Rule(..) => None,
        };
        names.cloned().unwrap_or_default()
    }
}
