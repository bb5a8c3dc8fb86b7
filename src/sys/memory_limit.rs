//! How much memory this process may use: the machine's, or what its control groups leave of it.

use std::fs;
use std::path::Path;

/// Where control groups are mounted: version 2, the same beside version 1, and version 1's memory.
const UNIFIED: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
const VERSION_1: &str = "/sys/fs/cgroup/memory";
/// Where not even the machine's memory can be read: what the smallest that runs VMs have.
const UNKNOWN_BYTES: u64 = 1 << 30;

/// Bytes, when the process asked first.
pub fn bytes() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| total(&text));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = groups.lines().filter_map(group_limit);
    limits
        .chain([machine.unwrap_or(UNKNOWN_BYTES)])
        .min()
        .unwrap_or(UNKNOWN_BYTES)
}

/// Of /proc/meminfo.
fn total(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The lowest limit of a group and those above it, of a line of /proc/self/cgroup.
fn group_limit(line: &str) -> Option<u64> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (controllers, path) = (fields.next()?, fields.next()?);
    let lowest = |root: &str, file: &str| {
        let path = Path::new(path.trim_start_matches('/'));
        let levels = path.ancestors();
        let limits = levels.map(|level| Path::new(root).join(level).join(file));
        // "max" is no number.
        limits
            .filter_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok())
            .min()
    };
    match controllers {
        "" => UNIFIED
            .into_iter()
            .filter_map(|root| lowest(root, "memory.max"))
            .min(),
        _ if controllers.split(',').any(|name| name == "memory") => {
            lowest(VERSION_1, "memory.limit_in_bytes")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_s_memory_is_read() {
        let text = "MemTotal:        2048 kB\nMemFree:  1 kB\n";
        assert_eq!(total(text), Some(2 << 20));
        assert_eq!(total("MemFree: 1 kB"), None);
        assert!((1 << 20..1 << 50).contains(&bytes()));
    }

    #[test]
    fn lines_that_are_no_memory_group_s_limit_nothing() {
        for line in ["", "0", "3:cpuset:/", "0::/no/such/group", "4:memory:"] {
            // Of the groups above, which all have.
            let limit = group_limit(line);
            assert!(limit.is_none_or(|limit| limit >= bytes()), "{line}");
        }
    }
}
