//! A download beside the one that another process is at, which may be slow on purpose: whoever pulls
//! from one registry does not depend on what another one sends.
//!
//! # Invariants
//! 1. It is in a file without a name (O_TMPFILE): no crash leaves it, and nobody takes it up.
//! 2. The first that is whole gets the name; the other finds it there.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, linkat, open};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::super::workspace::{failed, make_private};
use super::super::{ImageDirs, ImageError};
use super::{BLOB, Partial, locked, partial_dir};
use crate::locked::Locked;

/// How much of a blob another process has; `None` if nobody is at it.
pub(in crate::image) fn begun(dirs: &ImageDirs, hex: &str) -> Result<Option<u64>, ImageError> {
    let path = partial_dir(dirs).join(format!("{BLOB}{hex}"));
    match path.symlink_metadata() {
        Ok(found) => Ok(Some(found.len())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("look at", path, error)),
    }
}

/// A download of one's own; `None` where the filesystem knows no files without a name.
pub(in crate::image) fn own(dirs: &ImageDirs, hex: &str) -> Result<Option<Partial>, ImageError> {
    let parent = partial_dir(dirs);
    make_private(&parent)?;
    let fail = |error: Errno| failed("make a file in", &parent, error);
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    let file = match open(&parent, flags, Mode::RUSR | Mode::WUSR) {
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => return Ok(None),
        opened => opened.map_err(fail)?,
    };
    if !locked(&file, FlockOperation::NonBlockingLockExclusive, &parent)? {
        return Ok(None);
    }
    let duplicate = rustix::io::dup(&file).map_err(fail)?;
    Ok(Some(Partial {
        dirs: dirs.clone(),
        hex: hex.to_owned(),
        path: parent,
        file: File::from(duplicate),
        lock: Locked::new(file),
        hash: Sha256::new(),
        done: 0,
        is_unnamed: true,
    }))
}

/// Gives a file without a name this one, if nothing has it.
pub(super) fn name(file: &File, path: &Path) -> Result<(), Errno> {
    let cwd = rustix::fs::CWD;
    let opened = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(cwd, &*opened, cwd, path, AtFlags::SYMLINK_FOLLOW)
}
