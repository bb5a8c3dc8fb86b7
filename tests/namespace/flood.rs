//! A hostile guest that opens connections as fast as it can, while others work.

use std::time::Duration;

use crate::common::{World, heavy};
use crate::scenario;

/// What the flood is to bring at least, per second; the issue's figure on a machine that is otherwise idle.
const SYNS_PER_SEC: u32 = 100_000;
/// The neighbour's throughput under the flood, of what it is without: the flood takes its share of two
/// cores, and no more than most of them.
const SHARE_MIN: f64 = 0.05;
/// Resident memory that the flood may cost: every flow that the limits allow, at what an idle one takes.
const GROWTH_KIB_MAX: f64 = 200_000.0;

#[test]
fn a_syn_flood_stops_nobody_else() {
    let _alone = heavy();
    let world = World::new()
        .with(&["--iperf", "--dns"])
        .limit(Duration::from_secs(150));
    world
        .temp()
        .file("peer_faults.py", include_str!("peer_faults.py"));
    let text = r#"
        network
        rss() { awk '/^VmRSS/ {print $2}' /proc/$NETWORK/status; }
        cat >flood.sh <<'END'
        ping -c 1 -W 2 192.168.122.1 >/dev/null
        mac=$(ip -4 neighbour | awk '$1 == "192.168.122.1" {print $5}')
        address=$(ip -4 -o address show dev eth0 | awk '{sub("/.*", "", $4); print $4}')
        echo ready
        until [ -e go ]; do sleep 0.02; done
        exec python3 peer_faults.py flood_syn "$mac" "$address" "$1" 8 RATE
END
        cat >work.py <<'END'
import json, subprocess, sys
result = json.loads(subprocess.run(["iperf3", "-c", "198.51.100.2", "-t", "5", "-J"], capture_output=True).stdout)
seconds = [i["sum"]["bits_per_second"] / 1e6 for i in result.get("intervals", [])]
print(f"@@LANLET {sys.argv[1]}={sum(seconds) / max(len(seconds), 1):.1f} {sys.argv[1]}_least={min(seconds, default=0):.1f}")
END
        work() { lanlet exec --name default -- python3 work.py $1; }
        work alone
        # Where nobody answers, so that each SYN waits for long; and where a server is, by many ports.
        for target in silent=203.0.113.97 open=198.51.100.2; do
            rm -f go
            "$LAB/as-user" "$LANLET" exec --name default -- sh flood.sh ${target#*=} >flood 2>&1 &
            guest=$!
            wait_for flood ready
            before=$(rss)
            touch go
            wait_for flood flooding
            sleep 1
            work ${target%=*}
            say ${target%=*}_name="$(lanlet exec --name default -- dig +time=2 +tries=2 +short second.test)"
            say ${target%=*}_flows="$(status_of "s['flows']['tcp']")" ${target%=*}_growth=$(($(rss) - before))
            wait $guest
            grep @@LANLET flood
            until_true 30 status_is "s['flows']['tcp'] + s['totals']['host_sockets']" 0
            say left="$(status_of "s['flows']['tcp'] + s['totals']['host_sockets']")"
        done
        step after lanlet exec --name default -- iperf3 -c 198.51.100.2 -n 1M
        "#
    .replace("RATE", &SYNS_PER_SEC.to_string());
    let Some(outcome) = scenario(&world, &text) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let alone = markers.number("alone");
    for kind in ["silent", "open"] {
        let under = markers.number(kind);
        println!(
            "{kind}: {under} of {alone} Mbit/s; {:?} SYNs/s",
            markers.all("rate")
        );
        assert!(under >= SHARE_MIN * alone, "{kind}: {}", outcome.text());
        assert!(
            markers.number(&format!("{kind}_least")) > 0.0,
            "{kind}: {}",
            outcome.text()
        );
        assert_eq!(
            markers.get(&format!("{kind}_name")),
            Some("203.0.113.1"),
            "{}",
            outcome.text()
        );
        assert!(
            markers.number(&format!("{kind}_growth")) <= GROWTH_KIB_MAX,
            "{kind}: {}",
            outcome.text()
        );
    }
    for rate in markers.all("rate") {
        let rate: f64 = rate.parse().expect("a number");
        assert!(
            rate >= 0.5 * f64::from(SYNS_PER_SEC),
            "no flood: {}",
            outcome.text()
        );
    }
    markers.passed(&["after"]);
    assert_eq!(markers.all("left"), ["0"; 2], "{}", outcome.text());
}
