//! A batch of a guest's frames, joined and cut again.
//!
//! Input: frames with their virtio-net headers, each behind a byte of length; the top bit asks for the
//! frame before once more, with the bytes of this one over its end, so that runs are found soon.
#![no_main]

use lanlet::frame::{BATCH_FRAMES_MAX, Batch, FRAME_LEN_MAX};
use lanlet::offload::{Caps, Gso, VNET_HEADER_LEN, admit, coalesce, encode, fit};
use libfuzzer_sys::fuzz_target;

const ALL: Caps = Caps {
    csum: true,
    tso: true,
    uso: true,
};

fuzz_target!(|input: &[u8]| {
    let mut batch = Batch::new();
    let (mut rest, mut raw) = (input, Vec::new());
    let (mut frames, mut segments) = (0, 0);
    let mut scratch = vec![0; FRAME_LEN_MAX];
    while let [len, tail @ ..] = rest {
        let (part, tail) = tail.split_at(usize::from(len & 0x7f).min(tail.len()));
        rest = tail;
        match len & 0x80 != 0 && part.len() <= raw.len() {
            true => {
                let at = raw.len() - part.len();
                raw[at..].copy_from_slice(part);
            }
            false => raw = part.to_vec(),
        }
        let Ok(offload) = admit(&raw) else { continue };
        let Some(buffer) = batch.next_buffer() else {
            break;
        };
        buffer[..raw.len()].copy_from_slice(&raw);
        batch.commit(VNET_HEADER_LEN..raw.len(), offload);
        frames += 1;
        segments += segments_of(&batch, frames - 1, &mut scratch);
    }
    assert!(frames <= BATCH_FRAMES_MAX);
    let fewer = coalesce(&mut batch, |_| ALL);
    assert_eq!(batch.len() + fewer, frames);
    let mut again = 0;
    for (n, frame) in batch.frames().enumerate() {
        let mut raw = encode(frame).to_vec();
        raw.extend_from_slice(frame.bytes);
        assert_eq!(admit(&raw), Ok(frame.offload));
        again += segments_of(&batch, n, &mut scratch);
    }
    assert_eq!(again, segments);
});

/// Into how many frames the `n`th is cut for a port that can do nothing.
fn segments_of(batch: &Batch, n: usize, scratch: &mut [u8]) -> usize {
    let frame = batch.frames().nth(n).unwrap();
    let mut segments = 0;
    let cut = fit(frame, Caps::default(), 65_535, scratch, &mut |_| {
        segments += 1
    });
    assert!(cut.is_ok() || frame.offload.gso == Gso::None);
    segments
}
