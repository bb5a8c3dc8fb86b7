//! Flags that several commands share.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::Failure;
use crate::config::{self, AddressRange, NAME_DEFAULT, NetworkConfig, Settings, Subnet};
use crate::control::api::guest_mac;
use crate::frame::Mac;

/// Which network.
#[derive(Args, Debug)]
pub(super) struct NameOption {
    /// Name of the network: 1 to 32 of A-Z a-z 0-9 _ . - [default: default]
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    name: Option<String>,
}

fn parse_name(text: &str) -> Result<String, String> {
    config::check_name(text).map(|()| text.to_owned())
}

impl NameOption {
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
    /// The LAN, /8 to /29 [default: 192.168.122.0/24]
    #[arg(long, value_name = "CIDR")]
    subnet: Option<Subnet>,

    /// The gateway's address, which is the DNS server too [default: the subnet's first]
    #[arg(long, value_name = "ADDR")]
    gateway: Option<Ipv4Addr>,

    /// MTU announced to guests, 576 to 65521 bytes [default: 1500]
    #[arg(long, value_name = "BYTES")]
    mtu: Option<u16>,

    /// Addresses that DHCP hands out [default: the larger side of the gateway]
    #[arg(long, value_name = "FIRST-LAST")]
    dhcp_range: Option<AddressRange>,

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

    /// Let guests connect to the host's own addresses (never its loopback)
    #[arg(long)]
    host_access: bool,

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
        let settings = Settings {
            subnet: self.subnet,
            gateway: self.gateway,
            mtu: self.mtu,
            dhcp_range: self.dhcp_range,
            lease_time: self.lease_time,
            domain: self.domain.clone(),
            dns: self.dns.clone(),
            ageing: self.ageing,
            flows_max: self.max_flows,
            host_access: self.host_access,
        };
        let mut config = settings.resolve(name)?;
        config.lease_file = match &self.lease_file {
            None => lease_file,
            Some(path) if path.as_os_str() == "none" => None,
            Some(path) => Some(path.clone()),
        };
        Ok(config)
    }

    /// The first option given, as it is written: none of them can change a network that runs.
    pub(super) fn first_given(&self) -> Option<&'static str> {
        [
            ("--subnet", self.subnet.is_some()),
            ("--gateway", self.gateway.is_some()),
            ("--mtu", self.mtu.is_some()),
            ("--dhcp-range", self.dhcp_range.is_some()),
            ("--lease-time", self.lease_time.is_some()),
            ("--dns", !self.dns.is_empty()),
            ("--domain", self.domain.is_some()),
            ("--ageing", self.ageing.is_some()),
            ("--max-flows", self.max_flows.is_some()),
            ("--host-access", self.host_access),
            ("--lease-file", self.lease_file.is_some()),
        ]
        .into_iter()
        .find_map(|(option, given)| given.then_some(option))
    }
}

/// The guest's side of a port.
#[derive(Args, Debug)]
pub(super) struct PortFlags {
    /// MAC address of the guest [default: a random one, 52:54:00:…]
    #[arg(long, value_name = "MAC", value_parser = guest_mac)]
    pub(super) mac: Option<Mac>,

    /// A plain tap: no virtio-net header, no offloads (slow; for VMMs that know no better)
    #[arg(long)]
    pub(super) no_offload: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{MTU_MAX, MTU_MIN};
    use crate::nat::{icmp, udp};
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
