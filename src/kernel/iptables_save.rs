//! The one parser of iptables-save, for everybody's rules; `reconcile::ownership` picks ours out of them. What can't be
//! read is an error, and never taken for a table without rules.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::model::netfilter::{Rule, Rules, is_before_name};

/// The tables of one backend.
#[derive(Clone, Debug, Default)]
pub struct Ruleset {
    /// Each table's chains, by name.
    pub tables: BTreeMap<String, BTreeMap<String, Chain>>,
    /// Tables that iptables-save does not list, because nftables rules in them can't be written as iptables rules. What
    /// they hold is unknown.
    pub incompatible: BTreeSet<String>,
}

/// A chain.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// The policy of a built-in chain: what happens to a packet at its end. None for a user-defined chain.
    pub policy: Option<String>,
    /// The rules in their order.
    pub rules: Rules,
    /// The counters of each rule, in the same order.
    pub counters: Vec<Counter>,
}

/// The packets that matched a rule. Zero unless `iptables-save -c` was asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Counter {
    pub packets: u64,
    pub bytes: u64,
}

impl Counter {
    /// The sum of both.
    pub fn plus(self, other: Self) -> Self {
        Self {
            packets: self.packets + other.packets,
            bytes: self.bytes + other.bytes,
        }
    }
}

impl Ruleset {
    /// Parses the output of `iptables-save` or `iptables-save -c`.
    ///
    /// # Errors
    /// A line that iptables-save does not print, or the output is cut short.
    pub fn parse(save: &str) -> Result<Self> {
        let mut ruleset = Self::default();
        let mut table: Option<String> = None;
        let (mut line, mut rest) = ("", save);
        while !rest.is_empty() {
            (line, rest) = split_line(rest)?;
            let added = ruleset.add(line, &mut table);
            added.with_context(|| format!("read what iptables-save prints: {:?}", shown(line)))?;
        }
        if let Some(table) = table {
            bail!(
                "iptables-save ended in the middle of table {table}, after {:?}",
                shown(line)
            );
        }
        Ok(ruleset)
    }

    /// Adds a line. `table` is the table that the line is in, and then the table that the next line is in.
    fn add(&mut self, line: &str, table: &mut Option<String>) -> Result<()> {
        if line.is_empty() || line.starts_with('#') {
            self.incompatible.extend(incompatible(line));
            return Ok(());
        }
        match (&table, line.strip_prefix('*')) {
            (None, Some(name)) => {
                self.tables.entry(name.to_owned()).or_default();
                *table = Some(name.to_owned());
            }
            (Some(_), None) if line == "COMMIT" => *table = None,
            (Some(name), None) => {
                let chains = self.tables.get_mut(name);
                add_to_table(line, chains.expect("the table's first line added it"))?;
            }
            (None, None) => bail!("this line is in no table"),
            (Some(name), Some(_)) => bail!("table {name} has no COMMIT before this line"),
        }
        Ok(())
    }

    /// The chain of this name.
    pub fn chain(&self, table: &str, chain: &str) -> Option<&Chain> {
        self.tables.get(table)?.get(chain)
    }

    /// Whether it is known to be as empty as after a boot: no rules, no user-defined chains, all policies ACCEPT.
    pub fn is_empty(&self) -> bool {
        let mut chains = self.tables.values().flat_map(BTreeMap::values);
        self.incompatible.is_empty()
            && chains
                .all(|chain| chain.rules.is_empty() && chain.policy.as_deref() == Some("ACCEPT"))
    }
}

/// The table in ``# Table `nat' is incompatible, use 'nft' tool.`` (`nft_is_table_compatible`, iptables/nft.c). None for
/// ``# Table `nat' contains incompatible base-chains``: then the table's own chains are listed all the same.
fn incompatible(comment: &str) -> Option<String> {
    let (name, rest) = comment.strip_prefix("# Table `")?.split_once('\'')?;
    rest.starts_with(" is incompatible")
        .then(|| name.to_owned())
}

/// Adds a line of a table: `:PREROUTING ACCEPT [0:0]`, `:mh-isp0 - [0:0]`, or `[12:720] -A PREROUTING -i ppp0 -j mh-isp0`.
fn add_to_table(line: &str, chains: &mut BTreeMap<String, Chain>) -> Result<()> {
    if let Some(declaration) = line.strip_prefix(':') {
        let (name, rest) = declaration.split_once(' ').context("it has no policy")?;
        let policy = rest.split(' ').next().filter(|policy| *policy != "-");
        chains.entry(name.to_owned()).or_default().policy = policy.map(str::to_owned);
        return Ok(());
    }
    let (counter, rule) = match line.strip_prefix('[') {
        Some(rest) => {
            let (counter, rule) = rest.split_once("] ").context("its counters have no end")?;
            (parse_counter(counter)?, rule)
        }
        None => (Counter::default(), line),
    };
    let rule = rule.strip_prefix("-A ");
    let rule = rule.context("it is neither a chain nor a rule")?;
    let (name, text) = rule.split_once(' ').unwrap_or((rule, ""));
    ensure!(!name.is_empty(), "it names no chain");
    let chain = chains.entry(name.to_owned()).or_default();
    Rc::make_mut(&mut chain.rules).push(Rule::parse(text)?);
    chain.counters.push(counter);
    Ok(())
}

/// `12:720`
fn parse_counter(text: &str) -> Result<Counter> {
    let numbers = text.split_once(':').and_then(|(packets, bytes)| {
        Some(Counter {
            packets: packets.parse().ok()?,
            bytes: bytes.parse().ok()?,
        })
    });
    numbers.context("its counters are not packets:bytes")
}

/// The first line, without its line end, and the text after it. A comment can hold line ends, which iptables-save prints
/// as they are: a line goes on until its quotes are closed.
fn split_line(text: &str) -> Result<(&str, &str)> {
    let (line, rest) = text.split_once('\n').unwrap_or((text, ""));
    if !line.starts_with(['-', '[']) || !line.contains('"') {
        return Ok((line, rest));
    }
    let end = line_end(text.as_bytes()).ok_or_else(|| {
        let line = shown(line);
        anyhow!("read what iptables-save prints: {line:?}: it ended before a quote was closed")
    })?;
    Ok((&text[..end], text.get(end + 1..).unwrap_or_default()))
}

/// Where the first line ends. None if a quote is not closed. A quote opens at a word's start only, and never at the start
/// of a name ([`is_before_name`]).
fn line_end(text: &[u8]) -> Option<usize> {
    let (mut last_word, mut start, mut at) = (0..0, 0, 0);
    while at < text.len() {
        match text[at] {
            b'\n' => return Some(at),
            b' ' => {
                last_word = start..at;
                start = at + 1;
            }
            b'"' if at == start && !is_before_name(&text[last_word.clone()]) => {
                at += 1 + closing_quote(&text[at + 1..])?;
                start = at + 1;
            }
            _ => {}
        }
        at += 1;
    }
    Some(at)
}

/// Where the first quote is that no backslash escapes.
fn closing_quote(text: &[u8]) -> Option<usize> {
    let mut is_escaped = false;
    text.iter().position(|byte| {
        let closes = *byte == b'"' && !is_escaped;
        is_escaped = *byte == b'\\' && !is_escaped;
        closes
    })
}

/// As much of a line as an error quotes.
fn shown(line: &str) -> String {
    line.chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The words of the only rule in a filter table that lists this line.
    fn words(line: &str) -> Vec<String> {
        let ruleset = parse(&format!("*filter\n:FORWARD ACCEPT [0:0]\n{line}\nCOMMIT\n"));
        let chain = ruleset.chain("filter", "FORWARD").expect("the chain");
        assert_eq!(chain.rules.len(), 1, "{line}: {chain:?}");
        chain.rules[0].words()
    }

    #[track_caller]
    fn parse(save: &str) -> Ruleset {
        Ruleset::parse(save).unwrap_or_else(|error| panic!("{error:#}: {save}"))
    }

    #[track_caller]
    fn assert_refused(save: &str, expected: &[&str]) {
        let error = format!("{:#}", Ruleset::parse(save).expect_err(save));
        for words in expected {
            assert!(error.contains(words), "{words:?} is not in: {error}");
        }
    }

    #[test]
    fn tables_chains_policies_and_counters_are_read() {
        let ruleset = parse(
            "# Generated by iptables-save v1.8.9 on Fri Nov 27 06:00:00 2026\n\
             *raw\n:PREROUTING ACCEPT [9:540]\nCOMMIT\n\
             # Completed on Fri Nov 27 06:00:00 2026\n\
             *filter\n:FORWARD DROP [0:0]\n:mine - [0:0]\n\
             [12:720] -A FORWARD -j mine\n[0:0] -A FORWARD\nCOMMIT\n",
        );
        let names: Vec<&String> = ruleset.tables.keys().collect();
        assert_eq!(names, ["filter", "raw"]);
        let raw = ruleset.chain("raw", "PREROUTING").expect("it is declared");
        assert_eq!(
            (raw.policy.as_deref(), raw.rules.len()),
            (Some("ACCEPT"), 0)
        );
        let mine = ruleset.chain("filter", "mine").expect("it is declared");
        assert_eq!((&mine.policy, mine.rules.len()), (&None, 0));
        let forward = ruleset.chain("filter", "FORWARD").expect("it is declared");
        assert_eq!(forward.policy.as_deref(), Some("DROP"));
        let rules: Vec<String> = forward.rules.iter().map(Rule::to_string).collect();
        assert_eq!(rules, ["-j mine", ""]);
        let counted = Counter {
            packets: 12,
            bytes: 720,
        };
        assert_eq!(forward.counters, [counted, Counter::default()]);
        assert!(ruleset.chain("nat", "PREROUTING").is_none());
    }

    #[test]
    fn only_policies_of_accept_and_nothing_else_are_empty() {
        let table = |line: &str| format!("*nat\n:PREROUTING ACCEPT [1:60]\n{line}COMMIT\n");
        assert!(parse("").is_empty());
        assert!(parse(&table("")).is_empty());
        for line in [
            ":mine - [0:0]\n",
            ":INPUT DROP [0:0]\n",
            "-A PREROUTING -i ppp0\n",
        ] {
            assert!(!parse(&table(line)).is_empty(), "{line}");
        }
        let incompatible = "# Table `nat' is incompatible, use 'nft' tool.\n";
        assert!(!parse(incompatible).is_empty());
    }

    #[test]
    fn a_quote_in_the_name_of_an_interface_or_chain_opens_nothing() {
        for name in ["a\"b", "\"b", "a\"", "\"a\"", "\""] {
            for option in ["-i", "-o", "-j", "-g"] {
                let rule = format!("{option} {name} -m comment --comment \"a b\"");
                let expected = [option, name, "-m", "comment", "--comment", "a b"];
                assert_eq!(words(&format!("-A FORWARD {rule}")), expected);
                assert_eq!(words(&format!("[1:2] -A FORWARD ! {rule}"))[1..], expected);
            }
            let save = format!("*nat\n:{name} - [0:0]\n-A {name} -j ACCEPT\nCOMMIT\n");
            let ruleset = parse(&save);
            assert_eq!(ruleset.chain("nat", name).expect("it").rules.len(), 1);
        }
    }

    #[test]
    fn a_comment_can_have_lines_quotes_and_backslashes() {
        let comment = "-A FORWARD -m comment --comment";
        for (quoted, expected) in [
            (r#""several words""#, "several words"),
            ("\"two\nlines\"", "two\nlines"),
            ("\"\n\n-A FORWARD -j DROP\n\"", "\n\n-A FORWARD -j DROP\n"),
            ("\"one\nCOMMIT\n*nat\"", "one\nCOMMIT\n*nat"),
            (
                r#""a \"quote\", a \\ and a \'""#,
                r#"a "quote", a \ and a '"#,
            ),
            (r#""\\""#, r"\"),
            ("\"\\\"\n\\\"\"", "\"\n\""),
            (r#""""#, ""),
        ] {
            let words = words(&format!("{comment} {quoted} -j ACCEPT"));
            assert_eq!(words[3..], [expected, "-j", "ACCEPT"], "{quoted}");
        }
    }

    #[test]
    fn an_older_iptables_save_quotes_plain_words_too() {
        let plain = parse("*nat\n-A mh-isp0 -m comment --comment mh-isp0 -j ACCEPT\nCOMMIT\n");
        let quoted = parse("*nat\n-A mh-isp0 -m comment --comment \"mh-isp0\" -j ACCEPT\nCOMMIT\n");
        let rules = |ruleset: &Ruleset| ruleset.chain("nat", "mh-isp0").map(|it| it.rules.clone());
        assert_eq!(rules(&quoted), rules(&plain));
    }

    #[test]
    fn a_name_that_is_not_utf_8_stays_one_word() {
        let line = String::from_utf8_lossy(b"-A FORWARD -i a\xff\"b -j ACCEPT").into_owned();
        assert_eq!(words(&line)[1..], ["a\u{fffd}\"b", "-j", "ACCEPT"]);
    }

    #[test]
    fn an_incompatible_table_is_named_and_incompatible_base_chains_are_not() {
        let harmless =
            "# Table `filter' contains incompatible base-chains, use 'nft' tool to list them.\n";
        let ruleset = parse(&format!(
            "# Table `nat' is incompatible, use 'nft' tool.\n\
             *filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n{harmless}"
        ));
        assert_eq!(ruleset.incompatible, ["nat".to_owned()].into());
        assert!(!ruleset.tables.contains_key("nat"));
        assert!(ruleset.chain("filter", "FORWARD").is_some());
    }

    #[test]
    fn what_is_cut_short_is_an_error() {
        let whole = "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -m comment --comment \"a\nb\" -j ACCEPT\nCOMMIT\n";
        parse(whole);
        for end in 1..whole.len() - "\n".len() {
            assert!(Ruleset::parse(&whole[..end]).is_err(), "{}", &whole[..end]);
        }
        assert_refused(
            "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -s 192.0.2.",
            &["in the middle of table nat", "-A PREROUTING -s 192.0.2."],
        );
        assert_refused(
            "*nat\n-A PREROUTING -m comment --comment \"a\nCOMMIT\n",
            &["a quote", "-A PREROUTING -m comment"],
        );
    }

    #[test]
    fn a_line_that_iptables_save_does_not_print_is_an_error_that_quotes_it() {
        for line in [
            "-A PREROUTING -j ACCEPT",
            "COMMIT",
            ":PREROUTING ACCEPT [0:0]",
            "iptables-save: error",
        ] {
            assert_refused(&format!("{line}\n*nat\nCOMMIT\n"), &[line]);
        }
        for line in [
            "*mangle",
            "-D PREROUTING -j ACCEPT",
            "-A",
            "-A  -j ACCEPT",
            ":PREROUTING",
            "[1:2 -A PREROUTING",
            "[1] -A PREROUTING",
            "[1:x] -A PREROUTING",
            "[-1:2] -A PREROUTING",
            "[1:2] :PREROUTING ACCEPT",
            "COMMIT ",
            " -A PREROUTING",
            "table ip nat {",
        ] {
            assert_refused(&format!("*nat\n{line}\nCOMMIT\n"), &[line]);
        }
        // A hostile line does not fill the log.
        let long = "x".repeat(1 << 20);
        let error = Ruleset::parse(&long).expect_err("it is in no table");
        assert!(format!("{error:#}").len() < 1000);
    }
}
