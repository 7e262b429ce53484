//! One VM: its hypervisor, its files, its link to the guest.
//!
//! ```text
//!   message ─► model::vm::step ─► new state, effects
//!                                     │ one operation at a time, spawned in the VM's scope
//!                                     ▼
//!              OpDone / OpStuck ◄── effects::run ─► host traits, DbWriter
//!   MachineExited / LinkLost / Hung ◄── watch task, while running
//! ```
//!
//! # Invariants
//! 1. The actor decides nothing: `model::vm::step` does.
//! 2. What outlives an actor's life (machine, link, scope) is in its [`VmContext`], which Fleet
//!    keeps; a new life gets the same context and a new [`Generation`].
//! 3. Answers of an older operation or life are dropped.
//! 4. An effect of a closed scope does not go on to the next; before each that touches the host the
//!    row's epoch is read: another one means that another owner is in charge.
//!
//! # Failure
//! An actor that panics is restarted by Fleet, after its scope was closed ([`StartAs::Recover`]). In
//! phase running with a hypervisor that lives the VM goes on: machine, link and the guest's commands
//! are not the actor's. In any other phase the new life finishes the shutdown from the row. A cancelled operation that does not
//! end within [`crate::deps::Limits::cancel`] leads to a `*_failed` phase that names the effect.
//!
//! [`Generation`]: matchlock_model::id::Generation

mod actor;
mod context;
mod effects;
mod machine;
mod network;
mod phases;
mod scope;
mod snapshot;
mod watch;

pub(crate) use effects::abandon;

pub use actor::{StartAs, Vm, VmArgs, VmMsg};
pub use context::{CreateVm, StartMode, VmContext};
pub use phases::{PhaseChange, PhaseFollower};
pub use scope::{EffectScope, ScopeStuck};
