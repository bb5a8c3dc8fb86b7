//! What has to be looked after while a network runs: the lease file, and where DNS over TCP goes.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use super::{Shared, lock};
use crate::control::lease_file::LeaseFile;
use crate::control::resolver::ResolverHandle;
use crate::dhcp::lease::LeaseTable;
use crate::frame;
use crate::worker::Command;

/// How often the lease file and the DNS upstream are looked after.
const HOUSEKEEPING: Duration = Duration::from_secs(1);

/// Keeps the lease file and the upstream of DNS over TCP current.
pub(super) async fn housekeep(
    shared: &Shared,
    resolver: &ResolverHandle,
    file: Option<&LeaseFile>,
) {
    let mut upstream = None;
    let mut saved = lock(&shared.leases).generation();
    let mut tick = tokio::time::interval(HOUSEKEEPING);
    loop {
        tick.tick().await;
        let current = resolver.upstream().and_then(|server| match server {
            SocketAddr::V4(server) => Some(server),
            SocketAddr::V6(_) => None,
        });
        if upstream != current {
            upstream = current;
            shared.worker.send(Command::DnsUpstream(current));
        }
        let generation = lock(&shared.leases).generation();
        if let (Some(file), true) = (file, generation != saved) {
            saved = generation;
            save(file, shared);
        }
    }
}

pub(super) fn restore(file: &LeaseFile, leases: &mut LeaseTable) {
    match file.load() {
        Ok(records) => {
            let count = leases.restore(&records, frame::Instant::ZERO, unix_now());
            log::debug!("{count} leases restored from {}", file.path().display());
        }
        Err(error) => log::warn!(
            "leases of the last run are lost: {}: {error}",
            file.path().display()
        ),
    }
}

pub(super) fn save(file: &LeaseFile, shared: &Shared) {
    let records = lock(&shared.leases).records(shared.now(), unix_now());
    if let Err(error) = file.save(records) {
        log::warn!("leases are not kept: {}: {error}", file.path().display());
    }
}

fn unix_now() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |time| time.as_secs())
}
