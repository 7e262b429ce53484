//! Every point with SIGKILL, and a seeded third of the other faults.

use std::collections::{BTreeMap, VecDeque};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use matchlock_test_support::netns::Namespace;

use super::case::{Case, Fault, PATIENCE, RUN, Report, Stage, play, program};
use super::scenario::{NOT_REACHED, Scenario, boots, scenario};

/// The seed of `make test`; `MATCHLOCK_CRASH_SEED` is another.
const SEED: u64 = 20_261_124;

/// All points that the program has, but those that nothing reaches.
pub(crate) fn points() -> Vec<String> {
    let output = Command::new(program()).arg("__failpoints").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let listed: Vec<String> =
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect();
    for (point, _) in NOT_REACHED {
        assert!(listed.iter().any(|listed| listed == point), "there is no point {point}");
    }
    let reached = |point: &String| NOT_REACHED.iter().all(|(not, _)| not != point);
    listed.into_iter().filter(reached).collect()
}

/// SIGKILL at each further pass of the points that one `run` passes more than once.
pub(crate) fn further_passes() -> Vec<Case> {
    let net = Namespace::new().unwrap();
    net.sh("ip link set lo up").unwrap();
    let stage = Stage::new(&net, None).unwrap();
    let ended = stage.start("", RUN).unwrap().wait(PATIENCE).unwrap();
    assert!(ended.status.success(), "{ended:?}");
    let log = std::fs::read_to_string(stage.log()).unwrap();
    let mut passes: BTreeMap<&str, usize> = BTreeMap::new();
    for point in log.lines().filter_map(|line| line.strip_prefix("hit ")) {
        *passes.entry(point).or_default() += 1;
    }
    let further = |(point, count): (&str, usize)| {
        let point = point.to_owned();
        (1..count).map(move |passes| Case { passes, ..Case::new(&*point, Fault::Kill) })
    };
    // Where the point is passed at another moment in its own scenario, it is no further pass of `run`.
    let of_run = |(point, _): &(&str, usize)| scenario(point) == Scenario::Run("");
    passes.into_iter().filter(of_run).flat_map(further).collect()
}

pub(crate) fn seed() -> u64 {
    let given = std::env::var("MATCHLOCK_CRASH_SEED").ok();
    given.map_or(SEED, |text| text.parse().unwrap())
}

/// A number that depends on the seed and the text only (FNV-1a).
pub(crate) fn draw(seed: u64, text: &str) -> u64 {
    let start = 0xcbf2_9ce4_8422_2325 ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let hash = text.bytes().fold(start, mix);
    // Its low bits are weak.
    hash ^ (hash >> 29)
}

/// How many cases are played at once.
pub(crate) fn jobs() -> usize {
    std::env::var("MATCHLOCK_CRASH_JOBS").map_or(2, |text| text.parse().unwrap())
}

/// Plays cases, some at once, and hands each outcome on as it comes.
pub(crate) fn play_all(
    cases: Vec<Case>,
    mutation: Option<&str>,
    tell: impl Fn(&Case, &Result<Report, String>) -> bool + Sync,
) {
    let queue = Mutex::new(VecDeque::from(cases));
    std::thread::scope(|scope| {
        for _ in 0..jobs() {
            scope.spawn(|| {
                // It goes with this thread. A leak stays in it: then the next case gets another.
                let mut net = Namespace::new().unwrap();
                net.sh("ip link set lo up").unwrap();
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some(case) = next else { return };
                    let played = play(&net, &case, mutation).map_err(|error| format!("{error:#}"));
                    let clean = played.as_ref().is_ok_and(|report| report.leaks.is_empty());
                    if !tell(&case, &played) {
                        queue.lock().unwrap_or_else(PoisonError::into_inner).clear();
                    }
                    if !clean {
                        net = Namespace::new().unwrap();
                        net.sh("ip link set lo up").unwrap();
                    }
                }
            });
        }
    });
}

/// What is wrong about a case, if anything.
pub(crate) fn wrong(case: &Case, played: &Result<Report, String>) -> Option<String> {
    match played {
        Ok(report) if report.leaks.is_empty() => None,
        Ok(report) => Some(format!("{case}: {}", report.leaks.join("; "))),
        Err(error) => Some(format!("{case}: {error}")),
    }
}

#[test]
fn every_point_leaves_nothing_whatever_happens_there() {
    let seed = seed();
    let mut cases = Vec::new();
    for point in points() {
        for fault in [Fault::Kill, Fault::Panic, Fault::Error] {
            let case = Case::new(&*point, fault);
            let all = std::env::var_os("MATCHLOCK_CRASH_ALL").is_some();
            if all || fault == Fault::Kill || draw(seed, &case.to_string()).is_multiple_of(3) {
                cases.push(case);
            }
        }
    }
    cases.extend(further_passes());
    if let Ok(only) = std::env::var("MATCHLOCK_CRASH_ONLY") {
        cases.retain(|case| case.to_string().contains(&only));
    }
    // What takes long comes first: at the end nobody waits for it alone.
    cases.sort_by_key(|case| case.passes == 0 && !boots(&case.point));
    let count = cases.len();
    eprintln!("{count} cases, seed {seed} (MATCHLOCK_CRASH_SEED)");
    let begun = Instant::now();
    let failed = Mutex::new(Vec::new());
    play_all(cases, None, |case, played| {
        if let Some(wrong) = wrong(case, played) {
            eprintln!("{wrong}");
            failed.lock().unwrap().push(wrong);
        }
        true
    });
    eprintln!("{count} cases in {:?}", begun.elapsed());
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} of {count} failed:\n{}", failed.len(), failed.join("\n"));
}
