//! The ways between a guest and the others that are compared: lanlet and its peers.
//!
//! A way is prepared once (its namespaces), and started as often as needed: after a run that hangs,
//! its processes are thrown away.

use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::agent::{Agent, POLL, Process};
use super::case::Direction;
use super::world::{self, OUTSIDE, RESOLVER, SERVER, SERVER6, UPLINK, World, installed, ip};

/// What pasta and slirp4netns are fastest with.
const MTU_LARGE: u32 = 65_520;
const MTU: u32 = 1_500;
/// The network's name, in a directory of its own per way.
const NETWORK: &str = "bench";
/// How long `lanlet up` may take.
const NETWORK_TIME_MAX: Duration = Duration::from_secs(5);

/// One way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, ValueEnum, Serialize, Deserialize)]
pub(super) enum Way {
    /// This program
    #[value(name = "lanlet")]
    Lanlet,
    /// This program, over IPv6
    #[value(name = "lanlet-ipv6")]
    LanletIpv6,
    /// The program that --base names
    #[value(name = "base")]
    Base,
    /// The kernel's bridge and nftables masquerade
    #[value(name = "kernel")]
    Kernel,
    /// pasta with an MTU of 1500
    #[value(name = "pasta")]
    Pasta,
    /// pasta with its best MTU
    #[value(name = "pasta-65520")]
    PastaLarge,
    /// slirp4netns with an MTU of 1500
    #[value(name = "slirp4netns")]
    Slirp,
    /// slirp4netns with its best MTU
    #[value(name = "slirp4netns-65520")]
    SlirpLarge,
    /// QEMU's -netdev user, on a tap in place of a VM
    #[value(name = "qemu")]
    Qemu,
    /// No guest at all: the host's own sockets, as a yardstick
    #[value(name = "direct")]
    Direct,
}

impl Way {
    /// As `--only` takes it.
    pub(super) fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Head of a column.
    pub(super) fn title(self, direction: Direction) -> &'static str {
        match (self, direction) {
            (Way::Lanlet, _) => "lanlet",
            (Way::LanletIpv6, _) => "lanlet IPv6",
            (Way::Base, _) => "base",
            (Way::Kernel, Direction::GuestToGuest) => "kernel bridge",
            (Way::Kernel, _) => "kernel NAT",
            (Way::Pasta, _) => "pasta",
            (Way::PastaLarge, _) => "pasta 64K",
            (Way::Slirp, _) => "slirp4netns",
            (Way::SlirpLarge, _) => "slirp 64K",
            (Way::Qemu, _) => "QEMU user",
            (Way::Direct, _) => "no guest",
        }
    }

    pub(super) fn mtu(self) -> u32 {
        match self {
            Way::PastaLarge | Way::SlirpLarge => MTU_LARGE,
            _ => MTU,
        }
    }

    /// Why it does not go there, if so whatever the machine.
    pub(super) fn lacks(self, direction: Direction) -> Option<&'static str> {
        match (self, direction) {
            (Way::Direct, Direction::GuestToGuest) => Some("there is no guest"),
            (
                Way::Pasta | Way::PastaLarge | Way::Slirp | Way::SlirpLarge | Way::Qemu,
                Direction::GuestToGuest,
            ) => Some("it serves one guest alone"),
            _ => None,
        }
    }

    fn server(self) -> IpAddr {
        match self {
            Way::LanletIpv6 => SERVER6,
            _ => SERVER,
        }
    }

    /// Makes what stays.
    ///
    /// # Errors
    /// What is missing.
    pub(super) fn prepare(self, world: &World) -> Result<(), String> {
        match self {
            Way::Kernel => bridge(world),
            Way::Slirp | Way::SlirpLarge | Way::Qemu => {
                world.add_namespace(&self.name())?;
                ip(Some(&self.name()), "link set lo up")
            }
            _ => Ok(()),
        }
    }

    /// Starts its processes, and waits until the guests have a way to the server. `base`: the program
    /// of [`Way::Base`].
    ///
    /// # Errors
    /// What went wrong, in the words of who knows.
    pub(super) fn start(self, world: &World, base: Option<&Path>) -> Result<Ends, String> {
        let name = self.name();
        let mut processes = Vec::new();
        let (guest, second) = match self {
            Way::Lanlet | Way::LanletIpv6 => lanlet(world, &name, world.program(), &mut processes)?,
            Way::Base => {
                let program = base.ok_or("--base names no program")?;
                lanlet(world, &name, program, &mut processes)?
            }
            Way::Kernel => {
                let guest = |n| {
                    let net = format!("{name}-{n}");
                    Agent::spawn(world.agent_at(&["--net", &net]), world.log(&net))
                };
                (guest(0)?, Some(guest(1)?))
            }
            Way::Pasta | Way::PastaLarge => (pasta(world, &name, self.mtu())?, None),
            Way::Slirp | Way::SlirpLarge => {
                (slirp4netns(world, &name, self.mtu(), &mut processes)?, None)
            }
            Way::Qemu => (qemu(world, &name, &mut processes)?, None),
            Way::Direct => (Agent::spawn(world.agent_at(&[]), world.log(&name))?, None),
        };
        let place = ["--net", OUTSIDE];
        let outside = Agent::spawn(
            world.agent_at(&place),
            world.log(&format!("{name}-outside")),
        )?;
        let mut ends = Ends {
            guest,
            second: None,
            outside,
            server: self.server(),
            _processes: processes,
        };
        let ready = ends.guest.wait_for_route(ends.server);
        if let Err(error) = ready {
            // What the guest's network said is nearer to the cause.
            for process in &mut ends._processes {
                process.check()?;
            }
            return Err(error);
        }
        if let Some(mut second) = second {
            let address = second.wait_for_route(ends.server)?;
            ends.second = Some((second, address));
        }
        Ok(ends)
    }
}

/// The processes at a way's ends.
pub(super) struct Ends {
    pub(super) guest: Agent,
    /// Another guest of the same network, and its address.
    pub(super) second: Option<(Agent, IpAddr)>,
    pub(super) outside: Agent,
    /// Where the outside's servers are.
    pub(super) server: IpAddr,
    _processes: Vec<Process>,
}

/// A network, and two guests on it.
fn lanlet(
    world: &World,
    name: &str,
    program: &Path,
    processes: &mut Vec<Process>,
) -> Result<(Agent, Option<Agent>), String> {
    let dir = world.private_dir(name)?;
    let command = |words: &[&str]| {
        let mut command = world.at(&["--user"]);
        command
            .arg(program)
            .args(words)
            .env("LANLET_RUNTIME_DIR", &dir);
        command
    };
    let up = command(&[
        "up",
        "--name",
        NETWORK,
        "--dns",
        RESOLVER,
        "--lease-file",
        "none",
    ]);
    let mut network = Process::spawn_mute(up, world.log(name))?;
    let begun = Instant::now();
    let socket = dir.join(format!("{NETWORK}.sock"));
    while UnixStream::connect(&socket).is_err() {
        network.check()?;
        if begun.elapsed() > NETWORK_TIME_MAX {
            return Err(format!("the network is not up{}", network.last_words()));
        }
        std::thread::sleep(POLL);
    }
    processes.push(network);
    let guest = |n| {
        let mut exec = command(&["exec", "--name", NETWORK, "--"]);
        exec.args(world.agent_words());
        Agent::spawn(exec, world.log(&format!("{name}-{n}")))
    };
    Ok((guest(0)?, Some(guest(1)?)))
}

/// Two guests on a kernel bridge, and masquerade behind it: what libvirt makes.
fn bridge(world: &World) -> Result<(), String> {
    let name = Way::Kernel.name();
    ip(
        None,
        "link add br0 type bridge
        address add 192.168.150.1/24 dev br0
        link set br0 up",
    )?;
    for n in 0..2 {
        let net = format!("{name}-{n}");
        world.add_namespace(&net)?;
        ip(
            None,
            &format!(
                "link add br0p{n} type veth peer name eth0 netns {net}
                link set br0p{n} master br0 up"
            ),
        )?;
        ip(
            Some(&net),
            &format!(
                "link set lo up
                address add 192.168.150.{}/24 dev eth0
                link set eth0 up
                route add default via 192.168.150.1",
                n + 2
            ),
        )?;
    }
    Ok(())
}

/// The NAT of [`Way::Kernel`]. Without it there is still the bridge.
pub(super) fn masquerade() -> Result<(), String> {
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")
        .map_err(|error| format!("cannot turn forwarding on: {error}"))?;
    let rules = format!(
        "table ip nat {{
            chain post {{
                type nat hook postrouting priority 100;
                oifname {UPLINK} masquerade
            }}
        }}"
    );
    world::run("nft", &["-f", "-"], &rules)
}

/// pasta makes the guest itself, around a command. It refuses to run as root; below the world's root
/// it is nobody special.
fn pasta(world: &World, name: &str, mtu: u32) -> Result<Agent, String> {
    let mut command = world.at(&["--user"]);
    command
        .arg(installed("pasta")?)
        .args(["--quiet", "--config-net", "-4"])
        // No forwards: it would look for ports to forward all the time.
        .args(["-t", "none", "-u", "none", "-T", "none", "-U", "none"])
        .args(["--mtu", &mtu.to_string(), "--"])
        .args(world.agent_words());
    Agent::spawn(command, world.log(name))
}

fn slirp4netns(
    world: &World,
    name: &str,
    mtu: u32,
    processes: &mut Vec<Process>,
) -> Result<Agent, String> {
    let mut command = world.at(&[]);
    command
        .arg(installed("slirp4netns")?)
        .args(["--configure", "--netns-type=path"])
        .arg(format!("--mtu={mtu}"))
        .args([&world::netns_path(name), "tap0"]);
    processes.push(Process::spawn_mute(command, world.log(name))?);
    guest_of(world, name)
}

/// QEMU without a VM: its user network and a tap in the guest's namespace on one hub.
fn qemu(world: &World, name: &str, processes: &mut Vec<Process>) -> Result<Agent, String> {
    let mut command = world.at(&["--user", "--net", name, "--tap", "eth0"]);
    command
        .arg(installed("qemu-system-x86_64")?)
        .args(["-machine", "none", "-nodefaults"])
        .args(["-display", "none", "-monitor", "none", "-serial", "none"])
        .args(["-netdev", "user,id=u", "-netdev", "tap,id=t,fd={fd}"])
        .args(["-netdev", "hubport,id=hu,hubid=0,netdev=u"])
        .args(["-netdev", "hubport,id=ht,hubid=0,netdev=t"]);
    let mut process = Process::spawn_mute(command, world.log(name))?;
    let (address, gateway) = (Ipv4Addr::new(10, 0, 2, 15), Ipv4Addr::new(10, 0, 2, 2));
    let lines = format!(
        "address add {address}/24 dev eth0
        link set eth0 up
        route add default via {gateway}"
    );
    let begun = Instant::now();
    while let Err(error) = ip(Some(name), &lines) {
        process.check()?;
        if begun.elapsed() > NETWORK_TIME_MAX {
            return Err(error);
        }
        std::thread::sleep(POLL);
    }
    process.check()?;
    processes.push(process);
    guest_of(world, name)
}

fn guest_of(world: &World, name: &str) -> Result<Agent, String> {
    let log: PathBuf = world.log(&format!("{name}-0"));
    Agent::spawn(world.agent_at(&["--net", name]), log)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nat_goes_everywhere_but_for_those_with_one_guest() {
        for &way in Way::value_variants() {
            assert!(!way.name().is_empty());
            for direction in [Direction::GuestToOutside, Direction::OutsideToGuest] {
                assert_eq!(way.lacks(direction), None, "{way:?}");
            }
        }
        assert_eq!(Way::Lanlet.lacks(Direction::GuestToGuest), None);
        assert!(Way::Qemu.lacks(Direction::GuestToGuest).is_some());
    }
}
