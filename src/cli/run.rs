//! `lanlet run`: a command with a tap.

use std::ffi::OsString;
use std::os::fd::AsRawFd;
use std::process::ExitCode;

use super::forward::ForwardFlags;
use super::lan::Lan;
use super::options::{NameOption, NetworkOptions, PortFlags};
use super::{Failure, child, replace_in};
use crate::network::VmmPort;
use crate::sys::signal::SignalFd;

/// Run a VMM (or any command) with a tap of the network as an inherited descriptor
///
/// In CMD's arguments {fd} becomes the descriptor's number, {ifname} the tap's name and {mac} the
/// guest's MAC address; LANLET_FD, LANLET_IFNAME and LANLET_MAC say the same in its environment. With
/// --queues {fds} becomes the numbers of all queues' descriptors with colons between, as QEMU wants
/// them, and so is LANLET_FDS; {fd} is the first. The tap is one with virtio-net headers (IFF_VNET_HDR), as QEMU, Cloud Hypervisor and crosvm want it.
/// The port goes when CMD closes the tap.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  lanlet run -- qemu-system-x86_64 -netdev tap,id=n,fd={fd} \\
                -device virtio-net-pci,netdev=n,mac={mac} -m 1G disk.img
  lanlet run -- cloud-hypervisor --net fd={fd},mac={mac} --kernel vmlinuz --disk path=disk.img
  lanlet run --subnet 10.9.0.0/24 -- sh -c 'exec crosvm run --net tap-fd=$LANLET_FD vmlinuz'")]
pub(super) struct Args {
    #[command(flatten)]
    name: NameOption,
    #[command(flatten)]
    port: PortFlags,
    #[command(flatten)]
    forwards: ForwardFlags,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
    #[command(flatten)]
    network: NetworkOptions,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, Failure> {
    let signals = child::block_signals()?;
    let lan = Lan::open(&args.name, &args.network)?;
    with_tap(lan, &signals, (&args.port, &args.forwards), |tap| {
        let fill = |argument: &OsString| {
            let argument = replace_in(argument, "{fd}", &tap.fd);
            let argument = replace_in(&argument, "{fds}", &tap.fds);
            let argument = replace_in(&argument, "{ifname}", &tap.ifname);
            replace_in(&argument, "{mac}", &tap.mac)
        };
        args.command.iter().map(fill).collect()
    })
}

/// A tap as its user has to know it.
pub(super) struct Tap {
    /// Number of the inherited descriptor, the first of them.
    pub(super) fd: String,
    /// All of them, with colons between.
    pub(super) fds: String,
    /// How many queues it has.
    pub(super) queues: usize,
    /// Name of the device in lanlet's namespace.
    pub(super) ifname: String,
    /// The guest's MAC.
    pub(super) mac: String,
}

impl Tap {
    /// Of a port whose descriptor keeps its number in the command.
    pub(super) fn of(port: &VmmPort) -> Self {
        let numbers = port.fds.iter().map(|fd| fd.as_raw_fd().to_string());
        let numbers: Vec<_> = numbers.collect();
        Self {
            fd: numbers.first().cloned().unwrap_or_default(),
            fds: numbers.join(":"),
            queues: numbers.len(),
            ifname: port.ifname.clone(),
            mac: port.mac.to_string(),
        }
    }
}

/// Attaches a tap, runs the command that `command` makes of it, and waits for its end.
pub(super) fn with_tap(
    mut lan: Lan,
    signals: &SignalFd,
    (flags, forwards): (&PortFlags, &ForwardFlags),
    command: impl FnOnce(&Tap) -> Vec<OsString>,
) -> Result<ExitCode, Failure> {
    let port = lan.attach_vmm(flags.port(flags.mac))?;
    lan.add_forwards(forwards, port.mac)?;
    let tap = Tap::of(&port);
    let environment = [
        ("LANLET_FD", tap.fd.clone()),
        ("LANLET_FDS", tap.fds.clone()),
        ("LANLET_IFNAME", tap.ifname.clone()),
        ("LANLET_MAC", tap.mac.clone()),
    ];
    let child = child::with_fds(&command(&tap), &port.fds)?
        .envs(environment)
        .spawn()
        .map_err(Failure::io("cannot start a process"))?;
    // The command has the only copies: when it goes, so does the port.
    drop(port.fds);
    child::supervise(child, signals, lan.gone())
}
