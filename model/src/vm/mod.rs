//! What happens next to a VM: events in, effects out, decided by one pure function, [`step`].
//!
//! A VM has at most one operation ([`Op`]) in flight: a list of [`Effect`]s that is carried out
//! in order by somebody else, who answers with [`VmEvent::OpDone`].
//!
//! ```text
//!  Begin ─► Create ─ok─► Boot ─ok─► (running, no operation)
//!             │ err        │ err       │ Stop, MachineExited      LinkLost ─► Reattach ─ok─► (running)
//!             │            │           │◄──────────────────────────── err ───┘
//!             ▼            ▼           ▼
//!           Clean ◄────── Clean ◄─ok─ Stop ──err (graceful)─► Stop (forced)
//!             │ok          │err        │ err (forced)
//!             ▼            ▼           ▼
//!        Forget (--rm)  Conclude    Conclude            Conclude: write *_failed, then settle
//!             └───────────┴── settle ──┘
//!
//!  The Boot of a template ends with its snapshot, and then with Stop.
//!  Heard (silence, or an answer after it) in running ─► Note ─► (running)
//!  A life after a failed one begins with Reattach in running, else with Clean or Stop.
//!  A stop during Create, Boot, Reattach or Note cancels the operation; its OpDone leads to Clean or
//!  Stop.
//! ```
//!
//! # Invariants
//! 1. Each phase that is recorded may follow the one before ([`crate::phase`]).
//! 2. A phase is recorded before the effects that it announces are carried out.
//! 3. `Stop` is legal in every state, and from every state a VM settles once its operations end.
//! 4. Nothing is released while the hypervisor may still be there: `CloseMachine` comes first, and
//!    what follows it is skipped when it fails.
//!
//! # Failure
//! An operation that was cancelled and does not end ([`VmEvent::OpStuck`]) leads to a `*_failed`
//! phase that names it; nothing that it could touch is released. The reconciler tries again later.

mod effect;
mod state;
mod step;

pub use effect::Effect;
pub use state::{Denied, Heard, Op, OpResult, StopMode, VmEvent, VmState};
pub use step::step;
