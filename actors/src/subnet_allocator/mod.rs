//! Grants subnets: after its row is committed, one per VM, none that overlaps what this host uses.
//!
//! ```text
//!  Vm effect ──Allocate──► (task) stale TAPs of ours? ──Reconcile──► Reconciler
//!                            │ the namespace's lock taken
//!                            ▼
//!                          addresses and routes of this host ─► AllocateSubnet ──► DbWriter
//!                            │ committed
//!      Grant {subnet, lock} ◄┘   the effect makes the TAP, looks at the host again, drops the lock;
//!                                on an overlap it gives the subnet back and asks for the next
//!  Vm effect ──Release──► (task) the VM's TAP is gone? ─► ReleaseSubnet ──► DbWriter
//! ```
//!
//! # Invariants
//! 1. Nobody else of this network namespace who takes the lock chooses or addresses a subnet while
//!    a [`Grant`] is held. Who does not take it is noticed afterwards, by looking again.
//! 2. A subnet is given back only after its TAP was seen to be gone.
//! 3. The lock is never held over the removal of a TAP, which waits for the kernel.
//! 4. The actor's handlers only spawn; a slow host never blocks them.
//!
//! # Failure
//! Stale TAPs are removed side by side, within one limit for all; those that stay are avoided, as all
//! addresses of this host. For a caller that is gone nothing is committed; if it went during the
//! write, the subnet is given back at once: the VM's own clean-up may be over by then.

mod actor;

pub use actor::{Grant, SubnetAllocator, SubnetAllocatorArgs, SubnetAllocatorMsg};

use std::time::Duration;

use matchlock_model::failure::Failure;
use matchlock_model::id::{OwnerEpoch, VmId};
use matchlock_model::subnet::Ipv4Cidr;

use crate::handle::ServiceHandle;

/// How long a caller waits for a subnet: others may choose theirs first.
pub const ALLOCATE_LIMIT: Duration = Duration::from_secs(60);

/// How long a caller waits until its subnet is given back.
pub const RELEASE_LIMIT: Duration = Duration::from_secs(30);

/// Asks for subnets.
#[derive(Debug, Clone)]
pub struct SubnetHandle(pub ServiceHandle<SubnetAllocatorMsg>);

impl SubnetHandle {
    /// A subnet for a VM; `avoid` are ranges that turned out to be in use.
    ///
    /// # Errors
    /// When none is left, or this host could not be looked at.
    pub async fn allocate(
        &self,
        vm: VmId,
        epoch: OwnerEpoch,
        avoid: Vec<Ipv4Cidr>,
    ) -> Result<Grant, Failure> {
        let message = |reply| SubnetAllocatorMsg::Allocate { vm, epoch, avoid, reply };
        self.0.call(message, ALLOCATE_LIMIT).await?
    }

    /// Gives a VM's subnet back; none is fine.
    ///
    /// # Errors
    /// When its TAP is still there, could not be looked at, or the row could not be written.
    pub async fn release(&self, vm: VmId, epoch: OwnerEpoch) -> Result<(), Failure> {
        self.0.call(|reply| SubnetAllocatorMsg::Release { vm, epoch, reply }, RELEASE_LIMIT).await?
    }
}
