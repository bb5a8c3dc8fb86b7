//! The network that a command uses: one that runs already, or one of its own.

use std::hash::{BuildHasher, RandomState};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::Signal;

use clap::Args;

use super::attachment::Attachment;
use super::find::{self, not_running};
use super::forward::ForwardFlags;
use super::options::{NameOption, NetworkOptions, parse_name};
use super::signals::{Signals, WISHES};
use super::{Failure, child, complete};
use crate::config::{self, NAME_DEFAULT, NetworkConfig};
use crate::control::RuntimeDir;
use crate::control::client::Client;
use crate::control::server::Server;
use crate::frame::{Mac, PortId};
use crate::nat::forward::{ForwardId, Guest};
use crate::network::{
    GuestAddress, GuestTap, Network, PortOptions, VhostUserPort, VhostUserSocket, VmmPort,
};

/// How long a network waits for its last bytes to be taken, after the command it was for has ended.
/// Takes milliseconds unless the outside reads slowly, or somebody the command left behind holds a
/// connection open.
const DRAIN_MAX: Duration = Duration::from_secs(2);
/// A VMM's tap that is open longer than this after the VMM's end is held by somebody: the kernel takes 20 ms
/// to take one down, on a loaded machine some hundreds.
const LATE_CLOSE: Duration = Duration::from_secs(1);
/// Pause between two looks at a tap that is about to close.
const CLOSE_POLL: Duration = Duration::from_millis(10);
/// Pause between two looks at one that may stay open for days.
const TAP_POLL: Duration = Duration::from_millis(500);

/// A network to attach to.
pub(super) enum Lan {
    /// It runs in this process and ends with it. Its name is the process's, so that two commands never get
    /// into each other's way.
    Embedded {
        /// Its control socket, by which it is looked at; closed before the network ends.
        server: Option<Server>,
        /// The network.
        network: Arc<Network>,
    },
    /// Another process runs it.
    Running(Box<Attachment>),
}

/// Which network a command's guest is on.
#[derive(Args, Debug)]
pub(super) struct LanFlags {
    /// Network to attach to, which has to be running [default: 'default' if that is running, else a
    /// private one that ends with the command]
    #[arg(long, value_name = "NAME", value_parser = parse_name, add = complete::networks())]
    name: Option<String>,

    /// Wait so long, like 10s, for the network to come up: the one of --name, else 'default'
    #[arg(long, value_name = "TIME", value_parser = config::parse_duration)]
    wait: Option<Duration>,

    /// A private network, even if 'default' is running
    #[arg(long, conflicts_with_all = ["name", "wait"])]
    private: bool,
}

impl LanFlags {
    /// How another command is told of the network: ` --name NAME`, or nothing.
    pub(super) fn words(&self) -> String {
        let name = self.name.as_ref();
        name.map_or(String::new(), |name| format!(" --name {name}"))
    }

    /// The network that runs already and is meant: the one of --name, else `default`, else the only one.
    ///
    /// # Errors
    /// There is none, or more than one may be meant.
    pub(super) fn running(&self) -> Result<Client, Failure> {
        find::connect(&NameOption::new(self.name.clone()))
    }

    /// The running network to attach to; `None`: the command has a private one.
    ///
    /// # Errors
    /// The network that is wanted is not running.
    fn connect(&self) -> Result<Option<Client>, Failure> {
        if self.private {
            return Ok(None);
        }
        let dir = RuntimeDir::from_env();
        let name = self.name.as_deref().unwrap_or(NAME_DEFAULT);
        let client = match self.wait {
            Some(time) => Client::connect_by(&dir, name, Instant::now() + time)?,
            None => Client::connect(&dir, name)?,
        };
        match client {
            None if self.name.is_some() || self.wait.is_some() => {
                Err(not_running(&dir, name).into())
            }
            client => Ok(client),
        }
    }
}

impl Lan {
    /// The network to attach to, or a private one as the options say, named after the command `kind`.
    ///
    /// # Errors
    /// The options are wrong, or are for a network that runs already; or it can't be started.
    pub(super) fn open(
        kind: &str,
        flags: &LanFlags,
        options: &NetworkOptions,
    ) -> Result<Self, Failure> {
        let Some(client) = flags.connect()? else {
            return Self::private(kind, options.resolve(NAME_DEFAULT, None)?);
        };
        if let Some(option) = options.first_given() {
            return Err(Failure::because(format!(
                "network '{}' is already running (pid {}), and {option} is for one that starts: leave it \
                 out, or ask for another network with --private",
                client.name(),
                client.pid()
            )));
        }
        if flags.name.is_none() {
            log::info!("on network '{}' (pid {})", client.name(), client.pid());
        }
        let attachment = Attachment::new(client, RuntimeDir::from_env());
        Ok(Lan::Running(Box::new(attachment)))
    }

    /// A network of this process.
    fn private(kind: &str, config: NetworkConfig) -> Result<Self, Failure> {
        child::raise_open_files();
        let subnet = config.subnet();
        let network = Arc::new(Network::start(config)?);
        let claimed = RuntimeDir::from_env().claim_private(kind);
        let served = claimed.map_err(Failure::from).and_then(|(name, claim)| {
            // Asked to end, it does so with its command.
            let on_stop = |reason: String| {
                log::info!("ending: {reason}");
                let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::TERM);
            };
            let target = Arc::clone(&network) as _;
            let server = Server::start(&name, claim, target, on_stop)?;
            Ok((name, server))
        });
        let (name, server) = match served {
            Ok((name, server)) => (format!(" '{name}'"), Some(server)),
            // The command does not need it.
            Err(error) => {
                log::info!("'lanlet list' will not show this network: {error}");
                (String::new(), None)
            }
        };
        log::info!(
            "on a private network{name}, {subnet}, which ends with this command ('lanlet up -d' starts one \
             to share)"
        );
        Ok(Lan::Embedded { server, network })
    }

    /// Makes a tap for a VMM.
    ///
    /// # Errors
    /// What is missing, with the remedy.
    pub(super) fn attach_vmm(&mut self, options: PortOptions) -> Result<VmmPort, Failure> {
        Ok(match self {
            Lan::Embedded { network, .. } => network.attach_vmm(options)?,
            Lan::Running(attachment) => attachment.attach_vmm(options)?,
        })
    }

    /// Attaches a socket for vhost-user front-ends. The port and the socket's file live as long as this value.
    ///
    /// # Errors
    /// What is missing, with the remedy.
    pub(super) fn attach_vhost_user(
        &mut self,
        socket: VhostUserSocket,
        options: PortOptions,
    ) -> Result<VhostUserPort, Failure> {
        Ok(match self {
            Lan::Embedded { network, .. } => network.attach_vhost_user(socket, options)?,
            Lan::Running(attachment) => attachment.attach_vhost_user(socket, options)?,
        })
    }

    /// A MAC address for a guest. For a network of another process a random one: of the 2^24 in
    /// QEMU's range two of a few hundred guests' are hardly ever the same.
    pub(super) fn make_mac(&self) -> Mac {
        match self {
            Lan::Embedded { network, .. } => network.make_mac(),
            Lan::Running(_) => {
                let [a, b, c, ..] = RandomState::new()
                    .hash_one(std::process::id())
                    .to_le_bytes();
                Mac([0x52, 0x54, 0x00, a, b, c])
            }
        }
    }

    /// Attaches a namespace guest's tap. The port lives as long as this value.
    ///
    /// # Errors
    /// What is missing, with the remedy.
    pub(super) fn attach_tap(
        &mut self,
        tap: GuestTap,
        options: PortOptions,
    ) -> Result<(PortId, Option<GuestAddress>), Failure> {
        Ok(match self {
            Lan::Embedded { network, .. } => network.attach_tap(tap, options)?,
            Lan::Running(attachment) => attachment.attach_tap(tap, options)?,
        })
    }

    /// Makes the forwards that a command asks for, which end with it. `own` is the guest that they mean
    /// where they name none.
    ///
    /// # Errors
    /// One of them is wrong, or can't be had.
    pub(super) fn add_forwards(&mut self, flags: &ForwardFlags, own: Mac) -> Result<(), Failure> {
        for spec in flags.specs() {
            let spec = spec.clone().for_guest(Guest::Mac(own));
            let added = match self {
                Lan::Embedded { network, .. } => network.add_forward(spec)?,
                Lan::Running(attachment) => attachment.add_forward(spec)?,
            };
            log::info!("forward {}: {}", added.id, added.forward);
        }
        Ok(())
    }

    /// Waits until the port of a VMM is gone, where something that the VMM needs would end with this process:
    /// its network, or forwards. A signal ends the wait.
    ///
    /// # Errors
    /// A system call failed.
    pub(super) fn wait_for_port(&mut self, port: PortId, signals: &Signals) -> Result<(), Failure> {
        let received = signals.running();
        let begun = Instant::now();
        let mut told = false;
        while self.is_needed_by(port) {
            let late = begun.elapsed() > LATE_CLOSE;
            if late && !std::mem::replace(&mut told, true) {
                log::info!(
                    "the command has ended and its tap is still open: the network stays until that is closed"
                );
            }
            let pause = if late { TAP_POLL } else { CLOSE_POLL };
            let mut fds = [PollFd::from_borrowed_fd(received.as_fd(), PollFlags::IN)];
            let timeout = Timespec::try_from(pause).ok();
            let polled = rustix::event::poll(&mut fds, timeout.as_ref());
            if polled.is_ok_and(|ready| ready > 0)
                && let Some(received) = received.next()?
                && WISHES.contains(&received.signal)
            {
                log::info!("the network ends by {received}");
                break;
            }
        }
        signals.ending(0);
        Ok(())
    }

    fn is_needed_by(&mut self, port: PortId) -> bool {
        match self {
            Lan::Embedded { network, .. } => network.has_port(port),
            Lan::Running(attachment) => attachment.is_needed_by(port),
        }
    }

    /// Before a network of this process ends: lets the connections that the command has closed deliver
    /// what they still hold.
    pub(super) fn drain(&mut self) {
        if let Lan::Embedded { server, network } = self {
            server.take();
            // Forwards before ports, so that no connection arrives for a guest that is gone.
            for forward in network.forwards() {
                network.remove_forward(ForwardId(forward.id));
            }
            network.drain(DRAIN_MAX);
        }
    }

    /// The connection to a network of another process, which may end and come back.
    pub(super) fn attachment(&mut self) -> Option<&mut Attachment> {
        match self {
            Lan::Embedded { .. } => None,
            Lan::Running(attachment) => Some(attachment),
        }
    }
}
