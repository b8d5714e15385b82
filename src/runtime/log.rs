//! The log: syslog, with facility daemon and tag mh-hook. Also stderr, for errors, if it is a terminal, and if syslog
//! can't be reached.

use std::io::{ErrorKind, IsTerminal, Write, stderr};
use std::os::unix::net::UnixDatagram;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ::log::{Level, LevelFilter, Log, Metadata, Record};
use anyhow::{Context, Result};
use syslog::{Facility, LogFormat, Logger, LoggerBackend, Severity};

/// The socket of the local syslog daemon (syslog(3), `_PATH_LOG`).
const SOCKET: &str = "/dev/log";

/// The target of the messages at level info that are notices to syslog: one for each event that changed something.
pub const NOTICE: &str = "notice";

/// How long a message may wait for a syslog daemon that does not read.
const TIMEOUT: Duration = Duration::from_millis(500);

type Syslog = Logger<LoggerBackend, Format>;

struct Sinks {
    syslog: Mutex<Option<Syslog>>,
    level: LevelFilter,
    stderr: LevelFilter,
}

/// Starts logging at this level; on stderr, too, if a person asked for the level.
pub fn init(level: LevelFilter, asked: bool) {
    let syslog = connect();
    let on_stderr = asked || syslog.is_err() || stderr().is_terminal();
    let sinks = Sinks {
        stderr: if on_stderr { level } else { LevelFilter::Error },
        syslog: Mutex::new(syslog.ok()),
        level,
    };
    // Fails only if it is called twice.
    if ::log::set_boxed_logger(Box::new(sinks)).is_ok() {
        ::log::set_max_level(level);
    }
}

/// Connects to the syslog daemon. `syslog::init` would fall back to UDP silently, and its socket could block for ever.
fn connect() -> Result<Syslog> {
    let socket = UnixDatagram::unbound().context("make a socket")?;
    socket
        .set_write_timeout(Some(TIMEOUT))
        .context("set the socket's timeout")?;
    socket
        .connect(SOCKET)
        .with_context(|| format!("connect to {SOCKET}"))?;
    Ok(Logger::new(LoggerBackend::Unix(socket), Format))
}

/// `<30>mh-hook[4711]: isp0 up on ppp0 …`
///
/// Without a time: the daemon, which knows the time zone, adds it (RFC 3164, 4.3.2).
struct Format;

impl LogFormat<&str> for Format {
    fn format<W: Write>(
        &self,
        writer: &mut W,
        severity: Severity,
        message: &str,
    ) -> syslog::Result<()> {
        let priority = Facility::LOG_DAEMON as u8 | severity as u8;
        let pid = std::process::id();
        write!(writer, "<{priority}>mh-hook[{pid}]: {message}").map_err(syslog::Error::Write)
    }
}

impl Log for Sinks {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.level() <= self.level
    }

    fn log(&self, record: &Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = printable(&record.args().to_string());
        let mut syslog = self.syslog.lock().unwrap_or_else(PoisonError::into_inner);
        let write = |syslog: &mut Syslog| match record.level() {
            Level::Error => syslog.err(line.as_str()),
            Level::Warn => syslog.warning(line.as_str()),
            Level::Info if record.target() == NOTICE => syslog.notice(line.as_str()),
            Level::Info => syslog.info(line.as_str()),
            Level::Debug | Level::Trace => syslog.debug(line.as_str()),
        };
        let mut written = syslog.as_mut().map(write);
        if matches!(&written, Some(Err(error)) if !is_timeout(error)) {
            // The daemon may have been restarted.
            *syslog = connect().ok();
            written = syslog.as_mut().map(write);
        }
        let lost = !matches!(written, Some(Ok(())));
        if matches!(written, Some(Err(_))) {
            // Not tried again: each further line could wait for the whole timeout.
            *syslog = None;
        }
        if lost || record.level() <= self.stderr {
            // Not eprintln!: it panics if stderr is closed, in the middle of a change.
            let _ = writeln!(stderr(), "mh-hook: {line}");
        }
    }

    fn flush(&self) {}
}

/// Whether the daemon did not read in time.
fn is_timeout(error: &syslog::Error) -> bool {
    matches!(error, syslog::Error::Write(error) if error.kind() == ErrorKind::WouldBlock)
}

/// The text with its control characters escaped: the name of a peer or an interface must not add log lines, nor move a
/// terminal's cursor.
pub fn printable(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}
