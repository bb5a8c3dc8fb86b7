//! The controller: in the world, it builds the ways, runs every case on each of them in turn, and
//! tells what happens on standard output, one line of JSON per event.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::super::{Failure, print};
use super::case::{CASES, Case, Load, Measured, Section};
use super::costs;
use super::peer::{Reply, Request};
use super::way::{Ends, Way, masquerade};
use super::world::World;

/// What a reply may take beyond the time measured: opening 10,000 connections on a slow path has 10 s
/// of its own, a stream has 2 s to begin and a margin.
pub(super) const REPLY_TIME_MAX: Duration = Duration::from_secs(6);
const OPEN_TIME_MAX: Duration = Duration::from_secs(16);

/// What to measure.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    pub(super) ways: Vec<Way>,
    pub(super) sections: Vec<Section>,
    /// Names of cases.
    pub(super) cases: Vec<String>,
    pub(super) rounds: u32,
    pub(super) secs: f64,
    /// The program of [`Way::Base`].
    pub(super) base: Option<PathBuf>,
}

impl Plan {
    /// The sections that have a case, in order.
    pub(super) fn sections(&self) -> Vec<Section> {
        let cases = self.cases();
        let is_wanted = |section: &Section| {
            self.sections.contains(section) && cases.iter().any(|case| case.load.goes(*section))
        };
        Section::ALL.into_iter().filter(is_wanted).collect()
    }

    pub(super) fn cases(&self) -> Vec<Case> {
        let is_wanted = |case: &Case| self.cases.iter().any(|name| name == case.name);
        CASES.into_iter().filter(is_wanted).collect()
    }
}

/// One thing measured.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub(super) struct Run {
    pub(super) section: Section,
    /// A case's name.
    pub(super) case: String,
    pub(super) way: Way,
}

/// What happened.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Event {
    /// A way can't be measured, or not in this section.
    Unmeasured {
        way: Way,
        section: Option<Section>,
        reason: String,
    },
    /// Everything is up; so many runs follow.
    Ready {
        runs: usize,
    },
    Begun {
        round: u32,
        run: Run,
    },
    /// The figures, or why there are none.
    Ended {
        run: Run,
        outcome: Result<Vec<f64>, String>,
    },
}

fn tell(event: &Event) -> Result<(), Failure> {
    let mut line = serde_json::to_string(event).map_err(std::io::Error::from)?;
    line.push('\n');
    print(&line)
}

/// The controller's main.
pub(super) fn control(plan: &str) -> Result<ExitCode, Failure> {
    end_with_command()?;
    let plan: Plan = serde_json::from_str(plan).map_err(std::io::Error::from)?;
    let mut bench = Bench {
        world: World::new()?,
        ends: BTreeMap::new(),
        closed: BTreeSet::new(),
        plan,
    };
    bench.start()?;
    bench.measure()?;
    Ok(ExitCode::SUCCESS)
}

/// Ends this process, and by that the world, when standard input breaks.
fn end_with_command() -> Result<(), Failure> {
    std::thread::Builder::new()
        .name("lanlet-command".to_owned())
        .spawn(|| {
            let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
            std::process::exit(1);
        })
        .map(drop)
        .map_err(Failure::io("cannot start a thread"))
}

struct Bench {
    plan: Plan,
    world: World,
    /// Those that run.
    ends: BTreeMap<Way, Ends>,
    /// What can't be measured.
    closed: BTreeSet<(Way, Section)>,
}

impl Bench {
    fn start(&mut self) -> Result<(), Failure> {
        for way in self.plan.ways.clone() {
            for section in self.plan.sections() {
                if let Some(reason) = way.lacks(section) {
                    self.close(way, &[section], reason)?;
                }
            }
            let is_open = |section: &Section| !self.closed.contains(&(way, *section));
            let open: Vec<_> = self.plan.sections().into_iter().filter(is_open).collect();
            if !open.iter().any(|section| section.has_ends()) {
                continue;
            }
            let base = self.plan.base.as_deref();
            let started = way
                .prepare(&self.world)
                .and_then(|()| way.start(&self.world, base));
            match started {
                Ok(ends) => drop(self.ends.insert(way, ends)),
                Err(reason) => {
                    self.closed
                        .extend(open.iter().map(|&section| (way, section)));
                    tell(&Event::Unmeasured {
                        way,
                        section: None,
                        reason,
                    })?;
                    continue;
                }
            }
            if way == Way::Kernel
                && let Err(reason) = masquerade()
            {
                let nat = [Section::GuestToOutside, Section::OutsideToGuest];
                self.close(way, &nat, &reason)?;
            }
        }
        Ok(())
    }

    /// Some sections of a way can't be measured.
    fn close(&mut self, way: Way, sections: &[Section], reason: &str) -> Result<(), Failure> {
        for &section in sections {
            if self.plan.sections().contains(&section) && self.closed.insert((way, section)) {
                tell(&Event::Unmeasured {
                    way,
                    section: Some(section),
                    reason: reason.to_owned(),
                })?;
            }
        }
        Ok(())
    }

    /// Everything that can be run, in the order of a round: each case on all ways, one after the other,
    /// so that what else the machine does meets them alike.
    fn runs(&self) -> Vec<(Run, Load)> {
        let mut runs = Vec::new();
        for section in self.plan.sections() {
            for case in self.plan.cases() {
                for &way in &self.plan.ways {
                    if case.load.goes(section) && !self.closed.contains(&(way, section)) {
                        let run = Run {
                            section,
                            case: case.name.to_owned(),
                            way,
                        };
                        runs.push((run, case.load));
                    }
                }
            }
        }
        runs
    }

    fn measure(&mut self) -> Result<(), Failure> {
        let runs = self.runs();
        let rounds = self.plan.rounds;
        tell(&Event::Ready {
            runs: runs.len() * rounds as usize,
        })?;
        for round in 1..=rounds {
            for (run, load) in &runs {
                tell(&Event::Begun {
                    round,
                    run: run.clone(),
                })?;
                let outcome = self.run(run, *load);
                tell(&Event::Ended {
                    run: run.clone(),
                    outcome,
                })?;
            }
        }
        Ok(())
    }

    fn run(&mut self, run: &Run, load: Load) -> Result<Vec<f64>, String> {
        let base = self.plan.base.as_deref();
        if let Load::Cost(cost) = load {
            let program = run.way.program(&self.world, base)?;
            let name = run.way.name();
            return costs::measure(&self.world, &name, program, cost, self.plan.secs);
        }
        let ends = match self.ends.entry(run.way) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(run.way.start(&self.world, base)?),
        };
        let measured = measure(ends, run.section, load, self.plan.secs);
        let values = measured.and_then(|measured| {
            let values = measured.values(load);
            let is_there = values.first().is_some_and(|&value| value > 0.0);
            is_there
                .then_some(values)
                .ok_or_else(|| "nothing arrived".to_owned())
        });
        if values.is_err() {
            // What hangs is ended, and what is left of half a case does not disturb the next.
            self.ends.remove(&run.way);
        }
        values
    }
}

/// One run.
pub(super) fn measure(
    ends: &mut Ends,
    section: Section,
    load: Load,
    secs: f64,
) -> Result<Measured, String> {
    let reverse = section == Section::OutsideToGuest;
    let (server, at) = match (section, &mut ends.second) {
        (Section::GuestToGuest, Some((second, address))) => (second, *address),
        (Section::GuestToGuest, None) => return Err("there is no other guest".to_owned()),
        _ => (&mut ends.outside, ends.server),
    };
    let serve = Request::Serve {
        load,
        reverse,
        at: (at, 0).into(),
        secs,
    };
    let to = match server.ask(&serve, REPLY_TIME_MAX)? {
        Reply::Serving(to) => to,
        Reply::Failed(reason) => return Err(reason),
        other => return Err(format!("unexpected {other:?}")),
    };
    let run = Request::Run {
        load,
        reverse,
        to,
        secs,
    };
    let more = match load {
        Load::RoundTrips { .. } => OPEN_TIME_MAX,
        _ => REPLY_TIME_MAX,
    };
    let ran = ends.guest.ask(&run, Duration::from_secs_f64(secs) + more)?;
    let served = server.ask(&Request::Finish, REPLY_TIME_MAX)?;
    let is_at_server = !reverse && matches!(load, Load::Tcp { .. } | Load::Udp { .. });
    match (ran, served) {
        (Reply::Failed(reason), _) | (_, Reply::Failed(reason)) => Err(reason),
        (Reply::Measured(_), Reply::Measured(served)) if is_at_server => Ok(served),
        (Reply::Measured(ran), Reply::Measured(_)) => Ok(ran),
        other => Err(format!("unexpected {other:?}")),
    }
}
