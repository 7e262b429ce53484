//! `matchlock image import`: an archive of images, or the files of a root filesystem, from stdin.

use std::io::IsTerminal as _;
use std::os::fd::AsFd;

use clap::Args;
use matchlock_actors::images::{ImportInput, TaggedImport};
use matchlock_host::image::{Change, ImportWish, InvalidWish};
use matchlock_model::failure::Failure;
use matchlock_model::image::check_tag;
use matchlock_model::platform::{InvalidPlatform, Platform};
use matchlock_model::vm::StopMode;
use rustix::fs::FileType;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::error::CliError;
use super::progress::{Elsewhere, Progress};
use super::render;
use crate::node::boot::Node;
use crate::node::config::NodeConfig;
use crate::node::signals::Interrupts;
use crate::node::stdin::{Stdin, StopReading};

/// The arguments of `image import`.
#[derive(Debug, Args)]
#[command(after_help = "\
Stdin is an archive of `docker save` or an OCI layout, or else the files of a root filesystem as `tar`
packs them; plain, or packed by gzip or zstd. An archive of several images needs one of their names,
or no tag at all: then each gets the names that the archive gives it.

Exit codes: 0; 1 when the archive is refused: then nothing of it is an image; 2 wrong usage; 130, 143
or 129 when it was interrupted: then nothing of it is left.

Examples:
  docker save busybox | matchlock image import busybox
  docker save alpine:3 debian:12 | matchlock image import
  docker export my-container | matchlock image import mine -c 'CMD [\"sh\"]'
  debootstrap --variant=minbase stable root
  tar -C root -c . | matchlock image import debian")]
pub(super) struct ImportArgs {
    /// Tag that the image gets
    tag: Option<String>,
    /// Which image of an index, such as linux/amd64/v3 [default: the plain one for this host]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]", value_parser = platform)]
    platform: Option<Platform>,
    /// How a root filesystem is run: a line of a Dockerfile (CMD, ENTRYPOINT, ENV, LABEL, STOPSIGNAL,
    /// USER, WORKDIR)
    #[arg(short, long, value_name = "INSTRUCTION", value_parser = change)]
    change: Vec<Change>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

fn platform(text: &str) -> Result<Platform, InvalidPlatform> {
    text.parse()
}

fn change(text: &str) -> Result<Change, InvalidWish> {
    text.parse()
}

/// An imported image, as scripts get it.
#[derive(Debug, Serialize)]
struct JsonImport<'a> {
    tags: &'a [String],
    digest: &'a str,
    layers: &'a [String],
    size: u64,
    rootfs_path: std::borrow::Cow<'a, str>,
}

pub(super) async fn import(args: ImportArgs, config: NodeConfig) -> Result<u8, CliError> {
    let ImportArgs { tag, platform, change, json } = args;
    if let Some(tag) = &tag {
        check_tag(tag).map_err(CliError::input)?;
    }
    let shown = tag.clone().map(|tag| format!(" {tag}")).unwrap_or_default();
    if std::io::stdin().is_terminal() {
        return Err(CliError::input(format_args!(
            "the archive is read from stdin, which is a terminal: matchlock image import{shown} < archive.tar"
        )));
    }
    let wish = ImportWish { tag, platform, changes: change };
    let mut interrupts = Interrupts::install().map_err(|e| CliError::failure(&e))?;
    let node = Node::boot(config).await?;
    let stdin = std::io::stdin();
    let elsewhere = if json { Elsewhere::Nothing } else { Elsewhere::Lines };
    let shown = Progress::bytes(
        &format!("importing{shown} from stdin..."),
        regular_size(&stdin).map_err(|e| CliError::failure(&e))?,
        elsewhere,
    );
    let (reader, stop) = Stdin::until_dropped().map_err(|e| CliError::failure(&e))?;
    let input = (Box::new(shown.reader(reader)) as ImportInput, stop);
    let imported = interruptible(&node, input, wish, &mut interrupts).await;
    drop(shown);
    node.shutdown(StopMode::Force).await?;
    if let Some(which) = interrupts.first() {
        return Ok(which.exit_code());
    }
    tell(&imported?, json)?;
    Ok(0)
}

fn tell(imported: &[TaggedImport], json: bool) -> Result<(), CliError> {
    if json {
        let shown: Vec<JsonImport<'_>> = imported
            .iter()
            .map(|TaggedImport { tags, image }| JsonImport {
                tags,
                digest: &image.digest,
                layers: &image.diff_ids,
                size: image.size,
                rootfs_path: image.rootfs_path.to_string_lossy(),
            })
            .collect();
        return render::json(&shown);
    }
    for TaggedImport { tags, image } in imported {
        render::lines(tags.iter().map(|tag| format!("Imported: {tag}")))?;
        render::lines([
            format!("Layers: {}", image.layers),
            format!("Size: {}", render::megabytes(image.size)),
        ])?;
    }
    Ok(())
}

/// The size of a regular file, the only kind of which it is known.
fn regular_size(file: impl AsFd) -> std::io::Result<Option<u64>> {
    let found = rustix::fs::fstat(file)?;
    let is_file = FileType::from_raw_mode(found.st_mode) == FileType::RegularFile;
    Ok(u64::try_from(found.st_size).ok().filter(|_| is_file))
}

/// Imports from stdin. The first signal cancels, whatever the import is at, and waits until what it has
/// made is gone; the second changes nothing of that. The third leaves at once.
async fn interruptible(
    node: &Node,
    (input, stop): (ImportInput, StopReading),
    wish: ImportWish,
    interrupts: &mut Interrupts,
) -> Result<Vec<TaggedImport>, Failure> {
    let cancel = CancellationToken::new();
    let mut importing = std::pin::pin!(node.client().import_images(input, wish, cancel.clone()));
    tokio::select! {
        imported = &mut importing => return imported,
        _ = interrupts.next() => {}
    }
    // In this order: a read that was stopped asks whether it was cancelled.
    cancel.cancel();
    drop(stop);
    importing.await
}
