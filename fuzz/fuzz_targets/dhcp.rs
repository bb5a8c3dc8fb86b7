//! The DHCP parser and server: the first byte chooses port and MAC, the rest is the UDP payload.
#![no_main]

use std::cell::RefCell;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};

use lanlet::dhcp::lease::LeaseTable;
use lanlet::dhcp::options::Request;
use lanlet::dhcp::{DhcpConfig, DhcpServer};
use lanlet::frame::{Duration, FRAME_BUFFER_LEN, Frame, Instant, Mac, PortId};
use lanlet::gateway::{LanConfig, Outbox, Service};
use lanlet::offload::Offload;
use lanlet::wire::{Packet, UDP4_PAYLOAD_AT, write_udp4};
use libfuzzer_sys::fuzz_target;

struct Lab {
    server: DhcpServer,
    out: Checked,
    now: Instant,
}

struct Checked(Vec<u8>);

impl Outbox for Checked {
    fn buffer(&mut self) -> &mut [u8] {
        &mut self.0
    }

    fn send(&mut self, len: usize, offload: Offload) {
        let frame = Frame {
            bytes: &self.0[..len],
            offload,
        };
        assert!(Packet::parse(frame, PortId::GATEWAY).is_ok());
    }
}

fn lab() -> Lab {
    let lan = LanConfig {
        mac: Mac([0x52, 0x55, 0, 0, 0, 1]),
        address: Ipv4Addr::new(192, 168, 122, 1),
        prefix: 28,
        mtu: 1500,
        v6: None,
    };
    let config = DhcpConfig::new(lan);
    let mut leases = LeaseTable::new(config.range(), &config.lan).unwrap();
    leases.open_port(PortId(1), None);
    leases.open_port(PortId(2), None);
    Lab {
        server: DhcpServer::new(config, Arc::new(Mutex::new(leases))),
        out: Checked(vec![0; FRAME_BUFFER_LEN]),
        now: Instant::ZERO,
    }
}

thread_local! {
    static LAB: RefCell<Lab> = RefCell::new(lab());
}

fuzz_target!(|data: &[u8]| {
    let Some((&who, payload)) = data.split_first() else {
        return;
    };
    // UDP's length field.
    let payload = &payload[..payload.len().min(60_000)];
    let _ = Request::parse(payload);
    let mac = Mac([0x52, 0x54, 0, 0, 0, who]);
    let mut frame = vec![0; UDP4_PAYLOAD_AT + payload.len()];
    frame[UDP4_PAYLOAD_AT..].copy_from_slice(payload);
    if payload.len() >= 34 {
        frame[UDP4_PAYLOAD_AT + 28..][..6].copy_from_slice(&mac.0);
    }
    let from = (mac, Ipv4Addr::UNSPECIFIED, 68);
    write_udp4(
        &mut frame,
        from,
        (Mac::BROADCAST, Ipv4Addr::BROADCAST, 67),
        payload.len(),
    );
    let frame = Frame {
        bytes: &frame,
        offload: Offload::default(),
    };
    let packet = Packet::parse(frame, PortId(u16::from(who & 3))).unwrap();
    LAB.with_borrow_mut(|Lab { server, out, now }| {
        *now += Duration::from_secs(u64::from(who));
        let _ = server.handle(&packet, *now, out);
        if who & 4 != 0
            && let Some(due) = server.poll_timeout()
        {
            server.handle_timeout(due, out);
        }
    });
});
