//! The commands that only look: status, check and explain. Nothing in this folder changes the kernel.

pub mod check;
mod drift;
pub mod explain;
pub mod metrics;
pub mod packet_trace;
pub mod report;
pub mod snapshot;
pub mod status;
