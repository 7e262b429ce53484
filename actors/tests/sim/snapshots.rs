//! Snapshots of the host, and the laws about them.
//!
//! # Laws
//! 1. Only a guest on hold is saved, and only what was saved whole is shown.
//! 2. No guest goes on from what was not shown, or was damaged when it was found.
//! 3. Who launches a template has the claim; who has none that lives has no claim.
//! 4. A dead process keeps nobody out.
//! 5. A template never runs, and nobody gets a link to its guest.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use matchlock_host::hypervisor::{Saved, Start};
use matchlock_host::snapshot::{Draft, Snapshot, SnapshotError, Snapshots, Wanted};
use matchlock_model::id::VmId;
use tokio::time::sleep;

use super::faults::Act;
use super::host::Host;
use super::machine::Guest;
use super::world::{Proc, Sim, lock};

/// What the laws need to remember.
#[derive(Debug, Default)]
pub(crate) struct SnapshotLaws {
    /// What was saved last into a file, by its inode.
    saves: BTreeMap<u64, Save>,
    /// What was found, and whether it was whole then.
    found: Vec<(Arc<File>, bool)>,
    /// VMs whose machine was launched to be saved.
    templates: BTreeSet<VmId>,
    /// How many templates of a process may still be there.
    expected: BTreeMap<i32, u32>,
    /// How many drafts of a process are just being discarded.
    discards: BTreeMap<i32, u32>,
    dead: BTreeSet<i32>,
    /// Of the hypervisor, which is upgraded now and then.
    pub(crate) version: u32,
}

/// A machine that is written into a file.
#[derive(Debug, Clone, Copy)]
struct Save {
    vm: VmId,
    /// The process whose machine it is.
    pid: i32,
    whole: bool,
}

fn inode(file: &File) -> u64 {
    file.metadata().unwrap().ino()
}

fn fails(source: io::Error) -> SnapshotError {
    SnapshotError::Io { doing: "work on", path: PathBuf::from("/fake/snapshots"), source }
}

/// A draft that is being discarded.
struct Discarding(Arc<Proc>);

impl Discarding {
    fn begin(of: &Arc<Proc>) -> Self {
        *lock(&of.sim.snapshot_laws).discards.entry(of.pid).or_default() += 1;
        Self(Arc::clone(of))
    }
}

impl Drop for Discarding {
    fn drop(&mut self) {
        *lock(&self.0.sim.snapshot_laws).discards.entry(self.0.pid).or_default() -= 1;
    }
}

#[async_trait]
impl Snapshots for Host {
    async fn find(&self, wanted: &Wanted) -> Result<Option<Snapshot>, SnapshotError> {
        let snapshots = self.snapshots();
        let work = || -> BoxFuture<'_, _> {
            async {
                let found = snapshots.find(wanted).await?;
                if let Some(snapshot) = &found {
                    let whole = snapshots.check(snapshot).await.is_ok();
                    self.0.sim.note_found(snapshot, whole);
                }
                Ok(found)
            }
            .boxed()
        };
        self.0.act(Act::FindSnapshot, None, work, fails).await
    }

    async fn check(&self, snapshot: &Snapshot) -> Result<(), SnapshotError> {
        let work = || self.0.sim.snapshots.check(snapshot);
        self.0.act(Act::CheckSnapshot, None, work, fails).await
    }

    async fn begin(&self, wanted: &Wanted) -> Result<Draft, SnapshotError> {
        let snapshots = self.snapshots();
        let work = || -> BoxFuture<'_, _> {
            async {
                let begun = snapshots.begin(wanted).await;
                match &begun {
                    Ok(draft) => {
                        let inode = inode(&draft.file()?);
                        lock(&self.0.sim.snapshot_laws).saves.remove(&inode);
                    }
                    Err(_) => self.0.sim.check_busy(),
                }
                begun
            }
            .boxed()
        };
        self.0.act(Act::BeginSnapshot, None, work, fails).await
    }

    async fn publish(&self, draft: Draft, saved: Saved) -> Result<(), SnapshotError> {
        let file = draft.file()?;
        let vm = lock(&self.0.sim.snapshot_laws).saves.get(&inode(&file)).map(|save| save.vm);
        let draft = Mutex::new(Some(draft));
        let work = || -> BoxFuture<'_, _> {
            let (draft, saved) = (lock(&draft).take().expect("it is done once"), saved.clone());
            async move { self.show(draft, saved).await }.boxed()
        };
        self.0.act(Act::Publish, vm, work, fails).await
    }

    async fn withdraw(&self, snapshot: Snapshot) -> Result<(), SnapshotError> {
        let snapshots = self.snapshots();
        let snapshot = Mutex::new(Some(snapshot));
        let work = || -> BoxFuture<'_, _> {
            let snapshot = lock(&snapshot).take().expect("it is done once");
            self.0.sim.trace.count("withdrawn");
            snapshots.withdraw(snapshot)
        };
        self.0.act(Act::Withdraw, None, work, fails).await
    }

    async fn discard(&self, draft: Draft) -> Result<(), SnapshotError> {
        let _under_way = Discarding::begin(&self.0);
        let snapshots = self.snapshots();
        let draft = Mutex::new(Some(draft));
        let work = || -> BoxFuture<'_, _> {
            let draft = lock(&draft).take().expect("it is done once");
            snapshots.discard(draft)
        };
        let discarded = self.0.act(Act::Discard, None, work, fails).await;
        // What could not be removed is left; the lock ends all the same.
        let left = lock(&draft).take();
        if let Some(draft) = left {
            self.0.sim.trace.count("half a snapshot is left");
            self.0.sim.snapshots.leave(draft);
        }
        discarded
    }

    async fn sweep(&self) -> Result<usize, SnapshotError> {
        let snapshots = self.snapshots();
        let work = || -> BoxFuture<'_, _> {
            async {
                let before = snapshots.is_half_made();
                let swept = snapshots.sweep().await;
                if before && !snapshots.is_half_made() {
                    self.0.sim.trace.count("half a snapshot is swept");
                }
                swept
            }
            .boxed()
        };
        self.0.act(Act::Sweep, None, work, fails).await
    }
}

impl Host {
    fn snapshots(&self) -> matchlock_host::snapshot::FakeSnapshots {
        self.0.sim.snapshots.in_process(self.0.identity.clone())
    }

    /// Shows one; now and then its process dies in the middle, or what it shows is damaged.
    async fn show(&self, draft: Draft, saved: Saved) -> Result<(), SnapshotError> {
        let sim = &self.0.sim;
        sim.check_shown(self.0.pid, &draft);
        let is_fatal = {
            let plan = lock(&sim.plan);
            plan.on && plan.target.is_none() && sim.rng().chance(5)
        };
        if is_fatal {
            sim.trace.count("died in a publication");
            sim.snapshots.leave_in_the_middle(draft);
            self.0.die();
            return std::future::pending().await;
        }
        let takes = sim.rng().up_to(Duration::from_millis(100));
        sleep(takes).await;
        self.0.gate().await;
        self.snapshots().publish(draft, saved).await?;
        sim.trace.count("saved");
        if sim.rng().chance(10) {
            sim.snapshots.damage();
        }
        Ok(())
    }
}

impl Sim {
    fn note_found(&self, snapshot: &Snapshot, whole: bool) {
        if !whole {
            self.trace.count("damaged is found");
        }
        lock(&self.snapshot_laws).found.push((Arc::clone(&snapshot.memory), whole));
    }

    /// A guest is being saved.
    pub(crate) fn note_save(&self, vm: VmId, pid: i32, guest: Guest, to: &File) {
        if guest != Guest::Held {
            self.trace
                .broken(format_args!("{vm} is saved by p{pid}, and is not on hold: {guest:?}"));
        }
        lock(&self.snapshot_laws).saves.insert(inode(to), Save { vm, pid, whole: false });
    }

    pub(crate) fn note_saved(&self, to: &File) {
        lock(&self.snapshot_laws).saves.entry(inode(to)).and_modify(|save| save.whole = true);
    }

    /// Law 1: a snapshot is about to be shown.
    fn check_shown(&self, pid: i32, draft: &Draft) {
        let save = lock(&self.snapshot_laws).saves.get(&inode(&draft.file().unwrap())).copied();
        match save {
            Some(Save { whole: true, pid: of, .. }) if of == pid => {}
            other => self.trace.broken(format_args!("p{pid} shows what was not saved: {other:?}")),
        }
    }

    /// Law 3: a machine is launched.
    pub(crate) fn check_start(&self, of: &Proc, vm: VmId, start: &Start) {
        let how = match start {
            Start::Boot => "boot",
            Start::Hold => "hold",
            Start::Restore(_) => "restore",
        };
        of.note(format_args!("{vm} is to {how}"));
        self.trace.count(format!("launch: {how}"));
        let is_template = matches!(start, Start::Hold);
        if is_template && !self.snapshots.is_claimed_by(&of.identity) {
            self.trace.broken(format_args!("{vm} is a template of p{}, without a claim", of.pid));
        }
        let mut laws = lock(&self.snapshot_laws);
        if is_template {
            laws.templates.insert(vm);
        } else {
            laws.templates.remove(&vm);
        }
    }

    /// Law 2: a guest that was restored goes on.
    pub(crate) fn check_goes_on(&self, vm: VmId, start: &Start) {
        let Start::Restore(memory) = start else {
            return self.trace.broken(format_args!("{vm} goes on, and was not restored"));
        };
        let laws = lock(&self.snapshot_laws);
        let found = laws.found.iter().find(|(of, _)| Arc::ptr_eq(of, memory));
        let found = found.map(|(_, whole)| *whole);
        drop(laws);
        if found != Some(true) {
            self.trace.broken(format_args!("{vm} goes on from what is whole: {found:?}"));
        }
    }

    /// Law 4: somebody else has the claim.
    fn check_busy(&self) {
        let dead: Vec<_> = lock(&self.snapshot_laws).dead.iter().copied().collect();
        if let Some(holder) = self.snapshots.claimed_by()
            && dead.contains(&holder.pid)
        {
            self.trace.broken(format_args!("the dead p{} has the claim", holder.pid));
        }
    }

    /// Law 5: a phase of a VM is recorded.
    pub(crate) fn check_runs(&self, vm: VmId) {
        if lock(&self.snapshot_laws).templates.contains(&vm) {
            self.trace.broken(format_args!("{vm} is a template, and runs"));
        }
    }

    /// An id begins anew.
    pub(crate) fn forget_template(&self, vm: VmId) {
        lock(&self.snapshot_laws).templates.remove(&vm);
    }

    pub(crate) fn expect_template(&self, pid: i32) {
        *lock(&self.snapshot_laws).expected.entry(pid).or_default() += 1;
    }

    /// A template of a process has settled, or was not created.
    pub(crate) fn check_unexpected(&self, of: &Proc, cleaned_up: bool) {
        let mut laws = lock(&self.snapshot_laws);
        let expected = laws.expected.entry(of.pid).or_default();
        *expected -= 1;
        let others = *expected;
        let discards = laws.discards.get(&of.pid).copied().unwrap_or_default();
        drop(laws);
        // What could not be ended is told in the view; when its process ends it has ended, see below.
        if others == 0 && discards == 0 && cleaned_up {
            self.check_no_claim(of);
        }
    }

    /// Law 3: no template of the process is there. What is just being shown is shown to its end, also when
    /// its template was given up meanwhile.
    pub(crate) fn check_no_claim(&self, of: &Proc) {
        if lock(&self.laws).is_under_way(of.pid, Act::Publish) {
            return;
        }
        if of.is_alive() && self.snapshots.is_claimed_by(&of.identity) {
            self.trace.broken(format_args!("p{} has no template, and the claim", of.pid));
        }
    }

    /// The process ends in order: nothing of a snapshot is its own any more.
    pub(crate) fn check_no_snapshot(&self, of: &Proc) {
        self.check_no_claim(of);
        if of.is_alive() && self.snapshots.is_leased_by(&of.identity) {
            self.trace.broken(format_args!("p{} has no VM, and a lease", of.pid));
        }
    }

    pub(crate) fn end_snapshots_of(&self, process: &Proc) {
        lock(&self.snapshot_laws).dead.insert(process.pid);
        let before = self.snapshots.is_half_made();
        self.snapshots.end_process(&process.identity);
        if !before && self.snapshots.is_half_made() {
            self.trace.count("half a snapshot is left");
        }
    }

    /// Something happens to what is there.
    pub(crate) fn disturb_snapshots(&self, what: u64) {
        match what {
            0 | 1 => self.snapshots.damage(),
            2 => self.snapshots.outdate(),
            _ => lock(&self.snapshot_laws).version += 1,
        }
        self.trace.note(format_args!("snapshots disturbed by {what}"));
    }
}
