//! Images as the metadata database knows them.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// What an image says about running it; the JSON in `images.oci_json`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// `User` of the OCI config.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// `WorkingDir`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub working_dir: String,
    /// `Entrypoint`.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "null_as_default")]
    pub entrypoint: Vec<String>,
    /// `Cmd`.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "null_as_default")]
    pub cmd: Vec<String>,
    /// `Env`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "null_as_default")]
    pub env: BTreeMap<String, String>,
    /// `Labels`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "null_as_default")]
    pub labels: BTreeMap<String, String>,
    /// `StopSignal`, as the image writes it; [`crate::signal::number`] reads it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub stop_signal: String,
    /// What it is for, `linux/arm64`, if that is not this host's own platform; it cannot run then.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub platform: String,
}

fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Where an image came from: the column `images.scope`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageScope {
    /// Imported, built or tagged here.
    Local,
    /// Pulled from a registry.
    Registry,
}

impl ImageScope {
    /// The name in the database.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Registry => "registry",
        }
    }
}

/// A row of the table `images`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Local or registry.
    pub scope: ImageScope,
    /// The tag, as the user names the image.
    pub tag: String,
    /// The image's digest, `sha256:` and 64 hex digits.
    pub digest: String,
    /// The bytes that its root filesystem takes on disk.
    pub size: u64,
    /// When it was made here.
    pub created_at: Timestamp,
    /// How it came here: `import`, `registry`, `tag`.
    pub source: String,
    /// The EROFS file, absolute.
    pub rootfs_path: String,
    /// The digests of the layers that it was made of, uncompressed, lowest first; empty where they
    /// are not known.
    pub layers: Vec<String>,
    /// How to run it.
    pub config: ImageConfig,
}

/// A text that cannot be an image's tag.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not an image tag: use up to 255 of a-z A-Z 0-9 . _ - / : @, starting with a letter or digit, for example tools:1.2"
)]
pub struct InvalidTag {
    /// What was given.
    pub text: String,
}

/// Checks a tag given by a user.
///
/// # Errors
/// When it is empty, too long, or holds characters that no image reference has.
pub fn check_tag(text: &str) -> Result<(), InvalidTag> {
    let good = |b: u8| b.is_ascii_alphanumeric() || b"._-/:@".contains(&b);
    let starts_well = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if text.len() <= 255 && starts_well && text.bytes().all(good) {
        return Ok(());
    }
    Err(InvalidTag { text: text.to_owned() })
}
