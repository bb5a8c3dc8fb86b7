//! How far it is, on standard error: on a terminal a line that moves, else a line per case and round.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use rustix::event::Timespec;

use super::control::{Event, Plan, Run};
use super::table::figure;

/// How often the moving line moves.
const TICK: Duration = Duration::from_millis(500);

pub(super) struct Progress {
    is_terminal: bool,
    rounds: u32,
    runs: usize,
    done: usize,
    /// When the first run began.
    begun: Option<Instant>,
    now: Option<(u32, Run)>,
    /// The line that is being collected where there is no terminal.
    line: String,
}

impl Progress {
    pub(super) fn new(plan: &Plan) -> Self {
        let progress = Self {
            is_terminal: std::io::stderr().is_terminal(),
            rounds: plan.rounds,
            runs: 0,
            done: 0,
            begun: None,
            now: None,
            line: String::new(),
        };
        progress.draw("building guests, a host and an outside");
        progress
    }

    /// How long to wait for news before the line should move.
    pub(super) fn tick(&self) -> Timespec {
        if self.begun.is_some() {
            self.draw_run();
        }
        Timespec {
            tv_sec: 0,
            tv_nsec: TICK.as_nanos() as _,
        }
    }

    pub(super) fn show(&mut self, event: &Event) {
        match event {
            Event::Unmeasured {
                way,
                section,
                reason,
            } => {
                // What never goes somewhere is told with the results.
                if section.is_none_or(|section| way.lacks(section).is_none()) {
                    self.clear();
                    write(&format!("not measured: {}: {reason}\n", way.name()));
                }
            }
            Event::Ready { runs } => {
                self.runs = *runs;
                self.begun = Some(Instant::now());
            }
            Event::Begun { round, run } => {
                let is_next = self.now.as_ref().is_none_or(|(before, last)| {
                    (before, last.section, &last.case) != (round, run.section, &run.case)
                });
                if is_next && !self.is_terminal {
                    self.end();
                    let (place, case) = (run.section.name(), &run.case);
                    self.line = format!("round {round}/{}, {place}, {case}:", self.rounds);
                }
                self.now = Some((*round, run.clone()));
                self.draw_run();
            }
            Event::Ended { run, outcome } => {
                self.done += 1;
                let value = outcome.as_ref().ok().and_then(|values| values.first());
                let shown = value.map_or_else(|| "failed".to_owned(), |&value| figure(value));
                self.line.push_str(&format!(" {} {shown}", run.way.name()));
            }
        }
    }

    /// Nothing more comes.
    pub(super) fn end(&mut self) {
        self.clear();
        if !self.is_terminal && !self.line.is_empty() {
            write(&format!("{}\n", self.line));
        }
        self.line.clear();
    }

    fn draw_run(&self) {
        let (Some((round, run)), Some(begun)) = (&self.now, self.begun) else {
            return;
        };
        let left = match self.done {
            0 => String::new(),
            done => {
                let each = begun.elapsed() / u32::try_from(done).unwrap_or(u32::MAX);
                let runs = self.runs.saturating_sub(done);
                let left = each * u32::try_from(runs).unwrap_or(u32::MAX);
                format!(", {} left", duration(left))
            }
        };
        self.draw(&format!(
            "{}/{}{left}: round {round}/{}, {}, {}, {}",
            self.done,
            self.runs,
            self.rounds,
            run.section.name(),
            run.case,
            run.way.name()
        ));
    }

    fn draw(&self, text: &str) {
        if self.is_terminal {
            write(&format!("\r\x1b[K{text}"));
        }
    }

    fn clear(&self) {
        self.draw("");
    }
}

fn duration(time: Duration) -> String {
    match time.as_secs() {
        secs @ 0..100 => format!("{secs} s"),
        secs => format!("{} min", secs.div_ceil(60)),
    }
}

/// Nobody may be reading; the results count.
fn write(text: &str) {
    let mut stderr = std::io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes());
}
