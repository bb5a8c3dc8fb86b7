//! `lanlet exec` by itself: what its command finds, and what passes through it.

use crate::common::{self, World};
use crate::{assert_said, scenario};

#[test]
fn the_command_finds_a_network() {
    let world = World::new().with(&["--dns"]);
    let Some(outcome) = scenario(
        &world,
        r#"
        # The subnet's first address is the gateway's; by default 192.168.122.1.
        cat >look.sh <<'END'
        say() { echo "@@LANLET $*"; }
        say address="$(ip -4 -o address show dev eth0 | awk '{print $4}')"
        say mtu="$(ip -o link show dev eth0 | grep -o 'mtu [0-9]*' | cut -d' ' -f2)"
        say route="$(ip route show default | awk '{print $3 "@" $5}')"
        say resolver="$(tr '\n' ' ' </etc/resolv.conf | tr ' ' _)"
        say links="$(ip -o link | awk -F': ' '{print $2}' | tr '\n' ,)" uid="$(id -u)"
        say ids="$(awk '{print $1 ":" $2 ":" $3}' /proc/self/uid_map)/$(cat /proc/self/setgroups)"
        # Capabilities in the namespace, though it is not root.
        say port="$(python3 -c 'import socket; s = socket.create_server(("", 80)); print(s.getsockname()[1])')"
        ip link add name more type veth peer name most; say link=$?; ip link del more
        say sysfs="$(cd /sys/class/net && echo * | tr ' ' ,):$(cat /sys/class/net/eth0/mtu)"
END
        lanlet exec sh look.sh
        # As a DHCP client does.
        lanlet exec -- sh -c 'echo nameserver 192.0.2.1 >/etc/new && mv /etc/new /etc/resolv.conf && cat /etc/resolv.conf' >moved
        say moved="$(tr ' ' _ <moved)"
        # Words of lanlet's own come before the command; '--' may stand between.
        say root="$(lanlet exec --root id -u)" words="$(lanlet exec --mtu 1300 -- cat /sys/class/net/eth0/mtu -)"
        say plain="$(cat /etc/resolv.conf | tr ' ' _)"
        lanlet exec --subnet 10.9.8.0/28 --gateway 10.9.8.14 --mtu 1400 --domain lab.test -- sh look.sh |
            sed 's/ \([a-z]*\)=/ other_\1=/g'
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let address = markers.get("address").unwrap_or_default();
    assert!(
        address.starts_with("192.168.122.") && address.ends_with("/24"),
        "{}",
        outcome.text()
    );
    assert_said(
        &outcome,
        &[
            ("mtu", "1500"),
            ("route", "192.168.122.1@eth0"),
            ("resolver", "nameserver_192.168.122.1_"),
            ("links", "lo,eth0,"),
            ("sysfs", "eth0,lo:1500"),
            ("uid", "1000"),
            ("root", "0"),
            ("port", "80"),
            ("link", "0"),
            ("ids", "1000:1000:1/deny"),
            ("moved", "nameserver_192.0.2.1"),
            ("words", "1300"),
            // The host's own file is as before.
            ("plain", "nameserver_198.51.100.2"),
            ("other_mtu", "1400"),
            ("other_route", "10.9.8.14@eth0"),
            ("other_resolver", "nameserver_10.9.8.14_search_lab.test_"),
        ],
    );
    let other = markers.get("other_address").unwrap_or_default();
    assert!(
        other.starts_with("10.9.8.") && other.ends_with("/28"),
        "{}",
        outcome.text()
    );
}

/// An /etc of the world's own, on a tmpfs, whose files can be replaced as the host's services do.
const OWN_ETC: &str = r#"
mkdir etc
cp -r --no-preserve=ownership /etc/. etc 2>/dev/null
umount /etc/resolv.conf
rm -f etc/resolv.conf etc/hosts
echo 'nameserver 198.51.100.2' >etc/resolv.conf
printf '127.0.0.1 localhost\n192.0.2.9 elsewhere\n' >etc/hosts
mount --bind etc /etc
"#;

#[test]
fn resolv_conf_outlasts_what_the_host_does_to_its_own() {
    let world = World::new().with(&["--dns"]);
    let Some(outcome) = scenario(
        &world,
        &(OWN_ETC.to_owned()
            + r#"
        cat >ask.sh <<'END'
        say() { echo "@@LANLET $*"; }
        ask() { say $1="$(getent ahostsv4 second.test | awk 'NR == 1 {print $1}')" $1_file="$(tr '\n ' ._ </etc/resolv.conf)"; }
        ask before
        echo ready >ready
        until [ -e go ]; do sleep 0.05; done
        ask after
        # What else the host replaces is seen.
        say passwd="$(getent passwd newcomer | cut -d: -f3)"
        # Links that go up are right in directories and beside them.
        say up="$(readlink -e /etc/deep/link)" beside="$(readlink -e /etc/link)"
        # The host's /etc is the user's own here: what would be lost with the guest fails.
        touch /etc/new 2>/dev/null || say lost=no
END
        mkdir -p etc/deep && ln -s ../../usr/bin/env etc/deep/link && ln -s ../usr/bin/env etc/link
        lanlet exec -- sh ask.sh &
        wait_for ready ready
        # As systemd-resolved, NetworkManager and dhclient do it, and useradd.
        echo 'nameserver 203.0.113.1' >etc/resolv.conf.new && mv etc/resolv.conf.new etc/resolv.conf
        (cat etc/passwd; echo newcomer:x:4321:4321::/:/bin/sh) >etc/passwd.new && mv etc/passwd.new etc/passwd
        touch go
        wait $!
        say status=$?
        say real="$(readlink -e /etc/link)"
        # Missing, and links to nowhere.
        one() { lanlet exec "$@" -- getent ahostsv4 second.test 2>>warnings | awk 'NR == 1 {print $1}'; }
        rm etc/resolv.conf
        say missing="$(one --dns 198.51.100.2)"
        ln -s ../run/nowhere/stub-resolv.conf etc/resolv.conf
        say dangling="$(one --dns 198.51.100.2)"
        rm etc/resolv.conf && mkfifo etc/resolv.conf
        say fifo="$(one --dns 198.51.100.2)"
        rm etc/resolv.conf && echo 'nameserver 198.51.100.2' >etc/resolv.conf
        # Another one inside, twice.
        lanlet exec -- "$LANLET" exec --subnet 10.7.0.0/24 -- \
            "$LANLET" exec --subnet 10.8.0.0/24 --guest-name inner --domain lab.test -- sh -c '
            say() { echo "@@LANLET $*"; }
            say nested="$(getent ahostsv4 second.test | awk "NR == 1 {print \$1}")"
            say nested_file="$(tr "\\n " ._ </etc/resolv.conf)"
            say nested_passwd="$(getent passwd newcomer | cut -d: -f3)" nested_up="$(readlink -e /etc/deep/link)"
            say hosts="$(getent hosts elsewhere | tr -s " " _)" localhost="$(grep -c localhost /etc/hosts)"
            own="$(ip -4 -o address show dev eth0 | awk "{print \$4}")"
            [ "$(getent ahostsv4 inner.lab.test | awk "NR == 1 {print \$1}")/24" = "$own" ] && say own=right
        ' 2>>warnings
        say warnings="$(grep -c /etc warnings)" host="$(tr '\n ' ._ </etc/resolv.conf)"
        "#),
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let real = markers.get("real").expect("a path");
    assert_said(
        &outcome,
        &[
            ("before", "203.0.113.1"),
            ("before_file", "nameserver_192.168.122.1."),
            ("after", "203.0.113.1"),
            ("after_file", "nameserver_192.168.122.1."),
            ("passwd", "4321"),
            ("up", real),
            ("beside", real),
            ("status", "0"),
            ("missing", "203.0.113.1"),
            ("dangling", "203.0.113.1"),
            ("fifo", "203.0.113.1"),
            ("nested", "203.0.113.1"),
            ("nested_file", "nameserver_10.8.0.1.search_lab.test."),
            ("nested_passwd", "4321"),
            ("nested_up", real),
            ("hosts", "192.0.2.9_elsewhere"),
            ("localhost", "1"),
            ("own", "right"),
            ("lost", "no"),
            ("warnings", "0"),
            ("host", "nameserver_198.51.100.2."),
        ],
    );
}

/// nss-resolve, nscd's clients and nss-mdns ask services of the host by unix sockets: these would
/// answer past the network's DNS and policy.
#[test]
fn resolvers_of_the_host_are_out_of_reach() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        mkdir -p /run/systemd/resolve /run/nscd /run/avahi-daemon
        sockets="/run/systemd/resolve/io.systemd.Resolve /run/nscd/socket /var/run/nscd/socket /run/avahi-daemon/socket"
        for each in $sockets; do
            [ -e "$each" ] || socat "unix-listen:$each,mode=666,fork" system:'echo host' 2>/dev/null &
        done
        for each in $sockets; do until [ -S "$each" ]; do sleep 0.02; done; done
        ask() { for each in $sockets; do socat -T1 - "unix-connect:$each" </dev/null 2>/dev/null; done | sort -u; }
        say outside="$(ask)"
        say inside="$(lanlet exec -- bash -c "sockets='$sockets'; $(declare -f ask); ask")"
        say still="$(ask)"
        "#,
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[("outside", "host"), ("inside", ""), ("still", "host")],
    );
}

/// Whose ids the system has more of: they are in the guest's namespace. Without privileges it can't be
/// tried, since `newuidmap` is setuid.
#[test]
fn subordinate_ids_are_there() {
    if !rustix::process::geteuid().is_root() {
        return common::skip("needs root, to make a user with subordinate ids");
    }
    let temp = common::TempDir::new();
    let script = temp.file(
        "ids.sh",
        r#"
        set -eu
        cd "$TMP"
        own() { cat "/etc/$1" 2>/dev/null >"$1" || true; echo "$2" >>"$1"; touch "/etc/$1"; mount --bind "$1" "/etc/$1"; }
        own passwd member:x:4321:4321::$TMP/home:/bin/bash
        own group member:x:4321:
        own subuid member:200000:70000
        own subgid 4321:300000:70000
        mkdir home run
        chown 4321:4321 home run
        chmod 700 run
        member() { setpriv --reuid 4321 --regid 4321 --clear-groups env HOME="$TMP/home" XDG_RUNTIME_DIR="$TMP/run" "$@"; }
        cat >look.sh <<'END'
        say() { echo "@@LANLET $*"; }
        map() { awk '{printf "%s:%s:%s,", $1, $2, $3}' /proc/self/$1; }
        say who="$(whoami)" users="$(map uid_map)" groups="$(map gid_map)" setgroups="$(cat /proc/self/setgroups)"
        say ambient="$(awk '/^CapAmb/ {print $2}' /proc/self/status)" eth0="$(ip -br link show dev eth0 | cut -d' ' -f1)"
        say nobody="$(setpriv --reuid nobody --regid nogroup --init-groups sh -c 'echo $(id -u):$(id -g)' 2>/dev/null)"
        say owner="$(stat -c %U:%G home)"
        privileges() { awk '/^NoNewPrivs/ {print $2}' /proc/$1/status; }
        for i in 1 2 3 4 5 6 7 8 9 10; do [ "$(privileges $PPID)" = 0 ] || break; sleep 0.2; done
        say privileges="$(privileges self):$(privileges $PPID)"
END
        member "$LANLET" exec sh look.sh
        member "$LANLET" exec --root sh -c '. ./look.sh
            su -s /bin/sh nobody -c "echo @@LANLET su=\$(id -u):\$(id -g)"
            tcpdump -n -i lo -Z nobody -c 1 >/dev/null 2>&1 & sleep 0.3
            until ! kill -0 $! 2>/dev/null; do ping -c 1 -W 1 127.0.0.1 >/dev/null; done
            wait $!; say tcpdump=$?' | sed 's/ \([a-z0-9]*\)=/ root_\1=/g'
        # Without the program there is the own id alone.
        mkdir bin
        for each in sh sleep awk cat whoami ip setpriv stat env cut id; do ln -s "$(command -v $each)" bin; done
        member env PATH="$TMP/bin" "$LANLET" exec sh look.sh | sed 's/ \([a-z0-9]*\)=/ alone_\1=/g'
        "#,
    );
    let lab = common::lab();
    let mut command = std::process::Command::new("unshare");
    command
        .args(["--mount", "--propagation", "private", "bash"])
        .arg(script)
        .env("LANLET", &lab.lanlet)
        .env("TMP", temp.path());
    let outcome = common::finish(command, std::time::Duration::from_secs(60)).passed();
    let markers = outcome.markers();
    let alone_all = markers.get("alone_ambient").expect("capabilities");
    assert_ne!(u64::from_str_radix(alone_all, 16), Ok(0));
    assert_said(
        &outcome,
        &[
            ("who", "member"),
            ("users", "0:200000:4321,4322:204321:65679,4321:4321:1,"),
            ("groups", "0:300000:4321,4322:304321:65679,4321:4321:1,"),
            ("setgroups", "allow"),
            ("eth0", "eth0"),
            ("nobody", "65534:65534"),
            ("owner", "member:member"),
            // lanlet gains none any more, once the command runs, which may.
            ("privileges", "0:1"),
            ("ambient", alone_all),
            ("root_who", "root"),
            ("root_su", "65534:65534"),
            ("root_tcpdump", "0"),
            ("alone_who", "member"),
            ("alone_users", "4321:4321:1,"),
            ("alone_setgroups", "deny"),
            ("alone_nobody", ""),
        ],
    );
}

/// lanlet's own processes can't be traced, gain no rights and leave no core files; commands are as ever.
#[test]
fn what_is_lanlets_own_is_hardened() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        ulimit -Sc 1000
        network
        cat >user.sh <<'END'
        own() {
            local pid=$1 traced=no
            readlink /proc/$pid/exe >/dev/null 2>&1 && [ -r /proc/$pid/environ ] && cat /proc/$pid/environ >/dev/null 2>&1 && traced=yes
            echo "$(awk '/^NoNewPrivs/ {print $2}' /proc/$pid/status):$(awk '/core file/ {print $5}' /proc/$pid/limits):$traced"
        }
        "$LANLET" exec sh -c 'echo "$(awk "/^NoNewPrivs/ {print \$2}" /proc/self/status):$(ulimit -Sc)"; sleep 60' >command &
        "$LANLET" run sh -c 'echo "$(awk "/^NoNewPrivs/ {print \$2}" /proc/self/status):$(ulimit -Sc)"; sleep 60' >vm &
        until [ -s command ] && [ -s vm ]; do sleep 0.05; done
        sleep 0.2
        echo "@@LANLET exec=$(own %EXEC) run=$(own $!) helper=$(own $(pgrep -f netns-helper | head -1)) up=$(own $NETWORK)"
        echo "@@LANLET of_exec=$(cat command) of_run=$(cat vm)"
        kill $(jobs -p)
END
        sed -i 's/own %EXEC/own $(jobs -p | head -1)/' user.sh
        export NETWORK
        user bash user.sh
        before=$(awk '/^NoNewPrivs/ {print $2}' /proc/self/status)
        # dash counts half as much as bash.
        say before=$before:2000
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let before = markers.get("before").expect("the scenario's own");
    for own in ["exec", "run", "helper", "up"] {
        assert_eq!(
            markers.get(own),
            Some("1:0:no"),
            "{own}: {}",
            outcome.text()
        );
    }
    assert_said(&outcome, &[("of_exec", before), ("of_run", before)]);
}

#[test]
fn exit_status_and_signals_pass_through() {
    let Some(outcome) = scenario(
        &World::new(),
        r#"
        status() { local name=$1; shift; "$@" 2>/dev/null; say "$name=$?"; }
        status zero lanlet exec -- true
        status seven lanlet exec -- sh -c 'exit 7'
        status killed lanlet exec -- sh -c 'kill -KILL $$'
        status missing lanlet exec -- /does/not/exist
        status not_executable lanlet exec -- /etc/passwd
        # A signal to lanlet reaches the command, which may do with it what it likes.
        "$LAB/as-user" "$LANLET" exec -- bash -c 'trap "exit 33" TERM; echo ready; while :; do sleep 0.1; done' >ready &
        wait_for ready ready
        kill -TERM $!
        wait $!
        say trapped=$?
        "$LAB/as-user" "$LANLET" exec -- sh -c 'echo ready; exec sleep 60' >ready2 &
        wait_for ready2 ready
        kill -HUP $!
        wait $!
        say hung_up=$?
        say stdin="$(echo through | lanlet exec -- cat)"
        "#,
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("zero", "0"),
            ("seven", "7"),
            ("killed", "137"),
            ("missing", "127"),
            ("not_executable", "126"),
            ("trapped", "33"),
            ("hung_up", "129"),
            ("stdin", "through"),
        ],
    );
}

#[test]
fn files_come_whole_by_http() {
    // As root the world is another user's: the files must be open to it.
    let world = World::new();
    let pages = world.temp().path().to_owned();
    let world = world.with(&["--dns", "--http", &pages.to_string_lossy()]);
    let Some(outcome) = scenario(
        &world,
        r#"
        head -c 20000003 /dev/urandom >big
        head -c 0 /dev/null >empty
        say sent="$(sha <big)"
        say received="$(lanlet exec -- curl -sf http://198.51.100.2/big | sha)"
        say by_name="$(lanlet exec -- curl -sf http://second.test/big | sha)"
        lanlet exec -- curl -sf -o got -w ' @@LANLET http=%{http_code} size=%{size_download}\n' http://outside.test/empty
        lanlet exec -- curl -s -o got -w ' @@LANLET missing=%{http_code}\n' http://outside.test/none
        "#,
    ) else {
        return;
    };
    let outcome = outcome.passed();
    let markers = outcome.markers();
    let sent = markers.get("sent").expect("a checksum");
    assert_said(
        &outcome,
        &[
            ("received", sent),
            ("by_name", sent),
            ("http", "200"),
            ("size", "0"),
            ("missing", "404"),
        ],
    );
}

#[test]
fn the_gateway_pings_and_resolves() {
    let world = World::new().with(&["--dns", "--ping"]);
    let Some(outcome) = scenario(
        &world,
        r#"
        network
        cat >ask.sh <<'END'
        say() { echo "@@LANLET $*"; }
        say ping="$(ping -c 3 -i 0.1 -W 2 192.168.122.1 | grep -o '[0-9]* received' | tr ' ' _)"
        ping -c 1 -W 2 -s 1472 -M do 192.168.122.1 >/dev/null; say ping_full=$?
        say udp="$(dig +short outside.test)" tcp="$(dig +tcp +short outside.test)"
        # Too long for a datagram: truncated, and whole over TCP.
        say truncated="$(dig +ignore +nocomments +noall +comments txt big.test | grep -c 'flags:.* tc ')"
        say big="$(dig +short txt big.test | wc -l)" big_tcp="$(dig +tcp +short txt big.test | wc -l)"
        say missing="$(dig none.test | grep -o NXDOMAIN)" missing_tcp="$(dig +tcp none.test | grep -o NXDOMAIN)"
        say libc="$(getent ahostsv4 second.test | awk 'NR == 1 {print $1}')"
        # Many at once, from many ports.
        for i in $(seq 40); do dig +short second.test >answer.$i & done; wait
        say together="$(cat answer.* | grep -c '^203.0.113.1$')"
END
        lanlet exec --name default -- sh ask.sh
        say drops="$(drops)"
        "#,
    ) else {
        return;
    };
    assert_said(
        &outcome.passed(),
        &[
            ("ping", "3_received"),
            ("ping_full", "0"),
            ("udp", "198.51.100.2"),
            ("tcp", "198.51.100.2"),
            ("truncated", "1"),
            ("big", "16"),
            ("big_tcp", "16"),
            ("missing", "NXDOMAIN"),
            ("missing_tcp", "NXDOMAIN"),
            ("libc", "203.0.113.1"),
            ("together", "40"),
            ("drops", "none"),
        ],
    );
}
