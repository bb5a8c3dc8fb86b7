//! The demo's display: one line per step, and while a step runs, on a terminal, a line that moves.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Width of the column with the steps' names.
const NAME_WIDTH: usize = 26;
/// How often the moving line moves.
const TICK: Duration = Duration::from_millis(120);
/// The moving line's first characters, one after the other.
const FRAMES: [&str; 4] = ["|   ", "/   ", "-   ", "\\   "];

/// Lines on stdout.
pub(super) struct Progress {
    is_terminal: bool,
    begun: Instant,
    step: &'static str,
    step_begun: Instant,
    ticked: Instant,
    frame: usize,
}

impl Progress {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self {
            is_terminal: std::io::stdout().is_terminal(),
            begun: now,
            step: "",
            step_begun: now,
            ticked: now,
            frame: 0,
        }
    }

    /// A step begins.
    pub(super) fn begin(&mut self, step: &'static str) {
        self.step = step;
        self.step_begun = Instant::now();
        self.draw();
    }

    /// It still runs.
    pub(super) fn tick(&mut self) {
        if self.ticked.elapsed() >= TICK {
            self.frame += 1;
            self.draw();
        }
    }

    /// It has succeeded.
    pub(super) fn done(&mut self, finding: &str) {
        self.line("ok", finding);
    }

    /// It has failed.
    pub(super) fn failed(&mut self, finding: &str) {
        self.line("FAIL", finding);
    }

    /// Time since the first step.
    pub(super) fn total(&self) -> Duration {
        self.begun.elapsed()
    }

    fn draw(&mut self) {
        self.ticked = Instant::now();
        if self.is_terminal {
            let secs = self.step_begun.elapsed().as_secs_f32();
            let frame = FRAMES[self.frame % FRAMES.len()];
            write(&format!(
                "\r\x1b[K{frame}  {:<NAME_WIDTH$} {secs:.1} s",
                self.step
            ));
        }
    }

    fn line(&mut self, verdict: &str, finding: &str) {
        let clear = if self.is_terminal { "\r\x1b[K" } else { "" };
        let secs = self.step_begun.elapsed().as_secs_f32();
        write(&format!(
            "{clear}{verdict:<4}  {:<NAME_WIDTH$} {finding}  ({secs:.1} s)\n",
            self.step
        ));
    }
}

/// Nobody may be reading; the steps and the exit status count.
fn write(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush());
}
