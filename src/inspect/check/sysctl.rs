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

/// The assignments that systemd-sysctl makes at boot, or where there is no systemd, `sysctl --system`. The last one counts.
fn at_boot(root: &Root) -> Vec<Assignment> {
    let mut paths = conf_files(root, &FOLDERS);
    // systemd-sysctl reads it only where a link in sysctl.d leads to it.
    if !root.exists("/run/systemd/system") {
        paths.push("/etc/sysctl.conf".into());
    }
    // ufw sets these when it starts (ufw-framework(8)).
    let ufw = root.read("/etc/ufw/ufw.conf").unwrap_or_default();
    let is_enabled = |line: &str| line.trim().eq_ignore_ascii_case("ENABLED=yes");
    if ufw.lines().any(is_enabled) {
        paths.push("/etc/ufw/sysctl.conf".into());
    }
    let mut assignments = Vec::new();
    for path in paths {
        let text = root.read(&path).unwrap_or_default();
        // A command must edit the file that a link leads to, not replace the link.
        let path = root.canonical(&path).unwrap_or(path);
        for (line, text) in (1..).zip(text.lines()) {
            if let Some((key, value)) = assignment(text) {
                assignments.push(Assignment {
                    key,
                    value,
                    path: path.clone(),
                    line,
                });
            }
        }
    }
    assignments
}

/// `net.ipv4.ip_forward = 1`, `net/ipv4/ip_forward=1`, `-net.ipv4.conf.all.forwarding`. Where an interface's name has a
/// dot, the key is wrong, but that is not asked for.
fn assignment(line: &str) -> Option<(String, Option<String>)> {
    let line = line.trim();
    if line.starts_with(['#', ';']) {
        return None;
    }
    let (key, value) = match line.split_once('=') {
        Some((key, value)) => (key, Some(value.trim().to_owned())),
        None if line.starts_with('-') => (line, None),
        None => return None,
    };
    let key = key.strip_prefix('-').unwrap_or(key).trim();
    Some((key.replace('.', "/"), value))
}

/// The line that decides whether the kernel forwards. A pattern does not set a parameter that another line names.
fn setter(lines: &[Assignment]) -> Option<&Assignment> {
    let sets = |line: &Assignment, key: &str| {
        let names = |line: &Assignment| line.key == key;
        names(line) || fits(&line.key, key) && !lines.iter().any(names)
    };
    let mut lines_with_value = lines.iter().rev().filter(|line| line.value.is_some());
    lines_with_value.find(|line| sets(line, IP_FORWARD) || sets(line, ALL_FORWARDING))
}

/// Whether a pattern with one `*` matches a parameter.
fn fits(pattern: &str, key: &str) -> bool {
    let Some((before, after)) = pattern.split_once('*') else {
        return false;
    };
    let rest = key.strip_prefix(before);
    let middle = rest.and_then(|rest| rest.strip_suffix(after));
    middle.is_some_and(|middle| !middle.contains('/'))
}

/// With dots, as people write it; with slashes where an interface's name has a dot.
fn dotted(key: &str) -> String {
    match key.contains('.') {
        true => key.to_owned(),
        false => key.replace('/', "."),
    }
}

fn is_off(root: &Root, key: &str) -> bool {
    root.sysctl(key).as_deref() == Some("0")
}

/// Checks whether the kernel forwards at all, now and after the next boot.
pub fn forwarding(root: &Root) -> Option<Finding> {
    let lines = at_boot(root);
    let setter = setter(&lines);
    let is_off_at_boot = setter.is_none_or(|line| line.value.as_deref() == Some("0"));
    let key = dotted(setter.map_or(IP_FORWARD, |line| &line.key));
    // An update would restore a package's file, so its line is overruled instead of edited.
    let for_good = match setter {
        Some(Assignment { path, line, .. }) if path.starts_with("/etc") => {
            format!("sed -i '{line}s|.*|{key} = 1|' {}", path.display())
        }
        _ => format!("echo '{key} = 1' >> {OWN_FILE}"),
    };
    if is_off(root, IP_FORWARD) {
        let what = "net.ipv4.ip_forward is 0: the kernel forwards nothing";
        let mut finding = Finding::error("ip-forward", what).fix("sysctl -w net.ipv4.ip_forward=1");
        if is_off_at_boot {
            finding.what += &match setter {
                Some(line) => format!("; {line} sets it to 0 at boot"),
                None => "; no file of sysctl.d(5) sets it at boot".into(),
            };
            finding = finding.fix(for_good);
        }
        return Some(finding);
    }
    let finding = match setter {
        Some(line) => {
            let what = format!("{line} sets net.ipv4.ip_forward to 0 at the next boot");
            Finding::warning("ip-forward-at-boot", what)
        }
        None => {
            let what = "no file of sysctl.d(5) sets net.ipv4.ip_forward: after the next boot it is 0, unless a service sets it";
            Finding::info("ip-forward-at-boot", what)
        }
    };
    is_off_at_boot.then(|| finding.fix(for_good))
}

/// Checks the forwarding of each interface in [lan], and of each uplink's link.
pub fn per_link(view: &View) -> Vec<Finding> {
    let root = &view.snapshot.root;
    if is_off(root, IP_FORWARD) {
        return Vec::new();
    }
    let lans = view.config.lan.interfaces.iter().map(|lan| (lan, None));
    let links = view.comparison.links.iter();
    let links = links.filter_map(|(name, link)| Some((&link.as_ref()?.interface, Some(name))));
    let mut findings = Vec::new();
    for (interface, uplink) in lans.chain(links) {
        let path = format!("net/ipv4/conf/{interface}/forwarding");
        if is_off(root, &path) {
            let key = dotted(&path);
            let what =
                format!("the kernel forwards nothing that comes in by {interface}: {key} is 0");
            let mut finding = Finding::error("forwarding", what).fix(format!("sysctl -w {key}=1"));
            finding.uplink = uplink.map(ToString::to_string);
            findings.push(finding);
        }
    }
    findings
}
