//! NAT onto host sockets: a guest's flows are carried on by unprivileged sockets of the host.
//!
//! # A packet's path
//! The gateway hands over every packet that none of its services claims. [`Nat::handle_packet`]
//! checks where it comes from. What answers a client of a [`forward`] goes back there; of all else it
//! checks whether guests may go there, then gives it to [`tcp`], [`udp`] or [`icmp`]. Host sockets answer
//! through [`Nat::handle_ready`]; what the guests get leaves through the [`Outbox`]. At the end of a port's
//! turn, and of the worker's, [`Nat::flush`] moves TCP's bytes.
//!
//! # What guests may not reach
//! Loopback, "this network", link-local (cloud metadata lives there), multicast, reserved addresses
//! and the LAN itself are refused whatever the routing table says; so are the host's own addresses
//! unless the network is configured with host access. Refusals are answered with ICMP and counted
//! under [`DropReason::ForbiddenDestination`]. What is left, the egress [`policy`] decides.
//!
//! # Seams
//! [`Uplink`] is all that the NAT knows of the host, so it runs in tests against a scripted one. Both
//! address families take the same path; what differs is in [`crate::wire`].

pub mod common;
pub mod egress;
pub mod flow_table;
pub mod forward;
pub mod icmp;
pub mod mapping;
pub mod path_mtu;
pub mod policy;
pub mod shares;
pub mod tcp;
#[doc(hidden)]
pub mod testing;
pub mod udp;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use crate::frame::PortId;
use crate::gateway::fragment::Expired;
use crate::gateway::{LanConfig, Outbox};
use crate::stats::DropReason;
use crate::wire;
use crate::wire::ipv6::IPV6_HEADER_LEN;
use crate::wire::{Family, Ip, Packet, Transport};

pub use crate::frame::{Duration, Instant};
use common::Common;
use egress::{Egress, HostAccess, Protocol};
use forward::{ForwardCounters, ForwardId, ForwardSpec, ListenerKind, Moved};
use path_mtu::{Quoted, TooBig};
use policy::{Policy, PolicyState};
use shares::Holder;
use tcp::Target;

/// A host socket of the NAT, as the [`Uplink`] numbers it. Never reused while its owner holds it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct SockId(pub u32);

/// Who owns a host socket: it comes back with every readiness event of that socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SockOwner {
    /// A TCP flow, by its slot and generation in the flow table.
    Tcp(FlowId),
    /// A UDP mapping.
    Udp(FlowId),
    /// An ICMP echo mapping.
    Ping(FlowId),
    /// A forward's listening socket, or a connection that it took and that is on its way to a guest.
    Forward(FlowId),
}

/// Slot and generation of an entry in a flow table: a stale id finds nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct FlowId {
    /// Slot, below 2^24.
    pub slot: u32,
    /// Grows by one each time the slot is reused.
    pub generation: u32,
}

/// What epoll said of a host socket. TCP sockets are edge-triggered, the others level-triggered on
/// readability.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ready {
    /// Data, EOF or an error can be read.
    pub readable: bool,
    /// Connected, or room to send.
    pub writable: bool,
    /// An error is pending (POLLERR): read it with a call on the socket.
    pub error: bool,
    /// Of a stream: its end, an error or urgent data lies behind what can be read (POLLRDHUP, POLLHUP,
    /// POLLERR, POLLPRI). No other edge may come before that is read, too.
    pub last_edge: bool,
    /// Of a stream: not connected, or finished both ways (POLLHUP).
    pub hung_up: bool,
}

/// A host error that means something to a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostError {
    /// ECONNREFUSED: answered with RST, or ICMP port unreachable.
    Refused,
    /// ECONNRESET, EPIPE: answered with RST.
    Reset,
    /// EHOSTUNREACH.
    HostUnreachable,
    /// ENETUNREACH, EADDRNOTAVAIL.
    NetUnreachable,
    /// EACCES, EPERM: a host firewall, or no right to this kind of socket.
    Prohibited,
    /// ETIMEDOUT.
    TimedOut,
    /// EMSGSIZE.
    TooBig,
    /// EMFILE, ENFILE, ENOMEM, ENOBUFS.
    Exhausted,
    /// No port of the host is free, toward that destination or at all.
    NoPort,
    /// Anything else; the errno.
    Other(i32),
}

/// Outcome of one transfer on a host socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Io {
    /// This many bytes.
    Done(usize),
    /// This many bytes, which were all (TCP receive only): what comes behind them is a new edge of
    /// readiness, unless [`Ready::last_edge`] was told of.
    Drained(usize),
    /// The peer sent FIN (TCP receive only).
    Eof,
    /// EAGAIN: wait for readiness.
    Blocked,
    /// The socket is broken.
    Failed(HostError),
}

/// A datagram as it came from outside.
#[derive(Clone, Copy, Debug)]
pub struct Datagram<'a> {
    /// Sender.
    pub source: SocketAddr,
    /// One datagram, or several of `segment` bytes each (the last may be shorter).
    pub payload: &'a [u8],
    /// Set if the kernel coalesced (UDP_GRO).
    pub segment: Option<u16>,
    /// IP TTL or hop limit it arrived with; 0 = the kernel did not say.
    pub ttl: u8,
    /// DSCP and ECN it arrived with.
    pub tos: u8,
    /// The host's address that it was sent to, where the socket was opened to tell: a forward's on all
    /// addresses.
    pub destination: Option<IpAddr>,
}

/// An entry of a datagram socket's error queue (IP_RECVERR, ip(7)): what became of a datagram sent.
#[derive(Clone, Copy, Debug)]
pub struct SocketError<'a> {
    /// Where the datagram went; of a ping socket with port 0.
    pub to: SocketAddr,
    /// The router or host whose ICMP message this was; `None`: the host itself saw the error.
    pub offender: Option<IpAddr>,
    /// ICMP or ICMPv6 type of that message; 0 where there is no offender.
    pub of_type: u8,
    /// Its code.
    pub code: u8,
    /// The MTU that would fit, where it is about one; else 0.
    pub mtu: u32,
    /// The errno's meaning.
    pub error: HostError,
    /// What was quoted of the datagram's payload; of a ping socket of the ICMP message.
    pub payload: &'a [u8],
}

/// How a datagram leaves.
#[derive(Clone, Copy, Debug, Default)]
pub struct SendOptions {
    /// IP TTL or hop limit; 0 = the socket's default.
    pub ttl: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// No router may fragment it, nor may the host: a datagram that is too big for a hop comes back
    /// as an error. Without, the host fragments what its own link can't take, IPv6 included.
    pub dont_fragment: bool,
    /// Payload is a train of datagrams of this size (UDP_SEGMENT).
    pub segment: Option<u16>,
}

/// A service of lanlet's control plane that guests reach by TCP.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Service {
    /// DNS over TCP (RFC 7766) on the gateway's addresses.
    Dns,
}

/// The host's sockets, as the NAT sees them. `uplink::HostUplink` is the real one; tests script
/// their own. No call blocks.
pub trait Uplink {
    /// Opens a TCP socket and starts to connect. `Ready::writable` or `Ready::error` tells the end;
    /// then [`Uplink::tcp_connected`] gives the result. With `hops` its SYN goes so far only (IP TTL or
    /// hop limit), and [`Uplink::recv_errors`] has who says that it went no further.
    ///
    /// # Errors
    /// The connection failed at once; there is no socket.
    fn tcp_connect(
        &mut self,
        to: SocketAddr,
        hops: Option<u8>,
        owner: SockOwner,
    ) -> Result<SockId, HostError>;

    /// Lets a connected socket's segments go as far as any, and has no errors reported any more.
    fn tcp_free_hops(&mut self, socket: SockId);

    /// The result of a connect (SO_ERROR). `Err(HostError::Other(0))` never occurs; a connect still
    /// under way gives `Ok(false)`.
    ///
    /// # Errors
    /// Why the connection failed.
    fn tcp_connected(&mut self, socket: SockId) -> Result<bool, HostError>;

    /// From here on the socket takes no more than `bytes` that it can't send yet.
    fn tcp_bound_unsent(&mut self, socket: SockId, bytes: u32);

    /// Receives into `buffer`.
    fn tcp_recv(&mut self, socket: SockId, buffer: &mut [u8]) -> Io;

    /// Sends from `bytes`.
    fn tcp_send(&mut self, socket: SockId, bytes: &[u8]) -> Io;

    /// Sends FIN (SHUT_WR).
    fn tcp_shutdown(&mut self, socket: SockId);

    /// Makes [`Uplink::close`] send RST instead of FIN (SO_LINGER 0).
    fn tcp_abort_on_close(&mut self, socket: SockId);

    /// Notices within a minute from here on if the other side is gone (TCP keep-alive).
    fn tcp_watch(&mut self, socket: SockId);

    /// Takes a connection that waits on a listening stream socket, with the peer's address if it has
    /// one. `Ok(None)`: none waits.
    ///
    /// # Errors
    /// [`HostError::Exhausted`]: there is one, but no file is left for it; [`HostError::Prohibited`]: many
    /// that may not connect were refused.
    fn accept(
        &mut self,
        listener: SockId,
        owner: SockOwner,
    ) -> Result<Option<(SockId, Option<SocketAddr>)>, HostError>;

    /// Gives a stream socket to another owner, who hears of its readiness as of a fresh one's.
    fn hand_over(&mut self, socket: SockId, owner: SockOwner);

    /// Connects to a stream socket of the host's file system. Then as [`Uplink::tcp_connect`].
    ///
    /// # Errors
    /// Nobody listens there ([`HostError::Refused`]), or it may not be connected to.
    fn unix_connect(&mut self, path: &Path, owner: SockOwner) -> Result<SockId, HostError>;

    /// Connects a guest to a service of lanlet's own. Then as [`Uplink::tcp_connect`].
    ///
    /// # Errors
    /// No socket, or too many wait for the service.
    fn service_connect(
        &mut self,
        service: Service,
        guest: (PortId, SocketAddr),
        owner: SockOwner,
    ) -> Result<SockId, HostError>;

    /// Opens a UDP socket, on `port` if that is free and none of the host's services', else on any. Gives the
    /// port it is bound to.
    ///
    /// # Errors
    /// No socket.
    fn udp_open(
        &mut self,
        family: Family,
        port: u16,
        owner: SockOwner,
    ) -> Result<(SockId, u16), HostError>;

    /// Opens an ICMP datagram ("ping") socket. The kernel puts its own identifier into requests and
    /// gives back replies to it alone.
    ///
    /// # Errors
    /// [`HostError::Prohibited`] where net.ipv4.ping_group_range excludes us.
    fn ping_open(&mut self, family: Family, owner: SockOwner) -> Result<SockId, HostError>;

    /// Sends a datagram: a UDP payload, or a whole ICMP echo message on a ping socket.
    fn send_to(
        &mut self,
        socket: SockId,
        to: SocketAddr,
        payload: &[u8],
        options: SendOptions,
    ) -> Io;

    /// As [`Uplink::send_to`], from one of the host's addresses: a client that wrote to one of several
    /// expects the answer from there.
    fn send_from(
        &mut self,
        socket: SockId,
        from: IpAddr,
        to: SocketAddr,
        payload: &[u8],
        options: SendOptions,
    ) -> Io;

    /// Whether a listening or datagram socket's readiness is reported. It is level-triggered: who can't
    /// take what waits would hear of nothing else.
    fn listen_for(&mut self, socket: SockId, wanted: bool);

    /// Receives all that waits, at most one batch, and hands each datagram to `sink`. Returns whether
    /// more may be waiting.
    fn recv_from(&mut self, socket: SockId, sink: &mut dyn FnMut(Datagram<'_>)) -> bool;

    /// Takes the entries of a datagram or connecting socket's error queue, at most one batch, after
    /// [`Ready::error`]. An entry is also what a send that failed with [`HostError::TooBig`] left.
    fn recv_errors(&mut self, socket: SockId, sink: &mut dyn FnMut(SocketError<'_>));

    /// Closes the socket.
    fn close(&mut self, socket: SockId);

    /// The host's own address of a connection, if it has one.
    fn local_address(&mut self, socket: SockId) -> Option<IpAddr>;

    /// Whether the host itself answers on this address (any of its interfaces).
    fn is_host_address(&mut self, address: IpAddr) -> bool;

    /// 64 random bits from the system's generator.
    fn random(&mut self) -> u64;
}

/// What a [`Nat`] is made with.
#[derive(Clone, Debug)]
pub struct NatConfig {
    /// The LAN.
    pub lan: LanConfig,
    /// TCP flows at most. UDP and ICMP mappings have limits of their own.
    pub flows_max: usize,
    /// What of the host guests reach.
    pub host: HostAccess,
    /// Mapping and filtering of UDP.
    pub udp: udp::UdpBehaviour,
}

/// The port of DNS, which the control plane serves over TCP.
const DNS_PORT: u16 = 53;

/// NAT of one worker: the flows of the guests behind its ports.
pub struct Nat {
    lan: LanConfig,
    egress: Egress,
    tcp: tcp::TcpNat,
    udp: udp::UdpNat,
    icmp: icmp::PingNat,
    errors: icmp::ErrorSender,
    forwards: forward::ActiveForwards,
}

impl Nat {
    /// The only NAT of a network, without flows yet.
    pub fn new(config: NatConfig, now: Instant) -> Self {
        let common = Common::new(&config.lan, Arc::default());
        Self::with(config, common, now)
    }

    /// One of several, without flows yet.
    pub fn with(config: NatConfig, common: Common, now: Instant) -> Self {
        let NatConfig {
            lan,
            flows_max,
            host,
            udp: behaviour,
        } = config;
        let mut udp = udp::UdpNat::new(lan.clone(), udp::LIMITS);
        udp.set_behaviour(behaviour);
        Self {
            tcp: tcp::TcpNat::sharing(
                lan.clone(),
                flows_max,
                (Arc::clone(&common.flows), Arc::clone(&common.memory)),
                now,
            ),
            udp,
            icmp: icmp::PingNat::new(lan.clone(), icmp::LIMITS),
            egress: Egress::new(lan.clone(), host),
            errors: icmp::ErrorSender::new(),
            forwards: forward::ActiveForwards::new(lan.clone(), common),
            lan,
        }
    }

    /// The forwards, to be told of leases and ports.
    pub fn forwards_mut(&mut self) -> &mut forward::ActiveForwards {
        &mut self.forwards
    }

    /// What each forward has done.
    pub fn forwards(&self) -> impl Iterator<Item = (ForwardId, ForwardCounters)> + '_ {
        self.forwards.forwards()
    }

    /// As [`forward::ActiveForwards::add`].
    ///
    /// # Errors
    /// As there.
    pub fn add_forward<U: Uplink + ?Sized>(
        &mut self,
        forward: (ForwardId, &ForwardSpec),
        listeners: &[ListenerKind],
        up: &mut U,
        open: impl FnMut(&mut U, usize, SockOwner) -> Result<Option<SockId>, HostError>,
    ) -> Result<(), HostError> {
        self.forwards
            .add(forward, listeners, &mut self.egress, up, open)
    }

    /// As [`forward::ActiveForwards::arrive`].
    pub fn take_forward<S, U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        moved: Moved<S>,
        now: Instant,
        (up, out): (&mut U, &mut O),
        open: impl FnMut(&mut U, S, Option<ListenerKind>, SockOwner) -> Result<SockId, HostError>,
    ) {
        self.forwards
            .arrive(moved, &mut self.tcp, now, (up, out), open);
    }

    /// As [`forward::ActiveForwards::remove`].
    pub fn remove_forward<U: Uplink + ?Sized>(&mut self, id: ForwardId, up: &mut U) {
        let gone: Vec<_> = self.egress.published(id.0).cloned().collect();
        self.forwards.remove(id, &mut self.egress, up);
        // Guests that were admitted because the forward listened are asked again.
        if !gone.is_empty() {
            self.udp.review(up, |up, _, _, peer| {
                let listened = gone.iter().any(|at| at.covers(Protocol::Udp, peer));
                !(listened && up.is_host_address(peer.ip()))
            });
        }
    }

    /// Looks at every packet that reaches the gateway, before its services do.
    #[inline]
    pub fn observe(&mut self, packet: &Packet<'_>, now: Instant) {
        self.forwards.observe(packet, now);
    }

    /// What belongs to a forward; `None`: nothing does.
    fn handle_forwarded<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        packet: &Packet<'_>,
        ip: &Ip<'_>,
        now: Instant,
        (up, out): (&mut U, &mut O),
    ) -> Option<Result<(), DropReason>> {
        match &ip.transport {
            Transport::Tcp(tcp) => {
                let for_gateway = self.lan.is_gateway(ip.destination);
                if !for_gateway && !self.forwards.has_unix_targets() {
                    return None;
                }
                let known = self.tcp.has_flow(
                    SocketAddr::new(ip.source, tcp.source_port),
                    SocketAddr::new(ip.destination, tcp.destination_port),
                );
                let target = match self.forwards.unix_target(ip, tcp, known) {
                    Some(path) => Target::Unix(path),
                    // A client that the guest sees as the gateway: the flow is there.
                    None if known && for_gateway => Target::Outside(&mut self.egress),
                    None => return None,
                };
                let to = (up, out);
                Some(self.tcp.handle_packet(packet, (ip, tcp), target, now, to))
            }
            Transport::Udp(udp) => {
                let session = self.forwards.session(ip, udp)?;
                let datagram = (ip, udp);
                Some(self.forwards.answer(session, packet, datagram, now, up))
            }
            _ => None,
        }
    }

    /// Takes a guest's packet that no service claimed.
    ///
    /// # Errors
    /// The reason to count it as dropped for.
    pub fn handle_packet<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        packet: &Packet<'_>,
        now: Instant,
        (up, out): (&mut U, &mut O),
    ) -> Result<(), DropReason> {
        let Some(ip) = packet.ip() else {
            return Err(DropReason::Unclaimed);
        };
        let mut room = Vec::new();
        let ip = &for_engine(ip, &mut room);
        if packet.destination.is_group() {
            return Err(DropReason::Unclaimed);
        }
        if !self.lan.is_guest_any(ip.source) {
            return Err(DropReason::ForeignSource);
        }
        if let Transport::Icmp(message) = ip.transport
            && let Some(report) = TooBig::parse(Family::of(ip.source), message)
        {
            return self.heed(packet.ingress, &report, now, (up, out));
        }
        // An answer to a forward's client is for the gateway where that is whom the guest sees.
        let last_hop = ip.ttl <= 1 && !self.lan.is_gateway(ip.destination);
        if !last_hop
            && let Some(mut handled) = self.handle_forwarded(packet, ip, now, (&mut *up, &mut *out))
        {
            if handled == Err(DropReason::OutOfFiles)
                && self.make_file(packet.ingress, now, (&mut *up, &mut *out))
                && let Some(again) = self.handle_forwarded(packet, ip, now, (up, out))
            {
                handled = again;
            }
            return handled;
        }
        if self.lan.is_gateway(ip.destination)
            && (is_dns(ip) || !self.egress.is_mapped(ip.destination))
        {
            let handled = self.handle_for_gateway(packet, ip, now, (&mut *up, &mut *out));
            let lacks_file = handled == Err(DropReason::OutOfFiles);
            if lacks_file && self.make_file(packet.ingress, now, (&mut *up, &mut *out)) {
                return self.handle_for_gateway(packet, ip, now, (up, out));
            }
            return handled;
        }
        if let Transport::Fragment = ip.transport {
            return Err(DropReason::Fragment);
        }
        // Link-local packets are forwarded nowhere (RFC 4291 2.5.6).
        if is_link_local(ip.source) {
            return Err(DropReason::ForeignSource);
        }
        if ip.ttl <= 1 {
            self.errors
                .send(&self.lan, icmp::ErrorKind::TimeExceeded, packet, now, out);
            return Err(DropReason::TtlExceeded);
        }
        let mut handled = self.carry(packet, ip, now, (&mut *up, &mut *out));
        if handled == Err(DropReason::OutOfFiles)
            && self.make_file(packet.ingress, now, (&mut *up, &mut *out))
        {
            handled = self.carry(packet, ip, now, (&mut *up, &mut *out));
        }
        let datagram = !matches!(ip.transport, Transport::Tcp(_));
        let kind = match handled {
            Err(DropReason::ForbiddenDestination) => icmp::ErrorKind::Prohibited,
            // RFC 5508 REQ-8. TCP has answered by itself, or lets the guest try again.
            Err(DropReason::Limit | DropReason::OutOfFiles | DropReason::OutOfPorts)
                if datagram =>
            {
                icmp::ErrorKind::Prohibited
            }
            // RFC 8200 4.7: what has no next header is nothing to complain about.
            Err(DropReason::Protocol)
                if !matches!(ip.transport, Transport::Other(wire::ipv6::NO_NEXT_HEADER)) =>
            {
                icmp::ErrorKind::ProtocolUnreachable
            }
            handled => return handled,
        };
        self.errors.send(&self.lan, kind, packet, now, out);
        handled
    }

    /// A router behind a guest port says that a packet of ours was too big for its next link.
    fn heed<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        port: PortId,
        report: &TooBig,
        now: Instant,
        (up, out): (&mut U, &mut O),
    ) -> Result<(), DropReason> {
        match report.quoted {
            Quoted::Tcp(sequence) => self.tcp.heed(port, (report, sequence), now, (up, out)),
            Quoted::Udp => {
                let in_session = self.forwards.heed(port, report, now);
                in_session.unwrap_or_else(|| self.udp.heed(port, report, &self.egress, now))
            }
            Quoted::Echo => self.icmp.heed(port, report, &self.egress, now),
        }
    }

    /// Carries a packet to the outside.
    fn carry<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        packet: &Packet<'_>,
        ip: &Ip<'_>,
        now: Instant,
        (up, out): (&mut U, &mut O),
    ) -> Result<(), DropReason> {
        let egress = &mut self.egress;
        match &ip.transport {
            Transport::Tcp(tcp) => {
                let target = Target::Outside(egress);
                self.tcp
                    .handle_packet(packet, (ip, tcp), target, now, (up, out))
            }
            Transport::Udp(udp) => {
                let answers = (out, &mut self.errors);
                self.udp
                    .handle_packet(packet, (ip, udp), egress, now, up, answers)
            }
            Transport::Icmp(message) => {
                let answers = (out, &mut self.errors);
                self.icmp
                    .handle_packet(packet, (ip, message), egress, now, up, answers)
            }
            Transport::Fragment => Err(DropReason::Fragment),
            Transport::Other(_) => Err(DropReason::Protocol),
        }
    }

    /// No file is left for a flow of `port`: whoever has most of them loses one, if that is more than the
    /// port has with the new one, else something of its own that is idle goes. Returns whether there is a
    /// file.
    fn make_file<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        port: PortId,
        now: Instant,
        (up, out): (&mut U, &mut O),
    ) -> bool {
        let files = |holder: Holder| {
            let mappings = holder
                .port()
                .map_or((0, 0), |port| (self.udp.count(port), self.icmp.count(port)));
            (self.tcp.held().of(holder), mappings.0, mappings.1)
        };
        let sum = |holder| {
            let (tcp, udp, icmp) = files(holder);
            tcp + udp + icmp
        };
        let mappings = [self.udp.largest(), self.icmp.largest()];
        let mappings = mappings.into_iter().flatten();
        let candidates = mappings.map(|(port, _)| Holder::from(port));
        let candidates = candidates.chain([self.tcp.held().most().0]);
        let largest = candidates.max_by_key(|&holder| sum(holder));
        let own = sum(port.into());
        let Some(largest) = largest.filter(|&largest| sum(largest) > own + 1) else {
            return self.icmp.give_up(port, false, now, up)
                || self.udp.give_up(port, false, now, up)
                || self.tcp.give_up_idle(port.into(), now, (up, out));
        };
        let (tcp, udp, icmp) = files(largest);
        match largest.port() {
            Some(port) if icmp > tcp.max(udp) => self.icmp.give_up(port, true, now, up),
            Some(port) if udp > tcp => self.udp.give_up(port, true, now, up),
            _ => self.tcp.give_up_file(largest, now, (up, out)),
        }
    }

    /// For the gateway's own address: DNS over TCP, else a closed port.
    fn handle_for_gateway<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        packet: &Packet<'_>,
        ip: &Ip<'_>,
        now: Instant,
        (up, out): (&mut U, &mut O),
    ) -> Result<(), DropReason> {
        match &ip.transport {
            Transport::Tcp(tcp) if tcp.destination_port == DNS_PORT => {
                let target = Target::Service(Service::Dns);
                self.tcp
                    .handle_packet(packet, (ip, tcp), target, now, (up, out))
            }
            Transport::Tcp(tcp) => {
                self.tcp.refuse(packet, ip, tcp, now, out);
                Err(DropReason::Unclaimed)
            }
            Transport::Udp(_) => {
                self.errors.send(
                    &self.lan,
                    icmp::ErrorKind::PortUnreachable,
                    packet,
                    now,
                    out,
                );
                Err(DropReason::Unclaimed)
            }
            Transport::Fragment => Err(DropReason::Fragment),
            Transport::Icmp(_) | Transport::Other(_) => Err(DropReason::Unclaimed),
        }
    }

    /// Tells a guest that a packet of its was given up because not all of its fragments came.
    pub fn reassembly_expired<O: Outbox + ?Sized>(
        &mut self,
        expired: &Expired<'_>,
        now: Instant,
        out: &mut O,
    ) {
        if !icmp::error::may_be_about(expired.packet, &self.lan) {
            return;
        }
        let kind = icmp::ErrorKind::ReassemblyTimeExceeded;
        let about = (expired.source, expired.packet);
        self.errors.send_about(&self.lan, kind, about, now, out);
    }

    /// Takes a readiness event of a host socket. Datagrams from outside that no guest asked for are
    /// counted through `drops`.
    pub fn handle_ready<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        owner: SockOwner,
        ready: Ready,
        now: Instant,
        (up, out): (&mut U, &mut O),
        drops: &mut dyn FnMut(DropReason),
    ) {
        match owner {
            SockOwner::Tcp(id) => self.tcp.handle_ready(id, ready, now, (up, out)),
            SockOwner::Udp(id) => {
                let io = (up, out, &mut self.errors);
                self.udp
                    .handle_ready(id, ready, &self.egress, now, io, drops)
            }
            SockOwner::Forward(id) => {
                self.forwards
                    .handle_ready(id, ready, &mut self.tcp, now, (up, out), drops);
            }
            SockOwner::Ping(id) => {
                let io = (up, out, &mut self.errors);
                self.icmp
                    .handle_ready(id, ready, &self.egress, now, io, drops)
            }
        }
    }

    /// Ends a turn: moves TCP's bytes and sends its ACKs.
    pub fn flush<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        now: Instant,
        up: &mut U,
        out: &mut O,
    ) {
        self.forwards
            .flush(&mut self.tcp, now, (&mut *up, &mut *out));
        self.tcp.flush(now, up, out);
    }

    /// What the other workers' NATs are to be asked, by [`Nat::handle_give_way`].
    pub fn poll_give_way(&mut self) -> Option<tcp::GiveWay> {
        self.tcp.poll_give_way()
    }

    /// Another worker's NAT needs room.
    pub fn handle_give_way<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        request: tcp::GiveWay,
        now: Instant,
        io: (&mut U, &mut O),
    ) {
        self.tcp.handle_give_way(request, now, io);
    }

    /// Whether [`Nat::flush`] wants to be called again without waiting.
    pub fn has_backlog(&self) -> bool {
        self.tcp.has_backlog()
    }

    /// When [`Nat::handle_timeout`] next has something to do.
    pub fn poll_timeout(&self) -> Option<Instant> {
        [
            self.tcp.poll_timeout(),
            self.udp.poll_timeout(),
            self.icmp.poll_timeout(),
            self.forwards.poll_timeout(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Runs the timers that are due.
    pub fn handle_timeout<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        now: Instant,
        up: &mut U,
        out: &mut O,
    ) {
        self.tcp.handle_timeout(now, up, out);
        self.forwards
            .handle_timeout(&mut self.tcp, now, (&mut *up, &mut *out));
        self.udp.handle_timeout(now, up);
        self.icmp.handle_timeout(now, up);
    }

    /// The host has lost an address (`None`: maybe any): connections from it end, with RST on both
    /// sides. UDP and echo mappings go on by the route that is left.
    pub fn address_gone<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        address: Option<IpAddr>,
        now: Instant,
        (up, out): (&mut U, &mut O),
    ) {
        self.tcp.address_gone(address, now, up, out);
    }

    /// The host has got an address (`None`: maybe any): guests that wrote to it as to one of the outside
    /// are asked again. Connections need no review: the kernel resets what came from elsewhere.
    pub fn address_gained<U: Uplink + ?Sized>(&mut self, address: Option<IpAddr>, up: &mut U) {
        let mut known = HashMap::new();
        let mut is_host = |up: &mut U, peer: IpAddr| match address {
            Some(address) => peer == address,
            None => *known
                .entry(peer)
                .or_insert_with(|| up.is_host_address(peer)),
        };
        let egress = &self.egress;
        self.udp.review_host(up, |up, peer| {
            !is_host(up, peer.ip()) || egress.opens_own(Protocol::Udp, peer)
        });
        self.icmp.review(up, |up, _, _, peer| {
            !is_host(up, peer.ip()) || egress.opens_own(Protocol::Echo, peer)
        });
    }

    /// Puts another policy in force, or none, and ends what it no longer allows: connections with RST
    /// on both sides, UDP and echo mappings without a word. A flow of an allowed name goes on after its
    /// TTL.
    pub fn set_policy<U: Uplink + ?Sized, O: Outbox + ?Sized>(
        &mut self,
        policy: Option<Arc<Policy>>,
        now: Instant,
        (up, out): (&mut U, &mut O),
    ) {
        self.egress.policy().set_policy(policy);
        let egress = &self.egress;
        self.tcp.review(now, (&mut *up, out), |up, port, to| {
            egress.allows((port, Protocol::Tcp), to, up)
        });
        let review = |protocol| {
            move |up: &mut U, port, _: SocketAddr, peer| {
                egress.allows((port, protocol), egress.shown(peer), up)
            }
        };
        self.udp.review(up, review(Protocol::Udp));
        self.icmp.review(up, review(Protocol::Echo));
    }

    /// The policy, with the names of the guests behind each port.
    pub fn policy(&mut self) -> &mut PolicyState {
        self.egress.policy()
    }

    /// Ends all flows of the guests behind a port that is gone.
    pub fn forget_port<U: Uplink + ?Sized>(&mut self, port: PortId, up: &mut U) {
        self.egress.policy().forget_guest(port);
        self.tcp.forget_port(port, up);
        self.udp.forget_port(port, up);
        self.icmp.forget_port(port, up);
        self.forwards.forget_port(port);
    }

    /// Whether guests behind `port` have flows here.
    pub fn serves(&self, port: PortId) -> bool {
        self.tcp.serves(port)
            || self.udp.serves(port)
            || self.icmp.serves(port)
            || self.forwards.serves(port)
    }

    /// Counters by the names that `lanlet status` shows.
    pub fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        let (errors, held_back) = self.errors.counters();
        let errors = [
            ("icmp_errors", errors),
            ("icmp_errors_held_back", held_back),
        ];
        let tcp = self.tcp.counters().iter();
        tcp.chain(self.udp.counters().iter())
            .chain(self.icmp.counters().iter())
            .chain(self.forwards.counters())
            .chain(errors)
    }

    /// Flows now: TCP, UDP, ICMP.
    pub fn flows(&self) -> (usize, usize, usize) {
        let udp = self.udp.len() + self.forwards.session_count();
        (self.tcp.len(), udp, self.icmp.len())
    }
}

/// TCP's engine reads plain headers: extension headers, which hardly any sender puts before TCP, are
/// left out in a copy.
fn for_engine<'a>(ip: Ip<'a>, room: &'a mut Vec<u8>) -> Ip<'a> {
    let is_tcp = matches!(ip.transport, Transport::Tcp(_));
    if !is_tcp || ip.source.is_ipv4() || ip.header_len == IPV6_HEADER_LEN {
        return ip;
    }
    *room = without_extensions(ip.packet, ip.header_len);
    Ip {
        packet: room,
        header_len: IPV6_HEADER_LEN,
        ..ip
    }
}

fn is_dns(ip: &Ip<'_>) -> bool {
    matches!(&ip.transport, Transport::Tcp(tcp) if tcp.destination_port == DNS_PORT)
}

fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if wire::ipv6::is_link_local(address))
}

/// The packet with its IPv6 header followed by the transport at `transport_at`.
fn without_extensions(packet: &[u8], transport_at: usize) -> Vec<u8> {
    let (header, transport) = (&packet[..IPV6_HEADER_LEN], &packet[transport_at..]);
    let mut plain = [header, transport].concat();
    plain[4..6].copy_from_slice(&(transport.len() as u16).to_be_bytes());
    plain[6] = wire::PROTO_TCP;
    plain
}

#[cfg(test)]
mod tests;
