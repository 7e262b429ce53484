//! For tests of the real program: an installation of its own per test, and a look at the host
//! afterwards.
//!
//! Every test gets its own `MATCHLOCK_HOME`; the cache with the guest bundle and the `busybox`
//! image is shared and only read. What belongs to a test's installation is found by its
//! installation id and its directory, so that tests run side by side.

mod bundles;
mod host;
mod installation;
pub mod netns;
pub mod registry;
mod running;
mod session;
mod terminal;

pub use bundles::{copy_bundle, put_bundle};
pub use host::Remains;
pub use installation::{Installation, busybox_archive, debian_archive, program};
pub use running::{Running, wait_until};
pub use session::{Session, small_vm};
pub use terminal::{Terminal, modes_of, open_terminal};
