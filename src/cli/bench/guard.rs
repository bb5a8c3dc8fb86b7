//! Whether the hot path has become slower: what its pieces take, divided by what a plain loop of a like
//! nature takes in the same moment, beside the ratios on record.
//!
//! A ratio does not know how fast the machine is, nor how busy: piece and reference take turns in samples
//! of half a millisecond, and of each the best counts, which is one that nothing disturbed. A piece that
//! looks too slow is looked at for longer before that is said.
//!
//! It is part of the program and not of its benches, so that what is measured is the program as it is
//! shipped, and nothing has to be built for it.

mod flows;
mod pieces;
mod reference;
mod wire;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use self::reference::Reference;
use super::super::{Failure, print};

/// A piece is too slow from this much more than its ratio on record: a regression of 1.5 shows with room
/// for noise. In ten looks beside compilers on all cores none but the 64-byte wire, which needs two
/// processors at once, was above; in others a process whose memory lay badly was. So tests/guard.rs asks
/// several processes.
const CHANGE_MAX: f64 = 1.4;
/// Length of a sample.
const SAMPLE: Duration = Duration::from_micros(500);
/// Samples of each piece and its reference.
const SAMPLES: usize = 150;
/// How many more times those too slow are looked at.
const LOOKS_MORE: usize = 6;

/// Compares the hot path's pieces to ratios on record.
#[derive(clap::Args, Debug)]
pub(super) struct GuardArgs {
    /// The file with the ratios.
    ratios: PathBuf,
    /// Write the file, and compare to nothing.
    #[arg(long)]
    record: bool,
    /// Do everything one and a half times: what the guard has to notice.
    #[arg(long, conflicts_with = "record")]
    handicap: bool,
}

/// Something timed: does it so many times.
type Work = Box<dyn FnMut(u64)>;

/// A piece of the hot path.
struct Piece {
    name: &'static str,
    work: Work,
    reference: Reference,
}

/// A piece and its best times so far, nanoseconds.
struct Timed {
    piece: Piece,
    /// How many make a sample, and how long one takes.
    work: (u64, f64),
    reference: (u64, f64),
}

impl Timed {
    fn new(mut piece: Piece) -> Self {
        let work = (calibrate(&mut piece.work), f64::MAX);
        let reference = (calibrate(&mut piece.reference.work), f64::MAX);
        Self {
            piece,
            work,
            reference,
        }
    }

    /// A sample of either. `handicap`: of three only two are counted.
    fn sample(&mut self, handicap: bool) {
        let (count, best) = &mut self.reference;
        *best = best.min(time(&mut self.piece.reference.work, *count) / *count as f64);
        let (count, best) = &mut self.work;
        let done = match handicap {
            true => *count + count.div_ceil(2),
            false => *count,
        };
        *best = best.min(time(&mut self.piece.work, done) / *count as f64);
    }

    fn ratio(&self) -> f64 {
        self.work.1 / self.reference.1
    }
}

fn time(work: &mut Work, count: u64) -> f64 {
    let begun = Instant::now();
    work(count);
    begun.elapsed().as_nanos() as f64
}

/// How many take a [`SAMPLE`].
fn calibrate(work: &mut Work) -> u64 {
    let mut count = 1;
    while time(work, count) < SAMPLE.as_nanos() as f64 / 2.0 {
        count *= 2;
    }
    count
}

pub(super) fn guard(args: &GuardArgs) -> Result<ExitCode, Failure> {
    if cfg!(debug_assertions) {
        return Err(Failure::because(
            "this program is built without optimisation: ratios are of release builds",
        ));
    }
    let record = match args.record {
        true => BTreeMap::new(),
        false => read(&args.ratios)?,
    };
    let mut pieces = pieces::all();
    pieces.extend(flows::all());
    pieces.extend(wire::all()?);
    let mut timed: Vec<_> = pieces.into_iter().map(Timed::new).collect();
    for _ in 0..SAMPLES {
        timed
            .iter_mut()
            .for_each(|timed| timed.sample(args.handicap));
    }
    let change = |timed: &Timed| record.get(timed.piece.name).map(|old| timed.ratio() / old);
    let is_slow = |timed: &Timed| change(timed).is_some_and(|change| change > CHANGE_MAX);
    // With a handicap it is known what comes of it.
    let looks_more = if args.handicap { 1 } else { LOOKS_MORE };
    for _ in 0..looks_more {
        let slow: Vec<_> = timed.iter_mut().filter(|timed| is_slow(timed)).collect();
        for timed in slow {
            (0..SAMPLES).for_each(|_| timed.sample(args.handicap));
        }
    }
    let mut text = String::new();
    for timed in &timed {
        let (piece, work, reference) = (&timed.piece, timed.work.1, timed.reference.1);
        let verdict = match change(timed) {
            Some(change) if change > CHANGE_MAX => format!("{change:.2} of the record: SLOWER"),
            Some(change) => format!("{change:.2} of the record"),
            None if args.record => "recorded".to_owned(),
            None => "not on record".to_owned(),
        };
        text.push_str(&format!(
            "{:24} {work:9.1} ns, {:10} {reference:9.1} ns: {:7.3}, {verdict}\n",
            piece.name,
            piece.reference.name,
            timed.ratio()
        ));
    }
    print(&text)?;
    if args.record {
        write(&args.ratios, &timed)?;
        return Ok(ExitCode::SUCCESS);
    }
    // A piece that is gone or new has to be recorded: nobody would notice that it is not looked at.
    let is_complete = record.len() == timed.len() && timed.iter().all(|t| change(t).is_some());
    if !is_complete {
        let path = args.ratios.display();
        return Err(Failure::because(format!(
            "{path} is of other pieces: record them again (make guard-record)"
        )));
    }
    match timed.iter().any(is_slow) {
        true => Ok(ExitCode::FAILURE),
        false => Ok(ExitCode::SUCCESS),
    }
}

/// The ratios of a file: a name and a ratio a line; `#` begins a comment.
fn read(path: &Path) -> Result<BTreeMap<String, f64>, Failure> {
    let text =
        fs::read_to_string(path).map_err(Failure::io(format!("cannot read {}", path.display())))?;
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| parse(line).ok_or_else(|| wrong(path, line)))
        .collect()
}

fn wrong(path: &Path, line: &str) -> Failure {
    Failure::because(format!(
        "{}: not a name and a ratio: {line}",
        path.display()
    ))
}

fn parse(line: &str) -> Option<(String, f64)> {
    let (name, ratio) = line.split_once(' ')?;
    let ratio: f64 = ratio.trim().parse().ok()?;
    (ratio.is_finite() && ratio > 0.0).then(|| (name.to_owned(), ratio))
}

fn write(path: &Path, timed: &[Timed]) -> Result<(), Failure> {
    let mut text = String::from(
        "# What pieces of the hot path take, in times of a plain loop of a like nature: make guard-record\n",
    );
    for timed in timed {
        text.push_str(&format!("{} {:.4}\n", timed.piece.name, timed.ratio()));
    }
    fs::write(path, text).map_err(Failure::io(format!("cannot write {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_read_or_refused() {
        assert_eq!(parse("decide 0.5"), Some(("decide".to_owned(), 0.5)));
        for wrong in [
            "",
            "decide",
            "decide x",
            "decide 0",
            "decide -1",
            "decide NaN",
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    /// Each piece asserts that it does what it says; here only few times.
    #[test]
    fn every_piece_works_and_has_a_name_of_its_own() {
        let mut pieces = pieces::all();
        pieces.extend(flows::all());
        let mut names: Vec<_> = pieces.iter().map(|piece| piece.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), pieces.len());
        for piece in &mut pieces {
            (piece.work)(3);
            (piece.reference.work)(3);
            assert!(!piece.name.contains(' '), "{}", piece.name);
        }
    }
}
