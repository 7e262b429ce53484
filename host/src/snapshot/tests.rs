//! One suite for the cache and the fake, and what only a cache can be: limited, stale, half-made.

use std::fs;
use std::io::Write as _;

use sha2::{Digest as _, Sha256};

use super::*;

/// A cache with a guest, and a machine of it.
fn world() -> (tempfile::TempDir, LinuxSnapshots, Wanted) {
    let cache = tempfile::tempdir().unwrap();
    let file = |name: &str| {
        let path = cache.path().join(name);
        fs::write(&path, name).unwrap();
        path
    };
    let wanted = Wanted {
        kernel: file("kernel"),
        initramfs: file("initramfs"),
        vcpus: 1,
        memory_mb: 512,
        nic: true,
        hypervisor: "qemu".into(),
    };
    let snapshots = LinuxSnapshots::new(cache.path());
    (cache, snapshots, wanted)
}

async fn make(
    snapshots: &dyn Snapshots,
    wanted: &Wanted,
    memory: &[u8],
) -> Result<(), SnapshotError> {
    let draft = snapshots.begin(wanted).await?;
    draft.file()?.write_all(memory).unwrap();
    let sha256 = hex::encode(Sha256::digest(memory));
    snapshots.publish(draft, Saved { bytes: memory.len() as u64, sha256 }).await
}

fn names(cache: &Path) -> Vec<String> {
    let dir = fs::read_dir(cache.join("snapshots")).unwrap();
    dir.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

async fn snapshots_conform(snapshots: &dyn Snapshots, wanted: &Wanted) {
    assert!(snapshots.find(wanted).await.unwrap().is_none());
    let draft = snapshots.begin(wanted).await.unwrap();
    assert!(snapshots.find(wanted).await.unwrap().is_none(), "it is not made yet");
    let busy = snapshots.begin(wanted).await.unwrap_err();
    assert!(matches!(busy, SnapshotError::Busy { .. }), "{busy}");
    drop(draft);
    for memory in [&b"one"[..], b"another"] {
        make(snapshots, wanted, memory).await.unwrap();
        let found = snapshots.find(wanted).await.unwrap().unwrap();
        snapshots.check(&found).await.unwrap();
        assert_eq!(std::io::read_to_string(&*found.memory).unwrap().as_bytes(), memory);
        // Whoever checks does not disturb whoever reads.
        snapshots.check(&found).await.unwrap();
    }
    let draft = snapshots.begin(wanted).await.unwrap();
    snapshots.discard(draft).await.unwrap();
    let lease = snapshots.find(wanted).await.unwrap().unwrap();
    let used = make(snapshots, wanted, b"a third").await.unwrap_err();
    assert!(matches!(used, SnapshotError::InUse { .. }), "{used}");
    snapshots.check(&lease).await.unwrap();
    drop(lease);
    assert_eq!(snapshots.sweep().await.unwrap(), 0, "what was not shown is gone");
    let others = [
        Wanted { vcpus: 2, ..wanted.clone() },
        Wanted { memory_mb: 513, ..wanted.clone() },
        Wanted { nic: false, ..wanted.clone() },
        Wanted { kernel: wanted.initramfs.clone(), ..wanted.clone() },
    ];
    for other in others {
        assert!(snapshots.find(&other).await.unwrap().is_none(), "{other:?}");
    }
    let other = Wanted { hypervisor: "another".into(), ..wanted.clone() };
    let stale = snapshots.find(&other).await.unwrap_err();
    assert!(matches!(stale, SnapshotError::Stale { .. }), "{stale}");
    assert_eq!(snapshots.sweep().await.unwrap(), 0, "this one is of use");
    // Of no use: it goes, but not its successor, nor while somebody else goes on from it.
    let old = snapshots.find(wanted).await.unwrap().unwrap();
    let also = snapshots.find(wanted).await.unwrap().unwrap();
    snapshots.withdraw(old).await.unwrap();
    assert!(snapshots.find(wanted).await.unwrap().is_some());
    snapshots.withdraw(also).await.unwrap();
    assert!(snapshots.find(wanted).await.unwrap().is_none());
    make(snapshots, wanted, b"old").await.unwrap();
    let mut old = snapshots.find(wanted).await.unwrap().unwrap();
    old.release();
    make(snapshots, wanted, b"new").await.unwrap();
    snapshots.withdraw(old).await.unwrap();
    let new = snapshots.find(wanted).await.unwrap().unwrap();
    assert_eq!(std::io::read_to_string(&*new.memory).unwrap(), "new");
}

#[tokio::test]
async fn the_cache_conforms() {
    let (cache, snapshots, wanted) = world();
    assert_eq!(snapshots.sweep().await.unwrap(), 0, "nothing was ever made");
    snapshots_conform(&snapshots, &wanted).await;
    assert_eq!(names(cache.path()).len(), 1);
}

#[tokio::test]
async fn the_fake_conforms() {
    let (_cache, _, wanted) = world();
    snapshots_conform(&FakeSnapshots::default(), &wanted).await;
}

#[tokio::test]
async fn what_a_process_of_the_fake_leaves_is_swept_and_keeps_nobody_out() {
    let (_cache, _, wanted) = world();
    let host = FakeSnapshots::default();
    let processes = crate::process::FakeProcesses::new();
    let (one, other) = (processes.add(None, None), processes.add(None, None));
    let (of_one, of_other) = (host.in_process(one.clone()), host.in_process(other.clone()));
    make(&of_one, &wanted, b"memory").await.unwrap();
    let lease = of_one.find(&wanted).await.unwrap().unwrap();
    let dead = of_one.begin(&wanted).await.unwrap();
    assert!(host.is_claimed_by(&one) && host.is_leased_by(&one) && !host.is_claimed_by(&other));
    assert!(of_other.begin(&wanted).await.is_err());
    host.end_process(&one);
    assert!(!host.is_claimed() && !host.is_leased_by(&one) && host.is_half_made());
    make(&of_other, &wanted, b"another").await.unwrap();
    assert!(!host.is_half_made(), "whoever begins sweeps");
    let mine = of_other.begin(&wanted).await.unwrap();
    drop((lease, dead));
    assert!(host.is_claimed_by(&other), "what the dead had is not theirs any more");
    host.leave(mine);
    assert!(!host.is_claimed() && host.is_half_made());
    assert_eq!(host.sweep().await.unwrap(), 1);
    host.leave_in_the_middle(of_other.begin(&wanted).await.unwrap());
    assert!(host.find(&wanted).await.unwrap().is_none(), "the older one is gone");
    assert_eq!((host.sweep().await.unwrap(), host.is_half_made()), (1, false));
    make(&host, &wanted, b"memory").await.unwrap();
    host.outdate();
    let stale = host.find(&wanted).await.unwrap_err();
    assert!(matches!(stale, SnapshotError::Stale { .. }), "{stale}");
    assert_eq!((host.sweep().await.unwrap(), host.count()), (1, 0));
}

#[tokio::test]
async fn what_is_damaged_is_found_out() {
    let (cache, snapshots, wanted) = world();
    make(&snapshots, &wanted, b"memory").await.unwrap();
    let memory = cache.path().join("snapshots").join(record::key(&wanted)).join("memory");
    fs::write(&memory, b"memorx").unwrap();
    let found = snapshots.find(&wanted).await.unwrap().unwrap();
    let damaged = snapshots.check(&found).await.unwrap_err().to_string();
    assert!(damaged.contains("sha256"), "{damaged}");
    fs::write(&memory, b"memor").unwrap();
    let short = snapshots.find(&wanted).await.unwrap_err().to_string();
    assert!(short.contains("5 bytes instead of 6"), "{short}");
    fs::remove_file(&memory).unwrap();
    assert!(snapshots.find(&wanted).await.is_err());
}

#[tokio::test]
async fn what_nobody_can_use_is_stale_and_swept() {
    let (cache, snapshots, wanted) = world();
    make(&snapshots, &wanted, b"memory").await.unwrap();
    let draft = snapshots.begin(&wanted).await.unwrap();
    assert_eq!(snapshots.sweep().await.unwrap(), 0, "somebody is making one");
    assert_eq!(names(cache.path()).len(), 2);
    drop(draft);
    assert_eq!(names(cache.path()).len(), 1, "nobody makes it any more");
    // As it is after a crash.
    fs::create_dir(cache.path().join("snapshots/.new")).unwrap();
    assert_eq!(snapshots.sweep().await.unwrap(), 1);
    fs::write(&wanted.kernel, "another kernel").unwrap();
    let stale = snapshots.find(&wanted).await.unwrap_err().to_string();
    assert!(stale.contains("replaced"), "{stale}");
    assert_eq!(snapshots.sweep().await.unwrap(), 1);
    assert_eq!(names(cache.path()), Vec::<String>::new());
    assert!(snapshots.find(&wanted).await.unwrap().is_none());
}

#[tokio::test]
async fn one_is_replaced_as_soon_as_nobody_reads_the_older_one() {
    let (_cache, snapshots, wanted) = world();
    make(&snapshots, &wanted, b"older").await.unwrap();
    let lease = snapshots.find(&wanted).await.unwrap().unwrap();
    let reads = async {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        snapshots.check(&lease).await.unwrap();
        drop(lease);
    };
    let (made, ()) = tokio::join!(make(&snapshots, &wanted, b"newer"), reads);
    made.unwrap();
    let found = snapshots.find(&wanted).await.unwrap().unwrap();
    assert_eq!(std::io::read_to_string(&*found.memory).unwrap(), "newer");
}

#[tokio::test]
async fn a_lease_keeps_one_and_the_least_recently_used_goes() {
    let (cache, snapshots, wanted) = world();
    let of = |memory_mb| Wanted { memory_mb, ..wanted.clone() };
    for number in 0..MAX_COUNT as u64 {
        make(&snapshots, &of(number), b"memory").await.unwrap();
    }
    // In use: the first is not removed, though it was used longest ago; the second was just used.
    let lease = snapshots.find(&of(0)).await.unwrap().unwrap();
    let key = record::key(&of(0));
    let long_ago = std::time::SystemTime::UNIX_EPOCH;
    let record = fs::File::open(cache.path().join("snapshots").join(&key).join("snapshot.json"));
    record.unwrap().set_modified(long_ago).unwrap();
    drop(snapshots.find(&of(1)).await.unwrap().unwrap());
    make(&snapshots, &of(100), b"memory").await.unwrap();
    assert_eq!(names(cache.path()).len(), MAX_COUNT + 1, "the one that should go is in use");
    assert!(matches!(make(&snapshots, &of(0), b"x").await, Err(SnapshotError::InUse { .. })));
    drop(lease);
    make(&snapshots, &of(101), b"memory").await.unwrap();
    assert_eq!(names(cache.path()).len(), MAX_COUNT);
    for (number, is_kept) in
        [(0, false), (1, true), (2, false), (3, true), (100, true), (101, true)]
    {
        let found = snapshots.find(&of(number)).await.unwrap();
        assert_eq!(found.is_some(), is_kept, "{number}");
    }
}

#[tokio::test]
async fn a_guest_that_is_replaced_while_it_is_saved_is_not_published() {
    let (cache, snapshots, wanted) = world();
    let draft = snapshots.begin(&wanted).await.unwrap();
    // The same size, and the same time of its content: the everyday `cp -p` over it.
    let before = fs::metadata(&wanted.kernel).unwrap();
    fs::write(&wanted.kernel, "lenrek").unwrap();
    let kernel = fs::File::options().write(true).open(&wanted.kernel).unwrap();
    kernel.set_modified(before.modified().unwrap()).unwrap();
    let saved = Saved { bytes: 0, sha256: hex::encode(Sha256::digest(b"")) };
    let refused = snapshots.publish(draft, saved).await.unwrap_err().to_string();
    assert!(refused.contains("replaced"), "{refused}");
    assert_eq!(names(cache.path()), Vec::<String>::new());
    make(&snapshots, &wanted, b"memory").await.unwrap();
    fs::write(&wanted.kernel, "kernel").unwrap();
    kernel.set_modified(before.modified().unwrap()).unwrap();
    let stale = snapshots.find(&wanted).await.unwrap_err().to_string();
    assert!(stale.contains("replaced"), "{stale}");
}

#[tokio::test]
async fn one_that_was_removed_by_hand_is_not_mixed_with_another() {
    let (cache, snapshots, wanted) = world();
    let mine = snapshots.begin(&wanted).await.unwrap();
    mine.file().unwrap().write_all(b"mine").unwrap();
    fs::remove_dir_all(cache.path().join("snapshots")).unwrap();
    let other = Wanted { memory_mb: 600, ..wanted.clone() };
    let theirs = snapshots.begin(&other).await.unwrap();
    let saved =
        |text: &[u8]| Saved { bytes: text.len() as u64, sha256: hex::encode(Sha256::digest(text)) };
    let refused = snapshots.publish(mine, saved(b"mine")).await.unwrap_err();
    assert!(matches!(refused, SnapshotError::Removed { .. }), "{refused}");
    theirs.file().unwrap().write_all(b"theirs").unwrap();
    snapshots.publish(theirs, saved(b"theirs")).await.unwrap();
    let found = snapshots.find(&other).await.unwrap().unwrap();
    snapshots.check(&found).await.unwrap();
    assert!(snapshots.find(&wanted).await.unwrap().is_none());
}

#[tokio::test]
async fn what_cannot_be_judged_keeps_nothing_else_from_it() {
    let (cache, snapshots, wanted) = world();
    let of = |memory_mb| Wanted { memory_mb, ..wanted.clone() };
    let dir = |number| cache.path().join("snapshots").join(record::key(&of(number)));
    for number in 0..3 {
        make(&snapshots, &of(number), b"memory").await.unwrap();
    }
    // Nobody waits for the other end of a pipe, and what has no memory is of no use.
    fs::remove_file(dir(0).join("snapshot.json")).unwrap();
    nix::unistd::mkfifo(&dir(0).join("snapshot.json"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::remove_file(dir(1).join("memory")).unwrap();
    std::os::unix::fs::symlink("/nowhere", cache.path().join("snapshots/dangling")).unwrap();
    let damaged = snapshots.find(&of(0)).await.unwrap_err();
    assert!(matches!(damaged, SnapshotError::Damaged { .. }), "{damaged}");
    assert_eq!(snapshots.sweep().await.unwrap(), 3);
    assert_eq!(names(cache.path()), [record::key(&of(2))]);
    // A link to itself can be neither followed nor called gone.
    let guest = cache.path().join("loop");
    fs::write(&guest, "kernel").unwrap();
    let looping = Wanted { kernel: guest.clone(), ..wanted.clone() };
    make(&snapshots, &looping, b"memory").await.unwrap();
    fs::remove_file(&guest).unwrap();
    std::os::unix::fs::symlink(&guest, &guest).unwrap();
    // Enough of them that one comes after it, in whatever order the directory is read.
    for number in 3..8 {
        make(&snapshots, &of(number), b"memory").await.unwrap();
    }
    for number in 2..8 {
        fs::remove_file(dir(number).join("memory")).unwrap();
    }
    snapshots.sweep().await.unwrap_err();
    assert_eq!(names(cache.path()), [record::key(&looping)], "all others went");
    make(&snapshots, &wanted, b"memory").await.unwrap();
    assert!(snapshots.find(&wanted).await.unwrap().is_some());
}

#[tokio::test]
async fn what_others_can_write_is_none_of_ours() {
    use std::os::unix::fs::PermissionsExt as _;
    let (cache, snapshots, wanted) = world();
    make(&snapshots, &wanted, b"memory").await.unwrap();
    let dir = cache.path().join("snapshots");
    let snapshot = dir.join(record::key(&wanted));
    let chmod =
        |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    for mode in [0o770, 0o707, 0o722] {
        chmod(&dir, mode);
        // Our own directory, which it should not be: everybody is told, `gc` as well.
        let refused = [
            snapshots.find(&wanted).await.err().unwrap(),
            snapshots.begin(&wanted).await.err().unwrap(),
            snapshots.sweep().await.err().unwrap(),
        ];
        let is_named = |error: &SnapshotError| matches!(error, SnapshotError::NotOurs { .. });
        assert!(refused.iter().all(is_named), "{refused:?}");
    }
    chmod(&dir, 0o700);
    for file in ["memory", "snapshot.json"] {
        chmod(&snapshot.join(file), 0o620);
        let damaged = snapshots.find(&wanted).await.unwrap_err().to_string();
        assert!(damaged.contains("others can write it"), "{damaged}");
        chmod(&snapshot.join(file), 0o600);
    }
    assert!(snapshots.find(&wanted).await.unwrap().is_some());
    // Only root can give things away.
    if rustix::process::geteuid().is_root() {
        for path in [&dir, &snapshot.join("memory")] {
            std::os::unix::fs::chown(path, Some(65534), None).unwrap();
            let found = snapshots.find(&wanted).await;
            assert!(matches!(found, Ok(None) | Err(SnapshotError::Damaged { .. })), "{found:?}");
            std::os::unix::fs::chown(path, Some(0), None).unwrap();
        }
        assert!(snapshots.find(&wanted).await.unwrap().is_some());
        // Somebody else's is nothing to us, but we make none there either.
        std::os::unix::fs::chown(&dir, Some(65534), None).unwrap();
        assert!(snapshots.find(&wanted).await.unwrap().is_none());
        assert_eq!(snapshots.sweep().await.unwrap(), 0);
        let refused = snapshots.begin(&wanted).await.err().unwrap();
        assert!(matches!(refused, SnapshotError::NotOurs { .. }), "{refused}");
    }
}

#[tokio::test]
async fn a_file_that_somebody_has_put_there_is_swept_like_anything_hidden() {
    let (cache, snapshots, wanted) = world();
    make(&snapshots, &wanted, b"memory").await.unwrap();
    let hidden = cache.path().join("snapshots/.nfs0001");
    fs::write(&hidden, "").unwrap();
    assert_eq!(snapshots.sweep().await.unwrap(), 1);
    fs::write(&hidden, "").unwrap();
    make(&snapshots, &wanted, b"another").await.unwrap();
    assert_eq!(names(cache.path()), [record::key(&wanted)]);
}

#[tokio::test]
async fn a_guest_that_no_record_can_name_is_refused_before_anything_is_made() {
    use std::os::unix::ffi::OsStrExt as _;
    let (cache, snapshots, wanted) = world();
    let kernel = cache.path().join(std::ffi::OsStr::from_bytes(b"k\xff"));
    fs::write(&kernel, "kernel").unwrap();
    let refused = snapshots.begin(&Wanted { kernel, ..wanted }).await.err().unwrap();
    let refused = matchlock_model::failure::chain(&refused);
    assert!(refused.contains("not UTF-8"), "{refused}");
    assert_eq!(names(cache.path()), Vec::<String>::new());
}

#[tokio::test]
async fn the_reserve_of_the_disk_is_left_to_others() {
    let (cache, snapshots, wanted) = world();
    let huge = Wanted { memory_mb: u64::MAX >> 20, ..wanted.clone() };
    let refused = snapshots.begin(&huge).await.unwrap_err();
    assert!(matches!(refused, SnapshotError::NoSpace { .. }), "{refused}");
    assert_eq!(names(cache.path()), Vec::<String>::new());
    make(&snapshots, &wanted, b"memory").await.unwrap();
}
