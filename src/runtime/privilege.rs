//! Gives up, for this program and all that it runs, what a router's rules do not take.

use caps::{CapSet, Capability, CapsHashSet};
use log::debug;
use nix::sys::prctl;

use crate::kernel::tools::Backend;

/// Drops all capabilities but those that the tools need: NET_ADMIN for routing and netfilter, NET_RAW
/// for the socket by which iptables-legacy speaks to the kernel, and for it alone SYS_MODULE: it loads
/// its module itself (`xtables_load_ko`, libxtables/xtables.c). Nor can anybody behind us gain some
/// (prctl(2), `PR_SET_NO_NEW_PRIVS`).
///
/// Where that is not allowed, somebody has taken away more already.
pub fn drop_all_but_needed(backend: Backend) {
    let mut kept = CapsHashSet::from_iter([Capability::CAP_NET_ADMIN, Capability::CAP_NET_RAW]);
    if backend == Backend::Legacy {
        kept.insert(Capability::CAP_SYS_MODULE);
    }
    // The bounding set first: that takes a capability itself.
    for capability in caps::runtime::thread_all_supported() {
        if !kept.contains(&capability)
            && let Err(error) = caps::drop(None, CapSet::Bounding, capability)
        {
            debug!("{capability} stays in the bounding set: {error}");
        }
    }
    for set in [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
        let had = caps::read(None, set).unwrap_or_default();
        let left = had.intersection(&kept).copied().collect();
        if let Err(error) = caps::set(None, set, &left) {
            debug!("capabilities stay: {error}");
        }
    }
    if let Err(errno) = prctl::set_no_new_privs() {
        debug!("no_new_privs: {errno}");
    }
}
