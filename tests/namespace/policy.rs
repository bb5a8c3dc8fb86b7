//! The egress policy, and what guests try to get around it.
//!
//! The world has `www.example.test` (203.0.113.1, 2001:db8:2::1) and other names for these and for
//! inside addresses; everything that the policy has to keep from guests is there and answers the host.

use crate::common::{Outcome, World};
use crate::{assert_said, scenario};

/// What the allowed names lead to.
const NAMES: &str = "\
203.0.113.1 www.example.test
2001:db8:2::1 www.example.test
203.0.113.1 direct.example.test
198.51.100.2 fragments.example.test
10.7.7.7 inside.example.test
198.51.100.1 host.example.test
127.0.0.1 loopback.example.test
192.168.122.1 gateway.example.test
::ffff:10.7.7.7 mapped.example.test
169.254.169.254 metadata.example.test
203.0.113.1 example.test
";

/// Only names below example.test, and nothing else.
const ONLY: &str = "\
allow to *.example.test   # and not example.test itself
default deny
";

/// In the guest: whether a page can be had, by curl's exit status (0 had it, 6 no such name, 7 could not
/// connect, 28 no answer), and a query's status or answers.
const GUEST: &str = r#"
say() { echo "@@LANLET $*"; }
get() { curl -s -o /dev/null --connect-timeout 3 -m 5 "$@"; echo $?; }
status() { dig +time=1 +tries=1 "$@" | grep -o 'status: [A-Z]*' | cut -d' ' -f2; }
answers() { dig +short +time=1 +tries=1 "$@" | grep -v '^;' | sort | paste -sd, -; }
connects() { python3 peer.py try_connect $1 $2 2 | grep -o 'result=[^ ]*' | cut -d= -f2; }
"#;

/// Runs a scenario with a network under [`ONLY`] and a guest that runs `try.sh`.
fn held_to_names(before: &str, guest: &str, after: &str) -> Option<Outcome> {
    let world = World::new();
    let pages = world.temp().path().to_owned();
    let world = world.with(&["--http", &pages.to_string_lossy(), "--dns", "--ping"]);
    world.temp().file("names", NAMES);
    world.temp().file("only.policy", ONLY);
    world.temp().file("try.sh", format!("{GUEST}\n{guest}"));
    let script = format!(
        r#"
        echo page >index.html
        cp names /run/dns.d/names
        until_true 5 sh -c 'dig +short www.example.test | grep -q 203.0.113.1' || fail "no names"
        {before}
        network --policy only.policy
        lanlet exec --name default --guest-name web -- bash try.sh
        {after}
        "#
    );
    Some(scenario(&world, &script)?.passed())
}

#[test]
fn allowed_names_are_reached_and_literal_addresses_are_not() {
    let guest = r#"
        say literal_before=$(get http://203.0.113.1/) gateway_ping="$(ping -c 1 -W 1 192.168.122.1 >/dev/null; echo $?)"
        say name=$(get http://www.example.test/) name6=$(get -6 http://www.example.test/)
        say ping="$(ping -4 -n -c 1 -W 1 www.example.test >/dev/null; echo $?)"
        # What a name leads to, it leads to however it is written.
        say literal_after=$(get http://203.0.113.1/)
        say other=$(get http://198.51.100.2/) other_ping="$(ping -c 1 -W 1 198.51.100.2 >/dev/null; echo $?)"
        say parent=$(get http://example.test/) sibling=$(get http://outside.test/)
        say udp="$(python3 peer.py udp_sizes 198.51.100.2 53 40 | grep -o 'sizes=.*' | cut -d= -f2)"
    "#;
    let after = r#"
        lanlet status
        say flows="$(status_of "s['policy']['rules'][0]['flows'] > 3")"
        say queries="$(status_of "s['policy']['rules'][0]['queries'] >= 4")"
        say refused="$(status_of "s['policy']['default_queries'] >= 2")"
        say denied="$(status_of "any(d['guest'] == 'web' and d['to'] == '198.51.100.2' and d['protocol'] == 'tcp' for d in s['policy']['denied'])")"
        say names="$(status_of "','.join(sorted({d['name'] for d in s['policy']['denied'] if d['protocol'] == 'dns'}))")"
        # Nobody outside has heard of what was refused.
        say leaked="$(grep -c 'query.* \(example\|outside\).test ' /run/dns.log)"
    "#;
    let Some(outcome) = held_to_names("", guest, after) else {
        return;
    };
    assert_said(
        &outcome,
        &[
            ("literal_before", "7"),
            ("gateway_ping", "0"),
            ("name", "0"),
            ("name6", "0"),
            ("ping", "0"),
            ("literal_after", "0"),
            ("other", "7"),
            ("other_ping", "1"),
            ("parent", "6"),
            ("sibling", "6"),
            ("udp", "EHOSTUNREACH"),
            ("flows", "True"),
            ("queries", "True"),
            ("refused", "True"),
            ("denied", "True"),
            ("names", "example.test,outside.test"),
            ("leaked", "0"),
        ],
    );
}

#[test]
fn another_resolver_is_not_reached() {
    let before = r#"
        outside python3 peer.py serve_echo 853 &
        listening tcp 853 outside
        # All of it is there.
        say host_own="$(dig +short @203.0.113.1 beyond.test)" host_dot="$(python3 peer.py try_connect 203.0.113.1 853 | grep -o connected)"
    "#;
    let guest = r#"
        say gateway=$(answers www.example.test) gateway_refuses=$(status outside.test)
        say gateway_tcp=$(answers +tcp www.example.test) gateway_refuses_tcp=$(status +tcp outside.test)
        say gateway6=$(status @fe80::%eth0 www.example.test)
        # 203.0.113.1 is what an allowed name leads to, so the address alone is no obstacle.
        say own=$(status @203.0.113.1 www.example.test) own_tcp=$(status +tcp @203.0.113.1 www.example.test)
        say own6=$(status @2001:db8:2::1 www.example.test) third=$(status @198.51.100.2 www.example.test)
        say dot=$(connects 203.0.113.1 853) dns=$(connects 203.0.113.1 53) http=$(get http://203.0.113.1/)
        say dot6=$(connects 2001:db8:2::1 853)
    "#;
    let after = r#"
        say resolver="$(status_of "s['policy']['resolver'] > 3")" denied_tcp="$(status_of "s['totals']['dns_names_denied']")"
    "#;
    let Some(outcome) = held_to_names(before, guest, after) else {
        return;
    };
    assert_said(
        &outcome,
        &[
            ("host_own", "203.0.113.130"),
            ("host_dot", "connected"),
            ("gateway", "203.0.113.1"),
            ("gateway_refuses", "REFUSED"),
            ("gateway_tcp", "203.0.113.1"),
            ("gateway_refuses_tcp", "REFUSED"),
            ("own", ""),
            ("own_tcp", ""),
            ("own6", ""),
            ("third", ""),
            ("dot", "EHOSTUNREACH"),
            ("dns", "EHOSTUNREACH"),
            ("http", "0"),
            ("resolver", "True"),
            ("denied_tcp", "1"),
        ],
    );
    assert_ne!(outcome.markers().get("dot6"), Some("connected"));
}

#[test]
fn a_query_over_tcp_opens_what_it_answers() {
    let guest = r#"
        say before=$(get http://203.0.113.1/) asked=$(answers +tcp www.example.test) after=$(get http://203.0.113.1/)
    "#;
    let Some(outcome) = held_to_names("", guest, "") else {
        return;
    };
    assert_said(
        &outcome,
        &[("before", "7"), ("asked", "203.0.113.1"), ("after", "0")],
    );
}

#[test]
fn ipv6_is_no_way_around() {
    let guest = r#"
        say literal=$(get 'http://[2001:db8:2::1]/') other=$(get 'http://[2001:db8:1::2]/')
        # NAT64 and a mapped address, as a guest may route them to the gateway.
        say nat64=$(get 'http://[64:ff9b::c633:6402]/') mapped=$(get 'http://[::ffff:198.51.100.2]/')
        say asked=$(answers www.example.test AAAA) named=$(get 'http://[2001:db8:2::1]/')
        # The other family's address of the same name was not asked for.
        say four=$(get http://203.0.113.1/)
    "#;
    let Some(outcome) = held_to_names(
        r#"say host6="$(curl -s -o /dev/null 'http://[2001:db8:1::2]/'; echo $?)""#,
        guest,
        "",
    ) else {
        return;
    };
    assert_said(
        &outcome,
        &[
            ("host6", "0"),
            ("literal", "7"),
            ("other", "7"),
            ("nat64", "7"),
            ("mapped", "7"),
            ("asked", "2001:db8:2::1"),
            ("named", "0"),
            ("four", "7"),
        ],
    );
}

#[test]
fn fragments_are_judged_whole() {
    // The first fragment of the SYN has its header and no more.
    let guest = r#"
        cat >fragments.py <<'END'
import os, socket, struct, sys
def checksum(data):
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16: total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff
own, to, protocol, port = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
addresses = socket.inet_aton(own) + socket.inet_aton(to)
if protocol == "tcp":
    number, at = socket.IPPROTO_TCP, 16
    body = struct.pack(">HHIIBBHHH", 40000, port, 1, 0, 0x50, 2, 65535, 0, 0) + b"GET / HTTP/1.0\r\n\r\n"
else:
    number, at = socket.IPPROTO_UDP, 6
    data = b"x" * 32
    body = struct.pack(">HHHH", 40000, port, 8 + len(data), 0) + data
pseudo = addresses + struct.pack(">BBH", 0, number, len(body))
body = body[:at] + struct.pack(">H", checksum(pseudo + body)) + body[at + 2:]
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
raw.setsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL, 1)
id = os.getpid() & 0xffff
step = 24 if protocol == "tcp" else 8
for start in range(0, len(body), step):
    piece = body[start:start + step]
    more = 0x2000 if start + step < len(body) else 0
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(piece), id, more | start // 8, 64, number, 0) + addresses
    raw.sendto(header + piece, (to, 0))
END
        own=$(ip -4 -o address show dev eth0 | awk '{sub("/.*", "", $4); print $4}')
        dig +short fragments.example.test >/dev/null
        for to in 198.51.100.2 203.0.113.1; do
            python3 fragments.py $own $to tcp 80
            python3 fragments.py $own $to udp 9
        done
        say sizes="$(python3 peer.py udp_sizes 203.0.113.1 8000 9000 | grep -o 'sizes=.*' | cut -d= -f2)"
        say sizes_named="$(python3 peer.py udp_sizes 198.51.100.2 8000 9000 | grep -o 'sizes=.*' | cut -d= -f2)"
        sleep 0.5
    "#;
    let before = r#"
        outside python3 peer.py serve_udp_echo 8000 &
        listening udp 8000 outside
    "#;
    let after = r#"
        say opened="$(status_of "s['totals']['tcp_opened'] + s['totals']['udp_opened']")"
        say flows="$(status_of "','.join(sorted(d['protocol'] + ' ' + d['to'] + ' ' + str(d['to_port']) for d in s['policy']['denied'] if d['to']))" | tr ' ' _)"
        say allowed="$(status_of "s['policy']['rules'][0]['flows']")"
    "#;
    let Some(outcome) = held_to_names(before, guest, after) else {
        return;
    };
    assert_said(
        &outcome,
        &[
            // One TCP and two UDP flows, to the address that has a name.
            ("opened", "3"),
            ("allowed", "3"),
            (
                "flows",
                "tcp_203.0.113.1_80,udp_203.0.113.1_8000,udp_203.0.113.1_9",
            ),
            ("sizes", "EHOSTUNREACH"),
            ("sizes_named", "9000"),
        ],
    );
}

#[test]
fn a_name_that_leads_inside_opens_nothing() {
    let before = r#"
        ip -netns outside address add 10.7.7.7/32 dev lo
        python3 peer.py serve_echo 80 &
        listening tcp 80 env
        say host_inside="$(curl -s -o /dev/null http://10.7.7.7/; echo $?)"
        say without="$(lanlet exec -- curl -s -o /dev/null http://inside.example.test/; echo $?)"
    "#;
    let guest = r#"
        # The answer itself gets through: split horizons have such names.
        say asked=$(answers inside.example.test)
        for name in inside host loopback gateway mapped metadata; do
            say $name=$(get http://$name.example.test/)
        done
        say asked_twice=$(answers inside.example.test) again=$(get http://10.7.7.7/)
    "#;
    let after = r#"
        say rebinds="$(status_of "s['policy']['rebinds'] > 3")"
        # Whoever wants it says the address.
        printf 'allow to *.example.test,10.7.7.7\ndefault deny\n' >inside.policy
        lanlet policy set inside.policy
        say with_rule="$(lanlet exec --name default -- curl -s -o /dev/null http://inside.example.test/; echo $?)"
    "#;
    let Some(outcome) = held_to_names(before, guest, after) else {
        return;
    };
    assert_said(
        &outcome,
        &[
            ("host_inside", "0"),
            ("without", "0"),
            ("asked", "10.7.7.7"),
            ("inside", "7"),
            ("host", "7"),
            ("loopback", "7"),
            ("gateway", "7"),
            ("mapped", "7"),
            ("metadata", "7"),
            ("again", "7"),
            ("rebinds", "True"),
            ("with_rule", "0"),
        ],
    );
}

#[test]
fn policies_come_and_go_while_guests_talk() {
    let world = World::new();
    let pages = world.temp().path().to_owned();
    let world = world.with(&["--http", &pages.to_string_lossy(), "--dns", "--ping"]);
    let script = r#"
        echo page >index.html
        outside python3 peer.py serve_echo 7000 &
        outside python3 peer.py serve_udp_echo 7001 &
        listening tcp 7000 outside
        listening udp 7001 outside
        network
        cat >talk.py <<'END'
import errno, os, socket, time
def until(path):
    while not os.path.exists(path): time.sleep(0.02)
tcp = [socket.create_connection((to, 7000), 5) for to in ("198.51.100.2", "203.0.113.1")]
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.settimeout(2)
udp.connect(("198.51.100.2", 7001))
def speak(socket):
    try:
        socket.send(b"x")
        return socket.recv(1) == b"x"
    except OSError as error:
        return errno.errorcode.get(error.errno, "timeout")
def say(step): print(f"@@LANLET {step}={speak(tcp[0])},{speak(tcp[1])},{speak(udp)}", flush=True)
say("first")
open("ready", "w"); until("set")
say("then")
tcp[0] = socket.create_connection(("203.0.113.1", 7000), 5)
until("cleared")
tcp[0] = socket.create_connection(("198.51.100.2", 7000), 5)
say("last")
END
        lanlet exec --name default -- python3 talk.py >talk &
        wait_for talk first=
        say show_none="$(lanlet policy show | tail -1 | tr ' ' _)"
        printf '# who may\n allow  to 203.0.113.0/24\n\ndeny silent udp 9\ndefault deny\n' >some.policy
        lanlet policy set some.policy
        until_true 5 status_is "s['flows']['tcp']" 1
        say left="$(status_of "'%d,%d' % (s['flows']['tcp'], s['flows']['udp'])")" revoked="$(status_of "s['totals']['tcp_revoked']")"
        lanlet policy show
        say show="$(lanlet policy show | paste -sd/ - | tr ' ' _)"
        touch set
        wait_for talk then=
        # What is wrong is refused whole, and what is in force stays.
        printf 'allow to any\nallow to 1.2.3.4/33\ndefault allow\n' >bad.policy
        say set_bad="$(lanlet policy set bad.policy 2>bad.log; echo $?)" check_bad="$(lanlet policy check bad.policy 2>/dev/null; echo $?)"
        say check="$(lanlet policy check some.policy | tr ' ' _)" up_bad="$(lanlet up --name other --policy bad.policy 2>/dev/null; echo $?)"
        cat bad.log
        say bad="$(grep -o 'bad.policy: line 2: 1.2.3.4/33: ' bad.log | tr ' ' _)"
        say after_bad="$(lanlet policy show | paste -sd/ - | tr ' ' _)"
        lanlet policy clear
        say cleared="$(status_of "s['policy']")"
        touch cleared
        wait_for talk last=
        cat talk
    "#;
    let Some(outcome) = scenario(&world, script) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("first", "True,True,True"),
            ("show_none", "default_allow"),
            ("left", "1,0"),
            ("revoked", "1"),
            (
                "show",
                "allow_to_203.0.113.0/24/deny_silent_udp_9/default_deny",
            ),
            // A reset, a connection that nobody minds, and a datagram that is answered with ICMP.
            ("then", "ECONNRESET,True,EHOSTUNREACH"),
            ("set_bad", "2"),
            ("check_bad", "2"),
            ("check", "2_rules,_default_deny"),
            ("up_bad", "2"),
            ("bad", "bad.policy:_line_2:_1.2.3.4/33:_"),
            (
                "after_bad",
                "allow_to_203.0.113.0/24/deny_silent_udp_9/default_deny",
            ),
            ("cleared", "None"),
            ("last", "True,True,True"),
        ],
    );
}

#[test]
fn guests_and_groups_have_their_own_rules() {
    let world = World::new();
    let pages = world.temp().path().to_owned();
    let world = world.with(&["--http", &pages.to_string_lossy(), "--dns", "--ping"]);
    world.temp().file("try.sh", GUEST.to_owned() + "for to in 198.51.100.2 203.0.113.1 203.0.113.130; do say $1=$(get http://$to/); done\nsay $1_dns=$(status www.example.test)");
    let script = r#"
        echo page >index.html
        cat >groups.policy <<'END'
deny silent guest port=ci to 203.0.113.1 tcp 80
allow guest port=ci,group=build to 203.0.113.1,198.51.100.2 tcp 80-81
allow guest group=build to any udp
default deny
END
        network --policy groups.policy
        lanlet exec --name default --guest-name ci -- bash try.sh port
        lanlet exec --name default --group build -- bash try.sh group
        lanlet exec --name default --guest-name ci --group build -- bash try.sh both
        lanlet exec --name default -- bash try.sh none
        say bad="$(lanlet exec --name default --group 'a b' -- true 2>/dev/null; echo $?)"
        lanlet status
        say flows="$(status_of "','.join(str(rule['flows']) for rule in s['policy']['rules'])")"
        say silent="$(status_of "sum(p['drops'].get('silently_denied', 0) for p in s['ports']) == 0")"
        say guests="$(status_of "','.join(sorted({d['guest'] or '-' for d in s['policy']['denied']}))")"
        # A network of the command's own has its own policy.
        lanlet exec --policy groups.policy --private --group build -- bash try.sh mine
        say running="$(lanlet exec --name default --policy groups.policy -- true 2>&1 | grep -o -- '--policy is for one that starts' | tr ' ' _)"
    "#;
    let Some(outcome) = scenario(&world, script) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    for (guest, expected) in [
        // A guest's kernel hears nothing where it is silent, and curl gives up.
        ("port", ["0", "28", "7"]),
        ("group", ["0", "0", "7"]),
        ("both", ["0", "28", "7"]),
        ("none", ["7", "7", "7"]),
        ("mine", ["0", "0", "7"]),
    ] {
        assert_eq!(markers.all(guest), expected, "{guest}: {}", outcome.text());
    }
    assert_said(
        &outcome,
        &[
            ("bad", "2"),
            // Addresses are allowed to them, so they may ask; the others have no use for an answer.
            ("port_dns", "NXDOMAIN"),
            ("none_dns", "REFUSED"),
            ("running", "--policy_is_for_one_that_starts"),
        ],
    );
    let flows = markers.get("flows").expect("counters");
    let flows: Vec<u64> = flows.split(',').map(|n| n.parse().unwrap()).collect();
    // Silent: the SYN comes again, and is judged again.
    assert!(flows[0] >= 2, "{flows:?}");
    assert_eq!(flows[1..], [4, 0], "{}", outcome.text());
}

#[test]
fn an_address_that_stands_for_loopback_takes_a_rule() {
    let script = r#"
        python3 peer.py serve_echo 7000 &
        listening tcp 7000 env
        network --map-host-loopback 10.0.2.2
        try() { lanlet exec --name default -- python3 peer.py try_connect 10.0.2.2 7000 2 | grep -o 'result=[^ ]*' | cut -d= -f2; }
        say none=$(try)
        echo 'default deny' | lanlet policy set -
        say denied=$(try)
        printf 'allow to 127.0.0.1\ndefault deny\n' | lanlet policy set -
        say other=$(try)
        printf 'allow to 10.0.2.2 tcp 7000\ndefault deny\n' | lanlet policy set -
        say allowed=$(try)
        # Rules about the host stand before the policy.
        printf 'default allow\n' | lanlet policy set -
        say host="$(lanlet exec --name default -- python3 peer.py try_connect 198.51.100.1 7000 2 | grep -o 'result=[^ ]*' | cut -d= -f2)"
    "#;
    let Some(outcome) = scenario(&World::new(), script) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("none", "connected"),
            ("denied", "EHOSTUNREACH"),
            ("other", "EHOSTUNREACH"),
            ("allowed", "connected"),
            ("host", "EHOSTUNREACH"),
        ],
    );
}

/// A namespace guest has its user's files, the control socket among them.
#[test]
fn a_guest_cannot_lift_its_policy() {
    let script = r#"
        cat >user.sh <<'END'
        echo "default deny" >closed.policy
        "$LANLET" up --name closed --policy closed.policy 2>up.log &
        until "$LANLET" status --name closed >/dev/null 2>&1; do sleep 0.05; done
        "$LANLET" exec --name closed -- sh -c '
            for what in "policy clear" status down "forward add 9000:192.168.122.9:9000"; do
                "$LANLET" $what --name closed 2>&1; echo "@@LANLET rc=$?"
            done
            "$LANLET" exec --name closed -- true; echo "@@LANLET rc=$?"' >guest.log 2>&1
        cat guest.log
        echo "@@LANLET refused=$(grep -c "closed to guests" guest.log)"
        echo "@@LANLET policy=$("$LANLET" policy show --name closed | grep -c "default deny")"
        echo "@@LANLET warned=$(grep -c "a guest was refused" up.log)"
        "$LANLET" down --name closed
        wait
END
        mkdir -m 777 own; cd own
        # One user namespace for both, as an ordinary user has.
        "$LAB/as-user" bash ../user.sh
    "#;
    let Some(outcome) = scenario(&World::new(), script) else {
        return;
    };
    let outcome = outcome.passed();
    assert_eq!(outcome.markers().all("rc"), ["1"; 5], "{}", outcome.text());
    let expected = [("refused", "5"), ("policy", "1"), ("warned", "5")];
    assert_said(&outcome, &expected);
}

/// One guest, one name, in whatever case it is written: a rule that misses its guest fails open.
#[test]
fn a_guest_has_one_name_and_no_other_has_it() {
    let world = World::new();
    let pages = world.temp().path().to_owned();
    let world = world.with(&["--http", &pages.to_string_lossy()]);
    world.temp().file(
        "try.sh",
        GUEST.to_owned() + "say $1=$(get http://203.0.113.1/)",
    );
    let script = r#"
        echo page >index.html
        printf 'deny guest port=Web,group=CI to any\ndefault allow\n' >case.policy
        network --policy case.policy --port vhost-user:$PWD/v.sock,name=Web_1
        lanlet exec --name default --guest-name Web -- bash try.sh port
        lanlet exec --name default --guest-name wEB -- bash try.sh again
        lanlet exec --name default --group ci -- bash try.sh group
        lanlet exec --name default -- bash try.sh none
        say bad="$(lanlet exec --name default --guest-name 'Web!' -- true 2>/dev/null; echo $?)"
        say bad_port="$(lanlet up --name other --port vhost-user:$PWD/w.sock,name=Web_1! 2>/dev/null; echo $?)"
        say taken="$(lanlet exec --name default --guest-name web_1 -- true 2>&1 | grep -o "name web_1 is port 1's" | tr ' ' _)"
        say forward="$(lanlet forward add 18080:WEB_1:80 >/dev/null; echo $?)"
        is_there() { lanlet status --json | grep -q "\"name\": *\"$1\""; }
        # A guest that is started again at once takes over, one whose predecessor stays is refused.
        for n in 1 2 3 4 5 6; do
            "$LAB/as-user" "$LANLET" exec --name default --guest-name next -- sleep 60 &
            until_true 10 is_there next || fail "no guest $n"
            kill -9 $!
        done
        lanlet exec --name default --guest-name next -- true && say succeeds=yes
        lanlet exec --name default --guest-name stays -- sleep 60 &
        until_true 10 is_there stays || fail "no guest"
        say second="$(lanlet exec --name default --guest-name Stays -- true 2>&1 | grep -c 'name stays is port')"
        printf 'deny guest port=Stay,port=STAYS,group=ops to any\ndefault allow\n' >typo.policy
        say check="$(lanlet policy check typo.policy 2>&1 | grep -o 'no guest.*' | tr ' \n' _/)"
        say set="$(lanlet policy set typo.policy 2>&1 | grep -c 'no guest')"
    "#;
    let Some(outcome) = scenario(&world, script) else {
        return;
    };
    let outcome = outcome.passed();
    assert_said(
        &outcome,
        &[
            ("port", "7"),
            ("again", "7"),
            ("group", "7"),
            ("none", "0"),
            ("bad", "2"),
            ("bad_port", "2"),
            ("taken", "name_web_1_is_port_1's"),
            ("forward", "0"),
            ("succeeds", "yes"),
            ("second", "1"),
            (
                "check",
                "no_guest_is_called_stay_at_the_moment/no_guest_is_of_the_group_ops_at_the_moment/",
            ),
            ("set", "2"),
        ],
    );
}
