//! Packets against rules: which match, and what they make of a packet. What netfilter itself makes of it is asked in
//! tests/flow/explain.bash.

use std::collections::BTreeMap;

use mh_hook::command::Backend;
use mh_hook::conntrack::Tuple;
use mh_hook::link::Link;
use mh_hook::packet::{Connection, Ground, Hook, Packet, Passage, Turn};
use mh_hook::ruleset::Ruleset;

/// Rules of a table's FORWARD chain, and of others by `CHAIN: rule`, as iptables-save has them.
fn rulesets(table: &str, rules: &[&str]) -> Vec<(Backend, Ruleset)> {
    let mut save = format!("*{table}\n:FORWARD ACCEPT [0:0]\n");
    for rule in rules {
        let (chain, rule) = rule.split_once(": ").unwrap_or(("FORWARD", rule));
        save += &format!("[0:0] -A {chain} {rule}\n");
    }
    vec![(Backend::Nft, Ruleset::parse(&(save + "COMMIT\n")))]
}

/// A request by ppp0 to a web server behind eth1, forwarded already, or another packet of its connection.
fn request(turn: Turn) -> (Packet, Connection) {
    let tuple = |destination: &str| Tuple {
        source: "192.0.2.9".parse().expect("an address"),
        destination: destination.parse().expect("an address"),
        ports: Some((50000, 80)),
    };
    let packet = Packet {
        iif: Some("ppp0".into()),
        oif: Some("eth1".into()),
        tuple: tuple("192.168.0.2"),
        mark: 0x20a,
        turn,
    };
    let connection = Connection {
        protocol: 6,
        original: tuple("203.0.113.10"),
        is_dnat: true,
        is_snat: false,
        is_untracked: false,
        mark: 0x10a,
    };
    (packet, connection)
}

fn walk(table: &str, rules: &[&str], turn: Turn) -> (Passage, Packet, Connection) {
    let rulesets = rulesets(table, rules);
    let router = Link {
        up: true,
        addresses: vec!["192.168.0.1".parse().expect("an address")],
        ..Link::default()
    };
    let links = BTreeMap::from([("eth1".to_owned(), router)]);
    let ground = Ground {
        rulesets: &rulesets,
        links: &links,
        assumed: None,
    };
    let (mut packet, mut connection) = request(turn);
    let passage = ground.pass(Hook::Forward, &mut packet, &mut connection);
    (passage, packet, connection)
}

/// What is said of a rule with this match that drops: `yes`, `no`, `maybe`.
fn matches(spec: &str, turn: Turn) -> &'static str {
    let (passage, ..) = walk("filter", &[&format!("{spec} -j DROP")], turn);
    match (passage.stopped, passage.doubts.len()) {
        (Some(_), 0) => "yes",
        (None, 0) => "no",
        (None, 1) => "maybe",
        other => panic!("{spec}: {other:?}"),
    }
}

#[test]
fn matches_that_hold_and_do_not() {
    let cases = [
        ("", "yes"),
        ("-s 192.0.2.0/24 -d 192.168.0.2/32", "yes"),
        ("! -s 192.0.2.0/24", "no"),
        ("-i ppp+ -o eth1", "yes"),
        ("! -i ppp+", "no"),
        ("-i ppp1", "no"),
        ("-p tcp -m tcp --dport 80", "yes"),
        ("-p tcp -m tcp --dport 1:79", "no"),
        ("-p tcp -m tcp ! --dport 1:79", "yes"),
        ("-p tcp -m tcp --sport 49152:65535", "yes"),
        ("-p udp -m udp --dport 80", "no"),
        ("-p 6", "yes"),
        ("-p tcp -m multiport --dports 22,70:80", "yes"),
        ("-p tcp -m multiport --ports 22,50000", "yes"),
        ("-p tcp -m multiport ! --dports 22,443", "yes"),
        ("-m mark --mark 0xa/0xff", "yes"),
        ("-m mark --mark 0xa", "no"),
        ("-m connmark --mark 0x10a", "yes"),
        ("-m connmark ! --mark 0xa/0xff", "no"),
        ("-m conntrack --ctstate NEW", "yes"),
        ("-m conntrack --ctstate RELATED,ESTABLISHED", "no"),
        ("-m conntrack --ctstate DNAT", "yes"),
        ("-m conntrack --ctorigdst 203.0.113.10", "yes"),
        ("-m conntrack --ctorigdst 192.168.0.2", "no"),
        ("-m state --state NEW", "yes"),
        ("-m addrtype --dst-type LOCAL", "no"),
        ("-m addrtype ! --dst-type LOCAL", "yes"),
        ("-m iprange --src-range 192.0.2.1-192.0.2.9", "yes"),
        ("-m iprange --src-range 192.0.2.10-192.0.2.90", "no"),
        ("-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN", "yes"),
        ("-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN", "no"),
        ("-m comment --comment \"two words, -j none\"", "yes"),
        ("-f", "no"),
        // What can't be told from the rules.
        ("-m limit --limit 3/min", "maybe"),
        ("-m set --match-set banned src", "maybe"),
        ("-m set ! --match-set banned src", "maybe"),
        ("-i ppp1 -m limit --limit 3/min", "no"),
        ("-m limit --limit 3/min -i ppp1", "no"),
        ("-p carp", "maybe"),
        ("-m conntrack --ctexpire 1:20", "maybe"),
    ];
    let wrong: Vec<String> = cases
        .iter()
        .filter(|(spec, expected)| matches(spec, Turn::First) != *expected)
        .map(|(spec, expected)| format!("{spec:?}: not {expected}"))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_turn_of_a_packet_decides_about_states_and_flags() {
    let new = "-m conntrack --ctstate NEW";
    let established = "-m conntrack --ctstate ESTABLISHED";
    let syn = "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN";
    let ack = "-p tcp -m tcp --tcp-flags ACK ACK";
    let reply = "-m conntrack --ctdir REPLY";
    let answers = |turn| [new, established, syn, ack, reply].map(|spec| matches(spec, turn));
    assert_eq!(answers(Turn::First), ["yes", "no", "yes", "no", "no"]);
    assert_eq!(answers(Turn::Reply), ["no", "yes", "no", "yes", "yes"]);
    assert_eq!(answers(Turn::Later), ["no", "yes", "no", "yes", "no"]);
}

#[test]
fn chains_call_each_other_and_return() {
    let stopped = |rules: &[&str]| walk("filter", rules, Turn::First).0.stopped.is_some();
    assert!(stopped(&["-j web", "web: -j DROP"]));
    assert!(stopped(&["-j web", "-j DROP", "web: -j RETURN"]));
    assert!(stopped(&["-j web", "-j DROP", "web: -p udp -j ACCEPT"]));
    assert!(!stopped(&["-j web", "-j DROP", "web: -p tcp -j ACCEPT"]));
    // Whoever was gone to returns to where the goer was called from; from a built-in chain, to its policy.
    assert!(!stopped(&["-g web", "-j DROP", "web: -j RETURN"]));
    assert!(stopped(&[
        "-j one",
        "-j DROP",
        "one: -g two",
        "one: -j ACCEPT",
        "two: -j RETURN"
    ]));
    // The kernel would not have a circle; nobody should hang on one.
    assert!(!stopped(&["-j one", "one: -j two", "two: -j one"]));
}

#[test]
fn marks_change_under_their_masks() {
    let marks = |rule: &str| {
        let (passage, packet, connection) = walk("mangle", &[rule], Turn::First);
        assert_eq!(passage.marks.len(), 1, "{rule}");
        (packet.mark, connection.mark)
    };
    assert_eq!(marks("-j MARK --set-xmark 0x1/0xffffffff"), (0x1, 0x10a));
    assert_eq!(marks("-j MARK --set-xmark 0x1/0xff"), (0x201, 0x10a));
    assert_eq!(marks("-j CONNMARK --set-xmark 0x0/0xff"), (0x20a, 0x100));
    assert_eq!(
        marks("-j CONNMARK --save-mark --nfmask 0xffffffff --ctmask 0xffffffff"),
        (0x20a, 0x20a)
    );
    assert_eq!(
        marks("-j CONNMARK --restore-mark --nfmask 0xff --ctmask 0xff"),
        (0x20a, 0x10a)
    );
    assert_eq!(marks("-j CONNMARK --restore-mark"), (0x10a, 0x10a));
}

#[test]
fn a_doubt_is_one_only_where_it_makes_a_difference() {
    let doubts = |rules: &[&str]| walk("filter", rules, Turn::First).0.doubts.len();
    assert_eq!(doubts(&["-m limit --limit 3/min -j LOG"]), 0);
    assert_eq!(doubts(&["-m limit --limit 3/min"]), 0);
    assert_eq!(doubts(&["-m limit --limit 3/min -j DROP"]), 1);
    assert_eq!(doubts(&["-m limit --limit 3/min -j log", "log: -j LOG"]), 0);
    assert_eq!(doubts(&["-m limit --limit 3/min -j no", "no: -j DROP"]), 1);
    assert_eq!(doubts(&["-j NFQUEUE --queue-num 1"]), 1);
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
    assert!(walk("filter", &rules, Turn::First).0.stopped.is_some());
    // Nothing stops it: each of 2^30 ways would be gone.
    let (passage, ..) = walk("filter", &rules[..rules.len() - 1], Turn::First);
    assert!(passage.stopped.is_none());
}

#[test]
fn a_comment_of_several_lines_is_one_rule() {
    let save = "*nat\n:PREROUTING ACCEPT [0:0]\n:mh-isp0 - [0:0]\n\
        -A PREROUTING -m comment --comment \"one\n-A mh-isp0 -j DROP\nCOMMIT\n\\\" three\" -j ACCEPT\n\
        -A mh-isp0 -j RETURN\nCOMMIT\n";
    let shares = mh_hook::iptables::parse(&mut save.as_bytes()).expect("it is whole");
    let share = shares.values().next().expect("the chain of isp0");
    assert_eq!(share.rules().count(), 1, "{share:?}");
    assert_eq!(share.entries.len(), 0, "{share:?}");
    let ruleset = Ruleset::parse(&save.replace("-A PREROUTING", "[1:2] -A PREROUTING"));
    let chain = ruleset.chain("nat", "PREROUTING").expect("the chain");
    assert_eq!(chain.rules.len(), 1, "{chain:?}");
}
