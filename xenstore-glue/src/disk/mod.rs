//! The `xl` disk syntax, xl-disk-configuration(5), and what a target means to our backend.
//!
//! [`DiskSpec`] is an entry in a guest's configuration. libxl turns it into nodes, one of which,
//! `params`, our backend reads as a [`Target`].

mod size;
mod spec;
mod target;

pub use size::{SizeError, format_size, parse_size};
pub use spec::{BackendType, DiskSpec, Format, ParseError, Problem, Specification};
pub use target::{Faulty, Store, Target, TargetError, Wrapper};

#[cfg(test)]
mod tests;
