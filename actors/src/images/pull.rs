//! The pull: what `host::image::pull` gets, joined to its row; and the removal of what was downloaded.

use std::collections::HashMap;
use std::sync::Arc;

use matchlock_host::image::content::{self, Partials};
use matchlock_host::image::{self, Garbages, ImageError, ImportedImage, PullRequest, TellPull};
use matchlock_model::failure::{Failure, FailureKind, chain};
use matchlock_model::image::{ImageRecord, ImageScope};
use matchlock_store::{ImageReader, open_images};
use ractor::RpcReplyPort;
use tokio_util::sync::CancellationToken;

use super::actor::ImagesArgs;
use super::work::{image_failure, remove_unwanted, report, store_failure, unreadable};

/// What a pull has brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    /// Its row.
    pub record: ImageRecord,
    /// How many layers it has.
    pub layers: usize,
    /// Whether the row is new or changed: else the registry has what was here already.
    pub is_new: bool,
}

/// Pulls beside the actor and answers its caller.
pub(super) fn spawn(
    args: Arc<ImagesArgs>,
    request: PullRequest,
    tell: TellPull,
    cancel: CancellationToken,
    reply: RpcReplyPort<Result<Pulled, Failure>>,
) {
    drop(tokio::spawn(async move {
        let pulled = pull(&args, &request, &tell, &cancel).await;
        if reply.send(pulled).is_err() {
            tracing::debug!("the caller was gone before its answer");
        }
    }));
}

async fn pull(
    args: &Arc<ImagesArgs>,
    request: &PullRequest,
    tell: &TellPull,
    cancel: &CancellationToken,
) -> Result<Pulled, Failure> {
    // First: a pull that could not be recorded is refused before its work.
    let prepared = Arc::clone(args);
    aside(move || {
        if let Err(error) = image::sweep_temporary(&prepared.dirs) {
            tracing::warn!(%error, "what an earlier import left could not be swept");
        }
        open_images(&prepared.dirs.images).map(drop).map_err(|e| store_failure(&e))
    })
    .await?;
    let got = image::pull(request, &args.registries, &args.dirs, &args.limits, tell, cancel).await;
    let got = got.map_err(|e| image_failure(&e))?;
    let (args, tag) = (Arc::clone(args), request.image.to_string());
    aside(move || {
        // The leases keep removals away until the row is there.
        let (_lease, _content) = (&got.lease, &got.content);
        record(&args, tag, &got.image)
    })
    .await
}

async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(Failure::from_error(FailureKind::Internal, &error)))
}

fn record(args: &ImagesArgs, tag: String, image: &ImportedImage) -> Result<Pulled, Failure> {
    let mut metadata = open_images(&args.dirs.images).map_err(|e| store_failure(&e))?;
    let now = (args.now)();
    let record = ImageRecord {
        scope: ImageScope::Registry,
        tag,
        digest: image.digest.clone(),
        size: image.size,
        created_at: now,
        source: "registry".into(),
        rootfs_path: image.rootfs_path.to_string_lossy().into_owned(),
        layers: image.diff_ids.clone(),
        config: image.config.clone(),
    };
    let layers = image.layers;
    let known = metadata.list().map_err(|e| store_failure(&e))?;
    let known = known.into_iter().find(|known| {
        let at = known.created_at;
        *known == ImageRecord { created_at: at, ..record.clone() }
    });
    if let Some(record) = known {
        return Ok(Pulled { record, layers, is_new: false });
    }
    let replaced =
        metadata.put_image(&record, &image.rootfs_digest, now).map_err(|e| store_failure(&e))?;
    if let Some(replaced) = replaced {
        // What stays here is swept by `gc`; the image is there all the same.
        if replaced.record.rootfs_path != record.rootfs_path
            && let Err(failure) = remove_unwanted(args, &metadata, &replaced.record)
        {
            tracing::warn!(%failure, "the blob of the replaced image stays");
        }
        report(&sweep_unneeded(args));
    }
    Ok(Pulled { record, layers, is_new: true })
}

/// Removes downloads that no image needs any more, now that one is gone.
pub(super) fn sweep_unneeded(args: &ImagesArgs) -> Garbages {
    match matchlock_store::read_images(&args.dirs.images) {
        Ok(metadata) => sweep_content(args, metadata.as_ref(), false),
        Err(error) => {
            Garbages { errors: vec![unreadable(args, chain(&error))], ..Garbages::default() }
        }
    }
}

/// Removes downloads that no pulled image needs and nobody holds, or finds them. What is on its way
/// stays.
pub(super) fn sweep_content(
    args: &ImagesArgs,
    metadata: Option<&ImageReader>,
    dry_run: bool,
) -> Garbages {
    let mut needed = HashMap::new();
    let mut failure = None;
    let mut is_wanted = |hex: &str| {
        let wanted = match metadata {
            Some(metadata) => is_needed(args, metadata, &mut needed, hex),
            // Nothing was ever pulled: what is there belongs to no image.
            None => Ok(false),
        };
        wanted.unwrap_or_else(|error| {
            failure.get_or_insert(error);
            true
        })
    };
    let mut found = content::sweep(&args.dirs, Partials::Keep, dry_run, &mut is_wanted);
    found.errors.extend(failure);
    found
}

/// Whether some pulled image consists of this blob too.
fn is_needed(
    args: &ImagesArgs,
    metadata: &ImageReader,
    needed: &mut HashMap<String, Vec<String>>,
    hex: &str,
) -> Result<bool, ImageError> {
    let rows = metadata.list().map_err(|error| unreadable(args, chain(&error)))?;
    for row in rows.iter().filter(|row| row.scope == ImageScope::Registry) {
        if blobs(args, needed, row)?.iter().any(|blob| blob == hex) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The blobs of an image, read once: what a digest names does not change.
fn blobs<'a>(
    args: &ImagesArgs,
    needed: &'a mut HashMap<String, Vec<String>>,
    row: &ImageRecord,
) -> Result<&'a [String], ImageError> {
    if !needed.contains_key(&row.digest) {
        let blobs = image::blobs_of(&args.dirs, &row.digest)?;
        needed.insert(row.digest.clone(), blobs);
    }
    Ok(needed.get(&row.digest).map_or(&[], Vec::as_slice))
}
