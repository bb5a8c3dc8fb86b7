//! Users and groups inside a guest's user namespace.
//!
//! The user's own id is itself inside, so that programs find its home, or 0 where that is wished. Where
//! the system has subordinate ids for the user (subuid(5)), they fill the other ids from 0 on: a command
//! can then change to root, `nobody` and the users of daemons. The kernel takes such a map from
//! `newuidmap` and `newgidmap` alone, which are setuid and run outside; without them there is one id,
//! and `setgroups` is off (user_namespaces(7)).
//!
//! Further groups of the user have no id inside and show as `nogroup`; what they may access stays
//! accessible.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{getegid, geteuid};
use rustix::thread::{capabilities, configure_capability_in_ambient_set, set_capabilities};
use serde::{Deserialize, Serialize};

use crate::sys::{namespace, small_file, user};

/// Longest file of subordinate ids that is read: some 100,000 users.
const FILE_LEN_MAX: usize = 4 * 1024 * 1024;
/// Ranges of one user that are used: the kernel takes 340 lines in a map (UID_GID_MAP_MAX_EXTENTS).
const RANGES_MAX: usize = 64;

/// The ids of the user who starts a guest, outside and inside. Read before the namespace is made.
#[derive(Clone, Copy, Debug)]
pub struct OwnIds {
    uid: u32,
    gid: u32,
    as_root: bool,
}

/// Which maps somebody outside has written.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct Mapped {
    /// That of users.
    pub users: bool,
    /// That of groups.
    pub groups: bool,
}

impl OwnIds {
    /// Of the calling process.
    pub fn current(as_root: bool) -> Self {
        Self {
            uid: geteuid().as_raw(),
            gid: getegid().as_raw(),
            as_root,
        }
    }

    /// Writes the maps that are not there yet, from inside.
    ///
    /// # Errors
    /// A security module forbids it.
    pub fn map_rest(&self, mapped: Mapped) -> io::Result<()> {
        let inside = |id| if self.as_root { 0 } else { id };
        if !mapped.users {
            namespace::map_user(inside(self.uid), self.uid)?;
        }
        if !mapped.groups {
            namespace::map_group(inside(self.gid), self.gid)?;
        }
        Ok(())
    }

    /// Writes the maps of the process `pid`, which has entered a fresh user namespace, with the user's
    /// subordinate ids. Not written: those that the system has no ids or no program for.
    pub fn map_subordinate(&self, pid: u32) -> Mapped {
        let Some(name) = user::name_of(self.uid) else {
            return Mapped::default();
        };
        let map = |program, file, own| self.run(program, Path::new(file), &name, pid, own);
        Mapped {
            users: map("newuidmap", "/etc/subuid", self.uid),
            groups: map("newgidmap", "/etc/subgid", self.gid),
        }
    }

    fn run(&self, program: &str, file: &Path, name: &str, pid: u32, own: u32) -> bool {
        let Ok(text) = small_file::read_text(file, FILE_LEN_MAX) else {
            return false;
        };
        let ranges = ranges_of(&text, name, self.uid);
        if ranges.is_empty() {
            return false;
        }
        let inside = if self.as_root { 0 } else { own };
        let words = extents(inside, own, &ranges)
            .into_iter()
            .flat_map(|extent| [extent.inside, extent.outside, extent.count])
            .map(|number| number.to_string());
        let run = Command::new(program)
            .arg(pid.to_string())
            .args(words)
            .stdin(Stdio::null())
            .output();
        let why = match run {
            Ok(output) if output.status.success() => return true,
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => format!("{program}: {error} (Debian's package uidmap has it)"),
        };
        log::info!(
            "the subordinate ids of {} are not used: {why}",
            file.display()
        );
        false
    }
}

/// Consecutive ids.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Range {
    start: u32,
    count: u32,
}

/// Consecutive ids outside, as consecutive ids inside.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Extent {
    inside: u32,
    outside: u32,
    count: u32,
}

/// The user's lines of a subuid(5) file.
fn ranges_of(text: &str, name: &str, uid: u32) -> Vec<Range> {
    let uid = uid.to_string();
    let of_line = |line: &str| {
        let mut words = line.trim().split(':');
        words.next().filter(|&who| who == name || who == uid)?;
        let start: u32 = words.next()?.parse().ok()?;
        let count: u32 = words.next()?.parse().ok()?;
        start.checked_add(count)?;
        (count > 0).then_some(Range { start, count })
    };
    text.lines().filter_map(of_line).take(RANGES_MAX).collect()
}

/// A map in which `own` is `inside`, and the ranges are the other ids from 0 on.
fn extents(inside: u32, own: u32, ranges: &[Range]) -> Vec<Extent> {
    let mut extents = Vec::new();
    let mut next = 0;
    for &Range { start, count } in ranges {
        // Up to the own id, and what is beyond it.
        let before = inside.saturating_sub(next).min(count);
        for (at, count) in [(start, before), (start + before, count - before)] {
            if next == inside {
                next += 1;
            }
            let count = count.min(u32::MAX - 1 - next);
            if count > 0 {
                extents.push(Extent {
                    inside: next,
                    outside: at,
                    count,
                });
                next += count;
            }
        }
    }
    extents.push(Extent {
        inside,
        outside: own,
        count: 1,
    });
    extents
}

/// Lets the command that this process becomes keep the capabilities that it has in its user namespace:
/// who is not root there loses them at execve otherwise (capabilities(7)).
///
/// # Errors
/// A security module forbids it, or the kernel is older than 4.3.
pub fn keep_capabilities() -> io::Result<()> {
    let mut sets = capabilities(None)?;
    sets.inheritable = sets.permitted;
    set_capabilities(None, sets)?;
    for capability in sets.permitted.iter() {
        configure_capability_in_ambient_set(capability, true)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(inside: u32, ranges: &[(u32, u32)]) -> Vec<(u32, u32, u32)> {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|&(start, count)| Range { start, count })
            .collect();
        extents(inside, 1000, &ranges)
            .iter()
            .map(|extent| (extent.inside, extent.outside, extent.count))
            .collect()
    }

    #[test]
    fn subordinate_ids_go_around_the_own_one() {
        assert_eq!(
            lines(1000, &[(100_000, 65_536)]),
            [(0, 100_000, 1000), (1001, 101_000, 64_536), (1000, 1000, 1)]
        );
        assert_eq!(
            lines(0, &[(100_000, 65_536)]),
            [(1, 100_000, 65_536), (0, 1000, 1)]
        );
        // Ranges that end before it, at it, and beyond.
        assert_eq!(
            lines(1000, &[(5000, 400), (7000, 600), (9000, 10)]),
            [
                (0, 5000, 400),
                (400, 7000, 600),
                (1001, 9000, 10),
                (1000, 1000, 1)
            ]
        );
        assert_eq!(lines(1000, &[]), [(1000, 1000, 1)]);
        // No id is there twice, and none is the one that stands for none.
        for (inside, _, count) in lines(7, &[(0, u32::MAX), (1, u32::MAX - 1)]) {
            assert!(u64::from(inside) + u64::from(count) <= u64::from(u32::MAX));
        }
    }

    #[test]
    fn lines_are_the_users_by_name_or_number() {
        let text = "other:1:2\nme:100000:65536\n1000:300000:10\nme:x:1\nme:5\nme:4294967295:9\nme:7:0\n\n:";
        let found: Vec<_> = ranges_of(text, "me", 1000)
            .iter()
            .map(|range| (range.start, range.count))
            .collect();
        assert_eq!(found, [(100_000, 65_536), (300_000, 10)]);
    }
}
