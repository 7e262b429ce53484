//! Snapshots in memory, for tests of what is built on [`Snapshots`].
//!
//! Clones share them. [`FakeSnapshots::in_process`] makes a clone whose claims and leases are those of
//! a process, and end with it, whoever still has them; what it was just making is left.

use std::any::Any;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use matchlock_model::identity::ProcessIdentity;

use super::record::{self, key};
use super::{Draft, Lease, Snapshot, SnapshotError, Snapshots, Wanted};
use crate::hypervisor::Saved;

/// One that was published.
#[derive(Debug)]
struct Shown {
    wanted: Wanted,
    memory: File,
    saved: Saved,
    /// Its guest was replaced.
    outdated: bool,
}

/// What somebody holds: the claim, or a lease.
#[derive(Debug)]
struct Holding {
    token: u64,
    of: Option<ProcessIdentity>,
}

#[derive(Debug, Default)]
struct State {
    /// By name.
    shown: BTreeMap<String, Shown>,
    claim: Option<Holding>,
    /// With the names of what they are on.
    leases: Vec<(Holding, String)>,
    /// What has no maker any more.
    half_made: bool,
    tokens: u64,
}

impl State {
    fn token(&mut self) -> u64 {
        self.tokens += 1;
        self.tokens
    }

    fn is_claim(&self, token: u64) -> bool {
        self.claim.as_ref().is_some_and(|claim| claim.token == token)
    }

    fn is_leased(&self, name: &str) -> bool {
        self.leases.iter().any(|(_, of)| of == name)
    }
}

/// Snapshots in memory. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct FakeSnapshots {
    state: Arc<Mutex<State>>,
    process: Option<ProcessIdentity>,
}

/// Keeps others from making one, or one from being removed, until it is dropped.
#[derive(Debug)]
struct Held {
    snapshots: FakeSnapshots,
    token: u64,
}

impl Lease for Held {}

impl Drop for Held {
    fn drop(&mut self) {
        let mut state = self.snapshots.lock();
        state.claim.take_if(|claim| claim.token == self.token);
        state.leases.retain(|(lease, _)| lease.token != self.token);
    }
}

fn io_error(error: io::Error) -> SnapshotError {
    SnapshotError::io("use", Path::new("memory"), error)
}

impl FakeSnapshots {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same, as another process sees them.
    #[must_use]
    pub fn in_process(&self, process: ProcessIdentity) -> Self {
        Self { process: Some(process), ..self.clone() }
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.lock().shown.len()
    }

    fn try_claim(&self) -> Option<Held> {
        let mut state = self.lock();
        if state.claim.is_some() {
            return None;
        }
        let token = state.token();
        state.claim = Some(Holding { token, of: self.process.clone() });
        Some(Held { snapshots: self.clone(), token })
    }

    /// Makes one, as far as others can see, until it is dropped.
    ///
    /// # Panics
    /// When another is being made.
    #[must_use]
    pub fn claim(&self) -> impl Drop + use<> {
        match self.try_claim() {
            Some(claim) => claim,
            None => panic!("another one is being made"),
        }
    }

    /// Whether one is being made.
    #[must_use]
    pub fn is_claimed(&self) -> bool {
        self.lock().claim.is_some()
    }

    /// Whether this process makes one.
    #[must_use]
    pub fn is_claimed_by(&self, process: &ProcessIdentity) -> bool {
        self.lock().claim.as_ref().is_some_and(|claim| claim.of.as_ref() == Some(process))
    }

    /// The process that makes one, if it is known.
    #[must_use]
    pub fn claimed_by(&self) -> Option<ProcessIdentity> {
        self.lock().claim.as_ref().and_then(|claim| claim.of.clone())
    }

    /// Whether this process keeps one from being removed.
    #[must_use]
    pub fn is_leased_by(&self, process: &ProcessIdentity) -> bool {
        self.lock().leases.iter().any(|(lease, _)| lease.of.as_ref() == Some(process))
    }

    /// Whether something is left whose maker is gone.
    #[must_use]
    pub fn is_half_made(&self) -> bool {
        self.lock().half_made
    }

    /// Damages all that are there.
    pub fn damage(&self) {
        for shown in self.lock().shown.values_mut() {
            shown.saved.sha256 = "damaged".to_owned();
        }
    }

    /// Replaces the guest of all that are there.
    pub fn outdate(&self) {
        self.lock().shown.values_mut().for_each(|shown| shown.outdated = true);
    }

    /// The process has ended: the kernel takes its locks, and nobody removes what it was making.
    pub fn end_process(&self, process: &ProcessIdentity) {
        let mut state = self.lock();
        state.leases.retain(|(lease, _)| lease.of.as_ref() != Some(process));
        if state.claim.take_if(|claim| claim.of.as_ref() == Some(process)).is_some() {
            state.half_made = true;
        }
    }

    /// Ends one so that half of it is left, as when it cannot be removed.
    pub fn leave(&self, draft: Draft) {
        let claim = draft.claim.downcast_ref::<Held>().map(|claim| claim.token);
        let mut state = self.lock();
        if claim.is_some_and(|token| state.is_claim(token)) {
            state.claim = None;
            state.half_made = true;
        }
        // Dropped, the draft looks at the state.
        drop(state);
        drop(draft);
    }

    /// Ends one as the death of its process does in the middle of its publication: the older one is
    /// gone, and this one is not there.
    pub fn leave_in_the_middle(&self, draft: Draft) {
        {
            let mut state = self.lock();
            let name = key(&draft.wanted);
            if !state.is_leased(&name) {
                state.shown.remove(&name);
            }
        }
        self.leave(draft);
    }
}

#[async_trait]
impl Snapshots for FakeSnapshots {
    async fn find(&self, wanted: &Wanted) -> Result<Option<Snapshot>, SnapshotError> {
        let name = key(wanted);
        let mut state = self.lock();
        let (memory, saved) = match state.shown.get(&name) {
            None => return Ok(None),
            Some(shown) if shown.outdated => {
                return Err(SnapshotError::Stale { key: name, what: "its guest was replaced" });
            }
            Some(shown) if shown.wanted != *wanted => {
                return Err(SnapshotError::Stale {
                    key: name,
                    what: "it is of another hypervisor",
                });
            }
            Some(shown) => (shown.memory.try_clone().map_err(io_error)?, shown.saved.clone()),
        };
        let token = state.token();
        state.leases.push((Holding { token, of: self.process.clone() }, name));
        let lease = Held { snapshots: self.clone(), token };
        Ok(Some(Snapshot {
            memory: Arc::new(memory),
            key: key(wanted),
            saved,
            lease: Some(Box::new(lease)),
        }))
    }

    async fn check(&self, snapshot: &Snapshot) -> Result<(), SnapshotError> {
        record::check(&snapshot.memory, &snapshot.saved)
    }

    async fn begin(&self, wanted: &Wanted) -> Result<Draft, SnapshotError> {
        let claim = self.try_claim();
        let claim = claim.ok_or_else(|| SnapshotError::Busy { dir: "memory".into() })?;
        self.lock().half_made = false;
        let memory = tempfile::tempfile().map_err(io_error)?;
        let claim: Box<dyn Any + Send + Sync> = Box::new(claim);
        Ok(Draft { memory, wanted: wanted.clone(), room: None, claim })
    }

    async fn publish(&self, draft: Draft, saved: Saved) -> Result<(), SnapshotError> {
        let mut memory = draft.file()?;
        io::Seek::rewind(&mut memory).map_err(io_error)?;
        let (name, wanted) = (key(&draft.wanted), draft.wanted.clone());
        let claim = draft.claim.downcast_ref::<Held>().map(|claim| claim.token);
        let mut state = self.lock();
        if !claim.is_some_and(|token| state.is_claim(token)) {
            return Err(SnapshotError::Removed { dir: "memory".into() });
        }
        if state.is_leased(&name) {
            return Err(SnapshotError::InUse { key: name });
        }
        state.shown.insert(name, Shown { wanted, memory, saved, outdated: false });
        Ok(())
    }

    async fn discard(&self, draft: Draft) -> Result<(), SnapshotError> {
        drop(draft);
        Ok(())
    }

    async fn withdraw(&self, snapshot: Snapshot) -> Result<(), SnapshotError> {
        let Snapshot { key, lease, saved, .. } = snapshot;
        drop(lease);
        let mut state = self.lock();
        let is_used = state.leases.iter().any(|(_, name)| *name == key);
        if !is_used && state.shown.get(&key).is_some_and(|shown| shown.saved == saved) {
            state.shown.remove(&key);
        }
        Ok(())
    }

    async fn sweep(&self) -> Result<usize, SnapshotError> {
        let mut state = self.lock();
        if state.claim.is_some() {
            return Ok(0);
        }
        let before = state.shown.len();
        let leased: Vec<_> = state.leases.iter().map(|(_, name)| name.clone()).collect();
        state.shown.retain(|name, shown| !shown.outdated || leased.contains(name));
        let removed = before - state.shown.len();
        Ok(removed + usize::from(std::mem::take(&mut state.half_made)))
    }
}
