//! The `matchlock` command: [`cli`] reads arguments and prints, [`node`] boots the actor tree and
//! talks to it.
//!
//! The straight walk of `matchlock run`, one verb name at every level: `cli/run.rs` (arguments) →
//! `model::spec` (every refusal of input) → `node/client.rs` (`create_vm`) → `actors::fleet`
//! (`CreateVm`) → `actors::vm` → `model::vm::step` (the decision) → `actors::vm::effects` →
//! `host`, and `actors::db_writer` → `store`.

pub mod cli;
pub mod node;
pub mod points;
