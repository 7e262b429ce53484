//! What the supervisor can do to the world for a VM.

use std::fmt;
use std::time::Duration;

use crate::failure::Failure;
use crate::phase::Phase;

/// One thing to do. Each may be repeated: doing it twice is as good as once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Cancel the operation in flight. The only effect that is not part of an operation.
    Cancel,
    /// The actor has nothing more to do and ends. Not part of an operation either.
    Settle,
    /// Commit the phase, with the cause of the VM's end if there is one.
    Record {
        /// The phase.
        phase: Phase,
        /// What goes into `last_error`.
        cause: Option<Failure>,
    },
    /// Make the VM's directory.
    CreateDir,
    /// Answer on the owner's socket.
    ServeOwner,
    /// Make the writable disk.
    CreateDisk,
    /// Take a subnet, and make the TAP with its gateway. Nothing for a VM without a network, as all
    /// effects on its network.
    CreateTap,
    /// Make the firewall tables.
    ApplyFirewall,
    /// Start the hypervisor and commit its identity.
    Launch,
    /// Shake hands with the guest's agent.
    ConnectGuest,
    /// Wait until the guest of a template is on hold, save it, and show the snapshot to others.
    SaveSnapshot,
    /// Tell the guest its hostname and the like.
    ConfigureGuest,
    /// See that the hypervisor and the guest of a running VM are there and answer, and connect
    /// anew where the link is lost; then commit why that had to be looked at.
    Reattach {
        /// What happened: the actor was restarted, or the link was lost.
        cause: Failure,
    },
    /// Commit that something happened to a running VM that does not end it.
    Note {
        /// What happened; `None` when it is over.
        cause: Option<Failure>,
    },
    /// Ask the guest to end its commands, sync, unmount and power off, and wait for it.
    ShutdownGuest {
        /// How long its commands get between SIGTERM and SIGKILL.
        grace: Duration,
    },
    /// End the hypervisor and see that it is gone.
    CloseMachine,
    /// Remove the TAP and see that it is gone.
    RemoveTap,
    /// Remove the firewall tables and see that they are gone.
    RemoveFirewall,
    /// Remove the sockets and see that they are gone.
    RemoveSockets,
    /// Remove the writable disk and see that it is gone.
    RemoveDisk,
    /// See that the TAP is gone, and give the subnet back.
    ReleaseSubnet,
    /// Remove the VM's directory and see that it is gone.
    RemoveDir,
    /// Remove the VM's row; its history stays.
    RemoveRow,
}

impl Effect {
    /// A name for logs and error texts.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Settle => "settle",
            Self::Record { .. } => "record",
            Self::CreateDir => "create_dir",
            Self::ServeOwner => "serve_owner",
            Self::CreateDisk => "create_disk",
            Self::CreateTap => "create_tap",
            Self::ApplyFirewall => "apply_firewall",
            Self::Launch => "launch",
            Self::ConnectGuest => "connect_guest",
            Self::SaveSnapshot => "save_snapshot",
            Self::ConfigureGuest => "configure_guest",
            Self::Reattach { .. } => "reattach",
            Self::Note { .. } => "note",
            Self::ShutdownGuest { .. } => "shutdown_guest",
            Self::CloseMachine => "close_machine",
            Self::RemoveTap => "remove_tap",
            Self::RemoveFirewall => "remove_firewall",
            Self::RemoveSockets => "remove_sockets",
            Self::RemoveDisk => "remove_disk",
            Self::ReleaseSubnet => "release_subnet",
            Self::RemoveDir => "remove_dir",
            Self::RemoveRow => "remove_row",
        }
    }
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
