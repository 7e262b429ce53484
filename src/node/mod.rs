//! The node: the actor tree in this process, and the way to it.
//!
//! ```text
//! boot:      config ─► home, install-id ─► state.db opened and migrated ─► tree spawned ─► Node
//! shutdown:  no new VMs ─► every VM taken down ─► services stopped, last write on disk
//! ```
//!
//! [`client`] is the door: each request takes a typed message, a deadline and an answer.
//! [`serve`] answers other processes on each VM's owner socket, [`owner`] asks it. Only
//! [`wiring`] names the Linux implementations.
//!
//! # Failure
//! If the root ends by itself the node is lost: the process says so and exits, its hypervisors die
//! with it, and `matchlock gc` removes the rest.

pub mod boot;
pub mod client;
pub mod config;
pub mod detach;
pub mod images;
pub mod output_log;
pub mod owner;
pub mod protocol;
pub mod relay;
mod removals;
pub mod rpc;
pub mod serve;
pub mod signals;
pub mod stderr;
pub mod stdin;
pub mod terminal;
pub mod warming;
pub(crate) mod wiring;
