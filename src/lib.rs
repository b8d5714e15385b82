//! mh-hook: multi-homing for a router with several links.
//!
//! ```text
//! model ◀─ config, kernel ◀─ reconcile ◀─ inspect ◀─ main
//! ```
//!
//! `model` has the types of routes, rules, links and forwards; `config` reads the configuration; `kernel` reads and
//! changes the kernel. `reconcile` brings the kernel to the desired state. `inspect` changes nothing: status, check,
//! explain. `runtime` has the log, the lock and the privileges. See docs/architecture.md.

pub mod config;
pub mod inspect;
pub mod kernel;
pub mod model;
pub mod reconcile;
pub mod runtime;
