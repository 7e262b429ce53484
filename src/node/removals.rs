//! Wishes of an earlier `rm --force`, which whoever comes next fulfils in passing.
//!
//! ```text
//!  wanted ─► nobody has it: removed
//!         ├► held by this process still: looked at again
//!         └► held by an owner: asked once more ─► it goes on, or hangs: taken over
//! ```
//!
//! Whoever calls has other things to do: it takes no longer than a moment, with a take-over a few seconds,
//! and what fails or takes longer is left to the next, or to `matchlock gc`.

use std::time::Duration;

use futures::stream::{self, StreamExt as _};
use matchlock_actors::reconciler::{Outcome, VmReport};
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::VmId;
use matchlock_model::reconcile::Goal;
use tokio::time::{Instant, sleep, timeout};

use super::boot::Node;
use super::owner::{self, KillRequest};

/// How long a command waits for removals that it was not asked for.
const REMOVALS_LIMIT: Duration = Duration::from_secs(2);

/// How long taking VMs from owners that hang may take.
const TAKE_OVER_LIMIT: Duration = Duration::from_secs(10);

/// How long an owner may not listen: it has closed its socket and ends, or hangs before its end.
const LISTEN_LIMIT: Duration = Duration::from_secs(1);

/// How often a VM is looked at that is still held: nobody can be told when it is released.
const RELEASE_POLL: Duration = Duration::from_millis(10);

/// How an owner is asked that had its time already, when the VM was to be removed by force.
const ONCE_MORE: KillRequest = KillRequest {
    force: true,
    heard: Some(Duration::from_millis(500)),
    done: Some(Duration::from_secs(1)),
};

/// How many owners are asked at once.
const AT_ONCE: usize = 16;

impl Node {
    /// Removes what an earlier `rm --force` could not wait for.
    pub async fn finish_removals(&self) {
        match self.deps().reader.vms_to_remove().await {
            Ok(wanted) if wanted.is_empty() => return,
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(%error, "VMs that are to be removed could not be looked for");
                return;
            }
        }
        let reports = match timeout(REMOVALS_LIMIT, self.finish_own_removals()).await {
            Ok(Ok(reports)) => reports,
            Ok(Err(failure)) => {
                tracing::warn!(%failure, "VMs that are to be removed are left to `matchlock gc`");
                return;
            }
            Err(_) => {
                tracing::debug!("VMs that are to be removed take longer: left to the next");
                return;
            }
        };
        tracing::debug!(?reports, "VMs that were to be removed");
        let held = reports.iter().filter(|report| report.outcome == Outcome::Running);
        let overruling = stream::iter(held.map(|report| self.overrule(report.vm)))
            .for_each_concurrent(AT_ONCE, |overruled| overruled);
        if timeout(TAKE_OVER_LIMIT, overruling).await.is_err() {
            tracing::warn!("VMs that are to be removed take longer: left to `matchlock gc`");
        }
    }

    /// A VM of this node that has just ended may be held for a moment still.
    async fn finish_own_removals(&self) -> Result<Vec<VmReport>, Failure> {
        let own = self.deps().processes.own_identity();
        let own = own.map_err(|e| Failure::from_error(FailureKind::Host, &e))?;
        loop {
            let reports = self.client().finish_removals().await?;
            let mut held_by_us = false;
            for report in reports.iter().filter(|report| report.outcome == Outcome::Running) {
                let row = self.deps().reader.vm(report.vm).await;
                let row = row.map_err(|e| Failure::from_error(FailureKind::Host, &e))?;
                held_by_us |= row.is_some_and(|row| row.owner.as_ref() == Some(&own));
            }
            if !held_by_us {
                return Ok(reports);
            }
            sleep(RELEASE_POLL).await;
        }
    }

    /// Removes a VM whose owner has ended meanwhile.
    async fn remove_left(&self, vm: VmId) {
        match self.client().reconcile(Some(vm), Goal::Remove).await {
            Ok(reports) => tracing::debug!(?reports, "a VM whose owner has just ended"),
            Err(failure) => {
                tracing::warn!(vm_id = %vm, %failure, "a VM is left to `matchlock gc`");
            }
        }
    }

    /// Takes a VM from an owner that has not removed it, though it was told to.
    async fn overrule(&self, vm: VmId) {
        let until = Instant::now() + LISTEN_LIMIT;
        let refused = loop {
            match owner::kill(&self.deps().vms_dir, vm, ONCE_MORE).await {
                // It removes the VM itself, at its end.
                Ok(()) => return,
                Err(failure) if failure.kind != FailureKind::NotFound => break failure,
                Err(failure) => match self.deps().locks.is_held(vm) {
                    // It has ended: the VM is anybody's.
                    Ok(false) => return self.remove_left(vm).await,
                    Ok(true) if Instant::now() < until => sleep(RELEASE_POLL).await,
                    Ok(true) => break failure,
                    Err(error) => {
                        tracing::warn!(vm_id = %vm, %error, "its owner could not be looked for");
                        return;
                    }
                },
            }
        };
        match self.client().take_over(vm, Goal::Remove).await {
            Ok(reports) => {
                tracing::debug!(?reports, "what was taken over");
                tracing::warn!(vm_id = %vm, %refused, "a VM to be removed was taken from its owner");
            }
            Err(failure) => {
                tracing::warn!(vm_id = %vm, %failure, "a VM is left to `matchlock gc`");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use matchlock_host::owner_lock::LinuxOwnerLocks;
    use matchlock_model::phase::Phase;
    use matchlock_model::record::Resources;
    use matchlock_model::vm::StopMode;
    use matchlock_store::{NewVm, WriteOp};

    use super::*;
    use crate::node::config::NodeConfig;

    const VM: VmId = VmId::new(1);

    /// A cleaned VM that this process made, and that somebody wants removed.
    async fn wanted(node: &Node) {
        let deps = node.deps();
        let owner = deps.processes.own_identity().unwrap();
        let (epoch, at) = (matchlock_model::id::OwnerEpoch::FIRST, (deps.now)());
        let record = NewVm {
            id: VM,
            image: "i".into(),
            config_json: "{}".into(),
            owner: owner.clone(),
            namespaces: deps.processes.own_namespaces().unwrap(),
            ephemeral: false,
            backend: "qemu".into(),
            resources: Resources { owner: Some(owner), ..Resources::default() },
            created_at: at,
        };
        let phase = |phase| WriteOp::SetPhase {
            vm: VM,
            epoch,
            phase,
            last_error: None,
            backend: None,
            resources: None,
            cleanup: Vec::new(),
            at,
        };
        for op in [
            WriteOp::InsertVm { record: Box::new(record) },
            phase(Phase::Cleaning),
            phase(Phase::Cleaned),
            WriteOp::WantRemoval { vm: VM, at },
        ] {
            deps.db.write(op).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_vm_of_ours_that_is_held_for_a_moment_is_waited_for() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().as_os_str().to_owned();
        let config = NodeConfig::load(&move |name| {
            // The one holds both.
            ["MATCHLOCK_HOME", "MATCHLOCK_CACHE"].contains(&name).then(|| path.clone())
        });
        let node = Node::boot(config.unwrap()).await.unwrap();
        wanted(&node).await;
        let held = LinuxOwnerLocks::open(home.path()).unwrap().try_acquire(VM).unwrap();
        let mut finishing = Box::pin(node.finish_own_removals());
        // It looks, finds it held, and looks again.
        let early = timeout(20 * RELEASE_POLL, &mut finishing).await;
        assert!(early.is_err(), "it did not wait: {early:?}");
        drop(held);
        let reports = finishing.await.unwrap();
        assert!(matches!(reports[0].outcome, Outcome::Cleaned { .. }), "{reports:?}");
        assert_eq!(node.deps().reader.vm(VM).await.unwrap(), None);
        node.shutdown(StopMode::Force).await.unwrap();
    }
}
