//! `lanlet run`: a command with a tap.

use std::ffi::OsString;
use std::os::fd::AsRawFd;
use std::process::ExitCode;

use super::forward::ForwardFlags;
use super::lan::{Lan, LanFlags};
use super::options::{NetworkOptions, PortFlags, VmmFlags};
use super::signals::Signals;
use super::{Failure, child, complete, replace_in};
use crate::frame::Mac;
use crate::network::{PortOptions, VhostUserSocket, VmmPort};

/// Run a VMM (or any command) with a tap of the network as an inherited descriptor
///
/// In CMD's arguments {fd} becomes the descriptor's number, {ifname} the tap's name and {mac} the
/// guest's MAC address; LANLET_FD, LANLET_IFNAME and LANLET_MAC say the same in its environment. With
/// --queues {fds} becomes the numbers of all queues' descriptors with colons between, as QEMU wants
/// them, and so is LANLET_FDS; {fd} is the first. The tap is one with virtio-net headers
/// (IFF_VNET_HDR), as QEMU, Cloud Hypervisor and crosvm want it. The port goes when CMD closes the tap:
/// lanlet waits for that where CMD has put itself into the background, and with it a network or forwards
/// that would end with lanlet. A network that ends and is started again gets its port back.
///
/// With --vhost-user there is no tap: {socket}, in the environment LANLET_SOCKET, is the path of a unix
/// socket that CMD connects to as a vhost-user front-end, as often as it likes, with as many queues as its
/// own arguments say, 8 at most; the port goes when CMD ends.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet run qemu-system-x86_64 -netdev tap,id=n,fd={fd} \\
                -device virtio-net-pci,netdev=n,mac={mac} -m 1G disk.img
  lanlet run cloud-hypervisor --net fd={fd},mac={mac} --kernel vmlinuz --disk path=disk.img
  lanlet run --vhost-user cloud-hypervisor --memory size=1G,shared=on \
                --net vhost_user=true,socket={socket},mac={mac} --kernel vmlinuz
  lanlet run --subnet 10.9.0.0/24 sh -c 'exec crosvm run --net tap-fd=$LANLET_FD vmlinuz'")]
pub(super) struct Args {
    #[command(flatten)]
    lan: LanFlags,
    #[command(flatten)]
    port: PortFlags,
    #[command(flatten)]
    vmm: VmmFlags,
    #[command(flatten)]
    forwards: ForwardFlags,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, required = true, value_name = "CMD", add = complete::command())]
    command: Vec<OsString>,
    #[command(flatten)]
    network: NetworkOptions,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, Failure> {
    let signals = child::block_signals()?;
    let lan = Lan::open("run", &args.lan, &args.network)?;
    let flags = (&args.port, None, &args.vmm, &args.forwards);
    with_link(lan, &signals, flags, |link| {
        let fill = |argument: &OsString| {
            let names = link.names();
            let begin = argument.clone();
            names.into_iter().fold(begin, |argument, (name, value)| {
                replace_in(&argument, &format!("{{{name}}}"), value)
            })
        };
        Ok(args.command.iter().map(fill).collect())
    })
}

/// How a VMM reaches the network, as its command line has to say it.
pub(super) struct Link {
    /// The guest's MAC.
    pub(super) mac: String,
    /// By what.
    pub(super) by: By,
}

/// What a VMM opens.
pub(super) enum By {
    /// A tap.
    Tap {
        /// Number of the inherited descriptor, the first of them.
        fd: String,
        /// All of them, with colons between.
        fds: String,
        /// How many queues it has.
        queues: usize,
        /// Name of the device in lanlet's namespace.
        ifname: String,
    },
    /// A vhost-user socket.
    VhostUser {
        /// Its path.
        socket: String,
        /// How many queues the guest's card is to have.
        queues: u16,
    },
}

impl Link {
    /// By the tap of a port whose descriptors keep their numbers in the command.
    pub(super) fn of_tap(port: &VmmPort) -> Self {
        let numbers = port.fds.iter().map(|fd| fd.as_raw_fd().to_string());
        let numbers: Vec<_> = numbers.collect();
        Self {
            mac: port.mac.to_string(),
            by: By::Tap {
                fd: numbers.first().cloned().unwrap_or_default(),
                fds: numbers.join(":"),
                queues: numbers.len(),
                ifname: port.ifname.clone(),
            },
        }
    }

    /// What can be said in a command, by the name it has there.
    fn names(&self) -> Vec<(&'static str, &str)> {
        let mut names: Vec<(_, &str)> = vec![("mac", &self.mac)];
        match &self.by {
            By::Tap {
                fd, fds, ifname, ..
            } => names.extend([("fd", fd.as_str()), ("fds", fds), ("ifname", ifname)]),
            By::VhostUser { socket, .. } => names.push(("socket", socket)),
        }
        names
    }

    fn environment(&self) -> impl Iterator<Item = (String, &str)> {
        let names = self.names().into_iter();
        names.map(|(name, value)| (format!("LANLET_{}", name.to_uppercase()), value))
    }
}

/// Attaches a port, runs the command that `command` makes of it, and waits for its end.
pub(super) fn with_link(
    mut lan: Lan,
    signals: &Signals,
    (port, own_mac, vmm, forwards): (&PortFlags, Option<Mac>, &VmmFlags, &ForwardFlags),
    command: impl FnOnce(&Link) -> Result<Vec<OsString>, Failure>,
) -> Result<ExitCode, Failure> {
    let options = PortOptions {
        usual_mac: own_mac,
        ..port.port(port.mac)
    };
    if let Some(socket) = vmm.vhost_user(port.queues())? {
        return with_socket(lan, signals, (options, socket, forwards), command);
    }
    let port = lan.attach_vmm(options)?;
    note_other_mac(own_mac, port.mac);
    lan.add_forwards(forwards, port.mac)?;
    let link = Link::of_tap(&port);
    let child = child::with_fds(&command(&link)?, &port.fds)?
        .envs(link.environment())
        .spawn()
        .map_err(Failure::io("cannot start a process"))?;
    // The command has the only copies: when it goes, so does the port.
    drop(port.fds);
    let ended = child::supervise(child, signals, lan.attachment())?;
    if ended == ExitCode::SUCCESS {
        // A VMM that has put itself into the background still has the tap.
        lan.wait_for_port(port.id, signals)?;
    }
    Ok(ended)
}

/// Says so where a guest does not have the MAC that it has as a rule: its address is then another one too.
fn note_other_mac(usual: Option<Mac>, mac: Mac) {
    if let Some(usual) = usual.filter(|&usual| usual != mac) {
        log::info!(
            "a guest with the MAC {usual} runs already: this one has {mac}, and another address"
        );
    }
}

fn with_socket(
    mut lan: Lan,
    signals: &Signals,
    (options, socket, forwards): (PortOptions, VhostUserSocket, &ForwardFlags),
    command: impl FnOnce(&Link) -> Result<Vec<OsString>, Failure>,
) -> Result<ExitCode, Failure> {
    let path = socket.name.clone();
    let port = lan.attach_vhost_user(socket, options.clone())?;
    note_other_mac(
        options.usual_mac.filter(|_| options.mac.is_none()),
        port.mac,
    );
    lan.add_forwards(forwards, port.mac)?;
    let link = Link {
        mac: port.mac.to_string(),
        by: By::VhostUser {
            socket: path,
            queues: options.queues,
        },
    };
    let child = child::init_command()
        .args(command(&link)?)
        .envs(link.environment())
        .spawn()
        .map_err(Failure::io("cannot start a process"))?;
    child::supervise(child, signals, lan.attachment())
}
