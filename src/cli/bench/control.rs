//! The controller: in the world, it builds the ways, runs every case on each of them in turn, and
//! tells what happens on standard output, one line of JSON per event.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::super::{Failure, print};
use super::agent::Agent;
use super::case::{CASES, Case, Guests, Load, Measured, Section};
use super::costs;
use super::peer::{Reply, Request};
use super::vm;
use super::way::{Ends, Way, masquerade};
use super::world::World;

/// What a reply may take beyond the time measured: opening 10,000 connections on a slow path has 10 s
/// of its own, a stream has 2 s to begin and a margin.
pub(super) const REPLY_TIME_MAX: Duration = Duration::from_secs(6);
const OPEN_TIME_MAX: Duration = Duration::from_secs(16);

/// Why no VM is measured.
const NO_GUEST_IMAGE: &str =
    "VMs take --guest-image DIR, with the vmlinuz and initrd.gz of lab/guest-image/build";

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
    /// What `--workers` of [`Way::Workers`] is.
    pub(super) workers: Option<String>,
    /// Directory with what VMs boot.
    pub(super) guest_image: Option<PathBuf>,
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

    /// Whether no other guests are measured.
    fn is_of(&self, guests: Guests) -> bool {
        let mut sections = self.sections().into_iter();
        sections.all(|section| section.guests() == Some(guests))
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
    ends: BTreeMap<(Guests, Way), Ends>,
    /// What can't be measured.
    closed: BTreeSet<(Way, Section)>,
}

impl Bench {
    fn start(&mut self) -> Result<(), Failure> {
        for way in self.plan.ways.clone() {
            let mut sections = Vec::new();
            for section in self.plan.sections() {
                let image = self.plan.guest_image.as_deref();
                let missing = match section.guests() {
                    Some(Guests::Vms | Guests::VmPairs) if image.is_none() => Some(NO_GUEST_IMAGE),
                    _ => way.lacks(section),
                };
                match missing {
                    Some(reason) => self.close(way, &[section], reason)?,
                    None => sections.push(section),
                }
            }
            if sections.iter().all(|section| section.guests().is_none()) {
                continue;
            }
            if let Err(reason) = way.prepare(&self.world) {
                self.close_all(way, reason)?;
                continue;
            }
            for guests in Guests::ALL {
                let is_of = |section: &&Section| section.guests() == Some(guests);
                let sections: Vec<_> = sections.iter().filter(is_of).copied().collect();
                if sections.is_empty() {
                    continue;
                }
                match (self.start_ends(way, guests), guests) {
                    (Ok(ends), Guests::Namespaces) => drop(self.ends.insert((guests, way), ends)),
                    (Err(reason), Guests::Namespaces) => self.close_all(way, reason)?,
                    // VMs boot when it is their turn, and do not disturb others before.
                    (Ok(_), _) if !self.plan.is_of(guests) => {}
                    (Ok(ends), _) => drop(self.ends.insert((guests, way), ends)),
                    (Err(reason), _) => self.close(way, &sections, &reason)?,
                }
            }
            if way == Way::Kernel
                && let Err(reason) = masquerade()
            {
                let is_nat = |section: &Section| !section.is_inside();
                let nat: Vec<_> = sections.into_iter().filter(is_nat).collect();
                self.close(way, &nat, &reason)?;
            }
        }
        Ok(())
    }

    fn start_ends(&self, way: Way, guests: Guests) -> Result<Ends, String> {
        match (guests, &self.plan.guest_image) {
            (Guests::Namespaces, _) => way.start(&self.world, &self.plan),
            (_, None) => Err(NO_GUEST_IMAGE.to_owned()),
            (Guests::Vms, Some(image)) => vm::start(way, &self.world, &self.plan, image, 1),
            (Guests::VmPairs, Some(image)) => vm::start(way, &self.world, &self.plan, image, 2),
        }
    }

    /// A way can't be measured at all.
    fn close_all(&mut self, way: Way, reason: String) -> Result<(), Failure> {
        let sections = self.plan.sections();
        self.closed
            .extend(sections.iter().map(|&section| (way, section)));
        tell(&Event::Unmeasured {
            way,
            section: None,
            reason,
        })
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
        if let Load::Cost(cost) = load {
            return costs::measure(&self.world, run.way, &self.plan, cost);
        }
        let guests = run.section.guests().ok_or("there are no guests")?;
        self.ends
            .retain(|(others, _), _| *others == Guests::Namespaces || *others == guests);
        let key = (guests, run.way);
        if !self.ends.contains_key(&key) {
            let ends = self.start_ends(run.way, guests)?;
            self.ends.insert(key, ends);
        }
        let ends = self.ends.get_mut(&key).ok_or("it does not run")?;
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
            self.ends.remove(&key);
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
    let missing = |what: &str| format!("there is no {what}");
    let mut published = None;
    let mut others = ends.others.iter_mut();
    let (opener, server, at) = match section {
        _ if section.is_inside() => {
            let (second, address) = others.next().ok_or_else(|| missing("other guest"))?;
            let first = (&mut ends.guest, second, (*address, 0).into());
            if load == Load::Pairs {
                let third = others.next().ok_or_else(|| missing("third guest"))?;
                let fourth = others.next().ok_or_else(|| missing("fourth guest"))?;
                // Senders are the first and the last, whose ports are not at one worker of two.
                let second = (&mut fourth.0, &mut third.0, (third.1, 0).into());
                return pairs([first, second], secs);
            }
            first
        }
        _ if section.is_published() => {
            let port = ends.published.as_ref();
            let port = port.ok_or_else(|| missing("published port"))?;
            published = Some(port.outside);
            (&mut ends.outside, &mut ends.guest, port.inside)
        }
        _ => (&mut ends.guest, &mut ends.outside, (ends.server, 0).into()),
    };
    let reverse = section.is_way_back();
    run_between((opener, server, at), published, (load, reverse), secs)
}

/// Who opens connections, who serves, and where.
type Between<'a> = (&'a mut Agent, &'a mut Agent, SocketAddr);

/// A stream between each of two pairs of guests at a time.
fn pairs(pairs: [Between<'_>; 2], secs: f64) -> Result<Measured, String> {
    let load = (Load::Tcp { streams: 1 }, false);
    let [first, second] = pairs;
    let (first, second) = std::thread::scope(|scope| {
        let second = scope.spawn(|| run_between(second, None, load, secs));
        let first = run_between(first, None, load, secs);
        (first, second.join())
    });
    let second = second.map_err(|_| "the controller failed")?;
    let (first, second) = (first?, second?);
    Ok(Measured {
        bytes: first.bytes + second.bytes,
        secs: first.secs.max(second.secs),
        ..first
    })
}

/// One load between two. `published`: where the server is reached, if not where it serves.
fn run_between(
    (opener, server, at): Between<'_>,
    published: Option<SocketAddr>,
    (load, reverse): (Load, bool),
    secs: f64,
) -> Result<Measured, String> {
    let serve = Request::Serve {
        load,
        reverse,
        at,
        secs,
    };
    let at = match server.ask(&serve, REPLY_TIME_MAX)? {
        Reply::Serving(at) => at,
        Reply::Failed(reason) => return Err(reason),
        other => return Err(format!("unexpected {other:?}")),
    };
    let to = published.unwrap_or(at);
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
    let ran = opener.ask(&run, Duration::from_secs_f64(secs) + more)?;
    let served = server.ask(&Request::Finish, REPLY_TIME_MAX)?;
    let is_at_server = !reverse && matches!(load, Load::Tcp { .. } | Load::Udp { .. });
    match (ran, served) {
        (Reply::Failed(reason), _) | (_, Reply::Failed(reason)) => Err(reason),
        (Reply::Measured(_), Reply::Measured(served)) if is_at_server => Ok(served),
        (Reply::Measured(ran), Reply::Measured(_)) => Ok(ran),
        other => Err(format!("unexpected {other:?}")),
    }
}
