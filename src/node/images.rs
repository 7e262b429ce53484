//! Finds an image to run, here or in its registry.

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
