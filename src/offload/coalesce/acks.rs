//! Acknowledgments that a later one of the same batch makes redundant.
//!
//! A receiver acknowledges every other segment. Of what lies in one batch the last says it all: to write
//! one frame in place of many saves the work of each in the sender's stack, which lets it go on with
//! larger super-frames.
//!
//! Left out is a segment without data that is followed by one of the same flow that acknowledges more
//! (RFC 9293 3.4: acknowledgments are cumulative) and differs in nothing but acknowledgment number,
//! window and its own timestamp. So what a sender learns from single acknowledgments stays: repeated ones
//! (RFC 5681 3.2), window updates, SACK blocks, ECN's marks (RFC 3168, RFC 9768). With one of those in a
//! batch all of its flow stay that come after it, but for what has CWR, padding or IP options, which stays
//! itself and is not looked into. Senders that count acknowledgments instead of bytes (RFC 3465) grow their
//! window more slowly, as behind a receiver with GRO. One that repeats what an earlier batch or a segment with
//! data said passes for a first: a sender that counts then misses one, in the moment in which the next
//! tells it that the gap is filled.

use std::ops::Range;

use super::super::Offload;
use super::super::layout::{Family, TCP_FLAGS_AT, TCP_HEADER_LEN, Transport};
use super::{Segment, TCP_ACK, be32};
use crate::frame::BATCH_FRAMES_MAX;
use crate::wire::be16;

/// Flows of one batch whose acknowledgments are remembered: as many as there can be. When two have the same
/// place, all that come after stay.
const PLACES: usize = BATCH_FRAMES_MAX;
/// What an option field with timestamps and nothing else begins with (RFC 7323 appendix A).
const TIMESTAMPS: [u8; 4] = [1, 1, 8, 10];
/// Its length.
const TIMESTAMPS_LEN: usize = 12;

/// What a batch has of segments without data, by flow.
pub(super) struct Acks {
    places: [Place; PLACES],
    redundant: bool,
}

#[derive(Clone, Copy)]
enum Place {
    Free,
    /// The newest of a flow whose segments acknowledge ever more and say nothing else: the index of its
    /// frame.
    Newest(u16),
    /// All that comes stays.
    Closed,
}

const _: () = assert!(BATCH_FRAMES_MAX <= u16::MAX as usize);

impl Acks {
    /// None yet.
    pub(super) fn new() -> Self {
        Self {
            places: [Place::Free; PLACES],
            redundant: false,
        }
    }

    /// Takes note of the segment without data that is frame `index`, and empties the range of the one
    /// that it makes redundant.
    pub(super) fn note(
        &mut self,
        index: usize,
        segment: &Segment,
        buffer: &[u8],
        frames: &mut [(Range<usize>, Offload)],
    ) {
        let bytes = &buffer[frames[index].0.clone()];
        if !segment.is_sound(bytes) {
            return;
        }
        let place = &mut self.places[place(segment, bytes)];
        let next = match is_bare(segment, bytes) {
            true => Place::Newest(index as u16),
            false => Place::Closed,
        };
        match *place {
            Place::Free => *place = next,
            Place::Newest(before) if matches!(next, Place::Newest(_)) => {
                let range = &mut frames[usize::from(before)].0;
                if is_next(segment, &buffer[range.clone()], bytes) {
                    range.end = range.start;
                    self.redundant = true;
                    *place = next;
                } else {
                    *place = Place::Closed;
                }
            }
            Place::Newest(_) | Place::Closed => *place = Place::Closed,
        }
    }

    /// Whether any range was emptied.
    pub(super) fn has_redundant(&self) -> bool {
        self.redundant
    }
}

/// Whether nothing but an acknowledgment is said, perhaps with timestamps.
fn is_bare(segment: &Segment, bytes: &[u8]) -> bool {
    let tcp = &bytes[segment.transport_at..];
    // The lower half of the length's byte: reserved, and ECN's third flag.
    segment.transport == Transport::Tcp
        && tcp[TCP_FLAGS_AT] == TCP_ACK
        && tcp[TCP_FLAGS_AT - 1] & 0x0f == 0
        && match tcp.len() - TCP_HEADER_LEN {
            0 => true,
            TIMESTAMPS_LEN => tcp[TCP_HEADER_LEN..].starts_with(&TIMESTAMPS),
            _ => false,
        }
}

/// Where a flow has its place: by its ports.
fn place(segment: &Segment, bytes: &[u8]) -> usize {
    let tcp = &bytes[segment.transport_at..];
    // Multiplied by 2^16 over the golden ratio; the upper bits depend on all.
    let mixed = (be16(tcp, 0) ^ be16(tcp, 2).rotate_left(8)).wrapping_mul(0x9e37);
    usize::from(mixed >> 8) % PLACES
}

/// Whether it is of the same flow, acknowledges more than `older`, is not older by its timestamp
/// (RFC 7323 5), and differs in nothing else but the window, IP's identification and checksums.
fn is_next(segment: &Segment, older: &[u8], newer: &[u8]) -> bool {
    let Segment {
        network_at,
        transport_at,
        ..
    } = *segment;
    let options_at = transport_at + TCP_HEADER_LEN;
    let same = |from: usize, to: usize| older[from..to] == newer[from..to];
    let forward = |at: usize| be32(newer, at).wrapping_sub(be32(older, at)) as i32;
    older.len() == newer.len()
        && match segment.family {
            Family::V4 => {
                same(0, network_at + 4)
                    && same(network_at + 6, network_at + 10)
                    && same(network_at + 12, transport_at)
            }
            Family::V6 => same(0, transport_at),
        }
        // Ports and sequence number; length, flags; urgent pointer.
        && same(transport_at, transport_at + 8)
        && same(transport_at + 12, transport_at + 14)
        && same(transport_at + 18, options_at)
        && forward(transport_at + 8) > 0
        // The newer echoes the same: what undoes a spurious retransmission looks at the first that echoes
        // one (RFC 3522).
        && (newer.len() == options_at
            || forward(options_at + 4) >= 0
                && same(options_at + 8, options_at + TIMESTAMPS_LEN))
}

#[cfg(test)]
mod tests;
