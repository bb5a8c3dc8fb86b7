//! What goes wrong outside and on the host, by each family: guests see what a host of their own would
//! have seen, other flows go on, memory stays bounded and every socket is released.

use std::time::Duration;

use crate::common::{Outcome, World, heavy};
use crate::{assert_said, scenario};

/// How late a guest may hear of the end of its flow.
const HEARD_SECS: f64 = 20.0;
/// What a flow that stands still may hold: both of its rings, and as much again for what surrounds it.
const STALLED_FLOW_KIB_MAX: f64 = 2_048.0;

/// Of fifty names asked for where 2 % of the packets are lost: a resolver may give up on a query that
/// was lost over and over.
const NAMES_MIN: f64 = 48.0;

/// One address of `outside` for each family.
const BOTH: &str = "198.51.100.2 2001:db8:1::2";

fn world() -> World {
    let world = World::new().limit(Duration::from_secs(100));
    world
        .temp()
        .file("peer_faults.py", include_str!("peer_faults.py"));
    world
}

fn run(world: &World, text: &str) -> Option<Outcome> {
    const FUNCTIONS: &str = r#"
faulty() { python3 peer_faults.py "$@"; }
guest_faulty() { lanlet exec --name default -- python3 peer_faults.py "$@"; }
rss() { awk '/^VmRSS/ {print $2}' /proc/$NETWORK/status; }
# What is left of all flows, once it is nothing.
say_left() {
    until_true 25 status_is "sum(n for of, n in s['flows'].items() if of != 'tcp_memory_max') + s['totals']['host_sockets']" 0
    say left="$(status_of "sum(n for of, n in s['flows'].items() if of != 'tcp_memory_max') + s['totals']['host_sockets']")"
}
"#;
    scenario(world, &format!("{FUNCTIONS}{text}").replace("BOTH", BOTH)).map(Outcome::passed)
}

/// Servers that stop reading, and then go on; and guests that do.
#[test]
fn who_stalls_holds_little_and_loses_nothing() {
    let _alone = heavy();
    let Some(outcome) = run(
        &world(),
        r#"
        head -c 12000017 /dev/urandom >data
        say data="$(sha <data)"
        network
        outside python3 peer_faults.py serve_file 7003 data &
        listening tcp 7003 outside
        for address in BOTH; do
            rm -f go
            outside python3 peer_faults.py serve_faulty 7001 stall 10 >server &
            server=$!
            listening tcp 7001 outside
            before=$(rss)
            guest_faulty send_file $address 7001 data 10 >client &
            client=$!
            guest_faulty read_file $address 7003 10 first go >reader &
            reader=$!
            until_true 10 status_is "s['flows']['tcp']" 20
            sleep 3
            say flows="$(status_of "s['flows']['tcp']")" held=$(($(rss) - before))
            # Another flow does not notice.
            say other="$(lanlet exec --name default -- sh -c "python3 peer_faults.py read_file $address 7003" | sed 's/.*=//')"
            touch go
            wait $client $reader $server
            cat client reader server
        done
        say_left
        say drops="$(drops)"
        "#,
    ) else {
        return;
    };
    let markers = outcome.markers();
    let data = markers.get("data").expect("a checksum");
    assert_eq!(markers.all("flows"), ["20"; 2], "{}", outcome.text());
    assert_eq!(markers.all("other"), [data; 2], "{}", outcome.text());
    for key in ["sent", "arrived", "got"] {
        assert_eq!(
            markers.all(key),
            vec![data; 20],
            "{key}: {}",
            outcome.text()
        );
    }
    for held in markers.all("held") {
        let held: f64 = held.parse().expect("a number");
        assert!(held <= 20.0 * STALLED_FLOW_KIB_MAX, "{}", outcome.text());
    }
    assert_said(&outcome, &[("left", "0"), ("drops", "none")]);
}

#[test]
fn servers_that_reset_or_end_their_half() {
    let Some(outcome) = run(
        &world(),
        r#"
        head -c 9000001 /dev/urandom >data
        say data="$(sha <data)"
        network
        for address in BOTH; do
            for how in reset half; do
                outside python3 peer_faults.py serve_faulty 7001 $how 5 >server &
                server=$!
                listening tcp 7001 outside
                # What a guest's kernel still holds when it ends goes with it: this one stays.
                lanlet exec --name default -- sh -c "python3 peer_faults.py send_file $address 7001 data 5
                    until [ -e ended.$how.$address ]; do sleep 0.02; done" | sed "s/sent=/$how=/" &
                wait $server
                touch ended.$how.$address
                wait $!
                cat server
            done
        done
        say_left
        "#,
    ) else {
        return;
    };
    let markers = outcome.markers();
    let data = markers.get("data").expect("a checksum");
    assert!(
        markers.all("reset").len() == 10
            && markers
                .all("reset")
                .iter()
                .all(|e| e == "ECONNRESET" || e == "EPIPE"),
        "{}",
        outcome.text()
    );
    assert_eq!(markers.all("half"), [data; 10], "{}", outcome.text());
    assert_eq!(markers.all("arrived"), [data; 10], "{}", outcome.text());
    assert_said(&outcome, &[("left", "0")]);
}

/// A server that vanishes in the middle of a transfer, without a word: first its network, then the
/// server itself. When the network is back nobody there knows the flow, and the guest is told so.
/// A flow that outlives a silence of the network goes on where it stopped.
#[test]
fn a_server_that_vanishes() {
    let Some(outcome) = run(
        &world(),
        r#"
        head -c 60000007 /dev/urandom >data
        say data="$(sha <data)"
        network
        for address in BOTH; do
            rm -f go
            nsenter --net=/run/netns/outside -- python3 peer_faults.py serve_faulty 7001 stall >server &
            server=$!
            outside python3 peer_faults.py serve_faulty 7002 stall >other &
            other=$!
            listening tcp 7001 outside; listening tcp 7002 outside
            guest_faulty send_file $address 7001 data >client &
            client=$!
            guest_faulty send_file $address 7002 data >survivor &
            survivor=$!
            until_true 10 status_is "s['flows']['tcp']" 2
            sleep 0.5
            outside nft 'add table inet gone { chain input { type filter hook input priority 0; tcp dport 7001-7002 drop; }; chain output { type filter hook output priority 0; tcp sport 7001-7002 drop; }; }'
            touch go
            kill -KILL $server
            sleep 1
            start=$(date +%s%N)
            outside nft delete table inet gone
            wait $client
            say heard_ms=$((($(date +%s%N) - start) / 1000000))
            wait $survivor $other
            sed 's/sent=/gone=/' client
            cat survivor other
        done
        say_left
        "#,
    ) else {
        return;
    };
    let markers = outcome.markers();
    let data = markers.get("data").expect("a checksum");
    assert_eq!(markers.all("gone"), ["ECONNRESET"; 2], "{}", outcome.text());
    for heard in markers.all("heard_ms") {
        let secs = heard.parse::<f64>().expect("a number") / 1e3;
        assert!(secs < HEARD_SECS, "{}", outcome.text());
    }
    assert_eq!(markers.all("sent"), [data; 2], "{}", outcome.text());
    assert_eq!(markers.all("arrived"), [data; 2], "{}", outcome.text());
    assert_said(&outcome, &[("left", "0")]);
}

/// Packets lost on the uplink are the host's business: what guests get is whole.
#[test]
fn a_lossy_uplink_loses_nothing() {
    let Some(outcome) = run(
        &world().with(&["--loss", "2", "--delay", "5", "--dns"]),
        r#"
        head -c 3000017 /dev/urandom >data
        say data="$(sha <data)"
        network
        outside python3 peer_faults.py serve_file 7003 data &
        touch go
        outside python3 peer_faults.py serve_faulty 7001 stall 16 &
        server=$!
        listening tcp 7001 outside; listening tcp 7003 outside
        for address in BOTH; do
            guest_faulty read_file $address 7003 8 &
            guest_faulty send_file $address 7001 data 8
            wait $!
        done
        wait $server
        # The resolver asks again.
        lanlet exec --name default -- sh -c 'for _ in $(seq 50); do dig +short second.test; done' >names
        say names="$(grep -cx 203.0.113.1 names)"
        say_left
        "#,
    ) else {
        return;
    };
    let markers = outcome.markers();
    let data = markers.get("data").expect("a checksum");
    for key in ["got", "sent", "arrived"] {
        assert_eq!(
            markers.all(key),
            vec![data; 16],
            "{key}: {}",
            outcome.text()
        );
    }
    assert!(markers.number("names") >= NAMES_MIN, "{}", outcome.text());
    assert_said(&outcome, &[("left", "0")]);
}

/// The host moves to another network: flows from the address that it lost end with a reset, datagrams
/// go on from the other one, and what is opened from then on works at once.
#[test]
fn the_uplinks_address_changes() {
    for address in BOTH.split(' ') {
        let Some(outcome) = run(
            &world().with(&["--dns"]),
            &r#"
            # The file may be about to be written.
            answers_udp() { until grep . answers.udp; do :; done; }
            network
            outside python3 peer.py serve_udp_echo 7002 &
            outside python3 peer.py serve_echo 7001 &
            listening tcp 7001 outside; listening udp 7002 outside
            guest_faulty trickle ADDRESS 7001 tcp >tcp &
            tcp=$!
            guest_faulty trickle ADDRESS 7002 udp >udp &
            udp=$!
            wait_for answers.tcp '[5-9]'; wait_for answers.udp '[5-9]'
            "$LAB/readdress" 198.51.100.7 2001:db8:1::7
            start=$(date +%s%N)
            step new lanlet exec --name default -- sh -c "echo hello | nc -N -w 3 ADDRESS 7001 | grep -q hello"
            step name lanlet exec --name default -- sh -c 'dig +time=2 +tries=1 outside.test | grep -q 198.51.100.2'
            say new_ms=$((($(date +%s%N) - start) / 1000000))
            wait $tcp
            say heard_ms=$((($(date +%s%N) - start) / 1000000))
            before=$(answers_udp)
            on() { [ "$(answers_udp)" -gt $((before + 3)) ]; }
            until_true 10 on && say on=yes
            touch enough
            wait $udp
            cat tcp udp
            until_true 10 status_is "s['flows']['tcp']" 0
            say left="$(status_of "s['flows']['tcp']")"
            "#
            .replace("ADDRESS", address),
        ) else {
            return;
        };
        let markers = outcome.markers();
        markers.passed(&["new", "name"]);
        assert_said(
            &outcome,
            &[
                ("tcp_ended", "ECONNRESET"),
                ("udp_ended", "enough"),
                ("on", "yes"),
                ("left", "0"),
            ],
        );
        assert!(
            markers.number("heard_ms") / 1e3 < HEARD_SECS,
            "{}",
            outcome.text()
        );
    }
}

/// The machine sleeps in the middle of transfers, and wakes up: for lanlet, time has jumped.
#[test]
fn suspend_and_resume() {
    let Some(outcome) = run(
        &world(),
        r#"
        head -c 40000003 /dev/urandom >data
        say data="$(sha <data)"
        network
        outside python3 peer_faults.py serve_file 7003 data &
        touch go
        outside python3 peer_faults.py serve_faulty 7001 stall 2 &
        server=$!
        listening tcp 7001 outside; listening tcp 7003 outside
        for address in BOTH; do
            guest_faulty send_file $address 7001 data &
            one=$!
            guest_faulty read_file $address 7003 &
            two=$!
            until_true 10 status_is "s['flows']['tcp']" 2
            kill -STOP $NETWORK
            sleep 4
            kill -CONT $NETWORK
            wait $one $two
        done
        wait $server
        say_left
        "#,
    ) else {
        return;
    };
    let markers = outcome.markers();
    let data = markers.get("data").expect("a checksum");
    for key in ["got", "sent", "arrived"] {
        assert_eq!(markers.all(key), vec![data; 2], "{key}: {}", outcome.text());
    }
    assert_said(&outcome, &[("left", "0")]);
}

/// The host's files run out: connections beyond have to wait, those that are open work,
/// the network can still be asked, it says so once, and when files are free again all is well.
#[test]
fn the_hosts_files_run_out() {
    let Some(outcome) = run(
        &world().with(&["--dns"]),
        r#"
        # Hard, so that lanlet can't help itself.
        "$LAB/as-user" bash -c 'ulimit -n 120; exec "$0" up' "$LANLET" >up.log 2>&1 &
        NETWORK=$!
        until_true 5 lanlet status
        outside python3 peer.py serve_echo 7001 &
        listening tcp 7001 outside
        for address in BOTH; do
            rm -f close
            "$LAB/as-user" "$LANLET" exec --name default -- python3 peer_faults.py crowd_of_flows $address 7001 300 >crowd 2>&1 &
            guest=$!
            wait_for crowd open= 60
            cat crowd
            say alive="$(lanlet status --json >/dev/null && echo yes)"
            touch close
            wait_for crowd closed
            until_true 10 status_is "s['flows']['tcp']" 0
            # Another guest is served, and so is a name.
            step after lanlet exec --name default -- sh -c "echo hello | nc -N -w 3 $address 7001 | grep -q hello"
            step name lanlet exec --name default -- sh -c 'dig +time=2 +tries=1 outside.test | grep -q 198.51.100.2'
            kill -KILL $guest
        done
        say warned="$(grep -ciE 'open files|file descriptors|EMFILE' up.log)"
        say_left
        "#,
    ) else {
        return;
    };
    let markers = outcome.markers();
    assert_eq!(markers.all("alive"), ["yes"; 2], "{}", outcome.text());
    assert_eq!(markers.all("after"), ["0"; 2], "{}", outcome.text());
    assert_eq!(markers.all("name"), ["0"; 2], "{}", outcome.text());
    for ((open, right), refused) in markers
        .all("open")
        .iter()
        .zip(markers.all("right"))
        .zip(markers.all("refused"))
    {
        let number = |text: &String| text.parse::<u32>().expect("a number");
        assert!(
            number(open) >= 50 && number(refused) >= 150 && open == right,
            "{}",
            outcome.text()
        );
        assert_eq!(number(open) + number(refused), 300, "{}", outcome.text());
    }
    // Nobody is told that the server refuses: their SYNs are dropped, and come again.
    assert_eq!(markers.all("how"), ["unanswered"; 2], "{}", outcome.text());
    assert_said(&outcome, &[("warned", "1"), ("left", "0")]);
}
