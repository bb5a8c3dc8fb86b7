//! Names of guests and of their groups, as the command line, ports, forwards, policies, the control
//! protocol and DHCP say them.
//!
//! A name is right once it exists: it is parsed where it comes in, in one way, and compared as a value
//! from there on. Two ways to read one name would let a rule miss its guest.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// Longest name: one DNS label (RFC 1035 section 2.3.4). Linux's host names have one byte more.
pub const NAME_LEN_MAX: usize = 63;

/// Why a text is no name: what is wrong with it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct NameError(String);

/// What a guest is called, in lower case: `web`, `db-1`, `build_2.lab`.
///
/// It never ends in a number of its own (`8080`, `10.0.0.300`): a forward takes that for a port or an
/// address.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct GuestName(Arc<str>);

/// What guests that share rules of a policy are called together, in lower case. Numbers are fine.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct GroupName(Arc<str>);

/// The text in lower case, as DNS compares names (RFC 4343). Characters are those of docker's names;
/// labels between dots are not empty, as DNS has none.
fn fold(text: &str) -> Result<String, NameError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let begins = text.starts_with(|c: char| c.is_ascii_alphanumeric());
    if !begins || !text.bytes().all(allowed) || text.split('.').any(str::is_empty) {
        return Err(NameError(format!(
            "{text:?} is no name: one begins with a letter or digit and has A-Z a-z 0-9 - _ and single dots"
        )));
    }
    if text.len() > NAME_LEN_MAX {
        let len = text.len();
        return Err(NameError(format!(
            "{text:?} has {len} bytes, a name at most {NAME_LEN_MAX}"
        )));
    }
    Ok(text.to_ascii_lowercase())
}

impl GuestName {
    /// The name of the gateway's port.
    pub fn gateway() -> Self {
        Self("gateway".into())
    }

    /// The name of a port that nobody named.
    pub fn numbered(kind: &'static str, port: impl fmt::Display) -> Self {
        Self(format!("{kind}{port}").into())
    }

    /// Another name, for when this one is taken.
    pub fn again(&self, nth: u32) -> Self {
        Self(format!("{self}-{nth}").into())
    }

    /// What a host's own name calls it: the whole, or where that is too long or otherwise none, its first label.
    pub fn of_host(name: &str) -> Option<Self> {
        let first_label = || name.split('.').next()?.parse().ok();
        name.parse().ok().or_else(first_label)
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What stands before the first dot.
    pub fn first_label(&self) -> &str {
        self.0.split('.').next().unwrap_or_default()
    }
}

impl GroupName {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for GuestName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let name = fold(text)?;
        let last = name.rsplit('.').next().unwrap_or_default();
        if last.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(NameError(format!(
                "{text:?} is no name of a guest: one does not end in a number of its own, as ports and \
                 addresses do"
            )));
        }
        Ok(Self(name.into()))
    }
}

impl FromStr for GroupName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        fold(text).map(|name| Self(name.into()))
    }
}

impl fmt::Display for GuestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Display for GroupName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_name_however_it_is_written() {
        let longest = "x".repeat(NAME_LEN_MAX);
        for (text, name) in [
            ("web", "web"),
            ("Web", "web"),
            ("Web_1", "web_1"),
            ("a", "a"),
            ("node-1.Lab.test", "node-1.lab.test"),
            ("web-1-", "web-1-"),
            ("9p", "9p"),
            (&longest, &longest),
        ] {
            let read: GuestName = text.parse().unwrap();
            assert_eq!(read.as_str(), name);
            assert_eq!(read, name.parse().unwrap());
            assert_eq!(text.parse::<GroupName>().unwrap().as_str(), name);
        }
        let fqdn: GuestName = "web.lab.test".parse().unwrap();
        assert_eq!(fqdn.first_label(), "web");
    }

    #[test]
    fn a_host_has_its_whole_name_or_its_first_label() {
        let long = format!("Web.{}.test", "x".repeat(63));
        for (name, called) in [
            ("web.lab.test", Some("web.lab.test")),
            (&long, Some("web")),
            ("web.lab.test.", Some("web")),
            ("10.0.0.5", None),
            ("Alice's laptop.lan", None),
            ("", None),
        ] {
            let host = GuestName::of_host(name);
            assert_eq!(host.as_ref().map(GuestName::as_str), called, "{name}");
        }
    }

    #[test]
    fn what_is_no_name() {
        let long = "x".repeat(NAME_LEN_MAX + 1);
        for bad in [
            "",
            " ",
            "web ",
            "a b",
            "-web",
            "_web",
            ".web",
            "web.",
            "a..b",
            "web!",
            "web,1",
            "web#",
            "web:1",
            "web/1",
            "wéb",
            "web\n",
            "web\0",
            "[web]",
            "a\u{1b}[2J",
            "port=web",
            &long,
        ] {
            assert!(bad.parse::<GuestName>().is_err(), "{bad:?}");
            assert!(bad.parse::<GroupName>().is_err(), "{bad:?}");
        }
        for number in ["8080", "10.0.0.300", "node.1"] {
            assert!(number.parse::<GuestName>().is_err(), "{number}");
            assert!(number.parse::<GroupName>().is_ok(), "{number}");
        }
    }

    #[test]
    fn the_names_of_ports_without_one_are_names() {
        let name = GuestName::numbered("vhost-user", 4095);
        assert_eq!(name, "vhost-user4095".parse().unwrap());
        assert_eq!(name.again(2), "vhost-user4095-2".parse().unwrap());
    }
}
