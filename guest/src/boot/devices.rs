//! Devices that are taken from the kernel before a snapshot and given back after it.
//!
//! A disk's size, a NIC's address and what a random number generator has in store are read when a
//! driver takes a device. Of a guest on hold no driver has one, so none of it is in a snapshot; a
//! restored guest sees the devices of its own machine for the first time.
//!
//! # Invariants
//! 1. The console's device stays: the host speaks over it, and it holds nothing of a machine's own.
//! 2. They come back in the order in which they were taken, which is their machine's: that names disks.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The type of the virtio device that carries ports, as sysfs writes it.
const CONSOLE: &str = "0x0003";

/// A device without its driver.
#[derive(Debug, PartialEq, Eq)]
pub struct Taken {
    driver: PathBuf,
    name: String,
}

/// Takes every virtio device but the console from its driver's transport.
///
/// # Errors
/// When a device cannot be looked at or taken.
pub fn take_all(sys: &Path) -> io::Result<Vec<Taken>> {
    let mut found = Vec::new();
    for device in fs::read_dir(sys.join("bus/virtio/devices"))? {
        let device = fs::canonicalize(device?.path())?;
        if fs::read_to_string(device.join("device"))?.trim_end() == CONSOLE {
            continue;
        }
        let transport = device.parent().ok_or(io::ErrorKind::NotFound)?;
        let name = transport.file_name().and_then(|name| name.to_str());
        let name = name.ok_or(io::ErrorKind::InvalidData)?.to_owned();
        found.push(Taken { driver: fs::canonicalize(transport.join("driver"))?, name });
    }
    found.sort_by(|one, other| one.name.cmp(&other.name));
    for taken in &found {
        fs::write(taken.driver.join("unbind"), &taken.name)?;
    }
    Ok(found)
}

/// Gives them back.
///
/// # Errors
/// When a driver refuses its device.
pub fn give_back(taken: &[Taken]) -> io::Result<()> {
    for device in taken {
        fs::write(device.driver.join("bind"), &device.name)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_but_the_console_are_taken_in_their_order_and_given_back() {
        let sys = tempfile::tempdir().unwrap();
        let driver = sys.path().join("bus/platform/drivers/virtio-mmio");
        let devices = sys.path().join("bus/virtio/devices");
        fs::create_dir_all(&driver).unwrap();
        fs::create_dir_all(&devices).unwrap();
        for (number, kind) in [(3, "0x0001"), (0, "0x0002"), (1, "0x0003"), (2, "0x0004")] {
            let transport = sys.path().join(format!("devices/LNRO0005:0{number}"));
            let device = transport.join(format!("virtio{number}"));
            fs::create_dir_all(&device).unwrap();
            fs::write(device.join("device"), format!("{kind}\n")).unwrap();
            std::os::unix::fs::symlink(&driver, transport.join("driver")).unwrap();
            std::os::unix::fs::symlink(&device, devices.join(format!("virtio{number}"))).unwrap();
        }
        let taken = take_all(sys.path()).unwrap();
        let names: Vec<_> = taken.iter().map(|taken| taken.name.as_str()).collect();
        assert_eq!(names, ["LNRO0005:00", "LNRO0005:02", "LNRO0005:03"]);
        assert_eq!(fs::read_to_string(driver.join("unbind")).unwrap(), "LNRO0005:03");
        give_back(&taken).unwrap();
        assert_eq!(fs::read_to_string(driver.join("bind")).unwrap(), "LNRO0005:03");
    }
}
