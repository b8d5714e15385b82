//! The only place that spawns: absolute paths, a clean environment, a deadline, the exit status.
//! Knows nothing of routing.

use std::ffi::OsString;
use std::fmt;
use std::iter;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::kernel::process::{self, Output, Process};
use crate::kernel::root::Root;

/// Where tools are looked for, and nowhere else: PATH is the caller's.
const FOLDERS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// The tools, each found once.
#[derive(Clone, Debug)]
pub struct Tools {
    ip: PathBuf,
    save: PathBuf,
    restore: PathBuf,
    conntrack: Option<PathBuf>,
    nft: Option<PathBuf>,
    root: Root,
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
        Self::find_below(&Root::system(), deadline)
    }

    /// The same of the tools below another root folder.
    ///
    /// # Errors
    /// Those of [`Self::find`].
    pub fn find_below(root: &Root, deadline: Instant) -> Result<Self> {
        let find = |name, package| find(root, name, package);
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
            nft: find("nft", "nftables").ok(),
            root: root.clone(),
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
            save: find(&self.root, &format!("{backend}-save"), "iptables").ok()?,
            restore: find(&self.root, &format!("{backend}-restore"), "iptables").ok()?,
            backend,
            iptables: backend.name(),
            ..self.clone()
        })
    }

    /// Starts what carries out a batch of `ip` lines, once it has them.
    ///
    /// # Errors
    /// It can't be run.
    pub fn ip_batch(&self, on_error: OnError) -> Result<Process<'static>> {
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
        let Some(path) = &self.nft else {
            return Ok(None);
        };
        let output = self.start(path, &["list", "chains"])?.finish()?;
        Ok(output.status.success().then_some(output.stdout))
    }

    /// Starts what prints all rules of all tables that there are.
    ///
    /// # Errors
    /// It can't be run.
    pub fn iptables_save(&self, counters: Counters) -> Result<Process<'static>> {
        self.start(&self.save, counters.args())
    }

    /// The names of all tables of nftables, where its tool is installed.
    ///
    /// # Errors
    /// It can't be run or fails.
    pub fn nft_tables(&self) -> Result<Option<String>> {
        match &self.nft {
            Some(path) => self.start(path, &["list", "tables"])?.answer().map(Some),
            None => Ok(None),
        }
    }

    /// Starts what changes tables, each in one transaction, once it has its input. The lock of the legacy
    /// backend is waited for.
    ///
    /// # Errors
    /// It can't be run.
    pub fn iptables_restore(&self) -> Result<Process<'static>> {
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
        let list = self.start(path, &["-L", "-f", "ipv4"])?;
        let output = list.finish()?.success()?;
        // `conntrack v1.4.7 (conntrack-tools): 3 flow entries have been shown.`
        let mut words = output
            .stderr
            .split(' ')
            .skip_while(|word| !word.ends_with(':'));
        let said = words.nth(1).and_then(|count| count.parse().ok());
        let shown = output.stdout.lines().count();
        ensure!(
            said == Some(shown),
            "{}: cut short: {shown} connections, and it says: {}",
            output.name,
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
        delete
            .given(iter::once(lines.to_owned()))?
            .answer()
            .map(drop)
    }

    fn limit(&self) -> Duration {
        process::LIMIT.min(self.deadline.saturating_duration_since(Instant::now()))
    }

    fn start(&self, path: &Path, args: &[&str]) -> Result<Process<'static>> {
        let name = path.file_name().unwrap_or_default();
        let name = [&[name.to_str().unwrap_or_default()], args]
            .concat()
            .join(" ");
        ensure!(
            !self.limit().is_zero(),
            "{name}: not run: the time for this call is over"
        );
        let mut command = Command::new(path);
        command.args(args).env_clear().env("LC_ALL", "C");
        Process::start(name, command.current_dir("/"), self.deadline)
            .with_context(|| format!("run {}", path.display()))
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

fn find(root: &Root, name: &str, package: &str) -> Result<PathBuf> {
    let mut paths = FOLDERS
        .iter()
        .map(|folder| root.place(&Path::new(folder).join(name)));
    paths.find(|path| path.is_file()).with_context(|| {
        format!(
            "there is no {name} in {}: install it (apt-get install {package})",
            FOLDERS.join(", ")
        )
    })
}
