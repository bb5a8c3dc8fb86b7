//! Where the host's sockets leave from: a source address, an interface, or as the host routes.

use std::ffi::CString;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};

use super::route::RouteTable;
use crate::nat::egress::is_never_outside;
use crate::sys::socket;
use crate::wire::Family;

/// Source and interface of what the guests send outside. TCP connections to the
/// host's loopback, where it is mapped, are not concerned; UDP to it is, as a mapping has one socket: with
/// an interface chosen it does not arrive.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Outbound {
    /// IPv4 source address; `None`: as the host routes.
    pub source4: Option<Ipv4Addr>,
    /// IPv6 source address.
    pub source6: Option<Ipv6Addr>,
    /// Interface to leave by, whatever the routing table's best route (SO_BINDTODEVICE, socket(7); any
    /// user may since Linux 5.7).
    pub interface: Option<CString>,
}

impl Outbound {
    /// The address and port to bind a socket of this family to.
    pub fn local(&self, family: Family, port: u16) -> SocketAddr {
        let address: IpAddr = match family {
            Family::V4 => self.source4.unwrap_or(Ipv4Addr::UNSPECIFIED).into(),
            Family::V6 => self.source6.unwrap_or(Ipv6Addr::UNSPECIFIED).into(),
        };
        SocketAddr::new(address, port)
    }

    /// Ties a socket to the interface, if one is chosen.
    ///
    /// # Errors
    /// ENODEV: there is no such interface. EPERM: a kernel before 5.7, for anyone but root.
    pub fn tie(&self, fd: &OwnedFd) -> io::Result<()> {
        match &self.interface {
            Some(name) => socket::bind_to_device(fd.as_fd(), name),
            None => Ok(()),
        }
    }

    /// Tries interface and addresses out, so that a mistake is found at start.
    ///
    /// # Errors
    /// What is wrong: the key as the command line spells it, and the reason.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        use rustix::net::{AddressFamily, SocketType, bind, socket};
        let open = |family| {
            let domain = match family {
                Family::V4 => AddressFamily::INET,
                Family::V6 => AddressFamily::INET6,
            };
            socket(domain, SocketType::DGRAM, None)
        };
        if let Some(name) = &self.interface {
            let name_shown = name.to_string_lossy();
            let reason = |error: io::Error| {
                let remedy = match error.raw_os_error() {
                    Some(libc::ENODEV) => " (see `ip link`)",
                    Some(libc::EPERM) => " (a kernel before 5.7 lets root alone choose)",
                    _ => "",
                };
                let key = "outbound-interface";
                (key, format!("{name_shown}: {error}{remedy}"))
            };
            if name.as_bytes() == b"lo" {
                let text = "lo leads nowhere but to the host: see --map-host-loopback";
                return Err(("outbound-interface", text.to_owned()));
            }
            let fd = open(Family::V4).map_err(|error| reason(error.into()))?;
            self.tie(&fd).map_err(reason)?;
        }
        let sources: [Option<IpAddr>; 2] =
            [self.source4.map(Into::into), self.source6.map(Into::into)];
        for source in sources.into_iter().flatten() {
            if is_never_outside(source) {
                let reason = format!("{source} is no address that packets can leave the host from");
                return Err(("outbound-address", reason));
            }
            // A socket may be bound to a broadcast address, and sends from another one then.
            let is_own = RouteTable::open().is_ok_and(|mut routes| routes.is_local(source));
            let bound =
                open(Family::of(source)).and_then(|fd| bind(&fd, &SocketAddr::new(source, 0)));
            let bound = match is_own {
                true => bound,
                false => Err(rustix::io::Errno::ADDRNOTAVAIL),
            };
            if let Err(error) = bound {
                let reason = match error {
                    rustix::io::Errno::ADDRNOTAVAIL => {
                        format!("{source} is not an address of this host (see `ip address`)")
                    }
                    error => format!("{source}: {error}"),
                };
                return Err(("outbound-address", reason));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistakes_are_found_and_named() {
        assert_eq!(Outbound::default().check(), Ok(()));
        let from = |source: &str| match source.parse().unwrap() {
            IpAddr::V4(source) => Outbound {
                source4: Some(source),
                ..Outbound::default()
            },
            IpAddr::V6(source) => Outbound {
                source6: Some(source),
                ..Outbound::default()
            },
        };
        let four = from("198.51.100.7");
        assert_eq!(four.local(Family::V4, 7), "198.51.100.7:7".parse().unwrap());
        assert_eq!(four.local(Family::V6, 7), "[::]:7".parse().unwrap());
        for wrong in [
            "203.0.113.77",
            "127.0.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "255.255.255.255",
            "::1",
            "::",
            "::ffff:198.51.100.1",
            "fe80::1",
            "2001:db8::77",
        ] {
            let (key, reason) = from(wrong).check().unwrap_err();
            assert_eq!(key, "outbound-address");
            assert!(reason.contains(wrong), "{reason}");
        }
        for (wrong, remedy) in [(c"lanlet-none0", "ip link"), (c"lo", "--map-host-loopback")] {
            let outbound = Outbound {
                interface: Some(wrong.to_owned()),
                ..Outbound::default()
            };
            let (key, reason) = outbound.check().unwrap_err();
            assert_eq!(key, "outbound-interface");
            assert!(reason.contains(wrong.to_str().unwrap()), "{reason}");
            assert!(reason.contains(remedy), "{reason}");
        }
    }
}
