//! Owner locks between processes.

use std::os::unix::fs::PermissionsExt;

use matchlock_host::owner_lock::{LinuxOwnerLocks, OwnerLockError};
use matchlock_host::process::Spawner;
use matchlock_model::id::VmId;

use crate::common::{
    DEADLINE, Helper, helper_directory, marked_child, unique_mark, until_stdin_ends,
};

const VM: VmId = VmId::new(0xfeed_beef);

#[test]
fn asking_makes_nothing() {
    let home = tempfile::tempdir().unwrap();
    let locks = LinuxOwnerLocks::open(home.path()).unwrap();
    assert!(!locks.is_held(VM).unwrap());
    assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0);
}

#[test]
fn a_lock_is_held_until_it_is_dropped_and_is_its_vms_alone() {
    let home = tempfile::tempdir().unwrap();
    let locks = LinuxOwnerLocks::open(home.path()).unwrap();
    for number in [0, 1, 0xfeed_beef, u32::MAX] {
        let vm = VmId::new(number);
        let held = locks.try_acquire(vm).unwrap();
        assert_eq!(held.vm(), vm);
        assert!(locks.is_held(vm).unwrap());
        // In the same process too, and however often one asks.
        assert!(
            matches!(locks.try_acquire(vm), Err(OwnerLockError::Held { vm: said }) if said == vm)
        );
        assert!(locks.is_held(vm).unwrap());
        for neighbour in [number.wrapping_sub(1), number.wrapping_add(1)] {
            assert!(!locks.is_held(VmId::new(neighbour)).unwrap());
        }
        drop(held);
        assert!(!locks.is_held(vm).unwrap());
    }
    let file = std::fs::metadata(home.path().join("vm.locks")).unwrap();
    assert_eq!((file.permissions().mode() & 0o777, file.len()), (0o600, 0));
}

#[test]
fn what_is_no_file_of_ours_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("vm.locks");
    std::os::unix::fs::symlink("elsewhere", &path).unwrap();
    assert!(matches!(LinuxOwnerLocks::open(home.path()), Err(OwnerLockError::File { .. })));
    std::fs::remove_file(&path).unwrap();

    let locks = LinuxOwnerLocks::open(home.path()).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert!(matches!(locks.try_acquire(VM), Err(OwnerLockError::File { .. })));
    assert!(matches!(locks.is_held(VM), Err(OwnerLockError::File { .. })));
}

#[tokio::test]
async fn a_lock_ends_with_its_process() {
    let home = tempfile::tempdir().unwrap();
    let locks = LinuxOwnerLocks::open(home.path()).unwrap();
    let mut owner = Helper::start("owner_lock::helper_that_owns", home.path());
    owner.says("held").await;
    assert!(locks.is_held(VM).unwrap());
    assert!(matches!(locks.try_acquire(VM), Err(OwnerLockError::Held { .. })));
    assert!(!locks.is_held(VmId::new(1)).unwrap());
    owner.kill().await;
    assert!(!locks.is_held(VM).unwrap());
    drop(locks.try_acquire(VM).unwrap());
}

#[tokio::test]
#[ignore = "the main function of a helper process"]
async fn helper_that_owns() {
    let Some(home) = helper_directory("owner_lock::helper_that_owns") else { return };
    let held = LinuxOwnerLocks::open(&home).unwrap().try_acquire(VM).unwrap();
    println!("held");
    until_stdin_ends().await;
    drop(held);
}

#[tokio::test]
async fn a_child_does_not_keep_its_parents_lock() {
    let home = tempfile::tempdir().unwrap();
    let locks = LinuxOwnerLocks::open(home.path()).unwrap();
    let held = locks.try_acquire(VM).unwrap();
    let spawner = Spawner::new().unwrap();
    let child = spawner.spawn(marked_child(home.path(), &unique_mark())).await.unwrap();
    drop(held);
    assert!(!locks.is_held(VM).unwrap());
    child.kill(DEADLINE).await.unwrap();
}
