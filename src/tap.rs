//! Taps and the namespaces they stand in.
//!
//! ```text
//!     qemu -netdev tap,fd=N                     lanlet's worker
//!            | vm fd                                  | sw fd
//!  - - - - - | - - helper's user + net namespace - - -| - - - - -
//!         [vm0]  ingress: redirect to sw0 ------->  [sw0]
//!         [vm0]  <------- redirect to vm0: ingress  [sw0]
//! ```
//! A VMM takes nothing but a real tap, and behind a tap stands a kernel. So the [`helper`], a child
//! process in a network namespace of its own, makes two taps per VMM and lets the kernel carry every
//! frame that enters by one out by the other (tc `clsact`, `mirred egress redirect`). An unprivileged
//! user may do all this inside a user namespace. Where the kernel lacks act_mirred, a packet socket
//! on the `vm` tap replaces the second tap ([`WireKind::Packet`]).
//!
//! The taps are no children of the helper: a wire stands as long as both its ends are open somewhere, and an
//! open tap keeps its namespace. Whoever keeps copies of the switch's fds can so hand the wire to another
//! network when its own has ended ([`WireOptions::netlink`]).
//!
//! A namespace guest needs no wire: the switch holds the tap whose netdev is the guest's `eth0`
//! ([`guest`]).
//!
//! # Queues
//! Nothing pushes back through a tap: when its queue is full the frame is gone. The queues are
//! therefore [`TX_QUEUE_LEN`] long, and what they drop is counted ([`crate::port::DropSource`]).

mod client;
pub mod guest;
pub mod helper;
mod protocol;
mod wire;

pub(crate) use client::use_own_program;
pub use client::{HELPER_SUBCOMMAND, Helper, HelperEvents, Wire, WireDrops, WireOptions};
pub use protocol::Event;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::port::{DropSource, KernelDrops};
use crate::sys::netlink::{NetlinkError, RouteSocket};
use crate::sys::tun::{self, TUN_PATH};

/// Entries of a tap's queue. A guest without TSO turns a 64 KB super-frame into 45 of them, and the
/// default of 1,000 holds one flow's window: 16,384 holds the windows of sixteen, in 128 KiB.
pub const TX_QUEUE_LEN: u32 = 16_384;
/// Queues of a tap at most: both ends' fds of a wire travel in one message, with a netlink socket.
pub const QUEUES_MAX: u16 = 16;
const _: () = assert!(2 * (QUEUES_MAX as usize) < crate::sys::fd_pass::FDS_MAX);

/// How a VMM's tap is joined to the switch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WireKind {
    /// A pair of taps, redirected into each other.
    Mirred,
    /// One tap with a packet socket on it.
    Packet,
}

/// Why a tap or its namespace could not be set up. Each names what to do about it.
#[derive(Clone, Debug, thiserror::Error, Serialize, Deserialize)]
pub enum TapError {
    /// No tun driver.
    #[error(
        "{TUN_PATH} does not exist or has no driver: as root, `modprobe tun` (in a container: \
         pass the device in, `--device {TUN_PATH}`)"
    )]
    TunMissing,
    /// The device's mode forbids it.
    #[error(
        "no permission to open {TUN_PATH}: as root, `chmod 0666 {TUN_PATH}`; to keep it over a \
         restart, a udev rule with KERNEL==\"tun\", MODE=\"0666\""
    )]
    TunDenied,
    /// A tap could not be made or prepared.
    #[error("tap {name}: {cause}")]
    Tap {
        /// Its name.
        name: String,
        /// The kernel's answer.
        cause: String,
    },
    /// An fd that was given is of the wrong kind.
    #[error("the file descriptor is not a tap that lanlet can use: {cause}")]
    NotATap {
        /// What is wrong with it.
        cause: String,
    },
    /// The host forbids unprivileged namespaces.
    #[error("unprivileged namespaces are not available ({cause}): {remedy}")]
    Namespace {
        /// The kernel's answer.
        cause: String,
        /// The sysctl to set.
        remedy: String,
    },
    /// A netlink request failed.
    #[error("{action}: {cause}")]
    Netlink {
        /// What was asked.
        action: String,
        /// The kernel's answer.
        cause: String,
    },
    /// The helper could not be started.
    #[error(
        "cannot start the namespace helper {program}: {cause}; set LANLET_HELPER to the path of \
         the lanlet program, or begin the program's main with lanlet::tap::helper::run_if_asked()"
    )]
    HelperProgram {
        /// What was executed.
        program: String,
        /// Why it failed.
        cause: String,
    },
    /// The helper is not there any more.
    #[error("the namespace helper has ended: {cause}")]
    HelperGone {
        /// How it showed.
        cause: String,
    },
    /// The helper's answer could not be received as it is.
    #[error(
        "the namespace helper's answer can't be used: {cause}; it may be the limit of open files \
         ('ulimit -n')"
    )]
    HelperAnswer {
        /// What is wrong.
        cause: String,
    },
    /// A namespace of somebody else's could not be entered.
    #[error(
        "cannot enter the namespace: {cause}; it has to be a network namespace of yours, one that you \
         made in a user namespace (else: as root)"
    )]
    Join {
        /// The kernel's answer.
        cause: String,
    },
    /// A link of this name is there.
    #[error("the namespace has a link {ifname} already: choose another name with --ifname")]
    LinkExists {
        /// The name.
        ifname: String,
    },
    /// A file of a guest's namespace could not be set.
    #[error("{path}: {cause}")]
    GuestFile {
        /// The file.
        path: String,
        /// Why, and what follows from it.
        cause: String,
    },
}

impl TapError {
    /// For an fd that is not what was asked for.
    pub fn not_a_tap(error: impl std::fmt::Display) -> Self {
        Self::NotATap {
            cause: error.to_string(),
        }
    }

    /// For tap `name`.
    pub fn tap(name: &str, error: &io::Error) -> Self {
        Self::Tap {
            name: name.to_owned(),
            cause: error.to_string(),
        }
    }

    /// For making tap `name` from [`TUN_PATH`].
    fn tap_open(name: &str, error: &io::Error) -> Self {
        match error.raw_os_error() {
            // ENOTTY: something else is in its place, as containers put /dev/null over what they hide.
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO | libc::ENOTTY) => Self::TunMissing,
            // The device could be opened: it is the namespace that lacks CAP_NET_ADMIN, as with
            // AppArmor's restriction.
            Some(libc::EPERM) if tun::open().is_ok() => Self::namespace(error),
            Some(libc::EACCES | libc::EPERM) => Self::TunDenied,
            _ => Self::tap(name, error),
        }
    }

    fn netlink(action: impl Into<String>, error: &NetlinkError) -> Self {
        Self::Netlink {
            action: action.into(),
            cause: error.to_string(),
        }
    }

    pub(crate) fn namespace(error: &io::Error) -> Self {
        Self::Namespace {
            cause: error.to_string(),
            remedy: namespace_remedy(),
        }
    }
}

/// Switches that forbid namespaces to ordinary users, with the value that does.
const NAMESPACE_SYSCTLS: [(&str, &str, &str); 5] = [
    ("user.max_user_namespaces", "0", "15000"),
    ("user.max_net_namespaces", "0", "15000"),
    ("user.max_mnt_namespaces", "0", "15000"),
    ("kernel.unprivileged_userns_clone", "0", "1"),
    ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
];

fn namespace_remedy() -> String {
    let culprits: Vec<String> = NAMESPACE_SYSCTLS
        .iter()
        .filter(|(name, forbids, _)| {
            let path = format!("/proc/sys/{}", name.replace('.', "/"));
            fs::read_to_string(path).is_ok_and(|value| value.trim() == *forbids)
        })
        .map(|(name, _, allows)| format!("as root, `sysctl -w {name}={allows}`"))
        .collect();
    if culprits.is_empty() {
        let names = NAMESPACE_SYSCTLS.map(|(name, ..)| name).join(", ");
        format!("check the sysctls {names}, and the seccomp profile if this is a container")
    } else {
        culprits.join("; ")
    }
}

/// Drops of a tap by its netdev's counters, read through a netlink socket of the netdev's namespace.
pub struct LinkDrops {
    socket: Mutex<RouteSocket>,
    ifname: String,
}

/// Drops of a wire whose helper is gone, read as those of [`LinkDrops`].
pub struct KeptWireDrops {
    socket: Mutex<RouteSocket>,
    vm_ifname: String,
    sw_ifname: String,
}

impl KeptWireDrops {
    /// For the two taps of these names in the namespace where `socket`, a NETLINK_ROUTE socket, was opened.
    ///
    /// # Errors
    /// When `socket` is something else.
    pub fn new(socket: OwnedFd, vm_ifname: String, sw_ifname: String) -> io::Result<Self> {
        let socket = Mutex::new(RouteSocket::from_fd(socket)?);
        Ok(Self {
            socket,
            vm_ifname,
            sw_ifname,
        })
    }
}

impl DropSource for KeptWireDrops {
    fn kernel_drops(&self) -> io::Result<KernelDrops> {
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let drops = wire::pair_drops(&mut socket, &self.vm_ifname, Some(&self.sw_ifname));
        drops.map_err(io::Error::other)
    }
}

impl LinkDrops {
    /// For `ifname` in the namespace where `socket`, a NETLINK_ROUTE socket, was opened.
    ///
    /// # Errors
    /// When `socket` is something else.
    pub fn new(socket: OwnedFd, ifname: &str) -> io::Result<Self> {
        let socket = Mutex::new(RouteSocket::from_fd(socket)?);
        Ok(Self {
            socket,
            ifname: ifname.to_owned(),
        })
    }
}

impl DropSource for LinkDrops {
    fn kernel_drops(&self) -> io::Result<KernelDrops> {
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let link = socket.link(&self.ifname).map_err(io::Error::other)?;
        // The netdev's view is the mirror of the port's: what it transmits the port receives.
        Ok(KernelDrops {
            rx: link.tx_dropped,
            tx: link.rx_dropped,
        })
    }
}
