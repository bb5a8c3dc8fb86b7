//! The library's face: start a network, attach ports, ask for its state.
//!
//! A [`Network`] is a worker thread with the data path, an event thread that takes what the worker
//! has to tell, and a control thread with a tokio runtime for DNS, the lease file and the helper's
//! notices. Ports are added and removed while it runs.

mod status;

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{PollFd, PollFlags};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

pub use self::status::{FlowStatus, LeaseStatus, MacStatus, PortStatus, Status};

use crate::config::{ConfigError, NetworkConfig};
use crate::control::lease_file::LeaseFile;
use crate::control::resolver::{AnswerSink, Resolver, ResolverConfig, ResolverHandle};
use crate::dhcp::DhcpConfig;
use crate::dhcp::lease::{LeaseKind, LeaseTable, PoolError, Refusal};
use crate::frame::{self, Mac, PortId};
use crate::gateway::LanConfig;
use crate::nat::NatConfig;
use crate::port::{self, DropSource, KernelDrops, PortRx, PortTx};
use crate::stats::PortCounters;
use crate::switch::{PORTS_MAX, Switch, SwitchConfig};
use crate::tap::guest::GUEST_IFNAME;
use crate::tap::{
    Event as HelperEvent, Helper, HelperEvents, LinkDrops, TapError, WireDrops, WireKind,
    WireOptions,
};
use crate::worker::{Command, Event, Worker, WorkerConfig, WorkerHandle};

/// Events that wait for the event thread at most: a burst of DNS queries of all guests.
const EVENTS_MAX: usize = 1024;
/// How often the lease file and the DNS upstream are looked after.
const HOUSEKEEPING: Duration = Duration::from_secs(1);
/// How long `status` waits for the worker, which answers between two batches.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(2);

/// A running network. Dropping it stops it.
pub struct Network {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// How a port is attached.
#[derive(Clone, Debug, Default)]
pub struct PortOptions {
    /// Name shown by `status`; empty: made from the kind and the id.
    pub name: String,
    /// The guest's MAC where lanlet knows it (it made it up for `{mac}`).
    pub mac: Option<Mac>,
    /// No virtio-net header and no offloads (a plain tap).
    pub no_offload: bool,
}

/// A tap for a VMM.
#[derive(Debug)]
pub struct VmmPort {
    /// The port.
    pub id: PortId,
    /// The VMM's end: an IFF_TAP | IFF_NO_PI | IFF_VNET_HDR fd. The port is removed when the last
    /// copy of it is closed.
    pub fd: OwnedFd,
    /// Name of the tap inside lanlet's private namespace.
    pub ifname: String,
    /// A MAC for the guest, unique in this network.
    pub mac: Mac,
}

/// A tap whose netdev side is a guest's.
#[derive(Debug)]
pub struct GuestTap {
    /// The tap.
    pub tap: OwnedFd,
    /// A netlink socket of the guest's namespace, to read what the tap's own queue dropped; without
    /// it those drops stay unknown.
    pub netlink: Option<OwnedFd>,
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
}

/// Why a network or port could not be set up. Names the remedy where there is one.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A key of the configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The DHCP range is unusable.
    #[error("dhcp-range: {0}")]
    Pool(#[from] PoolError),
    /// A tap or the helper failed.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The system refused a thread, an epoll or the like.
    #[error("cannot {action}: {cause}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        cause: std::io::Error,
    },
    /// No address for a guest.
    #[error("no address for {mac}: {cause} (--dhcp-range, --subnet, --lease-time)")]
    NoAddress {
        /// The guest.
        mac: Mac,
        /// Why.
        cause: Refusal,
    },
    /// Two guests with one MAC address would take each other's frames.
    #[error("a guest with the MAC address {mac} is attached already: choose another --mac")]
    MacInUse {
        /// The address.
        mac: Mac,
    },
    /// All port numbers are in use.
    #[error("the switch has {PORTS_MAX} ports already: detach some or start a second network")]
    PortsFull,
    /// The data path has ended.
    #[error("the network's worker has ended{}", .0.as_ref().map(|cause| format!(": {cause}")).unwrap_or_default())]
    Ended(Option<String>),
}

/// What the threads and the handle share.
struct Shared {
    config: NetworkConfig,
    lan: LanConfig,
    epoch: Instant,
    worker: WorkerHandle,
    switch: Arc<Switch>,
    leases: Arc<Mutex<LeaseTable>>,
    ports: Mutex<Ports>,
    helper: Mutex<Option<Arc<Helper>>>,
    stop: Notify,
    end: Mutex<Option<End>>,
    ended: Condvar,
}

/// How the worker ended: the failure's text, if it was one.
type End = Option<String>;

#[derive(Default)]
struct Ports {
    last: u16,
    by_id: BTreeMap<PortId, Port>,
}

struct Port {
    name: String,
    kind: &'static str,
    mac: Option<Mac>,
    /// The lease of `mac` ends with the port.
    leased: bool,
    counters: Arc<PortCounters>,
    drops: Vec<Box<dyn DropSource>>,
    wire: Option<u64>,
}

/// A port's halves and what belongs to them, before it has a number.
struct Opened {
    rx: Box<dyn PortRx>,
    tx: Arc<dyn PortTx>,
    drops: Vec<Box<dyn DropSource>>,
    kind: &'static str,
    wire: Option<u64>,
}

impl Network {
    /// Starts a network: its worker and its control thread.
    ///
    /// # Errors
    /// What is wrong or missing, with the remedy. Nothing is left behind.
    pub fn start(config: NetworkConfig) -> Result<Self, NetworkError> {
        config.validate()?;
        let lan = LanConfig {
            mac: gateway_mac(&config),
            address: config.gateway,
            prefix: config.prefix,
            mtu: config.mtu,
        };
        let dhcp = dhcp_config(&config, &lan);
        let epoch = Instant::now();
        let mut leases = LeaseTable::new(dhcp.range(), &lan)?;
        let lease_file = config.lease_file.clone().map(LeaseFile::new);
        if let Some(file) = &lease_file {
            restore(file, &mut leases);
        }
        let leases = Arc::new(Mutex::new(leases));
        let mut switch = SwitchConfig::new(lan.mac, RandomState::new().hash_one(epoch));
        switch.ageing = frame::Duration::from_secs(config.ageing.as_secs());
        let switch = Arc::new(Switch::new(switch));
        let gateway_counters = Arc::new(PortCounters::default());
        let (events, event_queue) = crossbeam_channel::bounded(EVENTS_MAX);
        let (worker, handle) = Worker::new(WorkerConfig {
            switch: Arc::clone(&switch),
            dhcp,
            leases: Arc::clone(&leases),
            nat: NatConfig {
                lan: lan.clone(),
                flows_max: config.flows_max,
                host_access: config.host_access,
            },
            gateway_counters: Arc::clone(&gateway_counters),
            events,
            epoch,
        })
        .map_err(system("set up the worker"))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(system("set up the control thread"))?;
        let (resolver, resolver_handle) = Resolver::new(ResolverConfig {
            servers: config.dns.clone(),
            ..ResolverConfig::default()
        });
        let gateway = Port {
            name: "gateway".to_owned(),
            kind: "gateway",
            mac: Some(lan.mac),
            leased: false,
            counters: gateway_counters,
            drops: Vec::new(),
            wire: None,
        };
        let shared = Arc::new(Shared {
            config,
            lan,
            epoch,
            worker: handle,
            switch,
            leases,
            ports: Mutex::new(Ports {
                last: 0,
                by_id: BTreeMap::from([(PortId::GATEWAY, gateway)]),
            }),
            helper: Mutex::new(None),
            stop: Notify::new(),
            end: Mutex::new(None),
            ended: Condvar::new(),
        });
        let network = Self {
            shared: Arc::clone(&shared),
            threads: Mutex::new(Vec::new()),
        };
        network.thread("lanlet-worker", {
            let shared = Arc::clone(&shared);
            move || run_worker(worker, &shared)
        })?;
        network.thread("lanlet-control", {
            let shared = Arc::clone(&shared);
            let handle = resolver_handle.clone();
            move || {
                runtime.block_on(async {
                    tokio::select! {
                        () = resolver.run() => {}
                        () = housekeep(&shared, &handle, lease_file.as_ref()) => {}
                        () = shared.stop.notified() => {}
                    }
                });
                if let Some(file) = &lease_file {
                    save(file, &shared);
                }
            }
        })?;
        network.thread("lanlet-events", move || {
            take_events(&event_queue, &shared, &resolver_handle)
        })?;
        Ok(network)
    }

    fn thread(&self, name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), NetworkError> {
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(body);
        lock(&self.threads).push(thread.map_err(system("start a thread"))?);
        Ok(())
    }

    /// Makes a tap for a VMM.
    ///
    /// # Errors
    /// What is missing, with the remedy.
    pub fn attach_vmm(&self, options: PortOptions) -> Result<VmmPort, NetworkError> {
        let mac = options.mac.unwrap_or_else(|| self.make_mac());
        let helper = self.shared.helper()?;
        let wire = helper.create_wire(WireOptions {
            plain: options.no_offload,
            ..WireOptions::default()
        })?;
        let mut drops: Vec<Box<dyn DropSource>> =
            vec![Box::new(WireDrops::new(Arc::clone(&helper), wire.id))];
        let (rx, tx): (Box<dyn PortRx>, Arc<dyn PortTx>) = match wire.kind {
            WireKind::Mirred => {
                let (rx, tx) = port::tap::open(wire.sw)?;
                (Box::new(rx), Arc::new(tx))
            }
            WireKind::Packet => {
                let (rx, tx, ring) = port::packet::open(wire.sw, wire.uso)?;
                drops.push(Box::new(ring));
                (Box::new(rx), Arc::new(tx))
            }
        };
        let fd = wire
            .vm
            .into_iter()
            .next()
            .ok_or_else(|| TapError::not_a_tap("no fd came with the wire"))?;
        let opened = Opened {
            rx,
            tx,
            drops,
            kind: "vmm",
            wire: Some(wire.id),
        };
        let id = self.shared.add_port(opened, options.name, Some(mac))?;
        Ok(VmmPort {
            id,
            fd,
            ifname: wire.vm_ifname,
            mac,
        })
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
        let (rx, tx): (Box<dyn PortRx>, Arc<dyn PortTx>) = if options.no_offload {
            let (rx, tx) = port::plain::open(tap.tap)?;
            (Box::new(rx), Arc::new(tx))
        } else {
            let (rx, tx) = port::tap::open(tap.tap)?;
            (Box::new(rx), Arc::new(tx))
        };
        let mut drops: Vec<Box<dyn DropSource>> = Vec::new();
        if let Some(netlink) = tap.netlink {
            let link = LinkDrops::new(netlink, GUEST_IFNAME)
                .map_err(system("read the guest's counters"))?;
            drops.push(Box::new(link));
        }
        let kind = if options.no_offload {
            "tap"
        } else {
            "namespace"
        };
        let opened = Opened {
            rx,
            tx,
            drops,
            kind,
            wire: None,
        };
        let id = self.shared.add_port(opened, options.name, options.mac)?;
        let Some(mac) = options.mac else {
            return Ok((id, None));
        };
        let address = self
            .shared
            .lease(mac, id)
            .inspect_err(|_| self.detach(id))?;
        let config = &self.shared.config;
        let lease = GuestAddress {
            address,
            prefix: config.prefix,
            gateway: config.gateway,
            mtu: config.mtu,
            domain: config.domain.clone(),
        };
        Ok((id, Some(lease)))
    }

    /// Removes a port. Unknown ids are ignored.
    pub fn detach(&self, id: PortId) {
        if id != PortId::GATEWAY {
            self.shared.detach(id);
        }
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

    /// Ends the worker and whatever else runs for the network. Ports are gone, [`Network::failed`]
    /// returns. Twice is once.
    pub fn stop(&self) {
        self.shared.worker.send(Command::Stop);
        self.shared.stop.notify_one();
        for thread in lock(&self.threads).drain(..) {
            // A panic of the worker was reported by `run_worker`.
            let _ = thread.join();
        }
        lock(&self.shared.helper).take();
        lock(&self.shared.ports).by_id.clear();
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

    /// The helper process, started when the first VMM comes.
    fn helper(self: &Arc<Self>) -> Result<Arc<Helper>, NetworkError> {
        let mut slot = lock(&self.helper);
        if let Some(helper) = &*slot {
            return Ok(Arc::clone(helper));
        }
        let (helper, events) = Helper::spawn(self.config.helper.as_deref())?;
        let helper = Arc::new(helper);
        let watched = Arc::downgrade(self);
        std::thread::Builder::new()
            .name("lanlet-helper".to_owned())
            .spawn(move || watch_helper(&events, &watched))
            .map_err(system("start a thread"))?;
        *slot = Some(Arc::clone(&helper));
        Ok(helper)
    }

    fn add_port(
        &self,
        opened: Opened,
        name: String,
        mac: Option<Mac>,
    ) -> Result<PortId, NetworkError> {
        let Opened {
            rx,
            tx,
            drops,
            kind,
            wire,
        } = opened;
        let counters = Arc::new(PortCounters::default());
        let mut ports = lock(&self.ports);
        let id = ports.free_id().ok_or(NetworkError::PortsFull)?;
        let name = if name.is_empty() {
            format!("{kind}{id}")
        } else {
            name
        };
        log::debug!("port {id} ({name}) attached");
        let port = Port {
            name,
            kind,
            mac,
            leased: false,
            counters: Arc::clone(&counters),
            drops,
            wire,
        };
        ports.by_id.insert(id, port);
        drop(ports);
        if self.worker.send(Command::AddPort {
            id,
            rx,
            tx,
            counters,
        }) {
            return Ok(id);
        }
        lock(&self.ports).by_id.remove(&id);
        Err(NetworkError::Ended(lock(&self.end).clone().flatten()))
    }

    /// A lease of `mac` that ends with the port. Nothing changes on failure: the MAC's lease, if it has
    /// one, is another port's.
    fn lease(&self, mac: Mac, id: PortId) -> Result<Ipv4Addr, NetworkError> {
        let leased = lock(&self.leases).attach(mac, id, self.now());
        let address = leased.map_err(|cause| match cause {
            Refusal::Taken => NetworkError::MacInUse { mac },
            cause => NetworkError::NoAddress { mac, cause },
        })?;
        match lock(&self.ports).by_id.get_mut(&id) {
            Some(port) => port.leased = true,
            // The guest is gone again.
            None => lock(&self.leases).detach(mac, self.now()),
        }
        Ok(address)
    }

    fn detach(&self, id: PortId) {
        let Some(port) = lock(&self.ports).by_id.remove(&id) else {
            return;
        };
        log::debug!("port {id} ({}) detached", port.name);
        self.worker.send(Command::RemovePort(id));
        if let (true, Some(mac)) = (port.leased, port.mac) {
            lock(&self.leases).detach(mac, self.now());
        }
        if let (Some(wire), Some(helper)) = (port.wire, lock(&self.helper).clone()) {
            // The helper may be gone with its wires already.
            let _ = helper.destroy_wire(wire);
        }
    }

    /// For a helper that has ended: nobody would tell any more when one of its VMMs goes.
    fn detach_all_wires(&self) {
        let mut ports = lock(&self.ports);
        let wired = ports.by_id.iter_mut();
        let ids: Vec<PortId> = wired
            // The next helper counts its wires from the start again.
            .filter_map(|(&id, port)| port.wire.take().map(|_| id))
            .collect();
        drop(ports);
        for id in ids {
            self.detach(id);
        }
    }

    fn detach_wire(&self, wire: u64) {
        let found = lock(&self.ports)
            .by_id
            .iter()
            .find(|(_, port)| port.wire == Some(wire))
            .map(|(&id, _)| id);
        if let Some(id) = found {
            self.detach(id);
        }
    }

    fn status(&self) -> Status {
        let (reply, snapshot) = crossbeam_channel::bounded(1);
        self.worker.send(Command::Snapshot(reply));
        let snapshot = snapshot.recv_timeout(SNAPSHOT_TIMEOUT).unwrap_or_default();
        let mut totals: BTreeMap<String, u64> = snapshot.counters.into_iter().collect();
        totals.insert("host_sockets".to_owned(), snapshot.host_sockets as u64);
        let table = self.switch.counters();
        totals.extend(table.iter().map(|(name, count)| (name.to_owned(), count)));
        let ports = lock(&self.ports)
            .by_id
            .iter()
            .map(|(&id, port)| port.status(id))
            .collect();
        let station = |station: crate::switch::Station| MacStatus {
            mac: station.mac.to_string(),
            port: station.port.0,
        };
        Status {
            name: self.config.name.clone(),
            pid: std::process::id(),
            uptime_secs: self.epoch.elapsed().as_secs(),
            subnet: format!("{}/{}", self.lan.address, self.lan.prefix),
            mtu: self.lan.mtu,
            ports,
            macs: self.switch.snapshot().into_iter().map(station).collect(),
            leases: self.lease_status(),
            flows: FlowStatus {
                tcp: snapshot.tcp,
                udp: snapshot.udp,
                icmp: snapshot.icmp,
            },
            totals,
        }
    }

    fn lease_status(&self) -> Vec<LeaseStatus> {
        lock(&self.leases)
            .snapshot(self.now())
            .into_iter()
            .filter(|lease| matches!(lease.kind, LeaseKind::Bound | LeaseKind::Attached))
            .map(|lease| LeaseStatus {
                address: lease.address,
                mac: lease.mac.to_string(),
                hostname: lease.hostname,
                expires_secs: lease.remaining.map(|left| left.secs()),
            })
            .collect()
    }
}

impl Ports {
    /// The next number after the last one given: a number is not taken up again at once, so that a
    /// late event of an old port does not hit a fresh one.
    fn free_id(&mut self) -> Option<PortId> {
        let count = PORTS_MAX as u16;
        let id = (1..count)
            .map(|step| PortId(1 + (self.last + step - 1) % (count - 1)))
            .find(|id| !self.by_id.contains_key(id))?;
        self.last = id.0;
        Some(id)
    }
}

impl Port {
    fn status(&self, id: PortId) -> PortStatus {
        use std::sync::atomic::Ordering::Relaxed;
        let mut drops: BTreeMap<String, u64> = self
            .counters
            .dropped()
            .map(|(reason, count)| (reason.name().to_owned(), count))
            .collect();
        let kernel = self
            .drops
            .iter()
            .filter_map(|source| source.kernel_drops().ok());
        let kernel = kernel.fold(KernelDrops::default(), |sum, drops| KernelDrops {
            rx: sum.rx + drops.rx,
            tx: sum.tx + drops.tx,
        });
        for (name, count) in [
            ("kernel_rx_dropped", kernel.rx),
            ("kernel_tx_dropped", kernel.tx),
        ] {
            if count != 0 {
                drops.insert(name.to_owned(), count);
            }
        }
        PortStatus {
            id: id.0,
            name: self.name.clone(),
            kind: self.kind.to_owned(),
            rx_frames: self.counters.rx_frames.load(Relaxed),
            rx_bytes: self.counters.rx_bytes.load(Relaxed),
            tx_frames: self.counters.tx_frames.load(Relaxed),
            tx_bytes: self.counters.tx_bytes.load(Relaxed),
            drops,
        }
    }
}

/// The worker thread's body: a failure or panic is kept for [`Network::failed`].
fn run_worker(worker: Worker, shared: &Shared) {
    let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| worker.run()));
    let end = match ran {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(_) => Some("it panicked; the message is above".to_owned()),
    };
    *lock(&shared.end) = Some(end);
    shared.ended.notify_all();
}

/// The event thread's body; ends with the worker, which holds the other end.
fn take_events(
    events: &crossbeam_channel::Receiver<Event>,
    shared: &Arc<Shared>,
    resolver: &ResolverHandle,
) {
    let worker = shared.worker.clone();
    let sink: AnswerSink = Arc::new(move |answer| {
        worker.send(Command::DnsAnswer(answer));
    });
    for event in events {
        match event {
            Event::Dns(query) => {
                if let Err(query) = resolver.ask(query, &sink) {
                    shared.worker.send(Command::DnsAbandoned(query.id));
                }
            }
            Event::PortGone(id) => shared.detach(id),
        }
    }
}

/// Removes the ports of VMMs that are gone; ends with the helper.
fn watch_helper(events: &HelperEvents, shared: &std::sync::Weak<Shared>) {
    loop {
        let mut fds = [PollFd::from_borrowed_fd(events.as_fd(), PollFlags::IN)];
        // An error other than EINTR shows in the receive that follows.
        let _ = rustix::event::poll(&mut fds, None);
        let event = events.next_event();
        let Some(shared) = shared.upgrade() else {
            return;
        };
        match event {
            Ok(Some(HelperEvent::Gone(wire))) => shared.detach_wire(wire),
            Ok(None) => {}
            Err(error) => {
                // Before the helper can be replaced: a wire's number is its helper's.
                shared.detach_all_wires();
                // Taken already if the network is stopping.
                if lock(&shared.helper).take().is_some() {
                    log::warn!(
                        "{error}; VMMs can attach again, those attached have lost their link"
                    );
                }
                return;
            }
        }
    }
}

/// Keeps the lease file and the upstream of DNS over TCP current.
async fn housekeep(shared: &Shared, resolver: &ResolverHandle, file: Option<&LeaseFile>) {
    let mut upstream = None;
    let mut saved = lock(&shared.leases).generation();
    let mut tick = tokio::time::interval(HOUSEKEEPING);
    loop {
        tick.tick().await;
        let current = resolver.upstream().and_then(|server| match server {
            SocketAddr::V4(server) => Some(server),
            SocketAddr::V6(_) => None,
        });
        if upstream != current {
            upstream = current;
            shared.worker.send(Command::DnsUpstream(current));
        }
        let generation = lock(&shared.leases).generation();
        if let (Some(file), true) = (file, generation != saved) {
            saved = generation;
            save(file, shared);
        }
    }
}

fn restore(file: &LeaseFile, leases: &mut LeaseTable) {
    match file.load() {
        Ok(records) => {
            let count = leases.restore(&records, frame::Instant::ZERO, unix_now());
            log::debug!("{count} leases restored from {}", file.path().display());
        }
        Err(error) => log::warn!(
            "leases of the last run are lost: {}: {error}",
            file.path().display()
        ),
    }
}

fn save(file: &LeaseFile, shared: &Shared) {
    let records = lock(&shared.leases).records(shared.now(), unix_now());
    if let Err(error) = file.save(records) {
        log::warn!("leases are not kept: {}: {error}", file.path().display());
    }
}

fn unix_now() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |time| time.as_secs())
}

fn dhcp_config(config: &NetworkConfig, lan: &LanConfig) -> DhcpConfig {
    let mut dhcp = DhcpConfig::new(lan.clone());
    (dhcp.first, dhcp.last) = config.dhcp_range;
    dhcp.lease_secs = u32::try_from(config.lease_time.as_secs()).unwrap_or(u32::MAX);
    dhcp.domain = config.domain.clone();
    dhcp
}

/// The gateway's MAC: the same at each start of a network, so that running guests' ARP caches stay
/// right, and in QEMU's range 52:54:00. FNV-1a, because std's hashers may change between releases.
fn gateway_mac(config: &NetworkConfig) -> Mac {
    let text = format!("{}/{}", config.name, config.gateway);
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let [a, b, c, ..] = hash.to_be_bytes();
    Mac([0x52, 0x54, 0, a, b, c])
}

fn system(action: &'static str) -> impl Fn(std::io::Error) -> NetworkError {
    move |cause| NetworkError::System { action, cause }
}

/// Locks; a panic elsewhere leaves tables that are still consistent entry by entry.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
