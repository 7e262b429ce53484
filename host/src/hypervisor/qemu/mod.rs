//! QEMU's `microvm`: with KVM where there is one, by translation (TCG) anywhere else.
//!
//! ```text
//!   launch:  bind + listen link.sock, qmp.sock ─► connect QMP ─► hypervisor.json ─► spawn QEMU
//!            (the listening descriptors go to QEMU, so a connection never comes too early)
//!   then:    task "follow"  reads QMP to its end ─┐
//!            and sends what we ask of QEMU   │
//!            task "watch"   waits for the process ┴─► MachineExit ─► everyone who waits
//! ```
//!
//! # Invariants
//! 1. Both sockets listen before QEMU exists: nobody polls for them, and a connection waits until
//!    QEMU serves it. When QEMU is gone, connections are refused.
//! 2. QEMU's working directory is the VM's directory, its file names are relative, and the
//!    directory is reached by descriptor: a long `$HOME` does not matter to socket names.
//! 3. Between the spawn and the return of `launch` nothing is awaited, so a cancelled launch
//!    leaves no process (see [`Spawner::spawn`]).
//!
//! # Failure
//! What QEMU itself finds wrong (no memory, a damaged kernel) shows in [`Machine::wait_exit`]. QMP
//! that fails costs the reason of the exit, not the machine. What a crash leaves is found by the
//! mark, the directory and `hypervisor.json`; QEMU itself dies with its parent.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net as unix;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use matchlock_failpoints::{Area, Injected};
use matchlock_model::identity::ProcessIdentity;
use rustix::fs::{Mode, OFlags};
use serde::Serialize;
use tokio::net::UnixStream;
use tokio::sync::{OnceCell, watch};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout;

use super::{
    ExitReason, Hypervisor, HypervisorError, Machine, MachineExit, MachineSpec, Saved, Start,
};
use crate::facts;
use crate::process::{Child, ChildSpec, Spawner};
use crate::socket;

mod command;
mod exit;
mod qmp;
mod save;

pub use command::Acceleration;

use command::{Wiring, arguments};
use exit::{Evidence, decide, tail};
use qmp::{Control, Shutdown};

/// The program.
const PROGRAM: &str = "qemu-system-x86_64";

/// The Debian package that holds it.
const PACKAGE: &str = "qemu-system-x86";

/// The environment variable that names another.
const PROGRAM_VARIABLE: &str = "MATCHLOCK_QEMU";

/// How long QMP is read on after the process has ended; its end is then already on its way.
const QMP_DRAIN: Duration = Duration::from_secs(2);

/// How many lines of a log are searched for the reason of an exit.
const EVIDENCE_LINES: usize = 400;

/// A file that a machine writes may be this large at least; see [`largest_file`].
const MIN_FILE_BYTES: u64 = 64 * 1024 * 1024;

/// What a crash may come between. After `spawn` the process runs and no row names it yet.
pub const POINTS: Area =
    Area::new("hypervisor", &["link_socket", "qmp_socket", "json", "spawn", "kill", "save"]);

impl From<Injected> for HypervisorError {
    fn from(injected: Injected) -> Self {
        Self::Io { doing: "launch or end QEMU".to_owned(), source: injected.into() }
    }
}

/// How QEMU is used.
#[derive(Debug, Clone, Default)]
pub struct QemuOptions {
    /// The program; otherwise `$MATCHLOCK_QEMU`, otherwise the one in `PATH`.
    pub program: Option<PathBuf>,
    /// How guests are run; otherwise by KVM if it works here.
    pub acceleration: Option<Acceleration>,
    /// The cache directory, for the measured speed of the TSC.
    pub cache: PathBuf,
}

/// Launches QEMU.
#[derive(Debug)]
pub struct Qemu {
    spawner: Spawner,
    program: Option<PathBuf>,
    acceleration: Acceleration,
    cache: PathBuf,
    tsc_khz: OnceCell<Option<u64>>,
}

impl Qemu {
    /// QEMU with these options; its processes die with this spawner.
    #[must_use]
    pub fn new(spawner: Spawner, options: QemuOptions) -> Self {
        let acceleration = options.acceleration.unwrap_or_else(|| match facts::kvm() {
            facts::Kvm::Usable => Acceleration::Kvm,
            facts::Kvm::Unusable(why) => {
                tracing::debug!(why, "no KVM: guests run by translation");
                Acceleration::Tcg
            }
        });
        Self {
            spawner,
            program: options.program.or_else(program_variable),
            acceleration,
            cache: options.cache,
            tsc_khz: OnceCell::new(),
        }
    }

    /// Measures what a launch needs to know (10 ms, once per boot). A launch does it itself;
    /// done before, beside something slow, it costs nothing.
    ///
    /// # Errors
    /// When it could not be measured.
    pub async fn calibrate(&self) -> Result<(), HypervisorError> {
        self.tsc_khz().await.map(drop)
    }

    async fn tsc_khz(&self) -> Result<Option<u64>, HypervisorError> {
        if self.acceleration == Acceleration::Kvm {
            return Ok(None);
        }
        let measured = self.tsc_khz.get_or_try_init(|| facts::tsc_khz(&self.cache)).await;
        measured.copied().map_err(|error| HypervisorError::Io {
            doing: "measure the speed of the time stamp counter".to_owned(),
            source: io::Error::other(error),
        })
    }

    /// The program that would be used here without options, as an absolute path.
    ///
    /// # Errors
    /// When there is none.
    pub fn installed() -> Result<PathBuf, HypervisorError> {
        find_program(program_variable().as_deref())
    }

    /// The program as an absolute path.
    fn find_program(&self) -> Result<PathBuf, HypervisorError> {
        find_program(self.program.as_deref())
    }
}

/// The program that the environment names.
fn program_variable() -> Option<PathBuf> {
    std::env::var_os(PROGRAM_VARIABLE).filter(|name| !name.is_empty()).map(PathBuf::from)
}

/// This program, or QEMU, as an absolute path.
fn find_program(named: Option<&Path>) -> Result<PathBuf, HypervisorError> {
    let wanted = named.unwrap_or(Path::new(PROGRAM));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let candidates: Vec<PathBuf> = if wanted.components().count() > 1 {
        vec![wanted.to_owned()]
    } else {
        std::env::split_paths(&path)
            .filter(|dir| dir.is_absolute())
            .map(|dir| dir.join(wanted))
            .collect()
    };
    candidates
        .into_iter()
        .filter(|file| file.is_file())
        .find(|file| rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok())
        .and_then(|file| std::path::absolute(file).ok())
        .ok_or_else(|| HypervisorError::NotInstalled {
            program: wanted.display().to_string(),
            package: PACKAGE,
            variable: PROGRAM_VARIABLE,
        })
}

#[async_trait]
impl Hypervisor for Qemu {
    fn backend(&self) -> &'static str {
        "qemu"
    }

    fn acceleration(&self) -> &'static str {
        self.acceleration.name()
    }

    fn check(&self) -> Result<(), HypervisorError> {
        self.find_program().map(drop)
    }

    async fn fingerprint(&self, spec: &MachineSpec) -> Result<String, HypervisorError> {
        let tsc_khz = self.tsc_khz().await?;
        save::fingerprint(&self.find_program()?, spec, self.acceleration, tsc_khz)
    }

    async fn launch(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>, HypervisorError> {
        let program = self.find_program()?;
        let tsc_khz = self.tsc_khz().await?;
        // Quick, and not on another thread: given up, it must not go on and replace the sockets
        // of the next launch.
        let prepared = prepare(spec, program, self.acceleration, tsc_khz)?;
        let qmp = UnixStream::from_std(prepared.qmp).map_err(failed("use qmp.sock"))?;
        POINTS.before("spawn")?;
        let child = self.spawner.spawn(prepared.child).await?;
        // No await from here on.
        let machine = QemuMachine::start(child, prepared.dir, qmp);
        if let Err(injected) = POINTS.after("spawn") {
            machine.child.send_kill()?;
            return Err(injected.into());
        }
        Ok(Arc::new(machine))
    }
}

/// What a launch makes before it spawns.
struct Prepared {
    dir: OwnedFd,
    qmp: unix::UnixStream,
    child: ChildSpec,
}

/// An I/O error while doing this.
fn failed(doing: impl Into<String>) -> impl FnOnce(io::Error) -> HypervisorError {
    let doing = doing.into();
    move |source| HypervisorError::Io { doing, source }
}

/// Makes the sockets, the log and `hypervisor.json`, and puts the command together.
fn prepare(
    spec: &MachineSpec,
    program: PathBuf,
    acceleration: Acceleration,
    tsc_khz: Option<u64>,
) -> Result<Prepared, HypervisorError> {
    let paths = &spec.paths;
    let base_disk = std::path::absolute(&spec.base_disk).map_err(failed("find the base disk"))?;
    readable("guest kernel", &spec.kernel)?;
    readable("initramfs", &spec.initramfs)?;
    readable("base disk", &base_disk)?;
    let disk_bytes = readable("writable disk", &paths.rootfs())?;

    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = rustix::fs::open(&paths.dir, flags, Mode::empty())
        .map_err(|errno| failed(format!("open {}", paths.dir.display()))(errno.into()))?;
    POINTS.before("link_socket")?;
    let link = listen(&dir, &paths.link_socket())?;
    POINTS.after("link_socket")?;
    POINTS.before("qmp_socket")?;
    let qmp_listener = listen(&dir, &paths.qmp_socket())?;
    POINTS.after("qmp_socket")?;
    // Queued until QEMU serves it; refused by the kernel if QEMU never does.
    let qmp = unix::UnixStream::connect(socket::below(dir.as_fd(), &paths.qmp_socket()))
        .and_then(|stream| stream.set_nonblocking(true).map(|()| stream))
        .map_err(failed("connect to qmp.sock"))?;

    // A descriptor of the child's own: the caller may close its one at any moment.
    let tap = spec.nic.as_ref().map(|nic| nic.tap.try_clone()).transpose();
    let tap = tap.map_err(failed("hand the TAP over"))?;
    let firewall = spec.nic.as_ref().and_then(|nic| nic.firewall.as_ref());
    let firewall = firewall.map(|tables| tables.keeper()).transpose();
    let firewall = firewall.map_err(failed("hand the firewall's socket over"))?.flatten();
    let memory = match &spec.start {
        Start::Boot | Start::Hold => None,
        Start::Restore(memory) => {
            Some(OwnedFd::from(memory.try_clone().map_err(failed("hand the saved memory over"))?))
        }
    };
    let wiring = Wiring {
        acceleration,
        tsc_khz,
        link: link.as_raw_fd(),
        qmp: qmp_listener.as_raw_fd(),
        tap: tap.as_ref().map(AsRawFd::as_raw_fd),
        memory: memory.as_ref().map(AsRawFd::as_raw_fd),
    };
    let args = arguments(spec, &base_disk, &wiring);
    let log = open_log(&dir)?;
    // A descriptor of the spawner's own: given up, the launch closes ours at any moment.
    let cwd_fd = dir.try_clone().map_err(failed("keep the VM's directory open"))?;
    POINTS.before("json")?;
    write_json(&dir, spec, acceleration, &program, &args)?;
    POINTS.after("json")?;
    let child = ChildSpec {
        program,
        args,
        env: vec![("PATH".into(), "/usr/bin:/bin".into()), ("LC_ALL".into(), "C".into())],
        cwd: format!("/proc/self/fd/{}", cwd_fd.as_raw_fd()).into(),
        cwd_fd: Some(cwd_fd),
        log,
        inherit: [link.into(), qmp_listener.into()]
            .into_iter()
            .chain(tap)
            .chain(firewall)
            .chain(memory)
            .collect(),
        max_file_bytes: Some(largest_file(disk_bytes)),
    };
    Ok(Prepared { dir, qmp, child })
}

/// The largest file that the machine may write. A guest can print to its console without end:
/// what it fills of the host's disk is at most once more what it was given anyway.
fn largest_file(disk_bytes: u64) -> u64 {
    disk_bytes.max(MIN_FILE_BYTES)
}

/// Checks that a file can be read, and says how large it is.
fn readable(what: &'static str, path: &Path) -> Result<u64, HypervisorError> {
    File::open(path)
        .and_then(|file| file.metadata())
        .map(|found| found.len())
        .map_err(|source| HypervisorError::File { what, path: path.to_owned(), source })
}

/// Makes a socket in the VM's directory and listens on it.
fn listen(dir: &OwnedFd, path: &Path) -> Result<unix::UnixListener, HypervisorError> {
    socket::listen_in(dir.as_fd(), path).map_err(failed(format!("listen on {}", path.display())))
}

/// Opens the log of what QEMU prints.
fn open_log(dir: &OwnedFd) -> Result<File, HypervisorError> {
    let flags =
        OFlags::CREATE | OFlags::APPEND | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, LOG, flags, Mode::RUSR | Mode::WUSR)
        .map(File::from)
        .map_err(|errno| failed(format!("open {LOG}"))(errno.into()))
}

/// What QEMU prints, in the VM's directory; see [`crate::rootfs::VmPaths::hypervisor_log`].
const LOG: &str = "logs/hypervisor.log";

/// The guest's console, in the VM's directory; see [`crate::rootfs::VmPaths::console_log`].
const CONSOLE: &str = "logs/console.log";

/// How a hypervisor was launched, for people and for whoever finds what a crash left.
#[derive(Serialize)]
struct LaunchRecord<'a> {
    format: u32,
    backend: &'a str,
    acceleration: &'a str,
    mark: String,
    argv: Vec<std::borrow::Cow<'a, str>>,
}

/// Writes `hypervisor.json`, complete or not at all.
fn write_json(
    dir: &OwnedFd,
    spec: &MachineSpec,
    acceleration: Acceleration,
    program: &Path,
    args: &[std::ffi::OsString],
) -> Result<(), HypervisorError> {
    let record = LaunchRecord {
        format: 1,
        backend: "qemu",
        acceleration: acceleration.name(),
        mark: spec.mark.to_string(),
        argv: std::iter::once(program.as_os_str())
            .chain(args.iter().map(AsRef::as_ref))
            .map(std::ffi::OsStr::to_string_lossy)
            .collect(),
    };
    let path = spec.paths.hypervisor_json();
    let name = path.file_name().unwrap_or_default();
    let temporary = "hypervisor.json.tmp";
    let flags =
        OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let written = || -> io::Result<()> {
        let fd = rustix::fs::openat(dir, temporary, flags, Mode::RUSR | Mode::WUSR)?;
        let mut text = serde_json::to_vec_pretty(&record)?;
        text.push(b'\n');
        File::from(fd).write_all(&text)?;
        Ok(rustix::fs::renameat(dir, temporary, dir, name)?)
    };
    written().map_err(failed(format!("write {}", path.display())))
}

/// A QEMU that was launched.
#[derive(Debug)]
struct QemuMachine {
    child: Child,
    dir: Arc<OwnedFd>,
    killed: Arc<AtomicBool>,
    exit: watch::Receiver<Option<MachineExit>>,
    control: Control,
}

impl QemuMachine {
    /// Begins to watch a QEMU. The tasks end with it.
    fn start(child: Child, dir: OwnedFd, qmp: UnixStream) -> Self {
        let (dir, killed) = (Arc::new(dir), Arc::new(AtomicBool::new(false)));
        let (sender, exit) = watch::channel(None);
        let (control, asked) = Control::new();
        let follow = tokio::spawn(qmp::follow(qmp, asked));
        let watched = (child.clone(), Arc::clone(&dir), Arc::clone(&killed));
        tokio::spawn(async move {
            let (child, dir, killed) = watched;
            sender.send_replace(Some(watch_exit(&child, &dir, &killed, follow).await));
        });
        Self { child, dir, killed, exit, control }
    }
}

/// Waits until QEMU has ended and says why.
async fn watch_exit(
    child: &Child,
    dir: &Arc<OwnedFd>,
    killed: &AtomicBool,
    mut follow: JoinHandle<Option<Shutdown>>,
) -> MachineExit {
    let status = child.wait().await;
    let killed = killed.load(Ordering::Acquire);
    // The process is gone, so QMP's last words are in the socket already.
    let shutdown = match timeout(QMP_DRAIN, &mut follow).await {
        Ok(Ok(shutdown)) => shutdown,
        Ok(Err(error)) => {
            tracing::error!(%error, "the reader of QMP failed");
            None
        }
        Err(_) => {
            follow.abort();
            tracing::warn!("QMP did not end with its process");
            None
        }
    };
    let dir = Arc::clone(dir);
    let logs = spawn_blocking(move || (read_tail(&dir, CONSOLE), read_tail(&dir, LOG))).await;
    let (console, log) = logs.unwrap_or_default();
    decide(&Evidence { status, killed, shutdown, console, log })
}

/// The end of a log as evidence. An unreadable one is none.
fn read_tail(dir: &OwnedFd, name: &str) -> Vec<String> {
    tail(dir, Path::new(name), EVIDENCE_LINES).unwrap_or_else(|error| {
        tracing::warn!(name, %error, "could not read a log of a machine that has ended");
        Vec::new()
    })
}

#[async_trait]
impl Machine for QemuMachine {
    fn identity(&self) -> ProcessIdentity {
        self.child.identity().clone()
    }

    async fn open_link(&self) -> Result<UnixStream, HypervisorError> {
        UnixStream::connect(socket::below(self.dir.as_fd(), Path::new("link.sock")))
            .await
            .map_err(failed("connect to the machine's link.sock"))
    }

    async fn wait_exit(&self) -> MachineExit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await.map(|exit| exit.clone()) {
            Ok(Some(exit)) => exit,
            // The task that watches was ended with its runtime, or failed.
            Ok(None) | Err(_) => MachineExit {
                reason: ExitReason::Died("nobody watched it end".to_owned()),
                status: self.child.wait().await.to_string(),
            },
        }
    }

    async fn kill(&self, deadline: Duration) -> Result<(), HypervisorError> {
        self.killed.store(true, Ordering::Release);
        POINTS.before("kill")?;
        self.child.kill(deadline).await?;
        Ok(POINTS.after("kill")?)
    }

    async fn save(&self, to: File) -> Result<Saved, HypervisorError> {
        POINTS.before("save")?;
        let saved = save::save(&self.control, to).await?;
        POINTS.after("save")?;
        Ok(saved)
    }

    fn console_tail(&self, max_lines: usize) -> Result<Vec<String>, HypervisorError> {
        tail(&self.dir, Path::new(CONSOLE), max_lines).map_err(failed("read the guest's console"))
    }
}
