//! The ways between a guest and the others that are compared: lanlet and its peers.
//!
//! A way is prepared once (its namespaces), and started as often as needed: after a run that hangs,
//! its processes are thrown away.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::agent::{Agent, POLL, Process};
use super::case::{Guests, Section};
use super::control::Plan;
use super::network::{Network, with_address};
use super::world::{self, HOST, HOST6, OUTSIDE, SERVER, SERVER6, UPLINK, World, installed, ip};

/// What pasta and slirp4netns are fastest with.
const MTU_LARGE: u32 = 65_520;
const MTU: u32 = 1_500;
/// How long QEMU may take to have its tap, and slirp4netns its API.
const TAP_TIME_MAX: Duration = Duration::from_secs(5);
/// Guests of a network that has several: two pairs.
pub(super) const GUESTS: u8 = 4;
/// Where a guest serves that the outside reaches by a port of the host.
const GUEST_PORT: u16 = 7000;
/// The kernel's bridge, and its gateway.
pub(super) const BRIDGE: &str = "br0";
pub(super) const BRIDGE_GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 150, 1);
/// The address that slirp4netns gives.
const SLIRP_GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 100);

/// One way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, ValueEnum, Serialize, Deserialize)]
pub(super) enum Way {
    /// This program
    #[value(name = "lanlet")]
    Lanlet,
    /// This program, over IPv6
    #[value(name = "lanlet-ipv6")]
    LanletIpv6,
    /// This program with the workers that --workers says
    #[value(name = "lanlet-workers")]
    Workers,
    /// This program, with VMs that share their memory with it
    #[value(name = "lanlet-vhost-user")]
    VhostUser,
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
    pub(super) fn title(self, section: Section) -> &'static str {
        match (self, section) {
            (Way::Lanlet, _) => "lanlet",
            (Way::LanletIpv6, _) => "lanlet IPv6",
            (Way::Workers, _) => "with workers",
            (Way::VhostUser, _) => "vhost-user",
            (Way::Base, _) => "base",
            (Way::Kernel, section) if section.is_inside() => "kernel bridge",
            (Way::Kernel, _) => "kernel NAT",
            (Way::Pasta, Section::VmToOutside | Section::OutsideToVm) => "passt",
            (Way::PastaLarge, Section::VmToOutside | Section::OutsideToVm) => "passt 64K",
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
    pub(super) fn lacks(self, section: Section) -> Option<&'static str> {
        let is_of_vms = matches!(section.guests(), Some(Guests::Vms | Guests::VmPairs));
        match (self, section) {
            (Way::VhostUser, _) if !is_of_vms => Some("it serves VMs alone"),
            (Way::Lanlet | Way::Workers | Way::Base, Section::Costs) => None,
            (Way::LanletIpv6, Section::Costs) => {
                Some("what is told of lanlet is for both families")
            }
            (_, Section::Costs) => Some("only lanlet's own processes are looked at"),
            (Way::Direct, section) if section.is_inside() || is_of_vms => Some("there is no guest"),
            (Way::LanletIpv6, _) if is_of_vms => Some("the guest image asks for IPv4 alone"),
            (Way::Slirp | Way::SlirpLarge, _) if is_of_vms => Some("it serves namespaces alone"),
            (
                Way::Pasta | Way::PastaLarge | Way::Slirp | Way::SlirpLarge | Way::Qemu,
                Section::GuestToGuest | Section::VmToVm,
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

    /// Starts its processes, and waits until the guests have a way to the server.
    ///
    /// # Errors
    /// What went wrong, in the words of who knows.
    pub(super) fn start(self, world: &World, plan: &Plan) -> Result<Ends, String> {
        let name = self.name();
        let mut processes = Vec::new();
        let mut network = None;
        let published = self.published();
        let port = published.outside.port();
        let mut others = Vec::new();
        let guest = match self {
            Way::Lanlet | Way::LanletIpv6 | Way::Workers | Way::Base => {
                let program = self.program(world, plan)?;
                let options = self.options(plan);
                let network = network.insert(Network::up(world, &name, program, &options)?);
                let forward = format!("{}:{GUEST_PORT}", published.outside);
                let first = network.guest(world, 0, &["--publish", &forward])?;
                for number in 1..GUESTS {
                    others.push(network.guest(world, number.into(), &[])?);
                }
                first
            }
            Way::Kernel => {
                let guest = |n| {
                    let net = format!("{name}-{n}");
                    Agent::spawn(world.agent_at(&["--net", &net]), world.log(&net))
                };
                for number in 1..GUESTS {
                    others.push(guest(number)?);
                }
                guest(0)?
            }
            Way::Pasta | Way::PastaLarge => pasta(world, &name, self.mtu(), port)?,
            Way::Slirp | Way::SlirpLarge => {
                slirp4netns(world, &name, self.mtu(), port, &mut processes)?
            }
            Way::Qemu => qemu(world, &name, port, &mut processes)?,
            Way::Direct => Agent::spawn(world.agent_at(&[]), world.log(&name))?,
            Way::VhostUser => return Err("no namespace goes this way".to_owned()),
        };
        let place = ["--net", OUTSIDE];
        let outside = Agent::spawn(
            world.agent_at(&place),
            world.log(&format!("{name}-outside")),
        )?;
        let mut ends = Ends {
            processes,
            network,
            published: Some(published),
            ..Ends::new(guest, outside, self.server())
        };
        let ready = ends.guest.wait_for_route(ends.server);
        if let Err(error) = ready {
            // What the guest's network said is nearer to the cause.
            ends.check()?;
            return Err(error);
        }
        for other in others {
            ends.others.push(with_address(other, ends.server)?);
        }
        Ok(ends)
    }

    /// The port of the host that leads to the first guest. Every way has one of its own, as all share the
    /// host; where there is no guest, the server has it itself.
    fn published(self) -> Published {
        let ways = Self::value_variants().iter();
        let index = ways.take_while(|way| **way != self).count();
        let port = match self {
            Way::Direct => GUEST_PORT,
            _ => GUEST_PORT + 1 + index as u16,
        };
        let (any, host): (IpAddr, _) = match self {
            Way::LanletIpv6 => (Ipv6Addr::UNSPECIFIED.into(), HOST6),
            _ => (Ipv4Addr::UNSPECIFIED.into(), HOST),
        };
        Published {
            inside: (any, GUEST_PORT).into(),
            outside: (host, port).into(),
        }
    }

    /// Options of its network beyond those that all have.
    pub(super) fn options(self, plan: &Plan) -> Vec<&str> {
        match (self, &plan.workers) {
            (Way::Workers, Some(workers)) => vec!["--workers", workers],
            _ => Vec::new(),
        }
    }

    /// Whether it is a network of a lanlet program.
    pub(super) fn is_lanlet(self) -> bool {
        matches!(
            self,
            Way::Lanlet | Way::LanletIpv6 | Way::Workers | Way::VhostUser | Way::Base
        )
    }

    /// The lanlet program whose networks this way is made of.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn program<'a>(self, world: &'a World, plan: &'a Plan) -> Result<&'a Path, String> {
        let base = plan.base.as_deref();
        match self {
            Way::Lanlet | Way::LanletIpv6 | Way::Workers | Way::VhostUser => Ok(world.program()),
            Way::Base => base.ok_or_else(|| "--base names no program".to_owned()),
            _ => Err("it is not lanlet".to_owned()),
        }
    }
}

/// The processes at a way's ends.
pub(super) struct Ends {
    pub(super) guest: Agent,
    /// Other guests of the same network, and their addresses.
    pub(super) others: Vec<(Agent, IpAddr)>,
    pub(super) outside: Agent,
    /// Where the outside's servers are.
    pub(super) server: IpAddr,
    pub(super) published: Option<Published>,
    pub(super) network: Option<Network>,
    pub(super) processes: Vec<Process>,
}

/// A port of the host that leads to a guest.
pub(super) struct Published {
    /// Where the guest serves.
    pub(super) inside: SocketAddr,
    /// What the outside connects to.
    pub(super) outside: SocketAddr,
}

impl Ends {
    /// A guest alone, and the outside.
    pub(super) fn new(guest: Agent, outside: Agent, server: IpAddr) -> Self {
        Self {
            guest,
            others: Vec::new(),
            outside,
            server,
            published: None,
            network: None,
            processes: Vec::new(),
        }
    }

    /// An error if a process between the ends has ended.
    pub(super) fn check(&mut self) -> Result<(), String> {
        self.network.as_mut().map_or(Ok(()), Network::check)?;
        self.processes.iter_mut().try_for_each(Process::check)
    }
}

/// Guests on a kernel bridge, and masquerade behind it: what libvirt makes.
fn bridge(world: &World) -> Result<(), String> {
    let name = Way::Kernel.name();
    ip(
        None,
        &format!(
            "link add {BRIDGE} type bridge
            address add {BRIDGE_GATEWAY}/24 dev {BRIDGE}
            link set {BRIDGE} up"
        ),
    )?;
    for n in 0..GUESTS {
        let net = format!("{name}-{n}");
        world.add_namespace(&net)?;
        ip(
            None,
            &format!(
                "link add br0p{n} type veth peer name eth0 netns {net}
                link set br0p{n} master {BRIDGE} up"
            ),
        )?;
        ip(
            Some(&net),
            &format!(
                "link set lo up
                address add {}/24 dev eth0
                link set eth0 up
                route add default via {BRIDGE_GATEWAY}",
                bridge_guest(n)
            ),
        )?;
    }
    Ok(())
}

/// Address of a guest on the bridge.
pub(super) fn bridge_guest(number: u8) -> Ipv4Addr {
    let [a, b, c, gateway] = BRIDGE_GATEWAY.octets();
    Ipv4Addr::new(a, b, c, gateway + 1 + number)
}

/// The NAT of [`Way::Kernel`], and its published port. Without it there is still the bridge.
pub(super) fn masquerade() -> Result<(), String> {
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")
        .map_err(|error| format!("cannot turn forwarding on: {error}"))?;
    let rules = format!(
        "table ip nat {{
            chain post {{
                type nat hook postrouting priority 100;
                oifname {UPLINK} masquerade
            }}
            chain pre {{
                type nat hook prerouting priority -100;
                iifname {UPLINK} tcp dport {} dnat to {}:{GUEST_PORT}
            }}
        }}",
        Way::Kernel.published().outside.port(),
        bridge_guest(0)
    );
    world::run("nft", &["-f", "-"], &rules)
}

/// pasta makes the guest itself, around a command. It refuses to run as root; below the world's root
/// it is nobody special.
fn pasta(world: &World, name: &str, mtu: u32, port: u16) -> Result<Agent, String> {
    let mut command = world.at(&["--user"]);
    command
        .arg(installed("pasta")?)
        .args(["--quiet", "--config-net", "-4"])
        // No forwards but one: it would look for ports to forward all the time.
        .args(["-t", &format!("{port}:{GUEST_PORT}")])
        .args(["-u", "none", "-T", "none", "-U", "none"])
        .args(["--mtu", &mtu.to_string(), "--"])
        .args(world.agent_words());
    Agent::spawn(command, world.log(name))
}

fn slirp4netns(
    world: &World,
    name: &str,
    mtu: u32,
    port: u16,
    processes: &mut Vec<Process>,
) -> Result<Agent, String> {
    let api = world.private_dir(name)?.join("api.sock");
    // One that was left behind is in the way.
    let _ = std::fs::remove_file(&api);
    let mut command = world.at(&[]);
    command
        .arg(installed("slirp4netns")?)
        .args(["--configure", "--netns-type=path"])
        .arg(format!("--mtu={mtu}"))
        .arg("--api-socket")
        .arg(&api)
        .args([&world::netns_path(name), "tap0"]);
    let mut process = Process::spawn_mute(command, world.log(name))?;
    let forward = serde_json::json!({
        "execute": "add_hostfwd",
        "arguments": {
            "proto": "tcp", "host_addr": HOST, "host_port": port,
            "guest_addr": SLIRP_GUEST, "guest_port": GUEST_PORT,
        },
    });
    let begun = Instant::now();
    let said = loop {
        match ask_slirp4netns(&api, &forward.to_string()) {
            Ok(said) => break said,
            Err(error) if begun.elapsed() > TAP_TIME_MAX => {
                return Err(format!("its API does not answer: {error}"));
            }
            Err(_) => process.check()?,
        }
        std::thread::sleep(POLL);
    };
    if said.contains("error") {
        return Err(format!("it forwards no port: {}", said.trim()));
    }
    processes.push(process);
    guest_of(world, name)
}

/// A request to slirp4netns's API: one per connection, which it ends.
fn ask_slirp4netns(api: &Path, request: &str) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(api)?;
    stream.set_read_timeout(Some(TAP_TIME_MAX))?;
    stream.write_all(request.as_bytes())?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    Ok(said)
}

/// QEMU without a VM: its user network and a tap in the guest's namespace on one hub.
fn qemu(
    world: &World,
    name: &str,
    port: u16,
    processes: &mut Vec<Process>,
) -> Result<Agent, String> {
    let (address, gateway) = (Ipv4Addr::new(10, 0, 2, 15), Ipv4Addr::new(10, 0, 2, 2));
    let user = format!("user,id=u,hostfwd=tcp:{HOST}:{port}-{address}:{GUEST_PORT}");
    let mut command = world.at(&["--user", "--net", name, "--tap", "eth0"]);
    command
        .arg(installed("qemu-system-x86_64")?)
        .args(["-machine", "none", "-nodefaults"])
        .args(["-display", "none", "-monitor", "none", "-serial", "none"])
        .args(["-netdev", &user, "-netdev", "tap,id=t,fd={fd}"])
        .args(["-netdev", "hubport,id=hu,hubid=0,netdev=u"])
        .args(["-netdev", "hubport,id=ht,hubid=0,netdev=t"]);
    let mut process = Process::spawn_mute(command, world.log(name))?;
    let lines = format!(
        "address add {address}/24 dev eth0
        link set eth0 up
        route add default via {gateway}"
    );
    let begun = Instant::now();
    while let Err(error) = ip(Some(name), &lines) {
        process.check()?;
        if begun.elapsed() > TAP_TIME_MAX {
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
            if way == Way::VhostUser {
                continue;
            }
            for section in [Section::GuestToOutside, Section::OutsideToGuest] {
                assert_eq!(way.lacks(section), None, "{way:?}");
            }
        }
        assert_eq!(Way::Lanlet.lacks(Section::GuestToGuest), None);
        assert_eq!(Way::Lanlet.lacks(Section::Costs), None);
        assert!(Way::Qemu.lacks(Section::GuestToGuest).is_some());
        assert!(Way::Pasta.lacks(Section::VmToVm).is_some());
        assert_eq!(Way::VhostUser.lacks(Section::VmToVm), None);
        assert!(Way::VhostUser.lacks(Section::GuestToGuest).is_some());
    }
}
