//! Finds an image to run, here or in its registry.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use matchlock_actors::images::Pulled;
use matchlock_host::image::{BlobLease, ImageDirs, ImageError, PullRequest, TellPull};
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::image::{ImageRecord, ImageScope};
use matchlock_model::reference::ImageReference;
use tokio_util::sync::CancellationToken;

use super::client::NodeClient;
use super::config::NodeConfig;

/// The image with this tag.
///
/// # Errors
/// When there is none, it is for another machine, or the images cannot be read.
pub fn find_image(config: &NodeConfig, tag: &str) -> Result<ImageRecord, Failure> {
    look_up(config, tag)?.ok_or_else(|| {
        let text = format!(
            "image not found: {tag:?}; pull it with `matchlock pull {tag}`, import it with \
             `matchlock image import {tag} < archive.tar`, or choose one of `matchlock image ls`"
        );
        Failure::new(FailureKind::NotFound, text)
    })
}

/// The image with this tag; `None` when it is not here, or was pulled and its files are gone.
///
/// # Errors
/// When it is for another machine, or the images cannot be read.
pub fn look_up(config: &NodeConfig, tag: &str) -> Result<Option<ImageRecord>, Failure> {
    let host = |e: &(dyn std::error::Error + 'static)| Failure::from_error(FailureKind::Host, e);
    let images = matchlock_store::read_images(&ImageDirs::new(&config.cache).images)
        .map_err(|e| host(&e))?;
    let found = match images {
        Some(images) => images.find(tag).map_err(|e| host(&e))?,
        None => None,
    };
    let Some(record) = found else { return Ok(None) };
    let record = runnable(record)?;
    if record.scope == ImageScope::Registry {
        match BlobLease::take(record.rootfs_path.as_ref()) {
            Err(ImageError::NoBlob { .. }) => return Ok(None),
            taken => drop(taken.map_err(|e| host(&e))?),
        }
    }
    Ok(Some(record))
}

/// The row of an image that another process has found: as a text, for a process that it starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    scope: String,
    digest: String,
    tag: String,
}

impl From<&ImageRecord> for Chosen {
    fn from(image: &ImageRecord) -> Self {
        let scope = image.scope.name().to_owned();
        Self { scope, digest: image.digest.clone(), tag: image.tag.clone() }
    }
}

impl fmt::Display for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.scope, self.digest, self.tag)
    }
}

impl FromStr for Chosen {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        let mut words = text.splitn(3, ' ').map(str::to_owned);
        match (words.next(), words.next(), words.next()) {
            (Some(scope), Some(digest), Some(tag)) => Ok(Self { scope, digest, tag }),
            _ => Err(Failure::new(FailureKind::Internal, format!("{text:?} names no image"))),
        }
    }
}

impl Chosen {
    /// Its row, or another one of the same image where that is not there any more.
    ///
    /// # Errors
    /// When there is none, it is for another machine, or the images cannot be read.
    pub fn find(&self, config: &NodeConfig) -> Result<ImageRecord, Failure> {
        let host =
            |e: &(dyn std::error::Error + 'static)| Failure::from_error(FailureKind::Host, e);
        let images = matchlock_store::read_images(&ImageDirs::new(&config.cache).images)
            .map_err(|e| host(&e))?;
        let rows = match images {
            Some(images) => images.list().map_err(|e| host(&e))?,
            None => Vec::new(),
        };
        let mut same: Vec<_> = rows.into_iter().filter(|row| row.digest == self.digest).collect();
        let at = same.iter().position(|row| row.scope.name() == self.scope && row.tag == self.tag);
        match at.or((!same.is_empty()).then_some(0)) {
            Some(at) => runnable(same.swap_remove(at)),
            None => {
                let text = format!("image {} was removed or replaced meanwhile", self.tag);
                Err(Failure::new(FailureKind::NotFound, text))
            }
        }
    }
}

/// The same image, unless it is for another machine.
///
/// # Errors
/// That it is.
pub fn runnable(record: ImageRecord) -> Result<ImageRecord, Failure> {
    if record.config.platform.is_empty() {
        return Ok(record);
    }
    let (tag, platform) = (&record.tag, &record.config.platform);
    let text = format!(
        "image {tag} is for {platform}, and this host cannot run that; pull it for this host with \
         `matchlock pull {tag}`"
    );
    Err(Failure::new(FailureKind::Host, text))
}

/// Pulls the image with this name.
///
/// # Errors
/// When it is no name of an image, and why it could not be pulled.
pub async fn pull_image(
    client: &NodeClient,
    name: &str,
    tell: TellPull,
    cancel: CancellationToken,
) -> Result<Pulled, Failure> {
    let image: ImageReference =
        name.parse().map_err(|e| Failure::from_error(FailureKind::Input, &e))?;
    client.pull_image(PullRequest { image, platform: None }, tell, cancel).await
}

/// The image with this name for a session: found here, or pulled without a word.
///
/// # Errors
/// As [`look_up`] and [`pull_image`].
pub async fn find_or_pull(
    config: NodeConfig,
    client: &NodeClient,
    name: &str,
    cancel: &CancellationToken,
) -> Result<ImageRecord, Failure> {
    let tag = name.to_owned();
    let found = tokio::task::spawn_blocking(move || look_up(&config, &tag)).await;
    match found.map_err(|e| Failure::from_error(FailureKind::Internal, &e))?? {
        Some(record) => Ok(record),
        None => {
            let tell = Arc::new(|step| tracing::info!(?step, "pull"));
            let pulled = pull_image(client, name, tell, cancel.clone()).await?;
            runnable(pulled.record)
        }
    }
}
