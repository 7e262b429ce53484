//! The store of one node: the real one, in place, disturbed.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use matchlock_actors::db_writer::{Moment, OpenStore, Pace, Store};
use matchlock_actors::deps::Rows;
use matchlock_model::id::{OwnerEpoch, VmId};
use matchlock_model::record::{LifecycleRecord, VmRecord, VmRemains, VmSummary};
use matchlock_store::{
    BadRow, DbFault, OpenError, ReadConn, ReadError, WriteConn, WriteError, WriteOp, WriteOutcome,
    open_state,
};
use tokio::time::sleep;

use super::faults::{Act, Fault};
use super::host::Host;
use super::world::{PANIC, Proc, lock};

/// What is to happen to the batch that is under way.
type Drawn = Arc<Mutex<Option<Fault>>>;

struct SimStore {
    of: Arc<Proc>,
    inner: WriteConn,
    drawn: Drawn,
}

impl Store for SimStore {
    fn apply(&mut self, ops: Vec<WriteOp>) -> Vec<Result<WriteOutcome, WriteError>> {
        let fault = lock(&self.drawn).take();
        let target = lock(&self.of.sim.plan).target;
        if target.is_some() {
            // Only the target's ops go wrong, and nobody else's commit.
            return ops.into_iter().map(|op| self.write_aimed(op)).collect();
        }
        match fault {
            Some(Fault::Fails) => {
                let faults = [DbFault::Busy, DbFault::Full, DbFault::Other];
                let fault = *self.of.sim.rng().pick(&faults);
                vec![Err(refused(fault)); ops.len()]
            }
            Some(Fault::Panic) => panic!("{PANIC}"),
            Some(Fault::PanicAfter | Fault::LostReply) => {
                drop(self.write(ops));
                panic!("{PANIC}")
            }
            _ => self.write(ops),
        }
    }
}

fn refused(fault: DbFault) -> WriteError {
    WriteError::Database { path: "/fake/state.db".into(), fault, message: "injected".into() }
}

impl SimStore {
    fn write(&mut self, ops: Vec<WriteOp>) -> Vec<Result<WriteOutcome, WriteError>> {
        ops.into_iter().map(|op| self.write_one(op)).collect()
    }

    // One by one: the laws look at what each changes.
    fn write_one(&mut self, op: WriteOp) -> Result<WriteOutcome, WriteError> {
        let (pid, sim) = (self.of.pid, &self.of.sim);
        sim.check_write(pid, &op);
        let owner = sim.owner(&op);
        let outcome = self.inner.apply(vec![op.clone()]).remove(0);
        match &outcome {
            Ok(_) => {
                sim.check_written(pid, &op, owner);
                sim.note_owner(pid, &op);
                self.of.note(format_args!("writes {}", brief(&op)));
            }
            Err(_) => self.of.note(format_args!("was refused {}", brief(&op))),
        }
        sim.trace.count("Write");
        outcome
    }

    fn write_aimed(&mut self, op: WriteOp) -> Result<WriteOutcome, WriteError> {
        let vm = vm_of(&op);
        if vm.is_some() && self.of.draw(Act::Write, vm) == Some(Fault::Fails) {
            return Err(refused(DbFault::Other));
        }
        self.write_one(op)
    }
}

fn vm_of(op: &WriteOp) -> Option<VmId> {
    match op {
        WriteOp::InsertVm { record } => Some(record.id),
        WriteOp::SetPhase { vm, .. }
        | WriteOp::SetHypervisor { vm, .. }
        | WriteOp::SetExit { vm, .. }
        | WriteOp::RaiseEpoch { vm, .. }
        | WriteOp::AllocateSubnet { vm, .. }
        | WriteOp::ReleaseSubnet { vm, .. }
        | WriteOp::WantRemoval { vm, .. }
        | WriteOp::RemoveVm { vm, .. } => Some(*vm),
        WriteOp::PruneHistory { .. } => None,
    }
}

fn brief(op: &WriteOp) -> String {
    let vm = super::world::shown(vm_of(op));
    match op {
        WriteOp::InsertVm { .. } => format!("insert {vm}"),
        WriteOp::SetPhase { phase, epoch, .. } => format!("{vm} {phase} epoch {}", epoch.0),
        WriteOp::SetHypervisor { .. } => format!("{vm} hypervisor"),
        WriteOp::SetExit { code, .. } => format!("{vm} ended with {code}"),
        WriteOp::RaiseEpoch { .. } => format!("{vm} raise"),
        WriteOp::AllocateSubnet { .. } => format!("{vm} subnet"),
        WriteOp::ReleaseSubnet { .. } => format!("{vm} release subnet"),
        WriteOp::WantRemoval { .. } => format!("{vm} is to be removed"),
        WriteOp::RemoveVm { .. } => format!("{vm} remove"),
        WriteOp::PruneHistory { .. } => "prune".to_owned(),
    }
}

/// The store of this node, opened for each life of its writer; and how it is held up.
pub(crate) fn writer(of: &Arc<Proc>) -> (OpenStore, Pace) {
    let drawn = Drawn::default();
    let (this, shared) = (Arc::clone(of), Arc::clone(&drawn));
    let open: OpenStore = Arc::new(move || {
        let failed = |_| OpenError::WrongKind { path: "/fake".into(), wanted: "directory" };
        let work = || open_state(&this.sim.home);
        let inner = this.act_now(Act::OpenStore, None, work, failed)?;
        let drawn = Arc::clone(&shared);
        Ok(Box::new(SimStore { of: Arc::clone(&this), inner, drawn }))
    });
    let this = Arc::clone(of);
    let pace: Pace = Box::new(move |moment| {
        let (of, drawn) = (Arc::clone(&this), Arc::clone(&drawn));
        hold_up(of, drawn, moment).boxed()
    });
    (open, pace)
}

async fn hold_up(of: Arc<Proc>, drawn: Drawn, moment: Moment) {
    of.gate().await;
    let delay = match moment {
        Moment::BeforeCommit => {
            let fault = of.draw(Act::Write, None);
            *lock(&drawn) = fault;
            // The answer's delay is drawn with it, and kept until then.
            match fault {
                Some(Fault::Late(delay)) => Some(delay),
                _ => None,
            }
        }
        Moment::AfterCommit => match of.draw(Act::Write, None) {
            Some(Fault::LateReply(delay)) => Some(delay),
            _ => None,
        },
    };
    if let Some(delay) = delay {
        sleep(delay).await;
    }
    of.gate().await;
}

fn unreadable(_: std::io::Error) -> ReadError {
    let key = String::new();
    ReadError::Row(BadRow { table: "vms", column: "id", key, reason: "injected fault".into() })
}

impl Host {
    async fn read<T: Send>(
        &self,
        vm: Option<VmId>,
        query: impl Fn(&ReadConn) -> Result<T, ReadError> + Send + Sync,
    ) -> Result<T, ReadError> {
        let work = || -> BoxFuture<'_, _> {
            let read = query(&lock(&self.0.sim.rows));
            async move { read }.boxed()
        };
        self.0.act(Act::Read, vm, work, unreadable).await
    }
}

#[async_trait]
impl Rows for Host {
    async fn vm(&self, vm: VmId) -> Result<Option<VmRecord>, ReadError> {
        self.read(Some(vm), |rows| rows.vm(vm)).await
    }

    async fn vms(&self) -> Result<Vec<Result<VmSummary, BadRow>>, ReadError> {
        self.read(None, ReadConn::vms).await
    }

    async fn vm_ids(&self) -> Result<Vec<Result<VmId, BadRow>>, ReadError> {
        self.read(None, ReadConn::vm_ids).await
    }

    async fn vms_to_remove(&self) -> Result<Vec<Result<VmId, BadRow>>, ReadError> {
        self.read(None, ReadConn::vms_to_remove).await
    }

    async fn remains(&self, vm: VmId) -> Result<Option<VmRemains>, ReadError> {
        self.read(Some(vm), |rows| rows.remains(vm)).await
    }

    async fn any_network(&self) -> Result<bool, ReadError> {
        self.read(None, ReadConn::any_network).await
    }

    async fn owner_epoch(&self, vm: VmId) -> Result<Option<OwnerEpoch>, ReadError> {
        let read = |rows: &ReadConn| {
            // From now on it knows, if it was overruled.
            self.0.sim.note_look(self.0.pid, vm);
            rows.owner_epoch(vm)
        };
        self.read(Some(vm), read).await
    }

    async fn lifecycle_head(&self, vm: VmId) -> Result<Option<LifecycleRecord>, ReadError> {
        self.read(Some(vm), |rows| rows.lifecycle_head(vm)).await
    }

    async fn history(&self, vm: VmId) -> Result<Vec<LifecycleRecord>, ReadError> {
        self.read(Some(vm), |rows| rows.history(vm)).await
    }
}
