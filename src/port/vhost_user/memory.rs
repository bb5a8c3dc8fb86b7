//! A guest's memory, mapped from the descriptors that its front-end sends (SET_MEM_TABLE).
//!
//! Nothing here hands out a reference to guest memory: the guest writes to it while we read. Places are
//! checked once against the table and again whenever they are used, and bytes are copied through
//! vm-memory's volatile slices.
//!
//! # What a front-end can do to the memory behind our back
//! - Shrink the file: an access past its end is a SIGBUS. Files are checked to cover their regions when
//!   they come; where one is shrunk later, zeros stand in for what is gone ([`bus_error`]), and the memory
//!   counts as lost: nothing more is read or written.
//! - Leave it full of holes, or make some: what we touch there is allocated, and charged to us. That goes
//!   by an [`allowance`], and beyond it the memory is lost, too. So do the tables that map it. hugetlbfs has
//!   no holes to speak of: its pages are of a pool that was set aside.
//! - Put it on a file system that answers page faults when it likes (FUSE): only tmpfs and hugetlbfs are
//!   taken, which no process serves.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rustix::fs::{FileType, fstat, fstatfs};
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{FileOffset, VolatileMemory, VolatileSlice};

use super::allowance;
use crate::sys::bus_error;
use crate::sys::userfault::{self, Allowance, Charge};

/// Regions of one guest at most: what one message of the protocol can carry (QEMU and DPDK send 8 at
/// most).
pub const REGIONS_MAX: usize = 32;
/// A guest has its table and, while that is exchanged, the one before it: its share of what can be guarded
/// is the 256th part.
const _: () = assert!(2 * REGIONS_MAX * 256 <= bus_error::GUARDS_MAX);
/// Bytes of one guest's memory at most: what fits the address space many times over, so that a front-end
/// can't exhaust it for the others.
pub const MEMORY_BYTES_MAX: u64 = 1 << 42;

/// linux/magic.h.
const TMPFS_MAGIC: i64 = 0x0102_1994;
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
/// Bytes of a page table, and of each of its entries.
const TABLE_BYTES: u64 = 4096;
const TABLE_ENTRY_BYTES: u64 = 8;

/// Why a region was not taken.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MemoryError {
    /// Too many, or too large.
    #[error("more than {REGIONS_MAX} regions, or more than 4 TiB")]
    TooMuch,
    /// Empty, misaligned, or past the end of what 64 bits say.
    #[error("a region at {0:#x} is empty, misaligned or wraps")]
    Bounds(u64),
    /// Two have addresses in common.
    #[error("regions overlap at {0:#x}")]
    Overlap(u64),
    /// Not memory that can be mapped without asking a process for each page.
    #[error(
        "guest memory is not on tmpfs or hugetlbfs: use memory-backend-memfd, or memory-backend-file in \
         /dev/shm or a hugetlbfs, with share=on"
    )]
    NotMemory,
    /// The file ends before the region does.
    #[error("a file of {file_bytes} bytes ends before its region, which needs {wanted_bytes}")]
    Short {
        /// Size of the file.
        file_bytes: u64,
        /// End of the region in the file.
        wanted_bytes: u64,
    },
    /// Its page tables alone are more than lanlet may allocate.
    #[error(
        "to map it takes {tables_bytes} bytes, and lanlet may allocate {max_bytes} for a port, {used_bytes} of \
         which are used: use huge pages (hugetlbfs), or give lanlet more memory"
    )]
    Tables {
        /// What the tables take.
        tables_bytes: u64,
        /// The port's allowance.
        max_bytes: u64,
        /// What of it is used.
        used_bytes: u64,
    },
    /// A touch of a hole would allocate it, and nothing would bound that.
    #[error(
        "its holes can't be guarded: userfaultfd: {0}; allow that system call (containers' seccomp profiles may \
         not), or put the memory on hugetlbfs"
    )]
    Unguarded(String),
    /// The kernel refused.
    #[error("can't be mapped: {0}")]
    Refused(String),
}

/// A region as the front-end describes it (`struct vhost_user_memory_region`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RegionInfo {
    /// Where the guest has it.
    pub guest_address: u64,
    /// Its size, bytes.
    pub bytes: u64,
    /// Where the front-end's process has it: rings are told by these addresses.
    pub front_end_address: u64,
    /// Where it begins in the file.
    pub file_offset: u64,
}

/// A place in a guest's memory, found in the table it came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    region: u16,
    at: usize,
}

/// A guest's memory.
#[derive(Debug, Default)]
pub struct Memory {
    regions: Vec<Region>,
    /// Some of it could not be had.
    lost: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Region {
    info: RegionInfo,
    /// Bytes of the mapping before the region: a mapping begins at a page of its file system.
    skip: usize,
    /// Gone before the mapping is: fields are dropped in their order.
    guard: bus_error::Guard,
    mapping: MmapRegion,
    allowance: Arc<Allowance>,
    /// Gone after the mapping.
    _tables: Tables,
}

/// What it takes to map a region, as part of an allowance.
#[derive(Debug)]
struct Tables {
    allowance: Arc<Allowance>,
    bytes: u64,
}

impl Tables {
    fn take(allowance: &Arc<Allowance>, pages: u64) -> Result<Self, MemoryError> {
        let bytes = tables_bytes(pages);
        if !allowance.take(bytes) {
            return Err(MemoryError::Tables {
                tables_bytes: bytes,
                max_bytes: allowance.max(),
                used_bytes: allowance.used(),
            });
        }
        Ok(Self {
            allowance: Arc::clone(allowance),
            bytes,
        })
    }
}

impl Drop for Tables {
    fn drop(&mut self) {
        self.allowance.give_back(self.bytes);
    }
}

impl Memory {
    /// Maps regions; what that and their use allocate goes by `allowance`.
    ///
    /// # Errors
    /// The first that can't be taken; nothing stays mapped.
    pub fn map(
        regions: Vec<(RegionInfo, File)>,
        allowance: &Arc<Allowance>,
    ) -> Result<Self, MemoryError> {
        allowance::settle();
        let total = regions
            .iter()
            .try_fold(0u64, |sum, (info, _)| sum.checked_add(info.bytes));
        if regions.len() > REGIONS_MAX || total.is_none_or(|total| total > MEMORY_BYTES_MAX) {
            return Err(MemoryError::TooMuch);
        }
        let mut memory = Self::default();
        for (info, file) in regions {
            memory.check_apart(info)?;
            let region = Region::map(info, file, allowance, &memory.lost)?;
            memory.regions.push(region);
        }
        Ok(memory)
    }

    fn check_apart(&self, new: RegionInfo) -> Result<(), MemoryError> {
        let wraps = |address: u64| address.checked_add(new.bytes).is_none();
        if new.bytes == 0 || wraps(new.guest_address) || wraps(new.front_end_address) {
            return Err(MemoryError::Bounds(new.guest_address));
        }
        let meet = |a: u64, a_bytes: u64, b: u64| a < b + new.bytes && b < a + a_bytes;
        match self.regions.iter().map(|region| region.info).find(|old| {
            meet(old.guest_address, old.bytes, new.guest_address)
                || meet(old.front_end_address, old.bytes, new.front_end_address)
        }) {
            Some(_) => Err(MemoryError::Overlap(new.guest_address)),
            None => Ok(()),
        }
    }

    /// The place of a guest address, and how many of `len` bytes lie there in one piece; `None` outside
    /// the memory.
    #[inline]
    pub fn guest(&self, address: u64, len: usize) -> Option<(Place, usize)> {
        self.find(address, len, |info| info.guest_address)
    }

    /// The place of `len` bytes at an address of the front-end's process, in one piece.
    pub fn front_end(&self, address: u64, len: usize) -> Option<Place> {
        self.find(address, len, |info| info.front_end_address)
            .and_then(|(place, in_one)| (in_one == len).then_some(place))
    }

    #[inline]
    fn find(
        &self,
        address: u64,
        len: usize,
        base: impl Fn(&RegionInfo) -> u64,
    ) -> Option<(Place, usize)> {
        self.regions
            .iter()
            .enumerate()
            .find_map(|(index, Region { info, skip, .. })| {
                let at = address.checked_sub(base(info))?;
                let room = info.bytes.checked_sub(at).filter(|&room| room != 0)?;
                let place = Place {
                    region: index as u16,
                    at: skip + at as usize,
                };
                Some((place, len.min(usize::try_from(room).unwrap_or(usize::MAX))))
            })
    }

    /// Whether some of it could not be had: its file was shrunk, or the allowance is used up.
    #[inline]
    pub fn is_lost(&self) -> bool {
        self.lost.load(Relaxed)
    }

    /// `len` bytes at `offset` from a place; `None` where they are not all of its region, or memory is lost.
    #[inline]
    pub fn slice(&self, place: Place, offset: usize, len: usize) -> Option<VolatileSlice<'_>> {
        if self.is_lost() {
            return None;
        }
        let region = self.regions.get(usize::from(place.region))?;
        let at = place.at.checked_add(offset)?;
        region.mapping.get_slice(at, len).ok()
    }
}

impl Region {
    fn map(
        info: RegionInfo,
        file: File,
        allowance: &Arc<Allowance>,
        lost: &Arc<AtomicBool>,
    ) -> Result<Self, MemoryError> {
        let refused = |error: rustix::io::Errno| MemoryError::Refused(error.to_string());
        let stat = fstat(file.as_fd()).map_err(refused)?;
        let file_system = fstatfs(file.as_fd()).map_err(refused)?.f_type;
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        #[allow(
            clippy::unnecessary_cast,
            reason = "its type differs between architectures"
        )]
        let file_system = file_system as i64 & 0xffff_ffff;
        if !is_file || ![TMPFS_MAGIC, HUGETLBFS_MAGIC].contains(&file_system) {
            return Err(MemoryError::NotMemory);
        }
        let file_bytes = u64::try_from(stat.st_size).unwrap_or(0);
        let bounds = MemoryError::Bounds(info.guest_address);
        let wanted_bytes = info.file_offset.checked_add(info.bytes);
        let wanted_bytes = wanted_bytes.ok_or(bounds.clone())?;
        if wanted_bytes > file_bytes {
            return Err(MemoryError::Short {
                file_bytes,
                wanted_bytes,
            });
        }
        // On hugetlbfs, a mapping begins and ends at a huge page; st_blksize is its size there.
        let page = u64::try_from(stat.st_blksize).unwrap_or(0);
        if !page.is_power_of_two() {
            return Err(bounds);
        }
        let begin = info.file_offset & !(page - 1);
        let end = wanted_bytes
            .checked_next_multiple_of(page)
            .ok_or(bounds.clone())?;
        let size = usize::try_from(end - begin).map_err(|_| bounds)?;
        let pages = (end - begin) / page;
        let tables = Tables::take(allowance, pages)?;
        let mapping = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(file, begin))
            .build()
            .map_err(|error| MemoryError::Refused(error.to_string()))?;
        let start = mapping.as_ptr() as usize;
        if file_system == TMPFS_MAGIC {
            userfault::watch(start, size)
                .map_err(|error| MemoryError::Unguarded(error.to_string()))?;
        }
        let charge = Charge::new(
            (start, pages as usize),
            Arc::clone(allowance),
            Arc::clone(lost),
        );
        let guard = bus_error::guard(start, size, page as usize, charge)
            .map_err(|error| MemoryError::Refused(error.to_string()))?;
        Ok(Self {
            info,
            guard,
            skip: (info.file_offset - begin) as usize,
            mapping,
            allowance: Arc::clone(allowance),
            _tables: tables,
        })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let filled = self.guard.charge().filled();
        if let Some(file) = self.mapping.file_offset().filter(|_| filled != 0) {
            allowance::count_until_gone(file.file(), &self.allowance, filled);
        }
    }
}

/// Bytes of the tables that map so many pages at most: a level, with those above it, and both its ends. Our
/// own table, a bit for each ([`Charge`]), is as long as eight of those above.
fn tables_bytes(pages: u64) -> u64 {
    let level = pages.saturating_mul(TABLE_ENTRY_BYTES);
    level
        .saturating_add(level / 32)
        .saturating_add(4 * TABLE_BYTES)
}
