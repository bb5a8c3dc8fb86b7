//! A scripted host for the NAT: [`FakeUplink`] stands in for the real sockets and plays the outside
//! world, [`FrameLog`] takes what goes to the guest, and the `guest_*` functions write what the guest
//! sends. Everything is deterministic and nothing reads a clock: a test keeps `now` in a variable.
//!
//! Public for the integration tests and benches of this crate; not part of the library's interface.
//!
//! A call on a socket that was never opened or is closed already is a bug of the caller and panics,
//! as a stale file descriptor would be worse on a real host.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use super::egress::{Egress, HostAccess};
use super::{
    Datagram, HostError, Io, Ready, SendOptions, Service, SockId, SockOwner, SocketError, Uplink,
};
use crate::frame::{ETH_HEADER_LEN, FRAME_BUFFER_LEN, Frame, Mac, PortId};
use crate::gateway::{Lan6, LanConfig, Outbox};
use crate::offload::{Csum, Gso, Offload};
use crate::wire::ipv6::{IPV6_HEADER_LEN, Ipv6Fields};
use crate::wire::{self, Family, Ipv4Fields, Packet};

/// MAC of the gateway in [`lan`].
pub const GATEWAY_MAC: Mac = Mac([0x52, 0x54, 0, 0, 0, 1]);
/// MAC of the guest that the `guest_*` functions send from.
pub const GUEST_MAC: Mac = Mac([0x52, 0x54, 0, 0, 0, 2]);
/// Address of that guest.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 122, 2);
/// Its IPv6 address.
pub const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x6c61, 0x6e, 1, 0x5054, 0xff, 0xfe00, 2);

/// 192.168.122.1/24 and fd00:6c61:6e:1::1/64 with an MTU of 1500.
pub fn lan() -> LanConfig {
    LanConfig {
        mac: GATEWAY_MAC,
        address: Ipv4Addr::new(192, 168, 122, 1),
        prefix: 24,
        mtu: 1500,
        v6: Some(Lan6 {
            link_local: wire::ipv6::link_local(GATEWAY_MAC),
            address: Ipv6Addr::new(0xfd00, 0x6c61, 0x6e, 1, 0, 0, 0, 1),
            prefix: 64,
        }),
    }
}

/// The rule about destinations for [`lan`]: only the outside is open.
pub fn egress() -> Egress {
    Egress::new(lan(), HostAccess::default())
}

/// How the outside answers a connect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Connect {
    /// Connected when the call returns; the event is queued.
    Succeed,
    /// Nothing happens until [`FakeUplink::finish_connect`].
    Wait,
    /// The event comes at once, the result is this error.
    Fail(HostError),
    /// The call itself fails and leaves no socket.
    FailAtOnce(HostError),
}

/// A datagram the NAT sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sent {
    /// By which socket.
    pub socket: SockId,
    /// To whom.
    pub to: SocketAddr,
    /// Payload; of a ping socket the ICMP message.
    pub payload: Vec<u8>,
    /// IP TTL, 0 = default.
    pub ttl: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// No hop may fragment it.
    pub dont_fragment: bool,
    /// Train size.
    pub segment: Option<u16>,
    /// The host's address that was asked for.
    pub from: Option<IpAddr>,
}

/// A datagram on its way to the NAT.
#[derive(Clone, Debug)]
struct Inbound {
    destination: Option<IpAddr>,
    source: SocketAddr,
    payload: Vec<u8>,
    segment: Option<u16>,
    ttl: u8,
    tos: u8,
}

/// An entry of a socket's error queue.
#[derive(Clone, Debug)]
pub struct Reported {
    /// Where the datagram went.
    pub to: SocketAddr,
    /// Who sent the ICMP message.
    pub offender: Option<IpAddr>,
    /// Its type and code.
    pub kind: (u8, u8),
    /// MTU, where it is about one.
    pub mtu: u32,
    /// What it means.
    pub error: HostError,
    /// Quoted payload.
    pub payload: Vec<u8>,
}

/// TCP side of a fake socket: what the outside peer sees and does.
#[derive(Debug)]
struct FakeTcp {
    peer: Option<SocketAddr>,
    connected: Option<Result<(), HostError>>,
    /// Sent by the peer, not yet received by the NAT.
    inbound: VecDeque<u8>,
    peer_fin: bool,
    broken: Option<HostError>,
    /// Sent by the NAT, not yet taken by the test.
    outbound: Vec<u8>,
    /// Bytes that still fit into the send buffer.
    send_room: usize,
    /// The last send met a full buffer: the next room is an edge.
    send_blocked: bool,
    fin_sent: bool,
    abort_on_close: bool,
    watched: bool,
    local: Option<IpAddr>,
    /// How many hops its segments go, where that is limited.
    hops: Option<u8>,
    /// What it may have unsent, where that is limited, bytes.
    unsent_max: Option<u32>,
}

#[derive(Debug)]
enum Kind {
    Tcp(Box<FakeTcp>),
    Listener {
        waiting: VecDeque<Option<SocketAddr>>,
    },
    Udp {
        family: Family,
        port: u16,
    },
    Ping {
        family: Family,
        /// What the kernel puts into requests in place of the sender's identifier.
        identifier: u16,
    },
}

#[derive(Debug)]
struct FakeSocket {
    owner: SockOwner,
    kind: Kind,
    /// Its readiness is not reported.
    deaf: bool,
    datagrams: VecDeque<Inbound>,
    reported: VecDeque<Reported>,
    send_errors: VecDeque<HostError>,
}

/// How a socket ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Closed {
    /// Which.
    pub socket: SockId,
    /// Whose.
    pub owner: SockOwner,
    /// [`Uplink::tcp_abort_on_close`] was called: the peer saw RST.
    pub aborted: bool,
}

/// The scripted host.
#[derive(Debug)]
pub struct FakeUplink {
    sockets: Vec<Option<FakeSocket>>,
    events: VecDeque<SockId>,
    random_state: u64,
    next_port: u16,
    connects: BTreeMap<SocketAddr, Connect>,
    /// What [`Uplink::tcp_connect`] does for an address without a script of its own.
    pub connect_default: Connect,
    /// The next opening call (of any kind) fails with this.
    pub open_error: Option<HostError>,
    /// Every ping socket is refused with this while set.
    pub ping_error: Option<HostError>,
    /// Sockets open at once at most; above that [`HostError::Exhausted`].
    pub open_max: usize,
    /// UDP ports taken by other programs of the host.
    pub busy_ports: BTreeSet<u16>,
    /// Stream sockets in the host's file system that somebody listens on.
    pub unix_listeners: BTreeSet<PathBuf>,
    /// Connections to services, oldest first.
    pub served: Vec<(Service, PortId, SocketAddr, SockId)>,
    /// The local address of connections.
    pub outbound: Option<IpAddr>,
    /// Addresses of the host.
    pub host_addresses: BTreeSet<IpAddr>,
    /// Room of a TCP socket's send buffer when it is opened, bytes.
    pub send_room: usize,
    /// One TCP send takes this many bytes at most: partial writes.
    pub send_max: usize,
    /// One TCP receive gives this many bytes at most.
    pub recv_max: usize,
    /// Datagrams that one [`Uplink::recv_from`] hands out at most.
    pub batch: usize,
    /// Whether [`FakeUplink::sent`] and what [`FakeUplink::peer_recv`] gives are filled. Benches
    /// switch it off: then a TCP peer has taken everything at once.
    pub keep_sent: bool,
    /// Datagrams sent, oldest first. The test takes them out as it likes.
    pub sent: VecDeque<Sent>,
    /// Datagram send calls, failed ones included.
    pub send_calls: u64,
    /// Sockets closed, oldest first.
    pub closed: Vec<Closed>,
}

impl FakeUplink {
    /// A host on which everything succeeds. The seed decides [`Uplink::random`].
    pub fn new(seed: u64) -> Self {
        Self {
            sockets: Vec::new(),
            events: VecDeque::new(),
            random_state: seed,
            next_port: 40_000,
            connects: BTreeMap::new(),
            connect_default: Connect::Succeed,
            open_error: None,
            ping_error: None,
            open_max: usize::MAX,
            busy_ports: BTreeSet::new(),
            unix_listeners: BTreeSet::new(),
            served: Vec::new(),
            outbound: None,
            host_addresses: BTreeSet::new(),
            send_room: 1 << 20,
            send_max: usize::MAX,
            recv_max: usize::MAX,
            batch: 64,
            keep_sent: true,
            sent: VecDeque::new(),
            send_calls: 0,
            closed: Vec::new(),
        }
    }

    /// Sets how connects to `to` end.
    pub fn script_connect(&mut self, to: SocketAddr, outcome: Connect) {
        self.connects.insert(to, outcome);
    }

    /// Sockets open now.
    pub fn open_count(&self) -> usize {
        self.sockets.iter().flatten().count()
    }

    /// The sockets open now and their owners, in the order they were opened.
    pub fn open_sockets(&self) -> Vec<(SockId, SockOwner)> {
        (0u32..)
            .zip(&self.sockets)
            .filter_map(|(id, socket)| Some((SockId(id), socket.as_ref()?.owner)))
            .collect()
    }

    /// The open socket of `owner`.
    pub fn socket_of(&self, owner: SockOwner) -> Option<SockId> {
        let found = self
            .open_sockets()
            .into_iter()
            .find(|(_, of)| *of == owner)?;
        Some(found.0)
    }

    /// The local port of a UDP socket, the identifier of a ping socket.
    pub fn local_port(&self, socket: SockId) -> u16 {
        match &self.socket(socket).kind {
            Kind::Udp { port, .. } => *port,
            Kind::Ping { identifier, .. } => *identifier,
            Kind::Tcp(_) | Kind::Listener { .. } => panic!("{socket:?} is a stream socket"),
        }
    }

    /// The next readiness event, as epoll would give it: TCP once per edge, the others as long as
    /// something can be read. Several edges of one socket merge, and the state reported is the one
    /// at the time of the call.
    pub fn poll_event(&mut self) -> Option<(SockOwner, Ready)> {
        while let Some(id) = self.events.pop_front() {
            let Some(socket) = self.sockets[id.0 as usize].as_ref() else {
                continue;
            };
            let ready = ready(socket);
            let level = !matches!(socket.kind, Kind::Tcp(_));
            let owner = socket.owner;
            if level && (!ready.readable || socket.deaf) {
                continue;
            }
            if level {
                self.events.push_back(id);
            }
            return Some((owner, ready));
        }
        None
    }

    // ---- the outside of a TCP connection ----

    /// Ends a connect that [`Connect::Wait`] left open.
    pub fn finish_connect(&mut self, socket: SockId, result: Result<(), HostError>) {
        let tcp = self.tcp(socket);
        assert!(tcp.connected.is_none(), "{socket:?} is connected already");
        tcp.connected = Some(result);
        self.edge(socket);
    }

    /// Where the NAT connected to.
    pub fn peer(&mut self, socket: SockId) -> SocketAddr {
        self.tcp(socket)
            .peer
            .expect("a connection between addresses")
    }

    /// The peer sends data.
    pub fn peer_send(&mut self, socket: SockId, bytes: &[u8]) {
        let tcp = self.tcp(socket);
        assert!(!tcp.peer_fin, "the peer sent FIN already");
        tcp.inbound.extend(bytes);
        self.edge(socket);
    }

    /// The peer sends FIN.
    pub fn peer_shutdown(&mut self, socket: SockId) {
        self.tcp(socket).peer_fin = true;
        self.edge(socket);
    }

    /// The connection breaks: data that has arrived can still be read, then every call fails.
    pub fn peer_break(&mut self, socket: SockId, error: HostError) {
        self.tcp(socket).broken = Some(error);
        self.edge(socket);
    }

    /// Takes all the NAT sent and frees as much room in the send buffer.
    pub fn peer_recv(&mut self, socket: SockId) -> Vec<u8> {
        let tcp = self.tcp(socket);
        let bytes = std::mem::take(&mut tcp.outbound);
        tcp.send_room += bytes.len();
        if !bytes.is_empty() && std::mem::take(&mut tcp.send_blocked) {
            self.edge(socket);
        }
        bytes
    }

    /// Whether the NAT sent FIN.
    pub fn fin_sent(&mut self, socket: SockId) -> bool {
        self.tcp(socket).fin_sent
    }

    /// Bytes the peer sent that the NAT has not received yet.
    pub fn unread(&mut self, socket: SockId) -> usize {
        self.tcp(socket).inbound.len()
    }

    // ---- the outside of a datagram socket ----

    /// A datagram (or with `segment` a GRO train) arrives.
    pub fn deliver(
        &mut self,
        socket: SockId,
        source: SocketAddr,
        payload: &[u8],
        segment: Option<u16>,
    ) {
        self.deliver_ttl(socket, source, payload, segment, wire::TTL_DEFAULT);
    }

    /// [`FakeUplink::deliver`] with a given IP TTL.
    pub fn deliver_ttl(
        &mut self,
        socket: SockId,
        source: SocketAddr,
        payload: &[u8],
        segment: Option<u16>,
        ttl: u8,
    ) {
        self.socket_mut(socket).datagrams.push_back(Inbound {
            destination: None,
            source,
            payload: payload.to_vec(),
            segment,
            ttl,
            tos: 0,
        });
        self.edge(socket);
    }

    /// The newest datagram delivered to the socket has this DSCP and ECN.
    pub fn mark_tos(&mut self, socket: SockId, tos: u8) {
        let newest = self.socket_mut(socket).datagrams.back_mut();
        newest.expect("a datagram was delivered").tos = tos;
    }

    /// The newest datagram delivered to the socket was sent to this address of the host.
    pub fn mark_destination(&mut self, socket: SockId, destination: IpAddr) {
        let newest = self.socket_mut(socket).datagrams.back_mut();
        newest.expect("a datagram was delivered").destination = Some(destination);
    }

    /// An ICMP error about a datagram sent arrives.
    pub fn report(&mut self, socket: SockId, reported: Reported) {
        self.socket_mut(socket).reported.push_back(reported);
        self.edge(socket);
    }

    /// The next send on this socket fails; several queue up.
    pub fn fail_send(&mut self, socket: SockId, error: HostError) {
        self.socket_mut(socket).send_errors.push_back(error);
    }

    /// The outside answers the oldest echo request that was sent and not taken yet, as its target.
    /// Returns whether there was one.
    pub fn answer_ping(&mut self) -> bool {
        let Some(sent) = self.sent.pop_front() else {
            return false;
        };
        let mut reply = sent.payload;
        let identifier = self.local_port(sent.socket);
        reply[4..6].copy_from_slice(&identifier.to_be_bytes());
        // Of ICMPv6 the kernel verifies the checksum, with a pseudo-header, and nobody behind it.
        reply[0] = if sent.to.is_ipv6() { 129 } else { 0 };
        write_icmp_checksum(&mut reply);
        self.deliver(sent.socket, sent.to, &reply, None);
        true
    }

    fn edge(&mut self, socket: SockId) {
        if !self.events.contains(&socket) {
            self.events.push_back(socket);
        }
    }

    fn socket(&self, id: SockId) -> &FakeSocket {
        self.sockets
            .get(id.0 as usize)
            .and_then(Option::as_ref)
            .unwrap_or_else(|| panic!("{id:?} is not open"))
    }

    fn socket_mut(&mut self, id: SockId) -> &mut FakeSocket {
        self.sockets
            .get_mut(id.0 as usize)
            .and_then(Option::as_mut)
            .unwrap_or_else(|| panic!("{id:?} is not open"))
    }

    fn tcp(&mut self, id: SockId) -> &mut FakeTcp {
        match &mut self.socket_mut(id).kind {
            Kind::Tcp(tcp) => tcp,
            other => panic!("{id:?} is no TCP socket but {other:?}"),
        }
    }

    fn open_stream(
        &mut self,
        peer: Option<SocketAddr>,
        connected: Option<Result<(), HostError>>,
        owner: SockOwner,
    ) -> Result<SockId, HostError> {
        let tcp = FakeTcp {
            peer,
            connected,
            inbound: VecDeque::new(),
            peer_fin: false,
            broken: None,
            outbound: Vec::new(),
            send_room: self.send_room,
            send_blocked: false,
            fin_sent: false,
            abort_on_close: false,
            watched: false,
            hops: None,
            unsent_max: None,
            local: self.outbound,
        };
        self.open(owner, Kind::Tcp(Box::new(tcp)))
    }

    /// A listening socket, as the assembly would hand it to a forward.
    pub fn listen(&mut self, owner: SockOwner) -> SockId {
        let waiting = VecDeque::new();
        self.open(owner, Kind::Listener { waiting })
            .expect("room for a listener")
    }

    /// A bound datagram socket, as the assembly would hand it to a forward.
    pub fn bind(&mut self, at: SocketAddr, owner: SockOwner) -> SockId {
        let kind = Kind::Udp {
            family: Family::of(at.ip()),
            port: at.port(),
        };
        self.open(owner, kind).expect("room for a socket")
    }

    /// Somebody connects to a listening socket: from an address, or (`None`) through the file system.
    pub fn knock(&mut self, listener: SockId, peer: Option<SocketAddr>) {
        match &mut self.socket_mut(listener).kind {
            Kind::Listener { waiting } => waiting.push_back(peer),
            other => panic!("{listener:?} does not listen but is {other:?}"),
        }
        self.edge(listener);
    }

    /// How many hops a connection's segments go, where that is limited.
    pub fn hops(&mut self, socket: SockId) -> Option<u8> {
        self.tcp(socket).hops
    }

    /// What a connection may have unsent, where that is limited, bytes.
    pub fn unsent_max(&mut self, socket: SockId) -> Option<u32> {
        self.tcp(socket).unsent_max
    }

    /// Whether keep-alives were asked for.
    pub fn is_watched(&mut self, socket: SockId) -> bool {
        self.tcp(socket).watched
    }

    fn open(&mut self, owner: SockOwner, kind: Kind) -> Result<SockId, HostError> {
        if let Some(error) = self.open_error.take() {
            return Err(error);
        }
        if self.open_count_reached() {
            return Err(HostError::Exhausted);
        }
        let id = SockId(self.sockets.len() as u32);
        self.sockets.push(Some(FakeSocket {
            owner,
            kind,
            deaf: false,
            datagrams: VecDeque::new(),
            reported: VecDeque::new(),
            send_errors: VecDeque::new(),
        }));
        Ok(id)
    }

    fn open_count_reached(&self) -> bool {
        self.open_max != usize::MAX && self.open_count() >= self.open_max
    }
}

fn ready(socket: &FakeSocket) -> Ready {
    match &socket.kind {
        Kind::Tcp(tcp) => {
            let failed = tcp.broken.is_some() || matches!(tcp.connected, Some(Err(_)));
            let connected = tcp.connected.is_some();
            Ready {
                readable: failed || (connected && (!tcp.inbound.is_empty() || tcp.peer_fin)),
                writable: failed || (connected && tcp.send_room > 0),
                error: failed,
                last_edge: failed || tcp.peer_fin,
                hung_up: failed,
            }
        }
        Kind::Listener { waiting } => Ready {
            readable: !waiting.is_empty(),
            ..Ready::default()
        },
        Kind::Udp { .. } | Kind::Ping { .. } => Ready {
            readable: !socket.datagrams.is_empty() || !socket.reported.is_empty(),
            writable: false,
            error: !socket.reported.is_empty(),
            ..Ready::default()
        },
    }
}

impl Uplink for FakeUplink {
    fn tcp_connect(
        &mut self,
        to: SocketAddr,
        hops: Option<u8>,
        owner: SockOwner,
    ) -> Result<SockId, HostError> {
        let outcome = *self.connects.get(&to).unwrap_or(&self.connect_default);
        let connected = match outcome {
            Connect::FailAtOnce(error) => return Err(error),
            Connect::Fail(error) => Some(Err(error)),
            Connect::Succeed => Some(Ok(())),
            Connect::Wait => None,
        };
        let socket = self.open_stream(Some(to), connected, owner)?;
        self.tcp(socket).hops = hops;
        if connected.is_some() {
            self.edge(socket);
        }
        Ok(socket)
    }

    fn tcp_free_hops(&mut self, socket: SockId) {
        self.tcp(socket).hops = None;
    }

    fn tcp_connected(&mut self, socket: SockId) -> Result<bool, HostError> {
        // Reading SO_ERROR takes the error: afterwards the stream looks ended.
        if let Some(error) = self.tcp(socket).broken.take() {
            self.tcp(socket).peer_fin = true;
            return Err(error);
        }
        match self.tcp(socket).connected {
            None => Ok(false),
            Some(result) => result.map(|()| true),
        }
    }

    fn tcp_bound_unsent(&mut self, socket: SockId, bytes: u32) {
        self.tcp(socket).unsent_max = Some(bytes);
    }

    fn tcp_recv(&mut self, socket: SockId, buffer: &mut [u8]) -> Io {
        let recv_max = self.recv_max;
        let tcp = self.tcp(socket);
        if let Some(Err(error)) = tcp.connected {
            return Io::Failed(error);
        }
        let len = tcp.inbound.len().min(buffer.len()).min(recv_max);
        if len > 0 {
            let read = tcp.inbound.read_exact(&mut buffer[..len]);
            // As the kernel's: what a limit holds back may be there.
            let is_all = tcp.inbound.is_empty() && len < buffer.len().min(recv_max);
            return match (read, is_all) {
                (Err(_), _) => Io::Blocked,
                (Ok(()), true) => Io::Drained(len),
                (Ok(()), false) => Io::Done(len),
            };
        }
        match tcp.broken {
            Some(error) => Io::Failed(error),
            None if tcp.peer_fin && tcp.inbound.is_empty() => Io::Eof,
            None => Io::Blocked,
        }
    }

    fn tcp_send(&mut self, socket: SockId, bytes: &[u8]) -> Io {
        let (send_max, keep) = (self.send_max, self.keep_sent);
        let tcp = self.tcp(socket);
        match tcp.connected {
            None => return Io::Blocked,
            Some(Err(error)) => return Io::Failed(error),
            Some(Ok(())) => {}
        }
        if let Some(error) = tcp.broken {
            return Io::Failed(error);
        }
        assert!(!tcp.fin_sent, "data after FIN on {socket:?}");
        let len = bytes.len().min(send_max).min(tcp.send_room);
        if len == 0 && !bytes.is_empty() {
            tcp.send_blocked = true;
            return Io::Blocked;
        }
        if keep {
            tcp.outbound.extend_from_slice(&bytes[..len]);
            tcp.send_room -= len;
        }
        Io::Done(len)
    }

    fn tcp_shutdown(&mut self, socket: SockId) {
        self.tcp(socket).fin_sent = true;
    }

    fn tcp_abort_on_close(&mut self, socket: SockId) {
        self.tcp(socket).abort_on_close = true;
    }

    fn tcp_watch(&mut self, socket: SockId) {
        self.tcp(socket).watched = true;
    }

    fn accept(
        &mut self,
        listener: SockId,
        owner: SockOwner,
    ) -> Result<Option<(SockId, Option<SocketAddr>)>, HostError> {
        let Kind::Listener { waiting } = &mut self.socket_mut(listener).kind else {
            panic!("{listener:?} does not listen");
        };
        let Some(&peer) = waiting.front() else {
            return Ok(None);
        };
        let socket = self.open_stream(peer, Some(Ok(())), owner)?;
        if let Kind::Listener { waiting } = &mut self.socket_mut(listener).kind {
            waiting.pop_front();
        }
        Ok(Some((socket, peer)))
    }

    fn hand_over(&mut self, socket: SockId, owner: SockOwner) {
        self.tcp(socket);
        self.socket_mut(socket).owner = owner;
        self.edge(socket);
    }

    fn unix_connect(&mut self, path: &Path, owner: SockOwner) -> Result<SockId, HostError> {
        if !self.unix_listeners.contains(path) {
            return Err(HostError::Refused);
        }
        let socket = self.open_stream(None, Some(Ok(())), owner)?;
        self.edge(socket);
        Ok(socket)
    }

    fn service_connect(
        &mut self,
        service: Service,
        (port, guest): (PortId, SocketAddr),
        owner: SockOwner,
    ) -> Result<SockId, HostError> {
        let socket = self.open_stream(None, Some(Ok(())), owner)?;
        self.served.push((service, port, guest, socket));
        self.edge(socket);
        Ok(socket)
    }

    fn udp_open(
        &mut self,
        family: Family,
        port: u16,
        owner: SockOwner,
    ) -> Result<(SockId, u16), HostError> {
        let taken = |port: u16, sockets: &[Option<FakeSocket>]| {
            let ours = |socket: &FakeSocket| matches!(socket.kind, Kind::Udp { family: f, port: p } if (f, p) == (family, port));
            sockets.iter().flatten().any(ours)
        };
        let mut local = port;
        while local == 0 || self.busy_ports.contains(&local) || taken(local, &self.sockets) {
            local = self.next_port;
            self.next_port = self.next_port.wrapping_add(1).max(1024);
        }
        let kind = Kind::Udp {
            family,
            port: local,
        };
        Ok((self.open(owner, kind)?, local))
    }

    fn ping_open(&mut self, family: Family, owner: SockOwner) -> Result<SockId, HostError> {
        if let Some(error) = self.ping_error {
            return Err(error);
        }
        let identifier = self.next_port;
        self.next_port = self.next_port.wrapping_add(1).max(1024);
        self.open(owner, Kind::Ping { family, identifier })
    }

    fn send_to(
        &mut self,
        socket: SockId,
        to: SocketAddr,
        payload: &[u8],
        options: SendOptions,
    ) -> Io {
        self.send_calls += 1;
        if let Kind::Udp { family, .. } | Kind::Ping { family, .. } = self.socket(socket).kind {
            assert_eq!(family, Family::of(to.ip()), "{socket:?} sends to {to}");
        }
        if let Some(error) = self.socket_mut(socket).send_errors.pop_front() {
            return Io::Failed(error);
        }
        if self.keep_sent {
            self.sent.push_back(Sent {
                socket,
                to,
                payload: payload.to_vec(),
                ttl: options.ttl,
                tos: options.tos,
                dont_fragment: options.dont_fragment,
                segment: options.segment,
                from: None,
            });
        }
        Io::Done(payload.len())
    }

    fn send_from(
        &mut self,
        socket: SockId,
        from: IpAddr,
        to: SocketAddr,
        payload: &[u8],
        options: SendOptions,
    ) -> Io {
        let sent = self.send_to(socket, to, payload, options);
        if let (Io::Done(_), Some(newest)) = (sent, self.sent.back_mut()) {
            newest.from = Some(from);
        }
        sent
    }

    fn listen_for(&mut self, socket: SockId, wanted: bool) {
        self.socket_mut(socket).deaf = !wanted;
        self.edge(socket);
    }

    fn recv_from(&mut self, socket: SockId, sink: &mut dyn FnMut(Datagram<'_>)) -> bool {
        for _ in 0..self.batch {
            let next = self.socket_mut(socket).datagrams.pop_front();
            let Some(next) = next else {
                return false;
            };
            sink(Datagram {
                source: next.source,
                payload: &next.payload,
                segment: next.segment,
                ttl: next.ttl,
                tos: next.tos,
                destination: next.destination,
            });
        }
        !self.socket(socket).datagrams.is_empty()
    }

    fn recv_errors(&mut self, socket: SockId, sink: &mut dyn FnMut(SocketError<'_>)) {
        while let Some(reported) = self.socket_mut(socket).reported.pop_front() {
            sink(SocketError {
                to: reported.to,
                offender: reported.offender,
                of_type: reported.kind.0,
                code: reported.kind.1,
                mtu: reported.mtu,
                error: reported.error,
                payload: &reported.payload,
            });
        }
    }

    fn close(&mut self, socket: SockId) {
        let owner = self.socket(socket).owner;
        let aborted = matches!(&self.socket(socket).kind, Kind::Tcp(tcp) if tcp.abort_on_close);
        self.sockets[socket.0 as usize] = None;
        self.closed.push(Closed {
            socket,
            owner,
            aborted,
        });
    }

    fn local_address(&mut self, socket: SockId) -> Option<IpAddr> {
        match &self.socket(socket).kind {
            Kind::Tcp(tcp) => tcp.local,
            _ => self.outbound,
        }
    }

    fn is_host_address(&mut self, address: IpAddr) -> bool {
        self.host_addresses.contains(&address)
    }

    fn random(&mut self) -> u64 {
        // splitmix64: any seed gives a full-period sequence.
        self.random_state = self.random_state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random_state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// An [`Outbox`] that keeps the frames.
#[derive(Debug)]
pub struct FrameLog {
    buffer: Box<[u8]>,
    /// Whether [`FrameLog::frames`] is filled. Benches switch it off.
    pub keep: bool,
    /// Frames sent, kept or not.
    pub count: u64,
    /// The frames, oldest first. The test takes them out as it likes.
    pub frames: VecDeque<(Vec<u8>, Offload)>,
}

impl Default for FrameLog {
    fn default() -> Self {
        Self {
            buffer: vec![0; FRAME_BUFFER_LEN].into_boxed_slice(),
            keep: true,
            count: 0,
            frames: VecDeque::new(),
        }
    }
}

impl FrameLog {
    /// The oldest frame not yet taken.
    pub fn pop(&mut self) -> Option<(Vec<u8>, Offload)> {
        self.frames.pop_front()
    }
}

impl Outbox for FrameLog {
    fn buffer(&mut self) -> &mut [u8] {
        &mut self.buffer
    }

    fn send(&mut self, len: usize, offload: Offload) {
        self.count += 1;
        if self.keep {
            self.frames
                .push_back((self.buffer[..len].to_vec(), offload));
        }
    }
}

/// Parses a frame from the guest, or one to it.
///
/// # Panics
/// If the frame is not well-formed.
pub fn parse(frame: &[u8], offload: Offload) -> Packet<'_> {
    let frame = Frame {
        bytes: frame,
        offload,
    };
    Packet::parse(frame, PortId(1)).expect("a well-formed frame")
}

/// An IPv4 packet from `source` at [`GUEST_MAC`], with `payload` behind the IP header.
pub fn guest_ipv4(
    source: Ipv4Addr,
    destination: Ipv4Addr,
    protocol: u8,
    ttl: u8,
    payload: &[u8],
) -> Vec<u8> {
    let at = ETH_HEADER_LEN + wire::IPV4_HEADER_LEN;
    let mut frame = vec![0; at];
    wire::write_ethernet(&mut frame, GATEWAY_MAC, GUEST_MAC, wire::ETHERTYPE_IPV4);
    let fields = Ipv4Fields {
        source,
        destination,
        protocol,
        ttl,
        tos: 0,
    };
    wire::write_ipv4(&mut frame, fields, payload.len());
    frame.extend_from_slice(payload);
    frame
}

/// An IPv6 packet from `source` at [`GUEST_MAC`], with `payload` behind the IP header.
pub fn guest_ipv6(
    source: Ipv6Addr,
    destination: Ipv6Addr,
    protocol: u8,
    hop_limit: u8,
    payload: &[u8],
) -> Vec<u8> {
    let mut frame = vec![0; ETH_HEADER_LEN + IPV6_HEADER_LEN];
    wire::write_ethernet(&mut frame, GATEWAY_MAC, GUEST_MAC, wire::ETHERTYPE_IPV6);
    let fields = Ipv6Fields {
        source,
        destination,
        protocol,
        hop_limit,
        traffic_class: 0,
    };
    wire::ipv6::write_ipv6(&mut frame, fields, payload.len());
    frame.extend_from_slice(payload);
    frame
}

/// [`guest_ipv4`] or [`guest_ipv6`].
///
/// # Panics
/// If the families of the addresses differ.
pub fn guest_ip(
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    ttl: u8,
    payload: &[u8],
) -> Vec<u8> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(to)) => guest_ipv4(source, to, protocol, ttl, payload),
        (IpAddr::V6(source), IpAddr::V6(to)) => guest_ipv6(source, to, protocol, ttl, payload),
        _ => panic!("{source} to {destination}"),
    }
}

/// A UDP datagram from a guest, checksum complete.
pub fn guest_udp(source: SocketAddr, to: SocketAddr, ttl: u8, payload: &[u8]) -> Vec<u8> {
    let mut udp = Vec::with_capacity(wire::UDP_HEADER_LEN + payload.len());
    udp.extend_from_slice(&source.port().to_be_bytes());
    udp.extend_from_slice(&to.port().to_be_bytes());
    udp.extend_from_slice(&((wire::UDP_HEADER_LEN + payload.len()) as u16).to_be_bytes());
    udp.extend_from_slice(&[0, 0]);
    udp.extend_from_slice(payload);
    write_transport_checksum(&mut udp, 6, source.ip(), to.ip(), wire::PROTO_UDP);
    guest_ip(source.ip(), to.ip(), wire::PROTO_UDP, ttl, &udp)
}

/// A USO train from a guest and its offload: `payload` is cut into datagrams of `segment` bytes.
pub fn guest_udp_train(
    source: SocketAddr,
    to: SocketAddr,
    segment: u16,
    payload: &[u8],
) -> (Vec<u8>, Offload) {
    let frame = guest_udp(source, to, wire::TTL_DEFAULT, payload);
    let offload = Offload {
        csum: Csum::Partial {
            start: (frame.len() - payload.len() - wire::UDP_HEADER_LEN) as u16,
            offset: 6,
        },
        gso: Gso::Udp(segment),
        ecn: false,
    };
    (frame, offload)
}

/// A TCP segment from a guest, checksum complete. `options` is padded to words with zeros.
pub fn guest_tcp(
    source: SocketAddr,
    to: SocketAddr,
    (sequence, acknowledgment): (u32, u32),
    (flags, window): (u8, u16),
    options: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    let header_len = 20 + options.len().next_multiple_of(4);
    let mut tcp = vec![0; header_len];
    tcp[..2].copy_from_slice(&source.port().to_be_bytes());
    tcp[2..4].copy_from_slice(&to.port().to_be_bytes());
    tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
    tcp[8..12].copy_from_slice(&acknowledgment.to_be_bytes());
    tcp[12] = (header_len as u8 / 4) << 4;
    tcp[13] = flags;
    tcp[14..16].copy_from_slice(&window.to_be_bytes());
    tcp[20..20 + options.len()].copy_from_slice(options);
    tcp.extend_from_slice(payload);
    write_transport_checksum(&mut tcp, 16, source.ip(), to.ip(), wire::PROTO_TCP);
    guest_ip(
        source.ip(),
        to.ip(),
        wire::PROTO_TCP,
        wire::TTL_DEFAULT,
        &tcp,
    )
}

/// An ICMPv6 echo request from a guest.
pub fn guest_echo6(
    source: Ipv6Addr,
    to: Ipv6Addr,
    (identifier, sequence): (u16, u16),
    hop_limit: u8,
    data: &[u8],
) -> Vec<u8> {
    let mut icmp = vec![128, 0, 0, 0];
    icmp.extend_from_slice(&identifier.to_be_bytes());
    icmp.extend_from_slice(&sequence.to_be_bytes());
    icmp.extend_from_slice(data);
    let protocol = wire::PROTO_ICMPV6;
    write_transport_checksum(&mut icmp, 2, source.into(), to.into(), protocol);
    guest_ipv6(source, to, protocol, hop_limit, &icmp)
}

/// An ICMP echo request from a guest.
pub fn guest_echo(
    source: Ipv4Addr,
    to: Ipv4Addr,
    (identifier, sequence): (u16, u16),
    ttl: u8,
    data: &[u8],
) -> Vec<u8> {
    let mut icmp = vec![8, 0, 0, 0];
    icmp.extend_from_slice(&identifier.to_be_bytes());
    icmp.extend_from_slice(&sequence.to_be_bytes());
    icmp.extend_from_slice(data);
    write_icmp_checksum(&mut icmp);
    guest_ipv4(source, to, wire::PROTO_ICMP, ttl, &icmp)
}

fn write_icmp_checksum(icmp: &mut [u8]) {
    icmp[2..4].copy_from_slice(&[0, 0]);
    let sum = !wire::checksum::fold(wire::checksum::sum(icmp));
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
}

fn write_transport_checksum(
    segment: &mut [u8],
    at: usize,
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
) {
    let sum = match !wire::checksum::transport(source, destination, protocol, segment) {
        0 => 0xffff,
        sum => sum,
    };
    segment[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nat::FlowId;
    use crate::wire::{Body, Transport};

    const OWNER: SockOwner = SockOwner::Tcp(FlowId {
        slot: 1,
        generation: 1,
    });

    fn to(port: u16) -> SocketAddr {
        SocketAddr::from(([10, 1, 2, 3], port))
    }

    #[test]
    fn tcp_script() {
        let mut up = FakeUplink::new(1);
        up.script_connect(to(1), Connect::Wait);
        up.script_connect(to(2), Connect::Fail(HostError::Refused));
        up.script_connect(to(3), Connect::FailAtOnce(HostError::NetUnreachable));
        assert_eq!(
            up.tcp_connect(to(3), None, OWNER),
            Err(HostError::NetUnreachable)
        );
        let failed = up.tcp_connect(to(2), None, OWNER).unwrap();
        assert!(up.poll_event().unwrap().1.error);
        assert_eq!(up.tcp_connected(failed), Err(HostError::Refused));
        up.close(failed);

        let socket = up.tcp_connect(to(1), None, OWNER).unwrap();
        assert_eq!(up.poll_event(), None);
        assert_eq!(up.tcp_connected(socket), Ok(false));
        up.finish_connect(socket, Ok(()));
        let writable = Ready {
            writable: true,
            ..Ready::default()
        };
        assert_eq!(up.poll_event(), Some((OWNER, writable)));
        assert_eq!(up.poll_event(), None, "edges come once");

        let mut buffer = [0; 8];
        assert_eq!(up.tcp_recv(socket, &mut buffer), Io::Blocked);
        up.peer_send(socket, b"hello");
        up.peer_shutdown(socket);
        up.recv_max = 3;
        assert_eq!(up.tcp_recv(socket, &mut buffer), Io::Done(3));
        assert_eq!(up.tcp_recv(socket, &mut buffer), Io::Drained(2));
        assert_eq!(up.tcp_recv(socket, &mut buffer), Io::Eof);
        while up.poll_event().is_some() {}

        up.tcp(socket).send_room = 4;
        up.send_max = 3;
        assert_eq!(up.tcp_send(socket, b"abcdef"), Io::Done(3));
        assert_eq!(up.tcp_send(socket, b"def"), Io::Done(1));
        assert_eq!(up.tcp_send(socket, b"ef"), Io::Blocked);
        assert_eq!(up.peer_recv(socket), b"abcd");
        assert!(up.poll_event().unwrap().1.writable);
        up.tcp_shutdown(socket);
        up.tcp_abort_on_close(socket);
        up.close(socket);
        assert!(up.closed.last().unwrap().aborted);
        assert_eq!(up.open_count(), 0);
    }

    #[test]
    fn guest_frames_parse() {
        let source = SocketAddr::new(GUEST.into(), 5000);
        let udp = guest_udp(source, to(53), 9, b"query");
        let packet = parse(&udp, Offload::default());
        let (ip, datagram) = packet.udp4().unwrap();
        assert_eq!((ip.ttl, datagram.payload), (9, &b"query"[..]));
        let tcp = guest_tcp(source, to(80), (7, 0), (2, 64_000), &[2, 4, 5, 180], b"");
        match parse(&tcp, Offload::default()).body {
            Body::Ipv4(ip) => match ip.transport {
                Transport::Tcp(tcp) => assert_eq!((tcp.sequence, tcp.header.len()), (7, 24)),
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
        let echo = guest_echo(GUEST, Ipv4Addr::new(10, 1, 2, 3), (1, 2), 64, b"data");
        parse(&echo, Offload::default());
    }
}
