//! UDP through the NAT, per packet: the translation alone (a scripted host), and with real sockets on
//! loopback, where the system calls are most of it.

use std::cell::RefCell;
use std::hint::black_box;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant as Clock};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lanlet::frame::Instant;
use lanlet::nat::egress::{Egress, HostAccess};
use lanlet::nat::icmp::ErrorSender;
use lanlet::nat::mapping::Limits;
use lanlet::nat::testing::{FakeUplink, FrameLog, GUEST, guest_udp, guest_udp_train, lan, parse};
use lanlet::nat::udp::UdpNat;
use lanlet::nat::{FlowId, Ready, SendOptions, SockOwner, Uplink};
use lanlet::offload::Offload;
use lanlet::uplink::HostUplink;
use lanlet::uplink::outbound::Outbound;
use lanlet::wire::Family;
use rustix::event::epoll;

const NOW: Instant = Instant::from_micros_const(1_000_000);
const OUTSIDE: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7)), 7000);
/// What one receive call takes in at most.
const BATCH: u64 = 32;

/// Name, datagram or train, and its offload.
fn frames(to: SocketAddr) -> Vec<(&'static str, Vec<u8>, Offload)> {
    let guest = SocketAddr::new(GUEST.into(), 5000);
    let plain = |len| guest_udp(guest, to, 64, &vec![7; len]);
    let (train, offload) = guest_udp_train(guest, to, 1472, &vec![7; 44 * 1472]);
    vec![
        ("64 B", plain(64), Offload::default()),
        ("1472 B", plain(1472), Offload::default()),
        ("train of 44", train, offload),
    ]
}

fn nat() -> UdpNat {
    let limits = Limits {
        total: 20_000,
        per_guest: 20_000,
        per_port: usize::MAX,
    };
    UdpNat::new(lan(), limits)
}

/// Where answers to the guest go.
type Answers = (FrameLog, ErrorSender);

fn send<U: Uplink>(
    nat: &mut UdpNat,
    up: &mut U,
    (out, errors): &mut Answers,
    frame: &[u8],
    offload: Offload,
) {
    let packet = parse(frame, offload);
    let (ip, udp) = packet.udp4().expect("UDP");
    let answers = (out, errors);
    let result = EGRESS.with_borrow_mut(|egress| {
        nat.handle_packet(&packet, (&ip.any(), udp), egress, NOW, up, answers)
    });
    black_box(result).expect("it is sent");
}

fn silent() -> (FakeUplink, Answers) {
    let (mut up, mut out) = (FakeUplink::new(1), FrameLog::default());
    (up.keep_sent, out.keep) = (false, false);
    (up, (out, ErrorSender::new()))
}

/// The id of the first mapping of a fresh NAT.
const FIRST: FlowId = FlowId {
    slot: 0,
    generation: 0,
};

fn from_guest(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("nat_udp/from_guest");
    for (name, frame, offload) in frames(OUTSIDE) {
        let (mut nat, (mut up, mut out)) = (nat(), silent());
        group.bench_function(BenchmarkId::new("scripted", name), |bencher| {
            bencher.iter(|| send(&mut nat, &mut up, &mut out, &frame, offload));
        });
    }
    for mappings in [10u16, 10_000] {
        let (mut nat, (mut up, mut out)) = (nat(), silent());
        let frames: Vec<_> = (0..mappings)
            .map(|n| {
                guest_udp(
                    SocketAddr::new(GUEST.into(), 2000 + n),
                    OUTSIDE,
                    64,
                    &[7; 64],
                )
            })
            .collect();
        let mut next = frames.iter().cycle();
        group.bench_function(BenchmarkId::new("mappings", mappings), |bencher| {
            bencher.iter(|| {
                let frame = next.next().expect("endless");
                send(&mut nat, &mut up, &mut out, frame, Offload::default());
            });
        });
    }
    let sink = UdpSocket::bind("127.0.0.1:0").expect("loopback");
    for (name, frame, offload) in frames(shown(&sink)) {
        let (mut nat, mut up, mut out) = (nat(), host(), silent().1);
        group.bench_function(BenchmarkId::new("loopback", name), |bencher| {
            bencher.iter(|| send(&mut nat, &mut up, &mut out, &frame, offload));
        });
    }
    group.finish();
}

fn to_guest(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("nat_udp/to_guest");
    group.throughput(Throughput::Elements(BATCH));
    for (len, segment) in [(64, None), (1472, None), (44 * 1472, Some(1472))] {
        let payload = vec![7; len];
        let id = BenchmarkId::new("scripted", format!("{len} B"));
        group.bench_function(id, |bencher| {
            bencher.iter_custom(|rounds| {
                let (mut nat, (mut up, mut out)) = (nat(), silent());
                let frame = guest_udp(SocketAddr::new(GUEST.into(), 5000), OUTSIDE, 64, b"x");
                send(&mut nat, &mut up, &mut out, &frame, Offload::default());
                let socket = up.socket_of(SockOwner::Udp(FIRST)).expect("open");
                let deliver = |up: &mut FakeUplink| {
                    for _ in 0..BATCH {
                        up.deliver(socket, OUTSIDE, &payload, segment);
                    }
                };
                timed((rounds, BATCH), &mut nat, &mut up, &mut out.0, deliver)
            });
        });
    }
    // They come one by one and go on as one super-frame. 32 full-size ones fit a stock receive buffer of
    // 212,992 bytes.
    for len in [64, 1472] {
        let id = BenchmarkId::new("loopback", format!("{len} B"));
        group.bench_function(id, |bencher| {
            bencher.iter_custom(|rounds| {
                let peer = UdpSocket::bind("127.0.0.1:0").expect("loopback");
                let (mut nat, mut up, mut out) = (nat(), host(), silent().1);
                let frame = guest_udp(
                    SocketAddr::new(GUEST.into(), 0xf00d),
                    shown(&peer),
                    64,
                    b"x",
                );
                send(&mut nat, &mut up, &mut out, &frame, Offload::default());
                let (_, mapped) = peer.recv_from(&mut [0; 8]).expect("the guest's datagram");
                let payload = vec![7; len];
                let deliver = |_: &mut HostUplink| {
                    for _ in 0..BATCH {
                        peer.send_to(&payload, mapped).expect("sent");
                    }
                };
                timed((rounds, 1), &mut nat, &mut up, &mut out.0, deliver)
            });
        });
    }
    group.finish();
}

/// Time that `rounds` batches take from the socket to the guest, which gets so many frames of each.
fn timed<U: Uplink>(
    (rounds, frames): (u64, u64),
    nat: &mut UdpNat,
    up: &mut U,
    out: &mut FrameLog,
    deliver: impl Fn(&mut U),
) -> Duration {
    let (mut total, mut errors) = (Duration::ZERO, ErrorSender::new());
    for _ in 0..rounds {
        deliver(up);
        let before = out.count;
        let start = Clock::now();
        EGRESS.with_borrow(|egress| {
            nat.handle_ready(
                FIRST,
                Ready::default(),
                egress,
                NOW,
                (&mut *up, &mut *out, &mut errors),
                &mut |reason| panic!("{reason:?}"),
            );
        });
        total += start.elapsed();
        assert_eq!(out.count - before, frames);
    }
    total
}

/// What the host's own part costs: asking whether an address is its own.
fn host_address(criterion: &mut Criterion) {
    let mut up = host();
    criterion.bench_function("uplink/is_host_address", |bencher| {
        bencher.iter(|| black_box(up.is_host_address(OUTSIDE.ip())));
    });
    let sink = UdpSocket::bind("127.0.0.1:0").expect("loopback");
    let to = address(&sink);
    let owner = SockOwner::Udp(FIRST);
    criterion.bench_function("uplink/udp open, send, close", |bencher| {
        bencher.iter(|| {
            let (socket, _) = up.udp_open(Family::V4, 0, owner).expect("open");
            up.send_to(socket, to, b"x", SendOptions::default());
            up.close(socket);
        });
    });
}

fn host() -> HostUplink {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).expect("epoll");
    HostUplink::new(Arc::new(epoll), Outbound::default()).expect("uplink")
}

thread_local! {
    /// The host's loopback is open by another address.
    static EGRESS: RefCell<Egress> = RefCell::new(Egress::new(
        lan(),
        HostAccess {
            loopback: vec![LOOPBACK.into()],
            ..HostAccess::default()
        },
    ));
}
const LOOPBACK: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

/// Where a guest writes to for a socket on the host's loopback.
fn shown(socket: &UdpSocket) -> SocketAddr {
    SocketAddr::new(LOOPBACK.into(), address(socket).port())
}

fn address(socket: &UdpSocket) -> SocketAddr {
    match socket.local_addr() {
        Ok(address) => address,
        other => panic!("{other:?}"),
    }
}

criterion_group!(benches, from_guest, to_guest, host_address);
criterion_main!(benches);
