//! Namespaces that are there already: `lanlet exec --into` and `lanlet join`.
//!
//! Who enters a namespace has to be below it: everything of a scenario's user runs in one user namespace.

use crate::common::World;
use crate::{assert_said, scenario};

#[test]
fn a_command_runs_beside_that_of_a_guest() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        network
        cat >user.sh <<'END'
        say() { echo "@@LANLET $*"; }
        wait_for() { for _ in $(seq 200); do grep -q "$2" "$1" 2>/dev/null && return; sleep 0.05; done; exit 9; }
        "$LANLET" exec --guest-name web sh -c 'ip -4 -o address show dev eth0; echo ready; exec sleep 60' >web &
        web=$!
        "$LANLET" exec --root --guest-name boss sh -c 'echo ready; exec sleep 60' >boss &
        wait_for web ready
        wait_for boss ready
        address=$(grep -o 'inet [0-9.]*' web | cut -d' ' -f2)
        look='echo $(ip -4 -o address show dev eth0 | grep -o "inet [0-9.]*" | cut -d" " -f2),$(id -u),$(pwd),$(grep -c nameserver /etc/resolv.conf),$(ip link set dev lo mtu 60000 && echo may)'
        say want="$address,1000,$(pwd),1,may"
        say by_name="$("$LANLET" exec --into WEB sh -c "$look")"
        say by_address="$("$LANLET" exec --into $address -- sh -c "$look")"
        say root="$("$LANLET" exec --into boss id -u)"
        "$LANLET" exec --into web sh -c 'exit 7'; say status=$?
        "$LANLET" exec --into nobody true 2>error; say missing=$? told="$(grep -c 'no guest is called nobody' error)"
        "$LANLET" exec --into web --mac 52:54:00:00:00:01 true 2>/dev/null; say conflict=$?
        # Its process has ended: nothing is entered, whatever has its number.
        kill %1
        wait $web
        "$LANLET" exec --into web true 2>/dev/null; say ended=$?
END
        user bash user.sh
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let want = markers.get("want").expect("an address");
    assert_said(
        &outcome,
        &[
            ("by_name", want),
            ("by_address", want),
            ("root", "0"),
            ("status", "7"),
            ("missing", "1"),
            ("told", "1"),
            ("conflict", "2"),
            ("ended", "1"),
        ],
    );
}

#[test]
fn a_namespace_that_is_there_becomes_a_guest() {
    let Some(outcome) = scenario(
        &World::new().with(&["--dns"]),
        r#"
        network
        cat >user.sh <<'END'
        say() { echo "@@LANLET $*"; }
        wait_for() { for _ in $(seq 200); do grep -q "$2" "$1" 2>/dev/null && return; sleep 0.05; done; cat "$1" >&2; exit 9; }
        until_gone() { for _ in $(seq 200); do inside ip link show dev "$1" >/dev/null 2>&1 || return 0; sleep 0.05; done; return 1; }
        inside() { nsenter --target $owner --user --preserve-credentials --net -- "$@"; }
        unshare --user --map-root-user --net sleep 60 &
        owner=$!
        until [ "$(readlink /proc/$owner/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.02; done
        "$LANLET" join --guest-name old $owner >joined 2>join.err &
        join=$!
        wait_for joined '^eth0 of'
        say outside="$(inside dig +short +time=3 @192.168.122.1 second.test)"
        say guest="$("$LANLET" status --json | grep -q '"old"' && echo 1)"
        say into="$("$LANLET" exec --into old ip -br link show dev eth0 | cut -d' ' -f1)"
        "$LANLET" join $owner 2>error; say again=$? told="$(grep -c -- --ifname error)"
        # A second one beside it: the default route stays.
        "$LANLET" join --ifname lab1 $owner >joined2 2>join2.err &
        second=$!
        wait_for joined2 '^lab1 of'
        say second="$(inside ip -br -4 address show dev lab1 | grep -c 192.168.122)" routes="$(inside ip route show default | wc -l)"
        kill $second; wait $second; say killed=$?
        until_gone lab1 && say lab1=gone
        "$LANLET" join 4000000 2>/dev/null; say nobody=$?
        "$LANLET" join /etc/passwd 2>/dev/null; say no_namespace=$?
        "$LANLET" join --ifname a/b $owner 2>/dev/null; say no_name=$?
        # It ends with the process, and by its path with the path.
        kill $owner; wait $join; say ended=$?
        unshare --user --map-root-user --net --mount sh -c '
            touch net && mount --bind /proc/self/ns/net net && echo $$ >owner && exec sleep 60' &
        wait_for owner .
        owner=$(cat owner)
        "$LANLET" join /proc/$owner/root$PWD/net >joined3 2>join3.err &
        join=$!
        wait_for joined3 '^eth0 of'
        say path="$(inside ip -br -4 address show dev eth0 | grep -c 192.168.122)"
        # It outlives its network, and takes the link along.
        "$LANLET" down >/dev/null
        wait_for join3.err 'has ended'
        inside ip link show dev eth0 >/dev/null && say kept=yes
        kill $join; wait $join; say network=$?
        until_gone eth0 && say eth0=gone
END
        user bash user.sh
        "#,
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("outside", "203.0.113.1"),
            ("guest", "1"),
            ("into", "eth0"),
            ("again", "1"),
            ("told", "1"),
            ("second", "1"),
            ("routes", "1"),
            ("killed", "0"),
            ("lab1", "gone"),
            ("nobody", "1"),
            ("no_namespace", "1"),
            ("no_name", "2"),
            ("ended", "0"),
            ("path", "1"),
            ("kept", "yes"),
            ("network", "0"),
            ("eth0", "gone"),
        ],
    );
}
