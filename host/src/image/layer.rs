//! Applies the layers of an image, one after the other, to one tree.
//!
//! ```text
//!   member ─┬─ .wh.NAME ──────► remove NAME, but keep what this layer itself put there
//!           ├─ .wh..wh..opq ──► the same for all that its directory holds
//!           ├─ .wh..wh.* ─────► notes of AUFS: ignored
//!           └─ anything else ─► make the parents, replace what has the name (a directory stays
//!                               when a directory comes), create, set the attributes
//! ```
//!
//! # Invariants
//! 1. Whiteouts hide what lower layers hold and never what their own layer holds, in whatever order
//!    the layer lists them. For that the layer's directories (by inode, with all above them) and its
//!    other names (by directory and name) are remembered until its end.
//! 2. A link, of either kind, is never followed when it is the last part of a name.
//! 3. Entries and bytes are taken from budgets before they are made.
//!
//! An error leaves the tree half done; its owner throws it away.

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, fstat, linkat, makedev, mknodat, openat, symlinkat,
};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use super::ImageError;
use super::attributes::Attributes;
use super::room;
use super::stream::{BUFFER, Budget, Context, Stream};
use super::tarball::{Kind, Member, Reader, shown};
use super::tree::{Parent, Tree, components, is, name};
use super::workspace::{DIRECTORY, failed, same};

const WHITEOUT: &[u8] = b".wh.";
const AUFS: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Applies layers to a tree.
pub(super) struct Layers<'c, 'a> {
    tree: Tree<'c>,
    attributes: Attributes<'c, 'a>,
    context: &'c Context<'a>,
    entries: &'c Budget,
    bytes: &'c Budget,
    buffer: Vec<u8>,
    /// The directories that the current layer mentions, and all above them, by inode.
    touched: HashSet<u64>,
    /// The other names that it has put: a digest of directory and name.
    placed: HashSet<[u8; 16]>,
}

impl<'c, 'a> Layers<'c, 'a> {
    pub(super) fn new(
        tree: Tree<'c>,
        context: &'c Context<'a>,
        entries: &'c Budget,
        bytes: &'c Budget,
    ) -> Self {
        Self {
            tree,
            attributes: Attributes::new(context),
            context,
            entries,
            bytes,
            buffer: vec![0; BUFFER],
            touched: HashSet::new(),
            placed: HashSet::new(),
        }
    }

    /// Applies one layer. The stream is left where the archive ends.
    pub(super) fn apply(&mut self, stream: &mut Stream<'_>) -> Result<(), ImageError> {
        self.touched.clear();
        self.placed.clear();
        let mut reader = Reader::new(stream);
        while let Some(member) = reader.next()? {
            self.context.check()?;
            self.entries.spend(1)?;
            self.member(&member, &mut reader)?;
        }
        Ok(())
    }

    fn member(&mut self, member: &Member, content: &mut Reader<'_, '_>) -> Result<(), ImageError> {
        let path = components(&member.path)?;
        let Some((last, parents)) = path.split_last() else {
            return self.root(member);
        };
        if path.iter().any(|part| part.starts_with(AUFS)) && *last != OPAQUE {
            return Ok(());
        }
        if parents.iter().any(|part| part.starts_with(WHITEOUT)) {
            let what = format!("{} lies below a whiteout", member.shown());
            return Err(ImageError::Hostile { what });
        }
        if *last == OPAQUE {
            return self.hide_all(parents);
        }
        if let Some(hidden) = last.strip_prefix(WHITEOUT) {
            return self.hide(parents, hidden, member);
        }
        let parent = self.tree.made(parents)?;
        self.touch(&parent)?;
        self.place(&parent, last, parents, member, content)?;
        self.tree.settle(&parent, parents)
    }

    /// What a layer says about the root directory itself.
    fn root(&mut self, member: &Member) -> Result<(), ImageError> {
        if member.kind != Kind::Directory {
            let what = "a layer has a root that is no directory".to_owned();
            return Err(ImageError::Damaged { what });
        }
        let root = self.tree.root_parent()?;
        self.touched.insert(root.ino);
        self.attributes.set_open(&root.fd, member, &self.tree.at(&[], b""))
    }

    /// Notes that this layer has something in a directory.
    fn touch(&mut self, parent: &Parent) -> Result<(), ImageError> {
        let fail = |error: Errno| failed("look at", "a directory of the image", error);
        let mut ino = parent.ino;
        let mut above = None;
        // The tree does not change its shape above a directory, and ends at its root.
        while self.touched.insert(ino) && ino != self.tree.root_ino {
            let current = above.as_ref().unwrap_or(&parent.fd);
            let next = openat(current, "..", DIRECTORY, Mode::empty()).map_err(fail)?;
            ino = fstat(&next).map_err(fail)?.st_ino;
            above = Some(next);
        }
        Ok(())
    }

    fn place(
        &mut self,
        parent: &Parent,
        last: &[u8],
        path: &[&[u8]],
        member: &Member,
        content: &mut Reader<'_, '_>,
    ) -> Result<(), ImageError> {
        if let Kind::Unknown(kind) = member.kind {
            let what = format!("{} is of the unknown kind {kind:#04x}", member.shown());
            return Err(ImageError::Damaged { what });
        }
        let there = self.tree.stat(parent, last, path)?;
        let at = self.tree.at(path, last);
        let fail = |error: Errno| failed("create", &at, error);
        if member.kind == Kind::Directory {
            let directory = if there.is_some_and(|stat| is(&stat, FileType::Directory)) {
                openat(&parent.fd, name(last), DIRECTORY, Mode::empty()).map_err(fail)?
            } else {
                self.clear(parent, last, path, there.is_some())?;
                self.tree.make_directory(parent, last, path)?
            };
            self.touched.insert(fstat(&directory).map_err(fail)?.st_ino);
            return self.attributes.set_open(&directory, member, &at);
        }
        self.placed.insert(key(parent.ino, last));
        if let Kind::HardLink(target) = &member.kind {
            return self.hard_link(parent, last, path, member, target);
        }
        self.clear(parent, last, path, there.is_some())?;
        let named = |kind, device| mknodat(&parent.fd, name(last), kind, Mode::RUSR, device);
        match &member.kind {
            Kind::File => return self.file(parent, last, member, content, &at),
            Kind::Symlink(target) if target.is_empty() => {
                let what = format!("the link {} leads nowhere", member.shown());
                return Err(ImageError::Damaged { what });
            }
            Kind::Symlink(target) => symlinkat(name(target), &parent.fd, name(last)),
            Kind::CharDevice { major, minor } => {
                named(FileType::CharacterDevice, makedev(*major, *minor))
            }
            Kind::BlockDevice { major, minor } => {
                named(FileType::BlockDevice, makedev(*major, *minor))
            }
            Kind::Fifo => named(FileType::Fifo, 0),
            Kind::Directory | Kind::HardLink(_) | Kind::Unknown(_) => Ok(()),
        }
        .map_err(fail)?;
        self.attributes.set_named(parent.fd.as_fd(), last, member, &at)
    }

    fn clear(
        &self,
        parent: &Parent,
        last: &[u8],
        path: &[&[u8]],
        there: bool,
    ) -> Result<(), ImageError> {
        if there { self.tree.remove(parent, last, path) } else { Ok(()) }
    }

    fn file(
        &mut self,
        parent: &Parent,
        last: &[u8],
        member: &Member,
        content: &mut Reader<'_, '_>,
        at: &std::path::Path,
    ) -> Result<(), ImageError> {
        self.bytes.spend(member.size)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let made = openat(&parent.fd, name(last), flags | OFlags::CLOEXEC, Mode::RUSR);
        let file = File::from(made.map_err(|error| failed("create", at, error))?);
        let mut end = 0;
        while let Some((offset, count)) = content.read(&mut self.buffer)? {
            room::check(&file, at, count as u64)?;
            let written = file.write_all_at(&self.buffer[..count], offset);
            written.map_err(|error| failed("write", at, error))?;
            end = offset + count as u64;
        }
        if end < member.size {
            file.set_len(member.size).map_err(|error| failed("write", at, error))?;
        }
        self.attributes.set_open(&file, member, at)
    }

    /// Gives an earlier file another name. Its attributes stay as they are: they are the same file's.
    fn hard_link(
        &mut self,
        parent: &Parent,
        last: &[u8],
        path: &[&[u8]],
        member: &Member,
        target: &[u8],
    ) -> Result<(), ImageError> {
        let missing = || ImageError::Damaged {
            what: format!("{} links to {}, which is no file", member.shown(), shown(target)),
        };
        let target = components(target)?;
        let (target_last, above) = target.split_last().ok_or_else(missing)?;
        let from = self.tree.existing(above)?.ok_or_else(missing)?;
        let file = self.tree.stat(&from, target_last, above)?.ok_or_else(missing)?;
        // A link may be linked as well: the call below follows none.
        if is(&file, FileType::Directory) {
            return Err(missing());
        }
        if let Some(there) = self.tree.stat(parent, last, path)? {
            if same(&there, &file) {
                return Ok(());
            }
            self.tree.remove(parent, last, path)?;
        }
        let linked = linkat(&from.fd, name(target_last), &parent.fd, name(last), AtFlags::empty());
        match linked {
            // It went with the directory that has just made way.
            Err(Errno::NOENT) => Err(missing()),
            linked => linked.map_err(|error| failed("link", self.tree.at(path, last), error)),
        }
    }

    /// `.wh.NAME`: hides what lower layers have under a name.
    fn hide(
        &mut self,
        parents: &[&[u8]],
        hidden: &[u8],
        member: &Member,
    ) -> Result<(), ImageError> {
        if matches!(hidden, b"" | b"." | b"..") {
            let what = format!("{} is no whiteout of a file", member.shown());
            return Err(ImageError::Hostile { what });
        }
        let Some(parent) = self.tree.existing(parents)? else {
            return Ok(());
        };
        if let Some(merged) = self.hide_name(&parent, hidden, parents)? {
            self.hide_below(vec![merged])?;
        }
        self.tree.settle(&parent, parents)
    }

    /// `.wh..wh..opq`: hides what lower layers have in a directory.
    fn hide_all(&mut self, directory: &[&[u8]]) -> Result<(), ImageError> {
        if self.tree.existing(directory)?.is_none() {
            return Ok(());
        }
        self.hide_below(vec![directory.iter().map(|part| part.to_vec()).collect()])
    }

    /// Clears directories of what lower layers put there, and what this layer only merged into.
    fn hide_below(&mut self, mut waiting: Vec<Vec<Vec<u8>>>) -> Result<(), ImageError> {
        while let Some(directory) = waiting.pop() {
            let path: Vec<&[u8]> = directory.iter().map(Vec::as_slice).collect();
            let Some(parent) = self.tree.existing(&path)? else {
                continue;
            };
            let fail = |error: Errno| failed("list", self.tree.at(&path, b""), error);
            for entry in Dir::read_from(&parent.fd).map_err(fail)? {
                let entry = entry.map_err(fail)?;
                let child = entry.file_name().to_bytes();
                if !matches!(child, b"." | b"..") {
                    // Counted, so that a layer cannot have the same names looked at for ever.
                    self.context.check()?;
                    self.entries.spend(1)?;
                    waiting.extend(self.hide_name(&parent, child, &path)?);
                }
            }
            self.tree.settle(&parent, &path)?;
        }
        Ok(())
    }

    /// Removes one name unless this layer put it there; answers the path of a directory that it
    /// shares with lower layers.
    fn hide_name(
        &self,
        parent: &Parent,
        hidden: &[u8],
        path: &[&[u8]],
    ) -> Result<Option<Vec<Vec<u8>>>, ImageError> {
        let Some(stat) = self.tree.stat(parent, hidden, path)? else {
            return Ok(None);
        };
        if is(&stat, FileType::Directory) {
            if self.touched.contains(&stat.st_ino) {
                let full = path.iter().copied().chain([hidden]);
                return Ok(Some(full.map(<[u8]>::to_vec).collect()));
            }
        } else if self.placed.contains(&key(parent.ino, hidden)) {
            return Ok(None);
        }
        self.tree.remove(parent, hidden, path)?;
        Ok(None)
    }
}

/// A name in a directory, in few bytes: a layer may have millions.
fn key(directory: u64, last: &[u8]) -> [u8; 16] {
    let mut hash = Sha256::new();
    hash.update(directory.to_le_bytes());
    hash.update(last);
    let mut key = [0; 16];
    key.copy_from_slice(&hash.finalize()[..16]);
    key
}
