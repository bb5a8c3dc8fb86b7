//! Two real guests, as an ordinary user, on one network through `-netdev tap,fd=`.
//!
//! The guests boot Debian's cloud kernel under TCG (no KVM needed): about 3 s each. What they send and
//! hash is what the transfers wait for. `LANLET_TEST_BYTES` sets another size.

mod common;

use std::time::Duration;

use common::{Markers, Outcome, World, guests_missing, heavy, skip};
use lanlet::network::Status;

/// Bytes of each transfer: 256 MiB, which takes a minute. LANLET_TEST_BYTES=1073741824 is what a release is tested
/// with.
const TRANSFER_BYTES: u64 = 1 << 28;

/// Drops that a healthy LAN has too, and why.
const EXPECTED_DROPS: &[&str] = &[
    // IPv6 neighbour discovery and MLD of a guest, flooded to a gateway that speaks IPv4.
    "unclaimed",
    // The same from the first guest while it is alone.
    "no_port",
    // The last ACK of a connection whose flow has just ended.
    "no_flow",
];

fn transfer_bytes() -> u64 {
    match std::env::var("LANLET_TEST_BYTES") {
        Ok(text) => text.parse().expect("LANLET_TEST_BYTES is a number"),
        Err(_) => TRANSFER_BYTES,
    }
}

/// A guest that pings, asks the DNS, swaps data with its peer both ways at once, then sends to or
/// receives from a server outside.
fn guest_script(bytes: u64, outside: &str) -> String {
    format!(
        r#"
        [ -n "${{IP:-}}" ] || exit 3
        say ready=1
        read -r PEER
        step ping_gateway ping -c 3 -W 2 "$ROUTER"
        step ping_peer ping -c 3 -W 2 "$PEER"
        step ping_outside ping -c 3 -W 2 203.0.113.130
        say dns="$(nslookup outside.test "$DNS" | awk '/^Name/ {{found = 1}} found && /^Address/ {{print $NF}}')"
        say nxdomain="$(nslookup none.test "$DNS" 2>&1 | grep -o NXDOMAIN | head -1)"

        nc -d -l 7001 | md5sum | cut -c1-32 >/tmp/from_peer &
        receiver=$!
        listening 7001
        say listening=1
        await swap
        begin=$(uptime_secs)
        pattern {bytes} | nc -N "$PEER" 7001
        status=$?; say to_peer=$status; [ $status = 0 ] || exit 4
        wait $receiver
        say from_peer_hash="$(cat /tmp/from_peer)" swap_secs="$(echo "$(uptime_secs) $begin" | awk '{{print $1 - $2}}')"

        await outside
        begin=$(uptime_secs)
        {outside}
        say outside_secs="$(echo "$(uptime_secs) $begin" | awk '{{print $1 - $2}}')"
        await bye
        "#
    )
}

/// The scenario around both guests.
fn two_guests_scenario(bytes: u64) -> String {
    format!(
        r#"
        network --dns 198.51.100.2
        guest left "$TMP/left.sh"; LEFT=$GUEST
        guest right "$TMP/right.sh"; RIGHT=$GUEST
        marker left ready 60; marker right ready 60
        tell left "$(value right lease | cut -d/ -f1)"
        tell right "$(value left lease | cut -d/ -f1)"
        marker left listening; marker right listening
        tell left swap; tell right swap
        marker left from_peer_hash 600; marker right from_peer_hash 600

        "$LAB/pattern" {bytes} | outside timeout 600 nc -N -l 198.51.100.2 7100 >/dev/null &
        outside timeout 600 nc -d -l 198.51.100.2 7101 | md5sum | cut -c1-32 >outside.hash &
        receiver=$!
        listening tcp 7100 outside; listening tcp 7101 outside
        tell left outside; tell right outside
        marker left outside_secs 600; marker right outside_secs 600
        wait $receiver
        say outside_hash="$(cat outside.hash)"

        lanlet status --json >status.json || fail "status"
        tell left bye; tell right bye
        wait $LEFT; say left_exit=$?
        wait $RIGHT; say right_exit=$?
        kill -TERM $NETWORK
        wait $NETWORK; say network_exit=$?
        "#
    )
}

/// A failure's message: the scenario, the network's log and both consoles.
fn told(world: &World, outcome: &Outcome) -> String {
    let mut text = outcome.text();
    for name in ["up.log", "left.console", "right.console", "status.json"] {
        text.push_str(&format!("\n--- {name}\n{}", world.temp().read(name)));
    }
    text
}

#[test]
fn two_guests_on_one_network() {
    if let Some(reason) = guests_missing() {
        return skip(&reason);
    }
    let _alone = heavy();
    let bytes = transfer_bytes();
    let world = World::new()
        .with(&["--dns", "--ping"])
        .limit(Duration::from_secs(1200));
    let receive =
        "nc -d 198.51.100.2 7100 | md5sum | cut -c1-32 >/tmp/sum; say outside_hash=$(cat /tmp/sum)";
    let send = format!("pattern {bytes} | nc -N 198.51.100.2 7101; say to_outside=$?");
    world.temp().file("left.sh", guest_script(bytes, receive));
    world.temp().file("right.sh", guest_script(bytes, &send));

    let outcome = world.run(&two_guests_scenario(bytes));
    assert_eq!(outcome.status, Some(0), "{}", told(&world, &outcome));

    let hash = common::pattern_hash(bytes, "md5sum");
    let mut leases = Vec::new();
    for name in ["left", "right"] {
        let guest = world.console(name);
        let said = |key: &str| guest.get(key).unwrap_or("").to_owned();
        let context = || format!("{name}\n{}", told(&world, &outcome));
        for step in ["ping_gateway", "ping_peer", "ping_outside", "to_peer"] {
            assert_eq!(said(step), "0", "{step} of {}", context());
        }
        assert!(said("lease").starts_with("192.168.122."), "{}", context());
        assert_eq!(said("router"), "192.168.122.1", "{}", context());
        assert_eq!(said("dns"), "198.51.100.2", "{}", context());
        assert_eq!(said("nxdomain"), "NXDOMAIN", "{}", context());
        assert_eq!(said("from_peer_hash"), hash, "{}", context());
        leases.push(said("lease"));
    }
    assert_ne!(leases[0], leases[1]);
    assert_eq!(world.console("right").get("to_outside"), Some("0"));
    assert_eq!(
        world.console("left").get("outside_hash"),
        Some(hash.as_str())
    );

    let markers = outcome.markers();
    assert_eq!(markers.get("outside_hash"), Some(hash.as_str()));
    markers.passed(&["left_exit", "right_exit", "network_exit"]);
    print_rates(&world, bytes, outcome.elapsed);
    check_status(&world, &leases);
}

/// Guests, leases and MACs are listed, and nothing was lost that should not be.
fn check_status(world: &World, leases: &[String]) {
    let text = world.temp().read("status.json");
    let status: Status = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert_eq!(status.name, "default");
    assert_eq!(
        status.ports.iter().filter(|p| p.kind == "vmm").count(),
        2,
        "{text}"
    );
    for lease in leases {
        let address = lease.split('/').next().unwrap_or("");
        assert!(
            status
                .leases
                .iter()
                .any(|l| l.address.to_string() == address),
            "no {address} in {text}"
        );
    }
    for name in ["left", "right"] {
        let lease = status
            .leases
            .iter()
            .find(|l| l.hostname.as_deref() == Some(name));
        let mac = &lease
            .unwrap_or_else(|| panic!("no lease of {name}: {text}"))
            .mac;
        assert!(
            status.macs.iter().any(|m| m.mac == *mac),
            "{mac} not learned: {text}"
        );
    }
    for port in &status.ports {
        for (reason, count) in &port.drops {
            assert!(
                *count == 0 || EXPECTED_DROPS.contains(&reason.as_str()),
                "port {} dropped {count} frames as {reason}: {text}",
                port.name
            );
        }
    }
}

/// The rates, for whoever reads the test's output.
fn print_rates(world: &World, bytes: u64, elapsed: Duration) {
    let rate = |guest: &Markers, key: &str| bytes as f64 * 8.0 / 1e9 / guest.number(key);
    let (left, right) = (world.console("left"), world.console("right"));
    println!(
        "{bytes} bytes, hashed as they come: guest to guest both ways at once {:.2} and {:.2} Gbit/s, \
         outside to guest {:.2}, guest to outside {:.2}; {elapsed:.0?} in all",
        rate(&left, "swap_secs"),
        rate(&right, "swap_secs"),
        rate(&left, "outside_secs"),
        rate(&right, "outside_secs"),
    );
}

/// QEMU's own ROM is a DHCP client that shares no code with the others.
#[test]
fn ipxe_gets_a_lease() {
    if let Some(reason) = guests_missing() {
        return skip(&reason);
    }
    let _alone = heavy();
    let world = World::new().limit(Duration::from_secs(120));
    let outcome = world.run(
        r#"
        network
        "$LAB/as-user" "$LANLET" qemu -- -accel tcg -m 64 -nographic -boot n </dev/null >ipxe.console 2>&1 &
        QEMU=$!
        for _ in $(seq 400); do
            kill -0 $QEMU 2>/dev/null || fail "QEMU ended"
            lanlet status --json >status.json || fail "status"
            # Bound, and so past DISCOVER and REQUEST: iPXE prints this, then looks for a file to boot.
            if grep -aq 'Configuring.*ok' ipxe.console; then break; fi
            sleep 0.1
        done
        lanlet status --json >status.json || fail "status"
        say console="$(tr -d '\r' <ipxe.console | grep -aoE '192\.168\.122\.[0-9]+/255\.255\.255\.0' | head -1)"
        say gateway="$(tr -d '\r' <ipxe.console | grep -aoE 'gw 192\.168\.122\.1' | head -1 | tr ' ' _)"
        kill $QEMU; wait $QEMU
        kill -TERM $NETWORK; wait $NETWORK; say network_exit=$?
        "#,
    );
    let told = || {
        let console = world.temp().read("ipxe.console");
        let log = world.temp().read("up.log");
        format!(
            "{}\n--- up.log\n{log}\n--- console\n{console}",
            outcome.text()
        )
    };
    assert_eq!(outcome.status, Some(0), "{}", told());
    let markers = outcome.markers();
    let address = markers.get("console").and_then(|a| a.split('/').next());
    let address = address.unwrap_or_else(|| panic!("no address: {}", told()));
    assert_eq!(
        markers.get("gateway"),
        Some("gw_192.168.122.1"),
        "{}",
        told()
    );
    let text = world.temp().read("status.json");
    let status: Status = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert!(
        status
            .leases
            .iter()
            .any(|l| l.address.to_string() == address),
        "no {address} in {text}"
    );
}

/// A VM goes on through restarts of its network, by tap (two queues) and by vhost-user: the same address, a
/// pause of about a second.
#[test]
fn a_vm_outlives_restarts_of_its_network() {
    if let Some(reason) = guests_missing() {
        return skip(&reason);
    }
    let _alone = heavy();
    let world = World::new().limit(Duration::from_secs(300));
    world.temp().file(
        "guest.sh",
        r#"
        say ready=1
        while read -r word && [ "$word" != bye ]; do
            begin=$(uptime_secs)
            until ping -c 1 -W 1 "$ROUTER" >/dev/null; do :; done
            say "$word"="$(echo "$(uptime_secs) $begin" | awk '{print $1 - $2}')"
        done
        "#,
    );
    let outcome = world.run(
        r#"
        network
        guest tap "$TMP/guest.sh" --name default --queues 2; TAP=$GUEST
        guest shared "$TMP/guest.sh" --name default --vhost-user; SHARED=$GUEST
        marker tap ready 60; marker shared ready 60
        tell tap first; tell shared first
        marker tap first; marker shared first
        ports() { lanlet status --json | grep -o '"kind": *"[a-z_-]*"' | sort | tr -d ' \n'; }
        before="$(ports)"
        for signal in TERM KILL; do
            kill -$signal $NETWORK; wait $NETWORK
            network
            start=$(date +%s%N)
            until [ "$(ports)" = "$before" ] || [ $(($(date +%s%N) - start)) -gt 20000000000 ]; do sleep 0.05; done
            say ports="$([ "$(ports)" = "$before" ] && echo same)" back_ms=$((($(date +%s%N) - start) / 1000000))
            tell tap after_$signal; tell shared after_$signal
            marker tap after_$signal; marker shared after_$signal
        done
        tell tap bye; tell shared bye
        wait $TAP; say tap_exit=$?
        wait $SHARED; say shared_exit=$?
        until [ "$(ports | grep -o kind | wc -l)" = 1 ]; do sleep 0.05; done
        kill -TERM $NETWORK; wait $NETWORK; say network_exit=$?
        "#,
    );
    let told = || {
        let read = |name: &str| format!("\n--- {name}\n{}", world.temp().read(name));
        let files = ["up.log", "tap.console", "shared.console"].map(read);
        format!("{}{}", outcome.text(), files.concat())
    };
    assert_eq!(outcome.status, Some(0), "{}", told());
    let markers = outcome.markers();
    assert_eq!(markers.all("ports"), ["same", "same"], "{}", told());
    for key in ["tap_exit", "shared_exit", "network_exit"] {
        assert_eq!(markers.get(key), Some("0"), "{key}: {}", told());
    }
    for guest in ["tap", "shared"] {
        let console = world.console(guest);
        println!("{guest}: {console:?}");
        for key in ["after_TERM", "after_KILL"] {
            assert!(console.number(key) < 20.0, "{guest} {key}: {}", told());
        }
    }
}
