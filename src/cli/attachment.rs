//! A command's guest on a network of another process, and how it comes back to that network when it was
//! started again.
//!
//! The command keeps what the port was made of: copies of the switch's descriptors of its tap, or the path of
//! its vhost-user socket. While the network is away it looks for it, [`PAUSE_MIN`] to [`PAUSE_MAX`] apart, and
//! reads from the tap in the network's place, so that no frame is carried after a pause that its sender has
//! given it up in, and a guest can't fill the kernel's memory with them. What is said to the network that came
//! back (it may be slow to answer) is said by a thread of its own: the main thread passes signals on.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::Failure;
use crate::control::client::Client;
use crate::control::{ControlError, RuntimeDir};
use crate::frame::{FRAME_BUFFER_LEN, PortId};
use crate::nat::forward::ForwardSpec;
use crate::network::{
    ForwardStatus, GuestAddress, GuestTap, KeptWire, PortOptions, VhostUserPort, VhostUserSocket,
    VmmPort,
};
use crate::uplink::listen::SocketFile;

/// Pause between two looks for a network that has just ended: what a restart by a service manager takes.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// Pause between two looks for one that is long gone.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// The pause is this share of the time that the network is away for.
const PAUSE_SHARE: u32 = 20;
/// Frames thrown away of a queue before signals are looked at again.
const DISCARDED_AT_ONCE: usize = 256;

/// The attachment.
pub(super) struct Attachment {
    state: State,
    /// `None`: a thread has it, or has failed with it.
    what: Option<What>,
    /// Not by the first connection: the port ends with the connection then.
    again: bool,
}

/// What the command has on the network.
struct What {
    dir: RuntimeDir,
    name: String,
    port: Option<Port>,
    /// Those that end with the connection.
    forwards: Vec<ForwardSpec>,
}

/// What a port can be made of again.
enum Port {
    Guest(GuestTap, PortOptions, Option<GuestAddress>),
    Wire(KeptWire, PortOptions),
    Socket(PathBuf, Option<SocketFile>, PortOptions),
}

/// The connection to the network, if that runs; or why the port is not attached.
type Tried = Result<Option<Client>, String>;

enum State {
    Attached(Box<Client>),
    Away {
        since: Instant,
        next: Instant,
        /// Why the network that is back did not take the port, as it was said.
        told: Option<String>,
    },
    Trying {
        since: Instant,
        told: Option<String>,
        thread: JoinHandle<Option<(What, Tried)>>,
        /// Closed by the thread at its end.
        done: OwnedFd,
    },
    /// For good.
    Over,
}

impl Attachment {
    /// By this connection, made through `dir`.
    pub(super) fn new(client: Client, dir: RuntimeDir) -> Self {
        let what = What {
            dir,
            name: client.name().to_owned(),
            port: None,
            forwards: Vec::new(),
        };
        Self {
            state: State::Attached(Box::new(client)),
            what: Some(what),
            again: false,
        }
    }

    /// The connection and what is had by it.
    fn parts(&mut self) -> Result<(&mut Client, &mut What), Failure> {
        match (&mut self.state, &mut self.what) {
            (State::Attached(client), Some(what)) => Ok((client, what)),
            _ => Err(Failure::because("the network has ended")),
        }
    }

    /// Asks for a VMM's tap.
    ///
    /// # Errors
    /// The network refused, or the connection failed.
    pub(super) fn attach_vmm(&mut self, mut options: PortOptions) -> Result<VmmPort, Failure> {
        let (client, what) = self.parts()?;
        options.keep = true;
        let mut port = client.attach_vmm(&options)?;
        options.mac = Some(port.mac);
        what.port = port.kept.take().map(|wire| Port::Wire(wire, options));
        Ok(port)
    }

    /// Hands a namespace guest's tap over.
    ///
    /// # Errors
    /// The network refused, or the connection failed.
    pub(super) fn attach_tap(
        &mut self,
        tap: GuestTap,
        options: PortOptions,
    ) -> Result<(PortId, Option<GuestAddress>), Failure> {
        let (client, what) = self.parts()?;
        let (id, address) = client.attach_tap(&tap, &options)?;
        what.port = Some(Port::Guest(tap, options, address.clone()));
        Ok((id, address))
    }

    /// Hands a vhost-user socket over; its file is removed with this value.
    ///
    /// # Errors
    /// The network refused, or the connection failed.
    pub(super) fn attach_vhost_user(
        &mut self,
        socket: VhostUserSocket,
        mut options: PortOptions,
    ) -> Result<VhostUserPort, Failure> {
        let (client, what) = self.parts()?;
        let port = client.attach_vhost_user(socket.fd.as_fd(), &options)?;
        options.mac = Some(port.mac);
        what.port = Some(Port::Socket(socket.name.into(), socket.file, options));
        Ok(port)
    }

    /// Adds a forward that ends with the connection.
    ///
    /// # Errors
    /// The network refused, or the connection failed.
    pub(super) fn add_forward(&mut self, spec: ForwardSpec) -> Result<ForwardStatus, Failure> {
        let (client, what) = self.parts()?;
        let added = client.add_forward(&spec, true)?;
        what.forwards.push(spec);
        Ok(added)
    }

    /// Whether a VMM's port needs more than the tap that it holds open: forwards of this connection. One that
    /// was attached again goes with the connection in any case, as nobody sees its tap close.
    pub(super) fn is_needed_by(&mut self, port: PortId) -> bool {
        if self.again {
            return false;
        }
        self.parts().is_ok_and(|(client, what)| {
            !what.forwards.is_empty()
                && client
                    .status()
                    .is_ok_and(|status| status.ports.iter().any(|other| other.id == port.0))
        })
    }

    /// What to wait for until [`Attachment::advance`] has something to do, besides [`Attachment::timeout`].
    pub(super) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        match &self.state {
            State::Attached(client) => vec![client.as_fd()],
            State::Away { .. } => self.queues().map(AsFd::as_fd).collect(),
            State::Trying { done, .. } => vec![done.as_fd()],
            State::Over => Vec::new(),
        }
    }

    /// How long to wait at most.
    pub(super) fn timeout(&self) -> Option<Duration> {
        match &self.state {
            State::Away { next, .. } => Some(next.saturating_duration_since(Instant::now())),
            _ => None,
        }
    }

    /// Does what there is to do. `ready`: one of [`Attachment::fds`] is.
    pub(super) fn advance(&mut self, ready: bool) {
        self.state = match std::mem::replace(&mut self.state, State::Over) {
            State::Attached(_) if ready => self.lost(),
            State::Away { since, next, told } => {
                if ready && !self.queues().all(discard) {
                    // The guest is gone, and its command is about to end.
                    return;
                }
                match next <= Instant::now() {
                    true => self.attempt(since, told),
                    false => State::Away { since, next, told },
                }
            }
            State::Trying {
                since,
                told,
                thread,
                ..
            } if ready => match thread.join() {
                Ok(Some((what, tried))) => {
                    self.what = Some(what);
                    self.tried(since, told, tried)
                }
                Ok(None) | Err(_) => State::Over,
            },
            unchanged => unchanged,
        };
    }

    /// The connection has ended, and with it the network.
    fn lost(&self) -> State {
        let name = self.what.as_ref().map_or("", |what| &what.name);
        if self.what.as_ref().is_none_or(|what| what.port.is_none()) {
            log::warn!("network '{name}' has ended; the command goes on without it");
            return State::Over;
        }
        log::warn!(
            "network '{name}' has ended; the command goes on without it until it is started again"
        );
        let now = Instant::now();
        State::Away {
            since: now,
            next: now + PAUSE_MIN,
            told: None,
        }
    }

    /// Looks for the network, and attaches where it is there.
    fn attempt(&mut self, since: Instant, told: Option<String>) -> State {
        // The thread is there before it is given what must not be lost where none can be had.
        let (give, given) = mpsc::channel::<What>();
        let start = || -> std::io::Result<(JoinHandle<_>, OwnedFd)> {
            let (done, ours) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
            let thread = std::thread::Builder::new().name("lanlet-attach".to_owned());
            let thread = thread.spawn(move || {
                let mut what = given.recv().ok()?;
                let tried = what.attach();
                drop(ours);
                Some((what, tried))
            })?;
            Ok((thread, done))
        };
        match start() {
            Ok((thread, done)) => {
                // It waits for this, and so takes it.
                if let Some(what) = self.what.take() {
                    let _ = give.send(what);
                }
                State::Trying {
                    since,
                    told,
                    thread,
                    done,
                }
            }
            // Out of threads or descriptors.
            Err(_) => self.later(since, told),
        }
    }

    fn tried(&mut self, since: Instant, told: Option<String>, tried: Tried) -> State {
        let name = self.what.as_ref().map_or("", |what| &what.name);
        match tried {
            Ok(Some(client)) => {
                log::info!("attached to network '{name}' again");
                self.again = true;
                State::Attached(Box::new(client))
            }
            Ok(None) => self.later(since, told),
            Err(cause) => {
                if told.as_ref() != Some(&cause) {
                    log::warn!("can't attach to network '{name}' again: {cause}");
                }
                self.later(since, Some(cause))
            }
        }
    }

    fn later(&self, since: Instant, told: Option<String>) -> State {
        let pause = (since.elapsed() / PAUSE_SHARE).clamp(PAUSE_MIN, PAUSE_MAX);
        State::Away {
            since,
            next: Instant::now() + pause,
            told,
        }
    }

    /// The switch's end of the guest's tap.
    fn queues(&self) -> std::slice::Iter<'_, OwnedFd> {
        match self.what.as_ref().and_then(|what| what.port.as_ref()) {
            Some(Port::Guest(tap, ..)) => tap.queues.iter(),
            Some(Port::Wire(wire, _)) => wire.queues.iter(),
            Some(Port::Socket(..)) | None => [].iter(),
        }
    }
}

impl What {
    /// Attaches the port to the network, if that runs.
    fn attach(&mut self) -> Tried {
        let client =
            Client::connect_now(&self.dir, &self.name).map_err(|error| error.to_string())?;
        let Some(mut client) = client else {
            return Ok(None);
        };
        match &mut self.port {
            Some(Port::Guest(tap, options, address)) => {
                // Its address is in use, whatever leases the network has. Where that is refused, a guest that
                // others reach by its MAC alone is better than none.
                let wanted = PortOptions {
                    ip: address.as_ref().map(|lease| lease.address),
                    ..options.clone()
                };
                let attached = match client.attach_tap(tap, &wanted) {
                    Err(ControlError::Refused(_)) => client.attach_tap(tap, options),
                    attached => attached,
                };
                let (_, lease) = attached.map_err(|error| error.to_string())?;
                let of = |lease: &GuestAddress| (lease.address, lease.prefix, lease.gateway);
                if let (Some(lease), Some(address)) = (lease, address)
                    && of(&lease) != of(address)
                {
                    log::warn!(
                        "network '{}' means the guest to be {}/{} with the gateway {}, and it stays {}/{} with \
                         {}: start the command again",
                        self.name,
                        lease.address,
                        lease.prefix,
                        lease.gateway,
                        address.address,
                        address.prefix,
                        address.gateway
                    );
                }
            }
            Some(Port::Wire(wire, options)) => {
                client
                    .attach_wire(wire, options)
                    .map_err(|error| error.to_string())?;
            }
            Some(Port::Socket(path, file, options)) => {
                // Nobody listens at the old one, whose file goes first.
                drop(file.take());
                let socket = VhostUserSocket::listen(path).map_err(|error| error.to_string())?;
                *file = socket.file;
                client
                    .attach_vhost_user(socket.fd.as_fd(), options)
                    .map_err(|error| error.to_string())?;
            }
            None => {}
        }
        for spec in &self.forwards {
            if let Err(error) = client.add_forward(spec, true) {
                log::warn!("forward {spec} is not there any more: {error}");
            }
        }
        Ok(Some(client))
    }
}

/// Throws away what waits in a queue of a tap, or the beginning of it; `false`: the tap is gone.
fn discard(queue: &OwnedFd) -> bool {
    let mut buffer = [0; FRAME_BUFFER_LEN];
    for _ in 0..DISCARDED_AT_ONCE {
        match rustix::io::read(queue, &mut buffer) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return error == Errno::AGAIN,
        }
    }
    true
}
