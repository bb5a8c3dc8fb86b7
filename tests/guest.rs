//! Namespace guests on the real kernel, as the user who runs the tests; and once more as `nobody`
//! when that user is root. Without the test harness: a process that enters a user namespace must
//! have one thread.

mod kernel;

use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};

use kernel::*;
use lanlet::frame::{Batch, Mac};
use lanlet::offload::{Caps, Gso};
use lanlet::port::{DropSource, KernelDrops, PortRx, PortTx};
use lanlet::stats::PortCounters;
use lanlet::sys::fd_pass;
use lanlet::tap::guest::ids::{Mapped, OwnIds};
use lanlet::tap::guest::{GUEST_IFNAME, Guest, GuestConfig, GuestFiles};
use lanlet::tap::{LinkDrops, TX_QUEUE_LEN};

const GUEST_MAC: &str = "52:54:00:aa:bb:01";
const GATEWAY_MAC: Mac = Mac([0x52, 0x54, 0, 0, 0, 1]);
/// First argument of a child: then whether it has offloads, and its command.
const CHILD: &str = "child";
/// First argument where only the tests are wanted.
const TESTS_ONLY: &str = "tests-only";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == CHILD) {
        return guest_child(arguments[1] == "offload", &arguments[2]);
    }
    for (name, test) in [
        ("speaks_on_its_tap", speaks_on_its_tap as fn()),
        ("leaves_checksums_undone", leaves_checksums_undone),
        (
            "plain_tap_has_complete_frames",
            plain_tap_has_complete_frames,
        ),
        ("drops_are_seen_from_outside", drops_are_seen_from_outside),
    ] {
        print!("test guest::{name} ... ");
        test();
        println!("ok");
    }
    if rustix::process::geteuid().is_root() && !arguments.contains(&TESTS_ONLY.to_owned()) {
        print!("test guest::all_as_nobody ... ");
        run_as_nobody(&[TESTS_ONLY]);
        println!("ok");
    }
}

/// One datagram of 1,000 bytes to the gateway.
const DATAGRAM: &str = "bash -c 'head -c 1000 /dev/zero > /dev/udp/192.168.122.1/9'";

/// Enters, hands the fds over by its standard input, waits for the word, runs the command.
fn guest_child(offload: bool, command: &str) {
    let own = OwnIds::current(true);
    let map = || own.map_rest(Mapped::default());
    let mut guest = Guest::enter(offload, 1, map).unwrap();
    let fds = guest.take_fds().unwrap();
    let control = std::io::stdin();
    fd_pass::send(
        control.as_fd(),
        b"fds",
        &[fds.queues[0].as_fd(), fds.netlink.as_fd()],
    )
    .unwrap();
    drop(fds);
    fd_pass::recv(control.as_fd(), &mut [0; 2]).unwrap();
    let config = GuestConfig {
        mac: GUEST_MAC.parse().unwrap(),
        address: [192, 168, 122, 7].into(),
        prefix: 24,
        gateway: [192, 168, 122, 1].into(),
        mtu: 1400,
    };
    guest.configure(&config).unwrap();
    let files = GuestFiles {
        resolv_conf: "nameserver 192.168.122.1\n".to_owned(),
        ..GuestFiles::default()
    };
    guest.set_files(&files).unwrap();
    let status = Command::new("sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .status()
        .unwrap();
    std::process::exit(status.code().unwrap_or(1));
}

/// A guest with the port on its tap.
struct Attached {
    process: Child,
    rx: Box<dyn PortRx>,
    tx: Box<dyn PortTx>,
    drops: LinkDrops,
    batch: Batch,
    counters: PortCounters,
}

impl Attached {
    fn start(offload: bool, command: &str) -> Self {
        let (ours, theirs) = seqpacket_pair();
        let process = Command::new(std::env::current_exe().unwrap())
            .args([CHILD, if offload { "offload" } else { "plain" }, command])
            .stdin(theirs)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (_, fds) = fd_pass::recv(ours.as_fd(), &mut [0; 8]).unwrap();
        let [tap, netlink]: [OwnedFd; 2] = fds.try_into().unwrap();
        let drops = LinkDrops::new(netlink, GUEST_IFNAME).unwrap();
        assert_eq!(drops.kernel_drops().unwrap(), KernelDrops::default());
        let (rx, tx): (Box<dyn PortRx>, Box<dyn PortTx>) = if offload {
            let (rx, tx) = lanlet::port::tap::open(tap).unwrap();
            (Box::new(rx), Box::new(tx))
        } else {
            let (rx, tx) = lanlet::port::plain::open(tap).unwrap();
            (Box::new(rx), Box::new(tx))
        };
        fd_pass::send(ours.as_fd(), b"go", &[]).unwrap();
        let (batch, counters) = (Batch::new(), PortCounters::default());
        Self {
            process,
            rx,
            tx,
            drops,
            batch,
            counters,
        }
    }

    /// Answers ARP until the guest sends a frame to the gateway that `wanted` likes.
    fn wait_for(&mut self, what: &str, wanted: impl Fn(&Received) -> bool) -> Received {
        wait_for(what, || {
            self.batch.clear();
            self.rx.recv(&mut self.batch, &self.counters).unwrap();
            let mut found = None;
            for frame in self.batch.frames() {
                assert_eq!(frame.source().to_string(), GUEST_MAC);
                if let Some(reply) = arp_reply(frame.bytes, GATEWAY_MAC) {
                    self.tx.send(as_frame(&reply)).unwrap();
                }
                let frame = Received::new(frame);
                if frame.as_frame().destination() == GATEWAY_MAC && wanted(&frame) {
                    found = Some(frame);
                }
            }
            found
        })
    }

    fn output(mut self) -> String {
        let mut output = String::new();
        self.process
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut output)
            .unwrap();
        assert!(self.process.wait().unwrap().success(), "{output}");
        output
    }
}

fn speaks_on_its_tap() {
    let before = fs::read_to_string("/etc/resolv.conf").unwrap();
    let mut guest = Attached::start(
        true,
        "ip -br addr; ip route; cat /etc/resolv.conf; id -u; ip link show eth0; \
         cat /proc/sys/net/ipv4/ping_group_range; ping -c 1 -W 1 192.168.122.1; true",
    );
    let echo = guest.wait_for("an echo request", |frame| frame.bytes[12..14] == [8, 0]);
    assert_eq!(echo.bytes[23], 1, "ICMP");
    let output = guest.output();
    for part in [
        "192.168.122.7/24",
        "default via 192.168.122.1 dev eth0",
        "nameserver 192.168.122.1",
        "mtu 1400",
        "\n0\n",
        "\n0\t",
        "qlen 16384",
        GUEST_MAC,
    ] {
        assert!(output.contains(part), "{part:?} is missing in\n{output}");
    }
    assert_eq!(fs::read_to_string("/etc/resolv.conf").unwrap(), before);
}

fn leaves_checksums_undone() {
    let mut guest = Attached::start(true, DATAGRAM);
    assert_eq!(
        guest.tx.caps(),
        Caps {
            csum: true,
            tso: true,
            uso: true
        }
    );
    let frame = guest.wait_for("a datagram", |frame| frame.bytes[23] == 17);
    assert!(matches!(
        frame.offload.csum,
        lanlet::offload::Csum::Partial {
            start: 34,
            offset: 6
        }
    ));
    assert_eq!(frame.offload.gso, Gso::None);
    guest.output();
}

fn plain_tap_has_complete_frames() {
    let mut guest = Attached::start(false, DATAGRAM);
    assert_eq!(guest.tx.caps(), Caps::default());
    let frame = guest.wait_for("a datagram", |frame| frame.bytes[23] == 17);
    assert_eq!(frame.offload, lanlet::offload::Offload::default());
    assert_eq!(frame.bytes.len(), 14 + 28 + 1000);
    assert!(udp_checksum_is_right(&frame.bytes));
    guest.output();
}

/// The port is not read while the guest floods it: what its queue lost shows here.
fn drops_are_seen_from_outside() {
    let flood = TX_QUEUE_LEN + 2000;
    let command = format!(
        "ip neigh add 192.168.122.1 lladdr {GATEWAY_MAC} dev eth0 && \
         ping -q -f -l 60000 -c {flood} -W 1 192.168.122.1 > /dev/null; echo done"
    );
    let mut guest = Attached::start(true, &command);
    let mut seen = KernelDrops::default();
    wait_for("drops", || {
        seen = guest.drops.kernel_drops().unwrap();
        (seen.rx > 0).then_some(())
    });
    assert_eq!(seen.tx, 0);
    guest.wait_for("what was queued", |_| true);
    guest.process.kill().unwrap();
    guest.process.wait().unwrap();
}
