//! Why a machine ended: QMP's reason, the console and the process's status, put together.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::super::{ExitReason, MachineExit};
use super::qmp::Shutdown;
use crate::process::ChildExit;

/// How much of the end of a log is read.
const TAIL_BYTES: u64 = 64 * 1024;

/// The longest line that is passed on, in characters.
const MAX_LINE: usize = 512;

/// How many lines of what QEMU printed go into a reason.
const LOG_LINES: usize = 4;

/// What our guest's init prints before it gives up.
const FATAL: &str = "matchlock-guest: fatal:";

/// What the kernel prints when it panics.
const PANIC: &str = "Kernel panic - not syncing:";

/// What is known when the process has ended.
#[derive(Debug)]
pub(super) struct Evidence {
    /// The process's status.
    pub(super) status: ChildExit,
    /// Whether we sent SIGKILL.
    pub(super) killed: bool,
    /// The reason that QMP gave.
    pub(super) shutdown: Option<Shutdown>,
    /// The end of the guest's console.
    pub(super) console: Vec<String>,
    /// The end of what QEMU printed.
    pub(super) log: Vec<String>,
}

/// Decides why the machine ended.
pub(super) fn decide(evidence: &Evidence) -> MachineExit {
    let panic = || panic_line(&evidence.console);
    let reason = match &evidence.shutdown {
        Some(Shutdown::PowerOff) => ExitReason::PowerOff,
        // The kernel resets the machine after a panic: the console tells the two apart.
        Some(Shutdown::Reset) => panic().map_or(ExitReason::Reset, ExitReason::GuestPanic),
        Some(Shutdown::Panic) => {
            ExitReason::GuestPanic(panic().unwrap_or_else(|| "no message on the console".into()))
        }
        _ if evidence.killed && was_killed(evidence.status) => ExitReason::Killed,
        Some(Shutdown::Other(name)) => {
            let printed = last_lines(&evidence.log);
            ExitReason::Died(match printed.as_str() {
                "" => format!("QEMU stopped: {name}"),
                printed => format!("QEMU stopped: {name}; {printed}"),
            })
        }
        None => match panic() {
            // QMP was lost, but QEMU ended by itself: the console is all that is left.
            Some(line) if ended_well(evidence.status) => ExitReason::GuestPanic(line),
            _ => ExitReason::Died(last_lines(&evidence.log)),
        },
    };
    MachineExit { reason, status: evidence.status.to_string() }
}

/// Whether SIGKILL ended it: our order may have come after its end.
fn was_killed(exit: ChildExit) -> bool {
    match exit {
        ChildExit::Status(status) => status.signal() == Some(libc::SIGKILL),
        ChildExit::Unknown => true,
    }
}

fn ended_well(exit: ChildExit) -> bool {
    matches!(exit, ChildExit::Status(status) if status.success())
}

/// The line that says why the guest panicked: our init's, or the kernel's.
fn panic_line(console: &[String]) -> Option<String> {
    let last = |text: &str| {
        console.iter().rev().find_map(|line| line.find(text).map(|at| line.split_at(at).1))
    };
    let kernel = last(PANIC)?;
    Some(last(FATAL).unwrap_or_else(|| kernel.split_at(PANIC.len()).1.trim()).to_owned())
}

fn last_lines(log: &[String]) -> String {
    log.get(log.len().saturating_sub(LOG_LINES)..).unwrap_or_default().join("; ")
}

/// The last lines of a file below `dir`, oldest first, without control characters; none when the
/// file was not made yet.
pub(super) fn tail(dir: &OwnedFd, name: &Path, max_lines: usize) -> io::Result<Vec<String>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut file = match rustix::fs::openat(dir, name, flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(Errno::NOENT) => return Ok(Vec::new()),
        Err(errno) => return Err(errno.into()),
    };
    let start = file.metadata()?.len().saturating_sub(TAIL_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let mut lines: Vec<String> = bytes
        .split(|byte| *byte == b'\n')
        // Where the beginning was cut off, the first line is a part of one.
        .skip(usize::from(start > 0))
        .map(clean)
        .filter(|line| !line.is_empty())
        .collect();
    Ok(lines.split_off(lines.len().saturating_sub(max_lines)))
}

/// A line of a guest's as it may be shown: no control characters, no terminal commands.
fn clean(line: &[u8]) -> String {
    String::from_utf8_lossy(line)
        .trim_end()
        .chars()
        .filter(|c| !c.is_control())
        .take(MAX_LINE)
        .collect()
}

#[cfg(test)]
mod tests {
    use std::process::ExitStatus;

    use super::*;

    fn evidence(shutdown: Option<Shutdown>, raw_status: i32) -> Evidence {
        Evidence {
            status: ChildExit::Status(ExitStatus::from_raw(raw_status)),
            killed: false,
            shutdown,
            console: Vec::new(),
            log: Vec::new(),
        }
    }

    fn panicked(mut evidence: Evidence) -> Evidence {
        evidence.console = vec![
            "hello".to_owned(),
            "[    1.2] Kernel panic - not syncing: Attempted to kill init! exitcode=0x0".to_owned(),
            "[    1.3] CPU: 0 PID: 1".to_owned(),
        ];
        evidence
    }

    fn reason(evidence: &Evidence) -> ExitReason {
        decide(evidence).reason
    }

    #[test]
    fn a_reset_with_a_panic_on_the_console_is_a_panic() {
        let reset = || evidence(Some(Shutdown::Reset), 0);
        assert_eq!(reason(&reset()), ExitReason::Reset);
        let text = "Attempted to kill init! exitcode=0x0".to_owned();
        assert_eq!(reason(&panicked(reset())), ExitReason::GuestPanic(text));

        let mut fatal = panicked(reset());
        fatal.console.insert(1, "matchlock-guest: fatal: no disk named base".to_owned());
        let text = "matchlock-guest: fatal: no disk named base".to_owned();
        assert_eq!(reason(&fatal), ExitReason::GuestPanic(text));
    }

    #[test]
    fn a_panic_on_the_console_alone_proves_nothing() {
        let off = panicked(evidence(Some(Shutdown::PowerOff), 0));
        assert_eq!(reason(&off), ExitReason::PowerOff);
        assert_eq!(reason(&panicked(evidence(None, 9))), ExitReason::Died(String::new()));
        let lost = reason(&panicked(evidence(None, 0)));
        assert!(matches!(lost, ExitReason::GuestPanic(_)), "{lost:?}");
    }

    #[test]
    fn killed_by_us_is_not_died() {
        let mut ours = evidence(None, 9);
        ours.killed = true;
        assert_eq!(reason(&ours), ExitReason::Killed);
        let mut too_late = evidence(Some(Shutdown::PowerOff), 0);
        too_late.killed = true;
        assert_eq!(reason(&too_late), ExitReason::PowerOff);
        let mut failed_before = evidence(None, 1 << 8);
        failed_before.killed = true;
        assert_eq!(reason(&failed_before), ExitReason::Died(String::new()));
    }

    #[test]
    fn what_qemu_printed_is_in_the_reason() {
        let mut died = evidence(None, 1 << 8);
        died.log = (0..6).map(|n| format!("line {n}")).collect();
        assert_eq!(reason(&died), ExitReason::Died("line 2; line 3; line 4; line 5".into()));
        assert_eq!(decide(&died).status, "exit status: 1");
        let stopped = evidence(Some(Shutdown::Other("host-signal".into())), 0);
        assert_eq!(reason(&stopped), ExitReason::Died("QEMU stopped: host-signal".into()));
    }

    #[test]
    fn a_tail_is_short_and_harmless() {
        let dir = tempfile::tempdir().unwrap();
        let fd = OwnedFd::from(File::open(dir.path()).unwrap());
        let name = Path::new("console.log");
        assert!(tail(&fd, name, 3).unwrap().is_empty());

        std::fs::write(dir.path().join(name), b"one\r\n\x1b[2Jtwo\x07\n\n\xffthree").unwrap();
        assert_eq!(tail(&fd, name, 2).unwrap(), ["[2Jtwo", "\u{fffd}three"]);

        let long = format!("{}\nend\n", "x".repeat(200_000));
        std::fs::write(dir.path().join(name), long).unwrap();
        assert_eq!(tail(&fd, name, 10).unwrap(), ["end"]);

        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
        assert!(tail(&fd, Path::new("link"), 1).is_err());
    }
}
