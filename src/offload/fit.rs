//! Adapts a frame to what its egress port can do.

use super::layout::{Headers, headers_len, network};
use super::segment::segment;
use super::{Caps, Csum, Gso, Offload};
use crate::frame::{ETH_HEADER_LEN, Frame};
use crate::stats::DropReason;
use crate::wire::checksum;

/// Hands `frame` to `emit` in the form that a port with `caps` takes: whole, with its checksum
/// completed, or as segments with right checksums, in order.
///
/// `mtu` is the egress port's, in bytes of IP packet: neither Ethernet header nor VLAN tags count.
/// A super-frame is held to it per segment. `scratch` is used for what has to be rewritten and
/// should hold [`FRAME_LEN_MAX`](crate::frame::FRAME_LEN_MAX) bytes.
///
/// # Errors
/// [`DropReason::EgressTooBig`] above `mtu` or the size of `scratch`; [`DropReason::BadOffload`] if
/// `frame.offload` does not belong to `frame.bytes`. Nothing was emitted then.
#[inline]
pub fn fit(
    frame: Frame<'_>,
    caps: Caps,
    mtu: usize,
    scratch: &mut [u8],
    emit: &mut impl FnMut(Frame<'_>),
) -> Result<(), DropReason> {
    match frame.offload.gso {
        Gso::None => {
            let len = frame.bytes.len();
            if len > ETH_HEADER_LEN + mtu && len > network_at(frame.bytes) + mtu {
                return Err(DropReason::EgressTooBig);
            }
            if caps.take(frame.offload) {
                emit(frame);
            } else {
                emit(complete_checksum(frame, scratch)?);
            }
        }
        gso @ (Gso::Tcp4(size) | Gso::Tcp6(size) | Gso::Udp(size)) => {
            let size = usize::from(size);
            let headers_len =
                headers_len(frame.bytes, frame.offload).ok_or(DropReason::BadOffload)?;
            if network_at(frame.bytes) + mtu < headers_len + size {
                return Err(DropReason::EgressTooBig);
            }
            if caps.take(frame.offload) {
                emit(frame);
            } else {
                let headers = Headers::of(frame.bytes, gso).ok_or(DropReason::BadOffload)?;
                segment(frame.bytes, &headers, size, scratch, emit)?;
            }
        }
    }
    Ok(())
}

/// Where the bytes that an MTU counts begin. Behind a third tag nobody measures: it counts.
#[inline]
fn network_at(bytes: &[u8]) -> usize {
    network(bytes).map_or(ETH_HEADER_LEN, |(at, _)| at)
}

/// A copy of `frame` in `scratch` whose checksum is complete. The sum starts from what the sender
/// left in the field, which is the pseudo-header's.
fn complete_checksum<'a>(frame: Frame<'_>, scratch: &'a mut [u8]) -> Result<Frame<'a>, DropReason> {
    let copy = scratch
        .get_mut(..frame.bytes.len())
        .ok_or(DropReason::EgressTooBig)?;
    copy.copy_from_slice(frame.bytes);
    if let Csum::Partial { start, offset } = frame.offload.csum {
        let at = usize::from(start) + usize::from(offset);
        let covered = copy.get(start.into()..).ok_or(DropReason::BadOffload)?;
        let sum = !checksum::fold(checksum::sum(covered));
        // RFC 768: 0 would mean "none". To every other protocol the two are the same number.
        let sum = if sum == 0 { 0xffff } else { sum };
        let field = copy.get_mut(at..at + 2).ok_or(DropReason::BadOffload)?;
        field.copy_from_slice(&sum.to_be_bytes());
    }
    Ok(Frame {
        bytes: copy,
        offload: Offload::default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const UDP_PARTIAL: Offload = Offload {
        csum: Csum::Partial {
            start: 34,
            offset: 6,
        },
        gso: Gso::None,
        ecn: false,
    };

    fn fitted(
        bytes: &[u8],
        offload: Offload,
        caps: Caps,
        mtu: usize,
    ) -> Result<Vec<Vec<u8>>, DropReason> {
        let mut out = Vec::new();
        let mut scratch = vec![0; 2000];
        let frame = Frame { bytes, offload };
        fit(frame, caps, mtu, &mut scratch, &mut |frame| {
            out.push(frame.bytes.to_vec())
        })?;
        Ok(out)
    }

    #[test]
    fn mtu_counts_neither_ethernet_nor_tags() {
        let mut frame = vec![0; 14 + 100];
        assert!(fitted(&frame, Offload::default(), Caps::default(), 100).is_ok());
        let too_big = Err(DropReason::EgressTooBig);
        assert_eq!(
            fitted(&frame, Offload::default(), Caps::default(), 99),
            too_big
        );
        frame.extend_from_slice(&[0; 8]);
        assert_eq!(
            fitted(&frame, Offload::default(), Caps::default(), 100),
            too_big
        );
        frame[12..14].copy_from_slice(&[0x88, 0xa8]);
        frame[16..18].copy_from_slice(&[0x81, 0x00]);
        assert!(fitted(&frame, Offload::default(), Caps::default(), 100).is_ok());
    }

    #[test]
    fn a_zero_sum_is_written_as_ones() {
        let mut frame = vec![0; 14 + 20 + 8];
        // The rest being zero, the inverted sum over 0xffff is 0.
        frame[34..36].copy_from_slice(&[0xff, 0xff]);
        let out = fitted(&frame, UDP_PARTIAL, Caps::default(), 1500).unwrap();
        assert_eq!(out[0][40..42], [0xff, 0xff]);
        assert_eq!(
            fitted(
                &frame,
                UDP_PARTIAL,
                Caps {
                    csum: true,
                    ..Caps::default()
                },
                1500
            )
            .unwrap()[0],
            frame
        );
    }

    #[test]
    fn what_does_not_belong_together_is_an_error() {
        let lost = Offload {
            csum: Csum::Partial {
                start: 60,
                offset: 6,
            },
            ..Offload::default()
        };
        for len in [14, 60, 66, 67] {
            let result = fitted(&vec![0; len], lost, Caps::default(), 1500);
            assert_eq!(result, Err(DropReason::BadOffload), "{len}");
        }
        let no_tcp = Offload {
            gso: Gso::Tcp4(100),
            ..UDP_PARTIAL
        };
        assert_eq!(
            fitted(&[0; 600], no_tcp, Caps::default(), 1500),
            Err(DropReason::BadOffload)
        );
        // No room to work in.
        assert_eq!(
            fitted(&[0; 2001], UDP_PARTIAL, Caps::default(), 9000),
            Err(DropReason::EgressTooBig)
        );
    }
}
