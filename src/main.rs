//! Dispatches the command and chooses the exit status.

mod cli;

use std::env;
use std::ffi::{OsStr, OsString};
use std::path::{self, Path};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Error, Result, anyhow, ensure};
use log::{LevelFilter, error, warn};
use nix::sys::stat::{Mode as FileMode, umask};
use nix::unistd::geteuid;
use signal_hook::consts::SIGCHLD;

use mh_hook::config::{self, Config, Source};
use mh_hook::inspect::check::check;
use mh_hook::inspect::explain::{Question, explain};
use mh_hook::inspect::report::{Detail, Form, print};
use mh_hook::inspect::snapshot::Snapshot;
use mh_hook::inspect::status::status;
use mh_hook::kernel::link::Link;
use mh_hook::kernel::tools::start_self;
use mh_hook::model::link::check_local;
use mh_hook::model::names::{IfName, UplinkName};
use mh_hook::reconcile::event::{self, Direction, Event};
use mh_hook::reconcile::request::{Refused, Request};
use mh_hook::reconcile::{Mode, Session, reconcile};
use mh_hook::runtime::{lock, log as logger, output};

use crate::cli::{Arguments, Command, Inspect};

/// An error and the exit status that it asks for.
enum Failure {
    Kernel(Error),
    Usage(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error.is::<Refused>() {
            true => Self::Usage(error),
            false => Self::Kernel(error),
        }
    }
}

/// musl's own allocator gives memory back to the kernel at once, and asks for it again: measured at 10,000 forwards, a call
/// with nothing to do takes a third longer with it (tests/bench).
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() -> ExitCode {
    // A caller may have chosen otherwise: the lock is nobody else's, and how tools end is to be heard. A handler takes the
    // place of SIG_IGN, with which wait(2) fails.
    umask(FileMode::from_bits_truncate(0o077));
    let _ = signal_hook::flag::register(SIGCHLD, Arc::default());
    let arguments = match Arguments::parse(env::args_os()) {
        Ok(arguments) => arguments,
        Err(error) => {
            let text = format!("{error:#}; see mh-hook --help");
            // Nobody reads what a hook prints; a person's typing error is nobody else's business.
            if env::args_os().any(|word| word == "event") {
                logger::init(LevelFilter::Info, false);
                error!("{text}");
            } else {
                output::complain(&text);
            }
            return ExitCode::from(2);
        }
    };
    if let Command::Print(text) = &arguments.command {
        return match output::print(text) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::from(1),
        };
    }
    logger::init(arguments.level, arguments.level > LevelFilter::Info);
    let result = match arguments.command {
        Command::Inspect(command, form) => {
            let detail = match arguments.level > LevelFilter::Info {
                true => Detail::Full,
                false => Detail::Brief,
            };
            inspect(command, form, detail, &arguments.config_path)
        }
        _ => change(arguments).map(|()| true),
    };
    let (error, status) = match result {
        Ok(true) => return ExitCode::SUCCESS,
        Ok(false) => return ExitCode::from(1),
        Err(Failure::Kernel(error)) => (error, 1),
        Err(Failure::Usage(error)) => (error, 2),
    };
    report(&error);
    ExitCode::from(status)
}

/// Of how many problems of a configuration the line is shown: a terminal has no more room.
const MAX_SNIPPETS: usize = 20;

/// Logs the error; each problem of a configuration on a line of its own.
fn report(error: &Error) {
    match error.downcast_ref::<config::Errors>() {
        Some(errors) => {
            for (number, (line, snippet)) in errors.lines().enumerate() {
                error!("{line}");
                if number < MAX_SNIPPETS {
                    output::show(snippet);
                }
            }
        }
        None => error!("{error:#}"),
    }
}

/// Prints what `status`, `check` or `explain` finds. False if it is an error.
fn inspect(
    command: Inspect,
    form: Form,
    detail: Detail,
    config_path: &Path,
) -> Result<bool, Failure> {
    let config = Config::load(config_path);
    let is_good = match command {
        // It reports a broken configuration among its findings.
        Inspect::Check(tolerated) => {
            let found = check(&Snapshot::read()?, config.as_ref(), tolerated)?;
            print(&found, form, detail)?
        }
        Inspect::Status(name) => {
            let config = config.map_err(Failure::Usage)?;
            let name = name.map(|name| uplink(&config, &name)).transpose();
            let name = name.map_err(Failure::Usage)?;
            print(
                &status(&Snapshot::read()?, &config, name.as_ref())?,
                form,
                detail,
            )?
        }
        Inspect::Explain {
            words,
            to,
            from_lan,
        } => {
            let config = config.map_err(Failure::Usage)?;
            let question = Question::parse(&config, &words, to, from_lan);
            let question = question.map_err(Failure::Usage)?;
            print(
                &explain(&Snapshot::read()?, &config, &question)?,
                form,
                detail,
            )?
        }
    };
    Ok(is_good)
}

/// The configured uplink of this name.
fn uplink(config: &Config, name: &OsStr) -> Result<UplinkName> {
    let name = UplinkName::parse(&name.to_string_lossy())?;
    ensure!(
        config.uplinks.contains_key(&name),
        "there is no [uplink.{name}]"
    );
    Ok(name)
}

/// Carries out a command that may change the kernel.
fn change(arguments: Arguments) -> Result<(), Failure> {
    // What is started in the background begins in another folder.
    let config_path = path::absolute(&arguments.config_path);
    let config_path = config_path.unwrap_or_else(|_| arguments.config_path.clone());
    let follow_args = follow_args(&arguments, &config_path);
    let request = request(arguments.command).map_err(Failure::Usage)?;
    if let Request::Event(Event {
        direction: Direction::Follow,
        interface,
        ..
    }) = &request
    {
        Link::wait(interface)?;
    }
    // An address that no link can have is refused before any tool runs.
    if let Some(local) = request.local() {
        check_local(local, &[]).map_err(Failure::Usage)?;
    }
    // The configuration is read under the lock, so that the last call to run has read the newest one.
    let mut session = geteuid().is_root().then(|| Session::begin(arguments.mode));
    let source = Source::read(&arguments.config_path);
    // Nothing is run for a file that is refused.
    if let Some(Ok(session)) = session.as_mut().filter(|_| source.is_ok()) {
        session.begin_to_read()?;
    }
    let config = configuration(source, &request);
    if let (Err(Failure::Usage(_)), Some(interface)) = (&config, request.interface()) {
        error!(
            "{request}: NOTHING is changed for {interface}, since the configuration can't be used:"
        );
    }
    let config = config?;
    let request = match &config {
        Some(config) => request.by_interface(config),
        None => request,
    };
    let mut is_ours = true;
    if let Some(config) = &config {
        is_ours = !request.named(config).map_err(Failure::Usage)?.is_empty();
    }
    let Some(session) = session else {
        if !is_ours {
            return Ok(());
        }
        return Err(
            anyhow!("must be root to read and change the kernel's routing and iptables").into(),
        );
    };
    let has_lock = session.is_ok() && arguments.mode == Mode::Apply;
    if has_lock && request == Request::Sync {
        lock::take_word();
    }
    let reconciled = session
        .with_context(|| request.to_string())
        .and_then(|session| reconcile(&request, config.as_ref(), arguments.mode, session));
    if let Some(args) = follow_args.filter(|_| is_ours && config.is_some()) {
        start_self(&args)?;
    }
    // Who had the lock sees to what others could not do meanwhile.
    if has_lock && request != Request::Sync && lock::is_word_left() {
        let args = ["--config".into(), config_path.into(), "sync".into()];
        start_self(&args)?;
    }
    Ok(reconciled?)
}

/// The configuration. None if it is broken and the request only removes entries.
fn configuration(source: Result<Source>, request: &Request) -> Result<Option<Config>, Failure> {
    match source.and_then(|source| source.parse()) {
        Ok(config) => Ok(Some(config)),
        Err(error) if request.removes() => {
            report(&error);
            warn!(
                "the configuration has errors: only removing the entries that the kernel shows to be this link's"
            );
            Ok(None)
        }
        Err(error) => Err(Failure::Usage(error)),
    }
}

/// The arguments of the background call that `ip-pre-up` starts and that waits for the link. None for any other call.
/// pppd runs `ip-pre-up` each time, but skips `ip-up` while an earlier one still runs ([`Direction::Follow`]).
fn follow_args(arguments: &Arguments, config_path: &Path) -> Option<Vec<OsString>> {
    let Command::Event {
        direction: Direction::PreUp,
        args,
    } = &arguments.command
    else {
        return None;
    };
    let config_path = config_path.as_os_str().to_owned();
    let event = Direction::Follow.to_string().into();
    let first = ["--config".into(), config_path, "event".into(), event];
    let all = first.into_iter().chain(args.iter().cloned());
    (arguments.mode == Mode::Apply).then(|| all.collect())
}

/// The request that a command is, completed from the environment.
fn request(command: Command) -> Result<Request> {
    let interface = |name: Option<OsString>| match name {
        Some(name) => IfName::parse(&name.to_string_lossy()),
        None => event::interface_from_environment(),
    };
    Ok(match command {
        Command::Up {
            interface: name,
            uplink,
            local,
        } => {
            let local = match local {
                Some(text) => Some(event::address(&text).context("--local")?),
                None => event::local_from_environment()?,
            };
            let uplink = uplink.map(|name| UplinkName::parse(&name.to_string_lossy()));
            Request::Up {
                interface: interface(name)?,
                uplink: uplink.transpose()?,
                local,
            }
        }
        Command::Down { interface: name } => Request::Down {
            interface: interface(name)?,
        },
        Command::Event { direction, args } => Request::Event(Event::from_pppd(direction, &args)?),
        Command::Sync | Command::Inspect(..) | Command::Print(_) => Request::Sync,
    })
}
