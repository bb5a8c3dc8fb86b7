//! What people try first from a guest, by IPv4 and by IPv6: curl, dig, ping, a port scan.

use std::time::Duration;

use crate::common::World;
use crate::{assert_said, scenario};

/// A dual-stack name whose host lacks IPv6, or whose IPv6 swallows everything, costs at most this: a
/// guest without a route goes on at once, and one with a dead one after curl's 200 ms.
const HAPPY_EYEBALLS_SECS_MAX: f64 = 1.5;

fn with_pages(options: &[&str]) -> World {
    let world = World::new().with(options);
    let pages = world.temp().path().to_string_lossy().into_owned();
    world.with(&["--http", &pages])
}

#[test]
fn curl_by_both_families() {
    let Some(outcome) = scenario(
        &with_pages(&["--dns"]),
        r#"
        head -c 20000003 /dev/urandom >big
        say sent="$(sha <big)"
        cat >fetch.sh <<'END'
        for url in 198.51.100.2 203.0.113.1 four.test [2001:db8:1::2] [2001:db8:2::1] six.test; do
            echo "@@LANLET got=$(curl -s -m 20 "http://$url/big" | sha256sum | cut -c1-32)"
        done
        for family in 4 6; do
            for name in outside.test second.test; do
                echo "@@LANLET got=$(curl -$family -s -m 20 "http://$name/big" | sha256sum | cut -c1-32)"
            done
        done
END
        network
        lanlet exec --name default -- sh fetch.sh
        lanlet exec --name default -- curl -s -m 10 -o got -w ' @@LANLET lame=%{http_code} lame_secs=%{time_total}\n' http://lame.test/scenario.sh
        # At once: whoever starts a command in a guest does not wait for addresses.
        lanlet exec -- curl -6 -s -m 5 -o got -w ' @@LANLET at_once=%{http_code}\n' 'http://[2001:db8:1::2]/scenario.sh'
        until_true 10 status_is "s['flows']['tcp']" 0
        say left="$(status_of "s['flows']['tcp'] + s['totals']['host_sockets']")" drops="$(drops)"
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let sent = markers.get("sent").expect("a checksum");
    assert_eq!(markers.all("got"), vec![sent; 10], "{}", outcome.text());
    assert_said(
        &outcome,
        &[
            ("lame", "200"),
            ("at_once", "200"),
            ("left", "0"),
            ("drops", "none"),
        ],
    );
    assert!(
        markers.number("lame_secs") < HAPPY_EYEBALLS_SECS_MAX,
        "{}",
        outcome.text()
    );
}

/// A host without IPv6: guests are not told of any, and lose no time with it.
#[test]
fn a_host_without_ipv6() {
    let Some(outcome) = scenario(
        &with_pages(&["--dns", "--no-v6"]),
        r#"
        network
        cat >look.sh <<'END'
        say() { echo "@@LANLET $*"; }
        curl -s -m 10 -o got -w ' @@LANLET dual=%{http_code} dual_secs=%{time_total}\n' http://outside.test/scenario.sh
        curl -6 -s -m 10 -o got -w ' @@LANLET six_secs=%{time_total}\n' http://outside.test/scenario.sh
        say six=$?
        # A solicited advertisement, where there is one, says that this is no default router.
        rdisc6 -1 -r 2 -w 500 eth0 >advertised
        say lifetime="$(sed -n 's/.*Router lifetime *: *\([0-9]*\).*/\1/p' advertised)"
        say routes="$(ip -6 route show default | wc -l)"
END
        lanlet exec --name default -- sh look.sh
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    assert_said(&outcome, &[("dual", "200"), ("routes", "0")]);
    assert_ne!(markers.get("six"), Some("0"), "{}", outcome.text());
    assert!(
        matches!(markers.get("lifetime"), Some("" | "0")),
        "{}",
        outcome.text()
    );
    for key in ["dual_secs", "six_secs"] {
        assert!(
            markers.number(key) < HAPPY_EYEBALLS_SECS_MAX,
            "{key}: {}",
            outcome.text()
        );
    }
}

#[test]
fn dig_by_udp_and_tcp() {
    let Some(outcome) = scenario(
        &World::new().with(&["--dns"]),
        r#"
        network
        cat >ask.sh <<'END'
        router=$(ip -6 route show default | awk '{print $3; exit}')
        for server in 192.168.122.1 "$router%eth0" 198.51.100.2 203.0.113.1 2001:db8:1::2 2001:db8:2::1; do
            for how in +notcp +tcp; do
                ask() { dig +time=2 +tries=1 +short $how "@$server" "$@"; }
                echo "@@LANLET answers=$(ask a outside.test),$(ask aaaa outside.test),$(ask txt big.test | wc -l)"
            done
        done
END
        lanlet exec --name default -- sh ask.sh
        say drops="$(drops)"
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_eq!(
        outcome.markers().all("answers"),
        ["198.51.100.2,2001:db8:1::2,16"; 12],
        "{}",
        outcome.text()
    );
    assert_said(&outcome, &[("drops", "none")]);
}

/// Three fragments each way, and what just fits; what may not be fragmented is refused with a reason.
#[test]
fn pings_of_every_size() {
    let Some(outcome) = scenario(
        &World::new().with(&["--ping"]),
        r#"
        network
        cat >ping.sh <<'END'
        router=$(ip -6 route show default | awk '{print $3; exit}')
        for address in 192.168.122.1 198.51.100.2 203.0.113.130 "$router%eth0" 2001:db8:1::2 2001:db8:3::130; do
            for size in 0 56 1452 1453 1472 1473 4000 20000; do
                ping -q -c 2 -i 0.05 -W 2 -s $size "$address" >out && echo "@@LANLET answered=$address,$size"
            done
            ping -c 1 -W 1 -M do -s 4000 "$address" 2>&1 | grep -qi 'too long' && echo "@@LANLET told=$address"
        done
END
        lanlet exec --name default -- sh ping.sh
        say drops="$(drops)"
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    assert_eq!(markers.all("answered").len(), 6 * 8, "{}", outcome.text());
    assert_eq!(markers.all("told").len(), 6, "{}", outcome.text());
    assert_said(&outcome, &[("drops", "none")]);
}

/// A scanner takes a NAT's words for the host's: what is open, closed and filtered there is so here.
#[test]
fn a_scan_tells_open_closed_and_filtered() {
    let Some(outcome) = scenario(
        &with_pages(&[]).limit(Duration::from_secs(100)),
        r#"
        outside nft -f - <<'END'
        table inet filter {
            chain input {
                type filter hook input priority 0
                tcp dport 82 drop
                tcp dport 83 reject with icmpx admin-prohibited
                tcp dport 84 reject with tcp reset
                tcp dport 85 reject with icmpx host-unreachable
            }
        }
END
        network
        for target in 198.51.100.2 203.0.113.1 "-6 2001:db8:1::2" "-6 2001:db8:2::1" 203.0.113.97 "-6 2001:db8:6::1"; do
            lanlet exec --name default -- nmap -sT -n -Pn -p 80-85 -oG - $target >scan 2>&1
            say ports="$(sed -n 's/.*Ports: //p' scan | tr ',' '\n' | awk -F/ '{printf "%s%s", sep, $2; sep = ","}')"
        done
        until_true 20 status_is "s['flows']['tcp']" 0
        say left="$(status_of "s['flows']['tcp'] + s['totals']['host_sockets']")"
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let scanned = "open,closed,filtered,filtered,closed,filtered";
    let silent = "filtered,filtered,filtered,filtered,filtered,filtered";
    assert_eq!(
        outcome.markers().all("ports"),
        [scanned, scanned, scanned, scanned, silent, silent],
        "{}",
        outcome.text()
    );
    assert_said(&outcome, &[("left", "0")]);
}
