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
