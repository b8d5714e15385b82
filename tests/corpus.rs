//! The inputs that fuzzing has found, asked again: tests/fuzz/corpus/TARGET/. A panic names its file.

use std::fs;
use std::panic::catch_unwind;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use mh_hook::reconcile::event::Direction;
use nix::time::{ClockId, clock_gettime};

#[path = "fuzz/src/lib.rs"]
mod properties;

use properties::{Call, VARIABLES};

/// How long a processor may take for one input, in a build without optimisation; what else it has to do does not count.
const LIMIT: Duration = Duration::from_secs(5);

fn spent() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .expect("the thread's clock")
        .into()
}

fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = format!("tests/fuzz/corpus/{target}");
    let files = fs::read_dir(&folder).expect("the corpus");
    let mut files: Vec<_> = files.map(|file| file.expect("a file").path()).collect();
    files.sort();
    assert!(files.len() > 20, "{folder} holds {} only", files.len());
    let read = |path: PathBuf| (path.clone(), fs::read(path).expect("an input"));
    files.into_iter().map(read).collect()
}

fn replay(target: &str, property: fn(&[u8])) {
    let mut failed = Vec::new();
    for (path, data) in corpus(target) {
        let before = spent();
        let result = catch_unwind(|| property(&data));
        let taken = spent() - before;
        if result.is_err() || taken > LIMIT {
            failed.push(format!("{} ({taken:?})", path.display()));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn config() {
    replay("config", properties::config);
}

#[test]
fn iptables() {
    replay("iptables", properties::iptables);
}

#[test]
fn event() {
    // Its variables take a process of their own, below.
    replay("event", |data| properties::event(&Call::parse(data)));
}

/// The program itself, with all that an input has in its environment and arguments, and a configuration that is not
/// there: it ends with status 2, and in what it says is no control character.
#[test]
fn event_in_an_environment() {
    let mut asked = 0;
    for (path, data) in corpus("event") {
        let call = Call::parse(&data);
        // Down goes on without a configuration.
        let goes_up = Direction::parse(&call.direction).filter(|it| *it != Direction::Down);
        let sizes = call.args.iter().map(|arg| arg.len()).sum::<usize>();
        if goes_up.is_none() || sizes > 100_000 {
            continue;
        }
        assert!(call.variables.len() <= VARIABLES.len());
        let output = Command::new(env!("CARGO_BIN_EXE_mh-hook"))
            .env_clear()
            .envs(call.variables)
            .args(["--config", "/nonexistent/mh-hook.toml", "event"])
            .arg(&call.direction)
            .args(&call.args)
            .output()
            .expect("run");
        let said = String::from_utf8(output.stderr).expect("UTF-8");
        assert_eq!(output.status.code(), Some(2), "{}: {said}", path.display());
        let mut control = said.chars().filter(|c| c.is_control() && *c != '\n');
        assert_eq!(control.next(), None, "{}: {said:?}", path.display());
        assert!(said.len() < 2000, "{}: {said:?}", path.display());
        asked += 1;
    }
    assert!(asked > 10, "only {asked} go up");
}
