//! Actors that are killed: what they owned is compensated, nobody else is disturbed.

use std::time::Duration;

use bytes::Bytes;
use matchlock_actors::fleet::VmHandle;
use matchlock_actors::reconciler::{Outcome, Target};
use matchlock_host::guest_link::{ExecEvent, ExecSession, LinkError, StdinInput};
use matchlock_host::hypervisor::{ExitReason, LaunchFault};
use matchlock_host::rootfs::{RootfsFault, RootfsOp};
use matchlock_model::exec::{ExecSpec, OutputStream};
use matchlock_model::id::VmId;
use matchlock_model::phase::Phase;
use matchlock_model::reconcile::Goal;
use matchlock_model::vm::StopMode;
use tokio::time::timeout;

use super::world::{PATIENCE, World, lost, reaches, settled};

/// A command that copies its stdin, begun before and talked to after what is done to its supervisors.
async fn typing(world: &World, vm: VmId) -> ExecSession {
    let spec = ExecSpec {
        argv: vec![b"cat".to_vec()],
        env: Vec::new(),
        cwd: None,
        user: None,
        stdin: true,
        terminal: None,
        stop_signal: None,
    };
    let mut session = world.link(vm).await.unwrap().link.exec(&spec).await.unwrap();
    assert_eq!(session.events.recv().await.unwrap().unwrap(), ExecEvent::Started);
    echoes(&mut session, b"before").await;
    session
}

async fn echoes(session: &mut ExecSession, text: &'static [u8]) {
    session.stdin.send(StdinInput::Data(Bytes::from_static(text))).await.unwrap();
    let event = timeout(PATIENCE, session.events.recv()).await.unwrap().unwrap().unwrap();
    assert_eq!(event, ExecEvent::Output(OutputStream::Stdout, Bytes::from_static(text)));
}

async fn last_errors(world: &World, vm: VmId) -> Vec<(Phase, Option<String>)> {
    let history = world.deps.reader.history(vm).await.unwrap();
    let told = |error: String| (!error.is_empty()).then_some(error);
    history.into_iter().map(|record| (record.phase, told(record.last_error))).collect()
}

/// The VM goes on: it is in its next life, runs, and its row says why.
async fn goes_on(world: &World, vm: &mut VmHandle, why: &str) {
    reaches(vm, |view| view.generation.0 == 1 || view.settled).await;
    let noted = async {
        loop {
            let last = last_errors(world, vm.id).await.pop().unwrap();
            if last.0 == Phase::Running && last.1.as_ref().is_some_and(|e| e.contains(why)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, noted).await.expect("the row says why");
    let view = vm.view.borrow().clone();
    assert_eq!((view.phase, view.settled, view.cause), (Phase::Running, false, None));
}

async fn ends_well(world: &World, vm: &mut VmHandle) {
    world.stop(vm.id, StopMode::Force).await.unwrap();
    let view = settled(vm).await;
    assert_eq!((view.phase, view.cause), (Phase::Cleaned, None));
}

#[tokio::test]
async fn a_killed_actor_of_a_running_vm_reattaches_and_its_command_goes_on() {
    let world = World::new().await;
    let mut vm = world.running(true).await;
    let mut session = typing(&world, vm.id).await;
    for actor in world.vm_actors() {
        actor.kill();
    }
    goes_on(&world, &mut vm, "actor").await;
    echoes(&mut session, b"after").await;
    assert_eq!(world.hypervisor.launches().len(), 1);
    // The new life watches its machine.
    let machine = world.hypervisor.machine(vm.id).unwrap();
    machine.end(ExitReason::PowerOff);
    let view = settled(&mut vm).await;
    assert_eq!(view.phase, Phase::Cleaned);
    assert!(view.cause.unwrap().message.contains("powered off"));
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_vm_that_ended_while_its_actor_was_dead_is_taken_down() {
    let world = World::new().await;
    let mut vm = world.running(true).await;
    let machine = world.hypervisor.machine(vm.id).unwrap();
    for actor in world.vm_actors() {
        actor.kill();
    }
    machine.end(ExitReason::Reset);
    let view = settled(&mut vm).await;
    assert_eq!(view.phase, Phase::Cleaned);
    let cause = view.cause.unwrap().message;
    assert!(cause.contains("reset"), "{cause}");
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_stop_that_an_actor_took_into_its_grave_is_done_by_its_next_life() {
    let world = World::new().await;
    let mut vm = world.running(true).await;
    let actor = world.vm_actors().remove(0);
    world.stop(vm.id, StopMode::Force).await.unwrap();
    actor.kill();
    let view = settled(&mut vm).await;
    assert_eq!(view.phase, Phase::Cleaned);

    let mut next = world.running(true).await;
    for actor in world.vm_actors() {
        actor.kill();
    }
    // Nobody is there to be told.
    world.stop(next.id, StopMode::Force).await.unwrap();
    assert_eq!(settled(&mut next).await.phase, Phase::Cleaned);
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_lost_link_is_begun_anew_and_the_command_goes_on() {
    let world = World::new().await;
    let mut vm = world.running(true).await;
    let mut session = typing(&world, vm.id).await;
    world.connector.lose(&lost());
    let noted = async {
        while !last_errors(&world, vm.id).await.iter().any(|(phase, error)| {
            *phase == Phase::Running && error.as_ref().is_some_and(|e| e.contains("a test cut it"))
        }) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, noted).await.unwrap();
    echoes(&mut session, b"after").await;
    ends_well(&world, &mut vm).await;
    // Nobody is left waiting for another session.
    let last = timeout(PATIENCE, session.events.recv()).await.unwrap().unwrap();
    assert!(last.is_err(), "{last:?}");
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_guest_that_broke_the_protocol_or_keeps_losing_its_link_is_taken_down() {
    let world = World::new().await;
    let mut vm = world.running(true).await;
    world.connector.lose(&LinkError::Protocol { what: "it lied".into() });
    let view = settled(&mut vm).await;
    assert_eq!(view.phase, Phase::Cleaned);
    assert!(view.cause.unwrap().message.contains("it lied"));

    let mut vm = world.running(true).await;
    let losing = async {
        loop {
            world.connector.lose(&lost());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let view = tokio::select! {
        view = settled(&mut vm) => view,
        () = losing => unreachable!(),
    };
    assert!(view.cause.unwrap().message.contains("a test cut it"));
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
    let told = last_errors(&world, vm.id).await;
    let failed = told.iter().find(|(phase, _)| phase.name().ends_with("_failed"));
    let why = failed.and_then(|(_, error)| error.clone());
    assert!(why.is_some_and(|error| error.contains("the VM's actor")), "{told:?}");
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
async fn a_killed_fleet_takes_its_vms_up_again() {
    let world = World::new().await;
    let mut vms = [world.running(true).await, world.running(true).await];
    let mut session = typing(&world, vms[0].id).await;
    for service in world.children().iter().filter(|cell| !cell.get_children().is_empty()) {
        service.kill();
    }
    for vm in &mut vms {
        goes_on(&world, vm, "supervisor").await;
    }
    echoes(&mut session, b"after").await;
    for vm in &mut vms {
        ends_well(&world, vm).await;
    }
    world.assert_nothing_left().await;
    let mut again = world.running(true).await;
    world.stop(again.id, StopMode::Force).await.unwrap();
    settled(&mut again).await;
    world.shutdown().await;
}

/// The owner hangs in the middle of its shutdown; another process cleans up with `--force`; then the
/// owner goes on, and is refused.
#[tokio::test]
async fn an_owner_that_hangs_is_overruled_and_harms_nothing_afterwards() {
    let world = World::new().await;
    let mut vm = world.running(false).await;
    let plain = world.reconcile(Target::One(vm.id), Goal::Clean).await;
    assert_eq!(plain[0].outcome, Outcome::Running);

    let hangs = RootfsFault::Late(Duration::from_millis(400));
    world.rootfs.set_fault(RootfsOp::RemoveSockets, Some(hangs));
    world.stop(vm.id, StopMode::Force).await.unwrap();
    reaches(&mut vm, |view| view.phase == Phase::Cleaning).await;
    world.rootfs.set_fault(RootfsOp::RemoveSockets, None);
    let forced = world.reconcile(Target::TakeOver(vm.id), Goal::Remove).await;
    assert!(matches!(forced[0].outcome, Outcome::Cleaned { .. }), "{forced:?}");
    // What somebody puts there now is not the old owner's to remove.
    let paths = world.paths(vm.id);
    world.deps.rootfs.create_dir(&paths).await.unwrap();
    world.deps.rootfs.create_disk(&paths, 64).await.unwrap();
    settled(&mut vm).await;
    world.lock_is_free(vm.id).await;
    assert!(world.rootfs.existing().contains(&paths.rootfs()));
    world.reconcile(Target::One(vm.id), Goal::Remove).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_running_vm_of_a_silent_owner_is_overruled() {
    let world = World::new().await;
    let mut vm = world.running(false).await;
    let forced = world.reconcile(Target::TakeOver(vm.id), Goal::Remove).await;
    assert!(matches!(forced[0].outcome, Outcome::Cleaned { .. }), "{forced:?}");
    let view = settled(&mut vm).await;
    assert!(view.cause.is_some());
    world.lock_is_free(vm.id).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

/// An owner that stands still after it made its tables and before its hypervisor has them: they are
/// taken from it.
#[tokio::test]
async fn an_owner_that_hangs_with_its_tables_is_overruled() {
    let world = World::new().await;
    world.hypervisor.set_launch_fault(Some(LaunchFault::Never));
    let mut vm = world.create(false).await.unwrap();
    reaches(&mut vm, |view| view.phase == Phase::Starting).await;
    let launching = async {
        while world.hypervisor.launches().is_empty() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, launching).await.unwrap();
    assert_eq!(world.firewall.existing().len(), 2);
    let forced = world.reconcile(Target::TakeOver(vm.id), Goal::Clean).await;
    let Outcome::Cleaned { removed } = &forced[0].outcome else { panic!("{forced:?}") };
    assert!(removed.contains(&"nftables_cleanup".to_owned()), "{removed:?}");
    assert_eq!(world.firewall.existing(), Vec::<String>::new());
    world.stop(vm.id, StopMode::Force).await.unwrap();
    settled(&mut vm).await;
    world.lock_is_free(vm.id).await;
    world.reconcile(Target::One(vm.id), Goal::Remove).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_guest_that_hangs_is_written_down_and_so_is_that_it_is_back() {
    let world = World::new().await;
    let mut vm = world.running(true).await;
    let says = async |hung: bool| {
        let told = async {
            loop {
                let last = last_errors(&world, vm.id).await.pop().unwrap();
                assert_eq!(last.0, Phase::Running);
                if last.1.is_some_and(|error| error.contains("has not answered")) == hung {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, told).await.expect("the row tells it");
    };
    world.connector.set_hung(true);
    says(true).await;
    world.connector.set_hung(false);
    says(false).await;
    ends_well(&world, &mut vm).await;
    world.assert_nothing_left().await;
    world.shutdown().await;
}
