//! Socket addresses of both IP versions as the kernel writes them.

#![allow(unsafe_code)]

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

/// A `sockaddr_in` or `sockaddr_in6`, told apart by the family, which both begin with.
#[repr(C)]
#[derive(Clone, Copy)]
pub union Name {
    family: libc::sa_family_t,
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl Name {
    /// AF_UNSPEC: room for the kernel to write to.
    pub const EMPTY: Name = Name {
        // SAFETY: all zeros is a valid sockaddr_in6. It is the largest variant, so all of the union's
        // bytes are initialised, and stay so.
        v6: unsafe { std::mem::zeroed() },
    };

    /// The address as the kernel reads it.
    pub fn new(address: SocketAddr) -> Self {
        let mut name = Self::EMPTY;
        match address {
            SocketAddr::V4(address) => {
                name.v4 = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: address.port().to_be(),
                    sin_addr: libc::in_addr {
                        s_addr: address.ip().to_bits().to_be(),
                    },
                    sin_zero: [0; 8],
                };
            }
            SocketAddr::V6(address) => {
                name.v6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: address.port().to_be(),
                    sin6_flowinfo: address.flowinfo(),
                    sin6_addr: libc::in6_addr {
                        s6_addr: address.ip().octets(),
                    },
                    sin6_scope_id: address.scope_id(),
                };
            }
        }
        name
    }

    /// Bytes that count.
    pub fn socklen(&self) -> libc::socklen_t {
        let len = match self.get() {
            Some(SocketAddr::V4(_)) => size_of::<libc::sockaddr_in>(),
            Some(SocketAddr::V6(_)) | None => size_of::<libc::sockaddr_in6>(),
        };
        len as libc::socklen_t
    }

    /// The address, if the kernel wrote one.
    pub fn get(&self) -> Option<SocketAddr> {
        // SAFETY: all bytes of the union are initialised (see `EMPTY`; the kernel writes whole bytes),
        // every bit pattern is a valid value of these plain integers, and the family says which of the
        // two was written.
        let (family, v4, v6) = unsafe { (self.family, self.v4, self.v6) };
        match i32::from(family) {
            libc::AF_INET => {
                let ip = Ipv4Addr::from_bits(u32::from_be(v4.sin_addr.s_addr));
                Some(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into())
            }
            libc::AF_INET6 => {
                let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
                let port = u16::from_be(v6.sin6_port);
                // The flow label of a peer is of no use to anyone behind a NAT.
                Some(SocketAddrV6::new(ip, port, 0, v6.sin6_scope_id).into())
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        for text in ["192.0.2.1:53", "[2001:db8::1]:443", "[fe80::1%7]:1"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(Name::new(address).get(), Some(address));
        }
        assert_eq!(Name::EMPTY.get(), None);
    }
}
