//! What is missing and what is extra, with the same numbers in status and check.

use crate::reconcile::command::Command;
use crate::reconcile::diff::{Change, Step};

/// What makes the installed entries the desired ones, as command lines.
#[derive(Debug, Default)]
pub struct Drift {
    /// Those that add what is desired and not installed.
    pub missing: Vec<String>,
    /// Those that remove what is installed and not desired.
    pub extra: Vec<String>,
}

impl Drift {
    /// The commands to paste into a shell: those for what is extra first.
    pub fn commands(steps: &[Step]) -> Self {
        Self::collect(steps.iter().flat_map(Step::commands))
    }

    /// One command for each entry, to count and to show. A chain that is written anew counts only the rules that differ;
    /// one whose rules are in another order, or that is empty, counts by its commands.
    pub fn entries(steps: &[Step]) -> Self {
        Self::collect(steps.iter().flat_map(|step| {
            let changes = step.changes();
            match changes.is_empty() {
                true => step.commands(),
                false => changes,
            }
        }))
    }

    fn collect<'a>(commands: impl Iterator<Item = (Change, Command<'a>)>) -> Self {
        let mut drift = Self::default();
        for (change, command) in commands {
            let lines = match change {
                Change::Add | Change::Replace => &mut drift.missing,
                Change::Delete => &mut drift.extra,
            };
            lines.push(command.to_string());
        }
        drift
    }

    /// `2 of 17 entries missing, 1 extra`; none where nothing is. `desired` is the number of entries that there should be.
    pub fn summary(&self, desired: usize) -> Option<String> {
        let (missing, extra) = (self.missing.len(), self.extra.len());
        match (missing, extra) {
            (0, 0) => None,
            (0, 1) => Some("1 entry extra".into()),
            (0, extra) => Some(format!("{extra} entries extra")),
            (missing, 0) => Some(format!("{missing} of {desired} entries missing")),
            (missing, extra) => Some(format!(
                "{missing} of {desired} entries missing, {extra} extra"
            )),
        }
    }
}
