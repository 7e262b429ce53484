//! `matchlock list`: what is there, told truthfully without writing anything.

use std::sync::Arc;

use clap::Args;
use matchlock_host::owner_lock::OwnerLocks;
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
    pub(super) status: Status,
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

impl ShownVm {
    /// The owner's pid while there is an owner, 0 otherwise.
    pub(super) const fn pid(&self) -> i32 {
        match self.status {
            Status::Starting | Status::Running | Status::Stopping => self.record.pid,
            Status::Stopped | Status::Crashed | Status::Failed => 0,
        }
    }
}

/// The rows, and who lives. Writes nothing.
pub(super) struct Looking {
    pub(super) reader: ReadPool,
    locks: Arc<dyn OwnerLocks>,
}

impl Looking {
    /// `None` if nothing was ever stored.
    pub(super) fn begin(config: &NodeConfig) -> Result<Option<Self>, CliError> {
        let reader = ReadPool::open(&config.home).map_err(|e| CliError::failure(&e))?;
        let Some(reader) = reader else { return Ok(None) };
        Ok(Some(Self { reader, locks: wiring::owner_locks(config)? }))
    }

    /// This VM with the status that is true now, if it has a row.
    pub(super) async fn at(&self, id: VmId) -> Result<Option<ShownVm>, CliError> {
        let record = self.reader.vm(id).await.map_err(|e| CliError::failure(&e))?;
        record.map(|record| self.shown(record)).transpose()
    }

    /// All VMs with the status that is true now, newest first.
    pub(super) async fn at_all(&self) -> Result<Vec<ShownVm>, CliError> {
        let records = self.reader.vms().await.map_err(|e| CliError::failure(&e))?;
        records.into_iter().map(|record| self.shown(record)).collect()
    }

    fn shown(&self, record: VmRecord) -> Result<ShownVm, CliError> {
        let owner_lives = self.locks.is_held(record.id).map_err(|e| CliError::failure(&e))?;
        let status = Status::derive(record.phase, owner_lives);
        Ok(ShownVm { status, record })
    }
}

/// All VMs with the status that is true now, newest first. Writes nothing.
pub(super) async fn statuses(config: &NodeConfig) -> Result<Vec<ShownVm>, CliError> {
    match Looking::begin(config)? {
        Some(looking) => looking.at_all().await,
        None => Ok(Vec::new()),
    }
}

/// This VM with the status that is true now, if it has a row. Writes nothing.
pub(super) async fn status_of(config: &NodeConfig, id: VmId) -> Result<Option<ShownVm>, CliError> {
    match Looking::begin(config)? {
        Some(looking) => looking.at(id).await,
        None => Ok(None),
    }
}

/// A VM that has no row.
pub(super) fn not_found(id: VmId) -> CliError {
    CliError::message(format_args!("VM {id} not found; see `matchlock list`"))
}

/// A VM that would have to run for what was asked.
pub(super) fn not_running(id: VmId, status: Status) -> CliError {
    CliError::message(format_args!("VM {id} is not running (status: {})", status.name()))
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

fn json(vm: &ShownVm) -> JsonVm<'_> {
    JsonVm {
        id: vm.record.id,
        status: vm.status.name(),
        phase: vm.record.phase,
        image: &vm.record.image,
        created_at: vm.record.created_at,
        pid: vm.pid(),
    }
}

fn row(vm: &ShownVm) -> Vec<String> {
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
