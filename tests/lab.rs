//! The lab itself: what the other tests take for granted about `lab/world` and `lab/as-user`.

mod common;

use std::time::Duration;

use common::{World, skip, world_missing};

#[test]
fn addresses_fail_as_described() {
    if let Some(reason) = world_missing() {
        return skip(&reason);
    }
    let world = World::new().with(&["--dns", "--iperf"]);
    let outcome = world
        .run(
            r#"
            try() { say "$1=$(nc -w 2 "$2" "$3" </dev/null 2>/dev/null; echo $?)"; }
            why() { say "$1=$(nc -v -w 2 "$2" "$3" 2>&1 </dev/null | sed -n 's/.*failed: //p' | tr ' ' _)"; }
            why closed 198.51.100.2 9
            why no_arp 198.51.100.99 80
            why host_route 192.0.2.1 80
            why host_unreachable 203.0.113.33 80
            why prohibited 203.0.113.65 80
            why no_route 10.1.1.1 80
            say second="$(dig +short second.test)" big="$(dig +short txt big.test | wc -l)"
            say none="$(dig none.test | grep -o NXDOMAIN)"
            step beyond ping -c 1 -W 1 203.0.113.130 >/dev/null
            say ttl="$(ping -c 1 -W 1 -t 1 203.0.113.130 | grep -o 'Time to live exceeded' | tr ' ' _)"
            "#,
        )
        .passed();
    let markers = outcome.markers();
    for (key, value) in [
        ("closed", "Connection_refused"),
        ("no_arp", "No_route_to_host"),
        ("host_route", "No_route_to_host"),
        ("host_unreachable", "No_route_to_host"),
        ("prohibited", "No_route_to_host"),
        ("no_route", "Network_is_unreachable"),
        ("second", "203.0.113.1"),
        ("big", "16"),
        ("none", "NXDOMAIN"),
        ("ttl", "Time_to_live_exceeded"),
    ] {
        assert_eq!(markers.get(key), Some(value), "{key}: {}", outcome.text());
    }
}

#[test]
fn a_user_has_no_right_over_the_world() {
    if let Some(reason) = world_missing() {
        return skip(&reason);
    }
    let outcome = World::new()
        .run(
            r#"
            # The world's root is an ordinary user of the machine.
            say machine_uid="$(awk '{print $2}' /proc/self/uid_map)"
            say uid="$(user id -u)" caps="$(user awk '/^CapEff/ {print $2}' /proc/self/status)"
            user ip link set up0 down 2>/dev/null; say down=$?
            user touch "$XDG_RUNTIME_DIR/socket"; say runtime=$?
            user unshare --user --map-root-user --net ip link add dummy0 type dummy; say nested=$?
            "#,
        )
        .passed();
    let markers = outcome.markers();
    assert_ne!(markers.get("machine_uid"), Some("0"), "{}", outcome.text());
    assert_eq!(markers.get("uid"), Some("1000"));
    assert_eq!(markers.get("caps"), Some("0000000000000000"));
    assert_ne!(markers.get("down"), Some("0"));
    assert_eq!(markers.get("runtime"), Some("0"));
}

#[test]
fn a_scenario_ends_at_its_limit_and_leaves_nothing() {
    if let Some(reason) = world_missing() {
        return skip(&reason);
    }
    let world = World::new().limit(Duration::from_secs(2));
    let outcome = world.run("setsid sleep 3217 & sleep 3217");
    assert!(outcome.timed_out, "{}", outcome.text());
    let left = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let left = left.filter(|process| {
        let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        line.starts_with(b"sleep\x003217")
    });
    assert_eq!(left.count(), 0, "the world's processes outlived it");
}
