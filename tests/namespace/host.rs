//! What of the host is opened on request: its loopback by a mapped address, port by port, and where
//! the guests' traffic leaves from.

use crate::common::World;
use crate::{assert_said, scenario};

/// Servers on the host's loopback, and `try.sh`, which asks them by the mapped addresses.
const LOOPBACK: &str = r#"
for port in 7000 7001; do
    python3 -m http.server --bind 127.0.0.1 $port >/dev/null 2>&1 &
    python3 -m http.server --bind ::1 $port >/dev/null 2>&1 &
done
socat UDP4-RECVFROM:7000,bind=127.0.0.1,fork EXEC:cat &
socat UDP6-RECVFROM:7000,bind=[::1],fork EXEC:cat &
dnsmasq --no-daemon --conf-file=/dev/null --no-hosts --no-resolv --pid-file= --bind-interfaces \
    --interface=lo --listen-address=127.0.0.1 --host-record=secret.test,192.0.2.77 \
    >/dev/null 2>&1 &
listening tcp 7000 env
listening tcp 7001 env
listening udp 7000 env
listening udp 53 env
cat >try.sh <<'END'
say() { echo "@@LANLET $*"; }
code() { curl -s -m 3 -o /dev/null -w '%{http_code}' "$1"; }
say web4=$(code http://$V4:7000/) web6=$(code "http://[fd00::2]:7000/")
say closed4=$(code http://$V4:7001/) closed6=$(code "http://[fd00::2]:7001/")
say udp4=$(echo four | timeout 2 socat -t1 - UDP4:$V4:7000) udp6=$(echo six | timeout 2 socat -t1 - UDP6:[fd00::2]:7000)
say direct=$(code http://127.0.0.1:7000/) own=$(code http://198.51.100.1:7000/)
say dns="$(dig +short +tries=1 +time=1 @$V4 secret.test | grep -v '^;;')"
say dns_tcp="$(dig +short +tcp +tries=1 +time=1 @$V4 secret.test | grep -v '^;;')"
say resolver="$(dig +short outside.test A)"
END
"#;

#[test]
fn loopback_is_reached_by_its_mapped_address_and_open_ports() {
    let world = World::new().with(&["--dns"]);
    let Some(outcome) = scenario(
        &world,
        &format!(
            "{LOOPBACK}\nV4=10.0.2.2 lanlet exec --map-host-loopback 10.0.2.2 --map-host-loopback fd00::2 \
             --host-port 7000,7000/udp -- sh try.sh"
        ),
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("web4", "200"),
            ("web6", "200"),
            ("closed4", "000"),
            ("closed6", "000"),
            ("udp4", "four"),
            ("udp6", "six"),
            ("direct", "000"),
            ("own", "000"),
            ("dns", ""),
            ("dns_tcp", ""),
            ("resolver", "198.51.100.2"),
        ],
    );
}

#[test]
fn the_gateways_address_may_stand_for_loopback_and_keeps_its_dns() {
    let world = World::new().with(&["--dns"]);
    let Some(outcome) = scenario(
        &world,
        &format!(
            "{LOOPBACK}\nV4=192.168.122.1 lanlet exec --map-host-loopback 192.168.122.1 -- sh try.sh"
        ),
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("web4", "200"),
            ("closed4", "200"),
            ("web6", "000"),
            ("udp4", "four"),
            ("dns", ""),
            ("dns_tcp", ""),
            ("resolver", "198.51.100.2"),
        ],
    );
}

#[test]
fn dns_on_the_hosts_loopback_obeys_the_same_rule() {
    let world = World::new().with(&["--dns"]);
    let Some(outcome) = scenario(
        &world,
        &format!(
            "{LOOPBACK}\nV4=10.0.2.2 lanlet exec --map-host-loopback 10.0.2.2 --host-port 53,53/udp -- sh try.sh"
        ),
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("web4", "000"),
            ("dns", "192.0.2.77"),
            ("dns_tcp", "192.0.2.77"),
        ],
    );
}

#[test]
fn traffic_leaves_from_the_chosen_address_and_interface() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
ip address add 198.51.100.8/24 dev up0
ip address add 2001:db8:1::8/64 dev up0 nodad
cat >echo.py <<'END'
import http.server, socket
class Peer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.client_address[0].encode())
    def log_message(self, *_): pass
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
Server(("::", 8080), Peer).serve_forever()
END
outside python3 echo.py &
listening tcp 8080 outside
cat >try.sh <<'END'
say() { echo "@@LANLET $*"; }
say four=$(curl -s -m 3 http://198.51.100.2:8080/) six=$(curl -s -m 3 "http://[2001:db8:1::2]:8080/")
END
lanlet exec --outbound-address 198.51.100.8 --outbound-address 2001:db8:1::8 --outbound-interface up0 -- sh try.sh
for wrong in --outbound-interface=lo --outbound-address=127.0.0.1 --outbound-address=198.51.100.255; do
    lanlet exec $wrong -- true 2>refusal || say refused="$?_$(grep -c -- "${wrong%=*}: ${wrong#*=} " refusal)"
done
say foreign="$(lanlet exec --outbound-address 203.0.113.77 -- true 2>&1 | grep -c -- '--outbound-address: 203.0.113.77 is not an address of this host')"
say missing="$(lanlet exec --outbound-interface none0 -- true 2>&1 | grep -c -- '--outbound-interface: none0: No such device.*ip link')"
"#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_eq!(outcome.markers().all("refused"), ["2_1", "2_1", "2_1"]);
    assert_said(
        &outcome,
        &[
            ("four", "::ffff:198.51.100.8"),
            ("six", "2001:db8:1::8"),
            ("foreign", "1"),
            ("missing", "1"),
        ],
    );
}

/// The kernel chooses among five ports: forty connections to one destination get through nonetheless. A
/// guest's UDP port below that range is not taken from the host's services, one above is kept.
#[test]
fn ports_of_the_host_are_enough_and_its_services_ports_are_spared() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        echo "60000 60004" >/proc/sys/net/ipv4/ip_local_port_range
        echo 61000-65000 >/proc/sys/net/ipv4/ip_local_reserved_ports
        network
        outside python3 peer.py serve_echo 7000 >server.log 2>&1 &
        listening tcp 7000 outside
        cat >ports.py <<'END'
import socket, sys
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("203.0.113.1", 9000))
print("ready", flush=True)
for _ in range(4):
    data, peer = server.recvfrom(100)
    server.sendto(str(peer[1]).encode(), peer)
END
        cat >ask.py <<'END'
import socket
for port in [5060, 60003, 61234, 65100]:
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.bind(("", port))
    client.settimeout(5)
    client.sendto(b"x", ("203.0.113.1", 9000))
    print(f"@@LANLET port_{port}={client.recv(100).decode()}")
END
        outside python3 ports.py >asked 2>&1 &
        wait_for asked ready
        lanlet exec --name default -- python3 ask.py
        lanlet exec --name default -- python3 peer.py many_flows 203.0.113.1 7000 <<<"open 40"
        say told=$(grep -c "are used up" up.log) dropped="$(drops)"
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    assert_said(
        &outcome,
        &[
            ("port_60003", "60003"),
            ("port_65100", "65100"),
            ("open", "40"),
            ("told", "1"),
        ],
    );
    let markers = outcome.markers();
    for spared in ["port_5060", "port_61234"] {
        let port = markers.number(spared);
        assert!((60_000.0..60_005.0).contains(&port), "{}", outcome.text());
    }
}
