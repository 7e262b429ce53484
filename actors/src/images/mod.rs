//! Imports, tags and removes images: joins what `host::image` makes on disk to its row in `metadata.db`.
//!
//! ```text
//!  Import ─► (task) host::image::import ─► blobs in place ─► rows put ─► images
//!  Pull   ─► (task) host::image::pull ─► blobs and root filesystem held ─► row put ─► image
//!  Tag    ─► (task) row copied
//!  Remove ─► (task) another tag uses the blob ─► row removed
//!                   else ─► blob locked, unless a VM uses it ─► row removed ─► blob removed
//!  Sweep  ─► (task) temporary directories without a living import, blobs and downloads that no row
//!                   names, removed
//! ```
//!
//! # Invariants
//! 1. A row names a blob that is complete. A blob without a row is garbage, which a crash leaves; the
//!    next import of the same image uses it again, a sweep removes it.
//! 2. A blob that a VM runs from is not removed; then the last row that names it stays too.
//! 3. What was downloaded stays as long as a row of scope `registry` names the manifest that names it.
//! 4. One change of the metadata at a time in this process; SQLite keeps processes apart.
//!
//! # Failure
//! An import that fails or is cancelled leaves no row and nothing in the temporary directory. What a
//! crash leaves is swept by `gc`, and what is temporary of it by the next import. A pull that ends
//! early leaves what it has downloaded: the next one goes on with it, a sweep removes it.

mod actor;
mod pull;
mod work;

pub use actor::{Images, ImagesArgs, ImagesMsg, ImportInput, RemovedImage, TaggedImport};
pub use pull::Pulled;
