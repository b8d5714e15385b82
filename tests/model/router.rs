//! The router that a sequence runs on: a network namespace of its own, its links, what is done to it, and mh-hook.

use std::collections::BTreeMap;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};

use crate::expect::{Expected, FORWARDS, Link, World, expect};
use crate::listing::{Listing, is_iptables, sorted};
use crate::step::{Call, Config, Direction, LANS, LINKS, NETWORKS, PINS, Step};

/// What a sequence finds: the links that pppd has just made, and nothing of ours.
pub const START: &str = "link dial ppp0 203.0.113.10
link dial ppp1 198.51.100.20
config | isp0 ppp0 table=10 forwards=2 | isp1 ppp1 table=20";

/// The others' entries. Some differ from ours in the mark of ownership only.
pub const FOREIGN: [&str; 21] = [
    "rule add priority 98 from 203.0.113.10 lookup main suppress_prefixlength 0",
    "rule add priority 99 iif eth1 fwmark 0xa/0xff lookup 10",
    "rule add priority 100 from 203.0.113.10 lookup 10 protocol 110",
    "rule add priority 5000 fwmark 0x80000/0xff0000 lookup 52",
    "rule add priority 100 from 10.1.2.3 lookup 20",
    "route add 10.9.0.0/16 dev eth1 table 10",
    "route add default dev eth1 metric 50 table 10",
    "route add default dev eth1 table 52",
    "route add unreachable default metric 4278198273 table 20",
    "mangle -A theirs -m comment --comment \"not of mh-isp0\" -j MARK --set-xmark 0x100/0x100",
    "mangle -A PREROUTING -j theirs",
    "nat -A PREROUTING -i ppp0 -p tcp -m tcp --dport 80 -m comment --comment \"see mh-isp0\" -j RETURN",
    "nat -A POSTROUTING -s 192.168.0.0/24 -o ppp0 -j MASQUERADE",
    "filter -A mh-UPPER -j RETURN",
    "filter -A mh-gone -j RETURN",
    "filter -A FORWARD -m comment --comment \"mh-isp0 by hand\" -j ACCEPT",
    "filter -A FORWARD -i ppp0 -m comment --comment mh-isp0 -j ACCEPT",
    "nat -A POSTROUTING -o ppp1 -m comment --comment mh-nobody -j MASQUERADE",
    "filter -A FORWARD -i ppp0 -m comment --comment xmh-isp0 -j ACCEPT",
    "filter -A FORWARD -m comment --comment \"\\\"quoted\\\" \\\\ mh-isp1\" -j RETURN",
    "mangle -A PREROUTING -i eth1 -j CONNMARK --restore-mark --nfmask 0xff00 --ctmask 0xff00",
];

/// Entries that are ours by their mark, and that we never make.
pub const STRAYS: [&str; 11] = [
    "rule add priority 500 from 9.9.9.9 lookup 77 protocol 109",
    "route add default dev eth1 table 77 protocol 109",
    "rule add priority 777 from 203.0.113.10 lookup 10 protocol 109",
    "route add default dev ppp1 table 10 metric 5 protocol 109",
    "rule add priority 98 from 203.0.113.60 lookup main suppress_prefixlength 0 protocol 109",
    "route add 10.77.0.0/16 dev eth1 protocol 109",
    "filter -A FORWARD -i ppp0 -m conntrack --ctstate DNAT -m comment --comment mh-gone -j ACCEPT",
    "rule add priority 98 iif ppp1 fwmark 0xa/0xff lookup main protocol 109",
    "nat -A mh-isp0 -p tcp -m tcp --dport 81 -j DNAT --to-destination 192.168.0.9",
    "nat -A PREROUTING -i ppp1 -j mh-isp0",
    "nat -A POSTROUTING -s 192.168.0.0/24 -o ppp1 -m comment --comment mh-nobody -j MASQUERADE",
];

/// How often each kind of step was run, and how often it had an effect.
pub type Effects = BTreeMap<String, (usize, usize)>;

/// A router, and what the model knows of it.
pub struct Router<'a> {
    config: Option<Config>,
    links: BTreeMap<&'static str, Link>,
    filled: BTreeMap<String, String>,
    /// Which of [`FOREIGN`] have been added.
    added: Vec<usize>,
    /// What stands, as long as nothing has been done since it was listed.
    listed: Option<Listing>,
    /// The steps done, each as its text with what it came to.
    pub trace: Vec<String>,
    pub calls: usize,
    effects: &'a mut Effects,
}

impl<'a> Router<'a> {
    /// A new one.
    pub fn new(effects: &'a mut Effects) -> Result<Self, String> {
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(|error| format!("a network namespace: {error}"))?;
        for place in ["all", "default"] {
            // A kernel without IPv6 does not have it.
            let _ = fs::write(
                format!("/proc/sys/net/ipv6/conf/{place}/disable_ipv6"),
                "1\n",
            );
        }
        let mut router = Self {
            config: None,
            links: BTreeMap::new(),
            filled: BTreeMap::new(),
            added: Vec::new(),
            listed: None,
            trace: Vec::new(),
            calls: 0,
            effects,
        };
        router.ip(
            "link set lo up\nlink add eth1 type veth peer name lan\nlink set lan up\naddress add 192.168.0.1/24 dev eth1\nlink set eth1 up\n",
        )?;
        for line in START.lines() {
            let step = crate::step::parse(line).ok_or(line)?;
            router.step(&step)?;
        }
        router.trace.clear();
        Ok(router)
    }

    /// Does the sequence, and takes all of ours away in the end.
    pub fn run(&mut self, steps: &[Step]) -> Result<(), String> {
        for step in steps {
            self.step(step)?;
        }
        // All uplinks at once, whatever their entries have been through; and nothing more to do then.
        self.trace.push("# the end".into());
        for link in LINKS {
            self.step(&Step::HangUp(link))?;
        }
        self.step(&Step::Dial("ppp0", Ipv4Addr::new(203, 0, 113, 10)))?;
        self.step(&Step::Dial("ppp1", Ipv4Addr::new(198, 51, 100, 20)))?;
        if let Some(config) = self.config.clone() {
            self.step(&Step::Configure(config))?;
        } else {
            self.step(
                &crate::step::parse("config | isp0 ppp1 table=20").ok_or("a configuration")?,
            )?;
        }
        self.step(&Step::Call(Call::Sync))?;
        let (status, said) = self.mh_hook(&["--dry-run", "sync"])?;
        if status != 0 || said.trim() != "# nothing to change" {
            return Err(format!(
                "a second sync would change something, exit status {status}:\n{said}"
            ));
        }
        self.step(&crate::step::parse("config").ok_or("a configuration")?)?;
        self.step(&Step::Call(Call::Sync))?;
        let left = self.listing()?.ours;
        if left.is_empty() {
            Ok(())
        } else {
            Err(format!("left of ours in the end:\n{}", left.join("\n")))
        }
    }

    fn step(&mut self, step: &Step) -> Result<(), String> {
        self.trace.push(step.to_string());
        let effect = self.act(step)?;
        let text = step.to_string();
        let words = text.split(' ').take(match step {
            Step::Call(Call::Event(..)) => 2,
            Step::Call(_) | Step::Configure(_) => 1,
            Step::AddForeign(_) | Step::Stray(_) => 3,
            _ => 2,
        });
        let kind = words.collect::<Vec<_>>().join(" ");
        let count = self.effects.entry(kind).or_default();
        count.0 += 1;
        count.1 += usize::from(effect);
        Ok(())
    }

    /// Whether the step had an effect.
    fn act(&mut self, step: &Step) -> Result<bool, String> {
        if let Step::Call(call) = step {
            return self.call(call);
        }
        // What chooses among our entries needs them listed.
        let ours = match step {
            Step::Remove(_) | Step::Double(_) => self.listing()?.ours,
            _ => Vec::new(),
        };
        self.listed = None;
        let is_there = |router: &Self, link: &str| router.links.contains_key(link);
        match step {
            Step::Call(_) => {}
            Step::Dial(link, address) => {
                let mut batch = self.make(link);
                let _ = writeln!(
                    batch,
                    "address flush dev {link}\naddress add {address} peer {} dev {link}\nlink set {link} up",
                    peer(link)
                );
                self.ip(&batch)?;
                let state = self.links.entry(link).or_default();
                state.up = true;
                state.addresses = vec![*address];
            }
            Step::Raise(link) if is_there(self, link) => {
                self.ip(&format!("link set {link} up\n"))?;
                self.links.entry(link).or_default().up = true;
            }
            Step::HangUp(link) if is_there(self, link) => {
                self.ip(&format!("address flush dev {link}\nlink set {link} down\n"))?;
                let state = self.links.entry(link).or_default();
                state.up = false;
                state.addresses.clear();
            }
            Step::Lower(link) if is_there(self, link) => {
                self.ip(&format!("link set {link} down\n"))?;
                self.links.entry(link).or_default().up = false;
            }
            Step::Delete(link) if is_there(self, link) => {
                self.ip(&format!("link delete {link}\n"))?;
                self.links.remove(link);
            }
            Step::AddAddress(link, address) if is_there(self, link) => {
                let state = self.links.entry(link).or_default();
                if state.addresses.contains(address) {
                    return Ok(false);
                }
                state.addresses.push(*address);
                self.ip(&format!("address add {address}/32 dev {link}\n"))?;
            }
            Step::FlushAddresses(link) if is_there(self, link) => {
                self.ip(&format!("address flush dev {link}\n"))?;
                self.links.entry(link).or_default().addresses.clear();
            }
            Step::Mtu(link, mtu) if is_there(self, link) => {
                self.ip(&format!("link set {link} mtu {mtu}\n"))?;
                self.links.entry(link).or_default().mtu = *mtu;
            }
            Step::Raise(_)
            | Step::HangUp(_)
            | Step::Lower(_)
            | Step::Delete(_)
            | Step::AddAddress(..)
            | Step::FlushAddresses(_)
            | Step::Mtu(..) => return Ok(false),
            Step::Configure(config) => {
                let changes = self.config.as_ref() != Some(config);
                write_config(&toml(config))?;
                self.config = Some(config.clone());
                return Ok(changes);
            }
            Step::Break => {
                write_config("tabel = 10\n")?;
                self.config = None;
            }
            Step::PreUp(link, address) => return self.pre_up(link, *address),
            Step::Remove(number) | Step::Double(number) => {
                let Some(line) = ours.get(number % ours.len().max(1)) else {
                    return Ok(false);
                };
                return match step {
                    Step::Remove(_) => self.by_hand(line, removal),
                    _ => self.by_hand(line, double),
                };
            }
            Step::Stray(number) => return self.by_hand(STRAYS[*number], added),
            Step::AddForeign(number) => {
                self.added.push(*number);
                return self.by_hand(FOREIGN[*number], added);
            }
            Step::RemoveForeign(number) => {
                if self.added.is_empty() {
                    return Ok(false);
                }
                let number = self.added.remove(number % self.added.len());
                return self.by_hand(FOREIGN[number], taken_away);
            }
            Step::Flush(table) => {
                let tables = match table {
                    Some(table) => vec![*table],
                    None => vec!["mangle", "nat", "filter"],
                };
                let input: String = tables
                    .iter()
                    .map(|table| format!("*{table}\nCOMMIT\n"))
                    .collect();
                run("/usr/sbin/iptables-restore", &[], &input)?;
            }
        }
        Ok(true)
    }

    /// What makes a device where there is none.
    fn make(&mut self, link: &'static str) -> String {
        if self.links.contains_key(link) {
            return String::new();
        }
        let mtu = 1500;
        self.links.insert(
            link,
            Link {
                mtu,
                ..Link::default()
            },
        );
        // A device that has a carrier needs another end.
        format!("link add {link} type veth peer name far-{link}\nlink set far-{link} up\n")
    }

    /// As pppd does it: the address, the call, the link, and the call that mh-hook makes then.
    fn pre_up(&mut self, link: &'static str, address: Ipv4Addr) -> Result<bool, String> {
        let mut batch = self.make(link);
        let _ = writeln!(
            batch,
            "link set {link} down\naddress flush dev {link}\naddress add {address} peer {} dev {link}",
            peer(link)
        );
        self.ip(&batch)?;
        let state = self.links.entry(link).or_default();
        (state.up, state.addresses) = (false, vec![address]);
        let mut effect = self.call(&Call::Event(Direction::PreUp, link, Some(address)))?;
        self.listed = None;
        self.ip(&format!("link set {link} up\n"))?;
        self.links.entry(link).or_default().up = true;
        let named = self.config.as_ref().and_then(|config| config.at(link));
        if named.is_some() {
            effect |= self.call(&Call::Event(Direction::Follow, link, Some(address)))?;
        }
        Ok(effect)
    }

    /// Calls mh-hook and compares; whether our entries have changed.
    fn call(&mut self, call: &Call) -> Result<bool, String> {
        let before = self.listing()?;
        self.listed = None;
        self.calls += 1;
        let world = World {
            config: self.config.as_ref(),
            links: &self.links,
            ours: &before.ours,
            filled: &self.filled,
        };
        let Expected {
            status,
            ours,
            doubtful,
            filled,
        } = expect(&world, call);
        let text = call.to_string();
        let (found_status, said) = match call {
            Call::Event(Direction::Follow, ..) => (await_follow()?, String::new()),
            Call::Event(direction, link, local) => {
                let local = local.map_or(String::new(), |local| local.to_string());
                let (direction, peer) = (direction.to_string(), peer(link));
                self.mh_hook(&[
                    "event",
                    &direction,
                    link,
                    "/dev/null",
                    "0",
                    &local,
                    &peer,
                    "",
                ])?
            }
            Call::Up(link, Some(local)) => {
                self.mh_hook(&["up", link, "--local", &local.to_string()])?
            }
            Call::Up(..) | Call::Down(_) | Call::Sync => {
                self.mh_hook(&text.split(' ').collect::<Vec<_>>())?
            }
        };
        let after = self.listing()?;
        let mut problems = Vec::new();
        if status != found_status && !matches!(call, Call::Event(Direction::Follow, ..)) {
            problems.push(format!("exit status {found_status} in place of {status}"));
        }
        let mut found = after.ours.clone();
        found.retain(|line| ours.contains(line) || !doubtful.contains(line));
        if sorted(ours.clone()) != found {
            problems.push(format!("our entries:\n{}", difference(&ours, &found)));
        }
        if before.foreign != after.foreign {
            problems.push(format!(
                "the others' entries:\n{}",
                difference(&before.foreign, &after.foreign)
            ));
        }
        if !problems.is_empty() {
            return Err(format!(
                "after {text}: {}\nmh-hook said: {said}",
                problems.join("\n")
            ));
        }
        self.filled.extend(filled);
        Ok(before.ours != after.ours)
    }

    fn listing(&mut self) -> Result<Listing, String> {
        if let Some(listing) = &self.listed {
            return Ok(listing.clone());
        }
        let ip = run(
            "ip",
            &["-4", "-batch", "-"],
            "rule show\nroute show table all\n",
        )?;
        let save = run("/usr/sbin/iptables-save", &[], "")?;
        let config = self.config.iter().flat_map(|config| &config.uplinks);
        let configured = config.map(|uplink| uplink.name.as_str()).collect();
        let listing = Listing::parse(&ip, &save, &configured);
        self.listed = Some(listing.clone());
        Ok(listing)
    }

    /// Exit status, and what it says.
    fn mh_hook(&self, args: &[&str]) -> Result<(i32, String), String> {
        let program = env::var("MH_HOOK").map_err(|_| "MH_HOOK is not set")?;
        let output = Command::new(program)
            .args(["--quiet", "--config", &config_path()?])
            .args(args)
            .env_clear()
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("mh-hook: {error}"))?;
        let text = [output.stdout, output.stderr].concat();
        let status = output.status.code().unwrap_or(-1);
        Ok((status, String::from_utf8_lossy(&text).into_owned()))
    }

    fn ip(&self, batch: &str) -> Result<String, String> {
        run("ip", &["-batch", "-"], batch)
    }

    /// What a person does to an entry; whether the tool did it, since it may be there, or gone.
    fn by_hand(
        &mut self,
        line: &str,
        input: fn(&str) -> (&'static str, String),
    ) -> Result<bool, String> {
        if let Some(trace) = self.trace.last_mut() {
            let _ = write!(trace, "  # {line}");
        }
        let (tool, input) = input(line);
        let args: &[&str] = if tool == "ip" {
            &["-batch", "-"]
        } else {
            &["--noflush"]
        };
        Ok(spawn(tool, args, &input)?.0)
    }
}

fn peer(link: &str) -> String {
    format!("10.255.0.{}", &link["ppp".len()..])
}

/// Waits for the call that follows an `event pre-up` by itself: it tells nobody how it went.
fn await_follow() -> Result<i32, String> {
    let deadline = Instant::now() + Duration::from_secs(120);
    while is_following()? {
        if Instant::now() > deadline {
            return Err("event follow does not end".into());
        }
        sleep(Duration::from_millis(5));
    }
    Ok(0)
}

fn is_following() -> Result<bool, String> {
    let processes = fs::read_dir("/proc").map_err(|error| format!("/proc: {error}"))?;
    Ok(processes.flatten().any(|process| {
        // It may end in between.
        let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let mut words = command.split(|byte| *byte == 0);
        words.any(|word| word == b"follow")
    }))
}

fn run(tool: &str, args: &[&str], input: &str) -> Result<String, String> {
    match spawn(tool, args, input)? {
        (true, output) => Ok(output),
        (false, output) => Err(format!("{tool} failed: {output}\n{input}")),
    }
}

fn spawn(tool: &str, args: &[&str], input: &str) -> Result<(bool, String), String> {
    let complain = |error| format!("{tool}: {error}");
    let mut child = Command::new(tool)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(complain)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A tool may end ahead of its input's end.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(complain)?;
    let mut text = output.stdout;
    if !output.status.success() {
        text.extend(output.stderr);
    }
    Ok((
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    ))
}

const RESTORE: &str = "/usr/sbin/iptables-restore";

/// The tool and its input that remove an entry as it is listed.
fn removal(line: &str) -> (&'static str, String) {
    if let Some(rule) = line.strip_prefix("rule ") {
        return (
            "ip",
            format!("rule del priority {}\n", rule.replacen(":\t", " ", 1)),
        );
    }
    if let Some(route) = line.strip_prefix("route ") {
        return ("ip", format!("route del {route}\n"));
    }
    // A chain can't go while something jumps to it, so it loses its rules.
    let (table, rest) = line.split_once(' ').unwrap_or((line, ""));
    let command = match rest
        .strip_prefix(':')
        .and_then(|chain| chain.split_once(' '))
    {
        Some((chain, _)) => format!("-F {chain}"),
        None => rest.replacen("-A ", "-D ", 1),
    };
    (RESTORE, format!("*{table}\n{command}\nCOMMIT\n"))
}

/// The same that make it stand twice: at another priority, with another metric.
fn double(line: &str) -> (&'static str, String) {
    if let Some((priority, rule)) = line
        .strip_prefix("rule ")
        .and_then(|rule| rule.split_once(":\t"))
    {
        let priority = priority.parse().unwrap_or(0) + 500;
        return ("ip", format!("rule add priority {priority} {rule}\n"));
    }
    if let Some(route) = line.strip_prefix("route ") {
        let (route, _) = route.split_once(" metric ").unwrap_or((route, ""));
        return ("ip", format!("route add {route} metric 7\n"));
    }
    debug_assert!(is_iptables(line));
    let (table, rest) = line.split_once(' ').unwrap_or((line, ""));
    let command = match rest
        .strip_prefix(':')
        .and_then(|chain| chain.split_once(' '))
    {
        // In a form that we write: a chain with others is ours as long as it is configured only.
        Some((chain, _)) if table == "nat" => {
            format!("-A {chain} -p tcp -m tcp --dport 99 -j DNAT --to-destination 192.168.0.9")
        }
        Some((chain, _)) => {
            let restore = "--restore-mark --nfmask 0xff --ctmask 0xff";
            format!("-A {chain} -m connmark --mark 0x7/0xff -j CONNMARK {restore}")
        }
        None => rest.to_owned(),
    };
    (RESTORE, format!("*{table}\n{command}\nCOMMIT\n"))
}

/// The same that add an entry of the lists above. A chain of its own comes with it.
fn added(line: &str) -> (&'static str, String) {
    if let Some((table, rest)) = line.split_once(" -A ") {
        let chain = rest.split(' ').next().unwrap_or_default();
        let target = rest.split(' ').next_back().unwrap_or_default();
        let declared = match (chain, target) {
            ("theirs" | "mh-UPPER" | "mh-gone", _) => format!(":{chain} - [0:0]\n"),
            (_, "theirs") => format!(":{target} - [0:0]\n"),
            _ => String::new(),
        };
        let input = format!("*{table}\n{declared}-A {rest}\nCOMMIT\n");
        return (RESTORE, input);
    }
    ("ip", format!("{line}\n"))
}

fn taken_away(line: &str) -> (&'static str, String) {
    if let Some((table, rest)) = line.split_once(" -A ") {
        return (RESTORE, format!("*{table}\n-D {rest}\nCOMMIT\n"));
    }
    ("ip", format!("{}\n", line.replacen(" add ", " del ", 1)))
}

/// What is only in the one, and only in the other; of doubles each counts.
fn difference(expected: &[String], found: &[String]) -> String {
    let only = |sign: &str, these: &[String], those: &[String]| -> String {
        let mut those: Vec<&String> = those.iter().collect();
        let mut text = String::new();
        for line in these {
            match those.iter().position(|other| *other == line) {
                Some(index) => drop(those.remove(index)),
                None => {
                    let _ = writeln!(text, "{sign}{line}");
                }
            }
        }
        text
    };
    let text = only("-", expected, found) + &only("+", found, expected);
    if text.is_empty() {
        format!("the order differs; found:\n{}", found.join("\n"))
    } else {
        text
    }
}

fn config_path() -> Result<String, String> {
    env::var("LAB_CONFIG").map_err(|_| "LAB_CONFIG is not set".into())
}

fn write_config(text: &str) -> Result<(), String> {
    let path = config_path()?;
    fs::write(&path, text)
        .and_then(|()| fs::set_permissions(&path, PermissionsExt::from_mode(0o644)))
        .map_err(|error| format!("{path}: {error}"))
}

/// The configuration as a file.
fn toml(config: &Config) -> String {
    let list = |words: &[&str]| format!("{words:?}");
    let mut text = format!(
        "[lan]\ninterfaces = {}\nnetworks = {}\n[mark]\nmask = {:#x}\n",
        list(&LANS[..config.lans]),
        list(&NETWORKS[..config.networks]),
        config.mask
    );
    if config.priority != 98 {
        text.push_str("[priority]\n");
        for (place, key) in (0..).zip(["local", "mark", "source", "pin"]) {
            let _ = writeln!(text, "{key} = {}", config.priority + place);
        }
    }
    for uplink in &config.uplinks {
        let _ = writeln!(
            text,
            "[uplink.{}]\ninterface = {:?}",
            uplink.name, uplink.interface
        );
        for (key, value) in [("table", uplink.table), ("mark", uplink.mark)] {
            if let Some(value) = value {
                let _ = writeln!(text, "{key} = {value}");
            }
        }
        for (key, value, default) in [
            ("masquerade", uplink.masquerade, true),
            ("hairpin", uplink.hairpin, true),
            ("clamp-mss", uplink.clamp_mss, true),
            ("accept-forward", uplink.accept_forward, false),
        ] {
            if value != default {
                let _ = writeln!(text, "{key} = {value}");
            }
        }
        if uplink.pins > 0 {
            let _ = writeln!(text, "pin = {}", list(&PINS[..uplink.pins]));
        }
        if uplink.forwards > 0 {
            let forwards = FORWARDS.iter().take(uplink.forwards);
            let forwards: Vec<&str> = forwards.map(|(text, _)| *text).collect();
            let _ = writeln!(text, "forward = [{}]", forwards.join(", "));
        }
    }
    text
}
