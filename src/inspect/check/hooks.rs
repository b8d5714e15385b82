//! The programs that pppd runs when a link comes up or goes down, by way of run-parts(8).

use std::env;
use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{Finding, Severity};
use crate::kernel::root::Root;

/// Each script of pppd's. It runs the programs in the folder of the same name with `.d` behind.
const SCRIPTS: [&str; 3] = ["/etc/ppp/ip-pre-up", "/etc/ppp/ip-up", "/etc/ppp/ip-down"];

/// The largest script that is read, in bytes.
const MAX_SCRIPT: u64 = 64 << 10;

/// Checks that each of pppd's events reaches mh-hook. `needed` is how bad it is if one does not.
pub fn check(root: &Root, needed: Severity) -> Vec<Finding> {
    let findings = SCRIPTS
        .iter()
        .flat_map(|script| event(root, script, needed));
    findings.collect()
}

fn event(root: &Root, script: &str, needed: Severity) -> Vec<Finding> {
    // Without ip-pre-up the entries come a moment later, at ip-up.
    let is_needed = !script.ends_with("/ip-pre-up");
    let missing = |what: String| match is_needed {
        true => Finding::new(needed, "hook-missing", what),
        false => Finding::info("hook-missing", what),
    };
    // A script that calls mh-hook itself needs no folder.
    if calls_mh_hook(root, script) || calls_mh_hook(root, format!("{script}.local")) {
        return modes(root, Path::new(script));
    }
    let folder = format!("{script}.d");
    let mut findings = Vec::new();
    let name = script.rsplit('/').next().unwrap_or_default();
    if !mentions(root, script, &format!("{name}.d")) {
        let what = format!("pppd's script {script} does not run the programs in {folder}");
        findings.push(missing(what));
    }
    let mut hooks = root.list(&folder);
    hooks.retain(|hook| calls_mh_hook(root, hook));
    if hooks.is_empty() {
        let what = format!("no program in {folder} calls mh-hook, so pppd does not run it");
        let link = format!("ln -s {} {folder}/0mh-hook", program(root).display());
        findings.push(missing(what).fix(link));
    }
    let has_one_that_runs = hooks.iter().any(|hook| is_run(hook));
    for hook in &hooks {
        if !has_one_that_runs {
            let hook = hook.display();
            let what = format!("run-parts skips {hook}: it runs names of A-Z a-z 0-9 _ - only");
            let fix = format!("mv {hook} {folder}/0mh-hook");
            findings.push(Finding::warning("hook-name", what).fix(fix));
        }
        findings.extend(modes(root, hook));
    }
    if !hooks.is_empty() {
        findings.extend(writable(root, Path::new(&folder)));
    }
    findings
}

/// Whether run-parts(8) runs a program of this name.
fn is_run(hook: &Path) -> bool {
    let name = hook.file_name().and_then(OsStr::to_str);
    let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    name.is_some_and(|name| name.chars().all(is_plain))
}

/// A hook that can't be run, or that users other than root can change.
fn modes(root: &Root, hook: &Path) -> Vec<Finding> {
    let mut findings = Vec::from_iter(writable(root, hook));
    let metadata = root.metadata(hook);
    if metadata.is_some_and(|metadata| metadata.mode() & 0o111 == 0) {
        let hook = hook.display();
        let what = format!("{hook} is not executable, so it is not run");
        let fix = format!("chmod +x {hook}");
        findings.push(Finding::warning("hook-not-executable", what).fix(fix));
    }
    findings
}

fn writable(root: &Root, path: &Path) -> Option<Finding> {
    let metadata = root.metadata(path)?;
    let path = path.display();
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    let (why, command) = if owner != root.owner {
        (format!("it belongs to user {owner}"), "chown root")
    } else if mode & 0o022 != 0 {
        (format!("its mode is {mode:o}"), "chmod go-w")
    } else {
        return None;
    };
    let what = format!("users other than root can change what root runs from {path}: {why}");
    Some(Finding::warning("hook-writable", what).fix(format!("{command} {path}")))
}

/// Whether a file is mh-hook, a link to it, or a script that calls it.
fn calls_mh_hook(root: &Root, path: impl AsRef<Path>) -> bool {
    let Some(real_path) = root.canonical(&path) else {
        return false;
    };
    real_path.file_name() == Some(OsStr::new("mh-hook"))
        || env::current_exe().ok() == root.reach(&path)
        || mentions(root, path, "mh-hook")
}

/// Whether a script says this word, outside of its comments.
fn mentions(root: &Root, path: impl AsRef<Path>, word: &str) -> bool {
    let metadata = root.metadata(&path);
    let is_small = metadata.is_some_and(|file| file.len() <= MAX_SCRIPT);
    let text = is_small.then(|| root.read(path)).flatten();
    let text = text.unwrap_or_default();
    let mut lines = text.lines().map(str::trim_start);
    lines.any(|line| !line.starts_with('#') && line.contains(word))
}

/// Where this program is installed.
fn program(root: &Root) -> PathBuf {
    let mut paths = ["/usr/sbin/mh-hook", "/usr/local/sbin/mh-hook"]
        .map(PathBuf::from)
        .into_iter();
    let installed = paths.find(|path| root.exists(path));
    let program = installed.or_else(|| env::current_exe().ok());
    program.unwrap_or_else(|| "/usr/sbin/mh-hook".into())
}
