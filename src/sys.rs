//! System calls that need care: everything `unsafe` of the crate lives under this module.

pub mod inherited;
pub mod signal;
