//! DHCP: a whole exchange (DISCOVER, OFFER, REQUEST, ACK) and a renewal, frame to frame.

use std::hint::black_box;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};

use criterion::{Criterion, criterion_group, criterion_main};
use lanlet::dhcp::lease::LeaseTable;
use lanlet::dhcp::{DhcpConfig, DhcpServer};
use lanlet::frame::{FRAME_BUFFER_LEN, Frame, Instant, Mac, PortId};
use lanlet::gateway::{LanConfig, Outbox, Service};
use lanlet::offload::Offload;
use lanlet::wire::{Packet, UDP4_PAYLOAD_AT, write_udp4};

const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 122, 1);

/// Keeps the last answer.
struct Last {
    buffer: Vec<u8>,
    len: usize,
}

impl Outbox for Last {
    fn buffer(&mut self) -> &mut [u8] {
        &mut self.buffer
    }

    fn send(&mut self, len: usize, _offload: Offload) {
        self.len = len;
    }
}

fn message(mac: Mac, ciaddr: Ipv4Addr, options: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 240];
    bytes[..3].copy_from_slice(&[1, 1, 6]);
    bytes[12..16].copy_from_slice(&ciaddr.octets());
    bytes[28..34].copy_from_slice(&mac.0);
    bytes[236..240].copy_from_slice(&[99, 130, 83, 99]);
    bytes.extend_from_slice(options);
    // What busybox udhcpc sends besides.
    bytes.extend_from_slice(&[57, 2, 2, 64, 55, 7, 1, 3, 6, 12, 15, 28, 42, 255]);
    bytes.resize(300, 0);
    let mut frame = vec![0; UDP4_PAYLOAD_AT + bytes.len()];
    frame[UDP4_PAYLOAD_AT..].copy_from_slice(&bytes);
    let from = (mac, Ipv4Addr::UNSPECIFIED, 68);
    write_udp4(
        &mut frame,
        from,
        (Mac::BROADCAST, Ipv4Addr::BROADCAST, 67),
        bytes.len(),
    );
    frame
}

struct Lab {
    server: DhcpServer,
    out: Last,
}

impl Lab {
    fn new(prefix: u8) -> Self {
        let lan = LanConfig {
            mac: Mac([0x52, 0x55, 0, 0, 0, 1]),
            address: GATEWAY,
            prefix,
            mtu: 1500,
            v6: None,
        };
        let config = DhcpConfig::new(lan);
        let leases = LeaseTable::new(config.range(), &config.lan).expect("a pool");
        Self {
            server: DhcpServer::new(config, Arc::new(Mutex::new(leases))),
            out: Last {
                buffer: vec![0; FRAME_BUFFER_LEN],
                len: 0,
            },
        }
    }

    /// The address in the answer.
    fn ask(&mut self, frame: &[u8], port: u16) -> Ipv4Addr {
        let frame = Frame {
            bytes: frame,
            offload: Offload::default(),
        };
        let packet = Packet::parse(frame, PortId(port)).expect("well-formed");
        self.server
            .handle(&packet, Instant::ZERO, &mut self.out)
            .expect("answered");
        // Nobody answers the probe.
        if let Some(due) = self.server.poll_timeout() {
            self.server.handle_timeout(due, &mut self.out);
        }
        let yiaddr: [u8; 4] = self.out.buffer[UDP4_PAYLOAD_AT + 16..][..4]
            .try_into()
            .expect("4 bytes");
        yiaddr.into()
    }

    fn exchange(&mut self, mac: Mac, port: u16) -> Ipv4Addr {
        let offered = self.ask(&message(mac, Ipv4Addr::UNSPECIFIED, &[53, 1, 1]), port);
        let request = [
            &[53, 1, 3, 50, 4][..],
            &offered.octets(),
            &[54, 4],
            &GATEWAY.octets(),
        ]
        .concat();
        self.ask(&message(mac, Ipv4Addr::UNSPECIFIED, &request), port)
    }
}

fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("dhcp");
    let mac = |n: u16| Mac([0x52, 0x54, 0, 0, (n >> 8) as u8, n as u8]);
    for others in [0u16, 1_000] {
        let mut lab = Lab::new(16);
        for n in 0..others {
            lab.exchange(mac(1 + n), 1 + n);
        }
        group.bench_function(format!("discover_to_ack/{others}_leases"), |bencher| {
            bencher.iter(|| black_box(lab.exchange(mac(0), 0)));
        });
        let own = lab.exchange(mac(0), 0);
        let renewal = message(mac(0), own, &[53, 1, 3]);
        group.bench_function(format!("renew/{others}_leases"), |bencher| {
            bencher.iter(|| black_box(lab.ask(&renewal, 0)));
        });
        // A newcomer is checked against all leases of its MAC and port.
        group.bench_function(format!("first_discover/{others}_leases"), |bencher| {
            let release = |address: Ipv4Addr| {
                let named = [&[53, 1, 7, 54, 4][..], &GATEWAY.octets()].concat();
                message(mac(u16::MAX), address, &named)
            };
            let discover = message(mac(u16::MAX), Ipv4Addr::UNSPECIFIED, &[53, 1, 1]);
            bencher.iter(|| {
                let offered = lab.ask(&discover, u16::MAX);
                lab.ask(&release(offered), u16::MAX)
            });
        });
    }
    group.finish();
}

criterion_group!(dhcp, benches);
criterion_main!(dhcp);
