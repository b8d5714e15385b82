//! Random sequences of what happens to a router, with the kernel's own namespaces and the real tools:
//! after each call of mh-hook our entries are what a simple model says, and the others' are as they were.
//!
//! `tests/model/run` gives it a place where it can do no harm, and says which backend of iptables it
//! has. It runs the cases in `tests/model/cases` first. A sequence that fails is made as short as it
//! can be, printed, and kept there.

mod expect;
mod listing;
mod router;
mod step;

use std::cell::RefCell;
use std::env;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use proptest::bool::weighted;
use proptest::collection::vec;
use proptest::prelude::{BoxedStrategy, Just, Strategy, prop_oneof};
use proptest::sample::select;
use proptest::test_runner::{
    Config as RunnerConfig, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner,
};

use crate::router::{Effects, FOREIGN, Router, STRAYS};
use crate::step::{ADDRESSES, Call, Config, Direction, LINKS, Step, Uplink};

const CASES: &str = "tests/model/cases";

/// How many steps a sequence has.
const LENGTH: usize = 20;

fn main() -> ExitCode {
    let Ok(backend) = env::var("MODEL_BACKEND") else {
        eprintln!("this needs the namespaces that tests/model/run makes: run that");
        return ExitCode::from(2);
    };
    match all(&backend) {
        Ok(summary) => {
            println!("{summary}");
            ExitCode::SUCCESS
        }
        Err(problem) => {
            println!("{problem}");
            ExitCode::FAILURE
        }
    }
}

fn all(backend: &str) -> Result<String, String> {
    let began = Instant::now();
    let number = |name: &str| env::var(name).ok().and_then(|text| text.parse().ok());
    let count: u32 = number("MODEL_CASES").unwrap_or(500);
    let clock = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    let seed = number("MODEL_SEED").unwrap_or(clock.subsec_nanos());

    let kept = kept()?;
    let mut effects = Effects::new();
    for (path, steps) in &kept {
        let mut router = Router::new(&mut effects)?;
        let result = router.run(steps);
        result.map_err(|problem| format!("{path}: {problem}\n{}", router.trace.join("\n")))?;
    }
    if env::var_os("MODEL_CASE").is_some() {
        return Ok(format!("{} passes", kept[0].0));
    }
    let state = RefCell::new((Effects::new(), 0));
    let config = RunnerConfig {
        cases: count,
        failure_persistence: None,
        max_shrink_time: 120_000,
        max_shrink_iters: 2_000,
        ..RunnerConfig::default()
    };
    let mut bytes = [0; 32];
    bytes[..4].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(config, rng);
    // To make a sequence shorter is to leave steps out; only then they are made simpler.
    let sequence = (vec(weighted(1.0), LENGTH), vec(step(), LENGTH));
    let mut failed = None;
    let failed = RefCell::new(&mut failed);
    let result = runner.run(&sequence, |(kept, steps)| {
        let steps = left(&kept, &steps);
        let mut failed = failed.borrow_mut();
        // What is left out has been made simpler.
        if failed.as_ref() == Some(&steps) {
            return Err(TestCaseError::fail("as before"));
        }
        let (effects, calls) = &mut *state.borrow_mut();
        let mut router = Router::new(effects).map_err(TestCaseError::fail)?;
        let result = router.run(&steps);
        *calls += router.calls;
        result.map_err(|problem| {
            **failed = Some(steps);
            TestCaseError::fail(problem)
        })
    });
    let (effects, calls) = state.into_inner();
    match result {
        Ok(()) => {}
        Err(TestError::Abort(reason)) => return Err(format!("given up: {reason}")),
        Err(TestError::Fail(_, (kept, steps))) => {
            return Err(keep(backend, seed, left(&kept, &steps))?);
        }
    }
    if count >= 500 {
        without_effect(&effects)?;
    }
    let changing: usize = [
        "event up",
        "event down",
        "up",
        "down",
        "sync",
        "link pre-up",
    ]
    .iter()
    .filter_map(|kind| effects.get(*kind))
    .map(|(_, changing)| changing)
    .sum();
    Ok(format!(
        "ok {backend}: {} kept cases, {count} sequences of {LENGTH} steps, {calls} calls, \
         {changing} of them with something to do, {} s, MODEL_SEED={seed}",
        kept.len(),
        began.elapsed().as_secs()
    ))
}

/// The steps that are not left out.
fn left(kept: &[bool], steps: &[Step]) -> Vec<Step> {
    let pairs = kept.iter().zip(steps);
    pairs
        .filter(|(kept, _)| **kept)
        .map(|(_, step)| step.clone())
        .collect()
}

/// A kind of step that never does anything would test nothing.
fn without_effect(effects: &Effects) -> Result<(), String> {
    let lists = [("foreign add", FOREIGN.len()), ("own stray", STRAYS.len())];
    let numbered = lists
        .into_iter()
        .flat_map(|(kind, count)| (0..count).map(move |number| format!("{kind} {number}")));
    let kinds = [
        "link dial",
        "link raise",
        "link hang-up",
        "link lower",
        "link delete",
        "link mtu",
        "link pre-up",
        "address add",
        "address flush",
        "config",
        "config-broken",
        "event up",
        "event down",
        "up",
        "down",
        "sync",
        "own remove",
        "own double",
        "foreign remove",
        "flush all",
    ];
    let idle: Vec<String> = kinds
        .map(str::to_owned)
        .into_iter()
        .chain(numbered)
        .filter(|kind| {
            effects
                .get(kind)
                .is_none_or(|(_, effective)| *effective == 0)
        })
        .collect();
    if idle.is_empty() {
        Ok(())
    } else {
        Err(format!("steps that never had an effect: {idle:?}"))
    }
}

/// The cases of before, or the one that is asked for.
fn kept() -> Result<Vec<(String, Vec<Step>)>, String> {
    let paths = match env::var("MODEL_CASE") {
        Ok(path) => vec![path.into()],
        Err(_) => {
            let files = fs::read_dir(CASES).map_err(|error| format!("{CASES}: {error}"))?;
            let mut paths: Vec<_> = files.flatten().map(|file| file.path()).collect();
            paths.sort();
            paths
        }
    };
    let mut cases = Vec::new();
    for path in paths {
        let name = path.display().to_string();
        let text = fs::read_to_string(&path).map_err(|error| format!("{name}: {error}"))?;
        let lines = text
            .lines()
            .map(|line| line.split('#').next().unwrap_or_default().trim());
        let steps = lines.filter(|line| !line.is_empty()).map(|line| {
            step::parse(line).ok_or_else(|| format!("{name}: this is no step: {line}"))
        });
        cases.push((name.clone(), steps.collect::<Result<_, _>>()?));
    }
    Ok(cases)
}

/// Tells of a sequence that failed, and keeps it.
fn keep(backend: &str, seed: u32, mut steps: Vec<Step>) -> Result<String, String> {
    // Simpler steps may make others needless.
    let mut index = 0;
    while index < steps.len() {
        let mut fewer = steps.clone();
        fewer.remove(index);
        let mut effects = Effects::new();
        if Router::new(&mut effects)?.run(&fewer).is_err() {
            (steps, index) = (fewer, 0);
        } else {
            index += 1;
        }
    }
    let path = Path::new(CASES).join(format!("found-{backend}-{seed}"));
    let mut text = format!("# Found with {backend}, MODEL_SEED={seed}.\n");
    steps.iter().for_each(|step| text += &format!("{step}\n"));
    fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut effects = Effects::new();
    let mut router = Router::new(&mut effects)?;
    let problem = match router.run(&steps) {
        Ok(()) => "it passes when it is run again".to_owned(),
        Err(problem) => problem,
    };
    Ok(format!(
        "FAIL {backend}, MODEL_SEED={seed}; the shortest sequence that fails, kept as {}, to be named by what it shows:\n\
         {}\n# so far each sequence\n{}\n{problem}",
        path.display(),
        router::START,
        router.trace.join("\n")
    ))
}

/// Any step. What comes first is what a failing sequence is made simpler to.
fn step() -> impl Strategy<Value = Step> {
    let numbers = 0..60_usize;
    prop_oneof![
        8 => (link(), address()).prop_map(|(link, address)| Step::Dial(link, address)),
        4 => link().prop_map(Step::HangUp),
        2 => link().prop_map(Step::Lower),
        2 => link().prop_map(Step::Raise),
        3 => link().prop_map(Step::Delete),
        2 => (link(), address()).prop_map(|(link, address)| Step::AddAddress(link, address)),
        1 => link().prop_map(Step::FlushAddresses),
        1 => (link(), select(vec![1500, 1492])).prop_map(|(link, mtu)| Step::Mtu(link, mtu)),
        30 => call().prop_map(Step::Call),
        2 => (link(), select(&ADDRESSES[..4])).prop_map(|(link, address)| Step::PreUp(link, address)),
        8 => config().prop_map(Step::Configure),
        1 => Just(Step::Break),
        5 => numbers.clone().prop_map(Step::Remove),
        5 => numbers.prop_map(Step::Double),
        4 => (0..STRAYS.len()).prop_map(Step::Stray),
        2 => select(vec![Some("mangle"), Some("nat"), Some("filter"), None]).prop_map(Step::Flush),
        9 => (0..FOREIGN.len()).prop_map(Step::AddForeign),
        6 => (0..FOREIGN.len()).prop_map(Step::RemoveForeign),
    ]
}

/// As pppd calls, and a person; what pppd says of the address may be true, late or missing.
fn call() -> impl Strategy<Value = Call> {
    let local = || {
        prop_oneof![
            6 => Just(None),
            4 => select(&ADDRESSES[..]).prop_map(Some),
        ]
    };
    prop_oneof![
        12 => (link(), local()).prop_map(|(link, local)| Call::Event(Direction::Up, link, local)),
        8 => (link(), local()).prop_map(|(link, local)| Call::Event(Direction::Down, link, local)),
        4 => (link(), local()).prop_map(|(link, local)| Call::Up(link, local)),
        3 => link().prop_map(Call::Down),
        3 => Just(Call::Sync),
    ]
}

fn link() -> impl Strategy<Value = &'static str> {
    prop_oneof![12 => Just(LINKS[0]), 10 => Just(LINKS[1]), 1 => Just(LINKS[2])]
}

fn address() -> impl Strategy<Value = std::net::Ipv4Addr> {
    prop_oneof![20 => select(&ADDRESSES[..4]), 1 => Just(ADDRESSES[4])]
}

/// Any configuration; what comes first is the simplest.
fn config() -> impl Strategy<Value = Config> {
    let places = select(vec![
        ["ppp0", "ppp1"],
        ["ppp0", "ppp1"],
        ["ppp0", "ppp1"],
        ["ppp1", "ppp0"],
        ["ppp0", "ppp2"],
        ["ppp2", "ppp1"],
    ]);
    let first = uplink(
        &["isp0", "isp0", "zero"],
        &[Some(10), Some(10), Some(300)],
        77,
    );
    let second = uplink(
        &["isp1"],
        &[Some(20), Some(20), None, Some(300), Some(10)],
        78,
    );
    let masks = select(vec![0xff, 0xff, 0xff, 0xfff, u32::MAX]);
    let priorities = select(vec![98, 98, 98, 1000]);
    let counts = (select(vec![1, 1, 2]), select(vec![1, 1, 2]));
    (places, first, second, 0..8, masks, priorities, counts).prop_map(
        |(places, mut first, mut second, which, mask, priority, (lans, networks))| {
            first.interface = places[0].into();
            second.interface = places[1].into();
            if second.table == first.table {
                (second.table, second.mark) = (Some(20), None);
            }
            // What one of them pins the other can't, and the second pin lies in the second prefix.
            if first.pins > 0 {
                second.pins = 0;
            }
            let networks = networks.max(first.pins).max(second.pins);
            let mut uplinks = vec![first, second];
            // Mostly both.
            match which {
                6 => drop(uplinks.remove(0)),
                7 => drop(uplinks.remove(1)),
                _ => {}
            }
            Config {
                lans,
                networks,
                mask,
                priority,
                uplinks,
            }
        },
    )
}

/// An uplink of one of these names and tables; `mark` is one that it may have instead of its table's number.
fn uplink(
    names: &'static [&'static str],
    tables: &'static [Option<u32>],
    mark: u32,
) -> BoxedStrategy<Uplink> {
    let often = || prop_oneof![4 => Just(true), 1 => Just(false)];
    let seldom = || prop_oneof![3 => Just(false), 1 => Just(true)];
    let switches = (often(), often(), often(), seldom());
    let counts = (0..=expect::FORWARDS.len(), select(vec![0, 0, 1, 2]));
    (select(names), select(tables), seldom(), counts, switches)
        .prop_map(
            move |(name, table, is_marked, (forwards, pins), switches)| {
                let (masquerade, hairpin, clamp_mss, accept_forward) = switches;
                // A table above 255 is no mark within the mask.
                let needs_mark = table.is_some_and(|table| table > 0xff);
                let routed = |count| if table.is_some() { count } else { 0 };
                Uplink {
                    name: name.into(),
                    interface: String::new(),
                    table,
                    mark: (table.is_some() && (is_marked || needs_mark)).then_some(mark),
                    forwards: routed(forwards),
                    pins: routed(pins),
                    masquerade,
                    hairpin,
                    clamp_mss,
                    accept_forward,
                }
            },
        )
        .boxed()
}
