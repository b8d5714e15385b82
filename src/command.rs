//! The only place that spawns: absolute paths, a clean environment, a deadline, the exit status.
//! Knows nothing of routing.

use std::ffi::OsString;
use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// Where tools are looked for, and nowhere else: PATH is the caller's.
const FOLDERS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// How long one command may take.
const LIMIT: Duration = Duration::from_secs(10);

/// How much a tool prints ahead, and we write ahead, in bytes: as much as anybody may have
/// (`/proc/sys/fs/pipe-max-size`, pipe(7)).
const PIPE: i32 = 1 << 20;

/// How long what a tool prints may stay in its pipe.
const PAUSE: Duration = Duration::from_millis(2);

/// How many bytes a pipe takes at once or not at all (pipe(7)).
const PIPE_BUF: usize = 4096;

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
        // The one that takes longer first: the second may get the first's processor.
        let save = self.start(&self.save, counters.args())?;
        let ip = self.start(&self.ip, &["-4", "-N", "-batch", "-"])?;
        Ok(Asked {
            ip: ip.with(questions)?,
            save,
        })
    }

    /// Starts what carries out a batch of `ip` lines, once it has them.
    ///
    /// # Errors
    /// It can't be run.
    pub fn ip_batch(&self, on_error: OnError) -> Result<Running> {
        let args: &[&str] = match on_error {
            OnError::Stop => &["-4", "-batch", "-"],
            OnError::GoOn => &["-4", "-force", "-batch", "-"],
        };
        self.start(&self.ip, args)
    }

    /// The answer to one `ip` question, its words apart by spaces, or its refusal.
    ///
    /// # Errors
    /// It can't be run.
    pub fn ip_ask(&self, question: &str) -> Result<Output> {
        let words = ["-4", "-N"].into_iter().chain(question.split(' '));
        self.start(&self.ip, &words.collect::<Vec<_>>())?.finish()
    }

    /// What `ip` and iptables-save say of their versions.
    ///
    /// # Errors
    /// One can't be run.
    pub fn versions(&self) -> Result<(String, String)> {
        let version = |path: &Path| -> Result<String> {
            let output = self.start(path, &["-V"])?.finish()?;
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
        let output = self.start(&path, &["list", "chains"])?.finish()?;
        Ok(output.status.success().then_some(output.stdout))
    }

    /// All rules of all tables that there are.
    ///
    /// # Errors
    /// It can't be run or fails.
    pub fn iptables_save(&self, counters: Counters) -> Result<String> {
        self.start(&self.save, counters.args())?.answer()
    }

    /// The names of all tables of nftables, where its tool is installed.
    ///
    /// # Errors
    /// It can't be run or fails.
    pub fn nft_tables(&self) -> Result<Option<String>> {
        match find("nft", "nftables") {
            Ok(path) => self.start(&path, &["list", "tables"])?.answer().map(Some),
            Err(_) => Ok(None),
        }
    }

    /// Starts what changes tables, each in one transaction, once it has its input. The lock of the legacy
    /// backend is waited for.
    ///
    /// # Errors
    /// It can't be run.
    pub fn iptables_restore(&self) -> Result<Running> {
        // One second less than it has, so that it gives up by itself and says why.
        let seconds = self.limit().as_secs().saturating_sub(1).max(1).to_string();
        self.start(&self.restore, &["--noflush", "--wait", &seconds])
    }

    /// All IPv4 connections that are tracked; none where the tool is not installed.
    ///
    /// # Errors
    /// It can't be run or fails, or does not say that it has shown as many.
    pub fn conntrack_list(&self) -> Result<Option<String>> {
        let Some(path) = &self.conntrack else {
            return Ok(None);
        };
        let output = self.start(path, &["-L", "-f", "ipv4"])?.finish()?;
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
        let delete = self.start(path, &["--load-file", "/proc/self/fd/0"])?;
        let output = delete.run(&mut [lines.to_owned()].into_iter())?;
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

    fn start(&self, path: &Path, args: &[&str]) -> Result<Running> {
        let name = path.file_name().unwrap_or_default();
        let name = [&[name.to_str().unwrap_or_default()], args]
            .concat()
            .join(" ");
        ensure!(
            !self.limit().is_zero(),
            "{name}: not run: the time for this call is over"
        );
        let child = Command::new(path)
            .args(args)
            .env_clear()
            .env("LC_ALL", "C")
            .current_dir("/")
            // Its own group, so that a late one is stopped with all that it started.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("run {}", path.display()))?;
        // Nobody waits for the other to read; a smaller pipe does as well, but takes longer.
        for pipe in [fd(&child.stdin), fd(&child.stdout)].into_iter().flatten() {
            let _ = fcntl(pipe, FcntlArg::F_SETPIPE_SZ(PIPE));
        }
        Ok(Running {
            name,
            child,
            until: self.deadline,
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
pub struct Running {
    name: String,
    child: Child,
    until: Instant,
    has_ended: bool,
}

impl Running {
    /// Hands over all its input, which is no more than a pipe takes at once.
    fn with(mut self, input: &str) -> Result<Self> {
        if let Some(mut stdin) = self.child.stdin.take() {
            let written = stdin.write_all(input.as_bytes());
            written.with_context(|| format!("{}: hand over its input", self.name))?;
        }
        Ok(self)
    }

    /// Hands over its input, piece by piece as it reads, and waits for its end.
    ///
    /// # Errors
    /// It does not end within its time.
    pub fn run(mut self, input: &mut dyn Iterator<Item = String>) -> Result<Output> {
        self.until = self.until.min(Instant::now() + LIMIT);
        let output = talk(&mut self.child, input, self.until);
        self.has_ended = output.is_ok();
        output.with_context(|| self.name.clone())
    }

    fn finish(self) -> Result<Output> {
        self.run(&mut std::iter::empty())
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

/// Hands over the input, reads both outputs to their ends and waits.
fn talk(
    child: &mut Child,
    input: &mut dyn Iterator<Item = String>,
    until: Instant,
) -> Result<Output> {
    let mut stdin = child.stdin.take();
    let mut stdout = child.stdout.take();
    let mut stderr = child.stderr.take();
    if let Some(stdin) = &stdin {
        fcntl(stdin, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("hand over its input")?;
    }
    let mut left = String::new();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    while stdout.is_some() || stderr.is_some() {
        let fds = [fd(&stdin), fd(&stdout), fd(&stderr)];
        let [in_ready, out_ready, err_ready] = ready(fds, until)?;
        if in_ready {
            write_some(&mut stdin, &mut left, input)?;
        }
        if out_ready {
            read_some(&mut stdout, &mut out)?;
        }
        if err_ready {
            read_some(&mut stderr, &mut err)?;
        }
    }
    let mut pause = Duration::from_micros(10);
    let status = loop {
        // Its outputs are closed, so it is about to end.
        match child.try_wait().context("wait")? {
            Some(status) => break status,
            None if Instant::now() >= until => bail!(TOO_LATE),
            None => std::thread::sleep(pause),
        }
        pause = (2 * pause).min(Duration::from_millis(1));
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

type Fd<'a> = Option<BorrowedFd<'a>>;

fn fd(pipe: &Option<impl AsFd>) -> Fd<'_> {
    pipe.as_ref().map(AsFd::as_fd)
}

/// Which of stdin, stdout and stderr can go on. What a tool prints stays in the pipe until the tool has ended or
/// a while has gone by: woken at each of its writes, we would take its processor from it.
fn ready(fds: [Fd; 3], until: Instant) -> Result<[bool; 3]> {
    let left = until.saturating_duration_since(Instant::now());
    ensure!(!left.is_zero(), TOO_LATE);
    // The end of a pipe is told whether it is asked for or not (poll(2)).
    let ready = poll_each(fds, PollFlags::empty(), left.min(PAUSE))?;
    if ready.contains(&true) {
        return Ok(ready);
    }
    poll_each(fds, PollFlags::POLLIN, Duration::ZERO)
}

fn poll_each(fds: [Fd; 3], of_outputs: PollFlags, timeout: Duration) -> Result<[bool; 3]> {
    let events = [PollFlags::POLLOUT, of_outputs, of_outputs];
    let each = fds.into_iter().zip(events);
    let mut asked: Vec<PollFd> = each
        .filter_map(|(fd, events)| fd.map(|fd| PollFd::new(fd, events)))
        .collect();
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    match poll(&mut asked, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(errno).context("poll"),
    }
    let mut any = asked.iter().map(|fd| fd.any().unwrap_or(false));
    Ok(fds.map(|fd| fd.is_some() && any.next().unwrap_or(false)))
}

/// Writes as much as the pipe takes; behind the end of the input the pipe goes. So it does where nobody
/// reads any more, and how the tool ends tells why.
fn write_some(
    pipe: &mut Option<ChildStdin>,
    left: &mut String,
    input: &mut dyn Iterator<Item = String>,
) -> Result<()> {
    let Some(stdin) = pipe else {
        return Ok(());
    };
    loop {
        while left.len() < PIPE_BUF
            && let Some(next) = input.next()
        {
            left.push_str(&next);
        }
        if left.is_empty() {
            break;
        }
        match stdin.write(whole_lines(left.as_bytes())) {
            Ok(length) => drop(left.drain(..length)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::BrokenPipe => break,
            Err(error) => return Err(error).context("hand over its input"),
        }
    }
    *pipe = None;
    Ok(())
}

/// As many lines as are written at once or not at all: when we are killed, no tool reads half a line.
fn whole_lines(input: &[u8]) -> &[u8] {
    let most = &input[..input.len().min(PIPE_BUF)];
    let end = most.iter().rposition(|byte| *byte == b'\n');
    end.map_or(most, |end| &most[..=end])
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
