//! What a network is configured with, and what makes a configuration valid.
//!
//! [`Settings`] is what a user wrote, key by key, [`NetworkConfig`] what a network runs with.
//! [`Settings::resolve`] fills in the defaults that follow from other keys (the gateway and the DHCP
//! range from the subnet) and refuses the whole where one key is wrong, naming it.

mod host;
mod host_entry;
pub mod memory;
mod port;
pub mod subnet4;
mod subnet6;
mod workers;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::nat::egress::HostAccess;
use crate::nat::forward::ForwardSpec;
use crate::nat::policy::Policy;
use crate::nat::udp::UdpBehaviour;
use crate::uplink::outbound::Outbound;

pub use self::subnet6::{PREFIX6_LEN, Subnet6};
pub use self::workers::{WORKERS_MAX, Workers};
use crate::wire::ipv6;
pub use host::{HostPorts, HostSettings};
pub use host_entry::HostEntry;
pub use port::{PortKind, PortSpec};

/// Name of the network where none is given.
pub const NAME_DEFAULT: &str = "default";
/// Longest network name. Leaves room for the directory in a socket's path of 107 bytes.
pub const NAME_LEN_MAX: usize = 32;
/// Widest LAN: a class A network.
pub const PREFIX_MIN: u8 = 8;
/// Narrowest LAN: a gateway and five guests.
pub const PREFIX_MAX: u8 = 29;
/// Smallest MTU: what every IPv4 host must accept (RFC 791 section 3.1), and so must be able to get.
pub const MTU_MIN: u16 = 576;
/// Largest MTU: that of a tap, 65,535 less the Ethernet header (drivers/net/tun.c, MAX_MTU). A
/// namespace guest's link could not be set to more.
pub const MTU_MAX: u16 = 65_521;
/// How long a worker looks for traffic at most: longer waits are hardly shortened by it.
pub const BUSY_POLL_MAX: Duration = Duration::from_millis(1);
/// Shortest lease, seconds. Below this a client does nothing but renew.
pub const LEASE_SECS_MIN: u64 = 10;
/// Longest lease, seconds. Option 51 holds 32 bits, all ones mean "for ever" (RFC 2131 section 3.3).
pub const LEASE_SECS_MAX: u64 = u32::MAX as u64 - 1;
/// Longest MAC ageing time, seconds (IEEE 802.1Q table 8-6 allows 10 to 1,000,000).
pub const AGEING_SECS_MAX: u64 = 1_000_000;
/// Fewest flows that make sense: one guest with a browser.
pub const FLOWS_MIN: usize = 16;
/// Most flows: a TCP flow takes a host socket, and the kernel's own bound on open files of one
/// process (fs.nr_open) is 1,048,576.
pub const FLOWS_MAX: usize = 1_000_000;
/// DNS servers at most: three is what a resolver reads (resolv.conf(5), MAXNS), more never get asked.
pub const DNS_SERVERS_MAX: usize = 3;
/// Longest domain name in text form (RFC 1035 section 2.3.4).
pub const DOMAIN_LEN_MAX: usize = 253;
/// Longest label of a domain name (RFC 1035 section 2.3.4).
const LABEL_LEN_MAX: usize = 63;

/// Everything a [`crate::network::Network`] is started with.
#[derive(Clone, Debug)]
pub struct NetworkConfig {
    /// Name of the network, for its control socket and lease file.
    pub name: String,
    /// The gateway's address (192.168.122.1).
    pub gateway: Ipv4Addr,
    /// Prefix length, 8..=29.
    pub prefix: u8,
    /// IPv6 of the LAN.
    pub subnet6: Subnet6,
    /// MTU announced to guests, 576..=65,521.
    pub mtu: u16,
    /// First and last address that DHCP hands out.
    pub dhcp_range: (Ipv4Addr, Ipv4Addr),
    /// Addresses kept for guests, in that range or not.
    pub hosts: Vec<HostEntry>,
    /// Lease time.
    pub lease_time: Duration,
    /// Domain name for DHCP option 15.
    pub domain: Option<String>,
    /// DNS servers that queries are forwarded to; empty: those of the host's /etc/resolv.conf.
    pub dns: Vec<IpAddr>,
    /// MAC table ageing.
    pub ageing: Duration,
    /// Threads of the data path.
    pub workers: Workers,
    /// How long a worker looks for traffic before it sleeps, [`BUSY_POLL_MAX`] at most; zero: not at all.
    pub busy_poll: Duration,
    /// TCP flows of the NAT at most. UDP and ping mappings have limits of their own
    /// ([`crate::nat::udp::LIMITS`], [`crate::nat::icmp::LIMITS`]).
    pub flows_max: usize,
    /// Memory of all TCP flows' buffers, bytes.
    pub tcp_memory: usize,
    /// What of the host guests reach.
    pub host: HostAccess,
    /// Where guests' traffic leaves from.
    pub outbound: Outbound,
    /// Mapping and filtering of UDP (RFC 4787 4.1 and 5).
    pub udp: UdpBehaviour,
    /// Forwards to begin with; more are added while the network runs.
    pub forwards: Vec<ForwardSpec>,
    /// Ports to begin with; more are attached while the network runs.
    pub ports: Vec<PortSpec>,
    /// Egress policy at the start; `None`: guests may go wherever the rest lets them.
    pub policy: Option<Policy>,
    /// Where leases are kept across restarts; `None`: not kept.
    pub lease_file: Option<PathBuf>,
    /// The `lanlet` program, which is run once more as the helper that holds the taps' namespace.
    /// `None`: $LANLET_HELPER, else this very program if it began with [`crate::tap::helper::run_if_asked`]
    /// (or is `lanlet`), else the `lanlet` on PATH.
    pub helper: Option<PathBuf>,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            name: NAME_DEFAULT.to_owned(),
            gateway: Ipv4Addr::new(192, 168, 122, 1),
            prefix: 24,
            subnet6: Subnet6::Auto,
            mtu: 1500,
            dhcp_range: (
                Ipv4Addr::new(192, 168, 122, 2),
                Ipv4Addr::new(192, 168, 122, 254),
            ),
            hosts: Vec::new(),
            lease_time: Duration::from_secs(3600),
            domain: None,
            dns: Vec::new(),
            ageing: Duration::from_secs(300),
            workers: Workers::default(),
            busy_poll: Duration::ZERO,
            flows_max: 16_384,
            tcp_memory: memory::tcp_memory_default(),
            host: HostAccess::default(),
            outbound: Outbound::default(),
            udp: UdpBehaviour::default(),
            forwards: Vec::new(),
            ports: Vec::new(),
            policy: None,
            lease_file: None,
            helper: None,
        }
    }
}

/// A configuration that can't be used: which key, and why.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{key}: {reason}")]
pub struct ConfigError {
    /// The key, as the command line spells its option (without dashes).
    pub key: &'static str,
    /// What is wrong with it, and what would be right.
    pub reason: String,
}

impl ConfigError {
    pub(crate) fn new(key: &'static str, reason: impl Into<String>) -> Self {
        Self {
            key,
            reason: reason.into(),
        }
    }
}

/// What a user said about a network; `None` and empty: the default.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct Settings {
    /// The LAN.
    pub subnet: Option<Subnet>,
    /// The gateway's address; by default the subnet's first.
    pub gateway: Option<Ipv4Addr>,
    /// IPv6 of the LAN.
    pub subnet6: Option<Subnet6>,
    /// MTU of the LAN, bytes.
    pub mtu: Option<u16>,
    /// Addresses DHCP hands out; by default all of the larger side of the gateway.
    pub dhcp_range: Option<AddressRange>,
    /// Addresses kept for guests.
    pub hosts: Vec<HostEntry>,
    /// Lease time.
    pub lease_time: Option<Duration>,
    /// Search domain.
    pub domain: Option<String>,
    /// DNS servers.
    pub dns: Vec<IpAddr>,
    /// MAC ageing.
    pub ageing: Option<Duration>,
    /// Threads of the data path.
    pub workers: Option<Workers>,
    /// How long a worker looks for traffic before it sleeps.
    pub busy_poll: Option<Duration>,
    /// Limit of TCP flows.
    pub flows_max: Option<usize>,
    /// Memory of TCP's buffers, bytes.
    pub tcp_memory: Option<usize>,
    /// What of the host guests reach, and where their traffic leaves from.
    pub host: HostSettings,
    /// Mapping and filtering of UDP.
    pub udp: UdpBehaviour,
}

impl Settings {
    /// The configuration these settings stand for, for the network called `name`.
    ///
    /// # Errors
    /// The first key that is wrong.
    pub fn resolve(&self, name: &str) -> Result<NetworkConfig, ConfigError> {
        let default = NetworkConfig::default();
        let subnet = self.subnet.unwrap_or(Subnet {
            network: default.network(),
            prefix: default.prefix,
        });
        let gateway = self.gateway.unwrap_or(subnet.host(1));
        let range = self
            .dhcp_range
            .unwrap_or_else(|| subnet.range_beside(gateway));
        let config = NetworkConfig {
            name: name.to_owned(),
            gateway,
            prefix: subnet.prefix,
            subnet6: self.subnet6.unwrap_or_default(),
            mtu: self.mtu.unwrap_or(default.mtu),
            dhcp_range: (range.first, range.last),
            hosts: self.hosts.clone(),
            lease_time: self.lease_time.unwrap_or(default.lease_time),
            domain: self.domain.clone(),
            dns: self.dns.clone(),
            ageing: self.ageing.unwrap_or(default.ageing),
            workers: self.workers.unwrap_or(default.workers),
            busy_poll: self.busy_poll.unwrap_or(default.busy_poll),
            flows_max: self.flows_max.unwrap_or(default.flows_max),
            tcp_memory: self.tcp_memory.unwrap_or(default.tcp_memory),
            host: self.host.access(),
            outbound: self.host.outbound()?,
            udp: self.udp,
            forwards: Vec::new(),
            ports: Vec::new(),
            policy: None,
            lease_file: None,
            helper: None,
        };
        if self.gateway.is_some() && !subnet.has_host(gateway) {
            return Err(ConfigError::new(
                "gateway",
                format!(
                    "{gateway} is no host address of {subnet} ({} to {})",
                    subnet.host(1),
                    subnet.last_host()
                ),
            ));
        }
        config.validate()?;
        Ok(config)
    }
}

impl NetworkConfig {
    /// First address of the LAN.
    pub fn network(&self) -> Ipv4Addr {
        self.subnet().network
    }

    /// The LAN.
    pub fn subnet(&self) -> Subnet {
        let prefix = self.prefix.min(32);
        Subnet {
            network: Ipv4Addr::from_bits(self.gateway.to_bits() & mask(prefix)),
            prefix,
        }
    }

    /// First address of the LAN's IPv6 prefix; `None`: the LAN is without, as it is by default where
    /// its MTU is below what IPv6 needs.
    pub fn prefix6(&self) -> Option<Ipv6Addr> {
        match self.mtu < ipv6::MTU_MIN {
            true => None,
            false => self.subnet6.prefix(&self.name),
        }
    }

    /// The gateway's address in that prefix: the first of a host.
    pub fn gateway6(&self) -> Option<Ipv6Addr> {
        let prefix = self.prefix6()?;
        Some(Ipv6Addr::from_bits(prefix.to_bits() | 1))
    }

    /// Checks every key, also for callers of the library who filled the fields themselves.
    ///
    /// # Errors
    /// The first key that is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_name(&self.name).map_err(|reason| ConfigError::new("name", reason))?;
        let subnet = self.subnet();
        subnet
            .check()
            .map_err(|reason| ConfigError::new("subnet", reason))?;
        if !subnet.has_host(self.gateway) {
            let reason = format!(
                "{} is the network or broadcast address of {subnet}",
                self.gateway
            );
            return Err(ConfigError::new("gateway", reason));
        }
        if !(MTU_MIN..=MTU_MAX).contains(&self.mtu) {
            return Err(ConfigError::new(
                "mtu",
                format!("{} is not between {MTU_MIN} and {MTU_MAX}", self.mtu),
            ));
        }
        self.subnet6
            .check()
            .map_err(|reason| ConfigError::new("subnet6", reason))?;
        if matches!(self.subnet6, Subnet6::Prefix(_)) && self.mtu < ipv6::MTU_MIN {
            let reason = format!(
                "IPv6 needs an MTU of {} bytes at least (RFC 8200), and --mtu says {}",
                ipv6::MTU_MIN,
                self.mtu
            );
            return Err(ConfigError::new("subnet6", reason));
        }
        self.validate_dhcp(subnet)?;
        host_entry::validate(self)?;
        host::validate(self)?;
        if self.dns.len() > DNS_SERVERS_MAX {
            return Err(ConfigError::new(
                "dns",
                format!("more than {DNS_SERVERS_MAX} servers"),
            ));
        }
        let gateway6 = self.gateway6().map(IpAddr::V6);
        for server in &self.dns {
            let own = *server == IpAddr::V4(self.gateway) || Some(*server) == gateway6;
            if own || server.is_unspecified() || server.is_multicast() {
                let reason = match own {
                    true => {
                        format!("{server} is the gateway itself, which would ask itself for ever")
                    }
                    false => format!("{server} is not the address of a server"),
                };
                return Err(ConfigError::new("dns", reason));
            }
        }
        let ageing_secs = self.ageing.as_secs();
        if !(1..=AGEING_SECS_MAX).contains(&ageing_secs) {
            let reason = format!("{ageing_secs} s is not between 1 and {AGEING_SECS_MAX} s");
            return Err(ConfigError::new("ageing", reason));
        }
        if self.busy_poll > BUSY_POLL_MAX {
            let reason = format!("{:?} is more than {BUSY_POLL_MAX:?}", self.busy_poll);
            return Err(ConfigError::new("busy-poll", reason));
        }
        if !(memory::TCP_MEMORY_MIN..=memory::TCP_MEMORY_MAX).contains(&self.tcp_memory) {
            let reason = format!("{} bytes is not between 16M and 64G", self.tcp_memory);
            return Err(ConfigError::new("tcp-memory", reason));
        }
        if !(FLOWS_MIN..=FLOWS_MAX).contains(&self.flows_max) {
            let reason = format!(
                "{} is not between {FLOWS_MIN} and {FLOWS_MAX}",
                self.flows_max
            );
            return Err(ConfigError::new("max-flows", reason));
        }
        Ok(())
    }

    fn validate_dhcp(&self, subnet: Subnet) -> Result<(), ConfigError> {
        let (first, last) = self.dhcp_range;
        let range = AddressRange { first, last };
        if first > last {
            return Err(ConfigError::new(
                "dhcp-range",
                format!("{range} ends before it begins"),
            ));
        }
        for address in [first, last] {
            if !subnet.has_host(address) {
                let reason = format!(
                    "{address} is no host address of {subnet} ({} to {})",
                    subnet.host(1),
                    subnet.last_host()
                );
                return Err(ConfigError::new("dhcp-range", reason));
            }
        }
        if (first..=last).contains(&self.gateway) {
            let reason = format!("{range} contains the gateway {}", self.gateway);
            return Err(ConfigError::new("dhcp-range", reason));
        }
        let lease_secs = self.lease_time.as_secs();
        if !(LEASE_SECS_MIN..=LEASE_SECS_MAX).contains(&lease_secs) {
            let reason =
                format!("{lease_secs} s is not between {LEASE_SECS_MIN} s and {LEASE_SECS_MAX} s");
            return Err(ConfigError::new("lease-time", reason));
        }
        if let Some(domain) = &self.domain {
            check_domain(domain).map_err(|reason| ConfigError::new("domain", reason))?;
        }
        Ok(())
    }
}

/// Checks a network's name, which becomes a file name: `[A-Za-z0-9_.-]`, 1 to 32 of them, no dot
/// first.
///
/// # Errors
/// What is wrong with it.
pub fn check_name(name: &str) -> Result<(), String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    if name.is_empty() || name.len() > NAME_LEN_MAX {
        return Err(format!(
            "{name:?} does not have 1 to {NAME_LEN_MAX} characters"
        ));
    }
    if !name.bytes().all(allowed) {
        return Err(format!(
            "{name:?} has characters other than A-Z a-z 0-9 _ . -"
        ));
    }
    if name.starts_with(['.', '-']) {
        return Err(format!("{name:?} begins with a dot or a dash"));
    }
    Ok(())
}

/// Checks a domain name: letters, digits, `-` and `_` in labels of 1 to 63.
fn check_domain(domain: &str) -> Result<(), String> {
    let bad_label = |label: &str| {
        label.is_empty()
            || label.len() > LABEL_LEN_MAX
            || label.starts_with('-')
            || label.ends_with('-')
            || !label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    if domain.len() > DOMAIN_LEN_MAX || domain.split('.').any(bad_label) {
        return Err(format!("{domain:?} is not a domain name like lab.example"));
    }
    Ok(())
}

/// An IPv4 subnet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Subnet {
    /// First address.
    pub network: Ipv4Addr,
    /// Prefix length.
    pub prefix: u8,
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

impl Subnet {
    /// The n-th address.
    pub fn host(self, n: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits().wrapping_add(n))
    }

    /// Directed broadcast address.
    pub fn broadcast(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits() | !mask(self.prefix))
    }

    /// Last address a host may have.
    pub fn last_host(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.broadcast().to_bits().wrapping_sub(1))
    }

    /// Whether a host may have this address.
    pub fn has_host(self, address: Ipv4Addr) -> bool {
        (self.host(1)..=self.last_host()).contains(&address)
    }

    /// The larger of the two ranges of hosts below and above the gateway.
    fn range_beside(self, gateway: Ipv4Addr) -> AddressRange {
        let at = gateway.to_bits();
        let (first, last) = (self.host(1).to_bits(), self.last_host().to_bits());
        let (first, last) = if at.saturating_sub(first) > last.saturating_sub(at) {
            (first, at - 1)
        } else {
            (at.wrapping_add(1), last)
        };
        AddressRange {
            first: Ipv4Addr::from_bits(first),
            last: Ipv4Addr::from_bits(last),
        }
    }

    fn check(self) -> Result<(), String> {
        if !(PREFIX_MIN..=PREFIX_MAX).contains(&self.prefix) {
            return Err(format!(
                "/{} is not between /{PREFIX_MIN} and /{PREFIX_MAX}",
                self.prefix
            ));
        }
        let first = self.network.octets()[0];
        if first == 0 || first == 127 || first >= 224 {
            return Err(format!(
                "{self} is loopback, multicast or reserved: choose a private one like 10.0.0.0/24"
            ));
        }
        Ok(())
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl FromStr for Subnet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (network, prefix) = text
            .split_once('/')
            .and_then(|(network, prefix)| {
                Some((
                    network.parse::<Ipv4Addr>().ok()?,
                    prefix.parse::<u8>().ok()?,
                ))
            })
            .filter(|&(_, prefix)| prefix <= 32)
            .ok_or("not a subnet like 192.168.122.0/24")?;
        let subnet = Subnet { network, prefix };
        subnet.check()?;
        let base = Ipv4Addr::from_bits(network.to_bits() & mask(prefix));
        if base != network {
            return Err(format!(
                "has host bits set: write {base}/{prefix}, and the gateway's address as --gateway"
            ));
        }
        Ok(subnet)
    }
}

/// A range of addresses, both ends included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AddressRange {
    /// First address.
    pub first: Ipv4Addr,
    /// Last address.
    pub last: Ipv4Addr,
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl FromStr for AddressRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.split_once('-')
            .and_then(|(first, last)| {
                Some(AddressRange {
                    first: first.parse().ok()?,
                    last: last.parse().ok()?,
                })
            })
            .ok_or_else(|| "not a range like 192.168.122.100-192.168.122.200".to_owned())
    }
}

/// Reads a span of time: `90`, `90s`, `15m`, `12h`, `7d`.
///
/// # Errors
/// What it should look like.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|unit: char| unit.is_ascii_alphabetic());
    let unit_secs = match &text[digits.len()..] {
        "" | "s" => Some(1),
        "m" => Some(60),
        "h" => Some(3600),
        "d" => Some(86_400),
        _ => None,
    };
    let count = digits
        .bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| digits.parse::<u64>().ok());
    unit_secs
        .zip(count.flatten())
        .and_then(|(unit_secs, count)| count.checked_mul(unit_secs))
        .map(Duration::from_secs)
        .ok_or_else(|| "not a time like 90s, 15m, 12h or 7d".to_owned())
}

/// A span of time the way [`parse_duration`] reads it, in the largest unit that is exact.
pub fn format_duration(time: Duration) -> String {
    let secs = time.as_secs();
    match secs {
        0 => "0s".to_owned(),
        _ if secs.is_multiple_of(86_400) => format!("{}d", secs / 86_400),
        _ if secs.is_multiple_of(3600) => format!("{}h", secs / 3600),
        _ if secs.is_multiple_of(60) => format!("{}m", secs / 60),
        _ => format!("{secs}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn refused(settings: Settings) -> &'static str {
        settings.resolve("n").unwrap_err().key
    }

    #[test]
    fn defaults_are_valid_and_what_nothing_said_resolves_to() {
        let default = NetworkConfig::default();
        default.validate().unwrap();
        let resolved = Settings::default().resolve("default").unwrap();
        assert_eq!(format!("{resolved:?}"), format!("{default:?}"));
    }

    #[test]
    fn gateway_and_range_follow_from_the_subnet() {
        let subnet: Subnet = "10.1.0.0/16".parse().unwrap();
        let config = Settings {
            subnet: Some(subnet),
            ..Settings::default()
        }
        .resolve("n")
        .unwrap();
        assert_eq!(config.gateway, Ipv4Addr::new(10, 1, 0, 1));
        assert_eq!(
            config.dhcp_range,
            (Ipv4Addr::new(10, 1, 0, 2), Ipv4Addr::new(10, 1, 255, 254))
        );

        let gateway = Some(Ipv4Addr::new(10, 1, 255, 254));
        let config = Settings {
            subnet: Some(subnet),
            gateway,
            ..Settings::default()
        }
        .resolve("n")
        .unwrap();
        assert_eq!(
            config.dhcp_range,
            (Ipv4Addr::new(10, 1, 0, 1), Ipv4Addr::new(10, 1, 255, 253))
        );
    }

    #[test]
    fn each_key_is_refused_by_its_name() {
        let ok = Settings::default;
        let range = |text: &str| Some(text.parse().unwrap());
        assert_eq!(
            refused(Settings {
                gateway: Some([10, 0, 0, 1].into()),
                ..ok()
            }),
            "gateway"
        );
        assert_eq!(
            refused(Settings {
                gateway: Some([192, 168, 122, 255].into()),
                ..ok()
            }),
            "gateway"
        );
        for bad in [MTU_MIN - 1, MTU_MAX + 1, u16::MAX] {
            let mtu = Some(bad);
            assert_eq!(refused(Settings { mtu, ..ok() }), "mtu", "{bad}");
        }
        for mtu in [MTU_MIN, MTU_MAX].map(Some) {
            Settings { mtu, ..ok() }.resolve("n").unwrap();
        }
        for bad in [
            "192.168.122.9-192.168.122.3",
            "192.168.122.1-192.168.122.9",
            "192.168.122.9-192.168.122.255",
            "10.0.0.1-10.0.0.9",
        ] {
            assert_eq!(
                refused(Settings {
                    dhcp_range: range(bad),
                    ..ok()
                }),
                "dhcp-range",
                "{bad}"
            );
        }
        assert_eq!(
            refused(Settings {
                lease_time: Some(Duration::from_secs(9)),
                ..ok()
            }),
            "lease-time"
        );
        assert_eq!(
            refused(Settings {
                domain: Some("a..b".into()),
                ..ok()
            }),
            "domain"
        );
        assert_eq!(
            refused(Settings {
                dns: vec![[192, 168, 122, 1].into()],
                ..ok()
            }),
            "dns"
        );
        let subnet6 = Some("fd12:3456:789a:1::/64".parse().unwrap());
        assert_eq!(
            refused(Settings {
                subnet6,
                dns: vec!["fd12:3456:789a:1::1".parse().unwrap()],
                ..ok()
            }),
            "dns"
        );
        assert_eq!(
            refused(Settings {
                subnet6,
                mtu: Some(1279),
                ..ok()
            }),
            "subnet6"
        );
        assert_eq!(
            refused(Settings {
                subnet6: Some(Subnet6::Prefix("fe80::".parse().unwrap())),
                ..ok()
            }),
            "subnet6"
        );
        assert_eq!(
            refused(Settings {
                dns: vec![[0, 0, 0, 0].into()],
                ..ok()
            }),
            "dns"
        );
        assert_eq!(
            refused(Settings {
                dns: vec![[9, 9, 9, 9].into(); 4],
                ..ok()
            }),
            "dns"
        );
        assert_eq!(
            refused(Settings {
                ageing: Some(Duration::ZERO),
                ..ok()
            }),
            "ageing"
        );
        assert_eq!(
            refused(Settings {
                flows_max: Some(1),
                ..ok()
            }),
            "max-flows"
        );
        assert_eq!(ok().resolve("../x").unwrap_err().key, "name");
    }

    #[test]
    fn ipv6_is_there_unless_the_mtu_or_the_user_forbids_it() {
        let with = |subnet6: Option<&str>, mtu| {
            let settings = Settings {
                subnet6: subnet6.map(|text| text.parse().unwrap()),
                mtu: Some(mtu),
                ..Settings::default()
            };
            settings.resolve("n").unwrap()
        };
        assert_eq!(
            with(None, 1280).prefix6(),
            with(Some("auto"), 1500).prefix6()
        );
        assert!(with(None, 1280).prefix6().is_some());
        for (subnet6, mtu) in [(None, 1279), (Some("auto"), 576), (Some("off"), 1500)] {
            assert_eq!(with(subnet6, mtu).gateway6(), None);
        }
        let gateway = with(Some("fd12:3456:789a:1::/64"), 1280).gateway6();
        assert_eq!(gateway.unwrap().to_string(), "fd12:3456:789a:1::1");
    }

    #[test]
    fn bad_subnets() {
        for bad in [
            "",
            "10.0.0.0",
            "10.0.0.0/30",
            "10.0.0.0/7",
            "10.0.0.1/24",
            "127.0.0.0/8",
            "224.0.0.0/24",
            "10.0.0.0/33",
        ] {
            assert!(bad.parse::<Subnet>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names() {
        for good in ["a", "default", "A-b_c.9", &"x".repeat(32)] {
            check_name(good).unwrap();
        }
        for bad in ["", ".", "..", "a/b", "a b", "-x", "ä", &"x".repeat(33)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_round_trip() {
        for (text, secs) in [
            ("90", 90),
            ("90s", 90),
            ("15m", 900),
            ("12h", 43_200),
            ("7d", 604_800),
        ] {
            assert_eq!(parse_duration(text).unwrap().as_secs(), secs);
        }
        assert_eq!(format_duration(Duration::from_secs(5400)), "90m");
        for bad in [
            "",
            "s",
            "-1",
            "1.5h",
            "1w",
            "99999999999999999999",
            "18446744073709551615d",
            "+1",
        ] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        /// Whatever resolves, its addresses belong together.
        #[test]
        fn what_resolves_is_coherent(bits: u32, prefix in 0u8..=32, gateway: u32, near in any::<bool>()) {
            let network = Ipv4Addr::from_bits(bits & mask(prefix));
            let gateway = if near { bits } else { gateway };
            let settings = Settings {
                subnet: Some(Subnet { network, prefix }),
                gateway: Some(Ipv4Addr::from_bits(gateway)),
                ..Settings::default()
            };
            if let Ok(config) = settings.resolve("n") {
                let subnet = config.subnet();
                prop_assert_eq!(subnet.network, network);
                let (first, last) = config.dhcp_range;
                prop_assert!(subnet.has_host(first) && subnet.has_host(last) && first <= last);
                prop_assert!(!(first..=last).contains(&config.gateway));
            }
        }

        #[test]
        fn parsers_never_panic(text in "\\PC{0,24}") {
            let _ = text.parse::<Subnet>();
            let _ = text.parse::<AddressRange>();
            let _ = parse_duration(&text);
            let _ = check_name(&text);
            let _ = check_domain(&text);
        }
    }
}
