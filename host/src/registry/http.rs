//! The HTTP clients: whom they trust, how long they wait, and where they let themselves be led.
//!
//! # Invariants
//! 1. Nobody is led from https to http.
//! 2. A redirection takes a login nowhere: a realm, which is sent one in a header or a form, may lead
//!    only to itself. To hosts that a registry leads to, for its blobs, nothing of ours goes; headers
//!    with a login end at the registry (reqwest), and no host is told by which URL it was found.

use std::sync::Arc;
use std::time::Duration;

use reqwest::redirect::Policy;
use reqwest::{Certificate, Client};

use super::error::{Downgraded, LedAway};
use super::{RegistryError, RegistrySettings, words};

const CONNECT_LIMIT: Duration = Duration::from_secs(20);
/// How long the next bytes may be in coming.
const READ_LIMIT: Duration = Duration::from_secs(60);
const MAX_REDIRECTS: usize = 8;
const USER_AGENT: &str = concat!("matchlock/", env!("CARGO_PKG_VERSION"));

/// For manifests and blobs.
pub(super) fn to_registries(settings: &RegistrySettings) -> Result<Client, RegistryError> {
    client(settings, false)
}

/// For tokens.
pub(super) fn to_realms(settings: &RegistrySettings) -> Result<Client, RegistryError> {
    client(settings, true)
}

fn client(settings: &RegistrySettings, stays: bool) -> Result<Client, RegistryError> {
    let policy = Policy::custom(move |attempt| {
        let from = attempt.previous().last();
        let from_https = from.is_some_and(|url| url.scheme() == "https");
        if from_https && attempt.url().scheme() != "https" {
            attempt.error(Downgraded)
        } else if stays && from.is_none_or(|url| url.origin() != attempt.url().origin()) {
            attempt.error(LedAway)
        } else if attempt.previous().len() > MAX_REDIRECTS {
            attempt.error("too many redirections")
        } else {
            attempt.follow()
        }
    });
    // The first of this process decides; they are all the same.
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        tracing::trace!("TLS is prepared already");
    }
    let mut builder = Client::builder()
        .user_agent(USER_AGENT)
        .connect_timeout(CONNECT_LIMIT)
        .read_timeout(READ_LIMIT)
        // The URL of a blob may itself be what opens it.
        .referer(false)
        .redirect(policy);
    if let Some(path) = &settings.ca_file {
        let failed = |why: String| RegistryError::CaFile { path: path.clone(), why };
        let pem = std::fs::read(path).map_err(|error| failed(error.to_string()))?;
        let certificates =
            Certificate::from_pem_bundle(&pem).map_err(|error| failed(error.to_string()))?;
        if certificates.is_empty() {
            return Err(failed("it holds no PEM certificate".to_owned()));
        }
        builder = builder.tls_certs_merge(certificates);
    }
    builder.build().map_err(|error| {
        let error: Arc<dyn std::error::Error + Send + Sync> = Arc::new(error);
        RegistryError::Client(words::line(&matchlock_model::failure::chain(&*error)))
    })
}
