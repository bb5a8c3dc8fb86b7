//! Real vhost-user front-ends, as an ordinary user: QEMU, with a Linux guest, and DPDK's testpmd.
//!
//! QEMU emulates the CPU here, and its 7.2 crashes with MSI-X on a vhost-user card then: `vectors=0`.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use common::{World, guests_missing, lab, skip, world_missing};
use lanlet::network::Status;

/// Bytes from guest to guest: a second of hashing.
const TRANSFER_BYTES: u64 = 30_000_000;

/// The first run of the guest on the port that stays: it is there when lanlet restarts.
const FIRST: &str = r#"
step ping_gateway ping -c 1 -W 2 "$ROUTER"
nc -d -l 7001 | sha256sum | cut -c1-64 >/tmp/one & one=$!
nc -d -l 7002 | sha256sum | cut -c1-64 >/tmp/two & two=$!
listening 7001; listening 7002
say features=$(ethtool -k eth0 | grep -cE '^(tcp-segmentation-offload|rx-checksumming|tx-checksumming): on')
say listening=1
wait $one $two
say from_tap="$(cat /tmp/one)" from_guest="$(cat /tmp/two)"
await restarted
tries=0
until ping -c 1 -W 1 "$ROUTER" >/dev/null; do tries=$((tries + 1)); [ $tries -lt 20 ] || break; done
step ping_again ping -c 1 -W 2 "$ROUTER"
await never
"#;

/// And the second, by another QEMU.
const SECOND: &str = r#"step ping_second ping -c 1 -W 2 "$ROUTER""#;

/// The guest of `lanlet qemu --vhost-user`.
const OTHER: &str = r#"
say reading=1
read -r PEER
step ping_peer ping -c 1 -W 2 "$PEER"
pattern BYTES | nc -N "$PEER" 7002
say to_peer=$?
"#;

const SCENARIO: &str = r#"
port() { # NAME SCRIPT: a QEMU that connects to the port's socket, as often as it has to
    mkfifo "$1.in"
    "$LAB/as-user" qemu-system-x86_64 -accel tcg -cpu max -m 192 -nographic -no-reboot \
        -object memory-backend-memfd,id=m,size=192M,share=on -machine memory-backend=m \
        -chardev socket,id=c,path="$TMP/port.sock",reconnect=1 -netdev vhost-user,id=n,chardev=c \
        -device virtio-net-pci,netdev=n,mac=52:54:00:00:00:77,romfile=,vectors=0 \
        -kernel "$LAB/out/vmlinuz" -initrd "$LAB/out/initrd.gz" \
        -append "$("$LAB/guest-image/append" lanlet.host="$1")" \
        -fw_cfg name=opt/lanlet/script,file="$2" <>"$1.in" >"$1.console" 2>&1 &
    QEMU=$!
}
up() { network --lease-file "$TMP/leases" --port "vhost-user:$TMP/port.sock,name=standing"; }
up
say mode="$(stat -c %a port.sock)"
lanlet up --name second --lease-file none --port "vhost-user:$TMP/port.sock" >second.log 2>&1; say second=$?
port first "$TMP/first.sh"
guest other "$TMP/other.sh" --vhost-user --queues 2; OTHER=$GUEST
marker first listening 60
FIRST=$(value first lease | cut -d/ -f1)
# What is said before a guest has opened its console is lost.
marker other reading 60
tell other "$FIRST"
lanlet exec -- ping -c 1 -W 2 "$FIRST" >ping.log; say ping_from_tap=$?
"$LAB/pattern" BYTES | lanlet exec -- nc -N "$FIRST" 7001; say tap_to_guest=$?
marker first from_guest 60
wait $OTHER; say other_exit=$?
lanlet status --json >status.json || fail "status"

# lanlet restarts; QEMU and its guest stay.
kill -KILL $NETWORK; wait $NETWORK
[ -S port.sock ] || fail "a killed lanlet leaves its socket"
mv up.log up-1.log
up
tell first restarted
marker first ping_again 40

# QEMU restarts; lanlet stays.
kill -KILL $QEMU; wait $QEMU
port again "$TMP/second.sh"
marker again ping_second 60
say same_lease="$([ "$(value again lease)" = "$(value first lease)" ] && echo yes)"
wait $QEMU
kill -TERM $NETWORK; wait $NETWORK; say network_exit=$?
[ ! -e port.sock ]; say removed=$?
"#;

#[test]
fn qemu_guests_by_shared_memory() {
    if let Some(reason) = guests_missing() {
        return skip(&reason);
    }
    let world = World::new().limit(Duration::from_secs(180));
    let bytes = TRANSFER_BYTES.to_string();
    world.temp().file("first.sh", FIRST);
    world.temp().file("second.sh", SECOND);
    world
        .temp()
        .file("other.sh", OTHER.replace("BYTES", &bytes));
    let outcome = world.run(&SCENARIO.replace("BYTES", &bytes));
    let told = || {
        let mut text = outcome.text();
        for name in [
            "up-1.log",
            "up.log",
            "second.log",
            "first.console",
            "other.console",
            "again.console",
            "status.json",
        ] {
            text.push_str(&format!("\n--- {name}\n{}", world.temp().read(name)));
        }
        text
    };
    assert_eq!(outcome.status, Some(0), "{}", told());

    let markers = outcome.markers();
    for (key, wanted) in [
        ("mode", "600"),
        ("second", "1"),
        ("ping_from_tap", "0"),
        ("tap_to_guest", "0"),
        ("other_exit", "0"),
        ("same_lease", "yes"),
        ("network_exit", "0"),
        ("removed", "0"),
    ] {
        assert_eq!(markers.get(key), Some(wanted), "{key}: {}", told());
    }
    let refused = world.temp().read("second.log");
    assert!(
        refused.contains("port.sock") && refused.contains("already in use"),
        "{refused}"
    );
    let first = world.console("first");
    let hash = common::pattern_hash(TRANSFER_BYTES, "sha256sum");
    for (key, wanted) in [
        ("ping_gateway", "0"),
        ("features", "3"),
        ("from_tap", hash.as_str()),
        ("from_guest", hash.as_str()),
        ("ping_again", "0"),
    ] {
        assert_eq!(first.get(key), Some(wanted), "{key}: {}", told());
    }
    let other = world.console("other");
    for (key, wanted) in [("reading", "1"), ("ping_peer", "0")] {
        assert_eq!(other.get(key), Some(wanted), "{key}: {}", told());
    }
    assert_eq!(
        world.console("again").get("ping_second"),
        Some("0"),
        "{}",
        told()
    );

    let text = world.temp().read("status.json");
    let status: Status = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let standing = status.ports.iter().find(|port| port.name == "standing");
    let standing = standing.unwrap_or_else(|| panic!("{text}"));
    assert_eq!(standing.kind, "vhost-user");
    // Their guests' memory is theirs, but for what was received into pages that they had not touched, and the
    // tables that map it: 30 MB came in twice.
    let allocated = status.gauges["guest_memory_bytes"];
    assert!((1 << 16..32 << 20).contains(&allocated), "{}", told());
    // Both transfers came as super-frames: with frames of 1,514 bytes they would be 40,000.
    assert!(standing.tx_frames < 20_000, "{}", told());
}

const TESTPMD: &str = r#"
network --port "vhost-user:$TMP/a.sock,name=a" --port "vhost-user:$TMP/b.sock,name=b"
testpmd() { # NAME MAC SECONDS [OPTION...]
    local name=$1 mac=$2 secs=$3
    shift 3
    user timeout -s INT "$secs" "$LAB/dpdk/testpmd" "$name" "$TMP/$name.sock" "$mac" \
        --stats-period 1 "$@" </dev/null >>"$name.log" 2>&1
}
frames() { lanlet status --json | python3 -c "import json,sys; print([p['tx_frames'] for p in json.load(sys.stdin)['ports'] if p['name'] == 'b'][0])"; }
testpmd a 02:00:00:00:00:0a 4.5 --forward-mode=txonly --eth-peer=0,02:00:00:00:00:0b & A=$!
for round in 1 2; do
    before=$(frames)
    testpmd b 02:00:00:00:00:0b 1.6 --forward-mode=macswap
    say came=$(($(frames) - before))
done
wait $A
say received="$(grep -a 'RX-packets' b.log | awk '{print $2}' | sort -rn | head -1)"
kill -TERM $NETWORK; wait $NETWORK; say network_exit=$?
"#;

#[test]
fn testpmd_comes_and_goes() {
    if let Some(reason) = world_missing() {
        return skip(&reason);
    }
    if !lab().dir.join("out/dpdk/testpmd").exists() {
        return skip("no testpmd: run lab/dpdk/build");
    }
    let world = World::new().limit(Duration::from_secs(60));
    let outcome = world.run(TESTPMD);
    let told = || {
        let read = |name| world.temp().read(name);
        let (a, b, up) = (read("a.log"), read("b.log"), read("up.log"));
        format!(
            "{}\n--- up.log\n{up}\n--- a\n{a}\n--- b\n{b}",
            outcome.text()
        )
    };
    assert_eq!(outcome.status, Some(0), "{}", told());
    let markers = outcome.markers();
    markers.passed(&["network_exit"]);
    for came in markers.all("came") {
        assert!(came.parse::<u64>().unwrap_or(0) > 1000, "{}", told());
    }
    assert_eq!(markers.all("came").len(), 2);
    assert!(markers.number("received") > 1000.0, "{}", told());
}

/// Bytes that the process under attack may use.
const GROUP_BYTES: u64 = 200 << 20;

/// A front-end whose memory is holes: it has 64 KiB of them read with each descriptor, again and again, of
/// one file after the other, and takes the pages out behind lanlet's back.
const HOLES: &str = r#"
import array, ctypes, os, socket, struct, sys, time
BYTES, SIZE, LEN = 4 << 30, 256, 65536
libc = ctypes.CDLL(None, use_errno=True)
kept = []
def punch(file):
    libc.fallocate(file, 3, ctypes.c_long(1 << 20), ctypes.c_long(BYTES - (1 << 20)))
def attack(path, is_punching):
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(5)
    for _ in range(100):
        try:
            peer.connect(path)
            break
        except OSError:
            time.sleep(0.02)
    def tell(request, payload, *fds):
        anc = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', fds))] if fds else []
        peer.sendmsg([struct.pack('III', request, 1, len(payload)), payload], anc)
    file = os.memfd_create('holes')
    os.ftruncate(file, BYTES)
    kept.append(file)
    kick, call = (os.eventfd(0) for _ in range(2))
    tell(3, b'')                                                # SET_OWNER
    tell(2, struct.pack('Q', 1 << 32))                          # SET_FEATURES: VERSION_1
    tell(5, struct.pack('5Q', 1, 0, BYTES, 0, 0), file)         # SET_MEM_TABLE
    tell(8, struct.pack('II', 1, SIZE))                         # SET_VRING_NUM, _BASE, _ADDR, _CALL, _KICK
    tell(10, struct.pack('II', 1, 0))
    tell(9, struct.pack('II4Q', 1, 0, 0, 0x20000, 0x10000, 0))
    tell(13, struct.pack('Q', 1), call)
    tell(12, struct.pack('Q', 1), kick)
    at, avail = 1 << 20, 0
    for _ in range(200):
        table = b''.join(struct.pack('QIHH', at + n * LEN, LEN, 0, 0) for n in range(SIZE))
        os.pwrite(file, table, 0)
        os.pwrite(file, struct.pack('H', 0) * 2 + b''.join(struct.pack('H', n) for n in range(SIZE)), 0x10000)
        avail = (avail + SIZE) & 0xffff
        os.pwrite(file, struct.pack('H', avail), 0x10002)
        os.eventfd_write(kick, 1)
        for _ in range(40):
            if struct.unpack('H', os.pread(file, 2, 0x20002))[0] == avail:
                break
            time.sleep(0.005)
        else:
            return                                              # given up
        at += SIZE * LEN
        if at + SIZE * LEN > BYTES:
            at = 1 << 20
        if is_punching:
            punch(file)
for n in range(6):
    try:
        attack(sys.argv[1], n % 2 == 1)
    except OSError as error:
        print('attack', n, error)
print('attacks over')
"#;

/// A control group for memory, of either version, that goes with it.
struct MemoryGroup(PathBuf);

impl MemoryGroup {
    fn new() -> Result<Self, String> {
        let name = format!("lanlet-test-{}", std::process::id());
        let (root, limit) = match Path::new("/sys/fs/cgroup/memory").exists() {
            true => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            false => ("/sys/fs/cgroup", "memory.max"),
        };
        // Where version 2 does not hand memory down yet.
        let _ = fs::write(format!("{root}/cgroup.subtree_control"), "+memory");
        let group = MemoryGroup(Path::new(root).join(name));
        fs::create_dir(&group.0)
            .and_then(|()| fs::write(group.0.join(limit), GROUP_BYTES.to_string()))
            .map_err(|error| {
                format!(
                    "no control group for memory: {}: {error}",
                    group.0.display()
                )
            })?;
        Ok(group)
    }

    /// Times that the group's limit made the kernel kill.
    fn kills(&self) -> u64 {
        ["memory.oom_control", "memory.events"]
            .iter()
            .filter_map(|file| fs::read_to_string(self.0.join(file)).ok())
            .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
            .filter_map(|line| line.strip_prefix("oom_kill ")?.parse::<u64>().ok())
            .sum()
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let begun = Instant::now();
        while self.0.exists() && fs::remove_dir(&self.0).is_err() {
            if begun.elapsed() > Duration::from_secs(10) {
                eprintln!("left behind: {}", self.0.display());
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn holes_in_a_guests_memory_are_not_lanlets_to_allocate() {
    let group = match MemoryGroup::new() {
        Ok(group) => group,
        Err(reason) => return skip(&reason),
    };
    let world = World::new();
    let temp = world.temp();
    let script = temp.file("holes.py", HOLES);
    let socket = temp.path().join("holes.sock");
    let other = temp.path().join("other.sock");
    let as_user = lab().dir.join("as-user");
    let log = fs::File::create(temp.path().join("up.log")).unwrap();
    let procs = group.0.join("cgroup.procs");
    // Without a network, which nothing here needs.
    let mut lanlet = Command::new("bash")
        .args(["-c", "echo $$ >\"$0\" && exec unshare --net \"$@\""])
        .arg(&procs)
        .arg(&as_user)
        .arg(&lab().lanlet)
        .args(["up", "--name", "holes", "--lease-file", "none"])
        .arg("--port")
        .arg(format!("vhost-user:{},name=holes", socket.display()))
        .arg("--port")
        .arg(format!("vhost-user:{},name=other", other.display()))
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while !socket.exists() || !other.exists() {
        let log = || temp.read("up.log");
        assert!(lanlet.try_wait().unwrap().is_none(), "{}", log());
        assert!(begun.elapsed() < Duration::from_secs(30), "{}", log());
        thread::sleep(Duration::from_millis(20));
    }
    let attack = Command::new("timeout")
        .arg("50")
        .arg(&as_user)
        .arg("python3")
        .args([&script, &socket])
        .output()
        .unwrap();
    let ended = lanlet.try_wait().unwrap();
    let _ = lanlet.kill();
    let _ = lanlet.wait();
    let told = format!(
        "{}{}\n--- up.log\n{}",
        String::from_utf8_lossy(&attack.stdout),
        String::from_utf8_lossy(&attack.stderr),
        temp.read("up.log")
    );
    assert!(told.contains("attacks over"), "{told}");
    assert_eq!((ended, group.kills()), (None, 0), "{told}");
    assert!(told.contains("more than lanlet may allocate"), "{told}");
}
