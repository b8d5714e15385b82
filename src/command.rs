//! The only place that spawns: absolute paths, a clean environment, a deadline, the exit status.
//! Knows nothing of routing.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// Where tools are looked for, and nowhere else: PATH is the caller's.
const FOLDERS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// How long one command may take.
const LIMIT: Duration = Duration::from_secs(10);

/// How much a tool prints ahead, in bytes: as much as anybody may have (`/proc/sys/fs/pipe-max-size`, pipe(7)).
const PIPE: i32 = 1 << 20;

/// The most that a tool may print, in bytes: 10,000 rules are 1 MiB.
const MAX_OUTPUT: usize = 64 << 20;

/// The tools, each found once.
#[derive(Clone, Debug)]
pub struct Tools {
    ip: PathBuf,
    save: PathBuf,
    restore: PathBuf,
    conntrack: Option<PathBuf>,
    /// Which of the two iptables-save is, by way of /etc/alternatives.
    pub backend: Backend,
    /// The command that a person gives for it: `iptables`, or the backend's name where it is not in use.
    pub iptables: &'static str,
    deadline: Instant,
}

/// The two ways in which iptables works, both at the same time in the same kernel (xtables-nft(8)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// By nf_tables.
    Nft,
    /// By ip_tables.
    Legacy,
}

impl Backend {
    /// What its command is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nft => "iptables-nft",
            Self::Legacy => "iptables-legacy",
        }
    }

    /// The one of the two that this is not.
    pub fn other(self) -> Self {
        match self {
            Self::Nft => Self::Legacy,
            Self::Legacy => Self::Nft,
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a tool that ran to its end said.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its answer.
    pub stdout: String,
    /// Its complaints.
    pub stderr: String,
}

/// Whether rules are listed with the packets and bytes that they have counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counters {
    /// They are.
    Shown,
    /// They are not.
    Hidden,
}

impl Counters {
    fn args(self) -> &'static [&'static str] {
        match self {
            Self::Shown => &["-c"],
            Self::Hidden => &[],
        }
    }
}

/// Whether `ip -batch` stops at the first line that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnError {
    /// What follows would build on it.
    Stop,
    /// What follows is to be removed all the same.
    GoOn,
}

impl Tools {
    /// Finds the tools. All that they do must be done by the deadline.
    ///
    /// # Errors
    /// Names the one that is missing and the package that has it.
    pub fn find(deadline: Instant) -> Result<Self> {
        let ip = find("ip", "iproute2")?;
        let save = find("iptables-save", "iptables")?;
        let real_path = save
            .canonicalize()
            .with_context(|| format!("follow {}", save.display()))?;
        let is_legacy = real_path.to_string_lossy().contains("legacy");
        Ok(Self {
            ip,
            save,
            restore: find("iptables-restore", "iptables")?,
            conntrack: find("conntrack", "conntrack").ok(),
            backend: if is_legacy {
                Backend::Legacy
            } else {
                Backend::Nft
            },
            iptables: "iptables",
            deadline,
        })
    }

    /// The same tools, but for those of the other backend of iptables; none where they are not installed.
    pub fn other(&self) -> Option<Self> {
        let backend = self.backend.other();
        Some(Self {
            save: find(&format!("{backend}-save"), "iptables").ok()?,
            restore: find(&format!("{backend}-restore"), "iptables").ok()?,
            backend,
            iptables: backend.name(),
            ..self.clone()
        })
    }

    /// Asks for the answers to a batch of `ip` questions, and for all rules of all tables, at the same time.
    /// Of `ip` for numbers, since names of tables and protocols are this machine's own (/etc/iproute2).
    ///
    /// # Errors
    /// One can't be run.
    pub fn ask(&self, questions: &str, counters: Counters) -> Result<Asked> {
        Ok(Asked {
            ip: self.start(&self.ip, &["-4", "-N", "-batch", "-"], questions)?,
            save: self.start(&self.save, counters.args(), "")?,
        })
    }

    /// Carries out a batch of `ip` lines.
    ///
    /// # Errors
    /// It can't be run, or not within its time.
    pub fn ip_batch(&self, on_error: OnError, lines: &str) -> Result<Output> {
        let args: &[&str] = match on_error {
            OnError::Stop => &["-4", "-batch", "-"],
            OnError::GoOn => &["-4", "-force", "-batch", "-"],
        };
        self.run(&self.ip, args, lines)
    }

    /// The answer to one `ip` question, its words apart by spaces, or its refusal.
    ///
    /// # Errors
    /// It can't be run.
    pub fn ip_ask(&self, question: &str) -> Result<Output> {
        let words = ["-4", "-N"].into_iter().chain(question.split(' '));
        self.run(&self.ip, &words.collect::<Vec<_>>(), "")
    }

    /// What `ip` and iptables-save say of their versions.
    ///
    /// # Errors
    /// One can't be run.
    pub fn versions(&self) -> Result<(String, String)> {
        let version = |path: &Path| -> Result<String> {
            let output = self.run(path, &["-V"], "")?;
            Ok(output.stdout.trim().to_owned())
        };
        Ok((version(&self.ip)?, version(&self.save)?))
    }

    /// What `nft list chains` says; none where nft is not installed, or does not work here.
    ///
    /// # Errors
    /// It can't be run.
    pub fn nft_chains(&self) -> Result<Option<String>> {
        let Ok(path) = find("nft", "nftables") else {
            return Ok(None);
        };
        let output = self.run(&path, &["list", "chains"], "")?;
        Ok(output.status.success().then_some(output.stdout))
    }

    /// All rules of all tables that there are.
    ///
    /// # Errors
    /// It can't be run or fails.
    pub fn iptables_save(&self, counters: Counters) -> Result<String> {
        self.start(&self.save, counters.args(), "")?.answer()
    }

    /// The names of all tables of nftables, where its tool is installed.
    ///
    /// # Errors
    /// It can't be run or fails.
    pub fn nft_tables(&self) -> Result<Option<String>> {
        match find("nft", "nftables") {
            Ok(path) => self
                .start(&path, &["list", "tables"], "")?
                .answer()
                .map(Some),
            Err(_) => Ok(None),
        }
    }

    /// Changes tables, each in one transaction. The lock of the legacy backend is waited for.
    ///
    /// # Errors
    /// It can't be run, or not within its time.
    pub fn iptables_restore(&self, input: &str) -> Result<Output> {
        // One second less than it has, so that it gives up by itself and says why.
        let seconds = self.limit().as_secs().saturating_sub(1).max(1).to_string();
        self.run(&self.restore, &["--noflush", "--wait", &seconds], input)
    }

    /// All IPv4 connections that are tracked; none where the tool is not installed.
    ///
    /// # Errors
    /// It can't be run or fails, or does not say that it has shown as many.
    pub fn conntrack_list(&self) -> Result<Option<String>> {
        let Some(path) = &self.conntrack else {
            return Ok(None);
        };
        let output = self.run(path, &["-L", "-f", "ipv4"], "")?;
        let name = "conntrack -L -f ipv4";
        ensure!(output.status.success(), "{name}: {}", output.failure());
        // `conntrack v1.4.7 (conntrack-tools): 3 flow entries have been shown.`
        let mut words = output
            .stderr
            .split(' ')
            .skip_while(|word| !word.ends_with(':'));
        let said = words.nth(1).and_then(|count| count.parse().ok());
        let shown = output.stdout.lines().count();
        ensure!(
            said == Some(shown),
            "{name}: cut short: {shown} connections, and it says: {}",
            output.stderr.trim()
        );
        Ok(Some(output.stdout))
    }

    /// Deletes connections: a line each, as conntrack's arguments. One that has ended is no failure.
    ///
    /// # Errors
    /// It can't be run or fails.
    pub fn conntrack_delete(&self, lines: &str) -> Result<()> {
        let Some(path) = &self.conntrack else {
            return Ok(());
        };
        // By `-` it would open /dev/stdin, which a small system need not have.
        let output = self.run(path, &["--load-file", "/proc/self/fd/0"], lines)?;
        ensure!(
            output.status.success(),
            "conntrack --load-file: {}",
            output.failure()
        );
        Ok(())
    }

    fn limit(&self) -> Duration {
        LIMIT.min(self.deadline.saturating_duration_since(Instant::now()))
    }

    fn run(&self, path: &Path, args: &[&str], input: &str) -> Result<Output> {
        self.start(path, args, input)?.finish()
    }

    fn start(&self, path: &Path, args: &[&str], input: &str) -> Result<Running> {
        let name = path.file_name().unwrap_or_default();
        let name = [&[name.to_str().unwrap_or_default()], args]
            .concat()
            .join(" ");
        let limit = self.limit();
        ensure!(
            !limit.is_zero(),
            "{name}: not run: the time for this call is over"
        );
        let child = Command::new(path)
            .args(args)
            .env_clear()
            .env("LC_ALL", "C")
            .current_dir("/")
            // Its own group, so that a late one is stopped with all that it started.
            .process_group(0)
            .stdin(stdin(input).with_context(|| format!("{name}: hand over its input"))?)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("run {}", path.display()))?;
        if let Some(stdout) = &child.stdout {
            // A tool need not wait for us to read; a smaller pipe does as well, but takes longer.
            let _ = fcntl(stdout, FcntlArg::F_SETPIPE_SZ(PIPE));
        }
        Ok(Running {
            name,
            child,
            until: Instant::now() + limit,
            has_ended: false,
        })
    }
}

/// Both listings, on their way.
#[derive(Debug)]
pub struct Asked {
    ip: Running,
    save: Running,
}

impl Asked {
    /// What `ip` and iptables-save print.
    ///
    /// # Errors
    /// One fails, or not within its time.
    pub fn answers(self) -> Result<(String, String)> {
        Ok((self.ip.answer()?, self.save.answer()?))
    }
}

/// A tool that runs. Where nobody has waited for its end, or in vain, it is stopped with all that it started.
#[derive(Debug)]
struct Running {
    name: String,
    child: Child,
    until: Instant,
    has_ended: bool,
}

impl Running {
    fn finish(mut self) -> Result<Output> {
        let output = finish(&mut self.child, self.until);
        self.has_ended = output.is_ok();
        output.with_context(|| self.name.clone())
    }

    /// What it prints; a failure is an error.
    fn answer(self) -> Result<String> {
        let name = self.name.clone();
        let output = self.finish()?;
        ensure!(output.status.success(), "{name}: {}", output.failure());
        Ok(output.stdout)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.has_ended {
            return;
        }
        let group = Pid::from_raw(i32::try_from(self.child.id()).expect("a process id fits pid_t"));
        // It may have ended in between, which is as well.
        let _ = killpg(group, Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

/// Starts this program again, with these arguments and the same environment, and does not wait.
///
/// # Errors
/// It can't be run.
pub fn start_self(args: &[OsString]) -> Result<()> {
    Command::new("/proc/self/exe")
        .arg0("mh-hook")
        .args(args)
        .current_dir("/")
        // Whoever ends our caller's group does not mean this one.
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("start mh-hook again")?;
    Ok(())
}

impl Output {
    /// How it failed, and its own words on one line.
    pub fn failure(&self) -> String {
        let words: Vec<&str> = self
            .stderr
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .collect();
        format!(
            "{}: {}",
            self.ending(),
            if words.is_empty() {
                "it said nothing".into()
            } else {
                words.join("; ")
            }
        )
    }

    /// How it ended.
    pub fn ending(&self) -> String {
        match (self.status.code(), self.status.signal()) {
            (Some(code), _) => format!("exit status {code}"),
            (None, Some(signal)) => format!("killed by signal {signal}"),
            (None, None) => "ended".into(),
        }
    }
}

fn find(name: &str, package: &str) -> Result<PathBuf> {
    let mut paths = FOLDERS.iter().map(|folder| Path::new(folder).join(name));
    paths.find(|path| path.is_file()).with_context(|| {
        format!(
            "there is no {name} in {}: install it (apt-get install {package})",
            FOLDERS.join(", ")
        )
    })
}

/// The input as a file in memory: unlike a pipe it takes all at once, so that nobody waits for us
/// while we wait for him.
fn stdin(input: &str) -> Result<Stdio> {
    if input.is_empty() {
        return Ok(Stdio::null());
    }
    let mut file =
        File::from(memfd_create("mh-hook", MFdFlags::MFD_CLOEXEC).context("memfd_create")?);
    file.write_all(input.as_bytes())?;
    file.rewind()?;
    Ok(file.into())
}

/// Reads both outputs to their ends and waits.
fn finish(child: &mut Child, until: Instant) -> Result<Output> {
    let mut stdout = child.stdout.take();
    let mut stderr = child.stderr.take();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    while stdout.is_some() || stderr.is_some() {
        let (out_ready, err_ready) = ready(
            stdout.as_ref().map(AsFd::as_fd),
            stderr.as_ref().map(AsFd::as_fd),
            until,
        )?;
        if out_ready {
            read_some(&mut stdout, &mut out)?;
        }
        if err_ready {
            read_some(&mut stderr, &mut err)?;
        }
    }
    let status = loop {
        // Its outputs are closed, so it is about to end.
        match child.try_wait().context("wait")? {
            Some(status) => break status,
            None if Instant::now() >= until => bail!(TOO_LATE),
            None => std::thread::sleep(Duration::from_micros(200)),
        }
    };
    let text = |bytes: Vec<u8>| match String::from_utf8(bytes) {
        Ok(text) => text,
        // Names of others' interfaces can hold any byte.
        Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
    };
    Ok(Output {
        status,
        stdout: text(out),
        stderr: text(err),
    })
}

const TOO_LATE: &str = "did not end in its time and was stopped";

type Fd<'a> = Option<std::os::fd::BorrowedFd<'a>>;

/// Which of the two can be read, once one can.
fn ready(stdout: Fd, stderr: Fd, until: Instant) -> Result<(bool, bool)> {
    let left = until.saturating_duration_since(Instant::now());
    ensure!(!left.is_zero(), TOO_LATE);
    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
    let mut fds: Vec<PollFd> = [stdout, stderr]
        .into_iter()
        .flatten()
        .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
        .collect();
    match poll(&mut fds, timeout) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(errno) => return Err(errno).context("poll"),
    }
    let mut any = fds.iter().map(|fd| fd.any().unwrap_or(false));
    Ok((
        stdout.is_some() && any.next().unwrap_or(false),
        stderr.is_some() && any.next().unwrap_or(false),
    ))
}

/// Reads what is there; at its end the pipe goes.
fn read_some(pipe: &mut Option<impl Read>, into: &mut Vec<u8>) -> Result<()> {
    let mut buffer = [0; 1 << 16];
    let length = pipe
        .as_mut()
        .map_or(Ok(0), |pipe| pipe.read(&mut buffer))
        .context("read its output")?;
    if length == 0 {
        *pipe = None;
    }
    into.extend_from_slice(&buffer[..length]);
    ensure!(
        into.len() <= MAX_OUTPUT,
        "printed more than {MAX_OUTPUT} bytes and was stopped"
    );
    Ok(())
}
