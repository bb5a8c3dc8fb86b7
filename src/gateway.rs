//! The gateway: the LAN's .1 as a port of the switch.
//!
//! A service says what it claims and what it answers; the registry asks them in order, what none
//! claims goes to the NAT. Answers leave through an [`Outbox`], which re-enters the switch as
//! ingress of [`crate::frame::PortId::GATEWAY`].
//!
//! # The path of a packet
//! [`Gateway::handle`] looks at the destination first: nearly every packet is on its way outside and
//! costs a comparison or two here. What is for a gateway address, a broadcast, a group of the gateway
//! or ARP goes down the registry: [`arp`], [`ndp`], [`crate::dhcp`], [`dns`], [`echo`]. A claimed packet is answered or dropped
//! with a reason; it never falls through to the NAT, so a refusal here is final.
//!
//! # What a hostile guest can try
//! Every service answers only unicast (but for defences and router advertisements, which are paced),
//! only inside the LAN and with at most one frame per datagram,
//! so none can be used as an amplifier or reflector towards another guest beyond what a plain frame
//! could do. State is bounded per guest and in total ([`crate::dhcp::lease`], [`dns`]).

pub mod arp;
pub mod dns;
pub mod echo;
pub mod fragment;
pub mod ndp;
pub mod neighbor;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex};

use crate::dhcp::lease::LeaseTable;
use crate::dhcp::{DhcpConfig, DhcpServer};
use crate::frame::{Instant, Mac};
use crate::offload::{Gso, Offload};
use crate::stats::DropReason;
use crate::wire::ipv6::is_link_local;
use crate::wire::{Body, Packet, Udp};

/// The addresses the gateway's services answer with.
#[derive(Clone, Debug)]
pub struct LanConfig {
    /// The gateway's MAC.
    pub mac: Mac,
    /// The gateway's address (192.168.122.1).
    pub address: Ipv4Addr,
    /// Prefix length of the LAN, 8..=30.
    pub prefix: u8,
    /// MTU announced to guests, bytes of IP packet.
    pub mtu: u16,
    /// IPv6, unless the network is without.
    pub v6: Option<Lan6>,
}

/// IPv6 of the LAN.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lan6 {
    /// The gateway's link-local address, which guests' default route names.
    pub link_local: Ipv6Addr,
    /// The gateway's address in the LAN's prefix.
    pub address: Ipv6Addr,
    /// Prefix length: 64, as SLAAC needs (RFC 4862 5.5.3 with RFC 2464).
    pub prefix: u8,
}

impl Lan6 {
    /// First address of the prefix.
    pub fn network(&self) -> Ipv6Addr {
        Ipv6Addr::from_bits(self.address.to_bits() & (u128::MAX << (128 - u32::from(self.prefix))))
    }

    /// Whether `address` is of the LAN's prefix.
    pub fn contains(&self, address: Ipv6Addr) -> bool {
        let shift = 128 - u32::from(self.prefix);
        (address.to_bits() ^ self.address.to_bits()) >> shift == 0
    }

    /// Whether `address` is one of the gateway's.
    pub fn is_gateway(&self, address: Ipv6Addr) -> bool {
        address == self.address || address == self.link_local
    }

    /// Whether `address` is a unicast one that a guest may have, link-local included. The subnet's
    /// first address is every router's (RFC 4291 2.6.1).
    pub fn is_guest(&self, address: Ipv6Addr) -> bool {
        let subnet_routers = self.contains(address) && address.to_bits() << self.prefix == 0;
        (self.contains(address) || is_link_local(address))
            && !self.is_gateway(address)
            && !subnet_routers
    }
}

impl LanConfig {
    /// Network mask.
    pub fn mask(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(u32::MAX << (32 - u32::from(self.prefix)))
    }

    /// First address of the subnet.
    pub fn network(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.address.to_bits() & self.mask().to_bits())
    }

    /// Directed broadcast address of the subnet.
    pub fn broadcast(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.address.to_bits() | !self.mask().to_bits())
    }

    /// Whether `address` is of this LAN.
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        address.to_bits() & self.mask().to_bits() == self.network().to_bits()
    }

    /// Whether `address` is one that a guest of this LAN may have.
    pub fn is_guest(&self, address: Ipv4Addr) -> bool {
        self.contains(address)
            && address != self.address
            && address != self.network()
            && address != self.broadcast()
    }

    /// Whether `address` is one of the gateway's, of either family.
    pub fn is_gateway(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => address == self.address,
            IpAddr::V6(address) => self.v6.is_some_and(|lan| lan.is_gateway(address)),
        }
    }

    /// Whether `address` lies in the LAN's subnet of its family, or is link-local IPv6.
    pub fn holds(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.contains(address),
            IpAddr::V6(address) => {
                is_link_local(address) || self.v6.is_some_and(|lan| lan.contains(address))
            }
        }
    }

    /// Whether `address` is one that a guest of this LAN may send from, of either family.
    pub fn is_guest_any(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.is_guest(address),
            IpAddr::V6(address) => self.v6.is_some_and(|lan| lan.is_guest(address)),
        }
    }
}

/// Where the gateway and the NAT put the frames they make. One frame at a time: write it into
/// [`Outbox::buffer`], then [`Outbox::send`] it; it is switched and written before `send` returns,
/// so the buffer stays in cache and nothing queues.
pub trait Outbox {
    /// At least [`crate::frame::FRAME_BUFFER_LEN`] bytes; the frame starts at byte 0.
    fn buffer(&mut self) -> &mut [u8];

    /// Sends the first `len` bytes of the buffer as one Ethernet frame. The buffer keeps its content.
    fn send(&mut self, len: usize, offload: Offload);
}

/// What a service did with a packet it claimed.
pub type Handled = Result<(), DropReason>;

/// A gateway service: pure, with its time passed in.
pub trait Service {
    /// Name for counters and `lanlet status`.
    fn name(&self) -> &'static str;

    /// Whether the packet is for this service. Called for every packet that reaches the gateway;
    /// cheap, and true only on certainty.
    fn claims(&self, packet: &Packet<'_>) -> bool;

    /// Answers a claimed packet.
    ///
    /// # Errors
    /// The reason to count the packet as dropped for.
    fn handle(&mut self, packet: &Packet<'_>, now: Instant, out: &mut dyn Outbox) -> Handled;

    /// The service's counters by the names that `lanlet status` shows, in a fixed order.
    fn counters(&self) -> impl Iterator<Item = (&'static str, u64)>;
}

/// Declares the counters of a service: a struct of numbers and their names for `lanlet status`.
macro_rules! service_counters {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $field:ident = $label:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        pub struct $name { $($(#[$doc])* pub $field: u64,)* }

        impl $name {
            /// Names and values, in the order of declaration.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
                [$(($label, self.$field),)*].into_iter()
            }
        }
    };
}
pub(crate) use service_counters;

/// The registry: a service's field is its line here, and the order of lines is the order of claims.
macro_rules! registry {
    ($($(#[$doc:meta])* $field:ident: $service:ty,)*) => {
        /// The gateway's services.
        pub struct Gateway {
            lan: LanConfig,
            $($(#[$doc])* pub $field: $service,)*
        }

        impl Gateway {
            /// Names of the services in the order they are asked.
            pub fn services(&self) -> impl Iterator<Item = &'static str> + use<> {
                [$(self.$field.name(),)*].into_iter()
            }

            /// Counters of all services, in registry order.
            pub fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
                std::iter::empty()$(.chain(self.$field.counters()))*
            }

            fn dispatch(
                &mut self,
                packet: &Packet<'_>,
                now: Instant,
                out: &mut dyn Outbox,
            ) -> Option<Handled> {
                $(if self.$field.claims(packet) {
                    return Some(self.$field.handle(packet, now, out));
                })*
                None
            }
        }
    };
}

registry! {
    /// Address resolution for the gateway's address.
    arp: arp::Arp,
    /// Neighbor Discovery and router advertisements.
    ndp: ndp::Ndp,
    /// DHCPv4.
    dhcp: DhcpServer,
    /// DNS over UDP; the worker moves its queries to the resolver and the answers back.
    dns: dns::DnsService,
    /// ICMP and ICMPv6 echo.
    echo: echo::Echo,
}

impl Gateway {
    /// The services of one worker. Workers share the lease table.
    pub fn new(config: DhcpConfig, leases: Arc<Mutex<LeaseTable>>) -> Self {
        let lan = config.lan.clone();
        Self {
            arp: arp::Arp::new(lan.clone()),
            ndp: ndp::Ndp::new(&lan, config.domain.as_deref()),
            dhcp: DhcpServer::new(config, leases),
            dns: dns::DnsService::new(lan.clone()),
            echo: echo::Echo::new(lan.clone()),
            lan,
        }
    }

    /// The addresses the services answer with.
    pub fn lan(&self) -> &LanConfig {
        &self.lan
    }

    /// Offers a packet to the services. `None`: not claimed, the NAT decides. `Some(Err(reason))`:
    /// claimed and dropped.
    #[inline]
    pub fn handle(
        &mut self,
        packet: &Packet<'_>,
        now: Instant,
        out: &mut dyn Outbox,
    ) -> Option<Handled> {
        let concerned = match &packet.body {
            Body::Ipv4(ip) => is_for_gateway(&self.lan, ip.destination),
            Body::Ipv6(ip) => is_for_gateway6(&self.lan, ip.destination),
            Body::Arp(_) => {
                self.dhcp.observe(packet, now);
                true
            }
            Body::Other(_) => false,
        };
        if concerned {
            self.dispatch(packet, now, out)
        } else {
            None
        }
    }
}

/// Whether the gateway itself is among the receivers of `destination`.
fn is_for_gateway(lan: &LanConfig, destination: Ipv4Addr) -> bool {
    destination == lan.address
        || destination == Ipv4Addr::BROADCAST
        || destination == lan.broadcast()
}

fn is_for_gateway6(lan: &LanConfig, destination: Ipv6Addr) -> bool {
    lan.v6
        .as_ref()
        .is_some_and(|v6| match destination.is_multicast() {
            true => ndp::is_gateway_group(v6, destination),
            false => v6.is_gateway(destination),
        })
}

/// Refuses packets whose answer could not be a unicast to a guest of this LAN: sent by link-layer
/// broadcast to a unicast address (RFC 1122 3.3.6), or from an address that no guest may have.
pub(crate) fn admit_unicast(
    lan: &LanConfig,
    packet: &Packet<'_>,
    source: IpAddr,
) -> Result<(), DropReason> {
    if packet.destination != lan.mac {
        return Err(DropReason::ForbiddenDestination);
    }
    if packet.source.is_group() {
        return Err(DropReason::GroupSource);
    }
    if !lan.is_guest_any(source) {
        return Err(DropReason::ForeignSource);
    }
    Ok(())
}

/// The datagrams of a UDP frame: one, or the train that a guest's UDP segmentation offload or our own
/// coalescing put into one frame.
pub(crate) fn datagrams<'a>(
    offload: Offload,
    udp: &Udp<'a>,
) -> impl Iterator<Item = &'a [u8]> + use<'a> {
    let payload = udp.payload;
    let size = match offload.gso {
        Gso::Udp(size) if size != 0 => usize::from(size),
        _ => payload.len().max(1),
    };
    // An empty datagram is a datagram too: its service decides what to do with it.
    let empty = payload.is_empty().then_some(payload);
    payload.chunks(size).chain(empty)
}

#[cfg(test)]
pub(crate) mod testing {
    //! What the services' tests share: a LAN, frames from a guest, and an outbox that keeps.

    use super::*;
    use crate::frame::{FRAME_BUFFER_LEN, Frame, PortId};
    use crate::wire::ipv6::link_local;
    use crate::wire::{UDP4_PAYLOAD_AT, write_udp4};

    pub const GUEST: Mac = Mac([0x52, 0x54, 0, 0, 0, 7]);
    pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 122, 77);
    pub const PORT: PortId = PortId(3);

    pub fn lan() -> LanConfig {
        LanConfig {
            mac: Mac([0x52, 0x55, 0, 0, 0, 1]),
            address: Ipv4Addr::new(192, 168, 122, 1),
            prefix: 24,
            mtu: 1500,
            v6: None,
        }
    }

    /// [`lan`] with IPv6.
    pub fn lan6() -> LanConfig {
        let mac = lan().mac;
        LanConfig {
            v6: Some(Lan6 {
                link_local: link_local(mac),
                address: "fd12:3456:789a:1::1".parse().unwrap(),
                prefix: 64,
            }),
            ..lan()
        }
    }

    pub struct Kept {
        buffer: Vec<u8>,
        pub frames: Vec<Vec<u8>>,
    }

    impl Kept {
        pub fn new() -> Self {
            // Not zero: a service must not rely on a clean buffer.
            Self {
                buffer: vec![0xa5; FRAME_BUFFER_LEN],
                frames: Vec::new(),
            }
        }

        pub fn take(&mut self) -> Vec<u8> {
            assert_eq!(self.frames.len(), 1, "exactly one answer");
            self.frames.remove(0)
        }
    }

    impl Outbox for Kept {
        fn buffer(&mut self) -> &mut [u8] {
            &mut self.buffer
        }

        fn send(&mut self, len: usize, offload: Offload) {
            assert_eq!(offload, Offload::default(), "answers leave complete");
            self.frames.push(self.buffer[..len].to_vec());
        }
    }

    pub fn parse(bytes: &[u8]) -> Packet<'_> {
        let frame = Frame {
            bytes,
            offload: Offload::default(),
        };
        Packet::parse(frame, PORT).expect("a well-formed frame")
    }

    /// A UDP frame from [`GUEST`] to the gateway.
    pub fn udp_frame(
        (source, source_port): (Ipv4Addr, u16),
        (destination_mac, destination, destination_port): (Mac, Ipv4Addr, u16),
        payload: &[u8],
    ) -> Vec<u8> {
        let mut frame = vec![0; UDP4_PAYLOAD_AT + payload.len()];
        frame[UDP4_PAYLOAD_AT..].copy_from_slice(payload);
        write_udp4(
            &mut frame,
            (GUEST, source, source_port),
            (destination_mac, destination, destination_port),
            payload.len(),
        );
        frame
    }
}

#[cfg(test)]
mod tests {
    use super::testing::*;
    use super::*;
    use crate::frame::Frame;

    fn gateway() -> Gateway {
        let config = DhcpConfig::new(lan());
        let leases = LeaseTable::new(config.range(), &config.lan).unwrap();
        Gateway::new(config, Arc::new(Mutex::new(leases)))
    }

    #[test]
    fn services_are_asked_in_the_documented_order() {
        let names: Vec<_> = gateway().services().collect();
        assert_eq!(names, ["arp", "ndp", "dhcp", "dns", "echo"]);
    }

    #[test]
    fn counter_names_are_unique_and_carry_their_service() {
        let gateway = gateway();
        let names: Vec<_> = gateway.counters().map(|(name, _)| name).collect();
        for (at, name) in names.iter().enumerate() {
            assert!(!names[at + 1..].contains(name), "{name} twice");
            assert!(
                gateway.services().any(|service| name.starts_with(service)),
                "{name} of which service?"
            );
        }
    }

    #[test]
    fn transit_traffic_is_not_claimed() {
        let mut gateway = gateway();
        let mut out = Kept::new();
        let lan = lan();
        for (destination, port) in [
            (Ipv4Addr::new(1, 1, 1, 1), 53),
            (Ipv4Addr::new(1, 1, 1, 1), 67),
            (Ipv4Addr::new(192, 168, 122, 9), 53),
            (lan.address, 68),
            (lan.address, 123),
            (lan.broadcast(), 53),
        ] {
            let frame = udp_frame(
                (GUEST_ADDRESS, 5000),
                (lan.mac, destination, port),
                b"hello",
            );
            let handled = gateway.handle(&parse(&frame), Instant::ZERO, &mut out);
            assert_eq!(handled, None, "{destination}:{port}");
        }
        assert!(gateway.counters().all(|(_, count)| count == 0));
        assert!(out.frames.is_empty());
    }

    #[test]
    fn a_train_is_split_and_an_empty_datagram_is_kept() {
        let mut udp = Udp {
            source_port: 1,
            destination_port: 2,
            payload: &[1, 2, 3, 4, 5],
        };
        let train = Offload {
            gso: Gso::Udp(2),
            ..Offload::default()
        };
        let split: Vec<_> = datagrams(train, &udp).collect();
        assert_eq!(split, [&[1u8, 2][..], &[3, 4], &[5]]);
        assert_eq!(datagrams(Offload::default(), &udp).count(), 1);
        let lying = Offload {
            gso: Gso::Udp(0),
            ..Offload::default()
        };
        assert_eq!(datagrams(lying, &udp).count(), 1);
        udp.payload = &[];
        assert_eq!(datagrams(Offload::default(), &udp).count(), 1);
        assert_eq!(datagrams(train, &udp).count(), 1);
    }

    #[test]
    fn unicast_admission() {
        let lan = lan();
        let try_one = |mac, source| {
            let frame = udp_frame((source, 5000), (mac, lan.address, 53), b"");
            let packet = Packet::parse(
                Frame {
                    bytes: &frame,
                    offload: Offload::default(),
                },
                PORT,
            )
            .unwrap();
            let Body::Ipv4(ip) = &packet.body else {
                unreachable!()
            };
            admit_unicast(&lan, &packet, ip.source.into())
        };
        assert_eq!(try_one(lan.mac, GUEST_ADDRESS), Ok(()));
        assert_eq!(
            try_one(Mac::BROADCAST, GUEST_ADDRESS),
            Err(DropReason::ForbiddenDestination)
        );
        for foreign in [
            Ipv4Addr::UNSPECIFIED,
            Ipv4Addr::BROADCAST,
            Ipv4Addr::new(8, 8, 8, 8),
            lan.address,
            lan.network(),
            lan.broadcast(),
        ] {
            assert_eq!(
                try_one(lan.mac, foreign),
                Err(DropReason::ForeignSource),
                "{foreign}"
            );
        }
    }
}
