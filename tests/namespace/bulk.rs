//! Much data at the kernel's own limits: nothing is lost on the way to and from a guest, and what a
//! queue could not take is told.

use crate::common::{World, heavy};
use crate::{assert_said, scenario};

/// Retransmitted segments of all at most. A tail-loss probe after a pause of the machine is one; a
/// queue that overflows costs percents.
const RETRANSMITTED_MAX: f64 = 0.001;
/// The same for what `outside` sends to the host: on a veth a sender that changes its CPU overtakes
/// itself, with or without lanlet.
const RETRANSMITTED_OUTSIDE_MAX: f64 = 0.01;

#[test]
fn bulk_transfers_lose_nothing() {
    let _alone = heavy();
    let world = World::new().with(&["--iperf"]);
    let Some(outcome) = scenario(
        &world,
        r#"
        network
        cat >run.py <<'END'
import json, subprocess, sys

def counters():
    """TcpExt of this namespace."""
    names, values = [line.split()[1:] for line in open("/proc/net/netstat") if line.startswith("TcpExt:")]
    return dict(zip(names, map(int, values)))

for name, options in ("up", []), ("down", ["-R"]), ("up16", ["-P", "16"]), ("down16", ["-P", "16", "-R"]):
    before = counters()
    end = json.loads(subprocess.run(["iperf3", "-c", "198.51.100.2", "-t", "2", "-J", *options], stdout=-1).stdout)["end"]
    after = counters()
    said = {
        "mbps": round(end["sum_received"]["bits_per_second"] / 1e6),
        "segments": end["sum_sent"]["bytes"] // 1448,
        "retransmits": end["sum_sent"]["retransmits"],
        # What came twice, or out of order, from lanlet to this guest.
        "twice": after["TCPDSACKOldSent"] - before["TCPDSACKOldSent"],
        "disordered": after["TCPOFOQueue"] - before["TCPOFOQueue"],
    }
    print("@@LANLET", *(f"{name}_{key}={value}" for key, value in said.items()))
END
        lanlet exec --name default -- python3 run.py
        say drops="$(drops)" left="$(status_of "s['totals']['host_sockets']")"
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    for name in ["up", "up16", "down", "down16"] {
        let number = |key: &str| markers.number(&format!("{name}_{key}"));
        let share = number("retransmits") / number("segments");
        println!(
            "{name}: {} Mbit/s, {} of {} segments retransmitted",
            number("mbps"),
            number("retransmits"),
            number("segments")
        );
        let max = match name.starts_with("up") {
            true => RETRANSMITTED_MAX,
            false => RETRANSMITTED_OUTSIDE_MAX,
        };
        assert!(share <= max, "{name}: {share}: {}", outcome.text());
        assert!(number("segments") > 10_000.0, "{}", outcome.text());
        // smoltcp's timer may fire once per flow where the guest gets no CPU for a second.
        assert!(number("twice") <= 16.0, "{name}: {}", outcome.text());
        assert_eq!(number("disordered"), 0.0, "{name}: {}", outcome.text());
    }
    assert_said(&outcome, &[("drops", "none"), ("left", "0")]);
}

/// A guest sends while lanlet stands still: the tap's queue holds what it holds, and the status tells
/// to the frame what it did not.
#[test]
fn the_kernels_drops_are_told() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        network
        lanlet exec --name default -- sh -c 'ping -c 1 -W 2 192.168.122.1 >/dev/null; ip -4 neighbour' |
            awk '/^192.168.122.1 / {print $5}' >gateway
        "$LAB/as-user" "$LANLET" exec --name default -- sh -c '
            # Its kernel says nothing of its own: no listener reports, no router solicitations.
            echo 1 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6
            ip neighbour replace 192.168.122.1 lladdr $(cat gateway) dev eth0 &&
            echo ready; until [ -e go ]; do sleep 0.02; done
            python3 -c "
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(20000): s.sendto(b\"x\", (\"192.168.122.1\", 9))
"
            echo sent; sleep 30' >guest.log 2>&1 &
        wait_for guest.log ready
        kill -STOP $NETWORK
        touch go
        wait_for guest.log sent
        kill -CONT $NETWORK
        sleep 0.5
        say kernel="$(status_of "s['ports'][1]['drops'].get('kernel_rx_dropped', 0)")"
        say seen="$(status_of "s['ports'][1]['drops'].get('unclaimed', 0)")"
        # Of a super-frame that neighbours were joined to, the drop counts once.
        say joined="$(status_of "s['ports'][1]['rx_joined']")"
        say shown="$(lanlet status | grep -c 'kernel_rx_dropped')"
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let (kernel, seen) = (markers.number("kernel"), markers.number("seen"));
    assert!(kernel > 0.0 && seen > 0.0, "{}", outcome.text());
    let seen = seen + markers.number("joined");
    assert_eq!(kernel + seen, 20_000.0, "{}", outcome.text());
    assert_said(&outcome, &[("shown", "1")]);
}
