//! What a forward is, and when it makes sense.
//!
//! [`ForwardSpec::check`] holds every rule that needs no look at the host or the network, so that a
//! forward is refused for the same reason however it came in. How it is written is
//! [`super::parse`]'s business.

use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU32;

pub use super::part::{ForwardError, ForwardName, InterfaceName, PortRange, Protocol, SocketPath};
use crate::frame::Mac;
use crate::names::GuestName;

/// Which guest.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Guest {
    /// The guest of the command that says so; [`ForwardSpec::for_guest`] puts it in.
    Own,
    /// Whoever has this address.
    Address(IpAddr),
    /// Whatever address the guest with this MAC has.
    Mac(Mac),
    /// Whatever address the lease of this name has.
    Name(GuestName),
}

impl fmt::Display for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Guest::Own => Ok(()),
            Guest::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
            Guest::Address(address) => write!(f, "{address}"),
            Guest::Mac(mac) => write!(f, "[{mac}]"),
            Guest::Name(name) => write!(f, "{name}"),
        }
    }
}

/// Ports of the host that are listened on.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct HostPorts {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Address; `None`: all of both families.
    pub address: Option<IpAddr>,
    /// Only what comes in by this interface.
    pub interface: Option<InterfaceName>,
    /// Ports; `None`: one that the host chooses.
    pub ports: Option<PortRange>,
}

/// The host's end of a forward to a guest.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum HostEnd {
    /// Ports.
    Ports(HostPorts),
    /// A unix stream socket; its clients become TCP connections.
    Unix(SocketPath, AllowGuests),
}

/// Whether clients of a unix socket may be guests of `lanlet exec`, who have their user's files. Else a
/// guest would reach what rules keep from it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct AllowGuests(pub bool);

/// Who the guest sees as its client.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub enum ShownSource {
    /// The gateway.
    #[default]
    Gateway,
    /// The client's own address, where the guest can answer to it: not a loopback address, nor one of
    /// another family than the guest's. Those see the gateway all the same.
    Client,
}

/// What is forwarded where.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Direction {
    /// Clients of the host reach a guest.
    ToGuest {
        /// Where clients connect to.
        listen: HostEnd,
        /// Whom they reach.
        guest: Guest,
        /// At which ports: as many as there are on the host's end.
        ports: PortRange,
        /// Who they seem to be.
        shown: ShownSource,
    },
    /// Guests reach a unix socket of the host, over TCP.
    ToHost {
        /// Where guests connect to; `None`: the gateway's addresses.
        address: Option<IpAddr>,
        /// Port there.
        port: u16,
        /// What they reach.
        path: SocketPath,
    },
}

/// A forward.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ForwardSpec {
    /// Its name, unique in its network.
    pub name: Option<ForwardName>,
    /// Connections at a time, or UDP sessions, at most; `None`: a share of what the network has.
    pub max: Option<NonZeroU32>,
    /// What it does.
    pub direction: Direction,
}

impl ForwardSpec {
    /// Checks what can be known from the forward alone.
    ///
    /// # Errors
    /// The first part that is wrong.
    pub fn check(&self) -> Result<(), ForwardError> {
        match &self.direction {
            Direction::ToGuest {
                listen,
                guest,
                ports,
                shown,
            } => {
                if let HostEnd::Ports(host) = listen {
                    host.check()?;
                    check_lengths(host.ports, *ports)?;
                } else if ports.count() > 1 {
                    let reason = format!("{ports}: a socket leads to one port");
                    return Err(ForwardError::new("guest port", reason));
                }
                guest.check()?;
                match shown {
                    ShownSource::Gateway => Ok(()),
                    ShownSource::Client => check_client_address(listen, guest),
                }
            }
            Direction::ToHost { .. } if self.max.is_some() => {
                Err(ForwardError::new("max", "is for forwards to a guest"))
            }
            Direction::ToHost { address, port, .. } => {
                let key = "guest address";
                if let Some(address) = *address {
                    check_unicast(address).map_err(|reason| ForwardError::new(key, reason))?;
                    if address.is_unspecified() || address.is_loopback() {
                        let reason = format!("{address} is no address a guest's packets leave for");
                        return Err(ForwardError::new(key, reason));
                    }
                }
                match port {
                    0 => Err(ForwardError::new("guest port", "0 is no port")),
                    _ => Ok(()),
                }
            }
        }
    }

    /// Whether the guest is that of the command which says so.
    pub fn is_for_own_guest(&self) -> bool {
        matches!(&self.direction, Direction::ToGuest { guest, .. } if *guest == Guest::Own)
    }

    /// The forward with `own` in the place of [`Guest::Own`].
    pub fn for_guest(mut self, own: Guest) -> Self {
        if let Direction::ToGuest { guest, .. } = &mut self.direction
            && *guest == Guest::Own
        {
            *guest = own;
        }
        self
    }

    /// The forward with the port that the host chose.
    pub fn with_host_port(mut self, port: PortRange) -> Self {
        if let Direction::ToGuest {
            listen: HostEnd::Ports(host),
            ..
        } = &mut self.direction
            && host.ports.is_none()
        {
            host.ports = Some(port);
        }
        self
    }

    /// Host sockets that listen for it.
    pub fn socket_count(&self) -> usize {
        match &self.direction {
            Direction::ToGuest {
                listen: HostEnd::Ports(host),
                ..
            } => {
                let families = if host.address.is_none() { 2 } else { 1 };
                families * host.ports.map_or(1, PortRange::count)
            }
            Direction::ToGuest { .. } => 1,
            Direction::ToHost { .. } => 0,
        }
    }

    /// What this and another forward both claim, with the part of this one that says so.
    pub fn overlap(&self, other: &Self) -> Option<(&'static str, String)> {
        if let Some(name) = &self.name
            && other.name.as_ref() == Some(name)
        {
            return Some(("name", name.to_string()));
        }
        match (&self.direction, &other.direction) {
            (Direction::ToGuest { listen, .. }, Direction::ToGuest { listen: theirs, .. }) => {
                match (listen, theirs) {
                    (HostEnd::Ports(ours), HostEnd::Ports(theirs)) => {
                        let port = ours.overlap(theirs)?;
                        Some(("host port", format!("{port}/{}", ours.protocol)))
                    }
                    (HostEnd::Unix(ours, _), HostEnd::Unix(theirs, _)) if ours == theirs => {
                        Some(("path", ours.to_string()))
                    }
                    _ => None,
                }
            }
            (
                Direction::ToHost { address, port, .. },
                Direction::ToHost {
                    address: their_address,
                    port: their_port,
                    ..
                },
            ) if (address, port) == (their_address, their_port) => {
                Some(("guest port", format!("{port}/tcp")))
            }
            _ => None,
        }
    }
}

impl HostPorts {
    fn check(&self) -> Result<(), ForwardError> {
        let Some(address) = self.address else {
            return Ok(());
        };
        let refuse = |reason| Err(ForwardError::new("host address", reason));
        if let Err(reason) = check_unicast(address) {
            return refuse(reason);
        }
        if let IpAddr::V6(v6) = address
            && v6.is_unicast_link_local()
            && self.interface.is_none()
        {
            return refuse(format!(
                "{address} is link-local: say on which interface, as [{address}%eth0]"
            ));
        }
        Ok(())
    }

    /// The first port both would listen on. Interfaces keep sockets apart only where both name one
    /// (net/ipv4/inet_connection_sock.c, inet_csk_bind_conflict).
    fn overlap(&self, other: &Self) -> Option<u16> {
        let apart = match (&self.interface, &other.interface) {
            (Some(ours), Some(theirs)) => ours != theirs,
            _ => false,
        };
        if apart || self.protocol != other.protocol || !self.address_overlaps(other) {
            return None;
        }
        self.ports?.common(other.ports?)
    }

    fn address_overlaps(&self, other: &Self) -> bool {
        let (Some(ours), Some(theirs)) = (self.address, other.address) else {
            return true;
        };
        let any = ours.is_unspecified() || theirs.is_unspecified();
        ours == theirs || (any && ours.is_ipv4() == theirs.is_ipv4())
    }
}

impl Guest {
    fn check(&self) -> Result<(), ForwardError> {
        let refuse = |reason| Err(ForwardError::new("guest", reason));
        match *self {
            Guest::Address(address) => match check_unicast(address) {
                Err(reason) => refuse(reason),
                Ok(()) if address.is_unspecified() || address.is_loopback() => {
                    refuse(format!("{address} is no address of a guest"))
                }
                Ok(()) => Ok(()),
            },
            Guest::Mac(mac) if mac.is_group() || mac == Mac::default() => refuse(format!(
                "{mac} is a group address or zero: a guest's is like 52:54:00:12:34:56"
            )),
            Guest::Own | Guest::Mac(_) | Guest::Name(_) => Ok(()),
        }
    }
}

/// An address that a socket can be bound to or connected to.
fn check_unicast(address: IpAddr) -> Result<(), String> {
    let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
    if address.is_multicast() || broadcast {
        return Err(format!("{address} is a group address"));
    }
    if let IpAddr::V6(v6) = address
        && let Some(v4) = v6.to_ipv4_mapped()
    {
        return Err(format!("{address} is an IPv4 address: write {v4}"));
    }
    Ok(())
}

fn check_lengths(host: Option<PortRange>, guest: PortRange) -> Result<(), ForwardError> {
    match host {
        None if guest.count() > 1 => Err(ForwardError::new(
            "host port",
            format!("the host chooses one port, and the guest's {guest} are several: name a range"),
        )),
        Some(host) if host.count() != guest.count() => Err(ForwardError::new(
            "guest port",
            format!(
                "{guest} is {} and the host's {host} is {}: both sides need as many",
                ports_in_words(guest.count()),
                ports_in_words(host.count())
            ),
        )),
        _ => Ok(()),
    }
}

fn ports_in_words(count: usize) -> String {
    match count {
        1 => "1 port".to_owned(),
        _ => format!("{count} ports"),
    }
}

/// Where a client's own address can never be shown, asking for it is a mistake.
fn check_client_address(listen: &HostEnd, guest: &Guest) -> Result<(), ForwardError> {
    let refuse = |reason: String| Err(ForwardError::new("client-address", reason));
    let HostEnd::Ports(host) = listen else {
        return refuse("clients of a unix socket have no address".to_owned());
    };
    match (host.address, guest) {
        (Some(address), _) if address.is_loopback() => refuse(format!(
            "clients of {address} have a loopback address, to which no guest can answer"
        )),
        (Some(host), Guest::Address(guest)) if host.is_ipv4() != guest.is_ipv4() => refuse(
            format!("clients of {host} have no address of {guest}'s family"),
        ),
        _ => Ok(()),
    }
}
