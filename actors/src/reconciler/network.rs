//! What of a VM's network is left on this host, in this network namespace.

use matchlock_failpoints::mutated;
use matchlock_host::firewall::{FirewallError, ObservedFirewall};
use matchlock_host::process::NamespaceSighting;
use matchlock_host::tap::tap_name;
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::id::{Mark, VmId};
use matchlock_model::identity::ProcessIdentity;
use matchlock_model::record::VmRemains;

use super::sight::{Sight, host};
use crate::deps::Deps;

/// The VMs of which a TAP or a table is here, whether they have a row or not.
///
/// Tables can be listed with a right only that it takes to make them: who lacks it is told, and sees
/// the rest.
pub(super) async fn marked_ids(sight: &Sight) -> Result<Vec<VmId>, Failure> {
    let taps = sight.taps.list_marked(&sight.install).await.map_err(|e| host(&e))?;
    let tables = match sight.firewall.list_marked(&sight.install).await {
        Ok(tables) => tables,
        Err(error @ FirewallError::NotPermitted { .. }) => {
            tracing::warn!(%error, "firewall tables of VMs without a row were not looked for");
            Vec::new()
        }
        Err(error) => return Err(host(&error)),
    };
    let marks = taps.into_iter().map(|tap| tap.mark).chain(tables.into_iter().map(|t| t.mark));
    Ok(marks.flatten().map(|mark| mark.vm).collect())
}

/// Whether a TAP and whether a table of the VM is here.
pub(super) async fn observe(
    sight: &Sight,
    vm: VmId,
    row: Option<&VmRemains>,
) -> Result<(bool, bool), Failure> {
    let had_network = row.is_some_and(|row| row.had_network);
    if had_network && is_elsewhere(sight, row)? {
        return Ok((false, false));
    }
    let (name, mark) = (tap_name(vm), sight.mark(vm));
    let tap = sight.taps.observe(&name).await.map_err(|e| host(&e))?;
    let tap = tap.is_some_and(|tap| tap.mark.as_ref() == Some(&mark)) && !mutated("blind_to_taps");
    let tables = match sight.firewall.observe(&name).await {
        Ok(tables) => is_marked(&tables, &mark),
        // Nobody without the right has made any.
        Err(FirewallError::NotPermitted { .. }) if !had_network => false,
        Err(error) => return Err(host(&error)),
    };
    Ok((tap, tables))
}

fn is_marked(tables: &ObservedFirewall, mark: &Mark) -> bool {
    let tables = [&tables.filter, &tables.nat];
    tables.into_iter().flatten().any(|table| table.mark.as_ref() == Some(mark))
}

/// Whether the VM's link and tables were in another network namespace and are gone by now: with that
/// namespace, or, where not everybody's namespace can be seen, with their owner, as the kernel does
/// it: its lock is ours. While that namespace is seen to be there, the answer is "could not look".
fn is_elsewhere(sight: &Sight, row: Option<&VmRemains>) -> Result<bool, Failure> {
    let Some(recorded) = row.and_then(|row| row.namespaces.as_ref()) else { return Ok(false) };
    let ours = sight.processes.own_namespaces().map_err(|e| host(&e))?;
    if recorded.net == ours.net {
        return Ok(false);
    }
    let boot_id = sight.processes.own_identity().map_err(|e| host(&e))?.boot_id;
    // The boot in which the VM was made: whoever owns it now may have taken it over since.
    let maker = row.and_then(|row| row.maker.as_ref());
    if maker.is_some_and(|maker| maker.boot_id != boot_id) {
        return Ok(true);
    }
    match sight.processes.look_for_network_namespace(&recorded.net).map_err(|e| host(&e))? {
        NamespaceSighting::There => {}
        NamespaceSighting::Gone => return Ok(true),
        NamespaceSighting::Unseen => {
            tracing::warn!(
                namespace = %recorded.net,
                "nobody is seen in its network namespace: link and tables went with their owner"
            );
            return Ok(true);
        }
    }
    let text = format!(
        "could not look at its network: it is in another network namespace ({}, here {}), in \
         which somebody runs; run `matchlock gc` there",
        recorded.net, ours.net
    );
    Err(Failure::new(FailureKind::Host, text))
}

pub(super) async fn remove_tap(deps: &Deps, vm: VmId) -> Result<(), Failure> {
    deps.taps.remove(&tap_name(vm), &deps.mark(vm)).await.map_err(|e| host(&e))
}

/// `owner` is who made them: should it still hold them, it is fenced by now, and they are taken from it.
pub(super) async fn remove_firewall(
    deps: &Deps,
    vm: VmId,
    owner: Option<&ProcessIdentity>,
) -> Result<(), Failure> {
    let (tap, mark) = (tap_name(vm), deps.mark(vm));
    let removed = match owner {
        Some(owner) => deps.firewall.remove_from(&tap, &mark, owner).await,
        None => deps.firewall.remove(&tap, &mark).await,
    };
    removed.map_err(|e| host(&e))
}
