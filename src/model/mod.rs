//! The nouns of the program. Nothing in this folder does I/O.

pub mod forward;
pub mod link;
pub mod names;
pub mod nearest;
pub mod netfilter;
pub mod route;
pub mod state;
