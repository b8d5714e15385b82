//! Runs the steps of a plan with as few processes as possible, and reports which steps were done.

use anyhow::{Error, Result, anyhow};
use log::{Level, info, log};

use crate::kernel::ip;
use crate::kernel::process::{Output, Process};
use crate::kernel::sysctl;
use crate::kernel::tools::{OnError, Tools};
use crate::reconcile::command::value;
use crate::reconcile::diff::{Change, Step};

#[derive(Debug, Default)]
pub struct Outcome {
    pub added: usize,
    pub removed: usize,
    /// The steps that failed, and why.
    pub errors: Vec<Error>,
}

/// How many changes are logged one by one at level info. journald drops messages after the first 10,000 in 30 seconds
/// (`RateLimitBurst=`, journald.conf(5)), and the summary comes last.
const MAX_TOLD: usize = 100;

/// The level at which the next change is logged, after so many. Says once that the rest needs -v.
pub fn level(told: usize) -> Level {
    if told < MAX_TOLD {
        return Level::Info;
    }
    if told == MAX_TOLD {
        info!("more than {MAX_TOLD} changes: -v tells each");
    }
    Level::Debug
}

impl Outcome {
    fn done(&mut self, step: &Step, tools: &Tools) {
        for (change, command) in step.changes() {
            let level = level(self.added + self.removed);
            log!(level, "{}", command.by(tools.iptables));
            match change {
                Change::Add | Change::Replace => self.added += 1,
                Change::Delete => self.removed += 1,
            }
        }
    }
}

/// Runs the steps in order. Consecutive steps of one tool are one call of that tool.
pub fn apply<'a>(tools: &Tools, steps: &'a [Step], on_error: OnError) -> Outcome {
    let mut outcome = Outcome::default();
    let groups: Vec<&[Step]> = steps.chunk_by(|a, b| kind(a) == kind(b)).collect();
    // All tools start at once, but each is given its input only after the tool before it has ended: starting a tool takes
    // longer than its work on a few entries.
    let mut starts = groups
        .iter()
        .map(|group| (*group, start(tools, group, on_error)));
    let give = |(group, tool): (&'a [Step], Option<Result<Process>>)| {
        (group, tool.map(|tool| tool?.given(input(group).collect())))
    };
    let first = starts.next().map(give);
    let others: Vec<_> = starts.collect();
    for (group, tool) in first.into_iter().chain(others.into_iter().map(give)) {
        match tool.map(|tool| tool?.finish()) {
            None => parameters(tools, group, &mut outcome),
            Some(Err(error)) => outcome.errors.push(error),
            Some(Ok(output)) if output.status.success() => {
                group.iter().for_each(|step| outcome.done(step, tools));
            }
            Some(Ok(output)) => match kind(&group[0]) {
                Kind::Ip => ip_failed(tools, group, on_error, &output, &mut outcome),
                _ => iptables_failed(tools, group, &output, &mut outcome),
            },
        }
        if on_error == OnError::Stop && !outcome.errors.is_empty() {
            break;
        }
    }
    outcome
}

#[derive(PartialEq, Eq)]
enum Kind {
    Ip,
    Iptables,
    File,
}

fn kind(step: &Step) -> Kind {
    match step {
        Step::Route(..) | Step::RouteRule(..) => Kind::Ip,
        Step::Chain { .. } | Step::Entry(..) => Kind::Iptables,
        Step::SrcValidMark(..) => Kind::File,
    }
}

fn first_command(step: &Step) -> String {
    let commands = step.commands();
    commands
        .first()
        .map(|(_, command)| command.to_string())
        .unwrap_or_default()
}

/// Starts the tool for steps of one kind. None if the steps write files.
fn start(tools: &Tools, steps: &[Step], on_error: OnError) -> Option<Result<Process>> {
    match kind(&steps[0]) {
        Kind::Ip => Some(tools.ip_batch(on_error)),
        Kind::Iptables => Some(tools.iptables_restore()),
        Kind::File => None,
    }
}

/// The input of the tool for steps of one kind, in whole lines.
fn input(steps: &[Step]) -> impl Iterator<Item = String> {
    let tables = steps.chunk_by(|a, b| a.table() == b.table());
    tables.flat_map(|steps| {
        let table = steps[0].table();
        let begin = table.map(|table| format!("*{table}\n"));
        let end = table.map(|_| format!("{COMMIT}\n"));
        let lines = steps.iter().map(lines);
        begin.into_iter().chain(lines).chain(end)
    })
}

/// The lines that carry out a step, in the input of its tool.
pub fn lines(step: &Step) -> String {
    let commands = step.commands().into_iter();
    commands.filter_map(|(_, command)| command.line()).collect()
}

/// The last line of each table.
const COMMIT: &str = "COMMIT";

fn ip_failed(
    tools: &Tools,
    steps: &[Step],
    on_error: OnError,
    output: &Output,
    outcome: &mut Outcome,
) {
    let failures = ip::failures(&output.stderr);
    let known = failures.iter().any(|(line, _)| *line > 0);
    for (index, step) in steps.iter().enumerate() {
        if let Some((_, words)) = failures.iter().find(|(line, _)| *line == index + 1) {
            let (command, ending, advice) = (first_command(step), output.ending(), advice(words));
            let error = anyhow!("{command}: {ending}: {words}{advice}");
            outcome.errors.push(error);
            if on_error == OnError::Stop {
                return;
            }
        } else if known {
            outcome.done(step, tools);
        }
    }
    if !known {
        let error = anyhow!("ip -batch: {}", output.failure());
        outcome.errors.push(error);
    }
}

fn iptables_failed(tools: &Tools, steps: &[Step], output: &Output, outcome: &mut Outcome) {
    // Each table is one transaction: the tables before the failed line are committed.
    let failed = failed_line(&output.stderr).unwrap_or(0);
    let input: String = input(steps).collect();
    let ahead = input.lines().take(failed.saturating_sub(1));
    let done = ahead.filter(|line| *line == COMMIT).count();
    for group in steps.chunk_by(|a, b| a.table() == b.table()).take(done) {
        group.iter().for_each(|step| outcome.done(step, tools));
    }
    let line = input.lines().nth(failed.wrapping_sub(1));
    let line = line.filter(|line| *line != COMMIT);
    let line = line.map(|line| format!(" at {line:?}")).unwrap_or_default();
    let (failure, advice) = (output.failure(), advice(&output.stderr));
    let error = anyhow!("iptables-restore{line}: {failure}{advice}");
    outcome.errors.push(error);
}

/// The line number in the error message of either backend: `line 5 failed`, `Error occurred at line: 5`.
fn failed_line(stderr: &str) -> Option<usize> {
    let words = stderr.split(|c: char| !c.is_ascii_alphanumeric());
    let mut words = words.filter(|word| !word.is_empty());
    words.find(|word| *word == "line")?;
    words.next()?.parse().ok()
}

fn parameters(tools: &Tools, steps: &[Step], outcome: &mut Outcome) {
    for step in steps {
        let Step::SrcValidMark(change, interface) = step else {
            continue;
        };
        let path = sysctl::src_valid_mark(interface.as_str());
        match sysctl::write(&path, value(*change)) {
            Ok(()) => outcome.done(step, tools),
            Err(error) => {
                let error = anyhow!("{}: {error}", first_command(step));
                outcome.errors.push(error);
            }
        }
    }
}

/// What to do about the most frequent errors of the tools.
fn advice(words: &str) -> &'static str {
    if words.contains("File exists") {
        " (an entry that is not mh-hook's stands in its place: see ip rule and ip route show table all, and delete it)"
    } else if words.contains("not permitted") || words.contains("Permission denied") {
        " (it needs the capability NET_ADMIN)"
    } else if words.contains("Cannot find device") || words.contains("Network is down") {
        " (the link went away meanwhile; its next event, or mh-hook sync, sets this right)"
    } else if words.contains("xtables lock") {
        " (another program holds the lock of iptables: see who with fuser /run/xtables.lock)"
    } else {
        ""
    }
}
