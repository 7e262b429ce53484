//! The tables `images`, `image_layers` and `layer_refs`.
//!
//! # Invariants
//! * An image written here has one layer, ordinal 0: its root filesystem. Images of the reference
//!   may have more.
//! * `layer_refs` counts the rows of `image_layers` with each digest; nothing counted, no row.

use jiff::Timestamp;
use matchlock_model::image::{ImageConfig, ImageRecord, ImageScope};
use matchlock_model::reference::ImageReference;
use rusqlite::{Connection, OptionalExtension as _, Row, params};
use serde::{Deserialize, Serialize};

use super::{Reading, stored};
use crate::error::WriteError;
use crate::images::{BlobInUse, RemovedImage, TaggedImage};

const FS_TYPE: &str = "erofs";

const SELECT: &str = "
    SELECT scope, tag, digest, size, created_at, source, rootfs_path, oci_json FROM images";

/// The image that this tag means: as it stands, with or without `:latest`, or completed as the name of an
/// image in a registry. One made here hides one that was pulled.
pub(crate) fn find(conn: &Connection, tag: &str) -> rusqlite::Result<Option<ImageRecord>> {
    let latest = match tag.strip_suffix(":latest") {
        Some(name) if !names_a_version(name) => Some(name.to_owned()),
        None if !names_a_version(tag) => Some(format!("{tag}:latest")),
        _ => None,
    };
    for tag in std::iter::once(tag).chain(latest.as_deref()) {
        if let Some(record) = find_exact(conn, tag)? {
            return Ok(Some(record));
        }
    }
    match tag.parse::<ImageReference>().map(|reference| reference.to_string()) {
        Ok(complete) if complete != tag => find_exact(conn, &complete),
        _ => Ok(None),
    }
}

/// Whether a tag or a digest is behind the name. A port has a `/` after it.
fn names_a_version(tag: &str) -> bool {
    tag.rsplit('/').next().is_some_and(|last| last.contains([':', '@']))
}

fn find_exact(conn: &Connection, tag: &str) -> rusqlite::Result<Option<ImageRecord>> {
    for scope in [ImageScope::Local, ImageScope::Registry] {
        if let Some(record) = find_in(conn, scope, tag)? {
            return Ok(Some(record));
        }
    }
    Ok(None)
}

/// The image of this scope and tag.
pub(crate) fn find_in(
    conn: &Connection,
    scope: ImageScope,
    tag: &str,
) -> rusqlite::Result<Option<ImageRecord>> {
    conn.prepare_cached(&format!("{SELECT} WHERE scope = ?1 AND tag = ?2"))?
        .query_row([scope.name(), tag], read)
        .optional()
}

/// All images, those made here first, each group newest first.
pub(crate) fn all(conn: &Connection) -> rusqlite::Result<Vec<ImageRecord>> {
    let mut query = conn.prepare_cached(SELECT)?;
    let mut records = query.query_map([], read)?.collect::<rusqlite::Result<Vec<_>>>()?;
    records.sort_by(|a, b| {
        (a.scope.cmp(&b.scope))
            .then(b.created_at.cmp(&a.created_at))
            .then_with(|| a.tag.cmp(&b.tag))
    });
    Ok(records)
}

/// The JSON in `oci_json`. The layers' digests are ours: the reference does not know them there.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct OciJson {
    #[serde(flatten)]
    config: ImageConfig,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    layers: Vec<String>,
}

fn read(row: &Row<'_>) -> rusqlite::Result<ImageRecord> {
    let row = Reading::new(row, "images", "tag")?;
    let OciJson { config, layers } = row.json("oci_json")?.unwrap_or_default();
    Ok(ImageRecord {
        scope: row.scope("scope")?,
        tag: row.text("tag")?,
        digest: row.text("digest")?,
        size: row.number("size")?,
        created_at: row.parsed("created_at")?,
        source: row.text("source")?,
        rootfs_path: row.text("rootfs_path")?,
        layers,
        config,
    })
}

/// Writes an image; answers the one that had its scope and tag before.
pub(crate) fn put(
    conn: &Connection,
    image: &ImageRecord,
    rootfs_digest: &str,
    at: Timestamp,
) -> Result<Option<RemovedImage>, WriteError> {
    let size = i64::try_from(image.size)
        .map_err(|_| WriteError::TooLarge { what: "the image's size", value: image.size })?;
    let before = take(conn, image.scope, &image.tag, at)?;
    let oci = OciJson { config: image.config.clone(), layers: image.layers.clone() };
    conn.prepare_cached(
        "INSERT INTO images (scope, tag, digest, size, created_at, source, rootfs_path, oci_json,
                             updated_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
    )?
    .execute(params![
        image.scope.name(),
        image.tag,
        image.digest,
        size,
        stored(image.created_at),
        image.source,
        image.rootfs_path,
        super::to_json("the image's config", &oci)?,
        stored(at),
    ])?;
    conn.prepare_cached(
        "INSERT INTO image_layers (scope, tag, ordinal, digest, fs_type, size)
         VALUES (?1, ?2, 0, ?3, ?4, ?5)",
    )?
    .execute(params![image.scope.name(), image.tag, rootfs_digest, FS_TYPE, size])?;
    count_refs(conn, rootfs_digest, FS_TYPE, at)?;
    before.map(|before| before.settled(conn)).transpose()
}

/// Gives an image another tag, of scope local; `None` if there is no such image.
pub(crate) fn tag(
    conn: &Connection,
    source: &str,
    tag: &str,
    at: Timestamp,
) -> Result<Option<TaggedImage>, WriteError> {
    let Some(image) = find(conn, source)? else { return Ok(None) };
    let local = ImageScope::Local;
    if image.scope == local && image.tag == tag {
        return Ok(Some(TaggedImage { record: image, replaced: None }));
    }
    let before = take(conn, local, tag, at)?;
    let from = [image.scope.name(), &*image.tag];
    conn.prepare_cached(
        "INSERT INTO images (scope, tag, digest, size, created_at, source, rootfs_path, oci_json,
                             updated_at)
         SELECT ?3, ?4, digest, size, created_at, 'tag', rootfs_path, oci_json, ?5
         FROM images WHERE scope = ?1 AND tag = ?2",
    )?
    .execute(params![from[0], from[1], local.name(), tag, stored(at)])?;
    let layers = conn
        .prepare_cached(
            "INSERT INTO image_layers (scope, tag, ordinal, digest, fs_type, size)
             SELECT ?3, ?4, ordinal, digest, fs_type, size
             FROM image_layers WHERE scope = ?1 AND tag = ?2
             RETURNING digest, fs_type",
        )?
        .query_map(params![from[0], from[1], local.name(), tag], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })?
        .collect::<rusqlite::Result<Vec<(String, String)>>>()?;
    for (digest, fs_type) in &layers {
        count_refs(conn, digest, fs_type, at)?;
    }
    let record =
        ImageRecord { scope: local, tag: tag.to_owned(), source: "tag".to_owned(), ..image };
    let replaced = before.map(|before| before.settled(conn)).transpose()?;
    Ok(Some(TaggedImage { record, replaced }))
}

/// Removes an image if another one uses its blob; `None` if it is alone with it, or not there.
pub(crate) fn remove_shared(
    conn: &Connection,
    scope: ImageScope,
    tag: &str,
    at: Timestamp,
) -> Result<Option<RemovedImage>, WriteError> {
    let shared: bool = conn
        .prepare_cached(
            "SELECT EXISTS (
                 SELECT 1 FROM images AS i JOIN images AS o ON o.rootfs_path = i.rootfs_path
                 WHERE i.scope = ?1 AND i.tag = ?2 AND (o.scope <> i.scope OR o.tag <> i.tag))",
        )?
        .query_row([scope.name(), tag], |row| row.get(0))?;
    if shared { remove(conn, scope, tag, at) } else { Ok(None) }
}

/// Removes an image; `None` if there is none.
pub(crate) fn remove(
    conn: &Connection,
    scope: ImageScope,
    tag: &str,
    at: Timestamp,
) -> Result<Option<RemovedImage>, WriteError> {
    let taken = take(conn, scope, tag, at)?;
    taken.map(|taken| taken.settled(conn)).transpose()
}

/// An image whose rows are gone; who else uses its blob is asked when all is written.
struct Taken {
    record: ImageRecord,
    layers: Vec<(String, String)>,
}

impl Taken {
    fn settled(self, conn: &Connection) -> Result<RemovedImage, WriteError> {
        let mut blob_in_use: bool = conn
            .prepare_cached("SELECT EXISTS (SELECT 1 FROM images WHERE rootfs_path = ?1)")?
            .query_row([&self.record.rootfs_path], |row| row.get(0))?;
        for (digest, fs_type) in &self.layers {
            blob_in_use |= conn
                .prepare_cached(
                    "SELECT EXISTS (SELECT 1 FROM image_layers WHERE digest = ?1 AND fs_type = ?2)",
                )?
                .query_row([digest, fs_type], |row| row.get::<_, bool>(0))?;
        }
        Ok(RemovedImage { record: self.record, blob_in_use })
    }
}

fn take(
    conn: &Connection,
    scope: ImageScope,
    tag: &str,
    at: Timestamp,
) -> Result<Option<Taken>, WriteError> {
    let record = find_in(conn, scope, tag)?;
    conn.prepare_cached("DELETE FROM images WHERE scope = ?1 AND tag = ?2")?
        .execute([scope.name(), tag])?;
    let layers = conn
        .prepare_cached(
            "DELETE FROM image_layers WHERE scope = ?1 AND tag = ?2 RETURNING digest, fs_type",
        )?
        .query_map([scope.name(), tag], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<Vec<(String, String)>>>()?;
    for (digest, fs_type) in &layers {
        count_refs(conn, digest, fs_type, at)?;
    }
    Ok(record.map(|record| Taken { record, layers }))
}

fn count_refs(
    conn: &Connection,
    digest: &str,
    fs_type: &str,
    at: Timestamp,
) -> Result<(), WriteError> {
    conn.prepare_cached("DELETE FROM layer_refs WHERE digest = ?1 AND fs_type = ?2")?
        .execute([digest, fs_type])?;
    conn.prepare_cached(
        "INSERT INTO layer_refs (digest, fs_type, ref_count, size, updated_at)
         SELECT digest, fs_type, count(*), max(size), ?3 FROM image_layers
         WHERE digest = ?1 AND fs_type = ?2 GROUP BY digest, fs_type",
    )?
    .execute(params![digest, fs_type, stored(at)])?;
    Ok(())
}

/// All blobs that some image uses.
pub(crate) fn blobs_in_use(conn: &Connection) -> rusqlite::Result<Vec<BlobInUse>> {
    conn.prepare_cached(
        "SELECT DISTINCT i.rootfs_path, coalesce(l.digest, '') AS digest
         FROM images AS i
         LEFT JOIN image_layers AS l ON l.scope = i.scope AND l.tag = i.tag
         ORDER BY 1, 2",
    )?
    .query_map([], |row| {
        let row = Reading::new(row, "images", "rootfs_path")?;
        Ok(BlobInUse { rootfs_path: row.text("rootfs_path")?, digest: row.text("digest")? })
    })?
    .collect()
}
