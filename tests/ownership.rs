//! Whose entries are: what an uplink desires is its own, with a configuration and without; a request about one uplink leaves
//! every other uplink's entries as they are; and what only looks like ours is somebody's. An entry of a new kind whose
//! owner nobody has said is found here.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::Ipv4Addr;

use mh_hook::config::{Config, KEYS};
use mh_hook::kernel::iptables_save::Ruleset;
use mh_hook::kernel::link::{Link, Links};
use mh_hook::kernel::observe::Kernel;
use mh_hook::kernel::routing::RoutingDump;
use mh_hook::model::link::{LinkState, UplinkLink};
use mh_hook::model::names::{IfName, UplinkName};
use mh_hook::model::netfilter::{Rule, Table};
use mh_hook::model::route::{Route, RouteRule};
use mh_hook::model::state::{Entry, State};
use mh_hook::reconcile::Plan;
use mh_hook::reconcile::desired::{Up, desired};
use mh_hook::reconcile::dnat::AllChains;
use mh_hook::reconcile::event::{Direction, Event};
use mh_hook::reconcile::ownership::{Claimant, Owner, Owners};
use mh_hook::reconcile::request::Request;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

/// An uplink of a random configuration, and its link.
#[derive(Clone, Debug)]
struct Uplink {
    table: Option<u32>,
    switches: [bool; 4],
    forwards: usize,
    pin: Option<&'static str>,
    /// Known by ipparam: nothing but the entries tells the interface.
    is_known_by_ipparam: bool,
    address: Ipv4Addr,
}

const FORWARDS: [&str; 3] = [
    r#"{ port = 80, to = "192.168.0.2" }"#,
    r#"{ port = 2222, to = "192.168.0.2:22", from = ["192.0.2.77", "198.51.100.0/24"] }"#,
    r#"{ proto = ["gre", "esp"], to = "192.168.0.4" }"#,
];

/// The keys that [`config`] writes, or that need no other value to be tried: whoever adds one adds it there, too.
const TRIED: [&str; 13] = [
    "interface",
    "ipparam",
    "linkname",
    "peer",
    "address",
    "table",
    "mark",
    "masquerade",
    "hairpin",
    "clamp-mss",
    "accept-forward",
    "pin",
    "forward",
];

#[test]
fn every_key_of_an_uplink_is_tried_here() {
    let (_, keys) = KEYS[4];
    assert_eq!(keys, TRIED);
}

fn uplink() -> impl Strategy<Value = Uplink> {
    let addresses = [[203, 0, 113, 10], [198, 51, 100, 20], [100, 64, 0, 1]];
    (
        prop_oneof![4 => Just(true), 1 => Just(false)],
        any::<[bool; 4]>(),
        0..=FORWARDS.len(),
        select(vec![None, Some("192.168.0.25"), Some("10.8.0.128/25")]),
        any::<bool>(),
        // Two links may have the same address.
        select(addresses.map(Ipv4Addr::from).to_vec()),
    )
        .prop_map(
            |(has_table, switches, forwards, pin, is_known_by_ipparam, address)| Uplink {
                table: has_table.then_some(10),
                switches,
                forwards: if has_table { forwards } else { 0 },
                pin: pin.filter(|_| has_table),
                is_known_by_ipparam,
                address,
            },
        )
}

/// An uplink with a table and every switch on, known by its interface.
fn plain_uplink() -> Uplink {
    Uplink {
        table: Some(10),
        switches: [true; 4],
        forwards: 0,
        pin: None,
        is_known_by_ipparam: false,
        address: [203, 0, 113, 10].into(),
    }
}

fn name(index: usize) -> UplinkName {
    UplinkName::parse(&format!("isp{index}")).expect("a name")
}

fn interface(index: usize) -> IfName {
    IfName::parse(&format!("ppp{index}")).expect("a name")
}

fn config(uplinks: &[Uplink]) -> Config {
    let mut text =
        "[lan]\ninterfaces = ['eth1', 'eth2']\nnetworks = ['192.168.0.0/24', '10.8.0.0/16']\n"
            .to_owned();
    let mut pinned = Vec::new();
    for (index, uplink) in uplinks.iter().enumerate() {
        let identity = match uplink.is_known_by_ipparam {
            true => format!("ipparam = 'isp{index}'"),
            false => format!("interface = 'ppp{index}'"),
        };
        let _ = writeln!(text, "[uplink.isp{index}]\n{identity}");
        for (key, value) in ["masquerade", "hairpin", "clamp-mss", "accept-forward"]
            .iter()
            .zip(uplink.switches)
        {
            let _ = writeln!(text, "{key} = {value}");
        }
        if let Some(table) = uplink.table {
            let _ = writeln!(text, "table = {}", table as usize + index);
        }
        if let Some(pin) = uplink.pin.filter(|pin| !pinned.contains(pin)) {
            pinned.push(pin);
            let _ = writeln!(text, "pin = ['{pin}']");
        }
        if uplink.forwards > 0 {
            let forwards = FORWARDS[..uplink.forwards].join(", ");
            let _ = writeln!(text, "forward = [{forwards}]");
        }
    }
    Config::parse(&text).expect("a configuration that holds")
}

fn desired_by(config: &Config, uplinks: &[Uplink], index: usize) -> State {
    let name = name(index);
    let link = UplinkLink {
        interface: interface(index),
        address: uplinks[index].address,
        addresses: vec![uplinks[index].address],
        state: LinkState::Up,
        mtu: Some(1492),
    };
    let up = Up::new(&name, &config.uplinks[&name], &link);
    desired(config, &up)
}

/// A kernel that holds these entries, some foreign ones, and a link for each uplink.
fn kernel(uplinks: &[Uplink], state: &State) -> Kernel {
    let mut links: Links = (0..uplinks.len())
        .map(|index| {
            let link = Link {
                up: true,
                addresses: vec![uplinks[index].address],
                mtu: Some(1492),
                src_valid_mark: state.src_valid_mark.contains(&interface(index)),
                ..Link::default()
            };
            (interface(index).to_string(), link)
        })
        .collect();
    links.insert("eth1".into(), Link::default());
    let mut save = String::new();
    for table in Table::ALL {
        let own = || state.tables.iter().filter(|((of, _), _)| *of == table);
        let _ = writeln!(save, "*{table}\n:FORWARD ACCEPT [0:0]");
        for (_, own) in own() {
            own.chains.keys().for_each(|chain| {
                let _ = writeln!(save, ":{chain} - [0:0]");
            });
        }
        let _ = writeln!(save, "-A FORWARD -i eth1 -j ACCEPT");
        for (_, own) in own() {
            for (chain, rule) in &own.entries {
                let _ = writeln!(save, "-A {chain} {rule}");
            }
            for (chain, rules) in &own.chains {
                for rule in rules.iter() {
                    let _ = writeln!(save, "-A {chain} {rule}");
                }
            }
        }
        save.push_str("COMMIT\n");
    }
    Kernel {
        routing: RoutingDump {
            rules: state.rules.iter().cloned().collect(),
            routes: state.routes.iter().cloned().collect(),
        },
        ruleset: Ruleset::parse(&save).expect("a listing"),
        dialled: Vec::new(),
        links,
    }
}

fn all(config: &Config, uplinks: &[Uplink]) -> State {
    let mut all = State::default();
    for index in 0..uplinks.len() {
        all.merge(desired_by(config, uplinks, index));
    }
    all
}

/// Those of the entries whose place is not among the missing. The route by a link stays: nothing else may tell where an
/// uplink is that is known by its ipparam, and so whose a rule is that names an address of two links.
fn some(state: &State, missing: &[bool]) -> State {
    let count = std::cell::Cell::new(0);
    state.filter(|entry| {
        let place = count.replace(count.get() + 1);
        let tells_the_link = matches!(entry, Entry::Route(route) if route.dev.is_some());
        tells_the_link || !missing[place % missing.len()]
    })
}

/// The entries of the one that the other has not, in words.
fn without(state: &State, other: &State) -> Vec<String> {
    let missing = std::cell::RefCell::new(Vec::new());
    state.filter(|entry| {
        if !other.contains(entry) {
            missing.borrow_mut().push(format!("{entry:?}"));
        }
        true
    });
    missing.into_inner()
}

fn requests(index: usize, address: Ipv4Addr) -> Vec<Request> {
    let event = |direction| {
        let args = [
            interface(index).to_string(),
            String::new(),
            String::new(),
            address.to_string(),
            String::new(),
            format!("isp{index}"),
        ];
        let args = args.map(Into::into);
        Request::Event(Event::from_pppd(direction, &args).expect("an event"))
    };
    vec![
        event(Direction::Up),
        event(Direction::Down),
        event(Direction::PreUp),
        Request::Down {
            interface: interface(index),
        },
        Request::Up {
            interface: interface(index),
            uplink: Some(name(index)),
            local: None,
        },
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whoever adds a kind of entry to `desired` must say in `owner` whose it is.
    #[test]
    fn what_an_uplink_desires_is_its_own(uplinks in vec(uplink(), 1..4)) {
        let config = config(&uplinks);
        let installed = all(&config, &uplinks);
        let kernel = kernel(&uplinks, &installed);
        for config_or_none in [Some(&config), None] {
            let owners = Owners::new(config_or_none, &kernel);
            let read = owners.installed(&kernel);
            prop_assert_eq!(without(&read, &installed), Vec::<String>::new());
            prop_assert_eq!(without(&installed, &read), Vec::<String>::new());
            for index in 0..uplinks.len() {
                let claimant = Claimant::Uplink(name(index));
                let foreign = desired_by(&config, &uplinks, index).filter(|entry| {
                    match owners.owner(entry) {
                        // Without a configuration and without a chain, the interface alone tells.
                        Owner::Ours(claimants) => !claimants.contains(&claimant),
                        Owner::Foreign => true,
                    }
                });
                prop_assert_eq!(without(&foreign, &State::default()), Vec::<String>::new());
            }
        }
    }

    #[test]
    fn a_request_about_one_uplink_leaves_the_entries_of_the_others(
        uplinks in vec(uplink(), 2..4),
        missing in vec(prop_oneof![3 => Just(false), 1 => Just(true)], 1..60),
    ) {
        let config = config(&uplinks);
        let installed = some(&all(&config, &uplinks), &missing);
        let kernel = kernel(&uplinks, &installed);
        for request in requests(0, uplinks[0].address) {
            let Some(plan) = Plan::new(&request, Some(&config), &AllChains::new(), &kernel).expect("a plan") else {
                continue;
            };
            for index in 1..uplinks.len() {
                let mut theirs = desired_by(&config, &uplinks, index);
                theirs = theirs.filter(|entry| plan.installed.contains(entry));
                prop_assert_eq!(without(&theirs, &plan.desired), Vec::<String>::new(), "{}", request);
            }
        }
    }

    #[test]
    fn without_a_configuration_down_leaves_nothing_of_the_dead_uplink_and_all_of_the_others(
        uplinks in vec(uplink(), 2..4),
    ) {
        let config = config(&uplinks);
        let installed = all(&config, &uplinks);
        let kernel = kernel(&uplinks, &installed);
        let request = Request::Down { interface: interface(0) };
        let plan = Plan::new(&request, None, &AllChains::new(), &kernel).expect("a plan").expect("something to do");
        let mut others = State::default();
        for index in 1..uplinks.len() {
            others.merge(desired_by(&config, &uplinks, index));
        }
        prop_assert_eq!(without(&others, &plan.desired), Vec::<String>::new());
        prop_assert_eq!(without(&plan.desired, &others), Vec::<String>::new());
    }

    #[test]
    fn without_a_configuration_and_without_iptables_down_leaves_nothing_either(
        uplinks in vec(uplink(), 2..4),
    ) {
        let config = config(&uplinks);
        let is_routing = |state: State| State { tables: BTreeMap::new(), src_valid_mark: Default::default(), ..state };
        let kernel = kernel(&uplinks, &is_routing(all(&config, &uplinks)));
        let request = Request::Down { interface: interface(0) };
        let plan = Plan::new(&request, None, &AllChains::new(), &kernel).expect("a plan").expect("something to do");
        let mut others = State::default();
        for index in 1..uplinks.len() {
            others.merge(is_routing(desired_by(&config, &uplinks, index)));
        }
        prop_assert_eq!(without(&others, &plan.desired), Vec::<String>::new());
        prop_assert_eq!(without(&plan.desired, &others), Vec::<String>::new());
    }
}

/// The rules of a listing that are ours.
fn ours(config: Option<&Config>, save: &str) -> State {
    let kernel = Kernel {
        ruleset: Ruleset::parse(save).expect("a listing"),
        ..Kernel::default()
    };
    Owners::new(config, &kernel).installed(&kernel)
}

#[test]
fn a_name_alone_makes_nothing_ours() {
    let config = config(&[Uplink {
        forwards: 1,
        ..plain_uplink()
    }]);
    for theirs in [
        // Comments that begin as ours do, or are ours on rules that we do not write.
        "*filter\n-A INPUT -p tcp -m tcp --dport 22 -m comment --comment \"mh-home ssh\" -j ACCEPT\nCOMMIT\n",
        "*filter\n-A INPUT -p tcp -m tcp --dport 22 -m comment --comment mh-isp0evil -j ACCEPT\nCOMMIT\n",
        "*filter\n-A INPUT -p tcp -m tcp --dport 22 -m comment --comment mh-isp0 -j ACCEPT\nCOMMIT\n",
        "*nat\n-A POSTROUTING -o ppp0 -m comment --comment mh-isp0 -j MASQUERADE\nCOMMIT\n",
        "*nat\n-A POSTROUTING -m comment --comment \"-s 1.2.3.4/32 -o ppp0 mh-isp0\" -j MASQUERADE\nCOMMIT\n",
        // Chains with our names: in a table where we have none, with rules that we do not write, empty.
        "*filter\n:mh-x - [0:0]\n-A INPUT -j mh-x\nCOMMIT\n",
        "*filter\n:mh-isp0 - [0:0]\n-A INPUT -j mh-isp0\n-A mh-isp0 -j DROP\nCOMMIT\n",
        "*nat\n:mh-x - [0:0]\n-A PREROUTING -i ppp7 -m addrtype --dst-type LOCAL -j mh-x\n-A mh-x -j LOG\nCOMMIT\n",
        "*mangle\n:mh-x - [0:0]\n-A PREROUTING -i ppp7 -j mh-x\n-A mh-x -j MARK --set-xmark 0x1/0xffffffff\nCOMMIT\n",
        "*nat\n:mh-x - [0:0]\nCOMMIT\n",
        "*nat\n:mh-x - [0:0]\n-A OUTPUT -j mh-x\nCOMMIT\n",
        "*mangle\n:mhx - [0:0]\n:mh-ISP0 - [0:0]\n-A PREROUTING -i ppp0 -j mhx\n-A mh-ISP0 -j RETURN\nCOMMIT\n",
    ] {
        assert_eq!(ours(Some(&config), theirs), State::default(), "{theirs}");
        assert_eq!(ours(None, theirs), State::default(), "{theirs}");
    }
}

#[test]
fn what_is_of_our_form_is_ours_whether_configured_or_not() {
    for (save, count) in [
        (
            "*nat\n-A POSTROUTING -s 192.168.0.0/24 -o ppp9 -m comment --comment \"mh-old\" -j MASQUERADE\nCOMMIT\n",
            1,
        ),
        (
            "*nat\n:mh-old - [0:0]\n-A PREROUTING -i ppp9 -m addrtype --dst-type LOCAL -j mh-old\nCOMMIT\n",
            2,
        ),
        // A jump that we did not write to a chain that we did: the chain could not go without it.
        (
            "*nat\n:mh-old - [0:0]\n-A PREROUTING -j mh-old\n-A mh-old -p tcp -m tcp --dport 80 -j DNAT --to-destination 192.168.0.2\nCOMMIT\n",
            2,
        ),
        (
            "*nat\n:mh-old - [0:0]\n:mh-old.tcp100 - [0:0]\n-A mh-old -p tcp -m tcp --dport 100:199 -j mh-old.tcp100\n-A mh-old.tcp100 -p tcp -m tcp --dport 101 -j DNAT --to-destination 192.168.0.2\nCOMMIT\n",
            2,
        ),
    ] {
        let state = ours(None, save);
        let entries: usize = state
            .tables
            .values()
            .map(|own| own.chains.len() + own.entries.len())
            .sum();
        assert_eq!(entries, count, "{save}");
    }
}

#[test]
fn another_protocol_number_is_somebody_else() {
    let owners = Owners::new(None, &Kernel::default());
    let rule = RouteRule {
        protocol: 110,
        ..RouteRule::new(100, mh_hook::model::route::TableId(10))
    };
    assert_eq!(owners.owner(Entry::RouteRule(&rule)), Owner::Foreign);
    let state = desired_by(&config(&[plain_uplink()]), &[plain_uplink()], 0);
    let route = state.routes.first().expect("a route").clone();
    let theirs = Route {
        protocol: 4,
        ..route.clone()
    };
    assert_eq!(owners.owner(Entry::Route(&theirs)), Owner::Foreign);
    assert_ne!(owners.owner(Entry::Route(&route)), Owner::Foreign);
    let rule = Rule("-j mh-isp0".into());
    assert_eq!(
        owners.owner(Entry::Rule(Table::Nat, "PREROUTING", &rule)),
        Owner::Foreign
    );
}

#[test]
fn two_uplinks_that_use_one_interface_in_turn_leave_nothing_behind() {
    let text = "[lan]\ninterfaces = ['eth1']\nnetworks = ['192.168.0.0/24']\n\
        [uplink.isp0]\ninterface = 'ppp0'\nipparam = 'isp0'\ntable = 10\n\
        [uplink.isp1]\ninterface = 'ppp0'\nipparam = 'isp1'\ntable = 11\n";
    let config = Config::parse(text).expect("a configuration that holds");
    let uplinks = [Uplink {
        is_known_by_ipparam: true,
        ..plain_uplink()
    }];
    let mut kernel = kernel(&uplinks, &desired_by(&config, &uplinks, 0));
    // As pppd leaves it at ip-down.
    let link = kernel.links.get_mut("ppp0").expect("the link");
    (link.up, link.addresses) = (false, Vec::new());
    let request = requests(0, uplinks[0].address).swap_remove(1);
    let plan = Plan::new(&request, Some(&config), &AllChains::new(), &kernel).expect("a plan");
    assert_eq!(plan.expect("something to do").desired, State::default());
}
