//! ICMP echo (RFC 792, RFC 1122 3.2.2.6) and ICMPv6 echo (RFC 4443 4) to the gateway's own addresses.
//!
//! Answers come from the gateway itself, so a reply means "the LAN works", never "the outside
//! works". One that came in fragments is answered in fragments. Broadcast and multicast pings are not
//! answered (RFC 1122 3.2.2.6 allows it; a reply per station is how smurf attacks work).

use std::net::IpAddr;

use super::fragment::{cut4, cut6};
use super::{Handled, LanConfig, Outbox, Service, admit_unicast, service_counters};
use crate::frame::{ETH_HEADER_LEN, Instant};
use crate::offload::Offload;
use crate::stats::DropReason;
use crate::wire::ipv6::{IPV6_HEADER_LEN, Ipv6Fields, write_ipv6};
use crate::wire::{
    ETHERTYPE_IPV4, ETHERTYPE_IPV6, IPV4_HEADER_LEN, Ip, Ipv4Fields, PROTO_ICMP, PROTO_ICMPV6,
    Packet, TTL_DEFAULT, Transport, checksum, write_ethernet, write_ipv4,
};

/// Type and code of an echo request (RFC 792).
const ECHO_REQUEST: [u8; 2] = [8, 0];
/// Of its reply.
const ECHO_REPLY: [u8; 2] = [0, 0];
/// Type and code of an ICMPv6 echo request (RFC 4443 4.1).
const ECHO_REQUEST6: [u8; 2] = [128, 0];
/// Of its reply.
const ECHO_REPLY6: [u8; 2] = [129, 0];
/// ECN bits of the TOS byte: a reply starts a path of its own (RFC 3168 5).
const ECN_MASK: u8 = 0x03;

service_counters! {
    /// What the echo service did.
    EchoCounters {
        /// Requests answered.
        replies = "echo_replies",
    }
}

/// The echo service.
pub struct Echo {
    lan: LanConfig,
    /// Identification of the next reply in fragments.
    next_id: u32,
    counters: EchoCounters,
}

impl Echo {
    /// A service for the gateway of `lan`.
    pub fn new(lan: LanConfig) -> Self {
        Self {
            lan,
            next_id: 0,
            counters: EchoCounters::default(),
        }
    }

    fn request<'a>(&self, packet: &Packet<'a>) -> Option<(Ip<'a>, &'a [u8])> {
        let ip = packet.ip()?;
        let Transport::Icmp(message) = ip.transport else {
            return None;
        };
        let request = match ip.source.is_ipv4() {
            true => ECHO_REQUEST,
            false => ECHO_REQUEST6,
        };
        (self.lan.is_gateway(ip.destination) && message.starts_with(&request))
            .then_some((ip, message))
    }
}

impl Service for Echo {
    fn name(&self) -> &'static str {
        "echo"
    }

    fn claims(&self, packet: &Packet<'_>) -> bool {
        self.request(packet).is_some()
    }

    fn handle(&mut self, packet: &Packet<'_>, _now: Instant, out: &mut dyn Outbox) -> Handled {
        let (ip, message) = self.request(packet).ok_or(DropReason::Unclaimed)?;
        admit_unicast(&self.lan, packet, ip.source)?;
        // RFC 1122 3.2.1.6: the reply carries the request's type of service.
        let tos = ip.tos & !ECN_MASK;
        let buffer = out.buffer();
        let header_len = match (ip.destination, ip.source) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                write_ethernet(buffer, packet.source, self.lan.mac, ETHERTYPE_IPV4);
                let fields = Ipv4Fields {
                    source,
                    destination,
                    protocol: PROTO_ICMP,
                    ttl: TTL_DEFAULT,
                    tos,
                };
                write_ipv4(buffer, fields, message.len());
                IPV4_HEADER_LEN
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                write_ethernet(buffer, packet.source, self.lan.mac, ETHERTYPE_IPV6);
                let fields = Ipv6Fields {
                    source,
                    destination,
                    protocol: PROTO_ICMPV6,
                    hop_limit: TTL_DEFAULT,
                    traffic_class: tos,
                };
                write_ipv6(buffer, fields, message.len());
                IPV6_HEADER_LEN
            }
            _ => return Err(DropReason::Malformed),
        };
        let reply = &mut buffer[ETH_HEADER_LEN + header_len..][..message.len()];
        reply.copy_from_slice(message);
        reply[2..4].fill(0);
        let sum = if ip.source.is_ipv4() {
            reply[..2].copy_from_slice(&ECHO_REPLY);
            checksum::fold(checksum::sum(reply))
        } else {
            reply[..2].copy_from_slice(&ECHO_REPLY6);
            checksum::transport(ip.destination, ip.source, PROTO_ICMPV6, reply)
        };
        reply[2..4].copy_from_slice(&(!sum).to_be_bytes());
        self.counters.replies += 1;
        let len = ETH_HEADER_LEN + header_len + message.len();
        let mtu = self.lan.mtu;
        if len <= ETH_HEADER_LEN + usize::from(mtu) {
            out.send(len, Offload::default());
        } else {
            self.next_id = self.next_id.wrapping_add(1);
            match ip.source.is_ipv4() {
                true => cut4(out, len, mtu, self.next_id as u16),
                false => cut6(out, len, mtu, self.next_id),
            }
        }
        Ok(())
    }

    fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.counters.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{GUEST, GUEST_ADDRESS, Kept, lan, lan6, parse};
    use super::*;
    use crate::frame::Mac;
    use crate::wire::Body;
    use crate::wire::ipv6::link_local;
    use std::net::{Ipv4Addr, Ipv6Addr};

    fn ping(
        mac: Mac,
        source: Ipv4Addr,
        destination: Ipv4Addr,
        kind: [u8; 2],
        payload: &[u8],
    ) -> Vec<u8> {
        let len = 8 + payload.len();
        let mut frame = vec![0; 34 + len];
        write_ethernet(&mut frame, mac, GUEST, ETHERTYPE_IPV4);
        let fields = Ipv4Fields {
            source,
            destination,
            protocol: PROTO_ICMP,
            ttl: 64,
            tos: 0xb9,
        };
        write_ipv4(&mut frame, fields, len);
        frame[34..36].copy_from_slice(&kind);
        frame[38..42].copy_from_slice(&[0x12, 0x34, 0, 9]);
        frame[42..].copy_from_slice(payload);
        let sum = !checksum::fold(checksum::sum(&frame[34..]));
        frame[36..38].copy_from_slice(&sum.to_be_bytes());
        frame
    }

    fn to_gateway(payload: &[u8]) -> Vec<u8> {
        ping(
            lan().mac,
            GUEST_ADDRESS,
            lan().address,
            ECHO_REQUEST,
            payload,
        )
    }

    #[test]
    fn replies_with_the_same_payload() {
        let (mut service, mut out) = (Echo::new(lan()), Kept::new());
        for len in [0, 1, 56, 1472] {
            let payload: Vec<u8> = (0..len).map(|n| n as u8).collect();
            let frame = to_gateway(&payload);
            let request = parse(&frame);
            assert!(service.claims(&request));
            assert_eq!(service.handle(&request, Instant::ZERO, &mut out), Ok(()));
            let reply = out.take();
            // Parsing checks both checksums.
            let reply = parse(&reply);
            assert_eq!((reply.destination, reply.source), (GUEST, lan().mac));
            let Body::Ipv4(ip) = reply.body else { panic!() };
            assert_eq!((ip.source, ip.destination), (lan().address, GUEST_ADDRESS));
            assert_eq!((ip.ttl, ip.tos), (64, 0xb8));
            let Transport::Icmp(message) = ip.transport else {
                panic!()
            };
            assert_eq!(message[..2], [0, 0]);
            assert_eq!(message[4..8], [0x12, 0x34, 0, 9]);
            assert_eq!(message[8..], payload);
        }
        assert_eq!(service.counters.replies, 4);
    }

    #[test]
    fn claims_nothing_but_echo_requests_for_the_gateway() {
        let service = Echo::new(lan());
        let (mac, guest, gateway) = (lan().mac, GUEST_ADDRESS, lan().address);
        for frame in [
            ping(mac, guest, Ipv4Addr::new(8, 8, 8, 8), ECHO_REQUEST, b"x"),
            ping(mac, guest, lan().broadcast(), ECHO_REQUEST, b"x"),
            ping(mac, guest, gateway, [0, 0], b"x"),
            ping(mac, guest, gateway, [8, 1], b"x"),
            ping(mac, guest, gateway, [13, 0], b"x"),
        ] {
            assert!(!service.claims(&parse(&frame)));
        }
    }

    #[test]
    fn refuses_what_can_not_be_answered() {
        let (mut service, mut out) = (Echo::new(lan()), Kept::new());
        let foreign = Ipv4Addr::new(10, 0, 0, 1);
        let gateway = lan().address;
        for (frame, reason) in [
            (
                ping(Mac::BROADCAST, GUEST_ADDRESS, gateway, ECHO_REQUEST, b"x"),
                DropReason::ForbiddenDestination,
            ),
            (
                ping(lan().mac, foreign, gateway, ECHO_REQUEST, b"x"),
                DropReason::ForeignSource,
            ),
            (
                ping(lan().mac, lan().broadcast(), gateway, ECHO_REQUEST, b"x"),
                DropReason::ForeignSource,
            ),
        ] {
            let packet = parse(&frame);
            assert!(service.claims(&packet));
            assert_eq!(
                service.handle(&packet, Instant::ZERO, &mut out),
                Err(reason)
            );
        }
        assert!(out.frames.is_empty());
        assert_eq!(service.counters, EchoCounters::default());
    }

    fn ping6(
        mac: Mac,
        source: Ipv6Addr,
        destination: Ipv6Addr,
        kind: [u8; 2],
        len: usize,
    ) -> Vec<u8> {
        let mut frame = vec![0x5a; 54 + len];
        write_ethernet(&mut frame, mac, GUEST, ETHERTYPE_IPV6);
        let fields = Ipv6Fields {
            source,
            destination,
            protocol: PROTO_ICMPV6,
            hop_limit: 64,
            traffic_class: 0xb9,
        };
        write_ipv6(&mut frame, fields, len);
        frame[54..58].copy_from_slice(&[kind[0], kind[1], 0, 0]);
        let sum = !checksum::transport(
            source.into(),
            destination.into(),
            PROTO_ICMPV6,
            &frame[54..],
        );
        frame[56..58].copy_from_slice(&sum.to_be_bytes());
        frame
    }

    #[test]
    fn both_gateway_addresses_of_ipv6_reply() {
        let (mut service, mut out) = (Echo::new(lan6()), Kept::new());
        let v6 = lan6().v6.unwrap();
        let guest = link_local(GUEST);
        for (gateway, len) in [(v6.link_local, 8), (v6.address, 64), (v6.address, 1460)] {
            let frame = ping6(lan6().mac, guest, gateway, ECHO_REQUEST6, len);
            let request = parse(&frame);
            assert!(service.claims(&request));
            assert_eq!(service.handle(&request, Instant::ZERO, &mut out), Ok(()));
            let reply = out.take();
            let reply = parse(&reply);
            assert_eq!((reply.destination, reply.source), (GUEST, lan6().mac));
            let Body::Ipv6(ip) = reply.body else { panic!() };
            assert_eq!((ip.source, ip.destination), (gateway, guest));
            assert_eq!((ip.ttl, ip.tos), (64, 0xb8));
            let Transport::Icmp(message) = ip.transport else {
                panic!()
            };
            assert_eq!((&message[..2], message.len()), (&ECHO_REPLY6[..], len));
            assert_eq!(message[4..], frame[58..]);
        }
        let mac = lan6().mac;
        let foreign = "2001:db8::7".parse().unwrap();
        let subnet_routers = "fd12:3456:789a:1::".parse().unwrap();
        for (frame, reason) in [
            (
                ping6(mac, foreign, v6.address, ECHO_REQUEST6, 8),
                DropReason::ForeignSource,
            ),
            (
                ping6(mac, subnet_routers, v6.address, ECHO_REQUEST6, 8),
                DropReason::ForeignSource,
            ),
            (
                ping6(mac, Ipv6Addr::UNSPECIFIED, v6.address, ECHO_REQUEST6, 8),
                DropReason::ForeignSource,
            ),
            (
                ping6(Mac::BROADCAST, guest, v6.address, ECHO_REQUEST6, 8),
                DropReason::ForbiddenDestination,
            ),
        ] {
            assert_eq!(
                service.handle(&parse(&frame), Instant::ZERO, &mut out),
                Err(reason)
            );
        }
        assert_eq!(service.counters.replies, 3);
        for frame in [
            ping6(mac, guest, foreign, ECHO_REQUEST6, 8),
            ping6(mac, guest, "ff02::1".parse().unwrap(), ECHO_REQUEST6, 8),
            ping6(mac, guest, v6.address, ECHO_REPLY6, 8),
            ping6(mac, guest, v6.address, ECHO_REQUEST, 8),
        ] {
            assert!(!service.claims(&parse(&frame)));
        }
        let without = Echo::new(lan());
        assert!(!without.claims(&parse(&ping6(mac, guest, v6.address, ECHO_REQUEST6, 8))));
    }

    #[test]
    fn a_reply_that_is_too_long_leaves_in_fragments() {
        let (mut service, mut out) = (Echo::new(lan6()), Kept::new());
        let address = lan6().v6.unwrap().address;
        let long = ping6(lan6().mac, link_local(GUEST), address, ECHO_REQUEST6, 4008);
        // As they look when they were put together.
        for (frame, sizes) in [
            (to_gateway(&[7; 1473]), vec![34 + 1480, 34 + 1]),
            (long, vec![62 + 1448, 62 + 1448, 62 + 1112]),
        ] {
            let packet = parse(&frame);
            assert_eq!(service.handle(&packet, Instant::ZERO, &mut out), Ok(()));
            let fragments = std::mem::take(&mut out.frames);
            let lens: Vec<_> = fragments.iter().map(Vec::len).collect();
            assert_eq!(lens, sizes);
            assert!(
                fragments
                    .iter()
                    .all(|fragment| parse(fragment).is_fragment())
            );
        }
    }
}
