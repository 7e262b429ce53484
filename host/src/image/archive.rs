//! The archive's files, spooled: read once from the stream, hashed, kept under names of ours.
//!
//! docker-save puts the list of layers last, so everything is kept until it is known what is needed.
//!
//! # Invariants
//! 1. No name of the archive ever becomes a name on disk: files are numbered.
//! 2. The whole stream is read and its end mark seen, or the import fails.
//! 3. Links in the archive lead to members of the archive or nowhere.
//!
//! The spool is part of the workspace and goes with it.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

use sha2::{Digest, Sha256};

use super::stream::{BUFFER, Budget, Context, Stream, readable};
use super::tarball::{Kind, Member, Reader, shown};
use super::tree::components;
use super::workspace::{Workspace, failed};
use super::{ImageError, ImportProgress};

/// An archive of one image has a few files for each layer.
const MAX_FILES: u64 = 16_384;
/// How long a chain of links may be.
const MAX_LINKS: usize = 8;
/// How often the progress is told.
const STEP: u64 = 8 * 1024 * 1024;

/// A file of the archive, on disk.
#[derive(Debug, Clone)]
pub(super) struct Spooled {
    pub(super) path: PathBuf,
    pub(super) size: u64,
    /// 64 hex digits.
    pub(super) sha256: String,
}

#[derive(Debug)]
enum Kept {
    File(Spooled),
    /// The normalized name of another member.
    Link(String),
}

/// The spooled archive: what each name stands for.
#[derive(Debug)]
pub(super) struct Archive {
    members: HashMap<String, Kept>,
    max_json: u64,
}

impl Archive {
    /// Reads a whole archive into the workspace.
    pub(super) fn spool<'a>(
        input: &'a mut dyn Read,
        workspace: &Workspace,
        context: &Context<'a>,
        budget: &'a Budget,
    ) -> Result<Self, ImageError> {
        let directory = workspace.directory("spool")?;
        let mut stream =
            Stream::open("the archive".into(), input, ImageError::Read, context, budget)?;
        let files = Budget::count(MAX_FILES, "files in the archive");
        let mut archive = Self { members: HashMap::new(), max_json: context.limits.max_json_bytes };
        let mut spooler = Spooler { directory, next: 0, told: 0, buffer: vec![0; BUFFER], context };
        let mut reader = Reader::new(&mut stream);
        let mut first = true;
        loop {
            let member = match reader.next() {
                Ok(Some(member)) => member,
                Ok(None) => break,
                // What is no tar from the start was never meant to be one.
                Err(ImageError::Damaged { what }) if first => {
                    return Err(ImageError::NotAnArchive { what });
                }
                Err(error) => return Err(error),
            };
            first = false;
            context.check()?;
            files.spend(1)?;
            archive.add(&member, &mut reader, &mut spooler)?;
        }
        if first {
            return Err(ImageError::NotAnArchive { what: "it is empty".into() });
        }
        if !reader.ended_with_mark() {
            let what = "the archive is cut off: its end mark is missing".to_owned();
            return Err(ImageError::Damaged { what });
        }
        stream.finish()?;
        Ok(archive)
    }

    fn add(
        &mut self,
        member: &Member,
        reader: &mut Reader<'_, '_>,
        spooler: &mut Spooler<'_, '_>,
    ) -> Result<(), ImageError> {
        let kept = match &member.kind {
            Kind::Directory => return Ok(()),
            Kind::File => Kept::File(spooler.keep(reader)?),
            Kind::HardLink(target) => Kept::Link(normal(&components(target)?)?),
            Kind::Symlink(target) => Kept::Link(beside(&member.path, target)?),
            _ => {
                let what =
                    format!("the archive itself holds a device or the like: {}", member.shown());
                return Err(ImageError::Hostile { what });
            }
        };
        self.members.insert(normal(&components(&member.path)?)?, kept);
        Ok(())
    }

    /// The file with this name, through links.
    pub(super) fn find(&self, name: &str) -> Result<Option<&Spooled>, ImageError> {
        let mut name = normal(&components(name.as_bytes())?)?;
        for _ in 0..=MAX_LINKS {
            match self.members.get(&name) {
                None => return Ok(None),
                Some(Kept::File(file)) => return Ok(Some(file)),
                Some(Kept::Link(target)) => name.clone_from(target),
            }
        }
        Err(ImageError::Damaged {
            what: format!("the links of {name:?} in the archive are endless"),
        })
    }

    /// The file with this name, which the archive promises.
    pub(super) fn get(&self, name: &str) -> Result<&Spooled, ImageError> {
        self.find(name)?.ok_or_else(|| ImageError::Damaged {
            what: format!("{} is missing in the archive", shown(name.as_bytes())),
        })
    }

    /// A JSON document, in full.
    pub(super) fn text(&self, file: &Spooled) -> Result<Vec<u8>, ImageError> {
        if file.size > self.max_json {
            let limit = format!("{} in a JSON document", readable(self.max_json));
            return Err(ImageError::TooLarge { limit });
        }
        std::fs::read(&file.path).map_err(|error| failed("read", &file.path, error))
    }
}

/// Writes files under numbers.
struct Spooler<'c, 'a> {
    directory: PathBuf,
    next: u64,
    told: u64,
    buffer: Vec<u8>,
    context: &'c Context<'a>,
}

impl Spooler<'_, '_> {
    fn keep(&mut self, reader: &mut Reader<'_, '_>) -> Result<Spooled, ImageError> {
        let path = self.directory.join(self.next.to_string());
        self.next += 1;
        let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let mut file: File = opened.map_err(|error| failed("create", &path, error))?;
        let mut hash = Sha256::new();
        let mut size = 0;
        while let Some((offset, count)) = reader.read(&mut self.buffer)? {
            if offset != size {
                let what = "the archive itself holds a sparse file".to_owned();
                return Err(ImageError::Damaged { what });
            }
            let written = file.write_all(&self.buffer[..count]);
            written.map_err(|error| failed("write", &path, error))?;
            hash.update(&self.buffer[..count]);
            size += count as u64;
            let bytes = reader.position();
            if bytes - self.told >= STEP {
                self.told = bytes;
                (self.context.progress)(ImportProgress::Receiving { bytes });
            }
        }
        Ok(Spooled { path, size, sha256: hex::encode(hash.finalize()) })
    }
}

/// A name as a key: the components, joined.
fn normal(components: &[&[u8]]) -> Result<String, ImageError> {
    String::from_utf8(components.join(&b'/')).map_err(|_| ImageError::Damaged {
        what: "the archive itself has a name that is not UTF-8".into(),
    })
}

/// Where a symbolic link in the archive leads: from its own directory, not above the archive.
fn beside(link: &[u8], target: &[u8]) -> Result<String, ImageError> {
    let mut path = if target.starts_with(b"/") { Vec::new() } else { components(link)? };
    path.pop();
    for part in target.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." if path.pop().is_some() => {}
            b".." => {
                let what = format!("{} in the archive links out of it", shown(link));
                return Err(ImageError::Hostile { what });
            }
            name => path.push(name),
        }
    }
    normal(&path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_stay_in_the_archive() {
        assert_eq!(beside(b"a/layer.tar", b"../b/layer.tar").unwrap(), "b/layer.tar");
        assert_eq!(beside(b"./a/l", b"./x").unwrap(), "a/x");
        assert_eq!(beside(b"a/l", b"/b/c").unwrap(), "b/c");
        assert!(matches!(beside(b"a/l", b"../../b"), Err(ImageError::Hostile { .. })));
        assert!(matches!(beside(b"l", b"../b"), Err(ImageError::Hostile { .. })));
    }
}
