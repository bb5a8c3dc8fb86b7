//! The learning switch: which port a frame leaves by (IEEE 802.1Q 8.6 to 8.8).
//!
//! ```text
//!  ingress, header -> refuse the source? -> learn it -> look the destination up -> Verdict
//! ```
//!
//! **State.** One [`Switch`] is shared by all workers through `&self`; its only state is the MAC
//! table, whose entries are single atomic words, and the count of ageing steps. No call waits for
//! another.
//!
//! **Limits.** Stations in total and per port. A station beyond either is not learned, and frames
//! to it flood; nothing that was learned is ever evicted to make room.
//!
//! **Timers.** [`Switch::tick`] moves time on; entries go when idle for the ageing time, at the
//! latest an eighth of it later.
//!
//! **What a hostile guest can try.** Fill the table: ends at its port's limit. Choose addresses that
//! collide with a victim's so that the victim can't be learned and its traffic floods: the hash is
//! keyed with a random seed. Send from a group address or the gateway's: dropped, never learned.
//! Take over a neighbour's address: honoured as a station move, as every learning switch must, and
//! counted; binding addresses to ports is for a guard before the switch.

mod mac_table;

use crate::frame::{Duration, ETH_HEADER_LEN, Instant, Mac, PortId, Station};
use crate::stats::DropReason;
use mac_table::MacTable;

pub use mac_table::{PORTS_MAX, TableCounters};

/// Ageing time that IEEE 802.1Q table 8-6 recommends.
pub const AGEING_DEFAULT: Duration = Duration::from_secs(300);
/// Stations by default: a /18 full of guests. The table takes 32 bytes for each.
pub const STATIONS_MAX_DEFAULT: usize = 16_384;
/// Stations on one port by default: room for a guest that bridges guests of its own, and sixteen
/// ports have to conspire to fill the table.
pub const STATIONS_PER_PORT_MAX_DEFAULT: usize = 1024;
const _: () = assert!(STATIONS_MAX_DEFAULT >= 16 * STATIONS_PER_PORT_MAX_DEFAULT);

/// Steps that the ageing time is divided into: an entry may outlive it by one of them.
const AGE_STEPS: i64 = 8;

/// What a [`Switch`] is made with.
#[derive(Clone, Debug)]
pub struct SwitchConfig {
    /// The gateway's address: known without learning, and nobody else's.
    pub gateway_mac: Mac,
    /// Idle time after which a station is forgotten.
    pub ageing: Duration,
    /// Stations in the table at most.
    pub stations_max: usize,
    /// Stations behind one port at most.
    pub stations_per_port_max: usize,
    /// Key of the table's hash: random, and unknown to guests.
    pub seed: u64,
}

impl SwitchConfig {
    /// The defaults, for this gateway.
    pub fn new(gateway_mac: Mac, seed: u64) -> Self {
        Self {
            gateway_mac,
            ageing: AGEING_DEFAULT,
            stations_max: STATIONS_MAX_DEFAULT,
            stations_per_port_max: STATIONS_PER_PORT_MAX_DEFAULT,
            seed,
        }
    }
}

/// Where a frame goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// To this port; never the ingress port.
    Unicast(PortId),
    /// To all ports but the ingress port and the gateway.
    Flood {
        /// To the gateway as well: group addresses, unless the gateway sent it.
        to_gateway: bool,
    },
    /// Nowhere.
    Drop(DropReason),
}

/// A learning switch, shared by the workers.
#[derive(Debug)]
pub struct Switch {
    gateway: u64,
    table: MacTable,
    step_micros: i64,
}

impl Switch {
    /// A switch that knows only the gateway. Its time starts at [`Instant::ZERO`].
    pub fn new(config: SwitchConfig) -> Self {
        let ageing_micros = i64::try_from(config.ageing.total_micros()).unwrap_or(i64::MAX);
        Self {
            gateway: config.gateway_mac.to_u64(),
            table: MacTable::new(
                config.stations_max,
                config.stations_per_port_max,
                config.seed,
            ),
            step_micros: (ageing_micros / AGE_STEPS).max(1),
        }
    }

    /// Learns the source of a frame and decides where it goes. `header` is the frame, or at least
    /// its first [`ETH_HEADER_LEN`] bytes.
    ///
    /// Frames of the gateway teach nothing: its address is known.
    #[inline]
    pub fn decide(&self, ingress: PortId, header: &[u8]) -> Verdict {
        let Some(&header) = header.first_chunk::<ETH_HEADER_LEN>() else {
            return Verdict::Drop(DropReason::Truncated);
        };
        let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, ..] = header;
        let destination = u64::from_be_bytes([0, 0, d0, d1, d2, d3, d4, d5]);
        let source = u64::from_be_bytes([0, 0, s0, s1, s2, s3, s4, s5]);
        if ingress != PortId::GATEWAY {
            if let Some(reason) = self.refuse_source(source) {
                return Verdict::Drop(reason);
            }
            self.table.learn(source, ingress);
        }
        self.forward(ingress, destination)
    }

    /// Where frames to this station go, as far as is known; learns nothing.
    #[inline]
    pub fn find(&self, destination: Mac) -> Option<PortId> {
        self.find_port(destination.to_u64())
    }

    fn find_port(&self, destination: u64) -> Option<PortId> {
        match destination == self.gateway {
            true => Some(PortId::GATEWAY),
            false => self.table.find_port(destination),
        }
    }

    fn refuse_source(&self, source: u64) -> Option<DropReason> {
        if is_group(source) {
            Some(DropReason::GroupSource)
        } else if source == self.gateway {
            Some(DropReason::GatewaySource)
        } else if source == 0 {
            Some(DropReason::Malformed)
        } else {
            None
        }
    }

    fn forward(&self, ingress: PortId, destination: u64) -> Verdict {
        let to_gateway = ingress != PortId::GATEWAY;
        if is_group(destination) {
            return if is_reserved(destination) {
                Verdict::Drop(DropReason::Reserved)
            } else {
                Verdict::Flood { to_gateway }
            };
        }
        match self.find_port(destination) {
            Some(egress) if egress == ingress => Verdict::Drop(DropReason::SamePort),
            Some(egress) => Verdict::Unicast(egress),
            // The gateway's address is known, so an unknown one is not the gateway's.
            None => Verdict::Flood { to_gateway: false },
        }
    }

    /// Forgets the stations that were idle for too long. To be called once per batch, or at least
    /// every eighth of the ageing time: entries are stamped with the time of the last call. Costs a
    /// comparison, and a walk over the table when a step is over.
    pub fn tick(&self, now: Instant) {
        let steps = now.total_micros().div_euclid(self.step_micros);
        self.table.advance_to(steps, AGE_STEPS);
    }

    /// Forgets all stations behind a port that was removed, and says how many. The port's receive
    /// half must have stopped before, or it may be learned again.
    pub fn remove_port(&self, port: PortId) -> usize {
        self.table.remove_port(port)
    }

    /// The stations learned, sorted by address.
    pub fn snapshot(&self) -> Vec<Station> {
        self.table.snapshot()
    }

    /// What the table counted.
    pub fn counters(&self) -> TableCounters {
        self.table.counters()
    }
}

/// The I/G bit (IEEE 802-2014 8.2.2).
fn is_group(mac: u64) -> bool {
    mac >> 40 & 1 != 0
}

/// 01-80-C2-00-00-00 to 0F (IEEE 802.1Q table 8-1).
fn is_reserved(mac: u64) -> bool {
    mac >> 4 == 0x0180_c200_0000 >> 4
}

#[cfg(test)]
mod tests {
    use super::*;

    const GATEWAY_MAC: u64 = 0x5254_0000_0001;
    const BROADCAST: u64 = 0xffff_ffff_ffff;
    const A: u64 = 0x5254_0000_000a;
    const B: u64 = 0x5254_0000_000b;
    const P1: PortId = PortId(1);
    const P2: PortId = PortId(2);

    fn mac(value: u64) -> Mac {
        let [_, _, mac @ ..] = value.to_be_bytes();
        Mac(mac)
    }

    fn switch() -> Switch {
        Switch::new(SwitchConfig::new(mac(GATEWAY_MAC), 1))
    }

    fn decide(switch: &Switch, ingress: PortId, source: u64, destination: u64) -> Verdict {
        let mut header = [0; ETH_HEADER_LEN];
        header[..6].copy_from_slice(&mac(destination).0);
        header[6..12].copy_from_slice(&mac(source).0);
        switch.decide(ingress, &header)
    }

    #[test]
    fn learns_moves_and_never_sends_back() {
        let switch = switch();
        assert_eq!(
            decide(&switch, P1, A, B),
            Verdict::Flood { to_gateway: false }
        );
        assert_eq!(decide(&switch, P2, B, A), Verdict::Unicast(P1));
        assert_eq!(decide(&switch, P1, A, B), Verdict::Unicast(P2));
        assert_eq!(
            decide(&switch, P1, B, A),
            Verdict::Drop(DropReason::SamePort)
        );
        assert_eq!(
            decide(&switch, PortId::GATEWAY, GATEWAY_MAC, B),
            Verdict::Unicast(P1)
        );
        let counters = TableCounters {
            stations: 2,
            moves: 1,
            ..TableCounters::default()
        };
        assert_eq!(switch.counters(), counters);
        let stations: Vec<_> = switch.snapshot().iter().map(|s| (s.mac, s.port)).collect();
        assert_eq!(stations, [(mac(A), P1), (mac(B), P1)]);
    }

    #[test]
    fn group_gateway_and_reserved_addresses() {
        let switch = switch();
        assert_eq!(
            decide(&switch, P1, A, BROADCAST),
            Verdict::Flood { to_gateway: true }
        );
        assert_eq!(
            decide(&switch, P1, A, 0x3333_0000_0001),
            Verdict::Flood { to_gateway: true }
        );
        assert_eq!(
            decide(&switch, P1, A, GATEWAY_MAC),
            Verdict::Unicast(PortId::GATEWAY)
        );
        for last in 0..16 {
            let verdict = decide(&switch, P1, A, 0x0180_c200_0000 + last);
            assert_eq!(verdict, Verdict::Drop(DropReason::Reserved));
        }
        assert_eq!(
            decide(&switch, P1, A, 0x0180_c200_0010),
            Verdict::Flood { to_gateway: true }
        );

        let from_gateway = |destination| decide(&switch, PortId::GATEWAY, GATEWAY_MAC, destination);
        assert_eq!(
            from_gateway(BROADCAST),
            Verdict::Flood { to_gateway: false }
        );
        assert_eq!(
            from_gateway(GATEWAY_MAC),
            Verdict::Drop(DropReason::SamePort)
        );
        assert_eq!(switch.counters().stations, 1, "A alone");
    }

    #[test]
    fn bad_sources_are_dropped_and_not_learned() {
        let switch = switch();
        let dropped = |source| decide(&switch, P1, source, B);
        assert_eq!(dropped(A | 1 << 40), Verdict::Drop(DropReason::GroupSource));
        assert_eq!(dropped(BROADCAST), Verdict::Drop(DropReason::GroupSource));
        assert_eq!(
            dropped(GATEWAY_MAC),
            Verdict::Drop(DropReason::GatewaySource)
        );
        assert_eq!(dropped(0), Verdict::Drop(DropReason::Malformed));
        assert_eq!(
            switch.decide(P1, &[0; 13]),
            Verdict::Drop(DropReason::Truncated)
        );
        assert_eq!(switch.counters(), TableCounters::default());
    }

    #[test]
    fn idle_stations_live_for_the_ageing_time_and_at_most_an_eighth_longer() {
        let at = |secs: i64| Instant::from_micros(secs * 1_000_000);
        // Whatever the time within a step at which the station is last seen.
        for seen in [0, 1, 20, 37, 38, 1000] {
            let switch = switch();
            switch.tick(at(seen));
            decide(&switch, P1, A, B);
            for now in seen..=seen + 300 {
                switch.tick(at(now));
                assert_eq!(switch.counters().stations, 1, "{seen} {now}");
            }
            switch.tick(at(seen + 338));
            assert_eq!(switch.counters().stations, 0, "{seen}");
            assert_eq!(
                decide(&switch, P2, B, A),
                Verdict::Flood { to_gateway: false }
            );
        }
    }

    #[test]
    fn traffic_keeps_a_station_for_good() {
        let switch = switch();
        for step in 0..100 {
            switch.tick(Instant::from_secs(step * 290));
            decide(&switch, P1, A, B);
        }
        assert_eq!(switch.counters().stations, 1);
        // After a gap longer than the ageing time, in one jump.
        switch.tick(Instant::from_secs(1_000_000));
        assert_eq!(switch.counters().stations, 0);
    }
}
