//! Why a network could not be set up.

use std::net::Ipv4Addr;

use super::forwards::ForwardRefusal;
use crate::config::ConfigError;
use crate::dhcp::lease::{PoolError, Refusal};
use crate::frame::{Mac, PortId};
use crate::names::GuestName;
use crate::switch::PORTS_MAX;
use crate::tap::TapError;
use crate::uplink::listen::ListenError;

/// Why a network or port could not be set up. Names the remedy where there is one.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A forward can't be had.
    #[error(transparent)]
    Forward(#[from] ForwardRefusal),
    /// A key of the configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The DHCP range is unusable.
    #[error("dhcp-range: {0}")]
    Pool(#[from] PoolError),
    /// A vhost-user port's socket can't be had.
    #[error("vhost-user:{0}")]
    Socket(#[from] ListenError),
    /// A tap or the helper failed.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The system refused a thread, an epoll or the like.
    #[error("cannot {action}: {cause}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        cause: std::io::Error,
    },
    /// No address for a guest.
    #[error("no address for {mac}: {cause}; widen --dhcp-range or --subnet")]
    NoAddress {
        /// The guest.
        mac: Mac,
        /// Why.
        cause: Refusal,
    },
    /// A guest can't have the address that was asked for.
    #[error("{ip} can't be the guest's address: {cause}; choose another --ip, or none")]
    NotThisAddress {
        /// The address.
        ip: Ipv4Addr,
        /// Why.
        cause: Refusal,
    },
    /// A guest with this MAC has its lease already.
    #[error("a guest with the MAC {mac} is attached already: give each its own --mac, or none")]
    MacTaken {
        /// The guest.
        mac: Mac,
    },
    /// Another port is called that.
    #[error("the name {name} is port {port}'s: give each guest a --guest-name of its own, or none")]
    NameTaken {
        /// The name.
        name: GuestName,
        /// Who has it.
        port: PortId,
    },
    /// No guest has this name or address.
    #[error("no guest is called {0} or has that address: 'lanlet status' names them")]
    NoSuchGuest(String),
    /// The guest has no namespaces that anybody could enter.
    #[error("{0} is no guest of 'lanlet exec'")]
    NoNamespaces(String),
    /// All port numbers are in use.
    #[error("the switch has {PORTS_MAX} ports already: detach some or start a second network")]
    PortsFull,
    /// The data path did not answer.
    #[error("the data path is busy; what was asked for is done when it gets to it")]
    Busy,
    /// The data path has ended.
    #[error("the data path has ended{}", .0.as_ref().map(|cause| format!(": {cause}")).unwrap_or_default())]
    Ended(Option<String>),
}
