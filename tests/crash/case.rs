//! One case: a point and a fault, from a clean host to a clean host.

use std::fmt;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use matchlock_test_support::netns::Namespace;
use matchlock_test_support::{Installation, Running, modes_of, open_terminal, wait_until};
use rustix::process::Signal;

use super::host::{self, Lines};
use super::images;
use super::props::Props;
use super::scenario::{Scenario, Side, scenario};

/// How long an armed command may take: a boot on a loaded machine, and every deadline of ours.
pub(crate) const PATIENCE: Duration = Duration::from_secs(150);

/// How long the kernel may take to end what a killed process had.
const SOON: Duration = Duration::from_secs(10);

/// What goes wrong at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    /// SIGKILL to the process that has the point.
    Kill,
    /// A panic, once.
    Panic,
    /// An error, once.
    Error,
    /// A panic, each time.
    Panics,
    /// An error, each time.
    Errors,
    /// The process is stopped, the hypervisor killed, the process goes on.
    Hypervisor,
    /// The process is stopped, the hypervisor killed, then the process.
    Both,
}

impl Fault {
    pub(crate) const ALL: [Self; 7] = [
        Self::Kill,
        Self::Panic,
        Self::Error,
        Self::Panics,
        Self::Errors,
        Self::Hypervisor,
        Self::Both,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Kill => "SIGKILL",
            Self::Panic => "panic",
            Self::Error => "error",
            Self::Panics => "panic, always",
            Self::Errors => "error, always",
            Self::Hypervisor => "hypervisor SIGKILL",
            Self::Both => "both SIGKILL",
        }
    }

    const fn action(self) -> &'static str {
        match self {
            Self::Kill => "return(kill)",
            Self::Panic => "1*return(panic)",
            Self::Error => "1*return(error)",
            Self::Panics => "return(panic)",
            Self::Errors => "return(error)",
            Self::Hypervisor | Self::Both => "1*return(stop)",
        }
    }

    const fn kills_the_process(self) -> bool {
        matches!(self, Self::Kill | Self::Both)
    }

    const fn stops(self) -> bool {
        matches!(self, Self::Hypervisor | Self::Both)
    }
}

/// A point and what goes wrong there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Case {
    pub(crate) point: String,
    pub(crate) fault: Fault,
    /// How often the point is passed before it fires.
    pub(crate) passes: usize,
}

impl Case {
    /// A case that fires at the first pass.
    pub(crate) fn new(point: impl Into<String>, fault: Fault) -> Self {
        Self { point: point.into(), fault, passes: 0 }
    }

    /// The point, and at which of its passes it fires unless that is the first.
    pub(crate) fn place(&self) -> String {
        match self.passes {
            0 => self.point.clone(),
            passes => format!("{}#{}", self.point, passes + 1),
        }
    }

    pub(super) fn failpoints(&self) -> String {
        let action = self.fault.action();
        match self.passes {
            0 => format!("{}={action}", self.point),
            passes => format!("{}={passes}*off->{action}", self.point),
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} × {}", self.place(), self.fault.name())
    }
}

/// What a case found.
#[derive(Debug, Clone)]
pub(crate) struct Report {
    /// What was left, or is not as it was.
    pub(crate) leaks: Vec<String>,
    /// From the start of `gc` to its end.
    pub(crate) recovery: Duration,
    /// Whether a hypervisor was there to be killed; `None` where the fault does not ask for it.
    pub(crate) hypervisor: Option<bool>,
}

/// The program with failpoints.
pub(crate) fn program() -> String {
    let name = "MATCHLOCK_TEST_FAILPOINTS_BIN";
    std::env::var(name)
        .unwrap_or_else(|_| panic!("{name} is not set: run the tests with `make test`"))
}

/// Where a case takes place.
pub(crate) struct Stage<'a> {
    pub(crate) net: &'a Namespace,
    pub(crate) installation: Installation,
    /// Turned on in every process of the case.
    pub(crate) mutation: Option<&'a str>,
    /// What was seen while the process stood still at the point.
    seen: Mutex<Seen>,
    /// Whether the case makes images, in a cache of its own.
    pub(super) has_own_cache: AtomicBool,
}

#[derive(Debug, Default)]
struct Seen {
    hypervisor: Option<bool>,
    wrong: Vec<String>,
}

/// Where a VM's hypervisor must have been seen to be gone (law 7).
const AFTER_THE_HYPERVISOR: &[&str] =
    &["vm.remove_", "vm.release_subnet", "vm.record_cleaned", "gc.remove_", "gc.release_subnet"];

impl<'a> Stage<'a> {
    pub(crate) fn new(net: &'a Namespace, mutation: Option<&'a str>) -> Result<Self> {
        let installation = Installation::new()?;
        Ok(Self {
            net,
            installation,
            mutation,
            seen: Default::default(),
            has_own_cache: Default::default(),
        })
    }

    pub(crate) fn log(&self) -> std::path::PathBuf {
        self.installation.home().with_file_name("failpoints.log")
    }

    pub(crate) fn command(&self, failpoints: &str, args: &[&str]) -> Command {
        let mut command = self.net.command(&program());
        self.installation.prepare(command.args(args));
        command
            .env("FAILPOINTS", failpoints)
            .env("MATCHLOCK_FAILPOINTS_LOG", self.log())
            .env("RUST_BACKTRACE", "0")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if self.has_own_cache.load(Ordering::Relaxed) {
            command.env("MATCHLOCK_CACHE", self.cache());
        }
        if self.warm_cache().try_exists().unwrap() {
            command.env("MATCHLOCK_CACHE", self.warm_cache());
        }
        if let Some(mutation) = self.mutation {
            command.env("MATCHLOCK_MUTATION", mutation);
        }
        command
    }

    pub(crate) fn start(&self, failpoints: &str, args: &[&str]) -> Result<Running> {
        Running::start(&mut self.command(failpoints, args))
    }

    /// Ends the hypervisors of this installation; whether there was one.
    pub(crate) fn kill_hypervisors(&self) -> Result<bool> {
        let mut remains = self.installation.remains()?;
        remains.processes.retain(|(_, line)| line.contains("qemu"));
        remains.kill_processes();
        Ok(!remains.processes.is_empty())
    }

    pub(crate) fn signal_hypervisors(&self, signal: Signal) -> Result<()> {
        let remains = self.installation.remains()?;
        for (pid, _) in remains.processes.iter().filter(|(_, line)| line.contains("qemu")) {
            let pid = rustix::process::Pid::from_raw(*pid).context("a process id")?;
            rustix::process::kill_process(pid, signal)?;
        }
        Ok(())
    }

    /// Waits for the end of the process that has the point, and does from outside what the fault says.
    pub(super) fn finish(&self, armed: Running, case: &Case) -> Result<(ExitStatus, String)> {
        let fault = case.fault;
        if fault.stops() {
            let stat = format!("/proc/{}/stat", armed.pid()?.as_raw_pid());
            let mut stopped = false;
            wait_until(PATIENCE, "the stop", || {
                let stat = fs::read_to_string(&stat)?;
                let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
                stopped = state == Some('T');
                // A process that was never stopped is a zombie now.
                Ok(stopped || state == Some('Z'))
            })?;
            if stopped {
                let killed = self.kill_hypervisors()?;
                let mut seen = self.seen.lock().unwrap();
                seen.hypervisor = Some(killed);
                if killed && AFTER_THE_HYPERVISOR.iter().any(|p| case.point.starts_with(p)) {
                    seen.wrong.push(format!("the hypervisor lives at {}", case.point));
                }
                // Without one there is nothing to see: no use in waiting for a boot.
                let goes_on = fault == Fault::Hypervisor && killed;
                let signal = if goes_on { Signal::CONT } else { Signal::KILL };
                armed.signal(signal)?;
            }
        }
        let output = armed.wait(PATIENCE)?;
        Ok((output.status, String::from_utf8_lossy(&output.stderr).into_owned()))
    }

    /// Whether a line of the log of passed points begins so.
    pub(crate) fn log_has(&self, start: &str) -> Result<bool> {
        match fs::read_to_string(self.log()) {
            Ok(log) => Ok(log.lines().any(|line| line.starts_with(start))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// `gc` as a user runs it after a crash, and `rm` of what it keeps.
    pub(crate) fn recover(&self) -> Result<(Duration, Vec<String>)> {
        let begun = Instant::now();
        let output = self.start("", &["gc"])?.wait(PATIENCE)?;
        let took = begun.elapsed();
        let mut wrong = Vec::new();
        if !output.status.success() {
            wrong.push(format!(
                "gc: {}: {}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            ));
        }
        wrong.extend(host::false_claims(&self.installation)?);
        wrong.extend(self.remove_images()?);
        wrong.extend(self.remove_bundles()?);
        wrong.extend(self.look_at_snapshots()?);
        let kept = self.installation.sql("select id from vms")?;
        for vm in kept.lines() {
            let removed = self.start("", &["rm", vm])?.wait(PATIENCE)?;
            if !removed.status.success() {
                wrong.push(format!("rm {vm}: {}", String::from_utf8_lossy(&removed.stderr)));
            }
        }
        Ok((took, wrong))
    }
}

pub(crate) const RUN: &[&str] = &["run", "--image", "busybox", "--", "true"];
pub(crate) const KEPT: &[&str] =
    &["run", "--rm=false", "--graceful-shutdown", "2s", "--image", "busybox", "--", "true"];
const ON_TERMINAL: &[&str] = &["run", "-it", "--image", "busybox", "--", "true"];
pub(crate) const LONG: &[&str] = &["run", "--image", "busybox", "--", "sleep", "1000"];

/// Carries a case out.
pub(crate) fn play(net: &Namespace, case: &Case, mutation: Option<&str>) -> Result<Report> {
    play_led(net, case, mutation, lead)
}

/// What leads to a case's point and lets it fire.
type Lead = fn(&Stage<'_>, &Case, &mut Props) -> Result<(ExitStatus, String)>;

/// The same for a case that is reached in this way.
pub(crate) fn play_led(
    net: &Namespace,
    case: &Case,
    mutation: Option<&str>,
    lead: Lead,
) -> Result<Report> {
    let stage = Stage::new(net, mutation)?;
    let before = host::all(net, &stage.installation)?;
    // What the case itself puts there; what is a stranger's must stay.
    let mut props = Props::default();
    let (status, said) = lead(&stage, case, &mut props)?;
    let mut leaks = host::false_claims(&stage.installation)?;
    let seen = std::mem::take(&mut *stage.seen.lock().unwrap());
    leaks.extend(seen.wrong);
    if !stage.log_has(&format!("fired {} ", case.point))? {
        bail!("the point was not reached: {status}: {said}");
    }
    if case.fault.kills_the_process() {
        ensure!(status.signal() == Some(9), "it did not die at the point: {status}: {said}");
    }
    let (recovery, wrong) = stage.recover()?;
    leaks.extend(wrong);
    let expected: Lines = before.union(&props.strangers).cloned().collect();
    leaks.extend(props.end()?);
    let mut left = Vec::new();
    // Whoever takes a VM down waits for the kernel to be done; a killed one's sockets close by themselves.
    let clean = wait_until(SOON, "a clean host", || {
        left = host::difference(&expected, &host::all(net, &stage.installation)?);
        Ok(left.is_empty())
    });
    if clean.is_err() {
        leaks.extend(left);
    }
    props.clear(net)?;
    Ok(Report { leaks, recovery, hypervisor: seen.hypervisor })
}

/// A guest that does not answer for a while, and answers again unless it is killed meanwhile.
fn hangs(stage: &Stage<'_>, lead: &str, case: &Case) -> Result<(ExitStatus, String)> {
    let armed = format!("{lead};{}", case.failpoints());
    let mut command = stage.command(armed.trim_start_matches(';'), LONG);
    command.env("MATCHLOCK_HANG_TIMEOUT", "1");
    let owner = Running::start(&mut command)?;
    stage.installation.wait_for_status("running")?;
    stage.signal_hypervisors(Signal::STOP)?;
    wait_until(PATIENCE, "the point", || stage.log_has(&format!("fired {} ", case.point)))?;
    if !case.fault.kills_the_process() && !case.fault.stops() {
        stage.signal_hypervisors(Signal::CONT)?;
        owner.signal(Signal::TERM)?;
    }
    stage.finish(owner, case)
}

/// Leads to the point and lets it fire; how the process ended that had it.
fn lead(stage: &Stage<'_>, case: &Case, props: &mut Props) -> Result<(ExitStatus, String)> {
    let armed = case.failpoints();
    let finish = |running| stage.finish(running, case);
    match scenario(&case.point) {
        Scenario::Run("") => finish(stage.start(&armed, RUN)?),
        Scenario::Run(lead) => finish(stage.start(&format!("{lead};{armed}"), RUN)?),
        Scenario::Terminal => {
            let (user, programs) = open_terminal()?;
            let before = modes_of(&user)?;
            let mut command = stage.command(&armed, ON_TERMINAL);
            let ended = finish(Running::start(command.stdin(programs))?)?;
            // Nobody can after a SIGKILL.
            if !case.fault.kills_the_process() && modes_of(&user)? != before {
                stage.seen.lock().unwrap().wrong.push("the terminal is not as before".to_owned());
            }
            Ok(ended)
        }
        Scenario::Stop => {
            let owner = stage.start(&armed, KEPT)?;
            stage.installation.wait_for_status("running")?;
            owner.signal(Signal::TERM)?;
            finish(owner)
        }
        Scenario::LosesMachine => {
            let owner = stage.start(&armed, LONG)?;
            stage.installation.wait_for_status("running")?;
            stage.kill_hypervisors()?;
            finish(owner)
        }
        Scenario::Hangs(lead) => hangs(stage, lead, case),
        Scenario::Overslept => {
            // Longer than `Limits::cancel`, which is 25 s.
            let armed = format!("vm.create_disk.before=sleep(28000);{armed}");
            let owner = stage.start(&armed, RUN)?;
            let reached = || stage.log_has("hit vm.create_disk.before");
            wait_until(PATIENCE, "the slow disk", reached)?;
            owner.signal(Signal::INT)?;
            finish(owner)
        }
        Scenario::Gc => {
            let vm = crashed(stage, RUN)?;
            *props = Props::dress(stage, &vm)?;
            finish(stage.start(&armed, &["gc"])?)
        }
        Scenario::TakeOver => {
            let owner = super::frozen::frozen(stage, "vm.launch.before")?;
            let ended = finish(stage.start(&armed, &["gc", "--force-running"])?)?;
            // What it still holds is its own, and goes with it.
            owner.signal(Signal::KILL)?;
            owner.wait(PATIENCE)?;
            Ok(ended)
        }
        Scenario::Rm => {
            let vm = crashed(stage, KEPT)?;
            finish(stage.start(&armed, &["rm", "--force", &vm])?)
        }
        Scenario::Kill(side) => asked(stage, side, case, &["kill"], &[]),
        Scenario::Exec(side) => asked(stage, side, case, &["exec"], &["--", "true"]),
        Scenario::ImageImport
        | Scenario::ImageRemove
        | Scenario::ImageUntag
        | Scenario::ImageTag
        | Scenario::ImageSweep
        | Scenario::Pull
        | Scenario::ContentSweep => images::lead(stage, case),
        Scenario::GuestUse => {
            stage.own_bundles()?;
            finish(stage.start(&armed, &["guest", "use", "1-other"])?)
        }
        Scenario::GuestRemove => {
            stage.own_bundles()?;
            finish(stage.start(&armed, &["guest", "rm", "1-other"])?)
        }
        Scenario::GuestSweep => {
            stage.own_bundles()?;
            let leave = "guest_bundle.unname.after=return(kill)";
            let left = stage.start(leave, &["guest", "rm", "1-other"])?.wait(PATIENCE)?;
            ensure!(left.status.signal() == Some(9), "{}", String::from_utf8_lossy(&left.stderr));
            finish(stage.start(&armed, &["gc"])?)
        }
        Scenario::Warm | Scenario::WarmAgain | Scenario::WarmRun | Scenario::WarmSweep => {
            finish(stage.start_warm(&case.point, &armed)?)
        }
    }
}

/// A VM whose owner was killed when all but the hypervisor was there; its id.
pub(crate) fn crashed(stage: &Stage<'_>, args: &[&str]) -> Result<String> {
    let output = stage.start("vm.launch.before=return(kill)", args)?.wait(PATIENCE)?;
    ensure!(output.status.signal() == Some(9), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(stage.installation.sql("select id from vms")?.trim().to_owned())
}

/// A command that asks the owner of a running VM.
fn asked(
    stage: &Stage<'_>,
    side: Side,
    case: &Case,
    before: &[&str],
    after: &[&str],
) -> Result<(ExitStatus, String)> {
    let fault = case.fault;
    let armed = case.failpoints();
    let (of_owner, of_client) = if side == Side::Owner { (&*armed, "") } else { ("", &*armed) };
    let owner = stage.start(of_owner, KEPT)?;
    let vm = stage.installation.wait_for_status("running")?;
    let args: Vec<&str> =
        before.iter().copied().chain([&*vm]).chain(after.iter().copied()).collect();
    let client = stage.start(of_client, &args)?;
    if side == Side::Owner {
        // It may live on, and then takes its VM down when it is told to.
        if !fault.kills_the_process() && !fault.stops() {
            client.wait(PATIENCE)?;
            end(&owner)?;
        }
        return stage.finish(owner, case);
    }
    let ended = stage.finish(client, case)?;
    end(&owner)?;
    owner.wait(PATIENCE)?;
    Ok(ended)
}

/// Tells an owner to end, unless it has.
fn end(owner: &Running) -> Result<()> {
    match owner.signal(Signal::TERM) {
        Err(error) if error.downcast_ref() != Some(&rustix::io::Errno::SRCH) => Err(error),
        _ => Ok(()),
    }
}
