//! A scripted host for the NAT: [`FakeUplink`] stands in for the real sockets and plays the outside
//! world, [`FrameLog`] takes what goes to the guest, and the `guest_*` functions write what the guest
//! sends. Everything is deterministic and nothing reads a clock: a test keeps `now` in a variable.
//!
//! Public for the integration tests and benches of this crate; not part of the library's interface.
//!
//! A call on a socket that was never opened or is closed already is a bug of the caller and panics,
//! as a stale file descriptor would be worse on a real host.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{Ipv4Addr, SocketAddrV4};

use super::{Datagram, HostError, Io, Ready, SendOptions, SockId, SockOwner, Uplink};
use crate::frame::{ETH_HEADER_LEN, FRAME_BUFFER_LEN, Frame, Mac, PortId};
use crate::gateway::{LanConfig, Outbox};
use crate::offload::{Csum, Gso, Offload};
use crate::wire::{self, Ipv4Fields, Packet};

/// MAC of the gateway in [`lan`].
pub const GATEWAY_MAC: Mac = Mac([0x52, 0x54, 0, 0, 0, 1]);
/// MAC of the guest that the `guest_*` functions send from.
pub const GUEST_MAC: Mac = Mac([0x52, 0x54, 0, 0, 0, 2]);
/// Address of that guest.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 122, 2);

/// 192.168.122.1/24 with an MTU of 1500.
pub fn lan() -> LanConfig {
    LanConfig {
        mac: GATEWAY_MAC,
        address: Ipv4Addr::new(192, 168, 122, 1),
        prefix: 24,
        mtu: 1500,
    }
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
    pub to: SocketAddrV4,
    /// Payload; of a ping socket the ICMP message.
    pub payload: Vec<u8>,
    /// IP TTL, 0 = default.
    pub ttl: u8,
    /// Train size.
    pub segment: Option<u16>,
}

/// TCP side of a fake socket: what the outside peer sees and does.
#[derive(Debug)]
struct FakeTcp {
    peer: SocketAddrV4,
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
}

#[derive(Debug)]
enum Kind {
    Tcp(Box<FakeTcp>),
    Udp {
        port: u16,
    },
    Ping {
        /// What the kernel puts into requests in place of the sender's identifier.
        identifier: u16,
    },
}

#[derive(Debug)]
struct FakeSocket {
    owner: SockOwner,
    kind: Kind,
    datagrams: VecDeque<(SocketAddrV4, Vec<u8>, Option<u16>, u8)>,
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
    connects: BTreeMap<SocketAddrV4, Connect>,
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
    /// Addresses of the host.
    pub host_addresses: BTreeSet<Ipv4Addr>,
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
    pub fn script_connect(&mut self, to: SocketAddrV4, outcome: Connect) {
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
            Kind::Udp { port } => *port,
            Kind::Ping { identifier } => *identifier,
            Kind::Tcp(_) => panic!("{socket:?} is a TCP socket"),
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
            if level && !ready.readable {
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
    pub fn peer(&mut self, socket: SockId) -> SocketAddrV4 {
        self.tcp(socket).peer
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
        source: SocketAddrV4,
        payload: &[u8],
        segment: Option<u16>,
    ) {
        self.deliver_ttl(socket, source, payload, segment, wire::TTL_DEFAULT);
    }

    /// [`FakeUplink::deliver`] with a given IP TTL.
    pub fn deliver_ttl(
        &mut self,
        socket: SockId,
        source: SocketAddrV4,
        payload: &[u8],
        segment: Option<u16>,
        ttl: u8,
    ) {
        self.socket_mut(socket)
            .datagrams
            .push_back((source, payload.to_vec(), segment, ttl));
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
        reply[0] = 0;
        let identifier = self.local_port(sent.socket);
        reply[4..6].copy_from_slice(&identifier.to_be_bytes());
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
            datagrams: VecDeque::new(),
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
            }
        }
        Kind::Udp { .. } | Kind::Ping { .. } => Ready {
            readable: !socket.datagrams.is_empty(),
            writable: false,
            error: false,
        },
    }
}

impl Uplink for FakeUplink {
    fn tcp_connect(&mut self, to: SocketAddrV4, owner: SockOwner) -> Result<SockId, HostError> {
        let outcome = *self.connects.get(&to).unwrap_or(&self.connect_default);
        let connected = match outcome {
            Connect::FailAtOnce(error) => return Err(error),
            Connect::Fail(error) => Some(Err(error)),
            Connect::Succeed => Some(Ok(())),
            Connect::Wait => None,
        };
        let tcp = FakeTcp {
            peer: to,
            connected,
            inbound: VecDeque::new(),
            peer_fin: false,
            broken: None,
            outbound: Vec::new(),
            send_room: self.send_room,
            send_blocked: false,
            fin_sent: false,
            abort_on_close: false,
        };
        let socket = self.open(owner, Kind::Tcp(Box::new(tcp)))?;
        if connected.is_some() {
            self.edge(socket);
        }
        Ok(socket)
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

    fn tcp_recv(&mut self, socket: SockId, buffer: &mut [u8]) -> Io {
        let recv_max = self.recv_max;
        let tcp = self.tcp(socket);
        if let Some(Err(error)) = tcp.connected {
            return Io::Failed(error);
        }
        let len = tcp.inbound.len().min(buffer.len()).min(recv_max);
        if len > 0 {
            for (to, byte) in buffer.iter_mut().zip(tcp.inbound.drain(..len)) {
                *to = byte;
            }
            return Io::Done(len);
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

    fn udp_open(&mut self, port: u16, owner: SockOwner) -> Result<SockId, HostError> {
        let taken = |port: u16, sockets: &[Option<FakeSocket>]| {
            let ours =
                |socket: &FakeSocket| matches!(socket.kind, Kind::Udp { port: p } if p == port);
            sockets.iter().flatten().any(ours)
        };
        let mut local = port;
        while local == 0 || self.busy_ports.contains(&local) || taken(local, &self.sockets) {
            local = self.next_port;
            self.next_port = self.next_port.wrapping_add(1).max(1024);
        }
        self.open(owner, Kind::Udp { port: local })
    }

    fn ping_open(&mut self, owner: SockOwner) -> Result<SockId, HostError> {
        if let Some(error) = self.ping_error {
            return Err(error);
        }
        let identifier = self.next_port;
        self.next_port = self.next_port.wrapping_add(1).max(1024);
        self.open(owner, Kind::Ping { identifier })
    }

    fn send_to(
        &mut self,
        socket: SockId,
        to: SocketAddrV4,
        payload: &[u8],
        options: SendOptions,
    ) -> Io {
        self.send_calls += 1;
        if let Some(error) = self.socket_mut(socket).send_errors.pop_front() {
            return Io::Failed(error);
        }
        if self.keep_sent {
            self.sent.push_back(Sent {
                socket,
                to,
                payload: payload.to_vec(),
                ttl: options.ttl,
                segment: options.segment,
            });
        }
        Io::Done(payload.len())
    }

    fn recv_from(&mut self, socket: SockId, sink: &mut dyn FnMut(Datagram<'_>)) -> bool {
        for _ in 0..self.batch {
            let next = self.socket_mut(socket).datagrams.pop_front();
            let Some((source, payload, segment, ttl)) = next else {
                return false;
            };
            sink(Datagram {
                source,
                payload: &payload,
                segment,
                ttl,
            });
        }
        !self.socket(socket).datagrams.is_empty()
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

    fn is_host_address(&mut self, address: Ipv4Addr) -> bool {
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

/// A UDP datagram from a guest, checksum complete.
pub fn guest_udp(source: SocketAddrV4, to: SocketAddrV4, ttl: u8, payload: &[u8]) -> Vec<u8> {
    let mut udp = Vec::with_capacity(wire::UDP_HEADER_LEN + payload.len());
    udp.extend_from_slice(&source.port().to_be_bytes());
    udp.extend_from_slice(&to.port().to_be_bytes());
    udp.extend_from_slice(&((wire::UDP_HEADER_LEN + payload.len()) as u16).to_be_bytes());
    udp.extend_from_slice(&[0, 0]);
    udp.extend_from_slice(payload);
    write_transport_checksum(&mut udp, 6, *source.ip(), *to.ip(), wire::PROTO_UDP);
    guest_ipv4(*source.ip(), *to.ip(), wire::PROTO_UDP, ttl, &udp)
}

/// A USO train from a guest and its offload: `payload` is cut into datagrams of `segment` bytes.
pub fn guest_udp_train(
    source: SocketAddrV4,
    to: SocketAddrV4,
    segment: u16,
    payload: &[u8],
) -> (Vec<u8>, Offload) {
    let frame = guest_udp(source, to, wire::TTL_DEFAULT, payload);
    let offload = Offload {
        csum: Csum::Partial {
            start: (ETH_HEADER_LEN + wire::IPV4_HEADER_LEN) as u16,
            offset: 6,
        },
        gso: Gso::Udp(segment),
        ecn: false,
    };
    (frame, offload)
}

/// A TCP segment from a guest, checksum complete. `options` is padded to words with zeros.
pub fn guest_tcp(
    source: SocketAddrV4,
    to: SocketAddrV4,
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
    write_transport_checksum(&mut tcp, 16, *source.ip(), *to.ip(), wire::PROTO_TCP);
    guest_ipv4(
        *source.ip(),
        *to.ip(),
        wire::PROTO_TCP,
        wire::TTL_DEFAULT,
        &tcp,
    )
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
    source: Ipv4Addr,
    destination: Ipv4Addr,
    protocol: u8,
) {
    let sum = match !wire::checksum::transport4(source, destination, protocol, segment) {
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

    fn to(port: u16) -> SocketAddrV4 {
        SocketAddrV4::new(Ipv4Addr::new(10, 1, 2, 3), port)
    }

    #[test]
    fn tcp_script() {
        let mut up = FakeUplink::new(1);
        up.script_connect(to(1), Connect::Wait);
        up.script_connect(to(2), Connect::Fail(HostError::Refused));
        up.script_connect(to(3), Connect::FailAtOnce(HostError::NetUnreachable));
        assert_eq!(up.tcp_connect(to(3), OWNER), Err(HostError::NetUnreachable));
        let failed = up.tcp_connect(to(2), OWNER).unwrap();
        assert!(up.poll_event().unwrap().1.error);
        assert_eq!(up.tcp_connected(failed), Err(HostError::Refused));
        up.close(failed);

        let socket = up.tcp_connect(to(1), OWNER).unwrap();
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
        assert_eq!(up.tcp_recv(socket, &mut buffer), Io::Done(2));
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
        let source = SocketAddrV4::new(GUEST, 5000);
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
        let echo = guest_echo(GUEST, *to(0).ip(), (1, 2), 64, b"data");
        parse(&echo, Offload::default());
    }
}
