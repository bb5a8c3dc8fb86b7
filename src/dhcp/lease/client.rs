//! Who a lease belongs to: hardware address and client identifier together.

use crate::frame::{Mac, PortId};
use crate::names::GuestName;

/// Longest client identifier that is kept: what one option holds (RFC 2132 9.14).
pub const CLIENT_ID_LEN_MAX: usize = 255;

/// Who asks for an address.
#[derive(Clone, Copy, Debug)]
pub struct Client<'a> {
    /// Hardware address.
    pub mac: Mac,
    /// Client identifier (option 61), type byte included.
    pub id: Option<&'a [u8]>,
    /// Port the client is behind.
    pub port: PortId,
    /// Name the client gave itself (option 12).
    pub hostname: Option<&'a GuestName>,
}

/// A client as the table knows it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct ClientKey {
    pub(super) mac: Mac,
    pub(super) id: Option<Box<[u8]>>,
}

impl ClientKey {
    /// The identifier that is just the MAC is none.
    pub(super) fn new(mac: Mac, id: Option<&[u8]>) -> Self {
        let id = id.filter(|id| !matches!(id, [1, rest @ ..] if rest == mac.0));
        Self {
            mac,
            id: id.map(Box::from),
        }
    }

    /// Which address of the pool to try first: FNV-1a, fixed for ever, so that a guest's address
    /// survives a lost lease file.
    pub(super) fn hash(&self) -> u64 {
        let bytes = self.mac.0.iter().chain(self.id.iter().flatten());
        let mixed = bytes.fold(0xcbf2_9ce4_8422_2325u64, |hash, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        // FNV's low bits hardly depend on the first bytes.
        mixed ^ (mixed >> 32)
    }
}
