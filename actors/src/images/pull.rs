//! The pull: what `host::image::pull` gets, joined to its row; and the removal of what was downloaded.

use std::collections::HashMap;
use std::sync::Arc;

use matchlock_host::image::content::{self, Partials};
use matchlock_host::image::{self, ImageError, ImportedImage, PullRequest, TellPull};
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::image::{ImageRecord, ImageScope};
use matchlock_store::open_images;
use ractor::RpcReplyPort;
use tokio_util::sync::CancellationToken;

use super::actor::ImagesArgs;
use super::work::{image_failure, remove_unwanted, store_failure};

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
        if let Err(failure) = sweep_content(args, Partials::Keep) {
            tracing::warn!(%failure, "downloads of the replaced image stay");
        }
    }
    Ok(Pulled { record, layers, is_new: true })
}

/// Removes downloads that no pulled image needs and nobody holds; how many.
pub(super) fn sweep_content(args: &ImagesArgs, partials: Partials) -> Result<usize, Failure> {
    let metadata =
        matchlock_store::read_images(&args.dirs.images).map_err(|e| store_failure(&e))?;
    // Without metadata nobody can tell what is wanted.
    let Some(metadata) = metadata else { return Ok(0) };
    let mut needed = HashMap::new();
    let mut failure = None;
    let mut is_wanted = |hex: &str| {
        let rows = match metadata.list() {
            Ok(rows) => rows,
            Err(error) => {
                failure.get_or_insert_with(|| store_failure(&error));
                return true;
            }
        };
        for row in rows.iter().filter(|row| row.scope == ImageScope::Registry) {
            match blobs(args, &mut needed, row) {
                Ok(blobs) if blobs.iter().any(|blob| blob == hex) => return true,
                Ok(_) => {}
                Err(error) => {
                    failure.get_or_insert_with(|| image_failure(&error));
                    return true;
                }
            }
        }
        false
    };
    let swept = content::sweep(&args.dirs, partials, &mut is_wanted);
    match (swept, failure) {
        (_, Some(failure)) => Err(failure),
        (Err(error), None) => Err(image_failure(&error)),
        (Ok(count), None) => Ok(count),
    }
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
