//! What a read from a guest's tap may hold, through admission and onto every kind of port.
//!
//! Input: one byte of capabilities, one of MTU, then a virtio-net header and a frame.
#![no_main]

use lanlet::frame::{FRAME_LEN_MAX, Frame};
use lanlet::offload::{Caps, Gso, SEGMENTS_MAX, VNET_HEADER_LEN, admit, encode, fit};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let [bits, mtu, raw @ ..] = input else { return };
    let caps = Caps {
        csum: bits & 1 != 0,
        tso: bits & 2 != 0,
        uso: bits & 4 != 0,
    };
    let mtu = [68, 576, 1500, 9000, 65_535][usize::from(*mtu) % 5];
    let Ok(offload) = admit(raw) else { return };
    let bytes = &raw[VNET_HEADER_LEN..];
    let frame = Frame { bytes, offload };

    // What we would write to another tap, we would admit there.
    let mut again = encode(frame).to_vec();
    again.extend_from_slice(bytes);
    assert_eq!(admit(&again), Ok(offload));

    let mut scratch = vec![0; FRAME_LEN_MAX];
    let mut frames = 0;
    let fitted = fit(frame, caps, mtu, &mut scratch, &mut |fitted| {
        frames += 1;
        assert!(caps.take(fitted.offload));
        assert_eq!(
            fitted.bytes[..14],
            bytes[..14],
            "decided on, so never to change"
        );
        assert!(fitted.offload.gso != Gso::None || fitted.bytes.len() <= mtu + 14 + 8);
    });
    assert!(frames <= SEGMENTS_MAX);
    assert_eq!(fitted.is_ok(), frames != 0);
});
