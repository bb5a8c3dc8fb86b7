//! The thread that takes a port's front-ends, one after the other, and does what they ask for. It is for
//! set-up alone: frames never meet it.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SocketFlags, accept_with, recv};
use vhost::vhost_user::{BackendReqHandler, Error, VhostUserBackendReqHandlerMut};

use super::device::Device;
use super::front_end::FrontEnd;
use crate::sys::peer;

/// Pause after a failed accept (out of descriptors), so that the loop does not spin.
const ACCEPT_RETRY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// A served socket. Dropping it ends the connection, the socket and the thread.
#[derive(Debug)]
pub struct Server {
    end: Arc<OwnedFd>,
    listener: Arc<OwnedFd>,
    /// The connection, to cut off a front-end that is in the middle of a message.
    connection: Arc<Mutex<Option<UnixStream>>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves front-ends that connect to `listener`. `allow_guests`: a front-end may be a guest of `lanlet exec`.
    ///
    /// # Errors
    /// The kernel gives no eventfd or thread.
    pub fn start(listener: OwnedFd, allow_guests: bool, device: Arc<Device>) -> io::Result<Self> {
        let end = Arc::new(super::eventfd()?);
        let listener = Arc::new(listener);
        let connection = Arc::default();
        let seat = Seat {
            listener: Arc::clone(&listener),
            allow_guests,
            device,
            end: Arc::clone(&end),
            connection: Arc::clone(&connection),
            turned_away: AtomicBool::new(false),
        };
        let thread = std::thread::Builder::new()
            .name("lanlet-vhost".to_owned())
            .spawn(move || seat.run())?;
        Ok(Self {
            end,
            listener,
            connection,
            thread: Some(thread),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.end, &1u64.to_ne_bytes());
        // Whoever shares the socket can have made it block, and taken the connection that was to be accepted.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        let connection = self.connection.lock();
        if let Some(stream) = &*connection.unwrap_or_else(PoisonError::into_inner) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A front-end's place.
struct Seat {
    listener: Arc<OwnedFd>,
    allow_guests: bool,
    device: Arc<Device>,
    end: Arc<OwnedFd>,
    connection: Arc<Mutex<Option<UnixStream>>>,
    /// Somebody was turned away, and that was said.
    turned_away: AtomicBool,
}

/// A front-end that is connected.
struct Guest {
    handler: BackendReqHandler<Mutex<FrontEnd>>,
    front_end: Arc<Mutex<FrontEnd>>,
    /// The handler's own socket, to wait on.
    stream: UnixStream,
}

/// `struct VhostUserMsg` up to its payload: request, flags and size, 32 bits each in the host's order.
const HEADER_LEN: usize = 12;
/// A queue's number and a value, 32 bits each.
const VRING_STATE_LEN: usize = 8;
const SET_VRING_ENABLE: u32 = 18;
const VERSION: u32 = 1;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;

impl Guest {
    /// Does what the next message asks for.
    ///
    /// QEMU's virtio-net enables its first pair of queues before it says SET_FEATURES (hw/net/virtio-net.c,
    /// `peer_attach`), which the vhost crate takes for a breach of the protocol: so this one message is read
    /// here.
    fn handle_request(&mut self) -> Result<(), Error> {
        let mut header = [0; HEADER_LEN];
        let flags = RecvFlags::PEEK | RecvFlags::WAITALL;
        let (_, len) = recv(&self.stream, &mut header, flags)
            .map_err(|error| Error::SocketError(error.into()))?;
        let word = |at: usize| {
            u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let is_enable = word(0) == SET_VRING_ENABLE && word(8) == VRING_STATE_LEN as u32;
        if len != HEADER_LEN || !is_enable {
            return self.handler.handle_request();
        }
        let mut message = [0; HEADER_LEN + VRING_STATE_LEN];
        self.stream
            .read_exact(&mut message)
            .map_err(Error::SocketBroken)?;
        let word = |at: usize| {
            u32::from_ne_bytes([
                message[at],
                message[at + 1],
                message[at + 2],
                message[at + 3],
            ])
        };
        let (index, value) = (word(HEADER_LEN), word(HEADER_LEN + 4));
        let mut front_end = self.front_end.lock();
        let front_end = front_end.as_mut().unwrap_or_else(|error| error.get_mut());
        let done = match value {
            0 | 1 => front_end.set_vring_enable(index, value == 1),
            _ => Err(Error::InvalidParam),
        };
        if word(4) & FLAG_NEED_REPLY != 0 && front_end.replies() {
            let size = size_of::<u64>() as u32;
            let mut reply = Vec::new();
            for word in [SET_VRING_ENABLE, VERSION | FLAG_REPLY, size] {
                reply.extend(word.to_ne_bytes());
            }
            reply.extend(u64::from(done.is_err()).to_ne_bytes());
            self.stream.write_all(&reply).map_err(Error::SocketBroken)?;
        }
        done
    }
}

impl Seat {
    fn run(self) {
        let mut guest: Option<Guest> = None;
        let mut warned = false;
        loop {
            let connection = match &guest {
                Some(guest) => guest.stream.as_fd(),
                None => self.end.as_fd(),
            };
            let mut fds = [
                PollFd::from_borrowed_fd(self.end.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(connection, PollFlags::IN),
                PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN),
            ];
            // An error other than EINTR shows in what follows.
            let _ = poll(&mut fds, None);
            let [ended, asked, knocked] = fds.map(|fd| !fd.revents().is_empty());
            if ended {
                break;
            }
            // First, so that a front-end that has gone makes room for the one that follows it.
            if asked && let Some(current) = &mut guest {
                if let Err(error) = current.handle_request() {
                    self.tell_end(&error);
                    self.seat(None);
                    guest = None;
                }
                continue;
            }
            if knocked {
                match self.accept(guest.is_some()) {
                    Ok(None) => {}
                    Ok(accepted) => guest = accepted,
                    Err(error) => {
                        let mut end = [PollFd::new(&self.end, PollFlags::IN)];
                        if poll(&mut end, Some(&ACCEPT_RETRY)) == Ok(1) {
                            break;
                        }
                        if !std::mem::replace(&mut warned, true) {
                            let name = self.device.name();
                            log::warn!("{name}: cannot accept a front-end: {error}");
                        }
                    }
                }
            }
        }
        self.seat(None);
    }

    fn seat(&self, stream: Option<UnixStream>) {
        let mut connection = self.connection.lock();
        **connection.as_mut().unwrap_or_else(|error| error.get_mut()) = stream;
    }

    fn accept(&self, taken: bool) -> io::Result<Option<Guest>> {
        let stream = match accept_with(&self.listener, SocketFlags::CLOEXEC) {
            Ok(stream) => UnixStream::from(stream),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::CONNABORTED) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let name = self.device.name();
        // Else a guest could be the port's: have its name, its address and its rules.
        if let Err(refusal) = peer::check(stream.as_fd(), self.allow_guests) {
            log::warn!("{name}: {refusal}");
            return Ok(None);
        }
        if taken {
            // Whoever connects again and again would fill the log.
            let level = match self.turned_away.swap(true, Relaxed) {
                false => log::Level::Warn,
                true => log::Level::Debug,
            };
            log::log!(
                level,
                "{name}: a second front-end was turned away: a port is for one guest"
            );
            return Ok(None);
        }
        self.seat(Some(stream.try_clone()?));
        log::info!("{name}: a front-end has connected");
        let front_end = Arc::new(Mutex::new(FrontEnd::new(Arc::clone(&self.device))));
        Ok(Some(Guest {
            stream: stream.try_clone()?,
            handler: BackendReqHandler::from_stream(stream, Arc::clone(&front_end)),
            front_end,
        }))
    }

    fn tell_end(&self, error: &Error) {
        let name = self.device.name();
        match error {
            Error::Disconnected | Error::SocketBroken(_) | Error::PartialMessage => {
                log::info!("{name}: the front-end has gone; another may connect");
            }
            error => log::warn!("{name}: the front-end is cut off: {error}"),
        }
    }
}
