//! A tool that runs: its input, what it prints, its end, all within its time. Knows not which tool it is.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::iter;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// How long one tool may take.
pub const LIMIT: Duration = Duration::from_secs(10);

/// How much a tool prints ahead, and we write ahead, in bytes: as much as anybody may have
/// (`/proc/sys/fs/pipe-max-size`, pipe(7)).
const PIPE: i32 = 1 << 20;

/// How long what a tool prints may stay in its pipe.
const PAUSE: Duration = Duration::from_millis(2);

/// How many bytes a pipe takes at once or not at all (pipe(7)).
const PIPE_BUF: usize = 4096;

/// How many bytes of a listing are read at once.
const PIECE: usize = 1 << 16;

/// The most that a tool may print, in bytes: 10,000 rules are 1 MiB.
const MAX_OUTPUT: usize = 64 << 20;

/// What a tool that ran to its end said.
#[derive(Debug)]
pub struct Output {
    /// Its name and arguments.
    pub name: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Its answer.
    pub stdout: String,
    /// Its complaints.
    pub stderr: String,
}

impl Output {
    /// The same; a failure is an error.
    ///
    /// # Errors
    /// It has failed.
    pub fn success(self) -> Result<Self> {
        ensure!(self.status.success(), "{}: {}", self.name, self.failure());
        Ok(self)
    }

    /// How it failed, and its own words on one line.
    pub fn failure(&self) -> String {
        let words: Vec<&str> = self
            .stderr
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .collect();
        format!(
            "{}: {}",
            self.ending(),
            if words.is_empty() {
                "it said nothing".into()
            } else {
                words.join("; ")
            }
        )
    }

    /// How it ended.
    pub fn ending(&self) -> String {
        match (self.status.code(), self.status.signal()) {
            (Some(code), _) => format!("exit status {code}"),
            (None, Some(signal)) => format!("killed by signal {signal}"),
            (None, None) => "ended".into(),
        }
    }
}

/// A tool that runs. Where nobody has waited for its end, or in vain, it is stopped with all that it started.
pub struct Process<'a> {
    name: String,
    child: Child,
    /// What it is still to read: what has been begun, and the pieces to come.
    left: String,
    pieces: Box<dyn Iterator<Item = String> + 'a>,
    deadline: Instant,
    until: Instant,
    /// Its complaints so far.
    stderr: Vec<u8>,
    /// How much it has printed and complained, in bytes.
    length: usize,
    /// Whether there may be more to read already.
    has_more: bool,
    has_ended: bool,
}

impl<'a> Process<'a> {
    /// Starts this command, which must end by the deadline.
    ///
    /// # Errors
    /// It can't be run.
    pub fn start(name: String, command: &mut Command, deadline: Instant) -> Result<Self> {
        let child = command
            // Its own group, so that a late one is stopped with all that it started.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        // Nobody need wait for the other to read; a smaller pipe does as well, but takes longer.
        for pipe in [fd(&child.stdin), fd(&child.stdout)].into_iter().flatten() {
            let _ = fcntl(pipe, FcntlArg::F_SETPIPE_SZ(PIPE));
        }
        let process = Self {
            name,
            child,
            left: String::new(),
            pieces: Box::new(iter::empty()),
            deadline,
            until: deadline.min(Instant::now() + LIMIT),
            stderr: Vec::new(),
            length: 0,
            has_more: true,
            has_ended: false,
        };
        if let Some(stdin) = &process.child.stdin {
            fcntl(stdin, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        }
        Ok(process)
    }

    /// Gives it its input: at once what the pipe takes, the rest piece by piece while its end is waited for.
    ///
    /// # Errors
    /// It can't be handed over.
    pub fn given(mut self, input: impl Iterator<Item = String> + 'a) -> Result<Self> {
        // It may have waited for its turn.
        self.until = self.deadline.min(Instant::now() + LIMIT);
        self.pieces = Box::new(input);
        self.hand_over().with_context(|| self.name.clone())?;
        Ok(self)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It does not end within its time.
    pub fn finish(mut self) -> Result<Output> {
        self.talk().with_context(|| self.name.clone())
    }

    /// What it prints; a failure is an error.
    ///
    /// # Errors
    /// It fails, or does not end within its time.
    pub fn answer(self) -> Result<String> {
        Ok(self.finish()?.success()?.stdout)
    }

    /// What is read in what it prints, while it prints it; a failure is an error.
    ///
    /// # Errors
    /// It fails, or does not end within its time, or what it prints can't be read.
    pub fn read_by<T>(mut self, read: impl FnOnce(&mut dyn BufRead) -> Result<T>) -> Result<T> {
        let found = read(&mut BufReader::with_capacity(PIECE, &mut self));
        // That it has failed says more than that its print can't be read.
        self.answer()?;
        found
    }

    fn talk(&mut self) -> Result<Output> {
        let mut stdout = Vec::new();
        let mut piece = [0; PIPE_BUF];
        loop {
            match self.go_on(&mut piece)? {
                0 => break,
                length => stdout.extend_from_slice(&piece[..length]),
            }
        }
        Ok(Output {
            name: self.name.clone(),
            status: self.wait()?,
            stdout: text(stdout),
            stderr: text(std::mem::take(&mut self.stderr)),
        })
    }

    /// Goes on until it has printed something, and says how many bytes; none once it has closed both outputs.
    fn go_on(&mut self, buffer: &mut [u8]) -> Result<usize> {
        while self.child.stdout.is_some() || self.child.stderr.is_some() {
            let [in_ready, out_ready, err_ready] = self.ready()?;
            if in_ready {
                self.hand_over()?;
            }
            if err_ready {
                let mut piece = [0; PIPE_BUF];
                let length = read_some(&mut self.child.stderr, &mut piece, &mut self.length)?;
                self.stderr.extend_from_slice(&piece[..length]);
            }
            if out_ready {
                let length = read_some(&mut self.child.stdout, buffer, &mut self.length)?;
                self.has_more = length == buffer.len();
                if length > 0 {
                    return Ok(length);
                }
            }
        }
        Ok(0)
    }

    /// Writes as much as the pipe takes; behind the end of the input the pipe goes. So it does where nobody
    /// reads any more, and how the tool ends tells why.
    fn hand_over(&mut self) -> Result<()> {
        let Some(stdin) = &mut self.child.stdin else {
            return Ok(());
        };
        loop {
            while self.left.len() < PIPE_BUF
                && let Some(piece) = self.pieces.next()
            {
                self.left.push_str(&piece);
            }
            if self.left.is_empty() {
                break;
            }
            match stdin.write(whole_lines(self.left.as_bytes())) {
                Ok(length) => drop(self.left.drain(..length)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::BrokenPipe => break,
                Err(error) => return Err(error).context("hand over its input"),
            }
        }
        self.child.stdin = None;
        Ok(())
    }

    /// Which of stdin, stdout and stderr can go on. What a tool prints stays in the pipe until the tool has ended or
    /// a while has gone by: woken at each of its writes, we would take its processor from it.
    fn ready(&mut self) -> Result<[bool; 3]> {
        let left = self.until.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), TOO_LATE);
        let Child {
            stdin,
            stdout,
            stderr,
            ..
        } = &self.child;
        let fds = [fd(stdin), fd(stdout), fd(stderr)];
        if !std::mem::take(&mut self.has_more) {
            // The end of a pipe is told whether it is asked for or not (poll(2)).
            let ready = poll_each(fds, PollFlags::empty(), left.min(PAUSE))?;
            if ready.contains(&true) {
                return Ok(ready);
            }
        }
        poll_each(fds, PollFlags::POLLIN, Duration::ZERO)
    }

    /// Waits for its end, which is near: its outputs are closed.
    fn wait(&mut self) -> Result<ExitStatus> {
        let mut pause = Duration::from_micros(10);
        loop {
            if let Some(status) = self.child.try_wait().context("wait")? {
                self.has_ended = true;
                return Ok(status);
            }
            ensure!(Instant::now() < self.until, TOO_LATE);
            thread::sleep(pause);
            pause = (2 * pause).min(Duration::from_millis(1));
        }
    }
}

impl Read for Process<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.go_on(buffer).map_err(io::Error::other)
    }
}

impl Drop for Process<'_> {
    fn drop(&mut self) {
        if self.has_ended {
            return;
        }
        let group = Pid::from_raw(i32::try_from(self.child.id()).expect("a process id fits pid_t"));
        // It may have ended in between, which is as well.
        let _ = killpg(group, Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

/// As many lines as are written at once or not at all: when we are killed, no tool reads half a line.
fn whole_lines(input: &[u8]) -> &[u8] {
    let most = &input[..input.len().min(PIPE_BUF)];
    let end = most.iter().rposition(|byte| *byte == b'\n');
    end.map_or(most, |end| &most[..=end])
}

const TOO_LATE: &str = "did not end in its time and was stopped";

type Fd<'a> = Option<BorrowedFd<'a>>;

fn fd(pipe: &Option<impl AsFd>) -> Fd<'_> {
    pipe.as_ref().map(AsFd::as_fd)
}

fn poll_each(fds: [Fd; 3], of_outputs: PollFlags, timeout: Duration) -> Result<[bool; 3]> {
    let events = [PollFlags::POLLOUT, of_outputs, of_outputs];
    let each = fds.into_iter().zip(events);
    let mut asked: Vec<PollFd> = each
        .filter_map(|(fd, events)| fd.map(|fd| PollFd::new(fd, events)))
        .collect();
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    match poll(&mut asked, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(errno).context("poll"),
    }
    let mut any = asked.iter().map(|fd| fd.any().unwrap_or(false));
    Ok(fds.map(|fd| fd.is_some() && any.next().unwrap_or(false)))
}

/// Reads what is there, and says how much; at its end the pipe goes.
fn read_some(pipe: &mut Option<impl Read>, buffer: &mut [u8], total: &mut usize) -> Result<usize> {
    let length = match pipe {
        Some(pipe) => pipe.read(buffer).context("read its output")?,
        None => 0,
    };
    if length == 0 {
        *pipe = None;
    }
    *total += length;
    ensure!(
        *total <= MAX_OUTPUT,
        "printed more than {MAX_OUTPUT} bytes and was stopped"
    );
    Ok(length)
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|error| {
        // Names of others' interfaces can hold any byte.
        String::from_utf8_lossy(error.as_bytes()).into_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start<'a>(command: &str, limit: Duration) -> Process<'a> {
        let mut shell = Command::new("/bin/sh");
        let shell = shell.args(["-c", command]);
        Process::start(command.to_owned(), shell, Instant::now() + limit).expect("a shell")
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn more_than_the_pipes_take_goes_in_and_out_at_the_same_time() {
        let pieces = (0..100_000).map(|number| format!("line {number:040}\n"));
        let all: String = pieces.clone().collect();
        assert!(all.len() > 2 * (1 << 20), "no more than two pipes take");
        let tool = start("tee /dev/stderr", LONG).given(pieces);
        let output = tool.and_then(Process::finish).expect("it ends");
        assert!(output.status.success() && output.stdout == all && output.stderr == all);
    }

    #[test]
    fn what_is_printed_is_read_while_it_is_printed() {
        let tool = start("seq 1 200000; echo no more >&2; exit 3", LONG);
        let mut last = String::new();
        let read = tool.read_by(|lines| {
            last = lines.lines().last().context("a line")??;
            Ok(())
        });
        assert_eq!(last, "200000");
        let error = format!("{:#}", read.expect_err("it fails"));
        assert!(error.ends_with("exit status 3: no more"), "{error}");
    }

    #[test]
    fn who_reads_nothing_is_no_failure_and_who_does_not_end_is_stopped() {
        let endless = || iter::repeat_with(|| "a line\n".repeat(1000));
        let tool = start("exec <&-", LONG).given(endless());
        let output = tool.and_then(Process::finish).expect("it ends");
        assert!(output.status.success());
        let late = start("sleep 100", Duration::from_millis(100)).given(endless());
        let late = late.and_then(Process::finish);
        let error = format!("{:#}", late.expect_err("it is late"));
        assert_eq!(error, format!("sleep 100: {TOO_LATE}"));
    }

    #[test]
    fn only_whole_lines_are_written_at_once() {
        let lines = "seven…\n".repeat(1000);
        let written = whole_lines(lines.as_bytes());
        assert!(written.len() > PIPE_BUF - 10 && written.len() <= PIPE_BUF);
        assert!(written.ends_with(b"\n"));
        assert_eq!(whole_lines(b"no end"), b"no end");
    }
}
