//! Software segmentation: what the kernel's GSO does, for ports that can't.

use super::Offload;
use super::layout::{Family, Headers, IPV6_HEADER_LEN, TCP_FLAGS_AT, Transport};
use crate::frame::Frame;
use crate::stats::DropReason;
use crate::wire::{be16, checksum};

const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;

/// Cuts `bytes` into frames of `size` payload bytes, the last one maybe shorter, and emits them out
/// of `scratch` one by one. Each has the headers of the whole (VLAN tags, IP options and extension
/// headers included), adapted, with complete checksums.
pub(super) fn segment(
    bytes: &[u8],
    headers: &Headers,
    size: usize,
    scratch: &mut [u8],
    emit: &mut impl FnMut(Frame<'_>),
) -> Result<(), DropReason> {
    let (head, payload) = bytes.split_at(headers.payload_at);
    if size == 0 || payload.is_empty() {
        return Err(DropReason::BadOffload);
    }
    let room = head.len() + size.min(payload.len());
    let scratch = scratch.get_mut(..room).ok_or(DropReason::EgressTooBig)?;
    // The head is copied once: each round overwrites exactly the fields that the last one did.
    scratch[..head.len()].copy_from_slice(head);
    let ip = &headers.ip;
    // Each segment adds its length.
    let pseudo_sum = headers.transport.pseudo_sum(head, ip.network_at, ip.family);
    let last = payload.len().div_ceil(size) - 1;
    for (index, part) in payload.chunks(size).enumerate() {
        let segment = &mut scratch[..head.len() + part.len()];
        segment[head.len()..].copy_from_slice(part);
        write_ip(segment, head, headers, index);
        let transport = &mut segment[headers.ip.transport_at..];
        let original = &head[headers.ip.transport_at..];
        match headers.transport {
            Transport::Tcp => {
                write_tcp(transport, original, index * size, index == 0, index == last)
            }
            Transport::Udp => put16(transport, 4, transport.len() as u16),
        }
        write_checksum(transport, headers.transport.csum_at(), pseudo_sum);
        emit(Frame {
            bytes: segment,
            offload: Offload::default(),
        });
    }
    Ok(())
}

/// Length fields; for IPv4 the identification and the header checksum too.
fn write_ip(segment: &mut [u8], head: &[u8], headers: &Headers, index: usize) {
    let ip = &mut segment[headers.ip.network_at..];
    let packet_len = ip.len();
    match headers.ip.family {
        Family::V4 => {
            let id = be16(head, headers.ip.network_at + 4).wrapping_add(index as u16);
            put16(ip, 2, packet_len as u16);
            put16(ip, 4, id);
            put16(ip, 10, 0);
            let header_len = headers.ip.transport_at - headers.ip.network_at;
            let sum = !checksum::fold(checksum::sum(&ip[..header_len]));
            put16(ip, 10, sum);
        }
        Family::V6 => put16(ip, 4, (packet_len - IPV6_HEADER_LEN) as u16),
    }
}

/// Sequence number and flags. FIN and PSH belong to the end of the data; CWR is said once, with the
/// first segment (RFC 3168 6.1.2).
fn write_tcp(tcp: &mut [u8], original: &[u8], sent: usize, first: bool, last: bool) {
    let sequence = u32::from_be_bytes([original[4], original[5], original[6], original[7]]);
    tcp[4..8].copy_from_slice(&sequence.wrapping_add(sent as u32).to_be_bytes());
    let mut flags = original[TCP_FLAGS_AT];
    if !first {
        flags &= !TCP_CWR;
    }
    if !last {
        flags &= !(TCP_FIN | TCP_PSH);
    }
    tcp[TCP_FLAGS_AT] = flags;
}

fn write_checksum(transport: &mut [u8], csum_at: usize, pseudo_sum: u64) {
    put16(transport, csum_at, 0);
    let sum = pseudo_sum + transport.len() as u64 + checksum::sum(transport);
    // RFC 768: UDP sends 0 as all ones; to TCP the two are the same number.
    let sum = match !checksum::fold(sum) {
        0 => 0xffff,
        sum => sum,
    };
    put16(transport, csum_at, sum);
}

fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}
