//! Services of the machine that throw our entries away, or bring old ones back.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::{Finding, count};
use crate::kernel::iptables_save::Ruleset;
use crate::model::state::State;
use crate::reconcile::diff::{Step, diff};
use crate::reconcile::other_backend::owned;

/// Both.
pub fn check() -> Vec<Finding> {
    networkd().into_iter().chain(persistent()).collect()
}

/// systemd-networkd removes others' rules when it starts (networkd.conf(5)).
fn networkd() -> Option<Finding> {
    let runs = Path::new("/run/systemd/netif/state").exists();
    let wants = "systemd/system/multi-user.target.wants/systemd-networkd.service";
    let is_enabled = Path::new("/etc").join(wants).is_symlink();
    if !(runs || is_enabled) || leaves_rules_alone() {
        return None;
    }
    let file = "/etc/systemd/networkd.conf.d/mh-hook.conf";
    let what = "systemd-networkd removes our routing rules whenever it starts: ManageForeignRoutingPolicyRules is not no";
    Some(
        Finding::harms("networkd-rules", what)
            .mend("mkdir -p /etc/systemd/networkd.conf.d")
            .mend(format!(
                "printf '[Network]\\nManageForeignRoutingPolicyRules=no\\n' > {file}"
            )),
    )
}

/// What networkd.conf and its drop-ins say; of drop-ins with the same name the first folder's counts,
/// and the last of all in the order of their names.
fn leaves_rules_alone() -> bool {
    const FOLDERS: [&str; 4] = ["/etc", "/run", "/usr/local/lib", "/usr/lib"];
    let mut files: BTreeMap<String, PathBuf> = BTreeMap::new();
    for folder in FOLDERS {
        let folder = Path::new(folder).join("systemd/networkd.conf.d");
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        for entry in entries {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.ends_with(".conf") {
                files.entry(name).or_insert_with(|| entry.path());
            }
        }
    }
    let main = FOLDERS
        .iter()
        .map(|folder| Path::new(folder).join("systemd/networkd.conf"))
        .find(|path| path.exists());
    let mut leaves = false;
    for path in main.iter().chain(files.values()) {
        let text = fs::read_to_string(path).unwrap_or_default();
        let mut section = "";
        for line in text.lines().map(str::trim) {
            if line.starts_with('[') {
                section = line;
            } else if section == "[Network]"
                && let Some((key, value)) = line.split_once('=')
                && key.trim() == "ManageForeignRoutingPolicyRules"
            {
                let value = value.trim().to_ascii_lowercase();
                leaves = matches!(&value[..], "no" | "n" | "false" | "f" | "off" | "0");
            }
        }
    }
    leaves
}

/// Entries of ours that somebody has saved come back at boot, for yesterday's address.
fn persistent() -> Option<Finding> {
    let file = "/etc/iptables/rules.v4";
    let text = fs::read_to_string(file).ok()?;
    let ruleset = Ruleset::parse(&text).ok()?;
    let (_, state) = owned(None, ruleset);
    let steps = diff(&state, &State::default());
    let entries: usize = steps
        .iter()
        .map(Step::changes)
        .map(|changes| changes.len())
        .sum();
    (!state.tables.is_empty()).then(|| {
        let what = format!(
            "{file} holds {} of ours, that netfilter-persistent brings back at boot, whatever the links' addresses are then",
            count(entries, "entry", "entries")
        );
        Finding::harms("persistent-rules", what).mend(format!(
            "sed -i -E '/^:mh-|-A mh-|(-j|-g|--comment) \"?mh-/d' {file}"
        ))
    })
}
