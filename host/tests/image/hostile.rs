//! What a hostile archive may try. The world checks after each import that nothing outside changed.

use matchlock_host::image::{ImageError, ImportLimits};
use tar::EntryType;

use crate::archives::{
    Entry, Image, device, dir, entry, file, gzip, hard_link, members, symlink, tar, zstd,
};
use crate::view::Kind;
use crate::world::World;

fn one_layer(entries: &[Entry]) -> Vec<u8> {
    Image::of(&[entries]).saved()
}

#[test]
fn names_that_lead_upwards_are_refused() {
    let Some(world) = World::new() else { return };
    for bad in ["../../outside/file", "..", "a/../../outside/new", "/../x", "a/..", "./.."] {
        for bad in [
            file(bad, "x"),
            dir(bad),
            symlink(bad, "x"),
            hard_link("l", bad),
            file(format!("{bad}/.wh.x"), ""),
            entry(EntryType::Fifo, bad),
        ] {
            let error = world.refused(&one_layer(&[dir("a"), file("b", ""), bad.clone()]));
            assert!(matches!(error, ImageError::Hostile { .. }), "{bad:?}: {error}");
        }
    }
    for bad in [".wh...", ".wh..", ".wh.", "a/.wh...", ".wh.a/b"] {
        let error = world.refused(&one_layer(&[dir("a"), file(bad, "")]));
        assert!(matches!(error, ImageError::Hostile { .. }), "{bad}: {error}");
    }
    // The archive's own names.
    let mut archive = Image::of(&[&[file("a", "")]]).saved_members();
    archive.push(file("../outside/file", "x"));
    let error = world.refused(&tar(&archive));
    assert!(matches!(error, ImageError::Hostile { .. }), "{error}");
}

#[test]
fn writing_through_links_stays_inside() {
    let Some(world) = World::new() else { return };
    let outside = world.outside();
    let outside = outside.to_str().unwrap();
    // An absolute link, and one that climbs out of the real directory: both lead into the image.
    for target in [outside.to_owned(), format!("../../../../../../../../..{outside}"), "/".into()] {
        let view = world.unpacked(&Image::of(&[
            &[dir(outside), symlink("out", &target), dir("d"), symlink("d/out", &target)],
            &[file("out/new", "inside"), file("d/out/deep/er/new", ""), file("out/.wh.file", "")],
        ]));
        let place = if target == "/" { String::new() } else { format!("{}/", &outside[1..]) };
        assert_eq!(view[&format!("{place}new")].kind, Kind::File(b"inside".to_vec()));
        assert!(view.contains_key(&format!("{place}deep/er/new")));
    }
    // The same without the directory in the image: a link to nowhere is not a way to anywhere.
    for below in [file("out/new", ""), file("out/a/b", ""), dir("out/x"), hard_link("out/l", "f")] {
        let error = world.refused(&one_layer(&[file("f", ""), symlink("out", outside), below]));
        assert!(matches!(error, ImageError::Damaged { .. }), "{error}");
    }
    // As the last part of a name it is replaced, not followed.
    let view = world.unpacked(&Image::of(&[&[
        symlink("out", format!("{outside}/file")),
        file("out", "mine").mode(0o777).owner(1, 1),
        symlink("dir", outside),
        dir("dir").mode(0o700),
        symlink("fifo", format!("{outside}/file")),
        entry(EntryType::Fifo, "fifo").mode(0o666),
    ]]));
    assert_eq!(view["out"].kind, Kind::File(b"mine".to_vec()));
    assert_eq!(
        (view["dir"].kind.clone(), view["fifo"].kind.clone()),
        (Kind::Directory, Kind::Fifo)
    );
}

#[test]
fn whiteouts_through_links_hide_nothing_outside() {
    let Some(world) = World::new() else { return };
    let outside = world.outside();
    let outside = outside.to_str().unwrap();
    let view = world.unpacked(&Image::of(&[
        &[symlink("out", outside), symlink("up", "../../../..")],
        &[
            file("out/.wh.file", ""),
            file("out/.wh..wh..opq", ""),
            file("out/deep/.wh..wh..opq", ""),
            file(format!("up{outside}/.wh.file"), ""),
            file("proc/self/root/.wh.tmp", ""),
        ],
    ]));
    assert_eq!(view.len(), 3);
}

#[test]
fn magic_links_are_only_text() {
    let Some(world) = World::new() else { return };
    for target in ["/proc/self/root", "/proc/self/cwd", "/proc/self/fd/0", "/dev/fd/3"] {
        let error = world
            .refused(&one_layer(&[symlink("m", target), file("m/tmp/matchlock-was-here", "")]));
        assert!(matches!(error, ImageError::Damaged { .. }), "{error}");
    }
    let view = world.unpacked(&Image::of(&[&[file("proc/self/root/tmp/x", "")]]));
    assert!(view.contains_key("proc/self/root/tmp/x"));
    let error = world.refused(&one_layer(&[symlink("a", "b"), symlink("b", "a"), file("a/x", "")]));
    assert!(matches!(error, ImageError::Damaged { .. }), "{error}");
}

#[test]
fn hard_links_lead_to_files_of_the_image() {
    let Some(world) = World::new() else { return };
    let outside = world.outside().join("file");
    let outside = outside.to_str().unwrap();
    for bad in [
        vec![hard_link("l", outside)],
        vec![hard_link("l", "/etc/passwd")],
        vec![hard_link("l", "missing")],
        vec![dir("d"), hard_link("l", "d")],
        vec![hard_link("l", "l")],
        vec![hard_link("l", "/")],
        vec![symlink("s", "/"), hard_link("l", "s/etc/passwd")],
        vec![file("d/f", ""), hard_link("d", "d/f")],
        vec![hard_link("l", "")],
    ] {
        let error = world.refused(&one_layer(&bad));
        assert!(matches!(error, ImageError::Damaged { .. }), "{bad:?}: {error}");
    }
    // A hard link to a link is the link, not the file outside.
    let view = world.unpacked(&Image::of(&[&[
        symlink("s", outside),
        hard_link("l", "s"),
        file("l", "mine"),
    ]]));
    assert_eq!(view["l"].kind, Kind::File(b"mine".to_vec()));
}

#[test]
fn devices_are_made_and_never_opened() {
    let Some(world) = World::new() else { return };
    // Opening the fifo for writing would hang, the device would swallow the content.
    let view = world.unpacked(&Image::of(&[
        &[entry(EntryType::Fifo, "fifo"), device(EntryType::Char, "null", 1, 3)],
        &[file("fifo", "f"), file("null", "n"), file("null2", "")],
        &[device(EntryType::Char, "null2", 1, 3), device(EntryType::Char, "white", 0, 0)],
    ]));
    assert_eq!(view["fifo"].kind, Kind::File(b"f".to_vec()));
    assert_eq!(view["null"].kind, Kind::File(b"n".to_vec()));
    assert_eq!(view["null2"].kind, Kind::Char(rustix::fs::makedev(1, 3)));
    for parent in [entry(EntryType::Fifo, "p"), device(EntryType::Block, "p", 8, 0)] {
        for below in [file("p/x", ""), file("p/x/y", ""), dir("p/x"), hard_link("p/x", "f")] {
            let error = world.refused(&one_layer(&[file("f", ""), parent.clone(), below]));
            assert!(error.to_string().contains(r#"below "p", a device"#), "{error}");
        }
        // With a whiteout there is nothing to hide.
        let hidden = file("p/.wh..wh..opq", "");
        assert_eq!(world.unpacked(&Image::of(&[&[parent, hidden]])).len(), 2);
    }
}

#[test]
fn what_makes_no_sense_is_damaged() {
    let Some(world) = World::new() else { return };
    let v7 = |mut bad: Entry| {
        bad.kind = b'1';
        bad
    };
    for bad in [
        file("", "no name"),
        file(".", "a root that is a file"),
        symlink(".", "x"),
        symlink("s", ""),
        Entry { kind: b'Z', ..file("unknown", "") },
        Entry { kind: b'V', ..file("volume", "") },
        file("a", "").owner(u64::from(u32::MAX), 0),
        file("a", "").owner(0, u64::from(u32::MAX) + 1),
        file("a", "").pax("uid", "-1"),
        file("a", "").pax("path", "a\0b"),
        file("a", "").pax("size", "x"),
        file("a", "").pax("mtime", "today"),
        file("a", "").xattr("", "x"),
        v7(file("l", "")),
    ] {
        let error = world.refused(&one_layer(std::slice::from_ref(&bad)));
        assert!(matches!(error, ImageError::Damaged { .. }), "{bad:?}: {error}");
    }
    let error = world.refused(&one_layer(&[file("a", "").pax("GNU.sparse.major", "1")]));
    assert!(matches!(error, ImageError::Damaged { .. }), "{error}");
}

#[test]
fn the_content_of_a_directory_is_not_read_as_members() {
    let Some(world) = World::new() else { return };
    let hidden = members(&[file("smuggled", "").mode(0o4755)]);
    // `tar`, Python and Go pass over it, whatever its name says.
    let view = world.unpacked(&Image::of(&[&[file("dir/", &hidden), file("after", "a")]]));
    assert_eq!(view["dir"].kind, Kind::Directory);
    assert!(view.contains_key("after") && !view.contains_key("smuggled"), "{view:?}");
    // Of the oldest form GNU tar passes over it and Go does not.
    let oldest = Entry { kind: 0, ..file("dir/", &hidden) };
    let error = world.refused(&one_layer(&[oldest]));
    assert!(error.to_string().contains("programs read differently"), "{error}");
    let empty = Entry { kind: 0, ..file("dir/", "") };
    assert_eq!(world.unpacked(&Image::of(&[&[empty]]))["dir"].kind, Kind::Directory);
}

fn limit(world: &World, archive: &[u8], limits: &ImportLimits) -> String {
    match world.import_with(archive, limits) {
        Err(ImageError::TooLarge { limit }) => limit,
        other => panic!("{other:?}"),
    }
}

#[test]
fn limits_are_named() {
    let Some(world) = World::new() else { return };
    let standard = ImportLimits::default();
    let small = ImportLimits { max_bytes: 1 << 20, ..standard };
    // What follows the end of a layer is read as well, for its digest.
    let mut zeros = tar(&[file("a", "")]);
    zeros.resize(8 << 20, 0);
    for bomb in [
        Image::new(std::slice::from_ref(&zeros)).packed(gzip).saved(),
        Image::new(std::slice::from_ref(&zeros)).packed(zstd).oci(),
    ] {
        assert!(bomb.len() < 1 << 20);
        assert_eq!(limit(&world, &bomb, &small), "1 MiB of unpacked layers");
    }
    let file_bomb = Image::of(&[&[file("zeros", vec![0; 8 << 20])]]).packed(gzip);
    assert_eq!(limit(&world, &file_bomb.saved(), &small), "1 MiB of unpacked files");
    let plain = Image::new(std::slice::from_ref(&zeros));
    assert_eq!(limit(&world, &plain.saved(), &small), "1 MiB of archive");
    assert_eq!(limit(&world, &gzip(&plain.saved()), &small), "1 MiB of archive");
    // Nothing ever comes out of this one, and it has no end.
    let endless = gzip(b"").repeat(1 << 16);
    assert_eq!(limit(&world, &endless, &small), "1 MiB of archive");
    let few = ImportLimits { max_entries: 10, ..standard };
    let many: Vec<_> = (0..11).map(|n| file(format!("f{n}"), "")).collect();
    assert_eq!(limit(&world, &one_layer(&many), &few), "10 files in the image");
    // Directories that no entry mentions count as well.
    assert_eq!(
        limit(&world, &one_layer(&[file("a/".repeat(20) + "f", "")]), &few),
        "10 files in the image"
    );
    let two = ImportLimits { max_layers: 2, ..standard };
    let layer = tar(&[file("a", "")]);
    assert_eq!(limit(&world, &Image::new(&vec![layer; 3]).saved(), &two), "2 layers");
    let short = ImportLimits { max_json_bytes: 64, ..standard };
    assert_eq!(limit(&world, &one_layer(&[]), &short), "64 bytes in a JSON document");
    assert_eq!(
        limit(&world, &one_layer(&[file("n".repeat(256), "")]), &standard),
        "255 bytes in a name"
    );
    assert_eq!(
        limit(&world, &one_layer(&[file("a/".repeat(2500), "")]), &standard),
        "4095 bytes in a path"
    );
    let huge = one_layer(&[file("a", "").pax("comment", vec![b'x'; 2 << 20])]);
    assert_eq!(limit(&world, &huge, &standard), "1 MiB for the description of a file");
    let mut files: Vec<_> = (0..16_400).map(|n| file(n.to_string(), "")).collect();
    files.push(file("manifest.json", "[]"));
    assert_eq!(limit(&world, &tar(&files), &standard), "16384 files in the archive");
}

#[test]
fn files_that_are_mostly_holes_are_counted_in_full() {
    let Some(world) = World::new() else { return };
    let standard = ImportLimits::default();
    // A sparse file of 1 TiB in one block.
    let mut sparse = Entry { kind: b'S', ..file("sparse", "") }.header();
    sparse.as_gnu_mut().unwrap().set_real_size(1 << 40);
    sparse.set_cksum();
    let layer = [sparse.as_bytes().to_vec(), tar(&[])].concat();
    assert_eq!(limit(&world, &Image::new(&[layer]).saved(), &standard), "64 GiB of unpacked files");

    // The same as PAX writes it down, and one whose map goes on and on.
    let map = |text: &str| format!("{text:\0<512}");
    let pax = |map: String| {
        let size = (1_u64 << 40).to_string();
        let file = file("sparse", map).pax("GNU.sparse.major", "1").pax("GNU.sparse.minor", "0");
        one_layer(&[file.pax("GNU.sparse.realsize", size)])
    };
    assert_eq!(limit(&world, &pax(map("0\n")), &standard), "64 GiB of unpacked files");
    assert_eq!(limit(&world, &pax(map("70000\n")), &standard), "65536 pieces of a file");
}

#[test]
fn a_file_for_which_the_disk_has_no_room_is_refused_before_it_is_written() {
    let Some(world) = World::new() else { return };
    let limits = ImportLimits { max_bytes: u64::MAX, ..ImportLimits::default() };
    let disk = rustix::fs::statvfs(world.outside().as_path()).unwrap();
    let size = disk.f_bavail * disk.f_frsize;
    // Half a block in the archive and next to nothing in the tree; an EROFS has its holes in full.
    let map = format!("{:\0<512}", "0\n");
    let holes = file("sparse", map).pax("GNU.sparse.major", "1").pax("GNU.sparse.minor", "0");
    let holes = holes.pax("GNU.sparse.realsize", size.to_string());
    let error = world.import_with(&one_layer(&[holes]), &limits).map(drop).unwrap_err();
    assert!(matches!(error, ImageError::NoSpace { needed, .. } if needed >= size), "{error}");
    assert!(error.to_string().contains("matchlock image gc"), "{error}");
    assert!(world.blobs().is_empty());
    let few = ImportLimits { max_build_memory: 65 << 20, ..ImportLimits::default() };
    let many: Vec<_> = (0..300).map(|n| file(format!("f{n}"), "")).collect();
    let limit = limit(&world, &one_layer(&many), &few);
    assert!(limit.contains("mkfs.erofs lacks memory"), "{limit}");
}

#[test]
fn depth_is_limited_however_it_is_reached() {
    let Some(world) = World::new() else { return };
    let standard = ImportLimits::default();
    let message = limit(&world, &one_layer(&[dir("a/".repeat(1000))]), &standard);
    assert!(message.contains("512 directories"), "{message}");
    // Each step is short, by a link to the deepest place so far.
    let mut entries = vec![
        dir("x".to_owned() + &"/a".repeat(400)),
        symlink("l0", "x".to_owned() + &"/a".repeat(400)),
    ];
    entries.push(dir("l0".to_owned() + &"/b".repeat(400)));
    let message = limit(&world, &one_layer(&entries), &standard);
    assert!(message.contains("512 directories"), "{message}");
    let long = vec!["n".repeat(250); 16].join("/");
    let message = limit(&world, &one_layer(&[dir(long)]), &standard);
    assert!(message.contains("4095 bytes in a path"), "{message}");
    // As deep as may be works, and can be removed.
    let deep = "a/".repeat(511);
    let view = world.unpacked(&Image::of(&[&[file(format!("{deep}f"), "")], &[file("b", "")]]));
    assert!(view.contains_key(&format!("{deep}f")));
    let view = world.unpacked(&Image::of(&[&[file(format!("{deep}f"), "")], &[file(".wh.a", "")]]));
    assert_eq!(view.len(), 1);
}

#[test]
fn messages_hold_no_control_characters() {
    let Some(world) = World::new() else { return };
    let evil = "\x1b[2J\x07\r";
    let mut two = Image::of(&[&[file("a", "")]]);
    let mut saved = two.saved_members();
    let manifest = serde_json::json!([
        { "Config": "c", "RepoTags": [evil], "Layers": [] }, { "Config": evil, "Layers": [] }
    ]);
    saved.push(file("manifest.json", manifest.to_string()));
    let mut archives = vec![tar(&saved)];
    let manifest = serde_json::json!([{ "Config": evil, "Layers": [] }]);
    archives.push(tar(&[file("manifest.json", manifest.to_string())]));
    two.architecture = evil.into();
    archives.push(two.saved());
    two.architecture = "x".repeat(100_000);
    archives.push(two.saved());
    for bad in [file(format!("../{evil}"), ""), symlink(evil, ""), hard_link(evil, evil)] {
        archives.push(one_layer(&[bad]));
    }
    for archive in archives {
        let text = world.refused(&archive).to_string();
        assert!(!text.contains(char::is_control) && text.len() < 2000, "{text:?}");
    }
}

#[test]
fn looking_at_the_same_names_again_and_again_is_counted() {
    let Some(world) = World::new() else { return };
    let limits = ImportLimits { max_entries: 2000, ..ImportLimits::default() };
    let mut entries: Vec<_> = (0..100).map(|n| file(format!("d/{n}"), "")).collect();
    let honest = [entries.clone(), vec![file("d/.wh..wh..opq", "")]].concat();
    assert!(world.import_with(&one_layer(&honest), &limits).is_ok());
    entries.extend((0..100).map(|_| file("d/.wh..wh..opq", "")));
    assert_eq!(limit(&world, &one_layer(&entries), &limits), "2000 files in the image");
}

#[test]
fn an_archive_that_ends_in_a_description_is_damaged() {
    let Some(world) = World::new() else { return };
    let mut layer = members(&[file("a", "").pax("path", "b")]);
    layer.truncate(1024);
    let error = world.refused(&Image::new(&[layer]).saved());
    assert!(matches!(error, ImageError::Damaged { .. }), "{error}");
}
