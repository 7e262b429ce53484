//! A VM's files on a Linux filesystem.
//!
//! What makes files is not deferred to another thread: once its future is dropped, nothing is made.
//! Everything inside the VM's directory is reached through a descriptor of that directory, opened
//! without following a link in its place.
//!
//! mke2fs may outlive whoever started it: its owner is killed, or its own end takes time as the
//! kernel still writes for it. So the file that it works on is locked through a descriptor that it
//! inherits, and whoever removes the file waits for the lock first: a disk is gone only when its
//! maker is.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use async_trait::async_trait;
use matchlock_failpoints::{Area, Injected};
use matchlock_model::id::VmId;
use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;
use tokio::process::Command;
use tokio::task::spawn_blocking;
use tokio::time::Instant;

use super::{ObservedFiles, Rootfs, RootfsError, VmPaths};

/// The name of a disk that is being made.
const TEMPORARY_DISK: &str = "rootfs.ext4.tmp";

/// How long a removal waits for the end of the mke2fs that was making the disk. It has been killed,
/// or works on without an owner, which takes it well under a second.
const MAKER_LIMIT: Duration = Duration::from_secs(10);
const MAKER_POLL: Duration = Duration::from_millis(5);

/// How much of what mke2fs printed goes into an error.
const MAX_STDERR: usize = 1024;

/// What a crash may come between.
pub const POINTS: Area = Area::new(
    "rootfs",
    &[
        "make_dir",
        "make_logs",
        "make_sparse",
        "run_mke2fs",
        "rename_disk",
        "remove_disk",
        "remove_sockets",
        "remove_dir",
    ],
);

impl From<Injected> for RootfsError {
    fn from(injected: Injected) -> Self {
        Self::File { doing: "work on", path: PathBuf::new(), source: injected.into() }
    }
}

/// The files of VMs on this host.
#[derive(Debug, Clone, Copy, Default)]
pub struct LinuxRootfs;

impl LinuxRootfs {
    /// The files of VMs on this host.
    #[must_use]
    pub const fn new() -> Self {
        Self
    }
}

/// An operation on a path that failed.
fn failed(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> RootfsError {
    let path = path.into();
    move |source| RootfsError::File { doing, path, source }
}

/// The same for a bare errno.
fn refused(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(Errno) -> RootfsError {
    let failed = failed(doing, path);
    move |errno| failed(errno.into())
}

/// Opens a directory, never through a link in its place.
fn open_dir(at: impl std::os::fd::AsFd, name: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
    rustix::fs::openat(at, name, flags, Mode::empty())
}

/// The VM's directory; `None` when it is missing.
fn existing_dir(dir: &Path) -> Result<Option<OwnedFd>, RootfsError> {
    match open_dir(CWD, dir) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(refused("open the directory", dir)(errno)),
    }
}

/// Whether a name exists in a directory; a dangling link does.
fn is_there(dir: &OwnedFd, name: &Path) -> Result<bool, Errno> {
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// The last part of one of a VM's paths.
fn name_of(path: &Path) -> &Path {
    path.file_name().map_or(path, Path::new)
}

/// Makes a directory below `parent`, or takes the one that is there if it is ours.
fn make_dir(parent: &OwnedFd, path: &Path) -> Result<OwnedFd, RootfsError> {
    match rustix::fs::mkdirat(parent, name_of(path), Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(refused("create", path)(errno)),
    }
    let dir = open_dir(parent, name_of(path)).map_err(refused("open the directory", path))?;
    let found = rustix::fs::fstat(&dir).map_err(refused("look at", path))?;
    if found.st_uid != rustix::process::geteuid().as_raw() {
        let source = io::Error::new(io::ErrorKind::PermissionDenied, "it belongs to another user");
        return Err(failed("use", path)(source));
    }
    // The mode of mkdir is subject to the umask; that of an existing one may be anything.
    rustix::fs::fchmod(&dir, Mode::RWXU).map_err(refused("set the mode of", path))?;
    Ok(dir)
}

/// Makes the directory of all VMs, a VM's directory and its logs.
fn make_dirs(paths: &VmPaths) -> Result<(), RootfsError> {
    let vms = paths.dir.parent().unwrap_or(Path::new("/"));
    match rustix::fs::mkdir(vms, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(refused("create", vms)(errno)),
    }
    let vms = open_dir(CWD, vms).map_err(refused("open the directory", vms))?;
    POINTS.before("make_dir")?;
    let dir = make_dir(&vms, &paths.dir)?;
    POINTS.after("make_dir")?;
    POINTS.before("make_logs")?;
    make_dir(&dir, &paths.logs())?;
    Ok(POINTS.after("make_logs")?)
}

/// Removes a name from a directory and looks again.
fn remove_name(dir: &OwnedFd, path: &Path) -> Result<(), RootfsError> {
    match rustix::fs::unlinkat(dir, name_of(path), AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => return Err(refused("remove", path)(errno)),
    }
    if is_there(dir, name_of(path)).map_err(refused("look at", path))? {
        return Err(RootfsError::StillThere { path: path.to_owned() });
    }
    Ok(())
}

/// Removes names from a VM's directory; without the directory there are none.
fn remove_names(dir: &Path, paths: &[PathBuf]) -> Result<(), RootfsError> {
    let Some(fd) = existing_dir(dir)? else { return Ok(()) };
    paths.iter().try_for_each(|path| remove_name(&fd, path))
}

/// Waits until nothing makes a disk in this directory any more. Nobody is told when a lock is
/// released: it is looked at again and again.
async fn wait_for_maker(dir: &Path) -> Result<(), RootfsError> {
    let Some(fd) = existing_dir(dir)? else { return Ok(()) };
    let path = dir.join(TEMPORARY_DISK);
    // Not followed, and not opened for writing: whatever has this name is about to be removed.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let disk = match rustix::fs::openat(&fd, TEMPORARY_DISK, flags, Mode::empty()) {
        Ok(disk) => disk,
        // Nothing there; or a link or a socket, which no mke2fs works on.
        Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => return Ok(()),
        Err(errno) => return Err(refused("open", path)(errno)),
    };
    let limit = Instant::now() + MAKER_LIMIT;
    loop {
        match flock(&disk, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) if Instant::now() >= limit => {
                return Err(RootfsError::StillMade { path });
            }
            Err(Errno::WOULDBLOCK) => tokio::time::sleep(MAKER_POLL).await,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(refused("lock", path)(errno)),
        }
    }
}

/// Removes a whole tree, without following links in it, and looks again.
fn remove_tree(dir: &Path) -> Result<(), RootfsError> {
    // A link or a file in its place is not ours: refused, not removed.
    if existing_dir(dir)?.is_none() {
        return Ok(());
    }
    match std::fs::remove_dir_all(dir) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(failed("remove", dir)(source)),
    }
    match dir.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(failed("look at", dir)(source)),
        Ok(_) => Err(RootfsError::StillThere { path: dir.to_owned() }),
    }
}

/// Makes the sparse file that becomes the disk, locked for as long as the returned descriptor or a
/// copy of it is open.
fn make_sparse(dir: &OwnedFd, path: &Path, bytes: u64) -> Result<File, RootfsError> {
    remove_name(dir, path)?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(dir, name_of(path), flags, Mode::RUSR | Mode::WUSR)
        .map_err(refused("create", path))?;
    flock(&fd, FlockOperation::NonBlockingLockExclusive).map_err(refused("lock", path))?;
    let file = File::from(fd);
    file.set_len(bytes).map_err(failed("set the size of", path))?;
    Ok(file)
}

/// Finds mke2fs: `/usr/sbin` is not in every user's PATH.
fn find_mke2fs() -> Result<PathBuf, RootfsError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join("mke2fs"))
        .find(|program| program.is_absolute() && program.is_file())
        .ok_or(RootfsError::NoMke2fs)
}

/// Runs mke2fs on a file in `dir`. Dropping the future kills it; the file stays locked until it has
/// ended.
async fn run_mke2fs(
    program: &Path,
    dir: &OwnedFd,
    path: &Path,
    locked: File,
) -> Result<(), RootfsError> {
    // No journal: the disk does not outlive a crash of its guest. No blocks kept for growing: they
    // would cost 2.5 MB in each disk. The inode tables are holes, and
    // mke2fs marks them as zeroed after its discard, so the guest need not write them either.
    let child = Command::new(program)
        .args([
            "-q",
            "-F",
            "-t",
            "ext4",
            "-b",
            "4096",
            "-m",
            "0",
            "-O",
            "^has_journal,^resize_inode",
        ])
        .args(["-E", "lazy_itable_init=1,root_owner=0:0"])
        .arg(name_of(path))
        .current_dir(format!("/proc/self/fd/{}", dir.as_raw_fd()))
        .env("LC_ALL", "C")
        // It asks nothing; this is how it comes to hold the lock.
        .stdin(Stdio::from(locked))
        // A terminal's Ctrl-C is for us: what becomes of the disk is decided here.
        .process_group(0)
        .kill_on_drop(true)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed("run mke2fs on", path))?;
    // From here on it alone holds the lock.
    let output = child.wait_with_output().await.map_err(failed("wait for mke2fs on", path))?;
    if output.status.success() {
        return Ok(());
    }
    let start = output.stderr.len().saturating_sub(MAX_STDERR);
    let end = output.stderr.get(start..).unwrap_or_default();
    Err(RootfsError::Mke2fs {
        path: path.to_owned(),
        status: output.status.to_string(),
        stderr: String::from_utf8_lossy(end).trim().replace('\n', "; "),
    })
}

/// Runs a removal where it blocks nobody, as it may take long. One whose caller has gone runs to
/// its end all the same. What *makes* something does not run here: it could come after the
/// removal that its cancellation led to, and what it made would stay.
async fn blocking<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> Result<T, RootfsError> + Send + 'static,
) -> Result<T, RootfsError> {
    spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(failed("work on", path)(io::Error::other(error))))
}

/// What lies below `vms_dir`: VMs' directories, and what is none.
fn entries(vms_dir: &Path) -> Result<Vec<Result<VmId, PathBuf>>, RootfsError> {
    let entries = match std::fs::read_dir(vms_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(failed("list", vms_dir)(source)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed("list", vms_dir))?;
        let vm = entry.file_name().to_str().and_then(|name| name.parse().ok());
        match entry.file_type() {
            Ok(kind) => found.push(vm.filter(|_| kind.is_dir()).ok_or_else(|| entry.path())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(failed("look at", entry.path())(source)),
        }
    }
    Ok(found)
}

#[async_trait]
impl Rootfs for LinuxRootfs {
    async fn create_dir(&self, paths: &VmPaths) -> Result<(), RootfsError> {
        make_dirs(paths)
    }

    async fn create_disk(&self, paths: &VmPaths, size_mb: u64) -> Result<(), RootfsError> {
        let program = find_mke2fs()?;
        let temporary = paths.dir.join(TEMPORARY_DISK);
        let dir = open_dir(CWD, &paths.dir).map_err(refused("open the directory", &paths.dir))?;
        POINTS.before("make_sparse")?;
        let locked = make_sparse(&dir, &temporary, size_mb.saturating_mul(1024 * 1024))?;
        POINTS.after("make_sparse")?;
        POINTS.before("run_mke2fs")?;
        run_mke2fs(&program, &dir, &temporary, locked).await?;
        POINTS.after("run_mke2fs")?;
        POINTS.before("rename_disk")?;
        // Complete or absent: the disk gets its name when it is done.
        rustix::fs::renameat(&dir, TEMPORARY_DISK, &dir, name_of(&paths.rootfs()))
            .map_err(refused("rename", &temporary))?;
        Ok(POINTS.after("rename_disk")?)
    }

    async fn remove_disk(&self, paths: &VmPaths) -> Result<(), RootfsError> {
        wait_for_maker(&paths.dir).await?;
        let own = paths.clone();
        blocking(&paths.dir, move || {
            POINTS.before("remove_disk")?;
            remove_names(&own.dir, &[own.rootfs(), own.dir.join(TEMPORARY_DISK)])?;
            Ok(POINTS.after("remove_disk")?)
        })
        .await
    }

    async fn remove_sockets(&self, paths: &VmPaths) -> Result<(), RootfsError> {
        let own = paths.clone();
        blocking(&paths.dir, move || {
            POINTS.before("remove_sockets")?;
            remove_names(&own.dir, &own.sockets())?;
            Ok(POINTS.after("remove_sockets")?)
        })
        .await
    }

    async fn remove_dir(&self, paths: &VmPaths) -> Result<(), RootfsError> {
        wait_for_maker(&paths.dir).await?;
        let own = paths.clone();
        blocking(&paths.dir, move || {
            POINTS.before("remove_dir")?;
            remove_tree(&own.dir)?;
            Ok(POINTS.after("remove_dir")?)
        })
        .await
    }

    fn list_dirs(&self, vms_dir: &Path) -> Result<Vec<VmId>, RootfsError> {
        let mut found: Vec<VmId> = entries(vms_dir)?.into_iter().filter_map(Result::ok).collect();
        found.sort_unstable();
        Ok(found)
    }

    fn list_strangers(&self, vms_dir: &Path) -> Result<Vec<PathBuf>, RootfsError> {
        let mut found: Vec<_> = entries(vms_dir)?.into_iter().filter_map(Result::err).collect();
        found.sort_unstable();
        Ok(found)
    }

    fn observe(&self, paths: &VmPaths) -> Result<ObservedFiles, RootfsError> {
        let Some(dir) = existing_dir(&paths.dir)? else { return Ok(ObservedFiles::default()) };
        let there = |path: &Path| is_there(&dir, name_of(path)).map_err(refused("look at", path));
        let rootfs = there(&paths.rootfs())? || there(&paths.dir.join(TEMPORARY_DISK))?;
        let mut sockets = false;
        for socket in paths.sockets() {
            sockets |= there(&socket)?;
        }
        Ok(ObservedFiles { dir: true, rootfs, sockets })
    }
}
