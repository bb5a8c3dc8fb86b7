//! Entries in and out of the table, and its indices with them.

use std::net::Ipv4Addr;

use super::client::{Client, ClientKey};
use super::{Entry, LeaseTable, State};
use crate::frame::{Instant, Mac};

impl LeaseTable {
    /// Makes `address` the client's, in a state; who had it before has it no more.
    pub(super) fn put(
        &mut self,
        client: &Client<'_>,
        address: Ipv4Addr,
        (state, now): (State, Instant),
    ) {
        let place = self.place_of(client.mac, address);
        let hostname = client.hostname.cloned();
        let hostname = hostname.filter(|name| !self.reservations.is_named_for_other(name, address));
        let entry = match self.remove(address) {
            // An attached port's entry keeps its key and its state whichever client renews it.
            Some(entry) if entry.state == State::Attached && state != State::Attached => Entry {
                hostname: hostname.or(entry.hostname),
                seen: now,
                ..entry
            },
            before => {
                let is_its = |entry: &Entry| entry.key.mac == client.mac;
                let (own, other) = match before {
                    Some(entry) if is_its(&entry) => (Some(entry), None),
                    other => (None, other),
                };
                let former = match state {
                    State::Offered { .. } => {
                        let other =
                            other.filter(|entry| matches!(entry.state, State::Bound { .. }));
                        let before = own.as_ref().and_then(|entry| entry.former.clone());
                        other.map(Box::new).or(before)
                    }
                    _ => None,
                };
                Entry {
                    key: ClientKey::new(client.mac, client.id),
                    port: Some(client.port),
                    hostname: hostname.or(own.and_then(|entry| entry.hostname)),
                    state,
                    seen: now,
                    former,
                }
            }
        };
        if !matches!(state, State::Offered { .. }) {
            self.claims.remove(&address);
            self.reservations.bind(address, client);
        }
        self.insert(address, entry);
        self.put_in_place(client.mac, address, place);
    }

    pub(super) fn place_of(&self, mac: Mac, address: Ipv4Addr) -> Option<usize> {
        let own = self.by_mac.get(&mac)?;
        own.iter().position(|&other| other == address)
    }

    /// An address that is written anew keeps its age among those of its MAC.
    pub(super) fn put_in_place(&mut self, mac: Mac, address: Ipv4Addr, place: Option<usize>) {
        if let (Some(to), Some(from)) = (place, self.place_of(mac, address))
            && let Some(own) = self.by_mac.get_mut(&mac)
        {
            let address = own.remove(from);
            own.insert(to, address);
        }
    }

    /// An offer that is not taken: who had the address before still has it.
    pub(super) fn end_offer(&mut self, address: Ipv4Addr) {
        let former = self.remove(address).and_then(|entry| entry.former);
        if let Some(former) = former {
            self.insert(address, *former);
        }
    }

    pub(super) fn insert(&mut self, address: Ipv4Addr, entry: Entry) {
        match entry.state {
            State::Offered { until, .. } | State::Quarantined { until } => {
                self.transient.insert((until, address));
            }
            State::Bound { until, .. } => {
                self.ends.insert((until, address));
                self.generation += 1;
            }
            State::Attached => self.generation += 1,
        }
        // A quarantined address is no client's any more.
        if !matches!(entry.state, State::Quarantined { .. }) {
            self.by_mac.entry(entry.key.mac).or_default().push(address);
        }
        self.entries.insert(address, entry);
    }

    pub(super) fn remove(&mut self, address: Ipv4Addr) -> Option<Entry> {
        let entry = self.entries.remove(&address)?;
        match entry.state {
            State::Offered { until, .. } | State::Quarantined { until } => {
                self.transient.remove(&(until, address));
            }
            State::Bound { until, .. } => {
                self.ends.remove(&(until, address));
                self.generation += 1;
            }
            State::Attached => self.generation += 1,
        }
        if let Some(own) = self.by_mac.get_mut(&entry.key.mac) {
            own.retain(|&other| other != address);
            if own.is_empty() {
                self.by_mac.remove(&entry.key.mac);
            }
        }
        Some(entry)
    }
}
