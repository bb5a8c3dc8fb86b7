//! Which address the guest of a forward has.
//!
//! A guest is named by address, by MAC or by name. Leases say who has which address; a guest without
//! one is found by what [`Neighbors`] heard from its MAC.
//!
//! # Names
//! A name is the host name that a DHCP client gave itself, whole or up to its first dot, or a port's.
//! Guests choose theirs, so two may claim one: the MAC that had it keeps it as long as its lease lives,
//! and the conflict is logged once. A name that an address is reserved under is that guest's alone. Where that is not enough, name the guest by MAC.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use hashbrown::HashMap;

use super::spec::Guest;
use crate::dhcp::lease::{Held, LeaseTable};
use crate::frame::{Duration, Instant, Mac, PortId};
use crate::gateway::neighbor::Neighbors;
use crate::names::GuestName;
use crate::wire::Family;

/// How long an answer is used again. Leases that begin are noticed at once, those that end and
/// addresses that are heard within this time; a pass over the largest lease table takes 20 microseconds.
const REMEMBERED: Duration = Duration::from_millis(200);

/// Where a guest is to be looked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found {
    /// Its address.
    pub address: IpAddr,
    /// The only station that counts, where the address is leased or the guest was named by it.
    pub mac: Option<Mac>,
}

/// What is remembered of a forward's guest. Goes where the forward goes, or a guest that takes another's
/// name would get it there.
#[derive(Debug, Default)]
pub struct Memory {
    /// Who has the name.
    holder: Option<Mac>,
    /// The last answer, for which family, at which generation of the leases, and until when it holds.
    answer: Option<(Option<Found>, Family, u64, Instant)>,
    warned: bool,
}

/// A port as its guest's forwards know it.
#[derive(Debug)]
struct NamedPort {
    name: GuestName,
    mac: Option<Mac>,
}

/// The names and addresses of guests.
#[derive(Debug, Default)]
pub struct Directory {
    leases: Option<Arc<Mutex<LeaseTable>>>,
    ports: HashMap<PortId, NamedPort>,
}

impl Directory {
    /// Where the leases are.
    pub fn set_leases(&mut self, leases: Arc<Mutex<LeaseTable>>) {
        self.leases = Some(leases);
    }

    /// A port's name, and its guest's MAC where that is known.
    pub fn name_port(&mut self, port: PortId, name: GuestName, mac: Option<Mac>) {
        self.ports.insert(port, NamedPort { name, mac });
    }

    /// The port is gone.
    pub fn forget_port(&mut self, port: PortId) {
        self.ports.remove(&port);
    }

    /// Where `guest` is; of several addresses one of `family`, if it has one.
    pub fn find(
        &self,
        guest: &Guest,
        family: Family,
        memory: &mut Memory,
        neighbors: &Neighbors,
        now: Instant,
    ) -> Option<Found> {
        let Some(leases) = &self.leases else {
            return self.search(None, guest, family, memory, neighbors, now);
        };
        let leases = leases.lock().unwrap_or_else(PoisonError::into_inner);
        let generation = leases.generation();
        if let Some((found, of_family, at, until)) = memory.answer
            && (of_family, at) == (family, generation)
            && now < until
        {
            return found;
        }
        let found = self.search(Some(&leases), guest, family, memory, neighbors, now);
        memory.answer = Some((found, family, generation, now + REMEMBERED));
        found
    }

    fn search(
        &self,
        leases: Option<&LeaseTable>,
        guest: &Guest,
        family: Family,
        memory: &mut Memory,
        neighbors: &Neighbors,
        now: Instant,
    ) -> Option<Found> {
        match guest {
            Guest::Own => None,
            &Guest::Address(address) => {
                let holder = match (address, leases) {
                    (IpAddr::V4(address), Some(leases)) => leases.holder(address, now),
                    _ => None,
                };
                let mac = holder.map(|(mac, _)| mac);
                Some(Found { address, mac })
            }
            &Guest::Mac(mac) => of_mac(leases, mac, family, neighbors, now),
            Guest::Name(name) => {
                // Kept for it, whether it asks for the address or has it by hand.
                let reserved = leases.and_then(|leases| leases.reserved_by_name(name));
                if let Some((mac, address)) = reserved {
                    return match family {
                        Family::V4 => Some(Found {
                            address: address.into(),
                            mac: Some(mac),
                        }),
                        Family::V6 => of_mac(leases, mac, family, neighbors, now),
                    };
                }
                let mac = self.holder_of(leases, name, memory, now)?;
                let named = |held: &Held<'_>| held.mac == mac && is_called(held.hostname, name);
                let own = leases.and_then(|leases| leases.held(now).find(named));
                match own.filter(|_| family == Family::V4) {
                    Some(held) => Some(Found {
                        address: held.address.into(),
                        mac: Some(mac),
                    }),
                    None => of_mac(leases, mac, family, neighbors, now),
                }
            }
        }
    }

    /// Whose the name is.
    fn holder_of(
        &self,
        leases: Option<&LeaseTable>,
        name: &GuestName,
        memory: &mut Memory,
        now: Instant,
    ) -> Option<Mac> {
        let leased = leases.into_iter().flat_map(|leases| leases.held(now));
        let leased = leased.filter(|held| is_called(held.hostname, name));
        let ports = self.ports.values().filter(|port| port.name == *name);
        // What the user called a port comes before what a guest calls itself.
        let is_port = ports.clone().next().is_some();
        let claims = leased
            .map(|held| held.mac)
            .filter(|_| !is_port)
            .chain(ports.filter_map(|port| port.mac));
        let (mut first, mut holder, mut disputed) = (None, None, false);
        for mac in claims {
            let before = *first.get_or_insert(mac);
            disputed |= before != mac;
            if memory.holder == Some(mac) {
                holder = Some(mac);
            }
        }
        memory.holder = holder.or(first);
        if disputed && !std::mem::replace(&mut memory.warned, true) {
            log::warn!(
                "more than one guest is called {name}: the forward stays with {}; name it by its MAC",
                memory.holder.unwrap_or_default()
            );
        }
        memory.holder
    }
}

fn is_called(hostname: Option<&GuestName>, name: &GuestName) -> bool {
    hostname.is_some_and(|called| called == name || called.first_label() == name.as_str())
}

fn of_mac(
    leases: Option<&LeaseTable>,
    mac: Mac,
    family: Family,
    neighbors: &Neighbors,
    now: Instant,
) -> Option<Found> {
    let leased = leases.into_iter().flat_map(|leases| leases.held(now));
    let leased = leased
        .filter(|held| held.mac == mac)
        .max_by_key(|held| (held.attached, std::cmp::Reverse(held.address)))
        .map(|held| IpAddr::V4(held.address));
    let address = match leased.filter(|_| family == Family::V4) {
        Some(address) => Some(address),
        None => {
            // The smallest, for no other reason than that it is always the same.
            let heard = neighbors.addresses_of(mac).chain(leased);
            let link_local =
                |address: &IpAddr| matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
            heard
                .filter(|address| !link_local(address))
                .min_by_key(|&address| (Family::of(address) != family, address))
        }
    };
    address.map(|address| Found {
        address,
        mac: Some(mac),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dhcp::DhcpConfig;
    use crate::dhcp::lease::Client;
    use crate::nat::testing::{GUEST, GUEST_MAC, lan};
    use std::net::Ipv4Addr;

    const OTHER_MAC: Mac = Mac([0x52, 0x54, 0, 0, 0, 9]);

    struct Lab {
        directory: Directory,
        leases: Arc<Mutex<LeaseTable>>,
        neighbors: Neighbors,
        memory: Memory,
        now: Instant,
    }

    impl Lab {
        fn new() -> Self {
            let range = DhcpConfig::new(lan()).range();
            let leases = Arc::new(Mutex::new(LeaseTable::new(range, &lan()).unwrap()));
            let mut directory = Directory::default();
            directory.set_leases(Arc::clone(&leases));
            Self {
                directory,
                leases,
                neighbors: Neighbors::new(lan()),
                memory: Memory::default(),
                now: Instant::from_secs(100),
            }
        }

        fn lease(&self, mac: Mac, hostname: &str, secs: u32) -> Ipv4Addr {
            let client = Client {
                mac,
                id: None,
                port: PortId(1),
                hostname: Some(&hostname.parse().unwrap()),
            };
            let mut leases = self.leases.lock().unwrap();
            let address = leases.offer(&client, None, self.now).unwrap();
            leases.commit(&client, address, secs, self.now).unwrap();
            address
        }

        fn find(&mut self, guest: &Guest) -> Option<Found> {
            let Self {
                directory,
                neighbors,
                memory,
                now,
                ..
            } = self;
            directory.find(guest, Family::V4, memory, neighbors, *now)
        }
    }

    fn found(address: Ipv4Addr, mac: Mac) -> Option<Found> {
        Some(Found {
            address: address.into(),
            mac: Some(mac),
        })
    }

    #[test]
    fn an_address_is_its_leases_or_anybodys() {
        let mut lab = Lab::new();
        let address = lab.lease(GUEST_MAC, "web", 60);
        assert_eq!(
            lab.find(&Guest::Address(address.into())),
            found(address, GUEST_MAC)
        );
        lab.memory = Memory::default();
        let free = Guest::Address(GUEST.into());
        if address != GUEST {
            assert_eq!(lab.find(&free).unwrap().mac, None);
        }
    }

    #[test]
    fn a_name_follows_its_lease_and_stays_with_its_holder() {
        let mut lab = Lab::new();
        let name = Guest::Name("web".parse().unwrap());
        assert_eq!(lab.find(&name), None);
        let first = lab.lease(GUEST_MAC, "Web.lab.test", 60);
        assert_eq!(lab.find(&name), found(first, GUEST_MAC), "at once");
        // A second guest claims the name, with whatever address.
        let second = lab.lease(OTHER_MAC, "web", 600);
        assert_eq!(lab.find(&name), found(first, GUEST_MAC));
        assert!(lab.memory.warned);
        lab.now += Duration::from_secs(61);
        assert_eq!(lab.find(&name), found(second, OTHER_MAC));
        // The first comes back, and has lost it.
        lab.lease(GUEST_MAC, "web", 60);
        assert_eq!(lab.find(&name), found(second, OTHER_MAC));
    }

    #[test]
    fn a_port_has_a_name_too() {
        let mut lab = Lab::new();
        let name = Guest::Name("db".parse().unwrap());
        lab.directory
            .name_port(PortId(4), "DB".parse().unwrap(), Some(GUEST_MAC));
        assert_eq!(lab.find(&name), None, "without an address");
        let address = lab
            .leases
            .lock()
            .unwrap()
            .attach(GUEST_MAC, PortId(4), None, lab.now);
        assert_eq!(lab.find(&name), found(address.unwrap(), GUEST_MAC));
        lab.directory.forget_port(PortId(4));
        lab.now += REMEMBERED;
        assert_eq!(lab.find(&name), None);
    }

    #[test]
    fn a_mac_has_its_attached_lease_before_others() {
        let mut lab = Lab::new();
        let client = |id| Client {
            mac: GUEST_MAC,
            id: Some(id),
            port: PortId(1),
            hostname: None,
        };
        let other = {
            let mut leases = lab.leases.lock().unwrap();
            let client = client(b"other");
            let address = leases.offer(&client, None, lab.now).unwrap();
            leases.commit(&client, address, 60, lab.now).unwrap();
            address
        };
        assert_eq!(lab.find(&Guest::Mac(GUEST_MAC)), found(other, GUEST_MAC));
        let attached = lab
            .leases
            .lock()
            .unwrap()
            .attach(GUEST_MAC, PortId(1), None, lab.now);
        assert_eq!(
            lab.find(&Guest::Mac(GUEST_MAC)),
            found(attached.unwrap(), GUEST_MAC)
        );
        lab.memory = Memory::default();
        assert_eq!(lab.find(&Guest::Mac(OTHER_MAC)), None);
    }
}
