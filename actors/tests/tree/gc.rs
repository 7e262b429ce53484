//! What `gc` tells apart, waits for, and only looks at.

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use matchlock_actors::fleet::VmHandle;
use matchlock_actors::reconciler::{OBSERVE, Outcome, ReconcilerMsg, Target, strangers, survey};
use matchlock_actors::vm::StartMode;
use matchlock_host::guest_link::FakeReadiness;
use matchlock_host::owner_lock::OwnerLocks as _;
use matchlock_host::process::Processes as _;
use matchlock_host::rootfs::{Rootfs as _, RootfsFault, RootfsOp, VmPaths};
use matchlock_model::id::{Mark, VmId};
use matchlock_model::phase::Phase;
use matchlock_model::reconcile::{Action, Goal};
use matchlock_model::vm::StopMode;
use matchlock_store::WriteOp;
use tokio::sync::watch;

use super::reconciling::{crashed, crashed_as};
use super::warm::make_warm;
use super::world::{PATIENCE, World, settled};

#[tokio::test]
async fn whoever_runs_and_whoever_is_being_cleaned_are_told_apart() {
    let world = World::new().await;
    let (runs, is_cleaned) = (crashed(&world, 7).await, crashed(&world, 8).await);
    let owner = world.locks.try_acquire(runs).unwrap();
    let cleaner =
        (world.locks.try_acquire_cleaner(is_cleaned), world.locks.try_acquire(is_cleaned));
    let before = world.locks.cleaners_taken();
    let reports = world.reconcile(Target::All, Goal::Clean).await;
    let outcomes: Vec<_> = reports.iter().map(|report| &report.outcome).collect();
    assert_eq!(outcomes, [&Outcome::Running, &Outcome::BeingCleaned]);
    // Somebody who overrules the owner at that moment finds the cleaner's lock free.
    assert_eq!(world.locks.cleaners_taken(), before, "a running VM is not even touched");
    drop((owner, cleaner));
    world.reconcile(Target::All, Goal::Remove).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn another_cleaner_is_waited_for_a_moment() {
    let world = World::new().await;
    let vm = crashed(&world, 7).await;
    let other = (world.locks.try_acquire(vm), world.locks.try_acquire_cleaner(vm));
    let ends = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(other);
    };
    let (reports, ()) = tokio::join!(world.reconcile(Target::One(vm), Goal::Remove), ends);
    assert!(matches!(reports[0].outcome, Outcome::Cleaned { .. }), "{reports:?}");
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_cleaner_that_never_ends_is_overruled_by_force() {
    let world = World::new().await;
    let vm = crashed(&world, 7).await;
    let epoch = world.deps.reader.owner_epoch(vm).await.unwrap();
    let other = (world.locks.try_acquire(vm), world.locks.try_acquire_cleaner(vm));
    let plain = world.reconcile(Target::One(vm), Goal::Clean).await;
    assert_eq!(plain[0].outcome, Outcome::BeingCleaned);
    let forced = world.reconcile(Target::TakeOver(vm), Goal::Clean).await;
    assert!(matches!(forced[0].outcome, Outcome::Cleaned { .. }), "{forced:?}");
    // Whatever the other still records is refused.
    assert!(world.deps.reader.owner_epoch(vm).await.unwrap() > epoch);
    drop(other);
    world.reconcile(Target::One(vm), Goal::Remove).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_cleaner_that_is_overruled_finishes_what_it_had_begun_and_removes_nothing_more() {
    let world = World::new().await;
    let vm = crashed(&world, 7).await;
    let late = RootfsFault::Late(Duration::from_millis(500));
    world.rootfs.set_fault(RootfsOp::RemoveSockets, Some(late));
    let overrules = async {
        while !world.rootfs.calls().contains(&RootfsOp::RemoveSockets) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let op = WriteOp::RaiseEpoch { vm, pid: 1, at: jiff::Timestamp::now() };
        world.deps.db.write(op).await.unwrap();
    };
    let (reports, ()) = tokio::join!(world.reconcile(Target::One(vm), Goal::Remove), overrules);
    let Outcome::Failed { error, .. } = &reports[0].outcome else { panic!("{reports:?}") };
    assert!(error.contains("taken over"), "{error}");
    let (files, paths) = (world.rootfs.existing(), world.paths(vm));
    assert!(!files.contains(&paths.link_socket()) && files.contains(&paths.rootfs()), "{files:?}");
    world.rootfs.set_fault(RootfsOp::RemoveSockets, None);
    world.reconcile(Target::One(vm), Goal::Remove).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_vm_that_cannot_be_looked_at_is_not_fenced_for_nothing() {
    let world = World::new().await;
    let mut vm = world.running(true).await;
    let epoch = world.deps.reader.owner_epoch(vm.id).await.unwrap();
    world.rootfs.set_fault(RootfsOp::Observe, Some(RootfsFault::Fails));
    let reports = world.reconcile(Target::TakeOver(vm.id), Goal::Clean).await;
    assert!(
        matches!(&reports[0].outcome, Outcome::Failed { step, .. } if step == OBSERVE),
        "{reports:?}"
    );
    world.rootfs.set_fault(RootfsOp::Observe, None);
    assert_eq!(world.deps.reader.owner_epoch(vm.id).await.unwrap(), epoch);
    // Its owner goes on as if nobody had been there.
    world.stop(vm.id, StopMode::Force).await.unwrap();
    assert_eq!(settled(&mut vm).await.cause, None);
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_survey_plans_what_gc_then_does_and_touches_nothing() {
    let world = World::new().await;
    let (kept, ephemeral) = (crashed(&world, 7).await, crashed_as(&world, 8, true).await);
    let files = world.rootfs.existing();
    let history = world.deps.reader.history(kept).await.unwrap();
    let seen = survey(&world.deps.sight(), None, Goal::Clean, false).await.unwrap();
    assert_eq!(world.rootfs.existing(), files);
    assert_eq!(world.deps.reader.history(kept).await.unwrap(), history);
    assert_eq!(world.locks.cleaners_taken(), 0);
    assert!(world.processes.kills().is_empty());
    for vm in [kept, ephemeral] {
        assert!(!world.locks.is_held(vm).unwrap());
    }
    assert!(seen.iter().all(|report| report.outcome == Outcome::Planned), "{seen:?}");
    let plans: Vec<_> = seen.iter().map(|report| &report.finding.as_ref().unwrap().plan).collect();
    assert!(plans[1].contains(&Action::RemoveRow) && !plans[0].contains(&Action::RemoveRow));
    let done = world.reconcile(Target::All, Goal::Clean).await;
    let findings = |reports: &[matchlock_actors::reconciler::VmReport]| -> Vec<_> {
        reports.iter().map(|report| report.finding.clone()).collect()
    };
    assert_eq!(findings(&done), findings(&seen));
    world.reconcile(Target::All, Goal::Remove).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_survey_of_what_runs_says_what_force_would_do() {
    let world = World::new().await;
    let vm = world.running(true).await;
    let sight = world.deps.sight();
    let plain = survey(&sight, Some(vm.id), Goal::Clean, false).await.unwrap();
    assert_eq!((plain.len(), &plain[0].outcome), (1, &Outcome::Running));
    let forced = survey(&sight, Some(vm.id), Goal::Clean, true).await.unwrap();
    let finding = forced[0].finding.as_ref().unwrap();
    assert!(finding.owner_lives && finding.recorded == Some(Phase::Running), "{finding:?}");
    assert!(finding.plan.iter().any(|action| matches!(action, Action::CloseMachine(_))));
    let nobody = survey(&sight, Some(VmId::new(99)), Goal::Clean, true).await.unwrap();
    assert_eq!(nobody[0].outcome, Outcome::Unknown);
    let cleaner = world.locks.try_acquire_cleaner(vm.id).unwrap();
    let cleaned = survey(&sight, Some(vm.id), Goal::Clean, true).await.unwrap();
    assert_eq!(cleaned[0].outcome, Outcome::BeingCleaned);
    drop(cleaner);
    world.rootfs.set_fault(RootfsOp::Observe, Some(RootfsFault::Fails));
    let unseen = survey(&sight, Some(vm.id), Goal::Clean, true).await.unwrap();
    assert!(matches!(unseen[0].outcome, Outcome::Failed { .. }), "{unseen:?}");
    world.rootfs.set_fault(RootfsOp::Observe, None);
    world.stop(vm.id, StopMode::Force).await.unwrap();
    world.shutdown().await;
}

#[tokio::test]
async fn what_cannot_be_identified_is_named_and_left() {
    let world = World::new().await;
    let sight = world.deps.sight();
    assert_eq!(strangers(&sight).await.unwrap(), []);
    let address = [(Ipv4Addr::new(192, 168, 100, 1), 24)];
    world.taps.add_link("fc-0000000a", None, &address);
    world.taps.add_link("fc-0000000b", Some("mine!"), &address);
    let other =
        Mark { install: matchlock_model::id::InstallId::from_bytes([9; 8]), vm: VmId::new(3) };
    world.taps.add_link("fc-00000003", Some(&other.to_string()), &address);
    world.taps.add_link("fc-lan", None, &address);
    world.firewall.add_table("inet matchlock_fc-0000000a", None);
    let odd = VmPaths { dir: world.deps.vms_dir.join("lost+found") };
    world.rootfs.create_dir(&odd).await.unwrap();
    let found: Vec<_> =
        strangers(&sight).await.unwrap().into_iter().map(|found| found.what).collect();
    assert_eq!(
        found,
        [
            "link fc-0000000a",
            "link fc-0000000b",
            "table inet matchlock_fc-0000000a",
            "/fake/vms/lost+found"
        ]
    );
    world.reconcile(Target::All, Goal::Clean).await;
    assert_eq!(world.taps.existing().len(), 4);
    world.shutdown().await;
}

#[tokio::test]
async fn many_are_cleaned_at_once_and_each_has_its_own_end() {
    let world = World::new().await;
    for number in 1..=100 {
        crashed(&world, number).await;
    }
    let stuck = world.processes.find_marked().unwrap().remove(50);
    world.processes.set_refused(stuck.identity.pid, true);
    let (tell, seen) = watch::channel((0, 0));
    let message = |reply| ReconcilerMsg::Reconcile {
        target: Target::All,
        goal: Goal::Remove,
        progress: Some(tell),
        reply,
    };
    let reports = world.ask_reconciler(message).await;
    assert_eq!(*seen.borrow(), (100, 100));
    let ids: Vec<_> = reports.iter().map(|report| report.vm.number()).collect();
    assert_eq!(ids, (1..=100).collect::<Vec<_>>());
    for report in &reports {
        let is_clean = matches!(report.outcome, Outcome::Cleaned { .. });
        assert_eq!(is_clean, report.vm != stuck.mark.vm, "{report:?}");
    }
    world.processes.set_refused(stuck.identity.pid, false);
    world.reconcile(Target::All, Goal::Remove).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

/// Kills a VM's actor until its budget is used up and the VM is given up.
async fn exhaust(world: &World, vm: &VmHandle) {
    let exhausts = async {
        while !vm.view.borrow().settled {
            for actor in world.vm_actors() {
                actor.kill();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, exhausts).await.unwrap();
}

#[tokio::test]
async fn a_compensation_that_panics_is_told_and_gc_does_it() {
    let world = World::new().await;
    let mut vm = world.running(false).await;
    let hypervisor = world.processes.find_marked().unwrap().remove(0).identity.pid;
    world.processes.set_panics(hypervisor, true);
    exhaust(&world, &vm).await;
    let cause = settled(&mut vm).await.cause.unwrap();
    assert!(cause.message.contains("injected panic"), "{cause}");
    world.processes.set_panics(hypervisor, false);
    world.lock_is_free(vm.id).await;
    world.reconcile(Target::One(vm.id), Goal::Remove).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

/// What a compensation could not do stands where people look: in the row and in the VM's cause.
#[tokio::test]
async fn a_compensation_that_fails_is_told() {
    let world = World::new().await;
    let mut vm = world.running(false).await;
    world.rootfs.set_fault(RootfsOp::Observe, Some(RootfsFault::Fails));
    exhaust(&world, &vm).await;
    let cause = settled(&mut vm).await.cause.unwrap();
    assert!(cause.message.contains("not cleaned up: observe"), "{cause}");
    let head = world.deps.reader.lifecycle_head(vm.id).await.unwrap().unwrap();
    assert_eq!(head.phase, Phase::CleanupFailed);
    assert!(head.last_error.contains("observe"), "{head:?}");
    let reasons = world.deps.reader.history(vm.id).await.unwrap();
    let given_up = reasons.iter().find(|record| record.phase == Phase::StopFailed).unwrap();
    assert!(given_up.last_error.contains("actor"), "{given_up:?}");
    world.rootfs.set_fault(RootfsOp::Observe, None);
    world.lock_is_free(vm.id).await;
    world.reconcile(Target::One(vm.id), Goal::Remove).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

/// Keeps the messages of warnings.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }

    fn new_span(&self, _span: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _span: &tracing::span::Id, _values: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _span: &tracing::span::Id, _follows: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        struct Text(String);
        impl tracing::field::Visit for Text {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                self.0 += &format!(" {field}={value:?}");
            }
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().unwrap().push(text.0);
    }

    fn enter(&self, _span: &tracing::span::Id) {}

    fn exit(&self, _span: &tracing::span::Id) {}
}

#[tokio::test]
async fn a_restore_that_is_taken_over_says_nothing_of_the_snapshot() {
    let warnings = Warnings::default();
    let _logged = tracing::subscriber::set_default(warnings.clone());
    let world = World::new().await;
    make_warm(&world).await;
    world.connector.set_readiness(FakeReadiness::Never);
    let mut vm = world.create_as(StartMode::Warm, true).await.unwrap();
    while world.hypervisor.machine(vm.id).is_none() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let op = WriteOp::RaiseEpoch { vm: vm.id, pid: 1, at: jiff::Timestamp::now() };
    world.deps.db.write(op).await.unwrap();
    let cause = settled(&mut vm).await.cause.unwrap();
    assert!(cause.message.contains("taken over"), "{cause}");
    let said = warnings.0.lock().unwrap().concat();
    assert!(!said.contains("snapshot"), "{said}");
    assert_eq!((world.snapshots.count(), world.processes.find_marked().unwrap()), (1, vec![]));
    world.lock_is_free(vm.id).await;
    world.reconcile(Target::One(vm.id), Goal::Remove).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_lock_that_cannot_be_looked_at_is_no_silent_owner() {
    let warnings = Warnings::default();
    let _logged = tracing::subscriber::set_default(warnings.clone());
    let world = World::new().await;
    let mark = world.deps.mark(VmId::new(0xbad)).to_string();
    let address = [(Ipv4Addr::new(192, 168, 100, 1), 24)];
    world.taps.add_link("fc-00000bad", Some(&mark), &address);
    world.locks.set_unreadable(true);
    let mut vm = world.running(true).await;
    world.locks.set_unreadable(false);
    let said = warnings.0.lock().unwrap().clone();
    let told = |line: &&String| line.contains("vm-00000bad") && line.contains("injected fault");
    assert_eq!(said.iter().filter(told).count(), 1, "{said:?}");
    world.stop(vm.id, StopMode::Force).await.unwrap();
    settled(&mut vm).await;
    world.reconcile(Target::All, Goal::Remove).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}
