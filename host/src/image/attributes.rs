//! Owner, mode, extended attributes and time of what a layer unpacks, in this order: a change of
//! owner clears setuid bits and file capabilities, and everything but the time changes the time.
//!
//! Files and directories are changed through their descriptors. What cannot be opened without an
//! effect (devices, fifos) or at all (links) is changed by name, following nothing.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Gid, Mode, Timespec, Uid, XattrFlags, chmodat, chownat, fchmod, fchown, fsetxattr,
    futimens, lsetxattr, utimensat,
};
use rustix::io::Errno;

use super::stream::Context;
use super::tarball::{Kind, Member, shown};
use super::tree::{name, times};
use super::workspace::failed;
use super::{ImageError, ImportProgress};

/// Sets attributes; remembers what could not be kept, to say it once.
pub(super) struct Attributes<'c, 'a> {
    context: &'c Context<'a>,
    left_out: RefCell<BTreeSet<String>>,
}

/// What is to be changed.
#[derive(Clone, Copy)]
enum Target<'t> {
    Open(BorrowedFd<'t>),
    Named(BorrowedFd<'t>, &'t [u8]),
}

impl<'c, 'a> Attributes<'c, 'a> {
    pub(super) fn new(context: &'c Context<'a>) -> Self {
        Self { context, left_out: RefCell::default() }
    }

    /// Sets everything that the member says on an open file or directory.
    pub(super) fn set_open(
        &self,
        file: impl AsFd,
        member: &Member,
        path: &Path,
    ) -> Result<(), ImageError> {
        let fail = |error: Errno| failed("set the attributes of", path, error);
        let (uid, gid) = owner(member);
        fchown(&file, uid, gid).map_err(fail)?;
        fchmod(&file, Mode::from_raw_mode(member.mode)).map_err(fail)?;
        self.set_xattrs(Target::Open(file.as_fd()), member, path)?;
        futimens(&file, &times(mtime(member))).map_err(fail)
    }

    /// Sets everything that the member says on a link, device or fifo that was just made.
    pub(super) fn set_named(
        &self,
        parent: BorrowedFd<'_>,
        last: &[u8],
        member: &Member,
        path: &Path,
    ) -> Result<(), ImageError> {
        let fail = |error: Errno| failed("set the attributes of", path, error);
        let (uid, gid) = owner(member);
        chownat(parent, name(last), uid, gid, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)?;
        if !matches!(member.kind, Kind::Symlink(_)) {
            // It is no link: this call, which would follow one, has nothing to follow.
            let mode = Mode::from_raw_mode(member.mode);
            chmodat(parent, name(last), mode, AtFlags::empty()).map_err(fail)?;
        }
        self.set_xattrs(Target::Named(parent, last), member, path)?;
        utimensat(parent, name(last), &times(mtime(member)), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(fail)
    }

    fn set_xattrs(
        &self,
        target: Target<'_>,
        member: &Member,
        path: &Path,
    ) -> Result<(), ImageError> {
        for (key, value) in &member.xattrs {
            if key.contains(&0) || key.is_empty() {
                let what = format!("an extended attribute of {} has no good name", member.shown());
                return Err(ImageError::Damaged { what });
            }
            let shown = shown(key);
            if key.starts_with(b"trusted.overlay.") {
                // With these a layer could make the guest's overlay hide or redirect files.
                self.leave_out(format!("the overlayfs-private attribute {shown}"));
                continue;
            }
            let plain = matches!(member.kind, Kind::File | Kind::Directory);
            if key.starts_with(b"user.") && !plain {
                self.leave_out(format!("the attribute {shown} of a link, device or fifo"));
                continue;
            }
            let set = match target {
                Target::Open(file) => fsetxattr(file, name(key), value, XattrFlags::empty()),
                Target::Named(parent, last) => {
                    // The kernel has no call for a name in an open directory before 6.13; this path
                    // leads into exactly that directory, and lsetxattr does not follow its last part.
                    let through = PathBuf::from(format!("/proc/self/fd/{}", parent.as_raw_fd()));
                    lsetxattr(through.join(name(last)), name(key), value, XattrFlags::empty())
                }
            };
            match set {
                Err(Errno::OPNOTSUPP) => {
                    self.leave_out(format!("the attribute {shown}, unknown to this file system"));
                }
                set => set.map_err(|error| failed("set an extended attribute of", path, error))?,
            }
        }
        Ok(())
    }

    fn leave_out(&self, what: String) {
        // Hostile layers do not make this list long: the kinds are few for honest ones.
        let mut said = self.left_out.borrow_mut();
        if said.len() < 64 && said.insert(what.clone()) {
            tracing::warn!(%what, "left out of the image");
            (self.context.progress)(ImportProgress::LeftOut { what });
        }
    }
}

fn owner(member: &Member) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(member.uid)), Some(Gid::from_raw(member.gid)))
}

fn mtime(member: &Member) -> Timespec {
    Timespec { tv_sec: member.mtime.0, tv_nsec: member.mtime.1.into() }
}
