//! The machine as it stands, everybody's entries and ours, for those who only look: `status`, `check`,
//! `explain`. Changes nothing.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::geteuid;

use crate::claim::{self, Looks};
use crate::command::{Backend, Counters, Tools};
use crate::config::Config;
use crate::conntrack::{self, Flow};
use crate::ip::{self, Survey, Way};
use crate::link::Link;
use crate::observed::{self, observe};
use crate::privilege::drop_all_but_needed;
use crate::request::Request;
use crate::ruleset::Ruleset;
use crate::state::State;

/// How long looking may take.
const LIMIT: Duration = Duration::from_secs(28);

/// All that was asked, once.
#[derive(Debug)]
pub struct System {
    /// The tools, to ask further.
    pub tools: Tools,
    /// The entries of ours.
    pub observed: State,
    /// Everybody's rules and routes.
    pub survey: Survey,
    /// The interfaces, by name.
    pub links: BTreeMap<String, Link>,
    /// What stands in each backend of iptables: the one in use, and the other where it has anything.
    pub rulesets: Vec<(Backend, Ruleset)>,
    /// The tables that nftables has beside those of iptables, where its tool is installed.
    pub nft_tables: Vec<String>,
    /// The connections that are tracked; none where conntrack is not installed.
    pub flows: Option<Vec<Flow>>,
}

impl System {
    /// Asks the kernel, by the tools.
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
        let observed = observe(tools.iptables_save(Counters::Hidden)?)?;
        let survey = ip::survey(&tools.ip_list(ip::SURVEY)?);
        let save = tools.iptables_save(Counters::Shown)?.answer()?;
        let mut rulesets = vec![(tools.backend, Ruleset::parse(&save))];
        if let Some(other) = tools
            .other()
            .filter(|other| observed::has_tables(other.backend))
        {
            let ruleset = Ruleset::parse(&other.iptables_save(Counters::Shown)?.answer()?);
            if !ruleset.is_empty() {
                rulesets.push((other.backend, ruleset));
            }
        }
        let flows = tools
            .conntrack_list()?
            .map(|listing| conntrack::parse(&listing));
        Ok(Self {
            observed,
            survey,
            links: Link::all()?,
            rulesets,
            nft_tables: nft_tables(&tools.nft_tables()?.unwrap_or_default()),
            flows,
            tools,
        })
    }

    /// The links of all uplinks as `sync` finds them, and all of ours that should stand.
    ///
    /// # Errors
    /// An address that can't be an uplink's; the kernel can't be asked.
    pub fn aim(&self, config: &Config) -> Result<(Looks, State)> {
        let looks = Request::Sync.look(config, &self.observed)?;
        let wanted = claim::wanted(config, &self.observed, &looks);
        Ok((looks, wanted))
    }

    /// What stands in the backend in use.
    pub fn ruleset(&self) -> &Ruleset {
        &self.rulesets.first().expect("the backend in use is read").1
    }

    /// The kernel's own answer to `ip route get`, or its refusal in its words.
    ///
    /// # Errors
    /// `ip` can't be run, or answers what can't be read.
    pub fn route_get(&self, question: &str) -> Result<Result<Way, String>> {
        let output = self.tools.ip_ask(&format!("route get {question}"))?;
        if output.status.success() {
            return ip::way(&output.stdout)
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

/// A kernel parameter below /proc/sys, by its name with dots where no name in it has some; none where
/// the kernel has no such parameter.
pub fn sysctl(path: &str) -> Option<String> {
    let value = fs::read_to_string(format!("/proc/sys/{path}")).ok()?;
    Some(value.trim().to_owned())
}
