//! The phases that a VM went through, for those who follow it.
//!
//! The view tells where a VM is; of two changes at once it tells the last. This tells each.
//!
//! # Invariants
//! 1. A phase is told after its record is committed.
//! 2. At most [`KEPT`] are kept, the latest; a life has about ten.

use std::sync::Arc;

use matchlock_model::failure::Failure;
use matchlock_model::id::Generation;
use matchlock_model::phase::Phase;
use tokio::sync::watch;

/// How many are kept.
const KEPT: usize = 64;

/// A phase that a VM has come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PhaseChange {
    /// How many came before.
    pub number: u64,
    /// The phase.
    pub phase: Phase,
    /// The life of the VM's actor that came to it.
    pub generation: Generation,
    /// Why, if it was not simply the next one.
    pub cause: Option<Failure>,
}

/// Tells phases.
#[derive(Debug)]
pub(super) struct PhaseLog(watch::Sender<Arc<[PhaseChange]>>);

impl PhaseLog {
    /// Begins with this phase.
    pub(super) fn new(phase: Phase) -> Self {
        let first =
            PhaseChange { number: 0, phase, generation: Generation::default(), cause: None };
        Self(watch::Sender::new(Arc::new([first])))
    }

    /// Adds a phase, unless nothing has changed.
    pub(super) fn add(&self, phase: Phase, generation: Generation, cause: Option<Failure>) {
        self.0.send_if_modified(|log| {
            let Some(last) = log.last() else { return false };
            if (last.phase, last.generation, &last.cause) == (phase, generation, &cause) {
                return false;
            }
            let next = PhaseChange { number: last.number + 1, phase, generation, cause };
            let from = (log.len() + 1).saturating_sub(KEPT);
            *log = log[from..].iter().cloned().chain([next]).collect();
            true
        });
    }

    /// Follows them.
    pub(super) fn follow(&self) -> PhaseFollower {
        PhaseFollower { log: self.0.subscribe(), next: 0 }
    }
}

/// Follows the phases of a VM, from its first.
#[derive(Debug, Clone)]
pub struct PhaseFollower {
    log: watch::Receiver<Arc<[PhaseChange]>>,
    next: u64,
}

impl PhaseFollower {
    /// Follows nobody: there is no next change. For what stands in for a fleet.
    #[must_use]
    pub fn of_nobody() -> Self {
        Self { log: watch::Sender::new(Arc::default()).subscribe(), next: 0 }
    }

    /// The next change; `None` when there will be none. Dropping this loses nothing.
    pub async fn next(&mut self) -> Option<PhaseChange> {
        let from = self.next;
        let is_new = |change: &PhaseChange| change.number >= from;
        let found = self.log.wait_for(|log| log.last().is_some_and(is_new)).await;
        let change = match found {
            Ok(log) => log.iter().find(|change| is_new(change)).cloned(),
            // The last value is looked at too, although its sender is gone.
            Err(_) => None,
        }?;
        self.next = change.number + 1;
        Some(change)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_phase_is_told_once_also_to_who_comes_late() {
        let log = PhaseLog::new(Phase::Creating);
        let mut early = log.follow();
        let life = Generation::default();
        log.add(Phase::Created, life, None);
        log.add(Phase::Created, life, None);
        log.add(Phase::Created, life.next(), None);
        log.add(Phase::Starting, life.next(), None);
        let mut late = log.follow();
        drop(log);
        for follower in [&mut early, &mut late] {
            let mut seen = Vec::new();
            while let Some(change) = follower.next().await {
                seen.push((change.number, change.phase, change.generation));
            }
            let expected = [
                (0, Phase::Creating, life),
                (1, Phase::Created, life),
                (2, Phase::Created, life.next()),
                (3, Phase::Starting, life.next()),
            ];
            assert_eq!(seen, expected);
        }
    }

    #[tokio::test]
    async fn the_latest_are_kept() {
        let log = PhaseLog::new(Phase::Creating);
        let mut life = Generation::default();
        for _ in 0..200 {
            life = life.next();
            log.add(Phase::Running, life, None);
        }
        let mut follower = log.follow();
        drop(log);
        let mut seen = Vec::new();
        while let Some(change) = follower.next().await {
            seen.push(change.number);
        }
        assert_eq!(seen, (201 - KEPT as u64..=200).collect::<Vec<_>>());
    }
}
