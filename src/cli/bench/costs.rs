//! What a network takes while it is there: resident memory and processor time of its processes, at
//! rest, with more of something, and after a burst.
//!
//! Each is looked at in a network of its own, so that none finds what another has left. A first one of
//! whatever is added is there before the first look: the code that it touches is not its cost. What
//! the kernel keeps for devices and sockets is no process's memory, and not in the figures.

use std::fs::File;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::agent::{Agent, POLL};
use super::case::{Cost, Load, Section};
use super::control::{Plan, REPLY_TIME_MAX, measure as run};
use super::network::{Network, with_address};
use super::peer::{Reply, Request};
use super::resident::{Resident, busy_secs, children, highest};
use super::way::{Ends, Way};
use super::world::{OUTSIDE, SERVER, World};
use crate::control::client::Client;
use crate::dhcp::PENDING_PER_PORT_MAX;
use crate::frame::Mac;
use crate::network::{PortOptions, Status, VmmPort};
use crate::offload::VNET_HEADER_LEN;
use crate::wire::{UDP4_PAYLOAD_AT, write_udp4};

/// VMMs' ports, DHCP leases, TCP flows and UDP mappings that are added. One guest may have 2,048
/// mappings and three quarters of 16,384 flows, and one port a quarter of the addresses, of which
/// [`SUBNET`] has enough.
const PORTS: usize = 200;
const LEASES: usize = 1_000;
const FLOWS: usize = 4_000;
const MAPPINGS: usize = 2_000;
const SUBNET: [&str; 2] = ["--subnet", "10.9.0.0/16"];
/// How long a network and its guests may settle: leases, router solicitations and MLD are over.
const SETTLE: Duration = Duration::from_millis(500);
/// A flow counts as idle after this, and has given its buffers back: 2 s (`nat::tcp`), and as much as
/// its timer may be late on a busy machine. Memory of other kinds is looked after once a second.
const IDLE: Duration = Duration::from_millis(3_500);
/// How long what was asked for may take to be there.
const ADD_TIME_MAX: Duration = Duration::from_secs(10);
/// The shortest time in which processor time is counted: a housekeeping once a second is in it.
const REST_TIME_MIN: Duration = Duration::from_secs(2);
/// Streams of a burst.
const STREAMS: usize = 8;

/// One look, as the figures of the case.
///
/// # Errors
/// What went wrong, in the words of who knows.
pub(super) fn measure(
    world: &World,
    way: Way,
    plan: &Plan,
    cost: Cost,
) -> Result<Vec<f64>, String> {
    let secs = plan.secs;
    let name = format!("{}-costs", way.name());
    let mut options = way.options(plan);
    options.extend(SUBNET);
    let network = Network::up(world, &name, way.program(world, plan)?, &options)?;
    match cost {
        Cost::Rest => rest(world, &network, secs),
        Cost::Port => ports(&network),
        Cost::Lease => leases(&network),
        Cost::TcpFlow => held(world, &network, Load::RoundTrips { flows: 1 }, FLOWS),
        Cost::UdpMapping => held(world, &network, DATAGRAMS, MAPPINGS),
        Cost::Burst => burst(world, network, secs),
    }
}

/// What a server of [`Cost::UdpMapping`] takes in.
const DATAGRAMS: Load = Load::Udp {
    bytes: 64,
    flows: 1,
    trains: false,
};

/// All processes of a network: itself, then its helper where a port needs one.
fn processes(network: &Network) -> Vec<u32> {
    let mut all = vec![network.pid()];
    all.extend(children(network.pid()));
    all
}

fn resident(network: &Network) -> Result<Resident, String> {
    let mut sum = Resident::default();
    for pid in processes(network) {
        sum += Resident::of(pid)?;
    }
    Ok(sum)
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

/// KiB of each of `count` that came between two looks. Not below zero: less than a page is no gain.
fn each(before: Resident, after: Resident, count: usize) -> f64 {
    after.all.saturating_sub(before.all) as f64 / count as f64
}

fn rest(world: &World, network: &Network, secs: f64) -> Result<Vec<f64>, String> {
    let mut client = network.client()?;
    let _port = attach(&mut client)?;
    let guests = [network.guest(world, 0, &[])?, network.guest(world, 1, &[])?];
    let _guests = guests.map(|guest| with_address(guest, SERVER)).into_iter();
    let _guests = _guests.collect::<Result<Vec<_>, _>>()?;
    sleep(SETTLE);
    let pids = processes(network);
    let busy = || {
        pids.iter()
            .map(|&pid| busy_secs(pid))
            .sum::<Result<f64, _>>()
    };
    let (before, begun) = (busy()?, Instant::now());
    sleep(Duration::from_secs_f64(secs).max(REST_TIME_MIN));
    let share = (busy()? - before) / begun.elapsed().as_secs_f64();
    let own = Resident::of(network.pid())?;
    let mut helper = Resident::default();
    for &pid in &pids[1..] {
        helper += Resident::of(pid)?;
    }
    Ok(vec![
        mib(own.all),
        mib(own.private),
        mib(helper.private),
        share * 100.0,
    ])
}

fn attach(client: &mut Client) -> Result<VmmPort, String> {
    let port = client.attach_vmm(&PortOptions::default());
    port.map_err(|error| error.to_string())
}

fn ports(network: &Network) -> Result<Vec<f64>, String> {
    let mut client = network.client()?;
    let mut ports = vec![attach(&mut client)?];
    sleep(SETTLE);
    let before = resident(network)?;
    for _ in 0..PORTS {
        ports.push(attach(&mut client)?);
    }
    sleep(SETTLE);
    Ok(vec![each(before, resident(network)?, PORTS)])
}

/// One guest asks for many addresses, in the name of as many clients.
fn leases(network: &Network) -> Result<Vec<f64>, String> {
    let mut client = network.client()?;
    let port = attach(&mut client)?;
    let queue = port.fds.into_iter().next().expect("a tap has a queue");
    let mut tap = File::from(queue);
    let mut ask = |numbers: std::ops::Range<usize>| {
        let end = numbers.end;
        for number in numbers {
            let asked = tap.write_all(&discover(number as u32));
            asked.map_err(|error| format!("cannot send a DISCOVER: {error}"))?;
        }
        wait_for(&mut client, end, "leases", |status| status.leases.len())
    };
    ask(0..1)?;
    let before = resident(network)?;
    // Each address is probed first, and so many at a time.
    for begin in (1..=LEASES).step_by(PENDING_PER_PORT_MAX) {
        ask(begin..LEASES.min(begin + PENDING_PER_PORT_MAX - 1) + 1)?;
    }
    Ok(vec![each(before, resident(network)?, LEASES)])
}

/// A DHCPDISCOVER that asks for rapid commit (RFC 4039): the answer is a lease. Behind the header of a
/// VMM's tap.
fn discover(number: u32) -> Vec<u8> {
    /// Of a BOOTP message before its options, and of the whole as RFC 1542 section 2.1 wants it.
    const FIXED_LEN: usize = 240;
    const MESSAGE_LEN: usize = 300;
    let [_, a, b, c] = number.to_be_bytes();
    let mac = Mac([0x52, 0x54, 0x01, a, b, c]);
    let mut frame = vec![0; UDP4_PAYLOAD_AT + MESSAGE_LEN];
    let message = &mut frame[UDP4_PAYLOAD_AT..];
    message[..3].copy_from_slice(&[1, 1, 6]);
    message[28..34].copy_from_slice(&mac.0);
    message[FIXED_LEN - 4..FIXED_LEN].copy_from_slice(&[99, 130, 83, 99]);
    message[FIXED_LEN..FIXED_LEN + 6].copy_from_slice(&[53, 1, 1, 80, 0, 255]);
    let from = (mac, Ipv4Addr::UNSPECIFIED, 68);
    let to = (Mac::BROADCAST, Ipv4Addr::BROADCAST, 67);
    write_udp4(&mut frame, from, to, MESSAGE_LEN);
    [vec![0; VNET_HEADER_LEN], frame].concat()
}

/// A guest opens many of something, and uses each once.
fn held(world: &World, network: &Network, load: Load, count: usize) -> Result<Vec<f64>, String> {
    let (mut guest, _) = with_address(network.guest(world, 0, &[])?, SERVER)?;
    let mut outside = outside(world)?;
    let serve = Request::Serve {
        load,
        reverse: false,
        at: SocketAddr::new(SERVER, 0),
        secs: 0.0,
    };
    let Reply::Serving(to) = outside.ask(&serve, REPLY_TIME_MAX)? else {
        return Err("nothing serves".to_owned());
    };
    let mut client = network.client()?;
    let mut hold = |count: usize, sum: usize| {
        match guest.ask(&Request::Hold { load, to, count }, ADD_TIME_MAX * 2)? {
            Reply::Held => {}
            Reply::Failed(reason) => return Err(reason),
            other => return Err(format!("unexpected {other:?}")),
        }
        wait_for(&mut client, sum, "flows", |status| match load {
            Load::Udp { .. } => status.flows.udp,
            _ => status.flows.tcp,
        })
    };
    hold(1, 1)?;
    sleep(SETTLE);
    let before = resident(network)?;
    hold(count, count + 1)?;
    sleep(match load {
        // A mapping has no buffers.
        Load::Udp { .. } => SETTLE,
        _ => IDLE,
    });
    Ok(vec![each(before, resident(network)?, count)])
}

fn outside(world: &World) -> Result<Agent, String> {
    let place = world.agent_at(&["--net", OUTSIDE]);
    Agent::spawn(place, world.log("costs-outside"))
}

fn burst(world: &World, network: Network, secs: f64) -> Result<Vec<f64>, String> {
    let (guest, _) = with_address(network.guest(world, 0, &[])?, SERVER)?;
    let mut ends = Ends::new(guest, outside(world)?, SERVER);
    sleep(SETTLE);
    let before = resident(&network)?;
    let load = Load::Tcp { streams: STREAMS };
    for section in [Section::GuestToOutside, Section::OutsideToGuest] {
        run(&mut ends, section, load, secs)?;
    }
    let highest: u64 = processes(&network).into_iter().map(highest).sum();
    sleep(IDLE);
    let after = resident(&network)?;
    Ok([before.all, highest, after.all].map(mib).to_vec())
}

fn wait_for(
    client: &mut Client,
    wanted: usize,
    what: &str,
    count: impl Fn(&Status) -> usize,
) -> Result<(), String> {
    let begun = Instant::now();
    loop {
        let found = count(&client.status().map_err(|error| error.to_string())?);
        if found >= wanted {
            return Ok(());
        }
        if begun.elapsed() > ADD_TIME_MAX {
            return Err(format!("only {found} of {wanted} {what} are there"));
        }
        sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_discover_is_one_and_no_two_clients_are_the_same() {
        let [one, two] = [1, 2].map(discover);
        assert_eq!(one.len(), VNET_HEADER_LEN + UDP4_PAYLOAD_AT + 300);
        assert_ne!(one, two);
        assert!(one[..VNET_HEADER_LEN].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn what_shrinks_costs_nothing() {
        let [small, large] = [1_000, 3_000].map(|all| Resident { all, private: 0 });
        assert_eq!(each(small, large, 1_000), 2.0);
        assert_eq!(each(large, small, 1_000), 0.0);
    }
}
