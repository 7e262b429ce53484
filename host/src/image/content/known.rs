//! What unpacking has shown: which uncompressed content (diff id) the layer with a digest has.
//!
//! ```text
//!   content/diff_<hex of the layer's digest>    "SIZE sha256:<hex of its content>"
//! ```
//!
//! # Invariants
//! 1. A note is written only after a layer of this digest and size was read here, to its end, and its
//!    content hashed. It says nothing of where the layer came from: digests stand for bytes.
//! 2. One that is cut off or strange counts as none: the layer is verified again.
//!
//! # On error, stop and crash
//! A note gets its name when it is whole and on disk. Those of layers that no image needs are swept
//! with them.

use std::fs::File;
use std::io::{Read as _, Write as _};

use rustix::fs::{Mode, ftruncate, open};
use rustix::io::Errno;

use super::super::blob::FILE;
use super::super::config::sha256_of;
use super::super::workspace::failed;
use super::super::{ImageDirs, ImageError};
use super::{POINTS, hold};

/// What the names of notes begin with.
pub(super) const NOTE: &str = "diff_";
/// More bytes than any note has.
const LONGEST: u64 = 256;

fn path(dirs: &ImageDirs, hex: &str) -> std::path::PathBuf {
    dirs.content().join(format!("{NOTE}{hex}"))
}

/// The diff id of the layer with this digest and size, if one was verified here.
pub(in crate::image) fn diff_id(
    dirs: &ImageDirs,
    hex: &str,
    size: u64,
) -> Result<Option<String>, ImageError> {
    let path = path(dirs, hex);
    let file = match open(&path, FILE, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        opened => opened.map_err(|error| failed("open", &path, error))?,
    };
    let mut bytes = Vec::new();
    let read = File::from(file).take(LONGEST).read_to_end(&mut bytes);
    read.map_err(|error| failed("read", &path, error))?;
    let text = String::from_utf8_lossy(&bytes);
    let noted = text.split_once(' ').filter(|(noted, _)| *noted == size.to_string());
    Ok(noted.map(|(_, id)| id.to_owned()).filter(|id| sha256_of(id).is_ok()))
}

/// Notes that the layer with this digest and size was found to have this content.
pub(in crate::image) fn note(
    dirs: &ImageDirs,
    hex: &str,
    size: u64,
    diff_id: &str,
) -> Result<(), ImageError> {
    // Whoever else holds it writes the same.
    let Some((begun, lock)) = hold(dirs, &format!("{NOTE}{hex}"))? else { return Ok(()) };
    let path = path(dirs, hex);
    let fail = |error| failed("write", &path, error);
    POINTS.before("note").map_err(|error| fail(error.into()))?;
    // A crash may have left the beginning of one.
    ftruncate(&lock, 0).map_err(|error| fail(error.into()))?;
    let file = rustix::io::dup(&lock).map_err(|error| fail(error.into()))?;
    let mut file = File::from(file);
    file.write_all(format!("{size} {diff_id}").as_bytes()).map_err(fail)?;
    file.sync_all().map_err(fail)?;
    std::fs::rename(&begun, &path).map_err(fail)?;
    POINTS.after("note").map_err(|error| fail(error.into()))
}
