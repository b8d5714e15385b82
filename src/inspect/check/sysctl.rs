//! Kernel parameters that forwarding needs: their values now, and what the next boot sets (sysctl.d(5)).

use std::fmt;
use std::path::PathBuf;

use super::services::conf_files;
use super::{Finding, View};
use crate::kernel::root::Root;

/// The folders of sysctl.d(5). Of files with the same name, the first folder's counts.
const FOLDERS: [&str; 5] = [
    "/etc/sysctl.d",
    "/run/sysctl.d",
    "/usr/local/lib/sysctl.d",
    "/usr/lib/sysctl.d",
    "/lib/sysctl.d",
];

/// A file that is read after those of packages.
const OWN_FILE: &str = "/etc/sysctl.d/99-zz-router.conf";

const IP_FORWARD: &str = "net/ipv4/ip_forward";

/// Another name of the same switch: a write to either sets both (Documentation/networking/ip-sysctl.rst).
const ALL_FORWARDING: &str = "net/ipv4/conf/all/forwarding";

#[derive(Debug)]
struct Assignment {
    /// With slashes, as below /proc/sys. May be a pattern with one `*`.
    key: String,
    /// None for `-KEY`, which excludes the parameter from patterns.
    value: Option<String>,
    path: PathBuf,
    line: usize,
}

impl fmt::Display for Assignment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.path.display(), self.line)
    }
}

impl Assignment {
    /// The command that makes boot set another value: it edits this line, or overrules the line of a package's file,
    /// which an update would restore.
    fn fix(&self, value: &str) -> String {
        let path = self.path.display();
        let key = dotted(&self.key);
        if self.path.starts_with("/etc") {
            format!("sed -i '{}s|.*|{key} = {value}|' {path}", self.line)
        } else {
            format!("echo '{key} = {value}' >> {OWN_FILE}")
        }
    }
}

/// The assignments that are made at boot, in order; the last one counts.
#[derive(Debug, Default)]
struct Boot(Vec<Assignment>);

impl Boot {
    /// Reads the files of systemd-sysctl, or where there is no systemd, of `sysctl --system`.
    fn read(root: &Root) -> Self {
        let mut boot = Self::default();
        for path in conf_files(root, &FOLDERS) {
            boot.file(root, path);
        }
        // systemd-sysctl reads it only where a link in sysctl.d leads to it.
        if !root.exists("/run/systemd/system") {
            boot.file(root, "/etc/sysctl.conf".into());
        }
        // ufw sets these when it starts (ufw-framework(8)).
        let ufw = root.read("/etc/ufw/ufw.conf").unwrap_or_default();
        let is_enabled = |line: &str| line.trim().eq_ignore_ascii_case("ENABLED=yes");
        if ufw.lines().any(is_enabled) {
            boot.file(root, "/etc/ufw/sysctl.conf".into());
        }
        boot
    }

    fn file(&mut self, root: &Root, path: PathBuf) {
        let text = root.read(&path).unwrap_or_default();
        // A command must edit the file that a link leads to, not replace the link.
        let path = root.canonical(&path).unwrap_or(path);
        for (line, text) in (1..).zip(text.lines()) {
            if let Some((key, value)) = assignment(text) {
                let path = path.clone();
                let assignment = Assignment {
                    key,
                    value,
                    path,
                    line,
                };
                self.0.push(assignment);
            }
        }
    }

    /// The line that decides whether the kernel forwards. A pattern does not set a parameter that another line names.
    fn forwarding(&self) -> Option<&Assignment> {
        let sets = |line: &Assignment, key: &str| {
            let names = |line: &Assignment| line.key == key;
            names(line) || fits(&line.key, key) && !self.0.iter().any(names)
        };
        let mut lines = self.0.iter().rev().filter(|line| line.value.is_some());
        lines.find(|line| sets(line, IP_FORWARD) || sets(line, ALL_FORWARDING))
    }
}

/// `net.ipv4.ip_forward = 1`, `net/ipv4/conf/eth1.10/forwarding=1`, `-net.ipv4.conf.all.forwarding`
fn assignment(line: &str) -> Option<(String, Option<String>)> {
    let line = line.trim();
    if line.is_empty() || line.starts_with(['#', ';']) {
        return None;
    }
    let (is_optional, line) = match line.strip_prefix('-') {
        Some(line) => (true, line),
        None => (false, line),
    };
    match line.split_once('=') {
        Some((key, value)) => Some((slashed(key.trim()), Some(value.trim().to_owned()))),
        None if is_optional => Some((slashed(line.trim()), None)),
        None => None,
    }
}

/// With slashes. Where the first separator is a dot, dots are separators, and slashes stand for dots.
fn slashed(key: &str) -> String {
    let swap = |c: char| match c {
        '.' => '/',
        '/' => '.',
        c => c,
    };
    match key.find(['.', '/']) {
        Some(index) if key[index..].starts_with('.') => key.chars().map(swap).collect(),
        _ => key.to_owned(),
    }
}

/// Whether a pattern with one `*` matches a parameter.
fn fits(pattern: &str, key: &str) -> bool {
    let Some((before, after)) = pattern.split_once('*') else {
        return false;
    };
    key.strip_prefix(before)
        .and_then(|rest| rest.strip_suffix(after))
        .is_some_and(|middle| !middle.contains('/'))
}

/// With dots, as people write it; with slashes where an interface's name has a dot.
fn dotted(key: &str) -> String {
    if key.contains('.') {
        key.to_owned()
    } else {
        key.replace('/', ".")
    }
}

fn set(key: &str, value: &str) -> String {
    format!("sysctl -w {}={value}", dotted(key))
}

/// Checks whether the kernel forwards at all, now and after the next boot.
pub fn forwarding(root: &Root) -> Option<Finding> {
    let boot = Boot::read(root);
    let setter = boot.forwarding();
    let for_good = match setter {
        Some(line) => line.fix("1"),
        None => format!("echo '{} = 1' >> {OWN_FILE}", dotted(IP_FORWARD)),
    };
    let disables = setter.is_some_and(|line| line.value.as_deref() == Some("0"));
    if root.sysctl(IP_FORWARD).as_deref() == Some("0") {
        let mut what = "net.ipv4.ip_forward is 0: the kernel forwards nothing".to_owned();
        match setter {
            Some(line) if disables => what += &format!("; {line} sets it to 0 at boot"),
            Some(_) => {}
            None => what += "; no file of sysctl.d(5) sets it at boot",
        }
        let mut finding = Finding::stops("ip-forward", what).fix(set(IP_FORWARD, "1"));
        if disables || setter.is_none() {
            finding = finding.fix(for_good);
        }
        return Some(finding);
    }
    match setter {
        Some(line) if disables => {
            let what = format!("{line} sets net.ipv4.ip_forward to 0 at the next boot");
            Some(Finding::harms("ip-forward-at-boot", what).fix(for_good))
        }
        Some(_) => None,
        None => {
            let what = "no file of sysctl.d(5) sets net.ipv4.ip_forward: after the next boot it is 0, unless a service sets it";
            Some(Finding::note("ip-forward-at-boot", what).fix(for_good))
        }
    }
}

/// Checks the forwarding of each interface in [lan], and of each uplink's link.
pub fn per_link(view: &View) -> Vec<Finding> {
    let root = &view.snapshot.root;
    if root.sysctl(IP_FORWARD).as_deref() == Some("0") {
        return Vec::new();
    }
    let lans = view.config.lan.interfaces.iter().map(|lan| (lan, None));
    let links = view.links().iter();
    let links = links.filter_map(|(name, link)| Some((&link.as_ref()?.interface, Some(name))));
    let mut findings = Vec::new();
    for (interface, uplink) in lans.chain(links) {
        let key = format!("net/ipv4/conf/{interface}/forwarding");
        if root.sysctl(&key).as_deref() == Some("0") {
            let what = format!(
                "the kernel forwards nothing that comes in by {interface}: {} is 0",
                dotted(&key)
            );
            let finding = Finding::stops("forwarding", what).fix(set(&key, "1"));
            findings.push(match uplink {
                Some(name) => finding.of(name),
                None => finding,
            });
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_sysctl_does() {
        let read = |line| assignment(line).map(|(key, value)| (key, value.unwrap_or("-".into())));
        let pair = |key: &str, value: &str| Some((key.to_owned(), value.to_owned()));
        assert_eq!(read("# net.ipv4.ip_forward=1"), None);
        assert_eq!(
            read(" net.ipv4.ip_forward = 1"),
            pair("net/ipv4/ip_forward", "1")
        );
        assert_eq!(
            read("-net/ipv4/conf/eth1.10/forwarding=1"),
            pair("net/ipv4/conf/eth1.10/forwarding", "1")
        );
        assert_eq!(
            read("net.ipv4.conf.eth1/10.forwarding=1"),
            pair("net/ipv4/conf/eth1.10/forwarding", "1")
        );
        assert_eq!(
            read("-net.ipv4.conf.all.forwarding"),
            pair("net/ipv4/conf/all/forwarding", "-")
        );
    }

    #[test]
    fn the_last_line_counts_and_a_pattern_leaves_out_what_is_named() {
        let setter = |lines: &[&str]| {
            let lines = (1..).zip(lines).map(|(line, text)| {
                let (key, value) = assignment(text).expect("an assignment");
                let path = "/etc/sysctl.d/a.conf".into();
                Assignment {
                    key,
                    value,
                    path,
                    line,
                }
            });
            Boot(lines.collect()).forwarding().map(|line| line.line)
        };
        let pattern = "net.ipv4.conf.*.forwarding = 0";
        assert_eq!(setter(&["net.ipv4.ip_forward = 1", pattern]), Some(2));
        assert_eq!(setter(&[pattern, "net.ipv4.ip_forward = 1"]), Some(2));
        assert_eq!(
            setter(&["net.ipv4.conf.all.forwarding = 1", pattern]),
            Some(1)
        );
        assert_eq!(setter(&[pattern, "-net.ipv4.conf.all.forwarding"]), None);
        assert_eq!(setter(&["net.ipv4.conf.ppp0.forwarding = 0"]), None);
    }
}
