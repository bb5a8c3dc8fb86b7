//! Leases and the ports they belong to, and the addresses that stations use without a lease.
//!
//! # Owners
//! [`LeaseTable::open_port`] and [`LeaseTable::close_port`] say which ports live. A lease whose port lives
//! is open to clients on that port alone. When the port goes, or the lease was read from a file, it has no
//! owner, and the first port with its client gets it: a guest that was started anew finds its address. Where
//! lanlet knows the MAC of a port's guest, no other port takes up what that MAC had.
//!
//! lanlet's knowledge comes before who was first: a port whose guest's MAC is known takes over what another port
//! got by that MAC.
//!
//! A port's number is used again in time; nothing of its former bearer is left then, since both ends of a
//! port's life take its number from the entries.
//!
//! # Claims
//! [`LeaseTable::heard`] learns from guests' ARP which addresses are used by whom. What is used without a
//! lease is not given to others. ARP is anybody's word: it gives nobody a lease, keeps no guest whose MAC is
//! known from what it had, and yields to an address that the user names. A hostile guest could claim every address, so a port's claims count
//! against its share, [`CLAIMS_PER_PORT_MAX`] at most; and of an address with a live lease there is no claim.

use std::net::Ipv4Addr;

use super::client::{Client, ClientKey};
use super::{Entry, LeaseTable, Refusal, State};
use crate::frame::{Duration, Instant, Mac, PortId, Station};

/// Addresses without a lease that one port's stations may keep from others: a guest has one or two by hand,
/// one that routes for containers a dozen. A guest that answers every probe delays the first clients that
/// it meets by this many probes, and after that nobody.
pub const CLAIMS_PER_PORT_MAX: usize = 16;
/// When a claim is no hindrance any more if no other address is left: a station that uses its address asks
/// for a neighbour's MAC far more often than that.
pub(super) const CLAIM_TIME: Duration = Duration::from_secs(600);

/// How long a port with too many claims makes no more, without being counted again.
const REFUSED_FOR: Duration = Duration::from_secs(1);

/// An address in use without a lease.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claim {
    pub(super) station: Station,
    pub(super) heard_at: Instant,
}

/// A MAC with an address for as long as its port lives.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attachment {
    pub(super) port: PortId,
    /// `None`: a DHCP client of the guest declined it.
    pub(super) address: Option<Ipv4Addr>,
}

/// What was made of the news that a station uses an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Heard {
    /// It has a lease, or another has: nothing to be learned.
    Leased,
    /// It is kept from others.
    Claimed,
    /// The port claims too many addresses.
    TooMany,
}

impl LeaseTable {
    /// A port begins; `mac` is its guest's, where that is known.
    pub fn open_port(&mut self, port: PortId, mac: Option<Mac>) {
        for entry in self.entries.values_mut() {
            entry.port = entry.port.filter(|&owner| owner != port);
        }
        self.ports.insert(port, mac);
        let own = mac
            .and_then(|mac| self.by_mac.get(&mac))
            .into_iter()
            .flatten();
        for address in own {
            if let Some(entry) = self.entries.get_mut(address)
                && entry.state != State::Attached
            {
                let declared = entry.port.and_then(|owner| self.ports.get(&owner));
                entry.port = entry.port.filter(|_| declared == Some(&mac));
            }
        }
    }

    /// A port ends: its leases stay remembered, and are open to their clients on any port.
    pub fn close_port(&mut self, port: PortId, now: Instant) {
        self.ports.remove(&port);
        self.claims.retain(|_, claim| claim.station.port != port);
        self.refused.remove(&port);
        self.attached.retain(|_, attached| attached.port != port);
        self.reservations.forget_port(port);
        let of_port = self.entries.iter();
        let of_port = of_port.filter(|(_, entry)| entry.port == Some(port));
        let addresses: Vec<Ipv4Addr> = of_port.map(|(&address, _)| address).collect();
        for address in addresses {
            self.disown(address, now);
        }
    }

    fn disown(&mut self, address: Ipv4Addr, now: Instant) {
        let Some(entry) = self.entries.get(&address) else {
            return;
        };
        let mac = entry.key.mac;
        let place = self.place_of(mac, address);
        if matches!(entry.state, State::Offered { .. }) {
            self.end_offer(address);
            return;
        }
        // Of two guests with one identity, the one that came first is remembered.
        let is_second = self.is_second(entry, address);
        let Some(mut entry) = self.remove(address) else {
            return;
        };
        if is_second || !(self.in_pool(address) || self.reservations.is_reserved(address)) {
            return;
        }
        if entry.state == State::Attached {
            entry.state = State::Bound {
                until: now,
                secs: 0,
            };
        }
        (entry.port, entry.seen) = (None, now);
        self.insert(address, entry);
        self.put_in_place(mac, address, place);
    }

    /// Whether a client like this one has an older entry.
    pub(super) fn is_second(&self, entry: &Entry, address: Ipv4Addr) -> bool {
        let own = self.by_mac.get(&entry.key.mac).into_iter().flatten();
        own.take_while(|&&other| other != address)
            .filter_map(|other| self.entries.get(other))
            .any(|other| other.key == entry.key)
            && self.place_of(entry.key.mac, address).is_some()
    }

    /// The port that a lease belongs to, while it lives.
    pub(super) fn owner(&self, entry: &Entry) -> Option<PortId> {
        entry.port.filter(|port| self.ports.contains_key(port))
    }

    /// Whether `mac` is known to be that of this port's guest.
    pub(super) fn is_declared_at(&self, mac: Mac, port: PortId) -> bool {
        self.ports.get(&port) == Some(&Some(mac))
    }

    /// Whether `mac` is known to be that of another port's guest.
    pub(super) fn is_declared_elsewhere(&self, mac: Mac, port: PortId) -> bool {
        !self.is_declared_at(mac, port)
            && self.ports.values().any(|&declared| declared == Some(mac))
    }

    /// Leases an address to a MAC until its port is closed. Every DHCP client with this MAC on this port is
    /// given the same address meanwhile. `wanted`: no other will do.
    ///
    /// # Errors
    /// [`Refusal::MacTaken`]; of `wanted` as [`LeaseTable::reserve_for_port`]; [`Refusal::Exhausted`].
    pub fn attach(
        &mut self,
        mac: Mac,
        port: PortId,
        wanted: Option<Ipv4Addr>,
        now: Instant,
    ) -> Result<Ipv4Addr, Refusal> {
        if self.attached.contains_key(&mac) {
            return Err(Refusal::MacTaken);
        }
        self.sweep(now);
        let client = Client {
            mac,
            id: None,
            port,
            hostname: None,
        };
        let address = match (wanted, self.find(&client, now)) {
            (Some(wanted), own) => {
                if own != Some(wanted) {
                    self.check_reservable(wanted, mac, now)?;
                }
                self.overrule(wanted, mac);
                wanted
            }
            (None, Some(own)) => own,
            // It must not wait for a probe. What the gateway has heard of is passed over.
            (None, None) => self.choose(&ClientKey::new(mac, None), None, now)?,
        };
        self.put(&client, address, (State::Attached, now));
        let address_of = Attachment {
            port,
            address: Some(address),
        };
        self.attached.insert(mac, address_of);
        Ok(address)
    }

    /// A station uses an address, as its ARP says.
    pub fn heard(&mut self, address: Ipv4Addr, station: Station, now: Instant) -> Heard {
        let Station { mac, port } = station;
        if !self.in_pool(address) && !self.reservations.is_reserved(address) {
            return Heard::Leased;
        }
        if let Some(entry) = self.entries.get(&address)
            && entry.state.is_live(now)
        {
            let owner = self.owner(entry);
            let is_its = entry.key.mac == mac;
            let is_offered = matches!(entry.state, State::Offered { .. });
            // Without an owner it is the claim that keeps the address from others.
            let is_ownerless = is_its && owner.is_none();
            if (is_its && owner == Some(port) || is_ownerless)
                && let Some(entry) = self.entries.get_mut(&address)
            {
                entry.seen = now;
            }
            if !is_ownerless && (is_its || !is_offered) {
                return Heard::Leased;
            }
        }
        if let Some(claim) = self.claims.get_mut(&address) {
            if claim.station == station {
                claim.heard_at = now;
                return Heard::Claimed;
            }
            if now < claim.heard_at + CLAIM_TIME {
                return Heard::Leased;
            }
        }
        // A guest can send any number of these, and the count walks the table.
        let refused_at = self.refused.get(&port);
        if refused_at.is_some_and(|&at| now < at + REFUSED_FOR) {
            return Heard::TooMany;
        }
        let limit = CLAIMS_PER_PORT_MAX.min(self.share());
        if self.claims_of(port) >= limit || self.held_by(port, now) >= self.share() {
            self.refused.insert(port, now);
            return Heard::TooMany;
        }
        let heard_at = now;
        self.claims.insert(address, Claim { station, heard_at });
        Heard::Claimed
    }

    /// Addresses that a port's stations use without a lease.
    pub(super) fn claims_of(&self, port: PortId) -> usize {
        let claims = self.claims.values();
        claims.filter(|claim| claim.station.port == port).count()
    }

    /// The port of the guest whose own address this is, for as long as both live.
    pub fn attached_port(&self, address: Ipv4Addr) -> Option<PortId> {
        let entry = self.entries.get(&address)?;
        self.owner(entry).filter(|_| entry.state == State::Attached)
    }

    /// Drops the claim of an address that its user gave to a guest of this MAC.
    pub(super) fn overrule(&mut self, address: Ipv4Addr, mac: Mac) {
        let Some(claim) = self.claim_against(address, mac) else {
            return;
        };
        self.claims.remove(&address);
        if !std::mem::replace(&mut self.warned_of_claim, true) {
            log::warn!(
                "{address} is {mac}'s as its user says, and {} on port {} was heard to use it",
                claim.station.mac,
                claim.station.port
            );
        }
    }

    /// The claim that keeps `address` from a client of this MAC.
    pub(super) fn claim_against(&self, address: Ipv4Addr, mac: Mac) -> Option<Claim> {
        let claim = self.claims.get(&address).copied();
        claim.filter(|claim| claim.station.mac != mac)
    }
}
