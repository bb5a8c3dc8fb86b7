use super::*;
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

    /// Invariants 5 and 7 of the crate, and that every index says the same.
    fn check_invariants(&self) {
        assert!(self.entries.len() <= LEASES_MAX);
        let (mut ends, mut transient, mut attached, mut clients) = (0, 0, 0, 0);
        for (&address, entry) in &self.entries {
            assert!(self.in_pool(address), "{address}");
            match entry.state {
                State::Offered { until } | State::Quarantined { until } => {
                    transient += 1;
                    assert!(self.transient.contains(&(until, address)));
                }
                State::Bound { until, .. } => {
                    ends += 1;
                    assert!(self.ends.contains(&(until, address)));
                }
                State::Attached => {
                    attached += 1;
                    assert_eq!(self.attached.get(&entry.key.mac), Some(&address));
                }
            }
            if !matches!(entry.state, State::Quarantined { .. }) {
                clients += 1;
                assert_eq!(self.by_client.get(&entry.key), Some(&address));
            }
        }
        let sizes = (self.ends.len(), self.transient.len(), self.attached.len());
        assert_eq!(sizes, (ends, transient, attached));
        assert_eq!(self.by_client.len(), clients);
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
    let second = table.lease(&with(&duid), at(0)).unwrap();
    assert_ne!(second, address, "ipvlan children");
    let clone = Client {
        id: Some(&duid),
        ..client(2)
    };
    let third = table.lease(&clone, at(0)).unwrap();
    assert!(
        third != second && third != address,
        "a cloned disk with the same DUID"
    );
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
    for n in 1..=4 {
        table.lease(&client(n), at(i64::from(n))).unwrap();
    }
    assert_eq!(
        table.offer(&client(5), None, at(10)),
        Err(Refusal::Exhausted)
    );
    assert_eq!(
        table.attach(mac(5), PortId(5), at(10)),
        Err(Refusal::Exhausted)
    );
    let second = table.find(&client(2)).unwrap();
    let third = table.find(&client(3)).unwrap();
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
    table.withdraw(&client(1));
    table.withdraw(&client(2));
    table.withdraw(&client(3));
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
    let by_dhcp = table.lease(&client(1), at(0)).unwrap();
    assert_eq!(table.attach(mac(1), PortId(9), at(1)), Ok(by_dhcp));
    assert_eq!(table.attach(mac(1), PortId(10), at(1)), Err(Refusal::Taken));
    let client = Client {
        id: Some(b"anything"),
        hostname: Some(&"box".parse().unwrap()),
        ..client(1)
    };
    assert_eq!(
        table.lease(&client, at(2)),
        Ok(by_dhcp),
        "whatever it calls itself"
    );
    assert!(table.release(&client, by_dhcp, at(3)));
    assert!(table.decline(&client, by_dhcp, at(3)));
    assert_eq!(
        table.holder(by_dhcp, at(i64::from(u32::MAX))),
        Some((mac(1), Some(PortId(9))))
    );
    let view = &table.snapshot(at(4))[0];
    assert_eq!((view.kind, view.remaining), (LeaseKind::Attached, None));
    assert_eq!(view.hostname, "box".parse().ok());
    table.check_invariants();
    table.detach(mac(1), at(5));
    table.detach(mac(1), at(5));
    assert_eq!(table.holder(by_dhcp, at(5)), None);
    assert_eq!(table.attach(mac(1), PortId(11), at(6)), Ok(by_dhcp));
    table.check_invariants();
}

#[test]
fn the_table_never_passes_its_limit() {
    let mut lan = lan();
    lan.prefix = 16;
    let range = Ipv4Addr::new(192, 168, 0, 1)..=Ipv4Addr::new(192, 168, 255, 254);
    let mut table = LeaseTable::new(range, &lan).unwrap();
    let limit = LEASES_MAX as u32;
    for n in 0..limit {
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
    let port = table.attach(mac(3), PortId(3), at(0)).unwrap();
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
    assert_eq!(after.attach(mac(3), PortId(1), at(8)), Ok(port));
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
    table.attach(mac(1), PortId(1), at(10)).unwrap();
    grew(&table, "attach");
    table.detach(mac(1), at(10));
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
                    if let Some(address) = table.find(&who(n)) {
                        let attached = table.attached.contains_key(&mac(n % 10));
                        let ends = match step {
                            Step::Release(_) => table.release(&who(n), address, now),
                            Step::Decline(_) => table.decline(&who(n), address, now),
                            _ => {
                                table.withdraw(&who(n));
                                false
                            }
                        };
                        if ends && !attached {
                            promised.remove(&address);
                        }
                    }
                }
                Step::Attach(n) => {
                    if let Ok(address) = table.attach(mac(n % 10), PortId(1), now) {
                        if let Some((holder, until)) = promised.get(&address)
                            && now < *until
                        {
                            prop_assert_eq!(holder % 10, n % 10);
                        }
                        promised.insert(address, (n % 10, at(i64::MAX / 2_000_000)));
                    }
                }
                Step::Detach(n) => {
                    if let Some(address) = table.attached.get(&mac(n % 10)).copied() {
                        promised.remove(&address);
                    }
                    table.detach(mac(n % 10), now);
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
        if !table.attached.contains_key(&client.mac) {
            promised.insert(
                address,
                (n, now + Duration::from_secs(u64::from(LEASE_SECS))),
            );
        }
    }
    Ok(())
}
