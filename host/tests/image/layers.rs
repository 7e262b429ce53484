//! What layers become.

use matchlock_host::image::{ImageDirs, ImportLimits, ImportProgress};
use tar::EntryType;

use crate::archives::{
    Entry, Image, device, dir, entry, file, gzip, hard_link, members, pad, symlink, tar,
};
use crate::view::{Kind, View};
use crate::world::{World, import};

fn names(view: &View) -> Vec<&str> {
    view.keys().map(String::as_str).filter(|name| !name.is_empty()).collect()
}

fn text(view: &View, name: &str) -> String {
    match &view[name].kind {
        Kind::File(data) => String::from_utf8(data.clone()).unwrap(),
        other => panic!("{name} is {other:?}"),
    }
}

#[test]
fn attributes_are_kept() {
    let Some(world) = World::new() else { return };
    // The byte 0x0a in the capabilities is a newline to a careless reader of PAX records.
    let capability = [1, 0, 0, 2, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(250));
    let view = world.unpacked(&Image::of(&[&[
        dir("./").mode(0o1751).owner(7, 8).mtime(5),
        file("setuid", "x").mode(0o6755).owner(12, 4_000_000_000).mtime(1_234_567_890),
        file("fine", "").pax("mtime", "1600000000.123456789").pax("uid", "70000"),
        file("old", "").pax("mtime", "-5.5"),
        file("far", "").mtime(1 << 40),
        dir("sticky/").mode(0o1777).owner(3, 4).mtime(99),
        file("sticky/inside", ""),
        file("cap", "").xattr("security.capability", capability).xattr("user.note", "a\nb"),
        dir("labelled").xattr("user.dir", "1"),
        symlink("soft", "/proc/self/root/../x").owner(9, 10).mtime(77),
        device(EntryType::Char, "tty", 300, 70_000).mode(0o620).owner(0, 5).mtime(3),
        device(EntryType::Block, "disk", 8, 1),
        entry(EntryType::Fifo, "pipe").mode(0o600).xattr("trusted.note", "t"),
        file(&long, "long"),
        file("short", "by pax").pax("path", "p".repeat(180)),
        symlink("link", "ignored").pax("linkpath", "t".repeat(300)),
    ]]));
    let root = &view[""];
    assert_eq!((root.mode, root.owner, root.mtime), (0o1751, (7, 8), (5, 0)));
    let node = &view["setuid"];
    assert_eq!((node.mode, node.owner), (0o6755, (12, 4_000_000_000)));
    assert_eq!(node.mtime, (1_234_567_890, 0));
    assert_eq!((view["fine"].mtime, view["fine"].owner.0), ((1_600_000_000, 123_456_789), 70_000));
    assert_eq!(view["old"].mtime, (0, 0));
    assert!(view["far"].mtime.0 > 4_000_000_000, "{:?}", view["far"].mtime);
    let node = &view["sticky"];
    assert_eq!((node.mode, node.owner, node.mtime), (0o1777, (3, 4), (99, 0)));
    assert_eq!(view["cap"].xattrs["security.capability"], capability);
    assert_eq!(view["cap"].xattrs["user.note"], b"a\nb");
    assert_eq!(view["labelled"].xattrs["user.dir"], b"1");
    let node = &view["soft"];
    assert_eq!(node.kind, Kind::Symlink(b"/proc/self/root/../x".to_vec()));
    assert_eq!((node.owner, node.mtime), ((9, 10), (77, 0)));
    let node = &view["tty"];
    assert_eq!(node.kind, Kind::Char(rustix::fs::makedev(300, 70_000)));
    assert_eq!((node.mode, node.owner, node.mtime), (0o620, (0, 5), (3, 0)));
    assert_eq!(view["disk"].kind, Kind::Block(rustix::fs::makedev(8, 1)));
    assert_eq!((view["pipe"].kind.clone(), view["pipe"].mode), (Kind::Fifo, 0o600));
    assert_eq!(view["pipe"].xattrs["trusted.note"], b"t");
    assert_eq!(text(&view, &long), "long");
    let parent = &view[&"d".repeat(200)];
    assert_eq!((parent.mode, parent.owner, parent.mtime), (0o755, (0, 0), (0, 0)));
    assert_eq!(text(&view, &"p".repeat(180)), "by pax");
    assert_eq!(view["link"].kind, Kind::Symlink("t".repeat(300).into_bytes()));
}

#[test]
fn what_is_private_to_overlayfs_is_left_out() {
    let Some(world) = World::new() else { return };
    let image = Image::of(&[&[
        dir("d").xattr("trusted.overlay.opaque", "y").xattr("trusted.fine", "1"),
        dir("e").xattr("trusted.overlay.redirect", "/etc"),
        symlink("s", "t").xattr("user.x", "1"),
    ]]);
    let said = std::cell::RefCell::new(Vec::new());
    let progress = |step| {
        if let ImportProgress::LeftOut { what } = step {
            said.borrow_mut().push(what);
        }
    };
    let archive = image.saved();
    let dirs: &ImageDirs = &world.dirs;
    let (imported, _lease) =
        import(&mut archive.as_slice(), dirs, &ImportLimits::default(), &progress, &|| false)
            .unwrap();
    let view = crate::view::erofs(&imported.rootfs_path);
    assert_eq!(view["d"].xattrs.keys().collect::<Vec<_>>(), ["trusted.fine"]);
    assert!(view["e"].xattrs.is_empty() && view["s"].xattrs.is_empty());
    assert_eq!(said.borrow().len(), 3, "{said:?}");
}

#[test]
fn hard_links_share_a_file_across_layers() {
    let Some(world) = World::new() else { return };
    let view = world.unpacked(&Image::of(&[
        &[file("a/one", "x").mode(0o4755), hard_link("a/two", "a/one"), symlink("ln", "a")],
        &[
            hard_link("b/three", "/a/./one"),
            hard_link("four", "ln/two"),
            hard_link("a/one", "a/one"),
            hard_link("a/two", "a/one"),
            hard_link("ln2", "ln"),
        ],
    ]));
    let all = ["a/one", "a/two", "b/three", "four"];
    for name in all {
        assert_eq!((view[name].ino, view[name].links), (view[all[0]].ino, 4), "{name}");
        assert_eq!((text(&view, name).as_str(), view[name].mode), ("x", 0o4755));
    }
    assert_eq!(view["ln2"].kind, Kind::Symlink(b"a".to_vec()));
}

#[test]
fn whiteouts_hide_lower_layers_only() {
    let Some(world) = World::new() else { return };
    let lower: &[Entry] = &[
        file("gone", ""),
        file("stays", ""),
        dir("tree").mtime(50),
        file("tree/sub/x", ""),
        file("opaque/old", "").mtime(3),
        file("opaque/sub/old", ""),
        file("mixed/old", ""),
        file("mixed/kept/old", ""),
        file("both", "lower"),
        symlink("to-tree", "tree"),
    ];
    let upper: &[Entry] = &[
        file(".wh.gone", ""),
        file(".wh.missing", ""),
        file("nowhere/.wh.missing", ""),
        file("stays/.wh.below-a-file", ""),
        file("to-tree/.wh.sub", ""),
        // What comes before the whiteout in its own layer stays, and what comes after.
        file("opaque/before", ""),
        file("opaque/sub/before", ""),
        file("opaque/.wh..wh..opq", ""),
        file("opaque/after", ""),
        file("mixed/kept/new", ""),
        file(".wh.mixed", ""),
        file("both", "upper"),
        file(".wh.both", ""),
        file(".wh..wh.plnk/1.2", ""),
        file(".wh..wh.aufs", ""),
        file("nowhere-either/.wh..wh..opq", ""),
    ];
    let view = world.unpacked(&Image::of(&[lower, upper]));
    let expected = [
        "both",
        "mixed",
        "mixed/kept",
        "mixed/kept/new",
        "opaque",
        "opaque/after",
        "opaque/before",
        "opaque/sub",
        "opaque/sub/before",
        "stays",
        "to-tree",
        "tree",
    ];
    assert_eq!(names(&view), expected);
    assert_eq!(text(&view, "both"), "upper");
    assert_eq!(view["tree"].mtime, (50, 0), "a removal does not change the time");
}

#[test]
fn an_opaque_root_hides_everything() {
    let Some(world) = World::new() else { return };
    let view = world.unpacked(&Image::of(&[
        &[file("a/b/c", ""), file("d", "")],
        &[file("a/new", ""), file(".wh..wh..opq", "")],
    ]));
    assert_eq!(names(&view), ["a", "a/new"]);
}

#[test]
fn kinds_replace_each_other() {
    let Some(world) = World::new() else { return };
    let view = world.unpacked(&Image::of(&[
        &[
            file("file-dir", ""),
            dir("dir-file"),
            file("dir-file/x/y", ""),
            file("parent", ""),
            symlink("link-dir", "target"),
            dir("target"),
            file("link-file", "x"),
            dir("dir-link"),
            file("dir-link/x", ""),
            dir("merged").mode(0o700),
            file("merged/a", ""),
        ],
        &[
            dir("file-dir/"),
            file("dir-file", "now"),
            file("parent/child", ""),
            dir("link-dir"),
            symlink("link-file", "dir-file"),
            symlink("dir-link", "target"),
            dir("merged").mode(0o711),
            file("merged/b", ""),
        ],
    ]));
    assert_eq!(view["file-dir"].kind, Kind::Directory);
    assert_eq!(text(&view, "dir-file"), "now");
    assert_eq!(view["parent"].kind, Kind::Directory);
    assert_eq!(view["link-dir"].kind, Kind::Directory);
    assert_eq!(view["link-file"].kind, Kind::Symlink(b"dir-file".to_vec()));
    assert_eq!(view["dir-link"].kind, Kind::Symlink(b"target".to_vec()));
    assert_eq!(view["merged"].mode, 0o711);
    assert!(view.contains_key("merged/a") && view.contains_key("merged/b"));
    assert!(!view.contains_key("dir-link/x") && !view.contains_key("dir-file/x"));
}

#[test]
fn names_are_relative_to_the_root_and_links_stay_in_it() {
    let Some(world) = World::new() else { return };
    let view = world.unpacked(&Image::of(&[&[
        file("/abs/file", "1"),
        file(".//./dot/./file", "2"),
        dir("usr/lib"),
        symlink("lib", "usr/lib"),
        symlink("abs-lib", "/usr/lib"),
        symlink("up-lib", "../../../usr/lib"),
        file("lib/one", ""),
        file("abs-lib/two", ""),
        file("up-lib/three", ""),
        dir("abs-lib/sub"),
        file("twice", "first"),
        file("twice", "last"),
        Entry { kind: 0, ..file("v7dir/", "") },
        Entry { kind: b'7', ..file("contiguous", "c") },
    ]]));
    assert_eq!((text(&view, "abs/file"), text(&view, "dot/file")), ("1".into(), "2".into()));
    for name in ["one", "two", "three", "sub"] {
        assert!(view.contains_key(&format!("usr/lib/{name}")), "{name}");
    }
    assert_eq!(text(&view, "twice"), "last");
    assert_eq!(view["v7dir"].kind, Kind::Directory);
    assert_eq!(text(&view, "contiguous"), "c");
}

#[test]
fn sparse_files_and_big_numbers_are_read() {
    let Some(world) = World::new() else { return };
    let octal = |field: &mut [u8], value: u64| {
        let text = format!("{value:0width$o}\0", width = field.len() - 1);
        field.copy_from_slice(text.as_bytes());
    };
    // Five pieces: four in the header, the fifth in a block after it; then a hole to the end.
    let pieces: Vec<u64> = (0..5).map(|number| number * 8192 + 512).collect();
    let mut sparse = Entry { kind: b'S', ..file("sparse", vec![b'x'; 5 * 512]) }.header();
    let bytes = sparse.as_mut_bytes();
    for (slot, offset) in pieces[..4].iter().enumerate() {
        octal(&mut bytes[386 + 24 * slot..398 + 24 * slot], *offset);
        octal(&mut bytes[398 + 24 * slot..410 + 24 * slot], 512);
    }
    bytes[482] = 1;
    octal(&mut bytes[483..495], 50_000);
    sparse.set_cksum();
    let mut layer = sparse.as_bytes().to_vec();
    let mut more = [0_u8; 512];
    octal(&mut more[0..12], pieces[4]);
    octal(&mut more[12..24], 512);
    layer.extend(more);
    pad(&mut layer, &[b'x'; 5 * 512]);
    // A size in base 256, which other archivers use above 8 GiB.
    let mut big = file("big", "12345").header();
    big.as_old_mut().size = [0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5];
    big.set_cksum();
    layer.extend_from_slice(big.as_bytes());
    pad(&mut layer, b"12345");
    layer.extend(tar(&[file("after", "a").pax("size", "1")]));
    let view = world.unpacked(&Image::new(&[layer]));
    let mut expected = vec![0_u8; 50_000];
    for offset in pieces {
        let start = usize::try_from(offset).unwrap();
        expected[start..start + 512].fill(b'x');
    }
    assert!(view["sparse"].kind == Kind::File(expected));
    assert_eq!((text(&view, "big"), text(&view, "after")), ("12345".into(), "a".into()));
}

#[test]
fn a_layer_is_hashed_to_its_very_end() {
    let Some(world) = World::new() else { return };
    // No end mark, a global header, and padding far behind the end: all legal.
    let bare = members(&[file("a", "1")]);
    let global = Entry { kind: b'g', ..file("pax_global_header", b"20 comment=a-commit\n") };
    let mut padded = tar(&[global, file("b", "2")]);
    padded.resize(100 * 1024, 0);
    // Not even the padding of its last file: `umoci insert` does that.
    let mut cut = members(&[file("c", "3")]);
    cut.truncate(513);
    let view = world.unpacked(&Image::new(&[bare, padded, cut]).packed(gzip));
    assert_eq!(names(&view), ["a", "b", "c"]);
    assert_eq!(text(&view, "c"), "3");
}
