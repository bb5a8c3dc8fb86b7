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
//! - An unconnected UDP or ping socket without IP_RECVERR gets no ICMP errors (net/ipv4/udp.c,
//!   `__udp4_lib_err`); a send fails only for what the host knows itself.

mod route;

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, bind, connect,
    getpeername, ipproto, recv, send, sendto, shutdown, socket_with, sockopt,
};

use crate::nat::{Datagram, FlowId, HostError, Io, Ready, SendOptions, SockId, SockOwner, Uplink};
use crate::sys::{mmsg, socket};
use route::RouteTable;

/// Token kinds below this are the worker's own (ports, control, timers).
pub const TOKEN_KIND_FIRST: u8 = 16;
const KIND_TCP: u8 = TOKEN_KIND_FIRST;
const KIND_UDP: u8 = TOKEN_KIND_FIRST + 1;
const KIND_PING: u8 = TOKEN_KIND_FIRST + 2;
/// Bits of a slot in a token ([`FlowId::slot`] is below 2^24).
const SLOT_BITS: u32 = 24;

/// Ports below this are the host's services' (and root's): a guest's mapping never takes one.
const PRESERVED_PORT_MIN: u16 = 1024;

/// The epoll data of a socket: kind (8 bits), slot (24), generation (32).
pub fn token(owner: SockOwner) -> u64 {
    let (kind, id) = match owner {
        SockOwner::Tcp(id) => (KIND_TCP, id),
        SockOwner::Udp(id) => (KIND_UDP, id),
        SockOwner::Ping(id) => (KIND_PING, id),
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
    }
}

struct Socket {
    fd: OwnedFd,
    /// IP_TTL as set on the socket; 0 = the host's default. Guests rarely change their TTL, so the
    /// option is set when it differs instead of travelling with every datagram.
    ttl: u8,
}

/// The host's sockets of one worker.
pub struct HostUplink {
    epoll: Arc<OwnedFd>,
    sockets: Vec<Option<Socket>>,
    free: Vec<u32>,
    batch: mmsg::RecvBatch,
    routes: RouteTable,
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
    pub fn new(epoll: Arc<OwnedFd>) -> io::Result<Self> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let gro = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?;
        // A kernel before 5.0 has none, and then nothing to patch.
        let _ = socket::set_udp_gro(gro.as_fd());
        Ok(Self {
            epoll,
            sockets: Vec::new(),
            free: Vec::new(),
            batch: mmsg::RecvBatch::new(),
            routes: RouteTable::open()?,
            _gro: gro,
            random: [0; 256],
            random_left: 0,
        })
    }

    /// Sockets open now.
    pub fn open_count(&self) -> usize {
        self.sockets.len() - self.free.len()
    }

    fn socket(&self, id: SockId) -> Option<&Socket> {
        let socket = self.sockets.get(id.0 as usize).and_then(Option::as_ref);
        debug_assert!(socket.is_some(), "{id:?} is not open");
        socket
    }

    /// Registers a socket with epoll and gives it a slot.
    fn keep(
        &mut self,
        fd: OwnedFd,
        owner: SockOwner,
        flags: EventFlags,
    ) -> Result<SockId, HostError> {
        let data = EventData::new_u64(token(owner));
        epoll::add(&*self.epoll, &fd, data, flags).map_err(host_error)?;
        let socket = Some(Socket { fd, ttl: 0 });
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

/// What an errno means to a guest.
pub fn host_error(errno: Errno) -> HostError {
    match errno {
        Errno::CONNREFUSED => HostError::Refused,
        Errno::CONNRESET | Errno::PIPE => HostError::Reset,
        Errno::HOSTUNREACH => HostError::HostUnreachable,
        Errno::NETUNREACH | Errno::ADDRNOTAVAIL => HostError::NetUnreachable,
        Errno::ACCESS | Errno::PERM => HostError::Prohibited,
        Errno::TIMEDOUT => HostError::TimedOut,
        Errno::MSGSIZE => HostError::TooBig,
        Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS => HostError::Exhausted,
        other => HostError::Other(other.raw_os_error()),
    }
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

/// The socket is not open: a bug of the caller, which debug builds stop at.
const NOT_OPEN: HostError = HostError::Other(Errno::BADF.raw_os_error());

fn open(kind: SocketType, protocol: Option<rustix::net::Protocol>) -> Result<OwnedFd, HostError> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    socket_with(AddressFamily::INET, kind, flags, protocol).map_err(host_error)
}

impl Uplink for HostUplink {
    fn tcp_connect(&mut self, to: SocketAddrV4, owner: SockOwner) -> Result<SockId, HostError> {
        let fd = open(SocketType::STREAM, None)?;
        // The guest's stack has already decided what to send when; Nagle here would add its delay.
        sockopt::set_tcp_nodelay(&fd, true).map_err(host_error)?;
        match connect(&fd, &to) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(errno) => return Err(host_error(errno)),
        }
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        self.keep(fd, owner, flags)
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

    fn tcp_recv(&mut self, socket: SockId, buffer: &mut [u8]) -> Io {
        let Some(socket) = self.socket(socket) else {
            return Io::Failed(NOT_OPEN);
        };
        // A receive of no bytes returns 0 like the end of the stream does.
        if buffer.is_empty() {
            return Io::Done(0);
        }
        match recv(&socket.fd, buffer, RecvFlags::DONTWAIT) {
            Ok((0, _)) => Io::Eof,
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

    fn udp_open(&mut self, port: u16, owner: SockOwner) -> Result<SockId, HostError> {
        let fd = open(SocketType::DGRAM, None)?;
        if port >= PRESERVED_PORT_MIN {
            match bind(&fd, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port)) {
                // Taken: the first send binds a random free port (ip_local_port_range).
                Ok(()) | Err(Errno::ADDRINUSE | Errno::ACCESS | Errno::PERM) => {}
                Err(errno) => return Err(host_error(errno)),
            }
        }
        // Both are refinements: without GRO datagrams come one by one, without the TTL 64 is assumed.
        let _ = socket::set_udp_gro(fd.as_fd());
        let _ = socket::set_recv_ttl(fd.as_fd());
        self.keep(fd, owner, EventFlags::IN)
    }

    fn ping_open(&mut self, owner: SockOwner) -> Result<SockId, HostError> {
        let fd = open(SocketType::DGRAM, Some(ipproto::ICMP))?;
        let _ = socket::set_recv_ttl(fd.as_fd());
        self.keep(fd, owner, EventFlags::IN)
    }

    fn send_to(
        &mut self,
        id: SockId,
        to: SocketAddrV4,
        payload: &[u8],
        options: SendOptions,
    ) -> Io {
        let Some(Some(socket)) = self.sockets.get_mut(id.0 as usize) else {
            debug_assert!(false, "{id:?} is not open");
            return Io::Failed(NOT_OPEN);
        };
        if socket.ttl != options.ttl {
            let ttl = (options.ttl != 0).then_some(options.ttl);
            if let Err(error) = socket::set_send_ttl(socket.fd.as_fd(), ttl) {
                return failed_io(&error);
            }
            socket.ttl = options.ttl;
        }
        if let Some(segment) = options.segment.filter(|&segment| segment > 0) {
            return send_train(&socket.fd, to, payload, segment);
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

    fn recv_from(&mut self, socket: SockId, sink: &mut dyn FnMut(Datagram<'_>)) -> bool {
        let Some(Some(socket)) = self.sockets.get(socket.0 as usize) else {
            debug_assert!(false, "{socket:?} is not open");
            return false;
        };
        let received = self.batch.recv(socket.fd.as_fd(), |received| {
            sink(Datagram {
                source: received.source,
                payload: received.payload,
                segment: received.segment,
                ttl: received.ttl,
            });
        });
        // An error was pending and is cleared by having been returned; data behind it raises the
        // level-triggered event again.
        received.is_ok_and(|count| count == mmsg::RECV_BATCH)
    }

    fn close(&mut self, socket: SockId) {
        let open = self.sockets.get_mut(socket.0 as usize);
        if open.and_then(Option::take).is_some() {
            self.free.push(socket.0);
        } else {
            debug_assert!(false, "{socket:?} is not open");
        }
    }

    fn is_host_address(&mut self, address: Ipv4Addr) -> bool {
        self.routes.is_local(address)
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
fn send_train(fd: &OwnedFd, to: SocketAddrV4, payload: &[u8], segment: u16) -> Io {
    let per_call = (mmsg::SEND_TRAIN_MAX / usize::from(segment)).min(mmsg::SEND_SEGMENTS_MAX);
    let train_len = per_call.max(1) * usize::from(segment);
    let mut sent = 0;
    while sent < payload.len() {
        let rest = &payload[sent..];
        let train = &rest[..rest.len().min(train_len)];
        let result = match mmsg::send_train(fd.as_fd(), to, train, segment) {
            // The segment exceeds the route's MTU (EINVAL up to Linux 6.x, then EMSGSIZE), or its
            // device computes no checksums (EIO): net/ipv4/udp.c, udp_send_skb.
            Err(error)
                if matches!(
                    Errno::from_io_error(&error),
                    Some(Errno::INVAL | Errno::MSGSIZE | Errno::IO)
                ) =>
            {
                mmsg::send_each(fd.as_fd(), to, train, segment)
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
