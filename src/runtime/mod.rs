//! What each call needs around it: the log, the lock, standard output, and no more privileges than the tools need.

pub mod lock;
pub mod log;
pub mod output;
pub mod privilege;
