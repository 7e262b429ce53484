//! What `matchlock gc` says: lines for people, JSON for scripts.

use matchlock_actors::reconciler::{Outcome, VmReport};
use matchlock_host::firewall::{filter_table, nat_table};
use matchlock_host::tap::tap_name;
use matchlock_model::id::{InstallId, VmId};
use matchlock_model::phase::Phase;
use matchlock_model::reconcile::{Action, Finding};
use matchlock_model::record::CleanupStep;
use serde::Serialize;

use super::error::CliError;
use super::gc::{Collected, GcArgs, STOPPED};
use super::list::without_id;
use super::render;

/// Prints what was found and done; the exit code.
pub(super) fn print(collected: &Collected, args: &GcArgs) -> Result<u8, CliError> {
    let report = Report::of(collected, args);
    if args.json {
        render::json(&report)?;
    } else {
        for vm in &report.vms {
            vm.print(args, collected.dry_run)?;
        }
        if let Some(error) = &collected.missing {
            render::error(error);
        }
    }
    for error in &report.errors {
        render::error(&CliError::message(error));
    }
    if !args.json {
        for stranger in &report.unidentified {
            render::note(&format!("{} was left alone: {}", stranger.object, stranger.why));
        }
        if args.id.is_none() {
            render::lines(report.summary(collected.dry_run))?;
        }
    }
    let incomplete = report.failed > 0 || !report.errors.is_empty() || report.is_left();
    Ok(u8::from(incomplete || report.is_refused(args)))
}

/// All of it, as scripts get it.
#[derive(Debug, Serialize)]
struct Report {
    dry_run: bool,
    /// The installation's id; `null` where nothing was ever stored.
    installation: Option<String>,
    vms: Vec<VmSaid>,
    /// What looks like ours and cannot be told to be; it is left alone.
    unidentified: Vec<StrangerSaid>,
    /// How many VMs had something to be done, and it was done.
    reconciled: usize,
    /// How many were left alone, because they run or somebody else cleans them up.
    skipped: usize,
    /// For how many something could not be done.
    failed: usize,
    /// Of how many removed VMs the history was (or would be) dropped.
    forgotten: usize,
    /// How many remains of interrupted image imports and removals were removed.
    swept: usize,
    /// What could not be looked at or done besides.
    errors: Vec<String>,
}

#[derive(Debug, Serialize)]
struct StrangerSaid {
    object: String,
    why: String,
}

#[derive(Debug, Serialize)]
struct VmSaid {
    id: VmId,
    outcome: Said,
    /// The phase in its record; `null` if it has none, or was not looked at.
    phase: Option<Phase>,
    objects: Vec<Object>,
    /// The steps that were done, in order.
    done: Vec<String>,
    failed: Option<FailedStep>,
}

/// What became of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Said {
    /// It runs: left alone.
    Running,
    /// Another process cleans it up: left alone.
    BeingCleaned,
    /// There is no such VM.
    NotFound,
    /// There is something to do, and it was only looked at.
    WouldClean,
    /// There was nothing to do.
    Nothing,
    Cleaned,
    Failed,
}

#[derive(Debug, Serialize)]
struct FailedStep {
    step: String,
    error: String,
}

/// Something that a VM left.
#[derive(Debug, Serialize)]
struct Object {
    step: &'static str,
    name: String,
    /// Whose it is.
    owner: VmId,
    installation: Option<String>,
    /// Why it is garbage.
    why: String,
    /// What is done about it.
    action: &'static str,
    done: bool,
}

impl Report {
    fn of(collected: &Collected, args: &GcArgs) -> Self {
        let install = collected.install.as_ref();
        // Between the listing and the look it was removed: nothing to tell, unless it was named.
        let told = |report: &&VmReport| report.outcome != Outcome::Unknown || args.id.is_some();
        let vms: Vec<_> = collected
            .reports
            .iter()
            .filter(told)
            .map(|report| VmSaid::of(report, install))
            .collect();
        let number = |wanted: &[Said]| vms.iter().filter(|vm| wanted.contains(&vm.outcome)).count();
        let mut errors: Vec<String> =
            collected.unreadable.iter().map(|bad| without_id(bad).to_string()).collect();
        errors.extend(
            collected
                .strangers
                .as_ref()
                .err()
                .map(|failure| format!("could not look for what cannot be identified: {failure}")),
        );
        errors.extend(
            collected.forgotten.as_ref().err().map(|failure| format!("history is kept: {failure}")),
        );
        errors.extend(
            collected
                .swept
                .as_ref()
                .err()
                .map(|failure| format!("remains in the cache: {failure}")),
        );
        let strangers = collected.strangers.iter().flatten();
        Self {
            dry_run: collected.dry_run,
            installation: install.map(ToString::to_string),
            unidentified: strangers
                .map(|found| StrangerSaid { object: found.what.clone(), why: found.why.clone() })
                .collect(),
            reconciled: number(&[Said::Cleaned, Said::WouldClean]),
            skipped: number(&[Said::Running, Said::BeingCleaned]),
            failed: number(&[Said::Failed]),
            forgotten: *collected.forgotten.as_ref().unwrap_or(&0),
            swept: *collected.swept.as_ref().unwrap_or(&0),
            errors,
            vms,
        }
    }

    /// Whether a cleaner was waited for in vain: nobody knows whether it comes to its end.
    fn is_left(&self) -> bool {
        !self.dry_run && self.vms.iter().any(|vm| vm.outcome == Said::BeingCleaned)
    }

    /// Whether the one VM that was named was not cleaned up.
    fn is_refused(&self, args: &GcArgs) -> bool {
        let left = [Said::Running, Said::BeingCleaned, Said::NotFound];
        args.id.is_some() && self.vms.iter().any(|vm| left.contains(&vm.outcome))
    }

    fn summary(&self, dry_run: bool) -> Vec<String> {
        let (reconciled, skip, forgot) = match dry_run {
            true => ("Would reconcile", "skip", "Would forget"),
            false => ("Reconciled", "skipped", "Forgot"),
        };
        let mut line = format!("{reconciled} {} VMs", self.reconciled);
        let total = self.reconciled + self.skipped + self.failed;
        for (number, what) in [(self.skipped, skip), (self.failed, "failed")] {
            if number > 0 {
                line = format!("{line}, {what} {number}");
            }
        }
        // Where nothing was to be done, nothing is said.
        let mut lines: Vec<String> = (total > 0).then_some(line).into_iter().collect();
        if self.forgotten > 0 {
            lines.push(format!(
                "{forgot} the history of {}",
                render::count(self.forgotten, "removed VM")
            ));
        }
        if self.swept > 0 {
            let what = render::count(self.swept, "leftover");
            lines.push(format!(
                "Removed {what} in the cache: interrupted pulls, imports and removals, stale snapshots"
            ));
        }
        lines
    }
}

impl VmSaid {
    fn of(report: &VmReport, install: Option<&InstallId>) -> Self {
        let (outcome, mut done, failed) = match &report.outcome {
            Outcome::Running => (Said::Running, Vec::new(), None),
            Outcome::BeingCleaned => (Said::BeingCleaned, Vec::new(), None),
            Outcome::Unknown => (Said::NotFound, Vec::new(), None),
            Outcome::Planned => (Said::WouldClean, Vec::new(), None),
            Outcome::Cleaned { removed } => (Said::Cleaned, removed.clone(), None),
            Outcome::Failed { removed, step, error } => {
                let failed = FailedStep { step: step.clone(), error: error.clone() };
                (Said::Failed, removed.clone(), Some(failed))
            }
        };
        let finding = report.finding.as_ref();
        let objects = finding
            .map(|finding| objects(report.vm, install, finding, &report.outcome))
            .unwrap_or_default();
        // It is no step of the record, which ends with it.
        if outcome == Said::Cleaned && objects.iter().any(|object| object.step == ROW) {
            done.push(ROW.to_owned());
        }
        let is_idle = match outcome {
            Said::WouldClean => objects.is_empty() && !finding.is_some_and(|f| f.owner_lives),
            Said::Cleaned => done.is_empty(),
            _ => false,
        };
        Self {
            id: report.vm,
            outcome: if is_idle { Said::Nothing } else { outcome },
            phase: finding.and_then(|finding| finding.recorded),
            objects,
            done,
            failed,
        }
    }

    fn print(&self, args: &GcArgs, dry_run: bool) -> Result<(), CliError> {
        let id = self.id;
        let would: Vec<&str> = self.objects.iter().map(|object| object.step).collect();
        let line = match self.outcome {
            Said::Running => Some(format!("{id}: skipped (VM is running)")),
            Said::BeingCleaned if dry_run => {
                Some(format!("{id}: skipped (another matchlock is cleaning it up)"))
            }
            Said::BeingCleaned => Some(format!(
                "{id}: skipped (another matchlock is cleaning it up; if it is stopped, \
                 `matchlock gc {id} --force-running` overrules it)"
            )),
            Said::NotFound => None,
            // Of those that nobody named: only where all that was looked at is to be told.
            Said::Nothing if args.id.is_none() && !args.explain => None,
            Said::Nothing => Some(format!("{id}: no resources to clean")),
            Said::WouldClean => Some(format!("{id}: would clean {}", would.join(", "))),
            Said::Cleaned | Said::Failed if !self.done.is_empty() => {
                Some(format!("{id}: cleaned {}", self.done.join(", ")))
            }
            Said::Cleaned | Said::Failed => None,
        };
        render::lines(line)?;
        if args.explain {
            render::lines(self.objects.iter().map(|object| object.explained(dry_run)))?;
        }
        if let Some(FailedStep { step, error }) = &self.failed {
            render::error(&CliError::message(format_args!("{id}: failed {step}: {error}")));
        }
        Ok(())
    }
}

impl Object {
    fn explained(&self, dry_run: bool) -> String {
        let Self { name, owner, why, action, done, .. } = self;
        let install = self.installation.as_deref().unwrap_or("unknown");
        let what = match (dry_run, done) {
            (true, _) => "would be",
            (false, true) => "was",
            (false, false) => "was to be",
        };
        format!(
            "  {name}: of {owner}, installation {install}; garbage because {why}; {what} {action}"
        )
    }
}

/// What is to be removed of a VM, in order.
fn objects(
    vm: VmId,
    install: Option<&InstallId>,
    finding: &Finding,
    outcome: &Outcome,
) -> Vec<Object> {
    let why = why(finding);
    let is_done = |step: &str| match outcome {
        Outcome::Cleaned { .. } => true,
        Outcome::Failed { removed, .. } => removed.iter().any(|done| done == step),
        _ => false,
    };
    let mut objects = Vec::new();
    if finding.owner_lives {
        objects.push((STOPPED, format!("VM {vm}"), "stopped by its owner, or taken from it"));
    }
    objects.extend(finding.plan.iter().filter_map(|action| described(vm, action)));
    let object = |(step, name, action)| {
        let done = is_done(step);
        let installation = install.map(ToString::to_string);
        Object { step, name, owner: vm, installation, why: why.clone(), action, done }
    };
    objects.into_iter().map(object).collect()
}

/// A removal: its step, of what, and how; `None` for what is only recorded.
fn described(vm: VmId, action: &Action) -> Option<(&'static str, String, &'static str)> {
    let tap = tap_name(vm);
    let (step, name, how) = match action {
        Action::RecordCleaning | Action::RecordCleaned => return None,
        Action::CloseMachine(process) => (
            CleanupStep::MachineClose,
            format!("hypervisor process {}", process.pid),
            "killed, identified by its start time",
        ),
        Action::RemoveTap => {
            (CleanupStep::TapDelete, format!("link {tap}"), "removed, identified by its alias")
        }
        Action::RemoveFirewall => (
            CleanupStep::NftablesCleanup,
            format!("tables inet {} and ip {}", filter_table(&tap), nat_table(&tap)),
            "removed, identified by their comments",
        ),
        Action::RemoveSockets => {
            (CleanupStep::SocketsRemove, format!("sockets in vms/{vm}"), "removed")
        }
        Action::RemoveDisk => {
            (CleanupStep::RootfsRemove, format!("disk vms/{vm}/rootfs.ext4"), "removed")
        }
        Action::ReleaseSubnet => (
            CleanupStep::SubnetRelease,
            "subnet in subnet_allocations".to_owned(),
            "given back to the pool",
        ),
        Action::RemoveDir => {
            (CleanupStep::StateDirRemove, format!("directory vms/{vm}"), "removed with its logs")
        }
        Action::RemoveRow => {
            return Some((ROW, "record in vms".to_owned(), "removed; its history stays"));
        }
    };
    Some((step.name(), name, how))
}

/// The removal of a row is no step of cleaning up: nothing could record it.
const ROW: &str = "record_remove";

/// Why what is left of a VM is garbage.
fn why(finding: &Finding) -> String {
    let why = match (finding.owner_lives, finding.recorded) {
        (true, _) => return "--force-running was given; its owner lives".to_owned(),
        (false, None) => {
            "it carries our mark or lies in our directory, and no VM has a record of it"
        }
        (false, Some(Phase::Cleaned)) => "its VM is recorded as cleaned",
        (false, Some(phase)) => {
            let text = format!("its VM's owner is gone (nobody holds its lock), in phase {phase}");
            return with_rm(text, finding);
        }
    };
    with_rm(why.to_owned(), finding)
}

fn with_rm(text: String, finding: &Finding) -> String {
    if finding.ephemeral {
        format!("{text}, and it was to go with its command (--rm)")
    } else {
        text
    }
}
