//! `matchlock image inspect`: images as JSON, with how they are run and which VMs use them. Writes
//! nothing.

use std::path::Path;

use clap::Args;
use matchlock_host::image::ImageDirs;
use matchlock_model::id::VmId;
use matchlock_model::image::{ImageConfig, ImageRecord};
use serde::Serialize;

use super::error::CliError;
use super::kill::tell_all_but_the_last;
use super::looking::{AllVms, Looking};
use super::render;
use crate::node::config::NodeConfig;

/// The arguments of `image inspect`.
#[derive(Debug, Args)]
#[command(after_help = "\
Prints an array with one object for each image. `layers` are the digests of what it was made of
(empty for an image of another program), `config` says how it is run, `used_by` are the microVMs that
run from it, under whichever tag.

Exit codes: 0; 1 when there is no such image, or something could not be looked at.

Example:
  matchlock image inspect busybox | jq '.[0].config.entrypoint'")]
pub(super) struct InspectArgs {
    /// Tags of the images
    #[arg(required = true, value_name = "TAG")]
    tags: Vec<String>,
    /// As JSON, which it is anyway
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Inspected {
    tag: String,
    scope: &'static str,
    source: String,
    digest: String,
    /// All tags that mean the same root filesystem.
    tags: Vec<String>,
    created_at: jiff::Timestamp,
    size: u64,
    rootfs_path: String,
    layers: Vec<String>,
    config: Config,
    used_by: Vec<VmId>,
}

/// How an image is run: every key is there, also without a value.
#[derive(Debug, Serialize)]
struct Config {
    user: String,
    working_dir: String,
    entrypoint: Vec<String>,
    cmd: Vec<String>,
    env: std::collections::BTreeMap<String, String>,
    labels: std::collections::BTreeMap<String, String>,
    stop_signal: String,
    /// Empty if it is for this host.
    platform: String,
}

impl From<ImageConfig> for Config {
    fn from(config: ImageConfig) -> Self {
        let ImageConfig { user, working_dir, entrypoint, cmd, env, labels, stop_signal, platform } =
            config;
        Self { user, working_dir, entrypoint, cmd, env, labels, stop_signal, platform }
    }
}

pub(super) async fn inspect(args: InspectArgs, config: NodeConfig) -> Result<u8, CliError> {
    let images = matchlock_store::read_images(&ImageDirs::new(&config.cache).images)
        .map_err(|e| CliError::failure(&e))?;
    let all = match &images {
        Some(images) => images.list().map_err(|e| CliError::failure(&e))?,
        None => Vec::new(),
    };
    let mut failed = None;
    let (users, unreadable) = users(&config).await?;
    for error in unreadable {
        tell_all_but_the_last(&mut failed, error);
    }
    let mut inspected = Vec::new();
    for tag in &args.tags {
        let found = match &images {
            Some(images) => images.find(tag).map_err(|e| CliError::failure(&e))?,
            None => None,
        };
        match found {
            Some(image) => inspected.push(of(&image, &all, &users)),
            None => {
                let error = CliError::message(format_args!("image not found: {tag:?}"));
                tell_all_but_the_last(&mut failed, error);
            }
        }
    }
    render::json(&inspected)?;
    failed.map_or(Ok(0), Err)
}

fn of(image: &ImageRecord, all: &[ImageRecord], users: &[(VmId, String)]) -> Inspected {
    let is_its = |path: &str| same_blob(path, &image.rootfs_path);
    let tags = all.iter().filter(|other| is_its(&other.rootfs_path)).map(|other| other.tag.clone());
    let used_by = users.iter().filter(|(_, path)| is_its(path)).map(|(vm, _)| *vm);
    Inspected {
        tags: tags.collect(),
        used_by: used_by.collect(),
        tag: image.tag.clone(),
        scope: image.scope.name(),
        source: image.source.clone(),
        digest: image.digest.clone(),
        created_at: image.created_at,
        size: image.size,
        rootfs_path: image.rootfs_path.clone(),
        layers: image.layers.clone(),
        config: image.config.clone().into(),
    }
}

/// By name: the cache may have been reached by another path.
fn same_blob(one: &str, other: &str) -> bool {
    Path::new(one).file_name() == Path::new(other).file_name()
}

/// The VMs that have an owner, with the root filesystem that each runs from; and what is wrong with
/// the rows that cannot be read.
async fn users(config: &NodeConfig) -> Result<(Vec<(VmId, String)>, Vec<CliError>), CliError> {
    let Some(looking) = Looking::begin(config)? else { return Ok((Vec::new(), Vec::new())) };
    let AllVms { shown, unreadable } = looking.at_all().await?;
    let mut users = Vec::new();
    for vm in shown.iter().filter(|vm| vm.is_owned) {
        let id = vm.record.id;
        let (_, history) = looking.with_history(id).await?;
        let base = history.into_iter().rev().find_map(|record| record.resources.base_disk);
        users.extend(base.map(|path| (id, path)));
    }
    let errors = unreadable
        .iter()
        .map(|bad| CliError::message(format_args!("{bad}: nobody can tell which image it uses")));
    Ok((users, errors.collect()))
}
