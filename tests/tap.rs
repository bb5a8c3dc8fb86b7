//! Wires, their ports and the helper process on the real kernel, as the user who runs the tests;
//! and once more as `nobody` when that user is root.

mod kernel;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use kernel::*;
use lanlet::frame::Batch;
use lanlet::offload::{Caps, Csum, Gso};
use lanlet::port::{DropSource, KernelDrops, PortRx, PortTx};
use lanlet::stats::PortCounters;
use lanlet::sys::tun;
use lanlet::tap::{Event, Helper, TX_QUEUE_LEN, TapError, WireDrops, WireKind, WireOptions};

/// Set in children of these tests: what to do instead of testing.
const ROLE: &str = "LANLET_TEST_ROLE";
const KINDS: [WireKind; 2] = [WireKind::Mirred, WireKind::Packet];

/// Not a test: where the child of another begins.
#[test]
fn child_entry() {
    match std::env::var(ROLE).as_deref() {
        Ok("client") => client_child(),
        Ok("attempt") => attempt_child(),
        _ => {}
    }
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
        let mut wire = helper
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
            let (mut rx, ..) =
                lanlet::port::packet::open(wire.sw.pop().unwrap(), wire.uso).unwrap();
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
fn a_plain_tap_gets_whole_segments_and_gives_bare_frames() {
    for kind in KINDS {
        let (helper, _events) = spawn_helper();
        let mut wire = helper
            .create_wire(WireOptions {
                plain: true,
                kind: Some(kind),
                ..WireOptions::default()
            })
            .unwrap();
        assert!(!tun::info(wire.vm[0].as_fd()).unwrap().vnet_header);
        let (mut rx, tx): (Box<dyn PortRx>, Box<dyn PortTx>) = match kind {
            WireKind::Mirred => {
                let (rx, tx) = lanlet::port::tap::open(wire.sw.pop().unwrap()).unwrap();
                (Box::new(rx), Box::new(tx))
            }
            WireKind::Packet => {
                let (rx, tx, _) =
                    lanlet::port::packet::open(wire.sw.pop().unwrap(), wire.uso).unwrap();
                (Box::new(rx), Box::new(tx))
            }
        };
        let (frame, start) = tcp_frame(3 * usize::from(MSS), None);
        tx.send(tcp_super_frame(&frame, start)).unwrap();
        let mut segment = [0; 2000];
        for _ in 0..3 {
            let len = wait_for("a segment", || {
                rustix::io::read(&wire.vm[0], &mut segment).ok()
            });
            assert_eq!(len, 54 + usize::from(MSS), "{kind:?}");
            assert!(tcp_checksum_is_right(&segment[..len]));
        }
        let frame = plain_frame(100);
        rustix::io::write(&wire.vm[0], &frame).unwrap();
        let mut batch = Batch::new();
        wait_for("the frame", || {
            rx.recv(&mut batch, &PortCounters::default()).unwrap();
            (!batch.is_empty()).then_some(())
        });
        assert_eq!(batch.frames().next().unwrap().bytes, frame);
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
    let mut client = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_entry", "--nocapture"])
        .env(ROLE, "client")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
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

/// Says how far it comes with a wire.
fn attempt_child() {
    let program = std::env::var_os("LANLET_TEST_PROGRAM").map_or(PROGRAM.into(), PathBuf::from);
    let wire = Helper::spawn(Some(&program)).and_then(|(helper, _events)| {
        let wire = helper.create_wire(WireOptions::default())?;
        helper.drops(wire.id)
    });
    match wire {
        Ok(_) => println!("wire made"),
        Err(error) => println!("error: {error}"),
    }
}

/// Output of [`attempt_child`] on a host that `setup`, a shell command run as root of a user and
/// mount namespace, made worse. With `capable` it may still do what root may.
fn attempt(setup: &str, capable: bool) -> String {
    let drop = if capable {
        ""
    } else {
        "setpriv --bounding-set -all --inh-caps -all"
    };
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-ec"])
        .arg(format!(
            "{setup}; exec {drop} \"$0\" --exact child_entry --nocapture"
        ))
        .arg(std::env::current_exe().unwrap())
        .env(ROLE, "attempt")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

#[test]
fn forbidden_user_namespaces_are_named_with_their_sysctl() {
    let forbid = "echo 0 > /proc/sys/user/max_user_namespaces";
    let output = attempt(forbid, false);
    assert!(
        output.contains("sysctl -w user.max_user_namespaces="),
        "{output}"
    );
    // Root does without.
    let output = attempt(forbid, true);
    assert!(output.contains("wire made"), "{output}");
}

#[test]
fn a_missing_or_forbidden_tun_device_is_named() {
    let hide = "mount -t tmpfs none /dev/net";
    let output = attempt(hide, true);
    assert!(output.contains("modprobe tun"), "{output}");
    let output = attempt(
        &format!("{hide}; touch /dev/net/tun; chmod 0 /dev/net/tun"),
        false,
    );
    assert!(output.contains("chmod 0666 /dev/net/tun"), "{output}");
}

/// All of the above as an ordinary user.
#[test]
fn everything_works_for_nobody() {
    if !rustix::process::geteuid().is_root() {
        return; // It is being done.
    }
    run_as_nobody(&[]);
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
                let (rx, tx) = lanlet::port::tap::open(wire.sw.pop().unwrap()).unwrap();
                (Box::new(rx), Box::new(tx))
            }
            WireKind::Packet => {
                let (rx, tx, ring) =
                    lanlet::port::packet::open(wire.sw.pop().unwrap(), wire.uso).unwrap();
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
