//! The lease table: which guest has which address until when. Pure: time is passed in.
//!
//! # Who is a client
//! A lease belongs to the port that it was made on, for as long as that port lives ([`ports`]), and there
//! to a MAC and a client identifier (RFC 2131 4.2 lets the server use either). The identifier alone would
//! give clones of one disk image, which share their DUID, one address; the MAC alone would give all ipvlan
//! children of a guest one address. Where one of two clients of a MAC has no identifier they share a lease,
//! as dnsmasq has it (`lease_find_by_client`): a boot ROM, an initramfs and the system after it keep one
//! address. The commonest identifier, hardware type 1 followed by the MAC, counts as none.
//!
//! Who uses a MAC that another port has leases for is another client: it gets an address of its own, on
//! its own port's account, and changes nothing of theirs.
//!
//! # Which address
//! That of its port or the one reserved for it ([`reservation`]); the one it has; else the one it had; else
//! as [`choose`] says.
//!
//! # State of an address
//! ```text
//!            offer             commit                until passes, release
//!   (absent) ------> Offered ---------> Bound(until) ---------------------> Bound, ended: remembered
//!                      | until passes     | decline                           | reused, oldest first
//!                      v                  v                                   v
//!                   (absent)         Quarantined(until) ----------------> (absent)
//!
//!   Attached: as long as its port lives; a guest's messages only ever end it for itself, by DECLINE.
//! ```
//! An address that is offered to a newcomer remembers whose it was ([`Entry::former`]) until the offer is
//! taken: an offer alone costs nobody a lease. One that was not the client's before is offered only once
//! nobody has answered for it ([`LeaseTable::settle_probe`]).
//!
//! One address has one entry: `entries` is keyed by the address, and `by_mac` points into it
//! (`check_invariants` in the tests).
//!
//! # Limits
//! [`LEASES_MAX`] entries; [`LEASES_PER_MAC_MAX`] live ones of a MAC on a port, and a share of the pool per
//! port ([`PORT_SHARE_DIVISOR`]), offers, quarantined addresses and claims included: a guest that invents
//! MACs or client identifiers, declines all it is given or answers for every address takes no more than
//! its share.

mod choose;
mod client;
mod ports;
mod record;
mod reservation;
mod store;
mod view;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

use self::ports::{Attachment, Claim};
use self::reservation::Reservations;
use crate::frame::{Duration, Instant, Mac, PortId};
use crate::gateway::LanConfig;
use crate::names::GuestName;
use client::ClientKey;
pub use client::{CLIENT_ID_LEN_MAX, Client};
pub use ports::{CLAIMS_PER_PORT_MAX, Heard};
pub use record::LeaseRecord;
pub use reservation::{RESERVATIONS_MAX, Reservation, ReserveError};
pub use view::{Held, LeaseKind, LeaseView};

/// Entries at most, ended leases included: 16 times the pool of a /24; a megabyte, or three if every
/// client identifier is as long as it may be.
pub const LEASES_MAX: usize = 4_096;
/// Live leases of one MAC on one port: ipvlan children and a second operating system, not a pool's worth.
pub const LEASES_PER_MAC_MAX: usize = 8;
/// One port may hold this part of the pool: four hostile guests have to join to exhaust it.
pub const PORT_SHARE_DIVISOR: u32 = 4;
/// The least share, for small pools: a guest with a few nested ones still works. Of a pool smaller than
/// twice that, half.
pub const PORT_SHARE_MIN: u32 = 8;
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
    /// The gateway's, the network's or the broadcast address, or not of the LAN.
    #[error("it is no address for a guest of this LAN")]
    NoGuest,
    /// Another client holds the address, or uses it.
    #[error("the address is in use")]
    Taken,
    /// The address is reserved for another client.
    #[error("the address is reserved for another guest")]
    Reserved,
    /// The MAC is attached already.
    #[error("the MAC has an address already")]
    MacTaken,
    /// The client has a lease for a different address.
    #[error("the client has another address")]
    Mismatch,
    /// The client's MAC is that of another port.
    #[error("the MAC is that of a guest on another port")]
    Foreign,
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

/// Whether anybody answered for an address that a client is to get.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Probed {
    /// Nobody: the client may have it.
    Free,
    /// Another station has it. The client's offer is gone.
    InUse,
    /// The offer is gone: its time is over, or the client took back what it asked.
    Gone,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// `probed`: nobody uses the address, or it was the client's before.
    Offered {
        until: Instant,
        probed: bool,
    },
    Bound {
        until: Instant,
        secs: u32,
    },
    Attached,
    Quarantined {
        until: Instant,
    },
}

impl State {
    fn is_live(self, now: Instant) -> bool {
        match self {
            State::Offered { until, .. }
            | State::Bound { until, .. }
            | State::Quarantined { until } => now < until,
            State::Attached => true,
        }
    }
}

#[derive(Clone, Debug)]
struct Entry {
    key: ClientKey,
    /// Unknown for leases read from a file, and where the port is gone.
    port: Option<PortId>,
    hostname: Option<GuestName>,
    state: State,
    /// When its client was heard last, or its port went.
    seen: Instant,
    /// Whose the address was before it was offered.
    former: Option<Box<Entry>>,
}

/// The lease table.
#[derive(Debug)]
pub struct LeaseTable {
    first: u32,
    last: u32,
    lan: LanConfig,
    entries: BTreeMap<Ipv4Addr, Entry>,
    /// The addresses of a MAC's clients, quarantined ones excepted, oldest first.
    by_mac: HashMap<Mac, Vec<Ipv4Addr>>,
    attached: HashMap<Mac, Attachment>,
    reservations: Reservations,
    /// The ports there are, and the MAC of each one's guest where that is known.
    ports: HashMap<PortId, Option<Mac>>,
    /// Addresses that stations use without a lease.
    claims: BTreeMap<Ipv4Addr, Claim>,
    /// Bound entries by end: the front is what to reuse first.
    ends: BTreeSet<(Instant, Ipv4Addr)>,
    /// Offers and quarantined addresses by end: swept when an address is chosen.
    transient: BTreeSet<(Instant, Ipv4Addr)>,
    generation: u64,
    /// When a port was last found to claim too many.
    refused: HashMap<PortId, Instant>,
    /// It was warned of a full pool.
    warned: bool,
    /// It was warned of a station that uses an address of another's.
    warned_of_claim: bool,
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
            lan: lan.clone(),
            entries: BTreeMap::new(),
            by_mac: HashMap::new(),
            attached: HashMap::new(),
            reservations: Reservations::default(),
            ports: HashMap::new(),
            claims: BTreeMap::new(),
            ends: BTreeSet::new(),
            transient: BTreeSet::new(),
            generation: 0,
            refused: HashMap::new(),
            warned: false,
            warned_of_claim: false,
        })
    }

    /// Number of addresses that can be leased.
    pub fn pool_size(&self) -> u32 {
        let whole = self.last - self.first + 1;
        let gateway = self.lan.address.to_bits();
        whole - u32::from((self.first..=self.last).contains(&gateway))
    }

    /// Grows with every change that a lease file has to follow.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Finds an address for a client and holds it for [`OFFER_TIME`]. `wanted` is the address that the
    /// client asked for. Where [`LeaseTable::is_unprobed`] says so the client must not hear of it before
    /// the LAN was asked for it and [`LeaseTable::settle_probe`] finds it free.
    ///
    /// # Errors
    /// [`Refusal::Limit`] or [`Refusal::Exhausted`].
    pub fn offer(
        &mut self,
        client: &Client<'_>,
        wanted: Option<Ipv4Addr>,
        now: Instant,
    ) -> Result<Ipv4Addr, Refusal> {
        self.sweep(now);
        let until = now + OFFER_TIME;
        if let Some(address) = self.find(client, now) {
            self.check_revival(client, address, now)?;
            match self.entries.get(&address).map(|entry| entry.state) {
                // A reservation that was not used yet, or not lately.
                None => self.put(
                    client,
                    address,
                    (
                        State::Offered {
                            until,
                            probed: true,
                        },
                        now,
                    ),
                ),
                Some(State::Offered { probed, .. }) => {
                    self.put(client, address, (State::Offered { until, probed }, now));
                }
                // An ended lease stays remembered if the offer is not taken.
                Some(State::Bound { until: end, secs }) if end < until => {
                    self.put(client, address, (State::Bound { until, secs }, now));
                }
                _ => {}
            }
            return Ok(address);
        }
        self.check_limits(client, now)?;
        let key = ClientKey::new(client.mac, client.id);
        let address = self.choose(&key, wanted, now)?;
        let state = State::Offered {
            until,
            probed: false,
        };
        self.put(client, address, (state, now));
        Ok(address)
    }

    /// Whether `address` is on offer and was not probed yet.
    pub fn is_unprobed(&self, address: Ipv4Addr) -> bool {
        let state = self.entries.get(&address).map(|entry| entry.state);
        matches!(state, Some(State::Offered { probed: false, .. }))
    }

    /// Whether a client has a lease of `address`, or had it, or was offered it.
    pub fn knows(&self, client: &Client<'_>, address: Ipv4Addr, now: Instant) -> bool {
        self.find(client, now) == Some(address)
    }

    /// Whether the client's MAC is that of another port: known to be, or by a lease that lives there.
    pub fn is_foreign(&self, client: &Client<'_>, now: Instant) -> bool {
        if self.is_declared_at(client.mac, client.port) {
            return false;
        }
        let addresses = self.by_mac.get(&client.mac).into_iter().flatten();
        let mut entries = addresses.filter_map(|address| self.entries.get(address));
        self.is_declared_elsewhere(client.mac, client.port)
            || entries.any(|entry| {
                let owner = self.owner(entry);
                entry.state.is_live(now) && owner.is_some_and(|owner| owner != client.port)
            })
    }

    /// Ends the wait for answers to the probe of an address that was offered to a client.
    pub fn settle_probe(&mut self, client: &Client<'_>, address: Ipv4Addr, now: Instant) -> Probed {
        if self.find(client, now) != Some(address) {
            return Probed::Gone;
        }
        let Some(&Entry {
            state: State::Offered { until, .. },
            ..
        }) = self.entries.get(&address)
        else {
            return Probed::Gone;
        };
        let Some(claim) = self.claim_against(address, client.mac) else {
            let state = State::Offered {
                until,
                probed: true,
            };
            self.put(client, address, (state, now));
            return Probed::Free;
        };
        let former = self.remove(address).and_then(|entry| entry.former);
        if let Some(mut former) = former.filter(|former| former.key.mac == claim.station.mac) {
            // Whose lease it was is still there, and the claim keeps it from the next.
            former.seen = now;
            self.insert(address, *former);
        }
        Probed::InUse
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
        self.check_commit(client, address, now)?;
        let until = now + Duration::from_secs(u64::from(secs));
        self.put(client, address, (State::Bound { until, secs }, now));
        Ok(())
    }

    /// Holds for a client the address that it says it had, until it was probed.
    ///
    /// # Errors
    /// As [`LeaseTable::commit`].
    pub fn hold(
        &mut self,
        client: &Client<'_>,
        address: Ipv4Addr,
        now: Instant,
    ) -> Result<(), Refusal> {
        self.check_commit(client, address, now)?;
        let state = State::Offered {
            until: now + OFFER_TIME,
            probed: false,
        };
        self.put(client, address, (state, now));
        Ok(())
    }

    fn check_commit(
        &mut self,
        client: &Client<'_>,
        address: Ipv4Addr,
        now: Instant,
    ) -> Result<(), Refusal> {
        self.sweep(now);
        match self.find(client, now) {
            Some(own) if own == address => self.check_revival(client, address, now),
            _ if self.is_foreign(client, now) => Err(Refusal::Foreign),
            Some(_) => Err(Refusal::Mismatch),
            None => {
                if !self.in_pool(address) {
                    return Err(Refusal::OutOfPool);
                }
                if self.reservations.is_reserved(address) {
                    return Err(Refusal::Reserved);
                }
                let is_used = self.claim_against(address, client.mac).is_some();
                if is_used || !self.is_nobodys(address, client.mac, now) {
                    return Err(Refusal::Taken);
                }
                self.check_limits(client, now)?;
                self.make_room(address, now)
            }
        }
    }

    /// Forgets the offer to a client that took another server's.
    pub fn withdraw(&mut self, client: &Client<'_>, now: Instant) {
        if let Some(address) = self.find(client, now)
            && let Some(Entry {
                state: State::Offered { .. },
                ..
            }) = self.entries.get(&address)
        {
            self.end_offer(address);
        }
    }

    /// Ends a client's lease of `address`; the address stays remembered. False if it has no such lease.
    pub fn release(&mut self, client: &Client<'_>, address: Ipv4Addr, now: Instant) -> bool {
        if self.find(client, now) != Some(address) {
            return false;
        }
        match self.entries.get(&address).map(|entry| entry.state) {
            Some(State::Bound { secs, until }) => {
                let until = until.min(now);
                self.put(client, address, (State::Bound { until, secs }, now));
            }
            Some(State::Offered { .. }) => self.end_offer(address),
            // The port's own lease outlives a DHCP client that runs behind it.
            Some(State::Attached) => {}
            Some(State::Quarantined { .. }) | None => return false,
        }
        true
    }

    /// Keeps back an address that a client found in use, for [`QUARANTINE_TIME`]. False if it was
    /// not offered or leased to this client. An attached guest's own address is kept back as well: its
    /// DHCP client gets another one.
    pub fn decline(&mut self, client: &Client<'_>, address: Ipv4Addr, now: Instant) -> bool {
        if self.find(client, now) != Some(address) {
            return false;
        }
        let Some(entry) = self.remove(address) else {
            return false;
        };
        if let Some(attachment) = self.attached.get_mut(&client.mac)
            && attachment.address == Some(address)
        {
            attachment.address = None;
        }
        let until = now + QUARANTINE_TIME;
        let state = State::Quarantined { until };
        let entry = Entry {
            port: Some(client.port),
            state,
            former: None,
            ..entry
        };
        self.insert(address, entry);
        true
    }

    /// Who holds `address` by a lease that has not ended.
    pub fn holder(&self, address: Ipv4Addr, now: Instant) -> Option<(Mac, Option<PortId>)> {
        let entry = self.entries.get(&address)?;
        let holds = matches!(entry.state, State::Bound { .. } | State::Attached);
        (holds && entry.state.is_live(now)).then_some((entry.key.mac, entry.port))
    }

    /// The address that is the client's, by whatever right.
    fn find(&self, client: &Client<'_>, now: Instant) -> Option<Ipv4Addr> {
        let attached = self.attached.get(&client.mac);
        let attached = attached.filter(|attached| attached.port == client.port);
        if let Some(address) = attached.and_then(|attached| attached.address) {
            return Some(address);
        }
        if let Some(address) = self.reserved_for(client, now) {
            return Some(address);
        }
        let key = ClientKey::new(client.mac, client.id);
        let own = self.by_mac.get(&client.mac)?.iter();
        own.enumerate()
            .filter_map(|(age, &address)| {
                let entry = self.entries.get(&address)?;
                let is_exact = entry.key == key;
                let is_shared = entry.key.id.is_none() || key.id.is_none();
                let is_reserved = self.reservations.is_reserved(address);
                if !(is_exact || is_shared)
                    || is_reserved
                    || !self.is_open_to(address, entry, client, now)
                {
                    return None;
                }
                let is_own = self.owner(entry) == Some(client.port);
                // Of several leases that could be shared the newest: its system ran last.
                let heard = if is_exact { Instant::ZERO } else { entry.seen };
                let rank = (!is_exact, !is_own, std::cmp::Reverse(heard), age);
                Some((rank, address))
            })
            .min()
            .map(|(_, address)| address)
    }

    /// Whether a client may take up an entry of its MAC.
    fn is_open_to(
        &self,
        address: Ipv4Addr,
        entry: &Entry,
        client: &Client<'_>,
        now: Instant,
    ) -> bool {
        let is_its = match self.owner(entry) {
            Some(owner) => owner == client.port,
            None => !self.is_declared_elsewhere(client.mac, client.port),
        };
        // Who came back late finds another station there; but ARP takes nothing from a guest that is known.
        let is_lost = !entry.state.is_live(now)
            && self.claim_against(address, client.mac).is_some()
            && !self.is_declared_at(client.mac, client.port);
        is_its && !is_lost
    }

    fn in_pool(&self, address: Ipv4Addr) -> bool {
        (self.first..=self.last).contains(&address.to_bits()) && address != self.lan.address
    }

    /// In no live entry.
    fn is_free(&self, address: Ipv4Addr, now: Instant) -> bool {
        self.entries
            .get(&address)
            .is_none_or(|entry| !entry.state.is_live(now))
    }

    /// In no live entry, and remembered for no client of another MAC: who is gone for a moment finds its
    /// address, whoever asks for it meanwhile.
    fn is_nobodys(&self, address: Ipv4Addr, mac: Mac, now: Instant) -> bool {
        self.entries.get(&address).is_none_or(|entry| {
            let is_quarantined = matches!(entry.state, State::Quarantined { .. });
            !entry.state.is_live(now) && (entry.key.mac == mac || is_quarantined)
        })
    }
}

#[cfg(test)]
mod tests;
