//! Which address a client gets that has none, and who may have one at all.
//!
//! The one it asks for, if free; else a hash of its identity, so that a guest meets the same address again
//! even where no lease was kept; else the address whose lease ended longest ago; else that of the lease
//! unseen longest whose port is gone (a guest that ended without a word leaves an hour of lease behind, and
//! a hundred of them a full pool); else one that a station took without a lease and was not heard to use
//! for [`CLAIM_TIME`].

use std::net::Ipv4Addr;

use super::client::{Client, ClientKey};
use super::ports::CLAIM_TIME;
use super::{
    Entry, LEASES_MAX, LEASES_PER_MAC_MAX, LeaseTable, PORT_SHARE_DIVISOR, PORT_SHARE_MIN, Refusal,
    State,
};
use crate::frame::{Instant, Mac, PortId};

impl LeaseTable {
    /// Addresses that one port may hold, by leases and by claims together.
    pub(super) fn share(&self) -> usize {
        let pool = self.pool_size();
        let least = PORT_SHARE_MIN.min(pool / 2).max(1);
        usize::try_from((pool / PORT_SHARE_DIVISOR).max(least)).unwrap_or(usize::MAX)
    }

    /// An ended lease counts against the limits again when its client comes back for it.
    pub(super) fn check_revival(
        &self,
        client: &Client<'_>,
        address: Ipv4Addr,
        now: Instant,
    ) -> Result<(), Refusal> {
        if self.is_free(address, now) && !self.reservations.is_reserved(address) {
            self.check_limits(client, now)
        } else {
            Ok(())
        }
    }

    /// A pass over all entries: only clients without a live lease come here.
    pub(super) fn check_limits(&self, client: &Client<'_>, now: Instant) -> Result<(), Refusal> {
        let of_mac = self.leased_by(client.port, now);
        let of_mac = of_mac.filter(|entry| entry.key.mac == client.mac);
        if of_mac.count() >= LEASES_PER_MAC_MAX || self.held_by(client.port, now) >= self.share() {
            return Err(Refusal::Limit);
        }
        Ok(())
    }

    fn leased_by(&self, port: PortId, now: Instant) -> impl Iterator<Item = &Entry> {
        self.entries.values().filter(move |entry| {
            entry.port == Some(port) && entry.state != State::Attached && entry.state.is_live(now)
        })
    }

    /// Addresses that a port holds.
    pub(super) fn held_by(&self, port: PortId, now: Instant) -> usize {
        self.leased_by(port, now).count() + self.claims_of(port)
    }

    /// A free address for a client that has none.
    pub(super) fn choose(
        &mut self,
        key: &ClientKey,
        wanted: Option<Ipv4Addr>,
        now: Instant,
    ) -> Result<Ipv4Addr, Refusal> {
        let wanted = wanted.filter(|&wanted| {
            self.is_for(wanted, key.mac) && self.is_nobodys(wanted, key.mac, now)
        });
        if let Some(address) = wanted.or_else(|| self.untouched(key)) {
            self.make_room(address, now)?;
            return Ok(address);
        }
        let mut ended = self.ends.iter().take_while(|(until, _)| *until <= now);
        if let Some(&(_, address)) = ended.find(|(_, address)| self.is_for(*address, key.mac)) {
            return Ok(address);
        }
        let address = self.abandoned(Some(key.mac), now);
        let address = address.or_else(|| self.silent_claim(now));
        let address = address.ok_or(Refusal::Exhausted)?;
        self.warn_of_full_pool(address, now);
        Ok(address)
    }

    /// Whether a client of `mac` may be given this address, but for leases.
    fn is_for(&self, address: Ipv4Addr, mac: Mac) -> bool {
        self.in_pool(address)
            && !self.reservations.is_reserved(address)
            && self.claim_against(address, mac).is_none()
    }

    /// The first address from the client's hash on that is in no entry.
    fn untouched(&self, key: &ClientKey) -> Option<Ipv4Addr> {
        let size = u64::from(self.last - self.first) + 1;
        // Among one more address than there are taken ones and gateways, one is untouched.
        let taken = self.entries.len() + self.claims.len() + self.reservations.len();
        let tries = size.min(taken as u64 + 2);
        (0..tries)
            .map(|step| {
                let offset = (key.hash() % size + step) % size;
                // Below `size`, which fits.
                Ipv4Addr::from_bits(self.first + offset as u32)
            })
            .find(|address| self.is_for(*address, key.mac) && !self.entries.contains_key(address))
    }

    /// The address of the live lease that is unseen longest and has no port, to be given to `mac`; of any
    /// address, to make room in the table.
    fn abandoned(&self, mac: Option<Mac>, now: Instant) -> Option<Ipv4Addr> {
        self.entries
            .iter()
            .filter(|(address, entry)| {
                let ends = matches!(entry.state, State::Bound { .. } | State::Quarantined { .. });
                ends && entry.state.is_live(now)
                    && self.owner(entry).is_none()
                    && mac.is_none_or(|mac| self.is_for(**address, mac))
            })
            .min_by_key(|(_, entry)| entry.seen)
            .map(|(&address, _)| address)
    }

    /// An address in no live lease whose station was not heard for long.
    fn silent_claim(&mut self, now: Instant) -> Option<Ipv4Addr> {
        let is_silent = |address: &Ipv4Addr, heard_at: Instant| {
            heard_at + CLAIM_TIME <= now
                && self.is_free(*address, now)
                && !self.reservations.is_reserved(*address)
        };
        let mut silent = self.claims.iter();
        let (&address, _) = silent.find(|(address, claim)| is_silent(address, claim.heard_at))?;
        self.claims.remove(&address);
        Some(address)
    }

    fn warn_of_full_pool(&mut self, address: Ipv4Addr, now: Instant) {
        if std::mem::replace(&mut self.warned, true) {
            return;
        }
        let unseen = self
            .entries
            .get(&address)
            .map(|entry| now.max(entry.seen) - entry.seen);
        log::warn!(
            "all {} addresses of the DHCP range are leased: {address}, unheard of for {} s, goes to a \
             newcomer, and so it will be from here on; widen --dhcp-range or shorten --lease-time",
            self.pool_size(),
            unseen.unwrap_or(CLAIM_TIME).secs()
        );
    }

    /// Makes room for one more entry, at the expense of the lease that ended longest ago, or else of one
    /// whose port is gone.
    pub(super) fn make_room(&mut self, address: Ipv4Addr, now: Instant) -> Result<(), Refusal> {
        if self.entries.len() < LEASES_MAX || self.entries.contains_key(&address) {
            return Ok(());
        }
        let oldest = match self.ends.first() {
            Some(&(until, oldest)) if until <= now => Some(oldest),
            _ => self.abandoned(None, now),
        };
        self.remove(oldest.ok_or(Refusal::Exhausted)?);
        Ok(())
    }

    /// Forgets offers that were not taken and quarantines that are over.
    pub(super) fn sweep(&mut self, now: Instant) {
        while let Some(&(until, address)) = self.transient.first()
            && until <= now
        {
            self.end_offer(address);
        }
    }
}
