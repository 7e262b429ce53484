//! What goes wrong, and when: drawn from the seed at each operation.

use std::time::Duration;

use matchlock_model::id::VmId;

use super::rng::Rng;

/// An operation on the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Act {
    CreateDir,
    ServeOwner,
    CreateDisk,
    HostSubnets,
    NetworkLock,
    CreateTap,
    ApplyFirewall,
    Obstacles,
    Launch,
    Connect,
    Configure,
    Shutdown,
    Kill,
    RemoveTap,
    ReleaseFirewall,
    RemoveFirewall,
    RemoveSockets,
    RemoveDisk,
    RemoveDir,
    ObserveTap,
    ListTaps,
    ObserveFirewall,
    ListFirewall,
    ListDirs,
    ObserveFiles,
    FindMarked,
    IsAlive,
    OwnIdentity,
    OwnNamespaces,
    TryLock,
    IsHeld,
    Memory,
    RandomId,
    Read,
    Write,
    OpenStore,
    Fingerprint,
    FindSnapshot,
    CheckSnapshot,
    BeginSnapshot,
    Hold,
    Save,
    Publish,
    Withdraw,
    Discard,
    Resume,
    Sweep,
}

/// What kind of operation, as far as faults and laws go by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It makes something for a VM, and may be cancelled.
    Build,
    /// It takes something of a VM away.
    Undo,
    /// It talks to a guest, or waits for somebody; it may be cancelled.
    Wait,
    /// It looks.
    Look,
    /// It cannot wait: it looks, or takes a lock.
    Now,
}

impl Act {
    pub(crate) const ALL: [Self; 47] = [
        Self::CreateDir,
        Self::ServeOwner,
        Self::CreateDisk,
        Self::HostSubnets,
        Self::NetworkLock,
        Self::CreateTap,
        Self::ApplyFirewall,
        Self::Obstacles,
        Self::Launch,
        Self::Connect,
        Self::Configure,
        Self::Shutdown,
        Self::Kill,
        Self::RemoveTap,
        Self::ReleaseFirewall,
        Self::RemoveFirewall,
        Self::RemoveSockets,
        Self::RemoveDisk,
        Self::RemoveDir,
        Self::ObserveTap,
        Self::ListTaps,
        Self::ObserveFirewall,
        Self::ListFirewall,
        Self::ListDirs,
        Self::ObserveFiles,
        Self::FindMarked,
        Self::IsAlive,
        Self::OwnIdentity,
        Self::OwnNamespaces,
        Self::TryLock,
        Self::IsHeld,
        Self::Memory,
        Self::RandomId,
        Self::Read,
        Self::Write,
        Self::OpenStore,
        Self::Fingerprint,
        Self::FindSnapshot,
        Self::CheckSnapshot,
        Self::BeginSnapshot,
        Self::Hold,
        Self::Save,
        Self::Publish,
        Self::Withdraw,
        Self::Discard,
        Self::Resume,
        Self::Sweep,
    ];

    pub(crate) const fn kind(self) -> Kind {
        match self {
            Self::CreateDir
            | Self::ServeOwner
            | Self::CreateDisk
            | Self::CreateTap
            | Self::ApplyFirewall
            | Self::Launch
            | Self::Publish => Kind::Build,
            Self::Kill
            | Self::RemoveTap
            | Self::ReleaseFirewall
            | Self::RemoveFirewall
            | Self::RemoveSockets
            | Self::RemoveDisk
            | Self::RemoveDir
            | Self::Withdraw
            | Self::Discard => Kind::Undo,
            Self::Connect
            | Self::Configure
            | Self::Shutdown
            | Self::BeginSnapshot
            | Self::Hold
            | Self::Save
            | Self::Resume => Kind::Wait,
            Self::HostSubnets
            | Self::NetworkLock
            | Self::Obstacles
            | Self::ObserveTap
            | Self::ListTaps
            | Self::ObserveFirewall
            | Self::ListFirewall
            | Self::Read
            | Self::Write
            | Self::Fingerprint
            | Self::FindSnapshot
            | Self::CheckSnapshot
            | Self::Sweep => Kind::Look,
            Self::ListDirs
            | Self::ObserveFiles
            | Self::FindMarked
            | Self::IsAlive
            | Self::OwnIdentity
            | Self::OwnNamespaces
            | Self::TryLock
            | Self::IsHeld
            | Self::Memory
            | Self::RandomId
            | Self::OpenStore => Kind::Now,
        }
    }
}

/// What happens to an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It fails and changes nothing.
    Fails,
    /// It is done, and says that it failed.
    LostReply,
    /// It is done after this time, if somebody still waits for it.
    Late(Duration),
    /// It is done, and its answer comes after this time.
    LateReply(Duration),
    /// It is done twice.
    Twice,
    /// It never returns and changes nothing.
    Never,
    /// It panics and changes nothing.
    Panic,
    /// It is done and panics.
    PanicAfter,
}

/// The longest that something is late: longer than a cancelled operation is waited for.
const LATEST: Duration = Duration::from_secs(40);

/// What goes wrong in a scenario.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// In percent of all operations.
    rate: u64,
    panics: bool,
    /// An operation that always fails so, for as long as there are faults.
    stuck: Option<(Act, Fault)>,
    /// Only this VM's operations go wrong.
    pub(crate) target: Option<VmId>,
    pub(crate) on: bool,
}

impl Plan {
    pub(crate) fn new(rng: &mut Rng) -> Self {
        let rate = *rng.pick(&[0, 1, 3, 8, 15, 30]);
        let panics = rng.chance(60);
        let stuck = rng.chance(30).then(|| {
            let act = *rng.pick(&Act::ALL);
            let how = [Fault::Fails, Fault::LostReply, Fault::Late(Duration::from_secs(9))];
            (act, *rng.pick(&how))
        });
        // A store that cannot be opened, or a process that knows nothing, ends the whole node.
        let stuck = stuck.filter(|(act, _)| !matches!(act, Act::OpenStore | Act::RandomId));
        Self { rate, panics, stuck, target: None, on: true }
    }

    /// What happens to this operation.
    pub(crate) fn draw(&self, rng: &mut Rng, act: Act, vm: Option<VmId>) -> Option<Fault> {
        let aimed = self.target.is_none() || (vm.is_some() && vm == self.target);
        if !self.on || !aimed {
            return None;
        }
        if let Some((stuck, fault)) = self.stuck
            && stuck == act
        {
            return Some(fault);
        }
        if !rng.chance(self.rate) {
            return None;
        }
        // What its lock panics about is not its own: whoever looks for stale TAPs asks for all locks.
        if self.target.is_some() && act == Act::IsHeld {
            return Some(Fault::Fails);
        }
        // Some things are rarer than others, or no node would ever get anywhere.
        if matches!(act, Act::OpenStore | Act::Memory | Act::Write | Act::Read) && rng.chance(60) {
            return None;
        }
        Some(self.kind_of_fault(rng, act))
    }

    fn kind_of_fault(&self, rng: &mut Rng, act: Act) -> Fault {
        let kind = act.kind();
        let panics = self.panics && act != Act::OpenStore;
        loop {
            let fault = match rng.below(12) {
                0..=2 => Fault::Fails,
                3 => Fault::LostReply,
                4..=5 => Fault::Late(rng.up_to(LATEST)),
                6 => Fault::LateReply(rng.up_to(LATEST)),
                7 => Fault::Twice,
                8..=9 => Fault::Never,
                10 => Fault::Panic,
                _ => Fault::PanicAfter,
            };
            let fits = match fault {
                Fault::Fails => true,
                Fault::LostReply => kind != Kind::Now,
                Fault::Late(_) => kind != Kind::Now,
                // A kill ends at its own deadline.
                Fault::LateReply(_) => kind != Kind::Now && act != Act::Kill,
                Fault::Twice => {
                    // The others take something that there is only once.
                    let once = [
                        Act::CreateTap,
                        Act::ApplyFirewall,
                        Act::Launch,
                        Act::ReleaseFirewall,
                        Act::Publish,
                        Act::Withdraw,
                        Act::Discard,
                    ];
                    matches!(kind, Kind::Build | Kind::Undo) && !once.contains(&act)
                }
                // What takes down, or looks for others, has no deadline: it must end by itself.
                Fault::Never => matches!(kind, Kind::Build | Kind::Wait),
                Fault::Panic => panics,
                Fault::PanicAfter => panics && kind != Kind::Now,
            };
            if fits {
                return fault;
            }
        }
    }
}
