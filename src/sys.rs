//! System calls that nothing safer covers. All `unsafe` of the crate is here and below.

#![allow(unsafe_code)]

pub mod signal;
