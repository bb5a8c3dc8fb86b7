//! Flags that several commands share.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use super::{Failure, complete, policy};
use crate::config::PREFIX6_LEN;
use crate::config::subnet4::{self, SUBNET_DEFAULT};
use crate::config::{
    self, AddressRange, BUSY_POLL_MAX, HostEntry, HostPorts, HostSettings, NAME_DEFAULT,
    NetworkConfig, Settings, Subnet, Subnet6, Workers,
};
use crate::control::RuntimeDir;
use crate::control::api::guest_mac;
use crate::control::lease_file::LeaseFile;
use crate::frame::Mac;
use crate::names::{GroupName, GuestName};
use crate::nat::mapping::Dependence;
use crate::nat::udp::UdpBehaviour;
use crate::network::{PortOptions, VhostUserSocket};
use crate::port::vhost_user::device::QUEUE_PAIRS_MAX;
use crate::tap::QUEUES_MAX;
use crate::uplink::networks;
use crate::wire::ipv6;

/// Which network.
#[derive(Args, Debug)]
pub(super) struct NameOption {
    /// Name of the network, as 'lanlet list' shows it [default: 'default', else the only one that runs]
    #[arg(long, value_name = "NAME", value_parser = parse_name, add = complete::networks())]
    name: Option<String>,
}

/// The name of a network that is started.
#[derive(Args, Debug)]
pub(super) struct NewNameOption {
    /// Name of the network: 1 to 32 of A-Z a-z 0-9 _ . - [default: default]
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    name: Option<String>,
}

impl NewNameOption {
    /// The name, given or not.
    pub(super) fn get(&self) -> &str {
        self.name.as_deref().unwrap_or(NAME_DEFAULT)
    }
}

/// Reads the name of a network.
///
/// # Errors
/// It can't be one.
pub(super) fn parse_name(text: &str) -> Result<String, String> {
    config::check_name(text).map(|()| text.to_owned())
}

impl NameOption {
    /// As if it was given, or not.
    pub(super) fn new(name: Option<String>) -> Self {
        Self { name }
    }

    /// The name, given or not.
    pub(super) fn get(&self) -> &str {
        self.name.as_deref().unwrap_or(NAME_DEFAULT)
    }

    /// Whether the user named the network.
    pub(super) fn is_given(&self) -> bool {
        self.name.is_some()
    }
}

/// What a network is like, for the commands that can start one.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Options of the network, where this command starts it")]
pub(super) struct NetworkOptions {
    /// The LAN, /8 to /29 [default: 192.168.122.0/24; where the host uses that itself, one that follows
    /// from the network's name]
    #[arg(long, value_name = "CIDR")]
    subnet: Option<Subnet>,

    /// The gateway's address, which is the DNS server too [default: the subnet's first]
    #[arg(long, value_name = "ADDR")]
    gateway: Option<Ipv4Addr>,

    /// The LAN's IPv6: a /64, 'auto' for a unique local one that stays the same, or 'off' [default:
    /// auto; off with an MTU below 1280]
    #[arg(long, value_name = "CIDR|auto|off")]
    subnet6: Option<Subnet6>,

    /// MTU announced to guests, 576 to 65521 bytes [default: 1500]
    #[arg(long, value_name = "BYTES")]
    mtu: Option<u16>,

    /// Addresses that DHCP hands out [default: the larger side of the gateway]
    #[arg(long, value_name = "FIRST-LAST")]
    dhcp_range: Option<AddressRange>,

    /// Keeps an address for the guest with this MAC, of the subnet, in the DHCP range or not; forwards
    /// know the guest by NAME; may be repeated
    #[arg(long, value_name = "MAC=ADDR[,NAME]")]
    host: Vec<HostEntry>,

    /// How long a lease lasts, like 90s, 15m, 12h, 7d [default: 1h]
    #[arg(long, value_name = "TIME", value_parser = config::parse_duration)]
    lease_time: Option<Duration>,

    /// DNS server to forward queries to, up to three times [default: the host's]
    #[arg(long, value_name = "ADDR")]
    dns: Vec<IpAddr>,

    /// Domain that guests search names in
    #[arg(long, value_name = "NAME")]
    domain: Option<String>,

    /// Seconds until an idle MAC address is forgotten [default: 300]
    #[arg(long, value_name = "SECS", value_parser = config::parse_duration)]
    ageing: Option<Duration>,

    /// TCP connections through the NAT at most; beside them it has room for 8192 of UDP and 1024 of
    /// ping [default: 16384]
    #[arg(long, value_name = "N")]
    max_flows: Option<usize>,

    /// Memory that the buffers of all TCP connections may take, like 64M or 1G: beyond, connections get
    /// slower [default: an eighth of the machine's or the control group's, 16M to 1G]
    #[arg(long, value_name = "SIZE", value_parser = config::memory::parse_memory)]
    tcp_memory: Option<usize>,

    /// Threads that carry the traffic, 1 to 64, or 'auto' for as many as there are CPUs; ports are
    /// spread over them [default: 1]
    #[arg(long, value_name = "N|auto")]
    workers: Option<Workers>,

    /// Microseconds that a worker looks for traffic before it sleeps, up to 1000, while traffic comes that
    /// fast: shorter round trips for more CPU time [default: 0]
    #[arg(long, value_name = "USECS", value_parser = clap::value_parser!(u16).range(..=BUSY_POLL_MAX.as_micros() as i64))]
    busy_poll: Option<u16>,

    /// Let guests connect to the host's own addresses (not its loopback)
    #[arg(long)]
    host_access: bool,

    /// An address by which guests reach the host's loopback (127.0.0.1, or ::1 by an IPv6 one): the
    /// gateway's, or one that is in use nowhere, like 10.0.2.2; up to one of each family
    #[arg(long, value_name = "ADDR")]
    map_host_loopback: Vec<IpAddr>,

    /// Ports of the host that the two options above open, like 80 or 5000-5010/udp; may be repeated
    /// [default: all]
    #[arg(long, value_name = "PORT[-PORT][/udp]", value_delimiter = ',')]
    host_port: Vec<HostPorts>,

    /// Source address of guests' traffic on the host; up to one of each family [default: as the host
    /// routes]
    #[arg(long, value_name = "ADDR")]
    outbound_address: Vec<IpAddr>,

    /// Interface that guests' traffic leaves by, whatever the host's routes [default: as the host
    /// routes]
    #[arg(long, value_name = "IFNAME")]
    outbound_interface: Option<String>,

    /// Egress policy: which guest may reach what outside. 'lanlet policy --help' has its form
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,

    /// Which destinations a guest's UDP port is mapped to the same outside port for (RFC 4787 4.1):
    /// endpoint-independent (all), address-dependent or address-and-port-dependent [default:
    /// endpoint-independent]
    #[arg(long, value_name = "KIND")]
    udp_mapping: Option<Dependence>,

    /// Who outside may send to a guest's mapped UDP port (RFC 4787 5): endpoint-independent (anybody),
    /// address-dependent (addresses that the guest wrote to) or address-and-port-dependent (addresses
    /// and ports) [default: address-dependent]
    #[arg(long, value_name = "KIND")]
    udp_filtering: Option<Dependence>,

    /// Where leases are kept across restarts, or 'none' [default: for 'up'
    /// ~/.local/state/lanlet/NAME.leases, else none]
    #[arg(long, value_name = "PATH|none")]
    lease_file: Option<PathBuf>,
}

impl NetworkOptions {
    /// The configuration of the network called `name`. `lease_file` is where leases are kept if no
    /// option says so.
    ///
    /// # Errors
    /// An option is wrong, by itself or beside another.
    pub(super) fn resolve(
        &self,
        name: &str,
        lease_file: Option<PathBuf>,
    ) -> Result<NetworkConfig, Failure> {
        let lease_file = match &self.lease_file {
            None => lease_file,
            Some(path) if path.as_os_str() == "none" => None,
            // The process may leave this directory.
            Some(path) => Some(std::path::absolute(path)?),
        };
        let udp = UdpBehaviour::default();
        let (subnet, subnet6) = self.subnets(name, lease_file.as_deref());
        let settings = Settings {
            subnet,
            gateway: self.gateway,
            subnet6: Some(subnet6),
            mtu: self.mtu,
            dhcp_range: self.dhcp_range,
            hosts: self.host.clone(),
            lease_time: self.lease_time,
            domain: self.domain.clone(),
            dns: self.dns.clone(),
            ageing: self.ageing,
            workers: self.workers,
            busy_poll: self
                .busy_poll
                .map(|micros| Duration::from_micros(micros.into())),
            flows_max: self.max_flows,
            tcp_memory: self.tcp_memory,
            udp: UdpBehaviour {
                mapping: self.udp_mapping.unwrap_or(udp.mapping),
                filtering: self.udp_filtering.unwrap_or(udp.filtering),
            },
            host: HostSettings {
                own_addresses: self.host_access,
                loopback: self.map_host_loopback.clone(),
                ports: self.host_port.clone(),
                sources: self.outbound_address.clone(),
                interface: self.outbound_interface.clone(),
            },
        };
        let mut config = settings.resolve(name)?;
        if let Some(path) = &self.policy {
            config.policy = Some(policy::read(path)?.0);
        }
        config.lease_file = lease_file;
        Ok(config)
    }

    /// The LAN's subnets; where the options say nothing of them, ones that the host does not use.
    fn subnets(&self, name: &str, lease_file: Option<&Path>) -> (Option<Subnet>, Subnet6) {
        let subnet6 = self.subnet6.unwrap_or_default();
        // Who says an address of the LAN means the usual one.
        let is_implied =
            self.gateway.is_some() || self.dhcp_range.is_some() || !self.host.is_empty();
        if (self.subnet.is_some() || is_implied) && subnet6 != Subnet6::Auto {
            return (self.subnet, subnet6);
        }
        let of_host = networks::of_host();
        let is_free =
            |subnet: Subnet| !networks::overlaps(&of_host, subnet.network.into(), subnet.prefix);
        let is_free6 = |prefix: Ipv6Addr| !networks::overlaps(&of_host, prefix.into(), PREFIX6_LEN);
        let subnet6 = match self.mtu.is_some_and(|mtu| mtu < ipv6::MTU_MIN) {
            true => subnet6,
            false => subnet6.avoiding(name, is_free6),
        };
        if self.subnet.is_some() || is_implied {
            return (self.subnet, subnet6);
        }
        let last = lease_file.and_then(|path| LeaseFile::new(path.to_owned()).subnet());
        let subnet = subnet4::automatic(name, last, is_free);
        if subnet != SUBNET_DEFAULT && last != Some(subnet) {
            log::info!("the host uses {SUBNET_DEFAULT} itself: the LAN is {subnet}");
        }
        (Some(subnet), subnet6)
    }

    /// The first option given, as it is written: none of them can change a network that runs.
    pub(super) fn first_given(&self) -> Option<&'static str> {
        [
            ("--subnet", self.subnet.is_some()),
            ("--gateway", self.gateway.is_some()),
            ("--subnet6", self.subnet6.is_some()),
            ("--mtu", self.mtu.is_some()),
            ("--dhcp-range", self.dhcp_range.is_some()),
            ("--host", !self.host.is_empty()),
            ("--lease-time", self.lease_time.is_some()),
            ("--dns", !self.dns.is_empty()),
            ("--domain", self.domain.is_some()),
            ("--ageing", self.ageing.is_some()),
            ("--workers", self.workers.is_some()),
            ("--busy-poll", self.busy_poll.is_some()),
            ("--max-flows", self.max_flows.is_some()),
            ("--tcp-memory", self.tcp_memory.is_some()),
            ("--host-access", self.host_access),
            ("--udp-mapping", self.udp_mapping.is_some()),
            ("--udp-filtering", self.udp_filtering.is_some()),
            ("--map-host-loopback", !self.map_host_loopback.is_empty()),
            ("--host-port", !self.host_port.is_empty()),
            ("--outbound-address", !self.outbound_address.is_empty()),
            ("--outbound-interface", self.outbound_interface.is_some()),
            ("--policy", self.policy.is_some()),
            ("--lease-file", self.lease_file.is_some()),
        ]
        .into_iter()
        .find_map(|(option, given)| given.then_some(option))
    }
}

/// The guest's side of a port.
#[derive(Args, Debug)]
pub(super) struct PortFlags {
    /// MAC address of the guest [default: a random one, 52:54:00:…; of 'qemu' one that follows from
    /// --guest-name or else from the first disk]
    #[arg(long, value_name = "MAC", value_parser = guest_mac)]
    pub(super) mac: Option<Mac>,

    /// IPv4 address of the guest, kept for it while it runs; of the subnet, in the DHCP range or not
    /// [default: one of the DHCP range]
    #[arg(long, value_name = "ADDR")]
    ip: Option<Ipv4Addr>,

    /// What the guest is called, in 'status', for forwards and in rules of a policy (port=NAME): up to 63 of
    /// A-Z a-z 0-9 _ . - in any case; no two guests of a network have one name [default: made from the port]
    #[arg(long, value_name = "NAME")]
    guest_name: Option<GuestName>,
    /// Group of the guest, which rules of a policy say as group=NAME
    #[arg(long, value_name = "NAME")]
    pub(super) group: Option<GroupName>,

    /// Queues of the guest's network card, 1 to 16, with --vhost-user to 8: with --workers the flows of a
    /// tap are spread over as many threads [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUES_MAX)))]
    pub(super) queues: Option<u16>,

    /// A plain tap: no virtio-net header, no offloads (slow; for VMMs that know no better)
    #[arg(long)]
    pub(super) no_offload: bool,
}

/// How a VMM is attached.
#[derive(Args, Debug)]
pub(super) struct VmmFlags {
    /// Attach by vhost-user: the VMM shares its guest's memory through a unix socket, which is made at
    /// PATH [default: one beside the control socket]
    #[arg(
        long,
        value_name = "PATH",
        num_args = 0..=1,
        require_equals = true,
        conflicts_with = "no_offload"
    )]
    vhost_user: Option<Option<PathBuf>>,
}

impl VmmFlags {
    /// Whether the VMM is to attach by vhost-user.
    pub(super) fn by_vhost_user(&self) -> bool {
        self.vhost_user.is_some()
    }

    /// The socket for vhost-user, where that is wanted.
    ///
    /// # Errors
    /// It can't be made, or the guest wants more queues than such a port has.
    pub(super) fn vhost_user(&self, queues: u16) -> Result<Option<VhostUserSocket>, Failure> {
        if self.vhost_user.is_some() && usize::from(queues) > QUEUE_PAIRS_MAX {
            return Err(Failure::because(format!(
                "a vhost-user port has {QUEUE_PAIRS_MAX} queues at most: give --queues {QUEUE_PAIRS_MAX} or \
                 less, or leave --vhost-user out"
            )));
        }
        let path = match &self.vhost_user {
            None => return Ok(None),
            Some(None) => RuntimeDir::from_env().own_socket("vhost-user")?,
            Some(Some(path)) => std::path::absolute(path)?,
        };
        Ok(Some(VhostUserSocket::listen(&path)?))
    }
}

impl PortFlags {
    /// Queues of the guest's card.
    pub(super) fn queues(&self) -> u16 {
        self.queues.unwrap_or(1)
    }

    /// What the guest is called, where that was said.
    pub(super) fn name(&self) -> Option<&GuestName> {
        self.guest_name.as_ref()
    }

    /// How a port is attached.
    pub(super) fn port(&self, mac: Option<Mac>) -> PortOptions {
        PortOptions {
            name: self.guest_name.clone(),
            group: self.group.clone(),
            mac,
            usual_mac: None,
            ip: self.ip,
            no_offload: self.no_offload,
            queues: self.queues(),
            ..PortOptions::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{MTU_MAX, MTU_MIN, PREFIX6_LEN, WORKERS_MAX};
    use crate::nat::{icmp, udp};
    use crate::wire::ipv6;
    use clap::CommandFactory;

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        network: NetworkOptions,
    }

    #[test]
    fn the_help_names_the_limits_and_defaults_there_are() {
        let command = Command::command();
        let default = NetworkConfig::default();
        for (option, numbers) in [
            (
                "mtu",
                vec![MTU_MIN.into(), MTU_MAX.into(), default.mtu.into()],
            ),
            ("subnet6", vec![PREFIX6_LEN.into(), ipv6::MTU_MIN.into()]),
            ("workers", vec![1, WORKERS_MAX]),
            ("busy_poll", vec![BUSY_POLL_MAX.as_micros() as usize]),
            (
                "max_flows",
                vec![udp::LIMITS.total, icmp::LIMITS.total, default.flows_max],
            ),
        ] {
            let argument = command
                .get_arguments()
                .find(|argument| argument.get_id() == option)
                .unwrap();
            let help = argument.get_help().unwrap().to_string();
            let words: Vec<&str> = help.split(|c: char| !c.is_ascii_digit()).collect();
            for number in numbers {
                let number = number.to_string();
                assert!(
                    words.contains(&&*number),
                    "{option}: {number} is not in {help:?}"
                );
            }
        }
    }
}
