use super::*;
use crate::frame::Station;
use crate::gateway::testing::lan;
use proptest::prelude::*;

const LEASE_SECS: u32 = 3600;

fn mac(n: u32) -> Mac {
    let [_, a, b, c] = n.to_be_bytes();
    Mac([0x52, 0x54, 0, a, b, c])
}

fn client(n: u32) -> Client<'static> {
    Client {
        mac: mac(n),
        id: None,
        port: PortId(n as u16),
        hostname: None,
    }
}

fn address(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 122, last)
}

fn at(secs: i64) -> Instant {
    Instant::from_secs(secs)
}

fn table(first: u8, last: u8) -> LeaseTable {
    LeaseTable::new(address(first)..=address(last), &lan()).unwrap()
}

impl LeaseTable {
    /// Discover and request.
    fn lease(&mut self, client: &Client<'_>, now: Instant) -> Result<Ipv4Addr, Refusal> {
        let address = self.offer(client, None, now)?;
        self.commit(client, address, LEASE_SECS, now)?;
        Ok(address)
    }

    /// Takes the offer of an address that has to be probed first, and that nobody answers for.
    fn lease_unused(&mut self, client: &Client<'_>, now: Instant) -> Result<Ipv4Addr, Refusal> {
        let address = self.offer(client, None, now)?;
        if self.is_unprobed(address) {
            assert_eq!(self.settle_probe(client, address, now), Probed::Free);
        }
        self.commit(client, address, LEASE_SECS, now)?;
        Ok(address)
    }

    /// Invariants 5 and 7 of the crate, and that every index says the same.
    fn check_invariants(&self) {
        assert!(self.entries.len() <= LEASES_MAX);
        let (mut ends, mut transient, mut clients) = (0, 0, 0);
        for (&address, entry) in &self.entries {
            assert!(
                self.in_pool(address)
                    || self.reservations.is_reserved(address)
                    || entry.state == State::Attached,
                "{address}"
            );
            match entry.state {
                State::Offered { until, .. } | State::Quarantined { until } => {
                    transient += 1;
                    assert!(self.transient.contains(&(until, address)));
                }
                State::Bound { until, .. } => {
                    ends += 1;
                    assert!(self.ends.contains(&(until, address)));
                }
                State::Attached => {
                    let attached = self.attached.get(&entry.key.mac);
                    assert_eq!(attached.unwrap().address, Some(address));
                }
            }
            assert!(entry.former.is_none() || matches!(entry.state, State::Offered { .. }));
            if !matches!(entry.state, State::Quarantined { .. }) {
                clients += 1;
                let own = &self.by_mac[&entry.key.mac];
                assert_eq!(own.iter().filter(|&&other| other == address).count(), 1);
            }
        }
        assert_eq!((self.ends.len(), self.transient.len()), (ends, transient));
        for attached in self.attached.values() {
            if let Some(address) = attached.address {
                assert_eq!(self.entries[&address].state, State::Attached);
            }
        }
        assert_eq!(self.by_mac.values().map(Vec::len).sum::<usize>(), clients);
        for claim in self.claims.values() {
            assert!(self.claims_of(claim.station.port) <= CLAIMS_PER_PORT_MAX.min(self.share()));
        }
    }
}

#[test]
fn ranges_that_are_no_pool() {
    let lan = lan();
    let range = |first, last| LeaseTable::new(first..=last, &lan).map(|table| table.pool_size());
    assert_eq!(range(address(2), address(254)), Ok(253));
    assert_eq!(range(address(1), address(254)), Ok(253));
    assert_eq!(range(address(9), address(9)), Ok(1));
    assert_eq!(range(address(9), address(8)), Err(PoolError::Empty));
    assert_eq!(range(address(1), address(1)), Err(PoolError::OnlyGateway));
    for (first, last) in [
        (address(0), address(9)),
        (address(9), address(255)),
        (Ipv4Addr::new(192, 168, 121, 9), address(9)),
        (address(9), Ipv4Addr::new(192, 168, 123, 9)),
    ] {
        assert_eq!(range(first, last), Err(PoolError::OutsideLan));
    }
}

#[test]
fn a_client_keeps_its_address_for_ever() {
    let mut table = table(2, 254);
    let first = table.lease(&client(1), at(0)).unwrap();
    assert_eq!(table.lease(&client(1), at(10)), Ok(first));
    // Ended long ago, others came and went.
    for n in 2..40 {
        assert_ne!(table.lease(&client(n), at(1_000_000)), Ok(first));
    }
    assert_eq!(table.lease(&client(1), at(2_000_000)), Ok(first));
    table.check_invariants();
    // Nothing kept at all: the hash finds it again.
    assert_eq!(self::table(2, 254).lease(&client(1), at(0)), Ok(first));
}

#[test]
fn identity_is_mac_and_client_id_and_the_plain_id_is_none() {
    let mut table = table(2, 254);
    let plain = client(1);
    let usual = [&[1][..], &mac(1).0].concat();
    let address = table.lease(&plain, at(0)).unwrap();
    let with = |id| Client {
        id: Some(id),
        ..plain
    };
    assert_eq!(
        table.lease(&with(&usual), at(0)),
        Ok(address),
        "type 1 and the MAC"
    );
    let duid = [0xff, 1, 2, 3, 4, 0, 1];
    let system = table.lease(&with(&duid), at(0));
    assert_eq!(system, Ok(address), "the system after its firmware");
    let second = table.lease(&with(b"child"), at(0)).unwrap();
    assert_ne!(second, address, "ipvlan children");
    assert_eq!(table.lease(&with(&duid), at(1)), Ok(address));
    assert_eq!(table.lease(&with(b"child"), at(1)), Ok(second));
    let clone = Client {
        id: Some(&duid),
        ..client(2)
    };
    let third = table.lease(&clone, at(0)).unwrap();
    assert!(
        third != second && third != address,
        "a cloned disk with the same DUID"
    );
    // The firmware again: the system that ran last has its address back after it.
    table.lease(&with(&duid), at(2)).unwrap();
    assert_eq!(table.lease(&plain, at(3)), Ok(address));
    assert_eq!(table.lease(&with(&duid), at(4)), Ok(address));
    assert_eq!(table.lease(&with(b"child"), at(4)), Ok(second));
    table.check_invariants();
}

#[test]
fn the_wanted_address_if_it_is_free() {
    let mut table = table(2, 254);
    assert_eq!(
        table.offer(&client(1), Some(address(99)), at(0)),
        Ok(address(99))
    );
    for refused in [
        address(99),
        address(1),
        address(255),
        Ipv4Addr::new(10, 0, 0, 1),
    ] {
        let mut fresh = client(2);
        fresh.mac.0[0] ^= refused.octets()[3] & 0xfe;
        let given = table.offer(&fresh, Some(refused), at(0)).unwrap();
        assert_ne!(given, refused);
        assert!(table.in_pool(given));
    }
    // Offers that are not taken are free again.
    assert_eq!(
        table.offer(&client(3), Some(address(99)), at(31)),
        Ok(address(99))
    );
    table.check_invariants();
}

#[test]
fn an_exhausted_pool_reuses_the_longest_ended() {
    let mut table = table(10, 13);
    for n in 1..=5 {
        table.open_port(PortId(n), None);
    }
    for n in 1..=4 {
        table.lease(&client(n), at(i64::from(n))).unwrap();
    }
    assert_eq!(
        table.offer(&client(5), None, at(10)),
        Err(Refusal::Exhausted)
    );
    assert_eq!(
        table.attach(mac(5), PortId(5), None, at(10)),
        Err(Refusal::Exhausted)
    );
    let second = table.find(&client(2), at(10)).unwrap();
    let third = table.find(&client(3), at(10)).unwrap();
    assert!(table.release(&client(3), third, at(20)));
    assert!(table.release(&client(2), second, at(21)));
    assert_eq!(table.lease(&client(5), at(30)), Ok(third));
    // Its former client has to take what is left.
    assert_eq!(table.lease(&client(3), at(31)), Ok(second));
    assert_eq!(
        table.offer(&client(2), None, at(32)),
        Err(Refusal::Exhausted)
    );
    table.check_invariants();
}

#[test]
fn commit_refuses_what_is_not_the_clients() {
    let mut table = table(2, 254);
    let own = table.lease(&client(1), at(0)).unwrap();
    let other = Ipv4Addr::from_bits(own.to_bits() ^ 2);
    let commit =
        |table: &mut LeaseTable, n, address| table.commit(&client(n), address, LEASE_SECS, at(5));
    assert_eq!(commit(&mut table, 1, other), Err(Refusal::Mismatch));
    assert_eq!(commit(&mut table, 2, own), Err(Refusal::Taken));
    assert_eq!(commit(&mut table, 2, address(1)), Err(Refusal::OutOfPool));
    assert_eq!(
        commit(&mut table, 2, Ipv4Addr::new(10, 9, 8, 7)),
        Err(Refusal::OutOfPool)
    );
    assert_eq!(
        commit(&mut table, 2, other),
        Ok(()),
        "the table was lost, the client was not"
    );
    assert_eq!(table.holder(other, at(5)), Some((mac(2), Some(PortId(2)))));
    assert_eq!(table.holder(other, at(5 + 3600)), None);
    table.check_invariants();
}

#[test]
fn a_hostile_port_gets_its_share_and_no_more() {
    let mut table = table(2, 254);
    let share = 253 / PORT_SHARE_DIVISOR as usize;
    let port = PortId(7);
    let hostile = |n| Client { port, ..client(n) };
    let given = (0..1_000)
        .filter(|&n| table.offer(&hostile(n), None, at(0)).is_ok())
        .count();
    assert_eq!(given, share);
    assert_eq!(
        table.offer(&hostile(2_000), None, at(0)),
        Err(Refusal::Limit)
    );
    let free = Ipv4Addr::from_bits(table.first + 3);
    let unknown = Client {
        port,
        ..client(2_001)
    };
    if table.is_free(free, at(0)) {
        assert_eq!(
            table.commit(&unknown, free, LEASE_SECS, at(0)),
            Err(Refusal::Limit)
        );
    }
    assert!(
        table.lease(&client(3_000), at(0)).is_ok(),
        "others are served"
    );
    // Offers end quickly; leases that ended and come back count again.
    for n in 4_000..4_000 + share as u32 {
        table.lease(&hostile(n), at(100)).unwrap();
    }
    for n in 5_000..5_000 + share as u32 {
        table.lease(&hostile(n), at(10_000)).unwrap();
    }
    assert_eq!(
        table.offer(&hostile(4_000), None, at(10_000)),
        Err(Refusal::Limit)
    );
    table.check_invariants();
}

#[test]
fn a_hostile_mac_gets_its_share_whatever_it_calls_itself_or_declines() {
    let mut table = table(2, 254);
    let mut given = 0;
    for n in 0u32..100 {
        let id = n.to_be_bytes();
        let hostile = Client {
            id: Some(&id),
            ..client(1)
        };
        if let Ok(address) = table.lease(&hostile, at(0)) {
            given += 1;
            assert!(table.decline(&hostile, address, at(1)));
        }
    }
    assert_eq!(given, LEASES_PER_MAC_MAX);
    let quarantined = table
        .snapshot(at(1))
        .iter()
        .filter(|view| view.kind == LeaseKind::Quarantined)
        .count();
    assert_eq!(quarantined, LEASES_PER_MAC_MAX);
    table.check_invariants();
}

#[test]
fn declined_addresses_come_back_after_the_quarantine() {
    let mut table = table(10, 10);
    assert_eq!(table.lease(&client(1), at(0)), Ok(address(10)));
    table.open_port(PortId(1), None);
    assert!(!table.decline(&client(2), address(10), at(1)));
    assert!(!table.decline(&client(1), address(11), at(1)));
    assert!(table.decline(&client(1), address(10), at(1)));
    assert!(
        !table.decline(&client(1), address(10), at(1)),
        "it is nobody's now"
    );
    assert_eq!(
        table.offer(&client(2), None, at(600)),
        Err(Refusal::Exhausted)
    );
    assert_eq!(
        table.commit(&client(1), address(10), LEASE_SECS, at(600)),
        Err(Refusal::Taken)
    );
    assert_eq!(table.lease(&client(2), at(601)), Ok(address(10)));
    table.check_invariants();
}

#[test]
fn release_and_withdraw_only_by_the_client() {
    let mut table = table(2, 254);
    let address = table.lease(&client(1), at(0)).unwrap();
    assert!(!table.release(&client(2), address, at(1)));
    assert!(!table.release(&client(1), self::address(1), at(1)));
    assert!(table.release(&client(1), address, at(1)));
    assert_eq!(table.holder(address, at(1)), None);
    let other = table.offer(&client(3), None, at(1)).unwrap();
    table.withdraw(&client(1), at(1));
    table.withdraw(&client(2), at(1));
    table.withdraw(&client(3), at(1));
    assert!(
        table.entries.contains_key(&address),
        "a lease is not withdrawn"
    );
    assert!(!table.entries.contains_key(&other));
    table.check_invariants();
}

#[test]
fn attached_addresses_live_as_long_as_their_port() {
    let mut table = table(2, 254);
    let port = PortId(1);
    let by_dhcp = table.lease(&client(1), at(0)).unwrap();
    table.open_port(port, Some(mac(1)));
    assert_eq!(table.attach(mac(1), port, None, at(1)), Ok(by_dhcp));
    let again = table.attach(mac(1), PortId(10), None, at(1));
    assert_eq!(again, Err(Refusal::MacTaken));
    let client = Client {
        id: Some(b"anything"),
        hostname: Some(&"box".parse().unwrap()),
        ..client(1)
    };
    let leased = table.lease(&client, at(2));
    assert_eq!(leased, Ok(by_dhcp), "whatever it calls itself");
    assert!(table.release(&client, by_dhcp, at(3)));
    let holder = table.holder(by_dhcp, at(i64::from(u32::MAX)));
    assert_eq!(holder, Some((mac(1), Some(port))));
    let view = &table.snapshot(at(4))[0];
    assert_eq!((view.kind, view.remaining), (LeaseKind::Attached, None));
    assert_eq!(view.hostname, "box".parse().ok());
    table.check_invariants();
    table.close_port(port, at(5));
    table.close_port(port, at(5));
    assert_eq!(table.holder(by_dhcp, at(5)), None);
    table.open_port(PortId(11), Some(mac(1)));
    assert_eq!(table.attach(mac(1), PortId(11), None, at(6)), Ok(by_dhcp));
    table.check_invariants();
}

#[test]
fn an_attached_guest_that_declines_its_address_gets_another() {
    let mut table = table(2, 254);
    table.open_port(PortId(1), Some(mac(1)));
    let own = table.attach(mac(1), PortId(1), None, at(0)).unwrap();
    assert!(table.decline(&client(1), own, at(1)));
    table.check_invariants();
    let other = table.lease(&client(1), at(2)).unwrap();
    assert_ne!(other, own);
    assert_eq!(table.lease(&client(1), at(3)), Ok(other), "and keeps it");
    assert_ne!(table.lease(&client(2), at(3)), Ok(own), "nobody gets it");
    let taken = table.attach(mac(1), PortId(2), None, at(3));
    assert_eq!(taken, Err(Refusal::MacTaken), "the guest is there still");
    table.close_port(PortId(1), at(4));
    table.open_port(PortId(2), Some(mac(1)));
    assert_eq!(table.attach(mac(1), PortId(2), None, at(5)), Ok(other));
    table.check_invariants();
}

/// A guest of each kind with a lease, and a hostile one on another port that uses its MAC.
fn victims() -> Vec<(&'static str, LeaseTable, Ipv4Addr)> {
    let mut attached = table(2, 254);
    attached.open_port(PortId(1), Some(mac(1)));
    let of_port = attached.attach(mac(1), PortId(1), None, at(0)).unwrap();
    let mut leased = table(2, 254);
    leased.open_port(PortId(1), None);
    let by_dhcp = leased.lease(&client(1), at(0)).unwrap();
    let mut offered = table(2, 254);
    offered.open_port(PortId(1), None);
    let on_offer = offered.offer(&client(1), None, at(0)).unwrap();
    let mut victims = vec![
        ("attached", attached, of_port),
        ("leased", leased, by_dhcp),
        ("offered", offered, on_offer),
    ];
    for (_, table, _) in &mut victims {
        table.open_port(PortId(66), Some(mac(66)));
    }
    victims
}

#[test]
fn a_lease_is_its_ports_whatever_other_ports_say() {
    for id in [None, Some(&b"id"[..])] {
        for (name, mut table, address) in victims() {
            let thief = Client {
                port: PortId(66),
                id,
                ..client(1)
            };
            assert!(table.is_foreign(&thief, at(1)), "{name}");
            assert!(!table.is_foreign(&client(1), at(1)), "{name}");
            assert!(!table.release(&thief, address, at(1)), "{name}");
            assert!(!table.decline(&thief, address, at(1)), "{name}");
            table.withdraw(&thief, at(1));
            let request = table.commit(&thief, address, 60, at(1));
            assert_eq!(request, Err(Refusal::Foreign), "{name}");
            assert_eq!(table.hold(&thief, address, at(1)), Err(Refusal::Foreign));
            // It has an address of its own if it likes, and the guest keeps its.
            let other = table.offer(&thief, Some(address), at(1)).unwrap();
            assert_ne!(other, address, "{name}");
            table.commit(&thief, other, 60, at(2)).unwrap();
            assert!(table.release(&thief, other, at(3)));
            assert!(table.lease(&thief, at(3)).is_ok());
            assert!(table.knows(&client(1), address, at(4)), "{name}");
            assert_eq!(table.lease(&client(1), at(4)), Ok(address), "{name}");
            table.check_invariants();
            // When both have gone, the guest finds what was its.
            table.close_port(PortId(66), at(5));
            table.close_port(PortId(1), at(6));
            table.open_port(PortId(2), None);
            let anew = Client {
                port: PortId(2),
                ..client(1)
            };
            assert_eq!(table.lease(&anew, at(7)), Ok(address), "{name}");
            table.check_invariants();
        }
    }
}

#[test]
fn a_hostile_port_can_not_use_up_what_a_mac_may_have() {
    let mut table = table(2, 254);
    for (port, mac) in [(1, None), (66, Some(mac(66)))] {
        table.open_port(PortId(port), mac);
    }
    for n in 0u32..20 {
        let id = n.to_be_bytes();
        let thief = Client {
            port: PortId(66),
            id: Some(&id),
            ..client(1)
        };
        let _ = table.lease(&thief, at(0));
    }
    assert!(table.lease(&client(1), at(1)).is_ok());
    table.check_invariants();
}

#[test]
fn a_lease_without_a_port_is_the_first_ports_unless_the_mac_is_anothers() {
    let mut before = table(2, 254);
    let address = before.lease(&client(1), at(0)).unwrap();
    let records = before.records(at(1), 1_000);
    for is_declared in [false, true] {
        let mut table = table(2, 254);
        assert_eq!(table.restore(&records, at(0), 1_000), 1);
        let own_mac = is_declared.then_some(mac(1));
        table.open_port(PortId(1), own_mac);
        table.open_port(PortId(66), None);
        let thief = Client {
            port: PortId(66),
            ..client(1)
        };
        let first = table.lease(&thief, at(1)).unwrap();
        assert_eq!(first == address, !is_declared);
        let second = table.lease(&client(1), at(2)).unwrap();
        assert_eq!(second == address, is_declared);
        assert_ne!(first, second);
        table.check_invariants();
    }
}

#[test]
fn a_number_that_is_another_ports_now_owns_nothing_of_the_former() {
    let mut table = table(2, 254);
    table.open_port(PortId(1), None);
    let address = table.lease(&client(1), at(0)).unwrap();
    table.close_port(PortId(1), at(1));
    // A frame of the port that was on its way still.
    assert_eq!(table.lease(&client(1), at(1)), Ok(address));
    table.open_port(PortId(1), None);
    table.open_port(PortId(2), None);
    let moved = Client {
        port: PortId(2),
        ..client(1)
    };
    assert_eq!(table.lease(&moved, at(2)), Ok(address));
    table.check_invariants();
}

fn hear(table: &mut LeaseTable, address: Ipv4Addr, n: u32, secs: i64) -> Heard {
    let station = Station {
        mac: mac(n),
        port: PortId(n as u16),
    };
    table.heard(address, station, at(secs))
}

#[test]
fn an_address_in_use_is_passed_over() {
    let mut table = table(2, 254);
    let hashed = table.offer(&client(1), None, at(0)).unwrap();
    // Heard before it was ever offered.
    table.withdraw(&client(1), at(0));
    assert_eq!(hear(&mut table, hashed, 9, 1), Heard::Claimed);
    let other = table.offer(&client(1), None, at(2)).unwrap();
    assert_ne!(other, hashed);
    assert!(table.is_unprobed(other));
    assert_ne!(table.attach(mac(2), PortId(2), None, at(2)), Ok(hashed));
    let wanted = table.offer(&client(3), Some(hashed), at(2)).unwrap();
    assert_ne!(wanted, hashed);
    assert_eq!(
        table.commit(&client(4), hashed, 60, at(2)),
        Err(Refusal::Taken)
    );
    // In answer to its probe.
    assert_eq!(hear(&mut table, other, 9, 3), Heard::Claimed);
    assert_eq!(table.settle_probe(&client(1), other, at(3)), Probed::InUse);
    assert_eq!(table.settle_probe(&client(1), other, at(3)), Probed::Gone);
    let third = table.offer(&client(1), None, at(3)).unwrap();
    assert!(third != hashed && third != other);
    assert_eq!(table.settle_probe(&client(1), third, at(4)), Probed::Free);
    assert!(!table.is_unprobed(third));
    // Who has it by hand may have it by lease.
    assert!(table.offer(&client(9), Some(hashed), at(5)) == Ok(hashed));
    table.check_invariants();
    // The station's port is gone, and its claims.
    table.close_port(PortId(9), at(6));
    assert_eq!(table.offer(&client(5), Some(hashed), at(6)), Ok(hashed));
    table.check_invariants();
}

#[test]
fn no_claim_touches_a_live_lease() {
    let mut table = table(2, 254);
    table.open_port(PortId(1), None);
    let address = table.lease(&client(1), at(0)).unwrap();
    assert_eq!(hear(&mut table, address, 9, 1), Heard::Leased);
    assert_eq!(table.lease(&client(1), at(2)), Ok(address));
    // Ended, it is anybody's who uses it.
    assert_eq!(hear(&mut table, address, 9, 4_000), Heard::Claimed);
    assert_ne!(table.lease(&client(1), at(4_001)), Ok(address));
    table.check_invariants();
}

#[test]
fn a_port_claims_no_more_than_its_share() {
    for (last, limit) in [(254, CLAIMS_PER_PORT_MAX), (7, 3)] {
        let mut table = table(2, last);
        let claimed = (2..=last)
            .filter(|&n| hear(&mut table, address(n), 66, 0) == Heard::Claimed)
            .count();
        assert_eq!(claimed, limit);
        table.check_invariants();
        if last == 7 {
            // What it claims it can't have by lease besides.
            let hostile = Client {
                port: PortId(66),
                ..client(1)
            };
            assert_eq!(table.offer(&hostile, None, at(1)), Err(Refusal::Limit));
        }
        // Others pay with a probe for each.
        for n in 1..=3 {
            let mut tries = 0;
            while let address = table.offer(&client(n), None, at(1)).unwrap()
                && {
                    hear(&mut table, address, 66, 1);
                    table.settle_probe(&client(n), address, at(1)) != Probed::Free
                }
            {
                tries += 1;
                assert!(tries <= limit);
            }
        }
    }
}

#[test]
fn an_offer_that_is_not_taken_costs_nobody_a_lease() {
    let mut table = table(10, 11);
    table.open_port(PortId(1), None);
    let first = table.lease(&client(1), at(0)).unwrap();
    let second = table.lease(&client(2), at(1)).unwrap();
    // The second's port is gone; the first's lives.
    assert_eq!(table.offer(&client(3), None, at(2)), Ok(second));
    assert!(table.is_unprobed(second));
    table.withdraw(&client(3), at(3));
    assert_eq!(table.holder(second, at(3)), Some((mac(2), Some(PortId(2)))));
    // Not taken in time.
    assert_eq!(table.offer(&client(3), None, at(4)), Ok(second));
    let records = table.records(at(5), 1_000);
    assert_eq!(records.len(), 2, "nor does the lease file lose it");
    assert_eq!(
        table.offer(&client(4), None, at(5)),
        Err(Refusal::Exhausted)
    );
    assert_eq!(table.offer(&client(2), None, at(100)), Ok(second));
    assert!(!table.is_unprobed(second));
    // In use still: its guest answers.
    table.open_port(PortId(7), None);
    assert_eq!(table.offer(&client(3), None, at(101)), Ok(second));
    let station = Station {
        mac: mac(2),
        port: PortId(7),
    };
    assert_eq!(table.heard(second, station, at(101)), Heard::Claimed);
    assert_eq!(
        table.settle_probe(&client(3), second, at(102)),
        Probed::InUse
    );
    assert_eq!(
        table.holder(second, at(102)),
        Some((mac(2), Some(PortId(2)))),
        "ARP gives no port a lease"
    );
    assert_eq!(
        table.offer(&client(3), None, at(103)),
        Err(Refusal::Exhausted)
    );
    assert_eq!(table.lease(&client(1), at(104)), Ok(first));
    table.check_invariants();
}

/// As VMs come and go that take an hour's lease with them.
#[test]
fn three_thousand_guests_one_after_the_other_share_six_addresses() {
    for kind in 0..2 {
        let mut table = table(2, 7);
        let mut now = at(0);
        for n in 0..3_000u32 {
            let port = PortId(1 + (n % 4_000) as u16);
            // As many as there are addresses at a time.
            if let Some(ended) = n.checked_sub(6) {
                table.close_port(PortId(1 + (ended % 4_000) as u16), now);
            }
            table.open_port(port, Some(mac(n)));
            let client = Client { port, ..client(n) };
            let address = match (kind + n) % 2 {
                0 => table.lease_unused(&client, now),
                _ => table.attach(mac(n), port, None, now),
            };
            assert!(address.is_ok(), "guest {n}: {address:?}");
            now += Duration::from_millis(50);
            if n % 100 == 0 {
                table.check_invariants();
            }
        }
        let next = Client {
            port: PortId(4_090),
            ..client(9_999)
        };
        assert_eq!(table.offer(&next, None, now), Err(Refusal::Exhausted));
    }
}

#[test]
fn reserved_addresses_are_their_guests_alone() {
    let mut table = table(10, 20);
    let (inside, outside) = (address(12), address(200));
    let reserve = |table: &mut LeaseTable, n, address, name: Option<&str>| {
        table.reserve(&Reservation {
            mac: mac(n),
            address,
            name: name.map(|name| name.parse().unwrap()),
        })
    };
    // Another's lease of an earlier run gives way.
    assert_eq!(table.offer(&client(5), Some(inside), at(0)), Ok(inside));
    table.commit(&client(5), inside, 3600, at(0)).unwrap();
    assert_eq!(reserve(&mut table, 1, inside, Some("web")), Ok(()));
    assert_eq!(reserve(&mut table, 2, outside, None), Ok(()));
    for (n, refused, why) in [
        (3, inside, ReserveError::AddressTwice(inside)),
        (1, address(13), ReserveError::MacTwice(mac(1))),
        (3, address(1), ReserveError::NoGuest(address(1))),
        (3, address(255), ReserveError::NoGuest(address(255))),
    ] {
        assert_eq!(reserve(&mut table, n, refused, None), Err(why));
    }
    assert_ne!(table.offer(&client(6), Some(inside), at(1)), Ok(inside));
    let request = table.commit(&client(7), inside, 60, at(1));
    assert_eq!(request, Err(Refusal::Reserved));
    for n in 20..40 {
        let _ = table.lease(&client(n), at(1));
    }
    table.check_invariants();
    // A full pool is no hindrance.
    let [itself, imitated] = ["itself", "WEB.lan"].map(|name| name.parse::<GuestName>().unwrap());
    let named = Client {
        id: Some(b"any"),
        hostname: Some(&itself),
        ..client(1)
    };
    assert_eq!(table.lease(&named, at(2)), Ok(inside));
    assert_eq!(table.lease(&client(2), at(2)), Ok(outside));
    let called = |table: &LeaseTable, address| {
        let mut held = table.held(at(3));
        let held = held.find(|held| held.address == address);
        held.and_then(|held| held.hostname.map(ToString::to_string))
    };
    assert_eq!(called(&table, inside).as_deref(), Some("web"));
    // The name is not another's to take.
    let imposter = Client {
        hostname: Some(&imitated),
        ..client(2)
    };
    assert_eq!(table.lease(&imposter, at(3)), Ok(outside));
    assert_eq!(called(&table, outside), None);
    assert_eq!(
        table.reserved_by_name(&"Web".parse().unwrap()),
        Some((mac(1), inside))
    );
    // Kept across restarts, outside of the pool too.
    let records = table.records(at(4), 1_000);
    let mut after = self::table(10, 20);
    reserve(&mut after, 2, outside, None).unwrap();
    assert_eq!(after.restore(&records, at(0), 1_000), records.len());
    assert_eq!(after.holder(outside, at(1)), Some((mac(2), None)));
    after.check_invariants();
    table.check_invariants();
}

#[test]
fn a_guest_comes_into_its_reservation_though_another_took_its_mac() {
    let mut table = table(10, 20);
    let (reserved, guest) = (address(200), mac(1));
    let reservation = Reservation {
        mac: guest,
        address: reserved,
        name: None,
    };
    table.reserve(&reservation).unwrap();
    table.open_port(PortId(66), None);
    let thief = Client {
        port: PortId(66),
        ..client(1)
    };
    assert_eq!(table.lease(&thief, at(0)), Ok(reserved));
    table.open_port(PortId(1), Some(guest));
    assert_eq!(table.attach(guest, PortId(1), None, at(1)), Ok(reserved));
    assert_eq!(
        table.holder(reserved, at(1)),
        Some((guest, Some(PortId(1))))
    );
    let renewal = table.commit(&thief, reserved, 60, at(2));
    assert_eq!(renewal, Err(Refusal::Foreign));
    table.check_invariants();
}

#[test]
fn a_ports_address_is_its_first_clients_until_it_goes() {
    let mut table = table(10, 20);
    let (port, kept) = (PortId(1), address(200));
    table.open_port(port, Some(mac(9)));
    assert_eq!(table.reserve_for_port(port, mac(9), kept, at(0)), Ok(()));
    let again = table.reserve_for_port(PortId(2), mac(2), kept, at(0));
    assert_eq!(again, Err(Refusal::Reserved));
    let elsewhere = table.attach(mac(3), PortId(3), Some(kept), at(0));
    assert_eq!(elsewhere, Err(Refusal::Reserved));
    assert_ne!(table.lease(&client(2), at(0)), Ok(kept));
    // By whatever MAC its VMM has given it; and not by that of the next one behind it.
    assert_eq!(table.lease(&client(1), at(1)), Ok(kept));
    let nested = Client { port, ..client(5) };
    assert_ne!(table.lease(&nested, at(1)), Ok(kept));
    assert_eq!(table.lease(&client(1), at(2)), Ok(kept));
    table.check_invariants();
    table.close_port(port, at(3));
    assert_eq!(table.holder(kept, at(3)), None);
    table.check_invariants();
    table.open_port(PortId(3), Some(mac(3)));
    assert_eq!(table.attach(mac(3), PortId(3), Some(kept), at(4)), Ok(kept));
    // What somebody has, nobody gets by asking for it.
    let taken = table.attach(mac(4), PortId(4), Some(kept), at(4));
    assert_eq!(taken, Err(Refusal::Taken));
    let gateway = table.attach(mac(4), PortId(4), Some(address(1)), at(4));
    assert_eq!(gateway, Err(Refusal::NoGuest));
    hear(&mut table, address(15), 66, 4);
    let squatted = table.attach(mac(4), PortId(4), Some(address(15)), at(4));
    assert_eq!(
        squatted,
        Ok(address(15)),
        "nobody's word is against the user's"
    );
    hear(&mut table, address(16), 66, 4);
    let kept = table.reserve_for_port(PortId(5), mac(5), address(16), at(4));
    assert_eq!(kept, Ok(()));
    table.check_invariants();
}

/// What a hostile guest does while another one, or the whole network, starts anew.
#[test]
fn a_guest_that_starts_again_has_its_address_whatever_was_heard_meanwhile() {
    for is_attached in [false, true] {
        let thief = Client {
            port: PortId(66),
            ..client(1)
        };
        let mut before = table(2, 254);
        before.open_port(PortId(1), Some(mac(1)));
        let own = match is_attached {
            true => before.attach(mac(1), PortId(1), None, at(0)).unwrap(),
            false => before.lease(&client(1), at(0)).unwrap(),
        };
        let records = before.records(at(1), 1_000);
        let mut restored = table(2, 254);
        restored.restore(&records, at(0), 1_000);
        before.close_port(PortId(1), at(1));
        for mut table in [before, restored] {
            table.open_port(PortId(66), Some(mac(66)));
            for forged in [mac(1), mac(66)] {
                let station = Station {
                    mac: forged,
                    port: PortId(66),
                };
                table.heard(own, station, at(2));
            }
            let own_mac = Client {
                mac: mac(66),
                ..thief
            };
            assert_ne!(table.offer(&own_mac, Some(own), at(2)), Ok(own));
            let other = Client {
                mac: mac(67),
                ..thief
            };
            assert_eq!(table.hold(&other, own, at(2)), Err(Refusal::Taken));
            let _ = table.lease(&thief, at(2));
            table.open_port(PortId(3), Some(mac(1)));
            let anew = Client {
                port: PortId(3),
                ..client(1)
            };
            let got = match is_attached {
                true => table.attach(mac(1), PortId(3), Some(own), at(3)),
                false => table.lease(&anew, at(3)),
            };
            assert_eq!(got, Ok(own));
            assert_eq!(table.attached_port(own), is_attached.then_some(PortId(3)));
            table.check_invariants();
        }
    }
}

#[test]
fn a_lease_does_not_make_an_address_a_ports_own() {
    let mut table = table(2, 254);
    table.open_port(PortId(66), Some(mac(66)));
    let leased = table.lease(&client(66), at(0)).unwrap();
    assert_eq!(table.attached_port(leased), None);
}

#[test]
fn the_table_never_passes_its_limit() {
    let mut lan = lan();
    lan.prefix = 16;
    let range = Ipv4Addr::new(192, 168, 0, 1)..=Ipv4Addr::new(192, 168, 255, 254);
    let mut table = LeaseTable::new(range, &lan).unwrap();
    let limit = LEASES_MAX as u32;
    for n in 0..limit {
        table.open_port(PortId(n as u16), None);
        table.lease(&client(n), at(0)).unwrap();
    }
    assert_eq!(
        table.offer(&client(limit), None, at(1)),
        Err(Refusal::Exhausted)
    );
    assert_eq!(
        table.commit(&client(limit), Ipv4Addr::new(192, 168, 250, 250), 60, at(1)),
        table
            .is_free(Ipv4Addr::new(192, 168, 250, 250), at(1))
            .then_some(())
            .ok_or(Refusal::Taken)
            .and(Err(Refusal::Exhausted))
    );
    table.check_invariants();
    for n in limit..limit + 10 {
        table.lease(&client(n), at(4_000)).unwrap();
    }
    assert_eq!(table.entries.len(), LEASES_MAX);
    table.check_invariants();
}

#[test]
fn records_survive_a_restart() {
    let mut table = table(2, 254);
    let names = Client {
        id: Some(b"\xff\x00id"),
        hostname: Some(&"web-1.lan".parse().unwrap()),
        ..client(1)
    };
    let named = table.lease(&names, at(0)).unwrap();
    let ended = table.lease(&client(2), at(0)).unwrap();
    assert!(table.release(&client(2), ended, at(100)));
    let port = table.attach(mac(3), PortId(3), None, at(0)).unwrap();
    let offered = table.offer(&client(4), None, at(190)).unwrap();
    let declined = table.lease(&client(5), at(0)).unwrap();
    assert!(table.decline(&client(5), declined, at(190)));

    let unix = 1_800_000_000;
    let records = table.records(at(200), unix);
    let text = serde_json::to_string(&records).unwrap();
    let records: Vec<LeaseRecord> = serde_json::from_str(&text).unwrap();
    // Another clock, 100 s later.
    let mut after = self::table(2, 254);
    assert_eq!(after.restore(&records, at(7), unix + 100), 3);
    after.check_invariants();
    let views = after.snapshot(at(7));
    let view = |address| views.iter().find(|view| view.address == address);
    let left = view(named).unwrap();
    assert_eq!(left.kind, LeaseKind::Bound);
    assert_eq!(left.remaining, Some(Duration::from_secs(3600 - 200 - 100)));
    assert_eq!(left.hostname, "web-1.lan".parse().ok());
    assert_eq!(left.client_id.as_deref(), Some(&b"\xff\x00id"[..]));
    assert_eq!(view(ended).unwrap().kind, LeaseKind::Ended);
    assert_eq!(view(port).unwrap().kind, LeaseKind::Ended);
    assert!(view(offered).is_none() && view(declined).is_none());
    // Everyone gets back what they had.
    assert_eq!(after.commit(&names, named, LEASE_SECS, at(8)), Ok(()));
    assert_eq!(after.lease(&client(2), at(8)), Ok(ended));
    assert_eq!(after.attach(mac(3), PortId(1), None, at(8)), Ok(port));
    // The same again: nothing is lost on the way.
    let again = after.records(at(9), unix + 102);
    assert_eq!(again.len(), 3);
}

#[test]
fn a_wall_clock_that_jumps() {
    let mut table = table(2, 254);
    let address = table.lease(&client(1), at(0)).unwrap();
    let unix = 1_800_000_000;
    let records = table.records(at(0), unix);
    let year = 365 * 86_400;
    let restored = |unix_now| {
        let mut table = self::table(2, 254);
        assert_eq!(table.restore(&records, at(50), unix_now), 1);
        table.check_invariants();
        table
    };
    // Set back: no longer than it was granted for.
    let back = restored(unix - year);
    assert!(back.holder(address, at(50)).is_some());
    assert!(back.holder(address, at(50 + 3600)).is_none());
    assert_eq!(
        restored(0).snapshot(at(50))[0].remaining,
        Some(Duration::from_secs(3600))
    );
    // Set forward: ended, but its client finds it again.
    for far in [unix + year, u64::MAX] {
        let mut forward = restored(far);
        assert_eq!(forward.holder(address, at(50)), None);
        assert_ne!(forward.lease(&client(2), at(50)), Ok(address));
        assert_eq!(forward.lease(&client(1), at(50)), Ok(address));
    }
    // Time that goes far ahead while it runs.
    let mut table = restored(unix);
    assert!(table.holder(address, at(i64::from(u32::MAX) * 4)).is_none());
    let forever = table.commit(&client(1), address, u32::MAX, at(i64::from(u32::MAX) * 4));
    assert_eq!(forever, Ok(()));
    table.check_invariants();
    assert_eq!(table.records(at(0), u64::MAX).len(), 1);
}

#[test]
fn records_that_do_not_fit_are_left_out() {
    let good = LeaseRecord {
        address: address(9),
        mac: mac(1).to_string(),
        client_id: None,
        hostname: Some("\x1b[31mevil".to_owned()),
        expires_unix: 100,
        lease_secs: 60,
    };
    let with = |change: &dyn Fn(&mut LeaseRecord)| {
        let mut record = good.clone();
        change(&mut record);
        record
    };
    let records = [
        good.clone(),
        with(&|record| record.mac = mac(2).to_string()),
        with(&|record| record.address = address(10)),
        with(&|record| {
            record.address = address(1);
            record.mac = mac(3).to_string();
        }),
        with(&|record| {
            record.address = Ipv4Addr::new(10, 0, 0, 1);
            record.mac = mac(3).to_string();
        }),
        with(&|record| record.mac = "nonsense".to_owned()),
        with(&|record| record.client_id = Some("abc".to_owned())),
        with(&|record| record.client_id = Some("+1".to_owned())),
        with(&|record| record.client_id = Some("éé".to_owned())),
        with(&|record| record.client_id = Some("00".repeat(256))),
    ];
    let mut table = table(2, 254);
    assert_eq!(table.restore(&records, at(0), 90), 1);
    table.check_invariants();
    assert_eq!(table.snapshot(at(0))[0].hostname, None);
    assert_eq!(table.restore(&records, at(0), 90), 0, "what is there stays");
}

#[test]
fn the_generation_follows_what_is_kept() {
    let mut table = table(2, 254);
    let start = table.generation();
    let address = table.offer(&client(1), None, at(0)).unwrap();
    assert_eq!(table.generation(), start, "an offer is not kept");
    let mut last = start;
    let mut grew = |table: &LeaseTable, what: &str| {
        assert!(table.generation() > last, "{what}");
        last = table.generation();
    };
    table
        .commit(&client(1), address, LEASE_SECS, at(0))
        .unwrap();
    grew(&table, "commit");
    table
        .commit(&client(1), address, LEASE_SECS, at(9))
        .unwrap();
    grew(&table, "renewal");
    table.release(&client(1), address, at(10));
    grew(&table, "release");
    table.attach(mac(1), PortId(1), None, at(10)).unwrap();
    grew(&table, "attach");
    table.close_port(PortId(1), at(10));
    grew(&table, "detach");
}

#[derive(Clone, Debug)]
enum Step {
    Offer(u32, Option<u8>),
    Commit(u32, u8),
    TakeOffer(u32),
    Release(u32),
    Decline(u32),
    Withdraw(u32),
    Attach(u32),
    Detach(u32),
    Wait(u16),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let who = 0u32..14;
    prop_oneof![
        (who.clone(), proptest::option::of(0u8..24)).prop_map(|(n, wanted)| Step::Offer(n, wanted)),
        (who.clone(), 0u8..24).prop_map(|(n, address)| Step::Commit(n, address)),
        who.clone().prop_map(Step::TakeOffer),
        who.clone().prop_map(Step::Release),
        who.clone().prop_map(Step::Decline),
        who.clone().prop_map(Step::Withdraw),
        who.clone().prop_map(Step::Attach),
        who.prop_map(Step::Detach),
        (0u16..2_000).prop_map(Step::Wait),
        Just(Step::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 512,
        rng_seed: proptest::test_runner::RngSeed::Fixed(0x1ea5e),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Whatever happens, no address has two holders: a model keeps what each client was promised.
    #[test]
    fn one_address_one_lease(steps in proptest::collection::vec(step(), 1..120)) {
        let mut table = table(5, 16);
        let mut now = at(1_000);
        let unix = |now: Instant| 1_000_000 + now.secs() as u64;
        // Address -> (client, promised until).
        let mut promised: BTreeMap<Ipv4Addr, (u32, Instant)> = BTreeMap::new();
        for step in steps {
            // Clients 10.. share a MAC with 0.. and have identifiers.
            let id = [9, 9];
            let who = |n: u32| Client {
                id: (n >= 10).then_some(&id[..]),
                    ..client(n % 10)
            };
            match step {
                Step::Offer(n, wanted) => {
                    if let Ok(address) = table.offer(&who(n), wanted.map(address), now)
                        && let Some((holder, until)) = promised.get(&address)
                            && now < *until
                        {
                            prop_assert_eq!(holder % 10, n % 10, "{} offered while leased", address);
                        }
                }
                Step::Commit(n, last) => commit(&mut table, &mut promised, n, &who(n), address(last), now)?,
                Step::TakeOffer(n) => {
                    if let Ok(address) = table.offer(&who(n), None, now) {
                        commit(&mut table, &mut promised, n, &who(n), address, now)?;
                    }
                }
                Step::Release(n) | Step::Decline(n) | Step::Withdraw(n) => {
                    if let Some(address) = table.find(&who(n), now) {
                        let attached = table.attached.get(&mac(n % 10)).is_some_and(|own| own.address == Some(address));
                        let ends = match step {
                            Step::Release(_) => table.release(&who(n), address, now),
                            Step::Decline(_) => table.decline(&who(n), address, now),
                            _ => {
                                table.withdraw(&who(n), now);
                                false
                            }
                        };
                        // A declined address is nobody's, an attached one too.
                        if ends && (!attached || matches!(step, Step::Decline(_))) {
                            promised.remove(&address);
                        }
                    }
                }
                Step::Attach(n) => {
                    if let Ok(address) = table.attach(mac(n % 10), PortId((n % 10) as u16), None, now) {
                        if let Some((holder, until)) = promised.get(&address)
                            && now < *until
                        {
                            prop_assert_eq!(holder % 10, n % 10);
                        }
                        promised.insert(address, (n % 10, at(i64::MAX / 2_000_000)));
                    }
                }
                Step::Detach(n) => {
                    if let Some(attached) = table.attached.get(&mac(n % 10)) {
                        attached.address.map(|address| promised.remove(&address));
                        table.close_port(PortId((n % 10) as u16), now);
                        table.open_port(PortId((n % 10) as u16), None);
                    }
                }
                Step::Wait(secs) => now += Duration::from_secs(u64::from(secs)),
                Step::Restart => {
                    let records = table.records(now, unix(now));
                    let count = records.len();
                    table = self::table(5, 16);
                    prop_assert_eq!(table.restore(&records, now, unix(now)), count);
                    // Ports are gone, and their leases with them.
                    promised.retain(|_, (_, until)| *until < at(i64::MAX / 4_000_000));
                }
            }
            table.check_invariants();
            for (&address, &(holder, until)) in &promised {
                if now < until {
                    let held = table.holder(address, now).map(|(mac, _)| mac);
                    prop_assert_eq!(held, Some(mac(holder % 10)), "{}", address);
                }
            }
        }
    }
}

fn commit(
    table: &mut LeaseTable,
    promised: &mut BTreeMap<Ipv4Addr, (u32, Instant)>,
    n: u32,
    client: &Client<'_>,
    address: Ipv4Addr,
    now: Instant,
) -> Result<(), TestCaseError> {
    if table.commit(client, address, LEASE_SECS, now).is_ok() {
        if let Some((holder, until)) = promised.get(&address)
            && now < *until
        {
            prop_assert_eq!(holder % 10, n % 10, "{} leased twice", address);
        }
        if table
            .attached
            .get(&client.mac)
            .is_none_or(|own| own.address != Some(address))
        {
            promised.insert(
                address,
                (n, now + Duration::from_secs(u64::from(LEASE_SECS))),
            );
        }
    }
    Ok(())
}
