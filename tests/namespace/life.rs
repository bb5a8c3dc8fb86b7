//! How lanlet's processes live and end: other pid namespaces, ignored signals, one signal that always
//! ends, commands in the background.

use crate::common::World;
use crate::{assert_said, scenario};

/// SO_PEERCRED has no pid for a process of an outer pid namespace.
#[test]
fn a_network_is_reached_from_another_pid_namespace() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        network
        elsewhere() { "$LAB/as-user" unshare --user --map-root-user --pid --fork "$LANLET" "$@"; }
        elsewhere status >status.log 2>&1
        say status=$?
        elsewhere exec --name default -- ping -c 1 -W 2 192.168.122.1 >exec.log 2>&1
        say exec=$?
        elsewhere run --name default -- sh -c 'exit $((LANLET_FD < 3))' >run.log 2>&1
        say run=$?
        elsewhere down >down.log 2>&1
        say down=$? left="$(kill -0 $NETWORK 2>/dev/null && echo runs)"
        cat status.log exec.log run.log down.log >&2
        say told="$(grep -c 'outside this pid namespace\|asked to by pid' up.log)"
        "#,
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("status", "0"),
            ("exec", "0"),
            ("run", "0"),
            ("down", "0"),
            ("left", ""),
            ("told", "1"),
        ],
    );
}

/// nohup(1) ignores SIGHUP, a shell without job control SIGINT and SIGQUIT of its background jobs.
#[test]
fn signals_ignored_at_the_start_stay_ignored_by_lanlet_and_its_command() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        "$LAB/as-user" nohup "$LANLET" up >up.log 2>&1 &
        until_true 10 lanlet status
        pid=$!
        kill -HUP $pid
        kill -INT $pid # ignored by this shell's background jobs
        sleep 0.5
        say network="$(lanlet status >/dev/null && echo runs)"
        kill -TERM $pid
        until_true 10 sh -c "! kill -0 $pid"
        say network_then="$(lanlet status >/dev/null 2>&1 || echo ended)" named="$(grep -c 'ending: SIGTERM from pid [0-9]* (bash), uid' up.log)"
        cat up.log >&2
        # The command finds the dispositions and the mask that lanlet found.
        for mode in plain nohup; do
            prefix=
            [ $mode = plain ] || prefix=nohup
            direct="$(user $prefix grep -E '^Sig(Blk|Ign)' /proc/self/status 2>/dev/null | tr -d '\n\t ')"
            through="$(user $prefix "$LANLET" exec -- grep -E '^Sig(Blk|Ign)' /proc/self/status 2>/dev/null | tr -d '\n\t ')"
            run="$(user $prefix "$LANLET" run -- grep -E '^Sig(Blk|Ign)' /proc/self/status 2>/dev/null | tr -d '\n\t ')"
            say "$mode"_direct="$direct" "$mode"_exec="$through" "$mode"_run="$run"
        done
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_said(
        &outcome,
        &[
            ("network", "runs"),
            ("network_then", "ended"),
            ("named", "1"),
        ],
    );
    let markers = outcome.markers();
    for mode in ["plain", "nohup"] {
        let value = |way: &str| markers.get(&format!("{mode}_{way}")).map(str::to_owned);
        assert!(value("direct").is_some_and(|text| text.contains("SigIgn")));
        assert_eq!(value("exec"), value("direct"), "{mode}");
        assert_eq!(value("run"), value("direct"), "{mode}");
    }
    assert_ne!(markers.get("plain_direct"), markers.get("nohup_direct"));
}

/// A thread waits for a helper that is stopped, for 20 s. One SIGTERM ends the network all the same, and
/// 'down' says what it ended.
#[test]
fn one_signal_ends_a_network_whatever_is_stuck() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        stuck() {
            network
            "$LAB/as-user" "$LANLET" run --name default -- sh -c 'echo ready; exec sleep 60 <&$LANLET_FD' >vmm.log 2>&1 &
            vmm=$!
            wait_for vmm.log ready
            kill -STOP "$(pgrep -f '[n]etns-helper')"
            # A request for what its tap has dropped, which the helper does not answer.
            until_true 20 sh -c '! timeout 1 "$LAB/as-user" "$LANLET" status'
        }
        stuck
        start=$(date +%s%N)
        kill -TERM $NETWORK
        wait $NETWORK
        say status=$? ms=$((($(date +%s%N) - start) / 1000000)) named="$(grep -c 'is forced; still at work: .*lanlet-request' up.log)"
        kill -KILL $vmm
        stuck
        lanlet down 2>down.log
        say down=$? guests="$(grep -o 'it had one guest' down.log | wc -l)"
        cat up.log down.log >&2
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_said(
        &outcome,
        &[
            ("status", "1"),
            ("named", "1"),
            ("down", "0"),
            ("guests", "1"),
        ],
    );
    // 20 s are those of the helper's answer.
    assert!(
        outcome.markers().number("ms") < 15_000.0,
        "{}",
        outcome.text()
    );
}

/// Ctrl-C for a command whose network does not answer.
#[test]
fn a_signal_ends_a_command_that_is_still_starting() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        network
        kill -STOP "$(pgrep -f '^[^ ]*lanlet up' | tail -1)"
        "$LAB/as-user" "$LANLET" exec --name default -- true >exec.log 2>&1 &
        exec=$!
        until_true 10 sh -c "pgrep -f 'lanle[t] exec'"
        sleep 0.3
        # The terminal's size is no wish to end.
        kill -WINCH $exec
        sleep 2
        say resized="$(kill -0 $exec && echo lives)"
        start=$(date +%s%N)
        kill -TERM $exec
        wait $exec
        say status=$? ms=$((($(date +%s%N) - start) / 1000000))
        cat exec.log >&2
        kill -KILL $NETWORK
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_said(&outcome, &[("resized", "lives"), ("status", "143")]);
    // 10 s are those of the network's answer.
    assert!(
        outcome.markers().number("ms") < 8_000.0,
        "{}",
        outcome.text()
    );
}

/// A VMM that puts itself into the background keeps its network as long as its tap.
#[test]
fn a_network_stays_for_a_command_that_goes_on_in_the_background() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        "$LAB/as-user" "$LANLET" run -- sh -c '(until [ -e go ]; do sleep 0.05; done) & exit 0' >run.log 2>&1 &
        run=$!
        wait_for run.log 'its tap is still open'
        say helper="$(pgrep -c -f '[n]etns-helper')"
        touch go
        wait $run
        say status=$?
        # One that fails has nothing to stay for.
        "$LAB/as-user" "$LANLET" run -- sh -c 'sleep 60 & exit 7' >/dev/null 2>&1
        say failed=$?
        printf '#!/bin/sh\necho ran\n' >qemu
        chmod +x qemu
        lanlet qemu --qemu ./qemu -- -daemonize 2>private.log
        say private=$? remedy="$(grep -c "lanlet up -d' first" private.log)"
        network
        lanlet qemu --qemu ./qemu --name default -- -daemonize >shared.log 2>&1
        say shared=$? ran="$(cat shared.log)"
        lanlet qemu --qemu ./qemu --name default -p 2222:22 -- -daemonize 2>forwards.log
        say forwards=$? forward_remedy="$(grep -c 'lanlet forward add' forwards.log)"
        "#,
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("helper", "1"),
            ("status", "0"),
            ("failed", "7"),
            ("private", "2"),
            ("remedy", "1"),
            ("shared", "0"),
            ("ran", "ran"),
            ("forwards", "2"),
            ("forward_remedy", "1"),
        ],
    );
}

/// The program is its own helper: under another name, beside no other, deleted while it runs, and where a
/// directory of PATH can't be read.
#[test]
fn a_renamed_or_deleted_program_attaches_a_vm() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        mkdir bin secret
        chmod 0 secret
        cp "$LANLET" bin/lanlet-1.2
        renamed() { user env PATH="$TMP/secret:/usr/bin:/bin" "$TMP/bin/lanlet-1.2" "$@"; }
        renamed run -- sh -c 'exit $((LANLET_FD < 3))'
        say private=$?
        "$LAB/as-user" env PATH="$TMP/secret:/usr/bin:/bin" "$TMP/bin/lanlet-1.2" up >up.log 2>&1 &
        until_true 10 renamed status
        rm bin/lanlet-1.2
        lanlet run --name default -- sh -c 'exit $((LANLET_FD < 3))'
        say deleted=$?
        lanlet exec --name default -- true
        say exec=$?
        cat up.log >&2
        "#,
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[("private", "0"), ("deleted", "0"), ("exec", "0")],
    );
}

/// What a log line begins with, what -q and -vv do to the log, and that a worker which waits for the log's
/// reader holds up no end.
#[test]
fn the_log_says_when_and_what_and_holds_nothing_up() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        time='^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z lanlet: '
        network -vv
        # For a port of the gateway where nobody listens.
        lanlet exec --name default -- bash -c 'echo x >/dev/udp/192.168.122.1/4242; ping -c 1 192.168.122.1'
        lanlet down 2>/dev/null
        say timed="$(grep -cE "${time}network 'default' is ending: asked to by pid" up.log)"
        say refused="$(grep -cE 'refused: port [0-9]+: [a-z_]+: .*UDP 192.168.122.[0-9]+ [0-9]+ > 192.168.122.1 4242' up.log)"
        # Quiet: nothing at all of a network that comes and goes.
        network -q
        lanlet -q down
        wait $NETWORK
        say quiet="$(wc -c <up.log)"
        # The journal has its own time.
        touch journal
        stream=$(stat -c %d:%i journal)
        "$LAB/as-user" env JOURNAL_STREAM="$stream" "$LANLET" up >/dev/null 2>>journal &
        until_true 10 lanlet status
        lanlet down 2>/dev/null
        wait $!
        say journal="$(grep -c "^lanlet: network 'default' is ending" journal)"
        # Nobody reads the log: the pipe fills, and a worker waits in it.
        mkfifo pipe
        sleep 60 <>pipe &
        "$LAB/as-user" "$LANLET" up -vv >up.log 2>pipe &
        up=$!
        until_true 10 lanlet status
        "$LAB/as-user" "$LANLET" exec --name default -- bash -c '
            while :; do echo x >/dev/udp/192.168.122.1/4242; done' >/dev/null 2>&1 &
        until_true 20 sh -c "grep -q pipe_write /proc/$up/task/*/wchan"
        say stuck="$(grep -l pipe_write /proc/$up/task/*/wchan | wc -l)"
        start=$(date +%s%N)
        kill -TERM $up
        wait $up
        say status=$? ms=$((($(date +%s%N) - start) / 1000000))
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_said(
        &outcome,
        &[
            ("timed", "1"),
            ("quiet", "0"),
            ("journal", "1"),
            ("status", "1"),
        ],
    );
    let markers = outcome.markers();
    assert!(markers.number("refused") >= 1.0, "{}", outcome.text());
    assert!(markers.number("stuck") >= 1.0, "{}", outcome.text());
    assert!(markers.number("ms") < 20_000.0, "{}", outcome.text());
}

/// `up` says at its start what guests will find missing, and `check` what it means for each command.
#[test]
fn what_is_missing_is_said_at_the_start_and_by_command() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        verdicts() {
            python3 -c "import json, sys; c = json.load(sys.stdin)['commands']; print(','.join(
                '{}:{}'.format(x['command'].replace(' ', ''), x['verdict']) for x in c if x['command'] in ('up', 'run', 'exec', 'run --vhost-user')))"
        }
        network
        say clean="$(grep -c "can't attach guests" up.log)"
        lanlet down 2>/dev/null
        say good="$(lanlet check --json | verdicts)"
        mount -t tmpfs none /dev/net
        network
        say warned="$(grep -c "warning: 'run', 'qemu' and 'exec' can't attach guests here.*modprobe tun" up.log)"
        lanlet check --json >check.json
        say status=$? bad="$(verdicts <check.json)"
        "#,
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("clean", "0"),
            ("warned", "1"),
            ("status", "1"),
            ("bad", "up:note,run:fail,run--vhost-user:note,exec:fail"),
        ],
    );
}

/// A network that is stopped, killed or replaced comes back with its guests: the same addresses, and answers
/// within seconds. A VMM's port, here held by a program that answers ARP on the tap, too.
#[test]
fn guests_outlive_a_restart_of_their_network() {
    let world = World::new().limit(std::time::Duration::from_secs(120));
    let Some(outcome) = scenario(
        &world,
        r#"
        outside python3 peer.py serve_echo 7002 &
        listening tcp 7002 outside
        network --lease-file leases
        "$LAB/as-user" "$LANLET" exec --name default --guest-name web -p 8080:80 -- bash -c '
            python3 peer.py serve_echo 80 & echo "@@LANLET address=$(hostname -I)"; wait' >web.log 2>&1 &
        web=$!
        wait_for web.log address=
        "$LAB/as-user" "$LANLET" run --name default --guest-name vm -- python3 peer.py tap_station >vm.log 2>&1 &
        vm=$!
        wait_for vm.log ready
        "$LAB/as-user" "$LANLET" run --name default --guest-name vhost --vhost-user=vhost.sock -- sleep 600 >vhost.log 2>&1 &
        vhost=$!
        until_true 10 test -S vhost.sock
        until_true 10 status_is "len(s['ports'])" 4
        guests() { status_of "';'.join(sorted('{}:{}'.format(p['name'], p['kind']) for p in s['ports'] if p['name'] != 'gateway'))"; }
        # Outside to guest by the forward, guest to guest, and the VMM's station from another guest.
        works() {
            outside timeout 1 bash -c 'exec 3<>/dev/tcp/198.51.100.1/8080; echo hi >&3; read -r line <&3; [ "$line" = hi ]'
        }
        station() {
            lanlet exec --name default -- timeout 1 ping -c 1 -W 1 192.168.122.250
        }
        until_true 10 works || fail "the forward does not work at first"
        until_true 10 station || fail "the station does not answer at first"
        before="$(guests)"
        for signal in TERM KILL; do
            kill -$signal $NETWORK
            wait $NETWORK 2>/dev/null
            until_true 10 sh -c "[ \$(cat web.log vm.log vhost.log | grep -c 'has ended; the command goes on') = $((3 * (${round:-0} + 1))) ]"
            round=$((${round:-0} + 1))
            # At last one that knows of no leases.
            network --lease-file "$([ $signal = TERM ] && echo leases || echo none)"
            start=$(date +%s%N)
            until_true 20 works
            say works=$? works_ms=$((($(date +%s%N) - start) / 1000000))
            until_true 20 status_is "len(s['ports'])" 4
            say back_ms=$((($(date +%s%N) - start) / 1000000)) same="$([ "$(guests)" = "$before" ] && echo yes)"
            until_true 20 station
            say station=$?
            say lease="$(status_of "','.join(l['address'] for l in s['leases'])" | grep -o "$(grep -o '192[0-9.]*' web.log)")"
        done
        say address="$(grep -o '192[0-9.]*' web.log)"
        kill $web $vm $vhost
        until_true 20 status_is "len(s['ports'])" 1
        say left="$(status_of "len(s['ports'])")" files="$(ls vhost.sock 2>/dev/null)"
        cat web.log vm.log vhost.log up.log >&2
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let all = |key: &str, value: &str| {
        assert_eq!(
            outcome.markers().all(key),
            [value, value],
            "{key}: {}",
            outcome.text()
        );
    };
    all("works", "0");
    all("same", "yes");
    all("station", "0");
    let address = outcome.markers().get("address").unwrap_or("?").to_owned();
    all("lease", &address);
    assert_said(&outcome, &[("left", "1"), ("files", "")]);
    for ms in outcome.markers().all("works_ms") {
        // Some hundred where nothing else runs.
        assert!(ms.parse::<u32>().unwrap() < 15_000, "{}", outcome.text());
    }
}

/// A network that comes back without the guest's address takes it all the same, and the guest is told.
#[test]
fn a_guest_is_attached_again_where_its_address_is_refused() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        network --subnet 10.9.0.0/24
        "$LAB/as-user" "$LANLET" exec --name default -- sh -c 'echo ready; exec sleep 60' >guest.log 2>&1 &
        guest=$!
        wait_for guest.log ready
        kill -TERM $NETWORK
        wait $NETWORK
        network --subnet 10.8.0.0/24
        wait_for guest.log 'start the command again$'
        say ports="$(status_of "len(s['ports'])")" told="$(grep -c 'means the guest to be 10.8.0.*it stays 10.9.0' guest.log)"
        kill $guest
        cat guest.log >&2
        "#,
    ) else {
        return;
    };
    assert_said(&outcome.passed(), &[("ports", "2"), ("told", "1")]);
}
