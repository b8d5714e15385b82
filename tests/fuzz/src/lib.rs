//! What must hold for any input, target by target: a panic is a finding. The targets of cargo-fuzz look for input that
//! breaks it; tests/corpus.rs asks it of all that they have kept.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write;
use std::net::Ipv4Addr;
use std::os::unix::ffi::OsStringExt;

use mh_hook::config::{Config, place};
use mh_hook::inspect::explain::Question;
use mh_hook::inspect::packet_trace::{
    Connection, Context, Header, Hook, Packet, Position, TracedRuleset,
};
use mh_hook::kernel::iptables_save::Ruleset;
use mh_hook::kernel::link::Link;
use mh_hook::kernel::observe::Kernel;
use mh_hook::kernel::tools::Backend;
use mh_hook::model::forward::Protocol;
use mh_hook::model::link::{LinkState, UplinkLink, check_local};
use mh_hook::model::names::{IfName, UplinkName};
use mh_hook::model::netfilter::{self, Table};
use mh_hook::model::state::State;
use mh_hook::reconcile::apply::lines;
use mh_hook::reconcile::desired::{Up, desired};
use mh_hook::reconcile::diff::{Step, diff};
use mh_hook::reconcile::dnat;
use mh_hook::reconcile::event::{self, Direction, Event};
use mh_hook::reconcile::ownership::Owners;
use mh_hook::reconcile::request::Request;
use mh_hook::runtime::log;

/// A configuration file: refused with places within the text, or its entries are read back as they were written.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let config = match Config::parse(text) {
        Ok(config) => config,
        Err(problems) => {
            assert!(!problems.is_empty(), "refused without a word");
            let lines = text.matches('\n').count() + 1;
            let mut last = (1, 1);
            for problem in problems {
                assert!(text.is_char_boundary(problem.at), "{problem:?}");
                let at = place(text, problem.at);
                assert!(at >= last && at.0 <= lines, "{at:?} behind {last:?}");
                assert!(!problem.message.is_empty());
                last = at;
            }
            return;
        }
    };
    let mut all = State::default();
    for (name, uplink) in &config.uplinks {
        let address = Ipv4Addr::new(203, 0, 113, 10);
        let link = UplinkLink {
            interface: uplink.identity.interface.clone().unwrap_or_else(ppp0),
            address,
            addresses: vec![address],
            state: LinkState::Up,
            mtu: Some(1492),
        };
        let up = Up::new(name, uplink, &link);
        all.merge(desired(&config, &up));
        for (_, rule) in uplink.forwards.iter().flat_map(dnat::rules) {
            assert!(dnat::parse(&rule).is_some(), "{rule:?}");
        }
    }
    let steps = diff(&State::default(), &all);
    literal(&steps);
    assert_eq!(diff(&all, &all), []);
    let read = installed(Some(&config), &save(&all)).expect("our own rules");
    let (mut read, mut tables) = (read.tables, all.tables);
    for own in read.values_mut().chain(tables.values_mut()) {
        own.entries.sort();
    }
    assert_eq!(read, tables);
}

/// Our entries in a listing of iptables-save.
fn installed(config: Option<&Config>, save: &str) -> Option<State> {
    let kernel = Kernel {
        ruleset: Ruleset::parse(save).ok()?,
        ..Kernel::default()
    };
    Some(Owners::new(config, &kernel).installed(&kernel))
}

fn ppp0() -> IfName {
    IfName::parse("ppp0").expect("a name")
}

/// What iptables-save prints: ours is read back as it stands, whatever is beside it, and packets find their way to an
/// end through all of it.
pub fn iptables(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    for line in text.lines() {
        if let Ok(words) = netfilter::words(line) {
            let again = netfilter::words(&netfilter::join(&words)).expect("what was joined");
            assert_eq!(words, again);
        }
    }
    if let Some(state) = installed(None, &text) {
        assert_eq!(diff(&state, &state), []);
        literal(&diff(&state, &State::default()));
        for (key, own) in &state.tables {
            assert!(key.0 != Table::Filter || own.chains.is_empty(), "{key:?}");
            for rule in own.rules() {
                let _ = dnat::parse(rule);
            }
        }
    }
    walk(&text);
    walk(&text.replace("\n-A ", "\n[3:180] -A "));
}

/// The most rules that a packet meets in the listings that are walked.
const MOST: u64 = 10_000;

/// How many rules a packet can meet in a chain: chains that call each other several times each make many of few.
fn length(
    ruleset: &TracedRuleset,
    table: &str,
    chain: &str,
    depth: usize,
    known: &mut BTreeMap<(String, usize), u64>,
) -> u64 {
    let key = (chain.to_owned(), depth);
    if let Some(length) = known.get(&key) {
        return *length;
    }
    let rules = ruleset.tables[table].get(chain).filter(|_| depth < 33);
    let rules = rules.into_iter().flat_map(|chain| &chain.rules);
    let mut sum: u64 = 1;
    for rule in rules {
        let words = netfilter::words(&rule.text).expect("the rule was joined");
        for pair in words
            .windows(2)
            .filter(|pair| pair[0] == "-j" || pair[0] == "-g")
        {
            sum = sum.saturating_add(length(ruleset, table, &pair[1], depth + 1, known));
        }
    }
    known.insert(key, sum);
    sum
}

fn walk(text: &str) {
    let Ok(ruleset) = Ruleset::parse(text) else {
        return;
    };
    let ruleset = TracedRuleset::new(&ruleset);
    for (table, chains) in &ruleset.tables {
        let mut known = BTreeMap::new();
        if chains
            .keys()
            .any(|chain| length(&ruleset, table, chain, 0, &mut known) > MOST)
        {
            return;
        }
    }
    let rulesets = [(Backend::Legacy, ruleset)];
    let address = Ipv4Addr::new(203, 0, 113, 10);
    let link = Link {
        up: true,
        addresses: vec![address],
        ..Link::default()
    };
    let links = BTreeMap::from([("ppp0".to_owned(), link)]);
    let context = Context {
        rulesets: &rulesets,
        native: &[],
        links: &links,
        assumed: Vec::new(),
        final_chain: None,
    };
    let known = Header {
        source: Some(Ipv4Addr::new(192, 0, 2, 9)),
        destination: Some(address),
        source_port: Some(50000),
        destination_port: Some(80),
    };
    let any = (None, Header::default());
    let kinds = [(Some(Protocol::Tcp), known), any];
    let positions = [Position::First, Position::Reply, Position::Later];
    for (position, (protocol, header)) in positions
        .into_iter()
        .flat_map(|position| kinds.map(|kind| (position, kind)))
    {
        let mut packet = Packet {
            iif: Some("ppp0".into()),
            oif: None,
            header,
            mark: 0,
            position,
        };
        let mut connection = Connection::new(protocol, header);
        for hook in [
            Hook::Prerouting,
            Hook::Forward,
            Hook::Postrouting,
            Hook::Input,
            Hook::Output,
        ] {
            let passage = context.pass(hook, &mut packet, &mut connection);
            let _ = passage.stopped.map(|it| (it.deletion(), it.to_string()));
            let _ = passage.doubts.iter().map(ToString::to_string).count();
            packet.oif = Some("eth1".into());
        }
    }
}

/// What iptables-save would print of this.
fn save(state: &State) -> String {
    let mut text = String::new();
    for table in Table::ALL {
        let shares = || state.tables.iter().filter(|((of, _), _)| *of == table);
        let _ = writeln!(text, "*{table}");
        for (_, share) in shares() {
            for chain in share.chains.keys() {
                let _ = writeln!(text, ":{chain} - [0:0]");
            }
        }
        for (_, share) in shares() {
            for (chain, rules) in &share.chains {
                for rule in rules.iter() {
                    let _ = writeln!(text, "-A {chain} {rule}");
                }
            }
            for (chain, rule) in &share.entries {
                let _ = writeln!(text, "-A {chain} {rule}");
            }
        }
        text.push_str("COMMIT\n");
    }
    text
}

/// What a plan does, in each of its forms: lines that stay lines, and words that a shell takes literally.
fn literal(steps: &[Step]) {
    let mut input = String::new();
    for step in steps {
        input.clear();
        if step.table().is_some() {
            input += &lines(step);
        }
        assert!(
            input.lines().all(|line| line.starts_with([':', '-'])),
            "{input:?}"
        );
        for (_, command) in step.commands() {
            let text = command.to_string();
            assert!(!text.contains('\n'), "{text:?}");
            assert!(is_literal(&text), "{text:?}");
        }
        // These are for the log, which has its own way with them.
        for (_, command) in step.changes() {
            assert!(is_literal(&command.to_string()), "{command}");
        }
    }
}

/// Whether a shell would run nothing but this one command, with these words.
fn is_literal(command: &str) -> bool {
    // `echo 1 > /proc/…` is our own.
    let command = command.replace(" > /proc/sys/net/ipv4/conf/", " ");
    let mut quoted = false;
    let mut chars = command.chars();
    while let Some(c) = chars.next() {
        match c {
            '\'' => quoted = !quoted,
            _ if quoted => {}
            '\\' => drop(chars.next()),
            ' ' => {}
            c if c.is_ascii_alphanumeric() || "-_./:,=+@%".contains(c) => {}
            _ => return false,
        }
    }
    !quoted
}

/// The variables of pppd's that an event is read from, in the order in which an input has them.
pub const VARIABLES: [&str; 5] = ["IFNAME", "IPLOCAL", "PPP_IPPARAM", "LINKNAME", "CALL_FILE"];

/// A call of pppd's, from bytes: its direction, the variables, the arguments, a NUL behind each. A variable that is a
/// lone `-` is not set.
#[derive(Debug)]
pub struct Call {
    pub direction: OsString,
    pub variables: Vec<(&'static str, OsString)>,
    pub args: Vec<OsString>,
}

impl Call {
    pub fn parse(data: &[u8]) -> Self {
        let mut words = data
            .split(|byte| *byte == 0)
            .map(|word| OsString::from_vec(word.to_vec()));
        let direction = words.next().unwrap_or_default();
        let variables = VARIABLES
            .into_iter()
            .zip(words.by_ref())
            .filter(|(_, value)| value != "-");
        Self {
            direction,
            variables: variables.collect(),
            args: words.collect(),
        }
    }
}

/// A call, with its variables in the environment if the caller can put them there: refused, or all in it is of the
/// form that it should be; the message of a refusal is short and one line.
pub fn event(call: &Call) {
    let Some(direction) = Direction::parse(&call.direction) else {
        return;
    };
    let config = Config::parse(CONFIG).expect("a configuration that holds");
    match Event::from_pppd(direction, &call.args) {
        Ok(event) => {
            assert_eq!(
                IfName::parse(event.interface.as_str()).expect("a name"),
                event.interface
            );
            assert_eq!(event.identity.interface.as_ref(), Some(&event.interface));
            assert!(direction != Direction::Down || event.identity.address.is_none());
            let request = Request::Event(event);
            let named = request.named(&config);
            assert!(named.is_err() || named.is_ok_and(|names| names.len() < 2));
            if let Some(local) = request.local() {
                let _ = check_local(local, &config.lan.networks);
            }
            assert!(request.to_string().len() < 40);
        }
        Err(error) => {
            let line = log::printable(&format!("{error:#}"));
            assert!(line.len() < 1000, "{line:?}");
            assert!(!line.chars().any(char::is_control), "{line:?}");
        }
    }
    for arg in &call.args {
        let text = arg.to_string_lossy();
        if let Ok(address) = event::address(arg) {
            assert_eq!(address.to_string(), text);
        }
        if let Ok(name) = UplinkName::parse(&text) {
            assert_eq!(UplinkName::of_chain(&name.chain()), Some(name));
        }
    }
    let mut args = call.args.iter().cloned();
    let (to, from_lan) = (args.next(), args.next());
    let words: Vec<OsString> = args.collect();
    let some = |text: Option<OsString>| text.filter(|text| !text.is_empty());
    let _ = Question::parse(&config, &words, some(to), some(from_lan));
}

const CONFIG: &str = r#"
[lan]
interfaces = ["eth1"]
networks = ["192.168.0.0/24"]
[uplink.isp0]
interface = "ppp0"
table = 10
forward = [{ port = 80, to = "192.168.0.2" }, { proto = "any", to = "192.168.0.3" }]
[uplink.isp1]
ipparam = "isp1"
table = 20
forward = [{ port = 80, to = "192.168.0.2" }]
[uplink.isp2]
linkname = "two"
[uplink.isp3]
peer = "three"
"#;
