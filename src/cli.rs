//! The command line: arguments and help. Reads no environment and no file.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use lexopt::Arg;
use log::LevelFilter;

use mh_hook::config;
use mh_hook::inspect::check::Severity;
use mh_hook::inspect::report::Form;
use mh_hook::model::nearest::nearest;
use mh_hook::reconcile::Mode;
use mh_hook::reconcile::event::Direction;

const HELP: &str = "\
mh-hook: multi-homing for a router with several PPPoE links

Usage: mh-hook [OPTIONS] COMMAND

Commands:
  up [IFNAME|UPLINK]     bring the interface's uplink to its desired state
  down [IFNAME|UPLINK]   remove that uplink's entries, and nothing else
  sync                   bring every uplink to what its link's state asks for
  event pre-up|up|down ARGS...
                         what pppd's hooks call, with all of pppd's arguments
  status [NAME]          each uplink: its link, installed and missing entries,
                         connections and traffic
  check                  what would keep this from working, and how to fix it
  explain CLIENT [PROTO/PORT]
                         where a request of this address goes, and its reply
  help [COMMAND]         this, or the help of a command

Without IFNAME, the interface is IFNAME of the environment. The address of the
link is that of --local, else IPLOCAL of the environment, else the kernel's.
When the program, or a link to it, is in ip-pre-up.d, ip-up.d or ip-down.d, it
does the same as event, whatever its name is there.

Options:
      --config FILE  the configuration [default: /etc/mh-hook.toml]
      --dry-run      print the plan as commands to paste, change nothing
      --local ADDR   with up: the link's address
      --uplink NAME  with up: the uplink, if nothing else tells which one it is
      --json         with status, check and explain: print JSON
      --prometheus   with status: print metrics for Prometheus
      --strict       with check: exit status 1 for a warning, too
      --to WHERE     with explain: the uplink or address that the client asks
      --from-lan HOST
                     with explain: trace this LAN host's own connection to the
                     destination that is given in CLIENT's place
  -v, --verbose      also log what was already there; with status, check and
                     explain: each entry and rule in full
  -q, --quiet        log errors only
  -h, --help         print this
  -V, --version      print the version

Exit status: 0 done, nothing to do, or not one of our interfaces; 1 the kernel
could not be brought to the desired state, or status, check or explain found
an error; 2 usage or configuration.
";

/// The help of each command.
const COMMANDS: [(&str, &str); 8] = [
    (
        "up",
        "\
Usage: mh-hook [OPTIONS] up [IFNAME|UPLINK]

Brings the uplink of this interface to its desired state: its routing table,
rules, marks and forwards. What is there already is left alone.

  --local ADDR   the link's address, if it has several
  --uplink NAME  the uplink, if nothing else tells which one it is
  --dry-run      print the commands, change nothing

  mh-hook up ppp0
",
    ),
    (
        "down",
        "\
Usage: mh-hook [OPTIONS] down [IFNAME|UPLINK]

Removes the entries of this interface's uplink, and nothing else.

  --dry-run      print the commands, change nothing

  mh-hook down isp0
",
    ),
    (
        "sync",
        "\
Usage: mh-hook [OPTIONS] sync

Brings every uplink to what its link's state asks for, and removes entries of
uplinks that are configured no longer. One uplink in trouble does not keep the
others from it: then the exit status is 1.

  --dry-run      print the commands, change nothing
",
    ),
    (
        "event",
        "\
Usage: mh-hook [OPTIONS] event pre-up|up|down ARGS...

What pppd's hooks call, with all arguments that pppd gives them. An interface
that no uplink names is none of our business: exit status 0.

  mh-hook event up \"$@\"
",
    ),
    (
        "status",
        "\
Usage: mh-hook [OPTIONS] status [UPLINK]

Each uplink: its state, link and address, how many connections it has, and what
its forwards have served. Exit status 1: entries are missing or extra.

  -v             the commands for what is missing and extra
  --json         for programs
  --prometheus   metrics, for node_exporter's textfile collector
",
    ),
    (
        "check",
        "\
Usage: mh-hook [OPTIONS] check

The first command when something does not work: what keeps forwards from
working, most important first, each with what fixes it. Exit status 1: errors.

  --strict       exit status 1 for warnings, too
  -v             each entry that is missing or extra
  --json         for programs
",
    ),
    (
        "explain",
        "\
Usage: mh-hook [OPTIONS] explain CLIENT [PROTO/PORT]

The way of one connection through this router, there and back, hop by hop, and
whether it is answered. Exit status 1: it is not.

  --to WHERE     the uplink or address that the client asks
  --from-lan HOST
                 this LAN host's own connection, to CLIENT
  -v             each rule in full
  --json         for programs

  mh-hook explain 192.0.2.9 tcp/80
  mh-hook explain --from-lan 192.168.0.3 192.0.2.9
",
    ),
    ("help", HELP),
];

/// The help of a command; the general one without a command.
/// Errors: there is no such command.
fn help(command: Option<&OsString>) -> Result<&'static str> {
    let Some(command) = command else {
        return Ok(HELP);
    };
    let name = command.to_string_lossy();
    let found = COMMANDS.iter().find(|(it, _)| *it == name);
    found
        .map(|(_, text)| *text)
        .with_context(|| unknown(command))
}

/// `unknown command "stauts": did you mean status?`
fn unknown(command: &OsString) -> String {
    let names = COMMANDS.iter().map(|(name, _)| *name);
    let meant = nearest(&command.to_string_lossy(), names);
    let meant = meant.map(|name| format!(": did you mean {name}?"));
    format!("unknown command {command:?}{}", meant.unwrap_or_default())
}

const OPTIONS: [&str; 13] = [
    "config",
    "dry-run",
    "local",
    "uplink",
    "json",
    "prometheus",
    "strict",
    "to",
    "from-lan",
    "verbose",
    "quiet",
    "help",
    "version",
];

const VERSION: &str = concat!("mh-hook ", env!("CARGO_PKG_VERSION"), "\n");

/// What the command line asks for.
pub struct Arguments {
    pub command: Command,
    pub config_path: PathBuf,
    pub mode: Mode,
    pub level: LevelFilter,
}

pub enum Command {
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
    Inspect(Inspect, Form),
    Print(&'static str),
}

/// The commands that change nothing.
pub enum Inspect {
    Status(Option<OsString>),
    /// The worst severity with which the exit status is 0.
    Check(Severity),
    Explain {
        words: Vec<OsString>,
        to: Option<OsString>,
        from_lan: Option<OsString>,
    },
}

/// The options of single commands. A command takes its own; it is an error if one is left.
#[derive(Default)]
struct Options {
    local: Option<OsString>,
    uplink: Option<OsString>,
    to: Option<OsString>,
    from_lan: Option<OsString>,
    form: Option<Form>,
    tolerated: Option<Severity>,
}

impl Arguments {
    pub fn parse(args: impl Iterator<Item = OsString>) -> Result<Self> {
        let mut args = args.peekable();
        let mut arguments = Self {
            command: Command::Sync,
            config_path: config::DEFAULT_PATH.into(),
            mode: Mode::Apply,
            level: LevelFilter::Info,
        };
        let program = args.peek().map(PathBuf::from).unwrap_or_default();
        if let Some(direction) = Direction::from_folder(&program) {
            // pppd's arguments may look like options, but are none.
            let args = args.skip(1).collect();
            arguments.command = Command::Event { direction, args };
            return Ok(arguments);
        }
        let mut parser = lexopt::Parser::from_iter(args);
        let mut words: Vec<OsString> = Vec::new();
        let mut options = Options::default();
        while let Some(arg) = parser.next()? {
            match arg {
                Arg::Long("config") => arguments.config_path = parser.value()?.into(),
                Arg::Long("dry-run") => arguments.mode = Mode::DryRun,
                Arg::Long("local") => options.local = Some(parser.value()?),
                Arg::Long("uplink") => options.uplink = Some(parser.value()?),
                Arg::Long("to") => options.to = Some(parser.value()?),
                Arg::Long("from-lan") => options.from_lan = Some(parser.value()?),
                Arg::Long("json") => options.form = Some(Form::Json),
                Arg::Long("prometheus") => options.form = Some(Form::Prometheus),
                Arg::Long("strict") => options.tolerated = Some(Severity::Info),
                Arg::Short('v') | Arg::Long("verbose") => arguments.level = LevelFilter::Debug,
                Arg::Short('q') | Arg::Long("quiet") => arguments.level = LevelFilter::Error,
                Arg::Short('h') | Arg::Long("help") => {
                    arguments.command = Command::Print(help(words.first())?);
                    return Ok(arguments);
                }
                Arg::Short('V') | Arg::Long("version") => {
                    arguments.command = Command::Print(VERSION);
                    return Ok(arguments);
                }
                Arg::Value(word) => {
                    words.push(word);
                    if words.len() == 2 && words[0] == "event" {
                        words.extend(parser.raw_args()?);
                    }
                }
                Arg::Long(name) => {
                    let meant = nearest(name, OPTIONS);
                    let meant = meant.map(|meant| format!(": did you mean --{meant}?"));
                    bail!("unknown option --{name}{}", meant.unwrap_or_default());
                }
                Arg::Short(_) => return Err(arg.unexpected().into()),
            }
        }
        arguments.command = Command::parse(words.into_iter(), &mut options)?;
        options.check_none_left()?;
        Ok(arguments)
    }
}

impl Command {
    fn parse(mut words: impl Iterator<Item = OsString>, options: &mut Options) -> Result<Self> {
        let name = words.next().context("no command")?;
        let command = match name.to_str() {
            Some("up") => Self::Up {
                interface: words.next(),
                uplink: options.uplink.take(),
                local: options.local.take(),
            },
            Some("down") => Self::Down {
                interface: words.next(),
            },
            Some("sync") => Self::Sync,
            Some("event") => {
                let direction = words.next().context("event what? pre-up, up or down")?;
                let direction = Direction::parse(&direction)
                    .with_context(|| format!("event {direction:?}: it is pre-up, up or down"))?;
                let args = words.by_ref().collect();
                Self::Event { direction, args }
            }
            Some("status") => Self::Inspect(Inspect::Status(words.next()), options.form()),
            Some("check" | "explain") if options.form == Some(Form::Prometheus) => {
                bail!("--prometheus goes with status")
            }
            Some("check") => {
                let tolerated = options.tolerated.take().unwrap_or(Severity::Warning);
                Self::Inspect(Inspect::Check(tolerated), options.form())
            }
            Some("explain") => {
                let explain = Inspect::Explain {
                    words: words.by_ref().collect(),
                    to: options.to.take(),
                    from_lan: options.from_lan.take(),
                };
                Self::Inspect(explain, options.form())
            }
            Some("help") => Self::Print(help(words.next().as_ref())?),
            _ => bail!(unknown(&name)),
        };
        match words.next() {
            Some(word) => bail!("unexpected argument {word:?}"),
            None => Ok(command),
        }
    }
}

impl Options {
    fn form(&mut self) -> Form {
        self.form.take().unwrap_or(Form::Text)
    }

    fn check_none_left(&self) -> Result<()> {
        ensure!(
            self.local.is_none() && self.uplink.is_none(),
            "--local and --uplink go with up"
        );
        ensure!(
            self.to.is_none() && self.from_lan.is_none(),
            "--to and --from-lan go with explain"
        );
        ensure!(self.tolerated.is_none(), "--strict goes with check");
        ensure!(
            self.form.is_none(),
            "--json goes with status, check and explain, --prometheus with status"
        );
        Ok(())
    }
}
