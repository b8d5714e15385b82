//! Turns the wheel: observe, look at the links, plan, apply, and look again, until the kernel holds
//! what it should. A call is only a trigger; under the lock the kernel is the truth.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Write, stdout};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use log::{Level, debug, info, log_enabled, warn};
use nix::unistd::geteuid;

use crate::apply::{Outcome, apply};
use crate::claim::{self, Addressed, Looks};
use crate::command::{Counters, OnError, Tools};
use crate::config::Config;
use crate::conntrack::{self, Flow};
use crate::link::Link;
use crate::lock::Lock;
use crate::observed::{self, observe};
use crate::plan::{Step, plan};
use crate::privilege::drop_all_but_needed;
use crate::request::Request;
use crate::running::Running;
use crate::stale;
use crate::state::{IfName, State, UplinkName};

/// How long one call may take: pppd waits for its hooks' end before it runs them again.
const LIMIT: Duration = Duration::from_secs(28);

/// How long of that a call waits for the others' end.
const LOCK_LIMIT: Duration = Duration::from_secs(16);

/// How often a changing kernel is followed before we give up.
const ROUNDS: usize = 6;

/// Whether the plan is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It is.
    Apply,
    /// It is printed as commands, and nothing changes.
    DryRun,
}

/// A call that has its turn: it holds the lock, and iptables-save lists what stands.
pub struct Turn {
    started: Instant,
    tools: Tools,
    _lock: Option<Lock>,
    /// What prints the tables.
    save: Running<'static>,
}

impl Turn {
    /// Waits for it.
    ///
    /// # Errors
    /// A tool is missing or can't be run, or others' turns take too long.
    pub fn take(mode: Mode) -> Result<Self> {
        let started = Instant::now();
        let tools = Tools::find(started + LIMIT)?;
        drop_all_but_needed(tools.backend);
        let lock = match mode {
            Mode::Apply => Some(Lock::take(started + LOCK_LIMIT)?),
            Mode::DryRun => None,
        };
        Ok(Self {
            started,
            save: tools.iptables_save(Counters::Hidden)?,
            tools,
            _lock: lock,
        })
    }
}

/// Brings the kernel to what the request asks for, in the turn that has been taken, or in one of its own.
/// Without a configuration, because it does not hold, entries can only be removed.
///
/// # Errors
/// The kernel could not be brought there, and why.
pub fn converge(
    request: &Request,
    config: Option<&Config>,
    mode: Mode,
    turn: Option<Result<Turn>>,
) -> Result<()> {
    if let Some((interface, config)) = request.interface().zip(config)
        && request.named(config)?.is_empty()
    {
        debug!("no uplink names {interface}: only what the kernel's entries tell is looked for");
        if !geteuid().is_root() {
            return Ok(());
        }
    }
    ensure!(
        geteuid().is_root(),
        "must be root: the kernel's routing and iptables are to be read and changed"
    );
    let named = || request.to_string();
    let turn = turn.unwrap_or_else(|| Turn::take(mode));
    let Turn {
        started,
        tools,
        _lock,
        save,
    } = turn.with_context(named)?;
    let mut save = Some(save);
    let elsewhere = elsewhere(&tools);
    let mut total = Outcome::default();
    let mut failed: Option<Vec<Step>> = None;
    // What stood before the first change of which connections may be left behind.
    let mut before: Option<State> = None;
    for round in 0..ROUNDS {
        let again = || tools.iptables_save(Counters::Hidden);
        let observed = save
            .take()
            .map_or_else(again, Ok)
            .and_then(observe)
            .map_err(|error| all(&total.errors, Some(error)))
            .with_context(named)?;
        let Some(looks) = look(request, config, &observed)? else {
            return Ok(());
        };
        let wanted = wanted(request, config, &observed, &looks);
        if let Some(doubt) = config
            .and_then(|config| request.doubts(config, &looks))
            .filter(|_| round == 0)
        {
            warn!("{doubt}");
        }
        let steps = plan(&observed, &wanted);
        if log_enabled!(Level::Debug) {
            say_what_stands(&wanted, &steps);
        }
        if mode == Mode::DryRun {
            let flows = match stale::leaves_some(&steps) {
                true => tracked(&tools)?,
                false => Vec::new(),
            };
            let stale = stale(config, &looks, &observed, &wanted, &flows);
            let deletions = conntrack::deletions(&flows, &stale);
            let mut steps = vec![(&tools, steps)];
            if let Some(there) = &elsewhere {
                steps.push((&there.tools, there.surplus(request, &looks)));
            }
            return print(&steps, &deletions);
        }
        // The same steps once more would fail once more.
        if failed.as_ref() == Some(&steps) {
            return Err(all(&total.errors, None)).with_context(|| describe(request, &looks));
        }
        let on_error = if looks.values().any(Option::is_some) {
            OnError::Stop
        } else {
            OnError::GoOn
        };
        if before.is_none() && stale::leaves_some(&steps) {
            before = Some(observed.clone());
        }
        let outcome = apply(&tools, &steps, on_error);
        total.added += outcome.added;
        total.removed += outcome.removed;
        total.errors = outcome.errors;
        if !total.errors.is_empty() {
            debug!("{:#}; looking again", all(&total.errors, None));
            failed = Some(steps);
            continue;
        }
        if let Some(before) = &before {
            let ended = end_stale(&tools, config, &looks, before, &wanted);
            // What has failed once may have been a mishap; nobody would ask again.
            let ended = ended.or_else(|error| {
                debug!("{error:#}; once more");
                end_stale(&tools, config, &looks, before, &wanted)
            });
            total.removed += ended.with_context(named)?;
        }
        if let Some(there) = &elsewhere {
            let outcome = there.leave(request, &looks);
            total.removed += outcome.removed;
            if !outcome.errors.is_empty() {
                return Err(all(&outcome.errors, None)).with_context(named);
            }
        }
        let now = look(request, config, &observed)?;
        if now.is_some_and(|now| places(&now) == places(&looks)) {
            summary(request, &looks, &total, started);
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

/// The uplinks in question, with their links as they are now; none where there is nothing to do:
/// without a configuration entries can only be removed, and not while the interface is up.
fn look(request: &Request, config: Option<&Config>, observed: &State) -> Result<Option<Looks>> {
    if let Some(config) = config {
        return request.look(config, observed).map(Some);
    }
    let Some(interface) = request.interface() else {
        return Ok(None);
    };
    let link = Link::read(interface)?;
    let is_up = link.is_some_and(|link| link.up && !link.addresses.is_empty());
    if matches!(request, Request::Event(_)) && is_up {
        debug!("{interface} is up: this event is a late one");
        return Ok(None);
    }
    let names = claim::bound_to(interface, observed);
    Ok(Some(names.into_iter().map(|name| (name, None)).collect()))
}

/// All of ours that should stand.
fn wanted(request: &Request, config: Option<&Config>, observed: &State, looks: &Looks) -> State {
    match (config, request.interface()) {
        (Some(config), _) => claim::wanted(config, observed, looks),
        (None, Some(interface)) => claim::without_interface(interface, observed),
        (None, None) => observed.clone(),
    }
}

/// Where the links are, and for which addresses entries were made.
fn places(looks: &Looks) -> Vec<(&UplinkName, Option<(&IfName, Ipv4Addr)>)> {
    looks
        .iter()
        .map(|(name, link)| {
            (
                name,
                link.as_ref().map(|link| (&link.interface, link.address)),
            )
        })
        .collect()
}

/// Entries of ours in the backend of iptables that is not in use: they work on packets all the same.
struct Elsewhere {
    tools: Tools,
    state: State,
}

fn elsewhere(tools: &Tools) -> Option<Elsewhere> {
    let tools = tools.other()?;
    if !observed::has_tables(tools.backend) {
        return None;
    }
    let state = match observed::in_backend(&tools) {
        Ok(state) => state,
        Err(error) => {
            warn!("what stands in {}: {error:#}", tools.backend);
            return None;
        }
    };
    let names: BTreeSet<&UplinkName> = state.tables.keys().map(|(_, name)| name).collect();
    for name in names {
        warn!(
            "entries of {name} stand in {} too, which is not in use here: down and sync remove them",
            tools.backend
        );
    }
    Some(Elsewhere { tools, state })
}

impl Elsewhere {
    /// What removes the entries there that are in question: all, or one interface's that is down.
    fn surplus(&self, request: &Request, looks: &Looks) -> Vec<Step> {
        let left = match request {
            Request::Sync => State::default(),
            Request::Down { interface } => {
                let mut names = claim::bound_to(interface, &self.state);
                names.extend(looks.keys().cloned());
                let gone = self.state.share(&names, &BTreeSet::new());
                self.state.without(&gone)
            }
            Request::Up { .. } | Request::Event(_) => return Vec::new(),
        };
        plan(&self.state, &left)
    }

    fn leave(&self, request: &Request, looks: &Looks) -> Outcome {
        apply(&self.tools, &self.surplus(request, looks), OnError::GoOn)
    }
}

fn say_what_stands(wanted: &State, steps: &[Step]) {
    for step in plan(&State::default(), wanted) {
        if !steps.contains(&step) {
            let changes = step.changes().into_iter();
            changes.for_each(|(_, command)| debug!("already there: {command}"));
        }
    }
}

/// The connections that are tracked.
fn tracked(tools: &Tools) -> Result<Vec<Flow>> {
    // The kernel's own count saves a process where there is none (nf_conntrack-sysctl.rst).
    let count =
        fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count").unwrap_or_default();
    if count.trim() == "0" {
        return Ok(Vec::new());
    }
    let Some(listing) = tools.conntrack_list()? else {
        info!(
            "conntrack is not installed: connections from before this change keep their ways (apt-get install conntrack)"
        );
        return Ok(Vec::new());
    };
    Ok(conntrack::parse(&listing))
}

/// Ends the connections that contradict the change, and says how many.
fn end_stale(
    tools: &Tools,
    config: Option<&Config>,
    looks: &Looks,
    before: &State,
    wanted: &State,
) -> Result<usize> {
    let flows = tracked(tools)?;
    let stale = stale(config, looks, before, wanted, &flows);
    end(tools, &conntrack::deletions(&flows, &stale))?;
    Ok(stale.len())
}

fn stale<'a>(
    config: Option<&Config>,
    looks: &Looks,
    observed: &State,
    wanted: &State,
    flows: &'a [Flow],
) -> Vec<&'a Flow> {
    config
        .map(|config| stale::stale(config, looks, observed, wanted, flows))
        .unwrap_or_default()
}

/// Deletes connections, so that their next packets are judged anew.
fn end(tools: &Tools, deletions: &[String]) -> Result<()> {
    if deletions.is_empty() {
        return Ok(());
    }
    tools.conntrack_delete(
        &deletions
            .iter()
            .map(|line| format!("{line}\n"))
            .collect::<String>(),
    )?;
    deletions.iter().for_each(|line| info!("conntrack {line}"));
    Ok(())
}

fn print(steps: &[(&Tools, Vec<Step>)], deletions: &[String]) -> Result<()> {
    let mut text = String::new();
    for (tools, steps) in steps {
        let commands = steps.iter().flat_map(Step::commands);
        text.extend(commands.map(|(_, command)| format!("{}\n", command.by(tools.iptables))));
    }
    text.extend(deletions.iter().map(|line| format!("conntrack {line}\n")));
    if text.is_empty() {
        text.push_str("# nothing to change\n");
    }
    stdout()
        .write_all(text.as_bytes())
        .context("print the plan")
}

/// All errors as one.
fn all(errors: &[Error], last: Option<Error>) -> Error {
    let errors = errors.iter().chain(&last);
    let texts: Vec<String> = errors.map(|error| format!("{error:#}")).collect();
    anyhow!(texts.join("; "))
}

/// `isp0 up on ppp0 203.0.113.10, isp1 down`
fn describe(request: &Request, looks: &Looks) -> String {
    let each = looks
        .iter()
        .map(|(name, link)| match (link, request.interface()) {
            (
                Some(Addressed {
                    interface,
                    address,
                    running,
                    ..
                }),
                _,
            ) => {
                let way = if *running == claim::Running::Yes {
                    "up"
                } else {
                    "about to be up"
                };
                format!("{name} {way} on {interface} {address}")
            }
            (None, Some(interface)) => format!("{name} down on {interface}"),
            (None, None) => format!("{name} down"),
        });
    let text = each.collect::<Vec<_>>().join(", ");
    if text.is_empty() {
        "orphans".into()
    } else {
        text
    }
}

/// `isp0 up on ppp0 203.0.113.10: 9 added, 0 removed, 6 ms`
fn summary(request: &Request, looks: &Looks, outcome: &Outcome, started: Instant) {
    let Outcome { added, removed, .. } = outcome;
    let text = format!(
        "{}: {added} added, {removed} removed, {} ms",
        describe(request, looks),
        started.elapsed().as_millis()
    );
    let quiet = looks.is_empty() && added + removed == 0;
    let level = if quiet { Level::Debug } else { Level::Info };
    log::log!(level, "{text}");
}
