//! How much memory TCP's buffers may take by default, and how amounts of memory are written.

use std::fs;
use std::path::Path;

use crate::nat::tcp::budget;

/// The least that is of use: some busy flows with full buffers, and a page each way for thousands.
pub const TCP_MEMORY_MIN: usize = 16 << 20;
/// More than all flows that there can be would take.
pub const TCP_MEMORY_MAX: usize = 64 << 30;
/// Of the machine's memory: VMs have most of it.
const SHARE: u64 = 8;
/// By default no more: 700 connections with full buffers of 1.5 MiB each.
const DEFAULT_MAX: u64 = 1 << 30;

/// An eighth of the machine's memory, or of what the control groups of this process leave it; 16 MiB to 1 GiB.
pub fn tcp_memory_default() -> usize {
    let machine = fs::read_to_string("/proc/meminfo").ok();
    let machine = machine.and_then(|text| total_of(&text));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = limit_of_group(Path::new("/sys/fs/cgroup"), &groups);
    let memory = machine.into_iter().chain(group).min();
    let share = memory.map_or(budget::DEFAULT as u64, |bytes| bytes / SHARE);
    share.clamp(TCP_MEMORY_MIN as u64, DEFAULT_MAX) as usize
}

/// MemTotal of /proc/meminfo, bytes.
fn total_of(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find(|line| line.starts_with("MemTotal:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    kib.checked_mul(1024)
}

/// The least memory.max on the way from the root to this process's group (cgroup v2).
fn limit_of_group(root: &Path, groups: &str) -> Option<u64> {
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let group = root.join(path);
    let ancestors = group
        .ancestors()
        .take_while(|at| at.starts_with(root))
        .filter_map(|at| fs::read_to_string(at.join("memory.max")).ok());
    // "max" is no number.
    ancestors.filter_map(|text| text.trim().parse().ok()).min()
}

/// Reads an amount of memory: bytes, or with K, M or G (of 1024).
///
/// # Errors
/// It is none, or out of bounds.
pub fn parse_memory(text: &str) -> Result<usize, String> {
    let (number, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let bytes = number.parse::<usize>().ok();
    let bytes = bytes.and_then(|number| number.checked_mul(1 << shift));
    let Some(bytes) = bytes.filter(|_| !number.starts_with('+')) else {
        return Err(format!("{text:?} is no amount of memory like 64M or 1G"));
    };
    match (TCP_MEMORY_MIN..=TCP_MEMORY_MAX).contains(&bytes) {
        true => Ok(bytes),
        false => Err(format!("{text} is not between 16M and 64G")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_follows_the_machine_and_its_groups() {
        assert_eq!(
            total_of("MemTotal:  2048 kB\nMemFree: 1 kB\n"),
            Some(2 << 20)
        );
        assert_eq!(total_of("nonsense"), None);
        let root = std::env::temp_dir().join(format!("lanlet-groups-{}", std::process::id()));
        let group = root.join("user.slice/app.service");
        fs::create_dir_all(&group).unwrap();
        let text = "1:name=systemd:/x\n0::/user.slice/app.service\n";
        assert_eq!(limit_of_group(&root, text), None);
        fs::write(group.join("memory.max"), "max\n").unwrap();
        assert_eq!(limit_of_group(&root, text), None);
        fs::write(root.join("user.slice/memory.max"), "209715200\n").unwrap();
        assert_eq!(limit_of_group(&root, text), Some(200 << 20));
        fs::write(group.join("memory.max"), "104857600\n").unwrap();
        assert_eq!(limit_of_group(&root, text), Some(100 << 20));
        fs::remove_dir_all(&root).unwrap();
        assert!((TCP_MEMORY_MIN..=1 << 30).contains(&tcp_memory_default()));
    }

    #[test]
    fn amounts_of_memory() {
        for (text, bytes) in [("64M", 64 << 20), ("1g", 1 << 30), ("33554432", 32 << 20)] {
            assert_eq!(parse_memory(text), Ok(bytes));
        }
        for wrong in [
            "",
            "M",
            "-1G",
            "+64M",
            "1.5G",
            "1M",
            "65G",
            "99999999999G",
            "64MB",
        ] {
            let reason = parse_memory(wrong).unwrap_err();
            assert!(reason.contains(wrong), "{reason}");
        }
    }
}
