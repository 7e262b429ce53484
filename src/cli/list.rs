//! `matchlock list`: what is there, told truthfully without writing anything.

use clap::Args;
use matchlock_model::id::VmId;
use matchlock_model::phase::Phase;
use matchlock_model::record::VmSummary;
use matchlock_model::view::Status;
use matchlock_store::BadRow;
use serde::Serialize;

use super::error::CliError;
use super::looking::{AllVms, Shown, statuses};
use super::render;
use crate::node::config::NodeConfig;

/// The arguments of `list`.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes: 0; 1 also when the row of some VM cannot be read: the others are listed.")]
pub(super) struct ListArgs {
    /// Only those that run
    #[arg(long)]
    running: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct JsonVm<'a> {
    id: VmId,
    status: &'static str,
    phase: Phase,
    image: &'a str,
    created_at: jiff::Timestamp,
    pid: i32,
}

pub(super) async fn list(args: ListArgs, config: NodeConfig) -> Result<u8, CliError> {
    let AllVms { mut shown, unreadable } = statuses(&config).await?;
    shown.retain(|vm| !args.running || vm.status == Status::Running);
    if args.json {
        let vms: Vec<JsonVm<'_>> = shown.iter().map(json).collect();
        render::json(&vms)?;
    } else {
        let rows: Vec<Vec<String>> = shown.iter().map(row).collect();
        render::table(&["ID", "STATUS", "IMAGE", "CREATED", "PID"], &rows)?;
    }
    for bad in &unreadable {
        render::error(&cannot_tell(bad));
    }
    Ok(u8::from(!unreadable.is_empty()))
}

/// A VM whose row cannot be read, and how it is got rid of.
fn cannot_tell(bad: &BadRow) -> CliError {
    match bad.key.parse::<VmId>() {
        Ok(id) => CliError::message(format_args!("{bad}; `matchlock rm {id}` removes the VM")),
        Err(_) => without_id(bad),
    }
}

/// A row that says of no VM that it is its.
pub(super) fn without_id(bad: &BadRow) -> CliError {
    CliError::message(format_args!("{bad}; correct or delete that row in state.db"))
}

fn json(vm: &Shown<VmSummary>) -> JsonVm<'_> {
    JsonVm {
        id: vm.record.id,
        status: vm.status.name(),
        phase: vm.record.phase,
        image: &vm.record.image,
        created_at: vm.record.created_at,
        pid: vm.pid(),
    }
}

fn row(vm: &Shown<VmSummary>) -> Vec<String> {
    let pid = match vm.pid() {
        0 => "-".to_owned(),
        pid => pid.to_string(),
    };
    vec![
        vm.record.id.to_string(),
        vm.status.name().to_owned(),
        vm.record.image.clone(),
        vm.record.created_at.strftime("%Y-%m-%d %H:%M").to_string(),
        pid,
    ]
}
