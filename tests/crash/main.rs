//! Every failpoint of the real program × what may go wrong there: real QEMU, TAPs and tables in a
//! network namespace of its own, then `gc`, then a full look at the host. Nothing may be left.
//!
//! ```text
//!  case = point × fault:  before ─ lead up to the point ─ armed command ─► it fires (or the case fails)
//!                         ─ `gc` ─► exit 0 ─ after == before, no rows, locks free
//! ```
//!
//! Needs the environment of `make test`. `make soak` and `make mutants` run the ignored ones.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod binary;
mod bundles;
mod case;
mod fleet;
mod forced;
mod frozen;
mod host;
mod images;
mod mutants;
mod props;
mod random;
mod removal;
mod scenario;
mod soak;
mod suite;
mod table;
mod terminal;
mod warm;
