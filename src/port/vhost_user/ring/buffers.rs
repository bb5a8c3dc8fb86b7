//! The buffers that chains name, and copying from and to them.

use vm_memory::VolatileSlice;

use super::super::memory::{Memory, Place};
use super::{Broken, Ring};

/// A piece of a buffer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) place: Place,
    pub(super) len: usize,
}

/// Buffers taken from a ring: one chain, or several behind each other.
#[derive(Debug, Default)]
pub struct Buffers {
    pub(super) segments: Vec<Segment>,
    pub(super) len: usize,
    pub(super) descriptors: usize,
}

impl Buffers {
    /// Forgets them.
    pub fn clear(&mut self) {
        self.segments.clear();
        self.len = 0;
        self.descriptors = 0;
    }

    /// Bytes of all.
    pub fn bytes(&self) -> usize {
        self.len
    }

    /// Descriptors that were looked at for them.
    pub fn descriptors(&self) -> usize {
        self.descriptors
    }
}

/// Bytes in buffers of a guest, which the ring's owner leaves alone meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct Remote<'a> {
    /// The ring they were taken from.
    pub ring: &'a Ring,
    /// They and what is before them.
    pub buffers: &'a Buffers,
    /// Bytes before them.
    pub skip: usize,
}

impl Remote<'_> {
    /// Number of bytes.
    pub fn bytes(&self) -> usize {
        self.buffers.len.saturating_sub(self.skip)
    }

    /// Copies them, all of which `out` has room for.
    ///
    /// # Errors
    /// They are not in the memory any more.
    pub fn read(&self, out: &mut [u8]) -> Result<(), Broken> {
        self.ring.read(self.buffers, self.skip, out)
    }
}

/// Goes through buffers piece by piece.
struct Pieces<'a> {
    memory: &'a Memory,
    segments: std::slice::Iter<'a, Segment>,
    current: Option<Segment>,
    /// Bytes of the current segment that are done with.
    at: usize,
}

impl<'a> Pieces<'a> {
    fn new(ring: &'a Ring, buffers: &'a Buffers, mut skip: usize) -> Self {
        let mut segments = buffers.segments.iter();
        let mut current = segments.next().copied();
        while let Some(segment) = current.filter(|segment| skip >= segment.len) {
            skip -= segment.len;
            current = segments.next().copied();
        }
        Self {
            memory: &ring.memory,
            segments,
            current,
            at: skip,
        }
    }

    /// The next bytes that lie in one piece, `max` at most. There is one at least.
    fn next(&mut self, max: usize) -> Result<VolatileSlice<'a>, Broken> {
        let Segment { place, len } = self.current.ok_or(Broken::Address)?;
        let count = max.min(len - self.at);
        let slice = self.memory.slice(place, self.at, count);
        self.at += count;
        if self.at == len {
            (self.current, self.at) = (self.segments.next().copied(), 0);
        }
        slice.ok_or(Broken::Address)
    }
}

impl Ring {
    /// Copies the bytes of `from`, from `skip` on, into `out`, which they fill.
    ///
    /// # Errors
    /// They do not, or are not in the memory any more.
    pub fn read(&self, from: &Buffers, skip: usize, out: &mut [u8]) -> Result<(), Broken> {
        let mut pieces = Pieces::new(self, from, skip);
        let mut rest = out;
        while !rest.is_empty() {
            let piece = pieces.next(rest.len())?;
            let done;
            (done, rest) = rest.split_at_mut(piece.len());
            piece.copy_to(done);
        }
        Ok(())
    }

    /// Copies `parts`, behind each other, and behind them `rest`, into the buffers of `to`, which hold
    /// them all. `false`: `rest` is not in its own guest's memory any more, which is not this ring's fault.
    ///
    /// # Errors
    /// The buffers don't hold them, or are not in the memory any more.
    pub fn write(
        &self,
        to: &Buffers,
        parts: [&[u8]; 2],
        rest: Option<Remote<'_>>,
    ) -> Result<bool, Broken> {
        let mut pieces = Pieces::new(self, to, 0);
        for mut part in parts {
            while !part.is_empty() {
                let piece = pieces.next(part.len())?;
                let (now, later) = part.split_at(piece.len());
                piece.copy_from(now);
                part = later;
            }
        }
        let Some(rest) = rest else {
            return Ok(true);
        };
        let mut left = rest.bytes();
        let mut sources = Pieces::new(rest.ring, rest.buffers, rest.skip);
        while left != 0 {
            let Ok(mut source) = sources.next(left) else {
                return Ok(false);
            };
            left -= source.len();
            while !source.is_empty() {
                let piece = pieces.next(source.len())?;
                let len = piece.len();
                source.copy_to_volatile_slice(piece);
                source = source.offset(len).map_err(|_| Broken::Address)?;
            }
        }
        Ok(true)
    }
}
