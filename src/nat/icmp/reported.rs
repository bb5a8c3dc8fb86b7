//! ICMP errors that the host's datagram sockets got (IP_RECVERR), passed on to the guest whose datagram
//! they are about.
//!
//! Type and code stay, and the error comes from the router or host that sent it, so that a guest's
//! `traceroute` names it (RFC 5508 REQ-4). The kernel gives the quoted payload alone: the headers before
//! it are written as the guest wrote them. What it can't tell are the TTL, identification and length
//! that the packet had on its way.
//!
//! An error neither refreshes nor ends a mapping (RFC 4787 REQ-12, RFC 5508 REQ-6). One about a peer that
//! the guest did not write to is dropped.

use std::net::{IpAddr, SocketAddr};

use super::error::{self, ErrorKind, ErrorSender, Header, QUOTE_LEN_MAX};
use crate::frame::{ETH_HEADER_LEN, Instant};
use crate::gateway::{LanConfig, Outbox};
use crate::nat::egress::{Egress, is_never_outside};
use crate::nat::mapping::Mapping;
use crate::nat::{HostError, SocketError, Uplink};
use crate::stats::DropReason;
use crate::wire::{
    self, Family, IpFields, PROTO_ICMP, PROTO_ICMPV6, PROTO_UDP, UDP_HEADER_LEN, checksum,
};

/// The way to a mapping's guest.
#[derive(Clone, Copy)]
pub(in crate::nat) struct Way<'a> {
    pub lan: &'a LanConfig,
    pub egress: &'a Egress,
    /// Its address and port or echo identifier.
    pub guest: SocketAddr,
}

/// Reads the errors that wait on a mapping's socket and tells its guest. Gives the MTU of the route, if
/// the host itself refused to send a datagram because of it: the caller has that packet.
pub(in crate::nat) fn hear<S, U: Uplink + ?Sized, O: Outbox + ?Sized>(
    way: Way<'_>,
    mapping: &Mapping<S>,
    now: Instant,
    (up, out, errors): (&mut U, &mut O, &mut ErrorSender),
    drops: &mut dyn FnMut(DropReason),
) -> Option<u32> {
    let mut route_mtu = None;
    up.recv_errors(mapping.socket, &mut |reported| {
        if reported.offender.is_none() && reported.error == HostError::TooBig {
            route_mtu = Some(reported.mtu).filter(|&mtu| mtu != 0);
            return;
        }
        let told = if mapping.peers.contains(reported.to) {
            pass_on(way, mapping, &reported, now, (out, errors))
        } else {
            Err(DropReason::Filtered)
        };
        if let Err(reason) = told {
            drops(reason);
        }
    });
    route_mtu
}

fn pass_on<S, O: Outbox + ?Sized>(
    Way { lan, egress, guest }: Way<'_>,
    mapping: &Mapping<S>,
    reported: &SocketError<'_>,
    now: Instant,
    (out, errors): (&mut O, &mut ErrorSender),
) -> Result<(), DropReason> {
    let header = header(reported)?;
    let reported = &SocketError {
        to: egress.shown(reported.to),
        ..*reported
    };
    let mut quote = [0; ETH_HEADER_LEN + QUOTE_LEN_MAX];
    let len = write_quote(&mut quote, guest, mapping.external != 0, reported, header)?;
    let about = &quote[ETH_HEADER_LEN..len];
    // No router has such an address; the gateway stands in for who claims it.
    let offender = reported.offender.map(|it| egress.shown_address(it));
    let offender = offender.filter(|&offender| {
        Family::of(offender) == Family::of(guest.ip()) && !is_never_outside(offender)
    });
    let from = offender.or(error::gateway_address(lan, guest.ip()));
    let from = from.ok_or(DropReason::HostRefused)?;
    let mac = mapping.station.mac;
    // What the limit holds back is counted there.
    errors.send_with(guest.ip(), now, out, |buffer| {
        Some(error::write(buffer, (lan.mac, from), header, mac, about))
    });
    Ok(())
}

/// Type, code and rest for the guest. Only destination unreachable, packet too big and time exceeded
/// are passed on: parameters of headers that the host wrote mean nothing to the guest.
pub(in crate::nat) fn header(reported: &SocketError<'_>) -> Result<Header, DropReason> {
    let v4 = reported.to.is_ipv4();
    if reported.offender.is_none() {
        let kind = match reported.error {
            HostError::Refused => ErrorKind::PortUnreachable,
            HostError::HostUnreachable | HostError::TimedOut => ErrorKind::HostUnreachable,
            HostError::NetUnreachable => ErrorKind::NetUnreachable,
            HostError::Prohibited => ErrorKind::Prohibited,
            _ => return Err(DropReason::HostRefused),
        };
        return Ok(if v4 {
            kind.header4()
        } else {
            kind.header6(&[])
        });
    }
    match (v4, reported.of_type, reported.code) {
        (true, 3, 4) => Ok(ErrorKind::TooBig { mtu: reported.mtu }.header4()),
        (true, 3 | 11, code) | (false, 1 | 3, code) => Ok((reported.of_type, code, 0)),
        (false, 2, code) => Ok((2, code, reported.mtu)),
        _ => Err(DropReason::Filtered),
    }
}

/// Writes the guest's packet as far as it is known, behind room for an Ethernet header. Returns where it
/// ends.
fn write_quote(
    buffer: &mut [u8; ETH_HEADER_LEN + QUOTE_LEN_MAX],
    guest: SocketAddr,
    udp: bool,
    reported: &SocketError<'_>,
    (of_type, _, _): Header,
) -> Result<usize, DropReason> {
    let (source, destination) = (guest.ip(), reported.to.ip());
    let (protocol, expired) = match (udp, source) {
        (true, IpAddr::V4(_)) => (PROTO_UDP, of_type == 11),
        (true, IpAddr::V6(_)) => (PROTO_UDP, of_type == 3),
        (false, IpAddr::V4(_)) => (PROTO_ICMP, of_type == 11),
        (false, IpAddr::V6(_)) => (PROTO_ICMPV6, of_type == 3),
    };
    if Family::of(source) != Family::of(destination) {
        return Err(DropReason::Malformed);
    }
    let fields = IpFields {
        source,
        destination,
        protocol,
        ttl: if expired { 1 } else { wire::TTL_DEFAULT },
        tos: 0,
    };
    let transport_len = if udp { UDP_HEADER_LEN } else { 0 } + reported.payload.len();
    let room = QUOTE_LEN_MAX - wire::ip_header_len(source);
    let transport_len = transport_len.min(room);
    let at = wire::write_ip(buffer, Default::default(), fields, transport_len);
    let transport = &mut buffer[at..][..transport_len];
    if udp {
        let (header, payload) = transport.split_at_mut(UDP_HEADER_LEN);
        payload.copy_from_slice(&reported.payload[..payload.len()]);
        header[..2].copy_from_slice(&guest.port().to_be_bytes());
        header[2..4].copy_from_slice(&reported.to.port().to_be_bytes());
        header[4..6].copy_from_slice(&(transport_len as u16).to_be_bytes());
        // Right if all of the datagram was quoted, as it is of a probe.
        let sum = match !checksum::transport(source, destination, protocol, transport) {
            0 => 0xffff,
            sum => sum,
        };
        transport[6..8].copy_from_slice(&sum.to_be_bytes());
    } else {
        if transport_len < super::ECHO_HEADER_LEN {
            return Err(DropReason::Malformed);
        }
        transport.copy_from_slice(&reported.payload[..transport_len]);
        let (old, new) = (wire::be16(transport, 4), guest.port());
        transport[4..6].copy_from_slice(&new.to_be_bytes());
        if source.is_ipv4() {
            // RFC 1624 3, as the quote may be cut.
            let sum = u64::from(!wire::be16(transport, 2)) + u64::from(!old) + u64::from(new);
            transport[2..4].copy_from_slice(&(!checksum::fold(sum)).to_be_bytes());
        } else {
            error::complete_checksum(transport, source, destination);
        }
    }
    Ok(at + transport_len)
}
