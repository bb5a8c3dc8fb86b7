//! The lab itself: what the other tests take for granted about `lab/world` and `lab/as-user`.

mod common;

use std::thread;
use std::time::Duration;

use common::{World, heavy, lab, skip, world_missing};

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
            why closed6 2001:db8:1::2 9
            why no_nd 2001:db8:1::99 80
            why host_route6 2001:db8:4::1 80
            why host_unreachable6 2001:db8:3::99 80
            why prohibited6 2001:db8:5::1 80
            why swallowed6 2001:db8:6::1 80
            why no_route6 2001:db8:77::1 80
            say second="$(dig +short second.test)" big="$(dig +short txt big.test | wc -l)"
            say none="$(dig none.test | grep -o NXDOMAIN)"
            step beyond ping -q -c 1 -W 1 203.0.113.130
            say ttl="$(ping -c 1 -W 1 -t 1 203.0.113.130 | grep -o 'Time to live exceeded' | tr ' ' _)"
            say hop_limit="$(ping -c 1 -W 1 -t 1 2001:db8:3::130 | grep -o 'Hop limit' | tr ' ' _)"
            say six="$(dig +short aaaa six.test)" six_has="$(dig +short a six.test | wc -l)"
            say four="$(dig +short a four.test)" four_has="$(dig +short aaaa four.test | wc -l)"
            for address in 203.0.113.9 203.0.113.10; do
                echo "$address changing.test" >/run/dns.d/changing
                for _ in $(seq 100); do
                    [ "$(dig +short changing.test)" != $address ] || break
                    sleep 0.02
                done
                say changing="$(dig +short changing.test)"
            done
            "#,
        )
        .passed();
    let markers = outcome.markers();
    markers.passed(&["beyond"]);
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
        ("closed6", "Connection_refused"),
        ("no_nd", "No_route_to_host"),
        ("host_route6", "No_route_to_host"),
        ("host_unreachable6", "No_route_to_host"),
        ("prohibited6", "Permission_denied"),
        ("swallowed6", ""),
        ("no_route6", "Network_is_unreachable"),
        ("hop_limit", "Hop_limit"),
        ("six", "2001:db8:2::1"),
        ("six_has", "0"),
        ("four", "203.0.113.1"),
        ("four_has", "0"),
        ("changing", "203.0.113.10"),
    ] {
        assert_eq!(markers.get(key), Some(value), "{key}: {}", outcome.text());
    }
}

/// Every server answers on both families as soon as the world is there.
#[test]
fn servers_speak_both_families() {
    if let Some(reason) = world_missing() {
        return skip(&reason);
    }
    let world = World::new();
    let pages = world.temp().path().to_owned();
    let world = world.with(&[
        "--dns",
        "--iperf",
        "--routers",
        "--http",
        &pages.to_string_lossy(),
    ]);
    let outcome = world
        .run(
            r#"
            for address in 198.51.100.2 203.0.113.1 198.18.4.2 [2001:db8:1::2] [2001:db8:2::1] [2001:db8:e4::2]; do
                say http="$(curl -s -m 5 -o /dev/null -w '%{http_code}' "http://$address/scenario.sh")"
            done
            for address in 198.51.100.2 203.0.113.1 2001:db8:1::2 2001:db8:2::1; do
                say dns="$(dig +short +time=1 @"$address" aaaa outside.test)"
            done
            for address in 203.0.113.1 2001:db8:2::1; do
                iperf3 -c "$address" -n 1M >/dev/null; say iperf=$?
            done
            "#,
        )
        .passed();
    let markers = outcome.markers();
    assert_eq!(markers.all("http"), ["200"; 6], "{}", outcome.text());
    assert_eq!(
        markers.all("dns"),
        ["2001:db8:1::2"; 4],
        "{}",
        outcome.text()
    );
    assert_eq!(markers.all("iperf"), ["0"; 2], "{}", outcome.text());
}

#[test]
fn a_host_may_lack_ipv6() {
    if let Some(reason) = world_missing() {
        return skip(&reason);
    }
    let outcome = World::new()
        .with(&["--no-v6", "--dns"])
        .run(
            r#"
            say addresses="$(ip -6 -o address show | wc -l)" routes="$(ip -6 route show | wc -l)"
            say four="$(dig +short a outside.test)" six="$(dig +short aaaa outside.test)"
            step ping ping -q -c 1 -W 1 203.0.113.130
            "#,
        )
        .passed();
    let markers = outcome.markers();
    markers.passed(&["ping"]);
    for (key, value) in [
        ("addresses", "0"),
        ("routes", "0"),
        ("four", "198.51.100.2"),
        ("six", "2001:db8:1::2"),
    ] {
        assert_eq!(markers.get(key), Some(value), "{key}: {}", outcome.text());
    }
}

/// Each router names itself to every tool, and the narrow link is found.
#[test]
fn a_path_of_three_routers() {
    if let Some(reason) = world_missing() {
        return skip(&reason);
    }
    let outcome = World::new()
        .with(&["--routers"])
        .run(
            r#"
            hops() { awk '$1 ~ /^[0-9]+$/ {printf "%s,", $2}'; }
            for address in 198.18.4.2 2001:db8:e4::2; do
                say udp="$(traceroute -n -q 1 -w 2 $address | hops)"
                say icmp="$(traceroute -n -q 1 -w 2 -I $address | hops)"
                say mtr="$(mtr -n -r -c 1 $address | tr -d '.|-' | awk 'NR > 2 {n++} END {print n}')"
                say pmtu="$(tracepath -n $address | awk '/Resume/ {print $3 "," $5}')"
                # The first answer teaches the other side what its way back is worth.
                step ping ping -q -c 2 -W 2 -s 4000 $address
            done
            # No router limits how many errors it sends.
            for address in 198.18.4.2 2001:db8:e4::2; do
                say exceeded="$(ping -n -c 100 -i 0.005 -W 1 -t 3 $address | grep -c exceeded)"
            done
            "#,
        )
        .passed();
    let markers = outcome.markers();
    let four = "198.51.100.2,198.18.1.2,198.18.2.2,198.18.3.2,198.18.4.2,";
    let six = "2001:db8:1::2,2001:db8:e1::2,2001:db8:e2::2,2001:db8:e3::2,2001:db8:e4::2,";
    for (key, values) in [
        ("udp", [four, six]),
        ("icmp", [four, six]),
        ("mtr", ["5", "5"]),
        ("pmtu", ["1280,5", "1280,5"]),
        ("ping", ["0", "0"]),
        ("exceeded", ["100", "100"]),
    ] {
        assert_eq!(markers.all(key), values, "{key}: {}", outcome.text());
    }
}

#[test]
fn the_uplink_loses_delays_and_changes() {
    if let Some(reason) = world_missing() {
        return skip(&reason);
    }
    let lossy = World::new()
        .with(&["--loss", "20"])
        .run(
            r#"
            for address in 198.51.100.2 2001:db8:1::2; do
                # A big burst, each packet of which takes its own chance twice.
                say received="$(ping -q -c 1000 -i 0.001 -W 1 $address | grep -o '[0-9]* received' | cut -d' ' -f1)"
            done
            "#,
        )
        .passed();
    for received in lossy.markers().all("received") {
        // 640 expected; 100 is more than six standard deviations.
        let received: i32 = received.parse().expect("a number");
        assert!((540..=740).contains(&received), "{}", lossy.text());
    }
    let late = World::new()
        .with(&["--delay", "50"])
        .run(
            r#"
            ping -c 1 198.51.100.2 >/dev/null; ping -c 1 2001:db8:1::2 >/dev/null # ARP and ND
            for address in 198.51.100.2 2001:db8:1::2; do
                say ms="$(ping -c 1 -W 2 $address | sed -n 's/.*time=\([0-9]*\).*/\1/p')"
            done
            # TCP: the checksums are there.
            outside sh -c 'head -c 1000000 /dev/zero | nc -l -N -p 7000' &
            listening tcp 7000 outside
            say bytes="$(nc -d -w 5 198.51.100.2 7000 | wc -c)"
            "$LAB/readdress" 198.51.100.7 2001:db8:1::7
            for address in 203.0.113.130 2001:db8:3::130; do
                step ping ping -q -c 1 -W 2 $address
                ip -o route get $address | grep -o 'src [^ ]*' >source
                say source="$(cut -d' ' -f2 source)"
            done
            say addresses="$(ip -o address show dev up0 scope global | wc -l)"
            "#,
        )
        .passed();
    let markers = late.markers();
    for millis in markers.all("ms") {
        let millis: i32 = millis.parse().expect("a number");
        assert!((100..150).contains(&millis), "{}", late.text());
    }
    assert_eq!(markers.all("ms").len(), 2, "{}", late.text());
    assert_eq!(markers.get("bytes"), Some("1000000"), "{}", late.text());
    assert_eq!(markers.all("ping"), ["0", "0"], "{}", late.text());
    assert_eq!(
        markers.all("source"),
        ["198.51.100.7", "2001:db8:1::7"],
        "{}",
        late.text()
    );
    assert_eq!(markers.get("addresses"), Some("2"), "{}", late.text());
}

/// What `turnutils_natdiscovery` calls each behaviour, seen with NATs whose behaviour is known: the
/// kernel's, with a rule for each mapping. The tests of lanlet's own rely on it.
#[test]
fn nat_discovery_tells_the_behaviours_apart() {
    if let Some(reason) = world_missing() {
        return skip(&reason);
    }
    // From port 5000; each port of the NAT is a mapping. The answers of strangers come to port 6000.
    let mapping = |to: &str, port: u16| {
        format!(
            "oifname up0 {to} snat ip to 198.51.100.1:{port}; oifname up0 {to6} snat ip6 to [2001:db8:1::1]:{port}",
            to6 = six(to)
        )
    };
    let filter = |from: &str| {
        format!(
            "iifname up0 {from} udp dport 6000 dnat ip to 10.0.0.2:5000; iifname up0 {from6} udp dport 6000 dnat ip6 to [fd00::2]:5000",
            from6 = six(from)
        )
    };
    let (first, second) = ("198.51.100.2", "203.0.113.1");
    let to = |address: &str, ports: &str| format!("ip daddr {address} udp dport {ports}");
    let kinds = [
        (
            "Endpoint Independent",
            [
                mapping(&to(first, "3478-3479"), 6000),
                mapping(&to(second, "3478-3479"), 6000),
            ]
            .join("; "),
            [
                filter(&format!("ip saddr {first}")),
                filter(&format!("ip saddr {second}")),
            ]
            .join("; "),
        ),
        (
            "Address Dependent",
            [
                mapping(&to(first, "3478-3479"), 6000),
                mapping(&to(second, "3478-3479"), 6001),
            ]
            .join("; "),
            filter(&format!("ip saddr {first}")),
        ),
        (
            "Address and Port Dependent",
            [
                mapping(&to(first, "3478"), 6000),
                mapping(&to(first, "3479"), 6001),
                mapping(&to(second, "3478"), 6002),
                mapping(&to(second, "3479"), 6003),
            ]
            .join("; "),
            String::new(),
        ),
    ];
    thread::scope(|scope| {
        for (name, postrouting, prerouting) in &kinds {
            scope.spawn(move || {
                let world = World::new().with(&["--stun"]);
                let rules = format!(
                    "table inet nat {{
                    chain post {{ type nat hook postrouting priority 100; {postrouting}; }}
                    chain pre {{ type nat hook prerouting priority -100; {prerouting}; }}
                    }}\n"
                );
                world.temp().file("rules.nft", rules.replace("; ", "\n"));
                let outcome = world.run(DISCOVERY).passed();
                let markers = outcome.markers();
                let name = name.replace(' ', "_");
                for (key, what) in [("m", "Mapping"), ("f", "Filtering")] {
                    let expected = format!("NAT_with_{name}_{what}!");
                    assert_eq!(
                        markers.all(key),
                        [&*expected, &*expected],
                        "{}",
                        outcome.text()
                    );
                }
            });
        }
    });
}

/// The same for IPv6, where each address of the lab has its pair.
fn six(rule: &str) -> String {
    rule.replace("ip ", "ip6 ")
        .replace("198.51.100.2", "2001:db8:1::2")
        .replace("203.0.113.1", "2001:db8:2::1")
}

/// A guest behind the kernel's NAT, and what it discovers of it: first by IPv4, then by IPv6.
const DISCOVERY: &str = r#"
ip netns add guest
ip link add k0 index 200 type veth peer name eth0 netns guest
echo 0 >/proc/sys/net/ipv6/conf/k0/accept_dad
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
ip address add 10.0.0.1/24 dev k0
ip address add fd00::1/64 dev k0
ip link set k0 up
ip -netns guest -batch - <<'END'
address add 10.0.0.2/24 dev eth0
address add fd00::2/64 dev eth0 nodad
link set eth0 up
route add default via 10.0.0.1
route add default via fd00::1
END
nft -f rules.nft || fail "rules"
for pair in "10.0.0.2 198.51.100.2" "fd00::2 2001:db8:1::2"; do
    for what in m f; do
        "$LAB/in" guest turnutils_natdiscovery -$what -L ${pair% *} -l 5000 ${pair#* } >found
        say $what="$(grep '^NAT with' found | tr ' ' _)"
    done
done
"#;

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

/// testpmd's part of the comparison by vhost-user has figures, says what it lacks, and can be cut short.
#[test]
fn vhost_user_is_compared_and_nothing_outlives_it() {
    if let Some(reason) = world_missing() {
        return skip(&reason);
    }
    if !lab()
        .dir
        .join("out/dpdk/lib/librte_net_af_packet.so.23")
        .exists()
    {
        return skip("no testpmd with its drivers: run lab/dpdk/build");
    }
    let _alone = heavy();
    let world = World::new().limit(Duration::from_secs(150));
    let outcome = world.run(
        r#"
        export LANLET_BIN=$LANLET
        compare="$LAB/compare-vhost-user --secs 0.5"
        # A peer's run may fail, which is said; ours may not.
        $compare --rounds 1 --only testpmd >table
        say figures="$(grep -cE '^(64|1518)-byte frames +kpps +[0-9][0-9,.]* ' table)"
        ours='compare-vhost-user|dpdk/testpmd|lanlet (up|bench)'
        for signal in INT KILL; do
            $compare --only testpmd >cut 2>&1 &
            compared=$!
            for _ in $(seq 500); do
                pgrep -f dpdk/testpmd >/dev/null && say running=yes && break
                sleep 0.02
            done
            kill -$signal $compared; wait $compared
            say $signal=$?
            for _ in $(seq 100); do
                pgrep -f "$ours" >/dev/null || break
                sleep 0.02
            done
            say left=$(pgrep -fc "$ours")
        done
        LANLET_BIN=/none $compare >missing; say missing=$? told=$(grep -c 'there is no /none' missing)
        true
        "#,
    );
    let outcome = outcome.passed();
    let markers = outcome.markers();
    for (key, wanted) in [
        ("figures", "2"),
        ("INT", "130"),
        ("KILL", "137"),
        ("missing", "1"),
        ("told", "2"),
    ] {
        assert_eq!(markers.get(key), Some(wanted), "{key}: {}", outcome.text());
    }
    assert_eq!(markers.all("running"), ["yes"; 2], "{}", outcome.text());
    assert_eq!(markers.all("left"), ["0"; 2], "{}", outcome.text());
}
