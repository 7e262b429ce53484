//! Image registries: manifests and blobs by HTTP, as the OCI distribution specification and Docker's
//! registry v2 have it.
//!
//! ```text
//!   Session::open ── mirrors of the registry, then itself ──► endpoints
//!     manifest(version) ─► each endpoint in turn, until one has it ─► bytes, digest checked
//!     blob(digest, from) ─► the endpoint that had the manifest ─► body, from a byte on if it can
//!          │ 401
//!          ▼
//!   auth ─► credentials (Docker's files and helpers) ─► Basic, or a token from the realm
//! ```
//!
//! The protocol is written here, over `reqwest`, and not taken from `oci-client`: that one reads
//! manifests, tokens and errors without a bound, hides `Retry-After`, and sends an identity token to
//! the registry where it belongs to the realm.
//!
//! # Invariants
//! 1. A registry is a stranger: what it sends is capped, and its words are shown without what a
//!    terminal would not show. Whoever takes a blob checks its digest; a manifest's is checked here.
//! 2. Credentials are looked up when a registry asks for them, go to that registry and the realm it
//!    names, never to a mirror's, and never from https to http. A registry names its realm itself: a
//!    host that it leads to is not heard, and a realm cannot lead on. They are not stored, and not shown.
//! 3. https only, but for the hosts that the user named as insecure; those are asked by plain http.
//! 4. Each wait has an end: to connect, for the next bytes, for a helper. Who sends a few bytes now and
//!    then is as good as silent.
//!
//! # On error, stop and crash
//! Nothing here leaves anything behind. Dropping a future ends its connection, and the helper that
//! it waits for. [`RegistryError::retry`] says which errors may pass by themselves.

use std::collections::BTreeMap;
use std::path::PathBuf;

mod auth;
mod client;
mod credentials;
mod error;
mod http;
mod manifest;
mod pace;
mod retry;
mod words;

pub use client::{Body, Session};
pub use error::RegistryError;
pub use manifest::ManifestBytes;
pub use retry::{Attempts, Retry};
pub(crate) use words::is_unseen;

/// What the user said of registries.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RegistrySettings {
    /// Hosts that are asked by plain http: `HOST` or `HOST:PORT`.
    pub insecure: Vec<String>,
    /// Where else the images of a registry are, asked first and in this order: `HOST[:PORT]`.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// A file of PEM certificates that are trusted besides the host's own.
    pub ca_file: Option<PathBuf>,
    /// The directory of Docker's `config.json`.
    pub docker_config: Option<PathBuf>,
}

/// Docker Hub's name in references.
const HUB: &str = "docker.io";
/// Where Docker Hub answers.
const HUB_HOST: &str = "registry-1.docker.io";
/// What Docker Hub is called in Docker's own files.
const HUB_KEY: &str = "https://index.docker.io/v1/";
