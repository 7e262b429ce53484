//! A pull: from a name in a registry to a root filesystem.
//!
//! ```text
//!   manifest (index ─► this platform's) ─► content/          digest checked by `registry`
//!     config ─► content/ ─► diff ids ─► is their root filesystem here? ── yes ─► done
//!     layers, 4 at a time ─► content/    resumed, tried again, each by one process    │ no
//!     build lock ─► is it here by now? ─► `build::assemble`, as for an import ◄───────┘
//! ```
//!
//! # Invariants
//! 1. Bytes become content only under the digest that the manifest names, and a root filesystem only
//!    under the diff ids that the config names: no word of the registry is believed.
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
use super::build::{self, assemble, check_count};
use super::config::{self, Parsed, sha256_of};
use super::content::{self, ContentLease};
use super::select::{self, Descriptor, Index, MAX_NESTING, Manifest};
use super::stream::{Context, readable};
use super::{ImageDirs, ImageError, ImportLimits, ImportProgress, ImportedImage, room};
use crate::registry::{ManifestBytes, RegistrySettings, Session};

mod download;

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

/// What was found in the registry.
struct Resolved {
    digest: String,
    parsed: Parsed,
    config: Descriptor,
    layers: Vec<Descriptor>,
    content: Vec<ContentLease>,
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
        let lease = match BlobLease::take(&pull.blob(&resolved.parsed)) {
            Ok(lease) => Some(lease),
            Err(ImageError::NoBlob { .. }) => {
                resolved.content.extend(pull.layers(&resolved.layers).await?);
                None
            }
            Err(error) => return Err(error),
        };
        Ok((resolved, lease))
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

    /// Finds the manifest of our platform, and its config.
    async fn resolve(&self, image: &ImageReference) -> Result<Resolved, ImageError> {
        let mut found = self.session.manifest(image.version()).await?;
        let mut depth = 0;
        let manifest = loop {
            match self.read(&found, image)? {
                Document::Manifest(manifest) => break manifest,
                Document::Index(_) if depth > MAX_NESTING => {
                    let what = "its indexes are nested too deeply".to_owned();
                    return Err(ImageError::Damaged { what });
                }
                Document::Index(index) => {
                    let chosen = select::choose(index.images(), &self.platform)?;
                    sha256_of(&chosen.digest)?;
                    found = self.session.manifest(&chosen.digest).await?;
                    depth += 1;
                }
            }
        };
        let layers = manifest.layers.unwrap_or_default();
        self.check(&manifest.config, &layers)?;
        let ManifestBytes { bytes, digest } = found;
        let hex = sha256_of(&digest)?.to_owned();
        let kept = loop {
            let (dirs, hex, bytes) = (self.dirs.clone(), hex.clone(), bytes.clone());
            match aside(move || content::put(&dirs, &hex, &bytes)).await? {
                Some(lease) => break lease,
                None => tokio::time::sleep(COME_AGAIN).await,
            }
        };
        let config = self.fetch(&manifest.config).await?;
        let hex = sha256_of(&manifest.config.digest)?;
        let parsed = config::parse_for(&content::read(&config, hex)?, &self.platform)?;
        check_count(layers.len(), &parsed)?;
        Ok(Resolved {
            digest,
            parsed,
            config: manifest.config,
            layers,
            content: vec![kept, config],
        })
    }

    fn read(&self, found: &ManifestBytes, image: &ImageReference) -> Result<Document, ImageError> {
        let none = |why: String| ImageError::NotAnImage { what: image.to_string(), why };
        let parsed: Kind = serde_json::from_slice(&found.bytes)
            .map_err(|error| none(format!("its manifest cannot be read: {error}")))?;
        if parsed.schema_version != Some(2) {
            let why = "its manifest is of an old version; push it again with a newer program";
            return Err(none(why.to_owned()));
        }
        let is_index = parsed.media_type.as_deref().is_some_and(select::is_index)
            || (parsed.media_type.is_none() && parsed.manifests.is_some());
        let unreadable = |error| none(format!("its manifest cannot be read: {error}"));
        if is_index {
            return Ok(Document::Index(serde_json::from_slice(&found.bytes).map_err(unreadable)?));
        }
        let manifest: Manifest = serde_json::from_slice(&found.bytes).map_err(unreadable)?;
        match manifest.config.media_type.as_deref() {
            None | Some(OCI_CONFIG | DOCKER_CONFIG) => Ok(Document::Manifest(manifest)),
            Some(other) => Err(none(format!("its config is {other:?}"))),
        }
    }

    /// Refuses what is over a limit, before any of it is downloaded.
    fn check(&self, config: &Descriptor, layers: &[Descriptor]) -> Result<(), ImageError> {
        let limits = &self.limits;
        if config.size > limits.max_json_bytes {
            let limit = format!("{} in a JSON document", readable(limits.max_json_bytes));
            return Err(ImageError::TooLarge { limit });
        }
        if layers.len() > limits.max_layers {
            return Err(ImageError::TooLarge { limit: format!("{} layers", limits.max_layers) });
        }
        for blob in layers.iter().chain([config]) {
            sha256_of(&blob.digest)?;
            if blob.size == 0 {
                let what = format!("the manifest says that {} is empty", blob.digest);
                return Err(ImageError::Damaged { what });
            }
        }
        let bytes = layers.iter().fold(0_u64, |sum, layer| sum.saturating_add(layer.size));
        if bytes > limits.max_bytes {
            let limit = format!("{} of layers", readable(limits.max_bytes));
            return Err(ImageError::TooLarge { limit });
        }
        Ok(())
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
            aside(move || content::forget_partials(&dirs, &hexes)).await?;
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
        let blob = self.blob(&resolved.parsed);
        let mut told = false;
        let lock = loop {
            let lock = content::lock_build(&self.dirs, &resolved.parsed.squashed())?;
            match BlobLease::take(&blob) {
                Ok(lease) => {
                    lock.map_or(Ok(()), content::BuildLock::release)?;
                    return Ok(self.here(resolved, lease));
                }
                Err(ImageError::NoBlob { .. }) => {}
                Err(error) => return Err(error),
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
        let layers_here = self.spooled(&layers)?;
        let config = sha256_of(&config.digest)?.to_owned();
        let (dirs, limits) = (self.dirs.clone(), self.limits);
        let (tell, cancel) = (Arc::clone(self.tell), cancel.clone());
        let build = move || {
            let progress = |step| tell(PullProgress::Building(step));
            let cancelled = || cancel.is_cancelled();
            let context = Context { limits, progress: &progress, cancelled: &cancelled };
            let made = build::with_workspace(&dirs, |dirs, workspace| {
                assemble(&config, parsed, layers_here, dirs, workspace, &context)
            });
            // A failed build lets the next one try.
            lock.release()?;
            made
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

    /// Layers that turned out damaged are not kept: they may have been damaged here.
    async fn forget_damaged(
        &self,
        error: &ImageError,
        layers: &[Descriptor],
    ) -> Result<(), ImageError> {
        if !matches!(error, ImageError::Damaged { .. }) {
            return Ok(());
        }
        let digests: Vec<String> = layers.iter().map(|layer| layer.digest.clone()).collect();
        let dirs = self.dirs.clone();
        let is_other =
            move |hex: &str| !digests.iter().any(|d| d.strip_prefix("sha256:") == Some(hex));
        let swept = aside(move || {
            Ok(content::sweep(&dirs, content::Partials::Keep, false, &mut { is_other }))
        });
        swept.await?.errors.into_iter().next().map_or(Ok(()), Err)
    }
}

const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// What tells an index from a manifest.
#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Kind {
    schema_version: Option<u64>,
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
}

enum Document {
    Manifest(Manifest),
    Index(Index),
}
