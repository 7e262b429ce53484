//! The actor.

use std::fmt;
use std::time::Duration;

use futures::stream::{self, StreamExt as _};
use matchlock_host::netlock::HeldNetworkLock;
use matchlock_host::tap::tap_name;
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::{OwnerEpoch, VmId};
use matchlock_model::reconcile::Goal;
use matchlock_model::subnet::{Ipv4Cidr, Subnet};
use matchlock_store::{WriteOp, WriteOutcome};
use ractor::{Actor, ActorProcessingErr, ActorRef, RpcReplyPort};
use tokio::time::timeout;

use crate::deps::Deps;
use crate::handle::ServiceHandle;
use crate::points::{self, SUBNET, injected};
use crate::reconciler::{ReconcilerMsg, Target};

/// How long the namespace's lock is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(30);

/// How many stale TAPs are removed at the same time: each removal waits for the kernel.
const REAPED_AT_ONCE: usize = 16;

/// A subnet whose row is committed, and the right to make its TAP.
pub struct Grant {
    /// The subnet.
    pub subnet: Subnet,
    /// Held until the TAP has its address and this host was looked at again.
    pub lock: HeldNetworkLock,
}

impl fmt::Debug for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grant").field("subnet", &self.subnet).finish_non_exhaustive()
    }
}

/// What the allocator is asked.
pub enum SubnetAllocatorMsg {
    /// Give a VM a subnet.
    Allocate {
        /// The VM.
        vm: VmId,
        /// Its owner's epoch.
        epoch: OwnerEpoch,
        /// Ranges not to give, besides those that this host is seen to use.
        avoid: Vec<Ipv4Cidr>,
        /// The grant.
        reply: RpcReplyPort<Result<Grant, Failure>>,
    },
    /// Take a VM's subnet back.
    Release {
        /// The VM.
        vm: VmId,
        /// Its owner's epoch.
        epoch: OwnerEpoch,
        /// Done.
        reply: RpcReplyPort<Result<(), Failure>>,
    },
}

impl fmt::Debug for SubnetAllocatorMsg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, vm) = match self {
            Self::Allocate { vm, .. } => ("Allocate", vm),
            Self::Release { vm, .. } => ("Release", vm),
        };
        f.debug_tuple(what).field(vm).finish()
    }
}

/// The allocator.
#[derive(Debug)]
pub struct SubnetAllocator;

/// What the allocator is started with.
#[derive(Debug, Clone)]
pub struct SubnetAllocatorArgs {
    /// The world.
    pub deps: Deps,
    /// Who removes stale TAPs.
    pub reconciler: ServiceHandle<ReconcilerMsg>,
}

impl Actor for SubnetAllocator {
    type Msg = SubnetAllocatorMsg;
    type State = SubnetAllocatorArgs;
    type Arguments = SubnetAllocatorArgs;

    async fn pre_start(
        &self,
        _myself: ActorRef<SubnetAllocatorMsg>,
        args: SubnetAllocatorArgs,
    ) -> Result<SubnetAllocatorArgs, ActorProcessingErr> {
        Ok(args)
    }

    async fn handle(
        &self,
        _myself: ActorRef<SubnetAllocatorMsg>,
        message: SubnetAllocatorMsg,
        state: &mut SubnetAllocatorArgs,
    ) -> Result<(), ActorProcessingErr> {
        points::message(&message)?;
        let state = state.clone();
        tokio::spawn(async move {
            match message {
                SubnetAllocatorMsg::Allocate { vm, epoch, avoid, reply } => {
                    grant(&state, vm, epoch, avoid, reply).await;
                }
                SubnetAllocatorMsg::Release { vm, epoch, reply } => {
                    answer(reply, release(&state.deps, vm, epoch).await);
                }
            }
        });
        Ok(())
    }
}

fn answer<T>(reply: RpcReplyPort<Result<T, Failure>>, result: Result<T, Failure>) {
    if reply.send(result).is_err() {
        tracing::debug!("nobody waits for the subnet allocator's answer");
    }
}

fn host(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::from_error(FailureKind::Host, error)
}

/// Allocates for a caller. One that has gone is cleaned up after at this moment, and may have given
/// back what it had: a row that is committed after that would stay with nobody.
async fn grant(
    state: &SubnetAllocatorArgs,
    vm: VmId,
    epoch: OwnerEpoch,
    avoid: Vec<Ipv4Cidr>,
    reply: RpcReplyPort<Result<Grant, Failure>>,
) {
    let granted = allocate(state, vm, epoch, avoid, &reply).await;
    let committed = granted.is_ok();
    if reply.send(granted).is_ok() || !committed {
        return;
    }
    match release(&state.deps, vm, epoch).await {
        Ok(()) => tracing::debug!(vm_id = %vm, "a subnet that nobody waited for was given back"),
        // The row names it still: whoever cleans the VM gives it back.
        Err(error) => {
            tracing::warn!(vm_id = %vm, %error, "a subnet that nobody waited for is still taken");
        }
    }
}

async fn allocate(
    state: &SubnetAllocatorArgs,
    vm: VmId,
    epoch: OwnerEpoch,
    mut avoid: Vec<Ipv4Cidr>,
    reply: &RpcReplyPort<Result<Grant, Failure>>,
) -> Result<Grant, Failure> {
    let deps = &state.deps;
    let pool = deps.subnet_pool.clone()?;
    points::around(SUBNET, "reap", reap_stale_taps(state, vm)).await?;
    SUBNET.before("lock").map_err(injected)?;
    let lock = deps.network_locks.acquire(LOCK_PATIENCE).await.map_err(|e| host(&e))?;
    SUBNET.after("lock").map_err(injected)?;
    let used = deps.taps.host_subnets().await.map_err(|e| host(&e))?;
    avoid.extend(used.iter().map(|used| Ipv4Cidr::containing(used.network, used.prefix)));
    if reply.is_closed() {
        return Err(Failure::new(FailureKind::Cancelled, "nobody waits for the subnet any more"));
    }
    let op = WriteOp::AllocateSubnet { vm, epoch, pool, avoid, at: (deps.now)() };
    SUBNET.before("row").map_err(injected)?;
    match deps.db.write(op).await? {
        WriteOutcome::Subnet(subnet) => {
            SUBNET.after("row").map_err(injected)?;
            Ok(Grant { subnet, lock })
        }
        other => {
            let text = format!("the store answered an allocation with {other:?}");
            Err(Failure::new(FailureKind::Internal, text))
        }
    }
}

/// Two TAPs on one subnet lose each other's replies in silence: what crashed VMs of ours left (where
/// the kernel could not take it along) is removed before a subnet is chosen.
///
/// What cannot be removed, or not in time, costs its subnet and no more: like any address of this
/// host it is avoided.
async fn reap_stale_taps(state: &SubnetAllocatorArgs, vm: VmId) -> Result<(), Failure> {
    let deps = &state.deps;
    let taps = deps.taps.list_marked(&deps.install).await.map_err(|e| host(&e))?;
    let mut stale = Vec::new();
    for left in taps.into_iter().filter_map(|tap| tap.mark).map(|mark| mark.vm) {
        if left == vm {
            continue;
        }
        match deps.locks.is_held(left) {
            Ok(false) => stale.push(left),
            Ok(true) => {}
            // No reason to fail: the TAP's subnet is avoided.
            Err(error) => {
                let error = host(&error);
                tracing::warn!(vm_id = %left, %error, "whether a TAP is stale cannot be seen");
            }
        }
    }
    let limit = deps.limits.reap;
    let reaped = stream::iter(stale).for_each_concurrent(REAPED_AT_ONCE, |left| async move {
        let message = |reply| ReconcilerMsg::Reconcile {
            target: Target::One(left),
            goal: Goal::Clean,
            progress: None,
            reply,
        };
        let report = state.reconciler.call(message, limit).await;
        tracing::warn!(vm_id = %left, ?report, "a TAP that a crashed VM had left was reconciled");
    });
    if timeout(limit, reaped).await.is_err() {
        tracing::warn!(?limit, "TAPs that crashed VMs had left are still there: they are avoided");
    }
    Ok(())
}

async fn release(deps: &Deps, vm: VmId, epoch: OwnerEpoch) -> Result<(), Failure> {
    let name = tap_name(vm);
    let tap = deps.taps.observe(&name).await.map_err(|e| host(&e))?;
    // A link of that name that is not ours keeps nothing of ours taken, and whatever subnet it uses
    // is not given to anybody.
    if tap.is_some_and(|tap| tap.mark == Some(deps.mark(vm))) {
        let text = format!("the TAP {name} is still there, its subnet stays taken");
        return Err(Failure::new(FailureKind::Host, text));
    }
    let written = async {
        deps.db.write(WriteOp::ReleaseSubnet { vm, epoch }).await?;
        Ok(())
    };
    points::around(SUBNET, "release", written).await
}
