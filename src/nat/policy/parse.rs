//! The text of a policy, read whole or refused whole. The grammar is at the head of [`super`].

use std::net::IpAddr;
use std::ops::RangeInclusive;

use super::Protocol;
use super::address::{self, Cidr};
use super::name::Pattern;
use super::rule::{Action, Destinations, GuestTerm, Policy, RULES_MAX, Rule};

/// Longest text, bytes: all the rules there may be at 128 bytes each, and as many of comment.
pub const TEXT_LEN_MAX: usize = 256 * 1024;
/// Longest line, bytes: a rule with a screenful of destinations. More go into a second rule.
pub const LINE_LEN_MAX: usize = 1_024;
/// Networks and names of all rules at most: a flow may be compared with each.
pub const DESTINATIONS_MAX: usize = 4_096;
/// Guests of one rule, and port ranges of one rule, at most. More make a group, or a range.
pub const LIST_MAX: usize = 64;
/// Of a word that is complained of, this much is shown.
const KEY_LEN_MAX: usize = 64;

/// Why a policy can't be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("line {line}: {key}: {reason}")]
pub struct PolicyError {
    /// Line, from 1.
    pub line: usize,
    /// The word that is wrong, or the one that is missing; printable.
    pub key: String,
    /// What is wrong with it, and what would be right.
    pub reason: String,
}

/// A [`PolicyError`] whose line the caller knows.
struct Fault {
    key: String,
    reason: String,
}

fn fault<T>(key: &str, reason: impl Into<String>) -> Result<T, Fault> {
    let mut shown: String = key.chars().take(KEY_LEN_MAX).collect();
    if shown.len() < key.len() {
        shown.push_str("...");
    }
    Err(Fault {
        key: shown.escape_debug().to_string(),
        reason: reason.into(),
    })
}

impl std::str::FromStr for Policy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let mut reader = Reader::default();
        let mut last_line = 1;
        let too_long = fault("policy", format!("is longer than {TEXT_LEN_MAX} bytes"));
        let whole = if text.len() > TEXT_LEN_MAX {
            too_long
        } else {
            text.lines().zip(1..).try_for_each(|(line, number)| {
                last_line = number;
                reader.line(line, number)
            })
        };
        let read = whole.and_then(|()| reader.finish());
        read.map_err(|Fault { key, reason }| PolicyError {
            line: last_line,
            key,
            reason,
        })
    }
}

#[derive(Default)]
struct Reader {
    rules: Vec<Rule>,
    default: Option<Action>,
    destinations: usize,
}

impl Reader {
    fn line(&mut self, line: &str, number: usize) -> Result<(), Fault> {
        if line.len() > LINE_LEN_MAX {
            return fault("line", format!("is longer than {LINE_LEN_MAX} bytes"));
        }
        let mut words = Vec::new();
        for word in line.split_ascii_whitespace() {
            match word.find('#') {
                None => words.push(word),
                Some(0) => break,
                Some(_) => return fault(word, "has a # in it: a comment starts behind a blank"),
            }
        }
        let Some(first) = words.first() else {
            return Ok(());
        };
        if *first == "default" {
            return self.default_line(&words[1..]);
        }
        if self.rules.len() == RULES_MAX {
            return fault(first, format!("is one more than {RULES_MAX} rules"));
        }
        // Lines are counted in a text of at most TEXT_LEN_MAX bytes.
        let rule = rule(&words, number as u32)?;
        self.destinations += rule.to.networks.len() + rule.to.names.len();
        if self.destinations > DESTINATIONS_MAX {
            return fault("to", format!("more than {DESTINATIONS_MAX} in all rules"));
        }
        self.rules.push(rule);
        Ok(())
    }

    fn default_line(&mut self, words: &[&str]) -> Result<(), Fault> {
        let action = match words {
            ["allow"] => Action::Allow,
            ["deny"] => Action::Deny { silent: false },
            ["deny", "silent"] => Action::Deny { silent: true },
            ["deny", "silent", wrong, ..] | ["allow" | "deny", wrong, ..] | [wrong, ..] => {
                return fault(wrong, "a default is `allow`, `deny` or `deny silent`");
            }
            [] => return fault("default", "is followed by allow or deny"),
        };
        match self.default.replace(action) {
            None => Ok(()),
            Some(_) => fault("default", "is said twice"),
        }
    }

    fn finish(self) -> Result<Policy, Fault> {
        match self.default {
            Some(default) => Ok(Policy::new(self.rules, default)),
            None => fault(
                "default",
                "is missing: `default deny` or `default allow` says what happens where no rule matches",
            ),
        }
    }
}

fn rule(words: &[&str], line: u32) -> Result<Rule, Fault> {
    let text = words.join(" ").into();
    let (action, mut rest) = match words {
        ["allow", rest @ ..] => (Action::Allow, rest),
        ["deny", "silent", rest @ ..] => (Action::Deny { silent: true }, rest),
        ["deny", rest @ ..] => (Action::Deny { silent: false }, rest),
        [wrong, ..] => return fault(wrong, "a rule starts with allow or deny"),
        [] => return fault("rule", "is empty"),
    };
    if rest.is_empty() {
        let reason = "says neither whom nor where; for all the rest there is `default`";
        return fault(words[0], reason);
    }
    let guests = section("guest", &mut rest, guests)?.unwrap_or_default();
    let everywhere = Destinations {
        any: true,
        ..Destinations::default()
    };
    let to = section("to", &mut rest, destinations)?.unwrap_or(everywhere);
    let protocols = match rest.split_first() {
        Some((list, more)) => {
            rest = more;
            protocols(list)?
        }
        None => Vec::new(),
    };
    let ports = match rest.split_first() {
        Some((list, more)) => {
            rest = more;
            ports(list, &protocols)?
        }
        None => Vec::new(),
    };
    if let Some(wrong) = rest.first() {
        return fault(wrong, "stands behind the ports, where a rule ends");
    }
    Ok(Rule {
        line,
        text,
        action,
        guests,
        to,
        protocols,
        ports,
    })
}

/// What follows `keyword`, if that is next.
fn section<T>(
    keyword: &str,
    rest: &mut &[&str],
    read: fn(&str) -> Result<T, Fault>,
) -> Result<Option<T>, Fault> {
    match **rest {
        [word, list, ref more @ ..] if word == keyword => {
            *rest = more;
            read(list).map(Some)
        }
        [word] if word == keyword => fault(keyword, "is followed by nothing"),
        _ => Ok(None),
    }
}

fn items(list: &str) -> Result<impl Iterator<Item = &str>, Fault> {
    if list.split(',').any(str::is_empty) {
        return fault(list, "has an empty item: lists have commas and no blanks");
    }
    Ok(list.split(','))
}

fn guests(list: &str) -> Result<Vec<GuestTerm>, Fault> {
    if list == "any" {
        return Ok(Vec::new());
    }
    let mut guests = Vec::new();
    for item in items(list)? {
        let term = match item.split_once('=') {
            Some(("port", name)) => name.parse().map(GuestTerm::Port),
            Some(("group", name)) => name.parse().map(GuestTerm::Group),
            _ => return fault(item, "a guest is port=NAME, group=NAME or any"),
        };
        guests.push(term.or_else(|error| fault(item, error.to_string()))?);
    }
    if guests.len() > LIST_MAX {
        return fault("guest", format!("more than {LIST_MAX}: make them a group"));
    }
    Ok(guests)
}

fn destinations(list: &str) -> Result<Destinations, Fault> {
    let mut to = Destinations::default();
    for item in items(list)? {
        match item {
            "any" => to.any = true,
            "internet" => to.internet = true,
            "private" => to.networks.extend(address::PRIVATE),
            "metadata" => to.networks.extend(address::METADATA),
            _ if item.contains(['/', ':']) || item.parse::<IpAddr>().is_ok() => {
                to.networks.push(network(item)?);
            }
            _ => match Pattern::parse(item) {
                Ok(pattern) => to.names.push(pattern),
                Err(reason) => return fault(item, reason),
            },
        }
    }
    Ok(to)
}

fn network(item: &str) -> Result<Cidr, Fault> {
    let (address, prefix) = match item.split_once('/') {
        Some((address, prefix)) => (address, Some(prefix)),
        None => (item, None),
    };
    let Ok(address) = address.parse::<IpAddr>() else {
        return fault(item, "is not an address or a network like 198.51.100.0/24");
    };
    if address.to_canonical() != address {
        return fault(item, "is IPv4 in IPv6's clothes: write it as IPv4");
    }
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let prefix = match prefix {
        None => longest,
        // No sign, no leading zero: one spelling.
        Some(text) => match text.parse::<u8>() {
            Ok(prefix) if prefix <= longest && prefix.to_string() == text => prefix,
            _ => return fault(item, format!("a prefix length is between 0 and {longest}")),
        },
    };
    match (Cidr::new(address, prefix), Cidr::around(address, prefix)) {
        (Some(network), _) => Ok(network),
        (None, Some(around)) => fault(item, format!("has host bits set: write {around}")),
        (None, None) => fault(item, "is not a network"),
    }
}

fn protocols(list: &str) -> Result<Vec<Protocol>, Fault> {
    if list == "any" {
        return Ok(Vec::new());
    }
    let mut protocols = Vec::new();
    for item in items(list)? {
        protocols.push(match item {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "icmp" => Protocol::Icmp,
            "guest" | "to" => {
                let order = "allow/deny, guest ..., to ..., protocol, ports";
                return fault(item, format!("is said once, and in this order: {order}"));
            }
            _ => return fault(item, "is no protocol (tcp, udp, icmp, or any alone)"),
        });
    }
    Ok(protocols)
}

fn ports(list: &str, protocols: &[Protocol]) -> Result<Vec<RangeInclusive<u16>>, Fault> {
    let have_ports = |protocol: &Protocol| matches!(protocol, Protocol::Tcp | Protocol::Udp);
    if protocols.is_empty() || !protocols.iter().all(have_ports) {
        return fault(list, "ports stand behind tcp, udp or tcp,udp alone");
    }
    let port = |text: &str| {
        let port = text.parse::<u16>().ok();
        port.filter(|port| *port != 0 && port.to_string() == text)
    };
    let mut ports = Vec::new();
    for item in items(list)? {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        match (port(first), port(last)) {
            (Some(first), Some(last)) if first <= last => ports.push(first..=last),
            (Some(_), Some(_)) => return fault(item, "ends before it begins"),
            _ => return fault(item, "is no port (1 to 65535) or range like 1000-2000"),
        }
    }
    if ports.len() > LIST_MAX {
        return fault("ports", format!("more than {LIST_MAX} in one rule"));
    }
    Ok(ports)
}
