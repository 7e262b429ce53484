//! Snapshots: made of a template, gone on from, and of no use.

use matchlock_actors::vm::StartMode;
use matchlock_host::guest_link::{FakeReadiness, LinkError};
use matchlock_host::hypervisor::{FakeHypervisor, LaunchFault, Start};
use matchlock_model::failure::FailureKind;
use matchlock_model::phase::Phase;
use matchlock_model::record::Started;
use matchlock_model::vm::StopMode;

use super::world::{Host, World, settled};

/// How the machines began that were launched so far.
fn starts(hypervisor: &FakeHypervisor) -> Vec<&'static str> {
    let name = |start: &Start| match start {
        Start::Boot => "boot",
        Start::Hold => "hold",
        Start::Restore(_) => "restore",
    };
    hypervisor.launches().iter().map(|spec| name(&spec.start)).collect()
}

pub(crate) async fn make_warm(world: &World) {
    let mut template = world.create_as(StartMode::Template { anew: true }, true).await.unwrap();
    let view = settled(&mut template).await;
    assert_eq!((view.phase, view.cause, view.cleaned_up), (Phase::Cleaned, None, true));
    let phases = world.phases(template.id).await;
    assert!(!phases.contains(&Phase::Running), "nobody may run a command in it: {phases:?}");
}

#[tokio::test]
async fn a_template_is_saved_and_leaves_nothing_but_its_snapshot() {
    let world = World::new().await;
    make_warm(&world).await;
    assert_eq!((world.snapshots.count(), starts(&world.hypervisor)), (1, vec!["hold"]));
    assert!(world.connector.configured().is_empty(), "nobody tells it anything");
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_vm_goes_on_from_it_unless_it_is_to_boot() {
    let world = World::new().await;
    make_warm(&world).await;
    let warm = world.running(true).await;
    assert!(warm.view.borrow().timings.restore.is_some());
    assert!(warm.view.borrow().timings.kernel.is_none(), "it did not boot");
    let mut cold = world.create_as(StartMode::Cold, true).await.unwrap();
    super::world::reaches(&mut cold, |view| view.phase == Phase::Running).await;
    assert_eq!(starts(&world.hypervisor), ["hold", "restore", "boot"]);
    assert!(cold.view.borrow().timings.restore.is_none());
    for (id, started) in [(warm.id, Started::Restored), (cold.id, Started::Booted)] {
        let row = world.deps.reader.vm(id).await.unwrap().unwrap();
        assert_eq!(row.started, Some(started));
    }
    for id in [warm.id, cold.id] {
        world.stop(id, StopMode::Force).await.unwrap();
    }
    for mut vm in [warm, cold] {
        settled(&mut vm).await;
    }
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_damaged_one_is_given_up_and_its_machine_is_gone_before_another_boots() {
    let world = World::new().await;
    make_warm(&world).await;
    world.snapshots.damage();
    let mut vm = world.running(true).await;
    assert_eq!(starts(&world.hypervisor), ["hold", "restore", "boot"]);
    assert!(vm.view.borrow().timings.restore.is_none());
    let row = world.deps.reader.lifecycle_head(vm.id).await.unwrap().unwrap();
    let booted = world.hypervisor.machine(vm.id).unwrap();
    let booted = matchlock_host::hypervisor::Machine::identity(&*booted);
    assert_eq!(row.resources.hypervisor.as_ref(), Some(&booted), "the row names the one that runs");
    let marked = matchlock_host::process::Processes::find_marked(&world.processes).unwrap();
    assert_eq!(marked.len(), 1, "{marked:?}");
    world.stop(vm.id, StopMode::Force).await.unwrap();
    settled(&mut vm).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn what_a_boot_leaves_that_fails_after_a_restore_is_not_missed() {
    let world = World::new().await;
    make_warm(&world).await;
    world.snapshots.damage();
    world.hypervisor.set_launch_fault(Some(LaunchFault::LeavesOneThatBoots));
    let view = settled(&mut world.create_as(StartMode::Warm, true).await.unwrap()).await;
    assert!(view.cause.is_some() && view.cleaned_up, "{view:?}");
    assert_eq!(starts(&world.hypervisor), ["hold", "restore", "boot"]);
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn what_a_restore_leaves_whose_launch_fails_is_gone_before_another_boots() {
    let world = World::new().await;
    make_warm(&world).await;
    world.hypervisor.set_launch_fault(Some(LaunchFault::LeavesOneThatRestores));
    let mut vm = world.running(true).await;
    assert_eq!(starts(&world.hypervisor), ["hold", "restore", "boot"]);
    let booted = world.hypervisor.machine(vm.id).unwrap();
    let marked = matchlock_host::process::Processes::find_marked(&world.processes).unwrap();
    let marked: Vec<_> = marked.into_iter().map(|process| process.identity).collect();
    assert_eq!(marked, [matchlock_host::hypervisor::Machine::identity(&*booted)]);
    world.stop(vm.id, StopMode::Force).await.unwrap();
    settled(&mut vm).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_whole_one_that_nothing_goes_on_from_is_withdrawn_and_another_is_made() {
    let world = World::new().await;
    make_warm(&world).await;
    let lost = LinkError::Lost { cause: "it says nothing".to_owned() };
    world.connector.set_readiness(FakeReadiness::FailsOnce(lost));
    let booted = world.running(true).await;
    assert!(booted.view.borrow().timings.restore.is_none());
    assert_eq!(starts(&world.hypervisor), ["hold", "restore", "boot"]);
    world.stop(booted.id, StopMode::Force).await.unwrap();
    settled(&mut { booted }).await;
    assert_eq!(world.snapshots.count(), 0);
    let start = StartMode::Template { anew: false };
    let view = settled(&mut world.create_as(start, true).await.unwrap()).await;
    assert_eq!((view.cause, world.snapshots.count()), (None, 1));
    let warm = world.running(true).await;
    assert!(warm.view.borrow().timings.restore.is_some());
    world.stop(warm.id, StopMode::Force).await.unwrap();
    settled(&mut { warm }).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn one_stays_where_the_guest_does_not_boot_either_or_its_hypervisor_was_killed() {
    let world = World::new().await;
    make_warm(&world).await;
    let lost = LinkError::Lost { cause: "it says nothing".to_owned() };
    world.connector.set_readiness(FakeReadiness::Fails(lost));
    let mut vm = world.create_as(StartMode::Warm, true).await.unwrap();
    let view = settled(&mut vm).await;
    assert!(view.cause.is_some() && view.timings.restore.is_none(), "{view:?}");
    assert_eq!(world.snapshots.count(), 1);
    world.connector.set_readiness(FakeReadiness::KilledOnce);
    let booted = world.running(true).await;
    assert_eq!(starts(&world.hypervisor), ["hold", "restore", "boot", "restore", "boot"]);
    world.stop(booted.id, StopMode::Force).await.unwrap();
    settled(&mut { booted }).await;
    assert_eq!(world.snapshots.count(), 1);
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_template_of_which_there_is_a_snapshot_is_not_launched_unless_that_is_damaged() {
    let world = World::new().await;
    make_warm(&world).await;
    let again = async || {
        let start = StartMode::Template { anew: false };
        settled(&mut world.create_as(start, true).await.unwrap()).await
    };
    let view = again().await;
    let kind = view.cause.map(|failure| failure.kind);
    assert_eq!((kind, view.cleaned_up), (Some(FailureKind::Busy), true));
    assert_eq!(starts(&world.hypervisor), ["hold"]);
    world.snapshots.damage();
    assert_eq!(again().await.cause, None);
    assert_eq!((world.snapshots.count(), starts(&world.hypervisor)), (1, vec!["hold"; 2]));
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn of_templates_at_once_one_is_launched_and_its_claim_goes_with_it() {
    let world = World::new().await;
    world.hypervisor.set_launch_fault(Some(LaunchFault::DiesAtOnce));
    let held = world.snapshots.claim();
    let mut template = world.create_as(StartMode::Template { anew: true }, true).await.unwrap();
    let kind = settled(&mut template).await.cause.map(|failure| failure.kind);
    assert_eq!((kind, starts(&world.hypervisor)), (Some(FailureKind::Busy), Vec::new()));
    drop(held);
    // One that fails lets go of its own.
    let mut template = world.create_as(StartMode::Template { anew: true }, true).await.unwrap();
    settled(&mut template).await;
    assert_eq!(starts(&world.hypervisor), ["hold"]);
    assert!(!world.snapshots.is_claimed());
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_template_that_dies_makes_no_snapshot_and_leaves_nothing() {
    let world = World::new().await;
    world.hypervisor.set_launch_fault(Some(LaunchFault::DiesAtOnce));
    let mut template = world.create_as(StartMode::Template { anew: true }, true).await.unwrap();
    let view = settled(&mut template).await;
    assert!(view.cause.is_some() && view.cleaned_up, "{view:?}");
    assert_eq!(world.snapshots.count(), 0);
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_template_that_nobody_asked_for_leaves_the_last_subnets_to_vms() {
    let subnets = "base=10.99.0.0/28,size=30".parse().unwrap();
    let world = World::with(100_000, |store| store, Host { subnets, ..Host::default() }).await;
    for (anew, refused) in [(false, Some(FailureKind::Busy)), (true, None)] {
        let template = world.create_as(StartMode::Template { anew }, true).await;
        let cause = settled(&mut template.unwrap()).await.cause;
        assert_eq!(cause.map(|failure| failure.kind), refused);
    }
    assert_eq!(starts(&world.hypervisor), ["hold"], "the one that was asked for");
    world.assert_nothing_left().await;
    world.shutdown().await;
}
