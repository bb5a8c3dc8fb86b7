//! Several guests on one network: each other, and guests without offloads among them.

use crate::common::World;
use crate::{assert_said, scenario};

/// Guests that stay until `over` exists, each in the background with its address in NAME.address:
/// stay NAME COMMANDS [OPTION of lanlet exec...]
const STAY: &str = r#"
stay() {
    local name=$1 commands=$2
    shift 2
    "$LAB/as-user" "$LANLET" exec --name default "$@" -- bash -c "
        ip -4 -o address show dev eth0 | awk '{sub(\"/.*\", \"\", \$4); print \$4}' >$name.address
        $commands
        echo >$name.ready
        until [ -e over ]; do sleep 0.05; done" >$name.log 2>&1 &
    until [ -e "$name.ready" ]; do
        kill -0 $! || fail "$name: $(cat "$name.log")"
        sleep 0.02
    done
}
"#;

#[test]
fn guests_reach_each_other() {
    let Some(outcome) = scenario(
        &World::new(),
        &format!(
            "{STAY}{}",
            r#"
            network
            head -c 9000001 /dev/urandom >data
            stay one 'python3 peer.py serve_answer_after_end 7001 & python3 peer.py serve_udp_echo 7002 & sleep 0.3'
            stay two ''
            one=$(cat one.address)
            say same="$(test "$one" = "$(cat two.address)" && echo yes || echo no)"
            lanlet exec --name default -- sh -c "
                ping -c 3 -i 0.05 -W 2 $one >/dev/null; echo @@LANLET ping=\$?
                ping -c 1 -W 2 $(cat two.address) >/dev/null; echo @@LANLET ping_two=\$?
                ping -c 1 -W 2 -s 1472 -M do $one >/dev/null; echo @@LANLET full=\$?
                python3 peer.py send_then_read $one 7001 data
                python3 peer.py udp_sizes $one 7002 0 1 1472 9000"
            say data="$(sha <data)" drops="$(drops)" kinds="$(status_of "','.join(p['kind'] for p in s['ports'])")"
            touch over
            until_true 10 status_is "len(s['ports'])" 1
            say left="$(status_of "len(s['ports']) + len(s['macs']) + len(s['leases'])")"
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let data = markers.get("data").expect("a checksum");
    assert_said(
        &outcome,
        &[
            ("same", "no"),
            ("ping", "0"),
            ("ping_two", "0"),
            ("full", "0"),
            ("sent", data),
            ("received", data),
            // Fragments between guests are the guests' own affair.
            ("sizes", "0,1,1472,9000"),
            ("drops", "none"),
            ("kinds", "gateway,namespace,namespace"),
            ("left", "1"),
        ],
    );
}

#[test]
fn a_guest_whose_link_is_down_misses_floods_and_counts_its_own_frames_once() {
    let Some(outcome) = scenario(
        &World::new(),
        &format!(
            "{STAY}{}",
            r#"
            network
            stay two '(until [ -e down ]; do sleep 0.05; done; ip link set eth0 down; touch is_down) & sleep 0'
            two=$(cat two.address)
            cat >talk.sh <<'END'
            broadcast() {
                python3 -c "
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
for n in range(20): s.sendto(b'all', ('255.255.255.255', 9))"
            }
            # That the neighbour's address is known, and where it is.
            ping -c 1 -W 2 $1 >/dev/null; echo "@@LANLET ping=$?"
            touch down
            until [ -e is_down ]; do sleep 0.05; done
            broadcast
            touch told
            until [ -e go_on ]; do sleep 0.05; done
            for n in $(seq 7); do echo x >/dev/udp/$1/9; done
            touch spoken
END
            "$LAB/as-user" "$LANLET" exec --name default -- bash talk.sh $two & ONE=$!
            until_true 20 test -e told || fail "nothing was told"
            # The first frame tells that the link is down.
            drops_of_two() { status_of "','.join(f'{k}:{v}' for k, v in s['ports'][1]['drops'].items())"; }
            say flooded="$(drops_of_two)"
            touch go_on
            wait $ONE
            say own="$(drops_of_two)"
            touch over
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_said(
        &outcome,
        &[
            ("ping", "0"),
            ("flooded", "link_down:1"),
            ("own", "link_down:8"),
        ],
    );
}

#[test]
fn a_guest_without_offloads_works() {
    let world = World::new();
    let pages = world.temp().path().to_owned();
    let world = world.with(&["--http", &pages.to_string_lossy(), "--ping"]);
    let Some(outcome) = scenario(
        &world,
        &format!(
            "{STAY}{}",
            r#"
            head -c 50000000 /dev/urandom >big
            head -c 20000003 /dev/urandom >data
            say big="$(sha <big)" data="$(sha <data)"
            network
            outside python3 peer.py serve_answer_after_end 7001 &
            listening tcp 7001 outside
            plain() { lanlet exec --name default --no-offload -- "$@"; }
            plain ping -c 3 -i 0.05 -W 2 192.168.122.1 >/dev/null; say ping=$?
            plain ping -c 1 -W 2 -s 1472 -M do 198.51.100.2 >/dev/null; say outside=$?
            say received_big="$(plain curl -sf http://198.51.100.2/big | sha)"
            plain python3 peer.py send_then_read 198.51.100.2 7001 data
            # Between a guest with offloads and one without, connected from either.
            stay plain 'python3 peer.py serve_answer_after_end 7001 & sleep 0.3' --no-offload
            stay whole 'python3 peer.py serve_answer_after_end 7001 & sleep 0.3'
            lanlet exec --name default -- python3 peer.py send_then_read $(cat plain.address) 7001 data
            plain python3 peer.py send_then_read $(cat whole.address) 7001 data
            plain python3 peer.py send_then_read $(cat plain.address) 7001 data
            say drops="$(drops)" kinds="$(status_of "','.join(p['kind'] for p in s['ports'])")"
            touch over
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let (big, data) = (markers.get("big"), markers.get("data"));
    assert_eq!(markers.get("received_big"), big, "{}", outcome.text());
    for key in ["sent", "received"] {
        let sums: Vec<_> = markers.all(key).iter().map(|s| Some(s.as_str())).collect();
        assert_eq!(sums, [data; 4], "{key}: {}", outcome.text());
    }
    assert_said(
        &outcome,
        &[
            ("ping", "0"),
            ("outside", "0"),
            ("drops", "none"),
            ("kinds", "gateway,tap,namespace"),
        ],
    );
}
