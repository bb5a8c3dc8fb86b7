//! The control plane.

pub mod lease_file;
pub mod resolver;
