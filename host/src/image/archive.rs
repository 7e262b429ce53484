//! What came in, spooled: the whole stream in one file, uncompressed, and where its members lie.
//!
//! docker-save puts the list of layers last, so everything is kept until it is known what is needed;
//! and only at the end is it known whether it was an image archive at all, or the files of a root
//! filesystem, which then lie there as the layer that they are.
//!
//! # Invariants
//! 1. No name of the archive ever becomes a name on disk.
//! 2. The whole stream is read and its end mark seen, or the import fails.
//! 3. Links in an image archive lead to members of the archive or nowhere.
//!
//! The spool is part of the workspace and goes with it.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek as _, SeekFrom, Take};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

use sha2::{Digest, Sha256};

use super::config::is_sha256;
use super::stream::{BUFFER, Budget, Context, Stream, readable};
use super::tarball::{Kind, Member, Reader, shown};
use super::tree::components;
use super::workspace::{Workspace, failed};
use super::{ImageError, ImportProgress};

/// An archive of images has a few files for each layer.
const MAX_FILES: u64 = 16_384;
/// How long a chain of links may be.
const MAX_LINKS: usize = 8;
/// How often the progress is told.
const STEP: u64 = 8 * 1024 * 1024;

/// Bytes that lie on disk: a file, or a part of one.
#[derive(Debug, Clone)]
pub(super) struct Spooled {
    pub(super) path: PathBuf,
    /// Where they begin.
    pub(super) offset: u64,
    pub(super) size: u64,
    /// 64 hex digits.
    pub(super) sha256: String,
}

impl Spooled {
    /// Opens them for reading.
    pub(super) fn open(&self) -> Result<Take<File>, ImageError> {
        let mut file = File::open(&self.path).map_err(|e| failed("open", &self.path, e))?;
        file.seek(SeekFrom::Start(self.offset)).map_err(|e| failed("read", &self.path, e))?;
        Ok(file.take(self.size))
    }
}

#[derive(Debug)]
enum Kept {
    File(Spooled),
    /// The normalized name of another member.
    Link(String),
}

/// What a stream was.
#[derive(Debug)]
pub(super) enum Content {
    /// An archive of images.
    Images(Archive),
    /// The files of a root filesystem: one layer.
    Rootfs(Spooled),
}

/// An archive of images: what each name stands for.
#[derive(Debug)]
pub(super) struct Archive {
    members: HashMap<String, Kept>,
    max_json: u64,
}

/// Reads a whole stream into the workspace.
pub(super) fn spool<'a>(
    input: &'a mut dyn Read,
    workspace: &Workspace,
    context: &Context<'a>,
    budget: &'a Budget,
) -> Result<Content, ImageError> {
    let path = workspace.directory("spool")?.join("archive");
    let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    let file = opened.map_err(|error| failed("create", &path, error))?;
    let mut stream = Stream::open("the archive".into(), input, ImageError::Read, context, budget)?;
    stream.keep_in(file, path.clone());
    let mut spooler = Spooler::new(path.clone(), context);
    let mut reader = Reader::new(&mut stream);
    let mut is_empty = true;
    loop {
        let member = match reader.next() {
            Ok(Some(member)) => member,
            Ok(None) => break,
            // What is no tar from the start was never meant to be one.
            Err(ImageError::Damaged { what }) if is_empty => {
                return Err(ImageError::NotAnArchive { what });
            }
            Err(error) => return Err(error),
        };
        is_empty = false;
        context.check()?;
        spooler.add(&member, &mut reader)?;
    }
    if is_empty {
        return Err(ImageError::NotAnArchive { what: "it is empty".into() });
    }
    if !reader.ended_with_mark() {
        let what = "the archive is cut off: its end mark is missing".to_owned();
        return Err(ImageError::Damaged { what });
    }
    let (sha256, size) = stream.finish()?;
    spooler.judge(Spooled { path, offset: 0, size, sha256 })
}

/// Notes where the members lie, as long as they may be those of an image archive.
struct Spooler<'c, 'a> {
    path: PathBuf,
    members: HashMap<String, Kept>,
    /// Why it cannot be an image archive.
    refused: Option<ImageError>,
    /// It holds the list of what is in an archive of `docker save`.
    has_list: bool,
    /// It holds what an OCI layout has: the index, the file that says that it is one.
    has_index: bool,
    has_layout: bool,
    /// It holds what only image archives hold.
    has_part: bool,
    told: u64,
    /// How the last file begins, after white space.
    first: Option<u8>,
    buffer: Vec<u8>,
    context: &'c Context<'a>,
}

impl<'c, 'a> Spooler<'c, 'a> {
    fn new(path: PathBuf, context: &'c Context<'a>) -> Self {
        Self {
            path,
            members: HashMap::new(),
            refused: None,
            has_list: false,
            has_index: false,
            has_layout: false,
            first: None,
            has_part: false,
            told: 0,
            buffer: vec![0; BUFFER],
            context,
        }
    }

    fn add(&mut self, member: &Member, reader: &mut Reader<'_, '_>) -> Result<(), ImageError> {
        let name = components(&member.path).and_then(|parts| normal(&parts)).unwrap_or_default();
        self.has_index |= name == "index.json";
        self.has_layout |= name == "oci-layout";
        self.has_part |= is_part(&name);
        self.first = None;
        if self.refused.is_none() {
            match self.keep(member, reader)? {
                Ok(Some((name, kept))) => drop(self.members.insert(name, kept)),
                Ok(None) => {}
                Err(refused) => self.refused = Some(refused),
            }
            if self.members.len() as u64 > MAX_FILES {
                let limit = format!("{MAX_FILES} files in the archive");
                self.refused = Some(ImageError::TooLarge { limit });
                self.members = HashMap::new();
            }
        }
        if name == "manifest.json" {
            if self.first.is_none() && member.kind == Kind::File {
                drop(self.file(reader)?);
            }
            // Programs have files of this name too, which are no list of images. A link is one.
            self.has_list |= self.first == Some(b'[') || member.kind != Kind::File;
        }
        self.tell(reader.position());
        Ok(())
    }

    /// What a member is in an image archive, or why that cannot have one. The outer error is the
    /// stream's.
    fn keep(
        &mut self,
        member: &Member,
        reader: &mut Reader<'_, '_>,
    ) -> Result<Result<Option<(String, Kept)>, ImageError>, ImageError> {
        let kept = match &member.kind {
            Kind::Directory => return Ok(Ok(None)),
            Kind::File => match self.file(reader)? {
                Some(file) => Ok(Kept::File(file)),
                None => Err(ImageError::Damaged {
                    what: "the archive itself holds a sparse file".to_owned(),
                }),
            },
            Kind::HardLink(target) => {
                components(target).and_then(|parts| normal(&parts)).map(Kept::Link)
            }
            Kind::Symlink(target) => beside(&member.path, target).map(Kept::Link),
            _ => {
                let what =
                    format!("the archive itself holds a device or the like: {}", member.shown());
                Err(ImageError::Hostile { what })
            }
        };
        let name = || components(&member.path).and_then(|parts| normal(&parts));
        Ok(kept.and_then(|kept| Ok(Some((name()?, kept)))))
    }

    /// Where a file lies; `None` for a sparse one, which lies there in pieces.
    fn file(&mut self, reader: &mut Reader<'_, '_>) -> Result<Option<Spooled>, ImageError> {
        let start = reader.position();
        let mut hash = Sha256::new();
        let mut size = 0;
        while let Some((offset, count)) = reader.read(&mut self.buffer)? {
            if offset != size {
                return Ok(None);
            }
            let read = &self.buffer[..count];
            let begin = || read.iter().copied().find(|byte| !byte.is_ascii_whitespace());
            self.first = self.first.or_else(begin);
            hash.update(read);
            size += count as u64;
            self.tell(reader.position());
        }
        let sha256 = hex::encode(hash.finalize());
        Ok(Some(Spooled { path: self.path.clone(), offset: start, size, sha256 }))
    }

    fn tell(&mut self, bytes: u64) {
        if bytes - self.told >= STEP {
            self.told = bytes;
            (self.context.progress)(ImportProgress::Receiving { bytes });
        }
    }

    /// What all of it was.
    fn judge(self, whole: Spooled) -> Result<Content, ImageError> {
        if self.has_list || (self.has_index && self.has_layout) {
            return match self.refused {
                Some(refused) => Err(refused),
                None => {
                    let max_json = self.context.limits.max_json_bytes;
                    Ok(Content::Images(Archive { members: self.members, max_json }))
                }
            };
        }
        if self.has_part {
            let what = if self.has_index {
                "it has parts of an image, index.json and no oci-layout"
            } else {
                "it has parts of an image and neither manifest.json (docker save) nor index.json \
                 (an OCI layout)"
            };
            return Err(ImageError::NotAnArchive { what: what.into() });
        }
        Ok(Content::Rootfs(whole))
    }
}

/// Whether only an image archive has a member with this name.
fn is_part(name: &str) -> bool {
    let stem = name.strip_suffix("/layer.tar").or_else(|| name.strip_suffix(".json"));
    name == "oci-layout" || name.starts_with("blobs/sha256/") || stem.is_some_and(is_sha256)
}

impl Archive {
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
        let mut text = Vec::new();
        let read = file.open()?.read_to_end(&mut text);
        read.map_err(|error| failed("read", &file.path, error))?;
        Ok(text)
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
