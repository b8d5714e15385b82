//! Kernel parameters: what they are, and what the next boot makes of them (sysctl.d(5)).

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use super::{Finding, View};
use crate::kernel::sysctl;

/// The folders of sysctl.d(5): of files with the same name, the first folder's counts.
const FOLDERS: [&str; 5] = [
    "/etc/sysctl.d",
    "/run/sysctl.d",
    "/usr/local/lib/sysctl.d",
    "/usr/lib/sysctl.d",
    "/lib/sysctl.d",
];

/// A file that comes after those of packages.
const OWN_FILE: &str = "/etc/sysctl.d/99-zz-router.conf";

const IP_FORWARD: &str = "net/ipv4/ip_forward";

/// A line of a file.
#[derive(Debug)]
struct Assignment {
    /// With slashes, as below /proc/sys.
    key: String,
    /// None where the line only keeps a pattern from setting it.
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
    /// What makes this line say something else, for good.
    fn mend(&self, value: &str) -> String {
        let path = self.path.display();
        let key = dotted(&self.key);
        if self.path.starts_with("/etc") {
            format!("sed -i '{}s|.*|{key} = {value}|' {path}", self.line)
        } else {
            // A package's file comes back with the package.
            format!("echo '{key} = {value}' >> {OWN_FILE}")
        }
    }
}

/// What is set at boot, in the order in which it is: the last counts.
#[derive(Debug, Default)]
pub struct Boot(Vec<Assignment>);

impl Boot {
    /// Reads what systemd-sysctl, or where there is no systemd `sysctl --system`, would.
    pub fn read() -> Self {
        let mut files: BTreeMap<String, PathBuf> = BTreeMap::new();
        for folder in FOLDERS {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            for entry in entries {
                let name = entry.file_name().to_string_lossy().into_owned();
                if name.ends_with(".conf") {
                    files.entry(name).or_insert_with(|| entry.path());
                }
            }
        }
        let mut boot = Self::default();
        for path in files.values() {
            boot.file(path);
        }
        // systemd-sysctl reads it only where a link in sysctl.d leads to it.
        if !Path::new("/run/systemd/system").exists() {
            boot.file(Path::new("/etc/sysctl.conf"));
        }
        // ufw sets these when it starts (ufw-framework(8)).
        let ufw = fs::read_to_string("/etc/ufw/ufw.conf").unwrap_or_default();
        let is_enabled = |line: &str| line.trim().eq_ignore_ascii_case("ENABLED=yes");
        if ufw.lines().any(is_enabled) {
            boot.file(Path::new("/etc/ufw/sysctl.conf"));
        }
        boot
    }

    fn file(&mut self, path: &Path) {
        let text = fs::read_to_string(path).unwrap_or_default();
        // The file itself, where a link leads to it: that is what is edited.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        for (line, text) in (1..).zip(text.lines()) {
            if let Some((key, value)) = assignment(text) {
                self.0.push(Assignment {
                    key,
                    value,
                    path: path.clone(),
                    line,
                });
            }
        }
    }

    /// What sets this parameter itself.
    fn exact(&self, key: &str) -> Option<&Assignment> {
        self.0.iter().rev().find(|line| line.key == key)
    }

    /// What sets this parameter, or a pattern that it fits.
    fn setter(&self, key: &str) -> Option<&Assignment> {
        let exact = self.exact(key);
        let fits = |line: &&Assignment| fits(&line.key, key);
        let setter = exact.or_else(|| self.0.iter().rev().find(fits));
        setter.filter(|line| line.value.is_some())
    }
}

/// `net.ipv4.conf.all.rp_filter = 1`, `net/ipv4/conf/eth1.10/rp_filter=1`, `-net.ipv4.conf.all.rp_filter`
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
        Some((key, value)) => Some((normal(key.trim()), Some(value.trim().to_owned()))),
        None if is_optional => Some((normal(line.trim()), None)),
        None => None,
    }
}

/// The first separator says which one it is; where it is the dot, slashes stand for dots.
fn normal(key: &str) -> String {
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

/// Whether a pattern with one `*` fits.
fn fits(pattern: &str, key: &str) -> bool {
    let Some((before, behind)) = pattern.split_once('*') else {
        return false;
    };
    key.strip_prefix(before)
        .and_then(|rest| rest.strip_suffix(behind))
        .is_some_and(|middle| !middle.contains('/'))
}

/// With dots, as people write it; with slashes where an interface's name has dots.
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

/// Whether the kernel forwards at all, now and after the next boot.
pub fn forwarding(boot: &Boot) -> Option<Finding> {
    let all = "net/ipv4/conf/all/forwarding";
    let setter = boot
        .0
        .iter()
        .rev()
        .find(|line| line.key == IP_FORWARD || line.key == all);
    let for_good = match setter {
        Some(line) => line.mend("1"),
        None => format!("echo '{} = 1' >> {OWN_FILE}", dotted(IP_FORWARD)),
    };
    let is_off = sysctl::read(IP_FORWARD).as_deref() == Some("0");
    let sets_off = setter.is_some_and(|line| line.value.as_deref() == Some("0"));
    if is_off {
        let mut what = "net.ipv4.ip_forward is 0: nothing is forwarded".to_owned();
        match setter {
            Some(line) if sets_off => what += &format!("; {line} sets it at boot"),
            Some(_) => {}
            None => what += "; nothing in sysctl.d(5) sets it at boot",
        }
        let mut finding = Finding::stops("ip-forward", what).mend(set(IP_FORWARD, "1"));
        if sets_off || setter.is_none() {
            finding = finding.mend(for_good);
        }
        return Some(finding);
    }
    match setter {
        Some(line) if sets_off => Some(
            Finding::harms(
                "ip-forward-at-boot",
                format!("{line} sets net.ipv4.ip_forward to 0 at the next boot"),
            )
            .mend(for_good),
        ),
        Some(_) => None,
        None => Some(
            Finding::note(
                "ip-forward-at-boot",
                "nothing in sysctl.d(5) sets net.ipv4.ip_forward: after the next boot it is 0, unless a service sets it",
            )
            .mend(for_good),
        ),
    }
}

/// Forwarding of the links.
pub fn per_link(view: &View, boot: &Boot) -> Vec<Finding> {
    let mut findings = Vec::new();
    if sysctl::read(IP_FORWARD).as_deref() != Some("0") {
        let lans = view.config.lan.interfaces.iter().map(|lan| (lan, None));
        let links = view
            .links()
            .iter()
            .filter_map(|(name, link)| Some((&link.as_ref()?.interface, Some(name))));
        for (interface, uplink) in lans.chain(links) {
            let key = format!("net/ipv4/conf/{interface}/forwarding");
            if sysctl::read(&key).as_deref() == Some("0") {
                let what = format!(
                    "what comes in by {interface} is not forwarded: its own forwarding is 0"
                );
                let finding = Finding::stops("forwarding", what).mend(set(&key, "1"));
                findings.push(match uplink {
                    Some(name) => finding.of(name),
                    None => finding,
                });
            }
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
            read("-net/ipv4/conf/eth1.10/rp_filter=2"),
            pair("net/ipv4/conf/eth1.10/rp_filter", "2")
        );
        assert_eq!(
            read("net.ipv4.conf.eth1/10.rp_filter=2"),
            pair("net/ipv4/conf/eth1.10/rp_filter", "2")
        );
        assert_eq!(
            read("-net.ipv4.conf.all.rp_filter"),
            pair("net/ipv4/conf/all/rp_filter", "-")
        );
    }

    #[test]
    fn the_last_line_counts_and_a_pattern_leaves_out_what_is_named() {
        let line = |line: usize, text: &str| {
            let (key, value) = assignment(text).expect("an assignment");
            let path = "/etc/sysctl.d/a.conf".into();
            Assignment {
                key,
                value,
                path,
                line,
            }
        };
        let boot = Boot(vec![
            line(1, "net.ipv4.conf.default.rp_filter = 2"),
            line(2, "net.ipv4.conf.*.rp_filter = 1"),
            line(3, "-net.ipv4.conf.all.rp_filter"),
            line(4, "net.ipv4.conf.ppp1.rp_filter = 0"),
            line(5, "net.ipv4.conf.ppp1.rp_filter = 2"),
        ]);
        let setter = |name: &str| {
            let key = format!("net/ipv4/conf/{name}/rp_filter");
            boot.setter(&key).map(|setter| setter.line)
        };
        assert_eq!(setter("ppp0"), Some(2));
        assert_eq!(setter("ppp1"), Some(5));
        assert_eq!(setter("all"), None);
    }
}
