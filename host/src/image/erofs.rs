//! Runs mkfs.erofs: a directory in, one image file out.
//!
//! The same tree gives the same bytes: the UUID comes from the content's name, and the time in the
//! superblock is a constant. mkfs.erofs 1.5 takes that constant from SOURCE_DATE_EPOCH and cuts later
//! times down to it, so it is the end of the year 9999; unpacking keeps times within 1970 and that.
//! Nothing is compressed: the file is read from the page cache of the host by many VMs.
//!
//! It may take only so much memory, and offers itself first to a kernel that has none left: how much
//! it takes is up to whoever made the image.
//!
//! # On stop and crash
//! The child is killed and reaped when the caller cancels, and dies with the thread that runs this.

use std::io::{self, PipeReader, Read as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};

use super::ImageError;
use super::stream::{Context, plain};
use super::tarball::MAX_TIME;
use super::workspace::failed;

/// The second is for a PATH without the directories of system programs.
const PROGRAMS: &[&str] = &["mkfs.erofs", "/usr/sbin/mkfs.erofs", "/sbin/mkfs.erofs"];
/// How much of its messages is kept: the end.
const KEPT: usize = 4096;
/// How often the caller's wish to cancel is looked at while the child runs.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Makes `image` from `tree`. The UUID is the start of the content's name.
pub(super) fn build(
    tree: &Path,
    image: &Path,
    content: &str,
    context: &Context<'_>,
) -> Result<(), ImageError> {
    build_with(PROGRAMS, tree, image, content, context)
}

fn build_with(
    programs: &[&str],
    tree: &Path,
    image: &Path,
    content: &str,
    context: &Context<'_>,
) -> Result<(), ImageError> {
    for program in programs {
        let mut command = Command::new(program);
        command.args(["--quiet", "--preserve-mtime", "-U", &uuid(content)]).args([image, tree]);
        command.current_dir("/").env("SOURCE_DATE_EPOCH", MAX_TIME.to_string()).env("LC_ALL", "C");
        // A terminal's Ctrl-C is for us: what becomes of the image is decided here.
        command.process_group(0);
        match spawn(command, context.limits.max_build_memory) {
            Ok((child, output)) => return wait(child, output, context),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("run", *program, error)),
        }
    }
    Err(ImageError::NoMkfsErofs)
}

/// 32 of the content's hex digits, as a UUID is written.
fn uuid(content: &str) -> String {
    let part = |range| content.get(range).unwrap_or_default();
    [part(0..8), part(8..12), part(12..16), part(16..20), part(20..32)].join("-")
}

fn spawn(mut command: Command, max_memory: u64) -> io::Result<(Child, PipeReader)> {
    let (output, writer) = io::pipe()?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
    let parent = rustix::process::getpid();
    let in_child = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // Who died before that call sends no signal any more.
        if rustix::process::getppid() != Some(parent) {
            return Err(Errno::SRCH.into());
        }
        let limit = getrlimit(Resource::As).maximum.map_or(max_memory, |now| now.min(max_memory));
        setrlimit(Resource::As, Rlimit { current: Some(limit), maximum: Some(limit) })?;
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let score = rustix::fs::open(c"/proc/self/oom_score_adj", flags, Mode::empty())?;
        rustix::io::write(&score, b"1000")?;
        Ok(())
    };
    // SAFETY: the closure makes a few plain system calls and allocates nothing, so it may run between
    // fork and exec.
    unsafe { command.pre_exec(in_child) };
    // The command, and with it our copies of the writing end, goes when this returns.
    Ok((command.spawn()?, output))
}

fn wait(mut child: Child, output: PipeReader, context: &Context<'_>) -> Result<(), ImageError> {
    let listened = listen(output, context);
    if listened.is_err() {
        // A child that has ended meanwhile is not an error here; that it is reaped is what counts.
        child.kill().map_err(|error| failed("kill", "mkfs.erofs", error))?;
    }
    let status = child.wait().map_err(|error| failed("wait for", "mkfs.erofs", error))?;
    let said = listened?;
    if status.success() {
        return Ok(());
    }
    let stderr = readable(&said);
    Err(ImageError::MkfsErofs { status: status.to_string(), stderr })
}

/// The child's messages name files of the image: no control characters but line ends.
fn readable(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    text.trim().lines().map(plain).collect::<Vec<_>>().join("\n")
}

/// Keeps the end of what the child says until it closes its output, which it does by ending.
fn listen(mut output: PipeReader, context: &Context<'_>) -> Result<Vec<u8>, ImageError> {
    let fail = |error: io::Error| failed("listen to", PathBuf::from("mkfs.erofs"), error);
    let mut said = Vec::new();
    let mut buffer = [0; KEPT];
    loop {
        context.check()?;
        match poll(&mut [PollFd::new(&output, PollFlags::IN)], Some(&TICK)) {
            Ok(0) | Err(Errno::INTR) => continue,
            Ok(_) => {}
            Err(error) => return Err(fail(error.into())),
        }
        match output.read(&mut buffer) {
            Ok(0) => return Ok(said),
            Ok(count) => {
                said.extend_from_slice(&buffer[..count]);
                said.drain(..said.len().saturating_sub(KEPT));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(fail(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::image::ImportLimits;

    fn run(script: &str, cancelled: &dyn Fn() -> bool) -> Result<(), ImageError> {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("mkfs");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let context = Context { limits: ImportLimits::default(), progress: &|_| {}, cancelled };
        let programs = ["/nonexistent/mkfs", program.to_str().unwrap()];
        let image = directory.path().join("out");
        build_with(&programs, directory.path(), &image, &"ab".repeat(32), &context)
    }

    #[test]
    fn a_missing_program_is_named() {
        let context =
            Context { limits: ImportLimits::default(), progress: &|_| {}, cancelled: &|| false };
        let built = build_with(&["/nonexistent"], Path::new("/"), Path::new("/x"), "", &context);
        assert!(matches!(built, Err(ImageError::NoMkfsErofs)));
    }

    #[test]
    fn the_end_of_what_it_says_is_kept() {
        let script =
            "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done; echo last >&2; exit 3";
        let error = run(script, &|| false).unwrap_err();
        let ImageError::MkfsErofs { status, stderr } = error else { panic!("{error}") };
        assert_eq!(status, "exit status: 3");
        assert!(stderr.ends_with("line 2999\nlast") && stderr.len() <= KEPT, "{stderr}");
    }

    #[test]
    fn it_gets_a_uuid_and_a_fixed_time() {
        run(
            r#"test "$4" = abababab-abab-abab-abab-abababababab && test "$SOURCE_DATE_EPOCH" = 253402300799"#,
            &|| false,
        )
        .unwrap();
    }

    #[test]
    fn its_memory_is_limited_and_it_goes_first() {
        let limits = ImportLimits::default();
        let kib = limits.max_build_memory / 1024;
        let limit = format!(r#"test "$(ulimit -v)" = {kib}"#);
        run(&format!(r#"{limit} && test "$(cat /proc/self/oom_score_adj)" = 1000"#), &|| false)
            .unwrap();
    }

    #[test]
    fn cancelling_ends_it() {
        let start = Instant::now();
        let cancelled = || start.elapsed() > Duration::from_millis(300);
        let error = run("exec sleep 1000", &cancelled).unwrap_err();
        assert!(matches!(error, ImageError::Cancelled), "{error}");
        assert!(start.elapsed() < Duration::from_secs(60));
    }
}
