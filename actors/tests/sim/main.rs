//! A seeded simulation of the actor tree on fakes of the host, in virtual time: random lives, random
//! faults, killed actors and killed nodes; the laws are watched all the time, and in the end nothing
//! is left.
//!
//! `MATCHLOCK_SIM_SEEDS=from..to cargo test --workspace --test sim seeds` runs these seeds
//! (`from..to` without `to`, or one number); a failing one prints its trace. The same seed gives the
//! same trace, in every process.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod faults;
mod host;
mod laws;
mod machine;
mod node;
mod remains;
mod rng;
mod scenario;
mod snapshots;
mod store;
mod strangers;
mod trace;
mod unlucky;
mod world;

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use trace::Summary;
use world::{PANIC, Sim};

/// The longest virtual time of a scenario.
const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);

/// How many seeds run when nobody says.
const SEEDS: u64 = 200;

/// What must have happened in so many seeds, or the laws about it say nothing.
const MUST_HAPPEN: [&str; 8] = [
    "restored",
    "saved",
    "not restored",
    "damaged is found",
    "died in a publication",
    "half a snapshot is left",
    "half a snapshot is swept",
    "take-over",
];

/// How many failing seeds of each thread are enough.
const MOST_FAILURES: usize = 10;

/// Injected panics are no news.
fn quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let injected = panic.payload_as_str().is_some_and(|text| text.contains(PANIC));
            if !injected {
                usual(panic);
            }
        }));
    });
}

/// Runs the scenario of a seed.
fn run(seed: u64, replayed: bool) -> Summary {
    quiet();
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_time().start_paused(true).build().unwrap();
    let played = catch_unwind(AssertUnwindSafe(|| {
        runtime.block_on(async {
            let sim = Sim::new(seed, replayed);
            let scenario = async {
                if seed % 8 == 7 {
                    unlucky::one_is_unlucky(&sim).await;
                } else {
                    scenario::anything(&sim).await;
                }
            };
            if tokio::time::timeout(LONGEST, scenario).await.is_err() {
                sim.trace.broken("the scenario does not end");
            }
            let summary = sim.trace.summary();
            sim.close();
            summary
        })
    }));
    played.unwrap_or_else(|_| Summary {
        broken: vec!["the scenario itself panicked".to_owned()],
        ..Summary::default()
    })
}

fn report(seed: u64, summary: &Summary) -> String {
    format!(
        "seed {seed} breaks: {:#?}\n{}\nreplay: MATCHLOCK_SIM_SEEDS={seed} cargo test \
         --workspace --test sim seeds -- --nocapture\n",
        summary.broken,
        summary.last.join("\n")
    )
}

fn chosen() -> Range<u64> {
    let Ok(text) = std::env::var("MATCHLOCK_SIM_SEEDS") else { return 0..SEEDS };
    match text.split_once("..") {
        Some((from, to)) => from.parse().unwrap()..to.parse().unwrap(),
        None => {
            let seed = text.parse().unwrap();
            seed..seed + 1
        }
    }
}

#[test]
fn seeds() {
    let seeds = chosen();
    let next = AtomicU64::new(seeds.start);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let worker = || {
        let mut failures = Vec::new();
        let (mut events, mut tally) = (0, BTreeMap::<String, u64>::new());
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end || failures.len() >= MOST_FAILURES {
                return (failures, events, tally);
            }
            let summary = run(seed, seeds.end - seeds.start == 1);
            events += summary.events;
            for (what, count) in &summary.tally {
                *tally.entry(what.clone()).or_default() += count;
            }
            if !summary.broken.is_empty() {
                failures.push((seed, report(seed, &summary), summary.broken.join(" AND ")));
            }
        }
    };
    let mut failures = Vec::new();
    let (mut events, mut tally) = (0, BTreeMap::<String, u64>::new());
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        for worker in workers {
            let (its, more, counts) = worker.join().unwrap();
            failures.extend(its);
            events += more;
            for (what, count) in counts {
                *tally.entry(what).or_default() += count;
            }
        }
    });
    failures.sort();
    println!("seeds {seeds:?}: {events} events; {tally:#?}");
    if let Some((seed, first, _)) = failures.first() {
        let all = failures.iter().map(|(seed, _, law)| format!("{seed}: {law}"));
        let all: Vec<_> = all.collect();
        panic!("{}\nfailing seeds (the trace is that of {seed}):\n{}", first, all.join("\n"));
    }
    if seeds.end.saturating_sub(seeds.start) >= SEEDS {
        let never: Vec<_> = MUST_HAPPEN.iter().filter(|what| !tally.contains_key(**what)).collect();
        assert!(never.is_empty(), "never happened: {never:?}");
    }
}

/// How many seeds are run twice.
const TWICE: u64 = 50;

/// Set for the other process that runs the same seeds.
const TELL_HASHES: &str = "MATCHLOCK_SIM_TELL_HASHES";

#[test]
#[expect(clippy::disallowed_methods, reason = "it is this test itself that runs once more")]
fn the_same_seed_gives_the_same_trace_in_another_process() {
    let ours: Vec<_> =
        (0..TWICE).map(|seed| format!("hash {seed} {:x}", run(seed, false).hash)).collect();
    if std::env::var_os(TELL_HASHES).is_some() {
        println!("{}", ours.join("\n"));
        return;
    }
    let name = "the_same_seed_gives_the_same_trace_in_another_process";
    let program = std::env::current_exe().unwrap();
    let other = std::process::Command::new(program)
        .args([name, "--exact", "--nocapture"])
        .env(TELL_HASHES, "1")
        .output()
        .unwrap();
    let told = String::from_utf8(other.stdout).unwrap();
    let theirs: Vec<_> = told.lines().filter(|line| line.starts_with("hash ")).collect();
    assert_eq!(ours, theirs);
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in 0..TWICE {
        let (one, two) = (run(seed, false), run(seed, false));
        if one.hash != two.hash {
            let differ = one.last.iter().zip(&two.last).find(|(a, b)| a != b);
            panic!("seed {seed}: {} and {} events, {differ:#?}", one.events, two.events);
        }
    }
}
