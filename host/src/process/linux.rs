//! Processes through `/proc` and pidfds.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use matchlock_failpoints::{Area, Injected};
use matchlock_model::id::Mark;
use matchlock_model::identity::{Namespaces, ProcessIdentity};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use super::namespaces::{self, device_and_inode};
use super::{CpuShare, MarkedProcess, NamespaceSighting, ProcessError, Processes};

/// The number of SIGKILL, for messages.
const SIGKILL: i32 = 9;

/// What a crash may come between.
pub const POINTS: Area = Area::new("process", &["kill"]);

impl From<Injected> for ProcessError {
    fn from(injected: Injected) -> Self {
        Self::List(injected.into())
    }
}

/// The processes of this host.
#[derive(Debug, Clone)]
pub struct LinuxProcesses {
    boot_id: String,
}

/// The inode of the first pid namespace: the kernel gives it a fixed number.
const FIRST_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

impl LinuxProcesses {
    /// Reads the boot id; it does not change while we run.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn new() -> Result<Self, ProcessError> {
        Ok(Self { boot_id: boot_id().map_err(ProcessError::List)? })
    }

    /// The identity of the process that has this pid now, zombie or not; `None` when there is
    /// none.
    fn identity_of(&self, pid: i32) -> Result<Option<(ProcessIdentity, Stat)>, ProcessError> {
        let stat = read_stat(pid).map_err(|source| ProcessError::Look { pid, source })?;
        Ok(stat.map(|stat| {
            let start_ticks = stat.start_ticks;
            (ProcessIdentity { pid, start_ticks, boot_id: self.boot_id.clone() }, stat)
        }))
    }

    /// A descriptor of exactly this process; `None` when it is gone.
    pub(crate) fn open_exactly(
        &self,
        identity: &ProcessIdentity,
    ) -> Result<Option<OwnedFd>, ProcessError> {
        let pid = identity.pid;
        if !self.is_alive(identity)? {
            return Ok(None);
        }
        let look = |source| ProcessError::Look { pid, source };
        let raw = Pid::from_raw(pid).ok_or_else(|| look(io::ErrorKind::InvalidInput.into()))?;
        let pidfd = match pidfd_open(raw, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(Errno::SRCH) => return Ok(None),
            // The kernel says EINVAL for a thread's id: then our process is gone.
            Err(errno) if self.is_alive(identity)? => return Err(look(errno.into())),
            Err(_) => return Ok(None),
        };
        // From here on the descriptor names one process. Is it the one that was meant?
        Ok(self.is_alive(identity)?.then_some(pidfd))
    }

    /// What a process shows if it carries a mark; `None` when it does not, or ends meanwhile.
    fn marked(&self, pid: i32) -> Result<Option<MarkedProcess>, ProcessError> {
        let Some((identity, _)) = self.identity_of(pid)? else { return Ok(None) };
        let Some(argv) = read_argv(pid)? else { return Ok(None) };
        let Some(mark) = mark_in(&argv) else { return Ok(None) };
        let cwd = read_cwd(pid);
        // Everything was read by pid: it counts only if the pid meant one process all the time.
        match self.identity_of(pid)? {
            Some((again, stat)) if again == identity && !stat.is_over() => {
                Ok(Some(MarkedProcess { identity, mark, cwd }))
            }
            _ => Ok(None),
        }
    }
}

/// The kernel's boot id.
pub(crate) fn boot_id() -> io::Result<String> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(text.trim().to_owned())
}

/// The identity of a child that was not reaped yet, so that its pid cannot mean another.
pub(super) fn identity_of_child(pid: i32) -> io::Result<ProcessIdentity> {
    let stat = read_stat(pid)?.ok_or(io::ErrorKind::NotFound)?;
    Ok(ProcessIdentity { pid, start_ticks: stat.start_ticks, boot_id: boot_id()? })
}

/// What we use of `/proc/<pid>/stat`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    state: u8,
    start_ticks: u64,
}

impl Stat {
    /// Reads the fields behind the command name, which may itself hold spaces and brackets.
    fn parse(text: &str) -> Option<Self> {
        let (_, fields) = text.rsplit_once(')')?;
        let mut fields = fields.split_ascii_whitespace();
        let state = *fields.next()?.as_bytes().first()?;
        // State is field 3, the start time field 22: 18 lie between them.
        let start_ticks = fields.nth(18)?.parse().ok()?;
        Some(Self { state, start_ticks })
    }

    /// Whether it has ended and only waits for its parent.
    const fn is_over(self) -> bool {
        matches!(self.state, b'Z' | b'X' | b'x')
    }
}

/// Whether an error of `/proc/<pid>` says that the process is gone.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// Reads a process's state; `None` when it does not exist.
///
/// A `/proc` that hides processes (`hidepid`) or is not mounted says ENOENT too, so the kernel is
/// asked a second way before "gone" is believed.
fn read_stat(pid: i32) -> io::Result<Option<Stat>> {
    let Some(checked) = (pid > 0).then(|| Pid::from_raw(pid)).flatten() else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a pid"));
    };
    // Twice, because a process may begin between the two questions.
    for _ in 0..2 {
        match fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(text) => {
                let damaged = || io::Error::new(io::ErrorKind::InvalidData, text.clone());
                return Stat::parse(&text).map(Some).ok_or_else(damaged);
            }
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
        match rustix::process::test_kill_process(checked) {
            Err(Errno::SRCH) => return Ok(None),
            Ok(()) | Err(Errno::PERM) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(io::Error::new(io::ErrorKind::PermissionDenied, "it exists, but /proc does not show it"))
}

/// Adds up what the kernel's scheduler counted for each thread; one that ended meanwhile is left out.
fn read_cpu_share(pid: i32) -> io::Result<CpuShare> {
    let mut share = CpuShare::default();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = match fs::read_to_string(thread?.path().join("schedstat")) {
            Ok(text) => text,
            Err(error) if is_gone(&error) => continue,
            Err(error) => return Err(error),
        };
        let mut fields = text.split_ascii_whitespace().map(str::parse);
        let (Some(Ok(had)), Some(Ok(waited))) = (fields.next(), fields.next()) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        };
        share.had += Duration::from_nanos(had);
        share.waited += Duration::from_nanos(waited);
    }
    Ok(share)
}

/// Reads a process's argv; `None` when it is gone, or is another user's and hidden from us.
///
/// A hypervisor of ours runs as our user, so one that `hidepid` hides cannot be ours. A process
/// of our own user that cannot be read is an error.
fn read_argv(pid: i32) -> Result<Option<Vec<u8>>, ProcessError> {
    match fs::read(format!("/proc/{pid}/cmdline")) {
        Ok(argv) => Ok(Some(argv)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(source) => match fs::metadata(format!("/proc/{pid}")) {
            Ok(entry) if entry.uid() == rustix::process::geteuid().as_raw() => {
                Err(ProcessError::Look { pid, source })
            }
            Ok(_) => Ok(None),
            Err(error) if is_gone(&error) => Ok(None),
            Err(source) => Err(ProcessError::Look { pid, source }),
        },
    }
}

/// A process's working directory, if it may be read.
fn read_cwd(pid: i32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/cwd")).ok()
}

/// The mark that an argv carries as the value of `-name` or `--id`. A mark anywhere else (a
/// person's `grep`, our own `gc`) marks nothing.
fn mark_in(argv: &[u8]) -> Option<Mark> {
    let mut named = false;
    for argument in argv.split(|byte| *byte == 0).skip(1) {
        let Ok(argument) = std::str::from_utf8(argument) else {
            named = false;
            continue;
        };
        let value = argument
            .split_once('=')
            .filter(|(name, _)| is_naming(name))
            .map_or_else(|| named.then_some(argument), |(_, value)| Some(value));
        let mark = value.and_then(|value| {
            value
                .split(',')
                .find_map(|part| Mark::parse(part.strip_prefix("guest=").unwrap_or(part)))
        });
        if mark.is_some() {
            return mark;
        }
        named = is_naming(argument);
    }
    None
}

/// Whether this option's value is a hypervisor's name.
fn is_naming(option: &str) -> bool {
    matches!(option, "-name" | "--name" | "-id" | "--id")
}

/// `device:inode` of a namespace of this process.
fn namespace(name: &str) -> Result<String, ProcessError> {
    let entry = fs::metadata(format!("/proc/self/ns/{name}")).map_err(ProcessError::List)?;
    Ok(device_and_inode(&entry))
}

/// The processes that can be seen from here.
fn pids() -> Result<Vec<i32>, ProcessError> {
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc").map_err(ProcessError::List)? {
        let name = entry.map_err(ProcessError::List)?.file_name();
        pids.extend(name.to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    Ok(pids)
}

/// Waits until the process behind a pidfd has ended.
pub(super) async fn wait_ended(pidfd: OwnedFd) -> io::Result<()> {
    // SAFETY: an `OwnedFd` owns its descriptor and always names the same one.
    let pidfd = unsafe { AsyncFd::register(pidfd) }?;
    // A pidfd becomes readable when the process has ended, and stays so.
    drop(pidfd.readable().await?);
    Ok(())
}

#[async_trait]
impl Processes for LinuxProcesses {
    fn own_identity(&self) -> Result<ProcessIdentity, ProcessError> {
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let missing = || ProcessError::Look { pid, source: io::ErrorKind::NotFound.into() };
        self.identity_of(pid)?.map(|(identity, _)| identity).ok_or_else(missing)
    }

    fn own_namespaces(&self) -> Result<Namespaces, ProcessError> {
        Ok(Namespaces { net: namespace("net")?, pid: namespace("pid")? })
    }

    fn sees_all_processes(&self) -> Result<bool, ProcessError> {
        let own = fs::metadata("/proc/self/ns/pid").map_err(ProcessError::List)?;
        Ok(own.ino() == FIRST_PID_NAMESPACE)
    }

    fn look_for_network_namespace(
        &self,
        namespace: &str,
    ) -> Result<NamespaceSighting, ProcessError> {
        if !self.sees_all_processes()? {
            return Ok(NamespaceSighting::There);
        }
        namespaces::look_for(namespace, pids()?)
    }

    fn is_alive(&self, identity: &ProcessIdentity) -> Result<bool, ProcessError> {
        if identity.boot_id != self.boot_id {
            return Ok(false);
        }
        Ok(self
            .identity_of(identity.pid)?
            .is_some_and(|(now, stat)| now == *identity && !stat.is_over()))
    }

    fn cpu_share(&self, identity: &ProcessIdentity) -> Result<Option<CpuShare>, ProcessError> {
        let pid = identity.pid;
        if !self.is_alive(identity)? {
            return Ok(None);
        }
        let share = read_cpu_share(pid);
        // It was read by pid: it counts only if the pid meant this process all the time.
        if !self.is_alive(identity)? {
            return Ok(None);
        }
        share.map(Some).map_err(|source| ProcessError::Look { pid, source })
    }

    fn find_marked(&self) -> Result<Vec<MarkedProcess>, ProcessError> {
        let mut found = Vec::new();
        for pid in pids()? {
            found.extend(self.marked(pid)?);
        }
        Ok(found)
    }

    async fn kill(
        &self,
        identity: &ProcessIdentity,
        deadline: Duration,
    ) -> Result<(), ProcessError> {
        let pid = identity.pid;
        let look = |source| ProcessError::Look { pid, source };
        let Some(pidfd) = self.open_exactly(identity)? else { return Ok(()) };
        POINTS.before("kill")?;
        match pidfd_send_signal(&pidfd, Signal::KILL) {
            Ok(()) => {}
            Err(Errno::SRCH) => return Ok(()),
            Err(errno) => {
                return Err(ProcessError::Signal { pid, signal: SIGKILL, source: errno.into() });
            }
        }
        match timeout(deadline, wait_ended(pidfd)).await {
            Ok(ended) => {
                ended.map_err(look)?;
                Ok(POINTS.after("kill")?)
            }
            Err(_) => Err(ProcessError::WillNotDie { pid, waited: deadline }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argv(arguments: &[&str]) -> Vec<u8> {
        arguments.iter().flat_map(|text| text.bytes().chain([0])).collect()
    }

    const MARK: &str = "matchlock:0011223344556677:vm-0badcafe";

    #[test]
    fn a_command_name_may_hold_anything() {
        let rest = (4..=21).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        for name in ["sleep", "a b", "x) R 1", "((", ") Z 1 2 3"] {
            let stat = Stat::parse(&format!("17 ({name}) S {rest} 4711 23 24"));
            assert_eq!(stat, Some(Stat { state: b'S', start_ticks: 4711 }), "{name:?}");
        }
        assert_eq!(Stat::parse("17 (cut) S 1 2"), None);
    }

    #[test]
    fn only_the_value_of_a_name_is_a_mark() {
        let mark = Mark::parse(MARK);
        assert!(mark.is_some());
        assert_eq!(mark_in(&argv(&["qemu", "-name", MARK, "-m", "1"])), mark);
        assert_eq!(mark_in(&argv(&["qemu", "-name", &format!("guest={MARK},process=x")])), mark);
        assert_eq!(mark_in(&argv(&["firecracker", "--id", MARK])), mark);
        assert_eq!(mark_in(&argv(&["firecracker", &format!("--id={MARK}")])), mark);
        assert_eq!(mark_in(&argv(&["grep", MARK])), None);
        assert_eq!(mark_in(&argv(&["qemu", "-append", MARK])), None);
        assert_eq!(mark_in(&argv(&["qemu", "-name", "matchlock:short:vm-1"])), None);
        assert_eq!(mark_in(&argv(&[MARK])), None);
        assert_eq!(mark_in(&[]), None);
    }
}
