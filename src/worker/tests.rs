//! A worker over scripted ports: what goes in comes out or is counted as dropped.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering::Relaxed;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::*;
use crate::config::BUSY_POLL_MAX;
use crate::frame::{ETH_HEADER_LEN, Frame, Mac};
use crate::gateway::LanConfig;
use crate::names::GuestName;
use crate::nat::egress::HostAccess;
use crate::nat::testing::{GATEWAY_MAC, GUEST, guest_ipv4, guest_udp, lan};
use crate::offload::{Caps, Offload};
use crate::port::{PortRx, PortTx};
use crate::stats::DropReason;
use crate::switch::SwitchConfig;
use crate::wire::{self, checksum, ipv6};
use crossbeam_channel::Receiver;

/// What guests know the host's loopback by; at this port nobody listens.
const LOOPBACK: std::net::SocketAddr = std::net::SocketAddr::new(
    std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 2, 2)),
    9,
);

/// A port over one end of a socket pair; the test holds the other.
struct ScriptedRx(Arc<OwnedFd>);
struct ScriptedTx(Arc<OwnedFd>);

impl PortRx for ScriptedRx {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn recv(&mut self, batch: &mut Batch, counters: &PortCounters) -> io::Result<More> {
        while let Some(buffer) = batch.next_buffer() {
            match rustix::io::read(&self.0, &mut *buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(len) => {
                    counters.rx(len);
                    batch.commit(0..len, Offload::default());
                }
                Err(rustix::io::Errno::AGAIN) => return Ok(More::No),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(More::Yes)
    }
}

impl PortTx for ScriptedTx {
    fn caps(&self) -> Caps {
        Caps::default()
    }

    fn send(&self, frame: Frame<'_>) -> Result<(), DropReason> {
        match rustix::io::write(&self.0, frame.bytes) {
            Ok(_) => Ok(()),
            Err(_) => Err(DropReason::EgressFull),
        }
    }
}

struct Lab {
    crew: Crew,
    events: Receiver<Event>,
    gateway: Arc<PortCounters>,
    guests: Vec<(Mac, OwnedFd, Arc<PortCounters>)>,
    threads: Vec<std::thread::JoinHandle<io::Result<()>>>,
}

impl Lab {
    fn new(guests: u8) -> Self {
        Self::with_workers(guests, 1)
    }

    fn with_workers(guests: u8, workers: usize) -> Self {
        Self::with(guests, workers, time::Duration::ZERO)
    }

    /// Guests' ports are at home with the workers in turn, and read there.
    fn with(guests: u8, workers: usize, busy_poll: time::Duration) -> Self {
        let lan: LanConfig = lan();
        let dhcp = DhcpConfig::new(lan.clone());
        let leases = Arc::new(Mutex::new(LeaseTable::new(dhcp.range(), &lan).unwrap()));
        let gateway = Arc::new(PortCounters::default());
        let (sender, events) = crossbeam_channel::bounded(1);
        let (crew, seats) = Crew::new(workers).unwrap();
        let common = Common::new(&lan, Arc::clone(crew.homes()));
        let switch = Arc::new(Switch::new(SwitchConfig::new(lan.mac, 1)));
        let epoch = time::Instant::now();
        let threads = seats
            .into_iter()
            .map(|seat| {
                let config = WorkerConfig {
                    switch: Arc::clone(&switch),
                    dhcp: dhcp.clone(),
                    leases: Arc::clone(&leases),
                    outbound: Default::default(),
                    nat: NatConfig {
                        lan: lan.clone(),
                        flows_max: 16,
                        host: HostAccess {
                            loopback: vec![LOOPBACK.ip()],
                            ..HostAccess::default()
                        },
                        udp: Default::default(),
                    },
                    common: common.for_worker(seat.id()),
                    gateway_counters: Arc::clone(&gateway),
                    events: sender.clone(),
                    busy_poll,
                    epoch,
                };
                let worker = Worker::new(config, &crew, seat).unwrap();
                std::thread::spawn(move || worker.run())
            })
            .collect();
        let guests = (1..=guests).map(|n| add_guest(&crew, n)).collect();
        let lab = Self {
            crew,
            events,
            gateway,
            guests,
            threads,
        };
        lab.settle();
        lab
    }

    /// Sends a frame from a guest and waits until the worker is through with it.
    fn send(&self, guest: usize, frame: &[u8]) {
        rustix::io::write(&self.guests[guest].1, frame).unwrap();
        self.settle();
    }

    /// Waits until the worker is through with what was sent.
    fn settle(&self) {
        // Three snapshots: the first may be answered in the turn before the frame's, the second in the same
        // turn before it. What one worker leaves for another takes as many more.
        for _ in 0..3 * self.crew.members().len() {
            self.snapshot();
        }
    }

    fn snapshot(&self) -> Snapshot {
        let count = self.crew.members().len();
        let (reply, answer) = crossbeam_channel::bounded(count);
        self.crew.tell_all(|_| Command::Snapshot(reply.clone()));
        let mut sum = Snapshot::default();
        for _ in 0..count {
            sum.add(answer.recv().unwrap());
        }
        sum
    }

    fn frame(&self, from: usize, to: Mac) -> Vec<u8> {
        let mut frame = vec![0; 60];
        wire::write_ethernet(&mut frame, to, self.guests[from].0, 0x88b5);
        frame
    }

    /// Received, sent and dropped, over all ports.
    fn sums(&self) -> (u64, u64, u64) {
        let ports = self
            .guests
            .iter()
            .map(|(.., counters)| counters)
            .chain([&self.gateway]);
        ports.fold((0, 0, 0), |(rx, tx, drops), port| {
            let dropped: u64 = port.dropped().map(|(_, count)| count).sum();
            (
                rx + port.rx_frames.load(Relaxed),
                tx + port.tx_frames.load(Relaxed),
                drops + dropped,
            )
        })
    }
}

impl Lab {
    fn stop(&mut self) {
        self.crew.tell_all(|_| Command::Stop);
        for thread in self.threads.drain(..) {
            thread.join().unwrap().unwrap();
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.stop();
    }
}

fn add_guest(crew: &Crew, n: u8) -> (Mac, OwnedFd, Arc<PortCounters>) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let (theirs, counters) = (Arc::new(theirs), Arc::new(PortCounters::default()));
    let id = PortId(u16::from(n));
    let home = WorkerId((usize::from(n - 1) % crew.members().len()) as u8);
    crew.homes().set(id, home);
    let tx: Arc<dyn PortTx> = Arc::new(ScriptedTx(Arc::clone(&theirs)));
    let reception = Reception {
        port: id,
        rx: Box::new(ScriptedRx(theirs)),
        counters: Arc::clone(&counters),
    };
    let readers = Arc::new(Mutex::new(vec![(home, reception)]));
    let added = crew.tell_all(|_| Command::AddPort {
        id,
        tx: Arc::clone(&tx),
        counters: Arc::clone(&counters),
        name: GuestName::numbered("guest", n),
        group: None,
        readers: Arc::clone(&readers),
    });
    assert!(added);
    crew.hand_out(readers);
    (Mac([0x52, 0x54, 0, 0, 1, n]), ours, counters)
}

fn received(guest: &OwnedFd) -> Vec<Vec<u8>> {
    let mut buffer = [0; 2000];
    std::iter::from_fn(|| {
        rustix::io::read(guest, &mut buffer)
            .ok()
            .filter(|len| *len > 0)
            .map(|len| buffer[..len].to_vec())
    })
    .collect()
}

#[test]
fn frames_in_are_frames_out_and_drops() {
    let lab = Lab::new(3);
    let mut copies = 0;
    // Unknown unicast floods to the two others, then the answer and what follows go to one.
    let macs: Vec<_> = lab.guests.iter().map(|guest| guest.0).collect();
    lab.send(0, &lab.frame(0, macs[1]));
    copies += 1;
    lab.send(1, &lab.frame(1, macs[0]));
    lab.send(0, &lab.frame(0, macs[1]));
    assert_eq!(received(&lab.guests[0].1).len(), 1);
    assert_eq!(received(&lab.guests[1].1).len(), 2);
    assert_eq!(received(&lab.guests[2].1).len(), 1);
    // A broadcast reaches the two others and the gateway.
    lab.send(2, &lab.frame(2, Mac::BROADCAST));
    copies += 2;
    // Dropped by the switch: to itself, reserved, the gateway's source.
    lab.send(0, &lab.frame(0, macs[0]));
    lab.send(0, &lab.frame(0, Mac([0x01, 0x80, 0xc2, 0, 0, 1])));
    let mut forged = lab.frame(0, macs[1]);
    forged[6..12].copy_from_slice(&GATEWAY_MAC.0);
    lab.send(0, &forged);
    // For the gateway: answered, refused with an answer, not understood.
    lab.send(0, &ping(macs[0], lan().address));
    lab.send(0, &ping(macs[0], std::net::Ipv4Addr::new(127, 0, 0, 1)));
    lab.send(0, &lab.frame(0, GATEWAY_MAC));
    let answers = received(&lab.guests[0].1);
    assert_eq!(answers.len(), 1 + 2, "the broadcast, a reply and an error");

    let (rx, tx, drops) = lab.sums();
    assert_eq!(drops, 5);
    assert_eq!(rx + copies, tx + drops);
    assert_eq!(lab.guests[0].2.rx_frames.load(Relaxed), 8);
}

#[test]
fn what_is_joined_is_counted() {
    let lab = Lab::new(1);
    let guest = std::net::SocketAddr::new(GUEST.into(), 4000);
    let mut frame = guest_udp(guest, "127.0.0.1:9".parse().unwrap(), 64, &[7; 100]);
    frame[6..12].copy_from_slice(&lab.guests[0].0.0);
    // Until one batch holds several of them.
    let joined = || lab.guests[0].2.rx_joined.load(Relaxed);
    let mut sent = 0;
    while joined() == 0 {
        assert!(sent < 100_000);
        for _ in 0..20 {
            rustix::io::write(&lab.guests[0].1, &frame).unwrap();
        }
        sent += 20;
        lab.settle();
    }
    let answers = received(&lab.guests[0].1).len() as u64;
    let (rx, tx, drops) = lab.sums();
    assert_eq!((rx, drops), (sent + answers, sent - joined()));
    assert_eq!(rx, tx + drops + joined());
}

/// An echo request from the first guest's address to `destination`.
fn ping(from: Mac, destination: std::net::Ipv4Addr) -> Vec<u8> {
    let mut message = [8, 0, 0, 0, 0, 1, 0, 1];
    let sum = !checksum::fold(checksum::sum(&message));
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut frame = guest_ipv4(GUEST, destination, wire::PROTO_ICMP, 64, &message);
    frame[6..12].copy_from_slice(&from.0);
    frame
}

#[test]
fn a_gone_port_is_reported_though_nobody_listens_at_first() {
    let mut lab = Lab::new(3);
    // The channel holds one event: the other two have to wait and must not get lost.
    lab.guests.clear();
    let mut gone: Vec<_> = (0..3)
        .map(
            |_| match lab.events.recv_timeout(time::Duration::from_secs(5)) {
                Ok(Event::PortGone(id)) => id.0,
                other => panic!("{other:?}"),
            },
        )
        .collect();
    gone.sort_unstable();
    assert_eq!(gone, [1, 2, 3]);
}

/// An ICMPv6 message of the guest's to all routers, without options.
fn to_routers(guest: Mac, kind: u8, fragment: bool) -> Vec<u8> {
    let source = ipv6::link_local(guest);
    let all_routers = "ff02::2".parse().unwrap();
    let mut message = [kind, 0, 0, 0, 0, 0, 0, 0];
    let (from, to) = (source.into(), std::net::IpAddr::V6(all_routers));
    let sum = !checksum::transport(from, to, wire::PROTO_ICMPV6, &message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    // A whole datagram behind a fragment header (RFC 6946).
    let header = [wire::PROTO_ICMPV6, 0, 0, 0, 0, 0, 0, 9];
    let payload = match fragment {
        true => [header, message].concat(),
        false => message.to_vec(),
    };
    let mut frame = vec![0; ETH_HEADER_LEN + ipv6::IPV6_HEADER_LEN];
    let to = ipv6::group_mac(all_routers);
    wire::write_ethernet(&mut frame, to, guest, wire::ETHERTYPE_IPV6);
    let fields = ipv6::Ipv6Fields {
        source,
        destination: all_routers,
        protocol: match fragment {
            true => ipv6::FRAGMENT,
            false => wire::PROTO_ICMPV6,
        },
        hop_limit: 255,
        traffic_class: 0,
    };
    ipv6::write_ipv6(&mut frame, fields, payload.len());
    frame.extend_from_slice(&payload);
    frame
}

#[test]
fn guests_are_told_of_the_router_and_of_its_end() {
    const ROUTER_SOLICITATION: u8 = 133;
    // The type and router lifetime of each message to the guest.
    let heard = |guest: &OwnedFd| -> Vec<(u8, u16)> {
        let frames = received(guest);
        let read = |frame: &Vec<u8>| (frame[54], wire::be16(frame, 54 + 6));
        frames.iter().map(read).collect()
    };
    let mut lab = Lab::new(1);
    let guest = lab.guests[0].0;
    lab.send(0, &to_routers(guest, ROUTER_SOLICITATION, false));
    assert_eq!(heard(&lab.guests[0].1), [(134, 0)]);
    lab.crew.tell_all(|_| Command::HostIpv6 {
        has_default: true,
        prefixes: Arc::default(),
    });
    lab.send(0, &to_routers(guest, ROUTER_SOLICITATION, false));
    assert_eq!(heard(&lab.guests[0].1), [(134, 1800)]);
    // RFC 6980: not in fragments.
    lab.send(0, &to_routers(guest, ROUTER_SOLICITATION, true));
    assert_eq!(heard(&lab.guests[0].1), []);
    lab.stop();
    assert_eq!(heard(&lab.guests[0].1), [(134, 0)]);
}

#[test]
fn several_workers_are_one_switch_and_one_gateway() {
    let lab = Lab::with_workers(4, 2);
    let macs: Vec<_> = lab.guests.iter().map(|guest| guest.0).collect();
    // Learned by one worker, used by the other.
    lab.send(0, &lab.frame(0, macs[1]));
    lab.send(1, &lab.frame(1, macs[0]));
    lab.send(3, &lab.frame(3, macs[0]));
    assert_eq!(received(&lab.guests[0].1).len(), 2);
    assert_eq!(received(&lab.guests[1].1).len(), 1);
    assert_eq!(received(&lab.guests[2].1).len(), 1);
    assert_eq!(received(&lab.guests[3].1).len(), 1);
    for (guest, &mac) in macs.iter().enumerate() {
        lab.send(guest, &ping(mac, lan().address));
        assert_eq!(received(&lab.guests[guest].1).len(), 1, "guest {guest}");
    }
    let (rx, tx, drops) = lab.sums();
    // The first frame was flooded to three.
    assert_eq!((rx + 2, drops), (tx, 0));
}

#[test]
fn what_another_worker_reads_is_answered_by_the_ports_home() {
    let lab = Lab::with_workers(2, 2);
    let (first, second) = (WorkerId(0), WorkerId(1));
    let (port, mac) = (PortId(1), lab.guests[0].0);
    let home = || lab.crew.homes().of(port);
    let udp = |payload: &[u8]| {
        let guest = std::net::SocketAddr::new(GUEST.into(), 4000);
        let mut frame = guest_udp(guest, LOOPBACK, 64, payload);
        frame[6..12].copy_from_slice(&mac.0);
        frame
    };
    // With a flow the home stays, and the frames that the other reads get there.
    lab.send(0, &udp(b"a"));
    assert_eq!(lab.snapshot().udp, 1);
    lab.crew.member(first).send(Command::PassPort {
        id: port,
        to: second,
    });
    lab.settle();
    assert_eq!(home(), first);
    lab.send(0, &udp(b"b"));
    lab.send(0, &ping(mac, lan().address));
    // Nobody is there: the datagrams are answered with errors.
    let is_reply = |frame: &Vec<u8>| frame[ETH_HEADER_LEN + 20] == 0;
    let answers = received(&lab.guests[0].1);
    assert_eq!(answers.iter().filter(|frame| is_reply(frame)).count(), 1);
    assert_eq!(lab.snapshot().udp, 1, "no second mapping elsewhere");
    // Without one it moves.
    let other = PortId(2);
    lab.crew.member(second).send(Command::PassPort {
        id: other,
        to: first,
    });
    lab.settle();
    assert_eq!(lab.crew.homes().of(other), first);
    lab.send(1, &ping(lab.guests[1].0, lan().address));
    assert_eq!(received(&lab.guests[1].1).len(), 1);
    let (rx, tx, drops) = lab.sums();
    assert_eq!(rx, tx + drops);
    // A port that is gone leaves nothing behind.
    lab.crew.tell_all(|_| Command::RemovePort(port));
    lab.settle();
    assert_eq!(lab.snapshot().udp, 0);
}

/// An answer to the first frame of a port, read by a worker that is behind with its commands.
#[test]
fn a_port_is_read_when_all_workers_know_it() {
    let lab = Lab::with_workers(2, 2);
    let (first, second) = (WorkerId(0), WorkerId(1));
    // The second guest's worker is held up: it waits until the answer is taken.
    let (reply, answer) = crossbeam_channel::bounded(0);
    lab.crew.member(second).send(Command::Snapshot(reply));
    let (mac, guest, counters) = add_guest(&lab.crew, 3);
    let mut frame = vec![0; 60];
    wire::write_ethernet(&mut frame, Mac::BROADCAST, mac, 0x88b5);
    rustix::io::write(&guest, &frame).unwrap();
    for _ in 0..2 {
        let (reply, answer) = crossbeam_channel::bounded(1);
        lab.crew.member(first).send(Command::Snapshot(reply));
        answer.recv().unwrap();
    }
    assert_eq!(counters.rx_frames.load(Relaxed), 0);
    answer.recv().unwrap();
    lab.settle();
    assert_eq!(counters.rx_frames.load(Relaxed), 1);
    lab.send(1, &lab.frame(1, mac));
    assert_eq!(received(&guest).len(), 1);
    assert_eq!(lab.guests[1].2.dropped().count(), 0);
}

/// A frame waits for its port's home; before that has it, the port goes and another takes its number.
#[test]
fn a_frame_whose_port_goes_before_its_home_has_it_is_counted() {
    let lab = Lab::with_workers(1, 2);
    let (first, second) = (WorkerId(0), WorkerId(1));
    let (port, (mac, guest, counters)) = (PortId(1), &lab.guests[0]);
    let from = std::net::SocketAddr::new(GUEST.into(), 4000);
    let mut frame = guest_udp(from, LOOPBACK, 64, b"a");
    frame[6..12].copy_from_slice(&mac.0);
    // A flow, so that the home stays.
    lab.send(0, &frame);
    lab.crew.member(first).send(Command::PassPort {
        id: port,
        to: second,
    });
    lab.settle();
    assert_eq!(lab.crew.homes().of(port), first);
    let (_, _, drops_before) = lab.sums();
    received(guest);
    // The home is held up: it waits until the answer is taken.
    let (reply, answer) = crossbeam_channel::bounded(0);
    lab.crew.member(first).send(Command::Snapshot(reply));
    rustix::io::write(guest, &ping(*mac, lan().address)).unwrap();
    let begun = time::Instant::now();
    while counters.rx_gateway.load(Relaxed) < 2 {
        assert!(begun.elapsed() < time::Duration::from_secs(10));
        std::thread::yield_now();
    }
    lab.crew.tell_all(|_| Command::RemovePort(port));
    let (_, successor, of_successor) = add_guest(&lab.crew, 1);
    answer.recv().unwrap();
    lab.settle();
    let no_port = counters.dropped().find(|drop| drop.0 == DropReason::NoPort);
    assert_eq!(no_port, Some((DropReason::NoPort, 1)));
    let (rx, tx, drops) = lab.sums();
    assert_eq!(drops, drops_before + 1);
    assert_eq!(rx, tx + drops);
    assert_eq!((received(guest), received(&successor)), (vec![], vec![]));
    assert_eq!(of_successor.dropped().count(), 0);
}

#[test]
fn ports_come_go_and_move_under_traffic() {
    assert_eq!(come_go_and_move(time::Duration::ZERO), 0);
}

#[test]
fn workers_that_look_before_they_sleep_miss_nothing() {
    assert!(come_go_and_move(BUSY_POLL_MAX) > 0);
}

/// Returns how long all workers looked, microseconds.
fn come_go_and_move(busy_poll: time::Duration) -> u64 {
    const WORKERS: u64 = 3;
    const PLACES: u64 = 6;
    let mut lab = Lab::with(0, WORKERS as usize, busy_poll);
    let mut state = 0x1234_5678_9abc_def1_u64;
    let mut random = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let mut places: Vec<_> = (0..PLACES).map(|_| None).collect();
    for round in 0..3_000 {
        let place = random(PLACES) as usize;
        let number = place as u8 + 1;
        let id = PortId(number.into());
        match (random(8), &places[place]) {
            (_, None) => places[place] = Some(add_guest(&lab.crew, number)),
            (0, Some(_)) => {
                lab.crew.tell_all(|_| Command::RemovePort(id));
                places[place] = None;
            }
            (1, Some(_)) => {
                // Whoever reads it passes it on; the others have nothing to pass.
                let to = WorkerId(random(WORKERS) as u8);
                lab.crew.tell_all(|_| Command::PassPort { id, to });
            }
            (kind, Some((mac, guest, _))) => {
                let to = Mac([0x52, 0x54, 0, 0, 1, random(PLACES) as u8 + 1]);
                let mut frame = match kind {
                    2 => ping(*mac, lan().address),
                    3 | 4 => {
                        let from = std::net::SocketAddr::new(GUEST.into(), 4000 + round % 50);
                        guest_udp(from, LOOPBACK, 64, &[7; 100])
                    }
                    _ => {
                        let mut frame = vec![0; 60];
                        wire::write_ethernet(&mut frame, to, *mac, 0x88b5);
                        frame
                    }
                };
                frame[6..12].copy_from_slice(&mac.0);
                let _ = rustix::io::write(guest, &frame);
                if random(4) == 0 {
                    received(guest);
                }
            }
        }
    }
    for number in 1..=PLACES as u8 {
        lab.crew
            .tell_all(|_| Command::RemovePort(PortId(number.into())));
    }
    lab.settle();
    let end = lab.snapshot();
    assert_eq!((end.tcp, end.udp, end.icmp, end.host_sockets), (0, 0, 0, 0));
    // All are well: a port that comes now is served.
    let (mac, guest, _) = add_guest(&lab.crew, 1);
    rustix::io::write(&guest, &ping(mac, lan().address)).unwrap();
    lab.settle();
    assert_eq!(received(&guest).len(), 1);
    let looked = lab.crew.members().iter().map(WorkerHandle::looked_micros);
    let looked = looked.sum();
    lab.stop();
    looked
}
