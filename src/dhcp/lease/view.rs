//! The table as `lanlet status` shows it.

use std::net::Ipv4Addr;

use super::{Entry, LeaseTable, State};
use crate::frame::{Duration, Instant, Mac, PortId};
use crate::names::GuestName;

/// What `status` shows of an entry.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LeaseView {
    /// Leased address.
    pub address: Ipv4Addr,
    /// The client's MAC.
    pub mac: Mac,
    /// The port that the lease was made on, while it lives.
    pub port: Option<PortId>,
    /// The client's identifier, unless it is its MAC.
    pub client_id: Option<Box<[u8]>>,
    /// The client's name: that of its reservation, else its own.
    pub hostname: Option<GuestName>,
    /// What the address is doing.
    pub kind: LeaseKind,
    /// Time left; `None` for [`LeaseKind::Attached`].
    pub remaining: Option<Duration>,
}

/// What an address is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LeaseKind {
    /// Offered, not taken yet.
    Offered,
    /// Leased.
    Bound,
    /// Ended or released; kept for its former client.
    Ended,
    /// As long as its port.
    Attached,
    /// Declined by a client, not handed out for a while.
    Quarantined,
}

/// A lease that its client has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Held<'a> {
    /// Leased address.
    pub address: Ipv4Addr,
    /// The client's MAC.
    pub mac: Mac,
    /// The name of its reservation, else the one the client gave itself.
    pub hostname: Option<&'a GuestName>,
    /// It is the port's own, whatever DHCP clients run behind it.
    pub attached: bool,
}

impl LeaseTable {
    /// The leases that have not ended, by address.
    pub fn held(&self, now: Instant) -> impl Iterator<Item = Held<'_>> {
        let held = move |(&address, entry): (&Ipv4Addr, &'_ Entry)| {
            let attached = entry.state == State::Attached;
            let bound = matches!(entry.state, State::Bound { until, .. } if now < until);
            (attached || bound).then_some((address, entry.key.mac, attached))
        };
        self.entries.iter().filter_map(move |pair| {
            let (address, mac, attached) = held(pair)?;
            let own_name = pair.1.hostname.as_ref();
            let hostname = self.reservations.name_of(address).or(own_name);
            Some(Held {
                address,
                mac,
                hostname,
                attached,
            })
        })
    }

    /// All entries by address.
    pub fn snapshot(&self, now: Instant) -> Vec<LeaseView> {
        let view = |(&address, entry): (&Ipv4Addr, &Entry)| {
            let (kind, until) = match entry.state {
                State::Offered { until, .. } => (LeaseKind::Offered, Some(until)),
                State::Bound { until, .. } if now < until => (LeaseKind::Bound, Some(until)),
                State::Bound { until, .. } => (LeaseKind::Ended, Some(until)),
                State::Attached => (LeaseKind::Attached, None),
                State::Quarantined { until } => (LeaseKind::Quarantined, Some(until)),
            };
            LeaseView {
                address,
                mac: entry.key.mac,
                port: self.owner(entry),
                client_id: entry.key.id.clone(),
                hostname: self
                    .reservations
                    .name_of(address)
                    .cloned()
                    .or_else(|| entry.hostname.clone()),
                kind,
                remaining: until.map(|until| {
                    if now < until {
                        until - now
                    } else {
                        Duration::ZERO
                    }
                }),
            }
        };
        self.entries.iter().map(view).collect()
    }
}
