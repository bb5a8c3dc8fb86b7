//! ICMP echo (RFC 792, RFC 1122 3.2.2.6) to the gateway's own address.
//!
//! Answers come from the gateway itself, so a reply means "the LAN works", never "the outside
//! works". An echo bigger than the MTU arrives in fragments, which the gateway doesn't reassemble:
//! such a ping stays unanswered and counts as `fragment`. Broadcast pings are not answered (RFC 1122
//! 3.2.2.6 allows it; a reply per station is how smurf attacks work).

use super::{Handled, LanConfig, Outbox, Service, admit_unicast, service_counters};
use crate::frame::{ETH_HEADER_LEN, Instant};
use crate::offload::Offload;
use crate::stats::DropReason;
use crate::wire::{
    Body, ETHERTYPE_IPV4, IPV4_HEADER_LEN, Ipv4, Ipv4Fields, PROTO_ICMP, Packet, TTL_DEFAULT,
    Transport, checksum, write_ethernet, write_ipv4,
};

/// Type and code of an echo request; the reply's type is 0 (RFC 792).
const ECHO_REQUEST: [u8; 2] = [8, 0];
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
    counters: EchoCounters,
}

impl Echo {
    /// A service for the gateway of `lan`.
    pub fn new(lan: LanConfig) -> Self {
        Self {
            lan,
            counters: EchoCounters::default(),
        }
    }

    fn request<'p, 'a>(&self, packet: &'p Packet<'a>) -> Option<(&'p Ipv4<'a>, &'a [u8])> {
        let Body::Ipv4(ip) = &packet.body else {
            return None;
        };
        match ip.transport {
            Transport::Icmp(message)
                if ip.destination == self.lan.address && message.starts_with(&ECHO_REQUEST) =>
            {
                Some((ip, message))
            }
            _ => None,
        }
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
        admit_unicast(&self.lan, packet, ip)?;
        if IPV4_HEADER_LEN + message.len() > usize::from(self.lan.mtu) {
            return Err(DropReason::TooBig);
        }
        let fields = Ipv4Fields {
            source: self.lan.address,
            destination: ip.source,
            protocol: PROTO_ICMP,
            ttl: TTL_DEFAULT,
            // RFC 1122 3.2.1.6: the reply carries the request's type of service.
            tos: ip.tos & !ECN_MASK,
        };
        let buffer = out.buffer();
        write_ethernet(buffer, packet.source, self.lan.mac, ETHERTYPE_IPV4);
        write_ipv4(buffer, fields, message.len());
        let reply = &mut buffer[ETH_HEADER_LEN + IPV4_HEADER_LEN..][..message.len()];
        reply.copy_from_slice(message);
        reply[..4].fill(0);
        let sum = !checksum::fold(checksum::sum(reply));
        reply[2..4].copy_from_slice(&sum.to_be_bytes());
        self.counters.replies += 1;
        let len = ETH_HEADER_LEN + IPV4_HEADER_LEN + message.len();
        out.send(len, Offload::default());
        Ok(())
    }

    fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.counters.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{GUEST, GUEST_ADDRESS, Kept, lan, parse};
    use super::*;
    use crate::frame::Mac;
    use std::net::Ipv4Addr;

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
            (to_gateway(&[7; 1473]), DropReason::TooBig),
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
}
