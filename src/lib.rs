//! mh-hook: multi-homing for a router with several links.
//!
//! ```text
//! model ◀─ config, kernel ◀─ reconcile ◀─ inspect ◀─ main
//! ```
//!
//! `model` has the nouns, `config` what is asked for, `kernel` what is there. `reconcile` brings the kernel to what is
//! asked for; `inspect` only looks: status, check, explain. `runtime` has the log, the lock and the privileges.
//! docs/architecture.md draws it on one page.

pub mod config;
pub mod inspect;
pub mod kernel;
pub mod model;
pub mod reconcile;
pub mod runtime;
