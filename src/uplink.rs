//! The host's sockets: the real [`Uplink`].
//!
//! # Path
//! Sockets live in a slab; a [`SockId`] is a slot. Each is registered with the worker's epoll under a
//! [`token`] that says whose it is, so an event needs no look-up: `worker` takes the event,
//! [`owner`] and [`ready`] decode it, the NAT's flow handles it and calls back here to transfer.
//!
//! # Limits
//! The process's limit on open files is the only one here ([`HostError::Exhausted`]); the NAT bounds
//! its flows. [`HostUplink::open_count`] tells how many sockets there are.
//!
//! # Kernel behaviour relied on
//! - A closed fd leaves every epoll set by itself, because no copy of it exists: all are CLOEXEC and
//!   none is ever passed on. A child between fork and exec may keep the registration alive for that
//!   moment; its events carry an old generation and find no flow.
//! - A TCP socket is added to epoll after connect: before, it would report EPOLLHUP. EPOLL_CTL_ADD
//!   looks at the state, so a connect that is over already still gives its edge.
//! - A receive on a TCP socket that brings less than it could has taken all there was (epoll(7), Q9), but
//!   that it stops before the end of the stream, and before urgent data even if that is in line
//!   (net/ipv4/tcp.c, `tcp_recvmsg_locked`). Both are told by the event that comes with them.
//!   On unix sockets it stops behind passed descriptors, too.
//! - An unconnected UDP or ping socket gets ICMP errors only with IP_RECVERR (net/ipv4/udp.c,
//!   `__udp4_lib_err`): they wait in its error queue, raise EPOLLERR while they do, and the newest one
//!   makes the next send or receive fail once (`sk_err`), which then has not taken place.

pub mod addresses;
pub mod listen;
pub mod local_ports;
pub mod networks;
pub mod outbound;
pub mod overlap;
pub mod port_owner;
pub mod route;
pub mod used_up;

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType,
    acceptfrom_with, bind, connect, getpeername, getsockname, ipproto, recv, send, sendto,
    shutdown, socket_with, socketpair, sockopt,
};

use crate::frame::PortId;
use crate::nat::forward::{AllowGuests, ListenerKind};
use crate::nat::{
    Datagram, FlowId, HostError, Io, Ready, SendOptions, Service, SockId, SockOwner, SocketError,
    Uplink,
};
use crate::sys::{error_queue, mmsg, open_files, peer, socket};
use crate::wire::Family;
use addresses::{AddressWatch, Change};
use local_ports::LocalPorts;
use outbound::Outbound;
use route::HostAddresses;
use used_up::{Used, UsedUp};

/// The token of the host's address changes ([`HostUplink::poll_addresses`]).
pub const TOKEN_ADDRESSES: u64 = 20 << 56;

/// Token kinds below this are the worker's own (ports, control, timers).
pub const TOKEN_KIND_FIRST: u8 = 16;
const KIND_TCP: u8 = TOKEN_KIND_FIRST;
const KIND_UDP: u8 = TOKEN_KIND_FIRST + 1;
const KIND_PING: u8 = TOKEN_KIND_FIRST + 2;
const KIND_FORWARD: u8 = TOKEN_KIND_FIRST + 3;
/// Bits of a slot in a token ([`FlowId::slot`] is below 2^24).
const SLOT_BITS: u32 = 24;

/// The epoll data of a socket: kind (8 bits), slot (24), generation (32).
pub fn token(owner: SockOwner) -> u64 {
    let (kind, id) = match owner {
        SockOwner::Tcp(id) => (KIND_TCP, id),
        SockOwner::Udp(id) => (KIND_UDP, id),
        SockOwner::Ping(id) => (KIND_PING, id),
        SockOwner::Forward(id) => (KIND_FORWARD, id),
    };
    debug_assert!(id.slot < 1 << SLOT_BITS);
    u64::from(kind) << 56 | u64::from(id.slot) << 32 | u64::from(id.generation)
}

/// Whose socket an event is for; `None` if the token is not one of [`token`]'s.
pub fn owner(token: u64) -> Option<SockOwner> {
    let id = FlowId {
        slot: (token >> 32) as u32 & ((1 << SLOT_BITS) - 1),
        generation: token as u32,
    };
    match (token >> 56) as u8 {
        KIND_TCP => Some(SockOwner::Tcp(id)),
        KIND_UDP => Some(SockOwner::Udp(id)),
        KIND_PING => Some(SockOwner::Ping(id)),
        KIND_FORWARD => Some(SockOwner::Forward(id)),
        _ => None,
    }
}

/// What an event's flags mean. An error or a hang-up makes the socket readable and writable too: the
/// next call on it returns the reason.
pub fn ready(flags: EventFlags) -> Ready {
    let broken = flags.intersects(EventFlags::ERR | EventFlags::HUP);
    Ready {
        readable: broken || flags.intersects(EventFlags::IN | EventFlags::RDHUP),
        writable: broken || flags.contains(EventFlags::OUT),
        error: flags.contains(EventFlags::ERR),
        last_edge: broken || flags.intersects(EventFlags::RDHUP | EventFlags::PRI),
        hung_up: flags.contains(EventFlags::HUP),
    }
}

/// What is waited for on stream sockets.
const STREAM_EVENTS: EventFlags = EventFlags::IN
    .union(EventFlags::OUT)
    .union(EventFlags::RDHUP)
    .union(EventFlags::PRI)
    .union(EventFlags::ET);
/// Keep-alives toward the outside for a guest that sends some itself: whoever asks that often wants to
/// know within about a minute.
const KEEP_ALIVE_IDLE: std::time::Duration = std::time::Duration::from_secs(30);
const KEEP_ALIVE_INTERVAL: std::time::Duration = std::time::Duration::from_secs(10);
const KEEP_ALIVE_PROBES: u32 = 3;
/// Connections to services that wait to be taken away, which happens after each batch.
const SERVED_MAX: usize = 256;

/// Entries of one socket's error queue that are read at a time: a traceroute keeps 16 probes in flight.
const ERRORS_BATCH: usize = 32;

struct Socket {
    fd: OwnedFd,
    family: Family,
    /// TCP: a short receive has taken all.
    is_tcp: bool,
    /// It takes connections of unix sockets, of guests too where that is allowed.
    takes_unix: Option<AllowGuests>,
    /// Its clients that were refused since its forward last rested for that.
    refusals: usize,
    /// What it was registered with.
    token: u64,
    /// TTL, TOS and fragmentation as set on the socket. Guests rarely change theirs, so the options are
    /// set when they differ instead of travelling with every datagram.
    sends: Sends,
}

/// Refused clients of a unix socket between two rests of its forward, however few come at a time, at some 5 us each.
/// A legitimate client behind a full queue of them (4,096) waits some 3 s.
const REFUSALS_MAX: usize = 128;

/// Options of a datagram socket that every datagram has its own wish for.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
struct Sends {
    /// 0 = the host's default.
    ttl: u8,
    tos: u8,
    /// `None` = as the kernel makes sockets.
    dont_fragment: Option<bool>,
}

impl Socket {
    /// Makes the socket send as `options` say.
    fn prepare(&mut self, options: SendOptions) -> io::Result<()> {
        let (fd, v6) = (self.fd.as_fd(), self.family == Family::V6);
        if self.sends.ttl != options.ttl {
            socket::set_send_ttl(fd, v6, (options.ttl != 0).then_some(options.ttl))?;
            self.sends.ttl = options.ttl;
        }
        if self.sends.tos != options.tos {
            socket::set_send_tos(fd, v6, options.tos)?;
            self.sends.tos = options.tos;
        }
        if self.sends.dont_fragment != Some(options.dont_fragment) {
            socket::set_dont_fragment(fd, v6, options.dont_fragment)?;
            self.sends.dont_fragment = Some(options.dont_fragment);
        }
        Ok(())
    }
}

/// A guest's connection to a service of the control plane: the service's end.
#[derive(Debug)]
pub struct ServiceStream {
    /// Which service.
    pub service: Service,
    /// The guest's port.
    pub port: PortId,
    /// The guest.
    pub guest: SocketAddr,
    /// A connected stream socket, non-blocking.
    pub stream: OwnedFd,
}

/// The host's sockets of one worker.
pub struct HostUplink {
    epoll: Arc<OwnedFd>,
    outbound: Outbound,
    addresses: AddressWatch,
    local_ports: LocalPorts,
    used_up: UsedUp,
    /// File numbers from here on are not the guests' to use.
    file_max: i32,
    sockets: Vec<Option<Socket>>,
    free: Vec<u32>,
    batch: mmsg::RecvBatch,
    own: HostAddresses,
    served: VecDeque<ServiceStream>,
    /// Keeps UDP_GRO in use. The kernel patches its code when the first such socket of the machine
    /// opens and when the last one closes (`udp_encap_needed_key`): measured, 140 microseconds per
    /// mapping on a host where no one else has one.
    _gro: OwnedFd,
    random: [u8; 256],
    random_left: usize,
}

impl HostUplink {
    /// Sockets that report to `epoll`.
    ///
    /// # Errors
    /// The kernel gives no netlink or UDP socket.
    pub fn new(epoll: Arc<OwnedFd>, outbound: Outbound) -> io::Result<Self> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let gro = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?;
        // A kernel before 5.0 has none, and then nothing to patch.
        let _ = socket::set_udp_gro(gro.as_fd());
        let addresses = AddressWatch::open()?;
        let token = EventData::new_u64(TOKEN_ADDRESSES);
        epoll::add(&*epoll, addresses.as_fd(), token, EventFlags::IN)?;
        Ok(Self {
            epoll,
            outbound,
            addresses,
            local_ports: LocalPorts::read(),
            used_up: UsedUp::default(),
            file_max: open_files::flows_max(0),
            sockets: Vec::new(),
            free: Vec::new(),
            batch: mmsg::RecvBatch::new(),
            own: HostAddresses::open()?,
            served: VecDeque::new(),
            _gro: gro,
            random: [0; 256],
            random_left: 0,
        })
    }

    /// Tells `sink` how the host's addresses changed, after an event with [`TOKEN_ADDRESSES`]. `false`:
    /// notices were lost, so any address may have come or gone.
    pub fn poll_addresses(&self, sink: &mut dyn FnMut(Change)) -> bool {
        self.addresses.poll(sink)
    }

    /// Gives a socket the interface and source address that guests' traffic leaves from.
    fn leave_from(&self, fd: &OwnedFd, family: Family) -> Result<(), HostError> {
        self.tie(fd)?;
        let local = self.outbound.local(family, 0);
        if local.ip().is_unspecified() {
            return Ok(());
        }
        // The port is chosen at connect, where it only has to be free toward that destination.
        let _ = socket::set_bind_address_no_port(fd.as_fd());
        bind(fd, &local).map_err(host_error)
    }

    /// Begins a connection, from a port of the kernel's choice or from `local_port`.
    fn connect(
        &self,
        to: SocketAddr,
        hops: Option<u8>,
        local_port: Option<u16>,
    ) -> Result<(OwnedFd, rustix::io::Result<()>), HostError> {
        let family = Family::of(to.ip());
        let fd = open(family, SocketType::STREAM, None)?;
        if fd.as_raw_fd() >= self.file_max {
            return Err(host_error(Errno::MFILE));
        }
        tune(&fd).map_err(host_error)?;
        let loopback = to.ip().is_loopback();
        if let Some(port) = local_port {
            let any = Outbound::default();
            let outbound = if loopback { &any } else { &self.outbound };
            outbound.tie(&fd).map_err(|error| io_host_error(&error))?;
            // Else a service of the host could not listen on the port before the connection is over.
            sockopt::set_socket_reuseaddr(&fd, true).map_err(host_error)?;
            if let Err(errno) = bind(&fd, &outbound.local(family, port)) {
                return Ok((fd, Err(errno)));
            }
        } else if !loopback {
            self.leave_from(&fd, family)?;
        }
        if hops.is_some() {
            set_hops(&fd, family, hops).map_err(|error| io_host_error(&error))?;
        }
        let connected = match connect(&fd, &to) {
            Err(Errno::INPROGRESS) => Ok(()),
            connected => connected,
        };
        Ok((fd, connected))
    }

    /// The kernel has no port left of its range toward `to`, or no source address: the latter is what UDP
    /// finds, too.
    fn check_source(&self, to: SocketAddr) -> Result<(), HostError> {
        let family = Family::of(to.ip());
        let probe = open(family, SocketType::DGRAM, None)?;
        if !to.ip().is_loopback() {
            self.leave_from(&probe, family)?;
        }
        connect(&probe, &to).map_err(host_error)
    }

    /// Begins a connection from a port outside the kernel's range, where some may be free.
    fn connect_outside_range(
        &mut self,
        to: SocketAddr,
        hops: Option<u8>,
    ) -> Result<OwnedFd, HostError> {
        warn_of_ports(to);
        let seed = self.random();
        for port in self.local_ports.outside(seed) {
            match self.connect(to, hops, Some(port))? {
                (fd, Ok(())) => return Ok(fd),
                // Taken: by a listener, or by a connection to the same destination.
                (_, Err(Errno::ADDRINUSE | Errno::ADDRNOTAVAIL | Errno::ACCESS | Errno::PERM)) => {}
                (_, Err(errno)) => return Err(host_error(errno)),
            }
        }
        self.used_up.remember(to, Used::All);
        Err(HostError::NoPort)
    }

    fn tie(&self, fd: &OwnedFd) -> Result<(), HostError> {
        self.outbound.tie(fd).map_err(|error| io_host_error(&error))
    }

    /// The next connection that waits for a service.
    pub fn poll_service(&mut self) -> Option<ServiceStream> {
        self.served.pop_front()
    }

    /// Takes a forward's socket over: listening, or bound to receive datagrams.
    ///
    /// # Errors
    /// It can't be waited for.
    pub fn adopt(
        &mut self,
        fd: OwnedFd,
        kind: ListenerKind,
        owner: SockOwner,
    ) -> Result<SockId, HostError> {
        let family = match kind {
            ListenerKind::Tcp(at) => Family::of(at.ip()),
            ListenerKind::Udp(at) => {
                // Refinements, as for a guest's mapping.
                let _ = socket::set_udp_gro(fd.as_fd());
                if at.ip().is_unspecified() {
                    socket::set_recv_destination(fd.as_fd(), at.is_ipv6())
                        .map_err(|error| io_host_error(&error))?;
                }
                Family::of(at.ip())
            }
            ListenerKind::Unix(_) => Family::V4,
        };
        // It is the user's: no guest can have more of them.
        let id = self.register(fd, family, owner, EventFlags::IN)?;
        if let (ListenerKind::Unix(allow_guests), Some(Some(socket))) =
            (kind, self.sockets.get_mut(id.0 as usize))
        {
            socket.takes_unix = Some(allow_guests);
        }
        Ok(id)
    }

    /// Takes over a stream socket that another worker accepted.
    ///
    /// # Errors
    /// It can't be waited for.
    pub fn adopt_stream(&mut self, fd: OwnedFd, owner: SockOwner) -> Result<SockId, HostError> {
        self.keep(fd, Family::V4, owner, STREAM_EVENTS)
    }

    /// Gives a socket away, still open.
    pub fn release(&mut self, socket: SockId) -> Option<OwnedFd> {
        let Socket { fd, .. } = self.sockets.get_mut(socket.0 as usize)?.take()?;
        self.free.push(socket.0);
        // It would go on to report here: the file stays open.
        let _ = epoll::delete(&*self.epoll, &fd);
        Some(fd)
    }

    /// Leaves `to_come` open files to the ports, besides what is spared anyway. Sockets that are open
    /// already stay.
    pub fn spare_files(&mut self, to_come: usize) {
        self.file_max = open_files::flows_max(to_come);
    }

    /// Sockets open now.
    pub fn open_count(&self) -> usize {
        self.sockets.len() - self.free.len()
    }

    /// As [`HostUplink::keep`], of a connection.
    fn keep_stream(
        &mut self,
        (fd, is_tcp): (OwnedFd, bool),
        family: Family,
        owner: SockOwner,
    ) -> Result<SockId, HostError> {
        let id = self.keep(fd, family, owner, STREAM_EVENTS)?;
        if let Some(Some(socket)) = self.sockets.get_mut(id.0 as usize) {
            socket.is_tcp = is_tcp;
        }
        Ok(id)
    }

    fn socket(&self, id: SockId) -> Option<&Socket> {
        let socket = self.sockets.get(id.0 as usize).and_then(Option::as_ref);
        debug_assert!(socket.is_some(), "{id:?} is not open");
        socket
    }

    /// As [`HostUplink::register`], of a socket that a guest caused: it leaves files to the rest.
    fn keep(
        &mut self,
        fd: OwnedFd,
        family: Family,
        owner: SockOwner,
        flags: EventFlags,
    ) -> Result<SockId, HostError> {
        // The kernel gives the lowest number that is free: this one tells how many are taken.
        if fd.as_raw_fd() >= self.file_max {
            return Err(host_error(Errno::MFILE));
        }
        self.register(fd, family, owner, flags)
    }

    /// Registers a socket with epoll and gives it a slot.
    fn register(
        &mut self,
        fd: OwnedFd,
        family: Family,
        owner: SockOwner,
        flags: EventFlags,
    ) -> Result<SockId, HostError> {
        let data = EventData::new_u64(token(owner));
        epoll::add(&*self.epoll, &fd, data, flags).map_err(host_error)?;
        let socket = Some(Socket {
            fd,
            family,
            is_tcp: false,
            takes_unix: None,
            refusals: 0,
            token: token(owner),
            sends: Sends::default(),
        });
        let slot = match self.free.pop() {
            Some(slot) => {
                self.sockets[slot as usize] = socket;
                slot
            }
            None => {
                self.sockets.push(socket);
                (self.sockets.len() - 1) as u32
            }
        };
        Ok(SockId(slot))
    }
}

/// How far a connection's segments go, and whether ICMP errors about them are reported: with a limit alone.
fn set_hops(fd: &OwnedFd, family: Family, hops: Option<u8>) -> io::Result<()> {
    let v6 = family == Family::V6;
    socket::set_send_ttl(fd.as_fd(), v6, hops)?;
    socket::set_recv_errors(fd.as_fd(), v6, hops.is_some())
}

/// What an errno means to a guest.
pub fn host_error(errno: Errno) -> HostError {
    match errno {
        Errno::CONNREFUSED => HostError::Refused,
        Errno::CONNRESET | Errno::PIPE => HostError::Reset,
        Errno::HOSTUNREACH => HostError::HostUnreachable,
        Errno::NETUNREACH | Errno::ADDRNOTAVAIL | Errno::NODEV => HostError::NetUnreachable,
        Errno::ACCESS | Errno::PERM => HostError::Prohibited,
        Errno::TIMEDOUT => HostError::TimedOut,
        Errno::MSGSIZE => HostError::TooBig,
        Errno::MFILE | Errno::NFILE => {
            warn_of_files();
            HostError::Exhausted
        }
        Errno::NOMEM | Errno::NOBUFS => HostError::Exhausted,
        other => HostError::Other(other.raw_os_error()),
    }
}

/// Says once that files ran out, and what to do.
fn warn_of_files() {
    static SAID: std::sync::Once = std::sync::Once::new();
    SAID.call_once(|| {
        log::warn!(
            "no open file is left for another host socket: idle flows give way, new ones are refused; \
             raise the limit (ulimit -n, LimitNOFILE=) or lower --max-flows"
        );
    });
}

/// Says once that the kernel's ports toward a destination are used up, and what to do.
fn warn_of_ports(to: SocketAddr) {
    static SAID: std::sync::Once = std::sync::Once::new();
    SAID.call_once(|| {
        log::warn!(
            "the host's ports for connections to {to} are used up (net.ipv4.ip_local_port_range): others \
             are tried, and where none is free guests have to wait; a larger range helps"
        );
    });
}

/// The outcome of a call that gave an error.
fn failed(errno: Errno) -> Io {
    match errno {
        // EINTR can't happen to a call that doesn't block, but costs nothing to name.
        Errno::AGAIN | Errno::INTR => Io::Blocked,
        errno => Io::Failed(host_error(errno)),
    }
}

fn failed_io(error: &io::Error) -> Io {
    failed(Errno::from_io_error(error).unwrap_or(Errno::IO))
}

fn io_host_error(error: &io::Error) -> HostError {
    host_error(Errno::from_io_error(error).unwrap_or(Errno::IO))
}

/// The socket is not open: a bug of the caller, which debug builds stop at.
const NOT_OPEN: HostError = HostError::Other(Errno::BADF.raw_os_error());

fn open(
    family: Family,
    kind: SocketType,
    protocol: Option<rustix::net::Protocol>,
) -> Result<OwnedFd, HostError> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let domain = match family {
        Family::V4 => AddressFamily::INET,
        Family::V6 => AddressFamily::INET6,
    };
    socket_with(domain, kind, flags, protocol).map_err(host_error)
}

/// The next client in a listener's queue, past those of a unix socket that are refused.
fn accept_admitted(
    listener: &mut Socket,
) -> Result<Option<(OwnedFd, Option<rustix::net::SocketAddrAny>)>, HostError> {
    while listener.refusals < REFUSALS_MAX {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (fd, peer) = match acceptfrom_with(&listener.fd, flags) {
            Ok(accepted) => accepted,
            // Or the client is gone again, or a firewall was (accept(2)).
            Err(
                Errno::AGAIN
                | Errno::INTR
                | Errno::CONNABORTED
                | Errno::PERM
                | Errno::PROTO
                | Errno::HOSTUNREACH
                | Errno::NETUNREACH
                | Errno::TIMEDOUT,
            ) => return Ok(None),
            Err(errno) => return Err(host_error(errno)),
        };
        let admitted = match listener.takes_unix {
            Some(allow_guests) => peer::check(fd.as_fd(), allow_guests.0),
            None => Ok(()),
        };
        match admitted {
            Ok(()) => return Ok(Some((fd, peer))),
            Err(refusal) => {
                listener.refusals += 1;
                log::warn!("{refusal} at a forward from a unix socket");
            }
        }
    }
    listener.refusals = 0;
    Err(HostError::Prohibited)
}

/// Options of every TCP socket.
fn tune(fd: &OwnedFd) -> rustix::io::Result<()> {
    // The guest's stack has already decided what to send when; Nagle here would add its delay.
    sockopt::set_tcp_nodelay(fd, true)?;
    // Urgent data stays where it was in the stream: nothing is lost and nothing overtakes (RFC 6093 6).
    sockopt::set_socket_oobinline(fd, true)
}

impl Uplink for HostUplink {
    fn tcp_connect(
        &mut self,
        to: SocketAddr,
        hops: Option<u8>,
        owner: SockOwner,
    ) -> Result<SockId, HostError> {
        let fd = match self.used_up.toward(to) {
            Some(Used::All) => return Err(HostError::NoPort),
            Some(Used::Range) => self.connect_outside_range(to, hops)?,
            None => match self.connect(to, hops, None)? {
                (fd, Ok(())) => fd,
                (_, Err(Errno::ADDRNOTAVAIL)) => {
                    self.check_source(to)?;
                    self.used_up.remember(to, Used::Range);
                    self.connect_outside_range(to, hops)?
                }
                (_, Err(errno)) => return Err(host_error(errno)),
            },
        };
        self.keep_stream((fd, true), Family::of(to.ip()), owner)
    }

    fn tcp_free_hops(&mut self, socket: SockId) {
        if let Some(Socket { fd, family, .. }) = self.socket(socket) {
            // What was set can be unset.
            let _ = set_hops(fd, *family, None);
        }
    }

    fn tcp_connected(&mut self, socket: SockId) -> Result<bool, HostError> {
        let fd = &self.socket(socket).ok_or(NOT_OPEN)?.fd;
        sockopt::socket_error(fd)
            .map_err(host_error)?
            .map_err(host_error)?;
        match getpeername(fd) {
            Ok(_) => Ok(true),
            Err(Errno::NOTCONN) => Ok(false),
            Err(errno) => Err(host_error(errno)),
        }
    }

    fn tcp_bound_unsent(&mut self, socket: SockId, bytes: u32) {
        if let Some(Socket {
            fd, is_tcp: true, ..
        }) = self.socket(socket)
        {
            // A refinement: without it the kernel's own bound holds.
            let _ = socket::set_unsent_max(fd.as_fd(), bytes);
        }
    }

    fn tcp_recv(&mut self, socket: SockId, buffer: &mut [u8]) -> Io {
        let Some(socket) = self.socket(socket) else {
            return Io::Failed(NOT_OPEN);
        };
        // A receive of no bytes returns 0 like the end of the stream does.
        if buffer.is_empty() {
            return Io::Done(0);
        }
        let room = buffer.len();
        match recv(&socket.fd, buffer, RecvFlags::DONTWAIT) {
            Ok((0, _)) => Io::Eof,
            Ok((len, _)) if len < room && socket.is_tcp => Io::Drained(len),
            Ok((len, _)) => Io::Done(len),
            Err(errno) => failed(errno),
        }
    }

    fn tcp_send(&mut self, socket: SockId, bytes: &[u8]) -> Io {
        let Some(socket) = self.socket(socket) else {
            return Io::Failed(NOT_OPEN);
        };
        match send(&socket.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(len) => Io::Done(len),
            Err(errno) => failed(errno),
        }
    }

    fn tcp_shutdown(&mut self, socket: SockId) {
        if let Some(socket) = self.socket(socket) {
            // ENOTCONN: the peer reset first, which the next receive reports.
            let _ = shutdown(&socket.fd, Shutdown::Write);
        }
    }

    fn tcp_abort_on_close(&mut self, socket: SockId) {
        if let Some(socket) = self.socket(socket) {
            // Fails for no open TCP socket (socket(7), SO_LINGER).
            let _ = sockopt::set_socket_linger(&socket.fd, Some(std::time::Duration::ZERO));
        }
    }

    fn tcp_watch(&mut self, socket: SockId) {
        if let Some(socket) = self.socket(socket) {
            let fd = &socket.fd;
            // Fails for stream sockets that are not TCP's: those see the other side's end at once.
            let _ = sockopt::set_tcp_keepidle(fd, KEEP_ALIVE_IDLE)
                .and_then(|()| sockopt::set_tcp_keepintvl(fd, KEEP_ALIVE_INTERVAL))
                .and_then(|()| sockopt::set_tcp_keepcnt(fd, KEEP_ALIVE_PROBES))
                .and_then(|()| sockopt::set_socket_keepalive(fd, true));
        }
    }

    fn accept(
        &mut self,
        listener: SockId,
        owner: SockOwner,
    ) -> Result<Option<(SockId, Option<SocketAddr>)>, HostError> {
        let listener = self.sockets.get_mut(listener.0 as usize);
        let listener = listener.and_then(Option::as_mut).ok_or(NOT_OPEN)?;
        // The client waits in the kernel's queue rather than be taken and dropped.
        let next = rustix::io::fcntl_dupfd_cloexec(&listener.fd, 0).map_err(host_error)?;
        if next.as_raw_fd() >= self.file_max {
            return Err(host_error(Errno::MFILE));
        }
        drop(next);
        let family = listener.family;
        let Some((fd, peer)) = accept_admitted(listener)? else {
            return Ok(None);
        };
        let peer = peer.and_then(|peer| SocketAddr::try_from(peer).ok());
        if peer.is_some() {
            // The client may have reset it already, which the first receive tells.
            let _ = tune(&fd);
        }
        let socket = self.keep_stream((fd, peer.is_some()), family, owner)?;
        Ok(Some((socket, peer)))
    }

    fn hand_over(&mut self, socket: SockId, owner: SockOwner) {
        if let Some(socket) = self.socket(socket) {
            let data = EventData::new_u64(token(owner));
            // The socket is in the set, and changing it needs no memory. What is ready already gives
            // its edge again.
            let _ = epoll::modify(&*self.epoll, &socket.fd, data, STREAM_EVENTS);
        }
    }

    fn unix_connect(&mut self, path: &Path, owner: SockOwner) -> Result<SockId, HostError> {
        let address = SocketAddrUnix::new(path).map_err(host_error)?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(host_error)?;
        match connect(&fd, &address) {
            Ok(()) => {}
            // No such file, or a listener whose queue is full: nobody takes the connection.
            Err(Errno::NOENT | Errno::AGAIN | Errno::NOTSOCK) => return Err(HostError::Refused),
            Err(errno) => return Err(host_error(errno)),
        }
        self.keep_stream((fd, false), Family::V4, owner)
    }

    fn service_connect(
        &mut self,
        service: Service,
        (port, guest): (PortId, SocketAddr),
        owner: SockOwner,
    ) -> Result<SockId, HostError> {
        if self.served.len() >= SERVED_MAX {
            return Err(HostError::Refused);
        }
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(host_error)?;
        let socket = self.keep_stream((ours, false), Family::V4, owner)?;
        self.served.push_back(ServiceStream {
            service,
            port,
            guest,
            stream: theirs,
        });
        Ok(socket)
    }

    fn udp_open(
        &mut self,
        family: Family,
        port: u16,
        owner: SockOwner,
    ) -> Result<(SockId, u16), HostError> {
        let fd = open(family, SocketType::DGRAM, None)?;
        if family == Family::V6 {
            // Else it would take the port from IPv4's mappings too.
            socket::set_v6_only(fd.as_fd()).map_err(|error| io_host_error(&error))?;
        }
        self.tie(&fd)?;
        let preserved = self.local_ports.may_keep(port)
            && match bind(&fd, &self.outbound.local(family, port)) {
                Ok(()) => true,
                Err(Errno::ADDRINUSE | Errno::ACCESS | Errno::PERM) => false,
                Err(errno) => return Err(host_error(errno)),
            };
        let port = if preserved {
            port
        } else {
            // A random free one (net.ipv4.ip_local_port_range).
            bind(&fd, &self.outbound.local(family, 0)).map_err(|errno| match errno {
                Errno::ADDRINUSE => HostError::NoPort,
                errno => host_error(errno),
            })?;
            let local = getsockname(&fd).map_err(host_error)?;
            SocketAddr::try_from(local).map_or(0, |local| local.port())
        };
        // Both are refinements: without GRO datagrams come one by one, without the details 64 is
        // assumed for the TTL and no ICMP error heard.
        let _ = socket::set_udp_gro(fd.as_fd());
        let _ = socket::set_recv_details(fd.as_fd(), family == Family::V6);
        Ok((self.keep(fd, family, owner, EventFlags::IN)?, port))
    }

    fn ping_open(&mut self, family: Family, owner: SockOwner) -> Result<SockId, HostError> {
        let protocol = match family {
            Family::V4 => ipproto::ICMP,
            Family::V6 => ipproto::ICMPV6,
        };
        let fd = open(family, SocketType::DGRAM, Some(protocol))?;
        self.leave_from(&fd, family)?;
        let _ = socket::set_recv_details(fd.as_fd(), family == Family::V6);
        self.keep(fd, family, owner, EventFlags::IN)
    }

    fn send_to(&mut self, id: SockId, to: SocketAddr, payload: &[u8], options: SendOptions) -> Io {
        let Some(Some(socket)) = self.sockets.get_mut(id.0 as usize) else {
            debug_assert!(false, "{id:?} is not open");
            return Io::Failed(NOT_OPEN);
        };
        if let Err(error) = socket.prepare(options) {
            return failed_io(&error);
        }
        if let Some(segment) = options.segment.filter(|&segment| segment > 0) {
            return send_train(&socket.fd, (None, to), payload, segment);
        }
        match sendto(
            &socket.fd,
            payload,
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            &to,
        ) {
            Ok(len) => Io::Done(len),
            Err(errno) => failed(errno),
        }
    }

    fn send_from(
        &mut self,
        id: SockId,
        from: IpAddr,
        to: SocketAddr,
        payload: &[u8],
        options: SendOptions,
    ) -> Io {
        let Some(Some(socket)) = self.sockets.get_mut(id.0 as usize) else {
            debug_assert!(false, "{id:?} is not open");
            return Io::Failed(NOT_OPEN);
        };
        if let Err(error) = socket.prepare(options) {
            return failed_io(&error);
        }
        if let Some(segment) = options.segment.filter(|&segment| segment > 0) {
            return send_train(&socket.fd, (Some(from), to), payload, segment);
        }
        match mmsg::send(socket.fd.as_fd(), (Some(from), to), payload, None) {
            Ok(len) => Io::Done(len),
            Err(error) => failed_io(&error),
        }
    }

    fn listen_for(&mut self, id: SockId, wanted: bool) {
        if let Some(socket) = self.socket(id) {
            let events = match wanted {
                true => EventFlags::IN,
                false => EventFlags::empty(),
            };
            // The socket is in the set, and changing it needs no memory.
            let data = EventData::new_u64(socket.token);
            let _ = epoll::modify(&*self.epoll, &socket.fd, data, events);
        }
    }

    fn recv_from(&mut self, socket: SockId, sink: &mut dyn FnMut(Datagram<'_>)) -> bool {
        let Some(Some(socket)) = self.sockets.get(socket.0 as usize) else {
            debug_assert!(false, "{socket:?} is not open");
            return false;
        };
        // Each ICMP message has its own header.
        let join = !matches!(owner(socket.token), Some(SockOwner::Ping(_)));
        let received = self.batch.recv(socket.fd.as_fd(), join, |received| {
            sink(Datagram {
                source: received.source,
                payload: received.payload,
                segment: received.segment,
                ttl: received.ttl,
                tos: received.tos,
                destination: received.destination,
            });
        });
        // An error was pending and is cleared by having been returned; data behind it raises the
        // level-triggered event again.
        received.is_ok_and(|count| count == mmsg::RECV_BATCH)
    }

    fn recv_errors(&mut self, socket: SockId, sink: &mut dyn FnMut(SocketError<'_>)) {
        let Some(socket) = self.socket(socket) else {
            return;
        };
        for _ in 0..ERRORS_BATCH {
            let taken = error_queue::recv(socket.fd.as_fd(), &mut |reported| {
                sink(SocketError {
                    to: reported.to,
                    offender: reported.offender,
                    of_type: reported.of_type,
                    code: reported.code,
                    mtu: reported.info,
                    error: host_error(Errno::from_raw_os_error(reported.errno)),
                    payload: reported.payload,
                });
            });
            if taken.is_err() {
                return;
            }
        }
    }

    fn close(&mut self, socket: SockId) {
        let open = self.sockets.get_mut(socket.0 as usize);
        if open.and_then(Option::take).is_some() {
            self.free.push(socket.0);
        } else {
            debug_assert!(false, "{socket:?} is not open");
        }
    }

    fn local_address(&mut self, socket: SockId) -> Option<IpAddr> {
        let local = getsockname(&self.socket(socket)?.fd).ok()?;
        SocketAddr::try_from(local).ok().map(|local| local.ip())
    }

    fn is_host_address(&mut self, address: IpAddr) -> bool {
        self.own.is_local(address)
    }

    fn random(&mut self) -> u64 {
        if self.random_left < 8 {
            // getrandom fails only before the kernel's generator is seeded, and up to 256 bytes are
            // never cut short (getrandom(2)).
            self.random_left =
                rustix::rand::getrandom(&mut self.random, rustix::rand::GetRandomFlags::empty())
                    .expect("the kernel gives random bytes");
        }
        self.random_left -= 8;
        let word = &mut self.random[self.random_left..][..8];
        let value = u64::from_ne_bytes(word.try_into().expect("eight bytes"));
        word.fill(0);
        value
    }
}

/// Sends a train with UDP_SEGMENT, a call per 64 datagrams; where the route can't, with sendmmsg.
fn send_train(
    fd: &OwnedFd,
    (from, to): (Option<IpAddr>, SocketAddr),
    payload: &[u8],
    segment: u16,
) -> Io {
    let per_call = (mmsg::SEND_TRAIN_MAX / usize::from(segment)).min(mmsg::SEND_SEGMENTS_MAX);
    let train_len = per_call.max(1) * usize::from(segment);
    let mut sent = 0;
    while sent < payload.len() {
        let rest = &payload[sent..];
        let train = &rest[..rest.len().min(train_len)];
        let result = match mmsg::send(fd.as_fd(), (from, to), train, Some(segment)) {
            // The segment exceeds the route's MTU (EINVAL up to Linux 6.x, then EMSGSIZE), or its
            // device computes no checksums (EIO): net/ipv4/udp.c, udp_send_skb.
            Err(error)
                if matches!(
                    Errno::from_io_error(&error),
                    Some(Errno::INVAL | Errno::MSGSIZE | Errno::IO)
                ) =>
            {
                mmsg::send_each(fd.as_fd(), (from, to), train, segment)
            }
            result => result,
        };
        match result {
            Ok(len) => sent += len,
            Err(_) if sent > 0 => break,
            Err(error) => return failed_io(&error),
        }
    }
    Io::Done(sent)
}

#[cfg(test)]
mod tests;
