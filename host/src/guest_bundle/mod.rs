//! The guest bundle: the kernel and initramfs that machines boot.
//!
//! ```text
//!   $MATCHLOCK_KERNEL set?  yes ─► that kernel, with $MATCHLOCK_INITRAMFS or the default bundle's
//!                           no ──► <cache>/guest/default/{kernel,initramfs,manifest.json}
//!
//!   GuestBundles  ls, use, rm of what is below <cache>/guest/
//! ```
//!
//! # Invariants
//! 1. What is found are regular files, and a manifest of the format that we know.
//! 2. Finding writes nothing, and 50 MB are not hashed for each run: a bundle is installed by a
//!    rename of the whole directory. `use` hashes, and `ls` does.
//! 3. The paths are those of one installed version, so that another installation meanwhile cannot
//!    mix two.
//! 4. A VM holds a shared lock ([`BundleLease`]) on its bundle's directory as long as it lives; a
//!    bundle with a lease is not removed.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use matchlock_failpoints::Area;

mod installed;
mod lease;
mod manifest;

pub use installed::{GuestBundles, InstalledBundle};
pub use lease::BundleLease;

use manifest::Manifest;

/// What a crash may come between.
pub const POINTS: Area = Area::new("guest_bundle", &["name_default", "unname", "remove", "sweep"]);

/// The environment variable that names another kernel.
pub const KERNEL_VARIABLE: &str = "MATCHLOCK_KERNEL";

/// The environment variable that names another initramfs; used with another kernel only.
pub const INITRAMFS_VARIABLE: &str = "MATCHLOCK_INITRAMFS";

/// A guest to boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestBundle {
    /// The kernel: an ELF file with a PVH entry.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// The bundle's version, or `custom` with a kernel of the user's.
    pub version: String,
    /// The kernel's release, or `custom`.
    pub kernel_release: String,
    /// The installed bundle that it is taken from, in whole or in part.
    pub dir: Option<PathBuf>,
}

/// Why there is no guest to boot.
#[derive(Debug, thiserror::Error)]
pub enum GuestBundleError {
    /// No bundle is installed.
    #[error(
        "no guest kernel in {dir}: run `make guest` and `scripts/install-bundle.sh`, or set {KERNEL_VARIABLE}"
    )]
    Missing {
        /// Where it should be.
        dir: PathBuf,
    },
    /// A file is missing or no file.
    #[error("the guest {what} {path} is not a readable file: {advice}")]
    File {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// What to do.
        advice: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A kernel that the user named is in no format that is booted.
    #[error(
        "the guest kernel {path} is not an ELF file: name a vmlinux, uncompressed, with a PVH entry, with \
         --kernel or {KERNEL_VARIABLE}"
    )]
    NoKernel {
        /// What was named.
        path: PathBuf,
    },
    /// The bundle's manifest cannot be read.
    #[error("could not read the manifest {path} of the guest bundle: run `make guest`")]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The bundle is made for another version of Matchlock.
    #[error(
        "the guest bundle {dir} has format {found}, this matchlock knows {}: run `make guest`",
        manifest::FORMAT
    )]
    Format {
        /// The bundle.
        dir: PathBuf,
        /// Its format.
        found: u32,
    },
    /// A file is not what the manifest says.
    #[error("the guest bundle {dir} is damaged: {what}; remove it and run `make guest` again")]
    Damaged {
        /// The bundle.
        dir: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// There is no bundle of this version.
    #[error("guest bundle not found: {version:?}; choose one of `matchlock guest ls`")]
    NotFound {
        /// What was asked for.
        version: String,
    },
    /// It was removed before it could be used.
    #[error("the guest bundle {dir} is being removed: try again")]
    Gone {
        /// The bundle.
        dir: PathBuf,
    },
    /// The default bundle is not removed.
    #[error(
        "{version} is the default guest bundle: make another one the default first (matchlock guest use)"
    )]
    IsDefault {
        /// The bundle.
        version: String,
    },
    /// A VM uses it.
    #[error(
        "guest bundle {version} is in use by a running VM: stop it first (matchlock list, matchlock kill)"
    )]
    InUse {
        /// The bundle.
        version: String,
    },
    /// Somebody else changes the bundles.
    #[error("another matchlock or make works on the guest bundles in {dir}: try again")]
    Busy {
        /// Where.
        dir: PathBuf,
    },
    /// A file operation of ours failed.
    #[error("could not {doing} {path}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl GuestBundleError {
    /// A [`Self::Io`].
    fn io(doing: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Io { doing, path: path.to_owned(), source: source.into() }
    }
}

impl GuestBundle {
    /// Finds the guest: `kernel` and `initramfs` are those that the user named, if any. An
    /// initramfs without a kernel is used with the default kernel.
    ///
    /// # Errors
    /// What is missing, and what to do about it.
    pub fn find_with(
        cache: &Path,
        kernel: Option<PathBuf>,
        initramfs: Option<PathBuf>,
    ) -> Result<Self, GuestBundleError> {
        let named = kernel.clone();
        let names_initramfs = initramfs.is_some();
        let bundle = match (kernel, initramfs) {
            (Some(kernel), Some(initramfs)) => Self::custom(kernel, initramfs),
            (None, None) => Self::default_of(cache)?,
            (Some(kernel), None) => {
                let Self { initramfs, dir, .. } = Self::default_of(cache)?;
                Self { dir, ..Self::custom(kernel, initramfs) }
            }
            (None, Some(initramfs)) => Self { initramfs, ..Self::default_of(cache)? },
        };
        let advice = if named.is_some() { CORRECT_KERNEL } else { INSTALL };
        check_file("kernel", &bundle.kernel, advice)?;
        let advice = if names_initramfs { CORRECT_INITRAMFS } else { INSTALL };
        check_file("initramfs", &bundle.initramfs, advice)?;
        match named {
            Some(path) if !is_elf(&path)? => Err(GuestBundleError::NoKernel { path }),
            _ => Ok(bundle),
        }
    }

    /// Finds the guest: with the kernel that the user named, if any, and the initramfs that the
    /// environment names.
    ///
    /// # Errors
    /// What is missing, and what to do about it.
    pub fn find(cache: &Path, kernel_override: Option<PathBuf>) -> Result<Self, GuestBundleError> {
        let initramfs = std::env::var_os(INITRAMFS_VARIABLE).filter(|path| !path.is_empty());
        // The hypervisor has another working directory.
        let initramfs = initramfs.map(std::path::absolute).transpose();
        let initramfs = initramfs
            .map_err(|e| GuestBundleError::io("find", Path::new(INITRAMFS_VARIABLE), e))?;
        Self::find_with(cache, kernel_override, initramfs)
    }

    /// The same, and a lease on the bundle that it comes from, if it comes from one.
    ///
    /// # Errors
    /// As of [`Self::find`].
    pub fn find_leased(
        cache: &Path,
        kernel_override: Option<PathBuf>,
    ) -> Result<(Self, Option<BundleLease>), GuestBundleError> {
        let find = || {
            let bundle = Self::find(cache, kernel_override.clone())?;
            let lease = bundle.dir.as_deref().map(BundleLease::take).transpose()?;
            Ok((bundle, lease))
        };
        match find() {
            // It was the default, and is removed since another one is.
            Err(GuestBundleError::Gone { .. }) => find(),
            found => found,
        }
    }

    fn custom(kernel: PathBuf, initramfs: PathBuf) -> Self {
        let custom = || "custom".to_owned();
        Self { kernel, initramfs, version: custom(), kernel_release: custom(), dir: None }
    }

    /// The installed bundle.
    fn default_of(cache: &Path) -> Result<Self, GuestBundleError> {
        let link = cache.join("guest").join("default");
        // The link is resolved once: it may point to another bundle a moment later.
        let dir = match fs::canonicalize(&link) {
            Ok(dir) => dir,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(GuestBundleError::Missing { dir: link });
            }
            Err(source) => {
                return Err(GuestBundleError::Manifest { path: link, source });
            }
        };
        let manifest = Manifest::read(&dir)?;
        Ok(Self {
            kernel: dir.join("kernel"),
            initramfs: dir.join("initramfs"),
            version: manifest.version,
            kernel_release: manifest.kernel_release,
            dir: Some(dir),
        })
    }
}

/// What to do about a bundle of which a file is gone.
const INSTALL: &str = "run `make guest` and `scripts/install-bundle.sh`";
/// What to do about a kernel that the user named.
const CORRECT_KERNEL: &str = "correct --kernel or MATCHLOCK_KERNEL (`kernel` in config.toml)";
/// What to do about an initramfs that the user named.
const CORRECT_INITRAMFS: &str = "correct MATCHLOCK_INITRAMFS";

/// Whether a file begins as an ELF file does.
fn is_elf(path: &Path) -> Result<bool, GuestBundleError> {
    let mut magic = [0; 4];
    let read = fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic));
    match read {
        Ok(()) => Ok(magic == *b"\x7fELF"),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(GuestBundleError::io("read", path, error)),
    }
}

/// Checks that a path is a regular file that can be opened.
fn check_file(
    what: &'static str,
    path: &Path,
    advice: &'static str,
) -> Result<(), GuestBundleError> {
    let checked = fs::metadata(path).and_then(|found| {
        if !found.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        fs::File::open(path).map(drop)
    });
    checked.map_err(|source| GuestBundleError::File { what, path: path.to_owned(), advice, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFEST: &str = r#"{"format":1,"version":"0.1.0-x","kernel_release":"6.1.0",
        "kernel_package":"linux=1","kernel_sha256":"00","initramfs_sha256":"00"}"#;

    /// A cache with a bundle whose `default` is a link, as it is installed.
    fn cache(manifest: &str) -> tempfile::TempDir {
        let cache = tempfile::tempdir().unwrap();
        let dir = cache.path().join("guest/v1");
        fs::create_dir_all(&dir).unwrap();
        for (name, text) in [("kernel", "k"), ("initramfs", "i"), ("manifest.json", manifest)] {
            fs::write(dir.join(name), text).unwrap();
        }
        std::os::unix::fs::symlink("v1", cache.path().join("guest/default")).unwrap();
        cache
    }

    #[test]
    fn the_default_bundle_is_found_under_its_version() {
        let cache = cache(MANIFEST);
        let dir = cache.path().canonicalize().unwrap().join("guest/v1");
        let found = GuestBundle::find_with(cache.path(), None, None).unwrap();
        assert_eq!(found.kernel, dir.join("kernel"));
        assert_eq!(found.initramfs, dir.join("initramfs"));
        assert_eq!((&*found.version, &*found.kernel_release), ("0.1.0-x", "6.1.0"));
    }

    #[test]
    fn a_missing_bundle_says_what_to_do() {
        let cache = tempfile::tempdir().unwrap();
        let error = GuestBundle::find_with(cache.path(), None, None).unwrap_err().to_string();
        assert!(error.starts_with("no guest kernel in "), "{error}");
        assert!(error.contains("make guest") && error.contains("MATCHLOCK_KERNEL"), "{error}");
        assert!(!error.contains('\n'));
    }

    #[test]
    fn a_bundle_that_is_not_whole_is_refused() {
        let other = cache(&MANIFEST.replace("\"format\":1", "\"format\":2"));
        let error = GuestBundle::find_with(other.path(), None, None).unwrap_err();
        assert!(matches!(error, GuestBundleError::Format { found: 2, .. }), "{error}");

        let damaged = cache("{");
        let error = GuestBundle::find_with(damaged.path(), None, None).unwrap_err();
        assert!(matches!(error, GuestBundleError::Manifest { .. }), "{error}");

        let cut = cache(MANIFEST);
        fs::remove_file(cut.path().join("guest/v1/initramfs")).unwrap();
        let error = GuestBundle::find_with(cut.path(), None, None).unwrap_err();
        assert!(matches!(error, GuestBundleError::File { what: "initramfs", .. }), "{error}");
    }

    #[test]
    fn a_kernel_of_the_users_comes_with_either_initramfs() {
        let cache = cache(MANIFEST);
        let own = cache.path().join("vmlinux");
        fs::write(&own, "\x7fELF").unwrap();
        let found = GuestBundle::find_with(cache.path(), Some(own.clone()), None).unwrap();
        assert_eq!(found.kernel, own);
        assert!(found.initramfs.ends_with("guest/v1/initramfs"));

        // With both named, no bundle is needed.
        let empty = tempfile::tempdir().unwrap();
        let found =
            GuestBundle::find_with(empty.path(), Some(own.clone()), Some(own.clone())).unwrap();
        assert_eq!((found.initramfs, &*found.version), (own.clone(), "custom"));
        assert_eq!(found.dir, None);

        let directory = cache.path().to_owned();
        let error = GuestBundle::find_with(empty.path(), Some(directory), Some(own)).unwrap_err();
        assert!(matches!(error, GuestBundleError::File { what: "kernel", .. }), "{error}");
    }

    #[test]
    fn what_is_no_kernel_is_refused_before_it_is_booted() {
        let cache = cache(MANIFEST);
        let own = cache.path().join("bzImage");
        for content in ["", "MZ", "a bzImage or a list of users"] {
            fs::write(&own, content).unwrap();
            let error = GuestBundle::find_with(cache.path(), Some(own.clone()), None).unwrap_err();
            assert!(matches!(error, GuestBundleError::NoKernel { .. }), "{content:?}: {error}");
        }
    }
}
