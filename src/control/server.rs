//! The network's end of the control socket.
//!
//! One thread with a current-thread tokio runtime serves all clients; what asks the network for
//! something runs on a small blocking pool, since attaching a port waits for the kernel. A client
//! that sends nonsense is answered once and cut off. A client holds one of [`CLIENTS_MAX`] seats once it
//! has asked for something. Until then it holds one of a few places, and is cut off after a few seconds.
//! A client that may not be served ([`peer::check`](crate::sys::peer::check)) gets neither.

mod accept;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::Claim;
use super::api::{CLIENTS_MAX, Hello, PROTOCOL, REQUEST_BYTES_MAX, Reply, Request};
use super::message::{LineReader, Read, send_some, to_line};
use crate::frame::PortId;
use crate::nat::forward::{ForwardId, ForwardSpec};
use crate::nat::policy::PolicyError;
use crate::network::{
    ForwardStatus, GuestAddress, GuestTap, KeptWire, Network, PortOptions, Status, VhostUserPort,
    VhostUserSocket, VmmPort,
};
use crate::sys::signal::Process;
use crate::sys::socket;

/// Threads that wait on behalf of clients: for the kernel, which takes milliseconds, or a second for a guest
/// whose name is taken, so that a few of those hold nobody else up.
const BLOCKING_THREADS: usize = 16;
/// Of a longer command line the beginning is told.
const COMMAND_CHARS_MAX: usize = 1000;
/// How long a client may take to ask for something, so that silent ones make room. One that has nothing to
/// ask for yet says so ([`Request::Stay`]). The next client in the queue waits 10 s for its greeting.
const FIRST_REQUEST_TIME: Duration = Duration::from_secs(4);

/// What the server serves: a network, or a test's stand-in.
pub trait Target: Send + Sync + 'static {
    /// The state.
    fn status(&self) -> Status;

    /// How many guests are attached. It waits for nobody.
    fn guests(&self) -> usize;

    /// Makes a tap for a VMM.
    ///
    /// # Errors
    /// Why not, with the remedy.
    fn attach_vmm(&self, options: PortOptions) -> Result<VmmPort, String>;

    /// Attaches a namespace guest's tap.
    ///
    /// # Errors
    /// Why not, with the remedy.
    fn attach_tap(
        &self,
        tap: GuestTap,
        options: PortOptions,
    ) -> Result<(PortId, Option<GuestAddress>), String>;

    /// Attaches a VMM's port that was another network's.
    ///
    /// # Errors
    /// Why not, with the remedy.
    fn attach_wire(&self, wire: KeptWire, options: PortOptions) -> Result<PortId, String>;

    /// Attaches a socket for vhost-user front-ends.
    ///
    /// # Errors
    /// Why not, with the remedy.
    fn attach_vhost_user(
        &self,
        socket: VhostUserSocket,
        options: PortOptions,
    ) -> Result<VhostUserPort, String>;

    /// The process of a guest in namespaces, as a pidfd.
    ///
    /// # Errors
    /// There is none.
    fn guest_process(&self, guest: &str) -> Result<OwnedFd, String>;

    /// Removes a port.
    fn detach(&self, port: PortId);

    /// Adds a forward.
    ///
    /// # Errors
    /// What is wrong with it, or who is in its way.
    fn add_forward(&self, forward: ForwardSpec) -> Result<ForwardStatus, String>;

    /// The forwards.
    fn forwards(&self) -> Vec<ForwardStatus>;

    /// The number of the forward that is meant.
    ///
    /// # Errors
    /// There is none.
    fn find_forward(&self, words: &str) -> Result<ForwardId, String>;

    /// Removes a forward.
    fn remove_forward(&self, id: ForwardId);

    /// The egress policy in force, as text.
    fn policy(&self) -> Option<String>;

    /// Puts another egress policy in force, or none.
    ///
    /// # Errors
    /// What is wrong with it, by line, or why it is not in force.
    fn set_policy(&self, text: Option<&str>) -> Result<(), String>;
}

impl Target for Network {
    fn status(&self) -> Status {
        Network::status(self)
    }

    fn guests(&self) -> usize {
        Network::guests(self)
    }

    fn attach_vmm(&self, options: PortOptions) -> Result<VmmPort, String> {
        Network::attach_vmm(self, options).map_err(|error| error.to_string())
    }

    fn attach_tap(
        &self,
        tap: GuestTap,
        options: PortOptions,
    ) -> Result<(PortId, Option<GuestAddress>), String> {
        Network::attach_tap(self, tap, options).map_err(|error| error.to_string())
    }

    fn attach_wire(&self, wire: KeptWire, options: PortOptions) -> Result<PortId, String> {
        Network::attach_wire(self, wire, options).map_err(|error| error.to_string())
    }

    fn attach_vhost_user(
        &self,
        socket: VhostUserSocket,
        options: PortOptions,
    ) -> Result<VhostUserPort, String> {
        Network::attach_vhost_user(self, socket, options).map_err(|error| error.to_string())
    }

    fn guest_process(&self, guest: &str) -> Result<OwnedFd, String> {
        Network::guest_process(self, guest).map_err(|error| error.to_string())
    }

    fn detach(&self, port: PortId) {
        Network::detach(self, port);
    }

    fn add_forward(&self, forward: ForwardSpec) -> Result<ForwardStatus, String> {
        Network::add_forward(self, forward).map_err(|error| error.to_string())
    }

    fn forwards(&self) -> Vec<ForwardStatus> {
        Network::forwards(self)
    }

    fn find_forward(&self, words: &str) -> Result<ForwardId, String> {
        Network::find_forward(self, words).map_err(|error| error.to_string())
    }

    fn remove_forward(&self, id: ForwardId) {
        Network::remove_forward(self, id);
    }

    fn policy(&self) -> Option<String> {
        Network::policy(self).map(|policy| policy.to_string())
    }

    fn set_policy(&self, text: Option<&str>) -> Result<(), String> {
        let policy = text.map(str::parse).transpose();
        let policy = policy.map_err(|error: PolicyError| error.to_string())?;
        Network::set_policy(self, policy).map_err(|error| error.to_string())
    }
}

/// A served control socket. Dropping it closes all connections and frees the network's name.
pub struct Server {
    end: Arc<Notify>,
    thread: Option<JoinHandle<()>>,
}

/// What every connection needs.
struct Shared {
    target: Arc<dyn Target>,
    name: String,
    hello: Vec<u8>,
    on_stop: Box<dyn Fn(String) + Send + Sync>,
    seats: Arc<Semaphore>,
}

impl Server {
    /// Serves the network called `name` at its claimed socket. `on_stop` is called, on the server's
    /// thread, for every [`Request::Stop`], after it was answered, and when another process has taken the name;
    /// with the reason in words.
    ///
    /// # Errors
    /// The thread or the runtime can't be made.
    pub fn start(
        name: &str,
        mut claim: Claim,
        target: Arc<dyn Target>,
        on_stop: impl Fn(String) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let hello = Hello {
            lanlet: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            name: name.to_owned(),
            pid: std::process::id(),
        };
        let shared = Arc::new(Shared {
            target,
            name: name.to_owned(),
            hello: to_line(&hello)?,
            on_stop: Box::new(on_stop),
            seats: Arc::new(Semaphore::new(CLIENTS_MAX)),
        });
        let listener = claim.take_listener().ok_or(io::ErrorKind::AddrInUse)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .thread_name("lanlet-request")
            .max_blocking_threads(BLOCKING_THREADS)
            .build()?;
        let end = Arc::new(Notify::new());
        let ended = Arc::clone(&end);
        let thread = std::thread::Builder::new()
            .name("lanlet-control".to_owned())
            .spawn(move || {
                let served = runtime.block_on(async {
                    tokio::select! {
                        served = accept::keep_serving(listener, &mut claim, &shared) => served,
                        () = ended.notified() => Ok(()),
                    }
                });
                if let Err(error) = served {
                    log::error!("control socket: {error}");
                }
                // All connections are closed before the name is free.
                drop(runtime);
                drop(claim);
            })?;
        Ok(Self {
            end,
            thread: Some(thread),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The ports and forwards that live as long as a connection.
struct Owned {
    target: Arc<dyn Target>,
    ports: Vec<PortId>,
    forwards: Vec<ForwardId>,
}

impl Drop for Owned {
    fn drop(&mut self) {
        // Forwards before ports, so that no connection arrives for a guest that is gone.
        for &forward in &self.forwards {
            self.target.remove_forward(forward);
        }
        for &port in &self.ports {
            self.target.detach(port);
        }
    }
}

/// The command that runs the network, in words.
fn command_line() -> String {
    let word = |word: std::ffi::OsString| {
        let word = word.to_string_lossy();
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "@%+=:,./_-{}[]".contains(c);
        match !word.is_empty() && word.chars().all(is_plain) {
            true => word.into_owned(),
            false => format!("'{}'", word.replace('\'', "'\\''")),
        }
    };
    let words = ["lanlet".to_owned()]
        .into_iter()
        .chain(std::env::args_os().skip(1).map(word));
    let mut line = words.collect::<Vec<_>>().join(" ");
    if let Some((end, _)) = line.char_indices().nth(COMMAND_CHARS_MAX) {
        line.truncate(end);
        line.push('…');
    }
    line
}

/// A client for the log.
fn client_in_words(stream: &UnixStream) -> String {
    match socket::peer(stream.as_fd()) {
        Ok((Some(pid), uid)) => format!("{}, uid {uid}", Process(pid)),
        Ok((None, uid)) => format!("a process outside this pid namespace, uid {uid}"),
        Err(error) => format!("a client ({error})"),
    }
}

/// Serves a client. `newcomer`: its place until it has asked for something.
async fn serve(
    stream: &UnixStream,
    shared: &Shared,
    newcomer: OwnedSemaphorePermit,
) -> io::Result<()> {
    let mut newcomer = Some(newcomer);
    let mut _seat = None;
    let patience = tokio::time::sleep(FIRST_REQUEST_TIME);
    tokio::pin!(patience);
    write(stream, &shared.hello, Vec::new()).await?;
    let mut owned = Owned {
        target: Arc::clone(&shared.target),
        ports: Vec::new(),
        forwards: Vec::new(),
    };
    let mut reader = LineReader::new(REQUEST_BYTES_MAX);
    loop {
        let line = match reader.next_line() {
            Ok(Some(line)) => line,
            Ok(None) => {
                tokio::select! {
                    readable = stream.readable() => readable?,
                    () = &mut patience, if newcomer.is_some() => return Ok(()),
                }
                match stream.try_io(Interest::READABLE, || reader.read_from(stream.as_fd())) {
                    Ok(Read::Some) => continue,
                    Ok(Read::Closed) => return Ok(()),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                    Err(error) => return Err(error),
                }
            }
            Err(message) => {
                return write(stream, &to_line(&Reply::Error { message })?, Vec::new()).await;
            }
        };
        let request = match serde_json::from_slice::<Request>(&line) {
            Ok(request) => request,
            Err(error) => {
                let message = format!("not a request this version knows: {error}");
                return write(stream, &to_line(&Reply::Error { message })?, Vec::new()).await;
            }
        };
        if newcomer.take().is_some() {
            _seat = shared.seats.try_acquire().ok();
            if _seat.is_none() {
                let message = format!("the network has {CLIENTS_MAX} clients already");
                return write(stream, &to_line(&Reply::Error { message })?, Vec::new()).await;
            }
        }
        let stop = request == Request::Stop {};
        let fds = match request.takes_fds() {
            true => reader.take_fds(),
            false => Vec::new(),
        };
        let (mut reply, fds) = match stop || request == (Request::Stay {}) {
            // Whatever keeps the threads for requests busy.
            true => perform(&*shared.target, request, fds)
                .unwrap_or_else(|message| (Reply::Error { message }, Vec::new())),
            false => answer(&mut owned, request, fds).await,
        };
        if let Reply::Status(status) = &mut reply {
            status.name.clone_from(&shared.name);
            status.command = command_line();
        }
        write(stream, &to_line(&reply)?, fds).await?;
        if stop {
            (shared.on_stop)(format!("asked to by {}", client_in_words(stream)));
        }
    }
}

/// Does what a request asks, away from the server's thread.
async fn answer(owned: &mut Owned, request: Request, fds: Vec<OwnedFd>) -> (Reply, Vec<OwnedFd>) {
    let target = Arc::clone(&owned.target);
    let keeps_forward = matches!(
        request,
        Request::ForwardAdd {
            with_connection: true,
            ..
        }
    );
    let done = tokio::task::spawn_blocking(move || perform(&*target, request, fds)).await;
    let (reply, fds) = match done {
        Ok(Ok(done)) => done,
        Ok(Err(message)) => (Reply::Error { message }, Vec::new()),
        Err(_) => (
            Reply::Error {
                message: "the request failed inside lanlet".to_owned(),
            },
            Vec::new(),
        ),
    };
    if let Reply::TapPort { port, .. } | Reply::VhostUserPort { port, .. } = reply {
        owned.ports.push(PortId(port));
    }
    if let Reply::Forward(forward) = &reply
        && keeps_forward
    {
        owned.forwards.push(ForwardId(forward.id));
    }
    (reply, fds)
}

fn perform(
    target: &dyn Target,
    request: Request,
    fds: Vec<OwnedFd>,
) -> Result<(Reply, Vec<OwnedFd>), String> {
    Ok(match request {
        Request::Status {} => (Reply::Status(Box::new(target.status())), Vec::new()),
        Request::AttachVmm(_)
        | Request::AttachWire { .. }
        | Request::AttachTap(_)
        | Request::AttachVhostUser(_) => attach(target, request, fds)?,
        Request::GuestProcess { guest } => {
            (Reply::GuestProcess {}, vec![target.guest_process(&guest)?])
        }
        Request::Detach { port } => {
            if PortId(port) == PortId::GATEWAY {
                return Err("the gateway can't be detached".to_owned());
            }
            target.detach(PortId(port));
            (Reply::Done {}, Vec::new())
        }
        Request::ForwardAdd { forward, .. } => {
            let spec: ForwardSpec = forward
                .parse()
                .map_err(|error| format!("forward {forward}: {error}"))?;
            (Reply::Forward(target.add_forward(spec)?), Vec::new())
        }
        Request::ForwardList {} => {
            let forwards = target.forwards();
            (Reply::Forwards { forwards }, Vec::new())
        }
        Request::ForwardRemove { forward } => {
            target.remove_forward(target.find_forward(&forward)?);
            (Reply::Done {}, Vec::new())
        }
        Request::Policy {} => (
            Reply::Policy {
                text: target.policy(),
            },
            Vec::new(),
        ),
        Request::SetPolicy { text } => {
            target.set_policy(Some(&text))?;
            (Reply::Done {}, Vec::new())
        }
        Request::ClearPolicy {} => {
            target.set_policy(None)?;
            (Reply::Done {}, Vec::new())
        }
        Request::Stay {} => (Reply::Done {}, Vec::new()),
        Request::Stop {} => {
            let guests = target.guests();
            (Reply::Stopping { guests }, Vec::new())
        }
    })
}

/// Attaches a port of whichever kind.
fn attach(
    target: &dyn Target,
    request: Request,
    fds: Vec<OwnedFd>,
) -> Result<(Reply, Vec<OwnedFd>), String> {
    Ok(match request {
        Request::AttachVmm(port) => {
            let port = target.attach_vmm(port.options()?)?;
            let mut fds = port.fds;
            let kept = port.kept.map(|kept| {
                fds.extend(kept.queues);
                fds.push(kept.netlink);
                kept.sw_ifname
            });
            let reply = Reply::VmmPort {
                port: port.id.0,
                ifname: port.ifname,
                mac: port.mac.to_string(),
                kept,
            };
            (reply, fds)
        }
        Request::AttachWire {
            port,
            vm_ifname,
            sw_ifname,
        } => {
            let mut queues = fds;
            let netlink = queues.pop().filter(|_| !queues.is_empty());
            let wire = KeptWire {
                netlink: netlink.ok_or("the wire's descriptors did not come with the request")?,
                queues,
                vm_ifname,
                sw_ifname,
            };
            let id = target.attach_wire(wire, port.options()?)?;
            let reply = Reply::TapPort {
                port: id.0,
                address: None,
            };
            (reply, Vec::new())
        }
        Request::AttachTap(port) => {
            let options = port.options()?;
            let mut queues = fds;
            let rest = queues.split_off(queues.len().min(options.queues.max(1).into()));
            let mut rest = rest.into_iter();
            if queues.len() < options.queues.max(1).into() {
                return Err("the tap's descriptor did not come with the request".to_owned());
            }
            let tap = GuestTap {
                queues,
                netlink: rest.next(),
                process: rest.next(),
            };
            let (id, address) = target.attach_tap(tap, options)?;
            (
                Reply::TapPort {
                    port: id.0,
                    address,
                },
                Vec::new(),
            )
        }
        Request::AttachVhostUser(port) => {
            let fd = fds.into_iter().next();
            let fd = fd.ok_or("the socket's descriptor did not come with the request")?;
            let options = port.options()?;
            let socket = VhostUserSocket {
                fd,
                name: match &options.name {
                    None => "vhost-user".to_owned(),
                    Some(name) => name.to_string(),
                },
                allow_guests: false,
                file: None,
            };
            let port = target.attach_vhost_user(socket, options)?;
            let reply = Reply::VhostUserPort {
                port: port.id.0,
                mac: port.mac.to_string(),
            };
            (reply, Vec::new())
        }
        _ => return Err("this attaches nothing".to_owned()),
    })
}

async fn write(stream: &UnixStream, mut bytes: &[u8], mut fds: Vec<OwnedFd>) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        let sent = stream.try_io(Interest::WRITABLE, || {
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            send_some(stream.as_fd(), bytes, &fds)
        });
        match sent {
            Ok(sent) => {
                bytes = &bytes[sent..];
                fds.clear();
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::RuntimeDir;
    use crate::control::client::Client;
    use crate::control::tests::Scratch;
    use crate::frame::Mac;
    use crate::nat::forward::ForwardSet;
    use std::io::{BufRead, BufReader, Write};
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    /// A network that only remembers what it was asked.
    #[derive(Default)]
    struct Fake {
        taps: Mutex<Vec<PortOptions>>,
        detached: Mutex<Vec<u16>>,
        forwards: Mutex<ForwardSet>,
        policy: Mutex<Option<String>>,
    }

    impl Target for Fake {
        fn status(&self) -> Status {
            Status {
                name: "fake".to_owned(),
                ..Status::default()
            }
        }

        fn guests(&self) -> usize {
            3
        }

        fn attach_vmm(&self, options: PortOptions) -> Result<VmmPort, String> {
            if options.name == "refuse".parse().ok() {
                return Err("no more ports".to_owned());
            }
            let (fd, peer) = std::os::unix::net::UnixStream::pair().map_err(|e| e.to_string())?;
            (&peer).write_all(b"vmm").map_err(|e| e.to_string())?;
            let mac = options.mac.unwrap_or(Mac([2; 6]));
            Ok(VmmPort {
                id: PortId(1),
                fds: vec![fd.into()],
                ifname: "vm1".to_owned(),
                mac,
                kept: None,
            })
        }

        fn attach_wire(&self, _: KeptWire, _: PortOptions) -> Result<PortId, String> {
            Err("it has no wires".to_owned())
        }

        fn attach_tap(
            &self,
            tap: GuestTap,
            options: PortOptions,
        ) -> Result<(PortId, Option<GuestAddress>), String> {
            let queue = tap.queues.into_iter().next().unwrap();
            std::fs::File::from(queue)
                .write_all(b"tap")
                .map_err(|e| e.to_string())?;
            let mut taps = self.taps.lock().unwrap();
            taps.push(options);
            let address = GuestAddress {
                address: [10, 0, 0, 2].into(),
                prefix: 24,
                gateway: [10, 0, 0, 1].into(),
                mtu: 1500,
                domain: None,
                v6: None,
            };
            Ok((PortId(taps.len() as u16 + 1), Some(address)))
        }

        fn attach_vhost_user(
            &self,
            socket: VhostUserSocket,
            options: PortOptions,
        ) -> Result<VhostUserPort, String> {
            crate::uplink::listen::check_listening(&socket.fd).map_err(|e| e.to_string())?;
            Ok(VhostUserPort {
                id: PortId(40),
                mac: options.mac.unwrap_or(Mac([2; 6])),
            })
        }

        fn guest_process(&self, guest: &str) -> Result<OwnedFd, String> {
            Err(format!("no guest {guest}"))
        }

        fn detach(&self, port: PortId) {
            self.detached.lock().unwrap().push(port.0);
        }

        fn add_forward(&self, forward: ForwardSpec) -> Result<ForwardStatus, String> {
            let mut forwards = self.forwards.lock().unwrap();
            let text = forward.to_string();
            let id = forwards.add(forward).map_err(|error| error.to_string())?;
            Ok(ForwardStatus {
                id: id.0,
                forward: text,
                ..ForwardStatus::default()
            })
        }

        fn forwards(&self) -> Vec<ForwardStatus> {
            let forwards = self.forwards.lock().unwrap();
            let status = |(id, spec): (ForwardId, &ForwardSpec)| ForwardStatus {
                id: id.0,
                forward: spec.to_string(),
                ..ForwardStatus::default()
            };
            forwards.iter().map(status).collect()
        }

        fn find_forward(&self, words: &str) -> Result<ForwardId, String> {
            let found = self.forwards.lock().unwrap().find(words);
            found.ok_or_else(|| format!("no forward {words}"))
        }

        fn remove_forward(&self, id: ForwardId) {
            self.forwards.lock().unwrap().remove(id);
        }

        fn policy(&self) -> Option<String> {
            self.policy.lock().unwrap().clone()
        }

        fn set_policy(&self, text: Option<&str>) -> Result<(), String> {
            if text == Some("bad") {
                return Err("line 1: bad: is no rule".to_owned());
            }
            *self.policy.lock().unwrap() = text.map(str::to_owned);
            Ok(())
        }
    }

    fn start(label: &str) -> (Scratch, RuntimeDir, Arc<Fake>, Arc<AtomicUsize>, Server) {
        let scratch = Scratch::new(label);
        let dir = RuntimeDir::at(&scratch.0);
        let (fake, stops) = (Arc::new(Fake::default()), Arc::new(AtomicUsize::new(0)));
        let stopped = Arc::clone(&stops);
        let server = Server::start(
            "n",
            dir.claim("n").unwrap(),
            Arc::clone(&fake) as _,
            move |_| {
                stopped.fetch_add(1, SeqCst);
            },
        );
        (scratch, dir, fake, stops, server.unwrap())
    }

    #[test]
    fn requests_reach_the_network_and_descriptors_pass_both_ways() {
        let (_scratch, dir, fake, stops, server) = start("server");
        let mut client = Client::connect(&dir, "n").unwrap().unwrap();
        assert_eq!(client.pid(), std::process::id());
        let status = client.status().unwrap();
        assert_eq!(status.name, "n", "as it is called at this socket");
        assert!(status.command.starts_with("lanlet"), "{}", status.command);

        let options = PortOptions {
            mac: Some(Mac([2, 0, 0, 0, 0, 9])),
            ..PortOptions::default()
        };
        let port = client.attach_vmm(&options).unwrap();
        assert_eq!((port.id, port.mac), (PortId(1), Mac([2, 0, 0, 0, 0, 9])));
        let mut text = String::new();
        let queue = port.fds.into_iter().next().unwrap();
        io::Read::read_to_string(&mut std::fs::File::from(queue), &mut text).unwrap();
        assert_eq!(text, "vmm");

        let (tap, mut peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let (id, address) = client
            .attach_tap(
                &GuestTap {
                    queues: vec![tap.into()],
                    netlink: None,
                    process: None,
                },
                &options,
            )
            .unwrap();
        io::Read::read_to_string(&mut peer, &mut text).unwrap();
        assert_eq!((id, text.as_str()), (PortId(2), "vmmtap"));
        assert_eq!(address.unwrap().prefix, 24);

        let refused = client.attach_vmm(&PortOptions {
            name: "refuse".parse().ok(),
            ..options
        });
        assert_eq!(refused.unwrap_err().to_string(), "no more ports");
        assert!(client.detach(PortId::GATEWAY).is_err());

        assert_eq!(client.policy().unwrap(), None);
        let longest = "\n".repeat(crate::nat::policy::parse::TEXT_LEN_MAX);
        client.set_policy(Some(longest.clone())).unwrap();
        assert_eq!(client.policy().unwrap(), Some(longest));
        let refused = client.set_policy(Some("bad".to_owned()));
        assert!(refused.unwrap_err().to_string().contains("line 1: bad"));
        client.set_policy(None).unwrap();
        assert_eq!(client.policy().unwrap(), None);
        client.stop().unwrap();
        drop(client);
        drop(server);
        assert_eq!(stops.load(SeqCst), 1);
        assert_eq!(
            *fake.detached.lock().unwrap(),
            [2],
            "the tap's port ends with its connection"
        );
        assert!(Client::connect(&dir, "n").unwrap().is_none());
    }

    #[test]
    fn a_vhost_user_sockets_port_ends_with_its_connection() {
        let (scratch, dir, fake, _, _server) = start("vhost");
        let options = PortOptions {
            mac: Some(Mac([2, 0, 0, 0, 0, 9])),
            ..PortOptions::default()
        };
        let mut client = Client::connect(&dir, "n").unwrap().unwrap();
        let path = dir.path().join("guest.sock");
        let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
        let port = client
            .attach_vhost_user(listener.as_fd(), &options)
            .unwrap();
        assert_eq!(port.id, PortId(40));
        assert_eq!(Some(port.mac), options.mac);
        let (stream, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let refused = client.attach_vhost_user(stream.as_fd(), &options);
        assert!(refused.unwrap_err().to_string().contains("listening"));
        drop(client);
        let begun = std::time::Instant::now();
        while *fake.detached.lock().unwrap() != [40] {
            assert!(begun.elapsed() < Duration::from_secs(5));
            std::thread::sleep(Duration::from_millis(2));
        }
        drop(scratch);
    }

    #[test]
    fn forwards_are_added_listed_and_removed_and_some_go_with_their_connection() {
        let (_scratch, dir, fake, _, _server) = start("forwards");
        let connect = || Client::connect(&dir, "n").unwrap().unwrap();
        let spec = |text: &str| text.parse::<ForwardSpec>().unwrap();
        let mut client = connect();
        let kept = client.add_forward(&spec("8080:web:80,name=site"), false);
        assert_eq!(kept.unwrap().id, 1);
        let own = client.add_forward(&spec("127.0.0.1:53:web:53/udp"), true);
        assert_eq!(own.unwrap().id, 2);
        let refused = client.add_forward(&spec("8080:db:80"), true).unwrap_err();
        assert!(
            refused.to_string().contains("taken by forward 1"),
            "{refused}"
        );
        let listed = client.forwards().unwrap();
        let texts: Vec<_> = listed.iter().map(|forward| &*forward.forward).collect();
        assert_eq!(
            texts,
            ["8080:web:80/tcp,name=site", "127.0.0.1:53:web:53/udp"]
        );
        drop(client);

        let mut client = connect();
        for _ in 0..100 {
            if fake.forwards().len() == 1 {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(client.forwards().unwrap()[0].id, 1, "only that one stays");
        assert!(client.remove_forward("nope").is_err());
        client.remove_forward("site").unwrap();
        assert!(client.forwards().unwrap().is_empty());
    }

    #[test]
    fn nonsense_is_answered_once_and_cut_off() {
        let (_scratch, dir, fake, _, _server) = start("nonsense");
        for bad in [
            b"hello\n".to_vec(),
            vec![b'x'; REQUEST_BYTES_MAX + 1],
            b"\xff\n".to_vec(),
        ] {
            let mut stream =
                std::os::unix::net::UnixStream::connect(dir.socket("n").unwrap()).unwrap();
            stream.write_all(&bad).unwrap();
            let lines: Vec<String> = BufReader::new(stream)
                .lines()
                .map_while(Result::ok)
                .collect();
            assert_eq!(lines.len(), 2, "{lines:?}");
            assert!(
                lines[0].contains(&format!(r#""lanlet":{PROTOCOL}"#)) && lines[1].contains("error"),
                "{lines:?}"
            );
        }
        let mut client = Client::connect(&dir, "n").unwrap().unwrap();
        assert!(client.status().is_ok());
        assert!(fake.taps.lock().unwrap().is_empty());
    }

    #[test]
    fn a_tap_without_descriptor_is_refused() {
        let (_scratch, dir, _, _, _server) = start("nofd");
        let mut stream = std::os::unix::net::UnixStream::connect(dir.socket("n").unwrap()).unwrap();
        stream.write_all(b"{\"request\":\"attach_tap\"}\n").unwrap();
        let mut lines = BufReader::new(&stream).lines();
        lines.next().unwrap().unwrap();
        let reply = lines.next().unwrap().unwrap();
        assert!(reply.contains("descriptor did not come"), "{reply}");
    }
}
