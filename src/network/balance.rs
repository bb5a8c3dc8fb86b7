//! Ports are spread over the workers again where the load turns out to be uneven.
//!
//! A port is read by the worker it is at home with. When one worker is busy and another is not, a port
//! whose traffic is mostly between guests is left to the other to read; its home goes along if its
//! guest has no flows there ([`crate::worker::Command::PassPort`]). What a port sends to the gateway has to
//! be handled at home, so ports that do much of that stay, and come home if they were moved before.
//!
//! Looked at once a second, by the threads' CPU time and the ports' counters: the packet path does not
//! know of it.

use std::collections::HashMap;
use std::fs;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use super::{Shared, lock};
use crate::frame::{PortId, WorkerId};
use crate::worker::{Command, WorkerHandle};

/// A worker that is less busy has no need of relief, percent of a CPU.
const BUSY_MIN: u64 = 50;
/// What has to be gained at the busiest worker, percent of a CPU: less is noise.
const GAIN_MIN: u64 = 15;
/// Looks in a row that find the same worker too busy before a port is moved.
const LOOKS: u32 = 2;
/// Frames for the gateway in a hundred, at most, of a port that may be read elsewhere.
const GATEWAY_SHARE_MAX: u64 = 10;
/// Cost of a frame and of 1,000 of its bytes, nanoseconds: a read, a write and two copies, as measured
/// on two cores. Only their ratio matters.
const FRAME_COST: u64 = 1_000;
const KILOBYTE_COST: u64 = 250;

/// A port's traffic since it was made.
#[derive(Clone, Copy, Default)]
struct Traffic {
    frames: u64,
    bytes: u64,
    /// Of the frames, those that did not go on by themselves.
    joined: u64,
    /// Of the others, those for the gateway.
    for_gateway: u64,
}

impl Traffic {
    /// What there was more of it than `before`. A number that is in use again begins from zero.
    fn since(self, before: Self) -> Self {
        Self {
            frames: self.frames.saturating_sub(before.frames),
            bytes: self.bytes.saturating_sub(before.bytes),
            joined: self.joined.saturating_sub(before.joined),
            for_gateway: self.for_gateway.saturating_sub(before.for_gateway),
        }
    }

    /// Whether too much of it is for the gateway to be read elsewhere than at home.
    fn is_for_gateway(self) -> bool {
        let went_on = self.frames.saturating_sub(self.joined);
        self.for_gateway * 100 > went_on * GATEWAY_SHARE_MAX
    }

    /// What it cost its reader.
    fn cost(self) -> u64 {
        self.frames * FRAME_COST + self.bytes / 1_000 * KILOBYTE_COST
    }
}

/// What one port costs its reader.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct PortLoad {
    port: PortId,
    reader: WorkerId,
    cost: u64,
    /// What it sends is for the gateway, much of it.
    for_gateway: bool,
    /// Several of them.
    has_queues: bool,
}

/// What was seen the last time.
pub(super) struct Balancer {
    at: Instant,
    /// What each worker has worked, microseconds.
    work: Vec<u64>,
    traffic: HashMap<PortId, Traffic>,
    too_busy: Option<(WorkerId, u32)>,
}

impl Balancer {
    /// For a network that begins.
    pub(super) fn new() -> Self {
        Self {
            at: Instant::now(),
            work: Vec::new(),
            traffic: HashMap::new(),
            too_busy: None,
        }
    }

    /// Looks again, and moves a port if that is worth it.
    pub(super) fn follow(&mut self, shared: &Shared) {
        let members = shared.crew.members();
        if members.len() < 2 {
            return;
        }
        let work: Vec<u64> = members.iter().map(work_of).collect();
        let passed = self.at.elapsed().as_micros().max(1) as u64;
        let since = |(now, before): (&u64, &u64)| now.saturating_sub(*before);
        let busy: Vec<u64> = work
            .iter()
            .zip(&self.work)
            .map(since)
            .map(|work| work * 100 / passed)
            .collect();
        self.at = Instant::now();
        self.work = work;
        let loads = self.loads(shared);
        let homes = shared.crew.homes();
        for load in loads
            .iter()
            .filter(|load| load.for_gateway && !load.has_queues)
        {
            let home = homes.of(load.port);
            if load.reader != home {
                pass(shared, load, home);
            }
        }
        let Some((load, to)) = choose(&busy, &loads) else {
            self.too_busy = None;
            return;
        };
        let from = load.reader;
        let looks = match self.too_busy {
            Some((worker, looks)) if worker == from => looks + 1,
            _ => 1,
        };
        self.too_busy = Some((from, looks));
        if looks < LOOKS {
            return;
        }
        self.too_busy = None;
        pass(shared, load, to);
    }

    /// What each port has cost since the last time.
    fn loads(&mut self, shared: &Shared) -> Vec<PortLoad> {
        let ports = lock(&shared.ports);
        let before = std::mem::take(&mut self.traffic);
        let mut loads = Vec::new();
        for (&id, port) in ports.by_id.iter().filter(|&(&id, _)| id != PortId::GATEWAY) {
            let now = Traffic {
                frames: port.counters.rx_frames.load(Relaxed),
                bytes: port.counters.rx_bytes.load(Relaxed),
                joined: port.counters.rx_joined.load(Relaxed),
                for_gateway: port.counters.rx_gateway.load(Relaxed),
            };
            self.traffic.insert(id, now);
            let Some(before) = before.get(&id) else {
                continue;
            };
            let traffic = now.since(*before);
            loads.push(PortLoad {
                port: id,
                reader: port.reader,
                cost: traffic.cost(),
                for_gateway: traffic.is_for_gateway(),
                // It has several readers already.
                has_queues: port.queues > 1,
            });
        }
        loads
    }
}

/// Has another worker read a port.
fn pass(shared: &Shared, load: &PortLoad, to: WorkerId) {
    let id = load.port;
    let mut ports = lock(&shared.ports);
    if let Some(port) = ports.by_id.get_mut(&id) {
        log::debug!("port {id} ({}) is read by worker {}", port.name, to.0);
        port.reader = to;
        let command = Command::PassPort { id, to };
        shared.crew.member(load.reader).send(command);
    }
}

/// Which port to move where, if any; `busy` is in percent, by worker.
fn choose<'a>(busy: &[u64], loads: &'a [PortLoad]) -> Option<(&'a PortLoad, WorkerId)> {
    let numbered = || busy.iter().copied().enumerate();
    let (busiest, most) = numbered().max_by_key(|&(_, busy)| busy)?;
    let (idlest, least) = numbered().min_by_key(|&(_, busy)| busy)?;
    if most < BUSY_MIN {
        return None;
    }
    let of_busiest = || {
        loads
            .iter()
            .filter(|load| usize::from(load.reader.0) == busiest)
    };
    let whole: u64 = of_busiest().map(|load| load.cost).sum();
    let after = |load: &PortLoad| {
        let share = most * load.cost / whole.max(1);
        (most - share).max(least + share)
    };
    let best = of_busiest()
        .filter(|load| !load.for_gateway && !load.has_queues)
        .min_by_key(|load| after(load))?;
    (after(best) + GAIN_MIN <= most).then_some((best, WorkerId(idlest as u8)))
}

/// CPU time of a worker but for what it looked for traffic, microseconds.
fn work_of(worker: &WorkerHandle) -> u64 {
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    let time = ticks_of(worker.thread()) * 1_000_000 / per_second;
    time.saturating_sub(worker.looked_micros())
}

/// CPU time of a thread of ours: fields 14 and 15 of its stat (proc(5)).
fn ticks_of(thread: i32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap_or_default();
    // The name, in parentheses, may have spaces.
    let fields = stat.rsplit(") ").next().unwrap_or_default();
    let times = fields.split(' ').skip(11).take(2);
    times.filter_map(|field| field.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(busy: &[u64], loads: &[PortLoad]) -> Option<(PortId, WorkerId)> {
        choose(busy, loads).map(|(load, to)| (load.port, to))
    }

    fn load(port: u16, reader: u8, cost: u64) -> PortLoad {
        PortLoad {
            port: PortId(port),
            reader: WorkerId(reader),
            cost,
            for_gateway: false,
            has_queues: false,
        }
    }

    #[test]
    fn the_port_moves_that_evens_the_load_best() {
        let loads = [
            load(1, 0, 60),
            load(2, 0, 30),
            load(3, 0, 10),
            load(4, 1, 5),
        ];
        assert_eq!(chosen(&[100, 20], &loads), Some((PortId(2), WorkerId(1))));
        assert_eq!(chosen(&[90, 80, 0], &loads), Some((PortId(1), WorkerId(2))));
    }

    #[test]
    fn nothing_moves_where_nothing_is_gained() {
        let two = [load(1, 0, 50), load(2, 0, 50)];
        assert_eq!(choose(&[], &two), None);
        assert_eq!(choose(&[40, 0], &two), None, "not busy");
        assert_eq!(choose(&[90, 80], &two), None, "neither is idle");
        assert_eq!(
            choose(&[100, 0], &[load(1, 0, 50)]),
            None,
            "it would only be elsewhere"
        );
        let held = two.map(|load| PortLoad {
            for_gateway: true,
            ..load
        });
        assert_eq!(choose(&[100, 0], &held), None);
        assert!(choose(&[100, 0], &two).is_some());
    }

    /// A guest that downloads says little but acknowledgments, most of which are left out.
    #[test]
    fn what_did_not_go_on_is_no_traffic_between_guests() {
        let before = Traffic {
            frames: 500,
            bytes: 50_000,
            joined: 7,
            for_gateway: 90,
        };
        let download = Traffic {
            frames: 1_000,
            bytes: 66_000,
            joined: 950,
            for_gateway: 40,
        };
        let now = Traffic {
            frames: before.frames + download.frames,
            bytes: before.bytes + download.bytes,
            joined: before.joined + download.joined,
            for_gateway: before.for_gateway + download.for_gateway,
        };
        let traffic = now.since(before);
        assert!(traffic.is_for_gateway());
        assert_eq!(traffic.cost(), 1_000 * FRAME_COST + 66 * KILOBYTE_COST);
        let between_guests = Traffic {
            for_gateway: 5,
            ..traffic
        };
        assert!(!between_guests.is_for_gateway());
        assert!(!before.since(now).is_for_gateway(), "begun again");
    }

    #[test]
    fn a_threads_time_grows() {
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        let before = ticks_of(own);
        let end = Instant::now() + std::time::Duration::from_secs(5);
        while ticks_of(own) == before {
            assert!(Instant::now() < end);
        }
        assert_eq!(ticks_of(-1), 0);
    }
}
