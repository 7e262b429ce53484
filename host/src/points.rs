//! Where a test can make the host's side fail; each area is listed beside its code.

use matchlock_failpoints::Area;

use crate::{
    firewall, guest_bundle, hypervisor, image, netlock, owner_lock, process, rootfs, snapshot,
    socket, tap, vm_log,
};

/// Every area of this crate.
pub const AREAS: &[Area] = &[
    rootfs::POINTS,
    vm_log::POINTS,
    socket::POINTS,
    tap::POINTS,
    firewall::POINTS,
    netlock::POINTS,
    owner_lock::POINTS,
    hypervisor::POINTS,
    process::SPAWN_POINTS,
    process::POINTS,
    image::POINTS,
    image::content::POINTS,
    guest_bundle::POINTS,
    snapshot::POINTS,
];
