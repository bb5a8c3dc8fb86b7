//! Networks in the background: what `lanlet up --detach` leaves behind and what it does not, who is told
//! when the network is ready, and who attaches to it.

use super::common::World;
use super::{assert_said, scenario};

/// The caller gets its errors and its descriptors back; the network has none of either.
#[test]
fn a_detached_network_is_ready_when_the_command_returns() {
    let script = r#"
        exec 9>inherited
        lanlet up -d --lease-file none >up.out 2>up.err
        say up=$?
        attached=0
        for _ in $(seq 20); do lanlet exec -- true 2>>exec.err && attached=$((attached + 1)); done
        say attached=$attached told=$(grep -c "on network 'default'" exec.err)
        lanlet exec -q -- true 2>quiet.err
        say quiet=$(wc -c <quiet.err)
        pid=$(status_of "s['pid']")
        fds_of $pid >fds
        log=$(sed -n 's/^2 //p' fds)
        say cwd=$(readlink /proc/$pid/cwd) stdin=$(sed -n 's/^0 //p' fds)
        say log="$log" mode=$(stat -c %a "$log")
        say leader=$(($(ps -o sid= -p $pid) == pid)) terminal=$(ps -o tty= -p $pid)
        say inherited=$(grep -c inherited fds)
        say summary=$(grep -c "'lanlet down' ends the network" up.out) stderr=$(wc -c <up.err)
        step typo lanlet exec --name defalt -- true 2>typo.err
        grep -q "'defalt' is not running (these are: default)" typo.err && say typo_told=yes
        step private lanlet exec --private --subnet 10.8.0.0/24 -- sh -c 'ip -o -4 a show eth0 | grep -q " 10.8.0."'
        # Errors at the start are the caller's, and leave nothing.
        step busy lanlet up -d 2>busy.err
        grep -q "already running (pid $pid)" busy.err && say busy_told=yes
        python3 -c 'import socket, time; s = socket.create_server(("127.0.0.1", 7000)); print("up", flush=True); time.sleep(60)' >taken &
        wait_for taken up
        step refused lanlet up -d --name other -p 127.0.0.1:7000:192.168.122.9:80 --log-file other.log 2>refused.err
        grep -q '127.0.0.1:7000' refused.err && say refused_told=yes
        say left=$(pgrep -fc 'lanlet up -d --name other') log_left=$(ls other.log 2>/dev/null | wc -l)
        step down lanlet down
        say after=$(pgrep -fc 'lanlet up -d')
        true
    "#;
    let Some(outcome) = scenario(&World::new(), script) else {
        return;
    };
    let outcome = outcome.passed();
    assert_said(
        &outcome,
        &[
            ("up", "0"),
            ("attached", "20"),
            ("told", "20"),
            ("quiet", "0"),
            ("cwd", "/"),
            ("stdin", "/dev/null"),
            ("mode", "600"),
            ("leader", "1"),
            ("terminal", "?"),
            ("inherited", "0"),
            ("summary", "1"),
            ("stderr", "0"),
            ("typo", "1"),
            ("typo_told", "yes"),
            ("private", "0"),
            ("busy", "1"),
            ("busy_told", "yes"),
            ("refused", "1"),
            ("refused_told", "yes"),
            ("left", "0"),
            ("log_left", "0"),
            ("down", "0"),
            ("after", "0"),
        ],
    );
    let log = outcome.markers().get("log").unwrap_or_default().to_owned();
    assert!(log.ends_with("/lanlet/default.log"), "{log}");
}

/// Paths that were relative to the caller's directory still lead where they did.
#[test]
fn a_detached_network_keeps_the_callers_paths() {
    let script = r#"
        mkdir -m 777 own; cd own
        lanlet up -d --lease-file my.leases --log-file my.log >/dev/null
        say up=$?
        lanlet exec -- true
        step down lanlet down
        until_true 10 test -s my.leases
        say leases=$(test -s my.leases && echo kept) log=$(grep -c 'is ending: asked to' my.log)
        # A relative runtime directory, too.
        export LANLET_RUNTIME_DIR=control
        lanlet up -d --lease-file none --log-file my.log >/dev/null
        say relative=$?
        step attached lanlet exec --name default -- true
        step ended lanlet down
        say socket=$(test -e control/default.sock || echo gone)
    "#;
    let Some(outcome) = scenario(&World::new(), script) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("up", "0"),
            ("down", "0"),
            ("leases", "kept"),
            ("log", "1"),
            ("relative", "0"),
            ("attached", "0"),
            ("ended", "0"),
            ("socket", "gone"),
        ],
    );
}

/// Who starts a network in the background of a shell has four ways to know when it is there.
#[test]
fn readiness_is_told_and_can_be_waited_for() {
    let script = r#"
        # A command that is faster than the network attaches to it all the same.
        for round in 1 2 3 4 5; do
            "$LAB/as-user" "$LANLET" up --lease-file none >up.log 2>&1 &
            lanlet exec --wait 20s -- true && say waited=yes
            lanlet down
            wait $!
        done
        "$LAB/as-user" "$LANLET" up --lease-file none --ready-fd 8 >up.log 2>&1 8>ready &
        step wait lanlet wait --timeout 20s
        for _ in $(seq 200); do [ -s ready ] && break; sleep 0.05; done
        fds_of $(status_of "s['pid']") >fds
        say line=$(wc -c <ready) stderr=$(grep -c '^2 .*/up.log' fds) open=$(grep -c /ready fds)
        lanlet down
        wait
        step none lanlet wait --timeout 1s 2>none.err
        step named lanlet exec --name later --wait 1s -- true 2>>none.err
        say told=$(grep -c 'is not running' none.err)
        step bad lanlet up --ready-fd 77 2>bad.err
        grep -q -- '--ready-fd 77' bad.err && say bad_told=yes
        # As systemd asks for it.
        python3 -c '
import socket
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.bind("notify"); s.settimeout(30)
print("bound", flush=True)
while True:
    told = s.recv(1000).decode().split("\n"); print(*told, flush=True)
    if "STOPPING=1" in told: break' >told &
        wait_for told bound
        chmod 777 notify
        NOTIFY_SOCKET=$PWD/notify lanlet up -d --lease-file none >/dev/null
        lanlet down
        wait
        say ready=$(grep -c '^READY=1$' told) main=$(grep -c '^MAINPID=[0-9]*$' told)
    "#;
    let Some(outcome) = scenario(&World::new(), script) else {
        return;
    };
    let outcome = outcome.passed();
    assert_eq!(
        outcome.markers().all("waited"),
        ["yes"; 5],
        "{}",
        outcome.text()
    );
    assert_said(
        &outcome,
        &[
            ("wait", "0"),
            ("line", "1"),
            ("stderr", "1"),
            ("open", "0"),
            ("none", "1"),
            ("named", "1"),
            ("told", "2"),
            ("bad", "2"),
            ("bad_told", "yes"),
            ("ready", "1"),
            ("main", "1"),
        ],
    );
}

/// The network that a command has for itself is seen and spoken to like any other, and only as long.
#[test]
fn private_networks_are_visible_and_leave_nothing() {
    let script = r#"
        cat >user.sh <<'END'
        say() { echo "@@LANLET $*"; }
        lanlet() { "$LANLET" "$@"; }
        dir=$XDG_RUNTIME_DIR/lanlet
        "$LANLET" exec --subnet 10.8.0.0/24 -- sh -c '
            for what in status "forward add 9000:10.8.0.9:9000" "policy clear" down; do
                "$LANLET" $what --name exec-$PPID 2>&1; echo "rc=$?"
            done
            touch ready; exec sleep 60' >guest.log 2>exec.log &
        exec=$!
        until [ -e ready ]; do sleep 0.05; done
        say guest_refused=$(grep -c 'closed to guests' guest.log),$(grep -c rc=1 guest.log)
        say told=$(grep -c "private network 'exec-$exec', 10.8.0.0/24" exec.log)
        lanlet list >list
        say row="$(grep "^exec-$exec " list | grep '10.8.0.' | grep -c 'lanlet exec --subnet 10.8.0.0/24 -- sh -c ')" rows=$(wc -l <list)
        lanlet list --json | python3 -c '
import json, sys
n, = json.load(sys.stdin)
print("@@LANLET", *("%s=%s" % (k, n[k]) for k in ("private", "guests")), "pid=%s" % (n["pid"] == int(sys.argv[1])))' $exec
        # The only one is meant where none is named.
        lanlet status | grep -q "^network exec-$exec (pid $exec)" && say status=yes
        lanlet forward add 127.0.0.1:0:10.8.0.9:80 >/dev/null && say forward=yes
        lanlet policy show | grep -q 'no policy' && say policy=yes
        lanlet wait --timeout 1s && say wait=yes
        "$LANLET" run -- sh -c 'touch ready2; exec sleep 60' 2>run.log &
        run=$!
        until [ -e ready2 ]; do sleep 0.05; done
        lanlet status 2>several.err; say several=$?
        grep "exec-$exec" several.err | grep "run-$run" | grep -q -- '--name' && say asked=yes
        lanlet up -d --lease-file none >/dev/null
        lanlet status | grep -q '^network default ' && say default=yes
        lanlet down -q
        # A killed one is passed over, and what it left goes.
        kill -KILL $run
        wait $run 2>/dev/null
        say files=$(ls $dir | grep -c "^run-$run")
        say one=$(lanlet list | grep -c "^exec-$exec ") gone=$(lanlet list | grep -c "^run-") swept=$(ls $dir | grep -c "^run-$run")
        # Asked to end, it does so with its command.
        lanlet down; say down=$?
        wait $exec; say exec=$? left=$(ls $dir | grep -vc default.lock)
        # Where there is no place for its files, it runs all the same.
        LANLET_RUNTIME_DIR=/proc/lanlet lanlet exec -- true; say hidden=$?
END
        export LANLET
        mkdir -m 777 own; cd own
        "$LAB/as-user" bash ../user.sh
    "#;
    let Some(outcome) = scenario(&World::new(), script) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("guest_refused", "4,4"),
            ("told", "1"),
            ("row", "1"),
            ("rows", "2"),
            ("private", "True"),
            ("guests", "1"),
            ("pid", "True"),
            ("status", "yes"),
            ("forward", "yes"),
            ("policy", "yes"),
            ("wait", "yes"),
            ("several", "1"),
            ("asked", "yes"),
            ("default", "yes"),
            ("files", "2"),
            ("one", "1"),
            ("gone", "0"),
            ("swept", "0"),
            ("down", "0"),
            ("exec", "143"),
            ("left", "0"),
            ("hidden", "0"),
        ],
    );
}

/// What is known of guests is shown in a place, fits a terminal, and is there for scripts.
#[test]
fn guests_are_shown_with_their_addresses() {
    let script = r#"
        lanlet up -d --lease-file none >/dev/null
        for guest in web db; do
            "$LAB/as-user" "$LANLET" exec --name default --guest-name $guest -- sh -c '
                ip -o -4 a show eth0 | sed "s/.*inet \([0-9.]*\).*/\1/"
                ip -o -6 a show eth0 scope global | sed "s/.*inet6 \([0-9a-f:]*\).*/\1/"
                # By hand, as a guest without DHCP.
                ip addr add 192.168.122.250/24 dev eth0; ping -c 1 -W 2 -I 192.168.122.250 192.168.122.1 >&2
                exec sleep 60' >$guest.told 2>/dev/null &
            step wait_$guest lanlet wait --guests 1 --timeout 20s
        done
        step wait lanlet wait --guests 2 --timeout 20s
        step none lanlet wait --guests 3 --timeout 1s 2>none.err
        grep -q 'has 2 of 3 guests after 1s' none.err && say none_told=yes
        wait_for web.told :
        wait_for db.told :
        [ "$(lanlet ip web; lanlet ip -6 web)" = "$(cat web.told)" ] && say web=same
        [ "$(lanlet ip DB)" = "$(head -1 db.told)" ] && say db=same
        step ip_nobody lanlet ip nobody 2>nobody.err
        grep -q '(there are: web, db)' nobody.err && say nobody_told=yes
        until_true 20 status_is "'192.168.122.250' in s['guests'][0]['ipv4']" True
        say static="$(status_of "s['guests'][0]['ipv4'][1]")"
        lanlet status >status
        say heads="$(sed -n '/^NAME/,/^$/p' status | head -2 | tr -s ' \n' _)" widest="$(sed -n '/^NAME/,/^$/p' status | awk 'length > 80' | wc -l)"
        say guest="$(sed -n '/^NAME/,/^$/p' status | grep -A1 ^web | tail -1 | grep -c "$(tail -1 web.told)")"
        # In a wide terminal one line each.
        script -qec "stty cols 160; $LAB/as-user $LANLET status" /dev/null </dev/null | tr -d '\r' >wide
        say wide="$(grep '^web ' wide | grep "$(head -1 web.told)" | grep -c "$(tail -1 web.told)")"
        say subnet="$(status_of "s['subnet'], s['gateway'], s['prefix_len']" | tr -d ' ')"
        say v6="$(status_of "s['ipv6']['subnet'].endswith('::/64') and s['ipv6']['gateway'].endswith('::1')")"
        say ports="$(status_of "sorted(l['port'] for l in s['leases'])" | tr -d ' ')" version="$(status_of "s['version'] != ''")"
        say gauges="$(status_of "sorted(s['gauges'])" | tr -d " ")"
        say since="$(status_of "all(0 <= g['attached_secs'] < 60 for g in s['guests'])")"
        say counted="$(status_of "all(g['received_bytes'] and g['sent_bytes'] for g in s['guests'])")"
        lanlet down -q
    "#;
    let Some(outcome) = scenario(&World::new(), script) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("wait_web", "0"),
            ("wait_db", "0"),
            ("wait", "0"),
            ("none", "1"),
            ("none_told", "yes"),
            ("web", "same"),
            ("db", "same"),
            ("ip_nobody", "1"),
            ("nobody_told", "yes"),
            ("static", "192.168.122.250"),
            ("heads", "NAME_ADDRESS_KIND_RX_TX_DROPS_SINCE_MAC_IPv6_"),
            ("widest", "0"),
            ("guest", "1"),
            ("wide", "1"),
            ("subnet", "192.168.122.0/24192.168.122.124"),
            ("v6", "True"),
            ("ports", "[1,2]"),
            ("version", "True"),
            (
                "gauges",
                "['guest_memory_bytes','host_sockets','leases','macs','ports']",
            ),
            ("since", "True"),
            ("counted", "True"),
        ],
    );
}
