//! A pull: from a name in a registry to a root filesystem.
//!
//! ```text
//!   manifest (index ─► this platform's) ─► content/          digest checked by `registry`
//!     config ─► content/ ─► diff ids ─► is their root filesystem here, and each of
//!                                       these layers known to have its diff id? ── yes ─► done
//!     layers, 4 at a time ─► content/    resumed, tried again, each by one process   │ no
//!     build lock ─► are they by now? ─► `build::assemble`, as for an import ◄────────┘
//!       └─► each layer's diff id noted
//! ```
//!
//! # Invariants
//! 1. Bytes become content only under the digest that the manifest names, and a root filesystem only
//!    under the diff ids that the config names: no word of the registry is believed. Also not the
//!    config's: a root filesystem that is here is used only for layers that are known to be its own,
//!    from bytes that were read here. So whoever only knows the digests of a private image learns
//!    nothing and runs nothing in it.
//! 2. From the moment that a blob is there until the caller has recorded the image, a lease keeps it.
//! 3. What is here is not downloaded again, not even partly.
//!
//! # On error, stop and crash
//! Whole blobs and the beginnings of others stay, without a lease: the next pull goes on with them,
//! `gc` removes them. A cancelled build removes its workspace before the answer.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use matchlock_model::platform::Platform;
use matchlock_model::reference::ImageReference;
use tokio_util::sync::CancellationToken;

use super::archive::Spooled;
use super::blob::BlobLease;
use super::build::{self, assemble};
use super::config::{Parsed, sha256_of};
use super::content::{self, ContentLease};
use super::select::Descriptor;
use super::stream::Context;
use super::{ImageDirs, ImageError, ImportLimits, ImportProgress, ImportedImage, room};
use crate::registry::{RegistrySettings, Session};

mod download;
mod resolve;

use resolve::Resolved;

/// How many blobs are downloaded at once.
const PARALLEL: usize = 4;
/// How soon what another process works on is looked at again.
const COME_AGAIN: Duration = Duration::from_millis(50);

/// What is to be pulled.
#[derive(Debug, Clone)]
pub struct PullRequest {
    /// The image.
    pub image: ImageReference,
    /// For which machine; this one if it is not said.
    pub platform: Option<Platform>,
}

/// What a pull is doing; for a progress line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PullProgress {
    /// Layers are on their way.
    Downloading {
        /// The bytes that are here.
        bytes: u64,
        /// Of how many.
        of: u64,
    },
    /// Another process is building the same image.
    Waiting,
    /// It is being built.
    Building(ImportProgress),
}

/// Is told of progress, on any thread.
pub type TellPull = Arc<dyn Fn(PullProgress) + Send + Sync>;

/// What a pull made, and what keeps it until it is recorded.
#[derive(Debug)]
pub struct PulledImage {
    /// The image; its digest is the manifest's.
    pub image: ImportedImage,
    /// Keeps the root filesystem.
    pub lease: BlobLease,
    /// Keep what was downloaded.
    pub content: Vec<ContentLease>,
}

/// What does not change in a pull.
struct Pull<'a> {
    session: Session,
    dirs: ImageDirs,
    limits: ImportLimits,
    platform: Platform,
    tell: &'a TellPull,
    done: AtomicU64,
    total: AtomicU64,
}

/// Pulls an image. Keep what it answers until the row that names the image is committed.
///
/// # Errors
/// What is wrong with the name, the registry, the image or this host. Cancelled, it answers soon.
pub async fn pull(
    request: &PullRequest,
    settings: &RegistrySettings,
    dirs: &ImageDirs,
    limits: &ImportLimits,
    tell: &TellPull,
    cancel: &CancellationToken,
) -> Result<PulledImage, ImageError> {
    build::check_root()?;
    let pull = Pull {
        session: Session::open(&request.image, settings)?,
        dirs: dirs.absolute()?,
        limits: *limits,
        platform: request.platform.clone().unwrap_or_else(Platform::host),
        tell,
        done: AtomicU64::new(0),
        total: AtomicU64::new(0),
    };
    let fetched = async {
        let mut resolved = pull.resolve(&request.image).await?;
        let lease = pull.reusable(&resolved)?;
        if lease.is_none() {
            resolved.content.extend(pull.layers(&resolved.layers).await?);
        }
        Ok::<_, ImageError>((resolved, lease))
    };
    let (resolved, lease) = tokio::select! {
        biased;
        () = cancel.cancelled() => return Err(ImageError::Cancelled),
        fetched = fetched => fetched?,
    };
    match lease {
        Some(lease) => Ok(pull.here(resolved, lease)),
        None => pull.built(resolved, cancel).await,
    }
}

/// Does file work on a thread for it.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(ImageError::Lost(error.to_string())))
}

impl Pull<'_> {
    fn blob(&self, parsed: &Parsed) -> std::path::PathBuf {
        self.dirs.blobs().join(format!("sha256_{}.erofs", parsed.squashed()))
    }

    /// The root filesystem, if it is here and made of these very layers: whoever only names the diff
    /// ids of another image has to show its layers first.
    fn reusable(&self, resolved: &Resolved) -> Result<Option<BlobLease>, ImageError> {
        for (layer, id) in resolved.layers.iter().zip(&resolved.parsed.diff_ids) {
            let known = content::diff_id(&self.dirs, sha256_of(&layer.digest)?, layer.size)?;
            if known.as_ref() != Some(id) {
                return Ok(None);
            }
        }
        match BlobLease::take(&self.blob(&resolved.parsed)) {
            Ok(lease) => Ok(Some(lease)),
            Err(ImageError::NoBlob { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Downloads the layers that are not here.
    async fn layers(&self, layers: &[Descriptor]) -> Result<Vec<ContentLease>, ImageError> {
        // The same layer may be there twice.
        let each: BTreeMap<&str, &Descriptor> =
            layers.iter().map(|layer| (&*layer.digest, layer)).collect();
        let total = each.values().map(|layer| layer.size).sum();
        self.total.store(total, Ordering::Relaxed);
        let mut needed = 0;
        for layer in each.values() {
            needed += content::missing(&self.dirs, sha256_of(&layer.digest)?, layer.size);
        }
        room::check_at(&self.dirs.content(), needed)?;
        self.progress(0);
        let hexes: Result<_, _> =
            each.keys().map(|digest| sha256_of(digest).map(str::to_owned)).collect();
        let hexes: Vec<String> = hexes?;
        let fetches: Vec<_> = each.into_values().map(|layer| self.fetch(layer)).collect();
        let fetched = futures::stream::iter(fetches).buffer_unordered(PARALLEL).try_collect().await;
        if fetched.as_ref().is_err_and(ImageError::is_full) {
            // The other layers of an image that has no room have none either.
            let dirs = self.dirs.clone();
            if let Err(error) = aside(move || content::forget_partials(&dirs, &hexes)).await {
                // That there is no room is what the user must hear; `gc` removes the rest.
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "could not remove partials"
                );
            }
        }
        fetched
    }

    fn progress(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let of = self.total.load(Ordering::Relaxed);
        if of > 0 {
            (self.tell)(PullProgress::Downloading { bytes: done.min(of), of });
        }
    }

    /// The answer for a root filesystem that is here.
    fn here(&self, resolved: Resolved, lease: BlobLease) -> PulledImage {
        (self.tell)(PullProgress::Building(ImportProgress::Reused));
        let image = ImportedImage {
            digest: resolved.digest,
            rootfs_path: self.blob(&resolved.parsed),
            rootfs_digest: format!("sha256:{}", resolved.parsed.squashed()),
            size: lease.size(),
            layers: resolved.layers.len(),
            diff_ids: resolved.parsed.diff_ids,
            config: resolved.parsed.config,
        };
        PulledImage { image, lease, content: resolved.content }
    }

    /// Builds the root filesystem, unless another process does.
    async fn built(
        &self,
        resolved: Resolved,
        cancel: &CancellationToken,
    ) -> Result<PulledImage, ImageError> {
        let mut told = false;
        let lock = loop {
            let lock = content::lock_build(&self.dirs, &resolved.parsed.squashed())?;
            if let Some(lease) = self.reusable(&resolved)? {
                lock.map_or(Ok(()), content::BuildLock::release)?;
                return Ok(self.here(resolved, lease));
            }
            if let Some(lock) = lock {
                break lock;
            }
            if !std::mem::replace(&mut told, true) {
                (self.tell)(PullProgress::Waiting);
            }
            tokio::select! {
                () = cancel.cancelled() => return Err(ImageError::Cancelled),
                () = tokio::time::sleep(COME_AGAIN) => {}
            }
        };
        let Resolved { digest, parsed, config, layers, content } = resolved;
        let diff_ids = parsed.diff_ids.clone();
        let layers_here = self.spooled(&layers)?;
        let config = sha256_of(&config.digest)?.to_owned();
        let (dirs, limits) = (self.dirs.clone(), self.limits);
        let (tell, cancel) = (Arc::clone(self.tell), cancel.clone());
        let build = move || {
            let progress = |step| tell(PullProgress::Building(step));
            let cancelled = || cancel.is_cancelled();
            let context = Context { limits, progress: &progress, cancelled: &cancelled };
            let made = build::with_workspace(&dirs, |dirs, workspace| {
                let seen: Vec<_> =
                    layers_here.iter().map(|layer| (layer.sha256.clone(), layer.size)).collect();
                let made = assemble(&config, parsed, layers_here, dirs, workspace, &context)?;
                // Each layer was read to its end and found to have its diff id.
                for ((hex, size), id) in seen.iter().zip(&diff_ids) {
                    content::note(dirs, hex, *size, id)?;
                }
                Ok(made)
            });
            // A failed build lets the next one try.
            let released = lock.release();
            let made = made?;
            released.map(|()| made)
        };
        match aside(build).await {
            Ok((image, lease)) => {
                Ok(PulledImage { image: ImportedImage { digest, ..image }, lease, content })
            }
            Err(error) => {
                drop(content);
                self.forget_damaged(&error, &layers).await?;
                Err(error)
            }
        }
    }

    /// The layers, as the build takes them.
    fn spooled(&self, layers: &[Descriptor]) -> Result<Vec<Spooled>, ImageError> {
        let spooled = |blob: &Descriptor| {
            let hex = sha256_of(&blob.digest)?;
            let path = content::path_of(&self.dirs, hex);
            Ok(Spooled { path, offset: 0, size: blob.size, sha256: hex.to_owned() })
        };
        layers.iter().map(spooled).collect()
    }

    /// Layers that were damaged here are not kept. What is wrong with others may be the manifest's
    /// or the config's fault.
    async fn forget_damaged(
        &self,
        error: &ImageError,
        layers: &[Descriptor],
    ) -> Result<(), ImageError> {
        if !matches!(error, ImageError::Damaged { .. }) {
            return Ok(());
        }
        for layer in layers {
            let (dirs, hex) = (self.dirs.clone(), sha256_of(&layer.digest)?.to_owned());
            aside(move || content::forget_damaged(&dirs, &hex)).await?;
        }
        Ok(())
    }
}
