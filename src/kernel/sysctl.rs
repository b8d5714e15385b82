//! Kernel parameters in /proc/sys.

use std::fs;
use std::io;

/// The value of the parameter at this path in /proc/sys. None if the kernel has no such parameter.
pub fn read(path: &str) -> Option<String> {
    let value = fs::read_to_string(format!("/proc/sys/{path}")).ok()?;
    Some(value.trim().to_owned())
}

/// Sets the parameter at this path in /proc/sys.
///
/// # Errors
/// The file can't be written.
pub fn write(path: &str, value: &str) -> io::Result<()> {
    fs::write(format!("/proc/sys/{path}"), value)
}

/// The path of the parameter with which an interface's reverse path filter includes the packet mark in its route lookup
/// (Documentation/networking/ip-sysctl.rst). An interface's name may hold dots, but no slash.
pub fn src_valid_mark(interface: &str) -> String {
    format!("net/ipv4/conf/{interface}/src_valid_mark")
}

/// The reverse path filtering in effect on an interface: 0 off, 1 strict, 2 loose. The larger one of the interface's own
/// value and that of `all` applies (Documentation/networking/ip-sysctl.rst).
pub fn rp_filter(interface: &str) -> u8 {
    let value = |name: &str| -> Option<u8> {
        read(&format!("net/ipv4/conf/{name}/rp_filter"))?
            .parse()
            .ok()
    };
    value(interface).max(value("all")).unwrap_or(0)
}
