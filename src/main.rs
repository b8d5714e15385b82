//! Arguments, logger, exit status. Decides nothing.

use std::env;
use std::ffi::OsString;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Error, Result, bail};
use lexopt::Arg;
use log::{LevelFilter, error};

use mh_hook::command::start_self;
use mh_hook::config::{self, Config};
use mh_hook::converge::{Mode, converge};
use mh_hook::event::{self, Direction, Event};
use mh_hook::link::Link;
use mh_hook::request::Request;
use mh_hook::state::{IfName, UplinkName, check_local};

const HELP: &str = "\
mh-hook: multi-homing for a router with several PPPoE links

Usage: mh-hook [OPTIONS] COMMAND

Commands:
  up [IFNAME]            bring the interface's uplink to its desired state
  down [IFNAME]          remove that uplink's entries, and nothing else
  sync                   bring every uplink to what its link's state asks for
  event pre-up|up|down ARGS...
                         what pppd's hooks call, with all of pppd's arguments

IFNAME is taken from the environment where it is not given, the address of the
link from --local, else from IPLOCAL in the environment, else from the kernel.
A program of any name in ip-pre-up.d, ip-up.d or ip-down.d that is mh-hook, or a
link to it, does the same as event.

Options:
      --config FILE  the configuration [default: /etc/mh-hook.toml]
      --dry-run      print the plan as commands to be pasted, change nothing
      --local ADDR   the link's address, with up
      --uplink NAME  whose link it is, with up, where nothing else tells
  -v, --verbose      say what was looked at, too
  -q, --quiet        say errors only
  -h, --help         print this
  -V, --version      print the version

Exit status: 0 done, nothing to do, or not one of our interfaces; 1 the kernel
could not be brought to the desired state; 2 usage or configuration.
";

/// What the command line asks for.
struct Arguments {
    command: Command,
    config_path: PathBuf,
    mode: Mode,
    level: LevelFilter,
}

enum Command {
    Up {
        interface: Option<OsString>,
        uplink: Option<OsString>,
        local: Option<OsString>,
    },
    Down {
        interface: Option<OsString>,
    },
    Event {
        direction: Direction,
        args: Vec<OsString>,
    },
    Sync,
    Print(String),
}

/// Which exit status an error asks for.
enum Failure {
    /// 1.
    Kernel(Error),
    /// 2.
    Usage(Error),
}

fn main() -> ExitCode {
    let arguments = match parse(env::args_os()) {
        Ok(arguments) => arguments,
        Err(error) => {
            mh_hook::log::init(LevelFilter::Info, false);
            error!("{error:#}; see mh-hook --help");
            return ExitCode::from(2);
        }
    };
    if let Command::Print(text) = &arguments.command {
        print!("{text}");
        return ExitCode::SUCCESS;
    }
    mh_hook::log::init(arguments.level, arguments.level > LevelFilter::Info);
    let (error, status) = match run(arguments) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Kernel(error)) => (error, 1),
        Err(Failure::Usage(error)) => (error, 2),
    };
    report(&error);
    ExitCode::from(status)
}

/// Each problem of a configuration is a line of its own.
fn report(error: &Error) {
    match error.downcast_ref::<config::Errors>() {
        Some(errors) => errors.lines().for_each(|line| error!("{line}")),
        None => error!("{error:#}"),
    }
}

fn run(arguments: Arguments) -> Result<(), Failure> {
    let follow = follow(&arguments);
    let request = request(arguments.command).map_err(Failure::Usage)?;
    let config = match Config::load(&arguments.config_path) {
        Ok(config) => Some(config),
        Err(error) if request.removes() => {
            report(&error);
            log::warn!(
                "the configuration does not hold: only removing what the kernel's own entries tell"
            );
            None
        }
        Err(error) => return Err(Failure::Usage(error)),
    };
    if let (Some(local), Some(config)) = (request.local(), &config) {
        check_local(local, &config.lan.networks).map_err(Failure::Usage)?;
    }
    let mut is_ours = false;
    if let Some(config) = &config {
        is_ours = !request.named(config).map_err(Failure::Usage)?.is_empty();
    }
    if let Request::Event(Event {
        direction: Direction::Follow,
        interface,
        ..
    }) = &request
    {
        Link::wait(interface).map_err(Failure::Kernel)?;
    }
    let converged = converge(&request, config.as_ref(), arguments.mode);
    if is_ours && let Some(args) = follow {
        start_self(&args).map_err(Failure::Kernel)?;
    }
    converged.map_err(Failure::Kernel)
}

/// The arguments for the call that follows this one, if it is pppd's `ip-pre-up`.
fn follow(arguments: &Arguments) -> Option<Vec<OsString>> {
    let Command::Event {
        direction: Direction::PreUp,
        args,
    } = &arguments.command
    else {
        return None;
    };
    let config_path = arguments.config_path.clone().into_os_string();
    let first = [
        "--config".into(),
        config_path,
        "event".into(),
        Direction::Follow.to_string().into(),
    ];
    let all = first.into_iter().chain(args.iter().cloned());
    (arguments.mode == Mode::Apply).then(|| all.collect())
}

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
            let local: Option<Ipv4Addr> = match local {
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
        Command::Sync | Command::Print(_) => Request::Sync,
    })
}

fn parse(args: impl Iterator<Item = OsString>) -> Result<Arguments> {
    let mut args = args.peekable();
    let mut arguments = Arguments {
        command: Command::Sync,
        config_path: config::DEFAULT_PATH.into(),
        mode: Mode::Apply,
        level: LevelFilter::Info,
    };
    let program = args.peek().map(PathBuf::from).unwrap_or_default();
    if let Some(direction) = Direction::from_folder(&program) {
        // Whatever pppd's arguments look like, they are not options.
        arguments.command = Command::Event {
            direction,
            args: args.skip(1).collect(),
        };
        return Ok(arguments);
    }
    let mut parser = lexopt::Parser::from_iter(args);
    let mut words: Vec<OsString> = Vec::new();
    let (mut local, mut uplink) = (None, None);
    while let Some(arg) = parser.next()? {
        match arg {
            Arg::Long("config") => arguments.config_path = parser.value()?.into(),
            Arg::Long("dry-run") => arguments.mode = Mode::DryRun,
            Arg::Long("local") => local = Some(parser.value()?),
            Arg::Long("uplink") => uplink = Some(parser.value()?),
            Arg::Short('v') | Arg::Long("verbose") => arguments.level = LevelFilter::Debug,
            Arg::Short('q') | Arg::Long("quiet") => arguments.level = LevelFilter::Error,
            Arg::Short('h') | Arg::Long("help") => {
                arguments.command = Command::Print(HELP.into());
                return Ok(arguments);
            }
            Arg::Short('V') | Arg::Long("version") => {
                arguments.command =
                    Command::Print(format!("mh-hook {}\n", env!("CARGO_PKG_VERSION")));
                return Ok(arguments);
            }
            Arg::Value(word) => {
                words.push(word);
                if words.len() == 2 && words[0] == "event" {
                    words.extend(parser.raw_args()?);
                }
            }
            Arg::Short(_) | Arg::Long(_) => return Err(arg.unexpected().into()),
        }
    }
    let mut words = words.into_iter();
    let command = words.next().context("no command")?;
    arguments.command = match command.to_str() {
        Some("up") => Command::Up {
            interface: words.next(),
            uplink: uplink.take(),
            local: local.take(),
        },
        Some("down") => Command::Down {
            interface: words.next(),
        },
        Some("sync") => Command::Sync,
        Some("event") => {
            let direction = words.next().context("event what? pre-up, up or down")?;
            let direction = Direction::parse(&direction)
                .with_context(|| format!("event {direction:?}: it is pre-up, up or down"))?;
            Command::Event {
                direction,
                args: words.by_ref().collect(),
            }
        }
        _ => bail!("unknown command {command:?}"),
    };
    if let Some(word) = words.next() {
        bail!("unexpected argument {word:?}");
    }
    if local.is_some() || uplink.is_some() {
        bail!("--local and --uplink go with up");
    }
    Ok(arguments)
}
