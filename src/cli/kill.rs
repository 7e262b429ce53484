//! `matchlock kill`: ask a VM's owner to take it down, and wait until it has.

use std::time::Duration;

use clap::Args;
use matchlock_model::id::VmId;
use matchlock_model::view::Status;
use tokio::time::{Instant, sleep};

use super::error::CliError;
use super::looking::{AllVms, not_found, not_running, status_of, statuses};
use super::render;
use crate::node::config::NodeConfig;
use crate::node::owner;
use crate::node::wiring;

/// The arguments of `kill`.
#[derive(Debug, Args)]
pub(super) struct KillArgs {
    /// Kill the hypervisor at once, without asking the guest
    #[arg(short, long)]
    force: bool,
    /// All running VMs
    #[arg(long, conflicts_with = "id")]
    all: bool,
    /// VM, as `matchlock list` shows it
    #[arg(required_unless_present = "all")]
    id: Option<VmId>,
}

/// How long we wait for an owner: the grace of its guest, a power-off, a clean-up. An owner with a
/// longer grace goes on without us.
const OWNER_LIMIT: Duration = Duration::from_secs(120);

/// How long an owner may take that asks nobody.
const FORCE_LIMIT: Duration = Duration::from_secs(20);

/// How long an owner may take to let go of its VM after its last word.
const RELEASE_LIMIT: Duration = Duration::from_secs(10);

/// How often the lock is looked at meanwhile: nobody can be told when a lock is released.
const RELEASE_POLL: Duration = Duration::from_millis(5);

pub(super) async fn kill(args: KillArgs, config: NodeConfig) -> Result<u8, CliError> {
    let mut failed = None;
    let ids = match args.id {
        Some(id) => {
            let vm = status_of(&config, id).await?.ok_or_else(|| not_found(id))?;
            if !is_owned(vm.status) {
                return Err(not_running(id, vm.status));
            }
            vec![id]
        }
        None => {
            let AllVms { shown, unreadable } = statuses(&config).await?;
            for bad in unreadable {
                tell_all_but_the_last(&mut failed, CliError::failure(&bad));
            }
            shown.iter().filter(|vm| is_owned(vm.status)).map(|vm| vm.record.id).collect()
        }
    };
    for id in ids {
        match take_down(&config, id, args.force).await {
            Ok(()) => render::lines([format!("Killed {id}")])?,
            Err(error) => tell_all_but_the_last(&mut failed, error),
        }
    }
    failed.map_or(Ok(0), Err)
}

/// The last error is what the verb fails with.
fn tell_all_but_the_last(failed: &mut Option<CliError>, error: CliError) {
    if let Some(before) = failed.replace(error) {
        render::error(&before);
    }
}

const fn is_owned(status: Status) -> bool {
    matches!(status, Status::Starting | Status::Running | Status::Stopping)
}

/// Asks the owner, and sees that it has let go and that nothing was left.
pub(super) async fn take_down(config: &NodeConfig, id: VmId, force: bool) -> Result<(), CliError> {
    let limit = if force { FORCE_LIMIT } else { OWNER_LIMIT };
    owner::kill(&config.vms_dir(), id, force, limit).await?;
    let locks = wiring::owner_locks(config)?;
    let deadline = Instant::now() + RELEASE_LIMIT;
    while locks.is_held(id).map_err(|e| CliError::failure(&e))? {
        if Instant::now() > deadline {
            let text = format!("VM {id} is down, but its owner still holds it");
            return Err(CliError::message(text));
        }
        sleep(RELEASE_POLL).await;
    }
    // The owner's last word may be missing because it was killed itself.
    match status_of(config, id).await? {
        Some(vm) if vm.status != Status::Stopped => Err(CliError::message(format_args!(
            "VM {id} was not cleaned up (status: {}): its owner ended before; run `matchlock gc {id}`",
            vm.status.name()
        ))),
        _ => Ok(()),
    }
}
