//! iperf3 in the ways that people run it, and datagrams in the batches that QUIC sends.

use std::time::Duration;

use crate::common::{World, heavy};
use crate::{assert_said, scenario};

/// Of datagrams at a rate far below what the path can do.
const LOST_PERCENT_MAX: f64 = 0.5;
/// Far below what any build does: a stream that stands still is what is looked for here. Rates are
/// `lab/compare`'s business.
const MBPS_MIN: f64 = 50.0;

#[test]
fn iperf3_in_every_direction() {
    let _alone = heavy();
    let world = World::new()
        .with(&["--iperf"])
        .limit(Duration::from_secs(150));
    let Some(outcome) = scenario(
        &world,
        r#"
        network
        cat >run.py <<'END'
import json, subprocess, time

def run(name, address, *options, tries=3):
    time.sleep(0.3)  # the server listens again
    done = subprocess.run(["iperf3", "-c", address, "-J", *options], capture_output=True, timeout=40)
    result = json.loads(done.stdout)
    if "error" in result:
        print(f"@@LANLET {name}={result['error'].replace(' ', '_')}")
        return
    end = result["end"]
    if "sum" in end and "lost_percent" in end["sum"]:
        # A sender that other tests held up for 10 ms then sends at once more than the receiver's buffer
        # holds (rmem_max, 12 of 8000 bytes). What lanlet loses it loses every time.
        if end["sum"]["lost_percent"] > 0.5 and tries > 1:
            return run(name, address, *options, tries=tries - 1)
        print(f"@@LANLET {name}_packets={end['sum']['packets']} {name}_lost={end['sum']['lost_percent']}")
        return
    print(f"@@LANLET {name}_mbps={end['sum_received']['bits_per_second'] / 1e6:.1f}")
    if "sum_received_bidir_reverse" in end:
        print(f"@@LANLET {name}_back_mbps={end['sum_received_bidir_reverse']['bits_per_second'] / 1e6:.1f}")
    # Each stream on its own: none starves.
    slowest = min(s["receiver"]["bits_per_second"] for s in end["streams"])
    print(f"@@LANLET {name}_slowest={slowest / 1e6:.2f}")

for family, address in ("four", "198.51.100.2"), ("six", "2001:db8:1::2"):
    run(f"{family}_up", address, "-t", "2")
    run(f"{family}_down", address, "-t", "2", "-R")
    run(f"{family}_up16", address, "-t", "3", "-P", "16")
    run(f"{family}_down16", address, "-t", "3", "-P", "16", "-R")
    run(f"{family}_both", address, "-t", "3", "--bidir")
    run(f"{family}_both16", address, "-t", "3", "--bidir", "-P", "8")
    # Datagrams that fit, and some that take six fragments each way.
    for size in "1200", "8000":
        run(f"{family}_udp{size}", address, "-t", "2", "-u", "-b", "40M", "-l", size)
        run(f"{family}_udp{size}_down", address, "-t", "2", "-u", "-b", "40M", "-l", size, "-R")
END
        lanlet exec --name default -- python3 run.py
        until_true 20 status_is "s['flows']['tcp']" 0
        say left="$(status_of "s['flows']['tcp']")" drops="$(drops)"
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    for family in ["four", "six"] {
        for run in ["up", "down", "up16", "down16", "both", "both_back"] {
            let run = run.strip_suffix("_back").map_or_else(
                || format!("{family}_{run}_mbps"),
                |run| format!("{family}_{run}_back_mbps"),
            );
            let mbps = markers.number(&run);
            println!("{run}: {mbps}");
            assert!(mbps > MBPS_MIN, "{run}: {}", outcome.text());
        }
        for run in ["up16", "down16", "both16"] {
            let slowest = markers.number(&format!("{family}_{run}_slowest"));
            assert!(slowest > 0.0, "{family}_{run}: {}", outcome.text());
        }
        for run in ["udp1200", "udp1200_down", "udp8000", "udp8000_down"] {
            let lost = markers.number(&format!("{family}_{run}_lost"));
            assert!(markers.number(&format!("{family}_{run}_packets")) > 500.0);
            assert!(
                lost <= LOST_PERCENT_MAX,
                "{family}_{run}: {}",
                outcome.text()
            );
        }
    }
    assert_said(&outcome, &[("left", "0"), ("drops", "none")]);
}

/// Datagrams that the guest's kernel hands over in one piece (UDP_SEGMENT) come out as they are, and
/// as many; those without that as well.
#[test]
fn segmented_datagrams_arrive_one_by_one() {
    let _alone = heavy();
    let world = World::new();
    world
        .temp()
        .file("peer_faults.py", include_str!("peer_faults.py"));
    let Some(outcome) = scenario(
        &world,
        r#"
        network
        cat >send.sh <<'END'
        for address in 198.51.100.2 2001:db8:1::2; do
            # 48 datagrams of 1,200 bytes per call, a last batch that is short, and one by one.
            python3 peer_faults.py send_bulk $address 8000 1200 10000 48
            python3 peer_faults.py send_bulk $address 8000 1200 1000 1
        done
END
        outside python3 peer_faults.py serve_bulk 8000 1200 &
        listening udp 8000 outside
        lanlet exec --name default -- sh send.sh
        lanlet exec --no-offload -- sh send.sh
        say drops="$(drops)"
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    assert_eq!(
        markers.all("seen"),
        ["10000", "1000"].repeat(4),
        "{}",
        outcome.text()
    );
    assert_eq!(markers.all("wrong"), ["0"; 8], "{}", outcome.text());
    assert_said(&outcome, &[("drops", "none")]);
    // From an offloading guest they travel in batches to the end: the server's UDP_GRO sees them so.
    for index in [0, 2] {
        assert_ne!(markers.all("merged")[index], "0", "{}", outcome.text());
    }
}
