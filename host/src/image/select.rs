//! Which image an archive holds: `manifest.json` of docker-save, or `index.json` of an OCI layout.
//!
//! Newer docker-save archives are both; `manifest.json` is preferred, because it says what the user
//! asked to save. A file whose name is a digest (`blobs/sha256/<hex>`, `<hex>.json`) must have it.
//!
//! # Invariants
//! 1. Exactly one image of this host's platform is selected, or the error names those there are.
//! 2. What a descriptor says about digest and size is checked before the content is looked at.

use std::collections::BTreeMap;

use matchlock_model::platform::Platform as Wanted;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::ImageError;
use super::archive::{Archive, Spooled};
use super::config::{host_platform, is_sha256, sha256_of, wrong_platform};
use super::stream::plain;

/// How deep an index may lie in another.
pub(super) const MAX_NESTING: usize = 4;
/// How many images are named in an error.
const NAMED: usize = 10;

/// The image to import.
#[derive(Debug)]
pub(super) struct Selected {
    pub(super) config: Spooled,
    /// Lowest first.
    pub(super) layers: Vec<Spooled>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Layout {
    image_layout_version: String,
}

#[derive(Deserialize)]
pub(super) struct Index {
    manifests: Option<Vec<Descriptor>>,
}

#[derive(Deserialize)]
pub(super) struct Manifest {
    pub(super) config: Descriptor,
    pub(super) layers: Option<Vec<Descriptor>>,
}

#[derive(Deserialize, Clone)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    pub(super) media_type: Option<String>,
    pub(super) digest: String,
    pub(super) size: u64,
    platform: Option<Platform>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize, Clone)]
struct Platform {
    architecture: String,
    os: String,
    variant: Option<String>,
}

fn damaged(what: impl Into<String>) -> ImageError {
    ImageError::Damaged { what: what.into() }
}

/// Finds the image of an archive.
pub(super) fn select(archive: &Archive, max_layers: usize) -> Result<Selected, ImageError> {
    let selected = if let Some(manifest) = archive.find("manifest.json")? {
        saved(archive, manifest)?
    } else if let Some(index) = archive.find("index.json")? {
        layout(archive, index)?
    } else {
        let what = "it holds neither manifest.json (docker save) nor index.json (an OCI layout)";
        return Err(ImageError::NotAnArchive { what: what.into() });
    };
    if selected.layers.len() > max_layers {
        return Err(ImageError::TooLarge { limit: format!("{max_layers} layers") });
    }
    Ok(selected)
}

fn json<T: DeserializeOwned>(
    archive: &Archive,
    file: &Spooled,
    name: &str,
) -> Result<T, ImageError> {
    let text = archive.text(file)?;
    serde_json::from_slice(&text).map_err(|error| damaged(plain(&format!("{name}: {error}"))))
}

/// One of several is refused; say which there are.
fn several(names: Vec<String>) -> ImageError {
    let more = names.len().saturating_sub(NAMED);
    let mut list = names.iter().take(NAMED).map(|name| plain(name)).collect::<Vec<_>>().join(", ");
    if more > 0 {
        list = format!("{list} and {more} more");
    }
    let what = format!("it holds several images ({list}); save one alone");
    ImageError::NotAnArchive { what }
}

fn saved(archive: &Archive, manifest: &Spooled) -> Result<Selected, ImageError> {
    let mut images: Vec<Saved> = json(archive, manifest, "manifest.json")?;
    let Some(image) = images.pop() else {
        return Err(damaged("manifest.json names no image"));
    };
    if !images.is_empty() {
        images.push(image);
        let name = |image: Saved| match image.repo_tags.and_then(|tags| tags.into_iter().next()) {
            Some(tag) => tag,
            None => image.config,
        };
        return Err(several(images.into_iter().map(name).collect()));
    }
    let mut layers = Vec::new();
    for layer in image.layers.unwrap_or_default() {
        layers.push(named_by_digest(archive, &layer)?);
    }
    Ok(Selected { config: named_by_digest(archive, &image.config)?, layers })
}

/// A file whose name may be its digest, which then must be right.
fn named_by_digest(archive: &Archive, name: &str) -> Result<Spooled, ImageError> {
    let file = archive.get(name)?;
    let promised = name.strip_prefix("blobs/sha256/").or_else(|| name.strip_suffix(".json"));
    if promised.is_some_and(|hex| is_sha256(hex) && hex != file.sha256) {
        return Err(damaged(format!(
            "the digest of {} is wrong: it is {}",
            plain(name),
            file.sha256
        )));
    }
    Ok(file.clone())
}

fn layout(archive: &Archive, index: &Spooled) -> Result<Selected, ImageError> {
    let marker = archive.find("oci-layout")?.ok_or_else(|| ImageError::NotAnArchive {
        what: "it holds index.json but no oci-layout".into(),
    })?;
    let version = json::<Layout>(archive, marker, "oci-layout")?.image_layout_version;
    if !version.starts_with("1.") {
        let what = format!("it is an OCI layout of version {version:?}, and only 1 is known");
        return Err(ImageError::NotAnArchive { what });
    }
    let index: Index = json(archive, index, "index.json")?;
    let wanted = host_platform();
    let mut descriptor = choose(index, &wanted)?;
    for _ in 0..=MAX_NESTING {
        let file = blob(archive, &descriptor)?;
        if !descriptor.media_type.as_deref().is_some_and(is_index) {
            return manifest(archive, &file, &descriptor.digest);
        }
        descriptor = choose(json(archive, &file, &descriptor.digest)?, &wanted)?;
    }
    Err(damaged("its indexes are nested too deeply"))
}

/// Whether a media type is that of a list of manifests.
pub(super) fn is_index(media_type: &str) -> bool {
    matches!(
        media_type,
        "application/vnd.oci.image.index.v1+json"
            | "application/vnd.docker.distribution.manifest.list.v2+json"
    )
}

fn manifest(archive: &Archive, file: &Spooled, name: &str) -> Result<Selected, ImageError> {
    let manifest: Manifest = json(archive, file, name)?;
    let config = blob(archive, &manifest.config)?;
    let layers = manifest.layers.unwrap_or_default();
    let layers = layers.iter().map(|layer| blob(archive, layer)).collect::<Result<_, _>>()?;
    Ok(Selected { config, layers })
}

/// The file that a descriptor describes, once it is just that.
fn blob(archive: &Archive, descriptor: &Descriptor) -> Result<Spooled, ImageError> {
    let hex = sha256_of(&descriptor.digest)?;
    let file = archive.get(&format!("blobs/sha256/{hex}"))?;
    if file.sha256 != hex {
        let what = format!("the digest of blob {hex} is wrong: it is {}", file.sha256);
        return Err(damaged(what));
    }
    if file.size != descriptor.size {
        let (is, said) = (file.size, descriptor.size);
        return Err(damaged(format!("blob {hex} has {is} bytes, and its descriptor says {said}")));
    }
    Ok(file.clone())
}

/// The one image of an index that is for this platform.
pub(super) fn choose(index: Index, wanted: &Wanted) -> Result<Descriptor, ImageError> {
    let mut images: Vec<Descriptor> = Vec::new();
    for descriptor in index.manifests.unwrap_or_default() {
        let known = images.iter().any(|image| image.digest == descriptor.digest);
        if !known && !is_attestation(&descriptor) {
            images.push(descriptor);
        }
    }
    if images.is_empty() {
        return Err(damaged("an index of it names no image"));
    }
    let names: Vec<String> = images.iter().filter_map(platform_name).collect();
    let mut fitting: Vec<Descriptor> =
        images.into_iter().filter(|image| fits(image, wanted)).collect();
    if fitting.len() > 1 {
        // The plain one of several variants runs on every machine of the architecture.
        let plain = fitting.iter().filter(|image| is_plain(image)).count();
        if plain == 1 {
            fitting.retain(is_plain);
        }
    }
    match (fitting.pop(), fitting.is_empty()) {
        (Some(image), true) => Ok(image),
        (None, _) => Err(wrong_platform(names.join(", "), wanted)),
        (Some(last), false) => {
            fitting.push(last);
            Err(several(fitting.iter().map(image_name).collect()))
        }
    }
}

fn is_attestation(descriptor: &Descriptor) -> bool {
    let kind = descriptor.annotations.as_ref().and_then(|all| all.get("vnd.docker.reference.type"));
    kind.is_some() || platform_name(descriptor).as_deref() == Some("unknown/unknown")
}

fn platform_name(descriptor: &Descriptor) -> Option<String> {
    descriptor.platform.as_ref().map(|p| format!("{}/{}", p.os, p.architecture))
}

fn fits(descriptor: &Descriptor, wanted: &Wanted) -> bool {
    // Without a platform it may fit; its config will tell.
    descriptor.platform.as_ref().is_none_or(|p| {
        let variant = wanted.variant.is_none() || wanted.variant == p.variant;
        p.os == "linux" && p.architecture == wanted.architecture && variant
    })
}

fn is_plain(descriptor: &Descriptor) -> bool {
    let variant = descriptor.platform.as_ref().and_then(|platform| platform.variant.as_deref());
    matches!(variant, None | Some("" | "v8"))
}

fn image_name(descriptor: &Descriptor) -> String {
    let named = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];
    let annotations = descriptor.annotations.as_ref();
    let name = annotations.and_then(|all| named.iter().find_map(|key| all.get(*key)));
    name.unwrap_or(&descriptor.digest).clone()
}
