//! `matchlock rm` and `matchlock prune`: remove VMs. Each is reconciled first; what cannot be cleaned
//! keeps its record.
//!
//! ```text
//!  rm      lock held by its owner: refused           else: reconcile, remove
//!  rm -f   the wish is written ─► owner asked ─► (overruled) ─► reconcile, remove
//!                └── 2 s later, whatever hangs: we leave, the row says `removing`; an owner that has
//!                    heard and is not done is overruled by whoever comes next
//! ```
//!
//! # Invariants
//! 1. `rm -f` returns within about [`FORCE_LIMIT`] of its wish being written, whatever hangs.
//! 2. A wish that is written is never forgotten: whoever cleans the VM up removes it, its own owner at
//!    its end, or the next `gc`, `rm`, `prune` or `run`.
//!
//! # On a crash
//! Before the wish is written nothing was done; after it, see 2.

use std::time::Duration;

use clap::Args;
use futures::{StreamExt, stream};
use matchlock_actors::reconciler::{Outcome, VmReport};
use matchlock_model::failure::FailureKind;
use matchlock_model::id::VmId;
use matchlock_model::reconcile::Goal;
use matchlock_model::vm::StopMode;
use matchlock_store::BadRow;
use tokio::time::{sleep, timeout};

use super::error::CliError;
use super::kill::{AT_ONCE, distinct, take_down_as, take_over_with, tell_all_but_the_last};
use super::list::without_id;
use super::looking::{Looking, not_there};
use super::render;
use crate::node::boot::Node;
use crate::node::config::NodeConfig;
use crate::node::owner::KillRequest;
use crate::points::{RM, injected};

/// The arguments of `rm`.
#[derive(Debug, Args)]
#[command(after_help = "\
With --force it is done within about 2 s, or goes on: then the VM is listed as `removing`, and its
owner or the next command that writes (`matchlock gc`) finishes.

Exit codes: 0 when they are removed, or being removed with --force; 1 when one is not.")]
pub(super) struct RmArgs {
    /// Take a running VM down first, without asking its guest; an owner that does not answer is
    /// overruled
    #[arg(short, long)]
    force: bool,
    /// All VMs that do not run
    #[arg(long, conflicts_with = "ids")]
    stopped: bool,
    /// VMs, as `matchlock list` shows them
    #[arg(required_unless_present = "stopped", value_name = "ID")]
    ids: Vec<VmId>,
}

/// How long `--force` takes at most once its wish is written.
const FORCE_LIMIT: Duration = Duration::from_secs(2);

/// How long an owner may take to hear of it before it is overruled.
const HEARD_LIMIT: Duration = Duration::from_secs(1);

/// Before somebody who works on a VM is looked at again.
const PAUSE: Duration = Duration::from_millis(50);

/// How long our services may take to end when something of theirs hangs.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(1);

/// What became of a VM that was to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Removal {
    /// It is gone.
    Done,
    /// It is on its way, and finished by somebody else.
    GoesOn,
    /// Its owner lives: left alone.
    Running,
    /// Another process is cleaning it up: left to that.
    BeingCleaned,
}

/// Which VMs, and what was wrong with finding them.
#[derive(Debug, Default)]
struct Chosen {
    ids: Vec<VmId>,
    failed: Option<CliError>,
}

pub(super) async fn rm(args: RmArgs, config: NodeConfig) -> Result<u8, CliError> {
    let (force, stopped) = (args.force, args.stopped);
    let Chosen { ids, mut failed } = choose(&config, &args).await?;
    let removed = remove_all(&config, ids, force).await?;
    for (id, removal) in removed {
        match removal {
            Ok(Removal::Done) => render::lines([format!("Removed {id}")])?,
            Ok(Removal::GoesOn) => {
                render::lines([format!("Removing {id}")])?;
                render::note(&format!(
                    "VM {id} is not removed yet; its owner or the next `matchlock gc` finishes"
                ));
            }
            // It was started, or is worked on, since we looked.
            Ok(Removal::Running | Removal::BeingCleaned) if stopped => {}
            Ok(Removal::Running) => tell_all_but_the_last(&mut failed, is_running(id)),
            Ok(Removal::BeingCleaned) => tell_all_but_the_last(&mut failed, is_being_cleaned(id)),
            Err(error) => tell_all_but_the_last(&mut failed, error),
        }
    }
    failed.map_or(Ok(0), Err)
}

pub(super) async fn prune(config: NodeConfig) -> Result<u8, CliError> {
    let Chosen { ids, mut failed } = not_running(&config).await?;
    let mut count = 0;
    for (id, removal) in remove_all(&config, ids, false).await? {
        match removal {
            Ok(Removal::Done) => {
                render::lines([format!("Pruned {id}")])?;
                count += 1;
            }
            Ok(Removal::GoesOn | Removal::Running | Removal::BeingCleaned) => {}
            Err(error) => tell_all_but_the_last(&mut failed, error),
        }
    }
    render::lines([format!("Pruned {count} VMs")])?;
    failed.map_or(Ok(0), Err)
}

fn is_running(id: VmId) -> CliError {
    CliError::message(format_args!(
        "VM {id} is running; stop it with `matchlock kill {id}`, or use --force"
    ))
}

fn is_being_cleaned(id: VmId) -> CliError {
    CliError::message(format_args!(
        "VM {id} is being cleaned up by another matchlock; try again when that has ended"
    ))
}

async fn choose(config: &NodeConfig, args: &RmArgs) -> Result<Chosen, CliError> {
    if args.stopped {
        return not_running(config).await;
    }
    // Their rows need not be readable to be removed.
    let there = match Looking::begin_to_write(config)? {
        Some(looking) => looking.ids().await?.0,
        None => Vec::new(),
    };
    let mut chosen = Chosen::default();
    for id in distinct(args.ids.clone()) {
        if there.contains(&id) {
            chosen.ids.push(id);
        } else {
            tell_all_but_the_last(&mut chosen.failed, not_there(config, id).await);
        }
    }
    Ok(chosen)
}

/// All VMs that nobody owns, whatever their rows say.
async fn not_running(config: &NodeConfig) -> Result<Chosen, CliError> {
    let Some(looking) = Looking::begin_to_write(config)? else { return Ok(Chosen::default()) };
    let (ids, unreadable): (Vec<VmId>, Vec<BadRow>) = looking.ids().await?;
    let mut chosen = Chosen::default();
    for bad in unreadable {
        tell_all_but_the_last(&mut chosen.failed, without_id(&bad));
    }
    for id in ids {
        if !looking.is_held(id)? {
            chosen.ids.push(id);
        }
    }
    Ok(chosen)
}

/// Removes them side by side. What cannot be done for one keeps no other from being removed.
async fn remove_all(
    config: &NodeConfig,
    ids: Vec<VmId>,
    force: bool,
) -> Result<Vec<(VmId, Result<Removal, CliError>)>, CliError> {
    if ids.is_empty() && !wants_removals(config).await? {
        return Ok(Vec::new());
    }
    let node = Node::boot(config.clone()).await?;
    let removals = stream::iter(ids)
        .map(|id| {
            let node = &node;
            async move {
                let removal = if force {
                    remove_by_force(node, config, id).await
                } else {
                    remove(node, id).await
                };
                (id, removal)
            }
        })
        .buffered(AT_ONCE)
        .collect::<Vec<_>>()
        .await;
    let hangs = removals.iter().any(|(_, removal)| matches!(removal, Ok(Removal::GoesOn)));
    if hangs {
        // What hangs would hold up the end of our services, too.
        match timeout(SHUTDOWN_LIMIT, node.shutdown(StopMode::Force)).await {
            Ok(ended) => ended?,
            Err(_) => tracing::debug!("left before all services had ended"),
        }
        return Ok(removals);
    }
    // What has just failed is not tried once more.
    if removals.iter().all(|(_, removal)| removal.is_ok()) {
        node.finish_removals().await;
    }
    node.shutdown(StopMode::Force).await?;
    Ok(removals)
}

async fn wants_removals(config: &NodeConfig) -> Result<bool, CliError> {
    match Looking::begin(config)? {
        Some(looking) => looking.wants_removals().await,
        None => Ok(false),
    }
}

/// What is told of a VM that could not be removed by force: the wish stays.
fn still_wanted(error: CliError) -> CliError {
    CliError::message(format_args!(
        "{error}; it stays marked for removal: whoever cleans it up next removes it"
    ))
}

async fn remove_by_force(node: &Node, config: &NodeConfig, id: VmId) -> Result<Removal, CliError> {
    RM.before("want").map_err(injected)?;
    match node.client().want_removal(id).await {
        Ok(()) => {}
        // Its owner has just removed it.
        Err(failure) if failure.kind == FailureKind::NotFound => return Ok(Removal::Done),
        Err(failure) => return Err(failure.into()),
    }
    RM.after("want").map_err(injected)?;
    // Whoever works on it still is not waited for either.
    let worked = timeout(FORCE_LIMIT, work_off(node, config, id)).await;
    worked.unwrap_or(Ok(Removal::GoesOn)).map_err(still_wanted)
}

/// Takes the VM from whoever has it, until it is removed or that fails.
async fn work_off(node: &Node, config: &NodeConfig, id: VmId) -> Result<Removal, CliError> {
    let how = KillRequest { force: true, heard: Some(HEARD_LIMIT), done: Some(FORCE_LIMIT) };
    loop {
        let mut removal = remove(node, id).await?;
        if removal == Removal::Running
            && let Err(error) = take_down_as(config, id, how).await
        {
            removal = removed(take_over_with(node, id, Goal::Remove, error).await?)?;
        }
        if !matches!(removal, Removal::Running | Removal::BeingCleaned) {
            return Ok(removal);
        }
        // Its owner, or another `matchlock`, is just removing it.
        sleep(PAUSE).await;
    }
}

async fn remove(node: &Node, id: VmId) -> Result<Removal, CliError> {
    RM.before("remove").map_err(injected)?;
    let mut reports = node.client().reconcile(Some(id), Goal::Remove).await?;
    RM.after("remove").map_err(injected)?;
    let report = reports.pop();
    removed(report.ok_or_else(|| CliError::message(format_args!("no report about VM {id}")))?)
}

fn removed(report: VmReport) -> Result<Removal, CliError> {
    let id = report.vm;
    match report.outcome {
        // Unknown: its owner has just removed it.
        Outcome::Cleaned { .. } | Outcome::Unknown => Ok(Removal::Done),
        Outcome::BeingCleaned => Ok(Removal::BeingCleaned),
        // Nothing is only planned here.
        Outcome::Running | Outcome::Planned => Ok(Removal::Running),
        Outcome::Failed { step, error, .. } => Err(CliError::message(format_args!(
            "VM {id} was not removed: {step}: {error}; its record is kept, run `matchlock gc {id}`"
        ))),
    }
}
