//! Which image an archive holds: `manifest.json` of docker-save, or `index.json` of an OCI layout.
//!
//! Newer docker-save archives are both; `manifest.json` is preferred, because it says what the user
//! asked to save. A file whose name is a digest (`blobs/sha256/<hex>`, `<hex>.json`) must have it.
//!
//! # Invariants
//! 1. With a tag exactly one image of the wanted platform is selected, or the error names those there
//!    are. Without one, all that have names.
//! 2. The work grows as the lists do, whose length is capped: nobody can be kept computing.
//! 3. What a descriptor says about digest and size is checked before the content is looked at.

use std::collections::{BTreeMap, HashMap, HashSet};

use matchlock_model::platform::Platform as Wanted;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::ImageError;
use super::archive::{Archive, Spooled};
use super::config::{is_sha256, sha256_of, wrong_platform};
use super::stream::plain;
use super::wish::ImportWish;

/// How deep an index may lie in another.
pub(super) const MAX_NESTING: usize = 4;
/// How many images a list may have: archives of a whole registry have fewer.
const MAX_LISTED: usize = 1000;
/// How many images are named in an error.
const NAMED: usize = 10;

/// An image to import.
#[derive(Debug)]
pub(super) struct Selected {
    pub(super) config: Spooled,
    /// Lowest first.
    pub(super) layers: Vec<Spooled>,
    /// What the archive calls it.
    pub(super) names: Vec<String>,
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

impl Index {
    pub(super) fn images(self) -> Vec<Descriptor> {
        self.manifests.unwrap_or_default()
    }
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

/// Finds the images of an archive that are wanted.
pub(super) fn select(
    archive: &Archive,
    wish: &ImportWish,
    max_layers: usize,
) -> Result<Vec<Selected>, ImageError> {
    let selected = if let Some(manifest) = archive.find("manifest.json")? {
        saved(archive, manifest, wish)?
    } else if let Some(index) = archive.find("index.json")? {
        layout(archive, index, wish)?
    } else {
        let what = "it holds neither manifest.json (docker save) nor index.json (an OCI layout)";
        return Err(ImageError::NotAnArchive { what: what.into() });
    };
    if selected.iter().any(|image| image.layers.len() > max_layers) {
        return Err(ImageError::TooLarge { limit: format!("{max_layers} layers") });
    }
    Ok(selected)
}

/// Of several images, the one that has the wanted tag, or all if no tag is wanted.
fn wanted<T>(
    mut images: Vec<T>,
    wish: &ImportWish,
    names: impl Fn(&T) -> Vec<String>,
    shown: impl Fn(&T) -> String,
) -> Result<Vec<T>, ImageError> {
    let Some(tag) = &wish.tag else {
        return match images.iter().find(|image| names(image).is_empty()) {
            None => Ok(images),
            Some(image) => Err(ImageError::Wish {
                what: format!(
                    "the archive does not name {}: say which tag it gets",
                    plain(&shown(image))
                ),
            }),
        };
    };
    if images.len() == 1 {
        return Ok(images);
    }
    let latest = format!("{tag}:latest");
    let is_it = |image: &T| names(image).iter().any(|name| name == tag || *name == latest);
    match images.iter().filter(|image| is_it(image)).count() {
        1 => {
            images.retain(is_it);
            Ok(images)
        }
        _ => Err(several(images.iter().map(shown).collect())),
    }
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
    let what = format!(
        "the archive holds several images ({list}): give one of these names, or no tag to import all"
    );
    ImageError::Wish { what }
}

fn saved(
    archive: &Archive,
    manifest: &Spooled,
    wish: &ImportWish,
) -> Result<Vec<Selected>, ImageError> {
    let images: Vec<Saved> = checked(json(archive, manifest, "manifest.json")?)?;
    if images.is_empty() {
        return Err(damaged("manifest.json names no image"));
    }
    let names = |image: &Saved| image.repo_tags.clone().unwrap_or_default();
    let shown = |image: &Saved| match names(image).first() {
        Some(tag) => tag.clone(),
        None => image.config.clone(),
    };
    let images = wanted(images, wish, names, shown)?;
    images.into_iter().map(|image| saved_one(archive, image)).collect()
}

fn saved_one(archive: &Archive, image: Saved) -> Result<Selected, ImageError> {
    let mut layers = Vec::new();
    for layer in image.layers.unwrap_or_default() {
        layers.push(named_by_digest(archive, &layer)?);
    }
    let config = named_by_digest(archive, &image.config)?;
    Ok(Selected { config, layers, names: image.repo_tags.unwrap_or_default() })
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

fn layout(
    archive: &Archive,
    index: &Spooled,
    wish: &ImportWish,
) -> Result<Vec<Selected>, ImageError> {
    let marker = archive.find("oci-layout")?.ok_or_else(|| ImageError::NotAnArchive {
        what: "it holds index.json but no oci-layout".into(),
    })?;
    let version = json::<Layout>(archive, marker, "oci-layout")?.image_layout_version;
    if !version.starts_with("1.") {
        let what = format!("it is an OCI layout of version {version:?}, and only 1 is known");
        return Err(ImageError::NotAnArchive { what });
    }
    let index: Index = json(archive, index, "index.json")?;
    let platform = wish.platform.clone().unwrap_or_else(Wanted::host);
    let groups = by_name(index)?;
    if groups.is_empty() {
        return Err(damaged("an index of it names no image"));
    }
    let groups = wanted(
        groups,
        wish,
        |group| group.names.clone(),
        |group| match group {
            Group { names, images } if names.is_empty() => {
                images.first().map(image_name).unwrap_or_default()
            }
            Group { names, .. } => names.join(", "),
        },
    )?;
    groups.into_iter().map(|group| layout_one(archive, group, &platform)).collect()
}

/// The images of an index that have the same name: one for each platform.
struct Group {
    names: Vec<String>,
    images: Vec<Descriptor>,
}

/// Groups, and where in them a name or a digest is.
#[derive(Default)]
struct Groups {
    all: Vec<Group>,
    named: HashMap<String, usize>,
    nameless: Option<usize>,
    /// The latest group with names that began with this digest.
    begun: HashMap<String, usize>,
    /// Digests, each in its group.
    seen: HashSet<(usize, String)>,
}

impl Groups {
    /// The first group where an image belongs.
    fn of(&self, name: Option<&String>, digest: &str) -> Option<usize> {
        let Some(name) = name else { return self.nameless };
        // Another name of what is there already, alone.
        let again = self.begun.get(digest).filter(|at| self.all[**at].images.len() == 1);
        again.into_iter().chain(self.named.get(name)).min().copied()
    }

    fn add(&mut self, descriptor: Descriptor) {
        let name = own_name(&descriptor);
        let at = self.of(name.as_ref(), &descriptor.digest).unwrap_or_else(|| {
            let at = self.all.len();
            self.all.push(Group { names: Vec::new(), images: Vec::new() });
            match &name {
                None => self.nameless = Some(at),
                Some(_) => drop(self.begun.insert(descriptor.digest.clone(), at)),
            }
            at
        });
        if let Some(name) = name
            && self.named.get(&name) != Some(&at)
        {
            self.named.insert(name.clone(), at);
            self.all[at].names.push(name);
        }
        if self.seen.insert((at, descriptor.digest.clone())) {
            self.all[at].images.push(descriptor);
        }
    }
}

/// The images of an index, by name; one image may have several.
fn by_name(index: Index) -> Result<Vec<Group>, ImageError> {
    let mut groups = Groups::default();
    for descriptor in checked(index.images())?.into_iter().filter(|image| !is_attestation(image)) {
        groups.add(descriptor);
    }
    Ok(groups.all)
}

/// Refuses a list that nobody has made for an image.
fn checked<T>(listed: Vec<T>) -> Result<Vec<T>, ImageError> {
    if listed.len() > MAX_LISTED {
        return Err(ImageError::TooLarge { limit: format!("{MAX_LISTED} images in a list") });
    }
    Ok(listed)
}

fn layout_one(archive: &Archive, group: Group, platform: &Wanted) -> Result<Selected, ImageError> {
    let mut descriptor = choose(group.images, platform)?;
    for _ in 0..=MAX_NESTING {
        let file = blob(archive, &descriptor)?;
        if !descriptor.media_type.as_deref().is_some_and(is_index) {
            return manifest(archive, &file, &descriptor.digest, group.names);
        }
        let inner: Index = json(archive, &file, &descriptor.digest)?;
        descriptor = choose(inner.manifests.unwrap_or_default(), platform)?;
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

fn manifest(
    archive: &Archive,
    file: &Spooled,
    name: &str,
    names: Vec<String>,
) -> Result<Selected, ImageError> {
    let manifest: Manifest = json(archive, file, name)?;
    let config = blob(archive, &manifest.config)?;
    let layers = manifest.layers.unwrap_or_default();
    let layers = layers.iter().map(|layer| blob(archive, layer)).collect::<Result<_, _>>()?;
    Ok(Selected { config, layers, names })
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
pub(super) fn choose(
    descriptors: Vec<Descriptor>,
    platform: &Wanted,
) -> Result<Descriptor, ImageError> {
    let mut images = checked(descriptors)?;
    let mut known = HashSet::new();
    images.retain(|image| !is_attestation(image) && known.insert(image.digest.clone()));
    if images.is_empty() {
        return Err(damaged("an index of it names no image"));
    }
    let names: Vec<String> = images.iter().filter_map(platform_name).collect();
    let mut fitting: Vec<Descriptor> =
        images.into_iter().filter(|image| fits(image, platform)).collect();
    if platform.variant.is_none() && fitting.len() > 1 {
        // The plain one of several variants runs on every machine of the architecture.
        let plain = fitting.iter().filter(|image| is_plain(image)).count();
        if plain == 1 {
            fitting.retain(is_plain);
        }
    }
    match (fitting.pop(), fitting.is_empty()) {
        (Some(image), true) => Ok(image),
        (None, _) => Err(wrong_platform(names.join(", "), platform)),
        (Some(last), false) => {
            // Of one platform.
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
    descriptor.platform.as_ref().map(|platform| {
        let variant = platform.variant.as_deref().filter(|variant| !variant.is_empty());
        let variant = variant.map(|variant| format!("/{variant}")).unwrap_or_default();
        format!("{}/{}{variant}", platform.os, platform.architecture)
    })
}

fn fits(descriptor: &Descriptor, platform: &Wanted) -> bool {
    // Without a platform it may fit; its config will tell.
    descriptor.platform.as_ref().is_none_or(|of| {
        let variant = platform.variant.is_none() || platform.variant == of.variant;
        of.os == "linux" && of.architecture == platform.architecture && variant
    })
}

fn is_plain(descriptor: &Descriptor) -> bool {
    let variant = descriptor.platform.as_ref().and_then(|platform| platform.variant.as_deref());
    matches!(variant, None | Some("" | "v8"))
}

fn own_name(descriptor: &Descriptor) -> Option<String> {
    let named = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];
    let annotations = descriptor.annotations.as_ref();
    annotations.and_then(|all| named.iter().find_map(|key| all.get(*key))).cloned()
}

fn image_name(descriptor: &Descriptor) -> String {
    own_name(descriptor).unwrap_or_else(|| descriptor.digest.clone())
}
