//! VMs' files: one suite for the real ones and the fake, and what only real files can do.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::task::{Context, Waker};
use std::time::Duration;

use matchlock_host::rootfs::{
    FakeRootfs, LinuxRootfs, ObservedFiles, Rootfs, RootfsError, RootfsFault, RootfsOp, VmPaths,
};
use matchlock_model::id::VmId;
use rustix::process::{Pid, Signal, kill_process};

const VM: VmId = VmId::new(0x0bad_cafe);

/// What every implementation must do. `add_file` makes a file as a hypervisor would.
async fn rootfs_conforms(rootfs: &dyn Rootfs, vms: &Path, add_file: &dyn Fn(&Path)) {
    let paths = VmPaths::new(vms, VM);
    let nothing = ObservedFiles::default();
    assert_eq!(rootfs.list_dirs(vms).unwrap(), []);
    assert_eq!(rootfs.observe(&paths).unwrap(), nothing);
    assert!(rootfs.create_disk(&paths, 16).await.is_err(), "a disk without a directory");
    assert_eq!(rootfs.observe(&paths).unwrap(), nothing);

    // Everything may be repeated.
    for _ in 0..2 {
        rootfs.create_dir(&paths).await.unwrap();
        assert_eq!(rootfs.observe(&paths).unwrap(), ObservedFiles { dir: true, ..nothing });
    }
    for _ in 0..2 {
        rootfs.create_disk(&paths, 16).await.unwrap();
        let expected = ObservedFiles { dir: true, rootfs: true, sockets: false };
        assert_eq!(rootfs.observe(&paths).unwrap(), expected);
    }
    for socket in paths.sockets() {
        add_file(&socket);
        assert!(rootfs.observe(&paths).unwrap().sockets, "{}", socket.display());
        for _ in 0..2 {
            rootfs.remove_sockets(&paths).await.unwrap();
            assert!(!rootfs.observe(&paths).unwrap().sockets);
        }
    }
    assert_eq!(rootfs.list_dirs(vms).unwrap(), [VM]);
    assert_eq!(rootfs.list_strangers(vms).unwrap(), Vec::<PathBuf>::new());
    let stranger = VmPaths { dir: vms.join("other") };
    rootfs.create_dir(&stranger).await.unwrap();
    assert_eq!(rootfs.list_strangers(vms).unwrap(), std::slice::from_ref(&stranger.dir));
    assert_eq!(rootfs.list_dirs(vms).unwrap(), [VM]);
    rootfs.remove_dir(&stranger).await.unwrap();
    for _ in 0..2 {
        rootfs.remove_disk(&paths).await.unwrap();
        assert_eq!(rootfs.observe(&paths).unwrap(), ObservedFiles { dir: true, ..nothing });
    }
    rootfs.create_disk(&paths, 16).await.unwrap();
    for _ in 0..2 {
        rootfs.remove_dir(&paths).await.unwrap();
        assert_eq!(rootfs.observe(&paths).unwrap(), nothing);
        assert_eq!(rootfs.list_dirs(vms).unwrap(), []);
    }
    rootfs.remove_disk(&paths).await.unwrap();
    rootfs.remove_sockets(&paths).await.unwrap();
}

#[tokio::test]
async fn the_real_files_conform() {
    let home = tempfile::tempdir().unwrap();
    let vms = home.path().join("vms");
    let bind = |path: &Path| drop(UnixListener::bind(path).unwrap());
    rootfs_conforms(&LinuxRootfs::new(), &vms, &bind).await;
    assert_eq!(fs::read_dir(&vms).unwrap().count(), 0);
}

#[tokio::test]
async fn the_fake_files_conform() {
    let fake = FakeRootfs::new();
    let shared = fake.clone();
    rootfs_conforms(&fake, Path::new("/home/vms"), &move |path| shared.add_file(path)).await;
    assert_eq!(fake.existing(), Vec::<std::path::PathBuf>::new());
}

#[tokio::test(start_paused = true)]
async fn the_fake_does_what_a_test_asks_of_it() {
    let fake = FakeRootfs::new();
    let paths = VmPaths::new(Path::new("/vms"), VM);
    let failed = |result| matches!(result, Err(RootfsError::File { .. }));

    fake.set_fault(RootfsOp::CreateDir, Some(RootfsFault::Fails));
    assert!(failed(fake.create_dir(&paths).await));
    assert!(!fake.observe(&paths).unwrap().dir);
    fake.set_fault(RootfsOp::CreateDir, Some(RootfsFault::FailsAfterwards));
    assert!(failed(fake.create_dir(&paths).await));
    assert!(fake.observe(&paths).unwrap().dir);

    let delay = Duration::from_secs(5);
    fake.set_fault(RootfsOp::RemoveDir, Some(RootfsFault::Late(delay)));
    let begun = tokio::time::Instant::now();
    fake.remove_dir(&paths).await.unwrap();
    assert_eq!(begun.elapsed(), delay);
    fake.set_fault(RootfsOp::CreateDir, Some(RootfsFault::Never));
    assert!(tokio::time::timeout(delay, fake.create_dir(&paths)).await.is_err());
    fake.set_fault(RootfsOp::Observe, Some(RootfsFault::Fails));
    assert!(fake.observe(&paths).is_err());
    fake.set_fault(RootfsOp::Observe, None);
    assert_eq!(fake.observe(&paths).unwrap(), ObservedFiles::default());
    assert_eq!(fake.calls().len(), 8);
}

#[tokio::test]
async fn a_disk_is_sparse_sound_and_private() {
    let home = tempfile::tempdir().unwrap();
    let paths = VmPaths::new(home.path(), VM);
    let rootfs = LinuxRootfs::new();
    rootfs.create_dir(&paths).await.unwrap();
    rootfs.create_disk(&paths, 5 * 1024).await.unwrap();

    let disk = fs::metadata(paths.rootfs()).unwrap();
    assert_eq!(disk.len(), 5 * 1024 * 1024 * 1024);
    assert!(disk.blocks() * 512 < 1024 * 1024, "{} blocks", disk.blocks());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&paths.rootfs()), 0o600);
    assert_eq!((mode(&paths.dir), mode(&paths.logs())), (0o700, 0o700));

    let run = |program: &str, options: &[&str]| {
        let path = "/usr/sbin:/sbin:/usr/bin:/bin";
        let mut command = Command::new(program);
        let output = command.args(options).arg(paths.rootfs()).env("PATH", path).output().unwrap();
        assert!(output.status.success(), "{program}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    run("e2fsck", &["-fn"]);
    let features = run("dumpe2fs", &["-h"]);
    assert!(!features.contains("has_journal"), "{features}");

    rootfs.create_disk(&paths, 16).await.unwrap();
    assert_eq!(fs::metadata(paths.rootfs()).unwrap().len(), 16 * 1024 * 1024);
    let names: Vec<_> =
        fs::read_dir(&paths.dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
}

#[tokio::test]
async fn a_disk_that_cannot_be_made_is_not_there() {
    let home = tempfile::tempdir().unwrap();
    let paths = VmPaths::new(home.path(), VM);
    let rootfs = LinuxRootfs::new();
    rootfs.create_dir(&paths).await.unwrap();

    let error = rootfs.create_disk(&paths, 0).await.unwrap_err();
    assert!(matches!(error, RootfsError::Mke2fs { .. }), "{error:?}");
    let error = rootfs.create_disk(&paths, u64::MAX).await.unwrap_err();
    assert!(matches!(error, RootfsError::File { .. }), "{error:?}");
    assert!(!paths.rootfs().try_exists().unwrap());
    // What is half made is seen, and removed with the disk.
    assert!(rootfs.observe(&paths).unwrap().rootfs);
    rootfs.remove_disk(&paths).await.unwrap();
    assert!(!rootfs.observe(&paths).unwrap().rootfs);
}

#[tokio::test]
async fn a_cancelled_disk_is_complete_or_absent() {
    let home = tempfile::tempdir().unwrap();
    let paths = VmPaths::new(home.path(), VM);
    let rootfs = LinuxRootfs::new();
    rootfs.create_dir(&paths).await.unwrap();
    for polls in [1, 2, 3] {
        let mut disk = rootfs.create_disk(&paths, 1024);
        for _ in 0..polls {
            let polled = disk.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            if polled.is_ready() {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(disk);
        if paths.rootfs().try_exists().unwrap() {
            let checked = Command::new("e2fsck")
                .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
                .arg("-fn")
                .arg(paths.rootfs())
                .output()
                .unwrap();
            assert!(checked.status.success(), "{checked:?}");
        }
    }
    rootfs.create_disk(&paths, 64).await.unwrap();
    rootfs.remove_dir(&paths).await.unwrap();
}

#[tokio::test]
async fn a_disk_is_removed_only_when_its_maker_has_ended() {
    let home = tempfile::tempdir().unwrap();
    let paths = VmPaths::new(home.path(), VM);
    let rootfs = LinuxRootfs::new();
    rootfs.create_dir(&paths).await.unwrap();

    // A first poll starts mke2fs on a file that stays locked for as long as it runs.
    let mut disk = rootfs.create_disk(&paths, 1024 * 1024);
    let polled = disk.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    assert!(polled.is_pending(), "it was made at once");
    let unfinished = paths.dir.join("rootfs.ext4.tmp");
    let maker = maker_of(&unfinished);
    kill_process(maker, Signal::STOP).unwrap();
    // As if its owner had been killed: nobody ends it.
    std::mem::forget(disk);

    let own = paths.clone();
    let mut removal = tokio::spawn(async move { LinuxRootfs::new().remove_disk(&own).await });
    let waited = tokio::time::timeout(Duration::from_millis(300), &mut removal).await;
    assert!(waited.is_err(), "removed under its maker: {waited:?}");
    assert!(unfinished.try_exists().unwrap());
    kill_process(maker, Signal::KILL).unwrap();
    removal.await.unwrap().unwrap();
    assert!(!unfinished.try_exists().unwrap());
    rootfs.remove_dir(&paths).await.unwrap();
}

/// The process that has this file open, other than this one.
fn maker_of(file: &Path) -> Pid {
    let has_it =
        |pid: &i32| fs::read_link(format!("/proc/{pid}/fd/0")).is_ok_and(|opened| opened == file);
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        entry.unwrap().file_name().to_str().and_then(|name| name.parse::<i32>().ok())
    });
    let found: Vec<i32> = pids.filter(has_it).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    Pid::from_raw(found[0]).unwrap()
}

#[tokio::test]
async fn nothing_is_followed_through_a_link() {
    let home = tempfile::tempdir().unwrap();
    let vms = home.path().join("vms");
    let elsewhere = home.path().join("elsewhere");
    fs::create_dir_all(elsewhere.join("logs")).unwrap();
    fs::create_dir(&vms).unwrap();
    for name in ["rootfs.ext4", "link.sock"] {
        fs::write(elsewhere.join(name), "precious").unwrap();
    }
    let paths = VmPaths::new(&vms, VM);
    symlink(&elsewhere, &paths.dir).unwrap();

    let rootfs = LinuxRootfs::new();
    assert!(rootfs.create_dir(&paths).await.is_err());
    assert!(rootfs.create_disk(&paths, 16).await.is_err());
    assert!(rootfs.remove_disk(&paths).await.is_err());
    assert!(rootfs.remove_sockets(&paths).await.is_err());
    assert!(rootfs.remove_dir(&paths).await.is_err());
    assert!(rootfs.observe(&paths).is_err());
    assert_eq!(rootfs.list_dirs(&vms).unwrap(), []);
    assert_eq!(fs::read(elsewhere.join("rootfs.ext4")).unwrap(), b"precious");

    // Links inside a directory of ours are removed, not what they point to.
    fs::remove_file(&paths.dir).unwrap();
    rootfs.create_dir(&paths).await.unwrap();
    symlink(elsewhere.join("rootfs.ext4"), paths.rootfs()).unwrap();
    symlink(&elsewhere, paths.dir.join("dir")).unwrap();
    rootfs.create_disk(&paths, 16).await.unwrap();
    assert!(fs::symlink_metadata(paths.rootfs()).unwrap().is_file());
    rootfs.remove_dir(&paths).await.unwrap();
    assert_eq!(fs::read(elsewhere.join("rootfs.ext4")).unwrap(), b"precious");
}

#[tokio::test]
async fn only_directories_with_an_id_are_listed() {
    let vms = tempfile::tempdir().unwrap();
    let rootfs = LinuxRootfs::new();
    for name in ["vm-00000002", "vm-00000001", "vm-0000000x", "other"] {
        fs::create_dir(vms.path().join(name)).unwrap();
    }
    fs::write(vms.path().join("vm-00000003"), "a file").unwrap();
    assert_eq!(rootfs.list_dirs(vms.path()).unwrap(), [VmId::new(1), VmId::new(2)]);
    assert!(rootfs.list_dirs(&vms.path().join("vm-00000003")).is_err());
    let strangers = ["other", "vm-00000003", "vm-0000000x"].map(|name| vms.path().join(name));
    assert_eq!(rootfs.list_strangers(vms.path()).unwrap(), strangers);

    // A file in the place of a VM's directory is no directory of ours.
    let paths = VmPaths::new(vms.path(), VmId::new(3));
    assert!(rootfs.create_dir(&paths).await.is_err());
    assert!(rootfs.remove_dir(&paths).await.is_err());
}
