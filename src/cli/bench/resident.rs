//! What the kernel says that processes take: resident memory and processor time (proc(5)).

use std::fs;
use std::ops::AddAssign;

/// Memory of one or several processes, KiB.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Resident {
    /// All of it, with what other processes have too: the program itself, libraries.
    pub(super) all: u64,
    /// What no other process has.
    pub(super) private: u64,
}

impl AddAssign for Resident {
    fn add_assign(&mut self, other: Self) {
        self.all += other.all;
        self.private += other.private;
    }
}

impl Resident {
    /// Of a process, by its page tables. The kernel's counters, which /proc/PID/status has, lag by up
    /// to 64 pages per thread and processor (Documentation/filesystems/proc.rst on VmRSS).
    ///
    /// # Errors
    /// There is no such process, or it is another user's.
    pub(super) fn of(pid: u32) -> Result<Self, String> {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
        Self::parse(&text).ok_or_else(|| format!("{path} has no Rss"))
    }

    fn parse(text: &str) -> Option<Self> {
        Some(Self {
            all: kib(text, "Rss")?,
            private: kib(text, "Private_Clean")? + kib(text, "Private_Dirty")?,
        })
    }
}

/// The most that a process has had resident since it began, KiB. 0 where the kernel does not say.
pub(super) fn highest(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    kib(&text, "VmHWM").unwrap_or(0)
}

/// Processor time of a process's threads, seconds.
///
/// # Errors
/// The process is gone, or the kernel keeps no such statistics (CONFIG_SCHED_INFO).
pub(super) fn busy_secs(pid: u32) -> Result<f64, String> {
    let directory = format!("/proc/{pid}/task");
    let failed = |error: std::io::Error| format!("{directory}: {error}");
    let mut nanos = 0;
    for task in fs::read_dir(&directory).map_err(failed)? {
        let path = task.map_err(failed)?.path().join("schedstat");
        // A thread may end between two looks.
        let text = fs::read_to_string(path).unwrap_or_default();
        let first = text.split_whitespace().next();
        nanos += first.and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
    }
    match nanos {
        0 => Err(format!("{directory}/*/schedstat says nothing")),
        _ => Ok(nanos as f64 / 1e9),
    }
}

/// Children of a process.
pub(super) fn children(parent: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries.flatten().filter_map(|entry| {
        let name = entry.file_name();
        name.to_str()?.parse().ok()
    });
    pids.filter(|pid| {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        kib(&text, "PPid") == Some(u64::from(parent))
    })
    .collect()
}

/// The number behind `key:`.
fn kib(text: &str, key: &str) -> Option<u64> {
    let rest = |line: &'_ str| Some(line.strip_prefix(key)?.strip_prefix(':')?.to_owned());
    let found = text.lines().find_map(rest)?;
    found.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rollup_is_read() {
        let text = "5581-7ffe ---p 00000000 00:00 0  [rollup]\nRss:                6768 kB\n\
                    Pss:                5454 kB\nPrivate_Clean:      3660 kB\n\
                    Private_Dirty:      1568 kB\nPrivate_Hugetlb:       0 kB\n";
        let expected = Resident {
            all: 6768,
            private: 5228,
        };
        assert_eq!(Resident::parse(text), Some(expected));
        assert_eq!(Resident::parse("Rss: 1 kB\n"), None);
    }

    #[test]
    fn this_process_takes_memory_and_time_and_knows_its_children() {
        let own = std::process::id();
        let resident = Resident::of(own).unwrap();
        assert!(resident.all > 500 && resident.private <= resident.all);
        assert!(highest(own) > 500);
        assert!(busy_secs(own).unwrap() > 0.0);
        let mut child = std::process::Command::new("sleep")
            .arg("5")
            .spawn()
            .unwrap();
        assert!(children(own).contains(&child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(Resident::of(child.id()).is_err());
    }
}
