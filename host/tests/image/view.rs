//! What is in a directory, or in an EROFS image.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    File(Vec<u8>),
    Directory,
    Symlink(Vec<u8>),
    Char(u64),
    Block(u64),
    Fifo,
    Socket,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) kind: Kind,
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    /// Seconds and nanoseconds.
    pub(crate) mtime: (i64, i64),
    pub(crate) links: u64,
    pub(crate) ino: u64,
    pub(crate) xattrs: BTreeMap<String, Vec<u8>>,
}

/// Everything below a directory, and itself as the empty path.
pub(crate) type View = BTreeMap<String, Node>;

pub(crate) fn directory(root: &Path) -> View {
    let mut found = View::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(path) = waiting.pop() {
        let node = node(&path);
        if node.kind == Kind::Directory {
            waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
        found.insert(name, node);
    }
    found
}

fn node(path: &Path) -> Node {
    let meta = fs::symlink_metadata(path).unwrap();
    let kind = meta.file_type();
    let kind = if kind.is_dir() {
        Kind::Directory
    } else if kind.is_symlink() {
        Kind::Symlink(fs::read_link(path).unwrap().as_os_str().as_bytes().to_vec())
    } else if kind.is_char_device() {
        Kind::Char(meta.rdev())
    } else if kind.is_block_device() {
        Kind::Block(meta.rdev())
    } else if kind.is_fifo() {
        Kind::Fifo
    } else if kind.is_socket() {
        Kind::Socket
    } else {
        Kind::File(fs::read(path).unwrap())
    };
    Node {
        kind,
        mode: meta.mode() & 0o7777,
        owner: (meta.uid(), meta.gid()),
        mtime: (meta.mtime(), meta.mtime_nsec()),
        links: meta.nlink(),
        ino: meta.ino(),
        xattrs: xattrs(path),
    }
}

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut list = vec![0_u8; 65536];
    let length = rustix::fs::llistxattr(path, &mut list[..]).unwrap();
    let names = list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let value = |name: &[u8]| {
        let name = String::from_utf8(name.to_vec()).unwrap();
        let mut value = vec![0_u8; 65536];
        let length = rustix::fs::lgetxattr(path, name.as_str(), &mut value[..]).unwrap();
        value.truncate(length);
        (name, value)
    };
    names.map(value).collect()
}

/// Mounts an image where nobody else sees it, in a mount namespace that ends with the thread.
pub(crate) fn erofs(image: &Path) -> View {
    let image = image.to_owned();
    let look = move || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let place = tempfile::tempdir().unwrap();
        let mut command = Command::new("mount");
        command.args(["-t", "erofs", "-o", "loop,ro"]).arg(&image).arg(place.path());
        let said = command.output().unwrap();
        assert!(said.status.success(), "mount: {}", String::from_utf8_lossy(&said.stderr));
        let view = directory(place.path());
        // A child that another thread is just starting may have copies of our descriptors.
        umount2(place.path(), MntFlags::MNT_DETACH).unwrap();
        view
    };
    std::thread::spawn(look).join().unwrap()
}
