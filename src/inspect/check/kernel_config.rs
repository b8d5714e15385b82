//! The kernel: the options that it was built with, its last routing rule, and the size of its connection table.

use super::Finding;
use crate::inspect::snapshot::Snapshot;
use crate::kernel::root::Root;

/// The kernel options that our entries need, each with what they need it for.
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

/// Checks the running kernel.
pub fn check(snapshot: &Snapshot) -> Vec<Finding> {
    let mut findings = options(&snapshot.root);
    if snapshot.kernel.routing.rules.is_empty() {
        let what = "there is no routing rule at all, not even those for the tables local and main";
        let fix = "ip rule add priority 0 lookup local; ip rule add priority 32766 lookup main";
        findings.push(Finding::error("kernel", what).fix(fix));
    }
    findings.extend(connections(&snapshot.root));
    findings
}

/// Options that the kernel's configuration says are off. Where there is no such file, nothing is known.
fn options(root: &Root) -> Vec<Finding> {
    let release = root.sysctl("kernel/osrelease").unwrap_or_default();
    let path = format!("/boot/config-{release}");
    let config = root.read(&path).unwrap_or_default();
    let is_off = |option: &str| {
        let off = format!("# {option} is not set");
        config.lines().any(|line| line == off)
    };
    let missing = OPTIONS.into_iter().filter(|(option, _)| is_off(option));
    let findings = missing.map(|(option, user)| {
        let what = format!("{path}: the kernel is built without {option}, needed for {user}");
        Finding::error("kernel", what).fix(format!("{option}=m"))
    });
    findings.collect()
}

/// A connection table that is nearly full: the kernel drops new connections once it is.
fn connections(root: &Root) -> Option<Finding> {
    let number = |name: &str| -> Option<u64> {
        let path = format!("net/netfilter/nf_conntrack_{name}");
        root.sysctl(&path)?.parse().ok()
    };
    let (count, most) = (number("count")?, number("max")?);
    // 0 is no limit.
    let is_nearly_full = most > 0 && count >= most - most / 10;
    is_nearly_full.then(|| {
        let what = format!(
            "{count} of at most {most} connections are tracked: the kernel drops new ones when the table is full"
        );
        let twice = most.saturating_mul(2);
        let fix = format!("sysctl -w net.netfilter.nf_conntrack_max={twice}");
        Finding::warning("conntrack-full", what).fix(fix)
    })
}
