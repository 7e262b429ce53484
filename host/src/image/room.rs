//! What an image may take of this host: its disk, of which a reserve stays for others (the state and
//! the VMs' disks may lie on the same one), and its memory.
//!
//! # Invariants
//! 1. It is asked what is free before it is taken, at each step: others take space meanwhile.
//! 2. A file counts with the size that it has in an EROFS, where holes are written out as zeros.
//!
//! An error has changed nothing.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, StatVfs, fstatvfs, openat, statat};
use rustix::io::Errno;

use super::ImageError;
use super::stream::Context;
use super::workspace::{DIRECTORY, failed};

/// At most so many bytes stay free for others, and on a small disk [`SHARE`] of it.
const RESERVE: u64 = 512 * 1024 * 1024;
const SHARE: u64 = 20;
/// What mkfs.erofs 1.5 has in memory for each file (measured with 300,000 of them), and besides.
const MEMORY_OF_A_FILE: u64 = 4_700;
const MEMORY: u64 = 64 * 1024 * 1024;
/// What a file takes in an EROFS besides its content: the inode and its name.
const META: u64 = 96;

/// Refuses to take so many bytes of the file system where this file lies, if they are not free.
pub(super) fn check(file: impl AsFd, path: &Path, needed: u64) -> Result<(), ImageError> {
    let found = fstatvfs(file).map_err(|error| failed("look at", path, error))?;
    decide(&found, path, needed)
}

/// The same for a path.
pub(super) fn check_at(path: &Path, needed: u64) -> Result<(), ImageError> {
    let found = rustix::fs::statvfs(path).map_err(|error| failed("look at", path, error))?;
    decide(&found, path, needed)
}

/// How many bytes others than images may take here, the reserve left.
pub(crate) fn free_beside_the_reserve(path: &Path) -> Result<u64, Errno> {
    rustix::fs::statvfs(path).map(|found| free(&found).0)
}

/// What may be taken, and the reserve.
fn free(found: &StatVfs) -> (u64, u64) {
    let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
    let reserve = (bytes(found.f_blocks) / SHARE).min(RESERVE);
    (bytes(found.f_bavail).saturating_sub(reserve), reserve)
}

fn decide(found: &StatVfs, path: &Path, needed: u64) -> Result<(), ImageError> {
    let (free, reserve) = free(found);
    if needed <= free {
        return Ok(());
    }
    Err(ImageError::NoSpace { path: path.to_owned(), needed, free, reserve })
}

/// What the files of a tree will take.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Measured {
    pub(super) files: u64,
    /// In an EROFS.
    pub(super) bytes: u64,
}

impl Measured {
    /// Refuses a tree for which mkfs.erofs would need more memory than it may take.
    pub(super) fn check_memory(&self, max: u64) -> Result<(), ImageError> {
        let needed = self.files.saturating_mul(MEMORY_OF_A_FILE).saturating_add(MEMORY);
        if needed <= max {
            return Ok(());
        }
        let files = max.saturating_sub(MEMORY) / MEMORY_OF_A_FILE;
        Err(ImageError::TooLarge {
            limit: format!("{files} files, for more mkfs.erofs lacks memory"),
        })
    }
}

/// Measures a tree that nobody changes meanwhile. Directories are opened by their path below the top,
/// which the tree keeps short enough, so that one is open at a time.
pub(super) fn measure(top: &Path, context: &Context<'_>) -> Result<Measured, ImageError> {
    let fail = |error: Errno| failed("measure", top, error);
    let root = rustix::fs::open(top, DIRECTORY, Mode::empty()).map_err(fail)?;
    let mut all = Measured::default();
    let mut linked = HashSet::new();
    let mut waiting = vec![b".".to_vec()];
    while let Some(path) = waiting.pop() {
        context.check()?;
        let flags = DIRECTORY | OFlags::NOFOLLOW;
        let directory = openat(&root, path.as_slice(), flags, Mode::empty()).map_err(fail)?;
        for entry in Dir::read_from(&directory).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let stat = statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
            let kind = FileType::from_raw_mode(stat.st_mode);
            if kind == FileType::Directory {
                waiting.push([path.as_slice(), b"/", name.to_bytes()].concat());
            } else if stat.st_nlink > 1 && !linked.insert(stat.st_ino) {
                all.bytes += META;
                continue;
            }
            all.files += 1;
            all.bytes = all.bytes.saturating_add(content(&stat, kind)).saturating_add(META);
        }
    }
    Ok(all)
}

fn content(stat: &Stat, kind: FileType) -> u64 {
    match kind {
        FileType::RegularFile | FileType::Symlink => u64::try_from(stat.st_size).unwrap_or(0),
        _ => 0,
    }
}

/// How much memory the build of an image may take where nobody has said it: half of this host's,
/// which leaves the VMs theirs and is enough for a million files on a host of 10 GB.
pub(super) fn default_memory() -> u64 {
    let host = rustix::system::sysinfo();
    let unit = u64::from(host.mem_unit.max(1));
    let total = host.totalram.saturating_mul(unit);
    (total / 2).max(1 << 30)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImportLimits;

    #[test]
    fn a_reserve_stays_free() {
        let directory = tempfile::tempdir().unwrap();
        let Err(ImageError::NoSpace { free, reserve, .. }) = check_at(directory.path(), u64::MAX)
        else {
            panic!("so much is nowhere free");
        };
        assert!(reserve > 0 && reserve <= RESERVE, "{reserve}");
        let found = rustix::fs::statvfs(directory.path()).unwrap();
        assert!(free < found.f_bavail * found.f_frsize + (64 << 20));
        check_at(directory.path(), 1).unwrap();
    }

    #[test]
    fn holes_and_links_are_measured_as_an_image_has_them() {
        let directory = tempfile::tempdir().unwrap();
        let top = directory.path();
        std::fs::create_dir_all(top.join("a/b")).unwrap();
        let sparse = std::fs::File::create(top.join("a/b/sparse")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        std::fs::hard_link(top.join("a/b/sparse"), top.join("again")).unwrap();
        std::os::unix::fs::symlink("x".repeat(100), top.join("link")).unwrap();
        let limits = ImportLimits::default();
        let context = Context { limits, progress: &|_| {}, cancelled: &|| false };
        let measured = measure(top, &context).unwrap();
        assert_eq!(measured, Measured { files: 4, bytes: (1 << 30) + 100 + 5 * META });
        measured.check_memory(1 << 30).unwrap();
        let many = Measured { files: 300_000, ..measured };
        assert!(matches!(many.check_memory(1 << 30), Err(ImageError::TooLarge { .. })));
        many.check_memory(2 << 30).unwrap();
    }
}
