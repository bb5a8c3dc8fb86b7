//! The NAT's TCP against a second smoltcp as the guest and a scripted host, under a virtual clock.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::wire::{HardwareAddress, IpCidr};

use super::*;
use crate::frame::Duration;
use crate::nat::SockId;
use crate::nat::testing::{self, Connect, FakeUplink, FrameLog, GUEST, GUEST_MAC, GUEST6};
use crate::offload::{Csum, Gso};
use crate::wire::Body;

mod rfc5382;

const SERVER6: SocketAddr = SocketAddr::new(
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2)),
    80,
);
const SERVER: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(198, 51, 100, 2)), 80);

/// The guest's network card: IP packets in and out.
#[derive(Default)]
struct Card {
    inbox: VecDeque<Vec<u8>>,
    outbox: VecDeque<Vec<u8>>,
}

struct Taken(Vec<u8>);
struct Made<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Taken {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Made<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        self.0.push_back(packet);
        result
    }
}

impl Device for Card {
    type RxToken<'a> = Taken;
    type TxToken<'a> = Made<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Taken, Made<'_>)> {
        let packet = self.inbox.pop_front()?;
        Some((Taken(packet), Made(&mut self.outbox)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Made<'_>> {
        Some(Made(&mut self.outbox))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = 1500;
        capabilities.checksum = ChecksumCapabilities::ignored();
        capabilities
    }
}

/// A guest, the NAT and the host.
struct Lab {
    /// Where the guest connects to.
    server: SocketAddr,
    /// The guest's address of the same family.
    address: IpAddr,
    nat: TcpNat,
    up: FakeUplink,
    log: FrameLog,
    now: Instant,
    card: Card,
    guest: Interface,
    sockets: SocketSet<'static>,
    /// Largest GSO frame seen toward the guest, payload and segment size.
    largest: (usize, u16),
    /// Whether packets to the guest of so many bytes get through to it.
    path_mtu: usize,
    /// The first that did not: where it began, and what it was.
    too_big: Option<(u32, SocketAddr, SocketAddr)>,
}

impl Lab {
    fn new() -> Self {
        Self::with(SERVER, GUEST.into())
    }

    /// The same over IPv6.
    fn new6() -> Self {
        Self::with(SERVER6, GUEST6.into())
    }

    fn with(server: SocketAddr, address: IpAddr) -> Self {
        let now = Instant::from_secs(100);
        let mut card = Card::default();
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = 7;
        let mut guest = Interface::new(config, &mut card, now);
        guest.update_ip_addrs(|addresses| addresses.push(IpCidr::new(address.into(), 24)).unwrap());
        guest.set_any_ip(true);
        Lab {
            server,
            address,
            nat: TcpNat::new(testing::lan(), 64, now),
            up: FakeUplink::new(1),
            log: FrameLog::default(),
            now,
            card,
            guest,
            sockets: SocketSet::new(Vec::new()),
            largest: (0, 0),
            path_mtu: usize::MAX,
            too_big: None,
        }
    }

    fn connect(&mut self, port: u16) -> SocketHandle {
        let ring = |len| tcp::SocketBuffer::new(vec![0; len]);
        let mut socket = tcp::Socket::new(ring(256 * 1024), ring(256 * 1024));
        socket.set_ack_delay(None);
        socket
            .connect(
                self.guest.context(),
                (self.server.ip(), self.server.port()),
                (self.address, port),
            )
            .unwrap();
        self.sockets.add(socket)
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Hands one IP packet of the guest to the NAT.
    fn guest_sends(&mut self, packet: &[u8]) -> Result<(), DropReason> {
        let mut frame = vec![0; 14];
        let v4 = packet[0] >> 4 == 4;
        let ethertype = if v4 { 0x0800 } else { 0x86dd };
        crate::wire::write_ethernet(&mut frame, testing::GATEWAY_MAC, GUEST_MAC, ethertype);
        frame.extend_from_slice(packet);
        if v4 {
            let sum = crate::wire::checksum::sum(&frame[14..34]);
            let sum = sum - u64::from(crate::wire::be16(&frame, 24));
            let sum = !crate::wire::checksum::fold(sum);
            frame[24..26].copy_from_slice(&sum.to_be_bytes());
        }
        let offload = Offload {
            csum: Csum::Valid,
            ..Offload::default()
        };
        let packet = testing::parse(&frame, offload);
        let ip = packet.ip().expect("IP only");
        let crate::wire::Transport::Tcp(tcp) = &ip.transport else {
            panic!("TCP only")
        };
        let result = self.nat.handle_packet(
            &packet,
            (&ip, tcp),
            Target::Address(self.server),
            self.now,
            (&mut self.up, &mut self.log),
        );
        self.nat.flush(self.now, &mut self.up, &mut self.log);
        result
    }

    /// Lets everything happen that can happen now; returns whether anything did.
    fn step(&mut self) -> bool {
        let mut moved = false;
        let _ = self.guest.poll(self.now, &mut self.card, &mut self.sockets);
        while let Some(packet) = self.card.outbox.pop_front() {
            moved = true;
            let _ = self.guest_sends(&packet);
        }
        moved |= self.host_events();
        if self.nat.poll_timeout().is_some_and(|due| due <= self.now) {
            self.nat
                .handle_timeout(self.now, &mut self.up, &mut self.log);
        }
        while let Some((frame, offload)) = self.log.pop() {
            moved = true;
            self.check_frame(&frame, offload);
            if !self.passes(&frame, offload) {
                continue;
            }
            self.card.inbox.push_back(frame[14..].to_vec());
        }
        moved || self.nat.has_backlog()
    }

    fn host_events(&mut self) -> bool {
        let mut moved = false;
        while let Some((owner, ready)) = self.up.poll_event() {
            let SockOwner::Tcp(id) = owner else {
                panic!("TCP only")
            };
            moved = true;
            self.nat
                .handle_ready(id, ready, self.now, (&mut self.up, &mut self.log));
        }
        self.nat.flush(self.now, &mut self.up, &mut self.log);
        moved
    }

    /// Whether the packets of a frame fit the path.
    fn passes(&mut self, frame: &[u8], offload: Offload) -> bool {
        let packet = testing::parse(frame, offload);
        let ip = packet.ip().expect("IP only");
        let crate::wire::Transport::Tcp(tcp) = &ip.transport else {
            return true;
        };
        let payload = match offload.gso {
            Gso::Tcp4(mss) | Gso::Tcp6(mss) => usize::from(mss),
            _ => tcp.payload.len(),
        };
        let fits = ip.header_len + tcp.header.len() + payload <= self.path_mtu;
        if !fits {
            let from = SocketAddr::new(ip.source, tcp.source_port);
            let to = SocketAddr::new(ip.destination, tcp.destination_port);
            self.too_big.get_or_insert((tcp.sequence, from, to));
        }
        fits
    }

    /// A router behind `port` says that a segment was too big.
    fn report(
        &mut self,
        port: PortId,
        mtu: u16,
        (sequence, outside, guest): (u32, SocketAddr, SocketAddr),
    ) -> Result<(), DropReason> {
        let report = TooBig {
            mtu,
            guest,
            outside,
            quoted: crate::nat::path_mtu::Quoted::Tcp(sequence),
        };
        let io = (&mut self.up, &mut self.log);
        self.nat.heed(port, (&report, sequence), self.now, io)
    }

    fn check_frame(&mut self, frame: &[u8], offload: Offload) {
        let packet = testing::parse(frame, offload);
        assert_eq!(packet.destination, GUEST_MAC);
        if let Gso::Tcp4(mss) | Gso::Tcp6(mss) = offload.gso {
            let ip = packet.ip().expect("IP only");
            let v4 = matches!(offload.gso, Gso::Tcp4(_));
            assert_eq!(v4, ip.source.is_ipv4());
            let crate::wire::Transport::Tcp(tcp) = &ip.transport else {
                return;
            };
            assert!(tcp.payload.len() > usize::from(mss));
            self.largest = self.largest.max((tcp.payload.len(), mss));
        }
    }

    fn settle(&mut self) {
        for _ in 0..100_000 {
            if !self.step() {
                return;
            }
        }
        panic!("the lab never comes to rest");
    }

    fn sleep(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now = (self.now + Duration::from_millis(64)).min(end);
            self.settle();
        }
    }

    fn host(&self) -> SockId {
        let sockets = self.up.open_sockets();
        assert_eq!(sockets.len(), 1);
        sockets[0].0
    }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|n| (n as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0] ^ seed)
        .collect()
}

/// Sends `data` from the guest while the host takes it; returns what arrived.
fn upload(lab: &mut Lab, handle: SocketHandle, data: &[u8]) -> Vec<u8> {
    let host = lab.host();
    let (mut sent, mut arrived) = (0, Vec::new());
    for _ in 0..1_000_000 {
        if sent < data.len() {
            sent += lab.socket(handle).send_slice(&data[sent..]).unwrap();
        }
        let moved = lab.step();
        arrived.extend(lab.up.peer_recv(host));
        if arrived.len() == data.len() {
            break;
        }
        if !moved {
            lab.now += Duration::from_millis(64);
        }
    }
    arrived
}

fn download(lab: &mut Lab, handle: SocketHandle, len: usize) -> Vec<u8> {
    let mut arrived = Vec::new();
    for _ in 0..1_000_000 {
        let moved = lab.step();
        let mut buffer = vec![0; 100_000];
        let taken = lab.socket(handle).recv_slice(&mut buffer).unwrap_or(0);
        arrived.extend_from_slice(&buffer[..taken]);
        if arrived.len() >= len {
            break;
        }
        if !moved {
            lab.now += Duration::from_millis(64);
        }
    }
    arrived
}

#[test]
fn the_guest_is_answered_only_once_the_outside_has() {
    let mut lab = Lab::new();
    lab.up.connect_default = Connect::Wait;
    let handle = lab.connect(1000);
    lab.sleep(Duration::from_secs(3));
    assert_eq!(lab.socket(handle).state(), tcp::State::SynSent);
    assert_eq!(lab.nat.len(), 1);
    lab.up.finish_connect(lab.host(), Ok(()));
    lab.settle();
    assert_eq!(lab.socket(handle).state(), tcp::State::Established);
    assert_eq!(lab.nat.counters().opened, 1);
}

#[test]
fn a_refused_connection_is_reset_and_leaves_nothing() {
    for outcome in [
        Connect::Fail(HostError::Refused),
        Connect::FailAtOnce(HostError::Refused),
    ] {
        let mut lab = Lab::new();
        lab.up.connect_default = outcome;
        let handle = lab.connect(1000);
        lab.settle();
        assert_eq!(lab.socket(handle).state(), tcp::State::Closed);
        assert_eq!((lab.nat.len(), lab.up.open_count()), (0, 0));
        assert_eq!(lab.nat.counters().failed, 1);
    }
}

/// It is neither closed nor unreachable: the guest asks again.
#[test]
fn without_a_port_of_the_host_a_syn_is_dropped() {
    let mut lab = Lab::new();
    lab.up.connect_default = Connect::FailAtOnce(HostError::NoPort);
    let from = SocketAddr::new(GUEST.into(), 1000);
    let syn = testing::guest_tcp(from, SERVER, (7, 0), (Tcp::SYN, 1000), &[], b"");
    assert_eq!(lab.guest_sends(&syn[14..]), Err(DropReason::OutOfPorts));
    assert!(lab.log.pop().is_none());
    assert_eq!((lab.nat.len(), lab.nat.counters().failed), (0, 0));
    lab.up.connect_default = Connect::Succeed;
    assert_eq!(lab.guest_sends(&syn[14..]), Ok(()));
}

#[test]
fn an_unreachable_destination_is_answered_with_icmp() {
    let mut lab = Lab::new();
    lab.up.connect_default = Connect::Fail(HostError::HostUnreachable);
    lab.connect(1000);
    let _ = lab.guest.poll(lab.now, &mut lab.card, &mut lab.sockets);
    let syn = lab.card.outbox.pop_front().unwrap();
    lab.guest_sends(&syn).unwrap();
    let (owner, ready) = lab.up.poll_event().unwrap();
    let SockOwner::Tcp(id) = owner else {
        panic!("TCP only")
    };
    lab.nat
        .handle_ready(id, ready, lab.now, (&mut lab.up, &mut lab.log));
    let (frame, offload) = lab.log.pop().unwrap();
    let packet = testing::parse(&frame, offload);
    let Body::Ipv4(ip) = &packet.body else {
        panic!("IPv4 only")
    };
    let crate::wire::Transport::Icmp(message) = ip.transport else {
        panic!("{ip:?}")
    };
    assert_eq!(message[..2], [3, 1]);
    assert_eq!(message[8 + 12..8 + 20], syn[12..20]);
    assert_eq!((lab.nat.len(), lab.up.open_count()), (0, 0));
}

#[test]
fn streams_arrive_whole_in_both_directions_over_a_slow_host() {
    let mut lab = Lab::new();
    (lab.up.send_max, lab.up.recv_max, lab.up.send_room) = (10_007, 30_011, 50_000);
    let handle = lab.connect(1000);
    lab.settle();
    let host = lab.host();
    let (up, down) = (pattern(3_000_000, 1), pattern(3_000_000, 2));
    assert!(upload(&mut lab, handle, &up) == up);
    lab.up.peer_send(host, &down);
    assert!(download(&mut lab, handle, down.len()) == down);
    // Whole segments of the guest's MSS, many to a frame.
    assert_eq!(lab.largest.1, 1460);
    assert!(lab.largest.0 > 20 * 1460, "{:?}", lab.largest);
}

#[test]
fn either_side_may_close_first_and_the_other_goes_on() {
    // The guest first.
    let mut lab = Lab::new();
    let handle = lab.connect(1000);
    lab.settle();
    let host = lab.host();
    lab.socket(handle).send_slice(b"request").unwrap();
    lab.socket(handle).close();
    lab.settle();
    assert_eq!(lab.up.peer_recv(host), b"request");
    assert!(lab.up.fin_sent(host));
    lab.up.peer_send(host, &pattern(200_000, 3));
    assert!(download(&mut lab, handle, 200_000) == pattern(200_000, 3));
    lab.up.peer_shutdown(host);
    lab.settle();
    assert_eq!((lab.nat.len(), lab.up.open_count()), (0, 0));
    assert!(!lab.up.closed[0].aborted);
    assert_eq!(lab.nat.counters().reset, 0);

    // The outside first.
    let handle = lab.connect(1001);
    lab.settle();
    let host = lab.host();
    lab.up.peer_send(host, b"banner");
    lab.up.peer_shutdown(host);
    lab.settle();
    let mut banner = [0; 16];
    assert_eq!(lab.socket(handle).recv_slice(&mut banner), Ok(6));
    assert_eq!(lab.socket(handle).state(), tcp::State::CloseWait);
    let data = pattern(300_000, 4);
    assert!(upload(&mut lab, handle, &data) == data);
    lab.socket(handle).close();
    lab.settle();
    assert_eq!((lab.nat.len(), lab.up.open_count()), (0, 0));
    assert!(!lab.up.closed[1].aborted);
    assert_eq!(lab.nat.counters().reset, 0);
}

#[test]
fn data_behind_a_stalled_host_survives_the_guests_close() {
    let mut lab = Lab::new();
    lab.up.send_room = 1_000;
    let handle = lab.connect(1000);
    lab.settle();
    let host = lab.host();
    let data = pattern(100_000, 5);
    lab.socket(handle).send_slice(&data).unwrap();
    lab.up.peer_shutdown(host);
    lab.settle();
    lab.socket(handle).close();
    // Longer than smoltcp's TIME-WAIT, after which it forgets its receive ring.
    lab.sleep(Duration::from_secs(30));
    assert_eq!(lab.nat.len(), 1);
    let mut arrived = Vec::new();
    while lab.nat.len() == 1 && arrived.len() < data.len() {
        arrived.extend(lab.up.peer_recv(host));
        lab.settle();
    }
    if let Some(&(host, _)) = lab.up.open_sockets().first() {
        arrived.extend(lab.up.peer_recv(host));
    }
    // The last piece left with the close, which the script no longer shows.
    assert!(arrived.len() >= data.len() - 1_000, "{}", arrived.len());
    assert!(data.starts_with(&arrived));
    lab.sleep(Duration::from_secs(1));
    assert_eq!((lab.nat.len(), lab.up.open_count()), (0, 0));
    assert!(!lab.up.closed[0].aborted);
}

#[test]
fn a_reset_of_one_side_resets_the_other() {
    let mut lab = Lab::new();
    let handle = lab.connect(1000);
    lab.settle();
    lab.socket(handle).abort();
    lab.settle();
    assert_eq!((lab.nat.len(), lab.up.open_count()), (0, 0));
    assert!(lab.up.closed[0].aborted);

    let handle = lab.connect(1001);
    lab.settle();
    let host = lab.host();
    lab.up.peer_break(host, HostError::Reset);
    lab.settle();
    assert_eq!(lab.socket(handle).state(), tcp::State::Closed);
    assert_eq!((lab.nat.len(), lab.up.open_count()), (0, 0));
    assert_eq!(lab.nat.counters().reset, 2);
}

#[test]
fn what_the_outside_said_before_it_reset_still_arrives() {
    // As a web server that refuses an upload: it answers, and closes with the upload unread.
    let mut lab = Lab::new();
    lab.up.send_room = 1_000;
    let handle = lab.connect(1000);
    lab.settle();
    let host = lab.host();
    lab.socket(handle).send_slice(&pattern(50_000, 1)).unwrap();
    lab.settle();
    let answer = pattern(300_000, 2);
    lab.up.peer_send(host, &answer);
    lab.up.peer_break(host, HostError::Reset);
    assert!(download(&mut lab, handle, answer.len()) == answer);
    lab.settle();
    assert_eq!(lab.socket(handle).state(), tcp::State::Closed);
    assert_eq!((lab.nat.len(), lab.up.open_count()), (0, 0));
    assert!(lab.up.closed[0].aborted);
}

#[test]
fn a_broken_connection_is_reset_even_if_the_guest_reads_nothing() {
    let mut lab = Lab::new();
    let handle = lab.connect(1000);
    lab.settle();
    let host = lab.host();
    lab.up.peer_send(host, &pattern(2_000_000, 2));
    lab.settle();
    lab.up.peer_break(host, HostError::Reset);
    lab.settle();
    assert_eq!(lab.nat.len(), 1);
    lab.sleep(Duration::from_secs(3));
    assert_eq!((lab.nat.len(), lab.up.open_count()), (0, 0));
    assert_eq!(lab.socket(handle).state(), tcp::State::Closed);
}

#[test]
fn a_flow_that_wakes_now_and_then_keeps_few_timers() {
    let mut lab = Lab::new();
    let handle = lab.connect(1000);
    lab.settle();
    let host = lab.host();
    let mut most = 0;
    for _ in 0..720 {
        lab.socket(handle).send_slice(b"beat").unwrap();
        lab.sleep(Duration::from_secs(5));
        assert_eq!(lab.up.peer_recv(host), b"beat");
        most = most.max(lab.nat.wheel.len());
    }
    // One that counts, and those left over from earlier deadlines within the wheel's 33 s.
    assert!(most <= 20, "{most} entries for one flow");
}

#[test]
fn one_port_can_not_take_all_flows() {
    let mut lab = Lab::new();
    lab.up.connect_default = Connect::Wait;
    lab.nat = TcpNat::new(testing::lan(), 16, lab.now);
    let syn = |port| {
        let from = SocketAddr::new(GUEST.into(), port);
        testing::guest_tcp(from, SERVER, (1, 0), (0x02, 1000), &[], b"")
    };
    for port in 1..=12 {
        assert_eq!(lab.guest_sends(&syn(port)[14..]), Ok(()));
    }
    assert_eq!(lab.guest_sends(&syn(13)[14..]), Err(DropReason::Limit));
    assert_eq!(lab.nat.len(), 12);
    // A reset connect frees its place.
    let from = SocketAddr::new(GUEST.into(), 1);
    let reset = testing::guest_tcp(from, SERVER, (2, 0), (0x04, 0), &[], b"");
    lab.guest_sends(&reset[14..]).unwrap();
    assert_eq!(lab.guest_sends(&syn(13)[14..]), Ok(()));
    lab.nat.forget_port(PortId(1), &mut lab.up);
    assert_eq!((lab.nat.len(), lab.nat.connecting.held().total()), (0, 0));
    assert_eq!(lab.nat.held().total(), 0);
    assert!(
        lab.nat
            .ports
            .iter()
            .all(|load| (load.flows, load.busy) == (0, 0))
    );
}

#[test]
fn a_stray_segment_is_reset_and_counted() {
    let mut lab = Lab::new();
    let from = SocketAddr::new(GUEST.into(), 5555);
    let ack = testing::guest_tcp(from, SERVER, (1000, 77), (0x10, 1000), &[], b"data");
    assert_eq!(lab.guest_sends(&ack[14..]), Err(DropReason::NoFlow));
    let (frame, offload) = lab.log.pop().unwrap();
    let packet = testing::parse(&frame, offload);
    let Body::Ipv4(crate::wire::Ipv4 {
        transport: crate::wire::Transport::Tcp(tcp),
        ..
    }) = packet.body
    else {
        panic!("TCP only")
    };
    assert_eq!((tcp.flags & 0x07, tcp.sequence), (0x04, 77));
    // A RST is never answered (RFC 9293 3.10.7.1), and port 0 is nobody's.
    let rst = testing::guest_tcp(from, SERVER, (1000, 77), (0x04, 0), &[], b"");
    assert_eq!(lab.guest_sends(&rst[14..]), Err(DropReason::NoFlow));
    let zero = SocketAddr::new(SERVER.ip(), 0);
    let syn = testing::guest_tcp(from, zero, (1000, 0), (0x02, 1000), &[], b"");
    assert_eq!(lab.guest_sends(&syn[14..]), Err(DropReason::Malformed));
    assert!(lab.log.pop().is_none());
}

#[test]
fn flows_and_half_open_connects_are_bounded() {
    let mut lab = Lab::new();
    lab.up.connect_default = Connect::Wait;
    for port in 1..=70 {
        let syn = testing::guest_tcp(
            SocketAddr::new(GUEST.into(), port),
            SERVER,
            (1, 0),
            (0x02, 1000),
            &[],
            b"",
        );
        let expected = if port <= 48 {
            Ok(())
        } else {
            Err(DropReason::Limit)
        };
        assert_eq!(lab.guest_sends(&syn[14..]), expected);
    }
    assert_eq!(
        (
            lab.nat.len(),
            lab.up.open_count(),
            lab.nat.counters().limited
        ),
        (48, 48, 22)
    );
    lab.sleep(TRANSITORY_IDLE + Duration::from_secs(40));
    assert_eq!((lab.nat.len(), lab.up.open_count()), (0, 0));
    assert_eq!(lab.nat.counters().idled_out, 48);
}

#[test]
fn rings_given_back_while_idle_lose_nothing() {
    let mut lab = Lab::new();
    let handle = lab.connect(1000);
    lab.settle();
    let host = lab.host();
    for round in 0..5 {
        let data = pattern(700_000, round);
        assert!(upload(&mut lab, handle, &data) == data);
        lab.up.peer_send(host, &data);
        assert!(download(&mut lab, handle, data.len()) == data);
        lab.sleep(Duration::from_secs(5));
    }
}

#[test]
fn a_gone_port_takes_its_flows_along() {
    let mut lab = Lab::new();
    lab.connect(1000);
    lab.settle();
    lab.nat.forget_port(PortId(2), &mut lab.up);
    assert_eq!(lab.nat.len(), 1);
    lab.nat.forget_port(PortId(1), &mut lab.up);
    assert_eq!((lab.nat.len(), lab.up.open_count()), (0, 0));
    assert!(lab.up.closed[0].aborted);
}

#[test]
fn segments_beyond_the_window_neither_panic_nor_truncate() {
    // What makes a bare smoltcp 0.14.0 panic: until its first ACK it accepts 65,535 << scale bytes,
    // twice its ring. A segment across the ring's end is noted as received whole, and filling the
    // gap before it overruns the ring.
    let mut lab = Lab::new();
    let from = SocketAddr::new(GUEST.into(), 1000);
    let options = [2, 4, 5, 180, 1, 3, 3, 7];
    let syn = testing::guest_tcp(from, SERVER, (0, 0), (0x02, 65535), &options, b"");
    lab.guest_sends(&syn[14..]).unwrap();
    lab.host_events();
    let host = lab.host();
    let (syn_ack, _) = lab.log.pop().unwrap();
    let ours = u32::from_be_bytes([syn_ack[38], syn_ack[39], syn_ack[40], syn_ack[41]]);
    let data = pattern(64_000, 9);
    let ack = ours.wrapping_add(1);
    let send = |lab: &mut Lab, at: u32, len: usize| {
        let segment = testing::guest_tcp(
            from,
            SERVER,
            (1 + at, ack),
            (0x11, 65535),
            &[],
            &data[..len],
        );
        let _ = lab.guest_sends(&segment[14..]);
    };
    // The host takes nothing, so that the ring fills.
    lab.up.send_room = 0;
    send(&mut lab, 500_000, 60_000);
    for at in (0..500_000).step_by(50_000) {
        let segment = testing::guest_tcp(
            from,
            SERVER,
            (1 + at, ack),
            (0x10, 65535),
            &[],
            &data[..50_000],
        );
        let _ = lab.guest_sends(&segment[14..]);
    }
    assert_eq!(lab.nat.counters().faults, 0);
    // The FIN beyond the window were not believed.
    assert!(!lab.up.fin_sent(host));
    // Only what fitted the ring was acknowledged.
    let (last, _) = std::iter::from_fn(|| lab.log.pop()).last().unwrap();
    let acknowledged = u32::from_be_bytes([last[42], last[43], last[44], last[45]]);
    assert!(acknowledged - 1 <= 512 * 1024, "{acknowledged}");
}

#[test]
fn random_segments_never_fault_a_flow() {
    let mut random = 0x2545_f491_4f6c_dd1du64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let data = pattern(65_000, 1);
    let mut lab = Lab::new();
    lab.log.keep = false;
    let mut port = 1000;
    for case in 0..300_000 {
        if case % 50 == 0 {
            port = port % 60_000 + 1;
            let syn = testing::guest_tcp(
                SocketAddr::new(GUEST.into(), port),
                SERVER,
                (0, 0),
                (0x02, 65535),
                &[2, 4, 5, 180, 3, 3, 7, 0],
                b"",
            );
            let _ = lab.guest_sends(&syn[14..]);
            lab.host_events();
            lab.now += Duration::from_secs(next() % 30);
            lab.nat.handle_timeout(lab.now, &mut lab.up, &mut lab.log);
            for (host, _) in lab.up.open_sockets() {
                if next() % 2 == 0 {
                    let _ = lab.up.peer_recv(host);
                }
            }
        }
        let sequence = match next() % 5 {
            4 => 440_000 + (next() % 100_000) as u32,
            0 => (next() % 70_000) as u32,
            1 => (next() % 1_200_000) as u32,
            2 => next() as u32,
            _ => 1,
        };
        let len = (next() % 3_000) as usize * if next() % 8 == 0 { 20 } else { 1 };
        let flags = if next() % 4 == 0 { next() as u8 } else { 0x10 };
        let segment = testing::guest_tcp(
            SocketAddr::new(GUEST.into(), port),
            SERVER,
            (sequence, next() as u32),
            (flags, next() as u16),
            &[],
            &data[..len],
        );
        let _ = lab.guest_sends(&segment[14..]);
    }
    assert_eq!(lab.nat.counters().faults, 0);
}

#[test]
fn ipv6_streams_arrive_whole_in_both_directions() {
    let mut lab = Lab::new6();
    let handle = lab.connect(1000);
    lab.settle();
    assert_eq!(lab.up.peer(lab.host()), SERVER6);
    let data = pattern(3_000_000, 1);
    assert!(upload(&mut lab, handle, &data) == data);
    let host = lab.host();
    lab.up.peer_send(host, &data);
    assert!(download(&mut lab, handle, data.len()) == data);
    // 1,500 less 40 and 20, in super-frames of whole segments.
    assert_eq!(lab.largest, (45 * 1440, 1440));
}

#[test]
fn ipv6_refusals_are_reset() {
    let mut lab = Lab::new6();
    lab.up.connect_default = Connect::Fail(HostError::Refused);
    let handle = lab.connect(1000);
    lab.settle();
    assert_eq!(lab.socket(handle).state(), tcp::State::Closed);
    assert_eq!((lab.nat.len(), lab.up.open_count()), (0, 0));
}

impl Lab {
    /// A guest's server.
    fn listen(&mut self, port: u16) -> SocketHandle {
        let ring = |len| tcp::SocketBuffer::new(vec![0; len]);
        let mut socket = tcp::Socket::new(ring(256 * 1024), ring(256 * 1024));
        socket.set_ack_delay(None);
        socket.listen(port).unwrap();
        self.sockets.add(socket)
    }

    /// A connection from outside that a forward takes on to the guest's port.
    fn open_to_guest(&mut self, port: u16, shown: SocketAddr) -> Result<SockId, DropReason> {
        let owner = SockOwner::Forward(FlowId {
            slot: 0,
            generation: 0,
        });
        let listener = self.up.listen(owner);
        self.up.knock(listener, Some(shown));
        let (host, _) = self.up.accept(listener, owner).unwrap().unwrap();
        self.up.close(listener);
        let guest = (SocketAddr::new(self.address, port), GUEST_MAC, PortId(1));
        let host_end = (host, ForwardId(1));
        self.nat
            .open_to_guest(host_end, guest, shown, self.now, &mut self.up)?;
        Ok(host)
    }
}

#[test]
fn a_connection_from_outside_reaches_the_guests_server() {
    for (mut lab, client) in [
        (Lab::new(), "203.0.113.9:5000"),
        (Lab::new6(), "[2001:db8::9]:5000"),
    ] {
        let client: SocketAddr = client.parse().unwrap();
        let handle = lab.listen(80);
        let host = lab.open_to_guest(80, client).unwrap();
        // The client speaks at once, and its end has come before the guest has answered.
        let data = pattern(500_000, 3);
        lab.up.peer_send(host, &data);
        lab.up.peer_shutdown(host);
        assert!(download(&mut lab, handle, data.len()) == data);
        let remote = lab.socket(handle).remote_endpoint().unwrap();
        assert_eq!(
            (remote.port, IpAddr::from(remote.addr)),
            (5000, client.ip())
        );
        lab.settle();
        assert_eq!(lab.socket(handle).state(), tcp::State::CloseWait);
        let answer = pattern(500_000, 4);
        assert!(upload(&mut lab, handle, &answer) == answer);
        lab.socket(handle).close();
        lab.settle();
        assert_eq!((lab.nat.len(), lab.up.open_count()), (0, 0));
        let counters = lab.nat.counters();
        assert_eq!(
            (counters.accepted, counters.reset, counters.faults),
            (1, 0, 0)
        );
        assert!(!lab.up.closed.last().unwrap().aborted);
    }
}

#[test]
fn a_guest_that_refuses_resets_the_client() {
    let mut lab = Lab::new();
    let client = "203.0.113.9:5000".parse().unwrap();
    lab.open_to_guest(81, client).unwrap();
    assert!(lab.nat.has_flow(SocketAddr::new(lab.address, 81), client));
    assert_eq!(lab.open_to_guest(81, client), Err(DropReason::Limit));
    lab.settle();
    assert_eq!(lab.nat.len(), 0);
    assert!(lab.up.closed.last().unwrap().aborted);
}

#[test]
fn a_guest_that_is_silent_is_given_up_on() {
    let mut lab = Lab::new();
    lab.card.outbox.clear();
    let client = "203.0.113.9:5000".parse().unwrap();
    lab.open_to_guest(80, client).unwrap();
    let mut syns = 0;
    for _ in 0..300 {
        lab.now += Duration::from_secs(1);
        lab.nat.flush(lab.now, &mut lab.up, &mut lab.log);
        lab.nat.handle_timeout(lab.now, &mut lab.up, &mut lab.log);
        syns += std::iter::from_fn(|| lab.log.pop()).count();
    }
    assert!(syns > 3, "{syns}");
    assert_eq!(lab.nat.len(), 0);
    assert!(lab.up.closed.last().unwrap().aborted);
}

#[test]
fn a_flood_of_syns_is_held_to_a_rate() {
    let mut lab = Lab::new();
    lab.up.connect_default = Connect::FailAtOnce(HostError::Refused);
    let mut connects = 0u64;
    for n in 0..200_000u32 {
        // 100,000 per second.
        lab.now += Duration::from_micros(10);
        let from = SocketAddr::new(GUEST.into(), (n % 60_000) as u16 + 1);
        let syn = testing::guest_tcp(from, SERVER, (n, 0), (Tcp::SYN, 1000), &[], b"");
        let result = lab.guest_sends(&syn[14..]);
        connects += u64::from(result == Err(DropReason::HostRefused));
        lab.log.frames.clear();
    }
    let expected = OPENS_BURST + 2 * OPENS_PER_SEC;
    assert!(connects.abs_diff(expected) < 100, "{connects}");
    assert_eq!(lab.nat.len(), 0);
}

#[test]
fn connections_that_the_guest_completes_have_no_rate() {
    let mut lab = Lab::new();
    let start = lab.now;
    let rounds = OPENS_BURST + 2 * OPENS_PER_SEC;
    for n in 0..rounds {
        let handle = lab.connect((n % 60_000) as u16 + 1);
        lab.settle();
        lab.socket(handle).abort();
        lab.settle();
        lab.sockets.remove(handle);
    }
    assert!(
        lab.now < start + Duration::from_secs(1),
        "{}",
        lab.now - start
    );
    assert_eq!(lab.nat.counters().opened, rounds);
    assert_eq!((lab.nat.len(), lab.nat.counters().limited), (0, 0));
}

#[test]
fn a_guests_keep_alives_are_answered_and_asked_of_the_outside() {
    let mut lab = Lab::new();
    let handle = lab.connect(1000);
    lab.settle();
    let host = lab.host();
    assert!(!lab.up.is_watched(host));
    let keep_alive = Some(Duration::from_secs(20));
    lab.socket(handle).set_keep_alive(keep_alive);
    lab.socket(handle)
        .set_timeout(Some(Duration::from_secs(60)));
    lab.sleep(Duration::from_secs(100));
    assert_eq!(lab.socket(handle).state(), tcp::State::Established);
    assert!(lab.up.is_watched(host));
}

#[test]
fn flows_from_a_lost_address_end_and_the_others_go_on() {
    let mut lab = Lab::new();
    lab.up.outbound = Some("198.51.100.1".parse().unwrap());
    let lost = lab.connect(1000);
    lab.settle();
    lab.up.outbound = Some("198.51.100.9".parse().unwrap());
    let kept = lab.connect(1001);
    lab.settle();
    let readdress = |lab: &mut Lab, address: Option<&str>| {
        let address = address.map(|address| address.parse().unwrap());
        lab.nat
            .address_gone(address, lab.now, &mut lab.up, &mut lab.log);
        lab.settle();
    };
    readdress(&mut lab, Some("198.51.100.1"));
    assert_eq!(lab.socket(lost).state(), tcp::State::Closed);
    assert_eq!(lab.socket(kept).state(), tcp::State::Established);
    assert!(lab.up.closed.last().unwrap().aborted);
    lab.up
        .host_addresses
        .insert("198.51.100.9".parse().unwrap());
    readdress(&mut lab, None);
    assert_eq!(lab.socket(kept).state(), tcp::State::Established);
    lab.up.host_addresses.clear();
    readdress(&mut lab, None);
    assert_eq!(lab.socket(kept).state(), tcp::State::Closed);
    assert_eq!(lab.nat.counters().readdressed, 2);
}

#[test]
fn out_of_files_the_longest_idle_flow_gives_way() {
    let mut lab = Lab::new();
    let oldest = lab.connect(1000);
    lab.settle();
    lab.sleep(Duration::from_secs(60));
    let second = lab.connect(1001);
    lab.settle();
    lab.up.open_max = 2;
    let from = SocketAddr::new(GUEST.into(), 1002);
    let syn = testing::guest_tcp(from, SERVER, (7, 0), (Tcp::SYN, 1000), &[], b"");
    assert_eq!(lab.guest_sends(&syn[14..]), Err(DropReason::OutOfFiles));
    let give_up = |lab: &mut Lab| {
        let io = (&mut lab.up, &mut lab.log);
        lab.nat.give_up_idle(PortId(1).into(), lab.now, io)
    };
    assert!(!give_up(&mut lab), "both are in use");
    lab.sleep(EVICTABLE_IDLE - Duration::from_secs(30));
    assert!(give_up(&mut lab));
    assert!(!give_up(&mut lab));
    lab.settle();
    assert_eq!(lab.socket(oldest).state(), tcp::State::Closed);
    assert_eq!(lab.socket(second).state(), tcp::State::Established);
    assert_eq!(lab.guest_sends(&syn[14..]), Ok(()));
    assert_eq!(lab.nat.counters().evicted, 1);
}

#[test]
fn a_link_behind_the_guest_makes_segments_smaller_and_they_are_sent_again_at_once() {
    for (mut lab, mss) in [(Lab::new(), 1160), (Lab::new6(), 1220)] {
        let mtu = 1200;
        let handle = lab.connect(1000);
        lab.settle();
        let host = lab.host();
        let sent = pattern(100_000, 3);
        lab.up.peer_send(host, &sent);
        lab.path_mtu = if lab.address.is_ipv4() { 1200 } else { 1280 };
        lab.settle();
        assert_eq!(lab.socket(handle).recv_queue(), 0, "nothing got through");
        let (sequence, outside, guest) = lab.too_big.take().expect("it was too big");
        let port = PortId(1);

        // What is forged or late changes nothing.
        let other = |at: SocketAddr| SocketAddr::new(at.ip(), at.port() + 1);
        for (port, what) in [
            (PortId(2), (sequence, outside, guest)),
            (port, (sequence.wrapping_sub(1), outside, guest)),
            (port, (sequence.wrapping_add(1 << 20), outside, guest)),
            (port, (sequence.wrapping_add(1 << 31), outside, guest)),
            (port, (sequence, other(outside), guest)),
            (port, (sequence, outside, other(guest))),
        ] {
            assert_eq!(lab.report(port, mtu, what), Err(DropReason::NoFlow));
        }
        assert_eq!(lab.report(port, 9000, (sequence, outside, guest)), Ok(()));
        lab.settle();
        assert_eq!(
            (lab.socket(handle).recv_queue(), lab.nat.counters().narrowed),
            (0, 0)
        );

        // Without a second's wait for a timer: the clock stands still.
        let before = lab.now;
        // As it comes from the parser: IPv6 has a least MTU.
        let mtu = if lab.address.is_ipv4() { mtu } else { 1280 };
        assert_eq!(lab.report(port, mtu, (sequence, outside, guest)), Ok(()));
        assert_eq!(download(&mut lab, handle, sent.len()), sent);
        assert_eq!((lab.now, lab.nat.counters().narrowed), (before, 1));
        let flow = lab.nat.flows.iter().next().unwrap();
        assert_eq!(flow.peer.mss, mss);
        // The others that were on their way say the same.
        let again = lab.report(port, mtu, (sequence, outside, guest));
        assert_eq!(again, Err(DropReason::NoFlow), "it has arrived");
        let more = pattern(300_000, 4);
        lab.up.peer_send(host, &more);
        assert_eq!(download(&mut lab, handle, more.len()), more);
    }
}

/// A connection whose segments do not fit, and what is known of the first of them.
fn narrow() -> (Lab, SocketHandle, Vec<u8>, (u32, SocketAddr, SocketAddr)) {
    let mut lab = Lab::new();
    let handle = lab.connect(1000);
    lab.settle();
    let (host, sent) = (lab.host(), pattern(100_000, 3));
    lab.up.peer_send(host, &sent);
    lab.path_mtu = 1000;
    lab.settle();
    let segment = lab.too_big.take().expect("it was too big");
    (lab, handle, sent, segment)
}

#[test]
fn reports_of_ever_smaller_links_have_one_flight_sent_again_at_a_time() {
    let (mut lab, handle, sent, segment) = narrow();
    let flight = |lab: &mut Lab, mtu: u16| {
        let before = lab.log.count;
        assert_eq!(lab.report(PortId(1), mtu, segment), Ok(()));
        lab.log.count - before
    };
    assert!(flight(&mut lab, 1400) > 0);
    for mtu in (1000..1400).rev() {
        assert_eq!(flight(&mut lab, mtu), 0, "{mtu}");
    }
    assert_eq!(lab.nat.flows.iter().next().unwrap().peer.mss, 960);
    assert_eq!(lab.nat.counters().narrowed, 401);
    // The first flight does not fit either. What was owed comes with the interval, not with the timer of the
    // engine, which is a second or more.
    let before = lab.now;
    assert_eq!(download(&mut lab, handle, sent.len()), sent);
    assert!(lab.now - before <= super::SEND_AGAIN_INTERVAL * 2);
}

#[test]
fn an_engine_that_fails_at_a_report_loses_its_flow() {
    struct Panics(FrameLog);
    impl crate::gateway::Outbox for Panics {
        fn buffer(&mut self) -> &mut [u8] {
            self.0.buffer()
        }

        fn send(&mut self, _: usize, _: Offload) {
            panic!("as an engine would");
        }
    }
    for is_due in [true, false] {
        let (mut lab, _, _, (sequence, outside, guest)) = narrow();
        if !is_due {
            assert_eq!(
                lab.report(PortId(1), 1400, (sequence, outside, guest)),
                Ok(())
            );
        }
        let (mut out, now) = (Panics(FrameLog::default()), lab.now);
        let report = TooBig {
            mtu: 1000,
            guest,
            outside,
            quoted: crate::nat::path_mtu::Quoted::Tcp(sequence),
        };
        let io = (&mut lab.up, &mut out);
        let heeded = lab.nat.heed(PortId(1), (&report, sequence), now, io);
        if !is_due {
            let due = now + super::SEND_AGAIN_INTERVAL * 2;
            lab.nat.handle_timeout(due, &mut lab.up, &mut out);
        }
        let faulted = is_due.then_some(DropReason::FlowFault).map_or(Ok(()), Err);
        assert_eq!(heeded, faulted);
        assert_eq!((lab.nat.counters().faults, lab.nat.len()), (1, 0));
        assert!(!lab.nat.has_flow(guest, outside));
    }
}

#[test]
fn a_syn_that_goes_a_few_hops_tells_of_who_ended_it() {
    use crate::nat::testing::Reported;
    for (server, guest, router, kind) in [
        (SERVER, IpAddr::from(GUEST), "198.18.1.2", (11, 0)),
        (SERVER6, IpAddr::from(GUEST6), "2001:db8:e1::2", (3, 0)),
    ] {
        let router: IpAddr = router.parse().unwrap();
        let from = |port| SocketAddr::new(guest, port);
        let syn = |lab: &mut Lab, port, ttl| {
            let frame =
                testing::guest_tcp(from(port), server, (1, 0), (Tcp::SYN, 64_000), &[], &[]);
            let mut packet = frame[14..].to_vec();
            match guest {
                IpAddr::V4(_) => {
                    packet[8] = ttl;
                    packet[10..12].fill(0);
                }
                IpAddr::V6(_) => packet[7] = ttl,
            }
            lab.guest_sends(&packet).unwrap();
            packet
        };
        let mut lab = Lab::with(server, guest);
        lab.up.connect_default = Connect::Wait;
        for (port, ttl, hops) in [
            (1, 2, Some(1)),
            (2, 32, Some(31)),
            (3, 33, None),
            (4, 64, None),
        ] {
            syn(&mut lab, port, ttl);
            let (socket, _) = *lab.up.open_sockets().last().unwrap();
            assert_eq!(lab.up.hops(socket), hops, "{ttl}");
            // Once it is connected it goes as far as any.
            lab.up.finish_connect(socket, Ok(()));
            lab.host_events();
            assert_eq!(lab.up.hops(socket), None);
        }
        while lab.log.pop().is_some() {}
        let sent = syn(&mut lab, 5, 3);
        let (socket, _) = *lab.up.open_sockets().last().unwrap();
        lab.up.report(
            socket,
            Reported {
                to: server,
                offender: Some(router),
                kind,
                mtu: 0,
                error: HostError::HostUnreachable,
                payload: Vec::new(),
            },
        );
        lab.up
            .finish_connect(socket, Err(HostError::HostUnreachable));
        lab.host_events();
        let (frame, offload) = lab.log.pop().expect("an ICMP error");
        assert!(lab.log.pop().is_none());
        let packet = testing::parse(&frame, offload);
        let ip = packet.ip().unwrap();
        assert_eq!((ip.source, ip.destination), (router, guest));
        let crate::wire::Transport::Icmp(message) = ip.transport else {
            panic!("not ICMP")
        };
        assert_eq!((message[0], message[1]), kind);
        // Its own SYN, as it sent it: addresses, ports and sequence number.
        assert_eq!(message[8..][..sent.len()][12..], sent[12..]);
        assert_eq!(lab.nat.len(), 4);
    }
}

/// Flows that all stall, either way: what their rings take stays within the budget and a page or two each,
/// no flow ends, and everything arrives once the readers are back.
#[test]
fn ring_memory_is_bounded_and_windows_close_instead() {
    const BUDGET: usize = 2 << 20;
    const FLOWS: u16 = 40;
    for down in [false, true] {
        let mut lab = Lab::new();
        let memory = Arc::new(Budget::new(BUDGET));
        let shared = (Arc::default(), Arc::clone(&memory));
        lab.nat = TcpNat::sharing(testing::lan(), 64, shared, lab.now);
        lab.up.send_room = 1_000;
        let handles: Vec<_> = (0..FLOWS)
            .map(|n| {
                let handle = lab.connect(1_000 + n);
                lab.settle();
                handle
            })
            .collect();
        let hosts: Vec<_> = lab.up.open_sockets().iter().map(|&(id, _)| id).collect();
        let data = pattern(400_000, 3);
        let mut sent = vec![0; handles.len()];
        let mut got = vec![Vec::new(); handles.len()];
        let mut most = 0;
        if down {
            for &host in &hosts {
                lab.up.peer_send(host, &data);
            }
        }
        // Nobody reads.
        for _ in 0..5 {
            for (&handle, sent) in handles.iter().zip(&mut sent) {
                if !down {
                    *sent += lab.socket(handle).send_slice(&data[*sent..]).unwrap();
                }
            }
            lab.sleep(Duration::from_millis(640));
            most = most.max(memory.used());
        }
        let slack = usize::from(FLOWS) * 16 * 1024;
        assert!(most > BUDGET / 4, "{most}");
        assert!(most <= BUDGET + slack, "{most}");
        assert!(lab.nat.counters().short > 0);
        assert_eq!(lab.nat.len(), usize::from(FLOWS));
        // They do again.
        for round in 0..100_000 {
            for (place, (&handle, &host)) in handles.iter().zip(&hosts).enumerate() {
                if down {
                    let take = |bytes: &mut [u8]| (bytes.len(), bytes.to_vec());
                    got[place].extend(lab.socket(handle).recv(take).unwrap_or_default());
                } else {
                    got[place].extend(lab.up.peer_recv(host));
                    let rest = &data[sent[place]..];
                    sent[place] += lab.socket(handle).send_slice(rest).unwrap();
                }
            }
            lab.settle();
            most = most.max(memory.used());
            if got.iter().all(|got| got.len() == data.len()) {
                break;
            }
            if round % 20 == 19 {
                lab.now += Duration::from_millis(64);
            }
        }
        for got in &got {
            let differs = got.iter().zip(&data).position(|(got, sent)| got != sent);
            assert_eq!((differs, got.len()), (None, data.len()), "down: {down}");
        }
        assert!(most <= BUDGET + slack, "{most}");
        lab.sleep(IDLE_RELEASE * 2);
        assert_eq!(memory.used(), 0);
        drop(lab);
    }
}

#[test]
fn a_host_socket_is_bounded_once_it_has_sent_and_where_others_are() {
    let mut lab = Lab::new();
    let handles: Vec<_> = (0..40).map(|n| lab.connect(1_000 + n)).collect();
    lab.settle();
    let sockets = lab.up.open_sockets();
    let hosts: Vec<_> = sockets.iter().map(|&(id, _)| id).collect();
    assert_eq!(hosts.len(), 40);
    for &handle in &handles[..20] {
        let data = pattern(10_000, 1);
        assert_eq!(lab.socket(handle).send_slice(&data), Ok(10_000));
    }
    lab.settle();
    let bounds = |lab: &mut Lab| -> Vec<_> {
        let all = hosts.iter().map(|&host| lab.up.unsent_max(host));
        all.collect()
    };
    assert_eq!(bounds(&mut lab), [None; 40]);
    let data = pattern(10_000, 2);
    assert_eq!(lab.socket(handles[0]).send_slice(&data), Ok(10_000));
    lab.settle();
    let bounded = bounds(&mut lab).into_iter().flatten().collect::<Vec<_>>();
    assert_eq!(
        bounded,
        [2 << 20],
        "of 40 flows, and only the one that sent"
    );

    // Few flows have what the kernel gives them.
    let mut lab = Lab::new();
    let handle = lab.connect(1_000);
    lab.settle();
    let host = lab.host();
    let data = pattern(50_000, 3);
    assert_eq!(upload(&mut lab, handle, &data), data);
    assert_eq!(lab.up.unsent_max(host), None);
}
