//! A datagram from outside, or a train of them, as the frames that a guest gets: super-frames where the
//! path to it carries each of the datagrams, and fragments of those that it does not.

use std::net::SocketAddr;

use crate::frame::{ETH_HEADER_LEN, Mac};
use crate::gateway::fragment::cut;
use crate::gateway::{LanConfig, Outbox};
use crate::offload::{Csum, Gso, Offload};
use crate::stats::DropReason;
use crate::wire::{self, IpFields, PROTO_UDP, UDP_HEADER_LEN, checksum};

/// Place of the checksum in a UDP header (RFC 768).
const CHECKSUM_AT: usize = 6;

/// What a guest is to get.
pub struct Train<'a> {
    /// The guest's LAN.
    pub lan: &'a LanConfig,
    /// Of the path to the guest, the LAN's at most.
    pub mtu: u16,
    /// Whom the guest sees.
    pub from: SocketAddr,
    /// The guest.
    pub to: SocketAddr,
    /// Its MAC.
    pub mac: Mac,
    /// TTL or hop limit.
    pub ttl: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// The datagrams, one behind the other.
    pub payload: &'a [u8],
    /// Length of each of them but the last, which may be shorter; without, there is one.
    pub segment: Option<u16>,
}

impl Train<'_> {
    /// Sends it. `fragment_id` is the identification of the packet that was cut last.
    ///
    /// # Errors
    /// [`DropReason::TooBig`]: no IP packet holds such a datagram.
    ///
    /// # Panics
    /// If the ends are of different families.
    pub fn send<O: Outbox + ?Sized>(
        &self,
        fragment_id: &mut u32,
        out: &mut O,
    ) -> Result<(), DropReason> {
        let payload = self.payload;
        let segment = self
            .segment
            .map(usize::from)
            .filter(|size| (1..payload.len()).contains(size));
        let longest = segment.unwrap_or(payload.len());
        let payload_max = wire::ip_payload_max(self.to.ip()) - UDP_HEADER_LEN;
        if longest > payload_max {
            return Err(DropReason::TooBig);
        }
        let headers_len = wire::ip_header_len(self.to.ip()) + UDP_HEADER_LEN;
        if headers_len + longest > usize::from(self.mtu) {
            // An empty datagram fits any LAN, so that none is lost here.
            for datagram in payload.chunks(longest) {
                self.send_cut(datagram, fragment_id, out);
            }
            return Ok(());
        }
        let Some(size) = segment else {
            self.send_frame(payload, None, out);
            return Ok(());
        };
        // A super-frame is one IP packet: 65,535 bytes hold all of a train unless the host raised
        // gro_max_size.
        for train in payload.chunks(payload_max / size * size) {
            let gso = (train.len() > size).then_some(size as u16);
            self.send_frame(train, gso, out);
        }
        Ok(())
    }

    /// Writes headers and `payload`, which fits one IP packet, with the checksum's pseudo-header sum.
    /// Returns where UDP begins and where the frame ends.
    fn write(&self, frame: &mut [u8], payload: &[u8]) -> (usize, usize) {
        let udp_len = UDP_HEADER_LEN + payload.len();
        let (source, destination) = (self.from.ip(), self.to.ip());
        let fields = IpFields {
            source,
            destination,
            protocol: PROTO_UDP,
            ttl: self.ttl,
            tos: self.tos,
        };
        let at = wire::write_ip(frame, (self.mac, self.lan.mac), fields, udp_len);
        // Partial: with the length of the whole train, as the kernel's segmentation expects it
        // (net/ipv4/udp_offload.c, __udp_gso_segment).
        let sum = checksum::pseudo_header(source, destination, PROTO_UDP, udp_len);
        let udp = &mut frame[at..][..udp_len];
        udp[..2].copy_from_slice(&self.from.port().to_be_bytes());
        udp[2..4].copy_from_slice(&self.to.port().to_be_bytes());
        udp[4..6].copy_from_slice(&(udp_len as u16).to_be_bytes());
        udp[CHECKSUM_AT..UDP_HEADER_LEN].copy_from_slice(&checksum::fold(sum).to_be_bytes());
        udp[UDP_HEADER_LEN..].copy_from_slice(payload);
        (at, at + udp_len)
    }

    /// As one frame, its checksum left to the egress port.
    fn send_frame<O: Outbox + ?Sized>(&self, payload: &[u8], gso: Option<u16>, out: &mut O) {
        let (at, len) = self.write(out.buffer(), payload);
        let offload = Offload {
            csum: Csum::Partial {
                start: at as u16,
                offset: CHECKSUM_AT as u16,
            },
            gso: gso.map_or(Gso::None, Gso::Udp),
            ecn: false,
        };
        out.send(len, offload);
    }

    /// In fragments, the checksum complete.
    fn send_cut<O: Outbox + ?Sized>(&self, payload: &[u8], fragment_id: &mut u32, out: &mut O) {
        let frame = out.buffer();
        let (at, len) = self.write(frame, payload);
        let udp = &mut frame[at..len];
        // The pseudo-header's sum is in the field already. 0 would mean "none" (RFC 768).
        let sum = match !checksum::fold(checksum::sum(udp)) {
            0 => 0xffff,
            sum => sum,
        };
        udp[CHECKSUM_AT..UDP_HEADER_LEN].copy_from_slice(&sum.to_be_bytes());
        if len > ETH_HEADER_LEN + usize::from(self.mtu) {
            *fragment_id = fragment_id.wrapping_add(1);
            cut(out, len, self.mtu, *fragment_id);
        } else {
            // The shorter end of a train: in IPv6 a fragment that is all of its packet is an atomic one,
            // which nobody is to send (RFC 8021).
            out.send(len, Offload::default());
        }
    }
}
