//! Addresses that fail, and how: a guest must see what the host would see, at once.

use crate::common::World;
use crate::{assert_said, scenario};

/// "At once", on a machine that is busy with other tests. A connection that hangs takes seconds.
const AT_ONCE_MS: f64 = 1000.0;

#[test]
fn a_closed_port_refuses_and_never_accepts() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        lanlet exec -- python3 peer.py watch sh -c '
            python3 peer.py try_connect 198.51.100.2 9
            nc -w 3 198.51.100.2 9; echo "@@LANLET nc=$?"
            curl -s http://198.51.100.2:9/; echo "@@LANLET curl=$?"'
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_said(
        &outcome,
        &[
            ("result", "ECONNREFUSED"),
            ("nc", "1"),
            // CURLE_COULDNT_CONNECT; a reset would be 56.
            ("curl", "7"),
            ("syn", "3"),
            ("syn_ack", "0"),
            ("rst_ack", "3"),
            ("other", "0"),
        ],
    );
    assert!(
        outcome.markers().number("ms") < AT_ONCE_MS,
        "{}",
        outcome.text()
    );
}

#[test]
fn unreachable_addresses_fail_as_for_the_host() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        cat >try.sh <<'END'
        for address in 198.51.100.99 192.0.2.1 203.0.113.33 203.0.113.65 10.1.1.1; do
            echo "@@LANLET address=$address"
            python3 peer.py try_connect $address 80
        done
END
        lanlet exec -- sh try.sh
        echo "@@LANLET host=1"
        sh try.sh
        # Somebody swallows it: no answer is made up.
        lanlet exec -- python3 peer.py try_connect 203.0.113.97 80 2.5
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let results = markers.all("result");
    assert_eq!(
        results,
        [
            // The guest,
            "EHOSTUNREACH",
            "EHOSTUNREACH",
            "EHOSTUNREACH",
            "EHOSTUNREACH",
            "ENETUNREACH",
            // the host,
            "EHOSTUNREACH",
            "EHOSTUNREACH",
            "EHOSTUNREACH",
            "EHOSTUNREACH",
            "ENETUNREACH",
            // and the one that is swallowed.
            "timeout",
        ],
        "{}",
        outcome.text()
    );
    // The host's own are not timed: `outside` sends one host no more than five errors in a row and one
    // a second after that (ip_rt_error_burst).
    for (address, ms) in markers.all("address").iter().zip(markers.all("ms")).take(5) {
        let ms: f64 = ms.parse().expect("a number");
        assert!(ms < AT_ONCE_MS, "{address}: {}", outcome.text());
    }
}

/// The kind of ICMP error, by its type and code on the wire: a guest's kernel makes the same errno of
/// several.
#[test]
fn the_icmp_error_is_about_the_guests_packet() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        lanlet exec -- python3 peer.py watch sh -c '
            for address in 192.0.2.1 203.0.113.33 203.0.113.65 10.1.1.1; do
                python3 peer.py try_connect $address 4321
            done'
        "#,
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("icmp", "3/1:4321,3/1:4321,3/1:4321,3/0:4321"),
            ("syn", "4"),
        ],
    );
}
