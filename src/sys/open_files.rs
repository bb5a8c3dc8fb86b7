//! How the process's open files are shared out, so that guests leave some to their user.
//!
//! The kernel gives the lowest number that is free, so a fresh descriptor's number tells how many are
//! taken. Guests' flows stay below one number, what else guests cause (DNS queries) below a higher one,
//! and the rest is for the user: clients at the control socket, ports and listeners to come.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

/// Files left to control clients, ports and listeners: an `exec` takes five (connection, tap, netlink, the
/// guest's process, and one to look at the namespace).
pub const CONTROL_FILES: u64 = 64;
/// Files left to DNS queries, each of which has a socket of its own: a name is asked for before a flow begins.
pub const DNS_FILES: u64 = 64;

/// The number that the files of guests' flows stay below, where ports may take `to_come` more.
pub fn flows_max(to_come: usize) -> i32 {
    number(|limit| of_flows(limit, to_come))
}

/// Checks that a guest's query leaves the rest of the files alone.
///
/// # Errors
/// EMFILE: it would not.
pub fn check_query(fd: BorrowedFd<'_>) -> io::Result<()> {
    match fd.as_raw_fd() < number(of_queries) {
        true => Ok(()),
        false => Err(Errno::MFILE.into()),
    }
}

fn number(share: impl Fn(u64) -> u64) -> i32 {
    let limit = getrlimit(Resource::Nofile).current;
    limit.map_or(i32::MAX, |limit| {
        i32::try_from(share(limit)).unwrap_or(i32::MAX)
    })
}

/// What a limit has for guests' flows: all but what is spared, and three quarters at least, since what
/// ports may take in the worst case few of them do.
fn of_flows(limit: u64, to_come: usize) -> u64 {
    limit - (CONTROL_FILES + DNS_FILES + to_come as u64).min(limit / 4)
}

/// What a limit has for flows and queries; never all.
fn of_queries(limit: u64) -> u64 {
    limit - CONTROL_FILES.min(limit / 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_leave_files_to_queries_and_both_to_the_user() {
        assert_eq!(of_flows(20_000, 0), 20_000 - 128);
        assert_eq!(of_flows(20_000, 99), 20_000 - 128 - 99);
        assert_eq!(of_flows(20_000, 4_095 * 99), 15_000);
        assert_eq!(of_flows(100, 99), 75);
        assert_eq!(of_flows(0, 99), 0);
        for limit in [0, 1, 64, 100, 1_024, 20_000] {
            assert!(of_flows(limit, 0) <= of_queries(limit) && of_queries(limit) <= limit);
        }
        assert_eq!(of_queries(1_024), 1_024 - 64);
    }
}
