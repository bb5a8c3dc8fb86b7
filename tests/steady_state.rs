//! "No allocation in steady state": frames between guests, and TCP and UDP through the NAT both ways,
//! cost the worker no call of the allocator. The network, its taps and the host's sockets are real.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use lanlet::config::NetworkConfig;
use lanlet::frame::{ETH_HEADER_LEN, Mac};
use lanlet::nat::egress::HostAccess;
use lanlet::nat::testing::{guest_tcp, guest_udp};
use lanlet::network::{Network, PortOptions, VmmPort};
use lanlet::offload::VNET_HEADER_LEN;
use lanlet::wire;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Counts what the worker's threads allocate while [`MEASURING`].
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;
static MEASURING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

fn note() {
    if !MEASURING.load(Relaxed) {
        return;
    }
    let mut name = [0u8; 16];
    #[allow(unsafe_code)]
    // SAFETY: PR_GET_NAME writes at most 16 bytes, the terminator included, to the buffer it is given
    // (prctl(2)), and allocates nothing.
    unsafe {
        libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr());
    }
    if name.starts_with(b"lanlet-worker") {
        ALLOCATIONS.fetch_add(1, Relaxed);
    }
}

#[allow(unsafe_code)]
// SAFETY: every call goes to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller's promises are those of this function.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note();
        // SAFETY: as above.
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }
}

/// Stands for the host's loopback.
const MAPPED: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const TURNS: usize = 300;
/// Phases, of which one has to do without: a timer of a flow may be put into a slot that has none of
/// the size yet, once in seconds. What allocates per packet does so in all of them.
const PHASES: usize = 3;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const TCP_AT: usize = ETH_HEADER_LEN + wire::IPV4_HEADER_LEN;

/// A VMM's end of a port, and what a guest knows.
struct Guest {
    port: VmmPort,
    address: Ipv4Addr,
    gateway: Mac,
    buffer: Vec<u8>,
}

impl Guest {
    fn new(network: &Network, last: u8) -> Self {
        let port = network.attach_vmm(PortOptions::default()).unwrap();
        rustix::io::ioctl_fionbio(&port.fds[0], true).unwrap();
        let mut guest = Self {
            port,
            address: Ipv4Addr::new(192, 168, 122, last),
            gateway: Mac::BROADCAST,
            buffer: vec![0; 70_000],
        };
        guest.gateway = guest.ask_for_gateway();
        guest
    }

    /// RFC 826.
    fn ask_for_gateway(&mut self) -> Mac {
        let mut request = vec![0; 42];
        wire::write_ethernet(&mut request, Mac::BROADCAST, self.port.mac, 0x0806);
        request[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
        request[22..28].copy_from_slice(&self.port.mac.0);
        request[28..32].copy_from_slice(&self.address.octets());
        request[38..42].copy_from_slice(&[192, 168, 122, 1]);
        self.send(&behind_header(request, false));
        loop {
            let frame = self.receive();
            if frame[12..14] == [8, 6] && frame[20..22] == [0, 2] {
                return Mac::at(frame, 22);
            }
        }
    }

    fn send(&self, raw: &[u8]) {
        assert_eq!(rustix::io::write(&self.port.fds[0], raw), Ok(raw.len()));
    }

    /// The next frame.
    fn receive(&mut self) -> &[u8] {
        loop {
            let read = rustix::io::read(&self.port.fds[0], &mut self.buffer[..]);
            match read {
                Ok(len) => return &self.buffer[VNET_HEADER_LEN..len],
                Err(rustix::io::Errno::AGAIN) => {
                    let mut fds = [PollFd::from_borrowed_fd(
                        self.port.fds[0].as_fd(),
                        PollFlags::IN,
                    )];
                    let limit = Timespec {
                        tv_sec: 5,
                        tv_nsec: 0,
                    };
                    assert_eq!(poll(&mut fds, Some(&limit)), Ok(1), "no frame came");
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// The next TCP segment: flags, sequence number and payload length.
    fn segment(&mut self) -> (u8, u32, u32) {
        loop {
            let frame = self.receive();
            if frame[12..14] == [8, 0] && frame[23] == wire::PROTO_TCP {
                let ip_len = u32::from(wire::be16(frame, 16));
                let tcp = &frame[TCP_AT..];
                let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
                let headers = wire::IPV4_HEADER_LEN as u32 + u32::from(tcp[12] >> 4) * 4;
                return (tcp[13], sequence, ip_len - headers);
            }
        }
    }

    /// `frame` from this guest to the gateway, behind its virtio header.
    fn addressed(&self, mut frame: Vec<u8>, partial: bool) -> Vec<u8> {
        frame[..6].copy_from_slice(&self.gateway.0);
        frame[6..12].copy_from_slice(&self.port.mac.0);
        behind_header(frame, partial)
    }
}

/// A frame behind its virtio header; `partial`: TCP whose checksum is left to do, so that sequence
/// numbers can be patched.
fn behind_header(frame: Vec<u8>, partial: bool) -> Vec<u8> {
    let mut header = [0; VNET_HEADER_LEN];
    if partial {
        header[0] = 1;
        header[6..8].copy_from_slice(&(TCP_AT as u16).to_le_bytes());
        header[8..10].copy_from_slice(&16u16.to_le_bytes());
    }
    [&header[..], &frame[..]].concat()
}

fn patch(raw: &mut [u8], sequence: u32, acknowledgment: u32) {
    let at = VNET_HEADER_LEN + TCP_AT;
    raw[at + 4..at + 8].copy_from_slice(&sequence.to_be_bytes());
    raw[at + 8..at + 12].copy_from_slice(&acknowledgment.to_be_bytes());
}

/// Runs `turn` until it is warm, then counts.
fn measure(what: &str, mut turn: impl FnMut()) {
    (0..TURNS).for_each(|_| turn());
    let counts: Vec<_> = (0..PHASES)
        .map(|_| {
            ALLOCATIONS.store(0, Relaxed);
            MEASURING.store(true, Relaxed);
            (0..TURNS).for_each(|_| turn());
            MEASURING.store(false, Relaxed);
            ALLOCATIONS.load(Relaxed)
        })
        .collect();
    let least = counts.iter().min();
    assert_eq!(least, Some(&0), "{what}: {counts:?} in {TURNS} turns each");
}

/// The allocator's counts are the process's: one test, one thing after the other.
#[test]
fn steady_state_allocates_nothing() {
    let network = Network::start(NetworkConfig {
        name: "steady".to_owned(),
        helper: Some(env!("CARGO_BIN_EXE_lanlet").into()),
        host: HostAccess {
            loopback: vec![MAPPED.into()],
            ..HostAccess::default()
        },
        ..NetworkConfig::default()
    })
    .unwrap();
    let mut first = Guest::new(&network, 2);
    let mut second = Guest::new(&network, 3);

    switch(&mut first, &mut second);
    udp(&mut first);
    tcp(&mut first);
}

fn switch(first: &mut Guest, second: &mut Guest) {
    let frame = |from: &Guest, to: &Guest| {
        let mut frame = vec![0; 200];
        wire::write_ethernet(&mut frame, to.port.mac, from.port.mac, 0x88b5);
        behind_header(frame, false)
    };
    let (there, back) = (frame(first, second), frame(second, first));
    let expect = |guest: &mut Guest| while guest.receive()[12..14] != [0x88, 0xb5] {};
    measure("switch", || {
        first.send(&there);
        expect(second);
        second.send(&back);
        expect(first);
    });
}

fn udp(guest: &mut Guest) {
    let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    server
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    let to = SocketAddr::new(MAPPED.into(), server.local_addr().unwrap().port());
    let from = SocketAddr::new(guest.address.into(), 4000);
    let raw = guest.addressed(guest_udp(from, to, 64, &[7; 500]), false);
    let mut buffer = [0; 1000];
    measure("UDP", || {
        guest.send(&raw);
        let (len, client) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(len, 500);
        server.send_to(&buffer[..400], client).unwrap();
        while guest.receive()[23] != wire::PROTO_UDP {}
    });
}

fn tcp(guest: &mut Guest) {
    const UP: usize = 1_000;
    const DOWN: usize = 3_000;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    // That what is counted is what is meant: a flow of its own has its memory.
    MEASURING.store(true, Relaxed);
    let (mut stream, mut sequence, mut acknowledgment) = open(guest, &listener, port);
    MEASURING.store(false, Relaxed);
    assert!(ALLOCATIONS.load(Relaxed) > 0, "the worker is not counted");
    let (from, to) = ends(guest, port);
    let segment = |guest: &Guest, payload: &[u8]| {
        let frame = guest_tcp(from, to, (0, 0), (ACK, 65_535), &[], payload);
        let mut raw = guest.addressed(frame, true);
        // The pseudo-header's sum (RFC 9293 3.1), as the sender of a partial checksum leaves it.
        let (frame, tcp_len) = (&raw[VNET_HEADER_LEN..], (20 + payload.len()) as u64);
        let addresses = wire::checksum::sum(&frame[26..34]);
        let sum = wire::checksum::fold(addresses + u64::from(wire::PROTO_TCP) + tcp_len);
        let at = VNET_HEADER_LEN + TCP_AT + 16;
        raw[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        raw
    };
    let (mut data, mut ack) = (segment(guest, &[7; UP]), segment(guest, &[]));
    let mut buffer = [0; DOWN];
    measure("TCP", || {
        patch(&mut data, sequence, acknowledgment);
        guest.send(&data);
        sequence = sequence.wrapping_add(UP as u32);
        stream.read_exact(&mut buffer[..UP]).unwrap();
        stream.write_all(&buffer).unwrap();
        let mut missing = DOWN as u32;
        while missing > 0 {
            let (_, at, len) = guest.segment();
            if len == 0 {
                continue;
            }
            assert_eq!(at, acknowledgment);
            acknowledgment = acknowledgment.wrapping_add(len);
            missing -= len;
            patch(&mut ack, sequence, acknowledgment);
            guest.send(&ack);
        }
    });
}

fn ends(guest: &Guest, port: u16) -> (SocketAddr, SocketAddr) {
    let guest = IpAddr::from(guest.address);
    (
        SocketAddr::new(guest, 5000),
        SocketAddr::new(MAPPED.into(), port),
    )
}

/// A connection of the guest's with the listener, and the sequence numbers on both sides.
fn open(guest: &mut Guest, listener: &TcpListener, port: u16) -> (TcpStream, u32, u32) {
    let (from, to) = ends(guest, port);
    let mss = [2, 4, 5, 180];
    let syn = guest_tcp(from, to, (99, 0), (SYN, 65_535), &mss, &[]);
    guest.send(&guest.addressed(syn, false));
    let (flags, theirs, _) = guest.segment();
    assert_eq!(flags & (SYN | ACK), SYN | ACK);
    let acknowledgment = theirs.wrapping_add(1);
    let numbers = (100, acknowledgment);
    let ack = guest_tcp(from, to, numbers, (ACK, 65_535), &[], &[]);
    guest.send(&guest.addressed(ack, false));
    let (stream, _) = listener.accept().unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    (stream, 100, acknowledgment)
}
