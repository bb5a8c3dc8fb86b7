//! `lanlet exec` by itself: what its command finds, and what passes through it.

use crate::common::World;
use crate::{assert_said, scenario};

#[test]
fn the_command_finds_a_network() {
    let world = World::new().with(&["--dns"]);
    let Some(outcome) = scenario(
        &world,
        r#"
        # The subnet's first address is the gateway's; by default 192.168.122.1.
        cat >look.sh <<'END'
        say() { echo "@@LANLET $*"; }
        say address="$(ip -4 -o address show dev eth0 | awk '{print $4}')"
        say mtu="$(ip -o link show dev eth0 | grep -o 'mtu [0-9]*' | cut -d' ' -f2)"
        say route="$(ip route show default | awk '{print $3 "@" $5}')"
        say resolver="$(tr '\n' ' ' </etc/resolv.conf | tr ' ' _)"
        say links="$(ip -o link | awk -F': ' '{print $2}' | tr '\n' ,)" uid="$(id -u)"
        say sysfs="$(cd /sys/class/net && echo * | tr ' ' ,):$(cat /sys/class/net/eth0/mtu)"
END
        lanlet exec -- sh look.sh
        say plain="$(cat /etc/resolv.conf | tr ' ' _)"
        lanlet exec --subnet 10.9.8.0/28 --gateway 10.9.8.14 --mtu 1400 --domain lab.test -- sh look.sh |
            sed 's/ \([a-z]*\)=/ other_\1=/g'
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let address = markers.get("address").unwrap_or_default();
    assert!(
        address.starts_with("192.168.122.") && address.ends_with("/24"),
        "{}",
        outcome.text()
    );
    assert_said(
        &outcome,
        &[
            ("mtu", "1500"),
            ("route", "192.168.122.1@eth0"),
            ("resolver", "nameserver_192.168.122.1_"),
            ("links", "lo,eth0,"),
            ("sysfs", "eth0,lo:1500"),
            ("uid", "0"),
            // The host's own file is as before.
            ("plain", "nameserver_198.51.100.2"),
            ("other_mtu", "1400"),
            ("other_route", "10.9.8.14@eth0"),
            ("other_resolver", "nameserver_10.9.8.14_search_lab.test_"),
        ],
    );
    let other = markers.get("other_address").unwrap_or_default();
    assert!(
        other.starts_with("10.9.8.") && other.ends_with("/28"),
        "{}",
        outcome.text()
    );
}

#[test]
fn exit_status_and_signals_pass_through() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        status() { local name=$1; shift; "$@" 2>/dev/null; say "$name=$?"; }
        status zero lanlet exec -- true
        status seven lanlet exec -- sh -c 'exit 7'
        status killed lanlet exec -- sh -c 'kill -KILL $$'
        status missing lanlet exec -- /does/not/exist
        status not_executable lanlet exec -- /etc/passwd
        # A signal to lanlet reaches the command, which may do with it what it likes.
        "$LAB/as-user" "$LANLET" exec -- bash -c 'trap "exit 33" TERM; echo ready; while :; do sleep 0.1; done' >ready &
        wait_for ready ready
        kill -TERM $!
        wait $!
        say trapped=$?
        "$LAB/as-user" "$LANLET" exec -- sh -c 'echo ready; exec sleep 60' >ready2 &
        wait_for ready2 ready
        kill -HUP $!
        wait $!
        say hung_up=$?
        say stdin="$(echo through | lanlet exec -- cat)"
        "#,
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("zero", "0"),
            ("seven", "7"),
            ("killed", "137"),
            ("missing", "127"),
            ("not_executable", "126"),
            ("trapped", "33"),
            ("hung_up", "129"),
            ("stdin", "through"),
        ],
    );
}

#[test]
fn files_come_whole_by_http() {
    // As root the world is another user's: the files must be open to it.
    let world = World::new();
    let pages = world.temp().path().to_owned();
    let world = world.with(&["--dns", "--http", &pages.to_string_lossy()]);
    let Some(outcome) = scenario(
        &world,
        r#"
        head -c 20000003 /dev/urandom >big
        head -c 0 /dev/null >empty
        say sent="$(sha <big)"
        say received="$(lanlet exec -- curl -sf http://198.51.100.2/big | sha)"
        say by_name="$(lanlet exec -- curl -sf http://second.test/big | sha)"
        lanlet exec -- curl -sf -o got -w ' @@LANLET http=%{http_code} size=%{size_download}\n' http://outside.test/empty
        lanlet exec -- curl -s -o got -w ' @@LANLET missing=%{http_code}\n' http://outside.test/none
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let sent = markers.get("sent").expect("a checksum");
    assert_said(
        &outcome,
        &[
            ("received", sent),
            ("by_name", sent),
            ("http", "200"),
            ("size", "0"),
            ("missing", "404"),
        ],
    );
}

#[test]
fn the_gateway_pings_and_resolves() {
    let world = World::new().with(&["--dns", "--ping"]);
    let Some(outcome) = scenario(
        &world,
        r#"
        network
        cat >ask.sh <<'END'
        say() { echo "@@LANLET $*"; }
        say ping="$(ping -c 3 -i 0.1 -W 2 192.168.122.1 | grep -o '[0-9]* received' | tr ' ' _)"
        ping -c 1 -W 2 -s 1472 -M do 192.168.122.1 >/dev/null; say ping_full=$?
        say udp="$(dig +short outside.test)" tcp="$(dig +tcp +short outside.test)"
        # Too long for a datagram: truncated, and whole over TCP.
        say truncated="$(dig +ignore +nocomments +noall +comments txt big.test | grep -c 'flags:.* tc ')"
        say big="$(dig +short txt big.test | wc -l)" big_tcp="$(dig +tcp +short txt big.test | wc -l)"
        say missing="$(dig none.test | grep -o NXDOMAIN)" missing_tcp="$(dig +tcp none.test | grep -o NXDOMAIN)"
        say libc="$(getent ahostsv4 second.test | awk 'NR == 1 {print $1}')"
        # Many at once, from many ports.
        for i in $(seq 40); do dig +short second.test >answer.$i & done; wait
        say together="$(cat answer.* | grep -c '^203.0.113.1$')"
END
        lanlet exec --name default -- sh ask.sh
        say drops="$(drops)"
        "#,
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("ping", "3_received"),
            ("ping_full", "0"),
            ("udp", "198.51.100.2"),
            ("tcp", "198.51.100.2"),
            ("truncated", "1"),
            ("big", "16"),
            ("big_tcp", "16"),
            ("missing", "NXDOMAIN"),
            ("missing_tcp", "NXDOMAIN"),
            ("libc", "203.0.113.1"),
            ("together", "40"),
            ("drops", "none"),
        ],
    );
}
