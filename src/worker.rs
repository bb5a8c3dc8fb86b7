//! The data path's thread: epoll, batches, run to completion.
//!
//! A worker owns the receive halves of its ports and the flows of the guests behind them. It carries
//! each batch from receive to send, gateway and NAT included, and writes into any port's send half
//! itself: between two ports there is no queue, no lock that all share and no other thread.
//!
//! # Several workers
//! All know all ports to send to; each port is read by one of them, a port with several queues by as
//! many as it has queues. They share the switch's table, the leases and what forwards know of where guests
//! are. Each has a gateway and a NAT of its own
//! for the guests of the ports at home with it ([`crate::nat::common`]); what concerns another's is
//! posted to it ([`crew`]). The first speaks where one has to speak for all: it sends the router
//! advertisements that nobody asked for.
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
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time;

use crossbeam_channel::Sender;
use rustix::event::{Timespec, epoll};
use tokio::sync::oneshot;

use crate::dhcp::DhcpConfig;
use crate::dhcp::lease::LeaseTable;
use crate::frame::{
    Batch, ETH_HEADER_LEN, FRAME_BUFFER_LEN, Frame, Instant, Mac, PortId, WorkerId,
};
use crate::gateway::dns::DnsAnswer;
use crate::gateway::fragment::Reassembler;
use crate::gateway::{Gateway, Outbox, ndp};
use crate::nat::common::Common;
use crate::nat::forward::{ForwardId, ForwardSpec, ListenerKind, Moved};
use crate::nat::policy::Policy;
use crate::nat::{HostError, Nat, NatConfig, SockOwner};
use crate::offload::{self, Caps, Offload};
use crate::port::vhost_user::RemoteFrame;
use crate::port::{More, PortTx, Shortcut};
use crate::stats::{DropReason, PortCounters};
use crate::switch::{Switch, Verdict};
use crate::uplink::addresses::Change;
use crate::uplink::outbound::Outbound;
use crate::uplink::{self, HostUplink};
use crate::wire::Packet;

mod command;
pub mod crew;

pub use self::command::{Command, Event, Reception, Snapshot};
pub use self::crew::{Crew, Seat, WorkerHandle};

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

/// What a worker is made with.
pub struct WorkerConfig {
    /// The switch, shared by all workers.
    pub switch: Arc<Switch>,
    /// The gateway's services.
    pub dhcp: DhcpConfig,
    /// The lease table, shared by all workers and the control thread.
    pub leases: Arc<Mutex<LeaseTable>>,
    /// The NAT, and what all workers' share.
    pub nat: NatConfig,
    /// What the NATs of all workers share, as this worker sees it.
    pub common: Common,
    /// Where guests' traffic leaves from.
    pub outbound: Outbound,
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
    seat: Seat,
    events: Sender<Event>,
    epoch: time::Instant,
    /// What is read here; the place is the epoll token.
    receivers: Vec<Option<Reception>>,
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
    fragments: Reassembler,
    uplink: HostUplink,
    crew: Crew,
    common: Common,
    /// Workers that frames were posted to, to be woken after the batch.
    posted: Vec<WorkerId>,
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
    /// Ports whose batch is to be ended.
    unflushed: Vec<usize>,
}

struct Egress {
    tx: Arc<dyn PortTx>,
    counters: Arc<PortCounters>,
    is_batched: bool,
    /// It is among [`Lan::unflushed`].
    is_unflushed: bool,
}

impl Worker {
    /// Sets a worker up on its seat in the crew; [`Worker::run`] is the thread's body.
    ///
    /// # Errors
    /// The kernel gives no epoll or netlink socket.
    pub fn new(config: WorkerConfig, crew: &Crew, seat: Seat) -> io::Result<Self> {
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        epoll::add(
            &epoll,
            &seat.wake,
            epoll::EventData::new_u64(TOKEN_WAKE),
            epoll::EventFlags::IN,
        )?;
        let now = clock(config.epoch);
        let common = config.common;
        let mut nat = Nat::with(config.nat, common.clone(), now);
        nat.forwards_mut().set_leases(Arc::clone(&config.leases));
        Ok(Self {
            path: Path {
                lan: Lan {
                    switch: config.switch,
                    ports: vec![None],
                    gateway: config.gateway_counters,
                    scratch: vec![0; FRAME_BUFFER_LEN].into_boxed_slice(),
                    unflushed: Vec::new(),
                },
                buffer: vec![0; FRAME_BUFFER_LEN].into_boxed_slice(),
                gateway: Gateway::new(config.dhcp, config.leases),
                nat,
                fragments: Reassembler::new(),
                uplink: HostUplink::new(Arc::clone(&epoll), config.outbound)?,
                crew: crew.clone(),
                common,
                posted: Vec::new(),
                now,
            },
            epoll,
            seat,
            events: config.events,
            epoch: config.epoch,
            receivers: Vec::new(),
            gone: Vec::new(),
            batch: Batch::new(),
        })
    }

    /// Serves until [`Command::Stop`].
    ///
    /// # Errors
    /// epoll failed, which only a bug can cause.
    pub fn run(mut self) -> io::Result<()> {
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        self.seat.thread.store(thread, Relaxed);
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
            let mut datagrams = false;
            for event in events.drain(..) {
                let token = event.data.u64();
                if let Some(owner) = uplink::owner(token) {
                    datagrams |= matches!(owner, SockOwner::Udp(_));
                    self.path.handle_socket(owner, uplink::ready(event.flags));
                } else if token == uplink::TOKEN_ADDRESSES {
                    self.path.readdress();
                } else if token & TOKEN_PORT != 0 {
                    self.serve_port(token as u32 as usize);
                } else if !self.obey() {
                    return Ok(());
                } else {
                    self.path.take_posted(&self.seat);
                    self.path.flush(&self.events);
                }
            }
            self.path.end_turn();
            self.report_gone();
            if datagrams {
                // Who sends them may be waiting for this core, and adds to the next train if it gets it first.
                std::thread::yield_now();
            }
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
            let due = [
                path.nat.poll_timeout(),
                path.gateway.dns.poll_at(),
                path.fragments.poll_timeout(),
                path.gateway.ndp.poll_timeout(),
            ];
            let due = due.into_iter().flatten().min();
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

    fn serve_port(&mut self, place: usize) {
        let Some(Some(reception)) = self.receivers.get_mut(place) else {
            return;
        };
        let Reception { port, rx, counters } = reception;
        let port = *port;
        for _ in 0..BATCHES_PER_TURN {
            self.batch.clear();
            let mut shortcut = LanShortcut {
                lan: &mut self.path.lan,
                ingress: port,
            };
            let more = rx.recv_with(&mut self.batch, counters, &mut shortcut);
            let lan = &self.path.lan;
            counters.join(offload::coalesce(&mut self.batch, |frame| lan.takes(frame)));
            let mut for_gateway = 0;
            for frame in self.batch.frames() {
                match self.path.handle_frame(port, frame) {
                    Ok(gateway) => for_gateway += u64::from(gateway),
                    Err(reason) => counters.count_drop(reason),
                }
            }
            if for_gateway > 0 {
                counters.rx_gateway.fetch_add(for_gateway, Relaxed);
            }
            self.path.flush(&self.events);
            match more {
                Ok(More::Yes) => {}
                Ok(More::No) => return,
                Err(error) => {
                    log::debug!("port {port}: its device is gone: {error}");
                    self.remove_port(port);
                    self.gone.push(port);
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
        let _ = rustix::io::read(&self.seat.wake, &mut counter);
        while let Ok(command) = self.seat.commands.try_recv() {
            match command {
                Command::AddPort {
                    id,
                    tx,
                    counters,
                    name,
                    group,
                } => {
                    let policy = self.path.nat.policy();
                    policy.add_guest(id, &name, group.as_deref());
                    self.path.add_port(id, tx, counters);
                }
                Command::Receive(reception) => self.receive(reception),
                Command::RemovePort(id) => self.remove_port(id),
                Command::PassPort { id, to } => self.pass_port(id, to),
                Command::TakeHome { id, counters, pins } => {
                    if self.path.lan.is_port(id, &counters) {
                        self.path.nat.policy().put_pins(id, pins);
                    }
                }
                Command::NamePort { id, name, mac } => {
                    self.path.nat.forwards_mut().name_port(id, &name, mac);
                }
                Command::AddForward {
                    id,
                    spec,
                    sockets,
                    reply,
                } => {
                    let _ = reply.send(self.path.add_forward(id, &spec, sockets));
                }
                Command::TakeForward(moved) => self.path.take_forward(moved),
                Command::RemoveForward(id) => {
                    self.path.nat.remove_forward(id, &mut self.path.uplink);
                }
                Command::DnsAnswer(answer) => self.path.answer_dns(&answer),
                Command::DnsAbandoned(id) => self.path.gateway.dns.abandon(id),
                Command::HostIpv6(has_default) => {
                    let ndp = &mut self.path.gateway.ndp;
                    ndp.set_default_route(has_default, self.path.now);
                }
                Command::SetPolicy { policy, done } => {
                    self.path.set_policy(policy);
                    let _ = done.send(());
                }
                Command::DecideName { port, name, reply } => {
                    let policy = self.path.nat.policy();
                    let _ = reply.send(policy.decide_name(port, Some(&name), self.path.now));
                }
                Command::Pin {
                    port,
                    message,
                    done,
                } => match self.path.common.elsewhere(port) {
                    // It moved meanwhile.
                    Some(home) => {
                        self.path.crew.member(home).send(Command::Pin {
                            port,
                            message,
                            done,
                        });
                    }
                    None => {
                        self.path.nat.policy().pin(port, &message, self.path.now);
                        let _ = done.send(());
                    }
                },
                Command::Snapshot(reply) => {
                    let _ = reply.send(self.path.snapshot());
                }
                Command::Stop => {
                    self.path.stop();
                    return false;
                }
            }
        }
        true
    }

    fn receive(&mut self, reception: Reception) {
        // One that another worker has passed on may have been removed meanwhile.
        if !self.path.lan.is_port(reception.port, &reception.counters) {
            return;
        }
        let place = self.receivers.iter().position(Option::is_none);
        let place = place.unwrap_or(self.receivers.len());
        let (id, token) = (reception.port, TOKEN_PORT | place as u64);
        let token = epoll::EventData::new_u64(token);
        if let Err(error) = epoll::add(&self.epoll, reception.rx.fd(), token, epoll::EventFlags::IN)
        {
            log::error!("port {id}: can't be waited on: {error}");
            self.gone.push(id);
            return;
        }
        match self.receivers.get_mut(place) {
            Some(free) => *free = Some(reception),
            None => self.receivers.push(Some(reception)),
        }
    }

    /// Stops to read a port.
    fn take_receptions(&mut self, id: PortId) -> Vec<Reception> {
        let is_its = |reception: &mut Reception| reception.port == id;
        let epoll = &self.epoll;
        self.receivers
            .iter_mut()
            .filter_map(|place| place.take_if(is_its))
            .inspect(|reception| {
                let _ = epoll::delete(epoll, reception.rx.fd());
            })
            .collect()
    }

    fn remove_port(&mut self, id: PortId) {
        self.take_receptions(id);
        self.path.remove_port(id);
    }

    fn pass_port(&mut self, id: PortId, to: WorkerId) {
        let other = self.path.crew.member(to).clone();
        let path = &mut self.path;
        if let Some(Some(egress)) = path.lan.ports.get(usize::from(id.0))
            && path.common.elsewhere(id).is_none()
            && !path.nat.serves(id)
        {
            let counters = Arc::clone(&egress.counters);
            let pins = path.nat.policy().take_pins(id);
            other.send(Command::TakeHome { id, counters, pins });
            path.common.homes.set(id, to);
        }
        // What was read is through: order holds.
        for reception in self.take_receptions(id) {
            other.send(Command::Receive(reception));
        }
    }
}

impl Path {
    fn add_port(&mut self, id: PortId, tx: Arc<dyn PortTx>, counters: Arc<PortCounters>) {
        let index = usize::from(id.0);
        if self.lan.ports.len() <= index {
            self.lan.ports.resize_with(index + 1, || None);
        }
        self.lan.ports[index] = Some(Egress {
            is_batched: tx.is_batched(),
            is_unflushed: false,
            tx,
            counters,
        });
        self.uplink.spare_files(self.lan.files_to_come());
        if self.common.is_first() {
            self.gateway.ndp.port_added(self.now);
        }
    }

    fn remove_port(&mut self, id: PortId) {
        let port = self.lan.ports.get_mut(usize::from(id.0));
        if port.and_then(Option::take).is_none() {
            return;
        }
        self.lan.switch.remove_port(id);
        self.nat.forget_port(id, &mut self.uplink);
        self.fragments.forget_port(id);
        self.uplink.spare_files(self.lan.files_to_come());
        if self.lan.ports.iter().all(Option::is_none) {
            self.gateway.ndp.ports_gone();
        }
    }

    /// Switches one frame of a port; whether it was for the gateway.
    fn handle_frame(&mut self, ingress: PortId, frame: Frame<'_>) -> Result<bool, DropReason> {
        let for_gateway = self.lan.forward(ingress, frame)?;
        if for_gateway {
            self.receive_for_gateway(ingress, frame)?;
        }
        Ok(for_gateway)
    }

    /// Takes a frame for the gateway, or posts it where its port is at home.
    fn receive_for_gateway(&mut self, ingress: PortId, frame: Frame<'_>) -> Result<(), DropReason> {
        if let Some(home) = self.common.elsewhere(ingress) {
            let port = self.lan.ports.get(usize::from(ingress.0));
            let port = port.and_then(Option::as_ref).ok_or(DropReason::NoPort)?;
            let counters = Arc::clone(&port.counters);
            self.crew.member(home).post(ingress, counters, frame)?;
            if !self.posted.contains(&home) {
                self.posted.push(home);
            }
            return Ok(());
        }
        self.handle_for_gateway(ingress, frame)?;
        self.lan.gateway.tx(frame.bytes.len());
        Ok(())
    }

    /// Handles the frames for the gateway that other workers have read.
    fn take_posted(&mut self, seat: &Seat) {
        seat.take_posted(&mut |ingress, counters, frame| {
            // Of a port that is gone there must be no flow.
            let received = match self.lan.is_port(ingress, counters) {
                true => self.receive_for_gateway(ingress, frame),
                false => Err(DropReason::NoPort),
            };
            if let Err(reason) = received {
                counters.count_drop(reason);
            }
        });
    }

    fn handle_for_gateway(&mut self, ingress: PortId, frame: Frame<'_>) -> Result<(), DropReason> {
        // A group frame concerns the gateway only if a service claims it: it reached the others.
        let group = frame.destination().is_group();
        let packet = match Packet::parse(frame, ingress) {
            Ok(packet) => packet,
            Err(_) if group => return Ok(()),
            Err(reason) => return Err(reason),
        };
        // Put together before anyone looks, so that no rule sees less than the receiver would.
        let packet = if packet.is_fragment() {
            // Of a group's packets, nothing in fragments is for the gateway.
            if group {
                return Ok(());
            }
            let Some(whole) = self.fragments.handle(&packet, self.now)? else {
                return Ok(());
            };
            let mut whole = Packet::parse(whole, ingress)?;
            whole.reassembled = true;
            // RFC 6980 5: no Neighbor Discovery in fragments.
            if ndp::Ndp::is_discovery(&whole) {
                return Err(DropReason::Malformed);
            }
            whole
        } else {
            packet
        };
        self.nat.observe(&packet, self.now);
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

    fn handle_socket(&mut self, owner: SockOwner, ready: crate::nat::Ready) {
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

    /// The host's addresses have changed.
    fn readdress(&mut self) {
        let (mut gone, mut gained) = (Vec::new(), Vec::new());
        let all_heard = self.uplink.poll_addresses(&mut |change| match change {
            Change::Lost(address) => gone.push(Some(address)),
            Change::Gained(address) => gained.push(Some(address)),
        });
        if !all_heard {
            (gone, gained) = (vec![None], vec![None]);
        }
        for address in gained {
            self.nat.address_gained(address, &mut self.uplink);
        }
        let mut out = GatewayOut {
            lan: &mut self.lan,
            buffer: &mut self.buffer,
        };
        for address in gone {
            let io = (&mut self.uplink, &mut out);
            self.nat.address_gone(address, self.now, io);
        }
    }

    /// Ends a port's batch.
    fn flush(&mut self, events: &Sender<Event>) {
        let mut out = GatewayOut {
            lan: &mut self.lan,
            buffer: &mut self.buffer,
        };
        self.nat.flush(self.now, &mut self.uplink, &mut out);
        while let Some(worker) = self.posted.pop() {
            self.crew.member(worker).wake();
        }
        while let Some(query) = self.gateway.dns.poll_query() {
            let id = query.id;
            let policy = self.nat.policy();
            if !policy.decide_query(query.port, &query.message, self.now) {
                self.gateway.dns.refuse(&query, &mut out);
                continue;
            }
            let worker = self.common.worker;
            if events.try_send(Event::Dns { worker, query }).is_err() {
                self.gateway.dns.abandon(id);
            }
        }
        while let Some(stream) = self.uplink.poll_service() {
            // If the control thread is behind, the guest finds the connection closed.
            let _ = events.try_send(Event::Serve(stream));
        }
        self.lan.flush();
    }

    /// Forwards and the news of where guests are, between workers.
    fn settle_forwards(&mut self) {
        let forwards = self.nat.forwards_mut();
        if forwards.take_announcement() {
            for other in self.crew.others(self.common.worker) {
                other.wake();
            }
        }
        while let Some((to, moved)) = self.nat.forwards_mut().poll_leaving() {
            let uplink = &mut self.uplink;
            let moved = moved.exchange(|socket| uplink.release(socket));
            self.crew.member(to).send(Command::TakeForward(moved));
        }
    }

    /// Takes over a forward whose guest is this worker's.
    fn take_forward(&mut self, moved: Moved<OwnedFd>) {
        let mut out = GatewayOut {
            lan: &mut self.lan,
            buffer: &mut self.buffer,
        };
        let io = (&mut self.uplink, &mut out);
        self.nat
            .take_forward(moved, self.now, io, |uplink, fd, kind, owner| match kind {
                Some(kind) => uplink.adopt(fd, kind, owner),
                None => uplink.adopt_stream(fd, owner),
            });
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
        let (nat, now) = (&mut self.nat, self.now);
        self.fragments.handle_timeout(now, &mut |expired| {
            nat.reassembly_expired(&expired, now, &mut out);
        });
        if self
            .gateway
            .ndp
            .poll_timeout()
            .is_some_and(|due| due <= self.now)
        {
            self.gateway.ndp.handle_timeout(self.now, &mut out);
        }
        self.settle_forwards();
        self.lan.flush();
    }

    /// Says what guests have to know before the network ends.
    fn stop(&mut self) {
        let mut out = GatewayOut {
            lan: &mut self.lan,
            buffer: &mut self.buffer,
        };
        self.gateway.ndp.stop(&mut out);
        self.lan.flush();
    }

    fn add_forward(
        &mut self,
        id: ForwardId,
        spec: &ForwardSpec,
        sockets: Vec<(Option<OwnedFd>, ListenerKind)>,
    ) -> Result<(), HostError> {
        let kinds: Vec<_> = sockets.iter().map(|&(_, kind)| kind).collect();
        let mut sockets = sockets.into_iter();
        self.nat
            .add_forward((id, spec), &kinds, &mut self.uplink, |uplink, _, owner| {
                let Some((Some(fd), kind)) = sockets.next() else {
                    return Ok(None);
                };
                uplink.adopt(fd, kind, owner).map(Some)
            })
    }

    fn set_policy(&mut self, policy: Option<Arc<Policy>>) {
        let mut out = GatewayOut {
            lan: &mut self.lan,
            buffer: &mut self.buffer,
        };
        self.nat
            .set_policy(policy, self.now, (&mut self.uplink, &mut out));
    }

    fn answer_dns(&mut self, answer: &DnsAnswer) {
        // Before the answer is cut, and before the guest has it.
        if let Some(port) = self.gateway.dns.port_of(answer.id) {
            match self.common.elsewhere(port) {
                // The port's home has moved since the guest asked.
                Some(home) => {
                    self.crew.member(home).send(Command::Pin {
                        port,
                        message: answer.message.to_vec().into(),
                        done: oneshot::channel().0,
                    });
                }
                None => self.nat.policy().pin(port, &answer.message, self.now),
            }
        }
        let mut out = GatewayOut {
            lan: &mut self.lan,
            buffer: &mut self.buffer,
        };
        // A late answer is counted by the service; no frame was dropped.
        let _ = self.gateway.dns.handle_answer(answer, &mut out);
    }

    fn snapshot(&mut self) -> Snapshot {
        let policy = self.nat.policy().view(self.now);
        let (tcp, udp, icmp) = self.nat.flows();
        let services = self.gateway.counters();
        Snapshot {
            tcp,
            udp,
            icmp,
            counters: services
                .chain(self.nat.counters())
                .chain(self.fragments.counters().iter())
                .map(|(name, count)| (name.to_owned(), count))
                .collect(),
            host_sockets: self.uplink.open_count(),
            forwards: self.nat.forwards().collect(),
            policy,
        }
    }
}

/// What the gateway takes undone: its sockets do the rest.
const GATEWAY_CAPS: Caps = Caps {
    csum: true,
    tso: true,
    uso: true,
};

impl Lan {
    /// Whether `id` is the port with these counters still.
    fn is_port(&self, id: PortId, counters: &Arc<PortCounters>) -> bool {
        let port = self.ports.get(usize::from(id.0)).and_then(Option::as_ref);
        port.is_some_and(|egress| Arc::ptr_eq(&egress.counters, counters))
    }

    /// Open files that the ports may take later.
    fn files_to_come(&self) -> usize {
        let ports = self.ports.iter().flatten();
        ports.map(|egress| egress.tx.files_to_come()).sum()
    }

    /// What the receiver of a frame takes undone; nothing if there are several, or none is known.
    fn takes(&self, frame: &Frame<'_>) -> Caps {
        match self.switch.find(frame.destination()) {
            Some(PortId::GATEWAY) => GATEWAY_CAPS,
            Some(port) => match self.ports.get(usize::from(port.0)) {
                Some(Some(egress)) => egress.tx.caps(),
                _ => Caps::default(),
            },
            None => Caps::default(),
        }
    }

    /// Decides about a frame and sends it to the ports it is for. Returns whether the gateway is
    /// among its receivers.
    fn forward(&mut self, ingress: PortId, frame: Frame<'_>) -> Result<bool, DropReason> {
        debug_assert!(frame.bytes.len() >= ETH_HEADER_LEN);
        match self.switch.decide(ingress, frame.bytes) {
            Verdict::Unicast(PortId::GATEWAY) => Ok(true),
            Verdict::Unicast(port) => {
                let index = usize::from(port.0);
                if let Some(Some(egress)) = self.ports.get_mut(index) {
                    egress.send(frame, &mut self.scratch);
                    egress.note_unflushed(index, &mut self.unflushed);
                    Ok(false)
                } else {
                    Err(DropReason::NoPort)
                }
            }
            Verdict::Flood { to_gateway } => {
                let mut receivers = usize::from(to_gateway);
                for (index, egress) in self.ports.iter_mut().enumerate() {
                    if let Some(egress) =
                        egress.as_mut().filter(|_| index != usize::from(ingress.0))
                    {
                        receivers += 1;
                        egress.send(frame, &mut self.scratch);
                        egress.note_unflushed(index, &mut self.unflushed);
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

    /// Ends the batches of the ports that were sent to.
    fn flush(&mut self) {
        for index in self.unflushed.drain(..) {
            // The port may have gone meanwhile.
            if let Some(Some(egress)) = self.ports.get_mut(index) {
                egress.is_unflushed = false;
                egress.tx.flush();
            }
        }
    }
}

/// From one guest's memory to another's.
struct LanShortcut<'a> {
    lan: &'a mut Lan,
    ingress: PortId,
}

impl Shortcut for LanShortcut<'_> {
    fn leads(&self, head: &[u8]) -> bool {
        let port = self.lan.switch.find(Mac::at(head, 0));
        let port = port.filter(|&port| port != self.ingress);
        let egress = port.and_then(|port| self.lan.ports.get(usize::from(port.0)));
        matches!(egress, Some(Some(egress)) if egress.is_batched)
    }

    fn send(&mut self, frame: &RemoteFrame<'_>) -> bool {
        // What is not for one port is decided about once more, on its way through the batch: with the
        // same outcome, as nothing comes between.
        let verdict = self.lan.switch.decide(self.ingress, frame.head.bytes);
        let Verdict::Unicast(port) = verdict else {
            return false;
        };
        let index = usize::from(port.0);
        let Some(Some(egress)) = self.lan.ports.get_mut(index) else {
            return false;
        };
        if !egress.tx.caps().take(frame.head.offload) {
            return false;
        }
        match egress.tx.send_remote(frame) {
            None => return false,
            Some(Ok(())) => egress.counters.tx(frame.frame_len()),
            Some(Err(reason)) => egress.counters.count_drop(reason),
        }
        egress.note_unflushed(index, &mut self.lan.unflushed);
        true
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

    /// Remembers that this port's batch is to be ended.
    fn note_unflushed(&mut self, index: usize, unflushed: &mut Vec<usize>) {
        if self.is_batched && !self.is_unflushed {
            self.is_unflushed = true;
            unflushed.push(index);
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
