//! Real sockets on loopback.

use super::*;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};

const TCP: SockOwner = SockOwner::Tcp(FlowId {
    slot: 5,
    generation: 9,
});
const UDP: SockOwner = SockOwner::Udp(FlowId {
    slot: 0x00ff_ffff,
    generation: u32::MAX,
});
const PING: SockOwner = SockOwner::Ping(FlowId {
    slot: 0,
    generation: 0,
});

fn uplink() -> HostUplink {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    HostUplink::new(Arc::new(epoll), Outbound::default()).unwrap()
}

/// Events within `wait_ms`, merged.
fn wait(up: &HostUplink, wait_ms: i64) -> Vec<(SockOwner, Ready)> {
    let mut events = Vec::with_capacity(8);
    let timeout = rustix::time::Timespec {
        tv_sec: wait_ms / 1000,
        tv_nsec: wait_ms % 1000 * 1_000_000,
    };
    epoll::wait(
        &*up.epoll,
        rustix::buffer::spare_capacity(&mut events),
        Some(&timeout),
    )
    .unwrap();
    events
        .iter()
        .map(|event: &epoll::Event| (owner(event.data.u64()).unwrap(), ready(event.flags)))
        .collect()
}

fn v4(address: std::net::SocketAddr) -> SocketAddr {
    match address {
        std::net::SocketAddr::V4(_) => address,
        other => panic!("{other}"),
    }
}

fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = v4(listener.local_addr().unwrap());
    (listener, address)
}

/// A connected pair: our socket and the peer's stream.
fn connected(up: &mut HostUplink) -> (SockId, TcpStream) {
    let (listener, address) = listener();
    let socket = up.tcp_connect(address, None, TCP).unwrap();
    let (stream, _) = listener.accept().unwrap();
    let (of, state) = wait(up, 1000)[0];
    assert!(of == TCP && state.writable && !state.error);
    assert_eq!(up.tcp_connected(socket), Ok(true));
    (socket, stream)
}

fn recv_wait(up: &mut HostUplink, socket: SockId, buffer: &mut [u8]) -> Io {
    loop {
        match up.tcp_recv(socket, buffer) {
            Io::Blocked => assert!(!wait(up, 2000).is_empty(), "nothing came"),
            other => return other,
        }
    }
}

#[test]
fn tokens_are_lossless_and_leave_the_workers_kinds_alone() {
    for of in [TCP, UDP, PING] {
        assert_eq!(owner(token(of)), Some(of));
        assert!((token(of) >> 56) as u8 >= TOKEN_KIND_FIRST);
    }
    for kind in 0..u64::from(TOKEN_KIND_FIRST) {
        assert_eq!(owner(kind << 56 | 77), None);
    }
    assert_eq!(owner(u64::MAX), None);
}

#[test]
fn tcp_both_ways_with_half_close() {
    let mut up = uplink();
    let (socket, mut stream) = connected(&mut up);
    let mut buffer = [0; 64];
    assert_eq!(up.tcp_recv(socket, &mut buffer), Io::Blocked);
    assert_eq!(up.tcp_recv(socket, &mut []), Io::Done(0));
    assert!(wait(&up, 0).is_empty(), "edges come once");

    stream.write_all(b"to guest").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(recv_wait(&mut up, socket, &mut buffer), Io::Drained(8));
    assert_eq!(&buffer[..8], b"to guest");
    assert_eq!(recv_wait(&mut up, socket, &mut buffer), Io::Eof);

    assert_eq!(up.tcp_send(socket, b"from guest"), Io::Done(10));
    up.tcp_shutdown(socket);
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"from guest");
    up.close(socket);
    assert_eq!(up.open_count(), 0);
}

#[test]
fn a_full_send_buffer_blocks_and_its_room_is_an_edge() {
    let mut up = uplink();
    let (socket, mut stream) = connected(&mut up);
    let chunk = vec![7; 1 << 20];
    let mut sent = 0;
    loop {
        match up.tcp_send(socket, &chunk) {
            Io::Done(len) => sent += len,
            Io::Blocked => break,
            other => panic!("{other:?}"),
        }
        assert!(sent < 1 << 30);
    }
    while !wait(&up, 0).is_empty() {}
    let mut buffer = vec![0; sent];
    stream.read_exact(&mut buffer).unwrap();
    assert!(wait(&up, 2000)[0].1.writable);
    assert!(matches!(up.tcp_send(socket, b"x"), Io::Done(1)));
    up.close(socket);
}

#[test]
fn abort_resets_the_peer_and_a_reset_is_seen() {
    let mut up = uplink();
    let (socket, mut stream) = connected(&mut up);
    up.tcp_abort_on_close(socket);
    up.close(socket);
    let error = stream.read(&mut [0; 8]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);

    let (socket, stream) = connected(&mut up);
    sockopt::set_socket_linger(&stream, Some(std::time::Duration::ZERO)).unwrap();
    drop(stream);
    assert!(wait(&up, 1000)[0].1.error);
    let mut buffer = [0; 8];
    assert_eq!(
        up.tcp_recv(socket, &mut buffer),
        Io::Failed(HostError::Reset)
    );
    assert!(matches!(
        up.tcp_send(socket, b"x"),
        Io::Failed(HostError::Reset)
    ));
    up.close(socket);
}

#[test]
fn a_closed_port_refuses() {
    let mut up = uplink();
    let (listener, address) = listener();
    drop(listener);
    let result = match up.tcp_connect(address, None, TCP) {
        Err(error) => Err(error),
        Ok(socket) => {
            assert!(wait(&up, 1000)[0].1.error);
            let result = up.tcp_connected(socket);
            up.close(socket);
            result
        }
    };
    assert_eq!(result, Err(HostError::Refused));
    assert_eq!(up.open_count(), 0);
}

#[test]
fn a_destination_that_no_port_is_left_for_costs_no_search() {
    let mut up = uplink();
    let (server, address) = listener();
    let (_other, elsewhere) = listener();
    up.used_up.remember(address, Used::All);
    assert_eq!(up.tcp_connect(address, None, TCP), Err(HostError::NoPort));
    assert!(up.tcp_connect(elsewhere, None, TCP).is_ok(), "another one");
    // The kernel is not asked for a port of its range again either.
    up.local_ports = LocalPorts::parse("1 65535", "");
    up.used_up.remember(address, Used::Range);
    assert_eq!(up.tcp_connect(address, None, TCP), Err(HostError::NoPort));
    assert_eq!(up.used_up.toward(address), Some(Used::All), "as was found");
    up.local_ports = LocalPorts::read();
    up.used_up.remember(address, Used::Range);
    up.tcp_connect(address, None, TCP).unwrap();
    let port = server.accept().unwrap().1.port();
    let range = up.local_ports.range;
    assert!(!(range.0..=range.1).contains(&port), "{port}");
}

#[test]
fn slots_are_reused_and_sockets_close() {
    let mut up = uplink();
    let ids: Vec<_> = (0..3)
        .map(|_| up.udp_open(Family::V4, 0, UDP).unwrap().0)
        .collect();
    assert_eq!(up.open_count(), 3);
    up.close(ids[1]);
    assert_eq!(up.udp_open(Family::V4, 0, UDP).unwrap().0, ids[1]);
    for id in ids {
        up.close(id);
    }
    assert_eq!(up.open_count(), 0);
    assert!(wait(&up, 0).is_empty());
}

fn receive(up: &mut HostUplink, socket: SockId) -> Vec<(SocketAddr, Vec<u8>, Option<u16>, u8)> {
    let mut got = Vec::new();
    up.recv_from(socket, &mut |datagram| {
        got.push((
            datagram.source,
            datagram.payload.to_vec(),
            datagram.segment,
            datagram.ttl,
        ));
    });
    got
}

fn server() -> (UdpSocket, SocketAddr) {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server
        .set_read_timeout(Some(std::time::Duration::from_secs(2)))
        .unwrap();
    let address = v4(server.local_addr().unwrap());
    (server, address)
}

#[test]
fn udp_both_ways_keeps_port_payload_and_ttl() {
    let mut up = uplink();
    let (server, address) = server();
    // Above ip_local_port_range, where there is an above, so that nothing on a busy machine holds it.
    let port = (49_152..=65_535)
        .rev()
        .filter(|&port| up.local_ports.may_keep(port))
        .find(|&port| UdpSocket::bind(("0.0.0.0", port)).is_ok())
        .unwrap();
    let (socket, _) = up.udp_open(Family::V4, port, UDP).unwrap();
    let mut buffer = [0; 64];
    for (ttl, payload) in [(9, &b"hello"[..]), (0, b""), (0, b"again"), (200, b"")] {
        let options = SendOptions {
            ttl,
            ..SendOptions::default()
        };
        assert_eq!(
            up.send_to(socket, address, payload, options),
            Io::Done(payload.len())
        );
        let (len, from) = server.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..len], from.port()), (payload, port));
    }
    assert!(receive(&mut up, socket).is_empty());
    server.set_ttl(17).unwrap();
    server.send_to(b"reply", ("127.0.0.1", port)).unwrap();
    server.send_to(b"", ("127.0.0.1", port)).unwrap();
    assert!(wait(&up, 1000)[0].1.readable);
    assert!(wait(&up, 0)[0].1.readable, "level-triggered until drained");
    let got = receive(&mut up, socket);
    let expected = [
        (address, b"reply".to_vec(), None, 17),
        (address, Vec::new(), None, 17),
    ];
    assert_eq!(got, expected);
    assert!(wait(&up, 0).is_empty());

    // The port is taken: another one serves.
    let (second, _) = up.udp_open(Family::V4, port, UDP).unwrap();
    up.send_to(second, address, b"x", SendOptions::default());
    let (_, from) = server.recv_from(&mut buffer).unwrap();
    assert_ne!(from.port(), port);
    // Services' ports are left alone.
    for service in [123, 1_900, 5_353] {
        let (other, _) = up.udp_open(Family::V4, service, UDP).unwrap();
        up.send_to(other, address, b"x", SendOptions::default());
        let (_, from) = server.recv_from(&mut buffer).unwrap();
        assert_ne!(from.port(), service);
    }
}

#[test]
fn trains_leave_in_one_call_and_arrive_whole() {
    let mut up = uplink();
    let (server, address) = server();
    let (socket, _) = up.udp_open(Family::V4, 0, UDP).unwrap();
    // More than one call takes, and less than a stock receive buffer holds.
    let payload: Vec<u8> = (0..66_050u32).map(|n| n as u8).collect();
    let options = SendOptions {
        segment: Some(700),
        ..SendOptions::default()
    };
    assert_eq!(
        up.send_to(socket, address, &payload, options),
        Io::Done(payload.len())
    );
    let (mut got, mut buffer) = (Vec::new(), [0; 2000]);
    while got.len() < payload.len() {
        let len = server.recv(&mut buffer).unwrap();
        assert_eq!(len, 700.min(payload.len() - got.len()));
        got.extend_from_slice(&buffer[..len]);
    }
    assert_eq!(got, payload);

    // Back by GRO: loopback hands the train over uncut.
    let mut peer = uplink();
    let (other, _) = peer.udp_open(Family::V4, 0, UDP).unwrap();
    let back = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), bound_port(&up, socket));
    peer.send_to(other, back, &payload[..2000], options);
    assert!(wait(&up, 1000)[0].1.readable);
    let got = receive(&mut up, socket);
    assert_eq!(got.len(), 1);
    assert_eq!((&got[0].1[..], got[0].2), (&payload[..2000], Some(700)));
}

fn bound_port(up: &HostUplink, id: SockId) -> u16 {
    let fd = &up.socket(id).unwrap().fd;
    SocketAddr::try_from(rustix::net::getsockname(fd).unwrap())
        .unwrap()
        .port()
}

#[test]
fn the_fallback_for_trains_sends_datagram_by_datagram() {
    let mut up = uplink();
    let (server, address) = server();
    let (socket, _) = up.udp_open(Family::V4, 0, UDP).unwrap();
    // Loopback refuses no train, so the fallback is called by itself.
    let payload = [3; 250];
    let fd = up.socket(socket).unwrap().fd.as_fd();
    assert_eq!(
        mmsg::send_each(fd, (None, address), &payload, 100).unwrap(),
        250
    );
    let mut buffer = [0; 200];
    for len in [100, 100, 50] {
        assert_eq!(server.recv(&mut buffer).unwrap(), len);
    }
    assert_eq!(
        mmsg::send_each(fd, (None, address), &[1; 100], 1).unwrap(),
        mmsg::RECV_BATCH
    );
}

#[test]
fn errors_of_a_send_are_told() {
    let mut up = uplink();
    let (socket, _) = up.udp_open(Family::V4, 0, UDP).unwrap();
    let broadcast = SocketAddr::new(Ipv4Addr::BROADCAST.into(), 9);
    let error = up.send_to(socket, broadcast, b"x", SendOptions::default());
    assert!(matches!(
        error,
        Io::Failed(HostError::Prohibited | HostError::NetUnreachable)
    ));
    let (_server, address) = server();
    let error = up.send_to(socket, address, &[0; 65_530], SendOptions::default());
    assert_eq!(error, Io::Failed(HostError::TooBig));
}

#[test]
fn more_than_one_batch_is_told() {
    let mut up = uplink();
    let (server, address) = server();
    let (socket, _) = up.udp_open(Family::V4, 0, UDP).unwrap();
    up.send_to(socket, address, b"x", SendOptions::default());
    let (_, from) = server.recv_from(&mut [0; 8]).unwrap();
    for n in 0..=mmsg::RECV_BATCH {
        // Sizes differ upward, so that GRO has nothing to join.
        server.send_to(&vec![n as u8; n + 1], from).unwrap();
    }
    wait(&up, 1000);
    let mut seen = 0;
    assert!(up.recv_from(socket, &mut |datagram| {
        assert_eq!(datagram.payload, vec![seen as u8; seen + 1]);
        seen += 1;
    }));
    assert_eq!(seen, mmsg::RECV_BATCH);
    assert!(!up.recv_from(socket, &mut |_| seen += 1));
    assert_eq!(seen, mmsg::RECV_BATCH + 1);
}

#[test]
fn ping_loopback_or_be_told_it_is_forbidden() {
    let mut up = uplink();
    let socket = match up.ping_open(Family::V4, PING) {
        Ok(socket) => socket,
        Err(error) => {
            assert_eq!(error, HostError::Prohibited);
            assert_eq!(up.open_count(), 0);
            return;
        }
    };
    let request = [8, 0, 0, 0, 0x12, 0x34, 0, 7, b'd', b'a', b't', b'a'];
    let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0);
    let sent = up.send_to(socket, to, &request, SendOptions::default());
    assert_eq!(sent, Io::Done(request.len()));
    up.send_to(socket, to, &request, SendOptions::default());
    assert_eq!(wait(&up, 1000)[0].0, PING);
    let got = receive(&mut up, socket);
    // Alike, but never a train.
    assert_eq!(got.len(), 2);
    for (source, message, segment, _) in &got {
        assert_eq!((source.ip(), *segment), (Ipv4Addr::LOCALHOST.into(), None));
        assert_eq!((message[0], &message[6..]), (0, &request[6..]));
    }
}

#[test]
fn datagrams_of_one_sender_and_size_come_as_a_train() {
    let mut up = uplink();
    let ((one, at_one), (other, at_other)) = (server(), server());
    let (socket, port) = up.udp_open(Family::V4, 0, UDP).unwrap();
    let to = ("127.0.0.1", port);
    for (from, len) in [
        (&one, 1000),
        (&one, 1000),
        (&one, 500),
        (&one, 500),
        (&one, 0),
        (&one, 0),
        (&other, 700),
        (&one, 700),
        (&one, 701),
        (&other, 40_000),
        (&other, 40_000),
    ] {
        from.send_to(&vec![len as u8; len], to).unwrap();
    }
    one.set_ttl(9).unwrap();
    one.send_to(&[1; 30], to).unwrap();
    one.set_ttl(10).unwrap();
    one.send_to(&[2; 30], to).unwrap();
    let got = receive(&mut up, socket);
    let shapes: Vec<_> = got
        .iter()
        .map(|(from, payload, segment, ttl)| (*from, payload.len(), *segment, *ttl))
        .collect();
    let expected = [
        (at_one, 2500, Some(1000), 64),
        (at_one, 500, None, 64),
        (at_one, 0, None, 64),
        (at_one, 0, None, 64),
        (at_other, 700, None, 64),
        (at_one, 700, None, 64),
        (at_one, 701, None, 64),
        (at_other, 40_000, None, 64),
        (at_other, 40_000, None, 64),
        (at_one, 30, None, 9),
        (at_one, 30, None, 10),
    ];
    assert_eq!(shapes, expected);
    assert!(got[0].1[..2000] == [1000_u16 as u8; 2000] && got[0].1[2000..] == [500_u16 as u8; 500]);
}

#[test]
fn a_guests_datagrams_and_trains_cross_real_sockets() {
    use crate::nat::egress::{Egress, HostAccess};
    use crate::nat::icmp::ErrorSender;
    use crate::nat::mapping::Limits;
    use crate::nat::testing::{FrameLog, GUEST, guest_udp, guest_udp_train, lan, parse};
    use crate::offload::{Gso, Offload};

    let (mut up, mut out) = (uplink(), FrameLog::default());
    let limits = Limits {
        total: 8,
        per_guest: 8,
        per_port: usize::MAX,
    };
    let mut nat = crate::nat::udp::UdpNat::new(lan(), limits);
    let (server, address) = server();
    // The server listens on loopback, which guests reach by a mapped address only.
    let host = HostAccess {
        loopback: vec![Ipv4Addr::new(10, 0, 2, 2).into()],
        ..HostAccess::default()
    };
    let mut egress = Egress::new(lan(), host);
    let address = egress.shown(address);
    let guest = SocketAddr::new(GUEST.into(), 0xf123);
    let payload = vec![5; 3000];
    let now = crate::frame::Instant::ZERO;
    let plain = guest_udp(guest, address, 64, b"ask");
    for (frame, offload) in [
        (plain, Offload::default()),
        guest_udp_train(guest, address, 1000, &payload),
    ] {
        let packet = parse(&frame, offload);
        let (ip, udp) = packet.udp4().unwrap();
        let answers = (&mut out, &mut ErrorSender::new());
        nat.handle_packet(
            &packet,
            (&ip.any(), udp),
            &mut egress,
            now,
            &mut up,
            answers,
        )
        .unwrap();
    }
    let mut buffer = [0; 2000];
    let (len, mapped) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], b"ask");
    for _ in 0..3 {
        assert_eq!(server.recv(&mut buffer).unwrap(), 1000);
    }
    let sender = server.as_fd();
    mmsg::send(sender, (None, v4(mapped)), &payload, Some(1000)).unwrap();
    server.send_to(b"", mapped).unwrap();
    let (owner, ready) = wait(&up, 1000)[0];
    let SockOwner::Udp(id) = owner else {
        panic!("{owner:?}")
    };
    assert!(ready.readable);
    nat.handle_ready(
        id,
        Ready::default(),
        &egress,
        now,
        (&mut up, &mut out, &mut ErrorSender::new()),
        &mut |reason| panic!("{reason:?}"),
    );
    let (train, offload) = out.pop().unwrap();
    let packet = parse(&train, offload);
    let (_, udp) = packet.udp4().unwrap();
    assert_eq!((offload.gso, udp.payload), (Gso::Udp(1000), &payload[..]));
    let (empty, offload) = out.pop().unwrap();
    assert_eq!(parse(&empty, offload).udp4().unwrap().1.payload, b"");
    nat.handle_timeout(crate::frame::Instant::from_secs(1000), &mut up);
    assert_eq!((nat.len(), up.open_count()), (0, 0));
}

/// A UDP NAT on real sockets whose guest reaches the host's loopback by mapped addresses.
struct LoopbackNat {
    nat: crate::nat::udp::UdpNat,
    up: HostUplink,
    out: crate::nat::testing::FrameLog,
    errors: crate::nat::icmp::ErrorSender,
    egress: crate::nat::egress::Egress,
}

const MAPPED4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 2, 2));
const MAPPED6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2));

impl LoopbackNat {
    fn new() -> Self {
        use crate::nat::egress::{Egress, HostAccess};
        use crate::nat::testing::lan;
        let host = HostAccess {
            loopback: vec![MAPPED4, MAPPED6],
            ..HostAccess::default()
        };
        Self {
            nat: crate::nat::udp::UdpNat::new(lan(), crate::nat::udp::LIMITS),
            up: uplink(),
            out: Default::default(),
            errors: crate::nat::icmp::ErrorSender::new(),
            egress: Egress::new(lan(), host),
        }
    }

    /// The guest sends to `port` of the mapped address; what came in fragments says so.
    fn send(
        &mut self,
        to: IpAddr,
        port: u16,
        payload: &[u8],
        reassembled: bool,
    ) -> Result<(), crate::stats::DropReason> {
        use crate::nat::testing::{GUEST, GUEST6, guest_udp, parse};
        let guest = if to.is_ipv4() {
            GUEST.into()
        } else {
            GUEST6.into()
        };
        let guest = SocketAddr::new(guest, 0xf125);
        let frame = guest_udp(guest, SocketAddr::new(to, port), 64, payload);
        let mut packet = parse(&frame, Default::default());
        packet.reassembled = reassembled;
        let ip = packet.ip().unwrap();
        let crate::wire::Transport::Udp(udp) = ip.transport else {
            panic!("not UDP");
        };
        let now = crate::frame::Instant::ZERO;
        let (up, answers) = (&mut self.up, (&mut self.out, &mut self.errors));
        self.nat
            .handle_packet(&packet, (&ip, &udp), &mut self.egress, now, up, answers)
    }

    /// All events within a tenth of a second.
    fn run(&mut self) {
        let now = crate::frame::Instant::ZERO;
        loop {
            let events = wait(&self.up, 100);
            for &(owner, ready) in &events {
                let SockOwner::Udp(id) = owner else {
                    panic!("{owner:?}")
                };
                let ways = (&mut self.up, &mut self.out, &mut self.errors);
                let drops = &mut |reason| panic!("{reason:?}");
                self.nat
                    .handle_ready(id, ready, &self.egress, now, ways, drops);
            }
            if events.is_empty() {
                return;
            }
        }
    }

    /// Source, type, code and rest of the ICMP error that the guest got, and what it quotes.
    fn error(&mut self) -> (IpAddr, [u8; 2], u32, Vec<u8>) {
        let (bytes, offload) = self.out.pop().expect("an error");
        let ip = crate::nat::testing::parse(&bytes, offload).ip().unwrap();
        let crate::wire::Transport::Icmp(icmp) = ip.transport else {
            panic!("not ICMP");
        };
        let rest = u32::from_be_bytes(icmp[4..8].try_into().unwrap());
        (ip.source, [icmp[0], icmp[1]], rest, icmp[8..].to_vec())
    }
}

#[test]
fn a_closed_ports_answer_reaches_the_guest() {
    use crate::nat::testing::{GUEST, GUEST6};
    for (to, guest, kind) in [
        (MAPPED4, IpAddr::from(GUEST), [3, 3]),
        (MAPPED6, IpAddr::from(GUEST6), [1, 4]),
    ] {
        let mut nat = LoopbackNat::new();
        // Port 9 (discard) is nobody's here.
        nat.send(to, 9, b"anyone?", false).unwrap();
        nat.run();
        let (from, of_type, rest, quote) = nat.error();
        assert_eq!((from, of_type, rest), (to, kind, 0));
        let mut expected = vec![0; quote.len()];
        let sent = crate::nat::testing::guest_udp(
            SocketAddr::new(guest, 0xf125),
            SocketAddr::new(to, 9),
            64,
            b"anyone?",
        );
        expected.copy_from_slice(&sent[14..]);
        let header_len = crate::wire::ip_header_len(to);
        assert_eq!(quote[header_len..], expected[header_len..]);
        // The error is told once, and the socket goes on.
        nat.send(to, 9, b"still?", false).unwrap();
        nat.run();
        nat.error();
        assert!(nat.out.pop().is_none());
    }
}

#[test]
fn the_hosts_mtu_is_told_to_who_may_not_be_fragmented() {
    let receiver = UdpSocket::bind("[::1]:0").unwrap();
    let port = receiver.local_addr().unwrap().port();
    let mut nat = LoopbackNat::new();
    // Loopback's MTU is 65,536, which the longest IPv6 datagrams exceed.
    let longest = vec![3; 65_520];
    let dropped = nat.send(MAPPED6, port, &longest, false);
    assert_eq!(dropped, Err(crate::stats::DropReason::TooBig));
    let (_, of_type, mtu, _) = nat.error();
    assert_eq!((of_type, mtu), ([2, 0], 65_536));
    nat.send(MAPPED6, port, &longest, true).unwrap();
    let mut buffer = vec![0; 65_536];
    let (len, mapped) = receiver.recv_from(&mut buffer).unwrap();
    assert_eq!(len, longest.len());
    receiver.send_to(&longest, mapped).unwrap();
    nat.run();
    assert!(nat.out.frames.len() > 40, "in fragments");
}

#[test]
fn random_words_differ() {
    let mut up = uplink();
    let words: std::collections::BTreeSet<_> = (0..100).map(|_| up.random()).collect();
    assert_eq!(words.len(), 100);
}

#[test]
fn a_forwards_socket_answers_from_where_it_was_asked_and_rests() {
    const FORWARD: SockOwner = SockOwner::Forward(FlowId {
        slot: 3,
        generation: 4,
    });
    for (any, asked) in [("0.0.0.0:0", "127.0.0.2"), ("[::]:0", "::1")] {
        let mut up = uplink();
        let bound = UdpSocket::bind(any).unwrap();
        bound.set_nonblocking(true).unwrap();
        let at = bound.local_addr().unwrap();
        let to = SocketAddr::new(asked.parse().unwrap(), at.port());
        let socket = up
            .adopt(bound.into(), ListenerKind::Udp(at), FORWARD)
            .unwrap();
        let client = UdpSocket::bind(any).unwrap();
        let limit = Some(std::time::Duration::from_secs(2));
        client.set_read_timeout(limit).unwrap();
        // Connected: an answer from elsewhere would not arrive.
        client.connect(to).unwrap();
        client.send(b"question").unwrap();
        up.listen_for(socket, false);
        assert!(wait(&up, 50).is_empty(), "it rests");
        up.listen_for(socket, true);
        assert_eq!(wait(&up, 1000)[0].0, FORWARD);
        let mut heard = None;
        up.recv_from(socket, &mut |datagram| {
            heard = Some((datagram.source, datagram.destination));
        });
        let (source, destination) = heard.unwrap();
        assert_eq!(destination, Some(to.ip()));
        let mut buffer = [0; 4096];
        for segment in [None, Some(100)] {
            let options = SendOptions {
                segment,
                ..SendOptions::default()
            };
            let sent = up.send_from(socket, to.ip(), source, &[7; 200], options);
            assert_eq!(sent, Io::Done(200));
            for _ in 0..segment.map_or(1, |_| 2) {
                let len = client.recv(&mut buffer).unwrap();
                assert_eq!(len, segment.map_or(200, usize::from));
            }
        }
    }
}

#[test]
fn a_forwards_listener_gives_its_clients() {
    const FORWARD: SockOwner = SockOwner::Forward(FlowId {
        slot: 3,
        generation: 4,
    });
    let mut up = uplink();
    let (listener, at) = listener();
    listener.set_nonblocking(true).unwrap();
    let listening = up
        .adopt(listener.into(), ListenerKind::Tcp(at), FORWARD)
        .unwrap();
    assert_eq!(up.accept(listening, TCP), Ok(None));
    let mut client = TcpStream::connect(at).unwrap();
    assert_eq!(wait(&up, 1000)[0].0, FORWARD);
    let (socket, peer) = up.accept(listening, FORWARD).unwrap().unwrap();
    assert_eq!(peer, Some(client.local_addr().unwrap()));
    client.write_all(b"hello").unwrap();
    up.hand_over(socket, TCP);
    let mut buffer = [0; 8];
    assert_eq!(recv_wait(&mut up, socket, &mut buffer), Io::Drained(5));
    up.tcp_abort_on_close(socket);
    up.close(socket);
    assert!(client.read(&mut buffer).is_err(), "a reset");
}

/// All a peer sends arrives, and its end, though no receive is made that a short one seems to save:
/// however data, urgent data and FIN meet the reader.
#[test]
fn a_short_receive_leaves_nothing_behind_that_no_edge_tells_of() {
    const PIECES: [&[u8]; 6] = [b"to", b"-guest", b"U", b"after", b"V", b"end"];
    for round in 0..60 {
        let mut up = uplink();
        let (socket, stream) = connected(&mut up);
        let peer = std::thread::spawn(move || {
            for (n, piece) in PIECES.iter().enumerate() {
                let urgent = piece.len() == 1;
                let flags = match urgent && round % 3 != 0 {
                    true => SendFlags::OOB,
                    false => SendFlags::empty(),
                };
                assert_eq!(send(&stream, piece, flags), Ok(piece.len()));
                match (round + n) % 4 {
                    0 => std::thread::yield_now(),
                    1 => std::thread::sleep(std::time::Duration::from_micros(50 * n as u64)),
                    _ => {}
                }
            }
        });
        let (mut got, mut buffer) = (Vec::new(), [0; 64]);
        let (mut readable, mut last_edge) = (true, false);
        loop {
            if !readable {
                let events = wait(&up, 2000);
                assert!(!events.is_empty(), "round {round}: nothing after {got:?}");
                for (_, ready) in events {
                    readable |= ready.readable;
                    last_edge |= ready.last_edge;
                }
                continue;
            }
            match up.tcp_recv(socket, &mut buffer) {
                Io::Done(len) => got.extend_from_slice(&buffer[..len]),
                Io::Drained(len) => {
                    got.extend_from_slice(&buffer[..len]);
                    readable = last_edge;
                }
                Io::Blocked => readable = false,
                Io::Eof => break,
                Io::Failed(error) => panic!("round {round}: {error:?}"),
            }
        }
        assert_eq!(got, PIECES.concat(), "round {round}");
        peer.join().unwrap();
        up.close(socket);
    }
}
