//! Joins neighbouring segments of one flow into super-frames: what the kernel's GRO does
//! (net/ipv4/tcp_offload.c, net/ipv4/udp_offload.c), for the frames of one batch.
//!
//! Only neighbours are joined, so no frame overtakes another of its port. The outcome is a super-frame
//! as [`super::admit`] lets in, from which segmentation makes the frames that went in, bit for bit but
//! for what IP leaves to the sender: the identification of packets that must not be fragmented
//! (RFC 6864 4.1).
//!
//! What a hostile guest can try: to have a broken checksum made good. A sum that is complete is
//! verified before its frame is joined; one that is left to us would have been made good anyway.
//!
//! An acknowledgment that says nothing which a later one of the batch does not say is left out
//! ([`acks`]).

use self::acks::Acks;
use super::layout::{Family, Ip, TCP_FLAGS_AT, TCP_HEADER_LEN, Transport, network};
use super::{Caps, Csum, Gso, Offload};
use crate::frame::{Batch, Frame};
use crate::wire::{IPV4_HEADER_LEN, PROTO_TCP, PROTO_UDP, UDP_HEADER_LEN, be16, checksum};

mod acks;

/// Longest super-frame, Ethernet header included: beyond, a tap's gso_max_size (65,536) makes the kernel
/// segment in software.
const SUPER_FRAME_LEN_MAX: usize = 65_535;

const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_ACK: u8 = 0x10;
const TCP_ECE: u8 = 0x40;
const IPV4_DONT_FRAGMENT: u8 = 0x40;

/// Joins what can be joined of `batch`. `takes` says what the receiver of a frame takes undone; it is asked
/// once for each frame that has a neighbour to be joined. What is redundant goes to no receiver. Returns how
/// many frames less there are.
#[inline]
pub fn coalesce(batch: &mut Batch, takes: impl FnMut(&Frame<'_>) -> Caps) -> usize {
    // A lone frame is what request and response bring: not a cycle for it.
    match batch.len() {
        0 | 1 => 0,
        _ => join(batch, takes),
    }
}

fn join(batch: &mut Batch, mut takes: impl FnMut(&Frame<'_>) -> Caps) -> usize {
    let (buffer, frames) = batch.parts_mut();
    let before = frames.len();
    let (mut kept, mut open) = (0, None::<Train>);
    let mut acks = Acks::new();
    for next in 0..before {
        let (range, offload) = frames[next].clone();
        let segment = Segment::of(&buffer[range.clone()], offload);
        if let (Some(train), Some(segment)) = (&mut open, &segment)
            && segment.payload_len() > 0
            && train.admits(buffer, range.start, segment, &mut takes)
        {
            train.append(buffer, range.start, segment);
            continue;
        }
        if let Some(train) = open.take() {
            frames[kept - 1] = train.finish(buffer);
        }
        frames[kept] = (range.clone(), offload);
        match segment {
            Some(segment) if segment.payload_len() > 0 => {
                open = Some(Train::begin(range.start, offload, segment));
            }
            Some(segment) => acks.note(kept, &segment, buffer, frames),
            None => {}
        }
        kept += 1;
    }
    if let Some(train) = open {
        frames[kept - 1] = train.finish(buffer);
    }
    frames.truncate(kept);
    if acks.has_redundant() {
        frames.retain(|(range, _)| !range.is_empty());
    }
    before - frames.len()
}

/// A frame that is one segment: IP without options or extension headers, not a fragment.
#[derive(Clone, Copy)]
struct Segment {
    network_at: usize,
    transport_at: usize,
    payload_at: usize,
    len: usize,
    family: Family,
    transport: Transport,
    csum: Csum,
}

impl Segment {
    fn of(bytes: &[u8], offload: Offload) -> Option<Segment> {
        if offload.gso != Gso::None {
            return None;
        }
        let (network_at, ethertype) = network(bytes)?;
        let ip = Ip::at(bytes, network_at, ethertype)?;
        let header_len = match ip.family {
            Family::V4 => IPV4_HEADER_LEN,
            Family::V6 => super::layout::IPV6_HEADER_LEN,
        };
        let plain = ip.transport_at == network_at + header_len && !ip.fragment;
        // No padding: what follows the packet would end up within the data.
        if !plain || ip.packet_len != bytes.len() - network_at {
            return None;
        }
        let transport = bytes.get(ip.transport_at..)?;
        let (kind, header_len) = match ip.protocol {
            PROTO_TCP => (Transport::Tcp, tcp_header_len(transport)?),
            PROTO_UDP => (Transport::Udp, udp_header_len(transport)?),
            _ => return None,
        };
        let payload_at = ip.transport_at + header_len;
        (payload_at <= bytes.len()).then_some(Segment {
            network_at,
            transport_at: ip.transport_at,
            payload_at,
            len: bytes.len(),
            family: ip.family,
            transport: kind,
            csum: offload.csum,
        })
    }

    fn payload_len(&self) -> usize {
        self.len - self.payload_at
    }

    /// Whether the receiver will find the checksums right.
    fn is_sound(&self, bytes: &[u8]) -> bool {
        let ip = &bytes[self.network_at..self.transport_at];
        if self.family == Family::V4 && checksum::fold(checksum::sum(ip)) != 0xffff {
            return false;
        }
        match self.csum {
            Csum::Valid => true,
            Csum::Partial { start, offset } => {
                (usize::from(start), usize::from(offset))
                    == (self.transport_at, self.transport.csum_at())
            }
            Csum::Unchecked => {
                let transport = &bytes[self.transport_at..self.len];
                let sum = self.pseudo_sum(bytes, transport.len()) + checksum::sum(transport);
                checksum::fold(sum) == 0xffff
            }
        }
    }

    fn pseudo_sum(&self, bytes: &[u8], transport_len: usize) -> u64 {
        let sum = self
            .transport
            .pseudo_sum(bytes, self.network_at, self.family);
        sum + transport_len as u64
    }
}

/// Header length of a segment that carries data or acknowledges some, and nothing but.
fn tcp_header_len(tcp: &[u8]) -> Option<usize> {
    let header: &[u8; TCP_HEADER_LEN] = tcp.first_chunk()?;
    let flags = header[TCP_FLAGS_AT];
    let header_len = usize::from(header[12] >> 4) * 4;
    let joinable = flags & TCP_ACK != 0 && flags & !(TCP_ACK | TCP_PSH | TCP_FIN | TCP_ECE) == 0;
    (header_len >= TCP_HEADER_LEN && joinable).then_some(header_len)
}

/// A datagram without a checksum (RFC 768) stays as it is: a train has one.
fn udp_header_len(udp: &[u8]) -> Option<usize> {
    let header: &[u8; UDP_HEADER_LEN] = udp.first_chunk()?;
    let whole = usize::from(be16(header, 4)) == udp.len();
    (whole && be16(header, 6) != 0).then_some(UDP_HEADER_LEN)
}

/// A frame that grows.
struct Train {
    /// Where it begins in the buffer.
    at: usize,
    /// The first segment, as it came.
    first: Segment,
    offload: Offload,
    /// Payload bytes of all segments but the last.
    size: usize,
    /// Length with what was joined.
    len: usize,
    segments: usize,
    /// A shorter segment, or one that says that there is no more for now, was the last.
    complete: bool,
    /// Whether the receiver takes trains and the first segment is sound; unknown until there is a second.
    joinable: Option<bool>,
}

impl Train {
    fn begin(at: usize, offload: Offload, first: Segment) -> Train {
        Train {
            at,
            offload,
            size: first.payload_len(),
            len: first.len,
            first,
            segments: 1,
            complete: false,
            joinable: None,
        }
    }

    /// Whether the segment at `from` of the buffer is the next of this train.
    fn admits(
        &mut self,
        buffer: &[u8],
        from: usize,
        segment: &Segment,
        takes: &mut impl FnMut(&Frame<'_>) -> Caps,
    ) -> bool {
        let first = &self.first;
        let payload_len = segment.payload_len();
        if self.complete
            || payload_len > self.size
            || self.len + payload_len > SUPER_FRAME_LEN_MAX
            || (segment.payload_at, segment.transport_at) != (first.payload_at, first.transport_at)
            || (segment.transport, segment.family) != (first.transport, first.family)
        {
            return false;
        }
        let ours = &buffer[self.at..][..self.len];
        let theirs = &buffer[from..][..segment.len];
        self.follows(ours, theirs)
            && *self.joinable.get_or_insert_with(|| {
                let frame = Frame {
                    bytes: &ours[..first.len],
                    offload: self.offload,
                };
                let caps = takes(&frame);
                let taken = match first.transport {
                    Transport::Tcp => caps.tso,
                    Transport::Udp => caps.uso,
                };
                taken && caps.csum && first.is_sound(frame.bytes)
            })
            && segment.is_sound(theirs)
    }

    /// Whether the headers are those of the next segment: all bytes equal but those that segmentation
    /// writes.
    fn follows(&self, ours: &[u8], theirs: &[u8]) -> bool {
        let Segment {
            network_at,
            transport_at,
            payload_at,
            ..
        } = self.first;
        let same = |from: usize, to: usize| ours[from..to] == theirs[from..to];
        let ip_same = match self.first.family {
            Family::V4 => {
                // Between: total length, identification; then the header's checksum.
                let id = be16(ours, network_at + 4).wrapping_add(self.segments as u16);
                let id_follows = ours[network_at + 6] & IPV4_DONT_FRAGMENT != 0
                    || be16(theirs, network_at + 4) == id;
                id_follows
                    && same(0, network_at + 2)
                    && same(network_at + 6, network_at + 10)
                    && same(network_at + 12, transport_at)
            }
            Family::V6 => same(0, network_at + 4) && same(network_at + 6, transport_at),
        };
        ip_same
            && match self.first.transport {
                Transport::Udp => same(transport_at, transport_at + 4),
                Transport::Tcp => {
                    let flags_at = transport_at + TCP_FLAGS_AT;
                    let at_the_end = TCP_PSH | TCP_FIN;
                    let sequence =
                        be32(ours, transport_at + 4).wrapping_add((self.len - payload_at) as u32);
                    be32(theirs, transport_at + 4) == sequence
                        && same(transport_at, transport_at + 4)
                        && same(transport_at + 8, flags_at)
                        && (ours[flags_at] ^ theirs[flags_at]) & !at_the_end == 0
                        && ours[flags_at] & at_the_end == 0
                        // Window, urgent pointer, options.
                        && same(flags_at + 1, transport_at + 16)
                        && same(transport_at + 18, payload_at)
                }
            }
    }

    /// Moves the segment's data behind this train's. It lies further back in the buffer.
    fn append(&mut self, buffer: &mut [u8], from: usize, segment: &Segment) {
        let payload = from + segment.payload_at..from + segment.len;
        if segment.transport == Transport::Tcp {
            let flags_at = segment.transport_at + TCP_FLAGS_AT;
            let flags = buffer[from + flags_at];
            self.complete = flags & (TCP_PSH | TCP_FIN) != 0;
            buffer[self.at + flags_at] |= flags;
        }
        buffer.copy_within(payload, self.at + self.len);
        self.len += segment.payload_len();
        self.segments += 1;
        self.complete |= segment.payload_len() < self.size;
    }

    /// Where the frame lies and what is left to do for it.
    fn finish(self, buffer: &mut [u8]) -> (std::ops::Range<usize>, Offload) {
        let range = self.at..self.at + self.len;
        if self.segments == 1 {
            return (range, self.offload);
        }
        let first = &self.first;
        let bytes = &mut buffer[range.clone()];
        let mut put = |at: usize, value: usize| {
            bytes[at..at + 2].copy_from_slice(&(value as u16).to_be_bytes());
        };
        match first.family {
            Family::V4 => {
                put(first.network_at + 2, self.len - first.network_at);
                put(first.network_at + 10, 0);
            }
            Family::V6 => put(first.network_at + 4, self.len - first.transport_at),
        }
        let transport_len = self.len - first.transport_at;
        if first.transport == Transport::Udp {
            put(first.transport_at + 4, transport_len);
        }
        if first.family == Family::V4 {
            let ip = &bytes[first.network_at..first.transport_at];
            let sum = !checksum::fold(checksum::sum(ip));
            bytes[first.network_at + 10..][..2].copy_from_slice(&sum.to_be_bytes());
        }
        let csum_at = first.transport.csum_at();
        let sum = checksum::fold(first.pseudo_sum(bytes, transport_len));
        bytes[first.transport_at + csum_at..][..2].copy_from_slice(&sum.to_be_bytes());
        let size = self.size as u16;
        let offload = Offload {
            csum: Csum::Partial {
                start: first.transport_at as u16,
                offset: csum_at as u16,
            },
            gso: match (first.transport, first.family) {
                (Transport::Udp, _) => Gso::Udp(size),
                (Transport::Tcp, Family::V4) => Gso::Tcp4(size),
                (Transport::Tcp, Family::V6) => Gso::Tcp6(size),
            },
            ecn: false,
        };
        (range, offload)
    }
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
