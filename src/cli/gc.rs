//! `matchlock gc`: remove what crashed VMs left on this host.

use clap::Args;
use jiff::{SignedDuration, Timestamp};
use matchlock_actors::reconciler::{Outcome, VmReport};
use matchlock_model::failure::Failure;
use matchlock_model::id::VmId;
use matchlock_model::reconcile::Goal;
use matchlock_model::vm::StopMode;
use matchlock_store::BadRow;

use super::error::CliError;
use super::kill::take_down;
use super::list::without_id;
use super::looking::Looking;
use super::render;
use crate::node::boot::Node;
use crate::node::config::NodeConfig;

/// The arguments of `gc`.
#[derive(Debug, Args)]
#[command(after_help = "\
A running VM is skipped and is not an error, unless it is named. A VM that was to be removed with its
command (--rm) is removed; one that was to be kept keeps its record and logs until `matchlock rm`.
Without ID it also forgets the history of VMs that were removed long ago.

Exit codes: 0 when nothing is left to do; 1 when something could not be removed.")]
pub(super) struct GcArgs {
    /// Take running VMs down first, then clean up
    #[arg(long)]
    force_running: bool,
    /// Forget VMs that were removed this many days ago [default: 30, or as configured]
    #[arg(long, value_name = "DAYS", conflicts_with = "id")]
    history_days: Option<u32>,
    /// VM (default: all)
    id: Option<VmId>,
}

/// What is said of a VM that was taken down first.
const STOPPED: &str = "stop";

pub(super) async fn gc(args: GcArgs, config: NodeConfig) -> Result<u8, CliError> {
    let node = Node::boot(config.clone()).await?;
    let result = collect(&node, &config, &args).await;
    node.shutdown(StopMode::Force).await?;
    let Collected { reports, forgotten } = result?;
    let mut failed = 0;
    for report in &reports {
        failed += u32::from(!print(report, args.id.is_some())?);
    }
    if args.id.is_none() {
        for bad in rows_without_id(&config).await? {
            render::error(&without_id(&bad));
            failed += 1;
        }
        render::lines([format!("Reconciled {} VMs", reports.len())])?;
    }
    let forgotten = forgotten?;
    if forgotten > 0 {
        render::lines([format!("Forgot the history of {forgotten} removed VMs")])?;
    }
    Ok(u8::from(failed > 0))
}

async fn rows_without_id(config: &NodeConfig) -> Result<Vec<BadRow>, CliError> {
    match Looking::begin(config)? {
        Some(looking) => looking.without_id().await,
        None => Ok(Vec::new()),
    }
}

/// What was done.
struct Collected {
    reports: Vec<VmReport>,
    /// Of how many removed VMs the history was dropped; what fails here leaves the reports as they
    /// are.
    forgotten: Result<usize, Failure>,
}

async fn collect(node: &Node, config: &NodeConfig, args: &GcArgs) -> Result<Collected, CliError> {
    let reports = reconcile(node, config, args).await?;
    let forgotten = match args.id {
        Some(_) => Ok(0),
        None => {
            let days = args.history_days.unwrap_or(config.history_days);
            node.client().prune_history(days_ago(days)).await
        }
    };
    Ok(Collected { reports, forgotten })
}

/// The moment this many days ago; the earliest there is when that is before it.
fn days_ago(days: u32) -> Timestamp {
    let age = SignedDuration::from_hours(i64::from(days) * 24);
    Timestamp::now().saturating_sub(age).unwrap_or(Timestamp::MIN)
}

async fn reconcile(
    node: &Node,
    config: &NodeConfig,
    args: &GcArgs,
) -> Result<Vec<VmReport>, CliError> {
    let mut reports = node.client().reconcile(args.id, Goal::Clean).await?;
    if !args.force_running {
        return Ok(reports);
    }
    for report in reports.iter_mut().filter(|report| report.outcome == Outcome::Running) {
        if let Err(error) = take_down(config, report.vm, true).await {
            report.outcome = Outcome::Failed {
                removed: Vec::new(),
                step: "stop".into(),
                error: error.to_string(),
            };
            continue;
        }
        let again = node.client().reconcile(Some(report.vm), Goal::Clean).await?.pop();
        report.outcome = match again.map(|report| report.outcome) {
            // Its owner has cleaned up, or even removed it.
            Some(Outcome::Unknown) | None => Outcome::Cleaned { removed: vec![STOPPED.into()] },
            Some(Outcome::Cleaned { mut removed }) => {
                removed.insert(0, STOPPED.into());
                Outcome::Cleaned { removed }
            }
            Some(other) => other,
        };
    }
    Ok(reports)
}

/// Prints a report; whether it is one of success.
fn print(report: &VmReport, named: bool) -> Result<bool, CliError> {
    let vm = report.vm;
    match &report.outcome {
        Outcome::Running => {
            render::lines([format!("{vm}: skipped (VM is running)")])?;
            return Ok(!named);
        }
        Outcome::Unknown if named => {
            render::error(&CliError::message(format_args!("VM {vm} not found")));
            return Ok(false);
        }
        Outcome::Unknown => render::lines([format!("{vm}: no resources to clean")])?,
        Outcome::Cleaned { removed } if removed.is_empty() => {
            render::lines([format!("{vm}: no resources to clean")])?;
        }
        Outcome::Cleaned { removed } => {
            render::lines([format!("{vm}: cleaned {}", removed.join(", "))])?;
        }
        Outcome::Failed { removed, step, error } => {
            if !removed.is_empty() {
                render::lines([format!("{vm}: cleaned {}", removed.join(", "))])?;
            }
            render::error(&CliError::message(format_args!("{vm}: failed {step}: {error}")));
            return Ok(false);
        }
    }
    Ok(true)
}
