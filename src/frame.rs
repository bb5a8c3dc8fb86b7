//! The vocabulary of the data path: addresses, ports, frames and batches.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use crate::offload::Offload;

/// Time on the data path: microseconds since an arbitrary start. Made only at the I/O edge and
/// passed in everywhere else.
pub use smoltcp::time::{Duration, Instant};

/// Destination, source and EtherType.
pub const ETH_HEADER_LEN: usize = 14;
/// Largest frame: a 65,535-byte IP packet, the Ethernet header and two VLAN tags.
pub const FRAME_LEN_MAX: usize = 65_535 + ETH_HEADER_LEN + 2 * 4;
/// Room that [`Batch::next_buffer`] guarantees: a vnet header (12) and the largest frame.
pub const FRAME_BUFFER_LEN: usize = 66 * 1024;
const _: () = assert!(FRAME_BUFFER_LEN >= FRAME_LEN_MAX + 12);

/// An IEEE 802 MAC address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// ff:ff:ff:ff:ff:ff
    pub const BROADCAST: Mac = Mac([0xff; 6]);

    /// The address at `bytes[at..at + 6]`.
    ///
    /// # Panics
    /// If the slice is shorter: callers check the frame's length first.
    pub fn at(bytes: &[u8], at: usize) -> Mac {
        let mut mac = [0; 6];
        mac.copy_from_slice(&bytes[at..at + 6]);
        Mac(mac)
    }

    /// Broadcast or multicast: the I/G bit is set (IEEE 802-2014 8.2.2).
    pub fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// The address as the low 48 bits of a word.
    pub fn to_u64(self) -> u64 {
        let [a, b, c, d, e, f] = self.0;
        u64::from_be_bytes([0, 0, a, b, c, d, e, f])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut mac = [0u8; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut mac {
            let part = parts.next().filter(|part| part.len() == 2);
            *byte = part
                .and_then(|part| u8::from_str_radix(part, 16).ok())
                .ok_or_else(|| format!("{text:?} is not a MAC address like 52:54:00:12:34:56"))?;
        }
        if parts.next().is_some() {
            return Err(format!("{text:?} has more than six bytes"));
        }
        Ok(Mac(mac))
    }
}

/// Reads a MAC that a guest may have: an individual address, not zero.
///
/// # Errors
/// What is wrong with it.
pub fn guest_mac(text: &str) -> Result<Mac, String> {
    let mac: Mac = text.parse()?;
    if mac.is_group() || mac == Mac::default() {
        return Err(format!(
            "{mac} is a group address or zero: a guest's is like 52:54:00:12:34:56"
        ));
    }
    Ok(mac)
}

/// Where a guest is reached, or was last seen.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Station {
    /// Its address.
    pub mac: Mac,
    /// The port it is behind.
    pub port: PortId,
}

/// A port of the switch. Small and dense: it indexes the worker's port table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PortId(pub u16);

impl PortId {
    /// The gateway (the LAN's .1) is a port of the switch like any other.
    pub const GATEWAY: PortId = PortId(0);
}

/// One of the data path's threads, counted from 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct WorkerId(pub u8);

impl fmt::Display for PortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An Ethernet frame and what its sender left to do for it.
///
/// Admitted frames hold at least [`ETH_HEADER_LEN`] and at most [`FRAME_LEN_MAX`] bytes, and
/// `offload` was checked against the bytes by [`crate::offload::admit`].
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// From the destination MAC on, without FCS.
    pub bytes: &'a [u8],
    /// Checksum and segmentation work still to be done.
    pub offload: Offload,
}

impl Frame<'_> {
    /// Destination MAC.
    pub fn destination(&self) -> Mac {
        Mac::at(self.bytes, 0)
    }

    /// Source MAC.
    pub fn source(&self) -> Mac {
        Mac::at(self.bytes, 6)
    }
}

/// Bytes of one batch buffer. Seven super-frames or some 300 full-size ones: more would leave the
/// L2 cache between being read and being written.
pub const BATCH_BYTES: usize = 512 * 1024;
/// Frames of one batch at most: bounds the time one port holds the worker.
pub const BATCH_FRAMES_MAX: usize = 64;

/// Frames read from one port in one go, packed behind each other in one reused buffer.
pub struct Batch {
    buffer: Box<[u8]>,
    used: usize,
    frames: Vec<(Range<usize>, Offload)>,
}

impl Batch {
    /// An empty batch; its memory is touched only when frames are read into it.
    pub fn new() -> Self {
        Self {
            buffer: vec![0; BATCH_BYTES].into_boxed_slice(),
            used: 0,
            frames: Vec::with_capacity(BATCH_FRAMES_MAX),
        }
    }

    /// Forgets all frames, keeps the memory.
    pub fn clear(&mut self) {
        self.used = 0;
        self.frames.clear();
    }

    /// At least [`FRAME_BUFFER_LEN`] bytes to read the next frame into, or `None` when full.
    pub fn next_buffer(&mut self) -> Option<&mut [u8]> {
        let room = self.buffer.len() - self.used;
        (room >= FRAME_BUFFER_LEN && self.frames.len() < BATCH_FRAMES_MAX)
            .then(|| &mut self.buffer[self.used..])
    }

    /// Keeps the frame that lies at `range` of the slice which [`Batch::next_buffer`] gave.
    pub fn commit(&mut self, range: Range<usize>, offload: Offload) {
        let start = self.used;
        self.used = (start + range.end)
            .next_multiple_of(64)
            .min(self.buffer.len());
        self.frames
            .push((start + range.start..start + range.end, offload));
    }

    /// Buffer and frames, for who joins them.
    pub(crate) fn parts_mut(&mut self) -> (&mut [u8], &mut Vec<(Range<usize>, Offload)>) {
        (&mut self.buffer, &mut self.frames)
    }

    /// Number of frames.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Whether there is no frame.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// The frames in the order they were read.
    pub fn frames(&self) -> impl Iterator<Item = Frame<'_>> {
        self.frames.iter().map(|(range, offload)| Frame {
            bytes: &self.buffer[range.clone()],
            offload: *offload,
        })
    }
}

impl Default for Batch {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_text_round_trip() {
        let mac: Mac = "52:54:00:12:34:56".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:12:34:56");
        assert_eq!(mac.to_u64(), 0x5254_0012_3456);
        for bad in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "5:54:00:12:34:56",
            "zz:54:00:12:34:56",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    #[test]
    fn batch_packs_and_stops_when_full() {
        let mut batch = Batch::new();
        let mut super_frames = 0;
        while let Some(buffer) = batch.next_buffer() {
            buffer[12] = super_frames;
            batch.commit(12..12 + FRAME_LEN_MAX, Offload::default());
            super_frames += 1;
        }
        assert_eq!(super_frames, 7);
        assert!(
            batch
                .frames()
                .enumerate()
                .all(|(n, frame)| frame.bytes[0] == n as u8)
        );
        batch.clear();
        for _ in 0..BATCH_FRAMES_MAX {
            batch.next_buffer().unwrap();
            batch.commit(12..72, Offload::default());
        }
        assert!(batch.next_buffer().is_none());
    }
}
