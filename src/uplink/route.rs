//! Whether an address is the host's own, and whether the host has IPv6, asked of the kernel's routing
//! tables.
//!
//! RTM_GETROUTE answers for the whole table in one system call each way (3 microseconds), for
//! secondary addresses and `local` prefixes too. Connecting a UDP socket and comparing its own address
//! does not: for a secondary address the kernel picks the primary one as source.
//!
//! [`HostAddresses`] remembers the answers. It must not be the one who hears last: the kernel queues
//! its multicast about an address before the address works (net/ipv4/devinet.c, `__inet_insert_ifa`:
//! RTM_NEWADDR, then the notifier that adds the local route), so looking into that queue before each
//! answer makes a remembered one as good as a fresh one, for a tenth of the time.

use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use hashbrown::HashMap;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

use crate::sys::netlink::RouteSocket;

/// linux/rtnetlink.h: RTM_NEWROUTE, RTM_GETROUTE, RTN_*, RTA_DST.
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTN_UNICAST: u8 = 1;
const RTN_LOCAL: u8 = 2;
/// An address that the host answers to as one of several (RFC 4291 2.6), of the subnets that it
/// routes for among others.
const RTN_ANYCAST: u8 = 4;
const RTA_DST: u16 = 1;
/// linux/netlink.h: NLM_F_REQUEST, NLMSG_ERROR.
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
/// linux/socket.h.
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// nlmsghdr (16), rtmsg (12), one attribute (4 + 16, of IPv4 + 4).
const QUERY_LEN_MAX: usize = 48;
/// Place of the address.
const ADDRESS_AT: usize = 32;
/// Offset of rtm_type: seven bytes into rtmsg.
const TYPE_AT: usize = 16 + 7;
/// Replies read at most to find the one to our query; more can only be left-overs of failed reads.
const REPLIES_MAX: usize = 8;

/// Somewhere in the IPv6 Internet: the first address of what IANA has given out (2000::/3). Only the
/// routing table is asked; nothing is sent there.
const OUTSIDE6: Ipv6Addr = Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 1);

/// Multicasts after which an address may be the host's that was not before: links, addresses, routes and
/// rules (linux/rtnetlink.h: RTMGRP_*, and RTNLGRP_IPV6_RULE, which has no name of that kind).
const GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 1 << 18;
/// Addresses remembered; a guest that scans the Internet makes it start over. 24 bytes each.
const KNOWN_MAX: usize = 1_024;
/// How long an answer is good for, should a change not be told of: at 10,000 connections per second to
/// one server the question is rare by far with this.
const KNOWN_FOR: Duration = Duration::from_secs(1);
/// Multicasts taken per question, so that a host whose routes change all the time holds up nobody.
const NOTICES_MAX: usize = 64;

/// Which addresses are the host's own, with a memory.
#[derive(Debug)]
pub struct HostAddresses {
    table: RouteTable,
    /// Without it nothing is remembered.
    changes: Option<RouteSocket>,
    known: HashMap<IpAddr, bool>,
    /// When the oldest of them was asked.
    since: Instant,
}

impl HostAddresses {
    /// Nothing is remembered yet.
    ///
    /// # Errors
    /// As [`RouteTable::open`].
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            // First: what changes from here on is heard.
            changes: RouteSocket::open(GROUPS).ok(),
            table: RouteTable::open()?,
            known: HashMap::new(),
            since: Instant::now(),
        })
    }

    /// As [`RouteTable::is_local`].
    pub fn is_local(&mut self, address: IpAddr) -> bool {
        let Some(changes) = &self.changes else {
            return self.table.is_local(address);
        };
        let quiet = matches!(changes.discard_notifications(NOTICES_MAX), Ok(0));
        if !quiet || self.known.len() >= KNOWN_MAX || self.since.elapsed() >= KNOWN_FOR {
            self.known.clear();
        }
        if self.known.is_empty() {
            self.since = Instant::now();
        }
        let table = &mut self.table;
        *self
            .known
            .entry(address)
            .or_insert_with(|| table.is_local(address))
    }
}

/// A netlink socket kept for questions.
#[derive(Debug)]
pub struct RouteTable {
    socket: OwnedFd,
    sequence: u32,
}

impl RouteTable {
    /// Opens the socket.
    ///
    /// # Errors
    /// No netlink (a seccomp filter), or no fd left.
    pub fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // Protocol 0 is NETLINK_ROUTE.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Whether packets to `address` end at the host itself. No route to it: no. No answer from the
    /// kernel: yes, as guests are kept away from the host.
    pub fn is_local(&mut self, address: IpAddr) -> bool {
        // A socket of IPv6 that is connected to ::ffff:127.0.0.1 speaks IPv4 to 127.0.0.1.
        let kind = self.ask(address.to_canonical());
        kind.map_or(true, |kind| matches!(kind, Some(RTN_LOCAL | RTN_ANYCAST)))
    }

    /// Whether the host has a route to the IPv6 Internet. No answer from the kernel: no.
    pub fn has_default6(&mut self) -> bool {
        self.ask(OUTSIDE6.into())
            .is_ok_and(|kind| kind == Some(RTN_UNICAST))
    }

    /// The kind (RTN_*) of the route to `address`; `None`: there is none.
    fn ask(&mut self, address: IpAddr) -> io::Result<Option<u8>> {
        self.sequence = self.sequence.wrapping_add(1);
        let (query, len) = query(address, self.sequence);
        send(&self.socket, &query[..len], SendFlags::DONTWAIT)?;
        // The kernel answers before send returns.
        let mut reply = [0u8; 1024];
        for _ in 0..REPLIES_MAX {
            let (len, _) = recv(&self.socket, &mut reply, RecvFlags::DONTWAIT)?;
            if let Some(kind) = route_kind(&reply[..len], self.sequence) {
                return kind;
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }
}

/// The query and its length.
fn query(address: IpAddr, sequence: u32) -> ([u8; QUERY_LEN_MAX], usize) {
    let mut query = [0; QUERY_LEN_MAX];
    let (family, octets) = match address {
        IpAddr::V4(address) => (AF_INET, &address.octets()[..]),
        IpAddr::V6(address) => (AF_INET6, &address.octets()[..]),
    };
    let len = ADDRESS_AT + octets.len();
    query[..4].copy_from_slice(&(len as u32).to_ne_bytes());
    query[4..6].copy_from_slice(&RTM_GETROUTE.to_ne_bytes());
    query[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    query[8..12].copy_from_slice(&sequence.to_ne_bytes());
    query[16] = family;
    query[17] = octets.len() as u8 * 8;
    query[28..30].copy_from_slice(&(4 + octets.len() as u16).to_ne_bytes());
    query[30..32].copy_from_slice(&RTA_DST.to_ne_bytes());
    query[ADDRESS_AT..len].copy_from_slice(octets);
    (query, len)
}

/// The route's kind, if `reply` is the one to `sequence`.
fn route_kind(reply: &[u8], sequence: u32) -> Option<io::Result<Option<u8>>> {
    let kind = u16::from_ne_bytes(reply.get(4..6)?.try_into().ok()?);
    if reply.get(8..12)? != sequence.to_ne_bytes() {
        return None;
    }
    match kind {
        RTM_NEWROUTE => Some(Ok(Some(*reply.get(TYPE_AT)?))),
        NLMSG_ERROR => {
            let errno = i32::from_ne_bytes(reply.get(16..20)?.try_into().ok()?);
            Some(match -errno {
                // No route, or one that is unreachable, prohibited, a blackhole (net/ipv4/fib_semantics.c,
                // fib_props): wherever packets go, it is not the host.
                libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES | libc::EINVAL => Ok(None),
                other => Err(io::Error::from_raw_os_error(other)),
            })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_the_host() {
        let mut table = RouteTable::open().unwrap();
        for local in [
            "127.0.0.1",
            "127.200.3.4",
            "::ffff:127.0.0.1",
            "::ffff:127.9.0.1",
        ] {
            assert!(table.is_local(local.parse().unwrap()), "{local}");
        }
        for foreign in [
            "192.0.2.1",
            "203.0.113.9",
            "255.255.255.255",
            "2001:db8::9",
            "fe80::9",
        ] {
            assert!(!table.is_local(foreign.parse().unwrap()), "{foreign}");
        }
    }

    #[test]
    fn what_is_remembered_is_forgotten_in_time_and_bounded() {
        let mut own = HostAddresses::open().unwrap();
        let (local, foreign) = ([127, 0, 0, 1].into(), [192, 0, 2, 1].into());
        for _ in 0..3 {
            assert!(own.is_local(local));
            assert!(!own.is_local(foreign));
        }
        // Made wrong, it is believed until it is too old. A change elsewhere may have come between.
        own.known.insert(foreign, true);
        let believed = own.is_local(foreign);
        own.since = Instant::now()
            .checked_sub(KNOWN_FOR)
            .expect("the machine is up for longer");
        assert!(!own.is_local(foreign), "{believed}");
        for n in 0..2 * KNOWN_MAX as u32 {
            own.is_local(IpAddr::V4((0xc000_0200 + n).into()));
            assert!(own.known.len() <= KNOWN_MAX);
        }
        own.changes = None;
        own.known.insert(foreign, true);
        assert!(!own.is_local(foreign), "nothing is remembered unheard");
    }

    /// In a network namespace of the thread's own, where one may be made.
    #[test]
    fn a_change_counts_from_the_moment_it_works() {
        let run = || {
            if crate::sys::namespace::unshare_all(rustix::thread::UnshareFlags::NEWNET).is_err() {
                return;
            }
            let ip = |words: &str| {
                let status = std::process::Command::new("ip")
                    .args(words.split(' '))
                    .status();
                status.is_ok_and(|status| status.success())
            };
            if !ip("link set lo up") {
                return;
            }
            let mut own = HostAddresses::open().unwrap();
            for (change, undo, address) in [
                (
                    "address add 198.51.100.9/32 dev lo",
                    "address del 198.51.100.9/32 dev lo",
                    "198.51.100.9",
                ),
                (
                    "route add local 203.0.113.0/24 dev lo",
                    "route del local 203.0.113.0/24 dev lo",
                    "203.0.113.5",
                ),
                (
                    "-6 address add 2001:db8::9/128 dev lo nodad",
                    "-6 address del 2001:db8::9/128 dev lo",
                    "2001:db8::9",
                ),
                (
                    "-6 route add local 2001:db8:7::/64 dev lo",
                    "-6 route del local 2001:db8:7::/64 dev lo",
                    "2001:db8:7::1",
                ),
            ] {
                let address = address.parse().unwrap();
                for _ in 0..3 {
                    assert!(!own.is_local(address), "before: {change}");
                    if !ip(change) {
                        break; // Without IPv6.
                    }
                    // The kernel leaves an IPv6 address to a thread of its own (addrconf_dad_work).
                    let end = std::time::Instant::now() + std::time::Duration::from_secs(5);
                    while change.starts_with("-6 address")
                        && !own.is_local(address)
                        && std::time::Instant::now() < end
                    {
                        std::thread::yield_now();
                    }
                    assert!(own.is_local(address), "{change}");
                    assert!(ip(undo));
                    assert!(!own.is_local(address), "{undo}");
                }
            }
        };
        std::thread::spawn(run).join().unwrap();
    }

    #[test]
    fn knows_ipv6_as_ip_does() {
        let asked = std::process::Command::new("ip")
            .args(["-6", "route", "get", "2000::1"])
            .output();
        let Ok(asked) = asked else { return };
        let text = String::from_utf8_lossy(&asked.stdout);
        let has = asked.status.success() && text.starts_with("2000::1");
        let mut table = RouteTable::open().unwrap();
        assert_eq!(table.has_default6(), has, "{text}");
        // Loopback is there wherever IPv6 is.
        if std::path::Path::new("/proc/net/if_inet6").exists() {
            assert!(table.is_local(Ipv6Addr::LOCALHOST.into()));
        }
    }

    #[test]
    fn other_replies_are_passed_over() {
        for address in [IpAddr::V6(Ipv6Addr::LOCALHOST), [127, 0, 0, 1].into()] {
            let (mut reply, _) = query(address, 7);
            reply[4..6].copy_from_slice(&RTM_NEWROUTE.to_ne_bytes());
            let kind = |reply: &[u8], sequence| route_kind(reply, sequence).map(Result::ok);
            assert_eq!(kind(&reply, 7), Some(Some(Some(0))));
            reply[TYPE_AT] = RTN_LOCAL;
            assert_eq!(kind(&reply, 7), Some(Some(Some(RTN_LOCAL))));
            assert_eq!(kind(&reply, 8), None);
            for len in 0..TYPE_AT {
                assert_eq!(kind(&reply[..len], 7), None);
            }
            // An error that says nothing of the route is no answer.
            reply[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
            for (errno, expected) in [
                (libc::ENETUNREACH, Some(Some(None))),
                (libc::EINVAL, Some(Some(None))),
                (libc::ENOBUFS, Some(None)),
                (libc::EPERM, Some(None)),
            ] {
                reply[16..20].copy_from_slice(&(-errno).to_ne_bytes());
                assert_eq!(kind(&reply, 7), expected, "{errno}");
            }
        }
    }
}
