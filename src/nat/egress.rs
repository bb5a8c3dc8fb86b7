//! Where guests may go, and where that is on the host.
//!
//! Asked once per TCP connection and once per new peer of a UDP or echo mapping, never per packet.
//!
//! # Order
//! 1. An address that host loopback is mapped to ([`HostAccess::loopback`]) leads to 127.0.0.1 or ::1,
//!    if the port is among the open ones.
//! 2. Addresses that no packet may leave for (RFC 6890), and the LAN's own, are refused.
//! 3. The host's own addresses are refused unless [`HostAccess::own_addresses`] opens them, a forward
//!    is published there, or another guest's UDP mapping is (hairpin).
//! 4. The egress policy has the last word ([`PolicyState::decide`]). It is asked about the address that
//!    the guest wrote to, so an address that stands for loopback, and a published one, take a rule like
//!    any other. What the gateway itself answers (ARP, DHCP, DNS, ping) is not its business, but for DNS
//!    it has its own say ([`PolicyState::decide_query`]); nor are forwards, either way: whoever made one
//!    allowed it.
//!
//! # Hostile guests
//! IPv4 addresses inside IPv6 ones are refused as a whole: a socket would take `::ffff:127.0.0.1` for
//! loopback. The host's routing table says what its own addresses are, so a new one is covered for new
//! peers at once, and for those that guests write to already when [`super::Nat`] hears of it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;

use super::policy::address::{Cidr, is_metadata};
use super::policy::{self, Peer, PolicyState, Verdict};
use super::{Instant, Uplink};
use crate::frame::PortId;
use crate::gateway::LanConfig;
use crate::stats::DropReason;
use crate::wire::Family;

/// Protocols that the NAT translates.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP and ICMPv6 echo.
    Echo,
}

/// What of the host guests reach. Nothing by default.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct HostAccess {
    /// The host's non-loopback addresses.
    pub own_addresses: bool,
    /// Addresses that stand for the host's loopback address of their family; one of each at most.
    pub loopback: Vec<IpAddr>,
    /// TCP and UDP ports of the host that the above opens; empty: all. Echo has no ports.
    pub ports: Vec<(Protocol, RangeInclusive<u16>)>,
}

impl HostAccess {
    fn opens(&self, protocol: Protocol, port: u16) -> bool {
        let listed = |(of, range): &(Protocol, RangeInclusive<u16>)| {
            *of == protocol && range.contains(&port)
        };
        self.ports.is_empty() || protocol == Protocol::Echo || self.ports.iter().any(listed)
    }

    fn is_loopback(&self, address: IpAddr) -> bool {
        self.loopback.contains(&address)
    }
}

/// A listening socket that guests may reach at the host's own address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Published {
    /// Of the forward that listens.
    pub id: u32,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Where it listens; an unspecified address: on all of the host's.
    pub at: SocketAddr,
}

impl Published {
    /// Whether packets to `to` end there, if that is an address of the host.
    pub fn covers(&self, protocol: Protocol, to: SocketAddr) -> bool {
        let ip = self.at.ip();
        let address =
            ip == to.ip() || (ip.is_unspecified() && Family::of(ip) == Family::of(to.ip()));
        self.protocol == protocol && self.at.port() == to.port() && address
    }
}

/// A destination that is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// No answer at all: neither RST nor ICMP.
    pub silent: bool,
}

impl From<Refusal> for DropReason {
    fn from(refusal: Refusal) -> Self {
        match refusal.silent {
            true => DropReason::SilentlyDenied,
            false => DropReason::ForbiddenDestination,
        }
    }
}

/// The rule about destinations.
#[derive(Debug)]
pub struct Egress {
    lan: LanConfig,
    host: HostAccess,
    published: Vec<Published>,
    policy: PolicyState,
}

impl Egress {
    /// Nothing is published yet, and there is no policy.
    pub fn new(lan: LanConfig, host: HostAccess) -> Self {
        // What is inside whatever its address: no name that a guest resolves opens it.
        let subnets = [
            Some((lan.address.into(), lan.prefix)),
            lan.v6.map(|lan| (lan.address.into(), lan.prefix)),
        ];
        let mapped = host.loopback.iter().map(|&address| match address {
            IpAddr::V4(_) => (address, 32),
            IpAddr::V6(_) => (address, 128),
        });
        let inside = subnets.into_iter().flatten().chain(mapped);
        let inside = inside.filter_map(|(address, prefix)| Cidr::around(address, prefix));
        Self {
            policy: PolicyState::new(inside.collect()),
            lan,
            host,
            published: Vec::new(),
        }
    }

    /// Whether packets to `address` concern this rule though it is the gateway's own.
    pub fn is_mapped(&self, address: IpAddr) -> bool {
        self.host.is_loopback(address)
    }

    /// A forward listens.
    pub fn publish(&mut self, published: Published) {
        self.published.push(published);
    }

    /// Where a forward listens for guests, too.
    pub fn published(&self, id: u32) -> impl Iterator<Item = &Published> {
        self.published.iter().filter(move |at| at.id == id)
    }

    /// A forward listens no more.
    pub fn withdraw(&mut self, id: u32) {
        self.published.retain(|published| published.id != id);
    }

    /// Where on the host packets to `to` go, if they may.
    pub fn real(&self, to: SocketAddr) -> SocketAddr {
        match self.host.is_loopback(to.ip()) {
            true => SocketAddr::new(loopback(Family::of(to.ip())), to.port()),
            false => to,
        }
    }

    /// Where on the host a connection or datagrams to `to`, of a guest behind `port`, go.
    ///
    /// # Errors
    /// They may not go there.
    pub fn admit<U: Uplink + ?Sized>(
        &mut self,
        what: (PortId, Protocol),
        to: SocketAddr,
        now: Instant,
        up: &mut U,
    ) -> Result<SocketAddr, Refusal> {
        self.decide(what, to, false, now, up)
    }

    /// As [`Egress::admit`], where the NAT itself has a guest's mapping on that port of the host: at the
    /// host's own addresses that is open (hairpin, RFC 4787 REQ-9).
    ///
    /// # Errors
    /// As there.
    pub fn admit_to_mapping<U: Uplink + ?Sized>(
        &mut self,
        what: (PortId, Protocol),
        to: SocketAddr,
        now: Instant,
        up: &mut U,
    ) -> Result<SocketAddr, Refusal> {
        self.decide(what, to, true, now, up)
    }

    fn decide<U: Uplink + ?Sized>(
        &mut self,
        (port, protocol): (PortId, Protocol),
        to: SocketAddr,
        mapped: bool,
        now: Instant,
        up: &mut U,
    ) -> Result<SocketAddr, Refusal> {
        let (real, of_host) = self.locate(protocol, to, mapped, up)?;
        match self.policy.decide(port, peer(protocol, to, of_host), now) {
            Verdict::Allow => Ok(real),
            Verdict::Deny { silent } => Err(Refusal { silent }),
        }
    }

    /// Where on the host that is, by the rules about the host and the LAN, and whether the address is the
    /// host's own.
    fn locate<U: Uplink + ?Sized>(
        &self,
        protocol: Protocol,
        to: SocketAddr,
        mapped: bool,
        up: &mut U,
    ) -> Result<(SocketAddr, bool), Refusal> {
        const REFUSED: Refusal = Refusal { silent: false };
        let address = to.ip();
        if self.host.is_loopback(address) {
            return match self.host.opens(protocol, to.port()) {
                true => Ok((self.real(to), true)),
                false => Err(REFUSED),
            };
        }
        if is_never_outside(address) || self.lan.holds(address) {
            return Err(REFUSED);
        }
        if let IpAddr::V6(outer) = address
            && let Some(inside) = behind_nat64(outer)
            && (self.lan.contains(inside) || up.is_host_address(inside.into()))
        {
            return Err(REFUSED);
        }
        let of_host = up.is_host_address(address);
        if of_host && !mapped && !self.opens_own(protocol, to) {
            return Err(REFUSED);
        }
        Ok((to, of_host))
    }

    /// Whether guests may write to `to`, an address of the host.
    pub fn opens_own(&self, protocol: Protocol, to: SocketAddr) -> bool {
        let open = self.host.own_addresses && self.host.opens(protocol, to.port());
        open || self.published.iter().any(|at| at.covers(protocol, to))
    }

    /// The policy, with the names of the guests behind each port.
    pub fn policy(&mut self) -> &mut PolicyState {
        &mut self.policy
    }

    /// Whether the policy lets a flow that was admitted go on. Not counted. `to` is where the guest
    /// wrote to.
    pub fn allows<U: Uplink + ?Sized>(
        &self,
        (port, protocol): (PortId, Protocol),
        to: SocketAddr,
        up: &mut U,
    ) -> bool {
        let allows = |of_host| {
            let peer = peer(protocol, to, of_host);
            self.policy.review(port, peer) == Verdict::Allow
        };
        // The host is asked where that can make a difference.
        allows(false)
            && (!self.policy.has_names(port) || !up.is_host_address(to.ip()) || allows(true))
    }

    /// Whether the policy lets a datagram from the host's `source` in that the guest behind `port` did
    /// not write to: what the guest may not send to may not send to it.
    pub fn allows_from(&self, port: PortId, source: SocketAddr) -> bool {
        let peer = peer(Protocol::Udp, self.shown(source), false);
        self.policy.review(port, peer) == Verdict::Allow
    }

    /// The endpoint that a guest knows an outside `source` by.
    pub fn shown(&self, mut source: SocketAddr) -> SocketAddr {
        source.set_ip(self.shown_address(source.ip()));
        source
    }

    /// The address that a guest knows an outside one by.
    pub fn shown_address(&self, source: IpAddr) -> IpAddr {
        let family = Family::of(source);
        if source != loopback(family) {
            return source;
        }
        let of_family = |address: &&IpAddr| Family::of(**address) == family;
        let mapped = self.host.loopback.iter().find(of_family);
        mapped.copied().unwrap_or(source)
    }
}

fn peer(protocol: Protocol, to: SocketAddr, of_host: bool) -> Peer {
    let (protocol, port) = match protocol {
        Protocol::Tcp => (policy::Protocol::Tcp, Some(to.port())),
        Protocol::Udp => (policy::Protocol::Udp, Some(to.port())),
        Protocol::Echo => (policy::Protocol::Icmp, None),
    };
    Peer {
        protocol,
        address: to.ip(),
        port,
        of_host,
    }
}

fn loopback(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::LOCALHOST.into(),
        Family::V6 => Ipv6Addr::LOCALHOST.into(),
    }
}

/// The IPv4 address that the well-known prefix of NAT64 leads to.
fn behind_nat64(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let well_known = address.to_bits() >> 32 == 0x0064_ff9b << 64;
    well_known.then(|| Ipv4Addr::from_bits(address.to_bits() as u32))
}

/// Addresses that no packet of a guest may leave for (RFC 6890): this network, loopback, link-local
/// (cloud metadata lives there), multicast, reserved and limited broadcast; of IPv6 also the unique local
/// addresses that clouds have for metadata. (IPv4's few outside link-local are DNS servers as well.)
pub fn is_never_outside(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            matches!(address.octets(), [0 | 127 | 224..=255, ..] | [169, 254, ..])
        }
        // ::/8 holds the unspecified address, loopback and the IPv4-mapped ones, and in 64:ff9b::/96 the
        // IPv4 addresses that a NAT64 reaches (RFC 6052 2.1); fec0::/10 was site-local (RFC 3879).
        IpAddr::V6(address) => {
            if let Some(inside) = behind_nat64(address) {
                return is_never_outside(inside.into());
            }
            let first = address.segments()[0];
            first >> 8 == 0
                || address.is_multicast()
                || first & 0xff80 == 0xfe80
                || is_metadata(address.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nat::testing::{FakeUplink, lan};

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn only_the_outside_is_open_by_default() {
        let mut egress = Egress::new(lan(), HostAccess::default());
        let mut up = FakeUplink::new(1);
        up.host_addresses.insert(at("198.51.100.1:0").ip());
        up.host_addresses.insert(at("[2001:db8::1]:0").ip());
        let mut admit = |to| {
            let what = (PortId(1), Protocol::Tcp);
            egress.admit(what, at(to), Instant::ZERO, &mut up).is_ok()
        };
        for open in [
            "1.1.1.1:53",
            "10.0.0.1:1",
            "[2001:db8::2]:1",
            "[fd12::1]:1",
            "[64:ff9b::1.1.1.1]:1",
        ] {
            assert!(admit(open), "{open}");
        }
        for refused in [
            "0.0.0.1:1",
            "127.0.0.1:1",
            "169.254.169.254:80",
            "224.0.0.1:1",
            "255.255.255.255:1",
            "192.168.122.77:1",
            "198.51.100.1:22",
            "[::]:1",
            "[::1]:1",
            "[::ffff:127.0.0.1]:1",
            "[::ffff:1.1.1.1]:1",
            "[fe80::1]:1",
            "[fec0::1]:1",
            "[64:ff9b::127.0.0.1]:1",
            "[64:ff9b::169.254.169.254]:1",
            "[64:ff9b::198.51.100.1]:1",
            "[ff02::1]:1",
            "[fd00:ec2::254]:80",
            "[fd00:6c61:6e:1::5]:1",
            "[2001:db8::1]:22",
        ] {
            assert!(!admit(refused), "{refused}");
        }
    }

    #[test]
    fn loopback_is_reached_by_its_mapped_address_and_open_ports_only() {
        let host = HostAccess {
            own_addresses: false,
            loopback: vec![at("10.0.2.2:0").ip(), at("[fd00::2]:0").ip()],
            ports: vec![(Protocol::Tcp, 80..=81), (Protocol::Udp, 53..=53)],
        };
        let mut egress = Egress::new(lan(), host);
        let mut up = FakeUplink::new(1);
        let mut admit = |protocol, to| {
            let what = (PortId(1), protocol);
            egress.admit(what, at(to), Instant::ZERO, &mut up).ok()
        };
        assert_eq!(
            admit(Protocol::Tcp, "10.0.2.2:81"),
            Some(at("127.0.0.1:81"))
        );
        assert_eq!(admit(Protocol::Tcp, "[fd00::2]:80"), Some(at("[::1]:80")));
        assert_eq!(
            admit(Protocol::Udp, "10.0.2.2:53"),
            Some(at("127.0.0.1:53"))
        );
        assert_eq!(admit(Protocol::Tcp, "10.0.2.2:53"), None);
        assert_eq!(admit(Protocol::Udp, "10.0.2.2:80"), None);
        assert_eq!(admit(Protocol::Tcp, "127.0.0.1:80"), None);
        assert_eq!(egress.shown(at("127.0.0.1:9")), at("10.0.2.2:9"));
        assert_eq!(egress.shown(at("[::1]:9")), at("[fd00::2]:9"));
        assert_eq!(egress.shown(at("1.1.1.1:9")), at("1.1.1.1:9"));
    }

    #[test]
    fn a_published_port_is_reached_at_the_hosts_address() {
        let mut egress = Egress::new(lan(), HostAccess::default());
        let mut up = FakeUplink::new(1);
        up.host_addresses.insert(at("198.51.100.1:0").ip());
        egress.publish(Published {
            id: 7,
            protocol: Protocol::Tcp,
            at: at("0.0.0.0:8080"),
        });
        let mut admit = |egress: &mut Egress, protocol, to| {
            egress.admit((PortId(1), protocol), at(to), Instant::ZERO, &mut up)
        };
        let web = at("198.51.100.1:8080");
        assert_eq!(
            admit(&mut egress, Protocol::Tcp, "198.51.100.1:8080"),
            Ok(web)
        );
        assert!(admit(&mut egress, Protocol::Udp, "198.51.100.1:8080").is_err());
        assert!(admit(&mut egress, Protocol::Tcp, "198.51.100.1:8081").is_err());
        assert!(admit(&mut egress, Protocol::Tcp, "127.0.0.1:8080").is_err());
        egress.withdraw(7);
        assert!(admit(&mut egress, Protocol::Tcp, "198.51.100.1:8080").is_err());
    }
}
