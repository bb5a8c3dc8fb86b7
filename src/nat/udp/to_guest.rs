//! What comes from outside by a mapping's socket, on its way to the guest: who gets through, and as
//! whom.

use std::net::SocketAddr;

use super::UdpMapping;
use super::train::Train;
use crate::gateway::{LanConfig, Outbox};
use crate::nat::Datagram;
use crate::nat::egress::{Egress, is_never_outside};
use crate::nat::icmp::ttl_to_guest;
use crate::nat::mapping::Dependence;
use crate::stats::DropReason;
use crate::wire::Family;

/// The way to one mapping's guest.
pub(super) struct ToGuest<'a> {
    pub lan: &'a LanConfig,
    pub egress: &'a Egress,
    pub guest: SocketAddr,
    /// Of the path to it.
    pub mtu: u16,
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
        let train = Train {
            lan: self.lan,
            mtu: self.mtu,
            from: self.egress.shown(source),
            to: self.guest,
            mac: self.mapping.station.mac,
            ttl: ttl_to_guest(datagram.ttl)?,
            tos: datagram.tos,
            payload: datagram.payload,
            segment: datagram.segment,
        };
        train.send(self.fragment_id, out)?;
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
}
