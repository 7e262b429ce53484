//! The clone itself.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;

use rustix::process::Pid;

use super::init::{self, Plan};

/// `CLONE_INTO_CGROUP` of the kernel.
const INTO_CGROUP: u64 = 0x2_0000_0000;

/// `CLONE_CLEAR_SIGHAND` of the kernel: the agent's handlers are of no use in the child.
const CLEAR_SIGHAND: u64 = 0x1_0000_0000;

/// Clones a process that runs the small init in namespaces of its own.
pub(super) fn clone_init(plan: &Plan<'_>, cgroup: Option<&OwnedFd>) -> io::Result<Pid> {
    // SAFETY: the arguments are plain integers; zero means "not used" for each of them.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = flag(libc::CLONE_NEWPID) | flag(libc::CLONE_NEWNS) | CLEAR_SIGHAND;
    arguments.exit_signal = flag(libc::SIGCHLD);
    if let Some(cgroup) = cgroup {
        arguments.flags |= INTO_CGROUP;
        arguments.cgroup = u64::try_from(cgroup.as_raw_fd()).map_err(io::Error::other)?;
    }
    let before = block_all_signals()?;
    // SAFETY: without a stack and without shared memory this is a fork: the child goes on here
    // with a copy of everything, on a copy of this stack. `arguments` outlives the call.
    let result = unsafe {
        libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>())
    };
    if result == 0 {
        init::run(plan);
    }
    let error = io::Error::last_os_error();
    restore_signals(&before)?;
    if result < 0 {
        return Err(error);
    }
    let pid = i32::try_from(result).ok().and_then(Pid::from_raw);
    pid.ok_or_else(|| io::Error::other("clone3 returned no process id"))
}

fn flag(value: libc::c_int) -> u64 {
    u64::from(value.unsigned_abs())
}

fn block_all_signals() -> io::Result<libc::sigset_t> {
    // SAFETY: a signal set is plain data, and both calls fill the one they are given.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        match libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) {
            0 => Ok(before),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

fn restore_signals(before: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: the set was filled by `block_all_signals`.
    match unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before, ptr::null_mut()) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}
