//! System calls that need care: everything `unsafe` of the crate lives under this module, each block
//! with the reasons why it is sound.
//!
//! Each submodule wraps one kernel interface and takes and returns owned or borrowed fds; what is
//! built from them reads like ordinary code.

pub mod arena;
pub mod bus_error;
pub mod error_queue;
pub mod eventfd;
pub mod fd_pass;
pub mod fork;
pub mod harden;
pub mod inherited;
pub mod late_close;
pub mod memory_limit;
pub mod mmsg;
pub mod name;
pub mod namespace;
pub mod netlink;
pub mod open_files;
pub mod option;
pub mod packet_ring;
pub mod peer;
pub mod rtnl;
pub mod signal;
pub mod small_file;
pub mod socket;
pub mod tun;
pub mod user;
pub mod userfault;
