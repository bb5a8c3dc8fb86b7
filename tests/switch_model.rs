//! The switch against a model of it that a reader can check by eye, under the same random
//! operations; then the same table under several threads at once.

use std::sync::Barrier;

use lanlet::frame::{Duration, Instant, Mac, PortId, Station};
use lanlet::stats::DropReason;
use lanlet::switch::{Switch, SwitchConfig, Verdict};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

const GATEWAY_MAC: Mac = Mac([0x52, 0x54, 0, 0, 0, 1]);
const AGEING: Duration = Duration::from_secs(8);
/// An eighth of [`AGEING`].
const STEP_SECS: i64 = 1;
/// A table of 16 stations has four line pairs of 16 words: no choice of addresses overflows one.
const STATIONS_MAX: usize = 16;
const STATIONS_PER_PORT_MAX: usize = 5;
const PORTS: u16 = 6;

fn switch(seed: u64) -> Switch {
    Switch::new(SwitchConfig {
        gateway_mac: GATEWAY_MAC,
        ageing: AGEING,
        stations_max: STATIONS_MAX,
        stations_per_port_max: STATIONS_PER_PORT_MAX,
        seed,
    })
}

struct Entry {
    mac: Mac,
    port: PortId,
    seen: Instant,
    seen_step: i64,
}

/// A list, searched from end to end.
struct Model {
    entries: Vec<Entry>,
    now: Instant,
    moves: u64,
    refused_port_full: u64,
    refused_table_full: u64,
}

impl Model {
    fn new() -> Self {
        let (entries, now) = (Vec::new(), Instant::ZERO);
        Self {
            entries,
            now,
            moves: 0,
            refused_port_full: 0,
            refused_table_full: 0,
        }
    }

    fn step(&self) -> i64 {
        self.now.secs() / STEP_SECS
    }

    fn of_port(&self, port: PortId) -> usize {
        self.entries
            .iter()
            .filter(|entry| entry.port == port)
            .count()
    }

    fn learn(&mut self, mac: Mac, port: PortId) {
        let (seen, seen_step, of_port) = (self.now, self.step(), self.of_port(port));
        let known = self.entries.iter_mut().find(|entry| entry.mac == mac);
        let at_home = known.as_ref().is_some_and(|entry| entry.port == port);
        if !at_home && of_port == STATIONS_PER_PORT_MAX {
            self.refused_port_full += 1;
        } else if let Some(entry) = known {
            self.moves += u64::from(!at_home);
            *entry = Entry {
                mac,
                port,
                seen,
                seen_step,
            };
        } else if self.entries.len() == STATIONS_MAX {
            self.refused_table_full += 1;
        } else {
            self.entries.push(Entry {
                mac,
                port,
                seen,
                seen_step,
            });
        }
    }

    fn decide(&mut self, ingress: PortId, source: Mac, destination: Mac) -> Verdict {
        if ingress != PortId::GATEWAY {
            if source.is_group() {
                return Verdict::Drop(DropReason::GroupSource);
            }
            if source == GATEWAY_MAC {
                return Verdict::Drop(DropReason::GatewaySource);
            }
            if source == Mac::default() {
                return Verdict::Drop(DropReason::Malformed);
            }
            self.learn(source, ingress);
        }
        if destination.0[..5] == [0x01, 0x80, 0xc2, 0, 0] && destination.0[5] < 16 {
            return Verdict::Drop(DropReason::Reserved);
        }
        if destination.is_group() {
            return Verdict::Flood {
                to_gateway: ingress != PortId::GATEWAY,
            };
        }
        let egress = match self.entries.iter().find(|entry| entry.mac == destination) {
            _ if destination == GATEWAY_MAC => PortId::GATEWAY,
            Some(entry) => entry.port,
            None => return Verdict::Flood { to_gateway: false },
        };
        if egress == ingress {
            Verdict::Drop(DropReason::SamePort)
        } else {
            Verdict::Unicast(egress)
        }
    }

    fn tick(&mut self, now: Instant) {
        self.now = now;
        let step = self.step();
        self.entries.retain(|entry| {
            let kept = step - entry.seen_step <= 8;
            // What the switch promises, apart from how it divides time.
            let idle = now - entry.seen;
            assert!(kept || idle >= AGEING, "forgotten too early");
            assert!(
                !kept || idle < AGEING + Duration::from_secs(STEP_SECS as u64),
                "kept too long"
            );
            kept
        });
    }

    fn snapshot(&self) -> Vec<Station> {
        let station = |entry: &Entry| Station {
            mac: entry.mac,
            port: entry.port,
        };
        let mut stations: Vec<_> = self.entries.iter().map(station).collect();
        stations.sort();
        stations
    }
}

#[derive(Clone, Debug)]
enum Op {
    Frame {
        ingress: PortId,
        source: Mac,
        destination: Mac,
    },
    Pass {
        millis: u64,
    },
    RemovePort(PortId),
}

fn mac() -> impl Strategy<Value = Mac> {
    prop_oneof![
        20 => (0..30u8).prop_map(|n| Mac([0x52, 0x54, 0, 0, 1, n])),
        1 => Just(GATEWAY_MAC),
        1 => Just(Mac::BROADCAST),
        1 => Just(Mac::default()),
        1 => (0..20u8).prop_map(|n| Mac([0x01, 0x80, 0xc2, 0, 0, n])),
        1 => Just(Mac([0x33, 0x33, 0, 0, 0, 1])),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        20 => (0..PORTS, mac(), mac()).prop_map(|(port, source, destination)| {
            Op::Frame { ingress: PortId(port), source, destination }
        }),
        2 => (0..3000u64).prop_map(|millis| Op::Pass { millis }),
        1 => (0..40_000u64).prop_map(|millis| Op::Pass { millis }),
        1 => (1..PORTS).prop_map(|port| Op::RemovePort(PortId(port))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, rng_seed: RngSeed::Fixed(2), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_switch_does_what_the_model_does(
        seed in any::<u64>(),
        ops in prop::collection::vec(op(), 1..300),
    ) {
        let switch = switch(seed);
        let mut model = Model::new();
        for op in ops {
            match op {
                Op::Frame { ingress, source, destination } => {
                    let mut header = [0; 14];
                    header[..6].copy_from_slice(&destination.0);
                    header[6..12].copy_from_slice(&source.0);
                    let verdict = switch.decide(ingress, &header);
                    prop_assert_eq!(verdict, model.decide(ingress, source, destination));
                    prop_assert_ne!(verdict, Verdict::Unicast(ingress));
                }
                Op::Pass { millis } => {
                    let now = model.now + Duration::from_millis(millis);
                    switch.tick(now);
                    model.tick(now);
                }
                Op::RemovePort(port) => {
                    prop_assert_eq!(switch.remove_port(port), model.of_port(port));
                    model.entries.retain(|entry| entry.port != port);
                }
            }
            prop_assert_eq!(switch.snapshot(), model.snapshot());
            let counters = switch.counters();
            prop_assert_eq!(counters.stations, model.entries.len());
            prop_assert_eq!(counters.moves, model.moves);
            prop_assert_eq!(counters.refused_port_full, model.refused_port_full);
            prop_assert_eq!(counters.refused_table_full, model.refused_table_full);
        }
    }
}

/// Four workers learn, move, age and remove over each other. The counts must come out exact: one
/// lost decrement would shrink a port's limit for good.
#[test]
fn counts_stay_exact_under_threads() {
    const THREADS: u64 = 4;
    let switch = switch(7);
    let start = Barrier::new(THREADS as usize);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (switch, start) = (&switch, &start);
            scope.spawn(move || {
                start.wait();
                let mut random = thread * 0x9e37_79b9 + 1;
                for round in 0..100_000 {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let mut header = [0x52; 14];
                    header[11] = (random >> 8) as u8 % 24;
                    header[5] = (random >> 16) as u8 % 24;
                    let ingress = PortId(1 + (random >> 24) as u16 % (PORTS - 1));
                    let verdict = switch.decide(ingress, &header);
                    assert_ne!(verdict, Verdict::Unicast(ingress));
                    match round % 1000 {
                        0 => drop(switch.remove_port(ingress)),
                        500 => switch.tick(Instant::from_millis(round)),
                        _ => {}
                    }
                    assert!(switch.counters().stations <= STATIONS_MAX);
                }
            });
        }
    });
    let mut removed = 0;
    for port in 1..PORTS {
        let of_port = switch.remove_port(PortId(port));
        assert!(of_port <= STATIONS_PER_PORT_MAX, "{of_port} on one port");
        removed += of_port;
    }
    assert!(removed <= STATIONS_MAX);
    assert_eq!(switch.counters().stations, 0);
    // With nothing left, every port has its whole limit again.
    for station in 0..STATIONS_PER_PORT_MAX as u8 {
        for port in 1..=3 {
            switch.decide(
                PortId(port),
                &[2, 0, 0, 0, 0, 0, 2, 1, 0, 0, port as u8, station, 0, 0],
            );
        }
    }
    assert_eq!(switch.counters().stations, 3 * STATIONS_PER_PORT_MAX);
    assert_eq!(switch.counters().stations, switch.snapshot().len());
}
