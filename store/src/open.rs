//! The two databases, opened for writing.
//!
//! # On error
//! [`OpenError`] says in one line what is wrong and what to do. A database that is refused is left
//! as it was.

use std::path::{Path, PathBuf};

use crate::error::OpenError;
use crate::files::DbFiles;
use crate::images::ImageConn;
use crate::migrate;
use crate::migrations;
use crate::write::WriteConn;

/// The name of the state database in `$MATCHLOCK_HOME`.
pub const STATE_DB: &str = "state.db";

/// The name of the metadata database in the directory of images.
pub const IMAGES_DB: &str = "metadata.db";

/// Opens `state.db` in this directory for writing. Makes both if missing, brings an older database
/// up to date, makes both private.
///
/// # Errors
/// When it cannot be made, opened or migrated, and when a newer version has written it.
pub fn open_state(home: &Path) -> Result<WriteConn, OpenError> {
    let files = DbFiles::new(home, STATE_DB);
    let conn = migrate::open(&files, migrations::STATE)?;
    Ok(WriteConn::new(conn, files.db))
}

/// The backup that a migration of `state.db` in this directory makes, and removes when it is done.
#[must_use]
pub fn state_backup(home: &Path) -> PathBuf {
    DbFiles::new(home, STATE_DB).backup()
}

/// Opens `metadata.db` in this directory for writing, just as [`open_state`] does.
///
/// # Errors
/// As for [`open_state`].
pub fn open_images(images_dir: &Path) -> Result<ImageConn, OpenError> {
    let files = DbFiles::new(images_dir, IMAGES_DB);
    let conn = migrate::open(&files, migrations::IMAGES)?;
    Ok(ImageConn::new(conn, files.db))
}
