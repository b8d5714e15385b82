//! Turns the wheel: look at the link, observe, plan, apply, and look again, until the kernel holds
//! what it should. A call is only a trigger; under the lock the kernel is the truth.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Write, stdout};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use log::{Level, debug, info, log_enabled, warn};
use nix::unistd::geteuid;

use crate::apply::{Outcome, apply};
use crate::command::{Backend, OnError, Tools};
use crate::config::{Config, Uplink};
use crate::desired::{Up, desired};
use crate::event::Event;
use crate::link::{self, Link};
use crate::lock::Lock;
use crate::observed::{self, observe};
use crate::plan::{Step, plan};
use crate::state::{IfName, State, TableId, UplinkName, check_local};

/// How long one call may take: pppd waits for its hooks' end before it runs them again.
const LIMIT: Duration = Duration::from_secs(28);

/// How long of that a call waits for the others' end.
const LOCK_LIMIT: Duration = Duration::from_secs(16);

/// How often a changing kernel is followed before we give up.
const ROUNDS: usize = 6;

/// What is asked.
#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    /// By hand: this interface is up.
    Up {
        /// The interface.
        interface: IfName,
        /// Its address, where it is not to be asked of the kernel.
        local: Option<Ipv4Addr>,
    },
    /// By hand: down means down, whatever the link does.
    Down {
        /// The interface.
        interface: IfName,
    },
    /// By pppd: look at this interface.
    Event(Event),
    /// Look at all interfaces.
    Sync,
}

impl Request {
    fn interface(&self) -> Option<&IfName> {
        match self {
            Self::Up { interface, .. }
            | Self::Down { interface }
            | Self::Event(Event { interface, .. }) => Some(interface),
            Self::Sync => None,
        }
    }
}

/// Whether the plan is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It is.
    Apply,
    /// It is printed as commands, and nothing changes.
    DryRun,
}

/// The uplinks in question, each with the address that its entries should be for; none where it
/// should have no entries.
type Looks = BTreeMap<UplinkName, Option<Ipv4Addr>>;

/// Brings the kernel to what the request asks for. Without a configuration, because it does not
/// hold, entries can only be removed.
///
/// # Errors
/// The kernel could not be brought there, and why.
pub fn converge(request: &Request, config: Option<&Config>, mode: Mode) -> Result<()> {
    let started = Instant::now();
    if let Some((interface, config)) = request.interface().zip(config)
        && config.bound_to(interface).is_none()
    {
        debug!("no uplink names {interface}: only orphans are looked for");
        if !geteuid().is_root() {
            return Ok(());
        }
    }
    ensure!(
        geteuid().is_root(),
        "must be root: the kernel's routing and iptables are to be read and changed"
    );
    let tools = Tools::find(started + LIMIT)?;
    let _lock = match mode {
        Mode::Apply => Some(Lock::take(started + LOCK_LIMIT)?),
        Mode::DryRun => None,
    };
    // A file tells whether legacy has anything; asking nft would cost each call a process.
    if *request == Request::Sync || tools.backend == Backend::Nft && observed::legacy_tables() {
        warn_of_elsewhere(&tools);
    }
    let mut total = Outcome::default();
    let mut failed: Option<Vec<Step>> = None;
    for _ in 0..ROUNDS {
        let observed = observe(&tools)?;
        let looks = look(request, config, &observed)?;
        let wanted = wanted(request, config, &observed, &looks)?;
        let steps = plan(&observed, &wanted);
        if log_enabled!(Level::Debug) {
            let standing = plan(&State::default(), &wanted)
                .into_iter()
                .filter(|step| !steps.contains(step));
            standing
                .flat_map(|step| step.changes())
                .for_each(|(_, command)| debug!("already there: {command}"));
        }
        if mode == Mode::DryRun {
            return print(&steps);
        }
        // The same steps once more would fail once more.
        if failed.as_ref() == Some(&steps) {
            return Err(all(total.errors)).with_context(|| describe(config, &looks));
        }
        let on_error = if looks.values().any(Option::is_some) {
            OnError::Stop
        } else {
            OnError::GoOn
        };
        let Outcome {
            added,
            removed,
            errors,
        } = apply(&tools, &steps, on_error);
        total.added += added;
        total.removed += removed;
        let done = errors.is_empty();
        if !done {
            errors
                .iter()
                .for_each(|error| debug!("{error:#}; looking again"));
            total.errors = errors;
            failed = Some(steps);
        } else if look(request, config, &observed)? == looks {
            summary(config, &looks, &total, started);
            return Ok(());
        }
    }
    if total.errors.is_empty() {
        bail!(
            "the links and the kernel's entries keep changing: run mh-hook sync when they are quiet"
        );
    }
    Err(all(total.errors))
}

/// Says it when entries of ours stand in the other backend of iptables. That is no failure of this call.
fn warn_of_elsewhere(tools: &Tools) {
    match observed::elsewhere(tools) {
        Ok(uplinks) => uplinks.iter().for_each(|uplink| {
            warn!(
                "entries of {uplink} stand in the other backend of iptables too (iptables-legacy or iptables-nft): \
                 delete those in and to the chains {}",
                uplink.chain()
            );
        }),
        Err(error) => debug!("the other backend of iptables: {error:#}"),
    }
}

/// Which uplinks are in question, and how each one's link is now.
fn look(request: &Request, config: Option<&Config>, observed: &State) -> Result<Looks> {
    let Some(interface) = request.interface() else {
        let uplinks = config.iter().flat_map(|config| &config.uplinks);
        return uplinks
            .map(|(name, uplink)| {
                Ok((
                    name.clone(),
                    kernel_address(uplink, name, None, config, observed)?,
                ))
            })
            .collect();
    };
    // Uplinks whose entries name the interface, though the configuration no longer does, are looked at too.
    let mut names = observed::bound_to(interface, observed);
    let Some(config) = config else {
        return Ok(names.into_iter().map(|name| (name, None)).collect());
    };
    names.extend(config.bound_to(interface).cloned());
    let mut looks = Looks::new();
    for (name, uplink) in names
        .iter()
        .filter_map(|name| config.uplinks.get_key_value(name))
    {
        let address = match request {
            Request::Up {
                local: Some(local), ..
            } if uplink.interface == *interface => {
                exists(interface, name)?;
                if !Link::read(interface)?.is_some_and(|link| link.addresses.contains(local)) {
                    warn!("{name}: {interface} does not have the address {local}");
                }
                Some(*local)
            }
            Request::Up { local: None, .. } if uplink.interface == *interface => {
                exists(interface, name)?;
                let address = kernel_address(uplink, name, None, Some(config), observed)?;
                Some(address.with_context(|| {
                    format!("{name}: {interface} has no IPv4 address: is pppd done? see ip addr show {interface}, or give --local ADDR")
                })?)
            }
            Request::Down { .. } => None,
            Request::Event(Event { local, .. }) => {
                kernel_address(uplink, name, *local, Some(config), observed)?
            }
            Request::Up { .. } | Request::Sync => {
                kernel_address(uplink, name, None, Some(config), observed)?
            }
        };
        looks.insert(name.clone(), address);
    }
    Ok(looks)
}

/// Fails unless the interface is there and up.
fn exists(interface: &IfName, name: &UplinkName) -> Result<()> {
    let link = Link::read(interface)?.with_context(|| {
        format!("{name}: there is no interface {interface}: dial it first, see ip link")
    })?;
    ensure!(
        link.up,
        "{name}: {interface} is down: dial it first, or ip link set {interface} up"
    );
    Ok(())
}

/// The address of an uplink's link, if it is up; where there are several, first `local`, then the
/// one that entries stand for.
fn kernel_address(
    uplink: &Uplink,
    name: &UplinkName,
    local: Option<Ipv4Addr>,
    config: Option<&Config>,
    observed: &State,
) -> Result<Option<Ipv4Addr>> {
    let tables: BTreeSet<TableId> = uplink.routing.iter().map(|routing| routing.table).collect();
    let preferred = local
        .into_iter()
        .chain(observed::sources(observed, &tables));
    let address = Link::read(&uplink.interface)?.and_then(|link| link.address(preferred));
    if let (Some(address), Some(config)) = (address, config) {
        check_local(address, &config.lan.networks)
            .with_context(|| format!("{name} on {}", uplink.interface))?;
    }
    Ok(address)
}

/// All of ours that should stand: that of the uplinks in question anew, that of other configured
/// uplinks as it is. What no configured uplink claims is an orphan, and left out.
fn wanted(
    request: &Request,
    config: Option<&Config>,
    observed: &State,
    looks: &Looks,
) -> Result<State> {
    let tables = observed::tables(config, observed);
    let share = |names: &BTreeSet<UplinkName>, more: BTreeSet<TableId>| {
        let theirs = tables
            .iter()
            .filter(|(_, name)| names.contains(name))
            .map(|(table, _)| *table);
        observed.share(names, &theirs.chain(more).collect())
    };
    let Some(config) = config else {
        let Some(interface) = request.interface() else {
            return Ok(observed.clone());
        };
        let is_up = Link::read(interface)?.is_some_and(|link| link.address([]).is_some());
        if matches!(request, Request::Event(_)) && is_up {
            return Ok(observed.clone());
        }
        let unclaimed =
            observed::tables_by(interface, observed).filter(|table| !tables.contains_key(table));
        return Ok(observed.without(&share(
            &looks.keys().cloned().collect(),
            unclaimed.collect(),
        )));
    };
    let others = config
        .uplinks
        .keys()
        .filter(|name| !looks.contains_key(name))
        .cloned()
        .collect();
    let mut wanted = share(&others, BTreeSet::new());
    for (name, address) in looks {
        let (Some(uplink), Some(address)) = (config.uplinks.get(name), *address) else {
            continue;
        };
        let strict = strict(&uplink.interface, observed)?;
        wanted.merge(desired(
            config,
            &Up {
                name,
                uplink,
                address,
                strict,
            },
        ));
    }
    Ok(wanted)
}

/// The interface's own `rp_filter` where filtering is strict (the larger value of the interface
/// and of `all` counts), or was until we loosened it.
fn strict(interface: &IfName, observed: &State) -> Result<Option<u8>> {
    let Some(own) = link::rp_filter(interface.as_str())? else {
        return Ok(None);
    };
    let all = link::rp_filter("all")?.unwrap_or(0);
    let loosened = observed
        .loose
        .iter()
        .find(|loose| loose.interface == *interface);
    Ok(if own.max(all) == 1 {
        Some(own)
    } else {
        loosened.map(|loose| loose.before)
    })
}

fn print(steps: &[Step]) -> Result<()> {
    let mut out = stdout().lock();
    let mut text: String = steps
        .iter()
        .flat_map(Step::commands)
        .map(|command| format!("{command}\n"))
        .collect();
    if text.is_empty() {
        text.push_str("# nothing to change\n");
    }
    out.write_all(text.as_bytes()).context("print the plan")
}

/// All errors as one.
fn all(errors: Vec<Error>) -> Error {
    anyhow!(
        errors
            .iter()
            .map(|error| format!("{error:#}"))
            .collect::<Vec<_>>()
            .join("; ")
    )
}

/// `isp0 up on ppp0 203.0.113.10, isp1 down on ppp1`
fn describe(config: Option<&Config>, looks: &Looks) -> String {
    let each = looks.iter().map(|(name, address)| {
        let way = address.map_or("down".into(), |_| "up".to_owned());
        let on = config
            .and_then(|config| config.uplinks.get(name))
            .map(|uplink| format!(" on {}", uplink.interface));
        let address = address
            .map(|address| format!(" {address}"))
            .unwrap_or_default();
        format!("{name} {way}{}{address}", on.unwrap_or_default())
    });
    let text = each.collect::<Vec<_>>().join(", ");
    if text.is_empty() {
        "orphans".into()
    } else {
        text
    }
}

/// `isp0 up on ppp0 203.0.113.10: 9 added, 0 removed, 6 ms`
fn summary(
    config: Option<&Config>,
    looks: &Looks,
    Outcome { added, removed, .. }: &Outcome,
    started: Instant,
) {
    let text = format!(
        "{}: {added} added, {removed} removed, {} ms",
        describe(config, looks),
        started.elapsed().as_millis()
    );
    if looks.is_empty() && added + removed == 0 {
        debug!("{text}")
    } else {
        info!("{text}")
    }
}
