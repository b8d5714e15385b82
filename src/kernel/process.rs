//! A running tool: its input, its output and its exit status, within a time limit. Does not know which tool it is.

use std::io::{ErrorKind, Read, Write};
use std::mem;
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

/// A write of up to this many bytes to a pipe is atomic (pipe(7)).
const PIPE_BUF: usize = 4096;

/// How many bytes are read at once: as many as a pipe holds by default (pipe(7)).
const READ_SIZE: usize = 1 << 16;

/// How many bytes a tool can print ahead of our reading, if the kernel allows it (`/proc/sys/fs/pipe-max-size`, pipe(7)):
/// 10,000 rules.
const PIPE_SIZE: i32 = 1 << 20;

/// The most that a tool may print on stdout or on stderr, in bytes: 10,000 rules are 1 MiB.
const MAX_OUTPUT: usize = 64 << 20;

/// What a tool printed until it exited.
#[derive(Debug)]
pub struct Output {
    pub name: String,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// Turns a failure's output into an error.
    /// Errors: the tool failed: its exit status and what it printed on stderr.
    pub fn success(self) -> Result<Self> {
        ensure!(self.status.success(), "{}: {}", self.name, self.failure());
        Ok(self)
    }

    /// The exit status, and what the tool printed on stderr, as one line.
    pub fn failure(&self) -> String {
        let lines = self.stderr.lines().map(str::trim);
        let lines: Vec<&str> = lines.filter(|line| !line.is_empty()).collect();
        let words = match &lines[..] {
            [] => "it said nothing".into(),
            lines => lines.join("; "),
        };
        format!("{}: {words}", self.ending())
    }

    /// `exit status 1`, or `killed by signal 9`.
    pub fn ending(&self) -> String {
        match (self.status.code(), self.status.signal()) {
            (Some(code), _) => format!("exit status {code}"),
            (None, Some(signal)) => format!("killed by signal {signal}"),
            (None, None) => "ended".into(),
        }
    }
}

/// A running tool. Dropped before it has exited, it is killed with all processes that it started.
pub struct Process {
    name: String,
    child: Child,
    input: String,
    /// How many bytes of the input the tool's stdin has taken.
    written: usize,
    stderr: Vec<u8>,
    /// When the whole call must be done.
    deadline: Instant,
    /// When this tool must have exited.
    until: Instant,
    has_exited: bool,
}

impl Process {
    /// Starts this command, which must exit by the deadline.
    /// Errors: it can't be started.
    pub fn start(name: String, command: &mut Command, deadline: Instant) -> Result<Self> {
        let child = command
            // Its own process group, so that what it starts is killed with it.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let process = Self {
            name,
            child,
            input: String::new(),
            written: 0,
            stderr: Vec::new(),
            deadline,
            until: deadline.min(Instant::now() + LIMIT),
            has_exited: false,
        };
        if let Some(stdin) = &process.child.stdin {
            fcntl(stdin, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        }
        if let Some(stdout) = &process.child.stdout {
            // Best effort: then the tool need not wait while we do something else.
            let _ = fcntl(stdout, FcntlArg::F_SETPIPE_SZ(PIPE_SIZE));
        }
        Ok(process)
    }

    /// Gives the tool its input: at once what the pipe takes, the rest during [`Self::finish`].
    /// Errors: the input can't be written.
    pub fn given(mut self, input: String) -> Result<Self> {
        // The time limit begins here: the tool may have been started long before.
        self.until = self.deadline.min(Instant::now() + LIMIT);
        self.input = input;
        self.write_input().with_context(|| self.name.clone())?;
        Ok(self)
    }

    /// Waits until the tool exits.
    /// Errors: it does not exit in time, or prints too much.
    pub fn finish(self) -> Result<Output> {
        let mut stdout = Vec::new();
        let mut output = self.finish_to(|part| stdout.extend_from_slice(part))?;
        output.stdout = text(stdout);
        Ok(output)
    }

    /// Waits until the tool exits, and hands over what it prints on stdout as soon as it comes; the output has none of it.
    fn finish_to(mut self, take: impl FnMut(&[u8])) -> Result<Output> {
        let status = self.run(take).with_context(|| self.name.clone())?;
        Ok(Output {
            name: mem::take(&mut self.name),
            status,
            stdout: String::new(),
            stderr: text(mem::take(&mut self.stderr)),
        })
    }

    /// What the tool prints on stdout.
    /// Errors: it fails, or does not exit in time.
    pub fn answer(self) -> Result<String> {
        Ok(self.finish()?.success()?.stdout)
    }

    /// Hands over what the tool prints on stdout as soon as it comes.
    /// Errors: it fails, or does not exit in time; an error of who takes it, unless the tool fails, too.
    pub fn answer_to(self, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let mut taken = Ok(());
        let output = self.finish_to(|part| {
            if taken.is_ok() {
                taken = take(part);
            }
        })?;
        output.success()?;
        taken
    }

    /// Writes, reads and waits until the tool exits.
    fn run(&mut self, mut take: impl FnMut(&[u8])) -> Result<ExitStatus> {
        let mut buffer = vec![0; READ_SIZE];
        let mut printed = [0; 2];
        while self.child.stdout.is_some() || self.child.stderr.is_some() {
            let [stdin, stdout, stderr] = self.ready()?;
            if stdin {
                self.write_input()?;
            }
            if stdout {
                let part = read_some(&mut self.child.stdout, &mut buffer, &mut printed[0])?;
                take(part);
            }
            if stderr {
                let part = read_some(&mut self.child.stderr, &mut buffer, &mut printed[1])?;
                self.stderr.extend_from_slice(part);
            }
        }
        self.wait()
    }

    /// Writes what the pipe takes; closes stdin at the end of the input.
    fn write_input(&mut self) -> Result<()> {
        let Some(stdin) = &mut self.child.stdin else {
            return Ok(());
        };
        while self.written < self.input.len() {
            let left = &self.input.as_bytes()[self.written..];
            match stdin.write(whole_lines(left)) {
                Ok(length) => self.written += length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                // The tool has closed its stdin. Its exit status and stderr say why.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => break,
                Err(error) => return Err(error).context("write its input"),
            }
        }
        self.child.stdin = None;
        Ok(())
    }

    /// Waits until one of stdin, stdout and stderr is ready, and says which.
    fn ready(&self) -> Result<[bool; 3]> {
        let left = self.until.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), TOO_LATE);
        let Child {
            stdin,
            stdout,
            stderr,
            ..
        } = &self.child;
        let pipes = [
            (fd(stdin), PollFlags::POLLOUT),
            (fd(stdout), PollFlags::POLLIN),
            (fd(stderr), PollFlags::POLLIN),
        ];
        let open = pipes.iter();
        let mut polled: Vec<PollFd> = open
            .filter_map(|(fd, events)| Some(PollFd::new((*fd)?, *events)))
            .collect();
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut polled, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("poll"),
        }
        let mut ready = polled.iter().map(|fd| fd.any().unwrap_or(false));
        Ok(pipes.map(|(fd, _)| fd.is_some() && ready.next().unwrap_or(false)))
    }

    /// Waits until the tool exits, which it does soon: its stdout and stderr are closed.
    fn wait(&mut self) -> Result<ExitStatus> {
        let mut pause = Duration::from_micros(10);
        loop {
            if let Some(status) = self.child.try_wait().context("wait")? {
                self.has_exited = true;
                return Ok(status);
            }
            ensure!(Instant::now() < self.until, TOO_LATE);
            thread::sleep(pause);
            pause = (2 * pause).min(Duration::from_millis(1));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.has_exited {
            return;
        }
        let group = Pid::from_raw(i32::try_from(self.child.id()).expect("a process id fits pid_t"));
        // Fails if all of them have exited meanwhile.
        let _ = killpg(group, Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

/// The lines at the input's start that one atomic write takes: if we are killed, no tool has read half a line.
fn whole_lines(input: &[u8]) -> &[u8] {
    let most = &input[..input.len().min(PIPE_BUF)];
    let end = most.iter().rposition(|byte| *byte == b'\n');
    end.map_or(most, |end| &most[..=end])
}

const TOO_LATE: &str = "did not end in its time and was stopped";

fn fd(pipe: &Option<impl AsFd>) -> Option<BorrowedFd<'_>> {
    pipe.as_ref().map(AsFd::as_fd)
}

/// Reads what the pipe holds; closes the pipe at its end. `printed` counts the bytes.
fn read_some<'a>(
    pipe: &mut Option<impl Read>,
    buffer: &'a mut [u8],
    printed: &mut usize,
) -> Result<&'a [u8]> {
    let length = match pipe {
        Some(pipe) => pipe.read(buffer).context("read its output")?,
        None => 0,
    };
    if length == 0 {
        *pipe = None;
    }
    *printed += length;
    ensure!(
        *printed <= MAX_OUTPUT,
        "printed more than {MAX_OUTPUT} bytes and was stopped"
    );
    Ok(&buffer[..length])
}

/// Output as text: the name of a foreign interface can hold any byte.
fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes)
        .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(command: &str, limit: Duration) -> Process {
        let mut shell = Command::new("/bin/sh");
        let shell = shell.args(["-c", command]);
        Process::start(command.to_owned(), shell, Instant::now() + limit).expect("a shell")
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn more_than_the_pipes_take_goes_in_and_out_at_the_same_time() {
        let input: String = (0..100_000)
            .map(|number| format!("line {number:040}\n"))
            .collect();
        assert!(input.len() > 4 << 20, "the pipes could hold it");
        let tool = start("tee /dev/stderr", LONG).given(input.clone());
        let output = tool.and_then(Process::finish).expect("it exits");
        assert!(output.status.success() && output.stdout == input && output.stderr == input);
    }

    #[test]
    fn a_failure_tells_exit_status_and_stderr() {
        let tool = start("echo no more >&2; echo ' at all' >&2; exit 3", LONG);
        let error = format!("{:#}", tool.answer().expect_err("it fails"));
        assert!(error.ends_with("exit status 3: no more; at all"), "{error}");
    }

    #[test]
    fn a_tool_that_reads_nothing_does_not_fail_and_one_that_does_not_end_is_stopped() {
        let long = "a line\n".repeat(1 << 20);
        let tool = start("exec <&-", LONG).given(long.clone());
        let output = tool.and_then(Process::finish).expect("it exits");
        assert!(output.status.success());
        let late = start("sleep 100", Duration::from_millis(100)).given(long);
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
