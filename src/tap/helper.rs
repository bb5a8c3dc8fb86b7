//! The helper process: `lanlet netns-helper`, started by [`super::Helper`].
//!
//! It enters a fresh user and network namespace and serves one client over its standard input, a
//! SEQPACKET socket. It holds no fd of the wires it makes: a VMM's tap goes with the VMM, which is
//! how the helper (and through it lanlet) learns that a VMM has ended.
//!
//! # End
//! It ends when its client closes the socket or dies. A pidfd of the client is watched besides, in
//! case a stray copy of the socket lives on in some other child of the client. (PR_SET_PDEATHSIG
//! would be wrong here: it fires when the *thread* that started the helper ends.)

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{PidfdFlags, getegid, geteuid, getppid, pidfd_open};

use super::client::{HELPER_SUBCOMMAND, use_own_program};
use super::protocol::{self, Event, Reply, Request};
use super::wire::{self, WireEnds};
use super::{TapError, WireOptions};
use crate::sys::netlink::RouteSocket;
use crate::sys::rtnl::parse_link;
use crate::sys::{harden, namespace};

/// First fd after the standard ones.
const FIRST_EXTRA_FD: u32 = 3;
/// Wires at most: a bound on what one client can make of kernel memory, far above the ports of one
/// switch.
const WIRES_MAX: usize = 4096;

/// For a program that uses the library, as the first line of its `main`: it needs no `lanlet` beside it
/// then. Where the process was started as a helper, this serves its client and ends the process.
///
/// ```no_run
/// fn main() -> Result<(), Box<dyn std::error::Error>> {
///     lanlet::tap::helper::run_if_asked();
///     let network = lanlet::network::Network::start(Default::default())?;
///     let port = network.attach_vmm(Default::default())?;
///     println!("{:?}", port.fds);
///     Ok(())
/// }
/// ```
pub fn run_if_asked() {
    if std::env::args_os()
        .nth(1)
        .is_some_and(|word| word == HELPER_SUBCOMMAND)
    {
        std::process::exit(i32::from(run_on_stdin().is_err()));
    }
    use_own_program();
}

/// Body of the hidden subcommand: serves the client on standard input until it goes. It must be the
/// first thing that the process does: it closes every other fd.
///
/// # Errors
/// Standard input is no socket, or the client broke the protocol.
pub fn run_on_stdin() -> io::Result<()> {
    namespace::close_from(FIRST_EXTRA_FD);
    // Keeps no directory of the client's busy.
    std::env::set_current_dir("/")?;
    run(io::stdin().as_fd().try_clone_to_owned()?)
}

/// Serves the client behind `control` until it goes. The process must have one thread.
///
/// # Errors
/// The client broke the protocol.
pub fn run(control: OwnedFd) -> io::Result<()> {
    let Some((Request::Start, fds)) = protocol::recv::<Request>(control.as_fd())? else {
        return Ok(());
    };
    let Some(events) = fds.into_iter().next() else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    // Before unshare: the parent must be visible. None: it is in an outer pid namespace.
    let parent = getppid().and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    match Server::start() {
        Ok(mut server) => {
            // Its maps of ids are written.
            harden::not_dumpable()?;
            protocol::send(control.as_fd(), &Reply::Done, &[])?;
            server.serve(control.as_fd(), events.as_fd(), parent.as_ref())
        }
        Err(error) => protocol::send(control.as_fd(), &Reply::Failed(error), &[]),
    }
}

struct Server {
    route: RouteSocket,
    /// Tells when a link is deleted.
    links: RouteSocket,
    wires: HashMap<u64, WireEnds>,
    next_id: u64,
}

impl Server {
    fn start() -> Result<Self, TapError> {
        enter_namespace()?;
        wire::silence_ipv6();
        let open = |groups| RouteSocket::open(groups).map_err(|error| TapError::namespace(&error));
        Ok(Self {
            route: open(0)?,
            links: open(libc::RTMGRP_LINK as u32)?,
            wires: HashMap::new(),
            next_id: 0,
        })
    }

    fn serve(
        &mut self,
        control: BorrowedFd<'_>,
        events: BorrowedFd<'_>,
        parent: Option<&OwnedFd>,
    ) -> io::Result<()> {
        let links = self.links.as_fd().try_clone_to_owned()?;
        loop {
            let mut fds = vec![
                PollFd::from_borrowed_fd(control, PollFlags::IN),
                PollFd::from_borrowed_fd(links.as_fd(), PollFlags::IN),
            ];
            fds.extend(parent.map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)));
            rustix::io::retry_on_intr(|| poll(&mut fds, None))?;
            let ready = |n: usize| fds.get(n).is_some_and(|fd| !fd.revents().is_empty());
            if ready(2) {
                return Ok(());
            }
            if ready(1) {
                self.report_gone(events);
            }
            if ready(0) {
                let Some((request, _)) = protocol::recv(control)? else {
                    return Ok(());
                };
                self.answer(control, request)?;
            }
        }
    }

    fn answer(&mut self, control: BorrowedFd<'_>, request: Request) -> io::Result<()> {
        let reply = match request {
            Request::Start => Reply::Done,
            Request::Create(options) => return self.create(control, options),
            Request::Destroy(id) => {
                if let Some(ends) = self.wires.remove(&id) {
                    wire::take_down(&mut self.route, &ends);
                }
                Reply::Done
            }
            Request::Drops(id) => match self.wires.get(&id) {
                Some(ends) => wire::drops(&mut self.route, ends).map_or_else(
                    |error| Reply::Failed(TapError::netlink("reading drops", &error)),
                    Reply::Drops,
                ),
                None => Reply::Failed(TapError::not_a_tap("no such wire")),
            },
        };
        protocol::send(control, &reply, &[])
    }

    fn create(&mut self, control: BorrowedFd<'_>, options: WireOptions) -> io::Result<()> {
        if self.wires.len() >= WIRES_MAX {
            let error = TapError::not_a_tap(format!("{WIRES_MAX} wires at most"));
            return protocol::send(control, &Reply::Failed(error), &[]);
        }
        let id = self.next_id;
        self.next_id += 1;
        match wire::make(&mut self.route, id, options) {
            Ok(made) => {
                self.wires.insert(id, made.ends);
                let (vm_ifname, sw_ifname) = (made.vm_ifname, made.sw_ifname);
                let reply = Reply::Wire {
                    id,
                    kind: made.kind,
                    vm_queues: made.vm_queues,
                    vm_ifname,
                    sw_ifname,
                    uso: made.uso,
                    fallback: made.fallback,
                };
                let fds: Vec<_> = made.fds.iter().map(AsFd::as_fd).collect();
                protocol::send(control, &reply, &fds)
            }
            Err(error) => protocol::send(control, &Reply::Failed(error), &[]),
        }
    }

    /// Tells the client about VMM taps that went.
    fn report_gone(&mut self, events: BorrowedFd<'_>) {
        let mut gone = Vec::new();
        loop {
            match self.links.notification() {
                Ok(messages) => gone.extend(
                    messages
                        .iter()
                        .filter(|(kind, _)| *kind == libc::RTM_DELLINK)
                        .filter_map(|(_, body)| parse_link(body))
                        .filter_map(|link| self.wire_of(link.index)),
                ),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    // Notifications were lost: look at every link.
                    let Self { route, wires, .. } = self;
                    gone.extend(
                        wires
                            .iter()
                            .filter_map(|(&id, ends)| ends.is_gone(route).then_some(id)),
                    );
                }
                Err(_) => break,
            }
        }
        for id in gone {
            if self.wires.remove(&id).is_some() {
                // A client that is gone shows on the control socket.
                let _ = protocol::send(events, &Event::Gone(id), &[]);
            }
        }
    }

    fn wire_of(&self, vm_index: u32) -> Option<u64> {
        self.wires
            .iter()
            .find(|(_, ends)| ends.vm.index == vm_index)
            .map(|(&id, _)| id)
    }
}

/// Enters a user and network namespace; as root, where user namespaces are forbidden, the network
/// namespace alone.
fn enter_namespace() -> Result<(), TapError> {
    let (uid, gid) = (geteuid(), getegid());
    let entered = match namespace::unshare(true, false) {
        // Root without CAP_SETFCAP may not map itself (user_namespaces(7)), and has its
        // capabilities in the namespace all the same.
        Ok(()) => namespace::map_to_root(uid.as_raw(), gid.as_raw())
            .or_else(|error| if uid.is_root() { Ok(()) } else { Err(error) }),
        Err(error) if uid.is_root() => namespace::unshare(false, false).map_err(|_| error),
        Err(error) => Err(error),
    };
    entered.map_err(|error| TapError::namespace(&error))
}
