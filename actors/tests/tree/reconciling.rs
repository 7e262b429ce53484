//! What earlier owners left.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use matchlock_actors::db_writer::Store;
use matchlock_actors::reconciler::{Outcome, Target};
use matchlock_host::fault::Fault;
use matchlock_host::firewall::FirewallOp;
use matchlock_host::owner_lock::OwnerLocks as _;
use matchlock_host::process::Processes as _;
use matchlock_host::rootfs::{Rootfs as _, RootfsFault, RootfsOp};
use matchlock_model::id::{InstallId, Mark, VmId};
use matchlock_model::identity::Namespaces;
use matchlock_model::phase::Phase;
use matchlock_model::reconcile::Goal;
use matchlock_model::record::Resources;
use matchlock_store::{DbFault, NewVm, WriteError, WriteOp, WriteOutcome};

use super::world::World;

/// A VM whose owner was killed: row, files, hypervisor; no lock.
pub(crate) async fn crashed(world: &World, number: u32) -> VmId {
    crashed_as(world, number, false).await
}

pub(crate) async fn crashed_as(world: &World, number: u32, ephemeral: bool) -> VmId {
    let vm = VmId::new(number);
    let record = NewVm {
        id: vm,
        image: "fake".into(),
        config_json: "{}".into(),
        owner: world.processes.own_identity().unwrap(),
        namespaces: world.processes.own_namespaces().unwrap(),
        ephemeral,
        backend: "fake".into(),
        resources: Resources::default(),
        created_at: jiff::Timestamp::now(),
    };
    world.deps.db.write(WriteOp::InsertVm { record: Box::new(record) }).await.unwrap();
    remains(world, vm).await;
    vm
}

async fn remains(world: &World, vm: VmId) {
    let paths = world.paths(vm);
    world.rootfs.create_dir(&paths).await.unwrap();
    world.rootfs.create_disk(&paths, 64).await.unwrap();
    world.rootfs.add_file(&paths.link_socket());
    world.processes.add(Some(world.deps.mark(vm)), Some(paths.dir));
}

#[tokio::test]
async fn gc_cleans_and_rm_removes() {
    let world = World::new().await;
    let vm = crashed(&world, 7).await;
    let reports = world.reconcile(Target::All, Goal::Clean).await;
    let expected = ["machine_close", "sockets_remove", "rootfs_remove"].map(str::to_owned);
    assert_eq!(reports[0].outcome, Outcome::Cleaned { removed: expected.to_vec() });
    assert_eq!(world.phases(vm).await, [Phase::Creating, Phase::Cleaning, Phase::Cleaned]);
    let paths = world.paths(vm);
    assert_eq!(world.rootfs.existing(), [paths.dir.clone(), paths.logs()]);
    let again = world.reconcile(Target::All, Goal::Clean).await;
    assert_eq!(again[0].outcome, Outcome::Cleaned { removed: Vec::new() });
    world.reconcile(Target::One(vm), Goal::Remove).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn gc_removes_what_was_to_go_with_its_command() {
    let world = World::new().await;
    crashed_as(&world, 7, true).await;
    world.reconcile(Target::All, Goal::Clean).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn what_has_an_owner_is_left_alone() {
    let world = World::new().await;
    let vm = crashed(&world, 7).await;
    let held = world.locks.try_acquire(vm).unwrap();
    let reports = world.reconcile(Target::All, Goal::Remove).await;
    assert_eq!(reports[0].outcome, Outcome::Running);
    assert!(world.processes.kills().is_empty());
    drop(held);
    world.reconcile(Target::All, Goal::Remove).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn what_has_no_row_is_swept_and_what_is_not_ours_is_not() {
    let world = World::new().await;
    remains(&world, VmId::new(7)).await;
    let foreign = Mark { install: InstallId::from_bytes([9; 8]), vm: VmId::new(7) };
    let stranger = world.processes.add(Some(foreign), None);
    let reports = world.reconcile(Target::All, Goal::Clean).await;
    assert!(matches!(&reports[0].outcome, Outcome::Cleaned { removed } if removed.len() == 4));
    assert_eq!(world.rootfs.existing(), Vec::<std::path::PathBuf>::new());
    assert!(world.processes.is_alive(&stranger).unwrap());
    world.processes.end(&stranger);
    world.shutdown().await;
}

#[tokio::test]
async fn what_could_not_be_looked_at_is_not_clean() {
    let world = World::new().await;
    let vm = crashed(&world, 7).await;
    world.rootfs.set_fault(RootfsOp::Observe, Some(RootfsFault::Fails));
    let reports = world.reconcile(Target::One(vm), Goal::Remove).await;
    assert!(matches!(&reports[0].outcome, Outcome::Failed { step, .. } if step == "observe"));
    assert!(world.deps.reader.vm(vm).await.unwrap().is_some());
    world.shutdown().await;
}

#[tokio::test]
async fn a_process_that_cannot_be_killed_keeps_everything() {
    let world = World::new().await;
    let vm = crashed(&world, 7).await;
    let pid = world.processes.find_marked().unwrap()[0].identity.pid;
    world.processes.set_refused(pid, true);
    let reports = world.reconcile(Target::One(vm), Goal::Remove).await;
    assert!(
        matches!(&reports[0].outcome, Outcome::Failed { step, removed, .. }
            if step == "machine_close" && removed.is_empty()),
        "{reports:?}"
    );
    let head = world.deps.reader.lifecycle_head(vm).await.unwrap().unwrap();
    assert_eq!(head.phase, Phase::CleanupFailed);
    assert!(head.cleanup["machine_close"].error.is_some());
    assert!(world.rootfs.existing().contains(&world.paths(vm).rootfs()));
    world.processes.set_refused(pid, false);
    world.reconcile(Target::One(vm), Goal::Remove).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_pid_of_another_namespace_means_nothing_here() {
    let world = World::new().await;
    let vm = crashed(&world, 7).await;
    let hypervisor = world.processes.find_marked().unwrap()[0].identity.clone();
    let op = WriteOp::SetHypervisor {
        vm,
        epoch: matchlock_model::id::OwnerEpoch::FIRST,
        hypervisor: matchlock_model::identity::ProcessIdentity { pid: 4242, ..hypervisor },
        started: matchlock_model::record::Started::Booted,
        at: jiff::Timestamp::now(),
    };
    world.deps.db.write(op).await.unwrap();
    world.processes.set_namespaces(Namespaces { net: "1:1".into(), pid: "9:9".into() });
    let reports = world.reconcile(Target::One(vm), Goal::Remove).await;
    assert!(
        matches!(&reports[0].outcome, Outcome::Failed { error, .. } if error.contains("namespace")),
        "{reports:?}"
    );
    assert!(world.processes.kills().is_empty());
    world.shutdown().await;
}

#[tokio::test]
async fn a_take_over_fences_the_old_owner() {
    let world = World::new().await;
    let vm = crashed(&world, 7).await;
    world.reconcile(Target::One(vm), Goal::Clean).await;
    let late = WriteOp::SetPhase {
        vm,
        epoch: matchlock_model::id::OwnerEpoch::FIRST,
        phase: Phase::Cleaned,
        last_error: Some("an old owner woke up".into()),
        backend: None,
        resources: None,
        cleanup: Vec::new(),
        at: jiff::Timestamp::now(),
    };
    let refused = world.deps.db.write(late).await.unwrap_err();
    assert!(refused.to_string().contains("owner"), "{refused}");
    world.shutdown().await;
}

static LOCKED: AtomicBool = AtomicBool::new(false);
static TRIES: AtomicUsize = AtomicUsize::new(0);

/// A database that another process locks, while it is told so.
struct Locked(Box<dyn Store>);

impl Store for Locked {
    fn apply(&mut self, ops: Vec<WriteOp>) -> Vec<Result<WriteOutcome, WriteError>> {
        if !LOCKED.load(Ordering::Relaxed) {
            return self.0.apply(ops);
        }
        TRIES.fetch_add(1, Ordering::Relaxed);
        let busy = WriteError::Database {
            path: "/h/state.db".into(),
            fault: DbFault::Busy,
            message: "database is locked".into(),
        };
        vec![Err(busy); ops.len()]
    }
}

#[tokio::test]
async fn a_locked_database_is_waited_for_once_and_told_once() {
    let world = World::with_store(|store| Box::new(Locked(store))).await;
    let vm = crashed(&world, 7).await;
    LOCKED.store(true, Ordering::Relaxed);
    let reports = world.reconcile(Target::One(vm), Goal::Remove).await;
    let Outcome::Failed { removed, step, error } = &reports[0].outcome else {
        panic!("{reports:?}");
    };
    assert_eq!((removed.len(), step.as_str()), (0, "record"));
    assert_eq!(error.matches("held its lock for too long").count(), 1, "{error}");
    assert!(error.contains("/h/state.db"), "{error}");
    assert_eq!(TRIES.load(Ordering::Relaxed), 1, "each try waits for the lock");
    LOCKED.store(false, Ordering::Relaxed);
    world.reconcile(Target::One(vm), Goal::Remove).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

/// What fails for a moment is removed all the same; what fails for good keeps its record, with the step.
#[tokio::test]
async fn a_removal_that_fails_for_a_moment_is_tried_again() {
    let world = World::new().await;
    let vm = crashed(&world, 7).await;
    world.rootfs.set_fault(RootfsOp::RemoveDisk, Some(RootfsFault::Fails));
    let heals = async {
        while world.rootfs.calls().iter().filter(|op| **op == RootfsOp::RemoveDisk).count() < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        world.rootfs.set_fault(RootfsOp::RemoveDisk, None);
    };
    let (reports, ()) = tokio::join!(world.reconcile(Target::One(vm), Goal::Remove), heals);
    assert!(matches!(reports[0].outcome, Outcome::Cleaned { .. }), "{reports:?}");
    world.assert_nothing_left().await;
    world.shutdown().await;
}

/// What cannot be removed keeps its record and its step; what does not depend on it goes all the same.
#[tokio::test]
async fn a_removal_that_fails_keeps_no_other_from_being_tried() {
    let world = World::new().await;
    let vm = crashed(&world, 7).await;
    let mark = world.deps.mark(vm).to_string();
    let table = "inet matchlock_fc-00000007";
    world.firewall.add_table(table, Some(&mark));
    world.firewall.set_fault(FirewallOp::Remove, Some(Fault::Fails));
    let reports = world.reconcile(Target::One(vm), Goal::Remove).await;
    let Outcome::Failed { removed, step, .. } = &reports[0].outcome else { panic!("{reports:?}") };
    assert_eq!(step, "nftables_cleanup");
    assert_eq!(*removed, ["machine_close", "sockets_remove", "rootfs_remove"]);
    // But not its directory, and it is not called cleaned.
    assert!(world.rootfs.existing().contains(&world.paths(vm).dir));
    let head = world.deps.reader.lifecycle_head(vm).await.unwrap().unwrap();
    assert_eq!(head.phase, Phase::CleanupFailed);
    assert!(head.last_error.starts_with("nftables_cleanup: "), "{}", head.last_error);
    assert_eq!(world.firewall.existing(), [table]);
    world.firewall.set_fault(FirewallOp::Remove, None);
    world.reconcile(Target::One(vm), Goal::Remove).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}
