//! The compiled binary where it needs no kernel: exit status, environment, arguments, configuration
//! files that are refused. What it does to a kernel is for tests/netns.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn mh_hook() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mh-hook"));
    command.env_clear();
    command
}

/// A folder of the test's own, root's and writable by nobody else.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("mh-hook-{test}-{}", std::process::id()));
        fs::create_dir(&path).expect("make a folder");
        fs::set_permissions(&path, Permissions::from_mode(0o755)).expect("chmod");
        Self(path)
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, text).expect("write a file");
        fs::set_permissions(&path, Permissions::from_mode(0o644)).expect("chmod");
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[track_caller]
fn expect(output: &Output, status: i32, words: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{stderr}");
    for word in words {
        assert!(stderr.contains(word), "{word:?} is not in: {stderr}");
    }
    assert!(
        output.stdout.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
}

#[test]
fn help_names_every_command_and_option() {
    let output = mh_hook().arg("--help").output().expect("run");
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    for word in [
        "up [IFNAME|UPLINK]",
        "down [IFNAME|UPLINK]",
        "sync",
        "event pre-up|up|down",
        "--uplink NAME",
        "--config FILE",
        "--dry-run",
        "--local ADDR",
        "-v, --verbose",
        "-q, --quiet",
        "-h, --help",
        "-V, --version",
    ] {
        assert!(text.contains(word), "{word}");
    }
    assert!(
        text.lines().all(|line| line.len() <= 80),
        "a line is longer than a terminal"
    );
}

#[test]
fn version_is_the_packages() {
    let output = mh_hook().arg("-V").output().expect("run");
    assert_eq!(
        output.stdout,
        concat!("mh-hook ", env!("CARGO_PKG_VERSION"), "\n").as_bytes()
    );
}

#[test]
fn bad_usage_is_said_with_status_2() {
    let cases: [(&[&str], &str); 11] = [
        (&[], "no command"),
        (&["upp"], "unknown command \"upp\""),
        (&["up", "ppp0", "ppp1"], "unexpected argument \"ppp1\""),
        (&["sync", "ppp0"], "unexpected argument \"ppp0\""),
        (&["--frob"], "--frob"),
        (
            &["down", "ppp0", "--local", "192.0.2.1"],
            "--local and --uplink go with up",
        ),
        (&["event"], "event what?"),
        (&["event", "sideways", "ppp0"], "sideways"),
        (&["up"], "IFNAME"),
        (
            &["up", "--local", "192.0.2", "ppp0"],
            "\"192.0.2\" is not an IPv4 address",
        ),
        (
            &["up", "--", "--help"],
            "\"--help\" is not an interface name",
        ),
    ];
    for (args, words) in cases {
        expect(&mh_hook().args(args).output().expect("run"), 2, &[words]);
    }
}

#[test]
fn hostile_environment_is_refused() {
    let long = "9".repeat(1 << 16);
    let cases: [(&[&str], &str, &str, &str); 6] = [
        (
            &["up"],
            "IFNAME",
            "ppp0; reboot",
            "is not an interface name",
        ),
        (&["down"], "IFNAME", "../../etc", "is not an interface name"),
        (
            &["up", "ppp0"],
            "IPLOCAL",
            "192.0.2.1 or so",
            "is not an IPv4 address",
        ),
        (&["up", "ppp0"], "IPLOCAL", &long, "is not an IPv4 address"),
        (
            &["event", "up", "ppp0"],
            "IPLOCAL",
            "1.2.3.4\n",
            "is not an IPv4 address",
        ),
        (
            &["event", "up"],
            "IFNAME",
            "\u{1b}[2J",
            "is not an interface name",
        ),
    ];
    for (args, name, value, words) in cases {
        let output = mh_hook().args(args).env(name, value).output().expect("run");
        expect(&output, 2, &[words]);
        assert!(
            output.stderr.len() < 1000,
            "it repeats all that it is given"
        );
        assert!(
            !output.stderr.contains(&0x1b),
            "a control character reaches the terminal"
        );
    }
}

#[test]
fn a_configuration_is_refused_with_every_error_and_its_place() {
    let folder = Folder::new("errors");
    let path = folder.file(
        "mh-hook.toml",
        "[uplink.isp0]\ntabel = 10\nmasquerade = 1\n",
    );
    let output = mh_hook()
        .arg("--config")
        .arg(&path)
        .args(["up", "ppp0"])
        .output()
        .expect("run");
    expect(
        &output,
        2,
        &[
            "mh-hook.toml:2:1: unknown key \"tabel\"",
            "mh-hook.toml:3:14: masquerade is true or false",
        ],
    );
}

#[test]
fn a_configuration_that_others_could_have_written_is_refused() {
    let folder = Folder::new("trust");
    let run = |path: &Path| {
        mh_hook()
            .arg("--config")
            .arg(path)
            .arg("sync")
            .output()
            .expect("run")
    };

    expect(
        &run(&folder.0.join("none.toml")),
        2,
        &["none.toml", "there is no such file"],
    );
    expect(
        &run(&folder.0.join("no/folder.toml")),
        2,
        &["open folder", "No such file"],
    );
    fs::create_dir(folder.0.join("a.toml")).expect("make a folder");
    expect(
        &run(&folder.0.join("a.toml")),
        2,
        &["is not a regular file"],
    );

    let fifo = folder.0.join("fifo.toml");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o644)).expect("mkfifo");
    expect(&run(&fifo), 2, &["is not a regular file"]);

    let path = folder.file("others.toml", "");
    symlink(&path, folder.0.join("link.toml")).expect("symlink");
    expect(
        &run(&folder.0.join("link.toml")),
        2,
        &["is a symbolic link"],
    );
    fs::set_permissions(&path, Permissions::from_mode(0o664)).expect("chmod");
    expect(
        &run(&path),
        2,
        &["can be written by others than root (mode 664)"],
    );
    fs::set_permissions(&path, Permissions::from_mode(0o646)).expect("chmod");
    expect(&run(&path), 2, &["(mode 646)"]);
    fs::set_permissions(&path, Permissions::from_mode(0o644)).expect("chmod");
    chown(&path, Some(65534), None).expect("these tests are run as root");
    expect(&run(&path), 2, &["belongs to user 65534"]);
    chown(&path, Some(0), None).expect("chown");
    fs::set_permissions(&folder.0, Permissions::from_mode(0o777)).expect("chmod");
    expect(
        &run(&path),
        2,
        &["folder", "can be written by others than root"],
    );
    fs::set_permissions(&folder.0, Permissions::from_mode(0o755)).expect("chmod");

    let large = folder.file("large.toml", &"#\n".repeat(3 << 20));
    expect(&run(&large), 2, &["is larger than"]);
    fs::write(folder.0.join("latin.toml"), b"[lan]\n# \xe9\n").expect("write a file");
    expect(
        &run(&folder.0.join("latin.toml")),
        2,
        &["line 2, column 3: is not UTF-8"],
    );
}

#[test]
fn it_knows_by_the_folder_what_pppd_calls() {
    let folder = Folder::new("folder");
    for (name, words) in [
        ("ip-pre-up.d", "is not an IPv4 address"),
        ("ip-up.d", "is not an IPv4 address"),
        ("ip-down.d", "is not an interface name"),
    ] {
        fs::create_dir(folder.0.join(name)).expect("make a folder");
        let link = folder.0.join(name).join("0mh-hook");
        symlink(env!("CARGO_BIN_EXE_mh-hook"), &link).expect("symlink");
        // Whatever the arguments look like, they are pppd's.
        let first = if name == "ip-down.d" {
            "--help"
        } else {
            "ppp0"
        };
        let output = Command::new(&link)
            .env_clear()
            .args([first, "", "", "--local", "", "--version"])
            .output();
        expect(&output.expect("run"), 2, &[words]);
    }
}

#[test]
fn each_command_has_a_help_of_its_own_and_typing_errors_a_hint() {
    for command in [
        "up", "down", "sync", "event", "status", "check", "explain", "help",
    ] {
        for arguments in [&["help", command][..], &[command, "--help"]] {
            let output = mh_hook().args(arguments).output().expect("it runs");
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "{arguments:?}");
            let usage = match command {
                "help" => "Usage: mh-hook [OPTIONS] COMMAND".to_owned(),
                command => format!("Usage: mh-hook [OPTIONS] {command}"),
            };
            assert!(text.contains(&usage), "{arguments:?}: {text}");
            let is_narrow = |line: &str| line.chars().count() <= 80;
            assert!(text.lines().all(is_narrow), "{arguments:?}");
        }
    }
    for (arguments, hint) in [
        (
            &["stauts"][..],
            "unknown command \"stauts\": did you mean status?",
        ),
        (&["help", "exlpain"], "did you mean explain?"),
        (
            &["--dryrun", "sync"],
            "unknown option --dryrun: did you mean --dry-run?",
        ),
        (&["--conifg", "x", "sync"], "did you mean --config?"),
        (
            &["restart"],
            "unknown command \"restart\"; see mh-hook --help",
        ),
        (
            &["--frobnicate"],
            "unknown option --frobnicate; see mh-hook --help",
        ),
    ] {
        let output = mh_hook().args(arguments).output().expect("it runs");
        expect(&output, 2, &[hint]);
    }
}

#[test]
fn a_mistake_is_shown_with_its_line_and_told_in_one() {
    let folder = Folder::new("snippet");
    let text = "[lan]\ninterfaces = [\"eth1\"]\nnetworks = [\"192.168.0.0/24\"]\n\n[uplink.isp0]\ninterfce = \"ppp0\"\n";
    let config = folder.file("mistake.toml", text);
    let output = mh_hook()
        .args(["sync", "--config"])
        .arg(&config)
        .output()
        .expect("it runs");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    expect(&output, 2, &[]);
    let expected = format!(
        "mh-hook: {}:6:1: unknown key \"interfce\" in [uplink]; did you mean interface?\n    6 | interfce = \"ppp0\"\n      | ^^^^^^^^\n",
        config.display()
    );
    assert_eq!(stderr, expected);
}
