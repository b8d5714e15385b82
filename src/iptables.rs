//! The language of iptables, both directions: iptables-save to state, steps to iptables-restore.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::{self, BufRead};
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::rc::Rc;

use anyhow::{Context, Result, ensure};
use ipnetwork::Ipv4Network;

use crate::config::Protocol;
use crate::plan::{Change, Edit, Step};
use crate::state::{FwMark, Loose, PREFIX, Rulespec, Share, Table, UplinkName};

/// The lines of what iptables-save prints.
pub fn lines(save: &str) -> impl Iterator<Item = String> {
    let mut save = save.as_bytes();
    std::iter::from_fn(move || {
        let mut line = Vec::new();
        let is_one = next_line(&mut save, &mut line).unwrap_or(false);
        is_one.then(|| String::from_utf8_lossy(&line).into_owned())
    })
}

/// The next line without its end, if there is one. iptables-save leaves the line ends in somebody's comment as
/// they are, so a line goes on until its quotes are closed.
fn next_line(save: &mut dyn BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    let mut is_quoted = false;
    let mut is_escaped = false;
    loop {
        let start = line.len();
        if save.read_until(b'\n', line)? == 0 {
            return Ok(start > 0);
        }
        let added = &line[start..];
        if is_quoted || added.contains(&b'"') {
            for byte in added {
                match byte {
                    _ if is_escaped => is_escaped = false,
                    b'\\' if is_quoted => is_escaped = true,
                    b'"' => is_quoted = !is_quoted,
                    _ => {}
                }
            }
        }
        if !is_quoted {
            line.pop_if(|byte| *byte == b'\n');
            return Ok(true);
        }
    }
}

/// Our shares of the tables in what iptables-save prints.
///
/// # Errors
/// It can't be read, or is not of the form that iptables-save prints, or is cut off.
pub fn parse(save: &mut dyn BufRead) -> Result<BTreeMap<(Table, UplinkName), Share>> {
    let mut listing = Listing::default();
    let mut table = None;
    let mut committed = true;
    let mut bytes = Vec::new();
    while next_line(save, &mut bytes).context("read what iptables-save prints")? {
        // Names of others' interfaces can hold any byte; but mostly it is text, which is sooner seen than mended.
        let line = match str::from_utf8(&bytes) {
            Ok(line) => line,
            Err(_) => &String::from_utf8_lossy(&bytes),
        };
        if let Some(name) = line.strip_prefix('*') {
            (table, committed) = (Table::parse(name), false);
        } else if line == "COMMIT" {
            committed = true;
        } else if let Some(table) = table
            && line.contains(PREFIX)
        {
            // Only lines that could be ours are taken apart: there may be 10,000 others.
            let read = listing.line(line, table);
            read.with_context(|| format!("read what iptables-save prints: {line:?}"))?;
        } else {
            ensure!(
                !committed || line.is_empty() || line.starts_with('#'),
                "read what iptables-save prints: {:?}",
                line.chars().take(80).collect::<String>()
            );
        }
    }
    ensure!(committed, "iptables-save ended in the middle of a table");
    let mut shares = listing.shares;
    for chain in listing.chains {
        let share = shares.entry((chain.table, chain.uplink)).or_default();
        share.chains.insert(chain.name, Rc::new(chain.rules));
    }
    Ok(shares)
}

/// Ours of what has been read so far.
#[derive(Default)]
struct Listing {
    chains: Vec<Chain>,
    /// Where a chain stands among them.
    places: BTreeMap<(Table, String), usize>,
    /// That of the last rule: the next is mostly of the same chain.
    last: usize,
    /// The entries in other chains.
    shares: BTreeMap<(Table, UplinkName), Share>,
}

/// A chain of ours.
struct Chain {
    table: Table,
    name: String,
    uplink: UplinkName,
    rules: Vec<Rulespec>,
}

impl Listing {
    fn chain(&mut self, table: Table, name: &str) -> Option<&mut Chain> {
        let last = self.chains.get(self.last);
        if !last.is_some_and(|last| last.name == name && last.table == table) {
            self.last = *self.places.get(&(table, name.to_owned()))?;
        }
        self.chains.get_mut(self.last)
    }

    fn line(&mut self, line: &str, table: Table) -> Result<()> {
        if let Some(declared) = line.strip_prefix(':') {
            let name = declared.split(' ').next().unwrap_or_default();
            if let Some(uplink) = UplinkName::of_chain(name)
                && self.chain(table, name).is_none()
            {
                let name = name.to_owned();
                self.places.insert((table, name.clone()), self.chains.len());
                self.chains.push(Chain {
                    table,
                    name,
                    uplink,
                    rules: Vec::new(),
                });
            }
            return Ok(());
        }
        let Some(rest) = line.strip_prefix("-A ") else {
            return Ok(());
        };
        let (chain, spec) = rest.split_once(' ').unwrap_or((rest, ""));
        if let Some(chain) = self.chain(table, chain) {
            chain.rules.push(rulespec(spec)?);
            return Ok(());
        }
        if spec.contains('\n') {
            // None of ours; and iptables-restore, which takes each line for a rule, could not remove it.
            return Ok(());
        }
        let words = words(spec)?;
        let owner = words.windows(2).find_map(|pair| match pair[0].as_str() {
            "-j" | "-g" => UplinkName::of_chain(&pair[1]),
            "--comment" => UplinkName::of_comment(&pair[1]),
            _ => None,
        });
        if let Some(uplink) = owner {
            let entry = (chain.to_owned(), Rulespec(join(&words)));
            let share = self.shares.entry((table, uplink)).or_default();
            share.entries.push(entry);
        }
        Ok(())
    }
}

/// The rule in the one form that we compare.
fn rulespec(text: &str) -> Result<Rulespec> {
    // Plain words, one space apart, stand in that form already: there may be 10,000 such rules.
    let mut last = b' ';
    let is_in_form = text.bytes().all(|byte| {
        let fits = match byte {
            b' ' => last != b' ',
            _ => is_plain(byte),
        };
        last = byte;
        fits
    });
    if is_in_form && last != b' ' && !text.contains("-p gre") {
        return Ok(Rulespec(text.to_owned()));
    }
    Ok(Rulespec(join(&words(text)?)))
}

/// The words of a rule, in the one form that we compare: iptables-save puts words with other than plain characters in double quotes
/// and escapes quotes and backslashes in them (`xtables_save_string`, libxtables/xtables.c).
pub fn words(text: &str) -> Result<Vec<String>> {
    let mut words = Vec::new();
    let mut chars = text.chars().peekable();
    while chars.next_if(|c| *c == ' ').is_some() || chars.peek().is_some() {
        let mut word = String::new();
        let quoted = chars.next_if_eq(&'"').is_some();
        loop {
            match chars.next() {
                Some('"') if quoted => break,
                Some('\\') if quoted => word.extend(chars.next()),
                Some(' ') | None if !quoted => break,
                Some(c) => word.push(c),
                None => anyhow::bail!("a quote is not closed"),
            }
        }
        if word == "gre" && words.last().is_some_and(|last| last == "-p") {
            // Its name is known from /etc/protocols only, which need not be there.
            word = Protocol::Gre.number().to_string();
        }
        if quoted || !word.is_empty() {
            words.push(word);
        }
    }
    Ok(words)
}

/// The words as one rule, in the form that iptables-restore takes.
pub fn join(words: &[String]) -> String {
    let mut text = String::new();
    for word in words {
        if !text.is_empty() {
            text.push(' ');
        }
        if !word.is_empty() && word.bytes().all(is_plain) {
            text.push_str(word);
        } else {
            text.push('"');
            for c in word.chars() {
                if matches!(c, '"' | '\\' | '\'') {
                    text.push('\\');
                }
                text.push(c);
            }
            text.push('"');
        }
    }
    text
}

/// The value of the word behind `option`.
fn option<'a>(spec: &'a Rulespec, option: &str) -> Option<&'a str> {
    let mut words = spec.0.split_ascii_whitespace();
    words.find(|word| *word == option)?;
    words.next()
}

/// Whether a byte needs no quotes.
#[inline(always)]
fn is_plain(byte: u8) -> bool {
    matches!(byte, b'a'..=b'z' | b'A'..=b'Z' | b'+'..=b':' | b'_' | b'=' | b'!' | b'@' | b'%')
}

/// The rules of an uplink's chains, in the order in which a packet meets them.
pub fn in_order<'a>(uplink: &UplinkName, share: &'a Share) -> impl Iterator<Item = &'a Rulespec> {
    let own = share.chains.get(&uplink.chain());
    own.into_iter()
        .flat_map(|rules| rules.iter())
        .flat_map(|spec| {
            let below = option(spec, "-j").and_then(|target| share.chains.get(target));
            let (below, itself) = match below {
                Some(rules) => (rules.as_slice(), None),
                None => (&[][..], Some(spec)),
            };
            below.iter().chain(itself)
        })
}

/// The mark that a rule of ours sets on connections.
pub fn connmark(spec: &Rulespec) -> Option<FwMark> {
    let (value, mask) = option(spec, "--set-xmark")?.split_once('/')?;
    let number = |text: &str| u32::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    Some(FwMark {
        value: number(value)?,
        mask: number(mask)?,
    })
}

/// A DNAT rule of an uplink's chain, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub struct Dnat {
    /// Its source; none for all.
    pub from: Option<Ipv4Network>,
    /// Its protocol's number; none for all.
    pub protocol: Option<u8>,
    /// Its destination ports; none for all.
    pub ports: Option<RangeInclusive<u16>>,
    /// The host it sends to.
    pub to: Ipv4Addr,
    /// The port there, where it is another.
    pub to_port: Option<u16>,
}

/// The rule as a DNAT, if it is one of the form that we write.
pub fn dnat(spec: &Rulespec) -> Option<Dnat> {
    let destination = option(spec, "--to-destination")?;
    let (to, to_port) = match destination.split_once(':') {
        Some((to, port)) => (to, Some(port.parse().ok()?)),
        None => (destination, None),
    };
    let ports = match option(spec, "--dport")
        .map(|ports| ports.split_once(':').unwrap_or((ports, ports)))
    {
        Some((first, last)) => Some(first.parse().ok()?..=last.parse().ok()?),
        None => None,
    };
    let from = match option(spec, "-s") {
        Some(from) => Some(from.parse().ok()?),
        None => None,
    };
    let protocol = match option(spec, "-p") {
        Some(name) => Some(
            Protocol::parse(name)
                .map(Protocol::number)
                .or_else(|| name.parse().ok())?,
        ),
        None => None,
    };
    Some(Dnat {
        from,
        protocol,
        ports,
        to: to.parse().ok()?,
        to_port,
    })
}

/// The interface of the uplink that an entry of ours belongs to: of the jump to its chain, and of
/// its masquerade. The jump and the masquerade of a hairpin, from LAN to LAN, name an address, too.
pub fn interface(spec: &Rulespec) -> Option<&str> {
    match option(spec, "-j")? {
        "MASQUERADE" if option(spec, "--ctorigdst").is_none() => option(spec, "-o"),
        target if target.starts_with(PREFIX) && option(spec, "-d").is_none() => option(spec, "-i"),
        _ => None,
    }
}

/// The rule without a target that keeps, in the uplink's mangle chain, the value that rp_filter had:
/// the kernel forgets it when it forgets our entries, as a file would not.
///
/// `-A mh-isp0 -m comment --comment "mh-isp0 rp_filter was 1"`
pub fn loose_note(loose: &Loose) -> Rulespec {
    let text = format!("{}{NOTE}{}", loose.uplink.chain(), loose.before);
    Rulespec(join(
        &["-m", "comment", "--comment", &text].map(str::to_owned),
    ))
}

/// The value in a note that [`loose_note`] wrote.
pub fn parse_loose_note(spec: &Rulespec) -> Option<u8> {
    let (_, value) = spec.0.strip_suffix('"')?.split_once(NOTE)?;
    value.parse().ok().filter(|value| *value <= 2)
}

const NOTE: &str = " rp_filter was ";

/// How an entry comes into a chain of others, or goes. In the filter table it comes ahead of all that
/// stands there, since what accepts is of no use behind what drops.
pub fn entry_flag(change: Change, table: Table) -> &'static str {
    match (change, table) {
        (Change::Delete, _) => "-D",
        (_, Table::Filter) => "-I",
        (_, Table::Mangle | Table::Nat) => "-A",
    }
}

/// The lines for iptables-restore that carry out a step on a table.
pub fn restore_lines(step: &Step) -> String {
    let mut out = String::new();
    // Writing to a String can't fail.
    let _ = match step {
        Step::Entry(change, table, chain, spec) => {
            writeln!(out, "{} {chain} {}", entry_flag(*change, *table), spec.0)
        }
        Step::Chain { chain, .. } => step.edits().into_iter().try_for_each(|edit| match edit {
            Edit::New => writeln!(out, ":{chain} - [0:0]"),
            Edit::Flush => writeln!(out, "-F {chain}"),
            Edit::Delete(spec) => writeln!(out, "-D {chain} {}", spec.0),
            Edit::Insert(number, spec) => writeln!(out, "-I {chain} {number} {}", spec.0),
            // By the thousand, and std's formatting would take longer than all else.
            Edit::Append(Rulespec(spec)) => {
                out.extend(["-A ", chain, " ", spec, "\n"]);
                Ok(())
            }
            Edit::Remove => writeln!(out, "-X {chain}"),
        }),
        Step::Route(..) | Step::RouteRule(..) | Step::RpFilter { .. } => Ok(()),
    };
    out
}
