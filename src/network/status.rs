//! The state of a network as `lanlet status` shows it.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::RecvTimeoutError;
use serde::{Deserialize, Serialize};

use super::forwards::ForwardStatus;
use super::guests::{GuestStatus, Pieces};
use super::ports::Port;
use super::{Shared, lock};
use crate::dhcp::lease::{LeaseKind, LeaseView};
use crate::frame::{PortId, Station};
use crate::names::GroupName;
use crate::nat::policy::ledger::PolicyView;
use crate::port::KernelDrops;
use crate::port::vhost_user::allowance;
use crate::stats::DropReason;
use crate::worker::{Command, Snapshot};

/// How long `status` waits for the worker, which answers between two batches.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(2);

/// Sockets that the NAT and the forwards have open on the host.
const HOST_SOCKETS: &str = "host_sockets";

/// State of a network, as `lanlet status --json` prints it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Status {
    /// Name of the network.
    pub name: String,
    /// Process that runs it.
    pub pid: u32,
    /// Its command line, where it is asked by its control socket.
    #[serde(default)]
    pub command: String,
    /// Seconds since start.
    pub uptime_secs: u64,
    /// Version of the program that runs it.
    #[serde(default)]
    pub version: String,
    /// The LAN, like `192.168.122.0/24`.
    pub subnet: String,
    /// The gateway's address.
    #[serde(default)]
    pub gateway: Option<Ipv4Addr>,
    /// Prefix length of the LAN.
    #[serde(default)]
    pub prefix_len: u8,
    /// IPv6 of the LAN; `None`: it has none.
    #[serde(default)]
    pub ipv6: Option<Ipv6Status>,
    /// MTU of the LAN.
    pub mtu: u16,
    /// Threads that carry the traffic.
    #[serde(default)]
    pub workers: usize,
    /// The guests, by port.
    #[serde(default)]
    pub guests: Vec<GuestStatus>,
    /// The ports, the gateway first.
    pub ports: Vec<PortStatus>,
    /// The MAC table.
    pub macs: Vec<MacStatus>,
    /// DHCP leases.
    pub leases: Vec<LeaseStatus>,
    /// Flows of the NAT now.
    pub flows: FlowStatus,
    /// The forwards.
    #[serde(default)]
    pub forwards: Vec<ForwardStatus>,
    /// The egress policy: what its rules did, and what was denied last; `None`: there is none.
    #[serde(default)]
    pub policy: Option<PolicyView>,
    /// Counters of the network as a whole, by name: they only grow. `host_sockets`, which is a gauge, stays
    /// here too for scripts that look for it here.
    pub totals: BTreeMap<String, u64>,
    /// What there is of the network as a whole now, by name.
    #[serde(default)]
    pub gauges: BTreeMap<String, u64>,
    /// Why flows and most totals are missing; `None`: they are not.
    #[serde(default)]
    pub incomplete: Option<String>,
}

impl Status {
    /// How many ports have guests behind them.
    pub fn guest_ports(&self) -> usize {
        let is_guests = |port: &&PortStatus| port.id != PortId::GATEWAY.0;
        self.ports.iter().filter(is_guests).count()
    }
}

/// IPv6 of the LAN.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ipv6Status {
    /// The LAN, like `fd12:3456:789a:1::/64`.
    pub subnet: String,
    /// The gateway's address in it.
    #[serde(default)]
    pub gateway: Option<Ipv6Addr>,
    /// Prefix length of the LAN.
    #[serde(default)]
    pub prefix_len: u8,
    /// The gateway's link-local address.
    pub link_local: Ipv6Addr,
    /// Whether guests are given a default route: the host has IPv6.
    pub default_route: bool,
}

/// One port.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct PortStatus {
    /// Number.
    pub id: u16,
    /// Name.
    pub name: String,
    /// Group of the guests behind it.
    #[serde(default)]
    pub group: Option<String>,
    /// `gateway`, `vmm`, `namespace`, `tap`.
    pub kind: String,
    /// MAC of its guest, where lanlet gave it one.
    #[serde(default)]
    pub mac: Option<String>,
    /// Seconds since it was attached.
    #[serde(default)]
    pub attached_secs: u64,
    /// Queues of its tap.
    #[serde(default)]
    pub queues: usize,
    /// Worker that reads it, or its first queue, counted from 0.
    #[serde(default)]
    pub worker: u8,
    /// Frames and bytes from the guest.
    pub rx_frames: u64,
    /// Of the frames from the guest, those that went on as part of the one before them.
    #[serde(default)]
    pub rx_joined: u64,
    /// Bytes from the guest.
    pub rx_bytes: u64,
    /// Frames to the guest.
    pub tx_frames: u64,
    /// Bytes to the guest.
    pub tx_bytes: u64,
    /// Drops by reason, kernel-side ones included (`kernel_tx_dropped`, `kernel_rx_dropped`).
    pub drops: BTreeMap<String, u64>,
}

/// One MAC table entry.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MacStatus {
    /// Address.
    pub mac: String,
    /// Port it was learned on.
    pub port: u16,
}

/// One lease.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LeaseStatus {
    /// Address.
    pub address: Ipv4Addr,
    /// Client's MAC.
    pub mac: String,
    /// Port that the client is behind, where that is known.
    #[serde(default)]
    pub port: Option<u16>,
    /// Name the client sent (option 12).
    pub hostname: Option<String>,
    /// Seconds left; `None`: as long as its port.
    pub expires_secs: Option<u64>,
}

/// Flows by protocol.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct FlowStatus {
    /// TCP flows.
    pub tcp: usize,
    /// UDP mappings.
    pub udp: usize,
    /// ICMP echo mappings.
    pub icmp: usize,
    /// Memory of the TCP flows' buffers, bytes.
    #[serde(default)]
    pub tcp_memory: usize,
    /// The most that it may be (`--tcp-memory`).
    #[serde(default)]
    pub tcp_memory_max: usize,
}

impl Shared {
    /// The workers' own state, added up.
    ///
    /// # Errors
    /// One did not answer in time, or has ended.
    pub(super) fn snapshot(&self) -> Result<Snapshot, RecvTimeoutError> {
        let (reply, snapshots) = crossbeam_channel::bounded(self.crew.members().len());
        self.crew.tell_all(|_| Command::Snapshot(reply.clone()));
        drop(reply);
        let deadline = Instant::now() + SNAPSHOT_TIMEOUT;
        let mut sum = Snapshot::default();
        for _ in self.crew.members() {
            sum.add(snapshots.recv_deadline(deadline)?);
        }
        Ok(sum)
    }

    pub(super) fn status(&self) -> Status {
        let (snapshot, incomplete) = match self.snapshot() {
            Ok(snapshot) => (snapshot, None),
            Err(RecvTimeoutError::Timeout) => {
                let secs = SNAPSHOT_TIMEOUT.as_secs();
                let why = format!("the data path did not answer within {secs} s");
                log::warn!("{why}: the status has no flows and totals");
                (Snapshot::default(), Some(why))
            }
            Err(RecvTimeoutError::Disconnected) => (
                Snapshot::default(),
                Some("the data path has ended".to_owned()),
            ),
        };
        let mut totals: BTreeMap<String, u64> = snapshot.counters.into_iter().collect();
        let resolver = self.resolver.counters();
        totals.extend(resolver.map(|(name, count)| (name.to_owned(), count)));
        let mut gauges = BTreeMap::new();
        if incomplete.is_none() {
            let sockets = snapshot.host_sockets as u64;
            totals.insert(HOST_SOCKETS.to_owned(), sockets);
            gauges.insert(HOST_SOCKETS.to_owned(), sockets);
        }
        gauges.insert("guest_memory_bytes".to_owned(), allowance::used());
        let table = self.switch.counters();
        totals.extend(table.iter().map(|(name, count)| (name.to_owned(), count)));
        // Copied out: the helper is asked for the drops of a wire, and may take its time.
        let ports: Vec<_> = lock(&self.ports)
            .by_id
            .iter()
            .map(|(&id, port)| (id, port.clone()))
            .collect();
        let given: Vec<_> = ports
            .iter()
            .filter_map(|&(id, ref port)| {
                Some((
                    Station {
                        mac: port.mac?,
                        port: id,
                    },
                    port.leased,
                ))
            })
            .filter(|(station, _)| station.port != PortId::GATEWAY)
            .collect();
        // Who has a lease with the port was given its IPv6 address, too.
        let given6: Vec<_> = given
            .iter()
            .filter(|(_, leased)| *leased)
            .filter_map(|(station, _)| Some((station.mac, self.guest6(station.mac)?.address)))
            .collect();
        let given: Vec<_> = given.into_iter().map(|(station, _)| station).collect();
        let ports: Vec<_> = ports.iter().map(|(id, port)| port.status(*id)).collect();
        let learned = self.switch.snapshot();
        let leases = self.held_leases();
        let heard = self.common.neighbors().heard();
        let pieces = Pieces {
            ports: &ports,
            given: &given,
            given6: &given6,
            learned: &learned,
            leases: &leases,
            heard: &heard,
        };
        let guests = pieces.guests();
        let ports_of_macs = pieces.ports_of_macs();
        for (name, count) in [
            ("ports", ports.len()),
            ("macs", learned.len()),
            ("leases", leases.len()),
        ] {
            gauges.insert(name.to_owned(), count as u64);
        }
        let station = |station: &Station| MacStatus {
            mac: station.mac.to_string(),
            port: station.port.0,
        };
        let lease = |lease: LeaseView| LeaseStatus {
            address: lease.address,
            mac: lease.mac.to_string(),
            port: lease
                .port
                .or_else(|| ports_of_macs.get(&lease.mac).copied())
                .map(|port| port.0),
            hostname: lease.hostname.as_ref().map(ToString::to_string),
            expires_secs: lease.remaining.map(|left| left.secs()),
        };
        Status {
            name: self.config.name.clone(),
            pid: std::process::id(),
            command: String::new(),
            uptime_secs: self.epoch.elapsed().as_secs(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            subnet: self.config.subnet().to_string(),
            gateway: Some(self.lan.address),
            prefix_len: self.lan.prefix,
            ipv6: self.lan.v6.map(|lan| Ipv6Status {
                subnet: format!("{}/{}", lan.network(), lan.prefix),
                gateway: Some(lan.address),
                prefix_len: lan.prefix,
                link_local: lan.link_local,
                default_route: self.host_ipv6.load(Ordering::Relaxed),
            }),
            mtu: self.lan.mtu,
            workers: self.crew.members().len(),
            guests,
            ports,
            macs: learned.iter().map(station).collect(),
            leases: leases.into_iter().map(lease).collect(),
            flows: FlowStatus {
                tcp: snapshot.tcp,
                udp: snapshot.udp,
                icmp: snapshot.icmp,
                tcp_memory: snapshot.tcp_memory.0,
                tcp_memory_max: snapshot.tcp_memory.1,
            },
            forwards: self.forward_status(&snapshot.forwards),
            policy: snapshot.policy,
            totals,
            gauges,
            incomplete,
        }
    }

    /// The leases that clients have.
    fn held_leases(&self) -> Vec<LeaseView> {
        let mut leases = lock(&self.leases).snapshot(self.now());
        leases.retain(|lease| matches!(lease.kind, LeaseKind::Bound | LeaseKind::Attached));
        leases
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
        // The netdev of a guest whose link is down counts what it refused, as we do.
        let refused = drops.get(DropReason::LinkDown.name()).copied();
        let kernel_tx = kernel.tx.saturating_sub(refused.unwrap_or(0));
        for (name, count) in [
            ("kernel_rx_dropped", kernel.rx),
            ("kernel_tx_dropped", kernel_tx),
        ] {
            if count != 0 {
                drops.insert(name.to_owned(), count);
            }
        }
        PortStatus {
            id: id.0,
            name: self.name.to_string(),
            group: self.group.as_ref().map(GroupName::to_string),
            kind: self.kind.to_owned(),
            mac: self.mac.map(|mac| mac.to_string()),
            attached_secs: self.attached_at.elapsed().as_secs(),
            queues: self.queues,
            worker: self.reader.0,
            rx_frames: self.counters.rx_frames.load(Relaxed),
            rx_joined: self.counters.rx_joined.load(Relaxed),
            rx_bytes: self.counters.rx_bytes.load(Relaxed),
            tx_frames: self.counters.tx_frames.load(Relaxed),
            tx_bytes: self.counters.tx_bytes.load(Relaxed),
            drops,
        }
    }
}
