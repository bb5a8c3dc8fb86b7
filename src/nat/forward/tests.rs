//! Every form, every refusal, and the set.

use std::num::NonZeroU32;

use super::*;
use crate::frame::Mac;
use proptest::prelude::*;
use std::net::IpAddr;

fn spec(text: &str) -> ForwardSpec {
    text.parse()
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// What the text is written as.
fn written(text: &str) -> String {
    spec(text).to_string()
}

fn refused(text: &str) -> ForwardError {
    match text.parse::<ForwardSpec>() {
        Err(error) => error,
        Ok(spec) => panic!("{text:?} was read as {spec}"),
    }
}

fn host_and_guest(text: &str) -> (HostPorts, Guest, PortRange) {
    match spec(text).direction {
        Direction::ToGuest {
            listen: HostEnd::Ports(host),
            guest,
            ports,
            ..
        } => (host, guest, ports),
        other => panic!("{other:?}"),
    }
}

#[test]
fn dockers_form() {
    let (host, guest, ports) = host_and_guest("127.0.0.1:8080:80/udp");
    assert_eq!(host.address, Some([127, 0, 0, 1].into()));
    assert_eq!(
        (host.protocol, host.ports, host.interface),
        (
            Protocol::Udp,
            Some(PortRange::new(8080, 8080).unwrap()),
            None
        )
    );
    assert_eq!((guest, ports.first(), ports.count()), (Guest::Own, 80, 1));

    for (text, same) in [
        ("8080:80", "8080:80/tcp"),
        ("8080:80/TCP", "8080:80/tcp"),
        ("80", "0:80/tcp"),
        ("0:80", "0:80/tcp"),
        ("127.0.0.1::80", "127.0.0.1:0:80/tcp"),
        (":8080:80", "8080:80/tcp"),
        ("*:8080:80", "8080:80/tcp"),
        ("0.0.0.0:8080:80", "0.0.0.0:8080:80/tcp"),
        ("[::1]:8080:80", "[::1]:8080:80/tcp"),
        ("[::]:8080:80", "[::]:8080:80/tcp"),
        ("8000-8010:9000-9010/udp", "8000-8010:9000-9010/udp"),
        ("8080:192.168.122.5:80", "8080:192.168.122.5:80/tcp"),
        ("8080:[FD00::0:5]:80", "8080:[fd00::5]:80/tcp"),
        (
            "8080:[52:54:00:12:34:5A]:80",
            "8080:[52:54:00:12:34:5a]:80/tcp",
        ),
        (
            "8080:52-54-00-12-34-5a:80",
            "8080:[52:54:00:12:34:5a]:80/tcp",
        ),
        ("8080:Web-1.lan:80", "8080:web-1.lan:80/tcp"),
        ("10.0.0.1:8080:web:80", "10.0.0.1:8080:web:80/tcp"),
        ("10.0.0.1::web:80", "10.0.0.1:0:web:80/tcp"),
        ("8080:80,client-address", "8080:80/tcp,client-address"),
        ("8080:80/udp,interface=eth0", "8080:80/udp,interface=eth0"),
        ("%eth0:8080:80", "8080:80/tcp,interface=eth0"),
        ("10.0.0.1%br-lan:1:2", "10.0.0.1:1:2/tcp,interface=br-lan"),
        ("[fe80::1%eth0]:1:2", "[fe80::1]:1:2/tcp,interface=eth0"),
        ("[fe80::1]%eth0:1:2", "[fe80::1]:1:2/tcp,interface=eth0"),
        ("8080:80,name=web", "8080:80/tcp,name=web"),
        (
            "8080:80,name=web,client-address,interface=lo",
            "8080:80/tcp,interface=lo,client-address,name=web",
        ),
    ] {
        assert_eq!(written(text), same, "{text}");
        assert_eq!(spec(same), spec(text), "{text}");
        assert_eq!(ForwardSpec::from_publish(text), Ok(spec(text)));
    }
}

#[test]
fn qemus_forms() {
    for (text, same) in [
        ("tcp::2222-:22", "2222:22/tcp"),
        (
            "TCP:127.0.0.1:2222-192.168.122.5:22",
            "127.0.0.1:2222:192.168.122.5:22/tcp",
        ),
        ("udp:[::1]:53-[fd00::5]:53", "[::1]:53:[fd00::5]:53/udp"),
        ("tcp::0-:22", "0:22/tcp"),
        ("tcp::2222-my-vm:22", "2222:my-vm:22/tcp"),
        (
            "tcp::2222-52-54-00-12-34-56:22",
            "2222:[52:54:00:12:34:56]:22/tcp",
        ),
        ("tcp::2222-:22,client-address", "2222:22/tcp,client-address"),
        ("unix:/run/my-web.sock-:80", "unix:/run/my-web.sock-:80"),
        (
            "unix:/run/web-10.0.0.5:80,name=w",
            "unix:/run/web-10.0.0.5:80,name=w",
        ),
        ("unix:/run/a-[my-vm]:80", "unix:/run/a-[my-vm]:80"),
        ("unix:/run/a-[fd00::5]:80", "unix:/run/a-[fd00::5]:80"),
        ("unix:/run/a-vm:80", "unix:/run/a-vm:80"),
    ] {
        assert_eq!(written(text), same, "{text}");
        assert_eq!(spec(same), spec(text), "{text}");
        assert_eq!(ForwardSpec::from_hostfwd(text), Ok(spec(text)));
    }
    assert_eq!(
        ForwardSpec::from_hostfwd("::2222-:22"),
        Ok(spec("2222:22")),
        "no protocol is tcp"
    );

    let text = "tcp:10.0.2.100:5432-unix:/run/pg/.s.PGSQL.5432";
    assert_eq!(
        spec(text).direction,
        Direction::ToHost {
            address: Some([10, 0, 2, 100].into()),
            port: 5432,
            path: "/run/pg/.s.PGSQL.5432".parse().unwrap(),
        }
    );
    for text in [
        text,
        "tcp::80-unix:/run/a-unix.sock",
        "tcp:[fd00::1]:80-unix:/a,name=db",
    ] {
        assert_eq!(written(text), text);
        assert_eq!(ForwardSpec::from_guestfwd(text), Ok(spec(text)));
    }
    assert_eq!(
        ForwardSpec::from_guestfwd("::80-unix:/a"),
        Ok(spec("tcp::80-unix:/a"))
    );
}

#[test]
fn every_wrong_part_is_refused_by_its_name() {
    for (text, key, reason) in [
        ("", "guest port", "missing"),
        ("8080:", "guest port", "missing"),
        ("8080:80/sctp", "protocol", "neither tcp nor udp"),
        ("8080:80/", "protocol", "neither"),
        ("8080:0", "guest port", "0 is no port"),
        ("0-5:0-5", "host port", "0 is no port"),
        ("8080:65536", "guest port", "above 65535"),
        ("99999999999999999999:80", "host port", "above 65535"),
        ("8080:+80", "guest port", "no port"),
        ("8080:http", "guest port", "\"http\" is no port"),
        ("web/x:80", "protocol", "x:80"),
        ("8010-8000:80-90", "host port", "ends before it begins"),
        (
            "8000-8010:80",
            "guest port",
            "80 is 1 port and the host's 8000-8010 is 11 ports",
        ),
        ("8000-8010:8000-8011", "guest port", "12 ports"),
        ("80-90", "host port", "name a range"),
        ("1-4000:1-4000", "host port", "at most 2048"),
        ("1-2-3:1-3", "host port", "no port"),
        (
            "localhost:8080:80",
            "host address",
            "\"localhost\" is no IP address",
        ),
        ("256.1.1.1:8080:80", "host address", "no IP address"),
        ("[::1:8080:80", "form", "without ']'"),
        ("::1]:8080:80", "form", "stray ']'"),
        ("[[::1]]:8080:80", "form", "stray '['"),
        ("[::1]x:8080:80", "host address", "follows the bracket"),
        ("::1:8080:80:90", "form", "go in brackets"),
        ("8080:52:54:00:12:34:56:80", "form", "go in brackets"),
        ("224.0.0.1:8080:80", "host address", "group address"),
        ("255.255.255.255:8080:80", "host address", "group address"),
        (
            "[::ffff:127.0.0.1]:8080:80",
            "host address",
            "write 127.0.0.1",
        ),
        ("[fe80::1]:8080:80", "host address", "which interface"),
        ("8080:8081:80", "guest", "does not end in a number"),
        ("8080:10.0.0.300:80", "guest", "does not end in a number"),
        ("8080:a b:80", "guest", "is no name"),
        ("8080:-web:80", "guest", "is no name"),
        ("8080:[fd00:::5]:80", "guest", "no IPv6 or MAC"),
        ("8080:[fe80::1%eth0]:80", "guest", "no IPv6 or MAC"),
        ("8080:0.0.0.0:80", "guest", "no address of a guest"),
        ("8080:127.0.0.1:80", "guest", "no address of a guest"),
        ("8080:[::1]:80", "guest", "no address of a guest"),
        ("8080:[ff02::1]:80", "guest", "group address"),
        (
            "8080:[01:00:5e:00:00:01]:80",
            "guest",
            "group address or zero",
        ),
        (
            "8080:[00:00:00:00:00:00]:80",
            "guest",
            "group address or zero",
        ),
        ("8080:80,", "option", "is not client-address"),
        (
            "8080:80,client-adress",
            "option",
            "\"client-adress\" is not",
        ),
        ("8080:80,client-address=yes", "client-address", "no value"),
        (
            "8080:80,client-address,client-address",
            "client-address",
            "twice",
        ),
        ("8080:80,interface", "interface", "needs a value"),
        ("8080:80,interface=", "interface", "no name of an interface"),
        (
            "8080:80,interface=a/b",
            "interface",
            "no name of an interface",
        ),
        ("8080:80,interface=abcdefghijklmnop", "interface", "no name"),
        ("%eth0:8080:80,interface=eth1", "interface", "twice"),
        ("[fe80::1%eth0]%eth1:1:2", "interface", "twice"),
        ("8080:80,name=1", "name", "is not a letter"),
        ("8080:80,name", "name", "needs a value"),
        ("8080:80,name=a,name=b", "name", "twice"),
        (
            "127.0.0.1:8080:80,client-address",
            "client-address",
            "loopback",
        ),
        ("[::1]:8080:80,client-address", "client-address", "loopback"),
        (
            "10.0.0.1:80:[fd00::5]:80,client-address",
            "client-address",
            "family",
        ),
        (
            "unix:/run/a-:80,client-address",
            "client-address",
            "no address",
        ),
        ("unix:/run/a-:80,interface=lo", "interface", "on none"),
        ("sctp::2222-:22", "host address", "no IP address"),
        ("tcp:2222-:22", "form", "is not [tcp|udp]"),
        ("tcp::2222:22", "form", "no '-'"),
        ("tcp:", "form", "is not [tcp|udp]"),
        ("tcp:::1:2222-:22", "form", "go in brackets"),
        ("tcp::8000-8010-:8000-8010", "host port", "no ranges"),
        (
            "tcp::8000-8010-10.0.0.5:8000-8010",
            "host port",
            "no ranges",
        ),
        ("tcp::8000-:8000-8010", "host port", "no ranges"),
        ("tcp::-:22,name=", "name", "is not a letter"),
        ("tcp::2222-:", "guest port", "no port"),
        ("unix:run/a-:80", "path", "absolute"),
        ("unix:/run/-:80", "path", "absolute"),
        ("unix:/run/a:80", "form", "no '-'"),
        ("unix:/run/a", "form", "is not unix:PATH"),
        ("unix:/run/a:b-:80", "path", "separates"),
        ("unix:/run/a-:80-90", "guest port", "one port"),
        ("tcp:10.0.2.4:80-unix:run/a", "path", "absolute"),
        ("tcp:10.0.2.4:80-unix:/a:b", "path", "separates"),
        ("tcp:10.0.2.4:80-cmd:/bin/cat", "path", "EXEC:"),
        ("udp:10.0.2.4:80-unix:/a", "protocol", "tcp only"),
        ("tcp:10.0.2.4:0-unix:/a", "guest port", "0 is no port"),
        ("tcp:10.0.2.4-unix:/a", "form", "is not [tcp]"),
        ("tcp:0.0.0.0:80-unix:/a", "guest address", "leave for"),
        ("tcp:127.0.0.1:80-unix:/a", "guest address", "leave for"),
        ("tcp:224.0.0.1:80-unix:/a", "guest address", "group"),
        ("tcp:host:80-unix:/a", "guest address", "no IP address"),
        (
            "tcp::80-unix:/a,interface=lo",
            "interface",
            "forwards to a guest",
        ),
        (
            "tcp::80-unix:/a,client-address",
            "client-address",
            "forwards to a guest",
        ),
    ] {
        let error = refused(text);
        assert_eq!(error.key, key, "{text}: {error}");
        assert!(error.reason.contains(reason), "{text}: {error}");
    }
    let long = format!("unix:/{}-:80", "x".repeat(part::SOCKET_PATH_LEN_MAX));
    assert_eq!(refused(&long).key, "path");
    for (form, text, words) in [
        ("publish", "tcp::2222-:22", "--hostfwd"),
        ("publish", "unix:/run/a-:80", "--hostfwd"),
        ("hostfwd", "8080:80", "is not tcp, udp or unix"),
        ("guestfwd", "tcp::2222-:22", "is not unix:"),
        ("guestfwd", "8080", "no '-'"),
    ] {
        let read = match form {
            "publish" => ForwardSpec::from_publish,
            "hostfwd" => ForwardSpec::from_hostfwd,
            _ => ForwardSpec::from_guestfwd,
        };
        let error = read(text).unwrap_err().to_string();
        assert!(error.contains(words), "{form} {text}: {error}");
    }
}

#[test]
fn what_overlaps() {
    let key = |a: &str, b: &str| {
        let (a, b) = (spec(a), spec(b));
        let key = a.overlap(&b).map(|(key, _)| key);
        assert_eq!(b.overlap(&a).map(|(key, _)| key), key, "{a} {b}");
        key
    };
    for (a, b) in [
        ("80:80", "80:90"),
        ("80:80", "127.0.0.1:80:90"),
        ("80:80", "[::1]:80:90"),
        ("0.0.0.0:80:80", "127.0.0.1:80:90"),
        ("[::]:80:80", "[::1]:80:90"),
        ("80-90:80-90", "90-100:80-90"),
        ("80-90:80-90", "85:1"),
        ("80:80,interface=a", "80:80,interface=a"),
        ("80:80,interface=a", "80:80"),
    ] {
        assert_eq!(key(a, b), Some("host port"), "{a} {b}");
    }
    for (a, b) in [
        ("80:80", "81:80"),
        ("80:80", "80:80/udp"),
        ("127.0.0.1:80:80", "127.0.0.2:80:80"),
        ("0.0.0.0:80:80", "[::1]:80:90"),
        ("0.0.0.0:80:80", "[::]:80:90"),
        ("80-90:80-90", "91-100:81-90"),
        ("80:80,interface=a", "80:80,interface=b"),
        ("0:80", "0:80"),
        ("unix:/a-:80", "unix:/b-:80"),
        ("unix:/a-:80", "80:80"),
        ("tcp::80-unix:/a", "tcp::81-unix:/a"),
        ("tcp::80-unix:/a", "tcp:10.0.0.9:80-unix:/a"),
        ("tcp::80-unix:/a", "80:80"),
    ] {
        assert_eq!(key(a, b), None, "{a} {b}");
    }
    assert_eq!(key("80:80,name=a", "81:81,name=a"), Some("name"));
    assert_eq!(key("unix:/a-:80", "unix:/a-:81"), Some("path"));
    assert_eq!(
        key("tcp::80-unix:/a", "tcp::80-unix:/b"),
        Some("guest port")
    );
}

#[test]
fn the_set_takes_a_forward_whole_or_not_at_all() {
    let mut set = ForwardSet::default();
    let web = set.add(spec("8080-8089:web:80-89,name=web")).unwrap();
    let error = set
        .add(spec("127.0.0.1:8085-8095:10.0.0.5:1-11"))
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "host port: 8085/tcp is taken by forward 1 (8080-8089:web:80-89/tcp,name=web)"
    );
    let error = set.add(spec("8090:80")).unwrap_err();
    assert_eq!(error.key, "guest", "{error}");
    assert_eq!(set.iter().count(), 1);

    let own = Guest::Mac(Mac([0x52, 0x54, 0, 0, 0, 1]));
    let ssh = set.add(spec("2222:22").for_guest(own.clone())).unwrap();
    assert_eq!(
        set.iter().nth(1).unwrap().1.to_string(),
        "2222:[52:54:00:00:00:01]:22/tcp"
    );
    let named = spec("2223:web:22");
    assert_eq!(
        named.clone().for_guest(own),
        named,
        "only where none is named"
    );

    for words in ["1", "web", "8080-8089:web:80-89,name=web"] {
        assert_eq!(set.find(words), Some(web), "{words}");
    }
    assert_eq!(set.find("2222:[52:54:00:00:00:01]:22"), Some(ssh));
    for words in ["3", "", "ssh", "2222:22"] {
        assert_eq!(set.find(words), None, "{words}");
    }
    assert_eq!(set.remove(web), Some(spec("8080-8089:web:80-89,name=web")));
    assert_eq!(set.remove(web), None);
    let again = set.add(spec("8085:web:80")).unwrap();
    assert!(again > ssh, "a number is never given twice");
}

#[test]
fn the_sets_limits() {
    let mut set = ForwardSet::default();
    // Without an address a port takes two sockets.
    set.add(spec("1-1024:web:1-1024")).unwrap();
    set.add(spec("127.0.0.1:2001-4048:web:1-2048")).unwrap();
    let error = set.add(spec("127.0.0.1:5000:web:1")).unwrap_err();
    assert_eq!(error.key, "forwards", "{error}");
    assert!(error.reason.contains("4097 listening sockets"), "{error}");
    set.add(spec("tcp::80-unix:/a")).unwrap();

    let mut set = ForwardSet::default();
    for port in 1..=FORWARDS_MAX as u16 {
        set.add(spec(&format!("127.0.0.1:{port}:web:80"))).unwrap();
    }
    let error = set.add(spec("127.0.0.1:0:web:80")).unwrap_err();
    assert!(error.reason.contains("at most 1024"), "{error}");
}

#[test]
fn the_hosts_choice_of_a_port_is_put_in() {
    let chosen = PortRange::new(41_000, 41_000).unwrap();
    let text = |words: &str| spec(words).with_host_port(chosen).to_string();
    assert_eq!(text("127.0.0.1:0:web:80"), "127.0.0.1:41000:web:80/tcp");
    assert_eq!(text("8080:web:80"), "8080:web:80/tcp");
}

fn any_guest() -> impl Strategy<Value = Guest> {
    prop_oneof![
        Just(Guest::Own),
        any::<IpAddr>().prop_map(Guest::Address),
        any::<[u8; 6]>().prop_map(|bytes| Guest::Mac(Mac(bytes))),
        "[a-z0-9]([a-z0-9_-]{0,8}[a-z0-9])?(\\.[a-z][a-z0-9]{0,4})?"
            .prop_filter_map("a name", |name| name.parse().ok().map(Guest::Name)),
    ]
}

fn any_ports() -> impl Strategy<Value = PortRange> {
    (1..=65_535u16, 0..2_048u16)
        .prop_map(|(first, more)| PortRange::new(first, first.saturating_add(more)).unwrap())
}

fn any_listen(guest_ports: PortRange) -> impl Strategy<Value = HostEnd> {
    let count = guest_ports.count() as u16 - 1;
    let ports = (1..=65_535u16 - count)
        .prop_map(move |first| PortRange::new(first, first + count).unwrap());
    let host = (
        any::<bool>(),
        any::<Option<IpAddr>>(),
        proptest::option::of("[a-z][a-z0-9-]{0,14}"),
        proptest::option::of(ports),
    );
    let host = host.prop_map(|(tcp, address, interface, ports)| {
        HostEnd::Ports(HostPorts {
            protocol: if tcp { Protocol::Tcp } else { Protocol::Udp },
            address,
            interface: interface.map(|name| name.parse().unwrap()),
            ports,
        })
    });
    let unix = (any_path(), any::<bool>())
        .prop_map(|(path, allow)| HostEnd::Unix(path, AllowGuests(allow)));
    prop_oneof![3 => host, 1 => unix]
}

fn any_path() -> impl Strategy<Value = SocketPath> {
    "/[ -~]{0,30}[a-z\\]-]".prop_filter_map("a path", |path| path.parse().ok())
}

fn any_name() -> impl Strategy<Value = Option<ForwardName>> {
    proptest::option::of("[A-Za-z][A-Za-z0-9_.-]{0,31}".prop_map(|name| name.parse().unwrap()))
}

fn any_spec() -> impl Strategy<Value = ForwardSpec> {
    let to_guest = any_ports().prop_flat_map(|ports| {
        (any_listen(ports), any_guest(), any::<bool>()).prop_map(move |(listen, guest, client)| {
            Direction::ToGuest {
                listen,
                guest,
                ports,
                shown: match client {
                    true => ShownSource::Client,
                    false => ShownSource::Gateway,
                },
            }
        })
    });
    let to_host =
        (any::<Option<IpAddr>>(), 1..=65_535u16, any_path()).prop_map(|(address, port, path)| {
            Direction::ToHost {
                address,
                port,
                path,
            }
        });
    let any_max = prop_oneof![Just(None), (1..9u32).prop_map(NonZeroU32::new)];
    (
        any_name(),
        any_max,
        prop_oneof![4 => to_guest, 1 => to_host],
    )
        .prop_map(|(name, max, direction)| ForwardSpec {
            name,
            max,
            direction,
        })
}

proptest! {
    /// What is written is read back as the same forward, or both ways refused for the same reason.
    #[test]
    fn writing_and_reading_agree(spec in any_spec()) {
        let read = spec.to_string().parse::<ForwardSpec>();
        match spec.check() {
            Ok(()) => prop_assert_eq!(read, Ok(spec)),
            Err(error) => {
                let key = read.map_err(|read| read.key);
                prop_assert_eq!(key, Err(error.key));
            }
        }
    }

    /// No text makes the reader panic, and what it takes has passed the check.
    #[test]
    fn any_text_is_read_or_refused(text in "\\PC{0,40}|([a-z0-9:\\[\\]/%,=*.-]|tcp|unix:|-unix:){0,16}") {
        for read in [
            ForwardSpec::from_publish,
            ForwardSpec::from_hostfwd,
            ForwardSpec::from_guestfwd,
            str::parse,
        ] {
            if let Ok(spec) = read(&text) {
                prop_assert_eq!(spec.check(), Ok(()));
                prop_assert_eq!(spec.to_string().parse::<ForwardSpec>(), Ok(spec));
            }
        }
    }
}
