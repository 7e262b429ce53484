//! `manifest.json`: what a bundle says of itself, and whether that is so.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::Path;

use rustix::fs::{Mode, OFlags, open};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::GuestBundleError;

/// The version of the manifest that we know.
pub(super) const FORMAT: u32 = 1;

/// What we use of one of our format.
#[derive(Debug, Deserialize)]
pub(super) struct Manifest {
    pub(super) version: String,
    pub(super) kernel_release: String,
    pub(super) kernel_package: String,
    kernel_sha256: String,
    initramfs_sha256: String,
}

impl Manifest {
    /// Reads the manifest of the bundle in this directory.
    pub(super) fn read(dir: &Path) -> Result<Self, GuestBundleError> {
        /// What every format has.
        #[derive(Deserialize)]
        struct Any {
            format: u32,
        }
        let path = dir.join("manifest.json");
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(GuestBundleError::Missing { dir: dir.to_owned() });
            }
            Err(source) => return Err(GuestBundleError::Manifest { path, source }),
        };
        let unreadable = |source: serde_json::Error| {
            let path = path.clone();
            GuestBundleError::Manifest { path, source: source.into() }
        };
        let Any { format } = serde_json::from_slice(&text).map_err(unreadable)?;
        if format != FORMAT {
            return Err(GuestBundleError::Format { dir: dir.to_owned(), found: format });
        }
        serde_json::from_slice(&text).map_err(unreadable)
    }

    /// Hashes the files of the bundle in this directory, whose name must be the bundle's version.
    pub(super) fn check(&self, dir: &Path) -> Result<(), GuestBundleError> {
        let damaged = |what: String| GuestBundleError::Damaged { dir: dir.to_owned(), what };
        if dir.file_name().is_none_or(|name| name != self.version.as_str()) {
            return Err(damaged(format!("its manifest is that of version {:?}", self.version)));
        }
        let files = [("kernel", &self.kernel_sha256), ("initramfs", &self.initramfs_sha256)];
        for (name, wanted) in files {
            match sha256(&dir.join(name)) {
                Ok(found) if found == *wanted => {}
                Ok(found) => {
                    let what = format!("{name} has sha256 {found}, the manifest says {wanted}");
                    return Err(damaged(what));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(damaged(format!("there is no {name}")));
                }
                Err(error) => return Err(damaged(format!("{name} cannot be read: {error}"))),
            }
        }
        Ok(())
    }
}

fn sha256(path: &Path) -> io::Result<String> {
    // Nothing waits for the other end of a fifo.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut file = File::from(open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hex::encode(hash.finalize())),
            Ok(read) => hash.update(buffer.get(..read).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
