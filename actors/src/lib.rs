//! Who owns what, who tells whom, and who starts whom again.
//!
//! ```text
//! Root                     restarts the services below, each within its own budget
//!  ├─ DbWriter             the only writer of state.db in this process; one thread, group commit
//!  ├─ Reconciler           observes, plans, compensates: `gc`, `rm`, and VMs whose actor gave up
//!  ├─ SubnetAllocator      grants a subnet after its row is committed, none that the host uses
//!  ├─ Images               imports and removes images; the only writer of metadata.db here
//!  └─ Fleet                supervises the VM actors, one for one; admission; keeps their scopes
//!      └─ Vm(vm-…)         one VM: decides by `model::vm::step`, effects in spawned tasks
//! ```
//!
//! | from | to | message | answer |
//! |---|---|---|---|
//! | node | Fleet | `CreateVm`, `StopVm`, `OpenLink`, `StopAll` | `VmHandle`, done, a link |
//! | node | Reconciler | `Reconcile`, `PruneHistory` | a report per VM, how many |
//! | node | Images | `Import`, `Remove` | the image |
//! | Fleet | Vm | `Stop` | – (the view says what happens) |
//! | Vm's effects | Vm | `OpDone`, `CancelDeadline`, `MachineExited`, `LinkLost`, `Hung` | – |
//! | Vm's effects, Fleet, Reconciler, SubnetAllocator | DbWriter | `Write` | the outcome, after the commit |
//! | Vm's effects | SubnetAllocator | `Allocate`, `Release` | a subnet with the right to make its TAP |
//! | SubnetAllocator | Reconciler | `Reconcile` | a report: a VM that left its TAP |
//! | Reconciler | SubnetAllocator | `Release` | done |
//! | Fleet | Reconciler | `Reconcile` with the VM's lock | a report: a VM that used up its budget |
//!
//! # Invariants
//! 1. No handler awaits an effect; what takes time is spawned and answers by message.
//! 2. Nobody keeps an `ActorRef` to a service: services are reached through a
//!    [`handle::ServiceHandle`], which waits for a restarted service within the caller's deadline.
//! 3. Nothing is torn down in `post_stop` or `Drop`.
//! 4. A domain failure is a reply; `Err` from a handler is a fault of our own and restarts the
//!    actor.

#[cfg(panic = "abort")]
compile_error!("ractor turns panics into supervision events: build with panic = \"unwind\"");

pub mod budget;
pub mod db_writer;
pub mod deps;
pub mod fleet;
pub mod handle;
pub mod images;
pub mod points;
pub mod reconciler;
pub mod root;
pub mod subnet_allocator;
pub mod vm;
