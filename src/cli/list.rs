//! `matchlock list`: what is there, told truthfully without writing anything.

use anstyle::AnsiColor;
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
use super::table::{self, Cell, Column};
use crate::node::config::NodeConfig;

/// The arguments of `list`.
#[derive(Debug, Args)]
#[command(after_help = "\
Status:
  starting, running, stopping  as its owner says
  hanging   its guest does not answer
  dead      its owner runs, its hypervisor is gone: `matchlock rm -f`
  crashed   its owner is gone: `matchlock gc` finishes
  failed    something could not be done: `matchlock gc` tries again
  stopped   it holds nothing any more but its logs
  removing  `matchlock rm` has not come to its end: `matchlock gc` finishes

PID is the process that owns it: `matchlock run`, or the session with all of its microVMs. The
hypervisor's own is in `matchlock inspect`.
EXIT is the exit code of the command of `matchlock run`, once it has ended (--rm=false, -d).

Exit codes: 0; 1 also when the row of some VM cannot be read: the others are listed.")]
pub(super) struct ListArgs {
    /// All VMs, which is what is listed anyway
    #[arg(short, long, conflicts_with = "running")]
    all: bool,
    /// Only those that run
    #[arg(long)]
    running: bool,
    /// Ids alone
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,
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
    exit_code: Option<u8>,
}

const COLUMNS: &[Column] = &[
    Column::whole("ID"),
    Column::whole("STATUS"),
    Column::cut("IMAGE", 8),
    Column::cut("CREATED (UTC)", 10),
    Column::whole("PID"),
    Column::whole("EXIT"),
];

pub(super) async fn list(args: ListArgs, config: NodeConfig) -> Result<u8, CliError> {
    let AllVms { mut shown, unreadable } = statuses(&config).await?;
    shown.retain(|vm| !args.running || vm.status.is_up());
    if args.json {
        let vms: Vec<JsonVm<'_>> = shown.iter().map(json).collect();
        render::json(&vms)?;
    } else if args.quiet {
        render::lines(shown.iter().map(|vm| vm.record.id.to_string()))?;
    } else {
        let rows: Vec<Vec<Cell>> = shown.iter().map(row).collect();
        table::print(COLUMNS, &rows)?;
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
        exit_code: vm.record.exit_code,
    }
}

const fn colour(status: Status) -> Option<AnsiColor> {
    match status {
        Status::Running => Some(AnsiColor::Green),
        Status::Starting | Status::Stopping | Status::Removing => Some(AnsiColor::Yellow),
        Status::Hanging | Status::Dead | Status::Crashed | Status::Failed => Some(AnsiColor::Red),
        Status::Stopped => None,
    }
}

fn row(vm: &Shown<VmSummary>) -> Vec<Cell> {
    let pid = match vm.pid() {
        0 => "-".to_owned(),
        pid => pid.to_string(),
    };
    vec![
        vm.record.id.to_string().into(),
        Cell::coloured(vm.status.name(), colour(vm.status)),
        vm.record.image.clone().into(),
        vm.record.created_at.strftime("%Y-%m-%d %H:%M").to_string().into(),
        pid.into(),
        vm.record.exit_code.map_or_else(|| "-".to_owned(), |code| code.to_string()).into(),
    ]
}
