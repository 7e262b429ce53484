//! Random ops against a model: what is stored is always a legal life, and each answer is the one
//! that the model expects.

use std::collections::BTreeMap;

use matchlock_model::id::{OwnerEpoch, VmId};
use matchlock_model::phase::Phase;
use matchlock_store::{WriteError, WriteOp, WriteOutcome};
use proptest::prelude::*;
use proptest::sample::select;

use crate::support::{Home, insert, set_phase_as, vm};

#[derive(Debug, Clone)]
enum Step {
    Insert,
    /// The phase, and how far behind the current epoch the writer is.
    Phase(Phase, i64),
    TakeOver,
    Remove,
}

fn step() -> impl Strategy<Value = (u32, Step)> {
    let kind = prop_oneof![
        2 => Just(Step::Insert),
        12 => (select(Phase::ALL.to_vec()), prop_oneof![5 => Just(0), 1 => Just(1)])
            .prop_map(|(phase, behind)| Step::Phase(phase, behind)),
        1 => Just(Step::TakeOver),
        2 => Just(Step::Remove),
    ];
    (0..2_u32, kind)
}

#[derive(Debug, Clone)]
struct Life {
    epoch: i64,
    here: bool,
    phases: Vec<Phase>,
}

impl Life {
    fn version(&self) -> i64 {
        i64::try_from(self.phases.len()).unwrap()
    }
}

type Answer = Result<WriteOutcome, WriteError>;

/// The op of a step, and what the model expects of it.
fn play(lives: &mut BTreeMap<VmId, Life>, id: VmId, step: &Step) -> (WriteOp, Answer) {
    let life = lives.get_mut(&id);
    let here = life.as_ref().is_some_and(|life| life.here);
    let epoch = life.as_ref().map_or(1, |life| life.epoch);
    let not_found = Err(WriteError::NotFound { vm: id });
    match step {
        Step::Insert if life.is_some() => (insert(id), Err(WriteError::VmExists { id })),
        Step::Insert => {
            let phases = vec![Phase::Creating];
            let life = Life { epoch: 1, here: true, phases };
            lives.insert(id, life);
            (insert(id), Ok(WriteOutcome::Version(1)))
        }
        Step::Phase(phase, behind) => {
            let op = set_phase_as(id, OwnerEpoch(epoch - behind), *phase);
            let Some(life) = life.filter(|_| here) else {
                return (op, not_found);
            };
            if *behind > 0 {
                let fenced = WriteError::Fenced {
                    vm: id,
                    epoch: OwnerEpoch(epoch - behind),
                    current: OwnerEpoch(epoch),
                };
                return (op, Err(fenced));
            }
            let last = *life.phases.last().unwrap();
            if let Err(refused) = last.check_transition(*phase) {
                return (op, Err(refused.into()));
            }
            if last != *phase {
                life.phases.push(*phase);
            }
            (op, Ok(WriteOutcome::Version(life.version())))
        }
        Step::TakeOver => {
            let op = WriteOp::RaiseEpoch { vm: id, pid: 7, at: crate::support::at(5) };
            let Some(life) = life.filter(|_| here) else {
                return (op, not_found);
            };
            life.epoch += 1;
            (op, Ok(WriteOutcome::Epoch(OwnerEpoch(life.epoch))))
        }
        Step::Remove => {
            let op = WriteOp::RemoveVm { vm: id, epoch: OwnerEpoch(epoch) };
            let Some(life) = life.filter(|_| here) else {
                return (op, not_found);
            };
            let phase = *life.phases.last().unwrap();
            if phase != Phase::Cleaned {
                return (op, Err(WriteError::NotCleaned { vm: id, phase }));
            }
            life.here = false;
            (op, Ok(WriteOutcome::Removed))
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_ops_in_any_batches_leave_legal_lives(
        batches in prop::collection::vec(prop::collection::vec(step(), 1..8), 1..12)
    ) {
        let home = Home::new();
        let mut writer = home.writer();
        let mut lives = BTreeMap::new();
        for batch in batches {
            let (ops, expected): (Vec<_>, Vec<_>) = batch
                .iter()
                .map(|(number, step)| play(&mut lives, vm(*number), step))
                .unzip();
            prop_assert_eq!(writer.apply(ops), expected);
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let _within = runtime.enter();
        let reader = home.reader();
        for (id, life) in lives {
            let history = runtime.block_on(reader.history(id)).unwrap();
            let versions: Vec<_> = history.iter().map(|row| row.version).collect();
            prop_assert_eq!(versions, (1..=life.version()).collect::<Vec<_>>());
            let phases: Vec<_> = history.iter().map(|row| row.phase).collect();
            prop_assert!(phases.windows(2).all(|pair| pair[0].may_become(pair[1])));
            prop_assert_eq!(&phases, &life.phases);
            let row = runtime.block_on(reader.vm(id)).unwrap();
            prop_assert_eq!(row.is_some(), life.here);
            prop_assert_eq!(row.map_or(life.epoch, |row| row.owner_epoch.0), life.epoch);
        }
    }
}
