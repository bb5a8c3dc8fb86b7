//! A thousand clients of one guest at the same moment, by each family: none fails.

use std::time::Duration;

use crate::common::{World, heavy};
use crate::{assert_said, scenario};

const CLIENTS: usize = 1_000;

#[test]
fn a_thousand_curls_at_once() {
    let _alone = heavy();
    let world = World::new().limit(Duration::from_secs(200));
    world
        .temp()
        .file("peer_faults.py", include_str!("peer_faults.py"));
    let text = r#"
        network
        for address in 198.51.100.2 [2001:db8:1::2]; do
            outside python3 peer_faults.py serve_crowd 8000 CLIENTS >server.log 2>&1 &
            server=$!
            listening tcp 8000 outside
            # Each is answered when all of them wait, and by 200 with a body of its own.
            cat >crowd.sh <<'END'
            seq CLIENTS | xargs -P CLIENTS -I NUMBER sh -c \
                'curl -sS -m 60 -w "%{http_code}\n" -o "body.NUMBER" "http://'"$1"':8000/NUMBER" || echo "failed $?"' >codes 2>errors
END
            lanlet exec --name default -- sh crowd.sh "$address"
            wait $server
            cat server.log
            say good="$(grep -cx 200 codes)" bodies="$(sha256sum body.* | cut -d' ' -f1 | sort -u | wc -l)"
            say errors="$(sort errors | uniq -c | sort -rn | head -3 | tr ' \n' _,)"
            rm body.*
        done
        until_true 20 status_is "s['flows']['tcp']" 0
        say left="$(status_of "s['flows']['tcp'] + s['totals']['host_sockets']")" drops="$(drops)"
        "#
    .replace("CLIENTS", &CLIENTS.to_string());
    let Some(outcome) = scenario(&world, &text) else {
        return;
    };
    let outcome = outcome.passed();
    let count = CLIENTS.to_string();
    let markers = outcome.markers();
    for key in ["waiting", "good", "bodies"] {
        assert_eq!(
            markers.all(key),
            [count.as_str(); 2],
            "{key}: {}",
            outcome.text()
        );
    }
    assert_said(&outcome, &[("left", "0"), ("drops", "none")]);
}
