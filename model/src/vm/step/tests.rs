use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::id::VmId;
use crate::identity::ProcessIdentity;
use crate::reconcile::{Action, Goal, Observed, after_failed_removal, plan};

/// Carries out nothing, but keeps the books: which phases were recorded, in which order.
struct Life {
    state: VmState,
    recorded: Vec<Phase>,
    pending: Vec<Effect>,
}

impl Life {
    fn new(ephemeral: bool) -> Self {
        Self {
            state: VmState::new(ephemeral),
            recorded: vec![Phase::Creating],
            pending: Vec::new(),
        }
    }

    fn event(&mut self, event: VmEvent) {
        let (state, effects) = step(self.state.clone(), event).unwrap();
        self.state = state;
        if self.state.op.is_none() {
            self.pending.clear();
        }
        if !matches!(effects.as_slice(), [] | [Effect::Cancel | Effect::Settle]) {
            self.pending = effects;
        }
    }

    /// Ends the operation in flight after `done` of its effects.
    fn end_op(&mut self, done: usize, result: OpResult) {
        let done = if result.is_ok() { self.pending.len() } else { done.min(self.pending.len()) };
        for effect in self.pending.drain(..).take(done) {
            if let Effect::Record { phase, .. } = effect {
                self.recorded.push(phase);
            }
        }
        let recorded = *self.recorded.last().unwrap();
        self.event(VmEvent::OpDone { recorded, result });
    }

    fn check_recorded(&self) {
        for pair in self.recorded.windows(2) {
            pair[0].check_transition(pair[1]).unwrap();
        }
    }
}

fn failure() -> Failure {
    Failure::new(FailureKind::Guest, "it broke")
}

const GRACE: StopMode = StopMode::Graceful(Duration::from_secs(1));

#[test]
fn a_clean_life_goes_through_the_runbooks_phases() {
    let mut life = Life::new(true);
    life.event(VmEvent::Begin);
    life.end_op(0, Ok(()));
    life.end_op(0, Ok(()));
    assert_eq!((life.state.phase, life.state.op), (Phase::Running, None));
    life.event(VmEvent::Stop(GRACE));
    while !life.state.settled {
        life.end_op(0, Ok(()));
    }
    let expected = [
        Phase::Creating,
        Phase::Created,
        Phase::Starting,
        Phase::Running,
        Phase::Stopping,
        Phase::Cleaning,
        Phase::Cleaned,
    ];
    assert_eq!(life.recorded, expected);
    assert_eq!(life.state.cause, None);
}

#[test]
fn a_template_is_saved_and_taken_down_and_never_runs() {
    let mut life = Life::new(true);
    life.state.template = true;
    life.event(VmEvent::Begin);
    life.end_op(0, Ok(()));
    assert_eq!(life.pending.last(), Some(&Effect::SaveSnapshot));
    while !life.state.settled {
        assert!(!life.pending.contains(&Effect::ConnectGuest));
        life.end_op(0, Ok(()));
    }
    let expected = [
        Phase::Creating,
        Phase::Created,
        Phase::Starting,
        Phase::Stopping,
        Phase::Cleaning,
        Phase::Cleaned,
    ];
    assert_eq!(life.recorded, expected);
    assert!(life.state.is_cleaned_up() && life.state.cause.is_none());
}

#[test]
fn a_template_that_was_not_saved_says_why_and_is_cleaned_up() {
    let mut life = Life::new(true);
    life.state.template = true;
    life.event(VmEvent::Begin);
    life.end_op(0, Ok(()));
    life.end_op(2, Err(failure()));
    while !life.state.settled {
        life.end_op(0, Ok(()));
    }
    assert!(life.recorded.contains(&Phase::StartFailed));
    assert_eq!((life.state.is_cleaned_up(), life.state.cause), (true, Some(failure())));
}

#[test]
fn the_hypervisor_is_closed_before_anything_is_removed() {
    let mut life = Life::new(false);
    life.event(VmEvent::Begin);
    life.end_op(0, Ok(()));
    life.end_op(1, Err(failure()));
    let close = life.pending.iter().position(|e| *e == Effect::CloseMachine).unwrap();
    let remove = life.pending.iter().position(|e| *e == Effect::RemoveDisk).unwrap();
    assert!(close < remove);
    assert_eq!(
        life.pending[0],
        Effect::Record { phase: Phase::StartFailed, cause: Some(failure()) }
    );
}

#[test]
fn a_failed_graceful_stop_is_forced() {
    let mut life = Life::new(false);
    life.event(VmEvent::Begin);
    life.end_op(0, Ok(()));
    life.end_op(0, Ok(()));
    life.event(VmEvent::Stop(GRACE));
    life.end_op(1, Err(failure()));
    assert_eq!(life.state.op, Some(Op::Stop(StopMode::Force)));
    assert!(!life.pending.iter().any(|e| matches!(e, Effect::ShutdownGuest { .. })));
    life.end_op(1, Err(failure()));
    assert_eq!(life.state.phase, Phase::StopFailed);
    life.end_op(0, Ok(()));
    assert!(life.state.settled);
    assert_eq!(life.state.cause, Some(failure()));
}

#[test]
fn a_second_harder_stop_cancels_the_graceful_one() {
    let mut life = Life::new(false);
    life.event(VmEvent::Begin);
    life.end_op(0, Ok(()));
    life.end_op(0, Ok(()));
    life.event(VmEvent::Stop(GRACE));
    let (state, effects) = step(life.state.clone(), VmEvent::Stop(StopMode::Force)).unwrap();
    assert_eq!(effects, [Effect::Cancel]);
    let (_, again) = step(state, VmEvent::Stop(StopMode::Force)).unwrap();
    assert_eq!(again, []);
}

#[test]
fn a_machine_that_ends_while_running_is_taken_down_with_its_cause() {
    let mut life = Life::new(true);
    life.event(VmEvent::Begin);
    life.end_op(0, Ok(()));
    life.end_op(0, Ok(()));
    life.event(VmEvent::MachineExited(failure()));
    assert_eq!(life.pending[0], Effect::Record { phase: Phase::Stopping, cause: Some(failure()) });
}

fn running() -> Life {
    let mut life = Life::new(true);
    life.event(VmEvent::Begin);
    life.end_op(0, Ok(()));
    life.end_op(0, Ok(()));
    life
}

#[test]
fn a_running_vm_whose_actor_was_restarted_or_whose_link_was_lost_goes_on() {
    let recover = VmEvent::Recover { phase: Phase::Running, cause: failure() };
    let mut fresh = Life::new(true);
    fresh.recorded.push(Phase::Running);
    for (mut life, event) in [(fresh, recover), (running(), VmEvent::LinkLost(failure()))] {
        life.event(event);
        assert_eq!(life.state.cause, None, "it may go on");
        assert_eq!(life.pending, [Effect::Reattach { cause: failure() }]);
        let mut gone = Life { state: life.state.clone(), recorded: vec![Phase::Running], ..life };
        gone.pending = vec![Effect::Reattach { cause: failure() }];
        let state = gone.state.clone();
        gone.event(VmEvent::OpDone { recorded: Phase::Running, result: Ok(()) });
        assert_eq!((gone.state.op, gone.state.phase), (None, Phase::Running));
        assert_eq!(gone.state.cause, None);
        gone.state = state;
        let result = Err(Failure::new(FailureKind::Guest, "it is gone"));
        gone.event(VmEvent::OpDone { recorded: Phase::Running, result });
        assert_eq!(gone.state.op, Some(Op::Stop(StopMode::Force)));
        assert_eq!(gone.state.cause.unwrap().message, "it is gone");
    }
}

#[test]
fn a_stop_beats_a_reattachment() {
    let mut life = running();
    life.event(VmEvent::LinkLost(failure()));
    let (state, effects) = step(life.state, VmEvent::Stop(GRACE)).unwrap();
    assert_eq!(effects, [Effect::Cancel]);
    let done = VmEvent::OpDone { recorded: Phase::Running, result: Err(failure()) };
    let (state, _) = step(state, done).unwrap();
    assert_eq!((state.op, state.cause), (Some(Op::Stop(GRACE)), None));
}

#[test]
fn a_hang_ends_no_vm() {
    let mut life = running();
    life.event(VmEvent::Heard(Heard::Silence(failure())));
    assert_eq!(life.pending, [Effect::Note { cause: Some(failure()) }]);
    life.event(VmEvent::OpDone { recorded: Phase::Running, result: Ok(()) });
    assert_eq!((life.state.op, life.state.phase), (None, Phase::Running));
}

#[test]
fn what_is_heard_while_something_is_noted_is_noted_after_it() {
    let mut life = running();
    life.event(VmEvent::Heard(Heard::Silence(failure())));
    life.event(VmEvent::Heard(Heard::Answer));
    life.event(VmEvent::OpDone { recorded: Phase::Running, result: Ok(()) });
    assert_eq!(life.pending, [Effect::Note { cause: None }]);
    life.event(VmEvent::OpDone { recorded: Phase::Running, result: Ok(()) });
    assert_eq!((life.state.op, life.state.unnoted), (None, None));
}

#[test]
fn a_note_that_fails_ends_no_vm_unless_another_owner_has_it() {
    let mut life = running();
    life.event(VmEvent::Heard(Heard::Silence(failure())));
    life.event(VmEvent::OpDone { recorded: Phase::Running, result: Err(failure()) });
    assert_eq!((life.state.op, life.state.phase), (None, Phase::Running));
    life.event(VmEvent::Heard(Heard::Answer));
    let fenced = Failure::new(FailureKind::Fenced, "taken over");
    life.event(VmEvent::OpDone { recorded: Phase::Running, result: Err(fenced) });
    assert_eq!(life.state.op, Some(Op::Stop(StopMode::Force)));
}

#[test]
fn an_effect_that_hangs_releases_nothing() {
    let mut life = Life::new(true);
    life.event(VmEvent::Begin);
    life.end_op(0, Ok(()));
    life.event(VmEvent::Stop(GRACE));
    life.recorded.push(Phase::Starting);
    life.event(VmEvent::OpStuck { recorded: Phase::Starting, effect: "launch" });
    assert_eq!(life.state.phase, Phase::StartFailed);
    assert!(life.pending.iter().all(|e| matches!(e, Effect::Record { .. })));
    let cause = life.state.cause.clone().unwrap();
    assert_eq!(cause.message, "effect launch still running");
}

#[test]
fn impossible_events_are_named() {
    let refused =
        step(VmState::new(true), VmEvent::OpDone { recorded: Phase::Creating, result: Ok(()) })
            .unwrap_err();
    assert_eq!(refused.event, "op_done");
}

#[derive(Debug, Clone)]
enum Happening {
    Done,
    Fail(usize),
    Stuck,
    Stop(StopMode),
    Exit,
    Lost,
    Hung(bool),
    Restart(usize),
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        3 => Just(Happening::Done),
        2 => (0usize..6).prop_map(Happening::Fail),
        1 => Just(Happening::Stuck),
        1 => Just(Happening::Stop(GRACE)),
        1 => Just(Happening::Stop(StopMode::Force)),
        1 => Just(Happening::Exit),
        1 => Just(Happening::Lost),
        1 => any::<bool>().prop_map(Happening::Hung),
        1 => (0usize..6).prop_map(Happening::Restart),
    ]
}

fn apply(life: &mut Life, happening: Happening) {
    match happening {
        Happening::Done if life.state.op.is_some() => life.end_op(0, Ok(())),
        Happening::Fail(done) if life.state.op.is_some() => {
            // The last effect of an operation that fails did not happen.
            let done = done.min(life.pending.len().saturating_sub(1));
            life.end_op(done, Err(failure()));
        }
        Happening::Stuck if life.state.op.is_some() => {
            let recorded = *life.recorded.last().unwrap();
            life.event(VmEvent::OpStuck { recorded, effect: "x" });
        }
        Happening::Stop(mode) => life.event(VmEvent::Stop(mode)),
        Happening::Exit => life.event(VmEvent::MachineExited(failure())),
        Happening::Lost => life.event(VmEvent::LinkLost(failure())),
        Happening::Hung(hung) => {
            let heard = if hung { Heard::Silence(failure()) } else { Heard::Answer };
            life.event(VmEvent::Heard(heard));
        }
        Happening::Restart(done) if !life.state.settled => restart(life, done),
        Happening::Done | Happening::Fail(_) | Happening::Stuck | Happening::Restart(_) => {}
    }
}

/// The actor dies after `done` effects; its successor knows only what was recorded.
fn restart(life: &mut Life, done: usize) {
    for effect in std::mem::take(&mut life.pending).into_iter().take(done) {
        if let Effect::Record { phase, .. } = effect {
            life.recorded.push(phase);
        }
    }
    let phase = *life.recorded.last().unwrap();
    life.state = VmState::new(life.state.ephemeral);
    life.event(VmEvent::Recover { phase, cause: failure() });
}

proptest! {
    #[test]
    fn whatever_happens_phases_stay_legal_and_the_vm_settles(
        ephemeral: bool,
        happenings in prop::collection::vec(happening(), 0..40),
    ) {
        let mut life = Life::new(ephemeral);
        life.event(VmEvent::Begin);
        for happening in happenings {
            apply(&mut life, happening);
            life.check_recorded();
        }
        life.event(VmEvent::Stop(StopMode::Force));
        for _ in 0..10 {
            if life.state.op.is_some() {
                life.end_op(0, Ok(()));
            }
        }
        life.check_recorded();
        prop_assert!(life.state.settled, "{:?}", life.state);
    }

    /// The owner is killed at any moment of any life, and whoever cleans up fails or is killed too,
    /// again and again: the first attempt that nothing disturbs removes the VM.
    #[test]
    fn from_whatever_phase_a_life_ends_in_removal_comes_to_its_end(
        ephemeral: bool,
        happenings in prop::collection::vec(happening(), 0..40),
        attempts in prop::collection::vec((0usize..8, any::<bool>()), 0..6),
    ) {
        let mut life = Life::new(ephemeral);
        life.event(VmEvent::Begin);
        for happening in happenings {
            apply(&mut life, happening);
        }
        let mut removal = Removal::of(*life.recorded.last().unwrap());
        for (at, killed) in attempts {
            removal.attempt(Some((at, killed)))?;
        }
        removal.attempt(None)?;
        prop_assert!(!removal.row && removal.left == Observed::default(), "{removal:?}");
    }
}

/// What a killed owner left, and what becomes of it.
#[derive(Debug)]
struct Removal {
    phase: Phase,
    row: bool,
    left: Observed,
}

impl Removal {
    fn of(phase: Phase) -> Self {
        let process = ProcessIdentity { pid: 7, start_ticks: 1, boot_id: "b".into() };
        let left = Observed {
            owner_lives: false,
            hypervisors: vec![process],
            tap: true,
            firewall: true,
            subnet: true,
            sockets: true,
            rootfs: true,
            dir: true,
        };
        Self { phase, row: true, left }
    }

    fn record(&mut self, next: Phase) -> Result<(), TestCaseError> {
        prop_assert!(self.phase.may_become(next), "{} -> {next}", self.phase);
        self.phase = next;
        Ok(())
    }

    /// One reconciliation; at that action it fails, or whoever does it is killed.
    fn attempt(&mut self, disturbed: Option<(usize, bool)>) -> Result<(), TestCaseError> {
        let recorded = self.row.then_some(self.phase);
        let actions = plan(VmId::new(1), Goal::Remove, recorded, &self.left).unwrap();
        for (index, action) in actions.into_iter().enumerate() {
            match disturbed {
                Some((at, true)) if at == index => return Ok(()),
                Some((at, false)) if at == index && self.row => {
                    for phase in after_failed_removal(self.phase) {
                        self.record(*phase)?;
                    }
                    return Ok(());
                }
                _ => {}
            }
            match action {
                Action::RecordCleaning => self.record(Phase::Cleaning)?,
                Action::RecordCleaned => self.record(Phase::Cleaned)?,
                Action::CloseMachine(_) => self.left.hypervisors.clear(),
                Action::RemoveTap => self.left.tap = false,
                Action::RemoveFirewall => self.left.firewall = false,
                Action::ReleaseSubnet => self.left.subnet = false,
                Action::RemoveSockets => self.left.sockets = false,
                Action::RemoveDisk => self.left.rootfs = false,
                Action::RemoveDir => self.left.dir = false,
                Action::RemoveRow => self.row = false,
            }
        }
        Ok(())
    }
}
