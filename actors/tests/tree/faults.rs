//! Effects that fail, hang or come late.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use matchlock_host::guest_link::{FakeReadiness, LinkError};
use matchlock_host::hypervisor::{ExitReason, LaunchFault};
use matchlock_host::process::CpuShare;
use matchlock_host::rootfs::{RootfsFault, RootfsOp};
use matchlock_model::phase::Phase;
use matchlock_model::reconcile::Goal;
use matchlock_model::vm::StopMode;

use matchlock_actors::db_writer::{Store, WRITE_LIMIT};
use matchlock_actors::deps::Limits;
use matchlock_actors::reconciler::{Outcome, Target};
use matchlock_store::{WriteError, WriteOp, WriteOutcome};
use tokio::time::timeout;

use super::world::{Host, PATIENCE, World, lost, reaches, settled};

#[tokio::test]
async fn a_disk_that_cannot_be_made() {
    let world = World::new().await;
    world.rootfs.set_fault(RootfsOp::CreateDisk, Some(RootfsFault::Fails));
    let mut vm = world.create(true).await.unwrap();
    let view = settled(&mut vm).await;
    assert!(view.cause.is_some());
    let phases = world.phases(vm.id).await;
    assert_eq!(phases, [Phase::Creating, Phase::CreateFailed, Phase::Cleaning, Phase::Cleaned]);
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_hypervisor_that_cannot_be_launched() {
    for fault in [LaunchFault::Fails, LaunchFault::DiesAtOnce] {
        let world = World::new().await;
        world.hypervisor.set_launch_fault(Some(fault));
        let mut vm = world.create(false).await.unwrap();
        let view = settled(&mut vm).await;
        let cause = view.cause.unwrap();
        assert_eq!(view.phase, Phase::Cleaned);
        assert!(world.phases(vm.id).await.contains(&Phase::StartFailed));
        let head = world.deps.reader.lifecycle_head(vm.id).await.unwrap().unwrap();
        assert_eq!(head.last_error, cause.message, "the cause stays in the row");
        world.shutdown().await;
    }
}

#[tokio::test]
async fn a_stop_beats_whatever_hangs() {
    for hang in ["disk", "launch", "agent"] {
        let world = World::new().await;
        match hang {
            "disk" => world.rootfs.set_fault(RootfsOp::CreateDisk, Some(RootfsFault::Never)),
            "launch" => world.hypervisor.set_launch_fault(Some(LaunchFault::Never)),
            _ => world.connector.set_readiness(FakeReadiness::Never),
        }
        let mut vm = world.create(true).await.unwrap();
        let stuck_in = if hang == "disk" { Phase::Creating } else { Phase::Starting };
        reaches(&mut vm, |view| view.phase == stuck_in).await;
        world.stop(vm.id, StopMode::Graceful(Duration::from_secs(3600))).await.unwrap();
        let view = settled(&mut vm).await;
        assert_eq!((view.phase, view.cause), (Phase::Cleaned, None), "{hang}");
        world.assert_nothing_left().await;
        world.shutdown().await;
    }
}

#[tokio::test]
async fn an_agent_that_fails_is_told_with_the_console() {
    let world = World::new().await;
    world.connector.set_readiness(FakeReadiness::Fails(LinkError::Version { guest: 9, host: 1 }));
    let mut vm = world.create(true).await.unwrap();
    let cause = settled(&mut vm).await.cause.unwrap();
    assert!(cause.message.contains("version 9") && cause.message.contains("console"), "{cause}");
    world.assert_nothing_left().await;
    world.shutdown().await;
}

/// A guest that hangs is told from one that the host does not let run.
#[tokio::test]
async fn an_agent_that_never_gets_ready_on_a_busy_host_is_told_with_the_cpu_it_had() {
    let seconds = |had, waited| CpuShare {
        had: Duration::from_secs(had),
        waited: Duration::from_secs(waited),
    };
    for (share, is_busy) in [(seconds(3, 100), true), (seconds(100, 3), false)] {
        let world = World::new().await;
        world.processes.set_cpu_share(share);
        let late = LinkError::Timeout { what: "the handshake", waited: Duration::from_secs(120) };
        world.connector.set_readiness(FakeReadiness::Fails(late));
        let mut vm = world.create(true).await.unwrap();
        let cause = settled(&mut vm).await.cause.unwrap();
        let told = "had 3.0 s of CPU and waited 100.0 s for one: this host is busy";
        assert_eq!(cause.message.contains(told), is_busy, "{cause}");
        assert_eq!(cause.message.contains("busy"), is_busy, "{cause}");
        world.shutdown().await;
    }
}

/// One that hangs uses no CPU, and waits a little for one on any host.
#[tokio::test]
async fn a_guest_that_sleeps_for_ever_is_not_blamed_on_the_host() {
    let world = World::new().await;
    let (had, waited) = (Duration::ZERO, Duration::from_millis(50));
    world.processes.set_cpu_share(CpuShare { had, waited });
    world.hypervisor.set_launch_fault(Some(LaunchFault::Late(Duration::from_millis(300))));
    let late = LinkError::Timeout { what: "the handshake", waited: Duration::from_secs(120) };
    world.connector.set_readiness(FakeReadiness::Fails(late));
    let cause = settled(&mut world.create(true).await.unwrap()).await.cause.unwrap();
    assert!(cause.message.contains("never got ready"), "{cause}");
    assert!(!cause.message.contains("busy"), "{cause}");
    world.shutdown().await;
}

#[tokio::test]
async fn a_machine_that_ends_by_itself_is_told_with_its_reason() {
    let world = World::new().await;
    let mut vm = world.running(true).await;
    let reason = ExitReason::GuestPanic("Kernel panic - not syncing: x".into());
    world.hypervisor.machine(vm.id).unwrap().end(reason);
    let view = settled(&mut vm).await;
    assert!(view.cause.unwrap().message.contains("Kernel panic"));
    let stopping = world.deps.reader.history(vm.id).await.unwrap();
    let stopping = stopping.iter().find(|record| record.phase == Phase::Stopping).unwrap();
    assert!(stopping.last_error.contains("Kernel panic"));
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_link_that_cannot_be_begun_anew_ends_the_vm() {
    let world = World::new().await;
    let mut vm = world.running(true).await;
    world.connector.set_readiness(FakeReadiness::Fails(lost()));
    world.connector.lose(&lost());
    let view = settled(&mut vm).await;
    assert!(view.cause.unwrap().message.contains("a test cut it"));
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_hypervisor_that_does_not_die_keeps_everything() {
    let world = World::new().await;
    let mut vm = world.running(true).await;
    world.hypervisor.machine(vm.id).unwrap().set_immortal(true);
    world.stop(vm.id, StopMode::Force).await.unwrap();
    let view = settled(&mut vm).await;
    assert_eq!(view.phase, Phase::StopFailed);
    assert!(view.cause.is_some());
    assert!(world.rootfs.existing().contains(&world.paths(vm.id).rootfs()), "it may be in use");
    assert!(world.deps.reader.vm(vm.id).await.unwrap().is_some(), "the record is kept");
    world.lock_is_free(vm.id).await;

    // Later it can be ended, and the reconciler finishes.
    world.hypervisor.machine(vm.id).unwrap().set_immortal(false);
    let reports = world.reconcile(Target::All, Goal::Remove).await;
    assert!(matches!(reports[0].outcome, Outcome::Cleaned { .. }), "{reports:?}");
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_disk_that_cannot_be_removed_keeps_the_record_until_it_can() {
    for fault in [RootfsFault::Fails, RootfsFault::FailsAfterwards] {
        let world = World::new().await;
        let mut vm = world.running(true).await;
        world.rootfs.set_fault(RootfsOp::RemoveDisk, Some(fault));
        world.stop(vm.id, StopMode::Force).await.unwrap();
        let view = settled(&mut vm).await;
        assert_eq!(view.phase, Phase::CleanupFailed);
        world.lock_is_free(vm.id).await;
        let head = world.deps.reader.lifecycle_head(vm.id).await.unwrap().unwrap();
        assert_eq!(head.phase, Phase::CleanupFailed);
        assert!(!head.last_error.is_empty());

        world.rootfs.set_fault(RootfsOp::RemoveDisk, None);
        let reports = world.reconcile(Target::One(vm.id), Goal::Remove).await;
        assert!(matches!(reports[0].outcome, Outcome::Cleaned { .. }), "{reports:?}");
        world.assert_nothing_left().await;
        world.shutdown().await;
    }
}

#[tokio::test]
async fn a_second_stop_does_not_wait_for_a_guest_that_does_not_answer() {
    let world = World::new().await;
    world.connector.on_shutdown(|_| {});
    let mut vm = world.running(true).await;
    world.stop(vm.id, StopMode::Graceful(Duration::from_secs(3600))).await.unwrap();
    reaches(&mut vm, |view| view.phase == Phase::Stopping).await;
    world.stop(vm.id, StopMode::Force).await.unwrap();
    assert_eq!(settled(&mut vm).await.phase, Phase::Cleaned);
    world.assert_nothing_left().await;
    world.shutdown().await;
}

static HELD_UP: AtomicBool = AtomicBool::new(false);
static ARRIVED: AtomicBool = AtomicBool::new(false);

/// A database in which recording that a VM starts takes long, while it is told so.
struct Slow(Box<dyn Store>);

impl Store for Slow {
    fn apply(&mut self, ops: Vec<WriteOp>) -> Vec<Result<WriteOutcome, WriteError>> {
        let starts = |op: &WriteOp| matches!(op, WriteOp::SetPhase { phase: Phase::Running, .. });
        if ops.iter().any(starts) {
            ARRIVED.store(true, Ordering::SeqCst);
            while HELD_UP.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
        }
        self.0.apply(ops)
    }
}

/// An operation that waits for a record ends by itself, and the hypervisor is then taken down in
/// order: who is told to stop meanwhile waits for it, as long as a write may take.
#[tokio::test]
async fn a_stop_during_a_record_that_takes_long_leaves_nothing() {
    let host = Host { cancel: Limits::default().cancel, ..Host::default() };
    let world = World::with(100_000, |store| Box::new(Slow(store)), host).await;
    HELD_UP.store(true, Ordering::SeqCst);
    let mut vm = world.create(true).await.unwrap();
    let arrived = async {
        while !ARRIVED.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, arrived).await.unwrap();
    world.stop(vm.id, StopMode::Force).await.unwrap();
    // Longer than the tests' own limit for a cancelled operation, far shorter than the real one.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!vm.view.borrow().settled);
    HELD_UP.store(false, Ordering::SeqCst);
    let view = settled(&mut vm).await;
    assert_eq!((view.phase, view.cause), (Phase::Cleaned, None));
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[test]
fn a_cancelled_operation_may_take_as_long_as_a_write() {
    assert!(Limits::default().cancel > WRITE_LIMIT);
}
