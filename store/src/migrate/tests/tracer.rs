//! Stopping another process before each system call that changes files (writes, sizes, names, modes,
//! syncs) or locks them: shared memory is written between locks, without a call.
//!
//! # Invariants
//! * A process that is killed while it is stopped before a call never makes that call.
//! * Only the thread that is named is traced; whoever traces is one thread from begin to end.

use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// What is to become of a process that is stopped before a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    Kill,
    GoOn,
}

/// A call that a process stands before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    /// It changes a file, or its name, or keeps it.
    Change(&'static str),
    Lock,
    Unlock,
}

/// Lets a thread run that waits to be let go, and asks before each of its calls what to do; until it
/// ends.
pub(super) fn trace(thread: Pid, go: impl FnOnce(), mut before: impl FnMut(Call) -> Then) {
    ptrace::seize(thread, Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_EXITKILL).unwrap();
    let _reaped = Reaped(thread);
    ptrace::interrupt(thread).unwrap();
    assert!(matches!(wait(thread), Some(WaitStatus::PtraceEvent(..))));
    ptrace::syscall(thread, None).unwrap();
    go();
    loop {
        let signal = match wait(thread) {
            None | Some(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) => return,
            Some(WaitStatus::PtraceSyscall(_)) => {
                if let Some(call) = call_that_is_entered(thread)
                    && before(call) == Then::Kill
                {
                    kill(thread, Signal::SIGKILL).unwrap();
                    continue;
                }
                None
            }
            Some(WaitStatus::Stopped(_, signal)) => Some(signal),
            Some(_) => None,
        };
        ptrace::syscall(thread, signal).unwrap();
    }
}

/// The thread's next stop; `None` once it is gone.
fn wait(thread: Pid) -> Option<WaitStatus> {
    match waitpid(thread, Some(WaitPidFlag::__WALL)) {
        Err(Errno::ECHILD) => None,
        status => Some(status.unwrap()),
    }
}

/// A thread that is traced. A process whose traced thread nobody waits for never ends.
struct Reaped(Pid);

impl Drop for Reaped {
    fn drop(&mut self) {
        if std::thread::panicking() {
            kill(self.0, Signal::SIGKILL).unwrap_or_default();
            while let Some(status) = wait(self.0) {
                if matches!(status, WaitStatus::Exited(..) | WaitStatus::Signaled(..)) {
                    return;
                }
            }
        }
    }
}

/// The call, if the thread stands before one that counts.
fn call_that_is_entered(thread: Pid) -> Option<Call> {
    if ptrace::syscall_info(thread).unwrap().op != libc::PTRACE_SYSCALL_INFO_ENTRY {
        return None;
    }
    let registers = ptrace::getregs(thread).unwrap();
    let number = registers.orig_rax.cast_signed();
    let (first, second, third) = (registers.rdi, registers.rsi, registers.rdx);
    let has = |flags: u64, flag: i32| flags & u64::from(flag.cast_unsigned()) != 0;
    if number == libc::SYS_fcntl {
        return lock_by_fcntl(thread, second, third);
    }
    if number == libc::SYS_flock {
        return Some(if has(second, libc::LOCK_UN) { Call::Unlock } else { Call::Lock });
    }
    let (_, name) = CALLS.iter().find(|(known, _)| *known == number)?;
    let counts = match number {
        // What is told to the parent is no file.
        libc::SYS_write => first > 2,
        libc::SYS_open => has(second, libc::O_CREAT),
        libc::SYS_openat => has(third, libc::O_CREAT),
        _ => true,
    };
    counts.then_some(Call::Change(name))
}

fn lock_by_fcntl(thread: Pid, command: u64, lock: u64) -> Option<Call> {
    let locks = [libc::F_SETLK, libc::F_SETLKW, libc::F_OFD_SETLK, libc::F_OFD_SETLKW];
    if !locks.contains(&i32::try_from(command).unwrap()) {
        return None;
    }
    let address = std::ptr::without_provenance_mut(usize::try_from(lock).unwrap());
    let start = ptrace::read(thread, address).unwrap().to_le_bytes();
    // struct flock begins with its kind.
    let kind = i16::from_le_bytes([start[0], start[1]]);
    Some(if i32::from(kind) == libc::F_UNLCK { Call::Unlock } else { Call::Lock })
}

/// The calls that change files. Nothing here depends on who owns a file: fchown is left out.
const CALLS: &[(i64, &str)] = &[
    (libc::SYS_open, "open"),
    (libc::SYS_openat, "openat"),
    (libc::SYS_creat, "creat"),
    (libc::SYS_write, "write"),
    (libc::SYS_writev, "writev"),
    (libc::SYS_pwrite64, "pwrite64"),
    (libc::SYS_pwritev, "pwritev"),
    (libc::SYS_pwritev2, "pwritev2"),
    (libc::SYS_copy_file_range, "copy_file_range"),
    (libc::SYS_sendfile, "sendfile"),
    (libc::SYS_ftruncate, "ftruncate"),
    (libc::SYS_truncate, "truncate"),
    (libc::SYS_fallocate, "fallocate"),
    (libc::SYS_fsync, "fsync"),
    (libc::SYS_fdatasync, "fdatasync"),
    (libc::SYS_msync, "msync"),
    (libc::SYS_unlink, "unlink"),
    (libc::SYS_unlinkat, "unlinkat"),
    (libc::SYS_rename, "rename"),
    (libc::SYS_renameat, "renameat"),
    (libc::SYS_renameat2, "renameat2"),
    (libc::SYS_link, "link"),
    (libc::SYS_linkat, "linkat"),
    (libc::SYS_symlink, "symlink"),
    (libc::SYS_mkdir, "mkdir"),
    (libc::SYS_mkdirat, "mkdirat"),
    (libc::SYS_chmod, "chmod"),
    (libc::SYS_fchmod, "fchmod"),
    (libc::SYS_fchmodat, "fchmodat"),
];
