//! Cutting a datagram that is longer than the LAN's MTU into fragments for a guest. It is cut where it
//! lies, in the outbox's buffer: each fragment's part moves down behind the headers and leaves from
//! there, over bytes that have left already.

use crate::frame::ETH_HEADER_LEN;
use crate::gateway::Outbox;
use crate::offload::Offload;
use crate::wire::ipv6::{FRAGMENT, FRAGMENT_HEADER_LEN, IPV6_HEADER_LEN};
use crate::wire::{IPV4_HEADER_LEN, checksum};

/// Sends the packet in the first `len` bytes of the buffer, of either family, in fragments of at most
/// `mtu` bytes: see [`cut4`] and [`cut6`]. IPv4 has the low half of `id`.
pub fn cut<O: Outbox + ?Sized>(out: &mut O, len: usize, mtu: u16, id: u32) {
    match out.buffer()[ETH_HEADER_LEN] >> 4 {
        4 => cut4(out, len, mtu, id as u16),
        _ => cut6(out, len, mtu, id),
    }
}

/// Sends the IPv4 packet in the first `len` bytes of the buffer, which has a header without options and
/// a complete transport checksum, in fragments of at most `mtu` bytes.
///
/// # Panics
/// If the headers are not there, or `mtu` leaves no room for eight bytes behind them.
pub fn cut4<O: Outbox + ?Sized>(out: &mut O, len: usize, mtu: u16, id: u16) {
    const PAYLOAD_AT: usize = ETH_HEADER_LEN + IPV4_HEADER_LEN;
    let room = (usize::from(mtu) - IPV4_HEADER_LEN) & !7;
    assert!(room > 0, "an MTU of {mtu} holds no fragment");
    let mut at = PAYLOAD_AT;
    while at < len {
        let part = room.min(len - at);
        let frame = out.buffer();
        debug_assert_eq!(frame[ETH_HEADER_LEN], 0x45);
        frame.copy_within(at..at + part, PAYLOAD_AT);
        let offset = (at - PAYLOAD_AT) as u16 / 8;
        at += part;
        let more = if at < len { 0x2000 } else { 0 };
        let header = &mut frame[ETH_HEADER_LEN..PAYLOAD_AT];
        header[2..4].copy_from_slice(&((IPV4_HEADER_LEN + part) as u16).to_be_bytes());
        header[4..6].copy_from_slice(&id.to_be_bytes());
        header[6..8].copy_from_slice(&(more | offset).to_be_bytes());
        header[10..12].fill(0);
        let sum = !checksum::fold(checksum::sum(header));
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        out.send(PAYLOAD_AT + part, Offload::default());
    }
}

/// Sends the IPv6 packet in the first `len` bytes of the buffer, which has no extension headers and a
/// complete transport checksum, in fragments of at most `mtu` bytes.
///
/// # Panics
/// If the headers are not there, `mtu` leaves no room for eight bytes behind them, or the buffer is not
/// longer than the packet by a fragment header.
pub fn cut6<O: Outbox + ?Sized>(out: &mut O, len: usize, mtu: u16, id: u32) {
    const FRAGMENT_AT: usize = ETH_HEADER_LEN + IPV6_HEADER_LEN;
    const PAYLOAD_AT: usize = FRAGMENT_AT + FRAGMENT_HEADER_LEN;
    let room = (usize::from(mtu) - IPV6_HEADER_LEN - FRAGMENT_HEADER_LEN) & !7;
    assert!(room > 0, "an MTU of {mtu} holds no fragment");
    let frame = out.buffer();
    frame.copy_within(FRAGMENT_AT..len, PAYLOAD_AT);
    frame[FRAGMENT_AT] = frame[ETH_HEADER_LEN + 6];
    frame[FRAGMENT_AT + 1] = 0;
    frame[FRAGMENT_AT + 4..PAYLOAD_AT].copy_from_slice(&id.to_be_bytes());
    frame[ETH_HEADER_LEN + 6] = FRAGMENT;
    let len = len + FRAGMENT_HEADER_LEN;
    let mut at = PAYLOAD_AT;
    while at < len {
        let part = room.min(len - at);
        let frame = out.buffer();
        frame.copy_within(at..at + part, PAYLOAD_AT);
        let offset = (at - PAYLOAD_AT) as u16;
        at += part;
        let field = offset | u16::from(at < len);
        let behind = (FRAGMENT_HEADER_LEN + part) as u16;
        frame[ETH_HEADER_LEN + 4..ETH_HEADER_LEN + 6].copy_from_slice(&behind.to_be_bytes());
        frame[FRAGMENT_AT + 2..FRAGMENT_AT + 4].copy_from_slice(&field.to_be_bytes());
        out.send(PAYLOAD_AT + part, Offload::default());
    }
}
