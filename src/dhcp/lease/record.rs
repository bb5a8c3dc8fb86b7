//! Leases across restarts: in and out of the table, between its clock and the wall's.

use std::collections::HashSet;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use super::client::{CLIENT_ID_LEN_MAX, ClientKey};
use super::{Entry, LEASES_MAX, LeaseTable, State};
use crate::frame::{Duration, Instant, Mac};
use crate::names::GuestName;

/// Older ends than this are told apart no longer when a lease file is read.
const AGE_SECS_MAX: u64 = 10 * 365 * 86_400;

/// A lease as it is kept across restarts: with the wall clock's time.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LeaseRecord {
    /// Leased address.
    pub address: Ipv4Addr,
    /// The client's MAC.
    pub mac: String,
    /// The client's identifier in hexadecimal, unless it is its MAC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_id: Option<String>,
    /// The client's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// End, seconds since 1970.
    pub expires_unix: u64,
    /// Seconds it was granted for: bounds what a wall clock set back can make of `expires_unix`.
    pub lease_secs: u32,
}

impl LeaseTable {
    /// What to keep across a restart: leases, ended ones included (they remember addresses), and
    /// attached ones as ended. `unix_now` is the wall clock at `now`, in seconds.
    pub fn records(&self, now: Instant, unix_now: u64) -> Vec<LeaseRecord> {
        let record = |(&address, entry): (&Ipv4Addr, &Entry)| {
            // An offer ends with the server; who had the address before has it again.
            let entry = match (&entry.state, &entry.former) {
                (State::Offered { .. }, Some(former)) if !self.has_entry(&former.key) => former,
                _ if self.is_second(entry, address) => return None,
                _ => entry,
            };
            let (until, lease_secs) = match entry.state {
                State::Bound { until, secs } => (until, secs),
                State::Attached => (now, 0),
                State::Offered { .. } | State::Quarantined { .. } => return None,
            };
            // Rounded up: a lease must not end here before it ends at its client.
            let expires_unix = if now < until {
                unix_now.saturating_add((until - now).total_micros().div_ceil(1_000_000))
            } else {
                unix_now.saturating_sub((now - until).secs())
            };
            Some(LeaseRecord {
                address,
                mac: entry.key.mac.to_string(),
                client_id: entry.key.id.as_deref().map(to_hex),
                hostname: entry.hostname.as_ref().map(GuestName::to_string),
                expires_unix,
                lease_secs,
            })
        };
        let mut known = HashSet::new();
        let is_first =
            |record: &LeaseRecord| known.insert((record.mac.clone(), record.client_id.clone()));
        let records = self.entries.iter().filter_map(record);
        records.filter(is_first).collect()
    }

    /// Takes up the leases of an earlier run. Records that don't fit (outside the range, malformed, a
    /// second one for an address or a client) are left out; returns how many were taken.
    ///
    /// A wall clock that was set back makes no lease longer than it was granted for; one that was set
    /// forward ends leases early, but their addresses are the last to be given to others.
    pub fn restore(&mut self, records: &[LeaseRecord], now: Instant, unix_now: u64) -> usize {
        let mut taken = 0;
        for record in records {
            let Some((address, entry)) = self.revive(record, now, unix_now) else {
                continue;
            };
            if self.entries.len() < LEASES_MAX
                && self.may_restore(address, entry.key.mac)
                && !self.entries.contains_key(&address)
                && !self.has_entry(&entry.key)
            {
                self.insert(address, entry);
                taken += 1;
            }
        }
        taken
    }

    /// An address outside the pool only for whom it is reserved.
    fn may_restore(&self, address: Ipv4Addr, mac: Mac) -> bool {
        match self.reservations.mac_of(address) {
            Some(reserved) => reserved == mac,
            None => self.in_pool(address),
        }
    }

    fn has_entry(&self, key: &ClientKey) -> bool {
        let own = self.by_mac.get(&key.mac).into_iter().flatten();
        own.filter_map(|address| self.entries.get(address))
            .any(|entry| entry.key == *key)
    }

    fn revive(
        &self,
        record: &LeaseRecord,
        now: Instant,
        unix_now: u64,
    ) -> Option<(Ipv4Addr, Entry)> {
        let mac: Mac = record.mac.parse().ok()?;
        let id = match &record.client_id {
            Some(text) => Some(from_hex(text).filter(|id| id.len() <= CLIENT_ID_LEN_MAX)?),
            None => None,
        };
        let until = match record.expires_unix.checked_sub(unix_now) {
            Some(left) => now + Duration::from_secs(left.min(u64::from(record.lease_secs))),
            None => now - Duration::from_secs((unix_now - record.expires_unix).min(AGE_SECS_MAX)),
        };
        let entry = Entry {
            key: ClientKey::new(mac, id.as_deref()),
            port: None,
            hostname: record
                .hostname
                .as_deref()
                .and_then(|name| name.parse().ok()),
            state: State::Bound {
                until,
                secs: record.lease_secs,
            },
            seen: until - Duration::from_secs(u64::from(record.lease_secs)),
            former: None,
        };
        Some((record.address, entry))
    }
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let pair = |pair: &[u8]| match pair {
        &[high, low] => u8::try_from(digit(high)? << 4 | digit(low)?).ok(),
        _ => None,
    };
    text.as_bytes().chunks(2).map(pair).collect()
}
