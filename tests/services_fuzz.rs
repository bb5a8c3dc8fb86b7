//! Hostile input at every parser of the gateway's services: a million seeded cases each, mutated from
//! messages that real clients send. Nothing panics, what is claimed is answered or dropped with a
//! reason, every answer is well-formed, and no table passes its limit.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex};

use lanlet::dhcp::DhcpConfig;
use lanlet::dhcp::lease::{LEASES_MAX, LeaseTable};
use lanlet::frame::{Duration, FRAME_BUFFER_LEN, Frame, Instant, Mac, PortId};
use lanlet::gateway::dns::{DnsAnswer, QUERIES_MAX};
use lanlet::gateway::{Gateway, Lan6, LanConfig, Outbox};
use lanlet::offload::{Gso, Offload};
use lanlet::wire::ipv6::{self, Ipv6Fields, write_ipv6};
use lanlet::wire::{
    Body, Ipv4Fields, PROTO_ICMP, PROTO_ICMPV6, Packet, UDP4_PAYLOAD_AT, checksum, write_ethernet,
    write_ipv4, write_udp4,
};

/// Cases per parser. `LANLET_FUZZ_CASES` sets another number.
const CASES: u64 = 1_000_000;

fn cases() -> u64 {
    let set = std::env::var("LANLET_FUZZ_CASES").ok();
    set.and_then(|text| text.parse().ok()).unwrap_or(CASES)
}

/// splitmix64: small, fast, the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn one_in(&mut self, bound: usize) -> bool {
        self.below(bound) == 0
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// A seed with some bytes changed, cut, or grown; now and then pure noise.
    fn mutate(&mut self, seeds: &[Vec<u8>], into: &mut Vec<u8>) {
        into.clear();
        into.extend_from_slice(self.pick::<Vec<u8>>(seeds));
        if self.one_in(50) {
            let len = self.below(700);
            into.clear();
            into.extend((0..len).map(|_| 0));
            for byte in into.iter_mut() {
                *byte = self.next() as u8;
            }
            return;
        }
        for _ in 0..self.below(6) {
            if into.is_empty() {
                break;
            }
            let at = self.below(into.len());
            into[at] = match self.below(4) {
                0 => *self.pick(&[0, 1, 0x3f, 0x40, 0x7f, 0x80, 0xc0, 0xff]),
                1 => into[at].wrapping_add(1),
                2 => into[at] ^ (1 << self.below(8)),
                _ => self.next() as u8,
            };
        }
        if self.one_in(6) {
            into.truncate(self.below(into.len() + 1));
        }
        if self.one_in(6) {
            let more = self.below(300);
            let filler = self.next() as u8;
            into.resize(into.len() + more, filler);
        }
        if self.one_in(10) && !into.is_empty() {
            let from = self.below(into.len());
            let part = into[from..].to_vec();
            into.extend_from_slice(&part);
        }
    }
}

fn lan() -> LanConfig {
    let mac = Mac([0x52, 0x55, 0, 0, 0, 1]);
    LanConfig {
        mac,
        address: Ipv4Addr::new(192, 168, 122, 1),
        prefix: 24,
        mtu: 1500,
        v6: Some(Lan6 {
            link_local: ipv6::link_local(mac),
            address: Ipv6Addr::new(0xfd12, 0x3456, 0x789a, 1, 0, 0, 0, 1),
            prefix: 64,
        }),
    }
}

/// Checks each answer as it leaves.
struct Checked {
    buffer: Vec<u8>,
    sent: usize,
}

impl Outbox for Checked {
    fn buffer(&mut self) -> &mut [u8] {
        &mut self.buffer
    }

    fn send(&mut self, len: usize, offload: Offload) {
        let bytes = &self.buffer[..len];
        assert!(len <= 14 + usize::from(lan().mtu), "{len} bytes");
        let packet = Packet::parse(Frame { bytes, offload }, PortId::GATEWAY);
        let packet = packet.expect("an answer is well-formed");
        assert_eq!(packet.source, lan().mac);
        if let Body::Ipv4(ip) = packet.body {
            assert_eq!(ip.source, lan().address);
            assert_ne!(ip.destination, lan().address);
            assert!(!ip.destination.is_unspecified());
        }
        if let Body::Ipv6(ip) = packet.body {
            let lan = lan();
            assert!(lan.is_gateway(IpAddr::V6(ip.source)));
            assert!(!lan.is_gateway(IpAddr::V6(ip.destination)));
            let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
            assert!(ip.destination == all_nodes || lan.is_guest_any(IpAddr::V6(ip.destination)));
        }
        self.sent += 1;
    }
}

struct Lab {
    gateway: Gateway,
    leases: Arc<Mutex<LeaseTable>>,
    out: Checked,
    now: Instant,
    random: Random,
    claimed: u64,
    answered: u64,
    dropped: u64,
}

impl Lab {
    fn new(seed: u64) -> Self {
        let mut config = DhcpConfig::new(lan());
        config.domain = Some("lan.example".to_owned());
        let mut leases = LeaseTable::new(config.range(), &config.lan).unwrap();
        for port in 1..=4 {
            leases.open_port(PortId(port), None);
        }
        let leases = Arc::new(Mutex::new(leases));
        Self {
            gateway: Gateway::new(config, Arc::clone(&leases)),
            leases,
            out: Checked {
                buffer: vec![0xa5; FRAME_BUFFER_LEN],
                sent: 0,
            },
            now: Instant::from_secs(1),
            random: Random(seed),
            claimed: 0,
            answered: 0,
            dropped: 0,
        }
    }

    fn guest(&mut self) -> Mac {
        Mac([0x52, 0x54, 0, 0, 0, self.random.below(200) as u8])
    }

    fn handle(&mut self, frame: &[u8], offload: Offload) {
        let port = PortId(1 + self.random.below(5) as u16);
        self.now += Duration::from_millis(self.random.below(2_000) as u64);
        let Ok(packet) = Packet::parse(
            Frame {
                bytes: frame,
                offload,
            },
            port,
        ) else {
            return;
        };
        self.gateway.dhcp.handle_timeout(self.now, &mut self.out);
        let before = self.out.sent;
        let handled = self.gateway.handle(&packet, self.now, &mut self.out);
        let sent = self.out.sent - before;
        if offload.gso == Gso::None {
            // In pieces if it came in pieces; one of IPv6 holds 1,448 bytes of payload.
            let pieces = frame.len().div_ceil(1_448);
            assert!(sent <= pieces, "one answer to one message");
        }
        match handled {
            None => assert_eq!(sent, 0),
            Some(Ok(())) => self.claimed += 1,
            Some(Err(_)) => {
                self.claimed += 1;
                self.dropped += 1;
            }
        }
        self.answered += sent as u64;
    }

    fn udp(&mut self, destination_port: u16, payload: &[u8]) {
        let lan = lan();
        let guest = self.guest();
        let sources = [
            Ipv4Addr::new(192, 168, 122, 77),
            Ipv4Addr::UNSPECIFIED,
            Ipv4Addr::new(8, 8, 8, 8),
            lan.address,
        ];
        let (mac, to) = match destination_port {
            67 if !self.random.one_in(4) => (Mac::BROADCAST, Ipv4Addr::BROADCAST),
            _ => (lan.mac, lan.address),
        };
        let source = match self.random.below(20) {
            n @ 0..4 => sources[n],
            _ => sources[0],
        };
        let mut frame = vec![0; UDP4_PAYLOAD_AT + payload.len()];
        frame[UDP4_PAYLOAD_AT..].copy_from_slice(payload);
        let source_port = 1 + self.random.below(65_535) as u16;
        write_udp4(
            &mut frame,
            (guest, source, source_port),
            (mac, to, destination_port),
            payload.len(),
        );
        let mut offload = Offload::default();
        if self.random.one_in(30) {
            offload.gso = Gso::Udp(self.random.below(400) as u16);
        }
        self.handle(&frame, offload);
    }

    fn end(&self, name: &str, cases: u64) {
        println!(
            "{name}: {cases} cases, {} claimed, {} answered, {} dropped",
            self.claimed, self.answered, self.dropped
        );
        assert!(self.answered > cases / 200, "the seeds get through");
        assert!(self.dropped > cases / 200, "the mutations are noticed");
    }
}

fn dhcp_seeds() -> Vec<Vec<u8>> {
    let message = |mac: u8, flags: u8, ciaddr: [u8; 4], options: &[u8]| {
        let mut bytes = vec![0; 240];
        bytes[..3].copy_from_slice(&[1, 1, 6]);
        bytes[10] = flags;
        bytes[12..16].copy_from_slice(&ciaddr);
        bytes[28..34].copy_from_slice(&[0x52, 0x54, 0, 0, 0, mac]);
        bytes[236..240].copy_from_slice(&[99, 130, 83, 99]);
        bytes.extend_from_slice(options);
        bytes.push(255);
        bytes
    };
    let none = [0; 4];
    let own = [192, 168, 122, 60];
    let mut seeds = vec![
        message(1, 0, none, &[53, 1, 1, 55, 7, 1, 3, 6, 12, 15, 28, 42]),
        message(
            1,
            0x80,
            none,
            &[53, 1, 1, 57, 2, 2, 64, 60, 3, b'M', b'S', b'F'],
        ),
        message(
            1,
            0,
            none,
            &[53, 1, 1, 80, 0, 61, 7, 0xff, 1, 2, 3, 4, 5, 6],
        ),
        message(1, 0, none, &[53, 1, 1, 52, 1, 3, 50, 4, 192, 168, 122, 60]),
        message(
            1,
            0,
            none,
            &[53, 1, 3, 50, 4, 192, 168, 122, 60, 54, 4, 192, 168, 122, 1],
        ),
        message(
            1,
            0,
            none,
            &[53, 1, 3, 50, 4, 192, 168, 122, 60, 12, 2, b'v', b'm'],
        ),
        message(1, 0, own, &[53, 1, 3, 51, 4, 0, 0, 1, 0]),
        message(
            1,
            0,
            none,
            &[53, 1, 4, 50, 4, 192, 168, 122, 60, 54, 4, 192, 168, 122, 1],
        ),
        message(1, 0, own, &[53, 1, 7, 54, 4, 192, 168, 122, 1]),
        message(1, 0, own, &[53, 1, 8, 55, 3, 1, 3, 6]),
    ];
    let big = [&[53, 1, 1, 61, 255][..], &[7; 255], &[55, 254], &[9; 254]].concat();
    seeds.push(message(1, 0, none, &big));
    seeds
}

#[test]
fn dhcp() {
    let mut lab = Lab::new(0xd4c9);
    let seeds = dhcp_seeds();
    let mut payload = Vec::new();
    for case in 0..cases() {
        lab.random.mutate(&seeds, &mut payload);
        let lan = lan();
        // The hardware address has to be the frame's for anything behind that check.
        let spoofed = lab.random.one_in(20);
        let guest = lab.guest();
        if payload.len() >= 34 && !spoofed {
            payload[28..34].copy_from_slice(&guest.0);
        }
        let mut frame = vec![0; UDP4_PAYLOAD_AT + payload.len()];
        frame[UDP4_PAYLOAD_AT..].copy_from_slice(&payload);
        let unicast = lab.random.one_in(4);
        let (mac, to) = if unicast {
            (lan.mac, lan.address)
        } else {
            (Mac::BROADCAST, Ipv4Addr::BROADCAST)
        };
        let from = (guest, Ipv4Addr::UNSPECIFIED, 68);
        write_udp4(&mut frame, from, (mac, to, 67), payload.len());
        let mut offload = Offload::default();
        if lab.random.one_in(30) {
            offload.gso = Gso::Udp(lab.random.below(400) as u16);
        }
        lab.handle(&frame, offload);
        if case % 1_000 == 0 {
            let table = lab.leases.lock().unwrap();
            let views = table.snapshot(lab.now);
            assert!(views.len() <= LEASES_MAX.min(253));
            assert!(
                views
                    .windows(2)
                    .all(|pair| pair[0].address < pair[1].address)
            );
            let records = table.records(lab.now, 1_800_000_000);
            let mut copy = LeaseTable::new(
                Ipv4Addr::new(192, 168, 122, 2)..=Ipv4Addr::new(192, 168, 122, 254),
                &lan,
            )
            .unwrap();
            assert_eq!(
                copy.restore(&records, lab.now, 1_800_000_000),
                records.len()
            );
        }
    }
    lab.end("dhcp", cases());
}

fn dns_seeds() -> Vec<Vec<u8>> {
    let plain = b"\xab\xcd\x01\0\0\x01\0\0\0\0\0\0\x02vm\x07example\0\0\x01\0\x01".to_vec();
    let with = |mut bytes: Vec<u8>, tail: &[u8]| {
        bytes[11] += 1;
        bytes.extend_from_slice(tail);
        bytes
    };
    let opt = with(
        plain.clone(),
        b"\0\0\x29\x04\xd0\0\0\x80\0\0\x0c\0\x0a\0\x08abcdefgh",
    );
    let signed = with(opt.clone(), b"\x03key\0\0\xfa\0\xff\0\0\0\0\0\x02xx");
    let root = b"\0\x01\x01\x20\0\x01\0\0\0\0\0\0\0\0\x02\0\x01".to_vec();
    vec![plain, opt, signed, root]
}

#[test]
fn dns() {
    let mut lab = Lab::new(0xd25);
    let seeds = dns_seeds();
    let mut responses = dns_seeds();
    for response in &mut responses {
        response[2] |= 0x80;
        let records = b"\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04\xc0\0\x02\x07".repeat(60);
        response.extend_from_slice(&records);
        response[7] = 60;
    }
    let (mut payload, mut response) = (Vec::new(), Vec::new());
    let mut open = Vec::new();
    for _ in 0..cases() {
        lab.random.mutate(&seeds, &mut payload);
        lab.udp(53, &payload);
        while let Some(query) = lab.gateway.dns.poll_query() {
            assert!(query.message.len() >= 17);
            open.push(query.id);
        }
        assert!(lab.gateway.dns.outstanding() <= QUERIES_MAX);
        // Answers come late, never, twice, and broken.
        if lab.random.one_in(2) && !open.is_empty() {
            let at = lab.random.below(open.len());
            let id = if lab.random.one_in(10) {
                open[at]
            } else {
                open.swap_remove(at)
            };
            lab.random.mutate(&responses, &mut response);
            let message = response.clone().into();
            let before = lab.out.sent;
            let handled = lab
                .gateway
                .dns
                .handle_answer(&DnsAnswer { id, message }, &mut lab.out);
            assert_eq!(lab.out.sent - before, usize::from(handled.is_ok()));
        }
        open.truncate(2 * QUERIES_MAX);
    }
    lab.end("dns", cases());
}

#[test]
fn arp() {
    let mut lab = Lab::new(0xa49);
    let seed = |operation: u8, sender: [u8; 4], target: [u8; 4]| {
        let fixed = [0, 1, 8, 0, 6, 4, 0, operation, 0x52, 0x54, 0, 0, 0, 1];
        [&fixed[..], &sender, &[0; 6], &target, &[0; 18]].concat()
    };
    let (guest, gateway) = ([192, 168, 122, 77], [192, 168, 122, 1]);
    let seeds = [
        seed(1, guest, gateway),
        seed(1, [0; 4], gateway),
        seed(1, gateway, gateway),
        seed(2, guest, gateway),
        seed(1, guest, [192, 168, 122, 9]),
    ];
    let mut payload = Vec::new();
    for _ in 0..cases() {
        lab.random.mutate(&seeds, &mut payload);
        let mut frame = vec![0; 14 + payload.len()];
        write_ethernet(&mut frame, Mac::BROADCAST, lab.guest(), 0x0806);
        frame[14..].copy_from_slice(&payload);
        lab.handle(&frame, Offload::default());
    }
    lab.end("arp", cases());
}

#[test]
fn echo() {
    let mut lab = Lab::new(0xec0);
    let seeds: Vec<Vec<u8>> = [0, 1, 56, 1_472, 1_473]
        .iter()
        .map(|&len| {
            let mut message = vec![8, 0, 0, 0, 0x12, 0x34, 0, 1];
            message.resize(8 + len, 0x5a);
            message
        })
        .collect();
    let mut payload = Vec::new();
    for _ in 0..cases() {
        lab.random.mutate(&seeds, &mut payload);
        if payload.len() >= 4 && !lab.random.one_in(10) {
            payload[2..4].fill(0);
            let sum = !checksum::fold(checksum::sum(&payload));
            payload[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        let lan = lan();
        let source = *lab.random.pick(&[
            Ipv4Addr::new(192, 168, 122, 77),
            Ipv4Addr::new(192, 168, 122, 78),
            lan.broadcast(),
            Ipv4Addr::new(8, 8, 8, 8),
        ]);
        let fields = Ipv4Fields {
            source,
            destination: lan.address,
            protocol: PROTO_ICMP,
            ttl: 64,
            tos: lab.random.next() as u8,
        };
        let mut frame = vec![0; 34 + payload.len()];
        write_ethernet(&mut frame, lan.mac, lab.guest(), 0x0800);
        write_ipv4(&mut frame, fields, payload.len());
        frame[34..].copy_from_slice(&payload);
        lab.handle(&frame, Offload::default());
    }
    lab.end("echo", cases());
}

#[test]
fn ndp() {
    let mut lab = Lab::new(0x6d9);
    let v6 = lan().v6.expect("IPv6");
    let with_target = |kind: u8, flags: u8, target: Ipv6Addr, option: u8| {
        let mut message = vec![kind, 0, 0, 0, flags, 0, 0, 0];
        message.extend_from_slice(&target.octets());
        if option != 0 {
            message.extend_from_slice(&[option, 1, 0x52, 0x54, 0, 0, 0, 1]);
        }
        message
    };
    let seeds = [
        vec![133, 0, 0, 0, 0, 0, 0, 0],
        vec![133, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0x52, 0x54, 0, 0, 0, 1],
        with_target(135, 0, v6.address, 1),
        with_target(135, 0, v6.link_local, 0),
        with_target(136, 0x20, v6.address, 2),
        vec![134; 32],
        with_target(137, 0, v6.link_local, 0),
        vec![128, 0, 0, 0, 1, 2, 3, 4, 5, 6],
    ];
    let groups = ["ff02::1", "ff02::2", "ff02::1:ff00:1"].map(|group| group.parse().unwrap());
    let mut payload = Vec::new();
    for _ in 0..cases() {
        lab.random.mutate(&seeds, &mut payload);
        let guest = lab.guest();
        let source = match lab.random.below(10) {
            0 | 1 => Ipv6Addr::UNSPECIFIED,
            2 => v6.address,
            3 => "2001:db8::9".parse().unwrap(),
            4 | 5 => ipv6::with_interface_id(v6.address, guest),
            _ => ipv6::link_local(guest),
        };
        let destination = match lab.random.below(5) {
            n @ 0..3 => groups[n],
            3 => v6.link_local,
            _ => v6.address,
        };
        let mac = match destination.is_multicast() {
            true => ipv6::group_mac(destination),
            false => lan().mac,
        };
        if payload.len() >= 4 && !lab.random.one_in(10) {
            payload[2..4].fill(0);
            let addresses = (source.into(), destination.into());
            let sum = checksum::transport(addresses.0, addresses.1, PROTO_ICMPV6, &payload);
            payload[2..4].copy_from_slice(&(!sum).to_be_bytes());
        }
        let fields = Ipv6Fields {
            source,
            destination,
            protocol: PROTO_ICMPV6,
            hop_limit: if lab.random.one_in(20) { 64 } else { 255 },
            traffic_class: 0,
        };
        let mut frame = vec![0; 54 + payload.len()];
        write_ethernet(&mut frame, mac, guest, 0x86dd);
        write_ipv6(&mut frame, fields, payload.len());
        frame[54..].copy_from_slice(&payload);
        lab.handle(&frame, Offload::default());
        if lab.random.one_in(100) {
            let has_default = lab.random.one_in(2);
            lab.gateway.ndp.port_added(lab.now);
            lab.gateway.ndp.set_default_route(has_default, lab.now);
            let due = lab.gateway.ndp.poll_timeout().expect("a port hears");
            lab.now = lab.now.max(due);
            lab.gateway.ndp.handle_timeout(lab.now, &mut lab.out);
            assert!(lab.gateway.ndp.poll_timeout() > Some(lab.now));
        }
    }
    lab.end("ndp", cases());
}

/// Whole frames: whatever survives the header checks meets all services.
#[test]
fn frames() {
    let mut lab = Lab::new(0xf4a);
    let mut seeds = Vec::new();
    for (port, payloads) in [(67, dhcp_seeds()), (53, dns_seeds())] {
        for payload in payloads {
            let mut frame = vec![0; UDP4_PAYLOAD_AT + payload.len()];
            frame[UDP4_PAYLOAD_AT..].copy_from_slice(&payload);
            let guest = Mac([0x52, 0x54, 0, 0, 0, 1]);
            let from = (guest, Ipv4Addr::new(192, 168, 122, 60), 68);
            write_udp4(
                &mut frame,
                from,
                (lan().mac, lan().address, port),
                payload.len(),
            );
            // No UDP checksum, as RFC 768 allows: mutations get further.
            frame[40..42].fill(0);
            seeds.push(frame);
        }
    }
    let mut frame = Vec::new();
    for _ in 0..cases() {
        lab.random.mutate(&seeds, &mut frame);
        lab.handle(&frame, Offload::default());
        while lab.gateway.dns.poll_query().is_some() {}
    }
    lab.end("frames", cases());
}
