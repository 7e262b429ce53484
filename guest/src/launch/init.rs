//! The child's side of the clone: the small init of a command's namespaces, and the command up to
//! its execve.
//!
//! # Invariants
//! 1. Only system calls: no allocation, no lock, no formatting, no panic. The process that was
//!    cloned may have had other threads, and their locks are held here for ever; the command's
//!    process has its init's memory until its execve.
//! 2. The calling code never returns: [`Guard`] ends the process even on a panic.
//! 3. All signals stay blocked in the init. It reads them from a descriptor, because the init of a
//!    namespace does not feel signals that it has no handler for.
//! 4. The init ends when the command ends; the kernel then kills whatever else is in the
//!    namespace, so nothing holds the command's output open any longer.
//! 5. Signals from outside the namespace come by the control pipe. One that comes to the init
//!    itself from outside is not passed on: who signals everything has signalled the command too.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::ptr;

use libc::{c_char, c_int, c_long, c_void, pid_t};

use super::report::{Report, Step};
use super::user::Identity;

/// What the child needs, prepared before the clone.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    /// The arguments, ended by a null pointer.
    pub(super) argv: &'a [*const c_char],
    /// The environment, ended by a null pointer.
    pub(super) envp: &'a [*const c_char],
    /// The command's name as given.
    pub(super) name: &'a CStr,
    /// `PATH`, if the name is to be searched in it.
    pub(super) search: Option<&'a [u8]>,
    /// The working directory.
    pub(super) cwd: &'a CStr,
    /// The signals that are ignored here, which it is not to ignore.
    pub(super) ignored: &'a [c_int],
    /// How many files it may open: what it starts with, and what it may raise that to.
    pub(super) files: libc::rlimit,
    /// Who to become.
    pub(super) identity: &'a Identity,
    /// Takes the command's raw wait status.
    pub(super) status: RawFd,
    /// Brings signals, one byte each; its end means that the agent is gone.
    pub(super) control: RawFd,
    /// Takes a [`Report`].
    pub(super) report: RawFd,
    /// The command's stdin.
    pub(super) stdin: RawFd,
    /// The command's stdout.
    pub(super) stdout: RawFd,
    /// The command's stderr.
    pub(super) stderr: RawFd,
    /// All of the above, in ascending order; one that is there twice too.
    pub(super) keep: [RawFd; 6],
    /// Whether stdin is a terminal, to be the controlling one.
    pub(super) terminal: bool,
}

const SIGNALS: c_int = 64;
const FAILED: c_int = 127;

/// The size of the kernel's own set of signals.
const KERNEL_SIGSET_BYTES: usize = 8;

/// The kernel takes whole registers, so a number must have their width.
const ZERO: c_long = 0;

/// A path that is longer cannot be executed.
const PATH_BYTES: usize = 4096;

/// Enough for a path and some calls.
const STACK_BYTES: usize = 8 * PATH_BYTES;

/// Ends the process wherever the code that holds it ends.
struct Guard;

impl Drop for Guard {
    fn drop(&mut self) {
        exit(FAILED);
    }
}

fn exit(code: c_int) -> ! {
    // SAFETY: ends this process at once, without running anything of the copied program.
    unsafe { libc::_exit(code) }
}

fn errno() -> c_int {
    // SAFETY: the pointer to this thread's errno is always valid.
    unsafe { *libc::__errno_location() }
}

fn check(result: c_int) -> Result<(), c_int> {
    if result < 0 { Err(errno()) } else { Ok(()) }
}

fn check_long(result: c_long) -> Result<(), c_int> {
    if result < 0 { Err(errno()) } else { Ok(()) }
}

/// Reports a failure and ends the process.
fn fail(plan: &Plan<'_>, step: Step, errno: c_int) -> ! {
    let report = Report { step, errno }.encode();
    // SAFETY: the buffer is as long as said. If the agent is gone nobody wants to know.
    unsafe { libc::write(plan.report, report.as_ptr().cast(), report.len()) };
    exit(FAILED)
}

/// Everything that happens in the cloned process.
pub(super) fn run(plan: &Plan<'_>) -> ! {
    let _guard = Guard;
    heed_signals(plan.ignored);
    if let Err(errno) = close_all_but(&plan.keep) {
        fail(plan, Step::Descriptors, errno);
    }
    if let Err(errno) = own_proc() {
        fail(plan, Step::Proc, errno);
    }
    let signals = match prepare_init() {
        Ok(signals) => signals,
        Err(errno) => fail(plan, Step::Fork, errno),
    };
    match spawn_command(plan) {
        Ok(pid) => run_init(plan, signals, pid),
        Err(errno) => fail(plan, Step::Fork, errno),
    }
}

/// Clones the command's process without a copy of this one's memory, which waits until it has executed the
/// command or has ended.
fn spawn_command(plan: &Plan<'_>) -> Result<pid_t, c_int> {
    let mut stack = Stack([MaybeUninit::uninit(); STACK_BYTES]);
    let top = stack.0.as_mut_ptr_range().end;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    let plan = ptr::from_ref(plan).cast_mut().cast::<c_void>();
    // SAFETY: the new process has the stack for itself, and stack and plan stay where they are: we go on
    // only when it uses neither any more. Nobody else runs in this memory.
    let pid = unsafe { libc::clone(enter_command, top.cast(), flags, plan) };
    check(pid).map(|()| pid)
}

/// For the command's process up to its execve.
#[repr(align(16))]
struct Stack([MaybeUninit<u8>; STACK_BYTES]);

extern "C" fn enter_command(plan: *mut c_void) -> c_int {
    let _guard = Guard;
    // SAFETY: it is the plan of `spawn_command`, which waits for us.
    run_command(unsafe { &*plan.cast::<Plan<'_>>() })
}

/// A signal that the agent ignores would be ignored by the command. By system call: the C library keeps
/// some signals to itself.
fn heed_signals(ignored: &[c_int]) {
    // The kernel's structure with room to spare; all zeroes is the default action, everywhere.
    let default = [0_u64; 8];
    for &signal in ignored {
        // SAFETY: the action is valid for the call.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                c_long::from(signal),
                default.as_ptr(),
                ptr::null_mut::<c_void>(),
                KERNEL_SIGSET_BYTES,
            );
        }
    }
}

/// The signals that this process ignores, for [`Plan::ignored`].
pub(super) fn ignored_signals() -> Vec<c_int> {
    let is_ignored = |signal: &c_int| {
        let mut action = [0_u64; 8];
        // SAFETY: the kernel's structure fits, and its first word is the handler; asking changes nothing.
        let asked = unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                c_long::from(*signal),
                ptr::null::<c_void>(),
                action.as_mut_ptr(),
                KERNEL_SIGSET_BYTES,
            )
        };
        let [handler, ..] = action;
        asked == 0 && usize::try_from(handler) == Ok(libc::SIG_IGN)
    };
    (1..=SIGNALS).filter(is_ignored).collect()
}

/// Closes every descriptor but those in `keep`, which is in ascending order.
fn close_all_but(keep: &[RawFd]) -> Result<(), c_int> {
    let mut first: RawFd = 0;
    for &kept in keep {
        if kept > first {
            close_range(first, kept.wrapping_sub(1))?;
        }
        first = kept.wrapping_add(1);
    }
    close_range(first, RawFd::MAX)
}

fn close_range(first: RawFd, last: RawFd) -> Result<(), c_int> {
    // SAFETY: this process owns all its descriptors; nothing uses the closed ones any more.
    check_long(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) })
}

/// Shows the new process namespace in `/proc`, without the rest of the guest seeing it.
fn own_proc() -> Result<(), c_int> {
    let none = ptr::null::<c_char>();
    let private = libc::MS_REC | libc::MS_PRIVATE;
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    let proc = c"proc".as_ptr();
    // SAFETY: all strings end with NUL and outlive the calls.
    unsafe {
        check(libc::mount(none, c"/".as_ptr(), none, private, ptr::null()))?;
        check(libc::mount(proc, c"/proc".as_ptr(), proc, flags, ptr::null()))
    }
}

/// Makes the descriptor that signals are read from.
fn prepare_init() -> Result<RawFd, c_int> {
    // SAFETY: the set is filled before its use; the name ends with NUL; a new session has no
    // condition here.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, c"matchlock-init".as_ptr());
        libc::setsid();
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        let signals = libc::signalfd(-1, &raw const all, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        check(signals)?;
        Ok(signals)
    }
}

// ---- the init ------------------------------------------------------------------------------

fn run_init(plan: &Plan<'_>, signals: RawFd, command: pid_t) -> ! {
    let mut keep = [plan.status, plan.control, signals];
    keep.sort_unstable();
    if close_all_but(&keep).is_err() {
        exit(FAILED);
    }
    let mut ready = [poll_in(plan.control), poll_in(signals)];
    loop {
        // SAFETY: the two entries are valid; all signals are blocked, so nothing interrupts it.
        let count = unsafe { libc::poll(ready.as_mut_ptr(), 2, -1) };
        if count < 0 && errno() != libc::EINTR {
            exit(FAILED);
        }
        pass_signals_of_the_namespace(signals, command);
        reap(plan.status, command);
        let [control, _] = &ready;
        if control.revents != 0 {
            pass_signals_of_the_agent(plan.control, command);
        }
    }
}

fn poll_in(fd: RawFd) -> libc::pollfd {
    libc::pollfd { fd, events: libc::POLLIN, revents: 0 }
}

fn pass_signals_of_the_namespace(signals: RawFd, command: pid_t) {
    loop {
        // SAFETY: the record is plain data, and the kernel writes whole records or none.
        let (record, count) = unsafe {
            let mut record: libc::signalfd_siginfo = std::mem::zeroed();
            let size = size_of::<libc::signalfd_siginfo>();
            let count = libc::read(signals, (&raw mut record).cast::<c_void>(), size);
            (record, count)
        };
        if count <= 0 {
            return;
        }
        let from_inside = record.ssi_pid != 0;
        if let Ok(signal) = c_int::try_from(record.ssi_signo)
            && signal != libc::SIGCHLD
            && from_inside
        {
            pass(command, signal);
        }
    }
}

fn pass_signals_of_the_agent(control: RawFd, command: pid_t) {
    let mut bytes = [0_u8; 64];
    // SAFETY: the buffer is as long as said. The pipe has bytes or is at its end.
    let count = unsafe { libc::read(control, bytes.as_mut_ptr().cast(), bytes.len()) };
    match usize::try_from(count) {
        // The agent is gone, and with it everyone who could want this command.
        Ok(0) => exit(0),
        Ok(count) => {
            for signal in bytes.iter().take(count) {
                pass(command, c_int::from(*signal));
            }
        }
        Err(_) if errno() == libc::EINTR => {}
        Err(_) => exit(FAILED),
    }
}

fn pass(command: pid_t, signal: c_int) {
    // SAFETY: signals only; the command was not reaped, so its id is still its own. Before the
    // command has made its session there is no group of its id.
    unsafe {
        if libc::kill(command.wrapping_neg(), signal) < 0 {
            libc::kill(command, signal);
        }
    }
}

/// Reaps what has ended. Ends the init with the command.
fn reap(status_pipe: RawFd, command: pid_t) {
    loop {
        let mut status: c_int = 0;
        // SAFETY: `status` is valid for the call.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        if pid <= 0 {
            return;
        }
        if pid == command {
            let bytes = status.to_ne_bytes();
            // SAFETY: the buffer is as long as said; the agent reads it after this process's end.
            unsafe { libc::write(status_pipe, bytes.as_ptr().cast(), bytes.len()) };
            exit(0);
        }
    }
}

// ---- the command ---------------------------------------------------------------------------

fn run_command(plan: &Plan<'_>) -> ! {
    if let Err(errno) = own_process(plan) {
        fail(plan, Step::Process, errno);
    }
    // As root, as containers do it: the directory need not be open to the user.
    if let Err(errno) = enter(plan.cwd) {
        fail(plan, Step::WorkingDirectory, errno);
    }
    if let Err(errno) = become_user(plan.identity) {
        fail(plan, Step::User, errno);
    }
    if let Err(errno) = unblock_signals() {
        fail(plan, Step::Process, errno);
    }
    let errno = execute(plan);
    fail(plan, Step::Exec, errno)
}

fn own_process(plan: &Plan<'_>) -> Result<(), c_int> {
    // SAFETY: descriptors of this process only, none of which is 0, 1 or 2 yet.
    unsafe {
        check(libc::setsid())?;
        check(libc::dup2(plan.stdin, libc::STDIN_FILENO))?;
        check(libc::dup2(plan.stdout, libc::STDOUT_FILENO))?;
        check(libc::dup2(plan.stderr, libc::STDERR_FILENO))?;
        if plan.terminal {
            // The new session has none yet; its only group is in the foreground then.
            check(libc::ioctl(libc::STDIN_FILENO, libc::TIOCSCTTY, ZERO))?;
        }
        libc::umask(0o022);
    }
    let keep = [libc::STDIN_FILENO, libc::STDOUT_FILENO, libc::STDERR_FILENO, plan.report];
    close_all_but(&keep)?;
    // SAFETY: the limits are valid for the call.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const plan.files) })?;
    reset_oom_score()
}

/// The agent is the last to be killed for memory; its commands are like any other process.
fn reset_oom_score() -> Result<(), c_int> {
    let path = c"/proc/self/oom_score_adj";
    // SAFETY: the path ends with NUL, the buffer is as long as said, the descriptor is ours.
    unsafe {
        let file = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        check(file)?;
        let written = libc::write(file, c"0".as_ptr().cast(), 1);
        let result = if written < 0 { Err(errno()) } else { Ok(()) };
        libc::close(file);
        result
    }
}

fn enter(cwd: &CStr) -> Result<(), c_int> {
    // SAFETY: the path ends with NUL.
    check(unsafe { libc::chdir(cwd.as_ptr()) })
}

/// By system call: the C library would try to do it for threads that are not here.
fn become_user(identity: &Identity) -> Result<(), c_int> {
    let (uid, gid) = (identity.uid, identity.gid);
    let groups = &identity.groups;
    // SAFETY: the list is as long as said.
    unsafe {
        check_long(libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()))?;
        check_long(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
        check_long(libc::syscall(libc::SYS_setresuid, uid, uid, uid))
    }
}

fn unblock_signals() -> Result<(), c_int> {
    // SAFETY: the set is made empty before its use.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        check(libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()))
    }
}

/// Executes the command, or returns why not.
fn execute(plan: &Plan<'_>) -> c_int {
    let Some(search) = plan.search else {
        return execute_one(plan, plan.name);
    };
    let mut refused = libc::ENOENT;
    for directory in search.split(|byte| *byte == b':') {
        let mut buffer = [0_u8; PATH_BYTES];
        let Some(path) = join(&mut buffer, directory, plan.name) else {
            continue;
        };
        // A look costs much less than an attempt, and most directories do not have it.
        if is_missing(path) {
            continue;
        }
        match execute_one(plan, path) {
            libc::ENOENT | libc::ENOTDIR => {}
            libc::EACCES => refused = libc::EACCES,
            other => return other,
        }
    }
    refused
}

fn is_missing(path: &CStr) -> bool {
    // SAFETY: the path ends with NUL.
    let looked = check(unsafe { libc::access(path.as_ptr(), libc::F_OK) });
    matches!(looked, Err(libc::ENOENT | libc::ENOTDIR))
}

fn execute_one(plan: &Plan<'_>, path: &CStr) -> c_int {
    // SAFETY: path and all arguments end with NUL, both lists with a null pointer.
    unsafe { libc::execve(path.as_ptr(), plan.argv.as_ptr(), plan.envp.as_ptr()) };
    errno()
}

/// `directory/name`, or `name` for an empty directory. `None` if it is too long for a path.
pub(super) fn join<'b>(
    buffer: &'b mut [u8; PATH_BYTES],
    directory: &[u8],
    name: &CStr,
) -> Option<&'b CStr> {
    let slash: &[u8] = if directory.is_empty() { b"" } else { b"/" };
    let parts = directory.iter().chain(slash).chain(name.to_bytes());
    let mut slots = buffer.iter_mut();
    for byte in parts {
        *slots.next()? = *byte;
    }
    *slots.next()? = 0;
    CStr::from_bytes_until_nul(buffer).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_joined_unless_they_are_too_long() {
        let mut buffer = [0; PATH_BYTES];
        let mut joined =
            |directory: &[u8], name: &CStr| join(&mut buffer, directory, name).map(CStr::to_owned);
        assert_eq!(joined(b"/bin", c"sh").as_deref(), Some(c"/bin/sh"));
        assert_eq!(joined(b"", c"sh").as_deref(), Some(c"sh"));
        let longest = vec![b'd'; PATH_BYTES - 4];
        let path = joined(&longest, c"sh").unwrap();
        assert_eq!(path.to_bytes_with_nul().len(), PATH_BYTES);
        assert!(path.to_bytes().ends_with(b"d/sh"));
        let mut longer = longest;
        longer.push(b'd');
        assert_eq!(joined(&longer, c"sh"), None);
    }
}
