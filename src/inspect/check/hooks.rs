//! The hooks that pppd runs, by way of run-parts(8).

use std::env;
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::Finding;

/// pppd's script, and the folder whose programs it runs.
const EVENTS: [(&str, &str); 3] = [
    ("/etc/ppp/ip-pre-up", "/etc/ppp/ip-pre-up.d"),
    ("/etc/ppp/ip-up", "/etc/ppp/ip-up.d"),
    ("/etc/ppp/ip-down", "/etc/ppp/ip-down.d"),
];

/// The largest script that is read, in bytes.
const MAX_SCRIPT: u64 = 64 << 10;

/// Each event's hook.
pub fn check() -> Vec<Finding> {
    EVENTS
        .iter()
        .flat_map(|(script, folder)| event(Path::new(script), Path::new(folder)))
        .collect()
}

fn event(script: &Path, folder: &Path) -> Vec<Finding> {
    // pppd waits for ip-pre-up, but all goes on without.
    let is_needed = !script.ends_with("ip-pre-up");
    let missing = |what: String| {
        if is_needed {
            Finding::harms("hook-missing", what)
        } else {
            Finding::note("hook-missing", what)
        }
    };
    let name = script.file_name().unwrap_or_default().display();
    // A script that calls mh-hook itself needs no folder.
    if calls_mh_hook(script) || calls_mh_hook(&script.with_extension("local")) {
        return modes(script);
    }
    let mut findings = Vec::new();
    if !calls(script, &format!("{name}.d")) {
        let what = format!(
            "pppd's {} does not run what stands in {}",
            script.display(),
            folder.display()
        );
        findings.push(missing(what));
    }
    let hooks: Vec<PathBuf> = entries(folder).filter(|path| calls_mh_hook(path)).collect();
    if hooks.is_empty() {
        let what = format!(
            "no hook in {}: mh-hook does not hear of pppd's {name}",
            folder.display()
        );
        let link = format!(
            "ln -s {} {}/0mh-hook",
            program().display(),
            folder.display()
        );
        findings.push(missing(what).mend(link));
    }
    let taken = hooks.iter().any(|hook| is_run(hook));
    for hook in &hooks {
        if !is_run(hook) && !taken {
            let what = format!(
                "{} is not run: run-parts takes names of A-Z a-z 0-9 _ - only",
                hook.display()
            );
            let mend = format!("mv {} {}/0mh-hook", hook.display(), folder.display());
            findings.push(Finding::harms("hook-name", what).mend(mend));
        }
        findings.extend(modes(hook));
    }
    if !hooks.is_empty()
        && let Ok(metadata) = fs::metadata(folder)
    {
        findings.extend(writable(folder, &metadata));
    }
    findings
}

/// Whether run-parts(8) takes the name.
fn is_run(hook: &Path) -> bool {
    let name = hook.file_name().and_then(OsStr::to_str).unwrap_or_default();
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    !name.is_empty() && name.chars().all(plain)
}

/// A hook that can't be run, or that others than root can change.
fn modes(hook: &Path) -> Vec<Finding> {
    let Ok(metadata) = fs::metadata(hook) else {
        return Vec::new();
    };
    let mut findings: Vec<Finding> = writable(hook, &metadata).into_iter().collect();
    if metadata.permissions().mode() & 0o111 == 0 {
        let what = format!("{} is not executable, and not run", hook.display());
        findings.push(
            Finding::harms("hook-not-executable", what)
                .mend(format!("chmod +x {}", hook.display())),
        );
    }
    findings
}

fn writable(path: &Path, metadata: &Metadata) -> Option<Finding> {
    let path = path.display();
    let finding = |why: String| {
        let what = format!("what {path} runs as root, others can change: {why}");
        Finding::harms("hook-writable", what)
    };
    if metadata.uid() != 0 {
        let why = format!("it belongs to user {}", metadata.uid());
        return Some(finding(why).mend(format!("chown root {path}")));
    }
    let mode = metadata.permissions().mode() & 0o7777;
    (mode & 0o022 != 0)
        .then(|| finding(format!("its mode is {mode:o}")).mend(format!("chmod go-w {path}")))
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths.into_iter()
}

/// Whether a file is mh-hook, a link to it, or a script that names it.
fn calls_mh_hook(path: &Path) -> bool {
    let Ok(real_path) = path.canonicalize() else {
        return false;
    };
    let own = env::current_exe().ok();
    real_path.file_name() == Some(OsStr::new("mh-hook"))
        || own.is_some_and(|own| own == real_path)
        || calls(path, "mh-hook")
}

/// Whether a script says this, elsewhere than in a comment.
fn calls(path: &Path, word: &str) -> bool {
    let is_small = fs::metadata(path).is_ok_and(|file| file.is_file() && file.len() <= MAX_SCRIPT);
    let text = if is_small { fs::read(path).ok() } else { None };
    let text = String::from_utf8_lossy(&text.unwrap_or_default()).into_owned();
    let mut lines = text.lines().map(str::trim_start);
    lines.any(|line| !line.starts_with('#') && line.contains(word))
}

/// Where the program stands.
fn program() -> PathBuf {
    let mut places = ["/usr/sbin/mh-hook", "/usr/local/sbin/mh-hook"]
        .iter()
        .map(PathBuf::from);
    places
        .find(|path| path.is_file())
        .or_else(|| env::current_exe().ok())
        .unwrap_or_else(|| "/usr/sbin/mh-hook".into())
}
