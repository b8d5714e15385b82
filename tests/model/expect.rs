//! The model: from the configuration, the links, what stood before and the call, to what must stand after it.
//! Pure, and written from the description of the program, not from its source.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use crate::listing::{is_iptables, owner, sorted, table, value};
use crate::step::{Call, Config, Direction, LANS, NETWORKS, PINS, Uplink};

/// A link as the steps have left it; none where there is no device.
#[derive(Clone, Debug, Default)]
pub struct Link {
    pub up: bool,
    pub addresses: Vec<Ipv4Addr>,
    pub mtu: u32,
}

/// All that a call's outcome depends on, but the call.
#[derive(Debug)]
pub struct World<'a> {
    /// None where it does not hold.
    pub config: Option<&'a Config>,
    pub links: &'a BTreeMap<&'static str, Link>,
    /// Our entries before the call.
    pub ours: &'a [String],
    /// For which uplink each routing table was filled last: a table that no configuration names any
    /// more is still its uplink's.
    pub filled: &'a BTreeMap<String, String>,
}

/// What must be so after a call.
#[derive(Debug, Default)]
pub struct Expected {
    pub status: i32,
    /// Our entries.
    pub ours: Vec<String>,
    /// Entries of a table that no configuration names any more, whose uplink can't be told from the
    /// kernel either, because what told it has been removed: they may stay or go.
    pub doubtful: BTreeSet<String>,
    /// Tables that have been filled, and for whom.
    pub filled: BTreeMap<String, String>,
}

/// The call's outcome.
pub fn expect(world: &World, call: &Call) -> Expected {
    let Some(config) = world.config else {
        return without_configuration(world, call);
    };
    let unchanged = |status| Expected {
        status,
        ours: world.ours.to_vec(),
        ..Expected::default()
    };
    // By hand, what is neither an uplink's interface nor named by an entry is an error.
    if let Call::Up(interface, _) | Call::Down(interface) = call
        && in_question(world, config, call).is_empty()
        && bound(world.ours, interface).is_empty()
    {
        return unchanged(2);
    }
    let mut expected = Expected::default();
    let mut outcome = BTreeSet::new();
    let mut wanted = Vec::new();
    for uplink in in_question(world, config, call) {
        outcome.insert(uplink.name.as_str());
        let lines = match addresses(world, call, uplink) {
            Ok(addresses) => desired(world, config, uplink, &addresses),
            // One that can't be used does not keep the others from it.
            Err(NotUsable) if matches!(call, Call::Sync) => {
                expected.status = 1;
                desired(world, config, uplink, &[])
            }
            Err(NotUsable) => {
                return unchanged(match call {
                    // What a person says of the link is not so.
                    Call::Up(interface, Some(_))
                        if is_up(world, interface) && uplink.interface == *interface =>
                    {
                        2
                    }
                    _ => 1,
                });
            }
        };
        let frees_pins = matches!(call, Call::Down(_));
        let is_up = matches!(addresses(world, call, uplink), Ok(found) if !found.is_empty());
        if frees_pins && !is_up {
            continue;
        }
        if let Some(table) = uplink.table.filter(|_| !lines.is_empty()) {
            expected
                .filled
                .insert(table.to_string(), uplink.name.clone());
        }
        wanted.extend(lines);
    }
    let stays = |name: &str| config.uplink(name).is_some() && !outcome.contains(name);
    keep(world, Some(config), stays, wanted, call, &mut expected);
    for uplink in config.uplinks.iter().filter(|uplink| stays(&uplink.name)) {
        untouched(world, config, uplink, &mut expected);
    }
    expected
}

/// The uplinks that a call is about: those at its interface, and those whose entries name it.
fn in_question<'a>(world: &World, config: &'a Config, call: &Call) -> Vec<&'a Uplink> {
    let interface = match call {
        Call::Sync => return config.uplinks.iter().collect(),
        Call::Event(_, interface, _) | Call::Up(interface, _) | Call::Down(interface) => interface,
    };
    let bound = bound(world.ours, interface);
    let uplinks = config.uplinks.iter();
    uplinks
        .filter(|uplink| uplink.interface == *interface || bound.contains(&uplink.name))
        .collect()
}

/// The uplinks whose entries name the interface as their own: the jumps, masquerade, clamping, and what they accept. Those of
/// a hairpin name an address and the LAN's interface.
fn bound(ours: &[String], interface: &str) -> BTreeSet<String> {
    let names = ours.iter().filter_map(|line| {
        let name = owner(line)?;
        let target = value(line, "-j")?;
        let is_hairpin = value(line, "-d").is_some() || value(line, "--ctorigdst").is_some();
        let is_named = [value(line, "-i"), value(line, "-o")].contains(&Some(interface));
        let is_own = target == format!("mh-{name}")
            || ["MASQUERADE", "TCPMSS", "ACCEPT"].contains(&target)
            || target == "CONNMARK" && line.contains(" ! -i ");
        (is_own && is_named && !is_hairpin).then(|| name.to_owned())
    });
    names.collect()
}

/// A link that a person says is up, and is not; or one that has no address but those of the LAN.
struct NotUsable;

/// The addresses that the uplink should have entries for; none where its link is down.
fn addresses(world: &World, call: &Call, uplink: &Uplink) -> Result<Vec<Ipv4Addr>, NotUsable> {
    let link = world.links.get(uplink.interface.as_str());
    let is_its = |interface: &str| interface == uplink.interface;
    let by_hand = match call {
        Call::Down(interface) if is_its(interface) => return Ok(Vec::new()),
        Call::Up(interface, local) if is_its(interface) => Some(local),
        _ => None,
    };
    let is_about_to_be_up =
        matches!(call, Call::Event(Direction::PreUp, interface, _) if is_its(interface));
    let all = link.filter(|link| link.up || is_about_to_be_up);
    let all = all.map(|link| &link.addresses[..]).unwrap_or_default();
    let usable = all.iter().copied().filter(|it| !is_lan(*it));
    let usable: Vec<Ipv4Addr> = usable.collect();
    if !all.is_empty() && usable.is_empty() {
        return Err(NotUsable);
    }
    match by_hand {
        Some(Some(local)) if !usable.contains(local) => Err(NotUsable),
        Some(_) if usable.is_empty() => Err(NotUsable),
        _ => Ok(usable),
    }
}

fn is_up(world: &World, interface: &str) -> bool {
    let link = world.links.get(interface);
    link.is_some_and(|link| link.up)
}

/// The entries of an uplink whose link has these addresses, or none.
fn desired(world: &World, config: &Config, uplink: &Uplink, addresses: &[Ipv4Addr]) -> Vec<String> {
    match world.links.get(uplink.interface.as_str()) {
        Some(link) if !addresses.is_empty() => entries(config, uplink, link, addresses),
        _ => closed(config, uplink),
    }
}

/// What keeps pinned hosts from other links while theirs is down.
fn closed(config: &Config, uplink: &Uplink) -> Vec<String> {
    let mut lines = Vec::new();
    let Some(table) = uplink.table.filter(|_| uplink.pins > 0) else {
        return lines;
    };
    lines.push(format!(
        "route unreachable default table {table} proto 109 metric 4278198272"
    ));
    for from in PINS.into_iter().take(uplink.pins) {
        for network in NETWORKS.into_iter().take(config.networks) {
            let local = config.priority;
            lines.push(format!(
                "rule {local}:\tfrom {from} to {network} lookup main proto 109"
            ));
        }
        let pin = config.priority + 3;
        lines.push(format!("rule {pin}:\tfrom {from} lookup {table} proto 109"));
    }
    lines
}

fn is_lan(address: Ipv4Addr) -> bool {
    address.octets()[..3] == [192, 168, 0] || address.octets()[..2] == [10, 8]
}

/// A configuration that does not hold changes nothing; what goes down is still cleaned away, as far
/// as the kernel's own entries tell whose it is.
fn without_configuration(world: &World, call: &Call) -> Expected {
    let mut expected = Expected {
        ours: world.ours.to_vec(),
        ..Expected::default()
    };
    let interface = match call {
        Call::Down(interface) => interface,
        Call::Event(Direction::Down, interface, _) => {
            let link = world.links.get(interface);
            if link.is_some_and(|link| link.up && !link.addresses.is_empty()) {
                return expected;
            }
            interface
        }
        _ => {
            expected.status = 2;
            return expected;
        }
    };
    expected.ours.clear();
    let names = bound(world.ours, interface);
    let stays = |name: &str| !names.contains(name);
    keep(world, None, stays, Vec::new(), call, &mut expected);
    expected
}

/// What another uplink should have, and has, is there after the call.
fn untouched(world: &World, config: &Config, uplink: &Uplink, expected: &mut Expected) {
    let addresses = addresses(world, &Call::Sync, uplink).unwrap_or_default();
    for line in desired(world, config, uplink, &addresses) {
        if expected.doubtful.remove(&line) {
            expected.ours.push(line);
        }
    }
    expected.ours = sorted(std::mem::take(&mut expected.ours));
}

/// What is to stand after a call: what is wanted, and of what stood before it what stays.
fn keep(
    world: &World,
    config: Option<&Config>,
    stays: impl Fn(&str) -> bool,
    wanted: Vec<String>,
    call: &Call,
    expected: &mut Expected,
) {
    let is_sync = matches!(call, Call::Sync);
    let mut ours: Vec<String> = Vec::new();
    // Each source that stays has its rule to the LAN stay with it.
    let mut sources = BTreeSet::new();
    for line in world.ours {
        if is_iptables(line) {
            ours.extend(owner(line).filter(|name| stays(name)).map(|_| line.clone()));
            continue;
        }
        let table = table(line);
        if table == "main" && line.starts_with("rule ") {
            continue;
        }
        let from = value(line, "from").filter(|from| line.starts_with("rule ") && *from != "all");
        let claimed = config.and_then(|config| config.with_table(table));
        let filled = world.filled.get(table);
        let told = filled.filter(|name| tells(world.ours, name, table));
        let stays = match (claimed, told) {
            (Some(uplink), _) => stays(&uplink.name),
            (None, Some(name)) => stays(name),
            (None, None) if is_sync => continue,
            // Nothing names its uplink, but the address or the interface in it may.
            (None, None) => {
                expected.doubtful.insert(line.clone());
                continue;
            }
        };
        if stays {
            ours.push(line.clone());
            sources.extend(from);
        }
    }
    // Rules to the main table go with whoever they were made for, which only `sync` need not ask.
    for line in world
        .ours
        .iter()
        .filter(|line| line.starts_with("rule ") && table(line) == "main")
    {
        let from = value(line, "from").unwrap_or_default();
        if is_sync {
            continue;
        }
        if sources.contains(from) {
            ours.push(line.clone());
        } else {
            expected.doubtful.insert(line.clone());
        }
    }
    // A rule or a route can't stand twice.
    for line in wanted {
        if is_iptables(&line) || !ours.contains(&line) {
            ours.push(line);
        }
    }
    for line in &ours {
        expected.doubtful.remove(line);
    }
    expected.ours = sorted(ours);
}

/// Whether the kernel's entries tell that a table is this uplink's: its chain sets a mark, and a rule
/// sends that mark to the table. Two that have had the mark one after the other can't be told apart.
fn tells(ours: &[String], name: &str, table_of: &str) -> bool {
    let rules = ours
        .iter()
        .filter(|line| line.starts_with("rule ") && table(line) == table_of);
    let marks: BTreeSet<&str> = rules.filter_map(|line| value(line, "fwmark")).collect();
    // A rule is listed without a mask in which all bits count.
    let mark = |line| Some(value(line, "--set-xmark")?.trim_end_matches("/0xffffffff"));
    let mut owners: Vec<&str> = ours
        .iter()
        .filter(|line| mark(line).is_some_and(|mark| marks.contains(mark)))
        .filter_map(|line| owner(line))
        .collect();
    owners.dedup();
    owners == [name]
}

/// The forwards that an uplink may have, as they are configured and as they stand in its chain.
pub const FORWARDS: [(&str, &[&str]); 6] = [
    (
        r#"{ port = 80, to = "192.168.0.2" }"#,
        &["-p tcp -m tcp --dport 80 -j DNAT --to-destination 192.168.0.2"],
    ),
    (
        r#"{ port = 2222, to = "192.168.0.2:22", from = ["192.0.2.77", "198.51.100.0/24"] }"#,
        &[
            "-s 192.0.2.77/32 -p tcp -m tcp --dport 2222 -j DNAT --to-destination 192.168.0.2:22",
            "-s 198.51.100.0/24 -p tcp -m tcp --dport 2222 -j DNAT --to-destination 192.168.0.2:22",
        ],
    ),
    (
        r#"{ proto = ["tcp", "udp"], port = "27015-27030", to = "192.168.0.3" }"#,
        &[
            "-p tcp -m tcp --dport 27015:27030 -j DNAT --to-destination 192.168.0.3",
            "-p udp -m udp --dport 27015:27030 -j DNAT --to-destination 192.168.0.3",
        ],
    ),
    (
        r#"{ proto = "esp", to = "192.168.0.4" }"#,
        &["-p esp -j DNAT --to-destination 192.168.0.4"],
    ),
    (
        r#"{ port = [443, "8000-8010"], to = "192.168.0.5", address = "203.0.113.10" }"#,
        &[
            "-d 203.0.113.10/32 -p tcp -m tcp --dport 443 -j DNAT --to-destination 192.168.0.5",
            "-d 203.0.113.10/32 -p tcp -m tcp --dport 8000:8010 -j DNAT --to-destination 192.168.0.5",
        ],
    ),
    (
        r#"{ port = 8443, to = ":443" }"#,
        &["-p tcp -m tcp --dport 8443 -j DNAT --to-destination :443"],
    ),
];

/// The entries of an uplink whose link is up, or about to be.
fn entries(config: &Config, uplink: &Uplink, link: &Link, addresses: &[Ipv4Addr]) -> Vec<String> {
    let Uplink {
        name, interface, ..
    } = uplink;
    let lans = || LANS.into_iter().take(config.lans);
    let networks = || NETWORKS.into_iter().take(config.networks);
    let mine = format!("-m comment --comment mh-{name}");
    let mut lines = Vec::new();
    let mut add = |line: String| lines.push(line);
    if let Some(table) = uplink.table {
        let [local, by_mark, source, pin] = [0, 1, 2, 3].map(|place| config.priority + place);
        let (value, mask) = (uplink.mark.unwrap_or(table), config.mask);
        // All tools leave out a mask in which all bits count, but where a mark is set.
        let matched = |value: u32| match mask {
            u32::MAX => format!("{value:#x}"),
            mask => format!("{value:#x}/{mask:#x}"),
        };
        let mark = matched(value);
        if link.up {
            add(format!(
                "route default dev {interface} table {table} proto 109 scope link"
            ));
        }
        add(format!(
            "route unreachable default table {table} proto 109 metric 4278198272"
        ));
        for network in networks() {
            let to_lan = format!("to {network} lookup main proto 109");
            for address in addresses {
                add(format!("rule {local}:\tfrom {address} {to_lan}"));
            }
            for from in PINS.into_iter().take(uplink.pins) {
                add(format!("rule {local}:\tfrom {from} {to_lan}"));
            }
        }
        add(format!(
            "rule {local}:\tfrom all fwmark {mark} iif {interface} lookup main proto 109"
        ));
        add(format!(
            "rule {by_mark}:\tfrom all fwmark {mark} lookup {table} proto 109"
        ));
        for address in addresses {
            add(format!(
                "rule {source}:\tfrom {address} lookup {table} proto 109"
            ));
        }
        for from in PINS.into_iter().take(uplink.pins) {
            add(format!("rule {pin}:\tfrom {from} lookup {table} proto 109"));
        }
        let restore = format!("-j CONNMARK --restore-mark --nfmask {mask:#x} --ctmask {mask:#x}");
        for packets in [
            format!("PREROUTING ! -i {interface}"),
            "OUTPUT -m conntrack --ctdir REPLY".into(),
        ] {
            add(format!(
                "mangle -A {packets} -m connmark --mark {mark} {mine} {restore}"
            ));
        }
        add(format!("mangle :mh-{name} -"));
        let unmarked = matched(0);
        add(format!(
            "mangle -A mh-{name} -m connmark --mark {unmarked} -j CONNMARK --set-xmark {value:#x}/{mask:#x}"
        ));
        add(format!(
            "mangle -A mh-{name} -m connmark --mark {mark} {restore}"
        ));
        add(format!("mangle -A PREROUTING -i {interface} -j mh-{name}"));
    }
    if uplink.forwards > 0 {
        add(format!("nat :mh-{name} -"));
        let forwards = FORWARDS.iter().take(uplink.forwards);
        for rule in forwards.flat_map(|(_, rules)| *rules) {
            add(format!("nat -A mh-{name} {rule}"));
        }
        add(format!(
            "nat -A PREROUTING -i {interface} -m addrtype --dst-type LOCAL -j mh-{name}"
        ));
        for address in addresses.iter().filter(|_| uplink.hairpin) {
            add(format!("nat -A OUTPUT -d {address}/32 -j mh-{name}"));
        }
        let dnat = "-m conntrack --ctstate DNAT";
        if uplink.accept_forward {
            for way in ["-i", "-o"] {
                add(format!(
                    "filter -A FORWARD {way} {interface} {dnat} {mine} -j ACCEPT"
                ));
            }
        }
        let pairs = lans().flat_map(|lan| addresses.iter().map(move |address| (lan, address)));
        for (lan, address) in pairs.filter(|_| uplink.hairpin) {
            add(format!(
                "nat -A PREROUTING -d {address}/32 -i {lan} -j mh-{name}"
            ));
            for network in networks() {
                add(format!(
                    "nat -A POSTROUTING -s {network} -o {lan} {dnat} --ctorigdst {address} {mine} -j MASQUERADE"
                ));
            }
            if uplink.accept_forward {
                add(format!(
                    "filter -A FORWARD -i {lan} {dnat} --ctorigdst {address} {mine} -j ACCEPT"
                ));
            }
        }
    }
    for network in networks().filter(|_| uplink.masquerade) {
        add(format!(
            "nat -A POSTROUTING -s {network} -o {interface} {mine} -j MASQUERADE"
        ));
    }
    if uplink.clamp_mss {
        let syn = format!("-p tcp -m tcp --tcp-flags SYN,RST SYN {mine} -j TCPMSS");
        let size = link.mtu - 40;
        add(format!(
            "mangle -A FORWARD -i {interface} {syn} --set-mss {size}"
        ));
        add(format!(
            "mangle -A FORWARD -o {interface} {syn} --clamp-mss-to-pmtu"
        ));
    }
    lines
}
