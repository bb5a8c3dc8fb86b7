//! What a router advertisement says (RFC 4861 4.2, RFC 4191, RFC 8106).
//!
//! Everything but the lifetimes that end with the network stays the same while it runs, so the
//! message is made once. Preference is medium (RFC 4191 2.1), the zero of its field: this router is
//! the LAN's only one. No flag for DHCPv6 (M, O) is set: addresses come by SLAAC, names by RDNSS.

use std::net::Ipv6Addr;

use super::message::{DNSSL, MTU, PREFIX_INFORMATION, RDNSS, ROUTER_ADVERTISEMENT};
use super::message::{ROUTE_INFORMATION, SOURCE_LINK_LAYER, link_layer};
use crate::frame::{Duration, Mac};
use crate::gateway::Lan6;

/// Longest pause between two unsolicited advertisements (MaxRtrAdvInterval; RFC 4861 6.2.1 default).
pub const INTERVAL_MAX: Duration = Duration::from_secs(600);
/// Shortest regular pause (MinRtrAdvInterval: 0.33 of the longest).
pub const INTERVAL_MIN: Duration = Duration::from_secs(198);
/// How long guests keep the default route (AdvDefaultLifetime: three times the longest pause).
pub const ROUTER_LIFETIME_SECS: u16 = 1800;
/// How long guests prefer an address of the prefix. RFC 9096 3.4: 2,700 s, and not RFC 4861's week,
/// so that guests leave a prefix that is gone; renewed at least every 600 s.
pub const PREFERRED_SECS: u32 = 2700;
/// How long an address of the prefix stays valid (RFC 9096 3.4).
pub const VALID_SECS: u32 = 5400;
/// How long guests use the DNS server and search domain (RFC 8106 5.1: three times the longest pause).
pub const DNS_LIFETIME_SECS: u32 = 1800;
const _: () = assert!(ROUTER_LIFETIME_SECS as u64 == 3 * INTERVAL_MAX.secs());
const _: () = assert!(DNS_LIFETIME_SECS as u64 == 3 * INTERVAL_MAX.secs());
const _: () =
    assert!(PREFERRED_SECS as u64 > 3 * INTERVAL_MAX.secs() && PREFERRED_SECS < VALID_SECS);

/// Hop limit for guests to send with (IANA's recommended default).
const HOP_LIMIT_DEFAULT: u8 = 64;
/// On-link and autonomous: guests make their addresses in it (RFC 4861 4.6.2).
const PREFIX_FLAGS: u8 = 0xc0;
/// Place of the router lifetime.
const LIFETIME_AT: usize = 6;

/// Prefixes that one advertisement names at most, those that are withdrawn included. With them and the longest
/// search domain it fits the least MTU that IPv6 has.
pub const ROUTES_MAX: usize = 16;
/// A Route Information option with a whole prefix.
const ROUTE_LEN: usize = 24;
const _: () = assert!(40 + 16 + 8 + 8 + 32 + 24 + 8 + 256 + ROUTES_MAX * ROUTE_LEN <= 1280);

/// A prefix that the gateway leads to, or leads to no more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RoutedPrefix {
    /// Its first address.
    pub prefix: Ipv6Addr,
    /// Its length.
    pub len: u8,
    /// Whether it still leads there.
    pub is_there: bool,
}

/// Whether the gateway is guests' way to the outside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Route {
    /// A default route.
    Default,
    /// None: the host itself has no IPv6. Addresses and DNS work, and programs that ask both families
    /// know at once that only IPv4 leads outside.
    None,
    /// Nothing from here on, DNS included: the network ends.
    Ending,
}

/// An advertisement, ready but for its checksum.
pub struct Advertisement {
    message: Vec<u8>,
    /// Places of the 32-bit lifetimes of RDNSS and DNSSL.
    dns_lifetimes: Vec<usize>,
}

impl Advertisement {
    /// That of a gateway. `domain` is a checked name.
    pub fn new(lan: Lan6, mac: Mac, mtu: u16, domain: Option<&str>) -> Self {
        let mut message = vec![ROUTER_ADVERTISEMENT, 0, 0, 0, HOP_LIMIT_DEFAULT, 0, 0, 0];
        // Reachable time and retransmission timer: unspecified by this router.
        message.extend_from_slice(&[0; 8]);
        message.extend_from_slice(&link_layer(SOURCE_LINK_LAYER, mac));
        message.extend_from_slice(&[MTU, 1, 0, 0]);
        message.extend_from_slice(&u32::from(mtu).to_be_bytes());

        message.extend_from_slice(&[PREFIX_INFORMATION, 4, lan.prefix, PREFIX_FLAGS]);
        message.extend_from_slice(&VALID_SECS.to_be_bytes());
        message.extend_from_slice(&PREFERRED_SECS.to_be_bytes());
        message.extend_from_slice(&[0; 4]);
        let host_bits = 128 - u32::from(lan.prefix);
        let prefix = lan.address.to_bits() >> host_bits << host_bits;
        message.extend_from_slice(&prefix.to_be_bytes());

        let mut dns_lifetimes = vec![message.len() + 4];
        message.extend_from_slice(&[RDNSS, 3, 0, 0]);
        message.extend_from_slice(&DNS_LIFETIME_SECS.to_be_bytes());
        message.extend_from_slice(&lan.address.octets());

        if let Some(domain) = domain {
            dns_lifetimes.push(message.len() + 4);
            let name = encoded(domain);
            message.extend_from_slice(&[DNSSL, (1 + name.len() / 8) as u8, 0, 0]);
            message.extend_from_slice(&DNS_LIFETIME_SECS.to_be_bytes());
            message.extend_from_slice(&name);
        }
        Self {
            message,
            dns_lifetimes,
        }
    }

    /// Writes the message, with the prefixes that the gateway leads to besides, to the front of `buffer`;
    /// returns its length.
    pub fn write(&self, buffer: &mut [u8], route: Route, prefixes: &[RoutedPrefix]) -> usize {
        let message = &mut buffer[..self.message.len()];
        message.copy_from_slice(&self.message);
        let lifetime = match route {
            Route::Default => ROUTER_LIFETIME_SECS,
            Route::None | Route::Ending => 0,
        };
        message[LIFETIME_AT..LIFETIME_AT + 2].copy_from_slice(&lifetime.to_be_bytes());
        if route == Route::Ending {
            for &at in &self.dns_lifetimes {
                message[at..at + 4].fill(0);
            }
        }
        let mut len = self.message.len();
        for routed in prefixes.iter().take(ROUTES_MAX) {
            let option = &mut buffer[len..len + ROUTE_LEN];
            let lifetime = match route == Route::Ending || !routed.is_there {
                true => 0,
                false => u32::from(ROUTER_LIFETIME_SECS),
            };
            // Preference medium, as for the default route.
            option[..4].copy_from_slice(&[ROUTE_INFORMATION, 3, routed.len, 0]);
            option[4..8].copy_from_slice(&lifetime.to_be_bytes());
            option[8..].copy_from_slice(&routed.prefix.octets());
            len += ROUTE_LEN;
        }
        len
    }
}

/// A domain name as labels (RFC 1035 3.1), padded to eight bytes with zeros (RFC 8106 5.2).
fn encoded(domain: &str) -> Vec<u8> {
    let mut name = Vec::new();
    for label in domain.split('.') {
        name.push(label.len() as u8);
        name.extend_from_slice(label.as_bytes());
    }
    name.push(0);
    name.resize(name.len().next_multiple_of(8), 0);
    name
}
