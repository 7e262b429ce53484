//! The root of the tree: starts the services in order, restarts them within their budgets.
//!
//! ```text
//! boot:      DbWriter ─► Reconciler ─► SubnetAllocator ─► Images ─► Fleet
//!            (each: spawned, then published)
//! shutdown:  Fleet: StopAll, wait until every VM is settled ─► Fleet stopped
//!            ─► Images, SubnetAllocator, Reconciler stopped ─► DbWriter drained ─► root stopped ─► thread joined
//! ```
//!
//! # Invariants
//! 1. A service is published only while it lives; callers wait for its next life.
//! 2. A service's state that must survive it is kept here: the writer's thread, Fleet's registry.
//!
//! 3. The writer's thread is joined by the node, after the root: the writer's last state, which
//!    holds the queue open, lies in the root's own mailbox until then.
//!
//! # Failure
//! A service that uses up its budget, or cannot be started again, ends the root: the node sees it,
//! says so and exits; hypervisors die with the process and `matchlock gc` cleans up after it.

mod actor;

pub use actor::{Root, RootArgs, RootMsg, Services, Slots};
