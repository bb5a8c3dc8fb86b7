//! The LAN's subnets where nobody chose them: what the host or a LAN around it uses is passed over.

use crate::common::World;
use crate::{assert_said, scenario};

#[test]
fn the_hosts_networks_are_passed_over_and_leases_stay() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        address() { lanlet exec --name default --mac 52:54:00:00:00:07 -- ip -4 -o address show eth0 | awk '{print $4}'; }
        start() { network --lease-file "$TMP/leases"; say "$1"="$(status_of "s['subnet']")" "$1_guest=$(address)"; }
        stop() { kill -TERM $NETWORK; wait $NETWORK; }
        start alone; stop
        # libvirt's bridge without a guest has no carrier, and before its first start it is down.
        ip link add virbr0 type bridge
        ip address add 192.168.122.1/24 dev virbr0
        start down; stop
        ip link set virbr0 up
        start up
        say warned="$(grep -c 'has addresses of the host' up.log)" ipv6="$(status_of "s['ipv6']['subnet']")"
        stop
        # It is gone, and the network stays where it was.
        ip link del virbr0
        start gone; stop
        # A VPN's.
        ip route add 192.168.128.0/17 via 198.51.100.2
        start vpn; stop
        ip route del 192.168.128.0/17
        # Who says so gets it; and what was leased there is remembered.
        network --lease-file "$TMP/leases" --subnet 192.168.122.0/24
        say chosen_guest="$(address)"
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    assert_said(&outcome, &[("alone", "192.168.122.0/24"), ("warned", "0")]);
    let down = markers.get("down").unwrap();
    assert!(down != "192.168.122.0/24", "{}", outcome.text());
    assert_said(&outcome, &[("up", down), ("gone", down)]);
    let guest = markers.get("down_guest").unwrap();
    assert_said(&outcome, &[("up_guest", guest), ("gone_guest", guest)]);
    assert_said(&outcome, &[("vpn", "192.168.122.0/24")]);
    let alone = markers.get("alone_guest");
    assert_eq!(markers.get("vpn_guest"), alone);
    assert_eq!(markers.get("chosen_guest"), alone);
}

#[test]
fn a_lan_inside_a_guest_is_another_one() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        cat >look.sh <<'END'
        say() { echo "@@LANLET $*"; }
        of() { ip "-$1" -o address show dev eth0 scope global | awk '{print $4}' | head -1; }
END
        lanlet exec -- bash -c '. ./look.sh
            say outer4="$(of 4)" outer6="$(of 6)"
            "$LANLET" exec -- bash -c ". ./look.sh; say inner4=\$(of 4) inner6=\$(of 6)
                ping -c 1 -W 5 192.168.122.1 >/dev/null; say ping=\$?"'
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let network = |key: &str, octets: usize| {
        let text = markers
            .get(key)
            .unwrap_or_else(|| panic!("{key}: {}", outcome.text()));
        text.split(['.', ':'])
            .take(octets)
            .collect::<Vec<_>>()
            .join(".")
    };
    assert_eq!(network("outer4", 3), "192.168.122");
    assert_ne!(network("inner4", 3), "192.168.122");
    assert_ne!(network("outer6", 4), network("inner6", 4));
}
