//! Where a test can make the command itself fail, and the list of all points.

use matchlock_failpoints::{Area, Injected};
use matchlock_model::failure::{Failure, FailureKind};

/// A node's boot.
pub(crate) const HOME: Area =
    Area::new("home", &["open_state", "write_id", "link_id", "unlink_id", "vms_dir"]);

/// A command in a guest: started, its streams carried to their end, our terminal given to it, its exit
/// code recorded.
pub(crate) const EXEC: Area = Area::new("exec", &["start", "relay", "terminal", "record_exit"]);

/// What a VM's owner does for other processes.
pub(crate) const OWNER: Area = Area::new("owner", &["kill", "exec"]);

/// What asks a VM's owner.
pub(crate) const CLIENT: Area = Area::new("client", &["kill", "exec"]);

/// `rm`: its wish, and everything that it does.
pub(crate) const RM: Area = Area::new("rm", &["want", "remove"]);

/// An injected failure as a step's own.
pub(crate) fn injected(injected: Injected) -> Failure {
    Failure::new(FailureKind::Internal, injected.to_string())
}

/// The names of all failpoints, in the order of a VM's life more or less.
#[cfg(feature = "failpoints")]
#[must_use]
pub fn all() -> Vec<String> {
    let own = [HOME, EXEC, OWNER, CLIENT, RM];
    let actors = matchlock_actors::points::AREAS.iter();
    let host = matchlock_host::points::AREAS.iter();
    let store = [matchlock_store::points::DB, matchlock_store::points::IMAGES];
    own.iter().chain(actors).chain(host).chain(&store).flat_map(Area::points).collect()
}
