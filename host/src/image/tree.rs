//! The private tree that layers are unpacked into: every name is resolved inside it by the kernel.
//!
//! # Invariants
//! 1. Each parent is opened with openat2 and RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS and
//!    RESOLVE_NO_XDEV: links of the image lead to places in the image, whatever they say. The last
//!    component of a name is only ever used with calls that follow nothing.
//! 2. A name with a `..` component is refused before it is looked at.
//! 3. No directory lies deeper or has a longer path than mkfs.erofs can take ([`MAX_DEPTH`]).
//! 4. Changing what is in a directory does not change its time: [`Parent::settle`] puts back what
//!    was there. So times are right at any moment, and no list of directories is kept.
//!
//! Nobody else changes the tree meanwhile: it lies in a locked directory that only we may enter.
//! After an error the whole tree is thrown away by its owner, the workspace.

use std::ffi::OsStr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, fchmod, fstat,
    futimens, mkdirat, open, openat2, readlinkat, renameat, statat, unlinkat,
};
use rustix::io::Errno;

use super::ImageError;
use super::stream::Budget;
use super::tarball::{MAX_PATH, shown};
use super::workspace::{DIRECTORY, empty, failed};

/// How deep directories may lie.
const MAX_DEPTH: usize = 512;
/// The length of one name.
const MAX_NAME: usize = 255;
const INSIDE: ResolveFlags =
    ResolveFlags::IN_ROOT.union(ResolveFlags::NO_MAGICLINKS).union(ResolveFlags::NO_XDEV);

/// The components of a name in a layer: no empty ones, no `.`, never a `..`.
pub(super) fn components(path: &[u8]) -> Result<Vec<&[u8]>, ImageError> {
    if path.is_empty() {
        return Err(ImageError::Damaged { what: "a layer has a file without a name".into() });
    }
    let mut found = Vec::new();
    for component in path.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => {
                let what = format!("a layer names {}, which leads upwards", shown(path));
                return Err(ImageError::Hostile { what });
            }
            long if long.len() > MAX_NAME => {
                return Err(ImageError::TooLarge { limit: format!("{MAX_NAME} bytes in a name") });
            }
            name => found.push(name),
        }
    }
    Ok(found)
}

/// A name as the kernel takes it.
pub(super) fn name(bytes: &[u8]) -> &OsStr {
    OsStr::from_bytes(bytes)
}

/// A directory in the tree whose content is about to change.
#[derive(Debug)]
pub(super) struct Parent {
    pub(super) fd: OwnedFd,
    pub(super) ino: u64,
    mtime: Timespec,
}

/// Sets the time of last change, and of last access to the same.
pub(super) fn times(mtime: Timespec) -> Timestamps {
    Timestamps { last_access: mtime, last_modification: mtime }
}

/// The tree, and the place beside it where directories are removed.
pub(super) struct Tree<'a> {
    path: PathBuf,
    /// The path as the kernel tells it: no links on the way.
    real: PathBuf,
    root: OwnedFd,
    pub(super) root_ino: u64,
    trash_path: PathBuf,
    trash: OwnedFd,
    entries: &'a Budget,
}

impl<'a> Tree<'a> {
    /// Takes over two empty directories of one file system.
    pub(super) fn new(
        path: PathBuf,
        trash_path: PathBuf,
        entries: &'a Budget,
    ) -> Result<Self, ImageError> {
        let fail = |error: Errno| failed("open", &path, error);
        let root = open(&path, DIRECTORY, Mode::empty()).map_err(fail)?;
        let trash = open(&trash_path, DIRECTORY, Mode::empty()).map_err(fail)?;
        let root_ino = fstat(&root).map_err(fail)?.st_ino;
        let real = real_path(root.as_fd())?;
        let tree = Self { path, real, root, root_ino, trash_path, trash, entries };
        // What a layer does not say about the root is as for any directory that none mentions.
        tree.neutral(&tree.root, &tree.path)?;
        Ok(tree)
    }

    /// The path of something in the tree, for errors of ours; what is not plain ASCII is escaped.
    pub(super) fn at(&self, parents: &[&[u8]], last: &[u8]) -> PathBuf {
        let parts = parents.iter().chain([&last]).map(|part| part.escape_ascii().to_string());
        parts.fold(self.path.clone(), |path, part| path.join(part))
    }

    fn neutral(&self, directory: &OwnedFd, path: &Path) -> Result<(), ImageError> {
        let fail = |error: Errno| failed("set the attributes of", path, error);
        fchmod(directory, Mode::from_raw_mode(0o755)).map_err(fail)?;
        futimens(directory, &times(Timespec { tv_sec: 0, tv_nsec: 0 })).map_err(fail)
    }

    /// Opens a directory whose links are resolved inside the tree; none if there is no such one.
    fn resolve(&self, path: &[&[u8]]) -> Result<Option<OwnedFd>, ImageError> {
        let joined = if path.is_empty() { b".".to_vec() } else { path.join(&b'/') };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        // The kernel answers AGAIN when something on this machine was renamed meanwhile.
        for _ in 0..128 {
            match openat2(&self.root, name(&joined), flags, Mode::empty(), INSIDE) {
                Ok(fd) => return Ok(Some(fd)),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
                Err(Errno::LOOP) => {
                    let what = format!("the links in {} lead in a circle", shown(&joined));
                    return Err(ImageError::Damaged { what });
                }
                Err(Errno::NAMETOOLONG) => return Err(too_deep()),
                Err(error) => return Err(failed("open", self.at(path, b""), error)),
            }
        }
        Err(failed("open", self.at(path, b""), Errno::AGAIN))
    }

    /// Opens a directory for changes; none if it is not there.
    pub(super) fn existing(&self, path: &[&[u8]]) -> Result<Option<Parent>, ImageError> {
        let opened = self.resolve(path)?;
        opened.map(|fd| self.parent(fd, path)).transpose()
    }

    /// Opens a directory for changes, and makes what is missing of it.
    pub(super) fn made(&self, path: &[&[u8]]) -> Result<Parent, ImageError> {
        if let Some(parent) = self.existing(path)? {
            return Ok(parent);
        }
        let mut current = self.root_parent()?;
        for depth in 1..=path.len() {
            let (before, last) = (&path[..depth - 1], path[depth - 1]);
            if let Some(next) = self.existing(&path[..depth])? {
                current = next;
                continue;
            }
            match self.stat(&current, last, before)? {
                Some(stat) if is(&stat, FileType::Symlink) => {
                    let what = format!(
                        "{} runs through a link that leads to no directory",
                        shown(&path.join(&b'/'))
                    );
                    return Err(ImageError::Damaged { what });
                }
                // What a higher layer puts below a file hides the file.
                Some(stat) if is(&stat, FileType::RegularFile) => {
                    self.remove(&current, last, before)?;
                }
                Some(_) => {
                    let below = shown(&path[..depth].join(&b'/'));
                    let what =
                        format!("a layer puts something below {below}, a device or the like");
                    return Err(ImageError::Hostile { what });
                }
                None => {}
            }
            self.entries.spend(1)?;
            let made = self.make_directory(&current, last, before)?;
            self.neutral(&made, &self.at(before, last))?;
            self.settle(&current, before)?;
            current = self.parent(made, &path[..depth])?;
        }
        Ok(current)
    }

    pub(super) fn root_parent(&self) -> Result<Parent, ImageError> {
        let fd = self.root.try_clone().map_err(|error| failed("open", &self.path, error))?;
        self.parent(fd, &[])
    }

    fn parent(&self, fd: OwnedFd, path: &[&[u8]]) -> Result<Parent, ImageError> {
        let stat = fstat(&fd).map_err(|error| failed("look at", self.at(path, b""), error))?;
        let nanos = i64::try_from(stat.st_mtime_nsec).unwrap_or_default();
        let mtime = Timespec { tv_sec: stat.st_mtime, tv_nsec: nanos };
        Ok(Parent { fd, ino: stat.st_ino, mtime })
    }

    /// Gives a directory back the time that it had when it was opened.
    pub(super) fn settle(&self, parent: &Parent, path: &[&[u8]]) -> Result<(), ImageError> {
        futimens(&parent.fd, &times(parent.mtime))
            .map_err(|error| failed("set the time of", self.at(path, b""), error))
    }

    /// Looks at a name, following nothing.
    pub(super) fn stat(
        &self,
        parent: &Parent,
        last: &[u8],
        path: &[&[u8]],
    ) -> Result<Option<Stat>, ImageError> {
        match statat(&parent.fd, name(last), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(failed("look at", self.at(path, last), error)),
        }
    }

    /// Makes a directory that is not there, and opens it.
    pub(super) fn make_directory(
        &self,
        parent: &Parent,
        last: &[u8],
        path: &[&[u8]],
    ) -> Result<OwnedFd, ImageError> {
        self.check_depth(parent.fd.as_fd(), last)?;
        let fail = |error: Errno| failed("create", self.at(path, last), error);
        mkdirat(&parent.fd, name(last), Mode::RWXU).map_err(fail)?;
        rustix::fs::openat(&parent.fd, name(last), DIRECTORY, Mode::empty()).map_err(fail)
    }

    /// Where a directory really lies is not what the layer calls it: links make detours short.
    fn check_depth(&self, parent: BorrowedFd<'_>, last: &[u8]) -> Result<(), ImageError> {
        let real = real_path(parent)?;
        let outside = || ImageError::Hostile { what: format!("{} lies outside", shown(last)) };
        let inside = real.strip_prefix(&self.real).map_err(|_| outside())?;
        // The directory's own name, and one more below it.
        let length = real.as_os_str().len() + last.len() + MAX_NAME + 2;
        if length > MAX_PATH || inside.components().count() >= MAX_DEPTH {
            return Err(too_deep());
        }
        Ok(())
    }

    /// Removes what has this name, of any kind. Gone already is fine.
    pub(super) fn remove(
        &self,
        parent: &Parent,
        last: &[u8],
        path: &[&[u8]],
    ) -> Result<(), ImageError> {
        let fail = |error: Errno| failed("remove", self.at(path, last), error);
        match unlinkat(&parent.fd, name(last), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::ISDIR) => {}
            Err(error) => return Err(fail(error)),
        }
        renameat(&parent.fd, name(last), &self.trash, "removed").map_err(fail)?;
        empty(self.trash.as_fd(), &self.trash_path)
    }
}

/// Where an open directory lies.
fn real_path(directory: BorrowedFd<'_>) -> Result<PathBuf, ImageError> {
    let link = format!("/proc/self/fd/{}", directory.as_raw_fd());
    match readlinkat(rustix::fs::CWD, &link, Vec::with_capacity(256)) {
        Ok(real) => Ok(PathBuf::from(OsStr::from_bytes(real.as_bytes()))),
        Err(Errno::NAMETOOLONG) => Err(too_deep()),
        Err(error) => Err(failed("look at", link, error)),
    }
}

pub(super) fn is(stat: &Stat, kind: FileType) -> bool {
    FileType::from_raw_mode(stat.st_mode) == kind
}

fn too_deep() -> ImageError {
    ImageError::TooLarge {
        limit: format!("{MAX_DEPTH} directories below each other, or {MAX_PATH} bytes in a path"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_split_and_checked() {
        let split = |path: &'static str| components(path.as_bytes());
        assert_eq!(split("/a//./b/").unwrap(), [b"a", b"b"]);
        assert!(split("./").unwrap().is_empty());
        assert!(matches!(split(""), Err(ImageError::Damaged { .. })));
        for bad in ["..", "../a", "a/../b", "/..", "a/.."] {
            assert!(matches!(split(bad), Err(ImageError::Hostile { .. })), "{bad}");
        }
        assert_eq!(split("...").unwrap(), [b"..."]);
        assert!(components("x".repeat(255).as_bytes()).is_ok());
        assert!(matches!(components("x".repeat(256).as_bytes()), Err(ImageError::TooLarge { .. })));
    }
}
