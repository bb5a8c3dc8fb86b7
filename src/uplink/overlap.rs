//! Networks of the host that a LAN would hide from its guests: what they send there stays on the LAN.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// linux/route.h.
const RTF_GATEWAY: u32 = 0x0002;
const RTF_REJECT: u32 = 0x0200;

/// The interface behind which the host has a part of this network, or more than it, by the routes of its
/// main table (proc(5), /proc/net/route). `None` as well where they can't be read.
pub fn interface_of(network: IpAddr, prefix: u8) -> Option<String> {
    let read = |path| std::fs::read_to_string(path).ok();
    let routes = match network {
        IpAddr::V4(_) => read("/proc/net/route")?
            .lines()
            .filter_map(route4)
            .collect(),
        IpAddr::V6(_) => read("/proc/net/ipv6_route")?
            .lines()
            .filter_map(route6)
            .collect::<Vec<_>>(),
    };
    find(&routes, network, prefix)
}

/// A network that the host reaches without a gateway.
#[derive(Debug)]
struct OnLink {
    network: IpAddr,
    prefix: u8,
    interface: String,
}

/// `Iface Destination Gateway Flags RefCnt Use Metric Mask ...`, addresses in the host's byte order.
fn route4(line: &str) -> Option<OnLink> {
    let words: Vec<_> = line.split_whitespace().collect();
    let hex = |at: usize| u32::from_str_radix(words.get(at)?, 16).ok();
    let address = |at| Some(Ipv4Addr::from(hex(at)?.to_ne_bytes()));
    (hex(3)? & (RTF_GATEWAY | RTF_REJECT) == 0).then_some(OnLink {
        network: address(1)?.into(),
        prefix: address(7)?.to_bits().count_ones() as u8,
        interface: words.first()?.to_string(),
    })
}

/// `destination length source length next-hop metric refs use flags interface`.
fn route6(line: &str) -> Option<OnLink> {
    let words: Vec<_> = line.split_whitespace().collect();
    let network = Ipv6Addr::from_bits(u128::from_str_radix(words.first()?, 16).ok()?);
    let flags = u32::from_str_radix(words.get(8)?, 16).ok()?;
    (flags & (RTF_GATEWAY | RTF_REJECT) == 0).then_some(OnLink {
        network: network.into(),
        prefix: u8::from_str_radix(words.get(1)?, 16).ok()?,
        interface: words.get(9)?.to_string(),
    })
}

fn find(routes: &[OnLink], network: IpAddr, prefix: u8) -> Option<String> {
    let bits = |address: IpAddr| match address {
        IpAddr::V4(address) => u128::from(address.to_bits()) << 96,
        IpAddr::V6(address) => address.to_bits(),
    };
    let overlaps = |route: &&OnLink| {
        let common = route.prefix.min(prefix);
        // A default route on a point-to-point link covers everything and hides nothing.
        route.prefix > 0
            && route.interface != "lo"
            && (bits(route.network) ^ bits(network)).leading_zeros() >= u32::from(common)
    };
    Some(routes.iter().find(overlaps)?.interface.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_of_the_host_are_found() {
        let table = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\n\
             eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
             eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
             ppp0\t00000000\t00000000\t0001\t0\t0\t9\t00000000\t0\t0\t0\n\
             virbr0\t007AA8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        // The table is of a little-endian machine.
        if cfg!(target_endian = "little") {
            let routes: Vec<_> = table.lines().filter_map(route4).collect();
            let behind = |network: &str, prefix| find(&routes, network.parse().unwrap(), prefix);
            assert_eq!(behind("192.168.122.0", 24).unwrap(), "virbr0");
            assert_eq!(behind("192.168.0.0", 16).unwrap(), "virbr0");
            assert_eq!(behind("192.0.2.128", 25).unwrap(), "eth0");
            assert_eq!(behind("10.0.0.0", 8), None);
        }
        let table = "20010db8000100000000000000000000 40 00000000000000000000000000000000 00 \
             00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0\n\
             00000000000000000000000000000000 00 00000000000000000000000000000000 00 \
             fd000000000000000000000000000001 00000400 00000003 00000000 00000003     eth0\n\
             00000000000000000000000000000000 00 00000000000000000000000000000000 00 \
             00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo\n";
        let routes: Vec<_> = table.lines().filter_map(route6).collect();
        let behind = |network: &str| find(&routes, network.parse().unwrap(), 64);
        assert_eq!(behind("2001:db8:1::").unwrap(), "eth0");
        assert_eq!(behind("fd12::"), None);
    }
}
