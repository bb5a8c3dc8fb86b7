//! Addresses kept for guests by their MACs: `MAC=ADDR[,NAME]`.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use super::{ConfigError, NetworkConfig};
use crate::dhcp::lease::RESERVATIONS_MAX;
use crate::frame::{Mac, guest_mac};
use crate::names::GuestName;

/// A guest's fixed address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostEntry {
    /// Its MAC.
    pub mac: Mac,
    /// Its address.
    pub address: Ipv4Addr,
    /// What forwards call it.
    pub name: Option<GuestName>,
}

impl fmt::Display for HostEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.mac, self.address)?;
        match &self.name {
            Some(name) => write!(f, ",{name}"),
            None => Ok(()),
        }
    }
}

impl FromStr for HostEntry {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = "is not MAC=ADDR[,NAME], like 52:54:00:12:34:56=192.168.122.7,web";
        let (mac, rest) = text.split_once('=').ok_or(form)?;
        let (address, name) = match rest.split_once(',') {
            Some((address, name)) => (address, Some(name)),
            None => (rest, None),
        };
        let name = name.map(str::parse::<GuestName>).transpose();
        Ok(Self {
            mac: guest_mac(mac)?,
            address: address
                .parse()
                .map_err(|_| format!("{address:?} is no IPv4 address"))?,
            name: name.map_err(|error| error.to_string())?,
        })
    }
}

/// Checks the entries against each other and the LAN.
pub(super) fn validate(config: &NetworkConfig) -> Result<(), ConfigError> {
    let error = |reason| Err(ConfigError::new("host", reason));
    if config.hosts.len() > RESERVATIONS_MAX {
        return error(format!("more than {RESERVATIONS_MAX} addresses"));
    }
    let subnet = config.subnet();
    for (at, host) in config.hosts.iter().enumerate() {
        if !subnet.has_host(host.address) || host.address == config.gateway {
            return error(format!(
                "{} is no guest's address in {subnet}, whose gateway is {}",
                host.address, config.gateway
            ));
        }
        let clash = config.hosts[..at].iter().find(|other| {
            let is_called = host.name.is_some() && host.name == other.name;
            other.mac == host.mac || other.address == host.address || is_called
        });
        if let Some(other) = clash {
            return error(format!(
                "{host} and {other} have a MAC, address or name in common"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    #[test]
    fn entries_in_words() {
        for text in [
            "52:54:00:00:00:07=192.168.122.7",
            "52:54:00:00:00:07=192.168.122.7,web",
        ] {
            assert_eq!(text.parse::<HostEntry>().unwrap().to_string(), text);
        }
        for bad in [
            "",
            "52:54:00:00:00:07",
            "52:54:00:00:00:07=",
            "52:54:00:00:00:07=fd00::1",
            "53:54:00:00:00:07=192.168.122.7",
            "52:54:00:00:00:07=192.168.122.7,",
            "52:54:00:00:00:07=192.168.122.7,a b",
            "=192.168.122.7",
        ] {
            assert!(bad.parse::<HostEntry>().is_err(), "{bad}");
        }
    }

    #[test]
    fn entries_that_contradict_each_other_or_the_lan_are_refused() {
        let with = |hosts: &[&str]| {
            let settings = Settings {
                hosts: hosts.iter().map(|text| text.parse().unwrap()).collect(),
                ..Settings::default()
            };
            settings.resolve("n").map(drop).map_err(|error| error.key)
        };
        let one = "52:54:00:00:00:01=192.168.122.7,web";
        assert_eq!(with(&[one, "52:54:00:00:00:02=192.168.122.8,db"]), Ok(()));
        for bad in [
            "52:54:00:00:00:01=192.168.122.8",
            "52:54:00:00:00:02=192.168.122.7",
            "52:54:00:00:00:02=192.168.122.8,web",
            "52:54:00:00:00:02=192.168.122.1",
            "52:54:00:00:00:02=192.168.122.255",
            "52:54:00:00:00:02=10.0.0.1",
        ] {
            assert_eq!(with(&[one, bad]), Err("host"), "{bad}");
        }
    }
}
