//! Brings the kernel to what a request asks for: kernel, links, ownership, desired, diff, apply, and once more until the
//! links hold still. A call is only a trigger; under the lock the kernel is the truth.

pub mod apply;
pub mod command;
pub mod desired;
pub mod diff;
pub mod dnat;
pub mod event;
pub mod forms;
pub mod other_backend;
pub mod ownership;
pub mod parts;
pub mod request;
pub mod stale_flows;

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use log::{Level, debug, info, log, log_enabled, warn};

use crate::config::Config;
use crate::kernel::conntrack::{self, Flow, Tuple};
use crate::kernel::ip;
use crate::kernel::iptables_save::Ruleset;
use crate::kernel::link::{Link, Links};
use crate::kernel::observe::Kernel;
use crate::kernel::pppd;
use crate::kernel::process::Process;
use crate::kernel::root::Root;
use crate::kernel::routing::{self, Whose};
use crate::kernel::tools::{Counters, OnError, Tools};
use crate::model::link::{Identity, LinkState, Troubles, UplinkLink, UplinkLinks};
use crate::model::names::{IfName, UplinkName};
use crate::model::netfilter::Table;
use crate::model::route::{PROTOCOL, TableId};
use crate::model::state::State;
use crate::reconcile::apply::{Outcome, apply};
use crate::reconcile::desired::desired_state;
use crate::reconcile::diff::{Step, diff};
use crate::reconcile::dnat::{AllChains, all_chains};
use crate::reconcile::other_backend::OtherBackend;
use crate::reconcile::ownership::{Claimant, Claimants, Owners, Scope};
use crate::reconcile::request::{Request, Seen};
use crate::reconcile::stale_flows::Judges;
use crate::runtime::lock::Lock;
use crate::runtime::log::NOTICE;
use crate::runtime::output;
use crate::runtime::privilege::drop_all_but_needed;

/// How long one call may take. pppd runs its scripts again only after they have ended.
const LIMIT: Duration = Duration::from_secs(28);

/// How much of that time a call may wait for the lock.
const LOCK_LIMIT: Duration = Duration::from_secs(16);

/// How often the plan is made anew, because something has failed or the links have changed, before we give up.
const ROUNDS: usize = 6;

/// Whether the plan is run or printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Apply,
    /// Print it as commands, and change nothing.
    DryRun,
}

/// What a call needs before it may read and change the kernel: the tools and the lock. Privileges that the tools do not need
/// are dropped.
pub struct Session {
    started: Instant,
    tools: Tools,
    lock: Option<Lock>,
    /// iptables-save, once it is started.
    save: Option<Process>,
}

impl Session {
    /// Finds the tools and waits for the lock.
    /// Errors: a tool is missing, or others hold the lock for too long.
    pub fn begin(mode: Mode) -> Result<Self> {
        let started = Instant::now();
        let mut tools = Tools::find(started + LIMIT)?;
        drop_all_but_needed(tools.known_backend());
        tools.ask_backend()?;
        let lock = match mode {
            Mode::Apply => Some(Lock::take(started + LOCK_LIMIT)?),
            Mode::DryRun => None,
        };
        Ok(Self {
            started,
            tools,
            lock,
            save: None,
        })
    }

    /// Starts to read the kernel: where there are many rules, iptables-save takes the most time, and runs while the
    /// configuration is parsed.
    /// Errors: it can't be run.
    pub fn begin_to_read(&mut self) -> Result<()> {
        self.save = Some(self.tools.iptables_save(Counters::Hidden)?);
        Ok(())
    }
}

/// What a request will change, and why.
#[derive(Debug)]
pub struct Plan {
    /// The links of the uplinks in question.
    pub links: UplinkLinks,
    /// The uplinks whose links can't be used.
    pub troubles: Troubles,
    /// Whose entries the request is about.
    pub scope: Scope,
    pub installed: State,
    pub desired: State,
    /// The steps from the installed to the desired entries.
    pub steps: Vec<Step>,
    owners: Owners,
    dialled: Vec<Identity>,
}

impl Plan {
    /// Makes the plan of a request. Without a configuration it only removes. None if there is nothing to do.
    /// Errors: those of [`Request::links`].
    pub fn new(
        request: &Request,
        config: Option<&Config>,
        chains: &AllChains,
        kernel: &Kernel,
    ) -> Result<Option<Self>> {
        let owners = Owners::new(config, kernel);
        let installed = owners.installed(kernel);
        let seen = Seen {
            owners: &owners,
            installed: &installed,
            links: &kernel.links,
            dialled: &kernel.dialled,
        };
        let Some((links, troubles)) = request.links_in_question(config, &seen)? else {
            return Ok(None);
        };
        let scope = scope(request, config, &links, &owners);
        let left_alone = owners.left_alone(&installed, &scope);
        let closed = request.pins_of_down_links();
        let desired = desired_state(config, chains, &links, closed, left_alone);
        let steps = diff(&installed, &desired);
        Ok(Some(Self {
            links,
            troubles,
            scope,
            installed,
            desired,
            steps,
            owners,
            dialled: kernel.dialled.clone(),
        }))
    }

    /// What was seen when the plan was made, with the links of now.
    fn seen<'a>(&'a self, links: &'a Links) -> Seen<'a> {
        Seen {
            owners: &self.owners,
            installed: &self.installed,
            links,
            dialled: &self.dialled,
        }
    }

    /// Whether any link in question is up, so that entries are made.
    fn makes(&self) -> bool {
        self.links.values().any(Option::is_some)
    }

    /// Whether the links are still where they were when the plan was made.
    fn holds(&self, request: &Request, config: Option<&Config>) -> Result<bool> {
        let links = Link::all()?;
        let now = request.links_in_question(config, &self.seen(&links))?;
        Ok(now.is_some_and(|(now, _)| places(&now) == places(&self.links)))
    }
}

/// Brings the kernel to the state that the request asks for. Without a configuration, because it has errors, entries are only
/// removed.
/// Errors: the kernel could not be brought to that state.
pub fn reconcile(
    request: &Request,
    config: Option<&Config>,
    mode: Mode,
    session: Session,
) -> Result<()> {
    let Session {
        started,
        ref tools,
        lock,
        mut save,
    } = session;
    let named = || request.to_string();
    if let Some((interface, config)) = request.interface().zip(config)
        && request.named(config)?.is_empty()
    {
        debug!("no uplink names {interface}: only what the kernel's entries tell is looked for");
    }
    let mut other_backend = OtherBackend::read(tools, config);
    // The links do not matter for them, so they are made while iptables-save runs.
    let chains = config.filter(|_| !request.removes()).map(all_chains);
    let chains = chains.unwrap_or_default();
    let mut total = Outcome::default();
    let mut failed: Option<Vec<Step>> = None;
    // The installed entries before the first change that can leave stale connections.
    let mut before: Option<State> = None;
    for round in 0..ROUNDS {
        let running = save.take().map(Ok);
        let running = running.unwrap_or_else(|| tools.iptables_save(Counters::Hidden));
        let mut kernel = running
            .and_then(|save| Kernel::read(save, Whose::Ours))
            .map_err(|error| all(&total.errors, Some(error)))
            .with_context(named)?;
        if config.is_some_and(Config::asks_pppd) {
            kernel.dialled = pppd::dialled(&Root::system());
        }
        let Some(plan) = Plan::new(request, config, &chains, &kernel)? else {
            return Ok(());
        };
        let Plan {
            links,
            installed,
            desired,
            steps,
            ..
        } = &plan;
        let not_done = || not_done(request, links);
        if let Some(config) = config.filter(|_| round == 0) {
            request.check_known(config, &plan.seen(&kernel.links))?;
        }
        let doubt =
            config.and_then(|config| request.doubts(config, links, &plan.seen(&kernel.links)));
        if let Some(doubt) = doubt.as_ref().filter(|_| round == 0) {
            warn!("{doubt}");
        }
        let unlisted = unlisted(config, &kernel.ruleset);
        if let Some(error) = unlisted.as_ref().filter(|_| plan.makes()) {
            bail!("{}: {error}", not_done());
        }
        if log_enabled!(Level::Debug) {
            tell_unchanged(desired, steps);
        }
        if mode == Mode::DryRun {
            let troubles = plan.troubles.values();
            troubles.for_each(|error| warn!("{error:#}"));
            let troubles = plan.troubles.values().map(|error| format!("{error:#}"));
            let unseen = troubles.chain(unlisted.map(|error| error.to_string()));
            let unseen = unseen.chain(doubt.filter(|_| *request == Request::Sync));
            return print(
                tools,
                config,
                &plan,
                other_backend.as_ref(),
                request,
                unseen.collect(),
            );
        }
        if let Some(why) = misread(steps) {
            bail!("{}: {why}", not_done());
        }
        // The same steps would fail again.
        if failed.as_ref() == Some(steps) {
            return Err(all(&total.errors, None)).with_context(not_done);
        }
        if before.is_none() && stale_flows::leaves_some(steps) {
            before = Some(installed.clone());
        }
        // One uplink's entries need each other, but no other uplink's.
        let on_error = match plan.makes() && *request != Request::Sync {
            true => OnError::Stop,
            false => OnError::GoOn,
        };
        let outcome = apply(tools, steps, on_error);
        total.added += outcome.added;
        total.removed += outcome.removed;
        total.errors = outcome.errors;
        if !total.errors.is_empty() {
            debug!("{:#}; looking again", all(&total.errors, None));
            failed = Some(plan.steps);
            continue;
        }
        failed = None;
        // Once: it is not read again.
        if let Some(there) = other_backend.take() {
            let outcome = there.remove(request, &plan.scope);
            total.removed += outcome.removed;
            if !outcome.errors.is_empty() {
                return Err(all(&outcome.errors, None)).with_context(named);
            }
        }
        if plan.holds(request, config)? {
            // Others need not wait while connections are ended.
            drop(lock);
            if let Some(before) = &before {
                total.removed += end(&stale(config, links, before, desired));
            }
            if let Some(error) = unlisted {
                bail!("{}: {error}", not_done());
            }
            summary(request, links, &total, started);
            let troubles: Vec<Error> = plan.troubles.into_values().collect();
            ensure!(troubles.is_empty(), all(&troubles, None));
            return Ok(());
        }
    }
    if total.errors.is_empty() {
        bail!(
            "the links keep changing while their entries are made: run mh-hook sync when they are quiet"
        );
    }
    Err(all(&total.errors, None))
}

/// Whose entries the request is about: those of the uplinks in question, of whoever else had the interface, and of uplinks
/// that are no longer configured. Entries of ours whose uplink can't be told are removed by `sync` only.
fn scope(
    request: &Request,
    config: Option<&Config>,
    links: &UplinkLinks,
    owners: &Owners,
) -> Scope {
    let Some(interface) = request.interface() else {
        return Scope::All;
    };
    // Without a configuration it is not known which uplinks these are.
    let unconfigured = owners.unconfigured().filter(|_| config.is_some());
    let names = links.keys().chain(unconfigured).cloned();
    let mut claimants: Claimants = names.map(Claimant::Uplink).collect();
    claimants.insert(Claimant::Link(interface.to_string()));
    Scope::These(claimants)
}

/// Why nothing can be written: a table that we write to is not listed, so it is not known what it holds.
pub fn unlisted(config: Option<&Config>, ruleset: &Ruleset) -> Option<Error> {
    let mut tables = Table::ALL.into_iter().filter(|it| writes_to(*it, config));
    let table = tables.find(|table| ruleset.incompatible.contains(table.name()))?;
    let (what, advice) = not_listed(table.name());
    Some(anyhow!("{what}, so nothing is written there: see {advice}"))
}

/// Whether our entries go into a table: into filter only with `accept-forward`.
pub fn writes_to(table: Table, config: Option<&Config>) -> bool {
    let accepts = |config: &Config| config.uplinks.values().any(|it| it.accept_forward);
    table != Table::Filter || config.is_none_or(accepts)
}

/// What is wrong with a table that iptables-save does not list, and what helps.
pub fn not_listed(table: &str) -> (String, String) {
    let what = format!(
        "iptables-save does not list the table {table}, since a rule in it is not one of iptables' own"
    );
    let advice = format!(
        "nft -a list table ip {table}, and delete that rule, or move it to a table of its own"
    );
    (what, advice)
}

/// Why `ip` would take the number of a table, or of our protocol, for another one.
fn misread(steps: &[Step]) -> Option<String> {
    let table = |step: &Step| match step {
        Step::Route(_, route) => Some(route.table),
        Step::RouteRule(_, rule) => rule.table(),
        Step::Chain { .. } | Step::Entry(..) | Step::SrcValidMark(..) => None,
    };
    let tables: BTreeSet<u32> = steps
        .iter()
        .filter_map(table)
        .map(|TableId(id)| id)
        .collect();
    if tables.is_empty() {
        return None;
    }
    let root = Root::system();
    ip::misread(&root, "rt_tables", &tables)
        .or_else(|| ip::misread(&root, "rt_protos", &[PROTOCOL.into()].into()))
}

/// An uplink, and its link's interface and addresses.
type Place<'a> = (&'a UplinkName, Option<(&'a IfName, &'a [Ipv4Addr])>);

fn places<'a>(links: &'a UplinkLinks) -> Vec<Place<'a>> {
    let place = |link: &'a UplinkLink| (&link.interface, &link.addresses[..]);
    let links = links.iter();
    links
        .map(|(name, link)| (name, link.as_ref().map(place)))
        .collect()
}

fn tell_unchanged(desired: &State, steps: &[Step]) {
    for step in diff(&State::default(), desired) {
        if !steps.contains(&step) {
            let changes = step.changes().into_iter();
            changes.for_each(|(_, command)| debug!("already there: {command}"));
        }
    }
}

/// The connections that contradict the change from `before` to `desired`. Their end is not needed for the entries to hold, so
/// what can't be looked at is told, and no failure.
fn stale(
    config: Option<&Config>,
    links: &UplinkLinks,
    before: &State,
    desired: &State,
) -> Vec<Flow> {
    let Some(config) = config else {
        return Vec::new();
    };
    let judges = Judges::new(config, links, before, desired);
    let leaves_by = |flow: &Flow| {
        let Tuple {
            source,
            destination,
            ..
        } = flow.original;
        routing::leaves_by(source, destination, flow.mark & config.mask)
    };
    let find = |filters| conntrack::find(filters, |flow| judges.is_stale(flow, leaves_by));
    let found = find(judges.filters()).and_then(|mut found| {
        found.extend(find(judges.filters_behind(&found))?);
        Ok(found)
    });
    found.unwrap_or_else(|error| {
        warn!("connections from before this change keep their ways: {error:#}");
        Vec::new()
    })
}

/// Ends connections, and returns how many.
fn end(flows: &[Flow]) -> usize {
    let (ended, result) = conntrack::end(flows);
    for (told, flow) in flows.iter().enumerate() {
        log!(apply::level(told), "conntrack {flow}");
    }
    if let Err(error) = result {
        warn!("a connection from before this change keeps its way: {error:#}");
    }
    ended
}

/// Prints the plan as commands, and what could not be looked at as comments.
fn print(
    tools: &Tools,
    config: Option<&Config>,
    plan: &Plan,
    other_backend: Option<&OtherBackend>,
    request: &Request,
    unseen: Vec<String>,
) -> Result<()> {
    let Plan {
        links,
        installed,
        desired,
        steps,
        ..
    } = plan;
    let stale = match stale_flows::leaves_some(steps) {
        true => stale(config, links, installed, desired),
        false => Vec::new(),
    };
    let removal = other_backend.map(|there| (&there.tools, there.removal(request, &plan.scope)));
    let here = plan.steps.iter().map(|step| (tools, step));
    let there = removal.iter();
    let there = there.flat_map(|(tools, steps)| steps.iter().map(move |step| (*tools, step)));
    let mut text = String::new();
    for (tools, step) in here.chain(there) {
        let commands = step.commands().into_iter();
        text.extend(commands.map(|(_, command)| format!("{}\n", command.by(tools.iptables))));
    }
    text.extend(stale.iter().map(|flow| format!("conntrack {flow}\n")));
    if text.is_empty() && unseen.is_empty() {
        text.push_str("# nothing to change\n");
    }
    text.extend(unseen.iter().map(|why| format!("# not looked at: {why}\n")));
    output::print(&text).context("print the plan")
}

/// All errors as one.
fn all(errors: &[Error], last: Option<Error>) -> Error {
    let errors = errors.iter().chain(&last);
    let texts: Vec<String> = errors.map(|error| format!("{error:#}")).collect();
    anyhow!(texts.join("; "))
}

/// `isp0 up on ppp0 203.0.113.10, isp1 down`
fn describe(request: &Request, links: &UplinkLinks) -> String {
    if links.is_empty() {
        return "orphans".into();
    }
    let each = links
        .iter()
        .map(|(name, link)| match (link, request.interface()) {
            (Some(link), _) => {
                let way = match link.state {
                    LinkState::Up => "up",
                    LinkState::AboutToBeUp => "about to be up",
                };
                format!("{name} {way} on {} {}", link.interface, link.address)
            }
            (None, Some(interface)) => format!("{name} down on {interface}"),
            (None, None) => format!("{name} down"),
        });
    each.collect::<Vec<_>>().join(", ")
}

/// `isp0 is NOT up on ppp0 203.0.113.10`
fn not_done(request: &Request, links: &UplinkLinks) -> String {
    if links.is_empty() {
        return format!("{request}: NOT all entries are removed");
    }
    let each = links
        .iter()
        .map(|(name, link)| match (link, request.interface()) {
            (Some(link), _) => format!("{name} is NOT up on {} {}", link.interface, link.address),
            (None, Some(interface)) => format!("{name} is NOT down on {interface}"),
            (None, None) => format!("{name} is NOT down"),
        });
    match request {
        Request::Sync => "sync is NOT complete".into(),
        _ => each.collect::<Vec<_>>().join(", "),
    }
}

/// `isp0 up on ppp0 203.0.113.10: 9 added, 0 removed, 6 ms`
fn summary(request: &Request, links: &UplinkLinks, outcome: &Outcome, started: Instant) {
    let Outcome { added, removed, .. } = outcome;
    let text = format!(
        "{}: {added} added, {removed} removed, {} ms",
        describe(request, links),
        started.elapsed().as_millis()
    );
    let changed = added + removed > 0;
    match request {
        _ if changed => info!(target: NOTICE, "{text}"),
        // A person asked.
        Request::Up { .. } | Request::Down { .. } if !links.is_empty() => info!("{text}"),
        _ => debug!("{text}"),
    }
}
