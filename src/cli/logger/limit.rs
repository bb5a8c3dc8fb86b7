//! How many lines of one kind are written, so that no guest fills its user's log.
//!
//! A kind is a place in the sources that logs: there are a few dozen, and none can be forgotten. What is
//! left out is counted, and told when the minute is over.

use std::collections::BTreeMap;
use std::time::Duration;

use log::Level;

/// Lines of a kind within [`WINDOW`]: a command with as many forwards tells of each.
pub(super) const LINES_MAX: u64 = 50;
/// How long lines are counted together.
pub(super) const WINDOW: Duration = Duration::from_secs(60);
/// Of the line that many are like, this much is told again.
const REMINDER_CHARS: usize = 100;

/// Where in the sources a line is from.
pub(super) type Place = (&'static str, u32);

/// The kinds that have had lines within the last [`WINDOW`].
pub(super) struct Limit(BTreeMap<Place, Kind>);

/// The lines of a kind in one window.
struct Kind {
    level: Level,
    /// When the window ends.
    until: Duration,
    lines: u64,
    /// The last line that was written, or its beginning.
    reminder: String,
}

/// What is to be done with a line.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    Write,
    /// It is the last of its kind for a while.
    WriteLast,
    LeaveOut,
}

impl Limit {
    pub(super) const fn new() -> Self {
        Self(BTreeMap::new())
    }

    /// Decides on a line at `now`, a time since any beginning. What is over by then has to be taken first
    /// ([`Limit::take_left_out`]).
    pub(super) fn admit(
        &mut self,
        place: Place,
        level: Level,
        text: impl FnOnce() -> String,
        now: Duration,
    ) -> Verdict {
        let kind = self.0.entry(place).or_insert_with(|| Kind {
            level,
            until: now + WINDOW,
            lines: 0,
            reminder: String::new(),
        });
        kind.lines += 1;
        if kind.lines > LINES_MAX {
            return Verdict::LeaveOut;
        }
        if kind.lines < LINES_MAX {
            return Verdict::Write;
        }
        kind.reminder = text().chars().take(REMINDER_CHARS).collect();
        Verdict::WriteLast
    }

    /// Ends the windows that are over at `now`; the lines that tell what was left out in them.
    pub(super) fn take_left_out(&mut self, now: Duration) -> Vec<(Level, String)> {
        let mut told = Vec::new();
        self.0.retain(|_, kind| {
            if now < kind.until {
                return true;
            }
            if let Some(count @ 1..) = kind.lines.checked_sub(LINES_MAX) {
                let reminder = &kind.reminder;
                let line = format!("{reminder} … and {count} more like it in the last minute");
                told.push((kind.level, line));
            }
            false
        });
        told
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Place = ("here.rs", 1);

    fn admit(limit: &mut Limit, place: Place, secs: u64) -> Verdict {
        let text = || "a guest was refused".to_owned();
        limit.admit(place, Level::Warn, text, Duration::from_secs(secs))
    }

    #[test]
    fn a_flood_is_counted_and_told_once_a_minute() {
        let mut limit = Limit::new();
        let mut told = Vec::new();
        let mut written = 0;
        // 27,000 lines a second for two minutes and a half.
        for secs in 0..150 {
            told.extend(limit.take_left_out(Duration::from_secs(secs)));
            for _ in 0..27_000 {
                written += u64::from(admit(&mut limit, HERE, secs) != Verdict::LeaveOut);
            }
        }
        told.extend(limit.take_left_out(Duration::from_secs(1_000)));
        assert_eq!(written, 3 * LINES_MAX);
        let left_out = |secs: u64| {
            let count = 27_000 * secs - LINES_MAX;
            let text = format!("a guest was refused … and {count} more like it in the last minute");
            (Level::Warn, text)
        };
        assert_eq!(told, [left_out(60), left_out(60), left_out(30)]);
        assert!(limit.0.is_empty(), "nothing is kept of what is over");
    }

    #[test]
    fn kinds_do_not_share_and_few_lines_are_all_written() {
        let mut limit = Limit::new();
        for _ in 0..LINES_MAX - 1 {
            assert_eq!(admit(&mut limit, HERE, 0), Verdict::Write);
        }
        assert_eq!(admit(&mut limit, HERE, 59), Verdict::WriteLast);
        assert_eq!(admit(&mut limit, HERE, 59), Verdict::LeaveOut);
        assert_eq!(admit(&mut limit, ("here.rs", 2), 59), Verdict::Write);
        assert_eq!(limit.take_left_out(Duration::from_secs(59)), []);
        assert_eq!(limit.take_left_out(Duration::from_secs(60)).len(), 1);
        assert_eq!(admit(&mut limit, HERE, 60), Verdict::Write);
        // Exactly as many as may be: nothing was left out.
        for _ in 1..LINES_MAX {
            admit(&mut limit, HERE, 60);
        }
        assert_eq!(limit.take_left_out(Duration::from_secs(120)), []);
    }
}
