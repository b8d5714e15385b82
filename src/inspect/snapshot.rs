//! The kernel's state at one instant, foreign entries and ours, for the commands that only look. Changes nothing.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::geteuid;

use crate::config::Config;
use crate::inspect::packet_trace::{NativeTable, TracedRuleset};
use crate::kernel::ip::{self, RouteLookup};
use crate::kernel::iptables_save::Ruleset;
use crate::kernel::nftables::Nftables;
use crate::kernel::observe::{Kernel, has_tables};
use crate::kernel::pppd;
use crate::kernel::root::Root;
use crate::kernel::routing::Whose;
use crate::kernel::tools::{Backend, Counters, Tools};
use crate::model::link::{Troubles, UplinkLinks};
use crate::model::names::UplinkName;
use crate::model::state::State;
use crate::reconcile::desired::{Pins, desired_state};
use crate::reconcile::diff::{Step, diff};
use crate::reconcile::dnat::AllChains;
use crate::reconcile::ownership::Owners;
use crate::reconcile::request::{Request, Seen, unknown};
use crate::runtime::privilege::drop_all_but_needed;

/// How long all questions together may take.
const LIMIT: Duration = Duration::from_secs(28);

/// What was read once, and the tools to ask further.
#[derive(Debug)]
pub struct Snapshot {
    pub root: Root,
    pub tools: Tools,
    /// All rules and routes, the interfaces, and the tables of the iptables backend in use.
    pub kernel: Kernel,
    /// The tables of the backend that is not in use, unless they are empty.
    pub other_ruleset: Option<(Backend, Ruleset)>,
    /// The rules of both backends, to trace packets by.
    pub rulesets: Vec<(Backend, TracedRuleset)>,
    /// The rules of nftables that iptables does not list.
    pub native: Vec<NativeTable>,
    /// Why those are not known.
    pub native_unread: Option<String>,
}

/// Our entries, installed and desired.
#[derive(Debug)]
pub struct Comparison {
    pub owners: Owners,
    pub installed: State,
    /// The uplinks' links, as `sync` finds them.
    pub links: UplinkLinks,
    /// The uplinks whose links can't be used.
    pub troubles: Troubles,
    /// The uplinks of which nothing tells which link is theirs, while one is up that may be.
    pub unknown: BTreeSet<UplinkName>,
    pub desired: State,
}

impl Snapshot {
    /// Reads the system's state.
    /// Errors: a tool can't be run or fails, or the answer of a tool or of the kernel can't be read.
    pub fn read() -> Result<Self> {
        ensure!(
            geteuid().is_root(),
            "must be root: the kernel's routing and iptables are to be read"
        );
        let root = Root::system();
        let mut tools = Tools::find(Instant::now() + LIMIT)?;
        drop_all_but_needed(tools.known_backend());
        tools.ask_backend()?;
        let mut kernel = Kernel::read(tools.iptables_save(Counters::Shown)?, Whose::Everybodys)?;
        kernel.dialled = pppd::dialled(&root);
        Self::new(root, tools, kernel)
    }

    /// Adds what only tools tell: the other backend's rules, and those of nftables.
    /// Errors: a tool can't be run or fails, or its answer can't be read.
    pub fn new(root: Root, tools: Tools, kernel: Kernel) -> Result<Self> {
        let other = tools.other().filter(|other| has_tables(other.backend));
        let other_ruleset = other.map(|other| -> Result<(Backend, Ruleset)> {
            let save = other.iptables_save(Counters::Shown)?;
            Ok((other.backend, Ruleset::read(save)?))
        });
        let other_ruleset = other_ruleset.transpose()?.filter(|(_, it)| !it.is_empty());
        let mut rulesets = vec![(tools.backend, TracedRuleset::new(&kernel.ruleset))];
        if let Some((backend, ruleset)) = &other_ruleset {
            rulesets.push((*backend, TracedRuleset::new(ruleset)));
        }
        let listed = match (tools.backend, &other_ruleset) {
            (Backend::Nft, _) => Some(&kernel.ruleset),
            (Backend::Legacy, Some((_, ruleset))) => Some(ruleset),
            (Backend::Legacy, None) => None,
        };
        let (native, native_unread) = match read_native(&tools, listed) {
            Ok(native) => (native, None),
            Err(error) => (Vec::new(), Some(format!("{error:#}"))),
        };
        Ok(Self {
            native,
            native_unread,
            root,
            tools,
            kernel,
            other_ruleset,
            rulesets,
        })
    }

    /// Compares our installed entries with those that `sync` would make.
    /// Errors: an address that can't be an uplink's.
    pub fn compare(&self, config: &Config) -> Result<Comparison> {
        let owners = Owners::new(Some(config), &self.kernel);
        let installed = owners.installed(&self.kernel);
        let seen = Seen {
            owners: &owners,
            installed: &installed,
            links: &self.kernel.links,
            dialled: &self.kernel.dialled,
        };
        let (links, troubles) = Request::Sync.links(config, &seen)?;
        let unknown = unknown(config, &links, &seen).into_keys().collect();
        let desired = desired_state(
            Some(config),
            &AllChains::new(),
            &links,
            Pins::StayClosed,
            State::default(),
        );
        Ok(Comparison {
            owners,
            installed,
            links,
            troubles,
            unknown,
            desired,
        })
    }

    /// What makes one state of the other, except in tables that iptables-save does not list: entries that can't be seen
    /// may well be installed.
    pub fn steps(&self, installed: &State, desired: &State) -> Vec<Step> {
        let unlisted = &self.kernel.ruleset.incompatible;
        let mut steps = diff(installed, desired);
        steps.retain(|step| step.table().is_none_or(|it| !unlisted.contains(it.name())));
        steps
    }

    /// Reverse path filtering in force on an interface: 0 off, 1 strict, 2 loose. The larger value of the interface's own
    /// and of `all` counts (Documentation/networking/ip-sysctl.rst).
    pub fn rp_filter(&self, interface: &str) -> u8 {
        let value = |name: &str| -> Option<u8> {
            let path = format!("net/ipv4/conf/{name}/rp_filter");
            self.root.sysctl(&path)?.parse().ok()
        };
        value(interface).max(value("all")).unwrap_or(0)
    }

    /// The kernel's answer to `ip route get`, or its refusal: `Network is unreachable`.
    /// Errors: `ip` can't be run, or its answer can't be read.
    pub fn route_get(&self, question: &str) -> Result<Result<RouteLookup, String>> {
        let output = self.tools.ip_ask(&format!("route get {question}"))?;
        if output.status.success() {
            return ip::route_lookup(&output.stdout)
                .with_context(|| format!("ip route get {question}"))
                .map(Ok);
        }
        // Without these words it was not the kernel that refused.
        let words = output.stderr.lines().next();
        let words = words.and_then(|words| words.strip_prefix("RTNETLINK answers: "));
        match words {
            Some(words) => Ok(Err(words.to_owned())),
            None => bail!("ip route get {question}: {}", output.failure()),
        }
    }
}

/// The rules of nftables that iptables-nft does not list.
/// Errors: nft is not installed, though the kernel has such tables; it fails, or its answer can't be read.
fn read_native(tools: &Tools, listed: Option<&Ruleset>) -> Result<Vec<NativeTable>> {
    match tools.nft_ruleset()? {
        Some(json) if json.trim().is_empty() => Ok(Vec::new()),
        Some(json) => Ok(NativeTable::all(&Nftables::parse(&json)?, listed)),
        None => Ok(Vec::new()),
    }
}
