//! `snapshot.json`: what a snapshot is of, and whether that is still so.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{SnapshotError, Wanted};
use crate::facts;
use crate::hypervisor::Saved;

/// The version of the record that we know.
const FORMAT: u32 = 2;

/// No record is as long.
const MAX_RECORD_BYTES: u64 = 64 * 1024;

/// A file as it was: another one has another number, and whatever is done to one changes its time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FileId {
    path: PathBuf,
    #[serde(default)]
    device: u64,
    inode: u64,
    size: u64,
    changed_s: i64,
    changed_ns: i64,
}

impl FileId {
    fn of(path: &Path) -> io::Result<Self> {
        if path.to_str().is_none() {
            return Err(io::Error::other("its name is not UTF-8, as a snapshot's record is"));
        }
        let found = fs::metadata(path)?;
        Ok(Self {
            path: path.to_owned(),
            device: found.dev(),
            inode: found.ino(),
            size: found.size(),
            // The time of its content can be set to anything, this one cannot.
            changed_s: found.ctime(),
            changed_ns: found.ctime_nsec(),
        })
    }
}

/// The guest of a machine, as its files are at some moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Guest {
    kernel: FileId,
    initramfs: FileId,
}

impl Guest {
    /// As it is now.
    pub(super) fn of(wanted: &Wanted) -> Result<Self, SnapshotError> {
        let id = |path: &Path| FileId::of(path).map_err(|e| SnapshotError::io("look at", path, e));
        Ok(Self { kernel: id(&wanted.kernel)?, initramfs: id(&wanted.initramfs)? })
    }
}

/// Whether only we, or root, can have written what this is of.
pub(super) fn is_trusted(found: &fs::Metadata) -> bool {
    let us = rustix::process::geteuid().as_raw();
    [0, us].contains(&found.uid()) && found.mode() & 0o022 == 0
}

/// Opens a file of a snapshot. Nothing waits for the other end of a fifo.
pub(super) fn open_file(path: &Path) -> Result<(File, u64), SnapshotError> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = file.map_err(|e| SnapshotError::io("open", path, e))?;
    let found = file.metadata().map_err(|e| SnapshotError::io("look at", path, e))?;
    if !found.is_file() {
        let what = format!("{} is not a regular file", path.display());
        return Err(SnapshotError::Damaged { what });
    }
    if !is_trusted(&found) {
        let what = format!("{} is another user's, or others can write it", path.display());
        return Err(SnapshotError::Damaged { what });
    }
    Ok((file, found.len()))
}

/// What a snapshot says of itself.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    format: u32,
    protocol: u16,
    boot_id: String,
    hypervisor: String,
    kernel: FileId,
    initramfs: FileId,
    vcpus: u32,
    memory_mb: u64,
    nic: bool,
    pub(super) bytes: u64,
    sha256: String,
}

impl Record {
    /// That of a snapshot of such a machine on this host. `before` is the guest as it was before the
    /// machine was launched: it must be the same still, or nobody knows what was booted.
    pub(super) fn new(
        wanted: &Wanted,
        before: &Guest,
        saved: Saved,
    ) -> Result<Self, SnapshotError> {
        let Guest { kernel, initramfs } = Guest::of(wanted)?;
        if (&kernel, &initramfs) != (&before.kernel, &before.initramfs) {
            let what = "its guest kernel or initramfs was replaced while it was made";
            return Err(SnapshotError::Stale { key: key(wanted), what });
        }
        Ok(Self {
            format: FORMAT,
            protocol: matchlock_wire::PROTOCOL_VERSION,
            boot_id: boot_id()?,
            hypervisor: wanted.hypervisor.clone(),
            kernel,
            initramfs,
            vcpus: wanted.vcpus,
            memory_mb: wanted.memory_mb,
            nic: wanted.nic,
            bytes: saved.bytes,
            sha256: saved.sha256,
        })
    }

    /// Reads the one in this directory.
    pub(super) fn read(dir: &Path) -> Result<Self, SnapshotError> {
        let path = dir.join("snapshot.json");
        let (file, _) = open_file(&path)?;
        let mut text = Vec::new();
        let read = file.take(MAX_RECORD_BYTES).read_to_end(&mut text);
        read.map_err(|e| SnapshotError::io("read", &path, e))?;
        serde_json::from_slice(&text).map_err(|error| SnapshotError::Damaged {
            what: format!("{} is no record of one: {error}", path.display()),
        })
    }

    /// What was saved.
    pub(super) fn saved(&self) -> Saved {
        Saved { bytes: self.bytes, sha256: self.sha256.clone() }
    }

    /// Why nobody can use it any more on this host; `None` when somebody may.
    pub(super) fn outdated(&self) -> Result<Option<&'static str>, SnapshotError> {
        let same = |id: &FileId| match FileId::of(&id.path) {
            Ok(found) => Ok(found == *id),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                Ok(false)
            }
            Err(error) => Err(SnapshotError::io("look at", &id.path, error)),
        };
        Ok(if self.format != FORMAT || self.protocol != matchlock_wire::PROTOCOL_VERSION {
            Some("it was made by another version of matchlock")
        } else if self.boot_id != boot_id()? {
            Some("this host has been started anew")
        } else if !same(&self.kernel)? || !same(&self.initramfs)? {
            Some("its guest kernel or initramfs was replaced")
        } else {
            None
        })
    }

    /// Why a machine like this cannot go on from it.
    pub(super) fn unlike(&self, wanted: &Wanted) -> Option<&'static str> {
        if self.hypervisor != wanted.hypervisor {
            return Some("the hypervisor, or how it is called, has changed");
        }
        let shape = (self.vcpus, self.memory_mb, self.nic);
        let files = (&self.kernel.path, &self.initramfs.path);
        let same = shape == (wanted.vcpus, wanted.memory_mb, wanted.nic)
            && files == (&wanted.kernel, &wanted.initramfs);
        (!same).then_some("it is of another machine")
    }
}

fn boot_id() -> Result<String, SnapshotError> {
    facts::boot_id().map_err(|error| SnapshotError::Io {
        doing: "read",
        path: PathBuf::from("/proc/sys/kernel/random/boot_id"),
        source: io::Error::other(error),
    })
}

/// The name of the snapshot of such machines.
pub(super) fn key(wanted: &Wanted) -> String {
    let mut hash = Sha256::new();
    for path in [&wanted.kernel, &wanted.initramfs] {
        hash.update(path.as_os_str().as_encoded_bytes());
        hash.update([0]);
    }
    hash.update(wanted.vcpus.to_be_bytes());
    hash.update(wanted.memory_mb.to_be_bytes());
    hash.update([u8::from(wanted.nic)]);
    let digest = hash.finalize();
    hex::encode(digest.get(..12).unwrap_or_default())
}

/// Hashes what was saved, without moving the place at which somebody else reads it.
pub(super) fn check(memory: &File, saved: &Saved) -> Result<(), SnapshotError> {
    let damaged = |what: String| SnapshotError::Damaged { what };
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    let mut offset = 0;
    loop {
        match memory.read_at(&mut buffer, offset) {
            Ok(0) => break,
            Ok(read) => {
                hash.update(buffer.get(..read).unwrap_or_default());
                offset += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(damaged(format!("it cannot be read: {error}"))),
        }
    }
    if offset != saved.bytes {
        return Err(damaged(format!("it has {offset} bytes instead of {}", saved.bytes)));
    }
    let found = hex::encode(hash.finalize());
    if found != saved.sha256 {
        return Err(damaged(format!("it has sha256 {found} instead of {}", saved.sha256)));
    }
    Ok(())
}
