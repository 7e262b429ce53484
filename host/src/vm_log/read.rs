//! Reading, from the oldest byte or the last lines, and on while more is written.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::{LogLimits, name, open_dir};
use crate::rootfs::VmPaths;

/// Which of a VM's logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogKind {
    /// What its own command printed.
    Output,
    /// The guest's serial console.
    Console,
    /// What the hypervisor printed.
    Hypervisor,
    /// What an owner said that nobody listened to.
    Owner,
}

/// Where reading begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tail {
    /// With the oldest byte.
    All,
    /// With the last lines, so many.
    Lines(u64),
}

/// Reads one of a VM's logs. Writes nothing.
#[derive(Debug)]
pub struct LogReader {
    dir: OwnedFd,
    kind: LogKind,
    current: Option<Opened>,
}

/// A file of the log.
#[derive(Debug)]
struct Opened {
    file: File,
    inode: u64,
}

/// How much is looked at at once for the beginning of a line.
const CHUNK_BYTES: u64 = 64 * 1024;

impl LogReader {
    /// Opens a VM's log; `None` when the VM has no directory for logs (any more).
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(paths: &VmPaths, kind: LogKind, tail: Tail) -> io::Result<Option<Self>> {
        let Some(dir) = open_dir(paths)? else { return Ok(None) };
        let mut reader = Self { dir, kind, current: None };
        if let Tail::Lines(lines) = tail {
            reader.current = reader.last_lines(lines)?;
        }
        Ok(Some(reader))
    }

    /// The next bytes, as many as there are for now: 0 means that more may come.
    ///
    /// # Errors
    /// When a file cannot be opened or read.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let Some(current) = &mut self.current else {
                let Some(oldest) = self.files()?.pop() else { return Ok(0) };
                self.current = Some(oldest);
                continue;
            };
            let read = current.file.read(buffer)?;
            if read > 0 {
                return Ok(read);
            }
            if current.file.stream_position()? > current.file.metadata()?.len() {
                // Somebody emptied it: what came since is new.
                current.file.seek(SeekFrom::Start(0))?;
                continue;
            }
            let inode = current.inode;
            let mut files = self.files()?;
            let next = match files.iter().position(|file| file.inode == inode) {
                Some(0) => return Ok(0),
                Some(place) => files.swap_remove(place - 1),
                // It went as the oldest. The oldest that is left follows it, or what followed it is
                // gone as well.
                None => match files.pop() {
                    Some(oldest) => oldest,
                    None => return Ok(0),
                },
            };
            // Its last bytes may have come after our last look and before it was done with.
            let Some(current) = &mut self.current else { continue };
            let read = current.file.read(buffer)?;
            if read > 0 {
                return Ok(read);
            }
            self.current = Some(next);
        }
    }

    /// The files that are there, newest first. One that moves on meanwhile is found again under its
    /// new name, never missed; it is listed once.
    fn files(&self) -> io::Result<Vec<Opened>> {
        let mut files: Vec<Opened> = Vec::new();
        let mut missing = 0;
        for name in self.names() {
            match self.open_file(&name)? {
                Some(file) => {
                    missing = 0;
                    if files.iter().all(|known| known.inode != file.inode) {
                        files.push(file);
                    }
                }
                // One number is missing while the files move.
                None => missing += 1,
            }
            if missing > 1 {
                break;
            }
        }
        Ok(files)
    }

    fn names(&self) -> Vec<OsString> {
        match self.kind {
            LogKind::Output => (0..=LogLimits::MOST_FILES).map(name).collect(),
            LogKind::Console => vec!["console.log".into()],
            LogKind::Hypervisor => vec!["hypervisor.log".into()],
            LogKind::Owner => vec!["owner.log".into()],
        }
    }

    fn open_file(&self, name: &OsString) -> io::Result<Option<Opened>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        match rustix::fs::openat(&self.dir, name, flags, Mode::empty()) {
            Ok(fd) => {
                let file = File::from(fd);
                let inode = file.metadata()?.ino();
                Ok(Some(Opened { file, inode }))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The file in which the last lines begin, at their beginning.
    fn last_lines(&self, lines: u64) -> io::Result<Option<Opened>> {
        let mut wanted = lines;
        let mut is_last = true;
        let mut oldest = None;
        for mut opened in self.files()? {
            let mut end = opened.file.seek(SeekFrom::End(0))?;
            if lines == 0 {
                return Ok(Some(opened));
            }
            while end > 0 {
                let start = end.saturating_sub(CHUNK_BYTES);
                let chunk = read_range(&mut opened.file, start, end)?;
                for (place, byte) in chunk.iter().enumerate().rev() {
                    // The end of the last line begins no other.
                    if *byte == b'\n' && !std::mem::take(&mut is_last) {
                        wanted -= 1;
                        if wanted == 0 {
                            opened.file.seek(SeekFrom::Start(start + place as u64 + 1))?;
                            return Ok(Some(opened));
                        }
                    }
                    is_last = false;
                }
                end = start;
            }
            opened.file.seek(SeekFrom::Start(0))?;
            oldest = Some(opened);
        }
        Ok(oldest)
    }
}

fn read_range(file: &mut File, start: u64, end: u64) -> io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(start))?;
    let mut chunk = Vec::new();
    file.take(end - start).read_to_end(&mut chunk)?;
    Ok(chunk)
}
