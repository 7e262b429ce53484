//! Lives without faults.

use std::time::Duration;

use matchlock_host::guest_link::ExecEvent;
use matchlock_model::exec::{ExecSpec, ExitStatus};
use matchlock_model::failure::FailureKind;
use matchlock_model::phase::Phase;
use matchlock_model::record::CleanupStatus;
use matchlock_model::vm::StopMode;
use matchlock_store::WriteOp;

use super::world::{World, settled};

const CLEAN_LIFE: [Phase; 7] = [
    Phase::Creating,
    Phase::Created,
    Phase::Starting,
    Phase::Running,
    Phase::Stopping,
    Phase::Cleaning,
    Phase::Cleaned,
];

#[tokio::test]
async fn an_ephemeral_vm_leaves_only_its_history() {
    let world = World::new().await;
    let mut vm = world.running(true).await;
    assert_eq!(world.connector.configured()[0].hostname, vm.id.to_string());
    world.stop(vm.id, StopMode::Force).await.unwrap();
    let view = settled(&mut vm).await;
    assert_eq!((view.phase, view.cause), (Phase::Cleaned, None));
    assert_eq!(world.phases(vm.id).await, CLEAN_LIFE);
    assert!(world.connector.shutdowns().is_empty(), "nobody asks a guest that keeps nothing");
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn a_kept_vm_is_shut_down_and_keeps_its_row() {
    let world = World::new().await;
    let mut vm = world.running(false).await;
    let grace = Duration::from_millis(100);
    world.stop(vm.id, StopMode::Graceful(grace)).await.unwrap();
    settled(&mut vm).await;
    assert_eq!(world.connector.shutdowns(), [grace]);
    let head = world.deps.reader.lifecycle_head(vm.id).await.unwrap().unwrap();
    assert_eq!(head.phase, Phase::Cleaned);
    for step in ["guest_sync", "machine_close", "sockets_remove", "rootfs_remove"] {
        assert_eq!(head.cleanup[step].status, CleanupStatus::Ok, "{step}");
    }
    assert!(head.resources.hypervisor.is_some(), "the hypervisor was recorded");
    let row = world.deps.reader.vm(vm.id).await.unwrap().unwrap();
    assert_eq!((row.status.as_str(), row.pid), ("stopped", 0));
    let paths = world.paths(vm.id);
    assert_eq!(world.rootfs.existing(), [paths.dir.clone(), paths.logs()]);
    world.lock_is_free(vm.id).await;
    world.shutdown().await;
}

#[tokio::test]
async fn intents_are_recorded_before_their_resources() {
    let world = World::new().await;
    let mut vm = world.running(true).await;
    let first = &world.deps.reader.history(vm.id).await.unwrap()[0];
    assert_eq!(first.phase, Phase::Creating);
    let paths = world.paths(vm.id);
    let resources = &first.resources;
    assert_eq!(resources.rootfs_path.as_deref(), paths.rootfs().to_str());
    assert_eq!(resources.state_dir.as_deref(), paths.dir.to_str());
    assert_eq!(resources.owner_socket.as_deref(), paths.owner_socket().to_str());
    world.stop(vm.id, StopMode::Force).await.unwrap();
    settled(&mut vm).await;
    world.shutdown().await;
}

#[tokio::test]
async fn commands_run_over_the_link_of_a_running_vm() {
    let world = World::new().await;
    let mut vm = world.running(true).await;
    let running = world.link(vm.id).await.unwrap();
    let spec = ExecSpec {
        argv: vec![b"exit".to_vec(), b"7".to_vec()],
        env: Vec::new(),
        cwd: None,
        user: None,
        stdin: false,
        terminal: None,
        stop_signal: None,
    };
    let mut session = running.link.exec(&spec).await.unwrap();
    let mut last = None;
    while let Some(event) = session.events.recv().await {
        last = Some(event.unwrap());
    }
    assert_eq!(last, Some(ExecEvent::Exited(ExitStatus::Code(7))));
    world.stop(vm.id, StopMode::Force).await.unwrap();
    settled(&mut vm).await;
    let refused = world.link(vm.id).await.err().unwrap();
    assert!(refused.message.contains(&vm.id.to_string()), "{refused}");
    world.shutdown().await;
}

#[tokio::test]
async fn an_exit_code_is_kept_by_whoever_owns_the_vm_and_by_nobody_else() {
    let world = World::new().await;
    let mut vm = world.running(false).await;
    let running = world.link(vm.id).await.unwrap();
    running.context.record_exit(7).await.unwrap();
    // Also once the VM is down: its command may have ended with it.
    world.stop(vm.id, StopMode::Force).await.unwrap();
    settled(&mut vm).await;
    running.context.record_exit(143).await.unwrap();
    let row = world.deps.reader.vm(vm.id).await.unwrap().unwrap();
    assert_eq!((row.phase, row.exit_code), (Phase::Cleaned, Some(143)));
    let at = jiff::Timestamp::now();
    world.deps.db.write(WriteOp::RaiseEpoch { vm: vm.id, pid: 1, at }).await.unwrap();
    let late = running.context.record_exit(0).await.unwrap_err();
    assert_eq!(late.kind, FailureKind::Fenced, "{late}");
    let row = world.deps.reader.vm(vm.id).await.unwrap().unwrap();
    assert_eq!(row.exit_code, Some(143));
    world.shutdown().await;
}

#[tokio::test]
async fn a_vm_that_does_not_fit_is_refused_before_anything_is_made() {
    let world = World::with_memory(300).await;
    let refused = world.create(true).await.err().unwrap();
    assert!(refused.message.contains("not enough memory"), "{refused}");
    assert!(world.deps.reader.vms().await.unwrap().is_empty());
    world.assert_nothing_left().await;
    world.shutdown().await;
}

#[tokio::test]
async fn thirty_vms_at_once() {
    let world = World::new().await;
    let mut vms = Vec::new();
    for _ in 0..30 {
        vms.push(world.create(true).await.unwrap());
    }
    for vm in &mut vms {
        super::world::reaches(vm, |view| view.phase == Phase::Running).await;
        world.stop(vm.id, StopMode::Force).await.unwrap();
    }
    for vm in &mut vms {
        assert_eq!(settled(vm).await.cause, None);
        assert_eq!(world.phases(vm.id).await, CLEAN_LIFE);
    }
    world.assert_nothing_left().await;
    world.shutdown().await;
}
