//! IP fragments at the gateway: what guests cut is put together before anything looks at it, and what
//! is too long for the LAN is cut on its way to a guest.
//!
//! # Path
//! The caller hands a packet over whose transport is [`Transport::Fragment`]. [`Reassembler::handle`]
//! finds its datagram by port, MAC, addresses, identification and (IPv4) protocol, and copies its
//! payload to its place. The fragment that completes a datagram gives it back as one Ethernet frame,
//! headers those of the first fragment without a trace of the cutting; it goes through
//! [`Packet::parse`] again, which checks the transport; the caller sets [`Packet::reassembled`]. The other
//! direction is [`cut`].
//!
//! # State
//! [`DATAGRAMS_MAX`] places of 64 KiB in one piece of memory that is touched only as far as it is
//! used. A place holds the payload at its offset and the first fragment's headers right before it, so
//! that a complete datagram is a frame without being copied.
//!
//! # Timers
//! [`TIMEOUT`] from the first arrival; then the sender is owed ICMP time exceeded if the first fragment
//! came (RFC 792, RFC 8200 4.5), for which [`Expired`] has all that is needed.
//!
//! # Limits
//! A port at [`PER_GUEST_MAX`] gives up its oldest datagram for the new one: what a lost fragment
//! leaves behind must not stop a guest for half a minute. With no place left the port that holds the
//! most gives up its oldest. A datagram has [`PIECES_MAX`] fragments.
//!
//! # Hostile guests
//! Overlapping fragments show one packet to a filter and another to its receiver: no datagram with an
//! overlap is ever completed, in either family (RFC 5722; RFC 1858 and RFC 3128 for IPv4). Its place
//! stays taken until the timeout, so that the fragments still to come don't complete it either. Exact
//! duplicates, which networks make, are ignored. A first fragment has to hold the whole transport
//! header (RFC 7112, RFC 1858). Lengths beyond 65,535 and fragments inside fragments are refused.
//! A flood costs the other guests nothing but the places above their share.

mod cut;
mod piece;

use std::ops::Range;

pub use cut::{cut, cut4, cut6};

use crate::frame::{Duration, ETH_HEADER_LEN, Frame, Instant, Mac, PortId};
use crate::gateway::service_counters;
use crate::offload::Offload;
use crate::stats::DropReason;
#[cfg(doc)]
use crate::wire::Transport;
use crate::wire::ipv6::{FRAGMENT, FRAGMENT_HEADER_LEN, IPV6_HEADER_LEN, walk};
use crate::wire::{self, Family, PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP, PROTO_UDP, Packet, checksum};
use piece::{HEADERS_MAX, Key, Piece};

/// Datagrams under way at a time: 4 MiB, as much as Linux gives to a whole host
/// (net.ipv4.ipfrag_high_thresh).
pub const DATAGRAMS_MAX: usize = 64;
/// Datagrams under way from one port: the fragments of one come in a row, so a guest needs more than
/// one only where it has several CPUs or its fragments got lost.
pub const PER_GUEST_MAX: usize = 16;
/// Fragments of one datagram: 65,535 bytes in 119 pieces at an MTU of 576, the least that IPv4 hosts
/// take (RFC 791 3.1).
pub const PIECES_MAX: usize = 128;
/// From the first fragment on. RFC 1122 3.3.2 wants 60 to 120 seconds for IPv4 and RFC 8200 60, meant
/// for paths with such delays. Guests are a link away; 30 is what Linux waits (net.ipv4.ipfrag_time).
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// Longest IP packet.
const PACKET_MAX: usize = 65_535;
/// Where the payload begins in a place.
const PAYLOAD_AT: usize = HEADERS_MAX;
/// Whole cache lines.
const PLACE_LEN: usize = (PAYLOAD_AT + PACKET_MAX).next_multiple_of(64);
/// IP's codepoint "congestion experienced" (RFC 3168 5).
const ECN_CE: u8 = 3;

service_counters! {
    /// What became of datagrams in fragments.
    FragmentCounters {
        /// Put together.
        reassembled = "fragments_reassembled",
        /// Given up after [`TIMEOUT`].
        expired = "fragments_expired",
        /// Refused because fragments overlap or contradict each other.
        overlapped = "fragments_overlapped",
        /// Given up at a limit.
        limited = "fragments_limited",
    }
}

/// A datagram that was not completed in time, of which the first fragment came.
#[derive(Clone, Copy, Debug)]
pub struct Expired<'a> {
    /// The guest's port.
    pub ingress: PortId,
    /// The guest's MAC.
    pub source: Mac,
    /// The first fragment as it came, from the IP header on: what ICMP time exceeded (11/1, ICMPv6
    /// 3/1) quotes.
    pub packet: &'a [u8],
}

/// A datagram under way.
#[derive(Debug)]
struct Datagram {
    key: Key,
    since: Instant,
    /// Beginning and end of what came, in order; the first `count` of them.
    pieces: [(u16, u16); PIECES_MAX],
    count: usize,
    received: usize,
    /// Length of the whole payload, once the last fragment came.
    total: Option<usize>,
    /// Bytes of the first fragment's headers, Ethernet's included; 0 until it came.
    headers_len: usize,
    /// Place of the byte that names the fragment header, from the IPv6 header on.
    named_at: usize,
    /// Bit n: codepoint n was seen.
    ecn: u8,
    /// Nothing comes of it any more.
    refused: bool,
}

/// Datagrams under way, of all guests of one worker.
#[derive(Debug)]
pub struct Reassembler {
    datagrams: [Option<Datagram>; DATAGRAMS_MAX],
    under_way: usize,
    /// A place for each of them and one for what is whole in one fragment.
    memory: Box<[u8]>,
    counters: FragmentCounters,
}

impl Reassembler {
    /// Nothing under way.
    pub fn new() -> Self {
        Self {
            datagrams: [const { None }; DATAGRAMS_MAX],
            under_way: 0,
            memory: vec![0; PLACE_LEN * (DATAGRAMS_MAX + 1)].into_boxed_slice(),
            counters: FragmentCounters::default(),
        }
    }

    /// Takes a fragment. `Some`: it completed this frame, which is valid until the next call.
    ///
    /// # Errors
    /// [`DropReason::Malformed`] or [`DropReason::Truncated`] for what no sender cuts,
    /// [`DropReason::Fragment`] for what contradicts other fragments, [`DropReason::Limit`] for too
    /// many of them.
    pub fn handle(
        &mut self,
        packet: &Packet<'_>,
        now: Instant,
    ) -> Result<Option<Frame<'_>>, DropReason> {
        let piece = Piece::of(packet)?;
        if piece.start == 0 && !piece.more {
            // Whole: has nothing to do with others of the same identification (RFC 6946 4).
            let mut datagram = Datagram::new(piece.key, now);
            let place = &mut self.memory[DATAGRAMS_MAX * PLACE_LEN..];
            datagram.keep(&piece, 0, place);
            return self.complete(&datagram, DATAGRAMS_MAX).map(Some);
        }
        let at = match self.find(&piece.key) {
            Some(at) => at,
            None => self.open(piece.key, now),
        };
        let datagram = self.datagrams[at].as_mut().expect("found or opened");
        let place = &mut self.memory[at * PLACE_LEN..][..PLACE_LEN];
        match datagram.add(&piece, place) {
            Ok(false) => return Ok(None),
            Ok(true) => {}
            Err(reason) => {
                let first = !std::mem::replace(&mut datagram.refused, true);
                match reason {
                    DropReason::Limit => self.counters.limited += u64::from(first),
                    _ => self.counters.overlapped += u64::from(first),
                }
                return Err(reason);
            }
        }
        let datagram = self.close(at);
        self.complete(&datagram, at).map(Some)
    }

    fn find(&self, key: &Key) -> Option<usize> {
        let mut places = self.datagrams.iter();
        places.position(|datagram| datagram.as_ref().is_some_and(|it| it.key == *key))
    }

    /// A place for a new datagram, the lowest, as its memory is the most likely to be in use already.
    fn open(&mut self, key: Key, now: Instant) -> usize {
        let own = self.held_by(key.ingress);
        let free = self.datagrams.iter().position(Option::is_none);
        let at = match free {
            Some(free) if own < PER_GUEST_MAX => free,
            _ => {
                let loser = match free {
                    Some(_) => key.ingress,
                    None => self.largest_holder(key.ingress),
                };
                let oldest = self.oldest_of(loser);
                self.close(oldest);
                self.counters.limited += 1;
                oldest
            }
        };
        self.datagrams[at] = Some(Datagram::new(key, now));
        self.under_way += 1;
        at
    }

    fn held_by(&self, ingress: PortId) -> usize {
        let held = self.datagrams.iter().flatten();
        held.filter(|it| it.key.ingress == ingress).count()
    }

    /// The port with the most datagrams under way; `newcomer` where no other has more.
    fn largest_holder(&self, newcomer: PortId) -> PortId {
        let mut largest = (newcomer, self.held_by(newcomer));
        for datagram in self.datagrams.iter().flatten() {
            let held = self.held_by(datagram.key.ingress);
            if held > largest.1 {
                largest = (datagram.key.ingress, held);
            }
        }
        largest.0
    }

    /// # Panics
    /// If the port holds nothing.
    fn oldest_of(&self, ingress: PortId) -> usize {
        let places = self.datagrams.iter().enumerate();
        let held = places.filter_map(|(at, datagram)| Some((at, datagram.as_ref()?)));
        held.filter(|(_, it)| it.key.ingress == ingress)
            .min_by_key(|(_, it)| it.since)
            .expect("the port holds a datagram")
            .0
    }

    /// # Panics
    /// If nothing is under way there.
    fn close(&mut self, at: usize) -> Datagram {
        self.under_way -= 1;
        self.datagrams[at].take().expect("something is under way")
    }

    /// The frame of a datagram of which all came.
    fn complete(&mut self, datagram: &Datagram, at: usize) -> Result<Frame<'_>, DropReason> {
        let place = &mut self.memory[at * PLACE_LEN..][..PLACE_LEN];
        let range = datagram.join(place)?;
        self.counters.reassembled += 1;
        Ok(Frame {
            bytes: &place[range],
            offload: Offload::default(),
        })
    }

    /// When [`Reassembler::handle_timeout`] has something to do.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.under_way == 0 {
            return None;
        }
        let held = self.datagrams.iter().flatten();
        held.map(|datagram| datagram.since + TIMEOUT).min()
    }

    /// Gives up what is due, and tells `expired` where the sender is to hear of it.
    pub fn handle_timeout(&mut self, now: Instant, expired: &mut dyn FnMut(Expired<'_>)) {
        while self.poll_timeout().is_some_and(|due| due <= now) {
            let places = self.datagrams.iter();
            let due = |it: &Datagram| it.since + TIMEOUT <= now;
            let Some(at) = places
                .enumerate()
                .find_map(|(at, it)| it.as_ref().is_some_and(due).then_some(at))
            else {
                return;
            };
            let datagram = self.close(at);
            if datagram.refused {
                continue;
            }
            self.counters.expired += 1;
            if let Some(first) = datagram.first() {
                expired(Expired {
                    ingress: datagram.key.ingress,
                    source: datagram.key.mac,
                    packet: &self.memory[at * PLACE_LEN..][first],
                });
            }
        }
    }

    /// Gives up the datagrams of a port that is gone.
    pub fn forget_port(&mut self, port: PortId) {
        for at in 0..DATAGRAMS_MAX {
            if self.datagrams[at]
                .as_ref()
                .is_some_and(|it| it.key.ingress == port)
            {
                self.close(at);
            }
        }
    }

    /// Datagrams under way.
    pub fn len(&self) -> usize {
        self.under_way
    }

    /// Whether nothing is under way.
    pub fn is_empty(&self) -> bool {
        self.under_way == 0
    }

    /// What happened so far.
    pub fn counters(&self) -> &FragmentCounters {
        &self.counters
    }
}

impl Default for Reassembler {
    fn default() -> Self {
        Self::new()
    }
}

impl Datagram {
    fn new(key: Key, since: Instant) -> Self {
        Self {
            key,
            since,
            pieces: [(0, 0); PIECES_MAX],
            count: 0,
            received: 0,
            total: None,
            headers_len: 0,
            named_at: 0,
            ecn: 0,
            refused: false,
        }
    }

    /// Adds a piece; `true` if that was all that lacked.
    fn add(&mut self, piece: &Piece<'_>, place: &mut [u8]) -> Result<bool, DropReason> {
        if self.refused {
            return Err(DropReason::Fragment);
        }
        let (start, end) = (piece.start, piece.start + piece.payload.len());
        let range = (start as u16, end as u16);
        let pieces = &self.pieces[..self.count];
        let at = pieces.partition_point(|known| known.0 < range.0);
        let last = self.total.is_some_and(|total| total == end);
        if pieces.get(at) == Some(&range)
            && last != piece.more
            && place[PAYLOAD_AT..][start..end] == *piece.payload
        {
            return Ok(false);
        }
        let before = at.checked_sub(1).map(|before| pieces[before]);
        let overlaps = before.is_some_and(|before| before.1 > range.0)
            || pieces.get(at).is_some_and(|after| after.0 < range.1);
        let beyond = self.total.is_some_and(|total| end > total);
        let second_end = !piece.more && (self.total.is_some() || at < pieces.len());
        if overlaps || beyond || second_end {
            return Err(DropReason::Fragment);
        }
        if pieces.len() == PIECES_MAX {
            return Err(DropReason::Limit);
        }
        self.keep(piece, at, place);
        Ok(self.total == Some(self.received))
    }

    /// Copies a piece to its place; it is the `at`th.
    fn keep(&mut self, piece: &Piece<'_>, at: usize, place: &mut [u8]) {
        let (start, end) = (piece.start, piece.start + piece.payload.len());
        place[PAYLOAD_AT..][start..end].copy_from_slice(piece.payload);
        if start == 0 {
            self.headers_len = piece.headers.len();
            self.named_at = piece.named_at;
            place[PAYLOAD_AT - self.headers_len..PAYLOAD_AT].copy_from_slice(piece.headers);
        }
        if !piece.more {
            self.total = Some(end);
        }
        self.received += piece.payload.len();
        self.ecn |= 1 << piece.ecn;
        self.pieces.copy_within(at..self.count, at + 1);
        self.pieces[at] = (start as u16, end as u16);
        self.count += 1;
    }

    /// Where the first fragment lies in its place, from the IP header on.
    fn first(&self) -> Option<Range<usize>> {
        let &(0, end) = self.pieces[..self.count].first()? else {
            return None;
        };
        let from = PAYLOAD_AT - self.headers_len + ETH_HEADER_LEN;
        Some(from..PAYLOAD_AT + usize::from(end))
    }

    /// Makes one packet of what lies in `place`; all of it is there. Gives the frame's range.
    fn join(&self, place: &mut [u8]) -> Result<Range<usize>, DropReason> {
        let congested = self.ecn & 1 << ECN_CE != 0;
        // Congestion that a sender who knows no ECN can't be told of (RFC 3168 5.3).
        if congested && self.ecn & 1 != 0 {
            return Err(DropReason::Malformed);
        }
        let mut from = PAYLOAD_AT - self.headers_len;
        let to = PAYLOAD_AT + self.received;
        if self.key.family() == Family::V6 {
            let protocol = place[PAYLOAD_AT - FRAGMENT_HEADER_LEN];
            place.copy_within(
                from..PAYLOAD_AT - FRAGMENT_HEADER_LEN,
                from + FRAGMENT_HEADER_LEN,
            );
            from += FRAGMENT_HEADER_LEN;
            place[from + ETH_HEADER_LEN + self.named_at] = protocol;
        }
        let packet = &mut place[from + ETH_HEADER_LEN..to];
        let transport = match self.key.family() {
            Family::V4 => {
                let len = u16::try_from(packet.len()).map_err(|_| DropReason::Malformed)?;
                packet[1] |= if congested { ECN_CE } else { 0 };
                packet[2..4].copy_from_slice(&len.to_be_bytes());
                packet[6..8].fill(0);
                packet[10..12].fill(0);
                let header_len = self.headers_len - ETH_HEADER_LEN;
                let sum = !checksum::fold(checksum::sum(&packet[..header_len]));
                packet[10..12].copy_from_slice(&sum.to_be_bytes());
                (packet[9], header_len)
            }
            Family::V6 => {
                let len = packet.len() - IPV6_HEADER_LEN;
                let len = u16::try_from(len).map_err(|_| DropReason::Malformed)?;
                packet[1] |= if congested { ECN_CE << 4 } else { 0 };
                packet[4..6].copy_from_slice(&len.to_be_bytes());
                let chain = walk(packet)?;
                (chain.protocol, chain.at)
            }
        };
        let headers_len = PAYLOAD_AT - from - ETH_HEADER_LEN;
        let first_len = headers_len + usize::from(self.pieces[0].1);
        let least = match transport.0 {
            PROTO_TCP => 20,
            PROTO_UDP => wire::UDP_HEADER_LEN,
            PROTO_ICMP | PROTO_ICMPV6 => 8,
            FRAGMENT => return Err(DropReason::Malformed),
            _ => 0,
        };
        if first_len < transport.1 + least {
            return Err(DropReason::Malformed);
        }
        Ok(from..to)
    }
}

#[cfg(test)]
mod tests;
