//! TCP through the NAT, per packet, with a scripted host: what translation costs without system
//! calls, at few and at many flows, and what opening and closing a flow costs.

use std::hint::black_box;
use std::net::{Ipv4Addr, SocketAddr};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lanlet::frame::{Duration, Instant};
use lanlet::nat::SockOwner;
use lanlet::nat::tcp::{OPENS_PER_SEC, TcpNat};
use lanlet::nat::testing::{FakeUplink, FrameLog, GUEST, guest_tcp, lan, parse};
use lanlet::offload::{Csum, Offload};
use lanlet::wire::{Body, Transport};

const NOW: Instant = Instant::from_micros_const(1_000_000);
const OUTSIDE: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7)), 80);
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
/// MSS 1460 and window scale 7, as Linux sends them.
const OPTIONS: [u8; 8] = [2, 4, 5, 180, 1, 3, 3, 7];
/// Packets of one batch: as many as one read from a busy tap brings.
const BATCH: usize = 64;

struct Flow {
    guest: SocketAddr,
    sequence: u32,
    acknowledgment: u32,
}

struct Bench {
    now: Instant,
    nat: TcpNat,
    up: FakeUplink,
    log: FrameLog,
    flows: Vec<Flow>,
}

impl Bench {
    fn new(flows: usize) -> Self {
        let mut bench = Self {
            now: NOW,
            nat: TcpNat::new(lan(), 20_000, NOW),
            up: FakeUplink::new(1),
            log: FrameLog::default(),
            flows: Vec::new(),
        };
        for n in 0..flows {
            let flow = bench.open(2000 + n as u16);
            bench.flows.push(flow);
        }
        (bench.log.keep, bench.up.keep_sent) = (false, false);
        bench
    }

    fn packet(&mut self, frame: &[u8]) {
        let packet = parse(
            frame,
            Offload {
                csum: Csum::Valid,
                ..Offload::default()
            },
        );
        let Body::Ipv4(ip) = &packet.body else {
            unreachable!("an IPv4 packet")
        };
        let Transport::Tcp(tcp) = &ip.transport else {
            unreachable!("a TCP segment")
        };
        let handled = self.nat.handle_packet(
            &packet,
            (&ip.any(), tcp),
            lanlet::nat::tcp::Target::Address(OUTSIDE),
            self.now,
            (&mut self.up, &mut self.log),
        );
        let _ = black_box(handled);
    }

    fn open(&mut self, port: u16) -> Flow {
        // As fast as a port may open flows for ever.
        self.now += Duration::from_micros(1_000_000 / OPENS_PER_SEC);
        let guest = SocketAddr::new(GUEST.into(), port);
        self.packet(&guest_tcp(
            guest,
            OUTSIDE,
            (0, 0),
            (SYN, 65_535),
            &OPTIONS,
            &[],
        ));
        while let Some((SockOwner::Tcp(id), ready)) = self.up.poll_event() {
            self.nat
                .handle_ready(id, ready, self.now, (&mut self.up, &mut self.log));
        }
        self.nat.flush(self.now, &mut self.up, &mut self.log);
        let (syn_ack, _) = self.log.pop().expect("a SYN-ACK");
        let ours = u32::from_be_bytes([syn_ack[38], syn_ack[39], syn_ack[40], syn_ack[41]]);
        let acknowledgment = ours.wrapping_add(1);
        self.packet(&guest_tcp(
            guest,
            OUTSIDE,
            (1, acknowledgment),
            (ACK, 512),
            &[],
            &[],
        ));
        self.nat.flush(self.now, &mut self.up, &mut self.log);
        Flow {
            guest,
            sequence: 1,
            acknowledgment,
        }
    }

    /// One batch of segments from the guest, each of another flow. `frame` is any segment of this
    /// guest: what differs is patched in, so that making frames costs next to nothing.
    fn upload(&mut self, first: usize, frame: &mut [u8], payload_len: u32) {
        for n in 0..BATCH {
            let index = (first + n * 7919) % self.flows.len();
            let flow = &mut self.flows[index];
            frame[34..36].copy_from_slice(&flow.guest.port().to_be_bytes());
            frame[38..42].copy_from_slice(&flow.sequence.to_be_bytes());
            frame[42..46].copy_from_slice(&flow.acknowledgment.to_be_bytes());
            flow.sequence = flow.sequence.wrapping_add(payload_len);
            self.packet(frame);
        }
        self.nat.flush(self.now, &mut self.up, &mut self.log);
    }
}

fn from_guest(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("nat_tcp/from_guest");
    for flows in [10, 1_000, 10_000] {
        let mut bench = Bench::new(flows);
        let guest = SocketAddr::new(GUEST.into(), 1);
        let mut frame = guest_tcp(guest, OUTSIDE, (1, 1), (ACK, 512), &[], &[7; 1460]);
        group.throughput(Throughput::Elements(BATCH as u64));
        let mut first = 0;
        group.bench_function(BenchmarkId::new("1460 B", flows), |bencher| {
            bencher.iter(|| {
                bench.upload(first, &mut frame, 1460);
                first += 1;
            });
        });
    }
    group.finish();
}

fn open_and_reset(criterion: &mut Criterion) {
    let mut bench = Bench::new(0);
    let mut port = 1000;
    criterion.bench_function("nat_tcp/open and reset", |bencher| {
        bencher.iter(|| {
            port = port % 60_000 + 1;
            bench.log.keep = true;
            let flow = bench.open(port);
            bench.log.frames.clear();
            let reset = guest_tcp(
                flow.guest,
                OUTSIDE,
                (1, flow.acknowledgment),
                (0x04, 0),
                &[],
                &[],
            );
            bench.packet(&reset);
            bench.nat.flush(bench.now, &mut bench.up, &mut bench.log);
            bench.up.closed.clear();
        });
    });
    assert_eq!(bench.nat.len(), 0);
}

criterion_group!(benches, from_guest, open_and_reset);
criterion_main!(benches);
