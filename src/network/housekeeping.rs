//! What has to be looked after while a network runs: the lease file, the host's IPv6, the workers' load,
//! and memory that nobody wants any more.

use std::net::Ipv6Addr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use super::balance::Balancer;
use super::{Shared, lock};
use crate::config::Subnet;
use crate::control::lease_file::LeaseFile;
use crate::dhcp::lease::{LEASES_MAX, LeaseRecord, LeaseTable};
use crate::frame;
use crate::gateway::Lan6;
use crate::gateway::ndp::ROUTES_MAX;
use crate::port::vhost_user::allowance;
use crate::sys::arena;
use crate::uplink::networks;
use crate::uplink::route::RouteTable;
use crate::worker::Command;

/// How often all of that is looked after. A look at the host's routes takes 3 us.
const HOUSEKEEPING: Duration = Duration::from_secs(1);

/// The lease file and how far it follows the table.
pub(super) struct LeaseKeeper {
    file: LeaseFile,
    subnet: Subnet,
    /// Leases of other subnets that the network had, for when it has them again.
    others: Vec<LeaseRecord>,
    /// The table's generation in the file.
    saved: u64,
    /// The failure that was warned of.
    warned: Option<String>,
}

impl LeaseKeeper {
    /// Restores the leases of the last run into `leases`.
    pub(super) fn restore(file: LeaseFile, leases: &mut LeaseTable, subnet: Subnet) -> Self {
        let path = file.path().display();
        let mut others = Vec::new();
        match file.load() {
            Ok(records) => {
                let is_other = |record: &&LeaseRecord| {
                    !(subnet.network..=subnet.broadcast()).contains(&record.address)
                };
                others.extend(records.iter().filter(is_other).cloned());
                let count = leases.restore(&records, frame::Instant::ZERO, unix_now());
                log::debug!("{count} leases restored from {path}");
            }
            Err(error) => log::warn!("leases of the last run are lost: {path}: {error}"),
        }
        Self {
            saved: leases.generation(),
            file,
            subnet,
            others,
            warned: None,
        }
    }

    /// Writes the file if the table has changed since. A failure is tried again the next time, and
    /// warned of once for each cause. It blocks as long as the disk does.
    pub(super) fn follow(&mut self, leases: &Mutex<LeaseTable>, now: frame::Instant) {
        let (generation, records) = {
            let leases = lock(leases);
            if leases.generation() == self.saved {
                return;
            }
            (leases.generation(), leases.records(now, unix_now()))
        };
        let room = LEASES_MAX.saturating_sub(records.len());
        let others = self.others.iter().take(room).cloned();
        let records = records.into_iter().chain(others).collect();
        let path = self.file.path().display();
        match self.file.save(self.subnet, records) {
            Ok(()) => {
                self.saved = generation;
                if self.warned.take().is_some() {
                    log::info!("leases are kept again: {path}");
                }
            }
            Err(error) => {
                let cause = error.to_string();
                if self.warned.as_ref() != Some(&cause) {
                    log::warn!("leases are not kept: {path}: {cause}");
                    self.warned = Some(cause);
                }
            }
        }
    }
}

/// Whether the host has a way to the IPv6 outside, as its routing table says, and where else it leads.
pub(super) struct HostIpv6 {
    routes: RouteTable,
    lan: Option<Lan6>,
    has_default: bool,
    prefixes: Arc<[(Ipv6Addr, u8)]>,
    warned: bool,
}

impl HostIpv6 {
    /// Nothing is known yet.
    pub(super) fn open(lan: Option<Lan6>) -> std::io::Result<Self> {
        Ok(Self {
            routes: RouteTable::open()?,
            lan,
            has_default: false,
            prefixes: Arc::default(),
            warned: false,
        })
    }

    /// Looks again; whether anything has changed.
    pub(super) fn look(&mut self) -> bool {
        let Some(lan) = self.lan else {
            return false;
        };
        let has_default = self.routes.has_default6();
        let mut prefixes = match has_default {
            true => Vec::new(),
            false => networks::routed6(),
        };
        prefixes.retain(|(prefix, len)| {
            let common = u32::from(lan.prefix.min(*len));
            (prefix.to_bits() ^ lan.address.to_bits()).leading_zeros() < common
        });
        let is_over = prefixes.len() > ROUTES_MAX;
        if is_over && !std::mem::replace(&mut self.warned, true) {
            log::warn!(
                "the host has routes to {} IPv6 prefixes: guests are told of the {ROUTES_MAX} widest",
                prefixes.len()
            );
        }
        prefixes.truncate(ROUTES_MAX);
        let before = (self.has_default, std::mem::take(&mut self.prefixes));
        (self.has_default, self.prefixes) = (has_default, prefixes.into());
        before != (self.has_default, Arc::clone(&self.prefixes))
    }

    /// What workers are to know.
    pub(super) fn command(&self) -> Command {
        Command::HostIpv6 {
            has_default: self.has_default,
            prefixes: Arc::clone(&self.prefixes),
        }
    }

    /// The prefixes that the last look found.
    pub(super) fn prefixes(&self) -> Arc<[(Ipv6Addr, u8)]> {
        Arc::clone(&self.prefixes)
    }

    /// What the last look found.
    pub(super) fn has_default(&self) -> bool {
        self.has_default
    }

    /// Tells of a change.
    fn follow(&mut self, shared: &Shared) {
        let before = self.has_default;
        if !self.look() {
            return;
        }
        match (before, self.has_default, self.prefixes.len()) {
            (false, true, _) => log::info!("the host has IPv6: guests are given a default route"),
            (true, false, _) => {
                log::info!("the host has lost IPv6: guests are told to drop their default route")
            }
            (_, _, count) => log::info!("guests are given routes to {count} IPv6 prefixes"),
        }
        shared.host_ipv6.store(self.has_default, Ordering::Relaxed);
        *lock(&shared.host_prefixes6) = self.prefixes();
        shared.crew.tell_all(|_| self.command());
    }
}

/// Keeps the lease file, the guests' IPv6 route and the spread of ports current, and memory small.
pub(super) async fn housekeep(
    shared: &Arc<Shared>,
    keeper: Option<&Arc<Mutex<LeaseKeeper>>>,
    mut host_ipv6: HostIpv6,
) {
    let mut tick = tokio::time::interval(HOUSEKEEPING);
    let mut balancer = Balancer::new();
    loop {
        tick.tick().await;
        host_ipv6.follow(shared);
        balancer.follow(shared);
        arena::release_unused();
        allowance::settle();
        // A logger that counts lines in place of writing them can tell how many.
        log::logger().flush();
        if let Some(keeper) = keeper {
            let (keeper, shared) = (Arc::clone(keeper), Arc::clone(shared));
            // A slow disk must not hold up the resolver on this thread. A panic was reported.
            let _ = tokio::task::spawn_blocking(move || {
                lock(&keeper).follow(&shared.leases, shared.now());
            })
            .await;
        }
    }
}

fn unix_now() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |time| time.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NetworkConfig;
    use crate::dhcp::DhcpConfig;
    use crate::frame::{Mac, PortId};
    use crate::gateway::LanConfig;
    use std::fs;

    #[test]
    fn a_failed_save_is_made_up_for_and_an_unchanged_table_is_not_written() {
        let directory = std::env::temp_dir().join(format!("lanlet-keeper-{}", std::process::id()));
        let path = directory.join("leases");
        let config = NetworkConfig::default();
        let lan = LanConfig {
            mac: Mac([2; 6]),
            address: config.gateway,
            prefix: config.prefix,
            mtu: config.mtu,
            v6: None,
        };
        let now = frame::Instant::from_secs(1);
        let range = DhcpConfig::new(lan.clone()).range();
        let mut table = LeaseTable::new(range, &lan).unwrap();
        let mut keeper =
            LeaseKeeper::restore(LeaseFile::new(path.clone()), &mut table, config.subnet());
        let table = Mutex::new(table);
        lock(&table)
            .attach(Mac([4; 6]), PortId(1), None, now)
            .unwrap();
        keeper.follow(&table, now);
        assert!(keeper.warned.as_ref().unwrap().contains("No such file"));

        fs::create_dir(&directory).unwrap();
        keeper.follow(&table, now);
        assert!(keeper.warned.is_none() && path.exists());
        fs::remove_file(&path).unwrap();
        keeper.follow(&table, now);
        assert!(!path.exists(), "nothing had changed");
        fs::remove_dir(&directory).unwrap();
    }
}
