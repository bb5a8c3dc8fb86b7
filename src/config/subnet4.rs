//! The LAN's IPv4 subnet where nobody chose one: the one it had, libvirt's usual one, or one that follows from
//! the network's name; the first that the host does not use.

use std::net::Ipv4Addr;

use super::Subnet;

/// What people expect of a virtual network, from libvirt.
pub const SUBNET_DEFAULT: Subnet = Subnet {
    network: Ipv4Addr::new(192, 168, 122, 0),
    prefix: 24,
};
/// Subnets besides it: 192.168.160.0/24 to 192.168.254.0/24, where home routers and container engines
/// seldom are.
const FIRST: u8 = 160;
const COUNT: u8 = 95;

/// The subnet of the network called `name`. `last` is the one that it had, which counts if it was not chosen.
pub fn automatic(name: &str, last: Option<Subnet>, is_free: impl Fn(Subnet) -> bool) -> Subnet {
    let last = last.filter(|&last| others(name).any(|other| other == last));
    let candidates = last.into_iter().chain([SUBNET_DEFAULT]).chain(others(name));
    let mut free = candidates.filter(|&subnet| is_free(subnet));
    // Where all are in use the network warns of it.
    free.next().unwrap_or(SUBNET_DEFAULT)
}

/// All others, from one that follows from the name on: another start of the network, or another machine,
/// finds the same one. FNV-1a, because std's hashers may change between releases.
fn others(name: &str) -> impl Iterator<Item = Subnet> {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    // FNV's low bits hardly depend on the first bytes.
    let begin = ((hash ^ hash >> 32) % u64::from(COUNT)) as u8;
    (0..COUNT).map(move |step| Subnet {
        network: Ipv4Addr::new(192, 168, FIRST + (begin + step) % COUNT, 0),
        prefix: 24,
    })
}

const _: () = assert!(FIRST as u16 + COUNT as u16 == 255 && COUNT as u16 * 2 <= u8::MAX as u16);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_uses_is_passed_over_and_the_rest_stays() {
        assert_eq!(automatic("default", None, |_| true), SUBNET_DEFAULT);
        assert_eq!(automatic("lab", None, |_| true), SUBNET_DEFAULT);
        let beside = |name| automatic(name, None, |subnet| subnet != SUBNET_DEFAULT);
        // What running guests have: it may not change from release to release.
        assert_eq!(beside("default").to_string(), "192.168.188.0/24");
        assert_eq!(beside("default"), beside("default"));
        assert_ne!(beside("default"), beside("lab"));
        // The one it had, as long as that is free.
        let had = beside("default");
        assert_eq!(automatic("default", Some(had), |_| true), had);
        assert_eq!(
            automatic("default", Some(had), |subnet| subnet != had),
            SUBNET_DEFAULT
        );
        assert_eq!(automatic("default", None, |_| false), SUBNET_DEFAULT);
        let chosen = "10.9.0.0/24".parse().ok();
        assert_eq!(automatic("default", chosen, |_| true), SUBNET_DEFAULT);
        let all: std::collections::HashSet<_> = others("x").map(|subnet| subnet.network).collect();
        assert_eq!(all.len(), usize::from(COUNT));
    }
}
