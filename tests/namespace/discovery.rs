//! What the standard client of RFC 5780 finds out about the NAT is what the network was told to be.

use std::time::Duration;

use crate::common::World;
use crate::{assert_said, scenario};

/// As the options name them, and as `turnutils_natdiscovery` does.
const BEHAVIOURS: [(&str, &str); 3] = [
    ("endpoint-independent", "Endpoint_Independent"),
    ("address-dependent", "Address_Dependent"),
    ("address-and-port-dependent", "Address_and_Port_Dependent"),
];

/// Said by a guest: the words that decide, for each family mapping and then filtering.
const DISCOVER: &str = r#"
cat >discover.sh <<'END'
for server in 198.51.100.2 2001:db8:1::2; do
    for what in m f; do
        echo "@@LANLET $1=$(turnutils_natdiscovery -$what $server | sed -n 's/^NAT with \(.*\)!/\1/p' | tr ' ' _)"
    done
done
END
"#;

fn words(mapping: &str, filtering: &str) -> Vec<String> {
    let once = [
        format!("{mapping}_Mapping"),
        format!("{filtering}_Filtering"),
    ];
    [once.clone(), once].concat()
}

/// Each mapping with each filtering, by each family.
#[test]
fn discovery_finds_what_was_chosen() {
    let runs: String = BEHAVIOURS
        .iter()
        .flat_map(|(mapping, _)| BEHAVIOURS.iter().map(move |(filtering, _)| (mapping, filtering)))
        .map(|(mapping, filtering)| {
            format!(
                "lanlet exec --udp-mapping {mapping} --udp-filtering {filtering} -- sh discover.sh {mapping}/{filtering} &\n"
            )
        })
        .collect();
    let world = World::new()
        .with(&["--stun"])
        .limit(Duration::from_secs(100));
    let Some(outcome) = scenario(&world, &format!("{DISCOVER}{runs}wait $(jobs -p)")) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    for (mapping, mapping_words) in BEHAVIOURS {
        for (filtering, filtering_words) in BEHAVIOURS {
            assert_eq!(
                markers.all(&format!("{mapping}/{filtering}")),
                words(mapping_words, filtering_words),
                "{mapping}/{filtering}: {}",
                outcome.text()
            );
        }
    }
}

/// The default maps independently of the endpoint and keeps the guest's port where it is free
/// (RFC 4787 REQ-1, REQ-3); any port of an address that the guest wrote to may answer (REQ-8).
#[test]
fn the_default_keeps_the_port() {
    let Some(outcome) = scenario(
        &World::new().with(&["--stun"]),
        &format!(
            "{DISCOVER}{}",
            r#"
            network
            lanlet exec --name default -- sh discover.sh default
            cat >port.sh <<'END'
            four=$(ip -4 -o address show dev eth0 | awk '{sub("/.*", "", $4); print $4}')
            six=$(ip -6 -o address show dev eth0 scope global | awk '{sub("/.*", "", $4); print $4; exit}')
            for pair in "$four 198.51.100.2" "$six 2001:db8:1::2"; do
                echo "@@LANLET $1=$(turnutils_natdiscovery -m -L ${pair% *} -l 62000 ${pair#* } |
                    sed -n 's/.*UDP reflexive addr: //p' | sort -u | tr '\n' ,)"
            done
END
            lanlet exec --name default -- sh port.sh kept
            # Taken: by a server of the host, which goes on to get what is sent to it.
            python3 -c "
import socket, time
for family, any in (socket.AF_INET, '0.0.0.0'), (socket.AF_INET6, '::'):
    taken = socket.socket(family, socket.SOCK_DGRAM)
    family == socket.AF_INET6 and taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    taken.bind((any, 62000)); globals()[any] = taken
time.sleep(60)" &
            listening udp 62000
            lanlet exec --name default -- sh port.sh taken
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    assert_eq!(
        markers.all("default"),
        words(BEHAVIOURS[0].1, BEHAVIOURS[1].1),
        "{}",
        outcome.text()
    );
    assert_eq!(
        markers.all("kept"),
        ["198.51.100.1:62000,", "2001:db8:1::1:62000,"],
        "{}",
        outcome.text()
    );
    for (taken, address) in markers
        .all("taken")
        .iter()
        .zip(["198.51.100.1:", "2001:db8:1::1:"])
    {
        let port = taken
            .strip_prefix(address)
            .and_then(|rest| rest.strip_suffix(','));
        assert!(
            port.is_some_and(|p| p != "62000" && p.parse::<u16>().is_ok()),
            "{}",
            outcome.text()
        );
    }
    assert_eq!(markers.all("taken").len(), 2, "{}", outcome.text());
}

#[test]
fn wrong_behaviours_are_refused() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        for option in --udp-mapping --udp-filtering; do
            lanlet exec $option symmetric -- true 2>said; say "$option=$?"
            say named="$(grep -c -- $option said)" offered="$(grep -c address-dependent said)"
        done
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_said(
        &outcome,
        &[("--udp-mapping", "2"), ("--udp-filtering", "2")],
    );
    assert_eq!(
        outcome.markers().all("offered"),
        ["1"; 2],
        "{}",
        outcome.text()
    );
    assert!(
        outcome.markers().all("named").iter().all(|n| n != "0"),
        "{}",
        outcome.text()
    );
}
