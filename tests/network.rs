//! A whole [`Network`] on the real kernel, as the user who runs the tests. Taps come from helpers of
//! the tests' own: a tap whose netdev stands in somebody's user namespace is what a namespace guest
//! hands over.

mod kernel;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use kernel::*;
use lanlet::config::NetworkConfig;
use lanlet::frame::{Mac, PortId};
use lanlet::network::{GuestTap, Network, NetworkError, PortOptions};
use lanlet::tap::{Helper, WireKind, WireOptions};
use rustix::process::{Pid, Signal, kill_process};

fn start() -> Network {
    Network::start(NetworkConfig {
        helper: Some(PROGRAM.into()),
        ..NetworkConfig::default()
    })
    .unwrap()
}

/// A tap as a namespace guest has it.
fn guest_tap(helper: &Helper) -> GuestTap {
    let options = WireOptions {
        kind: Some(WireKind::Mirred),
        ..WireOptions::default()
    };
    GuestTap {
        queues: helper.create_wire(options).unwrap().sw,
        netlink: None,
        process: None,
    }
}

fn with_mac(last: u8) -> PortOptions {
    PortOptions {
        mac: Some(Mac([0x52, 0x54, 0, 0, 0, last])),
        ..PortOptions::default()
    }
}

#[test]
fn a_mac_is_attached_once_and_the_first_keeps_its_lease() {
    let (network, (helper, _events)) = (start(), spawn_helper());
    let (first, lease) = network.attach_tap(guest_tap(&helper), with_mac(7)).unwrap();
    let address = lease.unwrap().address;
    let second = network.attach_tap(guest_tap(&helper), with_mac(7));
    assert!(matches!(second, Err(NetworkError::MacTaken { .. })));
    let status = network.status();
    assert_eq!(status.ports.len(), 2, "the gateway and the first guest");
    let leases: Vec<_> = status.leases.iter().map(|lease| lease.address).collect();
    assert_eq!(leases, [address]);
    network.detach(first);
    assert!(network.status().leases.is_empty());
    let (again, lease) = network.attach_tap(guest_tap(&helper), with_mac(7)).unwrap();
    assert_eq!(lease.unwrap().address, address, "it is remembered");
    assert_eq!(
        again,
        PortId(first.0 + 2),
        "numbers are not taken up at once"
    );
}

/// A network whose helper says its process id.
struct Observed {
    network: Network,
    directory: PathBuf,
}

impl Observed {
    fn start(label: &str) -> Self {
        let directory =
            std::env::temp_dir().join(format!("lanlet-network-{label}.{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let helper = directory.join("helper");
        let pid = directory.join("pid");
        let script = format!(
            "#!/bin/sh\necho $$ >'{}'\nexec '{PROGRAM}' \"$@\"\n",
            pid.display()
        );
        fs::write(&helper, script).unwrap();
        fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
        let network = Network::start(NetworkConfig {
            helper: Some(helper),
            ..NetworkConfig::default()
        })
        .unwrap();
        Self { network, directory }
    }

    fn helper(&self) -> Pid {
        let text = fs::read_to_string(self.directory.join("pid")).unwrap();
        Pid::from_raw(text.trim().parse().unwrap()).unwrap()
    }

    /// The helper's links besides its loopback.
    fn links(&self) -> Vec<String> {
        let table = format!("/proc/{}/net/dev", self.helper().as_raw_nonzero());
        let text = fs::read_to_string(Path::new(&table)).unwrap();
        let names = text.lines().filter_map(|line| line.split_once(':'));
        names
            .map(|(name, _)| name.trim().to_owned())
            .filter(|name| name != "lo")
            .collect()
    }

    fn ports(&self) -> usize {
        self.network.status().ports.len()
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

#[test]
fn a_port_that_ends_leaves_no_wire() {
    let lan = Observed::start("wires");
    let vmm = lan.network.attach_vmm(PortOptions::default()).unwrap();
    assert_eq!((lan.links().len(), lan.ports()), (2, 2));
    lan.network.detach(vmm.id);
    assert_eq!(lan.ports(), 1);
    drop(vmm.fds);
    wait_for("no link", || lan.links().is_empty().then_some(()));

    // A VMM that ends by itself, while somebody looks at the network all the time.
    let ends: Vec<_> = (0..8)
        .map(|_| lan.network.attach_vmm(PortOptions::default()).unwrap())
        .collect();
    assert_eq!((lan.links().len(), lan.ports()), (16, 9));
    drop(ends);
    wait_for("no port", || (lan.ports() == 1).then_some(()));
    wait_for("no link", || lan.links().is_empty().then_some(()));
}

#[test]
fn a_helper_that_dies_takes_its_ports_along_and_no_others() {
    let lan = Observed::start("death");
    let (tests_own, _events) = spawn_helper();
    let (guest, _) = lan
        .network
        .attach_tap(guest_tap(&tests_own), with_mac(1))
        .unwrap();
    let old = lan.network.attach_vmm(PortOptions::default()).unwrap();
    kill_process(lan.helper(), Signal::KILL).unwrap();
    wait_for("the VMM's port to end", || (lan.ports() == 2).then_some(()));
    let new = lan.network.attach_vmm(PortOptions::default()).unwrap();
    drop(old);
    let ids: Vec<u16> = lan.network.status().ports.iter().map(|p| p.id).collect();
    assert_eq!(ids, [0, guest.0, new.id.0]);
    assert_eq!(lan.links().len(), 2);
}

#[test]
fn a_stopped_network_says_so() {
    let network = start();
    network.stop();
    assert!(network.failed().is_none());
    let status = network.status();
    assert!(status.ports.is_empty());
    assert!(status.incomplete.unwrap().contains("has ended"));
    let late = network.attach_vmm(PortOptions::default());
    assert!(matches!(late, Err(NetworkError::Ended(None))));
    network.stop();
}
