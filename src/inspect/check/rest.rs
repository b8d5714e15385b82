//! The tools, the kernel, and conntrack's table.

use std::fs;

use anyhow::Result;

use super::Finding;
use crate::inspect::snapshot::Snapshot;
use crate::kernel::sysctl;

/// The first iproute2 whose rules have a protocol.
const IPROUTE2: [u32; 2] = [4, 17];

/// The first iptables whose iptables-restore waits for its lock.
const IPTABLES: [u32; 3] = [1, 6, 2];

/// What our entries are made of; each as one option of the kernel's configuration.
const OPTIONS: [(&str, &str); 9] = [
    ("CONFIG_IP_MULTIPLE_TABLES", "ip rule"),
    ("CONFIG_NF_CONNTRACK", "conntrack"),
    ("CONFIG_NF_CONNTRACK_MARK", "connection marks"),
    ("CONFIG_NETFILTER_XT_CONNMARK", "-m connmark, -j CONNMARK"),
    ("CONFIG_NETFILTER_XT_MATCH_CONNTRACK", "-m conntrack"),
    ("CONFIG_NETFILTER_XT_MATCH_COMMENT", "-m comment"),
    ("CONFIG_NF_NAT", "NAT"),
    ("CONFIG_NETFILTER_XT_TARGET_MASQUERADE", "-j MASQUERADE"),
    ("CONFIG_NETFILTER_XT_TARGET_TCPMSS", "-j TCPMSS"),
];

/// All of them.
///
/// # Errors
/// A tool can't be run.
pub fn check(snapshot: &Snapshot) -> Result<Vec<Finding>> {
    let mut findings = versions(snapshot)?;
    findings.extend(kernel(snapshot));
    if snapshot.flows.is_none() {
        findings.push(
            Finding::note(
                "conntrack",
                "conntrack is not installed: connections from before a change keep their ways",
            )
            .mend("apt-get install conntrack"),
        );
    }
    findings.extend(conntrack_table());
    Ok(findings)
}

fn versions(snapshot: &Snapshot) -> Result<Vec<Finding>> {
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
        let what = format!("iproute2 is older than 4.17, whose rules have no protocol: {ip}");
        findings.push(Finding::stops("old-iproute2", what).mend("apt-get install iproute2"));
    }
    // `iptables-save v1.8.9 (nf_tables)`
    let words = iptables.split_once(" v").map_or("", |(_, rest)| rest);
    if version(words).is_some_and(|version| version[..] < IPTABLES[..]) {
        let what = format!(
            "iptables is older than 1.6.2, whose iptables-restore has no --wait: {iptables}"
        );
        findings.push(Finding::stops("old-iptables", what).mend("apt-get install iptables"));
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

/// Only what is surely not there: a kernel that says nothing of itself has what it has.
fn kernel(snapshot: &Snapshot) -> Vec<Finding> {
    let mut findings = Vec::new();
    if snapshot.kernel.routing.rules.is_empty() {
        findings.push(
            Finding::stops(
                "kernel",
                "the kernel has no routing rules, or somebody has removed the last of them",
            )
            .mend("ip rule add priority 0 lookup local; ip rule add priority 32766 lookup main"),
        );
    }
    let Some(release) = sysctl::read("kernel/osrelease") else {
        return findings;
    };
    let path = format!("/boot/config-{release}");
    let config = fs::read_to_string(&path).unwrap_or_default();
    for (option, what) in OPTIONS {
        let off = format!("# {option} is not set");
        if config.lines().any(|line| line == off) {
            let what = format!("the kernel is built without what {what} needs: {path}, {option}");
            findings.push(Finding::stops("kernel", what).mend(format!("{option}=m")));
        }
    }
    findings
}

/// New connections are dropped when the table is full.
fn conntrack_table() -> Option<Finding> {
    let number = |name: &str| -> Option<u64> {
        sysctl::read(&format!("net/netfilter/nf_conntrack_{name}"))?
            .parse()
            .ok()
    };
    let (count, most) = (number("count")?, number("max")?);
    // 0 is no limit.
    let is_nearly_full = most > 0 && count >= most - most / 10;
    is_nearly_full.then(|| {
        let what = format!(
            "{count} of at most {most} connections are tracked: new ones are dropped when it is full"
        );
        Finding::harms("conntrack-full", what).mend(format!(
            "sysctl -w net.netfilter.nf_conntrack_max={}",
            most.saturating_mul(2)
        ))
    })
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
