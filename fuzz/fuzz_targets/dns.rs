//! The DNS forwarder: the first two bytes split the rest into a query and an answer.
#![no_main]

use std::net::Ipv4Addr;

use lanlet::frame::{FRAME_BUFFER_LEN, Frame, Instant, Mac, PortId};
use lanlet::gateway::dns::message::{self, Query};
use lanlet::gateway::dns::{DNS_PORT, DnsAnswer, DnsService};
use lanlet::gateway::{LanConfig, Outbox, Service};
use lanlet::offload::Offload;
use lanlet::wire::{Packet, UDP4_PAYLOAD_AT, write_udp4};
use libfuzzer_sys::fuzz_target;

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
        assert!(len <= 14 + 1500);
        assert!(Packet::parse(frame, PortId::GATEWAY).is_ok());
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&[high, low], rest)) = data.split_first_chunk() else {
        return;
    };
    let rest = &rest[..rest.len().min(60_000)];
    let split = usize::from(u16::from_be_bytes([high, low])) % (rest.len() + 1);
    let (query, answer) = rest.split_at(split);
    let _ = message::is_answer_to(answer, query);
    for part in [query, answer] {
        let _ = message::question_name(part).map(|name| name.to_string());
        let _ = message::answers(part).map(|answers| answers.count());
    }
    let passes = Query::parse(query).is_ok();

    let lan = LanConfig {
        mac: Mac([0x52, 0x55, 0, 0, 0, 1]),
        address: Ipv4Addr::new(192, 168, 122, 1),
        prefix: 24,
        mtu: 1500,
        v6: None,
    };
    let mut service = DnsService::new(lan.clone());
    let mut out = Checked(vec![0; FRAME_BUFFER_LEN]);
    let mut frame = vec![0; UDP4_PAYLOAD_AT + query.len()];
    frame[UDP4_PAYLOAD_AT..].copy_from_slice(query);
    let from = (
        Mac([0x52, 0x54, 0, 0, 0, 7]),
        Ipv4Addr::new(192, 168, 122, 77),
        4_000,
    );
    write_udp4(
        &mut frame,
        from,
        (lan.mac, lan.address, DNS_PORT),
        query.len(),
    );
    let frame = Frame {
        bytes: &frame,
        offload: Offload::default(),
    };
    let packet = Packet::parse(frame, PortId(1)).unwrap();
    let _ = service.handle(&packet, Instant::ZERO, &mut out);
    let asked = service.poll_query();
    assert_eq!(asked.is_some(), passes);
    if let Some(asked) = asked {
        let answer = DnsAnswer {
            id: asked.id,
            message: answer.to_vec().into(),
        };
        let _ = service.handle_answer(&answer, &mut out);
        assert_eq!(service.outstanding(), 0);
    }
});
