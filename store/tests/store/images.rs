//! Images: who has which tag, and which blobs are still needed.

use matchlock_model::image::{ImageConfig, ImageRecord, ImageScope};
use matchlock_store::{
    BlobInUse, IMAGES_DB, ImageConn, RemovedImage, TaggedImage, open_images, read_images,
};
use rusqlite::Connection;
use tempfile::TempDir;

use crate::support::at;

pub(crate) fn image(scope: ImageScope, tag: &str, blob: &str, millis: i64) -> ImageRecord {
    ImageRecord {
        scope,
        tag: tag.to_owned(),
        digest: format!("sha256:image-{blob}"),
        size: 4_096,
        created_at: at(millis),
        source: "import".to_owned(),
        rootfs_path: format!("/images/blobs/{blob}.erofs"),
        layers: vec![format!("sha256:layer-{blob}")],
        config: ImageConfig { cmd: vec!["/bin/sh".to_owned()], ..ImageConfig::default() },
    }
}

fn images() -> (TempDir, ImageConn) {
    let dir = TempDir::new().unwrap();
    let conn = open_images(&dir.path().join("images")).unwrap();
    (dir, conn)
}

fn refs(dir: &TempDir) -> Vec<(String, i64)> {
    let conn = Connection::open(dir.path().join("images").join(IMAGES_DB)).unwrap();
    let mut query =
        conn.prepare("SELECT digest, ref_count FROM layer_refs ORDER BY digest").unwrap();
    let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)));
    rows.unwrap().map(Result::unwrap).collect()
}

#[test]
fn an_image_made_here_hides_one_that_was_pulled() {
    let (dir, mut conn) = images();
    let pulled = image(ImageScope::Registry, "tools:1", "a", 50);
    let made = image(ImageScope::Local, "tools:1", "b", 10);
    conn.put_image(&pulled, "sha256:a", at(0)).unwrap();
    assert_eq!(conn.find("tools:1").unwrap().as_ref(), Some(&pulled));
    conn.put_image(&made, "sha256:b", at(0)).unwrap();
    assert_eq!(conn.find("tools:1").unwrap().as_ref(), Some(&made));
    assert_eq!(conn.find("tools:2").unwrap(), None);
    let reader = read_images(&dir.path().join("images")).unwrap().unwrap();
    assert_eq!(reader.find("tools:1").unwrap(), Some(made.clone()));
    assert_eq!(reader.list().unwrap(), conn.list().unwrap());

    let removed = conn.remove_image(None, "tools:1", at(1)).unwrap().unwrap();
    assert_eq!((removed.record, removed.blob_in_use), (made, false));
    let removed = conn.remove_image(None, "tools:1", at(1)).unwrap().unwrap();
    assert_eq!((removed.record, removed.blob_in_use), (pulled, false));
    assert_eq!(conn.remove_image(None, "tools:1", at(1)).unwrap(), None);
    assert!(refs(&dir).is_empty());
}

#[test]
fn a_pulled_image_is_found_by_each_spelling_of_its_name() {
    let (_dir, mut conn) = images();
    let complete = "docker.io/library/alpine:latest";
    let pulled = image(ImageScope::Registry, complete, "a", 10);
    conn.put_image(&pulled, "sha256:a", at(0)).unwrap();
    for name in ["alpine", "alpine:latest", "library/alpine", "docker.io/alpine", complete] {
        assert_eq!(conn.find(name).unwrap().as_ref(), Some(&pulled), "{name}");
    }
    for name in ["alpine:3", "other/alpine", "h.io/alpine", "Alpine"] {
        assert_eq!(conn.find(name).unwrap(), None, "{name}");
    }
    // What was imported under the very text goes before it, with and without the tag that is meant.
    for (tag, version) in [("alpine", "b"), ("alpine:latest", "c")] {
        let made = image(ImageScope::Local, tag, version, 10);
        conn.put_image(&made, &format!("sha256:{version}"), at(0)).unwrap();
        for name in ["alpine", "alpine:latest"] {
            assert_eq!(conn.find(name).unwrap().as_ref(), Some(&made), "{name} for {tag}");
        }
        for name in ["alpine:3", "alpine:latest:latest", "alpine@sha256:b", "h.io:5000/alpine"] {
            assert_eq!(conn.find(name).unwrap(), None, "{name}");
        }
        assert_eq!(conn.remove_image(None, tag, at(1)).unwrap().unwrap().record, made);
    }
    assert_eq!(conn.find("alpine:latest").unwrap(), Some(pulled.clone()));
    let removed = conn.remove_image(None, "library/alpine", at(1)).unwrap().unwrap();
    assert_eq!(removed.record, pulled);
}

#[test]
fn images_are_listed_by_scope_and_newest_first() {
    let (_dir, mut conn) = images();
    for (scope, tag, millis) in [
        (ImageScope::Registry, "r-old", 0),
        (ImageScope::Registry, "r-new", 500),
        (ImageScope::Local, "l-old", 0),
        (ImageScope::Local, "l-new", 500),
    ] {
        conn.put_image(&image(scope, tag, tag, millis), tag, at(0)).unwrap();
    }
    let tags: Vec<_> = conn.list().unwrap().into_iter().map(|i| i.tag).collect();
    assert_eq!(tags, ["l-new", "l-old", "r-new", "r-old"]);
}

#[test]
fn a_shared_blob_is_needed_until_its_last_image_is_gone() {
    let (dir, mut conn) = images();
    for tag in ["one", "two"] {
        conn.put_image(&image(ImageScope::Local, tag, "a", 0), "sha256:a", at(0)).unwrap();
    }
    assert_eq!(refs(&dir), [("sha256:a".to_owned(), 2)]);
    let blob = BlobInUse {
        rootfs_path: "/images/blobs/a.erofs".to_owned(),
        digest: "sha256:a".to_owned(),
    };
    assert_eq!(conn.blobs_in_use().unwrap(), [blob]);
    let scope = Some(ImageScope::Local);
    let first = conn.remove_image(scope, "one", at(1)).unwrap().unwrap();
    assert!(first.blob_in_use);
    assert_eq!(refs(&dir), [("sha256:a".to_owned(), 1)]);
    let registry = Some(ImageScope::Registry);
    assert_eq!(conn.remove_image(registry, "two", at(1)).unwrap(), None);
    let second = conn.remove_image(scope, "two", at(1)).unwrap().unwrap();
    assert!(!second.blob_in_use);
    assert!(refs(&dir).is_empty());
    assert!(conn.blobs_in_use().unwrap().is_empty());
}

#[test]
fn a_tag_that_is_given_anew_tells_what_it_meant_before() {
    let (dir, mut conn) = images();
    let old = image(ImageScope::Local, "t", "a", 0);
    let new = image(ImageScope::Local, "t", "b", 1);
    assert_eq!(conn.put_image(&old, "sha256:a", at(0)).unwrap(), None);
    let replaced = |blob_in_use| Some(RemovedImage { record: old.clone(), blob_in_use });
    // The same again: its blob is its own.
    assert_eq!(conn.put_image(&old, "sha256:a", at(0)).unwrap(), replaced(true));
    assert_eq!(conn.put_image(&new, "sha256:b", at(0)).unwrap(), replaced(false));
    assert_eq!(conn.find("t").unwrap(), Some(new));
    assert_eq!(refs(&dir), [("sha256:b".to_owned(), 1)]);
}

#[test]
fn a_size_beyond_the_database_is_refused_and_nothing_written() {
    let (_dir, mut conn) = images();
    let mut huge = image(ImageScope::Local, "t", "a", 0);
    huge.size = u64::MAX;
    assert!(conn.put_image(&huge, "sha256:a", at(0)).is_err());
    assert!(conn.list().unwrap().is_empty());
}

#[test]
fn images_of_the_reference_are_read() {
    let (dir, mut conn) = images();
    let plain = Connection::open(dir.path().join("images").join(IMAGES_DB)).unwrap();
    plain
        .execute_batch(
            "INSERT INTO images VALUES ('registry', 'alpine', NULL, 7, '2025-11-02T08:00:00Z', NULL,
                 '/b/x.erofs', CAST('{\"cmd\":null,\"env\":{\"A\":\"1\"}}' AS BLOB), '2025-11-02T08:00:00Z');
             INSERT INTO image_layers VALUES ('registry', 'alpine', 0, 'd0', 'erofs', 3);
             INSERT INTO image_layers VALUES ('registry', 'alpine', 1, 'd1', 'erofs', 4);
             INSERT INTO layer_refs VALUES ('d0', 'erofs', 1, 3, 't'), ('d1', 'erofs', 1, 4, 't');",
        )
        .unwrap();
    let found = conn.find("alpine").unwrap().unwrap();
    assert_eq!((found.digest.as_str(), found.source.as_str(), found.size), ("", "", 7));
    assert_eq!(found.config.env["A"], "1");
    assert_eq!(conn.blobs_in_use().unwrap().len(), 2);
    let removed = conn.remove_image(None, "alpine", at(0)).unwrap().unwrap();
    assert!(!removed.blob_in_use);
    assert!(refs(&dir).is_empty());
}

#[test]
fn a_further_tag_is_a_local_one_of_the_same_blob() {
    let (dir, mut conn) = images();
    let pulled = image(ImageScope::Registry, "alpine", "a", 5);
    let other = image(ImageScope::Local, "mine", "b", 6);
    conn.put_image(&pulled, "sha256:a", at(0)).unwrap();
    conn.put_image(&other, "sha256:b", at(0)).unwrap();
    assert_eq!(conn.tag_image("missing", "mine", at(1)).unwrap(), None);
    let record = ImageRecord {
        scope: ImageScope::Local,
        tag: "mine".to_owned(),
        source: "tag".to_owned(),
        ..pulled.clone()
    };
    let replaced = Some(RemovedImage { record: other, blob_in_use: false });
    let tagged = conn.tag_image("alpine", "mine", at(1)).unwrap().unwrap();
    assert_eq!(tagged, TaggedImage { record: record.clone(), replaced });
    assert_eq!(conn.find("mine").unwrap(), Some(record));
    assert_eq!(refs(&dir), [("sha256:a".to_owned(), 2)]);
    // Its own tag changes nothing.
    let again = conn.tag_image("mine", "mine", at(2)).unwrap().unwrap();
    assert_eq!((again.record.tag.as_str(), again.replaced), ("mine", None));
    assert_eq!(refs(&dir), [("sha256:a".to_owned(), 2)]);
    // The local one hides the pulled one from now on.
    conn.tag_image("mine", "alpine", at(3)).unwrap().unwrap();
    assert_eq!(conn.find("alpine").unwrap().unwrap().scope, ImageScope::Local);
    assert_eq!(refs(&dir), [("sha256:a".to_owned(), 3)]);
}

#[test]
fn only_a_shared_image_is_removed_as_such() {
    let (dir, mut conn) = images();
    let local = ImageScope::Local;
    conn.put_image(&image(local, "one", "a", 0), "sha256:a", at(0)).unwrap();
    assert_eq!(conn.remove_shared_image(local, "one", at(1)).unwrap(), None);
    assert_eq!(conn.remove_shared_image(local, "missing", at(1)).unwrap(), None);
    conn.put_image(&image(ImageScope::Registry, "one", "a", 0), "sha256:a", at(0)).unwrap();
    let removed = conn.remove_shared_image(local, "one", at(1)).unwrap().unwrap();
    assert!(removed.blob_in_use && removed.record.scope == local);
    assert_eq!(refs(&dir), [("sha256:a".to_owned(), 1)]);
    assert_eq!(conn.remove_shared_image(ImageScope::Registry, "one", at(1)).unwrap(), None);
}
