//! The parts a forward is made of: ports, names and paths. Each is right once it exists.

use std::fmt;
use std::str::FromStr;

/// Most ports in one forward's range: an RTP or passive-FTP range fits, and each port takes one or
/// two open files of the [`super::SOCKETS_MAX`].
pub const RANGE_LEN_MAX: usize = 2_048;
/// Longest name of a forward: as a network's.
pub const NAME_LEN_MAX: usize = 32;
/// Longest name of an interface: IFNAMSIZ less its NUL (linux/if.h).
pub const INTERFACE_LEN_MAX: usize = 15;
/// Longest path of a unix socket: sun_path less its NUL (unix(7)).
pub const SOCKET_PATH_LEN_MAX: usize = 107;

/// What a forward can't be used for: which part of it, and why.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{key}: {reason}")]
pub struct ForwardError {
    /// The part: `host address`, `host port`, `guest`, `guest port`, `protocol`, `path`, …
    pub key: &'static str,
    /// What is wrong with it, and what would be right.
    pub reason: String,
}

impl ForwardError {
    pub(super) fn new(key: &'static str, reason: impl Into<String>) -> Self {
        Self {
            key,
            reason: reason.into(),
        }
    }
}

/// A transport protocol that can be forwarded.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        })
    }
}

impl FromStr for Protocol {
    type Err = ForwardError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.to_ascii_lowercase().as_str() {
            "tcp" => Ok(Protocol::Tcp),
            "udp" => Ok(Protocol::Udp),
            _ => Err(ForwardError::new(
                "protocol",
                format!("{text:?} is neither tcp nor udp"),
            )),
        }
    }
}

/// Ports, both ends included; never port 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    /// The ports from `first` to `last`.
    ///
    /// # Errors
    /// Port 0, an end before the beginning, or more than [`RANGE_LEN_MAX`] ports.
    pub fn new(first: u16, last: u16) -> Result<Self, String> {
        let range = Self { first, last };
        if first == 0 {
            return Err("0 is no port".to_owned());
        }
        if last < first {
            return Err(format!("{first}-{last} ends before it begins"));
        }
        if range.count() > RANGE_LEN_MAX {
            return Err(format!(
                "{range} has {} ports: a forward has at most {RANGE_LEN_MAX}",
                range.count()
            ));
        }
        Ok(range)
    }

    /// First port.
    pub fn first(self) -> u16 {
        self.first
    }

    /// How many there are, at least 1.
    pub fn count(self) -> usize {
        usize::from(self.last - self.first) + 1
    }

    /// The ports in order.
    pub fn iter(self) -> impl Iterator<Item = u16> {
        self.first..=self.last
    }

    /// The n-th port.
    pub fn nth(self, n: usize) -> Option<u16> {
        (n < self.count()).then(|| self.first + n as u16)
    }

    /// The first port that both have.
    pub fn common(self, other: Self) -> Option<u16> {
        let port = self.first.max(other.first);
        (port <= self.last.min(other.last)).then_some(port)
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.count() {
            1 => write!(f, "{}", self.first),
            _ => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

/// A checked piece of text: what `$check` lets through.
macro_rules! text {
    ($(#[$doc:meta])* $name:ident, $key:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
        pub struct $name(String);

        impl $name {
            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = ForwardError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let check: fn(&str) -> Result<String, String> = $check;
                check(text)
                    .map(Self)
                    .map_err(|reason| ForwardError::new($key, reason))
            }
        }
    };
}

text! {
    /// What a forward is called when it is listed or removed: `[A-Za-z][A-Za-z0-9_.-]*`. Never only
    /// digits, as its number is.
    ForwardName, "name", |text| {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        let good = text.starts_with(|c: char| c.is_ascii_alphabetic())
            && text.len() <= NAME_LEN_MAX
            && text.bytes().all(allowed);
        good.then(|| text.to_owned()).ok_or_else(|| {
            format!("{text:?} is not a letter and up to {} of A-Z a-z 0-9 _ . -", NAME_LEN_MAX - 1)
        })
    }
}

text! {
    /// A network interface of the host.
    InterfaceName, "interface", |text| {
        // net/core/dev.c, dev_valid_name; a comma or a bracket would end the name where it is written.
        let bad = |c: char| c.is_whitespace() || c.is_control() || "/:,[]%".contains(c);
        let good = !text.is_empty()
            && text.len() <= INTERFACE_LEN_MAX
            && !matches!(text, "." | "..")
            && !text.contains(bad);
        good.then(|| text.to_owned()).ok_or_else(|| {
            format!("{text:?} is no name of an interface like eth0 (1 to {INTERFACE_LEN_MAX} bytes)")
        })
    }
}

text! {
    /// Path of a unix socket: absolute, as the process that opens it has a directory of its own.
    SocketPath, "path", |text| {
        if !text.starts_with('/') || text.ends_with('/') {
            return Err(format!("{text:?} is not the absolute path of a socket"));
        }
        if text.len() > SOCKET_PATH_LEN_MAX {
            return Err(format!(
                "{text:?} has {} bytes, a socket's path at most {SOCKET_PATH_LEN_MAX}",
                text.len()
            ));
        }
        if let Some(bad) = text.chars().find(|&c| c.is_control() || ":,".contains(c)) {
            return Err(format!("{text:?} has a {bad:?}, which separates the parts of a forward"));
        }
        Ok(text.to_owned())
    }
}
