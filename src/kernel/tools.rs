//! The only place that spawns tools: by absolute path, with a clean environment and a deadline. Knows no rule and no
//! route.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::kernel::process::{self, Output, Process};
use crate::kernel::root::Root;

/// The folders that are searched for tools. PATH is not: the caller chooses it.
const DIRS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

#[derive(Clone, Debug)]
pub struct Tools {
    ip: PathBuf,
    save: PathBuf,
    restore: PathBuf,
    root: Root,
    /// The backend that these iptables-save and iptables-restore use.
    pub backend: Backend,
    is_script: bool,
    /// The command to show to a person: `iptables`, or `iptables-legacy` if that is the backend that is not in use.
    pub iptables: &'static str,
    deadline: Instant,
}

/// The two backends of iptables. The kernel can have rules of both at the same time (xtables-nft(8)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    Nft,
    Legacy,
}

impl Backend {
    /// The name of the backend's command.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nft => "iptables-nft",
            Self::Legacy => "iptables-legacy",
        }
    }

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

/// Whether iptables-save prints the counters of rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counters {
    Shown,
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

/// What `ip -batch` does after a line that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnError {
    /// Stops: the lines after it need it.
    Stop,
    /// Goes on: the lines after it remove other entries.
    GoOn,
}

impl Tools {
    /// Finds the tools. Each tool that is started must exit by the deadline.
    /// Errors: a tool is missing; the error names the package that has it.
    pub fn find(deadline: Instant) -> Result<Self> {
        Self::find_below(&Root::system(), deadline)
    }

    /// The same of the tools below another root folder.
    /// Errors: those of [`Self::find`].
    pub fn find_below(root: &Root, deadline: Instant) -> Result<Self> {
        let find = |name, package| find(root, name, package);
        let ip = find("ip", "iproute2")?;
        let save = find("iptables-save", "iptables")?;
        let real_path = save
            .canonicalize()
            .with_context(|| format!("follow {}", save.display()))?;
        let mut tools = Self {
            ip,
            save,
            restore: find("iptables-restore", "iptables")?,
            root: root.clone(),
            backend: Backend::Nft,
            is_script: false,
            iptables: "iptables",
            deadline,
        };
        let name = real_path.file_name().unwrap_or_default();
        let name = name.to_string_lossy();
        if name.starts_with("xtables-legacy-") {
            tools.backend = Backend::Legacy;
        }
        tools.is_script = !name.starts_with("xtables-");
        Ok(tools)
    }

    /// The backend that these iptables-save and iptables-restore use, where their names tell.
    pub fn known_backend(&self) -> Option<Backend> {
        (!self.is_script).then_some(self.backend)
    }

    /// Asks iptables-save for its backend where its name does not tell: a script stands in its place.
    /// Errors: it can't be run.
    pub fn ask_backend(&mut self) -> Result<()> {
        // `iptables-save v1.8.9 (nf_tables)`; before 1.8 there was only one backend.
        if self.is_script && !self.version(&self.save)?.contains("(nf_tables)") {
            self.backend = Backend::Legacy;
        }
        Ok(())
    }

    /// The same tools, with iptables-save and iptables-restore of the other backend. None if they are not installed.
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

    /// Starts `ip -batch`, which reads its lines from stdin.
    /// Errors: it can't be run.
    pub fn ip_batch(&self, on_error: OnError) -> Result<Process> {
        let args: &[&str] = match on_error {
            OnError::Stop => &["-4", "-batch", "-"],
            OnError::GoOn => &["-4", "-force", "-batch", "-"],
        };
        self.start(&self.ip, args)
    }

    /// Runs one `ip` command whose words are separated by spaces. Its failure is an output, too.
    /// Errors: it can't be run.
    pub fn ip_ask(&self, command: &str) -> Result<Output> {
        let words = ["-4", "-N"].into_iter().chain(command.split(' '));
        self.start(&self.ip, &words.collect::<Vec<_>>())?.finish()
    }

    /// The versions of `ip` and iptables-save, as they print them.
    /// Errors: one of them can't be run.
    pub fn versions(&self) -> Result<(String, String)> {
        Ok((self.version(&self.ip)?, self.version(&self.save)?))
    }

    fn version(&self, path: &Path) -> Result<String> {
        let output = self.start(path, &["-V"])?.finish()?;
        // BusyBox says who it is where an option is wrong.
        let words = [&output.stdout, &output.stderr].map(|words| words.trim());
        let words = words.into_iter().find(|words| !words.is_empty());
        Ok(words.unwrap_or_default().replace('\n', "; "))
    }

    /// What `nft -j list ruleset` prints. None if nft is not installed.
    /// Errors: it can't be run, or fails.
    pub fn nft_ruleset(&self) -> Result<Option<String>> {
        match find(&self.root, "nft", "nftables") {
            Ok(path) => self
                .start(&path, &["-j", "list", "ruleset"])?
                .answer()
                .map(Some),
            Err(_) => Ok(None),
        }
    }

    /// Starts `iptables-save`, which prints all rules of all tables.
    /// Errors: it can't be run.
    pub fn iptables_save(&self, counters: Counters) -> Result<Process> {
        self.start(&self.save, counters.args())
    }

    /// Starts `iptables-restore`, which changes each table on its stdin in one transaction. The legacy one waits for
    /// the xtables lock.
    /// Errors: it can't be run.
    pub fn iptables_restore(&self) -> Result<Process> {
        // One second less than its time limit, so that it gives up by itself and says why.
        let seconds = self.limit().as_secs().saturating_sub(1).max(1).to_string();
        self.start(&self.restore, &["--noflush", "--wait", &seconds])
    }

    fn limit(&self) -> Duration {
        process::LIMIT.min(self.deadline.saturating_duration_since(Instant::now()))
    }

    fn start(&self, path: &Path, args: &[&str]) -> Result<Process> {
        let name = path.file_name().unwrap_or_default();
        let name = [&[name.to_str().unwrap_or_default()], args]
            .concat()
            .join(" ");
        ensure!(
            !self.limit().is_zero(),
            "{name}: not run: this call's time is up"
        );
        let mut command = Command::new(path);
        command.args(args).env_clear().env("LC_ALL", "C");
        Process::start(name, command.current_dir("/"), self.deadline)
            .with_context(|| format!("run {}", path.display()))
    }
}

/// Starts this program again, with these arguments and the same environment, in the background.
/// Errors: it can't be run.
pub fn start_self(args: &[OsString]) -> Result<()> {
    Command::new("/proc/self/exe")
        .arg0("mh-hook")
        .args(args)
        .current_dir("/")
        // A signal to our caller's process group is not meant for it.
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("start mh-hook again")?;
    Ok(())
}

fn find(root: &Root, name: &str, package: &str) -> Result<PathBuf> {
    let mut paths = DIRS
        .iter()
        .map(|dir| root.place(&Path::new(dir).join(name)));
    paths.find(|path| path.is_file()).with_context(|| {
        format!(
            "there is no {name} in {}: install it (apt-get install {package})",
            DIRS.join(", ")
        )
    })
}
