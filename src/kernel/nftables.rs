//! Everybody's rules of nftables, as `nft -j list ruleset` prints them (libnftables-json(5)). Expressions stay JSON: who
//! evaluates them knows which ones it understands.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::{Map, Value};

/// A table by its family and name.
pub type TableKey = (String, String);

#[derive(Clone, Debug, Default)]
pub struct Nftables {
    pub tables: BTreeMap<TableKey, Table>,
}

#[derive(Clone, Debug, Default)]
pub struct Table {
    pub chains: BTreeMap<String, Chain>,
    /// The elements of named sets and maps; those of a map are pairs.
    pub sets: BTreeMap<String, Vec<Value>>,
}

#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// None for a chain that is only jumped to.
    pub base: Option<Base>,
    pub rules: Vec<Rule>,
}

/// What makes a chain one that the kernel asks by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// `filter`, `nat` or `route`.
    pub kind: String,
    /// `prerouting`, `input`, `forward`, `output`, `postrouting`, `ingress` or `egress`.
    pub hook: String,
    /// Chains with a lower one are asked first.
    pub priority: i32,
    /// Whether the policy is to drop.
    pub drops: bool,
    /// The interfaces that an ingress or egress chain is for.
    pub devices: Vec<String>,
}

#[derive(Clone, Debug)]
pub struct Rule {
    pub handle: u64,
    pub expressions: Vec<Value>,
}

impl Nftables {
    /// Parses what `nft -j list ruleset` prints.
    /// Errors: it is not such JSON.
    pub fn parse(json: &str) -> Result<Self> {
        let parsed: Value = serde_json::from_str(json).context("read what nft -j prints")?;
        let objects = parsed.get("nftables").and_then(Value::as_array);
        let objects = objects.context("read what nft -j prints: it has no list \"nftables\"")?;
        let mut all = Self::default();
        for object in objects.iter().filter_map(Value::as_object) {
            for (kind, object) in object {
                if let Some(object) = object.as_object() {
                    all.add(kind, object);
                }
            }
        }
        Ok(all)
    }

    fn add(&mut self, kind: &str, object: &Map<String, Value>) {
        let word = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default();
        let name = match kind {
            "table" => word("name"),
            _ => word("table"),
        };
        if name.is_empty() {
            return;
        }
        let key = (word("family").to_owned(), name.to_owned());
        let table = self.tables.entry(key).or_default();
        let list = |key: &str| match object.get(key) {
            Some(Value::Array(items)) => items.clone(),
            Some(Value::Null) | None => Vec::new(),
            Some(one) => vec![one.clone()],
        };
        match kind {
            "chain" => {
                let chain = table.chains.entry(word("name").to_owned()).or_default();
                let devices = list("dev").into_iter();
                chain.base = object.get("hook").is_some().then(|| Base {
                    kind: word("type").to_owned(),
                    hook: word("hook").to_owned(),
                    priority: object.get("prio").and_then(Value::as_i64).unwrap_or(0) as i32,
                    drops: word("policy") == "drop",
                    devices: devices
                        .filter_map(|it| Some(it.as_str()?.to_owned()))
                        .collect(),
                });
            }
            "rule" => {
                let chain = table.chains.entry(word("chain").to_owned()).or_default();
                chain.rules.push(Rule {
                    handle: object.get("handle").and_then(Value::as_u64).unwrap_or(0),
                    expressions: list("expr"),
                });
            }
            "set" | "map" => {
                table.sets.insert(word("name").to_owned(), list("elem"));
            }
            _ => {}
        }
    }
}

/// A rule or an expression in nft's notation, as far as it is known here; else as JSON.
pub fn text(expressions: &[Value]) -> String {
    let texts: Vec<String> = expressions
        .iter()
        .map(statement)
        .filter(|text| !text.is_empty())
        .collect();
    texts.join(" ")
}

fn statement(value: &Value) -> String {
    let Some((kind, body)) = only(value) else {
        return operand(value);
    };
    match kind {
        "match" => {
            let part = |key: &str| body.get(key).map(operand).unwrap_or_default();
            match body.get("op").and_then(Value::as_str) {
                Some("==" | "in") | None => format!("{} {}", part("left"), part("right")),
                Some(op) => format!("{} {op} {}", part("left"), part("right")),
            }
        }
        "counter" => String::new(),
        "accept" | "drop" | "return" | "continue" | "notrack" => kind.to_owned(),
        "jump" | "goto" => {
            let target = body.get("target").and_then(Value::as_str);
            format!("{kind} {}", target.unwrap_or_default())
        }
        "mangle" => {
            let part = |key: &str| body.get(key).map(operand).unwrap_or_default();
            format!("{} set {}", part("key"), part("value"))
        }
        "vmap" => {
            let part = |key: &str| body.get(key).map(operand).unwrap_or_default();
            format!("{} vmap {}", part("key"), part("data"))
        }
        "dnat" | "snat" | "redirect" | "masquerade" => {
            let address = body.get("addr").map(operand).unwrap_or_default();
            let port = body.get("port").map(|port| format!(":{}", operand(port)));
            let to = format!("{address}{}", port.unwrap_or_default());
            match &to[..] {
                "" => kind.to_owned(),
                to => format!("{kind} to {to}"),
            }
        }
        "xt" => {
            let name = body.get("name").and_then(Value::as_str);
            format!("xt {}", name.unwrap_or_default())
        }
        "reject" | "log" => kind.to_owned(),
        _ => value.to_string(),
    }
}

/// A key or a value of a match.
fn operand(value: &Value) -> String {
    let list = |items: &Value, separator: &str| {
        let items = items.as_array().map(Vec::as_slice).unwrap_or_default();
        let items: Vec<String> = items.iter().map(operand).collect();
        items.join(separator)
    };
    let Some((kind, body)) = only(value) else {
        return match value {
            Value::String(text) if text.contains(' ') => format!("\"{text}\""),
            Value::String(text) => text.clone(),
            Value::Array(_) => list(value, ","),
            other => other.to_string(),
        };
    };
    let word = |key: &str| body.get(key).map(operand).unwrap_or_default();
    match kind {
        "meta" if word("key").starts_with(['i', 'o']) => word("key"),
        "meta" => format!("meta {}", word("key")),
        "ct" => match &word("dir")[..] {
            "" => format!("ct {}", word("key").trim_matches('"')),
            dir => format!("ct {dir} {}", word("key").trim_matches('"')),
        },
        "payload" => format!("{} {}", word("protocol"), word("field")),
        "fib" => format!("fib {} {}", word("flags"), word("result")),
        "prefix" => format!("{}/{}", word("addr"), word("len")),
        "range" => list(body, "-"),
        "set" => format!("{{ {} }}", list(body, ", ")),
        "concat" => list(body, " . "),
        "elem" => word("val"),
        "&" | "|" | "^" => list(body, &format!(" {kind} ")),
        _ => value.to_string(),
    }
}

/// The only key of an object, and what is behind it.
pub fn only(value: &Value) -> Option<(&str, &Value)> {
    let (key, value) = value.as_object()?.iter().next()?;
    Some((key, value))
}
