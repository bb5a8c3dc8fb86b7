//! The ports of a network: their numbers, and what lives and ends with each.

use std::any::Any;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::{NetworkError, Shared, lock};
use crate::dhcp::lease::Refusal;
use crate::frame::{Mac, PortId, WorkerId};
use crate::names::{GroupName, GuestName};
use crate::port::{DropSource, PortRx, PortTx};
use crate::stats::PortCounters;
use crate::switch::PORTS_MAX;
use crate::tap::Helper;
use crate::worker::{Command, Crew, Readers, Reception};

/// How long a port waits for one of its name or MAC to go. A guest that is started again at once finds
/// its predecessor's end still under way: the kernel takes down the tap of a VMM that was killed in some
/// 10 ms, a busy machine in more.
const SUCCESSION_WAIT: Duration = Duration::from_secs(1);

#[derive(Default)]
pub(super) struct Ports {
    pub(super) last: u16,
    pub(super) by_id: BTreeMap<PortId, Port>,
}

#[derive(Clone)]
pub(super) struct Port {
    pub(super) name: GuestName,
    pub(super) group: Option<GroupName>,
    pub(super) kind: &'static str,
    pub(super) mac: Option<Mac>,
    /// The address that was asked for it.
    pub(super) ip: Option<Ipv4Addr>,
    /// The lease of `mac` ends with the port.
    pub(super) leased: bool,
    pub(super) counters: Arc<PortCounters>,
    pub(super) drops: Vec<Arc<dyn DropSource>>,
    pub(super) wire: Option<PortWire>,
    /// The process whose namespaces are the guest's.
    pub(super) process: Option<Arc<OwnedFd>>,
    pub(super) queues: usize,
    /// The worker that reads it, or its first queue.
    pub(super) reader: WorkerId,
    pub(super) attached_at: Instant,
    /// Whatever else ends with the port.
    pub(super) _attached: Option<Arc<dyn Any + Send + Sync>>,
}

/// The guest of a port to be.
pub(super) struct PortGuest {
    /// Its name; `None`: one is made.
    pub(super) name: Option<GuestName>,
    pub(super) group: Option<GroupName>,
    pub(super) mac: Option<Mac>,
    /// The address that it, or where it is not leased a client behind it, is to have.
    pub(super) ip: Option<Ipv4Addr>,
    /// It gets an address for its MAC, which ends with the port.
    pub(super) leased: bool,
}

/// The wire behind a VMM's port.
#[derive(Clone)]
pub(super) struct PortWire {
    pub(super) helper: Arc<Helper>,
    pub(super) id: u64,
}

/// The halves of one queue of a port.
pub(super) type Queue = (Box<dyn PortRx>, Arc<dyn PortTx>);

/// A port's halves and what belongs to them, before it has a number.
pub(super) struct Opened {
    pub(super) counters: Arc<PortCounters>,
    pub(super) queues: Vec<Queue>,
    pub(super) drops: Vec<Arc<dyn DropSource>>,
    pub(super) kind: &'static str,
    pub(super) wire: Option<PortWire>,
    pub(super) process: Option<Arc<OwnedFd>>,
    pub(super) attached: Option<Arc<dyn Any + Send + Sync>>,
}

impl Ports {
    /// The next number after the last one given: a number is not taken up again at once, so that a
    /// late event of an old port does not hit a fresh one.
    fn free_id(&mut self) -> Option<PortId> {
        let count = PORTS_MAX as u16;
        let id = (1..count)
            .map(|step| PortId(1 + (self.last + step - 1) % (count - 1)))
            .find(|id| !self.by_id.contains_key(id))?;
        self.last = id.0;
        Some(id)
    }

    /// The port called `name`.
    pub(super) fn called(&self, name: &GuestName) -> Option<PortId> {
        let mut ports = self.by_id.iter();
        ports.find_map(|(&id, port)| (port.name == *name).then_some(id))
    }

    /// Whether a port stands in the way of `guest`: it has the name, the address of the MAC or the one wanted.
    fn hinders(&self, guest: &PortGuest) -> bool {
        let leases = |port: &Port| port.leased && guest.leased && port.mac == guest.mac;
        let named = |port: &Port| guest.name.as_ref() == Some(&port.name);
        let has_ip = |port: &Port| guest.ip.is_some() && port.ip == guest.ip;
        let mut ports = self.by_id.values();
        ports.any(|port| named(port) || leases(port) || has_ip(port))
    }

    /// A name for a port that nobody named. Rules and forwards can say it, so it is no other port's.
    fn make_name(&self, kind: &'static str, id: PortId) -> GuestName {
        let name = GuestName::numbered(kind, id);
        if self.called(&name).is_none() {
            return name;
        }
        // There are fewer ports than numbers.
        let mut others = (2..).map(|nth| name.again(nth));
        let free = others.find(|other| self.called(other).is_none());
        free.unwrap_or(name)
    }

    /// The worker that the fewest ports are at home with.
    fn least_used(&self, crew: &Crew) -> WorkerId {
        let mut used = vec![0; crew.members().len()];
        for &id in self.by_id.keys().filter(|&&id| id != PortId::GATEWAY) {
            used[usize::from(crew.homes().of(id).0)] += 1;
        }
        let least = (0..used.len()).min_by_key(|&worker| used[worker]);
        WorkerId(least.unwrap_or_default() as u8)
    }
}

impl Shared {
    /// Gives a port its number and hands it to the worker. Where a port stands in its way that goes within
    /// [`SUCCESSION_WAIT`], it takes that one's place.
    ///
    /// # Errors
    /// The name or the MAC is another port's, or there is no number or address left.
    pub(super) fn add_port(
        &self,
        opened: Opened,
        guest: PortGuest,
    ) -> Result<(PortId, Option<Ipv4Addr>), NetworkError> {
        let Opened {
            counters,
            queues,
            drops,
            kind,
            wire,
            process,
            attached,
        } = opened;
        let mut ports = self.wait_for_place(&guest);
        let PortGuest {
            name,
            group,
            mac,
            ip,
            leased,
        } = guest;
        if let Some(name) = &name
            && let Some(port) = ports.called(name)
        {
            return Err(NetworkError::NameTaken {
                name: name.clone(),
                port,
            });
        }
        let id = ports.free_id().ok_or(NetworkError::PortsFull)?;
        // Before any frame of the port, and before the port is there: where it fails, the lease that stands
        // in its way is not touched.
        let address = self.open_leases(id, (mac, ip), leased)?;
        let name = name.unwrap_or_else(|| ports.make_name(kind, id));
        let home = ports.least_used(&self.crew);
        log::debug!("port {id} ({name}) attached");
        let port = Port {
            name: name.clone(),
            group: group.clone(),
            kind,
            mac,
            ip,
            leased: address.is_some(),
            counters: Arc::clone(&counters),
            drops,
            wire,
            process,
            queues: queues.len(),
            reader: home,
            attached_at: Instant::now(),
            _attached: attached,
        };
        ports.by_id.insert(id, port);
        self.crew.homes().set(id, home);
        // Sent before the lock is gone: nobody can detach the port, and so have the workers remove it,
        // before they were told to add it.
        let mut added = self.crew.tell_all(|_| Command::NamePort {
            id,
            name: name.clone(),
            mac,
        });
        // The n-th queue is read by the n-th worker from the home on. Each worker sends by the queue
        // that it reads: the kernel then gives it the other direction of the flow, too.
        let workers = self.crew.members().len();
        let (receivers, senders): (Vec<_>, Vec<_>) = queues.into_iter().unzip();
        let home = usize::from(home.0);
        let reader = |(nth, rx)| {
            let reception = Reception {
                port: id,
                rx,
                counters: Arc::clone(&counters),
            };
            (WorkerId(((home + nth) % workers) as u8), reception)
        };
        let readers = receivers.into_iter().enumerate().map(reader).collect();
        let readers: Readers = Arc::new(Mutex::new(readers));
        added &= self.crew.tell_all(|worker| {
            let nth = (usize::from(worker.0) + workers - home) % workers;
            Command::AddPort {
                id,
                tx: Arc::clone(&senders[nth % senders.len()]),
                counters: Arc::clone(&counters),
                name: name.clone(),
                group: group.clone(),
                readers: Arc::clone(&readers),
            }
        });
        self.crew.hand_out(readers);
        drop(ports);
        if added {
            return Ok((id, address));
        }
        self.detach(id);
        Err(NetworkError::Ended(lock(&self.end).clone().flatten()))
    }

    /// The ports, once none stands in the way of `guest` or [`SUCCESSION_WAIT`] is over.
    fn wait_for_place(&self, guest: &PortGuest) -> MutexGuard<'_, Ports> {
        let ports = lock(&self.ports);
        let hindered = |ports: &mut Ports| ports.hinders(guest);
        let waited = self
            .port_removed
            .wait_timeout_while(ports, SUCCESSION_WAIT, hindered);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Whether no port has this MAC, or none has once [`SUCCESSION_WAIT`] is over.
    pub(super) fn wait_for_mac(&self, mac: Mac) -> bool {
        let ports = lock(&self.ports);
        let is_taken = |ports: &Ports| ports.by_id.values().any(|port| port.mac == Some(mac));
        let waited = self
            .port_removed
            .wait_timeout_while(ports, SUCCESSION_WAIT, |ports| is_taken(ports));
        let ports = waited.unwrap_or_else(PoisonError::into_inner).0;
        !is_taken(&ports)
    }

    /// Tells the lease table of a port, and gets its guest's address or has it kept.
    fn open_leases(
        &self,
        id: PortId,
        (mac, ip): (Option<Mac>, Option<Ipv4Addr>),
        leased: bool,
    ) -> Result<Option<Ipv4Addr>, NetworkError> {
        let now = self.now();
        let mut leases = lock(&self.leases);
        leases.open_port(id, mac);
        let given = match (mac, ip) {
            (Some(mac), ip) if leased => leases.attach(mac, id, ip, now).map(Some),
            (Some(mac), Some(ip)) => leases.reserve_for_port(id, mac, ip, now).map(|()| None),
            _ => Ok(None),
        };
        given.map_err(|cause| {
            leases.close_port(id, now);
            let mac = mac.unwrap_or_default();
            match (cause, ip) {
                (Refusal::MacTaken, _) => NetworkError::MacTaken { mac },
                (cause, Some(ip)) => NetworkError::NotThisAddress { ip, cause },
                (cause, None) => NetworkError::NoAddress { mac, cause },
            }
        })
    }

    /// Removes a port and what lives with it.
    pub(super) fn detach(&self, id: PortId) {
        if let Some(PortWire { helper, id }) = self.remove_port(id) {
            // The helper may be gone with its wires already.
            let _ = helper.destroy_wire(id);
        }
    }

    /// Removes a port; its wire is left to the caller, to take down without a lock held.
    fn remove_port(&self, id: PortId) -> Option<PortWire> {
        let mut ports = lock(&self.ports);
        let port = ports.by_id.remove(&id)?;
        log::debug!("port {id} ({}) detached", port.name);
        // Before the number can be another port's.
        self.crew.tell_all(|_| Command::RemovePort(id));
        // Before a successor asks for the address.
        lock(&self.leases).close_port(id, self.now());
        drop(ports);
        self.port_removed.notify_all();
        port.wire
    }

    /// Removes the ports on the wires of `helper` that `gone` names: the helper has forgotten them,
    /// or is gone itself. It is asked nothing, since it may be waiting for this very thread to take
    /// its notices.
    pub(super) fn drop_wires(&self, helper: &Weak<Helper>, gone: impl Fn(u64) -> bool) {
        let is_gone = |wire: &PortWire| {
            std::ptr::eq(Arc::as_ptr(&wire.helper), helper.as_ptr()) && gone(wire.id)
        };
        let ports: Vec<PortId> = lock(&self.ports)
            .by_id
            .iter()
            .filter(|(_, port)| port.wire.as_ref().is_some_and(is_gone))
            .map(|(&id, _)| id)
            .collect();
        for id in ports {
            self.remove_port(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port() -> Port {
        Port {
            name: "p".parse().unwrap(),
            group: None,
            kind: "test",
            mac: None,
            ip: None,
            leased: false,
            counters: Arc::default(),
            drops: Vec::new(),
            wire: None,
            process: None,
            queues: 1,
            reader: WorkerId(0),
            attached_at: Instant::now(),
            _attached: None,
        }
    }

    #[test]
    fn numbers_go_round_and_pass_over_those_in_use() {
        let mut ports = Ports::default();
        let last = PORTS_MAX as u16 - 1;
        ports.by_id.insert(PortId::GATEWAY, port());
        ports.by_id.insert(PortId(2), port());
        let round: Vec<u16> = (0..last).map(|_| ports.free_id().unwrap().0).collect();
        let expected: Vec<u16> = [1].into_iter().chain(3..=last).chain([1]).collect();
        assert_eq!(round, expected, "one that is free again comes last");
        for id in 1..=last {
            ports.by_id.insert(PortId(id), port());
        }
        assert_eq!(ports.free_id(), None);
        ports.by_id.remove(&PortId(7));
        assert_eq!(ports.free_id(), Some(PortId(7)));
    }

    #[test]
    fn a_made_name_is_no_other_ports() {
        let mut ports = Ports::default();
        let made = |ports: &Ports| ports.make_name("tap", PortId(3)).to_string();
        assert_eq!(made(&ports), "tap3");
        for taken in ["tap3", "tap3-2"] {
            let name = taken.parse().unwrap();
            let id = PortId(ports.by_id.len() as u16 + 7);
            ports.by_id.insert(id, Port { name, ..port() });
        }
        assert_eq!(made(&ports), "tap3-3");
        assert_eq!(ports.called(&"TAP3".parse().unwrap()), Some(PortId(7)));
    }

    #[test]
    fn who_stands_in_the_way() {
        let mut ports = Ports::default();
        let mac = Some(Mac([2, 0, 0, 0, 0, 1]));
        ports.by_id.insert(
            PortId(1),
            Port {
                mac,
                leased: true,
                ..port()
            },
        );
        let guest = |name: Option<&str>, mac, leased| PortGuest {
            name: name.map(|name| name.parse().unwrap()),
            group: None,
            mac,
            ip: None,
            leased,
        };
        assert!(ports.hinders(&guest(Some("P"), None, false)));
        assert!(ports.hinders(&guest(Some("q"), mac, true)));
        for free in [guest(Some("q"), mac, false), guest(None, None, false)] {
            assert!(!ports.hinders(&free));
        }
    }
}
