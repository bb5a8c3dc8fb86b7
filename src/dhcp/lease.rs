//! The lease table: which guest has which address until when. Pure: time is passed in.
//!
//! # Who is a client
//! A lease belongs to a MAC *and* a client identifier (RFC 2131 4.2 lets the server use either).
//! The identifier alone would give clones of one disk image, which share their DUID, one address;
//! the MAC alone would give all ipvlan children of a guest one address. The commonest identifier,
//! hardware type 1 followed by the MAC, counts as none, so that a boot ROM, an initramfs and the
//! system after it keep one address.
//!
//! # Which address
//! The one it has; else the one it had; else the one it asks for, if free; else a hash of its
//! identity, so that a guest meets the same address again even where no lease was kept; else the
//! address whose lease ended longest ago.
//!
//! # State of an address
//! ```text
//!            offer             commit                until passes, release
//!   (absent) ------> Offered ---------> Bound(until) ---------------------> Bound, ended: remembered
//!                      | until passes     | decline                           | reused, oldest first
//!                      v                  v                                   v
//!                   (absent)         Quarantined(until) ----------------> (absent)
//!
//!   Attached: as long as a port lives; no message of the guest changes it.
//! ```
//! One address has one entry, and one client has one address: `entries` is keyed by the address, and
//! `by_client` points into it (`check_invariants` in the tests).
//!
//! # Limits
//! [`LEASES_MAX`] entries; [`LEASES_PER_MAC_MAX`] live ones of a MAC, and a share of the pool per
//! port ([`PORT_SHARE_DIVISOR`]), offers and quarantined addresses included: a guest that invents
//! MACs or client identifiers, or declines all it is given, takes no more than its share.

mod client;
mod record;
mod view;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

use crate::frame::{Duration, Instant, Mac, PortId};
use crate::gateway::LanConfig;
use crate::names::GuestName;
use client::ClientKey;
pub use client::{CLIENT_ID_LEN_MAX, Client};
pub use record::LeaseRecord;
pub use view::{Held, LeaseKind, LeaseView};

/// Entries at most, ended leases included: 16 times the pool of a /24; a megabyte, or three if every
/// client identifier is as long as it may be.
pub const LEASES_MAX: usize = 4_096;
/// Live leases of one MAC: ipvlan children and a second operating system, not a pool's worth.
pub const LEASES_PER_MAC_MAX: usize = 8;
/// One port may hold this part of the pool: four hostile guests have to join to exhaust it.
pub const PORT_SHARE_DIVISOR: u32 = 4;
/// The least share, for small pools: a guest with a few nested ones still works.
pub const PORT_SHARE_MIN: usize = 8;
/// How long an offer holds its address. Clients take an offer within their first retransmission
/// (4 s, RFC 2131 4.1) or not at all.
pub const OFFER_TIME: Duration = Duration::from_secs(30);
/// How long a declined address is kept back, as dnsmasq does (`DECLINE_BACKOFF`).
pub const QUARANTINE_TIME: Duration = Duration::from_secs(600);

/// Why a client does not get an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// Not an address of the pool.
    #[error("the address is outside the DHCP range")]
    OutOfPool,
    /// Another client holds the address.
    #[error("the address is in use")]
    Taken,
    /// The client has a lease for a different address.
    #[error("the client has another address")]
    Mismatch,
    /// The client's MAC or port holds as many leases as it may.
    #[error("too many leases for this MAC or port")]
    Limit,
    /// No address is free.
    #[error("the DHCP range is exhausted: widen it or shorten the lease time")]
    Exhausted,
}

/// A range that can't be a pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PoolError {
    /// First after last.
    #[error("the DHCP range ends before it starts")]
    Empty,
    /// Not all addresses are guest addresses of the LAN.
    #[error(
        "the DHCP range leaves the LAN, or holds its network or broadcast address: choose within the subnet"
    )]
    OutsideLan,
    /// The gateway's is the only address.
    #[error("the DHCP range holds no address besides the gateway's")]
    OnlyGateway,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Offered { until: Instant },
    Bound { until: Instant, secs: u32 },
    Attached,
    Quarantined { until: Instant },
}

impl State {
    fn is_live(self, now: Instant) -> bool {
        match self {
            State::Offered { until }
            | State::Bound { until, .. }
            | State::Quarantined { until } => now < until,
            State::Attached => true,
        }
    }
}

#[derive(Clone, Debug)]
struct Entry {
    key: ClientKey,
    /// Unknown for leases read from a file.
    port: Option<PortId>,
    hostname: Option<GuestName>,
    state: State,
}

/// The lease table.
#[derive(Debug)]
pub struct LeaseTable {
    first: u32,
    last: u32,
    gateway: Ipv4Addr,
    entries: BTreeMap<Ipv4Addr, Entry>,
    by_client: HashMap<ClientKey, Ipv4Addr>,
    attached: HashMap<Mac, Ipv4Addr>,
    /// Bound entries by end: the front is what to reuse first.
    ends: BTreeSet<(Instant, Ipv4Addr)>,
    /// Offers and quarantined addresses by end: swept when an address is chosen.
    transient: BTreeSet<(Instant, Ipv4Addr)>,
    generation: u64,
}

impl LeaseTable {
    /// An empty table for the addresses of `range`, the gateway's excepted.
    ///
    /// # Errors
    /// The range is no pool for this LAN.
    pub fn new(range: RangeInclusive<Ipv4Addr>, lan: &LanConfig) -> Result<Self, PoolError> {
        let (first, last) = (*range.start(), *range.end());
        if first > last {
            return Err(PoolError::Empty);
        }
        let fits = |address| lan.is_guest(address) || address == lan.address;
        if !fits(first) || !fits(last) {
            return Err(PoolError::OutsideLan);
        }
        if first == last && first == lan.address {
            return Err(PoolError::OnlyGateway);
        }
        Ok(Self {
            first: first.to_bits(),
            last: last.to_bits(),
            gateway: lan.address,
            entries: BTreeMap::new(),
            by_client: HashMap::new(),
            attached: HashMap::new(),
            ends: BTreeSet::new(),
            transient: BTreeSet::new(),
            generation: 0,
        })
    }

    /// Number of addresses that can be leased.
    pub fn pool_size(&self) -> u32 {
        let whole = self.last - self.first + 1;
        let gateway = self.gateway.to_bits();
        whole - u32::from((self.first..=self.last).contains(&gateway))
    }

    /// Grows with every change that a lease file has to follow.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Finds an address for a client and holds it for [`OFFER_TIME`]. `wanted` is the address that the
    /// client asked for.
    ///
    /// # Errors
    /// [`Refusal::Limit`] or [`Refusal::Exhausted`].
    pub fn offer(
        &mut self,
        client: &Client<'_>,
        wanted: Option<Ipv4Addr>,
        now: Instant,
    ) -> Result<Ipv4Addr, Refusal> {
        let until = now + OFFER_TIME;
        if let Some(address) = self.find(client) {
            self.check_revival(client, address, now)?;
            let held = self.entries.get(&address).map(|entry| entry.state);
            match held {
                Some(State::Offered { .. }) => {
                    self.put(client, address, State::Offered { until });
                }
                // An ended lease stays remembered if the offer is not taken.
                Some(State::Bound { until: end, secs }) if end < until => {
                    self.put(client, address, State::Bound { until, secs });
                }
                _ => {}
            }
            return Ok(address);
        }
        self.check_limits(client, now)?;
        let address = self.choose(&ClientKey::new(client.mac, client.id), wanted, now)?;
        self.put(client, address, State::Offered { until });
        Ok(address)
    }

    /// Leases `address` to a client for `secs` seconds: its own, or a free one of the pool (a client
    /// that remembers an address which this table doesn't, because it was lost).
    ///
    /// # Errors
    /// Why the client may not have this address.
    pub fn commit(
        &mut self,
        client: &Client<'_>,
        address: Ipv4Addr,
        secs: u32,
        now: Instant,
    ) -> Result<(), Refusal> {
        match self.find(client) {
            Some(own) if own != address => return Err(Refusal::Mismatch),
            Some(_) => self.check_revival(client, address, now)?,
            None => {
                if !self.in_pool(address) {
                    return Err(Refusal::OutOfPool);
                }
                if !self.is_free(address, now) {
                    return Err(Refusal::Taken);
                }
                self.check_limits(client, now)?;
                self.make_room(address, now)?;
            }
        }
        let until = now + Duration::from_secs(u64::from(secs));
        self.put(client, address, State::Bound { until, secs });
        Ok(())
    }

    /// Forgets the offer to a client that took another server's.
    pub fn withdraw(&mut self, client: &Client<'_>) {
        if let Some(address) = self.find(client)
            && let Some(Entry {
                state: State::Offered { .. },
                ..
            }) = self.entries.get(&address)
        {
            self.remove(address);
        }
    }

    /// Ends a client's lease of `address`; the address stays remembered. False if it has no such lease.
    pub fn release(&mut self, client: &Client<'_>, address: Ipv4Addr, now: Instant) -> bool {
        if self.find(client) != Some(address) {
            return false;
        }
        match self.entries.get(&address).map(|entry| entry.state) {
            Some(State::Bound { secs, until }) => {
                self.put(
                    client,
                    address,
                    State::Bound {
                        until: until.min(now),
                        secs,
                    },
                );
            }
            Some(State::Offered { .. }) => {
                self.remove(address);
            }
            // The port's own lease outlives a DHCP client that runs behind it.
            _ => {}
        }
        true
    }

    /// Keeps back an address that a client found in use, for [`QUARANTINE_TIME`]. False if it was
    /// not offered or leased to this client.
    pub fn decline(&mut self, client: &Client<'_>, address: Ipv4Addr, now: Instant) -> bool {
        if self.find(client) != Some(address) {
            return false;
        }
        if self.attached.get(&client.mac) != Some(&address) {
            self.put(
                client,
                address,
                State::Quarantined {
                    until: now + QUARANTINE_TIME,
                },
            );
        }
        true
    }

    /// Leases an address to a MAC until [`LeaseTable::detach`]. Every DHCP client with this MAC is
    /// given the same address meanwhile.
    ///
    /// # Errors
    /// [`Refusal::Taken`] if the MAC is attached already, [`Refusal::Exhausted`].
    pub fn attach(&mut self, mac: Mac, port: PortId, now: Instant) -> Result<Ipv4Addr, Refusal> {
        if self.attached.contains_key(&mac) {
            return Err(Refusal::Taken);
        }
        let client = Client {
            mac,
            id: None,
            port,
            hostname: None,
        };
        let address = match self.find(&client) {
            Some(address) => address,
            None => self.choose(&ClientKey::new(mac, None), None, now)?,
        };
        self.put(&client, address, State::Attached);
        Ok(address)
    }

    /// Ends the lease that [`LeaseTable::attach`] made; the address stays remembered.
    pub fn detach(&mut self, mac: Mac, now: Instant) {
        let Some(&address) = self.attached.get(&mac) else {
            return;
        };
        if let Some(mut entry) = self.remove(address) {
            entry.state = State::Bound {
                until: now,
                secs: 0,
            };
            self.insert(address, entry);
        }
    }

    /// Who holds `address` by a lease that has not ended.
    pub fn holder(&self, address: Ipv4Addr, now: Instant) -> Option<(Mac, Option<PortId>)> {
        let entry = self.entries.get(&address)?;
        let holds = matches!(entry.state, State::Bound { .. } | State::Attached);
        (holds && entry.state.is_live(now)).then_some((entry.key.mac, entry.port))
    }

    fn find(&self, client: &Client<'_>) -> Option<Ipv4Addr> {
        let attached = self.attached.get(&client.mac);
        attached
            .or_else(|| self.by_client.get(&ClientKey::new(client.mac, client.id)))
            .copied()
    }

    fn in_pool(&self, address: Ipv4Addr) -> bool {
        (self.first..=self.last).contains(&address.to_bits()) && address != self.gateway
    }

    /// In no live entry.
    fn is_free(&self, address: Ipv4Addr, now: Instant) -> bool {
        self.entries
            .get(&address)
            .is_none_or(|entry| !entry.state.is_live(now))
    }

    /// An ended lease counts against the limits again when its client comes back for it.
    fn check_revival(
        &self,
        client: &Client<'_>,
        address: Ipv4Addr,
        now: Instant,
    ) -> Result<(), Refusal> {
        if self.is_free(address, now) {
            self.check_limits(client, now)
        } else {
            Ok(())
        }
    }

    /// A pass over all entries: only clients without a live lease come here.
    fn check_limits(&self, client: &Client<'_>, now: Instant) -> Result<(), Refusal> {
        let share = usize::try_from(self.pool_size() / PORT_SHARE_DIVISOR).unwrap_or(usize::MAX);
        let (mut of_mac, mut of_port) = (0, 0);
        for entry in self.entries.values() {
            if entry.state != State::Attached && entry.state.is_live(now) {
                of_mac += usize::from(entry.key.mac == client.mac);
                of_port += usize::from(entry.port == Some(client.port));
            }
        }
        if of_mac >= LEASES_PER_MAC_MAX || of_port >= share.max(PORT_SHARE_MIN) {
            return Err(Refusal::Limit);
        }
        Ok(())
    }

    /// A free address for a client that has none.
    fn choose(
        &mut self,
        key: &ClientKey,
        wanted: Option<Ipv4Addr>,
        now: Instant,
    ) -> Result<Ipv4Addr, Refusal> {
        self.sweep(now);
        let wanted = wanted.filter(|&wanted| self.in_pool(wanted) && self.is_free(wanted, now));
        let untouched = wanted.or_else(|| self.untouched(key));
        if let Some(address) = untouched {
            self.make_room(address, now)?;
            return Ok(address);
        }
        match self.ends.first() {
            Some(&(until, address)) if until <= now => Ok(address),
            _ => Err(Refusal::Exhausted),
        }
    }

    /// The first address from the client's hash on that is in no entry.
    fn untouched(&self, key: &ClientKey) -> Option<Ipv4Addr> {
        let size = u64::from(self.last - self.first) + 1;
        // Among one more address than there are entries and gateways, one is untouched.
        let tries = size.min(self.entries.len() as u64 + 2);
        (0..tries)
            .map(|step| {
                let offset = (key.hash() % size + step) % size;
                // Below `size`, which fits.
                Ipv4Addr::from_bits(self.first + offset as u32)
            })
            .find(|address| *address != self.gateway && !self.entries.contains_key(address))
    }

    /// Makes room for one more entry, at the expense of the lease that ended longest ago.
    fn make_room(&mut self, address: Ipv4Addr, now: Instant) -> Result<(), Refusal> {
        if self.entries.len() < LEASES_MAX || self.entries.contains_key(&address) {
            return Ok(());
        }
        match self.ends.first() {
            Some(&(until, oldest)) if until <= now => {
                self.remove(oldest);
                Ok(())
            }
            _ => Err(Refusal::Exhausted),
        }
    }

    /// Forgets offers that were not taken and quarantines that are over.
    fn sweep(&mut self, now: Instant) {
        while let Some(&(until, address)) = self.transient.first()
            && until <= now
        {
            self.remove(address);
        }
    }

    /// Makes `address` the client's, in `state`; who had it before has it no more.
    fn put(&mut self, client: &Client<'_>, address: Ipv4Addr, state: State) {
        let before = self.remove(address);
        let entry = match before {
            // An attached port's entry keeps its key and its state whichever client renews it.
            Some(entry) if entry.state == State::Attached && state != State::Attached => Entry {
                hostname: client.hostname.cloned().or(entry.hostname),
                ..entry
            },
            before => {
                let key = ClientKey::new(client.mac, client.id);
                let known = before.filter(|entry| entry.key == key);
                let known_name = known.and_then(|entry| entry.hostname);
                Entry {
                    key,
                    port: Some(client.port),
                    hostname: client.hostname.cloned().or(known_name),
                    state,
                }
            }
        };
        self.insert(address, entry);
    }

    fn insert(&mut self, address: Ipv4Addr, entry: Entry) {
        match entry.state {
            State::Offered { until } => {
                self.transient.insert((until, address));
                self.by_client.insert(entry.key.clone(), address);
            }
            // No client's any more.
            State::Quarantined { until } => {
                self.transient.insert((until, address));
            }
            State::Bound { until, .. } => {
                self.ends.insert((until, address));
                self.by_client.insert(entry.key.clone(), address);
                self.generation += 1;
            }
            State::Attached => {
                self.attached.insert(entry.key.mac, address);
                self.by_client.insert(entry.key.clone(), address);
                self.generation += 1;
            }
        }
        self.entries.insert(address, entry);
    }

    fn remove(&mut self, address: Ipv4Addr) -> Option<Entry> {
        let entry = self.entries.remove(&address)?;
        match entry.state {
            State::Offered { until } | State::Quarantined { until } => {
                self.transient.remove(&(until, address));
            }
            State::Bound { until, .. } => {
                self.ends.remove(&(until, address));
                self.generation += 1;
            }
            State::Attached => {
                self.attached.remove(&entry.key.mac);
                self.generation += 1;
            }
        }
        if self.by_client.get(&entry.key) == Some(&address) {
            self.by_client.remove(&entry.key);
        }
        Some(entry)
    }
}

#[cfg(test)]
mod tests;
