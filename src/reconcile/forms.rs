//! The forms of our rules of iptables, by which they are known as ours. Pure.

use crate::model::names::{PREFIX, UplinkName};
use crate::model::netfilter::{Rule, Rules, Table};

/// The forms of our rules in chains that are not ours, as iptables-save prints them: `*` is any word, `{interface}` the
/// uplink's, `{chain}` the name of the uplink's chain.
const FORMS: [&str; 15] = [
    "-t mangle -A PREROUTING -i {interface} -j {chain}",
    "-t mangle -A PREROUTING ! -i {interface} -m connmark --mark * -m comment --comment {chain} -j CONNMARK --restore-mark --nfmask * --ctmask *",
    // Written by version 0.1.0, for each of the LAN's interfaces.
    "-t mangle -A PREROUTING -i * -m connmark --mark * -m comment --comment {chain} -j CONNMARK --restore-mark --nfmask * --ctmask *",
    "-t mangle -A OUTPUT -m conntrack --ctdir REPLY -m connmark --mark * -m comment --comment {chain} -j CONNMARK --restore-mark --nfmask * --ctmask *",
    "-t mangle -A FORWARD -i {interface} -p tcp -m tcp --tcp-flags SYN,RST SYN -m comment --comment {chain} -j TCPMSS --set-mss *",
    "-t mangle -A FORWARD -o {interface} -p tcp -m tcp --tcp-flags SYN,RST SYN -m comment --comment {chain} -j TCPMSS --clamp-mss-to-pmtu",
    "-t nat -A PREROUTING -i {interface} -m addrtype --dst-type LOCAL -j {chain}",
    // Written by version 0.1.0.
    "-t nat -A PREROUTING -i {interface} -j {chain}",
    "-t nat -A PREROUTING -d * -i * -j {chain}",
    "-t nat -A OUTPUT -d * -j {chain}",
    "-t nat -A POSTROUTING -s * -o {interface} -m comment --comment {chain} -j MASQUERADE",
    "-t nat -A POSTROUTING -s * -o * -m conntrack --ctstate DNAT --ctorigdst * -m comment --comment {chain} -j MASQUERADE",
    "-t filter -A FORWARD -i {interface} -m conntrack --ctstate DNAT -m comment --comment {chain} -j ACCEPT",
    "-t filter -A FORWARD -o {interface} -m conntrack --ctstate DNAT -m comment --comment {chain} -j ACCEPT",
    "-t filter -A FORWARD -i * -m conntrack --ctstate DNAT --ctorigdst * -m comment --comment {chain} -j ACCEPT",
];

/// The forms of the rules in an uplink's own chains; what stands in brackets may be left out.
const CHAIN_FORMS: [&str; 5] = [
    "-t mangle -m connmark --mark * -j CONNMARK --set-xmark *",
    "-t mangle -m connmark --mark * -j CONNMARK --restore-mark --nfmask * --ctmask *",
    // Written by version 0.1.0: `mh-isp0 rp_filter was 1`.
    "-t mangle -m comment --comment *",
    "-t nat [-s *] [-d *] [-p *] [-m * --dport *] -j DNAT --to-destination *",
    "-t nat -p * -m * --dport * -j {chain}",
];

/// What a rule of a form that we write names.
pub struct Form {
    /// The uplink, by its chain or in a comment.
    pub uplink: UplinkName,
    /// The uplink's interface, where the form has one.
    pub interface: Option<String>,
}

/// A rule in a chain that is not ours, taken for one that we write.
pub fn form(table: Table, chain: &str, rule: &Rule) -> Option<Form> {
    if !rule.0.contains(PREFIX) {
        return None;
    }
    let words = rule.words();
    let place = format!("-t {table} -A {chain} ");
    let mut forms = FORMS.iter().filter_map(|form| form.strip_prefix(&place));
    forms.find_map(|pattern| {
        let found = fits(pattern, &words)?;
        Some(Form {
            uplink: UplinkName::parse(found.chain?.strip_prefix(PREFIX)?).ok()?,
            interface: found.interface.map(str::to_owned),
        })
    })
}

/// Whether all rules of a chain with one of our names are of forms that we write.
pub fn has_our_forms(table: Table, rules: &Rules) -> bool {
    let place = format!("-t {table} ");
    let forms = || {
        CHAIN_FORMS
            .iter()
            .filter_map(|form| form.strip_prefix(&place))
    };
    rules.iter().all(|rule| {
        let words = rule.words();
        forms().any(|pattern| fits(pattern, &words).is_some())
    })
}

/// The words at the places that a pattern names.
#[derive(Clone, Copy, Default)]
struct Found<'a> {
    chain: Option<&'a str>,
    interface: Option<&'a str>,
}

fn fits<'a>(pattern: &str, words: &'a [String]) -> Option<Found<'a>> {
    let mut found = Found::default();
    let mut rest = words;
    // What stands in brackets is tried as a whole.
    for (index, part) in pattern.split(['[', ']']).enumerate() {
        let mut inner = (found, rest);
        let is_there = part.split_ascii_whitespace().all(|expected| {
            let Some((word, behind)) = inner.1.split_first() else {
                return false;
            };
            inner.1 = behind;
            match expected {
                "*" => true,
                "{chain}" => {
                    inner.0.chain = Some(word);
                    UplinkName::of_chain(word).is_some()
                }
                "{interface}" => {
                    inner.0.interface = Some(word);
                    true
                }
                expected => expected == word,
            }
        });
        let is_optional = index % 2 == 1;
        match is_there {
            true => (found, rest) = inner,
            false if is_optional => {}
            false => return None,
        }
    }
    rest.is_empty().then_some(found)
}
