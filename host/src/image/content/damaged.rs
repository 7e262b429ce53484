//! Blobs that may have been damaged where they lie: whoever doubts one looks again at its digest.
//!
//! # Invariants
//! 1. A blob is removed for its damage only if its own digest, computed anew, is wrong: an image that
//!    says something else of it cannot take it away from others.
//!
//! What cannot be looked at is an error, and stays.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use rustix::fs::{Mode, open};
use sha2::{Digest as _, Sha256};

use super::super::blob::FILE;
use super::super::stream::BUFFER;
use super::super::workspace::failed;
use super::super::{ImageDirs, ImageError};
use super::{Claim, ContentLease, Fate, path_of, sweep_one};

fn is_right(path: &Path, hex: &str) -> Result<bool, ImageError> {
    let fail = |error| failed("read", path, error);
    let file = open(path, FILE, Mode::empty()).map_err(|error| fail(error.into()))?;
    let (mut file, mut hash, mut buffer) = (File::from(file), Sha256::new(), vec![0; BUFFER]);
    loop {
        match file.read(&mut buffer).map_err(fail)? {
            0 => return Ok(hex::encode(hash.finalize()) == hex),
            count => hash.update(&buffer[..count]),
        }
    }
}

/// A whole blob, if it has the size that a manifest says. One that is damaged is forgotten, and to be
/// claimed again.
pub(super) fn of_size(
    dirs: &ImageDirs,
    hex: &str,
    lease: ContentLease,
    size: u64,
) -> Result<Claim, ImageError> {
    let path = lease.path();
    let found = path.symlink_metadata().map_err(|error| failed("look at", path, error))?.len();
    if found == size {
        return Ok(Claim::There(lease));
    }
    if is_right(path, hex)? {
        let what = format!("it says that sha256:{hex} has {size} bytes, and that has {found}");
        return Err(ImageError::Damaged { what });
    }
    drop(lease);
    forget_damaged(dirs, hex)?;
    Ok(Claim::Busy)
}

/// Removes a whole blob that does not have its digest any more, unless somebody holds it.
pub(in crate::image) fn forget_damaged(dirs: &ImageDirs, hex: &str) -> Result<(), ImageError> {
    let path = path_of(dirs, hex);
    let mut failure = None;
    let mut stays = || {
        is_right(&path, hex).unwrap_or_else(|error| {
            failure = Some(error);
            true
        })
    };
    if let Fate::InUse = sweep_one(&path, false, &mut stays)? {
        tracing::debug!(path = %path.display(), "whoever holds this finds out for itself");
    }
    failure.map_or(Ok(()), Err)
}
