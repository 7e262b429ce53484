//! From a name to the manifest of our platform and its config: what a registry claims about an image,
//! refused here where no image is like that.
//!
//! # Invariants
//! 1. A document is an index or a manifest, never both: all readers of it see the same image.
//! 2. Counts and sizes are checked before anything of that size is asked for.
//!
//! On an error nothing is kept but blobs that are what their digests say; `gc` removes those.

use matchlock_model::reference::ImageReference;
use serde::de::IgnoredAny;

use super::super::ImageError;
use super::super::build::check_count;
use super::super::config::{self, Parsed, sha256_of};
use super::super::content::{self, ContentLease};
use super::super::select::{self, Descriptor, Index, MAX_NESTING, Manifest};
use super::super::stream::{plain, readable};
use super::{COME_AGAIN, Pull, aside};
use crate::registry::ManifestBytes;

/// What was found in the registry.
pub(super) struct Resolved {
    pub(super) digest: String,
    pub(super) parsed: Parsed,
    pub(super) config: Descriptor,
    pub(super) layers: Vec<Descriptor>,
    pub(super) content: Vec<ContentLease>,
}

impl Pull<'_> {
    /// Finds the manifest of our platform, and its config.
    pub(super) async fn resolve(&self, image: &ImageReference) -> Result<Resolved, ImageError> {
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
        let ManifestBytes { bytes, digest, .. } = found;
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
        let none = |why: &str| {
            let (what, why) = (image.to_string(), plain(why));
            ImageError::NotAnImage { what, why }
        };
        let unreadable =
            |error: serde_json::Error| none(&format!("its manifest cannot be read: {error}"));
        let parsed: Kind = serde_json::from_slice(&found.bytes).map_err(unreadable)?;
        if parsed.schema_version != Some(2) {
            let why = "its manifest is of an old version; push it again with a newer program";
            return Err(none(why));
        }
        // Who reads it as the one must not see another image than who reads it as the other.
        if parsed.manifests.is_some() && (parsed.config.is_some() || parsed.layers.is_some()) {
            return Err(none("its manifest is an index as well"));
        }
        let said = found.media_type.as_deref();
        if let (Some(own), Some(said)) = (parsed.media_type.as_deref(), said)
            && own != said
        {
            let why =
                format!("its manifest calls itself {own:?}, and the registry calls it {said:?}");
            return Err(none(&why));
        }
        let is_index = match parsed.media_type.as_deref().or(said) {
            Some(kind) if select::is_index(kind) => true,
            Some(OCI_MANIFEST | DOCKER_MANIFEST) => false,
            _ => parsed.manifests.is_some(),
        };
        if is_index {
            return Ok(Document::Index(serde_json::from_slice(&found.bytes).map_err(unreadable)?));
        }
        let manifest: Manifest = serde_json::from_slice(&found.bytes).map_err(unreadable)?;
        match manifest.config.media_type.as_deref() {
            None | Some(OCI_CONFIG | DOCKER_CONFIG) => Ok(Document::Manifest(manifest)),
            Some(other) => Err(none(&format!("its config is {other:?}"))),
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
}

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// What tells an index from a manifest.
#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Kind {
    schema_version: Option<u64>,
    media_type: Option<String>,
    manifests: Option<IgnoredAny>,
    config: Option<IgnoredAny>,
    layers: Option<IgnoredAny>,
}

enum Document {
    Manifest(Manifest),
    Index(Index),
}
