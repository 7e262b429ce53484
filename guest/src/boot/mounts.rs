//! The file systems of a running guest.
//!
//! They are mounted in the initramfs and move into the guest's root as they are.
//!
//! # Invariants
//! 1. A mount point that the image does not have is made in the writable layer; something else in
//!    its place is removed there.
//! 2. Without `/proc`, `/sys` and `/dev` the guest does not start; without the others it does, and
//!    says so.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};

use super::{BootError, console};

/// One file system to mount.
#[derive(Debug, Clone, Copy)]
pub struct Mount<'a> {
    /// What is mounted.
    pub source: &'a str,
    /// Where.
    pub target: &'a str,
    /// The kind of file system.
    pub kind: &'a str,
    /// The flags.
    pub flags: MsFlags,
    /// The options of the file system itself.
    pub data: Option<&'a str>,
}

const SAFE: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
const SAFEST: MsFlags = SAFE.union(MsFlags::MS_NOEXEC);

/// The same words as source and kind.
const fn plain<'a>(
    kind: &'a str,
    target: &'a str,
    flags: MsFlags,
    data: Option<&'a str>,
) -> Mount<'a> {
    Mount { source: kind, target, kind, flags, data }
}

/// What nothing works without, in the initramfs and in the guest's root.
const NEEDED: [Mount<'_>; 3] = [
    plain("proc", "/proc", SAFEST, None),
    plain("sysfs", "/sys", SAFEST, None),
    plain("devtmpfs", "/dev", MsFlags::MS_NOSUID, Some("mode=0755")),
];

/// Where the control groups are.
pub const CGROUPS: &str = "/sys/fs/cgroup";

/// The mounts that others are below, and whether the guest starts without.
const TOPS: [(&str, bool); 5] =
    [("/proc", false), ("/sys", false), ("/dev", false), ("/run", true), ("/tmp", true)];

const USUAL: [Mount<'_>; 6] = [
    plain(
        "devpts",
        "/dev/pts",
        MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        Some("gid=5,mode=620,ptmxmode=666"),
    ),
    plain("tmpfs", "/dev/shm", SAFE, Some("mode=1777")),
    plain("mqueue", "/dev/mqueue", SAFEST, None),
    plain("tmpfs", "/run", SAFE, Some("mode=0755")),
    plain("tmpfs", "/tmp", SAFE, Some("mode=1777")),
    plain("cgroup2", CGROUPS, SAFEST, None),
];

const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Mounts what is needed to find anything at all.
///
/// # Errors
/// When one cannot be mounted.
pub fn mount_needed() -> Result<(), BootError> {
    for mount in &NEEDED {
        make_directory(Path::new(mount.target))?;
        mount_one(mount)?;
    }
    Ok(())
}

/// Mounts the rest of what a program may expect; what cannot be mounted is a line on the console.
pub fn mount_usual() {
    for mount in &USUAL {
        let result = match mount.target {
            // The kernel makes this one, or has no control groups.
            CGROUPS => Ok(()),
            target => make_directory(Path::new(target)),
        };
        if let Err(error) = result.and_then(|()| mount_one(mount)) {
            console::failure("warning", &error);
        }
    }
    for (target, link) in LINKS {
        match symlink(target, link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                console::line(format_args!("warning: cannot make {link}: {error}"));
            }
            _ => {}
        }
    }
}

/// Moves all of them below another root.
///
/// # Errors
/// When one that is needed cannot be moved.
pub fn move_all(root: &Path) -> Result<(), BootError> {
    for (target, is_optional) in TOPS {
        let place = root.join(target.trim_start_matches('/'));
        let moved = make_directory(&place).and_then(|()| {
            mount(Some(target), &place, None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(
                |errno| BootError::Mount {
                    target: place,
                    kind: target.to_owned(),
                    source: errno.into(),
                },
            )
        });
        match moved {
            // It was not mounted, and that was said.
            Err(error) if is_optional => console::failure("warning", &error),
            moved => moved?,
        }
    }
    Ok(())
}

/// Mounts one file system on a directory that is there.
///
/// # Errors
/// When the kernel refuses.
pub fn mount_one(what: &Mount<'_>) -> Result<(), BootError> {
    mount(Some(what.source), what.target, Some(what.kind), what.flags, what.data).map_err(|errno| {
        BootError::Mount {
            target: PathBuf::from(what.target),
            kind: what.kind.to_owned(),
            source: errno.into(),
        }
    })
}

/// Makes a directory, and what leads to it; something else in its place is removed.
///
/// # Errors
/// When that is refused.
pub fn make_directory(path: &Path) -> Result<(), BootError> {
    try_make_directory(path)
        .map_err(|source| BootError::Directory { path: path.to_owned(), source })
}

fn try_make_directory(path: &Path) -> io::Result<()> {
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => return Ok(()),
        Ok(_) => fs::remove_file(path)?,
        // Nothing there, or a link that leads nowhere.
        Err(_) => match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        },
    }
    fs::DirBuilder::new().recursive(true).mode(0o755).create(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_in_the_place_of_a_directory_gives_way() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        fs::create_dir(path("real")).unwrap();
        fs::write(path("real/kept"), "").unwrap();
        fs::write(path("file"), "").unwrap();
        symlink("/nowhere/at/all", path("dangling")).unwrap();
        symlink("loop", path("loop")).unwrap();
        symlink("real", path("link")).unwrap();
        for name in ["real", "file", "dangling", "loop", "link", "missing/below"] {
            try_make_directory(&path(name)).unwrap();
            assert!(fs::metadata(path(name)).unwrap().is_dir(), "{name}");
        }
        assert!(path("real/kept").try_exists().unwrap());
        assert!(fs::symlink_metadata(path("link")).unwrap().is_symlink());
    }
}
