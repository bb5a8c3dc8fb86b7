//! The state of a network as `lanlet status` shows it.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

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
