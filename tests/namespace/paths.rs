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
            traceroute -n -q 1 -w 2 -T $address | names | say
            for how in '' -u -T; do
                mtr -n -r -c 2 -i 0.2 $how $address | sed -n 's/^ *\([0-9]*\)\.|-- \([^ ]*\) *\([0-9.]*%\).*/\1 \2 \3/p' >>found
                tail -n 6 found | names | say
            done
            echo "@@LANLET loss=$(awk '{print $3}' found | sort -u | tr '\n' ,)"
            rm found
        done
END
        # mtr takes such an interval from root alone.
        lanlet exec --root --name default -- sh trace.sh
        say drops="$(drops)"
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let (four, six) = markers.all("hops").split_at(markers.all("hops").len() / 2);
    assert_eq!(four, [HOPS_4; 8], "{}", outcome.text());
    assert_eq!(six, [HOPS_6; 8], "{}", outcome.text());
    assert_eq!(markers.all("loss"), ["0.0%,"; 2], "{}", outcome.text());
    let (four, six) = markers.all("gateway").split_at(8);
    assert_eq!(four, ["192.168.122.1"; 8], "{}", outcome.text());
    assert!(
        six.len() == 8
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

/// A guest that routes (docker, a VPN) with a smaller link behind it: what is too big for that is sent
/// smaller, to an inner guest whose own card is as large as any.
#[test]
fn a_smaller_link_behind_a_guest_stalls_nothing() {
    let world = World::new().limit(Duration::from_secs(100));
    let pages = world.temp().path().to_string_lossy().into_owned();
    let Some(outcome) = scenario(
        &world.with(&["--http", &pages, "--dns"]),
        r#"
        head -c 3000001 /dev/urandom >big
        say sent="$(sha <big)"
        cat >server.py <<'END'
import socket, sys
server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
server.bind(('::', 7000))
while True:
    server.sendto(bytes(1400), server.recvfrom(100)[1])
END
        cat >client.py <<'END'
import socket, sys
family, at = (socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET), (sys.argv[1], 7000)
client = socket.socket(family, socket.SOCK_DGRAM)
client.settimeout(1)
for n in range(20):
    client.sendto(b'x', at)
    try:
        print('@@LANLET udp=%d' % len(client.recv(2000)))
        sys.exit()
    except TimeoutError:
        pass
END
        outside python3 server.py & SERVER=$!
        listening udp 7000 outside
        network
        cat >route.sh <<'END'
        set -e
        # Its router may not come back by itself once this is one.
        for _ in $(seq 100); do
            six=$(ip -6 route show default dev eth0 | awk '{print $3; exit}')
            own=$(ip -6 -o address show dev eth0 scope global -tentative | awk '{print $4; exit}')
            [ -z "$six" ] || [ -z "$own" ] || break
            sleep 0.05
        done
        four=$(ip -4 -o address show dev eth0 | awk '{print $4}')
        inner4=${four%.*}.200 inner6=$(python3 -c "import ipaddress, sys; print(ipaddress.ip_interface('$own').network[0x200])")
        unshare --net sleep 90 & inner=$!
        until [ "$(readlink /proc/$inner/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.02; done
        within() { nsenter --target $inner --net "$@"; }
        ip link add in0 mtu 1280 type veth peer name in1 mtu 1500
        ip link set in1 netns $inner
        for set in ipv4/ip_forward=1 ipv4/conf/eth0/proxy_arp=1 ipv4/conf/in0/proxy_arp=1             ipv6/conf/eth0/accept_ra=2 ipv6/conf/all/forwarding=1 ipv6/conf/eth0/proxy_ndp=1; do
            echo "${set#*=}" >/proc/sys/net/${set%=*}
        done
        ip link set in0 up
        ip address add fe80::1/64 dev in0 nodad
        ip route add $inner4/32 dev in0
        ip -6 route add $inner6/128 dev in0
        ip -6 route replace default via $six dev eth0
        ip -6 neigh add proxy $inner6 dev eth0
        within ip link set in1 up
        within ip address add $inner4/32 dev in1
        within ip address add $inner6/128 dev in1 nodad
        within ip route add default dev in1
        within ip -6 route add default via fe80::1 dev in1
        for address in 198.51.100.2 2001:db8:1::2; do
            case $address in *:*) url="[$address]" ;; *) url=$address ;; esac
            echo "@@LANLET got=$(within curl -s -m 30 "http://$url/big" | sha256sum | cut -c1-32)"
            within python3 client.py $address
        done
        kill $inner
END
        lanlet exec --name default -- bash route.sh
        say narrowed="$(status_of "(s['totals']['tcp_narrowed'], s['totals']['udp_narrowed'])" | tr -d ' ')"
        kill $SERVER
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let sent = markers.get("sent").expect("a checksum");
    assert_eq!(markers.all("got"), [sent, sent], "{}", outcome.text());
    assert_eq!(markers.all("udp"), ["1400", "1400"], "{}", outcome.text());
    assert_said(&outcome, &[("narrowed", "(2,2)")]);
}
