//! Keys about the host: what of it guests reach, and where their traffic leaves from.

use std::ffi::CString;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;

use super::{ConfigError, NetworkConfig};
use crate::nat::egress::{HostAccess, Protocol, is_never_outside};
use crate::uplink::outbound::Outbound;
use crate::wire::Family;

/// Longest name of an interface, bytes (linux/if.h: IFNAMSIZ is 16 with the final zero).
const INTERFACE_LEN_MAX: usize = 15;
/// Lists of open ports at most: each is searched once per flow.
const PORT_RANGES_MAX: usize = 64;

/// Ports of the host that guests may reach, like `80`, `5000-5010/udp` (TCP where nothing is said).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostPorts {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// First to last.
    pub ports: RangeInclusive<u16>,
}

impl FromStr for HostPorts {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (ports, protocol) = match text.split_once('/') {
            None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), Protocol::Tcp),
            Some((ports, "udp")) => (ports, Protocol::Udp),
            Some((_, other)) => return Err(format!("{other:?} is neither tcp nor udp")),
        };
        let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
        let port = |text: &str| match text.parse::<u16>() {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(format!("{text:?} is no port from 1 to 65535")),
        };
        let (first, last) = (port(first)?, port(last)?);
        if first > last {
            return Err(format!("{first}-{last} ends before it begins"));
        }
        let ports = first..=last;
        Ok(Self { protocol, ports })
    }
}

/// What a user said about the host.
#[derive(Clone, PartialEq, Default, Debug)]
pub struct HostSettings {
    /// Guests reach the host's own addresses.
    pub own_addresses: bool,
    /// Addresses that stand for the host's loopback.
    pub loopback: Vec<IpAddr>,
    /// Ports of the host that the two above open; none: all.
    pub ports: Vec<HostPorts>,
    /// Source addresses of guests' traffic.
    pub sources: Vec<IpAddr>,
    /// Interface of guests' traffic.
    pub interface: Option<String>,
}

impl HostSettings {
    /// What of the host guests reach.
    pub(super) fn access(&self) -> HostAccess {
        let ports = self.ports.iter();
        HostAccess {
            own_addresses: self.own_addresses,
            loopback: self.loopback.clone(),
            ports: ports
                .map(|ports| (ports.protocol, ports.ports.clone()))
                .collect(),
        }
    }

    /// Where guests' traffic leaves from.
    ///
    /// # Errors
    /// A key that is wrong.
    pub(super) fn outbound(&self) -> Result<Outbound, ConfigError> {
        let mut outbound = Outbound::default();
        for &source in &self.sources {
            let before = match source {
                IpAddr::V4(source) => outbound.source4.replace(source).is_some(),
                IpAddr::V6(source) => outbound.source6.replace(source).is_some(),
            };
            if before {
                let reason = format!("{source} is the second address of its family");
                return Err(ConfigError::new("outbound-address", reason));
            }
        }
        if let Some(name) = &self.interface {
            let usable = !name.is_empty() && name.len() <= INTERFACE_LEN_MAX;
            let name = CString::new(name.as_str()).ok().filter(|_| usable);
            let reason = format!("an interface's name has 1 to {INTERFACE_LEN_MAX} characters");
            let name = name.ok_or_else(|| ConfigError::new("outbound-interface", reason))?;
            outbound.interface = Some(name);
        }
        Ok(outbound)
    }
}

/// Bits of the host's part of an address in a /64.
const HOST_BITS6: u32 = 64;

/// Checks the keys about the host against each other and the LAN.
pub(super) fn validate(config: &NetworkConfig) -> Result<(), ConfigError> {
    let access = &config.host;
    let subnet = config.subnet();
    for (at, &address) in access.loopback.iter().enumerate() {
        let error = |reason| Err(ConfigError::new("map-host-loopback", reason));
        let family = Family::of(address);
        if access.loopback[..at]
            .iter()
            .any(|&other| Family::of(other) == family)
        {
            return error(format!("{address} is the second address of its family"));
        }
        let (gateway, in_lan) = match address {
            IpAddr::V4(address) => (
                address == config.gateway,
                (subnet.network..=subnet.broadcast()).contains(&address),
            ),
            IpAddr::V6(address) => (
                Some(address) == config.gateway6(),
                config.prefix6().is_some_and(|prefix| {
                    address.to_bits() >> HOST_BITS6 == prefix.to_bits() >> HOST_BITS6
                }),
            ),
        };
        if in_lan && !gateway {
            return error(format!(
                "{address} is of the LAN, where a guest may have it: take the gateway's or one of \
                 another network"
            ));
        }
        if is_never_outside(address) {
            return error(format!(
                "{address} can't be routed: take an unused private one like 10.0.2.2 or fd00::2"
            ));
        }
    }
    if access.ports.len() > PORT_RANGES_MAX {
        let reason = format!("more than {PORT_RANGES_MAX} ranges");
        return Err(ConfigError::new("host-port", reason));
    }
    if !access.ports.is_empty() && !access.own_addresses && access.loopback.is_empty() {
        let reason = "opens nothing without --host-access or --map-host-loopback";
        return Err(ConfigError::new("host-port", reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    fn resolve(host: HostSettings) -> Result<NetworkConfig, ConfigError> {
        let settings = Settings {
            host,
            ..Settings::default()
        };
        settings.resolve("test")
    }

    fn loopback(addresses: &[&str]) -> HostSettings {
        HostSettings {
            loopback: addresses.iter().map(|text| text.parse().unwrap()).collect(),
            ..HostSettings::default()
        }
    }

    #[test]
    fn an_address_of_the_lan_stands_for_nothing_but_the_gateway() {
        let with = |address| {
            let settings = Settings {
                subnet6: Some("fd12:3456:789a:1::/64".parse().unwrap()),
                host: loopback(&[address]),
                ..Settings::default()
            };
            settings.resolve("test").map(|_| ())
        };
        assert!(with("fd12:3456:789a:1::1").is_ok());
        assert!(with("fd12:3456:789a:2::5").is_ok());
        let refused = with("fd12:3456:789a:1::5").unwrap_err().to_string();
        assert!(refused.contains("map-host-loopback"), "{refused}");
    }

    #[test]
    fn ports_are_read() {
        let read = |text: &str| text.parse::<HostPorts>();
        let ports = read("80").unwrap();
        assert_eq!((ports.protocol, ports.ports), (Protocol::Tcp, 80..=80));
        let ports = read("5000-5010/udp").unwrap();
        assert_eq!((ports.protocol, ports.ports), (Protocol::Udp, 5000..=5010));
        assert_eq!(read("1-2/tcp").unwrap().ports, 1..=2);
        for bad in ["", "0", "65536", "2-1", "80/sctp", "80/", "-", "a", "1-"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_that_can_not_stand_for_loopback_are_refused() {
        for good in ["10.0.2.2", "192.168.122.1", "fd00::2"] {
            assert!(resolve(loopback(&[good])).is_ok(), "{good}");
        }
        for bad in [
            "192.168.122.9",
            "127.0.0.1",
            "169.254.1.1",
            "fe80::1",
            "::1",
        ] {
            let error = resolve(loopback(&[bad])).unwrap_err();
            assert_eq!(error.key, "map-host-loopback", "{bad}");
        }
        assert!(resolve(loopback(&["10.0.2.2", "fd00::2"])).is_ok());
        assert!(resolve(loopback(&["10.0.2.2", "10.0.2.3"])).is_err());
    }

    #[test]
    fn ports_without_access_and_two_sources_are_refused() {
        let ports = HostSettings {
            ports: vec!["80".parse().unwrap()],
            ..HostSettings::default()
        };
        assert_eq!(resolve(ports.clone()).unwrap_err().key, "host-port");
        let open = HostSettings {
            own_addresses: true,
            ..ports
        };
        assert_eq!(resolve(open).unwrap().host.ports.len(), 1);
        let sources = HostSettings {
            sources: vec!["10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap()],
            ..HostSettings::default()
        };
        assert_eq!(resolve(sources).unwrap_err().key, "outbound-address");
        let interface = |name: &str| HostSettings {
            interface: Some(name.to_owned()),
            ..HostSettings::default()
        };
        assert!(resolve(interface("eth0")).is_ok());
        for bad in ["", "a-name-of-16-byt", "a\0b"] {
            let error = resolve(interface(bad)).unwrap_err();
            assert_eq!(error.key, "outbound-interface", "{bad:?}");
        }
    }
}
