//! Manifests as they come: checked against their digest, and told from what is none.

use reqwest::Response;
use reqwest::header::{CONTENT_TYPE, HeaderMap};
use sha2::{Digest, Sha256};

use super::client::capped;
use super::{RegistryError, words};

/// What we can read.
pub(super) const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json";

/// Registries take no longer one.
const MAX_MANIFEST: u64 = 4 * 1024 * 1024;

/// A manifest or an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestBytes {
    /// Its bytes, which have the digest.
    pub bytes: Vec<u8>,
    /// Its digest: `sha256:` and 64 hex digits.
    pub digest: String,
    /// What the registry calls it, if it does.
    pub media_type: Option<String>,
}

/// Reads one that was asked for by a tag or a digest.
pub(super) async fn read(
    answer: Response,
    version: &str,
    host: &str,
    what: &str,
) -> Result<ManifestBytes, RegistryError> {
    let text = |headers: &HeaderMap, name: &str| {
        headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
    };
    let said = text(answer.headers(), "docker-content-digest");
    let kind = text(answer.headers(), CONTENT_TYPE.as_str()).unwrap_or_default();
    let bytes = capped(answer, MAX_MANIFEST, host, what).await?;
    if words::is_markup(&bytes) || kind.starts_with("text/html") {
        let what = "a page of HTML instead of a manifest".to_owned();
        return Err(RegistryError::NotARegistry { host: host.to_owned(), what });
    }
    let found = format!("sha256:{}", hex::encode(Sha256::digest(&bytes)));
    // A digest that was asked for says more than one that the registry tells us.
    let asked = version.starts_with("sha256:").then(|| version.to_owned());
    let expected = asked.or(said.filter(|said| said.starts_with("sha256:")));
    match expected {
        Some(expected) if expected != found => {
            let (host, what) = (host.to_owned(), what.to_owned());
            Err(RegistryError::Digest { host, what, expected, found })
        }
        _ => {
            let media_type = kind.split(';').next().map(str::trim).filter(|kind| !kind.is_empty());
            let media_type = media_type.map(str::to_owned);
            Ok(ManifestBytes { bytes, digest: found, media_type })
        }
    }
}
