//! The images' metadata: one connection that writes it, one that reads it.
//!
//! # Invariants
//! * Each write is one IMMEDIATE transaction.
//! * Whether a blob is still used is told by the transaction that removed an image of it. Another
//!   process may add one right after: who deletes blobs holds the lock of the image directory.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use matchlock_model::image::{ImageRecord, ImageScope};
use rusqlite::{Connection, TransactionBehavior};

use crate::error::{DbFault, OpenError, ReadError, WriteError};
use crate::files::DbFiles;
use crate::migrate;
use crate::migrations;
use crate::open::IMAGES_DB;
use crate::points::IMAGES;
use crate::rows::images as rows;

/// An image that is not in the metadata any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemovedImage {
    /// What it was.
    pub record: ImageRecord,
    /// Whether another image uses its root filesystem.
    pub blob_in_use: bool,
}

/// An image that has got another tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaggedImage {
    /// The image under its new tag.
    pub record: ImageRecord,
    /// The image that had the tag before.
    pub replaced: Option<RemovedImage>,
}

/// A blob that some image uses.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobInUse {
    /// The root filesystem's file, as the image names it.
    pub rootfs_path: String,
    /// The digest of one of the image's layers; empty if none is known.
    pub digest: String,
}

/// The connection that writes the images' metadata; made by [`open_images`](crate::open_images).
#[derive(Debug)]
pub struct ImageConn {
    conn: Connection,
    path: PathBuf,
}

impl ImageConn {
    pub(crate) fn new(conn: Connection, path: PathBuf) -> Self {
        Self { conn, path }
    }

    /// Writes an image whose root filesystem has this digest; answers the image that had its scope
    /// and tag before.
    ///
    /// # Errors
    /// When it could not be written; then nothing was.
    pub fn put_image(
        &mut self,
        image: &ImageRecord,
        rootfs_digest: &str,
        at: Timestamp,
    ) -> Result<Option<RemovedImage>, WriteError> {
        IMAGES.before("put_image")?;
        let replaced = self.write(|conn| rows::put(conn, image, rootfs_digest, at))?;
        IMAGES.after("put_image")?;
        Ok(replaced)
    }

    /// Removes the image that this tag means, in this scope or, without one, as [`Self::find`]
    /// looks for it; `None` if there is none.
    ///
    /// # Errors
    /// When it could not be written; then nothing was.
    pub fn remove_image(
        &mut self,
        scope: Option<ImageScope>,
        tag: &str,
        at: Timestamp,
    ) -> Result<Option<RemovedImage>, WriteError> {
        IMAGES.before("remove_image")?;
        let removed = self.write(|conn| {
            if let Some(scope) = scope {
                return rows::remove(conn, scope, tag, at);
            }
            match rows::find(conn, tag)? {
                Some(record) => rows::remove(conn, record.scope, &record.tag, at),
                None => Ok(None),
            }
        })?;
        IMAGES.after("remove_image")?;
        Ok(removed)
    }

    /// Removes the image of this scope and tag if another one uses its root filesystem: then nothing
    /// of it is lost, whoever runs from it. `None` if it is alone with it, or not there.
    ///
    /// # Errors
    /// When it could not be written; then nothing was.
    pub fn remove_shared_image(
        &mut self,
        scope: ImageScope,
        tag: &str,
        at: Timestamp,
    ) -> Result<Option<RemovedImage>, WriteError> {
        IMAGES.before("remove_shared")?;
        let removed = self.write(|conn| rows::remove_shared(conn, scope, tag, at))?;
        IMAGES.after("remove_shared")?;
        Ok(removed)
    }

    /// Gives the image that a tag means another tag, in scope local; `None` if there is none. Both
    /// use the same root filesystem then.
    ///
    /// # Errors
    /// When it could not be written; then nothing was.
    pub fn tag_image(
        &mut self,
        source: &str,
        tag: &str,
        at: Timestamp,
    ) -> Result<Option<TaggedImage>, WriteError> {
        IMAGES.before("tag_image")?;
        let tagged = self.write(|conn| rows::tag(conn, source, tag, at))?;
        IMAGES.after("tag_image")?;
        Ok(tagged)
    }

    /// The image that this tag means: one made here hides one that was pulled.
    ///
    /// # Errors
    /// When it could not be read.
    pub fn find(&self, tag: &str) -> Result<Option<ImageRecord>, ReadError> {
        rows::find(&self.conn, tag).map_err(|e| ReadError::of(&self.path, e))
    }

    /// All images, those made here first, each group newest first.
    ///
    /// # Errors
    /// When they could not be read.
    pub fn list(&self) -> Result<Vec<ImageRecord>, ReadError> {
        rows::all(&self.conn).map_err(|e| ReadError::of(&self.path, e))
    }

    /// All blobs that some image uses.
    ///
    /// # Errors
    /// When they could not be read.
    pub fn blobs_in_use(&self) -> Result<Vec<BlobInUse>, ReadError> {
        rows::blobs_in_use(&self.conn).map_err(|e| ReadError::of(&self.path, e))
    }

    fn write<T>(
        &mut self,
        work: impl Fn(&Connection) -> Result<T, WriteError>,
    ) -> Result<T, WriteError> {
        let mut write = || {
            let tx = self.conn.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let answer = work(&tx)?;
            tx.commit()?;
            Ok(answer)
        };
        write().map_err(|e: WriteError| e.in_file(&self.path))
    }
}

/// A connection that reads the images' metadata.
#[derive(Debug)]
pub struct ImageReader {
    conn: Connection,
    path: PathBuf,
}

impl ImageReader {
    /// The image that this tag means: one made here hides one that was pulled.
    ///
    /// # Errors
    /// When it could not be read.
    pub fn find(&self, tag: &str) -> Result<Option<ImageRecord>, ReadError> {
        rows::find(&self.conn, tag).map_err(|e| ReadError::of(&self.path, e))
    }

    /// All images, those made here first, each group newest first.
    ///
    /// # Errors
    /// When they could not be read.
    pub fn list(&self) -> Result<Vec<ImageRecord>, ReadError> {
        rows::all(&self.conn).map_err(|e| ReadError::of(&self.path, e))
    }
}

/// Opens the metadata in this directory for reading; `None` if there is none. Makes nothing.
///
/// On a full disk too: that is where one wants to see what can go. SQLite has no room there for the
/// index of its log, unless it is alone with the database; other processes wait for this one then.
///
/// # Errors
/// When it cannot be opened, or another version made it.
pub fn read_images(images_dir: &Path) -> Result<Option<ImageReader>, OpenError> {
    let files = DbFiles::new(images_dir, IMAGES_DB);
    let found = match migrate::open_to_read(&files, migrations::IMAGES) {
        Err(OpenError::Database { fault: DbFault::Full, .. }) => {
            migrate::open_to_read_alone(&files, migrations::IMAGES)?
        }
        found => found?,
    };
    Ok(found.map(|conn| ImageReader { conn, path: files.db }))
}
