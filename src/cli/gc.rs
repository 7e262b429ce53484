//! `matchlock gc`: remove what crashed VMs left on this host.
//!
//! ```text
//!  gc ─────────► node ─ reconciler: lock, look, plan, act ─► reports ─┐
//!     --force-running: each VM that runs is taken down, then cleaned  ├─► gc_report: text, JSON
//!  gc --dry-run ─► the reconciler's sight alone: look, plan ─► reports ┘
//! ```
//!
//! # Invariants
//! 1. `--dry-run` boots no node: it locks, writes, migrates and makes nothing.
//! 2. One VM that fails keeps no other from being cleaned; the exit code says so in the end.

use std::sync::Arc;

use clap::Args;
use futures::stream::{self, StreamExt as _};
use jiff::{SignedDuration, Timestamp};
use matchlock_actors::deps::Rows;
use matchlock_actors::reconciler::{NoRows, Outcome, Stranger, VmReport, strangers, survey};
use matchlock_host::guest_bundle::GuestBundles;
use matchlock_host::image::Garbages;
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::{InstallId, VmId};
use matchlock_model::reconcile::Goal;
use matchlock_model::vm::StopMode;
use matchlock_store::{BadRow, ReadPool};
use tokio::sync::watch;

use super::error::CliError;
use super::gc_report;
use super::kill::{take_down, take_over_with};
use super::looking::{Looking, not_there};
use super::number;
use super::progress;
use crate::node::boot::{Node, existing_install_id};
use crate::node::config::NodeConfig;
use crate::node::wiring;

/// The arguments of `gc`.
#[derive(Debug, Args)]
#[command(after_help = "\
A running VM is skipped and is not an error, unless it is named. A VM that another matchlock cleans
up is waited for, and is an error if that takes too long; --force-running overrules it. A VM that was to be removed with its
command (--rm) is removed; one that was to be kept keeps its record and logs until `matchlock rm`.
What looks like ours and cannot be told to be (a link fc-... without our mark) is named and left alone.
Without ID it also forgets the history of VMs that were removed long ago, and removes what
interrupted pulls, imports and removals left in the cache, and stale snapshots. Into the cache --dry-run
does not look: `matchlock image gc --dry-run` does, but not at snapshots.

Exit codes: 0 when nothing is left to do; 1 when something could not be removed or looked at.

Examples:
  matchlock gc --dry-run --explain    what is left, and what would be done
  matchlock gc --json | jq '.vms[] | select(.failed)'")]
pub(super) struct GcArgs {
    /// Take running VMs down first, then clean up
    #[arg(long)]
    force_running: bool,
    /// Only say what would be done; nothing is locked, written or removed
    #[arg(long)]
    dry_run: bool,
    /// Say of each object whose it is, why it is garbage and what is done about it
    #[arg(long)]
    pub(super) explain: bool,
    /// As JSON, with all that --explain says
    #[arg(long)]
    pub(super) json: bool,
    /// Forget VMs that were removed this many days ago [default: 30, or as configured]
    #[arg(long, value_name = "DAYS", conflicts_with = "id", value_parser = number::days)]
    history_days: Option<u32>,
    /// VM (default: all)
    pub(super) id: Option<VmId>,
}

/// What is said of a VM that was taken down first.
pub(super) const STOPPED: &str = "stop";

/// How many running VMs are taken down at the same time.
const TAKEN_DOWN_AT_ONCE: usize = 8;

/// What was found and done.
pub(super) struct Collected {
    /// Whether it was only looked at.
    pub(super) dry_run: bool,
    /// `None` where nothing was ever stored.
    pub(super) install: Option<InstallId>,
    pub(super) reports: Vec<VmReport>,
    /// That the VM that was named is not there.
    pub(super) missing: Option<CliError>,
    /// What could not be told to be ours.
    pub(super) strangers: Result<Vec<Stranger>, Failure>,
    /// The rows of which nobody can tell which VM they are of.
    pub(super) unreadable: Vec<BadRow>,
    /// Of how many removed VMs the history was dropped; what fails here leaves the reports as they
    /// are.
    pub(super) forgotten: Result<usize, Failure>,
    /// How much of half-made images was removed.
    pub(super) swept: Result<usize, Failure>,
}

pub(super) async fn gc(args: GcArgs, config: NodeConfig) -> Result<u8, CliError> {
    let mut collected = if args.dry_run {
        look(&config, &args).await?
    } else {
        let node = Node::boot(config.clone()).await?;
        let collected = collect(&node, &config, &args).await;
        node.shutdown(StopMode::Force).await?;
        collected?
    };
    if let Some(report) = collected.reports.iter().find(|report| report.outcome == Outcome::Unknown)
    {
        collected.missing = Some(not_there(&config, report.vm).await);
    }
    gc_report::print(&collected, &args)
}

/// What would be done. Touches nothing.
async fn look(config: &NodeConfig, args: &GcArgs) -> Result<Collected, CliError> {
    let install = existing_install_id(&config.home)?;
    let pool = ReadPool::open(&config.home).map_err(|e| CliError::failure(&e))?;
    let reader: Arc<dyn Rows> = match &pool {
        Some(pool) => Arc::new(pool.clone()),
        None => Arc::new(NoRows),
    };
    // Without an id nothing on this host carries it; the one of this look is nobody's.
    let sees = install.clone().map_or_else(unused_id, Ok)?;
    let sight = wiring::sight(config, sees, reader)?;
    let reports = survey(&sight, args.id, Goal::Clean, args.force_running).await?;
    let (mut found, mut unreadable) = (Ok(Vec::new()), Vec::new());
    let mut forgotten = Ok(0);
    if args.id.is_none() {
        found = strangers(&sight).await;
        unreadable = rows_without_id(config).await?;
        if let Some(pool) = pool {
            forgotten = pool
                .forgettable(forgotten_before(args, config))
                .await
                .map_err(|e| Failure::from_error(FailureKind::Host, &e));
        }
    }
    Ok(Collected {
        dry_run: true,
        install,
        reports,
        missing: None,
        strangers: found,
        unreadable,
        forgotten,
        swept: Ok(0),
    })
}

fn unused_id() -> Result<InstallId, CliError> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|e| CliError::failure(&e))?;
    Ok(InstallId::from_bytes(random))
}

async fn rows_without_id(config: &NodeConfig) -> Result<Vec<BadRow>, CliError> {
    match Looking::begin(config)? {
        Some(looking) => looking.without_id().await,
        None => Ok(Vec::new()),
    }
}

async fn collect(node: &Node, config: &NodeConfig, args: &GcArgs) -> Result<Collected, CliError> {
    let (tell, seen) = watch::channel((0, 0));
    let work = node.client().reconcile_watched(args.id, Goal::Clean, Some(tell));
    let mut reports = progress::counting("cleaning up VMs", seen, work).await?;
    let wanted = to_be_removed(node).await?;
    reports = stream::iter(reports)
        .map(|report| async {
            // Its owner was told to remove it, and has not.
            match args.force_running || wanted.contains(&report.vm) {
                true => forced(node, config, report).await,
                false => report,
            }
        })
        .buffered(TAKEN_DOWN_AT_ONCE)
        .collect()
        .await;
    let sight = node.deps().sight();
    let mut collected = Collected {
        dry_run: false,
        install: Some(sight.install.clone()),
        reports,
        missing: None,
        strangers: Ok(Vec::new()),
        unreadable: Vec::new(),
        forgotten: Ok(0),
        swept: Ok(0),
    };
    if args.id.is_none() {
        collected.strangers = strangers(&sight).await;
        collected.unreadable = rows_without_id(config).await?;
        collected.forgotten = node.client().prune_history(forgotten_before(args, config)).await;
        collected.swept = sweep(node, config).await;
    }
    Ok(collected)
}

/// Removes what killed imports, pulls and changes of the guest bundles left, and snapshots that nobody
/// can use any more; how much.
async fn sweep(node: &Node, config: &NodeConfig) -> Result<usize, Failure> {
    let images = swept(node.client().sweep_images(false).await);
    let bundles = GuestBundles::new(&config.cache).sweep();
    let bundles = bundles.map_err(|error| Failure::from_error(FailureKind::Host, &error));
    let snapshots = node.deps().snapshots.sweep().await;
    let snapshots = snapshots.map_err(|error| Failure::from_error(FailureKind::Host, &error));
    let (mut removed, mut failed) = (0, Vec::new());
    for swept in [images, bundles, snapshots] {
        match swept {
            Ok(count) => removed += count,
            Err(failure) => failed.push(failure),
        }
    }
    // All that went wrong is told.
    let texts: Vec<&str> = failed.iter().map(|failure| failure.message.as_str()).collect();
    match failed.first() {
        None => Ok(removed),
        Some(first) => Err(Failure::new(first.kind, texts.join("; "))),
    }
}

/// How much was removed, unless something could not be.
fn swept(found: Result<Garbages, Failure>) -> Result<usize, Failure> {
    let Garbages { removed, errors, .. } = found?;
    let error = errors.into_iter().next();
    error.map_or(Ok(removed.len()), |e| Err(Failure::from_error(FailureKind::Host, &e)))
}

fn forgotten_before(args: &GcArgs, config: &NodeConfig) -> Timestamp {
    days_ago(args.history_days.unwrap_or(config.history_days))
}

/// The moment this many days ago; the earliest there is when that is before it.
fn days_ago(days: u32) -> Timestamp {
    let age = SignedDuration::from_hours(i64::from(days) * 24);
    Timestamp::now().saturating_sub(age).unwrap_or(Timestamp::MIN)
}

/// The VMs of which somebody wanted (`rm --force`) that they be removed.
async fn to_be_removed(node: &Node) -> Result<Vec<VmId>, CliError> {
    let wanted = node.deps().reader.vms_to_remove().await.map_err(|e| CliError::failure(&e))?;
    // Rows that cannot be read are told of elsewhere.
    Ok(wanted.into_iter().flatten().collect())
}

/// Takes a VM down that was found running, and cleans up after it. What fails is its own failure, not
/// that of the others.
async fn forced(node: &Node, config: &NodeConfig, report: VmReport) -> VmReport {
    let vm = report.vm;
    let stopped = match report.outcome {
        Outcome::Running => take_down(config, vm, true).await,
        Outcome::BeingCleaned => {
            let text = "another matchlock cleans it up and does not come to an end";
            Err(CliError::message(format_args!("VM {vm}: {text}")))
        }
        _ => return report,
    };
    let again = match stopped {
        Ok(()) => match node.client().reconcile(Some(vm), Goal::Clean).await {
            Ok(mut reports) => reports.pop().unwrap_or(report),
            Err(failure) => return not_stopped(report, &failure.into()),
        },
        Err(error) => match take_over_with(node, vm, Goal::Clean, error).await {
            Ok(report) => report,
            Err(error) => return not_stopped(report, &error),
        },
    };
    let outcome = match again.outcome {
        // Its owner has cleaned up, or even removed it.
        Outcome::Unknown => Outcome::Cleaned { removed: vec![STOPPED.into()] },
        Outcome::Cleaned { mut removed } => {
            removed.insert(0, STOPPED.into());
            Outcome::Cleaned { removed }
        }
        other => other,
    };
    VmReport { outcome, ..again }
}

fn not_stopped(report: VmReport, error: &CliError) -> VmReport {
    let (removed, step) = (Vec::new(), STOPPED.to_owned());
    VmReport { outcome: Outcome::Failed { removed, step, error: error.to_string() }, ..report }
}
