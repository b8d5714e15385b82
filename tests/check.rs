//! Folders of a router with one fault, and what `check` finds there.
//!
//! `tests/check/00-a-router-that-works/` holds `root`, the files of a router below `/`, its tools among them; `links`, an
//! interface a line; `routing`, routes and rules; `iptables-save`; `answers`, a line for each command of those tools; and
//! `findings`, which is empty. Each other `tests/check/NN-name/` holds what is different: files of these names, `root`
//! with files to be added or replaced, `removed` with paths below it, `modes` (`666 etc/ppp/ip-up`), and answers that come
//! ahead of the others. `CHECK_WRITE=1 cargo test --test check` writes the findings anew, for `git diff` to show.

mod listing;

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Error, anyhow};
use mh_hook::config::Config;
use mh_hook::inspect::check::{Check, Severity, check};
use mh_hook::inspect::report::{Report, Style};
use mh_hook::inspect::snapshot::Snapshot;
use mh_hook::inspect::status::{Status, status};
use mh_hook::kernel::iptables_save::Ruleset;
use mh_hook::kernel::observe::Kernel;
use mh_hook::kernel::pppd;
use mh_hook::kernel::root::Root;
use mh_hook::kernel::tools::Tools;

const ROUTER: &str = "tests/check/00-a-router-that-works";

/// The findings that need the other backend: tests/flow/check.bash has them.
const ELSEWHERE: [&str; 2] = ["both-backends", "ours-in-the-other-backend"];

#[test]
fn every_fault_is_found_and_status_counts_the_same_entries() {
    let mut failures = String::new();
    let mut ids: BTreeSet<&str> = ELSEWHERE.into();
    let cases = entries(Path::new("tests/check"));
    assert!(cases.len() > 10, "too few cases: {}", cases.len());
    let mut drifted = 0;
    for case in cases {
        let Case { snapshot, config } = Case::read(&case);
        let check = check(&snapshot, config.as_ref(), Severity::Warning).expect("findings");
        // A recipe made by hand is told in place of what is missing because of it.
        let is_by_hand = check.findings.iter().any(|finding| finding.id == "by-hand");
        if let Some(status) = config
            .ok()
            .filter(|_| !is_by_hand)
            .and_then(|it| status(&snapshot, &it, None).ok())
        {
            let of_check = drifts(&check);
            drifted += of_check.len();
            assert_eq!(drifts_of_status(&status), of_check, "{}", case.display());
        }
        ids.extend(check.findings.iter().map(|finding| finding.id));
        let found = text(&check);
        let path = case.join("findings");
        if std::env::var_os("CHECK_WRITE").is_some() {
            fs::write(&path, &found).expect("write the findings");
        }
        let expected = fs::read_to_string(&path).unwrap_or_default();
        if expected != found {
            let diff = listing::differences(&expected, &found);
            let _ = writeln!(failures, "--- {}\n{diff}", case.display());
        }
    }
    assert!(failures.is_empty(), "\n{failures}");
    assert!(drifted > 5, "only {drifted} uplinks have drifted");
    for id in all_ids() {
        assert!(ids.contains(&id[..]), "no case shows {id}");
    }
}

/// The ids in the sources of check.
fn all_ids() -> BTreeSet<String> {
    let mut ids = BTreeSet::new();
    for source in entries(Path::new("src/inspect/check")) {
        let text = fs::read_to_string(source).expect("a source");
        for call in ["Finding::error(", "Finding::warning(", "Finding::info("] {
            let arguments = text.split(call).skip(1);
            let names = arguments.filter_map(|text| text.trim_start().strip_prefix('"'));
            ids.extend(names.filter_map(|name| Some(name.split_once('"')?.0.to_owned())));
        }
    }
    assert!(ids.len() > 30, "only {} ids", ids.len());
    ids
}

/// A router with its configuration, or why that does not hold.
struct Case {
    snapshot: Snapshot,
    config: Result<Config, Error>,
}

impl Case {
    fn read(case: &Path) -> Self {
        let name = case.file_name().expect("a name");
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join("check")
            .join(name);
        let _ = fs::remove_dir_all(&folder);
        copy(&Path::new(ROUTER).join("root"), &folder);
        copy(&case.join("root"), &folder);
        let of_case = |file: &str| fs::read_to_string(case.join(file));
        let of_router = |file: &str| fs::read_to_string(Path::new(ROUTER).join(file));
        for path in of_case("removed").unwrap_or_default().lines() {
            let path = folder.join(path);
            match path.is_dir() {
                true => fs::remove_dir_all(path),
                false => fs::remove_file(path),
            }
            .expect("what is removed was there");
        }
        for line in of_case("modes").unwrap_or_default().lines() {
            let (mode, path) = line.split_once(' ').expect("a mode and a path");
            set_mode(
                &folder.join(path),
                u32::from_str_radix(mode, 8).expect("a mode"),
            );
        }
        let answers =
            of_case("answers").unwrap_or_default() + &of_router("answers").expect("answers");
        fs::write(folder.join("answers"), answers).expect("write the answers");

        let read = |file: &str| {
            of_case(file)
                .or_else(|_| of_router(file))
                .expect("a listing")
        };
        let root = Root::at(&folder);
        let tools = Tools::find_below(&root, Instant::now() + Duration::from_secs(60));
        let kernel = Kernel {
            routing: listing::routing(&read("routing")),
            ruleset: Ruleset::parse(&read("iptables-save")).expect("rules"),
            links: listing::links(&read("links")),
            dialled: pppd::dialled(&root),
        };
        let config = root.read("/etc/mh-hook.toml").expect("a configuration");
        let config = Config::parse(&config).map_err(|problems| {
            let messages = problems.iter().map(|problem| problem.message.clone());
            anyhow!(messages.collect::<Vec<_>>().join("; "))
        });
        let snapshot = Snapshot::new(root, tools.expect("the tools"), kernel);
        Self {
            snapshot: snapshot.expect("a snapshot"),
            config,
        }
    }
}

/// Each drifted uplink, and by how much: `isp0: 2 of 17 entries missing, 1 extra`.
fn drifts(check: &Check) -> Vec<String> {
    let drifts = check
        .findings
        .iter()
        .filter(|finding| finding.id == "drift");
    let mut lines: Vec<String> = drifts
        .map(|finding| {
            let uplink = finding.uplink.as_deref().unwrap_or_default();
            format!("{uplink}: {}", finding.what)
        })
        .collect();
    lines.sort();
    lines
}

/// The same lines of status.
fn drifts_of_status(status: &Status) -> Vec<String> {
    let text = status.text(Style::PLAIN);
    let lines = text
        .lines()
        .filter_map(|line| line.strip_suffix(": mh-hook sync"));
    let drifts = lines.filter(|line| line.contains(" entries missing") || line.contains(" extra"));
    drifts.map(str::to_owned).collect()
}

/// `error drift isp0: 1 entry is missing: …`, and below it what fixes that.
fn text(check: &Check) -> String {
    let mut text = String::new();
    for finding in &check.findings {
        let severity = format!("{:?}", finding.severity).to_lowercase();
        let uplink = finding.uplink.as_ref().map(|name| format!(" {name}"));
        let _ = writeln!(
            text,
            "{severity} {}{}: {}",
            finding.id,
            uplink.unwrap_or_default(),
            finding.what
        );
        for line in &finding.entries {
            let _ = writeln!(text, "    # {line}");
        }
        for line in &finding.fixes {
            let _ = writeln!(text, "    {line}");
        }
    }
    text
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.expect("an entry").path())
        .collect();
    paths.sort();
    paths
}

/// Copies a tree, with the modes that git keeps, whatever the umask is.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("make a folder");
    set_mode(to, 0o755);
    for path in entries(from) {
        let target = to.join(path.file_name().expect("a name"));
        if let Ok(link) = fs::read_link(&path) {
            let _ = fs::remove_file(&target);
            symlink(link, target).expect("make a link");
        } else if path.is_dir() {
            copy(&path, &target);
        } else {
            let _ = fs::remove_file(&target);
            fs::write(&target, fs::read(&path).expect("a file")).expect("write a file");
            let mode = fs::metadata(&path).expect("a mode").permissions().mode();
            set_mode(&target, if mode & 0o100 == 0 { 0o644 } else { 0o755 });
        }
    }
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).expect("set a mode");
}
