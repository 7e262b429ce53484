//! `matchlock image gc`: removes what no image needs, never what somebody uses.

use clap::Args;
use matchlock_host::image::{Garbage, GarbageKind, Garbages};
use matchlock_model::failure;
use matchlock_model::vm::StopMode;
use serde::Serialize;

use super::error::CliError;
use super::render;
use crate::node::boot::Node;
use crate::node::config::NodeConfig;

/// The arguments of `image gc`.
#[derive(Debug, Args)]
#[command(
    visible_alias = "prune",
    after_help = "\
Removes root filesystems that no image names, what interrupted imports left, and downloads that no
image needs. What is being imported or what a microVM runs from stays. Images stay: `image rm` removes
them.

Exit codes: 0; 1 when something could not be removed or looked at."
)]
pub(super) struct GcArgs {
    /// Only say what would be removed; each thing is locked for a moment
    #[arg(long)]
    dry_run: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    dry_run: bool,
    removed: Vec<Thing>,
    /// Unwanted, and used just now.
    in_use: Vec<Thing>,
    freed: u64,
    errors: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Thing {
    kind: &'static str,
    path: String,
    bytes: Option<u64>,
}

impl Thing {
    fn of(garbage: &Garbage) -> Self {
        let path = garbage.path.to_string_lossy().into_owned();
        Self { kind: garbage.kind.name(), path, bytes: garbage.bytes }
    }
}

pub(super) async fn gc(args: GcArgs, config: NodeConfig) -> Result<u8, CliError> {
    let node = Node::boot(config).await?;
    let swept = node.client().sweep_images(args.dry_run).await;
    node.shutdown(StopMode::Force).await?;
    let found = swept?;
    let errors: Vec<String> = found.errors.iter().map(|e| failure::chain(e)).collect();
    let freed = found.removed.iter().filter_map(|garbage| garbage.bytes).sum();
    if args.json {
        let things = |list: &[Garbage]| list.iter().map(Thing::of).collect();
        render::json(&Report {
            dry_run: args.dry_run,
            removed: things(&found.removed),
            in_use: things(&found.in_use),
            freed,
            errors: errors.clone(),
        })?;
    } else {
        render::lines(summary(&found, freed, args.dry_run))?;
        let is_used = |garbage: &&Garbage| garbage.kind == GarbageKind::Blob;
        let used = found.in_use.iter().filter(is_used).count();
        if used > 0 {
            render::note(&format!("{used} blobs of no image are in use, and stay until that ends"));
        }
    }
    for error in &errors {
        render::error(&CliError::message(error));
    }
    Ok(u8::from(!errors.is_empty()))
}

fn summary(found: &Garbages, freed: u64, dry_run: bool) -> Vec<String> {
    let removed = if dry_run { "Would remove" } else { "Removed" };
    let count = |kind| found.removed.iter().filter(|garbage| garbage.kind == kind).count();
    let mut lines = vec![format!("{removed} {} unreferenced blobs", count(GarbageKind::Blob))];
    let rest = [
        (GarbageKind::Temporary, "remains of interrupted imports"),
        (GarbageKind::Content, "downloads that no image needs"),
    ];
    for (kind, what) in rest {
        if count(kind) > 0 {
            lines.push(format!("{removed} {} {what}", count(kind)));
        }
    }
    if freed > 0 {
        let verb = if dry_run { "Would free" } else { "Freed" };
        lines.push(format!("{verb} {}", render::megabytes(freed)));
    }
    lines
}
