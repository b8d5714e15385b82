//! The versions of iproute2 and iptables.

use anyhow::Result;

use super::Finding;
use crate::inspect::snapshot::Snapshot;

/// The first iproute2 that gives routing rules a protocol.
const IPROUTE2: [u32; 2] = [4, 17];

/// The first iptables whose iptables-restore has `--wait`.
const IPTABLES: [u32; 3] = [1, 6, 2];

/// Checks the installed tools.
/// Errors: a tool can't be run.
pub fn check(snapshot: &Snapshot) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let (ip, iptables) = snapshot.tools.versions()?;
    // `ip utility, iproute2-6.1.0, libbpf 1.1.2`; before 5.9 a date, as in iproute2-ss180813
    let words = ip.split_once("iproute2-").map_or("", |(_, rest)| rest);
    let is_old = match words.strip_prefix("ss") {
        // 4.17 is of June 2018.
        Some(date) => date.get(..6).is_some_and(|date| date < "180604"),
        None => version(words).is_some_and(|version| version[..] < IPROUTE2[..]),
    };
    if is_old {
        let what = format!("iproute2 is older than 4.17, the first whose ip rule has proto: {ip}");
        findings.push(Finding::stops("old-iproute2", what).fix("apt-get install iproute2"));
    }
    // `iptables-save v1.8.9 (nf_tables)`
    let words = iptables.split_once(" v").map_or("", |(_, rest)| rest);
    if version(words).is_some_and(|version| version[..] < IPTABLES[..]) {
        let what = format!(
            "iptables is older than 1.6.2, the first whose iptables-restore has --wait: {iptables}"
        );
        findings.push(Finding::stops("old-iptables", what).fix("apt-get install iptables"));
    }
    Ok(findings)
}

/// `6.1.0, libbpf …` as numbers.
fn version(text: &str) -> Option<Vec<u32>> {
    let is_other = |c: char| !c.is_ascii_digit() && c != '.';
    let text = text.split(is_other).next()?;
    let numbers: Vec<u32> = text
        .split('.')
        .map_while(|number| number.parse().ok())
        .collect();
    (!numbers.is_empty()).then_some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        let is_old = |text| version(text).is_some_and(|version| version[..] < IPROUTE2[..]);
        assert!(is_old("4.9.0, libbpf 1"));
        assert!(!is_old("4.17.0"));
        assert!(!is_old("6.1.0, libbpf 1.1.2"));
        assert!(!is_old("nothing"));
        assert_eq!(version("1.8.9 (nf_tables)"), Some(vec![1, 8, 9]));
    }
}
