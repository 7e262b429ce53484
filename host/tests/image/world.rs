//! A cache of its own for each test, sentinels beside it, and what an import did to them.

use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use matchlock_host::image::{
    BlobLease, ImageDirs, ImageError, ImportLimits, ImportProgress, ImportWish, Imported,
    ImportedImage,
};
use tempfile::TempDir;

use crate::archives::Image;
use crate::view::{self, View};

/// The one image that an archive holds, or that is called `test`.
pub(crate) fn import(
    input: &mut dyn Read,
    dirs: &ImageDirs,
    limits: &ImportLimits,
    progress: &dyn Fn(ImportProgress),
    cancelled: &dyn Fn() -> bool,
) -> Result<(ImportedImage, BlobLease), ImageError> {
    let wish = ImportWish::of("test");
    let mut all = matchlock_host::image::import(input, dirs, limits, &wish, progress, cancelled)?;
    let Imported { image, tags, lease } = all.pop().unwrap();
    assert!(all.is_empty() && tags == ["test"], "{tags:?}");
    Ok((image, lease))
}

pub(crate) struct World {
    base: TempDir,
    pub(crate) dirs: ImageDirs,
    before: View,
}

impl World {
    /// None without root.
    pub(crate) fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: importing images needs root");
            return None;
        }
        let base = tempfile::tempdir().unwrap();
        let outside = base.path().join("outside");
        fs::create_dir_all(outside.join("deep/er")).unwrap();
        fs::write(outside.join("file"), "sentinel").unwrap();
        fs::write(outside.join("deep/er/file"), "sentinel").unwrap();
        symlink("deep", outside.join("link")).unwrap();
        let dirs = ImageDirs::new(&base.path().join("cache"));
        let before = view::directory(&outside);
        Some(Self { base, dirs, before })
    }

    /// A directory that no import may change.
    pub(crate) fn outside(&self) -> PathBuf {
        self.base.path().join("outside")
    }

    /// A place for things of the test.
    pub(crate) fn place(&self, name: &str) -> PathBuf {
        self.base.path().join(name)
    }

    pub(crate) fn import_with(
        &self,
        archive: &[u8],
        limits: &ImportLimits,
    ) -> Result<(ImportedImage, BlobLease), ImageError> {
        let mut input = archive;
        let imported = import(&mut input, &self.dirs, limits, &|_| {}, &|| false);
        self.check();
        if let Ok((image, lease)) = &imported {
            assert_eq!(lease.path(), image.rootfs_path);
            assert!(fs::metadata(&image.rootfs_path).unwrap().len() > 0);
        }
        imported
    }

    pub(crate) fn import(&self, archive: &[u8]) -> Result<ImportedImage, ImageError> {
        self.import_with(archive, &ImportLimits::default()).map(|(image, _)| image)
    }

    /// Imports what is wished for.
    pub(crate) fn wished(
        &self,
        archive: &[u8],
        wish: &ImportWish,
    ) -> Result<Vec<Imported>, ImageError> {
        let (mut input, limits) = (archive, ImportLimits::default());
        let all =
            matchlock_host::image::import(&mut input, &self.dirs, &limits, wish, &|_| {}, &|| {
                false
            });
        self.check();
        all
    }

    /// Imports an image and looks into the result.
    pub(crate) fn unpacked(&self, image: &Image) -> View {
        let imported = self.import(&image.saved()).unwrap();
        view::erofs(&imported.rootfs_path)
    }

    /// Imports an image that must be refused; no blob may come of it.
    pub(crate) fn refused(&self, archive: &[u8]) -> ImageError {
        let before = self.blobs();
        let error = self.import(archive).map(|image| panic!("accepted: {image:?}")).unwrap_err();
        assert_eq!(self.blobs(), before, "{error}");
        error
    }

    pub(crate) fn blobs(&self) -> Vec<PathBuf> {
        list(&self.dirs.blobs())
    }

    /// Nothing temporary is left, nothing outside was touched.
    pub(crate) fn check(&self) {
        assert_eq!(list(&self.dirs.tmp()), Vec::<PathBuf>::new());
        assert_eq!(view::directory(&self.outside()), self.before);
    }
}

fn list(directory: &Path) -> Vec<PathBuf> {
    let mut found: Vec<_> = match fs::read_dir(directory) {
        Ok(entries) => entries.map(|entry| entry.unwrap().path()).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => panic!("{error}"),
    };
    found.sort();
    found
}
