//! Loads the kernel modules that the initramfs brings along, in its order.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

/// Why a module was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// The list could not be read.
    #[error("cannot read the list of modules {path}")]
    List {
        /// The list.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A module could not be read or the kernel refused it.
    #[error("cannot load the kernel module {path}")]
    Load {
        /// The module.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Loads what `order` in `directory` names. No list means a kernel that has all it needs, and so does
/// a kernel that knows no modules: it was named by the user, beside another one's initramfs.
///
/// # Errors
/// When the list or a module in it is unusable; one that is loaded already is fine.
pub fn load_all(directory: &Path) -> Result<(), ModuleError> {
    let path = directory.join("order");
    let order = match fs::read_to_string(&path) {
        Ok(order) => order,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(ModuleError::List { path, source }),
    };
    for name in order.lines().map(str::trim).filter(|name| !name.is_empty()) {
        let path = directory.join(name);
        match load(&path) {
            Err(error) if error.raw_os_error() == Some(Errno::ENOSYS as i32) => return Ok(()),
            loaded => loaded.map_err(|source| ModuleError::Load { path, source })?,
        }
    }
    Ok(())
}

fn load(path: &Path) -> io::Result<()> {
    let file = fs::File::open(path)?;
    match finit_module(&file, c"", ModuleInitFlags::empty()) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
