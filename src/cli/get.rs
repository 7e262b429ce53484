//! `matchlock get`: one VM as JSON, told truthfully without writing anything.

use clap::Args;
use matchlock_model::id::VmId;
use matchlock_model::record::{Started, VmRecord};
use serde::Serialize;
use serde_json::Value;

use super::error::CliError;
use super::looking::{Shown, not_there, status_of};
use super::render;
use crate::node::config::NodeConfig;

/// The arguments of `get`.
#[derive(Debug, Args)]
#[command(after_help = "\
exit_code is that of the command of `matchlock run`, kept as long as the VM is (--rm=false, -d):
128+n if signal n ended it, null while it runs and when it was lost. started is booted, or restored from a snapshot.")]
pub(super) struct GetArgs {
    /// VM
    id: VmId,
    /// As JSON, which it is anyway
    #[arg(long)]
    json: bool,
}

/// A VM as `get` and `inspect` print it; keys and order are the reference's.
#[derive(Debug, Serialize)]
pub(super) struct JsonVm {
    id: VmId,
    pid: i32,
    status: &'static str,
    image: String,
    created_at: jiff::Timestamp,
    config: Value,
    /// How its own command ended; `null` while it runs, or when nobody knows. Ours, not the reference's.
    exit_code: Option<u8>,
    /// How its machine began; `null` before that, or when nobody knows. Ours, too.
    started: Option<Started>,
}

impl JsonVm {
    /// The VM, with the status that is true now.
    pub(super) fn new(shown: Shown<VmRecord>) -> Result<Self, CliError> {
        let (pid, id) = (shown.pid(), shown.record.id);
        // The reference leaves it empty when it knows nothing.
        let config = match shown.record.config_json.as_str() {
            "" => Value::Null,
            text => serde_json::from_str(text).map_err(|e| {
                CliError::message(format_args!("vms.config_json of {id} is not JSON: {e}"))
            })?,
        };
        Ok(Self {
            id,
            pid,
            status: shown.status.name(),
            image: shown.record.image,
            created_at: shown.record.created_at,
            config,
            exit_code: shown.record.exit_code,
            started: shown.record.started,
        })
    }
}

pub(super) async fn get(args: GetArgs, config: NodeConfig) -> Result<u8, CliError> {
    let Some(shown) = status_of(&config, args.id).await? else {
        return Err(not_there(&config, args.id).await);
    };
    render::json(&JsonVm::new(shown)?)?;
    Ok(0)
}
