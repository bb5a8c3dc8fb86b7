//! What a front-end asks for, message by message (docs/interop/vhost-user.rst of QEMU).
//!
//! The vhost crate reads and checks the messages' form; here is what they mean. An error ends the
//! connection: the front-end finds the port anew, from the start, when it connects again.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::OFlags;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::device::{Device, QUEUE_PAIRS_MAX, QUEUES_MAX, SetupError};
use super::memory::{Memory, MemoryError, RegionInfo};
use super::queue::Terms;
use super::ring::Addresses;
use crate::offload::Caps;

/// Bits of `VIRTIO_NET_F_*` (virtio 1.2, 5.1.3) and of the reserved ones (6).
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_ECN: u64 = 1 << 9;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const MQ: u64 = 1 << 22;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
}

/// What the port can do. Front-ends take away what they do not know.
const FEATURES: u64 = feature::CSUM
    | feature::GUEST_CSUM
    | feature::GUEST_TSO4
    | feature::GUEST_TSO6
    | feature::GUEST_ECN
    | feature::HOST_TSO4
    | feature::HOST_TSO6
    | feature::HOST_ECN
    | feature::MRG_RXBUF
    | feature::STATUS
    | feature::MQ
    | feature::INDIRECT_DESC
    | feature::EVENT_IDX
    | feature::VERSION_1
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Extensions of the protocol: no more than is needed. QEMU 7.2 crashed on a back-end that offered some it
/// did not know.
const PROTOCOL_FEATURES: VhostUserProtocolFeatures =
    VhostUserProtocolFeatures::MQ.union(VhostUserProtocolFeatures::REPLY_ACK);

/// What features mean for frames.
fn terms(features: u64) -> Terms {
    let has = |bits: u64| features & bits == bits;
    let long_header = has(feature::VERSION_1) || has(feature::MRG_RXBUF);
    Terms {
        caps: Caps {
            csum: has(feature::GUEST_CSUM),
            tso: has(feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::GUEST_TSO6),
            uso: false,
        },
        ecn: has(feature::GUEST_ECN),
        mergeable: has(feature::MRG_RXBUF),
        long_header,
        event_idx: has(feature::EVENT_IDX),
    }
}

/// One connection's front-end.
pub struct FrontEnd {
    device: Arc<Device>,
    /// REPLY_ACK was agreed on.
    replies: bool,
}

impl FrontEnd {
    /// One that has not said anything.
    pub fn new(device: Arc<Device>) -> Self {
        Self {
            device,
            replies: false,
        }
    }

    /// Whether the front-end may want to hear how each of its messages went.
    pub fn replies(&self) -> bool {
        self.replies
    }

    /// Says why a wish was not met. The protocol has no words for it.
    fn check<T>(&self, what: &str, result: std::result::Result<T, SetupError>) -> Result<T> {
        result.map_err(|error| self.refuse(what, &error))
    }

    fn refuse(&self, what: &str, error: &dyn std::fmt::Display) -> Error {
        log::warn!(
            "{}: front-end's {what} refused: {error}",
            self.device.name()
        );
        Error::InvalidParam
    }

    fn map(
        &self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
    ) -> std::result::Result<Memory, MemoryError> {
        let info = |region: &VhostUserMemoryRegion| RegionInfo {
            guest_address: region.guest_phys_addr,
            bytes: region.memory_size,
            front_end_address: region.user_addr,
            file_offset: region.mmap_offset,
        };
        let regions = regions.iter().map(info).zip(files).collect();
        Memory::map(regions, self.device.allowance())
    }
}

impl Drop for FrontEnd {
    fn drop(&mut self) {
        self.device.reset();
    }
}

/// The eventfd in a file that a front-end sent.
///
/// Its kind is checked, since a write to anything else may block, and it is made non-blocking, where
/// [`crate::sys::eventfd`] has to write: a front-end that means harm can undo that.
fn eventfd(file: Option<File>) -> std::result::Result<OwnedFd, SetupError> {
    let fd = OwnedFd::from(file.ok_or(SetupError::NoEventfd)?);
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    if link.as_os_str() != "anon_inode:[eventfd]" {
        return Err(SetupError::NoEventfd);
    }
    let nonblocking = || {
        let flags = rustix::fs::fcntl_getfl(fd.as_fd())?;
        rustix::fs::fcntl_setfl(fd.as_fd(), flags | OFlags::NONBLOCK)
    };
    nonblocking().map_err(std::io::Error::from)?;
    Ok(fd)
}

impl VhostUserBackendReqHandlerMut for FrontEnd {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.device.reset();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !FEATURES != 0 {
            let more = features & !FEATURES;
            return Err(self.refuse("SET_FEATURES", &format!("{more:#x} was not offered")));
        }
        self.device.set_terms(terms(features));
        let name = self.device.name();
        log::debug!("{name}: front-end's features are {features:#x}");
        // vhost-user.rst, "Ring states": rings need no enabling without this bit.
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            for index in 0..QUEUES_MAX {
                self.set_vring_enable(index as u32, true)?;
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        match self.map(regions, files) {
            Ok(memory) => {
                let set = self.device.set_memory(&Arc::new(memory));
                self.check("SET_MEM_TABLE", set).map(|()| None)
            }
            Err(error) => Err(self.refuse("SET_MEM_TABLE", &error)),
        }
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let set = self
            .device
            .change(index as usize, |queue| Ok(queue.ring.set_size(num)?));
        self.check("SET_VRING_NUM", set)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let addresses = Addresses {
            descriptors,
            available,
            used,
        };
        let set = self.device.change(index as usize, |queue| {
            Ok(queue.ring.set_addresses(addresses)?)
        });
        self.check("SET_VRING_ADDR", set)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let set = self.device.change(index as usize, |queue| {
            // The upper bits are of packed rings, which are not offered.
            queue.ring.set_next_avail(base as u16);
            Ok(())
        });
        self.check("SET_VRING_BASE", set)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let base = self.check("GET_VRING_BASE", self.device.stop(index as usize))?;
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let set = eventfd(file).and_then(|kick| self.device.set_kick(index.into(), kick));
        self.check("SET_VRING_KICK", set)
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        // Without one, the guest polls.
        let call = file.map(|file| eventfd(Some(file))).transpose();
        let set = call.and_then(|call| {
            self.device.change(index.into(), |queue| {
                queue.call = call;
                Ok(())
            })
        });
        self.check("SET_VRING_CALL", set)
    }

    fn set_vring_err(&mut self, _: u8, _: Option<File>) -> Result<()> {
        // QEMU and DPDK send none or don't look at it; a ring that is given up is said in the log.
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(PROTOCOL_FEATURES)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        match features & !PROTOCOL_FEATURES.bits() {
            0 => {
                self.replies = features & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0;
                Ok(())
            }
            more => Err(self.refuse(
                "SET_PROTOCOL_FEATURES",
                &format!("{more:#x} was not offered"),
            )),
        }
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        // Of a network card, pairs are meant (QEMU net/vhost-user.c, DPDK lib/vhost).
        Ok(QUEUE_PAIRS_MAX as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let set = self.device.change(index as usize, |queue| {
            queue.enabled = enable;
            Ok(())
        });
        self.check("SET_VRING_ENABLE", set)
    }

    // What was not offered.

    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Err(Error::InvalidOperation("GET_CONFIG"))
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        Err(Error::InvalidOperation("SET_CONFIG"))
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("GPU_SET_SOCKET"))
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("GET_SHARED_OBJECT"))
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("GET_INFLIGHT_FD"))
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        Err(Error::InvalidOperation("SET_INFLIGHT_FD"))
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Err(Error::InvalidOperation("GET_MAX_MEM_SLOTS"))
    }

    fn add_mem_region(
        &mut self,
        _: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> Result<Option<u64>> {
        Err(Error::InvalidOperation("ADD_MEM_REG"))
    }

    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        Err(Error::InvalidOperation("REM_MEM_REG"))
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("SET_DEVICE_STATE_FD"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("CHECK_DEVICE_STATE"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("GET_SHMEM_CONFIG"))
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        Err(Error::InvalidOperation("SET_LOG_BASE"))
    }
}
