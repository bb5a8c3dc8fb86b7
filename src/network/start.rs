//! Setting a network up: its tables, its worker and its threads.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use rustix::process::{Resource, getrlimit};
use tokio::sync::Notify;

use super::housekeeping::{HostIpv6, LeaseKeeper, housekeep};
use super::policy::AskWorker;
use super::ports::{Port, Ports};
use super::{Network, NetworkError, Shared, lock, system};
use crate::config::{ConfigError, NetworkConfig, PREFIX6_LEN, PortKind, PortSpec, Subnet6};
use crate::control::lease_file::LeaseFile;
use crate::control::resolver::{AnswerSink, Resolver, ResolverConfig};
use crate::dhcp::DhcpConfig;
use crate::dhcp::lease::{LeaseTable, Reservation};
use crate::frame::{self, Mac, PortId, WorkerId};
use crate::gateway::{Lan6, LanConfig};
use crate::names::GuestName;
use crate::nat::common::Common;
use crate::nat::{NatConfig, Service};
use crate::port::vhost_user;
use crate::stats::PortCounters;
use crate::switch::{Switch, SwitchConfig};
use crate::uplink::{ServiceStream, overlap};
use crate::wire::ipv6;
use crate::worker::{Command, Crew, Event, Seat, Worker, WorkerConfig, WorkerHandle};

/// Events that wait for the event thread at most: a burst of DNS queries of all guests.
const EVENTS_MAX: usize = 1024;

/// Open files of a network besides those of its flows and of the ports it starts with: of each tap one per
/// queue, of a wire's three with the VMM's while it is handed over, control connections, DNS queries and
/// connections under way.
const FILES_RESERVED: usize = 1536;

/// Open files that a network of these ports needs whose NAT is full of TCP flows. UDP and ping mappings are
/// not counted: they expire within minutes, and out of files the oldest gives way.
pub fn open_files_wanted(flows_max: usize, ports: &[PortSpec]) -> usize {
    let of_port = |port: &PortSpec| match port.kind {
        PortKind::VhostUser(_) => vhost_user::FILES_MAX,
    };
    flows_max + FILES_RESERVED + ports.iter().map(of_port).sum::<usize>()
}

/// Warns where the NAT would run out of sockets before it runs out of flows.
fn check_open_files(flows_max: usize, ports: &[PortSpec]) {
    let wanted = open_files_wanted(flows_max, ports);
    let limit = getrlimit(Resource::Nofile).current;
    if let Some(limit) = limit.filter(|&limit| limit < wanted as u64) {
        log::warn!(
            "{flows_max} TCP flows and what else the network opens may need {wanted} open files, \
             and the limit is {limit}: raise it (ulimit -n, LimitNOFILE=) or lower --max-flows"
        );
    }
}

/// Networks of the host that guests will not reach, as theirs has the same addresses.
fn check_overlap(config: &NetworkConfig) {
    let subnet = config.subnet();
    let networks = [
        Some(("subnet", IpAddr::V4(subnet.network), subnet.prefix)),
        config
            .prefix6()
            .map(|prefix| ("subnet6", prefix.into(), PREFIX6_LEN)),
    ];
    for (option, network, prefix) in networks.into_iter().flatten() {
        if let Some(interface) = overlap::interface_of(network, prefix) {
            log::warn!(
                "the LAN {network}/{prefix} has addresses of the host's network on {interface}, which \
                 guests will not reach: choose another one with --{option}"
            );
        }
    }
}

impl Network {
    /// Starts a network: its worker and its control thread.
    ///
    /// # Errors
    /// What is wrong or missing, with the remedy. Nothing is left behind.
    pub fn start(config: NetworkConfig) -> Result<Self, NetworkError> {
        config.validate()?;
        config
            .outbound
            .check()
            .map_err(|(key, reason)| ConfigError::new(key, reason))?;
        check_open_files(config.flows_max, &config.ports);
        check_overlap(&config);
        let mac = gateway_mac(&config);
        let lan = LanConfig {
            mac,
            address: config.gateway,
            prefix: config.prefix,
            mtu: config.mtu,
            v6: lan6(&config, mac),
        };
        let dhcp = dhcp_config(&config, &lan);
        let epoch = Instant::now();
        let mut leases = lease_table(&config, &dhcp)?;
        let keeper = config.lease_file.clone().map(|path| {
            let keeper = LeaseKeeper::restore(LeaseFile::new(path), &mut leases, config.subnet());
            Arc::new(Mutex::new(keeper))
        });
        let leases = Arc::new(Mutex::new(leases));
        let mut switch = SwitchConfig::new(lan.mac, RandomState::new().hash_one(epoch));
        switch.ageing = frame::Duration::from_secs(config.ageing.as_secs());
        let switch = Arc::new(Switch::new(switch));
        let gateway_counters = Arc::new(PortCounters::default());
        let (events, event_queue) = crossbeam_channel::bounded(EVENTS_MAX);
        let (crew, seats) =
            Crew::new(config.workers.count()).map_err(system("set up the workers"))?;
        let common = Common::new(&lan, Arc::clone(crew.homes())).with_memory(config.tcp_memory);
        let worker = |seat: Seat| {
            let config = WorkerConfig {
                switch: Arc::clone(&switch),
                dhcp: dhcp.clone(),
                leases: Arc::clone(&leases),
                outbound: config.outbound.clone(),
                nat: NatConfig {
                    lan: lan.clone(),
                    flows_max: config.flows_max,
                    host: config.host.clone(),
                    udp: config.udp,
                },
                common: common.for_worker(seat.id()),
                gateway_counters: Arc::clone(&gateway_counters),
                events: events.clone(),
                busy_poll: config.busy_poll,
                epoch,
            };
            Worker::new(config, &crew, seat)
        };
        let workers: Result<Vec<_>, _> = seats.into_iter().map(worker).collect();
        let workers = workers.map_err(system("set up a worker"))?;
        drop(events);
        let mut host_ipv6 = HostIpv6::open(lan.v6).map_err(system("ask for the host's routes"))?;
        host_ipv6.look();
        crew.tell_all(|_| host_ipv6.command());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .thread_name("lanlet-leases")
            .max_blocking_threads(1)
            .build()
            .map_err(system("set up the control thread"))?;
        let resolver_config = ResolverConfig {
            servers: config.dns.clone(),
            ..ResolverConfig::default()
        };
        let names = Arc::new(AskWorker(crew.clone()));
        let (resolver, resolver_handle) = Resolver::with_policy(resolver_config, names);
        let policy = config.policy.clone().map(Arc::new);
        // The first thing the workers hear: no port comes before it.
        let (done, _) = crossbeam_channel::bounded(0);
        crew.tell_all(|_| Command::SetPolicy {
            policy: policy.clone(),
            done: done.clone(),
        });
        let gateway = Port {
            name: GuestName::gateway(),
            group: None,
            kind: "gateway",
            mac: Some(lan.mac),
            ip: None,
            leased: false,
            counters: gateway_counters,
            drops: Vec::new(),
            wire: None,
            queues: 0,
            reader: WorkerId::default(),
            attached_at: epoch,
            process: None,
            _attached: None,
        };
        let forwards = config.forwards.clone();
        let ports = config.ports.clone();
        let shared = Arc::new(Shared {
            config,
            lan,
            epoch,
            crew,
            switch,
            leases,
            common,
            resolver: resolver_handle,
            ports: Mutex::new(Ports {
                last: 0,
                by_id: BTreeMap::from([(PortId::GATEWAY, gateway)]),
            }),
            port_removed: Condvar::new(),
            forwards: Mutex::default(),
            helper: Mutex::new(None),
            policy: Mutex::new(policy),
            host_ipv6: AtomicBool::new(host_ipv6.has_default()),
            host_prefixes6: Mutex::new(host_ipv6.prefixes()),
            stop: Notify::new(),
            end: Mutex::new(None),
            ended: Condvar::new(),
        });
        let network = Self {
            shared: Arc::clone(&shared),
            threads: Mutex::new(Vec::new()),
        };
        for (number, worker) in workers.into_iter().enumerate() {
            let name = match number {
                0 => "lanlet-worker".to_owned(),
                number => format!("lanlet-worker{number}"),
            };
            let shared = Arc::clone(&shared);
            network.thread(&name, move || run_worker(worker, &shared))?;
        }
        network.thread("lanlet-dns", {
            let shared = Arc::clone(&shared);
            move || {
                runtime.block_on(async {
                    tokio::select! {
                        () = resolver.run() => {}
                        () = housekeep(&shared, keeper.as_ref(), host_ipv6) => {}
                        () = shared.stop.notified() => {}
                    }
                });
                if let Some(keeper) = &keeper {
                    lock(keeper).follow(&shared.leases, shared.now());
                }
            }
        })?;
        network.thread("lanlet-events", move || take_events(&event_queue, &shared))?;
        for spec in forwards {
            network.add_forward(spec)?;
        }
        for spec in &ports {
            network.add_configured(spec)?;
        }
        Ok(network)
    }

    fn thread(&self, name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), NetworkError> {
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(body);
        lock(&self.threads).push(thread.map_err(system("start a thread"))?);
        Ok(())
    }
}

/// A worker thread's body: a failure or panic is kept for [`Network::failed`], and ends the others.
fn run_worker(worker: Worker, shared: &Shared) {
    let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| worker.run()));
    let end = match ran {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(_) => Some("it panicked; the message is above".to_owned()),
    };
    let failed = end.is_some();
    // Before the others stop, in good order.
    lock(&shared.end).get_or_insert(end);
    if failed {
        shared.crew.tell_all(|_| Command::Stop);
    }
    shared.ended.notify_all();
}

/// The event thread's body; ends with the worker, which holds the other end.
fn take_events(events: &crossbeam_channel::Receiver<Event>, shared: &Arc<Shared>) {
    let sink = |worker: &WorkerHandle| -> AnswerSink {
        let worker = worker.clone();
        Arc::new(move |answer| {
            worker.send(Command::DnsAnswer(answer));
        })
    };
    let sinks: Vec<_> = shared.crew.members().iter().map(sink).collect();
    for event in events {
        match event {
            Event::Dns { worker, query } => {
                let sink = &sinks[usize::from(worker.0)];
                if let Err(query) = shared.resolver.ask(query, sink) {
                    let abandoned = Command::DnsAbandoned(query.id);
                    shared.crew.member(worker).send(abandoned);
                }
            }
            Event::Serve(ServiceStream {
                service: Service::Dns,
                port,
                guest,
                stream,
            }) => shared.resolver.serve(stream, port, guest),
            Event::PortGone(id) => shared.detach(id),
        }
    }
}

/// The table, with the addresses kept for guests.
fn lease_table(config: &NetworkConfig, dhcp: &DhcpConfig) -> Result<LeaseTable, NetworkError> {
    let mut leases = LeaseTable::new(dhcp.range(), &dhcp.lan)?;
    for host in &config.hosts {
        let reservation = Reservation {
            mac: host.mac,
            address: host.address,
            name: host.name.clone(),
        };
        let reserved = leases.reserve(&reservation);
        reserved.map_err(|error| ConfigError::new("host", error.to_string()))?;
    }
    Ok(leases)
}

fn dhcp_config(config: &NetworkConfig, lan: &LanConfig) -> DhcpConfig {
    let mut dhcp = DhcpConfig::new(lan.clone());
    (dhcp.first, dhcp.last) = config.dhcp_range;
    dhcp.lease_secs = u32::try_from(config.lease_time.as_secs()).unwrap_or(u32::MAX);
    dhcp.domain = config.domain.clone();
    dhcp
}

/// IPv6 of the LAN, if it has any.
fn lan6(config: &NetworkConfig, mac: Mac) -> Option<Lan6> {
    let address = config.gateway6();
    if address.is_none() && config.subnet6 == Subnet6::Auto {
        log::info!(
            "the LAN is without IPv6, which needs an MTU of {} bytes at least",
            ipv6::MTU_MIN
        );
    }
    Some(Lan6 {
        link_local: ipv6::link_local(mac),
        address: address?,
        prefix: PREFIX6_LEN,
    })
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
