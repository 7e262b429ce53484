//! Programs, space, the state directory, and who else has one.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use super::{Check, Root};

/// With less a boot may fail: a writable disk, logs, the database.
const LEAST_MB: u64 = 64;

/// With less an image may not fit.
const COMFORTABLE_MB: u64 = 1024;

/// What is run besides the hypervisor: its name, its package, and what for.
const PROGRAMS: [(&str, &str, &str); 2] = [
    ("mke2fs", "e2fsprogs", "each VM's writable disk"),
    ("mkfs.erofs", "erofs-utils", "importing images"),
];

/// Where they are looked for besides `PATH`.
const SYSTEM_DIRS: [&str; 2] = ["/usr/sbin", "/sbin"];

/// Whether the programs that we run are there.
#[must_use]
pub fn programs(root: &Root, path: &std::ffi::OsStr) -> Check {
    let name = "programs";
    let dirs: Vec<PathBuf> =
        std::env::split_paths(path).chain(SYSTEM_DIRS.map(|dir| root.path(dir))).collect();
    let is_there = |program: &str| {
        dirs.iter().map(|dir| dir.join(program)).any(|file| {
            file.is_file() && rustix::fs::access(&file, rustix::fs::Access::EXEC_OK).is_ok()
        })
    };
    let missing: Vec<_> = PROGRAMS.iter().filter(|(program, ..)| !is_there(program)).collect();
    if missing.is_empty() {
        return Check::pass(name, PROGRAMS.map(|(program, ..)| program).join(", "));
    }
    let what: Vec<String> =
        missing.iter().map(|(program, _, what)| format!("{program} (for {what})")).collect();
    let packages: Vec<&str> = missing.iter().map(|(_, package, _)| *package).collect();
    Check::fail(
        name,
        format!("not installed: {}", what.join(", ")),
        format!("install {}", packages.join(" and ")),
    )
}

/// Whether there is space on the disk of a directory, which need not be there yet.
#[must_use]
pub fn space(name: &'static str, dir: &Path) -> Check {
    let Some(there) = dir.ancestors().find(|dir| dir.is_dir()) else {
        let text = format!("{}: no directory above it exists", dir.display());
        return Check::fail(name, text, "use another MATCHLOCK_HOME or MATCHLOCK_CACHE");
    };
    let found = match rustix::fs::statvfs(there) {
        Ok(found) => found,
        Err(error) => {
            let text = format!("{}: {error}", there.display());
            return Check::fail(name, text, "see what is wrong with that file system");
        }
    };
    from_space(name, dir, found.f_bavail.saturating_mul(found.f_frsize) >> 20, found.f_favail)
}

fn from_space(name: &'static str, dir: &Path, free_mb: u64, free_inodes: u64) -> Check {
    let place = dir.display();
    let fix = "remove images (matchlock image rm), VMs (matchlock rm), or what else lies there";
    if free_mb < LEAST_MB {
        return Check::fail(name, format!("{free_mb} MB are free for {place}"), fix);
    }
    if free_inodes == 0 {
        // Some file systems have none to count.
        return Check::warn(name, format!("no inode is free for {place}, or none is counted"), fix);
    }
    if free_mb < COMFORTABLE_MB {
        return Check::warn(name, format!("{free_mb} MB are free for {place}"), fix);
    }
    Check::pass(name, format!("{free_mb} MB are free for {place}"))
}

/// Whether the state directory is ours alone. One that is not there yet is made by the first `run`.
#[must_use]
pub fn private_directory(home: &Path) -> Check {
    let name = "state-directory";
    let place = home.display();
    let found = match fs::metadata(home) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Check::pass(name, format!("{place} is not there yet"));
        }
        Err(error) => {
            return Check::fail(name, format!("{place}: {error}"), "use another MATCHLOCK_HOME");
        }
    };
    if !found.is_dir() {
        let text = format!("{place} is no directory");
        return Check::fail(name, text, "move it away, or use another MATCHLOCK_HOME");
    }
    let us = rustix::process::geteuid().as_raw();
    if found.uid() != us {
        return Check::fail(
            name,
            format!("{place} belongs to user {}, not to {us}", found.uid()),
            format!("run as that user, or use another MATCHLOCK_HOME, or chown -R {us} {place}"),
        );
    }
    let mode = found.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        let text = format!("{place} has mode {mode:03o}: others can look into it");
        return Check::warn(name, text, format!("chmod 700 {place}"));
    }
    Check::pass(name, format!("{place} is private"))
}

/// Whether we use another installation than the user who called sudo has.
#[must_use]
pub fn second_installation(root: &Root, sudo_user: Option<&str>, home: &Path) -> Check {
    let name = "second-installation";
    let Some(user) = sudo_user.filter(|user| !user.is_empty() && *user != "root") else {
        return Check::pass(name, format!("{} is the only one looked for", home.display()));
    };
    let passwd = match root.read("/etc/passwd") {
        Ok(passwd) => passwd,
        Err(error) => {
            return Check::warn(
                name,
                format!("where {user} lives could not be read: /etc/passwd: {error}"),
                "set MATCHLOCK_HOME to say which installation is meant",
            );
        }
    };
    let theirs = home_of(&passwd, user).unwrap_or_else(|| format!("/home/{user}"));
    let found: Vec<String> = [".matchlock", ".cache/matchlock"]
        .into_iter()
        .map(|dir| root.path(&theirs).join(dir))
        .filter(|dir| dir.is_dir() && !home.starts_with(dir))
        .map(|dir| dir.display().to_string())
        .collect();
    if found.is_empty() {
        return Check::pass(name, format!("{user}, who called sudo, has none"));
    }
    Check::warn(
        name,
        format!(
            "{user}, who called sudo, has {}; this is {}, with other VMs and images",
            found.join(" and "),
            home.display()
        ),
        format!(
            "run without sudo, or `sudo MATCHLOCK_HOME={0}/.matchlock MATCHLOCK_CACHE={0}/.cache/matchlock matchlock ...`",
            theirs
        ),
    )
}

fn home_of(passwd: &str, user: &str) -> Option<String> {
    let line = passwd.lines().find(|line| line.split(':').next() == Some(user))?;
    line.split(':').nth(5).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::super::Status;
    use super::*;

    fn executable(file: &Path) {
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, "").unwrap();
        fs::set_permissions(file, fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn programs_are_found_in_path_and_where_the_system_has_them() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::at(dir.path());
        let bin = dir.path().join("bin");
        let none = programs(&root, OsStr::new(""));
        assert_eq!(none.status, Status::Fail);
        assert_eq!(none.fix.unwrap(), "install e2fsprogs and erofs-utils");
        executable(&dir.path().join("sbin/mke2fs"));
        let one = programs(&root, bin.as_os_str());
        assert_eq!((one.status, one.fix.as_deref()), (Status::Fail, Some("install erofs-utils")));
        fs::create_dir(&bin).unwrap();
        fs::write(bin.join("mkfs.erofs"), "").unwrap();
        assert_eq!(programs(&root, bin.as_os_str()).status, Status::Fail, "not executable");
        executable(&bin.join("mkfs.erofs"));
        assert_eq!(programs(&root, bin.as_os_str()).status, Status::Pass);
    }

    #[test]
    fn space_is_asked_of_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let check = space("disk-space-home", &dir.path().join("not/yet"));
        assert_ne!(check.status, Status::Fail, "{check:?}");
        let limits = [
            ((10_000, 9), Status::Pass),
            ((1_000, 9), Status::Warn),
            ((63, 9), Status::Fail),
            ((10_000, 0), Status::Warn),
        ];
        for ((mb, inodes), status) in limits {
            assert_eq!(from_space("x", dir.path(), mb, inodes).status, status, "{mb} {inodes}");
        }
        // A file system without any space.
        assert_eq!(space("x", Path::new("/proc/x")).status, Status::Fail);
        assert_eq!(space("x", Path::new("relative/x")).status, Status::Fail);
    }

    #[test]
    fn a_state_directory_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("home");
        assert_eq!(private_directory(&home).status, Status::Pass);
        fs::create_dir(&home).unwrap();
        for (mode, status) in [(0o700, Status::Pass), (0o755, Status::Warn), (0o770, Status::Warn)]
        {
            fs::set_permissions(&home, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(private_directory(&home).status, status, "{mode:o}");
        }
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&home, Some(4711), None).unwrap();
            let check = private_directory(&home);
            assert_eq!(check.status, Status::Fail);
            assert!(check.message.contains("user 4711"), "{check:?}");
        }
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(private_directory(&file).status, Status::Fail);
    }

    #[test]
    fn the_installation_of_whoever_called_sudo_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::at(dir.path());
        let ours = Path::new("/root/.matchlock");
        let check = |user| second_installation(&root, user, ours);
        assert_eq!(check(None).status, Status::Pass);
        assert_eq!(check(Some("root")).status, Status::Pass);
        assert_eq!(check(Some("ann")).status, Status::Warn, "no /etc/passwd");
        fs::create_dir_all(dir.path().join("etc")).unwrap();
        let passwd = "root:x:0:0::/root:/bin/sh\nann:x:1000:1000:Ann:/users/ann:/bin/sh\n";
        fs::write(dir.path().join("etc/passwd"), passwd).unwrap();
        assert_eq!(check(Some("ann")).status, Status::Pass, "she has none");
        fs::create_dir_all(dir.path().join("users/ann/.matchlock")).unwrap();
        let found = check(Some("ann"));
        assert_eq!(found.status, Status::Warn);
        assert!(found.message.contains("users/ann/.matchlock"), "{found:?}");
        assert!(found.fix.unwrap().contains("MATCHLOCK_HOME=/users/ann/.matchlock"));
        // It is the one that is used.
        let same = dir.path().join("users/ann/.matchlock");
        assert_eq!(second_installation(&root, Some("ann"), &same).status, Status::Pass);
    }
}
