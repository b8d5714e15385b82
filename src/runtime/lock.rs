//! The lock that lets one call at a time change the kernel: several pppds can run their hooks at the same time. Who can't
//! have it in time leaves word, and whoever gives it back sees to that.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use log::{info, warn};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, Flock, FlockArg, OFlag, fcntl};
use nix::sys::stat::{major, minor};
use nix::unistd::geteuid;

const PATH: &str = "/run/mh-hook.lock";

/// After how long a call that waits for the lock says so.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where a call leaves word that it could not have the lock.
const WORD: &str = "/run/mh-hook.again";

/// Folders to lock in the file's place where it can't be made: a folder can be locked, too (flock(2)), even in a file system
/// that is read-only.
const FOLDERS: [&str; 2] = ["/run", "/"];

/// The held lock. Tools inherit its file descriptor: if we are killed, the next call waits until our tool has exited, too
/// (flock(2)).
#[derive(Debug)]
pub struct Lock(#[allow(dead_code)] Flock<File>);

impl Lock {
    /// Waits for the lock until the deadline.
    /// Errors: it can't be locked, or another call holds it until the deadline.
    pub fn take(deadline: Instant) -> Result<Self> {
        let mut pause = Duration::from_millis(1);
        let mut told = Some(Instant::now() + PATIENCE);
        loop {
            if let Some(lock) = Self::try_take()? {
                return Ok(lock);
            }
            if told.is_some_and(|told| Instant::now() >= told) {
                told = None;
                info!("waiting for {}", holder());
            }
            if Instant::now() >= deadline {
                // Then the holder may have ended meanwhile, and not have seen it.
                leave_word();
                if let Some(lock) = Self::try_take()? {
                    return Ok(lock);
                }
                bail!(
                    "waited in vain for {}: see who with fuser {PATH}; it will look at all links when it ends",
                    holder()
                );
            }
            sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }

    /// None if another call holds it.
    fn try_take() -> Result<Option<Self>> {
        let (file, path, refused) = open()?;
        fcntl(&file, FcntlArg::F_SETFD(FdFlag::empty()))
            .context("let the tools inherit the lock")?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            // Deleted meanwhile, it would keep nobody out who opens a new one.
            Ok(lock) if is_at(&lock, path) => {
                if let Some(error) = refused {
                    warn!(
                        "can't open the lock {PATH} ({error}): the folder {path} is locked instead"
                    );
                }
                Ok(Some(Self(lock)))
            }
            Ok(_) | Err((_, Errno::EWOULDBLOCK | Errno::EINTR)) => Ok(None),
            Err((_, errno)) => Err(anyhow!(errno)).with_context(|| format!("lock {path}")),
        }
    }
}

/// Who holds the lock, for a person: `the lock /run/mh-hook.lock, which PID 4711 (mh-hook) holds`.
fn holder() -> String {
    let file = fs::metadata(PATH).ok();
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let pid = file.and_then(|file| {
        let (major, minor) = (major(file.dev()), minor(file.dev()));
        let place = format!("{major:02x}:{minor:02x}:{}", file.ino());
        // `1: FLOCK  ADVISORY  WRITE 4711 00:1b:1234 0 EOF`: who waits is marked by `->` (proc_locks(5)).
        let lines = locks
            .lines()
            .map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
        let mut held = lines.filter(|words| words.get(1) == Some(&"FLOCK"));
        held.find_map(|words| (words.get(5) == Some(&&place[..])).then(|| words[4].to_owned()))
    });
    let name = |pid: &str| fs::read_to_string(format!("/proc/{pid}/comm")).ok();
    match pid.and_then(|pid| Some((name(&pid)?, pid))) {
        Some((name, pid)) => format!("the lock {PATH}, which PID {pid} ({}) holds", name.trim()),
        None => format!("the lock {PATH}, which another mh-hook, or a tool that it started, holds"),
    }
}

/// Opens what is to be locked: the file, its path, and for a folder why the lock file itself could not be opened.
fn open() -> Result<(File, &'static str, Option<io::Error>)> {
    let file = || {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).mode(0o600);
        options.custom_flags(OFlag::O_NOFOLLOW.bits()).open(PATH)
    };
    let is_ours = |file: &File| {
        let metadata = file.metadata();
        metadata.is_ok_and(|it| it.uid() == geteuid().as_raw() && it.mode() & 0o077 == 0)
    };
    let opened = match file() {
        // One that others may open can be held by them for ever.
        Ok(found) if !is_ours(&found) => fs::remove_file(PATH).and_then(|()| file()),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            fs::remove_file(PATH).and_then(|()| file())
        }
        opened => opened,
    };
    let error = match opened {
        Ok(file) => return Ok((file, PATH, None)),
        Err(error) => error,
    };
    for folder in FOLDERS {
        if let Ok(file) = File::open(folder) {
            return Ok((file, folder, Some(error)));
        }
    }
    Err(error).with_context(|| format!("open the lock {PATH}"))
}

/// Whether this is the file at that path.
fn is_at(file: &File, path: &str) -> bool {
    let both = file.metadata().ok().zip(fs::metadata(path).ok());
    both.is_some_and(|(held, there)| (held.dev(), held.ino()) == (there.dev(), there.ino()))
}

fn leave_word() {
    if let Err(error) = File::create(WORD) {
        warn!("can't leave word in {WORD}: {error}");
    }
}

/// Whether a call has left word that it could not have the lock.
pub fn is_word_left() -> bool {
    Path::new(WORD).exists()
}

/// Takes the word away: for a call that looks at all links, once it has the lock.
pub fn take_word() {
    // Fails where there is none.
    let _ = fs::remove_file(WORD);
}
