//! One split virtqueue, the device's side of it (virtio 1.2, 2.7).
//!
//! ```text
//!  driver: descriptors, avail ring --pop--> Chain (checked copy of the descriptors) --copy--> bytes
//!  driver: used ring <--publish-- elements <--push_used-- heads done with
//! ```
//! What the driver wrote is read once, into private memory, checked there, and used from there: what it
//! writes afterwards changes nothing. Used elements become visible together, by [`Ring::publish`], since
//! a driver with mergeable buffers expects to find all buffers of a frame when it finds the first.
//!
//! # Limits
//! A ring has [`QUEUE_SIZE_MAX`] entries at most, a chain [`CHAIN_DESCRIPTORS_MAX`] descriptors, its
//! indirect table included. A ring that breaks a rule is [`Broken`] and stays so until it is set up again,
//! as a virtio device is until it is reset: there is no way to go on that its driver would understand.

mod buffers;

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;

use virtio_queue::desc::split::Descriptor;
use vm_memory::{AtomicAccess, ByteValued, Bytes};

use self::buffers::Segment;
pub use self::buffers::{Buffers, Remote};
use super::memory::{Memory, Place};

/// Most entries of a ring (virtio 1.2, 2.7).
pub const QUEUE_SIZE_MAX: u16 = 32_768;
/// Most descriptors of one chain. Linux uses 19 (MAX_SKB_FRAGS + 2), DPDK some 35 for a super-frame in
/// its usual buffers.
pub const CHAIN_DESCRIPTORS_MAX: usize = 256;

const DESCRIPTOR_LEN: usize = size_of::<Descriptor>();
const _: () = assert!(DESCRIPTOR_LEN == 16);
/// flags and idx before the entries of both rings.
const RING_HEADER_LEN: usize = 4;
const AVAIL_ENTRY_LEN: usize = 2;
const USED_ENTRY_LEN: usize = 8;
/// used_event and avail_event behind the entries.
const EVENT_LEN: usize = 2;
const IDX_AT: usize = 2;
/// VIRTQ_AVAIL_F_NO_INTERRUPT and VIRTQ_USED_F_NO_NOTIFY.
const F_QUIET: u16 = 1;

/// The rule a driver or front-end broke.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Broken {
    /// Its number of entries is none that a ring has.
    #[error("a ring's entries are a power of two, {QUEUE_SIZE_MAX} at most")]
    Size,
    /// More buffers were made available than the ring has entries.
    #[error("its available index went further than the ring is long")]
    AvailIndex,
    /// An index is past the end of a descriptor table.
    #[error("a descriptor's index is past the end of its table")]
    DescriptorIndex,
    /// A chain is a loop, or too long.
    #[error("a chain has more than {CHAIN_DESCRIPTORS_MAX} descriptors")]
    LongChain,
    /// A buffer is not in the guest's memory.
    #[error("a descriptor names memory that the guest does not have")]
    Address,
    /// A buffer to read among those to write, or the other way round.
    #[error("a descriptor has the wrong direction")]
    Direction,
    /// An indirect table inside another, of a size that is none, or with a successor.
    #[error("an indirect descriptor table is malformed")]
    Indirect,
    /// The rings are not where the guest has memory any more.
    #[error("the ring itself is not in the guest's memory")]
    Ring,
    /// The guest's memory could not be had.
    #[error(
        "its memory was taken away, or holes in it are more than lanlet may allocate: allocate it first (QEMU: \
         prealloc=on)"
    )]
    Memory,
}

/// Which way the buffers of a queue go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// The driver wrote them (its transmitq).
    FromGuest,
    /// The driver wants them written (its receiveq).
    ToGuest,
}

/// Where the three parts of a ring are, in addresses of the front-end's process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Addresses {
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

#[derive(Clone, Copy, Debug)]
struct Places {
    descriptors: Place,
    available: Place,
    used: Place,
}

/// A virtqueue as the device sees it.
#[derive(Debug)]
pub struct Ring {
    direction: Direction,
    memory: Arc<Memory>,
    size: u16,
    addresses: Option<Addresses>,
    places: Option<Places>,
    event_idx: bool,
    /// Next entry of the available ring to look at.
    next_avail: u16,
    /// The driver's available index when it was last read.
    avail_seen: u16,
    /// Next entry of the used ring to write.
    next_used: u16,
    /// `next_used` as the driver knows it.
    published: u16,
    /// `published` when the driver was last thought of being called.
    signalled: u16,
}

impl Ring {
    /// A ring without a place.
    pub fn new(direction: Direction) -> Self {
        Self {
            direction,
            memory: Arc::default(),
            size: 0,
            addresses: None,
            places: None,
            event_idx: false,
            next_avail: 0,
            avail_seen: 0,
            next_used: 0,
            published: 0,
            signalled: 0,
        }
    }

    /// Sets the number of entries.
    ///
    /// # Errors
    /// It is no power of two, or above [`QUEUE_SIZE_MAX`].
    pub fn set_size(&mut self, size: u32) -> Result<(), Broken> {
        let fits = size.is_power_of_two() && size <= QUEUE_SIZE_MAX.into();
        let size = u16::try_from(size).ok().filter(|_| fits);
        self.size = size.ok_or(Broken::Size)?;
        self.addresses = None;
        self.places = None;
        Ok(())
    }

    /// Says where the ring is.
    ///
    /// # Errors
    /// It is misaligned (virtio 1.2, 2.7), or not in the guest's memory.
    pub fn set_addresses(&mut self, addresses: Addresses) -> Result<(), Broken> {
        self.addresses = Some(addresses);
        self.resolve()
    }

    /// Exchanges the guest's memory under the ring, which stays where the front-end has it. The old memory
    /// is the caller's to drop, without a lock held.
    ///
    /// # Errors
    /// It has no place in the new memory.
    pub fn set_memory(&mut self, memory: &mut Arc<Memory>) -> Result<(), Broken> {
        std::mem::swap(&mut self.memory, memory);
        match self.addresses {
            Some(_) => self.resolve(),
            None => Ok(()),
        }
    }

    fn resolve(&mut self) -> Result<(), Broken> {
        self.places = None;
        let addresses = self.addresses.filter(|_| self.size != 0);
        let addresses = addresses.ok_or(Broken::Ring)?;
        let entries = usize::from(self.size);
        let find = |address: u64, align: u64, len: usize| {
            let aligned = Some(address).filter(|address| address.is_multiple_of(align));
            let place = aligned.and_then(|address| self.memory.front_end(address, len));
            place.ok_or(Broken::Ring)
        };
        let ring_len = |entry_len| RING_HEADER_LEN + entries * entry_len + EVENT_LEN;
        self.places = Some(Places {
            descriptors: find(addresses.descriptors, 16, entries * DESCRIPTOR_LEN)?,
            available: find(addresses.available, 2, ring_len(AVAIL_ENTRY_LEN))?,
            used: find(addresses.used, 4, ring_len(USED_ENTRY_LEN))?,
        });
        Ok(())
    }

    /// Forgets size, place and progress.
    pub fn forget(&mut self) {
        self.size = 0;
        self.addresses = None;
        self.places = None;
        self.set_next_avail(0);
    }

    /// Whether VIRTIO_F_EVENT_IDX was negotiated.
    pub fn set_event_idx(&mut self, event_idx: bool) {
        self.event_idx = event_idx;
    }

    /// Whether some of the guest's memory could not be had.
    pub fn has_lost_memory(&self) -> bool {
        self.memory.is_lost()
    }

    /// Whether it is known where the ring is.
    pub fn has_place(&self) -> bool {
        self.places.is_some()
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The entry of the available ring to go on at.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The driver's available index when it was last looked at.
    pub fn avail_seen(&self) -> u16 {
        self.avail_seen
    }

    /// Sets the entry of the available ring to go on at.
    pub fn set_next_avail(&mut self, index: u16) {
        self.next_avail = index;
        self.avail_seen = index;
    }

    /// Takes the used index from the ring: where the device before us, or we before a restart, left off.
    ///
    /// # Errors
    /// The ring has no place.
    pub fn start(&mut self) -> Result<(), Broken> {
        let used: u16 = self.load(self.places()?.used, IDX_AT, Acquire)?;
        self.next_used = u16::from_le(used);
        self.published = self.next_used;
        self.signalled = self.next_used;
        self.avail_seen = self.next_avail;
        Ok(())
    }

    fn places(&self) -> Result<Places, Broken> {
        self.places.ok_or(Broken::Ring)
    }

    fn load<T: AtomicAccess>(
        &self,
        place: Place,
        at: usize,
        order: std::sync::atomic::Ordering,
    ) -> Result<T, Broken> {
        let slice = self.memory.slice(place, at, size_of::<T>());
        slice
            .and_then(|slice| slice.load(0, order).ok())
            .ok_or(Broken::Ring)
    }

    fn store<T: AtomicAccess>(
        &self,
        place: Place,
        at: usize,
        value: T,
        order: std::sync::atomic::Ordering,
    ) -> Result<(), Broken> {
        let slice = self.memory.slice(place, at, size_of::<T>());
        slice
            .and_then(|slice| slice.store(value, 0, order).ok())
            .ok_or(Broken::Ring)
    }

    /// Whether the driver has made buffers available that were not taken.
    ///
    /// # Errors
    /// The index is nonsense.
    pub fn poll(&mut self) -> Result<bool, Broken> {
        Ok(self.next_avail != self.avail_seen || self.has_news()?)
    }

    /// Whether the driver has made buffers available since that was looked for last.
    ///
    /// # Errors
    /// The index is nonsense.
    pub fn has_news(&mut self) -> Result<bool, Broken> {
        let seen: u16 = self.load(self.places()?.available, IDX_AT, Acquire)?;
        let seen = u16::from_le(seen);
        if seen.wrapping_sub(self.next_avail) > self.size {
            return Err(Broken::AvailIndex);
        }
        Ok(std::mem::replace(&mut self.avail_seen, seen) != seen)
    }

    /// Takes the next chain, if there is one: its head, and its buffers behind those that `into` has.
    /// The head goes back with [`Ring::push_used`], or the chain with [`Ring::untake`].
    ///
    /// # Errors
    /// The driver broke a rule.
    pub fn take(&mut self, into: &mut Buffers) -> Result<Option<u16>, Broken> {
        if !self.poll()? {
            return Ok(None);
        }
        let places = self.places()?;
        let entry = usize::from(self.next_avail & (self.size - 1));
        let at = RING_HEADER_LEN + entry * AVAIL_ENTRY_LEN;
        let head = u16::from_le(self.load(places.available, at, Relaxed)?);
        self.walk(places.descriptors, head, into)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(head))
    }

    /// Puts the last `count` chains taken back: they are the next again.
    pub fn untake(&mut self, count: u16) {
        self.next_avail = self.next_avail.wrapping_sub(count);
    }

    /// Follows a chain from its head.
    fn walk(&self, table: Place, head: u16, into: &mut Buffers) -> Result<(), Broken> {
        let (mut table, mut table_len) = (table, u32::from(self.size));
        let mut index = u32::from(head);
        let mut indirect = false;
        for _ in 0..CHAIN_DESCRIPTORS_MAX {
            if index >= table_len {
                return Err(Broken::DescriptorIndex);
            }
            let at = index as usize * DESCRIPTOR_LEN;
            let descriptor: Descriptor = self.copy_out(table, at)?;
            into.descriptors += 1;
            if descriptor.refers_to_indirect_table() {
                // virtio 1.2, 2.7.5.3.1: one level, and nothing behind it.
                if indirect || descriptor.has_next() {
                    return Err(Broken::Indirect);
                }
                indirect = true;
                let bytes = descriptor.len() as usize;
                let entries = bytes / DESCRIPTOR_LEN;
                if !bytes.is_multiple_of(DESCRIPTOR_LEN)
                    || !(1..=usize::from(QUEUE_SIZE_MAX)).contains(&entries)
                {
                    return Err(Broken::Indirect);
                }
                let (place, in_one) = self
                    .memory
                    .guest(descriptor.addr().0, bytes)
                    .ok_or(Broken::Address)?;
                if in_one != bytes {
                    return Err(Broken::Address);
                }
                (table, table_len, index) = (place, entries as u32, 0);
                continue;
            }
            let is_to_guest = self.direction == Direction::ToGuest;
            if descriptor.is_write_only() != is_to_guest {
                return Err(Broken::Direction);
            }
            self.add_buffer(descriptor.addr().0, descriptor.len() as usize, into)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = u32::from(descriptor.next());
        }
        Err(Broken::LongChain)
    }

    fn copy_out<T: ByteValued>(&self, place: Place, at: usize) -> Result<T, Broken> {
        let slice = self.memory.slice(place, at, size_of::<T>());
        slice
            .and_then(|slice| slice.read_obj(0).ok())
            .ok_or(Broken::Ring)
    }

    /// A buffer may lie in several regions where they follow each other: as many pieces as there are.
    fn add_buffer(
        &self,
        mut address: u64,
        mut len: usize,
        into: &mut Buffers,
    ) -> Result<(), Broken> {
        while len != 0 {
            let (place, in_one) = self.memory.guest(address, len).ok_or(Broken::Address)?;
            into.segments.push(Segment { place, len: in_one });
            into.len += in_one;
            len -= in_one;
            address += in_one as u64;
        }
        Ok(())
    }

    /// Gives a chain back, `len` bytes of which were written. The driver sees it after
    /// [`Ring::publish`].
    ///
    /// # Errors
    /// The ring has no place.
    pub fn push_used(&mut self, head: u16, len: usize) -> Result<(), Broken> {
        let used = self.places()?.used;
        let entry = usize::from(self.next_used & (self.size - 1));
        let at = RING_HEADER_LEN + entry * USED_ENTRY_LEN;
        let element = u64::from(head) | (len as u64) << 32;
        let slice = self.memory.slice(used, at, USED_ENTRY_LEN);
        slice.ok_or(Broken::Ring)?.copy_from(&element.to_le_bytes());
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Shows the driver all that was given back; whether there was anything.
    ///
    /// # Errors
    /// The ring has no place.
    pub fn publish(&mut self) -> Result<bool, Broken> {
        if self.published == self.next_used {
            return Ok(false);
        }
        self.store(self.places()?.used, IDX_AT, self.next_used.to_le(), Release)?;
        self.published = self.next_used;
        Ok(true)
    }

    /// Whether the driver wants to be called about what was published since this was asked last (virtio
    /// 1.2, 2.7.7.2).
    ///
    /// # Errors
    /// The ring has no place.
    pub fn wants_call(&mut self) -> Result<bool, Broken> {
        if self.published == self.signalled {
            return Ok(false);
        }
        let available = self.places()?.available;
        // The index just stored, before the driver's wish: the driver does it the other way round.
        fence(SeqCst);
        let wants = if self.event_idx {
            let at = RING_HEADER_LEN + usize::from(self.size) * AVAIL_ENTRY_LEN;
            let event = u16::from_le(self.load(available, at, Relaxed)?);
            let since_event = self.published.wrapping_sub(event).wrapping_sub(1);
            since_event < self.published.wrapping_sub(self.signalled)
        } else {
            let flags: u16 = self.load(available, 0, Relaxed)?;
            u16::from_le(flags) & F_QUIET == 0
        };
        self.signalled = self.published;
        Ok(wants)
    }

    /// Asks the driver to kick when it makes buffers available; `true` if it has already, since they were
    /// last looked for: then no kick comes for them.
    ///
    /// # Errors
    /// The ring has no place, or the index is nonsense.
    pub fn enable_kick(&mut self) -> Result<bool, Broken> {
        let used = self.places()?.used;
        if self.event_idx {
            let at = RING_HEADER_LEN + usize::from(self.size) * USED_ENTRY_LEN;
            self.store(used, at, self.avail_seen.to_le(), Relaxed)?;
        } else {
            self.store(used, 0, 0u16, Relaxed)?;
        }
        // The wish just stored, before the index: the driver does it the other way round.
        fence(SeqCst);
        self.has_news()
    }

    /// Asks the driver not to kick. With EVENT_IDX there is nothing to do: it kicks once per wish.
    ///
    /// # Errors
    /// The ring has no place.
    pub fn disable_kick(&mut self) -> Result<(), Broken> {
        match self.event_idx {
            true => Ok(()),
            false => self.store(self.places()?.used, 0, F_QUIET.to_le(), Relaxed),
        }
    }
}
