//! Parses single values of the configuration. An error says what is right.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use anyhow::{Context, Result, anyhow, bail, ensure};
use ipnetwork::Ipv4Network;
use toml_spanner::{Item, Value};

use crate::model::forward::{PortRange, Protocol};
use crate::model::link::check_local;

/// Parses a whole number.
pub fn integer(value: &Item, key: &str, range: RangeInclusive<u32>) -> Result<u32> {
    let number = value.as_u64().and_then(|number| number.try_into().ok());
    let (first, last) = (range.start(), range.end());
    number
        .filter(|number| range.contains(number))
        .with_context(|| match value.as_str().map(str::parse::<u32>) {
            Some(Ok(number)) => format!("{key} is a number, without quotes: {number}"),
            _ => format!("{key} is a whole number from {first} to {last}"),
        })
}

/// Parses a text that names a link to pppd.
pub fn printable(value: &Item, key: &str) -> Result<String> {
    value
        .as_str()
        .filter(|text| !text.is_empty() && !text.chars().any(char::is_control))
        .map(str::to_owned)
        .with_context(|| format!("{key} is a string of printable characters"))
}

/// Parses a forward's protocol.
pub fn protocol(value: &Item) -> Result<Protocol> {
    let text = value.as_str().unwrap_or_default();
    ensure!(
        text != "any",
        "\"any\" can't be in a list; write proto = \"any\""
    );
    let parts: Vec<&str> = text
        .split(['/', '+', ',', ' '])
        .filter(|part| !part.is_empty())
        .collect();
    let parts: Vec<String> = parts.iter().map(|part| part.to_lowercase()).collect();
    if Protocol::parse(text).is_none()
        && !parts.is_empty()
        && parts.iter().all(|part| Protocol::parse(part).is_some())
    {
        match &parts[..] {
            [one] => bail!("in small letters: proto = {one:?}"),
            several => bail!("several are a list: proto = {several:?}"),
        }
    }
    Protocol::parse(text).context(
        "proto is \"tcp\", \"udp\", \"sctp\", \"gre\", \"esp\" or \"icmp\", a list of these, or \"any\"",
    )
}

/// Parses a prefix. Unlike ipnetwork's parser, it requires the length and refuses host bits.
pub fn prefix(text: &str) -> Result<Ipv4Network> {
    let bare = text.split('/').next().unwrap_or_default();
    ensure!(
        bare.parse::<Ipv6Addr>().is_err(),
        "{text:?} is an IPv6 prefix: only IPv4 is served here"
    );
    let network: Ipv4Network = text
        .parse()
        .ok()
        .filter(|_| text.contains('/'))
        .with_context(|| format!("{text:?} is not an IPv4 prefix such as \"192.168.0.0/24\""))?;
    ensure!(
        network.prefix() > 0,
        "{text:?} means every address; list the prefixes that you mean"
    );
    ensure!(
        network.ip() == network.network(),
        "{text:?} has host bits set; write {}/{}",
        network.network(),
        network.prefix()
    );
    Ok(network)
}

/// Parses a port, a range of ports, or a list of these.
/// Errors: says what is right.
pub fn ports(value: &Item) -> Result<Vec<PortRange>> {
    let Some(items) = value.as_array() else {
        return Ok(vec![port_range(value)?]);
    };
    ensure!(
        !items.is_empty(),
        "an empty list of ports forwards nothing; leave port out for all"
    );
    let mut ranges: Vec<PortRange> = Vec::new();
    for item in items.iter() {
        let range = port_range(item)?;
        let is_known = |known: &PortRange| known.first <= range.last && range.first <= known.last;
        ensure!(
            !ranges.iter().any(is_known),
            "{range} is listed twice in port"
        );
        ranges.push(range);
    }
    Ok(ranges)
}

fn port_range(value: &Item) -> Result<PortRange> {
    let what =
        "port is one port (80), a range (\"27015-27030\"), or a list of these, from 1 to 65535";
    let port = |text: &str| {
        let is_number = text.starts_with(|c: char| c.is_ascii_digit());
        text.parse().ok().filter(|port| is_number && *port > 0)
    };
    let (first, last) = match value.value() {
        Value::String(text) => {
            let (first, last) = text.split_once('-').unwrap_or((text, text));
            (port(first), port(last))
        }
        _ => {
            let port = value.as_u64().and_then(|number| number.try_into().ok());
            let port = port.filter(|port| *port > 0);
            (port, port)
        }
    };
    let (first, last) = first
        .zip(last)
        .with_context(|| better_ports(value).unwrap_or(what.into()))?;
    ensure!(first <= last, "the range ends before it begins: {what}");
    Ok(PortRange { first, last })
}

/// How ports are written that are not written so.
fn better_ports(value: &Item) -> Option<String> {
    let text = value.as_str()?;
    let are_numbers = |separator| {
        text.split(separator)
            .all(|it: &str| it.trim().parse::<u16>().is_ok())
    };
    if text.contains(':') && are_numbers(':') {
        return Some(format!(
            "a range has a hyphen: \"{}\"",
            text.replace(':', "-")
        ));
    }
    if text.contains(',') && are_numbers(',') {
        let list: Vec<&str> = text.split(',').map(str::trim).collect();
        return Some(format!("several ports are a list: [{}]", list.join(", ")));
    }
    None
}

/// Parses a LAN host's address, with a port or without; or a port alone, of this router's own.
/// Errors: says what is right.
pub fn target(value: &Item) -> Result<(Option<Ipv4Addr>, Option<u16>)> {
    let what = "to is a LAN host's address, or address:port: \"192.168.0.2:22\"; or a port of this router's own: \":8443\"";
    let text = value.as_str().context(what)?;
    let bare = text
        .trim_start_matches('[')
        .split(']')
        .next()
        .unwrap_or_default();
    ensure!(
        bare.parse::<Ipv6Addr>().is_err(),
        "{text:?} is an IPv6 address: forwards lead to IPv4 hosts, whose address is translated"
    );
    let is_number = |port: &&str| port.bytes().all(|byte| byte.is_ascii_digit());
    let number = |port: &str| Some(port).filter(is_number)?.parse().ok();
    let (address, port) = match text.split_once(':') {
        Some((address, port)) => (
            address,
            Some(number(port).filter(|port| *port > 0).context(what)?),
        ),
        None => (text, None),
    };
    if address.is_empty() && port.is_some() {
        return Ok((None, port));
    }
    let is_name = address.chars().any(|c| c.is_alphabetic());
    ensure!(
        !is_name,
        "{address:?} is a name: give the address, since no name can be looked up while a link comes up"
    );
    let host = host(address).map_err(|error| anyhow!("{error}: {what}"))?;
    Ok((Some(host), port))
}

/// Parses the address of a host or of a link.
pub fn host(text: &str) -> Result<Ipv4Addr> {
    let address = text.parse().ok();
    let address = address.with_context(|| format!("{text:?} is not an IPv4 address"))?;
    ensure!(
        check_local(address, &[]).is_ok(),
        "{address} can't be a host's address"
    );
    Ok(address)
}

/// Parses a prefix or an address.
pub fn address_or_prefix(text: &str) -> Result<Ipv4Network> {
    match text.parse::<Ipv4Addr>() {
        Ok(address) => Ok(address.into()),
        Err(_) => prefix(text),
    }
}
