//! UDP and ICMP echo through the NAT.

use crate::common::World;
use crate::{assert_said, scenario};

#[test]
fn datagrams_of_every_size_come_back() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        network
        outside python3 peer.py serve_udp_echo 8000 &
        outside socat -T 20 UDP-LISTEN:8001,fork EXEC:cat &
        listening udp 8000 outside
        listening udp 8001 outside
        # 1472 bytes fill the MTU.
        lanlet exec --name default -- python3 peer.py udp_sizes 198.51.100.2 8000 0 1 2 511 1471 1472
        say socat="$(echo hello | lanlet exec --name default -- socat -T 1 - UDP:198.51.100.2:8001)"
        say nc="$(echo hello | lanlet exec --name default -- nc -u -w 1 198.51.100.2 8000)"
        say drops="$(drops)"
        "#,
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("sizes", "0,1,2,511,1471,1472"),
            ("socat", "hello"),
            ("nc", "hello"),
            ("drops", "none"),
        ],
    );
}

/// Twenty of the guest's sockets speak with fifty servers each, and each hears its own answers only.
#[test]
fn many_peers_are_kept_apart() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        network
        outside python3 peer.py serve_udp_echo $(seq 8001 8050) &
        listening udp 8050 outside
        "$LAB/as-user" "$LANLET" exec --name default -- sh -c '
            python3 peer.py udp_peers 198.51.100.2 8001 50 20; echo done; sleep 30' >guest &
        guest=$!
        wait_for guest done
        cat guest
        say mappings="$(status_of "s['flows']['udp']")" sockets="$(status_of "s['totals']['host_sockets']")"
        say drops="$(drops)"
        kill -KILL $guest
        until_true 10 status_is "len(s['ports'])" 1
        say left="$(status_of "s['flows']['udp'] + s['totals']['host_sockets']")"
        "#,
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("right", "1000"),
            ("wrong", "0"),
            // One for each of the guest's sockets, whatever it speaks with (RFC 4787 REQ-1).
            ("mappings", "20"),
            ("sockets", "20"),
            ("drops", "none"),
            ("left", "0"),
        ],
    );
}

/// A stranger's datagram to a mapping's port does not reach the guest, one from another port of whom it
/// wrote to does: address-dependent filtering (RFC 4787 REQ-8).
#[test]
fn strangers_are_filtered() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        network
        outside python3 -c "
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(('198.51.100.2', 8000))
data, guest = server.recvfrom(64)
for name, source in (b'stranger', ('203.0.113.1', 8000)), (b'neighbour', ('198.51.100.2', 8001)):
    other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    other.bind(source)
    other.sendto(name, guest)
server.sendto(b'friend', guest)
" &
        listening udp 8000 outside
        say heard="$(lanlet exec --name default -- python3 -c "
import socket
guest = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
guest.settimeout(1)
guest.sendto(b'x', ('198.51.100.2', 8000))
heard = []
try:
    while True: heard.append(guest.recv(64).decode())
except TimeoutError: pass
print(','.join(heard))")"
        say drops="$(drops)"
        "#,
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("heard", "neighbour,friend"),
            ("drops", "gateway:filtered:1"),
        ],
    );
}

#[test]
fn echo_requests_go_out_where_the_host_allows_it() {
    let world = World::new().with(&["--ping"]);
    let Some(outcome) = scenario(
        &world,
        r#"
        network
        cat >ping.sh <<'END'
        for address in 198.51.100.2 203.0.113.1 203.0.113.130; do
            ping -c 5 -i 0.05 -W 2 $address >out; echo "@@LANLET ping=$? received=$(grep -o '[0-9]* received' out | cut -d' ' -f1)"
        done
        ping -c 1 -W 2 -s 1472 -M do 203.0.113.130 >/dev/null; echo "@@LANLET full=$?"
        ping -c 1 -W 1 203.0.113.97 >/dev/null; echo "@@LANLET swallowed=$?"
END
        lanlet exec --name default -- sh ping.sh
        say drops="$(drops)"
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_eq!(
        outcome.markers().all("received"),
        ["5", "5", "5"],
        "{}",
        outcome.text()
    );
    assert_said(
        &outcome,
        &[("full", "0"), ("swallowed", "1"), ("drops", "none")],
    );
}

/// The kernel's default: counted, and said once with the remedy.
#[test]
fn echo_requests_the_host_forbids_are_counted_and_said_once() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        network
        "$LAB/as-user" "$LANLET" exec --name default -- sh -c '
            ping -c 3 -i 0.05 -W 1 198.51.100.2 >/dev/null; echo "@@LANLET ping=$?"
            ping -c 2 -i 0.05 -W 1 192.168.122.1 >/dev/null; echo "@@LANLET gateway=$?"; sleep 30' >guest &
        wait_for guest gateway
        cat guest
        say drops="$(drops)" mappings="$(status_of "s['flows']['icmp']")"
        say hints="$(grep -c ping_group_range up.log)" remedy="$(grep -c 'sysctl -w' up.log)"
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_said(
        &outcome,
        &[
            ("ping", "1"),
            ("gateway", "0"),
            ("drops", "namespace1:host_refused:3"),
            ("mappings", "0"),
            ("hints", "1"),
            ("remedy", "1"),
        ],
    );
}
