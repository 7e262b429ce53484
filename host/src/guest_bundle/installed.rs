//! The bundles below `<cache>/guest/`: what is there, which is the default, and their removal.
//!
//! ```text
//!   guest/<version>/{kernel,initramfs,manifest.json}    a bundle
//!   guest/default ─► <version>                          the one that is booted
//!   guest/.…                                            somebody's work that is not done
//!
//!   use  lock guest/ ─► hash ─► link .default ─► rename it to default
//!   rm   lock guest/ ─► not the default? no lease? ─► rename to .removed ─► remove
//! ```
//!
//! # Invariants
//! 1. Whoever changes something here holds the exclusive lock (flock) on `guest/` itself, and so does
//!    `scripts/install-bundle.sh`. So a name with a dot at its front has no maker that lives, for the
//!    one who has the lock: it is swept, by the next change and by `gc`.
//! 2. A bundle is there whole under its name or not at all; `default` always leads to one that was
//!    whole when it was made the default. Both are changed by one rename, which is synced.
//! 3. Neither the default nor a bundle with a lease is removed.
//!
//! # On error and crash
//! Up to the rename nothing has happened; after it, it has, and what may be left is swept.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::manifest::Manifest;
use super::{GuestBundleError, POINTS, lease};
use crate::locked::Locked;

/// The link to the bundle that is booted.
const DEFAULT: &str = "default";

/// An installed bundle.
#[derive(Debug)]
pub struct InstalledBundle {
    /// Its version: the name of its directory.
    pub version: String,
    /// The kernel's release, where the manifest can be read.
    pub kernel_release: Option<String>,
    /// The package that the kernel was made of, where the manifest can be read.
    pub kernel_package: Option<String>,
    /// The bytes of its files. Two bundles may share a kernel.
    pub size: u64,
    /// Whether it is the one that is booted.
    pub is_default: bool,
    /// What is wrong with it, if something is.
    pub damage: Option<GuestBundleError>,
}

/// The bundles of a cache.
#[derive(Debug, Clone)]
pub struct GuestBundles {
    dir: PathBuf,
}

impl GuestBundles {
    /// Those of this cache.
    #[must_use]
    pub fn new(cache: &Path) -> Self {
        Self { dir: cache.join("guest") }
    }

    /// All of them by version, and whether they are whole: each file is hashed. Writes nothing.
    ///
    /// # Errors
    /// When the directory cannot be read; what is wrong with a bundle is told with it.
    pub fn list(&self) -> Result<Vec<InstalledBundle>, GuestBundleError> {
        let default = self.default_dir()?;
        let mut found = Vec::new();
        for name in self.names()? {
            if is_hidden(&name) || name == DEFAULT {
                continue;
            }
            let Some(mut bundle) = self.look_at(&name)? else { continue };
            bundle.is_default = self.is_default(&name, default.as_deref())?;
            found.push(bundle);
        }
        found.sort_by(|one, other| one.version.cmp(&other.version));
        Ok(found)
    }

    /// Checks a bundle and makes it the one that is booted.
    ///
    /// # Errors
    /// When there is none of this version, it is not whole, or somebody else changes the bundles.
    pub fn make_default(&self, version: &str) -> Result<(), GuestBundleError> {
        let _lock = self.lock(version)?;
        let dir = self.existing(version)?;
        Manifest::read(&dir)?.check(&dir)?;
        self.sweep_locked()?;
        let link = self.dir.join(".default");
        let default = self.dir.join(DEFAULT);
        let named = |error: io::Error| GuestBundleError::io("write", &default, error);
        POINTS.before("name_default").map_err(|error| named(error.into()))?;
        std::os::unix::fs::symlink(version, &link).map_err(named)?;
        fs::rename(&link, &default).map_err(named)?;
        self.sync()?;
        POINTS.after("name_default").map_err(|error| named(error.into()))
    }

    /// Removes a bundle, whole or damaged.
    ///
    /// # Errors
    /// When there is none of this version, it is the default or in use, or somebody else changes the
    /// bundles.
    pub fn remove(&self, version: &str) -> Result<(), GuestBundleError> {
        let _lock = self.lock(version)?;
        let dir = self.existing(version)?;
        if self.is_default(OsStr::new(version), self.default_dir()?.as_deref())? {
            return Err(GuestBundleError::IsDefault { version: version.to_owned() });
        }
        self.sweep_locked()?;
        let fail = |error: io::Error| GuestBundleError::io("remove", &dir, error);
        let Some(_excluded) = lease::exclude(&dir).map_err(|error| fail(error.into()))? else {
            return Err(GuestBundleError::InUse { version: version.to_owned() });
        };
        let unnamed = self.dir.join(".removed");
        POINTS.before("unname").map_err(|error| fail(error.into()))?;
        fs::rename(&dir, &unnamed).map_err(fail)?;
        self.sync()?;
        POINTS.after("unname").map_err(|error| fail(error.into()))?;
        POINTS.before("remove").map_err(|error| fail(error.into()))?;
        fs::remove_dir_all(&unnamed).map_err(fail)?;
        POINTS.after("remove").map_err(|error| fail(error.into()))
    }

    /// Removes what a change left that did not come to its end; how much. Nothing where somebody is
    /// just changing something: that is not left.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn sweep(&self) -> Result<usize, GuestBundleError> {
        // Nothing to sweep is the rule, and then nothing is locked.
        if !self.names()?.iter().any(|name| is_hidden(name)) {
            return Ok(0);
        }
        match lease::exclude(&self.dir) {
            Ok(Some(_lock)) => self.sweep_locked(),
            Ok(None) | Err(Errno::NOENT) => Ok(0),
            Err(error) => Err(GuestBundleError::io("lock", &self.dir, error)),
        }
    }

    fn sweep_locked(&self) -> Result<usize, GuestBundleError> {
        let mut removed = 0;
        for name in self.names()?.iter().filter(|name| is_hidden(name)) {
            let path = self.dir.join(name);
            let fail = |error: io::Error| GuestBundleError::io("remove", &path, error);
            POINTS.before("sweep").map_err(|error| fail(error.into()))?;
            if fs::symlink_metadata(&path).map_err(fail)?.is_dir() {
                fs::remove_dir_all(&path).map_err(fail)?;
            } else {
                fs::remove_file(&path).map_err(fail)?;
            }
            POINTS.after("sweep").map_err(|error| fail(error.into()))?;
            removed += 1;
        }
        Ok(removed)
    }

    /// Locks the bundles for a change that is about this one.
    fn lock(&self, version: &str) -> Result<Locked, GuestBundleError> {
        match lease::exclude(&self.dir) {
            Ok(Some(lock)) => Ok(lock),
            Ok(None) => Err(GuestBundleError::Busy { dir: self.dir.clone() }),
            Err(Errno::NOENT) => Err(GuestBundleError::NotFound { version: version.to_owned() }),
            Err(error) => Err(GuestBundleError::io("lock", &self.dir, error)),
        }
    }

    /// The directory of a bundle that is there. Not what another name leads to, and nothing outside.
    fn existing(&self, version: &str) -> Result<PathBuf, GuestBundleError> {
        let not_found = || GuestBundleError::NotFound { version: version.to_owned() };
        let name = OsStr::new(version);
        if version.is_empty() || version.contains('/') || is_hidden(name) || version == DEFAULT {
            return Err(not_found());
        }
        let dir = self.dir.join(name);
        match fs::symlink_metadata(&dir) {
            Ok(found) if found.is_dir() => Ok(dir),
            Ok(_) => Err(not_found()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(not_found()),
            Err(error) => Err(GuestBundleError::io("look at", &dir, error)),
        }
    }

    /// A bundle as it is; `None` when it was removed meanwhile, or is no directory.
    fn look_at(&self, name: &OsStr) -> Result<Option<InstalledBundle>, GuestBundleError> {
        let dir = self.dir.join(name);
        let is_there = || match fs::symlink_metadata(&dir) {
            Ok(found) => Ok(found.is_dir()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(GuestBundleError::io("look at", &dir, error)),
        };
        if !is_there()? {
            return Ok(None);
        }
        let manifest = Manifest::read(&dir);
        let checked = manifest.as_ref().map(|manifest| manifest.check(&dir));
        let (kernel_release, kernel_package) = match &manifest {
            Ok(found) => (Some(found.kernel_release.clone()), Some(found.kernel_package.clone())),
            Err(_) => (None, None),
        };
        let damage = match checked {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error),
            Err(_) => manifest.err(),
        };
        // What is missing then is no damage.
        if damage.is_some() && !is_there()? {
            return Ok(None);
        }
        Ok(Some(InstalledBundle {
            version: name.to_string_lossy().into_owned(),
            kernel_release,
            kernel_package,
            size: size_of(&dir),
            is_default: false,
            damage,
        }))
    }

    /// The directory that `default` leads to, if it leads to one.
    fn default_dir(&self) -> Result<Option<PathBuf>, GuestBundleError> {
        resolved(&self.dir.join(DEFAULT))
    }

    fn is_default(&self, name: &OsStr, default: Option<&Path>) -> Result<bool, GuestBundleError> {
        Ok(default.is_some() && resolved(&self.dir.join(name))?.as_deref() == default)
    }

    /// All names in the directory; none where there is no directory.
    fn names(&self) -> Result<Vec<OsString>, GuestBundleError> {
        let fail = |error| GuestBundleError::io("read", &self.dir, error);
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(fail)?,
        };
        entries.map(|entry| Ok(entry.map_err(fail)?.file_name())).collect()
    }

    /// Makes the renames in the directory last.
    fn sync(&self) -> Result<(), GuestBundleError> {
        let synced = File::open(&self.dir).and_then(|dir| dir.sync_all());
        synced.map_err(|error| GuestBundleError::io("sync", &self.dir, error))
    }
}

/// A path without links; `None` for one that leads nowhere.
fn resolved(path: &Path) -> Result<Option<PathBuf>, GuestBundleError> {
    match fs::canonicalize(path) {
        Ok(there) => Ok(Some(there)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(GuestBundleError::io("follow", path, error)),
    }
}

fn is_hidden(name: &OsStr) -> bool {
    name.as_bytes().starts_with(b".")
}

/// The bytes of the files that are there; what is not counts nothing, and is told as damage.
fn size_of(dir: &Path) -> u64 {
    let size = |name: &str| fs::symlink_metadata(dir.join(name)).map_or(0, |found| found.len());
    ["kernel", "initramfs", "manifest.json"].into_iter().map(size).sum()
}

#[cfg(test)]
mod tests {
    use sha2::{Digest as _, Sha256};

    use super::super::{BundleLease, GuestBundle};
    use super::*;

    /// Puts a small bundle there, as it is installed.
    fn install(bundles: &GuestBundles, version: &str) {
        let dir = bundles.dir.join(version);
        fs::create_dir_all(&dir).unwrap();
        let sum = |content: &str| hex::encode(Sha256::digest(content));
        let manifest = format!(
            r#"{{"format":1,"version":"{version}","kernel_release":"6.1.0-x","kernel_package":"linux=1",
            "kernel_sha256":"{}","initramfs_sha256":"{}"}}"#,
            sum("a kernel"),
            sum("an initramfs"),
        );
        let files =
            [("kernel", "a kernel"), ("initramfs", "an initramfs"), ("manifest.json", &manifest)];
        for (name, content) in files {
            fs::write(dir.join(name), content).unwrap();
        }
    }

    fn two() -> (tempfile::TempDir, GuestBundles) {
        let cache = tempfile::tempdir().unwrap();
        let bundles = GuestBundles::new(cache.path());
        install(&bundles, "1-one");
        install(&bundles, "1-two");
        bundles.make_default("1-one").unwrap();
        (cache, bundles)
    }

    fn names(bundles: &GuestBundles) -> Vec<String> {
        let mut names: Vec<String> =
            bundles.names().unwrap().iter().map(|n| n.to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn one_is_the_default_and_another_can_be() {
        let (cache, bundles) = two();
        let shown = || -> Vec<(String, bool, bool)> {
            let listed = bundles.list().unwrap();
            listed.into_iter().map(|b| (b.version, b.is_default, b.damage.is_none())).collect()
        };
        assert_eq!(shown(), [("1-one".into(), true, true), ("1-two".into(), false, true)]);
        bundles.make_default("1-two").unwrap();
        assert_eq!(shown(), [("1-one".into(), false, true), ("1-two".into(), true, true)]);
        let found = GuestBundle::find_with(cache.path(), None, None).unwrap();
        assert_eq!(found.version, "1-two");
        assert_eq!(names(&bundles), ["1-one", "1-two", "default"]);
    }

    #[test]
    fn a_damaged_one_is_told_and_does_not_become_the_default() {
        let (_cache, bundles) = two();
        type Damage<'a> = &'a dyn Fn(&Path);
        let damages: [(&str, Damage<'_>, &str); 5] = [
            ("1-kernel", &|dir| fs::write(dir.join("kernel"), "b kernel").unwrap(), "kernel has"),
            ("1-gone", &|dir| fs::remove_file(dir.join("initramfs")).unwrap(), "no initramfs"),
            ("1-text", &|dir| fs::write(dir.join("manifest.json"), "{").unwrap(), "manifest"),
            ("1-none", &|dir| fs::remove_file(dir.join("manifest.json")).unwrap(), "no guest"),
            (
                "1-other",
                &|dir| {
                    let other = dir.with_file_name("1-one").join("manifest.json");
                    fs::copy(other, dir.join("manifest.json")).map(drop).unwrap();
                },
                "version \"1-one\"",
            ),
        ];
        for (version, damage, said) in damages {
            install(&bundles, version);
            damage(&bundles.dir.join(version));
            let listed = bundles.list().unwrap();
            let found = listed.iter().find(|bundle| bundle.version == version).unwrap();
            let told = found.damage.as_ref().unwrap().to_string();
            assert!(told.contains(said) && !told.contains('\n'), "{told}");
            let refused = bundles.make_default(version).unwrap_err().to_string();
            assert_eq!(refused, told);
            let default = bundles.list().unwrap().into_iter().find(|bundle| bundle.is_default);
            assert_eq!(default.unwrap().version, "1-one", "{version}");
            bundles.remove(version).unwrap();
        }
        assert_eq!(names(&bundles), ["1-one", "1-two", "default"]);
    }

    #[test]
    fn neither_the_default_nor_one_in_use_is_removed() {
        let (_cache, bundles) = two();
        let refused = bundles.remove("1-one").unwrap_err();
        assert!(matches!(refused, GuestBundleError::IsDefault { .. }), "{refused}");
        let dir = bundles.dir.join("1-two");
        let lease = BundleLease::take(&dir).unwrap();
        let refused = bundles.remove("1-two").unwrap_err();
        assert!(matches!(refused, GuestBundleError::InUse { .. }), "{refused}");
        assert_eq!(names(&bundles), ["1-one", "1-two", "default"]);
        drop(lease);
        bundles.remove("1-two").unwrap();
        assert_eq!(names(&bundles), ["1-one", "default"]);
        let gone = BundleLease::take(&dir).unwrap_err();
        assert!(matches!(gone, GuestBundleError::Gone { .. }), "{gone}");
    }

    #[test]
    fn one_that_is_just_being_removed_cannot_be_used() {
        let (_cache, bundles) = two();
        let dir = bundles.dir.join("1-two");
        let _excluded = lease::exclude(&dir).unwrap().unwrap();
        let gone = BundleLease::take(&dir).unwrap_err();
        assert!(matches!(gone, GuestBundleError::Gone { .. }), "{gone}");
    }

    #[test]
    fn names_that_are_no_bundles_are_not_found() {
        let (cache, bundles) = two();
        fs::create_dir(cache.path().join("outside")).unwrap();
        fs::create_dir(bundles.dir.join(".hidden")).unwrap();
        std::os::unix::fs::symlink("1-two", bundles.dir.join("link")).unwrap();
        fs::write(bundles.dir.join("file"), "").unwrap();
        for name in ["", ".", "..", "../outside", "default", ".hidden", "link", "file", "1-three"] {
            for refused in [bundles.remove(name), bundles.make_default(name)] {
                let refused = refused.unwrap_err();
                assert!(matches!(refused, GuestBundleError::NotFound { .. }), "{name}: {refused}");
            }
        }
        // Without any bundle as well.
        let none = GuestBundles::new(&cache.path().join("outside"));
        assert!(none.list().unwrap().is_empty());
        assert_eq!(none.sweep().unwrap(), 0);
        let refused = none.remove("1-one").unwrap_err();
        assert!(matches!(refused, GuestBundleError::NotFound { .. }), "{refused}");
    }

    #[test]
    fn what_a_crash_left_is_swept_unless_somebody_is_at_work() {
        let (_cache, bundles) = two();
        let leave = || {
            fs::create_dir_all(bundles.dir.join(".removed/x")).unwrap();
            std::os::unix::fs::symlink("1-two", bundles.dir.join(".default")).unwrap();
        };
        leave();
        let work = lease::exclude(&bundles.dir).unwrap().unwrap();
        assert_eq!(bundles.sweep().unwrap(), 0);
        let refused = bundles.make_default("1-two").unwrap_err();
        assert!(matches!(refused, GuestBundleError::Busy { .. }), "{refused}");
        assert_eq!(names(&bundles).len(), 5);
        drop(work);
        assert_eq!(bundles.sweep().unwrap(), 2);
        leave();
        bundles.make_default("1-two").unwrap();
        assert_eq!(names(&bundles), ["1-one", "1-two", "default"]);
    }
}
