//! Either end may finish sending first, and nothing of what the other still sends is lost.

use crate::common::{Outcome, World};
use crate::scenario;

/// Both directions' data: more than every buffer on the way, and no multiple of anything.
const FILES: &str = r#"
head -c 9000001 /dev/urandom >up.bin
head -c 8500003 /dev/urandom >down.bin
say up="$(sha <up.bin)" down="$(sha <down.bin)"
"#;

#[track_caller]
fn assert_same(outcome: &Outcome, key: &str, of: &str, times: usize) {
    let markers = outcome.markers();
    let sum = markers.get(of).expect("a checksum");
    assert_eq!(
        markers.all(key),
        vec![sum; times],
        "{key}: {}",
        outcome.text()
    );
}

#[test]
fn the_guest_ends_first() {
    let Some(outcome) = scenario(
        &World::new(),
        &format!(
            "{FILES}{}",
            r#"
            outside python3 peer.py serve_answer_after_end 7001 &
            outside python3 peer.py serve_answer_after_end 7002 slow &
            listening tcp 7001 outside; listening tcp 7002 outside
            lanlet exec -- python3 peer.py send_then_read 198.51.100.2 7001 up.bin
            lanlet exec -- python3 peer.py send_then_read 198.51.100.2 7001 up.bin slow
            lanlet exec -- python3 peer.py send_then_read 198.51.100.2 7002 up.bin slow
            lanlet exec -- nc -N -w 20 198.51.100.2 7001 <up.bin >back.bin; say nc=$?
            say received="$(sha <back.bin)"
            : >nothing
            say nothing="$(lanlet exec -- nc -N -w 20 198.51.100.2 7001 <nothing | wc -c)"
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_same(&outcome, "received", "up", 4);
    assert_same(&outcome, "sent", "up", 3);
    assert_eq!(outcome.markers().get("nc"), Some("0"));
    assert_eq!(outcome.markers().get("nothing"), Some("0"));
}

#[test]
fn the_server_ends_first() {
    let Some(outcome) = scenario(
        &World::new(),
        &format!(
            "{FILES}{}",
            r#"
            network
            once() { # once PORT SLOW-SERVER SLOW-CLIENT
                outside python3 peer.py serve_end_first $1 down.bin $2 &
                local server=$!
                listening tcp $1 outside
                # A guest that ends takes what its kernel still holds with it: this one stays.
                lanlet exec --name default -- sh -c "python3 peer.py read_then_send 198.51.100.2 $1 up.bin $3
                    until [ -e ended.$1 ]; do sleep 0.02; done" &
                wait $server
                touch ended.$1
                wait $!
            }
            once 7001 '' ''
            once 7002 '' slow
            once 7003 slow ''
            once 7004 slow slow
            until_true 10 status_is "s['flows']['tcp']" 0
            say left="$(status_of "s['flows']['tcp'] + s['totals']['host_sockets']")" drops="$(drops)"
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_same(&outcome, "client_received", "down", 4);
    assert_same(&outcome, "client_sent", "up", 4);
    assert_same(&outcome, "server_sent", "down", 4);
    assert_same(&outcome, "server_received", "up", 4);
    assert_eq!(
        outcome.markers().get("left"),
        Some("0"),
        "{}",
        outcome.text()
    );
    assert_eq!(outcome.markers().get("drops"), Some("none"));
}
