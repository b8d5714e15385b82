//! Drops the privileges that neither this program nor its tools need.

use caps::{CapSet, Capability, CapsHashSet};
use log::debug;
use nix::sys::prctl;

use crate::kernel::tools::Backend;

/// Drops all capabilities but those that the tools need: NET_ADMIN for routing and netfilter, NET_RAW for the socket with
/// which iptables-legacy changes rules, and SYS_MODULE for iptables-legacy only, which loads its kernel module itself
/// (`xtables_load_ko`, libxtables/xtables.c). No tool can gain others (prctl(2), `PR_SET_NO_NEW_PRIVS`).
///
/// A failure is only logged: then whoever started us has dropped more already.
/// `backend` is None while it is not known: then what either needs is kept.
pub fn drop_all_but_needed(backend: Option<Backend>) {
    let mut kept = CapsHashSet::from_iter([Capability::CAP_NET_ADMIN, Capability::CAP_NET_RAW]);
    if backend != Some(Backend::Nft) {
        kept.insert(Capability::CAP_SYS_MODULE);
    }
    // The bounding set first: changing it needs CAP_SETPCAP.
    for capability in caps::runtime::thread_all_supported() {
        if !kept.contains(&capability)
            && let Err(error) = caps::drop(None, CapSet::Bounding, capability)
        {
            debug!("can't drop {capability} from the bounding set: {error}");
        }
    }
    for set in [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
        let before = caps::read(None, set).unwrap_or_default();
        let after = before.intersection(&kept).copied().collect();
        if let Err(error) = caps::set(None, set, &after) {
            debug!("can't drop capabilities: {error}");
        }
    }
    if let Err(errno) = prctl::set_no_new_privs() {
        debug!("no_new_privs: {errno}");
    }
}
