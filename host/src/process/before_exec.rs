//! What a child does to itself between fork and exec: system calls only, as nothing else is safe
//! there.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};

use rustix::io::Errno;
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, setrlimit};

/// The child's own preparations. Failing, it ends the child, and the parent is told why.
pub(super) fn before_exec(
    parent: Pid,
    inherit: &[RawFd],
    max_file_bytes: Option<u64>,
) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // The parent may have ended before the line above; then nobody would ever send the signal.
    if rustix::process::getppid() != Some(parent) {
        return Err(Errno::CHILD.into());
    }
    super::forbid_core_dumps()?;
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    keep_descriptors(inherit)?;
    default_signals()?;
    if let Some(wanted) = max_file_bytes {
        // Only root may raise a limit that is there already.
        let limit = getrlimit(Resource::Fsize).maximum.map_or(wanted, |now| now.min(wanted));
        setrlimit(Resource::Fsize, Rlimit { current: Some(limit), maximum: Some(limit) })?;
        // SAFETY: SIG_IGN installs no code. Ignored, the write fails; else the signal would kill.
        unsafe {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        }
    }
    Ok(())
}

/// Marks every descriptor but the standard ones and these to be closed by exec.
fn keep_descriptors(inherit: &[RawFd]) -> io::Result<()> {
    // SAFETY: close_range with CLOSE_RANGE_CLOEXEC only sets a flag on descriptors of this
    // process; it touches no memory. Called by number, as musl has no wrapper for it.
    let done = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3 as libc::c_uint,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    for &fd in inherit {
        // SAFETY: the descriptor is open: the parent's `ChildSpec` owns it until the spawn is over.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        rustix::io::fcntl_setfd(fd.as_fd(), rustix::io::FdFlags::empty())?;
    }
    Ok(())
}

/// The last signal of Linux.
const LAST_SIGNAL: libc::c_int = 64;

/// The size of the kernel's set of 64 signals.
const SIGSET_BYTES: usize = 8;

/// Undoes what this process ignores or blocks: both would be inherited.
fn default_signals() -> io::Result<()> {
    // All zero: SIG_DFL, no flags, nothing blocked. At least as large as the kernel's struct.
    let default = [0_u64; 8];
    for number in 1..=LAST_SIGNAL {
        // SAFETY: the kernel only reads from `default`, and installs no code. SIGKILL and SIGSTOP
        // are refused with EINVAL, which changes nothing. Called by number, as the C library does
        // not let anyone reset the signals that it uses itself, and those may be ignored too.
        unsafe {
            let none = std::ptr::null_mut::<u64>();
            libc::syscall(libc::SYS_rt_sigaction, number, default.as_ptr(), none, SIGSET_BYTES);
        }
    }
    // SAFETY: the set is a plain value, made valid by sigemptyset before it is used; the old
    // mask is not asked for.
    let done = unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut())
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
