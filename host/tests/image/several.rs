//! Archives of several images, of several platforms, and of none: the files of a root filesystem.

use matchlock_host::image::{ImageError, ImportWish, Imported};
use serde_json::{Value, json};
use tar::EntryType;

use crate::archives::{
    Entry, Image, device, dir, entry, file, gzip, hard_link, host, oci, sha256, symlink, tar, zstd,
};
use crate::view::{self, Kind};
use crate::world::World;

fn refusal(world: &World, archive: &[u8], wish: &ImportWish) -> String {
    match world.wished(archive, wish) {
        Err(ImageError::Wish { what }) => what,
        Err(error @ ImageError::NoSuchPlatform { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

/// What came of an import: the tags and the digest of each image.
fn told(imported: Vec<Imported>) -> Vec<(Vec<String>, String)> {
    imported.into_iter().map(|one| (one.tags, one.image.digest)).collect()
}

fn digest(image: &Image) -> String {
    format!("sha256:{}", sha256(&image.config_text()))
}

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// Two images that share their first layer.
fn two() -> [Image; 2] {
    let base = tar(&[file("base", "")]);
    let other = Image::new(&[base.clone(), tar(&[file("more", "")])]);
    [Image::new(&[base]), other]
}

/// What `docker save` makes of two images with these tags.
fn saved_together(names: [Value; 2]) -> Vec<u8> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut list = Vec::new();
    for (image, names) in two().iter().zip(names) {
        let mut members = image.saved_members();
        let manifest: Value = serde_json::from_slice(&members.pop().unwrap().data).unwrap();
        let mut one = manifest[0].clone();
        one["RepoTags"] = names;
        list.push(one);
        entries.extend(members);
    }
    entries.push(file("manifest.json", json!(list).to_string()));
    tar(&entries)
}

#[test]
fn all_images_of_an_archive_are_imported_under_their_names() {
    let Some(world) = World::new() else { return };
    let archive = saved_together([json!(["a:1", "a:latest"]), json!(["b:2"])]);
    let all = world.wished(&archive, &ImportWish::default()).unwrap();
    let views: Vec<_> = all.iter().map(|one| view::erofs(&one.image.rootfs_path)).collect();
    assert!(views[1].contains_key("more") && !views[0].contains_key("more"));
    let [first, second] = two().map(|image| digest(&image));
    let expected =
        [(strings(&["a:1", "a:latest"]), first.clone()), (strings(&["b:2"]), second.clone())];
    assert_eq!(told(all), expected);
    // With a name, one of them, under exactly that name.
    for (tag, digest) in [("a", &first), ("a:1", &first), ("b:2", &second)] {
        let one = told(world.wished(&archive, &ImportWish::of(tag)).unwrap());
        assert_eq!(one, [(strings(&[tag]), digest.clone())]);
    }
    let what = refusal(&world, &archive, &ImportWish::of("b"));
    assert!(what.contains("a:1") && what.contains("b:2"), "{what}");
    // Without a name there is no tag to give.
    let nameless = saved_together([json!(["a:1"]), json!(null)]);
    let what = refusal(&world, &nameless, &ImportWish::default());
    assert!(what.contains("say which tag"), "{what}");
    let evil = saved_together([json!(["a:1"]), json!(["../../etc\u{1b}"])]);
    let error = world.wished(&evil, &ImportWish::default()).unwrap_err();
    assert!(matches!(error, ImageError::Damaged { .. }), "{error}");
    assert!(!error.to_string().contains('\u{1b}'), "{error}");
}

#[test]
fn names_of_a_layout_are_those_of_its_index() {
    let Some(world) = World::new() else { return };
    let [one, two] = two();
    let (mut entries, first) = one.oci_blobs();
    let (more, mut second) = two.oci_blobs();
    entries.extend(more);
    let named = |mut descriptor: Value, key: &str, name: &str| {
        descriptor["annotations"] = json!({ key: name });
        descriptor
    };
    let full = "io.containerd.image.name";
    let list = json!([
        named(first.clone(), full, "docker.io/library/one:1"),
        named(first, full, "one"),
        named(second.clone(), "org.opencontainers.image.ref.name", "two"),
    ]);
    let archive = oci(entries.clone(), &list);
    let all = told(world.wished(&archive, &ImportWish::default()).unwrap());
    let expected = [
        (strings(&["docker.io/library/one:1", "one"]), digest(&one)),
        (strings(&["two"]), digest(&two)),
    ];
    assert_eq!(all, expected);
    assert_eq!(told(world.wished(&archive, &ImportWish::of("two")).unwrap())[0].1, digest(&two));
    second["annotations"] = json!({});
    let what = refusal(&world, &oci(entries, &json!([second])), &ImportWish::default());
    assert!(what.contains("say which tag"), "{what}");
}

#[test]
fn a_platform_is_chosen_by_its_name() {
    let Some(world) = World::new() else { return };
    let images = [two()[0].clone(), two()[1].clone()];
    let (mut entries, plain) = images[0].oci_blobs();
    let (more, mut fast) = images[1].oci_blobs();
    entries.extend(more);
    fast["platform"] = json!({ "os": "linux", "architecture": host(), "variant": "v3" });
    let archive = oci(entries, &json!([plain, fast]));
    let of = |platform: &str| ImportWish {
        platform: Some(platform.parse().unwrap()),
        ..ImportWish::of("x")
    };
    let own = format!("linux/{}", host());
    let chosen =
        |platform: &str| world.wished(&archive, &of(platform)).map(|all| told(all)[0].1.clone());
    assert_eq!(chosen(&own).unwrap(), digest(&images[0]));
    assert_eq!(chosen(&format!("{own}/v3")).unwrap(), digest(&images[1]));
    let what = refusal(&world, &archive, &of("linux/s390x"));
    assert!(what.contains("linux/s390x") && what.contains(&format!("{own}/v3")), "{what}");
    let what = refusal(&world, &archive, &of(&format!("{own}/v9")));
    assert!(what.contains("/v9"), "{what}");
    // An image of another machine is kept when it is asked for, and says whose it is.
    let mut foreign = two()[0].clone();
    foreign.architecture = "s390x".into();
    let kept = world.wished(&foreign.oci(), &of("linux/s390x")).unwrap();
    assert_eq!(kept[0].image.config.platform, "linux/s390x");
    let error = world.wished(&foreign.oci(), &ImportWish::of("x")).unwrap_err();
    assert!(matches!(error, ImageError::Platform { .. }), "{error}");
}

#[test]
fn a_list_that_nobody_would_make_is_refused() {
    let Some(world) = World::new() else { return };
    let (blobs, descriptor) = two()[0].oci_blobs();
    let listed = |count: usize| {
        let name = |n: usize| {
            let mut one = descriptor.clone();
            one["annotations"] = json!({ "org.opencontainers.image.ref.name": format!("n:{n}") });
            one
        };
        oci(blobs.clone(), &json!((0..count).map(name).collect::<Vec<_>>()))
    };
    let all = world.wished(&listed(1000), &ImportWish::default()).unwrap();
    assert_eq!((all.len(), all[0].tags.len()), (1, 1000), "all are names of one image");
    let refused = world.wished(&listed(1001), &ImportWish::default());
    assert!(matches!(refused, Err(ImageError::TooLarge { .. })), "{refused:?}");
}

fn rootfs() -> Vec<Entry> {
    vec![
        dir("./").mode(0o755),
        dir("./bin/"),
        file("./bin/sh", "shell").mode(0o4755).owner(1, 2),
        hard_link("./bin/bash", "./bin/sh"),
        symlink("./up", "../../../etc"),
        device(EntryType::Char, "./null", 1, 3),
        entry(EntryType::Fifo, "./pipe"),
        // As web servers' and add-ons' images have them.
        file("./index.json", "[]"),
        file("./manifest.json", "\n{\"name\": \"an app\"}"),
    ]
}

#[test]
fn the_files_of_a_root_filesystem_are_an_image() {
    let Some(world) = World::new() else { return };
    let archive = tar(&rootfs());
    let changes = ["CMD [\"/bin/sh\"]", "ENV A=1", "STOPSIGNAL SIGINT"];
    let changes: Vec<_> = changes.iter().map(|text| text.parse().unwrap()).collect();
    let wish = ImportWish { changes, ..ImportWish::of("mine") };
    let mut first = world.wished(&archive, &wish).unwrap();
    let first = first.pop().unwrap();
    let image = &first.image;
    assert_eq!((first.tags, image.layers), (strings(&["mine"]), 1));
    assert_eq!(image.diff_ids, [format!("sha256:{}", sha256(&archive))]);
    assert_eq!(
        (image.config.cmd.clone(), image.config.env["A"].as_str()),
        (strings(&["/bin/sh"]), "1")
    );
    assert_eq!(image.config.stop_signal, "SIGINT");
    let view = view::erofs(&image.rootfs_path);
    assert_eq!(
        (view["bin/sh"].mode, view["bin/sh"].owner, view["bin/sh"].links),
        (0o4755, (1, 2), 2)
    );
    assert_eq!(view["up"].kind, Kind::Symlink(b"../../../etc".to_vec()));
    assert_eq!(view["null"].kind, Kind::Char(rustix::fs::makedev(1, 3)));
    // The same files are the same image, however they are packed.
    for packed in [gzip(&archive), zstd(&archive)] {
        let again = world.wished(&packed, &wish).unwrap();
        assert_eq!(again[0].image, *image);
    }
    // More files than an archive of images may have.
    let many: Vec<_> = (0..20_000).map(|n| file(format!("f/{n}"), "")).collect();
    let imported = world.wished(&tar(&many), &ImportWish::of("many")).unwrap();
    assert_eq!(view::erofs(&imported[0].image.rootfs_path).len(), 20_002);
}

#[test]
fn a_root_filesystem_needs_a_name_and_is_of_this_machine() {
    let Some(world) = World::new() else { return };
    let archive = tar(&rootfs());
    let what = refusal(&world, &archive, &ImportWish::default());
    assert!(what.contains("say which tag"), "{what}");
    let platform = Some("linux/s390x".parse().unwrap());
    let what = refusal(&world, &archive, &ImportWish { platform, ..ImportWish::of("x") });
    assert!(what.contains(host()), "{what}");
    let changes = vec!["CMD x".parse().unwrap()];
    let wish = ImportWish { changes, ..ImportWish::of("x") };
    let what = refusal(&world, &two()[0].saved(), &wish);
    assert!(what.contains("--change"), "{what}");
    // Hostile ones are refused as any layer is, and cut off ones too.
    for bad in [file("../x", ""), hard_link("l", "/etc/passwd")] {
        world.refused(&tar(&[dir("bin"), bad]));
    }
    let error = world.refused(&archive[..archive.len() / 2 / 512 * 512]);
    assert!(matches!(error, ImageError::Damaged { .. }), "{error}");
}
