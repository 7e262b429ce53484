//! `matchlock rm`: remove a stopped VM. It is reconciled first; what cannot be cleaned keeps its
//! record.

use clap::Args;
use matchlock_actors::reconciler::{Outcome, VmReport};
use matchlock_model::id::VmId;
use matchlock_model::reconcile::Goal;
use matchlock_model::vm::StopMode;

use super::error::CliError;
use super::kill::{take_down, take_over_with};
use super::looking::{Looking, not_found};
use super::render;
use crate::node::boot::Node;
use crate::node::config::NodeConfig;
use crate::points::{RM, injected};

/// The arguments of `rm`.
#[derive(Debug, Args)]
pub(super) struct RmArgs {
    /// Take a running VM down first, without asking its guest
    #[arg(short, long)]
    force: bool,
    /// VM, as `matchlock list` shows it
    id: VmId,
}

pub(super) async fn rm(args: RmArgs, config: NodeConfig) -> Result<u8, CliError> {
    let id = args.id;
    // Its rows need not be readable to be removed.
    let is_there = match Looking::begin(&config)? {
        Some(looking) => looking.has(id).await?,
        None => false,
    };
    if !is_there {
        return Err(not_found(id));
    }
    let node = Node::boot(config.clone()).await?;
    let mut report = remove(&node, id).await;
    if args.force && matches!(&report, Ok(VmReport { outcome: Outcome::Running, .. })) {
        report = match take_down(&config, id, true).await {
            Ok(()) => remove(&node, id).await,
            Err(error) => take_over_with(&node, id, Goal::Remove, error).await,
        };
    }
    node.shutdown(StopMode::Force).await?;
    match report?.outcome {
        // Unknown: its owner has just removed it.
        Outcome::Cleaned { .. } | Outcome::Unknown => render::lines([format!("Removed {id}")])?,
        Outcome::Running => {
            return Err(CliError::message(format_args!(
                "VM {id} is running, or another matchlock works on it; stop it with `matchlock kill \
                 {id}`, or use --force"
            )));
        }
        Outcome::Failed { step, error, .. } => {
            return Err(CliError::message(format_args!(
                "VM {id} was not removed: {step}: {error}; its record is kept, run `matchlock gc {id}`"
            )));
        }
    }
    Ok(0)
}

async fn remove(node: &Node, id: VmId) -> Result<VmReport, CliError> {
    RM.before("remove").map_err(injected)?;
    let mut reports = node.client().reconcile(Some(id), Goal::Remove).await?;
    RM.after("remove").map_err(injected)?;
    reports.pop().ok_or_else(|| CliError::message(format_args!("no report about VM {id}")))
}
