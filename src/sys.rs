//! System calls that no safe crate covers. All `unsafe` of lanlet is in here, each block with the
//! reasons why it is sound; what leaves these modules is safe to use.

pub mod mmsg;
pub mod socket;
