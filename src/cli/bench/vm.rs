//! QEMU guests as an end of a way: the image of lab/guest-image, with this program in it as the load
//! generators. They are asked over the guest's serial line, which is QEMU's standard input and output.
//!
//! The processor is emulated (TCG), with KVM or without: so the figures of two machines are of one kind.

mod initrd;

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use self::initrd::AGENT;
use super::agent::{Agent, POLL, Process};
use super::control::Plan;
use super::network::Network;
use super::way::{self, BRIDGE, BRIDGE_GATEWAY, Ends, Way, bridge_guest};
use super::world::{OUTSIDE, SERVER, World, installed, ip};

/// What a guest image has.
pub(super) const KERNEL: &str = "vmlinuz";
pub(super) const INITRD: &str = "initrd.gz";
/// How long a guest may take to boot and to have its address: 3 s on an idle machine.
const BOOT_TIME_MAX: Duration = Duration::from_secs(40);
/// How long what a VM is attached to may take to be there.
const READY_TIME_MAX: Duration = Duration::from_secs(5);
/// The VMs' taps on the bridge: a number follows.
const TAP: &str = "br0vm";

/// Boots guests on a way and waits until each has an address. `image`: the directory of [`KERNEL`] and
/// [`INITRD`].
///
/// # Errors
/// What is missing, or went wrong.
pub(super) fn start(
    way: Way,
    world: &World,
    plan: &Plan,
    image: &Path,
    guests: u8,
) -> Result<Ends, String> {
    let name = format!("{}-vm", way.name());
    let machine = Machine::new(world, image)?;
    let (mut network, mut processes) = (None, Vec::new());
    if way.is_lanlet() {
        let program = way.program(world, plan)?;
        network = Some(Network::up(world, &name, program, &way.options(plan))?);
    }
    let mut boot = |number| {
        let log = world.log(&format!("{name}-{number}"));
        match (&network, way) {
            (Some(network), _) => {
                let mut command = network.command(world, "qemu");
                command.args((way == Way::VhostUser).then_some("--vhost-user"));
                command.arg("--qemu").arg(&machine.qemu).arg("--");
                command.args(machine.without_card("dhcp", ""));
                Agent::spawn(command, log)
            }
            (None, Way::Kernel) => bridged(world, &machine, number, log),
            (None, Way::Pasta | Way::PastaLarge) => {
                let socket = passt(world, &name, way.mtu(), &mut processes)?;
                let socket = socket.display();
                let netdev = format!("stream,id=n,server=off,addr.type=unix,addr.path={socket}");
                machine.spawn(world, machine.words(&netdev, "dhcp", "", number), log)
            }
            (None, Way::Qemu) => {
                machine.spawn(world, machine.words("user,id=n", "dhcp", "", number), log)
            }
            _ => Err("no VM goes this way".to_owned()),
        }
    };
    let guest = boot(0)?;
    let others = (1..guests).map(boot).collect::<Result<Vec<_>, _>>()?;
    let outside = world.agent_at(&["--net", OUTSIDE]);
    let outside = Agent::spawn(outside, world.log(&format!("{name}-outside")))?;
    let mut ends = Ends {
        network,
        processes,
        ..Ends::new(guest, outside, SERVER)
    };
    let mut ready = is_up(&mut ends.guest).map(drop);
    for mut other in others {
        let address = is_up(&mut other);
        ready = ready.and(address.map(|address| ends.others.push((other, address))));
    }
    if let Err(error) = ready {
        // What the guests' network said is nearer to the cause.
        ends.check()?;
        return Err(format!("a guest does not come up: {error}"));
    }
    Ok(ends)
}

/// Waits for a guest that boots; its address.
fn is_up(guest: &mut Agent) -> Result<IpAddr, String> {
    guest.wait_until_ready(BOOT_TIME_MAX)?;
    guest.wait_for_route(SERVER)
}

/// A guest on the kernel's bridge.
fn bridged(world: &World, machine: &Machine, number: u8, log: PathBuf) -> Result<Agent, String> {
    let tap = format!("{TAP}{number}");
    let mut command = world.at(&["--user", "--tap", &tap, "--vnet"]);
    let network = format!(
        "ip address add {}/24 dev eth0; ip route add default via {BRIDGE_GATEWAY}",
        bridge_guest(way::GUESTS + number)
    );
    command.arg(&machine.qemu);
    command.args(machine.words("tap,id=n,fd={fd}", "up", &network, number));
    let guest = Agent::spawn(command, log)?;
    until(|| ip(None, &format!("link set {tap} master {BRIDGE} up")))?;
    Ok(guest)
}

fn until(mut try_it: impl FnMut() -> Result<(), String>) -> Result<(), String> {
    let begun = Instant::now();
    while let Err(error) = try_it() {
        if begun.elapsed() > READY_TIME_MAX {
            return Err(error);
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// passt for one VM; the socket that QEMU connects to.
fn passt(
    world: &World,
    name: &str,
    mtu: u32,
    processes: &mut Vec<Process>,
) -> Result<PathBuf, String> {
    let socket = world.private_dir(name)?.join("passt.sock");
    // One that was left behind is in the way.
    let _ = std::fs::remove_file(&socket);
    let mut command = world.at(&["--user"]);
    command
        .arg(installed("passt")?)
        .args(["--foreground", "--quiet", "--stderr", "-4"])
        .args(["--mtu", &mtu.to_string(), "--socket"])
        .arg(&socket);
    let mut process = Process::spawn_mute(command, world.log(name))?;
    until(|| match socket.exists() {
        true => Ok(()),
        false => process.check().and(Err("it has no socket".to_owned())),
    })?;
    processes.push(process);
    Ok(socket)
}

/// What is the same on all ways.
struct Machine {
    qemu: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
}

impl Machine {
    fn new(world: &World, image: &Path) -> Result<Self, String> {
        Ok(Self {
            qemu: installed("qemu-system-x86_64")?,
            kernel: image.join(KERNEL),
            initrd: initrd::with_agent(world, &image.join(INITRD))?,
        })
    }

    /// A QEMU below the world's root, with a network card.
    fn spawn(&self, world: &World, words: Vec<OsString>, log: PathBuf) -> Result<Agent, String> {
        let mut command: Command = world.at(&["--user"]);
        command.arg(&self.qemu).args(words);
        Agent::spawn(command, log)
    }

    /// QEMU's options. `network`: how the guest comes to an address, `dhcp` or `up`; `more`: what its
    /// script does before.
    fn without_card(&self, network: &str, more: &str) -> Vec<OsString> {
        let append = format!("console=ttyS0 quiet loglevel=0 panic=-1 lanlet.net={network}");
        // The answer comes when the serial line is listened to.
        let script = format!("{more}\nstty raw -echo\necho '\"Ready\"'\nexec {AGENT}");
        // QEMU reads a comma in an option's value where there are two.
        let script = script.replace(',', ",,");
        let options = ["-accel", "tcg", "-cpu", "max", "-m", "256", "-no-reboot"];
        let console = ["-display", "none", "-monitor", "none"];
        let serial = ["-chardev", "stdio,id=s,signal=off", "-serial", "chardev:s"];
        let rom = ["-global", "virtio-net-pci.romfile="];
        let fixed = options.iter().chain(&console).chain(&serial).chain(&rom);
        let mut words: Vec<OsString> = fixed.map(Into::into).collect();
        words.extend(["-kernel".into(), self.kernel.clone().into()]);
        words.extend(["-initrd".into(), self.initrd.clone().into()]);
        words.extend(["-append".into(), append.into(), "-fw_cfg".into()]);
        words.push(format!("name=opt/lanlet/script,string={script}").into());
        words
    }

    fn words(&self, netdev: &str, network: &str, more: &str, number: u8) -> Vec<OsString> {
        let mut words = self.without_card(network, more);
        let device = format!("virtio-net-pci,netdev=n,mac=52:54:00:12:34:{number:02x}");
        let card = ["-netdev", netdev, "-device", &device];
        words.extend(card.iter().map(Into::into));
        words
    }
}
