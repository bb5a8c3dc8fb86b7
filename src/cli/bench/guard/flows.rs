//! The NAT's pieces, without system calls: TCP up and down, a datagram of one of several mappings, a train, and
//! datagrams to the guest.

use std::hint::black_box;
use std::net::SocketAddr;

use super::{Piece, pieces, reference};
use crate::frame::{Duration, Instant};
use crate::nat::egress::Egress;
use crate::nat::icmp::ErrorSender;
use crate::nat::mapping::Limits;
use crate::nat::tcp::{OPENS_PER_SEC, Target, TcpNat};
use crate::nat::testing::{FakeUplink, FrameLog, GUEST, egress, guest_tcp, guest_udp, lan, parse};
use crate::nat::udp::UdpNat;
use crate::nat::{Ready, SockId, SockOwner};
use crate::offload::{Csum, Offload};
use crate::wire::{Body, Transport};

/// Flows and mappings that take turns: as many as the processor's nearest memory holds with all they have,
/// since what is beyond depends on where the pages lie, and differs from run to run.
const FLOWS: u16 = 2;
const MAPPINGS: u16 = 64;
/// Segments between two flushes: what a read from a busy tap brings.
const BATCH: usize = 64;
const MSS: usize = 1_460;
/// What the outside sends at a time: below the guest's window of 64 KiB.
const DOWN_BYTES: usize = 60_000;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
/// MSS 1460 and window scale 7, as Linux sends them; so a window of 512 is 64 KiB.
const OPTIONS: [u8; 8] = [2, 4, 5, 180, 1, 3, 3, 7];
const WINDOW: u16 = 512;
/// Datagrams of one look at a host socket.
const DATAGRAMS: usize = 32;

pub(super) fn all() -> Vec<Piece> {
    vec![tcp_up(), tcp_down(), udp_up(), udp_train(), udp_down()]
}

fn outside() -> SocketAddr {
    ([198, 51, 100, 7], 80).into()
}

fn guest(port: u16) -> SocketAddr {
    SocketAddr::new(GUEST.into(), port)
}

struct Flow {
    guest: SocketAddr,
    socket: SockId,
    owner: SockOwner,
    sequence: u32,
    acknowledgment: u32,
}

/// TCP flows of a guest, and a scripted host.
struct Tcp {
    now: Instant,
    nat: TcpNat,
    up: FakeUplink,
    log: FrameLog,
    flows: Vec<Flow>,
    next: usize,
}

impl Tcp {
    fn new() -> Self {
        let now = Instant::from_secs(1);
        let mut tcp = Self {
            now,
            nat: TcpNat::new(lan(), 20_000, now),
            up: FakeUplink::new(1),
            log: FrameLog::default(),
            flows: Vec::new(),
            next: 0,
        };
        (0..FLOWS).for_each(|n| tcp.open(2_000 + n));
        (tcp.log.keep, tcp.up.keep_sent) = (false, false);
        tcp
    }

    fn segment(&mut self, frame: &[u8]) {
        let offload = Offload {
            csum: Csum::Valid,
            ..Offload::default()
        };
        let packet = parse(frame, offload);
        let Body::Ipv4(ip) = &packet.body else {
            unreachable!("a packet over IPv4")
        };
        let Transport::Tcp(tcp) = &ip.transport else {
            unreachable!("a TCP segment")
        };
        let handled = self.nat.handle_packet(
            &packet,
            (&ip.any(), tcp),
            Target::Address(outside()),
            self.now,
            (&mut self.up, &mut self.log),
        );
        assert!(black_box(handled).is_ok());
    }

    fn flush(&mut self) {
        self.nat.flush(self.now, &mut self.up, &mut self.log);
    }

    fn open(&mut self, port: u16) {
        // As fast as a port may open flows for ever.
        self.now += Duration::from_micros(1_000_000 / OPENS_PER_SEC);
        let guest = guest(port);
        self.segment(&guest_tcp(
            guest,
            outside(),
            (0, 0),
            (SYN, 65_535),
            &OPTIONS,
            &[],
        ));
        let mut owner = None;
        while let Some((SockOwner::Tcp(id), ready)) = self.up.poll_event() {
            owner = Some(SockOwner::Tcp(id));
            self.nat
                .handle_ready(id, ready, self.now, (&mut self.up, &mut self.log));
        }
        self.flush();
        let (syn_ack, _) = self.log.pop().expect("a SYN-ACK");
        let theirs = u32::from_be_bytes([syn_ack[38], syn_ack[39], syn_ack[40], syn_ack[41]]);
        let acknowledgment = theirs.wrapping_add(1);
        let ack = (1, acknowledgment);
        self.segment(&guest_tcp(guest, outside(), ack, (ACK, WINDOW), &[], &[]));
        self.flush();
        let owner = owner.expect("the host connected");
        self.flows.push(Flow {
            guest,
            socket: self.up.socket_of(owner).expect("it is open"),
            owner,
            sequence: 1,
            acknowledgment,
        });
    }

    /// Puts a flow's numbers into any segment of the guest.
    fn address(&mut self, frame: &mut [u8], payload: u32) {
        self.next = (self.next + 1) % self.flows.len();
        let flow = &mut self.flows[self.next];
        frame[34..36].copy_from_slice(&flow.guest.port().to_be_bytes());
        frame[38..42].copy_from_slice(&flow.sequence.to_be_bytes());
        frame[42..46].copy_from_slice(&flow.acknowledgment.to_be_bytes());
        flow.sequence = flow.sequence.wrapping_add(payload);
    }

    /// A batch of segments, of the flows in turn.
    fn up(&mut self, frame: &mut [u8]) {
        for _ in 0..BATCH {
            self.address(frame, MSS as u32);
            self.segment(frame);
        }
        self.flush();
    }

    /// The outside sends, the guest acknowledges.
    fn down(&mut self, bytes: &[u8], ack: &mut [u8]) {
        let before = self.log.count;
        self.address(ack, 0);
        let flow = &mut self.flows[self.next];
        let SockOwner::Tcp(id) = flow.owner else {
            unreachable!("a TCP flow's")
        };
        self.up.peer_send(flow.socket, bytes);
        flow.acknowledgment = flow.acknowledgment.wrapping_add(bytes.len() as u32);
        ack[42..46].copy_from_slice(&flow.acknowledgment.to_be_bytes());
        let ready = Ready {
            readable: true,
            ..Ready::default()
        };
        self.nat
            .handle_ready(id, ready, self.now, (&mut self.up, &mut self.log));
        self.flush();
        assert!(self.log.count > before, "nothing came");
        self.segment(ack);
        self.flush();
    }
}

fn tcp_up() -> Piece {
    let mut tcp = Tcp::new();
    let mut frame = guest_tcp(guest(1), outside(), (1, 1), (ACK, WINDOW), &[], &[7; MSS]);
    Piece {
        name: "tcp-up-64-segments",
        work: Box::new(move |count| (0..count).for_each(|_| tcp.up(&mut frame))),
        reference: reference::copy(BATCH * MSS),
    }
}

fn tcp_down() -> Piece {
    let mut tcp = Tcp::new();
    let mut ack = guest_tcp(guest(1), outside(), (1, 1), (ACK, WINDOW), &[], &[]);
    let bytes = vec![7; DOWN_BYTES];
    Piece {
        name: "tcp-down-60k",
        work: Box::new(move |count| (0..count).for_each(|_| tcp.down(&bytes, &mut ack))),
        reference: reference::copy(DOWN_BYTES),
    }
}

/// UDP mappings of a guest, and a scripted host.
struct Udp {
    nat: UdpNat,
    up: FakeUplink,
    log: FrameLog,
    errors: ErrorSender,
    egress: Egress,
}

impl Udp {
    fn new() -> Self {
        let limits = Limits {
            total: 20_000,
            per_guest: 20_000,
            per_port: usize::MAX,
        };
        let mut udp = Self {
            nat: UdpNat::new(lan(), limits),
            up: FakeUplink::new(1),
            log: FrameLog::default(),
            errors: ErrorSender::new(),
            egress: egress(),
        };
        (udp.log.keep, udp.up.keep_sent) = (false, false);
        udp
    }

    fn send(&mut self, frame: &[u8], offload: Offload) {
        let packet = parse(frame, offload);
        let (ip, udp) = packet.udp4().expect("a datagram");
        let (now, answers) = (Instant::from_secs(1), (&mut self.log, &mut self.errors));
        let sent = self.nat.handle_packet(
            &packet,
            (&ip.any(), udp),
            &mut self.egress,
            now,
            &mut self.up,
            answers,
        );
        assert!(black_box(sent).is_ok());
    }
}

fn udp_up() -> Piece {
    let mut udp = Udp::new();
    let frame = |n| guest_udp(guest(2_000 + n), outside(), 64, &[7; 64]);
    let frames: Vec<_> = (0..MAPPINGS).map(frame).collect();
    let mut next = 0;
    Piece {
        name: "udp-up-64-mappings",
        work: Box::new(move |count| {
            for _ in 0..count {
                next = (next + 37) % frames.len();
                udp.send(&frames[next], Offload::default());
            }
        }),
        reference: reference::look_ups(1_000),
    }
}

fn udp_train() -> Piece {
    let mut udp = Udp::new();
    let (frame, offload) = pieces::train();
    Piece {
        name: "udp-up-train",
        work: Box::new(move |count| (0..count).for_each(|_| udp.send(&frame, offload))),
        reference: reference::look_ups(1_000),
    }
}

fn udp_down() -> Piece {
    let mut udp = Udp::new();
    udp.send(
        &guest_udp(guest(5_000), outside(), 64, b"x"),
        Offload::default(),
    );
    let (socket, owner) = udp.up.open_sockets()[0];
    let SockOwner::Udp(id) = owner else {
        unreachable!("a mapping's")
    };
    let payload = vec![7; MSS];
    let mut down = move || {
        let before = udp.log.count;
        for _ in 0..DATAGRAMS {
            udp.up.deliver(socket, outside(), &payload, None);
        }
        udp.nat.handle_ready(
            id,
            Ready::default(),
            &udp.egress,
            Instant::from_secs(1),
            (&mut udp.up, &mut udp.log, &mut udp.errors),
            &mut |reason| panic!("{reason:?}"),
        );
        assert!(udp.log.count > before, "nothing came");
    };
    Piece {
        name: "udp-down-32-datagrams",
        work: Box::new(move |count| (0..count).for_each(|_| down())),
        reference: reference::copy(DATAGRAMS * MSS),
    }
}
