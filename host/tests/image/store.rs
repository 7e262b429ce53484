//! Leases, removal, and what crashes leave.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::sync::Barrier;

use matchlock_host::image::{
    BlobLease, ImageDirs, ImageError, ImportLimits, Swept, remove_blob, sweep_temporary,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{FlockOperation, flock};

use crate::archives::{Image, file, gzip};
use crate::view;
use crate::world::{World, import};

fn blob(dirs: &ImageDirs, name: &str) -> std::path::PathBuf {
    fs::create_dir_all(dirs.blobs()).unwrap();
    let path = dirs.blobs().join(name);
    fs::write(&path, "content").unwrap();
    path
}

#[test]
fn a_blob_with_a_lease_is_not_removed() {
    let place = tempfile::tempdir().unwrap();
    let dirs = ImageDirs::new(place.path());
    let path = blob(&dirs, "sha256_1.erofs");
    let (one, two) = (BlobLease::take(&path).unwrap(), BlobLease::take(&path).unwrap());
    assert!(one.size() > 0 && one.path() == path);
    assert!(matches!(remove_blob(&dirs, &path, &mut || false), Err(ImageError::InUse { .. })));
    drop(one);
    assert!(matches!(remove_blob(&dirs, &path, &mut || false), Err(ImageError::InUse { .. })));
    assert!(path.try_exists().unwrap());
    drop(two);
    remove_blob(&dirs, &path, &mut || false).unwrap();
    assert!(!path.try_exists().unwrap());
    remove_blob(&dirs, &path, &mut || false).unwrap();
    assert!(matches!(BlobLease::take(&path), Err(ImageError::NoBlob { .. })));
}

#[test]
fn a_blob_that_is_being_removed_cannot_be_leased() {
    let place = tempfile::tempdir().unwrap();
    let path = blob(&ImageDirs::new(place.path()), "sha256_1.erofs");
    let remover = File::open(&path).unwrap();
    flock(&remover, FlockOperation::LockExclusive).unwrap();
    assert!(matches!(BlobLease::take(&path), Err(ImageError::NoBlob { .. })));
    // Not by closing it: see below.
    flock(&remover, FlockOperation::Unlock).unwrap();
    BlobLease::take(&path).unwrap();
    fs::write(&path, "").unwrap();
    assert!(matches!(BlobLease::take(&path), Err(ImageError::NoBlob { .. })));
}

#[test]
fn only_files_directly_below_blobs_are_removed() {
    let place = tempfile::tempdir().unwrap();
    let dirs = ImageDirs::new(place.path());
    let inside = blob(&dirs, "fine");
    let target = place.path().join("target");
    fs::write(&target, "x").unwrap();
    symlink(&target, dirs.blobs().join("link")).unwrap();
    fs::create_dir(dirs.blobs().join("sub")).unwrap();
    fs::write(dirs.blobs().join("sub/file"), "x").unwrap();
    let blobs = dirs.blobs();
    for bad in [
        target.clone(),
        blobs.clone(),
        blobs.join("sub"),
        blobs.join("sub/file"),
        blobs.join("link"),
        blobs.join("../blobs/fine"),
        blobs.join(".."),
        "fine".into(),
        "/etc/hostname".into(),
    ] {
        let error = remove_blob(&dirs, &bad, &mut || false).unwrap_err();
        assert!(matches!(error, ImageError::NotABlob { .. }), "{bad:?}: {error}");
        assert!(matches!(BlobLease::take(&blobs.join("link")), Err(ImageError::NoBlob { .. })));
    }
    assert!(inside.try_exists().unwrap() && target.try_exists().unwrap());
    let nowhere = ImageDirs::new(&place.path().join("nowhere"));
    remove_blob(&nowhere, &nowhere.blobs().join("x"), &mut || false).unwrap();
}

#[test]
fn taking_and_removing_race_without_harm() {
    let place = tempfile::tempdir().unwrap();
    let dirs = ImageDirs::new(place.path());
    for round in 0..300 {
        let path = blob(&dirs, &format!("sha256_{round}"));
        let barrier = Barrier::new(2);
        let (lease, removed) = std::thread::scope(|scope| {
            let taker = scope.spawn(|| {
                barrier.wait();
                BlobLease::take(&path)
            });
            barrier.wait();
            let removed = remove_blob(&dirs, &path, &mut || false);
            (taker.join().unwrap(), removed)
        });
        match (&lease, &removed) {
            (Ok(_), Err(ImageError::InUse { .. })) => assert!(path.try_exists().unwrap()),
            (Err(ImageError::NoBlob { .. }), Ok(true)) => assert!(!path.try_exists().unwrap()),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_sweep_takes_what_the_dead_left() {
    let place = tempfile::tempdir().unwrap();
    let dirs = ImageDirs::new(place.path());
    assert_eq!(sweep_temporary(&dirs).unwrap(), Swept::default());
    let outside = place.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "sentinel").unwrap();
    let before = view::directory(&outside);
    let (dead, live) = (dirs.tmp().join("dead"), dirs.tmp().join("live"));
    fs::create_dir_all(dead.join("rootfs/a/b")).unwrap();
    fs::create_dir_all(live.join("rootfs")).unwrap();
    fs::write(dead.join("rootfs/a/b/f"), "").unwrap();
    // What an interrupted removal leaves, and links to everywhere.
    fs::create_dir_all(dead.join(".moved-1/x/.moved-2")).unwrap();
    symlink(&outside, dead.join("rootfs/out")).unwrap();
    symlink(&outside, dead.join("rootfs/a/out")).unwrap();
    symlink(&outside, dirs.tmp().join("link")).unwrap();
    fs::write(dirs.tmp().join("stray"), "").unwrap();
    // Deeper than there are descriptors or than a path can say.
    let mut deep =
        rustix::fs::open(&dead, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    for _ in 0..5000 {
        rustix::fs::mkdirat(&deep, "deep", rustix::fs::Mode::RWXU).unwrap();
        deep =
            rustix::fs::openat(&deep, "deep", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty())
                .unwrap();
    }
    let maker = File::open(&live).unwrap();
    flock(&maker, FlockOperation::LockExclusive).unwrap();
    assert_eq!(sweep_temporary(&dirs).unwrap(), Swept { removed: 3, kept: 1 });
    assert!(live.join("rootfs").try_exists().unwrap());
    assert_eq!(fs::read_dir(dirs.tmp()).unwrap().count(), 1);
    // Not by closing it: a child that another test is spawning holds a copy until its exec.
    flock(&maker, FlockOperation::Unlock).unwrap();
    assert_eq!(sweep_temporary(&dirs).unwrap(), Swept { removed: 1, kept: 0 });
    assert_eq!(view::directory(&outside), before);
}

#[test]
fn imports_and_sweeps_run_side_by_side() {
    let Some(world) = World::new() else { return };
    let limits = ImportLimits::default();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sweeper = scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                sweep_temporary(&world.dirs).unwrap();
            }
        });
        let importers: Vec<_> = (0..4)
            .map(|number| {
                let (dirs, limits) = (&world.dirs, &limits);
                scope.spawn(move || {
                    for round in 0..6 {
                        // Pairs of threads make the same image at about the same time.
                        let name = format!("{}-{round}", number % 2);
                        let archive = Image::of(&[&[file(name, "x")]]).saved();
                        let (image, lease) =
                            import(&mut archive.as_slice(), dirs, limits, &|_| {}, &|| false)
                                .unwrap();
                        let removed = remove_blob(dirs, &image.rootfs_path, &mut || false);
                        assert!(matches!(removed, Err(ImageError::InUse { .. })), "{removed:?}");
                        drop(lease);
                        match remove_blob(dirs, &image.rootfs_path, &mut || false) {
                            Ok(true) | Err(ImageError::InUse { .. }) => {}
                            other => panic!("{other:?}"),
                        }
                    }
                })
            })
            .collect();
        // All are joined before any is judged: the sweeper must hear of the end in any case.
        let ended: Vec<_> = importers.into_iter().map(|importer| importer.join()).collect();
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        for importer in ended {
            importer.unwrap();
        }
        sweeper.join().unwrap();
    });
    world.check();
    assert!(world.blobs().is_empty());
}

#[test]
fn an_empty_blob_is_replaced() {
    let Some(world) = World::new() else { return };
    let archive = Image::of(&[&[file("a", "x")]]).saved();
    let image = world.import(&archive).unwrap();
    fs::remove_file(&image.rootfs_path).unwrap();
    fs::write(&image.rootfs_path, "").unwrap();
    assert_eq!(world.import(&archive).unwrap(), image);
    assert!(view::erofs(&image.rootfs_path).contains_key("a"));
}

#[test]
fn a_full_disk_is_reported_and_left_clean() {
    let Some(world) = World::new() else { return };
    // Random, so that nothing makes it small; the first does not even fit while it is received.
    let mut noise = vec![0; 6 << 20];
    getrandom::fill(&mut noise).unwrap();
    let fits = Image::of(&[&[file("noise", &noise[..3 << 20])]]);
    let zeros = Image::of(&[&[file("zeros", vec![0; 16 << 20])]]);
    let mount_point = world.place("small");
    fs::create_dir(&mount_point).unwrap();
    let on_small_disk = move || {
        let none = None::<&str>;
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let (kind, size) = (Some("tmpfs"), Some("size=8m"));
        mount(kind, &mount_point, kind, MsFlags::empty(), size).unwrap();
        let dirs = ImageDirs::new(&mount_point);
        let attempt = |archive: Vec<u8>| {
            let limits = ImportLimits::default();
            let imported = import(&mut archive.as_slice(), &dirs, &limits, &|_| {}, &|| false);
            assert_eq!(fs::read_dir(dirs.tmp()).unwrap().count(), 0);
            imported
        };
        let full = |archive: Vec<u8>, place: &str| match attempt(archive).unwrap_err() {
            ImageError::NoSpace { path, .. } => {
                assert!(path.to_string_lossy().contains(place), "{path:?}");
            }
            other => panic!("{other}"),
        };
        full(Image::of(&[&[file("noise", noise.repeat(2))]]).saved(), "/spool/");
        full(zeros.packed(gzip).saved(), "/rootfs-0/zeros");
        // Twice 6 MiB is too much for the tree and its EROFS, but the layer alone fits, packed.
        let text = Image::of(&[&[file("text", vec![b'x'; 6 << 20])]]).packed(gzip);
        full(text.saved(), "/tmp/");
        assert_eq!(fs::read_dir(dirs.blobs()).unwrap().count(), 0);
        // With room again, the same directory works.
        drop(attempt(fits.saved()).unwrap());
        umount2(&mount_point, MntFlags::MNT_DETACH).unwrap();
    };
    std::thread::spawn(on_small_disk).join().unwrap();
}

#[test]
fn a_cache_behind_a_link_works() {
    let Some(world) = World::new() else { return };
    let (real, link) = (world.place("real"), world.place("link"));
    fs::create_dir(&real).unwrap();
    symlink(&real, &link).unwrap();
    let archive = Image::of(&[&[file("a/b/c", "x")]]).saved();
    let dirs = ImageDirs::new(&link);
    let (image, _lease) =
        import(&mut archive.as_slice(), &dirs, &ImportLimits::default(), &|_| {}, &|| false)
            .unwrap();
    assert!(image.rootfs_path.starts_with(&link));
    assert!(view::erofs(&image.rootfs_path).contains_key("a/b/c"));
}
