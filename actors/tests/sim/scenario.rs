//! What users, guests and fate do to a host, from a seed; and what must be so in the end.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use matchlock_actors::fleet::VmHandle;
use matchlock_actors::handle::CallError;
use matchlock_actors::reconciler::{Outcome, Target, VmReport};
use matchlock_actors::vm::StartMode;
use matchlock_model::id::VmId;
use matchlock_model::phase::Phase;
use matchlock_model::reconcile::Goal;
use matchlock_model::vm::StopMode;
use tokio::time::{Instant, sleep};

use super::node::{IDS, Node};
use super::world::{Sim, lock};

/// How long a VM that was told to stop may take, with every effect as late as can be.
const SETTLE: Duration = Duration::from_secs(1800);

/// The longest that a process stands still: longer than a cancelled operation is waited for.
const LONGEST_FREEZE: Duration = Duration::from_secs(90);

/// How long a VM takes that nothing disturbs.
pub(crate) const UNDISTURBED: Duration = Duration::from_secs(60);

/// Who plays, and what they know.
#[derive(Clone)]
pub(crate) struct Game {
    pub(crate) sim: Arc<Sim>,
    pub(crate) nodes: Arc<Mutex<Vec<Arc<Node>>>>,
    /// The VMs that were created, by their node's pid, and whether their last view was seen.
    pub(crate) vms: Arc<Mutex<BTreeMap<VmId, (i32, bool)>>>,
}

impl Game {
    pub(crate) fn new(sim: &Arc<Sim>) -> Self {
        Self { sim: Arc::clone(sim), nodes: Arc::default(), vms: Arc::default() }
    }

    pub(crate) fn below(&self, bound: u64) -> u64 {
        self.sim.rng().below(bound)
    }

    pub(crate) async fn boot(&self) -> Option<Arc<Node>> {
        let node = Arc::new(Node::boot(&self.sim).await?);
        lock(&self.nodes).push(Arc::clone(&node));
        Some(node)
    }

    pub(crate) fn living(&self) -> Vec<Arc<Node>> {
        lock(&self.nodes).iter().filter(|node| node.process.is_alive()).cloned().collect()
    }

    fn any_vm(&self) -> Option<VmId> {
        let vms: Vec<_> = lock(&self.vms).keys().copied().collect();
        (!vms.is_empty()).then(|| *self.sim.rng().pick(&vms))
    }

    /// A call was not answered in time, by a node that lives.
    pub(crate) fn check_answered<T>(&self, node: &Node, what: &str, answer: &Result<T, CallError>) {
        let how = match answer {
            Ok(_) => "answered",
            Err(CallError::Timeout { .. }) => "timed out",
            Err(CallError::Died { .. }) => "died",
            Err(CallError::Ended { .. }) => "ended",
        };
        node.process.note(format_args!("{what}: {how}"));
        if matches!(answer, Err(CallError::Timeout { .. })) && node.process.is_alive() {
            self.sim.trace.broken(format_args!("law 12: {what} was not answered in time"));
        }
    }

    pub(crate) async fn create(
        self,
        node: Arc<Node>,
        ephemeral: bool,
        start: StartMode,
    ) -> Option<VmHandle> {
        let is_template = is_template(start);
        if is_template {
            self.sim.expect_template(node.process.pid);
        }
        let answer = node.create(ephemeral, start).await;
        self.check_answered(&node, "create", &answer);
        // Whoever gets no answer does not know what there is.
        let Ok(handle) = answer.ok()? else {
            if is_template {
                self.sim.check_unexpected(&node.process, true);
            }
            return None;
        };
        node.process.note(format_args!("created {} ephemeral {ephemeral} {start:?}", handle.id));
        lock(&self.vms).insert(handle.id, (node.process.pid, false));
        let kind = (ephemeral, is_template);
        tokio::spawn(self.watch(node, handle.clone(), kind));
        Some(handle)
    }

    /// Follows a VM until its last view.
    async fn watch(self, node: Arc<Node>, mut handle: VmHandle, kind: (bool, bool)) {
        let (ephemeral, is_template) = kind;
        loop {
            let view = handle.view.borrow_and_update().clone();
            node.process.note(format_args!(
                "{} is {} life {} cause {} settled {}",
                handle.id,
                view.phase,
                view.generation.0,
                view.cause.is_some(),
                view.settled
            ));
            if !node.process.is_alive() {
                return;
            }
            if is_template && view.phase == Phase::Running {
                self.sim.trace.broken(format_args!("{} is a template, and runs", handle.id));
            }
            if view.settled {
                self.sim.trace.count(format!("settled {}", view.phase));
                self.sim.check_settled(handle.id, view.cleaned_up, ephemeral);
                if is_template {
                    self.sim.check_unexpected(&node.process, view.cleaned_up);
                }
                lock(&self.vms).insert(handle.id, (node.process.pid, true));
                return;
            }
            if handle.view.changed().await.is_err() {
                if node.process.is_alive() {
                    let text = format!("{} was forgotten before it was settled", handle.id);
                    self.sim.trace.broken(text);
                }
                return;
            }
        }
    }

    /// Stops a VM, and sees that it settles.
    pub(crate) async fn stop(self, node: Arc<Node>, vm: VmId, mode: StopMode) {
        let answer = node.stop(vm, mode).await;
        self.check_answered(&node, "stop", &answer);
        if let Ok(Ok(_)) = answer {
            self.settles(&node, vm).await;
        }
    }

    async fn settles(&self, node: &Node, vm: VmId) {
        let began = Instant::now();
        while node.process.is_alive() && lock(&self.vms).get(&vm).is_none_or(|(_, done)| !done) {
            if began.elapsed() > SETTLE {
                self.sim.trace.broken(format_args!("law 5: {vm} was stopped and does not settle"));
                return;
            }
            sleep(Duration::from_secs(5)).await;
        }
    }

    /// Compensates, and sees that what is called clean is.
    pub(crate) async fn reconcile(
        self,
        node: Arc<Node>,
        target: Target,
        goal: Goal,
    ) -> Option<Vec<VmReport>> {
        let answer = node.reconcile(target, goal).await;
        self.check_answered(&node, "reconcile", &answer);
        let reports = answer.ok()?.ok()?;
        for VmReport { vm, outcome, .. } in &reports {
            node.process.note(format_args!("reconciled {vm}: {}", brief(outcome)));
            self.sim.trace.count(format!("reconciled {}", brief(outcome)));
            // What an overruled owner was just about to do may have come after the last look.
            let clean = matches!(outcome, Outcome::Cleaned { .. }) && !self.sim.is_disturbed(*vm);
            let remains = self.sim.remains(*vm);
            if clean && !remains.is_empty() {
                self.sim.trace.broken(format_args!("{vm} was cleaned, but there is {remains:?}"));
            }
            if clean && goal == Goal::Remove && self.sim.has_dir_or_row(*vm) {
                self.sim.trace.broken(format_args!("{vm} was removed, but it is there"));
            }
        }
        Some(reports)
    }

    fn start(&self) -> StartMode {
        match self.below(10) {
            0..=2 => StartMode::Template { anew: self.below(3) == 0 },
            3 => StartMode::Cold,
            _ => StartMode::Warm,
        }
    }

    pub(crate) fn mode(&self) -> StopMode {
        if self.below(2) == 0 {
            return StopMode::Force;
        }
        StopMode::Graceful(self.sim.rng().up_to(Duration::from_secs(5)))
    }

    /// One thing happens.
    async fn step(&self) {
        let living = self.living();
        let Some(node) = (!living.is_empty()).then(|| self.sim.rng().pick(&living).clone()) else {
            drop(self.boot().await);
            return;
        };
        let action = self.below(103);
        self.sim.trace.note(format_args!("action {action} at p{}", node.process.pid));
        match action {
            0..=29 => {
                let ephemeral = self.below(3) > 0;
                let start = self.start();
                tokio::spawn(self.clone().create(node, ephemeral, start));
            }
            30..=44 => {
                let Some(vm) = self.any_vm() else { return };
                let mode = self.mode();
                tokio::spawn(self.clone().stop(node, vm, mode));
            }
            45..=56 => self.compensate(node),
            57..=68 => self.kill_actor(&node),
            69..=80 => {
                let Some(vm) = self.any_vm() else { return };
                let what = self.below(5);
                let done = self.sim.disturb_guest(vm, what);
                self.sim.trace.note(format_args!("guest {vm} disturbed by {what}: {done}"));
            }
            81..=84 => {
                let Some(vm) = self.any_vm() else { return };
                let game = self.clone();
                tokio::spawn(async move {
                    let answer = node.link(vm).await;
                    game.check_answered(&node, "link", &answer);
                });
            }
            85..=88 => {
                if living.len() < 3 {
                    drop(self.boot().await);
                }
            }
            89..=91 => node.crash(),
            92..=93 => {
                let (game, mode) = (self.clone(), self.mode());
                tokio::spawn(async move { game.stop_all(&node, mode).await });
            }
            94 => self.freeze(&node),
            95..=96 => {
                self.freeze(&node);
                self.take_over(&node).await;
            }
            97..=98 => self.take_over(&node).await,
            99..=101 => {
                let what = self.below(4);
                self.sim.disturb_snapshots(what);
            }
            _ => sleep(Duration::from_secs(60)).await,
        }
    }

    /// SIGSTOP for a while.
    fn freeze(&self, node: &Node) {
        let process = Arc::clone(&node.process);
        process.freeze();
        let pause = self.sim.rng().up_to(LONGEST_FREEZE);
        tokio::spawn(async move {
            sleep(pause).await;
            process.thaw();
        });
    }

    /// `--force`: a VM is taken from its owner, which stands still, or hangs, or goes on.
    async fn take_over(&self, owner: &Node) {
        let owner = owner.process.pid;
        let owned: Vec<VmId> = {
            let locks = lock(&self.sim.locks);
            locks.iter().filter(|(_, of)| of.pid == owner).map(|(vm, _)| *vm).collect()
        };
        if owned.is_empty() {
            return;
        }
        let may = |node: &Arc<Node>| node.process.pid != owner && !node.process.is_frozen();
        let other = self.living().into_iter().find(may);
        let Some(node) = (match other {
            Some(node) => Some(node),
            None => self.boot().await,
        }) else {
            return;
        };
        let vm = *self.sim.rng().pick(&owned);
        let goal = if self.below(3) == 0 { Goal::Remove } else { Goal::Clean };
        let pause = self.sim.rng().up_to(Duration::from_secs(10));
        self.sim.trace.count("take-over");
        let game = self.clone();
        tokio::spawn(async move {
            sleep(pause).await;
            game.sim.note_taker(node.process.pid, vm);
            game.reconcile(node, Target::TakeOver(vm), goal).await
        });
    }

    fn compensate(&self, node: Arc<Node>) {
        let goal = if self.below(3) == 0 { Goal::Remove } else { Goal::Clean };
        let target = match self.any_vm() {
            Some(vm) if self.below(2) == 0 => Target::One(vm),
            _ => Target::All,
        };
        let game = self.clone();
        tokio::spawn(async move {
            let of_all = matches!(target, Target::All);
            game.reconcile(Arc::clone(&node), target, goal).await;
            if of_all {
                node.sweep().await;
            }
        });
    }

    fn kill_actor(&self, node: &Node) {
        let actors = if self.below(3) > 0 { node.vm_actors() } else { node.children() };
        if actors.is_empty() {
            return;
        }
        let index = usize::try_from(self.below(actors.len() as u64)).unwrap();
        node.process.note(format_args!("actor {index} of {} is killed", actors.len()));
        actors[index].kill();
    }

    async fn stop_all(&self, node: &Node, mode: StopMode) {
        let answer = node.stop_all(mode).await;
        self.check_answered(node, "stop all", &answer);
        for handle in answer.into_iter().flatten() {
            self.settles(node, handle.id).await;
        }
    }

    /// The faults cease; everybody ends in order, or not; a new node finds nothing that it cannot
    /// clean.
    pub(crate) async fn finish(&self) {
        lock(&self.sim.plan).on = false;
        self.sim.trace.note("faults cease");
        for node in self.living() {
            node.process.thaw();
        }
        sleep(UNDISTURBED).await;
        for node in self.living() {
            self.end(&node).await;
        }
        sleep(UNDISTURBED).await;
        let Some(last) = self.boot().await else {
            return self.sim.trace.broken("a node could not boot without a fault");
        };
        self.clean(&last, Goal::Clean).await;
        if !last.sweep().await || self.sim.snapshots.is_half_made() {
            self.sim.trace.broken("half a snapshot is left, and nobody makes one");
        }
        for vm in (1..=IDS).map(VmId::new) {
            let (row, remains) = (lock(&self.sim.rows).vm(vm).unwrap(), self.sim.remains(vm));
            let dirty = row.is_some_and(|row| row.phase != Phase::Cleaned || row.holds_subnet);
            if dirty || !remains.is_empty() {
                self.sim.trace.broken(format_args!("{vm} leaks {remains:?}, dirty row {dirty}"));
            }
        }
        self.clean(&last, Goal::Remove).await;
        for vm in (1..=IDS).map(VmId::new) {
            if self.sim.has_dir_or_row(vm) {
                self.sim.trace.broken(format_args!("{vm} was removed, but it is there"));
            }
        }
        self.sim.check_strangers();
        self.sim.check_histories(IDS);
        if !last.shutdown().await {
            self.sim.trace.broken("a node without VMs did not shut down");
        }
    }

    async fn clean(&self, node: &Arc<Node>, goal: Goal) {
        let reports = self.clone().reconcile(Arc::clone(node), Target::All, goal).await;
        let Some(reports) = reports else {
            return self.sim.trace.broken("gc without faults failed");
        };
        for VmReport { vm, outcome, .. } in reports {
            if !matches!(outcome, Outcome::Cleaned { .. } | Outcome::Unknown) {
                self.sim.trace.broken(format_args!("gc without faults: {vm} {outcome:?}"));
            }
        }
    }

    async fn end(&self, node: &Node) {
        if self.below(3) == 0 {
            return node.crash();
        }
        self.stop_all(node, StopMode::Force).await;
        let mine: Vec<VmId> = lock(&self.vms)
            .iter()
            .filter_map(|(vm, (pid, done))| (*pid == node.process.pid && !done).then_some(*vm))
            .collect();
        for vm in mine {
            self.settles(node, vm).await;
        }
        let began = Instant::now();
        while lock(&self.sim.locks).values().any(|tenure| tenure.pid == node.process.pid) {
            if began.elapsed() > SETTLE {
                self.sim.trace.broken("locks are held of VMs that are settled");
                break;
            }
            sleep(Duration::from_secs(1)).await;
        }
        // Later its process has ended, and with it all that it held.
        self.sim.check_no_snapshot(&node.process);
        if node.process.is_alive() && !node.shutdown().await && node.process.is_alive() {
            self.sim.trace.broken("a node did not shut down");
        }
        node.process.die();
    }
}

const fn is_template(start: StartMode) -> bool {
    matches!(start, StartMode::Template { .. })
}

fn brief(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Running => "running".to_owned(),
        Outcome::BeingCleaned => "being cleaned".to_owned(),
        Outcome::Unknown => "unknown".to_owned(),
        Outcome::Planned => "looked at".to_owned(),
        Outcome::Cleaned { removed } => format!("cleaned {}", removed.len()),
        Outcome::Failed { step, .. } => format!("failed {step}"),
    }
}

/// Anything may happen.
pub(crate) async fn anything(sim: &Arc<Sim>) {
    let game = Game::new(sim);
    let steps = 5 + game.below(40);
    for _ in 0..steps {
        game.step().await;
        let pause = sim.rng().up_to(Duration::from_secs(8));
        sleep(pause).await;
        if sim.trace.is_broken() {
            return;
        }
    }
    game.finish().await;
}
