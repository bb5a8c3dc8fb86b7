//! Plain loops that pieces of the hot path are divided by.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::hint::black_box;

use super::Work;

/// A loop, and what it is called.
pub(super) struct Reference {
    pub(super) name: &'static str,
    pub(super) work: Work,
}

/// Looks two of so many keys up in the standard library's hash table: what a decision by tables is like.
pub(super) fn look_ups(keys: u32) -> Reference {
    let pairs = (0..keys).map(|key| (key.wrapping_mul(0x9e37_79b9), key));
    let table: HashMap<u32, u32, BuildHasherDefault<DefaultHasher>> = pairs.collect();
    let mut key = 0;
    let mut next = move || {
        key = (key + 7_919) % keys;
        *black_box(&table)
            .get(&black_box(key.wrapping_mul(0x9e37_79b9)))
            .expect("every key is there")
    };
    Reference {
        name: "look-ups",
        work: Box::new(move |count| {
            for _ in 0..count {
                black_box((next(), next()));
            }
        }),
    }
}

/// Copies memory: what everything is like that moves frames.
pub(super) fn copy(bytes: usize) -> Reference {
    let (from, mut to) = (vec![0x5a_u8; bytes], vec![0; bytes]);
    Reference {
        name: "copy",
        work: Box::new(move |count| {
            for _ in 0..count {
                to.copy_from_slice(black_box(&from));
                black_box(&mut to);
            }
        }),
    }
}

/// Adds up memory: what a checksum is like. A copy of so little goes at two speeds, by where it lies.
pub(super) fn sum(bytes: usize) -> Reference {
    let bytes = vec![0x5a_u8; bytes];
    Reference {
        name: "sum",
        work: Box::new(move |count| {
            for _ in 0..count {
                let pairs = black_box(&bytes).chunks_exact(2);
                let numbers = pairs.map(|pair| u64::from(u16::from_ne_bytes([pair[0], pair[1]])));
                black_box(numbers.sum::<u64>());
            }
        }),
    }
}
