//! mh-hook: multi-homing for a router with several PPPoE links.
//!
//! The flow of data, one noun a file:
//!
//! ```text
//! pppd ─▶ event ─▶ request ─┐
//! file ─▶ config            ├─▶ claim ─▶ desired ─▶ plan ─▶ apply
//! kernel ─▶ link, observed ─┘
//! ```
//!
//! `converge` turns that wheel under the `lock` until the kernel holds what it should. `observed` has our
//! routes and rules of `fib`, which asks the kernel itself, and the rest of iptables-save. `ip` and
//! `iptables` are the languages of the tools, `command` starts them, `running` is one of them until its
//! end, `state` has the nouns.

pub mod apply;
pub mod chains;
pub mod check;
pub mod claim;
pub mod command;
pub mod config;
pub mod conntrack;
pub mod converge;
pub mod desired;
pub mod event;
pub mod explain;
pub mod fib;
pub mod ip;
pub mod iptables;
pub mod journey;
pub mod link;
pub mod lock;
pub mod log;
pub mod netlink;
pub mod observed;
pub mod packet;
pub mod plan;
pub mod privilege;
pub mod report;
pub mod request;
pub mod ruleset;
pub mod running;
pub mod socket;
pub mod stale;
pub mod state;
pub mod status;
pub mod system;
