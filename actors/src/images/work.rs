//! The work itself, on blocking threads.

use std::ffi::OsStr;
use std::path::Path;

use matchlock_failpoints::mutated;
use matchlock_host::image::content::{self, Partials};
use matchlock_host::image::{self, Garbages, ImageError, ImportWish, Imported, ImportedImage};
use matchlock_host::registry::RegistryError;
use matchlock_model::failure::{Failure, FailureKind, chain};
use matchlock_model::image::{ImageRecord, ImageScope};
use matchlock_store::{ImageConn, ImageReader, open_images};
use ractor::RpcReplyPort;
use tokio_util::sync::CancellationToken;

use super::actor::{ImagesArgs, ImportInput, RemovedImage, TaggedImport};
use super::pull::{sweep_content, sweep_unneeded};

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
    let mut failure = Failure::from_error(kind, error);
    if error.is_full() && !matches!(error, ImageError::NoSpace { .. }) {
        failure.message.push_str("; `matchlock image gc` removes what no image needs");
    }
    failure
}

pub(super) fn store_failure(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::from_error(FailureKind::Host, error).context("could not use the image metadata")
}

pub(super) fn import(
    args: &ImagesArgs,
    mut input: ImportInput,
    wish: &ImportWish,
    cancel: &CancellationToken,
) -> Result<Vec<TaggedImport>, Failure> {
    // Opened first: an import that could not be recorded is refused before its work.
    let mut metadata = open_images(&args.dirs.images).map_err(|e| store_failure(&e))?;
    if let Err(error) = image::sweep_temporary(&args.dirs) {
        tracing::warn!(%error, "what an earlier import left could not be swept");
    }
    let progress = |step| tracing::info!(?step, "import");
    let cancelled = || cancel.is_cancelled();
    // Each lease keeps a removal of the same blob away until its rows are there.
    let imported =
        image::import(&mut *input, &args.dirs, &args.limits, wish, &progress, &cancelled)
            .map_err(|e| image_failure(&e))?;
    for Imported { image, tags, .. } in &imported {
        for tag in tags {
            put(args, &mut metadata, image, tag)?;
        }
    }
    let told =
        imported.into_iter().map(|Imported { image, tags, .. }| TaggedImport { tags, image });
    Ok(told.collect())
}

/// What a sweep beside other work could not do; `gc` tries again.
pub(super) fn report(found: &Garbages) {
    for error in &found.errors {
        tracing::warn!(
            error = error as &dyn std::error::Error,
            "downloads of a removed image stay for now"
        );
    }
}

/// Writes the row of an imported image.
fn put(
    args: &ImagesArgs,
    metadata: &mut ImageConn,
    image: &ImportedImage,
    tag: &str,
) -> Result<(), Failure> {
    let now = (args.now)();
    let record = ImageRecord {
        scope: ImageScope::Local,
        tag: tag.to_owned(),
        digest: image.digest.clone(),
        size: image.size,
        created_at: now,
        source: "import".into(),
        rootfs_path: image.rootfs_path.to_string_lossy().into_owned(),
        layers: image.diff_ids.clone(),
        config: image.config.clone(),
    };
    let replaced =
        metadata.put_image(&record, &image.rootfs_digest, now).map_err(|e| store_failure(&e))?;
    forget_replaced(args, metadata, replaced, &record);
    Ok(())
}

/// Removes the blob of an image whose tag means another one now.
fn forget_replaced(
    args: &ImagesArgs,
    metadata: &ImageConn,
    replaced: Option<matchlock_store::RemovedImage>,
    by: &ImageRecord,
) {
    if let Some(replaced) = replaced
        && replaced.record.rootfs_path != by.rootfs_path
        // In use by a VM, it stays until a sweep after that.
        && let Err(failure) = remove_unwanted(args, metadata, &replaced.record)
    {
        tracing::warn!(%failure, "the blob of the replaced image stays");
    }
}

fn image_not_found(tag: &str) -> Failure {
    Failure::new(FailureKind::NotFound, format!("image not found: {tag:?}"))
}

pub(super) fn tag(args: &ImagesArgs, source: &str, tag: &str) -> Result<ImageRecord, Failure> {
    if matchlock_store::read_images(&args.dirs.images).map_err(|e| store_failure(&e))?.is_none() {
        return Err(image_not_found(source));
    }
    let mut metadata = open_images(&args.dirs.images).map_err(|e| store_failure(&e))?;
    // No lease is needed: whoever removes a blob has first seen, in a transaction, that no row
    // names it, and this row comes from one that does.
    let tagged = metadata.tag_image(source, tag, (args.now)()).map_err(|e| store_failure(&e))?;
    let tagged = tagged.ok_or_else(|| image_not_found(source))?;
    forget_replaced(args, &metadata, tagged.replaced, &tagged.record);
    Ok(tagged.record)
}

pub(super) fn remove(args: &ImagesArgs, tag: &str) -> Result<RemovedImage, Failure> {
    let not_found = || image_not_found(tag);
    if matchlock_store::read_images(&args.dirs.images).map_err(|e| store_failure(&e))?.is_none() {
        return Err(not_found());
    }
    let mut metadata = open_images(&args.dirs.images).map_err(|e| store_failure(&e))?;
    let record = metadata.find(tag).map_err(|e| store_failure(&e))?.ok_or_else(not_found)?;
    // Of an image that has another tag nothing is lost, also not for a VM that runs from it.
    let shared = metadata.remove_shared_image(record.scope, &record.tag, (args.now)());
    if shared.map_err(|e| store_failure(&e))?.is_some() {
        return Ok(RemovedImage { record, blob_removed: false });
    }
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
        report(&sweep_unneeded(args));
    }
    Ok(RemovedImage { record, blob_removed: blob.map_err(|e| image_failure(&e))? })
}

pub(super) fn sweep(args: &ImagesArgs, dry_run: bool) -> Garbages {
    // What was not finished needs no metadata, and on a full disk these can be read only after it has
    // made room.
    let mut found = image::sweep_workspaces(&args.dirs, dry_run);
    found.add(content::sweep(&args.dirs, Partials::Remove, dry_run, &mut |_| true));
    match matchlock_store::read_images(&args.dirs.images) {
        Ok(metadata) => {
            found.add(sweep_content(args, metadata.as_ref(), dry_run));
            match metadata {
                Some(metadata) => found.add(sweep_unnamed(args, &metadata, dry_run)),
                None => found.errors.extend(nameless(args)),
            }
        }
        Err(error) => found.errors.push(unreadable(args, chain(&error))),
    }
    found
}

/// Blobs that no row names.
fn sweep_unnamed(args: &ImagesArgs, metadata: &ImageReader, dry_run: bool) -> Garbages {
    let mut failed = None;
    let mut is_wanted = |name: &OsStr| match metadata.list() {
        // By name: the cache may have been reached by another path then.
        Ok(images) => {
            images.iter().any(|image| Path::new(&image.rootfs_path).file_name() == Some(name))
        }
        Err(error) => {
            failed.get_or_insert(error);
            true
        }
    };
    let mut found = image::sweep_blobs(&args.dirs, dry_run, &mut is_wanted);
    found.errors.extend(failed.map(|error| unreadable(args, chain(&error))));
    found
}

pub(super) fn unreadable(args: &ImagesArgs, why: String) -> ImageError {
    ImageError::File {
        doing: "read",
        path: args.dirs.metadata(),
        source: std::io::Error::other(why),
    }
}

/// Without metadata nobody can tell which blobs are wanted: that is an error where there are some.
fn nameless(args: &ImagesArgs) -> Option<ImageError> {
    let mut count = 0;
    let mut found = image::sweep_blobs(&args.dirs, true, &mut |_| {
        count += 1;
        true
    });
    if count == 0 {
        return found.errors.pop();
    }
    let text = format!("it is missing, so nobody can tell which of {count} blobs are wanted");
    Some(unreadable(args, text))
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
