//! Services of the system that remove our entries, or restore old ones.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::{Finding, count};
use crate::inspect::drift::Drift;
use crate::kernel::iptables_save::Ruleset;
use crate::kernel::root::Root;
use crate::model::state::State;
use crate::reconcile::diff::diff;
use crate::reconcile::other_backend::owned;

/// Checks systemd-networkd and netfilter-persistent.
pub fn check(root: &Root) -> Vec<Finding> {
    networkd(root).into_iter().chain(persistent(root)).collect()
}

/// systemd-networkd removes routing rules that it did not add when it starts (networkd.conf(5)).
fn networkd(root: &Root) -> Option<Finding> {
    let runs = root.exists("/run/systemd/netif/state");
    let is_enabled =
        root.is_symlink("/etc/systemd/system/multi-user.target.wants/systemd-networkd.service");
    if !(runs || is_enabled) || keeps_foreign_rules(root) {
        return None;
    }
    let folder = "/etc/systemd/networkd.conf.d";
    let what = "systemd-networkd removes our routing rules whenever it starts: ManageForeignRoutingPolicyRules is not no";
    let finding = Finding::warning("networkd-rules", what).fix(format!("mkdir -p {folder}"));
    let lines = "[Network]\\nManageForeignRoutingPolicyRules=no\\n";
    Some(finding.fix(format!("printf '{lines}' > {folder}/mh-hook.conf")))
}

/// Whether networkd.conf and its drop-ins say `ManageForeignRoutingPolicyRules=no`. Of drop-ins with the same name the
/// first folder's counts; drop-ins are read in the order of their names, after networkd.conf, and the last line counts.
fn keeps_foreign_rules(root: &Root) -> bool {
    const FOLDERS: [&str; 4] = ["/etc", "/run", "/usr/local/lib", "/usr/lib"];
    let files = FOLDERS.map(|folder| format!("{folder}/systemd/networkd.conf"));
    let drop_ins = conf_files(root, &files.clone().map(|file| file + ".d"));
    let main = files.iter().find(|file| root.exists(file));
    let mut keeps = false;
    for path in main.map(PathBuf::from).into_iter().chain(drop_ins) {
        let text = root.read(path).unwrap_or_default();
        let mut section = "";
        for line in text.lines().map(str::trim) {
            if line.starts_with('[') {
                section = line;
            } else if section == "[Network]"
                && let Some((key, value)) = line.split_once('=')
                && key.trim() == "ManageForeignRoutingPolicyRules"
            {
                let value = value.trim().to_ascii_lowercase();
                keeps = matches!(&value[..], "no" | "n" | "false" | "f" | "off" | "0");
            }
        }
    }
    keeps
}

/// The `*.conf` files of several folders, in the order of their names; of files with the same name, the first folder's.
pub fn conf_files(root: &Root, folders: &[impl AsRef<Path>]) -> Vec<PathBuf> {
    let mut files = BTreeMap::new();
    for path in folders.iter().flat_map(|folder| root.list(folder)) {
        if path.extension() == Some(OsStr::new("conf")) {
            let name = path.file_name().map(ToOwned::to_owned);
            files.entry(name).or_insert(path);
        }
    }
    files.into_values().collect()
}

/// Our entries in a file that netfilter-persistent restores at boot, for a former address.
fn persistent(root: &Root) -> Option<Finding> {
    let file = "/etc/iptables/rules.v4";
    let text = root.read(file)?;
    let ruleset = Ruleset::parse(&text).ok()?;
    let (_, ours) = owned(None, ruleset);
    let entries = Drift::entries(&diff(&ours, &State::default())).extra.len();
    (!ours.tables.is_empty()).then(|| {
        let what = format!(
            "{file} has {} of ours: netfilter-persistent restores them at boot, whatever address the link has by then",
            count(entries, "entry", "entries")
        );
        // The names of chains in full: what merely begins so is somebody else's.
        let names: BTreeSet<String> = ours.tables.keys().map(|(_, name)| name.chain()).collect();
        let names = Vec::from_iter(names).join("|");
        let chain = format!("({names})(\\.[a-z0-9]+)?");
        Finding::warning("persistent-rules", what).fix(format!(
            "sed -i -E '/^:{chain} |-A {chain} |(-j|-g|--comment) {chain}( |$)/d' {file}"
        ))
    })
}
