//! Packets against rules: which rules match, and what they do to a packet. Netfilter itself is asked in
//! tests/flow/explain.bash.

use std::net::Ipv4Addr;

use mh_hook::inspect::packet_trace::{
    Alternatives, Connection, Context, Doubt, Effect, Event, Header, Hook, Packet, Passage,
    Position, TracedRuleset,
};
use mh_hook::kernel::iptables_save::Ruleset;
use mh_hook::kernel::link::{Link, Links};
use mh_hook::kernel::tools::Backend;
use mh_hook::model::forward::Protocol;

fn address(text: &str) -> Option<Ipv4Addr> {
    Some(text.parse().expect("an address"))
}

/// A packet and its connection. `explain` knows all of both; of the packets that `check` traces, the client is not known.
#[derive(Clone, Debug)]
struct Subject {
    packet: Packet,
    connection: Connection,
}

/// A request by ppp0 for a web server on eth1, already forwarded, or another packet of that connection.
fn known(position: Position) -> Subject {
    let header = |destination| Header {
        source: address("192.0.2.9"),
        destination: address(destination),
        source_port: Some(50000),
        destination_port: Some(80),
    };
    Subject {
        packet: Packet {
            iif: Some("ppp0".into()),
            oif: Some("eth1".into()),
            header: header("192.168.0.2"),
            mark: 0x20a,
            position,
        },
        connection: Connection {
            is_dnat: true,
            mark: 0x10a,
            ..Connection::new(Some(Protocol::Tcp), header("203.0.113.10"))
        },
    }
}

/// The same from any client.
fn any_client() -> Subject {
    let mut subject = known(Position::First);
    for header in [&mut subject.packet.header, &mut subject.connection.original] {
        header.source = None;
        header.source_port = None;
    }
    subject
}

/// The same of any protocol.
fn any_protocol() -> Subject {
    let mut subject = any_client();
    subject.packet.header.destination_port = None;
    subject.connection.original.destination_port = None;
    subject.connection.protocol = None;
    subject
}

/// Where the rules of a test are asked.
struct Router {
    rulesets: Vec<(Backend, TracedRuleset)>,
    links: Links,
    table: &'static str,
    hook: Hook,
}

impl Router {
    /// Rules of a hook's chain, or as `CHAIN: rule` of another chain; `policy DROP` is the policy.
    fn new(table: &'static str, hook: Hook, rules: &[&str]) -> Self {
        let mut chains = String::new();
        let mut lines = String::new();
        let mut policy = "ACCEPT";
        for rule in rules {
            if let Some(other) = rule.strip_prefix("policy ") {
                policy = other;
                continue;
            }
            let (chain, rule) = match rule.split_once(": ") {
                Some((chain, rule)) if !chain.contains(' ') => (chain, rule),
                _ => (hook.chain(), *rule),
            };
            if chain != hook.chain() {
                chains += &format!(":{chain} - [0:0]\n");
            }
            lines += &format!("[0:0] -A {chain} {rule}\n");
        }
        let save = format!(
            "*{table}\n:{} {policy} [0:0]\n{chains}{lines}COMMIT\n",
            hook.chain()
        );
        let ruleset = Ruleset::parse(&save).expect("a listing");
        let link = |own: &str| Link {
            up: true,
            addresses: address(own).into_iter().collect(),
            ..Link::default()
        };
        Self {
            rulesets: vec![(Backend::Nft, TracedRuleset::new(&ruleset))],
            links: Links::from([
                ("eth1".to_owned(), link("192.168.0.1")),
                ("ppp0".to_owned(), link("203.0.113.10")),
            ]),
            table,
            hook,
        }
    }

    fn pass(&self, subject: &mut Subject, assumed: &[Doubt]) -> Passage {
        let context = Context {
            rulesets: &self.rulesets,
            native: &[],
            links: &self.links,
            assumed: assumed.to_vec(),
            final_chain: (self.table == "nat").then_some("mh-isp0"),
        };
        context.pass(self.hook, &mut subject.packet, &mut subject.connection)
    }

    /// Whether packets pass: `yes`, `no`, or `maybe` where that depends on doubts.
    fn passes(&self, subject: &Subject) -> &'static str {
        let trace = |assumed: &[Doubt]| {
            let passage = self.pass(&mut subject.clone(), assumed);
            (passage.stopped.is_none(), passage.doubts)
        };
        let (passes, doubts) = trace(&[]);
        let mut differ = false;
        let mut alternatives = Alternatives::default();
        alternatives.add(&[], doubts);
        while let Some(assumed) = alternatives.pop() {
            let (other, doubts) = trace(&assumed);
            alternatives.add(&assumed, doubts);
            differ |= other != passes;
        }
        match (differ || alternatives.are_left(), passes) {
            (true, _) => "maybe",
            (false, true) => "yes",
            (false, false) => "no",
        }
    }
}

fn forward(rules: &[&str], subject: Subject) -> (Passage, Subject) {
    let mut subject = subject;
    let passage = Router::new("filter", Hook::Forward, rules).pass(&mut subject, &[]);
    (passage, subject)
}

fn mangle(rules: &[&str], subject: Subject) -> (Passage, Subject) {
    let mut subject = subject;
    let passage = Router::new("mangle", Hook::Forward, rules).pass(&mut subject, &[]);
    (passage, subject)
}

/// Whether a rule matches that drops: `yes`, `no`, `maybe`.
fn matches(spec: &str, subject: Subject) -> &'static str {
    let (passage, _) = forward(&[&format!("{spec} -j DROP")], subject);
    match (passage.stopped, passage.doubts.len()) {
        (Some(_), 0) => "yes",
        (None, 0) => "no",
        (None, 1) => "maybe",
        other => panic!("{spec}: {other:?}"),
    }
}

/// Fails with all the cases that are wrong.
fn assert_all<T: std::fmt::Debug + PartialEq>(cases: impl IntoIterator<Item = (String, T, T)>) {
    let wrong: Vec<String> = cases
        .into_iter()
        .filter(|(_, found, expected)| found != expected)
        .map(|(case, found, expected)| format!("{case}: {found:?}, not {expected:?}"))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_rule_matches_a_known_packet_any_client_and_any_protocol() {
    // The rule; whether it matches the packet that is known, that of any client, and one of any protocol, too.
    let cases = [
        ("", "yes", "yes", "yes"),
        ("-s 192.0.2.0/24 -d 192.168.0.2/32", "yes", "maybe", "maybe"),
        ("! -s 192.0.2.0/24", "no", "maybe", "maybe"),
        ("-s 0.0.0.0/0", "yes", "yes", "yes"),
        ("-s 10.0.0.1/255.0.0.255", "maybe", "maybe", "maybe"),
        ("-d 10.0.0.0/8", "no", "no", "no"),
        ("! -d 10.0.0.0/8", "yes", "yes", "yes"),
        ("-i ppp+ -o eth1", "yes", "yes", "yes"),
        ("! -i ppp+", "no", "no", "no"),
        ("-i ppp1", "no", "no", "no"),
        ("-i +", "yes", "yes", "yes"),
        ("-p tcp -m tcp --dport 80", "yes", "yes", "maybe"),
        ("-p tcp -m tcp --dport 1:79", "no", "no", "maybe"),
        ("-p tcp -m tcp ! --dport 1:79", "yes", "yes", "maybe"),
        ("-p tcp -m tcp ! --dport 80", "no", "no", "maybe"),
        ("-p tcp -m tcp --dport 80:", "yes", "yes", "maybe"),
        ("-p tcp -m tcp --dport :79", "no", "no", "maybe"),
        ("-p tcp -m tcp --sport 49152:65535", "yes", "maybe", "maybe"),
        ("-p udp -m udp --dport 80", "no", "no", "maybe"),
        ("! -p udp", "yes", "yes", "maybe"),
        ("-p 6", "yes", "yes", "maybe"),
        ("-p 47", "no", "no", "maybe"),
        // Another name of /etc/protocols: none of the protocols that have names here.
        ("-p carp", "no", "no", "maybe"),
        (
            "-p tcp -m multiport --dports 22,70:80",
            "yes",
            "yes",
            "maybe",
        ),
        (
            "-p tcp -m multiport ! --dports 22,443",
            "yes",
            "yes",
            "maybe",
        ),
        ("-p tcp -m multiport --dports 8000:", "no", "no", "maybe"),
        (
            "-p tcp -m multiport --ports 22,50000",
            "yes",
            "maybe",
            "maybe",
        ),
        ("-p tcp -m multiport --ports 22,80", "yes", "yes", "maybe"),
        (
            "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN",
            "yes",
            "yes",
            "maybe",
        ),
        (
            "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN",
            "no",
            "no",
            "maybe",
        ),
        ("-p tcp -m tcp --tcp-flags ALL NONE", "no", "no", "maybe"),
        ("-m mark --mark 0xa/0xff", "yes", "yes", "yes"),
        ("-m mark --mark 0xa", "no", "no", "no"),
        ("-m mark --mark 522", "yes", "yes", "yes"),
        ("-m connmark --mark 0x10a", "yes", "yes", "yes"),
        ("-m connmark --mark 0x20a", "no", "no", "no"),
        (
            "-m mark --mark 0x20a -m connmark --mark 0x10a",
            "yes",
            "yes",
            "yes",
        ),
        (
            "-m connmark --mark 0x10a -m mark --mark 0x10a",
            "no",
            "no",
            "no",
        ),
        ("-m connmark ! --mark 0xa/0xff", "no", "no", "no"),
        ("-m conntrack --ctstate NEW", "yes", "yes", "yes"),
        (
            "-m conntrack --ctstate RELATED,ESTABLISHED",
            "no",
            "no",
            "no",
        ),
        ("-m conntrack --ctstate RELATED", "no", "no", "no"),
        ("-m conntrack ! --ctstate NEW", "no", "no", "no"),
        ("-m conntrack --ctstate DNAT", "yes", "yes", "yes"),
        ("-m conntrack --ctstate INVALID", "no", "no", "no"),
        ("-m conntrack --ctdir REPLY", "no", "no", "no"),
        ("-m conntrack --ctdir ORIGINAL", "yes", "yes", "yes"),
        ("-m conntrack --ctproto 6", "yes", "yes", "maybe"),
        (
            "-m conntrack --ctorigsrc 192.0.2.9",
            "yes",
            "maybe",
            "maybe",
        ),
        ("-m conntrack --ctorigdst 203.0.113.10", "yes", "yes", "yes"),
        ("-m conntrack ! --ctorigdst 203.0.113.10", "no", "no", "no"),
        ("-m conntrack --ctorigdst 192.168.0.2", "no", "no", "no"),
        ("-m conntrack --ctorigdstport 80", "yes", "yes", "maybe"),
        ("-m conntrack --ctexpire 1:20", "maybe", "maybe", "maybe"),
        ("-m state --state NEW", "yes", "yes", "yes"),
        ("-m addrtype --dst-type LOCAL", "no", "no", "no"),
        ("-m addrtype ! --dst-type LOCAL", "yes", "yes", "yes"),
        ("-m addrtype --dst-type UNICAST", "yes", "yes", "yes"),
        ("-m addrtype --dst-type LOCAL,UNICAST", "yes", "yes", "yes"),
        ("-m addrtype --dst-type PROHIBIT", "maybe", "maybe", "maybe"),
        ("-m addrtype --src-type LOCAL", "no", "maybe", "maybe"),
        (
            "-m addrtype ! --dst-type LOCAL --limit-iface-in",
            "maybe",
            "maybe",
            "maybe",
        ),
        (
            "-m addrtype --dst-type LOCAL --limit-iface-in",
            "no",
            "no",
            "no",
        ),
        (
            "-m iprange --src-range 192.0.2.1-192.0.2.9",
            "yes",
            "maybe",
            "maybe",
        ),
        (
            "-m iprange --src-range 192.0.2.10-192.0.2.90",
            "no",
            "maybe",
            "maybe",
        ),
        (
            "-m iprange ! --dst-range 192.168.0.1-192.168.0.3",
            "no",
            "no",
            "no",
        ),
        ("-m pkttype --pkt-type broadcast", "no", "no", "no"),
        ("-f", "no", "no", "no"),
        ("! -f", "yes", "yes", "yes"),
        // Texts that look like options.
        (
            "-m comment --comment \"two words, -j none\"",
            "yes",
            "yes",
            "yes",
        ),
        ("-m comment --comment -j", "yes", "yes", "yes"),
        (
            "-m comment --comment \"-i ppp1\" -i ppp0",
            "yes",
            "yes",
            "yes",
        ),
        ("-m comment --comment ! -i ppp0", "yes", "yes", "yes"),
        (
            "-m string --string \"-j\" --algo bm -i ppp1",
            "no",
            "no",
            "no",
        ),
        // What can't be told from the rules.
        ("-m limit --limit 3/min", "maybe", "maybe", "maybe"),
        ("-m set --match-set banned src", "maybe", "maybe", "maybe"),
        ("-m set ! --match-set banned src", "maybe", "maybe", "maybe"),
        ("-i ppp1 -m limit --limit 3/min", "no", "no", "no"),
        ("-m limit --limit 3/min -i ppp1", "no", "no", "no"),
        (
            "-m recent --update --seconds 60 --name a --rsource",
            "maybe",
            "maybe",
            "maybe",
        ),
        ("-m nobodyknows --dport 80 -p udp", "no", "no", "maybe"),
    ];
    assert_all(cases.map(|(spec, one, client, protocol)| {
        let subjects = [known(Position::First), any_client(), any_protocol()];
        let found = subjects.map(|subject| matches(spec, subject));
        (format!("{spec:?}"), found, [one, client, protocol])
    }));
}

#[test]
fn the_position_of_a_packet_decides_about_states_flags_and_direction() {
    let specs = [
        ("-m conntrack --ctstate NEW", ["yes", "no", "no"]),
        ("-m conntrack --ctstate ESTABLISHED", ["no", "yes", "yes"]),
        ("-m conntrack --ctdir REPLY", ["no", "yes", "no"]),
        (
            "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN",
            ["yes", "no", "no"],
        ),
        ("-p tcp -m tcp --tcp-flags ACK ACK", ["no", "yes", "yes"]),
        (
            "-p tcp -m tcp --tcp-flags SYN,FIN SYN,FIN",
            ["no", "no", "no"],
        ),
        ("-p tcp -m tcp --tcp-flags PSH PSH", ["no", "no", "maybe"]),
    ];
    assert_all(specs.map(|(spec, expected)| {
        let positions = [Position::First, Position::Reply, Position::Later];
        let found = positions.map(|position| matches(spec, known(position)));
        (spec.to_owned(), found, expected)
    }));
}

#[test]
fn without_a_connection_its_matches_never_match() {
    let mut untracked = known(Position::First);
    untracked.connection.is_untracked = true;
    let specs = [
        ("-m conntrack --ctstate NEW", "no"),
        ("-m conntrack --ctstate UNTRACKED", "yes"),
        ("-m conntrack --ctstate INVALID", "no"),
        ("-m connmark --mark 0x10a", "no"),
        ("-m connmark ! --mark 0x1", "no"),
        ("-m conntrack --ctdir ORIGINAL", "no"),
        ("-m conntrack ! --ctorigdst 10.0.0.1", "no"),
    ];
    assert_all(
        specs.map(|(spec, expected)| (spec.into(), matches(spec, untracked.clone()), expected)),
    );
    // The raw table comes before conntrack.
    let raw = |rule: &str| {
        let router = Router::new("raw", Hook::Prerouting, &[rule]);
        router.passes(&known(Position::First))
    };
    assert_eq!(raw("-m conntrack --ctstate NEW -j DROP"), "yes");
    assert_eq!(raw("-m conntrack --ctstate INVALID -j DROP"), "no");
    assert_eq!(raw("-m connmark ! --mark 0x1 -j DROP"), "yes");
    let mut subject = known(Position::First);
    Router::new("raw", Hook::Prerouting, &["-j NOTRACK"]).pass(&mut subject, &[]);
    assert!(subject.connection.is_untracked);
    let mut subject = known(Position::First);
    Router::new("raw", Hook::Prerouting, &["-j CT --helper ftp"]).pass(&mut subject, &[]);
    assert!(!subject.connection.is_untracked);
}

#[test]
fn packets_pass_where_rules_and_policies_let_them() {
    // The rules; whether the packet that is known passes, and those of any client.
    let cases: &[(&[&str], &str, &str)] = &[
        (&[], "yes", "yes"),
        (&["policy DROP"], "no", "no"),
        (&["policy DROP", "-i eth1 -j ACCEPT"], "no", "no"),
        (
            &["policy DROP", "-i ppp+ -p tcp -m tcp --dport 80 -j ACCEPT"],
            "yes",
            "yes",
        ),
        (&["policy DROP", "-p udp -j ACCEPT"], "no", "no"),
        (
            &[
                "policy DROP",
                "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            ],
            "no",
            "no",
        ),
        (
            &["policy DROP", "-m conntrack --ctstate DNAT -j ACCEPT"],
            "yes",
            "yes",
        ),
        (
            &["policy DROP", "-s 198.51.100.0/24 -j ACCEPT"],
            "no",
            "maybe",
        ),
        (
            &["policy DROP", "-m set --match-set good src -j ACCEPT"],
            "maybe",
            "maybe",
        ),
        (
            &["policy DROP", "-p tcp -m tcp --dport 8000: -j ACCEPT"],
            "no",
            "no",
        ),
        (
            &["! -i eth1 -j REJECT --reject-with icmp-port-unreachable"],
            "no",
            "no",
        ),
        (&["-d 10.0.0.0/8 -j DROP"], "yes", "yes"),
        (&["-j TARPIT --tarpit"], "no", "no"),
        (
            &["-m iprange --src-range 192.0.2.1-192.0.2.9 -j DROP"],
            "no",
            "maybe",
        ),
        (
            &["-m conntrack --ctorigdst 203.0.113.10 -j DROP"],
            "no",
            "no",
        ),
        (
            &["-m comment --comment \"-j DROP\" -j LOG --log-prefix DROP"],
            "yes",
            "yes",
        ),
        // A program decides, or nobody knows what the target does.
        (&["-j NFQUEUE --queue-num 1"], "maybe", "maybe"),
        (
            &["policy DROP", "-j NFQUEUE --queue-num 1"],
            "maybe",
            "maybe",
        ),
        (&["-i ppp1 -j NFQUEUE --queue-num 1"], "yes", "yes"),
        (
            &["policy DROP", "-m limit --limit 1/s -j NFQUEUE"],
            "maybe",
            "maybe",
        ),
        (&["policy DROP", "-j NOBODYKNOWS"], "maybe", "maybe"),
        // Chains.
        (&["-j web", "web: -j DROP"], "no", "no"),
        (&["-j web", "-j DROP", "web: -j RETURN"], "no", "no"),
        (&["-j web", "-j DROP", "web: -p udp -j ACCEPT"], "no", "no"),
        (
            &["-j web", "-j DROP", "web: -p tcp -j ACCEPT"],
            "yes",
            "yes",
        ),
        // RETURN in a chain that was reached with -g leads to where the chain before was called; from a built-in chain,
        // to the policy.
        (&["-g web", "-j DROP", "web: -j RETURN"], "yes", "yes"),
        (
            &["policy DROP", "-g web", "-j ACCEPT", "web: -j RETURN"],
            "no",
            "no",
        ),
        (
            &[
                "-j one",
                "-j DROP",
                "one: -g two",
                "one: -j ACCEPT",
                "two: -j RETURN",
            ],
            "no",
            "no",
        ),
        // fail2ban, of which some clients are banned, and docker.
        (
            &[
                "-p tcp -j f2b",
                "f2b: -s 192.0.2.7/32 -j REJECT",
                "f2b: -j RETURN",
            ],
            "yes",
            "maybe",
        ),
        (
            &[
                "policy DROP",
                "-j DOCKER-USER",
                "-o docker0 -j DOCKER",
                "-i docker0 ! -o docker0 -j ACCEPT",
                "DOCKER-USER: -j RETURN",
                "DOCKER: -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -j ACCEPT",
            ],
            "no",
            "no",
        ),
        // Doubts that only count together: the second is met only once the first has come true.
        (
            &[
                "policy DROP",
                "-m set --match-set a src -j one",
                "one: -m limit --limit 1/s -j ACCEPT",
            ],
            "maybe",
            "maybe",
        ),
        (
            &[
                "-m set --match-set a src -j RETURN",
                "-m set --match-set b src -j RETURN",
                "-j DROP",
            ],
            "maybe",
            "maybe",
        ),
        (
            &[
                "-j one",
                "-j two",
                "one: -m set --match-set a src -j RETURN",
                "one: -j DROP",
                "two: -m set --match-set b src -j RETURN",
                "two: -j DROP",
            ],
            "maybe",
            "maybe",
        ),
        // The kernel refuses circles; this ends on one.
        (&["-j one", "one: -j two", "two: -j one"], "yes", "yes"),
        (
            &["-m limit --limit 1/s -j one", "one: -j two", "two: -j one"],
            "yes",
            "yes",
        ),
    ];
    assert_all(cases.iter().map(|(rules, one, any)| {
        let router = Router::new("filter", Hook::Forward, rules);
        let subjects = [known(Position::First), any_client()];
        let found = subjects.map(|subject| router.passes(&subject));
        (format!("{rules:?}"), found, [*one, *any])
    }));
}

#[test]
fn marks_change_under_their_masks() {
    // The rule; the packet's mark and the connection's, 0x20a and 0x10a before.
    let cases = [
        ("-j MARK --set-xmark 0x1/0xffffffff", (0x1, 0x10a)),
        ("-j MARK --set-xmark 0x1/0xff", (0x201, 0x10a)),
        ("-j MARK --set-mark 0x1", (0x1, 0x10a)),
        ("-j MARK --set-mark 0x1/0xf00", (0x00b, 0x10a)),
        ("-j MARK --and-mark 0xff00", (0x200, 0x10a)),
        ("-j MARK --or-mark 0x40000", (0x4020a, 0x10a)),
        ("-j MARK --xor-mark 0xff", (0x2f5, 0x10a)),
        ("-j CONNMARK --set-xmark 0x0/0xff", (0x20a, 0x100)),
        ("-j CONNMARK --set-mark 0x5", (0x20a, 0x5)),
        ("-j CONNMARK --and-mark 0xf", (0x20a, 0xa)),
        ("-j CONNMARK --or-mark 0x1", (0x20a, 0x10b)),
        ("-j CONNMARK --save-mark", (0x20a, 0x20a)),
        (
            "-j CONNMARK --save-mark --nfmask 0xffffffff --ctmask 0xffffffff",
            (0x20a, 0x20a),
        ),
        ("-j CONNMARK --save-mark --mask 0xff", (0x20a, 0x10a)),
        (
            "-j CONNMARK --save-mark --nfmask 0xff00 --ctmask 0xff00",
            (0x20a, 0x20a),
        ),
        ("-j CONNMARK --restore-mark", (0x10a, 0x10a)),
        ("-j CONNMARK --restore-mark --mask 0xff00", (0x10a, 0x10a)),
        (
            "-j CONNMARK --restore-mark --nfmask 0xff --ctmask 0xff",
            (0x20a, 0x10a),
        ),
    ];
    assert_all(cases.map(|(rule, expected)| {
        let (passage, subject) = mangle(&[rule], any_client());
        assert_eq!(passage.marks.len(), 1, "{rule}");
        let found = (subject.packet.mark, subject.connection.mark);
        (rule.to_owned(), found, expected)
    }));
    // Without a connection there is no mark to set or copy.
    let mut untracked = known(Position::First);
    untracked.connection.is_untracked = true;
    let (passage, _) = mangle(&["-j CONNMARK --restore-mark"], untracked);
    assert!(passage.marks.is_empty());
}

#[test]
fn marks_follow_the_rules_that_surely_match() {
    let mut subject = any_client();
    (subject.packet.mark, subject.connection.mark) = (0, 0);
    let rules = [
        "-i ppp0 -m connmark --mark 0x0/0xff -j CONNMARK --set-xmark 0xa/0xff",
        "-i ppp0 -m connmark --mark 0x0/0xff -j CONNMARK --set-xmark 0xb/0xff",
        "-j MARK --set-xmark 0x500/0xff00",
        "-s 192.0.2.7/32 -j CONNMARK --save-mark",
        "-j CONNMARK --save-mark --nfmask 0xff00 --ctmask 0xff00",
    ];
    let (passage, subject) = mangle(&rules, subject);
    assert_eq!(
        (subject.packet.mark, subject.connection.mark),
        (0x500, 0x50a)
    );
    let changed: Vec<u32> = passage.marks.iter().map(|change| change.changed).collect();
    assert_eq!(changed, [0xa, 0x500, 0x500]);
    let doubts: Vec<usize> = passage.doubts.iter().map(|it| it.place.number).collect();
    assert_eq!(doubts, [4]);
}

#[test]
fn a_fix_leaves_our_bits_of_a_mark_alone() {
    for (rule, expected) in [
        (
            "-j MARK --set-mark 0x5",
            "-j MARK --set-xmark 0x0/0xffffff00",
        ),
        (
            "-j CONNMARK --or-mark 0x101",
            "-j CONNMARK --set-xmark 0x100/0x100",
        ),
        (
            "-j CONNMARK --save-mark",
            "-j CONNMARK --save-mark --nfmask 0xffffff00 --ctmask 0xffffff00",
        ),
        (
            "-j CONNMARK --restore-mark --mask 0xf0f",
            "-j CONNMARK --restore-mark --nfmask 0xf00 --ctmask 0xf00",
        ),
    ] {
        let (passage, _) = mangle(&[rule], any_client());
        assert_eq!(
            passage.marks[0].action.without(0xff).to_string(),
            expected,
            "{rule}"
        );
    }
}

#[test]
fn translations_change_the_address_that_they_are_for() {
    let header = |hook, rule| {
        let mut subject = known(Position::First);
        subject.packet.header = subject.connection.original;
        let router = Router::new("nat", hook, &[rule]);
        let passage = router.pass(&mut subject, &[]);
        assert!(passage.nat.is_some(), "{rule}");
        let Header {
            source,
            destination,
            destination_port,
            ..
        } = subject.packet.header;
        let shown = |it: Option<Ipv4Addr>| it.map_or("?".into(), |it| it.to_string());
        let port = destination_port.unwrap_or_default();
        format!("{} {}:{port}", shown(source), shown(destination))
    };
    let prerouting = |rule| header(Hook::Prerouting, rule);
    let postrouting = |rule| header(Hook::Postrouting, rule);
    assert_eq!(
        prerouting("-j DNAT --to-destination 10.0.0.5"),
        "192.0.2.9 10.0.0.5:80"
    );
    assert_eq!(
        prerouting("-j DNAT --to-destination 10.0.0.5:81"),
        "192.0.2.9 10.0.0.5:81"
    );
    assert_eq!(
        prerouting("-j DNAT --to-destination 10.0.0.5-10.0.0.9:90-99"),
        "192.0.2.9 10.0.0.5:90"
    );
    assert_eq!(
        prerouting("-j DNAT --to-destination :81"),
        "192.0.2.9 203.0.113.10:81"
    );
    assert_eq!(
        prerouting("-j REDIRECT --to-ports 3128"),
        "192.0.2.9 203.0.113.10:3128"
    );
    assert_eq!(
        prerouting("-j NETMAP --to 10.1.2.0/24"),
        "192.0.2.9 10.1.2.10:80"
    );
    assert_eq!(
        postrouting("-j NETMAP --to 10.1.2.0/24"),
        "10.1.2.9 203.0.113.10:80"
    );
    assert_eq!(
        postrouting("-j SNAT --to-source 10.0.0.5"),
        "10.0.0.5 203.0.113.10:80"
    );
    assert_eq!(
        postrouting("-o eth1 -j MASQUERADE"),
        "192.168.0.1 203.0.113.10:80"
    );
}

#[test]
fn a_foreign_rule_before_our_dnat_chain_is_told_from_ours() {
    let taker = |rules: &[&str]| {
        let router = Router::new("nat", Hook::Prerouting, rules);
        let mut subject = any_client();
        subject.packet.header = subject.connection.original;
        let passage = router.pass(&mut subject, &[]);
        passage.accepted.first().map(|place| place.number)
    };
    let ours = "-i ppp0 -m addrtype --dst-type LOCAL -j mh-isp0";
    let own = "mh-isp0: -p tcp -j DNAT --to-destination 192.168.0.2";
    assert_eq!(taker(&[ours, "-j ACCEPT", own]), Some(1));
    assert_eq!(taker(&["-j ACCEPT", ours, own]), Some(1));
    assert_eq!(taker(&["-p udp -j ACCEPT", ours, own]), Some(2));
    assert_eq!(taker(&["-j NETMAP --to 10.0.0.0/24", ours, own]), Some(1));
    assert_eq!(taker(&["-s 192.0.2.9 -j ACCEPT", ours, own]), Some(2));
}

#[test]
fn a_doubt_is_one_only_where_it_makes_a_difference() {
    let doubts = |rules: &[&str]| {
        let (passage, _) = forward(rules, known(Position::First));
        let doubts = passage.doubts.into_iter();
        doubts.map(|it| (it.event, it.effect)).collect::<Vec<_>>()
    };
    let limit = "-m limit --limit 3/min";
    assert_eq!(doubts(&[&format!("{limit} -j LOG")]), []);
    assert_eq!(doubts(&[limit]), []);
    assert_eq!(doubts(&[&format!("{limit} -j log"), "log: -j LOG"]), []);
    let stops = [(Event::Matches, Effect::Stops)];
    assert_eq!(doubts(&[&format!("{limit} -j DROP")]), stops);
    assert_eq!(doubts(&[&format!("{limit} -j no"), "no: -j DROP"]), stops);
    assert_eq!(
        doubts(&[&format!("{limit} -j a"), "a: -j b", "b: -j DROP"]),
        stops
    );
    let other = [(Event::Matches, Effect::Passes)];
    assert_eq!(doubts(&[&format!("{limit} -j ACCEPT")]), other);
    assert_eq!(doubts(&[&format!("{limit} -g no"), "no: -j DROP"]), other);
    let queue = [
        (Event::Accepts, Effect::Passes),
        (Event::Stops, Effect::Stops),
    ];
    assert_eq!(doubts(&["-j NFQUEUE --queue-num 1"]), queue);
}

#[test]
fn many_doubts_end_in_time_and_are_not_taken_for_certainty() {
    let accept: Vec<String> = (0..200)
        .map(|i| format!("-s 198.51.100.{i} -p udp -m limit --limit {i}/s -j ACCEPT"))
        .chain((0..200).map(|i| format!("-m set --match-set s{i} src -j MARK --set-mark 1")))
        .collect();
    let mut rules: Vec<&str> = accept.iter().map(String::as_str).collect();
    rules.push("-j DROP");
    let router = Router::new("filter", Hook::Forward, &rules);
    assert_eq!(router.passes(&any_client()), "maybe");
}

#[test]
fn chains_that_call_each_other_often_end_in_time() {
    let mut rules = vec!["-j c0".to_owned()];
    for i in 0..30 {
        let next = format!("c{i}: -j c{}", i + 1);
        rules.extend([
            next.clone(),
            next,
            format!("c{i}: -m limit --limit 1/s -j c{}", i + 1),
        ]);
    }
    rules.push("c30: -j DROP".into());
    let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
    let subject = known(Position::First);
    assert!(forward(&rules, subject.clone()).0.stopped.is_some());
    // Nothing stops the packet: it would go each of 2^30 ways.
    let (passage, _) = forward(&rules[..rules.len() - 1], subject);
    assert!(passage.stopped.is_none());
}

#[test]
fn a_comment_of_several_lines_is_one_rule() {
    let save = "*nat\n:PREROUTING ACCEPT [0:0]\n:mh-isp0 - [0:0]\n\
        [1:2] -A PREROUTING -m comment --comment \"one\n-A mh-isp0 -j DROP\nCOMMIT\n\\\" three\" -j ACCEPT\n\
        -A mh-isp0 -j RETURN\nCOMMIT\n";
    let ruleset = Ruleset::parse(save).expect("a listing");
    let traced = TracedRuleset::new(&ruleset);
    let rules = &traced.tables["nat"]["PREROUTING"].rules;
    assert_eq!(rules.len(), 1, "{rules:?}");
    assert_eq!(traced.tables["nat"]["mh-isp0"].rules.len(), 1);
}
