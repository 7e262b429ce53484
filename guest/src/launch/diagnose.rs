//! Explains why a command did not start, in the words that people know from containers.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use matchlock_wire::message::{ExecFailure, ExecFailureKind};
use nix::errno::Errno;

use super::command::Command;
use super::report::{Report, Step};

/// A name in a message is cut here.
const MAX_NAME_CHARS: usize = 256;

/// What the kernel reads of a script's first line.
const SCRIPT_BYTES: usize = 256;

/// More segments than any program has.
const MAX_SEGMENTS: u16 = 64;

/// The failure that a report of the child means.
pub fn explain(command: &Command, report: Report) -> ExecFailure {
    let errno = Errno::from_raw(report.errno);
    let (kind, message) = match report.step {
        Step::Exec => explain_exec(command, errno),
        Step::WorkingDirectory => (
            ExecFailureKind::WorkingDirectory,
            format!("working directory {}: {}", quote(command.cwd().to_bytes()), words(errno)),
        ),
        Step::User => (ExecFailureKind::User, format!("cannot become the user: {}", words(errno))),
        Step::Descriptors | Step::Proc | Step::Fork | Step::Process => (
            ExecFailureKind::Unavailable,
            format!("cannot prepare the process ({:?}): {}", report.step, words(errno)),
        ),
    };
    ExecFailure { kind, message }
}

fn explain_exec(command: &Command, errno: Errno) -> (ExecFailureKind, String) {
    let name = quote(command.name().to_bytes());
    let searched = command.search_path().is_some();
    match errno {
        Errno::ENOENT | Errno::ENOTDIR => {
            if let Some(line) = command.candidates().find_map(|path| missing_helper(&path)) {
                return (ExecFailureKind::NotFound, format!("exec: {line}"));
            }
            let what = if searched {
                "executable file not found in $PATH".to_owned()
            } else {
                words(errno)
            };
            (ExecFailureKind::NotFound, format!("exec: {name}: {what}"))
        }
        Errno::EACCES if command.candidates().any(|path| path.is_dir()) => {
            (ExecFailureKind::NotExecutable, format!("exec: {name}: is a directory"))
        }
        Errno::E2BIG => (ExecFailureKind::Request, format!("exec: {name}: argument list too long")),
        Errno::ENOMEM | Errno::EAGAIN | Errno::EMFILE | Errno::ENFILE => {
            (ExecFailureKind::Unavailable, format!("exec: {name}: {}", words(errno)))
        }
        _ => (ExecFailureKind::NotExecutable, format!("exec: {name}: {}", words(errno))),
    }
}

/// A file that is there and still "not found" lacks the program that runs it.
fn missing_helper(path: &Path) -> Option<String> {
    // A file that cannot be looked into is not explained further.
    let (kind, helper) = helper_of(path).ok().flatten()?;
    let file = quote(path.as_os_str().as_encoded_bytes());
    Some(format!("{file}: its {kind} {} does not exist", quote(&helper)))
}

/// The interpreter of a script, or the loader of a program.
fn helper_of(path: &Path) -> io::Result<Option<(&'static str, Vec<u8>)>> {
    let mut options = File::options();
    let mut file = options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() || kind.is_fifo() {
        return Ok(None);
    }
    let mut head = Vec::new();
    file.by_ref().take(SCRIPT_BYTES as u64).read_to_end(&mut head)?;
    if let Some(line) = head.strip_prefix(b"#!") {
        let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let mut words = line.split(|byte| matches!(byte, b' ' | b'\t'));
        let interpreter = words.find(|word| !word.is_empty());
        return Ok(interpreter.map(|word| ("interpreter", word.to_vec())));
    }
    Ok(loader_of(&mut file, &head)?.map(|loader| ("loader", loader)))
}

/// The loader that a 64-bit little-endian program asks for.
fn loader_of(file: &mut File, head: &[u8]) -> io::Result<Option<Vec<u8>>> {
    const PT_INTERP: u32 = 3;
    if !head.starts_with(b"\x7fELF\x02\x01") {
        return Ok(None);
    }
    let (Some(table), Some(size), Some(count)) =
        (u64_at(head, 32), u16_at(head, 54), u16_at(head, 56))
    else {
        return Ok(None);
    };
    for index in 0..count.min(MAX_SEGMENTS) {
        let at = u64::from(index) * u64::from(size);
        let segment = read_at(file, table.saturating_add(at), 56)?;
        if segment.first_chunk().map(|kind| u32::from_le_bytes(*kind)) == Some(PT_INTERP) {
            let (Some(at), Some(length)) = (u64_at(&segment, 8), u64_at(&segment, 32)) else {
                return Ok(None);
            };
            let mut loader = read_at(file, at, length.min(4096))?;
            loader.retain(|byte| *byte != 0);
            return Ok(Some(loader));
        }
    }
    Ok(None)
}

fn read_at(file: &mut File, at: u64, length: u64) -> io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(at))?;
    let mut bytes = Vec::new();
    file.by_ref().take(length).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let chunk = bytes.get(at..)?.first_chunk()?;
    Some(u64::from_le_bytes(*chunk))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let chunk = bytes.get(at..)?.first_chunk()?;
    Some(u16::from_le_bytes(*chunk))
}

/// A name in quotes, in one line of bounded length.
pub(super) fn quote(name: &[u8]) -> String {
    let text = String::from_utf8_lossy(name);
    let short: String = text.chars().take(MAX_NAME_CHARS).collect();
    let dots = if short.len() < text.len() { "…" } else { "" };
    format!("{short:?}{dots}")
}

fn words(errno: Errno) -> String {
    let mut words = errno.desc().to_owned();
    if let Some(first) = words.get_mut(..1) {
        first.make_ascii_lowercase();
    }
    words
}
