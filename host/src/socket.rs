//! Unix sockets in directories of any depth.
//!
//! The address of a unix socket holds 107 bytes, and a state directory may lie deeper: sockets are
//! reached through an open descriptor of their directory, `/proc/self/fd/<n>/<name>`.
//!
//! # Invariants
//! 1. A listening socket has mode 0600; a leftover in its place is replaced.
//! 2. Their directories are ours alone (0700), so nobody puts anything in a socket's place.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use matchlock_failpoints::Area;
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use tokio::net::UnixStream;

/// What a crash may come between.
pub const POINTS: Area = Area::new("socket", &["bind", "mode"]);

fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(dir, flags, Mode::empty())?)
}

/// The path of `name` in an open directory, short enough for a socket's address. It is valid in
/// this process, while the descriptor is open.
#[must_use]
pub fn below(dir: BorrowedFd<'_>, name: &Path) -> PathBuf {
    Path::new(&format!("/proc/self/fd/{}", dir.as_raw_fd()))
        .join(name.file_name().unwrap_or_default())
}

/// Makes a socket at this path and listens on it. The listener is not blocking.
///
/// # Errors
/// When the directory cannot be opened or the socket cannot be made.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    let listener = listen_in(open_dir(path)?.as_fd(), path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Makes a socket of this path's name in an open directory and listens on it, blocking.
///
/// # Errors
/// When the socket cannot be made.
pub fn listen_in(dir: BorrowedFd<'_>, path: &Path) -> io::Result<UnixListener> {
    let name = path.file_name().unwrap_or_default();
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => return Err(errno.into()),
    }
    POINTS.before("bind")?;
    let listener = UnixListener::bind(below(dir, path))?;
    POINTS.after("bind")?;
    POINTS.before("mode")?;
    rustix::fs::chmodat(dir, name, Mode::RUSR | Mode::WUSR, AtFlags::empty())?;
    POINTS.after("mode")?;
    Ok(listener)
}

/// Connects to the socket at this path.
///
/// # Errors
/// When there is none, or nobody listens on it.
pub async fn connect(path: &Path) -> io::Result<UnixStream> {
    let dir = open_dir(path)?;
    UnixStream::connect(below(dir.as_fd(), path)).await
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[tokio::test]
    async fn sockets_may_lie_deeper_than_their_address_can_say() {
        let temp = tempfile::tempdir().unwrap();
        let deep = temp.path().join("d".repeat(200));
        std::fs::create_dir(&deep).unwrap();
        let path = deep.join("x.sock");
        for _ in 0..2 {
            let listener = listen(&path).unwrap();
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
            drop(connect(&path).await.unwrap());
            drop(listener);
        }
        assert!(connect(&path).await.is_err());
    }
}
