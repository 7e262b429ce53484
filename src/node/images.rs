//! Finds an image to run.

use matchlock_host::image::ImageDirs;
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::image::ImageRecord;

use super::config::NodeConfig;

/// The image with this tag.
///
/// # Errors
/// When there is none, or the images cannot be read.
pub fn find_image(config: &NodeConfig, tag: &str) -> Result<ImageRecord, Failure> {
    let host = |e: &(dyn std::error::Error + 'static)| Failure::from_error(FailureKind::Host, e);
    let images = matchlock_store::read_images(&ImageDirs::new(&config.cache).images)
        .map_err(|e| host(&e))?;
    let found = match images {
        Some(images) => images.find(tag).map_err(|e| host(&e))?,
        None => None,
    };
    found.ok_or_else(|| {
        let text = format!(
            "image not found: {tag:?}; import it with `matchlock image import {tag} < archive.tar`, \
             or choose one of `matchlock image ls`"
        );
        Failure::new(FailureKind::NotFound, text)
    })
}
