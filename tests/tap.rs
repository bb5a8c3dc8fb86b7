//! Wires, the helper process and namespace guests on the real kernel, as the user who runs the
//! tests; and once more as `nobody` when that user is root.

mod kernel;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use kernel::*;
use lanlet::frame::{Batch, Mac};
use lanlet::offload::{Caps, Csum, Gso};
use lanlet::port::{DropSource, KernelDrops, More, PortRx, PortTx};
use lanlet::stats::PortCounters;
use lanlet::sys::{fd_pass, tun};
use lanlet::tap::guest::{GUEST_IFNAME, Guest, GuestConfig};
use lanlet::tap::{Event, LinkDrops, TX_QUEUE_LEN, TapError, WireDrops, WireKind, WireOptions};

/// Set in children of these tests: what to do instead of testing.
const ROLE: &str = "LANLET_TEST_ROLE";
const KINDS: [WireKind; 2] = [WireKind::Mirred, WireKind::Packet];

/// Not a test: where the children of the others begin. They need a process with one thread, which
/// `--test-threads=1` gives.
#[test]
fn child_entry() {
    match std::env::var(ROLE).as_deref() {
        Ok("client") => client_child(),
        Ok("guest") => guest_child(),
        _ => {}
    }
}

fn child(role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "child_entry", "--nocapture", "--test-threads=1"])
        .env(ROLE, role)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    command
}

#[test]
fn frames_of_every_size_pass_in_order_both_ways() {
    for kind in KINDS {
        let mut port = Attached::new(kind);
        for len in [14, 15, 17, 18, 60, 64, 1514, 9014, 65_521 + 14] {
            let frame = plain_frame(len);
            write_vnet(&port.vm, &[0; 12], &frame);
            let got = port.receive(1);
            assert_eq!(got[0].bytes, frame, "{kind:?} from the guest, {len} bytes");
            port.tx.send(as_frame(&frame)).unwrap();
            assert_eq!(
                read_vnet(&port.vm).unwrap().1,
                frame,
                "{kind:?} to the guest, {len} bytes"
            );
        }
        let numbered = |n: u16| {
            let mut frame = plain_frame(100);
            frame[50..52].copy_from_slice(&n.to_be_bytes());
            frame
        };
        (0..200).for_each(|n| write_vnet(&port.vm, &[0; 12], &numbered(n)));
        let got = port.receive(200);
        assert!(
            got.iter()
                .enumerate()
                .all(|(n, frame)| frame.bytes == numbered(n as u16))
        );
        assert_eq!(port.drops(), KernelDrops::default());
    }
}

#[test]
fn super_frames_pass_whole_both_ways() {
    for kind in KINDS {
        for vlan in [None, Some(0x2005)] {
            let mut port = Attached::new(kind);
            assert_eq!(
                port.tx.caps(),
                Caps {
                    csum: true,
                    tso: true,
                    uso: true
                }
            );
            tun::set_offload(port.vm.as_fd(), tun::OFFLOAD_TSO | tun::OFFLOAD_USO).unwrap();
            let (frame, start) = tcp_frame(64_000, vlan);
            write_vnet(&port.vm, &tso_header(start), &frame);
            let got = port.receive(1);
            assert_eq!(got[0].bytes, frame, "{kind:?} {vlan:?}");
            assert_eq!(got[0].offload.gso, Gso::Tcp4(MSS));
            assert_eq!(got[0].offload.csum, Csum::Partial { start, offset: 16 });
            port.tx.send(got[0].as_frame()).unwrap();
            let (header, back) = read_vnet(&port.vm).unwrap();
            assert_eq!(back, frame, "{kind:?} {vlan:?}");
            assert_eq!((header[0] & 1, header[1]), (1, 1));
            assert_eq!(u16::from_le_bytes([header[6], header[7]]), start);
        }
    }
}

#[test]
fn the_kernel_segments_for_a_guest_that_negotiated_nothing() {
    for kind in KINDS {
        let port = Attached::new(kind);
        let (frame, start) = tcp_frame(10 * usize::from(MSS), None);
        port.tx.send(tcp_super_frame(&frame, start)).unwrap();
        for _ in 0..10 {
            let (header, segment) = read_vnet(&port.vm).unwrap();
            assert_eq!(
                (header[0] & 1, header[1]),
                (0, 0),
                "{kind:?}: nothing is left to do"
            );
            assert_eq!(segment.len(), 54 + usize::from(MSS));
            assert!(tcp_checksum_is_right(&segment));
        }
        assert!(read_vnet(&port.vm).is_none());
        assert_eq!(port.drops(), KernelDrops::default());
    }
}

#[test]
fn a_burst_of_a_queue_s_length_is_not_lost_and_more_is_counted() {
    let mut port = Attached::new(WireKind::Mirred);
    let burst = TX_QUEUE_LEN as usize;
    let frame = plain_frame(64);
    for _ in 0..burst {
        write_vnet(&port.vm, &[0; 12], &frame);
        port.tx.send(as_frame(&frame)).unwrap();
    }
    assert_eq!(port.drops(), KernelDrops::default());
    for _ in 0..100 {
        write_vnet(&port.vm, &[0; 12], &frame);
        port.tx.send(as_frame(&frame)).unwrap();
    }
    assert_eq!(port.drops(), KernelDrops { rx: 100, tx: 100 });
    assert_eq!(port.receive(burst).len(), burst);
    let mut read = 0;
    while read_vnet(&port.vm).is_some() {
        read += 1;
    }
    assert_eq!(read, burst);
}

#[test]
fn a_packet_ring_counts_what_it_lost() {
    let mut port = Attached::new(WireKind::Packet);
    let frame = plain_frame(1514);
    (0..300).for_each(|_| write_vnet(&port.vm, &[0; 12], &frame));
    let drops = port.drops();
    assert!(drops.rx > 0 && drops.rx < 100, "{drops:?}");
    assert_eq!(
        port.receive(300 - drops.rx as usize).len(),
        300 - drops.rx as usize
    );
    assert_eq!(
        port.drops(),
        drops,
        "a second reading must not forget the first"
    );
    // What the guest does not read is told to the sender at once.
    let mut full = 0;
    for _ in 0..TX_QUEUE_LEN + 50 {
        full += u64::from(port.tx.send(as_frame(&frame)).is_err());
    }
    assert_eq!((full, port.drops().tx), (50, 50));
}

#[test]
fn the_vmm_s_end_is_told() {
    let (helper, events) = spawn_helper();
    for kind in KINDS {
        let wire = helper
            .create_wire(WireOptions {
                kind: Some(kind),
                ..WireOptions::default()
            })
            .unwrap();
        let (id, vm) = (wire.id, wire.vm);
        assert_eq!(events.next_event().unwrap(), None);
        drop(vm);
        assert_eq!(
            wait_for("the event", || events.next_event().unwrap()),
            Event::Gone(id)
        );
        assert!(matches!(helper.drops(id), Err(TapError::NotATap { .. })));
        if kind == WireKind::Packet {
            let (mut rx, ..) = lanlet::port::packet::open(wire.sw, wire.uso).unwrap();
            let mut batch = Batch::new();
            assert!(rx.recv(&mut batch, &PortCounters::default()).is_err());
        }
    }
}

#[test]
fn a_destroyed_wire_leaves_the_vmm_with_its_link_down() {
    let port = Attached::new(WireKind::Mirred);
    port.helper.destroy_wire(port.id).unwrap();
    let error = rustix::io::write(&port.vm, &[0; 100]).unwrap_err();
    assert_eq!(error, rustix::io::Errno::IO);
    assert!(read_vnet(&port.vm).is_none());
    port.helper.destroy_wire(port.id).unwrap();
}

#[test]
fn a_vmm_gets_as_many_queues_as_it_wants() {
    let (helper, _events) = spawn_helper();
    let wire = helper
        .create_wire(WireOptions {
            queues: 4,
            ..WireOptions::default()
        })
        .unwrap();
    assert_eq!(wire.kind, WireKind::Mirred);
    assert_eq!(wire.vm.len(), 4);
    for fd in &wire.vm {
        let info = tun::info(fd.as_fd()).unwrap();
        assert!(info.multi_queue && info.vnet_header && info.tap && info.no_packet_info);
        assert_eq!(info.name, wire.vm_ifname);
    }
}

#[test]
fn a_missing_helper_program_is_named() {
    let error = lanlet::tap::Helper::spawn(Some(Path::new("/nowhere/lanlet"))).unwrap_err();
    assert!(error.to_string().contains("/nowhere/lanlet"), "{error}");
    let error = lanlet::tap::Helper::spawn(Some(Path::new("/bin/true"))).unwrap_err();
    assert!(
        error.to_string().contains("not the lanlet program"),
        "{error}"
    );
}

fn client_child() {
    let (helper, _events) = spawn_helper();
    let _wire = helper.create_wire(WireOptions::default()).unwrap();
    println!("helper={}", helper.pid());
    sleep(Duration::from_secs(60));
}

#[test]
fn the_helper_ends_with_a_killed_client() {
    let mut client = child("client").spawn().unwrap();
    let lines = BufReader::new(client.stdout.take().unwrap()).lines();
    let helper: u32 = lines
        .map_while(Result::ok)
        .find_map(|line| {
            line.split("helper=")
                .nth(1)
                .and_then(|pid| pid.parse().ok())
        })
        .unwrap();
    let alive =
        || fs::read_to_string(format!("/proc/{helper}/stat")).is_ok_and(|s| !s.contains(") Z "));
    assert!(alive());
    client.kill().unwrap();
    client.wait().unwrap();
    wait_for("the helper's end", || (!alive()).then_some(()));
}

/// Enters, hands the fds over by its standard input, and reports what it sees.
fn guest_child() {
    let mut guest = Guest::enter(true).unwrap();
    let fds = guest.take_fds().unwrap();
    let control = std::io::stdin();
    fd_pass::send(
        control.as_fd(),
        b"fds",
        &[fds.tap.as_fd(), fds.netlink.as_fd()],
    )
    .unwrap();
    drop(fds);
    let mut go = [0; 2];
    fd_pass::recv(control.as_fd(), &mut go).unwrap();
    let config = GuestConfig {
        mac: GUEST_MAC.parse().unwrap(),
        address: [192, 168, 122, 7].into(),
        prefix: 24,
        gateway: [192, 168, 122, 1].into(),
        mtu: 1400,
    };
    guest.configure(&config).unwrap();
    guest.set_resolv_conf("nameserver 192.168.122.1\n").unwrap();
    let script = "ip -br addr; ip route; cat /etc/resolv.conf; id -u; \
                  cat /sys/class/net/eth0/tx_queue_len /proc/sys/net/ipv4/ping_group_range; \
                  ip link show eth0; ping -c 1 -W 1 192.168.122.1 || true; echo end";
    let status = Command::new("sh").args(["-c", script]).status().unwrap();
    assert!(status.success());
}

const GUEST_MAC: &str = "52:54:00:aa:bb:01";

#[test]
fn a_namespace_guest_speaks_on_its_tap() {
    let before = fs::read_to_string("/etc/resolv.conf").unwrap();
    let (ours, theirs) = seqpacket_pair();
    let mut process = child("guest").stdin(theirs).spawn().unwrap();
    let (_, fds) = fd_pass::recv(ours.as_fd(), &mut [0; 8]).unwrap();
    let [tap, netlink]: [OwnedFd; 2] = fds.try_into().unwrap();
    let drops = LinkDrops::new(netlink, GUEST_IFNAME).unwrap();
    assert_eq!(drops.kernel_drops().unwrap(), KernelDrops::default());
    let (mut rx, tx) = lanlet::port::tap::open(tap).unwrap();
    fd_pass::send(ours.as_fd(), b"go", &[]).unwrap();

    let mut batch = Batch::new();
    let counters = PortCounters::default();
    let gateway: Mac = "52:54:00:00:00:01".parse().unwrap();
    let echo = wait_for("an echo request", || {
        batch.clear();
        assert_eq!(rx.recv(&mut batch, &counters).unwrap(), More::No);
        for frame in batch.frames() {
            assert_eq!(frame.source().to_string(), GUEST_MAC);
            if let Some(reply) = arp_reply(frame.bytes, gateway) {
                tx.send(as_frame(&reply)).unwrap();
            }
            if frame.destination() == gateway {
                return Some(frame.bytes.to_vec());
            }
        }
        None
    });
    assert_eq!(
        (echo[12..14].to_vec(), echo[23]),
        (vec![8, 0], 1),
        "ICMP over IPv4"
    );

    let mut output = String::new();
    for line in BufReader::new(process.stdout.take().unwrap()).lines() {
        output += &(line.unwrap() + "\n");
    }
    assert!(process.wait().unwrap().success(), "{output}");
    for part in [
        "192.168.122.7/24",
        "default via 192.168.122.1 dev eth0",
        "nameserver 192.168.122.1",
        "mtu 1400",
        "\n0\n",
        "qlen 16384",
        GUEST_MAC,
    ] {
        assert!(output.contains(part), "{part:?} is missing in\n{output}");
    }
    assert_eq!(fs::read_to_string("/etc/resolv.conf").unwrap(), before);
}

/// All of the above as an ordinary user.
#[test]
fn everything_works_for_nobody() {
    if !rustix::process::geteuid().is_root() {
        return; // It is being done.
    }
    let directory = std::env::temp_dir().join(format!("lanlet-nobody.{}", std::process::id()));
    fs::create_dir(&directory).unwrap();
    let copy = |from: &Path| {
        let to = directory.join(from.file_name().unwrap());
        fs::copy(from, &to).unwrap();
        to
    };
    let tests = copy(&std::env::current_exe().unwrap());
    let program = copy(Path::new(PROGRAM));
    let output = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(tests)
        .env("LANLET_TEST_PROGRAM", program)
        .env_remove("XDG_RUNTIME_DIR")
        .current_dir("/")
        .output()
        .unwrap();
    fs::remove_dir_all(&directory).unwrap();
    let _ = std::io::stderr().write_all(&output.stderr);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
}

/// A wire with a port on the switch's end.
struct Attached {
    helper: Arc<lanlet::tap::Helper>,
    id: u64,
    vm: OwnedFd,
    rx: Box<dyn PortRx>,
    tx: Box<dyn PortTx>,
    counters: PortCounters,
    drops: Vec<Box<dyn DropSource>>,
}

impl Attached {
    fn new(kind: WireKind) -> Self {
        let (helper, _events) = spawn_helper();
        let helper = Arc::new(helper);
        let options = WireOptions {
            kind: Some(kind),
            ..WireOptions::default()
        };
        let mut wire = helper.create_wire(options).unwrap();
        let mut drops: Vec<Box<dyn DropSource>> =
            vec![Box::new(WireDrops::new(helper.clone(), wire.id))];
        let (rx, tx): (Box<dyn PortRx>, Box<dyn PortTx>) = match kind {
            WireKind::Mirred => {
                let (rx, tx) = lanlet::port::tap::open(wire.sw).unwrap();
                (Box::new(rx), Box::new(tx))
            }
            WireKind::Packet => {
                let (rx, tx, ring) = lanlet::port::packet::open(wire.sw, wire.uso).unwrap();
                drops.push(Box::new(ring));
                (Box::new(rx), Box::new(tx))
            }
        };
        let vm = wire.vm.pop().unwrap();
        Self {
            helper,
            id: wire.id,
            vm,
            rx,
            tx,
            counters: PortCounters::default(),
            drops,
        }
    }

    /// The next `count` frames of the guest.
    fn receive(&mut self, count: usize) -> Vec<Received> {
        let mut frames = Vec::new();
        let mut batch = Batch::new();
        let deadline = Instant::now() + Duration::from_secs(5);
        while frames.len() < count && Instant::now() < deadline {
            batch.clear();
            self.rx.recv(&mut batch, &self.counters).unwrap();
            frames.extend(batch.frames().map(Received::new));
        }
        assert_eq!(self.counters.dropped().collect::<Vec<_>>(), []);
        assert_eq!(frames.len(), count);
        frames
    }

    fn drops(&self) -> KernelDrops {
        self.drops
            .iter()
            .map(|source| source.kernel_drops().unwrap())
            .fold(KernelDrops::default(), |a, b| KernelDrops {
                rx: a.rx + b.rx,
                tx: a.tx + b.tx,
            })
    }
}
