//! A namespace guest: a process whose only link is an `eth0` on the switch (`lanlet exec`).
//!
//! The steps, in a process with one thread that will execute the guest's command:
//! 1. [`Guest::enter`] makes the namespaces and `eth0`;
//! 2. the fds of [`Guest::take_fds`] go to the network, which answers with a lease;
//! 3. [`Guest::configure`] and [`Guest::configure6`] set it, [`Guest::set_files`] the resolver;
//! 4. exec.
//!
//! An ordinary user gets a user namespace, and all capabilities in it: `ping`, `tcpdump` and `ip` work
//! inside, and nothing outside is gained. Who is who there is [`ids`]' matter. Root keeps its user
//! namespace, as its users are all there already.

mod files;
pub mod ids;

pub use files::GuestFiles;

use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::process::{getegid, geteuid};

use super::{QUEUES_MAX, TX_QUEUE_LEN, TapError};
use crate::frame::Mac;
use crate::sys::netlink::{NetlinkError, RouteSocket};
use crate::sys::rtnl::LinkChange;
use crate::sys::{namespace, tun};

/// Name of the guest's link.
pub const GUEST_IFNAME: &str = "eth0";
/// Who may open ping sockets: everybody. The upper end is all that fits; it must be an id that is there
/// in the user namespace, else it is the own group alone.
const PING_GROUPS: &str = "0 2147483647";
const PING_GROUP_RANGE: &str = "/proc/sys/net/ipv4/ping_group_range";
/// How the kernel makes IPv6 work on the guest's link, as written to [`IPV6_CONF`]: no wait for
/// duplicates of an address that is made from a MAC of the network's own; the router is asked for
/// its advertisement at once, and believed also by a guest that routes for containers of its own.
const IPV6_SETTINGS: [(&str, &str); 4] = [
    ("accept_dad", "0"),
    ("router_solicitation_delay", "0"),
    ("accept_ra", "2"),
    // Prefixes of any length (RFC 4191): by default the kernel takes none.
    ("accept_ra_rt_info_max_plen", "128"),
];
const IPV6_CONF: &str = "/proc/sys/net/ipv6/conf";
/// The default route is there for use at once, and yields to that of the first router advertisement,
/// which then follows the host's. The kernel asks for one when the link comes up and every 4 s
/// (RTR_SOLICITATION_INTERVAL, RFC 4861 10).
const ROUTE6_SECS: u32 = 30;
/// Beside the 1,024 of routes from router advertisements (IP6_RT_PRIO_USER).
const ROUTE6_METRIC: u32 = 2048;

/// What [`Guest::configure`] sets.
#[derive(Clone, Copy, Debug)]
pub struct GuestConfig {
    /// MAC address of `eth0`.
    pub mac: Mac,
    /// Its address.
    pub address: Ipv4Addr,
    /// Prefix length of the LAN.
    pub prefix: u8,
    /// The default route's gateway; on the LAN.
    pub gateway: Ipv4Addr,
    /// MTU.
    pub mtu: u16,
}

/// A guest's IPv6.
#[derive(Clone, Debug)]
pub struct GuestConfig6 {
    /// Its address: the one that the kernel makes too, when it hears a router advertisement.
    pub address: Ipv6Addr,
    /// Prefix length of the LAN.
    pub prefix: u8,
    /// The gateway's link-local address, if that is the way to the outside.
    pub gateway: Option<Ipv6Addr>,
    /// The same, for what follows.
    pub router: Option<Ipv6Addr>,
    /// Prefixes that the gateway leads to besides.
    pub routes: Vec<(Ipv6Addr, u8)>,
}

/// What the network needs of a guest.
#[derive(Debug)]
pub struct GuestFds {
    /// The tap, an fd for each queue: for [`crate::port::tap::open`], or [`crate::port::plain::open`].
    pub queues: Vec<OwnedFd>,
    /// A netlink socket of the guest's namespace: for [`super::LinkDrops`] with [`GUEST_IFNAME`].
    ///
    /// Each fd keeps the namespace alive. The network must close all when the guest's command has
    /// ended.
    pub netlink: OwnedFd,
}

/// The calling process as a guest.
#[derive(Debug)]
pub struct Guest {
    route: RouteSocket,
    fds: Option<GuestFds>,
    ifname: String,
    /// The namespace is the guest's alone.
    whole: bool,
}

impl Guest {
    /// Moves the calling process, which must have one thread, into fresh network, mount and (as an
    /// ordinary user) user namespaces, and makes `eth0` there with that many queues. `offload`: with
    /// virtio-net header; without, it has one queue. `map` is called in a fresh user namespace and has
    /// to make its maps of ids.
    ///
    /// # Errors
    /// The host forbids namespaces or taps: the error says what to do.
    pub fn enter(
        offload: bool,
        queues: u16,
        map: impl FnOnce() -> io::Result<()>,
    ) -> Result<Self, TapError> {
        enter_namespaces(map).map_err(|error| TapError::namespace(&error))?;
        let guest = Self::with_link(GUEST_IFNAME, offload, queues, true)?;
        // Not vital: root has CAP_NET_RAW; it matters to a command that gives root up.
        let own = getegid();
        let _ = [PING_GROUPS.to_owned(), format!("{own} {own}")]
            .iter()
            .any(|range| fs::write(PING_GROUP_RANGE, range).is_ok());
        Ok(guest)
    }

    /// Moves the calling process, which must have one thread, into a network namespace that is there
    /// already, and makes a link there as [`Guest::enter`] does. The link goes when the network has
    /// closed the fds.
    ///
    /// # Errors
    /// The caller has no right over that namespace, or it has a link of that name.
    pub fn join(
        namespace: BorrowedFd<'_>,
        ifname: &str,
        offload: bool,
        queues: u16,
    ) -> Result<Self, TapError> {
        namespace::enter_network(namespace).map_err(|error| TapError::Join {
            cause: error.to_string(),
        })?;
        let mut route = RouteSocket::open(0).map_err(|error| TapError::tap("netlink", &error))?;
        if route.link(ifname).is_ok() {
            return Err(TapError::LinkExists {
                ifname: ifname.to_owned(),
            });
        }
        Self::with_link(ifname, offload, queues, false)
    }

    fn with_link(ifname: &str, offload: bool, queues: u16, whole: bool) -> Result<Self, TapError> {
        let queues = if offload {
            tun::open_queues(ifname, queues.min(QUEUES_MAX))
        } else {
            tun::open_plain(ifname).map(|(fd, _)| vec![fd])
        }
        .map_err(|error| TapError::tap_open(ifname, &error))?;
        let open = || RouteSocket::open(0).map_err(|error| TapError::tap("netlink", &error));
        let fds = Some(GuestFds {
            queues,
            netlink: open()?.into_fd(),
        });
        let mut guest = Self {
            route: open()?,
            fds,
            ifname: ifname.to_owned(),
            whole,
        };
        let change = LinkChange {
            tx_queue_len: Some(TX_QUEUE_LEN),
            ..LinkChange::default()
        };
        guest.set_link(ifname, change)?;
        // Not vital: IPv6 is then a second or two later.
        for (setting, value) in IPV6_SETTINGS {
            let _ = fs::write(Path::new(IPV6_CONF).join(ifname).join(setting), value);
        }
        Ok(guest)
    }

    /// The fds for the network; once.
    pub fn take_fds(&mut self) -> Option<GuestFds> {
        self.fds.take()
    }

    /// Brings the loopback and `eth0` up with address and default route.
    ///
    /// # Errors
    /// The kernel's refusal, with the step.
    pub fn configure(&mut self, config: &GuestConfig) -> Result<(), TapError> {
        let ifname = self.ifname.clone();
        let up = LinkChange {
            up: Some(true),
            ..LinkChange::default()
        };
        if self.whole {
            self.set_link("lo", up)?;
        }
        let change = LinkChange {
            mtu: Some(config.mtu.into()),
            mac: Some(config.mac),
            ..LinkChange::default()
        };
        self.set_link(&ifname, change)?;
        self.set_link(&ifname, up)?;
        let index = self.index(&ifname)?;
        self.route
            .address_add(index, config.address, config.prefix)
            .map_err(step(format!(
                "address {}/{}",
                config.address, config.prefix
            )))?;
        match self.route.default_route_add(index, config.gateway) {
            Err(error) if error.errno == Errno::EXIST && !self.whole => {
                log::warn!(
                    "the namespace has a default route already: the way to the outside stays as it is"
                );
                Ok(())
            }
            added => added.map_err(step(format!("default route by {}", config.gateway))),
        }
    }

    /// Sets IPv6 beside what [`Guest::configure`] has set.
    ///
    /// # Errors
    /// The kernel's refusal, with the step: most likely it was told to be without IPv6.
    pub fn configure6(&mut self, config: &GuestConfig6) -> Result<(), TapError> {
        let ifname = self.ifname.clone();
        let index = self.index(&ifname)?;
        let GuestConfig6 {
            address, prefix, ..
        } = *config;
        // A router advertisement may have been first: then the kernel has set the same.
        let set = |result: Result<(), NetlinkError>| match result {
            Err(error) if error.errno == Errno::EXIST => Ok(()),
            result => result,
        };
        set(self.route.address_add6(index, address, prefix))
            .map_err(step(format!("address {address}/{prefix}")))?;
        let default = config
            .gateway
            .map(|gateway| (gateway, Ipv6Addr::UNSPECIFIED, 0));
        let routes = config
            .routes
            .iter()
            .filter_map(|&(network, prefix)| Some((config.router?, network, prefix)));
        for (gateway, network, prefix) in default.into_iter().chain(routes) {
            let to = (network, prefix);
            let route = self
                .route
                .route_add6((index, gateway), to, ROUTE6_METRIC, ROUTE6_SECS);
            set(route).map_err(step(format!("route to {network}/{prefix} by {gateway}")))?;
        }
        Ok(())
    }

    /// Gives this process and its children an /etc in which these files are as they should be, by
    /// mounts that nobody else sees.
    ///
    /// # Errors
    /// What could not be done and what follows from it: worth a warning.
    pub fn set_files(&self, files: &GuestFiles) -> Result<(), TapError> {
        files.set()
    }

    fn set_link(&mut self, name: &str, change: LinkChange) -> Result<(), TapError> {
        let index = self.index(name)?;
        self.route
            .link_set(index, change)
            .map_err(step(format!("setting up {name}")))
    }

    fn index(&mut self, name: &str) -> Result<u32, TapError> {
        Ok(self
            .route
            .link(name)
            .map_err(step(format!("looking {name} up")))?
            .index)
    }
}

fn step(action: String) -> impl FnOnce(NetlinkError) -> TapError {
    move |error| TapError::netlink(action, &error)
}

fn enter_namespaces(map: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    // Root in a container may lack CAP_SYS_ADMIN and goes the ordinary user's way then.
    if !geteuid().is_root() || namespace::unshare(false, true).is_err() {
        namespace::unshare(true, true)?;
        map()?;
    }
    // Mounts made from here on stay here.
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )?;
    // Of sysfs, /sys/class/net shows the network namespace that it was mounted in. The kernel refuses a
    // fresh one where parts of the old are covered (a container): then programs see the host's links there.
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    if let Err(error) = mount("sysfs", "/sys", "sysfs", flags, None) {
        log::debug!("/sys stays the host's: {error}");
    }
    Ok(())
}
