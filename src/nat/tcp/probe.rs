//! SYNs that a guest sends a few hops only, as `traceroute -T` and `mtr --tcp` do.
//!
//! The host's socket sends its SYN as far less a hop, since the NAT is a router (RFC 1812 5.3.1), and has the
//! ICMP errors about it reported: what ended it goes to the guest, from who said so, about the guest's own SYN.
//! Once it is connected it sends as any socket does.

use super::super::egress::is_never_outside;
use super::super::icmp::{error, reported};
use super::super::{SockId, Uplink};
use crate::frame::Mac;
use crate::gateway::{LanConfig, Outbox};
use crate::offload::Offload;
use crate::wire::Family;

/// TTLs from here on are of hosts that mean to arrive: they begin with 64, 128 or 255, and have come a hop
/// or two; who looks for a path begins with 1, and ends with 30 as a rule.
const TTL_FAR: u8 = 33;

/// How many hops a SYN goes that comes with this TTL; `None`: as far as it takes.
pub fn hops(ttl: u8) -> Option<u8> {
    (2..TTL_FAR).contains(&ttl).then(|| ttl - 1)
}

/// Tells the guest who ended its SYN, if the host's socket was told. Returns whether that was so.
pub fn tell<U: Uplink + ?Sized, O: Outbox + ?Sized>(
    host: SockId,
    syn: &[u8],
    (lan, guest): (&LanConfig, Mac),
    (up, out): (&mut U, &mut O),
) -> bool {
    let mut told = false;
    up.recv_errors(host, &mut |reported| {
        let family = Family::of(reported.to.ip());
        let offender = reported
            .offender
            .filter(|&offender| Family::of(offender) == family && !is_never_outside(offender));
        let (Some(from), Ok(header)) = (offender, reported::header(&reported)) else {
            return;
        };
        if told {
            return;
        }
        told = true;
        let len = error::write(out.buffer(), (lan.mac, from), header, guest, syn);
        out.send(len, Offload::default());
    });
    told
}
