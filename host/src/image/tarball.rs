//! The members of a tar stream, one after the other.
//!
//! The layout of a header comes from the `tar` crate. The walk over the members is ours, because
//! that crate reads long names and PAX records of any size into memory, and splits PAX records at
//! newlines, which loses binary values: a `security.capability` may well hold the byte 0x0a.
//!
//! Understood: V7, ustar, PAX (path, linkpath, size, uid, gid, mtime, `SCHILY.xattr.*`), GNU long
//! names, GNU sparse files of all four forms, base-256 numbers. As Go's archive/tar does, which wrote most images, the
//! size of a member that has no content (link, device, directory) is ignored.
//!
//! # Invariants
//! 1. What describes a member is capped ([`MAX_DESCRIPTION`], [`MAX_RUNS`]) before it is held.
//! 2. A stream that ends inside a member's content or description is an error, always.
//! 3. Whether content follows a header is told by its type flag alone.

use std::collections::VecDeque;

use tar::{EntryType, Header};

use super::ImageError;
use super::fields::{decimal, fraction, number, records};
use super::sparse::{self, Fault, Form, MAX_RUNS, MapReader, Run};
use super::stream::Stream;

/// The bytes of one member's long names and PAX records.
const MAX_DESCRIPTION: u64 = 1024 * 1024;
/// The length of a path that the kernel takes, without the final NUL.
pub(super) const MAX_PATH: usize = 4095;
const BLOCK: usize = 512;
/// The last second of the year 9999; `erofs` explains.
pub(super) const MAX_TIME: i64 = 253_402_300_799;

/// What a member is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Directory,
    Symlink(Vec<u8>),
    HardLink(Vec<u8>),
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
    Unknown(u8),
}

/// One member, without its content.
#[derive(Debug, Clone)]
pub(super) struct Member {
    pub(super) path: Vec<u8>,
    pub(super) kind: Kind,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds from 0 to [`MAX_TIME`], and nanoseconds.
    pub(super) mtime: (i64, u32),
    /// The size of the file once unpacked.
    pub(super) size: u64,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Member {
    /// The path for messages.
    pub(super) fn shown(&self) -> String {
        shown(&self.path)
    }
}

/// A path of an archive for messages: escaped, and not longer than a line.
pub(super) fn shown(path: &[u8]) -> String {
    let short = &path[..path.len().min(200)];
    let dots = if short.len() < path.len() { "…" } else { "" };
    format!("\"{}{dots}\"", short.escape_ascii())
}

/// The extension headers that precede a member.
#[derive(Default)]
struct Described {
    long_path: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    records: Vec<(Vec<u8>, Vec<u8>)>,
    any: bool,
}

impl Described {
    fn record(&self, key: &[u8]) -> Option<&[u8]> {
        // The last one wins; an empty value takes the record back.
        let found = self.records.iter().rev().find(|(name, _)| name == key);
        found.map(|(_, value)| value.as_slice()).filter(|value| !value.is_empty())
    }
}

/// Walks over the members of a stream.
pub(super) struct Reader<'s, 'a> {
    stream: &'s mut Stream<'a>,
    /// The pieces of the current member's content that were not read yet: offset, length.
    runs: VecDeque<(u64, u64)>,
    /// The bytes of the current member that are still in the stream, and the padding after them.
    pending: u64,
    padding: u64,
    marked: bool,
}

impl<'s, 'a> Reader<'s, 'a> {
    pub(super) fn new(stream: &'s mut Stream<'a>) -> Self {
        Self { stream, runs: VecDeque::new(), pending: 0, padding: 0, marked: false }
    }

    /// Whether the mark that ends an archive was seen.
    pub(super) fn ended_with_mark(&self) -> bool {
        self.marked
    }

    /// The bytes that the stream gave so far.
    pub(super) fn position(&self) -> u64 {
        self.stream.count()
    }

    /// The next member; none at the end of the archive.
    pub(super) fn next(&mut self) -> Result<Option<Member>, ImageError> {
        let mut described = Described::default();
        loop {
            self.skip()?;
            let Some(block) = self.header()? else {
                return if described.any {
                    Err(self.damaged("it ends after the description of a member"))
                } else {
                    Ok(None)
                };
            };
            let header = Header::from_byte_slice(&block);
            let size = self.unsigned(&header.as_old().size, "size")?;
            match header.entry_type() {
                EntryType::XGlobalHeader => self.expect(size),
                EntryType::XHeader => {
                    let text = self.description(size)?;
                    described.records = records(&text).ok_or_else(|| {
                        self.damaged("an extended header (PAX) cannot be understood")
                    })?;
                    described.any = true;
                }
                EntryType::GNULongName => {
                    described.long_path = Some(unterminated(self.description(size)?));
                    described.any = true;
                }
                EntryType::GNULongLink => {
                    described.long_link = Some(unterminated(self.description(size)?));
                    described.any = true;
                }
                _ => return self.member(header, size, described).map(Some),
            }
        }
    }

    /// The next piece of the member's content: its offset in the file, and how many bytes of the
    /// buffer it fills. What lies between the pieces is zero.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Result<Option<(u64, usize)>, ImageError> {
        let Some((offset, length)) = self.runs.pop_front() else {
            return Ok(None);
        };
        let wanted = usize::try_from(length).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.stream.read(&mut buffer[..wanted])?;
        if count == 0 {
            return Err(self.damaged("it is cut off within a file"));
        }
        self.pending -= count as u64;
        if (count as u64) < length {
            self.runs.push_front((offset + count as u64, length - count as u64));
        }
        Ok(Some((offset, count)))
    }

    fn damaged(&self, what: &str) -> ImageError {
        let at = self.stream.count();
        ImageError::Damaged { what: format!("{}, byte {at}: {what}", self.stream.name()) }
    }

    fn expect(&mut self, size: u64) {
        self.pending = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
        self.runs.clear();
    }

    /// Leaves what was not read of the current member.
    fn skip(&mut self) -> Result<(), ImageError> {
        let (content, padding) = (self.pending, self.padding);
        self.expect(0);
        if self.pass(content)? > 0 {
            return Err(self.damaged("it is cut off within a file"));
        }
        // The last one may lack its padding, with all that would follow: so `umoci insert` writes it.
        self.pass(padding).map(drop)
    }

    /// Reads so many bytes, or up to the end of the stream; how many were missing then.
    fn pass(&mut self, mut left: u64) -> Result<u64, ImageError> {
        let mut buffer = vec![0; if left > 0 { 32 * 1024 } else { 0 }];
        while left > 0 {
            let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            match self.stream.read(&mut buffer[..wanted])? {
                0 => break,
                count => left -= count as u64,
            }
        }
        Ok(left)
    }

    /// The next header whose checksum is right; none at the end.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>, ImageError> {
        let mut block = [0; BLOCK];
        match self.stream.fill(&mut block)? {
            0 => return Ok(None),
            BLOCK => {}
            _ => return Err(self.damaged("it is cut off within a header")),
        }
        if block.iter().all(|byte| *byte == 0) {
            self.marked = true;
            return Ok(None);
        }
        let given = number(&Header::from_byte_slice(&block).as_old().cksum);
        let outside = || block[..148].iter().chain(&block[156..]);
        let sum: i64 = outside().map(|byte| i64::from(*byte)).sum::<i64>() + 8 * 32;
        // Very old archivers added the bytes up as signed.
        let signed: i64 = outside().map(|byte| i64::from(byte.cast_signed())).sum::<i64>() + 8 * 32;
        if given != Some(sum) && given != Some(signed) {
            return Err(self.damaged("the checksum of a tar header is wrong"));
        }
        Ok(Some(block))
    }

    fn description(&mut self, size: u64) -> Result<Vec<u8>, ImageError> {
        let length = usize::try_from(size).ok().filter(|_| size <= MAX_DESCRIPTION);
        let Some(length) = length else {
            return Err(ImageError::TooLarge {
                limit: "1 MiB for the description of a file".into(),
            });
        };
        let mut text = vec![0; length];
        if self.stream.fill(&mut text)? < length {
            return Err(self.damaged("it is cut off within a header"));
        }
        self.expect(size);
        self.pending = 0;
        Ok(text)
    }

    fn unsigned(&self, field: &[u8], what: &str) -> Result<u64, ImageError> {
        number(field)
            .and_then(|value| u64::try_from(value).ok())
            .ok_or_else(|| self.damaged(&format!("the {what} of a file is not a number")))
    }

    /// A number of the header, or the PAX record that replaces it.
    fn id(&self, described: &Described, key: &str, field: &[u8]) -> Result<u32, ImageError> {
        let value = match described.record(key.as_bytes()) {
            Some(text) => decimal(text),
            None => number(field),
        };
        // The highest value means "do not change" to the kernel.
        value
            .and_then(|value| u32::try_from(value).ok())
            .filter(|value| *value != u32::MAX)
            .ok_or_else(|| self.damaged(&format!("the {key} of a file is out of range")))
    }

    fn member(
        &mut self,
        header: &Header,
        stored: u64,
        mut described: Described,
    ) -> Result<Member, ImageError> {
        let old = header.as_old();
        let long = described.long_path.take();
        let pax = || described.record(sparse::NAME).or(described.record(b"path")).map(Vec::from);
        let path = long.or_else(pax);
        let path = path.unwrap_or_else(|| header.path_bytes().into_owned());
        let target =
            described.long_link.take().or_else(|| described.record(b"linkpath").map(Vec::from));
        let target =
            target.unwrap_or_else(|| header.link_name_bytes().map(Vec::from).unwrap_or_default());
        for name in [&path, &target] {
            if name.contains(&0) {
                return Err(self.damaged("a name holds a NUL byte"));
            }
            if name.len() > MAX_PATH {
                return Err(ImageError::TooLarge { limit: format!("{MAX_PATH} bytes in a path") });
            }
        }
        let kind = self.kind(header, &path, target)?;
        let mut member = Member {
            path,
            kind,
            mode: u32::try_from(self.unsigned(&old.mode, "mode")? & 0o7777).unwrap_or_default(),
            uid: self.id(&described, "uid", &old.uid)?,
            gid: self.id(&described, "gid", &old.gid)?,
            mtime: self.mtime(header, &described)?,
            size: 0,
            xattrs: xattrs(&described),
        };
        // By the flag, not by what the name makes of the member: content that is not passed over would
        // be read as headers, of members that no other program sees.
        let flag = header.entry_type();
        if matches!(flag, EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse)
            || matches!(member.kind, Kind::Unknown(_))
        {
            member.size = self.content(header, stored, &described)?;
        }
        if member.kind == Kind::Directory && self.pending > 0 {
            self.runs.clear();
            member.size = 0;
            if old.linkflag == [0] {
                return Err(self.damaged(
                    "a directory of the oldest form has content, which programs read differently",
                ));
            }
        }
        Ok(member)
    }

    fn kind(&self, header: &Header, path: &[u8], target: Vec<u8>) -> Result<Kind, ImageError> {
        let device = |number: std::io::Result<Option<u32>>| {
            number.ok().flatten().ok_or_else(|| self.damaged("a device has no number"))
        };
        Ok(match header.entry_type() {
            // Before ustar, a directory was a file whose name ends in a slash.
            EntryType::Regular if path.ends_with(b"/") => Kind::Directory,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
            EntryType::Directory => Kind::Directory,
            EntryType::Symlink => Kind::Symlink(target),
            EntryType::Link => Kind::HardLink(target),
            EntryType::Fifo => Kind::Fifo,
            EntryType::Char => Kind::CharDevice {
                major: device(header.device_major())?,
                minor: device(header.device_minor())?,
            },
            EntryType::Block => Kind::BlockDevice {
                major: device(header.device_major())?,
                minor: device(header.device_minor())?,
            },
            other => Kind::Unknown(other.as_byte()),
        })
    }

    fn mtime(&self, header: &Header, described: &Described) -> Result<(i64, u32), ImageError> {
        let time = match described.record(b"mtime") {
            Some(text) => fraction(text),
            None => number(&header.as_old().mtime).map(|seconds| (seconds, 0)),
        };
        let (seconds, nanos) = time.ok_or_else(|| self.damaged("the time of a file is no time"))?;
        Ok(match seconds {
            ..0 => (0, 0),
            0..=MAX_TIME => (seconds, nanos),
            _ => (MAX_TIME, 0),
        })
    }

    /// Prepares to read a file's content; answers the size it will have.
    fn content(
        &mut self,
        header: &Header,
        stored: u64,
        described: &Described,
    ) -> Result<u64, ImageError> {
        let stored = match described.record(b"size") {
            Some(text) => decimal(text)
                .and_then(|size| u64::try_from(size).ok())
                .ok_or_else(|| self.damaged("the size of a file is not a number"))?,
            None => stored,
        };
        let form = sparse::form(&described.records).map_err(|fault| self.map_fault(fault))?;
        let (size, runs, stored) = match form {
            Some(Form::Listed { size, runs }) => (size, runs, stored),
            Some(Form::InContent { size }) => {
                let (runs, taken) = self.map_in_content(stored)?;
                (size, runs, stored - taken)
            }
            None if header.entry_type() == EntryType::GNUSparse => {
                let runs = self.old_map(header.as_bytes())?;
                (self.unsigned(&header.as_bytes()[483..495], "size")?, runs, stored)
            }
            None => {
                self.expect(stored);
                self.runs.extend((stored > 0).then_some((0, stored)));
                return Ok(stored);
            }
        };
        sparse::check(&runs, size, stored).map_err(|fault| self.map_fault(fault))?;
        self.expect(stored);
        self.runs.extend(runs.into_iter().filter(|(_, length)| *length > 0));
        Ok(size)
    }

    fn map_fault(&self, fault: Fault) -> ImageError {
        match fault {
            Fault::Damaged(what) => self.damaged(what),
            Fault::TooLong => {
                ImageError::TooLarge { limit: format!("{MAX_RUNS} pieces of a file") }
            }
        }
    }

    /// The pieces of an old GNU sparse file: four in the header, 21 in each block that may follow.
    fn old_map(&mut self, header: &[u8; BLOCK]) -> Result<Vec<Run>, ImageError> {
        let mut runs =
            sparse::old_pieces(&header[386..482]).map_err(|fault| self.map_fault(fault))?;
        let mut more = header[482] != 0;
        while more {
            let block = self.block()?;
            runs.extend(sparse::old_pieces(&block[..504]).map_err(|fault| self.map_fault(fault))?);
            more = block[504] != 0;
            if runs.len() > MAX_RUNS {
                return Err(self.map_fault(Fault::TooLong));
            }
        }
        Ok(runs)
    }

    /// The pieces of a PAX 1.0 sparse file, and how many of the stored bytes list them.
    fn map_in_content(&mut self, stored: u64) -> Result<(Vec<Run>, u64), ImageError> {
        let mut map = MapReader::default();
        let mut taken = 0;
        loop {
            taken += BLOCK as u64;
            if taken > stored {
                return Err(self.damaged("the map of a sparse file is longer than the file"));
            }
            let block = self.block()?;
            if let Some(runs) = map.block(&block).map_err(|fault| self.map_fault(fault))? {
                return Ok((runs, taken));
            }
        }
    }

    fn block(&mut self) -> Result<[u8; BLOCK], ImageError> {
        let mut block = [0; BLOCK];
        if self.stream.fill(&mut block)? < BLOCK {
            return Err(self.damaged("it is cut off within a header"));
        }
        Ok(block)
    }
}

fn unterminated(mut name: Vec<u8>) -> Vec<u8> {
    if name.last() == Some(&0) {
        name.pop();
    }
    name
}

fn xattrs(described: &Described) -> Vec<(Vec<u8>, Vec<u8>)> {
    let named = described.records.iter().filter_map(|(key, value)| {
        Some((key.strip_prefix(b"SCHILY.xattr.")?.to_vec(), value.clone()))
    });
    named.collect()
}
