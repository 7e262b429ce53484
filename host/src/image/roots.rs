//! Which downloaded blobs an image needs: its manifest, kept as a blob itself, names them.
//!
//! Reads only. A manifest that is gone names nothing.

use std::io;

use super::config::sha256_of;
use super::content::path_of;
use super::select::Manifest;
use super::workspace::failed;
use super::{ImageDirs, ImageError};

/// The digests, as 64 hex digits, of the blobs of a pulled image with this manifest, itself among
/// them.
///
/// # Errors
/// When the manifest cannot be read.
pub fn blobs_of(dirs: &ImageDirs, manifest: &str) -> Result<Vec<String>, ImageError> {
    let hex = sha256_of(manifest)?;
    let path = path_of(dirs, hex);
    let text = match std::fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text.map_err(|error| failed("read", &path, error))?,
    };
    let parsed: Manifest = serde_json::from_slice(&text)
        .map_err(|error| failed("understand", &path, io::Error::other(error)))?;
    let mut blobs = vec![hex.to_owned()];
    for blob in parsed.layers.iter().flatten().chain([&parsed.config]) {
        blobs.push(sha256_of(&blob.digest)?.to_owned());
    }
    Ok(blobs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::content;

    #[test]
    fn a_manifest_names_its_blobs() {
        use sha2::{Digest as _, Sha256};
        let cache = tempfile::tempdir().unwrap();
        let dirs = ImageDirs::new(cache.path());
        let (one, two) = ("1".repeat(64), "2".repeat(64));
        let text = format!(
            r#"{{"schemaVersion":2,"config":{{"digest":"sha256:{one}","size":1}},"layers":[{{"digest":"sha256:{two}","size":2}}]}}"#
        );
        let hex = hex::encode(Sha256::digest(&text));
        let digest = format!("sha256:{hex}");
        assert!(blobs_of(&dirs, &digest).unwrap().is_empty());
        drop(content::put(&dirs, &hex, text.as_bytes()).unwrap());
        assert_eq!(blobs_of(&dirs, &digest).unwrap(), [hex, two, one]);
    }
}
