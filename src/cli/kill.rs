//! `matchlock kill`: ask each VM's owner to take it down, and wait until it has.
//!
//! The owner is asked over the VM's socket, and only while it holds the VM's lock: no process id is
//! ever signalled, so none that was given to somebody else meanwhile.

use std::time::Duration;

use clap::Args;
use futures::{StreamExt, stream};
use matchlock_actors::reconciler::{OBSERVE, Outcome, VmReport};
use matchlock_model::failure::FailureKind;
use matchlock_model::id::VmId;
use matchlock_model::phase::Phase;
use matchlock_model::reconcile::Goal;
use matchlock_model::vm::StopMode;
use tokio::time::{Instant, sleep};

use super::error::CliError;
use super::looking::{AllVms, migrate, not_running, not_there, status_of, statuses};
use super::render;
use crate::node::boot::Node;
use crate::node::config::NodeConfig;
use crate::node::owner::{self, KillRequest};
use crate::node::wiring;

/// The arguments of `kill`.
#[derive(Debug, Args)]
#[command(after_help = "\
Asks the guest to power off, within the time that `run --graceful-shutdown` gave it, and returns
once nothing of the VM is left but its record and logs (or not even those, after `run --rm`).

Exit codes: 0 when all of them are down (or asked, with --no-wait); 1 when one is not.")]
pub(super) struct KillArgs {
    /// Kill the hypervisor at once, without asking the guest; an owner that does not answer is
    /// overruled
    #[arg(short, long)]
    force: bool,
    /// Return once the owners have heard
    #[arg(long)]
    no_wait: bool,
    /// All running VMs
    #[arg(short, long, conflicts_with = "ids")]
    all: bool,
    /// VMs, as `matchlock list` shows them
    #[arg(required_unless_present = "all", value_name = "ID")]
    ids: Vec<VmId>,
}

/// How long we wait for an owner: the grace of its guest, a power-off, a clean-up. An owner with a
/// longer grace goes on without us.
const OWNER_LIMIT: Duration = Duration::from_secs(120);

/// How long an owner may take that asks nobody.
const FORCE_LIMIT: Duration = Duration::from_secs(10);

/// How long an owner may take to hear of it before it is overruled.
const HEARD_LIMIT: Duration = Duration::from_secs(3);

/// How long an owner may take to let go of its VM after its last word.
const RELEASE_LIMIT: Duration = Duration::from_secs(10);

/// How often the lock is looked at meanwhile: nobody can be told when a lock is released.
const RELEASE_POLL: Duration = Duration::from_millis(5);

/// How many VMs are worked on at once.
pub(super) const AT_ONCE: usize = 16;

pub(super) async fn kill(args: KillArgs, config: NodeConfig) -> Result<u8, CliError> {
    migrate(&config)?;
    let mut failed = None;
    let mut ids = args.ids;
    if args.all {
        let AllVms { shown, unreadable } = statuses(&config).await?;
        for bad in unreadable {
            tell_all_but_the_last(&mut failed, CliError::failure(&bad));
        }
        for vm in shown {
            let id = vm.record.id;
            if vm.is_owned || (args.force && has_owner(&config, id)?) {
                ids.push(id);
            }
        }
    }
    let (force, wait) = (args.force, !args.no_wait);
    let config = &config;
    // One that takes its time keeps no other waiting.
    let mut killed = stream::iter(distinct(ids))
        .map(|id| async move { (id, kill_one(config, id, force, wait, args.all).await) })
        .buffer_unordered(AT_ONCE);
    while let Some((id, result)) = killed.next().await {
        match result {
            Ok(Some(word)) => render::lines([format!("{word} {id}")])?,
            Ok(None) => {}
            Err(error) => tell_all_but_the_last(&mut failed, error),
        }
    }
    failed.map_or(Ok(0), Err)
}

/// Each once, in the order in which they were given.
pub(super) fn distinct(ids: Vec<VmId>) -> Vec<VmId> {
    let mut seen = std::collections::HashSet::new();
    ids.into_iter().filter(|id| seen.insert(*id)).collect()
}

/// The last error is what the verb fails with.
pub(super) fn tell_all_but_the_last(failed: &mut Option<CliError>, error: CliError) {
    if let Some(before) = failed.replace(error) {
        render::error(&before);
    }
}

/// Kills a VM; the word for what was done, `None` if it had ended before.
async fn kill_one(
    config: &NodeConfig,
    id: VmId,
    force: bool,
    wait: bool,
    listed: bool,
) -> Result<Option<&'static str>, CliError> {
    match status_of(config, id).await? {
        Some(vm) if vm.is_owned => {}
        // Its row may say that it failed, by whoever could not take it from an owner that hangs.
        Some(_) if force && has_owner(config, id)? => {}
        // It was running when all were listed.
        _ if listed => return Ok(None),
        None => return Err(not_there(config, id).await),
        Some(vm) => return Err(not_running(id, vm.status)),
    }
    if !wait {
        let how = KillRequest { force, heard: force.then_some(HEARD_LIMIT), done: None };
        return match ask(config, id, how).await {
            Ok(()) => Ok(Some("Stopping")),
            Err(error) if force => take_over(config, id, error).await.map(|()| Some(KILLED)),
            Err(error) => Err(error),
        };
    }
    match take_down(config, id, force).await {
        Err(error) if force => take_over(config, id, error).await?,
        taken => taken?,
    }
    Ok(Some(KILLED))
}

/// Whether an owner holds the VM, whatever its row says.
fn has_owner(config: &NodeConfig, id: VmId) -> Result<bool, CliError> {
    wiring::owner_locks(config)?.is_held(id).map_err(|e| CliError::failure(&e))
}

const KILLED: &str = "Killed";

/// Cleans up after a VM whose owner did not do it.
async fn take_over(config: &NodeConfig, id: VmId, why: CliError) -> Result<(), CliError> {
    let node = Node::boot(config.clone()).await?;
    let report = take_over_with(&node, id, Goal::Clean, why).await;
    node.shutdown(StopMode::Force).await?;
    match report?.outcome {
        Outcome::Cleaned { .. } | Outcome::Unknown => Ok(()),
        Outcome::Running | Outcome::BeingCleaned | Outcome::Planned => {
            Err(CliError::message(format_args!("VM {id} is being cleaned up by another matchlock")))
        }
        Outcome::Failed { step, error, .. } => Err(CliError::message(format_args!(
            "VM {id} was not cleaned up: {step}: {error}; run `matchlock gc {id}`"
        ))),
    }
}

/// As [`NodeClient::take_over`](crate::node::client::NodeClient::take_over), and says so.
pub(super) async fn take_over_with(
    node: &Node,
    id: VmId,
    goal: Goal,
    why: CliError,
) -> Result<VmReport, CliError> {
    let mut reports = node.client().take_over(id, goal).await?;
    let no_report = || CliError::message(format_args!("no report about VM {id}"));
    let mut report = reports.pop().ok_or_else(no_report)?;
    match &mut report.outcome {
        Outcome::Failed { step, error, .. } if step == OBSERVE => {
            *error = format!("{why}; it was not taken over: {error}");
        }
        Outcome::Running | Outcome::BeingCleaned | Outcome::Unknown | Outcome::Planned => {}
        Outcome::Cleaned { .. } | Outcome::Failed { .. } => {
            render::note(&format!("{why}; VM {id} was taken over"));
        }
    }
    Ok(report)
}

/// Asks the owner, and sees that it has let go and that nothing was left.
pub(super) async fn take_down(config: &NodeConfig, id: VmId, force: bool) -> Result<(), CliError> {
    let how = if force {
        KillRequest { force, heard: Some(HEARD_LIMIT), done: Some(FORCE_LIMIT) }
    } else {
        KillRequest { force, heard: None, done: Some(OWNER_LIMIT) }
    };
    take_down_as(config, id, how).await
}

/// The same with limits of one's own.
pub(super) async fn take_down_as(
    config: &NodeConfig,
    id: VmId,
    how: KillRequest,
) -> Result<(), CliError> {
    ask(config, id, how).await?;
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
        Some(vm) if vm.record.phase != Phase::Cleaned => Err(CliError::message(format_args!(
            "VM {id} was not cleaned up (status: {}): its owner ended before; run `matchlock gc {id}`",
            vm.status.name()
        ))),
        _ => Ok(()),
    }
}

/// Asks the owner; one that is just beginning listens in a moment, one that has ended needs no asking.
async fn ask(config: &NodeConfig, id: VmId, how: KillRequest) -> Result<(), CliError> {
    let locks = wiring::owner_locks(config)?;
    let limit = how.heard.unwrap_or(RELEASE_LIMIT);
    let deadline = Instant::now() + limit;
    loop {
        match owner::kill(&config.vms_dir(), id, how).await {
            Err(failure) if failure.kind == FailureKind::NotFound => {
                if !locks.is_held(id).map_err(|e| CliError::failure(&e))? {
                    return Ok(());
                }
                if Instant::now() > deadline {
                    let lives =
                        format!("the owner of {id} lives, but has not listened for {limit:?}");
                    return Err(failure.context(lives).into());
                }
                sleep(RELEASE_POLL).await;
            }
            asked => return Ok(asked?),
        }
    }
}
