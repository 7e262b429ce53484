//! Twenty VMs at once, and everything that people do with them, at once and at random: `run`, `run -d`,
//! `exec`, `kill`, `rm`, `list`, `log`, `inspect`, `prune`, `gc`, with owners and hypervisors that are
//! killed or stand still meanwhile. At the end `gc`, and nothing is left.
//!
//! ```text
//!  each of FLEET_VMS workers, until MINUTES have passed:
//!    a VM (attached or -d, kept or not, with or without a network) ─► some of: exec, log, get, inspect,
//!    list, gc, prune ─► its end: by itself, kill, kill --force, rm -f, SIGKILL or SIGSTOP of its owner,
//!    SIGKILL of its hypervisor
//! ```
//!
//! What each command answers depends on what the others just did; what it must never do is panic, hang,
//! or claim what is not so. The same seed draws the same acts; how they meet is the machine's choice.

use std::collections::BTreeMap;
use std::process::{Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use matchlock_test_support::netns::Namespace;
use matchlock_test_support::{Running, wait_until};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::case::Stage;
use super::host;
use super::suite::{draw, seed};

/// How long one command may take, with twenty boots at once on few cores, and all their limits.
const PATIENCE: Duration = Duration::from_secs(300);

struct Dice {
    seed: u64,
    rolled: u64,
}

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.rolled += 1;
        draw(self.seed, &self.rolled.to_string()) % below
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        let below = u64::try_from(from.len()).unwrap();
        from[usize::try_from(self.roll(below)).unwrap()]
    }
}

/// What was done how often, and what was wrong.
#[derive(Default)]
struct Told {
    done: Mutex<BTreeMap<String, usize>>,
    wrong: Mutex<Vec<String>>,
    most: AtomicUsize,
}

impl Told {
    fn did(&self, what: &str) {
        *self.done.lock().unwrap().entry(what.to_owned()).or_default() += 1;
    }

    fn wrong(&self, what: String) {
        println!("wrong: {what}");
        self.wrong.lock().unwrap().push(what);
    }
}

struct Fleet<'a> {
    stage: &'a Stage<'a>,
    told: &'a Told,
    deadline: Instant,
}

impl Fleet<'_> {
    /// Runs a command to its end. Whatever it answers, it does not panic.
    fn command(&self, args: &[&str]) -> Result<Output> {
        let output = self.stage.start("", args)?.wait(PATIENCE)?;
        self.told.did(args[0]);
        self.look(args, &output);
        Ok(output)
    }

    fn look(&self, args: &[&str], output: &Output) {
        let said = String::from_utf8_lossy(&output.stderr);
        if said.contains("panicked") || said.contains("RUST_BACKTRACE") {
            self.told.wrong(format!("{args:?}: {said}"));
        }
        if output.status.code().is_none() {
            self.told.wrong(format!("{args:?}: {}", output.status));
        }
    }

    /// One that must succeed whatever happens meanwhile.
    fn always(&self, args: &[&str]) -> Result<String> {
        let output = self.command(args)?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            self.told.wrong(format!("{args:?}: {}: {said}", output.status));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// One life of a VM.
    fn live(&self, dice: &mut Dice) -> Result<()> {
        let rm = dice.pick(&["--rm", "--rm=false"]);
        let mut args = vec!["run", "--memory", "128", "--graceful-shutdown", "2s", rm];
        if dice.roll(2) == 0 {
            args.push("--no-network");
        }
        let command = dice.pick(&[
            "echo up; sleep 1000",
            "echo up; sleep 3; exit 7",
            "while :; do echo tick; sleep 0.1; done",
        ]);
        let detached = dice.roll(2) == 0;
        if detached {
            args.push("-d");
        }
        args.extend(["--image", "busybox", "--", "sh", "-c", command]);
        let mut running = self.stage.command("", &args);
        running.stdout(Stdio::piped()).stderr(Stdio::piped());
        let running = Running::start(&mut running)?;
        self.told.did(if detached { "run -d" } else { "run" });
        let owner = running.pid()?;
        if detached {
            let output = running.wait(PATIENCE)?;
            self.look(&args, &output);
            let vm = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            // It may have been ended, by `gc` or a kill, before it had come up.
            return if vm.is_empty() { Ok(()) } else { self.act(&vm, None, dice) };
        }
        let mut vm = None;
        wait_until(PATIENCE, "the row of a VM", || {
            let ended = !self.is_ours(owner);
            let query = format!("select id from vms where pid = {}", owner.as_raw_pid());
            vm = self.stage.installation.sql(&query).ok();
            Ok(ended || vm.as_ref().is_some_and(|vm| !vm.trim().is_empty()))
        })?;
        let vm = vm.unwrap_or_default().trim().to_owned();
        if !vm.is_empty() {
            self.act(&vm, Some(&running), dice)?;
        }
        // However it was ended, it does end.
        if running.signal(Signal::CONT).is_ok() {
            running.signal(Signal::TERM)?;
        }
        let output = running.wait(PATIENCE)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if said.contains("panicked") {
            self.told.wrong(format!("{args:?}: {said}"));
        }
        Ok(())
    }

    /// What is done with a VM, and its end.
    fn act(&self, vm: &str, attached: Option<&Running>, dice: &mut Dice) -> Result<()> {
        let count = self.always(&["list", "--quiet"])?.lines().count();
        self.told.most.fetch_max(count, Ordering::Relaxed);
        for _ in 0..dice.roll(4) {
            match dice.roll(8) {
                0..=2 => self.exec(vm, dice)?,
                3 => drop(self.command(&["log", "--tail", "3", vm])?),
                4 => drop(self.command(&["inspect", vm])?),
                5 => drop(self.always(&["gc"])?),
                6 => drop(self.always(&["prune"])?),
                _ => drop(self.always(&["list", "--json"])?),
            }
        }
        match dice.roll(9) {
            0 => self.kill(&["kill", vm])?,
            1 => self.kill(&["kill", "--force", vm])?,
            2 => self.kill(&["kill", "--no-wait", vm])?,
            3 | 4 => self.kill(&["rm", "--force", vm])?,
            5 => self.signal_owner(self.owner(vm)?, Signal::KILL)?,
            6 => self.signal_hypervisor(vm)?,
            7 => {
                // Standing still, it loses its VM; the row, which knows its pid, goes with it.
                let owner = self.owner(vm)?;
                self.signal_owner(owner, Signal::STOP)?;
                self.kill(&["rm", "--force", vm])?;
                self.signal_owner(owner, Signal::CONT)?;
            }
            _ if attached.is_none() => self.kill(&["kill", vm])?,
            _ => {}
        }
        Ok(())
    }

    /// A command in a VM that may end at any moment: if it says that it ran, it did.
    fn exec(&self, vm: &str, dice: &mut Dice) -> Result<()> {
        let code = dice.pick(&[0, 3, 42]);
        let script = format!("echo said; exit {code}");
        let output = self.command(&["exec", vm, "--", "sh", "-c", &script])?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        match output.status.code() {
            Some(answered) if answered == code => {
                ensure!(said == "said\n", "exec: {code}: {said:?}");
            }
            // It had not come up, or was ended.
            Some(125 | 129..=160) => {}
            other => self.told.wrong(format!("exec in {vm}: {other:?}: {output:?}")),
        }
        Ok(())
    }

    /// Ends a VM; if that is claimed it is so.
    fn kill(&self, args: &[&str]) -> Result<()> {
        let output = self.command(args)?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let vm = args.last().context("a VM")?;
        if said == format!("Removed {vm}\n") {
            let query = format!("select count(*) from vms where id = '{vm}'");
            let rows = self.stage.installation.sql(&query)?;
            if rows.trim() != "0" {
                self.told.wrong(format!("{args:?} said {said:?} and its row is there"));
            }
        }
        Ok(())
    }

    fn owner(&self, vm: &str) -> Result<Option<Pid>> {
        let query = format!("select pid from vms where id = '{vm}'");
        let pid = self.stage.installation.sql(&query)?;
        Ok(pid.trim().parse().ok().and_then(Pid::from_raw))
    }

    fn signal_owner(&self, owner: Option<Pid>, signal: Signal) -> Result<()> {
        if let Some(pid) = owner {
            self.signal(pid, signal)?;
        }
        self.told.did(&format!("{signal:?} to an owner"));
        Ok(())
    }

    fn signal_hypervisor(&self, vm: &str) -> Result<()> {
        let processes = self.stage.installation.remains()?.processes;
        let is_its = |line: &str| line.contains("qemu") && line.contains(vm);
        if let Some((pid, _)) = processes.iter().find(|(_, line)| is_its(line)) {
            self.signal(Pid::from_raw(*pid).context("a pid")?, Signal::KILL)?;
        }
        self.told.did("Kill to a hypervisor");
        Ok(())
    }

    /// Signals a process if it is one of this installation; a pid alone may be somebody else's by now.
    fn signal(&self, pid: Pid, signal: Signal) -> Result<()> {
        let Ok(exactly) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
        if self.is_ours(pid) {
            match pidfd_send_signal(&exactly, signal) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Whether the process is of this installation: its environment or its directory says so.
    fn is_ours(&self, pid: Pid) -> bool {
        let home = self.stage.installation.home().to_string_lossy().into_owned();
        let proc = format!("/proc/{}", pid.as_raw_pid());
        let environment = std::fs::read(format!("{proc}/environ")).unwrap_or_default();
        let cwd = std::fs::read_link(format!("{proc}/cwd")).unwrap_or_default();
        String::from_utf8_lossy(&environment).contains(&home)
            || cwd.to_string_lossy().starts_with(&home)
    }

    fn work(&self, worker: u64) {
        let mut dice = Dice { seed: seed().wrapping_add(7_919 * worker), rolled: 0 };
        while Instant::now() < self.deadline {
            if let Err(error) = self.live(&mut dice) {
                self.told.wrong(format!("worker {worker}: {error:#}"));
            }
        }
    }
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().map_or(otherwise, |text| text.parse().unwrap())
}

#[test]
#[ignore = "`make soak PART=fleet`"]
fn twenty_vms_at_once() {
    let net = Namespace::new().unwrap();
    net.sh("ip link set lo up").unwrap();
    let stage = Stage::new(&net, None).unwrap();
    // The database is there, as are forwarding and whatever else stays once.
    let first = stage.start("", &["run", "--image", "busybox", "--", "true"]).unwrap();
    assert!(first.wait(PATIENCE).unwrap().status.success());
    let before = host::all(&net, &stage.installation).unwrap();
    let told = Told::default();
    let minutes = number("MATCHLOCK_SOAK_MINUTES", 8);
    let deadline = Instant::now() + Duration::from_secs(60 * minutes);
    let workers = number("MATCHLOCK_SOAK_VMS", 20);
    // A namespace of its own per thread would not be the VMs': the stage is shared.
    std::thread::scope(|scope| {
        for worker in 0..workers {
            let fleet = Fleet { stage: &stage, told: &told, deadline };
            scope.spawn(move || fleet.work(worker));
        }
    });
    println!("seed {}, {workers} workers, {minutes} min: {:?}", seed(), told.done.lock().unwrap());
    println!("at most {} VMs were listed at once", told.most.load(Ordering::Relaxed));

    // Whatever was only asked to end is given the time to.
    let ended = wait_until(PATIENCE, "the end of all owners", || {
        let listed = stage.installation.list()?;
        let lives =
            |status: &str| matches!(status, "starting" | "running" | "stopping" | "hanging");
        Ok(!listed.iter().any(|(_, status)| lives(status)))
    });
    if ended.is_err() {
        told.wrong(format!("{ended:?}: {:?}", stage.installation.list()));
    }
    for args in [&["gc"][..], &["rm", "--stopped"]] {
        let output = stage.start("", args).unwrap().wait(PATIENCE).unwrap();
        if !output.status.success() {
            told.wrong(format!("{args:?}: {output:?}"));
        }
    }
    let mut left = Vec::new();
    let clean = wait_until(Duration::from_secs(60), "a clean host", || {
        left = host::difference(&before, &host::all(&net, &stage.installation)?);
        Ok(left.is_empty())
    });
    if clean.is_err() {
        told.wrong(format!("left: {left:#?}"));
    }
    let wrong = told.wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{wrong:#?}");
}
