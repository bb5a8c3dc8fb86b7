//! What comes from outside by a mapping's socket, on its way to the guest: filtered, given headers, and
//! cut where the LAN can't carry it.

use std::net::SocketAddr;

use super::UdpMapping;
use crate::frame::ETH_HEADER_LEN;
use crate::gateway::fragment::cut;
use crate::gateway::{LanConfig, Outbox};
use crate::nat::Datagram;
use crate::nat::egress::{Egress, is_never_outside};
use crate::nat::icmp::ttl_to_guest;
use crate::nat::mapping::Dependence;
use crate::offload::{Csum, Gso, Offload};
use crate::stats::DropReason;
use crate::wire::{self, Family, IpFields, PROTO_UDP, UDP_HEADER_LEN, checksum};

/// The way to one mapping's guest.
pub(super) struct ToGuest<'a> {
    pub lan: &'a LanConfig,
    pub egress: &'a Egress,
    pub guest: SocketAddr,
    pub mapping: &'a UdpMapping,
    pub filtering: Dependence,
    /// Identification of the packet that was cut last.
    pub fragment_id: &'a mut u32,
}

impl ToGuest<'_> {
    /// Sends a datagram, or a train as one super-frame, to the guest. Returns whether it is from an
    /// address that the guest wrote to.
    pub fn send<O: Outbox + ?Sized>(
        &mut self,
        datagram: &Datagram<'_>,
        out: &mut O,
    ) -> Result<bool, DropReason> {
        let source = datagram.source;
        let known = self.mapping.peers.contains_address(source.ip());
        if Family::of(source.ip()) != Family::of(self.guest.ip()) || !self.admits(source, known) {
            return Err(DropReason::Filtered);
        }
        let source = self.egress.shown(source);
        let fields = IpFields {
            source: source.ip(),
            destination: self.guest.ip(),
            protocol: PROTO_UDP,
            ttl: ttl_to_guest(datagram.ttl)?,
            tos: datagram.tos,
        };
        let payload = datagram.payload;
        let segment = datagram
            .segment
            .map(usize::from)
            .filter(|size| (1..payload.len()).contains(size));
        let longest = segment.unwrap_or(payload.len());
        let payload_max = wire::ip_payload_max(self.guest.ip()) - UDP_HEADER_LEN;
        if longest > payload_max {
            return Err(DropReason::TooBig);
        }
        let headers_len = wire::ip_header_len(self.guest.ip()) + UDP_HEADER_LEN;
        if headers_len + longest > usize::from(self.lan.mtu) {
            // An empty datagram fits any LAN, so that none is lost here.
            for datagram in payload.chunks(longest) {
                self.send_cut(source.port(), fields, datagram, out);
            }
            return Ok(known);
        }
        let Some(size) = segment else {
            self.send_frame(source.port(), fields, payload, None, out);
            return Ok(known);
        };
        // A super-frame is one IP packet: 65,535 bytes hold all of a train unless the host raised
        // gro_max_size.
        for train in payload.chunks(payload_max / size * size) {
            let gso = (train.len() > size).then_some(size as u16);
            self.send_frame(source.port(), fields, train, gso, out);
        }
        Ok(known)
    }

    /// Whether the mapping's filter lets `source` in (RFC 4787 5), and the policy, which has decided about
    /// those that the guest wrote to. Addresses that no packet from outside has, loopback and the LAN's own
    /// among them, need to be written to first whatever the filter.
    fn admits(&self, source: SocketAddr, known: bool) -> bool {
        if known && self.mapping.peers.contains(source) {
            return true;
        }
        let passes = match self.filtering {
            Dependence::EndpointIndependent => {
                known || !(is_never_outside(source.ip()) || self.lan.holds(source.ip()))
            }
            Dependence::AddressDependent => known,
            Dependence::AddressAndPortDependent => false,
        };
        passes && self.egress.allows_from(self.mapping.station.port, source)
    }

    /// Writes headers and `payload`, which fits one IP packet, with the checksum's pseudo-header sum.
    /// Returns where UDP begins and where the frame ends.
    fn write(
        &self,
        frame: &mut [u8],
        port: u16,
        fields: IpFields,
        payload: &[u8],
    ) -> (usize, usize) {
        let udp_len = UDP_HEADER_LEN + payload.len();
        let macs = (self.mapping.station.mac, self.lan.mac);
        let at = wire::write_ip(frame, macs, fields, udp_len);
        // Partial: with the length of the whole train, as the kernel's segmentation expects it
        // (net/ipv4/udp_offload.c, __udp_gso_segment).
        let IpFields {
            source,
            destination,
            ..
        } = fields;
        let sum = checksum::pseudo_header(source, destination, PROTO_UDP, udp_len);
        let udp = &mut frame[at..][..udp_len];
        udp[..2].copy_from_slice(&port.to_be_bytes());
        udp[2..4].copy_from_slice(&self.guest.port().to_be_bytes());
        udp[4..6].copy_from_slice(&(udp_len as u16).to_be_bytes());
        udp[6..8].copy_from_slice(&checksum::fold(sum).to_be_bytes());
        udp[UDP_HEADER_LEN..].copy_from_slice(payload);
        (at, at + udp_len)
    }

    /// As one frame, its checksum left to the egress port.
    fn send_frame<O: Outbox + ?Sized>(
        &self,
        port: u16,
        fields: IpFields,
        payload: &[u8],
        gso: Option<u16>,
        out: &mut O,
    ) {
        let (at, len) = self.write(out.buffer(), port, fields, payload);
        let offload = Offload {
            csum: Csum::Partial {
                start: at as u16,
                offset: 6,
            },
            gso: gso.map_or(Gso::None, Gso::Udp),
            ecn: false,
        };
        out.send(len, offload);
    }

    /// In fragments, the checksum complete.
    fn send_cut<O: Outbox + ?Sized>(
        &mut self,
        port: u16,
        fields: IpFields,
        payload: &[u8],
        out: &mut O,
    ) {
        let frame = out.buffer();
        let (at, len) = self.write(frame, port, fields, payload);
        let udp = &mut frame[at..len];
        // The pseudo-header's sum is in the field already.
        let sum = match !checksum::fold(checksum::sum(udp)) {
            0 => 0xffff,
            sum => sum,
        };
        udp[6..8].copy_from_slice(&sum.to_be_bytes());
        if len > ETH_HEADER_LEN + usize::from(self.lan.mtu) {
            *self.fragment_id = self.fragment_id.wrapping_add(1);
            cut(out, len, self.lan.mtu, *self.fragment_id);
        } else {
            // The shorter end of a train.
            out.send(len, Offload::default());
        }
    }
}
