//! The networks that the host has addresses of or routes to, asked of the kernel (rtnetlink(7)): the routes
//! of all tables, and the addresses of interfaces that are down as well.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::sys::netlink::{Message, RouteSocket, attributes, u32_at};
use crate::wire::ipv6::address_at;

/// linux/rtnetlink.h, linux/if_addr.h.
const RTM_GETADDR: u16 = 22;
const RTM_GETROUTE: u16 = 26;
const RTN_UNICAST: u8 = 1;
const RTA_DST: u16 = 1;
const RTA_TABLE: u16 = 15;
const IFA_ADDRESS: u16 = 1;
const RT_TABLE_MAIN: u32 = 254;
const RTPROT_KERNEL: u8 = 2;
/// ifaddrmsg; rtmsg.
const IFADDRMSG_LEN: usize = 8;
const RTMSG_LEN: usize = 12;
/// Networks that are looked at: of a host with the Internet's routes the rest are not worth the time.
const NETWORKS_MAX: usize = 16_384;
/// Routes wider than this are as good as default ones: those of a VPN that takes everything are halves.
const PREFIX4_MIN: u8 = 8;
const PREFIX6_MIN: u8 = 4;

/// A network of the host's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct HostNetwork {
    /// Its first address.
    pub network: IpAddr,
    /// Its prefix length.
    pub prefix: u8,
    /// It is a route of the main table that somebody set: not one that follows from an address.
    pub is_routed: bool,
}

/// All of them, loopback, link-local and default routes excepted. Empty where the kernel does not say.
pub fn of_host() -> Vec<HostNetwork> {
    let ask = || -> io::Result<Vec<HostNetwork>> {
        let mut socket = RouteSocket::open(0)?;
        let mut networks = Vec::new();
        for (kind, header_len) in [(RTM_GETADDR, IFADDRMSG_LEN), (RTM_GETROUTE, RTMSG_LEN)] {
            let mut request = Message::new(kind, libc::NLM_F_DUMP);
            // Of both families.
            request.put(&vec![0; header_len]);
            let read = if kind == RTM_GETADDR {
                of_address
            } else {
                of_route
            };
            socket.dump(request, &mut |body| {
                networks.extend(read(body));
                networks.len() < NETWORKS_MAX
            })?;
        }
        networks.sort_unstable();
        networks.dedup();
        Ok(networks)
    };
    ask().unwrap_or_else(|error| {
        log::warn!("cannot ask for the host's networks: {error}");
        Vec::new()
    })
}

/// The prefixes of IPv6 that the host has routes to, the widest first, and none inside another.
pub fn routed6() -> Vec<(Ipv6Addr, u8)> {
    let of_host = of_host().into_iter().filter(|network| network.is_routed);
    let mut prefixes: Vec<_> = of_host
        .filter_map(|network| match network.network {
            IpAddr::V6(prefix) => Some((network.prefix, prefix)),
            IpAddr::V4(_) => None,
        })
        .collect();
    prefixes.sort_unstable();
    let mut widest: Vec<(Ipv6Addr, u8)> = Vec::new();
    for (len, prefix) in prefixes {
        let holds = |&(other, other_len): &(Ipv6Addr, u8)| {
            (other.to_bits() ^ prefix.to_bits()).leading_zeros() >= u32::from(other_len)
        };
        if !widest.iter().any(holds) {
            widest.push((prefix, len));
        }
    }
    widest
}

/// Whether one of `networks` has addresses of this one.
pub fn overlaps(networks: &[HostNetwork], network: IpAddr, prefix: u8) -> bool {
    networks.iter().any(|other| {
        let common = u32::from(other.prefix.min(prefix));
        let differs = (bits(other.network) ^ bits(network)).leading_zeros() < common;
        other.network.is_ipv4() == network.is_ipv4() && !differs
    })
}

/// An address's bits, at the upper end.
fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()) << 96,
        IpAddr::V6(address) => address.to_bits(),
    }
}

fn of_address(body: &[u8]) -> Option<HostNetwork> {
    let prefix = *body.get(1)?;
    let address = attribute(body.get(IFADDRMSG_LEN..)?, IFA_ADDRESS)?;
    host_network(address, prefix, false)
}

fn of_route(body: &[u8]) -> Option<HostNetwork> {
    let &[_, prefix, _, _, table, protocol, _, kind, ..] = body else {
        return None;
    };
    let attributes_of = body.get(RTMSG_LEN..)?;
    let table = attributes(attributes_of)
        .find(|(kind, _)| *kind == RTA_TABLE)
        .and_then(|(_, value)| u32_at(value, 0))
        .unwrap_or(table.into());
    let network = attribute(attributes_of, RTA_DST)?;
    let is_routed = table == RT_TABLE_MAIN && protocol != RTPROT_KERNEL;
    let network = host_network(network, prefix, is_routed);
    network.filter(|_| kind == RTN_UNICAST)
}

fn attribute(body: &[u8], wanted: u16) -> Option<IpAddr> {
    let (_, value) = attributes(body).find(|(kind, _)| *kind == wanted)?;
    match value {
        &[a, b, c, d] => Some(Ipv4Addr::new(a, b, c, d).into()),
        value if value.len() == 16 => Some(address_at(value, 0).into()),
        _ => None,
    }
}

fn host_network(address: IpAddr, prefix: u8, is_routed: bool) -> Option<HostNetwork> {
    let (least, is_own) = match address {
        IpAddr::V4(address) => (
            PREFIX4_MIN,
            address.is_loopback() || address.is_link_local(),
        ),
        IpAddr::V6(address) => (
            PREFIX6_MIN,
            address.is_loopback() || address.is_unicast_link_local() || address.is_multicast(),
        ),
    };
    let network = match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            IpAddr::V4(Ipv4Addr::from_bits(address.to_bits() & mask))
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & mask))
        }
    };
    (prefix >= least && !is_own).then_some(HostNetwork {
        network,
        prefix,
        is_routed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_is_read() {
        let mut route = vec![2, 24, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0];
        route.extend_from_slice(&[8, 0, 1, 0, 192, 168, 122, 0]);
        let virbr0 = HostNetwork {
            network: [192, 168, 122, 0].into(),
            prefix: 24,
            is_routed: true,
        };
        assert_eq!(of_route(&route), Some(virbr0));
        for (at, value) in [(7, 2), (1, 7)] {
            let mut other = route.clone();
            other[at] = value;
            assert_eq!(
                of_route(&other),
                None,
                "local, or as good as a default route"
            );
        }
        assert_eq!(of_route(&route[..12]), None, "a default route");
        let mut address = vec![2, 24, 0, 0, 1, 0, 0, 0];
        address.extend_from_slice(&[8, 0, 1, 0, 192, 168, 122, 1]);
        let of_address = of_address(&address).unwrap();
        assert_eq!(of_address.network, virbr0.network);
        for len in 0..address.len() {
            super::of_address(&address[..len]);
            super::of_route(&route[..len]);
        }
        let all = [virbr0];
        let overlap = |text: &str, prefix| overlaps(&all, text.parse().unwrap(), prefix);
        assert!(overlap("192.168.122.128", 25) && overlap("192.168.0.0", 16));
        assert!(!overlap("192.168.123.0", 24) && !overlap("fd00::", 64));
        assert!(of_host().len() < NETWORKS_MAX);
    }
}
