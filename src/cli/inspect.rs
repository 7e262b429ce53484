//! `matchlock inspect`: one VM and all that happened to it as JSON, without writing anything. A VM
//! that was removed is shown for as long as its history is kept.

use clap::Args;
use matchlock_model::id::VmId;
use matchlock_model::record::LifecycleRecord;
use serde::Serialize;

use super::error::CliError;
use super::get::JsonVm;
use super::looking::{Looking, not_found};
use super::render;
use crate::node::config::NodeConfig;

/// The arguments of `inspect`.
#[derive(Debug, Args)]
#[command(after_help = "\
Prints {vm, lifecycle, history}: the microVM as `get` does (null once it is removed), the latest
record of its lifecycle, and all records, oldest first.")]
pub(super) struct InspectArgs {
    /// VM, also a removed one whose history is still kept
    id: VmId,
}

/// A VM and its history; keys and order are the reference's.
#[derive(Debug, Serialize)]
struct Inspected<'a> {
    vm: Option<JsonVm>,
    lifecycle: Option<&'a LifecycleRecord>,
    history: &'a [LifecycleRecord],
}

pub(super) async fn inspect(args: InspectArgs, config: NodeConfig) -> Result<u8, CliError> {
    let Some(looking) = Looking::begin(&config)? else { return Err(not_found(args.id)) };
    let (shown, history) = looking.with_history(args.id).await?;
    if shown.is_none() && history.is_empty() {
        return Err(not_found(args.id));
    }
    render::json(&Inspected {
        vm: shown.map(JsonVm::new).transpose()?,
        lifecycle: history.last(),
        history: &history,
    })?;
    Ok(0)
}
