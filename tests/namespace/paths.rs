//! Tools that ask the path about itself: what they find is the path behind the host, hop by hop.

use std::time::Duration;

use crate::common::World;
use crate::{assert_said, scenario};

/// The routers behind the gateway, as `--routers` of `lab/world` lays them.
const HOPS_4: &str = "198.51.100.2,198.18.1.2,198.18.2.2,198.18.3.2,198.18.4.2,";
const HOPS_6: &str = "2001:db8:1::2,2001:db8:e1::2,2001:db8:e2::2,2001:db8:e3::2,2001:db8:e4::2,";

fn world() -> World {
    World::new()
        .with(&["--routers", "--ping"])
        .limit(Duration::from_secs(100))
}

#[test]
fn traceroute_and_mtr_name_every_hop() {
    let Some(outcome) = scenario(
        &world(),
        r#"
        network
        cat >trace.sh <<'END'
        # The gateway is the first hop; of IPv6 it may name any of its addresses.
        names() { awk '$1 == "1" {print "gateway=" $2} $1 ~ /^[0-9]+$/ && $1 > 1 {hops = hops $2 ","} END {print "hops=" hops}'; }
        say() { echo "@@LANLET" $(cat); }
        for address in 198.18.4.2 2001:db8:e4::2; do
            traceroute -n -q 1 -w 2 $address | names | say
            traceroute -n -q 1 -w 2 -I $address | names | say
            # All at once, as traceroute does by default, and to a port of a service.
            traceroute -n -q 3 -w 2 -N 30 $address | names | say
            traceroute -n -q 1 -w 2 -U -p 53 $address | names | say
            for how in '' -u; do
                mtr -n -r -c 2 -i 0.2 $how $address | sed -n 's/^ *\([0-9]*\)\.|-- \([^ ]*\) *\([0-9.]*%\).*/\1 \2 \3/p' >>found
                tail -n 6 found | names | say
            done
            echo "@@LANLET loss=$(awk '{print $3}' found | sort -u | tr '\n' ,)"
            rm found
        done
END
        lanlet exec --name default -- sh trace.sh
        say drops="$(drops)"
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let (four, six) = markers.all("hops").split_at(markers.all("hops").len() / 2);
    assert_eq!(four, [HOPS_4; 6], "{}", outcome.text());
    assert_eq!(six, [HOPS_6; 6], "{}", outcome.text());
    assert_eq!(markers.all("loss"), ["0.0%,"; 2], "{}", outcome.text());
    let (four, six) = markers.all("gateway").split_at(6);
    assert_eq!(four, ["192.168.122.1"; 6], "{}", outcome.text());
    assert!(
        six.len() == 6
            && six
                .iter()
                .all(|a| a.starts_with("fd") || a.starts_with("fe80:")),
        "{}",
        outcome.text()
    );
    assert_said(&outcome, &[("drops", "none")]);
}

#[test]
fn the_narrow_link_is_found() {
    let world = world();
    let pages = world.temp().path().to_string_lossy().into_owned();
    let Some(outcome) = scenario(
        &world.with(&["--http", &pages]),
        r#"
        head -c 3000001 /dev/urandom >big
        say sent="$(sha <big)"
        network
        cat >probe.sh <<'END'
        for address in 198.18.4.2 2001:db8:e4::2; do
            # By ping first: nobody has asked this path before.
            ping -n -c 3 -i 0.2 -W 1 -M do -s 1400 $address >out 2>&1
            echo "@@LANLET too_big=$(grep -oiE 'mtu ?= ?[0-9]+' out | head -1 | tr -d ' ')"
            echo "@@LANLET path=$(tracepath -n $address | awk '/Resume/ {print $3 "," $5}')"
            # What may be fragmented gets through, and the second answer too where the way back is narrow.
            ping -q -c 3 -i 0.2 -W 2 -s 4000 $address >out && echo "@@LANLET big=$address"
        done
        for url in 198.18.4.2 '[2001:db8:e4::2]'; do
            echo "@@LANLET got=$(curl -s -m 20 "http://$url/big" | sha256sum | cut -c1-32)"
        done
END
        lanlet exec --name default -- sh probe.sh
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let sent = markers.get("sent").expect("a checksum");
    assert_eq!(
        markers.all("too_big"),
        ["mtu=1280", "mtu=1280"],
        "{}",
        outcome.text()
    );
    // The gateway, the uplink's router, r1, r2, r3 and the host at the end.
    assert_eq!(
        markers.all("path"),
        ["1280,6", "1280,6"],
        "{}",
        outcome.text()
    );
    assert_eq!(
        markers.all("big"),
        ["198.18.4.2", "2001:db8:e4::2"],
        "{}",
        outcome.text()
    );
    assert_eq!(markers.all("got"), [sent, sent], "{}", outcome.text());
}

/// Errors of the path about what a guest's sockets sent reach these sockets, as they reach the host's own.
#[test]
fn errors_of_the_path_reach_the_socket() {
    let world = world();
    world
        .temp()
        .file("peer_faults.py", include_str!("peer_faults.py"));
    let Some(outcome) = scenario(
        &world,
        r#"
        network
        cat >ask.sh <<'END'
        for address in 198.51.100.2 203.0.113.33 203.0.113.65 198.51.100.99 192.0.2.1 10.1.1.1 \
            2001:db8:1::2 2001:db8:3::99 2001:db8:5::1 2001:db8:1::99 2001:db8:4::1 2001:db8:77::1; do
            python3 peer_faults.py udp_error $address 9
        done
        for address in 203.0.113.33 203.0.113.65 10.1.1.1 2001:db8:3::99 2001:db8:5::1 2001:db8:77::1; do
            echo "@@LANLET ping=$(ping -n -c 1 -W 2 $address | grep -oiE 'unreachable|prohibited|filtered|route' | tail -1)"
        done
        ping -n -c 1 -W 1 -t 3 198.18.4.2 | sed -n 's/From \([^ ]*\) .*exceeded.*/@@LANLET exceeded=\1/p'
        ping -n -c 1 -W 1 -t 3 2001:db8:e4::2 | sed -n 's/From \([^ ]*\) .*exceeded.*/@@LANLET exceeded=\1/p'
END
        lanlet exec --name default -- sh ask.sh
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    assert_eq!(
        markers.all("udp"),
        [
            "ECONNREFUSED",
            "EHOSTUNREACH",
            "EHOSTUNREACH",
            "EHOSTUNREACH",
            "EHOSTUNREACH",
            "ENETUNREACH",
            "ECONNREFUSED",
            "EHOSTUNREACH",
            "EACCES",
            "EHOSTUNREACH",
            "EHOSTUNREACH",
            "ENETUNREACH",
        ],
        "{}",
        outcome.text()
    );
    assert_eq!(
        markers.all("ping"),
        [
            "Unreachable",
            "filtered",
            "Unreachable",
            "unreachable",
            "prohibited",
            "route",
        ],
        "{}",
        outcome.text()
    );
    assert_eq!(
        markers.all("exceeded"),
        ["198.18.1.2", "2001:db8:e1::2"],
        "{}",
        outcome.text()
    );
}
