//! Those who only look: status, check and explain. Nothing in this folder changes anything.

pub mod check;
pub mod explain;
pub mod packet_trace;
pub mod report;
pub mod snapshot;
pub mod status;
