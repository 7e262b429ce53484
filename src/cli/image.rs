//! `matchlock image`: import, list, show, tag and remove images.

use clap::{Args, Subcommand};
use matchlock_host::image::ImageDirs;
use matchlock_model::image::{ImageRecord, check_tag};
use matchlock_model::vm::StopMode;
use serde::Serialize;

use super::error::CliError;
use super::image_gc;
use super::image_import;
use super::image_inspect;
use super::kill::tell_all_but_the_last;
use super::render;
use super::table::{self, Cell, Column};
use crate::node::boot::Node;
use crate::node::config::NodeConfig;

/// The arguments of `image`.
#[derive(Debug, Args)]
pub(super) struct ImageArgs {
    #[command(subcommand)]
    verb: ImageVerb,
}

#[derive(Debug, Subcommand)]
enum ImageVerb {
    /// Import images from an archive, or the files of a root filesystem, from stdin
    Import(image_import::ImportArgs),
    /// List images
    #[command(visible_alias = "list")]
    Ls {
        /// Tags alone
        #[arg(short, long, conflicts_with = "json")]
        quiet: bool,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Print images as JSON: their config, layers, size, and who uses them
    Inspect(image_inspect::InspectArgs),
    /// Give an image another tag
    #[command(after_help = "\
An image that had the new tag loses it. Exit codes: 0; 1 when there is no such image.")]
    Tag {
        /// Tag of the image
        source: String,
        /// Tag that it gets as well
        tag: String,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove images
    #[command(
        visible_alias = "remove",
        after_help = "\
An image that a microVM runs from is refused, unless another one has the same root filesystem: then
only the tag goes.

Exit codes: 0; 1 when one could not be removed: the others are."
    )]
    Rm {
        /// Tags of the images
        #[arg(required = true, value_name = "TAG")]
        tags: Vec<String>,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove what no image needs
    Gc(image_gc::GcArgs),
}

pub(super) async fn image(args: ImageArgs, config: NodeConfig) -> Result<u8, CliError> {
    match args.verb {
        ImageVerb::Import(args) => image_import::import(args, config).await,
        ImageVerb::Ls { quiet, json } => ls(quiet, json, &config),
        ImageVerb::Inspect(args) => image_inspect::inspect(args, config).await,
        ImageVerb::Tag { source, tag, json } => add_tag(source, tag, json, config).await,
        ImageVerb::Rm { tags, json } => rm(tags, json, config).await,
        ImageVerb::Gc(args) => image_gc::gc(args, config).await,
    }
}

#[derive(Debug, Serialize)]
struct JsonImage<'a> {
    tag: &'a str,
    scope: &'static str,
    source: &'a str,
    digest: &'a str,
    size: u64,
    created_at: jiff::Timestamp,
}

fn ls(quiet: bool, json: bool, config: &NodeConfig) -> Result<u8, CliError> {
    let images = matchlock_store::read_images(&ImageDirs::new(&config.cache).images)
        .map_err(|e| CliError::failure(&e))?;
    let images = match images {
        Some(images) => images.list().map_err(|e| CliError::failure(&e))?,
        None => Vec::new(),
    };
    if json {
        let shown: Vec<JsonImage<'_>> = images.iter().map(json_image).collect();
        render::json(&shown)?;
        return Ok(0);
    }
    if quiet {
        render::lines(images.iter().map(|image| &image.tag))?;
        return Ok(0);
    }
    let rows: Vec<Vec<Cell>> = images.iter().map(row).collect();
    table::print(COLUMNS, &rows)?;
    Ok(0)
}

fn json_image(image: &ImageRecord) -> JsonImage<'_> {
    JsonImage {
        tag: &image.tag,
        scope: image.scope.name(),
        source: &image.source,
        digest: &image.digest,
        size: image.size,
        created_at: image.created_at,
    }
}

const COLUMNS: &[Column] = &[
    Column::cut("TAG", 12),
    Column::whole("IMAGE ID"),
    Column::whole("SOURCE"),
    Column::whole("SIZE"),
    Column::cut("CREATED", 10),
];

fn row(image: &ImageRecord) -> Vec<Cell> {
    vec![
        image.tag.clone().into(),
        short_id(&image.digest).into(),
        image.source.clone().into(),
        render::megabytes(image.size).into(),
        image.created_at.strftime("%Y-%m-%d %H:%M:%S").to_string().into(),
    ]
}

/// As docker shows it: twelve hex digits.
fn short_id(digest: &str) -> String {
    let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
    hex.chars().take(12).collect()
}

/// An image that lost its tag, as scripts get it.
#[derive(Debug, Serialize)]
struct JsonRemoved {
    tag: String,
    digest: String,
    /// Whether its root filesystem went with it.
    blob_removed: bool,
}

async fn rm(tags: Vec<String>, json: bool, config: NodeConfig) -> Result<u8, CliError> {
    let node = Node::boot(config).await?;
    let mut removed = Vec::new();
    let mut failed = None;
    for tag in tags {
        match node.client().remove_image(tag.clone()).await {
            Ok(image) => {
                if !json {
                    render::lines([format!("Removed {tag}")])?;
                }
                let (digest, blob_removed) = (image.record.digest, image.blob_removed);
                removed.push(JsonRemoved { tag, digest, blob_removed });
            }
            Err(failure) => tell_all_but_the_last(&mut failed, failure.into()),
        }
    }
    node.shutdown(StopMode::Force).await?;
    if json {
        render::json(&removed)?;
    }
    failed.map_or(Ok(0), Err)
}

async fn add_tag(
    source: String,
    tag: String,
    json: bool,
    config: NodeConfig,
) -> Result<u8, CliError> {
    check_tag(&tag).map_err(CliError::input)?;
    let node = Node::boot(config).await?;
    let tagged = node.client().tag_image(source.clone(), tag.clone()).await;
    node.shutdown(StopMode::Force).await?;
    let record = tagged?;
    if json {
        render::json(&json_image(&record))?;
    } else {
        render::lines([format!("Tagged {source} as {tag}")])?;
    }
    Ok(0)
}
