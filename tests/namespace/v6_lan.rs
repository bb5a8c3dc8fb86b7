//! IPv6 on the LAN: what the kernel, rdisc6, ndisc6 and ping make of the gateway, and what guests are
//! told of the host's own IPv6.

use crate::common::World;
use crate::{assert_said, scenario};

/// For the scenario: gives the host a way to the IPv6 outside, and takes it: host6 on|off. And what
/// guests look with, `look.sh`.
const PRELUDE: &str = r#"
host6() {
    ip -6 route del default 2>/dev/null
    [ "$1" = off ] && return
    ip -6 address replace 2001:db8:1::1/64 dev up0 nodad
    ip -6 route add default via 2001:db8:1::2
}
cat >look.sh <<'END'
say() { echo "@@LANLET $*"; }
addresses() { ip -6 -o address show dev eth0 "$@" | awk '{print $4}' | tr '\n' ,; }
routers() { ip -6 route show default | awk '{print $3}' | sort -u | tr '\n' ,; }
until_true() { # until_true SECONDS CMD...
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.05
    done
}
has_router() { [ -n "$(routers)" ]; }
has_no_router() { [ -z "$(routers)" ]; }
is_over() { [ -e over ]; }
# As a kernel is that nobody has told anything: what lanlet has set goes, and the link comes up anew.
fresh() {
    ip link set eth0 down
    echo 1 >/proc/sys/net/ipv6/conf/eth0/accept_dad
    echo 1 >/proc/sys/net/ipv6/conf/eth0/accept_ra
    echo 1 >/proc/sys/net/ipv6/conf/eth0/router_solicitation_delay
    ip link set eth0 up
}
END
GATEWAY=fd12:3456:789a:1::1
"#;

/// What the gateway's MAC, of the network's name and its IPv4 address, makes of fe80::/64.
fn link_local(outcome: &crate::common::Outcome) -> String {
    let markers = outcome.markers();
    markers.get("link_local").expect("a gateway").to_owned()
}

#[test]
fn a_command_has_ipv6_from_its_first_moment() {
    let Some(outcome) = scenario(
        &World::new(),
        &format!(
            "{PRELUDE}{}",
            r#"
            host6 on
            network --subnet6 fd12:3456:789a:1::/64
            say link_local="$(status_of "s['ipv6']['link_local']")" \
                subnet="$(status_of "s['ipv6']['subnet']")" route="$(status_of "s['ipv6']['default_route']")"
            run() { lanlet exec --name default --mac 52:54:00:12:34:56 -- bash -c ". ./look.sh; $1"; }
            run 'say address="$(addresses scope global)" router="$(routers)"'
            run "ping -6 -c 1 -W 2 $GATEWAY >/dev/null"'; say ping=$?'
            run 'ping -6 -c 1 -W 2 "$(routers | tr -d ,)%eth0" >/dev/null; say ping_link_local=$?'
            # A router for containers of its own keeps its way outside; the kernel has asked by itself.
            run 'until_true 5 sh -c "ip -6 route show default | grep -q proto.ra"; say asked=$?
                 echo 1 >/proc/sys/net/ipv6/conf/all/forwarding; say forwarding="$(routers)"'
            # The host loses its IPv6 and gets it back, and the guest hears of it.
            "$LAB/as-user" "$LANLET" exec --name default -- bash -c '. ./look.sh
                until_true 5 sh -c "ip -6 route show default | grep -q proto.ra"; say before=$?
                # What was set for the first moment would stay for half a minute.
                ip -6 route del default metric 2048
                touch ready
                until_true 15 has_no_router; say lost=$? address_after="$(addresses scope global | cut -c1-18)"
                touch lost
                until_true 15 has_router; say back=$? router_back="$(routers)"' &
            until_true 10 test -e ready
            host6 off
            until_true 20 test -e lost
            say route_lost="$(status_of "s['ipv6']['default_route']")"
            run 'say without_router="$(routers)" without_address="$(addresses scope global)"
                 timeout 1 ping -6 -c 1 2001:db8:1::2 2>&1 | grep -q unreachable; say unreachable=$?'
            host6 on
            wait $!
            say drops="$(drops)"
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let link_local = link_local(&outcome);
    let router = format!("{link_local},");
    let address = "fd12:3456:789a:1:5054:ff:fe12:3456/64,";
    assert_said(
        &outcome,
        &[
            ("subnet", "fd12:3456:789a:1::/64"),
            ("route", "True"),
            ("address", address),
            ("router", &router),
            ("ping", "0"),
            ("ping_link_local", "0"),
            ("asked", "0"),
            ("forwarding", &router),
            ("before", "0"),
            ("lost", "0"),
            ("address_after", "fd12:3456:789a:1:5"),
            ("back", "0"),
            ("router_back", &router),
            ("route_lost", "False"),
            ("without_router", ""),
            ("without_address", address),
            ("unreachable", "0"),
            ("drops", "none"),
        ],
    );
}

/// A host with routes to some prefixes (a VPN's) and none to the rest.
#[test]
fn routes_of_a_host_without_a_default_one_are_its_guests() {
    let Some(outcome) = scenario(
        &World::new(),
        &format!(
            "{PRELUDE}{}",
            r#"
            host6 off
            ip -6 route add 2001:db8:2::/48 via 2001:db8:1::2
            ip -6 route add 2001:db8:2:5::/64 via 2001:db8:1::2
            network --subnet6 fd12:3456:789a:1::/64
            "$LAB/as-user" "$LANLET" exec --name default -- bash -c '. ./look.sh
                ip -6 route show | grep -q "^2001:db8:2::/48"; say at_once=$? router="$(routers)"
                # Nobody listens there, and who says so is beyond the host.
                nc -v -w 5 2001:db8:2::1 9 2>&1 | grep -q refused; say reached=$?
                ping -6 -c 1 -W 1 2001:db8:77::1 2>&1 | grep -qi unreachable; say elsewhere=$?
                until_true 10 sh -c "ip -6 route show | grep 2001:db8:2::/48 | grep -q proto.ra"; say kernel=$?
                rdisc6 -1 eth0 >rdisc6.txt; say named="$(grep -c "Route.*2001:db8:2::/48" rdisc6.txt)" \
                    lifetime="$(grep -c "Router lifetime *: *0 " rdisc6.txt)"
                ip -6 route flush root 2001:db8::/32 metric 2048
                touch ready
                until_true 20 sh -c "! ip -6 route show | grep -q ^2001:db8:2:"; say withdrawn=$?
                touch withdrawn
                until_true 20 has_router; say default=$?' &
            until_true 20 test -e ready
            ip -6 route del 2001:db8:2::/48
            ip -6 route del 2001:db8:2:5::/64
            until_true 30 test -e withdrawn
            host6 on
            wait $!
            say drops="$(drops)"
            "#
        ),
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("at_once", "0"),
            ("router", ""),
            ("reached", "0"),
            ("elsewhere", "0"),
            ("kernel", "0"),
            ("named", "1"),
            ("lifetime", "1"),
            ("withdrawn", "0"),
            ("default", "0"),
        ],
    );
}

#[test]
fn a_kernel_configures_itself() {
    let world = World::new();
    let Some(outcome) = scenario(
        &world,
        &format!(
            "{PRELUDE}{}",
            r#"
            host6 on
            network --subnet6 fd12:3456:789a:1::/64 --domain lab.test --mtu 1400
            say link_local="$(status_of "s['ipv6']['link_local']")"
            cat >slaac.sh <<'END'
            . ./look.sh
            fresh
            until_true 10 sh -c 'ip -6 address show dev eth0 scope global | grep -q "mngtmpaddr\|dynamic" &&
                ! ip -6 address show dev eth0 tentative | grep -q .'
            say slaac=$? address="$(addresses scope global)" router="$(routers)" mtu="$(cat /proc/sys/net/ipv6/conf/eth0/mtu)"
            ping -6 -c 2 -i 0.05 -W 2 fd12:3456:789a:1::1 >/dev/null; say ping=$?
            ping -6 -c 1 -W 2 "$(routers | tr -d ,)%eth0" >/dev/null; say ping_link_local=$?
            ping -6 -c 1 -W 2 -s 1352 -M do fd12:3456:789a:1::1 >/dev/null; say full=$?
            # Unreachability detection probes by unicast, and learns anew that this is a router.
            ip -6 neigh change fd12:3456:789a:1::1 dev eth0 nud probe
            until_true 10 sh -c 'ip -6 neigh show fd12:3456:789a:1::1 | grep -q "router REACHABLE"'
            say reachable=$?
            # By hand, and to an address that nobody has.
            rdisc6 -1 -q eth0 >prefix; say rdisc6=$? prefix="$(cat prefix)"
            rdisc6 -1 eth0 >rdisc6.txt
            ndisc6 -1 -q fd12:3456:789a:1::1 eth0 >mac; say ndisc6=$? mac="$(cat mac)"
            ndisc6 -1 -r 1 -w 300 fd12:3456:789a:1::dead eth0 >/dev/null 2>&1; say nobody=$?
END
            lanlet exec --name default --mac 52:54:00:12:34:56 -- bash slaac.sh
            say drops="$(drops)"
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let link_local = link_local(&outcome);
    let markers = outcome.markers();
    assert_said(
        &outcome,
        &[
            ("slaac", "0"),
            ("address", "fd12:3456:789a:1:5054:ff:fe12:3456/64,"),
            ("router", &format!("{link_local},")),
            ("mtu", "1400"),
            ("ping", "0"),
            ("ping_link_local", "0"),
            ("full", "0"),
            ("reachable", "0"),
            ("rdisc6", "0"),
            ("prefix", "fd12:3456:789a:1::/64"),
            ("ndisc6", "0"),
            ("nobody", "2"),
            ("drops", "none"),
        ],
    );
    let rdisc6 = world.temp().read("rdisc6.txt");
    // Its spaces differ from release to release.
    let words: Vec<&str> = rdisc6.split_whitespace().collect();
    let said = words.join(" ");
    for line in [
        "Hop limit : 64 ",
        "Stateful address conf. : No",
        "Stateful other conf. : No",
        "Router preference : medium",
        "Router lifetime : 1800 ",
        "MTU : 1400 bytes (valid)",
        "Prefix : fd12:3456:789a:1::/64 On-link : Yes Autonomous address conf.: Yes",
        "Valid time : 5400 ",
        "Pref. time : 2700 ",
        "Recursive DNS server : fd12:3456:789a:1::1 DNS server lifetime : 1800 ",
        "DNS search list : lab.test DNS search list lifetime: 1800 ",
        &format!("from {link_local}"),
    ] {
        assert!(said.contains(line), "{line}: {rdisc6}");
    }
    let mac = markers.get("mac").unwrap_or_default().to_lowercase();
    let from_mac = format!("Source link-layer address: {}", mac.to_uppercase());
    assert!(
        mac.starts_with("52:54:00:") && said.contains(&from_mac),
        "{mac}: {rdisc6}"
    );
}

#[test]
fn guests_find_each_other_and_nobody_takes_the_gateways_address() {
    let Some(outcome) = scenario(
        &World::new(),
        &format!(
            "{PRELUDE}{}",
            r#"
            host6 off
            network --subnet6 fd12:3456:789a:1::/64
            say link_local="$(status_of "s['ipv6']['link_local']")"
            "$LAB/as-user" "$LANLET" exec --name default --mac 52:54:00:00:00:01 -- bash -c '. ./look.sh
                fresh
                until_true 10 sh -c "ip -6 address show dev eth0 scope global | grep -q dynamic &&
                    ! ip -6 address show dev eth0 tentative | grep -q ."
                say slaac=$? router="$(routers)"
                touch ready
                until_true 40 is_over' >peer.log &
            until_true 20 test -e ready
            cat >claim.sh <<'END'
            . ./look.sh
            ping -6 -c 3 -i 0.05 -W 2 fd12:3456:789a:1:5054:ff:fe00:1 >/dev/null; say guest=$?
            ping -6 -c 1 -W 2 fe80::5054:ff:fe00:1%eth0 >/dev/null; say guest_link_local=$?
            say neighbor="$(ip -6 neigh show fd12:3456:789a:1:5054:ff:fe00:1 | grep -o 'lladdr [0-9a-f:]*' | cut -d' ' -f2)"
            echo 1 >/proc/sys/net/ipv6/conf/eth0/accept_dad
            for address in fd12:3456:789a:1::1/64 "$1/64"; do
                ip address add $address dev eth0
                ip address add fd12:3456:789a:1::42/64 dev eth0
                until_true 5 sh -c "ip -6 address show dev eth0 dadfailed | grep -q 'inet6 $address'"; say claimed=$?
                # What nobody else has is not taken away.
                until_true 5 sh -c "! ip -6 address show dev eth0 tentative | grep -q :42/"
                say "other=$(ip -6 address show dev eth0 -dadfailed | grep -c :42/)"
                ip address del fd12:3456:789a:1::42/64 dev eth0
                ip address del $address dev eth0
            done
            touch claimed
            until_true 20 is_over
END
            "$LAB/as-user" "$LANLET" exec --name default --mac 52:54:00:00:00:02 -- \
                bash claim.sh "$(status_of "s['ipv6']['link_local']")" >claim.log &
            until_true 30 test -e claimed
            say conflicts="$(status_of "s['totals']['ndp_conflicts']")" defended="$(status_of "s['totals']['ndp_defended']")"
            say drops="$(drops | sed 's/[a-z]*[0-9]*://')"
            touch over
            wait %2 %3
            cat peer.log claim.log
            "#
        ),
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("slaac", "0"),
            ("router", ""),
            ("guest", "0"),
            ("guest_link_local", "0"),
            ("neighbor", "52:54:00:00:00:01"),
            ("claimed", "0"),
            ("other", "1"),
            ("conflicts", "2"),
            ("defended", "2"),
            ("drops", "address_conflict:2"),
        ],
    );
}

#[test]
fn a_lan_may_be_without() {
    let Some(outcome) = scenario(
        &World::new(),
        &format!(
            "{PRELUDE}{}",
            r#"
            host6 on
            cat >go.sh <<'END'
            . ./look.sh
            say address="$(addresses scope global)" router="$(routers)"
            rdisc6 -1 -r 1 -w 500 eth0 >/dev/null 2>&1; say rdisc6=$?
            ping -6 -c 1 -W 1 "$1%eth0" >/dev/null; say gateway=$?
END
            # The gateway's link-local address would be of this MAC.
            network --subnet6 auto
            auto=$(status_of "s['ipv6']['subnet']") link_local=$(status_of "s['ipv6']['link_local']")
            kill $NETWORK; wait $NETWORK
            network --subnet6 off
            say off="$(status_of "s['ipv6']")"
            lanlet exec --name default -- bash go.sh "$link_local"
            say drops="$(drops)"
            kill $NETWORK; wait $NETWORK
            network --mtu 1279
            say small="$(status_of "s['ipv6']")" notice="$(grep -c 'without IPv6' up.log)"
            lanlet exec --name default -- ip -4 -o address show dev eth0 | grep -c eth0
            kill $NETWORK; wait $NETWORK
            # By default it is the same at each start, and a unique local one.
            network
            say same="$([ "$(status_of "s['ipv6']['subnet']")" = "$auto" ] && echo yes)" local="${auto:0:2}" \
                end="${auto: -5}"
            kill $NETWORK; wait $NETWORK
            lanlet up --mtu 1279 --subnet6 fd12::/64 2>refused; say refused=$?
            grep -q 'subnet6: IPv6 needs an MTU of 1280 bytes at least' refused; say reason=$?
            lanlet up --subnet6 fd12::/48 2>refused; say refused_48=$?
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_said(
        &outcome,
        &[
            ("off", "None"),
            ("address", ""),
            ("router", ""),
            ("rdisc6", "2"),
            ("gateway", "1"),
            ("drops", "none"),
            ("small", "None"),
            ("same", "yes"),
            ("local", "fd"),
            ("end", "::/64"),
            ("refused", "2"),
            ("reason", "0"),
            ("refused_48", "2"),
        ],
    );
}
