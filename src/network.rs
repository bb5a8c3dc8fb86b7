//! The library's face: start a network, attach ports, ask for its state.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use crate::config::NetworkConfig;
use crate::frame::{Mac, PortId};

/// A running network. Dropping it stops it.
pub struct Network {}

/// How a port is attached.
#[derive(Clone, Debug, Default)]
pub struct PortOptions {
    /// Name shown by `status`; empty: made from the kind and the id.
    pub name: String,
    /// The guest's MAC where lanlet knows it (it made it up for `{mac}`).
    pub mac: Option<Mac>,
    /// No virtio-net header and no offloads (a plain tap).
    pub no_offload: bool,
}

/// A tap for a VMM.
#[derive(Debug)]
pub struct VmmPort {
    /// The port.
    pub id: PortId,
    /// The VMM's end: an IFF_TAP | IFF_NO_PI | IFF_VNET_HDR fd. The port is removed when the last
    /// copy of it is closed.
    pub fd: OwnedFd,
    /// Name of the tap inside lanlet's private namespace.
    pub ifname: String,
    /// A MAC for the guest, unique in this network.
    pub mac: Mac,
}

/// A tap whose netdev side is a guest's.
#[derive(Debug)]
pub struct GuestTap {
    /// The tap.
    pub tap: OwnedFd,
    /// A netlink socket of the guest's namespace, to read what the tap's own queue dropped; without
    /// it those drops stay unknown.
    pub netlink: Option<OwnedFd>,
}

/// A lease that lives as long as the port it was made for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestAddress {
    /// The guest's address.
    pub address: Ipv4Addr,
    /// Prefix length of the LAN.
    pub prefix: u8,
    /// The gateway, which is the DNS server too.
    pub gateway: Ipv4Addr,
    /// MTU of the LAN.
    pub mtu: u16,
    /// Search domain.
    pub domain: Option<String>,
}

/// Why a network or port could not be set up. Names the remedy where there is one.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// Placeholder until the parts are joined.
    #[error("{0}")]
    Other(String),
}

/// State of a network, as `lanlet status --json` prints it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Status {
    /// Name of the network.
    pub name: String,
    /// Process that runs it.
    pub pid: u32,
    /// Seconds since start.
    pub uptime_secs: u64,
    /// Gateway address with prefix length.
    pub subnet: String,
    /// MTU of the LAN.
    pub mtu: u16,
    /// The ports, the gateway first.
    pub ports: Vec<PortStatus>,
    /// The MAC table.
    pub macs: Vec<MacStatus>,
    /// DHCP leases.
    pub leases: Vec<LeaseStatus>,
    /// Flows of the NAT now.
    pub flows: FlowStatus,
    /// Counters of the network as a whole, by name.
    pub totals: std::collections::BTreeMap<String, u64>,
}

/// One port.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct PortStatus {
    /// Number.
    pub id: u16,
    /// Name.
    pub name: String,
    /// `gateway`, `vmm`, `namespace`, `tap`.
    pub kind: String,
    /// Frames and bytes from the guest.
    pub rx_frames: u64,
    /// Bytes from the guest.
    pub rx_bytes: u64,
    /// Frames to the guest.
    pub tx_frames: u64,
    /// Bytes to the guest.
    pub tx_bytes: u64,
    /// Drops by reason, kernel-side ones included (`kernel_tx_dropped`, `kernel_rx_dropped`).
    pub drops: std::collections::BTreeMap<String, u64>,
}

/// One MAC table entry.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MacStatus {
    /// Address.
    pub mac: String,
    /// Port it was learned on.
    pub port: u16,
}

/// One lease.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LeaseStatus {
    /// Address.
    pub address: Ipv4Addr,
    /// Client's MAC.
    pub mac: String,
    /// Name the client sent (option 12).
    pub hostname: Option<String>,
    /// Seconds left; `None`: as long as its port.
    pub expires_secs: Option<u64>,
}

/// Flows by protocol.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct FlowStatus {
    /// TCP flows.
    pub tcp: usize,
    /// UDP mappings.
    pub udp: usize,
    /// ICMP echo mappings.
    pub icmp: usize,
}

impl Network {
    /// Starts a network: its worker and its control thread.
    ///
    /// # Errors
    /// What is missing, with the remedy.
    pub fn start(_config: NetworkConfig) -> Result<Self, NetworkError> {
        Err(NetworkError::Other("not joined yet".to_owned()))
    }

    /// Makes a tap for a VMM.
    ///
    /// # Errors
    /// What is missing, with the remedy.
    pub fn attach_vmm(&self, _options: PortOptions) -> Result<VmmPort, NetworkError> {
        Err(NetworkError::Other("not joined yet".to_owned()))
    }

    /// Attaches a tap whose netdev side is a guest's (a namespace guest) and gives it a lease if the
    /// options name a MAC.
    ///
    /// # Errors
    /// The fd is no tap of the right kind, or no address is free.
    pub fn attach_tap(
        &self,
        _tap: GuestTap,
        _options: PortOptions,
    ) -> Result<(PortId, Option<GuestAddress>), NetworkError> {
        Err(NetworkError::Other("not joined yet".to_owned()))
    }

    /// Removes a port. Unknown ids are ignored.
    pub fn detach(&self, _id: PortId) {}

    /// A MAC for a guest, random and locally administered in QEMU's range 52:54:00.
    pub fn make_mac(&self) -> Mac {
        Mac([0x52, 0x54, 0, 0, 0, 1])
    }

    /// The network's state.
    pub fn status(&self) -> Status {
        Status::default()
    }

    /// Ends the worker and whatever else runs for the network. Ports are gone, [`Network::failed`]
    /// returns. Twice is once.
    pub fn stop(&self) {}

    /// Blocks until the worker has ended: its reason where that was a failure, `None` after
    /// [`Network::stop`].
    pub fn failed(&self) -> Option<NetworkError> {
        None
    }
}
