//! Kernel parameters below /proc/sys.

use std::fs;
use std::io;

/// The value of a parameter, by its path below /proc/sys; none where the kernel has no such parameter.
pub fn read(path: &str) -> Option<String> {
    let value = fs::read_to_string(format!("/proc/sys/{path}")).ok()?;
    Some(value.trim().to_owned())
}

/// Sets a parameter, by its path below /proc/sys.
///
/// # Errors
/// Those of writing the file.
pub fn write(path: &str, value: &str) -> io::Result<()> {
    fs::write(format!("/proc/sys/{path}"), value)
}

/// The parameter that lets an interface's reverse path filter count a packet's mark
/// (Documentation/networking/ip-sysctl.rst). An interface's name may hold dots but no slash.
pub fn src_valid_mark(interface: &str) -> String {
    format!("net/ipv4/conf/{interface}/src_valid_mark")
}

/// Reverse path filtering in force on an interface: 0 off, 1 strict, 2 loose. The larger value of the interface's own and
/// of `all` counts (Documentation/networking/ip-sysctl.rst).
pub fn rp_filter(interface: &str) -> u8 {
    let value = |name: &str| -> Option<u8> {
        read(&format!("net/ipv4/conf/{name}/rp_filter"))?
            .parse()
            .ok()
    };
    value(interface).max(value("all")).unwrap_or(0)
}
