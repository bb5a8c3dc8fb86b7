//! The data path's thread: epoll, batches, run to completion.
//!
//! A worker owns the receive halves of its ports and the flows of the guests behind them. It carries
//! each batch from receive to send, gateway and NAT included, and writes into any port's send half
//! itself: between two ports there is no queue, no lock that all share and no other thread.
//!
//! # Several workers
//! All know all ports to send to; each port is read by one of them, a port with several queues by as
//! many as it has queues. They share the switch's table, the leases and what forwards know of where guests
//! are. Each has a gateway and a NAT of its own for the guests of the ports at home with it
//! ([`crate::nat::common`]); what concerns another's is posted to it ([`crew`]). A port is read once all know
//! it. The first speaks where one has to speak for all: it sends the router
//! advertisements that nobody asked for.
//!
//! # One turn
//! Wait for events, at first by looking for them if that is wanted ([`busy_poll`]); for each ready port read
//! batches, decide and send frame by frame, then flush the NAT; for each ready host socket let its flow act.
//! Flows that exhausted their share, and ports that had more than `BATCHES_PER_TURN`, get their next turn
//! after everybody else's.
//!
//! The NAT is flushed after a port's last batch, not after each: with eight streams a batch holds one
//! super-frame of each, and a send and an ACK for each of those would wake both ends too often.
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

use self::lan::LanShortcut;
use self::path::Path;
use crate::dhcp::DhcpConfig;
use crate::dhcp::lease::LeaseTable;
use crate::frame::{Batch, Duration, Instant, PortId, WorkerId};
use crate::nat::common::Common;
use crate::nat::{NatConfig, SockOwner};
use crate::offload;
use crate::port::More;
use crate::stats::PortCounters;
use crate::switch::Switch;
use crate::uplink;
use crate::uplink::outbound::Outbound;

mod busy_poll;
mod command;
pub mod crew;
mod lan;
mod path;
mod refused;

use self::busy_poll::BusyPoll;
pub use self::command::{Command, Event, Readers, Reception, Snapshot};
pub use self::crew::{Crew, Seat, WorkerHandle};

/// Batches read from one port before the NAT is flushed and the others get their turn: about a millisecond
/// of the largest frames.
const BATCHES_PER_TURN: usize = 4;
/// Pause before [`Event::PortGone`] is tried again while the event thread is behind: it must not get
/// lost, as a query may, and must not be waited for.
const GONE_RETRY: Duration = Duration::from_millis(100);
/// Events taken from epoll at a time.
const EVENTS_PER_TURN: usize = 64;
/// Longest sleep: bounds how late the MAC table ages.
const SLEEP_MAX: Duration = Duration::from_secs(10);

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
    /// How long to look for traffic before sleeping; zero: not at all.
    pub busy_poll: time::Duration,
    /// The origin of the worker's clock.
    pub epoch: time::Instant,
}

/// One data-path thread's state.
pub struct Worker {
    epoll: Arc<OwnedFd>,
    seat: Seat,
    events: Sender<Event>,
    epoch: time::Instant,
    busy_poll: BusyPoll,
    /// What is read here; the place is the epoll token.
    receivers: Vec<Option<Reception>>,
    /// Ports whose devices are gone, which nobody has been told yet.
    gone: Vec<PortId>,
    batch: Batch,
    path: Path,
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
        let (events, epoch) = (config.events.clone(), config.epoch);
        let busy_poll = BusyPoll::new(config.busy_poll.into());
        Ok(Self {
            busy_poll,
            path: Path::new(config, crew, Arc::clone(&epoll))?,
            epoll,
            seat,
            events,
            epoch,
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
        self.seat.thread.begin();
        let mut events = Vec::with_capacity(EVENTS_PER_TURN);
        loop {
            self.wait(&mut events)?;
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
                    self.path.end_batch(&self.events);
                    self.path.flush_nat();
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

    /// Waits for events, or until something needs to be done.
    fn wait(&mut self, events: &mut Vec<epoll::Event>) -> io::Result<()> {
        let sleep = self.sleep();
        let (epoll, epoch) = (&self.epoll, self.epoch);
        let poll = |timeout| {
            events.clear();
            let room = rustix::buffer::spare_capacity(events);
            match epoll::wait(epoll, room, Some(&timespec(timeout))) {
                Ok(found) => Ok(found > 0),
                Err(rustix::io::Errno::INTR) => Ok(false),
                Err(error) => Err(error.into()),
            }
        };
        let looked = self.busy_poll.wait(sleep, || clock(epoch), poll)?;
        if looked > Duration::ZERO {
            self.seat.thread.add_looked(looked);
        }
        Ok(())
    }

    /// How long nothing needs to be done.
    fn sleep(&self) -> Duration {
        let path = &self.path;
        if path.nat.has_backlog() {
            return Duration::ZERO;
        }
        if !self.gone.is_empty() {
            return GONE_RETRY;
        }
        let due = [
            path.nat.poll_timeout(),
            path.gateway.dns.poll_at(),
            path.fragments.poll_timeout(),
            path.gateway.ndp.poll_timeout(),
            path.gateway.dhcp.poll_timeout(),
        ];
        let due = due.into_iter().flatten().min();
        let until = due.map(|due| due.max(path.now) - path.now);
        until.map_or(SLEEP_MAX, |until| until.min(SLEEP_MAX))
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
                    Err(reason) => {
                        counters.count_drop(reason);
                        refused::trace(port, reason, frame);
                    }
                }
            }
            if for_gateway > 0 {
                counters.rx_gateway.fetch_add(for_gateway, Relaxed);
            }
            self.path.end_batch(&self.events);
            match more {
                Ok(More::Yes) => {}
                Ok(More::No) => break,
                Err(error) => {
                    log::debug!("port {port}: its device is gone: {error}");
                    self.remove_port(port);
                    self.gone.push(port);
                    break;
                }
            }
        }
        self.path.flush_nat();
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
                    readers,
                } => {
                    let policy = self.path.nat.policy();
                    policy.add_guest(id, name, group);
                    self.path.add_port(id, tx, counters);
                    self.path.crew.hand_out(readers);
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
                    self.path.nat.forwards_mut().name_port(id, name, mac);
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
                Command::HostIpv6 {
                    has_default,
                    prefixes,
                } => {
                    let ndp = &mut self.path.gateway.ndp;
                    ndp.set_default_route(has_default, self.path.now);
                    ndp.set_prefixes(&prefixes, self.path.now);
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
                Command::GiveWay(request) => self.path.give_way(request),
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
        if let Some(counters) = path.lan.counters(id)
            && path.common.elsewhere(id).is_none()
            && !path.nat.serves(id)
        {
            let counters = Arc::clone(counters);
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

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: duration.secs() as i64,
        tv_nsec: duration.micros() as i64 * 1_000,
    }
}

fn clock(epoch: time::Instant) -> Instant {
    Instant::from_micros(epoch.elapsed().as_micros() as i64)
}

#[cfg(test)]
mod tests;
