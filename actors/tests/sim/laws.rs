//! The laws of `docs/ARCHITECTURE.md`, checked at the moment an operation touches the host.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use futures::FutureExt as _;
use matchlock_host::firewall::filter_table;
use matchlock_host::tap::{Taps as _, tap_name};
use matchlock_model::id::VmId;
use matchlock_model::phase::Phase;
use matchlock_model::record::LifecycleRecord;
use matchlock_store::WriteOp;

use super::faults::{Act, Kind};
use super::world::{Sim, Tenure, lock};

/// What the laws need to remember.
#[derive(Debug, Default)]
pub(crate) struct Laws {
    in_flight: BTreeMap<u64, (i32, VmId, Act)>,
    /// What was tried to be taken away of a VM since something was made for it last.
    tried: BTreeMap<VmId, BTreeSet<Act>>,
    /// VMs for which a TAP was made, or tried to be.
    with_tap: BTreeSet<VmId>,
    /// VMs whose last view was seen, and the tenure of the lock at that moment.
    settled: BTreeMap<VmId, Settled>,
    /// VMs for which a subnet was asked when they were created no more: they must not get it.
    late_subnets: BTreeSet<VmId>,
    /// Who may write for a VM: who inserted its row, or raised its epoch last.
    owners: BTreeMap<VmId, i32>,
    /// Who was told to take which VM from whoever has it, whatever lock that one holds.
    takers: BTreeSet<(i32, VmId)>,
    /// Owners whose VM was taken over while they held its lock.
    overruled: BTreeMap<VmId, Overruled>,
    /// Who has ended a hypervisor of which VM, and not looked at its epoch since.
    unseen: BTreeSet<(i32, VmId)>,
}

/// An owner whose VM was taken over.
#[derive(Debug, Clone, Copy)]
struct Overruled {
    pid: i32,
    /// The tenure of its lock.
    token: u64,
    /// Whether it has looked at the epoch since.
    knows: bool,
    /// What it did all the same: it was about to when the VM was taken.
    did: Option<Act>,
}

impl Overruled {
    /// Whether it may still do this: the one effect that it had begun, or was about to begin.
    fn may(self, act: Act) -> bool {
        let second_step =
            [(Act::ReleaseFirewall, Act::RemoveFirewall), (Act::CreateTap, Act::RemoveTap)];
        match self.did {
            None => !self.knows,
            Some(did) => did == act || second_step.contains(&(did, act)),
        }
    }
}

/// The moment of a VM's last view.
#[derive(Debug, Clone, Copy)]
struct Settled {
    /// The tenure of its lock.
    token: u64,
    /// What was under way: an operation that does not end is told in the view, and may end.
    stuck: Option<Act>,
}

impl Settled {
    /// Whether this is a second step of what was under way.
    fn goes_on_with(self, act: Act) -> bool {
        let one_effect = [(Act::ReleaseFirewall, Act::RemoveFirewall), (Act::Kill, Act::Kill)];
        self.stuck.is_some_and(|stuck| one_effect.contains(&(stuck, act)))
    }
}

impl Laws {
    /// Begins an operation; the other one that is under way on the same VM, if there is one.
    pub(crate) fn enter(&mut self, id: u64, pid: i32, vm: VmId, act: Act) -> Option<String> {
        let other = self
            .in_flight
            .values()
            // Showing a snapshot touches nothing of the VM: it goes on when the VM is given up.
            .find(|(_, other, act)| *other == vm && *act != Act::Publish)
            .map(|(pid, _, act)| format!("{act:?} of p{pid}"));
        self.in_flight.insert(id, (pid, vm, act));
        if act == Act::Kill {
            self.unseen.insert((pid, vm));
        }
        if act == Act::CreateTap {
            self.with_tap.insert(vm);
        }
        match act.kind() {
            Kind::Build => drop(self.tried.remove(&vm)),
            // What fails was tried too: as much as possible is released.
            _ => drop(self.tried.entry(vm).or_default().insert(act)),
        }
        other
    }

    /// Whether a process does this now, for any VM.
    pub(crate) fn is_under_way(&self, pid: i32, act: Act) -> bool {
        self.in_flight.values().any(|(of, _, other)| (*of, *other) == (pid, act))
    }

    pub(crate) fn leave(&mut self, id: u64) {
        self.in_flight.remove(&id);
    }

    /// The process is dead: what it began will never be done.
    pub(crate) fn forget(&mut self, pid: i32) {
        self.in_flight.retain(|_, (of, ..)| *of != pid);
    }
}

impl Sim {
    fn broken(&self, pid: i32, act: Act, vm: VmId, why: &str) {
        self.trace.broken(format_args!("{act:?} on {vm} by p{pid}: {why}"));
    }

    /// An operation begins; it may be late.
    pub(crate) fn begin(&self, pid: i32, act: Act, vm: VmId) {
        let tenure = lock(&self.locks).get(&vm).copied();
        let settled = lock(&self.laws).settled.get(&vm).copied();
        if let (Some(tenure), Some(settled)) = (tenure, settled)
            && tenure.token == settled.token
            && tenure.pid == pid
            && !settled.goes_on_with(act)
            // Whoever gives a VM up ends its hypervisor before he lets go of the lock.
            && act != Act::Kill
        {
            self.broken(pid, act, vm, "law 4: its last view was published already");
        }
    }

    /// An operation is about to touch the host.
    pub(crate) fn check(&self, pid: i32, act: Act, vm: VmId) {
        if !matches!(act.kind(), Kind::Build | Kind::Undo) {
            return;
        }
        if act == Act::Launch {
            self.check_launch(pid, vm);
        }
        if self.is_of_overruled(pid, act, vm) {
            return;
        }
        let tenure = lock(&self.locks).get(&vm).copied();
        let cleaner = lock(&self.cleaners).get(&vm).copied();
        match tenure {
            Some(tenure) if tenure.pid == pid => {}
            // With `--force` it is enough to be the one who cleans up.
            _ if self.is_overruled(vm) && cleaner.is_some_and(|cleaner| cleaner.pid == pid) => {}
            // From a cleaner that does not end it is taken without any lock: the epoch is what counts.
            _ if self.has_taken(pid, vm) => {}
            other => {
                let text = format!("law 5: the VM's lock is not held by it but by {other:?}");
                self.broken(pid, act, vm, &text);
            }
        }
        match act.kind() {
            Kind::Build => self.check_build(pid, act, vm),
            Kind::Undo => self.check_undo(pid, act, vm),
            Kind::Wait | Kind::Look | Kind::Now => {}
        }
    }

    /// Notes who may write from now on.
    pub(crate) fn note_owner(&self, pid: i32, op: &WriteOp) {
        let (tenures, mut laws) = (lock(&self.locks), lock(&self.laws));
        match op {
            WriteOp::InsertVm { record } => {
                laws.owners.insert(record.id, pid);
                laws.overruled.remove(&record.id);
                self.forget_template(record.id);
            }
            WriteOp::RaiseEpoch { vm, .. } => {
                laws.owners.insert(*vm, pid);
                if let Some(tenure) = tenures.get(vm).filter(|tenure| tenure.pid != pid)
                    && laws.overruled.get(vm).is_none_or(|before| before.token != tenure.token)
                {
                    let Tenure { pid, token } = *tenure;
                    laws.overruled.insert(*vm, Overruled { pid, token, knows: false, did: None });
                    self.trace.count("overruled");
                }
                // One that had begun to clean before it was overruled, and raises the epoch only now, has
                // the VM: its lock was never taken, and whoever overruled it is overruled.
                let own = tenures.get(vm).filter(|tenure| tenure.pid == pid).map(|own| own.token);
                if laws.overruled.get(vm).is_some_and(|overruled| Some(overruled.token) == own) {
                    laws.overruled.remove(vm);
                }
            }
            _ => {}
        }
    }

    /// A process reads the epoch of a VM.
    pub(crate) fn note_look(&self, pid: i32, vm: VmId) {
        lock(&self.laws).unseen.remove(&(pid, vm));
        if let Some(overruled) = lock(&self.laws).overruled.get_mut(&vm)
            && overruled.pid == pid
        {
            overruled.knows = true;
        }
    }

    /// Somebody is told to take a VM over.
    pub(crate) fn note_taker(&self, pid: i32, vm: VmId) {
        lock(&self.laws).takers.insert((pid, vm));
    }

    /// Whether it was told to take the VM over, and nobody has raised the epoch since it did.
    fn has_taken(&self, pid: i32, vm: VmId) -> bool {
        let laws = lock(&self.laws);
        laws.takers.contains(&(pid, vm)) && laws.owners.get(&vm) == Some(&pid)
    }

    /// Whether the VM was taken from an owner that may still be there.
    pub(crate) fn is_overruled(&self, vm: VmId) -> bool {
        lock(&self.laws).overruled.contains_key(&vm)
    }

    /// Whether the VM was given up by this process because of something that does not end: its
    /// hypervisor is ended at once, and not only when that has ended.
    pub(crate) fn is_given_up(&self, pid: i32, vm: VmId) -> bool {
        let tenure = lock(&self.locks).get(&vm).copied();
        let settled = lock(&self.laws).settled.get(&vm).copied();
        tenure.zip(settled).is_some_and(|(tenure, settled)| {
            (tenure.pid, tenure.token) == (pid, settled.token) && settled.stuck.is_some()
        })
    }

    /// Whether an overruled owner has touched the VM since.
    pub(crate) fn is_disturbed(&self, vm: VmId) -> bool {
        lock(&self.laws).overruled.get(&vm).is_some_and(|overruled| overruled.did.is_some())
    }

    /// Law 4 of an owner whose VM was taken over: it does no more than what it had looked before, and
    /// ends its own hypervisor. Whether this operation is of such a one.
    fn is_of_overruled(&self, pid: i32, act: Act, vm: VmId) -> bool {
        let tenure = lock(&self.locks).get(&vm).copied();
        let mut laws = lock(&self.laws);
        let Some(overruled) = laws.overruled.get_mut(&vm) else { return false };
        if overruled.pid != pid || tenure.is_none_or(|tenure| tenure.token != overruled.token) {
            return false;
        }
        if act == Act::Kill {
            return true;
        }
        let may = overruled.may(act);
        overruled.did = Some(act);
        drop(laws);
        if !may {
            self.broken(pid, act, vm, "law 4: another has taken the VM over");
        }
        true
    }

    /// Of one VM there is one hypervisor; and whoever has ended one has seen since that the VM is still
    /// its own before it launches another.
    fn check_launch(&self, pid: i32, vm: VmId) {
        if self.has_hypervisor(vm) {
            self.broken(pid, Act::Launch, vm, "another hypervisor of it lives");
        }
        if lock(&self.laws).unseen.contains(&(pid, vm)) {
            self.broken(pid, Act::Launch, vm, "law 4: it has not looked since it ended the other");
        }
    }

    /// Law 1: the row that names a resource is there before the resource, and it is ours.
    fn check_build(&self, pid: i32, act: Act, vm: VmId) {
        let rows = lock(&self.rows);
        let (row, head) = (rows.vm(vm).unwrap(), rows.lifecycle_head(vm).unwrap());
        drop(rows);
        let (Some(row), Some(head)) = (row, head) else {
            return self.broken(pid, act, vm, "law 1: there is no row");
        };
        if row.owner.as_ref().map(|owner| owner.pid) != Some(pid) {
            self.broken(pid, act, vm, "law 4: the row has another owner");
        }
        let phase = match act {
            Act::Launch | Act::Publish => Phase::Starting,
            _ => Phase::Creating,
        };
        if head.phase != phase {
            let text = format!("law 1: the recorded phase is {}", head.phase);
            self.broken(pid, act, vm, &text);
        }
        if !names(act, vm, &head) || (act == Act::CreateTap && !row.holds_subnet) {
            self.broken(pid, act, vm, "law 1: the row does not name it");
        }
        if act == Act::Launch && !(self.has_disk(vm) && self.has_tap(vm) && self.has_tables(vm)) {
            self.broken(pid, act, vm, "something that it needs is not there");
        }
    }

    /// Law 7: hypervisor, TAP, tables, sockets and disk, subnet, directory.
    fn check_undo(&self, pid: i32, act: Act, vm: VmId) {
        if act == Act::Kill || self.is_disturbed(vm) {
            return;
        }
        if self.has_hypervisor(vm) {
            self.broken(pid, act, vm, "law 7: its hypervisor lives");
        }
        let tried = lock(&self.laws).tried.get(&vm).cloned().unwrap_or_default();
        let tap = !self.has_tap(vm) || tried.contains(&Act::RemoveTap);
        let tables = !self.has_tables(vm)
            || tried.contains(&Act::RemoveFirewall)
            || tried.contains(&Act::ReleaseFirewall);
        let in_order = match act {
            Act::RemoveFirewall | Act::ReleaseFirewall => tap,
            Act::RemoveSockets | Act::RemoveDisk => tap && tables,
            Act::RemoveDir => self.remains(vm).is_empty(),
            _ => true,
        };
        if !in_order {
            self.broken(pid, act, vm, "law 7: something that comes before it is there");
        }
        let row = lock(&self.rows).vm(vm).unwrap();
        if act == Act::RemoveDir && row.is_some_and(|row| row.phase != Phase::Cleaned) {
            self.broken(pid, act, vm, "law 9: its row does not say that it is clean");
        }
    }

    /// A write is about to be committed.
    pub(crate) fn check_write(&self, pid: i32, op: &WriteOp) {
        let wrong = |vm: VmId, why: &str| {
            self.trace.broken(format_args!("a write for {vm} by p{pid}: {why}"));
        };
        if epoch_of(op).is_some_and(|(vm, _)| self.is_disturbed(vm)) {
            return;
        }
        match op {
            WriteOp::ReleaseSubnet { vm, .. } if self.is_theirs(pid, op) => {
                if self.has_tap(*vm) || self.has_hypervisor(*vm) {
                    wrong(*vm, "law 7: the subnet is released while its TAP is there");
                }
                // One that reached nobody is given back at once: no TAP was ever on it.
                let used = lock(&self.laws).with_tap.contains(vm);
                let tried = lock(&self.laws).tried.get(vm).cloned().unwrap_or_default();
                let disk = self.has_disk(*vm) && !tried.contains(&Act::RemoveDisk);
                if used && disk {
                    wrong(*vm, "law 7: the subnet is released before the disk");
                }
            }
            WriteOp::AllocateSubnet { vm, .. } if self.is_theirs(pid, op) => {
                // A creation that was cancelled must not take anything any more.
                let row = lock(&self.rows).vm(*vm).unwrap();
                if row.is_none_or(|row| row.phase != Phase::Creating) {
                    lock(&self.laws).late_subnets.insert(*vm);
                }
            }
            WriteOp::SetPhase { vm, phase: Phase::Cleaned, .. } if self.is_theirs(pid, op) => {
                let row = lock(&self.rows).vm(*vm).unwrap();
                let subnet = row.is_some_and(|row| row.holds_subnet);
                let remains = self.remains(*vm);
                if subnet || !remains.is_empty() {
                    wrong(*vm, &format!("cleaned, but there is {remains:?}, subnet {subnet}"));
                }
            }
            WriteOp::SetPhase { vm, phase: Phase::Running, .. } => self.check_runs(*vm),
            WriteOp::RemoveVm { vm, .. } if self.is_theirs(pid, op) => {
                let remains = self.remains(*vm);
                if self.has_dir(*vm) || !remains.is_empty() {
                    wrong(*vm, &format!("law 9: the row goes, but there is {remains:?}"));
                }
            }
            _ => {}
        }
    }

    /// Whether an op's epoch is the present one, so that the store lets it pass.
    pub(crate) fn is_theirs(&self, _pid: i32, op: &WriteOp) -> bool {
        let Some((vm, epoch)) = epoch_of(op) else { return true };
        lock(&self.rows).vm(vm).unwrap().is_some_and(|row| row.owner_epoch == epoch)
    }

    /// A write of an owner was committed.
    pub(crate) fn check_written(&self, pid: i32, op: &WriteOp, owner: Option<i32>) {
        if let WriteOp::AllocateSubnet { vm, .. } = op
            && lock(&self.laws).late_subnets.remove(vm)
        {
            self.trace.broken(format_args!("law 4: {vm} got a subnet when it was created no more"));
        }
        if let Some((vm, _)) = epoch_of(op)
            && owner != Some(pid)
        {
            let text = format!("law 4: p{pid} wrote for {vm}, which {owner:?} owns: {op:?}");
            self.trace.broken(text);
        }
    }

    pub(crate) fn owner(&self, op: &WriteOp) -> Option<i32> {
        let (vm, _) = epoch_of(op)?;
        lock(&self.laws).owners.get(&vm).copied()
    }

    /// A VM's last view was seen.
    pub(crate) fn check_settled(&self, vm: VmId, cleaned_up: bool, ephemeral: bool) {
        if let Some(tenure) = lock(&self.locks).get(&vm) {
            let mut laws = lock(&self.laws);
            let stuck = laws.in_flight.values().find(|(_, of, _)| *of == vm).map(|(.., act)| *act);
            laws.settled.insert(vm, Settled { token: tenure.token, stuck });
        }
        if self.is_overruled(vm) {
            return;
        }
        let remains = self.remains(vm);
        let row = lock(&self.rows).vm(vm).unwrap();
        if cleaned_up && row.is_some_and(|row| row.holds_subnet) {
            self.trace.broken(format_args!("{vm} is cleaned up, it says, but it holds a subnet"));
        }
        if cleaned_up && !remains.is_empty() {
            self.trace
                .broken(format_args!("{vm} is cleaned up, it says, but there is {remains:?}"));
        }
        if cleaned_up && ephemeral && self.has_dir_or_row(vm) {
            self.trace
                .broken(format_args!("{vm} is gone, it says, but its row or directory is not"));
        }
    }

    /// No two TAPs of ours on one subnet.
    pub(crate) fn check_address(&self, vm: VmId, gateway: Ipv4Addr) {
        let used = self.taps.host_subnets().now_or_never().expect("the fake waits for nothing");
        let network = Ipv4Addr::from_bits(gateway.to_bits() & !0xFF);
        let ours = tap_name(vm);
        for other in used.unwrap().into_iter().filter(|used| used.network == network) {
            if other.link.as_ref().is_some_and(|link| *link != ours && link.starts_with("fc-")) {
                self.trace.broken(format_args!("{vm} got {gateway}, which {:?} has", other.link));
            }
        }
    }

    /// Law 2: the history of each VM goes by the table of phases.
    pub(crate) fn check_histories(&self, highest: u32) {
        for vm in (1..=highest).map(VmId::new) {
            let history = lock(&self.rows).history(vm).unwrap();
            for pair in history.windows(2) {
                let (from, to) = (pair[0].phase, pair[1].phase);
                if from != to && !from.successors().contains(&to) {
                    self.trace.broken(format_args!("{vm}: {from} became {to}"));
                }
            }
        }
    }
}

/// Whether the row names what is to be made.
fn names(act: Act, vm: VmId, head: &LifecycleRecord) -> bool {
    let (held, paths) = (&head.resources, Sim::paths(vm));
    let is = |named: &Option<String>, path: std::path::PathBuf| named.as_deref() == path.to_str();
    match act {
        Act::CreateDir => is(&held.state_dir, paths.dir),
        Act::ServeOwner => is(&held.owner_socket, paths.owner_socket()),
        Act::CreateDisk => is(&held.rootfs_path, paths.rootfs()),
        Act::CreateTap => held.tap_name == Some(tap_name(vm)) && held.subnet_cidr.is_some(),
        Act::ApplyFirewall => held.firewall_table == Some(filter_table(&tap_name(vm))),
        Act::Launch => is(&held.link_socket, paths.link_socket()),
        _ => true,
    }
}

fn epoch_of(op: &WriteOp) -> Option<(VmId, matchlock_model::id::OwnerEpoch)> {
    match op {
        WriteOp::SetPhase { vm, epoch, .. }
        | WriteOp::SetHypervisor { vm, epoch, .. }
        | WriteOp::SetExit { vm, epoch, .. }
        | WriteOp::AllocateSubnet { vm, epoch, .. }
        | WriteOp::ReleaseSubnet { vm, epoch }
        | WriteOp::RemoveVm { vm, epoch } => Some((*vm, *epoch)),
        WriteOp::InsertVm { .. }
        | WriteOp::RaiseEpoch { .. }
        | WriteOp::WantRemoval { .. }
        | WriteOp::PruneHistory { .. } => None,
    }
}
