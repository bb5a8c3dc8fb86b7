//! NAT onto host sockets.

use std::net::{Ipv4Addr, SocketAddrV4};

pub use crate::frame::{Duration, Instant};

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
    /// Anything else; the errno.
    Other(i32),
}

/// Outcome of one transfer on a host socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Io {
    /// This many bytes.
    Done(usize),
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
    pub source: SocketAddrV4,
    /// One datagram, or several of `segment` bytes each (the last may be shorter).
    pub payload: &'a [u8],
    /// Set if the kernel coalesced (UDP_GRO).
    pub segment: Option<u16>,
}

/// How a datagram leaves.
#[derive(Clone, Copy, Debug, Default)]
pub struct SendOptions {
    /// IP TTL; 0 = the socket's default.
    pub ttl: u8,
    /// Payload is a train of datagrams of this size (UDP_SEGMENT).
    pub segment: Option<u16>,
}

/// The host's sockets, as the NAT sees them. `uplink::HostUplink` is the real one; tests script
/// their own. No call blocks.
pub trait Uplink {
    /// Opens a TCP socket and starts to connect. `Ready::writable` or `Ready::error` tells the end;
    /// then [`Uplink::tcp_connected`] gives the result.
    ///
    /// # Errors
    /// The connection failed at once; there is no socket.
    fn tcp_connect(&mut self, to: SocketAddrV4, owner: SockOwner) -> Result<SockId, HostError>;

    /// The result of a connect (SO_ERROR). `Err(HostError::Other(0))` never occurs; a connect still
    /// under way gives `Ok(false)`.
    ///
    /// # Errors
    /// Why the connection failed.
    fn tcp_connected(&mut self, socket: SockId) -> Result<bool, HostError>;

    /// Receives into `buffer`.
    fn tcp_recv(&mut self, socket: SockId, buffer: &mut [u8]) -> Io;

    /// Sends from `bytes`.
    fn tcp_send(&mut self, socket: SockId, bytes: &[u8]) -> Io;

    /// Sends FIN (SHUT_WR).
    fn tcp_shutdown(&mut self, socket: SockId);

    /// Makes [`Uplink::close`] send RST instead of FIN (SO_LINGER 0).
    fn tcp_abort_on_close(&mut self, socket: SockId);

    /// Opens a UDP socket, on `port` if that is free, else on any.
    ///
    /// # Errors
    /// No socket.
    fn udp_open(&mut self, port: u16, owner: SockOwner) -> Result<SockId, HostError>;

    /// Opens an ICMP datagram ("ping") socket. The kernel puts its own identifier into requests and
    /// gives back replies to it alone.
    ///
    /// # Errors
    /// [`HostError::Prohibited`] where net.ipv4.ping_group_range excludes us.
    fn ping_open(&mut self, owner: SockOwner) -> Result<SockId, HostError>;

    /// Sends a datagram: a UDP payload, or a whole ICMP echo message on a ping socket.
    fn send_to(&mut self, socket: SockId, to: SocketAddrV4, payload: &[u8], options: SendOptions) -> Io;

    /// Receives all that waits, at most one batch, and hands each datagram to `sink`. Returns whether
    /// more may be waiting.
    fn recv_from(&mut self, socket: SockId, sink: &mut dyn FnMut(Datagram<'_>)) -> bool;

    /// Closes the socket.
    fn close(&mut self, socket: SockId);

    /// Whether the host itself answers on this address (any of its interfaces).
    fn is_host_address(&mut self, address: Ipv4Addr) -> bool;

    /// 64 random bits from the system's generator.
    fn random(&mut self) -> u64;
}
