//! The machine at one instant, everybody's entries and ours, for those who only look. Changes nothing.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::geteuid;

use crate::config::Config;
use crate::inspect::packet_trace::TracedRuleset;
use crate::kernel::conntrack::{self, Flow};
use crate::kernel::ip::{self, RouteLookup};
use crate::kernel::iptables_save::Ruleset;
use crate::kernel::observe::{Kernel, has_tables};
use crate::kernel::routing::Whose;
use crate::kernel::tools::{Backend, Counters, Tools};
use crate::model::link::UplinkLinks;
use crate::model::state::State;
use crate::reconcile::desired::desired_state;
use crate::reconcile::ownership::Owners;
use crate::reconcile::request::{Request, Seen};
use crate::runtime::privilege::drop_all_but_needed;

/// How long looking may take.
const LIMIT: Duration = Duration::from_secs(28);

/// All that was asked, once.
#[derive(Debug)]
pub struct Snapshot {
    /// The tools, to ask further.
    pub tools: Tools,
    /// Everybody's rules and routes, the interfaces, and the tables of the backend in use.
    pub kernel: Kernel,
    /// The tables of the backend that is not in use, where there are any.
    pub other_ruleset: Option<(Backend, Ruleset)>,
    /// The rules of both backends, to trace packets by.
    pub rulesets: Vec<(Backend, TracedRuleset)>,
    /// The tables that nftables has beside those of iptables, where its tool is installed.
    pub nft_tables: Vec<String>,
    /// The connections that are tracked; none where conntrack is not installed.
    pub flows: Option<Vec<Flow>>,
}

/// Our entries, installed and desired.
#[derive(Debug)]
pub struct Comparison {
    /// Whose the installed entries are.
    pub owners: Owners,
    /// Our installed entries.
    pub installed: State,
    /// The uplinks' links, as `sync` finds them.
    pub links: UplinkLinks,
    /// Our desired entries.
    pub desired: State,
}

impl Snapshot {
    /// Asks the kernel, by the tools where there is no other way.
    ///
    /// # Errors
    /// A tool can't be run or fails, or says what can't be read.
    pub fn read() -> Result<Self> {
        ensure!(
            geteuid().is_root(),
            "must be root: the kernel's routing and iptables are to be read"
        );
        let tools = Tools::find(Instant::now() + LIMIT)?;
        drop_all_but_needed(tools.backend);
        let kernel = Kernel::read(&tools, Whose::Everybodys, Counters::Shown)?;
        let other = tools.other().filter(|other| has_tables(other.backend));
        let other_ruleset = other.map(|other| -> Result<(Backend, Ruleset)> {
            let save = other.iptables_save(Counters::Shown)?;
            Ok((other.backend, Ruleset::parse(&save.answer()?)?))
        });
        let other_ruleset = other_ruleset.transpose()?.filter(|(_, it)| !it.is_empty());
        let mut rulesets = vec![(tools.backend, TracedRuleset::new(&kernel.ruleset))];
        if let Some((backend, ruleset)) = &other_ruleset {
            rulesets.push((*backend, TracedRuleset::new(ruleset)));
        }
        let flows = tools
            .conntrack_list()?
            .map(|listing| conntrack::parse(&listing));
        Ok(Self {
            nft_tables: nft_tables(&tools.nft_tables()?.unwrap_or_default()),
            tools,
            kernel,
            other_ruleset,
            rulesets,
            flows,
        })
    }

    /// Compares our installed entries with those that `sync` would bring about.
    ///
    /// # Errors
    /// An address that can't be an uplink's.
    pub fn compare(&self, config: &Config) -> Result<Comparison> {
        let owners = Owners::new(Some(config), &self.kernel);
        let installed = owners.installed(&self.kernel);
        let seen = Seen {
            owners: &owners,
            installed: &installed,
            links: &self.kernel.links,
        };
        let links = Request::Sync.links(config, &seen)?;
        let desired = desired_state(Some(config), &links, State::default());
        Ok(Comparison {
            owners,
            installed,
            links,
            desired,
        })
    }

    /// The kernel's own answer to `ip route get`, or its refusal in its words.
    ///
    /// # Errors
    /// `ip` can't be run, or answers what can't be read.
    pub fn route_get(&self, question: &str) -> Result<Result<RouteLookup, String>> {
        let output = self.tools.ip_ask(&format!("route get {question}"))?;
        if output.status.success() {
            return ip::route_lookup(&output.stdout)
                .with_context(|| format!("ip route get {question}"))
                .map(Ok);
        }
        // A refusal has words; whatever else ended it says nothing of the route.
        let words = output.stderr.lines().next();
        let words = words.and_then(|words| words.strip_prefix("RTNETLINK answers: "));
        match words {
            Some(words) => Ok(Err(words.to_owned())),
            None => bail!("ip route get {question}: {}", output.failure()),
        }
    }
}

/// The tables in `nft list tables` that are not iptables' own: `table inet firewall`.
fn nft_tables(listing: &str) -> Vec<String> {
    let is_iptables = |table: &&str| {
        table
            .strip_prefix("table ip ")
            .is_some_and(|name| ["raw", "mangle", "nat", "filter", "security"].contains(&name))
    };
    // Those of other families do not see IPv4 packets on their way through.
    let is_seen = |table: &&str| {
        ["table ip ", "table inet ", "table netdev "]
            .iter()
            .any(|family| table.starts_with(family))
    };
    let tables = listing.lines().map(str::trim);
    tables
        .filter(|table| is_seen(table) && !is_iptables(table))
        .map(str::to_owned)
        .collect()
}
