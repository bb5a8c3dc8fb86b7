//! A whole [`Network`] on the real kernel, as the user who runs the tests. Taps come from helpers of
//! the tests' own: a tap whose netdev stands in somebody's user namespace is what a namespace guest
//! hands over.

mod kernel;

use kernel::*;
use lanlet::config::NetworkConfig;
use lanlet::frame::{Mac, PortId};
use lanlet::network::{GuestTap, Network, NetworkError, PortOptions};
use lanlet::tap::{Helper, WireKind, WireOptions};

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
        tap: helper.create_wire(options).unwrap().sw,
        netlink: None,
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
