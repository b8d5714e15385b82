//! mh-hook: multi-homing for a router with several links. docs/architecture.md says what is where.

pub mod config;
pub mod inspect;
pub mod kernel;
pub mod model;
pub mod reconcile;
pub mod runtime;
