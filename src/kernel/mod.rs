//! Reads and changes the kernel, directly or by tools. Nothing in this folder decides what to change.

pub mod conntrack;
pub mod ip;
pub mod iptables_save;
pub mod link;
pub mod listeners;
pub mod netlink;
pub mod nftables;
pub mod observe;
pub mod pppd;
pub mod probe;
pub mod process;
pub mod root;
pub mod routing;
pub mod sysctl;
pub mod tools;
