//! Who is in the way of a socket that can't be bound, and what to do about it.
//!
//! The kernel says EADDRINUSE and no more. Its tables of sockets (/proc/net/tcp and its like) name the
//! inode and the user of each socket, the fd links below /proc the processes that hold an inode. The
//! links of another user's process can't be read without privilege: then the user is all there is.
//!
//! It reads what may be thousands of links, so it runs where somebody waits for the answer, never on
//! the data path.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::Path;

use rustix::io::Errno;

use crate::nat::forward::Protocol;

/// Links that are read at most: 0.3 s at a microsecond each. A machine with more open files gets the
/// user's name only.
const LINKS_MAX: usize = 262_144;
/// Processes that a message names: pre-forking servers share a socket among hundreds.
const NAMED_MAX: usize = 3;
/// TCP_LISTEN as the tables write it (net/tcp_states.h).
const STATE_LISTEN: u8 = 0x0a;
/// First port for everybody where the sysctl can't be read: the kernel's default.
const UNPRIVILEGED_PORT_DEFAULT: u16 = 1024;
const UNPRIVILEGED_PORT: &str = "/proc/sys/net/ipv4/ip_unprivileged_port_start";

/// Who holds a socket.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Owner {
    /// This very process.
    Own,
    /// A process.
    Process {
        /// Its number.
        pid: u32,
        /// Its name (/proc/PID/comm).
        name: String,
    },
    /// A process of this user that we can't look into, or the kernel.
    User(u32),
}

impl Owner {
    /// The process `pid` of the user `uid`.
    pub fn of_process(pid: Option<u32>, uid: u32) -> Self {
        match pid {
            Some(pid) if pid == std::process::id() => Owner::Own,
            Some(pid) => match process_name(pid) {
                Some(name) => Owner::Process { pid, name },
                None => Owner::User(uid),
            },
            None => Owner::User(uid),
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Owner::Own => f.write_str("this lanlet itself"),
            Owner::Process { pid, name } => write!(f, "{name} (pid {pid})"),
            Owner::User(0) => f.write_str("a process of root or the kernel"),
            Owner::User(uid) => write!(f, "a process of uid {uid}"),
        }
    }
}

/// Why a socket could not be bound to `at`, and the remedy.
pub fn explain(protocol: Protocol, at: SocketAddr, errno: Errno) -> String {
    let (address, port) = (at.ip(), at.port());
    match errno {
        Errno::ADDRINUSE => match owners(protocol, at)[..] {
            // What forwards have is known before the kernel is asked.
            [Owner::Own] => {
                "already in use by this lanlet itself, for a guest's own traffic: choose \
                             another, or try again later"
                    .to_owned()
            }
            ref owners => in_use(owners),
        },
        Errno::ACCESS | Errno::PERM => {
            let first = unprivileged_port();
            match port < first {
                true => format!(
                    "ports below {first} are for root: choose another, or allow it with 'sysctl \
                     net.ipv4.ip_unprivileged_port_start={port}'"
                ),
                false => "the host's security policy forbids it".to_owned(),
            }
        }
        Errno::ADDRNOTAVAIL => {
            format!("{address} is no address of this host ('ip address' lists them)")
        }
        Errno::AFNOSUPPORT => format!("this host has no {}", family_name(address)),
        errno => plain(errno),
    }
}

/// What an errno says that has nothing to do with the address.
pub fn plain(errno: Errno) -> String {
    match errno {
        Errno::MFILE | Errno::NFILE => {
            "no more open files: raise the limit (ulimit -n), or forward fewer ports".to_owned()
        }
        errno => errno.to_string(),
    }
}

/// A path or port that is taken: by whom, and what to do.
pub fn in_use(owners: &[Owner]) -> String {
    let named: Vec<_> = owners
        .iter()
        .take(NAMED_MAX)
        .map(ToString::to_string)
        .collect();
    let by = match (named.is_empty(), owners.len().saturating_sub(NAMED_MAX)) {
        (true, _) => " (by whom can't be seen from here)".to_owned(),
        (false, 0) => format!(" by {}", named.join(", ")),
        (false, more) => format!(" by {} and {more} more", named.join(", ")),
    };
    format!("already in use{by}: choose another, or stop what uses it")
}

fn family_name(address: IpAddr) -> &'static str {
    match address {
        IpAddr::V4(_) => "IPv4",
        IpAddr::V6(_) => "IPv6",
    }
}

fn unprivileged_port() -> u16 {
    fs::read_to_string(UNPRIVILEGED_PORT)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(UNPRIVILEGED_PORT_DEFAULT)
}

/// The processes whose sockets keep others from `at`; those that listen there, if any do.
pub fn owners(protocol: Protocol, at: SocketAddr) -> Vec<Owner> {
    let mut entries = Vec::new();
    for suffix in ["", "6"] {
        let path = format!("/proc/thread-self/net/{protocol}{suffix}");
        let Ok(file) = File::open(path) else {
            continue;
        };
        let lines = BufReader::new(file).lines().map_while(Result::ok);
        entries.extend(
            lines
                .filter_map(|line| Entry::parse(&line))
                .filter(|entry| entry.is_in_the_way_of(at)),
        );
    }
    // UDP has no listeners, and connections alone can be in the way of TCP too.
    if entries.iter().any(|entry| entry.state == STATE_LISTEN) {
        entries.retain(|entry| entry.state == STATE_LISTEN);
    }
    let mut owners = BTreeSet::new();
    let mut found = BTreeSet::new();
    for (inode, pid) in holders(&entries) {
        if let Some(entry) = entries.iter().find(|entry| entry.inode == inode) {
            owners.insert(Owner::of_process(Some(pid), entry.uid));
            found.insert(inode);
        }
    }
    let unseen = entries.iter().filter(|entry| !found.contains(&entry.inode));
    owners.extend(unseen.map(|entry| Owner::User(entry.uid)));
    owners.into_iter().collect()
}

/// A line of a socket table.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Entry {
    local: SocketAddr,
    state: u8,
    uid: u32,
    inode: u64,
}

impl Entry {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let local = parse_local(fields.next()?)?;
        let _remote = fields.next()?;
        let state = u8::from_str_radix(fields.next()?, 16).ok()?;
        // tx_queue:rx_queue, tr:tm->when, retrnsmt
        let uid = fields.nth(3)?.parse().ok()?;
        let _timeout = fields.next()?;
        let inode = fields.next()?.parse().ok()?;
        Some(Self {
            local,
            state,
            uid,
            inode,
        })
    }

    /// Whether one of two sockets at these addresses excludes the other. An IPv6 socket on all
    /// addresses may take IPv4 too: the table does not say.
    fn is_in_the_way_of(&self, at: SocketAddr) -> bool {
        let (ours, theirs) = (at.ip(), self.local.ip());
        let same_family = ours.is_ipv4() == theirs.is_ipv4();
        let dual = ours.is_ipv4() && theirs == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
        let any = theirs.is_unspecified() || ours.is_unspecified();
        self.local.port() == at.port() && (ours == theirs || dual || (same_family && any))
    }
}

/// An address as the tables write it: words of 32 bits in the machine's byte order, a colon, the port.
fn parse_local(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| -> Option<[u8; 4]> {
        let digits = address.get(at * 8..at * 8 + 8)?;
        u32::from_str_radix(digits, 16).ok().map(u32::to_ne_bytes)
    };
    let address = match address.len() {
        8 => IpAddr::from(word(0)?),
        32 => {
            let mut bytes = [0; 16];
            for (at, chunk) in bytes.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&word(at)?);
            }
            // A dual-stack socket bound to an IPv4 address is in the way as one.
            Ipv6Addr::from(bytes).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(address, port))
}

/// Which processes hold these sockets, as (inode, pid).
fn holders(entries: &[Entry]) -> Vec<(u64, u32)> {
    let mut links_left = LINKS_MAX;
    let mut found = Vec::new();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    for process in processes {
        let pid = process
            .file_name()
            .to_str()
            .and_then(|pid| pid.parse().ok());
        let Some(pid) = pid else {
            continue;
        };
        // Not ours to look into, or gone: the user's name has to do.
        let links = fs::read_dir(process.path().join("fd"));
        for link in links.into_iter().flatten().flatten() {
            links_left -= 1;
            if links_left == 0 {
                return found;
            }
            if let Some(inode) = socket_inode(&link.path())
                && entries.iter().any(|entry| entry.inode == inode)
            {
                found.push((inode, pid));
            }
        }
    }
    found
}

fn socket_inode(link: &Path) -> Option<u64> {
    let target = fs::read_link(link).ok()?;
    let inside = target.to_str()?.strip_prefix("socket:[")?;
    inside.strip_suffix(']')?.parse().ok()
}

/// The name of a process, fit for a terminal: a process chooses its own.
fn process_name(pid: u32) -> Option<String> {
    let name = fs::read(format!("/proc/{pid}/comm")).ok()?;
    let name = String::from_utf8_lossy(&name);
    let printable = |c: char| if c.is_control() { '?' } else { c };
    let name: String = name.trim_end().chars().map(printable).collect();
    (!name.is_empty()).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
    use std::os::fd::OwnedFd;
    use std::process::{Child, Command};

    fn entry(local: &str, inode: u64) -> Entry {
        Entry {
            local: local.parse().unwrap(),
            state: STATE_LISTEN,
            uid: 1000,
            inode,
        }
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn lines_of_the_tables() {
        let v4 = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 31337 1 0000000000000000 100 0 0 10 0";
        assert_eq!(Entry::parse(v4), Some(entry("127.0.0.1:8080", 31337)));
        let v6 = "   1: B80D0120000000000000000001000000:0035 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 7 1 0";
        assert_eq!(Entry::parse(v6), Some(entry("[2001:db8::1]:53", 7)));
        let mapped = "   1: 0000000000000000FFFF00000100007F:0035 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 7 1 0";
        assert_eq!(Entry::parse(mapped), Some(entry("127.0.0.1:53", 7)));
        let head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode";
        assert_eq!(Entry::parse(head), None);
        for len in 0..v4.find("31337").unwrap() {
            assert_eq!(Entry::parse(&v4[..len]), None, "{len}");
        }
    }

    #[test]
    fn what_is_in_the_way() {
        let in_the_way =
            |theirs: &str, ours: &str| entry(theirs, 1).is_in_the_way_of(ours.parse().unwrap());
        for (theirs, ours) in [
            ("127.0.0.1:80", "127.0.0.1:80"),
            ("0.0.0.0:80", "127.0.0.1:80"),
            ("127.0.0.1:80", "0.0.0.0:80"),
            ("[::]:80", "127.0.0.1:80"),
            ("[::]:80", "[::1]:80"),
            ("[::1]:80", "[::]:80"),
        ] {
            assert!(in_the_way(theirs, ours), "{theirs} {ours}");
        }
        for (theirs, ours) in [
            ("127.0.0.1:81", "127.0.0.1:80"),
            ("127.0.0.2:80", "127.0.0.1:80"),
            ("0.0.0.0:80", "[::1]:80"),
            ("[::1]:80", "0.0.0.0:80"),
        ] {
            assert!(!in_the_way(theirs, ours), "{theirs} {ours}");
        }
    }

    /// A child that another test is starting holds a copy of every fd until it executes.
    fn owners_in_the_end(protocol: Protocol, at: SocketAddr, expected: &[Owner]) {
        for _ in 0..100 {
            if owners(protocol, at) == expected {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert_eq!(owners(protocol, at), expected);
    }

    #[test]
    fn our_own_sockets_are_found_and_others_are_not_blamed() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let (tcp_at, udp_at) = (tcp.local_addr().unwrap(), udp.local_addr().unwrap());
        owners_in_the_end(Protocol::Tcp, tcp_at, &[Owner::Own]);
        owners_in_the_end(Protocol::Udp, udp_at, &[Owner::Own]);
        let everywhere = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), tcp_at.port());
        owners_in_the_end(Protocol::Tcp, everywhere, &[Owner::Own]);
        drop(tcp);
        owners_in_the_end(Protocol::Tcp, tcp_at, &[]);
    }

    /// A connection without a listener holds its port as well.
    #[test]
    fn a_connection_is_found_where_nobody_listens() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let at = client.local_addr().unwrap();
        owners_in_the_end(Protocol::Tcp, at, &[Owner::Own]);
    }

    /// `sleep` as a server: it has a listening socket for its input.
    struct Server(Child);

    impl Drop for Server {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn another_process_is_named_with_its_pid() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let child = Command::new("sleep")
            .arg("60")
            .stdin(OwnedFd::from(listener))
            .spawn();
        let server = Server(child.expect("sleep runs"));
        let expected = Owner::Process {
            pid: server.0.id(),
            name: "sleep".to_owned(),
        };
        owners_in_the_end(Protocol::Tcp, at, &[expected]);
        assert_eq!(
            explain(Protocol::Tcp, at, Errno::ADDRINUSE),
            format!(
                "already in use by sleep (pid {}): choose another, or stop what uses it",
                server.0.id()
            )
        );
    }

    #[test]
    fn messages() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let explain = |text: &str, errno| explain(Protocol::Tcp, at(text), errno);
        let first = unprivileged_port();
        if first > 80 {
            let text = explain("0.0.0.0:80", Errno::ACCESS);
            assert!(
                text.contains(&format!("below {first} are for root"))
                    && text.contains("net.ipv4.ip_unprivileged_port_start=80"),
                "{text}"
            );
        }
        assert!(explain("0.0.0.0:65535", Errno::ACCESS).contains("security policy"));
        assert!(
            explain("192.0.2.1:80", Errno::ADDRNOTAVAIL).starts_with("192.0.2.1 is no address")
        );
        assert_eq!(
            explain("[::1]:80", Errno::AFNOSUPPORT),
            "this host has no IPv6"
        );
        assert!(explain("[::1]:80", Errno::MFILE).contains("ulimit -n"));

        let process = |pid| Owner::Process {
            pid,
            name: "nginx".to_owned(),
        };
        let many: Vec<_> = (1..=5).map(process).collect();
        assert!(in_use(&many).contains("nginx (pid 1), nginx (pid 2), nginx (pid 3) and 2 more"));
        assert!(in_use(&[]).contains("can't be seen"));
        assert!(in_use(&[Owner::User(33)]).contains("a process of uid 33"));
        assert!(in_use(&[Owner::Own]).contains("by this lanlet itself"));
    }
}
