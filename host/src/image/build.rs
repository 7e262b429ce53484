//! The import from end to end; see the module above for the picture.
//!
//! # Invariants
//! 1. The blob is locked for its user from before it has its name.
//! 2. A blob that is there is not built again, but the archive is verified all the same: success
//!    means that the archive was whole.
//! 3. The workspace is removed before the answer, whatever the answer is.

use std::fs::{File, Permissions};
use std::io::Read;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{RenameFlags, renameat_with};
use rustix::io::Errno;

use super::archive::{Archive, Spooled};
use super::blob::{self, BlobLease};
use super::config::{self, Parsed};
use super::layer::Layers;
use super::select::{self, Selected};
use super::stream::{Budget, Context, Stream};
use super::tree::Tree;
use super::workspace::{Workspace, failed, make_private, sweep_temporary};
use super::{ImageDirs, ImageError, ImportLimits, ImportProgress, ImportedImage, POINTS, erofs};

/// How often a blob that another process is just removing is looked at again.
const PATIENCE: u32 = 10_000;

/// Imports an image archive: docker-save or OCI layout, plain, gzip or zstd.
///
/// The blob comes with a lease on it. Keep the lease until the row that names the blob is committed:
/// a blob that no row names may be pruned by another process.
///
/// This blocks for as long as the archive takes; run it on a thread for blocking work, and do not
/// end that thread early (mkfs.erofs dies with it). `progress` is called on it now and then.
/// `cancelled` is asked before each read and each file; it cannot interrupt a read that waits for
/// `input`.
///
/// # Errors
/// [`ImageError`] says what was wrong and with what. Nothing of the import is left then, but the
/// rest of `input` is unread.
pub fn import(
    input: &mut dyn Read,
    dirs: &ImageDirs,
    limits: &ImportLimits,
    progress: &dyn Fn(ImportProgress),
    cancelled: &dyn Fn() -> bool,
) -> Result<(ImportedImage, BlobLease), ImageError> {
    let context = Context { limits: *limits, progress, cancelled };
    with_workspace(dirs, |dirs, workspace| in_workspace(input, dirs, workspace, &context))
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

fn in_workspace(
    input: &mut dyn Read,
    dirs: &ImageDirs,
    workspace: &Workspace,
    context: &Context<'_>,
) -> Result<(ImportedImage, BlobLease), ImageError> {
    let limits = &context.limits;
    let received = Budget::bytes(limits.max_bytes, "archive");
    let archive = Archive::spool(input, workspace, context, &received)?;
    let selected = select::select(&archive, limits.max_layers)?;
    let parsed = config::parse(&archive.text(&selected.config)?)?;
    check_count(selected.layers.len(), &parsed)?;
    assemble(&selected, parsed, dirs, workspace, context)
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

/// Makes the blob of these layers, or finds it made.
pub(super) fn assemble(
    selected: &Selected,
    parsed: Parsed,
    dirs: &ImageDirs,
    workspace: &Workspace,
    context: &Context<'_>,
) -> Result<(ImportedImage, BlobLease), ImageError> {
    let content = parsed.squashed();
    let blob = dirs.blobs().join(format!("sha256_{content}.erofs"));
    let lease = match BlobLease::take(&blob) {
        Ok(lease) => {
            verify(selected, &parsed, context)?;
            (context.progress)(ImportProgress::Reused);
            lease
        }
        Err(ImageError::NoBlob { .. }) => {
            let tree = unpack(selected, &parsed, workspace, context)?;
            publish(&tree, &content, workspace, &blob, dirs, context)?
        }
        Err(error) => return Err(error),
    };
    let image = ImportedImage {
        digest: format!("sha256:{}", selected.config.sha256),
        rootfs_path: blob,
        rootfs_digest: format!("sha256:{content}"),
        size: lease.size(),
        layers: selected.layers.len(),
        config: parsed.config,
    };
    Ok((image, lease))
}

/// Opens each layer in turn and checks, after it was used, that it was what the config says.
fn each_layer(
    selected: &Selected,
    parsed: &Parsed,
    context: &Context<'_>,
    mut apply: impl FnMut(&mut Stream<'_>) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    let unpacked = Budget::bytes(context.limits.max_bytes, "unpacked layers");
    let of = selected.layers.len();
    for (index, (layer, id)) in selected.layers.iter().zip(&parsed.diff_ids).enumerate() {
        let number = index + 1;
        (context.progress)(ImportProgress::Layer { number, of });
        let file = open(layer)?;
        let blame = |error| failed("read", &layer.path, error);
        let name = format!("layer {number} of {of}");
        let mut stream = Stream::open(name.clone(), file, blame, context, &unpacked)?;
        apply(&mut stream)?;
        let found = stream.finish()?;
        if format!("sha256:{found}") != *id {
            let what = format!("the content of {name} has the digest sha256:{found}, not {id}");
            return Err(ImageError::Damaged { what });
        }
    }
    Ok(())
}

fn open(layer: &Spooled) -> Result<File, ImageError> {
    File::open(&layer.path).map_err(|error| failed("open", &layer.path, error))
}

fn verify(selected: &Selected, parsed: &Parsed, context: &Context<'_>) -> Result<(), ImageError> {
    each_layer(selected, parsed, context, |_| Ok(()))
}

fn unpack(
    selected: &Selected,
    parsed: &Parsed,
    workspace: &Workspace,
    context: &Context<'_>,
) -> Result<PathBuf, ImageError> {
    let limits = &context.limits;
    let entries = Budget::count(limits.max_entries, "files in the image");
    let bytes = Budget::bytes(limits.max_bytes, "unpacked files");
    let path = workspace.directory("rootfs")?;
    let tree = Tree::new(path.clone(), workspace.directory("trash")?, &entries)?;
    let mut layers = Layers::new(tree, context, &entries, &bytes);
    each_layer(selected, parsed, context, |stream| layers.apply(stream))?;
    Ok(path)
}

/// Makes the EROFS and gives it its name, once all of it is on disk.
fn publish(
    tree: &Path,
    content: &str,
    workspace: &Workspace,
    blob: &Path,
    dirs: &ImageDirs,
    context: &Context<'_>,
) -> Result<BlobLease, ImageError> {
    (context.progress)(ImportProgress::Building);
    // The layers are not needed any more, and the disk may be short.
    let spool = workspace.path().join("spool");
    match std::fs::remove_dir_all(&spool) {
        // Pulled layers lie elsewhere.
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(failed("remove", &spool, error));
        }
        _ => {}
    }
    let made = workspace.path().join("out.erofs");
    POINTS.before("build").map_err(|error| failed("make", &made, error))?;
    erofs::build(tree, &made, content, context)?;
    let fail = |error| failed("sync", &made, error);
    let file = File::open(&made).map_err(fail)?;
    file.set_permissions(Permissions::from_mode(0o400)).map_err(fail)?;
    file.sync_all().map_err(fail)?;
    POINTS.after("build").map_err(|error| failed("make", &made, error))?;
    context.check()?;
    let lease = BlobLease::take(&made)?;
    name_blob(&made, lease, blob, dirs)
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
