//! Writing, with a cap.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::{LogLimits, POINTS, name, open_dir};
use crate::rootfs::VmPaths;

/// Writes a VM's log. Each call may block for as long as the disk does.
#[derive(Debug)]
pub struct LogWriter {
    dir: OwnedFd,
    limits: LogLimits,
    /// The file that is written and its size; `None` when there is none yet.
    current: Option<(File, u64)>,
}

impl LogWriter {
    /// Opens a VM's log, to go on at its end.
    ///
    /// # Errors
    /// When its directory or its file cannot be opened.
    pub fn open(paths: &VmPaths, limits: LogLimits) -> io::Result<Self> {
        let dir = open_dir(paths)?.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let mut writer = Self { dir, limits, current: None };
        if limits.total() == 0 {
            return Ok(writer);
        }
        POINTS.before("open")?;
        writer.open_current()?;
        POINTS.after("open")?;
        Ok(writer)
    }

    /// Appends these bytes; the oldest go when there are more than are kept.
    ///
    /// # Errors
    /// When not all of them could be written.
    pub fn append(&mut self, mut data: &[u8]) -> io::Result<()> {
        if self.limits.total() == 0 {
            return Ok(());
        }
        while !data.is_empty() {
            let (file, size) = match &mut self.current {
                Some((_, size)) if *size >= self.limits.file_bytes => {
                    self.rotate()?;
                    continue;
                }
                Some((file, size)) => (file, size),
                None => {
                    self.open_current()?;
                    continue;
                }
            };
            let room = usize::try_from(self.limits.file_bytes - *size).unwrap_or(usize::MAX);
            let piece = data.get(..room).unwrap_or(data);
            match file.write(piece) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    *size += written as u64;
                    data = data.get(written..).unwrap_or_default();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn open_current(&mut self) -> io::Result<()> {
        let flags =
            OFlags::CREATE | OFlags::APPEND | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let file = File::from(rustix::fs::openat(&self.dir, name(0), flags, mode)?);
        let size = file.metadata()?.len();
        self.current = Some((file, size));
        Ok(())
    }

    /// Makes room: each file becomes the next older one, the oldest goes.
    fn rotate(&mut self) -> io::Result<()> {
        self.current = None;
        // From the oldest on: at any moment at most one number is missing.
        for age in (0..self.limits.files - 1).rev() {
            match rustix::fs::renameat(&self.dir, name(age), &self.dir, name(age + 1)) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        if self.limits.files == 1 {
            match rustix::fs::unlinkat(&self.dir, name(0), AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        self.open_current()
    }
}
