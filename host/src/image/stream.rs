//! One input stream: counted, capped, hashed, cancellable, decompressed as its first bytes say.
//!
//! ```text
//!   reader ─► Source (cap, cancel, whose fault) ─► gzip | zstd | as it is ─► Stream (cap, hash)
//! ```
//!
//! # Invariants
//! 1. Both ends are capped: the outer against bombs, the inner against input that never yields.
//! 2. A decompressor wraps errors in its own; the error of the source below is kept aside and wins,
//!    so that a failing disk is never reported as a damaged archive.
//!
//! A stream owns no resource but its reader; dropping it at any time is fine.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{self, BufReader, Cursor, Read, Write as _};
use std::path::PathBuf;
use std::rc::Rc;

use sha2::{Digest, Sha256};

use super::workspace::failed;
use super::{ImageError, ImportLimits, ImportProgress};
use crate::registry::is_unseen;

/// The size of the buffers that files are copied through.
pub(super) const BUFFER: usize = 128 * 1024;

const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
const XZ: &[u8] = &[0xfd, b'7', b'z', b'X', b'Z', 0];
const BZIP2: &[u8] = b"BZh";

/// What every step of one import shares.
pub(super) struct Context<'a> {
    pub(super) limits: ImportLimits,
    pub(super) progress: &'a dyn Fn(ImportProgress),
    pub(super) cancelled: &'a dyn Fn() -> bool,
}

impl Context<'_> {
    /// Answers [`ImageError::Cancelled`] once the caller has cancelled.
    pub(super) fn check(&self) -> Result<(), ImageError> {
        if (self.cancelled)() { Err(ImageError::Cancelled) } else { Ok(()) }
    }
}

/// A number of things that may still be spent.
#[derive(Debug)]
pub(super) struct Budget {
    left: Cell<u64>,
    limit: String,
}

impl Budget {
    /// So many bytes of this.
    pub(super) fn bytes(max: u64, what: &str) -> Self {
        Self { left: Cell::new(max), limit: format!("{} of {what}", readable(max)) }
    }

    /// So many of these.
    pub(super) fn count(max: u64, what: &str) -> Self {
        Self { left: Cell::new(max), limit: format!("{max} {what}") }
    }

    /// Takes some, or says which limit was met.
    pub(super) fn spend(&self, amount: u64) -> Result<(), ImageError> {
        let left = self.left.get().checked_sub(amount);
        self.left.set(left.ok_or_else(|| ImageError::TooLarge { limit: self.limit.clone() })?);
        Ok(())
    }
}

/// Bytes as a person writes them, when they are a round number of something.
pub(super) fn readable(bytes: u64) -> String {
    for (shift, unit) in [(30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes >> shift > 0 && (bytes >> shift) << shift == bytes {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} bytes")
}

/// A text of the archive for messages: nothing that is not seen as it is, and not longer than a few lines.
pub(super) fn plain(text: &str) -> String {
    let escaped = |c: char| match c {
        '\n' => vec![c],
        c if is_unseen(c) => c.escape_default().collect(),
        c => vec![c],
    };
    let mut plain: String = text.chars().take(500).flat_map(escaped).collect();
    if text.chars().nth(500).is_some() {
        plain.push('…');
    }
    plain
}

/// The error of the lowest reader, kept while it travels up as an opaque one.
type Fault = Rc<RefCell<Option<ImageError>>>;

/// The lowest reader of a stream.
struct Source<'a, R> {
    inner: R,
    blame: Box<dyn Fn(io::Error) -> ImageError + 'a>,
    budget: Budget,
    cancelled: &'a dyn Fn() -> bool,
    fault: Fault,
}

impl<R: Read> Source<'_, R> {
    fn attempt(&mut self, buffer: &mut [u8]) -> Result<usize, ImageError> {
        loop {
            if (self.cancelled)() {
                return Err(ImageError::Cancelled);
            }
            match self.inner.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err((self.blame)(error)),
                Ok(count) => {
                    self.budget.spend(count as u64)?;
                    return Ok(count);
                }
            }
        }
    }
}

impl<R: Read> Read for Source<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.attempt(buffer).map_err(|error| {
            self.fault.replace(Some(error));
            io::Error::other("the source of the stream failed")
        })
    }
}

/// A decompressed stream with a name for messages.
pub(super) struct Stream<'a> {
    name: String,
    form: &'static str,
    inner: Box<dyn Read + 'a>,
    fault: Fault,
    budget: &'a Budget,
    hash: Sha256,
    count: u64,
    /// Where all that comes out is kept as well.
    kept: Option<(File, PathBuf)>,
}

impl<'a> Stream<'a> {
    /// Opens a stream over a reader: its errors become what `blame` says, what comes out of it is
    /// taken from `budget`.
    pub(super) fn open<R: Read + 'a>(
        name: String,
        reader: R,
        blame: impl Fn(io::Error) -> ImageError + 'a,
        context: &Context<'a>,
        budget: &'a Budget,
    ) -> Result<Self, ImageError> {
        let fault = Fault::default();
        let mut source = Source {
            inner: reader,
            blame: Box::new(blame),
            budget: Budget::bytes(context.limits.max_bytes, "archive"),
            cancelled: context.cancelled,
            fault: Rc::clone(&fault),
        };
        let mut start = Vec::with_capacity(XZ.len());
        while start.len() < XZ.len() {
            let mut byte = [0; 1];
            if source.attempt(&mut byte)? == 0 {
                break;
            }
            start.extend_from_slice(&byte);
        }
        let rest = BufReader::with_capacity(BUFFER, source);
        let whole = Cursor::new(start.clone()).chain(rest);
        let (form, inner): (_, Box<dyn Read + 'a>) = if start.starts_with(GZIP) {
            ("gzip", Box::new(flate2::bufread::MultiGzDecoder::new(whole)))
        } else if start.starts_with(ZSTD) {
            let decoder = zstd::stream::read::Decoder::with_buffer(whole);
            ("zstd", Box::new(decoder.map_err(|error| damaged(&name, &error))?))
        } else if start.starts_with(XZ) || start.starts_with(BZIP2) {
            let what = format!("{name} is compressed with xz or bzip2; use gzip, zstd or none");
            return Err(ImageError::NotAnArchive { what });
        } else {
            ("uncompressed", Box::new(whole))
        };
        Ok(Self { name, form, inner, fault, budget, hash: Sha256::new(), count: 0, kept: None })
    }

    /// Writes all that comes out into a file as well, from now on.
    pub(super) fn keep_in(&mut self, file: File, path: PathBuf) {
        self.kept = Some((file, path));
    }

    /// What the stream is called in messages.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The bytes that came out so far.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Reads some bytes; none means the end.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, ImageError> {
        loop {
            match self.inner.read(buffer) {
                Ok(count) => {
                    self.budget.spend(count as u64)?;
                    self.count += count as u64;
                    self.hash.update(&buffer[..count]);
                    if let Some((file, path)) = &mut self.kept {
                        super::room::check(&*file, path, count as u64)?;
                        let written = file.write_all(&buffer[..count]);
                        written.map_err(|error| failed("write", &*path, error))?;
                    }
                    return Ok(count);
                }
                Err(error) => {
                    if let Some(fault) = self.fault.take() {
                        return Err(fault);
                    }
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(damaged(&format!("{} ({})", self.name, self.form), &error));
                    }
                }
            }
        }
    }

    /// Fills the buffer as far as the stream goes; answers how far that was.
    pub(super) fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, ImageError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.read(&mut buffer[filled..])? {
                0 => break,
                count => filled += count,
            }
        }
        Ok(filled)
    }

    /// Reads to the very end and answers the digest of all that came out, as 64 hex digits, and how
    /// many bytes it was.
    pub(super) fn finish(mut self) -> Result<(String, u64), ImageError> {
        let mut buffer = vec![0; BUFFER];
        while self.read(&mut buffer)? > 0 {}
        Ok((hex::encode(self.hash.finalize()), self.count))
    }
}

fn damaged(name: &str, error: &io::Error) -> ImageError {
    ImageError::Damaged { what: format!("{name}: {error}") }
}
