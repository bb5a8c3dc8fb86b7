//! Addresses that are kept for one guest: by its MAC for good, or for a port as long as it lives. They may
//! lie outside the pool.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use super::client::Client;
use super::{LeaseTable, Refusal, State};
use crate::frame::{Instant, Mac, PortId};
use crate::names::GuestName;

/// Reservations at most: one for each port that a network can have, so that every guest can have one.
pub const RESERVATIONS_MAX: usize = 4_096;

/// An address that is kept for one guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reservation {
    /// Its MAC.
    pub mac: Mac,
    /// The address.
    pub address: Ipv4Addr,
    /// What it is called, whatever it calls itself.
    pub name: Option<GuestName>,
}

/// Why an address can't be kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReserveError {
    /// Not an address that a guest may have.
    #[error("{0} is no address for a guest of this LAN")]
    NoGuest(Ipv4Addr),
    /// It is kept for another.
    #[error("{0} is reserved twice")]
    AddressTwice(Ipv4Addr),
    /// The guest has one.
    #[error("{0} has two addresses reserved")]
    MacTwice(Mac),
    /// The table is full.
    #[error("more than {RESERVATIONS_MAX} addresses are reserved")]
    Full,
}

#[derive(Clone, Debug)]
struct Kept {
    /// Of a port's reservation, that of the first client on it.
    mac: Option<Mac>,
    port: Option<PortId>,
    name: Option<GuestName>,
}

/// The reservations of a table, by address.
#[derive(Debug, Default)]
pub(super) struct Reservations(BTreeMap<Ipv4Addr, Kept>);

impl Reservations {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_reserved(&self, address: Ipv4Addr) -> bool {
        self.0.contains_key(&address)
    }

    pub(super) fn forget_port(&mut self, port: PortId) {
        self.0.retain(|_, kept| kept.port != Some(port));
    }

    /// A port's reservation becomes that of its first client.
    pub(super) fn bind(&mut self, address: Ipv4Addr, client: &Client<'_>) {
        let kept = self.0.get_mut(&address);
        if let Some(kept) = kept.filter(|kept| kept.port == Some(client.port)) {
            kept.mac.get_or_insert(client.mac);
        }
    }

    /// The MAC that this address is reserved for, where that is known.
    pub(super) fn mac_of(&self, address: Ipv4Addr) -> Option<Mac> {
        self.0.get(&address)?.mac
    }

    /// The name of whoever has this address.
    pub(super) fn name_of(&self, address: Ipv4Addr) -> Option<&GuestName> {
        self.0.get(&address)?.name.as_ref()
    }

    /// Whether a reservation of another address has this name, whole or up to the first dot.
    pub(super) fn is_named_for_other(&self, name: &GuestName, address: Ipv4Addr) -> bool {
        self.0.iter().any(|(&other, kept)| {
            let reserved = kept.name.as_ref();
            other != address
                && reserved.is_some_and(|reserved| {
                    name == reserved || name.first_label() == reserved.as_str()
                })
        })
    }
}

impl LeaseTable {
    /// Keeps an address for a MAC. What others were leased of it in an earlier run is forgotten.
    ///
    /// # Errors
    /// The address or the MAC can't have the reservation.
    pub fn reserve(&mut self, reservation: &Reservation) -> Result<(), ReserveError> {
        let Reservation { mac, address, name } = reservation;
        let (mac, address) = (*mac, *address);
        if !self.lan.is_guest(address) {
            return Err(ReserveError::NoGuest(address));
        }
        if self.reservations.is_reserved(address) {
            return Err(ReserveError::AddressTwice(address));
        }
        let mut all = self.reservations.0.values();
        if all.any(|kept| kept.port.is_none() && kept.mac == Some(mac)) {
            return Err(ReserveError::MacTwice(mac));
        }
        if self.reservations.len() >= RESERVATIONS_MAX {
            return Err(ReserveError::Full);
        }
        if self
            .entries
            .get(&address)
            .is_some_and(|entry| entry.key.mac != mac)
        {
            self.remove(address);
        }
        let kept = Kept {
            mac: Some(mac),
            port: None,
            name: name.clone(),
        };
        self.reservations.0.insert(address, kept);
        Ok(())
    }

    /// Keeps an address for the guest of a port, by whatever MAC it asks first, until the port is closed.
    ///
    /// # Errors
    /// [`Refusal::NoGuest`]: no guest may have it. [`Refusal::Reserved`] or [`Refusal::Taken`]: another
    /// guest has it.
    pub fn reserve_for_port(
        &mut self,
        port: PortId,
        mac: Mac,
        address: Ipv4Addr,
        now: Instant,
    ) -> Result<(), Refusal> {
        self.check_reservable(address, mac, now)?;
        self.overrule(address, mac);
        // Its own by MAC already.
        if self.reservations.is_reserved(address) {
            return Ok(());
        }
        let other = self.entries.get(&address);
        if other.is_some_and(|entry| entry.key.mac != mac) {
            self.remove(address);
        }
        let kept = Kept {
            mac: None,
            port: Some(port),
            name: None,
        };
        self.reservations.0.insert(address, kept);
        Ok(())
    }

    /// Whether a guest of `mac` can have `address` and nobody else: not reserved for others, nor leased to
    /// one whose port lives.
    pub(super) fn check_reservable(
        &self,
        address: Ipv4Addr,
        mac: Mac,
        now: Instant,
    ) -> Result<(), Refusal> {
        if !self.lan.is_guest(address) {
            return Err(Refusal::NoGuest);
        }
        if let Some(kept) = self.reservations.0.get(&address)
            && (kept.port.is_some() || kept.mac != Some(mac))
        {
            return Err(Refusal::Reserved);
        }
        let is_leased = self
            .entries
            .get(&address)
            .is_some_and(|entry| entry.state.is_live(now) && self.owner(entry).is_some());
        if is_leased {
            return Err(Refusal::Taken);
        }
        Ok(())
    }

    /// The address that is kept for a client, unless another port's guest with its MAC has it.
    pub(super) fn reserved_for(&self, client: &Client<'_>, now: Instant) -> Option<Ipv4Addr> {
        let all = self.reservations.0.iter();
        let (&address, _) = all
            .filter(|(_, kept)| match (kept.port, kept.mac) {
                (Some(port), mac) => port == client.port && mac.is_none_or(|mac| mac == client.mac),
                (None, mac) => {
                    mac == Some(client.mac) && !self.is_declared_elsewhere(client.mac, client.port)
                }
            })
            // A port's own before that of a MAC.
            .min_by_key(|(_, kept)| kept.port.is_none())?;
        let is_open = self.entries.get(&address).is_none_or(|entry| {
            // Who took the MAC before its guest came has to give way.
            let is_free = !entry.state.is_live(now)
                || self.is_declared_at(client.mac, client.port)
                || self.owner(entry).is_none_or(|owner| owner == client.port);
            is_free && !matches!(entry.state, State::Quarantined { until } if now < until)
        });
        is_open.then_some(address)
    }

    /// The address that is kept for a guest of this name, and its MAC.
    pub fn reserved_by_name(&self, name: &GuestName) -> Option<(Mac, Ipv4Addr)> {
        self.reservations.0.iter().find_map(|(&address, kept)| {
            (kept.name.as_ref() == Some(name)).then_some((kept.mac?, address))
        })
    }
}
