//! `matchlock inspect`: VMs and all that happened to them as JSON, without writing anything. A VM that
//! was removed is shown for as long as its history is kept.

use clap::Args;
use matchlock_model::id::VmId;
use matchlock_model::record::LifecycleRecord;
use serde::Serialize;

use super::error::CliError;
use super::get::JsonVm;
use super::kill::tell_all_but_the_last;
use super::looking::{Looking, not_found};
use super::render;
use crate::node::config::NodeConfig;

/// The arguments of `inspect`.
#[derive(Debug, Args)]
#[command(after_help = "\
Prints {vm, lifecycle, history}: the microVM as `get` does (null once it is removed), the latest
record of its lifecycle, and all records, oldest first. Of several VMs an array of these.")]
pub(super) struct InspectArgs {
    /// VMs, also removed ones whose history is still kept
    #[arg(required = true, value_name = "ID")]
    ids: Vec<VmId>,
    /// As JSON, which it is anyway
    #[arg(long)]
    json: bool,
}

/// A VM and its history; keys and order are the reference's.
#[derive(Debug, Serialize)]
struct Inspected {
    vm: Option<JsonVm>,
    lifecycle: Option<LifecycleRecord>,
    history: Vec<LifecycleRecord>,
}

pub(super) async fn inspect(args: InspectArgs, config: NodeConfig) -> Result<u8, CliError> {
    let looking = Looking::begin(&config)?;
    let mut inspected = Vec::new();
    let mut failed = None;
    for id in &args.ids {
        match look(looking.as_ref(), *id).await {
            Ok(found) => inspected.push(found),
            Err(error) => tell_all_but_the_last(&mut failed, error),
        }
    }
    match (&*inspected, &*args.ids) {
        ([], [_]) => {}
        ([one], [_]) => render::json(one)?,
        (several, _) => render::json(&several)?,
    }
    failed.map_or(Ok(0), Err)
}

async fn look(looking: Option<&Looking>, id: VmId) -> Result<Inspected, CliError> {
    let Some(looking) = looking else { return Err(not_found(id)) };
    let (shown, history) = looking.with_history(id).await?;
    if shown.is_none() && history.is_empty() {
        return Err(not_found(id));
    }
    Ok(Inspected {
        vm: shown.map(JsonVm::new).transpose()?,
        lifecycle: history.last().cloned(),
        history,
    })
}
