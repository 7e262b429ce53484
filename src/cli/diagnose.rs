//! `matchlock diagnose`: whether this host can run VMs, and what to do if not. Changes nothing.

use std::sync::Arc;

use clap::Args;
use matchlock_actors::deps::Rows;
use matchlock_actors::reconciler::{NoRows, Outcome, Sight, VmReport, survey};
use matchlock_host::diagnose::{
    Check, Root, Status, alike, capabilities, cpu_virtualization, hypervisor, ip_forwarding,
    kernel, kvm_access, kvm_device, memory, nf_tables, obstacles, private_directory, programs,
    second_installation, space, tun_device,
};
use matchlock_host::guest_bundle::GuestBundle;
use matchlock_model::failure::chain;
use matchlock_model::id::InstallId;
use matchlock_model::reconcile::Goal;
use matchlock_store::ReadPool;
use matchlock_store::error::OpenError;
use matchlock_store::open::state_backup;
use serde::Serialize;

use super::error::CliError;
use super::progress;
use super::render;
use crate::node::boot::existing_install_id;
use crate::node::config::NodeConfig;
use crate::node::wiring;

/// The arguments of `diagnose`.
#[derive(Debug, Args)]
#[command(after_help = "\
Each line says what was found, the next what to do about it. Nothing is changed: what has to be tried
(a TAP, firewall tables) is made in a network namespace of its own, which is gone afterwards.

Exit codes: 0 when no check failed (warnings are no failures); 1 when one failed.")]
pub(super) struct DiagnoseArgs {
    /// As JSON: ok, and checks with name, status (pass, warn or fail), message and fix
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    ok: bool,
    checks: Vec<Check>,
}

/// Checks everything, the configuration as well: that it cannot be used is a finding like any other.
pub(super) async fn diagnose(
    args: DiagnoseArgs,
    config: Result<NodeConfig, CliError>,
) -> Result<u8, CliError> {
    let checks = progress::waiting("looking at this host", every_check(config)).await;
    let ok = checks.iter().all(|check| check.status != Status::Fail);
    if args.json {
        render::json(&Report { ok, checks })?;
    } else {
        render::lines(checks.iter().flat_map(lines))?;
    }
    if ok {
        return Ok(0);
    }
    Err(CliError::message("diagnose failed: one or more checks failed"))
}

fn lines(check: &Check) -> Vec<String> {
    let sign = match check.status {
        Status::Pass => '✓',
        Status::Warn => '⚠',
        Status::Fail => '✗',
    };
    let mut lines = vec![format!("{sign} {}: {}", check.name, check.message)];
    lines.extend(check.fix.as_ref().map(|fix| format!("  fix: {fix}")));
    lines
}

async fn every_check(config: Result<NodeConfig, CliError>) -> Vec<Check> {
    let root = Root::default();
    let mut checks = vec![
        hypervisor(),
        kvm_device(&root),
        cpu_virtualization(&root),
        kvm_access(),
        kernel(&root),
        memory(),
        programs(&root, &std::env::var_os("PATH").unwrap_or_default()),
        capabilities(&root),
        tun_device(),
        nf_tables(),
        ip_forwarding(&root),
    ];
    match config {
        Ok(config) => checks.extend(of_installation(&root, &config).await),
        Err(error) => checks.push(bad_configuration(error)),
    }
    checks
}

/// What only those need who need a subnet is checked when it is used, and here.
fn configuration(config: &NodeConfig) -> Check {
    match &config.subnet_pool {
        Ok(_) => Check::pass("configuration", format!("home {}", config.home.display())),
        Err(bad) => bad_configuration(bad),
    }
}

fn bad_configuration(error: impl std::fmt::Display) -> Check {
    Check::fail(
        "configuration",
        error.to_string(),
        "correct the variable or the line that is named",
    )
}

async fn of_installation(root: &Root, config: &NodeConfig) -> Vec<Check> {
    let sudo_user = std::env::var("SUDO_USER").ok();
    let mut checks = vec![
        configuration(config),
        guest_bundle(config),
        private_directory(&config.home),
        space("disk-space-home", &config.home),
        space("disk-space-cache", &config.cache),
        second_installation(root, sudo_user.as_deref(), &config.home),
    ];
    let (opened, database) = database(config).await;
    checks.push(database);
    let reader: Arc<dyn Rows> = match opened {
        Some(pool) => Arc::new(pool),
        None => Arc::new(NoRows),
    };
    match seen(config, reader) {
        Ok((install, sight)) => {
            checks.push(obstacles(&*sight.firewall).await);
            let (taps, firewall) = (&*sight.taps, &*sight.firewall);
            checks.push(alike(install.as_ref(), taps, firewall, &*sight.processes).await);
            checks.push(leftovers(&sight).await);
        }
        Err(error) => checks.push(Check::fail(
            "leftovers",
            format!("not looked for: {error}"),
            "see what is wrong with that file",
        )),
    }
    checks
}

/// The installation as it is, and the eyes to look at it with.
fn seen(
    config: &NodeConfig,
    reader: Arc<dyn Rows>,
) -> Result<(Option<InstallId>, Sight), CliError> {
    let install = existing_install_id(&config.home)?;
    // Where there is no installation, nothing carries its mark.
    let sees = install.clone().unwrap_or_else(|| InstallId::from_bytes([0; 8]));
    Ok((install, wiring::sight(config, sees, reader)?))
}

fn guest_bundle(config: &NodeConfig) -> Check {
    let name = "guest-bundle";
    match GuestBundle::find(&config.cache, config.kernel.clone()) {
        Ok(bundle) => {
            let (version, release) = (bundle.version, bundle.kernel_release);
            Check::pass(name, format!("{version}, kernel {release} ({})", bundle.kernel.display()))
        }
        Err(error) => Check::fail(
            name,
            chain(&error),
            "`make guest` and `scripts/install-bundle.sh` in the sources, or set MATCHLOCK_KERNEL and \
             MATCHLOCK_INITRAMFS, or MATCHLOCK_CACHE to where a bundle is",
        ),
    }
}

/// Whether the database opens and can be read; the readers, if so.
async fn database(config: &NodeConfig) -> (Option<ReadPool>, Check) {
    let name = "database";
    let backup = state_backup(&config.home);
    let failed = |text: String| {
        Check::fail(name, text, "see docs/OPERATIONS.md, When the database cannot be used")
    };
    let pool = match ReadPool::open(&config.home) {
        Ok(Some(pool)) => pool,
        Ok(None) => return (None, Check::pass(name, "nothing was ever stored")),
        Err(error @ OpenError::Older { .. }) => {
            let fix = "any command that writes (`matchlock gc`) migrates it, after a backup";
            return (None, Check::warn(name, chain(&error), fix));
        }
        Err(error) => return (None, failed(chain(&error))),
    };
    let ids = match pool.vm_ids().await {
        Ok(ids) => ids,
        Err(error) => return (None, failed(chain(&error))),
    };
    let unreadable = ids.iter().filter(|id| id.is_err()).count();
    let check = match backup.try_exists() {
        Err(error) => failed(format!("{}: {error}", backup.display())),
        Ok(true) => Check::warn(
            name,
            format!("{} is there: a migration was killed, or runs", backup.display()),
            "any command that writes (`matchlock gc`) uses it and removes it",
        ),
        Ok(false) if unreadable > 0 => Check::warn(
            name,
            format!("{unreadable} rows have no id that can be read"),
            "`matchlock list` names them; correct or delete them in state.db",
        ),
        Ok(false) => Check::pass(name, format!("opens, up to date, {} VMs", ids.len())),
    };
    (Some(pool), check)
}

/// What `gc --dry-run` would find.
async fn leftovers(sight: &Sight) -> Check {
    let name = "leftovers";
    let reports = match survey(sight, None, Goal::Clean, false).await {
        Ok(reports) => reports,
        Err(error) => {
            let fix = "run `matchlock diagnose` as root, or see `matchlock gc --dry-run`";
            return Check::fail(name, format!("not looked for: {error}"), fix);
        }
    };
    let ids = |wanted: fn(&VmReport) -> bool| -> Vec<String> {
        reports.iter().filter(|report| wanted(report)).map(|report| report.vm.to_string()).collect()
    };
    let left = ids(|report| report.finding.as_ref().is_some_and(|found| !found.plan.is_empty()));
    let unseen = ids(|report| matches!(report.outcome, Outcome::Failed { .. }));
    let fix = "`matchlock gc --dry-run --explain` says what and why, `matchlock gc` removes it";
    match (left.as_slice(), unseen.as_slice()) {
        ([], []) => Check::pass(name, "no VM has left anything"),
        (left, []) => Check::warn(name, format!("of {}: {}", left.len(), few(left)), fix),
        (left, unseen) => Check::warn(
            name,
            format!(
                "of {} VMs; {} could not be looked at: {}",
                left.len(),
                unseen.len(),
                few(unseen)
            ),
            fix,
        ),
    }
}

/// The first of them.
fn few(ids: &[String]) -> String {
    let shown = ids.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
    if ids.len() > 5 { format!("{shown}, ...") } else { shown }
}
