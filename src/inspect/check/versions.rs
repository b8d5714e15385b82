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
    if ip.contains("BusyBox") {
        let what = format!("ip is BusyBox's, which has no rules with a protocol: {ip}");
        let fix = "install iproute2 (apk add iproute2; on OpenWrt: opkg install ip-full)";
        findings.push(Finding::error("old-iproute2", what).fix(fix));
        return Ok(findings);
    }
    // `ip utility, iproute2-6.1.0, libbpf 1.1.2`; before 5.9 a date, as in iproute2-ss180813
    let words = ip.split_once("iproute2-").map_or("", |(_, rest)| rest);
    let is_old = match words.strip_prefix("ss") {
        // 4.17 is of June 2018.
        Some(date) => date.get(..6).is_some_and(|date| date < "180604"),
        None => is_before(words, &IPROUTE2),
    };
    if is_old {
        let what = format!("iproute2 is older than 4.17, the first whose ip rule has proto: {ip}");
        findings.push(Finding::error("old-iproute2", what).fix("apt-get install iproute2"));
    }
    // `iptables-save v1.8.9 (nf_tables)`
    let words = iptables.split_once(" v").map_or("", |(_, rest)| rest);
    if is_before(words, &IPTABLES) {
        let what = format!(
            "iptables is older than 1.6.2, the first whose iptables-restore has --wait: {iptables}"
        );
        findings.push(Finding::error("old-iptables", what).fix("apt-get install iptables"));
    }
    Ok(findings)
}

/// Whether `6.1.0, libbpf …` comes before a version; what has no number does not.
fn is_before(text: &str, version: &[u32]) -> bool {
    let is_other = |c: char| !c.is_ascii_digit() && c != '.';
    let numbers = text.split(is_other).next().unwrap_or_default().split('.');
    let numbers: Vec<u32> = numbers.map_while(|number| number.parse().ok()).collect();
    !numbers.is_empty() && numbers[..] < *version
}
