//! A process that is short of open files: guests' flows leave enough of them for a vhost-user front-end that
//! brings all it may.

mod common;

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::{TempDir, skip};
use lanlet::config::NetworkConfig;
use lanlet::frame::{ETH_HEADER_LEN, Mac, PortId};
use lanlet::nat::egress::HostAccess;
use lanlet::network::{Network, PortOptions, VhostUserSocket};
use lanlet::offload::VNET_HEADER_LEN;
use lanlet::port::vhost_user::device::QUEUES_MAX;
use lanlet::port::vhost_user::memory::REGIONS_MAX;
use lanlet::wire;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::MemfdFlags;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What many a shell has, and flows of the guest: more than that.
const FILES_MAX: u64 = 1_024;
const FLOWS: u16 = 1_500;
const PATIENCE: Duration = Duration::from_secs(30);
/// Stands for the host's loopback.
const LOOPBACK: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 122, 9);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 122, 1);

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;
/// VHOST_USER_F_PROTOCOL_FEATURES, and among those REPLY_ACK.
const PROTOCOL_FEATURES: u64 = 1 << 30;
const REPLY_ACK: u64 = 1 << 3;
const PAGE_BYTES: u64 = 4_096;

/// Calls `poll` until it yields something.
fn wait_for<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(result) = poll() {
            return result;
        }
        assert!(begun.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn with_header(frame: &[u8]) -> Vec<u8> {
    [&[0; VNET_HEADER_LEN], frame].concat()
}

/// Asks for the gateway's MAC.
fn gateway_mac(tap: &mut std::fs::File, mac: Mac) -> Mac {
    let mut request = vec![0; 42];
    wire::write_ethernet(&mut request, Mac::BROADCAST, mac, 0x0806);
    request[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
    request[22..28].copy_from_slice(&mac.0);
    request[28..32].copy_from_slice(&GUEST.octets());
    request[38..42].copy_from_slice(&GATEWAY.octets());
    tap.write_all(&with_header(&request)).unwrap();
    let mut buffer = [0; 2_048];
    wait_for("the gateway's MAC", || match tap.read(&mut buffer) {
        Ok(_) => {
            let reply = &buffer[VNET_HEADER_LEN..];
            let is_reply = reply[12..14] == [8, 6] && reply[20..22] == [0, 2];
            is_reply.then(|| Mac::at(reply, 6))
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => None,
        Err(error) => panic!("{error}"),
    })
}

fn datagram(from: (Mac, u16), to: (Mac, u16)) -> Vec<u8> {
    const UDP_LEN: usize = 8;
    let mut frame = vec![0; ETH_HEADER_LEN + wire::IPV4_HEADER_LEN + UDP_LEN];
    wire::write_ethernet(&mut frame, to.0, from.0, wire::ETHERTYPE_IPV4);
    let fields = wire::Ipv4Fields {
        source: GUEST,
        destination: LOOPBACK,
        protocol: wire::PROTO_UDP,
        ttl: 64,
        tos: 0,
    };
    wire::write_ipv4(&mut frame, fields, UDP_LEN);
    let udp = &mut frame[ETH_HEADER_LEN + wire::IPV4_HEADER_LEN..];
    udp[..2].copy_from_slice(&from.1.to_be_bytes());
    udp[2..4].copy_from_slice(&to.1.to_be_bytes());
    udp[5] = UDP_LEN as u8;
    with_header(&frame)
}

/// Sends a front-end's message.
fn send(stream: &UnixStream, request: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
    let header: Vec<u8> = [request, VERSION | flags, payload.len() as u32]
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(REGIONS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    let parts = [IoSlice::new(&header), IoSlice::new(payload)];
    sendmsg(stream, &parts, &mut ancillary, SendFlags::NOSIGNAL).expect("it is connected");
}

/// The number in an answer.
fn reply(stream: &mut UnixStream) -> u64 {
    let mut reply = [0; 12 + 8];
    stream.read_exact(&mut reply).expect("it is connected");
    let number = reply.last_chunk().expect("it ends with one");
    u64::from_ne_bytes(*number)
}

/// Sends a front-end's message and waits until it is done.
fn tell(stream: &mut UnixStream, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
    send(stream, request, NEED_REPLY, payload, fds);
    assert_eq!(reply(stream), 0, "request {request}");
}

/// How many files of the process are a memory of `name`.
fn memory_files(name: &str) -> usize {
    let files = std::fs::read_dir("/proc/self/fd").unwrap();
    files
        .filter_map(|file| std::fs::read_link(file.ok()?.path()).ok())
        .filter(|link| link.to_string_lossy().contains(name))
        .count()
}

#[test]
fn flows_leave_files_for_all_that_a_front_end_may_bring() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let current = Some(FILES_MAX);
    setrlimit(Resource::Nofile, Rlimit { current, maximum }).unwrap();
    let temp = TempDir::new();
    let network = Network::start(NetworkConfig {
        helper: Some(env!("CARGO_BIN_EXE_lanlet").into()),
        host: HostAccess {
            loopback: vec![IpAddr::V4(LOOPBACK)],
            ..HostAccess::default()
        },
        ..NetworkConfig::default()
    })
    .unwrap();
    let path = temp.path().join("socket");
    let socket = VhostUserSocket::listen(&path).unwrap();
    network
        .attach_vhost_user(socket, PortOptions::default())
        .unwrap();
    let (guest_port, mut tap, mac) = match network.attach_vmm(PortOptions::default()) {
        Ok(port) => {
            let fd = port.fds.into_iter().next().unwrap();
            rustix::io::ioctl_fionbio(&fd, true).unwrap();
            (port.id, std::fs::File::from(fd), port.mac)
        }
        Err(error) => return skip(&format!("no VMM's port here: {error}")),
    };
    // What the front-end needs itself, all in one process: the same file for each of its regions and queues.
    let memory = rustix::fs::memfd_create("lanlet-regions", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memory, REGIONS_MAX as u64 * PAGE_BYTES).unwrap();
    let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let sink = UdpSocket::bind("127.0.0.1:0").unwrap();
    let sink_port = sink.local_addr().unwrap().port();
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();

    // The flows take all that they may.
    let gateway = gateway_mac(&mut tap, mac);
    for flow in 0..FLOWS {
        let datagram = datagram((mac, 10_000 + flow), (gateway, sink_port));
        tap.write_all(&datagram).unwrap();
    }
    let received = |id: PortId| {
        let status = network.status();
        let port = status.ports.into_iter().find(|port| port.id == id.0);
        port.unwrap().rx_frames
    };
    wait_for("all datagrams", || {
        (received(guest_port) > u64::from(FLOWS)).then_some(())
    });
    let sockets = network.status().totals["host_sockets"];
    assert!((500..FILES_MAX).contains(&sockets), "{sockets} sockets");

    for (offered, taken, features) in [
        (GET_FEATURES, SET_FEATURES, PROTOCOL_FEATURES),
        (GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, REPLY_ACK),
    ] {
        send(&stream, offered, 0, &[], &[]);
        assert_ne!(reply(&mut stream) & features, 0);
        send(&stream, taken, 0, &features.to_ne_bytes(), &[]);
    }
    for queue in 0..QUEUES_MAX as u64 {
        for request in [SET_VRING_KICK, SET_VRING_CALL] {
            tell(&mut stream, request, &queue.to_ne_bytes(), &[bell.as_fd()]);
        }
    }
    let mut table = Vec::from((REGIONS_MAX as u64).to_ne_bytes());
    for region in 0..REGIONS_MAX as u64 {
        let at = region * PAGE_BYTES;
        for word in [at, PAGE_BYTES, at, at] {
            table.extend(word.to_ne_bytes());
        }
    }
    // The second comes while the first is in force.
    let fds = [memory.as_fd(); REGIONS_MAX];
    for _ in 0..2 {
        tell(&mut stream, SET_MEM_TABLE, &table, &fds);
        assert_eq!(memory_files("lanlet-regions"), 1 + REGIONS_MAX);
    }
    assert_eq!(network.status().totals["host_sockets"], sockets);
    network.stop();
}
