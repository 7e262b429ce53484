//! The import from end to end; see the module above for the picture.
//!
//! # Invariants
//! 1. The blob is locked for its user from before it has its name.
//! 2. A blob that is there is not built again, but the archive is verified all the same: success
//!    means that the archive was whole.
//! 3. The workspace is removed before the answer, whatever the answer is.

use std::fs::{File, Permissions};
use std::io::Read;
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use matchlock_model::image::{InvalidTag, check_tag};
use matchlock_model::platform::Platform;
use rustix::fs::{Mode, RenameFlags, renameat_with};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::archive::{self, Archive, Content, Spooled};
use super::blob::{self, BlobLease};
use super::config::{self, Parsed};
use super::content::{self, BuildLock};
use super::layer::Layers;
use super::room;
use super::select::{self, Selected};
use super::stream::{Budget, Context, Stream, plain};
use super::tree::Tree;
use super::wish::ImportWish;
use super::workspace::{DIRECTORY, Workspace, empty, failed, make_private, sweep_temporary};
use super::{ImageDirs, ImageError, ImportLimits, ImportProgress, ImportedImage, POINTS, erofs};

/// How often it is looked whether another process has built a root filesystem.
const COME_AGAIN: Duration = Duration::from_millis(20);

/// How often a blob that another process is just removing is looked at again.
const PATIENCE: u32 = 10_000;

/// An image that was imported, and under which names.
#[derive(Debug)]
pub struct Imported {
    /// What it is.
    pub image: ImportedImage,
    /// The tags that it gets, at least one.
    pub tags: Vec<String>,
    /// Keep it until the rows that name the blob are committed: a blob that no row names may be
    /// pruned by another process.
    pub lease: BlobLease,
}

/// Imports what a stream holds: an archive of images (docker-save or OCI layout) or the files of a
/// root filesystem; plain, gzip or zstd. At least one image is answered.
///
/// This blocks for as long as the archive takes; run it on a thread for blocking work, and do not
/// end that thread early (mkfs.erofs dies with it). `progress` is called on it now and then.
/// `cancelled` is asked before each read and each file; it cannot interrupt a read that waits for
/// `input`.
///
/// # Errors
/// [`ImageError`] says what was wrong and with what. Nothing of the import is left then, but the
/// rest of `input` is unread, and images of the archive that were made before may be there as blobs
/// that nothing names.
pub fn import(
    input: &mut dyn Read,
    dirs: &ImageDirs,
    limits: &ImportLimits,
    wish: &ImportWish,
    progress: &dyn Fn(ImportProgress),
    cancelled: &dyn Fn() -> bool,
) -> Result<Vec<Imported>, ImageError> {
    let context = Context { limits: *limits, progress, cancelled };
    with_workspace(dirs, |dirs, workspace| in_workspace(input, dirs, workspace, wish, &context))
}

/// Only root can give files their owners.
pub(super) fn check_root() -> Result<(), ImageError> {
    if rustix::process::geteuid().is_root() { Ok(()) } else { Err(ImageError::NeedsRoot) }
}

/// Works in a private directory, which is gone afterwards; `work` is given the absolute directories.
pub(super) fn with_workspace<T>(
    dirs: &ImageDirs,
    work: impl FnOnce(&ImageDirs, &Workspace) -> Result<T, ImageError>,
) -> Result<T, ImageError> {
    check_root()?;
    let dirs = dirs.absolute()?;
    make_private(&dirs.blobs())?;
    if let Err(error) = sweep_temporary(&dirs) {
        // It is in nobody's way; `gc` tries again and reports.
        tracing::warn!(error = &error as &dyn std::error::Error, "could not sweep old imports");
    }
    let at = |error| failed("work below", &dirs.images, error);
    POINTS.before("make_workspace").map_err(at)?;
    let workspace = Workspace::create(&dirs)?;
    POINTS.after("make_workspace").map_err(at)?;
    let done = work(&dirs, &workspace);
    if let Err(error) = remove(workspace) {
        // The answer stands; the directory is unlocked now and the next sweep takes it.
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "could not remove what an import used"
        );
    }
    done
}

fn remove(workspace: Workspace) -> Result<(), ImageError> {
    let path = workspace.path().to_owned();
    let at = |error| failed("remove", &path, error);
    POINTS.before("remove_workspace").map_err(at)?;
    workspace.remove()?;
    POINTS.after("remove_workspace").map_err(at)
}

/// An image as it was picked out of what came in.
struct Picked {
    parsed: Parsed,
    /// `sha256:` and 64 hex digits: the config's.
    digest: String,
    /// Lowest first.
    layers: Vec<Spooled>,
    tags: Vec<String>,
}

/// What all images of one import may take together.
struct Budgets {
    unpacked: Budget,
    entries: Budget,
    files: Budget,
}

impl Budgets {
    fn new(limits: &ImportLimits) -> Self {
        Self {
            unpacked: Budget::bytes(limits.max_bytes, "unpacked layers"),
            entries: Budget::count(limits.max_entries, "files in the image"),
            files: Budget::bytes(limits.max_bytes, "unpacked files"),
        }
    }
}

fn in_workspace(
    input: &mut dyn Read,
    dirs: &ImageDirs,
    workspace: &Workspace,
    wish: &ImportWish,
    context: &Context<'_>,
) -> Result<Vec<Imported>, ImageError> {
    let received = Budget::bytes(context.limits.max_bytes, "archive");
    let picked = match archive::spool(input, workspace, context, &received)? {
        Content::Images(archive) => of_archive(&archive, wish, &context.limits)?,
        Content::Rootfs(layer) => vec![of_rootfs(layer, wish)?],
    };
    let budgets = Budgets::new(&context.limits);
    let mut imported = Vec::new();
    let count = picked.len();
    for (index, picked) in picked.into_iter().enumerate() {
        let place = Place { workspace, dirs, index, is_last: index + 1 == count };
        let lock = place.right_to_build(&picked, context)?;
        let made = place.one(picked, &budgets, context);
        // A failed build lets the next one try.
        let released = lock.map_or(Ok(()), BuildLock::release);
        imported.push(made?);
        released?;
    }
    Ok(imported)
}

fn of_archive(
    archive: &Archive,
    wish: &ImportWish,
    limits: &ImportLimits,
) -> Result<Vec<Picked>, ImageError> {
    if !wish.changes.is_empty() {
        let what = "--change is for the files of a root filesystem; this is an archive of images, \
                    which say themselves how they are run";
        return Err(ImageError::Wish { what: what.into() });
    }
    let platform = wish.platform.clone().unwrap_or_else(Platform::host);
    let mut all = Vec::new();
    for Selected { config, layers, names } in select::select(archive, wish, limits.max_layers)? {
        let parsed = config::parse_for(&archive.text(&config)?, &platform)?;
        check_count(layers.len(), &parsed)?;
        let tags = wish.tag.clone().map_or(names, |tag| vec![tag]);
        for tag in &tags {
            let what = |error: InvalidTag| plain(&error.to_string());
            check_tag(tag).map_err(|error| ImageError::Damaged { what: what(error) })?;
        }
        all.push(Picked { parsed, digest: format!("sha256:{}", config.sha256), layers, tags });
    }
    Ok(all)
}

/// Each layer has its diff id.
pub(super) fn check_count(layers: usize, parsed: &Parsed) -> Result<(), ImageError> {
    let ids = parsed.diff_ids.len();
    if layers == ids {
        return Ok(());
    }
    let what = format!("it has {layers} layers, and its config lists {ids}");
    Err(ImageError::Damaged { what })
}

/// Makes the root filesystem of an image whose layers are here, or finds it made.
pub(super) fn assemble(
    config_sha256: &str,
    parsed: Parsed,
    layers: Vec<Spooled>,
    dirs: &ImageDirs,
    workspace: &Workspace,
    context: &Context<'_>,
) -> Result<(ImportedImage, BlobLease), ImageError> {
    check_count(layers.len(), &parsed)?;
    let digest = format!("sha256:{config_sha256}");
    let picked = Picked { parsed, digest, layers, tags: Vec::new() };
    let place = Place { workspace, dirs, index: 0, is_last: true };
    let Imported { image, lease, .. } =
        place.one(picked, &Budgets::new(&context.limits), context)?;
    Ok((image, lease))
}

fn of_rootfs(layer: Spooled, wish: &ImportWish) -> Result<Picked, ImageError> {
    let Some(tag) = wish.tag.clone() else {
        let what = "these are the files of a root filesystem, which has no name: say which tag it \
                    gets";
        return Err(ImageError::Wish { what: what.into() });
    };
    if wish.platform.as_ref().is_some_and(|platform| *platform != Platform::host()) {
        let what = format!("a root filesystem is taken for one of {}", Platform::host());
        return Err(ImageError::Wish { what });
    }
    let text = config::of_rootfs(&layer.sha256, &wish.changes);
    let digest = format!("sha256:{}", hex::encode(Sha256::digest(&text)));
    Ok(Picked { parsed: config::parse(&text)?, digest, layers: vec![layer], tags: vec![tag] })
}

/// Where one image of an import is made.
struct Place<'w> {
    workspace: &'w Workspace,
    dirs: &'w ImageDirs,
    /// Which of the import.
    index: usize,
    is_last: bool,
}

impl Place<'_> {
    /// Waits until nobody else builds the same root filesystem; `None` once it is there.
    fn right_to_build(
        &self,
        picked: &Picked,
        context: &Context<'_>,
    ) -> Result<Option<BuildLock>, ImageError> {
        let content = picked.parsed.squashed();
        let mut told = false;
        loop {
            if let Some(lock) = content::lock_build(self.dirs, &content)? {
                return Ok(Some(lock));
            }
            match BlobLease::take(&self.dirs.blob(&content)) {
                Ok(_) => return Ok(None),
                Err(ImageError::NoBlob { .. }) => {}
                Err(error) => return Err(error),
            }
            if !std::mem::replace(&mut told, true) {
                tracing::info!(content, "another process builds the same root filesystem");
            }
            if (context.cancelled)() {
                return Err(ImageError::Cancelled);
            }
            #[expect(
                clippy::disallowed_methods,
                reason = "flock has no deadline, and a cancelled import waits for nobody"
            )]
            std::thread::sleep(COME_AGAIN);
        }
    }

    fn one(
        &self,
        picked: Picked,
        budgets: &Budgets,
        context: &Context<'_>,
    ) -> Result<Imported, ImageError> {
        let content = picked.parsed.squashed();
        let blob = self.dirs.blob(&content);
        let lease = match BlobLease::take(&blob) {
            Ok(lease) => {
                each_layer(&picked, &budgets.unpacked, context, |_| Ok(()))?;
                (context.progress)(ImportProgress::Reused);
                lease
            }
            Err(ImageError::NoBlob { .. }) => {
                let tree = self.unpack(&picked, budgets, context)?;
                self.publish(&tree, &content, &blob, context)?
            }
            Err(error) => return Err(error),
        };
        let image = ImportedImage {
            digest: picked.digest,
            rootfs_path: blob,
            rootfs_digest: format!("sha256:{content}"),
            size: lease.size(),
            layers: picked.layers.len(),
            diff_ids: picked.parsed.diff_ids,
            config: picked.parsed.config,
        };
        Ok(Imported { image, tags: picked.tags, lease })
    }

    fn unpack(
        &self,
        picked: &Picked,
        budgets: &Budgets,
        context: &Context<'_>,
    ) -> Result<PathBuf, ImageError> {
        let directory = |name: &str| self.workspace.directory(&format!("{name}-{}", self.index));
        let path = directory("rootfs")?;
        let tree = Tree::new(path.clone(), directory("trash")?, &budgets.entries)?;
        let mut layers = Layers::new(tree, context, &budgets.entries, &budgets.files);
        each_layer(picked, &budgets.unpacked, context, |stream| layers.apply(stream))?;
        Ok(path)
    }

    /// Makes the EROFS and gives it its name, once all of it is on disk.
    fn publish(
        &self,
        tree: &Path,
        content: &str,
        blob: &Path,
        context: &Context<'_>,
    ) -> Result<BlobLease, ImageError> {
        (context.progress)(ImportProgress::Building);
        if self.is_last {
            // The layers are not needed any more, and the disk may be short.
            let spool = self.workspace.path().join("spool");
            match std::fs::remove_dir_all(&spool) {
                // Pulled layers lie elsewhere.
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(failed("remove", &spool, error));
                }
                _ => {}
            }
        }
        let measured = room::measure(tree, context)?;
        measured.check_memory(context.limits.max_build_memory)?;
        room::check_at(self.workspace.path(), measured.bytes)?;
        let made = self.workspace.path().join("out.erofs");
        POINTS.before("build").map_err(|error| failed("make", &made, error))?;
        erofs::build(tree, &made, content, context)?;
        let fail = |error| failed("sync", &made, error);
        let file = File::open(&made).map_err(fail)?;
        file.set_permissions(Permissions::from_mode(0o400)).map_err(fail)?;
        file.sync_all().map_err(fail)?;
        POINTS.after("build").map_err(|error| failed("make", &made, error))?;
        context.check()?;
        let lease = BlobLease::take(&made)?;
        let lease = name_blob(&made, lease, blob, self.dirs)?;
        // The next image may need the room. What another import was faster with lies there still.
        remove_tree(tree)?;
        match std::fs::remove_file(&made) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(failed("remove", &made, error))
            }
            _ => Ok(lease),
        }
    }
}

fn remove_tree(tree: &Path) -> Result<(), ImageError> {
    let fail = |error: Errno| failed("open", tree, error);
    let top = rustix::fs::open(tree, DIRECTORY, Mode::empty()).map_err(fail)?;
    empty(top.as_fd(), tree)
}

/// Opens each layer in turn and checks, after it was used, that it was what the config says.
fn each_layer(
    picked: &Picked,
    unpacked: &Budget,
    context: &Context<'_>,
    mut apply: impl FnMut(&mut Stream<'_>) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    let of = picked.layers.len();
    for (index, (layer, id)) in picked.layers.iter().zip(&picked.parsed.diff_ids).enumerate() {
        let number = index + 1;
        (context.progress)(ImportProgress::Layer { number, of });
        let blame = |error| failed("read", &layer.path, error);
        let name = format!("layer {number} of {of}");
        let mut stream = Stream::open(name.clone(), layer.open()?, blame, context, unpacked)?;
        apply(&mut stream)?;
        let (found, _) = stream.finish()?;
        if format!("sha256:{found}") != *id {
            let what = format!("the content of {name} has the digest sha256:{found}, not {id}");
            return Err(ImageError::Damaged { what });
        }
    }
    Ok(())
}

/// Gives a finished file its name among the blobs, unless the same content has it already.
fn name_blob(
    made: &Path,
    lease: BlobLease,
    blob: &Path,
    dirs: &ImageDirs,
) -> Result<BlobLease, ImageError> {
    let cwd = rustix::fs::CWD;
    let at = |error| failed("create", blob, error);
    POINTS.before("name_blob").map_err(at)?;
    for _ in 0..PATIENCE {
        match renameat_with(cwd, made, cwd, blob, RenameFlags::NOREPLACE) {
            Ok(()) => {
                let blobs = dirs.blobs();
                let synced = File::open(&blobs).and_then(|directory| directory.sync_all());
                synced.map_err(|error| failed("sync", blobs, error))?;
                POINTS.after("name_blob").map_err(at)?;
                return Ok(lease.moved(blob));
            }
            Err(Errno::EXIST) => {}
            Err(error) => return Err(failed("create", blob, error)),
        }
        // Another import was faster, or somebody is just removing the blob, or a crash of the
        // machine has left an empty file.
        match BlobLease::take(blob) {
            Ok(theirs) => return Ok(theirs),
            Err(ImageError::NoBlob { .. }) => {}
            Err(error) => return Err(error),
        }
        match blob::remove_empty(dirs, blob) {
            Ok(()) => {}
            Err(ImageError::InUse { .. }) => std::thread::yield_now(),
            Err(error) => return Err(error),
        }
    }
    Err(failed("replace", blob, std::io::Error::from(std::io::ErrorKind::WouldBlock)))
}
