//! What guests can't reach: the host's loopback, its own addresses unless `--host-access` says so,
//! and addresses that are nobody's outside.

use crate::common::World;
use crate::{assert_said, scenario};

/// Servers that the host itself reaches, on each of its addresses and on the link-local address that
/// clouds hand out credentials on; then a guest's try of each, from `try.sh`.
const SERVERS: &str = r#"
python3 peer.py serve_echo 7000 &
python3 peer.py serve_udp_echo 7000 &
ip -netns outside address add 169.254.169.254/32 dev lo
outside python3 peer.py serve_echo 7001 &
listening tcp 7000 env
listening udp 7000 env
listening tcp 7001 outside
for address in 127.0.0.1 127.8.9.10 198.51.100.1; do
    say host="$(peer try_connect $address 7000 | grep -o connected)"
done
say metadata_of_host="$(peer try_connect 169.254.169.254 7001 | grep -o connected)"
cat >try.sh <<'END'
# The guest is root of its namespace: it can send what it likes to eth0, loopback addresses included.
echo 1 >/proc/sys/net/ipv4/conf/eth0/route_localnet
ip rule add preference 5 to 127.0.0.0/8 lookup 100
ip rule add preference 10 lookup local
ip rule del preference 0
ip route add 127.0.0.0/8 via 192.168.122.1 dev eth0 table 100
own=$(ip -4 -o address show dev eth0 | awk '{sub("/.*", "", $4); print $4}')
say() { echo "@@LANLET $*"; }
try() { say "$1=$(python3 peer.py try_connect $2 $3 2 | grep -o 'result=[^ ]*' | cut -d= -f2)"; }
say route="$(ip route get 127.0.0.1 from $own | grep -o 'via 192.168.122.1 dev eth0' | tr ' ' _)"
# Bound to eth0's address, or the kernel takes 127.0.0.1 as the source.
bound() {
    python3 - $1 $2 $own <<'PY'
import errno, socket, sys
s = socket.socket()
s.settimeout(2)
s.bind((sys.argv[3], 0))
try:
    s.connect((sys.argv[1], int(sys.argv[2])))
    print("connected")
except TimeoutError: print("timeout")
except OSError as e: print(errno.errorcode[e.errno])
PY
}
say loopback=$(bound 127.0.0.1 7000) loopback_other=$(bound 127.8.9.10 7000)
try host 198.51.100.1 7000
try gateway 192.168.122.1 7000
try metadata 169.254.169.254 7001
say host_udp="$(python3 peer.py udp_sizes 198.51.100.1 7000 10 | grep -o 'sizes=.*' | cut -d= -f2)"
ping -c 1 -W 1 198.51.100.1 >/dev/null; say ping=$?
END
"#;

#[test]
fn the_host_itself_is_out_of_reach() {
    let world = World::new().with(&["--ping"]);
    let Some(outcome) = scenario(&world, &format!("{SERVERS}\nlanlet exec -- sh try.sh")) else {
        return;
    };
    let outcome = outcome.passed();
    assert_eq!(
        outcome.markers().all("host")[..3],
        ["connected", "connected", "connected"],
        "{}",
        outcome.text()
    );
    assert_said(
        &outcome,
        &[
            ("metadata_of_host", "connected"),
            ("route", "via_192.168.122.1_dev_eth0"),
            ("loopback", "EHOSTUNREACH"),
            ("loopback_other", "EHOSTUNREACH"),
            ("host", "EHOSTUNREACH"),
            ("gateway", "ECONNREFUSED"),
            ("metadata", "EHOSTUNREACH"),
            ("host_udp", "EHOSTUNREACH"),
            ("ping", "1"),
        ],
    );
}

#[test]
fn host_access_opens_the_hosts_addresses_and_nothing_else() {
    let world = World::new().with(&["--ping"]);
    let Some(outcome) = scenario(
        &world,
        &format!("{SERVERS}\nlanlet exec --host-access -- sh try.sh"),
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("loopback", "EHOSTUNREACH"),
            ("loopback_other", "EHOSTUNREACH"),
            ("host", "connected"),
            ("gateway", "ECONNREFUSED"),
            ("metadata", "EHOSTUNREACH"),
            ("host_udp", "10"),
            ("ping", "0"),
        ],
    );
}
