//! ARP (RFC 826) for the gateway's address, and nothing else: no proxy ARP.
//!
//! The service keeps no cache: an answer goes back to the station that asked, and the NAT takes the MAC
//! of a guest's own flows from the guest's frames. Only forwards look for guests, by
//! [`super::neighbor`].
//!
//! A guest that claims the gateway's address would take the LAN's traffic from those that believe
//! it. RFC 5227 2.4 (c) lets a station whose address others rely on (a default router) defend it
//! for ever: the claim is answered with a broadcast announcement, at most one per
//! [`DEFEND_INTERVAL`], so that a claimant can't make the gateway flood.

use std::net::Ipv4Addr;

use super::{Handled, LanConfig, Outbox, Service, service_counters};
use crate::frame::{Duration, ETH_HEADER_LEN, Instant, Mac};
use crate::offload::Offload;
use crate::stats::DropReason;
use crate::wire::{Body, ETHERTYPE_ARP, ETHERTYPE_IPV4, Packet, be16, write_ethernet};

/// An Ethernet/IPv4 ARP packet (RFC 826).
const ARP_LEN: usize = 28;
/// Hardware type Ethernet (IANA).
const HARDWARE_ETHERNET: u16 = 1;
/// Operation codes (RFC 826).
const REQUEST: u16 = 1;
const REPLY: u16 = 2;
/// RFC 5227 1.1: least time between two defences.
pub const DEFEND_INTERVAL: Duration = Duration::from_secs(10);

service_counters! {
    /// What the ARP service did.
    ArpCounters {
        /// Requests for the gateway's address answered.
        replies = "arp_replies",
        /// Claims of the gateway's address by others.
        conflicts = "arp_conflicts",
        /// Announcements sent in defence.
        defended = "arp_defended",
    }
}

/// The ARP service.
pub struct Arp {
    lan: LanConfig,
    defended_at: Option<Instant>,
    counters: ArpCounters,
}

/// The fields of an Ethernet/IPv4 ARP packet.
struct Message {
    operation: u16,
    sender_mac: Mac,
    sender: [u8; 4],
    target: [u8; 4],
}

impl Message {
    fn parse(bytes: &[u8]) -> Result<Self, DropReason> {
        let bytes = bytes.get(..ARP_LEN).ok_or(DropReason::Truncated)?;
        let fixed = (be16(bytes, 0), be16(bytes, 2), bytes[4], bytes[5]);
        if fixed != (HARDWARE_ETHERNET, ETHERTYPE_IPV4, 6, 4) {
            return Err(DropReason::Malformed);
        }
        let sender_mac = Mac::at(bytes, 8);
        if sender_mac.is_group() || sender_mac == Mac::default() {
            return Err(DropReason::Malformed);
        }
        Ok(Self {
            operation: be16(bytes, 6),
            sender_mac,
            sender: [bytes[14], bytes[15], bytes[16], bytes[17]],
            target: [bytes[24], bytes[25], bytes[26], bytes[27]],
        })
    }
}

impl Arp {
    /// A service for the gateway of `lan`.
    pub fn new(lan: LanConfig) -> Self {
        Self {
            lan,
            defended_at: None,
            counters: ArpCounters::default(),
        }
    }

    fn defend(&mut self, now: Instant, out: &mut dyn Outbox) {
        self.counters.conflicts += 1;
        if self
            .defended_at
            .is_some_and(|at| now < at + DEFEND_INTERVAL)
        {
            return;
        }
        self.defended_at = Some(now);
        self.counters.defended += 1;
        // An announcement is a request for one's own address (RFC 5227 2.3).
        request(&self.lan, Mac::BROADCAST, self.lan.address, out);
    }
}

/// Asks the station at `destination`, or all, for the MAC of `target`.
pub(super) fn request<O: Outbox + ?Sized>(
    lan: &LanConfig,
    destination: Mac,
    target: Ipv4Addr,
    out: &mut O,
) {
    let asked = (Mac::default(), target.octets());
    send(
        lan,
        (REQUEST, destination),
        lan.address.octets(),
        asked,
        out,
    );
}

/// Asks all stations whether one has `target`, for somebody who may get it: with no address as the sender's,
/// so that nobody learns anything from the question (RFC 5227 2.1.1).
pub fn probe(lan: &LanConfig, target: Ipv4Addr, out: &mut dyn Outbox) {
    let asked = (Mac::default(), target.octets());
    send(lan, (REQUEST, Mac::BROADCAST), [0; 4], asked, out);
}

/// The address that a packet's sender says by ARP is its own. Who speaks for another says nothing.
pub fn spoken_for(packet: &Packet<'_>) -> Option<Ipv4Addr> {
    let Body::Arp(bytes) = &packet.body else {
        return None;
    };
    let message = Message::parse(bytes).ok()?;
    let sender = Ipv4Addr::from(message.sender);
    (message.sender_mac == packet.source && !sender.is_unspecified()).then_some(sender)
}

fn send<O: Outbox + ?Sized>(
    lan: &LanConfig,
    (operation, destination): (u16, Mac),
    sender: [u8; 4],
    (target_mac, target): (Mac, [u8; 4]),
    out: &mut O,
) {
    let buffer = out.buffer();
    write_ethernet(buffer, destination, lan.mac, ETHERTYPE_ARP);
    let arp = &mut buffer[ETH_HEADER_LEN..ETH_HEADER_LEN + ARP_LEN];
    arp[..2].copy_from_slice(&HARDWARE_ETHERNET.to_be_bytes());
    arp[2..4].copy_from_slice(&ETHERTYPE_IPV4.to_be_bytes());
    arp[4..6].copy_from_slice(&[6, 4]);
    arp[6..8].copy_from_slice(&operation.to_be_bytes());
    arp[8..14].copy_from_slice(&lan.mac.0);
    arp[14..18].copy_from_slice(&sender);
    arp[18..24].copy_from_slice(&target_mac.0);
    arp[24..28].copy_from_slice(&target);
    out.send(ETH_HEADER_LEN + ARP_LEN, Offload::default());
}

impl Service for Arp {
    fn name(&self) -> &'static str {
        "arp"
    }

    fn claims(&self, packet: &Packet<'_>) -> bool {
        matches!(packet.body, Body::Arp(_))
    }

    fn handle(&mut self, packet: &Packet<'_>, now: Instant, out: &mut dyn Outbox) -> Handled {
        let Body::Arp(bytes) = packet.body else {
            return Err(DropReason::Unclaimed);
        };
        let message = Message::parse(bytes)?;
        let gateway = self.lan.address.octets();
        if message.sender == gateway && message.sender_mac != self.lan.mac {
            self.defend(now, out);
            return Err(DropReason::AddressConflict);
        }
        match message.operation {
            // A probe (sender 0.0.0.0, RFC 5227 2.1.1) is answered like any request: that tells the
            // prober that the address is taken.
            REQUEST if message.target == gateway => {
                self.counters.replies += 1;
                let asker = (message.sender_mac, message.sender);
                send(&self.lan, (REPLY, packet.source), gateway, asker, out);
                Ok(())
            }
            // Between guests, or a reply, which is for [`super::neighbor`].
            REQUEST | REPLY => Ok(()),
            _ => Err(DropReason::Malformed),
        }
    }

    fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.counters.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{GUEST, GUEST_ADDRESS, Kept, lan, parse};
    use super::*;

    const OTHER: Ipv4Addr = Ipv4Addr::new(192, 168, 122, 78);

    fn arp(operation: u16, sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
        let mut frame = vec![0; 60];
        write_ethernet(&mut frame, Mac::BROADCAST, GUEST, ETHERTYPE_ARP);
        frame[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, operation as u8]);
        frame[22..28].copy_from_slice(&GUEST.0);
        frame[28..32].copy_from_slice(&sender.octets());
        frame[38..42].copy_from_slice(&target.octets());
        frame
    }

    fn ask(service: &mut Arp, frame: &[u8], now: Instant, out: &mut Kept) -> Handled {
        let packet = parse(frame);
        assert!(service.claims(&packet));
        service.handle(&packet, now, out)
    }

    #[test]
    fn answers_requests_and_probes_for_the_gateway() {
        let (mut service, mut out) = (Arp::new(lan()), Kept::new());
        for sender in [GUEST_ADDRESS, Ipv4Addr::UNSPECIFIED] {
            let request = arp(1, sender, lan().address);
            assert_eq!(ask(&mut service, &request, Instant::ZERO, &mut out), Ok(()));
            let reply = out.take();
            assert_eq!(reply.len(), 42);
            assert_eq!(Mac::at(&reply, 0), GUEST);
            assert_eq!(Mac::at(&reply, 6), lan().mac);
            assert_eq!(reply[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
            assert_eq!(Mac::at(&reply, 22), lan().mac);
            assert_eq!(reply[28..32], lan().address.octets());
            assert_eq!(Mac::at(&reply, 32), GUEST);
            assert_eq!(reply[38..42], sender.octets());
        }
        assert_eq!(service.counters.replies, 2);
    }

    #[test]
    fn is_silent_for_other_addresses_and_replies() {
        let (mut service, mut out) = (Arp::new(lan()), Kept::new());
        for frame in [
            arp(1, GUEST_ADDRESS, OTHER),
            arp(1, GUEST_ADDRESS, Ipv4Addr::new(8, 8, 8, 8)),
            arp(1, GUEST_ADDRESS, GUEST_ADDRESS),
            arp(2, GUEST_ADDRESS, lan().address),
        ] {
            assert_eq!(ask(&mut service, &frame, Instant::ZERO, &mut out), Ok(()));
        }
        assert!(out.frames.is_empty());
        assert_eq!(service.counters, ArpCounters::default());
    }

    #[test]
    fn defends_its_address_at_a_bounded_rate() {
        let (mut service, mut out) = (Arp::new(lan()), Kept::new());
        let claims = [
            arp(1, lan().address, lan().address),
            arp(2, lan().address, GUEST_ADDRESS),
            arp(1, lan().address, OTHER),
        ];
        let mut now = Instant::from_secs(100);
        for _ in 0..20 {
            for claim in &claims {
                assert_eq!(
                    ask(&mut service, claim, now, &mut out),
                    Err(DropReason::AddressConflict)
                );
            }
            now += Duration::from_secs(1);
        }
        assert_eq!(out.frames.len(), 2, "20 s hold two intervals");
        let announcement = &out.frames[0];
        assert_eq!(Mac::at(announcement, 0), Mac::BROADCAST);
        assert_eq!(announcement[20..22], [0, 1]);
        assert_eq!(Mac::at(announcement, 22), lan().mac);
        assert_eq!(announcement[28..32], lan().address.octets());
        assert_eq!(announcement[38..42], lan().address.octets());
        assert_eq!(
            (service.counters.conflicts, service.counters.defended),
            (60, 2)
        );
    }

    #[test]
    fn drops_what_is_not_ethernet_ipv4_arp() {
        let (mut service, mut out) = (Arp::new(lan()), Kept::new());
        let good = arp(1, GUEST_ADDRESS, lan().address);
        for (at, value) in [(15, 6), (16, 0x86), (18, 8), (19, 16), (21, 9), (22, 0x53)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert_eq!(
                ask(&mut service, &bad, Instant::ZERO, &mut out),
                Err(DropReason::Malformed),
                "byte {at}"
            );
        }
        for len in ETH_HEADER_LEN..ETH_HEADER_LEN + ARP_LEN {
            assert_eq!(
                ask(&mut service, &good[..len], Instant::ZERO, &mut out),
                Err(DropReason::Truncated)
            );
        }
        assert!(out.frames.is_empty());
    }
}
