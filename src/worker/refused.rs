//! What `-vv` says of a frame that was refused: where, why, and what it was.
//!
//! It costs one load of the log's level for each refused frame, and a forwarded one nothing.

use std::fmt;

use crate::frame::{ETH_HEADER_LEN, Frame, PortId};
use crate::stats::DropReason;
use crate::wire::{Body, Packet, Tcp, Transport, be16};

/// Says it, if anybody wants to hear it. `port` is the one that counts it.
pub(super) fn trace(port: PortId, reason: DropReason, frame: Frame<'_>) {
    if log::log_enabled!(log::Level::Trace) {
        log::trace!("port {port}: {}: {}", reason.name(), Words(frame));
    }
}

/// A frame in words.
struct Words<'a>(Frame<'a>);

impl fmt::Display for Words<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Words(frame) = self;
        let len = frame.bytes.len();
        if len < ETH_HEADER_LEN {
            return write!(f, "{len} bytes");
        }
        write!(f, "{} > {}, ", frame.source(), frame.destination())?;
        match Packet::parse(*frame, PortId::GATEWAY) {
            Ok(packet) => body(&packet, f)?,
            Err(_) => write!(f, "type 0x{:04x}", be16(frame.bytes, 12))?,
        }
        write!(f, ", {len} bytes")
    }
}

fn body(packet: &Packet<'_>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let Some(ip) = packet.ip() else {
        return match packet.body {
            Body::Other(ethertype) => write!(f, "type 0x{ethertype:04x}"),
            _ => f.write_str("ARP"),
        };
    };
    let (from, to) = (ip.source, ip.destination);
    match ip.transport {
        Transport::Tcp(tcp) => {
            let flags = [(Tcp::SYN, "SYN"), (Tcp::FIN, "FIN"), (Tcp::RST, "RST")];
            let flags = flags.iter().filter(|(bit, _)| tcp.flags & bit != 0);
            write!(
                f,
                "TCP {from} {} > {to} {}",
                tcp.source_port, tcp.destination_port
            )?;
            flags
                .into_iter()
                .try_for_each(|(_, name)| write!(f, " {name}"))
        }
        Transport::Udp(udp) => {
            write!(
                f,
                "UDP {from} {} > {to} {}",
                udp.source_port, udp.destination_port
            )
        }
        Transport::Icmp(message) => {
            write!(
                f,
                "ICMP {from} > {to} type {} code {}",
                message[0], message[1]
            )
        }
        Transport::Fragment => write!(f, "fragment {from} > {to}"),
        Transport::Other(protocol) => write!(f, "protocol {protocol} {from} > {to}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Mac;
    use crate::offload::Offload;
    use crate::wire::{UDP4_PAYLOAD_AT, write_udp4};

    #[test]
    fn frames_in_words() {
        let words = |bytes: &[u8]| {
            let offload = Offload::default();
            Words(Frame { bytes, offload }).to_string()
        };
        let mut frame = [0; UDP4_PAYLOAD_AT + 2];
        write_udp4(
            &mut frame,
            (Mac([2; 6]), [10, 0, 0, 2].into(), 1000),
            (Mac([4; 6]), [10, 0, 0, 1].into(), 9),
            2,
        );
        assert_eq!(
            words(&frame),
            "02:02:02:02:02:02 > 04:04:04:04:04:04, UDP 10.0.0.2 1000 > 10.0.0.1 9, 44 bytes"
        );
        frame[20] ^= 1; // the checksum is wrong then
        assert!(words(&frame).contains(", type 0x0800, 44 bytes"));
        assert_eq!(words(&frame[..13]), "13 bytes");
    }
}
