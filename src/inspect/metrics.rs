//! Metrics in the text format of Prometheus, for the textfile collector of its node_exporter (Prometheus documentation,
//! EXPOSITION FORMATS).

use std::fmt::Display;

/// A text of metrics, one after the other.
#[derive(Debug, Default)]
pub struct Metrics(String);

/// The labels of a sample, as names and values.
pub type Labels<'a> = Vec<(&'static str, &'a str)>;

impl Metrics {
    /// Adds a metric with its samples; one whose value is not known is left out.
    pub fn add<'a, T: Display>(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        samples: impl IntoIterator<Item = (Labels<'a>, Option<T>)>,
    ) {
        self.0 += &format!("# HELP {name} {help}\n# TYPE {name} {kind}\n");
        for (labels, value) in samples {
            let Some(value) = value else { continue };
            let labels: Vec<String> = labels
                .iter()
                .map(|(label, value)| format!("{label}=\"{}\"", escaped(value)))
                .collect();
            let labels = match &labels[..] {
                [] => String::new(),
                labels => format!("{{{}}}", labels.join(",")),
            };
            self.0 += &format!("{name}{labels} {value}\n");
        }
    }

    pub fn text(self) -> String {
        self.0
    }
}

/// A label's value with backslashes, quotes and line ends escaped.
fn escaped(value: &str) -> String {
    let value = value.replace('\\', "\\\\").replace('"', "\\\"");
    value.replace('\n', "\\n")
}
