//! Networks of several workers: what guests, clients and rules see is one network.

use crate::common::World;
use crate::forwards::PRELUDE;
use crate::{assert_said, scenario};

#[test]
fn several_workers_are_one_network() {
    let Some(outcome) = scenario(
        &World::new().with(&["--dns", "--ping", "--iperf"]),
        &format!(
            "{PRELUDE}{}",
            r#"
            served one; served two
            network --workers 2
            say threads=$(grep -l ^lanlet-worker /proc/$NETWORK/task/*/comm | wc -l)
            # The first is at home with the first worker, the second with the second.
            guest one "$(http one 80); python3 peer.py serve_udp_echo 7001 & sleep 0.3" -p 127.0.0.1:8081:80 -p 7001:7001/udp
            guest two "$(http two 80); python3 peer.py serve_udp_echo 7002 & sleep 0.3
                ip address add 192.168.122.250/24 dev eth0" -p 127.0.0.1:8082:80 -p 7002:7002/udp
            one=$(cat one.address) two=$(cat two.address)
            # The sockets of a forward come to the worker that its guest is at home with.
            say first=$(get http://127.0.0.1:8081/) second=$(get http://127.0.0.1:8082/)
            python3 peer.py udp_sizes 127.0.0.1 7001 0 1472 9000
            python3 peer.py udp_sizes 127.0.0.1 7002 0 1472 9000
            # One without a lease has to be asked for: its answer is heard by the other worker.
            lanlet forward add 127.0.0.1:8083:192.168.122.250:80 >/dev/null
            say asked=$(get http://127.0.0.1:8083/)
            (for i in $(seq 40); do get http://127.0.0.1:$((8081 + i % 3))/ >got.$i & done; wait)
            say together=$(cat got.* | sort | uniq -c | tr -d '\n' | tr -s ' ' _)
            say opened=$(status_of "sum(f['opened'] for f in s['forwards'])") refused=$(status_of "sum(f['refused'] for f in s['forwards'])")
            lanlet forward remove 127.0.0.1:8083:192.168.122.250:80; say removed=$(get http://127.0.0.1:8083/)
            # Between guests, and out of each, with several queues too.
            for queues in 1 1 2; do
                "$LAB/as-user" "$LANLET" exec --name default --queues $queues -- bash -c "
                    curl -sS http://$one/ http://$two/; dig +short outside.test A
                    ping -c 2 -i 0.1 -q 203.0.113.1 | grep -o '2 received'
                    iperf3 -c outside.test -t 1 -P 4 -J | grep -c sum_received" >>guests.log 2>&1
            done
            say guests=$(sort guests.log | uniq -c | tr -s ' ' | tr ' \n' '_;')
            # A policy holds for the guests of either.
            echo 'default deny' >closed.policy
            lanlet policy set closed.policy
            for i in 1 2; do lanlet exec -- dig +short +tries=1 +time=1 outside.test | grep -v '^;' >>denied; done
            say denied=$(wc -c <denied) queries=$(status_of "s['policy']['default_queries']")
            touch one.over two.over
            until_true 10 status_is "len(s['ports']) + len(s['forwards'])" 1
            say left=$(status_of "len(s['forwards'])") flows=$(status_of "s['flows']['tcp']")
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_said(
        &outcome,
        &[
            ("threads", "2"),
            ("first", "one"),
            ("second", "two"),
            ("asked", "two"),
            ("together", "_13_one_27_two"),
            (
                "guests",
                "_3_1;_3_198.51.100.2;_3_2_received;_3_one;_3_two;",
            ),
            ("refused", "0"),
            ("removed", "curl=7"),
            ("denied", "0"),
            ("left", "0"),
            ("flows", "0"),
        ],
    );
    let markers = outcome.markers();
    let text = outcome.text();
    assert_eq!(
        markers.all("sizes"),
        ["0,1472,9000", "0,1472,9000"],
        "{text}"
    );
    // Three, two exchanges, and forty.
    assert_eq!(markers.get("opened"), Some("45"), "{text}");
}
