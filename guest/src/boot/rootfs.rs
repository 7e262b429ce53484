//! The guest's root: the image below, the VM's writable layer above, and the way into it.
//!
//! ```text
//!  disk "base"   ─ erofs, ro ─► /mnt/base ──┐
//!  disk "rootfs" ─ ext4, rw ──► /mnt/layer ─┴─ overlay ─► /newroot ─ move ─► /
//! ```
//!
//! # Invariants
//! 1. Nothing in the image is changed or executed.
//! 2. After the switch both disks are mounted nowhere: the overlay alone uses them. The layer is
//!    kept reachable by a descriptor, for a clean end.
//! 3. Only a file system that lives in memory is emptied.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use matchlock_wire::{BASE_DISK_SERIAL, ROOTFS_DISK_SERIAL};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};
use rustix::fs::{Mode, OFlags};

use super::uevent::Uevents;
use super::{BootError, mounts};

const BASE: &str = "/mnt/base";
const LAYER: &str = "/mnt/layer";
const NEW_ROOT: &str = "/newroot";

/// The mode that the upper directory is made with; mostly the image's root has it too.
const NEW_UPPER: u32 = 0o755;

/// `RAMFS_MAGIC` of the kernel; an initramfs is one, or a tmpfs.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// Finds the disks and mounts the overlay of the two. Returns a descriptor of the layer.
///
/// # Errors
/// When a disk does not come up within `patience`, or something cannot be mounted.
pub fn assemble(uevents: &Uevents, patience: Duration) -> Result<OwnedFd, BootError> {
    let base = find_disk(uevents, BASE_DISK_SERIAL, patience)?;
    let layer = find_disk(uevents, ROOTFS_DISK_SERIAL, patience)?;
    for directory in [BASE, LAYER, NEW_ROOT] {
        mounts::make_directory(Path::new(directory))?;
    }
    mounts::mount_one(&mounts::Mount {
        source: &base,
        target: BASE,
        kind: "erofs",
        flags: MsFlags::MS_RDONLY,
        data: None,
    })?;
    mounts::mount_one(&mounts::Mount {
        source: &layer,
        target: LAYER,
        kind: "ext4",
        flags: MsFlags::MS_NOATIME,
        data: None,
    })?;
    prepare_layer().map_err(|source| BootError::Layer { source })?;
    let data = format!(
        "lowerdir={BASE},upperdir={LAYER}/upper,workdir={LAYER}/work,redirect_dir=on,index=off"
    );
    mounts::mount_one(&mounts::Mount {
        source: "overlay",
        target: NEW_ROOT,
        kind: "overlay",
        flags: MsFlags::empty(),
        data: Some(&data),
    })?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(LAYER, flags, Mode::empty())
        .map_err(|errno| BootError::Layer { source: errno.into() })
}

/// Leaves the initramfs for the assembled root and gives its memory back.
///
/// # Errors
/// When a step of the way is refused.
pub fn switch() -> Result<(), BootError> {
    let step = |what| move |errno: nix::Error| BootError::Switch { what, source: errno.into() };
    mounts::move_all(Path::new(NEW_ROOT))?;
    for target in [BASE, LAYER] {
        umount2(target, MntFlags::MNT_DETACH).map_err(step("leave a mount behind"))?;
    }
    empty_initramfs()
        .map_err(|source| BootError::Switch { what: "empty the initramfs", source })?;
    nix::unistd::chdir(NEW_ROOT).map_err(step("enter the new root"))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(step("move the new root"))?;
    nix::unistd::chroot(".").map_err(step("change the root"))?;
    nix::unistd::chdir("/").map_err(step("enter the root"))
}

/// The device of the disk with this serial number.
fn find_disk(uevents: &Uevents, serial: &str, patience: Duration) -> Result<String, BootError> {
    uevents
        .wait_for(patience, || look_for_disk(serial))
        .map_err(|source| BootError::LookForDisk { source })?
        .ok_or_else(|| BootError::NoDisk { serial: serial.to_owned(), waited: patience })
}

fn look_for_disk(serial: &str) -> io::Result<Option<String>> {
    for disk in fs::read_dir("/sys/block")? {
        let disk = disk?;
        match fs::read_to_string(disk.path().join("serial")) {
            Ok(text) if text.trim_end() == serial => {
                let device = PathBuf::from("/dev").join(disk.file_name());
                if device.try_exists()? {
                    return Ok(Some(device.to_string_lossy().into_owned()));
                }
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Makes `upper` and `work` in a new layer. The root directory's owner and mode are the upper's, so
/// they are taken over from the image.
fn prepare_layer() -> io::Result<()> {
    let layer = Path::new(LAYER);
    let upper = layer.join("upper");
    let make = |path: &Path, mode| match fs::DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        other => other.map(|()| true),
    };
    make(&layer.join("work"), 0o700)?;
    if make(&upper, NEW_UPPER)? {
        let image = fs::metadata(BASE)?;
        let mode = image.mode() & 0o7777;
        if (image.uid(), image.gid()) != (0, 0) {
            std::os::unix::fs::chown(&upper, Some(image.uid()), Some(image.gid()))?;
        }
        // The file mode creation mask of a kernel's first process is 022.
        if mode != NEW_UPPER {
            fs::set_permissions(&upper, fs::Permissions::from_mode(mode))?;
        }
    }
    Ok(())
}

fn empty_initramfs() -> io::Result<()> {
    let root = Path::new("/");
    let kind = statfs(root)?.filesystem_type();
    if std::process::id() != 1 || (kind != TMPFS_MAGIC && kind != RAMFS_MAGIC) {
        return Ok(());
    }
    empty(root, fs::metadata(root)?.dev())
}

/// Removes what is below `directory` on the device; mount points and the way to them stay.
fn empty(directory: &Path, device: u64) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let found = fs::symlink_metadata(&path)?;
        if found.dev() != device {
            continue;
        }
        if !found.is_dir() {
            fs::remove_file(&path)?;
        } else if path != Path::new(NEW_ROOT) {
            empty(&path, device)?;
            fs::remove_dir(&path)?;
        }
    }
    Ok(())
}
