//! Our entries in the backend of iptables that is not in use: they work on packets all the same.

use std::collections::BTreeSet;

use log::warn;

use crate::config::Config;
use crate::kernel::iptables_save::Ruleset;
use crate::kernel::observe::{Kernel, has_tables};
use crate::kernel::tools::{Counters, OnError, Tools};
use crate::model::names::UplinkName;
use crate::model::state::State;
use crate::reconcile::apply::{Outcome, apply};
use crate::reconcile::diff::{Step, diff};
use crate::reconcile::ownership::{Claimant, Owners, Scope};
use crate::reconcile::request::Request;

/// What is installed there, and the tools to remove it.
pub struct OtherBackend {
    /// The tools of that backend.
    pub tools: Tools,
    owners: Owners,
    installed: State,
}

impl OtherBackend {
    /// Looks, and warns of each uplink that has entries there; none where nothing can be there.
    pub fn read(tools: &Tools, config: Option<&Config>) -> Option<Self> {
        let tools = tools.other()?;
        if !has_tables(tools.backend) {
            return None;
        }
        let save = tools.iptables_save(Counters::Hidden);
        let ruleset = match save.and_then(Ruleset::read) {
            Ok(ruleset) => ruleset,
            Err(error) => {
                warn!("what {} holds: {error:#}", tools.backend);
                return None;
            }
        };
        let (owners, installed) = owned(config, ruleset);
        let names: BTreeSet<&UplinkName> = installed.tables.keys().map(|(_, name)| name).collect();
        for name in names {
            warn!(
                "entries of {name} stand in {} too, which is not in use here: down and sync remove them",
                tools.backend
            );
        }
        Some(Self {
            tools,
            owners,
            installed,
        })
    }

    /// The steps that remove what the request is about: all entries, or those of an interface that goes down.
    pub fn removal(&self, request: &Request, scope: &Scope) -> Vec<Step> {
        let left = match (request, scope) {
            (Request::Sync, _) | (Request::Down { .. }, Scope::All) => State::default(),
            (Request::Down { interface }, Scope::These(claimants)) => {
                let bound = self.owners.bound_to(interface).into_iter();
                let gone = bound.map(Claimant::Uplink).chain(claimants.iter().cloned());
                let gone = Scope::These(gone.collect());
                self.owners.left_alone(&self.installed, &gone)
            }
            (Request::Up { .. } | Request::Event(_), _) => return Vec::new(),
        };
        diff(&self.installed, &left)
    }

    pub fn remove(&self, request: &Request, scope: &Scope) -> Outcome {
        let steps = self.removal(request, scope);
        apply(&self.tools, &steps, OnError::GoOn)
    }
}

/// Our entries in this ruleset.
pub fn owned(config: Option<&Config>, ruleset: Ruleset) -> (Owners, State) {
    let kernel = Kernel {
        ruleset,
        ..Kernel::default()
    };
    let owners = Owners::new(config, &kernel);
    let installed = owners.installed(&kernel);
    (owners, installed)
}
