//! `up`, `run`, `exec`, `status` and `down` for real, as an unprivileged user in a world of its own:
//! exit statuses, signals, names, what is left after SIGKILL, and what is said where the machine
//! lacks something.

mod common;

use common::{Outcome, World, skip, world_missing};

/// Runs a scenario that must end well; `None` where none can run.
fn passed(scenario: &str) -> Option<Outcome> {
    if let Some(reason) = world_missing() {
        skip(&reason);
        return None;
    }
    Some(World::new().run(scenario).passed())
}

#[track_caller]
fn says(outcome: &Outcome, expected: &[(&str, &str)]) {
    let markers = outcome.markers();
    for &(key, value) in expected {
        assert_eq!(markers.get(key), Some(value), "{key}: {}", outcome.text());
    }
}

#[test]
fn commands_get_their_tap_and_lanlet_gets_their_status() {
    let Some(outcome) = passed(
        r#"
        step exec lanlet exec -- sh -c 'exit 7'
        step killed lanlet exec -- sh -c 'kill -9 $$'
        step missing lanlet exec -- nonexistent 2>missing.err
        ulimit -Sn 512
        step run lanlet run -- sh -c '
            [ "{fd} {ifname} {mac}" = "$LANLET_FD $LANLET_IFNAME $LANLET_MAC" ] || exit 1
            [ "$(readlink /proc/self/fd/{fd})" = /dev/net/tun ] || exit 2
            grep -q "^iff:.{ifname}$" /proc/self/fdinfo/{fd} || exit 3
            [ "$(ulimit -Sn)" = 512 ] || exit 4
            exit 8'
        step run_missing lanlet run -- nonexistent 2>>missing.err
        step run_directory lanlet run -- /tmp 2>>missing.err
        grep -q 'cannot run nonexistent: command not found' missing.err && say told=yes
        lanlet exec --mac 52:54:00:00:00:77 --subnet 10.9.8.0/24 --domain lab.test --mtu 1400 -- sh -c '
            ip -4 -o address show dev eth0; ip -o link show dev eth0; ip route; cat /etc/resolv.conf
            ping -c 1 -w 5 10.9.8.1; exit 0' >guest
        grep -q 'inet 10.9.8.[0-9]*/24' guest && say address=yes
        grep -q 'mtu 1400 .*52:54:00:00:00:77' guest && say link=yes
        grep -q '^default via 10.9.8.1 dev eth0' guest && say route=yes
        grep -q '^nameserver 10.9.8.1$' guest && grep -q '^search lab.test$' guest && say resolver=yes
        grep -q '1 received' guest && say ping=yes
        true
        "#,
    ) else {
        return;
    };
    says(
        &outcome,
        &[
            ("exec", "7"),
            ("killed", "137"),
            ("missing", "127"),
            ("run", "8"),
            ("run_missing", "127"),
            ("run_directory", "126"),
            ("told", "yes"),
            ("address", "yes"),
            ("link", "yes"),
            ("route", "yes"),
            ("resolver", "yes"),
            ("ping", "yes"),
        ],
    );
}

#[test]
fn signals_pass_through() {
    let Some(outcome) = passed(
        r#"
        for kind in run exec; do
            "$LAB/as-user" "$LANLET" $kind -- sh -c '
                trap "echo usr1" USR1; trap "echo term; exit 9" TERM
                echo ready; while :; do sleep 0.05; done' >$kind.out &
            pid=$!
            wait_for $kind.out ready
            kill -USR1 $pid
            wait_for $kind.out usr1
            kill -TERM $pid
            wait $pid
            say $kind=$? ${kind}_terms=$(grep -c term $kind.out)
        done
        # Not a trap in the command: the signal itself is in the status.
        "$LAB/as-user" "$LANLET" exec -- sh -c 'echo ready; exec sleep 1000' >plain.out &
        pid=$!
        wait_for plain.out ready
        kill -HUP $pid
        wait $pid
        say plain=$?
        "#,
    ) else {
        return;
    };
    says(
        &outcome,
        &[
            ("run", "9"),
            ("run_terms", "1"),
            ("exec", "9"),
            ("exec_terms", "1"),
            ("plain", "129"),
        ],
    );
}

#[test]
fn sigkill_leaves_nothing_that_matters() {
    let Some(outcome) = passed(
        r#"
        left() { pgrep -fc 'sleep 98765|netns-helper|child-init|guest-init'; }
        for kind in run exec; do
            "$LAB/as-user" "$LANLET" $kind -- sh -c 'echo ready; exec sleep 98765' >$kind.out &
            pid=$!
            wait_for $kind.out ready
            say ${kind}_before=$([ "$(left)" -ge 1 ] && echo some)
            kill -KILL $pid
            wait $pid
            for _ in $(seq 100); do [ "$(left)" != 0 ] || break; sleep 0.02; done
            say ${kind}_after=$(left)
        done
        network
        "$LAB/as-user" "$LANLET" run -- sh -c 'echo ready; sleep 2' >attached.out 2>attached.err &
        attached=$!
        wait_for attached.out ready
        pkill -KILL -f 'lanlet up'
        wait_for attached.err "network '[a-z]*' has ended"
        wait $attached
        say attached=$?
        step status lanlet status 2>/dev/null
        network
        lanlet status >again.out
        say again=$?
        step down lanlet down
        "#,
    ) else {
        return;
    };
    says(
        &outcome,
        &[
            ("run_before", "some"),
            ("run_after", "0"),
            ("exec_before", "some"),
            ("exec_after", "0"),
            ("attached", "0"),
            ("status", "1"),
            ("again", "0"),
            ("down", "0"),
        ],
    );
}

#[test]
fn networks_have_names() {
    let Some(outcome) = passed(
        r#"
        "$LAB/as-user" "$LANLET" up --name lab --subnet 10.7.0.0/24 --lease-file none >up.log 2>&1 &
        up=$!
        wait_for up.log 'is up'
        step busy lanlet up --name lab 2>busy.err
        grep -q "network 'lab' is already running (pid [0-9]*)" busy.err && say busy_told=yes
        step other lanlet exec --name lab -- sh -c 'ip -o -4 a show eth0 | grep -q "inet 10.7.0."'
        step default lanlet exec -- sh -c 'ip -o -4 a show eth0 | grep -q "inet 192.168.122."'
        step options lanlet exec --name lab --mtu 9000 -- true 2>options.err
        grep -q -- '--mtu is for one that starts' options.err && say options_told=yes
        step none lanlet exec --name none -- true 2>none.err
        grep -q "network 'none' is not running (these are: lab)" none.err && say none_told=yes
        step tap lanlet run --name lab -- sh -c '
            "$0" status --name lab --json | grep -q "\"kind\": \"vmm\""' "$LANLET"
        for _ in $(seq 100); do
            lanlet status --name lab --json | grep -q '"kind": "vmm"' || break
            sleep 0.05
        done
        say gone=$(lanlet status --name lab | grep -c vmm)
        kill -TERM $up
        wait $up
        say up=$?
        step status lanlet status --name lab 2>/dev/null
        true
        "#,
    ) else {
        return;
    };
    says(
        &outcome,
        &[
            ("busy", "1"),
            ("busy_told", "yes"),
            ("other", "0"),
            ("default", "0"),
            ("options", "1"),
            ("options_told", "yes"),
            ("none", "1"),
            ("none_told", "yes"),
            ("tap", "0"),
            ("gone", "0"),
            ("up", "0"),
            ("status", "1"),
        ],
    );
}

/// Each lack is said with its remedy, by the command and by `check`, and costs status 1.
#[test]
fn what_the_machine_lacks_is_said_with_the_remedy() {
    let Some(outcome) = passed(
        r#"
        lanlet check >good.out
        say good=$?
        for flows in 16384 100; do
            ( ulimit -n 12000; lanlet exec --max-flows $flows -- true 2>files.err )
            say files_$flows=$?,$(grep -c 'may need 17920 open files, and the limit is 12000' files.err)
            grep -q warning files.err; say files_warned_$flows=$?
        done
        # A user namespace below which there may be none, and in it somebody without capabilities.
        barred() {
            unshare --user --map-root-user sh -c '
                echo 0 >/proc/sys/user/max_user_namespaces
                exec setpriv --bounding-set -all "$@"' sh "$LANLET" "$@"
        }
        for kind in run exec; do
            step userns_$kind barred $kind -- true 2>userns.err
            grep -q 'sysctl -w user.max_user_namespaces' userns.err && say userns_${kind}_told=yes
        done
        barred check >userns.out
        say userns_check=$?
        mount -t tmpfs none /dev/net
        for kind in run exec; do
            step tun_$kind lanlet $kind -- true 2>tun.err
            grep -q 'modprobe tun' tun.err && say tun_${kind}_told=yes
        done
        lanlet check >tun.out
        say tun_check=$?
        grep -q '^FAIL.*modprobe tun' tun.out && say tun_check_told=yes
        true
        "#,
    ) else {
        return;
    };
    let yes = "yes";
    says(
        &outcome,
        &[
            ("good", "0"),
            ("files_16384", "0,1"),
            ("files_warned_16384", "0"),
            ("files_100", "0,0"),
            ("files_warned_100", "1"),
            ("userns_run", "1"),
            ("userns_run_told", yes),
            ("userns_exec", "1"),
            ("userns_exec_told", yes),
            ("userns_check", "1"),
            ("tun_run", "1"),
            ("tun_run_told", yes),
            ("tun_exec", "1"),
            ("tun_exec_told", yes),
            ("tun_check", "1"),
            ("tun_check_told", yes),
        ],
    );
}
