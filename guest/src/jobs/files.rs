//! Jobs without a command: they read, write or list files, as root and in the agent's own view.
//!
//! ```text
//!   File ─► open ─► Started ─► file ─► Output (stops at the window) ─► Exited
//!             │                Stdin ─► file
//!             └─► Failed
//! ```
//!
//! # Invariants
//! 1. The event loop is never held up for long: files are moved in pieces of [`PIECE_BYTES`], and
//!    nothing that could wait for somebody (a fifo, a terminal) is opened as one that is to be waited
//!    for.
//! 2. Only regular files are read and written.
//!
//! # Failure
//! A failure after the start is a line on stderr and the exit code 1. What was written until then, or
//! until a release, stays.

use std::fs::{self, DirBuilder, File, OpenOptions, ReadDir};
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{
    DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::Path;
use std::rc::Rc;

use bytes::BytesMut;
use matchlock_wire::frame::Codec;
use matchlock_wire::message::{
    Bytes, ExecFailure, ExecFailureKind, ExitStatus, FileEntry, FileOp, OutputStream,
};
use tokio_util::codec::Encoder as _;

use super::Jobs;
use super::job::Job;

/// How much of a file is moved at once.
const PIECE_BYTES: usize = 32 * 1024;

/// Never wait for a fifo's other end, never become a session's terminal.
const FLAGS: i32 = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;

const DIRECTORY_MODE: u32 = 0o755;

/// Something that was opened.
pub(super) enum Opened {
    Read { file: File, at: u64, left: u64 },
    Write { file: File, at: u64 },
    List(ReadDir),
}

impl Opened {
    /// Whether it takes stdin.
    pub(super) const fn takes_stdin(&self) -> bool {
        matches!(self, Self::Write { .. })
    }
}

/// Opens what is to be read, written or listed.
///
/// # Errors
/// Why it cannot be.
pub(super) fn open(op: &FileOp) -> Result<Opened, ExecFailure> {
    let (path, opened) = match op {
        FileOp::Read { path, offset, length } => (path, open_to_read(path, *offset, *length)),
        FileOp::Write { path, offset, mode } => (path, open_to_write(path, *offset, *mode)),
        FileOp::List { path } => (path, fs::read_dir(path).map(Opened::List)),
    };
    opened.map_err(|error| {
        let kind = match error.kind() {
            io::ErrorKind::NotFound => ExecFailureKind::NotFound,
            _ => ExecFailureKind::File,
        };
        ExecFailure { kind, message: format!("{path}: {error}") }
    })
}

fn regular(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if metadata.is_file() {
        return Ok(metadata.len());
    }
    let what = if metadata.is_dir() { "it is a directory" } else { "it is not a regular file" };
    Err(io::Error::other(what))
}

fn open_to_read(path: &str, offset: u64, length: Option<u64>) -> io::Result<Opened> {
    let file = OpenOptions::new().read(true).custom_flags(FLAGS).open(path)?;
    regular(&file)?;
    Ok(Opened::Read { file, at: offset, left: length.unwrap_or(u64::MAX) })
}

fn open_to_write(path: &str, offset: Option<u64>, mode: u32) -> io::Result<Opened> {
    if let Some(parent) = Path::new(path).parent() {
        DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(parent)?;
    }
    let is_new = !Path::new(path).try_exists()?;
    let mode = mode & 0o777;
    let mut options = OpenOptions::new();
    options.write(true).create(true).mode(mode).custom_flags(FLAGS);
    let file = options.open(path)?;
    let size = regular(&file)?;
    if is_new {
        // Whatever our umask has made of it.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
    }
    match offset {
        None => file.set_len(0)?,
        Some(offset) if offset > size => {
            let text = format!("offset {offset} is beyond its end at {size}");
            return Err(io::Error::other(text));
        }
        Some(_) => {}
    }
    Ok(Opened::Write { file, at: offset.unwrap_or(0) })
}

/// Works until it is done or released.
pub(super) async fn run(jobs: Rc<Jobs>, job: Rc<Job>, opened: Opened) {
    job.decide(None);
    let work = async {
        match opened {
            Opened::Read { file, at, left } => read(&jobs, &job, &file, at, left).await,
            Opened::Write { file, at } => write(&job, &file, at).await,
            Opened::List(entries) => list(&job, entries).await,
        }
    };
    let done = tokio::select! {
        biased;
        () = job.released.wait() => return,
        done = work => done,
    };
    job.with_stdin(super::stdin::Stdin::close);
    let code = match done {
        Ok(()) => 0,
        Err(error) => {
            let line = format!("{error}\n");
            let print = print(&job, OutputStream::Stderr, line.as_bytes());
            tokio::select! {
                biased;
                () = job.released.wait() => return,
                () = print => 1,
            }
        }
    };
    job.finish(ExitStatus::Code(code));
}

async fn read(jobs: &Jobs, job: &Job, file: &File, mut at: u64, mut left: u64) -> io::Result<()> {
    while left > 0 {
        super::pump::wait_for_space(job).await;
        let count = jobs.with_scratch(PIECE_BYTES, |scratch| {
            let limit = scratch.len().min(job.output_space());
            let limit = usize::try_from(left).unwrap_or(usize::MAX).min(limit);
            let count = read_at(file, &mut scratch[..limit], at)?;
            job.with_output(|output| output.push(OutputStream::Stdout, &scratch[..count]));
            io::Result::Ok(count as u64)
        })?;
        if count == 0 {
            break;
        }
        at += count;
        left -= count;
        tokio::task::yield_now().await;
    }
    Ok(())
}

fn read_at(file: &File, into: &mut [u8], at: u64) -> io::Result<usize> {
    loop {
        match file.read_at(into, at) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

async fn write(job: &Job, file: &File, mut at: u64) -> io::Result<()> {
    loop {
        let (at_end, count) = job.with_stdin(|stdin| {
            let next = stdin.next();
            let piece = &next[..next.len().min(PIECE_BYTES)];
            file.write_all_at(piece, at)?;
            let count = piece.len();
            stdin.take(count);
            io::Result::Ok((stdin.at_end(), count as u64))
        })?;
        at += count;
        if at_end {
            return Ok(());
        }
        if count == 0 {
            job.stdin_came.notified().await;
        } else {
            tokio::task::yield_now().await;
        }
    }
}

async fn list(job: &Job, entries: ReadDir) -> io::Result<()> {
    for entry in entries {
        let entry = entry?;
        let metadata = match entry.metadata() {
            Ok(metadata) => metadata,
            // It went away meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let entry = FileEntry {
            name: Bytes(entry.file_name().into_vec()),
            size: metadata.len(),
            mode: metadata.mode(),
            modified_unix_s: metadata.mtime(),
        };
        let mut frame = BytesMut::new();
        let encoded = Codec::<(), FileEntry>::default().encode(entry, &mut frame);
        encoded.map_err(io::Error::other)?;
        print(job, OutputStream::Stdout, &frame).await;
        tokio::task::yield_now().await;
    }
    Ok(())
}

async fn print(job: &Job, stream: OutputStream, mut data: &[u8]) {
    while !data.is_empty() {
        super::pump::wait_for_space(job).await;
        let (now, later) = data.split_at(data.len().min(job.output_space()));
        job.with_output(|output| output.push(stream, now));
        data = later;
    }
}
