//! How forwards are written.
//!
//! | form | example |
//! |---|---|
//! | docker's (`--publish`) | `8080:80`, `127.0.0.1:8080:80/tcp`, `[::1]:8000-8010:web:8000-8010/udp` |
//! | QEMU's (`--hostfwd`) | `tcp:127.0.0.1:2222-192.168.122.5:22`, `udp::5353-:53`, `unix:/run/web.sock-:80` |
//! | QEMU's (`--guestfwd`) | `tcp:192.168.122.1:5432-unix:/run/postgresql/.s.PGSQL.5432` |
//!
//! [`ForwardSpec`] reads any of them (`FromStr`) and is written in the first of them that can say it;
//! what it writes it reads back as the same forward.
//!
//! # Docker's form
//! `[ADDR:][HOSTPORT[-END]:][GUEST:]GUESTPORT[-END][/tcp|/udp]`; what stands where HOSTPORT may and is no
//! number is GUEST. Without ADDR all addresses of the host
//! are meant, as docker has it. Without HOSTPORT, or with 0, the host chooses one. GUEST is an
//! address, a MAC or the name of a lease; the guest of the command itself needs none. What has colons
//! of its own stands in brackets: `[fd00::5]`, `[52:54:00:12:34:56]`.
//!
//! # QEMU's forms
//! `[tcp|udp]:[ADDR]:HOSTPORT-[GUEST]:GUESTPORT` and `unix:PATH-[GUEST]:GUESTPORT`, without ranges. In
//! the latter a lease name with a dash stands in brackets, as paths have dashes too. An address left
//! out means the same as in docker's form.
//!
//! # Options
//! After a comma, in any form: `client-address` (the guest sees the client's own address),
//! `interface=eth0` (or `ADDR%eth0`), `name=web`, `max=100` (connections or UDP sessions at a time), and
//! for a unix socket `allow-guests` (its clients may be guests of `lanlet exec`).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU32;
use std::str::FromStr;

use super::spec::{
    AllowGuests, Direction, ForwardError, ForwardName, ForwardSpec, Guest, HostEnd, HostPorts,
    InterfaceName, PortRange, Protocol, ShownSource, SocketPath,
};
use crate::frame::Mac;

const PUBLISH_FORM: &str = "[ADDR:][HOSTPORT[-END]:][GUEST:]GUESTPORT[-END][/tcp|/udp]";
const HOSTFWD_FORM: &str = "[tcp|udp]:[ADDR]:HOSTPORT-[GUEST]:GUESTPORT";
const HOSTFWD_UNIX_FORM: &str = "unix:PATH-[GUEST]:GUESTPORT";
const GUESTFWD_FORM: &str = "[tcp]:[ADDR]:PORT-unix:PATH";
const ONLY_UNIX: &str = "is for forwards from a unix socket: guests reach others by policy";
const BRACKETS: &str = "IPv6 and MAC addresses go in brackets";

type Parsed<T> = Result<T, ForwardError>;

fn refuse<T>(key: &'static str, reason: impl Into<String>) -> Parsed<T> {
    Err(ForwardError::new(key, reason))
}

/// Whether the text begins with a protocol, as no text in docker's form does.
fn is_qemu_form(text: &str) -> bool {
    let start = text.split(':').next().unwrap_or_default();
    let words = ["tcp", "udp", "unix"];
    words.iter().any(|word| start.eq_ignore_ascii_case(word))
}

impl FromStr for ForwardSpec {
    type Err = ForwardError;

    /// Reads any form.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match is_qemu_form(text) {
            // No port begins with a slash.
            false if text.starts_with(':') && text.contains("-unix:/") => Self::from_guestfwd(text),
            true if text.contains("-unix:") || text.contains("-cmd:") => Self::from_guestfwd(text),
            true => Self::from_hostfwd(text),
            false => Self::from_publish(text),
        }
    }
}

impl ForwardSpec {
    /// Reads docker's form.
    ///
    /// # Errors
    /// The part that is wrong.
    pub fn from_publish(text: &str) -> Parsed<Self> {
        let (main, options) = Options::split(text)?;
        if is_qemu_form(main) {
            let reason = format!("{main:?} is QEMU's form, for --hostfwd or --guestfwd");
            return refuse("form", reason);
        }
        let (ends, protocol) = match main.split_once('/') {
            Some((ends, protocol)) => (ends, protocol.parse()?),
            None => (main, Protocol::Tcp),
        };
        let mut parts = split(ends)?;
        let Some(guest_ports) = parts.pop().filter(|part| !part.is_empty()) else {
            return refuse("guest port", format!("missing: {PUBLISH_FORM}"));
        };
        let (address, host_port, guest) = match parts[..] {
            [] => (None, "", ""),
            [host_port] if is_ports(host_port) => (None, host_port, ""),
            [guest] => (None, "", guest),
            [first, second] if is_ports(first) && !first.is_empty() => (None, first, second),
            [address, host_port] if is_ports(host_port) => (Some(address), host_port, ""),
            [address, guest] => (Some(address), "", guest),
            [address, host_port, guest] => (Some(address), host_port, guest),
            _ => {
                return refuse(
                    "form",
                    format!("{main:?} is not {PUBLISH_FORM}: {BRACKETS}"),
                );
            }
        };
        let (address, interface) = host_address(address.unwrap_or_default())?;
        let host = HostPorts {
            protocol,
            address,
            interface,
            ports: host_ports(host_port)?,
        };
        let ports = range("guest port", guest_ports)?;
        options.into_forward(HostEnd::Ports(host), parse_guest(guest)?, ports)
    }

    /// Reads the form of QEMU's `hostfwd`.
    ///
    /// # Errors
    /// The part that is wrong.
    pub fn from_hostfwd(text: &str) -> Parsed<Self> {
        let (main, options) = Options::split(text)?;
        let Some((protocol, rest)) = main.split_once(':') else {
            return refuse("form", format!("{main:?} is not {HOSTFWD_FORM}"));
        };
        if protocol.eq_ignore_ascii_case("unix") {
            return from_hostfwd_unix(rest, options);
        }
        let protocol = match protocol {
            "" => Protocol::Tcp,
            word => match word.parse() {
                Ok(protocol) => protocol,
                Err(_) => {
                    let reason = format!("{word:?} is not tcp, udp or unix: {HOSTFWD_FORM}");
                    return refuse("protocol", reason);
                }
            },
        };
        let [address, ports, guest_port] = split(rest)?[..] else {
            return refuse(
                "form",
                format!("{main:?} is not {HOSTFWD_FORM}: {BRACKETS}"),
            );
        };
        let Some((host_port, guest)) = ports.split_once('-') else {
            return refuse("form", format!("{main:?} has no '-': {HOSTFWD_FORM}"));
        };
        let guest_is_port = guest.parse::<Mac>().is_err()
            && guest
                .split_once('-')
                .is_some_and(|(port, _)| is_ports(port));
        if guest_is_port || guest_port.contains('-') {
            let reason = "this form has no ranges: write 8000-8010:[GUEST:]8000-8010 (--publish)";
            return refuse("host port", reason);
        }
        let (address, interface) = host_address(address)?;
        let host = HostPorts {
            protocol,
            address,
            interface,
            ports: host_ports(host_port)?,
        };
        let ports = range("guest port", guest_port)?;
        options.into_forward(HostEnd::Ports(host), parse_guest(guest)?, ports)
    }

    /// Reads the form of QEMU's `guestfwd`.
    ///
    /// # Errors
    /// The part that is wrong.
    pub fn from_guestfwd(text: &str) -> Parsed<Self> {
        let (main, options) = Options::split(text)?;
        let Some((server, device)) = main.split_once('-') else {
            return refuse("form", format!("{main:?} has no '-': {GUESTFWD_FORM}"));
        };
        if device.starts_with("cmd:") {
            let reason = "programs are not started for guests: let socat do it, \
                          'UNIX-LISTEN:/run/x.sock,fork EXEC:PROGRAM', and name its socket";
            return refuse("path", reason);
        }
        let Some(path) = device.strip_prefix("unix:") else {
            return refuse("path", format!("{device:?} is not unix:/PATH"));
        };
        let [protocol, address, port] = split(server)?[..] else {
            return refuse(
                "form",
                format!("{server:?} is not [tcp]:[ADDR]:PORT: {BRACKETS}"),
            );
        };
        if !protocol.is_empty() && protocol.parse::<Protocol>()? != Protocol::Tcp {
            return refuse("protocol", "a unix socket carries tcp only");
        }
        let address = match address {
            "" => None,
            text => Some(parse_address("guest address", text)?),
        };
        let ports = range("guest port", port)?;
        if ports.count() > 1 {
            return refuse("guest port", format!("{ports}: one port leads to a socket"));
        }
        if options.allow_guests {
            return refuse("allow-guests", ONLY_UNIX);
        }
        let for_guests = [
            ("client-address", options.client_address),
            ("interface", options.interface.is_some()),
            ("max", options.max.is_some()),
        ];
        if let Some((key, _)) = for_guests.iter().find(|(_, given)| *given) {
            return refuse(key, "is for forwards to a guest");
        }
        let spec = ForwardSpec {
            name: options.name,
            max: None,
            direction: Direction::ToHost {
                address,
                port: ports.first(),
                path: path.parse()?,
            },
        };
        spec.check().map(|()| spec)
    }
}

/// Reads `PATH-[GUEST]:GUESTPORT`. No colon is in a path, so the last one outside brackets is the
/// port's, and the dash before the guest is the last one that is not in brackets either.
fn from_hostfwd_unix(rest: &str, options: Options) -> Parsed<ForwardSpec> {
    let Some((head, port)) = rest.rsplit_once(':') else {
        return refuse("form", format!("unix:{rest} is not {HOSTFWD_UNIX_FORM}"));
    };
    let dash = match head.ends_with(']') {
        true => head.rfind("-["),
        false => head.rfind('-'),
    };
    let Some(dash) = dash else {
        return refuse(
            "form",
            format!("unix:{rest} has no '-': {HOSTFWD_UNIX_FORM}"),
        );
    };
    let path: SocketPath = head[..dash].parse()?;
    let ports = range("guest port", port)?;
    let listen = HostEnd::Unix(path, AllowGuests::default());
    options.into_forward(listen, parse_guest(&head[dash + 1..])?, ports)
}

/// What follows the commas.
#[derive(Default)]
struct Options {
    name: Option<ForwardName>,
    interface: Option<InterfaceName>,
    max: Option<NonZeroU32>,
    client_address: bool,
    allow_guests: bool,
}

impl Options {
    /// Cuts the options off.
    fn split(text: &str) -> Parsed<(&str, Self)> {
        let mut parts = text.split(',');
        let main = parts.next().unwrap_or_default();
        let mut options = Self::default();
        for option in parts {
            let (key, value) = match option.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (option, None),
            };
            match (key, value) {
                ("client-address", None) => {
                    let before = std::mem::replace(&mut options.client_address, true);
                    once("client-address", before.then_some(()))?;
                }
                ("allow-guests", None) => {
                    let before = std::mem::replace(&mut options.allow_guests, true);
                    once("allow-guests", before.then_some(()))?;
                }
                ("allow-guests", Some(_)) => return refuse("allow-guests", "takes no value"),
                ("client-address", Some(_)) => return refuse("client-address", "takes no value"),
                ("interface", Some(value)) => {
                    once("interface", options.interface.replace(value.parse()?))?;
                }
                ("name", Some(value)) => once("name", options.name.replace(value.parse()?))?,
                ("max", Some(value)) => once("max", options.max.replace(max(value)?))?,
                ("max", None) => return refuse("max", "needs a value: max=100"),
                ("interface", None) => return refuse("interface", "needs a value: interface=eth0"),
                ("name", None) => return refuse("name", "needs a value: name=web"),
                _ => {
                    let reason = format!(
                        "{option:?} is not client-address, interface=NAME, max=N, name=NAME or \
                         allow-guests"
                    );
                    return refuse("option", reason);
                }
            }
        }
        Ok((main, options))
    }

    /// A forward to a guest with these options.
    fn into_forward(
        self,
        mut listen: HostEnd,
        guest: Guest,
        ports: PortRange,
    ) -> Parsed<ForwardSpec> {
        match (&mut listen, self.interface) {
            (_, None) => {}
            (HostEnd::Ports(host), interface) => {
                once("interface", host.interface.take())?;
                host.interface = interface;
            }
            (HostEnd::Unix(..), Some(_)) => {
                return refuse("interface", "a unix socket is on none");
            }
        }
        match (&mut listen, self.allow_guests) {
            (_, false) => {}
            (HostEnd::Unix(_, allow_guests), true) => *allow_guests = AllowGuests(true),
            (HostEnd::Ports(_), true) => return refuse("allow-guests", ONLY_UNIX),
        }
        let spec = ForwardSpec {
            name: self.name,
            max: self.max,
            direction: Direction::ToGuest {
                listen,
                guest,
                ports,
                shown: match self.client_address {
                    true => ShownSource::Client,
                    false => ShownSource::Gateway,
                },
            },
        };
        spec.check().map(|()| spec)
    }
}

fn once<T>(key: &'static str, before: Option<T>) -> Parsed<()> {
    match before {
        None => Ok(()),
        Some(_) => refuse(key, "is given twice"),
    }
}

/// Splits at colons outside brackets.
fn split(text: &str) -> Parsed<Vec<&str>> {
    let (mut parts, mut start, mut inside) = (Vec::new(), 0, false);
    for (at, c) in text.char_indices() {
        match c {
            '[' if !inside => inside = true,
            ']' if inside => inside = false,
            '[' | ']' => return refuse("form", format!("{text:?} has a stray {c:?}")),
            ':' if !inside => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if inside {
        return refuse("form", format!("{text:?} has a '[' without ']'"));
    }
    parts.push(&text[start..]);
    Ok(parts)
}

/// Whether the text stands where ports do: digits, a range of them, or nothing.
fn is_ports(text: &str) -> bool {
    text.bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'-')
}

fn port(key: &'static str, text: &str) -> Parsed<u16> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match text.parse::<u16>() {
        Ok(port) if digits => Ok(port),
        _ if digits => refuse(key, format!("{text} is above 65535")),
        _ => refuse(key, format!("{text:?} is no port")),
    }
}

fn max(text: &str) -> Parsed<NonZeroU32> {
    let reason = || format!("{text:?} is no number of connections above 0");
    text.parse().map_err(|_| ForwardError::new("max", reason()))
}

fn range(key: &'static str, text: &str) -> Parsed<PortRange> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    PortRange::new(port(key, first)?, port(key, last)?)
        .map_err(|reason| ForwardError::new(key, reason))
}

/// The host's ports; `None`: the host chooses.
fn host_ports(text: &str) -> Parsed<Option<PortRange>> {
    match text {
        "" | "0" => Ok(None),
        _ => range("host port", text).map(Some),
    }
}

/// Reads `ADDR`, `[ADDR]`, either with `%INTERFACE`, `*` or nothing.
fn host_address(text: &str) -> Parsed<(Option<IpAddr>, Option<InterfaceName>)> {
    let (address, interface) = match text.strip_prefix('[') {
        Some(inside) => {
            let (inside, after) = inside.split_once(']').unwrap_or((inside, ""));
            match (inside.split_once('%'), after.strip_prefix('%')) {
                (Some(_), Some(_)) => return refuse("interface", "is given twice"),
                (Some((address, interface)), None) if after.is_empty() => {
                    (address, Some(interface))
                }
                (None, Some(interface)) => (inside, Some(interface)),
                (None, None) if after.is_empty() => (inside, None),
                _ => return refuse("host address", format!("{after:?} follows the bracket")),
            }
        }
        None => match text.split_once('%') {
            Some((address, interface)) => (address, Some(interface)),
            None => (text, None),
        },
    };
    let address = match address {
        "" | "*" => None,
        address => Some(parse_address("host address", address)?),
    };
    Ok((address, interface.map(str::parse).transpose()?))
}

/// Reads an address, with or without brackets around an IPv6 one.
fn parse_address(key: &'static str, text: &str) -> Parsed<IpAddr> {
    let bare = unbracketed(text).unwrap_or(text);
    bare.parse()
        .map_err(|_| ForwardError::new(key, format!("{text:?} is no IP address")))
}

fn unbracketed(text: &str) -> Option<&str> {
    text.strip_prefix('[')?.strip_suffix(']')
}

fn parse_guest(text: &str) -> Parsed<Guest> {
    let inside = unbracketed(text);
    let bare = inside.unwrap_or(text);
    if text.is_empty() {
        return Ok(Guest::Own);
    }
    if let Ok(mac) = bare.parse::<Mac>() {
        return Ok(Guest::Mac(mac));
    }
    match inside {
        Some(inside) if inside.contains(':') => match inside.parse::<Ipv6Addr>() {
            Ok(address) => Ok(Guest::Address(address.into())),
            Err(_) => refuse("guest", format!("{inside:?} is no IPv6 or MAC address")),
        },
        _ => match bare.parse::<Ipv4Addr>() {
            Ok(address) => Ok(Guest::Address(address.into())),
            Err(_) => bare.parse().map(Guest::Name).map_err(|error| {
                let hint = "IPv6 and MAC addresses go in brackets";
                ForwardError::new("guest", format!("{error} ({hint})"))
            }),
        },
    }
}

impl fmt::Display for ForwardSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.direction {
            Direction::ToGuest {
                listen: HostEnd::Ports(host),
                guest,
                ports,
                shown,
            } => {
                write!(f, "{host}:")?;
                if *guest != Guest::Own {
                    write!(f, "{guest}:")?;
                }
                write!(f, "{ports}/{}", host.protocol)?;
                if let Some(interface) = &host.interface {
                    write!(f, ",interface={interface}")?;
                }
                if *shown == ShownSource::Client {
                    f.write_str(",client-address")?;
                }
            }
            Direction::ToGuest {
                listen: HostEnd::Unix(path, allow_guests),
                guest,
                ports,
                ..
            } => {
                match guest {
                    Guest::Name(name) if name.as_str().contains('-') => {
                        write!(f, "unix:{path}-[{name}]:{ports}")?;
                    }
                    _ => write!(f, "unix:{path}-{guest}:{ports}")?,
                }
                if allow_guests.0 {
                    f.write_str(",allow-guests")?;
                }
            }
            Direction::ToHost {
                address,
                port,
                path,
            } => {
                f.write_str("tcp:")?;
                match address {
                    None => {}
                    Some(IpAddr::V6(address)) => write!(f, "[{address}]")?,
                    Some(address) => write!(f, "{address}")?,
                }
                write!(f, ":{port}-unix:{path}")?;
            }
        }
        if let Some(max) = self.max {
            write!(f, ",max={max}")?;
        }
        match &self.name {
            Some(name) => write!(f, ",name={name}"),
            None => Ok(()),
        }
    }
}

/// `[ADDR:]PORTS`, without protocol and interface.
impl fmt::Display for HostPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            None => {}
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            Some(address) => write!(f, "{address}:")?,
        }
        match self.ports {
            Some(ports) => write!(f, "{ports}"),
            None => f.write_str("0"),
        }
    }
}
