//! The effects on a VM's network. Each does nothing for a VM without one.

use matchlock_host::firewall::{FirewallError, FirewallSpec};
use matchlock_host::tap::{HostSubnet, TapError, TapHandle, TapSpec, tap_name};
use matchlock_model::failure::{Failure, FailureKind};
use matchlock_model::spec::NetworkSpec;
use matchlock_model::subnet::{Ipv4Cidr, Subnet};
use matchlock_model::vm::OpResult;

use super::context::{StartMode, VmContext};

/// How many subnets a snapshot that is made beside a VM leaves to others.
const SPARE_SUBNETS: u64 = 8;

/// How many subnets are tried that turn out to be in use.
const SUBNET_TRIES: usize = 16;

fn host(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::from_error(FailureKind::Host, error)
}

/// Takes a subnet and makes the TAP with its gateway.
///
/// Whoever does not take the namespace's lock (another tool, an administrator) may have put an
/// address or a route into the subnet meanwhile: this host is looked at once more, and if so, the
/// subnet is given back and the next one taken.
pub(super) async fn create_tap(context: &VmContext) -> OpResult {
    let Some(network) = &context.create.spec.network else { return Ok(()) };
    leave_subnets(context).await?;
    let mut avoid = Vec::new();
    for _ in 0..SUBNET_TRIES {
        let grant = context.deps.subnets.allocate(context.id, context.epoch, avoid.clone()).await?;
        let tap = make(context, network, grant.subnet).await.map_err(|e| host(&e))?;
        let Some(other) = overlapping(context, &tap, grant.subnet).await? else {
            context.set_network(tap, grant.subnet);
            return Ok(());
        };
        // The lock is not held over the removal of a TAP.
        drop(grant.lock);
        tracing::warn!(vm_id = %context.id, subnet = %grant.subnet.cidr, %other, "a subnet is in use");
        avoid.push(Ipv4Cidr::containing(other.network, other.prefix));
        let mark = context.deps.mark(context.id);
        context.deps.taps.remove(tap.name(), &mark).await.map_err(|e| host(&e))?;
        drop(tap);
        context.deps.subnets.release(context.id, context.epoch).await?;
    }
    let text = format!("{SUBNET_TRIES} subnets in a row were taken by others of this host");
    Err(Failure::new(FailureKind::Host, text))
}

/// A template that nobody asked for takes none of the last subnets: they are for VMs.
async fn leave_subnets(context: &VmContext) -> OpResult {
    if context.create.start != (StartMode::Template { anew: false }) {
        return Ok(());
    }
    let pool = context.deps.subnet_pool.clone()?;
    let rows = context.deps.reader.vm_ids().await.map_err(|e| host(&e))?;
    let vms = u64::try_from(rows.len()).unwrap_or(u64::MAX);
    if vms.saturating_add(SPARE_SUBNETS) <= pool.count() {
        return Ok(());
    }
    let text = format!("{vms} VMs are listed, and {pool} has {} subnets", pool.count());
    Err(Failure::new(FailureKind::Busy, text).context("the subnets are left to VMs"))
}

async fn make(
    context: &VmContext,
    network: &NetworkSpec,
    subnet: Subnet,
) -> Result<TapHandle, TapError> {
    let spec = TapSpec {
        mark: context.deps.mark(context.id),
        gateway: subnet.gateway(),
        guest: subnet.guest(),
        prefix: subnet.cidr.prefix(),
        mtu: network.mtu.into(),
    };
    context.deps.taps.create(&spec).await
}

/// What of this host lies in the subnet besides the TAP itself.
async fn overlapping(
    context: &VmContext,
    tap: &TapHandle,
    subnet: Subnet,
) -> Result<Option<HostSubnet>, Failure> {
    let used = context.deps.taps.host_subnets().await.map_err(|e| host(&e))?;
    Ok(used.into_iter().find(|used| {
        used.link.as_deref() != Some(tap.name())
            && Ipv4Cidr::containing(used.network, used.prefix).overlaps(subnet.cidr)
    }))
}

/// Makes the firewall tables, and sees that this host forwards.
pub(super) async fn apply_firewall(context: &VmContext) -> OpResult {
    let Some(network) = &context.create.spec.network else { return Ok(()) };
    let subnet = context
        .subnet()
        .ok_or_else(|| Failure::new(FailureKind::Internal, "the VM has no subnet yet"))?;
    let spec = FirewallSpec {
        mark: context.deps.mark(context.id),
        tap: tap_name(context.id),
        guest: subnet.guest(),
        dns_servers: network.dns_servers.clone(),
        allow_private: network.allow_private,
        allow_host_access: network.allow_host_access,
    };
    let firewall = &context.deps.firewall;
    let tables = firewall.apply(&spec).await.map_err(|e| host(&e))?;
    context.set_firewall(tables);
    if firewall.enable_ip_forward().map_err(|e| host(&e))? {
        tracing::warn!("turned on net.ipv4.ip_forward of this host: VMs with a network need it");
    }
    // A template's guest is told nothing of a network.
    if matches!(context.create.start, StartMode::Template { .. }) {
        return Ok(());
    }
    for obstacle in firewall.obstacles().await.map_err(|e| host(&e))? {
        tracing::warn!(%obstacle, "may keep the VM from its network");
    }
    Ok(())
}

/// Removes the TAP and sees that it is gone. The hypervisor's end took its descriptor along, so
/// mostly it is.
pub(super) async fn remove_tap(context: &VmContext) -> OpResult {
    if context.create.spec.network.is_none() {
        return Ok(());
    }
    let handle = context.take_tap();
    let mark = context.deps.mark(context.id);
    let removed = context.deps.taps.remove(&tap_name(context.id), &mark).await;
    drop(handle);
    removed.map_err(|e| host(&e))
}

/// Removes the firewall tables and sees that they are gone.
pub(super) async fn remove_firewall(context: &VmContext) -> OpResult {
    if context.create.spec.network.is_none() {
        return Ok(());
    }
    let firewall = &context.deps.firewall;
    let never_applied = !context.has_firewall();
    if let Some(tables) = context.take_firewall() {
        firewall.release(tables).await.map_err(|e| host(&e))?;
    }
    let mark = context.deps.mark(context.id);
    match firewall.remove(&tap_name(context.id), &mark).await {
        // To look takes the same right as to make them: who lacks it has made none.
        Err(FirewallError::NotPermitted { .. }) if never_applied => Ok(()),
        result => result.map_err(|e| host(&e)),
    }
}

/// Gives the subnet back, once the TAP is gone.
pub(super) async fn release_subnet(context: &VmContext) -> OpResult {
    if context.create.spec.network.is_none() {
        return Ok(());
    }
    context.deps.subnets.release(context.id, context.epoch).await
}
