//! The work itself, on blocking threads.

use std::ffi::OsStr;
use std::path::Path;

use matchlock_failpoints::mutated;
use matchlock_host::image::content::Partials;
use matchlock_host::image::{self, ImageError, ImportedImage};
use matchlock_host::registry::RegistryError;
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::image::{ImageRecord, ImageScope};
use matchlock_store::{ImageConn, open_images};
use ractor::RpcReplyPort;
use tokio_util::sync::CancellationToken;

use super::actor::{ImagesArgs, ImportInput, RemovedImage};
use super::pull::sweep_content;

/// Runs blocking work beside the actor and answers its caller.
pub(super) fn spawn<T: Send + 'static>(
    reply: RpcReplyPort<Result<T, Failure>>,
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) {
    drop(tokio::task::spawn_blocking(move || {
        if reply.send(work()).is_err() {
            tracing::debug!("the caller was gone before its answer");
        }
    }));
}

pub(super) fn image_failure(error: &ImageError) -> Failure {
    let kind = match error {
        ImageError::Cancelled => FailureKind::Cancelled,
        ImageError::Registry(
            RegistryError::NoImage { .. }
            | RegistryError::NoTag { .. }
            | RegistryError::Denied { .. },
        ) => FailureKind::NotFound,
        _ => FailureKind::Host,
    };
    Failure::from_error(kind, error)
}

pub(super) fn store_failure(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::from_error(FailureKind::Host, error).context("could not use the image metadata")
}

pub(super) fn import(
    args: &ImagesArgs,
    mut input: ImportInput,
    tag: String,
    cancel: &CancellationToken,
) -> Result<ImportedImage, Failure> {
    // Opened first: an import that could not be recorded is refused before its work.
    let mut metadata = open_images(&args.dirs.images).map_err(|e| store_failure(&e))?;
    if let Err(error) = image::sweep_temporary(&args.dirs) {
        tracing::warn!(%error, "what an earlier import left could not be swept");
    }
    let progress = |step| tracing::info!(?step, "import");
    let cancelled = || cancel.is_cancelled();
    // The lease keeps a removal of the same blob away until its row is there.
    let (imported, _lease) =
        image::import(&mut *input, &args.dirs, &args.limits, &progress, &cancelled)
            .map_err(|e| image_failure(&e))?;
    let now = (args.now)();
    let record = ImageRecord {
        scope: ImageScope::Local,
        tag,
        digest: imported.digest.clone(),
        size: imported.size,
        created_at: now,
        source: "import".into(),
        rootfs_path: imported.rootfs_path.to_string_lossy().into_owned(),
        config: imported.config.clone(),
    };
    let replaced =
        metadata.put_image(&record, &imported.rootfs_digest, now).map_err(|e| store_failure(&e))?;
    if let Some(replaced) = replaced
        && replaced.record.rootfs_path != record.rootfs_path
    {
        // In use by a VM, it stays until an image that uses it is removed.
        if let Err(failure) = remove_unwanted(args, &metadata, &replaced.record) {
            tracing::warn!(%failure, "the blob of the replaced image stays");
        }
    }
    Ok(imported)
}

pub(super) fn remove(args: &ImagesArgs, tag: &str) -> Result<RemovedImage, Failure> {
    let not_found = || Failure::new(FailureKind::NotFound, format!("image not found: {tag:?}"));
    if matchlock_store::read_images(&args.dirs.images).map_err(|e| store_failure(&e))?.is_none() {
        return Err(not_found());
    }
    let mut metadata = open_images(&args.dirs.images).map_err(|e| store_failure(&e))?;
    let record = metadata.find(tag).map_err(|e| store_failure(&e))?.ok_or_else(not_found)?;
    // Under the blob's lock: if a VM uses it, the image stays whole; and no crash leaves a row
    // without its blob.
    let mut removed = None;
    let mut is_wanted = || {
        if mutated("remove_blob_first") {
            return false;
        }
        let row = metadata.remove_image(Some(record.scope), &record.tag, (args.now)());
        let unwanted = matches!(&row, Ok(Some(row)) if !row.blob_in_use);
        removed = Some(row);
        !unwanted
    };
    let blob = image::remove_blob(&args.dirs, Path::new(&record.rootfs_path), &mut is_wanted);
    let row = match (removed, &blob) {
        (Some(row), _) => row,
        // The blob is gone already.
        (None, Ok(_)) => metadata.remove_image(Some(record.scope), &record.tag, (args.now)()),
        (None, Err(error)) => return Err(image_failure(error)),
    };
    row.map_err(|e| store_failure(&e))?.ok_or_else(not_found)?;
    if record.scope == ImageScope::Registry {
        sweep_content(args, Partials::Keep)?;
    }
    Ok(RemovedImage { record, blob_removed: blob.map_err(|e| image_failure(&e))? })
}

pub(super) fn sweep(args: &ImagesArgs) -> Result<usize, Failure> {
    let temporary = image::sweep_temporary(&args.dirs).map_err(|e| image_failure(&e))?.removed;
    let metadata =
        matchlock_store::read_images(&args.dirs.images).map_err(|e| store_failure(&e))?;
    // Without metadata nobody can tell which blobs are wanted.
    let Some(metadata) = metadata else { return Ok(temporary) };
    let mut unreadable = None;
    let mut is_wanted = |name: &OsStr| match metadata.list() {
        // By name: the cache may have been reached by another path then.
        Ok(images) => {
            images.iter().any(|image| Path::new(&image.rootfs_path).file_name() == Some(name))
        }
        Err(error) => {
            unreadable.get_or_insert_with(|| store_failure(&error));
            true
        }
    };
    let blobs = image::sweep_blobs(&args.dirs, &mut is_wanted);
    match (blobs, unreadable) {
        (_, Some(failure)) => Err(failure),
        (Err(error), None) => Err(image_failure(&error)),
        (Ok(blobs), None) => Ok(temporary + blobs + sweep_content(args, Partials::Remove)?),
    }
}

/// Removes the blob of an image that has no row any more, unless another image uses it.
pub(super) fn remove_unwanted(
    args: &ImagesArgs,
    metadata: &ImageConn,
    image: &ImageRecord,
) -> Result<(), Failure> {
    let mut unreadable = None;
    let mut is_wanted = || match metadata.list() {
        Ok(images) => images.iter().any(|other| other.rootfs_path == image.rootfs_path),
        Err(error) => {
            unreadable = Some(store_failure(&error));
            true
        }
    };
    let removed = image::remove_blob(&args.dirs, Path::new(&image.rootfs_path), &mut is_wanted);
    match (removed, unreadable) {
        (_, Some(failure)) => Err(failure),
        (Err(error), None) => Err(image_failure(&error)),
        (Ok(_), None) => Ok(()),
    }
}
