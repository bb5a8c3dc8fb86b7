//! Connections whose end, or whose guest, is killed.

use crate::common::World;
use crate::{assert_said, scenario};

/// How late the other end may hear of it.
const HEARD_SECS: f64 = 5.0;

/// A peer with unread data is killed: its kernel resets the connection, and so must the NAT.
#[test]
fn a_killed_server_resets_the_guest() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        network
        nsenter --net=/run/netns/outside -- python3 peer.py serve_no_reading 7001 >server &
        server=$!
        listening tcp 7001 outside
        "$LAB/as-user" "$LANLET" exec --name default -- python3 peer.py flood 198.51.100.2 7001 >client &
        client=$!
        wait_for server accepted
        wait_for client flooding
        sleep 1 # until every buffer between them is full
        say before="$(status_of "s['flows']['tcp']")"
        start=$(date +%s.%N)
        kill -KILL $server
        wait $client
        say secs="$(python3 -c "import time; print(time.time() - $start)")"
        cat client
        until_true 10 status_is "s['flows']['tcp'] + s['totals']['host_sockets']" 0
        say after="$(status_of "s['flows']['tcp'] + s['totals']['host_sockets']")"
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_said(
        &outcome,
        &[("before", "1"), ("ended", "ECONNRESET"), ("after", "0")],
    );
    assert!(
        outcome.markers().number("secs") < HEARD_SECS,
        "{}",
        outcome.text()
    );
}

/// The same the other way round: the guest's program is killed with data unread.
#[test]
fn a_killed_client_resets_the_server() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        network
        outside python3 peer.py serve_flood 7001 >server &
        server=$!
        listening tcp 7001 outside
        # The client's shell lives on, and with it the guest's network.
        "$LAB/as-user" "$LANLET" exec --name default -- bash -c '
            python3 peer.py hold 198.51.100.2 7001 & echo $! >pid; wait; sleep 60' >client 2>&1 &
        wait_for client holding
        wait_for server flooding
        sleep 1
        start=$(date +%s.%N)
        kill -KILL "$(cat pid)"
        wait $server
        say secs="$(python3 -c "import time; print(time.time() - $start)")"
        cat server
        until_true 10 status_is "s['flows']['tcp'] + s['totals']['host_sockets']" 0
        say after="$(status_of "s['flows']['tcp'] + s['totals']['host_sockets']")"
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_said(&outcome, &[("ended", "ECONNRESET"), ("after", "0")]);
    assert!(
        outcome.markers().number("secs") < HEARD_SECS,
        "{}",
        outcome.text()
    );
}

/// The whole guest goes, namespace and all: nobody is there to send a FIN or RST but the NAT.
#[test]
fn a_killed_guest_ends_its_connections() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        network
        outside python3 peer.py serve_flood 7001 >server &
        server=$!
        outside python3 peer.py serve_echo 7002 &
        listening tcp 7001 outside
        listening tcp 7002 outside
        "$LAB/as-user" "$LANLET" exec --name default -- bash -c '
            exec 5<>/dev/tcp/198.51.100.2/7002
            exec python3 peer.py hold 198.51.100.2 7001' >client 2>&1 &
        guest=$!
        wait_for client holding
        wait_for server flooding
        say before="$(status_of "s['flows']['tcp']")"
        start=$(date +%s.%N)
        kill -KILL $guest
        wait $server
        say secs="$(python3 -c "import time; print(time.time() - $start)")"
        cat server
        until_true 10 status_is "len(s['ports'])" 1
        say after="$(status_of "s['flows']['tcp'] + s['totals']['host_sockets']")"
        say ports="$(status_of "len(s['ports'])")" leases="$(status_of "len(s['leases'])")" macs="$(status_of "len(s['macs'])")"
        until_true 10 outside sh -c '! ss -Htn state established sport = :7002 | grep -q .'
        say idle_left="$(outside ss -Htn state established sport = :7002 | wc -l)"
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_said(
        &outcome,
        &[
            ("before", "2"),
            ("after", "0"),
            ("ports", "1"),
            ("leases", "0"),
            ("idle_left", "0"),
        ],
    );
    let ended = outcome.markers();
    assert!(
        matches!(ended.get("ended"), Some("ECONNRESET" | "EPIPE")),
        "{}",
        outcome.text()
    );
    assert!(ended.number("secs") < HEARD_SECS, "{}", outcome.text());
}

/// A command that ends right behind its last byte, on a network that ends with it: what it sent arrives.
#[test]
fn what_a_command_sent_last_still_arrives() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        outside python3 peer.py serve_count 7001 >server &
        server=$!
        listening tcp 7001 outside
        "$LAB/as-user" "$LANLET" exec -- bash -c 'head -c 3000000 /dev/zero >/dev/tcp/198.51.100.2/7001'
        wait $server
        cat server
        "#,
    ) else {
        return;
    };
    assert_said(&outcome.passed(), &[("count", "3000000")]);
}
