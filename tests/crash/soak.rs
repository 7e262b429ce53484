//! The whole matrix, and kills at random instants, in pieces: what a piece has found is appended to
//! `$MATCHLOCK_SOAK_DIR/<commit>.jsonl`, and the next goes on where it stopped.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use matchlock_test_support::netns::Namespace;
use serde::{Deserialize, Serialize};

use super::case::{Case, Fault, Report};
use super::suite::{further_passes, jobs, play_all, points, seed};
use super::{random, suite};

/// A case that was played, as it is kept.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Line {
    /// The failpoint (and at which of its passes, `#2`), or `random <seed>`.
    pub(crate) point: String,
    /// What went wrong there.
    pub(crate) fault: String,
    /// What was left; empty is what it should be.
    pub(crate) leaks: Vec<String>,
    /// Whether a hypervisor was there to be killed, where the fault asks for it.
    pub(crate) hypervisor: Option<bool>,
    /// From the start of `gc` to its end.
    pub(crate) recovery_ms: u64,
    /// Of the program.
    pub(crate) commit: String,
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run `make soak`"))
}

/// The file of this commit.
pub(crate) fn file() -> PathBuf {
    PathBuf::from(variable("MATCHLOCK_SOAK_DIR")).join(format!("{}.jsonl", commit()))
}

pub(crate) fn commit() -> String {
    variable("MATCHLOCK_SOAK_COMMIT")
}

/// What was played of this commit.
pub(crate) fn lines() -> Vec<Line> {
    match fs::read_to_string(file()) {
        Ok(text) => text.lines().map(|line| serde_json::from_str(line).unwrap()).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => panic!("{error}"),
    }
}

fn append(point: &str, fault: &str, played: &Result<Report, String>) -> Line {
    let (leaks, hypervisor, recovery) = match played {
        Ok(report) => (report.leaks.clone(), report.hypervisor, report.recovery),
        Err(error) => (vec![format!("the case failed: {error}")], None, Duration::ZERO),
    };
    let line = Line {
        point: point.to_owned(),
        fault: fault.to_owned(),
        leaks,
        hypervisor,
        recovery_ms: u64::try_from(recovery.as_millis()).unwrap(),
        commit: commit(),
    };
    let mut file = OpenOptions::new().append(true).create(true).open(file()).unwrap();
    let text = serde_json::to_string(&line).unwrap() + "\n";
    file.write_all(text.as_bytes()).unwrap();
    line
}

fn deadline() -> Instant {
    let minutes: u64 = variable("MATCHLOCK_SOAK_MINUTES").parse().unwrap();
    Instant::now() + Duration::from_secs(minutes * 60)
}

fn told(line: &Line, failed: &Mutex<usize>) {
    if !line.leaks.is_empty() {
        println!("{} × {}: {}", line.point, line.fault, line.leaks.join("; "));
        *failed.lock().unwrap() += 1;
    }
}

#[test]
#[ignore = "`make soak PART=matrix`"]
fn the_whole_matrix() {
    let deadline = deadline();
    let done: BTreeSet<(String, String)> =
        lines().into_iter().map(|line| (line.point, line.fault)).collect();
    let mut cases: Vec<Case> = points()
        .into_iter()
        .flat_map(|point| Fault::ALL.map(|fault| Case::new(&*point, fault)))
        .chain(further_passes())
        .filter(|case| !done.contains(&(case.place(), case.fault.name().to_owned())))
        .collect();
    // The same order each time, and every piece of it has some of everything.
    cases.sort_by_key(|case| suite::draw(seed(), &case.to_string()));
    let (count, failed, played) = (cases.len(), Mutex::new(0), Mutex::new(0));
    play_all(cases, None, |case, outcome| {
        *played.lock().unwrap() += 1;
        told(&append(&case.place(), case.fault.name(), outcome), &failed);
        Instant::now() < deadline
    });
    let (played, failed) = (played.into_inner().unwrap(), failed.into_inner().unwrap());
    println!("{played} cases played, {} of the matrix are left; {failed} failed", count - played);
    assert_eq!(failed, 0);
}

#[test]
#[ignore = "`make soak PART=random`"]
fn kills_at_random_instants() {
    let deadline = deadline();
    let most: u64 = variable("MATCHLOCK_SOAK_KILLS").parse().unwrap();
    let done: BTreeSet<String> = lines().into_iter().map(|line| line.point).collect();
    let seeds = (0..most).map(|n| seed() + n).filter(|n| !done.contains(&format!("random {n}")));
    let (seeds, failed, played) = (Mutex::new(seeds), Mutex::new(0), Mutex::new(0));
    std::thread::scope(|scope| {
        for _ in 0..jobs() {
            scope.spawn(|| {
                while Instant::now() < deadline {
                    let Some(seed) = seeds.lock().unwrap().next() else { return };
                    let net = Namespace::new().unwrap();
                    net.sh("ip link set lo up").unwrap();
                    let outcome = random::play(&net, seed).map_err(|error| format!("{error:#}"));
                    let fault = format!("SIGKILL of {}", random::victim(seed));
                    *played.lock().unwrap() += 1;
                    told(&append(&format!("random {seed}"), &fault, &outcome), &failed);
                }
            });
        }
    });
    let (played, failed) = (played.into_inner().unwrap(), failed.into_inner().unwrap());
    println!("{played} kills at random instants; {failed} failed");
    assert_eq!(failed, 0);
}
