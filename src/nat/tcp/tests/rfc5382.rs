//! RFC 5382, requirement by requirement, as far as it applies to a NAT onto host sockets
//! (docs/nat.md has the table).

use super::*;

fn raw(from: SocketAddr, sequence: u32, flags: u8) -> Vec<u8> {
    testing::guest_tcp(
        from,
        SERVER,
        (sequence, 0),
        (flags, 64_000),
        &[2, 4, 5, 180],
        b"",
    )[14..]
        .to_vec()
}

#[test]
fn rfc5382_req2_a_reused_endpoint_starts_a_fresh_connection() {
    // Closed by both sides: no TIME-WAIT keeps the pair of endpoints.
    let mut lab = Lab::new();
    for round in 1..=3 {
        let handle = lab.connect(1000);
        lab.settle();
        assert_eq!(
            lab.socket(handle).state(),
            tcp::State::Established,
            "{round}"
        );
        let host = lab.host();
        lab.up.peer_shutdown(host);
        lab.socket(handle).close();
        lab.settle();
        assert_eq!((lab.nat.len(), lab.up.open_count()), (0, 0));
        lab.sockets.remove(handle);
    }
    // Forgotten by a guest that was restarted: its SYN is answered with an ACK (RFC 9293 3.10.7.4), its
    // RST ends the old connection, its next SYN opens the fresh one.
    let handle = lab.connect(1000);
    lab.settle();
    lab.sockets.remove(handle);
    let old = lab.host();
    let handle = lab.connect(1000);
    lab.settle();
    lab.sleep(Duration::from_secs(3));
    assert_eq!(lab.socket(handle).state(), tcp::State::Established);
    assert_ne!(lab.host(), old);
    assert_eq!(lab.nat.counters().opened, 5);
}

#[test]
fn rfc5382_req3_nobody_outside_reaches_a_guest_by_a_mapping() {
    // A connection's socket belongs to its two endpoints: the host's kernel refuses strangers. What
    // comes in comes through a forward, which has a listening socket of its own.
    let mut lab = Lab::new();
    lab.connect(1000);
    lab.settle();
    assert_eq!(lab.up.peer(lab.host()), SERVER);
    assert_eq!(lab.up.open_count(), 1);
}

#[test]
fn rfc5382_req5_an_idle_connection_lives_for_two_hours_and_four_minutes() {
    let mut lab = Lab::new();
    let handle = lab.connect(1000);
    lab.settle();
    lab.now += Duration::from_secs(2 * 3600 + 4 * 60 - 1);
    lab.settle();
    assert_eq!(lab.nat.len(), 1);
    lab.now += Duration::from_secs(60);
    lab.settle();
    assert_eq!((lab.nat.len(), lab.up.open_count()), (0, 0));
    assert_eq!(lab.socket(handle).state(), tcp::State::Closed);
}

#[test]
fn rfc5382_req5_handshakes_and_closing_connections_live_for_four_minutes() {
    for close in [false, true] {
        let mut lab = Lab::new();
        if close {
            let handle = lab.connect(1000);
            lab.settle();
            lab.socket(handle).close();
            lab.settle();
        } else {
            lab.up.connect_default = Connect::Wait;
            let from = SocketAddr::new(GUEST.into(), 1000);
            lab.guest_sends(&raw(from, 7, Tcp::SYN)).unwrap();
        }
        let wait = |lab: &mut Lab, time: Duration| {
            lab.now += time;
            lab.nat.handle_timeout(lab.now, &mut lab.up, &mut lab.log);
        };
        wait(&mut lab, TRANSITORY_IDLE - Duration::from_secs(2));
        assert_eq!(lab.nat.len(), 1, "close: {close}");
        wait(&mut lab, Duration::from_secs(3));
        let left = (lab.nat.len(), lab.up.open_count());
        assert_eq!(left, (0, 0), "close: {close}");
    }
}

#[test]
fn rfc5382_req7_no_two_guests_share_an_outside_endpoint() {
    let mut lab = Lab::new();
    for host in 2..10u8 {
        let from = SocketAddr::from(([192, 168, 122, host], 5000));
        lab.guest_sends(&raw(from, 7, Tcp::SYN)).unwrap();
    }
    lab.host_events();
    // One socket each, whose port the host's kernel chooses.
    let sockets = lab.up.open_sockets();
    assert_eq!((sockets.len(), lab.nat.len()), (8, 8));
}

#[test]
fn rfc5382_req9_errors_of_the_path_reach_the_guest_as_icmp() {
    for (error, code) in [
        (HostError::NetUnreachable, 0),
        (HostError::HostUnreachable, 1),
        (HostError::TimedOut, 1),
        (HostError::Prohibited, 13),
    ] {
        let mut lab = Lab::new();
        lab.up.connect_default = Connect::Fail(error);
        let from = SocketAddr::new(GUEST.into(), 1000);
        lab.guest_sends(&raw(from, 7, Tcp::SYN)).unwrap();
        lab.host_events();
        let (frame, offload) = lab.log.pop().unwrap();
        let packet = testing::parse(&frame, offload);
        let ip = packet.ip().unwrap();
        let crate::wire::Transport::Icmp(message) = ip.transport else {
            panic!("{ip:?}")
        };
        assert_eq!(message[..2], [3, code], "{error:?}");
    }
}

#[test]
fn rfc5382_req10_an_icmp_error_ends_no_connection() {
    let mut lab = Lab::new();
    let handle = lab.connect(1000);
    lab.settle();
    // What ICMP makes of an established socket is a soft error: an event without SO_ERROR.
    let (_, owner) = lab.up.open_sockets()[0];
    let SockOwner::Tcp(id) = owner else {
        panic!("{owner:?}")
    };
    let ready = Ready {
        error: true,
        ..Ready::default()
    };
    lab.nat
        .handle_ready(id, ready, lab.now, (&mut lab.up, &mut lab.log));
    lab.settle();
    let data = pattern(100_000, 5);
    assert!(upload(&mut lab, handle, &data) == data);
    assert_eq!(lab.socket(handle).state(), tcp::State::Established);
}

#[test]
fn rfc5382_req5_a_servers_end_after_long_silence_is_no_idle_connection() {
    let mut lab = Lab::new();
    let handle = lab.connect(1000);
    lab.settle();
    lab.now += Duration::from_secs(600);
    lab.settle();
    let host = lab.host();
    lab.up.peer_shutdown(host);
    lab.settle();
    assert_eq!(lab.socket(handle).state(), tcp::State::CloseWait);
    let data = pattern(100_000, 6);
    assert!(upload(&mut lab, handle, &data) == data);
    assert_eq!(lab.nat.counters().idled_out, 0);
}
