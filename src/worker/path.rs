//! What a frame meets behind the receive half, and the ways in besides: the switch, the gateway's services,
//! the NAT, its host sockets and timers.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crossbeam_channel::Sender;
use tokio::sync::oneshot;

use super::command::{Command, Event, Snapshot};
use super::crew::{Crew, Seat};
use super::lan::{GatewayOut, Lan};
use super::{WorkerConfig, clock, refused};
use crate::frame::{FRAME_BUFFER_LEN, Frame, Instant, PortId, WorkerId};
use crate::gateway::dns::DnsAnswer;
use crate::gateway::fragment::Reassembler;
use crate::gateway::{Gateway, ndp};
use crate::nat::common::Common;
use crate::nat::forward::{ForwardId, ForwardSpec, ListenerKind, Moved};
use crate::nat::policy::Policy;
use crate::nat::tcp::GiveWay;
use crate::nat::{HostError, Nat, SockOwner};
use crate::port::PortTx;
use crate::stats::{DropReason, PortCounters};
use crate::uplink::HostUplink;
use crate::uplink::addresses::Change;
use crate::wire::Packet;

/// Everything a frame meets behind the receive half.
pub(super) struct Path {
    pub(super) lan: Lan,
    buffer: Box<[u8]>,
    pub(super) gateway: Gateway,
    pub(super) nat: Nat,
    pub(super) fragments: Reassembler,
    pub(super) uplink: HostUplink,
    pub(super) crew: Crew,
    pub(super) common: Common,
    /// Workers that frames were posted to, to be woken after the batch.
    posted: Vec<WorkerId>,
    pub(super) now: Instant,
}

impl Path {
    /// Without ports; its sockets report to `epoll`.
    ///
    /// # Errors
    /// The kernel gives no netlink or UDP socket.
    pub(super) fn new(config: WorkerConfig, crew: &Crew, epoll: Arc<OwnedFd>) -> io::Result<Self> {
        let now = clock(config.epoch);
        let common = config.common;
        let mut nat = Nat::with(config.nat, common.clone(), now);
        nat.forwards_mut().set_leases(Arc::clone(&config.leases));
        Ok(Self {
            lan: Lan::new(config.switch, config.gateway_counters),
            buffer: vec![0; FRAME_BUFFER_LEN].into_boxed_slice(),
            gateway: Gateway::new(config.dhcp, config.leases),
            nat,
            fragments: Reassembler::new(),
            uplink: HostUplink::new(epoll, config.outbound)?,
            crew: crew.clone(),
            common,
            posted: Vec::new(),
            now,
        })
    }

    pub(super) fn add_port(
        &mut self,
        id: PortId,
        tx: Arc<dyn PortTx>,
        counters: Arc<PortCounters>,
    ) {
        self.lan.add_port(id, tx, counters);
        self.uplink.spare_files(self.lan.files_to_come());
        if self.common.is_first() {
            self.gateway.ndp.port_added(self.now);
        }
    }

    pub(super) fn remove_port(&mut self, id: PortId) {
        if !self.lan.remove_port(id) {
            return;
        }
        self.nat.forget_port(id, &mut self.uplink);
        self.fragments.forget_port(id);
        self.gateway.dhcp.forget_port(id);
        self.uplink.spare_files(self.lan.files_to_come());
        if self.lan.is_empty() {
            self.gateway.ndp.ports_gone();
        }
    }

    /// Switches one frame of a port; whether it was for the gateway.
    pub(super) fn handle_frame(
        &mut self,
        ingress: PortId,
        frame: Frame<'_>,
    ) -> Result<bool, DropReason> {
        let for_gateway = self.lan.forward(ingress, frame)?;
        if for_gateway {
            self.receive_for_gateway(ingress, frame)?;
        }
        Ok(for_gateway)
    }

    /// Takes a frame for the gateway, or posts it where its port is at home.
    fn receive_for_gateway(&mut self, ingress: PortId, frame: Frame<'_>) -> Result<(), DropReason> {
        if let Some(home) = self.common.elsewhere(ingress) {
            let counters = self.lan.counters(ingress).ok_or(DropReason::NoPort)?;
            let counters = Arc::clone(counters);
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
    pub(super) fn take_posted(&mut self, seat: &Seat) {
        seat.take_posted(&mut |ingress, counters, frame| {
            // Of a port that is gone there must be no flow.
            let received = match self.lan.is_port(ingress, counters) {
                true => self.receive_for_gateway(ingress, frame),
                false => Err(DropReason::NoPort),
            };
            if let Err(reason) = received {
                counters.count_drop(reason);
                refused::trace(ingress, reason, frame);
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

    pub(super) fn handle_socket(&mut self, owner: SockOwner, ready: crate::nat::Ready) {
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
    pub(super) fn readdress(&mut self) {
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

    /// Moves the bytes of the NAT's flows and answers their guests.
    pub(super) fn flush_nat(&mut self) {
        let mut out = GatewayOut {
            lan: &mut self.lan,
            buffer: &mut self.buffer,
        };
        self.nat.flush(self.now, &mut self.uplink, &mut out);
        self.lan.flush();
    }

    /// Ends a port's batch, but for the NAT's flows.
    pub(super) fn end_batch(&mut self, events: &Sender<Event>) {
        let mut out = GatewayOut {
            lan: &mut self.lan,
            buffer: &mut self.buffer,
        };
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

    /// What the NATs of several workers tell each other: where guests are, forwards that move, who is to give
    /// way.
    fn settle_workers(&mut self) {
        let forwards = self.nat.forwards_mut();
        if forwards.take_announcement() {
            for other in self.crew.others(self.common.worker) {
                other.wake();
            }
        }
        while let Some(request) = self.nat.poll_give_way() {
            for other in self.crew.others(self.common.worker) {
                other.send(Command::GiveWay(request));
            }
        }
        while let Some((to, moved)) = self.nat.forwards_mut().poll_leaving() {
            let uplink = &mut self.uplink;
            let moved = moved.exchange(|socket| uplink.release(socket));
            self.crew.member(to).send(Command::TakeForward(moved));
        }
    }

    /// Makes room for flows of another worker.
    pub(super) fn give_way(&mut self, request: GiveWay) {
        let mut out = GatewayOut {
            lan: &mut self.lan,
            buffer: &mut self.buffer,
        };
        self.nat
            .handle_give_way(request, self.now, (&mut self.uplink, &mut out));
    }

    /// Takes over a forward whose guest is this worker's.
    pub(super) fn take_forward(&mut self, moved: Moved<OwnedFd>) {
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
    pub(super) fn end_turn(&mut self) {
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
        if self
            .gateway
            .dhcp
            .poll_timeout()
            .is_some_and(|due| due <= self.now)
        {
            self.gateway.dhcp.handle_timeout(self.now, &mut out);
        }
        self.settle_workers();
        self.lan.flush();
    }

    /// Says what guests have to know before the network ends.
    pub(super) fn stop(&mut self) {
        let mut out = GatewayOut {
            lan: &mut self.lan,
            buffer: &mut self.buffer,
        };
        self.gateway.ndp.stop(&mut out);
        self.lan.flush();
    }

    pub(super) fn add_forward(
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

    pub(super) fn set_policy(&mut self, policy: Option<Arc<Policy>>) {
        let mut out = GatewayOut {
            lan: &mut self.lan,
            buffer: &mut self.buffer,
        };
        self.nat
            .set_policy(policy, self.now, (&mut self.uplink, &mut out));
    }

    pub(super) fn answer_dns(&mut self, answer: &DnsAnswer) {
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

    pub(super) fn snapshot(&mut self) -> Snapshot {
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
            tcp_memory: (self.common.memory.used(), self.common.memory.max()),
            host_sockets: self.uplink.open_count(),
            forwards: self.nat.forwards().collect(),
            policy,
        }
    }
}
