//! The library's face: start a network, attach ports, ask for its state.
//!
//! A [`Network`] is one or more worker threads with the data path, an event thread that takes what the worker
//! has to tell, and a control thread with a tokio runtime for DNS, the lease file and the helper's
//! notices. Ports and forwards are added and removed while it runs.

mod balance;
mod error;
mod forwards;
mod guests;
mod housekeeping;
mod policy;
mod ports;
mod start;
mod status;
mod vhost_user;
mod wires;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

pub use self::error::NetworkError;
use self::forwards::Forwards;
pub use self::forwards::{ForwardRefusal, ForwardStatus};
pub use self::guests::GuestStatus;
use self::ports::{Opened, PortGuest, Ports, Queue};
pub use self::start::open_files_wanted;
pub use self::status::{FlowStatus, Ipv6Status, LeaseStatus, MacStatus, PortStatus, Status};
pub use self::vhost_user::{VhostUserPort, VhostUserSocket};
use crate::config::{ConfigError, NetworkConfig};
use crate::control::resolver::ResolverHandle;
use crate::dhcp::lease::LeaseTable;
use crate::frame::{self, Mac, PortId};
use crate::gateway::LanConfig;
use crate::names::{GroupName, GuestName};
use crate::nat::common::Common;
use crate::nat::policy::Policy;
use crate::port::{self, DropSource};
use crate::switch::Switch;
use crate::sys::tun;
use crate::tap::{Helper, LinkDrops, QUEUES_MAX, TapError, WireOptions};
use crate::wire::ipv6::with_interface_id;
use crate::worker::{Command, Crew};

/// Pause between two looks at a draining network.
const DRAIN_STEP: Duration = Duration::from_millis(5);

/// A running network. Dropping it stops it.
pub struct Network {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// How a port is attached.
#[derive(Clone, Debug, Default)]
pub struct PortOptions {
    /// Name of the guest, which no other port has; `None`: made from the kind and the id.
    pub name: Option<GuestName>,
    /// Group of guests that the port's is of, as rules of the egress policy say it.
    pub group: Option<GroupName>,
    /// The guest's MAC where lanlet knows it (it made it up for `{mac}`).
    pub mac: Option<Mac>,
    /// Its MAC where none is said and no other port has it: a VM that starts again is the same guest.
    pub usual_mac: Option<Mac>,
    /// The guest's address, kept for it as long as the port lives; needs a MAC for a namespace guest.
    pub ip: Option<Ipv4Addr>,
    /// No virtio-net header and no offloads (a plain tap).
    pub no_offload: bool,
    /// Queues of the tap, 0 (which is 1) to [`QUEUES_MAX`]: as many workers as there are serve them.
    pub queues: u16,
    /// A VMM's port comes with a [`KeptWire`].
    pub keep: bool,
}

/// What it takes to attach a VMM's port again, to another network, when its own has ended: the VMM notices a
/// pause. It has the wire stand for as long as the VMM does; nobody else may read from it meanwhile.
#[derive(Debug)]
pub struct KeptWire {
    /// The switch's end, an fd for each queue.
    pub queues: Vec<OwnedFd>,
    /// A netlink socket of the taps' namespace.
    pub netlink: OwnedFd,
    /// Name of the VMM's tap there.
    pub vm_ifname: String,
    /// Name of the switch's tap there.
    pub sw_ifname: String,
}

/// A tap for a VMM.
#[derive(Debug)]
pub struct VmmPort {
    /// The port.
    pub id: PortId,
    /// The VMM's end: an IFF_TAP | IFF_NO_PI | IFF_VNET_HDR fd for each queue. The port is removed
    /// when the last copy of the last is closed.
    pub fds: Vec<OwnedFd>,
    /// Name of the tap inside lanlet's private namespace.
    pub ifname: String,
    /// A MAC for the guest, unique in this network.
    pub mac: Mac,
    /// Where it was asked for and the wire is one that can be kept (a pair of taps).
    pub kept: Option<KeptWire>,
}

/// A tap whose netdev side is a guest's.
#[derive(Debug)]
pub struct GuestTap {
    /// The tap: an fd for each queue.
    pub queues: Vec<OwnedFd>,
    /// A netlink socket of the guest's namespace, to read what the tap's own queue dropped; without
    /// it those drops stay unknown.
    pub netlink: Option<OwnedFd>,
    /// The process whose namespaces are the guest's, as a pidfd: others can be let in by it.
    pub process: Option<OwnedFd>,
}

/// A lease that lives as long as the port it was made for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestAddress {
    /// The guest's address.
    pub address: Ipv4Addr,
    /// Prefix length of the LAN.
    pub prefix: u8,
    /// The gateway, which is the DNS server too.
    pub gateway: Ipv4Addr,
    /// MTU of the LAN.
    pub mtu: u16,
    /// Search domain.
    pub domain: Option<String>,
    /// IPv6, where the LAN has it.
    #[serde(default)]
    pub v6: Option<GuestAddress6>,
}

/// A guest's IPv6: the address that it would make by SLAAC, for use at once.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestAddress6 {
    /// The guest's address.
    pub address: Ipv6Addr,
    /// Prefix length of the LAN.
    pub prefix: u8,
    /// The gateway's link-local address, where that is the way to the outside.
    pub gateway: Option<Ipv6Addr>,
    /// The gateway's link-local address.
    #[serde(default)]
    pub router: Option<Ipv6Addr>,
    /// Prefixes that it leads to where it is no way to the outside.
    #[serde(default)]
    pub routes: Vec<(Ipv6Addr, u8)>,
}

/// What the threads and the handle share.
struct Shared {
    config: NetworkConfig,
    lan: LanConfig,
    epoch: Instant,
    crew: Crew,
    switch: Arc<Switch>,
    leases: Arc<Mutex<LeaseTable>>,
    /// What the workers share, for where guests are.
    common: Common,
    resolver: ResolverHandle,
    ports: Mutex<Ports>,
    /// A port was removed.
    port_removed: Condvar,
    forwards: Mutex<Forwards>,
    helper: Mutex<Option<Arc<Helper>>>,
    /// The egress policy in force.
    policy: Mutex<Option<Arc<Policy>>>,
    /// Whether the host has a way to the IPv6 outside.
    host_ipv6: AtomicBool,
    /// Prefixes that guests are told of where it has none.
    host_prefixes6: Mutex<Arc<[(Ipv6Addr, u8)]>>,
    stop: Notify,
    end: Mutex<Option<End>>,
    ended: Condvar,
}

/// How the worker ended: the failure's text, if it was one.
type End = Option<String>;

impl Network {
    /// Makes a tap for a VMM.
    ///
    /// # Errors
    /// What is missing, with the remedy.
    pub fn attach_vmm(&self, options: PortOptions) -> Result<VmmPort, NetworkError> {
        let mac = self.mac_for(&options);
        check_queues(&options)?;
        let (opened, end) = self.shared.open_wire(WireOptions {
            plain: options.no_offload,
            queues: options.queues,
            netlink: options.keep,
            ..WireOptions::default()
        })?;
        let wire = opened.wire.clone();
        let guest = PortGuest {
            name: options.name,
            group: options.group,
            mac: Some(mac),
            ip: options.ip,
            leased: false,
        };
        let (id, _) = self.shared.add_port(opened, guest)?;
        if wire.is_some_and(|wire| wire.helper.is_ended()) {
            self.detach(id);
            let cause = "it ended meanwhile".to_owned();
            return Err(TapError::HelperGone { cause }.into());
        }
        Ok(VmmPort {
            id,
            fds: end.fds,
            ifname: end.ifname,
            mac,
            kept: end.kept,
        })
    }

    /// Attaches a VMM's port that was another network's. The port lives until it is detached: who kept the wire
    /// has to see the VMM's end.
    ///
    /// # Errors
    /// The fds are no taps of the right kind.
    pub fn attach_wire(
        &self,
        wire: KeptWire,
        options: PortOptions,
    ) -> Result<PortId, NetworkError> {
        let opened = wires::open_kept(wire)?;
        let guest = PortGuest {
            name: options.name,
            group: options.group,
            mac: options.mac,
            ip: options.ip,
            leased: false,
        };
        self.shared.add_port(opened, guest).map(|(id, _)| id)
    }

    /// Attaches a tap whose netdev side is a guest's (a namespace guest) and gives it a lease if the
    /// options name a MAC.
    ///
    /// # Errors
    /// The fd is no tap of the right kind, or no address is free.
    pub fn attach_tap(
        &self,
        tap: GuestTap,
        options: PortOptions,
    ) -> Result<(PortId, Option<GuestAddress>), NetworkError> {
        check_queues(&options)?;
        let open = |fd| -> Result<Queue, TapError> {
            Ok(if options.no_offload {
                let (rx, tx) = port::plain::open(fd)?;
                (Box::new(rx), Arc::new(tx))
            } else {
                let (rx, tx) = port::tap::open(fd)?;
                (Box::new(rx), Arc::new(tx))
            })
        };
        let mut drops: Vec<Arc<dyn DropSource>> = Vec::new();
        if let (Some(netlink), Some(queue)) = (tap.netlink, tap.queues.first()) {
            let failed = system("read the guest's counters");
            let link =
                tun::info(queue.as_fd()).and_then(|info| LinkDrops::new(netlink, &info.name));
            drops.push(Arc::new(link.map_err(failed)?));
        }
        let queues = tap.queues.into_iter().map(open).collect::<Result<_, _>>()?;
        let kind = if options.no_offload {
            "tap"
        } else {
            "namespace"
        };
        let opened = Opened {
            counters: Arc::default(),
            queues,
            drops,
            kind,
            wire: None,
            process: tap.process.map(Arc::new),
            attached: None,
        };
        let guest = PortGuest {
            name: options.name,
            group: options.group,
            mac: options.mac,
            ip: options.ip,
            leased: options.mac.is_some(),
        };
        let (id, address) = self.shared.add_port(opened, guest)?;
        let config = &self.shared.config;
        let lease = address.map(|address| GuestAddress {
            address,
            prefix: config.prefix,
            gateway: config.gateway,
            mtu: config.mtu,
            domain: config.domain.clone(),
            v6: options.mac.and_then(|mac| self.shared.guest6(mac)),
        });
        Ok((id, lease))
    }

    /// How many guests are attached: ports but the gateway's.
    pub fn guests(&self) -> usize {
        let ports = lock(&self.shared.ports);
        ports
            .by_id
            .keys()
            .filter(|&&id| id != PortId::GATEWAY)
            .count()
    }

    /// The process whose namespaces are those of the guest with this name or address, as a pidfd.
    ///
    /// # Errors
    /// There is no such guest, or it is none in namespaces.
    pub fn guest_process(&self, guest: &str) -> Result<OwnedFd, NetworkError> {
        let port = self.shared.port_of(guest);
        let port = port.ok_or_else(|| NetworkError::NoSuchGuest(guest.to_owned()))?;
        let ports = lock(&self.shared.ports);
        let process = ports.by_id.get(&port).and_then(|port| port.process.clone());
        let process = process.ok_or_else(|| NetworkError::NoNamespaces(guest.to_owned()))?;
        let copy = process.try_clone();
        copy.map_err(system("pass the guest's process on"))
    }

    /// Whether a port is there.
    pub fn has_port(&self, id: PortId) -> bool {
        lock(&self.shared.ports).by_id.contains_key(&id)
    }

    /// Removes a port. Unknown ids are ignored.
    pub fn detach(&self, id: PortId) {
        if id != PortId::GATEWAY {
            self.shared.detach(id);
        }
    }

    /// The MAC of a VMM's guest.
    fn mac_for(&self, options: &PortOptions) -> Mac {
        let usual = options
            .usual_mac
            .filter(|&mac| self.shared.wait_for_mac(mac));
        options.mac.or(usual).unwrap_or_else(|| self.make_mac())
    }

    /// A MAC for a guest, random and locally administered in QEMU's range 52:54:00.
    pub fn make_mac(&self) -> Mac {
        let ports = lock(&self.shared.ports);
        loop {
            let [a, b, c, ..] = RandomState::new().build_hasher().finish().to_be_bytes();
            let mac = Mac([0x52, 0x54, 0, a, b, c]);
            if ports.by_id.values().all(|port| port.mac != Some(mac)) {
                return mac;
            }
        }
    }

    /// The network's state.
    pub fn status(&self) -> Status {
        self.shared.status()
    }

    /// Waits until no TCP flow is left, `limit` at most: for guests that have ended, whose last bytes
    /// are still on their way outside.
    pub fn drain(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while self
            .shared
            .snapshot()
            .is_ok_and(|snapshot| snapshot.tcp != 0)
            && Instant::now() < deadline
        {
            std::thread::sleep(DRAIN_STEP);
        }
    }

    /// Ends the worker and whatever else runs for the network. Ports are gone, [`Network::failed`]
    /// returns. Twice is once.
    pub fn stop(&self) {
        self.shared.crew.tell_all(|_| Command::Stop);
        self.shared.stop.notify_one();
        for thread in lock(&self.threads).drain(..) {
            // A panic of the worker was reported by `run_worker`.
            let _ = thread.join();
        }
        lock(&self.shared.helper).take();
        // Dropped with no lock held: some wait for a thread of theirs.
        let ports = std::mem::take(&mut lock(&self.shared.ports).by_id);
        drop(ports);
        self.shared.drop_forward_files();
    }

    /// Blocks until the worker has ended: its reason where that was a failure, `None` after
    /// [`Network::stop`].
    pub fn failed(&self) -> Option<NetworkError> {
        let mut end = lock(&self.shared.end);
        loop {
            match &*end {
                Some(None) => return None,
                Some(cause) => return Some(NetworkError::Ended(cause.clone())),
                None => {
                    end = self
                        .shared
                        .ended
                        .wait(end)
                        .unwrap_or_else(PoisonError::into_inner)
                }
            }
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn now(&self) -> frame::Instant {
        frame::Instant::from_micros(self.epoch.elapsed().as_micros() as i64)
    }

    /// The port of the guest with this name or address.
    fn port_of(&self, guest: &str) -> Option<PortId> {
        match guest.parse::<IpAddr>() {
            // A guest may lease what it likes: only a port's own address says whose it is.
            Ok(IpAddr::V4(address)) => lock(&self.leases).attached_port(address),
            Ok(address) => {
                let has = |mac| self.guest6(mac).is_some_and(|v6| v6.address == address);
                let ports = lock(&self.ports);
                let mut ports = ports.by_id.iter();
                let found = ports.find(|(_, port)| port.mac.is_some_and(has));
                found.map(|(&id, _)| id)
            }
            Err(_) => lock(&self.ports).called(&guest.parse().ok()?),
        }
    }

    fn guest6(&self, mac: Mac) -> Option<GuestAddress6> {
        let lan = self.lan.v6?;
        let has_default = self.host_ipv6.load(Ordering::Relaxed);
        Some(GuestAddress6 {
            address: with_interface_id(lan.address, mac),
            prefix: lan.prefix,
            gateway: has_default.then_some(lan.link_local),
            router: Some(lan.link_local),
            routes: lock(&self.host_prefixes6).to_vec(),
        })
    }
}

/// Whether a port can have that many queues.
fn check_queues(options: &PortOptions) -> Result<(), ConfigError> {
    if options.queues > QUEUES_MAX {
        let reason = format!("{} are more than {QUEUES_MAX}", options.queues);
        return Err(ConfigError::new("queues", reason));
    }
    if options.no_offload && options.queues > 1 {
        let reason = "a tap without offloads has one queue: leave out one of queues and no-offload";
        return Err(ConfigError::new("queues", reason));
    }
    Ok(())
}

fn system(action: &'static str) -> impl Fn(std::io::Error) -> NetworkError {
    move |cause| NetworkError::System { action, cause }
}

/// Locks; a panic elsewhere leaves tables that are still consistent entry by entry.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
