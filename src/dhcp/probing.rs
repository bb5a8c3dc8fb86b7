//! Answers that wait until the LAN was asked whether somebody has the address (RFC 2131 3.1, 4.3.1).
//!
//! The question is an ARP probe (RFC 5227 2.1.1). The worker of the answering port hears the answer, and
//! [`DhcpServer::observe`] notes it in the lease table, which all workers share; when the wait is over the table says
//! what came of it. An address in use is passed over from then on, and the client's next one
//! is probed in turn.
//!
//! # Limits
//! [`PENDING_MAX`] answers wait at a time, [`PENDING_PER_PORT_MAX`] of a port; beyond, messages are dropped
//! and their clients ask again. A client that repeats itself meanwhile waits once. A client gets its address
//! after [`PROBES_MAX`] at most, which only guests that answer for every address make necessary.

use std::collections::VecDeque;
use std::net::Ipv4Addr;

use super::{
    DhcpServer, DropReason, Handled, Heard, Instant, MessageType, Outbox, PortId, Probed, Refusal,
    Request, Station, arp, client_of,
};
use crate::frame::Duration;
use crate::wire::Packet;

/// How long an answer to a probe is waited for. All stations are one hop away, and an emulated guest on a
/// busy machine answers ARP within some ten milliseconds; clients repeat themselves after a second at the
/// earliest (iPXE), and later answers still count for the next client.
pub const PROBE_WAIT: Duration = Duration::from_millis(300);
/// Answers that wait at most: as many guests boot at once. A message looks at each, which takes 1 us.
pub const PENDING_MAX: usize = 1024;
/// Answers that wait of one port's clients: a guest that hosts others, or has a LAN of machines behind it.
/// 160 clients a second get a new address that way.
pub const PENDING_PER_PORT_MAX: usize = 48;
/// Addresses that are tried for one client.
const PROBES_MAX: u8 = 32;

/// A message whose answer waits.
struct Pending {
    request: Request,
    port: PortId,
    address: Ipv4Addr,
    due: Instant,
    left: u8,
}

/// The answers that wait, the first to be given in front: all wait equally long.
#[derive(Default)]
pub(super) struct Probing(VecDeque<Pending>);

impl Probing {
    /// Whether a message repeats one whose answer waits: then the answer goes to the later one. Any other
    /// message of that client takes back the one that waits.
    pub(super) fn renew(&mut self, request: &Request, port: PortId) -> bool {
        let is_same_client = |pending: &Pending| {
            let (own, other) = (&pending.request, request);
            pending.port == port && (own.mac, &own.client_id) == (other.mac, &other.client_id)
        };
        let Some(at) = self.0.iter().position(is_same_client) else {
            return false;
        };
        let own = &self.0[at].request;
        let wants = |request: &Request| (request.server, request.requested, request.ciaddr);
        if own.kind != request.kind || wants(own) != wants(request) {
            self.0.remove(at);
            return false;
        }
        self.0[at].request = request.clone();
        true
    }

    fn pop_due(&mut self, now: Instant) -> Option<Pending> {
        let is_due = self.0.front().is_some_and(|pending| pending.due <= now);
        is_due.then(|| self.0.pop_front()).flatten()
    }

    fn of_port(&self, port: PortId) -> usize {
        self.0.iter().filter(|pending| pending.port == port).count()
    }
}

impl DhcpServer {
    /// When [`DhcpServer::handle_timeout`] has something to do next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.probing.0.front().map(|pending| pending.due)
    }

    /// Gives the answers whose wait is over.
    pub fn handle_timeout(&mut self, now: Instant, out: &mut dyn Outbox) {
        while let Some(pending) = self.probing.pop_due(now) {
            let client = client_of(&pending.request, pending.port);
            let probed = self.leases().settle_probe(&client, pending.address, now);
            let Pending {
                request, address, ..
            } = &pending;
            // What is refused here was counted, and no frame is there to be dropped.
            let _ = match (probed, request.kind) {
                (Probed::Gone, _) => Ok(()),
                (Probed::Free, MessageType::Discover) => {
                    self.offer(request, &client, *address, now, out)
                }
                (Probed::Free, _) => self.grant(request, &client, *address, now, out),
                (Probed::InUse, kind) => {
                    self.counters.in_use += 1;
                    log::debug!("{address} is in use, and {} does not get it", request.mac);
                    match kind {
                        MessageType::Discover => self.try_next(pending, now, out),
                        _ => self.reject(request, &client, Refusal::Taken, out),
                    }
                }
            };
        }
    }

    /// Forgets the answers to a port that is gone.
    pub fn forget_port(&mut self, port: PortId) {
        self.probing.0.retain(|pending| pending.port != port);
    }

    /// Learns from a packet which station uses which address.
    pub fn observe(&mut self, packet: &Packet<'_>, now: Instant) {
        let Some(address) = arp::spoken_for(packet) else {
            return;
        };
        let station = Station {
            mac: packet.source,
            port: packet.ingress,
        };
        let heard = self.leases().heard(address, station, now);
        self.counters.claims_ignored += u64::from(heard == Heard::TooMany);
    }

    /// Asks the LAN for `address`, and answers the client later.
    pub(super) fn probe(
        &mut self,
        request: &Request,
        port: PortId,
        address: Ipv4Addr,
        now: Instant,
        out: &mut dyn Outbox,
    ) -> Handled {
        let pending = Pending {
            request: request.clone(),
            port,
            address,
            due: now + PROBE_WAIT,
            left: PROBES_MAX - 1,
        };
        self.wait_for_answers(pending, out)
    }

    fn try_next(&mut self, pending: Pending, now: Instant, out: &mut dyn Outbox) -> Handled {
        let client = client_of(&pending.request, pending.port);
        let (address, is_unprobed) = self.choose(&pending.request, &client, now)?;
        if !is_unprobed {
            return self.offer(&pending.request, &client, address, now, out);
        }
        let left = pending.left.checked_sub(1).ok_or(DropReason::Limit)?;
        let due = now + PROBE_WAIT;
        let next = Pending {
            address,
            due,
            left,
            ..pending
        };
        self.wait_for_answers(next, out)
    }

    fn wait_for_answers(&mut self, pending: Pending, out: &mut dyn Outbox) -> Handled {
        let waiting = self.probing.0.len();
        if waiting >= PENDING_MAX || self.probing.of_port(pending.port) >= PENDING_PER_PORT_MAX {
            self.counters.limited += 1;
            return Err(DropReason::Limit);
        }
        self.counters.probes += 1;
        arp::probe(&self.config.lan, pending.address, out);
        self.probing.0.push_back(pending);
        Ok(())
    }
}
