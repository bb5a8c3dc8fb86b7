//! Forwards with real clients and servers: curl, socat, nc and Python peers, on the host, outside it and
//! in guests.

use crate::common::World;
use crate::{assert_said, scenario};

/// For the scenarios: guests that stay, each in the background with its address in NAME.address until
/// NAME.over exists: guest NAME COMMANDS [OPTION of lanlet exec...]. What they say is in NAME.log.
/// served NAME: makes a directory with a page that says NAME. get URL: the page, or curl's status. busybox
/// httpd lets nine connections wait; where more come while it is held up, TCP tries again after 1, 3, 7 and
/// 15 s.
pub const PRELUDE: &str = r#"
guest() {
    local name=$1 commands=$2
    shift 2
    "$LAB/as-user" "$LANLET" exec ${WHICH_NETWORK:---name default} "$@" -- bash -c "
        ip -4 -o address show dev eth0 | awk '{sub(\"/.*\", \"\", \$4); print \$4}' >$name.address
        ip -6 -o address show dev eth0 scope global | awk '{sub(\"/.*\", \"\", \$4); print \$4}' >$name.address6
        $commands
        echo >$name.ready
        until [ -e $name.over ]; do sleep 0.05; done" >$name.log 2>&1 &
    until [ -e "$name.ready" ]; do
        kill -0 $! 2>/dev/null || fail "$name: $(cat "$name.log")"
        sleep 0.02
    done
}
served() { mkdir -p "$1.www" && echo "$1" >"$1.www/index.html" && chmod -R a+rX "$1.www"; }
get() { curl -s --max-time 30 "$@" || echo "curl=$?"; }
http() { echo "busybox httpd -p $2 -h $1.www"; }
"#;

#[test]
fn clients_of_the_host_reach_a_guest() {
    let Some(outcome) = scenario(
        &World::new(),
        &format!(
            "{PRELUDE}{}",
            r#"
            served web; served alt
            network
            guest web "$(http web 80); $(http alt 81); python3 peer.py serve_udp_echo 7002 & sleep 0.3" \
                -p 127.0.0.1:8080:80 -p 8081-8082:80-81 --hostfwd tcp:127.0.0.1:8083-:81 -p 7002:7002/udp
            web=$(cat web.address)
            say docker=$(get http://127.0.0.1:8080/) first=$(get http://127.0.0.1:8081/) second=$(get http://127.0.0.1:8082/)
            say hostfwd=$(get http://127.0.0.1:8083/) v6=$(get -g 'http://[::1]:8082/')
            say outside=$(outside curl -s --max-time 10 http://198.51.100.1:8081/)
            say not_there=$(outside curl -s --max-time 10 http://198.51.100.1:8080/ || echo $?)
            say outside6=$(outside curl -gs --max-time 10 'http://[2001:db8:1::1]:8081/')
            # From each of the host's addresses the answer comes from where it was asked.
            ip address add 198.51.100.77/24 dev up0
            python3 peer.py udp_sizes 127.0.0.1 7002 0 1 1472 9000
            outside python3 peer.py udp_sizes 198.51.100.77 7002 0 1 1472 9000
            say opened=$(status_of "sum(f['opened'] for f in s['forwards'])") refused=$(status_of "sum(f['refused'] for f in s['forwards'])")
            # Many at once.
            (for i in $(seq 100); do get http://127.0.0.1:8081/ >got.$i & done; wait)
            say together=$(cat got.* | grep -c '^web$')
            touch web.over
            until_true 10 status_is "len(s['ports'])" 1
            say left="$(status_of "len(s['forwards'])")" closed="$(get http://127.0.0.1:8080/)"
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_said(
        &outcome,
        &[
            ("docker", "web"),
            ("first", "web"),
            ("second", "alt"),
            ("hostfwd", "alt"),
            ("v6", "alt"),
            ("outside", "web"),
            // CURLE_COULDNT_CONNECT: it listens on loopback only.
            ("not_there", "7"),
            ("outside6", "web"),
            ("refused", "0"),
            ("together", "100"),
            ("left", "0"),
            ("closed", "curl=7"),
        ],
    );
    let markers = outcome.markers();
    assert_eq!(
        markers.all("sizes"),
        ["0,1,1472,9000", "0,1,1472,9000"],
        "{}",
        outcome.text()
    );
    // Seven connections and two exchanges.
    assert_eq!(markers.get("opened"), Some("9"), "{}", outcome.text());
}

#[test]
fn forwards_come_and_go_while_the_network_runs() {
    let Some(outcome) = scenario(
        &World::new(),
        &format!(
            "{PRELUDE}{}",
            r#"
            served web
            network
            guest web "$(http web 80); socat TCP-LISTEN:91,fork,reuseaddr EXEC:cat & sleep 0.3"
            web=$(cat web.address)
            say added="$(lanlet forward add "127.0.0.1:9090:$web:80,name=site" "127.0.0.1:9091:$web:91" | tr ' \n' '_;')"
            say got=$(get http://127.0.0.1:9090/)
            say listed=$(lanlet forward list | wc -l) json=$(lanlet forward list --json | python3 -c 'import json, sys; print(",".join(f["forward"] for f in json.load(sys.stdin)))')
            # A connection outlives its forward.
            mkfifo in; socat - TCP:127.0.0.1:9091 <in >out & exec 3>in
            echo before >&3; wait_for out before 10
            lanlet forward remove site 2; say removed=$?
            echo after >&3; wait_for out after 10; say survived=$?
            exec 3>&-
            say gone=$(get http://127.0.0.1:9090/)
            # The port is free at once.
            lanlet forward add "127.0.0.1:9090:$web:80" >/dev/null; say again=$(get http://127.0.0.1:9090/)
            # A host's port: one that it chooses.
            lanlet forward add "127.0.0.1:0:$web:80" >chosen
            say chosen=$(get "http://$(sed 's/.*: \(127.0.0.1:[0-9]*\):.*/\1/' chosen)/")
            say unknown="$(lanlet forward remove nope 2>&1 | tr ' ' _)"
            # All or nothing.
            lanlet forward add "127.0.0.1:9095:$web:80" "127.0.0.1:9090:$web:80" 2>twice; say twice=$?
            say why="$(tr ' ' _ <twice)" half=$(get http://127.0.0.1:9095/)
            lanlet forward add "8080:10.1.1.1:80" 2>foreign; say foreign=$?
            say foreign_why="$(tr ' ' _ <foreign)"
            lanlet forward add "80:80:80:80:80" 2>/dev/null; say nonsense=$?
            touch web.over
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_said(
        &outcome,
        &[
            ("got", "web"),
            ("listed", "3"),
            ("removed", "0"),
            ("survived", "0"),
            ("gone", "curl=7"),
            ("again", "web"),
            ("chosen", "web"),
            ("twice", "1"),
            ("half", "curl=7"),
            ("foreign", "1"),
            ("nonsense", "2"),
        ],
    );
    let markers = outcome.markers();
    let said = |key: &str, part: &str| {
        let value = markers.get(key).unwrap_or_default();
        assert!(value.contains(part), "{key}: {}", outcome.text());
    };
    said("added", "forward_1:_127.0.0.1:9090:");
    said("json", ":80/tcp,name=site,127.0.0.1:9091:");
    said("unknown", "no_forward_\"nope\"");
    said("why", "taken_by_forward_3");
    said("foreign_why", "10.1.1.1_is_no_address_of_a_guest");
}

#[test]
fn a_port_in_use_names_who_has_it() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        # In one user namespace, or the owner could not be looked at.
        cat >go.sh <<'END'
        nc -lk 127.0.0.1 9091 & other=$!
        until ss -Hltn 'sport = :9091' | grep -q .; do sleep 0.02; done
        "$LANLET" up -p 127.0.0.1:9091:192.168.122.9:80 2>refused; echo "@@LANLET status=$?"
        grep -c "127.0.0.1:9091/tcp: already in use by nc (pid $other)" refused | sed 's/^/@@LANLET named=/'
        "$LANLET" exec -p 9090:80 -p 9091:81 -- true 2>refused_exec; echo "@@LANLET exec=$?"
        grep -c "already in use by nc" refused_exec | sed 's/^/@@LANLET exec_named=/'
        "$LANLET" exec -p 80:80 -- true 2>privileged; echo "@@LANLET privileged=$?"
        grep -c "ports below 1024 are for root" privileged | sed 's/^/@@LANLET privileged_named=/'
        kill $other
END
        user bash go.sh
        "#,
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("status", "1"),
            ("named", "1"),
            ("exec", "1"),
            ("exec_named", "1"),
            ("privileged", "1"),
            ("privileged_named", "1"),
        ],
    );
}

#[test]
fn the_guest_sees_the_gateway_or_the_client() {
    let Some(outcome) = scenario(
        &World::new(),
        &format!(
            "{PRELUDE}{}",
            r#"
            network
            # socat's UDP-RECVFROM,fork answers none at times.
            cat >seen.py <<'END'
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("", 90))
while True:
    _, (address, port) = server.recvfrom(100)
    server.sendto(f"{address} {port}\n".encode(), (address, port))
END
            chmod a+r seen.py
            guest web "socat TCP-LISTEN:90,fork,reuseaddr SYSTEM:'echo \$SOCAT_PEERADDR \$SOCAT_PEERPORT' &
                python3 seen.py &
                until ss -ltn | grep -q ':90 ' && ss -lun | grep -q ':90 '; do sleep 0.05; done"
            web=$(cat web.address)
            lanlet forward add 9000:$web:90 9001:$web:90,client-address 9000:$web:90/udp 9001:$web:90/udp,client-address >/dev/null
            ask() { outside socat -T 3 -t 3 - "$@" </dev/null; }
            say gateway="$(ask TCP:198.51.100.1:9000,sourceport=5555 | tr ' ' :)"
            say client="$(ask TCP:198.51.100.1:9001,sourceport=5556 | tr ' ' :)"
            asku() { echo | outside timeout 8 socat -t 4 - "$@"; }
            say udp_gateway="$(asku UDP:198.51.100.1:9000,sourceport=5557 | tr ' ' :)"
            say udp_client="$(asku UDP:198.51.100.1:9001,sourceport=5558 | tr ' ' :)"
            # The host itself, by loopback, has no address that a guest could answer to.
            say loopback="$(socat -T 3 - TCP:127.0.0.1:9001,sourceport=5559 </dev/null | tr ' ' :)"
            touch web.over
            "#
        ),
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("gateway", "192.168.122.1:5555"),
            ("client", "198.51.100.2:5556"),
            ("udp_gateway", "192.168.122.1:5557"),
            ("udp_client", "198.51.100.2:5558"),
            ("loopback", "192.168.122.1:5559"),
        ],
    );
}

#[test]
fn a_guest_reaches_another_through_the_hosts_address() {
    let Some(outcome) = scenario(
        &World::new(),
        &format!(
            "{PRELUDE}{}",
            r#"
            served web
            network
            guest web "$(http web 80); python3 peer.py serve_udp_echo 7002 & sleep 0.3" -p 8080:80 -p 7002:7002/udp
            nc -lk 198.51.100.1 8099 >/dev/null & other=$!
            lanlet exec --name default -- sh -c '
                echo "@@LANLET hairpin=$(curl -s --max-time 10 http://198.51.100.1:8080/)"
                python3 peer.py udp_sizes 198.51.100.1 7002 0 1 1472
                curl -s --max-time 10 http://198.51.100.1:8099/; echo "@@LANLET own=$?"'
            kill $other
            touch web.over
            "#
        ),
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[("hairpin", "web"), ("sizes", "0,1,1472"), ("own", "7")],
    );
}

#[test]
fn unix_sockets_lead_in_and_out() {
    let Some(outcome) = scenario(
        &World::new(),
        &format!(
            "{PRELUDE}{}",
            r#"
            served web
            head -c 3000000 /dev/urandom >data; chmod a+r data
            user socat UNIX-LISTEN:$TMP/db.sock,fork EXEC:cat & server=$!
            until_true 5 test -S db.sock
            network
            guest web "$(http web 80)" --hostfwd unix:$TMP/web.sock-:80 \
                --guestfwd tcp::5432-unix:$TMP/db.sock --guestfwd tcp:10.99.0.1:80-unix:$TMP/db.sock \
                --guestfwd tcp::5433-unix:$TMP/none.sock
            say unix=$(get --unix-socket $TMP/web.sock http://web/) mode=$(stat -c %a web.sock)
            say data="$(sha <data)"
            cat >ask.sh <<'END'
            say() { echo "@@LANLET $*"; }
            say gateway="$(socat -t 5 - TCP:192.168.122.1:5432 <data | sha256sum | cut -c1-32)"
            say beyond="$(echo hello | socat -t 5 - TCP:10.99.0.1:80)"
            socat - TCP:192.168.122.1:5433 </dev/null 2>error; say none="$(grep -o 'Connection refused' error | tr ' ' _)"
            socat - TCP:10.99.0.1:81,connect-timeout=2 </dev/null 2>/dev/null; say other=$?
END
            lanlet exec --name default -- bash ask.sh
            touch web.over
            until_true 10 status_is "len(s['ports'])" 1
            say file="$(test -e web.sock && echo there || echo gone)"
            kill $server
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let data = markers.get("data").expect("a checksum");
    assert_said(
        &outcome,
        &[
            ("unix", "web"),
            ("mode", "600"),
            ("gateway", data),
            ("beyond", "hello"),
            ("none", "Connection_refused"),
            ("other", "1"),
            ("file", "gone"),
        ],
    );
}

#[test]
fn a_name_follows_the_lease() {
    let Some(outcome) = scenario(
        &World::new(),
        &format!(
            "{PRELUDE}{}",
            r#"
            served one; served two; served three
            network --lease-file none
            lanlet forward add 127.0.0.1:8200:shop:80 >/dev/null
            # Nobody is called so: a reset after some seconds.
            say nobody=$(get http://127.0.0.1:8200/)
            named() { echo "busybox udhcpc -i eth0 -n -q -t 5 -T 1 -s /bin/true -x hostname:$1 2>/dev/null"; }
            guest one "$(http one 80); $(named shop)"
            say one=$(get http://127.0.0.1:8200/)
            touch one.over
            until_true 10 status_is "len(s['ports'])" 1
            # A client that comes before its guest waits.
            get http://127.0.0.1:8200/ >early & early=$!
            guest two "$(http two 80); $(named SHOP)"
            wait $early; say early=$(cat early) two=$(get http://127.0.0.1:8200/)
            # Who claims the name of another gets nothing.
            guest three "$(http three 80); $(named shop)"
            say still=$(get http://127.0.0.1:8200/)
            say moved=$(test $(cat one.address) = $(cat two.address) && echo no || echo yes)
            # The name that lanlet was told.
            guest four "$(http one 80)" --guest-name db -p 127.0.0.1:8201:db:80
            say named=$(get http://127.0.0.1:8201/)
            touch two.over three.over four.over
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_said(
        &outcome,
        &[
            // CURLE_RECV_ERROR: a reset.
            ("nobody", "curl=56"),
            ("one", "one"),
            ("early", "two"),
            ("two", "two"),
            ("still", "two"),
            ("moved", "yes"),
            ("named", "one"),
        ],
    );
}

#[test]
fn a_command_with_a_network_of_its_own_and_ipv6_guests() {
    let Some(outcome) = scenario(
        &World::new(),
        &format!(
            "{PRELUDE}{}",
            r#"
            served web
            WHICH_NETWORK=--private guest web "$(http web 80)" -p 127.0.0.1:8300:80
            say own=$(get http://127.0.0.1:8300/)
            touch web.over; wait
            say ended=$(get http://127.0.0.1:8300/)
            network
            rm -f web.over web.ready
            guest web "$(http web 80)"
            web6=$(cat web.address6)
            lanlet forward add "8301:[$web6]:80" "8302:[$web6]:80,client-address" >/dev/null
            say four_to_six=$(get http://127.0.0.1:8301/) six_to_six=$(get -g 'http://[::1]:8301/')
            say client=$(outside curl -gs --max-time 10 'http://[2001:db8:1::1]:8302/')
            touch web.over
            "#
        ),
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("own", "web"),
            ("ended", "curl=7"),
            ("four_to_six", "web"),
            ("six_to_six", "web"),
            ("client", "web"),
        ],
    );
}
