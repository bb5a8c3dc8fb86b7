//! `lanlet exec`: a command in a namespace whose only link is a port of the network.
//!
//! The child (`guest-init`) makes its namespaces and `eth0`, hands the tap over on a socket that it
//! inherits, waits for its address on the same socket, sets it, and becomes the command. It stays in
//! lanlet's process group and has lanlet's terminal: an interactive shell does its own job control,
//! and gives the terminal back to lanlet's group when it exits.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode};

use rustix::io::FdFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags, geteuid, pidfd_open};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::forward::ForwardFlags;
use super::lan::{Lan, LanFlags};
use super::options::{NetworkOptions, PortFlags};
use super::{Failure, child, complete, into};
use crate::frame::Mac;
use crate::network::{GuestAddress, GuestTap};
use crate::sys::{fd_pass, inherited};
use crate::tap::TapError;
use crate::tap::guest::ids::{self, OwnIds};
use crate::tap::guest::{Guest, GuestConfig, GuestConfig6, GuestFiles};

/// Longest message between lanlet and the child: an error text, or an address with a domain.
const MESSAGE_BYTES_MAX: usize = 8 * 1024;

/// Run a command in a namespace of its own on the network, without a VM
///
/// CMD runs in a fresh network and user namespace whose eth0 is a port of the network, with an
/// address, a default route, /etc/resolv.conf and /etc/hosts set. It sees the same files as outside,
/// but what it makes right in /etc is its own, or fails where it could make it in the host's.
///
/// For an ordinary user it is in a user namespace of its own: it has your id, or root's with --root, and
/// all capabilities over its own network, so that 'ip', 'tcpdump' and ports below 1024 work; nothing
/// outside is gained by that. Where the system has subordinate ids for you (/etc/subuid) and the programs
/// newuidmap and newgidmap, other users are there too, for 'su' and daemons that change theirs. Its exit
/// status is lanlet's.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet exec curl http://example.org/
  lanlet exec --name lab bash
  lanlet exec --into web ss -tln
  lanlet exec -p 8080:80 python3 -m http.server 80
  lanlet exec --name lab --mac 52:54:00:00:00:09 iperf3 -s")]
pub(super) struct Args {
    #[command(flatten)]
    lan: LanFlags,
    #[command(flatten)]
    port: PortFlags,
    #[command(flatten)]
    forwards: ForwardFlags,
    /// The command is root inside, whoever you are
    #[arg(long)]
    root: bool,
    /// Run the command beside that of a guest of 'lanlet exec' or 'join' that is there already, in its
    /// namespaces. GUEST is its name or address
    #[arg(
        long,
        value_name = "GUEST",
        add = complete::guests(),
        conflicts_with_all = [
            "root", "wait", "private", "mac", "ip", "guest_name", "group", "queues", "no_offload", "publish",
            "hostfwd", "guestfwd"
        ]
    )]
    into: Option<String>,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, required = true, value_name = "CMD", add = complete::command())]
    command: Vec<OsString>,
    #[command(flatten)]
    network: NetworkOptions,
}

/// The rest of `guest-init`'s command line.
#[derive(clap::Args, Debug)]
pub(super) struct InitArgs {
    #[command(flatten)]
    origin: child::Origin,
    /// Number of the inherited socket.
    socket: i32,
    /// A tap without virtio-net headers.
    #[arg(long)]
    no_offload: bool,
    /// Queues of the tap.
    #[arg(long, default_value_t = 1)]
    queues: u16,
    /// As root.
    #[arg(long)]
    root: bool,
    /// The command.
    #[arg(last = true)]
    command: Vec<OsString>,
}

/// What the child says.
#[derive(Serialize, Deserialize)]
enum Ready {
    /// It is in a user namespace without maps, and waits for [`Mapped`].
    Unmapped,
    /// The descriptors of the tap's queues and of the netlink socket come along.
    Guest,
    /// It could not be made.
    Failed(TapError),
}

/// What it is told.
#[derive(Serialize, Deserialize)]
struct Start {
    mac: String,
    /// What it is called, if anything.
    #[serde(default)]
    name: String,
    address: GuestAddress,
}

pub(super) fn exec(args: &Args) -> Result<ExitCode, Failure> {
    let signals = child::block_signals()?;
    if let Some(guest) = &args.into {
        if let Some(option) = args.network.first_given() {
            return Err(Failure::Usage(format!(
                "{option} is for a network that starts: a guest to run the command in is there already"
            )));
        }
        let process = args.lan.running()?.guest_process(guest)?;
        return into::enter(process, &args.command, &signals);
    }
    let mut lan = Lan::open("exec", &args.lan, &args.network)?;
    let mac = args.port.mac.unwrap_or_else(|| lan.make_mac());
    let mut guest = NewGuest::spawn(&Wanted {
        command: &args.command,
        queues: args.port.queues(),
        no_offload: args.port.no_offload,
        root: args.root,
    })?;
    let options = args.port.port(Some(mac));
    let name = options.name.as_ref().map(ToString::to_string);
    let name = name.unwrap_or_default();
    let tap = guest.tap.take().ok_or(Failure::Reported)?;
    let (_, address) = lan.attach_tap(tap, options)?;
    lan.add_forwards(&args.forwards, mac)?;
    let child = guest.start(mac, name, address.ok_or_else(no_address)?)?;
    let ended = child::supervise(child, &signals, lan.attachment());
    lan.drain();
    ended
}

/// For a network that attached a guest and has no lease for it.
pub(super) fn no_address() -> Failure {
    Failure::because("the network gave the guest no address")
}

/// What guest is wanted.
pub(super) struct Wanted<'a> {
    /// What it becomes.
    pub(super) command: &'a [OsString],
    /// Queues of its tap.
    pub(super) queues: u16,
    /// A tap without virtio-net headers.
    pub(super) no_offload: bool,
    /// It is root inside.
    pub(super) root: bool,
}

/// A guest that waits for its address. Dropped, it ends.
pub(super) struct NewGuest {
    child: Option<Child>,
    socket: OwnedFd,
    /// Its tap, for the network.
    pub(super) tap: Option<GuestTap>,
}

impl NewGuest {
    /// Starts the child and waits for its tap.
    ///
    /// # Errors
    /// The host forbids namespaces or taps: the error says what to do.
    pub(super) fn spawn(wanted: &Wanted<'_>) -> Result<Self, Failure> {
        let mut guest = Self::spawn_init("guest-init", wanted)?;
        guest.wait_for_tap(wanted.root)?;
        if let (Some(tap), Some(child)) = (&mut guest.tap, &guest.child) {
            tap.process = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).ok();
        }
        Ok(guest)
    }

    /// Makes a guest of a network namespace that is there, with a link of that name.
    ///
    /// # Errors
    /// It can't be entered, or the link can't be made.
    pub(super) fn join(
        namespace: BorrowedFd<'_>,
        ifname: &str,
        wanted: &Wanted<'_>,
    ) -> Result<Self, Failure> {
        let mut guest = Self::spawn_init("join-init", wanted)?;
        send(&guest.socket, &ifname, &[namespace])?;
        guest.wait_for_tap(wanted.root)?;
        Ok(guest)
    }

    fn spawn_init(subcommand: &str, wanted: &Wanted<'_>) -> Result<Self, Failure> {
        let failed =
            |error: rustix::io::Errno| Failure::io("cannot make a socket pair")(error.into());
        let (socket, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(failed)?;
        rustix::io::fcntl_setfd(&theirs, FdFlags::empty()).map_err(failed)?;
        let child = child::this_program()
            .arg(subcommand)
            .args(wanted.no_offload.then_some("--no-offload"))
            .args(wanted.root.then_some("--root"))
            .args(["--queues", &wanted.queues.to_string()])
            .args(child::Origin::words())
            .arg(theirs.as_raw_fd().to_string())
            .arg("--")
            .args(wanted.command)
            .spawn()
            .map_err(Failure::io("cannot start a process"))?;
        drop(theirs);
        Ok(Self {
            child: Some(child),
            socket,
            tap: None,
        })
    }

    /// Answers the child until it has handed the tap over.
    fn wait_for_tap(&mut self, root: bool) -> Result<(), Failure> {
        let pid = self.child.as_ref().map_or(0, Child::id);
        loop {
            let (ready, mut queues) = receive(&self.socket)?
                .ok_or_else(|| Failure::because("the namespace guest ended before it was ready"))?;
            match ready {
                Ready::Unmapped => {
                    let mapped = OwnIds::current(root).map_subordinate(pid);
                    send(&self.socket, &mapped, &[])?;
                }
                Ready::Failed(error) => return Err(error.into()),
                Ready::Guest => {
                    let netlink = queues.pop();
                    self.tap = Some(GuestTap {
                        queues,
                        netlink,
                        process: None,
                    });
                    return Ok(());
                }
            }
        }
    }

    /// Tells the guest its address, upon which it becomes the command.
    ///
    /// # Errors
    /// It has ended.
    pub(super) fn start(
        mut self,
        mac: Mac,
        name: String,
        address: GuestAddress,
    ) -> Result<Child, Failure> {
        let start = Start {
            mac: mac.to_string(),
            name,
            address,
        };
        send(&self.socket, &start, &[])?;
        self.child.take().ok_or(Failure::Reported)
    }
}

impl Drop for NewGuest {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Sends a message to the other one of lanlet and the child.
fn send(socket: &OwnedFd, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> Result<(), Failure> {
    let bytes = serde_json::to_vec(message).map_err(io::Error::from)?;
    fd_pass::send(socket.as_fd(), &bytes, fds)
        .map_err(Failure::io("cannot speak to the namespace guest"))
}

/// Receives one; `None`: the other one has ended.
fn receive<T: DeserializeOwned>(socket: &OwnedFd) -> Result<Option<(T, Vec<OwnedFd>)>, Failure> {
    let mut buffer = [0; MESSAGE_BYTES_MAX];
    let (len, fds) = fd_pass::recv(socket.as_fd(), &mut buffer)
        .map_err(Failure::io("cannot hear from the namespace guest"))?;
    if len == 0 {
        return Ok(None);
    }
    let message = serde_json::from_slice(&buffer[..len]).map_err(io::Error::from)?;
    Ok(Some((message, fds)))
}

/// Becomes a guest, then the command. Returns only if that fails.
pub(super) fn init(args: &InitArgs) -> Result<ExitCode, Failure> {
    let socket = inherited::take(args.socket).map_err(Failure::io("no socket was inherited"))?;
    args.origin.restore()?;
    let own = OwnIds::current(args.root);
    // Only the parent, outside, can have subordinate ids mapped.
    let map = || {
        let asked = send(&socket, &Ready::Unmapped, &[]).and_then(|()| receive(&socket));
        let Ok(Some((mapped, _))) = asked else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        own.map_rest(mapped)
    };
    let mut guest = match Guest::enter(!args.no_offload, args.queues, map) {
        Ok(guest) => guest,
        Err(error) => {
            // The parent prints it.
            let _ = send(&socket, &Ready::Failed(error), &[]);
            return Err(Failure::Reported);
        }
    };
    if !geteuid().is_root() {
        ids::keep_capabilities().unwrap_or_else(|error| {
            log::warn!("the command has no capabilities in its namespace: {error}; try --root");
        });
    }
    // Gaining capabilities in the new user namespace cleared any death signal set before
    // (commit_creds in kernel/cred.c).
    args.origin.die_with_parent()?;
    let start = hand_over(&mut guest, &socket)?;
    configure(&mut guest, &start)?;
    let files = GuestFiles {
        resolv_conf: resolv_conf(&start.address),
        hosts: hosts(&start.name, &start.address),
    };
    if let Err(error) = guest.set_files(&files) {
        log::warn!("{error}");
    }
    let (program, arguments) = args.command.split_first().ok_or(Failure::Reported)?;
    let error = Command::new(program).args(arguments).exec();
    Ok(child::cannot_run(program, &error))
}

/// Makes a guest of a namespace that is there, and ends.
pub(super) fn init_joined(args: &InitArgs) -> Result<ExitCode, Failure> {
    let socket = inherited::take(args.socket).map_err(Failure::io("no socket was inherited"))?;
    args.origin.restore()?;
    let (ifname, fds) = receive::<String>(&socket)?.ok_or(Failure::Reported)?;
    let namespace = fds.first().ok_or(Failure::Reported)?;
    let joined = Guest::join(namespace.as_fd(), &ifname, !args.no_offload, args.queues);
    let mut guest = match joined {
        Ok(guest) => guest,
        Err(error) => {
            let _ = send(&socket, &Ready::Failed(error), &[]);
            return Err(Failure::Reported);
        }
    };
    let start = hand_over(&mut guest, &socket)?;
    configure(&mut guest, &start)?;
    Ok(ExitCode::SUCCESS)
}

/// Gives the tap to lanlet, and waits for what the guest is to be.
fn hand_over(guest: &mut Guest, socket: &OwnedFd) -> Result<Start, Failure> {
    let fds = guest.take_fds().ok_or(Failure::Reported)?;
    let queues = fds.queues.iter().map(AsFd::as_fd);
    let all: Vec<_> = queues.chain([fds.netlink.as_fd()]).collect();
    send(socket, &Ready::Guest, &all)?;
    drop(fds);
    let (start, _) = receive(socket)?.ok_or(Failure::Reported)?;
    Ok(start)
}

fn configure(guest: &mut Guest, start: &Start) -> Result<(), Failure> {
    let address = &start.address;
    guest.configure(&GuestConfig {
        mac: start
            .mac
            .parse()
            .map_err(|error: String| Failure::because(error))?,
        address: address.address,
        prefix: address.prefix,
        gateway: address.gateway,
        mtu: address.mtu,
    })?;
    if let Some(v6) = &address.v6 {
        let configured = guest.configure6(&GuestConfig6 {
            address: v6.address,
            prefix: v6.prefix,
            gateway: v6.gateway,
            router: v6.router,
            routes: v6.routes.clone(),
        });
        if let Err(error) = configured {
            log::warn!("{error}; the guest has IPv4 only");
        }
    }
    Ok(())
}

fn resolv_conf(address: &GuestAddress) -> String {
    let search = address
        .domain
        .as_ref()
        .map(|domain| format!("search {domain}\n"));
    format!(
        "nameserver {}\n{}",
        address.gateway,
        search.unwrap_or_default()
    )
}

/// The guest's own name, if it has one: a service that binds to its name binds to its address on the
/// LAN. The names of the host's file come behind it, among them localhost and those that the user has
/// added, since what they stand for is reached through the NAT.
fn hosts(name: &str, address: &GuestAddress) -> String {
    if name.is_empty() {
        return String::new();
    }
    let full = address.domain.as_ref();
    let names = full.map_or_else(
        || name.to_owned(),
        |domain| format!("{name}.{domain} {name}"),
    );
    let v6 = address
        .v6
        .as_ref()
        .map(|v6| format!("{} {names}\n", v6.address));
    format!("{} {names}\n{}", address.address, v6.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_names() {
        let mut address = GuestAddress {
            address: [10, 0, 0, 2].into(),
            prefix: 24,
            gateway: [10, 0, 0, 1].into(),
            mtu: 1500,
            domain: None,
            v6: None,
        };
        assert_eq!(resolv_conf(&address), "nameserver 10.0.0.1\n");
        assert_eq!(hosts("", &address), "");
        assert_eq!(hosts("web", &address), "10.0.0.2 web\n");
        address.domain = Some("lab.test".to_owned());
        assert_eq!(hosts("web", &address), "10.0.0.2 web.lab.test web\n");
        assert_eq!(
            resolv_conf(&address),
            "nameserver 10.0.0.1\nsearch lab.test\n"
        );
    }
}
