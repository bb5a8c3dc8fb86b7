//! One switching decision: learn the source, look the destination up. Both are drawn at random from
//! all stations, so that with 100,000 of them (a table of 4 MiB) neither lies in L1 or L2 but by chance.

use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use lanlet::frame::{ETH_HEADER_LEN, Instant, Mac, PortId};
use lanlet::switch::{Switch, SwitchConfig, Verdict};

const PORTS: u64 = 100;
/// Headers decided on in turn; 1 MiB of them, read in sequence, which the prefetcher hides.
const HEADERS: usize = 1 << 16;

type Header = [u8; 16];

fn mac(station: u64) -> [u8; 6] {
    let [.., a, b, c] = station.to_be_bytes();
    [0x52, 0x54, 0, a, b, c]
}

fn port(station: u64) -> PortId {
    PortId(1 + (station % PORTS) as u16)
}

fn header(source: u64, destination: u64) -> Header {
    let mut header = [0; 16];
    header[..6].copy_from_slice(&mac(destination));
    header[6..12].copy_from_slice(&mac(source));
    header
}

fn switch(stations: u64) -> Switch {
    let mut config = SwitchConfig::new(Mac([0x02, 0, 0, 0, 0, 1]), 1);
    config.stations_max = config.stations_max.max(stations as usize);
    config.stations_per_port_max = stations.div_ceil(PORTS) as usize;
    let switch = Switch::new(config);
    for station in 0..stations {
        switch.decide(port(station), &header(station, station));
    }
    assert_eq!(switch.counters().stations as u64, stations);
    switch
}

fn headers(stations: u64) -> Vec<(PortId, Header)> {
    let mut random = 0x1a71e7_u64;
    let mut below = |bound: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random >> 8) % bound
    };
    let one = |_| {
        let (source, destination) = (below(stations), below(stations));
        (port(source), header(source, destination))
    };
    (0..HEADERS).map(one).collect()
}

fn decide(c: &mut Criterion) {
    let mut group = c.benchmark_group("decide");
    for stations in [1, 1_000, 100_000] {
        let (switch, headers) = (switch(stations), headers(stations));
        let mut next = 0;
        group.bench_function(BenchmarkId::from_parameter(stations), |b| {
            b.iter(|| {
                next = (next + 1) % HEADERS;
                let (ingress, header) = &headers[next];
                switch.decide(*ingress, &header[..ETH_HEADER_LEN])
            });
        });
    }
    group.finish();

    // What a hostile port can make the switch do: sources beyond its limit, unknown destinations.
    let switch = switch(1_000);
    let mut flood = 1 << 20;
    c.bench_function("decide/refused_and_unknown", |b| {
        b.iter(|| {
            flood += 1;
            let verdict = switch.decide(PortId(1), &header(flood, flood | 1 << 23));
            assert!(black_box(verdict) == Verdict::Flood { to_gateway: false });
        });
    });
}

fn tick(c: &mut Criterion) {
    let within_a_step = switch(1_000);
    let mut now = Instant::ZERO;
    c.bench_function("tick/within_a_step", |b| {
        b.iter(|| within_a_step.tick(black_box(now)));
    });
    let full = switch(16_384);
    c.bench_function("tick/walk_16384", |b| {
        b.iter_batched(
            || {
                // One step further each time; the stations are seen before they would expire.
                now += lanlet::frame::Duration::from_secs(38);
                for station in 0..16_384 {
                    full.decide(port(station), &header(station, station));
                }
                now
            },
            |now| full.tick(now),
            BatchSize::PerIteration,
        );
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(std::time::Duration::from_millis(500)).measurement_time(std::time::Duration::from_secs(2));
    targets = decide, tick
}
criterion_main!(benches);
