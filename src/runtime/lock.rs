//! The lock that lets one call at a time change the kernel: several pppds can run their hooks at the same time.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, Flock, FlockArg, OFlag, fcntl};

const PATH: &str = "/run/mh-hook.lock";

/// The held lock. Tools inherit its file descriptor: if we are killed, the next call waits until our tool has exited, too
/// (flock(2)).
#[derive(Debug)]
pub struct Lock(#[allow(dead_code)] Flock<File>);

impl Lock {
    /// Waits for the lock until the deadline.
    ///
    /// # Errors
    /// The file can't be opened, or another call holds the lock until the deadline.
    pub fn take(deadline: Instant) -> Result<Self> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .mode(0o600)
            .custom_flags(OFlag::O_NOFOLLOW.bits())
            .open(PATH)
            .with_context(|| format!("open the lock {PATH}"))?;
        fcntl(&file, FcntlArg::F_SETFD(FdFlag::empty()))
            .context("let the tools inherit the lock")?;
        let mut pause = Duration::from_millis(1);
        loop {
            file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(Self(lock)),
                Err((file, Errno::EWOULDBLOCK | Errno::EINTR)) => file,
                Err((_, errno)) => bail!("lock {PATH}: {errno}"),
            };
            if Instant::now() >= deadline {
                bail!(
                    "another mh-hook, or a tool that it started, holds {PATH}: see who with fuser {PATH}"
                );
            }
            sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }
}
