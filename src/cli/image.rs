//! `matchlock image`: import, list and remove images.

use std::io::IsTerminal as _;
use std::os::fd::AsFd;

use clap::{Args, Subcommand};
use matchlock_actors::images::ImportInput;
use matchlock_host::image::{ImageDirs, ImportedImage};
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::image::{ImageRecord, check_tag};
use matchlock_model::vm::StopMode;
use rustix::fs::FileType;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::error::CliError;
use super::progress::{Elsewhere, Progress};
use super::render;
use super::table::{self, Cell, Column};
use crate::node::boot::Node;
use crate::node::config::NodeConfig;
use crate::node::signals::Interrupts;

/// The arguments of `image`.
#[derive(Debug, Args)]
pub(super) struct ImageArgs {
    #[command(subcommand)]
    verb: ImageVerb,
}

#[derive(Debug, Subcommand)]
enum ImageVerb {
    /// Import an archive from stdin: of `docker save`, or an OCI layout
    #[command(after_help = "\
Example:
  docker save busybox | matchlock image import busybox")]
    Import {
        /// Tag that the image gets
        tag: String,
    },
    /// List images
    #[command(visible_alias = "list")]
    Ls {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove an image
    #[command(visible_alias = "remove")]
    Rm {
        /// Tag of the image
        tag: String,
    },
}

pub(super) async fn image(args: ImageArgs, config: NodeConfig) -> Result<u8, CliError> {
    match args.verb {
        ImageVerb::Import { tag } => import(tag, config).await,
        ImageVerb::Ls { json } => ls(json, &config),
        ImageVerb::Rm { tag } => rm(tag, config).await,
    }
}

async fn import(tag: String, config: NodeConfig) -> Result<u8, CliError> {
    check_tag(&tag).map_err(CliError::input)?;
    if std::io::stdin().is_terminal() {
        return Err(CliError::input(format_args!(
            "the archive is read from stdin, which is a terminal: matchlock image import {tag} < archive.tar"
        )));
    }
    let mut interrupts = Interrupts::install().map_err(|e| CliError::failure(&e))?;
    let node = Node::boot(config).await?;
    let stdin = std::io::stdin();
    let shown = Progress::bytes(
        &format!("importing {tag} from stdin..."),
        regular_size(&stdin).map_err(|e| CliError::failure(&e))?,
        Elsewhere::Lines,
    );
    let input = Box::new(shown.reader(stdin));
    let imported = interruptible_import(&node, input, &tag, &mut interrupts).await;
    drop(shown);
    if let Some(which) = interrupts.first() {
        // An import that still waits for its archive ends with this process.
        return Ok(which.exit_code());
    }
    node.shutdown(StopMode::Force).await?;
    let imported = imported?;
    render::lines([
        format!("Imported: {tag}"),
        format!("Layers: {}", imported.layers),
        format!("Size: {}", render::megabytes(imported.size)),
    ])?;
    Ok(0)
}

/// The size of a regular file, the only kind of which it is known.
fn regular_size(file: impl AsFd) -> std::io::Result<Option<u64>> {
    let found = rustix::fs::fstat(file)?;
    let is_file = FileType::from_raw_mode(found.st_mode) == FileType::RegularFile;
    Ok(u64::try_from(found.st_size).ok().filter(|_| is_file))
}

/// Imports from stdin. The first signal cancels; it takes effect with the next bytes of the
/// archive, and if none come a second one gives up waiting: what was made is locked only while we
/// live, and the next import sweeps it.
async fn interruptible_import(
    node: &Node,
    input: ImportInput,
    tag: &str,
    interrupts: &mut Interrupts,
) -> Result<ImportedImage, Failure> {
    let cancel = CancellationToken::new();
    let mut importing =
        std::pin::pin!(node.client().import_image(input, tag.to_owned(), cancel.clone()));
    tokio::select! {
        imported = &mut importing => return imported,
        _ = interrupts.next() => cancel.cancel(),
    }
    tokio::select! {
        imported = &mut importing => imported,
        _ = interrupts.next() => {
            Err(Failure::new(FailureKind::Cancelled, "the import was interrupted"))
        }
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

fn ls(json: bool, config: &NodeConfig) -> Result<u8, CliError> {
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
    Column::whole("SOURCE"),
    Column::whole("SIZE"),
    Column::cut("CREATED", 10),
];

fn row(image: &ImageRecord) -> Vec<Cell> {
    vec![
        image.tag.clone().into(),
        image.source.clone().into(),
        render::megabytes(image.size).into(),
        image.created_at.strftime("%Y-%m-%d %H:%M:%S").to_string().into(),
    ]
}

async fn rm(tag: String, config: NodeConfig) -> Result<u8, CliError> {
    let node = Node::boot(config).await?;
    let removed = node.client().remove_image(tag.clone()).await;
    node.shutdown(StopMode::Force).await?;
    removed?;
    render::lines([format!("Removed {tag}")])?;
    Ok(0)
}
