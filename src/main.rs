//! Arguments, logger, exit status. Decides nothing.

use std::env;
use std::ffi::{OsStr, OsString};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Error, Result, anyhow, bail};
use lexopt::Arg;
use log::{LevelFilter, error};
use nix::unistd::geteuid;

use mh_hook::config::{self, Config};
use mh_hook::inspect::check::check;
use mh_hook::inspect::explain::{Question, explain};
use mh_hook::inspect::report::{Form, print};
use mh_hook::inspect::snapshot::Snapshot;
use mh_hook::inspect::status::status;
use mh_hook::kernel::link::Link;
use mh_hook::kernel::tools::start_self;
use mh_hook::model::link::check_local;
use mh_hook::model::names::{IfName, UplinkName};
use mh_hook::reconcile::event::{self, Direction, Event};
use mh_hook::reconcile::request::Request;
use mh_hook::reconcile::{Mode, Session, reconcile};
use mh_hook::runtime::output;

const HELP: &str = "\
mh-hook: multi-homing for a router with several PPPoE links

Usage: mh-hook [OPTIONS] COMMAND

Commands:
  up [IFNAME]            bring the interface's uplink to its desired state
  down [IFNAME]          remove that uplink's entries, and nothing else
  sync                   bring every uplink to what its link's state asks for
  event pre-up|up|down ARGS...
                         what pppd's hooks call, with all of pppd's arguments
  status [NAME]          each uplink, its link, what stands, what it has seen
  check                  what would keep this from working, and what mends it
  explain CLIENT [PROTO/PORT]
                         where a request of this address goes, and its reply

IFNAME is taken from the environment where it is not given, the address of the
link from --local, else from IPLOCAL in the environment, else from the kernel.
A program of any name in ip-pre-up.d, ip-up.d or ip-down.d that is mh-hook, or a
link to it, does the same as event.

Options:
      --config FILE  the configuration [default: /etc/mh-hook.toml]
      --dry-run      print the plan as commands to be pasted, change nothing
      --local ADDR   the link's address, with up
      --uplink NAME  whose link it is, with up, where nothing else tells
      --json         print JSON, with status, check and explain
      --to WHERE     the uplink or address that is asked, with explain
      --from-lan HOST
                     the journey of this LAN host's own connection, with
                     explain; its destination takes CLIENT's place
  -v, --verbose      say what was looked at, too
  -q, --quiet        say errors only
  -h, --help         print this
  -V, --version      print the version

Exit status: 0 done, nothing to do, or not one of our interfaces; 1 the kernel
could not be brought to the desired state, or status, check or explain found
what is not well; 2 usage or configuration.
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
    Look(Look, Form),
    Print(String),
}

/// What only looks.
enum Look {
    Status(Option<OsString>),
    Check,
    Explain {
        words: Vec<OsString>,
        to: Option<OsString>,
        from_lan: Option<OsString>,
    },
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
            mh_hook::runtime::log::init(LevelFilter::Info, false);
            error!("{error:#}; see mh-hook --help");
            return ExitCode::from(2);
        }
    };
    if let Command::Print(text) = &arguments.command {
        return match output::print(text) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::from(1),
        };
    }
    mh_hook::runtime::log::init(arguments.level, arguments.level > LevelFilter::Info);
    let result = match arguments.command {
        Command::Look(look, form) => look_at(look, form, &arguments.config_path),
        _ => run(arguments).map(|()| true),
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

/// Each problem of a configuration is a line of its own.
fn report(error: &Error) {
    match error.downcast_ref::<config::Errors>() {
        Some(errors) => errors.lines().for_each(|line| error!("{line}")),
        None => error!("{error:#}"),
    }
}

/// Prints what a person asks for, and says whether all is well.
fn look_at(look: Look, form: Form, config_path: &Path) -> Result<bool, Failure> {
    let config = Config::load(config_path);
    let printed = match look {
        Look::Check => Snapshot::read()
            .and_then(|snapshot| check(&snapshot, config.as_ref()))
            .and_then(|check| print(&check, form)),
        Look::Status(name) => {
            let config = config.map_err(Failure::Usage)?;
            let name = name.map(|name| uplink(&config, &name)).transpose();
            let name = name.map_err(Failure::Usage)?;
            Snapshot::read()
                .and_then(|snapshot| status(&snapshot, &config, name.as_ref()))
                .and_then(|status| print(&status, form))
        }
        Look::Explain {
            words,
            to,
            from_lan,
        } => {
            let config = config.map_err(Failure::Usage)?;
            let question = Question::parse(&config, &words, to, from_lan);
            let question = question.map_err(Failure::Usage)?;
            Snapshot::read()
                .and_then(|snapshot| explain(&snapshot, &config, &question))
                .and_then(|explanation| print(&explanation, form))
        }
    };
    printed.map_err(Failure::Kernel)
}

/// A configured uplink by its name.
fn uplink(config: &Config, name: &OsStr) -> Result<UplinkName> {
    let name = UplinkName::parse(&name.to_string_lossy())?;
    let known = config.uplinks.contains_key(&name);
    known
        .then(|| name.clone())
        .with_context(|| format!("there is no [uplink.{name}]"))
}

fn run(arguments: Arguments) -> Result<(), Failure> {
    let follow = follow(&arguments);
    let request = request(arguments.command).map_err(Failure::Usage)?;
    if let Request::Event(Event {
        direction: Direction::Follow,
        interface,
        ..
    }) = &request
    {
        Link::wait(interface).map_err(Failure::Kernel)?;
    }
    // Before anything runs; whether it lies in a LAN is the configuration's to say.
    if let Some(local) = request.local() {
        check_local(local, &[]).map_err(Failure::Usage)?;
    }
    // The configuration is read under the lock: whoever comes last has read it last.
    let session = geteuid().is_root().then(|| Session::begin(arguments.mode));
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
    let mut is_ours = true;
    if let Some(config) = &config {
        if let Some(local) = request.local() {
            check_local(local, &config.lan.networks).map_err(Failure::Usage)?;
        }
        is_ours = !request.named(config).map_err(Failure::Usage)?.is_empty();
    }
    let Some(session) = session else {
        if !is_ours {
            return Ok(());
        }
        let error =
            anyhow!("must be root: the kernel's routing and iptables are to be read and changed");
        return Err(Failure::Kernel(error));
    };
    let reconciled = session
        .with_context(|| request.to_string())
        .and_then(|session| reconcile(&request, config.as_ref(), arguments.mode, &session));
    if let Some(args) = follow.filter(|_| is_ours && config.is_some()) {
        start_self(&args).map_err(Failure::Kernel)?;
    }
    reconciled.map_err(Failure::Kernel)
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
        Command::Sync | Command::Look(..) | Command::Print(_) => Request::Sync,
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
    let (mut local, mut uplink, mut to, mut from_lan) = (None, None, None, None);
    let mut form = None;
    while let Some(arg) = parser.next()? {
        match arg {
            Arg::Long("config") => arguments.config_path = parser.value()?.into(),
            Arg::Long("dry-run") => arguments.mode = Mode::DryRun,
            Arg::Long("local") => local = Some(parser.value()?),
            Arg::Long("uplink") => uplink = Some(parser.value()?),
            Arg::Long("to") => to = Some(parser.value()?),
            Arg::Long("from-lan") => from_lan = Some(parser.value()?),
            Arg::Long("json") => form = Some(Form::Json),
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
        Some("status") => Command::Look(
            Look::Status(words.next()),
            form.take().unwrap_or(Form::Text),
        ),
        Some("check") => Command::Look(Look::Check, form.take().unwrap_or(Form::Text)),
        Some("explain") => {
            let look = Look::Explain {
                words: words.by_ref().collect(),
                to: to.take(),
                from_lan: from_lan.take(),
            };
            Command::Look(look, form.take().unwrap_or(Form::Text))
        }
        _ => bail!("unknown command {command:?}"),
    };
    if let Some(word) = words.next() {
        bail!("unexpected argument {word:?}");
    }
    if local.is_some() || uplink.is_some() {
        bail!("--local and --uplink go with up");
    }
    if to.is_some() || from_lan.is_some() {
        bail!("--to and --from-lan go with explain");
    }
    if form.is_some() {
        bail!("--json goes with status, check and explain");
    }
    Ok(arguments)
}
