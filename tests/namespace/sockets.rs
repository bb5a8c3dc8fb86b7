//! Unix sockets of lanlet in the hands of a guest of `lanlet exec`, which has its user's files.

use crate::common::World;
use crate::{assert_said, scenario};

/// What a hostile guest does with sockets; each function ends with a marker.
const HOSTILE: &str = r#"
import os, select, socket, struct, sys, time

def say(**words):
    print('@@LANLET', *(f'{k}={v}' for k, v in words.items()), flush=True)

def connect(path):
    s = socket.socket(socket.AF_UNIX)
    s.connect(path)  # blocking: it waits where the queue is full
    s.settimeout(5)
    return s

def heard(s, wait=3):
    """What comes first: text, 'closed', or 'silence'."""
    poll = select.poll()
    poll.register(s, select.POLLIN)
    if not poll.poll(wait * 1000):
        return 'silence'
    try:
        return s.recv(65536).decode('latin1') or 'closed'
    except OSError:
        return 'closed'

def flows(count):
    sockets = []
    for n in range(int(count)):
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.sendto(b'x', ('203.0.113.1', 9))
        sockets.append(s)
        if n % 50 == 0:
            time.sleep(0.02)
    return sockets

def greet(path, count, of_flows):
    held = flows(of_flows)
    time.sleep(0.5)
    clients = []
    for _ in range(int(count)):
        s = connect(path)
        clients.append(s)
        try:
            s.sendall(b'{"request":"clear_policy"}\n')
        except OSError:
            pass  # cut off already
    greeted = sum('"lanlet"' in heard(s, 1) for s in clients)
    say(tried=len(clients), greeted=greeted)
    open('flooded', 'w').close()
    while not os.path.exists('done'):
        time.sleep(0.1)

def vhost(path):
    s = connect(path)
    try:
        s.sendall(struct.pack('=III', 1, 1, 0))
        answer = heard(s)
    except OSError:
        answer = 'closed'
    say(vhost='served' if answer not in ('closed', 'silence') else answer)

def forward(path):
    say(forward=heard(connect(path), 1))

def silent(path, count):
    held = [connect(path) for _ in range(int(count))]
    say(held=len(held))
    while not os.path.exists('done'):
        time.sleep(0.1)

def noise(control, vhost, secs):
    end, tries = time.monotonic() + float(secs), 0
    while time.monotonic() < end:
        for path in (control, vhost):
            try:
                s = connect(path)
                s.sendall(b'\xff' * 64)
                s.close()
                tries += 1
            except OSError:
                pass
    say(enough=tries > 100)

globals()[sys.argv[1]](*sys.argv[2:])
"#;

/// Runs `script` as an ordinary user whose guests lanlet has power over, as on any machine.
fn as_user(world: &World, script: &str) -> Option<crate::common::Outcome> {
    world.temp().file("hostile.py", HOSTILE);
    let script = format!(
        r#"
        cat >user.sh <<'SCRIPT'
        say() {{ echo "@@LANLET $*"; }}
        fail() {{ echo "failed: $*"; cat up.log; "$LANLET" down --name n; exit 9; }}
        hostile() {{ python3 ../hostile.py "$@"; }}
        up() {{
            $LIMIT "$LANLET" up --name n "$@" 2>up.log &
            NETWORK=$!
            for _ in $(seq 200); do
                "$LANLET" status --name n >/dev/null 2>&1 && return
                sleep 0.05
            done
            fail "not up"
        }}
        guest() {{ "$LANLET" exec --name n --guest-name web -- python3 ../hostile.py "$@"; }}
        within() {{ for _ in $(seq 200); do "$@" >/dev/null 2>&1 && return; sleep 0.1; done; fail "$@"; }}
        down() {{ "$LANLET" down --name n >/dev/null 2>&1; wait; }}
        export LANLET_RUNTIME_DIR=$PWD/run
        SOCK=$PWD/run/n.sock
        {script}
SCRIPT
        mkdir -m 777 own; cd own
        "$LAB/as-user" bash ../user.sh"#
    );
    Some(scenario(world, &script)?.passed())
}

/// With every descriptor in use the check of a client fails, and so it is refused.
#[test]
fn a_guest_that_takes_all_files_does_not_get_past_the_control_sockets_check() {
    let script = r#"
        printf 'deny guest port=ci to any\ndefault allow\n' >closed.policy
        LIMIT="prlimit --nofile=1024" up --policy closed.policy
        guest greet "$SOCK" 160 900 &
        within test -e flooded
        say policy="$("$LANLET" policy show --name n | grep -c 'guest port=ci')"
        say status="$("$LANLET" status --name n --json | grep -q '"web"' && echo 1)"
        # Descriptors are left for another guest, its port, its queries and for a listener.
        say second="$("$LANLET" exec --name n --guest-name ci -- true; echo $?)"
        say listener="$("$LANLET" forward add --name n 18099:web:80 >/dev/null; echo $?)"
        touch done
        down"#;
    let Some(outcome) = as_user(&World::new(), script) else {
        return;
    };
    assert_said(
        &outcome,
        &[
            ("tried", "160"),
            ("greeted", "0"),
            ("policy", "1"),
            ("status", "1"),
            ("second", "0"),
            ("listener", "0"),
        ],
    );
}

/// A guest denied everything could connect to the socket of a port and be that port's guest.
#[test]
fn guests_are_refused_at_vhost_user_ports_and_forwards_unless_allowed() {
    let script = r#"
        up --port vhost-user:$PWD/web.sock,name=a --port vhost-user:$PWD/nested.sock,name=b,allow-guests
        "$LANLET" forward add --name n unix:$PWD/f.sock-a:80
        "$LANLET" forward add --name n unix:$PWD/g.sock-a:80,allow-guests
        guest vhost web.sock
        guest vhost nested.sock
        guest forward f.sock
        guest forward g.sock
        hostile vhost web.sock
        hostile forward f.sock
        say warned="$(grep -c 'a guest was refused' up.log)"
        down"#;
    let Some(outcome) = as_user(&World::new(), script) else {
        return;
    };
    let markers = outcome.markers();
    assert_eq!(markers.all("vhost"), ["closed", "served", "served"]);
    // The port has no front-end that answers: connections wait for it.
    assert_eq!(markers.all("forward"), ["closed", "silence", "silence"]);
    assert_said(&outcome, &[("warned", "2")]);
}

/// Whatever a guest does again and again, it does not fill its user's log.
#[test]
fn a_guest_that_is_refused_again_and_again_does_not_fill_the_log() {
    let script = r#"
        up --port vhost-user:$PWD/a.sock,name=a --port vhost-user:$PWD/b.sock,name=b,allow-guests
        guest noise "$SOCK" "$PWD/a.sock" 2
        guest noise "$SOCK" "$PWD/b.sock" 2
        say warned="$(grep -c 'a guest was refused at the control socket' up.log)"
        say few="$([ "$(wc -l <up.log)" -lt 400 ] && echo yes || wc -l <up.log)"
        say said="$(grep -c 'more like it are only counted' up.log | sed 's/^[1-9].*/yes/')"
        down"#;
    let Some(outcome) = as_user(&World::new(), script) else {
        return;
    };
    assert_eq!(outcome.markers().all("enough"), ["True"; 2]);
    let expected = [("warned", "50"), ("few", "yes"), ("said", "yes")];
    assert_said(&outcome, &expected);
}

/// Clients that ask for nothing wait in the kernel's queue or give their place back.
#[test]
fn silent_clients_do_not_keep_others_out() {
    let script = r#"
        up
        hostile silent "$SOCK" 40 &
        sleep 1
        "$LANLET" status --name n >/dev/null && say served=yes
        touch done
        down"#;
    let Some(outcome) = as_user(&World::new(), script) else {
        return;
    };
    assert_said(&outcome, &[("held", "40"), ("served", "yes")]);
}

/// Logging out removes /run/user/UID with all that is in it.
#[test]
fn a_network_outlives_its_runtime_directory_and_keeps_its_name() {
    let script = r#"
        answers() { "$LANLET" status --name n --json | grep -q '"stays"'; }
        mkdir -m 700 top
        export LANLET_RUNTIME_DIR=$PWD/top/run
        up
        "$LANLET" exec --name n --guest-name stays -- sleep 100 &
        guest=$!
        within answers
        for gone in top/run top/run/n.sock top/run/n.lock; do
            rm -r $gone
            within answers
            say still=$gone
        done
        say second="$("$LANLET" up --name n 2>&1 | grep -c "already running (pid $NETWORK)")"
        # With all that is above it, until the user is back.
        rm -r top
        sleep 1.5
        say alive="$(kill -0 $NETWORK && echo yes)" told="$(grep -c 'no command reaches it' up.log)"
        mkdir -m 700 top
        within answers
        # Another process takes the name first.
        kill -STOP $NETWORK
        rm -r top/run
        "$LANLET" up --name n --subnet 10.77.0.0/24 2>second.log &
        second=$!
        has_name() { grep -qx $second top/run/n.lock && [ -S top/run/n.sock ]; }
        within has_name
        kill -CONT $NETWORK
        wait $NETWORK
        say ended="$(grep -c "is ending: its socket was removed, and another process, pid $second, has its name" up.log)"
        is_second() { "$LANLET" status --name n | grep -q 10.77.0; }
        within is_second
        kill $guest
        down"#;
    let Some(outcome) = as_user(&World::new(), script) else {
        return;
    };
    let still = ["top/run", "top/run/n.sock", "top/run/n.lock"];
    assert_eq!(outcome.markers().all("still"), still);
    let expected = [
        ("second", "1"),
        ("alive", "yes"),
        ("told", "1"),
        ("ended", "1"),
    ];
    assert_said(&outcome, &expected);
}
