//! What the host holds of a VM.

use matchlock_host::process::Processes as _;
use matchlock_host::tap::tap_name;
use matchlock_model::id::VmId;

use super::strangers::squatter;
use super::world::{Sim, lock};

impl Sim {
    pub(crate) fn has_hypervisor(&self, vm: VmId) -> bool {
        let mark = self.mark(vm);
        self.processes.find_marked().unwrap().iter().any(|process| process.mark == mark)
    }

    pub(crate) fn has_tap(&self, vm: VmId) -> bool {
        vm != squatter().vm && self.taps.existing().contains(&tap_name(vm))
    }

    pub(crate) fn has_tables(&self, vm: VmId) -> bool {
        let tap = tap_name(vm);
        vm != squatter().vm && self.firewall.existing().iter().any(|table| table.ends_with(&tap))
    }

    pub(crate) fn has_disk(&self, vm: VmId) -> bool {
        self.rootfs.existing().contains(&Self::paths(vm).rootfs())
    }

    pub(crate) fn has_sockets(&self, vm: VmId) -> bool {
        let files = self.rootfs.existing();
        Self::paths(vm).sockets().iter().any(|socket| files.contains(socket))
    }

    pub(crate) fn has_dir(&self, vm: VmId) -> bool {
        self.rootfs.existing().contains(&Self::paths(vm).dir)
    }

    /// What of a VM is there that a cleaned one must not have.
    pub(crate) fn remains(&self, vm: VmId) -> Vec<&'static str> {
        [
            (self.has_hypervisor(vm), "hypervisor"),
            (self.has_tap(vm), "TAP"),
            (self.has_tables(vm), "tables"),
            (self.has_sockets(vm), "sockets"),
            (self.has_disk(vm), "disk"),
        ]
        .into_iter()
        .filter_map(|(there, what)| there.then_some(what))
        .collect()
    }

    pub(crate) fn has_dir_or_row(&self, vm: VmId) -> bool {
        self.has_dir(vm) || lock(&self.rows).vm(vm).unwrap().is_some()
    }
}
