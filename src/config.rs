//! What a network is configured with.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

/// Everything a [`crate::network::Network`] is started with.
#[derive(Clone, Debug)]
pub struct NetworkConfig {
    /// Name of the network, for its control socket and lease file.
    pub name: String,
    /// The gateway's address (192.168.122.1).
    pub gateway: Ipv4Addr,
    /// Prefix length, 8..=29.
    pub prefix: u8,
    /// MTU announced to guests, 576..=65,535.
    pub mtu: u16,
    /// First and last address that DHCP hands out.
    pub dhcp_range: (Ipv4Addr, Ipv4Addr),
    /// Lease time.
    pub lease_time: Duration,
    /// Domain name for DHCP option 15.
    pub domain: Option<String>,
    /// DNS servers that queries are forwarded to; empty: those of the host's /etc/resolv.conf.
    pub dns: Vec<IpAddr>,
    /// MAC table ageing.
    pub ageing: Duration,
    /// Flows of the NAT at most, all protocols.
    pub flows_max: usize,
    /// Whether guests may connect to the host's own (non-loopback) addresses.
    pub host_access: bool,
    /// Where leases are kept across restarts; `None`: not kept.
    pub lease_file: Option<PathBuf>,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            name: "default".to_owned(),
            gateway: Ipv4Addr::new(192, 168, 122, 1),
            prefix: 24,
            mtu: 1500,
            dhcp_range: (Ipv4Addr::new(192, 168, 122, 2), Ipv4Addr::new(192, 168, 122, 254)),
            lease_time: Duration::from_secs(3600),
            domain: None,
            dns: Vec::new(),
            ageing: Duration::from_secs(300),
            flows_max: 16_384,
            host_access: false,
            lease_file: None,
        }
    }
}
