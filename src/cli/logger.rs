//! Log records on stderr: `lanlet: warning: …`.

use std::io::Write;

use log::{Level, LevelFilter, Log, Metadata, Record};

struct Stderr;

static LOGGER: Stderr = Stderr;

/// Sets what is logged: `LANLET_LOG`, else info, moved up by each -v and down by each -q.
pub(super) fn init(verbose: u8, quiet: u8) {
    let word = std::env::var("LANLET_LOG")
        .ok()
        .filter(|word| !word.is_empty());
    let base = word
        .as_deref()
        .map_or(Some(LevelFilter::Info), |word| word.parse().ok());
    log::set_max_level(level(base.unwrap_or(LevelFilter::Info), verbose, quiet));
    if log::set_logger(&LOGGER).is_ok() && base.is_none() {
        let word = word.unwrap_or_default();
        log::warn!("LANLET_LOG={word:?} is none of off, error, warn, info, debug, trace");
    }
}

fn level(base: LevelFilter, verbose: u8, quiet: u8) -> LevelFilter {
    let steps = base as isize + isize::from(verbose) - isize::from(quiet);
    // -q never silences errors.
    let lowest = (LevelFilter::Error as isize).min(base as isize);
    match steps.max(lowest) {
        0 => LevelFilter::Off,
        1 => LevelFilter::Error,
        2 => LevelFilter::Warn,
        3 => LevelFilter::Info,
        4 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    }
}

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Other crates' records are of interest to developers only.
        metadata.target().starts_with("lanlet") || log::max_level() >= LevelFilter::Trace
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = match record.level() {
            Level::Error => format!("lanlet: error: {}\n", record.args()),
            Level::Warn => format!("lanlet: warning: {}\n", record.args()),
            Level::Info => format!("lanlet: {}\n", record.args()),
            Level::Debug | Level::Trace => {
                let part = record.target().trim_start_matches("lanlet::");
                format!("lanlet: {}: {}\n", part, record.args())
            }
        };
        // One write per line, so that threads and processes do not mix theirs; a closed stderr is
        // nobody's loss.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels() {
        assert_eq!(level(LevelFilter::Info, 0, 0), LevelFilter::Info);
        assert_eq!(level(LevelFilter::Info, 1, 0), LevelFilter::Debug);
        assert_eq!(level(LevelFilter::Info, 9, 0), LevelFilter::Trace);
        assert_eq!(level(LevelFilter::Info, 0, 9), LevelFilter::Error);
        assert_eq!(level(LevelFilter::Off, 0, 1), LevelFilter::Off);
    }
}
