//! Forwards: how clients of the host reach a guest, and guests a unix socket of the host.
//!
//! [`spec`] says what a forward is, made of [`part`]s, and [`parse`] how it is written; [`ForwardSet`] is
//! the list of those a network has, each with a number. [`active`] is what they do: it takes what comes
//! in, with [`directory`] for the question which guest, and [`sessions`] for UDP.
//!
//! # Limits
//! A network has at most [`FORWARDS_MAX`] forwards with [`SOCKETS_MAX`] listening sockets. A forward is
//! taken whole or not at all: every port of a range, and no port that another forward has.

pub mod active;
pub mod directory;
pub mod parse;
pub mod part;
pub mod sessions;
pub mod spec;

use std::fmt;
use std::net::IpAddr;

use crate::gateway::LanConfig;

pub use active::{ActiveForwards, ForwardCounters, ListenerKind, Moved};
pub use spec::{
    AllowGuests, Direction, ForwardError, ForwardName, ForwardSpec, Guest, HostEnd, HostPorts,
    InterfaceName, PortRange, Protocol, ShownSource, SocketPath,
};

/// Forwards of a network at most: each is compared with every other when it is added.
pub const FORWARDS_MAX: usize = 1_024;
/// Listening sockets of all forwards together: two full ranges on one address. Leaves most of the
/// 20,000 open files of the test machines, and of systemd's 524,288, to flows.
pub const SOCKETS_MAX: usize = 4_096;
const _: () = assert!(2 * part::RANGE_LEN_MAX <= SOCKETS_MAX);

/// What the gateway serves itself over TCP.
const DNS_PORT: u16 = 53;

fn own_service(port: u16) -> ForwardError {
    let reason = format!("{port} is the gateway's own DNS service: choose another port or address");
    ForwardError::new("guest port", reason)
}

/// Number of a forward; never given twice.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ForwardId(pub u32);

impl fmt::Display for ForwardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The forwards of a network, in the order they were added.
#[derive(Clone, Default, Debug)]
pub struct ForwardSet {
    entries: Vec<(ForwardId, ForwardSpec)>,
    last: u32,
}

impl ForwardSet {
    /// Adds a forward.
    ///
    /// # Errors
    /// It makes no sense, names no guest, claims what another forward has, or exceeds a limit. The set
    /// is as it was.
    pub fn add(&mut self, spec: ForwardSpec) -> Result<ForwardId, ForwardError> {
        self.check(&spec)?;
        self.last += 1;
        let id = ForwardId(self.last);
        self.entries.push((id, spec));
        Ok(id)
    }

    /// Whether [`ForwardSet::add`] would take the forward.
    ///
    /// # Errors
    /// As there.
    pub fn check(&self, spec: &ForwardSpec) -> Result<(), ForwardError> {
        spec.check()?;
        if spec.is_for_own_guest() {
            let reason = "say which: an address, a MAC or a lease name, as in 8080:GUEST:80";
            return Err(ForwardError::new("guest", reason));
        }
        for (id, other) in &self.entries {
            if let Some((key, what)) = spec.overlap(other) {
                let reason = format!("{what} is taken by forward {id} ({other})");
                return Err(ForwardError::new(key, reason));
            }
        }
        if self.entries.len() >= FORWARDS_MAX {
            let reason = format!("a network has at most {FORWARDS_MAX}");
            return Err(ForwardError::new("forwards", reason));
        }
        let sockets = self.socket_count() + spec.socket_count();
        if sockets > SOCKETS_MAX {
            let reason = format!(
                "{sockets} listening sockets with this one, at most {SOCKETS_MAX}: a port takes one \
                 for an address, two where none is named"
            );
            return Err(ForwardError::new("forwards", reason));
        }
        Ok(())
    }

    /// Whether a forward's addresses make sense on `lan`.
    ///
    /// # Errors
    /// The one that does not.
    pub fn check_on(spec: &ForwardSpec, lan: &LanConfig) -> Result<(), ForwardError> {
        match &spec.direction {
            Direction::ToGuest {
                guest: Guest::Address(address),
                ..
            } if !lan.is_guest_any(*address) => {
                let reason = match address {
                    IpAddr::V6(_) if lan.v6.is_none() => "this network has no IPv6".to_owned(),
                    _ => format!("{address} is no address of a guest of this network"),
                };
                Err(ForwardError::new("guest", reason))
            }
            &Direction::ToHost {
                address: None,
                port: DNS_PORT,
                ..
            } => Err(own_service(DNS_PORT)),
            &Direction::ToHost {
                address: Some(address),
                port,
                ..
            } => match lan.is_gateway(address) {
                true if port == DNS_PORT => Err(own_service(port)),
                true => Ok(()),
                false if lan.holds(address) => {
                    let reason = format!(
                        "{address} is a guest's: inside the LAN only the gateway ({}) answers, any \
                         address outside does too",
                        lan.address
                    );
                    Err(ForwardError::new("guest address", reason))
                }
                false => Ok(()),
            },
            Direction::ToGuest { .. } | Direction::ToHost { .. } => Ok(()),
        }
    }

    /// The number of the forward that a user means by its number, its name, or its own words.
    pub fn find(&self, words: &str) -> Option<ForwardId> {
        let number = words.parse::<u32>().ok();
        let as_spec = words.parse::<ForwardSpec>().ok();
        let matches = |&&(id, ref spec): &&(ForwardId, ForwardSpec)| {
            number == Some(id.0)
                || spec
                    .name
                    .as_ref()
                    .is_some_and(|name| name.as_str() == words)
                || as_spec.as_ref() == Some(spec)
        };
        self.entries.iter().find(matches).map(|&(id, _)| id)
    }

    /// Takes a forward off the list.
    pub fn remove(&mut self, id: ForwardId) -> Option<ForwardSpec> {
        let at = self.entries.iter().position(|&(entry, _)| entry == id)?;
        Some(self.entries.remove(at).1)
    }

    /// The forwards, in the order they were added.
    pub fn iter(&self) -> impl Iterator<Item = (ForwardId, &ForwardSpec)> {
        self.entries.iter().map(|(id, spec)| (*id, spec))
    }

    /// Listening sockets of all forwards.
    fn socket_count(&self) -> usize {
        self.iter().map(|(_, spec)| spec.socket_count()).sum()
    }
}

#[cfg(test)]
mod tests;
