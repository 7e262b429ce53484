//! Snapshots in memory, for tests of what is built on [`Snapshots`].

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;

use super::record::key;
use super::{Draft, Snapshot, SnapshotError, Snapshots, Wanted};
use crate::hypervisor::Saved;

/// Those that were published, by name.
type Shown = BTreeMap<String, (Wanted, Arc<File>, Saved)>;

/// Snapshots in memory. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct FakeSnapshots {
    state: Arc<Mutex<Shown>>,
    claim: Arc<tokio::sync::Mutex<()>>,
}

impl FakeSnapshots {
    fn lock(&self) -> MutexGuard<'_, Shown> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    /// Makes one, as far as others can see, until it is dropped.
    ///
    /// # Panics
    /// When another is being made.
    #[must_use]
    pub fn claim(&self) -> impl Drop + use<> {
        match Arc::clone(&self.claim).try_lock_owned() {
            Ok(claim) => claim,
            Err(_) => panic!("another one is being made"),
        }
    }

    /// Whether one is being made.
    #[must_use]
    pub fn is_claimed(&self) -> bool {
        self.claim.try_lock().is_err()
    }

    /// Damages all that are there.
    pub fn damage(&self) {
        for (_, _, saved) in self.lock().values_mut() {
            saved.sha256 = "damaged".to_owned();
        }
    }
}

#[async_trait]
impl Snapshots for FakeSnapshots {
    async fn find(&self, wanted: &Wanted) -> Result<Option<Snapshot>, SnapshotError> {
        let key = key(wanted);
        match self.lock().get(&key) {
            None => Ok(None),
            Some((made, memory, saved)) if made == wanted => Ok(Some(Snapshot {
                memory: Arc::clone(memory),
                key,
                saved: saved.clone(),
                lease: None,
            })),
            Some(_) => Err(SnapshotError::Stale { key, what: "it is of another hypervisor" }),
        }
    }

    async fn begin(&self, wanted: &Wanted) -> Result<Draft, SnapshotError> {
        let claim = Arc::clone(&self.claim).try_lock_owned();
        let claim = claim.map_err(|_| SnapshotError::Busy { dir: "memory".into() })?;
        let memory = tempfile::tempfile();
        let memory = memory.map_err(|e| SnapshotError::io("make", Path::new("memory"), e))?;
        Ok(Draft { memory, wanted: wanted.clone(), room: None, _claim: Box::new(claim) })
    }

    async fn publish(&self, draft: Draft, saved: Saved) -> Result<(), SnapshotError> {
        let Draft { mut memory, wanted, .. } = draft;
        io::Seek::rewind(&mut memory)
            .map_err(|e| SnapshotError::io("read", Path::new("memory"), e))?;
        self.lock().insert(key(&wanted), (wanted, Arc::new(memory), saved));
        Ok(())
    }

    async fn discard(&self, snapshot: Snapshot) -> Result<(), SnapshotError> {
        let mut shown = self.lock();
        if shown
            .get(&snapshot.key)
            .is_some_and(|(_, memory, _)| Arc::ptr_eq(memory, &snapshot.memory))
        {
            shown.remove(&snapshot.key);
        }
        Ok(())
    }

    async fn sweep(&self) -> Result<usize, SnapshotError> {
        Ok(0)
    }
}
