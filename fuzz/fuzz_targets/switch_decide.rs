//! A switch under arbitrary frames, removals and jumps of time: limits hold, nothing returns by its
//! ingress port, and no address that may not be learned is.
//!
//! Input: operations of 4 bytes.
#![no_main]

use lanlet::frame::{Duration, Instant, Mac, PortId};
use lanlet::switch::{Switch, SwitchConfig, Verdict};
use libfuzzer_sys::fuzz_target;

const GATEWAY_MAC: Mac = Mac([2, 0, 0, 0, 0, 0]);

/// Few enough addresses that they meet again, group and zero addresses among them.
fn mac(byte: u8) -> [u8; 6] {
    match byte {
        0 => [0; 6],
        1..64 => [2, 0, 0, 0, 0, byte - 1],
        64..80 => [0x01, 0x80, 0xc2, 0, 0, byte - 64],
        80..96 => [0x33, 0x33, 0, 0, 0, byte],
        96 => [0xff; 6],
        _ => [2, 1, byte, byte, byte, byte],
    }
}

fuzz_target!(|input: &[u8]| {
    let switch = Switch::new(SwitchConfig {
        ageing: Duration::from_secs(8),
        stations_max: 16,
        stations_per_port_max: 5,
        ..SwitchConfig::new(GATEWAY_MAC, 1)
    });
    let mut now = Instant::ZERO;
    for &[operation, port, source, destination] in input.as_chunks().0 {
        let port = PortId(u16::from(port) % 8);
        match operation {
            0..8 => {
                now += Duration::from_millis(u64::from(source) * u64::from(destination));
                switch.tick(now);
            }
            8..12 => drop(switch.remove_port(port)),
            _ => {
                let mut header = [0; 14];
                header[..6].copy_from_slice(&mac(destination));
                header[6..12].copy_from_slice(&mac(source));
                assert_ne!(switch.decide(port, &header), Verdict::Unicast(port));
            }
        }
        let stations = switch.snapshot();
        assert_eq!(stations.len(), switch.counters().stations);
        assert!(stations.len() <= 16);
        for port in 0..8 {
            assert!(
                stations
                    .iter()
                    .filter(|station| station.port == PortId(port))
                    .count()
                    <= 5
            );
        }
        let learnable = |mac: Mac| !mac.is_group() && mac != GATEWAY_MAC && mac != Mac::default();
        assert!(
            stations
                .iter()
                .all(|station| learnable(station.mac) && station.port != PortId::GATEWAY)
        );
    }
});
