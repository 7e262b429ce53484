//! Imports and removes images: joins what `host::image` makes on disk to its row in `metadata.db`.
//!
//! ```text
//!  Import ─► (task) host::image::import ─► blob in place ─► row put ─► image
//!  Remove ─► (task) row removed ─► blob removed, unless another tag or a VM uses it
//! ```
//!
//! # Invariants
//! 1. A row names a blob that is complete. A blob without a row is garbage that the next import
//!    of the same image uses again and `image rm` of its last tag removes.
//! 2. A blob that a VM runs from is not removed; then the row stays too.
//! 3. One change of the metadata at a time in this process; SQLite keeps processes apart.
//!
//! # Failure
//! An import that fails or is cancelled leaves no row and nothing in the temporary directory.

mod actor;
mod work;

pub use actor::{Images, ImagesArgs, ImagesMsg, ImportInput, RemovedImage};
