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

/// What a hostile guest sends in another's name, or a DECLINE alone: `forge.py MAC ADDRESS [DECLINE]`.
const FORGE: &str = r#"
cat >forge.py <<'END'
import socket, struct, sys
mac, address = bytes.fromhex(sys.argv[1].replace(":", "")), socket.inet_aton(sys.argv[2])
gateway, none, everyone = socket.inet_aton("192.168.122.1"), bytes(4), b"\xff" * 4
out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
out.bind(("eth0", 0))
def sum16(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    return 0xffff - (total % 0xffff or 0xffff if total else 0)
def send(options, ciaddr=none):
    message = struct.pack("!BBBBIHH", 1, 1, 6, 0, 0x66666666, 0, 0x8000) + ciaddr + bytes(12) + mac + bytes(10 + 192)
    message += bytes([99, 130, 83, 99]) + options + b"\xff"
    udp = struct.pack("!HHHH", 68, 67, 8 + len(message), 0) + message
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0) + none + everyone
    head = head[:10] + struct.pack("!H", sum16(head)) + head[12:]
    out.send(b"\xff" * 6 + mac + b"\x08\x00" + head + udp)
server = b"\x36\x04" + gateway
wants = b"\x32\x04" + address
if sys.argv[3:] == ["DECLINE"]:
    sys.exit(send(b"\x35\x01\x04" + server + wants))
send(b"\x35\x01\x07" + server, address)          # RELEASE
send(b"\x35\x01\x04" + server + wants)           # DECLINE
send(b"\x35\x01\x03" + server + wants)           # REQUEST, selecting
send(b"\x35\x01\x03" + wants)                    # ... after a reboot
send(b"\x35\x01\x03", address)                   # ... to renew
send(b"\x35\x01\x03\x32\x04\xc0\xa8\x7a\xc8")  # ... another address: a NAK would reach the victim
send(b"\x35\x01\x01\x0c\x04bank")               # DISCOVER, with a name
END
"#;

#[test]
fn a_guest_can_not_move_anothers_address() {
    let world = World::new();
    let Some(outcome) = scenario(
        &world,
        &format!(
            "{CLIENTS}{FORGE}{}",
            r#"
            network --lease-file none
            cat >victim.sh <<'END'
            . ./clients.sh
            attached=$(address)
            ip address flush dev eth0
            mac 52:54:00:00:00:71; udhcpc victim
            echo "$attached $(address)" >addresses.new && mv addresses.new addresses
            until [ -e forged ]; do sleep 0.02; done
            mac 52:54:00:00:00:71; udhcpc victim_after
            mac 52:54:00:00:00:70; udhcpc attached_after
            # What its own client finds in use it does not get again.
            python3 forge.py 52:54:00:00:00:70 "$attached" DECLINE
            udhcpc declined
END
            "$LAB/as-user" "$LANLET" exec --name default --mac 52:54:00:00:00:70 -- bash victim.sh &
            VICTIM=$!
            until_true 20 test -e addresses
            read -r attached leased <addresses
            say attached=$attached leased=$leased
            lanlet exec --name default -- sh -c "
                python3 forge.py 52:54:00:00:00:71 $leased; python3 forge.py 52:54:00:00:00:70 $attached
                ping -c 1 -W 2 192.168.122.1 >/dev/null"
            say foreign="$(status_of "s['totals']['dhcp_foreign_port']")"                 releases="$(status_of "s['totals']['dhcp_release']")" declines="$(status_of "s['totals']['dhcp_decline']")"                 naks="$(status_of "s['totals']['dhcp_nak']")"                 bank="$(status_of "[l['mac'] for l in s['leases'] if l['hostname'] == 'bank']")"
            touch forged
            wait $VICTIM
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
            ("foreign", "12"),
            ("releases", "0"),
            ("declines", "0"),
            ("naks", "0"),
            ("bank", "[]"),
        ],
    );
    for (before, after) in [("leased", "victim_after"), ("attached", "attached_after")] {
        let before = markers.get(before);
        assert!(
            before.is_some() && markers.get(after) == before,
            "{after}: {text}"
        );
    }
    let declined = markers.get("declined");
    assert!(
        declined.is_some() && declined != markers.get("attached"),
        "{text}"
    );
}

/// Who has an address by hand is asked before it is given away; and who lies gets nowhere.
#[test]
fn an_address_in_use_is_not_offered() {
    let world = World::new();
    let Some(outcome) = scenario(
        &world,
        &format!(
            "{CLIENTS}{}",
            r#"
            start() { network --lease-file none --dhcp-range 192.168.122.10-192.168.122.49; }
            client() { lanlet exec --name default --ip 192.168.122.200 -- bash -c ". ./clients.sh; mac 52:54:00:00:00:71; udhcpc $1"; }
            start
            client free
            first=$(sed -n 's/.* free=\([0-9.]*\) .*/\1/p' events)
            say first=$first
            kill -TERM $NETWORK; wait $NETWORK
            start
            "$LAB/as-user" "$LANLET" exec --name default --ip 192.168.122.201 -- sh -c "
                ip address add $first/24 dev eth0; touch squats; until [ -e over ]; do sleep 0.05; done" &
            until_true 20 test -e squats
            client squatted
            say probes="$(status_of "s['totals']['dhcp_probes']")" in_use="$(status_of "s['totals']['dhcp_in_use']")"
            # One that was heard of needs no question, and a command no wait.
            lanlet exec --name default --mac 52:54:00:00:00:71 -- bash -c '. ./clients.sh; say command=$(address)'
            touch over
            cat events
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let text = text_of(&outcome, &world);
    let (free, squatted) = (markers.get("free"), markers.get("squatted"));
    assert!(
        free.is_some() && squatted.is_some() && free != squatted,
        "{text}"
    );
    assert_eq!(markers.get("command"), squatted, "{text}");
    assert_said(&outcome, &[("probes", "2"), ("in_use", "1")]);
}

/// Guests that end take an hour of lease with them, and the pool is small.
#[test]
fn guests_one_after_the_other_share_a_small_pool() {
    let world = World::new();
    let Some(outcome) = scenario(
        &world,
        &format!(
            "{CLIENTS}{}",
            r#"
            network --lease-file none --dhcp-range 192.168.122.10-192.168.122.15
            for n in $(seq 10 24); do
                lanlet exec --name default -- bash -c "[ $((n % 2)) = 0 ] || exit 0; . ./clients.sh; mac 52:54:00:00:00:$n; udhcpc client" || say failed=$n
            done
            cat events
            say warnings="$(grep -c 'DHCP range are leased' up.log)"
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    assert_eq!(markers.get("failed"), None, "{}", text_of(&outcome, &world));
    assert_eq!(
        markers.all("client").len(),
        8,
        "{}",
        text_of(&outcome, &world)
    );
    assert_said(&outcome, &[("warnings", "1")]);
}

#[test]
fn addresses_are_fixed_by_port_and_by_mac() {
    let world = World::new();
    let Some(outcome) = scenario(
        &world,
        &format!(
            "{CLIENTS}{}",
            r#"
            lanlet exec --ip 192.168.122.7 --host 52:54:00:00:00:71=192.168.122.8 -- bash -c '. ./clients.sh; say private=$(address)'
            network --lease-file none --dhcp-range 192.168.122.10-192.168.122.30 -p 127.0.0.1:18080:web:80                 --host 52:54:00:00:00:71=192.168.122.71,web --host 52:54:00:00:00:72=192.168.122.12
            on() { lanlet exec --name default "$@"; }
            address='. ./clients.sh; say $NAME=$(address)'
            NAME=by_port on --ip 192.168.122.99 -- bash -c "$address"
            NAME=by_mac on --mac 52:54:00:00:00:72 -- bash -c "$address"
            on -- bash -c '. ./clients.sh; mac 52:54:00:00:00:71; udhcpc by_dhcp
                busybox httpd -p 80; touch serves; until [ -e over ]; do sleep 0.05; done' &
            until_true 20 test -e serves
            say code=$(curl -s -m 5 -o /dev/null -w '%{http_code}' http://127.0.0.1:18080/)
            refused() { on "${@:2}" -- true 2>&1 | grep -q "$1"; say refused=$?; }
            refused 'is reserved' --ip 192.168.122.12
            refused 'is reserved' --ip 192.168.122.71
            refused 'is no address' --ip 192.168.122.1
            refused 'is no address' --ip 10.0.0.1
            touch over
            lanlet up --name other --host 52:54:00:00:00:71=10.0.0.7 2>&1 | grep -q 'error: --host: 10.0.0.7'; say refused=$?
            cat events
            "#
        ),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_said(
        &outcome,
        &[
            ("by_port", "192.168.122.99"),
            ("by_mac", "192.168.122.12"),
            ("by_dhcp", "192.168.122.71"),
            ("code", "404"),
            ("private", "192.168.122.7"),
        ],
    );
    assert_eq!(
        outcome.markers().all("refused"),
        ["0"; 5],
        "{}",
        outcome.text()
    );
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

/// A VM that is started again is the same guest, and of two with one disk only one can be.
#[test]
fn a_vm_keeps_its_mac_by_its_name_or_disk() {
    let world = World::new();
    let Some(outcome) = scenario(
        &world,
        r#"
        cat >vmm <<'END'
#!/bin/sh
echo "$@" | sed -n 's/.*mac=\([0-9a-f:]*\).*/\1/p' >"$TMP/$OUT.new" && mv "$TMP/$OUT.new" "$TMP/$OUT"
[ -z "$STAY" ] || until [ -e "$TMP/over" ]; do sleep 0.05; done
END
        chmod 755 vmm
        touch disk.img other.img
        network --lease-file none
        vm() { OUT=$1 lanlet qemu --name default --qemu "$TMP/vmm" "${@:2}"; }
        vm first -- -m 1G -hda disk.img
        vm again -- -m 1G -drive "file=$TMP/disk.img,if=virtio"
        vm other -- -m 1G -hda other.img
        vm named --guest-name web -- -hda disk.img
        vm diskless -- -m 1G
        vm diskless_again -- -m 1G
        STAY=1 vm running -- -hda disk.img &
        until_true 20 test -e running
        vm beside -- -hda disk.img 2>beside.err
        say said="$(grep -c 'runs already' beside.err)"
        touch over
        wait %2
        for vm in first again other named diskless diskless_again running beside; do say $vm=$(cat $vm); done
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let mac = |vm: &str| {
        markers
            .get(vm)
            .unwrap_or_else(|| panic!("{vm}: {}", outcome.text()))
    };
    assert_eq!(
        (mac("again"), mac("running")),
        (mac("first"), mac("first")),
        "{}",
        outcome.text()
    );
    let others = [
        "first",
        "other",
        "named",
        "diskless",
        "diskless_again",
        "beside",
    ];
    let macs: std::collections::BTreeSet<_> = others.map(mac).into_iter().collect();
    assert_eq!(macs.len(), others.len(), "{}", outcome.text());
    assert_said(&outcome, &[("said", "1"), ("named", "52:54:00:e8:30:40")]);
}
