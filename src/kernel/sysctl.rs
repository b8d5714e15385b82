//! Sets kernel parameters in /proc/sys. `Root::sysctl` reads them.

use std::fs;
use std::io;

/// Sets the parameter at this path in /proc/sys.
/// Errors: the file can't be written.
pub fn write(path: &str, value: &str) -> io::Result<()> {
    fs::write(format!("/proc/sys/{path}"), value)
}

/// The path of the parameter with which an interface's reverse path filter includes the packet mark in its route lookup
/// (Documentation/networking/ip-sysctl.rst). An interface's name may hold dots, but no slash.
pub fn src_valid_mark(interface: &str) -> String {
    format!("net/ipv4/conf/{interface}/src_valid_mark")
}
