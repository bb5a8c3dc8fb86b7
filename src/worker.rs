//! The data path's thread: epoll, batches, run to completion.
//!
//! A worker owns the receive halves of its ports and the flows of the guests behind them. It carries
//! each batch from receive to send, gateway and NAT included, and writes into any port's send half
//! itself: between two ports there is no queue, no lock and no other thread.
//!
//! # One turn
//! Wait for events; for each ready port read a batch, decide and send frame by frame, then flush the
//! NAT; for each ready host socket let its flow act. Flows that exhausted their share, and ports that
//! had more than `BATCHES_PER_TURN`, get their next turn after everybody else's.
//!
//! # Control
//! Other threads send a [`Command`] and write to the worker's eventfd. What the worker has to tell
//! leaves as an [`Event`] through a bounded channel; if the control thread falls behind, queries are
//! dropped and counted rather than waited for.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time;

use crossbeam_channel::{Receiver, Sender};
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};

use crate::dhcp::DhcpConfig;
use crate::dhcp::lease::LeaseTable;
use crate::frame::{Batch, ETH_HEADER_LEN, FRAME_BUFFER_LEN, Frame, Instant, PortId};
use crate::gateway::dns::{DnsAnswer, DnsQuery, QueryId};
use crate::gateway::{Gateway, Outbox};
use crate::nat::{Nat, NatConfig};
use crate::offload::{self, Offload};
use crate::port::{More, PortRx, PortTx};
use crate::stats::{DropReason, PortCounters};
use crate::switch::{Switch, Verdict};
use crate::uplink::{self, HostUplink};
use crate::wire::Packet;

/// Batches read from one port before the others get their turn: about a millisecond of the largest
/// frames.
const BATCHES_PER_TURN: usize = 4;
/// Pause before [`Event::PortGone`] is tried again while the event thread is behind: it must not get
/// lost, as a query may, and must not be waited for.
const GONE_RETRY: time::Duration = time::Duration::from_millis(100);
/// Bytes of IP packet that a port takes. Taps pass anything; what a guest's MTU is, is between the
/// guests, as on the kernel's bridge.
const PORT_MTU: usize = 65_535;
/// Events taken from epoll at a time.
const EVENTS_PER_TURN: usize = 64;
/// Longest sleep: bounds how late the MAC table ages.
const SLEEP_MAX: time::Duration = time::Duration::from_secs(10);

const TOKEN_WAKE: u64 = 1 << 56;
const TOKEN_PORT: u64 = 2 << 56;
const _: () = assert!(TOKEN_PORT >> 56 < uplink::TOKEN_KIND_FIRST as u64);

/// What other threads ask of a worker.
pub enum Command {
    /// Serve this port.
    AddPort {
        /// Its number, unused so far.
        id: PortId,
        /// Receive half.
        rx: Box<dyn PortRx>,
        /// Send half.
        tx: Arc<dyn PortTx>,
        /// Its counters.
        counters: Arc<PortCounters>,
    },
    /// Forget this port, its MACs and its flows.
    RemovePort(PortId),
    /// An answer for a guest.
    DnsAnswer(DnsAnswer),
    /// The resolver took on no more: the guest's query is forgotten.
    DnsAbandoned(QueryId),
    /// Where DNS over TCP goes.
    DnsUpstream(Option<std::net::SocketAddrV4>),
    /// Report the worker's own state.
    Snapshot(Sender<Snapshot>),
    /// End.
    Stop,
}

/// What a worker tells other threads.
#[derive(Debug)]
pub enum Event {
    /// A guest's query for the resolver.
    Dns(DnsQuery),
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
    /// Host sockets open.
    pub host_sockets: usize,
}

/// The side of a worker that other threads hold.
#[derive(Clone)]
pub struct WorkerHandle {
    commands: Sender<Command>,
    wake: Arc<OwnedFd>,
}

impl WorkerHandle {
    /// Sends a command; `false` if the worker has ended.
    pub fn send(&self, command: Command) -> bool {
        let sent = self.commands.send(command).is_ok();
        // Failure means that the counter is at its maximum: the worker is awake anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        sent
    }
}

/// What a worker is made with.
pub struct WorkerConfig {
    /// The switch, shared by all workers.
    pub switch: Arc<Switch>,
    /// The gateway's services.
    pub dhcp: DhcpConfig,
    /// The lease table, shared by all workers and the control thread.
    pub leases: Arc<Mutex<LeaseTable>>,
    /// The NAT.
    pub nat: NatConfig,
    /// Counters of the gateway's port.
    pub gateway_counters: Arc<PortCounters>,
    /// Where events go.
    pub events: Sender<Event>,
    /// The origin of the worker's clock.
    pub epoch: time::Instant,
}

/// One data-path thread's state.
pub struct Worker {
    epoll: Arc<OwnedFd>,
    wake: Arc<OwnedFd>,
    commands: Receiver<Command>,
    events: Sender<Event>,
    epoch: time::Instant,
    receivers: Vec<Option<Box<dyn PortRx>>>,
    /// Ports whose devices are gone, which nobody has been told yet.
    gone: Vec<PortId>,
    batch: Batch,
    path: Path,
}

/// Everything a frame meets behind the receive half.
struct Path {
    lan: Lan,
    buffer: Box<[u8]>,
    gateway: Gateway,
    nat: Nat,
    uplink: HostUplink,
    now: Instant,
}

/// The switch and the send halves.
struct Lan {
    switch: Arc<Switch>,
    /// By port number; the gateway's place stays empty.
    ports: Vec<Option<Egress>>,
    /// Counters of the gateway's port: received is what the gateway sends into the switch.
    gateway: Arc<PortCounters>,
    scratch: Box<[u8]>,
}

struct Egress {
    tx: Arc<dyn PortTx>,
    counters: Arc<PortCounters>,
}

impl Worker {
    /// Sets a worker up; [`Worker::run`] is the thread's body.
    ///
    /// # Errors
    /// The kernel gives no epoll, eventfd or netlink socket.
    pub fn new(config: WorkerConfig) -> io::Result<(Self, WorkerHandle)> {
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        epoll::add(
            &epoll,
            &wake,
            epoll::EventData::new_u64(TOKEN_WAKE),
            epoll::EventFlags::IN,
        )?;
        let (sender, commands) = crossbeam_channel::unbounded();
        let now = clock(config.epoch);
        let worker = Self {
            path: Path {
                lan: Lan {
                    switch: config.switch,
                    ports: vec![None],
                    gateway: config.gateway_counters,
                    scratch: vec![0; FRAME_BUFFER_LEN].into_boxed_slice(),
                },
                buffer: vec![0; FRAME_BUFFER_LEN].into_boxed_slice(),
                gateway: Gateway::new(config.dhcp, config.leases),
                nat: Nat::new(config.nat, now),
                uplink: HostUplink::new(Arc::clone(&epoll))?,
                now,
            },
            epoll,
            wake: Arc::clone(&wake),
            commands,
            events: config.events,
            epoch: config.epoch,
            receivers: vec![None],
            gone: Vec::new(),
            batch: Batch::new(),
        };
        Ok((
            worker,
            WorkerHandle {
                commands: sender,
                wake,
            },
        ))
    }

    /// Serves until [`Command::Stop`].
    ///
    /// # Errors
    /// epoll failed, which only a bug can cause.
    pub fn run(mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(EVENTS_PER_TURN);
        loop {
            let timeout = self.sleep();
            events.clear();
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                Some(&timeout),
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            self.path.now = clock(self.epoch);
            // Before anything is learned: entries are stamped with the time of the last call.
            self.path.lan.switch.tick(self.path.now);
            for event in events.drain(..) {
                let token = event.data.u64();
                if let Some(owner) = uplink::owner(token) {
                    self.path.handle_socket(owner, uplink::ready(event.flags));
                } else if token & TOKEN_PORT != 0 {
                    self.serve_port(PortId(token as u16));
                } else if !self.obey() {
                    return Ok(());
                }
            }
            self.path.end_turn();
            self.report_gone();
        }
    }

    /// How long nothing needs to be done.
    fn sleep(&self) -> Timespec {
        let path = &self.path;
        let sleep = if path.nat.has_backlog() {
            time::Duration::ZERO
        } else if !self.gone.is_empty() {
            GONE_RETRY
        } else {
            let due = [path.nat.poll_timeout(), path.gateway.dns.poll_at()]
                .into_iter()
                .flatten()
                .min();
            let until = due.map(|due| due.max(path.now) - path.now);
            until.map_or(SLEEP_MAX, |until| {
                time::Duration::from(until).min(SLEEP_MAX)
            })
        };
        Timespec {
            tv_sec: sleep.as_secs() as i64,
            tv_nsec: i64::from(sleep.subsec_nanos()),
        }
    }

    fn serve_port(&mut self, id: PortId) {
        let Some(Some(rx)) = self.receivers.get_mut(usize::from(id.0)) else {
            return;
        };
        let Some(Some(egress)) = self.path.lan.ports.get(usize::from(id.0)) else {
            return;
        };
        let counters = Arc::clone(&egress.counters);
        for _ in 0..BATCHES_PER_TURN {
            self.batch.clear();
            let more = rx.recv(&mut self.batch, &counters);
            for frame in self.batch.frames() {
                if let Err(reason) = self.path.handle_frame(id, frame) {
                    counters.count_drop(reason);
                }
            }
            self.path.flush(&self.events);
            match more {
                Ok(More::Yes) => {}
                Ok(More::No) => return,
                Err(error) => {
                    log::debug!("port {id}: its device is gone: {error}");
                    self.remove_port(id);
                    self.gone.push(id);
                    return;
                }
            }
        }
    }

    fn report_gone(&mut self) {
        while let Some(&id) = self.gone.last() {
            if self.events.try_send(Event::PortGone(id)).is_err() {
                return;
            }
            self.gone.pop();
        }
    }

    /// Carries out the commands that wait; `false` to stop.
    fn obey(&mut self) -> bool {
        let mut counter = [0; 8];
        let _ = rustix::io::read(&self.wake, &mut counter);
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::AddPort {
                    id,
                    rx,
                    tx,
                    counters,
                } => self.add_port(id, rx, tx, counters),
                Command::RemovePort(id) => self.remove_port(id),
                Command::DnsAnswer(answer) => self.path.answer_dns(&answer),
                Command::DnsAbandoned(id) => self.path.gateway.dns.abandon(id),
                Command::DnsUpstream(upstream) => self.path.nat.set_dns_upstream(upstream),
                Command::Snapshot(reply) => {
                    let _ = reply.send(self.path.snapshot());
                }
                Command::Stop => return false,
            }
        }
        true
    }

    fn add_port(
        &mut self,
        id: PortId,
        rx: Box<dyn PortRx>,
        tx: Arc<dyn PortTx>,
        counters: Arc<PortCounters>,
    ) {
        let index = usize::from(id.0);
        let token = epoll::EventData::new_u64(TOKEN_PORT | u64::from(id.0));
        if let Err(error) = epoll::add(&self.epoll, rx.fd(), token, epoll::EventFlags::IN) {
            log::error!("port {id}: can't be waited on: {error}");
            self.gone.push(id);
            return;
        }
        if self.receivers.len() <= index {
            self.receivers.resize_with(index + 1, || None);
            self.path.lan.ports.resize_with(index + 1, || None);
        }
        self.receivers[index] = Some(rx);
        self.path.lan.ports[index] = Some(Egress { tx, counters });
    }

    fn remove_port(&mut self, id: PortId) {
        let index = usize::from(id.0);
        if let Some(rx) = self.receivers.get_mut(index).and_then(Option::take) {
            let _ = epoll::delete(&self.epoll, rx.fd());
            self.path.lan.ports[index] = None;
            self.path.lan.switch.remove_port(id);
            self.path.nat.forget_port(id, &mut self.path.uplink);
        }
    }
}

impl Path {
    /// Switches one frame of a port.
    fn handle_frame(&mut self, ingress: PortId, frame: Frame<'_>) -> Result<(), DropReason> {
        if self.lan.forward(ingress, frame)? {
            self.handle_for_gateway(ingress, frame)?;
            self.lan.gateway.tx(frame.bytes.len());
        }
        Ok(())
    }

    fn handle_for_gateway(&mut self, ingress: PortId, frame: Frame<'_>) -> Result<(), DropReason> {
        // A group frame concerns the gateway only if a service claims it: it reached the others.
        let group = frame.destination().is_group();
        let packet = match Packet::parse(frame, ingress) {
            Ok(packet) => packet,
            Err(_) if group => return Ok(()),
            Err(reason) => return Err(reason),
        };
        let mut out = GatewayOut {
            lan: &mut self.lan,
            buffer: &mut self.buffer,
        };
        match self.gateway.handle(&packet, self.now, &mut out) {
            Some(handled) => handled,
            None if group => Ok(()),
            None => self
                .nat
                .handle_packet(&packet, self.now, (&mut self.uplink, &mut out)),
        }
    }

    fn handle_socket(&mut self, owner: crate::nat::SockOwner, ready: crate::nat::Ready) {
        let counters = Arc::clone(&self.lan.gateway);
        let mut out = GatewayOut {
            lan: &mut self.lan,
            buffer: &mut self.buffer,
        };
        // A datagram from outside that is not wanted never became a frame: it counts as one received
        // by the gateway and dropped.
        let mut drops = |reason| {
            counters.rx(0);
            counters.count_drop(reason);
        };
        self.nat.handle_ready(
            owner,
            ready,
            self.now,
            (&mut self.uplink, &mut out),
            &mut drops,
        );
    }

    /// Ends a port's batch.
    fn flush(&mut self, events: &Sender<Event>) {
        let mut out = GatewayOut {
            lan: &mut self.lan,
            buffer: &mut self.buffer,
        };
        self.nat.flush(self.now, &mut self.uplink, &mut out);
        while let Some(query) = self.gateway.dns.poll_query() {
            let id = query.id;
            if events.try_send(Event::Dns(query)).is_err() {
                self.gateway.dns.abandon(id);
            }
        }
    }

    /// Ends a turn of the event loop: what the host sockets brought, and timers.
    fn end_turn(&mut self) {
        let mut out = GatewayOut {
            lan: &mut self.lan,
            buffer: &mut self.buffer,
        };
        self.nat.flush(self.now, &mut self.uplink, &mut out);
        if self.nat.poll_timeout().is_some_and(|due| due <= self.now) {
            self.nat
                .handle_timeout(self.now, &mut self.uplink, &mut out);
        }
        if self
            .gateway
            .dns
            .poll_at()
            .is_some_and(|due| due <= self.now)
        {
            self.gateway.dns.expire(self.now);
        }
    }

    fn answer_dns(&mut self, answer: &DnsAnswer) {
        let mut out = GatewayOut {
            lan: &mut self.lan,
            buffer: &mut self.buffer,
        };
        // A late answer is counted by the service; no frame was dropped.
        let _ = self.gateway.dns.handle_answer(answer, &mut out);
    }

    fn snapshot(&self) -> Snapshot {
        let (tcp, udp, icmp) = self.nat.flows();
        let services = self.gateway.counters();
        Snapshot {
            tcp,
            udp,
            icmp,
            counters: services
                .chain(self.nat.counters())
                .map(|(name, count)| (name.to_owned(), count))
                .collect(),
            host_sockets: self.uplink.open_count(),
        }
    }
}

impl Lan {
    /// Decides about a frame and sends it to the ports it is for. Returns whether the gateway is
    /// among its receivers.
    fn forward(&mut self, ingress: PortId, frame: Frame<'_>) -> Result<bool, DropReason> {
        debug_assert!(frame.bytes.len() >= ETH_HEADER_LEN);
        match self.switch.decide(ingress, frame.bytes) {
            Verdict::Unicast(PortId::GATEWAY) => Ok(true),
            Verdict::Unicast(port) => {
                if let Some(Some(egress)) = self.ports.get(usize::from(port.0)) {
                    egress.send(frame, &mut self.scratch);
                    Ok(false)
                } else {
                    Err(DropReason::NoPort)
                }
            }
            Verdict::Flood { to_gateway } => {
                let mut receivers = usize::from(to_gateway);
                for (index, egress) in self.ports.iter().enumerate() {
                    if let Some(egress) =
                        egress.as_ref().filter(|_| index != usize::from(ingress.0))
                    {
                        receivers += 1;
                        egress.send(frame, &mut self.scratch);
                    }
                }
                if receivers == 0 {
                    Err(DropReason::NoPort)
                } else {
                    Ok(to_gateway)
                }
            }
            Verdict::Drop(reason) => Err(reason),
        }
    }
}

impl Egress {
    /// Sends a frame as this port needs it; losses are counted here.
    fn send(&self, frame: Frame<'_>, scratch: &mut [u8]) {
        let mut send = |frame: Frame<'_>| match self.tx.send(frame) {
            Ok(()) => self.counters.tx(frame.bytes.len()),
            Err(reason) => self.counters.count_drop(reason),
        };
        if let Err(reason) = offload::fit(frame, self.tx.caps(), PORT_MTU, scratch, &mut send) {
            self.counters.count_drop(reason);
        }
    }
}

/// Frames of the gateway enter the switch here, by its own port.
struct GatewayOut<'a> {
    lan: &'a mut Lan,
    buffer: &'a mut [u8],
}

impl Outbox for GatewayOut<'_> {
    fn buffer(&mut self) -> &mut [u8] {
        self.buffer
    }

    fn send(&mut self, len: usize, offload: Offload) {
        let frame = Frame {
            bytes: &self.buffer[..len],
            offload,
        };
        self.lan.gateway.rx(len);
        if let Err(reason) = self.lan.forward(PortId::GATEWAY, frame) {
            self.lan.gateway.count_drop(reason);
        }
    }
}

fn clock(epoch: time::Instant) -> Instant {
    Instant::from_micros(epoch.elapsed().as_micros() as i64)
}

#[cfg(test)]
mod tests;
