//! Networks with namespace guests and real peers, in `lab/world`: what a user can rely on.
//!
//! Each test is a scenario in a world of its own, run by an unprivileged user. Python peers are in
//! `peer.py`; everything else that speaks is a program that users have (curl, dig, nc, iperf3, DHCP
//! clients).

#[path = "../common/mod.rs"]
mod common;

mod access;
mod background;
mod bulk;
mod crowd;
mod dhcp;
mod discovery;
mod endings;
mod enter;
mod errors;
mod exec;
mod faults;
mod flood;
mod forwards;
mod half_close;
mod host;
mod killed;
mod lan;
mod life;
mod machine;
mod many_flows;
mod paths;
mod policy;
mod reach;
mod refusals;
mod sockets;
mod streams;
mod subnets;
mod udp;
mod v6_lan;
mod workers;

use common::{Outcome, World};

/// Functions that only these scenarios need.
const PRELUDE: &str = r#"
# A function of peer.py: peer FUNCTION ARG...
peer() { python3 "$TMP/peer.py" "$@"; }
# A Python expression on the network's status s: status_of EXPRESSION [OPTION of lanlet status...]
status_of() {
    local expression=$1
    shift
    lanlet status --json "$@" | python3 -c "import json, sys; s = json.load(sys.stdin); print($expression)"
}
# Whether an expression on the status has a value: status_is EXPRESSION VALUE
status_is() { [ "$(status_of "$1")" = "$2" ]; }
# What was dropped anywhere, as PORT:REASON:COUNT,... or none.
drops() {
    status_of "','.join(':'.join((p['name'], k, str(v))) for p in s['ports'] for k, v in p['drops'].items() if v) or 'none'" "$@"
}
# Waits until a condition holds: until_true SECONDS CMD...
until_true() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.05
    done
}
sha() { sha256sum | cut -c1-32; }
"#;

/// Runs a scenario; `None` where worlds can't run at all, which was said.
fn scenario(world: &World, text: &str) -> Option<Outcome> {
    if let Some(reason) = common::world_missing() {
        common::skip(&reason);
        return None;
    }
    world.temp().file("peer.py", include_str!("peer.py"));
    Some(world.run(&format!("{PRELUDE}\n{text}")))
}

/// Asserts the last value of each key.
#[track_caller]
fn assert_said(outcome: &Outcome, expected: &[(&str, &str)]) {
    let markers = outcome.markers();
    for (key, value) in expected {
        assert_eq!(markers.get(key), Some(*value), "{key}: {}", outcome.text());
    }
}
