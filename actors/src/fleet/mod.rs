//! Supervises the VM actors, one for one, and keeps what outlives them.
//!
//! ```text
//!  CreateVm ─► admission ─► (task) owner lock, row inserted ─► Registered ─► Vm actor spawned
//!  Vm failed ─► (task) its scope closed ─► ScopeClosed ─► budget left: Vm actor, StartAs::Recover
//!                                                     └─► none left: Reconciler compensates
//!  Vm settled ─► entry dropped, owner lock released
//! ```
//!
//! # Invariants
//! 1. A VM's owner lock is held from before its row exists until its entry is dropped.
//! 2. A VM has at most one living actor and one open scope.
//! 3. The registry of VMs ([`Registry`]) outlives the Fleet actor: a restarted Fleet closes every
//!    scope and recovers every VM.
//! 4. At most [`Limits::vms`](crate::deps::Limits::vms) VMs per node; a VM that does not fit into
//!    memory is refused before anything is made.
//!
//! # Failure
//! A scope that does not close in time leaves its VM as it is: nothing that a running effect could
//! touch is released. Its view says so, and `matchlock gc` takes over once this process has ended.

mod actor;
mod compensate;
mod message;
mod recovery;
mod register;
mod registry;

pub use actor::{Fleet, FleetArgs};
pub use message::{FleetMsg, RunningVm, ScopeOutcome};
pub use register::RegisteredVm;
pub use registry::{Registry, VmHandle};
