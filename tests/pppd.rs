//! What pppd was told: its files, and the pppds that run, in a folder in the place of `/`.

use std::fs;
use std::path::Path;

use mh_hook::kernel::pppd::{dialled, options};
use mh_hook::kernel::root::Root;

#[test]
fn options_are_read_as_pppd_does() {
    let text = "# defaultroute\nplugin rp-pppoe.so\nuser \"a # b\"\nunit 0\nipparam 'isp 0'\nnodefaultroute\ndefaultroute\n";
    let found = options(text, "isp0");
    let interface = found.identity.interface.map(|name| name.to_string());
    assert_eq!(interface.as_deref(), Some("ppp0"));
    assert_eq!(found.identity.ipparam.as_deref(), Some("isp 0"));
    assert_eq!(found.identity.peer.as_deref(), Some("isp0"));
    assert!(found.default_route && found.no_default_route && !found.replaces);
    let odd = options("ipparam a\\ b\nlinkname c#d #e\n", "isp0").identity;
    assert_eq!(odd.ipparam.as_deref(), Some("a b"));
    assert_eq!(odd.linkname.as_deref(), Some("c#d"));
}

#[test]
fn the_pppds_that_run_tell_what_they_were_told() {
    let folder = std::env::temp_dir().join(format!("mh-hook-pppd-{}", std::process::id()));
    let write = |path: &str, text: &str| {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("its folder");
        fs::write(path, text).expect("a file");
    };
    write("etc/ppp/options", "linkname common\n");
    write("etc/ppp/peers/isp0", "ipparam from-file\nunit 7\n");
    write("run/ppp3.pid", "31\n");
    write("proc/31/cmdline", "/usr/sbin/pppd\0call\0isp0\0");
    write("run/ppp4.pid", "41\n");
    write("proc/41/cmdline", "pppd\0call\0isp0\0ipparam\0by-hand\0");
    // Another program has the number by now; a file of another program; a process that has ended.
    write("run/ppp5.pid", "51\n");
    write("proc/51/cmdline", "sleep\0call\0isp0\0");
    write("run/sshd.pid", "61\n");
    write("run/ppp6.pid", "71\n");
    let told = dialled(&Root::at(Path::new(&folder)));
    let shown: Vec<String> = told
        .iter()
        .map(|it| {
            let text = |value: &Option<String>| value.clone().unwrap_or_default();
            let interface = it.interface.as_ref().map(ToString::to_string);
            [
                text(&interface),
                text(&it.ipparam),
                text(&it.linkname),
                text(&it.peer),
            ]
            .join(" ")
        })
        .collect();
    assert_eq!(
        shown,
        ["ppp3 from-file common isp0", "ppp4 by-hand common isp0"]
    );
    fs::remove_dir_all(&folder).expect("removed");
}
