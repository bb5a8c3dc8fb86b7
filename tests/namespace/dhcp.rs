//! Real DHCP clients, in namespace guests, against the gateway: udhcpc, dhclient, dhcpcd.

use crate::common::{Outcome, World};
use crate::{assert_said, scenario};

/// `clients.sh` for the guest: the clients, and the script that sets what udhcpc and dhclient got.
const CLIENTS: &str = r#"
cat >hook <<'END'
#!/bin/sh
# udhcpc says $1 and $ip, dhclient $reason and $new_ip_address.
case ${1:-$reason} in
bound | renew | BOUND | RENEW | REBIND | REBOOT)
    address=${ip:-$new_ip_address} mask=${subnet:-$new_subnet_mask} via=${router:-$new_routers}
    ip address flush dev eth0
    ip address add "$address/$mask" dev eth0
    ip route replace default via "$via"
    echo "@@LANLET ${CLIENT}_event=${1:-$reason} ${CLIENT}=$address mask=$mask router=$via" \
        "dns=${dns:-$new_domain_name_servers} mtu=${mtu:-$new_interface_mtu}" \
        "lease=${lease:-$new_dhcp_lease_time} domain=${domain:-$new_domain_name}" >>events ;;
deconfig | RELEASE | EXPIRE) ip address flush dev eth0 ;;
esac
END
chmod 755 hook
# By default dhclient waits up to 13 s before it asks again.
printf 'initial-interval 1;\nbackoff-cutoff 2;\n' >dhclient.conf
cat >clients.sh <<'END'
mac() { ip address flush dev eth0; ip link set eth0 address "$1"; }
udhcpc() { CLIENT=$1 busybox udhcpc -i eth0 -s "$PWD/hook" -p "$PWD/$1.pid" -t 5 -T 1 -n -q "${@:2}" 2>>log; }
dhclient() { # dhclient NAME OPTION...
    touch "$1.leases"
    CLIENT=$1 /sbin/dhclient -4 -e CLIENT="$1" -sf "$PWD/hook" -lf "$PWD/$1.leases" -pf "$PWD/$1.pid" -cf "$PWD/dhclient.conf" "${@:2}" eth0 2>>log
}
# A user namespace of one user has none called dhcpcd to change to.
dhcpcd() {
    grep -v dhcpcd /etc/passwd >passwd
    unshare -m sh -c 'mount --bind passwd /etc/passwd && mount -t tmpfs none /run && mount -t tmpfs none /var/lib/dhcpcd &&
        dhcpcd -4 -1 -B -t 10 -c /bin/true -f /dev/null --noarp eth0' >>log 2>&1
    echo "@@LANLET $1=$(address)" >>events
}
address() { ip -4 -o address show dev eth0 | awk '{sub("/.*", "", $4); print $4}'; }
say() { echo "@@LANLET $*"; }
END
"#;

fn text_of(outcome: &Outcome, world: &World) -> String {
    format!(
        "{}\n--- clients\n{}",
        outcome.text(),
        world.temp().read("log")
    )
}

#[test]
fn every_client_gets_its_lease() {
    let world = World::new();
    let Some(outcome) = scenario(
        &world,
        &format!(
            "{CLIENTS}{}",
            r#"
            network --lease-time 10m --domain lab.test --mtu 1400 --lease-file none
            cat >go.sh <<'END'
            . ./clients.sh
            attached=$(address)
            ip address flush dev eth0
            udhcpc attached; say attached_status=$? before=$attached
            mac 52:54:00:00:00:71; udhcpc udhcpc; say udhcpc_status=$?
            ping -c 1 -W 2 192.168.122.1 >/dev/null; say ping=$?
            mac 52:54:00:00:00:72; dhclient dhclient -1; say dhclient_status=$?
            ping -c 1 -W 2 192.168.122.1 >/dev/null; say ping_dhclient=$?
            # Stays, and holds the lease: killed without a word.
            kill -KILL "$(cat dhclient.pid)"
            mac 52:54:00:00:00:73; dhcpcd dhcpcd; say dhcpcd_status=$?
            ping -c 1 -W 2 192.168.122.1 >/dev/null; say ping_dhcpcd=$?
END
            lanlet exec --name default --mac 52:54:00:00:00:70 -- bash go.sh
            cat events
            say leases="$(status_of "','.join(sorted(f\"{l['mac'][-2:]}={l['address']}\" for l in s['leases']))")"
            say drops="$(drops)"
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let text = text_of(&outcome, &world);
    let lease = |client: &str| {
        markers
            .get(client)
            .unwrap_or_else(|| panic!("{client}: {text}"))
    };
    assert_eq!(markers.get("before"), Some(lease("attached")), "{text}");
    let (udhcpc, dhclient, dhcpcd) = (lease("udhcpc"), lease("dhclient"), lease("dhcpcd"));
    assert!(
        udhcpc != dhclient && udhcpc != dhcpcd && dhclient != dhcpcd,
        "{text}"
    );
    for (key, value, times) in [
        ("mask", "255.255.255.0", 3),
        ("router", "192.168.122.1", 3),
        ("dns", "192.168.122.1", 3),
        ("mtu", "1400", 3),
        ("lease", "600", 3),
        ("domain", "lab.test", 3),
    ] {
        assert_eq!(markers.all(key), vec![value; times], "{key}: {text}");
    }
    markers.passed(&[
        "attached_status",
        "udhcpc_status",
        "ping",
        "dhclient_status",
        "ping_dhclient",
        "dhcpcd_status",
        "ping_dhcpcd",
    ]);
    let leases = format!("71={udhcpc},72={dhclient},73={dhcpcd}");
    assert_said(&outcome, &[("leases", &leases), ("drops", "none")]);
}

#[test]
fn leases_are_renewed_and_released() {
    let world = World::new();
    let Some(outcome) = scenario(
        &world,
        &format!(
            "{CLIENTS}{}",
            r#"
            network --lease-file none
            cat >go.sh <<'END'
            . ./clients.sh
            turn() { echo >"$1.done"; until [ -e "$1.go" ]; do sleep 0.02; done; }
            mac 52:54:00:00:00:71
            CLIENT=udhcpc busybox udhcpc -i eth0 -s "$PWD/hook" -p "$PWD/udhcpc.pid" -t 5 -T 1 -f 2>>log &
            until [ -e events ]; do sleep 0.02; done
            turn bound
            kill -USR1 $!
            until [ "$(grep -c udhcpc_event=renew events)" = 1 ]; do sleep 0.02; done
            turn renewed
            # A client takes its address away right behind the release, and the kernel with it a packet
            # that still waits for the gateway's MAC. (A changed address has emptied the ARP table.)
            ping -c 1 -W 5 192.168.122.1 >/dev/null
            kill -USR2 $!
            until [ -z "$(address)" ]; do sleep 0.02; done
            turn released
            kill $!
            mac 52:54:00:00:00:72
            dhclient dhclient -1
            turn second
            ping -c 1 -W 5 192.168.122.1 >/dev/null
            CLIENT=dhclient dhclient dhclient -r
            turn second_released
END
            "$LAB/as-user" "$LANLET" exec --name default -- bash go.sh &
            at() { # at STEP: what the server says then
                wait_for $1.done '^$' 40
                say $1="$(status_of "','.join(l['mac'][-2:] for l in s['leases'] if l['expires_secs'] is not None) or 'none'")" \
                    $1_acks="$(status_of "s['totals'].get('dhcp_ack', 0)")" $1_releases="$(status_of "s['totals'].get('dhcp_release', 0)")"
                touch $1.go
            }
            at bound; at renewed; at released; at second; at second_released
            cat events
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let text = text_of(&outcome, &world);
    // udhcpc asks for a renewal before it listens for the answer; when that is faster, it asks again.
    let acks = |step: &str| markers.number(&format!("{step}_acks"));
    let again = acks("renewed") - acks("bound");
    assert!(again == 1.0 || again == 2.0, "{text}");
    let mut acks_due = 1.0;
    for (step, lease, acks_more, releases) in [
        ("bound", "71", 0.0, "0"),
        ("renewed", "71", again, "0"),
        ("released", "none", 0.0, "1"),
        ("second", "72", 1.0, "1"),
        ("second_released", "none", 0.0, "2"),
    ] {
        acks_due += acks_more;
        assert_eq!(acks(step), acks_due, "{step}: {text}");
        assert_eq!(markers.get(step), Some(lease), "{step}: {text}");
        let said = markers.get(&format!("{step}_releases"));
        assert_eq!(said, Some(releases), "{step}: {text}");
    }
    let addresses = markers.all("udhcpc");
    assert_eq!(addresses.len(), 2, "{text}");
    assert_eq!(addresses[0], addresses[1], "a renewal keeps the address");
}

/// What a client was given stays its own across the server's end, orderly or not.
#[test]
fn leases_outlive_the_server() {
    let world = World::new();
    let Some(outcome) = scenario(
        &world,
        &format!(
            "{CLIENTS}{}",
            r#"
            # Five addresses: a forgotten lease would soon be somebody else's.
            start() { network --lease-file "$TMP/leases" --dhcp-range 192.168.122.10-192.168.122.14; }
            client() { # client MAC-END NAME
                lanlet exec --name default --mac 52:54:00:00:01:01 -- bash -c ". ./clients.sh; mac 52:54:00:00:00:$1; udhcpc $2"
            }
            mode() { say mode="$(stat -c %a leases)"; }
            start
            client 71 first; client 72 second
            kill -TERM $NETWORK; wait $NETWORK; say ended=$?
            mode
            start
            say restored="$(status_of "len(s['leases'])")"
            client 72 second; client 71 first; client 73 third
            until_true 10 grep -q 52:54:00:00:00:73 leases
            kill -KILL $NETWORK; wait $NETWORK 2>/dev/null
            start
            say restored_again="$(status_of "len(s['leases'])")"
            client 73 third; client 71 first; client 74 fourth; client 72 second
            cat events
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let text = text_of(&outcome, &world);
    assert_said(
        &outcome,
        &[
            ("ended", "0"),
            ("mode", "600"),
            ("restored", "2"),
            ("restored_again", "3"),
        ],
    );
    let mut all = Vec::new();
    for (client, times) in [("first", 3), ("second", 3), ("third", 2), ("fourth", 1)] {
        let leases = markers.all(client);
        assert_eq!(leases.len(), times, "{client}: {text}");
        assert!(
            leases.iter().all(|lease| *lease == leases[0]),
            "{client}: {text}"
        );
        assert!(!all.contains(&leases[0]), "{client}: {text}");
        all.push(leases[0].clone());
    }
}
