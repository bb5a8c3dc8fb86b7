//! Listening sockets for forwards.
//!
//! They are opened where the forward is asked for, not on the data path: a refusal can take its time
//! to say who is in the way, and a forward is taken whole (every port of a range) or not at all.
//!
//! # Kernel behaviour relied on
//! - A forward without an address gets a socket of each family, IPV6_V6ONLY: so an event's addresses
//!   are of the socket's own family, and options of one family suffice.
//! - SO_REUSEADDR on TCP alone: it passes over connections in TIME-WAIT and never over a listener. On
//!   UDP it would share the port with another server.
//! - The mode of a unix socket's file is that of the socket before bind, less the umask (net/unix/af_unix.c,
//!   `unix_bind_bsd`): nobody else can connect, not even for a moment.
//! - A connect to a unix socket whose process has ended is refused; that is how a left-over file is
//!   told from one in use.

use std::ffi::CString;
use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getsockname, listen,
    netdevice, socket_with, sockopt,
};

use super::port_owner::{self, Owner};
use crate::nat::forward::{
    AllowGuests, HostEnd, HostPorts, InterfaceName, PortRange, Protocol, SocketPath,
};
use crate::sys::socket;

/// Connections waiting to be accepted: what the kernel allows by default (net.core.somaxconn).
const BACKLOG: i32 = 4096;
/// Tries to find a port that is free in both families, where the host chooses: a second one is
/// hardly ever needed.
const CHOICES_MAX: usize = 16;

/// Why a forward's socket could not be opened, and the remedy.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{at}: {reason}")]
pub struct ListenError {
    /// Where: `127.0.0.1:8080/tcp`, or a path.
    pub at: String,
    /// Why not.
    pub reason: String,
}

impl ListenError {
    fn new(at: impl fmt::Display, reason: impl Into<String>) -> Self {
        Self {
            at: at.to_string(),
            reason: reason.into(),
        }
    }
}

/// The sockets of one forward.
#[derive(Debug)]
pub struct Listeners {
    /// The sockets, non-blocking.
    pub sockets: Vec<Listener>,
    /// The port that the host chose, where it was to.
    pub chosen: Option<PortRange>,
}

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    /// The socket.
    pub fd: OwnedFd,
    /// Where it listens.
    pub at: ListenAt,
}

/// Where a socket listens.
#[derive(Debug)]
pub enum ListenAt {
    /// TCP connections are accepted.
    Tcp(SocketAddr),
    /// UDP datagrams are received.
    Udp(SocketAddr),
    /// Unix stream connections are accepted.
    Unix(SocketFile, AllowGuests),
}

/// The file of a unix socket, removed with this value.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    device_and_inode: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Somebody may have put a file of their own in its place.
        if device_and_inode(&self.path).is_ok_and(|file| file == self.device_and_inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn device_and_inode(path: &Path) -> io::Result<(u64, u64)> {
    let meta = fs::symlink_metadata(path)?;
    Ok((meta.dev(), meta.ino()))
}

/// Opens the sockets of a forward's host end.
///
/// # Errors
/// One of them can't be had: none is left open.
pub fn open(host: &HostEnd) -> Result<Listeners, ListenError> {
    match host {
        HostEnd::Ports(host) => open_ports(host),
        HostEnd::Unix(path, allow_guests) => {
            open_unix(path, *allow_guests).map(|listener| Listeners {
                sockets: vec![listener],
                chosen: None,
            })
        }
    }
}

fn open_ports(host: &HostPorts) -> Result<Listeners, ListenError> {
    let addresses = match host.address {
        Some(address) => vec![address],
        None => vec![
            IpAddr::from(Ipv4Addr::UNSPECIFIED),
            Ipv6Addr::UNSPECIFIED.into(),
        ],
    };
    let Some(ports) = host.ports else {
        return open_chosen(host, &addresses);
    };
    let mut sockets = Vec::new();
    for port in ports.iter() {
        open_port(host, &addresses, port, &mut sockets)?;
    }
    Ok(Listeners {
        sockets,
        chosen: None,
    })
}

/// Opens one port on all the addresses.
fn open_port(
    host: &HostPorts,
    addresses: &[IpAddr],
    port: u16,
    sockets: &mut Vec<Listener>,
) -> Result<(), ListenError> {
    for &address in addresses {
        let at = SocketAddr::new(address, port);
        match open_inet(host, at) {
            Ok(listener) => sockets.push(listener),
            // All addresses of a host without IPv6 are IPv4.
            Err(Refused::Errno(Errno::AFNOSUPPORT))
                if host.address.is_none() && address.is_ipv6() => {}
            Err(refused) => return Err(refused.explain(host.protocol, at)),
        }
    }
    Ok(())
}

/// Opens a port of the host's choice: free for the first address, it is asked for at the others.
fn open_chosen(host: &HostPorts, addresses: &[IpAddr]) -> Result<Listeners, ListenError> {
    let (first, others) = addresses.split_first().expect("one address at least");
    let mut tries = CHOICES_MAX;
    loop {
        let any = SocketAddr::new(*first, 0);
        let listener = open_inet(host, any).map_err(|why| why.explain(host.protocol, any))?;
        let (ListenAt::Tcp(at) | ListenAt::Udp(at)) = &listener.at else {
            unreachable!("an IP socket")
        };
        let port = at.port();
        let mut sockets = vec![listener];
        tries -= 1;
        match open_port(host, others, port, &mut sockets) {
            Err(_) if tries > 0 => {}
            Err(error) => return Err(error),
            Ok(()) => {
                let chosen = PortRange::new(port, port).ok();
                return Ok(Listeners { sockets, chosen });
            }
        }
    }
}

/// Why a socket could not be opened.
enum Refused {
    Errno(Errno),
    Interface(InterfaceName, Errno),
}

impl From<Errno> for Refused {
    fn from(errno: Errno) -> Self {
        Refused::Errno(errno)
    }
}

impl Refused {
    fn explain(&self, protocol: Protocol, at: SocketAddr) -> ListenError {
        let reason = match self {
            Refused::Errno(errno) => port_owner::explain(protocol, at, *errno),
            Refused::Interface(name, Errno::NODEV) => {
                format!("this host has no interface {name} ('ip link' lists them)")
            }
            Refused::Interface(name, Errno::PERM) => {
                format!("interface {name} can be chosen since Linux 5.7 only, except by root")
            }
            Refused::Interface(name, errno) => format!("interface {name}: {errno}"),
        };
        ListenError::new(format_args!("{at}/{protocol}"), reason)
    }
}

fn open_inet(host: &HostPorts, at: SocketAddr) -> Result<Listener, Refused> {
    let family = match at {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let kind = match host.protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let fd = socket_with(family, kind, flags(), None)?;
    if family == AddressFamily::INET6 {
        sockopt::set_ipv6_v6only(&fd, true)?;
    }
    let mut scope = 0;
    if let Some(interface) = &host.interface {
        scope = bind_to_interface(&fd, interface)
            .map_err(|errno| Refused::Interface(interface.clone(), errno))?;
    }
    if host.protocol == Protocol::Tcp {
        sockopt::set_socket_reuseaddr(&fd, true)?;
    }
    match at {
        // Only a link-local address has a scope.
        SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() => {
            bind(&fd, &SocketAddrV6::new(*v6.ip(), v6.port(), 0, scope))?;
        }
        at => bind(&fd, &at)?,
    }
    if host.protocol == Protocol::Tcp {
        listen(&fd, BACKLOG)?;
    }
    let local = SocketAddr::try_from(getsockname(&fd)?)?;
    let at = match host.protocol {
        Protocol::Tcp => ListenAt::Tcp(local),
        Protocol::Udp => ListenAt::Udp(local),
    };
    Ok(Listener { fd, at })
}

fn flags() -> SocketFlags {
    SocketFlags::NONBLOCK | SocketFlags::CLOEXEC
}

/// Ties a socket to an interface and returns the interface's number.
fn bind_to_interface(fd: &OwnedFd, interface: &InterfaceName) -> Result<u32, Errno> {
    let name = CString::new(interface.as_str()).map_err(|_| Errno::INVAL)?;
    socket::bind_to_device(fd.as_fd(), &name)
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    netdevice::name_to_index(fd, interface.as_str())
}

fn open_unix(path: &SocketPath, allow_guests: AllowGuests) -> Result<Listener, ListenError> {
    let (fd, file) = open_path(Path::new(path.as_str()))?;
    let at = ListenAt::Unix(file, allow_guests);
    Ok(Listener { fd, at })
}

/// Opens a unix stream socket that only this user can connect to, in place of one that was left over.
///
/// # Errors
/// It can't be had.
pub fn open_path(file: &Path) -> Result<(OwnedFd, SocketFile), ListenError> {
    let refuse = |reason: String| ListenError::new(file.display(), reason);
    let other = |errno| refuse(port_owner::plain(errno));
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags(), None).map_err(other)?;
    rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR).map_err(other)?;
    let address = SocketAddrUnix::new(file).map_err(other)?;
    let bound = match bind(&fd, &address) {
        Err(Errno::ADDRINUSE) => {
            remove_left_over(file, &address).map_err(refuse)?;
            bind(&fd, &address)
        }
        bound => bound,
    };
    bound.map_err(|errno| {
        let directory = file.parent().unwrap_or(file).display();
        refuse(match errno {
            Errno::NOENT => format!("there is no directory {directory}"),
            Errno::ACCESS | Errno::ROFS => format!("nothing can be made in {directory}: {errno}"),
            Errno::ADDRINUSE => port_owner::in_use(&[]),
            errno => port_owner::plain(errno),
        })
    })?;
    let device_and_inode =
        device_and_inode(file).map_err(|error| refuse(format!("it is gone again: {error}")))?;
    let file = SocketFile {
        path: file.to_owned(),
        device_and_inode,
    };
    listen(&fd, BACKLOG).map_err(other)?;
    Ok((fd, file))
}

/// Checks that a descriptor from elsewhere is a listening unix stream socket, and makes it non-blocking.
///
/// # Errors
/// It is something else.
pub fn check_listening(fd: &OwnedFd) -> io::Result<()> {
    let is_unix = sockopt::socket_domain(fd)? == AddressFamily::UNIX;
    let is_stream = sockopt::socket_type(fd)? == SocketType::STREAM;
    if !(is_unix && is_stream && sockopt::socket_acceptconn(fd)?) {
        let message = "not a listening unix stream socket";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    Ok(rustix::io::ioctl_fionbio(fd, true)?)
}

/// Removes a socket that a process has left behind; whatever else has the name stays.
fn remove_left_over(path: &Path, address: &SocketAddrUnix) -> Result<(), String> {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.to_string()),
    };
    if !meta.file_type().is_socket() {
        return Err("is there already and is no socket: choose another path".to_owned());
    }
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags(), None)
        .map_err(port_owner::plain)?;
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED) => {
            fs::remove_file(path).map_err(|error| format!("is left over, and stays: {error}"))
        }
        Ok(()) => {
            let owner = socket::peer(probe.as_fd()).ok();
            let owner = owner.map(|(pid, uid)| Owner::of_process(pid, uid));
            Err(port_owner::in_use(owner.as_slice()))
        }
        // Another type of socket, a full queue, or no right to ask.
        Err(_) => Err(port_owner::in_use(&[])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nat::forward::{Direction, ForwardSpec};
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    fn host(text: &str) -> HostEnd {
        match text.parse::<ForwardSpec>().unwrap().direction {
            Direction::ToGuest { listen, .. } => listen,
            other => panic!("{other:?}"),
        }
    }

    fn opened(text: &str) -> Listeners {
        open(&host(text)).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn refused(text: &str) -> ListenError {
        match open(&host(text)) {
            Err(error) => error,
            Ok(listeners) => panic!("{text}: {listeners:?}"),
        }
    }

    fn addresses(listeners: &Listeners) -> Vec<SocketAddr> {
        let address = |listener: &Listener| match &listener.at {
            ListenAt::Tcp(at) | ListenAt::Udp(at) => *at,
            ListenAt::Unix(file, _) => panic!("{file:?}"),
        };
        listeners.sockets.iter().map(address).collect()
    }

    #[test]
    fn a_chosen_port_is_the_same_in_both_families() {
        for protocol in ["tcp", "udp"] {
            let listeners = opened(&format!("0:80/{protocol}"));
            let port = listeners.chosen.unwrap().first();
            let expected = ["0.0.0.0", "::"].map(|any| SocketAddr::new(any.parse().unwrap(), port));
            assert_eq!(addresses(&listeners), expected);
            let again = format!("127.0.0.1:{port}:80/{protocol}");
            let error = refused(&again);
            assert_eq!(error.at, format!("127.0.0.1:{port}/{protocol}"));
            assert!(error.reason.contains("a guest's own traffic"), "{error}");
        }
    }

    #[test]
    fn connections_of_both_families_arrive() {
        let listeners = opened("0:80");
        let port = listeners.chosen.unwrap().first();
        for address in ["127.0.0.1", "::1"] {
            let at = SocketAddr::new(address.parse().unwrap(), port);
            TcpStream::connect(at).unwrap_or_else(|error| panic!("{at}: {error}"));
        }
        for listener in listeners.sockets {
            let listener = TcpListener::from(listener.fd);
            let (_, client) = listener.accept().unwrap();
            assert_eq!(client.is_ipv4(), listener.local_addr().unwrap().is_ipv4());
            let more = listener.accept().unwrap_err();
            assert_eq!(more.kind(), io::ErrorKind::WouldBlock);
        }
    }

    /// A free port with `more` free ones behind it, most likely: below the range that the kernel
    /// takes ports from by itself.
    fn free_range(more: u16) -> u16 {
        let free = |&first: &u16| {
            (first..=first + more).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok())
        };
        (20_000..30_000).step_by(50).find(free).unwrap()
    }

    #[test]
    fn a_range_is_opened_whole_or_not_at_all() {
        let first = free_range(9);
        let last = first + 9;
        let text = format!("127.0.0.1:{first}-{last}:80-89");
        let listeners = opened(&text);
        let ports: Vec<_> = addresses(&listeners).iter().map(SocketAddr::port).collect();
        assert_eq!(ports, (first..=last).collect::<Vec<_>>());
        assert_eq!(listeners.chosen, None);
        drop(listeners);

        let taken = TcpListener::bind(("127.0.0.1", first + 5)).unwrap();
        let error = refused(&text);
        assert_eq!(error.at, format!("127.0.0.1:{}/tcp", first + 5));
        TcpListener::bind(("127.0.0.1", first)).expect("the first ports are free again");
        drop(taken);
        opened(&text);
    }

    #[test]
    fn what_the_host_has_not_got_is_named() {
        let error = refused("192.0.2.7:0:80");
        assert!(
            error
                .reason
                .contains("192.0.2.7 is no address of this host"),
            "{error}"
        );
        let error = refused("127.0.0.1:0:80,interface=none0");
        assert_eq!(
            error.to_string(),
            "127.0.0.1:0/tcp: this host has no interface none0 ('ip link' lists them)"
        );
    }

    #[test]
    fn an_interface_can_be_chosen() {
        let listeners = opened("127.0.0.1:0:80/udp,interface=lo");
        let at = addresses(&listeners)[0];
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.send_to(b"x", at).unwrap();
        let socket = UdpSocket::from(listeners.sockets.into_iter().next().unwrap().fd);
        assert_eq!(socket.recv(&mut [0; 8]).unwrap(), 1);
    }

    /// A directory of this test, gone with the value.
    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("lanlet-{name}-{}", std::process::id()));
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn forward(&self) -> (PathBuf, String) {
            let path = self.0.join("a.sock");
            let text = format!("unix:{}-:80", path.display());
            (path, text)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_unix_socket_is_private_and_goes_with_its_listener() {
        let dir = Dir::new("private");
        let (path, text) = dir.forward();
        let listeners = opened(&text);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(listeners);
        assert!(!path.exists());

        let listeners = opened(&text);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "somebody else's").unwrap();
        drop(listeners);
        assert!(path.exists());
    }

    #[test]
    fn a_left_over_unix_socket_is_replaced_and_nothing_else() {
        let dir = Dir::new("left-over");
        let (path, text) = dir.forward();
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(opened(&text));

        let live = UnixListener::bind(&path).unwrap();
        assert!(
            refused(&text).reason.contains("already in use"),
            "it is in use"
        );
        UnixStream::connect(&path).expect("the other's socket is still there");
        drop(live);
        fs::remove_file(&path).unwrap();

        let live = UnixDatagram::bind(&path).unwrap();
        assert!(refused(&text).reason.contains("already in use"));
        drop(live);
        fs::remove_file(&path).unwrap();

        fs::write(&path, "precious").unwrap();
        let error = refused(&text);
        assert!(error.reason.contains("is no socket"), "{error}");
        assert_eq!(error.at, path.display().to_string());
        assert_eq!(fs::read(&path).unwrap(), b"precious");

        let error = refused(&format!("unix:{}/none/a-:80", dir.0.display()));
        assert!(error.reason.contains("there is no directory"), "{error}");
    }
}
