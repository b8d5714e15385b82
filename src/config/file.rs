//! Reads the configuration file, if only root can have written it.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, SFlag, fstat};

use super::error::place;

/// The largest configuration that is read, in bytes: 10,000 forwards take less than one MiB.
const MAX_SIZE: usize = 2 << 20;

/// The file's text, if only root can have written it: it decides what root runs. The file and its folder are checked on
/// the open descriptors, so that neither can be replaced between check and use.
/// Errors: it can't be read, or another user than root can have written it.
pub fn read(path: &Path) -> Result<String> {
    let name = path.file_name().context("is not a file's name")?;
    let dir_path = path
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let dir = open(dir_path, flags | OFlag::O_DIRECTORY, Mode::empty())
        .with_context(|| format!("open folder {}", dir_path.display()))?;
    check_trusted(&dir, SFlag::S_IFDIR)
        .with_context(|| format!("folder {}", dir_path.display()))?;
    // O_NONBLOCK: opening a fifo must not wait for a writer.
    let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = openat(&dir, name, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::ENOENT => anyhow!("there is no such file; write one, see mh-hook.toml(5)"),
        Errno::ELOOP => anyhow!("is a symbolic link; give the file itself"),
        _ => anyhow!(errno).context("open"),
    })?;
    check_trusted(&file, SFlag::S_IFREG)?;
    let mut bytes = Vec::new();
    File::from(file)
        .take(MAX_SIZE as u64 + 1)
        .read_to_end(&mut bytes)
        .context("read")?;
    ensure!(bytes.len() <= MAX_SIZE, "is larger than {MAX_SIZE} bytes");
    ensure!(
        !bytes.starts_with(&[0xff, 0xfe]) && !bytes.starts_with(&[0xfe, 0xff]),
        "is UTF-16: save the file as UTF-8"
    );
    let text = String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        let before = String::from_utf8_lossy(&error.as_bytes()[..valid]);
        let (line, column) = place(&before, valid);
        anyhow!(
            "line {line}, column {column}: is not UTF-8 but perhaps Shift_JIS, EUC-JP or Latin-1: save the file as UTF-8"
        )
    })?;
    // Some editors begin a file with a byte order mark.
    Ok(match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_owned(),
        None => text,
    })
}

/// Fails unless the open file is of this kind, root's, and writable by nobody else.
fn check_trusted(fd: impl AsFd, kind: SFlag) -> Result<()> {
    let stat = fstat(fd).context("fstat")?;
    let found = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    ensure!(found == kind, "is not a regular file");
    // Others may need a folder as it is.
    let cure = |command| match kind {
        SFlag::S_IFDIR => "put the file into /etc",
        _ => command,
    };
    ensure!(
        stat.st_uid == 0,
        "belongs to user {}, not to root: {}",
        stat.st_uid,
        cure("chown root it")
    );
    ensure!(
        stat.st_mode & 0o022 == 0,
        "can be written by others than root (mode {:o}): {}",
        stat.st_mode & 0o7777,
        cure("chmod go-w it")
    );
    Ok(())
}
