//! `gc --force-running` of several VMs, one of which it fails for.

use matchlock_host::owner_lock::LinuxOwnerLocks;
use matchlock_model::id::VmId;
use matchlock_test_support::{Installation, Running};

use super::case::{PATIENCE, program};

/// The reconciler fails once, when it is asked for the VM whose owner lets go first; the other's owner
/// never listens and is overruled after that.
#[test]
fn what_fails_for_one_vm_is_told_and_the_others_are_taken_down() {
    let installation = Installation::bare().unwrap();
    assert_eq!(installation.output(&["gc"]).unwrap().status.code(), Some(0));
    for vm in ["vm-00000001", "vm-00000002"] {
        let row = format!(
            "insert into vms (id, pid, status, image, created_at, updated_at) values
             ('{vm}', 1, 'running', 'busybox', '2026-01-02T03:04:05Z', '2026-01-02T03:04:05Z')"
        );
        installation.sql(&row).unwrap();
    }
    let locks = LinuxOwnerLocks::open(&installation.home()).unwrap();
    let silent = locks.try_acquire(VmId::new(1)).unwrap();
    let ending = locks.try_acquire(VmId::new(2)).unwrap();
    let mut command = std::process::Command::new(program());
    installation.prepare(command.args(["gc", "--force-running"]));
    // First it is asked for all.
    command.env("FAILPOINTS", "actor.reconciler.reconcile.before=1*off->1*return(error)->off");
    let piped = std::process::Stdio::piped;
    let gc = Running::start(command.stdout(piped()).stderr(piped())).unwrap();
    #[expect(clippy::disallowed_methods, reason = "an owner takes its time")]
    std::thread::sleep(std::time::Duration::from_secs(2));
    installation.sql("delete from vms where id = 'vm-00000002'").unwrap();
    drop(ending);
    let ended = gc.wait(PATIENCE).unwrap();
    drop(silent);
    let out = String::from_utf8(ended.stdout).unwrap();
    let err = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(1), "{out}{err}");
    assert!(out.contains("vm-00000001: cleaned stop\n"), "{out}{err}");
    assert!(out.ends_with("Reconciled 1 VMs, failed 1\n"), "{out}{err}");
    assert!(err.contains("matchlock: vm-00000002: failed stop: "), "{err}");
}
