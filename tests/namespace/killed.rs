//! SIGKILL of each of lanlet's processes: what depended on it ends, and the next start finds nothing
//! in its way.

use crate::common::World;
use crate::{assert_said, scenario};

/// What lanlet leaves in the system, counted where everything of the world is visible.
const COUNT: &str = r#"
processes() { pgrep -c -f 'netns-helper|guest-init|child-init|[l]anlet (up|exec|run)' || true; }
namespaces() { readlink /proc/[0-9]*/ns/net /proc/[0-9]*/ns/user | sort -u | wc -l; }
# Nothing but what was there before.
gone() { [ "$(processes)" = 0 ] && [ "$(namespaces)" = "$namespaces" ]; }
namespaces=$(namespaces)
vmm() { # vmm OPTION...: a port of a VMM, held open by a process that sleeps
    "$LAB/as-user" "$LANLET" run --name default -- sh -c 'echo ready; exec sleep 60 <&$LANLET_FD' >vmm.log 2>&1 &
    wait_for vmm.log ready
}
"#;

#[test]
fn a_network_killed_leaves_nothing() {
    let Some(outcome) = scenario(
        &World::new(),
        &format!(
            "{COUNT}{}",
            r#"
            network
            vmm
            vmm_pid=$!
            "$LAB/as-user" "$LANLET" exec --name default -- sh -c 'echo ready; exec sleep 60' >guest.log 2>&1 &
            guest=$!
            wait_for guest.log ready
            say ports="$(status_of "','.join(p['kind'] for p in s['ports'])")" helpers="$(pgrep -c -f netns-helper)"
            kill -KILL $NETWORK
            wait $NETWORK 2>/dev/null
            # The helper goes with it; the guests' commands go on, without a network.
            until_true 10 sh -c '! pgrep -f [n]etns-helper'
            say helpers_left="$(pgrep -c -f '[n]etns-helper')"
            say guests="$(kill -0 $vmm_pid && kill -0 $guest && echo live)"
            say told="$(grep -c "network 'default' has ended" vmm.log guest.log | cut -d: -f2 | tr '\n' ,)"
            # At once, on the same name.
            start=$(date +%s%N)
            network
            say ms=$((($(date +%s%N) - start) / 1000000))
            say next="$(lanlet exec --name default -- ping -c 1 -W 2 192.168.122.1 >/dev/null && echo works)"
            kill -KILL $vmm_pid $guest $NETWORK
            until_true 10 gone
            say processes="$(processes)" namespaces=$(($(namespaces) - namespaces))
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_said(
        &outcome,
        &[
            ("ports", "gateway,vmm,namespace"),
            ("helpers", "1"),
            ("helpers_left", "0"),
            ("guests", "live"),
            ("told", "1,1,"),
            ("next", "works"),
            ("processes", "0"),
            ("namespaces", "0"),
        ],
    );
    assert!(
        outcome.markers().number("ms") < 2000.0,
        "{}",
        outcome.text()
    );
}

#[test]
fn a_command_killed_takes_its_own_network_along() {
    let Some(outcome) = scenario(
        &World::new(),
        &format!(
            "{COUNT}{}",
            r#"
            for round in 1 2; do
                "$LAB/as-user" "$LANLET" exec -- sh -c 'echo ready; exec sleep 61' >exec.log 2>&1 &
                exec=$!
                wait_for exec.log ready
                "$LAB/as-user" "$LANLET" run -- sh -c 'echo ready; exec sleep 61' >run.log 2>&1 &
                run=$!
                wait_for run.log ready
                say running="$(pgrep -c -f '^[s]leep 61')" helpers="$(pgrep -c -f '[n]etns-helper')"
                kill -KILL $exec $run
                wait $exec $run 2>/dev/null
                until_true 10 gone
                say commands="$(pgrep -c -f '^[s]leep 61')" processes="$(processes)" namespaces=$(($(namespaces) - namespaces))
                rm -f exec.log run.log
            done
            # The sockets of killed ones go when the next one starts.
            lanlet exec -- true
            say files="$(find "$XDG_RUNTIME_DIR" -type s | wc -l)"
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_eq!(
        outcome.markers().all("running"),
        ["2", "2"],
        "{}",
        outcome.text()
    );
    assert_said(
        &outcome,
        &[
            ("helpers", "1"),
            ("commands", "0"),
            ("processes", "0"),
            ("namespaces", "0"),
            ("files", "0"),
        ],
    );
}

/// Only the VMMs' ports depend on the helper, and the next VMM gets a fresh one.
#[test]
fn a_killed_helper_is_replaced() {
    let Some(outcome) = scenario(
        &World::new(),
        &format!(
            "{COUNT}{}",
            r#"
            network
            "$LAB/as-user" "$LANLET" exec --name default -- sh -c 'echo ready; until [ -e go ]; do sleep 0.02; done
                ping -c 1 -W 2 192.168.122.1 >/dev/null; echo "@@LANLET guest=$?"; exec sleep 60' >guest.log 2>&1 &
            guest=$!
            wait_for guest.log ready
            vmm
            first=$!
            kill -KILL "$(pgrep -f '[n]etns-helper')"
            until_true 10 status_is "len(s['ports'])" 2
            say after="$(status_of "','.join(p['kind'] for p in s['ports'])")" warned="$(grep -c 'helper' up.log)"
            touch go
            wait_for guest.log guest=
            cat guest.log
            rm vmm.log
            vmm
            say again="$(status_of "','.join(p['kind'] for p in s['ports'])")"
            lanlet down --name default
            say down=$?
            kill -KILL $guest $first $!
            until_true 10 gone
            say processes="$(processes)" namespaces=$(($(namespaces) - namespaces))
            "#
        ),
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("after", "gateway,namespace"),
            ("warned", "1"),
            ("guest", "0"),
            ("again", "gateway,namespace,vmm"),
            ("down", "0"),
            ("processes", "0"),
            ("namespaces", "0"),
        ],
    );
}
