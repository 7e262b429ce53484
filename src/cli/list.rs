//! `matchlock list`: what is there, told truthfully without writing anything.

use clap::Args;
use matchlock_model::id::VmId;
use matchlock_model::phase::Phase;
use matchlock_model::record::VmRecord;
use matchlock_model::view::Status;
use matchlock_store::ReadPool;
use serde::Serialize;

use super::error::CliError;
use super::render;
use crate::node::config::NodeConfig;
use crate::node::wiring;

/// The arguments of `list`.
#[derive(Debug, Args)]
pub(super) struct ListArgs {
    /// Only those that run
    #[arg(long)]
    running: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// A VM as it is shown.
#[derive(Debug, Clone)]
pub(super) struct ShownVm {
    pub(super) id: VmId,
    pub(super) status: Status,
    pub(super) phase: Phase,
    pub(super) record: VmRecord,
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

/// All VMs with the status that is true now, newest first. Writes nothing.
pub(super) async fn statuses(config: &NodeConfig) -> Result<Vec<ShownVm>, CliError> {
    let Some(reader) = ReadPool::open(&config.home).map_err(|e| CliError::failure(&e))? else {
        return Ok(Vec::new());
    };
    let locks = wiring::owner_locks(config)?;
    let heads = reader.lifecycle_heads().await.map_err(|e| CliError::failure(&e))?;
    let mut shown = Vec::new();
    for record in reader.vms().await.map_err(|e| CliError::failure(&e))? {
        let head = heads.iter().find(|head| head.vm_id == record.id);
        let phase = head.map_or(Phase::Creating, |head| head.phase);
        let owner_lives = locks.is_held(record.id).map_err(|e| CliError::failure(&e))?;
        let status = Status::derive(phase, owner_lives);
        shown.push(ShownVm { id: record.id, status, phase, record });
    }
    Ok(shown)
}

pub(super) async fn list(args: ListArgs, config: NodeConfig) -> Result<u8, CliError> {
    let mut shown = statuses(&config).await?;
    shown.retain(|vm| !args.running || vm.status == Status::Running);
    if args.json {
        let vms: Vec<JsonVm<'_>> = shown.iter().map(json).collect();
        render::json(&vms)?;
        return Ok(0);
    }
    let rows: Vec<Vec<String>> = shown.iter().map(row).collect();
    render::table(&["ID", "STATUS", "IMAGE", "CREATED", "PID"], &rows)?;
    Ok(0)
}

/// The owner's pid, while there is an owner.
const fn pid(vm: &ShownVm) -> i32 {
    match vm.status {
        Status::Starting | Status::Running | Status::Stopping => vm.record.pid,
        Status::Stopped | Status::Crashed | Status::Failed => 0,
    }
}

fn json(vm: &ShownVm) -> JsonVm<'_> {
    JsonVm {
        id: vm.id,
        status: vm.status.name(),
        phase: vm.phase,
        image: &vm.record.image,
        created_at: vm.record.created_at,
        pid: pid(vm),
    }
}

fn row(vm: &ShownVm) -> Vec<String> {
    let pid = match pid(vm) {
        0 => "-".to_owned(),
        pid => pid.to_string(),
    };
    vec![
        vm.id.to_string(),
        vm.status.name().to_owned(),
        vm.record.image.clone(),
        vm.record.created_at.strftime("%Y-%m-%d %H:%M").to_string(),
        pid,
    ]
}
