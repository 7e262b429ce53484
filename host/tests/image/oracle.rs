//! What real programs pack is what comes out: a directory with everything in it, packed by GNU tar,
//! bsdtar and umoci, against that directory itself.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, chown, lchown, symlink};
use std::path::Path;
use std::process::Command;

use matchlock_host::image::ImportWish;
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

use crate::archives::Image;
use crate::view::{self, Kind, View};
use crate::world::World;

/// Runs a program of the host; what it prints.
fn run(program: &str, args: &[&str], directory: &Path) -> Vec<u8> {
    let output = Command::new(program).args(args).current_dir(directory).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {said}");
    output.stdout
}

/// The attributes that a format can hold.
#[derive(Clone, Copy, PartialEq)]
struct Holds {
    nanoseconds: bool,
    xattrs: bool,
    /// Names over 100 bytes, big numbers.
    long: bool,
}

const ALL: Holds = Holds { nanoseconds: true, xattrs: true, long: true };
const GNU: Holds = Holds { nanoseconds: false, xattrs: false, long: true };
const USTAR: Holds = Holds { nanoseconds: false, xattrs: false, long: false };

/// Sets the time of last change, following no link.
fn touch(path: &Path, seconds: i64, nanos: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanos };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn node(path: &Path, kind: FileType, mode: u32, device: (u32, u32)) {
    let device = rustix::fs::makedev(device.0, device.1);
    rustix::fs::mknodat(CWD, path, kind, Mode::from_raw_mode(mode), device).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}

/// A directory with everything that a format can hold.
fn fill(root: &Path, holds: Holds) {
    let at = |name: &str| root.join(name);
    for directory in ["bin", "etc/deep/er", "tmp", "dev", "empty"] {
        fs::create_dir_all(at(directory)).unwrap();
    }
    fs::write(at("bin/su"), "setuid").unwrap();
    chown(at("bin/su"), Some(12), Some(34)).unwrap();
    fs::set_permissions(at("bin/su"), fs::Permissions::from_mode(0o6755)).unwrap();
    fs::hard_link(at("bin/su"), at("etc/deep/er/linked")).unwrap();
    fs::write(at("etc/line\nbreak \\ \u{e4}"), "odd name").unwrap();
    fs::write(at("empty-file"), "").unwrap();
    fs::set_permissions(at("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    symlink("../../nowhere", at("etc/dangling")).unwrap();
    lchown(at("etc/dangling"), Some(5), Some(6)).unwrap();
    symlink("su", at("bin/link")).unwrap();
    node(&at("dev/null"), FileType::CharacterDevice, 0o666, (1, 3));
    node(&at("dev/disk"), FileType::BlockDevice, 0o660, (8, 17));
    node(&at("dev/pipe"), FileType::Fifo, 0o600, (0, 0));
    let holes = File::create(at("holes")).unwrap();
    holes.set_len(3 << 20).unwrap();
    for number in 0..30 {
        holes.write_all_at(&[b'x'; 5000], number * 100_000).unwrap();
    }
    File::create(at("hole-only")).unwrap().set_len(200_000).unwrap();
    if holds.long {
        let long = at(&format!("{}/{}", "d".repeat(200), "f".repeat(250)));
        fs::create_dir(long.parent().unwrap()).unwrap();
        fs::write(&long, "long").unwrap();
        fs::hard_link(&long, at(&"h".repeat(180))).unwrap();
        symlink("t".repeat(300), at("long-link")).unwrap();
        fs::write(at("big-ids"), "").unwrap();
        chown(at("big-ids"), Some(4_000_000_000), Some(3_000_000)).unwrap();
        // Later than 32 bits can say.
        touch(&at("big-ids"), 8_000_000_000, 0);
    }
    if holds.xattrs {
        let capability = [1, 0, 0, 2, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        xattr(&at("bin/su"), "security.capability", &capability);
        xattr(&at("empty-file"), "trusted.note", b"a\nb\0c");
        xattr(&at("empty"), "trusted.directory", b"");
    }
    let nanos = if holds.nanoseconds { 123_456_789 } else { 0 };
    for (name, seconds) in [("bin/su", 1_234_567_890), ("etc/dangling", 77), ("dev/null", 5)] {
        touch(&at(name), seconds, nanos);
    }
}

/// What two trees have in common, whatever file systems they are on.
fn comparable(view: &View, holds: Holds) -> Vec<String> {
    let line = |(name, node): (&String, &view::Node)| {
        let time = (node.mtime.0, if holds.nanoseconds { node.mtime.1 } else { 0 });
        let links = if node.kind == Kind::Directory { 0 } else { node.links };
        let kind = match &node.kind {
            Kind::File(data) => format!("file {} {}", data.len(), crate::archives::sha256(data)),
            other => format!("{other:?}"),
        };
        let (mode, owner, xattrs) = (node.mode, node.owner, &node.xattrs);
        format!("{name:?} {kind} {mode:o} {owner:?} {time:?} {links} {xattrs:?}")
    };
    view.iter().map(line).collect()
}

fn assert_same(found: &View, expected: &View, holds: Holds, how: &str) {
    let (found, expected) = (comparable(found, holds), comparable(expected, holds));
    let missing: Vec<_> = expected.iter().filter(|line| !found.contains(line)).collect();
    let strange: Vec<_> = found.iter().filter(|line| !expected.contains(line)).collect();
    assert!(missing.is_empty() && strange.is_empty(), "{how}:\n{missing:#?}\n{strange:#?}");
}

#[test]
fn what_tar_and_bsdtar_pack_comes_out_again() {
    let Some(world) = World::new() else { return };
    let cases: &[(&str, &[&str], Holds)] = &[
        ("tar", &["--format=gnu"], GNU),
        ("tar", &["--format=gnu", "--sparse"], GNU),
        ("tar", &["--format=oldgnu", "--sparse"], GNU),
        ("tar", &["--format=ustar"], USTAR),
        ("tar", &["--format=v7", "--exclude=./dev/*"], USTAR),
        ("tar", &["--format=pax", "--xattrs", "--xattrs-include=*"], ALL),
        ("tar", &["--format=pax", "--xattrs", "--xattrs-include=*", "--sparse"], ALL),
        (
            "tar",
            &["--format=pax", "--xattrs", "--xattrs-include=*", "--sparse-version=0.0", "--sparse"],
            ALL,
        ),
        (
            "tar",
            &["--format=pax", "--xattrs", "--xattrs-include=*", "--sparse-version=0.1", "--sparse"],
            ALL,
        ),
        (
            "tar",
            &["--format=pax", "--xattrs", "--xattrs-include=*", "--sparse-version=1.0", "--sparse"],
            ALL,
        ),
        ("bsdtar", &["--format=pax", "--xattrs"], ALL),
        ("bsdtar", &["--format=pax", "--xattrs", "--read-sparse"], ALL),
        ("bsdtar", &["--format=gnutar"], GNU),
        ("bsdtar", &["--format=ustar"], USTAR),
    ];
    for (number, (program, options, holds)) in cases.iter().enumerate() {
        let tree = world.place(&format!("tree-{number}"));
        fs::create_dir(&tree).unwrap();
        fill(&tree, *holds);
        if options.contains(&"--exclude=./dev/*") {
            // This format knows no devices.
            fs::remove_dir_all(tree.join("dev")).unwrap();
            fs::create_dir(tree.join("dev")).unwrap();
        }
        let args = [&["-c", "-f", "-"], *options, &["."]].concat();
        let how = format!("{program} {args:?}");
        let layer = run(program, &args, &tree);
        // As a layer of an image, and as a root filesystem by itself.
        let imported = world.wished(&layer, &ImportWish::of("rootfs")).unwrap();
        let expected = view::directory(&tree);
        assert_same(&view::erofs(&imported[0].image.rootfs_path), &expected, *holds, &how);
        let image = world.import(&Image::new(&[layer]).saved()).unwrap();
        assert_eq!(image.rootfs_path, imported[0].image.rootfs_path, "{how}");
        fs::remove_dir_all(&tree).unwrap();
    }
}

/// An image that umoci makes, layer by layer, and the tree that it has in the end.
#[test]
fn layers_that_umoci_makes_come_out_as_its_own_tree() {
    let Some(world) = World::new() else { return };
    let place = world.place("umoci");
    fs::create_dir(&place).unwrap();
    let umoci = |args: &[&str]| drop(run("umoci", args, &place));
    umoci(&["init", "--layout", "layout"]);
    umoci(&["new", "--image", "layout:tool"]);
    umoci(&["unpack", "--image", "layout:tool", "bundle"]);
    let root = place.join("bundle/rootfs");
    let holds = Holds { nanoseconds: false, ..ALL };
    fill(&root, holds);
    // umoci itself makes 1901 of a later one.
    touch(&root.join("big-ids"), 2_000_000_000, 0);
    for name in ["a", "b"] {
        fs::create_dir_all(root.join(name).join("sub")).unwrap();
        fs::write(root.join(name).join("sub/file"), name).unwrap();
    }
    let repack = || umoci(&["repack", "--refresh-bundle", "--image", "layout:tool", "bundle"]);
    repack();
    // Removed, replaced by another kind, merged, changed in its attributes alone.
    fs::remove_dir_all(root.join("etc/deep")).unwrap();
    fs::remove_file(root.join("bin/link")).unwrap();
    fs::create_dir(root.join("bin/link")).unwrap();
    fs::remove_dir_all(root.join("a")).unwrap();
    fs::write(root.join("a"), "a file now").unwrap();
    fs::remove_file(root.join("b/sub/file")).unwrap();
    fs::write(root.join("b/sub/other"), "new").unwrap();
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o700)).unwrap();
    repack();
    fs::remove_dir_all(root.join("b/sub")).unwrap();
    fs::create_dir(root.join("b/sub")).unwrap();
    fs::write(root.join("b/sub/last"), "").unwrap();
    fs::remove_file(root.join("a")).unwrap();
    repack();
    umoci(&[
        "config",
        "--image",
        "layout:tool",
        "--config.stopsignal",
        "SIGQUIT",
        "--config.entrypoint",
        "/bin/su",
        "--config.label",
        "a=b",
        "--config.user",
        "7:8",
    ]);
    let archive = run("tar", &["-c", "-C", "layout", "."], &place);
    let all = world.wished(&archive, &ImportWish::default()).unwrap();
    assert_eq!((all[0].tags.as_slice(), all[0].image.layers), (&["tool".to_owned()][..], 3));
    let config = &all[0].image.config;
    assert_eq!((config.stop_signal.as_str(), config.user.as_str()), ("SIGQUIT", "7:8"));
    assert_eq!(
        (config.entrypoint.as_slice(), config.labels["a"].as_str()),
        (&["/bin/su".to_owned()][..], "b")
    );
    // The oracle: the layers as umoci itself unpacks them.
    umoci(&["unpack", "--image", "layout:tool", "again"]);
    let expected = view::directory(&place.join("again/rootfs"));
    let found = view::erofs(&all[0].image.rootfs_path);
    assert_same(&found, &expected, holds, "umoci");
    assert!(!found.contains_key("etc/deep") && !found.contains_key("a"));
}
