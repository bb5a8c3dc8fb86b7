//! The hot path of the release build is as fast as on record, in times of plain loops on the same
//! machine; and the guard that says so notices when it is not.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::{Outcome, finish, skip};

/// A look takes 3 s, and up to 12 s more where something seems slow.
const TIME_MAX: Duration = Duration::from_secs(120);

/// How often a piece has to be too slow, each time in a process of its own: where its memory lies differs
/// from one to the next, and can cost more than a regression.
const LOOKS: usize = 4;
/// Pieces whose ratio may hide one and a half times: a wire needs two processors at once, and a ring of
/// 512 KiB that the guest's segments walk through is in a cache or not (5 to 11 copies, measured).
const UNSTEADY: [&str; 3] = ["tcp-up-64-segments", "wire-64", "wire-64k"];
/// What one and a half times adds at least to the ratio of the same moment: on a machine where a piece is
/// faster than on record (a checksum takes 0.54 to 0.70 of a plain sum, by machine) the record hides it.
const RISE_MIN: f64 = 1.25;

fn guard(options: &[&str]) -> Outcome {
    let binary = std::env::var_os("LANLET_BIN");
    let binary = binary.unwrap_or_else(|| env!("CARGO_BIN_EXE_lanlet").into());
    let ratios = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/guard.ratios");
    let mut command = Command::new(binary);
    command
        .args(["bench-peer", "guard"])
        .arg(ratios)
        .args(options);
    finish(command, TIME_MAX)
}

/// The pieces that are too slow.
fn slow(outcome: &Outcome) -> BTreeSet<String> {
    let lines = outcome
        .stdout
        .lines()
        .filter(|line| line.ends_with("SLOWER"));
    let names = lines.filter_map(|line| line.split_whitespace().next());
    names.map(str::to_owned).collect()
}

/// What the pieces take, in parts of the record.
fn parts(outcome: &Outcome) -> BTreeMap<String, f64> {
    let part = |line: &str| {
        let (before, _) = line.split_once(" of the record")?;
        let name = before.split_whitespace().next()?;
        Some((name.to_owned(), before.rsplit(' ').next()?.parse().ok()?))
    };
    outcome.stdout.lines().filter_map(part).collect()
}

#[test]
fn the_hot_path_is_as_fast_as_on_record() {
    let mut outcome = guard(&[]);
    if outcome.stderr.contains("built without optimisation") {
        return skip("set LANLET_BIN to a release build: ratios are of that");
    }
    let mut slower = slow(&outcome);
    for _ in 1..LOOKS {
        if slower.is_empty() {
            break;
        }
        outcome = guard(&[]);
        let again = slow(&outcome);
        slower.retain(|name| again.contains(name));
    }
    println!("{}", outcome.text());
    assert!(slower.is_empty(), "{slower:?}: {}", outcome.text());
    let pieces = outcome.stdout.lines().count();
    assert!(
        pieces > 10 && outcome.stderr.is_empty(),
        "{}",
        outcome.text()
    );
    // Everything done one and a half times, which every steady piece shows, if not at the first look: what
    // disturbs a plain loop makes a piece look fast.
    let is_steady = |name: &String| !UNSTEADY.contains(&name.as_str());
    let plain = parts(&outcome);
    let mut noticed = BTreeSet::new();
    for _ in 0..LOOKS {
        outcome = guard(&["--handicap"]);
        assert_eq!(outcome.status, Some(1), "{}", outcome.text());
        noticed.extend(slow(&outcome).into_iter().filter(is_steady));
        let risen = parts(&outcome).into_iter().filter(|(name, part)| {
            plain
                .get(name)
                .is_some_and(|plain| *part >= plain * RISE_MIN)
        });
        noticed.extend(risen.map(|(name, _)| name).filter(is_steady));
        if noticed.len() == pieces - UNSTEADY.len() {
            return;
        }
    }
    panic!("only {noticed:?}: {}", outcome.text());
}
