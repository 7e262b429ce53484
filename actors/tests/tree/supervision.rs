//! Actors that are killed: what they owned is compensated, nobody else is disturbed.

use matchlock_actors::reconciler::Target;
use matchlock_host::rootfs::{RootfsFault, RootfsOp};
use matchlock_model::phase::Phase;
use matchlock_model::reconcile::Goal;
use matchlock_model::vm::StopMode;

use super::world::{World, reaches, settled};

#[tokio::test]
async fn a_killed_vm_actor_is_restarted_and_finishes_the_shutdown() {
    let world = World::new().await;
    let mut vm = world.running(true).await;
    let mut other = world.running(true).await;
    for actor in world.vm_actors().iter().take(1) {
        actor.kill();
    }
    let (mut gone, mut stays) = (vm.clone(), other.clone());
    tokio::select! {
        view = settled(&mut gone) => assert!(view.cause.unwrap().message.contains("actor")),
        view = settled(&mut stays) => assert!(view.cause.unwrap().message.contains("actor")),
    }
    // Exactly one was disturbed.
    let settled_now = [&vm, &other].iter().filter(|vm| vm.view.borrow().settled).count();
    assert_eq!(settled_now, 1);
    for handle in [&mut vm, &mut other] {
        if !handle.view.borrow().settled {
            assert_eq!(handle.view.borrow().phase, Phase::Running);
            world.stop(handle.id, StopMode::Force).await.unwrap();
        }
        let view = settled(handle).await;
        assert_eq!(view.phase, Phase::Cleaned);
    }
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_vm_actor_killed_in_any_phase_leaves_nothing() {
    for op in [RootfsOp::CreateDisk, RootfsOp::RemoveDisk] {
        let world = World::new().await;
        world.rootfs.set_fault(op, Some(RootfsFault::Late(std::time::Duration::from_millis(200))));
        let mut vm = world.create(true).await.unwrap();
        if op == RootfsOp::RemoveDisk {
            reaches(&mut vm, |view| view.phase == Phase::Running).await;
            world.stop(vm.id, StopMode::Force).await.unwrap();
            reaches(&mut vm, |view| view.phase == Phase::Cleaning).await;
        }
        for actor in world.vm_actors() {
            actor.kill();
        }
        let view = settled(&mut vm).await;
        assert_eq!(view.phase, Phase::Cleaned, "{op:?}: {view:?}");
        assert_eq!(view.generation.0, 1, "{op:?}");
        world.assert_nothing_left().await;
        world.shutdown().await;
    }
}

#[tokio::test]
async fn a_vm_whose_actor_keeps_dying_is_taken_down_all_the_same() {
    let world = World::new().await;
    let mut vm = world.running(true).await;
    // Each life is killed at once; what it began to take down is finished by its scope.
    let late = RootfsFault::Late(std::time::Duration::from_millis(250));
    world.rootfs.set_fault(RootfsOp::RemoveSockets, Some(late));
    let killer = async {
        loop {
            for actor in world.vm_actors() {
                actor.kill();
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    let view = tokio::select! {
        view = settled(&mut vm) => view,
        () = killer => unreachable!(),
    };
    assert!(view.cause.unwrap().message.contains("actor"));
    world.lock_is_free(vm.id).await;
    assert!(!world.rootfs.existing().contains(&world.paths(vm.id).rootfs()));
    // Whether its last life or nobody removed the rest, `rm` finds nothing but that.
    world.reconcile(Target::All, Goal::Remove).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_killed_service_is_restarted() {
    let world = World::new().await;
    let mut vm = world.running(true).await;
    // Whichever is killed, one after the other: the writer, the reconciler, the images. The one
    // with children is the fleet, which has a test of its own.
    for service in world.children().iter().filter(|cell| cell.get_children().is_empty()) {
        service.kill();
    }
    world.stop(vm.id, StopMode::Force).await.unwrap();
    let view = settled(&mut vm).await;
    assert_eq!((view.phase, view.cause), (Phase::Cleaned, None));
    let mut again = world.running(true).await;
    world.stop(again.id, StopMode::Force).await.unwrap();
    settled(&mut again).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_killed_fleet_recovers_its_vms() {
    let world = World::new().await;
    let mut vms = [world.running(true).await, world.running(true).await];
    for service in world.children().iter().filter(|cell| !cell.get_children().is_empty()) {
        service.kill();
    }
    for vm in &mut vms {
        let view = settled(vm).await;
        assert_eq!(view.phase, Phase::Cleaned);
        assert!(view.cause.unwrap().message.contains("supervisor"));
    }
    world.assert_nothing_left().await;
    let mut again = world.running(true).await;
    world.stop(again.id, StopMode::Force).await.unwrap();
    settled(&mut again).await;
    world.shutdown().await;
}
