//! `mh-hook check`: finds what keeps forwards from working, in the configuration and the system, and tells what fixes it.
//! Each file in this folder checks one subject; this one has the nouns, the order of the checks, and the printed text.

use anyhow::{Error, Result};
use serde::Serialize;

use crate::config::{Config, Errors, Uplink};
use crate::inspect::report::{Detail, Report, Style, Tone, few};
use crate::inspect::snapshot::{Comparison, Snapshot};
use crate::model::link::UplinkLink;
use crate::model::names::UplinkName;

mod firewall;
mod forwards;
mod handmade;
mod hooks;
mod kernel_config;
mod links;
mod peers;
mod routing;
mod services;
mod sysctl;
mod versions;

/// The findings, and how much was checked.
#[derive(Debug, Serialize)]
pub struct Check {
    /// The worst severity of a finding, for monitoring.
    pub health: Health,
    /// By severity; of the same severity, in the order in which a packet passes.
    pub findings: Vec<Finding>,
    /// How much was checked.
    pub looked_at: Scope,
    /// The worst severity with which the exit status is 0.
    #[serde(skip)]
    tolerated: Severity,
}

/// Whether all is well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    Ok,
    Warning,
    Error,
}

/// How much was checked; foreign entries count, too.
#[derive(Debug, Serialize)]
pub struct Scope {
    pub uplinks: usize,
    pub forwards: usize,
    pub route_rules: usize,
    pub routes: usize,
    /// Of both backends.
    pub iptables_rules: usize,
}

impl Scope {
    fn new(snapshot: &Snapshot, config: Option<&Config>) -> Self {
        let uplinks = config.iter().flat_map(|config| config.uplinks.values());
        let rulesets = snapshot.rulesets.iter();
        let tables = rulesets.flat_map(|(_, ruleset)| ruleset.tables.values());
        let chains = tables.flat_map(|table| table.values());
        Self {
            uplinks: uplinks.clone().count(),
            forwards: uplinks.map(|uplink| uplink.forwards.len()).sum(),
            route_rules: snapshot.kernel.routing.rules.len(),
            routes: snapshot.kernel.routing.routes.len(),
            iptables_rules: chains.map(|chain| chain.rules.len()).sum(),
        }
    }
}

/// Something that is wrong, or worth knowing.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    /// Never changes, so that programs can rely on it.
    pub id: &'static str,
    pub severity: Severity,
    pub uplink: Option<String>,
    pub what: String,
    /// The commands for the entries that it counts, which the text has with `-v` only.
    pub entries: Vec<String>,
    /// What fixes it, in order: commands, or lines of a file that is named.
    #[serde(rename = "fix")]
    pub fixes: Vec<String>,
}

/// How bad a finding is; the worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Forwards do not work.
    Error,
    /// Something else does not work, or forwards will not after the next restart.
    Warning,
    /// Worth knowing; may be intended.
    Info,
}

impl Finding {
    fn new(severity: Severity, id: &'static str, what: impl Into<String>) -> Self {
        Self {
            id,
            severity,
            uplink: None,
            what: what.into(),
            entries: Vec::new(),
            fixes: Vec::new(),
        }
    }

    fn error(id: &'static str, what: impl Into<String>) -> Self {
        Self::new(Severity::Error, id, what)
    }

    fn warning(id: &'static str, what: impl Into<String>) -> Self {
        Self::new(Severity::Warning, id, what)
    }

    fn info(id: &'static str, what: impl Into<String>) -> Self {
        Self::new(Severity::Info, id, what)
    }

    fn of(mut self, uplink: &UplinkName) -> Self {
        self.uplink = Some(uplink.to_string());
        self
    }

    fn fix(mut self, line: impl Into<String>) -> Self {
        self.fixes.push(line.into());
        self
    }

    fn error_if(mut self, is_error: bool) -> Self {
        if is_error {
            self.severity = Severity::Error;
        }
        self
    }
}

/// What the checks that need a configuration look at.
struct View<'a> {
    snapshot: &'a Snapshot,
    config: &'a Config,
    comparison: Comparison,
}

impl View<'_> {
    fn is_link(&self, interface: &str) -> bool {
        let mut links = self.comparison.links.values().flatten();
        links.any(|link| link.interface.as_str() == interface)
    }

    /// The uplinks that have forwards.
    fn serving(&self) -> impl Iterator<Item = (&UplinkName, &Uplink)> {
        let uplinks = self.config.uplinks.iter();
        uplinks.filter(|(_, uplink)| !uplink.forwards.is_empty())
    }

    /// The uplinks that have forwards and whose link is up.
    fn serving_links(&self) -> impl Iterator<Item = (&UplinkName, &Uplink, &UplinkLink)> {
        self.serving().filter_map(|(name, uplink)| {
            Some((name, uplink, self.comparison.links.get(name)?.as_ref()?))
        })
    }
}

/// Runs all checks. Where the configuration does not hold, only those that need none.
/// Errors: a tool can't be run, or its answer can't be read.
pub fn check(
    snapshot: &Snapshot,
    config: Result<&Config, &Error>,
    tolerated: Severity,
) -> Result<Check> {
    let root = &snapshot.root;
    let looked_at = Scope::new(snapshot, config.ok());
    let mut findings = config.err().map(configuration).unwrap_or_default();
    let needs_system = config.is_err() || looked_at.uplinks > 0;
    if needs_system {
        findings.extend(sysctl::forwarding(root));
    } else {
        let what =
            "the configuration has no uplinks, so there is nothing to do: see mh-hook.toml(5)";
        findings.push(Finding::info("no-uplinks", what));
    }
    findings.extend(links::tables(snapshot, config.ok()));
    if let Ok(config) = config {
        match snapshot.compare(config) {
            Ok(comparison) => findings.extend(configured(&View {
                snapshot,
                config,
                comparison,
            })?),
            Err(error) => findings.push(Finding::error("address", format!("{error:#}"))),
        }
    }
    if needs_system {
        findings.extend(routing::default_route(snapshot));
    }
    findings.extend(firewall::backends(snapshot));
    findings.extend(firewall::nftables(snapshot));
    // Without it an uplink that pppd dials is never served.
    let dials = config.is_ok_and(|config| !peers::peers(root, config).is_empty());
    let needed = match dials {
        true => Severity::Error,
        false => Severity::Warning,
    };
    findings.extend(hooks::check(root, needed));
    findings.extend(services::check(root));
    findings.extend(versions::check(snapshot)?);
    findings.extend(kernel_config::check(snapshot));
    findings.sort_by_key(|finding| finding.severity);
    let health = match findings.first().map(|finding| finding.severity) {
        Some(Severity::Error) => Health::Error,
        Some(Severity::Warning) => Health::Warning,
        Some(Severity::Info) | None => Health::Ok,
    };
    Ok(Check {
        health,
        findings,
        looked_at,
        tolerated,
    })
}

/// The checks that need a configuration.
fn configured(view: &View) -> Result<Vec<Finding>> {
    let troubles = view.comparison.troubles.values();
    let troubles = troubles.map(|error| Finding::error("address", format!("{error:#}")));
    let mut findings: Vec<Finding> = troubles.collect();
    findings.extend(links::check(view));
    findings.extend(sysctl::per_link(view));
    let routes = routing::targets(view)?;
    findings.extend(routing::check(view, &routes)?);
    findings.extend(firewall::check(view, &routes));
    findings.extend(forwards::check(view));
    findings.extend(peers::check(view));
    // Last: where something else is wrong, entries are missing because of it.
    findings.extend(links::entries(view));
    if let Some(by_hand) = handmade::check(view) {
        findings.retain(|finding| !handmade::is_consequence(finding));
        findings.insert(0, by_hand);
    }
    Ok(findings)
}

/// Each problem of the configuration is a finding.
fn configuration(error: &Error) -> Vec<Finding> {
    let lines: Vec<String> = match error.downcast_ref::<Errors>() {
        Some(errors) => errors.lines().map(|(line, _)| line.to_owned()).collect(),
        None => vec![format!("{error:#}")],
    };
    let findings = lines
        .into_iter()
        .map(|line| Finding::error("configuration", line));
    findings.collect()
}

impl Report for Check {
    fn text(&self, style: Style) -> String {
        if self.findings.is_empty() {
            let Scope {
                uplinks,
                forwards,
                route_rules,
                routes,
                iptables_rules,
            } = self.looked_at;
            let line = format!(
                "{}: {}, {}, {route_rules} routing rules, {routes} routes, {iptables_rules} iptables rules, \
                 kernel parameters and files",
                style.paint(Tone::Good, "nothing found"),
                count(uplinks, "uplink", "uplinks"),
                count(forwards, "forward", "forwards"),
            );
            return style.wrap(&line, 2);
        }
        let mut text = String::new();
        for finding in &self.findings {
            let severity = match finding.severity {
                Severity::Error => style.paint(Tone::Bad, "error"),
                Severity::Warning => style.paint(Tone::Doubtful, "warning"),
                Severity::Info => style.paint(Tone::Strong, "info"),
            };
            let uplink = finding.uplink.as_ref().map(|name| format!("{name}: "));
            let uplink = uplink.unwrap_or_default();
            let mut line = format!("{severity}: {uplink}{}", finding.what);
            let in_line = finding.fixes == [SYNC];
            if in_line {
                line += &format!(": {SYNC}");
            }
            text += &style.wrap(&line, 2);
            let entries = finding.entries.iter();
            let shown = entries.filter(|_| style.detail == Detail::Full);
            text.extend(shown.map(|entry| format!("    # {entry}\n")));
            // In one line each, to be pasted.
            let fixes = finding.fixes.iter().filter(|_| !in_line);
            text.extend(fixes.map(|fix| format!("    {fix}\n")));
        }
        text
    }

    fn is_well(&self) -> bool {
        let mut severities = self.findings.iter().map(|finding| finding.severity);
        severities.all(|severity| severity >= self.tolerated)
    }
}

/// What brings our entries in step.
const SYNC: &str = "mh-hook sync";

/// `1 entry`, `2 entries`.
fn count(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}
