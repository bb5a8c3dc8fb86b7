//! A frame from one VMM's tap to another's, the whole way: kernel wire, worker, switch, kernel wire.
//! The figure includes the writes and reads of the two "guests", which share the cores with lanlet.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lanlet::config::NetworkConfig;
use lanlet::network::{Network, PortOptions, VmmPort};
use lanlet::offload::VNET_HEADER_LEN;
use lanlet::sys::tun;

/// Frames under way at a time: well below a tap's queue, so that none is lost.
const BURST: usize = 64;
const MSS: usize = 1448;

struct Guest {
    tap: File,
    port: VmmPort,
}

impl Guest {
    fn new(network: &Network) -> Self {
        let port = network
            .attach_vmm(PortOptions::default())
            .expect("a tap for a VMM");
        tun::set_offload(port.fds[0].as_fd(), tun::OFFLOAD_TSO)
            .expect("what a Linux guest negotiates");
        rustix::io::ioctl_fionbio(&port.fds[0], true).expect("a tap can be non-blocking");
        let tap = File::from(port.fds[0].try_clone().expect("a copy of the fd"));
        Self { tap, port }
    }

    /// A TCP segment over IPv4 to `to` behind its virtio header, with the checksum left to do; a
    /// super-frame if it exceeds the MSS.
    fn frame(&self, to: &Guest, payload: usize) -> Vec<u8> {
        let mut raw = vec![0u8; VNET_HEADER_LEN + 54 + payload];
        let (header, frame) = raw.split_at_mut(VNET_HEADER_LEN);
        header[0] = 1;
        if payload > MSS {
            header[1] = 1;
            header[2..4].copy_from_slice(&54u16.to_le_bytes());
            header[4..6].copy_from_slice(&(MSS as u16).to_le_bytes());
        }
        header[6..8].copy_from_slice(&34u16.to_le_bytes());
        header[8..10].copy_from_slice(&16u16.to_le_bytes());
        frame[..6].copy_from_slice(&to.port.mac.0);
        frame[6..12].copy_from_slice(&self.port.mac.0);
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14] = 0x45;
        frame[16..18].copy_from_slice(&((40 + payload) as u16).to_be_bytes());
        frame[22..24].copy_from_slice(&[64, 6]);
        frame[26..34].copy_from_slice(&[192, 168, 122, 2, 192, 168, 122, 3]);
        frame[46] = 0x50;
        raw
    }
}

/// Sends `count` frames and waits until as many arrived.
fn pass(from: &mut Guest, to: &mut Guest, frame: &[u8], count: usize, buffer: &mut [u8]) {
    let (mut sent, mut received) = (0, 0);
    while received < count {
        while sent < count && sent - received < BURST {
            from.tap.write_all(frame).expect("the wire takes frames");
            sent += 1;
        }
        match to.tap.read(buffer) {
            Ok(_) => received += 1,
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::yield_now(),
            Err(error) => panic!("the tap is gone: {error}"),
        }
    }
}

fn forward(criterion: &mut Criterion) {
    let config = NetworkConfig {
        name: "bench".to_owned(),
        helper: Some(env!("CARGO_BIN_EXE_lanlet").into()),
        ..NetworkConfig::default()
    };
    let network = Network::start(config).expect("a network");
    let (mut a, mut b) = (Guest::new(&network), Guest::new(&network));
    let mut buffer = vec![0; 70_000];
    // Both are learned before anything is measured.
    for (from, to) in [(0, 1), (1, 0)] {
        let (first, second) = if from < to {
            (&mut a, &mut b)
        } else {
            (&mut b, &mut a)
        };
        let hello = first.frame(second, 10);
        pass(first, second, &hello, 1, &mut buffer);
    }
    let mut group = criterion.benchmark_group("forward");
    for (name, payload) in [
        ("64 B", 10),
        ("1514 B", 1460 - 12),
        ("64 KB super-frame", 44 * MSS),
    ] {
        let frame = a.frame(&b, payload);
        group.throughput(Throughput::Bytes((frame.len() - VNET_HEADER_LEN) as u64));
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
            bencher.iter_custom(|count| {
                let start = std::time::Instant::now();
                pass(&mut a, &mut b, &frame, count as usize, &mut buffer);
                start.elapsed()
            });
        });
    }
    group.finish();
}

criterion_group!(benches, forward);
criterion_main!(benches);
