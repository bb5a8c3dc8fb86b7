//! Log records on stderr: `2026-11-28T21:34:19.123Z lanlet: warning: …`, without the time where stderr is
//! the journal, which has its own. Lines that come too often are only counted ([`limit`]).

mod limit;

use std::fmt;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use log::{Level, LevelFilter, Log, Metadata, Record};
use rustix::event::{PollFd, PollFlags, Timespec};

use self::limit::{Limit, Verdict};

struct Stderr {
    /// Records carry no time.
    is_journal: AtomicBool,
    /// Records of other crates, which are of interest to developers only.
    has_others: AtomicBool,
    /// How many lines of each kind there were.
    limit: Mutex<Limit>,
}

static LOGGER: Stderr = Stderr {
    is_journal: AtomicBool::new(false),
    has_others: AtomicBool::new(false),
    limit: Mutex::new(Limit::new()),
};

/// Sets what is logged: `LANLET_LOG`, else info, moved up by each -v and down by each -q.
pub(super) fn init(verbose: u8, quiet: u8) {
    let word = std::env::var("LANLET_LOG")
        .ok()
        .filter(|word| !word.is_empty());
    let base = word
        .as_deref()
        .map_or(Some(LevelFilter::Info), |word| word.parse().ok());
    let (level, has_others) = level(base.unwrap_or(LevelFilter::Info), verbose, quiet);
    log::set_max_level(level);
    LOGGER.has_others.store(has_others, Relaxed);
    LOGGER.is_journal.store(is_journal(), Relaxed);
    if log::set_logger(&LOGGER).is_ok() && base.is_none() {
        let word = word.unwrap_or_default();
        log::warn!("LANLET_LOG={word:?} is none of off, error, warn, info, debug, trace");
    }
}

/// Looks again at what stderr is, after it was put in place of another.
pub(super) fn stderr_has_changed() {
    LOGGER.is_journal.store(is_journal(), Relaxed);
}

/// Whether what a user asks to see at the usual level is to be shown on stdout, too.
pub(super) fn is_quiet() -> bool {
    log::max_level() < LevelFilter::Info
}

/// The level, and whether more than that was asked for.
fn level(base: LevelFilter, verbose: u8, quiet: u8) -> (LevelFilter, bool) {
    let steps = base as isize + isize::from(verbose) - isize::from(quiet);
    // -q never silences errors.
    let lowest = (LevelFilter::Error as isize).min(base as isize);
    let level = match steps.max(lowest) {
        0 => LevelFilter::Off,
        1 => LevelFilter::Error,
        2 => LevelFilter::Warn,
        3 => LevelFilter::Info,
        4 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    (level, steps > LevelFilter::Trace as isize)
}

/// Whether stderr is the journal's socket (JOURNAL_STREAM, systemd.exec(5)).
fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    rustix::fs::fstat(std::io::stderr())
        .is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("lanlet") || self.has_others.load(Relaxed)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        // Who asks for more than the usual wants all of it.
        if record.level() > Level::Info {
            let part = record.target().trim_start_matches("lanlet::");
            self.write(record.level(), &format_args!("{part}: {}", record.args()));
            return;
        }
        self.flush();
        let place = (
            record.file_static().unwrap_or_default(),
            record.line().unwrap_or_default(),
        );
        let text = || record.args().to_string();
        let verdict = self
            .limit()
            .admit(place, record.level(), text, running_for());
        match verdict {
            Verdict::Write => self.write(record.level(), record.args()),
            Verdict::WriteLast => {
                let line = format_args!(
                    "{} (more like it are only counted for a while)",
                    record.args()
                );
                self.write(record.level(), &line);
            }
            Verdict::LeaveOut => {}
        }
    }

    /// Tells what was left out, where the time for that has come.
    fn flush(&self) {
        let told = self.limit().take_left_out(running_for());
        for (level, line) in told {
            self.write(level, &line);
        }
    }
}

impl Stderr {
    fn limit(&self) -> MutexGuard<'_, Limit> {
        self.limit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, level: Level, what: &dyn fmt::Display) {
        let stamp = Stamp(self.is_journal.load(Relaxed));
        let word = match level {
            Level::Error => "error: ",
            Level::Warn => "warning: ",
            Level::Info | Level::Debug | Level::Trace => "",
        };
        let line = format!("{stamp}lanlet: {word}{what}\n");
        // One write per line, so that threads and processes do not mix theirs; a closed stderr is
        // nobody's loss.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}

/// Time by a clock that nobody sets.
fn running_for() -> Duration {
    static BEGUN: OnceLock<Instant> = OnceLock::new();
    BEGUN.get_or_init(Instant::now).elapsed()
}

/// Says something on the way out of a process whose other threads may hold stderr, and wait in it for a
/// reader: past them, and only if it takes no waiting.
pub(super) fn last_words(text: &str) {
    let line = format!("{}lanlet: {text}\n", Stamp(LOGGER.is_journal.load(Relaxed)));
    let stderr = std::io::stderr();
    let mut fds = [PollFd::from_borrowed_fd(stderr.as_fd(), PollFlags::OUT)];
    let at_once = Timespec::default();
    if rustix::event::poll(&mut fds, Some(&at_once)).is_ok_and(|ready| ready > 0) {
        let _ = rustix::io::write(stderr.as_fd(), line.as_bytes());
    }
}

/// What a line begins with: the time, unless who reads it has its own.
struct Stamp(bool);

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 {
            return Ok(());
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        write!(f, "{} ", Utc(now.unwrap_or_default()))
    }
}

/// A time since 1970 as RFC 3339 has it, in UTC: the zone's rules are a library's business, and logs of
/// several machines are read side by side.
struct Utc(Duration);

impl fmt::Display for Utc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const DAY_SECS: u64 = 86_400;
        let (days, secs) = (self.0.as_secs() / DAY_SECS, self.0.as_secs() % DAY_SECS);
        // Years are counted from a 1 March on, so that a leap day is the last of its year: days since
        // 0000-03-01 in eras of 400 years, which all have as many days.
        let days = days + 719_468;
        let (era, day) = (days / 146_097, days % 146_097);
        let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        let day = day - (153 * month + 2) / 5 + 1;
        let (month, carry) = if month < 10 {
            (month + 3, 0)
        } else {
            (month - 9, 1)
        };
        write!(
            f,
            "{:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
            400 * era + year + carry,
            secs / 3_600,
            secs / 60 % 60,
            secs % 60,
            self.0.subsec_millis()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels() {
        let level_of = |base, verbose, quiet| level(base, verbose, quiet).0;
        assert_eq!(level_of(LevelFilter::Info, 0, 0), LevelFilter::Info);
        assert_eq!(level_of(LevelFilter::Info, 1, 0), LevelFilter::Debug);
        assert_eq!(level(LevelFilter::Info, 2, 0), (LevelFilter::Trace, false));
        assert_eq!(level(LevelFilter::Info, 3, 0), (LevelFilter::Trace, true));
        assert_eq!(level_of(LevelFilter::Info, 0, 9), LevelFilter::Error);
        assert_eq!(level_of(LevelFilter::Off, 0, 1), LevelFilter::Off);
    }

    #[test]
    fn times_are_those_of_date() {
        // As `date --utc --date=@SECS` has them.
        for (secs, expected) in [
            (0, "1970-01-01T00:00:00"),
            (951_782_400, "2000-02-29T00:00:00"),
            (951_868_799, "2000-02-29T23:59:59"),
            (951_868_800, "2000-03-01T00:00:00"),
            (1_735_689_599, "2024-12-31T23:59:59"),
            (1_795_901_659, "2026-11-28T21:34:19"),
            (4_107_542_399, "2100-02-28T23:59:59"),
            (4_107_542_400, "2100-03-01T00:00:00"),
        ] {
            let time = Duration::from_secs(secs) + Duration::from_millis(7);
            assert_eq!(Utc(time).to_string(), format!("{expected}.007Z"));
        }
    }
}
