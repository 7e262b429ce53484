//! How each failpoint is reached.

/// What leads to a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scenario {
    /// `run` of a short command, with further points armed that lead there.
    Run(&'static str),
    /// `run -it` of a short command, on a terminal that must be as before at the end.
    Terminal,
    /// `run --rm=false`, and SIGTERM once it runs.
    Stop,
    /// `run`, and SIGKILL to the hypervisor once it runs.
    LosesMachine,
    /// `run` whose disk takes longer than a cancelled effect may, and SIGINT meanwhile.
    Overslept,
    /// `run` whose hypervisor stands still, with further points armed that lead there.
    Hangs(&'static str),
    /// `gc` of a VM that holds everything there is.
    Gc,
    /// `rm --force` of a kept VM whose owner was killed.
    Rm,
    /// `kill` of a running VM: the owner has the point, or whoever asks.
    Kill(Side),
    /// `exec` in a running VM.
    Exec(Side),
    /// `gc --force-running` of a VM whose owner stands still with everything but a hypervisor.
    TakeOver,
    /// `image import`.
    ImageImport,
    /// `pull` from a registry of the case's own.
    Pull,
    /// `gc` after a pull that was killed with everything downloaded.
    ContentSweep,
    /// `image rm` of an image that is there.
    ImageRemove,
    /// `image rm` of one of two tags of an image.
    ImageUntag,
    /// `image tag` of an image whose new tag is another one's.
    ImageTag,
    /// `gc` after an import that was killed.
    ImageSweep,
    /// `guest use` of another bundle than the default.
    GuestUse,
    /// `guest rm` of a bundle.
    GuestRemove,
    /// `gc` after a `guest rm` that was killed.
    GuestSweep,
    /// `warm`.
    Warm,
    /// `warm` where there is a snapshot already.
    WarmAgain,
    /// `run` from a snapshot.
    WarmRun,
    /// `gc` after a `warm` that was killed.
    WarmSweep,
}

/// Who has the point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Owner,
    Client,
}

/// QEMU is spawned and nobody waits for its boot: what comes is the removal of everything.
const NO_BOOT: &str = "vm.connect_guest.before=return(error)";

/// Points that no scenario reaches, and why.
pub(crate) const NOT_REACHED: &[(&str, &str)] = &[(
    "actor.vm.link_lost.before",
    "nothing outside the guest can end its link and leave the machine running",
)];

/// Whether the guest must be up before the point is reached: that takes seconds of CPU.
pub(crate) fn boots(point: &str) -> bool {
    match scenario(point) {
        Scenario::Stop
        | Scenario::Terminal
        | Scenario::LosesMachine
        | Scenario::Hangs(_)
        | Scenario::Kill(_)
        | Scenario::Exec(_)
        | Scenario::Warm
        | Scenario::WarmAgain
        | Scenario::WarmRun
        | Scenario::WarmSweep => true,
        Scenario::Run("") => NEED_A_GUEST.iter().any(|prefix| point.starts_with(prefix)),
        Scenario::Run(lead) => lead == STOP_FAILS,
        Scenario::Overslept
        | Scenario::TakeOver
        | Scenario::Gc
        | Scenario::Rm
        | Scenario::ImageImport
        | Scenario::Pull
        | Scenario::ContentSweep
        | Scenario::ImageRemove
        | Scenario::ImageUntag
        | Scenario::ImageTag
        | Scenario::ImageSweep
        | Scenario::GuestUse
        | Scenario::GuestRemove
        | Scenario::GuestSweep => false,
    }
}

const STOP_FAILS: &str = "vm.close_machine.before=1*return(error)";

const NEED_A_GUEST: &[&str] = &[
    "exec.",
    "vm_log.",
    "vm.connect_guest.after",
    "vm.configure_guest",
    "vm.record_running",
    "vm.record_stopping",
    "actor.vm.stop",
    "actor.fleet.stop_vm",
    "actor.fleet.open_link",
];

/// Points of the removal, reached without a boot.
const REMOVAL: &[&str] = &[
    "vm.record_start_failed",
    "vm.record_cleaning",
    "vm.record_cleaned",
    "vm.close_machine",
    "vm.remove_",
    "vm.release_subnet",
    "subnet.release",
    "actor.subnet_allocator.release",
    "actor.fleet.stop_all",
    "actor.root.shutdown",
    "rootfs.remove_",
    "firewall.release",
    "firewall.remove",
    "hypervisor.kill",
    "db.release_subnet",
    "db.remove_vm",
];

const OF_GC: &[&str] = &[
    "gc.",
    "actor.reconciler.",
    "tap.remove",
    "process.kill",
    "db.raise_epoch",
    "db.prune_history",
];

const SPECIAL: &[(&str, Scenario)] = &[
    ("exec.terminal", Scenario::Terminal),
    // Only of a VM that is kept.
    ("exec.record_exit", Scenario::Stop),
    ("db.set_exit", Scenario::Stop),
    ("owner.kill", Scenario::Kill(Side::Owner)),
    ("client.kill", Scenario::Kill(Side::Client)),
    ("owner.exec", Scenario::Exec(Side::Owner)),
    ("client.exec", Scenario::Exec(Side::Client)),
    ("rm.", Scenario::Rm),
    ("db.want_removal", Scenario::Rm),
    ("actor.reconciler.want_removal", Scenario::Rm),
    ("actor.images.import", Scenario::ImageImport),
    ("actor.images.pull", Scenario::Pull),
    ("content.remove", Scenario::ContentSweep),
    ("content.", Scenario::Pull),
    ("actor.images.remove", Scenario::ImageRemove),
    ("actor.images.tag", Scenario::ImageTag),
    ("actor.images.sweep", Scenario::ImageSweep),
    ("image.remove_blob", Scenario::ImageRemove),
    ("image.sweep", Scenario::ImageSweep),
    ("image.", Scenario::ImageImport),
    ("images_db.put_image", Scenario::ImageImport),
    ("images_db.tag_image", Scenario::ImageTag),
    ("images_db.remove_shared", Scenario::ImageUntag),
    ("images_db.remove_image", Scenario::ImageRemove),
    ("guest_bundle.name_default", Scenario::GuestUse),
    ("guest_bundle.sweep", Scenario::GuestSweep),
    ("guest_bundle.", Scenario::GuestRemove),
    ("vm.save_snapshot", Scenario::Warm),
    ("hypervisor.save", Scenario::Warm),
    ("snapshot.publish", Scenario::Warm),
    ("snapshot.remove", Scenario::WarmAgain),
    ("snapshot.restore", Scenario::WarmRun),
    ("snapshot.sweep", Scenario::WarmSweep),
    // An owner that stands still keeps the tables of a VM that is taken from it.
    ("firewall.take", Scenario::TakeOver),
    ("vm.shutdown_guest", Scenario::Stop),
    ("actor.vm.machine_exited", Scenario::LosesMachine),
    ("actor.vm.cancel_deadline", Scenario::Overslept),
    // Later the hypervisor has what keeps the tables there.
    ("firewall.release", Scenario::Run("vm.launch.before=1*return(error)")),
    ("vm.record_create_failed", Scenario::Run("vm.create_disk.before=1*return(error)")),
    ("vm.record_stop_failed", Scenario::Run(STOP_FAILS)),
    (
        "vm.record_cleanup_failed",
        Scenario::Run(
            "vm.connect_guest.before=return(error);vm.remove_disk.before=1*return(error)",
        ),
    ),
    ("actor.fleet.scope_closed", Scenario::Run("actor.vm.op_done.before=1*return(panic)")),
    ("actor.fleet.compensated", Scenario::Run("actor.vm.op_done.before=return(panic)")),
    ("actor.vm.heard", Scenario::Hangs("")),
    ("vm.note", Scenario::Hangs("")),
    ("vm.reattach", Scenario::Hangs("actor.vm.heard.before=1*return(panic)")),
    (
        "actor.root.start",
        Scenario::Run(
            // The second failure is waited for; meanwhile the process must not end.
            "actor.subnet_allocator.allocate.before=return(panic);actor.subnet_allocator.release.before=return(panic);vm.record_cleanup_failed.before=sleep(500)",
        ),
    ),
    ("actor.db_writer.thread_panicked", Scenario::Run("db.set_phase.before=1*return(panic)")),
];

/// How a point is reached.
pub(crate) fn scenario(point: &str) -> Scenario {
    let starts = |prefixes: &[&str]| prefixes.iter().any(|prefix| point.starts_with(prefix));
    if let Some((_, special)) = SPECIAL.iter().find(|(prefix, _)| point.starts_with(prefix)) {
        *special
    } else if starts(OF_GC) {
        Scenario::Gc
    } else if starts(REMOVAL) {
        Scenario::Run(NO_BOOT)
    } else {
        Scenario::Run("")
    }
}
