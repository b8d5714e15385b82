//! Parses single values of the configuration.

use std::net::Ipv4Addr;

use anyhow::{Context, Result, anyhow, ensure};
use ipnetwork::Ipv4Network;
use toml_spanner::{Item, Value};

use crate::model::forward::PortRange;
use crate::model::link::check_local;

/// Parses a prefix. Unlike ipnetwork's parser, it requires the length and refuses host bits.
/// Errors: says what is right.
pub fn prefix(text: &str) -> Result<Ipv4Network> {
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
        text.parse::<u16>()
            .ok()
            .filter(|port| *port > 0 && text.starts_with(|c: char| c.is_ascii_digit()))
    };
    let range = match value.value() {
        Value::Integer(integer) => integer
            .as_u64()
            .and_then(|number| u16::try_from(number).ok())
            .filter(|port| *port > 0)
            .map(PortRange::one),
        Value::String(text) => match text.split_once('-') {
            Some((first, last)) => port(first)
                .zip(port(last))
                .map(|(first, last)| PortRange { first, last }),
            None => port(text).map(PortRange::one),
        },
        _ => None,
    };
    let range = range.context(what)?;
    ensure!(
        range.first <= range.last,
        "the range ends before it begins: {what}"
    );
    Ok(range)
}

/// Parses a LAN host's address, with a port or without; or a port alone, of this router's own.
/// Errors: says what is right.
pub fn target(value: &Item) -> Result<(Option<Ipv4Addr>, Option<u16>)> {
    let what = "to is a LAN host's address, or address:port: \"192.168.0.2:22\"; or a port of this router's own: \":8443\"";
    let text = value.as_str().context(what)?;
    let (address, port) = match text.split_once(':') {
        Some((address, port)) => (
            address,
            Some(
                port.parse::<u16>()
                    .ok()
                    .filter(|port| *port > 0)
                    .context(what)?,
            ),
        ),
        None => (text, None),
    };
    if address.is_empty() && port.is_some() {
        return Ok((None, port));
    }
    let host = host(address).map_err(|error| anyhow!("{error}: {what}"))?;
    Ok((Some(host), port))
}

/// Parses the address of a host or of a link.
/// Errors: it is not one, or can't be one.
pub fn host(text: &str) -> Result<Ipv4Addr> {
    let address = text.parse().ok();
    let address = address.with_context(|| format!("{text:?} is not an IPv4 address"))?;
    check_local(address, &[]).map_err(|_| anyhow!("{address} can't be a host's address"))?;
    Ok(address)
}

/// Parses a prefix or an address.
/// Errors: says what is right.
pub fn address_or_prefix(text: &str) -> Result<Ipv4Network> {
    match text.parse::<Ipv4Addr>() {
        Ok(address) => Ok(address.into()),
        Err(_) => prefix(text),
    }
}
