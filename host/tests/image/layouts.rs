//! The forms an archive may have.

use std::path::PathBuf;

use matchlock_host::image::ImageError;
use serde_json::json;

use crate::archives::{
    Entry, Image, dir, file, gzip, gzip_twice, hard_link, host, oci, sha256, symlink, tar, zstd,
};
use crate::view::{self, Kind};
use crate::world::World;

fn hello() -> Image {
    let mut image =
        Image::of(&[&[dir("bin/"), file("bin/sh", "shell").mode(0o755)], &[file("hi", "there")]]);
    image.config = json!({
        "User": "app", "WorkingDir": "/srv", "Entrypoint": ["/bin/sh"], "Cmd": ["-c", "true"],
        "Env": ["PATH=/bin"],
    });
    image
}

#[test]
fn every_form_gives_the_same_image() {
    let Some(world) = World::new() else { return };
    let image = hello();
    let first = world.import(&image.saved()).unwrap();
    assert_eq!(first.digest, format!("sha256:{}", sha256(&image.config_text())));
    let ids: String =
        image.layers.iter().map(|(layer, _)| format!("sha256:{}\n", sha256(layer))).collect();
    let squashed = sha256(format!("matchlock-squash-v1\n{ids}").as_bytes());
    assert_eq!(first.rootfs_digest, format!("sha256:{squashed}"));
    assert_eq!(first.rootfs_path, world.dirs.blobs().join(format!("sha256_{squashed}.erofs")));
    assert!(first.size > 0 && first.size.is_multiple_of(512));
    assert_eq!((first.layers, first.config.user.as_str()), (2, "app"));
    assert_eq!(first.config.env["PATH"], "/bin");
    let bytes = std::fs::read(&first.rootfs_path).unwrap();

    let packed =
        [image.clone().packed(gzip), image.clone().packed(gzip_twice), image.clone().packed(zstd)];
    let mut archives =
        vec![image.oci(), gzip(&image.saved()), zstd(&image.oci()), gzip_twice(&image.oci())];
    archives.extend(packed.iter().flat_map(|image| [image.saved(), image.oci()]));
    for archive in archives {
        // Reused first, then made anew from this form.
        assert_eq!(world.import(&archive).unwrap(), first);
        matchlock_host::image::remove_blob(&world.dirs, &first.rootfs_path, &mut || false).unwrap();
        assert_eq!(world.import(&archive).unwrap(), first);
        assert!(std::fs::read(&first.rootfs_path).unwrap() == bytes, "the same tree, other bytes");
    }
    let view = view::erofs(&first.rootfs_path);
    assert_eq!(view["bin/sh"].kind, Kind::File(b"shell".to_vec()));
    assert_eq!(view["hi"].kind, Kind::File(b"there".to_vec()));
}

#[test]
fn an_archive_that_is_both_is_read_as_saved_by_docker() {
    let Some(world) = World::new() else { return };
    let image = hello();
    let (mut entries, descriptor) = image.oci_blobs();
    let blob = |data: &[u8]| format!("blobs/sha256/{}", sha256(data));
    let layers: Vec<_> = image.layers.iter().map(|(layer, _)| blob(layer)).collect();
    let manifest =
        json!([{ "Config": blob(&image.config_text()), "RepoTags": null, "Layers": layers }]);
    entries.push(file("manifest.json", manifest.to_string()));
    // Two images in the index: that the import works shows that manifest.json was preferred.
    let mut other = descriptor.clone();
    other["digest"] = json!(format!("sha256:{}", "0".repeat(64)));
    world.import(&oci(entries.clone(), &json!([descriptor, other]))).unwrap();

    let broken = entries.iter_mut().find(|entry| entry.name == layers[0].as_bytes()).unwrap();
    broken.data[0] ^= 1;
    let error = world.refused(&oci(entries, &json!([descriptor])));
    assert!(matches!(&error, ImageError::Damaged { what } if what.contains("digest")), "{error}");
}

#[test]
fn layers_may_be_links_within_the_archive() {
    let Some(world) = World::new() else { return };
    let layer = tar(&[file("a", "1")]);
    let image = Image::new(&[layer.clone(), layer]);
    for link in [
        symlink(format!("{:064x}/layer.tar", 1), format!("../{:064x}/layer.tar", 0)),
        hard_link(format!("{:064x}/layer.tar", 1), format!("{:064x}/layer.tar", 0)),
    ] {
        let mut entries = image.saved_members();
        let second = format!("{:064x}/layer.tar", 1);
        *entries.iter_mut().find(|e| e.name == second.as_bytes()).unwrap() = link;
        assert_eq!(world.import(&tar(&entries)).unwrap().layers, 2);
        entries.iter_mut().find(|e| e.name == second.as_bytes()).unwrap().link =
            b"../../etc/passwd".to_vec();
        let error = world.refused(&tar(&entries));
        assert!(matches!(error, ImageError::Hostile { .. }), "{error}");
        entries.iter_mut().find(|e| e.name == second.as_bytes()).unwrap().link =
            format!("/{second}").into_bytes();
        let error = world.refused(&tar(&entries));
        assert!(matches!(error, ImageError::Damaged { .. }), "{error}");
    }
}

fn nested(descriptors: &serde_json::Value) -> (Entry, serde_json::Value) {
    let text = json!({ "schemaVersion": 2, "manifests": descriptors }).to_string();
    let hex = sha256(text.as_bytes());
    let kind = "application/vnd.oci.image.index.v1+json";
    let descriptor =
        json!({ "mediaType": kind, "digest": format!("sha256:{hex}"), "size": text.len() });
    (file(format!("blobs/sha256/{hex}"), text), descriptor)
}

#[test]
fn the_platform_of_this_host_is_chosen() {
    let Some(world) = World::new() else { return };
    let image = hello();
    let mut foreign = Image::of(&[&[file("x", "")]]);
    foreign.architecture = "s390x".into();
    let (mut entries, ours) = image.oci_blobs();
    let (others, theirs) = foreign.oci_blobs();
    entries.extend(others);
    let mut attestation = theirs.clone();
    attestation["digest"] = json!(format!("sha256:{}", "a".repeat(64)));
    attestation["platform"] = json!({ "os": "unknown", "architecture": "unknown" });
    let mut variant = theirs.clone();
    variant["platform"] = json!({ "os": "linux", "architecture": host(), "variant": "v3" });
    let all = json!([theirs, attestation, variant, ours, ours]);
    let (index, descriptor) = nested(&all);
    let mut archive = entries.clone();
    archive.push(index);
    let chosen = world.import(&oci(archive, &json!([descriptor]))).unwrap();
    assert_eq!(chosen.digest, format!("sha256:{}", sha256(&image.config_text())));

    let error = world.refused(&oci(entries, &json!([theirs, attestation])));
    let ImageError::Platform { image, host: here } = error else { panic!("{error}") };
    assert!(image.contains("linux/s390x"), "{image}");
    assert_eq!(here, format!("linux/{}", host()));
    let error = world.refused(&foreign.saved());
    assert!(matches!(error, ImageError::Platform { .. }), "{error}");
}

#[test]
fn several_images_are_named_and_refused() {
    let Some(world) = World::new() else { return };
    let mut entries = hello().saved_members();
    let manifest = entries.last_mut().unwrap();
    let mut list: serde_json::Value = serde_json::from_slice(&manifest.data).unwrap();
    let mut second = list[0].clone();
    second["RepoTags"] = json!(["other:2"]);
    list[0]["RepoTags"] = json!(["one:latest"]);
    list.as_array_mut().unwrap().push(second);
    manifest.data = list.to_string().into_bytes();
    let error = world.refused(&tar(&entries)).to_string();
    assert!(error.contains("one:latest") && error.contains("other:2"), "{error}");

    let (mut entries, mut one) = hello().oci_blobs();
    let mut other = hello();
    other.config = json!({});
    let (more, mut two) = other.oci_blobs();
    entries.extend(more);
    one["annotations"] = json!({ "org.opencontainers.image.ref.name": "first" });
    two["annotations"] = json!({ "io.containerd.image.name": "docker.io/library/second:1" });
    let error = world.refused(&oci(entries, &json!([one, two]))).to_string();
    assert!(error.contains("first") && error.contains("docker.io/library/second:1"), "{error}");
}

#[test]
fn the_busybox_image_is_imported() {
    let Some(world) = World::new() else { return };
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/images/busybox.tar");
    let path =
        std::env::var_os("MATCHLOCK_TEST_BUSYBOX").map_or_else(|| default.into(), PathBuf::from);
    if !path.try_exists().unwrap() {
        eprintln!("skipped: no {}; make image", path.display());
        return;
    }
    let imported = world.import(&std::fs::read(path).unwrap()).unwrap();
    let view = view::erofs(&imported.rootfs_path);
    assert!(view.contains_key("bin/busybox"), "{:?}", view.keys());
}
