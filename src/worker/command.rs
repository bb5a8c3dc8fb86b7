//! What other threads ask of a worker, and what it tells them.

use std::net::Ipv6Addr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use crossbeam_channel::Sender;
use tokio::sync::oneshot;

use crate::frame::{Mac, PortId, WorkerId};
use crate::gateway::dns::message::Name;
use crate::gateway::dns::{DnsAnswer, DnsQuery, QueryId};
use crate::names::{GroupName, GuestName};
use crate::nat::HostError;
use crate::nat::forward::{ForwardCounters, ForwardId, ForwardSpec, ListenerKind, Moved};
use crate::nat::policy::Policy;
use crate::nat::policy::ledger::PolicyView;
use crate::nat::policy::pins::GuestPins;
use crate::nat::tcp::GiveWay;
use crate::port::{PortRx, PortTx};
use crate::stats::PortCounters;
use crate::uplink::ServiceStream;

/// A queue of a port that a worker reads.
pub struct Reception {
    /// The port.
    pub port: PortId,
    /// Receive half.
    pub rx: Box<dyn PortRx>,
    /// The port's counters.
    pub counters: Arc<PortCounters>,
}

/// The queues of a port that begins, and who is to read them.
pub type Readers = Arc<Mutex<Vec<(WorkerId, Reception)>>>;

/// What other threads ask of a worker.
pub enum Command {
    /// There is this port to send to. Its [`Command::Receive`] follows where it is to be read, once all workers
    /// know it.
    AddPort {
        /// Its number, unused so far.
        id: PortId,
        /// Send half, this worker's where there are several.
        tx: Arc<dyn PortTx>,
        /// Its counters.
        counters: Arc<PortCounters>,
        /// Its name, as rules of the policy say it.
        name: GuestName,
        /// Its guests' group.
        group: Option<GroupName>,
        /// Its queues.
        readers: Readers,
    },
    /// Read from this port.
    Receive(Reception),
    /// Forget this port, its MACs and its flows.
    RemovePort(PortId),
    /// Leave the reading of this port, and its home if it has no flows, to another worker.
    PassPort {
        /// The port.
        id: PortId,
        /// The other worker.
        to: WorkerId,
    },
    /// Take over a port's home, with what its guest resolved.
    TakeHome {
        /// The port.
        id: PortId,
        /// The port's counters, by which it is known from one that has its number later.
        counters: Arc<PortCounters>,
        /// What its guest resolved.
        pins: GuestPins,
    },
    /// What a port is called, and its guest's MAC where that is known.
    NamePort {
        /// Its number.
        id: PortId,
        /// Its name.
        name: GuestName,
        /// The guest's MAC.
        mac: Option<Mac>,
    },
    /// Serve a forward.
    AddForward {
        /// Its number, unused so far.
        id: ForwardId,
        /// What it does, the host's port filled in.
        spec: Box<ForwardSpec>,
        /// Where it listens, with the sockets; `None`: another worker has them.
        sockets: Vec<(Option<OwnedFd>, ListenerKind)>,
        /// Hears whether it is served.
        reply: Sender<Result<(), HostError>>,
    },
    /// Take over a forward's sockets: its guest is this worker's.
    TakeForward(Moved<OwnedFd>),
    /// Take nothing more in by this forward.
    RemoveForward(ForwardId),
    /// An answer for a guest.
    DnsAnswer(DnsAnswer),
    /// The resolver took on no more: the guest's query is forgotten.
    DnsAbandoned(QueryId),
    /// Whether the host has a way to the IPv6 outside, and if not, the prefixes that it has routes to.
    HostIpv6 {
        /// A default route.
        has_default: bool,
        /// Prefixes.
        prefixes: Arc<[(Ipv6Addr, u8)]>,
    },
    /// Put another egress policy in force, or none.
    SetPolicy {
        /// The policy.
        policy: Option<Arc<Policy>>,
        /// Hears when it is in force.
        done: Sender<()>,
    },
    /// Whether a guest may ask for a name, over TCP: what is asked over UDP the worker sees itself.
    DecideName {
        /// Port the guest is behind.
        port: PortId,
        /// The name.
        name: Box<Name>,
        /// Gets the decision.
        reply: oneshot::Sender<bool>,
    },
    /// Take note of an answer that a guest will get over TCP.
    Pin {
        /// Port the guest is behind.
        port: PortId,
        /// The whole DNS message.
        message: Box<[u8]>,
        /// Hears when it is done.
        done: oneshot::Sender<()>,
    },
    /// Another worker needs room for its guests' flows.
    GiveWay(GiveWay),
    /// Report the worker's own state.
    Snapshot(Sender<Snapshot>),
    /// End.
    Stop,
}

/// What a worker tells other threads.
#[derive(Debug)]
pub enum Event {
    /// A guest's query for the resolver.
    Dns {
        /// Who wants the answer.
        worker: WorkerId,
        /// The query.
        query: DnsQuery,
    },
    /// A guest's connection to a service.
    Serve(ServiceStream),
    /// A port's device is gone.
    PortGone(PortId),
}

/// State that only the worker knows.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// TCP flows.
    pub tcp: usize,
    /// UDP mappings.
    pub udp: usize,
    /// ICMP mappings.
    pub icmp: usize,
    /// Counters of services and NAT by name.
    pub counters: Vec<(String, u64)>,
    /// Memory of TCP flows' rings, of all workers: in use, and at most.
    pub tcp_memory: (usize, usize),
    /// Host sockets open.
    pub host_sockets: usize,
    /// What each forward has done.
    pub forwards: Vec<(ForwardId, ForwardCounters)>,
    /// The egress policy at work, if there is one.
    pub policy: Option<PolicyView>,
}

impl Snapshot {
    /// Adds another worker's.
    pub fn add(&mut self, other: Self) {
        self.tcp += other.tcp;
        self.udp += other.udp;
        self.icmp += other.icmp;
        self.host_sockets += other.host_sockets;
        // Each tells of the same.
        self.tcp_memory = self.tcp_memory.max(other.tcp_memory);
        for (name, more) in other.counters {
            match self.counters.iter_mut().find(|(own, _)| *own == name) {
                Some((_, count)) => *count += more,
                None => self.counters.push((name, more)),
            }
        }
        for (id, more) in other.forwards {
            match self.forwards.iter_mut().find(|(own, _)| *own == id) {
                Some((_, counters)) => counters.add(more),
                None => self.forwards.push((id, more)),
            }
        }
        match (&mut self.policy, other.policy) {
            (Some(policy), Some(more)) => policy.add(more),
            (policy @ None, more) => *policy = more,
            (Some(_), None) => {}
        }
    }
}
