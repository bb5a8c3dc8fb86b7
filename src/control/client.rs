//! A command's end of the control socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use serde::de::DeserializeOwned;

use super::api::{Hello, PROTOCOL, REPLY_BYTES_MAX, Reply, Request};
use super::message::{LineReader, Read, send_some, to_line};
use super::{ControlError, RuntimeDir};
use crate::frame::PortId;
use crate::nat::forward::ForwardSpec;
use crate::network::{
    ForwardStatus, GuestAddress, GuestTap, KeptWire, PortOptions, Status, VhostUserPort, VmmPort,
};
use crate::sys::{peer, socket};

/// How long a network may take from its lock to its socket.
const START_TIME_MAX: Duration = Duration::from_secs(3);
/// Pause between two looks for the socket.
const START_POLL: Duration = Duration::from_millis(20);
/// How long a reply may take. Attaching takes milliseconds; a process that needs longer is stopped.
const REPLY_TIME_MAX: Duration = Duration::from_secs(10);

/// Connects to a control socket; `None` if nobody listens.
fn open(path: &Path) -> Result<Option<UnixStream>, ControlError> {
    match UnixStream::connect(path) {
        Ok(stream) => Ok(Some(stream)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(ControlError::Io {
            action: "connect to",
            path: path.to_owned(),
            error,
        }),
    }
}

/// A connection to a running network.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    reader: LineReader,
    name: String,
    /// The process at the other end; `None`: it has no pid in this pid namespace.
    peer_pid: Option<u32>,
    /// What it says is its pid, in its own pid namespace.
    pid: u32,
}

impl Client {
    /// Connects to the network called `name`; `None` if none runs.
    ///
    /// # Errors
    /// One runs, but can't be talked to.
    pub fn connect(dir: &RuntimeDir, name: &str) -> Result<Option<Self>, ControlError> {
        let path = dir.socket(name)?;
        if !dir.exists_safely()? {
            return Ok(None);
        }
        let deadline = Instant::now() + START_TIME_MAX;
        loop {
            if let Some(stream) = open(&path)? {
                return Self::greeted(stream, path, name).map(Some);
            }
            let Some(pid) = dir.holder(name) else {
                return Ok(None);
            };
            if Instant::now() > deadline {
                return Err(ControlError::NoAnswer {
                    name: name.to_owned(),
                    pid,
                });
            }
            std::thread::sleep(START_POLL);
        }
    }

    /// Connects to the network called `name` as soon as it runs; `None` if none does until `deadline`.
    ///
    /// # Errors
    /// One runs, but can't be talked to.
    pub fn connect_by(
        dir: &RuntimeDir,
        name: &str,
        deadline: Instant,
    ) -> Result<Option<Self>, ControlError> {
        let path = dir.socket(name)?;
        loop {
            // Not by the lock: many who look at it so often would keep the network from taking it.
            let stream = match dir.exists_safely()? {
                true => open(&path)?,
                false => None,
            };
            match stream.map(|stream| Self::greeted(stream, path.clone(), name)) {
                // It could not start, or is just ending: another may come.
                Some(Err(ControlError::Closed { .. })) if Instant::now() < deadline => {}
                Some(greeted) => return greeted.map(Some),
                None if Instant::now() < deadline => {}
                None => return Self::connect(dir, name),
            }
            std::thread::sleep(START_POLL);
        }
    }

    /// Connects to the network called `name` if its socket answers at once, without a look at its lock: those
    /// who wait for a network look often.
    ///
    /// # Errors
    /// One runs, but can't be talked to.
    pub fn connect_now(dir: &RuntimeDir, name: &str) -> Result<Option<Self>, ControlError> {
        let path = dir.socket(name)?;
        if !dir.exists_safely()? {
            return Ok(None);
        }
        let stream = open(&path)?;
        stream
            .map(|stream| Self::greeted(stream, path, name))
            .transpose()
    }

    /// A connection on which the network has said hello.
    fn greeted(stream: UnixStream, path: PathBuf, name: &str) -> Result<Self, ControlError> {
        let (pid, uid) = socket::peer(stream.as_fd()).map_err(|error| ControlError::Io {
            action: "look at",
            path,
            error,
        })?;
        if !peer::is_trusted_user(uid) {
            return Err(ControlError::Untrusted {
                name: name.to_owned(),
                uid,
            });
        }
        let mut client = Self {
            stream,
            reader: LineReader::new(REPLY_BYTES_MAX),
            name: name.to_owned(),
            peer_pid: pid,
            pid: pid.unwrap_or_default(),
        };
        client.greet()?;
        client.ask(&Request::Stay {}, &[])?;
        Ok(client)
    }

    /// The network's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Process that runs the network, as it is called in its own pid namespace.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// A pidfd of that process, to see it end by; `None` where the kernel gives none of a process in another
    /// pid namespace (before Linux 6.5).
    pub fn process(&self) -> Option<OwnedFd> {
        // The same number twice: it is no other process's, which has a pid namespace of its own.
        let visible = self.peer_pid.filter(|&pid| pid == self.pid);
        match visible.and_then(|pid| Pid::from_raw(pid.cast_signed())) {
            Some(pid) => pidfd_open(pid, PidfdFlags::empty()).ok(),
            None => socket::peer_process(self.stream.as_fd()).ok(),
        }
    }

    /// The network's state.
    ///
    /// # Errors
    /// The connection failed.
    pub fn status(&mut self) -> Result<Status, ControlError> {
        match self.ask(&Request::Status {}, &[])? {
            Reply::Status(status) => Ok(*status),
            _ => Err(self.confused()),
        }
    }

    /// Asks for a VMM's tap.
    ///
    /// # Errors
    /// The network refused, or the connection failed.
    pub fn attach_vmm(&mut self, options: &PortOptions) -> Result<VmmPort, ControlError> {
        let Reply::VmmPort {
            port,
            ifname,
            mac,
            kept,
        } = self.ask(&Request::AttachVmm(options.into()), &[])?
        else {
            return Err(self.confused());
        };
        let mut fds = self.reader.take_fds();
        let kept = kept.and_then(|sw_ifname| {
            let netlink = fds.pop()?;
            Some(KeptWire {
                queues: fds.split_off(fds.len() / 2),
                netlink,
                vm_ifname: ifname.clone(),
                sw_ifname,
            })
        });
        if fds.is_empty() {
            return Err(self.confused());
        }
        let mac = mac.parse().map_err(|_| self.confused())?;
        Ok(VmmPort {
            id: PortId(port),
            fds,
            ifname,
            mac,
            kept,
        })
    }

    /// Hands the switch's end of a VMM's wire to the network. The port ends with this connection.
    ///
    /// # Errors
    /// The network refused, or the connection failed.
    pub fn attach_wire(
        &mut self,
        wire: &KeptWire,
        options: &PortOptions,
    ) -> Result<PortId, ControlError> {
        let mut fds: Vec<_> = wire.queues.iter().map(AsFd::as_fd).collect();
        fds.push(wire.netlink.as_fd());
        let request = Request::AttachWire {
            port: options.into(),
            vm_ifname: wire.vm_ifname.clone(),
            sw_ifname: wire.sw_ifname.clone(),
        };
        match self.ask(&request, &fds)? {
            Reply::TapPort { port, .. } => Ok(PortId(port)),
            _ => Err(self.confused()),
        }
    }

    /// Hands a namespace guest's tap to the network. The port ends with this connection.
    ///
    /// # Errors
    /// The network refused, or the connection failed.
    pub fn attach_tap(
        &mut self,
        tap: &GuestTap,
        options: &PortOptions,
    ) -> Result<(PortId, Option<GuestAddress>), ControlError> {
        let mut fds: Vec<_> = tap.queues.iter().map(AsFd::as_fd).collect();
        // Told apart by their order: the process comes behind the socket.
        if let Some(netlink) = &tap.netlink {
            fds.push(netlink.as_fd());
            fds.extend(tap.process.as_ref().map(AsFd::as_fd));
        }
        match self.ask(&Request::AttachTap(options.into()), &fds)? {
            Reply::TapPort { port, address } => Ok((PortId(port), address)),
            _ => Err(self.confused()),
        }
    }

    /// The process of the guest in namespaces that has this name or address, as a pidfd.
    ///
    /// # Errors
    /// There is none, or the connection failed.
    pub fn guest_process(&mut self, guest: &str) -> Result<OwnedFd, ControlError> {
        let guest = guest.to_owned();
        match self.ask(&Request::GuestProcess { guest }, &[])? {
            Reply::GuestProcess {} => self.reader.take_fd().ok_or_else(|| self.confused()),
            _ => Err(self.confused()),
        }
    }

    /// Hands a listening socket for vhost-user front-ends to the network. The port ends with this
    /// connection, the socket's file is the caller's.
    ///
    /// # Errors
    /// The network refused, or the connection failed.
    pub fn attach_vhost_user(
        &mut self,
        socket: BorrowedFd<'_>,
        options: &PortOptions,
    ) -> Result<VhostUserPort, ControlError> {
        match self.ask(&Request::AttachVhostUser(options.into()), &[socket])? {
            Reply::VhostUserPort { port, mac } => Ok(VhostUserPort {
                id: PortId(port),
                mac: mac.parse().map_err(|_| self.confused())?,
            }),
            _ => Err(self.confused()),
        }
    }

    /// Removes a port.
    ///
    /// # Errors
    /// It is the gateway, or the connection failed.
    pub fn detach(&mut self, port: PortId) -> Result<(), ControlError> {
        self.ask(&Request::Detach { port: port.0 }, &[]).map(drop)
    }

    /// Adds a forward; `with_connection`: it ends with this connection.
    ///
    /// # Errors
    /// The network refused, or the connection failed.
    pub fn add_forward(
        &mut self,
        forward: &ForwardSpec,
        with_connection: bool,
    ) -> Result<ForwardStatus, ControlError> {
        let forward = forward.to_string();
        let request = Request::ForwardAdd {
            forward,
            with_connection,
        };
        match self.ask(&request, &[])? {
            Reply::Forward(forward) => Ok(forward),
            _ => Err(self.confused()),
        }
    }

    /// The forwards, in the order they were added.
    ///
    /// # Errors
    /// The connection failed.
    pub fn forwards(&mut self) -> Result<Vec<ForwardStatus>, ControlError> {
        match self.ask(&Request::ForwardList {}, &[])? {
            Reply::Forwards { forwards } => Ok(forwards),
            _ => Err(self.confused()),
        }
    }

    /// The egress policy in force, as text.
    ///
    /// # Errors
    /// The connection failed.
    pub fn policy(&mut self) -> Result<Option<String>, ControlError> {
        match self.ask(&Request::Policy {}, &[])? {
            Reply::Policy { text } => Ok(text),
            _ => Err(self.confused()),
        }
    }

    /// Removes the forward that is meant by its number, its name or its words.
    ///
    /// # Errors
    /// There is none, or the connection failed.
    pub fn remove_forward(&mut self, words: &str) -> Result<(), ControlError> {
        let forward = words.to_owned();
        self.ask(&Request::ForwardRemove { forward }, &[]).map(drop)
    }

    /// Puts another egress policy in force, or none.
    ///
    /// # Errors
    /// The network refused it, or the connection failed.
    pub fn set_policy(&mut self, text: Option<String>) -> Result<(), ControlError> {
        let request = match text {
            Some(text) => Request::SetPolicy { text },
            None => Request::ClearPolicy {},
        };
        self.ask(&request, &[]).map(drop)
    }

    /// Ends the network; how many guests it has.
    ///
    /// # Errors
    /// The connection failed.
    pub fn stop(&mut self) -> Result<usize, ControlError> {
        match self.ask(&Request::Stop {}, &[])? {
            Reply::Stopping { guests } => Ok(guests),
            _ => Err(self.confused()),
        }
    }

    fn greet(&mut self) -> Result<(), ControlError> {
        self.stream
            .set_read_timeout(Some(REPLY_TIME_MAX))
            .map_err(|error| self.failed(&error))?;
        let line = self.read_line()?;
        let Ok(hello) = serde_json::from_slice::<Hello>(&line) else {
            return Err(match self.decode(&line)? {
                Reply::Error { message } => ControlError::Refused(message),
                _ => self.confused(),
            });
        };
        if hello.lanlet != PROTOCOL {
            let reason = format!(
                "lanlet {} speaks control protocol {}, this one ({}) speaks {PROTOCOL}: end the network with \
                 'kill {}' and start it anew",
                hello.version,
                hello.lanlet,
                env!("CARGO_PKG_VERSION"),
                hello.pid
            );
            return Err(ControlError::Protocol {
                name: self.name.clone(),
                reason,
            });
        }
        self.pid = hello.pid;
        Ok(())
    }

    fn ask(&mut self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Reply, ControlError> {
        self.reader.drop_fds();
        let line = to_line(request).map_err(|error| self.failed(&error))?;
        let (mut rest, mut fds) = (line.as_slice(), fds);
        while !rest.is_empty() {
            let sent = send_some(&self.stream, rest, fds).map_err(|error| self.failed(&error))?;
            rest = &rest[sent..];
            fds = &[];
        }
        let line = self.read_line()?;
        match self.decode(&line)? {
            Reply::Error { message } => Err(ControlError::Refused(message)),
            reply => Ok(reply),
        }
    }

    fn read_line(&mut self) -> Result<Vec<u8>, ControlError> {
        loop {
            match self.reader.next_line() {
                Ok(Some(line)) => return Ok(line),
                Ok(None) => {}
                Err(reason) => {
                    return Err(ControlError::Protocol {
                        name: self.name.clone(),
                        reason,
                    });
                }
            }
            match self.reader.read_from(&self.stream) {
                Ok(Read::Some) => {}
                Ok(Read::Closed) => {
                    return Err(ControlError::Closed {
                        name: self.name.clone(),
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(ControlError::NoAnswer {
                        name: self.name.clone(),
                        pid: Some(self.pid),
                    });
                }
                Err(error) => return Err(self.failed(&error)),
            }
        }
    }

    fn decode<T: DeserializeOwned>(&self, line: &[u8]) -> Result<T, ControlError> {
        serde_json::from_slice(line).map_err(|error| ControlError::Protocol {
            name: self.name.clone(),
            reason: format!("an answer this version does not know: {error}"),
        })
    }

    fn failed(&self, error: &io::Error) -> ControlError {
        ControlError::Protocol {
            name: self.name.clone(),
            reason: error.to_string(),
        }
    }

    fn confused(&self) -> ControlError {
        let reason = "answered something else than was asked".to_owned();
        ControlError::Protocol {
            name: self.name.clone(),
            reason,
        }
    }
}

/// Readable once the network has gone away: nothing arrives unasked.
impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
