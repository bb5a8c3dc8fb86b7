//! What the gateway and the NAT read of a frame: views must lie within it and agree with each other.
//!
//! Input: a virtio-net header and a frame.
#![no_main]

use lanlet::frame::{Frame, PortId};
use lanlet::offload::{VNET_HEADER_LEN, admit};
use lanlet::wire::{Body, Packet, Transport};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|raw: &[u8]| {
    let Ok(offload) = admit(raw) else { return };
    let bytes = &raw[VNET_HEADER_LEN..];
    let Ok(packet) = Packet::parse(Frame { bytes, offload }, PortId(1)) else {
        return;
    };
    assert_eq!(packet.frame, bytes);
    let Body::Ipv4(ip) = packet.body else { return };
    assert!(ip.packet.len() + 14 <= bytes.len());
    assert!((20..=60).contains(&ip.header_len));
    let payload_len = ip.payload().len();
    assert_eq!(ip.header_len + payload_len, ip.packet.len());
    match ip.transport {
        Transport::Tcp(tcp) => {
            assert!((20..=60).contains(&tcp.header.len()));
            assert_eq!(tcp.header.len() + tcp.payload.len(), payload_len);
        }
        Transport::Udp(udp) => assert!(8 + udp.payload.len() <= payload_len),
        Transport::Icmp(message) => assert!(message.len() >= 8 && message.len() <= payload_len),
        Transport::Fragment | Transport::Other(_) => {}
    }
});
