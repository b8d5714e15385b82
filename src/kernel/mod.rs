//! What the kernel and the tools say and do. Nothing in this folder decides.

pub mod conntrack;
pub mod ip;
pub mod iptables_save;
pub mod link;
pub mod listeners;
pub mod netlink;
pub mod observe;
pub mod process;
pub mod root;
pub mod routing;
pub mod sysctl;
pub mod tools;
