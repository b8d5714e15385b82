//! Files of the system, read below a folder in the place of `/`.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::symlink;
use std::path::Path;

use mh_hook::kernel::listeners::{Socket, listening_below};
use mh_hook::kernel::root::Root;
use mh_hook::model::forward::Protocol;

#[test]
fn symbolic_links_stay_below_the_root() {
    let folder = std::env::temp_dir().join(format!("mh-hook-root-{}", std::process::id()));
    let make = |path: &str| {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("its folder");
        path
    };
    fs::write(make("usr/lib/a.conf"), "a = 1\n").expect("a file");
    symlink("/usr/lib/a.conf", make("etc/by-root")).expect("a link");
    symlink("../../../../usr/lib", make("etc/by-parents")).expect("a link");
    symlink("/etc/passwd", make("etc/away")).expect("a link");
    symlink("circle", make("etc/circle")).expect("a link");
    let root = Root::at(&folder);
    assert_eq!(root.read("/etc/by-root").as_deref(), Some("a = 1\n"));
    let path = "/etc/by-parents/a.conf";
    assert_eq!(root.canonical(path), Some("/usr/lib/a.conf".into()));
    assert_eq!(root.list("/etc/by-parents"), [Path::new(path)]);
    for path in ["/etc/away", "/etc/circle", "/etc/none", "/usr/lib"] {
        assert_eq!(root.read(path), None, "{path}");
    }
    fs::remove_dir_all(&folder).expect("removed");
}

#[test]
#[cfg(target_endian = "little")]
fn sockets_are_read_as_proc_lists_them() {
    let folder = std::env::temp_dir().join(format!("mh-hook-listeners-{}", std::process::id()));
    fs::create_dir_all(folder.join("proc/net")).expect("a folder");
    let write = |name: &str, lines: [&str; 3]| {
        let text = format!(
            "  sl  local_address rem_address   st\n{}\n",
            lines.join("\n")
        );
        fs::write(folder.join("proc/net").join(name), text).expect("a file");
    };
    // The second is connected.
    write(
        "tcp",
        [
            "   0: 0A7100CB:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1",
            "   1: 0A7100CB:0050 00000000:0000 01 00000000:00000000 00:00000000 00000000 0 0 1",
            "   2: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1",
        ],
    );
    // `::`, `::1`, `::ffff:203.0.113.10`
    write(
        "tcp6",
        [
            "   0: 00000000000000000000000000000000:1F90 00000000000000000000000000000000:0000 0A 0",
            "   1: 00000000000000000000000001000000:1F91 00000000000000000000000000000000:0000 0A 0",
            "   2: 0000000000000000FFFF00000A7100CB:1F92 00000000000000000000000000000000:0000 0A 0",
        ],
    );
    let own = Some(Ipv4Addr::new(203, 0, 113, 10));
    let expected = [(own, 80), (None, 22), (None, 8080), (own, 8082)];
    let expected = expected.map(|(address, port)| Socket {
        protocol: Protocol::Tcp,
        address,
        port,
    });
    let root = Root::at(&folder);
    assert_eq!(listening_below(&root, Protocol::Tcp), expected);
    assert_eq!(listening_below(&root, Protocol::Udp), []);
    fs::remove_dir_all(&folder).expect("removed");
}
