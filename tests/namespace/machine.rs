//! A QEMU guest with Debian's own clients: the same that a namespace guest can do, by each family.

use std::time::Duration;

use crate::common::{World, guests_missing, heavy, lab, skip};
use crate::{assert_said, scenario};

/// A guest without KVM hashes and connects slowly.
const LIMIT: Duration = Duration::from_secs(400);

/// What the guest does; IPv6 comes by router advertisement.
const GUEST: &str = r#"
until ip -6 route show default | grep -q . && ip -6 -o addr show dev eth0 scope global | grep -v tentative | grep -q .; do
    [ $(cut -d. -f1 /proc/uptime) -lt 40 ] || break
    sleep 0.2
done
say global="$(ip -6 -o addr show dev eth0 scope global | wc -l)" router="$(ip -6 route show default | wc -l)"
for host in 198.51.100.2 '[2001:db8:2::1]' '[2001:db8:e4::2]' outside.test four.test; do
    say got="$(curl -s -m 60 "http://$host/big" | sha256sum | cut -c1-32)"
done
# Those of the image's own, which use their system calls in other ways.
say wget="$(wget -q -O - http://198.51.100.2/big | sha256sum | cut -c1-32)"
hops() { awk '$1 ~ /^[0-9]+$/ && $1 > 1 {hops = hops $2 ","} END {print hops}'; }
for address in 198.18.4.2 2001:db8:e4::2; do
    say udp="$(traceroute -n -q 1 -w 3 $address | hops)"
    say icmp="$(traceroute -n -q 1 -w 3 -I $address | hops)"
    say mtr="$(mtr -n -r -c 1 $address | sed -n 's/^ *\([0-9]*\)\.|-- \([^ ]*\) .*/\1 \2/p' | hops)"
    say path="$(tracepath -n $address | awk '/Resume/ {print $3 "," $5}')"
done
for address in 198.51.100.2 2001:db8:1::2; do
    ping -q -c 2 -W 3 -s 4000 $address; say ping=$?
    for how in +notcp +tcp; do say dig="$(dig +short +time=5 $how @$address txt big.test | wc -l)"; done
    nmap -sT -n -Pn -p 80-82 -oG - $(case $address in *:*) echo -6 ;; esac) $address >/tmp/scan
    say ports="$(sed -n 's/.*Ports: //p' /tmp/scan | tr ',' '\n' | awk -F/ '{printf "%s,", $2}')"
    for options in '-P 16' '-P 16 -R' --bidir '-u -b 5M -l 1200' '-u -b 5M -l 8000'; do
        iperf3 -c $address -t 1 $options >/tmp/iperf; say iperf=$?
    done
done
for how in +notcp +tcp; do say dig="$(dig +short +time=5 $how txt big.test | wc -l)"; done
# A thousand at once, as four clients with 250 transfers each.
say crowd=ready
await go
for part in 1 2 3 4; do
    curl -sS --no-progress-meter -m 150 -Z --parallel-immediate --parallel-max 250 -o /dev/null -w '%{http_code}\n' \
        "http://[2001:db8:1::2]:8000/[1-125]" -o /dev/null -w '%{http_code}\n' "http://198.51.100.2:8000/[1-125]" >/tmp/codes.$part 2>/tmp/errors.$part &
done
wait
say curls="$(cat /tmp/codes.* | grep -cx 200)" errors="$(cat /tmp/errors.* | sort | uniq -c | sort -rn | head -2 | tr -s ' \n' _)"
"#;

#[test]
fn a_machine_with_debians_clients() {
    if let Some(reason) = guests_missing() {
        return skip(&reason);
    }
    if !lab().dir.join("out/initrd-tools.gz").exists() {
        return skip("no guest image with clients: run lab/setup test, then make image");
    }
    let _alone = heavy();
    let world = World::new()
        .with(&["--routers", "--dns", "--iperf", "--ping"])
        .limit(LIMIT);
    let pages = world.temp().path().to_string_lossy().into_owned();
    world.temp().file("guest.sh", GUEST);
    world
        .temp()
        .file("peer_faults.py", include_str!("peer_faults.py"));
    let Some(outcome) = scenario(
        &world.with(&["--http", &pages]),
        r#"
        head -c 2000003 /dev/urandom >big
        say sent="$(sha <big)"
        outside nft 'add table inet filter { chain input { type filter hook input priority 0; tcp dport 82 drop; }; }'
        network
        GUEST_INITRD=initrd-tools.gz guest machine "$PWD/guest.sh"
        marker machine crowd 300
        outside python3 peer_faults.py serve_crowd 8000 1000 >crowd.log 2>&1 &
        listening tcp 8000 outside
        tell machine go
        marker machine curls 200
        tr -d '\r' <machine.console | grep -a '@@LANLET'
        cat crowd.log
        wait $GUEST
        until_true 20 status_is "s['flows']['tcp']" 0
        say left="$(status_of "s['flows']['tcp']")"
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let sent = markers.get("sent").expect("a checksum");
    assert_eq!(markers.all("got"), vec![sent; 5], "{}", outcome.text());
    let four = "198.51.100.2,198.18.1.2,198.18.2.2,198.18.3.2,198.18.4.2,";
    let six = "2001:db8:1::2,2001:db8:e1::2,2001:db8:e2::2,2001:db8:e3::2,2001:db8:e4::2,";
    for key in ["udp", "icmp", "mtr"] {
        assert_eq!(markers.all(key), [four, six], "{key}: {}", outcome.text());
    }
    assert_eq!(markers.all("path"), ["1280,6"; 2], "{}", outcome.text());
    assert_eq!(markers.all("ping"), ["0"; 2], "{}", outcome.text());
    assert_eq!(markers.all("dig"), ["16"; 6], "{}", outcome.text());
    assert_eq!(
        markers.all("ports"),
        ["open,closed,filtered,"; 2],
        "{}",
        outcome.text()
    );
    assert_eq!(markers.all("iperf"), ["0"; 10], "{}", outcome.text());
    assert_said(
        &outcome,
        &[
            ("global", "1"),
            ("router", "1"),
            ("wget", sent),
            ("curls", "1000"),
            ("waiting", "1000"),
            ("exit", "0"),
            ("left", "0"),
        ],
    );
}
