//! What stops lanlet, and what it says then: the cause, the remedy, and exit status 1.
//! Wrong command lines and directories that can't be trusted are in tests/cli.rs.

use crate::common::{Outcome, World};
use crate::scenario;

/// try NAME CMD...: the status, and the error with blanks as underscores, without what was logged before.
const TRY: &str = r#"
try() {
    local name=$1 status=0 text
    shift
    text=$("$@" 2>&1 >/dev/null) || status=$?
    say "$name=$status" "$name.says=$(echo "$text" | sed -n '/^lanlet: error: /,$p' | tr -s ' \n' _)"
}
"#;

#[track_caller]
fn assert_refused(outcome: &Outcome, name: &str, says: &[&str]) {
    let markers = outcome.markers();
    assert_eq!(markers.get(name), Some("1"), "{name}: {}", outcome.text());
    let text = markers.get(&format!("{name}.says")).unwrap_or_default();
    assert!(
        text.contains("lanlet:_error:_"),
        "{name}: {}",
        outcome.text()
    );
    for words in says {
        let words = words.replace(' ', "_");
        assert!(text.contains(&words), "{name} lacks {words}: {text}");
    }
}

#[test]
fn directories_that_cannot_be_written() {
    let Some(outcome) = scenario(
        &World::new(),
        &format!(
            "{TRY}{}",
            r#"
            mkdir closed && chmod 555 closed
            try new user env LANLET_RUNTIME_DIR="$PWD/closed/lanlet" "$LANLET" up
            try old user env LANLET_RUNTIME_DIR="$PWD/closed" "$LANLET" up
            try state user env XDG_STATE_HOME="$PWD/closed" "$LANLET" up
            # None of them is needed for a network of the command's own.
            try exec user env LANLET_RUNTIME_DIR="$PWD/closed" XDG_STATE_HOME="$PWD/closed" "$LANLET" exec -- true
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    for name in ["new", "old"] {
        assert_refused(
            &outcome,
            name,
            &["closed", "Permission denied", "LANLET_RUNTIME_DIR"],
        );
    }
    assert_refused(
        &outcome,
        "state",
        &["closed", "Permission denied", "--lease-file"],
    );
    assert_eq!(
        outcome.markers().get("exec"),
        Some("0"),
        "{}",
        outcome.text()
    );
}

#[test]
fn no_tun_device() {
    let Some(outcome) = scenario(
        &World::new(),
        &format!(
            "{TRY}{}",
            r#"
            both() { # both NAME CMD: without the device, as CMD has it
                local hidden="$2; exec \"$LAB/as-user\" \"$LANLET\""
                try $1_exec unshare --mount bash -c "$hidden exec -- true"
                try $1_run unshare --mount bash -c "$hidden run -- true"
                try $1_plain unshare --mount bash -c "$hidden exec --no-offload -- true"
            }
            both missing 'mount -t tmpfs none /dev/net'
            both hidden 'mount --bind /dev/null /dev/net/tun'
            # A file that belongs to somebody else.
            both denied 'mount --bind /etc/shadow /dev/net/tun'
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    for command in ["exec", "run", "plain"] {
        for how in ["missing", "hidden"] {
            let name = format!("{how}_{command}");
            assert_refused(&outcome, &name, &["/dev/net/tun", "modprobe tun"]);
        }
        let name = format!("denied_{command}");
        assert_refused(&outcome, &name, &["/dev/net/tun", "chmod 0666"]);
    }
}

#[test]
fn namespaces_are_forbidden() {
    let Some(outcome) = scenario(
        &World::new(),
        &format!(
            "{TRY}{}",
            r#"
            # The user is in its namespace already when its parent's root forbids more.
            cat >tries.sh <<'END'
            forbid() { echo "$1" >now; until [ "$(cat done)" = "$1" ]; do sleep 0.02; done; }
            for kind in user net mnt; do
                forbid $kind
                try ${kind}_exec "$LANLET" exec -- true
                try ${kind}_run "$LANLET" run -- true
            done
END
            declare -f say try >functions
            touch now done
            "$LAB/as-user" bash -c '. ./functions; . ./tries.sh; echo end >now' &
            before=$(cat /proc/sys/user/max_user_namespaces)
            until [ "$(cat now)" = end ]; do
                kind=$(cat now)
                if [ "$kind" != "$(cat done)" ]; then
                    for each in user net mnt; do echo "$before" >/proc/sys/user/max_${each}_namespaces; done
                    [ -z "$kind" ] || echo 0 >/proc/sys/user/max_${kind}_namespaces
                    echo "$kind" >done
                fi
                sleep 0.02
            done
            wait $!
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    for kind in ["user", "net", "mnt"] {
        let sysctl = format!("user.max_{kind}_namespaces");
        assert_refused(&outcome, &format!("{kind}_exec"), &["namespaces", &sysctl]);
        // The helper mounts nothing.
        if kind != "mnt" {
            assert_refused(&outcome, &format!("{kind}_run"), &["namespaces", &sysctl]);
        }
    }
}

#[test]
fn names_macs_and_addresses_that_are_taken() {
    let Some(outcome) = scenario(
        &World::new(),
        &format!(
            "{TRY}{}",
            r#"
            network --subnet 10.9.8.0/29
            try name lanlet up
            try option lanlet exec --subnet 10.0.0.0/24 -- true
            "$LAB/as-user" "$LANLET" exec --name default --mac 52:54:00:00:00:01 -- sh -c 'echo ready; sleep 30' >first &
            wait_for first ready
            before="$(status_of "s['leases']")"
            try mac lanlet exec --name default --mac 52:54:00:00:00:01 -- true
            # The guest that has it keeps it, and its address.
            say kept="$([ "$before" = "$(status_of "s['leases']")" ] && echo yes)" ports="$(status_of "len(s['ports'])")"
            for guest in 2 3 4 5; do
                "$LAB/as-user" "$LANLET" exec --name default -- sh -c 'echo ready; sleep 30' >guest.$guest &
                wait_for guest.$guest ready
            done
            try address lanlet exec --name default -- true
            say ports_full="$(status_of "len(s['ports'])")" leases_full="$(status_of "len(set(l['address'] for l in s['leases']))")"
            kill -KILL $!
            until_true 10 lanlet exec --name default -- true
            say free=$?
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_refused(&outcome, "name", &["already running (pid", "--name"]);
    assert_refused(&outcome, "option", &["already running (pid", "--subnet"]);
    assert_refused(&outcome, "mac", &["52:54:00:00:00:01", "--mac"]);
    assert_refused(&outcome, "address", &["--dhcp-range", "--subnet"]);
    crate::assert_said(
        &outcome,
        &[
            ("kept", "yes"),
            ("ports", "2"),
            ("ports_full", "6"),
            ("leases_full", "5"),
            ("free", "0"),
        ],
    );
}
