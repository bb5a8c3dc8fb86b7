//! Addresses as rules judge them: networks, the ranges behind the words `private` and `metadata`,
//! what counts as the Internet, and the IPv4 addresses that IPv6 addresses carry inside.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A network, all host bits zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Cidr {
    /// IPv4.
    V4 {
        /// First address.
        network: u32,
        /// Prefix length, 0 to 32.
        prefix: u8,
    },
    /// IPv6.
    V6 {
        /// First address.
        network: u128,
        /// Prefix length, 0 to 128.
        prefix: u8,
    },
}

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Cidr {
    let network = Ipv4Addr::new(a, b, c, d).to_bits();
    Cidr::V4 { network, prefix }
}

/// From the first four groups: no well-known range needs more, two single addresses aside.
const fn v6(groups: [u16; 4], prefix: u8) -> Cidr {
    let [a, b, c, d] = groups;
    let network = Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).to_bits();
    Cidr::V6 { network, prefix }
}

const fn host6(groups: [u16; 4], last: u16) -> Cidr {
    let [a, b, c, d] = groups;
    let network = Ipv6Addr::new(a, b, c, d, 0, 0, 0, last).to_bits();
    Cidr::V6 {
        network,
        prefix: 128,
    }
}

/// What networks use inside, the word `private`. Documentation ranges are not among it: nothing
/// inside a network has them.
pub const PRIVATE: &[Cidr] = &[
    v4(10, 0, 0, 0, 8),               // RFC 1918
    v4(172, 16, 0, 0, 12),            // RFC 1918
    v4(192, 168, 0, 0, 16),           // RFC 1918
    v4(100, 64, 0, 0, 10),            // RFC 6598, behind carriers' NAT; overlays use it too
    v4(192, 0, 0, 0, 24),             // RFC 6890, IETF protocol assignments
    v4(198, 18, 0, 0, 15),            // RFC 2544, benchmarks; used as one more private range
    v6([0xfc00, 0, 0, 0], 7),         // RFC 4193
    v6([0xfec0, 0, 0, 0], 10),        // RFC 3879, site-local of old
    v6([0x0064, 0xff9b, 0x1, 0], 48), // RFC 8215, NAT64 inside a network
    v6([0x2001, 0x0002, 0x0, 0], 48), // RFC 5180, benchmarks
];

/// Where clouds answer questions about the machine, credentials among them, and all else that is
/// link-local: the word `metadata`.
pub const METADATA: &[Cidr] = &[
    v4(169, 254, 0, 0, 16),         // RFC 3927; 169.254.169.254 nearly everywhere
    v6([0xfe80, 0, 0, 0], 10),      // RFC 4291 2.5.6
    v6([0xfd00, 0x0ec2, 0, 0], 32), // AWS: ::254 metadata, ::253 DNS, ::123 time
    host6([0xfd20, 0x00ce, 0, 0], 0x254), // Google Cloud
    host6([0xfd00, 0x0042, 0, 0], 0x42), // Scaleway
    v4(100, 100, 100, 200, 32),     // Alibaba Cloud
    v4(168, 63, 129, 16, 32),       // Azure's wire server, an address of the Internet
];

/// Whether `address` is one of [`METADATA`].
pub fn is_metadata(address: IpAddr) -> bool {
    any_contains(METADATA, address)
}

/// Not of the Internet for other reasons (RFC 6890): no address of a peer, or the host itself.
const SPECIAL4: &[Cidr] = &[
    v4(0, 0, 0, 0, 8),
    v4(127, 0, 0, 0, 8),
    v4(224, 0, 0, 0, 4),
    v4(240, 0, 0, 0, 4),
];

/// IPv6 of the Internet: what IANA has opened for global unicast.
const GLOBAL6: Cidr = v6([0x2000, 0, 0, 0], 3);
/// NAT64's well-known prefix (RFC 6052 2.1).
const NAT64: Cidr = v6([0x0064, 0xff9b, 0, 0], 96);

impl Cidr {
    /// The network of `address`; `None` if it has host bits set, or no such prefix exists.
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let whole = Self::around(address, prefix)?;
        (whole.first() == address).then_some(whole)
    }

    /// The network of this prefix length that `address` is in.
    pub fn around(address: IpAddr, prefix: u8) -> Option<Self> {
        match address {
            IpAddr::V4(address) if prefix <= 32 => Some(Self::V4 {
                network: address.to_bits() & mask4(prefix),
                prefix,
            }),
            IpAddr::V6(address) if prefix <= 128 => Some(Self::V6 {
                network: address.to_bits() & mask6(prefix),
                prefix,
            }),
            _ => None,
        }
    }

    /// First address.
    pub fn first(self) -> IpAddr {
        match self {
            Self::V4 { network, .. } => Ipv4Addr::from_bits(network).into(),
            Self::V6 { network, .. } => Ipv6Addr::from_bits(network).into(),
        }
    }

    /// Whether `address` is in it. Families never mix.
    pub fn contains(self, address: IpAddr) -> bool {
        match (self, address) {
            (Self::V4 { network, prefix }, IpAddr::V4(address)) => {
                address.to_bits() & mask4(prefix) == network
            }
            (Self::V6 { network, prefix }, IpAddr::V6(address)) => {
                address.to_bits() & mask6(prefix) == network
            }
            _ => false,
        }
    }

    /// Prefix length.
    pub fn prefix(self) -> u8 {
        match self {
            Self::V4 { prefix, .. } | Self::V6 { prefix, .. } => prefix,
        }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first(), self.prefix())
    }
}

fn mask4(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

fn mask6(prefix: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0)
}

fn any_contains(networks: &[Cidr], address: IpAddr) -> bool {
    networks.iter().any(|network| network.contains(address))
}

/// IPv4 addresses that one IPv6 address may stand for, at most: four places of RFC 8215's prefix, one
/// of ISATAP.
const EMBEDDED_MAX: usize = 5;

/// An IPv4 address inside an IPv6 one.
#[derive(Clone, Copy, Debug)]
struct Embedded {
    address: Ipv4Addr,
    /// A network at least this long names addresses of this embedding on purpose.
    explicit_from: u8,
}

/// An address with all that it may stand for.
#[derive(Clone, Copy, Debug)]
pub struct Judged {
    address: IpAddr,
    embedded: [Option<Embedded>; EMBEDDED_MAX],
}

impl Judged {
    /// An IPv4-mapped address is its IPv4 address: the kernel sends IPv4 to it (ip(7), ipv6(7)).
    pub fn new(address: IpAddr) -> Self {
        let address = address.to_canonical();
        let embedded = match address {
            IpAddr::V4(_) => [None; EMBEDDED_MAX],
            IpAddr::V6(address) => embedded_in(address),
        };
        Self { address, embedded }
    }

    /// The address itself.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    fn embedded(&self) -> impl Iterator<Item = Embedded> + '_ {
        self.embedded.iter().flatten().copied()
    }

    /// Whether a rule that denies `network` is about this address: it, or one inside it, is of it.
    pub fn is_touched_by(&self, network: Cidr) -> bool {
        let inside = |embedded: Embedded| network.contains(embedded.address.into());
        network.contains(self.address) || self.embedded().any(inside)
    }

    /// Whether a rule that allows `networks` is about this address. A wide IPv6 network does not
    /// allow an inside IPv4 address in disguise: that has to be allowed itself, or the disguise named.
    pub fn is_covered_by(&self, networks: &[Cidr]) -> bool {
        let holds = |network: &Cidr| {
            network.contains(self.address)
                && self.embedded().all(|embedded| {
                    network.prefix() >= embedded.explicit_from
                        || is_internet4(embedded.address)
                        || any_contains(networks, embedded.address.into())
                })
        };
        networks.iter().any(holds)
    }

    /// Whether it is an address of the Internet, and nothing inside it is not.
    pub fn is_internet(&self) -> bool {
        let itself = match self.address {
            IpAddr::V4(address) => is_internet4(address),
            IpAddr::V6(_) => {
                (GLOBAL6.contains(self.address) || NAT64.contains(self.address))
                    && !any_contains(PRIVATE, self.address)
                    && !any_contains(METADATA, self.address)
            }
        };
        itself && self.embedded().all(|inner| is_internet4(inner.address))
    }
}

fn is_internet4(address: Ipv4Addr) -> bool {
    let lists = [PRIVATE, METADATA, SPECIAL4];
    !lists.iter().any(|list| any_contains(list, address.into()))
}

/// All IPv4 addresses that a gateway or tunnel on the way could take this one for. A network's own
/// NAT64 prefix (RFC 6052 2.2) can't be told from other addresses: deny it by its CIDR.
fn embedded_in(address: Ipv6Addr) -> [Option<Embedded>; EMBEDDED_MAX] {
    let bytes = address.octets();
    let mut found = [None; EMBEDDED_MAX];
    let mut count = 0;
    let mut add = |places: [usize; 4], flip: u8, explicit_from: u8| {
        found[count] = Some(Embedded {
            address: places.map(|place| bytes[place] ^ flip).into(),
            explicit_from,
        });
        count += 1;
    };
    const LAST: [usize; 4] = [12, 13, 14, 15];
    match address.segments() {
        // Compatible (RFC 4291 2.5.5.1), translated (RFC 2765 2.1) and NAT64 addresses. The
        // unspecified address and loopback come out as 0.0.0.0 and 0.0.0.1, special as well.
        [0, 0, 0, 0, 0, 0, ..] | [0, 0, 0, 0, 0xffff, 0, ..] | [0x64, 0xff9b, 0, 0, 0, 0, ..] => {
            add(LAST, 0, 96);
        }
        // RFC 8215: which of RFC 6052's prefix lengths is in use, only that network knows.
        [0x64, 0xff9b, 1, ..] => {
            add([6, 7, 9, 10], 0, 48);
            add([7, 9, 10, 11], 0, 48);
            add([9, 10, 11, 12], 0, 48);
            add(LAST, 0, 48);
        }
        // 6to4 (RFC 3056 2).
        [0x2002, ..] => add([2, 3, 4, 5], 0, 16),
        // Teredo: the server, and the client's address inverted (RFC 4380 4).
        [0x2001, 0, ..] => {
            add([4, 5, 6, 7], 0, 32);
            add(LAST, 0xff, 32);
        }
        _ => {}
    }
    // ISATAP (RFC 5214 6.1), below any prefix.
    if let [.., 0x0000 | 0x0200, 0x5efe, _, _] = address.segments() {
        add(LAST, 0, 96);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(text: &str) -> Judged {
        Judged::new(text.parse().unwrap())
    }

    fn cidr(text: &str) -> Cidr {
        let (address, prefix) = text.split_once('/').unwrap();
        Cidr::new(address.parse().unwrap(), prefix.parse().unwrap()).unwrap()
    }

    #[test]
    fn lists_have_no_host_bits() {
        for network in [PRIVATE, METADATA, SPECIAL4, &[GLOBAL6, NAT64]].concat() {
            assert_eq!(
                Cidr::new(network.first(), network.prefix()),
                Some(network),
                "{network}"
            );
        }
    }

    #[test]
    fn what_is_of_the_internet() {
        for yes in [
            "8.8.8.8",
            "198.51.100.2",
            "172.32.0.1",
            "100.128.0.1",
            "2606:4700::1111",
            "64:ff9b::8.8.8.8",
            "2002:808:808::1",
            "::ffff:8.8.8.8",
            "2001:db8::5efe:808:808",
        ] {
            assert!(judged(yes).is_internet(), "{yes}");
        }
        for no in [
            "0.0.0.0",
            "0.1.2.3",
            "10.1.2.3",
            "127.0.0.1",
            "169.254.169.254",
            "168.63.129.16",
            "172.31.255.255",
            "192.168.0.1",
            "100.64.0.1",
            "198.19.255.255",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::8.8.8.8",
            "::ffff:10.0.0.1",
            "::ffff:0:8.8.8.8",
            "64:ff9b::10.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::808:808",
            "2002:a00:1::1",
            "2002:7f00:1::",
            "2001:0:a00:1::",
            // Teredo with client 10.0.0.1 behind server 8.8.8.8.
            "2001:0:808:808::f5ff:fffe",
            "2001:db8::5efe:a00:1",
            "2001:db8::200:5efe:c0a8:1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "4000::1",
        ] {
            assert!(!judged(no).is_internet(), "{no}");
        }
    }

    #[test]
    fn denied_networks_reach_into_ipv6() {
        let ten = cidr("10.0.0.0/8");
        for disguise in [
            "::ffff:10.9.8.7",
            "::10.9.8.7",
            "::ffff:0:10.9.8.7",
            "64:ff9b::10.9.8.7",
            // RFC 6052 2.2, prefix lengths 48, 56, 64 and 96.
            "64:ff9b:1:a09:8:700::",
            "64:ff9b:1:a:9:807::",
            "64:ff9b:1:0:a:908:700:0",
            "64:ff9b:1::10.9.8.7",
            "2002:a09:807::1",
            "2001:0:a09:807::",
            "2001::f5f6:f7f8",
            "2001:db8::5efe:10.9.8.7",
        ] {
            assert!(judged(disguise).is_touched_by(ten), "{disguise}");
        }
        for other in ["11.0.0.1", "64:ff9b::11.0.0.1", "2001:db8::10.9.8.7"] {
            assert!(!judged(other).is_touched_by(ten), "{other}");
        }
    }

    #[test]
    fn wide_allowances_do_not() {
        let inside = judged("64:ff9b::10.9.8.7");
        assert!(!inside.is_covered_by(&[cidr("::/0")]));
        assert!(!inside.is_covered_by(&[cidr("64:ff9b::/64")]));
        assert!(inside.is_covered_by(&[cidr("64:ff9b::/96")]));
        assert!(inside.is_covered_by(&[cidr("::/0"), cidr("10.9.0.0/16")]));
        assert!(!inside.is_covered_by(&[cidr("10.9.0.0/16")]));
        assert!(judged("64:ff9b::8.8.8.8").is_covered_by(&[cidr("::/0")]));
        assert!(!judged("2002:a00:1::1").is_covered_by(&[cidr("2000::/3")]));
        assert!(judged("2002:a00:1::1").is_covered_by(&[cidr("2002:a00::/24")]));
        assert!(judged("::ffff:10.0.0.1").is_covered_by(&[cidr("10.0.0.0/8")]));
    }

    #[test]
    fn edges_of_networks() {
        for (network, address, inside) in [
            ("0.0.0.0/0", "255.255.255.255", true),
            ("0.0.0.0/0", "::1", false),
            ("::/0", "ffff::", true),
            ("198.51.100.7/32", "198.51.100.7", true),
            ("198.51.100.7/32", "198.51.100.6", false),
            ("198.51.100.0/24", "198.51.101.0", false),
            ("2001:db8::/127", "2001:db8::1", true),
            ("2001:db8::/127", "2001:db8::2", false),
        ] {
            assert_eq!(
                cidr(network).contains(address.parse().unwrap()),
                inside,
                "{network} {address}"
            );
        }
        assert_eq!(Cidr::new([10, 0, 0, 1].into(), 8), None);
        assert_eq!(Cidr::new([10, 0, 0, 0].into(), 33), None);
        assert_eq!(
            Cidr::around([10, 0, 0, 1].into(), 8),
            Some(cidr("10.0.0.0/8"))
        );
    }
}
