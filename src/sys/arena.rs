//! Ring memory for TCP sockets, mapped once and reused last in, first out.
//!
//! `vec!` is not used for it: after the first big `free`, glibc serves such sizes from the heap and
//! clears them, and opening a flow costs 1 ms instead of 0.3 µs (measured on glibc 2.36). Memory is
//! reserved in chunks without being touched; pages become resident as data first flows over them and
//! are given back when a socket has idled with empty rings, when more than `HOT_SLOTS` released
//! rings have piled up, or when nobody has wanted a released one for a while ([`release_unused`]).
//!
//! This is memory, not I/O: the logic layer's `nat` may use it.

use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp;

/// Guest to host, at most. More than 512 KiB gained nothing upward where it was measured.
pub const RX_RING_BYTES: usize = 512 * 1024;
/// Host to guest: bounds what is in flight to the guest. 1 MiB gave 26-33 Gbit/s, 512 KiB 18-23.
pub const TX_RING_BYTES: usize = 1024 * 1024;
/// What memory is given back in, at least.
pub const PAGE_BYTES: usize = 4096;
const SLOT_BYTES: usize = RX_RING_BYTES + TX_RING_BYTES;
/// Slots mapped at a time: 48 MiB of address space, no memory.
const CHUNK_SLOTS: usize = 32;
/// Released slots that keep their pages for the next flow; beyond, pages go back to the system at
/// once. Costs at most 12 MiB, and only after that many flows moved that much each, until
/// [`release_unused`] finds them unwanted.
const HOT_SLOTS: usize = 8;

const _: () = assert!(RX_RING_BYTES.is_multiple_of(65_536) && TX_RING_BYTES.is_multiple_of(65_536));

/// Hands out socket memory; cheap to clone.
#[derive(Clone)]
pub struct Arena(Arc<Mutex<Slots>>);

/// The arenas of this process: its memory is looked after as a whole.
static ARENAS: Mutex<Vec<Weak<Mutex<Slots>>>> = Mutex::new(Vec::new());

/// Gives the pages of released rings back to the system where none of them was wanted since the last
/// call, in any arena. Meant to be called about once a second, by a thread that may take its time: a
/// ring takes up to 0.1 ms, during which nobody waits for the arena.
pub fn release_unused() {
    let arenas = lock(&ARENAS).clone();
    for arena in arenas.iter().filter_map(Weak::upgrade) {
        // Those that were released first. They belong to nobody until they are back.
        let unused = lock(&arena).take_unused();
        unused.iter().for_each(|&slot| discard(slot));
        lock(&arena).cold.extend(unused);
    }
}

struct Slots {
    chunks: Vec<Chunk>,
    /// Free slots whose pages may be resident, newest last.
    hot: Vec<Slot>,
    /// The fewest that `hot` had since the last [`release_unused`]: so many were not wanted.
    hot_lowest: usize,
    /// Free slots without pages.
    cold: Vec<Slot>,
    slots_max: usize,
}

/// A mapping of [`CHUNK_SLOTS`] slots, unmapped when the arena goes.
struct Chunk(NonNull<u8>);

#[derive(Clone, Copy)]
struct Slot(NonNull<u8>);

#[allow(unsafe_code)]
// SAFETY: a slot or chunk is an address range of a private anonymous mapping, bound to no thread;
// who may touch it is decided by ownership of `TcpSocket` and the mutex around `Slots`.
unsafe impl Send for Slot {}
#[allow(unsafe_code)]
// SAFETY: as above.
unsafe impl Send for Chunk {}

impl Drop for Chunk {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `map_chunk` with this size and nobody else unmaps it. Every
        // `TcpSocket` holds the arena alive, so no ring in the range is in use.
        let unmapped = unsafe { munmap(self.0.as_ptr().cast(), CHUNK_SLOTS * SLOT_BYTES) };
        debug_assert!(unmapped.is_ok());
    }
}

impl Arena {
    /// An arena for at most `slots_max` sockets at a time.
    pub fn new(slots_max: usize) -> Self {
        let slots = Arc::new(Mutex::new(Slots {
            chunks: Vec::new(),
            hot: Vec::new(),
            hot_lowest: 0,
            cold: Vec::new(),
            slots_max,
        }));
        let mut arenas = lock(&ARENAS);
        arenas.retain(|arena| arena.strong_count() > 0);
        arenas.push(Arc::downgrade(&slots));
        Self(slots)
    }

    /// A closed TCP socket on rings of its own; `None` at the limit or when the system gives no
    /// address space. Its receive ring has `rx_bytes`, at most [`RX_RING_BYTES`]: smoltcp walks
    /// through all of that ring however little lies in it, so a busy flow keeps all of it resident.
    pub fn socket(&self, rx_bytes: usize) -> Option<TcpSocket> {
        let slot = self.lock().take()?;
        let (rx, tx) = ring_slices(slot);
        let rx = &mut rx[..rx_bytes.min(RX_RING_BYTES)];
        let mut set = SocketSet::new(Vec::with_capacity(1));
        let handle = set.add(tcp::Socket::new(
            tcp::SocketBuffer::new(rx),
            tcp::SocketBuffer::new(tx),
        ));
        Some(TcpSocket {
            set,
            handle,
            slot,
            arena: self.clone(),
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Slots> {
        lock(&self.0)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Slots are pushed and popped whole: a panic elsewhere leaves nothing half-done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[allow(unsafe_code)]
fn ring_slices(slot: Slot) -> (&'static mut [u8], &'static mut [u8]) {
    // SAFETY: the slot is a live, readable and writable, initialised range of SLOT_BYTES which was just
    // taken from the free lists, so no other reference to it exists; the two halves do not
    // overlap. The 'static slices are owned by the socket inside a `TcpSocket`, which drops it before
    // it gives the slot back and never lets it out: `TcpSocket::with` takes a closure that works for
    // any lifetime, so neither socket nor slices can be swapped out by safe code.
    unsafe {
        let base = slot.0.as_ptr();
        (
            std::slice::from_raw_parts_mut(base, RX_RING_BYTES),
            std::slice::from_raw_parts_mut(base.add(RX_RING_BYTES), TX_RING_BYTES),
        )
    }
}

impl Slots {
    fn take(&mut self) -> Option<Slot> {
        if self.hot.is_empty() && self.cold.is_empty() {
            if self.chunks.len() * CHUNK_SLOTS >= self.slots_max {
                return None;
            }
            self.map_chunk()?;
        }
        let slot = self.hot.pop().or_else(|| self.cold.pop());
        self.hot_lowest = self.hot_lowest.min(self.hot.len());
        slot
    }

    /// Removes the hot slots that were not wanted since the last call.
    fn take_unused(&mut self) -> Vec<Slot> {
        let unused = self.hot.drain(..self.hot_lowest).collect();
        self.hot_lowest = self.hot.len();
        unused
    }

    #[allow(unsafe_code)]
    fn map_chunk(&mut self) -> Option<()> {
        let len = CHUNK_SLOTS * SLOT_BYTES;
        // SAFETY: a fresh private anonymous mapping at an address of the kernel's choice aliases
        // nothing. Its NonNull pointer and length are recorded in `chunks`, which unmaps it once.
        let base = unsafe {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
            let base = mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )
            .ok()?;
            // Huge pages would make one byte in a ring cost 2 MiB. Refusal (no THP built in) is fine.
            let _ = madvise(base, len, Advice::LinuxNoHugepage);
            NonNull::new(base.cast::<u8>())?
        };
        self.chunks.push(Chunk(base));
        for index in (0..CHUNK_SLOTS).rev() {
            // SAFETY: index * SLOT_BYTES lies within the mapping made above.
            self.cold
                .push(Slot(unsafe { base.add(index * SLOT_BYTES) }));
        }
        Some(())
    }

    fn give_back(&mut self, slot: Slot) {
        if self.hot.len() < HOT_SLOTS {
            self.hot.push(slot);
        } else {
            discard(slot);
            self.cold.push(slot);
        }
    }
}

/// Returns a slot's pages to the system; it reads as zeros afterwards.
#[allow(unsafe_code)]
fn discard(slot: Slot) {
    // SAFETY: the range is a whole slot of our own private anonymous mapping. Callers make sure that
    // its bytes mean nothing: the slot is free, or both rings of its socket are empty. In the second
    // case the socket's slices live on; the kernel writes zeros under them between two of their uses,
    // which the compiler can't see through the system call, and the rings hold plain bytes that are
    // written before they are read again.
    let _ = unsafe { madvise(slot.0.as_ptr().cast(), SLOT_BYTES, Advice::LinuxDontNeed) };
}

/// Returns the pages of a ring at `base` to the system that hold nothing of the `len` bytes from `head` on.
#[allow(unsafe_code)]
fn discard_free(base: NonNull<u8>, ring_bytes: usize, head: usize, len: usize) {
    let (start, end) = (head + len, head + ring_bytes);
    // The free bytes, of a ring that goes on at its beginning.
    let pieces = [
        (start, end.min(ring_bytes)),
        (start.max(ring_bytes) - ring_bytes, end - ring_bytes),
    ];
    for (start, end) in pieces {
        let start = start.next_multiple_of(PAGE_BYTES);
        let end = end / PAGE_BYTES * PAGE_BYTES;
        if start < end {
            // SAFETY: base..base + ring_bytes is a ring of a live slot, page-aligned, and 0 <= start < end <=
            // ring_bytes. Nothing that the socket will read again lies in the range; as in `discard`, the
            // socket's slices live on over zeros that are written before they are read.
            let _ = unsafe {
                madvise(
                    base.add(start).as_ptr().cast(),
                    end - start,
                    Advice::LinuxDontNeed,
                )
            };
        }
    }
}

/// One smoltcp TCP socket in a set of its own, on arena memory.
pub struct TcpSocket {
    // Dropped first: it holds the slices into the slot.
    set: SocketSet<'static>,
    handle: SocketHandle,
    slot: Slot,
    arena: Arena,
}

impl TcpSocket {
    /// Calls `f` with the set. The closure must work for any lifetime, so that the socket can't
    /// leave its rings.
    pub fn with<R>(&mut self, f: impl for<'a> FnOnce(&mut SocketSet<'a>) -> R) -> R {
        f(&mut self.set)
    }

    /// The socket.
    pub fn get(&self) -> &tcp::Socket<'static> {
        self.set.get(self.handle)
    }

    /// Calls `f` with the socket, under the same rule as [`TcpSocket::with`].
    pub fn with_socket<R>(&mut self, f: impl for<'a> FnOnce(&mut tcp::Socket<'a>) -> R) -> R {
        f(self.set.get_mut(self.handle))
    }

    /// Gives the rings' pages back to the system that no data is in, while the socket lives on. `ahead`:
    /// bytes behind the received ones within which out-of-order data may lie. Returns what is still in use
    /// of the receive and the send ring; `None`: it stays as it is.
    #[allow(unsafe_code)]
    pub fn discard_free(&mut self, ahead: usize) -> (Option<usize>, Option<usize>) {
        let base = self.slot.0;
        // SAFETY: the send ring begins RX_RING_BYTES into the slot.
        let tx_base = unsafe { base.add(RX_RING_BYTES) };
        let socket = self.set.get_mut::<tcp::Socket<'static>>(self.handle);
        let (rx_bytes, received) = (socket.recv_capacity(), socket.recv_queue());
        let (tx_bytes, queued) = (socket.send_capacity(), socket.send_queue());
        let received = (received + ahead).min(rx_bytes);
        // Both show where they are, and take or give nothing. They refuse before the connection is made and
        // after its end; where nothing is in the ring then, nothing will be.
        let head = socket.recv(|bytes| (0, bytes.as_ptr().addr() - base.addr().get()));
        let tail = socket.send(|room| (0, room.as_ptr().addr() - tx_base.addr().get()));
        let rx_used = head.ok().or((received == 0).then_some(0)).map(|head| {
            discard_free(base, rx_bytes, head, received);
            received
        });
        let tx_used = tail.ok().or((queued == 0).then_some(0)).map(|tail| {
            let head = (tail + tx_bytes - queued) % tx_bytes;
            discard_free(tx_base, tx_bytes, head, queued);
            queued
        });
        (rx_used, tx_used)
    }
}

impl Drop for TcpSocket {
    fn drop(&mut self) {
        // The socket and its slices go before the slot is free for another.
        self.set = SocketSet::new(Vec::new());
        self.arena.lock().give_back(self.slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_reused_last_in_first_out_and_bounded() {
        let arena = Arena::new(CHUNK_SLOTS);
        let mut sockets: Vec<_> = (0..CHUNK_SLOTS)
            .map(|_| arena.socket(RX_RING_BYTES).unwrap())
            .collect();
        assert!(arena.socket(RX_RING_BYTES).is_none());
        let newest = sockets.pop().unwrap();
        let address = newest.slot.0;
        drop(newest);
        assert_eq!(arena.socket(RX_RING_BYTES).unwrap().slot.0, address);
        drop(sockets);
        assert_eq!(arena.lock().hot.len(), HOT_SLOTS);
        assert_eq!(arena.lock().chunks.len(), 1);
    }

    #[test]
    fn released_rings_that_nobody_wants_are_given_back() {
        let mut slots = Slots {
            chunks: Vec::new(),
            hot: Vec::new(),
            hot_lowest: 0,
            cold: Vec::new(),
            slots_max: CHUNK_SLOTS,
        };
        let three = [slots.take(), slots.take(), slots.take()].map(Option::unwrap);
        three.iter().for_each(|&slot| slots.give_back(slot));
        assert!(slots.take_unused().is_empty(), "they were in use");
        // One is wanted meanwhile: the newest.
        let wanted = slots.take().unwrap();
        slots.give_back(wanted);
        assert_eq!(wanted.0, three[2].0);
        let unused: Vec<_> = slots.take_unused().iter().map(|slot| slot.0).collect();
        assert_eq!(unused, [three[0].0, three[1].0]);
        assert_eq!(slots.take_unused().len(), 1);
        assert!(slots.hot.is_empty());
    }

    #[test]
    fn release_unused_finds_every_arena() {
        let arena = Arena::new(1);
        drop(arena.socket(RX_RING_BYTES).unwrap());
        assert_eq!(arena.lock().hot.len(), 1);
        // Tests beside this one may have an arena, too: a call more does no harm.
        release_unused();
        release_unused();
        let slots = arena.lock();
        assert!(slots.hot.is_empty());
    }

    #[test]
    fn pages_without_data_are_given_back_and_no_others() {
        let ring = 8 * PAGE_BYTES;
        let mut slots = Slots {
            chunks: Vec::new(),
            hot: Vec::new(),
            hot_lowest: 0,
            cold: Vec::new(),
            slots_max: CHUNK_SLOTS,
        };
        let slot = slots.take().unwrap();
        for head in [0, 1, 4095, 4096, 20_000, ring - 1] {
            for len in [0, 1, 4096, 9_000, ring - 4096, ring] {
                let (bytes, _) = ring_slices(slot);
                bytes[..ring + 1].fill(7);
                discard_free(slot.0, ring, head, len);
                let (bytes, _) = ring_slices(slot);
                for at in 0..len {
                    assert_eq!(bytes[(head + at) % ring], 7, "{head} {len}");
                }
                assert_eq!(bytes[ring], 7, "beyond the ring");
                let kept = bytes[..ring].iter().filter(|&&byte| byte == 7).count();
                assert!(kept < len + 2 * PAGE_BYTES, "{head} {len}: {kept}");
            }
        }
    }

    #[test]
    fn a_socket_outlives_the_arena_handle_and_its_rings_can_be_discarded() {
        let arena = Arena::new(1);
        let mut socket = arena.socket(RX_RING_BYTES).unwrap();
        drop(arena);
        assert_eq!(socket.get().recv_capacity(), RX_RING_BYTES);
        assert_eq!(socket.get().send_capacity(), TX_RING_BYTES);
        assert_eq!(socket.discard_free(0), (Some(0), Some(0)));
        assert_eq!(socket.discard_free(1), (None, Some(0)), "who knows where");
    }
}
