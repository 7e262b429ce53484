//! Archives that are cut off, contradict themselves, or are none.

use std::io::{self, Read};

use matchlock_host::image::{ImageError, ImportLimits};
use serde_json::json;

use crate::archives::{Image, dir, file, gzip, oci, tar, zstd};
use crate::world::{World, import};

fn damaged(world: &World, archive: &[u8]) -> String {
    match world.refused(archive) {
        ImageError::Damaged { what } => what,
        other => panic!("{other}"),
    }
}

fn not_an_archive(world: &World, archive: &[u8]) -> String {
    match world.refused(archive) {
        ImageError::NotAnArchive { what } => what,
        other => panic!("{other}"),
    }
}

fn small() -> Image {
    Image::of(&[&[dir("d"), file("d/f", vec![b'x'; 3000])], &[file("g", "1"), file(".wh.d", "")]])
}

#[test]
fn what_is_cut_off_never_succeeds() {
    let Some(world) = World::new() else { return };
    let saved = small().saved();
    let layout = small().packed(zstd).oci();
    // The last 1024 bytes are the end mark, of which the first half is enough.
    for archive in [&saved[..saved.len() - 512], &layout[..layout.len() - 512]] {
        world.import(archive).unwrap();
        for length in (0..archive.len()).step_by(97).chain(archive.len() - 512..archive.len()) {
            world.refused(&archive[..length]);
        }
    }
    for packed in [gzip(&saved), zstd(&saved)] {
        for length in (0..packed.len()).step_by(41).chain(packed.len() - 12..packed.len()) {
            world.refused(&packed[..length]);
        }
    }
}

#[test]
fn a_cut_off_layer_is_damaged_whatever_its_diff_id_says() {
    let Some(world) = World::new() else { return };
    let layer = tar(&[file("a", vec![b'x'; 2000])]);
    for length in [100, 512, 700, 2000, 2511] {
        damaged(&world, &Image::new(&[layer[..length].to_vec()]).saved());
        damaged(&world, &Image::new(&[layer[..length].to_vec()]).packed(gzip).oci());
    }
    // The compressed form is cut off; the digest of the blob is right.
    let cut: fn(&[u8]) -> Vec<u8> = |data| {
        let packed = gzip(data);
        packed[..packed.len() - 4].to_vec()
    };
    assert!(damaged(&world, &Image::new(&[layer]).packed(cut).oci()).contains("gzip"));
}

#[test]
fn digests_are_checked() {
    let Some(world) = World::new() else { return };
    let mut image = small();
    let wrong = format!("sha256:{}", "0".repeat(64));
    image.diff_ids = Some(vec![wrong.clone(), wrong.clone()]);
    assert!(damaged(&world, &image.saved()).contains("layer 1 of 2"));
    image.diff_ids = Some(vec![wrong]);
    assert!(damaged(&world, &image.saved()).contains("its config lists 1"));
    image.diff_ids = Some(vec!["sha512:00".into(), "sha512:00".into()]);
    assert!(damaged(&world, &image.saved()).contains("sha512:00"));

    let image = small();
    for number in 0..4 {
        let (mut entries, descriptor) = image.oci_blobs();
        entries[number].data.push(b' ');
        assert!(damaged(&world, &oci(entries, &json!([descriptor]))).contains("digest"));
    }
    let (entries, mut descriptor) = image.oci_blobs();
    descriptor["size"] = json!(1);
    assert!(damaged(&world, &oci(entries.clone(), &json!([descriptor]))).contains("has"));
    descriptor["digest"] = json!("sha512:00");
    damaged(&world, &oci(entries.clone(), &json!([descriptor])));
    descriptor["digest"] = json!(format!("sha256:{}", "0".repeat(64)));
    assert!(damaged(&world, &oci(entries, &json!([descriptor]))).contains("missing"));
    // docker-save names its config by digest.
    let mut entries = image.saved_members();
    let at = entries.len() - 2;
    entries[at].data.push(b' ');
    assert!(damaged(&world, &tar(&entries)).contains("digest"));
}

#[test]
fn a_blob_that_is_there_does_not_hide_damage() {
    let Some(world) = World::new() else { return };
    let image = small();
    let imported = world.import(&image.saved()).unwrap();
    let mut entries = image.saved_members();
    let at = entries.iter().position(|entry| entry.name.ends_with(b"layer.tar")).unwrap();
    let data = &mut entries[at].data;
    let last = data.len() - 1;
    data[last] ^= 1;
    damaged(&world, &tar(&entries));
    assert_eq!(world.import(&image.saved()).unwrap(), imported);
}

#[test]
fn documents_with_the_wrong_shape_are_damaged() {
    let Some(world) = World::new() else { return };
    let put = |manifest: &str| tar(&[file("a", ""), file("manifest.json", manifest)]);
    for bad in [
        "[]",
        "[1]",
        "[{}]",
        r#"[{"Config":1,"Layers":[]}]"#,
        r#"[{"Config":"a","Layers":"x"}]"#,
        r#"[{"Config":"missing","Layers":[]}]"#,
        r#"[{"Config":"a","Layers":["missing"]}]"#,
        r#"[{"Config":"a","Layers":[]}]"#,
        &"[".repeat(100_000),
    ] {
        damaged(&world, &put(bad));
    }
    let mut image = small();
    for config in [json!({"Cmd": "sh"}), json!({"Env": ["=X"]}), json!([]), json!({"User": {}})] {
        image.config = config;
        damaged(&world, &image.saved());
        damaged(&world, &image.oci());
    }
    damaged(&world, &Image::new(&[]).saved());
    damaged(&world, &Image::new(&[]).oci());
    damaged(&world, &oci(Vec::new(), &json!([])));
    damaged(&world, &oci(Vec::new(), &json!({})));
}

#[test]
fn what_is_no_archive_is_called_so() {
    let Some(world) = World::new() else { return };
    for bad in [
        Vec::new(),
        b"hello".to_vec(),
        vec![b'x'; 5000],
        vec![0; 10_240],
        tar(&[]),
        gzip(b"text"),
        gzip(b""),
    ] {
        not_an_archive(&world, &bad);
    }
    let mut parts = small().saved_members();
    parts.pop();
    let what = not_an_archive(&world, &tar(&parts));
    assert!(what.contains("manifest.json"), "{what}");
    let what = not_an_archive(&world, &tar(&small().oci_blobs().0));
    assert!(what.contains("index.json"), "{what}");
    assert!(not_an_archive(&world, b"\xfd7zXZ\0rest").contains("xz"));
    assert!(not_an_archive(&world, b"BZh91AY&SY").contains("bzip2"));
    let mut parts = small().oci_blobs().0;
    parts.push(file("index.json", "{}"));
    assert!(not_an_archive(&world, &tar(&parts)).contains("oci-layout"));
    let strange =
        [file("index.json", "{}"), file("oci-layout", r#"{"imageLayoutVersion":"2.0.0"}"#)];
    assert!(not_an_archive(&world, &tar(&strange)).contains("2.0.0"));
}

struct Failing<'a>(&'a [u8]);

impl Read for Failing<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buffer)? {
            0 => Err(io::Error::other("the cable was pulled")),
            count => Ok(count),
        }
    }
}

#[test]
fn a_failing_input_is_not_called_a_damaged_archive() {
    let Some(world) = World::new() else { return };
    for start in [small().saved(), gzip(&small().saved())] {
        let start = &start[..start.len() / 2];
        let limits = ImportLimits::default();
        let error =
            import(&mut Failing(start), &world.dirs, &limits, &|_| {}, &|| false).unwrap_err();
        assert!(matches!(error, ImageError::Read(_)), "{error}");
        world.check();
    }
}

#[test]
fn cancelling_leaves_nothing_at_any_time() {
    let Some(world) = World::new() else { return };
    let archive = small().packed(gzip).saved();
    let count = std::cell::Cell::new(0_u32);
    let mut finished = false;
    // Every time that it asks is one of the places where it may be cancelled.
    for last in (0..).map(|round| round * 3) {
        count.set(0);
        let cancelled = || count.replace(count.get() + 1) >= last;
        let imported = import(
            &mut archive.as_slice(),
            &world.dirs,
            &ImportLimits::default(),
            &|_| {},
            &cancelled,
        );
        world.check();
        match imported {
            Err(ImageError::Cancelled) => assert!(world.blobs().is_empty()),
            Err(error) => panic!("{error}"),
            Ok(_) => finished = true,
        }
        if finished {
            break;
        }
    }
    assert_eq!(world.blobs().len(), 1);
}

#[test]
fn without_root_nothing_is_read() {
    struct Untouched;
    impl Read for Untouched {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            panic!("read before the check")
        }
    }
    let place = tempfile::tempdir().unwrap();
    let dirs = matchlock_host::image::ImageDirs::new(place.path());
    let attempt = move || {
        if rustix::process::geteuid().is_root() {
            // Only this thread becomes somebody else.
            let nobody = rustix::process::Uid::from_raw(65_534);
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
        }
        import(&mut Untouched, &dirs, &ImportLimits::default(), &|_| {}, &|| false).map(|_| ())
    };
    let error = std::thread::spawn(attempt).join().unwrap().unwrap_err();
    assert!(matches!(error, ImageError::NeedsRoot), "{error}");
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0);
}
