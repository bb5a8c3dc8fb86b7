//! When, where and with which versions it was measured.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use super::world::find;

/// Facts, as (what, value).
pub(super) fn about(base: Option<&Path>) -> Vec<(String, String)> {
    let mut facts = vec![
        ("date".to_owned(), today()),
        ("kernel".to_owned(), kernel()),
        ("processors".to_owned(), processors()),
        (
            "lanlet".to_owned(),
            format!("lanlet {}", env!("CARGO_PKG_VERSION")),
        ),
    ];
    if let Some(base) = base {
        let path = base.display();
        let version = version(base).unwrap_or_default();
        facts.push(("base".to_owned(), format!("{path} ({version})")));
    }
    for program in ["pasta", "slirp4netns", "nft", "qemu-system-x86_64"] {
        let found = find(program).and_then(|path| version(&path));
        facts.extend(found.map(|version| (program.to_owned(), version)));
    }
    facts
}

/// What a program calls itself: the first line it prints for `--version`.
fn version(program: &Path) -> Option<String> {
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().next().map(|line| line.trim().to_owned())
}

fn kernel() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    release.trim().to_owned()
}

fn processors() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == "model name").then(|| value.trim().to_owned())
    });
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    match model {
        Some(model) => format!("{count} of {model}"),
        None => count.to_string(),
    }
}

fn today() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    date(since.map_or(0, |since| since.as_secs() / 86_400))
}

/// The date so many days after 1970-01-01, in the Gregorian calendar (civil_from_days,
/// <https://howardhinnant.github.io/date_algorithms.html>).
fn date(days: u64) -> String {
    // Days since 0000-03-01, in eras of 400 years: a year that begins in March has its odd day last.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(date(0), "1970-01-01");
        assert_eq!(date(11_016), "2000-02-29");
        assert_eq!(date(11_017), "2000-03-01");
        assert_eq!(date(20_453), "2025-12-31");
        assert_eq!(date(20_454), "2026-01-01");
    }

    #[test]
    fn this_machine_has_a_kernel_and_processors() {
        let facts = about(None);
        assert!(
            facts.iter().all(|(_, value)| !value.is_empty()),
            "{facts:?}"
        );
    }
}
