//! What every call needs of its surroundings: a log, the lock, no more privileges than the tools take.

pub mod lock;
pub mod log;
pub mod output;
pub mod privilege;
