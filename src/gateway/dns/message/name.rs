//! A domain name of a message, decompressed and in lower case (RFC 1035 3.1, 4.1.4).
//!
//! A name never allocates, and never takes longer than its limits say: a pointer leads strictly
//! towards the message's start, at most [`JUMPS_MAX`] are followed, and what they give together has
//! the length of a name at most.

use std::fmt::{self, Write as _};
use std::hash::{Hash, Hasher};

use super::{HEADER_LEN, LABEL_LEN_MAX, NAME_LEN_MAX};
use crate::wire::be16;

/// Two bits set: the byte begins a compression pointer (RFC 1035 4.1.4).
const POINTER: u8 = 0xc0;
/// Pointers followed within one name. A name has 127 labels at most, and a pointer that does not
/// stand behind a label saves nothing.
const JUMPS_MAX: usize = 127;

/// A domain name. Equal without regard to case (RFC 4343): ASCII letters are kept in lower case.
///
/// It is shown as RFC 1035 5.1 writes it, without the final dot: `www.example.org`, `.` for the root.
/// A dot or backslash inside a label is shown with a backslash before it and what is not printable as
/// `\DDD`, so two names never look alike.
#[derive(Clone, Copy)]
pub struct Name {
    wire: [u8; NAME_LEN_MAX],
    len: u8,
}

impl Name {
    /// The name at `at` and where it ends there; `None` if it is none.
    pub(super) fn parse(message: &[u8], at: usize) -> Option<(Self, usize)> {
        let mut name = Self {
            wire: [0; NAME_LEN_MAX],
            len: 0,
        };
        let mut at = at;
        // Where the run of labels that is being read started: a pointer leads before it.
        let mut run = at;
        let mut end = None;
        let mut jumps = 0;
        loop {
            match *message.get(at)? {
                0 => {
                    name.push(&[0])?;
                    return Some((name, end.unwrap_or(at + 1)));
                }
                len @ 1..=LABEL_LEN_MAX => {
                    let next = at + 1 + usize::from(len);
                    name.push(message.get(at..next)?)?;
                    at = next;
                }
                POINTER.. => {
                    let pointer = message.get(at..at + 2)?;
                    let target = usize::from(be16(pointer, 0) & 0x3fff);
                    jumps += 1;
                    if target >= run || target < HEADER_LEN || jumps > JUMPS_MAX {
                        return None;
                    }
                    end = end.or(Some(at + 2));
                    (at, run) = (target, target);
                }
                _ => return None,
            }
        }
    }

    /// Appends a label with its length byte; that one is below `A` and has no lower case.
    fn push(&mut self, label: &[u8]) -> Option<()> {
        let len = usize::from(self.len);
        let place = self.wire.get_mut(len..len + label.len())?;
        place.copy_from_slice(label);
        place.make_ascii_lowercase();
        self.len += label.len() as u8;
        Some(())
    }

    /// As on the wire: labels with their lengths, the root's 0 last.
    pub fn wire(&self) -> &[u8] {
        &self.wire[..usize::from(self.len)]
    }

    /// The labels from the left, without the root's.
    pub fn labels(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = self.wire();
        std::iter::from_fn(move || {
            let (&len, behind) = rest.split_first()?;
            let (label, behind) = behind.split_at(usize::from(len));
            rest = behind;
            (len != 0).then_some(label)
        })
    }
}

impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        self.wire() == other.wire()
    }
}

impl Eq for Name {}

impl Hash for Name {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.wire().hash(state);
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for label in self.labels() {
            if !first {
                f.write_char('.')?;
            }
            first = false;
            for &byte in label {
                match byte {
                    b'.' | b'\\' => write!(f, "\\{}", byte as char)?,
                    b'!'..=b'~' => f.write_char(byte as char)?,
                    _ => write!(f, "\\{byte:03}")?,
                }
            }
        }
        if first { f.write_char('.') } else { Ok(()) }
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
