//! The tables `images`, `image_layers` and `layer_refs`.
//!
//! # Invariants
//! * An image written here has one layer, ordinal 0: its root filesystem. Images of the reference
//!   may have more.
//! * `layer_refs` counts the rows of `image_layers` with each digest; nothing counted, no row.

use jiff::Timestamp;
use matchlock_model::image::{ImageRecord, ImageScope};
use matchlock_model::reference::ImageReference;
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::{Reading, stored};
use crate::error::WriteError;
use crate::images::{BlobInUse, RemovedImage};

const FS_TYPE: &str = "erofs";

const SELECT: &str = "
    SELECT scope, tag, digest, size, created_at, source, rootfs_path, oci_json FROM images";

/// The image that this tag means, as it stands or completed as the name of an image in a registry: one
/// made here hides one that was pulled.
pub(crate) fn find(conn: &Connection, tag: &str) -> rusqlite::Result<Option<ImageRecord>> {
    if let Some(record) = find_exact(conn, tag)? {
        return Ok(Some(record));
    }
    match tag.parse::<ImageReference>().map(|reference| reference.to_string()) {
        Ok(complete) if complete != tag => find_exact(conn, &complete),
        _ => Ok(None),
    }
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

fn read(row: &Row<'_>) -> rusqlite::Result<ImageRecord> {
    let row = Reading::new(row, "images", "tag")?;
    Ok(ImageRecord {
        scope: row.scope("scope")?,
        tag: row.text("tag")?,
        digest: row.text("digest")?,
        size: row.number("size")?,
        created_at: row.parsed("created_at")?,
        source: row.text("source")?,
        rootfs_path: row.text("rootfs_path")?,
        config: row.json("oci_json")?.unwrap_or_default(),
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
        super::to_json("the image's config", &image.config)?,
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
