//! What happened, in order, and its hash: two runs of a seed must not differ.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How many of the last events are kept for whoever reads a failure.
const KEPT: usize = 300;

/// What happened.
#[derive(Debug)]
pub(crate) struct Trace {
    inner: Mutex<Inner>,
    began: tokio::time::Instant,
}

#[derive(Debug)]
struct Inner {
    hash: u64,
    events: u64,
    last: VecDeque<(Duration, String)>,
    /// How many of them are kept: all, when one seed is replayed.
    kept: usize,
    broken: Vec<String>,
    /// How often what happened, to see that a simulation does not run idle.
    tally: std::collections::BTreeMap<String, u64>,
}

/// What is left of a run.
#[derive(Debug, Clone, Default)]
pub(crate) struct Summary {
    pub(crate) hash: u64,
    pub(crate) events: u64,
    pub(crate) broken: Vec<String>,
    pub(crate) last: Vec<String>,
    pub(crate) tally: std::collections::BTreeMap<String, u64>,
}

impl Trace {
    /// Begins now; within a runtime, whose time it tells.
    pub(crate) fn new(all: bool) -> Self {
        let inner = Inner {
            hash: 0xCBF2_9CE4_8422_2325,
            events: 0,
            last: VecDeque::new(),
            kept: if all { usize::MAX } else { KEPT },
            broken: Vec::new(),
            tally: std::collections::BTreeMap::new(),
        };
        Self { inner: Mutex::new(inner), began: tokio::time::Instant::now() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes an event.
    pub(crate) fn note(&self, event: impl fmt::Display) {
        let at = self.began.elapsed();
        let event = event.to_string();
        let mut inner = self.inner();
        inner.events += 1;
        // FNV-1a, over the time too.
        let time = at.as_nanos().to_le_bytes();
        for byte in time.iter().chain(event.as_bytes()) {
            inner.hash = (inner.hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3);
        }
        if inner.last.len() == inner.kept {
            inner.last.pop_front();
        }
        inner.last.push_back((at, event));
    }

    /// Counts something.
    pub(crate) fn count(&self, what: impl Into<String>) {
        *self.inner().tally.entry(what.into()).or_default() += 1;
    }

    /// A law was broken.
    pub(crate) fn broken(&self, law: impl fmt::Display) {
        let law = law.to_string();
        self.note(format_args!("BROKEN: {law}"));
        self.inner().broken.push(law);
    }

    pub(crate) fn is_broken(&self) -> bool {
        !self.inner().broken.is_empty()
    }

    pub(crate) fn summary(&self) -> Summary {
        let inner = self.inner();
        let line = |(at, event): &(Duration, String)| format!("{:>12.6} {event}", at.as_secs_f64());
        Summary {
            hash: inner.hash,
            events: inner.events,
            broken: inner.broken.clone(),
            last: inner.last.iter().map(line).collect(),
            tally: inner.tally.clone(),
        }
    }
}
